"""Jobs that know nothing of us, watched from one command: real Slurm, real sshd (lab.sh).

sshd forwards no TCP here, and of what the compute nodes send to the login node only Slurm's
own passes, as where Solutions A and B cannot work.

The bounds of time are those of a free machine: `Bounded.within` tells what it took and holds it
to the bare figure.  The lab stands for five machines and has this one, which may be busy with
other tests.  So where there is cgroup v1, all that is done here has a large share of the CPU
(see `Group`).  And while the lab is up, a thread measures how much longer a small piece of work
takes than its CPU time (see `Pace`).  Where that was more than FREE times as long, the bound is
as many times longer: a product that waits for something is still found out, a slow machine not.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import unittest

import support
import test_lab_job
from support import eventually

# Works a fifth of the time: the hosts, which are to be five machines, have two CPUs
SPIN = """\
#!/bin/bash
srun --ntasks=$SLURM_NNODES timeout 600 python3 -c '
import time
while True:
    enough = time.thread_time() + 0.02
    while time.thread_time() < enough:
        pass
    time.sleep(0.08)
'
"""
BURN = "#!/bin/bash\nsrun --ntasks=1 timeout 600 python3 -c 'while True: pass'\n"
ASK = (
    "import sys, urllib.request;"
    " url = 'http://127.0.0.1:%s%s' % (sys.argv[1], sys.argv[2]);"
    " print(urllib.request.urlopen(url, timeout=5).read().decode())"
)
ONLY_SLURM = (
    "add table ip jobs;"
    " add chain ip jobs way {type filter hook output priority 0;};"
    " add rule ip jobs way ip daddr 10.77.2.1 tcp dport != {6817, 60001-60999}"
    " tcp flags & (syn|ack) == syn drop"
)
QUIET = """\
#!/bin/bash
date +%s.%N
sleep 45
date +%s.%N
echo done
exit 3
"""
# What a user's .bashrc says to every ssh: some of it looks as if the herd spoke
BASHRC = """\
echo "= Welcome back"
echo '@ ghost.1-0.0 {"cpu": 1, "ram": 1, "node": "ghost"}'
printf 'modules loaded> '
"""
CPUS = "24"  # what a node claims to have: room for forty jobs at once on two of them
SHARES = 20480  # of the CPU, cpu.shares: twenty times what a group has otherwise
TOLD = 5  # seconds from a job's end until it is told
FREE = 1.2  # times its CPU time that work may take on a machine that is free
WORK_SECONDS = 0.02  # of CPU, by which that is measured ...
REST_SECONDS = 0.25  # ... and what passes between two measurements
# times a bound until a test gives up: then it tells by how much it was missed
LONG = 10
LAB = None
PACE = None


def setUpModule():
    if os.environ.get("SENTINEL_TEST_ALL") != "1":
        raise unittest.SkipTest("a Slurm cluster: SENTINEL_TEST_ALL=1 runs it")
    global LAB, PACE
    first = Group("lab")
    first.take_process()
    unittest.addModuleCleanup(first.close)
    PACE = Pace()
    unittest.addModuleCleanup(PACE.stop)
    LAB = test_lab_job.Lab()
    unittest.addModuleCleanup(LAB.down)
    LAB.up(LAB_CPUS=CPUS)
    config = os.path.join(LAB.dir, "etc", "ssh", "sshd_config")
    banner = os.path.join(LAB.dir, "etc", "ssh", "banner")
    with open(banner, "w") as file:
        file.write("= Authorized use only\n! This system is monitored\n")
    with open(config, "a") as file:
        file.write("AllowTcpForwarding no\nBanner %s\n" % banner)
    LAB.run("login", "sh", "-c", "kill -HUP $(cat /run/sshd.pid)", user="root")
    # the ports on which srun hears its tasks: Slurm's own, as the controller's
    with open(os.path.join(LAB.dir, "etc", "slurm", "slurm.conf"), "a") as file:
        file.write("SrunPortRange=60001-60999\n")
    LAB.run("login", "scontrol", "reconfigure", user="root")
    for host in ("c1", "c2"):
        LAB.run(host, "nft", ONLY_SLURM, user="root")
    for name, text in (("spin.sh", SPIN), ("burn.sh", BURN), ("quiet.sh", QUIET)):
        with open(LAB.path(name), "w") as file:
            file.write(text)
        os.chmod(LAB.path(name), 0o755)


class Group:
    """Of processes and threads that have the CPU before others: many shares of cgroup v1.

    Without the right to make one, or the controller, what joins it stays where it is.
    """

    def __init__(self, name):
        with open("/proc/self/cgroup") as file:
            found = re.search(r"(?m)^\d+:(?:.*,)?cpu(?:,.*)?:(/.*)", file.read())
        self.parent = "/sys/fs/cgroup/cpu" + (found.group(1) if found else "")
        self.path = os.path.join(self.parent, "sentinel-%s-%d" % (name, os.getpid()))
        self.is_there = False
        with contextlib.suppress(OSError):
            os.mkdir(self.path)
            self.is_there = True
            self.write(self.path, "cpu.shares", SHARES)

    @staticmethod
    def write(folder, name, value):
        with open(os.path.join(folder, name), "w") as file:
            file.write(str(value))

    def take_process(self):
        """Take this process in, and so all that it starts from now on."""
        if self.is_there:
            self.write(self.path, "cgroup.procs", os.getpid())

    def take_thread(self):
        if self.is_there:
            self.write(self.path, "tasks", threading.get_native_id())

    def close(self):
        if self.is_there:
            self.write(self.parent, "cgroup.procs", os.getpid())
            # what has ended is gone in a moment
            eventually(lambda: os.rmdir(self.path) is None)


class Pace:
    """How slow the machine is for what goes first here: measured again and again by a thread.

    It has a group of its own, so that what the lab does itself is not taken for a slow machine.
    """

    def __init__(self):
        self.group = Group("pace")
        self.looks = []  # (time.monotonic(), seconds that it took, of CPU)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        self.group.take_thread()
        while not self.stopped.wait(REST_SECONDS):
            began, begun = time.monotonic(), time.thread_time()
            while time.thread_time() - begun < WORK_SECONDS:
                pass
            now = time.monotonic()
            self.looks.append((now, now - began, time.thread_time() - begun))

    def stop(self):
        self.stopped.set()
        self.thread.join()
        self.group.close()

    def since(self, moment):
        """How many times its CPU time work has taken since then."""
        looks = [look for look in self.looks if look[0] >= moment] or self.looks[-1:]
        return sum(look[1] for look in looks) / sum(look[2] for look in looks)


def everything_in(folder):
    """The paths of all files and folders in it; what the jobs themselves print is none of ours."""
    return {
        os.path.join(path, name)
        for path, folders, files in os.walk(folder)
        for name in folders + files
        if not re.match(r"slurm-\d+\.out", name)
    }


def listeners_of_login():
    """The programs that listen on the login node."""
    listeners = LAB.run("login", "ss", "-Htlnp", user="root")
    return set(re.findall(r'users:\(\("([^"]+)"', listeners))


class Bounded(unittest.TestCase):
    """What is to be there within some seconds."""

    def within(self, seconds, what, check, since=None):
        """Wait until `check` is truthy, hold it to the bound, and return the value."""
        since = time.monotonic() if since is None else since
        value = eventually(check, LONG * seconds, what)
        took, pace = time.monotonic() - since, PACE.since(since)
        words = "%s: %.1f s of %g s" % (what, took, seconds)
        if pace > FREE:
            seconds *= pace
            words += "; the machine is %.1f times slower: %.0f s" % (pace, seconds)
        print("   ", words, file=sys.stderr)
        self.assertLessEqual(took, seconds, words)
        return value


class Watched(Bounded):
    """What is watched by a master of the lab, and what that says."""

    def setUp(self):
        self.addCleanup(LAB.no_jobs)

    def watch(self, host, *flags):
        master = LAB.start(host, "python3", "master_server.py", *flags)
        self.addCleanup(master.stop)
        self.host = host
        self.page = master.listening("dashboard")
        return master

    def get(self, path):
        return LAB.run(self.host, "python3", "-c", ASK, self.page, path)

    def ask(self, path):
        return json.loads(self.get(path))

    def rows(self):
        """{(job, node): row}"""
        return {
            (row["job"], row["node"]): row for row in self.ask("/api/nodes")["nodes"]
        }

    def jobs(self):
        return {job["job"]: job for job in self.ask("/api/jobs")["jobs"]}

    def late_of_slurm(self, job):
        """The seconds left of a job as the page tells them, less those of squeue."""
        (row,) = [row for (name, _), row in self.rows().items() if name == job]
        minutes, seconds = LAB.run(
            "login", "squeue", "-h", "-j", job, "-o", "%L"
        ).split(":")
        return row["job_time_left"] - 60 * int(minutes) - int(seconds)

    def ended_as(self, job):
        """How scontrol says that a job ended; it must be what is told here, too."""
        told = LAB.run("login", "scontrol", "show", "job", job)
        state = re.search(r"JobState=(\S+)", told).group(1)
        code = re.search(r" ExitCode=(\S+)", told).group(1)
        ours = self.jobs()[job]
        self.assertEqual((ours["state"], ours["exit"]), (state, code))
        return "%s %s" % (state, code)

    def steps(self):
        names = LAB.run("login", "squeue", "-s", "-h", "-o", "%j").split()
        return names.count("sentinel")

    def our_steps(self):
        """The ids of our steps."""
        lines = LAB.run("login", "squeue", "-s", "-h", "-o", "%i %j").splitlines()
        return {line.split()[0] for line in lines if line.endswith(" sentinel")}

    def aged(self, *jobs):
        """Wait until the jobs run, and are no longer too young to be attached to."""
        eventually(lambda: all(LAB.queue().get(job) == "RUNNING" for job in jobs), 30)
        since = time.monotonic()
        eventually(lambda: time.monotonic() - since > 20, 30)

    def left_of_ours(self):
        """Herds, sruns and agents: their pids, as they are outside."""
        return {
            pid
            for host in ("login", "c1", "c2")
            for flag in ("--lifeline", "--herd")
            for pid in LAB.pids_with(host, flag)
        }


class Jobs(Watched):
    def test_from_the_laptop_by_one_ssh_without_a_port_a_file_or_a_changed_script(self):
        two = LAB.sbatch(
            "-N2", "--ntasks-per-node=1", "--mem=300", "-t10", "-Jtwo", "spin.sh"
        )
        one = LAB.sbatch("-N1", "-c2", "--mem=200", "-t10", "-Jone|x", "spin.sh")
        self.aged(two, one)
        before = everything_in(LAB.path())
        others = listeners_of_login()
        began = time.monotonic()
        master = self.watch("laptop", "--ssh", "login")
        three = {(two, "c1"), (two, "c2"), (one, "c1")}
        self.within(5, "the rows of two jobs", lambda: set(self.rows()) == three, began)
        row = eventually(
            lambda: self.rows()[one, "c1"]["job_cpu"] and self.rows()[one, "c1"]
        )
        self.assertEqual((row["job_name"], row["job_cpus"]), ("one|x", 2))
        self.assertEqual(row["job_mem_limit"], 200 * 2**20)
        self.assertAlmostEqual(self.late_of_slurm(one), 0, delta=5)
        self.assertEqual(row["job_time_limit"], 600)
        self.assertEqual(self.jobs()[two]["state"], "RUNNING")
        self.assertEqual(self.steps(), 2)
        sessions = LAB.run("login", "pgrep", "-fc", "sshd: tester@")
        self.assertEqual(int(sessions), 1)
        self.assertLessEqual(listeners_of_login() - others, {"srun"})  # Slurm's way
        self.assertEqual(everything_in(LAB.path()), before)
        eventually(lambda: time.monotonic() - began > 20, 30)
        asked = time.monotonic()
        later = LAB.sbatch("-N1", "-c1", "--mem=100", "-t10", "-Jlater", "spin.sh")
        self.within(
            35,
            "the row of a job that is submitted 20 s later",
            lambda: later in [job for job, _ in self.rows()],
            asked,
        )
        asked = time.monotonic()
        LAB.run("login", "scancel", one)
        told = r"finished c1 \(job %s\): SIGTERM; ran .*CPU mean .*asked for " % one
        self.within(
            7,
            "the report of a cancelled job",
            lambda: re.search(told, master.log),
            asked,
        )
        self.within(
            7, "CANCELLED", lambda: self.jobs()[one]["state"] == "CANCELLED", asked
        )
        self.assertRegex(self.ended_as(one), "CANCELLED")
        self.assertEqual(master.stop(), 0)
        self.within(10, "no step is left", lambda: self.steps() == 0)

    def test_a_job_that_is_watched_and_whose_master_is_killed_is_as_one_without_us(
        self,
    ):
        """The same job runs on both nodes; nobody looks at the one on c2."""
        job, twin = (
            LAB.sbatch("-N1", "--mem=100", "-t10", "-w", node, "quiet.sh")
            for node in ("c1", "c2")
        )
        self.aged(job, twin)
        master = self.watch("login", "--my-jobs", job)
        eventually(lambda: (job, "c1") in self.rows(), 20)
        self.assertEqual(self.steps(), 1)
        killed = time.monotonic()
        # its roles may end by themselves before their turn comes
        LAB.kill("login", "master_server.py")
        self.within(
            10,
            "a master is killed: all is gone",
            lambda: not self.left_of_ours() and self.steps() == 0,
            killed,
        )
        self.assertEqual(LAB.pids("login", "agent.py"), [])
        master.kill()
        eventually(lambda: not LAB.queue(), 60)
        ours, theirs = (self.ran(each) for each in (job, twin))
        self.assertEqual(
            ours[1:], (["done", ""], "ExitCode=3:0", "DerivedExitCode=0:0")
        )
        self.assertEqual(theirs[1:], ours[1:])
        self.assertAlmostEqual(ours[0] / theirs[0], 1, delta=0.01)

    def ran(self, job):
        """(seconds, the rest of what it printed, exit codes) of a quiet job."""
        began, ended, *rest = LAB.text("slurm-%s.out" % job).split("\n")
        told = LAB.run("login", "scontrol", "-d", "show", "job", job)
        codes = [
            re.search(r"\b%s=\S+" % name, told).group()
            for name in ("ExitCode", "DerivedExitCode")
        ]
        return (float(ended) - float(began), rest, *codes)

    def test_whichever_part_is_killed_nothing_of_it_is_left_after_ten_seconds(self):
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        both = {(job, "c1"), (job, "c2")}
        for victim, host, word in (
            ("ssh", "laptop", "ServerAliveCountMax=2"),
            ("herd", "login", "--herd"),
            ("relay", "laptop", "--jobs"),
            ("master", "laptop", "master_server.py"),
        ):
            with self.subTest(victim):
                master = self.watch("laptop", "--ssh", "login")
                eventually(lambda: set(self.rows()) == both, 30)
                before, steps = self.left_of_ours(), self.our_steps()
                self.assertGreaterEqual(len(before), 4)
                self.assertEqual(len(steps), 1)
                pids = LAB.pids_with(host, word)
                self.assertTrue(pids)
                killed = time.monotonic()
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

                def is_clean(before=before, steps=steps):
                    return not (
                        before & self.left_of_ours() or steps & self.our_steps()
                    )

                self.within(10, "%s killed: all is gone" % victim, is_clean, killed)
                if victim != "master":  # what was killed is started again
                    self.within(
                        30,
                        "%s killed: the rows are back" % victim,
                        lambda: set(self.rows()) == both,
                        killed,
                    )
                master.stop()
                self.within(
                    10, "stopped: no process is left", lambda: not self.left_of_ours()
                )
                self.within(10, "stopped: no step is left", lambda: self.steps() == 0)
                self.assertNotIn("This system is monitored", master.log)
        self.assertEqual(LAB.queue(), {job: "RUNNING"})

    def test_where_the_cluster_has_no_python_but_the_oldest(self):
        """Python 3.6 herds on the login node, and is all that the compute nodes have."""
        python = support.pythons().get((3, 6))
        if python is None:
            self.skipTest("missing here: Python 3.6")
        LAB.take(python)
        wrapper = LAB.path("python3.6")
        home = "/home/tester/old"
        with open(wrapper, "w") as file:
            file.write(
                '#!/bin/sh\nLD_LIBRARY_PATH=%s/lib exec %s/bin/python3.6 "$@"\n'
                % (home, home)
            )
        os.chmod(wrapper, 0o755)
        real = os.path.realpath("/usr/bin/python3")
        for host in ("login", "c1", "c2"):
            words = ("mount", "--bind", "/home/tester/python3.6", real)
            LAB.run(host, *words, user="root")
            self.addCleanup(LAB.run, host, "umount", real, user="root")
            told = LAB.run(host, "python3", "--version")
            self.assertIn("Python 3.6", told)
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "quiet.sh")
        self.aged(job)
        self.watch("laptop", "--ssh", "login")
        eventually(lambda: set(self.rows()) == {(job, "c1"), (job, "c2")}, 30)
        LAB.run("login", "scancel", job)
        eventually(lambda: self.jobs()[job]["state"] == "CANCELLED", 30)

    def test_how_a_job_ended_is_told_as_slurm_says(self):
        with open(LAB.path("fail.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 30; exit 3\n")
        failing = LAB.sbatch("-N1", "--mem=100", "-t10", "fail.sh")
        waiting = LAB.sbatch("-N2", "--exclusive", "--mem=100", "-t10", "spin.sh")
        self.watch("login", "--my-jobs")
        eventually(lambda: self.jobs()[waiting]["reason"], 30)
        self.assertEqual(self.jobs()[waiting]["state"], "PENDING")
        ended = eventually(
            lambda: self.jobs()[failing]["exit"] and self.jobs()[failing], 90
        )
        self.assertEqual((ended["state"], ended["exit"]), ("FAILED", "3:0"))
        self.assertEqual(self.ended_as(failing), "FAILED 3:0")

    def dead(self, job, state, check):
        """The facts of a job that has died, and how long after its end they were told."""
        eventually(lambda: self.jobs()[job]["verdicts"], 60)  # it is being recorded
        with open(LAB.path(job + ".enough"), "w"):
            pass

        def look():
            facts = self.jobs()[job]
            return facts if facts["state"] == state else None

        facts = eventually(look, 90)
        late = time.time() - facts["end"]  # Slurm's clock has no parts of a second

        def judged():
            verdicts = self.jobs()[job]["verdicts"]
            return [v for v in verdicts if v["severity"] == "died"]

        verdict = eventually(judged, 30)[0]
        self.assertRegex(verdict["what"], check)
        return facts, late, time.time() - facts["end"]

    def test_a_death_is_told_and_judged_within_five_seconds(self):
        wait = "while [ ! -e $SLURM_JOB_ID.enough ]; do sleep 0.1; done\n"
        with open(LAB.path("three.sh"), "w") as file:
            file.write("#!/bin/bash\n" + wait + "exit 3\n")
        with open(LAB.path("hog.sh"), "w") as file:
            file.write(
                "#!/bin/bash\n" + wait + "exec python3 -c 'x = bytearray(1 << 30)'\n"
            )
        three = LAB.sbatch("-N1", "--mem=100", "-t10", "three.sh")
        hog = LAB.sbatch("-N1", "--mem=100", "-t10", "hog.sh")
        self.aged(three, hog)
        self.watch("login", "--my-jobs", "--record", "records")
        for job, state, code, check in (
            (three, "FAILED", "3:0", "exit code 3"),
            (hog, "OUT_OF_MEMORY", "0:125", "out of memory"),
        ):
            with self.subTest(state):
                facts, told, judged = self.dead(job, state, check)
                self.assertEqual(facts["exit"], code)
                self.assertIsNotNone(facts["derived_exit"])
                self.assertLess(told, TOLD + 1)
                self.assertLess(judged, TOLD + 1)

    def test_a_job_that_was_fine_is_told_as_fine_although_our_step_was_ended(self):
        with open(LAB.path("fine.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 30; srun true\n")
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "fine.sh")
        self.aged(job)
        self.watch("login", "--my-jobs", "--record", "records")
        eventually(lambda: (job, "c1") in self.rows(), 30)
        eventually(lambda: self.jobs()[job]["state"] == "COMPLETED", 60)
        told = self.jobs()[job]
        self.assertEqual((told["exit"], told["derived_exit"]), ("0:0", "0:0"))
        self.assertEqual(self.ended_as(job), "COMPLETED 0:0")

    def test_what_sshd_and_a_login_shell_say_first_does_not_disturb(self):
        with open(LAB.path(".bashrc"), "w") as file:
            file.write(BASHRC)
        self.addCleanup(os.unlink, LAB.path(".bashrc"))
        said = LAB.run("laptop", "ssh", "login", "true")
        self.assertIn("= Welcome back", said)
        self.assertIn("! This system is monitored", said)
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        master = self.watch("laptop", "--ssh", "login")
        eventually(lambda: set(self.rows()) == {(job, "c1")}, 30)
        self.assertEqual(self.jobs()[job]["state"], "RUNNING")
        self.assertNotIn("Welcome", master.log)
        self.assertNotIn("monitored", master.log)
        self.assertNotIn("Traceback", master.log)

    def test_the_parts_of_a_heterogeneous_job_are_watched_each_on_its_nodes(self):
        with open(LAB.path("het.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 600\n")
        words = "-n1 --mem=100 -t10 -w c1 : -n1 --mem=120 -t10 -w c2 het.sh"
        job = LAB.sbatch(*words.split())
        self.aged(job, str(int(job) + 1))
        self.watch("login", "--my-jobs")
        both = {(job + "+0", "c1"), (job + "+1", "c2")}
        eventually(lambda: set(self.rows()) == both, 30)
        limits = [row["job_mem_limit"] / 2**20 for row in self.rows().values()]
        self.assertEqual(sorted(limits), [100, 120])
        LAB.run("login", "scancel", job)
        for part in both:
            eventually(
                lambda part=part: self.jobs()[part[0]]["state"] == "CANCELLED", 60
            )

    def test_a_job_that_reaches_its_time_limit_is_told_as_slurm_says(self):
        job = LAB.sbatch("-N1", "--mem=100", "-t1", "-Jlate", "spin.sh")
        self.aged(job)
        self.watch("login", "--my-jobs")
        eventually(lambda: (job, "c1") in self.rows(), 30)
        ended = eventually(lambda: self.jobs()[job]["exit"] and self.jobs()[job], 150)
        self.assertEqual(ended["state"], "TIMEOUT")
        self.assertRegex(self.ended_as(job), "TIMEOUT")
        self.assertTrue(60 <= ended["end"] - ended["start"] < 150)

    def test_the_cpu_time_of_a_job_is_what_the_kernel_counted(self):
        job = LAB.sbatch("-N1", "-c2", "--mem=100", "-t10", "burn.sh")
        self.aged(job)
        self.watch("login", "--my-jobs")
        node = eventually(lambda: [key[1] for key in self.rows() if key[0] == job], 30)[
            0
        ]

        def usage():
            """Nanoseconds of CPU that the job has had (cgroup v1)."""
            return int(LAB.read("cpuacct", job, "cpuacct.usage"))

        def fresh():
            """A sample that has just come: (when, CPU time so far, job_cpu)."""
            while True:
                row = self.rows()[job, node]
                if row["age"] < 0.3:
                    return time.monotonic() - row["age"], usage(), row["job_cpu"]

        def ratio():
            """What the page told of 40 s, to what the kernel counted meanwhile."""
            begin, before, _ = last, _, _ = fresh()
            told = 0.0
            while last - begin < 40:
                now, spent, share = fresh()
                if now - last > 1:  # another one
                    told += share / 100 * 2 * (now - last)  # of two CPUs
                    last = now
            return told / ((spent - before) / 1e9)

        eventually(lambda: self.rows()[job, node]["job_cpu"], 30)
        LAB.hurry(job)
        # a busy machine reads the kernel's count late: not three times in a row
        ratios = []
        while not any(abs(known - 1) < 0.02 for known in ratios):
            self.assertLess(len(ratios), 3, ratios)
            ratios.append(ratio())
        print("    job_cpu / cpuacct: %.4f" % ratios[-1], file=sys.stderr)

    def test_a_login_that_cannot_be_reached_is_one_line_and_exit_1(self):
        master = LAB.start("laptop", "python3", "master_server.py", "--ssh", "nowhere")
        self.addCleanup(master.stop)
        self.assertEqual(master.wait(30), 1)
        self.assertRegex(
            master.log, r"error: .*nowhere.*see that `ssh nowhere true` works"
        )
        self.assertNotIn("Traceback", master.log)

    def test_a_master_whose_ssh_drops_ends_and_leaves_nothing(self):
        words = ["ssh", "-tt", "login", "python3", "master_server.py", "--with-agent"]
        ssh = LAB.start("laptop", *words)
        self.addCleanup(ssh.kill)
        eventually(lambda: LAB.pids("login", "master_server.py"), 20)
        eventually(lambda: "sentinel" in LAB.run("login", "ls", "/dev/shm"))
        LAB.run("laptop", "pkill", "-KILL", "-x", "ssh")
        eventually(lambda: not LAB.pids("login", "master_server.py"), 20)
        eventually(lambda: "sentinel" not in LAB.run("login", "ls", "/dev/shm"))

    def test_ports_of_a_colleague_are_left_alone_and_the_next_are_told(self):
        other = LAB.start("login", "python3", "master_server.py")
        self.addCleanup(other.stop)
        other.listening("dashboard")
        master = self.watch("login", "--my-jobs")
        self.assertEqual(self.page, 8081)
        self.assertEqual(master.listening("collector"), 13580)


if __name__ == "__main__":
    unittest.main()
