"""Reports: what a record looks like as a page, a file to mail, CSV, JSON and text."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
import types
import unittest
import unittest.mock
import urllib.parse

import beside
import support
from browser import AXE, HTML_VALIDATE, Browser, axe_on, html_validate

import master_server as master

from test_pages import HOSTILE, Outline, words

load_tests = beside.load_tests  # in a process of its own: it mostly waits

NOW = 1700000000.0
HOUR = 3600.0


def facts(job="4711", **known):
    """What Slurm says of a job."""
    told = dict.fromkeys(master.JOB_KEYS)
    told.update(job=job, raw=job, job_name="train", user="alice", state="COMPLETED")
    told.update(start=NOW, end=NOW + HOUR, limit=4 * HOUR, nodes=2, cpus=8, mem=2.0**34)
    told.update(known)
    return told


def a_record(job="4711", nodes=2, hours=1.0, noise=1, verdicts=(), gap=None, **known):
    """A record of a job whose readings swing, with noise that does not compress."""
    chance = random.Random(noise)
    names = ["c%d" % number for number in range(1, nodes + 1)]
    record = master.Record(job)
    record.add_facts(facts(job, **known), NOW)
    record.nodes = {name: {"job_cpus": 4.0, "job_mem_limit": 2.0**34} for name in names}
    when = NOW
    while when < NOW + hours * HOUR:
        step = master.step_of(when - NOW, nodes)
        when += step
        if gap and gap[0] < when - NOW < gap[1]:
            continue
        values = {}
        for key in master.RECORDED:
            unit = master.UNITS[key]
            top = 100.0 if unit == "%" else 1e10
            wave = 0.5 + 0.4 * math.sin((when - NOW) / 600)
            means = [top * wave * chance.uniform(0.5, 1) for _ in names]
            band = [min(means), sum(means) / nodes, max(means)]
            values[key] = band + means if key in master.BY_NODE else band
        record.rows.append(master.RecordRow(when, float(step), names, values))
    record.verdicts = [dict(verdict) for verdict in verdicts]
    record.end = {"time": when}
    return record.finish()


def verdict(
    severity="problem", what="it leaks", proof="1 GiB a minute", cure="--mem=20G"
):
    return {
        "severity": severity,
        "what": what,
        "proof": proof,
        "cure": cure,
        "rule": "r",
    }


def site(*records):
    """What pages of records know beside the snapshot."""
    known = {record.job: record for record in records}
    archive = types.SimpleNamespace(
        record=known.get,
        sketch=lambda job: known.get(job) and master.make_sketch(known[job]),
        list=lambda: [master.summarize(record) for record in records],
    )
    return types.SimpleNamespace(archive=archive)


def view(*jobs):
    return types.SimpleNamespace(
        time=NOW, jobs=list(jobs), nodes=[], made={"verdicts": {}}, verdicts={}
    )


def render(path, *records, live=(), **query):
    return master.REPORT_ROUTES[path][1](view(*live), query, site(*records))


class Report(unittest.TestCase):
    def test_it_says_how_the_job_went_what_was_found_and_what_was_used(self):
        record = a_record(verdicts=[verdict()], state="OUT_OF_MEMORY", exit="0:125")
        text = words(master.render_report(record))
        for told in (
            "Job 4711 train",
            "Out of memory with exit code 0:125",
            "\u26a0 Problem: it leaks 1 GiB a minute",
            "--mem=20G",
            "CPUs 8 8",
            "16.0 GB",
            "#SBATCH --mem=20G",
            "c1",
            "c2",
        ):
            self.assertIn(told, text)

    def test_it_needs_no_network_no_script_and_no_other_file(self):
        page = master.render_report(a_record(verdicts=[verdict()]))
        outline = Outline(page)
        self.assertNotIn("script", [tag for tag, _ in outline.elements])
        for tag, attributes in outline.elements:
            for name, value in attributes.items():
                if name in ("href", "src", "action", "srcset", "poster"):
                    self.assertTrue(value.startswith("data:"), (tag, name, value[:80]))
                self.assertFalse(name.startswith("on"))
        self.assertNotRegex(page, r"https?://|@import|url\(")
        self.assertIn("@media print", page)
        self.assertIn("prefers-color-scheme: dark", page)

    def test_the_record_in_it_is_read_back(self):
        record = a_record(verdicts=[verdict()])
        record.ranks = [{"node": "c1", "rank": 3, "mem": 1e9}]
        record.gpus = {"c1 0": [(NOW + 9, [97, 3e10, 250, 61])]}
        back = master.record_of_report("4711", master.render_report(record))
        for name in ("facts", "nodes", "verdicts", "ranks", "gpus", "end"):
            self.assertEqual(getattr(back, name), getattr(record, name))
        self.assertEqual(len(back.rows), len(record.rows))
        with self.assertRaises(master.RecordError):
            master.record_of_report("1", "<html>")

    @support.slow("a large record")
    def test_a_day_of_sixteen_nodes_takes_a_mebibyte_at_most(self):
        record = a_record(nodes=16, hours=24)
        page = master.render_report(record)
        self.assertLessEqual(len(page.encode()), 2**20)
        back = master.record_of_report("4711", page)
        self.assertGreater(len(back.rows), 300)
        self.assertEqual(list(back.nodes), list(record.nodes))
        self.assertAlmostEqual(
            master.weighted_mean(back.rows, "cpu"),
            master.weighted_mean(record.rows, "cpu"),
            0,
        )

    def test_no_text_of_a_peer_becomes_markup(self):
        for text in HOSTILE:
            with self.subTest(text):
                record = a_record(
                    job=text,
                    hours=0.1,
                    job_name=text,
                    user=text,
                    reason=text,
                    exit=text,
                    verdicts=[verdict(text, text, text, text), verdict("died", text)],
                )
                record.nodes = {text: {}, text + "2": {}}
                record.ranks = [
                    {"node": text, "program": text, "cpus": text, "state": text}
                ]
                record.gpus = {text: [(NOW, [1, 2, 3, 4])]}
                record.events = [
                    dict(
                        dict.fromkeys(master.EVENT_KEYS),
                        time=NOW,
                        kind=text,
                        node=text,
                        text=text,
                    )
                ]
                for page in (
                    master.render_report(record),
                    render("/record/", record, job=text),
                    render("/jobs", record, q=text, sort=text, state=text),
                    render("/compare", record, a=text, b=text),
                ):
                    outline = Outline(page)
                    tags = {tag for tag, _ in outline.elements}
                    self.assertFalse(tags & {"script", "img", "x"})
                    for _, attributes in outline.elements:
                        self.assertFalse(set(attributes) & {"onerror", "onfocus"})

    def test_its_axes_have_times_and_units(self):
        record = a_record()
        page = master.render_report(record)
        chart = re.search(r"<figure>.*?Job memory.*?</figure>", page, re.S).group()
        texts = re.findall(r"<text[^>]*>(.*?)</text>", chart)
        clock = [text for text in texts if re.fullmatch(r"\d\d:\d\d", text)]
        self.assertGreaterEqual(len(clock), 3)
        self.assertTrue(any("GB" in text for text in texts), texts)
        self.assertIn(time.strftime("%F %R", time.localtime(NOW)), page)

    def test_a_gap_is_a_gap_in_the_curve(self):
        whole = master.make_sketch(a_record()).curves["cpu"]
        broken = master.make_sketch(a_record(gap=(1000, 1300))).curves["cpu"]
        self.assertEqual([len(whole), len(broken)], [1, 2])

    def test_a_chart_keeps_the_least_and_the_most_when_it_gets_coarse(self):
        record = a_record(hours=24)
        record.rows[777].values["cpu"][2] = 100.0
        record.rows[555].values["cpu"][0] = 0.0
        (piece,) = master.make_sketch(record).curves["cpu"]
        self.assertGreater(len(record.rows), 2 * master.CURVE_POINTS)
        self.assertLessEqual(len(piece.times), master.CURVE_POINTS + 1)
        self.assertEqual(max(piece.most), 100)
        self.assertEqual(min(piece.least), 0)
        self.assertEqual({len(column) for column in piece}, {len(piece.times)})

    def test_the_map_shows_each_node_and_nothing_where_nothing_is_known(self):
        record = a_record(nodes=3, gap=(1200, 2400))
        for row in record.rows:
            row.values["cpu"][3 + 1] = 3.0  # c2 idles
            row.values["cpu"][3 + 2] = None  # of c3 nothing is known
            row.values["job_cpu"][3:] = row.values["cpu"][3:]
        sketch = master.make_sketch(record)
        levels = sketch.maps["job_cpu"].levels
        self.assertEqual(set(levels["c2"]), {"0", " "})
        self.assertEqual(levels["c3"], " " * master.MAP_COLUMNS)
        missing = [place for place, level in enumerate(levels["c1"]) if level == " "]
        self.assertTrue(set(range(42, 78)) <= set(missing), missing)
        self.assertLess(len(missing), 45)
        axis = master.Axis(sketch.first, sketch.last)
        drawn = master.draw_map("job_cpu", sketch.maps["job_cpu"], axis)
        self.assertNotIn("h0.0v", drawn)
        self.assertEqual(len(re.findall(r">c\d</text>", drawn)), 3)

    def test_nodes_of_several_files_stay_themselves(self):
        record = master.Record("1")
        for path, names in (("a", ["c1", "c2"]), ("b", ["c3", "c1"])):
            when = NOW if path == "a" else NOW + 500
            lines = [{"nodes": {name: {} for name in names}}]
            cpu = [0, 5, 9] + [float(name[1]) for name in names]
            lines += [
                {"row": when + 10 * n, "step": 10, "cpu": cpu} for n in range(1, 9)
            ]
            record.add(lines, path)
        record.finish()
        rows = {row["node"]: row["cpu"] for row in master.make_sketch(record).nodes}
        self.assertEqual(rows, {"c1": 1, "c2": 2, "c3": 3})

    def test_what_is_unknown_is_a_dash_and_an_empty_record_is_a_page(self):
        record = master.Record("1").finish()
        page = master.render_report(record)
        self.assertIn("Not judged", words(page))
        self.assertNotRegex(words(page), r"\b0\.0 (%|B)")

    def test_a_run_that_was_cut_short_suggests_no_shorter_time(self):
        failed = master.summarize(a_record(state="FAILED"))
        self.assertEqual(master.suggestions(failed), [])
        good = master.summarize(a_record(state="COMPLETED", limit=24 * HOUR))
        self.assertIn("#SBATCH --time=01:30:00", master.suggestions(good))
        late = master.summarize(a_record(state="TIMEOUT", limit=HOUR))
        self.assertIn("#SBATCH --time=02:00:00", master.suggestions(late))

    def test_times_are_written_as_sbatch_takes_them(self):
        for seconds, text in (
            (30, "00:01:00"),
            (3600, "01:00:00"),
            (3700, "01:10:00"),
            (90000, "1-01:00:00"),
        ):
            self.assertEqual(master.slurm_time(seconds), text)

    @unittest.skipUnless(shutil.which("w3m"), "no w3m here")
    def test_a_terminal_browser_shows_the_same_tables(self):
        page = master.render_report(a_record(verdicts=[verdict()]))
        dumped = subprocess.run(
            ["w3m", "-dump", "-T", "text/html", "-cols", "150"],
            input=page.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.decode()
        dumped = re.sub(r"\s+", " ", dumped)
        for told in ("Asked, got, used", "it leaks", "Nodes Node CPUs", "c2 4"):
            self.assertIn(told, dumped)


class Axes(unittest.TestCase):
    def test_marks_are_few_and_at_round_times(self):
        for span in (5, 60, 600, 3600, 5 * HOUR, 26 * HOUR, 8 * 86400, 400 * 86400):
            axis = master.Axis(NOW + 7, NOW + 7 + span)
            marks = list(axis.marks())
            with self.subTest(span):
                self.assertTrue(2 <= len(marks) <= 8, marks)
                self.assertEqual(len({text for _, text in marks}), len(marks), marks)

    def test_times_since_a_start_are_told_as_exactly_as_their_marks_need_it(self):
        for seconds, first, last in (
            (40, "10 s", "40 s"),
            (100, "15 s", "1:30 min"),
            (3600, "10 min", "1:00 h"),
            (2 * 3600, "30 min", "2:00 h"),
            (30 * 3600, "6 h", "30 h"),
            (9 * 86400, "2 d", "8 d"),
        ):
            texts = [text for _, text in master.Axis(0, seconds, False).marks()]
            with self.subTest(seconds):
                self.assertEqual([texts[1], texts[-1]], [first, last])
                self.assertEqual(texts[0], "start")

    def test_a_value_axis_ends_at_a_round_value_at_or_above_the_most(self):
        for most in (1e-9, 0.3, 1, 7, 99, 1023, 1025, 3e9, 7.7e13):
            for key in ("job_mem", "load1", "net_rx"):
                top, step = master.nice_top(key, most)
                with self.subTest((key, most)):
                    self.assertTrue(most <= top * 1.01 <= 12 * most or most < 1e-6)
                    self.assertTrue(1.9 < top / step < 5.1)


class Lists(unittest.TestCase):
    def setUp(self):
        self.records = [
            a_record("9", job_name="=cmd()", state="FAILED", end=NOW + 50),
            a_record("10", user="bob", verdicts=[verdict()]),
            a_record("11", job_name="sweep", verdicts=[verdict("advice", "ask less")]),
        ]

    def jobs(self, **query):
        page = render("/jobs", *self.records, **query)
        Outline(page)
        return re.findall(r'<a href="record/(\w+)">', page)

    def test_jobs_are_sorted_and_filtered(self):
        self.assertEqual(self.jobs(sort="job"), ["9", "10", "11"])
        self.assertEqual(self.jobs(sort="-job"), ["11", "10", "9"])
        self.assertEqual(self.jobs(user="bob"), ["10"])
        self.assertEqual(self.jobs(state="FAILED"), ["9"])
        self.assertEqual(self.jobs(severity="advice"), ["11"])
        self.assertEqual(self.jobs(q="sweep less"), ["11"])
        self.assertEqual(self.jobs(q="nothing"), [])

    def test_a_job_that_runs_now_is_in_the_list_with_its_record_or_without(self):
        live = [facts("10", state="RUNNING", end=None), facts("77", state="PENDING")]
        text = render("/jobs.json", *self.records, live=live)
        states = {job["job"]: job["state"] for job in json.loads(text)["jobs"]}
        self.assertEqual(
            states, {"9": "FAILED", "10": "RUNNING", "11": "COMPLETED", "77": "PENDING"}
        )

    def test_csv_has_a_row_a_job_and_no_formula(self):
        text = render("/jobs.csv", *self.records, sort="job")
        rows = list(csv.DictReader(io.StringIO(text)))
        self.assertEqual([row["job"] for row in rows], ["9", "10", "11"])
        self.assertEqual(rows[0]["job_name"], "'=cmd()")
        self.assertEqual(rows[1]["severity"], "problem")
        self.assertAlmostEqual(float(rows[1]["ran"]), HOUR, delta=15)

    def test_text_has_a_line_a_job_as_the_query_asks_and_is_cut_at_a_width(self):
        text = render("/jobs.txt", *self.records, sort="job")
        heading, *lines = text.splitlines()
        self.assertEqual([line.split()[0] for line in lines], ["9", "10", "11"])
        self.assertIn("Verdict", heading)
        self.assertIn("=cmd()", lines[0])
        self.assertEqual(
            len(render("/jobs.txt", *self.records, q="cmd").split("\n")), 3
        )
        for line in render("/jobs.txt", *self.records, width="20").splitlines():
            self.assertLessEqual(len(line), 20)

    def test_every_link_of_every_page_is_relative(self):
        for page in (
            render("/jobs", *self.records),
            render("/record/", *self.records, job="10"),
            render("/compare", *self.records, a="9", b="10"),
        ):
            for _, attributes in Outline(page).elements:
                for name in ("href", "action", "src"):
                    self.assertFalse((attributes.get(name) or "").startswith("/"))

    def test_an_unknown_job_has_no_page(self):
        self.assertEqual(render("/record/", *self.records, job="1"), "")
        self.assertEqual(render("/api/record/", *self.records, job="1"), "")
        self.assertEqual(render("/compare", *self.records, a="9", b="1"), "")

    def test_two_jobs_are_compared_in_words_on_the_same_axes(self):
        long = a_record("12", hours=3, state="TIMEOUT", end=NOW + 3 * HOUR)
        page = render("/compare", self.records[1], long, a="10", b="12")
        text = words(page)
        self.assertIn("State completed timeout different", text)
        self.assertIn("Ran 1.0 h 3.0 h 3.0 times as much", text)
        self.assertIn("Nodes 2 2 the same", text)
        self.assertIn('class="other"', page)
        self.assertIn(">start</text>", page)
        self.assertRegex(text, r"Job CPU A \d.* %, mean .* %; B \d.* %, mean")
        self.assertIn('<a href="record/12">Job 12 train</a>', page)

    def test_of_what_is_known_of_one_job_alone_it_is_said_of_which(self):
        for row in self.records[0].rows:
            del row.values["gpu"]
        page = render("/compare", *self.records, a="9", b="10")
        self.assertRegex(words(page), r"GPU B \d")
        self.assertNotRegex(words(page), r"GPU A \d")

    def test_a_list_of_jobs_as_text_has_a_line_each(self):
        lines = master.render_jobs_text(
            [master.summarize(record) for record in self.records]
        ).splitlines()
        self.assertEqual(len(lines), 4)
        self.assertIn("Died: failed", lines[1])

    def test_json_of_a_job_has_its_curves(self):
        answer = json.loads(render("/api/record/", *self.records, job="10"))
        self.assertEqual(answer["verdicts"][0]["what"], "it leaks")
        self.assertEqual(len(answer["rows"]), len(self.records[1].rows))
        self.assertEqual(set(answer["nodes_seen"]), {"c1", "c2"})


def a_run(number, peak, ran, state="COMPLETED", node="c1", cpu=50.0):
    """The summary of a run of an array."""
    summary = master.summarize(master.Record("5_%d" % number))
    summary.update(array="5", state=state, peak=peak, ran=ran, names=[node])
    summary.update(job_name="sweep", cpu=cpu, got_cpus=4.0, time=NOW, has_ended=True)
    return summary


def tasks(seed, count=1000):
    """An array of tasks whose sizes are log-normal, with one outlier, and 8 failures on c2."""
    chance = random.Random(seed)
    runs = [
        a_run(
            n, 1e9 * chance.lognormvariate(0, 0.5), 90 * chance.lognormvariate(0, 0.3)
        )
        for n in range(count)
    ]
    runs[7]["peak"] = 3 * max(run["peak"] for run in runs)
    for run in runs[100:108]:
        run.update(state="FAILED", exit="1:0", names=["c2"])
    return runs


class Runs(unittest.TestCase):
    def page(self, runs, **query):
        place = types.SimpleNamespace(archive=types.SimpleNamespace(list=lambda: runs))
        return master.render_runs_page(view(), query, place)

    def test_a_spread_is_that_of_the_values(self):
        values = [run["peak"] for run in tasks(1)]
        spread = master.spread_of(values)
        ordered = sorted(values)
        self.assertEqual(spread.runs, 1000)
        self.assertEqual((spread.least, spread.most), (ordered[0], ordered[-1]))
        self.assertAlmostEqual(spread.median / ordered[500], 1, delta=0.02)
        self.assertAlmostEqual(spread.high / ordered[900], 1, delta=0.02)
        self.assertEqual(sum(spread.bars), 1000)
        self.assertIsNone(master.spread_of([None]))
        self.assertEqual(master.spread_of([3.0]).bars[0], 1)

    def test_advice_covers_nearly_all_of_the_next_thousand(self):
        advice = dict(line.split("=") for line, _ in master.advise(tasks(1)))
        size = advice["#SBATCH --mem"]
        room = int(size[:-1]) * {"M": 2**20, "G": 2**30}[size[-1]]
        hours, minutes, _ = advice["#SBATCH --time"].split(":")
        limit = 3600 * int(hours) + 60 * int(minutes)
        again = tasks(2)
        fits = sum(run["peak"] <= room and run["ran"] <= limit for run in again)
        self.assertGreaterEqual(fits, 995)
        self.assertLess(room, 0.5 * max(run["peak"] for run in tasks(1)))

    def test_two_runs_are_too_few_for_advice_and_killed_ones_are_none(self):
        few = [a_run(n, 1e9, 60) for n in range(2)]
        few += [a_run(9, 1e9, 60, state="OUT_OF_MEMORY")]
        self.assertEqual(master.advise(few), [])
        self.assertIn("takes 3 runs", self.page(few, array="5"))
        self.assertTrue(master.advise(few + [a_run(3, 1e9, 60)]))

    def test_fewer_cpus_are_advised_only_where_they_were_idle(self):
        def cpus(busy):
            runs = [a_run(n, 1e9, 60, cpu=busy) for n in range(5)]
            lines = [line for line, _ in master.advise(runs)]
            return [line for line in lines if "cpus" in line]

        self.assertEqual(cpus(99.0), [])
        self.assertEqual(cpus(25.5), ["#SBATCH --cpus-per-task=1"])
        self.assertEqual(cpus(49.0), ["#SBATCH --cpus-per-task=2"])

    def test_failures_are_counted_by_cause_and_node(self):
        (row,) = master.failure_rows(tasks(1))
        self.assertEqual((row["cause"], row["count"]), ("failed, exit code 1:0", 8))
        self.assertEqual(row["where"], "8 on c2")

    def test_the_page_tells_of_the_runs_that_are_asked_for(self):
        runs = tasks(1) + [dict(a_run(1, 1e9, 5), job="6", array="6", job_name="other")]
        text = words(self.page(runs, array="5"))
        self.assertIn("1000 runs: 992 completed, 8 failed", text)
        self.assertIn("M: would have sufficed for", text)
        self.assertIn("The first 500 of these jobs", text)
        self.assertIn("1 run:", words(self.page(runs, name="other")))
        self.assertEqual(self.page(runs, name="none"), "")
        self.assertEqual(self.page(runs), "")


class Tools(unittest.TestCase):
    """--explain and --jobs, without a master."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for job, known in (
            ("1", {"verdicts": [verdict("fine", "fine", "", "")]}),
            ("2", {"verdicts": [verdict("advice")]}),
            ("3", {"verdicts": [verdict("problem")]}),
            ("4_7", {"verdicts": [verdict("died")], "state": "OUT_OF_MEMORY"}),
            ("5", {"state": "TIMEOUT"}),
        ):
            path = os.path.join(self.folder, master.safe_name(job) + ".h-1-1.jsonl")
            with open(path, "wb") as file:
                file.write(b"".join(a_record(job, **known).lines()))

    def explain(self, job, *flags):
        argv = ["--record", self.folder, "--explain", job, *flags]
        with contextlib.redirect_stdout(
            io.StringIO()
        ) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = master.main(argv)
        return code, out.getvalue(), errors.getvalue()

    def test_the_exit_code_is_the_verdict(self):
        for job, code in (("1", 0), ("2", 1), ("3", 2), ("4_7", 3), ("5", 3)):
            with self.subTest(job):
                self.assertEqual(self.explain(job)[0], code)

    def test_it_says_what_and_why_and_the_line_to_paste(self):
        _, text, _ = self.explain("3")
        self.assertIn("Problem: it leaks", text)
        self.assertIn("1 GiB a minute", text)
        self.assertIn("-> --mem=20G", text)

    def test_for_programs_it_is_one_line_of_json(self):
        code, text, _ = self.explain("4_7", "--json")
        answer = json.loads(text)
        self.assertEqual(code, 3)
        self.assertEqual((answer["code"], answer["severity"]), (3, "died"))
        self.assertEqual(answer["verdicts"][0]["cure"], "--mem=20G")

    def test_an_unknown_job_is_one_line_and_a_code_of_its_own(self):
        for job in ("99", "../../etc/passwd", "x" * 500, ""):
            code, text, errors = self.explain(job) if job else (4, "", "error: \n")
            with self.subTest(job):
                self.assertEqual((code, text), (master.EXIT_UNKNOWN, ""))
                self.assertEqual(errors.count("\n"), 1)
                self.assertTrue(errors.startswith("error: "))

    def test_json_without_explain_is_bad_usage(self):
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(
            io.StringIO()
        ):
            master.main(["--json"])
        self.assertEqual(caught.exception.code, 2)

    def test_the_reader_lists_the_jobs(self):
        done = support.run("test_reader.py", "--jobs", "--record", self.folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(len(done.stdout.splitlines()), 6)
        done = support.run(
            "test_reader.py", "--jobs", "--json", "--record", self.folder
        )
        jobs = {job["job"]: job for job in json.loads(done.stdout)["jobs"]}
        self.assertEqual(set(jobs), {"1", "2", "3", "4_7", "5"})

    def test_the_reader_says_where_it_looked(self):
        missing = os.path.join(self.folder, "none")
        done = support.run("test_reader.py", "--jobs", "--record", missing)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn(missing, done.stderr)


class Served(unittest.TestCase):
    """A real dashboard."""

    def test_past_and_present_jobs_are_served_with_a_policy_that_fits(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "1.h-1-1.jsonl"), "wb") as file:
                file.write(b"".join(a_record("1", verdicts=[verdict()]).lines()))
            with support.start_master("--record", folder) as tool:
                for path in ("/jobs", "/record/1", "/job/1", "/compare?a=1&b=1"):
                    answer = support.get(tool.page, path)
                    self.assertEqual(answer[0], 200, path)
                    style = re.search("<style>(.*?)</style>", answer[2], re.S).group(1)
                    digest = hashlib.sha256(style.encode()).digest()
                    policy = answer[1]["Content-Security-Policy"]
                    self.assertIn(base64.b64encode(digest).decode(), policy)
                    self.assertIn("default-src 'none'", policy)
                self.assertEqual(support.get(tool.page, "/record/2")[0], 404)
                self.assertEqual(support.get(tool.page, "/api/job/1")[0], 200)
                hostile = urllib.parse.quote("../1\0", "")
                self.assertEqual(support.get(tool.page, "/record/" + hostile)[0], 404)
                os.mkfifo(os.path.join(folder, "7.h-1-1.jsonl"))  # a disk that hangs
                began = time.monotonic()
                self.assertEqual(support.get(tool.page, "/record/7")[0], 503)
                self.assertEqual(support.get(tool.page, "/jobs")[0], 503)
                self.assertEqual(support.get(tool.page, "/")[0], 200)
                self.assertLess(time.monotonic() - began, support.PATIENCE)

    def test_a_page_is_rendered_once_as_long_as_its_record_stays_the_same(self):
        dashboard = master.Dashboard.__new__(master.Dashboard)
        dashboard.lock = contextlib.nullcontext()
        dashboard.reports = {}
        dashboard.fresh = view
        files = [1]
        dashboard.archive = types.SimpleNamespace(files=lambda jobs: list(files))
        made = []

        def draw(*_):
            made.append(1)
            return "page"

        with unittest.mock.patch.dict(master.REPORT_ROUTES, {"/jobs": ("t", draw)}):
            for _ in range(3):
                dashboard.answer_report("/jobs", {}, {}, {})
            self.assertEqual(len(made), 1)
            files.append(2)
            dashboard.answer_report("/jobs", {}, {}, {})
            self.assertEqual(len(made), 2)


