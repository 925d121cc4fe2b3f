"""agent.py --record DIR -- COMMAND: the record of a command, without a master.

The pages of a master, test_reader.py --jobs and --explain read it like any other.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import types
import unittest
import unittest.mock

import beside
import support
from support import eventually
from test_agent_link import start_agent

sys.path.insert(0, support.ROOT)
import agent
import master_server as master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

TASK = {  # the third of an array, as sbatch sets it
    "SLURM_JOB_ID": "4714",
    "SLURM_ARRAY_JOB_ID": "4711",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_JOB_NAME": "align",
    "SLURM_JOB_PARTITION": "short",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_MEM_PER_NODE": "2048",
    "SLURM_JOB_CPUS_PER_NODE": "2",
    "SLURM_JOB_START_TIME": "1700000000",
    "SLURM_JOB_END_TIME": "1700003600",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "c1",
}
NO_JOB = dict.fromkeys(TASK, "")
# A task: so many MiB for so many seconds; it says what the kernel has counted of it: bytes, seconds
WORK = """
import os, resource, sys, time
size, seconds = map(float, sys.argv[1:])
kept = b"x" * int(size * 2**20)
time.sleep(seconds)
with open("/proc/self/stat") as file:
    ticks = int(file.read().rpartition(")")[2].split()[19])
