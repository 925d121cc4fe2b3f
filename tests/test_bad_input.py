"""Bad input: samples, HTTP requests and flags; each gets its reason and disturbs nobody else."""

import contextlib
import http.client
import json
import os
import pickle
import socket
import time
import unittest

import beside
import support
from support import (
    HOST,
    MasterTest,
    PlainAgent,
    events,
    eventually,
    get,
    nodes,
    row_of,
    stays,
)

load_tests = beside.load_tests  # in a process of its own: it mostly waits


class BadSamples(MasterTest):
    """What is refused, with which reason; and that nobody else notices."""

    patch = "master_server.REFUSAL_WINDOW = 0.05"

    def refused(self, data, reason, finish=False):
        with PlainAgent(self.master.port) as agent:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                agent.send_bytes(data)
                if finish:
                    agent.socket.shutdown(socket.SHUT_WR)
            text = agent.read_to_end(3)
        self.assertRegex(text, r"^error [^\n]*%s[^\n]*\n$" % reason)

    def test_each_is_refused_with_a_reason_and_others_go_on(self):
        good = self.agent()
        sample = {"ram": 1, "node": "good", "ack": True, "interval": 60}
        good.send(dict(sample, cpu=1))
        self.assertEqual(good.read_line(), "ok")
        for number, (what, data, reason) in enumerate(bad_samples()):
            with self.subTest(what):
                self.refused(data, reason)
                good.send(dict(sample, cpu=number % 100))
                self.assertEqual(good.read_line(), "ok")
        row = self.row(node="good")
        self.assertEqual(
            [row["address"] for row in nodes(self.master.page)], [row["address"]]
        )
        self.master.logged(r"refused.*127\.0\.0\.1")
        eventually(lambda: events(self.master.page, "refused"))

    def test_a_bad_sample_after_good_ones_of_the_same_shape_ends_that_agent_alone(self):
        other = self.agent()
        other.send({"cpu": 1.5, "ram": 1.5, "node": "stays-good", "interval": 60})
        good = {"cpu": 1.5, "ram": 2.5, "node": "turns-bad", "load1": 0.5}
        for number, change in enumerate(
            (
                {"cpu": 100.5},
                {"ram": -0.5},
                {"cpu": float("nan")},
                {"load1": float("inf")},
                {"cpu": float("inf"), "ram": float("-inf")},
                {"ram": 1e308, "load1": 1e308},
                {"cpu": True},
                {"cpu": "1.5"},
                {"node": "x" * 256},
            )
        ):
            with self.subTest(change), PlainAgent(self.master.port) as agent:
                for cpu in (1.5, 2.5, number + 0.25):
                    agent.send(dict(good, cpu=cpu))
                self.row(node="turns-bad", cpu=number + 0.25)
                agent.send(dict(good, **change))
                self.assertRegex(agent.read_to_end(3), "^error [^\n]+\n$")
                self.gone(1.5, node="turns-bad")
        self.row(node="stays-good")

    def test_a_sample_of_16_kib_is_taken_and_one_of_a_byte_more_is_not(self):
        first = pickle.dumps({"cpu": 1, "ram": 1, "ack": True}, 2)
        for extra, answer in (
            (0, "ok"),
            (1, "error a sample of more than 16384 bytes"),
        ):
            sample = {"k%d" % n: "%0255d" % n for n in range(60)}
            sample.update(cpu=1, ram=1, ack=True, last="")
            sample["last"] = "x" * (16384 + extra - len(pickle.dumps(sample, 2)))
            self.assertEqual(len(pickle.dumps(sample, 2)), 16384 + extra)
            with self.subTest(extra), PlainAgent(self.master.port) as agent:
                agent.send_bytes(first + pickle.dumps(sample, 2))
                self.assertEqual([agent.read_line(), agent.read_line()], ["ok", answer])

    def test_half_a_sample_and_the_end_leaves_nothing(self):
        agent = self.agent()
        agent.send_bytes(pickle.dumps({"cpu": 1, "ram": 1, "node": "half"})[:-3])
        agent.close()
        stays(lambda: row_of(self.master.page, node="half") is None, 1)


