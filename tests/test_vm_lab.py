"""On a current Slurm: 24.11 with cgroup v2, systemd and logind, in one virtual machine.

What a user does is done over ssh as `tester`; what must not open a session of that user is
done by root (vm-lab.sh, vm-lab.md). Some minutes: the processor is emulated, and its speed is
the machine's. So it is run by hand, with SENTINEL_TEST_VM=1, and not by .ci/run. The disk is
built once, by `tests/vm-lab.sh build`, or here.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import unittest

import support
from support import PATIENCE, eventually
from test_lab_parts import (
    RANK,
    TIMED,
    TIMED_JOB,
    WITNESS,
    compare_with_time_v,
    numbers,
    shown_in,
)
from test_lab_verdicts import ACT

import master_server

NEEDS = ("qemu-system-x86_64", "ssh", "/usr/bin/time")
SCRIPT = os.path.join(support.ROOT, "tests", "vm-lab.sh")
# On an emulated processor, beside others, srun may take a minute to bring a step into a job that
# works, and a look at ranks is dear: the herd waits longer for the first, and agents look as often
# as they would where it is not.
PATIENT = {"ATTACH_SECONDS": 120, "RETRY_SECONDS": 30, "QUESTION_SECONDS": 60}
AGENT = support.with_constants("agent.py", PART_SHARE=1, **PATIENT)
# Judging a job takes a tenth of a second there: every two minutes would be all of its share.
MASTER = support.with_constants("master_server.py", DIAGNOSE_SHARE=100)
TOOLS = (AGENT, MASTER, "test_reader.py", "run_agent.slurm")
BUILD_SECONDS = 1200  # a busy machine needs so long; an idle one 65
CALL_SECONDS = 120
ASKED_FOR = os.environ.get("SENTINEL_TEST_VM") == "1"
TOLD = (
    90  # seconds of evidence within which a problem is told, by the program's own clock
)
LONG = 6 * PATIENCE  # the processor is emulated, and the machine below may be busy
ATTACH = 60 + LONG  # a job is looked for every half minute, and left alone while young
MIB = 2**20
TESTER = 1500
SHM = "/dev/shm/sentinel_13579"

# The work of a job: keep some memory, burn one CPU, and say what the kernel counts.
WORK = """
import os, re
with open("/proc/self/cgroup") as file:
    path = re.match(r"0::(.*/job_\\d+)/", file.read()).group(1)
kept = bytearray(os.urandom(1 << 20) * 100)
with open("/sys/fs/cgroup%s/memory.stat" % path) as file:
    counted = dict(line.split() for line in file)
print("kernel", int(counted["anon"]) + int(counted["shmem"]), flush=True)
while not os.path.exists("enough"):
    for _ in range(100000):
        pass
"""

# As root: prints for how long a file has been gone, once it is there again.  Where the processor is
# emulated a reader takes seconds to start, and so says too little of when that was.
GONE = """
import os, sys, time

def inode():
    try:
        return os.stat(sys.argv[1]).st_ino
    except FileNotFoundError:
        return None

old = inode()
print("ready", flush=True)
seen = start = time.monotonic()
while inode() in (old, None):
    if inode() == old:
        seen = time.monotonic()
    if time.monotonic() - start > 600:
        sys.exit("gone for %.1f s" % (time.monotonic() - seen))
    time.sleep(0.02)
print("gone for", time.monotonic() - seen, flush=True)
"""

# A job that knows nothing of us: one rank keeps memory and burns a CPU, the other one sleeps.  It
# begins to burn when a step of ours is in it: on an emulated machine that takes too long beside it.
KNOWS_NOTHING = """#!/bin/bash
srun --ntasks=2 --mem=0 python3 -c '
import os, time
if os.environ["SLURM_PROCID"] == "1":
    time.sleep(3600)
while not os.path.exists("go"):
    time.sleep(0.2)
kept = bytearray(os.urandom(1 << 20) * 100)
while True:
    pass
'
"""

# Ranks of known truth (test_lab_parts.py), and another job of the same user beside them.  Here a
# process more costs much: what taskset says is asked from outside.
SHOWN_WITNESS = WITNESS.replace(
    'subprocess.check_output(["taskset", "-p", str(pid)], universal_newlines=True)',
    '"%x" % sum(1 << cpu for cpu in os.sched_getaffinity(pid))',
)
TRUE_RANKS = """#!/bin/bash
until [ -e go ]; do sleep 0.2; done
srun --overcommit --ntasks=5 --mem=0 python3 rank.py &
sleep 5
exec python3 witness.py >witness.json
"""
# Its disk has no time(1)
VM_TIMED_JOB = TIMED_JOB.replace("/usr/bin/time", "./time")
OTHER = """#!/bin/bash
exec python3 -c 'import time; time.sleep(3600)'
"""

# Takes more than there is, once it is told to; as a rank of a step, the last one alone.
HOG = """
import os, time
while not os.path.exists("hog"):
    time.sleep(0.1)
if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and os.environ["SLURM_PROCID"] == "0":
    time.sleep(3600)
kept = []
while True:
    kept.append(b"x" * (1 << 20))
"""
# The batch step goes on without its hog; the job of the other ends with the rank that was killed.
HOG_IN_BATCH = """#!/bin/bash
python3 hog.py
echo code $?
until [ -e enough ]; do sleep 0.2; done
"""
HOG_IN_STEP = """#!/bin/bash
exec srun --ntasks=2 --mem=0 --kill-on-bad-exit python3 hog.py
"""

# Sick once it is told to be: all of it on one CPU, or a fault; else it sleeps.
SICK = """
import os, signal, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.2)
if sys.argv[1] == "fault":
    os.kill(os.getpid(), signal.SIGSEGV)
while True:
    pass
"""
SICK_JOB = """#!/bin/bash
exec $BEFORE python3 sick.py $1
"""

# As root: ends a process, and prints after how many seconds nothing of us is left: no slurmstepd of
# our step, and no process of tester's but those that had been there before.  It asks /proc, and
# starts nothing meanwhile, which here may take seconds.
LEAVE = """
import os, signal, subprocess, sys, time

