"""Alert storms: a thousand nodes lost at once are one call of the command, and names stay data."""

import collections
import glob
import os
import queue
import resource
import shutil
import signal
import tempfile
import time
import unittest

import beside
import support
from support import MasterTest, PlainAgent, eventually, events, get, nodes, stays

import master_server
from test_trust import Witness

load_tests = beside.load_tests  # in a process of its own: it mostly waits

NODES = 1000
SLOW = 60  # seconds that a thousand of anything may take on a busy machine

# A thousand agents in one process, for a SIGKILL that takes them all at once.
CROWD = """
import pickle, socket, sys, time
port, count, cpu = map(int, sys.argv[1:4])
socks = []
for number in range(count):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(pickle.dumps({"cpu": 1, "ram": 1, "version": "1.0", "interval": 60, "job": "7",
                               "node": "c%04d" % number, "ack": True}, 2))
    assert sock.recv(64).endswith(b"ok\\n")
    socks.append(sock)
print("all in", flush=True)
sys.stdin.read(1)
for number, sock in enumerate(socks):
    sock.sendall(pickle.dumps({"cpu": cpu, "ram": 1, "version": "1.0", "interval": 60, "job": "7",
                               "node": "c%04d" % number}, 2))
print("sent", flush=True)
time.sleep(600)
"""
# What the command is told, one file for each call; the file "slow" makes it hang.
TELL = """
env | grep ^SENTINEL_ | sort > "$TOLD/new.$$" && mv "$TOLD/new.$$" "$TOLD/told.$$"
if [ -e "$TOLD/slow" ]; then sleep 600; fi
"""


class Storm(MasterTest):
    """Real agents by the thousand, real commands."""

    flags = ("--alert", "cpu>50", "--alert-command", TELL)
    patch = "master_server.COMMAND_SECONDS = 3.0"

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="sentinel-storm-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.env = {"TOLD": cls.folder}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        cls.addClassCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        super().setUpClass()

    def setUp(self):
        for path in glob.glob(self.folder + "/*"):
            os.unlink(path)

    def calls(self, **wanted):
        """What the command was told: a dict for each call that has these facts."""
        found = []
        for path in sorted(glob.glob(self.folder + "/told.*"), key=os.path.getmtime):
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                facts = dict(
                    line.partition("=")[::2] for line in file.read().splitlines()
                )
            found.append({key[9:].lower(): value for key, value in facts.items()})
        return [
            call
            for call in found
            if all(call.get(key) == value for key, value in wanted.items())
        ]

    def counted(self, **wanted):
        return sum(int(call["count"]) for call in self.calls(**wanted))

    def crowd(self, cpu=1):
        crowd = support.start(
            "-c", CROWD, self.master.port, NODES, cpu, stdin=support.subprocess.PIPE
        )
        self.addCleanup(crowd.process.stdin.close)
        self.addCleanup(crowd.kill)
        eventually(lambda: "all in" in crowd.out, SLOW)
        return crowd

    def assertFewCalls(self, seconds, **wanted):
        """One call; one more for each 5 s that a slow machine took to lose them all."""
        calls = self.calls(**wanted)
        self.assertLessEqual(
            len(calls), 1 + seconds // master_server.STORM_SECONDS, calls
        )

    @support.slow("a thousand nodes")
    def test_a_thousand_nodes_lost_at_once_are_one_call(self):
        crowd = self.crowd()
        with Witness(self.master.port) as witness:
            start = time.monotonic()
            crowd.send_signal(signal.SIGKILL)
            eventually(lambda: len(nodes(self.master.page)) <= 1, SLOW)
            seconds = time.monotonic() - start
            eventually(lambda: self.counted(event="lost") == NODES, SLOW)
            stays(lambda: self.counted(event="lost") == NODES, 1.5)
            self.assertFewCalls(seconds, event="lost")
            call = self.calls(event="lost")[0]
            self.assertEqual((call["metric"], call["job"]), ("lost", "7"))
            self.assertRegex(call["node"], r"^(c\d{4} ){20}\.\.\.$")
            self.assertEqual(get(self.master.page, "/healthz").text, "ok\n")
            witness.check()
        self.assertNotIn("stuck", self.master.log)

    @support.slow("a thousand nodes")
    def test_a_thousand_nodes_over_a_threshold_are_one_call_and_one_when_it_hung_before(
        self,
    ):
        crowd = self.crowd(cpu=99)
        open(self.folder + "/slow", "w").close()
        with PlainAgent(self.master.port) as agent:
            agent.send({"cpu": 98, "ram": 1, "node": "first", "ack": True})
            self.assertEqual(agent.read_line(), "ok")
            eventually(lambda: self.calls(node="first"))
            start = time.monotonic()
            crowd.process.stdin.write(b"x")
            crowd.process.stdin.flush()
            eventually(lambda: "sent" in crowd.out, SLOW)
            eventually(
                lambda: (
                    len([row for row in nodes(self.master.page) if row["cpu"] == 99])
                    == NODES
                ),
                SLOW,
            )
            seconds = time.monotonic() - start
            os.unlink(self.folder + "/slow")
            self.master.logged("alert command failed: killed after 3 s", SLOW)
            self.assertLess(time.monotonic() - start, 10 + seconds)
            eventually(lambda: self.counted(event="alert") == NODES + 1, SLOW)
            stays(lambda: self.counted(event="alert") == NODES + 1, 1.5)
            self.assertLessEqual(
                len(self.calls(event="alert")),
                2 + seconds // master_server.STORM_SECONDS,
            )
            call = self.calls(event="alert")[-1]
            self.assertEqual((call["metric"], call["threshold"]), ("cpu", "50.0"))

    def test_a_few_alerts_are_told_one_by_one(self):
        names = ["few%d" % number for number in range(3)]
        agents = [self.agent() for _ in names]
        for name, agent in zip(names, agents):
            agent.send({"cpu": 77, "ram": 1, "node": name})
        eventually(lambda: len(self.calls(event="alert")) == 3)
        self.assertEqual(
            {call["node"] for call in self.calls(event="alert")}, set(names)
        )
        self.assertEqual({call["count"] for call in self.calls(event="alert")}, {"1"})

    def test_hostile_names_in_a_storm_stay_data(self):
        marker = os.path.join(self.folder, "pwned")
        names = [
            "$(touch %s)" % marker,
            "`touch %s`" % marker,
            "; touch %s;" % marker,
            "'; touch %s; '" % marker,
            '"; touch %s; "' % marker,
            "| touch %s" % marker,
            "&& touch %s" % marker,
            "\n touch %s\n" % marker,
            "${IFS}touch",
            "-rf /",
            "%n%s",
            "\\",
            "ünï\u20ac",
            "a\0b\x1b[2J",
            "=PATH=/tmp",
            "x" * 255,
            "\u202eevil",
            "🚨" * 30,
        ]
        agents = [self.agent() for _ in names]
        for name, agent in zip(names, agents):
            agent.send(
                {"cpu": 88, "ram": 1, "node": name, "job": name[:20], "ack": True}
            )
            self.assertEqual(agent.read_line(), "ok")
        eventually(lambda: self.counted(event="alert") == len(names))
        self.assertFalse(os.path.exists(marker))
        told = " ".join(call["node"] for call in self.calls(event="alert"))
        for name in names[:7] + names[8:13]:
            self.assertIn(name[:64] if name.isascii() else name, told)
        self.assertNotIn("\x1b", told + self.master.log)
        for call in self.calls(event="alert"):
            self.assertEqual(
                set(call),
                set("event node job metric value threshold text count".split()),
            )
            self.assertLess(sum(map(len, call.values())), 5000)


