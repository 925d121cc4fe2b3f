"""A verdict that becomes a problem, and a death: events, critical warnings, the alert command."""

import json
import math
import os
import re
import shutil
import tempfile
import time
import unittest
from unittest import mock

import beside
import support
import test_tui
from support import eventually, events, get, start_master

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits

# what the recorder would find is read from a file, by a thread of the dashboard
PATCH = """
import json, os, threading, time
run = master_server.Dashboard.run
def judge(table):
    known = ""
    while True:
        time.sleep(0.05)
        with open(%r) as file:
            text = file.read()
        if text != known:
            known = text
            for raw, verdicts in json.loads(text).items():
                table.write_verdicts(raw, verdicts)
def patched(self):
    threading.Thread(target=judge, args=(self.table,), daemon=True).start()
    run(self)
master_server.Dashboard.run = patched
"""


def verdict(severity, what="3 of 4 CPUs idle", rule="idle-cpus", place="c1"):
    return {
        "severity": severity,
        "what": what,
        "proof": "proof",
        "cure": "cure",
        "rule": rule,
        "place": place,
    }


class Bounds(unittest.TestCase):
    """What is told of problems that come and go, by a clock that the test turns."""

    def setUp(self):
        table = mock.Mock()
        table.verdicts_told.return_value = 0
        table.snapshot.return_value.verdict_rows = b""
        self.judged = master_server.Judged(table)

    def tell(self, now, *verdicts):
        """What is told when a job is judged so at that time."""
        view = mock.Mock(jobs=[{"raw": "7", "job": "7_1"}], verdicts={"7": verdicts})
        return [event.text for event in self.judged.pick(view, now)]

    def test_a_problem_that_comes_and_goes_is_told_once_in_ten_minutes_with_a_count(
        self,
    ):
        told = []
        for now in range(0, 3600, 10):
            here = [verdict("problem")] if now % 60 < 30 else [verdict("fine")]
            told += [(now, text) for text in self.tell(now, *here)]
        words = "3 of 4 CPUs idle; proof; cure"
        again = words + "; came back 10 times in 10 min"
        self.assertEqual(
            told,
            [(0, words)] + [(now, again) for now in range(600, 3600, 600)],
        )

    def test_one_that_came_back_and_stays_is_told_when_the_ten_minutes_are_over(self):
        self.assertEqual(len(self.tell(0, verdict("problem"))), 1)
        self.tell(100, verdict("fine"))
        self.assertEqual(self.tell(200, verdict("problem")), [])
        self.assertEqual(self.judged.due, 600)
        (text,) = self.tell(600, verdict("problem"))
        self.assertIn("; came back once in 10 min", text)
        for now in range(610, 5000, 10):
            self.assertEqual(self.tell(now, verdict("problem")), [])
        self.assertEqual(self.judged.due, math.inf)

    def test_one_that_is_back_after_a_long_time_is_new(self):
        self.assertEqual(len(self.tell(0, verdict("problem"))), 1)
        self.tell(100, verdict("fine"))
        self.tell(700, verdict("fine"))
        self.assertEqual(
            self.tell(800, verdict("problem")), ["3 of 4 CPUs idle; proof; cure"]
        )

    def test_advice_that_becomes_a_problem_is_told_and_not_each_time(self):
        near = [verdict(severity, rule="near") for severity in ("advice", "problem")]
        counts = [len(self.tell(10 * number, near[number % 2])) for number in range(20)]
        self.assertEqual(counts, [0, 1] + 18 * [0])

    def test_a_second_place_is_told_and_of_many_four_in_ten_minutes(self):
        places = [verdict("problem", place="c%d" % number) for number in range(12)]
        told = [len(self.tell(number, *places[: number + 1])) for number in range(12)]
        self.assertEqual(told, 4 * [1] + 8 * [0])
        self.assertEqual(self.judged.due, 600)
        self.assertEqual(len(self.tell(605, *places)), 4)
        other = verdict("problem", rule="leak")
        self.assertEqual(len(self.tell(606, *places, other)), 1)

    def test_a_death_is_told_at_once_however_often(self):
        for now in (0, 20, 40):
            self.assertEqual(len(self.tell(now, verdict("died"))), 1)
            self.assertEqual(self.tell(now + 5, verdict("died")), [])
            self.assertEqual(self.tell(now + 10, verdict("fine")), [])


