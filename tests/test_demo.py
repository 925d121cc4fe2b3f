"""--demo: invented jobs that live, end and begin again, and that nobody can take for real ones."""

import contextlib
import json
import math
import os
import re
import signal
import tempfile
import unittest
from unittest import mock

import beside
import support
from support import (
    descendants,
    eventually,
    events,
    get,
    nodes,
    page_text,
    row_of,
    start_master,
)

import master_server as master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

NOTICE = "A demonstration: all of these jobs and nodes are invented"
NAMES = {name for job in master.DEMO_JOBS for name in job.nodes}
# the same in a few seconds instead of hours
QUICK = """
master_server.DEMO_INTERVAL = 0.1
master_server.DEMO_PAUSE = 1.0
master_server.DEMO_SILENCE = (0.0, 0.0)
master_server.DEMO_JOBS = tuple(
    job._replace(seconds=3.0, age=0.0, again=0.0) for job in master_server.DEMO_JOBS
)
"""
SILENT = """
master_server.DEMO_INTERVAL = 0.1
master_server.DEMO_SILENCE = (2.0, 6.0)
"""


def jobs(page):
    """{id: state} of /api/jobs."""
    answer = json.loads(get(page, "/api/jobs").text)
    return {job["job"]: job["state"] for job in answer["jobs"]}


