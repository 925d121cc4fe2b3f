"""Whatever dies or stalls, the rest goes on, and the picture is right again within seconds.

What must happen.  "the others": every agent that has nothing to do with the victim.

            SIGKILL                     SIGSTOP for 10 s, SIGCONT       killed inside the lock
  -----------------------------------------------------------------------------------------------
  supervisor  its roles and a hanging   nothing: samples, page and      it never holds it; as
            command end; a new master   alerts go on; then it super-    SIGKILL, whoever holds it
            takes ports and segment     vises again                     then
  collector  started again in 5 s; the  /healthz is 503 and the page    the others give up in 2 s,
            page answers all the time;  says so; then the same process  the supervisor makes a new
            agents back in 10 s; its    goes on, nobody is lost         lock, clean slots and
            command does not outlive                                    starts both; events stay,
            its limit                                                   agents come back
  dashboard  started again in 5 s; no   no page; no agent notices;      the same
            agent notices               then it answers
  command   a line with the reason;     killed at its limit; the next   it never holds it; as
            the next alert is told      alert is told                   SIGKILL
  agent     lost at once; the others    lost in 5.5 s; then resolved    it never holds it; as
            do not notice                                               SIGKILL
  bridge    its agents are lost, and    its agents are lost in 5.5 s,   it never holds it; as
            back with a new bridge      then back; the others do not    SIGKILL
                                        notice

A role that is stopped inside the lock is as good as killed: it is replaced.  And the machine:
/dev/shm full, no descriptors, no threads, the clock set back: one clear line each, no wrong
number, recovery when it passes.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import threading
import time
import unittest

import beside
import support
from support import (
    HOST,
    PlainAgent,
    alive,
    descendants,
    eventually,
    events,
    get,
    nodes,
    page_text,
    requires,
    row_of,
    stays,
)

import master_server
from test_trust import Witness

load_tests = beside.load_tests  # in a process of its own: it mostly waits

SEED = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
BACK = 8  # seconds until a killed role answers again; 5 on an idle machine
SHOWN = 15  # seconds until agents are shown again; 10 on an idle machine
FRESH = 4.0  # seconds: an older row of a live agent is a stale one
STOPPED = 10  # seconds from SIGSTOP to SIGCONT
LIMIT = 4.0  # seconds that an alert command gets here, instead of 30
NOISE = "Traceback|resource_tracker|leaked|Exception ignored|Warning:|a defect"


class World:
    """A master, a real agent, one through a bridge, a witness; and the pid of each part."""

    def __init__(self, *flags, patch="", bridge=False, **more):
        self.stack = contextlib.ExitStack()
        self.folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        command = (
            'echo "$SENTINEL_NODE $$" >> "$TOLD/pids"; sleep 600 & sleep 600; wait'
        )
        self.master = self.add(
            support.start_master(
                "--alert",
                "gpu>95",
                "--alert-command",
                command,
                *flags,
                patch="master_server.COMMAND_SECONDS = %s\n%s" % (LIMIT, patch),
                env={"TOLD": self.folder},
                **more,
            )
        )
        self.agent = self.add(
            support.start(
                "agent.py",
                "--port",
                self.master.port,
                "--name",
                "direct",
                "--interval",
                "0.5",
            )
        )
        if bridge:
            self.bridge_port = 0
            self.start_bridge()
            self.bridged = self.add(
                support.start(
                    "agent.py",
                    "--port",
                    self.bridge_port,
                    "--name",
                    "bridged",
                    "--interval",
                    "0.5",
                )
            )
        self.names = {"direct", "bridged"} if bridge else {"direct"}
        eventually(self.shown)

    def add(self, tool):
        self.stack.callback(tool.kill)
        return tool

    def start_bridge(self):
        self.bridge = self.add(
            support.start(
                "port_forward.py",
                "--host",
                HOST,
                "--local-port",
                self.bridge_port,
                "--remote-port",
                self.master.port,
            )
        )
        self.bridge_port = self.bridge.listening()

    def close(self):
        for pid in [int(pid) for _, pid in self.commands()]:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # whatever a failed test has left
        self.master.stop()
        self.stack.close()
        with contextlib.suppress(FileNotFoundError):  # of a master that was killed
            os.unlink("/dev/shm/sentinel_%d" % self.master.port)

    def pid(self, role):
        """The pid of a role's latest process."""
        return int(re.findall(r"%s started, pid (\d+)" % role, self.master.log)[-1])

    def row(self, node):
        return row_of(self.master.page, node=node)

    def shown(self, *names):
        """Whether each of its agents has one row, and a fresh one."""
        rows = [row for row in nodes(self.master.page) if row["node"] in self.names]
        wanted = set(names) or self.names
        return sorted(row["node"] for row in rows) == sorted(
            {row["node"] for row in rows}
        ) and wanted <= {row["node"] for row in rows if row["age"] < FRESH}

    def healthy(self):
        return get(self.master.page, "/healthz", seconds=3).status == 200

    def recovered(self, what=""):
        eventually(lambda: self.healthy() and self.shown(), SHOWN, what)

    def commands(self):
        """[(node, pid)] of the alert commands so far."""
        try:
            with open(os.path.join(self.folder, "pids")) as file:
                return [line.split() for line in file.read().splitlines()]
        except OSError:
            return []

    def alert(self, node):
        """Have the node cross the rule; returns the pid of the command that is told of it."""
        with PlainAgent(self.master.port) as agent:
            agent.send({"cpu": 1, "ram": 1, "gpu": 99, "node": node, "ack": True})
            assert agent.read_line() == "ok"
        return int(
            eventually(
                lambda: dict(self.commands()).get(node),
                LIMIT + SHOWN,
                "the command is told of " + node,
            )
        )

    def events(self, kind, node):
        return [
            event for event in events(self.master.page, kind) if event["node"] == node
        ]

    def end(self):
        """Stop the master; it must have been an ordinary end."""
        code = self.master.stop()
        assert code == 0, self.master.log
        assert not re.search(NOISE, self.master.log), self.master.log


