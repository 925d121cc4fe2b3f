"""On a real cluster: Slurm, sshd and five hosts made of namespaces (lab.sh, lab.md).

    laptop --wan-- login --lan-- c1, c2         (login does not route)

All that a user does is done as an ordinary user, `tester`, with what scp has brought from the
laptop; only cables, crashes and firewalls are root's. About four minutes, one of which is the
laptop's sleep.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import support
from support import PATIENCE, eventually, stays

NEEDS = ("root", "slurmctld", "slurmd", "sbatch", "munged", "sshd", "ssh", "ip", "nft", "setpriv")
SCRIPT = os.path.join(support.ROOT, "tests", "lab.sh")
TOOLS = ("agent.py", "master_server.py", "port_forward.py", "run_agent.slurm", "net_debug.slurm",
         "utils")
PORT, BRIDGE, PAGE = 13579, 13580, 8080     # what the tools have by default
LOGIN = "10.77.2.1"                         # the login node as the compute nodes see it
HEARS = "import socket; socket.create_connection((%r, %d), 5).close()"

# A browser: paths come in, documents go out, one a line.
BROWSER = """
import json, sys, urllib.request
for line in sys.stdin:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8080" + line.strip(), timeout=5) as answer:
            print(json.dumps(answer.read().decode("utf-8")), flush=True)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


class Lab:
    """The hosts, from outside and as root; `run` and `start` go inside, as tester."""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="sentinel-lab-")
        self.env = {"LAB_DIR": self.dir, "LAB_CGROUP": "1", "PATH": os.environ["PATH"]}

    def call(self, *words, seconds=60):
        return subprocess.run([SCRIPT, *words], env=self.env, timeout=seconds, cwd=self.dir,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True)

    def must(self, *words, **more):
        """Call lab.sh; its output, or an error if it failed."""
        done = self.call(*words, **more)
        if done.returncode:
            raise AssertionError("%s: %d\n%s" % (" ".join(words), done.returncode, done.stdout))
        return done.stdout.strip()

    def up(self):
        self.must("up")
        home = os.path.join(self.dir, "laptop", "home", "tester")
        for name in TOOLS:
            source = os.path.join(support.ROOT, name)
            if os.path.isdir(source):
                shutil.copytree(source, os.path.join(home, name))
            else:
                shutil.copy(source, home)
        subprocess.check_call(["chown", "-R", "4242:4242", home])
        self.run("laptop", "scp", "-q", "-r", *TOOLS, "login:")

    def down(self):
        self.must("down")
        shutil.rmtree(self.dir)

    def run(self, host, *words, user="tester", **more):
        return self.must("run", "%s@%s" % (user, host), *map(str, words), **more)

    def start(self, host, *words, **more):
        """A Tool that runs there, as tester, until it is stopped."""
        return support.Tool([SCRIPT, "run", "tester@" + host, *map(str, words)], self.env, **more)

    def path(self, *names):
        """A file in the home that login, c1 and c2 share."""
        return os.path.join(self.dir, "home", "tester", *names)

    def text(self, name):
        """What a file there holds; "" while there is none."""
        with contextlib.suppress(FileNotFoundError), open(self.path(name)) as file:
            return file.read()
        return ""

    def sbatch(self, *words, env=(), host="login"):
        """Submit a job; its id."""
        return self.run(host, "env", *env, "sbatch", "--parsable", *words)

    def queue(self):
        """{job id: state} of what has not ended."""
        return dict(line.split() for line in
                    self.run("login", "squeue", "-h", "-o", "%A %T").splitlines())

    def ended(self, job):
        """Wait until a job has ended; its output."""
        eventually(lambda: job not in self.queue(), what="job %s ends" % job)
        return self.text("slurm-%s.out" % job)

    def no_jobs(self):
        """Cancel whatever runs and wait until both nodes are free."""
        self.run("login", "scancel", "--user=tester")
        eventually(lambda: not self.queue(), 30, "no job is left")
        eventually(lambda: self.run("login", "sinfo", "-hN", "-t", "idle", "-o", "%N").split()
                   == ["c1", "c2"], 30, "both nodes are idle")

    def pids(self, host, tool):
        """The pids, as they are outside, of the processes on a host that run `python3 TOOL`."""
        with open(os.path.join(self.dir, host, "pid")) as file:
            here = os.readlink("/proc/%s/ns/net" % file.read().strip())
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    words = file.read().split(b"\0")
                if words[1:2] == [tool.encode()] and os.readlink("/proc/%s/ns/net" % name) == here:
                    found.append(int(name))
        return found

    def kill(self, host, tool):
        """SIGKILL to them, and wait until nothing is left of them."""
        pids = self.pids(host, tool)
        assert pids, "no %s on %s" % (tool, host)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(os.path.exists("/proc/%d" % pid) for pid in pids))

    def listens(self, host, port):
        """Whether something listens on that TCP port of a host, on loopback or all of it."""
        with open(os.path.join(self.dir, host, "pid")) as file:
            pid = file.read().strip()
        with open("/proc/%s/net/tcp" % pid) as file:
            rows = [line.split() for line in file.readlines()[1:]]
        return any(row[3] == "0A" and row[1].endswith(":%04X" % port) for row in rows)


