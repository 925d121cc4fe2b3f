"""Bad days of a cluster on which jobs are watched: real Slurm, real sshd (lab.sh).

Cables are cut, srun and squeue refuse, fail or hang, and there are more jobs than are attached to.
test_lab_jobs.py has the lab, what its jobs say, and how bounds of time are held.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest

import support
import test_lab_jobs
from support import eventually, stays

# Commands of Slurm's as they are on a bad day, in a folder of their own: their mode is in a file
BAD = """\
#!/bin/sh
cd "${{0%/*}}" || exit
echo "$(date +%s.%N) {name} $*" | head -n 1 >>{name}.calls
mode=$(cat {name}.mode)
cd || exit
case "$mode $*" in
{cases}
esac
exec /usr/bin/{name} "$@"
"""
BAD_SRUN = """\
hang*) exec sleep 300 ;;
gres*" --gres=none "*) ;;
gres*)
    echo "srun: error: Unable to create step: Invalid generic resource (gres) specification" >&2
    exit 1
    ;;
several*" --nodes=1 "*) ;;
several*)
    echo "srun: error: Task launch failed on node c2: error configuring interconnect" >&2
    exit 1
    ;;"""
BAD_SQUEUE = """\
late*) sleep 20 ;;
hang*) exec sleep 300 ;;
fail*)
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
    ;;"""
CUT = 60  # seconds that a cable is unplugged
MIB = 2**20
LAB = None


def setUpModule():
    global LAB
    test_lab_jobs.setUpModule()
    LAB = test_lab_jobs.LAB


def cpu_seconds(pid):
    """The CPU time of a process, to the nanosecond; of its threads, those that live."""
    total = 0
    for thread in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/schedstat" % (pid, thread)) as file:
            total += int(file.read().split()[0])
    return total / 1e9


def pss(pid):
    """The bytes of memory that are a process's own, proc(5)."""
    with open("/proc/%d/smaps_rollup" % pid) as file:
        return int(re.search(r"(?m)^Pss:\s+(\d+)", file.read()).group(1)) * 1024


