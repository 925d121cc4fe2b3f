"""Sick and healthy jobs on a real Slurm (lab.sh): what diagnose() says of them, while they run.

The jobs' scripts know nothing of us but for two that are wrapped.  A Watch asks a running master
every two seconds, as a recorder does, keeps a point of each curve for ten seconds, and puts all
of it to diagnose().  The ranks it reads of the job's processes from outside, and the exit code of
the worst step it asks Slurm for.  About eight minutes.
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
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
TOLD = 90  # seconds of evidence within which a problem is told ...
ATTACH = 90  # ... after the herd has found the job, and the machine's moods
DEATH = 45  # the herd asks Slurm every 30 s

# On the login node: every two seconds what the master knows, as a line of JSON
POLL = """
import json, time, urllib.request
while True:
    known = {}
    for name in ("nodes", "jobs", "events"):
        with urllib.request.urlopen("http://127.0.0.1:8080/api/" + name, timeout=60) as page:
            known[name] = json.loads(page.read().decode("utf-8"))
    print(json.dumps(known), flush=True)
    time.sleep(2)
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
elif what == "spin-but":               # every rank but this one
    spin(600) if rank != words[0] else time.sleep(600)
elif what == "fill":
    fill(int(words[0]), *words[1:])
elif what == "fill-rank":              # this rank alone, after a while
    time.sleep(words[1])
    fill(int(words[2])) if rank == words[0] else time.sleep(20)
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


class Lab(test_lab_job.Lab):
    def processes(self, job):
        """{node: pids} of a job's processes, as they are outside."""
        found = {}
        for name in "c1", "c2":
            pids = set()
            for folder in self.folders(job, name):
                path = folder + "/cgroup.procs"
                with contextlib.suppress(OSError), open(path) as file:
                    pids.update(map(int, file.read().split()))
            if pids:
                found[name] = sorted(pids)
        return found

    def folders(self, job, name):
        """All cgroups of a job on a node."""
        with open(os.path.join(self.dir, name, "cgroup.list")) as file:
            tops = [line.strip() for line in file if "/memory/" in line]
        for top in tops:
            path = os.path.join(top, "slurm_" + name, "uid_4242", "job_" + job)
            for folder, _, _ in os.walk(path):
                yield folder


def read_rank(pid):
    """A process as a part: its counters are totals; None once it has ended."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            stat = file.read().rpartition(") ")[2].split()
        with open("/proc/%d/status" % pid) as file:
            status = file.read()
        with open("/proc/%d/io" % pid) as file:
            io = dict(line.split(": ") for line in file.read().splitlines())
        with open("/proc/%d/environ" % pid, "rb") as file:
            number = re.search(rb"(?:^|\0)SLURM_PROCID=(\d+)", file.read())
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            words = file.read().split(b"\0")
    except (OSError, ValueError):
        return None
    if {b"--stdout", b"agent.py"} & set(words) or b"slurmstepd" in words[0]:
        return None
    part = {
        "pid": pid,
        "program": os.path.basename(words[0].decode("utf-8", "replace")),
        "ticks": int(stat[11]) + int(stat[12]),
        "mem": int(stat[21]) * PAGE,
        "running": int(stat[0] == "R"),
        "state": stat[0],
        "cpus": re.search(r"Cpus_allowed_list:\s+(\S+)", status).group(1),
        "read_total": int(io["rchar"]),
        "write_total": int(io["wchar"]),
    }
    if number:
        part["rank"] = int(number.group(1))
    return part


class Watch:
    """Polls a master and puts what it knows of each job to diagnose()."""

    def __init__(self):
        self.tool = LAB.start("login", "python3", "-u", "-c", POLL)
        self.read = 0
        self.facts = collections.defaultdict(dict)
        self.events = []
        # job -> node -> [(time, sample)], job -> node -> [(time, {pid: part})]
        self.seen = collections.defaultdict(dict)
        self.ranks = collections.defaultdict(dict)
        self.told = collections.defaultdict(list)  # job -> [(time, verdicts)]
        self.hurried = set()  # jobs that go before whatever else this machine does
        self.now = 0.0
        self.error = ""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look_for_ever, daemon=True)
        self.thread.start()

    def stop(self):
        self.ended.set()
        self.thread.join()
        self.tool.stop()

    def look_for_ever(self):
        while not self.ended.wait(0.2):
            lines = self.tool.out[self.read :]
            whole = lines.rpartition("\n")[0]
            if whole:
                self.read += len(whole) + 1
                try:
                    self.look(json.loads(whole.splitlines()[-1]))
                except Exception:
                    self.error = traceback.format_exc()
                    raise

    def look(self, known):
        self.now = known["nodes"]["time"]
        self.events = known["events"]["events"]
        for facts in known["jobs"]["jobs"]:
            # what was told once is kept, as a record keeps it
            told = {key: value for key, value in facts.items() if value is not None}
            self.facts[facts["raw"]].update(told)
            if told["state"] in master_server.ENDED_STATES:
                self.ask_end(facts["raw"])
        for row in known["nodes"]["nodes"]:
            if row["job"] and row["node"]:
                samples = self.seen[row["job"]].setdefault(row["node"], [])
                samples.append((self.now - (row["age"] or 0), row))
        for job in list(self.seen):
            self.look_from_outside(job)
        for job in set(self.seen) | set(self.facts):
            self.told[job].append(
                (self.now, master_server.diagnose(self.evidence(job)))
            )

    def ask_end(self, job):
        """What the herd would ask: Slurm's exit code of the job, and that of its worst step."""
        if "derived_exit" not in self.facts[job]:
            told = LAB.run("login", "scontrol", "-d", "show", "job", job)
            for key, word in ("exit", " ExitCode"), ("derived_exit", "DerivedExitCode"):
                found = re.search(r"%s=(\S+)" % word, told)
                self.facts[job][key] = found.group(1)

    def look_from_outside(self, job):
        if job in self.hurried:
            with contextlib.suppress(LookupError, OSError):  # it comes, or goes
                LAB.hurry(job)
        for name, pids in LAB.processes(job).items():
            parts = {pid: read_rank(pid) for pid in pids}
            parts = {pid: part for pid, part in parts.items() if part}
            self.ranks[job].setdefault(name, []).append((time.monotonic(), parts))

    def evidence(self, job):
        facts = self.facts[job] or {"job": job}
        nodes = [self.node(job, name) for name in sorted(self.seen[job])]
        return master_server.JobEvidence(facts, nodes, self.events, self.now)

    def node(self, job, name):
        samples = self.seen[job][name]
        last_time, last = samples[-1]
        looks = self.ranks[job].get(name, [])
        parts = self.parts(looks)
        curves = self.curves(samples)
        lost = last_time if self.now - last_time > 6 else None
        return master_server.NodeEvidence(
            name, last, curves, parts, [], {}, set(), lost
        )

    def curves(self, samples):
        """A point for ten seconds: the mean of the samples in them."""
        buckets = collections.defaultdict(list)
        for moment, sample in samples:
            for key, value in sample.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    buckets[key, int(moment / 10)].append((moment, value))
        curves = collections.defaultdict(list)
        for (key, _), points in sorted(buckets.items()):
            value = sum(value for _, value in points) / len(points)
            curves[key].append((points[-1][0], value))
        return curves

    def parts(self, looks):
        """The ranks of the newest look, with rates over the last ten seconds."""
        if len(looks) < 2:
            return []
        before_time, before = looks[max(0, len(looks) - 6)]
        now, parts = looks[-1]
        ranks = []
        for pid, part in parts.items():
            first = before.get(pid)
            if first:
                seconds = now - before_time
                rank = dict(
                    part, cpu=100 * (part["ticks"] - first["ticks"]) / TICK / seconds
                )
                for key in "read", "write":
                    total = key + "_total"
                    rank[key] = (part[total] - first[total]) / seconds
                ranks.append(rank)
        return ranks


