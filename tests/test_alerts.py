"""Alerts with real processes: rules fire once, resolve once, and the command is told."""

import os
import re
import shutil
import tempfile
import time
import unittest

import beside
import support
from support import MasterTest, events, eventually

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits


class AlertMasterTest(MasterTest):
    """One whose command has a folder for what it is told, named by $TOLD."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="sentinel-alerts-")
        cls.env = {"TOLD": cls.folder}
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)
        super().tearDownClass()


class AlertCommand(AlertMasterTest):
    """Rules, once each way, and the command that is told."""

    flags = (
        "--alert",
        "cpu>50",
        "--alert",
        "ram>95 for 1",
        "--alert",
        "swap<10",
        "--alert-command",
        'env | grep ^SENTINEL_ | sort > "$TOLD/$$" && mv "$TOLD/$$" "$TOLD/told.$$"; exit 3',
    )

    def commands(self, node):
        """What the command was told about a node: a list of dicts."""
        found = []
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("told."):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    facts = dict(
                        line.partition("=")[::2] for line in file.read().splitlines()
                    )
                if facts.get("SENTINEL_NODE") == node:
                    found.append(facts)
        return found

    def told_of(self, node):
        return [
            (event["kind"], event["text"])
            for event in events(self.master.page)
            if event["node"] == node and event["kind"] in ("alert", "resolved")
        ]

    def samples(self, node, *values, **more):
        """An agent whose cpu had these values, each taken for certain."""
        agent = self.agent()
        for cpu in values:
            agent.send(dict(more, cpu=cpu, ram=more.get("ram", 1), node=node, ack=True))
            self.assertEqual(agent.read_line(), "ok")
        return agent

    def test_an_alert_fires_once_and_resolves_once(self):
        self.samples("once", 50, 51, 99, 51, 50, 49, 46, 51, 45.5)
        self.samples("twice", 60, 60, 45, 45, 60, 60)
        kinds = [
            kind
            for kind, _ in eventually(
                lambda: len(self.told_of("twice")) == 3 and self.told_of("twice")
            )
        ]
        self.assertEqual(kinds, ["alert", "resolved", "alert"])
        self.assertEqual(
            len(self.told_of("once")), 1, "5 points below before it is resolved"
        )
        self.assertRegex(self.told_of("twice")[0][1], "^CPU 60 % .alert above 50 %.$")
        lines = re.findall("CRITICAL WARNING: .*twice.*", self.master.log)
        self.assertEqual(len(lines), 2, lines)

    def test_a_rule_with_a_duration_waits_for_it(self):
        agent = self.samples("patient", 1, ram=99)
        self.samples("brief", 1, ram=99)
        start = time.monotonic()

        def ask():
            agent.send({"cpu": 1, "ram": 99, "node": "patient"})
            return self.told_of("patient")

        self.assertIn("RAM 99 % (alert above 95 % for 1 s)", eventually(ask)[0][1])
        self.assertGreater(time.monotonic() - start, 0.8)
        self.assertEqual(self.told_of("brief"), [])

    def test_a_rule_can_look_at_any_metric_and_unknown_is_no_alarm(self):
        self.samples("no-swap", 1)
        self.samples("swap", 1, swap=5)
        eventually(lambda: self.told_of("swap"))
        self.assertEqual(self.told_of("no-swap"), [])

    def test_the_command_gets_the_facts_in_its_environment(self):
        agent = self.samples("facts", 75.5, job="4711")
        (facts,) = eventually(lambda: self.commands("facts"))
        self.assertEqual(
            [
                facts["SENTINEL_" + key]
                for key in ("EVENT", "NODE", "JOB", "METRIC", "VALUE", "THRESHOLD")
            ],
            ["alert", "facts", "4711", "cpu", "75.5", "50"]
            if facts["SENTINEL_THRESHOLD"] == "50"
            else ["alert", "facts", "4711", "cpu", "75.5", "50.0"],
        )
        agent.reset()
        facts = eventually(lambda: self.commands("facts")[1:])
        self.assertIn(
            ("lost", "lost"),
            [
                (f["SENTINEL_EVENT"], f["SENTINEL_METRIC"])
                for f in self.commands("facts")
            ],
        )

    def test_hostile_names_stay_data(self):
        marker = os.path.join(self.folder, "pwned")
        for name in (
            "$(touch %s)" % marker,
            "`touch %s`" % marker,
            "; touch %s #" % marker,
            "' && touch %s '" % marker,
            '" | touch %s "' % marker,
            "--help",
            "%s%n$HOME",
        ):
            with self.subTest(name):
                self.samples(name, 99)
                eventually(lambda name=name: self.commands(name))
        self.samples("new\nline\x1b[2J", 99)
        eventually(lambda: self.commands("new\ufffdline\ufffd[2J"))
        self.assertFalse(os.path.exists(marker))
        self.assertNotIn("\x1b", self.master.log)

    def test_a_command_that_fails_is_logged(self):
        self.samples("fails", 99)
        self.master.logged("alert command failed: .*3")


class HangingCommand(AlertMasterTest):
    patch = "master_server.COMMAND_SECONDS = 1.0"
    flags = (
        "--alert",
        "cpu>50",
        "--alert-command",
        'echo $SENTINEL_NODE $$ >> "$TOLD/pids"; sleep 600 & sleep 600; wait',
    )

    def pids(self):
        with open(os.path.join(self.folder, "pids")) as file:
            return {name: int(pid) for name, pid in map(str.split, file)}

    def test_it_is_killed_at_its_limit_with_its_children_while_samples_go_on(self):
        import master_server

        self.assertEqual(master_server.COMMAND_SECONDS, 30, "but for this test's patch")
        agents = [self.agent(), self.agent()]
        for number, agent in enumerate(agents):
            agent.send({"cpu": 99, "ram": 1, "node": "n%d" % number, "ack": True})
            self.assertEqual(agent.read_line(), "ok")
        ((name, pid),) = eventually(self.pids).items()
        family = [pid] + eventually(lambda: support.descendants(pid))
        agents[0].send({"cpu": 98, "ram": 1, "node": "n0", "ack": True})
        self.assertEqual(agents[0].read_line(), "ok")
        self.row(node="n0", cpu=98)
        self.master.logged("alert command failed: killed after 1 s")
        eventually(lambda: not any(map(support.alive, family)), 5)
        eventually(lambda: set(self.pids()) - {name}, what="the next one is told")


class Unknown(unittest.TestCase):
    def test_what_is_not_known_any_more_neither_fires_nor_resolves(self):
        for op, quiet in ((">", 10.0), ("<", 90.0)):
            with self.subTest(op):
                rule, state = master_server.parse_rule("swap%s50" % op), {}

                def judge(rule=rule, state=state, **more):
                    row = master_server.check_sample(dict({"cpu": 1, "ram": 1}, **more))
                    return [
                        kind
                        for kind, _, _ in master_server.judge([rule], state, row, 0.0)
                    ]

                self.assertEqual((judge(), state), ([], {}))
                self.assertEqual(judge(swap=100.0 - quiet), ["alert"])
                self.assertEqual(
                    (judge(), judge(swap="high"), state), ([], [], {rule: None})
                )
                self.assertEqual((judge(swap=quiet), state), (["resolved"], {}))


class NoLost(MasterTest):
    flags = ("--alert", "no-lost")

    def test_a_lost_node_is_then_an_ordinary_event_and_other_alerts_stay(self):
        agent = self.agent()
        agent.send({"cpu": 91, "ram": 1, "node": "calm"})
        self.master.logged("CRITICAL WARNING: calm: CPU 91 % .alert above 90 %.")
        agent.reset()
        self.event("lost", "calm")
        self.assertNotRegex(self.master.log, "CRITICAL WARNING: [^\n]*lost")


if __name__ == "__main__":
    unittest.main()