class Cables(test_lab_jobs.Watched):
    def test_a_laptop_that_is_cut_off_leaves_nothing_and_has_its_rows_back_later(self):
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        self.watch("laptop", "--ssh", "login")
        both = {(job, "c1"), (job, "c2")}
        eventually(lambda: set(self.rows()) == both, 20)
        began = time.monotonic()
        LAB.must("cut", "laptop")
        try:
            self.within(
                30,
                "a laptop that is cut off: all is gone",
                lambda: not self.left_of_ours() and self.steps() == 0,
                began,
            )
            self.assertEqual(LAB.queue(), {job: "RUNNING"})
            eventually(lambda: time.monotonic() - began > CUT, CUT + 10)
        finally:
            LAB.must("heal", "laptop")
        self.within(
            30,
            "a cable that is healed after %d s: the rows are back" % CUT,
            lambda: set(self.rows()) == both,
        )

    def test_a_node_that_is_cut_off_is_lost_and_back_once_the_cable_is(self):
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        master = self.watch("login", "--my-jobs")
        both = {(job, "c1"), (job, "c2")}
        eventually(lambda: set(self.rows()) == both, 20)
        LAB.must("cut", "c2")
        try:
            began = time.monotonic()
            master.logged(r"c2 \(job %s\) lost: no sample" % job)
            eventually(lambda: time.monotonic() - began > CUT, CUT + 10)
        finally:
            LAB.must("heal", "c2")
        self.within(
            30,
            "a node's cable is healed: its row is back",
            lambda: set(self.rows()) == both,
        )

    def test_after_a_cut_that_takes_a_password_it_is_told_once_and_nothing_is_asked(
        self,
    ):
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "-w", "c1", "spin.sh")
        self.aged(job)
        master = self.watch("laptop", "--ssh", "login")
        eventually(lambda: set(self.rows()) == {(job, "c1")}, 30)
        keys = LAB.path(".ssh", "authorized_keys")
        os.rename(keys, keys + ".away")
        self.addCleanup(os.rename, keys + ".away", keys)
        sessions = self.accepted()
        for pid in LAB.pids_with("laptop", "ServerAliveCountMax=2"):
            os.kill(pid, signal.SIGKILL)
        line = r"Permission denied .*: nothing is asked for in the background: start it"
        master.logged(line, 60)
        self.within(10, "no step is left", lambda: self.steps() == 0)
        stays(lambda: len(LAB.pids_with("laptop", "ServerAliveCountMax=2")) == 0, 10)
        self.assertEqual(master.log.count("Permission denied"), 1)
        self.assertEqual(self.accepted(), sessions)
        self.assertIsNone(master.code)

    @staticmethod
    def accepted():
        """How often sshd has let somebody in."""
        with open(os.path.join(LAB.dir, "login", "sshd.log")) as file:
            return file.read().count("Accepted publickey")

    def give_passphrase(self, words):
        """Have the laptop's ssh ask for it on the terminal, where there is one."""
        folder = "/home/tester/.ssh/"
        change = ["ssh-keygen", "-q", "-p", "-f", folder + "id_ed25519"]
        LAB.run("laptop", *change, "-P", "", "-N", words)
        self.addCleanup(LAB.run, "laptop", *change, "-P", words, "-N", "")
        ask = "echo BatchMode no >%sconfig" % folder
        LAB.run("laptop", "sh", "-c", ask)
        self.addCleanup(LAB.run, "laptop", "rm", folder + "config")

    def test_a_passphrase_is_asked_for_once_and_on_the_terminal(self):
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "-w", "c1", "spin.sh")
        self.aged(job)
        self.give_passphrase("open sesame")
        command = "exec python3 master_server.py --ssh login"
        words = ["script", "-qfec", command, "/dev/null"]
        terminal = LAB.start("laptop", *words, stdin=subprocess.PIPE)
        self.addCleanup(terminal.process.stdin.close)
        self.addCleanup(terminal.stop)
        eventually(lambda: "Enter passphrase for key" in terminal.out)
        terminal.process.stdin.write(b"open sesame\n")
        terminal.process.stdin.flush()
        page = r"dashboard listening on \S+:(\d+)"
        self.host = "laptop"
        self.page = re.search(page, terminal.out).group(1)
        eventually(lambda: set(self.rows()) == {(job, "c1")}, 30)
        for pid in LAB.pids_with("laptop", "ServerAliveCountMax=2"):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: "nothing is asked for in the background" in terminal.out, 60)
        self.assertEqual(terminal.out.count("Enter passphrase"), 1)


