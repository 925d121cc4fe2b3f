"""How pages of records read: one line a job, words instead of dashes, curves of what was said."""

import glob
import json
import os
import re
import tempfile
import time
import unittest
import unittest.mock
import urllib.parse

import beside
import support
from browser import Browser
from support import eventually, get, page_text, start_master

import master_server as master

from test_pages import Outline, words
from test_reports import HOUR, NOW, a_record, a_run, facts, render, site, verdict, view

load_tests = beside.load_tests  # in a process of its own: it mostly waits


def unwatched(job="8", **known):
    """The record of a job of which only Slurm told."""
    told = {"state": "OUT_OF_MEMORY", "exit": "0:125", "mem": 192 * 2.0**30, **known}
    record = master.Record(job)
    record.add_facts(facts(job, **told), NOW)
    record.end = {"time": NOW + HOUR}
    return record.finish()


def cells(page, job):
    """What the row of a job says, by the headings of its table."""
    table = re.search(r'<section id="jobs".*?</section>', page, re.S).group()
    heads = [words(head) for head in re.findall(r"<th .*?</th>", table)]
    for row in re.findall(r"<tr id=.*?</tr>", table, re.S):
        texts = [words(cell) for cell in re.findall(r"<td.*?</td>", row, re.S)]
        if job in texts:
            return dict(zip(heads, texts))
    return None


class ListOfJobs(unittest.TestCase):
    def jobs(self, *records, live=(), **query):
        return re.findall(
            r'href="record/(\w+)"', render("/jobs", *records, live=live, **query)
        )

    def test_a_time_is_as_short_as_it_is_clear_and_its_title_has_all_of_it(self):
        now = time.mktime((2026, 11, 29, 12, 0, 0, 0, 0, -1))
        for back, text in (
            (HOUR, "11:00"),
            (14 * HOUR, "28 Nov 22:00"),
            (400 * 24 * HOUR, "2025-10-25"),
        ):
            self.assertEqual(master.short_date(now - back, now), text)
        page = render("/jobs", a_record("4"))
        full = time.strftime("%F %R", time.localtime(NOW + HOUR))
        self.assertIn('title="ended %s"' % full, page)

    def test_a_verdict_in_a_line_reads_well(self):
        for state, reason, found, end in (
            ("PENDING", "JobArrayTaskLimit", None, "JobArrayTaskLimit"),
            ("RUNNING", None, [verdict("fine", "fine so far")], "so far"),
            ("RUNNING", None, [verdict("fine", "fine")], "\u2713 Fine"),
        ):
            summary = dict(
                dict.fromkeys(master.JOB_KEYS),
                state=state,
                reason=reason,
                verdicts=found,
            )
            text = master.verdict_words(summary)
            self.assertTrue(text.endswith(end), text)
            self.assertNotIn("Fine: fine", text)

    def test_figures_are_told_as_what_was_used_of_what_was_asked(self):
        record = a_record("4", gpus=8)
        row = cells(render("/jobs", record), "4")
        self.assertRegex(row["CPUs"], r"^\d+ % of 8$")
        self.assertRegex(row["GPUs"], r"^\d+ % of 8$")
        self.assertRegex(row["Memory"], r"^[\d.]+ of 16 G")
        self.assertEqual(row["Time"], "1:00 of 4:00 h")
        self.assertNotIn("User", row)
        other = a_record("5", user="bob")
        self.assertEqual(cells(render("/jobs", record, other), "5")["User"], "bob")

    def test_what_needs_the_user_comes_first_then_what_runs_then_the_newest(self):
        def ended(job, back, **known):
            return a_record(job, hours=0.1, end=time.time() - back, **known)

        records = [
            ended("old", 40 * 24 * HOUR, state="FAILED"),
            ended("fine", 60, verdicts=[verdict("fine", "fine")]),
            ended("later", 30, verdicts=[]),
            ended("died", 2 * HOUR, state="TIMEOUT"),
        ]
        live = [
            facts("b", state="RUNNING", start=NOW, end=None),
            facts("a", state="RUNNING", start=NOW + 5, end=None),
        ]
        order = ["died", "a", "b", "later", "fine", "old"]
        self.assertEqual(self.jobs(*records, live=live), order)
        self.assertEqual(self.jobs(*records[::-1], live=live[::-1]), order)

    def test_a_job_that_runs_has_the_verdict_of_the_overview_without_any_record(self):
        live = facts("77", state="RUNNING", end=None)
        told = dict(verdict("problem", "it leaks"), rule="memory_grows")
        shown = view(live)
        shown.made["verdicts"] = {"77": [told]}
        row = cells(master.render_jobs_page(shown, {}, site()), "77")
        self.assertEqual(row["Verdict"].replace("\xa0", " "), "\u26a0 problem")
        self.assertEqual(row["What"], "it leaks")
        shown.made["verdicts"] = {}
        idle = {"slot": 1, "job": "77", "node": "c1", "address": "", "alerts": None}
        shown.nodes = [
            dict(idle, job_cpu=load, cpu=load, node="c%d" % number)
            for number, load in enumerate((90.0, 90.0, 1.0))
        ]
        row = cells(master.render_jobs_page(shown, {}, site()), "77")
        self.assertEqual((row["Verdict"][-6:], row["What"]), ("advice", "c2 idle"))

    def test_why_there_is_no_verdict_is_said_in_words(self):
        live = facts("77", state="PENDING", reason="Priority", start=None, end=None)
        page = render("/jobs", unwatched("8", state="COMPLETED"), live=[live])
        self.assertEqual(cells(page, "8")["What"], "nobody watched it")
        reason = master.remarks(live)[0]
        self.assertEqual(cells(page, "77")["What"], reason)
        running = facts("78", state="RUNNING", end=None)
        page = render("/jobs", live=[running])
        self.assertEqual(cells(page, "78")["What"], "no verdict yet")
        self.assertNotIn("Not judged", page)

    def test_it_says_as_of_when_it_is_and_counts_in_words(self):
        text = words(render("/jobs", unwatched()))
        self.assertRegex(
            text, r"1 job: 1 died; 1 out of memory\. As of \d\d:\d\d; this page"
        )
        self.assertIn("No job matches", words(render("/jobs", unwatched(), q="zz")))

    def test_a_dead_run_of_a_job_that_runs_again_is_not_its_verdict(self):
        record = a_record("4", state="RUNNING", verdicts=[verdict("died")])
        live = facts("4", state="RUNNING", end=None)
        row = cells(render("/jobs", record, live=[live]), "4")
        self.assertEqual(row["Verdict"], "-")


