"""Sick and healthy jobs on a real Slurm (lab.sh): what the master says of them, while they run.

The jobs' scripts know nothing of us but for two that are wrapped.  A Watch asks a master with
--my-jobs every second for the verdicts on each job, and keeps them all.  About eight minutes.
"""

import collections
import contextlib
import json
import os
import re
import subprocess
import threading
import time
import traceback
import unittest

import support
import test_lab
import test_lab_job
from support import eventually

import master_server

LAB = None
TOLD = 90  # seconds of evidence within which a problem is told ...
ATTACH = 90  # ... after the herd has found the job, and the machine's moods
QUIET = os.environ.get("SENTINEL_TEST_VERDICTS")  # nothing else is at work here
DEATH = 5 if QUIET else 45  # seconds from a job's end until it is told why
CLOCKS = 2  # Slurm's times are whole seconds, and we ask once a second

# On the login node: every second what the master knows, as a line of JSON
POLL = """
import json, time, urllib.request
while True:
    known = {}
    for name in ("nodes", "jobs"):
        with urllib.request.urlopen("http://127.0.0.1:8080/api/" + name, timeout=60) as page:
            known[name] = json.loads(page.read().decode("utf-8"))
    print(json.dumps(known), flush=True)
    time.sleep(1)
"""
# A /tmp of a megabyte, in which the lab's own directory is where it was
SMALL_TMP = (
    "mount --rbind %(dir)s /mnt && mount -t tmpfs -o size=1m,mode=1777 none /tmp"
    " && mkdir -p %(dir)s && mount --rbind /mnt %(dir)s"
)

# What a job does: python3 act.py WORDS.  HOG takes memory until it is killed or has enough.
ACT = r"""
import os, sys, time

def spin(seconds, share=1.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        while time.monotonic() < begin + 0.1 * share:
            pass
        time.sleep(0.1 * (1 - share))

def fill(megabytes, a_second=1000.0, rest=600):
    kept = []
    while sum(map(len, kept)) < megabytes << 20:
        kept.append(b"x" * (1 << 20))
        time.sleep(1 / a_second)
    time.sleep(rest)

what, words = sys.argv[1], [float(word) for word in sys.argv[2:]]
rank = int(os.environ.get("SLURM_PROCID", "0"))
if what == "spin":
    spin(600)
elif what == "wait-for-workers":       # rank 0 hands out work, the others compute
    spin(words[0]) if rank else time.sleep(words[0])
elif what == "spin-but":               # every rank but this one
    spin(600) if rank != words[0] else time.sleep(600)
elif what == "fill":
    fill(int(words[0]), *words[1:])
elif what == "fill-rank":              # this rank alone, after a while
    time.sleep(words[1])
    fill(int(words[2]), words[3]) if rank == words[0] else time.sleep(200)
elif what == "burst":
    for _ in range(int(words[0])):
        spin(words[1])
        time.sleep(words[2])
elif what == "io":
    end = time.monotonic() + words[0]
    while time.monotonic() < end:
        with open("io.tmp", "wb") as file:
            for _ in range(64):
                file.write(b"x" * (1 << 20))
                time.sleep(0.02)
    os.unlink("io.tmp")
elif what == "cache":                  # files, larger than the limit of memory
    for number in range(int(words[0])):
        with open("cache.tmp", "ab") as file:
            file.write(b"x" * (1 << 20))
    with open("cache.tmp", "rb") as file:
        while file.read(1 << 20):
            pass
    spin(words[1])
    os.unlink("cache.tmp")
"""


class Watch:
    """Polls a master and keeps what it says of each job."""

    def __init__(self):
        self.tool = LAB.start("login", "python3", "-u", "-c", POLL)
        self.read = 0
        self.facts = {}
        self.seen = collections.defaultdict(
            dict
        )  # job -> node -> time of its first sample
        self.told = collections.defaultdict(list)  # job -> [(time, verdicts)]
        self.hurried = set()  # jobs that go before whatever else this machine does
        self.error = ""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look_for_ever, daemon=True)
        self.thread.start()

    def stop(self):
        self.ended.set()
        self.thread.join()
        self.tool.stop()

    def look_for_ever(self):
        while not self.ended.wait(0.1):
            lines = self.tool.out[self.read :]
            whole = lines.rpartition("\n")[0]
            if whole:
                self.read += len(whole) + 1
                try:
                    for line in whole.splitlines():
                        self.look(json.loads(line))
                except Exception:
                    self.error = traceback.format_exc()
                    raise

    def look(self, known):
        now = known["nodes"]["time"]
        for row in known["nodes"]["nodes"]:
            if row["job"] and row["node"]:
                self.seen[row["job"]].setdefault(row["node"], now - (row["age"] or 0))
        for facts in known["jobs"]["jobs"]:
            self.facts[facts["job"]] = facts
            verdicts = master_server.parse_verdicts(facts["verdicts"])
            self.told[facts["job"]].append((known["jobs"]["time"], verdicts))
        for job in self.hurried & set(self.seen):
            with contextlib.suppress(LookupError, OSError):  # it comes, or goes
                LAB.hurry(job)


