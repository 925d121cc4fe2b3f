"""The agent's link: what a real agent.py process does to a server that the test plays.

Where a wait of the contract is long (10 s without an answer), the agent runs with that constant
made smaller, and one test has the real one.
"""

import hashlib
import hmac
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import support
from support import eventually

sys.path.insert(0, support.ROOT)
import agent

PATCHED = "import sys\nsys.path.insert(0, %r)\nimport agent\n%s\nsys.exit(agent.main(sys.argv[1:]))"
PATIENT = "agent.ANSWER_SECONDS = 0.6; agent.MAX_ANSWER_SECONDS = 2.4"


def start_agent(*flags, patch="", **more):
    """Start an agent; `patch` is statements that change its module before it runs."""
    argv = ("-c", PATCHED % (support.ROOT, patch)) if patch else ("agent.py",)
    return support.start(*(argv + flags), **more)


class DummyServer:
    """The plan's dummy server: takes connections, keeps what it is sent, answers as told.

    .samples  [(monotonic time, dict)] of all connections; .connections  how many there were
    """

    def __init__(self, port=0, answer=b"", greeting=b"", family=socket.AF_INET):
        self.answer, self.greeting = answer, greeting
        self.samples, self.sockets, self.ended = [], [], []
        self.listener = socket.socket(family)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            self.sockets.append(sock)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        try:
            sock.sendall(self.greeting)
            with sock.makefile("rb") as stream:
                while True:
                    sample = pickle.load(stream)
                    self.samples.append((time.monotonic(), sample))
                    if self.answer:
                        sock.sendall(self.answer)
        except EOFError:
            self.ended.append("FIN")
        except OSError as error:
            self.ended.append(type(error).__name__)
        sock.close()

    @property
    def dicts(self):
        return [sample for _, sample in list(self.samples)]

    @property
    def connections(self):
        return len(self.sockets)

    def close(self):
        for sock in [self.listener] + self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Cadence(unittest.TestCase):
    """The plan's Checkpoint 1 and the beat, at the real intervals: three agents at once."""

    @classmethod
    def setUpClass(cls):
        cls.started = time.monotonic()
        cls.dummy, cls.silent, cls.fast = (
            DummyServer(answer=b"ok\n"),
            DummyServer(),
            DummyServer(),
        )
        cls.fast.answer = b"ok\n"
        cls.agents = [
            start_agent("--port", cls.dummy.port),
            start_agent("--port", cls.silent.port),
            start_agent("--port", cls.fast.port, "--interval", "0.1"),
        ]

    @classmethod
    def tearDownClass(cls):
        for process in cls.agents + [cls.dummy, cls.silent, cls.fast]:
            process.close() if isinstance(process, DummyServer) else process.stop()

    @support.slow("samples at 2 s")
    def test_a_dummy_server_gets_a_dictionary_with_cpu_and_ram_every_two_seconds(self):
        eventually(lambda: len(self.dummy.samples) >= 5, 14)
        times = [when for when, _ in self.dummy.samples]
        self.assertLess(times[0] - self.started, 2)  # 1 s, and three interpreters start
        for sample in self.dummy.dicts:
            self.assertIs(type(sample["cpu"]), float)
            self.assertIs(type(sample["ram"]), float)
            self.assertTrue(0 <= sample["cpu"] <= 100 and 0 < sample["ram"] < 100)
            self.assertEqual(sample["interval"], 2)
            self.assertIs(sample["ack"], True)
            self.assertNotIn("job", sample)
        for earlier, later in zip(times, times[1:]):
            self.assertAlmostEqual(later - earlier, 2.0, delta=0.2)
        self.assertIn(
            "connected to 127.0.0.1:%d\n" % self.dummy.port, self.agents[0].log
        )
        self.assertEqual(self.agents[0].out, "")

    @support.slow("samples for seconds")
    def test_consecutive_samples_have_the_same_length(self):
        eventually(lambda: len(self.fast.samples) >= 20)
        lengths = [
            len(pickle.dumps(sample, protocol=4)) for sample in self.fast.dicts[10:20]
        ]
        self.assertEqual(len(set(lengths)), 1, lengths)

    @support.slow("samples for seconds")
    def test_the_cadence_does_not_drift(self):
        eventually(lambda: len(self.fast.samples) >= 112)
        times = [when for when, _ in self.fast.samples][1:]
        late = [(when - times[0]) / 0.1 - number for number, when in enumerate(times)]
        # The least late of each ten: a busy machine delays one sample, not all that follow; and
        # a sample that comes a whole beat late is skipped.
        least = [min(late[at : at + 10]) for at in range(0, 110, 10)]
        self.assertTrue(all(abs(value - round(value)) < 0.25 for value in least), least)

    @support.slow("a limit of seconds")
    def test_ten_seconds_without_an_answer_are_the_limit(self):
        began = eventually(lambda: self.silent.samples)[0][0]
        eventually(lambda: {"bye": "reconnecting"} in self.silent.dicts, 16)
        waited = [when for when, sample in self.silent.samples if "bye" in sample][
            0
        ] - began
        self.assertTrue(9.5 < waited < 13, waited)
        self.agents[1].logged("no answer for 10 s")


