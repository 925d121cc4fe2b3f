"""Jobs that know nothing of us, watched from one command: real Slurm, real sshd (lab.sh).

sshd forwards no TCP here, and of what the compute nodes send to the login node only Slurm's
own passes, as where Solutions A and B cannot work.
"""

import contextlib
import json
import os
import signal
import time
import unittest

import support
import test_lab_job
from support import eventually

SPIN = "#!/bin/bash\nsrun --ntasks=$SLURM_NNODES timeout 600 python3 -c 'while True: pass'\n"
ASK = (
    "import sys, urllib.request;"
    " url = 'http://127.0.0.1:%s%s' % (sys.argv[1], sys.argv[2]);"
    " print(urllib.request.urlopen(url, timeout=5).read().decode())"
)
ONLY_SLURM = (
    "add table ip jobs;"
    " add chain ip jobs way {type filter hook output priority 0;};"
    " add rule ip jobs way ip daddr 10.77.2.1 tcp dport != {6817, 60001-60999}"
    " tcp flags & (syn|ack) == syn drop"
)
QUIET = """\
#!/bin/bash
date +%s.%N
sleep 45
date +%s.%N
echo done
exit 3
"""
# What a user's .bashrc says to every ssh: some of it looks as if the herd spoke
BASHRC = """\
echo "= Welcome back"
echo '@ ghost.1-0.0 {"cpu": 1, "ram": 1, "node": "ghost"}'
printf 'modules loaded> '
"""
CUT = 60  # seconds that a cable is unplugged
TOLD = 5  # seconds from a job's end until it is told
LAB = None


def setUpModule():
    if os.environ.get("SENTINEL_TEST_ALL") != "1":
        raise unittest.SkipTest("a Slurm cluster: SENTINEL_TEST_ALL=1 runs it")
    global LAB
    LAB = test_lab_job.Lab()
    LAB.up()
    config = os.path.join(LAB.dir, "etc", "ssh", "sshd_config")
    banner = os.path.join(LAB.dir, "etc", "ssh", "banner")
    with open(banner, "w") as file:
        file.write("= Authorized use only\n! This system is monitored\n")
    with open(config, "a") as file:
        file.write("AllowTcpForwarding no\nBanner %s\n" % banner)
    LAB.run("login", "sh", "-c", "kill -HUP $(cat /run/sshd.pid)", user="root")
    # the ports on which srun hears its tasks: Slurm's own, as the controller's
    with open(os.path.join(LAB.dir, "etc", "slurm", "slurm.conf"), "a") as file:
        file.write("SrunPortRange=60001-60999\n")
    LAB.run("login", "scontrol", "reconfigure", user="root")
    for host in ("c1", "c2"):
        LAB.run(host, "nft", ONLY_SLURM, user="root")
    for name, text in (("spin.sh", SPIN), ("quiet.sh", QUIET)):
        with open(LAB.path(name), "w") as file:
            file.write(text)
        os.chmod(LAB.path(name), 0o755)


def tearDownModule():
    if LAB:
        LAB.down()


