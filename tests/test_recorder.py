"""The recorder: a role that writes records, whatever the disk does and whoever is killed."""

import contextlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock

import beside
import support
from support import PlainAgent, eventually, start_master

import master_server as master

load_tests = beside.in_parts(2)  # in processes of their own: they mostly wait

NOW = 1700000000.0
FAST = (
    "master_server.ROW_SECONDS = 0.4; master_server.LOOK_SECONDS = 0.1;"
    " master_server.LEFT_SECONDS = 0.5; master_server.RETRY_SECONDS = 0.2"
)


def sample(node, job="4711", **more):
    """What an agent in a job sends."""
    return dict(
        {"cpu": 50.0, "ram": 40.0, "node": node, "job": job, "job_cpu": 80.0}, **more
    )


class Work(unittest.TestCase):
    """A folder, and a writer that writes to it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.join(folder.name, "jobs")
        for name, value in (("RETRY_SECONDS", 0.05), ("HANG_SECONDS", 0.1)):
            patch = unittest.mock.patch.object(master, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def writer(self):
        return master.RecordWriter(self.folder, "m-1-1", lambda record: "<html>")

    def path(self, job="1"):
        return os.path.join(self.folder, job + ".m-1-1.jsonl")

    def post(self, writer, job="1", number=1):
        line = {"event": {"time": NOW + number, "kind": "k", "node": "n", "text": "t"}}
        head = master.record_line({"job": {"job": job}, "time": NOW})
        writer.post(master.Work("lines", job, master.record_line(line), head))

    def events(self, job="1"):
        record = master.read_record(self.folder, job)
        return [event["time"] - NOW for event in record.events] if record else []


class Curves(unittest.TestCase):
    def sample(self, **known):
        """A sample as the table has it."""
        row = [math.nan] * len(master.NODE_KEYS)
        for key, value in known.items():
            row[master.NODE_KEYS.index(key)] = value
        return tuple(row)

    def test_they_hold_the_newest_points_of_what_checks_look_at_and_nothing_else(self):
        curves = master.Curves()
        rounds = 5 * master.TRACE_POINTS + 7
        for number in range(rounds):
            known = {"job_cpu": float(number), "job_mem": 2.0 * number, "load1": 9.0}
            if number % 2:
                known["psi_io"] = float(number)
            curves.add(NOW + 10 * number, self.sample(**known))
        found = curves.known()
        self.assertEqual(set(found), {"job_cpu", "job_mem", "psi_io"})
        newest = range(rounds - master.CURVES["job_cpu"], rounds)
        self.assertEqual(found["job_cpu"], [(NOW + 10 * n, n) for n in newest])
        newest = range(rounds - master.TRACE_POINTS, rounds)
        self.assertEqual(found["job_mem"], [(NOW + 10 * n, 2 * n) for n in newest])
        newest = range(rounds - master.CURVES["psi_io"], rounds)
        expected = [(NOW + 10 * n, n) for n in newest if n % 2]
        self.assertEqual(found["psi_io"], expected)

    def test_a_node_of_a_long_job_takes_sixteen_kibibytes_at_most(self):
        curves = master.Curves()
        most = 0
        for number in range(3 * master.TRACE_POINTS):
            curves.add(NOW + 10 * number, self.sample(job_cpu=1.0, job_mem=1.0))
            arrays = [curves.times, *curves.readings]
            most = max(most, sum(map(sys.getsizeof, arrays)))
        self.assertLessEqual(most, 16384)

    def test_every_metric_that_checks_look_at_is_kept(self):
        kept = {key for traced in master.TRACED for key in traced.keys}
        self.assertEqual(kept, set(master.CURVES) & set(master.NUMBERS))


class Writing(Work):
    def failing(self, error):
        """What append_lines() does as long as there is no room."""
        state = {"fails": True}
        real = master.append_lines

        def append(path, data):
            if state["fails"]:
                raise OSError(error, os.strerror(error))
            return real(path, data)

        patch = unittest.mock.patch.object(master, "append_lines", append)
        patch.start()
        self.addCleanup(patch.stop)
        return state

    def test_what_is_posted_is_written_with_its_head_before(self):
        writer = self.writer()
        for number in range(5):
            self.post(writer, number=number)
        self.assertTrue(writer.finish(support.PATIENCE))
        with open(self.path(), "rb") as file:
            self.assertTrue(file.readline().startswith(b'{"job":'))
        self.assertEqual(self.events(), [0, 1, 2, 3, 4])

    def test_a_full_disk_costs_one_line_and_nothing_is_lost_when_it_passes(self):
        for error in (28, 122, 30):  # no space, quota, read-only
            with self.subTest(os.strerror(error)), self.assertLogs("sentinel") as logs:
                state = self.failing(error)
                writer = self.writer()
                job = str(error)
                for number in range(5):
                    self.post(writer, job, number)
                    self.post(writer, "other" + job, number)
                    time.sleep(0.06)  # a try of its own
                self.assertEqual(len(logs.output), 1, logs.output)
                self.assertIn(os.strerror(error), logs.output[0])
                state["fails"] = False
                self.assertTrue(writer.finish(support.PATIENCE))
                eventually(lambda: len(logs.output) == 2)
                self.assertIn("again", logs.output[1])
                self.assertEqual(self.events(job), [0, 1, 2, 3, 4])
                self.assertEqual(self.events("other" + job), [0, 1, 2, 3, 4])

    def test_the_file_of_one_job_that_cannot_be_written_keeps_no_other_job_back(self):
        master.make_folder(self.folder)
        os.mkdir(self.path("1"))
        writer = self.writer()
        with self.assertLogs("sentinel"):
            self.post(writer, "1")
            self.post(writer, "2")
            eventually(lambda: self.events("2"))
        os.rmdir(self.path("1"))
        self.assertTrue(writer.finish(support.PATIENCE))
        self.assertEqual(self.events("1"), [1])

    def test_half_a_write_is_finished_when_there_is_room_again(self):
        real = os.write
        state = {"left": 90}

        def write(file, data):
            if not state["left"]:
                raise OSError(28, "No space left on device")
            size = real(file, data[: state["left"]])
            state["left"] -= size
            return size

        writer = self.writer()
        self.post(writer, number=0)
        self.assertTrue(writer.finish(support.PATIENCE))
        with unittest.mock.patch.object(os, "write", write), self.assertLogs(
            "sentinel"
        ):
            for number in range(1, 6):
                self.post(writer, number=number)
            eventually(lambda: not state["left"])
            state["left"] = 10**9
            self.assertTrue(writer.finish(support.PATIENCE))
        self.assertEqual(self.events(), [0, 1, 2, 3, 4, 5])

    def test_a_folder_that_is_removed_is_made_again_and_records_have_their_head(self):
        writer = self.writer()
        self.post(writer, number=1)
        self.assertTrue(writer.finish(support.PATIENCE))
        shutil.rmtree(self.folder)
        with self.assertLogs("sentinel") as logs:
            self.post(writer, number=2)
            self.assertTrue(writer.finish(support.PATIENCE))
        self.assertEqual(len(logs.output), 1)
        self.assertIn("was gone", logs.output[0])
        with open(self.path(), "rb") as file:
            self.assertTrue(file.readline().startswith(b'{"job":'))

    def test_a_disk_that_hangs_delays_nobody_and_is_told_in_one_line(self):
        hang = threading.Event()
        real = master.append_lines

        def append(path, data):
            hang.wait(support.PATIENCE)
            return real(path, data)

        writer = self.writer()
        patch = unittest.mock.patch.object(master, "append_lines", append)
        with patch, self.assertLogs("sentinel") as logs:
            slowest = 0.0
            until = time.monotonic() + 0.5
            number = 0
            while time.monotonic() < until:
                began = time.monotonic()
                number += 1
                self.post(writer, number=number)
                writer.check()
                slowest = max(slowest, time.monotonic() - began)
            self.assertEqual(len(logs.output), 1, logs.output)
            self.assertIn("does not answer", logs.output[0])
            hang.set()
            self.assertTrue(writer.finish(support.PATIENCE))
            eventually(lambda: len(logs.output) == 2)
        self.assertLess(slowest, 0.3)
        self.assertEqual(len(self.events()), number)

    def test_what_waits_for_a_disk_is_bounded_and_the_rest_has_its_nodes(self):
        state = self.failing(28)
        with unittest.mock.patch.object(master, "MAX_BACKLOG", 1000):
            writer = self.writer()
            with self.assertLogs("sentinel") as logs:
                for number in range(200):
                    self.post(writer, number=number)
                self.assertLessEqual(writer.size, 1000)
                eventually(lambda: logs.output)
                state["fails"] = False
                self.assertTrue(writer.finish(support.PATIENCE))
        events = self.events()
        self.assertEqual(events[-1], 199)
        self.assertLess(len(events), 20)
        with open(self.path(), "rb") as file:
            self.assertTrue(file.readline().startswith(b'{"job":'))

    def test_a_defect_costs_its_own_work_alone(self):
        writer = master.RecordWriter(self.folder, "m-1-1", lambda record: 1 / 0)
        with self.assertLogs("sentinel", logging.ERROR) as logs:
            self.post(writer, "1")
            writer.post(master.Work("report", "1"))
            self.post(writer, "2")
            self.assertTrue(writer.finish(support.PATIENCE))
        self.assertIn("a defect", logs.output[0])
        self.assertEqual(self.events("2"), [1])

    def test_cells_of_a_report_are_not_kept_for_that_of_the_next_job(self):
        def render(record):
            return str(master.plain_cell("l", record.job))

        writer = master.RecordWriter(self.folder, "m-1-1", render)
        self.post(writer)
        writer.post(master.Work("report", "1"))
        self.assertTrue(writer.finish(support.PATIENCE))
        with open(master.report_path(self.folder, "1")) as file:
            self.assertIn("<td", file.read())
        self.assertEqual(master.plain_cell.cache_info().currsize, 0)

    def test_who_goes_on_with_a_file_notes_the_gap(self):
        row = master.RecordRow(NOW, 10.0, ["n"], {"cpu": [1.0, 1.0, 1.0, 1.0]})
        master.make_folder(self.folder)
        with open(self.path(), "wb") as file:
            file.write(master.row_line(row) + b'{"row":')
        writer = self.writer()
        later = master.row_line(row._replace(time=NOW + 90))
        writer.post(master.Work("lines", "1", later))
        writer.post(master.Work("lines", "1", later))
        self.assertTrue(writer.finish(support.PATIENCE))
        self.assertEqual(master.read_record(self.folder, "1").gaps, [(NOW, NOW + 90)])


@contextlib.contextmanager
def a_table(capacity=32):
    """A table of this process's own."""
    table = master.Table.create("sentinel_r%d" % os.getpid(), capacity)
    table.lock = multiprocessing.Lock()
    try:
        yield table
    finally:
        table.unlink()


