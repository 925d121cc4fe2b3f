"""Strangers at the agents' port of a real master: they are refused, and nobody else notices.

The decoder's hostile table over real sockets, the secret, connections that say nothing, floods,
and the limit for each source.  What browsers' strangers can do is in test_dashboard.py.
"""

import contextlib
import hashlib
import hmac
import os
import pickle
import random
import re
import resource
import signal
import socket
import stat
import tempfile
import threading
import time
import unittest

import beside
import support
from support import (
    HOST,
    MasterTest,
    PlainAgent,
    eventually,
    events,
    get,
    nodes,
    requires,
    row_of,
    stays,
)

import master_server
import test_wire

load_tests = beside.load_tests  # in a process of its own: it mostly waits

SEED = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
GOOD = {"cpu": 15.5, "ram": 40.25}
UNDISTURBED = (
    2.0  # seconds in which another agent's sample must be answered, come what may
)


class Witness:
    """An agent that goes on sending all the while and notes the longest wait for its "ok"."""

    def __init__(self, port, **more):
        self.agent, self.ended, self.worst, self.trouble = (
            PlainAgent(port),
            False,
            0.0,
            "",
        )
        self.sample = dict(GOOD, node="witness", ack=True, **more)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            while not self.ended:
                start = time.monotonic()
                self.agent.send(self.sample)
                line = self.agent.read_line()
                if line != "ok":
                    self.trouble = "it was told %r" % line
                    return
                self.worst = max(self.worst, time.monotonic() - start)
                time.sleep(0.02)
        except (OSError, AssertionError) as error:
            self.trouble = repr(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()
        self.agent.close()

    def check(self):
        """Fail if it was disturbed."""
        if self.trouble or self.worst > UNDISTURBED:
            raise AssertionError(
                "the witness waited %.2f s for an answer; %s"
                % (self.worst, self.trouble or "none was lost")
            )


@contextlib.contextmanager
def idle(port, count, source=None):
    """That many connections which say nothing."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(PlainAgent(port, source=source and (source, 0)))
            for _ in range(count)
        ]


def closed(agent):
    """Whether the master has closed a connection, whatever it said before."""
    agent.socket.setblocking(False)
    try:
        while agent.socket.recv(4096):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def told(agent, seconds=support.PATIENCE):
    """The reason that a connection is given before it is closed."""
    return re.sub(r"(?s)\Aerror (.*)\n\Z", r"\1", agent.read_to_end(seconds))


# ==========================================================================================
# Hostile bytes
# ==========================================================================================


class HostileBytes(MasterTest):
    """Each hostile input gets its reason, in any segments, while another agent goes on."""

    flags = ("--timeout", "1.5", "--max-agents", "8")
    patch = "master_server.FLAP_VISITS = 1000"  # each of its inputs is a brief visit

    def setUp(self):
        witness = Witness(self.master.port)
        self.addCleanup(witness.check)
        self.addCleanup(witness.__exit__)
        # by its address: the row of the test before may still be there, in another slot
        before = self.row(address=str(witness.agent.address))
        self.addCleanup(
            lambda: eventually(
                lambda: (
                    [row["slot"] for row in nodes(self.master.page)] == [before["slot"]]
                )
            )
        )

    def send(self, agent, data, step):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            agent.send_bytes(data, step)

    def test_each_is_told_its_reason_in_any_segments(self):
        rng = random.Random(SEED)
        for what, data, reason in test_wire.hostile():
            step = rng.choice(
                (None, None, 1460, 37, 5) if len(data) < 600 else (None, 1460)
            )
            with self.subTest(what, step=step), PlainAgent(self.master.port) as agent:
                self.send(agent, data, step)
                said = told(agent)
                self.assertRegex(said, reason)
                self.assertNotIn("1.5 s", said, "at once, not at the deadline")

    def test_the_harmless_ones_are_taken_at_each_limit(self):
        for what, data in test_wire.harmless() + test_wire.harmless_lines():
            with self.subTest(what), PlainAgent(self.master.port) as agent:
                agent.send_bytes(data)
                agent.send(dict(GOOD, ack=True))
                self.assertEqual(agent.read_answer(), "ok")
        eventually(lambda: len(nodes(self.master.page)) == 1)

    def test_a_hostile_sample_behind_good_ones_ends_that_agent_alone(self):
        brief = ("127.0.0.7", 0)  # so many brief visits of one source are told no more
        for what, data, reason in test_wire.hostile()[::7]:
            with self.subTest(what), PlainAgent(
                self.master.port, source=brief
            ) as agent:
                agent.send(dict(GOOD, ack=True))
                self.assertEqual(agent.read_answer(), "ok")
                self.send(agent, data, None)
                self.assertRegex(told(agent), reason + "|no pickle|HTTP|TLS")

    def test_half_a_sample_and_silence_and_one_byte_at_a_time_end_at_the_deadline(self):
        data = pickle.dumps(dict(GOOD, node="slow"), 2)
        with contextlib.ExitStack() as stack:
            half, nothing, drip, again = (
                stack.enter_context(PlainAgent(self.master.port)) for _ in range(4)
            )
            again.send(dict(GOOD, node="then-slow"))
            start = time.monotonic()
            half.send_bytes(data[:-5])
            for at in range(len(data) - 1):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    drip.send_bytes(data[at : at + 1])
                    again.send_bytes(data[at : at + 1])
                if time.monotonic() - start > 2.5:
                    break
                time.sleep(0.05)
            for agent in (drip, again, half, nothing):  # 1 s: it is to be there already
                self.assertEqual(told(agent, 1), "no sample for 1.5 s")

    def test_hostile_text_of_a_real_protocol_never_reaches_the_log_unescaped(self):
        for data in (
            b"\x1b]0;owned\x07\r\n",
            b"GET /\x1b[2J HTTP/1.1\r\n\r\n",
            test_wire.sample(
                test_wire.short("node") + test_wire.short("\x1b[2J\nx\x9b")
            ),
        ):
            with PlainAgent(self.master.port) as agent:
                self.send(agent, data, None)
        eventually(lambda: "\ufffd[2J\ufffdx\ufffd" in self.master.log)
        self.assertNotRegex(self.master.log, "[\x00-\x09\x0b-\x1f\x7f-\x9f]")


# ==========================================================================================
# Floods
# ==========================================================================================


class Flood(MasterTest):
    """Many refusals of one source."""

    patch = "master_server.REFUSAL_SECONDS = 1.0"

    def test_a_flood_of_refusals_is_one_line_and_one_event_and_then_a_count(self):
        with Witness(self.master.port) as witness:
            self.row(node="witness")
            count = 600
            for _ in range(count):
                with contextlib.suppress(OSError), PlainAgent(
                    self.master.port
                ) as agent:
                    agent.send_bytes(b"garbage\n")
                    agent.read_to_end()

            def counted():
                texts = [event["text"] for event in events(self.master.page, "refused")]
                return sum(
                    int((re.search(r"\d+(?= more)", text) or "1")[0]) for text in texts
                )

            eventually(lambda: counted() == count, what="every refusal is in a count")
            eventually(
                lambda: (
                    self.master.log.count("refused 127.0.0.1: ")
                    == len(events(self.master.page, "refused"))
                )
            )
            self.assertLess(
                len(events(self.master.page, "refused")), 9, "at 0, 1, 3, 7, 15 s"
            )
            self.assertIn(
                "witness",
                [event["node"] for event in events(self.master.page, "connected")],
                "nothing useful is pushed out",
            )
            witness.check()


@support.slow("floods")
class Halves(MasterTest):
    """The time for a message counts from the one before, however long the peer has been here."""

    flags = ("--timeout", "1")

    def test_half_a_message_behind_steady_samples_has_its_time(self):
        def sample(step):
            text = {"node": "steady", "cpu": 10.5 + step, "ram": 20.5}
            return pickle.dumps(dict(text, ack=True), protocol=4)

        part = pickle.dumps({"part": "look", "look": 1}, protocol=4)
        with PlainAgent(self.master.port) as agent:
            for step in range(8):  # for longer than the timeout
                agent.send_bytes(sample(step))
                self.assertEqual(agent.read_answer(), "ok")
                time.sleep(0.25)
            agent.send_bytes(sample(9) + part[:10])
            self.assertEqual(agent.read_answer(), "ok")
            time.sleep(0.25)
            agent.send_bytes(part[10:] + sample(10))
            self.assertEqual(agent.read_answer(), "ok")

    def test_half_a_message_that_is_never_whole_ends_it(self):
        message = pickle.dumps({"node": "half", "cpu": 10.5, "ram": 20.5}, protocol=4)
        with PlainAgent(self.master.port) as agent:
            for _ in range(3):
                agent.send_bytes(message)
                time.sleep(0.25)
            agent.send_bytes(message[:10])
            self.assertIn("no sample for 1 s", agent.read_to_end())


class Floods(MasterTest):
    """Many sources, many bytes, many connections: the others go on."""

    patch = "master_server.REFUSAL_SECONDS = master_server.RATE_SECONDS = 1.0"

    def test_a_flood_from_many_addresses_pushes_nothing_useful_out_of_the_ring(self):
        with Witness(self.master.port, job="4711"):
            self.row(node="witness", job="4711")
            for number in range(400):
                source = "127.0.%d.%d" % (10 + number // 200, 1 + number % 200)
                with contextlib.suppress(OSError), PlainAgent(
                    self.master.port, source=(source, 0)
                ) as agent:
                    agent.send_bytes(b"garbage\n")
                    agent.read_to_end()
            stays(
                lambda: [
                    event
                    for event in events(self.master.page, "connected")
                    if event["node"] == "witness" and event.get("job") == "4711"
                ],
                1.5,
            )

    def test_one_that_sends_byte_by_byte_as_fast_as_it_can_holds_nobody_up(self):
        data = test_wire.of_size(16384)[:-1]
        ended = threading.Event()
        self.addCleanup(ended.set)

        def flood():
            while not ended.is_set():
                with contextlib.suppress(OSError, AssertionError), PlainAgent(
                    self.master.port
                ) as agent:
                    for at in range(len(data)):
                        agent.send_bytes(data[at : at + 1])
                        if ended.is_set():
                            return
                    agent.read_to_end()

        threads = [threading.Thread(target=flood, daemon=True) for _ in range(4)]
        with Witness(self.master.port) as witness:
            for thread in threads:
                thread.start()
            start = time.monotonic()
            while time.monotonic() - start < 3:
                self.assertEqual(
                    get(self.master.page, "/healthz", seconds=2).text, "ok\n"
                )
            ended.set()
            for thread in threads:
                thread.join()
            witness.check()

    def test_more_samples_than_any_agent_sends_are_refused(self):
        with Witness(self.master.port) as witness, PlainAgent(
            self.master.port
        ) as agent:
            data = pickle.dumps(GOOD, 2) * 20
            start = time.monotonic()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while time.monotonic() - start < 15:
                    agent.send_bytes(data)
            self.assertRegex(told(agent), "samples a second|^$")
            self.assertLess(time.monotonic() - start, 15)
            eventually(
                lambda: [
                    event
                    for event in events(self.master.page, "refused")
                    if "samples a second" in event["text"]
                ]
            )
            witness.check()

    def test_connections_that_are_reset_at_once_by_the_thousand_are_survived(self):
        with Witness(self.master.port) as witness:
            for number in range(3000):
                agent = PlainAgent(self.master.port)
                if number % 3 == 0:
                    agent.send_bytes(b"\x80")
                agent.reset()
            self.assertEqual(get(self.master.page, "/healthz").text, "ok\n")
            witness.check()
        threads = (
            "/proc/%s/task"
            % re.findall(r"collector started, pid (\d+)", self.master.log)[-1]
        )
        eventually(lambda: len(os.listdir(threads)) < 20, what="threads are gone")


class Refusals(unittest.TestCase):
    """Refusals with a clock of the test's own."""

    def setUp(self):
        self.now, self.told = 1000.0, []
        clock = master_server.time.monotonic
        master_server.time.monotonic = lambda: self.now
        self.addCleanup(setattr, master_server.time, "monotonic", clock)
        self.refusals = master_server.Refusals(
            lambda source, why: self.told.append((source, why))
        )

    def test_one_line_a_source_and_ten_seconds_with_a_count(self):
        for _ in range(500):
            self.refusals.add("10.0.0.1", "no pickle")
            self.now += 0.001
        self.refusals.add("10.0.0.2", "no cpu")
        self.refusals.flush()
        self.assertEqual(self.told, [("10.0.0.1", "no pickle"), ("10.0.0.2", "no cpu")])
        self.now += master_server.REFUSAL_SECONDS
        self.refusals.flush()
        self.assertEqual(len(self.told), 3)
        self.assertRegex(self.told[2][1], r"no pickle.*499")
        self.now += 1000
        for _ in range(3):
            self.refusals.flush()
        self.assertEqual(len(self.told), 3, "nothing to tell")
        self.refusals.add("10.0.0.1", "no ram")
        self.assertEqual(self.told[3:], [("10.0.0.1", "no ram")], "told at once again")

    def test_sources_without_number_are_told_as_one_and_cost_no_memory(self):
        for number in range(5000):
            self.refusals.add("2001:db8::%x" % number, "no pickle")
        self.assertLess(len(self.told), master_server.EVENTS // 4)
        self.assertLess(len(self.refusals.sources), 1000)


# ==========================================================================================
# Connections that say nothing, and limits for each source
# ==========================================================================================


class Waiting(unittest.TestCase):
    """Connections without a sample are bounded separately: they lock nobody out."""

    def setUp(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    def test_more_idle_connections_than_may_wait_lock_nobody_out(self):
        limit = master_server.MAX_WAITING
        with support.start_master(
            "--timeout", "60", "--max-agents", "4"
        ) as master, Witness(master.port) as witness, idle(
            master.port, limit + 200
        ) as strangers:
            with PlainAgent(master.port) as agent:
                start = time.monotonic()
                agent.send(dict(GOOD, node="good", ack=True))
                self.assertEqual(agent.read_line(), "ok")
                self.assertLess(time.monotonic() - start, 2)
            eventually(
                lambda: (
                    limit - 2 <= sum(not closed(each) for each in strangers) <= limit
                ),
                what="the oldest are gone, and only as many as must",
            )
            self.assertTrue(closed(strangers[0]) and not closed(strangers[-1]))
            self.assertEqual(get(master.page, "/healthz").text, "ok\n")
            witness.check()

    def test_connections_that_never_send_are_dropped_at_the_deadline_and_free_everything(
        self,
    ):
        with support.start_master("--timeout", "1") as master:
            eventually(lambda: get(master.page, "/healthz").status == 200)
            collector = int(master.logged(r"collector started, pid (\d+)").group(1))
            before = len(os.listdir("/proc/%d/fd" % collector))
            with idle(master.port, 300) as strangers:
                start = time.monotonic()
                eventually(lambda: all(map(closed, strangers)), 10)
                self.assertLess(time.monotonic() - start, 5)
            eventually(lambda: len(os.listdir("/proc/%d/fd" % collector)) <= before + 1)
            eventually(lambda: len(os.listdir("/proc/%d/task" % collector)) <= 3)
            self.assertEqual(nodes(master.page), [])

    def test_the_busiest_source_makes_room_first(self):
        shut = []

        class Sock:
            def __init__(self, name):
                self.name = name

            def shutdown(self, how):
                shut.append(self.name)

        waiting = master_server.Waiting(5)
        waiting.add(Sock("honest"), "10.0.0.1")
        for number in range(50):
            waiting.add(Sock(number), "10.0.0.66")
        self.assertEqual(shut, list(range(46)), "the oldest of the busiest")
        waiting.add(Sock("honest too"), "10.0.0.2")
        self.assertEqual(shut[46:], [46])

    def test_what_left_by_itself_is_not_counted_any_more(self):
        waiting = master_server.Waiting(2)
        for _ in range(20):
            sock = socket.socket()
            waiting.add(sock, "10.0.0.1")
            waiting.remove(sock)
            waiting.remove(sock)
            sock.close()
        self.assertFalse(waiting.socks)


class Sources(unittest.TestCase):
    """One host cannot fill the table; only the loopback may: bridges and ssh come from there."""

    def join(self, stack, source):
        agent = stack.enter_context(PlainAgent(self.master.port, source=(source, 0)))
        agent.send(dict(GOOD, ack=True, interval=60))
        return agent, agent.read_line()

    def test_one_source_gets_seven_eighths_and_the_rest_is_for_others(self):
        with support.start_master(
            "--max-agents", "16"
        ) as self.master, contextlib.ExitStack() as stack:
            greedy = [self.join(stack, "127.0.0.66") for _ in range(20)]
            answers = [answer for _, answer in greedy]
            self.assertEqual(answers[:14], ["ok"] * 14)
            for answer in answers[14:]:
                self.assertRegex(answer, r"^error too many agents of 127\.0\.0\.66")
            self.assertEqual(self.join(stack, "127.0.0.67")[1], "ok")
            greedy[3][0].close()
            eventually(lambda: len(nodes(self.master.page)) == 14)
            self.assertEqual(
                self.join(stack, "127.0.0.66")[1], "ok", "what left is free again"
            )
            self.assertRegex(self.join(stack, "127.0.0.66")[1], "too many")

    def test_the_loopback_may_have_them_all(self):
        with support.start_master(
            "--max-agents", "16"
        ) as self.master, contextlib.ExitStack() as stack:
            answers = [self.join(stack, HOST)[1] for _ in range(17)]
            self.assertEqual(answers[:16], ["ok"] * 16)
            self.assertEqual(answers[16], "error master is full (16 agents)")


# ==========================================================================================
# The secret
# ==========================================================================================


class Secret(unittest.TestCase):
    """--secret-file on both sides, with real programs: fail closed, and say the cure."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="sentinel-secret-")
        cls.addClassCleanup(support.shutil.rmtree, cls.folder)
        cls.path = os.path.join(cls.folder, "secret")
        cls.master = support.start_master("--secret-file", cls.path)
        cls.addClassCleanup(cls.master.stop)
        with open(cls.path, "rb") as file:
            cls.secret = file.read().strip()

    def connect(self):
        agent = PlainAgent(self.master.port)
        self.addCleanup(agent.close)
        word, nonce = agent.read_line().split(" ")
        self.assertEqual(word, "challenge")
        return agent, nonce

    def proof(self, nonce, secret=None):
        return hmac.new(
            secret or self.secret, nonce.encode(), hashlib.sha256
        ).hexdigest()

    def file(self, name, content=b"open sesame\n", mode=0o600):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
        return path

    def test_a_missing_file_is_made_with_0600_and_a_long_random_secret(self):
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertRegex(self.secret, rb"^[0-9a-f]{64}$")
        self.assertRegex(self.master.log, "secret.*%s" % re.escape(self.path))
        self.assertNotIn(self.secret.decode(), self.master.log)

    @requires("/proc/self/cmdline")
    def test_the_secret_is_in_no_command_line_and_no_environment(self):
        for pid in [self.master.pid, *support.descendants(self.master.pid)]:
            for name in ("cmdline", "environ"):
                with open("/proc/%d/%s" % (pid, name), "rb") as file:
                    self.assertNotIn(self.secret, file.read())

    def test_the_right_answer_opens_the_door(self):
        agent, nonce = self.connect()
        agent.send({"auth": self.proof(nonce)})
        agent.send(dict(GOOD, node="right", ack=True))
        self.assertEqual(agent.read_line(), "ok")
        eventually(lambda: row_of(self.master.page, node="right"))

    def test_any_other_answer_is_refused_with_the_cure(self):
        agent, nonce = self.connect()
        stranger, other = self.connect()
        self.assertNotEqual(nonce, other, "a nonce is used once")
        for what, message, cure in (
            ("no answer", dict(GOOD, ack=True), "--secret-file"),
            (
                "a wrong secret",
                {"auth": self.proof(nonce, b"wrong")},
                "same --secret-file",
            ),
            ("another's answer", {"auth": self.proof(other)}, "same --secret-file"),
            ("a number", {"auth": 5}, "--secret-file"),
            ("the nonce", {"auth": nonce}, "same --secret-file"),
            ("nothing", {"auth": ""}, "same --secret-file"),
            ("a goodbye", {"bye": "finished"}, "--secret-file"),
        ):
            with self.subTest(what):
                agent, nonce = self.connect()
                if what == "a wrong secret":
                    message = {"auth": self.proof(nonce, b"wrong")}
                agent.send(message)
                self.assertRegex(told(agent), cure)
        self.assertNotIn("%s" % stranger.address[1], str(nodes(self.master.page)))

    def test_an_answer_cannot_be_replayed(self):
        agent, nonce = self.connect()
        answer = pickle.dumps({"auth": self.proof(nonce)}, 2)
        agent.send_bytes(answer)
        agent.send(dict(GOOD, ack=True))
        self.assertEqual(agent.read_line(), "ok")
        again, other = self.connect()
        again.send_bytes(answer)
        self.assertRegex(told(again), "wrong secret")
        self.assertNotEqual(nonce, other)

    def test_hostile_bytes_instead_of_an_answer_get_their_reason(self):
        for what, data, reason in test_wire.hostile()[::9]:
            with self.subTest(what):
                agent, _ = self.connect()
                with contextlib.suppress(OSError):
                    agent.send_bytes(data)
                self.assertRegex(told(agent), reason + "|--secret-file")

    def test_a_real_agent_with_the_file_is_let_in_and_one_without_says_the_cure(self):
        own = self.file("other-secret", b"another one entirely\n")
        ways = {
            "with": ("--secret-file", self.path),
            "without": (),
            "wrong": ("--secret-file", own),
        }
        with contextlib.ExitStack() as stack:
            agents = {
                name: stack.enter_context(
                    support.start(
                        "agent.py", "--port", self.master.port, "--name", name, *flags
                    )
                )
                for name, flags in ways.items()
            }
            eventually(lambda: row_of(self.master.page, node="with"))
            agents["without"].logged("start the agent with --secret-file")
            agents["wrong"].logged("wrong secret: .*same --secret-file")
            stays(
                lambda: (
                    {row["node"] for row in nodes(self.master.page)}
                    & {"without", "wrong"}
                    == set()
                ),
                0.5,
            )
            self.assertNotIn(
                self.secret.decode(), "".join(a.log for a in agents.values())
            )

    @support.slow("a limit of seconds")
    def test_a_real_agent_with_a_secret_sends_nothing_to_a_master_without(self):
        with support.start_master() as master, support.start(
            "agent.py", "--port", master.port, "--secret-file", self.path
        ) as agent:
            agent.logged("start the master with --secret-file", 15)
            self.assertEqual(nodes(master.page), [])

    def test_a_file_that_is_no_secret_is_one_line_that_names_the_cure(self):
        missing = os.path.join(self.folder, "no", "such", "folder", "secret")
        table = (
            ("others can read it", self.file("open", mode=0o644), "chmod 600"),
            ("the group can", self.file("group", mode=0o640), "chmod 600"),
            ("others can write it", self.file("write", mode=0o602), "chmod 600"),
            ("empty", self.file("empty", b""), "remove the file|empty"),
            ("blank", self.file("blank", b" \n\n"), "remove the file|empty"),
            ("no folder", missing, "No such file"),
            ("a folder", self.folder, "directory"),
        )
        for tool, flags in (
            ("master_server.py", ["--port", 0, "--dashboard-port", 0]),
            ("agent.py", ["--port", self.master.port]),
        ):
            rows = [[*flags, "--secret-file", path] for _, path, _ in table]
            for done, (what, _, cure) in zip(support.run_each(tool, rows), table):
                with self.subTest(what, tool=tool):
                    self.assertEqual((done.returncode, done.stdout), (1, ""))
                    self.assertRegex(
                        done.stderr, r"\Aerror: [^\n]*(%s)[^\n]*\n\Z" % cure
                    )
        self.assertFalse(os.path.exists(missing))

    def test_listening_beyond_this_machine_without_a_secret_is_one_warning(self):
        for flags, lines in (
            (("--host", "0.0.0.0"), 1),
            ((), 0),
            (("--host", "0.0.0.0", "--secret-file", self.path), 0),
        ):
            with self.subTest(flags), support.start_master(*flags) as master:
                with PlainAgent(master.port) as agent:
                    agent.send_bytes(b"\x80")
                eventually(lambda m=master: get(m.page, "/healthz").status == 200)
                found = [
                    line for line in master.log.splitlines() if "--secret-file" in line
                ]
                self.assertEqual(len(found), lines, master.log)


@support.slow("every kind of stranger")
class ManyRudeOnes(MasterTest):
    """All at once: what the tests above do one by one."""

    flags = ("--timeout", "3", "--max-agents", "64")

    def test_a_real_agent_is_shown_fresh_beside_every_kind_of_stranger(self):
        self.real_agent("--name", "honest")
        self.row(node="honest")
        rng, table, ended = random.Random(SEED), test_wire.hostile(), threading.Event()
        self.addCleanup(ended.set)

        def rude():
            while not ended.is_set():
                with contextlib.suppress(OSError, AssertionError), PlainAgent(
                    self.master.port
                ) as agent:
                    agent.send_bytes(rng.choice(table)[1], rng.choice((None, 100)))
                    if rng.random() < 0.3:
                        agent.reset()
                    else:
                        agent.read_to_end(1)

        threads = [threading.Thread(target=rude, daemon=True) for _ in range(6)]
        with idle(self.master.port, 200):
            for thread in threads:
                thread.start()
            stays(
                lambda: (
                    row_of(self.master.page, node="honest")["age"] < 3 + UNDISTURBED
                ),
                3.5,
            )
            ended.set()
            for thread in threads:
                thread.join()
        self.assertEqual(
            [
                event
                for event in events(self.master.page, "lost")
                if event["node"] == "honest"
            ],
            [],
        )


# SIGUSR1 has a role say what it left to the garbage collector, which is switched off.
COUNT_GARBAGE = """
import gc, signal
run_role = master_server.run_role

def count_garbage(*_):
    master_server.log.info("%s: objects in cycles: %d", NAME, gc.collect())

def run(name, *more):
    global NAME
    NAME = name
    gc.disable()
    signal.signal(signal.SIGUSR1, count_garbage)
    run_role(name, *more)

master_server.run_role = run
"""


class NothingKept(MasterTest):
    """What served a connection is free when it ends, not when the garbage collector next comes.

    That comes after tens of thousands of objects: some MiB of a connection's remains.
    """

    flags = ("--timeout", "1", "--alert", "cpu>50")
    patch = COUNT_GARBAGE

    def pid(self, role):
        return int(self.master.logged(r"%s started, pid (\d+)" % role).group(1))

    def garbage(self, role):
        pattern = r"%s: objects in cycles: (\d+)" % role
        before = len(re.findall(pattern, self.master.log))
        os.kill(self.pid(role), signal.SIGUSR1)
        return int(eventually(lambda: re.findall(pattern, self.master.log)[before:])[0])

    def end_some(self, times):
        """Agents that end in every way, and requests for everything."""
        for _ in range(times):
            for way in ("close", "goodbye", "reset", "silence", "refused"):
                agent = self.agent()
                agent.send(
                    dict(GOOD, cpu=99, node=way, version="1.0", ack=True), protocol=4
                )
                self.assertEqual(agent.read_answer(), "ok")
                if way in ("goodbye", "refused"):
                    agent.send(
                        {"bye": "finished"} if way == "goodbye" else {"cpu": "much"}
                    )
                if way in ("close", "reset"):
                    getattr(agent, way)()
            for path in list(master_server.ROUTES) + ["/node/close"]:
                get(self.master.page, path)
        eventually(lambda: not nodes(self.master.page))
        eventually(
            lambda: len(os.listdir("/proc/%d/task" % self.pid("collector"))) == 1
        )

    def test_no_connection_leaves_anything_to_the_garbage_collector(self):
        self.end_some(1)
        first = [self.garbage(role) for role in ("collector", "dashboard")]
        self.end_some(3)
        self.assertEqual(
            [self.garbage(role) for role in ("collector", "dashboard")], [0, 0], first
        )


if __name__ == "__main__":
    unittest.main()