class Goodbye(unittest.TestCase):
    def test_a_signal_is_a_goodbye_with_its_name_and_exit_0(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number.name), DummyServer(
                answer=b"ok\n"
            ) as server, start_agent("--port", server.port, "--interval", "30") as tool:
                eventually(lambda: server.samples)
                tool.send_signal(number)
                self.assertEqual(tool.wait(2), 0)
                self.assertEqual(eventually(lambda: server.ended), ["FIN"])
                self.assertEqual(server.dicts[-1]["bye"], number.name)
                self.assertNotIn("Traceback", tool.log)

    def test_the_goodbye_ends_with_a_fin_though_an_answer_to_it_is_still_to_come(self):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with listener, start_agent("--port", listener.getsockname()[1]) as tool:
            sock = listener.accept()[0]
            with sock, sock.makefile("rb") as stream:
                self.assertIn("cpu", pickle.load(stream))
                tool.send_signal(signal.SIGTERM)
                while "bye" not in pickle.load(stream):
                    pass
                sock.sendall(b"ok\n")
                waited = threading.Event()
                waited.wait(0.2)  # an agent that is gone by now makes it a RST
                self.assertEqual(stream.read(), b"")
                self.assertIsNone(tool.code)
            self.assertEqual(tool.wait(2), 0)

    def test_two_signals_in_a_row_are_one_goodbye(self):
        with DummyServer() as server, start_agent("--port", server.port) as tool:
            eventually(lambda: server.samples)
            for _ in range(5):
                tool.send_signal(signal.SIGTERM)
            self.assertEqual(tool.wait(3), 0)
            self.assertEqual(
                [s for s in server.dicts if "bye" in s], [{"bye": "SIGTERM"}]
            )

    def test_without_a_master_a_signal_ends_it_as_fast(self):
        with start_agent("--port", support.closed_port()) as tool:
            tool.logged("cannot reach")
            tool.send_signal(signal.SIGTERM)
            self.assertEqual(tool.wait(2), 0)

    def test_it_ends_when_nobody_reads_its_stdout_any_more(self):
        reader, writer = os.pipe()
        with DummyServer() as server:
            tool = start_agent("--port", server.port, "--interval", "30", stdout=writer)
            os.close(writer)
            with tool:
                eventually(lambda: server.samples)
                os.close(reader)
                self.assertEqual(tool.wait(3), 0)
                self.assertEqual(server.dicts[-1], {"bye": "finished"})

    def test_nohup_holds_against_a_hangup(self):
        with DummyServer() as server, start_agent(
            "--port",
            server.port,
            "--interval",
            "0.2",
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        ) as tool:
            eventually(lambda: server.samples)
            tool.send_signal(signal.SIGHUP)
            eventually(lambda: len(server.samples) >= 3)
            self.assertEqual(tool.stop(), 0)
            self.assertEqual(server.dicts[-1], {"bye": "SIGTERM"})