class Judged(unittest.TestCase):
    def setUp(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.path = os.path.join(folder, "verdicts")
        self.told = os.path.join(folder, "told")
        self.judge({})
        command = 'env | grep ^SENTINEL_ | sort >>"%s"' % self.told
        self.master = start_master("--alert-command", command, patch=PATCH % self.path)
        self.addCleanup(self.master.stop)

    def judge(self, verdicts):
        with open(self.path + ".new", "w") as file:
            json.dump(verdicts, file)
        os.rename(self.path + ".new", self.path)

    def facts(self):
        """What the command was told, once it has run."""
        if not os.path.exists(self.told):
            return None
        with open(self.told) as file:
            facts = dict(line.split("=", 1) for line in file.read().splitlines())
        return facts if "SENTINEL_VALUE" in facts else None

    def kinds(self):
        return [(row["kind"], row["job"]) for row in events(self.master.page)]

    def test_each_is_told_once_with_its_words(self):
        self.judge({"7": [verdict("problem"), verdict("advice", rule="memory")]})
        eventually(lambda: self.kinds() == [("problem", "7")])
        self.master.logged(r"CRITICAL WARNING: job 7: 3 of 4 CPUs idle; proof; cure")
        facts = eventually(self.facts)
        self.assertEqual(facts["SENTINEL_EVENT"], "problem")
        self.assertEqual(facts["SENTINEL_JOB"], "7")
        self.assertEqual(facts["SENTINEL_TEXT"], "3 of 4 CPUs idle; proof; cure")
        # other figures, and another job that is fine: nothing new
        self.judge(
            {"7": [verdict("problem", "2 of 4 CPUs idle")], "8": [verdict("fine")]}
        )
        self.judge(
            {"7": [verdict("died", "out of memory", "oom")], "8": [verdict("fine")]}
        )
        eventually(lambda: ("died", "7") in self.kinds())
        self.assertEqual(self.kinds(), [("problem", "7"), ("died", "7")])
        self.assertIn("out of memory", get(self.master.page).text)

    def test_one_that_comes_back_is_told_later_with_how_often(self):
        self.master.stop()
        patch = PATCH % self.path + "master_server.AGAIN_SECONDS = 4.0\n"
        self.judge({})
        self.master = start_master(patch=patch)
        self.addCleanup(self.master.stop)
        self.judge({"7": [verdict("problem")]})
        eventually(lambda: self.kinds() == [("problem", "7")])
        for severity in ("fine", "problem"):  # each is seen: the other job is told
            other = {"fine": "8", "problem": "9"}[severity]
            self.judge({"7": [verdict(severity)], other: [verdict("problem")]})
            eventually(lambda other=other: ("problem", other) in self.kinds())
        self.assertEqual(self.kinds().count(("problem", "7")), 1)
        self.master.logged(
            r"job 7: 3 of 4 CPUs idle; proof; cure; came back once in", 9
        )
        self.assertEqual(self.kinds().count(("problem", "7")), 2)

    def test_a_collector_that_starts_again_does_not_tell_it_again(self):
        self.judge({"7": [verdict("problem")]})
        eventually(lambda: self.kinds() == [("problem", "7")])
        pid = int(re.findall(r"collector started, pid (\d+)", self.master.log)[-1])
        os.kill(pid, 9)
        self.master.logged(r"collector ended .*; starting it again")
        self.judge({"9": [verdict("problem")], "7": [verdict("problem")]})
        try:
            eventually(lambda: ("problem", "9") in self.kinds(), 5)
        except AssertionError:
            print(self.master.log, get(self.master.page, "/healthz").text, self.kinds())
            raise
        self.assertEqual(self.kinds().count(("problem", "7")), 1)


class SameWords(unittest.TestCase):
    """A job that died for real is told with the same words wherever somebody looks."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.master = start_master("--record", self.folder)
        self.addCleanup(self.master.stop)

    def tell_slurm(self, state, **more):
        """What a herd passes on of the job."""
        facts = {"part": "job", "job": "7", "raw": "7", "state": state, "nodes": 1}
        with support.PlainAgent(self.master.port) as relay:
            relay.send({**facts, "start": round(self.start), **more})
            relay.send({"bye": "told"})
            self.assertEqual(relay.read_to_end(), "")

    def die(self):
        """A job whose command ends of a segmentation fault."""
        self.start = time.time()
        self.tell_slurm("RUNNING")
        command = ["--name", "c1", "--", "sh", "-c", "sleep 3; kill -SEGV $$"]
        done = support.run(
            "agent.py",
            "--port",
            self.master.port,
            *command,
            env={"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit"},
        )
        self.assertEqual(done.returncode, 128 + 11)
        self.tell_slurm("FAILED", exit="139:0", end=round(time.time()))

    def verdict(self):
        """What the API says of the job, once it is judged with all that there is to know."""

        def look():
            (told,) = json.loads(get(self.master.page, "/api/jobs").text)["jobs"]
            found = told["verdicts"]
            return found[0] if found and "Slurm says FAILED" in found[0]["proof"] else 0

        return eventually(look, 60)

    def explained(self, *flags):
        command = ("--explain", "7", "--record", self.folder, *flags)
        done = support.run("master_server.py", *command)
        self.assertEqual(done.returncode, 3)
        return done.stdout

    def on_terminal(self):
        """What the screens say of the job."""
        shown = test_tui.Pty(
            self, test_tui.reader_command(self.master.port), size=(40, 400)
        )
        shown.shows("Slurm says FAILED")
        return shown.read().decode()

    def test_a_death_has_the_same_words_on_pages_in_text_and_in_the_record(self):
        self.die()
        verdict = self.verdict()
        self.assertEqual((verdict["severity"], verdict["rule"]), ("died", "signal"))
        self.assertRegex(verdict["what"], r"^\d\d:\d\d: SIGSEGV on c1: it used memory")
        self.assertRegex(
            verdict["proof"], r"SIGSEGV on c1 at .*; Slurm says FAILED \(139:0\)"
        )
        what, proof, cure = (verdict[key] for key in ("what", "proof", "cure"))
        page = self.master.page
        report = os.path.join(self.folder, "7.html")
        eventually(lambda: os.path.exists(report), 60)
        with open(report) as file:
            mailed = support.text_of_page(file.read())
        record = json.loads(self.explained("--json"))
        listed = support.run("test_reader.py", "--jobs", "--record", self.folder)
        for place, text, parts in (
            ("front page", support.page_text(page), [what]),
            ("page of the job", support.page_text(page, "/job/7"), [what, proof, cure]),
            ("nodes.txt", get(page, "/nodes.txt?width=400").text, [what]),
            ("record", support.page_text(page, "/record/7"), [what, proof, cure]),
            ("list of records", support.page_text(page, "/jobs"), [what]),
            ("report", mailed, [what, proof, cure]),
            ("terminal", self.on_terminal(), [what, proof, cure]),
            ("--explain", self.explained(), [what, proof, cure]),
            ("test_reader.py --jobs", listed.stdout, [what]),
            ("log", self.master.log, [what, proof, cure]),
        ):
            single = " ".join(text.split())  # as HTML has it
            for part in parts:
                with self.subTest(place):
                    is_there = " ".join(part.split()) in single
                    self.assertTrue(is_there, "%s: not %r" % (place, part))
        self.assertEqual(record["verdicts"][0], verdict)
        self.assertEqual(record["code"], 3)


if __name__ == "__main__":
    unittest.main()
