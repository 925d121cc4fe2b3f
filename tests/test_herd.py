"""The watcher of `agent.py --jobs`: herd and relay, with stand-ins for Slurm's commands.

The stand-ins can do what a real Slurm does only on bad days: hang, refuse, fail on the
second node.  test_lab_jobs.py has the same way with a real one.
"""

import contextlib
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import textwrap
import time
import unittest

import beside
import support  # before the tools: it knows where they are
import agent
from support import eventually, nodes, start, start_master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

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
for raw; do :; done
cat {folder}/job.$raw 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
SACCT = """\
#!/bin/sh
exec cat {folder}/sacct
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
exec {python} {folder}/tasks "$@"
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
COMMANDS = {
    "squeue": SQUEUE,
    "scontrol": SCONTROL,
    "sacct": SACCT,
    "srun": SRUN,
    "tasks": TASKS,
}
# What a busy machine must not run into is as long as in real life: ATTACH_SECONDS, DEAF_SECONDS.
HASTE = {
    "LOOK_SECONDS": 0.3,
    "LOOK_FACTOR": 0.5,
    "QUESTION_SECONDS": 1.0,
    "BACKOFF_SECONDS": 0.3,
    "GATHER_SECONDS": 0.1,
    "PING_SECONDS": 0.5,
}


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


class Slurm:
    """A folder of stand-ins, and an agent.py with short times."""

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
        self.write("queue", "")
        with open(os.path.join(support.ROOT, "agent.py"), encoding="utf-8") as file:
            text = file.read()
        for name, value in dict(HASTE, **seconds).items():
            text, count = re.subn(
                r"^%s = [\d.]+" % name, "%s = %s" % (name, value), text, flags=re.M
            )
            test.assertEqual(count, 1, name)
        self.agent = self.write("agent.py", text)

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


class Herding(unittest.TestCase):
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

    def test_a_running_job_is_there_with_what_its_step_does_not_know(self):
        self.slurm.write("queue", row(nodes="c[1-2]"))
        self.slurm.write("job.7", details(nodes=["c1", "c2"]))
        self.watch()
        eventually(lambda: self.rows() == [("c1", "7"), ("c2", "7")])
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

    def test_of_forty_jobs_thirty_are_attached_to_and_the_rest_is_named(self):
        self.slurm = Slurm(self, ATTACH_SECONDS=60.0)
        self.slurm.write("srun.mode", "hang")
        queue = "".join(row(str(number)) for number in range(100, 140))
        self.slurm.write("queue", queue)
        for number in range(100, 140):
            self.slurm.write("job.%d" % number, details(str(number)))
        watcher = self.watch()
        watcher.logged(r"10 more run unwatched: --my-jobs 130,131")
        eventually(lambda: len(self.slurm.calls("srun")) == 30)

    def test_a_squeue_that_fails_is_told_once_and_asked_again_later(self):
        self.slurm.write("squeue.mode", "fail")
        watcher = self.watch()
        watcher.logged(
            "squeue: slurm_load_jobs error: Unable to contact slurm controller"
        )
        eventually(lambda: len(self.slurm.calls("squeue")) >= 3)
        self.assertEqual(watcher.log.count("Unable to contact"), 1)
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        self.slurm.write("squeue.mode", "")
        eventually(lambda: self.rows() == [("c1", "7")])

    def test_a_squeue_that_hangs_is_given_up_and_asked_again_later(self):
        self.slurm.write("squeue.mode", "hang")
        watcher = self.watch()
        watcher.logged("squeue gave no answer in 1 s")
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
            r"cannot attach \(.*error configuring interconnect\): one step a node"
        )
        self.assertEqual(len(self.slurm.calls("srun")), 3)

    def test_where_gpus_cannot_be_shared_the_step_asks_for_none(self):
        self.slurm.write("srun.mode", "gres")
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        watcher.logged(r"cannot attach \(.*generic resource.*\): without GPUs")
        self.assertEqual(len(self.slurm.calls("srun")), 2)

    def test_after_the_last_rung_nothing_is_tried_for_five_minutes(self):
        with contextlib.ExitStack() as stack:  # both at once: they wait
            watchers = []
            for mode, reason in (("never", "denied"), ("hang", "no answer in")):
                slurm = Slurm(self, ATTACH_SECONDS=1.5)
                slurm.write("srun.mode", mode)
                slurm.write("queue", row(nodes="c[1-2]"))
                slurm.write("job.7", details(nodes=["c1", "c2"]))
                watcher = stack.enter_context(slurm.watch(self.master))
                watchers.append((slurm, watcher, reason))
            for slurm, watcher, reason in watchers:
                with self.subTest(reason):
                    self.assert_three_rungs(slurm, watcher, reason)

    def assert_three_rungs(self, slurm, watcher, reason):
        refused = r"cannot attach \(.*%s.*\): " % reason
        watcher.logged(refused + "one step a node")
        watcher.logged(refused + "without GPUs")
        watcher.logged(r"cannot attach .*: the next try is in 300 s")
        seen = len(slurm.calls("squeue"))
        eventually(lambda: len(slurm.calls("squeue")) > seen + 2)
        self.assertEqual(len(slurm.calls("srun")), 4)
        self.assertEqual(watcher.log.count("cannot attach"), 3)

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
                    (herd,) = [pid for pid in family if b"--herd" in command_line(pid)]
                    steps = [pid for pid in family if pid != herd]
                    os.kill(herd, signal.SIGKILL)
                    eventually(lambda: not any(map(support.alive, steps)))  # noqa: B023
                    eventually(lambda: len(self.rows()) == 2)  # a new herd is at work
                    self.assertEqual(watcher.stop(), 0)
                elif victim == "relay":
                    os.kill(watcher.pid, signal.SIGKILL)
                else:
                    watcher.send_signal(getattr(signal, victim))
                    self.assertEqual(watcher.wait(), 0)
                eventually(lambda: not any(map(support.alive, family)))  # noqa: B023
                eventually(lambda: not self.rows())

    def test_a_relay_that_falls_silent_leaves_no_step_and_is_back_when_it_wakes(self):
        """As a laptop that was cut off, or sleeps: its ssh stays open on the other side."""
        self.slurm = Slurm(self, DEAF_SECONDS=3.0)
        self.slurm.write("queue", row())
        self.slurm.write("job.7", details())
        watcher = self.watch()
        eventually(lambda: self.rows() == [("c1", "7")])
        family = support.descendants(watcher.pid)
        watcher.send_signal(signal.SIGSTOP)
        eventually(lambda: not any(map(support.alive, family)), 15)
        watcher.send_signal(signal.SIGCONT)
        eventually(lambda: self.rows() == [("c1", "7")])
        self.assertNotEqual(support.descendants(watcher.pid), family)

    def test_the_oldest_python_herds_and_is_all_that_a_node_has(self):
        version, python = min(support.pythons().items())
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        os.symlink(python, os.path.join(folder, "python3"))
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
        self.assertEqual(watcher.stop(), 0)
        self.master.logged(r"finished c1 \(job 7\): no longer watched")

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
            watcher.logged("squeue: No such file or directory")


def command_line(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    unittest.main()
