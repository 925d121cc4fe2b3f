"""One node that comes and goes pushes nobody else out of log, ring and command."""

import os
import shutil
import tempfile
import unittest
import unittest.mock

from support import PlainAgent, eventually, events, nodes, start_master

import master_server


class Counted(unittest.TestCase):
    """The bound itself, with a clock that the test moves."""

    def setUp(self):
        self.now = 1000.0
        clock = unittest.mock.patch.object(
            master_server.time, "monotonic", lambda: self.now
        )
        clock.start()
        self.addCleanup(clock.stop)
        self.flapping = master_server.Flapping(3, 600.0)

    def test_so_many_changes_are_told_then_one_count_then_silence(self):
        answers = [self.flapping.count("c1") for _ in range(7)]
        self.assertEqual(answers, [0, 0, 0, 4, -1, -1, -1])
        self.assertEqual(self.flapping.count("c2"), 0)

    def test_one_that_goes_on_is_told_again_after_the_time_and_no_more(self):
        for _ in range(7):
            self.flapping.count("c1")
        self.now += 300
        self.assertEqual(self.flapping.count("c1"), -1)
        self.now += 301
        self.assertGreater(self.flapping.count("c1"), 0)
        self.assertEqual(self.flapping.count("c1"), -1)

    def test_one_that_was_quiet_is_believed_again(self):
        for _ in range(7):
            self.flapping.count("c1")
        self.now += 601
        self.assertEqual(self.flapping.count("c1"), 0)

    def test_what_is_remembered_is_bounded(self):
        for number in range(master_server.MAX_FLAPPING + 100):
            self.flapping.count(number)
        self.assertEqual(len(self.flapping.known), master_server.MAX_FLAPPING)


class Floods(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.master = start_master(
            "--alert", "cpu>50", "--alert-command", "touch %s/told.$$" % self.folder
        )
        self.addCleanup(self.master.stop)
        with PlainAgent(self.master.port) as other:
            other.send({"cpu": 1.0, "ram": 1.0, "node": "other"})
            eventually(lambda: nodes(self.master.page))
        eventually(lambda: not nodes(self.master.page))

    def told(self):
        return [event for event in events(self.master.page) if event["node"] != "other"]

    def assertQuiet(self, most):
        """The other node's events are still there, and little was told of the loud one."""
        kinds = [e["kind"] for e in events(self.master.page) if e["node"] == "other"]
        self.assertEqual(kinds, ["connected", "finished"])
        eventually(lambda: any(e["kind"] == "flapping" for e in self.told()))
        told = self.told()
        self.assertLessEqual(len(told), most)
        self.assertEqual([e["kind"] for e in told].count("flapping"), 1)
        self.assertLess(self.master.log.count("CRITICAL"), most)
        self.assertLess(len(os.listdir(self.folder)), most)

    def test_an_agent_that_toggles_around_a_threshold_is_told_as_flapping_once(self):
        with PlainAgent(self.master.port) as agent:
            for number in range(200):
                cpu = 99.0 if number % 2 else 1.0
                agent.send({"cpu": cpu, "ram": 1.0, "node": "loud", "ack": True})
                self.assertEqual(agent.read_line(), "ok")
            self.master.logged("flapping loud: cpu>50 came and went 9 times")
            self.assertQuiet(most=12)

    def test_names_that_change_with_each_sample_are_one_node(self):
        with PlainAgent(self.master.port) as agent:
            for number in range(200):
                cpu = 99.0 if number % 2 else 1.0
                name = "loud%d" % number
                agent.send({"cpu": cpu, "ram": 1.0, "node": name, "ack": True})
                self.assertEqual(agent.read_line(), "ok")
            self.master.logged("flapping loud0: cpu>50")
            self.assertQuiet(most=12)

    def test_a_node_that_comes_and_goes_in_a_loop_is_told_as_flapping_once(self):
        self.visit(lambda number: "loud", 30)
        self.master.logged("flapping loud: the node came and went 9 times")
        self.assertQuiet(most=12)

    def test_visits_under_ever_new_names_are_told_as_flapping_once(self):
        self.visit(lambda number: "loud%d" % number, 200)
        self.master.logged(r"flapping loud\d+: 41 brief visits from 127.0.0.1")
        self.assertQuiet(most=2 * master_server.FLAP_VISITS + 4)

    def visit(self, name_of, times):
        for number in range(times):
            with PlainAgent(self.master.port) as agent:
                agent.send(
                    {"cpu": 1.0, "ram": 1.0, "node": name_of(number), "ack": True}
                )
                self.assertEqual(agent.read_line(), "ok")


class DefaultRules(unittest.TestCase):
    """A healthy job is no alert."""

    @classmethod
    def setUpClass(cls):
        cls.master = start_master()
        cls.addClassCleanup(cls.master.stop)
        cls.by_hand = start_master("--alert", "cpu>90", "--alert", "job_time_left<600")
        cls.addClassCleanup(cls.by_hand.stop)

    def alerts(self, master, **sample):
        self.names = getattr(self, "names", 0) + 1
        name = "%s-%d" % (self.id()[-20:], self.names)
        known = {"cpu": 1.0, "ram": 1.0, "ack": True, "node": name}
        with PlainAgent(master.port) as agent:
            agent.send(dict(known, **sample))
            self.assertEqual(agent.read_line(), "ok")
            (row,) = eventually(
                lambda: [row for row in nodes(master.page) if row["node"] == name]
            )
            return row["alerts"]

    def test_a_busy_node_is_an_alert_outside_of_jobs_only(self):
        self.assertEqual(self.alerts(self.master, cpu=100.0), "cpu>90")
        self.assertIsNone(self.alerts(self.master, cpu=100.0, job="7"))

    def test_the_end_of_a_job_is_near_when_a_tenth_of_its_time_is_left(self):
        for left, limit, alert in (
            (297.0, 300.0, None),
            (31.0, 300.0, None),
            (29.0, 300.0, "job_time_left<600"),
            (599.0, 86400.0, "job_time_left<600"),
            (601.0, 86400.0, None),
            (29.0, None, None),
        ):
            with self.subTest((left, limit)):
                sample = {"job": "7", "job_time_left": left, "job_time_limit": limit}
                self.assertEqual(self.alerts(self.master, **sample), alert)

    def test_a_rule_that_is_given_by_hand_is_for_all(self):
        sample = {"cpu": 100.0, "job": "7", "job_time_left": 297.0}
        self.assertEqual(
            self.alerts(self.by_hand, **sample), "cpu>90 job_time_left<600"
        )


if __name__ == "__main__":
    unittest.main()