class Browser:
    """Looks at the dashboard of a host from that very host."""

    def __init__(self, host):
        self.tool = LAB.start(host, "python3", "-u", "-c", BROWSER, stdin=subprocess.PIPE)
        self.read = 0

    def get(self, path):
        self.tool.process.stdin.write(path.encode() + b"\n")
        self.tool.process.stdin.flush()
        line = eventually(lambda: self.tool.out[self.read:].partition("\n")[1]
                          and self.tool.out[self.read:].partition("\n")[0], what=path)
        self.read += len(line) + 1
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise OSError(answer["error"])
        return answer

    def table(self):
        return json.loads(self.get("/api/nodes"))

    def nodes(self):
        return self.table()["nodes"]

    def names(self, **wanted):
        """The sorted names of the rows with these values."""
        return sorted(row["node"] for row in self.nodes()
                      if all(row[key] == value for key, value in wanted.items()))

    def events(self, kind, node=None, since=0.0):
        return [event for event in json.loads(self.get("/api/events"))["events"]
                if event["kind"] == kind and node in (None, event["node"])
                and event["time"] >= since]


LAB = None      # up from the first test that needs it to the end of this module


def tearDownModule():
    if LAB:
        LAB.down()


@support.requires(*NEEDS)
class LabTest(unittest.TestCase):
    """Tests with a master that runs on `place`, and with a tunnel and a bridge if that is away."""

    place = ""

    @classmethod
    def setUpClass(cls):
        global LAB
        if LAB is None:
            LAB = Lab()
            LAB.up()
        cls.tools = contextlib.ExitStack()
        try:
            cls.start_all()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def start_all(cls):
        if cls.place:
            cls.master = cls.start_master()
            cls.browser = Browser(cls.place)
            cls.tools.callback(cls.browser.tool.stop)
            cls.tools.callback(lambda: cls.master.stop())       # the last of them
        if cls.place == "laptop":
            cls.tunnel, cls.bridge = cls.start_tunnel(), cls.start_bridge()
            cls.tools.callback(lambda: cls.tunnel.stop())
            cls.tools.callback(lambda: cls.bridge.stop())

    @classmethod
    def start_master(cls):
        open_to_nodes = ["--host", "0.0.0.0"] if cls.place == "login" else []
        master = LAB.start(cls.place, "python3", "master_server.py", *open_to_nodes)
        master.listening("dashboard")
        return master

    @classmethod
    def start_tunnel(cls):
        tunnel = LAB.start("laptop", "ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-o",
                           "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
                           "-R", "%d:localhost:%d" % (PORT, PORT), "login")
        eventually(lambda: tunnel.code is None and LAB.listens("login", PORT), what="the tunnel")
        return tunnel

    @classmethod
    def start_bridge(cls):
        bridge = LAB.start("login", "python3", "port_forward.py")
        bridge.listening()
        return bridge

    @classmethod
    def tearDownClass(cls):
        try:
            LAB.no_jobs()
        finally:
            cls.tools.close()

    def tearDown(self):
        for port in ("laptop", "login-wan", "login", "c1", "c2"):
            LAB.must("heal", port)
        LAB.no_jobs()

    # ---- what the tests say ----

    def shown(self, *names, seconds=PATIENCE, **wanted):
        """Wait until exactly these nodes have the rows with these values; the rows, by node."""
        eventually(lambda: self.browser.names(**wanted) == sorted(names), seconds,
                   "%s shows %s" % (wanted, names))
        return {row["node"]: row for row in self.browser.nodes()}

    def both_nodes_run(self, *flags, **more):
        """Submit run_agent.slurm on both nodes and wait for their rows; the job's id."""
        job = LAB.sbatch("--nodes=2", *flags, "run_agent.slurm", **more)
        self.shown("c1", "c2", job=job)
        return job

    def event(self, kind, node, since, seconds=PATIENCE):
        return eventually(lambda: self.browser.events(kind, node, since), seconds,
                          "%s %s" % (kind, node))[-1]


class Scenarios(unittest.TestCase):
    """The plan's nine: which of them work, and how the others fail."""