class ManyJobs(test_lab_jobs.Watched):
    def test_the_tasks_of_an_array_are_one_row_and_short_ones_are_left_alone(self):
        with open(LAB.path("tasks.sh"), "w") as file:
            file.write(
                "#!/bin/bash\n[ $SLURM_ARRAY_TASK_ID -gt 2 ] || exec sleep 600\n"
                "sleep 8; [ $SLURM_ARRAY_TASK_ID -ne 3 ] || exit 3\n"
            )
        array = LAB.sbatch("--array=1-6%4", "-n1", "--mem=50", "-t10", "tasks.sh")
        master = self.watch("login", "--my-jobs")
        two = {array + "_1", array + "_2"}
        eventually(lambda: {job for job, _ in self.rows()} == two, 60)
        for name in two:
            job = self.jobs()[name]
            self.assertGreaterEqual(time.time() - job["start"], 20)
            self.assertEqual(job["array"], array)
        eventually(
            lambda: re.search(
                r"(?m)^.*\b%s\b.* 2 running, 3 done, 1 failed" % array,
                self.get("/nodes.txt?width=200"),
            ),
            60,
        )
        told = self.jobs()[array + "_3"]
        self.assertEqual((told["state"], told["exit"]), ("FAILED", "3:0"))
        attached = re.findall(r"connected \S+ \(job (\S+)\)", master.log)
        self.assertEqual(set(attached), two)

    @support.slow("forty jobs, and a minute to see what they cost")
    def test_of_forty_jobs_thirty_are_attached_to_and_ten_are_named(self):
        """The herd's share of a core and its memory are design.md's; its sruns are told apart."""
        with open(LAB.path("wait.sh"), "w") as file:
            file.write("#!/bin/bash\nexec sleep 900\n")
        array = LAB.sbatch("--array=1-40", "-n1", "--mem=40", "-t20", "wait.sh")
        eventually(lambda: len(LAB.queue()) == 40, 60)
        self.aged(*LAB.queue())
        master = self.watch("login", "--my-jobs", "--no-record")
        eventually(lambda: len(self.rows()) == 30, 120)
        master.logged(r"10 more run unwatched: --my-jobs (%s_\d+,?){10}" % array)
        self.assertEqual(self.steps(), 30)
        self.assertIn("40 running", self.get("/nodes.txt?width=200"))
        self.assertNotIn("cannot attach", master.log)
        (herd,) = LAB.pids_with("login", "--herd")
        sruns = LAB.pids_with("login", "--lifeline")
        self.assertGreaterEqual(len(sruns), 30)
        memory = pss(herd) / MIB
        self.assertLessEqual(memory, 25)
        # where others empty the caches, the same takes longer: not three times in a row
        shares = []
        while not any(share <= 0.001 for share in shares):
            self.assertLess(len(shares), 3, shares)
            share, others = self.cost(herd, sruns, 45)
            shares.append(share)
            print(
                "    herd: %.3f %% of a core, %.1f MiB; its sruns: %.3f %%, %.0f MiB"
                % (100 * share, memory, 100 * others, sum(map(pss, sruns)) / MIB),
                file=sys.stderr,
            )
        self.assertEqual(self.steps(), 30)
        # where one of the thirty has gone, one of the ten follows
        gone = sorted(job for job, _ in self.rows())[:3]
        LAB.run("login", "scancel", *gone)
        eventually(
            lambda: (
                len(self.rows()) == 30
                and not {job for job, _ in self.rows()} & set(gone)
            ),
            60,
        )

    def cost(self, herd, sruns, seconds):
        """The shares of a core that the herd and its sruns take."""

        def spent():
            return cpu_seconds(herd), sum(map(cpu_seconds, sruns))

        began, before = time.monotonic(), spent()
        eventually(lambda: time.monotonic() - began > seconds, seconds + 10)
        passed = time.monotonic() - began
        return [(now - then) / passed for now, then in zip(spent(), before)]