start = ticks / os.sysconf("SC_CLK_TCK")
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_maxrss * 1024, time.clock_gettime(time.CLOCK_BOOTTIME) - start)
"""
TASKS = 1000
REAL = 12 if support.LONG else 4  # of them have a process and an agent, four at a time


class Recorded(unittest.TestCase):
    def setUp(self):
        above = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, above)
        self.folder = os.path.join(above, "a", "jobs")
        self.port = support.closed_port()

    def around(self, *command, env=TASK, record=None):
        """Run a command to its end, with nobody listening."""
        flags = ("--port", self.port, "--record", record or self.folder)
        return support.run("agent.py", *flags, "--", *command, env=env, seconds=60)

    def record(self, job="4711_3"):
        return master.read_record(self.folder, job)


class OneCommand(Recorded):
    def test_it_leaves_a_kilobyte_that_says_what_it_was_and_what_it_used(self):
        began = time.monotonic()
        done = self.around(sys.executable, "-c", WORK, 50, 0.5)
        took = time.monotonic() - began
        self.assertEqual(done.returncode, 0)
        (name,) = os.listdir(self.folder)
        path = os.path.join(self.folder, name)
        self.assertLessEqual(os.path.getsize(path), 1024)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)
        record = self.record()
        for key, value in (
            ("raw", "4714"),
            ("array", "4711"),
            ("job_name", "align"),
            ("partition", "short"),
            ("state", "COMPLETED"),
            ("exit", "0:0"),
            ("nodes", 1),
            ("mem", 2**31),
            ("limit", 3600),
        ):
            self.assertEqual(record.facts[key], value)
        self.assertTrue(record.has_ended)
        self.assertEqual(list(record.nodes), ["c1"])
        summary = master.summarize(record)
        own, seconds = map(float, done.stdout.split())
        self.assertAlmostEqual(summary["peak"] / own, 1, delta=0.02)
        self.assertTrue(seconds - 0.02 < summary["ran"] < took)
        self.assertEqual(summary["got_cpus"], 2)
        self.assertTrue(0 < summary["cpu"] < 100)
        self.assertRegex(record.events[0]["text"], "^exit 0; ran 0:")

    def test_how_it_ended_is_told_as_slurm_says_it(self):
        for script, exit_code, state, told in (
            ("exit 3", 3, "FAILED", "3:0"),
            ("kill -SEGV $$", -signal.SIGSEGV, "FAILED", "0:11"),
        ):
            with self.subTest(script):
                done = self.around("sh", "-c", script)
                # as a shell has it: 128 + n for signal n
                expected = exit_code if exit_code >= 0 else 128 - exit_code
                self.assertEqual(done.returncode, expected)
                record = self.record()
                self.assertEqual(record.facts["state"], state)
                self.assertEqual(record.facts["exit"], told)
                shutil.rmtree(self.folder)

    def test_a_kill_for_memory_is_what_it_died_of(self):
        before = {"oom_kill": 0}
        last = {"node": "c1", "job": "7", "cpus": 4, "oom_kill": 1}
        last["job_mem_limit"] = 2**30
        report = agent.Report(before)
        report.add(dict(last, job_mem=9e8), 1.0)
        usage = types.SimpleNamespace(ru_utime=1.0, ru_stime=0.5, ru_maxrss=900000)
        life = agent.Life(["./fit"], 1.7e9, 3.0, -signal.SIGKILL, usage)
        told = "; ".join(["SIGKILL", *report.lines(last, "SIGKILL")])
        lines = list(agent.record_lines(last, report, life, told))
        agent.append_record(agent.record_path(self.folder, "7", life.start), lines)
        record = self.record("7")
        self.assertEqual(record.facts["state"], "OUT_OF_MEMORY")
        text, code = master.explain(self.folder, "7", False)
        self.assertEqual(code, 3)
        self.assertIn("out of memory: the kernel killed 1 process on c1", text)

    def test_outside_of_a_job_it_is_a_job_of_its_own_by_the_name_of_the_program(self):
        for _ in range(2):
            self.around("sleep", "0.1", env=NO_JOB)
        jobs = master.Archive(self.folder).list()
        self.assertEqual([job["job_name"] for job in jobs], ["sleep", "sleep"])
        self.assertNotEqual(jobs[0]["job"], jobs[1]["job"])

    def test_one_that_is_told_to_end_is_recorded_before_it_does_and_after(self):
        script = "trap '' TERM; echo ready; while [ ! -e %s/go ]; do sleep 0.1; done"
        above = os.path.dirname(self.folder)
        flags = ("--port", self.port, "--record", self.folder)
        command = ("--", "sh", "-c", script % above + "; exit 4")
        tool = start_agent(*flags, *command, env=TASK)
        self.addCleanup(tool.stop)
        eventually(lambda: "ready" in tool.out)
        tool.send_signal(signal.SIGTERM)
        eventually(lambda: os.path.isdir(self.folder) and self.record())
        self.assertFalse(self.record().has_ended)
        with open(os.path.join(above, "go"), "w"):
            pass
        self.assertEqual(tool.wait(), 4)
        record = self.record()
        self.assertEqual(
            (record.facts["state"], record.facts["exit"]), ("FAILED", "4:0")
        )
        self.assertTrue(record.has_ended)
        self.assertEqual((len(record.rows), len(record.events)), (1, 1))

    def test_the_nodes_of_one_job_leave_a_record_each_and_none_hides_another(self):
        for node in ("c1", "c2"):
            self.around("sleep", "0.3", env=dict(TASK, SLURMD_NODENAME=node))
        record = self.record()
        self.assertEqual(sorted(record.nodes), ["c1", "c2"])
        known = [len(list(filter(None, means))) for means in record.columns("job_mem")]
        self.assertEqual(len(record.rows), 2)
        self.assertEqual(len(known), 2)
        self.assertEqual(master.summarize(record)["got_cpus"], 4)


class Troubles(Recorded):
    """The work runs, and its exit code is its own, whatever becomes of the record."""

    def check(self, done, words):
        self.assertEqual((done.returncode, done.stdout), (3, "ran\n"))
        told = [line for line in done.stderr.splitlines() if "cannot record" in line]
        self.assertEqual(len(told), 1, done.stderr)
        self.assertRegex(told[0], words)
        self.assertNotIn("Traceback", done.stderr)

    def test_a_folder_that_cannot_be_is_one_line(self):
        for folder, words in (
            ("/dev/null/jobs", "in /dev/null/jobs: Not a directory"),
            ("/proc/jobs", "in /proc/jobs: (No such file|Permission)"),
            ("x" * 300, "File name too long"),
        ):
            with self.subTest(folder):
                done = self.around("sh", "-c", "echo ran; exit 3", record=folder)
                self.check(done, words)

    @unittest.skipIf(os.geteuid(), "only root can mount a small disk")
    def test_a_full_disk_is_one_line(self):
        os.makedirs(self.folder)
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", self.folder]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            self.skipTest("no mount here")
        self.addCleanup(subprocess.run, ["umount", "-l", self.folder])
        with contextlib.suppress(OSError), open(
            self.folder + "/filler", "wb", 0
        ) as file:
            while True:
                file.write(bytes(4096))
        done = self.around("sh", "-c", "echo ran; exit 3")
        self.check(done, "No space left")

    def test_a_disk_that_hangs_keeps_it_for_two_seconds_at_most(self):
        hang = "import time; agent.append_record = lambda *_: time.sleep(600)"
        flags = ("--port", self.port, "--record", self.folder)
        command = ("--", "sh", "-c", "echo ran; exit 3")
        tool = start_agent(*flags, *command, env=TASK, patch=hang)
        self.addCleanup(tool.stop)
        tool.logged("goodbye")
        said = time.monotonic()
        self.assertEqual(tool.wait(), 3)
        self.assertLess(time.monotonic() - said, agent.RECORD_SECONDS + 5)
        self.assertRegex(tool.log, "cannot record in .*: it does not answer")

    def test_a_defect_of_it_is_one_line(self):
        flags = ("--port", self.port, "--record", self.folder)
        command = ("--", "sh", "-c", "echo ran; exit 3")
        defect = "agent.record_lines = None"
        tool = start_agent(*flags, *command, env=TASK, patch=defect)
        self.addCleanup(tool.stop)
        self.assertEqual(tool.wait(), 3)
        self.assertEqual(tool.out, "ran\n")
        self.assertEqual(tool.log.count("cannot record"), 1)
        self.assertNotIn("Traceback", tool.log)

    def test_without_a_command_it_is_bad_usage(self):
        done = support.run("agent.py", "--record", self.folder)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--record: only with -- and a COMMAND", done.stderr)


def sizes(seed):
    """What the tasks take, of a seed: (MiB, seconds) of each."""
    chance = random.Random(seed)
    return [
        (80 + 40 * chance.lognormvariate(0, 0.4), chance.uniform(1, 2))
        for _ in range(TASKS)
    ]


class Array(Recorded):
    """A thousand tasks of 1 to 2 s, of which four or twelve really run.

    The others are records that the agent's own writer makes of invented counts of the kernel.
    """

    def run_tasks(self, first):
        """Run the first tasks, each around an agent.

        Of each: its bytes and its seconds, as the kernel had counted them just before its end, and
        how long all of it took with its agent.
        """
        told = []
        for begin in range(0, REAL, 4):
            tools = []
            began = time.monotonic()
            for number, (size, seconds) in list(enumerate(first))[begin : begin + 4]:
                env = self.environment(number)
                flags = ("--port", self.port, "--record", self.folder)
                words = ("--", sys.executable, "-c", WORK, str(size), str(seconds))
                tools.append(start_agent(*flags, *words, env=env))
            for tool in tools:
                self.addCleanup(tool.stop)
                self.assertEqual(tool.wait(60), 0)
                size, seconds = map(float, tool.out.split())
                told.append((size, seconds, time.monotonic() - began))
        return told

    def environment(self, number):
        return dict(
            TASK, SLURM_JOB_ID=str(10**6 + number), SLURM_ARRAY_TASK_ID=str(number)
        )

    def write_tasks(self, rest):
        """Have the records of the other tasks written."""
        for number, (size, seconds) in enumerate(rest, REAL):
            env = self.environment(number)
            last = {"node": "c1", "job": env["SLURM_JOB_ID"], "cpus": 4, "job_cpus": 2}
            last["job_name"] = "align"
            usage = types.SimpleNamespace(ru_utime=0.9 * seconds, ru_stime=0.0)
            usage.ru_maxrss = int(size * 1024)
            life = agent.Life(["./task"], 1.7e9 + number, seconds, 0, usage)
            with unittest.mock.patch.dict(os.environ, env):
                lines = list(agent.record_lines(last, agent.Report(), life, "exit 0"))
            job = lines[0]["job"]["job"]
            agent.append_record(agent.record_path(self.folder, job, life.start), lines)

    def test_all_are_counted_and_the_advice_covers_nearly_all_of_the_next_thousand(
        self,
    ):
        tasks = sizes(1)
        truth = self.run_tasks(tasks[:REAL])
        self.write_tasks(tasks[REAL:])
        archive = master.Archive(self.folder, seconds=60)
        jobs = archive.list()
        self.assertEqual(len(jobs), TASKS)
        peaks = [size * 2**20 for size, _ in tasks[REAL:]]
        times = [seconds for _, seconds in tasks[REAL:]]
        for number, (size, seconds, took) in enumerate(truth):
            (job,) = [job for job in jobs if job["job"] == "4711_%d" % number]
            self.assertAlmostEqual(job["peak"] / size, 1, delta=0.02)
            self.assertTrue(seconds - 0.02 < job["ran"] < took)
            peaks.append(size)
            times.append(job["ran"])  # to its very end: between the two
        self.check_spread([job["peak"] for job in jobs], peaks)
        self.check_spread([job["ran"] for job in jobs], times)
        self.check_advice(master.advise(jobs))
        self.check_page()

    def check_spread(self, told, truth):
        """The quantiles are those of what the tasks have taken, within 2 %."""
        truth = sorted(truth)
        spread = master.spread_of(told)
        self.assertEqual(spread.runs, TASKS)
        for value, place in (
            (spread.least, 0),
            (spread.median, TASKS // 2 - 1),
            (spread.high, TASKS * 9 // 10 - 1),
            (spread.most, TASKS - 1),
        ):
            self.assertAlmostEqual(value / truth[place], 1, delta=0.02)

    def check_advice(self, advice):
        """What to ask for would be enough for 99.5 % of the tasks of another seed."""
        lines = [line for line, _ in advice]
        memory = int(re.search(r"--mem=(\d+)M", lines[0]).group(1))
        hours, minutes, seconds = re.search(
            r"--time=(\d+):(\d+):(\d+)", lines[1]
        ).groups()
        limit = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        fits = [task for task in sizes(2) if task[0] <= memory and task[1] <= limit]
        self.assertGreaterEqual(len(fits), 0.995 * TASKS)
        self.assertLess(memory, 2 * max(size for size, _ in sizes(1)))  # no waste

    def check_page(self):
        """A master tells the same, and so do the tools that need none."""
        with support.start_master("--record", self.folder) as tool:
            page = support.page_text(tool.page, "/runs?array=4711")
            self.assertIn("%d runs: %d completed" % (TASKS, TASKS), page)
            self.assertIn("--mem=", page)
            listed = json.loads(support.page_text(tool.page, "/jobs.json"))["jobs"]
            self.assertEqual(len(listed), TASKS)
            self.assertIn("4711_3", support.page_text(tool.page, "/jobs?q=4711_3"))
        done = support.run("test_reader.py", "--jobs", "--record", self.folder)
        self.assertEqual(len(re.findall(r"(?m)^4711_\d+ ", done.stdout)), TASKS)
        flags = ("--explain", "4711_3", "--record", self.folder)
        done = support.run("master_server.py", *flags)
        self.assertIn("align: Completed", done.stdout)


if __name__ == "__main__":
    unittest.main()