class Looks(Work):
    """The role's looks at a table, without its process."""

    def setUp(self):
        super().setUp()
        table = a_table()
        self.table = table.__enter__()
        self.addCleanup(table.__exit__, None, None, None)
        self.judged = []
        self.options = unittest.mock.Mock(record=self.folder)
        self.recorder = master.Recorder(None, self.table, self.options, self.judge)
        self.now = time.time()
        self.recorder.look(self.table.snapshot(), self.now)

    def judge(self, evidence):
        self.judged.append(evidence)
        if len(evidence.nodes) < 2:
            return []
        verdict = unittest.mock.Mock()
        verdict._asdict = lambda: {"severity": "problem", "what": "w", "rule": "r"}
        return [verdict]

    def send(self, slot, node, **more):
        row = master.check_sample(sample(node, **more))
        self.table.write(slot, "('h', %d)" % slot, row, self.now, "")

    def tell(self, job="4711", **facts):
        known = dict(
            {"job": job, "raw": job, "state": "RUNNING", "part": "job"}, **facts
        )
        self.table.write_job(master.check_job(known))

    def look(self, seconds=10.0):
        """A look at which rows are due, so much later."""
        self.now += seconds
        self.recorder.row_due = 0.0
        self.table.beat(0, 32)
        self.recorder.look(self.table.snapshot(), self.now)

    def tearDown(self):
        self.assertTrue(self.recorder.writer.finish(support.PATIENCE))

    def record(self, job="4711"):
        self.assertTrue(self.recorder.writer.finish(support.PATIENCE))
        return master.read_record(self.folder, job)

    def test_nodes_are_grouped_by_job_with_what_slurm_says(self):
        self.tell("4711_3", raw="4713", job_name="train", limit=3600.0)
        self.send(0, "c1", job="4713", job_cpu=20.0, job_cpus=4.0)
        self.send(1, "c2", job="4713", job_cpu=60.0, job_cpus=4.0)
        self.send(2, "c3", job="99")
        self.send(3, "login", job="")
        self.look()
        record = self.record("4711_3")
        self.assertEqual(record.facts["job_name"], "train")
        self.assertEqual(list(record.nodes), ["c1", "c2"])
        self.assertEqual(record.rows[0].values["job_cpu"], [20, 40, 60, 20, 60])
        self.assertEqual(list(self.record("99").nodes), ["c3"])
        jobs = {file.job for file in master.list_files(self.folder)}
        self.assertEqual(jobs, {"4711_3", "99"})

    def test_an_end_and_what_is_learned_of_it_later_are_judged_at_the_next_look(self):
        self.tell()
        self.send(0, "c1")
        self.send(1, "c2")
        self.look()
        self.recorder.row_due = time.monotonic() + 3600  # no row is due
        told = []
        for facts in ({"exit": "3:0"}, {"exit": "3:0"}, {"failed_step": "step 0"}):
            self.tell(state="FAILED", **facts)
            self.recorder.look(self.table.snapshot(), self.now)
            told.append(len(self.judged))
        self.assertEqual([count - told[0] for count in told], [0, 0, 1])
        self.assertEqual(self.judged[-1].facts["failed_step"], "step 0")
        self.assertEqual(self.judged[-1].facts["exit"], "3:0")
        self.assertEqual(self.judged[told[0] - 1].facts["state"], "FAILED")
        self.assertEqual(self.table.snapshot().verdicts["4711"][0]["what"], "w")

    def test_several_looks_make_a_row_with_what_was_the_least_and_the_most(self):
        self.send(0, "c1", job_cpu=0.0)
        self.look()
        for busy in (10.0, 90.0, 50.0):
            self.send(0, "c1", job_cpu=busy)
            self.recorder.row_due = time.monotonic() + 9
            self.table.beat(0, 32)
            self.recorder.look(self.table.snapshot(), self.now + 1)
        self.send(0, "c1", job_cpu=50.0)
        self.look()
        self.assertEqual(self.record().rows[1].values["job_cpu"], [10, 50, 90, 50])

    def test_a_node_that_came_and_went_between_two_looks_has_its_last_sample(self):
        values = [70.0] + [math.nan] * (len(master.PAST_KEYS) - 1)
        values[master.PAST_KEYS.index("job_mem")] = 5e9
        self.table.write_past("c1", "8", [(self.now + 3.0, tuple(values))])
        self.table.write_past("c2", "8", [(self.now + 3.1, tuple(values))])
        self.look()
        record = self.record("8")
        self.assertEqual(list(record.nodes), ["c1", "c2"])
        (row,) = record.rows
        self.assertEqual(row.values["job_mem"], [5e9] * 5)
        self.assertAlmostEqual(row.time, self.now - 10 + 3.1, delta=0.11)
        self.assertLessEqual(row.step, master.LOOK_SECONDS)
        self.assertNotIn("gpu", row.values)

    def test_the_last_sample_of_a_node_that_left_after_the_last_look_is_there(self):
        self.send(0, "c1", job_mem=1e9)
        self.look()
        self.table.clear(0)
        values = [5e9] * len(master.PAST_KEYS)
        self.table.write_past("c1", "4711", [(self.now + 1.5, tuple(values))])
        self.look()
        rows = self.record().rows
        self.assertEqual([row.values["job_mem"][2] for row in rows], [1e9, 5e9])
        self.assertAlmostEqual(rows[1].time - rows[0].time, 1.5, delta=0.11)

    def test_jobs_that_only_left_are_bounded(self):
        with unittest.mock.patch.object(master, "MAX_RECORDINGS", 3):
            for number in range(9):
                values = (1.0,) * len(master.PAST_KEYS)
                self.table.write_past("c1", str(number), [(self.now, values)])
            self.look()
            self.assertEqual(len(self.recorder.recordings), 3)

    def test_a_collector_that_is_silent_leaves_a_gap_and_no_old_samples(self):
        self.send(0, "c1")
        self.look()
        for _ in range(3):
            self.now += 10
            self.recorder.row_due = 0.0
            view = self.table.snapshot()
            view.beat = 60.0
            self.recorder.look(view, self.now)
        self.look()
        times = [row.time for row in self.record().rows]
        self.assertEqual(len(times), 2)
        self.assertAlmostEqual(times[1] - times[0], 40, 0)

    def test_a_job_ends_with_its_state_its_verdict_and_its_report(self):
        self.tell(job_name="train")
        self.send(0, "c1")
        self.send(1, "c2")
        self.look()
        self.tell(state="OUT_OF_MEMORY", exit="0:125", end=self.now)
        self.table.clear(0)
        self.table.clear(1)
        self.table.add_event(
            "lost", "no sample for 5 s", "c2", master.check_sample(sample("c2"))
        )
        self.look()
        record = self.record()
        self.assertTrue(record.has_ended)
        self.assertEqual(record.facts["state"], "OUT_OF_MEMORY")
        self.assertEqual([event["kind"] for event in record.events], ["lost"])
        self.assertEqual(record.verdicts[0]["what"], "w")
        self.assertEqual(
            sorted(os.listdir(self.folder)),
            ["4711.html", "4711.%s.jsonl.gz" % self.recorder.writer.mark],
        )
        evidence = self.judged[-1]
        lost = {node.name: node.lost for node in evidence.nodes}
        self.assertIsNone(lost["c1"])
        self.assertAlmostEqual(lost["c2"], time.time(), delta=20)
        self.assertEqual(evidence.facts["exit"], "0:125")
        self.assertEqual(evidence.nodes[0].sample["job_cpu"], 80)
        self.assertEqual(set(evidence.nodes[0].sample), set(master.INDEX))
        self.assertEqual([value for _, value in evidence.nodes[0].curves["cpu"]], [50])

    def test_what_is_learnt_after_the_end_is_recorded_and_reported_too(self):
        self.tell()
        self.send(0, "c1")
        self.look()
        self.tell(state="FAILED")
        self.table.clear(0)
        self.look()
        self.record()
        os.unlink(master.report_path(self.folder, "4711"))
        self.tell(state="FAILED", exit="1:0")
        self.look()
        self.assertEqual(self.record().facts["exit"], "1:0")
        self.assertTrue(os.path.exists(master.report_path(self.folder, "4711")))
        self.look()
        size = os.stat(master.list_files(self.folder)[0].path).st_size
        self.look()
        self.record()
        self.assertEqual(os.stat(master.list_files(self.folder)[0].path).st_size, size)

    def test_a_recorder_that_begins_after_the_end_writes_no_second_one(self):
        self.tell(state="COMPLETED", start=self.now - 90, end=self.now)
        self.look()
        before = self.record()
        self.assertEqual(before.facts["state"], "COMPLETED")
        (file,) = master.list_files(self.folder)
        again = master.Recorder(None, self.table, self.options)
        again.look(self.table.snapshot(), self.now + 60)
        self.assertTrue(again.writer.finish(support.PATIENCE))
        self.assertEqual(master.list_files(self.folder), [file])

    def test_a_job_that_only_agents_know_of_is_over_when_all_have_said_goodbye(self):
        self.send(0, "c1")
        self.look()
        self.table.clear(0)
        row = master.check_sample(sample("c1"))
        self.table.add_event("finished", "finished", "c1", row)
        self.look()
        self.assertFalse(self.record().has_ended)
        self.look(master.LEFT_SECONDS)
        record = self.record()
        self.assertTrue(record.has_ended)
        self.assertIsNone(record.facts["state"])

    def test_it_is_noted_when_most_nodes_of_all_jobs_are_lost_together(self):
        for count, is_burst in ((1, False), (2, False), (3, True), (4, True)):
            with self.subTest(count):
                self.recorder.burst = None
                self.recorder.losses.clear()
                for number in range(5):
                    job = "%d" % (count * 10 + number)
                    self.send(number, "c%d" % number, job=job)
                self.look()
                for number in range(count):
                    row = master.check_sample(sample("c%d" % number))
                    words = "no sample for %d s" % count
                    self.table.add_event("lost", words, "c%d" % number, row)
                # jobs of before are still known: only those of now count
                for job in list(self.recorder.recordings):
                    if not job.startswith("%d" % count):
                        del self.recorder.recordings[job]
                self.look()
                self.assertEqual(self.recorder.burst is not None, is_burst)
                self.assertEqual(self.judged[-1].burst, self.recorder.burst)

    def test_a_job_whose_nodes_are_lost_goes_on_when_they_are_back(self):
        self.send(0, "c1")
        self.look()
        self.table.clear(0)
        self.table.add_event("lost", "x", "c1", master.check_sample(sample("c1")))
        self.look(60)
        self.assertFalse(self.record().has_ended)
        self.send(0, "c1")
        self.look()
        self.assertEqual(len(self.record().rows), 2)

    def test_a_waiting_job_has_no_record(self):
        self.tell(state="PENDING")
        self.look()
        self.assertIsNone(self.record())

    def test_parts_are_recorded_in_summary_and_are_evidence(self):
        ranks = [
            {"part": "rank", "rank": n, "mem": n * 1e9, "cpu": 99.0} for n in range(300)
        ]
        gpus = [
            {
                "part": "gpu",
                "index": 1,
                "gpu": 97,
                "mem_used": 3e10,
                "power": 250,
                "temp": 61,
            }
        ]
        parts = unittest.mock.Mock(
            look={"cpus": "0-3,8"},
            cores=[{"first": 0, "busy": "09-"}],
            ranks=ranks,
            gpus=gpus,
        )
        self.send(0, "c1")
        with unittest.mock.patch.object(
            master, "read_parts", lambda rows, slots: dict.fromkeys(slots, parts)
        ):
            self.look()
            self.look()
        record = self.record()
        self.assertEqual(len(record.ranks), master.MAX_RANKS)
        self.assertEqual(record.ranks[0]["rank"], 299)
        self.assertEqual(record.gpus["c1 1"][0][1], [97, 3e10, 250, 61])
        (node,) = self.judged[-1].nodes
        self.assertEqual(node.cpus, {0, 1, 2, 3, 8})
        self.assertEqual(node.cores, {0: 0.05, 1: 0.95})

    def send_look(self, slot, *ranks, places=None):
        """Have a node tell of its ranks."""
        parts = [{"part": "look", "cpus": "0-3"}]
        parts += [{"part": "rank", "pid": 1, "rank": rank} for rank in ranks]
        rows = [master.check_part(part) for part in parts]
        self.table.write_parts(slot, rows, [] if places is None else places)

    def test_the_last_look_of_a_node_that_has_left_is_recorded_at_the_end(self):
        held = []
        self.tell()
        self.send(0, "c1")
        self.send(1, "c2")
        self.send_look(0, 1, 2, places=held)
        self.send_look(1, 3)
        patch = unittest.mock.patch.object(master, "DIAGNOSE_SECONDS", math.inf)
        patch.start()
        self.addCleanup(patch.stop)
        for _ in range(3):  # the first row is one with ranks, and these are not
            self.look()
        self.send_look(0, 1, 2, 4, places=held)
        self.look()
        self.table.clear(0)
        self.send_look(0, 7, places=held)  # of another, who has the slot now
        self.send(0, "c9", job="99")
        self.look()
        traces = self.recorder.recordings["4711"].traces
        self.assertIsNone(traces["c1"].unread)  # else a copy of all looks is kept
        self.tell(state="FAILED")
        self.table.clear(1)
        self.look()
        found = {(rank["node"], rank["rank"]) for rank in self.record().ranks}
        self.assertEqual(found, {("c1", 1), ("c1", 2), ("c1", 4), ("c2", 3)})

    def test_looks_are_read_when_they_are_recorded_or_judged_and_at_no_other_time(self):
        self.tell()
        self.send(0, "c1")
        self.send_look(0, 1)
        read = []
        real = master.read_parts

        def count(rows, slots):
            read.append(list(slots))
            return real(rows, slots)

        with unittest.mock.patch.object(master, "read_parts", count):
            for _ in range(master.GPU_ROWS):
                self.look(1)
        self.assertEqual(read, [[1]])

    def test_a_verdict_that_fails_is_told_once_and_the_record_goes_on(self):
        self.recorder.diagnose = lambda evidence: 1 / 0
        self.send(0, "c1")
        with self.assertLogs("sentinel", logging.ERROR) as logs:
            for _ in range(4):
                self.look(40)
        self.assertEqual(len(logs.output), 1)
        self.assertEqual(len(self.record().rows), 4)
        self.assertIsNone(self.record().verdicts)

    def test_an_old_job_has_fewer_rows_and_its_last_minutes_in_full(self):
        self.tell(start=self.now - 10 * 3600)
        for number in range(100):
            self.send(0, "c1", job_cpu=float(number))
            self.look()
        coarse = self.record().rows
        self.assertLess(len(coarse), 15)
        self.tell(state="TIMEOUT")
        self.table.clear(0)
        self.look()
        rows = self.record().rows
        fine = [row for row in rows if row.step == 10]
        self.assertEqual(len(fine), master.TAIL_ROWS)
        self.assertEqual(fine[-1].values["job_cpu"][1], 99)
        gaps = [
            after.time - before.time - max(after.step, before.step)
            for before, after in zip(rows, rows[1:])
        ]
        self.assertLess(max(gaps), max(row.step for row in rows))

    def test_peers_that_invent_nodes_and_jobs_are_bounded(self):
        with unittest.mock.patch.object(
            master, "MAX_TRACES", 5
        ), unittest.mock.patch.object(master, "MAX_RECORDINGS", 3):
            for number in range(20):
                self.send(number, "c%d" % number, job="1")
            for number in range(20, 30):
                self.send(number, "c", job=str(number))
            self.look()
            self.assertEqual(len(self.recorder.recordings), 3)
            self.assertEqual(len(self.recorder.recordings["1"].traces), 5)