def signalled(pid, number):
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def stopped(pid):
    """SIGSTOP for ten seconds, counted from the begin; then SIGCONT."""
    start = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        time.sleep(max(0.0, STOPPED - (time.monotonic() - start)))
    finally:
        signalled(pid, signal.SIGCONT)


def no_answer(port):
    """Whether the dashboard takes no notice of a request for half a second."""
    try:
        get(port, "/healthz", seconds=0.5)
    except OSError:
        return True
    return False


# ==========================================================================================
# The table: one function for each pair
# ==========================================================================================


def kill_supervisor(world):
    command = world.alert("hot")
    roles = [pid for pid in descendants(world.master.pid) if pid != command]
    family = [command, *descendants(command)]
    world.master.send_signal(signal.SIGKILL)
    eventually(lambda: not any(map(alive, roles)), BACK, "the roles end")
    eventually(lambda: not any(map(alive, family)), LIMIT + BACK, "the command ends")
    world.master.kill()
    ports = ("--port", world.master.port, "--dashboard-port", world.master.page)
    world.master = world.add(support.start_master(*ports))
    eventually(world.shown, SHOWN + 15, "agents come back by themselves")
    world.end()


def kill_collector(world):
    answers, ended = [], threading.Event()

    def ask():
        while not ended.wait(0.05):
            answers.append(get(world.master.page, "/healthz").status)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    world.stack.callback(ended.set)
    command = world.alert("hot")
    family, dashboard = [command, *descendants(command)], world.pid("dashboard")
    before = world.pid("collector")
    os.kill(before, signal.SIGKILL)
    eventually(lambda: world.pid("collector") != before, BACK)
    world.recovered()
    eventually(lambda: not any(map(alive, family)), LIMIT + BACK, "the command ends")
    ended.set()
    asking.join()
    assert set(answers) <= {200, 503} and len(answers) > 20, answers
    assert world.pid("dashboard") == dashboard
    world.alert("hot-again")
    world.end()


def kill_dashboard(world):
    with Witness(world.master.port) as witness:
        eventually(lambda: world.row("witness"))
        since, before = world.row("direct")["since"], world.pid("dashboard")
        os.kill(before, signal.SIGKILL)
        eventually(lambda: world.pid("dashboard") != before and world.healthy(), BACK)
        assert world.row("direct")["since"] == since and world.shown()
        witness.check()
        assert not events(world.master.page, "lost")
    world.end()


def kill_command(world):
    os.kill(world.alert("hot"), signal.SIGKILL)
    world.master.logged("alert command failed: .*signal 9", LIMIT)
    os.kill(world.alert("hot-again"), signal.SIGKILL)
    world.end()


def kill_agent(world):
    with Witness(world.master.port) as witness:
        world.agent.send_signal(signal.SIGKILL)
        eventually(
            lambda: not world.row("direct") and world.events("lost", "direct"), 3
        )
        witness.check()
    world.end()


def kill_bridge(world):
    with Witness(world.master.port) as witness:
        world.bridge.kill()
        eventually(
            lambda: not world.row("bridged") and world.events("lost", "bridged"), 3
        )
        assert world.shown("direct")
        world.start_bridge()
        eventually(lambda: world.shown("bridged"), SHOWN, "back with a new bridge")
        assert not world.events("lost", "direct")
        witness.check()
    world.end()


