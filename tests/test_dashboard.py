"""Dashboard: real requests to a real master: parser, hosts, token, formats, rude clients."""

import collections
import contextlib
import http.client
import itertools
import json
import math
import re
import socket
import subprocess
import threading
import time
import types
import unittest
import urllib.parse
from unittest import mock

import beside
import support
from support import HOST, PlainAgent, eventually, get, requires, start_master

import master_server as master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

TOKEN = "s3cret/with+signs="


def request(port, data, seconds=support.PATIENCE):
    """The whole answer to raw bytes; b"" when the connection is just closed."""
    with socket.create_connection((HOST, port), seconds) as client:
        client.settimeout(seconds)
        with contextlib.suppress(OSError):
            client.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            for chunk in iter(lambda: client.recv(65536), b""):
                answer += chunk
        return answer


def status(port, data, seconds=support.PATIENCE):
    """The status of the answer to raw bytes; 0 for none."""
    return int((request(port, data, seconds).split(b" ") + [b"0", b"0"])[1])


class Parser(unittest.TestCase):
    def test_a_good_request_is_taken_apart(self):
        self.assertEqual(
            master.parse_request(
                b"GET /node/a%2Fb%20c?q=%ED%95%99&x HTTP/1.1\r\nHost: h:1\r\nX-Y:  z \r\n\r\n"
            ),
            (
                "GET",
                "/node/a%2Fb%20c",
                {"q": "학", "x": ""},
                {"host": "h:1", "x-y": "z"},
            ),
        )
        self.assertEqual(
            master.parse_request(b"HEAD / HTTP/1.0\r\n\r\n"), ("HEAD", "/", {}, {})
        )

    def test_a_path_leads_where_its_end_says_whatever_the_prefix(self):
        for path, route, name in (
            ("/", "/", ""),
            ("/rnode/c1/8080/", "/", ""),
            ("/node/c1/8080/", "/", ""),
            ("/node/c1", "/node/", "c1"),
            ("/node/", "/node/", ""),
            ("/node/a%2Fb%20c", "/node/", "a/b c"),
            ("/node/..", "/node/", ".."),
            ("/node/c1/8080/node/c2", "/node/", "c2"),
            ("/node/c1/8080/node/", "/node/", ""),
            ("/nodes.txt", "/nodes.txt", ""),
            ("/a/nodes.txt", "/nodes.txt", ""),
            ("/a/api/nodes", "/api/nodes", ""),
            ("/%6eodes.txt", "/nodes.txt", ""),
        ):
            with self.subTest(path):
                self.assertEqual(master.find_route(path), (route, name))
        for path in ("/node", "/nodes", "/xnodes.txt", "/nodes.txt/x", "/node/a/b"):
            with self.subTest(path), self.assertRaises(master.HTTPError) as caught:
                master.find_route(path)
            self.assertEqual(caught.exception.status, 404)

    def test_whatever_is_no_request_is_refused_with_its_status(self):
        many = "&".join("a%d=1" % n for n in range(17)).encode()
        for status, data in (
            (400, b""),
            (400, b"\r\n\r\n"),
            (400, b"GET\r\n\r\n"),
            (400, b"GET /\r\n\r\n"),
            (400, b"GET / HTTP/2\r\n\r\n"),
            (400, b"GET / HTTP/1.1 \r\n\r\n"),
            (400, b"GET  / HTTP/1.1\r\n\r\n"),
            (400, b"GET / HTTP/1.1\n\n"),
            (400, b"GET * HTTP/1.1\r\n\r\n"),
            (400, b"GET http://h/ HTTP/1.1\r\n\r\n"),
            (400, b"GET /\x00 HTTP/1.1\r\n\r\n"),
            (400, b"GET /\xff HTTP/1.1\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nno colon\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\n: x\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nA b: x\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\n folded: x\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nA: x\ny\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nA: x"),
            (400, b"GET /?" + many + b" HTTP/1.1\r\n\r\n"),
            (405, b"POST / HTTP/1.1\r\n\r\n"),
            (405, b"get / HTTP/1.1\r\n\r\n"),
            (405, b"DELETE /x HTTP/1.1\r\n\r\n"),
        ):
            with self.subTest(data), self.assertRaises(master.HTTPError) as caught:
                master.parse_request(data)
            self.assertEqual(caught.exception.args[0], status)

    def test_a_seeded_fuzzer_finds_nothing_but_requests_and_refusals(self):
        import random

        chance = random.Random(5)
        seeds = [
            b"GET /node/a%2Fb?q=1&sort=-cpu HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
            b"HEAD //[::1]/?%00=%ff HTTP/1.0\r\nCookie: a=b; c\r\nAuthorization: Bearer x\r\n\r\n",
        ]
        for _ in range(20000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.choice((0, 1, 4))] = bytes(
                    chance.choice(b"\r\n :?&=%/\x00\xff[]GET1.")
                    for _ in range(chance.randrange(4))
                )
            try:
                method, path, query, headers = master.parse_request(bytes(data))
            except master.HTTPError:
                continue
            self.assertIn(method, ("GET", "HEAD"))
            self.assertTrue(path.startswith("/"))


