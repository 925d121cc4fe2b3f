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

NEEDS = (
    "root",
    "slurmctld",
    "slurmd",
    "sbatch",
    "munged",
    "sshd",
    "ssh",
    "ip",
    "nft",
    "setpriv",
)
SCRIPT = os.path.join(support.ROOT, "tests", "lab.sh")
TOOLS = (
    "agent.py",
    "master_server.py",
    "port_forward.py",
    "run_agent.slurm",
    "net_debug.slurm",
    "utils",
)
PORT, BRIDGE, PAGE = 13579, 13580, 8080  # what the tools have by default
LOGIN = "10.77.2.1"  # the login node as the compute nodes see it
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
        self.env = {
            "LAB_DIR": self.dir,
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        if os.path.isdir(
            "/sys/fs/cgroup/memory"
        ):  # cgroup v1: jobs with limits, as elsewhere
            self.env["LAB_CGROUP"] = "1"

    def call(self, *words, seconds=60):
        return subprocess.run(
            [SCRIPT, *words],
            env=self.env,
            timeout=seconds,
            cwd=self.dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )

    def must(self, *words, **more):
        """Call lab.sh; its output, or an error if it failed."""
        done = self.call(*words, **more)
        if done.returncode:
            raise AssertionError(
                "%s: %d\n%s" % (" ".join(words), done.returncode, done.stdout)
            )
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
        return support.Tool(
            [SCRIPT, "run", "tester@" + host, *map(str, words)], self.env, **more
        )

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
        return dict(
            line.split()
            for line in self.run("login", "squeue", "-h", "-o", "%A %T").splitlines()
        )

    def ended(self, job):
        """Wait until a job has ended; its output."""
        eventually(lambda: job not in self.queue(), what="job %s ends" % job)
        return self.text("slurm-%s.out" % job)

    def no_jobs(self):
        """Cancel whatever runs and wait until both nodes are free."""
        self.run("login", "scancel", "--user=tester")
        eventually(lambda: not self.queue(), 30, "no job is left")
        eventually(
            lambda: (
                self.run("login", "sinfo", "-hN", "-t", "idle", "-o", "%N").split()
                == ["c1", "c2"]
            ),
            30,
            "both nodes are idle",
        )

    def commands(self, host):
        """Yield (pid, as it is outside, words of its command) of each process on a host."""
        with open(os.path.join(self.dir, host, "pid")) as file:
            here = os.readlink("/proc/%s/ns/net" % file.read().strip())
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    words = os.fsdecode(file.read()).split("\0")
                if os.readlink("/proc/%s/ns/net" % name) == here:
                    yield int(name), words

    def pids(self, host, tool):
        """The pids of the processes on a host that run `python3 TOOL`.

        The agent starts itself once more, as `python3 -c TEXT TOOL`.
        """
        found = []
        for pid, words in self.commands(host):
            script = words[3:4] if words[1:2] == ["-c"] else words[1:2]
            if script == [tool]:
                found.append(pid)
        return found

    def pids_with(self, host, word):
        """The pids of the processes on a host whose command has the word."""
        return [pid for pid, words in self.commands(host) if word in words]

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
        self.tool = LAB.start(
            host, "python3", "-u", "-c", BROWSER, stdin=subprocess.PIPE
        )
        self.read = 0

    def get(self, path):
        self.tool.process.stdin.write(path.encode() + b"\n")
        self.tool.process.stdin.flush()
        line = eventually(
            lambda: (
                self.tool.out[self.read :].partition("\n")[1]
                and self.tool.out[self.read :].partition("\n")[0]
            ),
            what=path,
        )
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
        return sorted(
            row["node"]
            for row in self.nodes()
            if all(row[key] == value for key, value in wanted.items())
        )

    def events(self, kind, node=None, since=0.0):
        return [
            event
            for event in json.loads(self.get("/api/events"))["events"]
            if event["kind"] == kind
            and node in (None, event["node"])
            and event["time"] >= since
        ]


@contextlib.contextmanager
def firewall(host, way, side, verdict, ports="{%d, %d}" % (PORT, BRIDGE)):
    """What comes "in" to a host or goes "out" of it with these TCP ports meets that verdict."""
    table = "ip sentinel_" + side
    rules = (
        "add table {0}; add chain {0} way {{type filter hook {1}put priority 0;}};"
        "add rule {0} way tcp {2} {3} {4}"
    ).format(table, way, side, ports, verdict)
    LAB.run(host, "nft", rules, user="root")
    try:
        yield
    finally:
        LAB.run(host, "nft", "delete table " + table, user="root")


LAB = None  # up from the first test that needs it to the end of this module


def tearDownModule():
    if LAB:
        LAB.down()


@support.slow("a Slurm cluster")
@support.requires(*NEEDS)
class LabTest(unittest.TestCase):
    """Tests with a master that runs on `place`, and with a tunnel and a bridge if that is away."""

    place = ""

    @classmethod
    def setUpClass(cls):
        global LAB
        if LAB is None:
            namespaces = subprocess.run(
                ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "true"]
            )
            if namespaces.returncode and os.environ.get("SENTINEL_TEST_ALL") != "1":
                raise unittest.SkipTest("missing here: the right to make namespaces")
            lab = Lab()
            try:
                lab.up()
            except BaseException:
                lab.down()
                raise
            LAB = lab
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
            cls.tools.callback(lambda: cls.master.stop())  # the last of them
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
        tunnel = LAB.start(
            "laptop",
            "ssh",
            "-N",
            "-o",
            "ExitOnForwardFailure=yes",
            "-o",
            "ServerAliveInterval=5",
            "-o",
            "ServerAliveCountMax=3",
            "-R",
            "%d:localhost:%d" % (PORT, PORT),
            "login",
        )
        eventually(
            lambda: tunnel.code is None and LAB.listens("login", PORT),
            what="the tunnel",
        )
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
        eventually(
            lambda: self.browser.names(**wanted) == sorted(names),
            seconds,
            "%s shows %s" % (wanted, names),
        )
        return {row["node"]: row for row in self.browser.nodes()}

    def both_nodes_run(self, *flags, **more):
        """Submit run_agent.slurm on both nodes and wait for their rows; the job's id."""
        job = LAB.sbatch("--nodes=2", *flags, "run_agent.slurm", **more)
        self.shown("c1", "c2", job=job)
        return job

    def event(self, kind, node, since, seconds=PATIENCE):
        return eventually(
            lambda: self.browser.events(kind, node, since),
            seconds,
            "%s %s" % (kind, node),
        )[-1]


