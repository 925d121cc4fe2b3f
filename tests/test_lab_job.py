"""It knows your job: real Slurm jobs in cgroups with limits, against the kernel's own numbers.

All jobs start together, each goes on until its test has seen enough, and each leaves its report.
The lab (lab.sh, lab.md) is up for as long; about a minute and a half, which is a time limit.
"""

import contextlib
import glob
import os
import re
import shutil
import subprocess
import time
import unittest

import support
import test_lab
from support import PATIENCE, eventually

NEEDS = test_lab.NEEDS + ("/sys/fs/cgroup/memory/cgroup.procs",)  # cgroup v1
OLD = (3, 6)
OTHER_PORT, OTHER_PAGE = 13590, 8090  # a second master, with a rule of its own
LONG = 3 * PATIENCE  # the machine may be busy with other things
TIME_LIMIT = 60 + 30 + LONG  # a minute, Slurm looks every half, and KillWait
MIB = 2**20

# The work of a job: allocate a share of the limit, burn a CPU or not, until the file JOB.enough.
# With "more" it then takes more than there is.  It prints what the kernel says about the job.
WORK = r"""
import os, re, sys, time

def cgroup(controller, name):
    with open("/proc/self/cgroup") as file:
        path = re.search(r"^\d+:%s:(.*/uid_\d+/[^/\n]+)" % controller, file.read(), re.M).group(1)
    with open("/sys/fs/cgroup/%s%s/%s" % (controller, path, name)) as file:
        return file.read()

def used():
    words = cgroup("memory", "memory.stat").split()
    return sum(int(words[words.index(name) + 1]) for name in ("total_rss", "total_shmem"))

job, words, kept = os.environ["SLURM_JOB_ID"], sys.argv[1:], []
seconds, begin = int(cgroup("cpuacct", "cpuacct.usage")) / 1e9, time.monotonic()
goal = int(0.95 * int(cgroup("memory", "memory.limit_in_bytes")))
while "fill" in words and (not kept or len(kept[-1]) > 1 << 18):
    time.sleep(2.5)             # memory.stat may be 2 s old (memcontrol.c of Linux 6.18)
    kept.append(b"x" * (goal - used()))
print("ready", flush=True)
while not os.path.exists(job + ".enough"):
    for _ in range(100000 if "burn" in words else 0):
        pass
    if "burn" not in words:
        time.sleep(0.1)
while "more" in words:
    kept.append(b"x" * (1 << 20))
seconds = int(cgroup("cpuacct", "cpuacct.usage")) / 1e9 - seconds
print("cpuacct", seconds, "in", time.monotonic() - begin, flush=True)
print("memory", used(), flush=True)
sys.exit(int(words[0]))
"""
AGENT = "agent.py --host login --interval 0.5"
# exec: Slurm sends a cancelled job's TERM to the script, not to what a shell has started; when that
# shell ends, what is left is killed.  Exit codes can be seen without it.
WRAPPED = "exec python3 " + AGENT + " -- python3 work.py "
SIDECAR = (
    "srun --overlap --mem=0 --nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES"
    " --ntasks-per-node=1 python3 " + AGENT + "%s &\n"
)
JOBS = {  # name: memory in MiB, flags of sbatch, script
    "limit": (100, ["--time=1"], WRAPPED + "0"),
    "burn": (200, ["--cpus-per-task=4"], WRAPPED + "0 burn"),
    "full": (
        600,
        [],
        "python3 " + AGENT + " -- /usr/bin/time -v python3 work.py 3 fill\n"
        "echo code $?",
    ),
    "over": (200, [], WRAPPED[5:] + "0 fill more\necho code $?"),
    "idle": (
        1000,
        [],
        SIDECAR % (" --port %d" % OTHER_PORT) + "exec python3 work.py 0",
    ),
    "sidecar": (
        100,
        [],
        SIDECAR % "" + "python3 work.py 0\nscancel --signal=TERM $SLURM_JOB_ID.0\nwait",
    ),
    "cancel": (100, [], WRAPPED + "0"),
    "old": (
        100,
        ["--cpus-per-task=2"],
        "export LD_LIBRARY_PATH=$PWD/old/lib\n"
        "exec old/bin/python3.6 " + AGENT + " -- old/bin/python3.6 work.py 0 fill burn",
    ),
}

LAB = None