class Roles(unittest.TestCase):
    """Real processes."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.join(folder.name, "jobs")

    def record(self, job="4711"):
        return master.read_record(self.folder, job) or master.Record(job)

    def master(self, *flags, patch=FAST):
        return start_master("--record", self.folder, *flags, patch=patch)

    def keep_sending(self, agents, check):
        """Send until it holds."""

        def look():
            for number, agent in enumerate(agents):
                agent.send(sample("c%d" % number, version="1.0"))
            return check()

        return eventually(look)

    def test_a_recorder_that_is_killed_goes_on_alone_in_the_same_file(self):
        with self.master() as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: len(self.record().rows) >= 2)
            pid = int(tool.logged(r"recorder started, pid (\d+)").group(1))
            collector = int(tool.logged(r"collector started, pid (\d+)").group(1))
            os.kill(pid, signal.SIGKILL)
            tool.logged(r"recorder ended")
            self.keep_sending([agent], lambda: self.record().gaps)
            count = len(self.record().rows)
            self.keep_sending([agent], lambda: len(self.record().rows) > count)
            self.assertTrue(support.alive(collector))
            agent.send({"bye": "finished"})
            eventually(lambda: self.record().has_ended)
            eventually(lambda: os.path.exists(master.report_path(self.folder, "4711")))
        self.assertEqual(len(master.list_files(self.folder)), 1)

    def test_a_master_that_is_killed_leaves_its_part_and_the_next_adds_its_own(self):
        with self.master() as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: len(self.record().rows) >= 2)
            tool.kill()
        before = self.record()
        with self.master() as tool, PlainAgent(tool.port) as agent:
            self.keep_sending(
                [agent], lambda: len(self.record().rows) >= len(before.rows) + 2
            )
            agent.send({"bye": "finished"})
            eventually(lambda: os.path.exists(master.report_path(self.folder, "4711")))
        record = self.record()
        self.assertEqual(record.rows[: len(before.rows)], before.rows)
        self.assertEqual(len(master.list_files(self.folder)), 2)

    def test_a_job_that_is_over_before_the_first_look_is_recorded_and_reported(self):
        patch = FAST + "; master_server.LOOK_SECONDS = master_server.ROW_SECONDS = 2.0"
        with self.master(patch=patch) as tool:
            tool.logged("recorder started")
            for node, job in (("c1", "4711"), ("c2", "4711"), ("c1", "4712")):
                with PlainAgent(tool.port) as agent:
                    agent.send(sample(node, job, version="1.0", job_mem=3e9))
                    agent.send({"bye": "exit 3", "report": "ran 0:00:01"})
                    agent.read_to_end()
            for job in ("4711", "4712"):
                eventually(lambda job=job: self.record(job).has_ended)
                report = master.report_path(self.folder, job)
                eventually(lambda report=report: os.path.exists(report))
        record = self.record()
        self.assertEqual(sorted(record.nodes), ["c1", "c2"])
        self.assertEqual(master.summarize(record)["peak"], 3e9)
        texts = [
            event["text"] for event in record.events if event["kind"] == "finished"
        ]
        self.assertEqual(texts, ["exit 3; ran 0:00:01"] * 2)
        self.assertLess(master.summarize(record)["ran"], 10)

    def test_ctrl_c_writes_what_was_seen_and_nothing_is_left_behind(self):
        patch = FAST + "; master_server.ROW_SECONDS = 4"
        with self.master(patch=patch) as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: self.record().rows)
            agent.send(sample("c0", job_cpu=33.0))
            time.sleep(0.5)  # looks of 0.1 s, and no row is due
            self.assertEqual(tool.stop(signal.SIGINT), 0)
        rows = self.record().rows
        self.assertEqual(len(rows), 2)
        self.assertLess(rows[1].values["job_cpu"][1], 80)
        self.assertEqual(support.descendants(tool.pid), [])

    def test_a_disk_that_hangs_under_a_master_costs_one_line_and_goes_on_later(self):
        hangs = os.path.join(os.path.dirname(self.folder), "hangs")
        patch = """