class Blind(unittest.TestCase):
    def test_nothing_is_sent_while_ram_is_unknown_and_one_line_says_why(self):
        with tempfile.TemporaryDirectory() as folder:
            files = {
                "stat": "cpu  1 2 3 4 5 6 7 8\n",
                "meminfo": "MemTotal: 10 kB\nMemAvailable: 5 kB\n",
            }
            for name, text in files.items():
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            with DummyServer(answer=b"ok\n") as server, start_agent(
                "--port", server.port, "--interval", "0.1", "--procfs", folder
            ) as tool:
                eventually(lambda: len(server.samples) >= 2)
                with open(os.path.join(folder, "meminfo"), "w") as file:
                    file.write("odd\n")
                tool.logged(
                    "no ram in .*/meminfo: there is no line.*: no samples until"
                )
                count = len(server.samples)
                support.stays(lambda: len(server.samples) <= count + 1, 0.6)
                with open(os.path.join(folder, "meminfo"), "w") as file:
                    file.write(files["meminfo"])
                tool.logged("known again")
                eventually(lambda: len(server.samples) > count + 2)
                self.assertTrue(all("ram" in sample for sample in server.dicts))
                self.assertEqual(tool.log.count("meminfo"), 1)
                self.assertEqual(tool.stop(), 0)


