"""The watcher of `agent.py --jobs`: herd and relay, with stand-ins for Slurm's commands.

The stand-ins can do what a real Slurm does only on bad days: hang, refuse, fail on the
second node.  test_lab_jobs.py has the same way with a real one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from unittest import mock

import beside
import support  # before the tools: it knows where they are
import agent
from support import nodes, start, start_master

load_tests = beside.in_parts(2)  # in processes of their own: they mostly wait

# They are shell scripts where they can be: thirty of them start at once.
SQUEUE = """\
#!/bin/sh
cd {folder}
echo "$@" >>squeue.calls
case $(cat squeue.mode) in
hang) exec sleep 60 ;;
fail)
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
    ;;
esac
cat queue
"""
SCONTROL = """\
#!/bin/sh
cd {folder}
echo "$@" >>scontrol.calls
sleep $(cat scontrol.mode)
for raw; do :; done
cat job.$raw 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
SACCT = """\
#!/bin/sh
cd {folder}
echo "$@" >>sacct.calls
cat accounts 2>/dev/null && exit
echo "Slurm accounting storage is disabled" >&2
exit 1
"""
SRUN = """\
#!/bin/sh
words=
for word; do
    [ "$word" = sh ] && break
    words="$words$word "
done
echo "$words"$(env | sed -n "s/^\\(SLURM[A-Z_]*\\)=.*/\\1/p" | sort) >>{folder}/srun.calls
mode=$(cat {folder}/srun.mode)
case "$mode $words" in
hang*)
    cat >/dev/null
    exit 1
    ;;
slow*) sleep 2 ;;
timeout*)
    echo "srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv" >&2
    exit 1
    ;;
gres*--gres=none*) ;;
gres*)
    echo "srun: error: Unable to create step: Invalid generic resource (gres) specification" >&2
    exit 1
    ;;
interconnect*--nodelist=*,*)
    echo "srun: error: Task launch failed: error configuring interconnect" >&2
    exit 1
    ;;
never*)
    echo "srun: error: Unable to confirm allocation for job 7: Access/permission denied" >&2
    exit 1
    ;;
esac
exec {python} -S {folder}/tasks "$@"
"""
# the tasks of srun: an agent on each node, its stdin for all, its stdout with the task in front
TASKS = """\
import os, subprocess, sys, threading
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[sys.argv.index("sh"):]
given = dict(word[2:].partition("=")[::2] for word in options[:options.index("--wait=0") + 1])
names = given["nodelist"].split(",")
tasks = []
def label(number, task):
    for line in task.stdout:
        sys.stdout.buffer.write(b"%d: %s" % (number, line))
        sys.stdout.buffer.flush()
for number, name in enumerate(names):
    env = dict(os.environ, SLURMD_NODENAME=name, SLURM_JOB_ID=given["jobid"], SLURM_JOB_NAME="sh")
    tasks.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    threading.Thread(target=label, args=(number, tasks[-1])).start()
while True:
    data = os.read(0, 65536)
    for task in tasks:
        if data:
            task.stdin.write(data)
            task.stdin.flush()
        else:
            task.stdin.close()
    if not data:
        break
sys.exit(max(task.wait() for task in tasks))
"""
# the herd's first bytes come behind a prompt that ends without a newline
SSH = """\
#!/bin/sh
for command; do :; done
echo "Welcome to the cluster"
echo "Welcome, says the banner" >&2
echo "= Welcome, no JSON"
echo "@ ghost.1-0.0 {\\"cpu\\": 1, \\"ram\\": 1, \\"node\\": \\"ghost\\"}"
echo "! Welcome again"
printf "prompt> "
exec sh -c "$command"
"""
# what the step finds on the PATH of its node
NODE_PYTHON = """\
#!/bin/sh
exec {python} -S "$@"
"""
COMMANDS = {
    "python3": NODE_PYTHON,
    "squeue": SQUEUE,
    "scontrol": SCONTROL,
    "sacct": SACCT,
    "srun": SRUN,
    "tasks": TASKS,
}
# What a busy machine must not run into is as long as in real life: ATTACH_SECONDS, DEAF_SECONDS,
# QUESTION_SECONDS.
HASTE = {
    "LOOK_SECONDS": 0.3,
    "LOOK_FACTOR": 0.5,
    "BACKOFF_SECONDS": 0.3,
    "GATHER_SECONDS": 0.1,
    "PING_SECONDS": 0.5,
}


BUSY = 60  # seconds for what takes one: each row takes a dozen processes


def eventually(check, seconds=BUSY, what=""):
    return support.eventually(check, seconds, what)


def row(job="7", state="RUNNING", nodes="c1", age=100, **words):
    """A line of squeue's answer."""
    known = {
        "job": job,
        "raw": job,
        "array": job.partition("_")[0],
        "state": state,
        "user": "tester",
        "partition": "debug",
        "nodes": "1",
        "cpus": "2",
        "mem": "300M",
        "gres": "N/A",
        "submit": stamp(age + 5),
        "start": stamp(age),
        "end": stamp(age - 600),
        "limit": "10:00",
        "reason": "None",
        "nodelist": nodes,
        "job_name": "train|it",
    }
    known.update(words)
    return "|".join(known[name] for name, _ in agent.SQUEUE_FIELDS) + "\n"


