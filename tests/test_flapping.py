"""One node that comes and goes pushes nobody else out of log, ring and command."""

import contextlib
import os
import shutil
import tempfile
import unittest
import unittest.mock

import beside
from support import MasterTest, PlainAgent, eventually, events, nodes, start_master

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits

RACES = 6  # visits that began before the master had seen the end of the one before


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

    def withheld(self, text):
        """An event that is withheld, as the collector does it."""
        unknown = master_server.UNKNOWN
        event = master_server.Event("lost", "c1", unknown, "", text)
        self.assertNotEqual(self.flapping.count("c1"), 0)
        self.flapping.withhold("c1", [event])

    def settled(self):
        return [event.text for event in self.flapping.settled()]

    def test_the_last_that_was_withheld_is_told_once_when_it_is_quiet(self):
        for _ in range(3):
            self.flapping.count("c1")
        self.withheld("first")
        self.now += 59
        self.withheld("last")
        self.now += 59
        self.assertEqual(self.settled(), [])
        self.now += 2
        self.assertEqual(self.settled(), ["last; quiet now, after 5 changes"])
        self.assertEqual(self.settled(), [])

    def test_what_is_told_replaces_what_was_withheld(self):
        for _ in range(3):
            self.flapping.count("c1")
        self.withheld("old")
        self.now += 601
        self.assertEqual(self.flapping.count("c1"), 0)
        self.now += 61
        self.assertEqual(self.settled(), [])

    def test_what_is_counted_no_more_for_want_of_room_is_told(self):
        for _ in range(3):
            self.flapping.count("c1")
        self.withheld("pushed out")
        for number in range(master_server.MAX_FLAPPING):
            self.flapping.count(number)
        self.assertEqual(self.settled(), ["pushed out"])

    def test_a_crowd_is_no_loop(self):
        visits = master_server.Visits(3, 600.0)
        crowd = [visits.begin_visit("here") for _ in range(50)]
        for _ in crowd:
            visits.end_brief("here")
        again = [visits.begin_visit("here") for _ in range(5)]
        self.assertEqual((set(crowd), again), ({0}, [0, 0, 0, 4, -1]))
        self.assertEqual(visits.begin_visit("there"), 0)
        more = [visits.begin_visit("here") for _ in range(50)]
        self.assertEqual(more, [-1] * 45 + [0] * 5, "as many as may have come back")

    def test_a_loop_is_one_whoever_else_is_there(self):
        visits = master_server.Visits(3, 600.0)
        for _ in range(50):
            visits.begin_visit("here")
        told = []
        for _ in range(6):
            told.append(visits.begin_visit("here"))
            visits.end_brief("here")
        self.assertEqual(told, [0, 0, 0, 0, 4, -1])
        self.assertEqual(visits.begin_visit("here"), -1)
        self.now += 601
        self.assertEqual(visits.begin_visit("here"), 0)

    def test_the_addresses_that_are_remembered_are_bounded(self):
        visits = master_server.Visits(3, 600.0)
        for number in range(master_server.MAX_FLAPPING + 100):
            visits.end_brief(str(number))
        self.assertEqual(len(visits.ended), master_server.MAX_FLAPPING)


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
        self.visit(lambda number: "loud", 15)
        self.master.logged("flapping loud: the node came and went 9 times")
        self.assertQuiet(most=12)

    def test_visits_under_ever_new_names_are_told_as_flapping_once(self):
        self.visit(lambda number: "loud%d" % number, 200)
        self.master.logged(r"flapping loud\d+: 21 brief visits from 127.0.0.1")
        self.assertQuiet(most=2 * (master_server.FLAP_VISITS + RACES))

    def test_visits_that_alert_leave_room_for_the_others_in_the_ring(self):
        self.visit(lambda number: "loud%d" % number, 200, cpu=99.0)
        self.master.logged(r"flapping loud\d+: 21 brief visits")
        self.assertQuiet(most=4 * (master_server.FLAP_VISITS + RACES))

    def test_visits_that_alert_again_and_again_leave_as_much_room(self):
        for number in range(40):
            with PlainAgent(self.master.port) as agent:
                for cpu in (99.0, 1.0) * 4:
                    sample = {"cpu": cpu, "ram": 1.0, "node": "loud%d" % number}
                    agent.send(dict(sample, ack=True))
                    self.assertEqual(agent.read_line(), "ok")
        self.master.logged(r"flapping loud\d+: 21 brief visits")
        self.assertQuiet(most=4 * (master_server.FLAP_VISITS + RACES))

    def test_quiet_agents_of_the_same_address_do_not_switch_the_bound_off(self):
        with contextlib.ExitStack() as stack:
            for number in range(9):
                agent = stack.enter_context(PlainAgent(self.master.port))
                sample = {"cpu": 1.0, "ram": 1.0, "node": "calm%d" % number}
                agent.send(dict(sample, interval=60.0))
            eventually(lambda: len(nodes(self.master.page)) == 9)
            self.visit(lambda number: "loud%d" % number, 200)
            self.master.logged(r"flapping loud\d+: 21 brief visits")
            self.assertQuiet(most=9 + 2 * (master_server.FLAP_VISITS + RACES))

    def visit(self, name_of, times, cpu=1.0):
        for number in range(times):
            visit(self.master, name_of(number), cpu=cpu)


