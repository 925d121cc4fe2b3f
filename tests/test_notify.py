"""Notifications: what each service is sent, in its own shape, and what happens when it fails."""

import argparse
import base64
import contextlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
import unittest.mock

import beside
import support
from support import MasterTest, PlainAgent, eventually, events, get, start_master, stays

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits

SECRET = "T0SECRETTOKEN"
# Waits of a test: a try, the tries after it, a pause between messages, jobs that are new.
QUICK = """
master_server.NOTIFY_SECONDS = 1.0
master_server.NOTIFY_WAITS = (0.1, 0.1, 0.1)
master_server.NOTIFY_PAUSE = 0.1
master_server.SETTLED_SECONDS = -1.0
"""


class Sink(http.server.ThreadingHTTPServer):
    """Keeps what is sent to it, and answers with the codes that it is told, then with 200."""

    daemon_threads = True

    def __init__(self, *codes, headers=(), hangs=False, drips=False):
        super().__init__(("127.0.0.1", 0), Answer)
        self.codes = list(codes)
        self.headers = dict(headers)
        self.hangs = hangs
        self.drips = drips
        self.ended = threading.Event()
        self.requests = []
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def url(self, service, rest=SECRET):
        return "%s+http://127.0.0.1:%d/%s" % (service, self.port, rest)

    def bodies(self):
        return [body for _, _, body in self.requests]

    def text(self):
        """All that was said, as JSON."""
        return json.dumps(self.bodies())


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = (self.path, self.headers, json.loads(body.decode("utf-8")))
        self.server.requests.append(request)
        if self.server.hangs:
            self.server.ended.wait(60)
            return
        if self.server.drips:
            with contextlib.suppress(OSError):
                for _ in range(600):
                    self.wfile.write(b"H")
                    if self.server.ended.wait(0.1):
                        break
            return
        code = self.server.codes.pop(0) if self.server.codes else 200
        self.send_response(code)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.server.requests.append((self.path, self.headers, None))
        self.send_error(404)

    def log_message(self, *_):
        pass


