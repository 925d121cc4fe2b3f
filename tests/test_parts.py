"""Parts: the processes, CPUs and threads of a job, one by one, and the way they take.

Trees of /proc and of cgroups are made here, as large and as odd as a test needs them; a real
cgroup v1 tells what 256 processes cost.  test_lab_parts.py has real jobs of known truth.
"""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from unittest import mock

import beside
import support
import test_herd
from support import eventually, stays
from test_agent_link import DummyServer, start_agent

sys.path.insert(0, support.ROOT)
import agent

load_tests = beside.load_tests  # in a process of its own: it mostly waits

V1 = "4:freezer:/slurm/uid_1000/job_7/step_batch/task_0\n"
V2 = "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0\n"
# The agent with shorter times than it has
HURRY = "agent.PART_SECONDS = 0.4; agent.SECOND_LOOK_SECONDS = 0.2"
STAT = (
    "%d (%s) %s 1 1 1 0 -1 4194304 100 0 0 0 %d %d 0 0 20 0 %d 0 %d 1000000 %d"
    " 18446744073709551615 1 1 0 0 0 0 0 16781312 0 0 0 0 17 %d 0 0 0 0 0\n"
)
STATUS = """\
Name:\t%s
Umask:\t0022
State:\t%s (as it is)
Tgid:\t%d
Uid:\t%d\t%d\t%d\t%d
VmPeak:\t  999999 kB
VmHWM:\t  %d kB
VmRSS:\t  %d kB
Threads:\t%d
Cpus_allowed:\tff
Cpus_allowed_list:\t%s
"""