class Locale(MasterTest):
    """A shell whose locale knows ASCII alone."""

    env = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": None,
    }
    flags = ("--alert", "cpu>50", "--alert-command", "env | grep ^SENTINEL_NODE= >&2")

    def test_a_name_that_the_locale_cannot_write_is_told_all_the_same(self):
        for number, name in enumerate(("plain", "ünï", "🚨", "again")):
            agent = self.agent()
            agent.send({"cpu": 90 + number, "ram": 1, "node": name})
            self.master.logged("SENTINEL_NODE=" + name)
            self.row(node=name)
        eventually(lambda: len(events(self.master.page, "alert")) == 4)


class Queue(unittest.TestCase):
    """What waits for the command is bounded, and nobody waits for it."""

    def test_posting_never_blocks_and_takes_no_memory_without_end(self):
        class Idle(master_server.CommandRunner):
            def run(self):
                pass

        runner = Idle("true")
        alert = master_server.Alert("lost", "n", "", "lost", "", "", "")
        start = time.monotonic()
        for _ in range(master_server.MAX_ALERTS + 5000):
            runner.post(alert)
        self.assertLess(time.monotonic() - start, 5)
        self.assertEqual(runner.alerts.qsize(), master_server.MAX_ALERTS)
        self.assertIsInstance(runner.alerts, queue.Queue)


class Pinned(MasterTest):
    """The threads of a busy collector share a CPU; what it starts, and one that rests, do not."""

    flags = (
        "--alert",
        "cpu>50",
        "--alert-command",
        "grep Cpus_allowed: /proc/self/status > $TOLD/new && mv $TOLD/new $TOLD/cpus",
    )
    patch = """
import os
class Cpu(float):
    def __truediv__(self, by):
        return self
    def __mul__(self, seconds):
        return -1.0 if os.path.exists(os.environ["TOLD"] + "/busy") else 1e9
master_server.PIN_SECONDS, master_server.PIN_CPU = 0.3, Cpu()
"""

    @classmethod
    def setUpClass(cls):
        if len(os.sched_getaffinity(0)) < 2:
            raise unittest.SkipTest("missing here: two CPUs")
        cls.folder = tempfile.mkdtemp(prefix="sentinel-pin-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.env = {"TOLD": cls.folder}
        super().setUpClass()
        cls.pid = int(cls.master.logged(r"collector started, pid (\d+)").group(1))

    def where(self):
        """How many threads of the collector may use which CPUs."""
        tids = map(int, os.listdir("/proc/%d/task" % self.pid))
        return collections.Counter(frozenset(os.sched_getaffinity(tid)) for tid in tids)

    def test_only_while_it_is_busy(self):
        every = frozenset(os.sched_getaffinity(0))
        agents = [self.agent() for _ in range(6)]
        for number, agent in enumerate(agents):
            agent.send(
                {"cpu": 1.0, "ram": 1.0, "node": "p%d" % number, "interval": 60.0}
            )
        eventually(
            lambda: self.where() == {every: 8}, what="six peers, main, the command's"
        )
        with open(self.folder + "/busy", "w"):
            pass
        for cpu in sorted(every)[-2:]:  # the peers follow the main thread
            os.sched_setaffinity(self.pid, {cpu})
            eventually(
                lambda here=frozenset([cpu]): self.where() == {every: 1, here: 7}
            )
        agents[0].send({"cpu": 99.0, "ram": 1.0, "node": "p0", "interval": 60.0})
        eventually(lambda: os.path.exists(self.folder + "/cpus"))
        with open(self.folder + "/cpus") as told, open("/proc/self/status") as own:
            self.assertIn(told.read(), own.read())
        os.sched_setaffinity(self.pid, every)
        os.unlink(self.folder + "/busy")
        eventually(lambda: self.where() == {every: 8}, what="all on every CPU again")


if __name__ == "__main__":
    unittest.main()