class BadCommands(test_lab_jobs.Watched):
    def stand_ins(self, name, **modes):
        """A folder with a srun or a squeue in that mode, which `watch_with` finds first."""
        folder = LAB.path(name)
        os.mkdir(folder)
        self.addCleanup(shutil.rmtree, folder)
        for command, cases in (("srun", BAD_SRUN), ("squeue", BAD_SQUEUE)):
            if command in modes:
                path = os.path.join(folder, command)
                with open(path, "w") as file:
                    file.write(BAD.format(name=command, cases=cases))
                os.chmod(path, 0o755)
                self.set_mode(folder, command, modes[command])
        os.chmod(folder, 0o777)
        return folder

    @staticmethod
    def set_mode(folder, command, mode):
        with open(os.path.join(folder, command + ".mode"), "w") as file:
            file.write(mode)

    @staticmethod
    def calls(folder, command):
        """When a stand-in was called: [time.time()]."""
        text = LAB.text(os.path.join(folder, command + ".calls"))
        return [float(line.split()[0]) for line in text.splitlines()]

    def watch_with(self, name, job, **modes):
        """A master on the login node that watches that job with these stand-ins.

        What comes back: (its log's Tool, the folder, a function that returns its rows).
        """
        folder = self.stand_ins(name, **modes)
        path = "PATH=/home/tester/%s:/usr/local/bin:/usr/bin:/bin" % name
        words = ["env", path, "python3", "master_server.py", "--no-record"]
        master = LAB.start("login", *words, "--my-jobs", job)
        self.addCleanup(master.stop)
        page = master.listening("dashboard")

        def rows():
            self.host, self.page = "login", page
            return set(self.rows())

        return master, folder, rows

    def test_each_rung_is_taken_once_and_told_in_one_line(self):
        """srun refuses --gres, fails for more than one node, or hangs; the rest of it is real.

        All at once: the one that hangs takes a minute.
        """
        kinds = ("gres", "several", "hang")
        jobs = [LAB.sbatch("-N2", "--mem=100", "-t10", "spin.sh") for _ in kinds]
        self.aged(*jobs)
        watched = {
            kind: (job, *self.watch_with("srun-" + kind, job, srun=kind))
            for kind, job in zip(kinds, jobs)
        }
        one_a_node = r"cannot attach \(.*%s.*\): one step a node"
        without = r"cannot attach \(.*%s.*\): without GPUs"
        later = r"cannot attach \(.*%s.*\): the next try is in 30 s"
        for kind, reason, lines, calls in (
            ("gres", "generic resource", (one_a_node, without), 4),
            ("several", "interconnect", (one_a_node,), 3),
            ("hang", "no answer in 20 s", (one_a_node, without, later), 4),
        ):
            with self.subTest(kind):
                job, master, folder, rows = watched[kind]
                for line in lines:
                    master.logged(line % reason, 60)
                if kind != "hang":
                    both = {(job, "c1"), (job, "c2")}
                    eventually(lambda rows=rows, both=both: rows() == both, 30)
                self.assertEqual(master.log.count("cannot attach"), len(lines))
                self.assertEqual(len(self.calls(folder, "srun")), calls)
        # a minute has passed since the first two have climbed down: nothing was tried again
        for kind, calls in (("gres", 4), ("several", 3)):
            job, master, folder, rows = watched[kind]
            self.assertEqual(rows(), {(job, "c1"), (job, "c2")})
            self.assertEqual(len(self.calls(folder, "srun")), calls)
        # what hangs is tried on one rung only, once more, when the time has come
        job, master, folder, rows = watched["hang"]
        self.set_mode(folder, "srun", "mended")
        both = {(job, "c1"), (job, "c2")}
        eventually(lambda: rows() == both, 60)
        times = self.calls(folder, "srun")
        self.assertEqual(len(times), 5)
        self.assertGreater(times[4] - times[3], 20 + 29)

    def test_a_squeue_that_is_late_fails_or_hangs_is_one_line_and_asked_rarely(self):
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "-w", "c1", "spin.sh")
        self.aged(job)
        began = time.monotonic()
        late, failing, hanging = (
            self.watch_with("squeue-" + mode, job, squeue=mode)
            for mode in ("late", "fail", "hang")
        )
        there = {(job, "c1")}
        master, folder, rows = late
        self.within(
            20 + 5, "a squeue that takes 20 s: the row", lambda: rows() == there, began
        )
        master, folder, rows = failing
        line = r"Unable to contact slurm controller \(connect failure\): "
        master.logged(line + "the next look is in 30 s")
        eventually(lambda: len(self.calls(folder, "squeue")) == 2, 60)
        self.set_mode(folder, "squeue", "mended")
        eventually(lambda: rows() == there, 60)
        self.assertEqual(master.log.count("Unable to contact"), 1)
        times = self.calls(folder, "squeue")
        self.assertGreater(times[1] - times[0], 29)
        self.assertLess(times[2] - times[0], 3 * 30)
        master, folder, rows = hanging
        master.logged(r"squeue gave no answer in 2\d s: the next look is in 5\d\d s")
        self.assertEqual(master.log.count("gave no answer"), 1)
        # more than a minute has passed: a fast squeue would have been asked three times
        self.assertGreater(time.monotonic() - began, 60)
        for _, folder, _ in (late, hanging):
            self.assertEqual(len(self.calls(folder, "squeue")), 1)


if __name__ == "__main__":
    unittest.main()
