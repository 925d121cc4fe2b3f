"""What the agent costs, as counts that no load of the machine changes.

Seconds and ratios of them are measured by bench.py.
"""

import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import unittest
from unittest import mock

import beside
import support
from support import eventually

sys.path.insert(0, support.ROOT)
import agent

load_tests = beside.load_tests  # in a process of its own: it mostly waits

TREES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "proc")
PAGE_PART = 2048  # bytes: what is shorter comes whole
TREE_KEPT = 4 * 2**20  # bytes, and more: the parse tree of the program


def reads_so_far(pid):
    """How many system calls of the process have read a file, proc(5)."""
    with open("/proc/%d/io" % pid) as file:
        return int(re.search(r"(?m)^syscr: (\d+)", file.read()).group(1))


def own_bytes(pid):
    """The memory that no other process shares with this one, proc(5)."""
    with open("/proc/%d/smaps_rollup" % pid) as file:
        text = file.read()
    return 1024 * int(re.search(r"(?m)^Private_Dirty:\s+(\d+)", text).group(1))


def kernel_files(pid):
    """The paths of the files in /proc that the process holds open."""
    folder = "/proc/%d/fd" % pid
    paths = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # it is closed by now
            paths.append(os.readlink(os.path.join(folder, name)))
    return [path for path in paths if path.startswith("/proc/")]


class Reads(unittest.TestCase):
    def test_a_sample_reads_each_file_once(self):
        probe = agent.Probe(
            os.path.join(TREES, "debian", "proc"), os.path.join(TREES, "debian", "sys")
        )
        sampler = agent.Sampler(probe)
        with mock.patch.object(agent.os, "pread", wraps=os.pread) as pread:
            sampler.sample()
        read = [call[0][0] for call in pread.call_args_list]
        self.assertGreater(len(read), 5)
        self.assertEqual(sorted(read), sorted(set(read)))

    def test_outside_of_a_job_nothing_is_asked_of_one(self):
        probe = agent.Probe(
            os.path.join(TREES, "debian", "proc"), os.path.join(TREES, "debian", "sys")
        )
        sampler = agent.Sampler(probe)
        self.assertEqual(sampler.job, {})
        self.assertNotIn(sampler.read_job_memory, sampler.readers)

    def test_a_running_agent_makes_no_read_more_than_it_has_files(self):
        samples = 20
        with socket.socket() as listener:
            listener.bind((support.HOST, 0))
            listener.listen(1)
            listener.settimeout(support.PATIENCE)
            port = listener.getsockname()[1]
            with support.start("agent.py", "--port", port, "--interval", "0.1") as tool:
                sock = listener.accept()[0]
                sock.settimeout(support.PATIENCE)
                with sock, sock.makefile("rb") as stream:
                    answer(sock, stream, 30)  # its threads have had their first rounds
                    before = reads_so_far(tool.pid)
                    answer(sock, stream, samples)
                    reads = reads_so_far(tool.pid) - before
                files = kernel_files(tool.pid)
        long = [path for path in files if is_long(path)]
        # a beat more than the samples that were taken from the wire, at most
        most = (samples + 1) * (len(files) + len(long)) + len(files)
        self.assertGreater(reads, (samples - 1) * 4)
        self.assertLess(reads, most)


def answer(sock, stream, count):
    """Take so many samples and say ok to each."""
    for _ in range(count):
        pickle.load(stream)
        sock.sendall(b"ok\n")


def is_long(path):
    """Does the kernel give it in several parts, or may it?"""
    try:
        with open(path, "rb") as file:
            return len(file.read()) >= PAGE_PART
    except OSError:  # of a process that has ended
        return False


class Memory(unittest.TestCase):
    def start(self, *words, **more):
        tool = support.start(*words, "--stdout", **more)
        self.addCleanup(tool.kill)
        eventually(lambda: tool.out.count("\n") >= 1)
        return tool

    def test_the_tree_that_the_program_was_parsed_into_is_not_kept(self):
        path = os.path.join(support.ROOT, "agent.py")
        with open(path, "rb") as file:
            from_pipe = self.start("-", stdin=file)
        from_file = self.start("agent.py", as_typed=True)
        tells = support.run("-c", "import sys; print(hasattr(sys, 'orig_argv'))").stdout
        if tells.strip() != "True":
            self.skipTest("Python before 3.10 does not tell its own words")
        saved = own_bytes(from_pipe.pid) - own_bytes(from_file.pid)
        self.assertGreater(saved, TREE_KEPT)

    def test_it_stays_one_process_with_the_options_of_its_interpreter(self):
        tool = self.start("-u", "-W", "error", os.path.join(support.ROOT, "agent.py"))
        with open("/proc/%d/cmdline" % tool.pid) as file:
            words = file.read().split("\0")
        self.assertEqual(words[1:4], ["-u", "-W", "error"])
        self.assertTrue([word for word in words if word.endswith("/agent.py")])
        self.assertEqual(support.descendants(tool.pid), [])

    def test_a_command_does_not_wait_for_a_second_start(self):
        words = ("agent.py", "--port", support.closed_port(), "--")
        done = support.run(*words, "sh", "-c", "tr '\\0' ' ' < /proc/$PPID/cmdline")
        self.assertNotIn(" -c ", done.stdout.partition(" -- ")[0])
        self.assertIn("agent.py", done.stdout)

    def test_a_program_that_comes_through_a_pipe_runs(self):
        with open(os.path.join(support.ROOT, "agent.py"), "rb") as file:
            text = file.read()
        for name in ("-", "/dev/stdin"):
            done = subprocess.run(
                [support.PYTHON, name, "--once"],
                input=text,
                stdout=subprocess.PIPE,
                timeout=support.PATIENCE,
            )
            self.assertEqual(done.returncode, 0)
            self.assertIn(b'"cpu"', done.stdout)


if __name__ == "__main__":
    unittest.main()