class ScenariosOnLogin(LabTest):
    """The plan's nine scenarios; those with the master on the login node."""

    place = "login"
    tunnel_only = False
    table = (
        # number, how it is started, the agent's --host, where it shows or why it does not
        (1, "on login", "127.0.0.1", "login"),
        (7, "sbatch", LOGIN, "c1"),
        (8, "sbatch", "192.168.1.1", "unreachable"),  # the guessed gateway
    )

    @classmethod
    def start_all(cls):
        super().start_all()
        if cls.tunnel_only:
            cls.bridge.stop()  # no bridge: the plan had none yet

    def test_the_scenarios_that_work_and_those_that_cannot(self):
        agents = []
        for number, start, host, _ in self.table:
            words = [
                "python3",
                "agent.py",
                "--host",
                host,
                "--name",
                "scenario%d" % number,
            ]
            log = "scenario%d.log" % number
            if start == "on login":
                agent = LAB.start("login", *words)
            elif start == "sbatch":
                LAB.sbatch("--output=" + log, "--wrap", "exec " + " ".join(words))
                agent = None
            else:  # salloc, which runs its command where it is called
                step = ["srun"] if start == "salloc srun" else []
                agent = LAB.start("login", "salloc", "-Q", "--nodes=1", *step, *words)
            agents.append((agent, log))
            if agent:
                self.addCleanup(self.end, agent)
        for (number, start, host, outcome), (agent, log) in zip(self.table, agents):
            with self.subTest("scenario %d" % number, how=start, host=host):
                name = "scenario%d" % number
                if outcome in ("login", "c1"):
                    row = eventually(
                        lambda name=name: [
                            row for row in self.browser.nodes() if row["node"] == name
                        ]
                    )[0]
                    self.assertEqual(
                        row["job"], None if start == "on login" else row["job"]
                    )
                    self.assertIs(start == "on login", row["job"] is None)
                else:
                    eventually(
                        lambda agent=agent, log=log, outcome=outcome: re.search(
                            "cannot reach the master.*" + outcome,
                            agent.log if agent else LAB.text(log),
                        ),
                        what=name,
                    )
                    self.assertEqual(self.browser.names(node=name), [])

    @staticmethod
    def end(agent):
        """salloc passes no signal on, so ask each of its processes."""
        for pid in support.descendants(agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        agent.stop()


class ScenariosOnLaptop(ScenariosOnLogin):
    """Those with the master on the laptop and `ssh -R`."""

    place = "laptop"
    tunnel_only = True
    table = (
        (2, "on login", "127.0.0.1", "login"),  # through the tunnel
        (3, "salloc", "127.0.0.1", "login"),  # salloc alone runs on the login node
        (4, "salloc srun", LOGIN, "refused"),  # the tunnel hears the loopback only
        (5, "sbatch", "127.0.0.1", "refused"),  # the compute node's own loopback
        (6, "sbatch", LOGIN, "refused"),
        (9, "sbatch", "login", "refused"),
    )


class SolutionA(LabTest):
    """The master on the login node."""

    place = "login"

    def test_both_nodes_of_a_job_are_shown_by_name_job_and_user_also_on_the_laptop(
        self,
    ):
        job = self.both_nodes_run()
        rows = {row["node"]: row for row in self.browser.nodes()}
        for node, address in (("c1", "10.77.2.11"), ("c2", "10.77.2.12")):
            self.assertEqual(
                (rows[node]["job"], rows[node]["user"], rows[node]["job_name"]),
                (job, "tester", "sentinel"),
            )
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
            last = [
                table["time"] - row["age"]
                for row in table["nodes"]
                if row["node"] == "c2"
            ][0]
            self.assertLess(time.time() - last, 7)
            table = self.browser.table()
        self.assertLess(table["time"] - last, 5.6)  # the looks are a moment apart
        self.assertLess(self.event("lost", "c2", start)["time"] - last, 5.5)
        self.assertEqual(self.browser.names(), ["c1"])

    def test_a_cable_cut_for_3_s_loses_nobody_and_one_for_20_s_heals_within_10_s(self):
        self.both_nodes_run()
        eventually(lambda: self.cut_after_a_sample("c1"))
        start = time.time()
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

    def cut_after_a_sample(self, node):
        """Cut a cable within 0.3 s of the node's last sample; False if that took too long.

        TCP doubles its wait before each repetition: a sample that is sent soon after the start of
        a 3 s cut arrives 3 s later, 5 s after the one before, which is the limit.
        """

        def age():
            return [row["age"] for row in self.browser.nodes() if row["node"] == node][
                0
            ]

        eventually(lambda: age() < 0.1)
        LAB.must("cut", node)
        if age() < 0.3:
            return True
        LAB.must("heal", node)
        return False

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
        slurm = "{6817, 6818}"  # that has lost c1, the agent there has lost nobody
        try:
            with firewall("c1", "out", "dport", "drop", slurm), firewall(
                "c1", "out", "sport", "drop", slurm
            ):
                LAB.run(
                    "login",
                    "scontrol",
                    "update",
                    "nodename=c1",
                    "state=down",
                    "reason=test",
                    user="root",
                )
                LAB.run(
                    "login",
                    "scontrol",
                    "update",
                    "job=" + job,
                    "reqnodelist=",
                    "starttime=now",
                    user="root",
                )
                rows = self.shown("c1", "c2", job=job, seconds=40)
                self.assertNotEqual(rows["c1"]["slot"], rows["c2"]["slot"])
        finally:
            LAB.run(
                "login",
                "scontrol",
                "update",
                "nodename=c1",
                "state=resume",
                user="root",
            )


class Jobs(LabTest):
    """What users do with run_agent.slurm, with the master where they submit."""

    place = "login"

    def test_each_task_of_an_array_has_a_row_of_its_own_job(self):
        LAB.sbatch("--array=1-3", "run_agent.slurm")
        rows = eventually(
            lambda: len(self.browser.nodes()) == 3 and self.browser.nodes()
        )
        self.assertEqual(len({row["job"] for row in rows}), 3)

    def test_the_master_may_be_named_in_every_way_that_sbatch_has(self):
        for flags, env in (
            ([], ["SENTINEL_HOST=" + LOGIN]),
            (["--export=SENTINEL_HOST=%s,SENTINEL_PORT=%d" % (LOGIN, PORT)], []),
            (["--export=ALL,SENTINEL_HOST=%s:%d" % (LOGIN, PORT)], []),
            ([], ["SENTINEL_HOST=192.168.1.1,login", "SENTINEL_PORT=%d" % PORT]),
            (["--export=NONE"], []),
        ):
            with self.subTest(" ".join(flags + env)):
                job = LAB.sbatch(*flags, "run_agent.slurm", env=env)
                self.shown(*self.shown_nodes(job), job=job)

    def shown_nodes(self, job):
        return eventually(lambda: self.browser.names(job=job))

    def test_a_sidecar_watches_a_job_and_ends_with_it(self):
        with open(os.path.join(support.ROOT, "run_agent.slurm")) as file:
            lines = re.search(
                r"(?m)^#     (srun --overlap .*\\)\n# (.*&)$", file.read()
            )
        sidecar = "%s\n%s\n" % lines.groups()  # the very lines that the comment gives
        work = "srun bash -c 'until [ -e go%d ]; do sleep 0.2; done' &\n"
        for number, script in enumerate((sidecar + work, work + "sleep 2\n" + sidecar)):
            with self.subTest(script):
                with open(LAB.path("work.sh"), "w") as file:
                    file.write("#!/bin/bash\n" + script % number)
                    file.write("wait -n\necho work is done\n")
                start = time.time()
                job = LAB.sbatch("--nodes=2", "work.sh")
                rows = self.shown("c1", "c2", job=job)
                self.assertEqual(rows["c2"]["job_name"], "work.sh")
                LAB.run("login", "touch", "go%d" % number)
                self.assertIn("work is done", LAB.ended(job))
                self.shown(seconds=7)
                for node in ("c1", "c2"):
                    self.event("finished", node, start)
                    self.assertEqual(self.browser.events("lost", node, start), [])

    def test_where_there_is_no_python_the_log_says_so_and_the_job_fails(self):
        python = os.path.realpath("/usr/bin/python3")
        LAB.run("c1", "mount", "--bind", "/dev/null", python, user="root")
        try:
            job = LAB.sbatch("--nodelist=c1", "run_agent.slurm")
            LAB.ended(job)
        finally:
            LAB.run("c1", "umount", python, user="root")
        self.assertIn(
            "error: no python3 of 3.6 or later on c1", LAB.text("sentinel-%s.log" % job)
        )
        self.assertIn("ExitCode=1:0", LAB.run("login", "scontrol", "show", "job", job))

    def test_submitted_from_elsewhere_it_says_where_from_instead(self):
        job = LAB.run(
            "login", "sh", "-c", "cd utils && sbatch --parsable ../run_agent.slurm"
        )
        LAB.ended(job)
        self.assertRegex(
            LAB.text("utils/sentinel-%s.log" % job), "error: no agent.py in .*/utils:"
        )

    def test_the_dummy_task_runs_and_its_output_is_where_the_comment_says(self):
        job = LAB.sbatch("utils/run_dummy_task.slurm", "1")
        LAB.ended(job)
        text = LAB.text("dummy-%s.log" % job)
        for words in (
            "node    c1",
            "user    tester",
            "job     " + job,
            "folder  /home/tester",
            "this line went to stderr",
            "1 of 1 seconds",
            "done",
        ):
            self.assertIn(words, text)


class NetDebug(LabTest):
    """What it says is what is there, and the command that it ends with works."""

    place = "login"

    def report(self, *flags, env=()):
        """{candidate: what was found}, the whole text, and the command at its end."""
        job = LAB.sbatch("--nodelist=c1", *flags, "net_debug.slurm", env=env)
        LAB.ended(job)
        text = LAB.text("netdebug-%s.log" % job)
        found = text.partition("== Who answers")[2].partition("== So")[0]
        answers = dict(re.findall(r"(?m)^(\S+:\d+)\s+(.*)$", found))
        return answers, text, text.splitlines()[-1].strip()

    def test_with_a_master_on_the_login_node_its_last_line_is_what_to_submit(self):
        answers, text, command = self.report()
        self.assertRegex(answers["login:13579"], "^open ")
        self.assertRegex(
            answers["login:13580"], r"^refused +reachable, nothing listens"
        )
        self.assertRegex(answers["10.77.2.1:13579"], "^open +an address of login")
        for words in (
            "c1, Linux",
            "user tester",
            "Python 3",
            "eth0 10.77.2.11/24",
            "10.77.2.0/24 dev eth0",
            "login: 10.77.2.1",
            "SLURM_SUBMIT_HOST=login",
        ):
            self.assertIn(words, text)
        self.assertEqual(
            command, "SENTINEL_HOST=login SENTINEL_PORT=13579 sbatch run_agent.slurm"
        )
        LAB.run("login", "sh", "-c", command)
        self.shown("c1")

    def test_refused_unreachable_timed_out_and_unknown_are_told_apart(self):
        self.master.stop()
        try:
            with firewall("login", "in", "dport", "drop", "13581"):
                answers, text, command = self.report(
                    env=["SENTINEL_HOST=10.77.1.2,login:13581,no-such-host,127.0.0.1"]
                )
        finally:
            type(self).master = self.start_master()
        for candidate, answer in (
            ("10.77.1.2:13579", "unreachable +no way"),
            ("login:13581", "timed out +filtered"),
            ("no-such-host:13579", "no address +that name is unknown"),
            ("login:13579", "refused +reachable, nothing listens"),
            ("127.0.0.1:13579", "refused"),
        ):
            self.assertRegex(answers[candidate], "^" + answer)
        self.assertIn("listens on 127.0.0.1 of the login node only", text)
        self.assertEqual(
            command, "SENTINEL_HOST=login:13579,login:13580 sbatch run_agent.slurm"
        )
        LAB.run("login", "sh", "-c", command)
        eventually(self.browser.names)

    def test_where_nobody_can_be_reached_it_says_how_to_find_other_addresses(self):
        with firewall("login", "in", "dport", "reject with icmp type host-unreachable"):
            answers, _, command = self.report()
        self.assertRegex(answers["login:13580"], "^unreachable +no way")
        self.assertEqual(
            command, "SENTINEL_HOST=$(hostname -I | tr -s ' ' ,) sbatch net_debug.slurm"
        )
        self.assertRegex(LAB.run("login", "sh", "-c", command), "^Submitted batch job")

    def test_without_ip_and_getent_it_finds_the_same(self):
        os.mkdir(LAB.path("few"))
        for name in ("uname", "id", "sort", "grep", "env", "paste"):
            os.symlink(shutil.which(name), LAB.path("few", name))
        answers, text, command = self.report("--export=ALL,PATH=/home/tester/few")
        for words in (
            "10.77.2.11",
            "10.77.2.0 mask 255.255.255.0 via 0.0.0.0 dev eth0",
            "login: 10.77.2.1",
            "no python3",
        ):
            self.assertIn(words, text)
        self.assertRegex(answers["10.77.2.1:13579"], "^open ")
        self.assertEqual(
            command, "SENTINEL_HOST=login SENTINEL_PORT=13579 sbatch run_agent.slurm"
        )

    def test_called_inside_a_job_it_names_the_trap(self):
        outer = LAB.sbatch(
            "--nodelist=c1",
            "--output=outer.log",
            "--wrap",
            "sbatch --parsable --nodelist=c1 net_debug.slurm",
        )
        LAB.ended(outer)
        inner = LAB.text("outer.log").strip()
        LAB.ended(inner)
        self.assertIn(
            "SLURM_SUBMIT_HOST is this node, since sbatch was called inside a job",
            LAB.text("netdebug-%s.log" % inner),
        )


class SolutionB(LabTest):
    """The master on the laptop, a tunnel, and the bridge on the login node."""

    place = "laptop"

    def both_nodes_run(self, *flags, **more):
        return super().both_nodes_run(*flags, env=["SENTINEL_PORT=%d" % BRIDGE], **more)

    def test_both_nodes_are_shown_and_their_names_tell_them_apart(self):
        self.both_nodes_run()
        rows = self.browser.nodes()
        self.assertEqual({row["user"] for row in rows}, {"tester"})
        for row in rows:
            self.assertRegex(row["address"], r"'(127\.0\.0\.1|::1)'")

    def test_a_bridge_that_is_killed_and_started_again_has_all_agents_back_within_10_s(
        self,
    ):
        self.both_nodes_run()
        start = time.time()
        LAB.kill("login", "port_forward.py")
        self.bridge.stop()
        for node in ("c1", "c2"):
            self.event("lost", node, start)
        type(self).bridge = self.start_bridge()
        self.shown("c1", "c2", seconds=10)

    def test_a_master_that_is_started_again_has_all_agents_back_within_10_s(self):
        self.both_nodes_run()
        LAB.kill("laptop", "master_server.py")
        self.master.stop()
        type(self).master = self.start_master()
        self.shown("c1", "c2", seconds=10)

    def test_a_laptop_that_sleeps_for_60_s_has_all_agents_back_30_s_after_the_tunnel(
        self,
    ):
        job = self.both_nodes_run()
        start = time.time()
        LAB.must("cut", "laptop")
        for node in ("c1", "c2"):
            self.event("lost", node, start, 8)
        self.assertEqual(self.tunnel.wait(30), 255)  # ServerAliveInterval has noticed
        log = "sentinel-%s.log" % job
        eventually(lambda: LAB.text(log).count("no answer for 10 s") == 2, 20)
        stays(lambda: self.browser.nodes() == [], start + 60 - time.time())
        LAB.must("heal", "laptop")
        healed = time.time()
        while True:  # as a user does: again, until the old sshd has given up
            try:
                type(self).tunnel = self.start_tunnel()
                break
            except AssertionError:
                self.assertLess(time.time() - healed, 60)
        self.shown("c1", "c2", seconds=30)
        stays(lambda: self.browser.names() == ["c1", "c2"], 3, "one row each")


class OneCommand(LabTest):
    """Solution B with no file on the login node: the bridge comes through ssh's standard input."""

    place = "laptop"

    @classmethod
    def start_all(cls):
        super().start_all()
        cls.tunnel.stop()
        cls.bridge.stop()
        LAB.run(
            "login",
            "/usr/sbin/sshd",
            "-f",
            os.path.join(LAB.dir, "etc/ssh/sshd_config"),
            "-o",
            "Port=2222",
            "-o",
            "PidFile=/run/sshd2.pid",
            "-o",
            "ClientAliveInterval=1",
            "-o",
            "ClientAliveCountMax=2",
            user="root",
        )  # one that gives up soon

    def one_command(self, *flags):
        with open(os.path.join(support.ROOT, "port_forward.py")) as script:
            ssh = LAB.start(
                "laptop",
                "ssh",
                *flags,
                "-o",
                "ExitOnForwardFailure=yes",
                "-R",
                "%d:localhost:%d" % (PORT, PORT),
                "login",
                "python3 - --local-port %d --remote-port %d" % (BRIDGE, PORT),
                stdin=script,
            )
        self.addCleanup(ssh.stop)
        self.assertEqual(ssh.listening(), BRIDGE)
        return ssh

    def test_it_works_and_ends_with_the_ssh_that_started_it(self):
        LAB.run("login", "mv", "port_forward.py", "hidden.py")
        self.addCleanup(LAB.run, "login", "mv", "hidden.py", "port_forward.py")
        ssh = self.one_command()
        self.both_nodes_run(env=["SENTINEL_PORT=%d" % BRIDGE])
        ssh.stop()
        self.bridge_ends()

    def test_it_ends_when_ssh_is_killed_and_when_sshd_gives_up_on_a_cut_network(self):
        for name in ("kill -9", "cut"):
            with self.subTest(name):
                ssh = self.one_command(*(["-p", "2222"] if name == "cut" else []))
                if name == "cut":
                    LAB.must("cut", "laptop")
                else:
                    for pid in support.descendants(ssh.pid):
                        os.kill(pid, signal.SIGKILL)
                self.bridge_ends()

    def bridge_ends(self):
        eventually(lambda: not LAB.listens("login", BRIDGE), what="the bridge ends")
        eventually(lambda: not LAB.pids("login", "-"), what="and so does its process")


# What the far end of the tunnel does with each connection: send all that comes back.
ECHO = """
import socket, threading
def echo(sock):
    buffer = bytearray(1 << 18)
    while True:
        count = sock.recv_into(buffer)
        if not count:
            break
        sock.sendall(memoryview(buffer)[:count])
    sock.shutdown(socket.SHUT_WR)
listener = socket.socket()
listener.bind(("127.0.0.1", %d))
listener.listen(1024)
print("listening on 127.0.0.1:%d", flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""
# Runs on a compute node: bytes out and back, compared.
COMPARE = """
import os, socket, sys, threading
def call():
    return socket.create_connection(("login", %d), 60)
if sys.argv[1] == "one":
    data, back, sock = os.urandom(1 << 20) * 64, bytearray(), call()
    threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))).start()
    while len(back) < len(data):
        back += sock.recv(1 << 18) or sys.exit("it ended early")
    assert bytes(back) == data and not sock.recv(1), "not what was sent"