def visit(master, node, source=None, cpu=1.0):
    """A visit of a moment, after which everybody knows that it has ended."""
    with PlainAgent(master.port, source=source) as agent:
        agent.send({"cpu": cpu, "ram": 1.0, "node": node, "ack": True})
        assert agent.read_line() == "ok"


class InTheEnd(MasterTest):
    """What is withheld while something flaps is told once it is quiet again."""

    flags = ("--alert", "cpu>50", "--alert-command", 'env > "$TOLD/$$"')
    patch = """
master_server.SETTLE_SECONDS = 0.5
master_server.BRIEF_SECONDS = 1.0
"""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.env = {"TOLD": cls.folder}
        super().setUpClass()

    def send(self, agent, node, cpu=1.0, **more):
        sample = {"cpu": cpu, "ram": 1.0, "node": node, "interval": 60.0}
        agent.send(dict(sample, ack=True, **more))
        self.assertEqual(agent.read_line(), "ok")

    def toggle(self, agent, node, times):
        for number in range(times):
            self.send(agent, node, 1.0 if number % 2 else 99.0)

    def commanded(self, *facts):
        """Whether one run of the command had all these facts in its environment."""
        for name in os.listdir(self.folder):
            with open(os.path.join(self.folder, name)) as file:
                if set(facts) <= set(file.read().splitlines()):
                    return True
        return False

    def told(self, node, kind):
        return [e for e in events(self.master.page, kind) if e["node"] == node]

    def test_a_node_that_is_lost_for_good_is_told_as_lost(self):
        for _ in range(10):
            visit(self.master, "gone", source=("127.0.0.2", 0))
        agent = self.agent(source=("127.0.0.2", 0))
        self.send(agent, "gone")
        eventually(lambda: self.told("gone", "flapping"))
        agent.reset()
        self.master.logged("CRITICAL WARNING: gone lost: .*quiet now, after .* changes")
        self.assertEqual(len(self.told("gone", "lost")), 1)
        eventually(lambda: self.commanded("SENTINEL_EVENT=lost", "SENTINEL_NODE=gone"))

    def test_a_rule_that_stays_fired_is_told_as_an_alert_and_its_end_as_well(self):
        agent = self.agent(source=("127.0.0.3", 0))
        self.toggle(agent, "hot", 41)
        eventually(lambda: self.told("hot", "flapping"))
        alert = (
            r"CRITICAL WARNING: hot: CPU 99 % \(alert above 50 %\); quiet now, after"
        )
        self.master.logged(alert)
        before = len(self.told("hot", "resolved"))
        self.send(agent, "hot", 1.0)
        eventually(lambda: len(self.told("hot", "resolved")) == before + 1)

    def test_the_last_of_many_brief_visits_is_told_when_it_was_lost(self):
        source = ("127.0.0.4", 0)
        for number in range(30):
            visit(self.master, "many%d" % number, source)
        agent = self.agent(source=source)
        self.send(agent, "last")
        agent.reset()
        self.master.logged("CRITICAL WARNING: last lost: .*quiet now")
        self.assertEqual(self.told("many29", "connected"), [])

    def test_a_node_that_stays_is_told_while_its_address_flaps(self):
        source = ("127.0.0.5", 0)
        for number in range(30):
            visit(self.master, "brief%d" % number, source)
        agent = self.agent(source=source)
        self.send(agent, "stays", 99.0)
        eventually(lambda: self.told("stays", "connected"))
        eventually(lambda: self.told("stays", "alert"))
        self.assertEqual(self.told("brief29", "connected"), [])

    def test_another_address_cannot_silence_a_node_by_its_name(self):
        loud = self.agent(source=("127.0.0.6", 0))
        self.toggle(loud, "victim", 40)
        for _ in range(12):
            visit(self.master, "victim", source=("127.0.0.7", 0))
        victim = self.agent(source=("127.0.0.8", 0))
        self.send(victim, "victim", 99.0)
        address = "('127.0.0.8', %d)" % victim.address[1]

        def kinds():
            of_victim = [
                event
                for event in events(self.master.page)
                if event["address"] == address
            ]
            return [event["kind"] for event in of_victim]

        eventually(lambda: kinds() == ["connected", "alert"])
        victim.reset()
        eventually(lambda: kinds() == ["connected", "alert", "resolved", "lost"])

    def test_another_agent_of_the_same_address_cannot_do_so_either(self):
        victim = self.agent(source=("127.0.0.9", 0))
        self.send(victim, "twin")
        loud = self.agent(source=("127.0.0.9", 0))
        self.toggle(loud, "twin", 40)
        for _ in range(12):
            visit(self.master, "twin", source=("127.0.0.9", 0))
        eventually(lambda: self.told("twin", "flapping"))
        before = len(self.told("twin", "alert"))
        self.send(victim, "twin", 99.0)
        eventually(lambda: len(self.told("twin", "alert")) == before + 1)
        victim.reset()
        eventually(lambda: self.told("twin", "lost"))


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
