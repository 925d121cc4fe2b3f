"""The agent around a command, the end-of-job report, and what a terminal shows."""

import json
import os
import shutil
import pickle
import pty
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from functools import partial

import beside
import support
from support import eventually
from test_agent_link import DummyServer, start_agent

sys.path.insert(0, support.ROOT)
import agent

load_tests = beside.load_tests  # in a process of its own: it mostly waits

JOB = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_END_TIME": "4102444800",
    "SLURM_JOB_CPUS_PER_NODE": "4",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "c1",
}


LONELY_UID = 61234  # of nobody else's processes


def ignore_signals(numbers):
    """In a process that is about to become another: these, and no others, are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN if number in numbers else signal.SIG_DFL)


def ignored(line):
    """The mask of a line SigIgn, proc(5), without signals 32 and up.

    32 and 33 are the C library's own; its posix_spawn(), by which Python 3.13 starts what is
    named by a path, leaves them ignored.
    """
    return int(line.split()[1], 16) & 0x7FFFFFFF


def around(*command, port=None, **more):
    """Run a command under an agent that has no master, or one at `port`, to its end."""
    return support.run(
        "agent.py", "--port", port or support.closed_port(), "--", *command, **more
    )


class Command(unittest.TestCase):
    def test_it_ends_with_the_exit_code_of_the_command(self):
        for script, code in (
            ("exit 0", 0),
            ("exit 3", 3),
            ("exit 255", 255),
            ("kill -TERM $$", 143),
            ("kill -KILL $$", 137),
            ("kill -SEGV $$", 139),
        ):
            with self.subTest(script):
                self.assertEqual(around("sh", "-c", script).returncode, code)

    def test_no_such_command_is_127_and_one_that_cannot_run_126(self):
        for name, code, words in (
            ("./nonexistent", 127, "No such file"),
            ("/etc", 126, "Permission denied"),
        ):
            done = around(name)
            self.assertEqual(done.returncode, code)
            self.assertRegex(
                done.stderr, r"\Aerror: [^\n]*%s[^\n]*%s[^\n]*\n\Z" % (words, name)
            )

    def test_its_streams_are_those_of_the_command(self):
        done = around("sh", "-c", "cat; echo talk >&2", stdin="data\n")
        self.assertEqual(done.stdout, "data\n")
        self.assertIn("talk\n", done.stderr)

    def test_its_words_reach_the_command_as_they_are(self):
        words = ["--host", "x", "--", "-c", "a b", "", "\u00e4"]
        done = around(
            sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *words
        )
        self.assertEqual(done.stdout, ascii(words) + "\n")

    def test_files_that_it_inherited_reach_the_command(self):
        reader, writer = os.pipe()  # as PMI_FD of srun --mpi=pmi2
        os.set_inheritable(writer, True)
        with open(reader, "rb") as file:
            done = subprocess.run(
                [
                    support.PYTHON,
                    os.path.join(support.ROOT, "agent.py"),
                    "--port",
                    str(support.closed_port()),
                    "--",
                    sys.executable,
                    "-c",
                    "import os; os.write(%d, b'here')" % writer,
                ],
                close_fds=False,
                stderr=subprocess.DEVNULL,
                timeout=20,
            )
            os.close(writer)
            self.assertEqual((done.returncode, file.read()), (0, b"here"))

    def test_a_master_that_is_not_there_neither_delays_nor_fails_it(self):
        began = time.monotonic()
        bare = support.run("-c", "pass")
        bare_seconds = time.monotonic() - began
        self.assertEqual(bare.returncode, 0)
        for host in ("127.0.0.1", "no-such-host.invalid", "192.0.2.1"):  # TEST-NET-1
            with self.subTest(host):
                began = time.monotonic()
                done = around("true", env={"SENTINEL_HOST": host})
                self.assertEqual(done.returncode, 0)
                self.assertLess(time.monotonic() - began, bare_seconds + 1.5)

    def test_a_master_that_hangs_delays_it_by_no_more_than_its_goodbye(self):
        with DummyServer() as server:
            server.listener.close()
            began = time.monotonic()
            self.assertEqual(around("true", port=server.port).returncode, 0)
            self.assertLess(time.monotonic() - began, 3)

    def test_the_goodbye_has_its_exit_code_and_the_report(self):
        with DummyServer(answer=b"ok\n") as server:
            for script, bye in (
                ("sleep 0.6; exit 3", "exit 3"),
                ("sleep 0.6", "exit 0"),
                ("sleep 0.6; kill -KILL $$", "SIGKILL"),
            ):
                with self.subTest(script):
                    around("sh", "-c", script, port=server.port)
                    last = eventually(
                        lambda: (
                            server.dicts
                            and "bye" in server.dicts[-1]
                            and server.dicts[-1]
                        )
                    )
                    self.assertEqual(last["bye"], bye)
                    self.assertRegex(
                        last["report"], "ran 0:00:0[01]; CPU mean .*memory peak"
                    )
                    self.assertLessEqual(len(last["report"].encode()), 255)
                    self.assertTrue([s for s in server.dicts if "cpu" in s])
                    server.samples.clear()

    def test_signals_reach_the_command(self):
        script = (
            'for s in TERM INT HUP USR1 USR2; do trap "echo got $s" $s; done; echo ready;'
            " i=0; while [ $i -lt 400 ]; do i=$((i+1)); sleep 0.05; done"
        )
        with start_agent(
            "--port",
            support.closed_port(),
            "--",
            "sh",
            "-c",
            script,
            # a shell cannot trap what was ignored when it started
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as tool:
            eventually(lambda: "ready" in tool.out)
            for name in (
                "INT",
                "HUP",
                "USR1",
                "USR2",
                "TERM",
                "USR1",
            ):  # after TERM, too
                before = tool.out.count("got " + name)
                tool.send_signal(getattr(signal, "SIG" + name))
                eventually(
                    lambda name=name, before=before: (
                        tool.out.count("got " + name) == before + 1
                    )
                )
                self.assertIsNone(tool.code)
            tool.kill()

    def test_what_is_typed_at_a_terminal_reaches_the_command_once(self):
        program = (
            "import signal, time\nseen = []\n"
            "signal.signal(signal.SIGINT, lambda *a: seen.append(1))\n"
            "print('ready', flush=True)\n"
            "end = time.monotonic() + 1.5\n"
            "while time.monotonic() < end: time.sleep(0.05)\n"
            "print('seen', len(seen), flush=True)\n"
        )
        with Terminal(
            "--port", support.closed_port(), "--", sys.executable, "-c", program
        ) as terminal:
            terminal.shows("ready")
            os.write(terminal.fd, b"\x03")
            terminal.shows("seen 1")

    @support.slow("waits for a limit")
    def test_sigterm_is_reported_within_two_seconds_though_the_command_stays(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port",
            server.port,
            "--",
            "sh",
            "-c",
            "trap '' TERM; echo ready; i=0; while [ $i -lt 60 ]; do i=$((i+1)); sleep 0.05;"
            " done; exit 5",
        ) as tool:
            eventually(lambda: server.samples and "ready" in tool.out)
            tool.send_signal(signal.SIGTERM)
            tool.logged("report of .*, SIGTERM: ran", 2)
            eventually(lambda: server.dicts[-1].get("bye") == "SIGTERM", 2)
            self.assertIsNone(tool.code)
            self.assertEqual(tool.wait(), 5)
            self.assertNotIn("lost the master", tool.log)

    def test_the_command_goes_on_when_watching_fails(self):
        with start_agent(
            "--port",
            support.closed_port(),
            "--",
            "sh",
            "-c",
            "sleep 1; exit 4",
            patch="agent.Sampler.sample = None",
        ) as tool:
            self.assertEqual(tool.wait(), 4)
            self.assertIn("not watching, the command runs without", tool.log)
        patch = (
            "import time\ndef fail(self, *a):\n    raise RuntimeError('odd')\n"
            "agent.Link.exchange = fail"
        )
        with start_agent(
            "--port",
            support.closed_port(),
            "--",
            "sh",
            "-c",
            "sleep 1; exit 4",
            patch=patch,
        ) as tool:
            tool.logged("stopped watching: RuntimeError")
            self.assertEqual(tool.wait(), 4)

    def test_a_link_that_fails_while_it_is_up_leaves_the_command_its_signals(self):
        patch = "def fail(self, sock):\n    raise RuntimeError('odd')\nagent.Link.hear = fail"
        script = (
            "trap 'exit 7' TERM; echo ready; i=0;"
            " while [ $i -lt 400 ]; do i=$((i+1)); sleep 0.05; done"
        )
        with DummyServer(greeting=b"ok\n" * 9) as server, start_agent(
            "--port", server.port, "--", "sh", "-c", script, patch=patch
        ) as tool:
            tool.logged("stopped watching: RuntimeError")
            eventually(lambda: "ready" in tool.out)
            support.stays(lambda: tool.code is None, 0.3)
            tool.send_signal(signal.SIGTERM)
            self.assertEqual(tool.wait(), 7)
            self.assertNotIn("Traceback", tool.log)

    def test_a_signal_that_cannot_be_passed_on_is_told_and_stops_nothing(self):
        patch = (
            "import subprocess\ndef fail(self, number):\n"
            "    raise PermissionError(1, 'Operation not permitted')\n"
            "subprocess.Popen.send_signal = fail"
        )
        with start_agent(
            "--port",
            support.closed_port(),
            "--",
            "sh",
            "-c",
            "echo ready; sleep 1; exit 4",
            patch=patch,
        ) as tool:
            eventually(lambda: "ready" in tool.out)
            tool.send_signal(signal.SIGUSR1)
            tool.logged("SIGUSR1 cannot be passed on: Operation not permitted")
            self.assertEqual(tool.wait(), 4)
            self.assertNotIn("stopped watching", tool.log)

    def test_a_signal_without_a_name_is_an_ending_as_others(self):
        with DummyServer(answer=b"ok\n") as server:
            done = around("sh", "-c", "sleep 0.6; kill -40 $$", port=server.port)
            self.assertEqual(done.returncode, 128 + 40)
            self.assertNotIn("stopped watching", done.stderr)
            self.assertEqual(
                eventually(lambda: server.dicts[-1].get("bye")), "signal 40"
            )

    def test_its_exit_code_is_known_though_sigchld_was_ignored(self):
        done = around(
            "sh",
            "-c",
            "exit 3",
            preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        )
        self.assertEqual(done.returncode, 3)

    def test_closed_streams_stay_closed_and_change_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            seen = os.path.join(folder, "seen")
            # a shell opens what it needs on high numbers: 0, 1 and 2 are what it was given
            script = (
                "for n in 0 1 2; do [ -e /proc/$$/fd/$n ] && s=$s$n; done 9>&-;"
                ' echo "open:$s" 1>%s; sleep 0.5; exit 5' % seen
            )
            for flags in ([], ["--secret-file", "/nonexistent"]):
                words = ["agent.py", "--port", str(support.closed_port()), *flags]
                words = [support.PYTHON, *words, "--", "sh", "-c", script]
                with self.subTest(flags):
                    done = subprocess.run(
                        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words],
                        cwd=support.ROOT,
                        timeout=20,
                    )
                    self.assertEqual(done.returncode, 5)
                    with open(seen) as file:
                        self.assertEqual(file.read(), "open:\n")

    def test_a_log_that_nobody_reads_stops_nothing(self):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [
                support.PYTHON,
                os.path.join(support.ROOT, "agent.py"),
                "--port",
                str(support.closed_port()),
                "--",
                "sh",
                "-c",
                "sleep 0.5; exit 6",
            ],
            stderr=writer,
            timeout=20,
        )
        os.close(writer)
        self.assertEqual(done.returncode, 6)


class Unwatched(unittest.TestCase):
    """A job that waited for days has to run, whatever is wrong with the watching."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def around(self, *flags, script="echo ran; exit 3", env=None):
        return support.run(
            "agent.py", *flags, "--", "sh", "-c", script, env=env, seconds=20
        )

    def test_the_command_runs_and_one_line_names_what_is_wrong(self):
        proc = os.path.join(self.folder, "proc")
        os.mkdir(proc)
        for name, text in (("stat", "cpu  1 2 3 4 5 6 7 8\n"), ("meminfo", "odd\n")):
            with open(os.path.join(proc, name), "w") as file:
                file.write(text)
        port = support.closed_port()
        for flags, env, words in (
            (["--procfs", proc], {}, "no ram in .*/meminfo"),
            (["--procfs", "/nonexistent"], {}, "/nonexistent/stat"),
            (["--secret-file", "/nonexistent"], {}, "/nonexistent"),
            (["--report", "/nonexistent/r.json"], {}, "/nonexistent/r.json"),
            ([], {"SENTINEL_SECRET_FILE": "/nonexistent"}, "/nonexistent"),
            ([], {"SENTINEL_PORT": "abc"}, "SENTINEL_PORT: 'abc'; allowed: 1 to 65535"),
            ([], {"SENTINEL_HOST": "a b"}, "SENTINEL_HOST: 'a b'; allowed: HOST"),
            ([], {"SLURM_JOB_END_TIME": "abc"}, "SLURM_JOB_END_TIME is 'abc'"),
            ([], {"SLURM_JOB_END_TIME": "inf"}, "SLURM_JOB_END_TIME is 'inf'"),
        ):
            with self.subTest(words):
                if "SENTINEL_PORT" not in env:
                    env = dict(env, SENTINEL_PORT=port)
                done = self.around(*flags, env=env)
                self.assertEqual((done.returncode, done.stdout), (3, "ran\n"))
                told = [
                    line for line in done.stderr.splitlines() if "report" not in line
                ]
                self.assertRegex("\n".join(told), words)

    def test_its_signals_and_exit_codes_are_its_own(self):
        for script, code in (("kill -TERM $$", -15), ("exit 9", 9)):
            done = self.around("--secret-file", "/nonexistent", script=script)
            self.assertEqual(done.returncode, code)
        done = support.run("agent.py", "--secret-file", "/nonexistent", "--", "./none")
        self.assertEqual(done.returncode, 127)
        self.assertRegex(done.stderr, r"error: No such file or directory: \./none\n\Z")

    def test_it_has_the_signals_ignored_that_it_would_have_without_us(self):
        """Those that Python ignores are not ours to pass on, and those of nohup are."""
        script = "grep SigIgn /proc/self/status"
        for numbers in (
            (),
            (signal.SIGINT, signal.SIGQUIT),  # what a shell starts in the background
            (signal.SIGHUP,),  # nohup
        ):
            ignore = partial(ignore_signals, numbers)
            plain = subprocess.check_output(["sh", "-c", script], preexec_fn=ignore)
            port = str(support.closed_port())
            for flags in (["--port", port], ["--secret-file", "/nonexistent"]):
                with self.subTest("%s %s" % (flags, numbers)):
                    done = support.run(
                        *["agent.py", *flags, "--", "sh", "-c", script],
                        preexec_fn=ignore,
                    )
                    self.assertEqual(ignored(done.stdout), ignored(plain.decode()))

    def test_it_runs_where_no_second_process_can_be_had(self):
        patch = (
            "import subprocess\ndef fail(*a, **k):\n"
            "    raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
            "subprocess.Popen = fail"
        )
        with start_agent(
            "--port",
            support.closed_port(),
            "--",
            "sh",
            "-c",
            "echo ran; exit 3",
            patch=patch,
        ) as tool:
            self.assertEqual(tool.wait(), 3)
            self.assertEqual(tool.out, "ran\n")
            self.assertRegex(
                tool.log, r"\A[^\n]*not watching[^\n]*: no second process:"
            )

    @support.requires("root", "/usr/bin/python3")
    def test_it_runs_as_the_only_process_that_its_user_may_have(self):
        shutil.copy(os.path.join(support.ROOT, "agent.py"), self.folder)
        os.chmod(self.folder, 0o755)
        path = os.path.join(self.folder, "agent.py")

        def confine():
            os.setgroups([])
            os.setgid(LONELY_UID)
            os.setuid(LONELY_UID)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

        done = support.run(
            *[path, "--port", support.closed_port(), "--"],
            *["sh", "-c", "echo ran; exit 3"],
            python="/usr/bin/python3",
            preexec_fn=confine,
            cwd=self.folder,
        )
        self.assertEqual((done.returncode, done.stdout), (3, "ran\n"), done.stderr)
        self.assertIn("no second process", done.stderr)

    def test_a_wrong_flag_stops_it(self):
        done = self.around("--port", "abc")
        self.assertEqual((done.returncode, done.stdout), (2, ""))