def stop_supervisor(world):
    with Witness(world.master.port) as witness:
        with stopped(world.master.pid):
            world.alert("hot")
            stays(lambda: world.shown() and world.healthy(), 5)
        witness.check()
    before = world.pid("dashboard")
    os.kill(before, signal.SIGKILL)
    eventually(lambda: world.pid("dashboard") != before and world.healthy(), BACK)
    world.end()


def stop_collector(world):
    before = world.pid("collector")
    with stopped(before):
        answer = eventually(
            lambda: not world.healthy() and get(world.master.page, "/healthz"), 8
        )
        assert answer.status == 503 and "collector" in answer.text, answer
        assert re.search(r"(?i)collector has \w+", page_text(world.master.page))
        stays(lambda: not world.healthy(), 1)
        assert all(row["age"] > 2 for row in nodes(world.master.page)), (
            "old numbers have an age"
        )
    world.recovered()
    assert not re.search(r"(?i)collector has \w+", page_text(world.master.page))
    world.end()


def stop_dashboard(world):
    with Witness(world.master.port) as witness:
        eventually(lambda: world.row("witness"))
        since = world.row("direct")["since"]
        with stopped(world.pid("dashboard")):
            eventually(lambda: no_answer(world.master.page), 3)
        eventually(world.healthy, BACK)
        eventually(world.shown, 3)
        assert world.row("direct")["since"] == since
        assert not events(world.master.page, "lost")
        witness.check()
    world.end()


def stop_command(world):
    command = world.alert("hot")
    family = [command, *descendants(command)]
    with stopped(command):
        world.master.logged("alert command failed: killed after 4 s", LIMIT + 5)
        eventually(lambda: not any(map(alive, family)), 3)
        world.alert("hot-again")
    world.end()


def stop_agent(world):
    with Witness(world.master.port) as witness:
        with stopped(world.agent.pid):
            eventually(
                lambda: not world.row("direct") and world.events("lost", "direct"), 8
            )
        eventually(lambda: world.shown() and world.events("resolved", "direct"), SHOWN)
        witness.check()
    world.end()


def stop_bridge(world):
    with Witness(world.master.port) as witness:
        with stopped(world.bridge.pid):
            eventually(
                lambda: not world.row("bridged") and world.events("lost", "bridged"), 8
            )
            assert world.shown("direct")
        eventually(lambda: world.shown("bridged", "direct"), SHOWN + 10)
        assert not world.events("lost", "direct")
        witness.check()
    world.end()


class Column:
    """Scenarios that are played side by side, each in a world of its own."""

    def __init__(self, *scenarios):
        self.failures = {}
        self.threads = {
            scenario.__name__: threading.Thread(
                target=self.play, args=(scenario,), daemon=True
            )
            for scenario in scenarios
        }
        for thread in self.threads.values():
            thread.start()

    def play(self, scenario):
        log = ""
        try:
            world = World(bridge="bridge" in scenario.__name__)
            try:
                scenario(world)
            finally:
                log = world.master.log[-3000:]
                world.close()
        except (
            BaseException
        ) as error:  # also a SystemExit is one that the test has to tell
            self.failures[scenario.__name__] = "%s: %s\n%s" % (
                type(error).__name__,
                error,
                log,
            )

    def check(self, test):
        for name, thread in self.threads.items():
            thread.join(300)
            with test.subTest(name):
                test.assertNotIn(name, self.failures, self.failures.get(name))
                test.assertFalse(thread.is_alive(), "it came to no end")


@support.slow("a kill at any moment")
class Table(unittest.TestCase):
    """The first two columns; while the stopped ones wait, the others are killed."""

    @classmethod
    def setUpClass(cls):
        cls.stopped = Column(
            stop_supervisor,
            stop_collector,
            stop_dashboard,
            stop_command,
            stop_agent,
            stop_bridge,
        )

    def test_a_killed_process_is_replaced_and_nobody_else_notices(self):
        Column(
            kill_supervisor,
            kill_collector,
            kill_dashboard,
            kill_command,
            kill_agent,
            kill_bridge,
        ).check(self)

    def test_a_process_that_is_stopped_for_ten_seconds_goes_on_afterwards(self):
        self.stopped.check(self)


# ==========================================================================================
# The third column: inside the lock
# ==========================================================================================