by_hand = unittest.skipUnless(
    os.environ.get("SENTINEL_TEST_VERDICTS"),
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
        LAB = test_lab.LAB = test_lab_job.LAB = Lab()
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
        """Wait until a verdict on a job matches; how much evidence there was by then."""
        try:
            eventually(
                lambda: re.search(pattern, self.lines(job), re.M), seconds, pattern
            )
        except AssertionError as error:
            words = self.lines(job) + self.watch.error
            raise AssertionError("%s: but\n%s" % (error, words)) from None
        first = min(
            samples[0][0] for samples in self.watch.seen[job].values() or [[(0,)]]
        )
        return self.watch.told[job][-1][0] - first

    def each_says(self, jobs, seconds):
        for job, pattern in jobs.items():
            with self.subTest(pattern):
                evidence = self.says(job, pattern, seconds)
                self.assertLess(evidence, TOLD)

    def was_fine(self, job, *allowed):
        """No verdict on a job has ever been any but fine."""
        for _, verdicts in self.watch.told[job]:
            for verdict in verdicts:
                if not any(re.search(pattern, verdict.what) for pattern in allowed):
                    self.assertEqual(verdict.severity, "fine", verdict)
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
                r" has 4 CPUs +-> srun --cpu-bind=cores"
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
            "srun -n4 python3 act.py fill-rank 1 40 400", "-n4", "-N1", "--mem=250"
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
            r" peak above the highest sample, .* of 0\.146 GB; .*-> --mem=200M",
            step: r"^died \d\d:\d\d: out of memory.*Slurm says (OUT_OF_MEMORY|FAILED)",
            ranks: r"^died \d\d:\d\d: out of memory.*Slurm says (OUT_OF_MEMORY|FAILED)",
            cancelled: r"^died \d\d:\d\d: cancelled.*Slurm says CANCELLED",
            limited: r"^died \d\d:\d\d: time limit of 60 s reached: .*Slurm says TIMEOUT",
        }
        for job, pattern in deaths.items():
            with self.subTest(pattern):
                eventually(lambda job=job: job not in LAB.queue(), 150)
                self.says(job, pattern, DEATH)

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
        ]
        eventually(lambda: not set(jobs) & set(LAB.queue()), 240)
        for job in jobs:
            eventually(
                lambda job=job: self.watch.facts[job].get("state") == "COMPLETED", DEATH
            )
        for job in jobs:
            with self.subTest(job=job):
                self.was_fine(job)


if __name__ == "__main__":
    unittest.main()
