"""A job's record after all that can happen to it: real Slurm, sshd and a cable (lab.sh).

The master is on the laptop.  The agents are around the work and dial through the bridge and a
tunnel (Solution B): those of --my-jobs and --ssh end with the master or the ssh, and what is
not measured nobody can send later.  About five minutes.
"""

import html
import os
import re
import subprocess
import sys
import tempfile
import time

import support
import test_lab
import test_lab_job
from browser import Browser
from support import eventually
from test_reports import AXE

sys.path.insert(0, support.ROOT)
import master_server as master

JOB_SECONDS = 180  # how long the job lives ...
CUT_SECONDS = 60  # ... of which the laptop's cable is out
AWAY_SECONDS = 30  # ... and there is no master
BACK_SECONDS = 120  # in which the old sshd gives up the port of the tunnel

# On each node: 60 MiB, and a CPU that is now busy and now not.  Once there is the file
# JOB.enough, the last rank takes more until the kernel kills it, and says when it still lived.
WORK = r"""
import os, time

job, rank = os.environ["SLURM_JOB_ID"], os.environ["SLURM_PROCID"]
kept = [b"x" * (60 << 20)]
while not os.path.exists(job + ".enough"):
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    time.sleep(0.5)
while rank == "1":
    with open(job + ".alive", "w") as file:
        file.write("%.3f" % time.time())
    kept.append(b"x" * (8 << 20))
    time.sleep(0.1)
time.sleep(600)
"""
SCRIPT = (
    """#!/bin/bash
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit \\
    python3 agent.py --host login --port %d -- python3 grow.py
"""
    % test_lab.BRIDGE
)
# As tests/README.md has it: the tunnel comes back by itself
TUNNEL = (
    "while true; do ssh -N -o ExitOnForwardFailure=yes -o ServerAliveInterval=5"
    " -R %d:localhost:%d login; sleep 1; done" % (test_lab.PORT, test_lab.PORT)
)
TABLES = (  # the words of each table, a list for each of its cells
    "return [...document.querySelectorAll('table')].map(table =>"
    " [...table.querySelectorAll('th, td')].map(cell => cell.innerText))"
)
AXE_CHECK = (
    "const done = arguments[0]; axe.run(document, {runOnly: ['wcag2a', 'wcag2aa',"
    "'wcag21a', 'wcag21aa', 'best-practice']}).then(result => done(result.violations"
    ".map(v => [v.id, v.help, v.nodes.slice(0, 3).map(node => node.html)])))"
)


def tearDownModule():
    if test_lab.LAB:
        test_lab.LAB.down()
        test_lab.LAB = None