def read(pid, name):
    with open("/proc/%s/%s" % (pid, name)) as file:
        return file.read()

def is_ours(pid):
    try:
        name = read(pid, "comm")
        if name.startswith("slurmstepd"):
            return any("[%s]" % step in read(pid, "cmdline") for step in steps)
        is_testers = os.stat("/proc/" + pid).st_uid == 1500
    except OSError:
        return False
    return is_testers and name.startswith(("python3", "srun")) and pid not in before

def left():
    return {pid for pid in os.listdir("/proc") if pid.isdigit() and is_ours(pid)}

number, pid, before = int(sys.argv[1]), int(sys.argv[2]), set(sys.argv[3:])
told = subprocess.check_output(["squeue", "-s", "-h", "-o", "%i %j"], universal_newlines=True)
steps = [line.split()[0] for line in told.splitlines() if line.endswith(" sentinel")]
if not any(read(found, "comm").startswith("slurmstepd") for found in left()):
    sys.exit("no slurmstepd of a step of ours")
os.kill(pid, number)
start = time.monotonic()
while left():
    if time.monotonic() - start > 60:
        sys.exit("left after a minute: %s" % " ".join(left()))
    time.sleep(0.1)
print(time.monotonic() - start)
"""

# As root: another node, vm2, by a second slurmd in this machine: a network of its own behind a
# cable that can be cut, and a host name of its own.  Slurm's programs may then call each other
# by the addresses of that cable alone.
SECOND_NODE = """
set -e
cp /etc/slurm/slurm.conf /etc/hosts /run
ip netns add vm2
ip link add cable type veth peer name far netns vm2
ip addr add 10.9.0.1/24 dev cable
ip link set cable up
ip -n vm2 addr add 10.9.0.2/24 dev far
ip -n vm2 link set far up
ip -n vm2 link set lo up
printf '127.0.0.1 localhost\\n10.9.0.1 vm\\n10.9.0.2 vm2\\n' >/etc/hosts
sed -i 's/^NodeName=vm .*/NodeName=vm CPUs=4 RealMemory=2200\\nNodeName=vm2 CPUs=4 RealMemory=800/
s#^SlurmdSpoolDir=.*#SlurmdSpoolDir=/var/spool/slurmd-%n\\nSlurmdPidFile=/run/slurmd-%n.pid#
s#^SlurmdLogFile=.*#SlurmdLogFile=/var/log/slurm/slurmd-%n.log#' /etc/slurm/slurm.conf
mkdir -p /var/spool/slurmd-vm /var/spool/slurmd-vm2
systemctl restart slurmctld slurmd
systemd-run --unit=slurmd-vm2 -p Delegate=yes -p KillMode=process nsenter --net=/run/netns/vm2 \
    unshare --uts sh -c 'hostname vm2; exec slurmd -D -N vm2'
"""
ONE_NODE = """
systemctl stop slurmd-vm2
mv /run/slurm.conf /etc/slurm/slurm.conf
mv /run/hosts /etc/hosts
ip link del cable
ip netns del vm2
systemctl restart slurmctld slurmd
"""
SMALL_TMP = "mount -t tmpfs -o size=1m,mode=1777 none /tmp"

SCRIPTS = {  # in tester's home
    "act.py": ACT,
    "work.py": WORK,
    "rank.py": RANK,
    "witness.py": SHOWN_WITNESS,
    "timed.py": TIMED,
    "timed.sh": VM_TIMED_JOB,
    "hog.py": HOG,
    "sick.py": SICK,
    "sick.sh": SICK_JOB,
    "knows_nothing.sh": KNOWS_NOTHING,
    "true_ranks.sh": TRUE_RANKS,
    "other.sh": OTHER,
    "hog_in_batch.sh": HOG_IN_BATCH,
    "hog_in_step.sh": HOG_IN_STEP,
}


class Machine:
    """The virtual machine, from outside."""

    def __init__(self):
        self.run_dir = tempfile.mkdtemp(prefix="sentinel-vm-")
        self.env = dict(
            os.environ,
            VM_LAB_RUN=self.run_dir,
            VM_LAB_PORT=str(support.closed_port()),
            PATH=os.environ["PATH"] + ":/usr/sbin:/sbin",
        )

    def call(self, *words, seconds=CALL_SECONDS, stdin="", folder=support.ROOT):
        return subprocess.run(
            [SCRIPT, *words],
            env=self.env,
            cwd=folder,
            timeout=seconds,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )

    def must(self, *words, **more):
        """Call vm-lab.sh; its output, or an error if it failed."""
        done = self.call(*words, **more)
        if done.returncode:
            raise AssertionError(
                "%s: %d\n%s%s"
                % (" ".join(words), done.returncode, done.stdout, done.stderr)
            )
        return done.stdout.strip()

    def up(self):
        self.must("up", seconds=BUILD_SECONDS)
        self.put("tester", *TOOLS, "/usr/bin/time", **SCRIPTS)
        self.put(
            "root",
            "agent.py",
            "tests/load.py",
            **{
                "leave.py": LEAVE,
                "gone.py": GONE,
                "second_node.sh": SECOND_NODE,
                "one_node.sh": ONE_NODE,
            },
        )

    def put(self, user, *tools, **scripts):
        """Copy tools, and scripts by their names, into a home, over one connection."""
        with tempfile.TemporaryDirectory(dir=self.run_dir) as folder:
            for tool in tools:
                shutil.copy(os.path.join(support.ROOT, tool), folder)
            for name, script in scripts.items():
                with open(os.path.join(folder, name), "w") as file:
                    file.write(script)
            self.must("put", user, *os.listdir(folder), folder=folder)

    def down(self):
        self.must("down")
        shutil.rmtree(self.run_dir)

    def run(self, command, user="tester", **more):
        """Run a line of shell; its output."""
        return self.must("run", user, command, **more)

    def start(self, command, user="tester"):
        """A Tool that runs there until it is stopped: its session ends with it."""
        # ssh ends no command that has no terminal; a closed stdin is a sign that this sees
        line = "(%s) & cat >/dev/null; kill $!; wait" % command
        words = [SCRIPT, "run", user, "bash -c " + shlex.quote(line)]
        return support.Tool(words, self.env, stdin=subprocess.PIPE)

    def master_pid(self):
        """The pid of tester's master, which has started itself once more with -c."""
        return self.run(
            "pgrep -o -u tester -f '^[^ ]*python3 .*master_server.py'", user="root"
        )

    def sbatch(self, *words):
        """Submit a job; its id."""
        line = " ".join(shlex.quote(word) for word in ("sbatch", "--parsable", *words))
        return self.run(line)

    def page(self, path):
        """What the dashboard answers; no session of tester's is opened for it."""
        return self.run("curl -s -m 10 localhost:8080%s" % path, user="root")

    def nodes(self):
        return json.loads(self.page("/api/nodes"))["nodes"]

    def look(self, job):
        """The one node of a job with its look, cores and ranks; LookupError before the first."""
        node = json.loads(self.page("/api/job/" + job))["job"]["nodes"][0]
        if not node["ranks"]:
            raise LookupError("no look at job %s yet" % job)
        return node

    def kernel(self, job, *names):
        """The text of files of a job's cgroup, one after another."""
        folder = "/sys/fs/cgroup/system.slice/vm_slurmstepd.scope/job_%s/" % job
        return self.run("cat " + " ".join(folder + name for name in names), user="root")

    def job_pids(self, job):
        """The pids of a job's processes, as words."""
        folder = "/sys/fs/cgroup/system.slice/vm_slurmstepd.scope/job_" + job
        return set(
            self.run(
                "find %s -name cgroup.procs -exec cat {} +" % folder, user="root"
            ).split()
        )

    def state(self, job):
        """What Slurm says of a job, ended or not."""
        told = self.run("scontrol -o show job " + job, user="root")
        return re.search(r"JobState=(\S+)", told).group(1)

    def no_jobs(self):
        self.run("scancel --user=tester", user="root")
        eventually(lambda: not self.run("squeue -h", user="root"), LONG, "no job")