def stamp(ago):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - ago))


def details(job="7", state="RUNNING", nodes=("c1",), more=""):
    """What scontrol -d show job prints, the parts of it that are read."""
    text = "JobId=%s JobName=train|it\n   JobState=%s Reason=None\n   %s\n" % (
        job,
        state,
        more,
    )
    for node in nodes:
        text += "     Nodes=%s CPU_IDs=0-1 Mem=300 GRES=\n" % node
    return text


def ended(state, exit_code, derived, reason="None", job="7"):
    """What scontrol -d show job prints of a job that has ended."""
    return (
        "JobId=%s JobName=train|it\n   JobState=%s Reason=%s Dependency=(null)\n"
        "   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=%s\n"
        "   DerivedExitCode=%s\n   RunTime=00:01:40 TimeLimit=00:10:00 TimeMin=N/A\n"
        "   StartTime=%s EndTime=%s Deadline=N/A\n"
        % (job, state, reason, exit_code, derived, stamp(100), stamp(1))
    )


class Slurm:
    """A folder of stand-ins, and an agent.py with short times; a copy of it is there, too."""

    def __init__(self, test, **seconds):
        self.folder = tempfile.mkdtemp()
        test.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        for name, text in COMMANDS.items():
            path = self.write(
                name, text.format(python=sys.executable, folder=self.folder)
            )
            os.chmod(path, stat.S_IRWXU)
        self.write("squeue.mode", "")
        self.write("srun.mode", "")
        self.write("scontrol.mode", "0")
        self.write("queue", "")
        self.agent = support.with_constants("agent.py", **dict(HASTE, **seconds))
        shutil.copy(self.agent, self.folder)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path + ".new", "w") as file:
            file.write(text)
        os.rename(path + ".new", path)
        return path

    def calls(self, name):
        path = os.path.join(self.folder, name + ".calls")
        if not os.path.exists(path):
            return []
        with open(path) as file:
            return file.read().splitlines()

    def watch(self, master, *flags, path=os.environ["PATH"], python=None):
        """Start the watcher: `agent.py --jobs` for a master."""
        env = {
            "PATH": self.folder + os.pathsep + path,
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_CONF": "/etc/slurm/slurm.conf",
        }
        return start(
            self.agent,
            "--jobs",
            *flags,
            "--port",
            master.port,
            env=env,
            python=python,
        )


class Parsers(unittest.TestCase):
    def test_a_list_of_hosts_is_written_out_as_scontrol_does(self):
        for text, names in (
            ("c1", ["c1"]),
            ("c[1-3]", ["c1", "c2", "c3"]),
            ("c[01-02,7],login", ["c01", "c02", "c7", "login"]),
            ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
            ("gpu[1]-ib", ["gpu1-ib"]),
            ("", []),
        ):
            with self.subTest(text):
                self.assertEqual(agent.parse_hostlist(text), names)

    def test_durations_sizes_and_times_of_squeue(self):
        self.assertEqual(agent.parse_duration("1-02:03:04"), 93784)
        self.assertEqual(agent.parse_duration("10:00"), 600)
        self.assertIsNone(agent.parse_duration("UNLIMITED"))
        self.assertEqual(agent.parse_size("300M"), 300 * 2**20)
        self.assertEqual(agent.parse_size("2G"), 2 * 2**30)
        self.assertIsNone(agent.parse_size("N/A"))
        now = 1764250860.0
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))
        self.assertEqual(agent.parse_time(text), now)
        self.assertIsNone(agent.parse_time("N/A"))

    def test_a_job_of_squeue_with_a_bar_in_its_name(self):
        (facts,) = agent.parse_squeue(row(gres="gres:gpu:a100:2", reason="None"))
        self.assertEqual(facts["job_name"], "train|it")
        self.assertEqual((facts["nodes"], facts["cpus"], facts["gpus"]), (1, 2, 2))
        self.assertEqual((facts["mem"], facts["limit"]), (300 * 2**20, 600))
        self.assertNotIn("reason", facts)
        self.assertNotIn("array", facts)

    def test_the_cpus_of_each_node_of_scontrol(self):
        text = textwrap.dedent("""\
            JobId=9 JobName=big
               JobState=RUNNING Reason=None
                 Nodes=c[1-2] CPU_IDs=0-3,8 Mem=100 GRES=gpu:2(IDX:0,3)
                 Nodes=c7 CPU_IDs=2 Mem=100 GRES=
        """)
        self.assertEqual(agent.parse_job_nodes(text), {"c1": 5, "c2": 5, "c7": 1})

    def test_the_working_directory_of_scontrol_with_a_blank_in_it(self):
        text = "JobId=9 JobName=WorkDir=/a\n   WorkDir=/scratch/my fit\n   StdErr=/x\n"
        self.assertEqual(agent.parse_job_directory(text), "/scratch/my fit")
        self.assertEqual(agent.parse_job_directory("JobId=9\n   Power=\n"), "")

    def test_of_an_array_only_the_task_is_read_that_was_asked_about(self):
        """scontrol tells of all tasks when it is asked about the one with the array's id."""
        text = details("8", "RUNNING", ["c2"]) + "\n" + details("7", "FAILED")
        record = agent.pick_job(text, "7")
        self.assertEqual(agent.parse_scontrol(record)["JobState"], "FAILED")
        self.assertEqual(agent.parse_job_nodes(record), {"c1": 2})
        self.assertEqual(agent.pick_job("no record", "7"), "no record")

    def test_an_end_as_scontrol_tells_it(self):
        known = agent.parse_scontrol(ended("FAILED", "1:0", "0:125", "NonZeroExitCode"))
        facts = agent.parse_end(known)
        self.assertEqual(
            (facts["state"], facts["reason"]), ("FAILED", "NonZeroExitCode")
        )
        self.assertEqual((facts["exit"], facts["derived_exit"]), ("1:0", "0:125"))
        self.assertAlmostEqual(facts["end"], time.time(), delta=60)
        for state in ("RUNNING", "COMPLETING", "PENDING"):
            self.assertEqual(
                agent.parse_end({"JobState": state, "ExitCode": "0:0"}), {}
            )

    def test_an_end_as_accounting_tells_it(self):
        lines = (
            "7_2|CANCELLED by 0|0:0|%s|a|name" % stamp(10),
            "7_2.batch|FAILED|3:0|%s|batch" % stamp(90),
            "7_2.0|COMPLETED|0:0|%s|first" % stamp(80),
            "7_2.2|OUT_OF_MEMORY|0:125|%s|late" % stamp(20),
            "7_2.1|FAILED|0:11|%s|solve" % stamp(30),
            "7_2.3|FAILED|0:15|%s|sentinel" % stamp(60),
            "7_2.4|CANCELLED by 0|0:15|%s|cut" % stamp(70),
            "7_20|FAILED|9:0|%s|other" % stamp(10),
        )
        facts = agent.parse_sacct("\n".join(lines), "7_2")
        self.assertEqual((facts["state"], facts["exit"]), ("CANCELLED", "0:0"))
        self.assertEqual(facts["cancelled_by"], "root")
        self.assertEqual(facts["failed_step"], "step 1 (solve): signal 11")
        self.assertEqual(agent.user_name("4294967294"), "4294967294")
        early = agent.parse_sacct("7|RUNNING|0:0|Unknown|train", "7")
        self.assertEqual(early, {})