def report(job, seconds, since, words):
    """With SENTINEL_TEST_VERDICTS=1 a line for whoever runs it by hand."""
    if QUIET:
        print("job %s, %.1f s %s: %s" % (job, seconds, since, words), flush=True)


by_hand = unittest.skipUnless(
    QUIET,
    "six minutes of all CPUs: SENTINEL_TEST_VERDICTS=1 runs it",
)


@support.slow("a Slurm cluster")
@support.requires(*test_lab_job.NEEDS)
class Jobs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        global LAB
        namespaces = subprocess.run(
            ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "true"]
        )
        if namespaces.returncode and os.environ.get("SENTINEL_TEST_ALL") != "1":
            raise unittest.SkipTest("missing here: the right to make namespaces")
        cls.tools = contextlib.ExitStack()
        LAB = test_lab.LAB = test_lab_job.LAB = test_lab_job.Lab()
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
        test_lab.LAB = test_lab_job.LAB = None

    @classmethod
    def start_all(cls):
        with open(LAB.path("act.py"), "w") as file:
            file.write(ACT)
        cls.master = LAB.start(
            "login", "python3", "master_server.py", "--host", "0.0.0.0", "--my-jobs"
        )
        cls.tools.callback(cls.master.stop)
        cls.master.listening("dashboard")
        cls.tools.callback(LAB.no_jobs)
        cls.watch = Watch()
        cls.tools.callback(cls.watch.stop)

    def setUp(self):
        self.addCleanup(LAB.no_jobs)

    def submit(self, script, *flags):
        """Submit a script; its job's id."""
        with open(LAB.path("job.sh"), "w") as file:
            file.write("#!/bin/bash\n%s\n" % script)
        return LAB.sbatch(*flags, "job.sh")

    def lines(self, job):
        """The newest verdicts, as text."""
        told = self.watch.told[job]
        return "\n".join(master_server.render_verdicts(told[-1][1])) if told else ""

    def says(self, job, pattern, seconds):
        """Wait until a verdict on a job matches: when it did."""
        try:
            eventually(
                lambda: re.search(pattern, self.lines(job), re.M), seconds, pattern
            )
        except AssertionError as error:
            words = self.lines(job) + self.watch.error
            raise AssertionError("%s: but\n%s" % (error, words)) from None
        told = [
            when
            for when, verdicts in self.watch.told[job]
            if re.search(
                pattern, "\n".join(master_server.render_verdicts(verdicts)), re.M
            )
        ]
        return told[0]

    def each_says(self, jobs, seconds):
        """Each job's verdict comes while there is no more evidence of it than that."""
        for job, pattern in jobs.items():
            with self.subTest(pattern):
                told = self.says(job, pattern, seconds)
                first = min(self.watch.seen[job].values())
                report(job, told - first, "after its first sample", self.lines(job))
                self.assertLess(told - first, TOLD)

    def died(self, job, pattern):
        """A job's death is told in time."""
        facts = self.watch.facts
        eventually(lambda: facts[job]["state"] in master_server.ENDED_STATES, 200)
        told = self.says(job, pattern, 60)
        late = told - facts[job]["end"]
        report(job, late, "after its end", self.lines(job))
        self.assertLess(late, DEATH + CLOCKS)

    def was_fine(self, job):
        """No verdict on a job has ever been any but fine."""
        for when, verdicts in self.watch.told[job]:
            for verdict in verdicts:
                self.assertEqual(verdict.severity, "fine", (when, verdict))
        self.assertTrue(self.watch.told[job])

    # ---- sick ones, while they run

    @by_hand
    def test_a_serial_program_a_leak_and_memory_that_nobody_uses(self):
        serial = self.submit("python3 act.py spin", "-c4", "--mem=100")
        leak = self.submit("python3 act.py fill 1100 5", "--mem=800")
        over = self.submit("python3 act.py fill 50", "--mem=1800", "--nodelist=c2")
        self.watch.hurried.add(serial)
        self.each_says(
            {
                serial: r"^! 1 of 4 CPUs of c\d at work for .*-> --cpus-per-task=1",
                leak: r"^! memory of c\d grows steadily: .*GB of 0\.781 GB.*-> --mem=1000M",
                over: r"^\. memory peak 0\.\d+ GB of 1\.76 GB so far: .*-> --mem=[12]00M",
            },
            TOLD + ATTACH,
        )

    def test_all_on_cpu_0(self):
        bound = self.submit(
            "srun taskset -c 0 python3 act.py spin", "-n4", "-N1", "--mem=200"
        )
        self.watch.hurried.add(bound)
        self.each_says(
            {
                bound: r"^! \d threads of ranks 0-3 share CPU 0 of c\d: they may use: 0; the job"
                r" has (4 CPUs|0-\d) +-> srun --cpu-bind=cores"
            },
            TOLD + ATTACH,
        )

    @by_hand
    def test_one_of_two_nodes_asleep_and_a_full_tmp(self):
        LAB.run("c1", "sh", "-c", SMALL_TMP % {"dir": LAB.dir}, user="root")
        self.addCleanup(LAB.run, "c1", "umount", "-l", "/tmp", user="root")
        two = self.submit(
            "srun python3 act.py spin-but 1", "-N2", "-n2", "-c2", "--mem=100"
        )
        self.watch.hurried.add(two)
        full = self.submit(
            "cat /dev/zero > /tmp/full 2>/dev/null; sleep 600",
            "--mem=100",
            "--nodelist=c1",
        )
        self.each_says(
            {
                two: r"^! 1 of 2 nodes idle for .*: c2: c1 uses [01]\.\d of 2 CPUs",
                full: r"^! /tmp is full on c1: 100 % in use +-> export TMPDIR=",
            },
            TOLD + ATTACH,
        )

    # ---- deaths

    def test_deaths_are_told_with_their_cause(self):
        agent = "python3 agent.py --host login --interval 0.5 -- "
        missing = self.submit("sleep 30; no-such-command", "--mem=50")
        broken = self.submit(
            "sleep 30; exec python3 -c 'import os; os.kill(os.getpid(), 11)'"
        )
        wrapped = self.submit(agent + "sh -c 'sleep 30; kill -SEGV $$'", "--mem=100")
        batch = self.submit(
            agent + "sh -c 'sleep 30; exec python3 act.py fill 400'", "--mem=150"
        )
        step = self.submit("sleep 30; srun python3 act.py fill 400", "--mem=150")
        ranks = self.submit(
            "srun -K -n4 python3 act.py fill-rank 1 40 400 4", "-n4", "-N1", "--mem=250"
        )
        cancelled = self.submit("sleep 600", "--mem=50")
        limited = self.submit("sleep 600", "--time=1", "--mem=50")
        eventually(lambda: self.watch.seen[cancelled], ATTACH)
        LAB.run("login", "scancel", cancelled)
        deaths = {
            missing: r"^died \d\d:\d\d: exit code 127.*: there is no such command: .*-> module",
            broken: r"^died \d\d:\d\d: SIGSEGV.*: it used memory that is not its own",
            wrapped: r"^died \d\d:\d\d: SIGSEGV on c\d: .*SIGSEGV on c\d at",
            batch: r"^died \d\d:\d\d: out of memory: the kernel killed 1 process on c\d: memory"
            r" peak higher than any sample: the highest was .* of 0\.146 GB; .*-> --mem=200M",
            step: r"^died \d\d:\d\d: out of memory.* c\d.*Slurm says (OUT_OF_MEMORY|FAILED)",
            ranks: r"^died \d\d:\d\d: out of memory.*c\d.*: memory peak .*; rank 1 \(python3\)"
            r" had .*Slurm says (OUT_OF_MEMORY|FAILED)",
            cancelled: r"^died \d\d:\d\d: cancelled.*Slurm says CANCELLED",
            limited: r"^died \d\d:\d\d: time limit of 60 s reached: .*Slurm says TIMEOUT",
        }
        for job, pattern in deaths.items():
            with self.subTest(pattern):
                self.died(job, pattern)

    @by_hand
    def test_a_node_that_is_cut_off(self):
        job = self.submit("srun python3 act.py spin-but 9", "-N2", "-n2", "--mem=100")
        eventually(lambda: len(self.watch.seen[job]) == 2, ATTACH)
        LAB.must("cut", "c2")
        try:
            self.says(
                job,
                r"^! c2 fell silent at \d\d:\d\d:\d\d, \d+ s ago: no goodbye; still sending: c1",
                30,
            )
        finally:
            LAB.must("heal", "c2")

    # ---- healthy ones

    @by_hand
    def test_healthy_jobs_are_fine_from_their_start_to_their_end(self):
        act = "python3 act.py "
        jobs = [
            self.submit("sleep 30", "--mem=50"),
            self.submit("true", "--mem=50"),
            self.submit(act + "io 100", "--mem=100", "-c2"),
            self.submit(act + "burst 4 12 15", "--mem=50"),
            self.submit(act + "fill 620 1000 80", "--mem=720"),
            self.submit(act + "cache 300 70", "--mem=150"),
            self.submit("srun " + act + "burst 1 90 0", "-n2", "-N1", "--mem=100"),
            self.submit(
                "srun " + act + "wait-for-workers 90", "-n3", "-N1", "--mem=100"
            ),
            self.submit(
                "srun " + act + "wait-for-workers 90", "-n2", "-N2", "--mem=100"
            ),
        ]
        for job in jobs:
            eventually(
                lambda job=job: (
                    job in self.watch.facts
                    and self.watch.facts[job]["state"] == "COMPLETED"
                ),
                240,
            )
        time.sleep(10)  # whatever is said of an end
        for job in jobs:
            with self.subTest(job=job):
                self.was_fine(job)
                report(job, 0, "after its end", self.lines(job))


if __name__ == "__main__":
    unittest.main()