def by_rank(parts):
    """{rank: part} of the processes that are ranks."""
    return {part["rank"]: part for part in parts if part.get("rank") is not None}


VM = None  # up from the first test that needs it to the end of this module


def tearDownModule():
    if VM:
        VM.down()


@unittest.skipUnless(ASKED_FOR, "a virtual machine: SENTINEL_TEST_VM=1 runs it")
@support.requires(*NEEDS)
class VmTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        global VM
        if VM is None:
            folder = os.environ.get("VM_LAB_DIR", "/var/tmp/vm-lab")
            disk = os.path.join(folder, "disk.img")
            if not os.path.exists(disk) and not ASKED_FOR:
                raise unittest.SkipTest(
                    "missing here: %s (tests/vm-lab.sh build makes it)" % disk
                )
            machine = Machine()
            try:
                machine.up()
            except BaseException:
                machine.down()
                raise
            VM = machine

    def start(self, command, **more):
        tool = VM.start(command, **more)
        self.addCleanup(self.end, tool)
        return tool

    @staticmethod
    def end(tool):
        """Close its stdin, upon which all of it ends inside of the machine, too."""
        if tool.code is None:
            with contextlib.suppress(OSError):
                tool.process.stdin.close()
            with contextlib.suppress(AssertionError):
                tool.wait(PATIENCE)
        tool.stop()

    def start_master(self, *flags):
        master = self.start("exec python3 master_server.py " + " ".join(flags))
        master.listening("dashboard", LONG)
        return master

    def row(self, wanted, seconds=LONG, **fields):
        """Wait for the row of a job that has all of these fields; the row."""

        def find():
            for row in VM.nodes():
                if row["job"] == wanted and all(row[key] for key in fields or ("job",)):
                    return row
            return None

        return eventually(find, seconds, "job %s" % wanted)

    def explained(self, job, words):
        """What --explain tells of a job that has died of that."""
        explain = (
            "python3 master_server.py --record records --explain %s; echo code $?" % job
        )

        def told():
            text = VM.run("cd /home/tester; " + explain, user="root")
            self.assertIn("code 3", text)
            self.assertRegex(text, words)
            return text

        return eventually(told, ATTACH, "the record of job %s" % job)


class Jobs(VmTest):
    def test_the_agents_job_figures_are_those_of_the_kernel(self):
        self.addCleanup(VM.no_jobs)
        self.start_master()
        VM.run("rm -f enough")
        alone = VM.sbatch("--mem=500", "--cpus-per-task=2", "run_agent.slurm")
        wrapped = VM.sbatch(
            "--mem=400",
            "--cpus-per-task=2",
            "--job-name=work",
            "--time=60",
            "--output=work.log",
            "--wrap",
            "exec python3 agent.py --host vm --name work -- python3 work.py",
        )
        row = self.row(alone, job_cpu=True)
        self.assertEqual(
            (row["job_name"], row["job_cpus"], row["job_mem_limit"]),
            ("sentinel", 2, 500 * MIB),
        )
        self.assertGreater(row["job_mem"], MIB)
        self.assertLess(row["job_mem"], 100 * MIB)

        def counted():
            return re.search(r"kernel (\d+)", VM.run("cat work.log", user="tester"))

        kernel = int(eventually(counted, LONG, "work.log").group(1))
        row = eventually(
            lambda: next(
                row
                for row in VM.nodes()
                if row["job"] == wrapped and (row["job_mem"] or 0) > 100 * MIB
            ),
            LONG,
            "the memory of the job",
        )
        self.assertEqual(
            (row["job_name"], row["job_cpus"], row["job_mem_limit"]),
            ("work", 2, 400 * MIB),
        )
        self.assertAlmostEqual(row["job_mem"], kernel, delta=16 * MIB)
        self.assertAlmostEqual(
            row["job_ram"], 100 * row["job_mem"] / (400 * MIB), delta=1
        )
        self.assertGreater(row["job_time_left"], 3000)
        self.assertLess(row["job_time_left"], 3601)
        eventually(
            lambda: any(
                row["job"] == wrapped and 35 < row["job_cpu"] < 65 for row in VM.nodes()
            ),
            LONG,
            "one of two CPUs is busy",
        )
        VM.run("touch enough")
        report = eventually(
            lambda: re.search(r"memory peak.*", VM.run("cat work.log")), LONG
        )
        self.assertIn("of 0.39", report.group())