else:
    socks = [call() for _ in range(300)]
    for number, sock in enumerate(socks):
        sock.sendall(b"connection %%5d" %% number)
    for number, sock in enumerate(socks):
        back = b""
        while len(back) < 16:
            back += sock.recv(16 - len(back)) or sys.exit("it ended early")
        assert back == b"connection %%5d" %% number, back
print("as it was sent")
"""


class Bytes(LabTest):
    """From a compute node over the bridge and the tunnel to the laptop and back."""

    @classmethod
    def start_all(cls):
        echo = LAB.start("laptop", "python3", "-c", ECHO % (PORT, PORT))
        cls.tools.callback(echo.stop)
        eventually(lambda: LAB.listens("laptop", PORT))
        for tool in (cls.start_tunnel(), cls.start_bridge()):
            cls.tools.callback(tool.stop)

    def compare(self, what):
        return LAB.run("login", "srun", "-Q", "python3", "-c", COMPARE % BRIDGE, what)

    def test_64_mib_both_ways_at_once_are_byte_exact(self):
        self.assertEqual(self.compare("one"), "as it was sent")

    def test_300_connections_at_once_each_get_their_own_bytes(self):
        self.assertEqual(self.compare("many"), "as it was sent")


if __name__ == "__main__":
    unittest.main()
