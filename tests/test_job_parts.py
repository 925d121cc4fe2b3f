"""Processes, CPUs and GPUs of a job: from the wire through the table to pages and JSON."""

import json
import pickle
import unittest

import beside
import support
from support import MasterTest, PlainAgent, eventually, get, page_text

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits

SAMPLE = {"cpu": 50.0, "ram": 40.0, "version": "2.0", "ack": True, "interval": 2.0}


def rank(pid, **more):
    """A part about a process."""
    part = {"part": "rank", "look": 1, "pid": pid, "rank": pid % 100, "cpu": 99.0}
    part.update(mem=2.0**28, threads=4, cpus="0-3", state="R", program="python3")
    return dict(part, **more)


def look(number=1, **more):
    """The part that a look begins with."""
    return dict({"part": "look", "look": number, "processes": 4, "shown": 4}, **more)


class PartsTest(MasterTest):
    def setUp(self):
        self.agents = []
        self.addCleanup(lambda: [agent.close() for agent in self.agents])

    def agent(self, node, job, *parts):
        """An agent that has sent a sample, its parts and the sample that ends the look."""
        agent = PlainAgent(self.master.port)
        self.agents.append(agent)
        self.sample = dict(SAMPLE, node=node, job=job)
        agent.send(self.sample)
        self.look(agent, *parts)
        return agent

    def look(self, agent, *parts):
        agent.send_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
        agent.send(self.sample)

    def job(self, job):
        answer = get(self.master.page, "/api/job/" + job)
        return json.loads(answer.text)["job"] if answer.status == 200 else None

    def node(self, job, index=0):
        job = self.job(job)
        return job["nodes"][index] if job and len(job["nodes"]) > index else None

    def node_with_ranks(self, job):
        """The first node of a job, once its look is there."""
        eventually(lambda: self.pids(job))
        return self.node(job)

    def pids(self, job):
        node = self.node(job)
        return [row["pid"] for row in node["ranks"]] if node else None


class Wire(PartsTest):
    def test_an_agent_is_told_that_parts_are_taken_and_a_plain_one_is_not(self):
        agent = self.agent("w1", "100", look())
        eventually(lambda: self.node("100"))
        self.assertEqual([agent.read_line(), agent.read_line()], ["ok parts", "ok"])
        plain = PlainAgent(self.master.port)
        self.agents.append(plain)
        plain.send({"cpu": 1.0, "ram": 2.0, "ack": True})
        self.assertEqual(plain.read_line(), "ok")

    def test_every_field_arrives_and_what_has_a_wrong_type_is_unknown(self):
        parts = {}
        for kind, fields in master_server.PART_FIELDS.items():
            parts[kind] = {"part": kind}
            for number, (key, code) in enumerate(fields, 1):
                text = "%d" % (number % 10)
                parts[kind][key] = number + 0.5 if code == "d" else text
        self.agent("w2", "101", *(parts[kind] for kind in master_server.PART_KINDS))
        node = self.node_with_ranks("101")
        found = {
            "look": node["look"],
            "core": node["cores"][0],
            "rank": node["ranks"][0],
            "gpu": node["gpus"][0],
        }
        for kind, part in parts.items():
            del part["part"]
            found[kind].pop("time", None)
            self.assertEqual(found[kind], part)
        odd = {"part": "rank", "pid": "x", "cpus": 5, "state": None, "cpu": True}
        self.agent("w3", "102", look(), odd)
        node = self.node_with_ranks("102")
        self.assertEqual(set(node["ranks"][0].values()), {None})

    def test_a_new_look_takes_the_place_of_the_old_one(self):
        agent = self.agent("w4", "103", look(), rank(1), rank(2), rank(3))
        eventually(lambda: self.pids("103") == [1, 2, 3])
        self.look(agent, look(2), rank(3))
        eventually(lambda: self.pids("103") == [3])
        self.look(agent, look(3), rank(4), rank(5))
        eventually(lambda: self.pids("103") == [4, 5])
        agent.close()
        eventually(lambda: self.job("103") is None)

    def test_parts_of_one_that_left_are_not_those_of_who_comes_after(self):
        agent = self.agent("w5", "104", look(), rank(1))
        eventually(lambda: self.pids("104") == [1])
        agent.close()
        eventually(lambda: self.job("104") is None)
        self.agent("w6", "105")
        eventually(lambda: self.node("105"))
        self.assertEqual(self.pids("105"), [])

    def test_a_kind_of_a_later_version_is_passed_over(self):
        self.agent("w7", "106", {"part": "fan", "rpm": 1.0}, look(), rank(1))
        eventually(lambda: self.pids("106") == [1])

    def test_too_many_and_a_part_without_its_look_are_refused(self):
        for number, (parts, words) in enumerate(
            (
                ([look()] + [rank(1)] * 200, "more than 128 parts in a look"),
                ([rank(1)], "a part rank before its look"),
            )
        ):
            with self.subTest(words):
                agent = PlainAgent(self.master.port)
                self.agents.append(agent)
                agent.send(dict(SAMPLE, node="bad", job="10%d" % (7 + number)))
                for part in parts:
                    agent.send(part)
                self.assertIn("error " + words, agent.read_to_end())
        self.agent("w8", "109", look(), rank(1))
        eventually(lambda: self.pids("109") == [1])