class MyJobs(VmTest):
    """A job that knows nothing of us, watched by --my-jobs."""

    def setUp(self):
        self.addCleanup(VM.no_jobs)

    @staticmethod
    def own_processes():
        words = VM.run("pgrep -u tester 'python3|srun' || true", user="root").split()
        return set(words)

    def begin(self):
        """Submit the job and wait for its ranks; its id."""
        VM.run("rm -f /home/tester/go", user="root")
        job = VM.sbatch(
            "--ntasks=2", "--mem=400", "--time=60", "-Jknown", "knows_nothing.sh"
        )
        eventually(lambda: len(self.own_processes()) >= 4, LONG, "srun and two ranks")
        return job

    def attached(self, job):
        """Wait until an agent is in the job, and let the job work; the job's row."""
        row = self.row(job, ATTACH, job_mem_limit=True)
        VM.run("touch /home/tester/go", user="root")
        return row

    def leaves_nothing(self, job, number, before):
        """End the master by that signal: no step and no process is left, and the job runs on."""
        steps = VM.run("squeue -s -h -o %j", user="root").split()
        self.assertIn("sentinel", steps)
        master = VM.master_pid()
        self.assertGreater(len(self.own_processes() - before), 3)
        words = " ".join(["python3 leave.py", str(number), master, *before])
        seconds = float(VM.run(words, user="root"))
        self.assertLess(seconds, 10)
        self.assertEqual(self.own_processes(), before)
        eventually(
            lambda: "sentinel" not in VM.run("squeue -s -h -o %j", user="root"),
            LONG,
            "Slurm has no step of ours",
        )
        self.assertEqual(VM.state(job), "RUNNING")

    def test_it_is_seen_as_the_kernel_and_slurm_have_it_and_nothing_is_left(self):
        job = self.begin()
        before = self.own_processes()
        self.start_master("--my-jobs")
        row = self.attached(job)
        self.assertEqual(
            (row["job_name"], row["job_cpus"], row["job_mem_limit"]),
            ("known", 2, 400 * MIB),
        )
        self.assertEqual((row["job_time_limit"], row["oom_kill"]), (3600, 0))
        clock = VM.run("squeue -h -j %s -o %%L" % job, user="root")
        minutes, seconds = clock.split(":")[-2:]
        left = 60 * int(minutes) + int(seconds)
        self.assertLess(abs(self.row(job)["job_time_left"] - left), 15)

        def memory_agrees():
            told = VM.kernel(job, "memory.stat", "memory.peak")
            counted = dict(re.findall(r"(?m)^(anon|shmem) (\d+)$", told))
            used = int(counted["anon"]) + int(counted["shmem"])
            row = self.row(job)
            self.assertAlmostEqual(row["job_mem"], used, delta=0.02 * used)
            self.assertAlmostEqual(
                row["job_ram"], 100 * row["job_mem"] / (400 * MIB), delta=0.1
            )
            self.assertEqual(row["job_mem_peak"], int(told.split()[-1]))
            return row["job_mem"] > 100 * MIB

        eventually(memory_agrees, LONG, "the page and the kernel agree on memory")
        self.assertTrue(self.cpu_agrees(job))

        look = eventually(lambda: VM.look(job), ATTACH, "a look")
        ranks = by_rank(look["ranks"])
        self.assertEqual(set(ranks), {0, 1})
        self.assertEqual({rank["step"] for rank in ranks.values()}, {"0"})
        self.assertGreater(ranks[0]["mem"], 100 * MIB)
        busy = eventually(
            lambda: [
                rank["cpu"]
                for rank in VM.look(job)["ranks"]
                if rank.get("rank") == 0 and rank["cpu"] > 50
            ],
            LONG,
            "the rank that burns a CPU",
        )
        self.assertLess(busy[0], 102)
        self.assertEqual(
            set(numbers(look["look"]["cpus"])),
            set(numbers(VM.kernel(job, "cpuset.cpus.effective"))),
        )
        strip = "".join(part["busy"] for part in look["cores"])
        self.assertRegex(strip, r"\A[0-9]{4}\Z")
        self.assertIn(strip[int(ranks[0]["on"])], "89")
        self.leaves_nothing(job, 15, before)

    def test_nothing_is_left_of_a_master_that_is_killed(self):
        job = self.begin()
        before = self.own_processes()
        self.start_master("--my-jobs")
        self.attached(job)
        self.leaves_nothing(job, 9, before)

    def cpu_agrees(self, job):
        """What the page tells for some time is what the kernel counts, within 2 %."""

        def counted():
            told = VM.run(
                "cat /proc/uptime /sys/fs/cgroup/system.slice/vm_slurmstepd.scope"
                "/job_%s/cpu.stat; curl -s localhost:8080/api/nodes" % job,
                user="root",
            )
            now = float(told.split()[0])
            used = int(re.search(r"usage_usec (\d+)", told).group(1)) / 1e6
            for row in json.loads(told[told.index("{") :])["nodes"]:
                if row["job"] == job:
                    return now, used, row
            raise LookupError(job)

        def ratio():
            begin, before, _ = counted()
            last = begin
            told = 0.0
            while last - begin < 20:
                now, used, row = counted()
                told += 2 * (now - last) * row["job_cpu"] / 100  # of two CPUs
                last = now
            return told / (used - before)

        ratios = []
        while not any(abs(known - 1) < 0.02 for known in ratios):
            self.assertLess(len(ratios), 4, ratios)
            ratios.append(ratio())
        return ratios