class NobodyWatched(unittest.TestCase):
    def test_the_page_says_so_and_what_slurm_alone_says(self):
        text = words(render("/record/", unwatched(), job="8"))
        self.assertIn("Nobody watched this job", text)
        self.assertIn("#SBATCH --mem=231G", text)
        self.assertIn("rests on one run that nobody watched", text)
        self.assertNotIn(" Got ", text)  # a column of dashes
        self.assertNotIn(
            "Nobody watched", words(render("/record/", a_record("4"), job="4"))
        )

    def test_no_line_to_paste_lacks_its_number(self):
        record = unwatched()
        record.verdicts = [verdict("died", "out of memory", "", "--mem")]
        self.assertNotIn("\u2192", words(render("/record/", record, job="8")))
        self.assertNotIn("->", master.explain_text(record))
        record.verdicts = [verdict("died", "out of memory", "", "--mem=9G")]
        self.assertIn("\u2192 --mem=9G", words(render("/record/", record, job="8")))


class Curves(unittest.TestCase):
    def charts(self, record):
        page = master.render_report(record)
        over = page[page.index("Over time") : page.index("<h2>Node by node")]
        return re.findall(r"<figcaption>(.*?) <b>", over), over

    def test_what_the_verdict_is_about_comes_first(self):
        usual, _ = self.charts(a_record())
        self.assertEqual(
            usual[:4], [master.NUMBERS[key].label for key in master.CHARTED[:4]]
        )
        for rule, key in (
            ("out_of_memory", "job_mem"),
            ("idle_gpus", "gpu"),
            ("waits_for_io", "psi_io"),
        ):
            found = dict(verdict(), rule=rule)
            labels, _ = self.charts(a_record(verdicts=[found]))
            self.assertEqual(labels[0], master.NUMBERS[key].label, rule)
            self.assertEqual(sorted(labels), sorted(usual))

    def test_the_end_and_the_limit_are_labelled(self):
        record = a_record(state="OUT_OF_MEMORY")
        at = time.strftime("%R", time.localtime(NOW + HOUR))
        _, page = self.charts(record)
        self.assertIn(">died %s</text>" % at, page)
        self.assertRegex(page, r">limit 16\.0 G\w+</text>")
        _, page = self.charts(a_record(end=NOW + HOUR))
        self.assertIn(">ended %s</text>" % at, page)
        running = a_record(state="RUNNING", end=None)
        running.end = None
        self.assertNotRegex(self.charts(running)[1], ">(ended|died) ")

    def test_the_axis_begins_where_watching_began_and_that_is_said(self):
        record = a_record(start=NOW - 9 * HOUR, state="RUNNING", end=None)
        self.assertEqual(record.watched[0], NOW)
        self.assertEqual(record.span[0], NOW - 9 * HOUR)
        text = words(master.render_report(record))
        started = time.strftime("%F %R", time.localtime(NOW - 9 * HOUR))
        self.assertIn("had started on " + started, text)
        self.assertNotIn("had started on", words(master.render_report(a_record())))

    def test_what_is_always_zero_is_a_sentence_and_no_chart(self):
        record = a_record()
        for row in record.rows:
            row.values["swap"] = [0.0, 0.0, 0.0]
        labels, page = self.charts(record)
        self.assertNotIn("Swap", labels)
        self.assertIn("Always 0: Swap.", page)