class Cost(unittest.TestCase):
    def test_a_process_that_has_ended_still_counts_or_the_counter_would_fall(self):
        burn = "import time\nwhile time.process_time() < 0.5: pass"
        code = (
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', %r])\n"
            "print('done', flush=True)\nsys.stdin.read()" % burn
        )
        with support.start("-c", code, stdin=subprocess.PIPE) as tool:
            self.addCleanup(tool.process.stdin.close)
            eventually(lambda: "done" in tool.out)
            seconds, memory = master.measure(tool.pid)
        self.assertGreater(seconds, 0.45)
        self.assertGreater(memory, 2**20)

    def test_what_cannot_be_seen_is_none_and_not_nothing(self):
        with support.start("-c", "") as tool:
            tool.wait()
        self.assertIsNone(master.measure(tool.pid))

    def test_what_it_takes_is_the_mean_of_a_minute_and_never_less_than_nothing(self):
        board = types.SimpleNamespace(
            accounts=collections.deque(maxlen=master.ACCOUNTS),
            cost={},
            view=types.SimpleNamespace(samples=0),
        )
        told = []
        with mock.patch.object(
            master.time, "monotonic", side_effect=itertools.count(0, 10)
        ):
            for seconds in [0, 30] + [30 + n for n in range(6)] + [0]:
                master.Dashboard.account(board, seconds, 2**20)
                told.append(board.cost.get("text", "").partition(" % ")[0].split()[-1:])
                board.view.samples += 5
        # what it took at first is in the mean for a minute, and then no more
        self.assertEqual(
            told[:2] + told[6:], [[], ["300.0"], ["56.7"], ["8.3"], ["0.0"]]
        )
        self.assertIn("for 0.5 samples a second", board.cost["text"])


class Nameless(support.MasterTest):
    patch = "master_server.TICK_SECONDS = 0.2"

    def test_a_node_without_a_name_has_curves_as_well(self):
        agent = self.agent()

        def has_curve():
            agent.send({"cpu": 50.0, "ram": 40.0, "interval": 60})
            return '<path class="cpu" d="M' in get(self.master.page).text

        eventually(has_curve)