def facts_of(**words):
    """A job's facts from a row of squeue."""
    return agent.parse_squeue(row(**words))[0]


class Asking(unittest.TestCase):
    """When Slurm is asked about an end, and what of two answers holds."""

    def test_a_squeue_that_takes_20_s_is_asked_every_400_s_and_a_fast_one_every_30(
        self,
    ):
        for took, pause in ((20.0, 400), (1.6, 32), (0.1, 30)):
            herd = agent.Herd([], b"")
            asked = mock.Mock(took=took, error="", asked=0.0)
            asked.text.return_value = row()
            with mock.patch.object(agent, "Question", return_value=asked), mock.patch(
                "agent.time.monotonic", return_value=5000.0
            ), mock.patch.object(herd, "put"):
                herd.look()
            self.assertEqual(list(herd.jobs), ["7"])
            self.assertEqual(herd.look_at, 5000 + pause)

    def test_of_many_jobs_that_had_ended_before_five_are_asked_about_a_look_and_once(
        self,
    ):
        herd = agent.Herd([], b"")
        rows = [facts_of(job=str(number), state="FAILED") for number in range(12)]
        with mock.patch.object(herd, "put"), mock.patch.object(herd, "ask_end") as ask:
            counts = []
            for _ in range(4):
                herd.update(rows, time.monotonic())
                counts.append(ask.call_count)
        self.assertEqual(counts, [5, 10, 12, 12])

    def test_a_job_that_its_agents_have_left_is_asked_about_six_times(self):
        herd = agent.Herd([], b"")
        job = herd.jobs["7"] = agent.Job(facts_of())
        job.expect_end()
        began = job.ask_at[0]
        moments = []
        with mock.patch.object(herd, "ask_end"):
            for tick in range(400):
                now = began + tick / 10
                with mock.patch.object(agent.time, "monotonic", return_value=now):
                    herd.ask_ends()
                if herd.ask_end.call_count > len(moments):
                    moments.append(tick / 10)
        self.assertEqual(moments, [0, 1, 2, 4, 8, 16])

    def test_a_look_that_was_asked_before_the_end_does_not_take_it_back(self):
        job = agent.Job(facts_of())
        before = time.monotonic() - 1
        job.take_end({"state": "FAILED", "exit": "3:0"})
        job.take_row(facts_of(), before)
        self.assertEqual((job.ended, job.facts["state"]), (True, "FAILED"))
        job.take_row(
            facts_of(state="FAILED", reason="NonZeroExitCode"), job.ended_at + 1
        )
        self.assertEqual(job.facts["exit"], "3:0")

    def test_a_job_that_is_requeued_lives_again(self):
        job = agent.Job(facts_of())
        job.take_end({"state": "NODE_FAIL", "exit": "0:0", "derived_exit": "0:0"})
        job.take_row(facts_of(state="PENDING"), job.ended_at + 1)
        self.assertEqual((job.ended, job.facts["state"]), (False, "PENDING"))
        self.assertNotIn("exit", job.facts)
        job.expect_end()
        self.assertTrue(job.ask_at)