class Ranks(VmTest):
    """Ranks of known truth, as the job's own agent and --my-jobs see them."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.addClassCleanup(VM.no_jobs)
        VM.run("cd /home/tester && rm -f go witness.json", user="root")
        # the first one gets the CPUs 0 to 2: its ranks pin themselves to 0 and 1
        cls.job = VM.sbatch("--ntasks=3", "--mem=900", "-Jranks", "true_ranks.sh")
        cls.other = VM.sbatch("--ntasks=1", "--mem=100", "-Jother", "other.sh")
        cls.master = VM.start("exec python3 master_server.py --my-jobs")
        cls.addClassCleanup(cls.end, cls.master)
        cls.master.listening("dashboard", LONG)
        # an emulated node whose ranks burn all of it takes minutes to start a step
        with contextlib.suppress(AssertionError):  # the last test tells
            eventually(lambda: VM.look(cls.job) and VM.look(cls.other), ATTACH)
        VM.run("touch /home/tester/go", user="root")

    @staticmethod
    def looks():
        """What the witness has seen, [{look, truth, sample}], the oldest first."""
        text = VM.run("cat /home/tester/witness.json", user="root")
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for(self, count):
        return eventually(
            lambda: len(self.looks()) >= count and self.looks(), ATTACH, "looks"
        )

    def within_2_percent(self, value, truth, words, least=0):
        self.assertLessEqual(
            abs(value - truth),
            max(least, 0.02 * truth),
            "%s: %s, not %s" % (words, value, truth),
        )

    def test_1_they_are_what_taskset_and_proc_say(self):
        looks = self.wait_for(5)
        before, after = looks[3], looks[4]
        ranks = by_rank(after["look"])
        self.assertEqual(set(ranks), set(range(5)))
        steps = VM.run("squeue -s -h -j %s -o '%%i %%j'" % self.job, user="root")
        step = re.search(r"(?m)^\d+\.(\d+) python3$", steps).group(1)
        pids = " ".join(str(part["pid"]) for part in ranks.values())
        told = VM.run("for pid in %s; do taskset -p $pid; done" % pids, user="root")
        masks = {
            pid: int(mask, 16)
            for pid, mask in re.findall(r"pid (\d+)\D.*mask: ([0-9a-f]+)", told)
        }
        for rank, part in ranks.items():
            true = after["truth"][str(part["pid"])]
            earlier = before["truth"][str(part["pid"])]
            with self.subTest(rank=rank):
                mask = sum(1 << cpu for cpu in numbers(part["cpus"]))
                self.assertEqual(mask, masks[str(part["pid"])])
                self.assertEqual(part["threads"], true["threads"])
                self.assertEqual((part["step"], part["local_rank"]), (step, rank))
                for key in ("mem", "peak"):
                    self.within_2_percent(part[key], true[key], key)
                seconds = true["time"] - earlier["time"]
                cpu = 100 * (true["ticks"] - earlier["ticks"]) * 0.01 / seconds
                self.within_2_percent(part["cpu"], cpu, "cpu", 1.0)
                wrote = (true["write"] - earlier["write"]) / seconds
                self.within_2_percent(part["write"], wrote, "write", 2000)
                self.within_2_percent(part["read_total"], true["read"], "read_total")

    def test_2_the_odd_ones_stand_out(self):
        ranks = by_rank(self.wait_for(5)[4]["look"])
        self.assertEqual((ranks[0]["cpus"], ranks[0]["on"]), ("0", "0"))
        self.assertEqual(ranks[0]["state"], "R")
        self.assertIn(1, numbers(ranks[1]["on"]))
        self.assertEqual((ranks[1]["threads"], ranks[1]["running"]), (2, 1))
        self.assertAlmostEqual(
            ranks[2]["mem"] - ranks[3]["mem"], 200 * MIB, delta=5 * MIB
        )
        self.assertEqual((ranks[3]["state"], ranks[3]["running"]), ("S", 0))
        self.assertEqual(ranks[3]["cpu"], 0)
        self.assertIn("nanosleep", ranks[3]["wchan"])
        self.within_2_percent(ranks[4]["write"], 5e6, "write")

    def test_3_no_process_of_another_job_of_the_same_user_nor_of_slurm_is_shown(self):
        others = VM.job_pids(self.other)
        self.assertGreaterEqual(len(others), 2)
        looks = self.wait_for(5)
        for look in looks:
            self.assertFalse(shown_in(look["look"]) & others)
        parts = looks[4]["look"]
        programs = [part["program"] for part in parts if part["part"] == "rank"]
        # five ranks, the witness, and srun with its helper
        self.assertEqual(sorted(programs), ["python3"] * 6 + ["srun"] * 2)
        self.assertEqual(parts[0]["processes"], 8)

    def test_4_my_jobs_sees_the_same_ranks_and_each_job_its_own(self):
        def whole_look():
            node = VM.look(self.job)
            return set(by_rank(node["ranks"])) == set(range(5)) and node

        node = eventually(whole_look, 2 * ATTACH, "a look at the ranks")
        ranks = by_rank(node["ranks"])
        true = by_rank(self.wait_for(5)[4]["look"])
        for rank, part in ranks.items():
            with self.subTest(rank=rank):
                self.assertEqual(part["pid"], true[rank]["pid"])
                self.assertEqual(part["cpus"], true[rank]["cpus"])
                self.within_2_percent(part["mem"], true[rank]["mem"], "mem")
        others = VM.job_pids(self.other)
        shown = {str(part["pid"]) for part in node["ranks"]}
        self.assertFalse(shown & others)
        beside = VM.look(self.other)
        beside_pids = {str(part["pid"]) for part in beside["ranks"]}
        self.assertTrue(beside_pids)
        self.assertLessEqual(beside_pids, others)


class TimeV(VmTest):
    """The peak and the CPU of ranks that run under time -v."""

    def test_time_v_says_the_same_of_peak_and_cpu(self):
        self.addCleanup(VM.no_jobs)
        VM.sbatch("--ntasks=4", "--mem=900", "timed.sh")

        def text_of(name):
            return VM.run("cat /home/tester/" + name, user="root")

        def tell(word):
            VM.run("touch /home/tester/timed." + word, user="root")

        compare_with_time_v(self, text_of, tell, ATTACH)


class OutOfMemory(VmTest):
    """The kernel kills for want of memory: in the batch step, and a rank of a step."""

    def setUp(self):
        self.addCleanup(VM.no_jobs)
        VM.run("cd /home/tester && rm -rf hog enough records", user="root")

    def watched(self, script, *words):
        """A job with 200 MiB, and a master that watches and records it; its id."""
        job = VM.sbatch("--mem=200", "--time=60", "--output=hog.log", *words, script)
        self.start_master("--my-jobs", "--record", "records")
        row = self.row(job, ATTACH, job_mem_limit=True)
        self.assertEqual((row["oom_kill"], row["job_mem_limit"]), (0, 200 * MIB))
        return job

    def killed(self, job):
        """How many of a job's processes the kernel says in its log that it has killed."""
        log = VM.run("journalctl -k -o cat | grep ^oom-kill: || true", user="root")
        return len(re.findall(r"oom_memcg=\S*/job_%s\b" % job, log))

    def test_in_the_batch_step_whose_script_goes_on(self):
        job = self.watched("hog_in_batch.sh")
        VM.run("touch /home/tester/hog", user="root")
        row = self.row(job, LONG, oom_kill=True)
        self.assertIn("code 137", VM.run("cat /home/tester/hog.log", user="root"))
        self.assertEqual(row["oom_kill"], 1)
        events = VM.kernel(job, "memory.events")
        self.assertEqual(re.search(r"oom_kill (\d+)", events).group(1), "1")
        self.assertEqual(self.killed(job), 1)
        eventually(
            lambda: self.row(job)["job_mem_peak"] == int(VM.kernel(job, "memory.peak")),
            LONG,
            "the kernel's peak",
        )
        VM.run("touch /home/tester/enough", user="root")
        text = self.explained(job, "out of memory")
        self.assertRegex(text, r"out of memory: the kernel killed 1 process on vm\b")
        self.assertEqual(VM.state(job), "OUT_OF_MEMORY")

    def test_a_rank_of_a_step_with_which_the_job_ends(self):
        job = self.watched("hog_in_step.sh", "--ntasks=2")
        VM.run("touch /home/tester/hog", user="root")
        # of memory Slurm says nothing: FAILED, NonZeroExitCode
        eventually(lambda: VM.state(job) == "FAILED", LONG, "the job ends")
        killed = self.killed(job)
        self.assertGreaterEqual(killed, 1)
        text = self.explained(job, "out of memory")
        self.assertRegex(text, r"the kernel killed %d process\w* on vm\b" % killed)