class Rendered(unittest.TestCase):
    """How often work is done, by a dashboard whose table and page count who asks for them."""

    def ask(self, count, query=""):
        """That many browsers at once; the set of what they are answered."""
        bodies = set()
        threads = [
            threading.Thread(
                target=lambda: bodies.add(
                    self.dashboard.answer(
                        master.Request("GET", "/", {"q": query}, {}), {}
                    )
                )
            )
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return bodies

    def render(self, view, query, site):
        self.pages += 1
        time.sleep(0.05)  # long enough for the others to come
        return "page %d" % self.pages

    def test_a_page_is_rendered_once_a_copy_of_the_table_whoever_asks(self):
        self.pages = 0
        table = mock.Mock()
        table.snapshot.side_effect = lambda: types.SimpleNamespace(
            left=[], events=[], all_events=0, missed=-math.inf, time=0.0, beat=0.1
        )
        options = types.SimpleNamespace(
            dashboard_host="localhost", dashboard_token=None, allow_host=[]
        )
        with mock.patch.dict(
            master.ROUTES, {"/": (master.HTML, self.render)}
        ), mock.patch.object(master, "FRESH_SECONDS", 1000):
            self.dashboard = master.Dashboard(None, table, options)
            self.assertEqual(self.ask(20), {b"page 1"})
            self.assertEqual(self.ask(5, "c1"), {b"page 2"})
            self.assertEqual(self.ask(5), {b"page 1"})
            self.assertEqual(table.snapshot.call_count, 1)
            self.dashboard.viewed -= 2000
            self.assertEqual(self.ask(5), {b"page 3"})
            self.assertEqual(table.snapshot.call_count, 2)


class Missed(unittest.TestCase):
    """What a dashboard remembers of events that the ring has no room for any more."""

    def copy(self, when, all_events, missed):
        """A copy of the table of then, with a full ring whose oldest event is of `missed`."""
        return types.SimpleNamespace(
            left=[], events=[], time=when, all_events=all_events, missed=missed
        )

    def test_only_events_that_came_and_went_between_two_copies_are_missed(self):
        table = mock.Mock()
        table.snapshot.return_value = self.copy(100.0, 300, 90.0)
        options = types.SimpleNamespace(dashboard_host="localhost", allow_host=[])
        board = master.Dashboard(None, table, options)
        for all_events, missed in ((300, 90.0), (428, 90.0), (429, 95.0)):
            view = self.copy(101.0, all_events, 95.0)
            board.who_left(view)
            self.assertEqual(view.missed, missed)


class Served(unittest.TestCase):
    """A master with three nodes, for all tests of a class."""

    flags = ()

    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        cls.master = cls.stack.enter_context(start_master(*cls.flags))
        cls.page = cls.master.page
        cls.stop = threading.Event()
        cls.stack.callback(cls.stop.set)
        for number, name in ((1, "c1"), (2, "a/b c"), (3, "<b>")):
            agent = cls.stack.enter_context(PlainAgent(cls.master.port))
            agent.send(
                {
                    "cpu": 10.0 * number,
                    "ram": 40.0,
                    "node": name,
                    "job": "42",
                    "user": "ann",
                    "interval": 60,
                }
            )

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()


class Paths(Served):
    def setUp(self):
        eventually(lambda: len(support.nodes(self.page)) == 3)

    def test_every_path_has_its_type_and_status(self):
        for path, status, kind, text in (
            ("/", 200, "text/html", "<h1>"),
            ("/?sort=-cpu&q=c&job=42", 200, "text/html", "c1"),
            ("/node/c1", 200, "text/html", "<h1>c1"),
            ("/node/a%2Fb%20c", 200, "text/html", "a/b c"),
            ("/node/%3Cb%3E", 200, "text/html", "&lt;b&gt;"),
            ("/node/nobody", 404, "text/plain", "no such node"),
            ("/node/", 404, "text/plain", "no such node"),
            ("/node", 404, "text/plain", "no such"),
            ("/api/nodes", 200, "application/json", '"nodes"'),
            ("/api/events", 200, "application/json", '"connected"'),
            ("/nodes.csv", 200, "text/csv", "c1"),
            ("/nodes.txt", 200, "text/plain", "c1"),
            ("/metrics", 200, "text/plain; version=0.0.4", "sentinel_nodes{} 3"),
            ("/healthz", 200, "text/plain", "ok\n"),
            ("/favicon.ico", 404, "text/plain", "/metrics"),
            ("/%2e%2e/etc/passwd", 404, "text/plain", "no such page"),
        ):
            with self.subTest(path):
                answer = get(self.page, path, headers={"Accept": "text/html"})
                self.assertEqual(answer.status, status)
                self.assertTrue(answer.headers["Content-Type"].startswith(kind))
                self.assertIn(text, answer.text)
                self.assertEqual(answer.headers["Cache-Control"], "no-store")
                self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
                self.assertIn(
                    "default-src 'none'", answer.headers["Content-Security-Policy"]
                )
                self.assertEqual(answer.headers["Connection"], "close")

    def test_head_says_the_same_and_sends_nothing(self):
        for path in ("/", "/nodes.txt", "/nobody"):
            raw = request(
                self.page,
                b"HEAD %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode(),
            )
            head, _, body = raw.partition(b"\r\n\r\n")
            self.assertEqual(body, b"")
            self.assertGreater(
                int(re.search(rb"Content-Length: (\d+)", head).group(1)), 2
            )

    def test_curl_gets_text_and_a_browser_or_who_does_not_say_gets_html(self):
        for (accept, kind), path in itertools.product(
            (
                ("*/*", "text/plain"),
                ("text/plain", "text/plain"),
                ("text/html,application/xhtml+xml", "text/html"),
                (None, "text/html"),
            ),
            ("/", "/jobs"),
        ):
            headers = {} if accept is None else {"Accept": accept}
            with contextlib.closing(
                http.client.HTTPConnection(HOST, self.page, timeout=20)
            ) as link:
                link.request("GET", path, headers=headers)
                response = link.getresponse()
                self.assertTrue(
                    response.headers["Content-Type"].startswith(kind), (path, accept)
                )
                self.assertIn("Accept", response.headers["Vary"])

    def test_an_answer_is_packed_for_who_can_unpack_it(self):
        import gzip

        with contextlib.closing(
            http.client.HTTPConnection(HOST, self.page, timeout=20)
        ) as link:
            link.request(
                "GET",
                "/",
                headers={"Accept-Encoding": "gzip, br", "Accept": "text/html"},
            )
            response = link.getresponse()
            body = response.read()
        self.assertEqual(response.headers["Content-Encoding"], "gzip")
        self.assertIn(b"<h1>", gzip.decompress(body))
        self.assertIsNone(get(self.page).headers["Content-Encoding"])

    def test_what_is_wrong_is_said_with_its_status(self):
        line = b"GET /%s HTTP/1.1\r\n"
        for status_, data in (
            (414, line % (b"a" * 5000) + b"\r\n"),
            (414, b"GET /" + b"a" * 5000),
            (431, line % b"" + b"A: b\r\n" * 4000 + b"\r\n"),
            (
                405,
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
            ),
            (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
            (400, b"\x80\x02}q\x00."),
            (400, line % (b"?" + b"&".join(b"a%d=1" % n for n in range(20))) + b"\r\n"),
        ):
            with self.subTest(data[:30]):
                answer = request(self.page, data)
                self.assertEqual(int(answer.split(b" ")[1]), status_)
                self.assertIn(b"Content-Type: text/plain", answer)
                self.assertEqual(answer.split(b"\r\n\r\n")[1].count(b"\n"), 1)
        self.assertIn(
            b"Allow: GET, HEAD", request(self.page, b"PUT / HTTP/1.1\r\n\r\n")
        )

    @support.slow("a limit of 5 s")
    def test_half_a_request_has_five_seconds(self):
        start = time.monotonic()
        self.assertEqual(status(self.page, b"GET / HTTP/1.1\r\nHost: loc"), 408)
        self.assertLess(time.monotonic() - start, 7)

    @support.slow("a limit of 5 s")
    def test_single_bytes_do_not_renew_the_five_seconds(self):
        start = time.monotonic()
        with socket.create_connection(
            (HOST, self.page), 10
        ) as client, contextlib.suppress(OSError):
            client.settimeout(0.3)
            while time.monotonic() - start < 10:
                client.sendall(b"G")
                with contextlib.suppress(socket.timeout):
                    if client.recv(100):
                        break
        self.assertLess(time.monotonic() - start, 7)

    def test_the_log_keeps_quiet_about_rude_clients(self):
        for data in (b"", b"GET", b"\x00" * 10, b"POST / HTTP/1.1\r\n\r\n"):
            with socket.create_connection((HOST, self.page), 10) as client:
                client.sendall(data)
        get(self.page)
        self.assertNotIn("Traceback", self.master.log)
        self.assertNotIn("defect", self.master.log)

    def test_health_tells_what_the_master_itself_takes(self):
        takes = (
            r"ok\nThis master takes (\S+) % of a core and (\S+) MB of resident memory"
            r" for (\S+) samples a second\n"
        )
        with start_master("--with-agent") as tool:
            told = set()

            def look():
                answer = get(tool.page, "/healthz?verbose").text
                found = re.fullmatch(takes, answer)
                told.update(() if found else {answer})
                # the agent may take longer than the master to be measured
                return found if found and float(found.group(3)) else None

            figures = eventually(look)
        self.assertEqual(
            told, {"ok\nWhat this master takes is not known\n"}, "until it was seen"
        )
        self.assertGreater(min(map(float, figures.groups())), 0, figures[0])
        text = get(self.page, "/metrics").text
        self.assertGreater(
            float(re.search(r"master_cpu_seconds_total\{\} (.*)", text).group(1)), 0
        )
        self.assertGreater(
            float(re.search(r"master_memory_bytes\{\} (.*)", text).group(1)), 1e7
        )

    def test_the_table_is_copied_at_most_four_times_a_second_whoever_asks(self):
        start, times = time.monotonic(), set()
        while time.monotonic() - start < 2:
            times.add(json.loads(get(self.page, "/api/nodes").text)["time"])
        self.assertLessEqual(len(times), 4 * (time.monotonic() - start) + 2)


class Whole(Served):
    def test_whole_numbers_are_written_whole_and_others_are_not(self):
        sample = {"cpus": 4, "mem_total": 4111360000.0, "load1": 0.5, "swap": 5.0}
        with PlainAgent(self.master.port) as agent:
            agent.send(dict(sample, cpu=1.0, ram=1.0, node="whole"))
            eventually(lambda: "whole" in get(self.page, "/nodes.txt").text)
            text = get(self.page, "/api/nodes").text
            table = get(self.page, "/nodes.csv").text
        for words in ('"cpus": 4,', '"mem_total": 4111360000,', '"load1": 0.5,'):
            self.assertIn(words, text)
        self.assertIn(",4111360000,", table)


class NoToken(Served):
    def test_a_token_that_nobody_asks_for_leads_nowhere_else(self):
        eventually(lambda: len(support.nodes(self.page)) == 3)
        for path in ("/?token=x", "/node/c1?token=x"):
            answer = get(self.page, path, headers={"Accept": "text/html"})
            self.assertEqual(answer.status, 200, path)
            self.assertIsNone(answer.headers["Set-Cookie"])


class Storm(Served):
    flags = ("--alert", "cpu>50")

    def test_who_was_lost_stays_on_the_page_when_alerts_push_it_out_of_the_ring(self):
        with PlainAgent(self.master.port) as agent:
            agent.send({"cpu": 1.0, "ram": 1.0, "node": "gone", "version": "1.0"})
            eventually(lambda: "gone" in get(self.page, "/nodes.txt").text)
        eventually(lambda: support.events(self.page, "lost"))
        # many nodes and addresses, for one alone cannot push anything out
        for number in range(50):
            source = ("127.0.1.%d" % (number + 1), 0)
            with PlainAgent(self.master.port, source=source) as agent:
                for cpu in (0.0, 99.0, 0.0, 99.0):
                    agent.send({"cpu": cpu, "ram": 1.0, "node": "n%d" % number})
        eventually(lambda: not support.events(self.page, "lost"))
        page = get(self.page).text
        self.assertRegex(page, r'(?s)<section id="lost".*/node/gone')
        self.assertIn('sentinel_node_lost{node="gone"', get(self.page, "/metrics").text)


class Names(Served):
    def test_only_names_of_this_machine_are_answered(self):
        own = socket.gethostname()
        for name, status_ in (
            ("localhost", 200),
            ("LOCALHOST:8080", 200),
            ("127.0.0.1", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:8080", 200),
            ("[::1]", 200),
            ("192.168.1.7:8080", 200),
            (own, 200),
            (own.upper() + ":8080", 200),
            ("evil.example", 421),
            ("localhost.evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            (own + ".evil.example", 421),
            ("", 421),
            ("[evil]", 421),
            ("evil.example:80@localhost", 421),
            ("localhost evil", 421),
        ):
            with self.subTest(name):
                data = ("GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n" % name).encode()
                self.assertEqual(status(self.page, data), status_)
        self.assertEqual(status(self.page, b"GET /healthz HTTP/1.0\r\n\r\n"), 200)

    def test_a_refusal_names_the_cure(self):
        answer = request(self.page, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        self.assertIn(b"--allow-host", answer)
        self.assertNotIn(b"c1", answer)


class Token(Served):
    flags = ("--dashboard-token", TOKEN)
    paths = (
        "/",
        "/node/c1",
        "/api/nodes",
        "/api/events",
        "/nodes.csv",
        "/nodes.txt",
        "/metrics",
        "/healthz",
        "/nobody",
    )

    def ask(self, path="/healthz", **headers):
        return get(self.page, path, headers=headers)

    def test_no_path_answers_without_the_token(self):
        for path in self.paths:
            for headers in (
                {},
                {"Cookie": "sentinel_%d=x" % self.page},
                {"Authorization": "Bearer x"},
                {"Authorization": "Basic x"},
                {"Cookie": "sentinel_1=\xff"},
            ):
                answer = self.ask(path, **headers)
                self.assertEqual(answer.status, 401, (path, headers))
                self.assertIn("?token=", answer.text)
                self.assertNotIn("c1", answer.text)
                self.assertNotIn(TOKEN, answer.text)
                self.assertEqual(answer.headers["WWW-Authenticate"], "Bearer")
        for token in ("", "x", TOKEN[:-1], TOKEN + "x", "auto"):
            self.assertEqual(
                self.ask("/?" + urllib.parse.urlencode({"token": token})).status, 401
            )

    def test_the_address_that_the_master_printed_gives_a_cookie_that_opens_every_path(
        self,
    ):
        address = re.search(
            r"open http://localhost:%d(/\S*)" % self.page, self.master.log
        ).group(1)
        answer = self.ask(address, Accept="text/html")
        self.assertEqual(answer.status, 200)
        cookie = answer.headers["Set-Cookie"]
        self.assertRegex(
            cookie,
            r"^sentinel_%d=[0-9a-f]{64}; HttpOnly; SameSite=Strict$" % self.page,
        )
        self.assertNotIn(TOKEN, cookie)
        for path in self.paths:
            answer = self.ask(path, Cookie="other=1; " + cookie.partition(";")[0])
            self.assertEqual(answer.status, 404 if path == "/nobody" else 200, path)
            self.assertNotIn(TOKEN, answer.text)

    def test_a_node_page_with_the_token_leads_to_the_overview_whose_cookie_opens_all(
        self,
    ):
        query = "?" + urllib.parse.urlencode({"token": TOKEN})
        for path in ("/node/c1", "/node/", "/a/prefix/node/c1"):
            answer = self.ask(path + query, Accept="text/html")
            self.assertEqual(answer.status, 303, path)
            self.assertEqual(answer.headers["Location"], "../" + query)
            self.assertIsNone(answer.headers["Set-Cookie"])
        # a script
        eventually(lambda: self.ask("/node/c1" + query).status == 200)
        wrong = self.ask("/node/c1?token=wrong", Accept="text/html")
        self.assertEqual(wrong.status, 401)

    def test_a_bearer_header_opens_it_too(self):
        self.assertEqual(self.ask(Authorization="Bearer " + TOKEN).status, 200)

    def test_the_token_is_in_the_log_once_and_never_after_the_start(self):
        self.ask("/?token=" + urllib.parse.quote(TOKEN, ""))
        self.ask("/?token=wrong")
        self.assertEqual(self.master.log.count(urllib.parse.quote(TOKEN, "")), 1)
        self.assertNotIn(TOKEN, self.master.log)
        self.assertNotIn("wrong", self.master.log)

    def test_auto_makes_a_token_and_prints_the_whole_address(self):
        with start_master("--dashboard-token", "auto") as other:
            path = re.search(
                r"open http://localhost:%d(/\?token=[\w-]{32})\s" % other.page,
                other.log,
            )
            self.assertEqual(get(other.page, path.group(1)).status, 200)
            self.assertEqual(get(other.page, "/").status, 401)
            with open("/proc/%d/cmdline" % other.pid) as file:
                self.assertNotIn(path.group(1)[-32:], file.read())

    def test_an_empty_token_is_bad_usage(self):
        done = support.run("master_server.py", "--dashboard-token", "")
        self.assertEqual(done.returncode, 2)
        self.assertIn("is no token", done.stderr)


@support.slow("500 clients")
class Many(Served):
    def assertGood(self, seconds=1.0):
        """A good client is answered in time, several times over."""
        for _ in range(5):
            start = time.monotonic()
            self.assertEqual(get(self.page, "/healthz", seconds=10).status, 200)
            self.assertLess(time.monotonic() - start, seconds)

    def test_a_good_client_is_answered_within_a_second_beside_500_that_send_slowly(
        self,
    ):
        with contextlib.ExitStack() as stack:
            slow = [
                stack.enter_context(socket.create_connection((HOST, self.page), 10))
                for _ in range(500)
            ]
            for client in slow:
                with contextlib.suppress(OSError):
                    client.sendall(b"GET / HTTP/1.1\r\nHost: local")
            self.assertGood()

    def test_and_beside_500_that_never_read_their_answer(self):
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.connect((HOST, self.page))
                with contextlib.suppress(OSError):
                    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertGood()

    def test_threads_are_bounded_and_end(self):
        def threads():
            return max(
                len(support.os.listdir("/proc/%d/task" % pid))
                for pid in support.descendants(self.master.pid)
            )

        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(socket.create_connection((HOST, self.page), 10))
            eventually(lambda: threads() > 100)
            support.stays(lambda: threads() < 200, 2)
        eventually(lambda: threads() < 12)


class TextBrowsers(Served):
    def dump(self, *command):
        eventually(lambda: len(support.nodes(self.page)) == 3)
        done = subprocess.run(
            [*command, "http://127.0.0.1:%d/" % self.page],
            timeout=30,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.decode("utf-8")

    def assertReadable(self, text):
        for pattern in (
            r"All is well",
            r"Job 42",
            r"c1 +10\.0 % +40\.0 %",
            r"<b> +30\.0 %",
            r"Newest sample",
            r"\('127\.0\.0\.1', \d+\)",
        ):
            self.assertRegex(text, pattern)
        self.assertNotIn("function", text)

    @requires("lynx")
    def test_lynx_shows_the_whole_page(self):
        self.assertReadable(
            self.dump("lynx", "-dump", "-nonumbers", "-nolist", "-width=160")
        )

    @requires("w3m")
    def test_w3m_shows_the_whole_page(self):
        self.assertReadable(self.dump("w3m", "-dump", "-cols", "160"))

    def test_watch_would_show_aligned_text(self):
        text = get(self.page, "/nodes.txt?width=40&sort=-cpu").text
        self.assertEqual(
            [line.split()[0] for line in text.splitlines()[2:]], ["<b>", "a/b", "c1"]
        )
        self.assertLessEqual(max(map(len, text.splitlines())), 40)


if __name__ == "__main__":
    unittest.main()
