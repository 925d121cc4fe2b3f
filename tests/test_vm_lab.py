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

NEEDS = ("qemu-system-x86_64", "ssh")
SCRIPT = os.path.join(support.ROOT, "tests", "vm-lab.sh")
TOOLS = ("agent.py", "master_server.py", "test_reader.py", "run_agent.slurm")
BUILD_SECONDS = 1200  # a busy machine needs so long; an idle one 65
CALL_SECONDS = 90
ASKED_FOR = os.environ.get("SENTINEL_TEST_VM") == "1"
LONG = 3 * PATIENCE  # the processor is emulated
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

# As tester but in no session: prints after how many seconds test_reader.py has found a master.
FIND = """
import subprocess, sys, time
start = time.monotonic()
while subprocess.call([sys.executable, "test_reader.py"], stdout=2):
    if time.monotonic() - start > 60:
        sys.exit("no master in a minute")
    time.sleep(0.2)
print(time.monotonic() - start)
"""


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

    def call(self, *words, seconds=CALL_SECONDS, stdin=""):
        return subprocess.run(
            [SCRIPT, *words],
            env=self.env,
            cwd=support.ROOT,
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
        self.must("put", "tester", *TOOLS)
        self.must("put", "root", "agent.py", "tests/load.py")
        self.run("cat > work.py", stdin=WORK)
        self.run("cat > find.py", stdin=FIND)

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

    def sbatch(self, *words):
        """Submit a job; its id."""
        line = " ".join(shlex.quote(word) for word in ("sbatch", "--parsable", *words))
        return self.run(line)

    def page(self, path):
        """What the dashboard answers; no session of tester's is opened for it."""
        return self.run("curl -s -m 10 localhost:8080%s" % path, user="root")

    def nodes(self):
        return json.loads(self.page("/api/nodes"))["nodes"]

    def no_jobs(self):
        self.run("scancel --user=tester", user="root")
        eventually(lambda: not self.run("squeue -h", user="root"), LONG, "no job")


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

    def row(self, wanted, **fields):
        """Wait for the row of a job that has all of these fields; the row."""

        def find():
            for row in VM.nodes():
                if row["job"] == wanted and all(row[key] for key in fields or ("job",)):
                    return row
            return None

        return eventually(find, LONG, "job %s" % wanted)


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


class RemoveIPC(VmTest):
    """logind removes what a user has in /dev/shm when the last session of the user closes."""

    def as_tester(self, command, **more):
        """Run as that user in no session: one would keep logind from its work."""
        line = (
            "cd /home/tester && setpriv --reuid=%d --regid=%d --clear-groups env"
            " HOME=/home/tester %s" % (TESTER, TESTER, command)
        )
        return VM.run(line, user="root", **more)

    def inode(self):
        return VM.run("stat -c %%i %s 2>&1 || true" % SHM, user="root")

    def test_a_master_in_a_job_outlives_the_last_session_of_its_user(self):
        self.addCleanup(VM.no_jobs)
        session = self.start("exec sleep 1000")  # until the master is there
        VM.sbatch(
            "--output=master.log",
            "--wrap",
            "exec python3 master_server.py --with-agent",
        )
        eventually(VM.nodes, LONG, "the agent of the master")
        before = self.inode()
        self.assertRegex(before, r"\A\d+\Z")
        self.end(session)
        # The loop ends when logind has forgotten the user, which it does after all else.
        VM.run(
            "until ! loginctl show-user tester; do sleep 0.2; done >/dev/null 2>&1",
            user="root",
        )
        seconds = float(self.as_tester("python3 find.py"))
        self.assertLess(seconds, 10 + 3, "a look takes a second or two here")
        eventually(
            lambda: re.match(r"\d+\Z", self.inode()), 10, "the name is there again"
        )
        self.assertNotEqual(self.inode(), before, "logind has removed nothing")

        master = VM.run(
            "pgrep -o -u tester -f '^python3 master_server.py'", user="root"
        )
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
        self.start("exec python3 load.py 13579 %d" % self.AGENTS, user="root")
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
        self.assertRegex(VM.page("/metrics"), r"(?m)^sentinel_\w*turned_away\w* [1-9]")
        refused.logged(why, LONG)

        inside = self.names()
        self.assertLess(len(inside), self.AGENTS)
        self.assertLessEqual(first, inside, "who is in was disturbed")
        self.limit("infinity")
        eventually(
            lambda: len(self.names()) >= self.AGENTS, LONG, "all of them have room now"
        )
        self.assertLessEqual(inside, self.names(), "who is in was disturbed")
        eventually(
            lambda: "turned away" not in VM.page("/nodes.txt").split("\n")[0],
            LONG,
            "the headline says it no more",
        )


if __name__ == "__main__":
    unittest.main()