class Reconnect(unittest.TestCase):
    def test_a_server_that_goes_away_and_returns_is_found_again(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "0.5"
        ) as tool:
            eventually(lambda: len(server.samples) >= 2)
            server.close()
            tool.logged(
                r"lost the master at 127.0.0.1:\d+ "
                r"\((it closed the connection|Connection reset by peer)\): "
                r"retrying in [0-9.]+ s"
            )
            with DummyServer(server.port, answer=b"ok\n") as again:
                eventually(lambda: len(again.samples) >= 2, 10)
                self.assertEqual(tool.log.count("connected to"), 2)
                self.assertEqual(tool.log.count("lost the master"), 1)

    def test_a_server_that_is_back_gets_a_sample_at_once_however_long_the_interval(
        self,
    ):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "30"
        ) as tool:
            eventually(lambda: server.samples, 3)
            server.close()
            tool.logged("lost the master")
            with DummyServer(server.port, answer=b"ok\n") as again:
                eventually(lambda: again.samples, 10)

    def test_a_message_that_is_sent_in_part_ends_the_connection(self):
        """Nothing may follow half a pickle; a stand-in, as the kernel sends all or nothing."""

        class Socket:
            closed = False

            def recv(self, size):
                raise BlockingIOError

            def send(self, data):
                return len(data) - 1

            def close(self):
                self.closed = True

        link, sock = agent.Link([("login", 1)], b"", 2.0), Socket()
        link.sock, link.heard = sock, time.monotonic()
        with mock.patch.object(agent, "log") as log:
            link.exchange({"cpu": 1.0})
        self.assertIsNone(link.sock)
        self.assertTrue(sock.closed)
        self.assertIn("it takes no more", log.call_args[0][0])

    def test_it_waits_for_a_server_that_starts_later_and_says_so_once(self):
        port = support.closed_port()
        with start_agent("--port", port, "--interval", "0.5") as tool:
            tool.logged("cannot reach the master .*Connection refused.*: retrying in")
            support.stays(lambda: tool.log.count("\n") == 1, 2)
            with DummyServer(port) as server:
                eventually(lambda: server.samples, 10)
                tool.logged("connected to 127.0.0.1:%d" % port)
                self.assertEqual(tool.log.count("\n"), 2)

    @support.slow("a limit of seconds")
    def test_a_server_that_stops_answering_is_left_with_a_word(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "0.2", patch=PATIENT
        ) as tool:
            eventually(lambda: len(server.samples) >= 3)
            server.answer = b""
            tool.logged("no answer for 1 s")
            eventually(lambda: {"bye": "reconnecting"} in server.dicts)
            eventually(lambda: server.dicts.count({"bye": "reconnecting"}) >= 4, 12)
            byes = [when for when, sample in server.samples if "bye" in sample]
            self.assertLess(
                byes[3] - byes[2], 2.6
            )  # its patience stays: 0.6, up to 1 to dial
            server.answer = b"ok\n"
            eventually(lambda: tool.log.count("connected to") >= 2)

    @support.slow("a long backoff")
    def test_a_server_that_never_answers_is_asked_again_less_and_less_often(self):
        with DummyServer() as server, start_agent(
            "--port", server.port, "--interval", "0.2", patch=PATIENT
        ) as tool:
            began = eventually(lambda: server.samples)[0][0]
            eventually(lambda: server.dicts.count({"bye": "reconnecting"}) >= 3, 20)
            byes = [when - began for when, sample in server.samples if "bye" in sample]
            first, second, third = byes[0], byes[1] - byes[0], byes[2] - byes[1]
            self.assertAlmostEqual(first, 0.7, delta=0.4)  # 0.6, on the beat
            self.assertGreater(second, 1.1)  # 1.2, and the time to dial
            self.assertGreater(third, 2.3)  # 2.4
            self.assertLess(tool.log.count("\n"), 8)

    @support.slow("a long backoff")
    def test_a_server_that_accepts_and_closes_is_backed_off_from(self):
        with DummyServer(
            greeting=b"error the house is full \x1b[31m\n"
        ) as server, start_agent("--port", server.port, "--interval", "0.2") as tool:
            tool.logged("the house is full")
            for sock in server.sockets:
                sock.close()
            began = time.monotonic()
            eventually(lambda: server.connections >= 3)
            self.assertGreater(time.monotonic() - began, 1.5)
            self.assertEqual(tool.log.count("the house is full"), 1)
            self.assertNotIn("\x1b", tool.log)

    @support.slow("a limit of seconds")
    def test_a_server_that_reads_nothing_holds_nothing_up(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        self.addCleanup(listener.close)
        patch = (
            "import socket\ncall = socket.create_connection\n"
            "def small(*a):\n"
            "    s = call(*a); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)\n"
            "    return s\nsocket.create_connection = small\n"
        )
        with start_agent(
            "--port",
            listener.getsockname()[1],
            "--interval",
            "0.1",
            "--verbose",
            patch=patch,
        ) as tool:
            eventually(lambda: tool.log.count("'cpu'") > 30, 15)
            sock = listener.accept()[0]
            with sock, sock.makefile("rb") as stream:
                for _ in range(10):  # whole samples, none cut short by the full pipe
                    self.assertIn("cpu", pickle.load(stream))
            tool.send_signal(signal.SIGTERM)
            self.assertEqual(tool.wait(3), 0)


class Candidates(unittest.TestCase):
    def test_candidates_are_tried_in_turn(self):
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--host",
            "127.0.0.1:%d,127.0.0.1" % support.closed_port(),
            "--port",
            server.port,
        ) as tool:
            eventually(lambda: server.samples, 3)
            tool.logged("connected to 127.0.0.1:%d" % server.port)

    def test_a_candidate_that_takes_the_call_and_hangs_up_does_not_keep_it(self):
        with DummyServer(greeting=b"error not here\n") as first, DummyServer(
            answer=b"ok\n"
        ) as second, start_agent(
            "--host", "127.0.0.1:%d,127.0.0.1:%d" % (first.port, second.port)
        ):
            eventually(lambda: second.samples, 6)

    def test_an_ipv6_candidate_is_written_in_brackets(self):
        try:
            server = DummyServer(answer=b"ok\n", family=socket.AF_INET6)
        except OSError:
            self.skipTest("no IPv6 loopback here")
        with server, start_agent("--host", "[::1]:%d" % server.port) as tool:
            eventually(lambda: server.samples, 3)
            tool.logged(r"connected to \[::1\]:%d" % server.port)

    def test_the_environment_gives_the_defaults(self):
        with DummyServer() as server, start_agent(
            env={"SENTINEL_HOST": "localhost", "SENTINEL_PORT": server.port}
        ):
            eventually(lambda: server.samples, 3)

    def test_a_name_that_does_not_resolve_is_said_and_holds_nothing_up(self):
        with start_agent("--host", "no-such-host.invalid", "--verbose") as tool:
            eventually(lambda: tool.log.count("'cpu'") >= 2, 5)
            tool.send_signal(signal.SIGTERM)
            self.assertEqual(tool.wait(3), 0)