class Compared(unittest.TestCase):
    def test_who_was_not_watched_is_named_and_the_limit_is_slurms(self):
        text = words(render("/compare", unwatched(), a_record("9"), a="8", b="9"))
        self.assertIn("A was not watched", text)
        self.assertNotIn("full line", text)
        self.assertRegex(text, r"Memory limit of a node 192\.0 G\w+ 16\.0 G")
        text = words(render("/compare", unwatched(), unwatched("9"), a="8", b="9"))
        self.assertIn("Neither was watched", text)

    def test_the_axis_begins_at_each_start_however_late_it_was_watched(self):
        late = a_record("8", start=NOW - 9 * HOUR, job_name="late")
        page = render("/compare", late, a_record("9"), a="8", b="9")
        begins = [
            float(x) for x in re.findall(r'<path class="band[^"]*" d="M([\d.]+) ', page)
        ]
        width = master.CHART_RIGHT - master.CHART_LEFT
        self.assertAlmostEqual(begins[0], master.CHART_LEFT + 0.9 * width, delta=2)
        self.assertAlmostEqual(begins[1], master.CHART_LEFT, delta=2)

    def test_without_both_ids_there_are_lists_to_choose_from(self):
        records = [a_record("5", job_name="other"), a_record("6"), a_record("7")]
        page = render("/compare", *records, a="6")
        Outline(page)
        lists = re.findall(r"<select.*?</select>", page, re.S)
        first, second = [
            re.findall(r'value="(\d)"( selected)?', each) for each in lists
        ]
        self.assertEqual(first[0], ("6", " selected"))
        self.assertEqual([job for job, _ in second], ["7", "5"])  # of its name first
        self.assertIn('name="id"', page)
        page = render("/compare", *records)
        self.assertIn("/compare?a=ID", words(page))
        first, second = re.findall(r"<select.*?</select>", page, re.S)
        shown = re.findall(r'value="(\d)" selected', second)
        self.assertEqual(len(shown), 1)  # no job is compared with itself
        self.assertNotEqual(re.findall(r'value="(\d)"', first)[0], shown[0])