class Lab(test_lab.Lab):
    def up(self, **settings):
        self.env["LAB_CPUS"] = "8"  # what a node claims: room for all jobs at once
        self.env.update(settings)
        super().up()

    def take(self, python):
        """Copy what an interpreter needs into the home of the cluster, as `old`."""
        prefix = subprocess.check_output(
            [python, "-c", "import sys; print(sys.base_prefix)"],
            universal_newlines=True,
        ).strip()
        inside = "lib/python%d.%d" % OLD
        skip = shutil.ignore_patterns(
            "test",
            "tests",
            "site-packages",
            "config-*",
            "__pycache__",
            "idlelib",
            "lib2to3",
            "ensurepip",
            "tkinter",
        )
        shutil.copytree(
            os.path.join(prefix, inside), self.path("old", inside), ignore=skip
        )
        os.mkdir(self.path("old", "bin"))
        shutil.copy(
            os.path.join(prefix, "bin", "python%d.%d" % OLD), self.path("old", "bin")
        )
        for library in glob.glob(os.path.join(prefix, "lib", "libpython*.so*")):
            shutil.copy(library, self.path("old", "lib"))

    def cgroup(self, controller, job):
        """The directory of a job's cgroup, as root sees it from outside."""
        for node in "c1", "c2":
            with open(os.path.join(self.dir, node, "cgroup.list")) as file:
                for line in file:
                    path = os.path.join(
                        line.strip(), "slurm_" + node, "uid_4242", "job_" + job
                    )
                    if "/cgroup/%s/" % controller in path and os.path.isdir(path):
                        return path
        raise LookupError("no %s cgroup of job %s" % (controller, job))

    def read(self, controller, job, name):
        with open(os.path.join(self.cgroup(controller, job), name)) as file:
            return file.read()

    def hurry(self, job):
        """All of a job goes before whatever else this machine does."""
        for path in glob.glob(
            self.cgroup("cpuacct", job) + "/**/cgroup.procs", recursive=True
        ):
            with open(path) as file:
                for pid in file.read().split():
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, int(pid), -20)
                        with open("/proc/%s/autogroup" % pid, "w") as group:  # sched(7)
                            group.write("-20")


class Browser(test_lab.Browser):
    def __init__(self):
        self.tool = LAB.start(
            "login", "python3", "-u", "-c", test_lab.BROWSER, stdin=subprocess.PIPE
        )
        self.read = 0