class Secret(unittest.TestCase):
    NONCE = b"a1b2c3"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "secret")
        self.write(b"open sesame\n")

    def write(self, content, mode=0o600):
        with open(self.path, "wb") as file:
            file.write(content)
        os.chmod(self.path, mode)

    def test_a_challenge_is_answered_before_anything_else_is_sent(self):
        with DummyServer(
            greeting=b"challenge " + self.NONCE + b"\n", answer=b"ok\n"
        ) as server, start_agent("--port", server.port, "--secret-file", self.path):
            eventually(lambda: len(server.samples) >= 2, 5)
            proof = hmac.new(b"open sesame", self.NONCE, hashlib.sha256).hexdigest()
            self.assertEqual(server.dicts[0], {"auth": proof})
            self.assertIn("cpu", server.dicts[1])

    def test_without_a_challenge_it_sends_nothing_and_says_the_cure(self):
        with DummyServer() as server, start_agent(
            "--port",
            server.port,
            "--secret-file",
            self.path,
            patch="agent.WAIT_SECONDS = 0.5",
        ) as tool:
            tool.logged("--secret-file")
            eventually(lambda: server.connections >= 2)
            self.assertEqual(server.samples, [])

    @support.slow("a limit of seconds")
    def test_another_word_instead_of_a_challenge_is_no_challenge(self):
        for greeting in (
            b"ok\n",
            b"challenge \n",
            b"challenge",
            b"\0" * 5000,
            b"HTTP/1.1 400\r\n",
        ):
            with self.subTest(greeting[:20]), DummyServer(
                greeting=greeting
            ) as server, start_agent(
                "--port",
                server.port,
                "--secret-file",
                self.path,
                patch="agent.WAIT_SECONDS = 0.5",
            ) as tool:
                tool.logged("cannot reach the master")
                self.assertEqual(server.samples, [])

    def test_a_challenge_to_an_agent_without_a_secret_logs_what_the_master_says(self):
        with DummyServer(
            greeting=b"challenge %s\nerror start the agent with --secret-file\n"
            % self.NONCE
        ) as server, start_agent("--port", server.port) as tool:
            tool.logged("start the agent with --secret-file")

    def test_a_secret_that_is_not_kept_is_refused(self):
        for content, mode, words in (
            (b"x", 0o644, "chmod 600"),
            (b"x", 0o640, "chmod 600"),
            (b" \n", 0o600, "empty"),
        ):
            with self.subTest(words):
                self.write(content, mode)
                done = support.run("agent.py", "--secret-file", self.path, seconds=5)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, r"\Aerror: .*%s.*\n\Z" % words)
        os.remove(self.path)
        done = support.run(
            "agent.py", env={"SENTINEL_SECRET_FILE": self.path}, seconds=5
        )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Aerror: .*No such file.*\n\Z")


if __name__ == "__main__":
    unittest.main()
