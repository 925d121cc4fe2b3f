"""Parts of real Slurm jobs of known truth, against taskset, /proc and time -v (lab.sh, lab.md).

The job has five ranks: one pinned by taskset, one with a thread pinned by sched_setaffinity, one
with 200 MB more, one that sleeps, one that writes 5 MB/s.  A second job of the same user runs on
the node.  The witness, in the job itself, starts agent.py --stdout and looks at /proc and taskset
whenever a look has come.  Three ranks on the other node run under /usr/bin/time -v.  About two
minutes.
"""

import contextlib
import json
import os
import re
import subprocess
import unittest

import support
import test_lab_job
from support import eventually

MIB = 2**20
LONG = 3 * support.PATIENCE
PORT = 13599  # of the stand-in for a master that takes parts

RANK = r"""
import os, sys, threading, time
rank = int(os.environ["SLURM_PROCID"])
end = time.monotonic() + 600
def spin():
    while time.monotonic() < end:
        pass
if rank == 0:
    os.execvp("taskset", ["taskset", "-c", "0", sys.executable, "-c",
              "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"])
if rank == 1:
    def pinned():
        os.sched_setaffinity(threading.get_native_id(), {1})
        spin()
    threading.Thread(target=pinned, daemon=True).start()
kept = b"x" * (200 << 20) if rank == 2 else b""
if rank == 4:
    begin, written, chunk = time.monotonic(), 0, b"x" * 102400
    with open("/tmp/written.%d" % os.getpid(), "wb", buffering=0) as file:
        os.unlink(file.name)
        while time.monotonic() < end:
            while written < 5e6 * (time.monotonic() - begin):
                written += file.write(chunk)
                if file.tell() > 64 << 20:
                    file.seek(0)
            time.sleep(0.02)
time.sleep(600)
"""
# Prints each look of the agent beside what is true at that moment, a line of JSON each
WITNESS = r"""
import json, os, subprocess, time

def read(pid, name):
    with open("/proc/%d/%s" % (pid, name)) as file:
        return file.read()

def number(text, name):
    return int(("\n" + text).partition("\n" + name)[2].split()[0])

def truth(pid):
    words = read(pid, "stat").rpartition(")")[2].split()
    status, io = read(pid, "status"), read(pid, "io")
    mask = subprocess.check_output(["taskset", "-p", str(pid)], universal_newlines=True)
    return {
        "ticks": int(words[11]) + int(words[12]), "time": time.monotonic(),
        "mem": 1024 * number(status, "VmRSS:"), "peak": 1024 * number(status, "VmHWM:"),
        "threads": number(status, "Threads:"), "mask": int(mask.split()[-1], 16),
        "read": number(io, "rchar:"), "write": number(io, "wchar:"),
        "state": words[0], "wchan": read(pid, "wchan"),
        "on": [int(read(pid, "task/%s/stat" % task).rpartition(")")[2].split()[36])
               for task in os.listdir("/proc/%d/task" % pid)],
    }

agent = subprocess.Popen(["python3", "agent.py", "--stdout"], stdout=subprocess.PIPE)
look = []
for line in agent.stdout:
    part = json.loads(line.decode())
    if "part" in part:
        look.append(part)
    elif look:
        continue
    if "cpu" in part and "ram" in part:
        sample = part
    if part.get("part") == "look":
        wanted = part["shown"]
        seen = {}
    if part.get("part") == "rank":
        try:
            seen[part["pid"]] = truth(part["pid"])
        except (OSError, subprocess.CalledProcessError):
            pass
        wanted -= 1
        if not wanted:
            print(json.dumps({"look": look, "truth": seen, "sample": sample}), flush=True)
            look = []
"""
JOB = """#!/bin/bash
srun --ntasks=5 --mem=0 python3 rank.py &
sleep 2
exec python3 witness.py >witness.json
"""
OTHER = """#!/bin/bash
exec python3 -c 'import time; time.sleep(600)'
"""
# Ranks under time -v: they start small, keep memory and work from .begin to .stop, and go with
# .end.  What CPU they had used before, when there was no look yet, they tell in .start.RANK.
TIMED = r"""
import os, time
rank = int(os.environ["SLURM_PROCID"])

def wait(name):
    while not os.path.exists("timed." + name):
        time.sleep(0.2)

wait("begin")
with open("timed.start.%d" % rank, "w") as file:
    print(time.process_time(), file=file)
kept = b"x" * ((60, 200, 80)[rank] << 20)
del kept
kept = b"y" * (40 << 20)
while not os.path.exists("timed.stop"):
    if rank == 0:                       # user time
        for _ in range(100000):
            pass
    elif rank == 1:                     # system time
        with open("/dev/zero", "rb", buffering=0) as file:
            for _ in range(20):
                file.read(1 << 20)
    else:
        time.sleep(0.2)
wait("end")
"""
TIMED_JOB = r"""#!/bin/bash
srun --ntasks=3 --mem=0 sh -c 'exec /usr/bin/time -v -o timed.time.$SLURM_PROCID python3 timed.py' &
exec python3 -c '
import json, subprocess, time
agent = subprocess.Popen(["python3", "agent.py", "--stdout"], stdout=subprocess.PIPE)
for line in agent.stdout:
    part = json.loads(line.decode())
    if part.get("part") == "rank":
        print(json.dumps(dict(part, time=time.monotonic())), flush=True)
' >timed.json
"""
CORES_JOB = r"""#!/bin/bash
srun --overcommit --ntasks=2 --mem=0 python3 -c '
import time
end = time.monotonic() + 600
while time.monotonic() < end:
    pass
' &
exec python3 -u agent.py --stdout >cores.$SLURM_JOB_ID.json
"""
# A master as far as it takes: says that it takes parts, keeps what comes
TAKER = r"""
import json, pickle, socket, sys, threading
def serve(sock):
    answer = b"ok parts\n"
    with sock.makefile("rb") as stream:
        while True:
            try:
                sent = pickle.load(stream)
            except EOFError:
                return
            if sent.get("ack"):
                sock.sendall(answer)
                answer = b"ok\n"
            with open("taken.json", "a") as file:
                file.write(json.dumps(sent) + "\n")
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(9)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
LAB = None


@support.slow("a Slurm cluster")
@support.requires(*test_lab_job.NEEDS)
class LabTest(unittest.TestCase):
    """A lab with jobs that run."""

    SETTINGS = {}  # of lab.sh
    SCRIPTS = {}

    @classmethod
    def setUpClass(cls):
        global LAB
        namespaces = subprocess.run(
            ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "true"]
        )
        if namespaces.returncode and os.environ.get("SENTINEL_TEST_ALL") != "1":
            raise unittest.SkipTest("missing here: the right to make namespaces")
        cls.tools = contextlib.ExitStack()
        LAB = test_lab_job.Lab()
        cls.tools.callback(LAB.down)
        try:
            LAB.up(**cls.SETTINGS)
            for name, text in cls.SCRIPTS.items():
                with open(LAB.path(name), "w") as file:
                    file.write(text)
            cls.tools.callback(LAB.no_jobs)
            cls.submit()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.tools.close()

    @classmethod
    def submit(cls):
        """Submit the jobs."""

    @staticmethod
    def pids_of(job):
        """The pids of a job's processes, as words, as its node numbers them."""
        folder = "/sys/fs/cgroup/freezer/slurm_c1/uid_4242/job_" + job
        script = "cat $(find %s -name cgroup.procs)" % folder
        return set(LAB.run("c1", "sh", "-c", script, user="root").split())


