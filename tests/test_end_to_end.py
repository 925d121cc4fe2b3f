"""The live path with real processes: agent -> collector -> shared memory -> page, API, reader."""

import contextlib
import http.client
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
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
    events,
    eventually,
    get,
    nodes,
    page_text,
    requires,
    row_of,
)

load_tests = beside.load_tests  # in a process of its own: it mostly waits

FIVE_LINES = """\
import pickle, socket, time
s = socket.create_connection(("127.0.0.1", %d))
while True:
    s.sendall(pickle.dumps({"cpu": 15.5, "ram": 40.2}))
    time.sleep(2)
"""
DETECTION = 5.5  # seconds from a node's last sample to its end in the table


@contextlib.contextmanager
def load(processes):
    """That many processes which do nothing but burn CPU."""
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            stack.enter_context(support.start("-c", "while True: pass"))
        yield


class LivePath(MasterTest):
    """Checkpoints 1 to 3 and the refinement about addresses and slot numbers."""

    flags = ("--verbose",)

    def assertShown(self, address, cpu, ram):
        """The same numbers on the page, in the API, in the reader and at offset 0."""
        row = self.row(address=str(address), cpu=cpu, ram=ram)
        eventually(
            lambda: re.search(
                r"\b%.1f %%.* %.1f %%.* %d \('%s', %d\)"
                % (cpu, ram, row["slot"], *address),
                page_text(self.master.page),
            )
        )
        slot, raw_cpu, raw_ram = support.slots("sentinel_%d" % self.master.port)[
            str(address)
        ]
        self.assertEqual(
            (slot, round(raw_cpu, 3), round(raw_ram, 3)), (row["slot"], cpu, ram)
        )
        done = support.run("test_reader.py", "--port", self.master.port)
        line = [line for line in done.stdout.splitlines() if str(address) in line]
        self.assertEqual((done.returncode, done.stderr, len(line)), (0, "", 1), done)
        for shown in (row["slot"], cpu, ram):
            self.assertRegex(line[0], r"(^|\s)%s\b" % shown)
        done = support.run("test_reader.py", "--port", self.master.port, "--json")
        rows = [
            row
            for row in json.loads(done.stdout)["nodes"]
            if row["address"] == str(address)
        ]
        self.assertEqual([(row["cpu"], row["ram"]) for row in rows], [(cpu, ram)])

    def test_the_five_lines_of_the_plan_are_an_agent(self):
        with support.start("-c", FIVE_LINES % self.master.port):
            row = self.row(cpu=15.5, ram=40.2)
            address = re.fullmatch(r"\('(127\.0\.0\.1)', (\d+)\)", row["address"])
            self.assertShown((address.group(1), int(address.group(2))), 15.5, 40.2)
        self.gone(address=row["address"])

    def test_every_protocol_in_any_split_of_segments_shows_the_same_numbers(self):
        sent = {}
        ways = itertools.product(range(2, pickle.HIGHEST_PROTOCOL + 1), (None, 1, 7))
        for number, (protocol, step) in enumerate(ways, 1):
            agent, name = self.agent(), "protocol %d step %s" % (protocol, step)
            sent[name] = number + 0.5, 99 - number
            agent.send_bytes(
                pickle.dumps(
                    {
                        "cpu": number + 0.5,
                        "ram": 99 - number,
                        "node": name,
                        "interval": 60,
                    },
                    protocol,
                ),
                step,
            )
        eventually(
            lambda: (
                sent
                == {
                    row["node"]: (row["cpu"], row["ram"])
                    for row in nodes(self.master.page)
                    if row["node"] in sent
                }
            )
        )
        self.assertShown(agent.address, *sent[name])
        agent.send({"cpu": 87.5, "ram": 3})
        self.assertShown(agent.address, 87.5, 3)

    def test_samples_that_share_a_segment_are_all_taken(self):
        agent = self.agent()
        samples = [
            {"cpu": cpu, "ram": 1, "ack": True, "node": "many"}
            for cpu in (11, 12, 13.5)
        ]
        whole = b"".join(
            pickle.dumps(sample, 2 + at) for at, sample in enumerate(samples)
        )
        agent.send_bytes(whole + pickle.dumps(samples[0])[:9])
        self.assertEqual([agent.read_line() for _ in samples], ["ok"] * 3)
        self.row(node="many", cpu=13.5)
        agent.send_bytes(pickle.dumps(samples[0])[9:])
        self.assertEqual(agent.read_line(), "ok")
        self.row(node="many", cpu=11)

    def test_whole_numbers_and_odd_but_flat_dicts_are_samples_too(self):
        for number, sample in enumerate(
            (
                {"cpu": 0, "ram": 100},
                {"ram": 1.25, "cpu": 100, "future": "x", "more": None},
                dict({"k%d" % n: n for n in range(62)}, cpu=1, ram=2),
                {"cpu": 1, "ram": 2, "x": "y" * 255, "big": -(2**63), "é" * 127: True},
            )
        ):
            for protocol in (2, 4):
                with self.subTest(number=number, protocol=protocol), PlainAgent(
                    self.master.port
                ) as agent:
                    agent.send(
                        dict(sample, ack=True) if number != 2 else sample, protocol
                    )
                    self.row(
                        address=str(agent.address), cpu=sample["cpu"], ram=sample["ram"]
                    )

    def test_unknown_is_null_and_an_optional_key_of_the_wrong_type_is_unknown(self):
        agent = self.agent()
        agent.send(
            {
                "cpu": 1,
                "ram": 2,
                "node": 7,
                "job": None,
                "load1": "high",
                "cpus": True,
                "user": 1.5,
                "interval": "often",
                "swap": 0,
            }
        )
        row = self.row(address=str(agent.address))
        for key in ("node", "job", "load1", "cpus", "user", "interval", "mem_total"):
            self.assertIsNone(row[key], key)
        self.assertEqual(row["swap"], 0)

    def test_received_samples_are_printed_with_verbose(self):
        agent = self.agent()
        agent.send({"cpu": 77.25, "ram": 2})
        self.master.logged(r"%s.*77\.25" % re.escape(str(agent.address)))

    def test_an_agent_that_left_gives_its_slot_to_the_next(self):
        first = self.agent()
        first.send({"cpu": 1, "ram": 1})
        slot = self.row(address=str(first.address))["slot"]
        first.close()
        self.gone(address=str(first.address))
        second = self.agent()
        second.send({"cpu": 1, "ram": 1})
        self.assertEqual(self.row(address=str(second.address))["slot"], slot)

    def test_the_page_refreshes_every_two_seconds_without_javascript(self):
        answer = get(self.master.page)
        self.assertEqual(answer.status, 200)
        self.assertRegex(answer.headers["Content-Type"], "^text/html; *charset=utf-8")
        self.assertRegex(answer.text, r'<meta http-equiv="?refresh"? content="?2"?')

    def test_the_page_of_no_agents_says_how_to_start_one(self):
        with support.start_master() as master:
            self.assertIn("agent.py", page_text(master.page))
            self.assertEqual(nodes(master.page), [])


