"""What Slurm says of jobs, from the wire to the page."""

import json
import time
import unittest
from unittest import mock

import beside
import support
from support import MasterTest, PlainAgent, eventually, get

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits


def facts(raw="4711", **more):
    """A message of the relay about a job."""
    known = {
        "part": "job",
        "job": raw,
        "raw": raw,
        "job_name": "train",
        "user": "tester",
        "state": "RUNNING",
        "partition": "debug",
        "nodes": 2,
        "cpus": 8,
        "mem": 2.0**30,
        "start": time.time() - 60,
        "limit": 600.0,
    }
    known.update(more)
    return {key: value for key, value in known.items() if value is not None}


class Jobs(MasterTest):
    def tell(self, *messages):
        with PlainAgent(self.master.port) as relay:
            for message in messages:
                relay.send(message)
            relay.send({"bye": "told"})
            self.assertEqual(relay.read_to_end(), "")

    def job(self, name):
        answer = json.loads(get(self.master.page, "/api/jobs").text)
        return {job["job"]: job for job in answer["jobs"]}.get(name)

    def page(self):
        return support.page_text(self.master.page)

    def test_a_job_is_told_with_whole_numbers_and_null_for_what_is_unknown(self):
        self.tell(facts("1", reason=5, gpus=None))
        job = eventually(lambda: self.job("1"))
        self.assertEqual((job["nodes"], job["cpus"], job["mem"]), (2, 8, 2**30))
        self.assertIs(type(job["mem"]), int)
        self.assertIsNone(job["reason"])
        self.assertIsNone(job["gpus"])
        self.assertEqual(set(job), {*master_server.JOB_KEYS, "verdicts"})

    def test_what_is_told_again_takes_the_place_of_what_was_told_before(self):
        self.tell(facts("2"), facts("2", state="FAILED", exit="3:0"))
        job = eventually(lambda: self.job("2") and self.job("2"))
        self.assertEqual((job["state"], job["exit"]), ("FAILED", "3:0"))

    def test_the_page_lists_jobs_and_folds_the_tasks_of_an_array(self):
        self.tell(
            facts("30", job="30_1", array="30"),
            facts("31", job="30_2", array="30", state="COMPLETED", exit="0:0"),
            facts("40", state="PENDING", reason="Priority", start=None),
            facts("50", state="OUT_OF_MEMORY", exit="0:125", end=time.time()),
        )
        eventually(lambda: self.job("50"))
        text = self.page()
        self.assertIn("30 train 1 running, 1 done", text)
        self.assertIn("Priority", text)
        self.assertIn("exit code 0:125", text)

    def test_hostile_text_is_escaped(self):
        self.tell(facts("60", job_name="<script>alert(1)</script>\x1b[31m"))
        eventually(lambda: self.job("60"))
        html = get(self.master.page).text
        self.assertNotIn("<script>alert", html)
        self.assertNotIn("\x1b", get(self.master.page, "/api/jobs").text)

    def test_a_job_without_an_id_is_refused_with_a_reason(self):
        with PlainAgent(self.master.port) as relay:
            relay.send({"part": "job", "state": "RUNNING"})
            self.assertEqual(relay.read_line(), "error a job without its id")


class Places(unittest.TestCase):
    """Where a job goes in the table."""

    def row(self, raw, state=b"RUNNING", seen=1000.0):
        row = [seen] + [b""] * len(master_server.JOB_KEYS)
        row[2] = raw.ljust(24, b"\0")
        row[1 + master_server.JOB_KEYS.index("state")] = state
        return tuple(row)

    def test_its_own_then_a_new_one_then_that_of_the_oldest_that_ended(self):
        find = master_server.find_job_place
        raw = b"9".ljust(24, b"\0")
        running = self.row(b"1")
        ended = self.row(b"2", b"FAILED", seen=990.0)
        older = self.row(b"3", b"COMPLETED", seen=980.0)
        mine = self.row(b"9")
        silent = self.row(b"4", seen=0.0)
        for rows, place in (
            ([running, ended, mine], 2),
            ([running, ended], 2),
            ([running, ended, older], 2),
            ([running, running, running], -1),
            ([silent, running, running], 0),
        ):
            with self.subTest(place), mock.patch.object(master_server, "JOBS", 3):
                self.assertEqual(find(rows, raw, 1000.0), place)


if __name__ == "__main__":
    unittest.main()