class Nohup(unittest.TestCase):
    """What is ignored when a half of the watcher starts stays ignored."""

    def start_herd(self, *numbers):
        tool = support.start(
            *["agent.py", "--herd"],
            stdin=subprocess.PIPE,
            env={"PATH": "/nonexistent"},
            preexec_fn=partial(ignore_signals, numbers),
        )
        self.addCleanup(tool.stop)
        self.addCleanup(tool.process.stdin.close)
        eventually(lambda: "squeue" in tool.out)  # its first look, so signals are set
        return tool

    def test_the_herd_stays_at_signals_that_it_has_to_ignore(self):
        tool = self.start_herd(signal.SIGHUP, signal.SIGINT)
        for number in (signal.SIGHUP, signal.SIGINT):
            tool.send_signal(number)
        support.stays(lambda: tool.code is None, 1.5)
        tool.process.stdin.close()
        self.assertEqual(tool.wait(), 0)

    def test_it_ends_at_those_that_it_need_not(self):
        for number in (signal.SIGHUP, signal.SIGINT):
            with self.subTest(number):
                tool = self.start_herd()
                tool.send_signal(number)
                self.assertEqual(tool.wait(), 0)


class Neighbours(unittest.TestCase):
    """Files of the user's own beside the script, or in the folder it is started in."""

    def test_they_do_not_hide_the_standard_library(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        names = ("json", "select", "socket", "signal", "typing", "argparse", "zlib")
        for name in names:
            with open(os.path.join(folder, name + ".py"), "w") as file:
                file.write("raise RuntimeError('the wrong %s')\n" % name)
        path = shutil.copy(os.path.join(support.ROOT, "agent.py"), folder)
        with open(path) as file:
            text = file.read()
        for words, stdin in (([path, "--once"], ""), (["-", "--once"], text)):
            with self.subTest(words):
                done = support.run(*words, stdin=stdin, cwd=folder)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn("cpu", json.loads(done.stdout))

    def test_a_system_that_is_no_unix_is_one_line(self):
        start = "import os, sys; import agent; os.name = 'nt'; sys.exit(agent.main(['--once']))"
        done = support.run("-c", start, cwd=support.ROOT)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aerror: [^\n]*WSL\n\Z")


class Reports(unittest.TestCase):
    GIB = 2**30

    def lines(self, **last):
        """The report of two samples, 10 s each."""
        report = agent.Report()
        first = (
            dict(last, cpu=0.0, job_cpu=20.0)
            if "job_cpu" in last
            else dict(last, cpu=0.0)
        )
        for sample in (first, last):
            report.add(sample, 10.0)
        return list(report.lines(last))

    def test_it_says_what_was_used_of_what_was_asked_for(self):
        text = self.lines(
            cpu=50.0,
            job_cpu=30.0,
            cpus=64,
            job_cpus=4,
            job_mem=11.2 * self.GIB,
            mem_used=1.0,
            mem_total=512 * self.GIB,
            job_mem_limit=64 * self.GIB,
            gpu=3.0,
            gpus=2,
        )
        self.assertEqual(
            text,
            [
                "ran 0:00:20",
                "CPU mean 25.0 %, peak 30.0 % of 4 CPUs",
                "memory peak 11.2 GB of 64 GB",
                "GPU mean 3.0 % of 2",
                "asked for 64 GB, peak 11.2 GB (sampled, 1 run, 2 samples): --mem=14G would do",
            ],
        )

    def test_without_a_job_it_is_about_the_node(self):
        self.assertEqual(
            self.lines(
                cpu=50.0, cpus=2, mem_used=2.0 * self.GIB, mem_total=8 * self.GIB
            ),
            [
                "ran 0:00:20",
                "CPU mean 25.0 %, peak 50.0 % of the node's 2 CPUs",
                "memory peak 2 GB of the node's 8 GB",
            ],
        )

    def test_memory_is_advised_on_when_it_was_too_much_or_nearly_too_little(self):
        for peak, limit, advice in (
            (0.2, 0.6, "--mem=300M"),
            (0.55, 0.6, "--mem=700M"),
            (5.0, 6.5, None),
            (10.0, 10.0, "--mem=12G"),
            (1.0, 64.0, "--mem=2G"),
            (0.01, 0.1, None),
            (0.001, 4.0, "--mem=100M"),
        ):
            text = "; ".join(
                self.lines(
                    cpu=1.0,
                    job_cpu=1.0,
                    cpus=2,
                    job_cpus=2,
                    job_mem=peak * self.GIB,
                    mem_used=1.0,
                    job_mem_limit=limit * self.GIB,
                    mem_total=512 * self.GIB,
                )
            )
            with self.subTest(text):
                self.assertEqual(
                    re.findall("--mem=[0-9]+[GM]", text), [advice] if advice else []
                )

    def test_a_job_without_a_limit_gets_no_advice(self):
        text = "; ".join(
            self.lines(
                cpu=1.0,
                job_cpu=1.0,
                cpus=2,
                job_cpus=2,
                job_mem=self.GIB,
                mem_used=1.0,
                mem_total=8 * self.GIB,
            )
        )
        self.assertNotIn("--mem", text)
        self.assertIn("memory peak 1 GB of 8 GB", text)

    def test_each_value_has_the_weight_of_its_time(self):
        report = agent.Report()
        report.add({"cpu": 100.0}, 0.25)
        report.add({"cpu": 0.0}, 9.75)
        report.add({"gpu": 7.0}, 10.0)
        self.assertAlmostEqual(report["cpu"][1], 2.5)
        self.assertEqual(report["cpu"][0], 10.0)
        self.assertEqual(report["gpu"], (10.0, 7.0, 7.0))

    def test_a_long_job_has_hours(self):
        report = agent.Report()
        report.add({"cpu": 1.0, "mem_used": 1.0}, 100 * 3600 + 62)
        self.assertEqual(list(report.lines({}))[0], "ran 100:01:02")

    def test_it_comes_at_the_end_of_a_job_and_not_of_a_plain_agent(self):
        for environ, count in ((JOB, 1), ({}, 0)):
            with DummyServer(answer=b"ok\n") as server, start_agent(
                "--port", server.port, env=environ
            ) as tool:
                eventually(lambda: server.samples)
                tool.send_signal(signal.SIGTERM)
                self.assertEqual(tool.wait(2), 0)
                self.assertEqual(tool.log.count("SIGTERM: ran"), count)
                self.assertEqual("report" in server.dicts[-1], bool(count))
                self.assertEqual(server.dicts[-1]["bye"], "SIGTERM")

    def test_it_can_be_kept_as_json(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "report.json")
            support.run(
                "agent.py",
                "--port",
                support.closed_port(),
                "--report",
                path,
                "--",
                "sleep",
                "0.5",
                env=JOB,
            )
            with open(path) as file:
                facts = json.load(file)
            self.assertEqual(
                (facts["node"], facts["job"], facts["ended"]), ("c1", "42", "exit 0")
            )
            seconds, mean, peak = facts["totals"]["cpu"]
            self.assertTrue(0.4 < seconds < 5 and 0 <= mean <= peak <= 100)
            self.assertRegex(facts["text"][0], "ran 0:")

    @support.slow("load")
    def test_the_mean_agrees_with_what_the_command_used(self):
        """A command that burns half a CPU of this machine; the node's other load is measured."""
        with open("/proc/stat") as file:
            before = agent.parse_cpu(file.read())
        done = around(
            sys.executable,
            "-c",
            "import time\nend = time.monotonic() + 2\n"
            "while time.monotonic() < end: pass",
        )
        with open("/proc/stat") as file:
            after = agent.parse_cpu(file.read())
        real = 100 * (1 - (after[0] - before[0]) / (after[1] - before[1]))
        mean = float(re.search("CPU mean ([0-9.]+) %", done.stderr).group(1))
        self.assertAlmostEqual(mean, real, delta=10)


class Terminal:
    """An agent on a terminal of its own; .text is what it shows."""

    def __init__(self, *flags, **environ):
        words = [support.PYTHON, os.path.join(support.ROOT, "agent.py")] + [
            str(f) for f in flags
        ]
        self.fd, end = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty"] + words,
            stdin=end,
            stdout=end,
            stderr=end,
            env=dict(os.environ, **environ),
        )
        os.close(end)
        self.chunks = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        try:
            for chunk in iter(lambda: os.read(self.fd, 4096), b""):
                self.chunks.append(chunk)
        except OSError:  # the other side has ended
            pass

    @property
    def text(self):
        return b"".join(self.chunks).decode("utf-8", "replace")

    def shows(self, pattern, seconds=10):
        return eventually(lambda: re.search(pattern, self.text), seconds, pattern)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.reader.join(5)
        os.close(self.fd)