class Judged(VmTest):
    """Jobs that a master watches, judges and records: its record tells when it said what."""

    def begin(self, **jobs):
        """Watch these jobs, each a line of shell and flags of sbatch; {name: id}.

        They are submitted over one connection: each takes long where the processor is emulated.
        """
        self.addCleanup(VM.no_jobs)
        VM.run("cd /home/tester && rm -rf records go-*", user="root")
        submits = []
        for line, *flags in jobs.values():
            words = ("sbatch", "--parsable", "--output=act.log", "--mem=100", *flags)
            submits.append(" ".join(map(shlex.quote, (*words, "--wrap", line))))
        ids = VM.run(" && ".join(submits)).split()
        self.start_master("--my-jobs", "--record", "records")
        return dict(zip(jobs, ids))

    def once_watched(self, **jobs):
        """Let each of these jobs, {name: id}, go as soon as an agent is in it; {name: when}."""
        went = {}

        def all_went():
            watched = {row["job"] for row in VM.nodes() if row["job_mem_limit"]}
            for name, job in jobs.items():
                if job in watched and name not in went:
                    told = VM.run(
                        "touch /home/tester/go-%s; date +%%s" % name, user="root"
                    )
                    went[name] = float(told)
            return len(went) == len(jobs)

        eventually(all_went, 3 * ATTACH, "an agent in each job")
        return went

    def record(self, job):
        """The lines of a job's record, the oldest first."""
        name = "/home/tester/records/%s.*.jsonl" % job
        text = VM.run("cat %s 2>/dev/null || zcat %s.gz" % (name, name), user="root")
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def told(self, job):
        """All that has been said of a job, [(time, text)]."""
        told = []
        for line in self.record(job):
            if "verdicts" in line:
                verdicts = master_server.parse_verdicts(line["verdicts"])
                text = "\n".join(master_server.render_verdicts(verdicts))
                told.append((line["time"], text))
        return told

    def says(self, job, pattern, seconds=2 * ATTACH):
        """Wait until that is told of a job: when it was."""

        def find():
            told = self.told(job)
            self.assertTrue(told, "nothing is told of job " + job)
            moments = [when for when, text in told if re.search(pattern, text, re.M)]
            self.assertTrue(moments, "%s: %s" % (pattern, told[-1][1]))
            return moments[0]

        return eventually(find, seconds, pattern)

    def says_in_time(self, job, pattern, since):
        """That is told of a job that runs, TOLD seconds after it began to be so at most."""
        seconds = self.says(job, pattern) - since
        print("job %s, %.0f s after it began: %s" % (job, seconds, pattern))
        lines = map(json.dumps, self.record(job))
        self.assertLess(seconds, TOLD, "since %.0f:\n%s" % (since, "\n".join(lines)))

    def died(self, job, pattern):
        """That is told of a job that has died, as soon as Slurm tells its end."""
        when = self.says(job, pattern)
        facts = [line for line in self.record(job) if "job" in line]
        known = next(
            line["time"]
            for line in facts
            if line["job"]["state"] in master_server.ENDED_STATES
        )
        late = when - facts[-1]["job"]["end"]
        words = "job %s, %.0f s after its end, %.0f s after Slurm told it: %s"
        print(words % (job, late, when - known, pattern))
        self.assertLess(when - known, 5)


WAIT = "until [ -e go-%s ]; do sleep 0.5; done; "