class Ladder(unittest.TestCase):
    """What follows when no agent of a step has told anything."""

    def steps(self, *answers, nodes="c[1-2]"):
        """The rungs on which a job that gets these answers is tried, and the waits between."""
        job = agent.Job(facts_of(nodes=nodes))
        way = [job.rung]
        for is_slow in answers:
            pause, _ = job.step_down(is_slow)
            way += [pause, job.rung] if pause else [job.rung]
        return way

    def test_refusals_are_tried_on_each_rung_and_again_after_five_minutes(self):
        no = False
        self.assertEqual(self.steps(no, no, no, no), [0, 1, 2, 300, 0, 1])
        self.assertEqual(self.steps(no, no, no, nodes="c1"), [0, 2, 300, 0, 2])

    def test_after_each_rung_was_slow_once_one_is_tried_again_later_and_later(self):
        self.assertEqual(
            self.steps(*9 * [True]),
            [0, 1, 2, 30, 0, 60, 0, 120, 0, 240, 0, 300, 0, 300, 0, 300, 0],
        )

    def test_a_slow_rung_is_tried_again_where_another_was_refused(self):
        slow, no = True, False
        self.assertEqual(self.steps(no, slow, no), [0, 1, 2, 30, 1])
        self.assertEqual(self.steps(no, no, slow, slow), [0, 1, 2, 30, 2, 60, 2])
        self.assertEqual(
            self.steps(slow, no, no, no, no, no)[3:], [30, 0, 1, 2, 300, 0]
        )

    def test_a_slow_one_is_given_more_time_and_what_answers_is_not_slow_any_more(self):
        job = agent.Job(facts_of(nodes="c1"))
        self.assertEqual([job.patience(took) for took in (0.1, 4, 25)], [20, 40, 120])
        for patience in (20, 20, 40, 80, 120, 120):
            self.assertEqual(job.patience(0.1), patience)
            job.step_down(True)
        job.take_answer()
        self.assertEqual(job.patience(0.1), 20)
        self.assertEqual(job.step_down(True), (0.0, "without GPUs"))

    def test_what_srun_says_of_a_slow_controller_is_no_refusal(self):
        for words, is_slow in (
            ("Unable to confirm allocation: Socket timed out on send/recv", True),
            ("Unable to contact slurm controller (connect failure)", True),
            ("Unable to create step: Requested nodes are busy", False),
            ("Unable to create step: Invalid generic resource", False),
            ("Unable to confirm allocation: Access/permission denied", False),
        ):
            self.assertEqual(bool(re.search(agent.SLOW_WORDS, words)), is_slow, words)

    def test_a_step_of_ours_never_fails_whatever_becomes_of_it(self):
        """Its exit code would be the derived one of the job."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        command = ["/bin/sh", "-c", agent.STEP_PYTHON, "pass"]
        done = subprocess.run(command, env={"PATH": folder}, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"no python3 of 3.6 or later", done.stderr)
        started = os.path.join(folder, "started")
        fake = os.path.join(folder, "python3")
        with open(fake, "w") as file:
            file.write('#!/bin/sh\n: >"%s"\nsleep 1\n' % started)
        os.chmod(fake, stat.S_IRWXU)
        path = folder + os.pathsep + os.environ["PATH"]
        step = subprocess.Popen(command, env={"PATH": path})
        eventually(lambda: os.path.exists(started))
        step.send_signal(signal.SIGTERM)
        self.assertEqual(step.wait(BUSY), 0)
        flags = ("--stdout", "--procfs", folder)
        self.assertEqual(support.run("agent.py", *flags).returncode, 1)
        done = support.run("agent.py", *flags, "--lifeline")
        self.assertEqual(done.returncode, 0)
        self.assertIn("error: ", done.stderr)

    def test_the_agents_are_told_where_the_job_works(self):
        herd = agent.Herd([], b"")
        job = herd.jobs["7"] = agent.Job(facts_of())
        question = mock.Mock(error="", took=0.1)
        question.text.return_value = details(more="WorkDir=/scratch/my fit")
        with mock.patch.object(agent, "Step") as step:
            herd.attach(job, question)
        command = step.call_args[0][1]
        facts = json.loads(command[command.index("--facts") + 1])
        self.assertEqual(facts["directory"], "/scratch/my fit")

    def test_a_job_of_a_hundred_nodes_has_one_step_or_sixteen_and_the_rest_is_named(
        self,
    ):
        names = ["c%d" % number for number in range(1, 101)]
        herd = agent.Herd([], b"")
        job = herd.jobs["7"] = agent.Job(facts_of(nodes="c[1-100]"))
        question = mock.Mock(error="", took=0.1)
        question.text.return_value = details(nodes=names)
        lists = []
        with mock.patch.object(agent, "Step") as step, mock.patch.object(
            herd, "put"
        ) as put:
            for job.rung in (0, 1):
                herd.attach(job, question)
                commands = [call[0][1] for call in step.call_args_list]
                lists.append([self.options(command) for command in commands])
                step.reset_mock()
        whole, single = lists
        self.assertEqual(whole, [("100", "100", ",".join(names))])
        self.assertEqual(single, [("1", "1", name) for name in names[:16]])
        (line,) = [call[0][0] for call in put.call_args_list]
        self.assertIn(b"84 of its 100 nodes are not watched: from c17 on", line)

    @staticmethod
    def options(command):
        """(nodes, tasks, names of the nodes) of a srun."""
        given = dict(word.partition("=")[::2] for word in command)
        return given["--nodes"], given["--ntasks"], given["--nodelist"]


class Away(unittest.TestCase):
    """What the relay does after a cut, until ssh reaches the herd again."""

    def away(self, *ends):
        """(lines of the log, pauses) where ssh ends so: (its last words, had the herd spoken?)."""
        relay = agent.Relay(["ssh", "login"], b"", mock.Mock())
        ends = list(ends)
        pauses = []

        def run_herd(first):
            self.assertEqual(first, not pauses)
            if not ends:
                relay.signals.append(signal.SIGTERM)
                return 0, ""
            words, relay.greeted = ends.pop(0)
            relay.lines = {"7.1-0.0": mock.Mock()} if relay.greeted else {}
            return 255, words

        with mock.patch.object(relay, "run_herd", run_herd), mock.patch.object(
            relay, "pause", pauses.append
        ), mock.patch.object(agent, "log") as log:
            self.assertEqual(relay.run(), 0)
        return [call[0][0] for call in log.call_args_list], pauses

    def test_why_it_is_away_is_told_once_until_the_herd_has_spoken_again(self):
        cut, dead = "Timeout, server login not responding.", "No route to host"
        lines, pauses = self.away(
            (cut, True), *6 * [(dead, False)], (cut, True), (dead, False)
        )
        following = ": trying again until it answers"
        self.assertEqual(lines, 2 * [cut + following, dead + following])
        self.assertEqual(pauses, [1, 2, 4, 8, 15, 15, 15, 1, 2])

    def test_where_somebody_would_have_to_type_it_is_tried_every_five_minutes(self):
        refused = "me@login: Permission denied (publickey,keyboard-interactive)."
        lines, pauses = self.away(("Timeout", True), *3 * [(refused, False)])
        self.assertEqual(pauses, [1, 300, 300, 300])
        self.assertEqual(len(lines), 2)
        self.assertIn(refused + ": nothing is asked for in the background", lines[1])
        self.assertIn("again every 5 minutes", lines[1])

    def test_only_the_first_ssh_may_ask_and_only_later_ones_have_no_time(self):
        relay = agent.Relay(agent.herd_command([], "login"), b"", mock.Mock())
        for first in (True, False):
            with mock.patch("subprocess.Popen", side_effect=OSError(2, "no")) as ssh:
                relay.run_herd(first)
            words = " ".join(ssh.call_args[0][0])
            for option in ("BatchMode=yes", "ConnectTimeout=20"):
                self.assertEqual(option in words, not first, words)


class Watching(unittest.TestCase):
    def setUp(self):
        self.slurm = Slurm(self)
        self.master = start_master("--timeout", 8)
        self.addCleanup(self.master.stop)

    def watch(self, *flags):
        watcher = self.slurm.watch(self.master, *flags)
        self.addCleanup(watcher.stop)
        return watcher

    def rows(self):
        return sorted((node["node"], node["job"]) for node in nodes(self.master.page))

    def job(self, name="7"):
        told = json.loads(support.get(self.master.page, "/api/jobs").text)
        return {job["job"]: job for job in told["jobs"]}[name]


class Endings(Watching):
    def test_a_death_is_told_when_the_agents_have_left_without_another_look(self):
        self.slurm = Slurm(self, LOOK_SECONDS=600.0)
        self.slurm.write("queue", row(nodes="c[1-2]"))
        self.slurm.write("job.7", details(nodes=["c1", "c2"]))
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7"), ("c2", "7")])
        self.slurm.write("job.7", details(state="COMPLETING"))
        asked = len(self.slurm.calls("scontrol"))
        for pid in support.descendants(watcher.pid):
            words = command_line(pid).split(b"\0")
            if b"--lifeline" in words and words[0] == os.fsencode(sys.executable):
                os.kill(pid, signal.SIGTERM)
        eventually(lambda: len(self.slurm.calls("scontrol")) > asked)
        self.assertEqual(self.job()["state"], "RUNNING")
        self.slurm.write("job.7", ended("OUT_OF_MEMORY", "0:125", "0:125"))
        eventually(lambda: self.job()["state"] == "OUT_OF_MEMORY")
        told = self.job()
        self.assertEqual((told["exit"], told["derived_exit"]), ("0:125", "0:125"))
        self.assertEqual(len(self.slurm.calls("squeue")), 1)
        self.assertIn("-d show job 7", self.slurm.calls("scontrol"))

    def test_the_exit_code_of_a_job_that_had_ended_before_is_asked_once_and_stays(self):
        self.slurm.write("queue", row(state="FAILED"))
        self.slurm.write("job.7", ended("FAILED", "3:0", "3:0"))
        self.watch()
        eventually(lambda: self.job()["exit"] == "3:0")
        looks = len(self.slurm.calls("squeue"))
        eventually(lambda: len(self.slurm.calls("squeue")) > looks + 3)
        told = self.job()
        self.assertEqual((told["state"], told["exit"]), ("FAILED", "3:0"))
        self.assertEqual(len(self.slurm.calls("scontrol")), 1)

    def test_who_cancelled_a_job_and_what_failed_first_is_asked_of_accounting(self):
        self.slurm.write("queue", row(state="CANCELLED"))
        self.slurm.write("job.7", ended("CANCELLED", "0:0", "3:0"))
        # accounting lags behind: it does not know yet, and is asked again
        self.slurm.write("accounts", "7|RUNNING|0:0|Unknown|train\n")
        self.watch()
        eventually(lambda: self.slurm.calls("sacct"))
        self.slurm.write(
            "accounts",
            "7|CANCELLED by 0|0:0|%s|train\n7.0|FAILED|3:0|%s|solve\n"
            % (stamp(5), stamp(9)),
        )
        eventually(lambda: self.job()["cancelled_by"] == "root")
        told = self.job()
        self.assertEqual(told["failed_step"], "step 0 (solve): exit code 3")
        self.assertEqual((told["state"], told["derived_exit"]), ("CANCELLED", "3:0"))

    def test_a_job_that_scontrol_has_forgotten_is_told_as_accounting_does(self):
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        self.slurm.write("accounts", "7|TIMEOUT|0:0|%s|train\n" % stamp(5))
        os.unlink(os.path.join(self.slurm.folder, "job.7"))
        self.slurm.write("queue", "")
        eventually(lambda: self.job()["state"] == "TIMEOUT")

    def test_where_there_is_no_accounting_it_is_asked_once(self):
        self.slurm.write("queue", "".join(row(job, "FAILED") for job in "789"))
        for job in "789":
            self.slurm.write("job." + job, ended("FAILED", "3:0", "3:0", job=job))
        self.watch()
        for job in "789":
            eventually(lambda job=job: self.job(job)["exit"] == "3:0")
        asked = len(self.slurm.calls("sacct"))
        self.assertLessEqual(asked, 3)
        looks = len(self.slurm.calls("squeue"))
        eventually(lambda: len(self.slurm.calls("squeue")) > looks + 3)
        self.assertLessEqual(len(self.slurm.calls("sacct")), 3)
        self.slurm.write("queue", row("6", "FAILED"))
        self.slurm.write("job.6", ended("FAILED", "4:0", "4:0", job="6"))
        eventually(lambda: self.job("6")["exit"] == "4:0")
        self.assertLessEqual(len(self.slurm.calls("sacct")), 3)


class LoginShells(Watching):
    """What a login shell prints before the herd speaks."""

    def test_lines_that_look_like_the_herds_do_no_harm(self):
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        ssh = self.slurm.write("ssh", SSH)
        os.chmod(ssh, stat.S_IRWXU)
        watcher = self.watch("--ssh", "login")
        eventually(lambda: self.rows() == [("c1", "7")])
        os.kill(herd_of(watcher), signal.SIGKILL)
        watcher.logged("the herd ended: trying again until it answers", BUSY)
        self.assertNotIn("Welcome", watcher.log)
        self.assertNotIn("ghost", watcher.log)

    def test_a_login_that_only_talks_is_told_by_its_last_line(self):
        ssh = self.slurm.write(
            "ssh", "#!/bin/sh\necho This account may only use sftp.\nexit 1\n"
        )
        os.chmod(ssh, stat.S_IRWXU)
        with self.slurm.watch(self.master, "--ssh", "login") as watcher:
            self.assertEqual(watcher.wait(BUSY), 1)
            self.assertIn("error: This account may only use sftp.", watcher.log)

    def test_what_ssh_itself_complains_of_is_one_line_with_the_cure(self):
        ssh = self.slurm.write(
            "ssh",
            "#!/bin/sh\necho hm >&2\n"
            "echo ssh: Could not resolve hostname login: Name not known >&2\nexit 255\n",
        )
        os.chmod(ssh, stat.S_IRWXU)
        with self.slurm.watch(self.master, "--ssh", "me@login") as watcher:
            self.assertEqual(watcher.wait(BUSY), 1)
            (line,) = watcher.log.splitlines()
        self.assertRegex(
            line,
            "error: ssh: Could not resolve hostname login: Name not known: "
            "first see that `ssh me@login true` works$",
        )


class Herding(Watching):
    def test_a_running_job_is_there_with_what_its_step_does_not_know(self):
        self.slurm.write("queue", row(nodes="c[1-2]"))
        self.slurm.write("job.7", details(nodes=["c1", "c2"]))
        self.watch()
        eventually(lambda: self.rows() == [("c1", "7"), ("c2", "7")])
        eventually(lambda: nodes(self.master.page)[0]["job_time_left"])
        node = nodes(self.master.page)[0]
        self.assertEqual((node["job_name"], node["job_cpus"]), ("train|it", 2))
        self.assertAlmostEqual(node["job_time_left"], 500, delta=30)
        (call,) = self.slurm.calls("srun")
        self.assertIn(
            "--jobid=7 --overlap --mem=0 --immediate=10 --job-name=sentinel", call
        )
        self.assertEqual(call.split()[-1:], ["SLURM_CONF"])
        self.assertNotIn("SLURM_CPUS_PER_TASK", call)

    def test_a_job_that_starts_later_is_found(self):
        self.watch()
        eventually(lambda: self.slurm.calls("squeue"))
        self.slurm.write("job.7", details())
        self.slurm.write("queue", row())
        eventually(lambda: self.rows() == [("c1", "7")])

    def test_only_the_jobs_that_were_asked_for_are_attached_to(self):
        self.slurm.write("queue", row("7") + row("8", nodes="c2"))
        self.slurm.write("job.8", details("8", nodes=["c2"]))
        self.watch("8")
        eventually(lambda: self.rows() == [("c2", "8")])
        self.assertEqual(len(self.slurm.calls("srun")), 1)

    def test_a_job_younger_than_twenty_seconds_is_left_alone(self):
        self.slurm.write("queue", row("7", age=2) + row("8", nodes="c2"))
        self.slurm.write("job.7", details("7"))
        self.slurm.write("job.8", details("8", nodes=["c2"]))
        self.watch()
        eventually(lambda: self.rows() == [("c2", "8")])
        self.assertEqual(len(self.slurm.calls("srun")), 1)

    @support.slow("thirty steps")
    def test_of_forty_jobs_thirty_are_attached_to_and_the_rest_is_named(self):
        self.slurm = Slurm(self, ATTACH_SECONDS=60.0)
        self.slurm.write("srun.mode", "hang")
        queue = "".join(row(str(number)) for number in range(100, 140))
        self.slurm.write("queue", queue)
        for number in range(100, 140):
            self.slurm.write("job.%d" % number, details(str(number)))
        watcher = self.watch()
        watcher.logged(r"10 more run unwatched: --my-jobs 130,131", BUSY)
        eventually(lambda: len(self.slurm.calls("srun")) == 30)

    @support.slow("waits for looks")
    def test_a_squeue_that_fails_is_told_once_and_asked_again_later(self):
        self.slurm.write("squeue.mode", "fail")
        watcher = self.watch()
        watcher.logged(
            "squeue: slurm_load_jobs error: Unable to contact slurm controller", BUSY
        )
        eventually(lambda: len(self.slurm.calls("squeue")) >= 3)
        self.assertEqual(watcher.log.count("Unable to contact"), 1)
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        self.slurm.write("squeue.mode", "")
        eventually(lambda: self.rows() == [("c1", "7")])

    @support.slow("waits for limits")
    def test_a_squeue_that_hangs_is_given_up_and_asked_again_later(self):
        self.slurm = Slurm(self, QUESTION_SECONDS=3.0)
        self.slurm.write("squeue.mode", "hang")
        watcher = self.watch()
        watcher.logged(r"squeue gave no answer in \d+ s", BUSY)
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        self.slurm.write("squeue.mode", "")
        eventually(lambda: self.rows() == [("c1", "7")])

    def test_where_a_step_of_two_nodes_fails_each_node_has_one(self):
        self.slurm.write("srun.mode", "interconnect")
        self.slurm.write("queue", row(nodes="c[1-2]"))
        self.slurm.write("job.7", details(nodes=["c1", "c2"]))
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7"), ("c2", "7")])
        watcher.logged(
            r"cannot attach \(.*error configuring interconnect\): one step a node", BUSY
        )
        self.assertEqual(len(self.slurm.calls("srun")), 3)

    @support.slow("waits for each rung")
    def test_where_gpus_cannot_be_shared_the_step_asks_for_none(self):
        self.slurm.write("srun.mode", "gres")
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        watcher.logged(r"cannot attach \(.*generic resource.*\): without GPUs", BUSY)
        self.assertEqual(len(self.slurm.calls("srun")), 2)

    @support.slow("waits for each rung")
    def test_after_the_last_rung_nothing_is_tried_for_a_while(self):
        with contextlib.ExitStack() as stack:  # all at once: they wait
            watchers = []
            # on a busy machine srun takes its time to refuse
            for mode, reason, seconds, pause in (
                ("never", "denied", 20.0, 300),
                ("timeout", "timed out", 20.0, 30),
                ("hang", "no answer in", 1.5, 30),
            ):
                slurm = Slurm(self, ATTACH_SECONDS=seconds)
                slurm.write("srun.mode", mode)
                slurm.write("queue", row(nodes="c[1-2]"))
                slurm.write("job.7", details(nodes=["c1", "c2"]))
                watcher = stack.enter_context(slurm.watch(self.master))
                watchers.append((slurm, watcher, reason, pause))
            for slurm, watcher, reason, pause in watchers:
                with self.subTest(reason):
                    self.assert_three_rungs(slurm, watcher, reason, pause)

    def assert_three_rungs(self, slurm, watcher, reason, pause):
        refused = r"cannot attach \(.*%s.*\): " % reason
        watcher.logged(refused + "one step a node", BUSY)
        watcher.logged(refused + "without GPUs", BUSY)
        watcher.logged(r"cannot attach .*: the next try is in %d s" % pause, BUSY)
        seen = len(slurm.calls("squeue"))
        eventually(lambda: len(slurm.calls("squeue")) > seen + 2)
        self.assertEqual(len(slurm.calls("srun")), 4)
        self.assertEqual(watcher.log.count("cannot attach"), 3)

    def test_a_slow_node_is_waited_for_longer_each_time(self):
        self.slurm = Slurm(self, ATTACH_SECONDS=1.0, SLOW_RETRY_SECONDS=0.5)
        self.slurm.write("srun.mode", "slow")
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        watcher.logged(
            r"cannot attach \(no answer in \d s\): the next try is in 0 s", BUSY
        )

    def test_where_scontrol_is_slow_srun_is_given_more_time_at_once(self):
        self.slurm = Slurm(self, ATTACH_SECONDS=1.0)
        self.slurm.write("srun.mode", "slow")
        self.slurm.write("scontrol.mode", "2")
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        self.assertEqual(len(self.slurm.calls("srun")), 1)
        self.assertNotIn("cannot attach", watcher.log)

    def test_nothing_is_left_whichever_half_is_killed(self):
        self.slurm.write("queue", row(nodes="c[1-2]"))
        self.slurm.write("job.7", details(nodes=["c1", "c2"]))
        victims = ["relay", "herd", "SIGTERM"]
        if support.LONG:
            victims += ["SIGINT", "SIGHUP"]
        for victim in victims:
            with self.subTest(victim):
                watcher = self.slurm.watch(self.master)
                self.addCleanup(watcher.kill)
                eventually(lambda: self.rows() == [("c1", "7"), ("c2", "7")])
                family = support.descendants(watcher.pid)
                self.assertGreaterEqual(len(family), 4)
                if victim == "herd":
                    herd = herd_of(watcher)
                    steps = [pid for pid in family if pid != herd]
                    os.kill(herd, signal.SIGKILL)
                    eventually(lambda: not any(map(support.alive, steps)))  # noqa: B023
                    herd_of(watcher)  # a new one is at work
                    eventually(lambda: len(self.rows()) == 2)
                    watcher.send_signal(signal.SIGTERM)
                    self.assertEqual(watcher.wait(BUSY), 0)
                elif victim == "relay":
                    os.kill(watcher.pid, signal.SIGKILL)
                else:
                    watcher.send_signal(getattr(signal, victim))
                    self.assertEqual(watcher.wait(BUSY), 0)
                eventually(lambda: not any(map(support.alive, family)))  # noqa: B023
                eventually(lambda: not self.rows())

    @support.slow("waits for limits")
    def test_a_relay_that_falls_silent_leaves_no_step_and_is_back_when_it_wakes(self):
        """As a laptop that was cut off, or sleeps: its ssh stays open on the other side."""
        self.slurm = Slurm(self, DEAF_SECONDS=5.0)
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        family = support.descendants(watcher.pid)
        watcher.send_signal(signal.SIGSTOP)
        eventually(lambda: not any(map(support.alive, family)))
        watcher.send_signal(signal.SIGCONT)
        eventually(lambda: self.rows() == [("c1", "7")])
        self.assertNotEqual(support.descendants(watcher.pid), family)

    def test_a_herd_whose_output_nobody_takes_ends(self):
        """Behind a cable that is cut ssh takes as much as its window holds, and then nothing."""
        self.slurm = Slurm(self, DEAF_SECONDS=2.0)
        queue = "".join(row(str(number), "PENDING") for number in range(1000))
        self.slurm.write("queue", queue)
        path = self.slurm.folder + os.pathsep + os.environ["PATH"]
        herd = subprocess.Popen(
            [sys.executable, self.slurm.agent, "--herd"],
            env=dict(os.environ, PATH=path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.addCleanup(herd.communicate)
        self.addCleanup(herd.kill)
        self.assertEqual(herd.wait(BUSY), 0)
        self.assertTrue(self.slurm.calls("squeue"))

    @support.slow("another Python")
    def test_the_oldest_python_herds_and_is_all_that_a_node_has(self):
        version, python = min(support.pythons().items())
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        os.symlink(python, os.path.join(folder, "python3"))
        os.unlink(os.path.join(self.slurm.folder, "python3"))
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        path = folder + os.pathsep + os.environ["PATH"]
        with self.slurm.watch(self.master, path=path, python=python):
            eventually(lambda: self.rows() == [("c1", "7")], what=str(version))

    def test_a_master_with_a_secret_takes_what_the_relay_proves(self):
        secret = os.path.join(self.slurm.folder, "secret")
        with start_master("--secret-file", secret) as master:
            self.slurm.write("queue", row())
            self.slurm.write("job.7", details())
            with self.slurm.watch(master, "--secret-file", secret):
                eventually(lambda: [n["job"] for n in nodes(master.page)] == ["7"])
                eventually(
                    lambda: "train|it" in support.get(master.page, "/api/jobs").text
                )

    def test_a_watcher_that_leaves_says_goodbye_for_its_nodes(self):
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        watcher.send_signal(signal.SIGTERM)
        self.assertEqual(watcher.wait(BUSY), 0)
        self.master.logged(r"finished c1 \(job 7\): no longer watched", BUSY)

    def test_a_master_that_starts_again_has_the_nodes_back(self):
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        port = self.master.port
        self.master.stop()
        self.master = start_master("--port", port)
        self.addCleanup(self.master.stop)
        eventually(lambda: self.rows() == [("c1", "7")])

    def test_no_squeue_is_one_line(self):
        os.unlink(os.path.join(self.slurm.folder, "squeue"))
        with self.slurm.watch(self.master, path="/nowhere") as watcher:
            watcher.logged("squeue: No such file or directory", BUSY)


def herd_of(watcher):
    """The pid of its herd; a process that the herd has just forked looks like it for a moment."""

    def look():
        family = support.descendants(watcher.pid)
        herds = [pid for pid in family if b"--herd" in command_line(pid)]
        return herds[0] if len(herds) == 1 else None

    return eventually(look)


def command_line(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    unittest.main()