class Pages(PartsTest):
    def test_the_page_of_a_job_shows_its_processes_odd_ones_first(self):
        cores = {"part": "core", "look": 1, "first": 0, "busy": "99005-"}
        ranks = [rank(number, cpu=99.0) for number in range(1, 6)]
        ranks[3] = rank(4, cpu=0.0, state="S", wchan="hrtimer_nanosleep")
        gpu = {"part": "gpu", "index": 2, "name": "Example GPU", "gpu": 0.0}
        gpu.update(throttle="power cap", mem_used=3e6)
        self.agent("p1", "200", look(cpus="0-3"), cores, *ranks, gpu)
        eventually(lambda: self.node("200") and len(self.node("200")["ranks"]) == 5)
        html = get(self.master.page, "/job/200").text
        table = html[html.index('id="ranks"') :]
        places = [table.index(">%d</td>" % pid) for pid in (4, 1, 2, 3, 5)]
        self.assertEqual(places, sorted(places))
        label = "2 of the job&#x27;s CPUs busy, 2 idle, 2 not of the job"
        self.assertIn(label, html)
        text = page_text(self.master.page, "/job/200")
        for words in ("hrtimer_nanosleep", "Example GPU", "power cap", "2.9 MB"):
            self.assertIn(words, text)

    def test_a_job_that_nobody_knows_is_404(self):
        for path in ("/job/nope", "/api/job/nope", "/job/", "/api/job/"):
            answer = get(self.master.page, path)
            self.assertEqual(answer.status, 404)
            of_none, missing = "Nothing is known of a job nope", "Which job? Its id"
            self.assertIn(of_none if "nope" in path else missing, answer.text)
            self.assertIn("/jobs has a list", answer.text)

    def test_hostile_text_is_escaped(self):
        bad = "<script>alert(1)</script>"
        self.agent("p2", "201", look(cpus=bad), rank(1, program=bad, wchan=bad))
        eventually(lambda: self.pids("201") == [1])
        self.assertNotIn("<script>alert", get(self.master.page, "/job/201").text)


class NoRoom(PartsTest):
    patch = "master_server.PARTS = 4"

    def test_a_job_says_of_how_many_nodes_the_processes_are_not_shown(self):
        words = "those of 1 node of 2 are not shown"
        self.agent("n0", "301")  # tells of none
        eventually(lambda: self.node("301"))
        self.assertNotIn("not shown", page_text(self.master.page, "/job/301"))
        first = self.agent("n1", "300", look(), rank(1), rank(2))
        eventually(lambda: self.pids("300") == [1, 2])
        self.assertNotIn(words, page_text(self.master.page, "/job/300"))
        second = self.agent("n2", "300", look(), rank(3), rank(4))
        eventually(lambda: words in page_text(self.master.page, "/job/300"))
        metrics = get(self.master.page, "/metrics").text
        self.assertIn("\nsentinel_looks_left_out_total{} 1\n", metrics)
        first.close()
        eventually(lambda: self.node("300") and not self.node("300", 1))
        self.look(second, look(2), rank(3), rank(4))
        eventually(lambda: self.pids("300") == [3, 4])
        self.assertNotIn("not shown", page_text(self.master.page, "/job/300"))


class Places(unittest.TestCase):
    """The rows of the parts' region are handed out, given back, and run out."""

    def test_without_room_a_look_is_left_out_and_the_next_finds_what_was_freed(self):
        name = "sentinel_test_parts_%d" % support.os.getpid()
        table = master_server.Table.create(name, 100)
        self.addCleanup(table.unlink)
        table.lock = support.threading.Lock()
        part = ("rank", master_server.check_part(rank(7))[1])
        most = master_server.LOOK_PARTS
        held = [[] for _ in range(master_server.PARTS // most)]
        for index, places in enumerate(held):
            table.write_parts(index, [part] * most, places)
        late = []
        table.write_parts(90, [part], late)
        self.assertEqual((late, table.parts_left_out), ([], 1))
        table.write_parts(3, [], held[3])
        self.assertEqual(held[3], [])
        table.write_parts(90, [part], late)
        self.assertEqual(len(late), 1)
        table.beat(0, 100)
        view = table.snapshot()
        self.assertEqual(view.parts_left_out, 1)
        self.assertFalse(view.has_room_for_look())
        table.write_parts(90, [], late)
        self.assertTrue(table.snapshot().has_room_for_look())
        self.assertEqual(len(view.parts(1).ranks), most)
        self.assertEqual(view.parts(4).ranks, [])
        self.assertEqual([row["pid"] for row in view.parts(91).ranks], [7])

    def test_verdicts_take_the_place_of_the_job_judged_longest_ago(self):
        name = "sentinel_test_verdicts_%d" % support.os.getpid()
        table = master_server.Table.create(name, 1)
        self.addCleanup(table.unlink)
        table.lock = support.threading.Lock()
        fine = {"severity": "fine", "what": "x" * 100, "proof": "", "cure": ""}
        for job in range(master_server.JOBS + 1):
            table.write_verdicts(str(job), [fine])
        table.write_verdicts("1", [dict(fine, severity="problem")] + [fine] * 20)
        verdicts = table.snapshot().verdicts
        self.assertEqual(len(verdicts), master_server.JOBS)
        self.assertNotIn("0", verdicts)
        self.assertEqual(verdicts["1"][0]["severity"], "problem")
        self.assertIn(len(verdicts["1"]), range(2, 20))
        self.assertEqual(table.verdict_changes(), master_server.JOBS + 2)


if __name__ == "__main__":
    unittest.main()