@support.slow("a browser")
@requires("chromium", "chromedriver")
class InABrowser(MasterTest):
    def test_a_real_browser_shows_new_numbers_by_itself_with_and_without_javascript(
        self,
    ):
        for javascript in (True, False):
            with self.subTest(javascript=javascript), Browser(javascript) as browser:
                self.watch_in(browser, "seen-%s" % javascript)

    def watch_in(self, browser, node):
        agent = self.agent()
        agent.send({"cpu": 31.5, "ram": 20, "node": node, "interval": 60})
        browser.open("http://%s:%d/" % (HOST, self.master.page))
        eventually(lambda: re.search(node + ".*31.5", browser.text(), re.S))
        agent.send({"cpu": 64.5, "ram": 20, "node": node, "interval": 60})
        eventually(lambda: re.search(node + ".*64.5", browser.text(), re.S), 6)


class Browser:
    """Headless Chromium, told what to do in WebDriver's JSON."""

    def __init__(self, javascript=True):
        self.profile = tempfile.mkdtemp(prefix="sentinel-chromium-")
        port = support.closed_port()
        self.driver = support.start(
            "-c",
            "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
            shutil.which("chromedriver"),
            "--port=%d" % port,
        )
        self.http = http.client.HTTPConnection(HOST, port, timeout=60)
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-sync",
            "--disable-component-update",
            "--user-data-dir=" + self.profile,
        ]
        scripts = {
            "profile.managed_default_content_settings.javascript": 1
            if javascript
            else 2
        }
        self.path = "/session"
        session = eventually(
            lambda: self.ask(
                "POST",
                "",
                {
                    "capabilities": {
                        "alwaysMatch": {
                            "goog:chromeOptions": {"args": arguments, "prefs": scripts}
                        }
                    }
                },
            ),
            60,
        )
        self.path += "/" + session["sessionId"]

    def ask(self, method, path, body=None):
        try:
            self.http.request(method, self.path + path, body and json.dumps(body))
            value = json.loads(self.http.getresponse().read().decode("utf-8"))["value"]
        except (OSError, http.client.HTTPException):
            self.http.close()
            raise
        if isinstance(value, dict) and "error" in value:
            raise OSError(value["message"])
        return value

    def open(self, url):
        self.ask("POST", "/url", {"url": url})

    def text(self):
        return self.ask(
            "POST",
            "/execute/sync",
            {"script": "return document.body.innerText", "args": []},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.ask("DELETE", "")
        self.http.close()
        self.driver.stop()
        shutil.rmtree(self.profile, ignore_errors=True)


class RealAgent(MasterTest):
    """The final checkpoint: agent, page, load; and the truth of the numbers."""

    @support.slow("samples at 2 s")
    def test_a_dummy_server_prints_a_new_dictionary_every_two_seconds(self):
        with (
            socket.create_server((HOST, 0))
            if hasattr(socket, "create_server")
            else None
        ) as dummy:
            dummy.settimeout(support.PATIENCE)
            started = time.monotonic()
            agent = support.start("agent.py", "--port", dummy.getsockname()[1])
            self.addCleanup(agent.stop)
            connection = dummy.accept()[0]
            with connection, connection.makefile("rb") as stream:
                connection.settimeout(support.PATIENCE)
                samples, times = [], []
                for _ in range(4):
                    samples.append(pickle.load(stream))
                    times.append(time.monotonic())
        self.assertLess(
            times[0] - started, 3, "the first goes out within 1 s of the start"
        )
        self.assertAlmostEqual((times[3] - times[0]) / 3, 2, delta=0.2)
        for sample in samples:
            self.assertIs(type(sample), dict)
            for key in ("cpu", "ram"):
                self.assertIs(type(sample[key]), float)
                self.assertEqual(sample[key], round(sample[key], 1))
                self.assertTrue(0 <= sample[key] <= 100)

    def test_get_system_stats_returns_cpu_and_ram_in_percent(self):
        done = support.run(
            "-c",
            "import agent, json; print(json.dumps(agent.get_system_stats()))",
            cwd=support.ROOT,
        )
        stats = json.loads(done.stdout)
        for key in ("cpu", "ram"):
            self.assertTrue(0 <= stats[key] <= 100)
            self.assertEqual(stats[key], round(stats[key], 1))

    def test_everything_that_an_agent_knows_of_its_job_is_shown(self):
        self.real_agent(
            "--name",
            "c1",
            "--interval",
            "0.5",
            env={
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NAME": "train & test",
                "USER": "ann",
            },
        )
        row = self.row(node="c1")
        self.assertEqual(
            [row[key] for key in ("job", "job_name", "interval", "cpus")],
            ["4711", "train & test", 0.5, os.cpu_count()],
        )
        with open("/proc/meminfo") as file:
            total = int(re.search(r"MemTotal: +(\d+) kB", file.read()).group(1)) * 1024
        self.assertEqual(row["mem_total"], total)
        self.assertAlmostEqual(row["mem_used"] / total * 100, row["ram"], delta=1)
        for key in ("user", "version"):
            self.assertTrue(row[key])
        self.assertIn("4711", page_text(self.master.page))

    @support.slow("load")
    def test_the_number_on_the_page_goes_up_under_load_and_down_again(self):
        self.real_agent("--name", "loaded", "--interval", "0.5")
        cpus = os.cpu_count()
        with load(cpus):
            high = eventually(
                lambda: (
                    (row_of(self.master.page, node="loaded") or {}).get("cpu", 0) > 95
                    and row_of(self.master.page, node="loaded")["cpu"]
                ),
                60,
            )
            shown = page_text(self.master.page).partition("loaded")[2]
            self.assertRegex(shown, r"\b(9\d|100)(\.\d)?\b")
            self.master.logged("CRITICAL WARNING: .*loaded.*CPU")
            self.event("alert", "loaded")
        eventually(
            lambda: row_of(self.master.page, node="loaded")["cpu"] < high - 20,
            60,
            "the load is over",
        )
        self.event("resolved", "loaded", 60)

    @support.slow("load")
    @requires("module psutil")
    def test_cpu_agrees_with_psutil_within_three_points_under_load(self):
        import psutil

        with load(1), socket.socket() as dummy:
            dummy.bind((HOST, 0))
            dummy.listen(1)
            dummy.settimeout(support.PATIENCE)
            agent = support.start("agent.py", "--port", dummy.getsockname()[1])
            self.addCleanup(agent.stop)
            with dummy.accept()[0].makefile("rb") as stream:
                pickle.load(stream)
                psutil.cpu_percent()
                ours, theirs = [], []
                for _ in range(4):
                    ours.append(pickle.load(stream)["cpu"])
                    theirs.append(psutil.cpu_percent())
        differences = [abs(a - b) for a, b in zip(ours, theirs)]
        self.assertLessEqual(statistics.median(differences), 3, (ours, theirs))
        self.assertGreater(min(ours), 100 / os.cpu_count() - 5)

    @support.slow("load")
    @requires("top")
    def test_cpu_agrees_with_top_within_three_points_under_load(self):
        self.real_agent("--name", "truth", "--interval", "3")
        with load(os.cpu_count()):
            eventually(lambda: row_of(self.master.page, node="truth")["cpu"] > 90, 60)
            top = subprocess.check_output(
                ["top", "-b", "-n", "2", "-d", "3"], env={"LC_ALL": "C", "TERM": "dumb"}
            ).decode()
            idle, wait = re.findall(r"([\d.]+) id, +([\d.]+) wa", top)[-1]
            row = row_of(self.master.page, node="truth")
        self.assertAlmostEqual(row["cpu"], 100 - float(idle) - float(wait), delta=3)

    @support.slow("load")
    @requires("free")
    def test_ram_agrees_with_free_within_three_points_under_load(self):
        hold = "x = bytearray(400 << 20); print(len(x), flush=True); import time; time.sleep(60)"
        self.real_agent("--name", "memory", "--interval", "0.5")
        before = self.row(node="memory")
        with support.start("-c", hold) as holder:
            eventually(lambda: holder.out)
            seen = self.row(node="memory")["since"]
            self.assertEqual(seen, before["since"])
            eventually(
                lambda: (
                    row_of(self.master.page, node="memory")["mem_used"]
                    > before["mem_used"] + (300 << 20)
                )
            )
            row = self.row(node="memory")
            out = subprocess.check_output(["free", "-b"], env={"LC_ALL": "C"}).decode()
        names, values = (line.split() for line in out.splitlines()[:2])
        free = dict(zip(names, map(int, values[1:])))
        self.assertAlmostEqual(
            row["ram"], 100 - 100 * free["available"] / free["total"], delta=3
        )

    def test_once_prints_the_sample_that_the_master_would_get(self):
        done = support.run("agent.py", "--once", "--name", "n")
        sample = json.loads(done.stdout)
        self.assertEqual((done.returncode, sample["node"]), (0, "n"))
        self.assertTrue(0 <= sample["cpu"] <= 100 and 0 <= sample["ram"] <= 100)

    def test_one_command_shows_this_machine_live(self):
        with support.start_master("--with-agent") as master:
            row = eventually(lambda: nodes(master.page))[0]
            # CPU may stay at 100 % here; the time since the boot does not
            eventually(lambda: nodes(master.page)[0]["uptime"] > row["uptime"])
            children = support.descendants(master.pid)
            self.assertEqual(master.stop(), 0)
            self.assertNotRegex(master.log, "CRITICAL WARNING: .* lost")
        eventually(lambda: not any(map(support.alive, children)))


class Timeline:
    """Watches the table itself, many times a second: {node: Track} in .tracks."""

    class Track:
        """last: the newest sample's time; first_gone: when the row was first missing."""

        first = last = gone = None
        addresses = ()

    def __init__(self, master):
        import master_server

        self.table = master_server.Table.attach("sentinel_%d" % master.port)
        self.tracks, self.stall, self.failure = {}, 0.0, None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        before = time.monotonic()
        while not self.ended.wait(0.02):
            rows = {row["node"]: row for row in self.table.snapshot().nodes}
            now = time.monotonic()
            self.stall, before = max(self.stall, now - before - 0.02), now
            for name, row in rows.items():
                track = self.tracks.setdefault(name, self.Track())
                track.first = track.first or now
                track.last, track.gone = now - row["age"], None
            for name, track in self.tracks.items():
                if name not in rows and track.gone is None:
                    track.gone = now

    def close(self):
        self.ended.set()
        self.thread.join()


@support.slow("waits for deadlines of 5 s and more")
class Silence(MasterTest):
    """Who is dropped and when: all of them at once, against one master and one clock."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.started = time.monotonic()
        cls.timeline = Timeline(cls.master)
        cls.cleanup = contextlib.ExitStack()
        cls.stopped = cls.cleanup.enter_context(
            support.start(
                "agent.py",
                "--port",
                cls.master.port,
                "--name",
                "stopped",
                "--interval",
                "0.5",
            )
        )
        cls.slow = cls.cleanup.enter_context(
            support.start(
                "agent.py",
                "--port",
                cls.master.port,
                "--name",
                "slow",
                "--interval",
                "10",
            )
        )
        cls.agents = {}
        for name, sample in (
            ("silent", {}),
            ("announced", {"interval": 2.6}),
            ("dripping", {}),
            ("late-drip", {}),
            ("quick", {"interval": 0.1}),
        ):
            agent = cls.agents[name] = cls.cleanup.enter_context(
                PlainAgent(cls.master.port)
            )
            agent.send(dict(sample, cpu=1, ram=1, node=name))
        cls.mute = cls.cleanup.enter_context(PlainAgent(cls.master.port))
        cls.ended = threading.Event()
        cls.dripper = threading.Thread(target=cls.drip, daemon=True)
        cls.dripper.start()
        eventually(lambda: cls.timeline.tracks["stopped"].last)
        cls.stopped.send_signal(signal.SIGSTOP)

    @classmethod
    def drip(cls):
        """One byte a second to one; a single byte, just before its time is over, to another."""
        whole = pickle.dumps({"cpu": 2, "ram": 2, "node": "dripping", "x": "y" * 200})
        for at in range(len(whole)):
            if cls.ended.wait(1):
                return
            with contextlib.suppress(OSError):
                cls.agents["dripping"].send_bytes(whole[at : at + 1])
                if at == 3:
                    cls.agents["late-drip"].send_bytes(whole[:1])

    @classmethod
    def tearDownClass(cls):
        cls.ended.set()
        cls.dripper.join()
        cls.timeline.close()
        cls.cleanup.close()
        super().tearDownClass()

    def assertGoneInTime(self, name, first=4.9, last=DETECTION):
        eventually(lambda: self.timeline.tracks[name].gone, 15, name)
        track = self.timeline.tracks[name]
        noise = (
            self.timeline.stall
        )  # how long this machine kept the test itself from looking
        self.assertGreater(track.gone - track.last, first)
        self.assertLess(track.gone - track.last, last + noise)

    def test_a_stopped_agent_is_gone_within_5_5_s_of_its_last_sample(self):
        self.assertGoneInTime("stopped")
        eventually(
            lambda: (
                "stopped"
                not in page_text(self.master.page).partition("Recently gone")[0]
            ),
            2.5,
        )
        self.assertIn("no sample for 5 s", self.event("lost", "stopped")["text"])

    def test_a_silent_connection_is_gone_within_5_5_s_of_its_last_sample(self):
        self.assertGoneInTime("silent")
        self.assertRegex(
            self.agents["silent"].read_to_end(), r"^error no sample for 5 s\n$"
        )

    def test_one_byte_a_second_does_not_renew_the_deadline(self):
        self.assertGoneInTime("dripping")

    def test_a_byte_just_before_the_deadline_does_not_renew_it_either(self):
        self.assertGoneInTime("late-drip")

    def test_an_announced_interval_is_waited_for_two_and_a_half_times(self):
        self.assertGoneInTime("announced", 6.4, 7.0)

    def test_a_short_interval_does_not_shorten_the_deadline(self):
        self.assertGoneInTime("quick")

    def test_a_connection_that_never_sends_is_closed_at_the_deadline(self):
        text = self.mute.read_to_end()
        self.assertRegex(text, r"^error no sample for 5 s\n$")
        self.assertLess(time.monotonic() - self.started, 30)

    def test_an_agent_with_an_interval_of_ten_seconds_is_not_dropped(self):
        eventually(
            lambda: (
                self.timeline.tracks["slow"].last
                > self.timeline.tracks["slow"].first + 9
            ),
            15,
        )
        self.assertIsNone(self.timeline.tracks["slow"].gone)
        self.assertNotIn(
            "slow", [event["node"] for event in events(self.master.page, "lost")]
        )


class Endings(MasterTest):
    """Finished is not lost: how connections end and what is told of it."""

    def end(self, node, how, **sample):
        agent = self.agent()
        agent.send(dict(sample, cpu=1, ram=1, node=node))
        self.row(node=node)
        how(agent)
        self.gone(1.5, node=node)

    def test_a_killed_agent_is_gone_at_once_and_lost(self):
        agent = self.real_agent("--name", "killed")
        self.row(node="killed")
        agent.send_signal(signal.SIGKILL)
        self.gone(1.5, node="killed")
        self.event("lost", "killed")
        self.master.logged("CRITICAL WARNING: killed lost")

    def test_an_agent_told_to_stop_says_goodbye_and_is_finished(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            name = "told-" + number.name
            with self.subTest(name):
                agent = self.real_agent("--name", name)
                self.row(node=name)
                self.assertEqual(agent.stop(number), 0)
                self.gone(1.5, node=name)
                self.assertIn(number.name, self.event("finished", name)["text"])
                self.assertNotIn("Traceback", agent.log)
        self.assertNotRegex(self.master.log, "CRITICAL WARNING: told-[^:]* lost")

    def test_a_goodbye_is_finished_and_a_plain_client_that_closes_too(self):
        self.end("bye", lambda agent: agent.send({"bye": "finished"}), version="1.0")
        self.end("plain", lambda agent: agent.close())
        for node in ("bye", "plain"):
            self.event("finished", node)
            self.assertFalse(
                [
                    event
                    for event in events(self.master.page)
                    if (event["kind"], event["node"]) == ("lost", node)
                ]
            )

    def test_a_reset_a_torn_sample_and_an_agent_without_goodbye_are_lost(self):
        self.end("reset", lambda agent: agent.reset())
        self.end("without", lambda agent: agent.close(), version="1.0")

        def tear(agent):
            agent.send_bytes(pickle.dumps({"cpu": 1, "ram": 1})[:20])
            agent.close()

        self.end("torn", tear)
        for node in ("reset", "without", "torn"):
            self.event("lost", node)
            self.master.logged("CRITICAL WARNING: %s lost" % node)

    def test_connected_is_told_once_and_a_lost_node_that_is_back_is_resolved(self):
        self.end("returns", lambda agent: agent.reset())
        self.event("lost", "returns")
        self.agent().send({"cpu": 1, "ram": 1, "node": "returns"})
        self.event("resolved", "returns")
        told = [
            event["kind"]
            for event in events(self.master.page)
            if event["node"] == "returns"
        ]
        self.assertEqual(sorted(told), ["connected", "connected", "lost", "resolved"])


@support.slow("1,024 agents")
class Many(unittest.TestCase):
    """The plan's ten slots were a first step."""

    def setUp(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    def test_11_then_100_then_1024_agents_show_and_the_next_is_told_that_it_is_full(
        self,
    ):
        with support.start_master() as master, contextlib.ExitStack() as stack:
            agents = []

            def join(count):
                while len(agents) < count:
                    agent = stack.enter_context(PlainAgent(master.port))
                    agents.append(agent)
                    agent.send(
                        {
                            "cpu": len(agents) % 100,
                            "ram": 1,
                            "interval": 60,
                            "node": "n%d" % len(agents),
                        }
                    )
                rows = eventually(
                    lambda: len(nodes(master.page)) == count and nodes(master.page)
                )
                self.assertEqual(
                    {row["address"] for row in rows},
                    {str(agent.address) for agent in agents},
                )
                self.assertEqual(
                    {row["slot"] for row in rows}, set(range(1, count + 1))
                )

            for count in (11, 100):
                join(count)
                page = page_text(master.page)
                for number in range(1, count + 1):
                    self.assertRegex(page, r"\bn%d\b" % number)
            join(1024)
            with PlainAgent(master.port) as late:
                late.send({"cpu": 1, "ram": 1, "node": "late"})
                self.assertEqual(
                    late.read_to_end(), "error master is full (1024 agents)\n"
                )
            agents.pop(500).close()
            eventually(lambda: len(nodes(master.page)) == 1023)
            with PlainAgent(master.port) as next_one:
                next_one.send({"cpu": 1, "ram": 1, "node": "next", "ack": True})
                self.assertEqual(next_one.read_line(), "ok")
                eventually(lambda: row_of(master.page, node="next"))["slot"]

    def test_idle_connections_take_no_slot(self):
        with support.start_master(
            "--max-agents", "3"
        ) as master, contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(PlainAgent(master.port))
            agents = [stack.enter_context(PlainAgent(master.port)) for _ in range(4)]
            for agent in agents[:3]:
                agent.send({"cpu": 1, "ram": 1, "ack": True})
                self.assertEqual(agent.read_line(), "ok")
            agents[3].send({"cpu": 1, "ram": 1})
            self.assertEqual(
                agents[3].read_to_end(), "error master is full (3 agents)\n"
            )


if __name__ == "__main__":
    unittest.main()