import os, time
append = master_server.append_lines
def hang(path, data):
    while os.path.exists(%r):
        time.sleep(0.05)
    return append(path, data)
master_server.append_lines = hang
master_server.HANG_SECONDS = 0.5
"""
        patch = FAST + patch % hangs
        with self.master(patch=patch) as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: self.record().rows)
            with open(hangs, "w"):
                pass
            told = lambda: "it does not answer" in tool.log  # noqa: E731
            self.keep_sending([agent], told)
            rows = len(self.record().rows)
            seen = support.nodes(tool.page)[0]["age"]
            self.assertLess(seen, 3)  # the page is live
            os.unlink(hangs)
            self.keep_sending([agent], lambda: "again" in tool.log)
            self.keep_sending([agent], lambda: len(self.record().rows) > rows + 1)
            self.assertEqual(tool.log.count("cannot record"), 1)
        self.assertLess(self.longest_hole(), 3)

    @support.slow("ten masters")
    def test_ten_masters_record_one_job_in_one_folder_without_a_broken_line(self):
        with contextlib.ExitStack() as stack:
            tools = [stack.enter_context(self.master()) for _ in range(10)]
            agents = [stack.enter_context(PlainAgent(tool.port)) for tool in tools]

            def all_have_rows():
                files = master.list_files(self.folder)
                rows = [master.read_file(file.path).count(b'"row"') for file in files]
                return len(rows) == 10 and min(rows) >= 3

            self.keep_sending(agents, all_have_rows)
            for agent in agents:
                agent.send({"bye": "finished"})
            packed = lambda: all(  # noqa: E731
                file.is_packed for file in master.list_files(self.folder)
            )
            eventually(packed, 60)
        for file in master.list_files(self.folder):
            lines = master.read_file(file.path).split(b"\n")
            self.assertEqual(lines.pop(), b"")
            found = list(master.read_lines(b"\n".join(lines)))
            self.assertEqual(len(found), len(lines))
        record = self.record()
        self.assertEqual(sorted(record.nodes), ["c%d" % n for n in range(10)])
        self.assertTrue(record.has_ended)
        self.assertTrue(os.path.exists(master.report_path(self.folder, "4711")))
        names = os.listdir(self.folder)
        self.assertEqual([name for name in names if ".new" in name], [])

    def test_nothing_is_recorded_unless_jobs_are_watched_or_it_is_asked_for(self):
        done = support.run("master_server.py", "--record", "x", "--no-record")
        self.assertEqual(done.returncode, 2)
        self.assertIn("--no-record: not allowed with argument --record", done.stderr)
        with start_master(env={"HOME": self.folder}) as tool:
            self.assertNotIn("recorder", tool.log)
        self.assertFalse(os.path.exists(self.folder))

    def test_jobs_are_recorded_at_home_when_they_are_watched(self):
        env = {"HOME": self.folder}
        with start_master("--my-jobs", env=env, patch=FAST) as tool:
            tool.logged("recording jobs in %s/.sentinel/jobs" % self.folder)
            with PlainAgent(tool.port) as agent:
                folder = os.path.join(self.folder, ".sentinel", "jobs")
                self.keep_sending([agent], lambda: master.read_record(folder, "4711"))
        with start_master("--my-jobs", "--no-record", env=env, patch=FAST) as tool:
            files = sorted(os.listdir(folder))
            with PlainAgent(tool.port) as agent:
                self.keep_sending([agent], lambda: self.is_judged(tool))
            self.assertNotIn("recording", tool.log)
        self.assertEqual(sorted(os.listdir(folder)), files)

    def is_judged(self, tool):
        """Whether the live page has a verdict on the job."""
        answer = support.get(tool.page, "/api/job/4711")
        return answer.status == 200 and json.loads(answer.text)["job"]["verdicts"]

    def test_a_secret_at_home_that_is_named_sentinel_is_no_trouble(self):
        os.makedirs(self.folder)
        with unittest.mock.patch.dict(os.environ, HOME=self.folder):
            self.assertEqual(master.default_folder(), self.folder + "/.sentinel/jobs")
            with open(os.path.join(self.folder, ".sentinel"), "w"):
                pass
            self.assertEqual(master.default_folder(), self.folder + "/.sentinel-jobs")

    def mount_a_small_disk(self):
        """64 KiB, where the records are."""
        os.makedirs(self.folder)
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", self.folder]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            self.skipTest("no mount here")
        umount = ["umount", "-l", self.folder]
        self.addCleanup(subprocess.run, umount, stderr=subprocess.DEVNULL)

    def longest_hole(self):
        """Seconds between two rows of the record."""
        times = [row.time for row in self.record().rows]
        return max(after - before for before, after in zip(times, times[1:]))

    @unittest.skipIf(os.geteuid(), "only root can mount a small disk")
    def test_a_real_disk_that_is_full_and_then_has_room_again(self):
        self.mount_a_small_disk()
        filler = os.path.join(self.folder, "filler")
        with self.master() as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: len(self.record().rows) >= 1)
            file = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, bytes(4096))
            os.close(file)
            full = lambda: "No space left" in tool.log  # noqa: E731
            self.keep_sending([agent], full)
            self.assertEqual(support.get(tool.page, "/")[0], 200)
            self.assertEqual(tool.log.count("cannot record"), 1)
            os.unlink(filler)
            self.keep_sending([agent], lambda: "again" in tool.log)
            self.assertEqual(tool.log.count("cannot record"), 1)
        self.assertLess(self.longest_hole(), 3)

    @unittest.skipIf(os.geteuid(), "only root can mount a small disk")
    def test_a_real_disk_that_is_read_only_for_a_while_and_a_folder_that_is_removed(
        self,
    ):
        self.mount_a_small_disk()
        remount = ["mount", "-o", "remount,%s", self.folder]
        with self.master() as tool, PlainAgent(tool.port) as agent:
            self.keep_sending([agent], lambda: len(self.record().rows) >= 1)
            subprocess.check_call([word.replace("%s", "ro") for word in remount])
            told = lambda: "Read-only file system" in tool.log  # noqa: E731
            self.keep_sending([agent], told)
            self.assertEqual(support.get(tool.page, "/")[0], 200)
            subprocess.check_call([word.replace("%s", "rw") for word in remount])
            self.keep_sending([agent], lambda: "again" in tool.log)
            self.assertLess(self.longest_hole(), 3)
            subprocess.check_call(["umount", "-l", self.folder])
            os.rmdir(self.folder)
            self.keep_sending([agent], lambda: len(self.record().rows) >= 2)
            self.assertEqual(support.get(tool.page, "/")[0], 200)
            self.assertEqual(list(self.record().nodes), ["c0"])  # its head is there
            self.assertEqual(tool.log.count("cannot record"), 1)
            self.assertEqual(tool.log.count("was gone: made again"), 1)


if __name__ == "__main__":
    unittest.main()