class SickJobs(Judged):
    """What is wrong with jobs, told while they run and once they have died."""

    def submit(self, word, *flags, before=""):
        """Submit a job that is sick once there is a file of that name; its id."""
        export = "--export=ALL,BEFORE=" + before
        flags += ("--mem=100", "--output=sick.log", export)
        return VM.sbatch(*flags, "sick.sh", word)

    def touch(self, *words):
        """Let the jobs that wait for these files go; when that was."""
        paths = " ".join("/home/tester/" + word for word in words)
        return float(VM.run("touch %s; date +%%s" % paths, user="root"))

    def test_what_is_wrong_is_told_in_time_and_of_what_they_died(self):
        self.addCleanup(VM.no_jobs)
        VM.run("cd /home/tester && rm -rf records bound serial fault", user="root")
        # it gets the CPUs 0 and 1
        bound = self.submit("bound", "-n2", before="srun -n2 --mem=0 taskset -c 0")
        self.start_master("--my-jobs", "--record", "records")
        self.row(bound, ATTACH, job_cpus=True)
        self.says_in_time(
            bound,
            r"^! 2 threads of ranks 0-1 share CPU 0 of vm: they may use: 0; the job has"
            r" 0-1 +-> srun --cpu-bind=cores",
            self.touch("bound"),
        )
        VM.run("scancel %s" % bound, user="root")
        # two CPUs may be two threads of one core: of one of them left idle nothing is said
        serial = self.submit("serial", "-c3")
        fault = self.submit("fault")
        limited = self.submit("never", "--time=1")
        # an emulated node of which all is burnt takes minutes to start a step
        for job in serial, fault:
            self.row(job, ATTACH, job_cpus=True)
        self.says_in_time(
            serial,
            r"^! 1 of 3 CPUs of vm at work for .*-> --cpus-per-task=1",
            self.touch("serial", "fault"),
        )
        for job, words in (
            (bound, r"cancelled"),
            (fault, r"SIGSEGV[^\n]*memory that is not its own"),
            (limited, r"time limit of (60 s|1\.0 min) reached"),
        ):
            self.explained(job, r"\d\d:\d\d: " + words)
            self.died(job, r"^died \d\d:\d\d: " + words)
        states = [VM.state(job) for job in (bound, fault, limited)]
        self.assertEqual(states, ["CANCELLED", "FAILED", "TIMEOUT"])


class MoreSickJobs(Judged):
    """All that one node can be sick of at once, most of it asleep: the processor is emulated."""

    def test_what_is_wrong_is_told_in_time(self):
        VM.run(SMALL_TMP, user="root")
        self.addCleanup(VM.run, "umount -l /tmp", user="root")
        act = "exec python3 act.py "
        jobs = self.begin(
            leak=(WAIT % "leak" + act + "fill 1100 5", "--mem=800"),
            over=(act + "fill 50", "--mem=1500"),
            full=(WAIT % "full" + "cat /dev/zero >/tmp/full; sleep 900",),
        )
        went = self.once_watched(full=jobs["full"], leak=jobs["leak"])
        self.says_in_time(
            jobs["full"],
            r"^! /tmp is full on vm: 100 % in use +-> export TMPDIR=",
            went["full"],
        )
        self.says_in_time(
            jobs["over"],
            r"^\. memory peak 0\.\d+ GB of 1\.46 GB so far: .*-> --mem=[12]00M",
            next(line["row"] for line in self.record(jobs["over"]) if "row" in line),
        )
        half = (
            400 / 5
        )  # seconds until half of the limit is in use: no leak is told before
        self.says_in_time(
            jobs["leak"],
            r"^! memory of vm grows steadily: .*GB of 0\.781 GB.*-> --mem=1000M",
            went["leak"] + half,
        )
        self.died(
            jobs["leak"],
            r"^died \d\d:\d\d: out of memory: the kernel killed 1 process on vm: .*of 0\.781 GB",
        )

    def test_of_what_they_died(self):
        jobs = self.begin(
            ranks=(
                WAIT
                % "ranks"
                + "srun --overcommit --kill-on-bad-exit -n4 --mem=0 python3 act.py"
                " fill-rank 1 60 400 4",
                "--mem=250",
            ),
            step=(
                WAIT % "step" + "srun --mem=0 python3 act.py fill 400",
                "--mem=150",
            ),
            missing=(WAIT % "missing" + "no-such-command",),
        )
        self.once_watched(**jobs)
        self.died(
            jobs["missing"],
            r"^died \d\d:\d\d: exit code 127 on vm: there is no such command: .*-> module",
        )
        self.died(
            jobs["step"],
            r"^died \d\d:\d\d: out of memory: the kernel killed 1 process on vm: ",
        )
        self.died(
            jobs["ranks"],
            r"^died \d\d:\d\d: out of memory: the kernel killed \d process\w* on vm: memory peak"
            r" higher than.* of 0\.244 GB; rank 1 \(python3\) had .*Slurm says \w+",
        )


class HealthyJobs(Judged):
    def test_nothing_but_fine_is_told_from_their_start_to_their_end(self):
        act = "exec python3 act.py "
        ranks = "srun --mem=0 python3 act.py "
        jobs = self.begin(
            io=(act + "io 120",),
            asleep=("sleep 30",),
            bursty=(act + "burst 5 12 15",),
            short=("true",),
            full_to_89_percent=(act + "fill 620 1000 150", "--mem=720"),
            page_cache=(act + "cache 300 120", "--mem=150"),
            busy_waiting=(ranks + "burst 1 150 0", "-n2"),
            master_and_workers=(ranks + "wait-for-workers 150", "-n3"),
        )
        ended = set()  # Slurm forgets each some minutes later

        def all_end_well():
            for name, job in jobs.items():
                if name not in ended and VM.state(job) == "COMPLETED":
                    ended.add(name)
            return ended == set(jobs)

        eventually(all_end_well, 4 * ATTACH, "all end well")
        told = {}

        def all_are_recorded():
            for name, job in jobs.items():
                lines = self.record(job)
                states = [line["job"].get("state") for line in lines if "job" in line]
                rows = [line for line in lines if "row" in line]
                if states and states[-1] == "COMPLETED" and rows:
                    told[name] = self.told(job)
            return set(told) >= set(jobs) - {"asleep", "short"}

        # what is over soon is over before anybody attaches to it
        with contextlib.suppress(AssertionError):
            eventually(all_are_recorded, LONG, "the ends in the records")
        print("watched and recorded: %s" % ", ".join(sorted(told)))
        self.assertLessEqual({"io", "busy_waiting", "master_and_workers"}, set(told))
        for name, words in told.items():
            for when, text in words:
                with self.subTest(name, when=when):
                    self.assertRegex(text, r"\Afine( so far)?: ")
                    self.assertNotRegex(text, r"(?m)^([!.]|died) ")