@support.slow("a Slurm cluster, and a job of three minutes")
@support.requires(*test_lab_job.NEEDS, "chromium", "chromedriver", "w3m", AXE)
class Survival(test_lab.LabTest):
    """One job, from its start to its report."""

    place = "laptop"

    @classmethod
    def start_master(cls):
        flags = ("--record", "records")
        tool = test_lab.LAB.start("laptop", "python3", "master_server.py", *flags)
        tool.listening("dashboard")
        return tool

    @classmethod
    def start_tunnel(cls):
        tunnel = test_lab.LAB.start("laptop", "bash", "-c", TUNNEL)
        eventually(lambda: test_lab.LAB.listens("login", test_lab.PORT))
        return tunnel

    def setUp(self):
        home = os.path.join(test_lab.LAB.dir, "laptop", "home", "tester")
        self.folder = os.path.join(home, "records")
        for name, text in (("grow.py", WORK), ("job.sh", SCRIPT)):
            with open(test_lab.LAB.path(name), "w") as file:
                file.write(text)

    def test_a_job_that_lost_cable_and_master_and_died_of_memory_has_all_of_its_life(
        self,
    ):
        job, died = self.live_and_die()
        report = master.report_path(self.folder, job)
        eventually(lambda: os.path.exists(report), 90, "the report")
        record = master.read_record(self.folder, job)
        self.check_curves(record)
        self.check_end(record, died)
        self.check_report(report)

    # ---- the job

    def live_and_die(self):
        """The job's id, and when the kernel killed it."""
        job = test_lab.LAB.sbatch("-N2", "--mem=200", "-t10", "-Jgrow", "job.sh")
        began = time.monotonic()
        self.shown("c1", "c2", job=job)
        self.be_without_master(job)
        self.be_without_cable(job)
        eventually(lambda: time.monotonic() - began > JOB_SECONDS, JOB_SECONDS)
        with open(test_lab.LAB.path(job + ".enough"), "w"):
            pass
        eventually(lambda: job not in test_lab.LAB.queue(), 60, "it is killed")
        self.shown(seconds=30, job=job)  # no row of it
        return job, float(test_lab.LAB.text(job + ".alive"))

    def be_without_master(self, job):
        """The master is killed, and after a while there is another."""
        eventually(lambda: self.rows_so_far(job) >= 2, 60, "it is recorded")
        test_lab.LAB.kill("laptop", "master_server.py")
        self.master.stop()
        killed = time.monotonic()
        eventually(lambda: time.monotonic() - killed > AWAY_SECONDS, AWAY_SECONDS + 5)
        type(self).master = self.start_master()
        self.shown("c1", "c2", seconds=60, job=job)

    def be_without_cable(self, job):
        """The laptop's cable is pulled, and after a while plugged in again."""
        before = self.rows_so_far(job)
        eventually(lambda: self.rows_so_far(job) > before, 60, "it is recorded again")
        test_lab.LAB.must("cut", "laptop")
        try:
            cut = time.monotonic()
            eventually(lambda: time.monotonic() - cut > CUT_SECONDS, CUT_SECONDS + 5)
            self.assertEqual(self.browser.names(job=job), [])
        finally:
            test_lab.LAB.must("heal", "laptop")
        self.shown("c1", "c2", seconds=BACK_SECONDS, job=job)

    def rows_so_far(self, job):
        record = master.read_record(self.folder, job)
        return len(record.rows) if record else 0

    # ---- what is left of it

    def check_curves(self, record):
        """No hole of more than two intervals, in no curve of the job and of no node."""
        self.assertEqual(sorted(record.nodes), ["c1", "c2"])
        rows = record.rows
        self.assertGreater(rows[-1].time - rows[0].time, JOB_SECONDS - 20)
        curves = {}
        for key in sorted({key for row in rows for key in row.values}):
            curves[key, "all"] = [row.time for row in record.rows_of(key)]
            for name, means in zip(record.nodes, record.columns(key)):
                pairs = zip(record.rows_of(key), means)
                known = [row.time for row, mean in pairs if mean is not None]
                curves[key, name] = known
        self.assertTrue(curves["job_mem", "c2"])
        for curve, times in curves.items():
            with self.subTest(curve):
                # the begin and the end count as well: a curve that stops is a hole
                times = [rows[0].time, *times, rows[-1].time]
                holes = [after - time for time, after in zip(times, times[1:])]
                self.assertLessEqual(max(holes), 2 * master.ROW_SECONDS)

    def check_end(self, record, died):
        """The death has its name, and what was measured reaches to it."""
        died_of = [v["what"] for v in record.verdicts if v["severity"] == "died"]
        self.assertTrue(died_of, (record.verdicts, record.events))
        self.assertRegex(
            " ".join(died_of), "out of memory: the kernel killed 1 process"
        )
        self.assertRegex(" ".join(died_of), "on c2")
        for key, name in (("job_mem", "c2"), ("cpu", "c1")):
            place = 3 + list(record.nodes).index(name)
            known = [
                row.time
                for row in record.rows_of(key)
                if len(row.values[key]) > place and row.values[key][place] is not None
            ]
            self.assertGreaterEqual(known[-1], died - 2.0, (key, name))

    def check_report(self, path):
        """It is read without a network, by a browser and in a terminal."""
        with open(path, encoding="utf-8") as file:
            page = file.read()
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "report.html")  # all that is mailed
            with open(copy, "w", encoding="utf-8") as file:
                file.write(page)
            tables = self.look_with_chromium(copy)
        dumped = subprocess.run(
            ["w3m", "-dump", "-T", "text/html", "-I", "utf-8", "-cols", "400"],
            input=page.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.decode()
        dumped = re.sub(r"\s+", " ", dumped)
        self.assertGreaterEqual(len(tables), 2)
        for cells in tables:
            for cell in cells:
                words = re.sub(r"\s+", " ", html.unescape(cell)).strip()
                self.assertIn(words, dumped)

    def look_with_chromium(self, path):
        """The tables that Chromium shows; axe and Chromium have nothing to say."""
        with open(AXE, encoding="utf-8") as file:
            axe = file.read()
        with Browser() as browser:
            browser.go_offline()
            for dark in (False, True):
                browser.show_as(1280, 800, dark=dark)
                browser.open("file://" + path)
                self.assertIn("out of memory", browser.text())
                tables = browser.run(TABLES)
                browser.run(axe)
                self.assertEqual(browser.wait(AXE_CHECK), [])
                self.assertEqual(browser.messages(), [])
        return tables
