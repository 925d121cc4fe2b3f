"""What the agent knows of a job beyond CPU and memory, and of nodes of other kinds.

Bytes of its processes, NFS, Lustre, InfiniBand; its peak and its deaths as the kernel counts them;
jobs of other schedulers.  Trees of tests/proc, and what this machine's kernel has for real.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unittest
from unittest import mock

import support
from support import eventually
from test_agent import SLURM, copy_of, sample_of, tree
from test_agent_link import DummyServer, start_agent

sys.path.insert(0, support.ROOT)
import agent

GIB = 2**30
V1 = "sys/fs/cgroup/memory/slurm_c1/uid_4242/job_3"
V2 = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_900"


def rates_of(sampler, *names, change=lambda: None):
    """What these readers yield for one second in which `change` happened."""
    readers = [getattr(sampler, name) for name in names]
    now = mock.Mock(return_value=100.0)
    with mock.patch.object(agent.time, "monotonic", now):
        agent.collect(readers)
        change()
        now.return_value = 101.0
        return agent.collect(readers)


def replace(probe, path, old, new):
    """Change a text in a file of a tree."""
    with open(probe.where(path)) as file:
        text = file.read()
    assert old in text, (path, old)
    with open(probe.where(path), "w") as file:
        file.write(text.replace(old, new))


class Clock:
    """In the place of the module time: the third sleep() ends the test's loop."""

    def __init__(self):
        self.now = 0.0
        self.slept = []  # seconds

    def monotonic(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds
        return ()

    def sleep(self, seconds):
        self.slept.append(seconds)
        if len(self.slept) == agent.EARLY_ROUNDS:
            raise InterruptedError


class Nodes(unittest.TestCase):
    """Trees of nodes of other kinds, read as a whole."""

    def test_a_container_in_which_more_is_available_than_it_has(self):
        sample = sample_of("lxc")
        self.assertEqual((sample["ram"], sample["swap"]), (37.5, 25.0))
        self.assertEqual((sample["cpus"], sample["psi_cpu"]), (2, 0.31))
        self.assertIn("net_rx", sample)
        self.assertFalse([key for key in sample if key.startswith(("job", "disk"))])

    def test_a_kernel_of_rhel_7_without_memavailable(self):
        sample = sample_of("rhel7", **dict(SLURM, SLURM_JOB_CPUS_PER_NODE="4"))
        free = 20211812 + 189212 + 6120344 + 640120 - 22268  # KiB
        self.assertEqual(sample["ram"], round(100 * (1 - free / 32779460), 1))
        self.assertEqual((sample["cpus"], sample["job_cpus"]), (4, 4))
        self.assertEqual((sample["job_mem"], sample["job_cache"]), (2 * GIB, GIB))
        self.assertEqual((sample["job_ram"], sample["job_cpu"]), (50.0, 0.0))
        self.assertFalse([key for key in sample if key.startswith("psi")])

    def test_a_node_with_arm_processors(self):
        sample = sample_of("arm", **dict(SLURM, SLURM_JOB_CPUS_PER_NODE="48"))
        self.assertEqual((sample["cpus"], sample["ram"]), (48, 69.6))
        self.assertEqual((sample["job_mem"], sample["job_ram"]), (20 * GIB, 71.4))
        self.assertNotIn("swap", sample)

    def test_nodes_of_256_and_of_1024_threads(self):
        for threads in (256, 1024):
            probe, write = copy_of(self, "arm")
            rows = []
            total = [0] * 10
            for thread in range(threads):
                row = [90210114 + thread, 12, 1204411, 8804112, 91, 0, 4411, 0, 0, 0]
                total = [sum(pair) for pair in zip(total, row)]
                rows.append("cpu%d %s" % (thread, " ".join(map(str, row))))
            cpu = "cpu  " + " ".join(map(str, total))
            irqs = "intr 88120334" + " 120114" * 8000
            write("proc/stat", "\n".join([cpu, *rows, irqs, "ctxt 1", ""]))
            group = V2 + "/step_1/user/task_0"
            first = (
                5000000  # no process here has such a pid, which the agent leaves out
            )
            pids = range(first, first + threads)
            write(group + "/cgroup.procs", "".join("%d\n" % pid for pid in pids))
            for pid in pids:
                os.mkdir(probe.where("proc/%d" % pid))
                write("proc/%d/io" % pid, "rchar: 1000\nwchar: 7\n")
            with self.subTest(threads):
                sampler = agent.Sampler(probe)
                self.assertEqual(sampler.sample()["cpus"], threads)
                self.assertEqual(sampler.sample()["cpu"], 91.2)
                self.assertEqual(len(sampler.job_processes()), threads + 2)

                def change(write=write, first=first):
                    write("proc/%d/io" % first, "rchar: 4000\nwchar: 7\n")

                known = rates_of(sampler, "read_job_io", change=change)
                self.assertEqual((known["job_read"], known["job_write"]), (3000.0, 0.0))


class Memory(unittest.TestCase):
    def test_the_peak_is_the_kernels_in_v1_and_in_v2(self):
        for kind, peak in (
            ("slurm-v1", 629145600),
            ("rhel7", 4294967296),
            ("arm", 27 * GIB),
        ):
            self.assertEqual(sample_of(kind, **SLURM)["job_mem_peak"], peak, kind)
        self.assertNotIn("job_mem_peak", sample_of("slurm-v2", **SLURM))  # before 5.19

    def test_kills_and_hits_of_the_limit_are_counted_where_the_kernel_does(self):
        for kind, kills, hits in (
            ("slurm-v1", 1, 17),
            ("arm", 2, 41),
            ("rhel7", None, 318),
            ("slurm-v2", None, None),
        ):
            with self.subTest(kind):
                sample = sample_of(kind, **SLURM)
                self.assertEqual(sample.get("oom_kill"), kills)
                self.assertEqual(sample.get("job_mem_failcnt"), hits)

    def test_kills_in_the_leaves_of_v1_are_summed_and_those_of_a_leaf_that_is_gone_stay(
        self,
    ):
        probe, write = copy_of(self, "slurm-v1")
        for task, kills in (("1", 2), ("2", 0)):
            os.makedirs(probe.where(V1 + "/step_0/task_" + task))
            path = V1 + "/step_0/task_%s/memory.oom_control" % task
            write(path, "oom_kill_disable 0\nunder_oom 0\noom_kill %d\n" % kills)
        sampler = agent.Sampler(probe)
        self.assertEqual(
            sampler.sample()["oom_kill"], 1
        )  # its own leaf is known at once
        agent.collect([sampler.find_groups])
        self.assertEqual(sampler.sample()["oom_kill"], 3)
        write(path, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        self.assertEqual(sampler.sample()["oom_kill"], 4)
        shutil.rmtree(probe.where(V1 + "/step_0"))
        for _ in range(2):
            agent.collect([sampler.find_groups])
            self.assertEqual(sampler.sample()["oom_kill"], 4)

    def test_where_a_leaf_of_v1_is_gone_after_the_limit_was_hit_no_kill_is_not_known(
        self,
    ):
        told = "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"
        for refused, is_listed, known in (
            (7, False, 0),
            (8, False, None),
            (8, True, None),
        ):
            probe, write = copy_of(self, "slurm-v1")
            write(V1 + "/memory.failcnt", "7\n")
            for leaf in ("/step_batch/task_0", "/step_0/task_1"):
                os.makedirs(probe.where(V1 + leaf), exist_ok=True)
                write(V1 + leaf + "/memory.oom_control", told)
            sampler = agent.Sampler(probe)
            agent.collect([sampler.find_groups])
            self.assertEqual(sampler.sample()["oom_kill"], 0)
            write(V1 + "/memory.failcnt", "%d\n" % refused)
            shutil.rmtree(probe.where(V1 + "/step_0"))
            if is_listed:
                agent.collect([sampler.find_groups])
            with self.subTest(refused=refused, is_listed=is_listed):
                self.assertEqual(sampler.sample().get("oom_kill"), known)
                self.assertEqual(sampler.sample().get("oom_kill"), known)

    def test_of_many_leaves_few_are_kept_open_and_all_are_counted(self):
        probe, write = copy_of(self, "slurm-v1")
        for task in range(100):
            os.makedirs(probe.where(V1 + "/step_0/task_%d" % task))
            path = V1 + "/step_0/task_%d/memory.oom_control" % task
            write(path, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        sampler = agent.Sampler(probe)
        agent.collect([sampler.find_groups])
        self.assertEqual(sampler.sample()["oom_kill"], 101)
        kept = [path for path in probe.open_files if "oom_control" in path]
        self.assertLessEqual(len(kept), agent.MAX_KEPT_GROUPS)

    def test_the_report_tells_the_kernels_peak_beside_ours_and_its_kills(self):
        report = agent.Report()
        last = {"cpu": 1.0, "job_cpu": 1.0, "job_cpus": 2, "mem_total": 64 * GIB}
        last.update(job_mem=GIB, mem_used=1.0, job_mem_limit=2 * GIB)
        report.add(last, 10.0)
        lines = list(report.lines(dict(last, job_mem_peak=1.5 * GIB, oom_kill=0)))
        self.assertIn("memory peak 1 GB of 2 GB", lines)
        self.assertIn("the kernel's peak, with page cache, 1.5 GB", lines)
        self.assertNotIn("kernel killed", "; ".join(lines))
        lines = list(report.lines(dict(last, oom_kill=2)))
        self.assertNotIn("the kernel's peak", "; ".join(lines))
        self.assertIn("out of memory: the kernel killed 2 processes", lines)


class Bytes(unittest.TestCase):
    def test_what_the_processes_of_the_job_read_and_write_is_summed(self):
        for kind, path, old in (
            ("rhel7", "proc/4412/io", ("rchar: 3000000", "wchar: 400000")),
            ("arm", "proc/5102/io", ("rchar: 300\n", "wchar: 0\n")),
        ):
            probe, _ = copy_of(self, kind)

            def change(probe=probe, path=path, old=old):
                replace(probe, path, old[0], "rchar: 3005000\n")
                replace(probe, path, old[1], "wchar: 400900\n")

            known = rates_of(agent.Sampler(probe), "read_job_io", change=change)
            was = [int(text.split()[1]) for text in old]
            with self.subTest(kind):
                self.assertEqual(known["job_read"], 3005000 - was[0])
                self.assertEqual(known["job_write"], 400900 - was[1])

    def test_the_agent_itself_and_processes_out_of_sight_are_not_counted(self):
        probe, write = copy_of(self, "arm")
        write(V2 + "/step_1/user/task_0/cgroup.procs", "0\n%d\n5101\n" % os.getpid())
        self.assertEqual(agent.Sampler(probe).job_processes(), [5000, 5001, 5101])

    def test_where_slurm_has_a_freezer_it_says_which_processes_there_are(self):
        probe, write = copy_of(self, "slurm-v1")
        step = "sys/fs/cgroup/freezer/slurm_c1/uid_4242/job_3/step_batch"
        os.makedirs(probe.where(step))
        write(step + "/cgroup.procs", "77\n78\n")
        write(V1 + "/step_batch/task_0/cgroup.procs", "77\n")
        self.assertEqual(agent.Sampler(probe).job_processes(), [77, 78])

    def test_a_process_that_ends_gives_no_rate_below_zero(self):
        probe, _ = copy_of(self, "rhel7")
        gone = lambda: shutil.rmtree(probe.where("proc/4412"))  # noqa: E731
        self.assertEqual(rates_of(agent.Sampler(probe), "read_job_io", change=gone), {})

    def test_what_takes_long_is_done_less_often_once_it_knows_rates(self):
        sampler = agent.Sampler(tree("debian"))
        for took, wait in ((0.0, 10.0), (0.02, 20.0), (3.0, 50.0)):
            sampler.wide_readers = [lambda took=took: agent.time.pass_by(took)]
            clock = Clock()
            with self.subTest(took), mock.patch.object(agent, "time", clock):
                with self.assertRaises(InterruptedError):
                    sampler.widen_for_ever()
                *early, third = clock.slept
                self.assertEqual(early, [10.0, 10.0])
                self.assertAlmostEqual(third, wait)

    def test_outside_of_a_job_there_is_nothing(self):
        self.assertEqual(rates_of(agent.Sampler(tree("lxc")), "read_job_io"), {})

    def test_nfs_is_told_by_operations_and_their_mean_round_trip(self):
        probe, _ = copy_of(self, "rhel7")
        path = "proc/self/mountstats"
        sampler = agent.Sampler(probe)
        self.assertEqual(agent.parse_nfs(probe.read(path)), (1756, 3910))

        def change():  # the same mount at two places: 500 operations of 2 ms
            old = "READ: 1000 1000 0 128000 4224000 11 800 900"
            replace(probe, path, old, "READ: 1500 1500 0 128000 4224000 11 1800 900")

        known = rates_of(sampler, "read_nfs", change=change)
        self.assertEqual(known, {"nfs_ops": 500.0, "nfs_rtt": 0.002})

    def test_nfs_at_rest_has_no_round_trip_and_a_node_without_it_no_keys(self):
        known = rates_of(agent.Sampler(tree("rhel7")), "read_nfs")
        self.assertEqual(known, {"nfs_ops": 0.0})
        self.assertEqual(rates_of(agent.Sampler(tree("arm")), "read_nfs"), {})
        self.assertEqual(rates_of(agent.Sampler(), "read_job_io"), {})

    def test_lustre_is_read_where_its_clients_counters_are(self):
        for kind, folder, read, written in (
            (
                "rhel7",
                "proc/fs/lustre/llite/scratch-ffff88085d3f8800",
                25804800,
                5242880,
            ),
            ("arm", "sys/kernel/debug/lustre/llite/work-ffff0a", 8388608, 1048577),
        ):
            probe, _ = copy_of(self, kind)

            def change(probe=probe, path=folder + "/stats", read=read, written=written):
                replace(probe, path, " %d" % read, " %d" % (read + 4096))
                replace(probe, path, " %d" % written, " %d" % (written + 512))

            known = rates_of(agent.Sampler(probe), "read_lustre", change=change)
            self.assertEqual(
                known, {"lustre_read": 4096.0, "lustre_write": 512.0}, kind
            )
        self.assertEqual(rates_of(agent.Sampler(tree("lxc")), "read_lustre"), {})

    def ports(self, kind, path, value):
        """The rates of the ports of a tree when one counter changes."""
        probe, write = copy_of(self, kind)
        sampler = agent.Sampler(probe)
        readers = [
            reader for reader in sampler.slow_readers if "read_ports" in str(reader)
        ]
        self.assertEqual(len(readers), 2)
        for number, reader in enumerate(readers):
            setattr(sampler, "ports%d" % number, reader)
        change = lambda: write("sys/class/infiniband/" + path, value)  # noqa: E731
        return rates_of(sampler, "ports0", "ports1", change=change)

    def test_ports_count_words_of_four_bytes(self):
        known = self.ports(
            "arm", "hfi1_0/ports/1/counters/port_xmit_data", "%d\n" % (2000 + 250)
        )
        self.assertEqual(known, {"ib_rx": 0.0, "ib_tx": 1000.0})

    def test_a_counter_of_32_bits_that_is_full_is_not_taken_for_silence(self):
        """It would be a rate of 0 for ever; the other port goes on."""
        known = self.ports("arm", "hfi1_0/ports/1/counters/port_rcv_data", "7010\n")
        self.assertEqual(known["ib_rx"], 40.0)
        probe, write = copy_of(self, "arm")
        shutil.rmtree(probe.where("sys/class/infiniband/hfi1_0"))
        sampler = agent.Sampler(probe)
        sampler.ports = sampler.slow_readers[0]
        self.assertEqual(rates_of(sampler, "ports"), {})

    def test_old_kernels_have_counters_of_64_bits_apart(self):
        known = self.ports(
            "rhel7", "mlx4_0/ports/2/counters_ext/port_rcv_data_64", "8000000030\n"
        )
        self.assertEqual(known, {"ib_rx": 40.0, "ib_tx": 0.0})

    def test_what_reads_many_files_is_not_read_with_each_sample(self):
        sampler = agent.Sampler(tree("rhel7"))
        with mock.patch.object(agent.Probe, "peek", side_effect=AssertionError):
            sampler.sample()
        sampler.wide = time.monotonic(), {"job_read": 5.0}
        self.assertEqual(sampler.sample()["job_read"], 5.0)
        sampler.wide = time.monotonic() - 61, {"job_read": 5.0}
        self.assertNotIn("job_read", sampler.sample())

    def test_a_driver_that_hangs_hides_nothing_of_what_many_files_tell(self):
        patch = (
            "import threading\nagent.WIDE_SECONDS = 0.1\n"
            "agent.Gpus.refresh = lambda self: threading.Event().wait()\n"
            "agent.Sampler.read_job_io = lambda self: [('job_read', 1.0)]"
        )
        with DummyServer(answer=b"ok\n") as server, start_agent(
            "--port", server.port, "--interval", "0.1", patch=patch
        ):
            eventually(lambda: "job_read" in server.dicts[-1])


class Schedulers(unittest.TestCase):
    def known(self, **environ):
        """(job, name) of a job with these variables."""
        clean = {}
        for name, value in os.environ.items():
            words = [word for row in agent.SCHEDULERS for word in row]
            if name not in words and not name.startswith("SLURM"):
                clean[name] = value
        clean.update(environ)
        with mock.patch.dict(os.environ, clean, clear=True):
            sample = agent.Sampler(tree("debian")).sample()
        return sample.get("job"), sample.get("job_name")

    def test_each_says_the_jobs_id_and_name_in_its_own_way(self):
        for environ, known in (
            ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}, ("7", "train")),
            ({"PBS_JOBID": "12.pbs01.site.org", "PBS_JOBNAME": "run"}, ("12", "run")),
            ({"PBS_JOBID": "12[3].pbs01", "PBS_JOBNAME": "run"}, ("12[3]", "run")),
            (
                {"LSB_JOBID": "99", "LSB_JOBINDEX": "0", "LSB_JOBNAME": "md"},
                ("99", "md"),
            ),
            (
                {"LSB_JOBID": "99", "LSB_JOBINDEX": "4", "LSB_JOBNAME": "md[1-9]"},
                ("99[4]", "md[1-9]"),
            ),
            ({"FLUX_JOB_ID": "\u01922WgoYw"}, ("\u01922WgoYw", None)),
            (
                {"JOB_ID": "5", "SGE_TASK_ID": "undefined", "JOB_NAME": "a.sh"},
                ("5", "a.sh"),
            ),
            (
                {"JOB_ID": "5", "SGE_TASK_ID": "2", "JOB_NAME": "a.sh"},
                ("5.2", "a.sh"),
            ),
            ({"JOB_ID": "5", "JOB_NAME": "a build server's"}, (None, None)),
            ({"PBS_JOBID": ""}, (None, None)),
            ({}, (None, None)),
        ):
            with self.subTest(environ):
                self.assertEqual(self.known(**environ), known)

    def test_squeue_is_not_asked_about_a_job_of_another_scheduler(self):
        clean = {n: v for n, v in os.environ.items() if not n.startswith("SLURM")}
        clean["PBS_JOBID"] = "12.pbs01"
        with mock.patch.dict(os.environ, clean, clear=True):
            sampler = agent.Sampler(tree("debian"))
            with mock.patch.object(sampler.probe, "ask", side_effect=AssertionError):
                self.assertEqual(dict(sampler.read_time_left()), {})

    def test_the_cgroup_of_the_job_is_found_below_its_schedulers(self):
        pbs = "/pbs_jobs.service/%s/12.pbs01"
        for line, path, below in (
            ("5:memory:" + pbs % "jobid", pbs % "jobid", ""),
            ("0::" + pbs % "jobs" + "/tasks", pbs % "jobs", "/tasks"),
            (
                "9:memory:/lsf/cluster1/job.12.4711.1700000000",
                "/lsf/cluster1/job.12.4711.1700000000",
                "",
            ),
            ("3:memory:/UGE/12.1", "/UGE/12.1", ""),
            (
                "4:memory:/slurm/uid_1/job_2/step_0/task_1",
                "/slurm/uid_1/job_2",
                "/step_0/task_1",
            ),
        ):
            with self.subTest(line):
                ((_, found, rest),) = agent.JOB_CGROUP.findall(line + "\n")
                self.assertEqual((found, rest), (path, below))
        for line in ("4:memory:/lsf/cluster1", "0::/pbs_jobs.service", "0::/UGE"):
            self.assertEqual(agent.JOB_CGROUP.findall(line + "\n"), [])


# Writes 5 MB a second until it is told to take more memory than there is.
WORK = r"""
import os, sys, time
kept = []
with open("/dev/null", "wb", 0) as file:
    while not os.path.exists(sys.argv[1]):
        file.write(b"x" * 500000)
        time.sleep(0.1)
while True:
    kept.append(b"x" * (1 << 20))
"""


@support.requires("root", "/sys/fs/cgroup/memory/cgroup.procs")
class RealCgroup(unittest.TestCase):
    """A job's cgroup of v1 on this machine, with a limit of 100 MiB."""

    LIMIT = 100 * 2**20

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.top = "/sys/fs/cgroup/memory/sentinel_%d" % os.getpid()
        self.job = self.top + "/uid_4242/job_1"
        self.leaf = self.job + "/step_0/task_0"
        os.makedirs(self.leaf)
        self.addCleanup(self.remove)
        with open(self.job + "/memory.limit_in_bytes", "w") as file:
            file.write("%d" % self.LIMIT)

    def remove(self):
        path = self.leaf
        while len(path) >= len(self.top):
            eventually(lambda path=path: os.rmdir(path) is None)
            path = os.path.dirname(path)

    def join(self):
        with open(self.leaf + "/cgroup.procs", "w") as file:
            file.write("%d" % os.getpid())

    def kernel(self, name):
        with open(os.path.join(self.job, name)) as file:
            return int(file.read())

    def test_bytes_peak_and_the_kill_are_those_of_the_kernel(self):
        enough = os.path.join(self.folder, "enough")
        with DummyServer(answer=b"ok\n") as server, start_agent(
            *["--port", server.port, "--interval", "0.2", "--"],
            *[sys.executable, "-c", WORK, enough],
            patch="agent.WIDE_SECONDS = 1.0; agent.WIDE_FACTOR = 0.0",
            env=SLURM,
            preexec_fn=self.join,
        ) as tool:
            eventually(lambda: "job_write" in server.dicts[-1])
            written = eventually(
                lambda: (
                    3e6 < server.dicts[-1].get("job_write", 0) < 6e6
                    and server.dicts[-1]
                )
            )
            self.assertEqual(written["oom_kill"], 0)
            self.assertEqual(written["job_mem_limit"], self.LIMIT)
            with open(enough, "w"):
                pass
            self.assertEqual(tool.wait(), 128 + signal.SIGKILL)
            self.assertRegex(tool.log, "out of memory: the kernel killed 1 process\n")
            peak = float(re.search(r"with page cache, (\S+) GB", tool.log).group(1))
            truth = self.kernel("memory.max_usage_in_bytes") / GIB
            self.assertAlmostEqual(peak, truth, delta=truth / 100)
            self.assertGreater(self.kernel("memory.failcnt"), 0)
            bye = eventually(lambda: "bye" in server.dicts[-1] and server.dicts[-1])
            self.assertEqual(bye["bye"], "SIGKILL")
            self.assertIn("the kernel killed 1", bye["report"])


if __name__ == "__main__":
    unittest.main()