class Tree:
    """A /proc and a /sys with a job 7 in a cgroup."""

    def __init__(self, test, cgroup=V1, cpus=2, **environ):
        self.folder = tempfile.mkdtemp()
        test.addCleanup(shutil.rmtree, self.folder)
        self.stat([(0, 100)] * cpus)
        self.write("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 600 kB\n")
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/status", STATUS % self.status_words())
        self.root = "sys/fs/cgroup/unified/system.slice/slurmstepd.scope/job_7"
        if cgroup == V1:
            self.root = "sys/fs/cgroup/freezer/slurm/uid_1000/job_7"
        os.makedirs(self.path(self.root))
        environ = dict({"SLURM_JOB_ID": "7"}, **environ)
        patch = mock.patch.dict(os.environ, environ)
        patch.start()
        test.addCleanup(patch.stop)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)

    def refuse(self, name):
        """Make a file that cannot be read, by root either."""
        path = self.path(name)
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.makedirs(path)

    def stat(self, cores):
        """Write /proc/stat: (busy, idle) ticks of each CPU, None for one that is off."""
        lines = ["cpu  0 0 0 1000 0 0 0 0 0 0"]
        for number, core in enumerate(cores):
            if core:
                lines.append("cpu%d %d 0 0 %d 0 0 0 0 0 0" % ((number,) + core))
        self.write("proc/stat", "\n".join(lines) + "\nintr 99 1 2 3\nctxt 5\n")

    @staticmethod
    def status_words(
        pid=1,
        name="x",
        state="S",
        uid=None,
        peak=2000,
        mem=1000,
        threads=1,
        allowed="0-1",
    ):
        uid = os.getuid() if uid is None else uid
        return (name, state, pid, uid, uid, uid, uid, peak, mem, threads, allowed)

    def process(
        self,
        pid,
        step="step_0/task_0",
        name="app",
        state="S",
        ticks=0,
        started=500,
        mem=1000,
        cpu=0,
        threads=(),
        environ=(),
        words=(),
        io=(0, 0),
        wchan="0",
        **more,
    ):
        """Put a process into a step of the job, or change it."""
        count = len(threads) or 1
        fields = (name, state, ticks, 0, count, started, mem // 4, cpu)
        self.write("proc/%d/stat" % pid, STAT % ((pid,) + fields))
        status = self.status_words(
            pid, name, state, mem=mem, peak=2 * mem, threads=count, **more
        )
        self.write("proc/%d/status" % pid, STATUS % status)
        self.write("proc/%d/io" % pid, "rchar: %d\nwchar: %d\nsyscr: 5\n" % io)
        self.write("proc/%d/wchan" % pid, wchan)
        self.write("proc/%d/environ" % pid, "\0".join(environ) + "\0")
        self.write("proc/%d/cmdline" % pid, "\0".join(words or (name,)) + "\0")
        for number, (thread_state, thread_cpu) in enumerate(threads):
            fields = (name, thread_state, 0, 0, count, started, 1, thread_cpu)
            self.write(
                "proc/%d/task/%d/stat" % (pid, pid + number),
                STAT % ((pid + number,) + fields),
            )
        procs = "%s/%s/cgroup.procs" % (self.root, step)
        known = ""
        if os.path.exists(self.path(procs)):
            with open(self.path(procs)) as file:
                known = file.read()
        if str(pid) not in known.split():
            self.write(procs, known + "%d\n" % pid)

    def parts(self, attached=False):
        probe = agent.Probe(self.path("proc"), self.path("sys"))
        return agent.Parts(agent.Sampler(probe), attached)


def ranks(look):
    return {part["pid"]: part for part in look if part["part"] == "rank"}


class Parsers(unittest.TestCase):
    def test_a_name_may_hold_anything(self):
        text = STAT % (7, "my (odd) ) R 1", "S", 30, 12, 8, 500, 10, 3)
        self.assertEqual(
            agent.parse_stat(text), ("my (odd) ) R 1", "S", 42, 8, 500, 10, 3)
        )

    def test_cpus_of_a_list_and_back(self):
        for text, cpus in (
            ("0-3,8", {0, 1, 2, 3, 8}),
            ("5", {5}),
            ("", set()),
            ("0,2,4", {0, 2, 4}),
            ("126-129", {126, 127, 128, 129}),
        ):
            with self.subTest(text):
                self.assertEqual(agent.parse_cpu_list(text + "\n"), cpus)
                self.assertEqual(agent.format_cpu_list(cpus), text)
        self.assertLess(len(agent.parse_cpu_list("0-4000000000")), 10000)

    def test_the_rank_is_that_of_the_innermost_starter(self):
        for words, in_step, rank, local in (
            ("SLURM_PROCID=5 SLURM_LOCALID=1", True, 5, 1),
            ("SLURM_PROCID=0 SLURM_LOCALID=0", False, None, None),  # a batch script
            (
                "SLURM_PROCID=0 OMPI_COMM_WORLD_RANK=9 OMPI_COMM_WORLD_LOCAL_RANK=1",
                False,
                9,
                1,
            ),
            ("SLURM_PROCID=1 SLURM_LOCALID=0 RANK=6 LOCAL_RANK=2", True, 6, 2),
            ("SLURM_PROCID=3 SLURM_LOCALID=3 RANK=0", True, 3, 3),  # RANK=0 by hand
            ("RANK=4", False, 4, None),
            ("PMI_RANK=7 MPI_LOCALRANKID=3", False, 7, 3),
            ("SLURM_PROCID=x", True, None, None),
            ("HOME=/ RANKS=3", True, None, None),
        ):
            with self.subTest(words, in_step=in_step):
                known = agent.parse_environ(words.replace(" ", "\0"), in_step)
                self.assertEqual(known.get("rank"), rank)
                self.assertEqual(known.get("local_rank"), local)

    def test_a_function_that_is_hidden_or_none_is_no_wait(self):
        self.assertEqual(agent.parse_wchan("0"), "")
        self.assertEqual(agent.parse_wchan(""), "")
        self.assertEqual(agent.parse_wchan("futex_wait_queue\n"), "futex_wait_queue")

    def test_a_program_has_the_name_by_which_people_know_it(self):
        for line, name in (
            ("/opt/app --fast", "app"),
            ("postgres: writer process", "postgres:"),
            ("/usr/bin/python3 train.py", "python3"),
            ("/usr/bin/python3 ./bin/../train.py -m x", "python3"),
            ("/usr/bin/python3 /opt/conda/bin/jupyter-lab --no-browser", "jupyter-lab"),
            ("/usr/bin/python3 -m ipykernel_launcher -f x.json", "ipykernel_launcher"),
            ("python3.11 -Xfrozen_modules=off -m ipykernel -f x", "ipykernel"),
            ("python3 -c pass", "python3"),
            ("python3 -m", "python3"),
            ("python3", "python3"),
            ("-bash", "-bash"),
            ("", ""),
        ):
            words = [*line.split(" "), ""]  # as /proc/PID/cmdline has it
            self.assertEqual(agent.program_of(words), name)
        self.assertEqual(agent.program_of([]), "")

    def test_a_status_tells_what_it_has(self):
        text = STATUS % Tree.status_words(uid=5, peak=10, mem=9, allowed="0-3,8")
        self.assertEqual(
            agent.parse_status(text),
            {"uid": 5, "mem": 9 * 1024, "peak": 10 * 1024, "cpus": "0-3,8"},
        )
        self.assertEqual(agent.parse_status("Name:\tx\nUid:\t5\t5\t5\t5\n"), {"uid": 5})

    def test_an_old_kernel_says_enough(self):
        # as Linux 2.6.32 of RHEL 6 writes it: 44 fields
        text = (
            "4711 (a.out) R 4700 4711 4700 34816 4711 4202496 200 0 0 0 500 25 0 0 20 0 4 0"
            " 123456 200000000 2500 18446744073709551615 4194304 4196000 140736 140735"
            " 4195500 0 0 0 0 0 0 0 17 5 0 0 0 0 0\n"
        )
        self.assertEqual(
            agent.parse_stat(text), ("a.out", "R", 525, 4, 123456, 2500, 5)
        )


class Strip(unittest.TestCase):
    def test_a_character_a_cpu_in_tenths_and_a_dash_for_one_that_is_off(self):
        before = dict.fromkeys(range(6), (100, 200))
        after = {
            0: (200, 300),  # idle
            1: (100, 300),  # busy
            2: (150, 300),
            3: (105, 300),
            5: (190, 300),
        }
        busy = agent.busy_cores(before, after)
        (part,) = agent.core_parts(busy, 7)
        self.assertEqual(part, {"part": "core", "first": 0, "busy": "0959-1-"})

    def test_a_line_that_is_cut_off_is_not_read(self):
        text = "cpu  1 2 3 4 5 6 7 8 9 0\ncpu0 1 0 0 4 1 0 0 0 0 0\ncpu1 1 0 0 4 1 0"
        self.assertEqual(agent.parse_cores(text), {0: (5, 6)})

    def test_a_cpu_without_time_gone_by_is_unknown(self):
        self.assertEqual(agent.busy_cores({}, {0: (5, 9)}), {})
        self.assertEqual(agent.busy_cores({0: (5, 9)}, {0: (5, 9)}), {})

    def test_iowait_that_goes_back_is_no_more_than_all_busy(self):
        self.assertEqual(agent.busy_cores({0: (50, 90)}, {0: (40, 100)}), {0: 1.0})

    def test_nodes_of_256_and_1024_cpus_are_told_in_pieces_that_the_wire_takes(self):
        for cpus in (256, 1024):
            tree = Tree(self, cpus=cpus)
            parts = tree.parts()
            tree.stat([(50, 150), (100, 100)] * (cpus // 2))
            parts.cores.read_at = -1e9
            look = [part for part in parts.look() if part["part"] == "core"]
            self.assertEqual("".join(part["busy"] for part in look), "59" * (cpus // 2))
            self.assertEqual(
                [part["first"] for part in look], list(range(0, cpus, 240))
            )
            self.assertLessEqual(max(len(part["busy"]) for part in look), 255)

    def test_cores_busy_counts_the_jobs_cpus_alone(self):
        tree = Tree(
            self, cgroup=V1 + "5:cpuset:/slurm/uid_1000/job_7/step_batch\n", cpus=8
        )
        folder = "sys/fs/cgroup/cpuset/slurm/uid_1000/job_7"
        tree.write(folder + "/cpuset.cpus", "2-4\n")
        parts = tree.parts()
        busy = [100, 100, 60, 40, 90, 100, 100, 100]
        tree.stat([(ticks, 100 + 100 - ticks) for ticks in busy])
        parts.cores.read_at = -1e9
        self.assertEqual(parts.sampler.sample()["cores_busy"], 2)
        self.assertEqual(parts.look()[0]["cpus"], "2-4")

    def test_a_cpuset_of_cgroup_v2_is_the_effective_one(self):
        tree = Tree(self, cgroup=V2, cpus=8)
        tree.write(tree.root + "/cpuset.cpus.effective", "1,6\n")
        self.assertEqual(tree.parts().look()[0]["cpus"], "1,6")

    def test_without_a_cpuset_it_is_where_the_jobs_processes_may_run(self):
        tree = Tree(self, cpus=8, SLURM_JOB_CPUS_PER_NODE="4")
        tree.process(50, allowed="2-3")
        parts = tree.parts()
        parts.look()
        self.assertEqual(parts.look()[0]["cpus"], "0-3")

    def test_where_that_is_more_than_the_job_has_it_is_unknown(self):
        tree = Tree(self, cpus=8, SLURM_JOB_CPUS_PER_NODE="1")
        parts = tree.parts()
        self.assertNotIn("cpus", parts.look()[0])
        self.assertNotIn("cores_busy", parts.sampler.sample())

    def test_outside_of_a_job_there_are_neither_processes_nor_cpus_of_it(self):
        tree = Tree(self, cgroup="0::/user.slice\n", SLURM_JOB_ID="")
        head = tree.parts().look()[0]
        self.assertFalse({"cpus", "processes"} & set(head))
        self.assertEqual(head["shown"], 0)


class Looks(unittest.TestCase):
    def test_a_process_is_told_with_all_that_is_known_of_it(self):
        tree = Tree(self)
        known = {
            "name": "pt_main_thread",
            "words": ("/usr/bin/python3", "train.py"),
            "environ": ("SLURM_PROCID=3", "SLURM_LOCALID=1"),
            "threads": [("R", 0), ("S", 1), ("R", 5)],
            "wchan": "futex_wait",
            "mem": 4000,
            "allowed": "0-5",
        }
        tree.process(50, ticks=100, io=(1000, 50), **known)
        parts = tree.parts()
        first = ranks(parts.look())[50]
        self.assertFalse({"cpu", "read", "write"} & set(first))
        began = time.monotonic()
        tree.process(50, ticks=150, io=(6000, 1050), **known)
        time.sleep(0.2)
        part = ranks(parts.look())[50]
        seconds = time.monotonic() - began
        self.assertAlmostEqual(part.pop("cpu") * seconds, 50, delta=5)
        self.assertAlmostEqual(part.pop("read") * seconds, 5000, delta=500)
        self.assertAlmostEqual(part.pop("write") * seconds, 1000, delta=100)
        self.assertEqual(
            part,
            {
                "part": "rank",
                "look": 2,
                "pid": 50,
                "rank": 3,
                "local_rank": 1,
                "step": "0",
                "program": "python3",
                "mem": 4000 * 1024,
                "peak": 8000 * 1024,
                "threads": 3,
                "running": 2,
                "cpus": "0-5",
                "on": "0-1,5",
                "state": "S",
                "wchan": "futex_wait",
                "read_total": 6000,
                "write_total": 1050,
            },
        )

    def test_each_dict_is_one_that_the_wire_takes(self):
        tree = Tree(self)
        tree.process(50, name="x" * 15, words=("y" * 4000,), wchan="z" * 900)
        for part in tree.parts().look():
            self.assertLessEqual(len(part), 64)
            self.assertLess(len(pickle.dumps(part)), 16384)
            for value in part.values():
                self.assertIsInstance(value, (str, int, float))
                self.assertLessEqual(len(str(value).encode()), 255)

    def test_in_cgroup_v2_slurmstepd_has_a_place_of_its_own(self):
        tree = Tree(self, cgroup=V2)
        tree.process(40, "step_0/slurm", name="anything")
        tree.process(50, "step_0/user/task_0")
        tree.process(60, "step_batch/user/task_0", environ=("SLURM_PROCID=0",))
        shown = ranks(tree.parts().look())
        self.assertEqual(
            {pid: part["step"] for pid, part in shown.items()}, {50: "0", 60: "batch"}
        )
        self.assertNotIn("rank", shown[60])

    def test_slurmstepd_others_processes_zombies_and_agents_are_no_ranks(self):
        tree = Tree(self)
        tree.process(40, "step_0", name="slurmstepd")
        tree.process(41, "step_extern", name="sleep", uid=os.getuid() + 1)
        tree.process(42, state="Z")
        tree.process(
            43,
            "step_1/task_0",
            words=("python3", "-c", "...", "--stdout", "--lifeline"),
        )
        tree.process(os.getpid())
        tree.process(50)
        parts = tree.parts()
        head = parts.look()[0]
        self.assertEqual((head["processes"], head["shown"]), (1, 1))
        self.assertEqual(list(ranks(parts.look())), [50])

    def test_of_a_step_of_our_own_nothing_is_shown(self):
        tree = Tree(self)
        tree.process(os.getpid(), "step_9/task_0")
        tree.process(44, "step_9/task_0", name="nvidia-smi")
        tree.process(50)
        self.assertEqual(list(ranks(tree.parts(attached=True).look())), [50])
        self.assertEqual(list(ranks(tree.parts().look())), [44, 50])

    def test_what_is_not_in_the_jobs_cgroup_is_not_shown(self):
        tree = Tree(self)
        tree.process(50)
        other = tree.root
        tree.root = "sys/fs/cgroup/freezer/slurm/uid_1000/job_8"
        tree.process(60)
        tree.root = other
        self.assertEqual(list(ranks(tree.parts().look())), [50])

    def test_refusals_are_silent_and_leave_out_what_they_refuse(self):
        tree = Tree(self)
        tree.process(50, environ=("SLURM_PROCID=3",))
        for name in ("io", "wchan", "environ"):
            tree.refuse("proc/50/" + name)
        tree.process(51)
        tree.refuse("proc/51/stat")
        tree.process(52)
        tree.refuse("proc/52/status")  # hidepid: whose it is cannot be known
        tree.process(53)
        shutil.rmtree(tree.path("proc/53"))  # it has just ended
        shown = ranks(tree.parts().look())
        self.assertEqual(list(shown), [50])
        self.assertFalse({"rank", "read_total", "wchan"} & set(shown[50]))
        self.assertEqual(shown[50]["program"], "app")

    def test_a_later_process_of_the_same_pid_is_another(self):
        tree = Tree(self)
        tree.process(50, name="a", ticks=5000, environ=("SLURM_PROCID=1",))
        parts = tree.parts()
        parts.look()
        tree.process(50, name="b", ticks=10, started=900, environ=("SLURM_PROCID=2",))
        part = ranks(parts.look())[50]
        self.assertEqual((part["program"], part["rank"]), ("b", 2))
        self.assertNotIn("cpu", part)

    def test_what_becomes_of_slurmstepds_child_is_shown_once_it_is_the_program(self):
        tree = Tree(self)
        tree.process(50, name="slurmstepd")
        parts = tree.parts()
        self.assertEqual(ranks(parts.look()), {})
        tree.process(50, name="app", environ=("SLURM_PROCID=2",))
        self.assertEqual(ranks(parts.look())[50]["rank"], 2)

    def test_a_process_that_was_seen_before_it_became_the_program_is_told_aright(self):
        tree = Tree(self)
        tree.process(50, environ=("SLURM_PROCID=0", "RANK=8", "LOCAL_RANK=0"))
        parts = tree.parts()
        self.assertEqual(ranks(parts.look())[50]["rank"], 8)
        tree.process(50, environ=("SLURM_PROCID=2",), words=("/usr/bin/later",))
        part = ranks(parts.look())[50]
        self.assertEqual((part["rank"], part["program"]), (2, "later"))
        self.assertNotIn("local_rank", part)
        self.assertIn("cpu", part)

    def test_of_64_threads_and_more_none_is_looked_at(self):
        tree = Tree(self)
        tree.process(50, threads=[("R", 1)] * 63)
        tree.process(51, threads=[("R", 1)] * 64)
        shown = ranks(tree.parts().look())
        self.assertEqual((shown[50]["running"], shown[50]["on"]), (63, "1"))
        self.assertFalse({"running", "on"} & set(shown[51]))
        self.assertEqual(shown[51]["threads"], 64)

    def test_of_300_processes_64_are_shown_with_the_busiest_and_the_largest(self):
        tree = Tree(self)
        first = (
            5000000  # beyond the largest pid that Linux gives: the test's own is none
        )
        for pid in range(first, first + 300):
            tree.process(pid, environ=("SLURM_PROCID=%d" % (pid - first),))
        tree.process(first + 1000, name="large", mem=900000)
        parts = tree.parts()
        parts.look()
        for pid in range(first, first + 300):
            stat = STAT % (pid, "app", "S", 100, 0, 1, 500, 250, 0)
            tree.write("proc/%d/stat" % pid, stat)
        tree.process(first + 250, ticks=5000, environ=("SLURM_PROCID=250",))
        tree.process(first + 270, ticks=0, environ=("SLURM_PROCID=270",))
        tree.process(first + 1000, name="large", mem=900000)
        look = parts.look()
        shown = ranks(look)
        self.assertEqual((look[0]["processes"], look[0]["shown"]), (301, 64))
        self.assertEqual(len(shown), 64)
        self.assertTrue({first + 250, first + 1000, first + 270} <= set(shown))
        numbers = [part["rank"] for part in shown.values() if "rank" in part]
        self.assertEqual(numbers, sorted(numbers))

    def test_looks_that_cost_more_come_less_often(self):
        parts = Tree(self).parts()
        parts.looks = 2
        self.assertEqual(parts.rest(0.003), agent.PART_SECONDS)
        self.assertAlmostEqual(parts.rest(0.06), 40)
        self.assertAlmostEqual(parts.due - time.monotonic(), 40, delta=1)


class Hanging(unittest.TestCase):
    """A process whose files cannot be read: a FIFO makes the reader wait as the kernel does."""

    def setUp(self):
        self.tree = Tree(self)
        self.tree.process(50)
        os.unlink(self.tree.path("proc/50/environ"))
        os.mkfifo(self.tree.path("proc/50/environ"))

    def test_it_holds_up_its_look_and_nothing_else(self):
        parts = self.tree.parts()
        began = time.monotonic()
        self.assertEqual([parts.take() for _ in range(5)], [[]] * 5)
        self.assertLess(time.monotonic() - began, 1)
        with open(self.tree.path("proc/50/environ"), "w") as file:
            file.write("SLURM_PROCID=3\0")
        look = eventually(parts.take)
        self.assertEqual(ranks(look)[50]["rank"], 3)

    def test_samples_go_on_and_the_end_is_at_once(self):
        tool = start_agent(
            "--stdout",
            "--interval",
            "0.1",
            "--procfs",
            self.tree.path("proc"),
            "--sysfs",
            self.tree.path("sys"),
            env={"SLURM_JOB_ID": "7"},
        )
        self.addCleanup(tool.stop)
        eventually(lambda: tool.out.count('"ram"') > 20)
        self.assertNotIn('"part"', tool.out)
        began = time.monotonic()
        self.assertEqual(tool.stop(), 0)
        self.assertLess(time.monotonic() - began, 2)


class Way(unittest.TestCase):
    """From the agent to a master that takes them."""

    def start(self, server, *flags, **more):
        tool = start_agent(
            "--port", server.port, "--interval", "0.1", *flags, patch=HURRY, **more
        )
        self.addCleanup(tool.stop)
        return tool

    def looks(self, dicts):
        return [part for part in dicts if part.get("part") == "look"]

    def test_a_master_that_takes_parts_gets_a_look_again_and_again(self):
        with DummyServer(answer=b"ok parts\n") as server:
            self.start(server)
            eventually(lambda: len(self.looks(server.dicts)) >= 4)
            dicts = server.dicts
            first = [index for index, sent in enumerate(dicts) if "part" in sent][0]
            self.assertIn("cpu", dicts[first - 1])
            numbers = [part["look"] for part in self.looks(dicts)]
            self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
            self.assertTrue(any(sent.get("part") == "core" for sent in dicts))
            for sent in dicts:
                self.assertFalse("ack" in sent and "part" in sent)

    def test_an_older_master_gets_none_and_nothing_is_read_for_it(self):
        with DummyServer(answer=b"ok\n") as server:
            patch = "agent.Parts.take = None"
            tool = start_agent("--port", server.port, "--interval", "0.1", patch=patch)
            self.addCleanup(tool.stop)
            eventually(lambda: len(server.dicts) > 10)
            self.assertFalse([sent for sent in server.dicts if "part" in sent])
            self.assertIsNone(tool.code)
            self.assertEqual(server.connections, 1)

    def test_a_new_connection_has_to_say_so_anew(self):
        with DummyServer(answer=b"ok parts\n") as server:
            self.start(server)
            eventually(lambda: self.looks(server.dicts))
            server.answer = b"ok\n"
            server.sockets[0].shutdown(socket.SHUT_RDWR)
            eventually(lambda: server.connections == 2)
            before = len(server.dicts)
            eventually(lambda: len(server.dicts) > before + 20)
            self.assertFalse(
                [sent for sent in server.dicts[before + 1 :] if "part" in sent]
            )

    def test_an_answer_in_two_pieces_is_one(self):
        link = agent.Link([("127.0.0.1", 1)], b"", 2.0)
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.setblocking(False)
        link.sock = ours
        link.heard = time.monotonic()
        for piece, takes, answered in (
            (b"ok pa", False, False),
            (b"rts\nok\n", True, True),
        ):
            theirs.sendall(piece)
            link.exchange()
            self.assertEqual((link.takes_parts, link.answered), (takes, answered))

    def test_a_look_that_does_not_fit_goes_on_later_and_nothing_gets_between(self):
        link = agent.Link([("127.0.0.1", 1)], b"", 2.0)
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        link.sock = ours
        link.heard = time.monotonic()
        parts = [{"part": "rank", "pid": n, "program": "x" * 200} for n in range(300)]
        link.send_look(parts)
        self.assertTrue(link.unsent)
        link.exchange({"cpu": 1, "ram": 2})  # waits, and is not sent in between
        link.send_look(parts)  # nor is a second look
        got = []
        theirs.settimeout(5)
        with theirs.makefile("rb") as stream:
            for _ in parts:
                if link.unsent:
                    link.exchange()
                got.append(pickle.load(stream))
            self.assertEqual(got, parts)
            link.exchange({"cpu": 3, "ram": 2})
            self.assertEqual(pickle.load(stream), {"cpu": 3, "ram": 2})

    def test_stdout_always_has_them(self):
        tool = start_agent("--stdout", "--interval", "0.1", patch=HURRY)
        self.addCleanup(tool.stop)
        eventually(lambda: tool.out.count('"look", ') >= 3)
        lines = tool.out[: tool.out.rfind("\n")].splitlines()
        self.assertTrue(all(json.loads(line) for line in lines))

    def test_srun_breaks_long_lines_and_the_herd_puts_them_together_again(self):
        step = agent.Step.__new__(agent.Step)
        step.halves = {}
        whole = b'{"part": "rank", "program": "a: {b}"}'
        said = []
        for task, text in (
            (b"0", whole[:9]),
            (b"1", whole),  # another task in between
            (b"0", whole[9:20]),
            (b"0", whole[20:]),
            (b"0", b"slurmstepd: some words"),
            (b"0", whole[:1]),
            (b"0", whole[1:]),
            (b"0", whole[:30]),  # the rest of this one is lost
            (b"0", whole),
        ):
            said.append(step.whole(task, text))
        self.assertEqual([text for text in said if text], [whole] * 4)


class Herded(unittest.TestCase):
    """From a herd's agents to the master, with stand-ins for Slurm's commands."""

    def setUp(self):
        self.slurm = test_herd.Slurm(self, ATTACH_SECONDS=20.0)
        path = os.path.join(self.slurm.folder, "agent.py")
        with open(path) as file:
            text = file.read()
        text = text.replace("PART_SECONDS = 10.0", "PART_SECONDS = 0.5")
        text = text.replace("SECOND_LOOK_SECONDS = 2.0", "SECOND_LOOK_SECONDS = 0.5")
        self.slurm.write("agent.py", text)
        self.break_lines()
        self.slurm.write("queue", test_herd.row())
        self.slurm.write("job.7", test_herd.details())

    def break_lines(self):
        """Have srun do what a real one does: a label and a new line after so many bytes."""
        path = os.path.join(self.slurm.folder, "tasks")
        with open(path) as file:
            text = file.read()
        whole = "for line in task.stdout:\n"
        self.assertIn(whole, text)
        broken = (
            "for line in iter(lambda: os.read(task.stdout.fileno(), 100), b''):\n"
            "        line = line if line.endswith(b'\\n') else line + b'\\n'\n"
            "        line = line.replace(b'\\n', b'\\n%d: ' % number, line.count(b'\\n') - 1)\n"
        )
        with open(path, "w") as file:
            file.write(text.replace(whole, broken))

    def test_a_master_that_takes_parts_gets_them_behind_the_sample_of_their_node(self):
        with DummyServer(answer=b"") as server:
            serve_parts(server)
            watcher = self.slurm.watch(server)
            self.addCleanup(watcher.stop)
            eventually(lambda: len(looks_of(server)) >= 2)
            (key,) = {index for index, _ in looks_of(server)}
            mine = [sent for index, sent in server.by_socket if index == key]
            self.assertTrue(mine[0]["ack"])
            self.assertFalse([sent for sent in mine[1:] if sent.get("ack")])
            self.assertTrue([sent for sent in mine if sent.get("part") == "core"])

    def test_an_older_master_gets_none(self):
        with DummyServer(answer=b"") as server:
            serve_parts(server, b"ok\n")
            watcher = self.slurm.watch(server)
            self.addCleanup(watcher.stop)
            eventually(
                lambda: len([1 for _, sent in server.by_socket if "cpu" in sent]) > 3
            )
            self.assertEqual(looks_of(server), [])


def serve_parts(server, first=b"ok parts\n"):
    """Have a DummyServer answer the first acked sample of a connection, and sort what comes."""
    server.by_socket = []

    def serve(sock):
        index = server.sockets.index(sock)
        answer = first
        with contextlib.suppress(EOFError, OSError), sock.makefile("rb") as stream:
            while True:
                sent = pickle.load(stream)
                server.by_socket.append((index, sent))
                if sent.get("ack"):
                    sock.sendall(answer)
                    answer = b"ok\n"

    server.serve = serve


def looks_of(server):
    return [
        (index, sent)
        for index, sent in list(server.by_socket)
        if sent.get("part") == "look"
    ]


# Makes a job's cgroup (v1), puts itself and its processes there, and then is the agent
IN_A_JOB = textwrap.dedent("""\
    import os, subprocess, sys
    root, count, busy = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    def enter(folder):
        os.makedirs(root + folder, exist_ok=True)
        with open(root + folder + "/cgroup.procs", "w") as file:
            file.write("0")
    for number in range(count):
        folder = "/step_0/task_%d" % (number % 16)
        command = ["sleep", "600"]
        if number < busy:
            command = ["sh", "-c", "while :; do :; done"]
        env = dict(os.environ, SLURM_PROCID=str(number))
        subprocess.Popen(command, preexec_fn=lambda: enter(folder), env=env)
    enter("/step_batch/task_0")
    os.execv(sys.executable, [sys.executable] + sys.argv[4:])
""")


@support.requires("/sys/fs/cgroup/cpuset/cpuset.cpus", "root")
class Cpuset(unittest.TestCase):
    """A real cpuset, as Slurm makes one for a job that has one CPU of the node (cgroup v1)."""

    def test_the_jobs_cpu_is_its_one_and_no_other_counts(self):
        last = max(agent.parse_cpu_list(self.text("cpuset.cpus")))
        top = "/parts%d" % os.getpid()
        root = top + "/uid_0/job_7"
        self.addCleanup(remove_cgroup, "/sys/fs/cgroup/cpuset" + top)
        for folder in (top, top + "/uid_0", root):
            os.mkdir("/sys/fs/cgroup/cpuset" + folder)
            self.write(folder + "/cpuset.mems", self.text("cpuset.mems"))
            self.write(folder + "/cpuset.cpus", str(last))

        def enter():
            self.write(root + "/cgroup.procs", "0")

        burner = subprocess.Popen(
            [sys.executable, "-c", "while True: pass"], preexec_fn=enter
        )
        self.addCleanup(burner.wait)
        self.addCleanup(burner.kill)
        tool = start_agent(
            "--stdout",
            "--interval",
            "0.2",
            patch=HURRY,
            env={"SLURM_JOB_ID": "7"},
            preexec_fn=enter,
        )
        self.addCleanup(tool.stop)

        def lines():
            text = tool.out[: tool.out.rfind("\n") + 1]
            return [json.loads(line) for line in text.splitlines()]

        look = eventually(lambda: [x for x in lines() if x.get("part") == "look"][0])
        self.assertEqual(look["cpus"], str(last))
        self.assertEqual(look["processes"], 1)
        sample = eventually(lambda: [x for x in lines() if "cores_busy" in x][-1])
        self.assertEqual(sample["cores_busy"], 1)
        rank = eventually(lambda: [x for x in lines() if x.get("part") == "rank"][-1])
        self.assertEqual((rank["pid"], rank["cpus"]), (burner.pid, str(last)))
        core = eventually(lambda: [x for x in lines() if x.get("part") == "core"][-1])
        self.assertGreaterEqual(int(core["busy"][last]), 5)

    @staticmethod
    def text(name):
        with open("/sys/fs/cgroup/cpuset/" + name) as file:
            return file.read().strip()

    @staticmethod
    def write(name, text):
        with open("/sys/fs/cgroup/cpuset" + name, "w") as file:
            file.write(text)


def remove_cgroup(top):
    """Remove a cgroup whose processes have ended."""
    remove = ["find", top, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]
    eventually(lambda: not os.path.exists(top) or subprocess.call(remove) == 0)


@support.requires("/sys/fs/cgroup/freezer/cgroup.procs", "root")
class Cost(unittest.TestCase):
    """What looks cost, in a real cgroup (v1)."""

    def start(self, count, busy):
        top = "/sys/fs/cgroup/freezer/parts%d" % os.getpid()
        root = top + "/uid_0/job_7"
        try:
            os.makedirs(root)
        except OSError as error:
            self.skipTest("missing here: the right to make a cgroup (%s)" % error)
        self.addCleanup(remove_cgroup, top)
        tool = support.start(
            "-c",
            IN_A_JOB,
            root,
            count,
            busy,
            os.path.join(support.ROOT, "agent.py"),
            "--stdout",
            env={"SLURM_JOB_ID": "7"},
        )
        self.addCleanup(self.end, tool, root)
        return tool

    def end(self, tool, root):
        tool.kill()

        def empty():
            with open(root + "/step_0/task_0/cgroup.procs") as file:
                return not file.read()

        eventually(empty)

    @staticmethod
    def seconds(pid):
        with open("/proc/%d/stat" % pid) as file:
            words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def looks(self, tool):
        lines = tool.out[: tool.out.rfind("\n") + 1].splitlines()
        return [
            json.loads(line) for line in lines if line.startswith('{"part": "look"')
        ]

    @support.slow("a minute")
    def test_256_processes_take_no_more_than_three_thousandths_of_a_core(self):
        tool = self.start(256, 2)
        eventually(lambda: len(self.looks(tool)) >= 2, 3 * support.PATIENCE)
        head = self.looks(tool)[1]
        self.assertEqual((head["processes"], head["shown"]), (256, 64))
        used, began = self.seconds(tool.pid), time.monotonic()
        stays(lambda: tool.code is None, 45)
        share = (self.seconds(tool.pid) - used) / (time.monotonic() - began)
        self.assertLess(100 * share, 0.3, "percent of a core")

    def test_eight_processes_take_less_than_three_milliseconds_a_look(self):
        tool = self.start(8, 1)
        eventually(lambda: len(self.looks(tool)) >= 2)

        def second():
            lines = tool.out[: tool.out.rfind("\n") + 1].splitlines()
            parts = [json.loads(line) for line in lines if '"part": "rank"' in line]
            return [part for part in parts if part["look"] == 2]

        shown = eventually(lambda: len(second()) == 8 and second())
        self.assertEqual({part["rank"] for part in shown}, set(range(8)))
        busiest = max(shown, key=lambda part: part.get("cpu", 0))
        self.assertEqual(busiest["rank"], 0)
        probe = agent.Probe()
        with mock.patch.dict(os.environ, {"SLURM_JOB_ID": "7"}):
            parts = agent.Parts(agent.Sampler(probe))
        parts.sampler.job = {
            "freezer": "sys/fs/cgroup/freezer/parts%d/uid_0/job_7" % os.getpid()
        }
        own = "/proc/self/stat", "/proc/self/status"
        costs, bare = [], []
        for _ in range(20):
            began = time.process_time()
            seen = len(ranks(parts.look()))
            costs.append(time.process_time() - began)
            self.assertEqual(seen, 9)  # and the agent, which is another
            began = time.process_time()
            for path in 9 * own:
                with open(path) as file:
                    file.read()
            bare.append(time.process_time() - began)
        # a slower machine is slower at reading such files, too: a look is three times as much
        look, read = sorted(costs)[10], sorted(bare)[10]
        self.assertLess(look, max(0.003, 4 * read), read)


if __name__ == "__main__":
    unittest.main()