class Truth(LabTest):
    """Ranks of known truth, and another job of the same user beside them."""

    SCRIPTS = {
        "rank.py": RANK,
        "witness.py": WITNESS,
        "job.sh": JOB,
        "other.sh": OTHER,
        "taker.py": TAKER,
        "timed.py": TIMED,
        "timed.sh": TIMED_JOB,
    }

    @classmethod
    def submit(cls):
        cls.other = LAB.sbatch("-w", "c1", "--mem=100", "other.sh")
        cls.job = LAB.sbatch("-w", "c1", "--ntasks=6", "--mem=900", "job.sh")
        cls.timed = LAB.sbatch("-w", "c2", "--ntasks=4", "--mem=900", "timed.sh")

    @staticmethod
    def looks():
        """What the witness has seen, [(parts, {pid: truth}, sample)], oldest first."""
        text = LAB.text("witness.json")
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, count):
        return eventually(
            lambda: len(self.looks()) >= count and self.looks(), LONG, "looks"
        )

    @staticmethod
    def by_rank(look):
        return {part["rank"]: part for part in look["look"] if "rank" in part}

    def within_2_percent(self, value, truth, words):
        self.assertLessEqual(
            abs(value - truth), 0.02 * truth, "%s: %s, not %s" % (words, value, truth)
        )

    def test_1_ranks_are_what_taskset_and_proc_say(self):
        looks = self.wait_for(4)
        before, after = looks[2], looks[3]
        ranks = self.by_rank(after)
        self.assertEqual(set(ranks), set(range(5)))
        for rank, part in ranks.items():
            pid = str(part["pid"])
            true, earlier = after["truth"][pid], before["truth"][pid]
            with self.subTest(rank=rank):
                mask = sum(1 << cpu for cpu in numbers(part["cpus"]))
                self.assertEqual(mask, true["mask"])
                self.assertEqual(part["threads"], true["threads"])
                self.assertEqual(part["step"], "0")
                self.assertEqual(part["local_rank"], rank)
                for key in ("mem", "peak"):
                    self.within_2_percent(part[key], true[key], key)
                seconds = true["time"] - earlier["time"]
                cpu = 100 * (true["ticks"] - earlier["ticks"]) * 0.01 / seconds
                self.assertAlmostEqual(part["cpu"], cpu, delta=max(1.0, 0.02 * cpu))
                wrote = (true["write"] - earlier["write"]) / seconds
                self.assertAlmostEqual(
                    part["write"], wrote, delta=max(2000, 0.02 * wrote)
                )
                self.within_2_percent(part["read_total"], true["read"], "read_total")

    def test_2_the_odd_ones_stand_out(self):
        ranks = self.by_rank(self.wait_for(4)[3])
        self.assertEqual((ranks[0]["cpus"], ranks[0]["on"]), ("0", "0"))
        self.assertEqual(ranks[0]["state"], "R")
        self.assertIn(1, numbers(ranks[1]["on"]))
        self.assertEqual((ranks[1]["threads"], ranks[1]["running"]), (2, 1))
        self.assertGreater(ranks[2]["mem"] - ranks[3]["mem"], 195 * MIB)
        self.assertLess(ranks[2]["mem"] - ranks[3]["mem"], 220 * MIB)
        self.assertEqual((ranks[3]["state"], ranks[3]["running"]), ("S", 0))
        self.assertEqual(ranks[3]["cpu"], 0)
        self.assertIn("nanosleep", ranks[3]["wchan"])
        self.assertAlmostEqual(ranks[4]["write"], 5e6, delta=1e5)

    def test_3_no_process_of_another_job_of_the_same_user_is_shown(self):
        others = self.pids_of(self.other)
        self.assertTrue(others)
        for look in self.wait_for(4):
            self.assertFalse(shown_in(look["look"]) & others)

    def test_4_slurmstepd_and_the_agent_are_not_shown(self):
        look = self.wait_for(4)[3]
        programs = [part["program"] for part in look["look"] if part["part"] == "rank"]
        # five ranks, the witness, and srun with its helper
        self.assertEqual(sorted(programs), ["python3"] * 6 + ["srun"] * 2)
        self.assertEqual(look["look"][0]["processes"], 8)

    def test_5_the_strip_has_each_cpu_of_the_node(self):
        look = self.wait_for(4)[3]
        strips = [part["busy"] for part in look["look"] if part["part"] == "core"]
        self.assertEqual(len("".join(strips)), os.cpu_count())
        self.assertGreaterEqual(int(strips[0][0]), 9)  # where rank 0 is
        self.assertGreaterEqual(look["sample"]["cores_busy"], 1)

    def test_6_all_of_it_comes_through_srun_herd_and_relay(self):
        taker = LAB.start("login", "python3", "taker.py", PORT)
        self.addCleanup(taker.stop)
        eventually(lambda: LAB.listens("login", PORT))
        watcher = LAB.start(
            "login", "python3", "agent.py", "--jobs", self.job, "--port", PORT
        )
        self.addCleanup(watcher.stop)

        def taken():
            lines = LAB.text("taken.json").splitlines()
            return [json.loads(line) for line in lines]

        def whole_look():
            ranks = [part for part in taken() if part.get("part") == "rank"]
            looks = sorted({part["look"] for part in ranks if "cpu" in part})
            first = (
                looks[0] if len(looks) > 1 else None
            )  # whole once the next has begun
            return {
                part["rank"]: part
                for part in ranks
                if part["look"] == first and "rank" in part
            }

        ranks = eventually(whole_look, 2 * LONG)
        self.assertEqual(set(ranks), set(range(5)))
        self.assertGreater(ranks[2]["mem"] - ranks[3]["mem"], 195 * MIB)
        self.assertFalse(shown_in(taken()) & self.pids_of(self.other))
        words = LAB.run("c1", "pgrep", "-f", "--", "--lifeline", user="root").split()
        self.assertTrue(words)
        # the agent in the job does not take that step for one of the ranks either
        count = len(self.looks())
        late = self.wait_for(count + 2)[count + 1]
        self.assertFalse(shown_in(late["look"]) & set(words))

    def test_7_hidepid_hides_others_and_not_the_job(self):
        LAB.run("c1", "mount", "-o", "remount,hidepid=2", "/proc", user="root")
        self.addCleanup(
            LAB.run, "c1", "mount", "-o", "remount,hidepid=0", "/proc", user="root"
        )
        hidden = LAB.run("c1", "sh", "-c", "test ! -e /proc/1/stat && echo hidden")
        self.assertEqual(hidden, "hidden")
        count = len(self.looks())
        look = self.wait_for(count + 2)[count + 1]
        ranks = self.by_rank(look)
        self.assertEqual(set(ranks), set(range(5)))
        self.assertEqual(ranks[0]["cpus"], "0")
        self.assertIn("write_total", ranks[4])

    @support.requires("/usr/bin/time")
    def test_8_time_v_says_the_same_of_peak_and_cpu(self):
        def tell(word):
            with open(LAB.path("timed." + word), "w"):
                pass

        compare_with_time_v(self, LAB.text, tell, LONG)


