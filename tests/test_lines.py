"""Samples as lines of JSON, over real sockets: the same answers, limits and ends as for pickles.

What a line may hold is in test_wire.py, and strangers that send lines are in test_trust.py.
"""

import contextlib
import hmac
import json
import os
import re
import tempfile
import textwrap
import time
import unittest

import beside
import support
from support import MasterTest, PlainAgent, eventually, get, requires, row_of

load_tests = beside.load_tests  # in a process of its own: it mostly waits

GOOD = {"cpu": 15.5, "ram": 40.25, "ack": True}


def encode(message):
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


class LineAgent(PlainAgent):
    """A plain agent that writes JSON."""

    def send(self, sample):
        self.send_bytes(encode(sample))


def readme_agents():
    """The agents of both READMEs that send lines: {their first word: source text}."""
    text = ""
    for name in ("README.md", "tests/README.md"):
        with open(os.path.join(support.ROOT, name), encoding="utf-8") as file:
            text += file.read() + "\n"
    blocks = re.findall(r"(?m)(?:^    .*\n)+", text)
    agents = [textwrap.dedent(block) for block in blocks if "json.dumps(" in block]
    agents += [textwrap.dedent(block) for block in blocks if "/dev/tcp/" in block]
    return {text.split()[0]: text for text in agents}


class Lines(MasterTest):
    flags = ("--timeout", "1.5")

    def agent(self, **more):
        agent = LineAgent(self.master.port, **more)
        self.addCleanup(agent.close)
        return agent

    def test_lines_in_any_split_of_segments_show_what_they_say(self):
        for step in (None, 1, 7):
            name = "ünï €{}[] step %s" % step
            agent = self.agent()
            sample = dict(GOOD, node=name, interval=60, job_mem=2**40, job_name='"')
            agent.send_bytes(encode(sample), step)
            self.assertEqual(agent.read_line(), "ok")
            row = self.row(node=name)
            for key in sample:
                self.assertEqual(row.get(key, True), sample[key])
            agent.send(dict(sample, cpu=99))
            self.row(node=name, cpu=99)

    def test_lines_that_share_a_segment_are_all_answered_and_half_a_one_waits(self):
        agent = self.agent()
        sample = dict(GOOD, node="many", interval=60)
        agent.send_bytes(encode(sample) * 3 + encode(dict(sample, cpu=1))[:-1])
        self.assertEqual([agent.read_line() for _ in range(3)], ["ok"] * 3)
        self.row(node="many", cpu=15.5)
        agent.send_bytes(b"\n")
        self.assertEqual(agent.read_line(), "ok")
        self.row(node="many", cpu=1)

    def test_without_ack_nothing_is_answered(self):
        agent = self.agent()
        agent.send({"cpu": 1, "ram": 2, "node": "mute"})
        self.row(node="mute")
        agent.send({"bye": "finished"})
        self.assertEqual(agent.read_to_end(), "")

    def test_a_goodbye_is_an_end_like_any_other(self):
        agent = self.agent()
        agent.send(dict(GOOD, node="leaves", version="1.0"))
        self.row(node="leaves")
        agent.send({"bye": "finished", "report": "all\u001b[2J well"})
        self.assertRegex(agent.read_to_end(), r"\Aok( parts\nok)?\n\Z")
        event = self.event("finished", "leaves")
        self.assertEqual(event["text"], "finished; all\ufffd[2J well")

    def test_a_part_about_a_job_is_taken(self):
        agent = self.agent()
        agent.send({"part": "job", "job": "77", "raw": "77", "state": "RUNNING"})
        agent.send({"part": "of a later version"})
        agent.send({"bye": "told"})
        self.assertEqual(agent.read_to_end(), "")

        def job():
            jobs = json.loads(get(self.master.page, "/api/jobs").text)["jobs"]
            return [job for job in jobs if job["job"] == "77"]

        self.assertEqual(eventually(job)[0]["state"], "RUNNING")

    def test_one_bad_line_ends_the_agent_with_its_reason(self):
        agent = self.agent()
        agent.send(dict(GOOD, node="turns"))
        self.assertEqual(agent.read_line(), "ok")
        agent.send({"cpu": [], "ram": 1})
        self.assertRegex(agent.read_to_end(), r"\Aerror JSON that is not .*\n\Z")
        self.gone(node="turns")

    def test_half_a_line_and_bytes_one_by_one_end_at_the_deadline(self):
        half = self.agent()
        drip = self.agent()
        half.send_bytes(encode(GOOD)[:-1])
        start = time.monotonic()
        drip.send_bytes(b"{")
        while time.monotonic() - start < 2:
            with contextlib.suppress(OSError):
                drip.send_bytes(b" ")
            time.sleep(0.05)
        for agent in (half, drip):
            self.assertEqual(agent.read_to_end(1), "error no sample for 1.5 s\n")


class Readme(MasterTest):
    def test_the_python_agent_of_the_readme_is_one(self):
        source = readme_agents()["import"]
        self.assertEqual(len(source.splitlines()), 5)
        source = source.replace("13579", "%d" % self.master.port)
        with support.start("-c", source):
            self.row(cpu=15.5, ram=40.2)

    @requires("bash", "vmstat", "free", "awk")
    def test_the_shell_agent_of_the_readme_is_one(self):
        source = readme_agents()["exec"].replace("13579", "%d" % self.master.port)
        command = ["bash", "-c", source]
        shell = support.Tool(command, dict(os.environ, HOSTNAME="a-shell"))
        self.addCleanup(shell.kill)
        row = self.row(node="a-shell")
        self.assertTrue(0 <= row["cpu"] <= 100 and 0 < row["ram"] <= 100, row)
        with open("/proc/meminfo") as file:
            sizes = dict(re.findall(r"(\w+): +(\d+)", file.read()))
        used = 100 - 100.0 * int(sizes["MemAvailable"]) / int(sizes["MemTotal"])
        self.assertAlmostEqual(row["ram"], used, delta=10)
        shell.kill()
        self.event("finished", "a-shell")


class Secret(unittest.TestCase):
    def test_a_line_answers_the_challenge(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "secret")
            with support.start_master("--secret-file", path) as master:
                with open(path, "rb") as file:
                    secret = file.read().strip()
                with LineAgent(master.port) as agent:
                    word, nonce = agent.read_line().split()
                    self.assertEqual(word, "challenge")
                    answer = hmac.new(secret, nonce.encode(), "sha256").hexdigest()
                    agent.send({"auth": answer})
                    agent.send(dict(GOOD, node="trusted"))
                    self.assertEqual(agent.read_line(), "ok")
                    eventually(lambda: row_of(master.page, node="trusted"))
                with LineAgent(master.port) as stranger:
                    stranger.read_line()
                    stranger.send(dict(GOOD, node="stranger"))
                    self.assertRegex(stranger.read_to_end(), "a secret is required")
                with LineAgent(master.port) as stranger:
                    stranger.read_line()
                    stranger.send({"auth": answer})
                    self.assertRegex(stranger.read_to_end(), "wrong secret")


if __name__ == "__main__":
    unittest.main()