@support.slow("a Slurm cluster")
@support.requires(*NEEDS)
class Jobs(unittest.TestCase):
    """Jobs of all kinds, side by side."""

    @classmethod
    def setUpClass(cls):
        global LAB
        namespaces = subprocess.run(
            ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "true"]
        )
        if namespaces.returncode and os.environ.get("SENTINEL_TEST_ALL") != "1":
            raise unittest.SkipTest("missing here: the right to make namespaces")
        cls.tools = contextlib.ExitStack()
        LAB = Lab()
        cls.tools.callback(LAB.down)
        try:
            LAB.up()
            cls.start_all()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.tools.close()

    @classmethod
    def start_all(cls):
        cls.master = LAB.start(
            "login", "python3", "master_server.py", "--host", "0.0.0.0"
        )
        cls.tools.callback(cls.master.stop)
        cls.other = LAB.start(
            "login",
            "python3",
            "master_server.py",
            "--host",
            "0.0.0.0",
            "--port",
            OTHER_PORT,
            "--dashboard-port",
            OTHER_PAGE,
            "--alert",
            "job_cpu<10 for 2",
        )
        cls.tools.callback(cls.other.stop)
        cls.master.listening("dashboard")
        cls.other.listening("dashboard")
        cls.browser = Browser()
        cls.tools.callback(cls.browser.tool.stop)
        cls.tools.callback(LAB.no_jobs)  # the first of them
        pythons = support.pythons()
        if OLD in pythons:
            LAB.take(pythons[OLD])
        with open(LAB.path("work.py"), "w") as file:
            file.write(WORK)
        cls.jobs = {}
        for name, (memory, flags, script) in JOBS.items():
            if name != "old" or OLD in pythons:
                with open(LAB.path(name + ".sh"), "w") as file:
                    file.write("#!/bin/bash\n%s\n" % script)
                cls.jobs[name] = LAB.sbatch("--mem=%d" % memory, *flags, name + ".sh")

    # ---- what the tests say ----

    def out(self, name):
        return LAB.text("slurm-%s.out" % self.jobs[name])

    def said(self, name, pattern, seconds=LONG):
        """Wait until the job's output holds that; the match."""
        return eventually(
            lambda: re.search(pattern, self.out(name)),
            seconds,
            "job %s says %r" % (name, pattern),
        )

    def row(self, name):
        """The job's row on the page."""
        return [row for row in self.browser.nodes() if row["job"] == self.jobs[name]][0]

    def event(self, kind, name, text="", seconds=LONG):
        """Wait for an event of a job."""
        return eventually(
            lambda: [
                event
                for event in self.browser.events(kind)
                if event["job"] == self.jobs[name] and text in event["text"]
            ],
            seconds,
            "%s %s of job %s" % (kind, text, name),
        )[0]

    def enough(self, name):
        """Tell a job that the test has seen enough."""
        with open(LAB.path(self.jobs[name] + ".enough"), "w"):
            pass

    def state(self, name, seconds=LONG):
        """How Slurm says that the job has ended."""
        job = self.jobs[name]
        eventually(lambda: job not in LAB.queue(), seconds, "job %s ends" % name)
        return re.search(
            r"JobState=(\S+)", LAB.run("login", "scontrol", "-o", "show", "job", job)
        ).group(1)

    def memory(self, name):
        """(anonymous and shared memory, limit) of a job in bytes, as the kernel has it."""
        job = self.jobs[name]
        words = LAB.read("memory", job, "memory.stat").split()
        used = sum(
            int(words[words.index(word) + 1]) for word in ("total_rss", "total_shmem")
        )
        return used, int(LAB.read("memory", job, "memory.limit_in_bytes"))

    def killed(self, name):
        """How often the kernel has killed for want of memory in this job."""
        return sum(
            int(count)
            for count in re.findall(
                r"oom_kill (\d+)",
                LAB.read("memory", self.jobs[name], "memory.oom_control"),
            )
        )

    def within_5_percent(self, value, truth):
        self.assertLessEqual(
            abs(value - truth), 0.05 * truth, "%s is not %s" % (value, truth)
        )

    def cpu_agrees(self, name, cpus):
        """What the page shows for 3 s is what cpuacct.usage says about them: one CPU of these."""

        def used():
            nanoseconds = int(LAB.read("cpuacct", self.jobs[name], "cpuacct.usage"))
            return nanoseconds / 1e9, time.monotonic()

        def agrees():
            (begin, start), shown = used(), []
            while time.monotonic() - start < 3:
                shown.append(self.row(name)["job_cpu"])
            end, now = used()
            truth = 100 * (end - begin) / (now - start) / cpus
            self.within_5_percent(truth, 100 / cpus)
            self.within_5_percent(sum(shown) / len(shown), truth)
            return truth

        self.assertEqual(eventually(lambda: self.row(name)["job_cpus"], LONG), cpus)
        eventually(lambda: self.row(name)["job_read"] is not None, LONG)
        LAB.hurry(self.jobs[name])
        eventually(agrees, LONG, "the page and the kernel agree")
        self.enough(name)
        self.said(name, r"report of .*: CPU mean \S+ %%, peak \S+ %% of %d CPUs" % cpus)

    def left_a_report(self, name, ended):
        """The report is in slurm-%j.out and on the page, with a goodbye."""
        self.said(
            name, r"agent: report of c\d.* %s\b.* \d+:\d\d:\d\d\n" % re.escape(ended)
        )
        self.assertRegex(self.out(name), r"report of c\d.*: CPU mean .* CPUs\n")
        self.assertRegex(
            self.out(name), r"report of c\d.*: memory peak .* GB of .* GB\n"
        )
        text = self.event("finished", name)["text"]
        lines = re.findall(r"report of c\d.*?: (.*)", self.out(name))
        told = "; ".join(lines)
        self.assertIn(told[:200], text)  # an event has 255 bytes
        self.assertEqual(
            [
                event
                for event in self.browser.events("lost")
                if event["job"] == self.jobs[name]
            ],
            [],
        )

    # ---- the tests ----

    def test_0_the_time_left_is_what_squeue_says(self):
        left = eventually(lambda: self.row("limit")["job_time_left"], LONG)
        minutes, seconds = LAB.run(
            "login", "squeue", "-h", "-j", self.jobs["limit"], "-o", "%L"
        ).split(":")
        self.assertLess(
            abs(left - 60 * int(minutes) - int(seconds)), 15
        )  # it is read every 10

    def test_1_a_job_that_burns_one_of_its_four_cpus_is_at_25_percent(self):
        self.said("burn", "ready")
        self.cpu_agrees("burn", 4)
        self.assertEqual(self.state("burn"), "COMPLETED")
        self.left_a_report("burn", "exit 0")

    def test_2_a_job_that_idles_is_told_and_should_ask_for_less_memory(self):
        self.other.logged(
            r"CRITICAL WARNING: .*of its CPUs in use .alert below 10 %", LONG
        )
        LAB.run("login", "scancel", self.jobs["idle"])
        self.assertEqual(self.state("idle"), "CANCELLED")
        peak, suggested = self.other.logged(
            r"finished .*SIGTERM.*; memory peak (\S+) GB of 0.9\d+ GB; "
            r"asked for .* GB.*: --mem=(\d+)M would do",
            LONG,
        ).groups()
        self.assertTrue(1.1 * 1024 * float(peak) < int(suggested) < 500, suggested)

    def test_a_job_that_fills_its_memory_is_warned_and_the_numbers_are_the_kernels(
        self,
    ):
        self.said("full", "ready")
        self.assertIn(
            "above 90 %", self.event("alert", "full", "of its memory")["text"]
        )
        used, limit = self.memory("full")
        row = eventually(
            lambda: self.row("full")["job_ram"] > 94 and self.row("full"), LONG
        )
        self.assertGreater(100 * used / limit, 94)
        self.within_5_percent(row["job_ram"], 100 * used / limit)
        self.within_5_percent(row["job_mem"], used)
        self.assertEqual(row["job_mem_limit"], limit)
        peak = int(LAB.read("memory", self.jobs["full"], "memory.max_usage_in_bytes"))
        self.within_5_percent(row["job_mem_peak"], peak)
        self.assertEqual((row["oom_kill"], self.killed("full")), (0, 0))
        self.enough("full")
        resident = int(
            self.said("full", r"Maximum resident set size \(kbytes\): (\d+)").group(1)
        )
        peak = float(self.said("full", r"memory peak (\S+) GB of 0\.5\d+ GB").group(1))
        self.within_5_percent(peak * 2**20, resident)
        self.said("full", "code 3")
        self.left_a_report("full", "exit 3")

    def test_the_warning_comes_before_the_kernel_kills(self):
        warned = self.event("alert", "over", "of its memory")["time"]
        self.said("over", "ready")
        self.assertEqual(self.killed("over"), 0)
        self.enough("over")
        self.said("over", "code 137")
        self.left_a_report("over", "SIGKILL")
        self.said("over", r"report of .*: out of memory: the kernel killed 1 process\n")
        self.assertLess(warned, self.event("finished", "over")["time"])
        text = self.event("finished", "over")["text"]
        self.assertRegex(text, r"SIGKILL; out of memory: the kernel killed 1 process;")
        self.assertRegex(
            text,
            r"memory peak higher than any sample: the highest was .*--mem=300M may",
        )
        self.assertEqual(self.state("over"), "OUT_OF_MEMORY")

    def test_a_job_that_is_cancelled_leaves_its_report(self):
        self.said("cancel", "ready")
        eventually(lambda: self.row("cancel"))
        LAB.run("login", "scancel", self.jobs["cancel"])
        self.assertEqual(self.state("cancel"), "CANCELLED")
        self.left_a_report("cancel", "SIGTERM")

    def test_a_sidecar_that_the_script_ends_leaves_its_report(self):
        eventually(lambda: self.row("sidecar"))
        self.enough("sidecar")
        self.assertEqual(self.state("sidecar"), "COMPLETED")
        self.left_a_report("sidecar", "SIGTERM")

    def test_python_3_6_says_the_same(self):
        if "old" not in self.jobs:
            self.skipTest("missing here: python 3.6")
        self.event("alert", "old", "of its memory")
        self.said("old", "ready")
        used, limit = self.memory("old")
        row = eventually(
            lambda: self.row("old")["job_ram"] > 93 and self.row("old"), LONG
        )
        self.within_5_percent(row["job_ram"], 100 * used / limit)
        self.assertEqual(self.killed("old"), 0)
        self.cpu_agrees("old", 2)
        self.left_a_report("old", "exit 0")

    def test_z_a_job_that_hits_its_time_limit_was_warned_and_leaves_its_report(self):
        self.assertIn(
            "below 600 s", self.event("alert", "limit", "of its time left")["text"]
        )
        self.assertEqual(self.state("limit", TIME_LIMIT), "TIMEOUT")
        self.left_a_report("limit", "SIGTERM")


if __name__ == "__main__":
    unittest.main()