# Writing a slot, and the begin of a copy, take up to 40 ms, all of it inside the lock, and for
# that long there is a file with the name of the process: so a test can tell which moment it hit.
SLOW_LOCK = """
import os, random, time

class Slow:
    def __init__(self, layout, slow):
        self.layout, self.slow = layout, slow

    def __getattr__(self, name):
        value = getattr(self.layout, name)
        return self.slowly(value) if name == self.slow else value

    @staticmethod
    def slowly(act):
        def slow_act(*args):
            inside = os.path.join(os.environ["TOLD"], "inside.%d" % os.getpid())
            open(inside, "w").close()
            time.sleep(random.random() * 0.04)
            result = act(*args)
            os.unlink(inside)
            return result
        return slow_act

master_server.SLOT = Slow(master_server.SLOT, "pack_into")
master_server.COUNTS = Slow(master_server.COUNTS, "unpack_from")
master_server.LOCK_SECONDS = master_server.MAX_BACKOFF = 0.5
master_server.STOP_SECONDS = 1.0
master_server.FRESH_SECONDS = 0.01
"""


@support.slow("a kill at any moment")
class InsideTheLock(unittest.TestCase):
    """Ends at random moments of a master that is inside the lock most of the time."""

    def setUp(self):
        self.world = World(patch=SLOW_LOCK)
        self.addCleanup(self.world.close)
        self.chance = random.Random(SEED)
        self.ended = threading.Event()
        asking = threading.Thread(target=self.ask, daemon=True)
        asking.start()
        self.addCleanup(asking.join)
        self.addCleanup(self.ended.set)

    def ask(self):
        """Keep the dashboard busy with copies, and wrong rows noticed."""
        while not self.ended.wait(0.01):
            with contextlib.suppress(OSError, support.http.client.HTTPException):
                for row in nodes(self.world.master.page):
                    if row["node"] not in self.known or not 0 <= row["cpu"] <= 100:
                        self.wrong = row

    known = ("direct", "direct-hot", "witness", "load0", "load1")
    wrong = None

    def stuck(self):
        return self.world.master.log.count("exit code 75")

    def stop_inside(self, role):
        """Stop the role at random moments until it is inside the lock; its pid."""
        pid = self.world.pid(role)
        inside = os.path.join(self.world.folder, "inside.%d" % pid)
        for _ in range(500):
            time.sleep(self.chance.uniform(0.002, 0.06))
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: support._stat(pid)[0] == "T", 5)
            if os.path.exists(inside):
                return pid
            os.kill(pid, signal.SIGCONT)
        raise AssertionError("the %s was never met inside the lock" % role)

    def strike(self, role, kill):
        """Kill the role inside the lock, or leave it stopped there: it must be replaced."""
        before = self.stuck()
        with Witness(self.world.master.port):
            pid = self.stop_inside(role)
            if kill:
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: self.stuck() > before, BACK, "the lock was stuck")
            eventually(lambda: self.world.pid(role) != pid, BACK, "it was replaced")
        self.world.recovered("seed %d, %s" % (SEED, role))
        self.assertFalse(alive(pid))
        self.assertIsNone(self.wrong)
        self.assertTrue(self.world.events("connected", "direct"), "events stay")

    def test_roles_that_are_killed_or_stopped_inside_the_lock_are_recovered_from(self):
        for role in ("collector", "dashboard"):
            for kill in (True, True, False):
                with self.subTest(role, killed=kill):
                    self.strike(role, kill)
        self.world.end()

    def test_who_never_holds_the_lock_leaves_it_alone_at_any_moment(self):
        agents = {
            "load%d" % number: support.start(
                "agent.py",
                "--port",
                self.world.master.port,
                "--name",
                "load%d" % number,
                "--interval",
                "0.1",
            )
            for number in range(2)
        }
        for name, agent in agents.items():
            self.addCleanup(agent.kill)
            eventually(lambda n=name: self.world.row(n))
            time.sleep(self.chance.uniform(0, 0.2))
            agent.send_signal(signal.SIGKILL)
            eventually(lambda n=name: not self.world.row(n), 3)
        os.kill(self.world.alert("direct-hot"), signal.SIGKILL)
        self.assertEqual(self.stuck(), 0)
        children = descendants(self.world.master.pid)
        time.sleep(self.chance.uniform(0, 0.2))
        self.world.master.send_signal(signal.SIGKILL)
        eventually(lambda: not any(map(alive, children)), LIMIT + BACK)


# ==========================================================================================
# The machine: /dev/shm, descriptors, threads, the clock
# ==========================================================================================

IN_SMALL_SHM = """
import os, sys
os.execvp("unshare", ["unshare", "-m", "sh", "-c",
    'mount -t tmpfs -o size=%s tmpfs /dev/shm && exec "$@"', "sh", sys.executable] + sys.argv[1:])
"""