@support.requires("/sys/fs/cgroup/cpuset/cpuset.cpus")
class Cores(LabTest):
    """Two jobs on a node of two CPUs, each bound to one of them by a cpuset (ConstrainCores)."""

    SETTINGS = {"LAB_CORES": "1", "LAB_CPUS": "2"}
    SCRIPTS = {"cores.sh": CORES_JOB}

    @classmethod
    def submit(cls):
        cls.jobs = [LAB.sbatch("-w", "c1", "-n1", "cores.sh") for _ in range(2)]

    @staticmethod
    def parts(job):
        """What the agent in a job has printed since its third look began."""
        lines = LAB.text("cores.%s.json" % job).splitlines(True)
        parts = [json.loads(line) for line in lines if line.endswith("\n")]
        begins = [n for n, part in enumerate(parts) if part.get("part") == "look"]
        return parts[begins[2] :]

    def test_a_jobs_cpus_are_those_of_its_cpuset_and_no_others_count(self):
        found = set()
        for job in self.jobs:
            with self.subTest(job=job):
                kernel = eventually(
                    lambda job=job: LAB.read("cpuset", job, "cpuset.cpus").strip(),
                    LONG,
                    "the cpuset of the job",
                )
                self.assertRegex(kernel, r"\A[01]\Z")
                found.add(kernel)

                def sample(job=job):
                    return [x for x in self.parts(job) if "cores_busy" in x][-1]

                sample = eventually(sample, 2 * LONG, "a sample after the third look")
                self.assertEqual((sample["cores_busy"], sample["job_cpus"]), (1, 1))
                parts = self.parts(job)
                self.assertEqual(parts[0]["cpus"], kernel)
                ranks = [part for part in parts if part.get("rank") is not None]
                self.assertEqual({part["rank"] for part in ranks}, {0, 1})
                for part in ranks:
                    self.assertEqual((part["cpus"], part["on"]), (kernel, kernel))
                    told = LAB.run("c1", "taskset", "-c", "-p", part["pid"])
                    self.assertEqual(told.split()[-1], kernel)
                self.assertLessEqual(shown_in(parts), self.pids_of(job))
                # both CPUs of the node are busy
                strip = [x["busy"] for x in parts if x.get("part") == "core"][0]
                self.assertRegex(strip, r"\A[5-9]{2}")
        self.assertEqual(found, {"0", "1"})


