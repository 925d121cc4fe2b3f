"""A verdict that becomes a problem, and a death: events, critical warnings, the alert command."""

import json
import os
import re
import shutil
import tempfile
import unittest

from support import eventually, events, get, start_master

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


def verdict(severity, what="3 of 4 CPUs idle", rule="idle-cpus"):
    return {
        "severity": severity,
        "what": what,
        "proof": "proof",
        "cure": "cure",
        "rule": rule,
    }


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


if __name__ == "__main__":
    unittest.main()