class Screen(unittest.TestCase):
    def test_a_terminal_shows_one_line_that_is_alive(self):
        with DummyServer(answer=b"ok\n") as server, Terminal(
            "--port", server.port, "--interval", "0.2"
        ) as terminal:
            status = r"\r\x1b\[K\d\d:\d\d:\d\d agent: cpu [0-9.]+ %, ram [0-9.]+ %, "
            terminal.shows(status + "acknowledged by 127.0.0.1:%d" % server.port)
            eventually(lambda: len(re.findall(status, terminal.text)) > 5)
            self.assertEqual(terminal.text.count("\n"), 1)  # connected to ...
            os.write(terminal.fd, b"\x03")
            self.assertEqual(terminal.process.wait(10), 0)
            terminal.shows(
                "goodbye: SIGINT\r\n$"
            )  # what follows begins on a line of its own
        self.assertEqual(server.dicts[-1], {"bye": "SIGINT"})

    def test_it_says_when_nobody_answers(self):
        with Terminal("--port", support.closed_port(), "--interval", "0.2") as terminal:
            terminal.shows("no answer from 127.0.0.1:")

    def test_there_are_no_colours_at_all(self):
        with Terminal(
            "--port", support.closed_port(), "--interval", "0.2", NO_COLOR="1"
        ) as terminal:
            terminal.shows("no answer from")
            self.assertNotIn("\x1b[", terminal.text.replace("\r\x1b[K", ""))

    def test_a_file_gets_plain_lines(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "0.2"
        ) as tool:
            eventually(lambda: len(server.samples) > 5)
            self.assertRegex(
                tool.log, r"\A\d\d:\d\d:\d\d agent: connected to 127.0.0.1:\d+\n\Z"
            )

    def test_verbose_logs_each_sample(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "0.2", "--verbose"
        ) as tool:
            eventually(lambda: tool.log.count("'cpu': ") > 3)
            self.assertGreater(len(pickle.dumps(server.dicts[0])), 100)


if __name__ == "__main__":
    unittest.main()