def compare_with_time_v(case, text_of, tell, seconds):
    """Let the ranks of TIMED_JOB work for three looks, and compare these with time -v.

    text_of(name) is what a file of theirs holds, tell(word) makes timed.WORD for them.
    """

    def looks():
        """{rank: its parts, the oldest first}."""
        found = {rank: [] for rank in range(3)}
        for line in text_of("timed.json").splitlines():
            part = json.loads(line) if line.endswith("}") else {}
            if part.get("program") == "python3" and "rank" in part:
                found[part["rank"]].append(part)
        return found

    def look(is_busy, count):
        """Wait until there are so many looks, and the last of them finds rank 0 busy, or not."""

        def found():
            parts = looks()[0]
            cpu = parts[-1]["cpu"]  # the first look has none
            return len(parts) >= count and (cpu > 5) == is_busy and len(parts)

        return eventually(found, seconds, "look %d" % count)

    def time_v(rank):
        told = text_of("timed.time.%d" % rank)
        return "Exit status: 0" in told and told

    count = look(False, 2)
    tell("begin")
    count = look(True, count + 3)
    tell("stop")
    look(False, count + 2)  # the one that has seen nothing of the work
    seen = looks()
    tell("end")
    worked = []
    for rank, parts in sorted(seen.items()):
        told = eventually(lambda rank=rank: time_v(rank), seconds, "time -v")
        true = dict(re.findall(r"(?m)^\s*(\w[\w ]+)(?: \(\w+\))?: ([\d.]+)$", told))
        spent = float(true["User time"]) + float(true["System time"])
        spent -= float(text_of("timed.start.%d" % rank))
        cpu = sum(
            part["cpu"] / 100 * (part["time"] - before["time"])
            for before, part in zip(parts, parts[1:])
        )
        peak = parts[-1]["peak"]
        resident = 1024 * int(true["Maximum resident set size"])
        with case.subTest(rank=rank, cpu=cpu, spent=spent, peak=peak, true=resident):
            case.assertAlmostEqual(peak, resident, delta=0.02 * resident)
            case.assertAlmostEqual(cpu, spent, delta=max(0.1, 0.02 * spent))
        worked.append(spent)
    case.assertGreater(min(worked[:2]), 2 * worked[2])  # which sleeps


def shown_in(parts):
    """The pids, as words, of the processes in parts."""
    return {str(part["pid"]) for part in parts if part.get("part") == "rank"}


def numbers(text):
    """The numbers of 0-3,8."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


if __name__ == "__main__":
    unittest.main()