class ManyRuns(unittest.TestCase):
    def page(self, runs, **query):
        place = unittest.mock.Mock(spec=["archive"])
        place.archive.list.return_value = runs
        return master.render_runs_page(view(), query, place)

    def dead(self, number, limit):
        run = a_run(number, limit, 60, state="OUT_OF_MEMORY")
        return dict(run, mem_limit=limit)

    def test_after_deaths_more_is_advised_than_the_limit_that_killed(self):
        gib = 2.0**30
        dead = [self.dead(1, 10 * gib), self.dead(2, 20 * gib)]
        ((line, why),) = master.advise(dead)
        self.assertEqual(line, "#SBATCH --mem=24G")
        self.assertIn("2 runs died", why)
        done = [a_run(n, 2 * gib, 60) for n in range(3, 9)]
        lines = [line for line, _ in master.advise(dead + done)]
        self.assertIn("#SBATCH --mem=24G", lines)
        self.assertEqual(sum("--mem" in line for line in lines), 1)
        large = [a_run(10, 40 * gib, 60)]
        self.assertIn("#SBATCH --mem=48G", dict(master.advise(dead + large)))

    def test_failures_are_links_and_headings_are_words(self):
        page = self.page([self.dead(n, 2.0**30) for n in range(11)], array="5")
        Outline(page)
        text = words(page)
        self.assertIn("9 of 10 below", text)
        self.assertIn("and 3 more", text)
        self.assertIn("--mem=2G: more than", text)
        failures = re.search(r'<section id="failures".*?</section>', page, re.S).group()
        self.assertEqual(failures.count('href="record/5_'), master.MAX_WHERE)

    def test_a_distribution_is_drawn_of_three_runs_or_more(self):
        few = self.page([a_run(n, 1e9, 60 + n) for n in range(2)], array="5")
        many = self.page([a_run(n, 1e9, 60 + n) for n in range(3)], array="5")
        self.assertNotIn("runs from the least to the most", few)
        self.assertIn("runs from the least to the most", many)


class Served(unittest.TestCase):
    """A real master."""

    def test_an_address_that_leads_nowhere_is_a_page_that_says_what_it_lacks(self):
        browser, curl = {"Accept": "text/html"}, {"Accept": "*/*"}
        with tempfile.TemporaryDirectory() as folder, start_master(
            "--record", folder
        ) as tool:
            for path, told in (
                ("/runs", "name or array is missing"),
                ("/runs?name=zz", "No run of zz"),
                ("/record/", "id is missing"),
                ("/record/9", "Nothing is known of a job 9"),
                ("/job/9", "Nothing is known of a job 9"),
                ("/compare?a=1&b=2", "1 and 2"),
            ):
                with self.subTest(path):
                    answer = get(tool.page, path, headers=browser)
                    self.assertEqual(answer[0], 404)
                    self.assertIn(told, words(answer[2]))
                    root = "../" if path.count("/") > 1 else ""
                    self.assertIn('href="%sjobs"' % root, answer[2])
                    self.assertIn("text/html", answer[1]["Content-Type"])
                    plain = get(tool.page, path, headers=curl)
                    self.assertEqual((plain[0], plain[2].count("\n")), (404, 1))
                    self.assertIn(told, plain[2])
            self.assertEqual(get(tool.page, "/compare")[0], 200)

    def test_an_id_that_is_typed_counts_more_than_the_list(self):
        with tempfile.TemporaryDirectory() as folder:
            for job in ("1", "2", "3"):
                path = os.path.join(folder, job + ".h-1-1.jsonl")
                with open(path, "wb") as file:
                    file.write(b"".join(a_record(job, hours=0.1).lines()))
            with start_master("--record", folder) as tool:
                page = page_text(tool.page, "/compare?a=1&b=2&id=3")
                self.assertIn("Jobs 1 and 3", page)
                page = page_text(tool.page, "/compare?a=1&b=2&id=")
                self.assertIn("Jobs 1 and 2", page)
                before = get(tool.page, "/compare?a=1").text
                self.assertNotIn('value="4"', before)
                path = os.path.join(folder, "4.h-1-1.jsonl")
                with open(path, "wb") as file:
                    file.write(b"".join(a_record("4", hours=0.1).lines()))
                after = get(tool.page, "/compare?a=1").text
                self.assertIn('value="4"', after)


# of each kind one job after the other, each over in a few seconds
QUICK = """
master_server.DEMO_INTERVAL = 0.1
master_server.DEMO_PAUSE = 1.0
master_server.DEMO_SILENCE = (0.0, 0.0)
master_server.LOOK_SECONDS = 0.2
master_server.ROW_SECONDS = 0.5
master_server.LINGER_JOB_SECONDS = 0.5
master_server.DEMO_JOBS = tuple(
    job._replace(seconds=5.0, age=0.0) for job in master_server.DEMO_JOBS
)
"""