class SolutionA(LabTest):
    """The master on the login node."""

    place = "login"

    def test_both_nodes_of_a_job_are_shown_by_name_job_and_user_also_on_the_laptop(self):
        job = self.both_nodes_run()
        rows = {row["node"]: row for row in self.browser.nodes()}
        for node, address in (("c1", "10.77.2.11"), ("c2", "10.77.2.12")):
            self.assertEqual((rows[node]["job"], rows[node]["user"], rows[node]["job_name"]),
                             (job, "tester", "sentinel"))
            self.assertIn(address, rows[node]["address"])
        with LAB.start("laptop", "ssh", "-N", "-L", "8080:localhost:8080", "login"):
            eventually(lambda: LAB.listens("laptop", PAGE))
            look = "import urllib.request as u; print(u.urlopen('http://localhost:8080').read())"
            page = LAB.run("laptop", "python3", "-c", look)
        for text in ("c1", "c2", "tester", ">%s<" % job):
            self.assertIn(text, page)

    def test_scancel_is_a_goodbye_of_both_within_7_s(self):
        job = self.both_nodes_run()
        start = time.time()
        LAB.run("login", "scancel", job)
        self.shown(seconds=7)
        for node in ("c1", "c2"):
            self.assertIn("SIGTERM", self.event("finished", node, start)["text"])
            self.assertEqual(self.browser.events("lost", node, start), [])

    def test_a_crashed_node_is_lost_within_5_5_s_of_its_last_sample(self):
        self.both_nodes_run()
        start = time.time()
        LAB.must("cut", "c2")
        table = self.browser.table()
        LAB.kill("c2", "agent.py")
        last = 0
        while "c2" in [row["node"] for row in table["nodes"]]:
            last = [table["time"] - row["age"] for row in table["nodes"] if row["node"] == "c2"][0]
            self.assertLess(time.time() - last, 7)
            table = self.browser.table()
        self.assertLess(table["time"] - last, 5.6)      # the looks are a moment apart
        self.assertLess(self.event("lost", "c2", start)["time"] - last, 5.5)
        self.assertEqual(self.browser.names(), ["c1"])

    def test_a_cable_cut_for_3_s_loses_nobody_and_one_for_20_s_heals_within_10_s(self):
        self.both_nodes_run()
        # TCP waits twice as long before each repetition, so the moment of a cut matters: what it
        # delays most arrives about 5 s after the sample before. Cut c1 just after a sample.
        eventually(lambda: [row for row in self.browser.nodes()
                            if row["node"] == "c1" and row["age"] < 0.3])
        start = time.time()
        LAB.must("cut", "c1")
        LAB.must("cut", "c2")
        eventually(lambda: time.time() > start + 3)
        LAB.must("heal", "c1")
        self.event("lost", "c2", start, 6)
        stays(lambda: "c1" in self.browser.names(), start + 20 - time.time())
        self.assertEqual(self.browser.names(), ["c1"])
        self.assertEqual(self.browser.events("lost", "c1", start), [])
        LAB.must("heal", "c2")
        healed = time.time()
        self.shown("c1", "c2", seconds=10)
        self.assertLess(time.time() - healed, 10)
        stays(lambda: self.browser.names() == ["c1", "c2"], 3, "one row each")

    def test_a_master_that_is_started_again_has_all_agents_back_within_10_s(self):
        self.both_nodes_run()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(signal.Signals(number).name):
                if number == signal.SIGKILL:
                    LAB.kill("login", "master_server.py")
                self.master.stop()
                type(self).master = self.start_master()
                self.shown("c1", "c2", seconds=10)

    def test_a_requeued_job_has_two_rows_told_apart_while_its_old_process_lives(self):
        job = LAB.sbatch("--nodes=1", "--nodelist=c1", "--requeue", "run_agent.slurm")
        self.shown("c1", job=job)
        rules = ("add table ip sentinel; add chain ip sentinel out {type filter hook output "
                 "priority 0;}; add rule ip sentinel out tcp dport {6817, 6818} drop; "
                 "add rule ip sentinel out tcp sport {6817, 6818} drop")
        LAB.run("c1", "nft", rules, user="root")        # Slurm has lost c1, the agent has not
        try:
            LAB.run("login", "scontrol", "update", "nodename=c1", "state=down", "reason=test",
                    user="root")
            LAB.run("login", "scontrol", "update", "job=" + job, "reqnodelist=", "starttime=now",
                    user="root")
            rows = self.shown("c1", "c2", job=job, seconds=40)
            self.assertEqual((rows["c1"]["job"], rows["c2"]["job"]), (job, job))
        finally:
            LAB.run("c1", "nft", "delete table ip sentinel", user="root")
            LAB.run("login", "scontrol", "update", "nodename=c1", "state=resume", user="root")


if __name__ == "__main__":
    unittest.main()