class NotifyTest(unittest.TestCase):
    def sink(self, *codes, **more):
        sink = Sink(*codes, **more)
        self.addCleanup(sink.stop)
        return sink

    def quick(self):
        """The waits of QUICK, in this process."""
        for name, value in (
            ("NOTIFY_SECONDS", 1.0),
            ("NOTIFY_WAITS", (0.1, 0.1, 0.1)),
            ("NOTIFY_PAUSE", 0.1),
            ("GATHER_SECONDS", 0.2),
            ("STORM_SECONDS", 1.0),
        ):
            patch = unittest.mock.patch.object(master_server, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def notifier(self, *targets):
        self.quick()
        return master_server.Notifier(targets)

    def send(self, url, *notices):
        """Send notices at once, in this thread."""
        target = master_server.parse_target(url)
        what = master_server.compose([master_server.Notice(*each) for each in notices])
        target.service.send(target, what, target.service.size)


LOST = ("lost", "c1", "7", "no sample for 5 s")
LOST_LINE = "lost: c1 (job 7): no sample for 5 s"


class Shapes(NotifyTest):
    """Each service is sent what its documentation asks for."""

    def sent(self, service, rest, *notices):
        sink = self.sink()
        self.send(sink.url(service, rest), *(notices or [LOST]))
        ((path, headers, body),) = sink.requests
        self.assertEqual(headers["Content-Type"], "application/json")
        self.assertNotIn("urllib", headers["User-Agent"].lower(), "Discord refuses it")
        return path, body, headers

    def test_ntfy_is_sent_json_to_its_root_with_the_topic_inside(self):
        path, body, _ = self.sent("ntfy", "my-topic")
        self.assertEqual(path, "/")
        self.assertEqual(
            body,
            {
                "topic": "my-topic",
                "title": "Cluster Sentinel: lost: c1 (job 7)",
                "message": LOST_LINE,
                "priority": 4,
                "tags": ["warning"],
            },
        )
        path, body, _ = self.sent("ntfy", "below/t", ("started", "", "7", "on c[1-4]"))
        self.assertEqual((path, body["topic"]), ("/below/", "t"))
        self.assertEqual((body["priority"], body["tags"]), (3, []))

    def test_a_user_and_a_password_of_the_url_become_a_header(self):
        sink = self.sink()
        self.send("ntfy+http://:tk_12%%2F3@127.0.0.1:%d/topic" % sink.port, LOST)
        ((path, headers, _),) = sink.requests
        pair = base64.b64encode(b":tk_12/3").decode()
        self.assertEqual((path, headers["Authorization"]), ("/", "Basic " + pair))

    def test_slack_is_sent_a_text_in_which_no_name_calls_anybody(self):
        rest = "services/T0/B0/" + SECRET
        path, body, _ = self.sent("slack", rest)
        self.assertEqual((path, body), ("/" + rest, {"text": LOST_LINE}))
        evil = ("lost", "<!channel>", "", "a & b <http://x|y>")
        _, body, _ = self.sent("slack", rest, evil)
        text = "lost: &lt;!channel&gt;: a &amp; b &lt;http://x|y&gt;"
        self.assertEqual(body, {"text": text})

    def test_teams_is_sent_an_adaptive_card(self):
        path, body, _ = self.sent("teams", "workflows/x?sig=y", LOST, LOST)
        self.assertEqual(path, "/workflows/x?sig=y")
        self.assertEqual(body["type"], "message")
        (attachment,) = body["attachments"]
        self.assertEqual(
            attachment["contentType"], "application/vnd.microsoft.card.adaptive"
        )
        card = attachment["content"]
        self.assertEqual((card["type"], card["version"]), ("AdaptiveCard", "1.2"))
        lines = [block["inlines"][0]["text"] for block in card["body"]]
        self.assertEqual(lines, ["Cluster Sentinel: lost: 2", LOST_LINE, LOST_LINE])
        self.assertEqual({block["type"] for block in card["body"]}, {"RichTextBlock"})

    def test_discord_is_sent_content_that_mentions_nobody(self):
        path, body, _ = self.sent("discord", "api/webhooks/1/" + SECRET)
        self.assertEqual(path, "/api/webhooks/1/" + SECRET)
        self.assertEqual(
            body, {"content": LOST_LINE, "allowed_mentions": {"parse": []}}
        )

    def test_telegram_is_sent_a_text_for_the_chat_of_the_url(self):
        path, body, _ = self.sent("telegram", "bot1:x/sendMessage?chat_id=-100")
        self.assertEqual(path, "/bot1:x/sendMessage")
        self.assertEqual((body["chat_id"], body["text"]), ("-100", LOST_LINE))

    def test_any_other_is_sent_the_words_and_what_they_are_made_of(self):
        path, body, _ = self.sent("webhook", "hook?key=1")
        self.assertEqual(path, "/hook?key=1")
        self.assertEqual(
            body,
            {
                "title": "Cluster Sentinel: lost: c1 (job 7)",
                "text": LOST_LINE,
                "count": 1,
                "events": [
                    {
                        "event": "lost",
                        "node": "c1",
                        "job": "7",
                        "text": "no sample for 5 s",
                    }
                ],
            },
        )

    def test_no_service_is_sent_more_than_it_takes(self):
        long = ("problem", "c1", "7", "ü" * 20000)
        for service, rest, key, limit in (
            ("ntfy", "topic", "message", 4096),
            ("slack", "x", "text", 4000),
            ("discord", "x", "content", 2000),
            ("telegram", "x?chat_id=1", "text", 4096),
        ):
            with self.subTest(service):
                _, body, _ = self.sent(service, rest, long)
                self.assertLessEqual(len(body[key].encode()), limit)
                self.assertTrue(body[key].endswith("..."))

    def test_a_service_is_known_by_its_host(self):
        for url, name in (
            ("https://ntfy.sh/topic", "ntfy"),
            ("https://hooks.slack.com/services/T/B/X", "slack"),
            ("https://x.webhook.office.com/webhookb2/1", "teams"),
            ("https://prod-1.westeurope.logic.azure.com:443/workflows/1", "teams"),
            ("https://discord.com/api/webhooks/1/x", "discord"),
            ("https://api.telegram.org/bot1:x/sendMessage?chat_id=1", "telegram"),
            ("https://notdiscord.com/x", "webhook"),
            ("https://discord.com.example.org/x", "webhook"),
            ("http://[::1]:8000/x", "webhook"),
            ("slack+https://mattermost.example.org/hooks/x", "slack"),
        ):
            with self.subTest(url):
                self.assertEqual(master_server.parse_target(url).service.name, name)


class Mail(NotifyTest):
    """The local mail command."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        path = self.folder + os.pathsep + os.environ["PATH"]
        patch = unittest.mock.patch.dict(os.environ, PATH=path)
        patch.start()
        self.addCleanup(patch.stop)

    def install(self, script):
        path = os.path.join(self.folder, "mail")
        with open(path, "w") as file:
            file.write("#!/bin/sh\ncd %s\n%s\n" % (self.folder, script))
        os.chmod(path, 0o755)

    def read(self, name):
        with open(os.path.join(self.folder, name)) as file:
            return file.read()

    def test_it_gets_a_subject_an_address_and_the_lines(self):
        self.install('printf "%s\\n" "$@" > words; cat > body')
        self.send("mail:ann@example.org", LOST)
        words = ["-s", "Cluster Sentinel: lost: c1 (job 7)", "ann@example.org"]
        self.assertEqual(self.read("words").splitlines(), words)
        self.assertEqual(self.read("body"), LOST_LINE + "\n")

    def test_alone_it_is_for_who_runs_the_master(self):
        with unittest.mock.patch.dict(os.environ, LOGNAME="ann"):
            self.assertEqual(master_server.parse_target("mail").address, "ann")

    def test_no_line_is_a_command_of_mail(self):
        self.install("cat > body")
        notifier = self.notifier("mail:ann")
        notifier.put("lost", "~!touch pwned", "~|x", "first\n~!touch pwned\r~. last")
        body = eventually(lambda: self.read("body"))
        self.assertFalse([line for line in body.splitlines() if line.startswith("~")])

    def test_a_master_sends_it(self):
        self.install('printf "%s\\n" "$@" > words; cat > body.new; mv body.new body')
        flags = ("--alert", "cpu>50", "--notify", "mail:ann")
        with start_master(*flags, patch=QUICK) as master, PlainAgent(
            master.port
        ) as agent:
            agent.send({"cpu": 99.0, "ram": 1.0, "node": "hot", "interval": 60.0})
            body = eventually(lambda: self.read("body"))
        self.assertEqual(body, "problem: hot: CPU 99 % (alert above 50 %)\n")
        done = support.run(
            "master_server.py", "--notify", "mail", env={"PATH": self.folder + "/none"}
        )
        self.assertEqual(done.returncode, 2)
        self.assertIn("argument --notify: there is no mail command here", done.stderr)

    def test_one_that_fails_or_hangs_or_is_not_there_is_an_error(self):
        for script, words in (
            ("exit 3", "mail ended with exit code 3"),
            ("exec sleep 60", "mail did not end within 0.3 s"),
        ):
            self.install(script)
            with self.subTest(words), unittest.mock.patch.object(
                master_server, "NOTIFY_SECONDS", 0.3
            ), self.assertRaisesRegex(master_server.NotifyError, words):
                self.send("mail:ann", LOST)
        with unittest.mock.patch.dict(
            os.environ, PATH=self.folder + "/none"
        ), self.assertRaisesRegex(master_server.NotifyError, "no mail command"):
            self.send("mail:ann", LOST)


class Failures(NotifyTest):
    """A place that fails is tried again where that may help, and never holds anybody up."""

    def logged(self, notifier, level="WARNING"):
        return self.assertLogs(master_server.log, level)

    def test_500_then_200_is_one_message_at_the_second_try(self):
        sink = self.sink(500)
        with self.logged("", "WARNING") as logs:
            notifier = self.notifier(sink.url("slack"))
            notifier.put(*LOST)
            eventually(lambda: len(sink.requests) == 2)
            stays(lambda: len(sink.requests) == 2, 0.5)
        self.assertEqual(sink.bodies()[0], sink.bodies()[1])
        (line,) = logs.output
        self.assertIn("cannot notify slack at 127.0.0.1 yet: HTTP 500", line)

    def test_after_four_tries_it_is_told_and_the_next_message_is_tried_anew(self):
        sink = self.sink(500, 502, 503, 504)
        with self.logged("", "ERROR") as logs:
            notifier = self.notifier(sink.url("slack"))
            notifier.put(*LOST)
            eventually(lambda: len(sink.requests) == 4)
            eventually(lambda: logs.output)
        self.assertIn("cannot notify slack at 127.0.0.1: HTTP 504", logs.output[0])
        notifier.put("lost", "c2", "", "later")
        eventually(lambda: "c2" in sink.text())

    def test_what_will_not_pass_is_not_tried_again(self):
        for code in (400, 401, 403, 404, 410):
            with self.subTest(code):
                sink = self.sink(code)
                with self.logged("", "ERROR"):
                    self.notifier(sink.url("slack")).put(*LOST)
                    eventually(lambda s=sink: s.requests)
                    stays(lambda s=sink: len(s.requests) == 1, 0.4)

    def test_a_service_that_asks_for_patience_gets_it(self):
        sink = self.sink(429, headers={"Retry-After": "1.5"})
        start = time.monotonic()
        self.notifier(sink.url("discord")).put(*LOST)
        eventually(lambda: len(sink.requests) == 2)
        self.assertGreater(time.monotonic() - start, 1.5)
        for text, seconds in (("3600", 60.0), ("soon", 0.0), ("-5", 0.0), ("nan", 0.0)):
            self.assertEqual(master_server.retry_after(text), seconds)

    def test_nothing_is_sent_on_to_elsewhere(self):
        other = self.sink()
        location = "http://127.0.0.1:%d/" % other.port
        sink = self.sink(302, 307, headers={"Location": location})
        for _ in range(2):
            with self.assertRaises(master_server.NotifyError) as caught:
                self.send(sink.url("slack"), LOST)
            self.assertFalse(caught.exception.may_pass)
        self.assertEqual(other.requests, [])

    def test_one_that_hangs_holds_up_neither_the_other_nor_who_puts(self):
        for way in ({"hangs": True}, {"drips": True}):
            with self.subTest(**way):
                hanging = self.sink(**way)
                sink = self.sink()
                start = time.monotonic()
                with self.logged("", "ERROR") as logs:
                    notifier = self.notifier(hanging.url("slack"), sink.url("slack"))
                    for number in range(100):
                        notifier.put("lost", "c%d" % number, "", "gone")
                    self.assertLess(time.monotonic() - start, 1)
                    eventually(lambda s=sink: s.requests, 5)
                    eventually(lambda out=logs.output: out)
                self.assertRegex(logs.output[0], "no answer within 1 s|timed out|hangs")
                self.assertLessEqual(len(hanging.requests), 4)

    def test_a_closed_port_and_an_answer_that_is_no_http_are_errors(self):
        with self.assertRaisesRegex(master_server.NotifyError, "refused"):
            self.send("http://127.0.0.1:%d/%s" % (support.closed_port(), SECRET), LOST)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()

            def answer():
                sock, _ = listener.accept()
                sock.recv(65536)
                sock.sendall(b"SSH-2.0-x\r\n\r\n")
                sock.close()

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            port = listener.getsockname()[1]
            with self.assertRaises(master_server.NotifyError) as caught:
                self.send("http://127.0.0.1:%d/%s" % (port, SECRET), LOST)
            thread.join()
        self.assertNotIn(SECRET, str(caught.exception))

    def test_putting_never_blocks_and_takes_no_memory_without_end(self):
        sink = self.sink(hangs=True)
        with self.logged("", "WARNING"):
            notifier = self.notifier(sink.url("slack"))
            notifier.put(*LOST)
            eventually(lambda: sink.requests)
            start = time.monotonic()
            for _ in range(master_server.MAX_NOTICES + 100):
                notifier.put(*LOST)
            self.assertLess(time.monotonic() - start, 5)
            (courier,) = notifier.couriers
            self.assertGreaterEqual(courier.left_out, 99)
            eventually(lambda: "may" if courier.left_out == 0 else "")


class Storms(NotifyTest):
    def test_a_storm_is_one_message_with_its_count(self):
        sink = self.sink()
        notifier = self.notifier(sink.url("webhook"))
        for number in range(1000):
            notifier.put("lost", "c%04d" % number, "7", "no sample for 5 s")
        (body,) = eventually(sink.bodies)
        self.assertEqual((body["count"], len(body["events"])), (1000, 20))
        self.assertRegex(
            body["text"],
            r"lost: 1000 times of job 7: (c\d{4} ){20}\.\.\.: no sample for 5 s \.\.\.$",
        )
        stays(lambda: len(sink.requests) == 1, 0.5)

    def test_different_things_at_once_are_lines_of_one_message(self):
        notices = [master_server.Notice(*LOST)] * 2
        for number in range(40):
            job = str(number)
            notices.append(master_server.Notice("problem", "n", job, "is slow"))
        what = master_server.compose(notices, left_out=3)
        self.assertEqual(what.title, "Cluster Sentinel: lost: 2, problem: 40")
        self.assertEqual(len(what.lines), master_server.NOTIFY_LINES + 2)
        self.assertEqual(
            what.lines[-2:],
            ["and 22 more lines like these", "and 3 more that there was no room for"],
        )


class Flags(unittest.TestCase):
    """What is wrong with --notify is told, and the address is not."""

    def test_a_wrong_one_is_bad_usage_and_is_not_repeated(self):
        for text in (
            "ftp://example.org/" + SECRET,
            SECRET,
            "https:///" + SECRET,
            "https://example.org:%s/" % SECRET,
            "https://[%s/x" % SECRET,
            "https://example.org/a b" + SECRET,
            "https://example.org/\n" + SECRET,
            "telegram+https://example.org/bot%s/sendMessage" % SECRET,
            "https://ntfy.sh/",
            "mail+https://example.org/" + SECRET,
            "mail:-x" + SECRET,
            "mail:a b",
            "@/nonexistent/" + SECRET,
        ):
            with self.subTest(text), self.assertRaises(
                argparse.ArgumentTypeError
            ) as caught:
                master_server.notify_argument(text)
            self.assertNotIn(SECRET, str(caught.exception))
        done = support.run("master_server.py", "--notify", "ftp://x/" + SECRET)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("error: argument --notify: that is no URL", done.stderr)
        self.assertNotIn(SECRET, done.stderr)

    def test_a_file_keeps_the_url_out_of_the_list_of_processes(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("https://ntfy.sh/%s\n" % SECRET)
            file.flush()
            text = master_server.notify_argument("@" + file.name)
        self.assertEqual(text, "https://ntfy.sh/" + SECRET)

    def test_a_target_is_shown_without_what_is_secret(self):
        target = master_server.parse_target("https://u:pw@ntfy.sh/%s?auth=q" % SECRET)
        self.assertEqual(str(target), "ntfy at ntfy.sh")
        self.assertEqual(target.hide("of /%s?auth=q" % SECRET), "of /...?...")


class Picked(unittest.TestCase):
    """News: what is worth a message."""

    class Heard:
        def __init__(self):
            self.notices = []

        def put(self, *notice):
            self.notices.append(notice)

    class Judged:
        """A table that has verdicts."""

        def __init__(self):
            self.verdicts = {}
            self.changes = 0

        def judge(self, raw, severity, **more):
            verdict = {"severity": severity, "rule": "r", "what": "it is slow"}
            self.verdicts[raw] = [dict(verdict, **more)]
            self.changes += 1

        def verdict_changes(self):
            return self.changes

        def snapshot(self):
            return self

    def setUp(self):
        self.now = 5000.0
        clock = unittest.mock.patch.object(
            master_server.time, "monotonic", lambda: self.now
        )
        clock.start()
        self.addCleanup(clock.stop)
        self.heard = self.Heard()
        self.table = self.Judged()
        self.news = master_server.News(self.heard)
        self.now += 100

    def told(self):
        self.now += 6
        self.news.look(self.table)
        notices = self.heard.notices
        self.heard.notices = []
        return notices

    def job(self, state, job="47_1", raw="48", **more):
        facts = dict({"part": "job", "job": job, "raw": raw, "state": state}, **more)
        self.news.tell_job(master_server.check_job(facts))

    def event(self, kind, node="c1", job="9", text="words"):
        row = list(master_server.UNKNOWN)
        row[master_server.INDEX["job"]] = job.encode()
        self.news.tell_event(master_server.Event(kind, node, tuple(row), "", text))

    def test_a_job_starts_and_ends_as_slurm_says(self):
        self.job("PENDING")
        self.assertEqual(self.told(), [])
        self.job("RUNNING", nodelist="c[1-2]")
        self.job("RUNNING", nodelist="c[1-2]")
        self.assertEqual(self.told(), [("started", "", "47_1", "on c[1-2]")])
        ended = {"exit": "1:0", "start": 1000.0, "end": 8985.0}
        self.job("FAILED", **ended)
        self.job("FAILED", **ended)
        words = "FAILED, exit code 1:0, after 2:13:05"
        self.assertEqual(self.told(), [("ended", "", "47_1", words)])

    def test_what_ran_or_had_ended_before_the_master_is_no_news(self):
        self.job("RUNNING", start=time.time() - 7200)
        self.job("COMPLETED", job="1", raw="1")
        self.assertEqual(self.told(), [])
        self.job("COMPLETED")
        self.assertEqual(self.told(), [("ended", "", "47_1", "COMPLETED")])

    def test_one_that_has_just_begun_is_news_though_nobody_saw_it_pending(self):
        self.job("RUNNING", start=time.time() - 20)
        self.assertEqual([notice[0] for notice in self.told()], ["started"])

    def test_the_end_is_told_with_the_verdict_as_soon_as_it_is_there(self):
        self.job("RUNNING")
        self.table.judge("48", "fine")
        self.told()
        self.job("OUT_OF_MEMORY", exit="0:125")
        self.assertEqual(self.told(), [])
        self.table.judge("48", "died", what="out of memory", cure="--mem=6G")
        words = "OUT_OF_MEMORY, exit code 0:125; out of memory; --mem=6G"
        self.assertEqual(self.told(), [("ended", "", "47_1", words)])

    def test_the_end_waits_for_no_verdict_that_does_not_come(self):
        self.job("RUNNING")
        self.table.judge("other", "fine")
        self.told()
        self.job("COMPLETED")
        self.assertEqual(self.told(), [])
        self.now += master_server.END_SECONDS
        self.assertEqual(self.told(), [("ended", "", "47_1", "COMPLETED")])

    def test_a_problem_of_a_running_job_is_told_once(self):
        self.job("RUNNING")
        self.told()
        self.table.judge("48", "advice")
        self.assertEqual(self.told(), [])
        for _ in range(3):
            self.table.judge("48", "problem", proof="5 % of 8 CPUs")
        problem = ("problem", "", "47_1", "it is slow; 5 % of 8 CPUs")
        self.assertEqual(self.told(), [problem])
        self.table.judge("48", "problem", proof="6 % of 8 CPUs")
        self.assertEqual(self.told(), [])

    def test_without_slurm_a_job_is_from_its_first_node_to_its_last(self):
        for node in ("c1", "c2"):
            self.news.enter("9")
            self.event("connected", node)
        started = ("started", "c1", "9", "its first node is here")
        self.assertEqual(self.told(), [started])
        self.news.leave("9")
        self.event("finished", "c1")
        self.assertEqual(self.told(), [])
        self.news.leave("9")
        self.event("finished", "c2", text="exit 0")
        self.assertEqual(self.told(), [("ended", "c2", "9", "exit 0")])

    def test_nodes_of_a_job_that_slurm_tells_of_and_of_none_neither_start_nor_end(self):
        self.job("RUNNING", job="9", raw="9")
        self.told()
        for job in ("9", ""):
            self.news.enter(job)
            self.event("connected", job=job)
            self.news.leave(job)
            self.event("finished", job=job)
        self.assertEqual(self.told(), [])

    def test_alerts_flapping_and_losses_are_told_and_what_is_resolved_is_not(self):
        for kind in ("alert", "flapping", "lost", "resolved"):
            self.event(kind)
        kinds = [notice[0] for notice in self.told()]
        self.assertEqual(kinds, ["problem", "problem", "lost"])

    def test_agents_that_come_back_to_a_new_collector_start_no_job(self):
        news = master_server.News(self.heard)
        news.enter("9")
        self.news = news
        self.event("connected")
        self.assertEqual(self.told(), [])


class Master(MasterTest):
    """A real master, whose messages go to a sink."""

    patch = QUICK

    @classmethod
    def setUpClass(cls):
        cls.sink = Sink()
        cls.addClassCleanup(cls.sink.stop)
        cls.hanging = Sink(hangs=True)
        cls.addClassCleanup(cls.hanging.stop)
        cls.flags = ("--alert", "cpu>50", "--notify", cls.sink.url("webhook"))
        cls.flags += ("--notify", cls.hanging.url("slack"))
        super().setUpClass()

    def texts(self):
        return "\n".join(body["text"] for body in self.sink.bodies())

    def send(self, node, **more):
        agent = self.agent()
        known = {"cpu": 1.0, "ram": 1.0, "node": node, "version": "1", "ack": True}
        agent.send(dict(known, **more))
        self.assertIn("ok", agent.read_line())
        return agent

    def test_a_problem_a_loss_a_start_and_an_end_are_told(self):
        self.send("hot", cpu=99.0)
        eventually(lambda: "problem: hot: CPU 99 % (alert above 50 %)" in self.texts())
        agent = self.send("c1", job="4711")
        eventually(lambda: "started: c1 (job 4711)" in self.texts())
        agent.send({"bye": "finished", "report": "exit 0: CPU mean 24.9 %"})
        said = "ended: c1 (job 4711): finished; exit 0: CPU mean 24.9 %"
        eventually(lambda: said in self.texts())
        self.send("gone").reset()
        eventually(lambda: "lost: gone: the connection broke" in self.texts())
        self.assertNotIn("resolved", self.texts())

    def test_what_slurm_says_of_a_job_is_told(self):
        agent = self.send("herd")
        for state in ("PENDING", "RUNNING", "TIMEOUT"):
            agent.send({"part": "job", "job": "5", "raw": "5", "state": state})
        eventually(lambda: "started: job 5: on its nodes" in self.texts())
        eventually(lambda: "ended: job 5: TIMEOUT" in self.texts())

    def test_many_that_are_lost_at_once_are_one_message(self):
        with contextlib.ExitStack() as stack:
            agents = []
            for number in range(100):
                agent = stack.enter_context(PlainAgent(self.master.port))
                sample = {"cpu": 1.0, "ram": 1.0, "node": "m%d" % number, "job": "77"}
                agent.send(dict(sample, interval=60.0, ack=True))
                self.assertEqual(agent.read_line(), "ok")
                agents.append(agent)
            for agent in agents:
                agent.reset()

        def counts():
            """How many were lost by each message that tells of them."""
            return [
                sum(event["job"] == "77" for event in body["events"]) and body["count"]
                for body in self.sink.bodies()
            ]

        eventually(lambda: sum(counts()) >= 100, what="all of them")
        messages = [count for count in counts() if count]
        self.assertLessEqual(len(messages), 2, "one more where a busy machine paused")

    def test_a_place_that_hangs_holds_up_no_agent_and_no_page(self):
        self.send("first", cpu=99.0)
        self.master.logged("cannot notify slack at 127.0.0.1 yet")
        start = time.monotonic()
        agent = self.send("calm")
        for _ in range(50):
            agent.send({"cpu": 1.0, "ram": 1.0, "node": "calm", "ack": True})
            self.assertIn("ok", agent.read_line())
        self.assertLess(time.monotonic() - start, 5)
        self.assertEqual(get(self.master.page, "/healthz").status, 200)

    def test_the_address_is_in_no_log_event_or_page(self):
        self.send("hot", cpu=99.0)
        self.master.logged("cannot notify slack at 127.0.0.1")
        self.assertNotIn(SECRET, self.master.log)
        for path in ("/", "/api/events", "/api/nodes", "/metrics", "/healthz?verbose"):
            self.assertNotIn(SECRET, get(self.master.page, path).text)
        self.assertNotIn(SECRET, self.sink.text())
        self.assertTrue(events(self.master.page))


@support.requires("openssl")
class Encrypted(NotifyTest):
    """https, on the small stack of a role's threads."""

    def test_a_certificate_that_nobody_knows_is_refused_and_one_that_is_known_is_taken(
        self,
    ):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        key = os.path.join(folder, "key")
        certificate = os.path.join(folder, "certificate")
        subprocess.check_call(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            + ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
            + ["-addext", "subjectAltName=DNS:localhost"],
            stderr=subprocess.DEVNULL,
        )
        sink = self.sink()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        sink.socket = context.wrap_socket(sink.socket, server_side=True)
        url = "slack+https://localhost:%d/%s" % (sink.port, SECRET)
        flags = ("--alert", "cpu>50", "--notify", url)
        patient = (
            QUICK + "master_server.NOTIFY_SECONDS = 10.0\n"
        )  # ssl is slow to start
        for env, pattern in (
            ({}, "cannot notify slack at localhost: .*CERTIFICATE_VERIFY_FAILED"),
            ({"SSL_CERT_FILE": certificate}, ""),
        ):
            with self.subTest(**env), start_master(
                *flags, patch=patient, env=env
            ) as master, PlainAgent(master.port) as agent:
                agent.send({"cpu": 99.0, "ram": 1.0, "node": "tls", "interval": 60.0})
                if pattern:
                    master.logged(pattern)
                    self.assertEqual(sink.requests, [])
                else:
                    eventually(lambda: sink.requests)
                self.assertEqual(master.log.count("collector started"), 1)
                self.assertNotIn(SECRET, master.log)


if __name__ == "__main__":
    unittest.main()