class Demonstration(unittest.TestCase):
    def start(self, folder, *flags):
        """A demonstration of somebody who has records, and a temporary folder of its own."""
        own = os.path.join(folder, ".sentinel", "jobs")
        os.makedirs(own)
        with open(os.path.join(own, "4711.h-1-1.jsonl"), "wb") as file:
            file.write(b"".join(a_record("4711", hours=0.1).lines()))
        env = dict(os.environ, HOME=folder, TMPDIR=folder)
        return start_master("--demo", *flags, patch=QUICK, env=env)

    def folders(self, folder):
        return glob.glob(os.path.join(folder, "sentinel-demo-*"))

    def test_it_reads_no_records_of_the_user_and_leaves_none(self):
        with tempfile.TemporaryDirectory() as folder:
            for flags in ((), ("--no-record",)):
                with self.subTest(flags):
                    home = os.path.join(folder, str(len(flags)))
                    with self.start(home, *flags) as tool:
                        eventually(lambda: "train_resnet50" in self.jobs(tool))
                        self.assertNotIn("4711", self.jobs(tool))
                        self.assertEqual(get(tool.page, "/record/4711")[0], 404)
                        self.assertEqual(len(self.folders(home)), 1)
                        self.assertEqual(tool.stop(), 0)
                    self.assertEqual(self.folders(home), [])
                    names = os.listdir(os.path.join(home, ".sentinel", "jobs"))
                    self.assertEqual(names, ["4711.h-1-1.jsonl"])

    def jobs(self, tool):
        return page_text(tool.page, "/jobs")

    def test_a_dead_job_keeps_its_verdict_and_its_curves_and_tasks_their_figures(self):
        with tempfile.TemporaryDirectory() as folder, self.start(folder) as tool:
            dead = eventually(lambda: self.dead(tool), what="a death")
            page = eventually(
                lambda: self.with_curves(tool, "/job/%s" % dead), what="its record"
            )
            self.assertIn("<figure>", page)
            self.assertRegex(words(page), r"--mem=\d+G")
            (array,) = [job.array for job in master.DEMO_JOBS if job.array]
            eventually(lambda: self.figures(tool, array), what="figures of a task")

    def dead(self, tool):
        """The first job that died while it was watched."""
        (number,) = [job.number for job in master.DEMO_JOBS if "MEM" in job.ending]
        told = json.loads(get(tool.page, "/api/jobs").text)["jobs"]
        ends = {job["job"]: job["state"] for job in told}
        is_dead = ends.get(str(number)) == "OUT_OF_MEMORY"
        return str(number) if is_dead else None

    def with_curves(self, tool, path):
        page = get(tool.page, path)[2]
        return page if "<figure>" in page and "Died" in page else ""

    def figures(self, tool, array):
        """Whether a task that has ended has CPU and memory on the array's page."""
        text = words(get(tool.page, "/job/" + array)[2])
        return re.search(r"COMPLETED[^A-Z]{0,60} [\d.]+ % \d+ % of 16 G", text)


class InBrowser(unittest.TestCase):
    """Real demonstration, real Chromium."""

    @support.requires("chromium", "chromedriver")
    def test_nothing_of_the_list_is_out_of_view_and_no_time_or_figure_breaks(self):
        hidden = (
            "return [...document.querySelectorAll('.scroll')]"
            ".filter(each => each.scrollWidth > each.clientWidth + 1)"
            ".map(each => each.id + ' ' + each.scrollWidth)"
        )
        broken = (  # texts in more than one line, but for names, states and sentences
            "return [...document.querySelectorAll('#jobs tbody td:not(.w, .t, .s)')]"
            ".filter(each => {const range = document.createRange();"
            "range.selectNodeContents(each);"
            "const bar = each.querySelector('svg'); if (bar) range.setEndBefore(bar);"
            "const tops = [...range.getClientRects()].map(rect => rect.top);"
            "return Math.max(...tops) - Math.min(...tops) > 12})"
            ".map(each => each.textContent)"
        )
        with start_master("--demo") as tool, Browser() as browser:
            eventually(lambda: "problem" in page_text(tool.page, "/jobs"))
            for width in (390, 1300, 1900):
                browser.show_as(width, 900)
                browser.open("http://localhost:%d/jobs" % tool.page)
                with self.subTest(width):
                    self.assertEqual(browser.run(hidden), [])
                    self.assertEqual(browser.run(broken), [])
            query = urllib.parse.urlencode({"a": "48211"})
            browser.open("http://localhost:%d/compare?%s" % (tool.page, query))
            self.assertEqual(browser.count("select"), 2)
            self.assertEqual(browser.messages(), [])


if __name__ == "__main__":
    unittest.main()