class Watched(unittest.TestCase):
    def setUp(self):
        self.addCleanup(LAB.no_jobs)

    def watch(self, host, *flags):
        master = LAB.start(host, "python3", "master_server.py", *flags)
        self.addCleanup(master.stop)
        self.host = host
        self.page = master.listening("dashboard")
        return master

    def ask(self, path):
        text = LAB.run(self.host, "python3", "-c", ASK, self.page, path)
        return json.loads(text)

    def rows(self):
        """{(job, node): row}"""
        return {
            (row["job"], row["node"]): row for row in self.ask("/api/nodes")["nodes"]
        }

    def jobs(self):
        return {job["job"]: job for job in self.ask("/api/jobs")["jobs"]}

    def steps(self):
        names = LAB.run("login", "squeue", "-s", "-h", "-o", "%j").split()
        return names.count("sentinel")

    def aged(self, *jobs):
        """Wait until the jobs run, and are no longer too young to be attached to."""
        eventually(lambda: all(LAB.queue().get(job) == "RUNNING" for job in jobs), 30)
        since = time.monotonic()
        eventually(lambda: time.monotonic() - since > 20, 30)

    def test_from_the_laptop_by_one_ssh_without_a_port_a_file_or_a_changed_script(self):
        two = LAB.sbatch(
            "-N2", "--ntasks-per-node=1", "--mem=300", "-t10", "-Jtwo", "spin.sh"
        )
        one = LAB.sbatch("-N1", "-c2", "--mem=200", "-t10", "-Jone|x", "spin.sh")
        self.aged(two, one)
        before = sorted(os.listdir(LAB.path()))
        master = self.watch("laptop", "--ssh", "login")
        three = {(two, "c1"), (two, "c2"), (one, "c1")}
        began = time.monotonic()
        eventually(lambda: set(self.rows()) == three, 20)
        self.assertLess(time.monotonic() - began, 15)
        row = eventually(
            lambda: self.rows()[one, "c1"]["job_cpu"] and self.rows()[one, "c1"]
        )
        self.assertEqual((row["job_name"], row["job_cpus"]), ("one|x", 2))
        self.assertEqual(row["job_mem_limit"], 200 * 2**20)
        self.assertTrue(400 < row["job_time_left"] < 600)
        self.assertEqual(row["job_time_limit"], 600)
        self.assertEqual(self.jobs()[two]["state"], "RUNNING")
        self.assertEqual(self.steps(), 2)
        self.assertEqual(sorted(os.listdir(LAB.path())), before)
        sessions = LAB.run("login", "pgrep", "-fc", "sshd: tester@")
        self.assertEqual(int(sessions), 1)
        listeners = LAB.run("login", "ss", "-Htlnp", user="root")
        self.assertNotIn("python", listeners)
        later = LAB.sbatch("-N1", "-c1", "--mem=100", "-t10", "-Jlater", "spin.sh")
        eventually(
            lambda: (later, "c1") in self.rows() or (later, "c2") in self.rows(), 60
        )
        LAB.run("login", "scancel", one)
        master.logged(r"finished c1 \(job %s\): SIGTERM; ran " % one, 15)
        eventually(lambda: self.jobs()[one]["state"] == "CANCELLED", 60)
        self.assertEqual(master.stop(), 0)
        eventually(lambda: self.steps() == 0, 10)

    def test_nothing_is_left_of_a_master_that_was_killed_and_the_job_never_noticed(
        self,
    ):
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "quiet.sh")
        self.aged(job)
        master = self.watch("login", "--my-jobs")
        eventually(lambda: (job, "c1") in self.rows(), 20)
        self.assertEqual(self.steps(), 1)
        # its roles may end by themselves before their turn comes
        LAB.kill("login", "master_server.py")
        eventually(lambda: self.steps() == 0, 15)
        self.assertEqual(LAB.pids("login", "agent.py"), [])
        master.kill()
        eventually(lambda: job not in LAB.queue(), 60)
        began, ended, *rest = LAB.text("slurm-%s.out" % job).split("\n")
        self.assertEqual(rest, ["done", ""])
        self.assertAlmostEqual(float(ended) - float(began), 45, delta=0.01 * 45)
        told = LAB.run("login", "scontrol", "show", "job", job)
        self.assertIn("ExitCode=3:0", told)

    def left_of_ours(self):
        """Herds, sruns and agents: their pids, as they are outside."""
        return {
            pid
            for host in ("login", "c1", "c2")
            for flag in ("--lifeline", "--herd")
            for pid in LAB.pids_with(host, flag)
        }

    def test_whichever_part_is_killed_nothing_of_it_is_left_after_ten_seconds(self):
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        both = {(job, "c1"), (job, "c2")}
        for victim, host, word in (
            ("ssh", "laptop", "ServerAliveCountMax=2"),
            ("herd", "login", "--herd"),
            ("relay", "laptop", "--jobs"),
            ("master", "laptop", "master_server.py"),
        ):
            with self.subTest(victim):
                master = self.watch("laptop", "--ssh", "login")
                eventually(lambda: set(self.rows()) == both, 30)
                before = self.left_of_ours()
                self.assertGreaterEqual(len(before), 4)
                pids = LAB.pids_with(host, word)
                self.assertTrue(pids)
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                eventually(lambda: not before & self.left_of_ours(), 12)  # noqa: B023
                if victim != "master":  # what was killed is started again
                    eventually(lambda: set(self.rows()) == both, 60)
                master.stop()
                eventually(lambda: not self.left_of_ours(), 12)
                self.assertEqual(self.steps(), 0)
        self.assertEqual(LAB.queue(), {job: "RUNNING"})

    def test_where_the_cluster_has_no_python_but_the_oldest(self):
        """Python 3.6 herds on the login node, and is all that the compute nodes have."""
        python = support.pythons().get((3, 6))
        if python is None:
            self.skipTest("missing here: Python 3.6")
        LAB.take(python)
        wrapper = LAB.path("python3.6")
        home = "/home/tester/old"
        with open(wrapper, "w") as file:
            file.write(
                '#!/bin/sh\nLD_LIBRARY_PATH=%s/lib exec %s/bin/python3.6 "$@"\n'
                % (home, home)
            )
        os.chmod(wrapper, 0o755)
        real = os.path.realpath("/usr/bin/python3")
        for host in ("login", "c1", "c2"):
            words = ("mount", "--bind", "/home/tester/python3.6", real)
            LAB.run(host, *words, user="root")
            self.addCleanup(LAB.run, host, "umount", real, user="root")
            told = LAB.run(host, "python3", "--version")
            self.assertIn("Python 3.6", told)
        job = LAB.sbatch("-N2", "--mem=100", "-t10", "quiet.sh")
        self.aged(job)
        self.watch("laptop", "--ssh", "login")
        eventually(lambda: set(self.rows()) == {(job, "c1"), (job, "c2")}, 30)
        LAB.run("login", "scancel", job)
        eventually(lambda: self.jobs()[job]["state"] == "CANCELLED", 30)

    def test_how_a_job_ended_is_told_as_slurm_says(self):
        with open(LAB.path("fail.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 30; exit 3\n")
        failing = LAB.sbatch("-N1", "--mem=100", "-t10", "fail.sh")
        waiting = LAB.sbatch("-N2", "--exclusive", "--mem=100", "-t10", "spin.sh")
        self.watch("login", "--my-jobs")
        eventually(lambda: self.jobs()[waiting]["reason"], 30)
        self.assertEqual(self.jobs()[waiting]["state"], "PENDING")
        ended = eventually(
            lambda: self.jobs()[failing]["exit"] and self.jobs()[failing], 90
        )
        self.assertEqual((ended["state"], ended["exit"]), ("FAILED", "3:0"))

    def dead(self, job, state, check):
        """The facts of a job that has died, and how long after its end they were told."""
        eventually(lambda: self.jobs()[job]["verdicts"], 60)  # it is being recorded
        with open(LAB.path(job + ".enough"), "w"):
            pass

        def look():
            facts = self.jobs()[job]
            return facts if facts["state"] == state else None

        facts = eventually(look, 90)
        late = time.time() - facts["end"]  # Slurm's clock has no parts of a second

        def judged():
            verdicts = self.jobs()[job]["verdicts"]
            return [v for v in verdicts if v["severity"] == "died"]

        verdict = eventually(judged, 30)[0]
        self.assertRegex(verdict["what"], check)
        return facts, late, time.time() - facts["end"]

    def test_a_death_is_told_and_judged_within_five_seconds(self):
        wait = "while [ ! -e $SLURM_JOB_ID.enough ]; do sleep 0.1; done\n"
        with open(LAB.path("three.sh"), "w") as file:
            file.write("#!/bin/bash\n" + wait + "exit 3\n")
        with open(LAB.path("hog.sh"), "w") as file:
            file.write(
                "#!/bin/bash\n" + wait + "exec python3 -c 'x = bytearray(1 << 30)'\n"
            )
        three = LAB.sbatch("-N1", "--mem=100", "-t10", "three.sh")
        hog = LAB.sbatch("-N1", "--mem=100", "-t10", "hog.sh")
        self.aged(three, hog)
        self.watch("login", "--my-jobs", "--record", "records")
        for job, state, code, check in (
            (three, "FAILED", "3:0", "exit code 3"),
            (hog, "OUT_OF_MEMORY", "0:125", "out of memory"),
        ):
            with self.subTest(state):
                facts, told, judged = self.dead(job, state, check)
                self.assertEqual(facts["exit"], code)
                self.assertIsNotNone(facts["derived_exit"])
                self.assertLess(told, TOLD + 1)
                self.assertLess(judged, TOLD + 1)

    def test_a_job_that_was_fine_is_told_as_fine_although_our_step_was_ended(self):
        with open(LAB.path("fine.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 30; srun true\n")
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "fine.sh")
        self.aged(job)
        self.watch("login", "--my-jobs", "--record", "records")
        eventually(lambda: (job, "c1") in self.rows(), 30)
        eventually(lambda: self.jobs()[job]["state"] == "COMPLETED", 60)
        told = self.jobs()[job]
        self.assertEqual((told["exit"], told["derived_exit"]), ("0:0", "0:0"))

    def test_what_sshd_and_a_login_shell_say_first_does_not_disturb(self):
        with open(LAB.path(".bashrc"), "w") as file:
            file.write(BASHRC)
        self.addCleanup(os.unlink, LAB.path(".bashrc"))
        said = LAB.run("laptop", "ssh", "login", "true")
        self.assertIn("= Welcome back", said)
        self.assertIn("! This system is monitored", said)
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        master = self.watch("laptop", "--ssh", "login")
        eventually(lambda: set(self.rows()) == {(job, "c1")}, 30)
        self.assertEqual(self.jobs()[job]["state"], "RUNNING")
        self.assertNotIn("Welcome", master.log)
        self.assertNotIn("monitored", master.log)
        self.assertNotIn("Traceback", master.log)

    def test_the_parts_of_a_heterogeneous_job_are_watched_each_on_its_nodes(self):
        with open(LAB.path("het.sh"), "w") as file:
            file.write("#!/bin/bash\nsleep 600\n")
        words = "-n1 --mem=100 -t10 -w c1 : -n1 --mem=120 -t10 -w c2 het.sh"
        job = LAB.sbatch(*words.split())
        self.aged(job, str(int(job) + 1))
        self.watch("login", "--my-jobs")
        both = {(job + "+0", "c1"), (job + "+1", "c2")}
        eventually(lambda: set(self.rows()) == both, 30)
        limits = [row["job_mem_limit"] / 2**20 for row in self.rows().values()]
        self.assertEqual(sorted(limits), [100, 120])
        LAB.run("login", "scancel", job)
        for part in both:
            eventually(
                lambda part=part: self.jobs()[part[0]]["state"] == "CANCELLED", 60
            )

    def test_a_job_that_reaches_its_time_limit_is_told_as_slurm_says(self):
        job = LAB.sbatch("-N1", "--mem=100", "-t1", "-Jlate", "spin.sh")
        self.aged(job)
        self.watch("login", "--my-jobs")
        eventually(lambda: (job, "c1") in self.rows(), 30)
        ended = eventually(lambda: self.jobs()[job]["exit"] and self.jobs()[job], 150)
        self.assertEqual(ended["state"], "TIMEOUT")
        self.assertTrue(60 <= ended["end"] - ended["start"] < 150)

    def test_the_cpu_time_of_a_job_is_what_the_kernel_counted(self):
        job = LAB.sbatch("-N1", "-c2", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        self.watch("login", "--my-jobs")
        node = eventually(lambda: [key[1] for key in self.rows() if key[0] == job], 30)[
            0
        ]

        def usage():
            """Nanoseconds of CPU that the job has had (cgroup v1)."""
            return int(LAB.read("cpuacct", job, "cpuacct.usage"))

        def fresh():
            """A sample that has just come: (when, CPU time so far, job_cpu)."""
            while True:
                row = self.rows()[job, node]
                if row["age"] < 0.3:
                    return time.monotonic() - row["age"], usage(), row["job_cpu"]

        def ratio():
            """What the page told of 20 s, to what the kernel counted meanwhile."""
            begin, before, _ = last, _, _ = fresh()
            told = 0.0
            while last - begin < 20:
                now, spent, share = fresh()
                if now - last > 1:  # another one
                    told += share / 100 * 2 * (now - last)  # of two CPUs
                    last = now
            return told / ((spent - before) / 1e9)

        eventually(lambda: self.rows()[job, node]["job_cpu"], 30)
        LAB.hurry(job)
        # a busy machine reads the kernel's count late: not three times in a row
        ratios = []
        while not any(abs(known - 1) < 0.02 for known in ratios):
            self.assertLess(len(ratios), 3, ratios)
            ratios.append(ratio())

    def test_a_laptop_that_is_cut_off_leaves_no_step_and_has_its_rows_back_later(self):
        job = LAB.sbatch("-N1", "--mem=100", "-t10", "spin.sh")
        self.aged(job)
        self.watch("laptop", "--ssh", "login")
        eventually(lambda: (job, "c1") in self.rows(), 20)
        LAB.must("cut", "laptop")
        try:
            eventually(lambda: self.steps() == 0, 40)
            self.assertEqual(LAB.queue(), {job: "RUNNING"})
        finally:
            LAB.must("heal", "laptop")
        eventually(lambda: (job, "c1") in self.rows(), 60)

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
        eventually(lambda: set(self.rows()) == both, 30)

    def test_a_login_that_cannot_be_reached_is_one_line_and_exit_1(self):
        master = LAB.start("laptop", "python3", "master_server.py", "--ssh", "nowhere")
        self.addCleanup(master.stop)
        self.assertEqual(master.wait(30), 1)
        self.assertRegex(master.log, r"error: .*nowhere")
        self.assertNotIn("Traceback", master.log)

    def test_a_master_whose_ssh_drops_ends_and_leaves_nothing(self):
        words = ["ssh", "-tt", "login", "python3", "master_server.py", "--with-agent"]
        ssh = LAB.start("laptop", *words)
        self.addCleanup(ssh.kill)
        eventually(lambda: LAB.pids("login", "master_server.py"), 20)
        eventually(lambda: "sentinel" in LAB.run("login", "ls", "/dev/shm"))
        LAB.run("laptop", "pkill", "-KILL", "-x", "ssh")
        eventually(lambda: not LAB.pids("login", "master_server.py"), 20)
        eventually(lambda: "sentinel" not in LAB.run("login", "ls", "/dev/shm"))

    def test_ports_of_a_colleague_are_left_alone_and_the_next_are_told(self):
        other = LAB.start("login", "python3", "master_server.py")
        self.addCleanup(other.stop)
        other.listening("dashboard")
        master = self.watch("login", "--my-jobs")
        self.assertEqual(self.page, 8081)
        self.assertEqual(master.listening("collector"), 13580)


if __name__ == "__main__":
    unittest.main()