class TwoNodes(Judged):
    """A second slurmd in the same machine, with a network and a cable of its own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.addClassCleanup(VM.run, "bash one_node.sh", user="root")
        VM.run("bash second_node.sh", user="root")
        eventually(
            lambda: VM.run("sinfo -h -t idle -o %D", user="root") == "2",
            LONG,
            "two nodes",
        )

    def test_one_of_two_nodes_sleeps(self):
        ranks = "exec srun -N2 -n2 --mem=0 python3 act.py "
        jobs = self.begin(two=(WAIT % "two" + ranks + "spin-but 1", "-N2"))
        went = self.once_watched(**jobs)
        self.says_in_time(
            jobs["two"],
            r"^! 1 of 2 nodes idle for .*: vm2: vm uses [01]\.\d of 1 CPUs",
            went["two"],
        )

    def test_one_of_two_nodes_is_cut_off(self):
        jobs = self.begin(two=("exec srun -N2 -n2 --mem=0 sleep 900", "-N2"))
        eventually(
            lambda: {row["node"] for row in VM.nodes()} >= {"vm", "vm2"},
            2 * ATTACH,
            "agents on both nodes",
        )
        VM.run("ip link set cable down", user="root")
        try:
            self.says(
                jobs["two"],
                r"^! vm2 fell silent at \d\d:\d\d:\d\d, \d+ s ago: no goodbye; still sending: vm ",
            )
        finally:
            VM.run("ip link set cable up", user="root")


class RemoveIPC(VmTest):
    """logind removes what a user has in /dev/shm when the last session of the user closes."""

    def as_tester(self, command, **more):
        """Run as that user in no session: one would keep logind from its work."""
        line = (
            "cd /home/tester && setpriv --reuid=%d --regid=%d --clear-groups env"
            " HOME=/home/tester %s" % (TESTER, TESTER, command)
        )
        return VM.run(line, user="root", **more)

    def test_a_master_in_a_job_outlives_the_last_session_of_its_user(self):
        self.addCleanup(VM.no_jobs)
        session = self.start("exec sleep 1000")  # until the master is there
        VM.sbatch(
            "--output=master.log",
            "--wrap",
            "exec python3 master_server.py --with-agent",
        )
        eventually(VM.nodes, LONG, "the agent of the master")
        watch = self.start("exec python3 gone.py " + SHM, user="root")
        eventually(lambda: "ready" in watch.out, LONG, "the watch of the name")
        self.end(session)
        # The loop ends when logind has forgotten the user, which it does after all else.
        VM.run(
            "until ! loginctl show-user tester; do sleep 0.2; done >/dev/null 2>&1",
            user="root",
        )
        told = eventually(
            lambda: re.search(r"gone for (\S+)\n", watch.out),
            LONG,
            "logind has removed the name, and it is there again",
        )
        self.assertLess(float(told.group(1)), 10)
        read = json.loads(self.as_tester("python3 test_reader.py --json"))
        self.assertEqual([row["node"] for row in read["nodes"]], ["vm"])

        master = VM.master_pid()
        roles = VM.run("pgrep -P " + master, user="root").split()
        self.assertGreaterEqual(len(roles), 3)
        VM.run("kill -KILL " + " ".join(roles), user="root")
        eventually(
            lambda: all(row["age"] < 5 for row in VM.nodes()) and VM.nodes(),
            LONG,
            "collector, dashboard and agent work again",
        )
        self.assertIn("ok", VM.page("/healthz"))
        self.assertNotIn("Traceback", self.as_tester("cat master.log"))


class TasksMax(VmTest):
    """The slice of a user may have so many threads and no more; each agent needs one."""

    AGENTS = 40
    ROOM = 10

    def limit(self, number):
        VM.run(
            "systemctl set-property --runtime user-%d.slice TasksMax=%s"
            % (TESTER, number),
            user="root",
        )

    def names(self):
        return {row["node"] for row in VM.nodes()}

    def test_who_is_turned_away_for_want_of_threads_is_told_everywhere(self):
        self.addCleanup(self.limit, "infinity")
        self.start_master()
        slice_dir = "/sys/fs/cgroup/user.slice/user-%d.slice" % TESTER
        tasks = int(VM.run("cat %s/pids.current" % slice_dir, user="root"))
        self.limit(tasks + self.ROOM)
        load = self.start("exec python3 load.py 13579 %d" % self.AGENTS, user="root")
        first = eventually(self.names, LONG, "some agents get in")
        refused = self.start("exec python3 agent.py --host 127.0.0.1", user="root")

        why = r"(?i)thread|task|process"
        headline = eventually(
            lambda: re.search(
                r"(?i)\b[1-9]\d* .*turned away.*", VM.page("/nodes.txt").split("\n")[0]
            ),
            LONG,
            "the headline says how many are turned away",
        ).group()
        self.assertNotIn("All is well", headline)
        self.assertRegex(headline, why)
        health = VM.page("/healthz")
        self.assertRegex(health, r"(?i)\b[1-9]\d* .*turned away")
        self.assertRegex(health, why)
        self.assertRegex(
            VM.page("/metrics"), r"(?m)^sentinel_turned_away_lately\{\} [1-9]"
        )
        refused.logged(why, LONG)

        inside = self.names()
        self.assertLess(len(inside), self.AGENTS)
        self.assertLessEqual(first, inside, "who is in was disturbed")
        self.limit("infinity")
        self.assertLessEqual(inside, self.names(), "who is in was disturbed")
        self.end(load)  # its agents do not try again
        self.start("exec python3 load.py 13579 %d" % self.AGENTS, user="root")
        eventually(
            lambda: len(self.names()) >= self.AGENTS, LONG, "all of them have room now"
        )
        eventually(
            lambda: "turned away" not in VM.page("/nodes.txt").split("\n")[0],
            LONG,
            "the headline says it no more",
        )


if __name__ == "__main__":
    unittest.main()