class Invented(unittest.TestCase):
    """The readings and facts themselves."""

    def moments(self):
        """Every job's runs over more than a day."""
        began = 1.8e9
        for job in master.DEMO_JOBS:
            for second in range(0, 100000, 97 if support.LONG else 397):
                now = began + second
                yield job, master.demo_run(job, began, now), now

    def test_every_sample_and_every_part_is_one_that_the_wire_takes(self):
        for job, run, now in self.moments():
            for name in job.nodes:
                sample = master.demo_sample(job, name, run, now)
                row = master.check_sample(self.over_the_wire(sample))
                for metric, value in zip(master.METRICS, row):
                    if metric.unit == "%" and not math.isnan(value):
                        self.assertTrue(0 <= value <= 100, (metric.key, value))
                self.assertGreater(sample["job_time_left"], 0)
        for part in master.demo_parts(job, name, run, now, 7):
            self.assertEqual(self.over_the_wire(part), part)
            self.assertEqual(part["look"], 7)

    def test_every_reading_that_the_page_can_show_is_sent_by_some_node(self):
        began = 1.8e9
        sent = set()
        parts = {kind: set() for kind in master.PART_FIELDS}
        for job in master.DEMO_JOBS:
            run = master.demo_run(job, began, began)
            for name in job.nodes:
                sent.update(master.demo_sample(job, name, run, began))
                for part in master.demo_parts(job, name, run, began, 1):
                    parts[part["part"]].update(part)
        self.assertEqual({metric.key for metric in master.METRICS} - sent, set())
        for kind, fields in master.PART_FIELDS.items():
            left_out = {key for key, _ in fields} - parts[kind]
            self.assertLessEqual(left_out, {"mig", "error"}, kind)

    def test_jobs_that_ended_lately_are_told_too(self):
        began = 1.8e9
        told = {}
        for job in master.DEMO_JOBS:
            for run in master.demo_ended(job, began, began):
                facts = master.demo_facts(job, run)
                master.check_job(facts)
                self.assertLess(facts["end"], began)
                told[facts["job"]] = facts["state"]
        self.assertEqual(told["47217"], "COMPLETED")  # with more memory than before
        self.assertEqual(told["47213"], "COMPLETED")
        tasks = [name for name in told if name.startswith("48300_")]
        self.assertEqual(tasks, ["48300_4", "48300_3", "48300_2", "48300_1"])
        self.assertNotIn("47211", told)  # it ended hours ago

    def over_the_wire(self, message):
        """What the collector reads of it."""
        data = master.write_sample(message)
        parsed, size, _ = master.parse_pickle(data)
        self.assertEqual(size, len(data))
        self.assertEqual(parsed, message)
        return parsed

    def test_a_job_ends_in_its_own_way_and_the_next_one_has_another_id(self):
        began = 1.8e9
        for job in master.DEMO_JOBS:
            ids = {}
            for second in range(0, 40000, 10):
                run = master.demo_run(job, began, began + second)
                facts = master.demo_facts(job, run)
                master.check_job(facts)
                ids.setdefault(facts["job"], []).append(facts)
            self.assertGreaterEqual(len(ids), 2, job.name)
            for told in list(ids.values())[:-1]:
                states = [facts["state"] for facts in told]
                ending = states[-1]
                self.assertIn(ending, {job.ending, "COMPLETED"})
                self.assertEqual(len({facts["start"] for facts in told}), 1)
                self.assertEqual("".join(states).count("RUNNING" + ending), 1)

    def test_memory_is_full_just_before_a_job_dies_of_it(self):
        (job,) = [job for job in master.DEMO_JOBS if job.ending == "OUT_OF_MEMORY"]
        run = master.demo_run(job, 1.8e9, 1.8e9 + job.seconds - job.age - 1)
        self.assertFalse(run.is_over)
        self.assertGreater(master.demo_sample(job, "c21", run, 0.0)["job_ram"], 98)

    def test_the_job_that_died_runs_well_with_more_memory_and_deaths_stay_few(self):
        (job,) = [job for job in master.DEMO_JOBS if job.ending == "OUT_OF_MEMORY"]
        day = 86400
        runs = {}
        for second in range(0, day, 10):
            run = master.demo_run(job, 1.8e9, 1.8e9 + second)
            runs[run.number] = run
        ended = [run for run in runs.values() if run.is_over]
        died = [run for run in ended if run.ending == job.ending]
        self.assertIn(len(died), range(15, day // 3600))
        for run in ended[1::2]:
            self.assertEqual(run.ending, "COMPLETED")
            self.assertGreater(run.memory, job.memory)
            used = master.demo_sample(job, "c21", run, 0.0)["job_ram"]
            self.assertLess(used, 90)

    def test_an_array_has_as_many_tasks_from_its_first_to_its_last(self):
        (job,) = [job for job in master.DEMO_JOBS if job.array]
        began = 1.8e9
        arrays = set()
        for second in range(0, 86400, 100):
            now = began + second
            run = master.demo_run(job, began, now)
            array, task = master.demo_task(job, run)
            arrays.add(array)
            waiting = [
                master.tasks_in(facts["job"])[0]
                for facts in master.demo_waiting(began, now)
                if facts.get("array") == str(array)
            ]
            self.assertEqual(task + sum(waiting), master.DEMO_TASKS)
            self.assertEqual(master.demo_facts(job, run)["array"], str(array))
        self.assertGreater(len(arrays), 3)


class Shown(support.MasterTest):
    """The real master: what a person sees who has just started it."""

    flags = ("--demo",)

    def test_page_and_log_say_that_all_of_it_is_invented(self):
        eventually(lambda: {row["node"] for row in nodes(self.master.page)} == NAMES)
        for path in ("/", "/node/c01", "/job/48211", "/jobs"):
            self.assertIn(NOTICE, page_text(self.master.page, path))
        self.assertIn(NOTICE, self.master.log)
        for row in nodes(self.master.page):
            self.assertEqual((row["user"], row["version"]), ("demo", "demo"))

    def test_jobs_run_and_wait_and_a_node_idles(self):
        page = self.master.page
        eventually(lambda: list(jobs(page).values()).count("RUNNING") == 4)
        self.assertEqual(list(jobs(page).values()).count("PENDING"), 2)
        eventually(lambda: "c03 \u26a0 idle" in page_text(page).replace("\xa0", " "))
        before = row_of(page, node="c01")["cpu"]
        eventually(lambda: row_of(page, node="c01")["cpu"] != before)

    def test_what_was_before_is_known_from_the_first_look_on(self):
        page = self.master.page
        eventually(lambda: len(nodes(page)) == len(NAMES))

        def words():
            answer = json.loads(get(page, "/api/jobs").text)
            return " ".join(
                verdict["what"]
                for job in answer["jobs"]
                for verdict in job["verdicts"] or ()
            )

        eventually(lambda: "idle for 15 min" in words())
        self.assertIn("memory of c21 grows steadily", words())
        figures = re.findall(r'data-values="([^"]*)"', get(page, "/node/c01").text)
        self.assertGreater(len(figures), 25)
        self.assertGreater(min(len(figure.split()) for figure in figures), 50)

        def record():
            return json.loads(get(page, "/api/record/48211").text)

        eventually(lambda: len(record()["rows"]) > 50)
        self.assertEqual(record()["gaps"], [])

    def test_facts_are_told_when_they_change_and_not_each_time(self):
        began = 1.8e9
        told = []
        for second in (0.1, 2.23, 4.7):
            facts = master.demo_waiting(began, began + second)
            for job in master.DEMO_JOBS:
                run = master.demo_run(job, began, began + second)
                facts.append(master.demo_facts(job, run))
            told.append(facts)
        self.assertEqual(told[0], told[1])
        self.assertEqual(told[0], told[2])

    def test_without_the_flag_nothing_is_invented(self):
        with start_master() as real:
            self.assertNotIn("demonstration", page_text(real.page).lower())
            self.assertNotIn("demo", real.log)
            self.assertEqual(nodes(real.page), [])


class Records(unittest.TestCase):
    def test_they_are_nobody_elses_and_gone_with_the_demonstration(self):
        with tempfile.TemporaryDirectory() as home:
            folder = os.path.join(home, ".sentinel", "jobs")
            os.makedirs(folder)
            with open(os.path.join(folder, "7.other-1-1.jsonl"), "w") as file:
                file.write('{"sentinel": 1, "job": {"job": "7"}, "time": 1}\n')
            for flags in ((), ("--no-record",)):
                with start_master(
                    "--demo", *flags, env={"HOME": home, "TMPDIR": home}
                ) as tool:
                    eventually(lambda: "48211" in page_text(tool.page, "/jobs"))
                    self.assertNotIn(" 7 ", page_text(tool.page, "/jobs"))
                    own = [
                        n for n in os.listdir(home) if n.startswith("sentinel-demo-")
                    ]
                    self.assertEqual(len(own), 1)
                    self.assertEqual(tool.stop(), 0)
                self.assertEqual(os.listdir(home), [".sentinel"])
            self.assertEqual(os.listdir(folder), ["7.other-1-1.jsonl"])

    def test_without_room_for_them_it_says_what_names_another_place(self):
        full = OSError(28, "No space left on device")
        with mock.patch.object(
            tempfile, "mkdtemp", side_effect=full
        ), self.assertRaisesRegex(master.StartError, "No space left.*--record"):
            master.make_demo_folder(contextlib.ExitStack())


class Alive(unittest.TestCase):
    def test_jobs_end_and_others_begin(self):
        with start_master("--demo", patch=QUICK) as tool:
            eventually(lambda: jobs(tool.page).get("48217") == "OUT_OF_MEMORY")
            eventually(lambda: jobs(tool.page).get("48211") == "COMPLETED")
            eventually(lambda: jobs(tool.page).get("49217") == "RUNNING")
            eventually(lambda: jobs(tool.page).get("48300_6") == "RUNNING")
            finished = {event["node"] for event in events(tool.page, "finished")}
            self.assertEqual(finished, NAMES)
            self.assertEqual(events(tool.page, "lost"), [])
            self.assertEqual(tool.stop(), 0)
            self.assertNotIn("Traceback", tool.log)

    def test_a_node_falls_silent_and_comes_back(self):
        with start_master("--demo", "--timeout", 1, patch=SILENT) as tool:
            lost = eventually(lambda: events(tool.page, "lost"))
            self.assertEqual({event["node"] for event in lost}, {"c12"})
            eventually(lambda: row_of(tool.page, node="c12"))
            back = [e for e in events(tool.page, "resolved") if e["node"] == "c12"]
            self.assertIn("back after", back[-1]["text"])

    def test_it_survives_the_end_of_any_role_and_ends_with_the_master(self):
        with start_master("--demo", patch="master_server.DEMO_INTERVAL = 0.2") as tool:
            eventually(lambda: len(nodes(tool.page)) == len(NAMES))
            for role in ("demo", "collector", "dashboard"):
                pids = re.findall(role + r" started, pid (\d+)", tool.log)
                os.kill(int(pids[-1]), signal.SIGKILL)
                tool.logged(role + " ended")
                eventually(
                    lambda: (
                        len(nodes(tool.page)) == len(NAMES)
                        and all(row["age"] < 2 for row in nodes(tool.page))
                    ),
                    what=role,
                )
                eventually(lambda: len(jobs(tool.page)) >= 6, what=role)
            family = descendants(tool.pid)
            self.assertEqual(tool.stop(), 0)
            eventually(lambda: not any(map(support.alive, family)))

    def test_it_knows_the_secret(self):
        with tempfile.TemporaryDirectory() as folder:
            secret = os.path.join(folder, "secret")
            with start_master("--demo", "--secret-file", secret) as tool:
                eventually(lambda: len(nodes(tool.page)) == len(NAMES))
                eventually(lambda: len(jobs(tool.page)) >= 6)
                self.assertNotIn("refused", tool.log)

    def test_real_nodes_are_never_shown_beside_invented_ones(self):
        for flags in (["--my-jobs"], ["--ssh", "login"], ["--with-agent"]):
            done = support.run("master_server.py", "--demo", *flags)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertIn("--demo: not allowed", done.stderr)


if __name__ == "__main__":
    unittest.main()