def bad_samples():
    """(what, bytes, pattern of the reason) of samples one past each limit of the wire."""

    def dumped(protocol=2, **changes):
        sample = {"cpu": 1, "ram": 1}
        sample.update(changes)
        return pickle.dumps(
            {key: value for key, value in sample.items() if value != "drop"}, protocol
        )

    yield "no cpu", dumped(cpu="drop"), "cpu"
    yield "no ram", dumped(ram="drop"), "ram"
    for key in ("cpu", "ram"):
        for value in (
            -1,
            -0.1,
            100.1,
            101,
            2**62,
            "50",
            None,
            True,
            float("nan"),
            float("inf"),
            float("-inf"),
        ):
            yield (
                "%s is %r" % (key, value),
                dumped(**{key: value}),
                r"(%s|finite)" % key,
            )
    yield "65 keys", pickle.dumps({"k%d" % n: 1 for n in range(65)}), "64"
    yield "63 keys, cpu and ram", dumped(**{"k%d" % n: 1 for n in range(63)}), "64"
    for protocol in (2, 4):
        yield "text of 256", dumped(protocol, node="x" * 256), "255"
        yield "256 bytes of é", dumped(protocol, node="é" * 128), "255"
        yield "a key of 256", dumped(protocol, **{"k" * 256: 1}), "255"
        yield "65 bits", dumped(protocol, x=2**64), "(64|opcode)"
        yield "-65 bits", dumped(protocol, x=-(2**63) - 1), "(64|opcode)"
        yield "3,000 bits", dumped(protocol, x=1 << 3000), "(64|opcode)"
        yield "an infinite extra", dumped(protocol, load1=float("inf")), "finite"
        yield "an unknown NaN", dumped(protocol, whatever=float("nan")), "finite"
        yield "a nested dict", dumped(protocol, x={"y": 1}), "(flat|opcode)"
        yield "a list", dumped(protocol, x=[1]), "(flat|opcode)"
        yield "bytes", dumped(protocol, x=b"1"), "(flat|opcode)"
        yield "a lone surrogate", dumped(protocol, node="\ud800"), "UTF-8"
        yield "a list alone", pickle.dumps([1, 2], protocol), "(flat|opcode)"
        yield "a number alone", pickle.dumps(1, protocol), "(flat|opcode)"
        yield "numbers as keys", pickle.dumps({1: 2}, protocol), "(key|string)"
        yield "code", pickle.dumps(os.getpid, protocol), "(flat|opcode)"
    for key, value in (("bye", 1), ("bye", None), ("auth", "x"), ("auth", None)):
        reason = "(cpu|%s)" % key
        yield (
            "%s: %r and cpu 5000" % (key, value),
            dumped(cpu=5000, **{key: value}),
            reason,
        )
        yield "%s is %r alone" % (key, value), pickle.dumps({key: value}), reason
    yield "protocol 0", dumped(0), "protocol"
    yield "protocol 1", dumped(1), "protocol"
    yield "protocol 6", b"\x80\x06" + dumped(4)[2:], "protocol"
    yield "17 KiB", dumped(**{"k%d" % n: "%0255d" % n for n in range(62)}), "16384"
    yield "4 GiB announced", bytes.fromhex("80025d72000000102e"), "(flat|opcode)"
    yield "a frame of 2 EiB", b"\x80\x04\x95" + b"\xff" * 7 + b"\x1f", "(16384|FRAME)"
    yield "HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"
    yield "text", b"hello, is this the master?\n", "pickle"
    yield "zeros", bytes(64), "pickle"
    yield "a pickle that only pads", b"\x80\x02}" + b"q\x00" * 9000, "(16384|opcode)"