def shm_of(pid):
    """The /dev/shm of a process, which may have one of its own: proc(5), /proc/PID/root."""
    return os.path.join("/proc", str(pid), "root", "dev", "shm")


# of /dev/shm: a table of 64 slots, its lock, and some hundred KiB
ROOMY = "%dk" % (master_server.Table.size_for(64) // 1024 + 512)


@requires("root", "unshare")
class SharedMemoryFull(unittest.TestCase):
    """/dev/shm of a few KiB, in a mount namespace of the test's own."""

    def start(self, size, *flags):
        """A master whose /dev/shm has that size."""
        tool = support.start(
            "-c",
            IN_SMALL_SHM % size,
            os.path.join(support.ROOT, "master_server.py"),
            "--port",
            0,
            "--dashboard-port",
            0,
            *flags,
        )
        self.addCleanup(tool.stop)
        return tool

    def test_too_little_room_at_the_start_is_one_line_that_names_the_cure(self):
        for size in ("16k", "64k", "512k"):
            with self.subTest(size):
                tool = self.start(size)
                self.assertEqual(tool.wait(), 1, tool.log)
                self.assertRegex(
                    tool.log, r"\Aerror: [^\n]*/dev/shm[^\n]*--max-agents[^\n]*\n\Z"
                )

    @support.slow("every size")
    def test_every_size_from_too_little_to_enough_is_an_error_or_a_master(self):
        """Between the two there is room for the table, and none for a semaphore."""
        results = []
        table = master_server.Table.size_for(16) // 1024
        for size in range(table - 4, table + 12, 4):
            tool = self.start("%dk" % size, "--max-agents", "16")
            try:
                eventually(
                    lambda t=tool: t.code is not None or "dashboard started" in t.log
                )
            finally:
                code = tool.stop()
            results.append(code)
            self.assertNotRegex(tool.log, NOISE)
            if code:
                self.assertRegex(tool.log, r"(?m)^error: [^\n]*/dev/shm[^\n]*$")
        self.assertEqual((results[0], results[-1]), (1, 0), results)

    def test_a_table_that_was_made_has_its_room_for_good(self):
        tool = self.start(ROOMY, "--max-agents", "64")
        port, page = tool.listening("collector"), tool.listening("dashboard")
        eventually(lambda: get(page, "/healthz").status == 200)
        shm = shm_of(tool.pid)
        filler = open(os.path.join(shm, "filler"), "wb", 0)
        self.addCleanup(filler.close)
        with contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        with contextlib.ExitStack() as stack:
            for number in range(64):
                agent = stack.enter_context(PlainAgent(port))
                agent.send(
                    {"cpu": number, "ram": 1, "node": "n%d" % number, "ack": True}
                )
                self.assertEqual(agent.read_line(), "ok")
            eventually(lambda: {row["cpu"] for row in nodes(page)} == set(range(64)))
            collector = int(re.findall(r"collector started, pid (\d+)", tool.log)[-1])
            os.kill(collector, signal.SIGKILL)
            eventually(
                lambda: (
                    tool.log.count("collector started") > 1
                    and get(page, "/healthz").status == 200
                ),
                BACK,
                "without any new room",
            )
        self.assertEqual(tool.stop(), 0)
        self.assertNotRegex(tool.log, NOISE)

    @support.slow("waits for limits")
    def test_a_new_lock_for_which_there_is_no_room_is_told_and_made_later(self):
        tool = self.start(ROOMY, "--max-agents", "64")
        port, page = tool.listening("collector"), tool.listening("dashboard")
        eventually(lambda: get(page, "/healthz").status == 200)
        collector = int(tool.logged(r"collector started, pid (\d+)").group(1))
        lock = open(
            semaphore(collector), "rb"
        )  # its room is taken until this is closed
        self.addCleanup(lock.close)
        filler = os.path.join(shm_of(tool.pid), "filler")
        with open(filler, "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        self.assertTrue(hold_lock(collector, port), "stopped inside the lock")
        eventually(lambda: no_answer(page) and "exit code 75" in tool.log, BACK)
        tool.logged("(?i)cannot start the collector.*No space", BACK)
        stays(lambda: tool.code is None, 2.5)
        self.assertEqual(
            len(re.findall("cannot start the collector", tool.log)), 1, tool.log
        )
        os.unlink(filler)
        eventually(lambda: get(page, "/healthz").status == 200, SHOWN)

        def join():
            """What waited in the backlog may fill the table for a moment."""
            with PlainAgent(port) as agent:
                agent.send({"cpu": 1, "ram": 1, "ack": True})
                return agent.read_line() == "ok"

        eventually(join, SHOWN)
        self.assertEqual(tool.stop(), 0)
        self.assertNotRegex(tool.log, NOISE)


def semaphore(pid):
    """The path of the lock that a process has mapped, although it has no name any more."""
    with open("/proc/%d/maps" % pid) as file:
        place = re.search(r"(?m)^(\S+) .*/dev/shm/sem\.", file.read()).group(1)
    return "/proc/%d/map_files/%s" % (pid, place)


def hold_lock(pid, port):
    """Stop a collector at random moments until it is inside the lock; then leave it stopped."""
    data = support.pickle.dumps({"cpu": 1, "ram": 1, "node": "load"}, 2)
    shm = os.path.join(shm_of(pid), "sentinel_%d" % port)
    ended = threading.Event()

    def flood():
        while not ended.is_set():
            with contextlib.suppress(OSError), PlainAgent(port) as agent:
                for _ in range(450):
                    agent.send_bytes(data)

    floods = [threading.Thread(target=flood, daemon=True) for _ in range(2)]
    for each in floods:
        each.start()
    try:
        for _ in range(3000):
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: support._stat(pid)[0] == "T", 2)
            with open(shm, "rb") as file:
                file.seek(
                    -(master_server.SEQUENCE.size + master_server.COUNTS.size),
                    os.SEEK_END,
                )
                if file.read(1)[0] % 2:  # odd: a write is under way, under the lock
                    return True
            os.kill(pid, signal.SIGCONT)
            time.sleep(random.random() / 500)
        return False
    finally:
        ended.set()
        for each in floods:
            each.join()


class Descriptors(unittest.TestCase):
    """Out of file descriptors: told once each time, those who are in go on, then others get in."""

    def run_out(self, port, count=120):
        stack = contextlib.ExitStack()
        for _ in range(count):
            stack.enter_context(PlainAgent(port))
        return stack

    def start(self):
        """A master with 48 descriptors a process; what is told is told again after a second."""
        return support.start_master(
            "--timeout",
            "60",
            patch="master_server.REFUSAL_SECONDS, master_server.PIN_SECONDS = 1.0, 0.1",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)),
        )

    @staticmethod
    def lines(master):
        return len(
            re.findall(
                "cannot take new connections for now: .*Too many open files", master.log
            )
        )

    def test_no_descriptors_for_agents_or_for_browsers_is_told_and_passes(self):
        with self.start() as master, Witness(master.port) as witness:
            eventually(lambda: row_of(master.page, node="witness"))
            for turn in (1, 2):
                before = self.lines(master)
                with self.subTest(turn), self.run_out(master.port):
                    eventually(lambda b=before: self.lines(master) > b)
                    self.assertEqual(get(master.page, "/healthz").status, 200)
                with PlainAgent(master.port) as agent:
                    agent.send({"cpu": 1, "ram": 1, "ack": True})
                    self.assertEqual(agent.read_line(), "ok", "recovered")
            before = self.lines(master)
            with self.run_out(master.page):
                eventually(lambda: self.lines(master) > before)
            self.assertEqual(get(master.page, "/healthz").status, 200)
            self.assertTrue(row_of(master.page, node="witness")["age"] < FRESH)
            witness.check()
            self.assertEqual(master.stop(), 0)
            self.assertNotRegex(master.log, NOISE)

    @support.slow("waits for limits")
    def test_coming_and_going_at_the_limit_is_told_once_in_a_while(self):
        with self.start() as master, Witness(master.port) as witness:
            start = time.monotonic()

            def come_and_go():
                while time.monotonic() - start < 4:
                    with contextlib.suppress(OSError), PlainAgent(master.port):
                        time.sleep(0.3)

            threads = [
                threading.Thread(target=come_and_go, daemon=True) for _ in range(80)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertLessEqual(self.lines(master), time.monotonic() - start + 1)
            self.assertGreaterEqual(self.lines(master), 1)
            witness.check()


PIDS = "/sys/fs/cgroup/pids"


@support.slow("no threads")
@requires("root", PIDS)
class Threads(unittest.TestCase):
    """Out of threads and processes, by a pids cgroup of the test's own."""

    def setUp(self):
        self.group = os.path.join(PIDS, "sentinel-test-%d" % os.getpid())
        os.mkdir(self.group)
        self.addCleanup(self.remove)

    def remove(self):
        eventually(lambda: os.rmdir(self.group) is None, 5)

    def limit(self, count):
        """Let the group have no more threads than that; "max" for no limit."""
        with open(os.path.join(self.group, "pids.max"), "w") as file:
            file.write(str(count))

    def enter(self):
        with open(os.path.join(self.group, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))

    def test_no_threads_is_told_to_those_who_come_and_recovers(self):
        with support.start_master(preexec_fn=self.enter) as master, Witness(
            master.port
        ) as witness:
            eventually(
                lambda: (
                    row_of(master.page, node="witness")
                    and get(master.page, "/healthz").status == 200
                )
            )
            time.sleep(0.5)  # that request's thread ends
            self.limit(1)
            for port in (master.port, master.page):
                for _ in range(6):
                    with PlainAgent(port) as agent:
                        self.assertRegex(agent.read_to_end(), "^(error .*threads)?")
            self.assertLessEqual(
                len(
                    re.findall(
                        "cannot take new connections for now: .*thread", master.log
                    )
                ),
                4,
                "one line each, and again later",
            )
            witness.check()
            before = int(re.findall(r"dashboard started, pid (\d+)", master.log)[-1])
            self.limit(1)
            os.kill(before, signal.SIGKILL)
            master.logged("cannot start the dashboard for now", BACK)
            self.limit("max")
            eventually(lambda: get(master.page, "/healthz").status == 200, BACK)
            with PlainAgent(master.port) as agent:
                agent.send({"cpu": 1, "ram": 1, "ack": True})
                self.assertEqual(agent.read_line(), "ok")
            witness.check()
            self.assertEqual(master.stop(), 0)
            self.assertNotRegex(master.log, NOISE)


# The collector has no more than so many threads; a dashboard is not touched.
FEW_THREADS = """
import _thread
start = master_server.start_thread
def limited(*facts):
    name = multiprocessing.current_process().name
    if name == "collector" and _thread._count() > 3:
        raise RuntimeError("can't start new thread")
    start(*facts)
master_server.start_thread = limited
"""

# No role has threads for those who connect.
NO_THREADS = """
def refuse(*facts):
    raise RuntimeError("can't start new thread")
master_server.start_thread = refuse
master_server.HTTP_SECONDS = 1.0
"""


class NoRoom(unittest.TestCase):
    """Agents that are turned away for want of threads are counted and told."""

    def test_they_are_told_everywhere_and_room_is_used_as_soon_as_there_is_some(self):
        with support.start_master(patch=FEW_THREADS) as master:
            inside = []
            for number in range(4):
                agent = PlainAgent(master.port)
                self.addCleanup(agent.close)
                agent.send(
                    {"cpu": 1.0, "ram": 1.0, "node": "in%d" % number, "ack": True}
                )
                self.assertEqual(agent.read_line(), "ok")
                inside.append(agent)
            for count in range(1, 7):
                with PlainAgent(master.port) as agent:
                    self.assertRegex(
                        agent.read_line(),
                        "error no room .*thread.*TasksMax.*last minute: %d" % count,
                    )
            words = "6 agents turned away in the last minute: no room"
            eventually(lambda: words in get(master.page, "/nodes.txt").text)
            self.assertIn(words, support.page_text(master.page))
            self.assertNotIn("All is well", support.page_text(master.page))
            self.assertIn("ok, but " + words, get(master.page, "/healthz").text)
            metrics = get(master.page, "/metrics").text
            self.assertIn("sentinel_turned_away_total{} 6\n", metrics)
            self.assertLessEqual(master.log.count("cannot take new connections"), 2)
            for agent in inside:
                agent.send({"cpu": 2.0, "ram": 1.0, "node": "in", "ack": True})
                self.assertEqual(agent.read_line(), "ok")
            inside.pop().close()

            def gets_in():
                with PlainAgent(master.port) as agent:
                    agent.send({"cpu": 1.0, "ram": 1.0, "ack": True})
                    return agent.read_line() == "ok"

            eventually(gets_in)

    def test_pages_are_answered_when_the_dashboard_has_no_more_threads_either(self):
        with support.start_master(patch=NO_THREADS) as master:
            for _ in range(3):
                self.assertEqual(get(master.page, "/healthz").status, 200)
            with PlainAgent(master.page):
                # the silent one has a second for its request, then it is the next one's turn
                self.assertEqual(get(master.page, "/nodes.txt").status, 200)


# While the file $NO_SPARE is there, /dev/null cannot be opened for want of descriptors.
NO_SPARE = """
import errno, os
real_open = os.open

def open_unless(path, *more):
    if path == os.devnull and os.path.exists(os.environ["NO_SPARE"]):
        with open(os.environ["NO_SPARE"], "w") as file:
            file.write("wanted")
        raise OSError(errno.EMFILE, "Too many open files")
    return real_open(path, *more)

os.open = open_unless
"""


class NoDescriptors(unittest.TestCase):
    """Agents that are turned away for want of descriptors are all told, and the role lives on."""

    def start(self, **more):
        return support.start_master(
            "--timeout",
            "60",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)),
            **more,
        )

    def fill(self, stack, master):
        """Connect until one is turned away: those who are in stay."""
        for _ in range(60):
            agent = stack.enter_context(PlainAgent(master.port))
            agent.send({"cpu": 1.0, "ram": 1.0, "interval": 60.0, "ack": True})
            line = agent.read_line()
            if line != "ok":
                return line
        raise AssertionError("nobody was turned away")

    def test_each_is_told_at_once_with_the_cure(self):
        with self.start() as master, contextlib.ExitStack() as stack:
            self.fill(stack, master)
            start = time.monotonic()
            crowd = [stack.enter_context(PlainAgent(master.port)) for _ in range(40)]
            for agent in crowd:
                self.assertRegex(
                    agent.read_line(),
                    r"^error no room .*\(Too many open files\): raise ulimit -n; turned away",
                )
            seconds = time.monotonic() - start
            self.assertLess(seconds, 10, "one each half second would take 20 s")
            words = "41 agents turned away in the last minute: no room"
            eventually(lambda: words in get(master.page, "/nodes.txt").text)

    def test_a_spare_descriptor_that_is_not_to_be_had_ends_nothing(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        flag = os.path.join(folder, "none")
        env = {"NO_SPARE": flag}
        with self.start(patch=NO_SPARE, env=env) as master:
            with contextlib.ExitStack() as stack:
                self.fill(stack, master)
                with open(flag, "w"):
                    pass
                for _ in range(3):
                    stack.enter_context(PlainAgent(master.port))
                eventually(lambda: os.path.getsize(flag), what="it was wanted")
                stays(lambda: get(master.page, "/healthz").status == 200, 1.5)
                os.unlink(flag)
            with PlainAgent(master.port) as agent:
                agent.send({"cpu": 1.0, "ram": 1.0, "ack": True})
                self.assertEqual(agent.read_line(), "ok", "recovered")
            with contextlib.ExitStack() as stack:
                self.assertRegex(self.fill(stack, master), "Too many open files")
            self.assertEqual(master.stop(), 0)
            self.assertEqual(master.log.count("collector started"), 1)
            self.assertNotRegex(master.log, NOISE)


# The wall clock of a whole program is the real one plus the number in the file $SHIFT.
SHIFTED = """
import os, time
real_time = time.time

def shifted_time():
    with open(os.environ["SHIFT"]) as file:
        return real_time() + float(file.read() or 0)

time.time = shifted_time
"""


@support.slow("hours")
class Clock(unittest.TestCase):
    """The wall clock is set back, and forth: no age, deadline or alert depends on it."""

    def shift(self, seconds):
        with open(self.path + ".new", "w") as file:
            file.write(str(seconds))
        os.replace(self.path + ".new", self.path)

    def test_the_clock_set_back_or_forth_by_hours_changes_no_age_and_no_deadline(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.path = os.path.join(folder, "shift")
        self.shift(0)
        env = {"SHIFT": self.path}
        agent_main = "%s\nimport sys\nsys.path.insert(0, %r)\nimport agent\nsys.exit(agent.main())"
        with support.start_master(
            "--timeout", "2", "--alert", "cpu>50 for 1", patch=SHIFTED, env=env
        ) as master, Witness(master.port) as witness, support.start(
            "-c",
            agent_main % (SHIFTED, support.ROOT),
            "--port",
            master.port,
            "--name",
            "real",
            "--interval",
            "0.5",
            env=env,
        ):
            eventually(lambda: row_of(master.page, node="real"))
            eventually(lambda: row_of(master.page, node="witness"))
            for seconds in (-7200, 86400):
                with self.subTest(seconds):
                    self.shift(seconds)
                    stays(
                        lambda: (
                            all(0 <= row["age"] < FRESH for row in nodes(master.page))
                            and len(nodes(master.page)) == 2
                            and get(master.page, "/healthz").status == 200
                        ),
                        1,
                    )
                    self.assertLessEqual(
                        {event["node"] for event in events(master.page, "lost")},
                        {"silent"},
                    )
                    self.silence_is_noticed_in_time(master)
                    self.assertEqual(get(master.page).status, 200)
            witness.check()
            self.assertEqual(master.stop(), 0)
            self.assertNotRegex(master.log, NOISE)

    def silence_is_noticed_in_time(self, master):
        with PlainAgent(master.port) as agent:
            start = time.monotonic()
            agent.send({"cpu": 1, "ram": 1, "node": "silent"})
            self.assertIn("no sample for 2 s", agent.read_to_end(5))
            self.assertAlmostEqual(time.monotonic() - start, 2, delta=1.2)


if __name__ == "__main__":
    unittest.main()