# (dark, the window): in the fast run the narrow one alone
LOOKS = (True, (390, 844)), (False, (1280, 800))
LOOKS = LOOKS if support.LONG else LOOKS[:1]


class InBrowser(unittest.TestCase):
    """The pages in Chromium: served ones, and a report from a file."""

    paths = (
        "/jobs",
        "/record/1",
        "/compare?a=1&b=2",
        "/compare?a=1",
        "/runs?name=train",
    )

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for job in ("1", "2", "3"):
            record = a_record(job, nodes=3, verdicts=[verdict(), verdict("advice")])
            record.ranks = [{"node": "c1", "rank": 3, "mem": 1e9, "program": "a"}]
            record.gpus = {"c1 0": [(NOW, [97, 3e10, 250, 61])]}
            with open(os.path.join(self.folder, job + ".h-1-1.jsonl"), "wb") as file:
                file.write(b"".join(record.lines()))
        self.report = os.path.join(self.folder, "1.html")
        with open(self.report, "w") as file:
            file.write(master.render_report(record))

    @support.requires("chromium", "chromedriver", AXE)
    def test_axe_finds_nothing_and_no_page_is_wider_than_the_window(self):
        flags = ("--record", self.folder)
        with support.start_master(*flags) as tool, Browser() as browser:
            pages = ["http://localhost:%d%s" % (tool.page, path) for path in self.paths]
            for dark, size in LOOKS:
                browser.show_as(*size, dark=dark)
                for page in [*pages, "file://" + self.report]:
                    with self.subTest((page, dark)):
                        browser.open(page)
                        self.assertEqual(axe_on(browser), [])
                        wide = (
                            "return document.documentElement.scrollWidth - innerWidth"
                        )
                        self.assertLessEqual(browser.run(wide), 0)

    @support.requires("chromium", "chromedriver")
    def test_it_prints_on_a_few_pages_of_a4_without_a_network(self):
        record = a_record(nodes=16, hours=24, verdicts=[verdict()])
        with open(self.report, "w") as file:
            file.write(master.render_report(record))
        with Browser() as browser:
            browser.go_offline()
            browser.open("file://" + self.report)
            flags = {"preferCSSPageSize": True, "printBackground": True}
            printed = base64.b64decode(browser.cdp("Page.printToPDF", **flags)["data"])
            self.assertEqual(browser.messages(), [])
        boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed)
        for width, height in boxes:  # points, of which an inch has 72
            self.assertAlmostEqual(float(width) / 72 * 25.4, 210, delta=0.5)
            self.assertAlmostEqual(float(height) / 72 * 25.4, 297, delta=0.5)
        self.assertTrue(2 <= len(boxes) <= 4, len(boxes))

    @support.requires("node", HTML_VALIDATE)
    def test_html_validate_finds_nothing(self):
        with support.start_master("--record", self.folder) as tool:
            pages = [support.get(tool.page, path).text for path in self.paths]
        with open(self.report, encoding="utf-8") as file:
            pages.append(file.read())
        self.assertEqual(html_validate(pages), (0, ""))


class Costs(unittest.TestCase):
    @support.slow("it writes a thousand records")
    def test_a_thousand_records_are_listed_in_a_tenth_of_a_second(self):
        with tempfile.TemporaryDirectory() as folder:
            for number in range(1000):
                path = os.path.join(folder, "%d.h-1-1.jsonl" % number)
                record = a_record(str(number), hours=0.05)
                with open(path, "wb") as file:
                    file.write(b"".join(record.lines()))
                master.pack(path, str(number), "m")
            archive = master.Archive(folder, seconds=60)
            self.assertEqual(len(archive.list()), 1000)
            place = types.SimpleNamespace(archive=archive)
            spent = []
            for _ in range(20):
                began = time.process_time()
                master.render_jobs_page(view(), {}, place)
                spent.append(time.process_time() - began)
            self.assertLess(sorted(spent)[len(spent) // 2], 0.1)


if __name__ == "__main__":
    unittest.main()