class BadRequests(MasterTest):
    """HTTP: read-only, short typed errors, everything escaped."""

    def raw(self, data):
        """(status, headers, body) of raw request bytes."""
        with socket.create_connection(
            (HOST, self.master.page), support.PATIENCE
        ) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            response = http.client.HTTPResponse(sock)
            response.begin()
            return response.status, response.msg, response.read().decode("utf-8")

    def test_what_cannot_be_answered_gets_a_short_typed_error(self):
        long = b"x" * 70000
        for what, data, status in (
            ("no such page", b"GET /nope HTTP/1.1\r\n\r\n", 404),
            ("a path upwards", b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
            (
                "an encoded path upwards",
                b"GET /%2e%2e/etc/passwd HTTP/1.1\r\n\r\n",
                404,
            ),
            ("POST", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\na=1", 405),
            ("PUT", b"PUT /api/nodes HTTP/1.1\r\n\r\n", 405),
            ("DELETE", b"DELETE / HTTP/1.1\r\n\r\n", 405),
            ("OPTIONS", b"OPTIONS * HTTP/1.1\r\n\r\n", 405),
            ("TRACE", b"TRACE / HTTP/1.1\r\n\r\n", 405),
            ("an unknown method", b"BREW /pot HTTP/1.1\r\n\r\n", 405),
            ("no request line", b"\r\n\r\n", 400),
            ("a word", b"hello\r\n\r\n", 400),
            ("HTTP/0.9", b"GET /\r\n\r\n", 400),
            ("bad version", b"GET / HTTP/x\r\n\r\n", 400),
            ("bytes", bytes(range(128, 256)) + b"\r\n\r\n", 400),
            ("a pickle", pickle.dumps({"cpu": 1}, 2) + b"\r\n\r\n", 400),
            ("a header without a colon", b"GET / HTTP/1.1\r\nHost\r\n\r\n", 400),
            ("a folded header", b"GET / HTTP/1.1\r\nA: 1\r\n b\r\n\r\n", 400),
            ("a blank in a header's name", b"GET / HTTP/1.1\r\nA : 1\r\n\r\n", 400),
            ("NUL in the target", b"GET /\0 HTTP/1.1\r\n\r\n", (400, 404)),
            (
                "500 parameters",
                b"GET /?" + b"&a=1" * 500 + b" HTTP/1.1\r\n\r\n",
                (200, 400),
            ),
            ("a long target", b"GET /" + long + b" HTTP/1.1\r\n\r\n", 414),
            ("an endless target", b"GET /" + long, 414),
            ("a long header", b"GET / HTTP/1.1\r\nA: " + long + b"\r\n\r\n", 431),
            ("many headers", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000 + b"\r\n", 431),
        ):
            with self.subTest(what):
                got, headers, body = self.raw(data)
                self.assertIn(
                    got, status if isinstance(status, tuple) else (status,), body
                )
                self.assertEqual(headers["Connection"], "close")
                if got != 200:
                    self.assertLess(len(body), 500)
                    self.assertRegex(headers["Content-Type"], "^text/plain")
                    self.assertNotIn("Traceback", body)
                if got == 405:
                    self.assertEqual(headers["Allow"], "GET, HEAD")
        self.assertNotIn("defect", self.master.log)
        self.assertEqual(get(self.master.page).status, 200)

    @support.slow("a limit of 5 s")
    def test_slow_requests_get_408_after_five_seconds_and_hold_nobody_up(self):
        with contextlib.ExitStack() as stack:
            slow = [
                stack.enter_context(
                    socket.create_connection((HOST, self.master.page), 20)
                )
                for _ in range(20)
            ]
            start = time.monotonic()
            for number, sock in enumerate(slow):
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n"[: number + 1])
            self.assertEqual(get(self.master.page, seconds=3).status, 200)
            answers = [sock.recv(200) for sock in slow]
        self.assertEqual({answer[:12] for answer in answers}, {b"HTTP/1.1 408"})
        self.assertAlmostEqual(time.monotonic() - start, 5, delta=2)

    def test_head_is_get_without_the_body(self):
        for path in ("/", "/api/nodes", "/api/events", "/healthz"):
            with self.subTest(path):
                head, whole = (
                    get(self.master.page, path, "HEAD"),
                    get(self.master.page, path),
                )
                self.assertEqual(head.status, 200)
                with PlainAgent(self.master.page) as client:
                    client.send_bytes(b"HEAD %s HTTP/1.1\r\n\r\n" % path.encode())
                    self.assertEqual(
                        client.read_to_end().partition("\r\n\r\n")[1:], ("\r\n\r\n", "")
                    )
                self.assertEqual(
                    head.headers["Content-Type"], whole.headers["Content-Type"]
                )
                self.assertAlmostEqual(
                    int(head.headers["Content-Length"]),
                    len(whole.text.encode()),
                    delta=200,
                )

    def test_every_text_of_a_peer_is_escaped_on_the_page(self):
        hostile = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
        agent = self.agent()
        agent.send(
            {
                "cpu": 95,
                "ram": 1,
                **{
                    key: key[:2] + hostile
                    for key in ("node", "user", "job", "job_name", "version")
                },
            }
        )
        self.row(address=str(agent.address))
        page = get(self.master.page, "/?q=" + "%3Cscript%3Ealert(3)").text
        whole = get(self.master.page).text
        self.assertIn("&lt;script&gt;alert(1)", whole)
        for text in (page, whole):
            self.assertNotIn("<script>alert", text)
            self.assertNotIn("<img", text)
            self.assertNotIn("\"'&<", text)
        row = self.row(address=str(agent.address))
        self.assertEqual(row["node"], "no" + hostile, "JSON has it as it is")

    def test_control_characters_are_replaced_on_arrival(self):
        self.agent().send(
            {"cpu": 1, "ram": 1, "node": "in vain: \x1b[31m", "bye": 1, "auth": 2}
        )
        agent = self.agent()
        agent.send({"cpu": 1, "ram": 1, "node": "a\x1b[31mb\nc\x00d\u202ee\x9bf"})
        row = self.row(address=str(agent.address))
        self.assertEqual(row["node"], "a\ufffd[31mb\ufffdc\ufffdd\ufffde\ufffdf")
        self.master.logged("connected a")
        self.assertNotIn("\x1b", self.master.log)

    def test_nothing_is_loaded_from_elsewhere_and_the_policy_forbids_it(self):
        answer = get(self.master.page)
        self.assertIn("default-src 'none'", answer.headers["Content-Security-Policy"])
        self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
        self.assertNotRegex(
            answer.text, r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//"""
        )

    def test_json_is_what_the_design_says(self):
        self.agent().send({"cpu": 15.5, "ram": 40.2, "node": "ünï"})
        self.row(node="ünï")
        answer = get(self.master.page, "/api/nodes")
        whole = json.loads(answer.text)
        self.assertRegex(answer.headers["Content-Type"], "^application/json")
        self.assertEqual(whole["capacity"], 1024)
        self.assertAlmostEqual(whole["time"], time.time(), delta=5)
        for key in (
            "slot",
            "address",
            "cpu",
            "ram",
            "age",
            "node",
            "user",
            "job",
            "job_name",
        ):
            self.assertIn(key, whole["nodes"][0])
        event = self.event("connected", "ünï")
        self.assertLessEqual({"time", "kind", "node", "text"}, set(event))

    def test_healthz_says_ok(self):
        answer = get(self.master.page, "/healthz")
        self.assertEqual((answer.status, answer.text.strip()), (200, "ok"))


class BadFlags(unittest.TestCase):
    """One line that says what was wrong and what is allowed; exit 2."""

    def check(self, tool, table):
        """The first row by a start of its own, too."""
        flags = [flags for flags, _ in table]
        done = [support.run(tool, *flags[0], seconds=20)]
        done += support.run_each(tool, flags)
        for each, (words, reason) in zip(done, [table[0], *table]):
            with self.subTest(" ".join([tool, *words])):
                self.assertRefused(each, reason)

    def assertRefused(self, done, reason):
        self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        (line,) = done.stderr.splitlines()
        self.assertIn("error:", line)
        self.assertRegex(line, reason)

    def test_of_the_master(self):
        free = ["--port", "0", "--dashboard-port", "0"]
        table = (
            (["--nope"], "--nope"),
            (["extra"], "extra"),
            (["--port", "http"], "port.*http"),
            (["--port", "65536"], "port.*65535"),
            (["--port", "-1"], "port.*65535"),
            (["--dashboard-port", "99999"], "port.*65535"),
            (["--port"], "--port"),
            (["--host", "no such host.invalid", *free], "--host.*no such host.invalid"),
            (["--host", "", *free], "host"),
            (["--dashboard-host", "256.1.1.1", *free], "--dashboard-host.*256.1.1.1"),
            (["--max-agents", "0"], "max-agents.*1"),
            (["--max-agents", "many"], "max-agents"),
            (["--max-agents", "100000000"], "max-agents"),
            (["--timeout", "0"], "timeout"),
            (["--timeout", "nan"], "timeout"),
            (["--timeout", "-5"], "timeout"),
            (["--timeout", "soon"], "timeout"),
            (["--alert", "cpu"], "alert.*(METRIC|cpu>90)"),
            (["--alert", "cpu>"], "alert"),
            (["--alert", "cpu>=90"], "alert"),
            (["--alert", "cpu>90 for"], "alert"),
            (["--alert", "cpu>90 for -1"], "alert"),
            (["--alert", ""], "alert"),
            (["--alert", "fan>90"], "alert.*fan.*(cpu|ram)"),
            (["--alert", "node>90"], "alert.*node"),
            (["--alert", "cpu>1e999"], "alert"),
            (["--shm-name", "a/b"], "shm-name"),
            (["--shm-name", ""], "shm-name"),
            (["--shm-name", "x" * 300], "shm-name"),
        )
        self.check("master_server.py", table)

    def test_of_the_agent(self):
        table = (
            (["--nope"], "--nope"),
            (["--port", "65536"], "port.*65535"),
            (["--port", "0"], "port.*1"),
            (["--port", "x"], "port"),
            (["--interval", "0"], "interval.*0.1.*60"),
            (["--interval", "61"], "interval.*60"),
            (["--interval", "nan"], "interval"),
            (["--interval", "fast"], "interval"),
            (["--host", ""], "host"),
            (["--host", "a,,b"], "host"),
            (["--name", ""], "name"),
            (["--name", "x" * 256], "name.*(63|255)"),
            (["--name", "a\nb"], "name"),
        )
        self.check("agent.py", table)

    def test_of_the_bridge(self):
        table = (
            (["--nope"], "--nope"),
            (["--local-port", "65536"], "port.*65535"),
            (["--remote-port", "0"], "port"),
            (["--remote-port", "x"], "port"),
            (["--host", "256.1.1.1", "--local-port", "0"], "host"),
        )
        self.check("port_forward.py", table)

    def test_of_the_reader(self):
        table = (
            (["--nope"], "--nope"),
            (["--port", "65536"], "port.*65535"),
            (["--port", "x"], "port"),
            (["--shm-name", "a/b"], "shm-name"),
            (["--shm-name", ""], "shm-name"),
            (["--port", "1", "--shm-name", "x"], "not allowed"),
        )
        self.check("test_reader.py", table)

    def test_help_is_a_result_and_names_the_default_port(self):
        for tool in (
            "master_server.py",
            "agent.py",
            "port_forward.py",
            "test_reader.py",
        ):
            with self.subTest(tool):
                done = support.run(tool, "--help")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn("13579", done.stdout)


if __name__ == "__main__":
    unittest.main()
