"""The agent's parsers, readers and command line.

Trees of /proc and /sys are in tests/proc, each with a NOTE of where it came from; what can be
checked on the machine itself is checked against another source of the same truth.
"""

import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from unittest import mock

import beside
import support
from support import eventually

sys.path.insert(0, support.ROOT)
import agent

load_tests = beside.load_tests  # in a process of its own: it mostly waits

JOB_OF_V1 = "sys/fs/cgroup/memory/slurm_c1/uid_4242/job_3"
TREES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "proc")
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_CPUS_PER_NODE": "16",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "node017",
    "SLURM_JOB_END_TIME": "4102444800",
}


def tree(kind):
    """The Probe of a tree in tests/proc."""
    return agent.Probe(
        os.path.join(TREES, kind, "proc"), os.path.join(TREES, kind, "sys")
    )


def sample_of(kind, **environ):
    """One sample of a tree as a job with these variables would see it."""
    with mock.patch.dict(os.environ, environ):
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            if name not in environ:
                del os.environ[name]
        return agent.Sampler(tree(kind)).sample()


def gpus_of(sampler):
    """What a sample tells of the GPUs after one round."""
    sampler.gpus.refresh()
    return dict(sampler.read_gpus())


def copy_of(test, kind):
    """A tree that the test may change: (its Probe, a function that writes a file of it)."""
    folder = tempfile.mkdtemp()
    test.addCleanup(shutil.rmtree, folder)
    root = os.path.join(folder, "tree")
    shutil.copytree(os.path.join(TREES, kind), root)

    def write(path, text):
        with open(os.path.join(root, path), "w") as file:
            file.write(text)

    return agent.Probe(os.path.join(root, "proc"), os.path.join(root, "sys")), write


class Parsers(unittest.TestCase):
    def test_idle_is_idle_and_iowait_and_guests_are_not_counted_twice(self):
        text = "cpu  100 10 50 1000 40 3 7 5 60 6\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
        self.assertEqual(agent.parse_cpu(text), (1040, 1215))

    def test_the_short_cpu_line_of_an_old_kernel_is_enough(self):
        self.assertEqual(agent.parse_cpu("cpu  1 2 3 4 5 6 7\n"), (9, 28))

    def test_memory_is_what_memavailable_says(self):
        text = (
            "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nBuffers: 1 kB\n"
            "SwapTotal: 50 kB\nSwapFree: 20 kB\n"
        )
        self.assertEqual(agent.parse_meminfo(text), (1024000, 614400, 51200, 20480))

    def test_before_linux_3_14_it_is_the_sum_that_free_took(self):
        with open(os.path.join(TREES, "centos6/proc/meminfo")) as file:
            text = file.read()
        for end in ("", "HugePages_To"):  # as a file that is cut after 1 KiB ends
            total, available, swap, unused = agent.parse_meminfo(text + end)
            self.assertEqual(available, (1362580 + 39344 + 206060 + 34340 - 232) * 1024)
        self.assertEqual(
            (total, swap, unused), (1914844 * 1024, 2064376 * 1024, 1548282 * 1024)
        )

    def test_in_a_container_more_may_be_available_than_there_is(self):
        text = "MemTotal: 1000 kB\nMemFree: 300 kB\nMemAvailable: 4000 kB\n"
        self.assertEqual(agent.parse_meminfo(text), (1024000, 307200, 0, 0))

    def test_without_memavailable_what_is_there_is_summed(self):
        text = "MemTotal: 1000 kB\nMemFree: 300 kB\nBuffers: 10 kB\nCached: 90 kB\n"
        self.assertEqual(agent.parse_meminfo(text), (1024000, 409600, 0, 0))

    def test_a_text_of_another_kind_says_what_it_lacks(self):
        for parser, text, words in (
            (agent.parse_meminfo, "odd\n", "no line 'MemTotal:'"),
            (agent.parse_cpu, "intr 1 2\n", "no.* begin with a line 'cpu'"),
        ):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                parser(text)

    def test_nvidia_smi_is_read_with_and_without_what_it_knows(self):
        one = "%d, GPU-%d, NVIDIA A100, %s, %s, %s\n"
        table = (
            (one % (0, 0, 35, 1024, 40960), {"gpus": 1, "gpu": 35, "gpu_min": 35}, 2.5),
            (
                one % (0, 0, 100, 40960, 40960) + one % (1, 1, 0, 0, 40960),
                {"gpus": 2, "gpu": 50, "gpu_min": 0},
                50,
            ),
            (
                one % (0, 0, "[N/A]", 10240, 40960) + one % (1, 1, 20, 0, 40960),
                {"gpus": 2, "gpu": 20, "gpu_min": 20},
                12.5,
            ),
            (one % (0, 0, "[N/A]", "[N/A]", "[N/A]"), {"gpus": 1}, None),
            (one % ((3, 3) + ("[Not Supported]",) * 3), {"gpus": 1}, None),
            (one % (0, 0, 0, 0, 40960), {"gpus": 1, "gpu": 0, "gpu_min": 0}, 0),
            ("No devices were found\n", {}, None),
            (
                "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
                {},
                None,
            ),
            ("", {}, None),
        )
        for text, expected, memory in table:
            if memory is not None:
                expected = dict(expected, gpu_mem=memory)
            with self.subTest(text):
                parts = [gpu.part() for gpu in agent.parse_nvidia_smi(text)]
                self.assertEqual(dict(agent.summarise_gpus(parts)), expected)

    def test_time_left_is_read_in_every_form_that_squeue_has(self):
        for text, seconds in (
            ("1-02:03:04\n", 93784),
            ("2:03:04\n", 7384),
            ("9:55\n", 595),
            ("0:00\n", 0),
            ("10-00:00:00\n", 864000),
        ):
            with self.subTest(text):
                parts = re.findall(agent.TIME_LEFT, text.strip())[0]
                self.assertEqual(
                    sum(
                        int(part or 0) * unit
                        for part, unit in zip(parts, (86400, 3600, 60, 1))
                    ),
                    seconds,
                )
        for text in (
            "UNLIMITED",
            "NOT_SET",
            "INVALID",
            "",
            "slurm_load_jobs error: Invalid job",
        ):
            self.assertEqual(re.findall(agent.TIME_LEFT, text), [])

    def test_the_jobs_level_of_a_cgroup_is_found_whatever_its_name(self):
        table = (
            (
                "4:memory:/slurm_c1/uid_4242/job_1/step_0/task_0",
                "/slurm_c1/uid_4242/job_1",
            ),
            ("4:memory:/slurm/uid_1000/job_1", "/slurm/uid_1000/job_1"),
            (
                "0::/system.slice/slurmstepd.scope/job_1/step_0/user/task_0",
                "/system.slice/slurmstepd.scope/job_1",
            ),
            (
                "0::/system.slice/c1_slurmstepd.scope/s1ABC/step_0",
                "/system.slice/c1_slurmstepd.scope/s1ABC",
            ),
            (
                "0::/docker/0123/system.slice/slurmstepd.scope/job_9/step_extern",
                "/docker/0123/system.slice/slurmstepd.scope/job_9",
            ),
        )
        for line, path in table:
            with self.subTest(line):
                self.assertEqual(agent.JOB_CGROUP.findall(line + "\n")[0][1], path)
        for line in (
            "0::/user.slice/user-1000.slice/session-1.scope",
            "4:memory:/",
            "0::/system.slice/slurmstepd.scope",
            "4:memory:/slurm/uid_1000",
            "nonsense",
        ):
            with self.subTest(line):
                self.assertEqual(agent.JOB_CGROUP.findall(line + "\n"), [])

    def test_a_text_is_cut_to_what_the_master_takes(self):
        self.assertEqual(agent.clip("node"), "node")
        self.assertEqual(len(agent.clip("x" * 1000)), 255)
        self.assertEqual(agent.clip("\u00e9" * 200), "\u00e9" * 127)
        self.assertEqual(agent.clip("a\udcffb"), "a?b")


class Rates(unittest.TestCase):
    def test_a_counter_becomes_a_rate_from_the_second_time_on(self):
        rates = agent.Rates()
        self.assertEqual(list(rates.change("rx", 1000, 10.0)), [])
        self.assertEqual(list(rates.change("rx", 4000, 12.0)), [("rx", 1500.0)])

    def test_a_counter_that_went_back_is_unknown_once(self):
        rates = agent.Rates()
        for value, now, expected in (
            (10, 1.0, []),
            (5, 2.0, []),
            (7, 3.0, [("rx", 2.0)]),
        ):
            self.assertEqual(list(rates.change("rx", value, now)), expected)

    def test_no_time_gone_by_is_no_rate(self):
        rates = agent.Rates()
        list(rates.change("rx", 1, 1.0))
        self.assertEqual(list(rates.change("rx", 2, 1.0)), [])


class Trees(unittest.TestCase):
    def test_a_plain_node_knows_everything_but_a_job_a_gpu_and_swap(self):
        sample = sample_of("debian")
        self.assertEqual(
            set(sample),
            {
                "node",
                "user",
                "version",
                "cpus",
                "cpu",
                "ram",
                "mem_total",
                "mem_used",
                "load1",
                "procs",
                "uptime",
                "psi_cpu",
                "psi_mem",
                "psi_io",
                "net_rx",
                "net_tx",
                "disk_read",
                "disk_write",
                "agent_cpu",
                "agent_rss",
            },
        )
        self.assertEqual(sample["cpus"], 2)
        self.assertEqual((sample["net_rx"], sample["disk_read"]), (0.0, 0.0))

    def test_an_old_kernel_knows_less_and_that_is_no_zero(self):
        sample = sample_of("centos6")
        self.assertEqual(sample["ram"], 14.2)
        self.assertEqual(sample["swap"], 25.0)
        self.assertEqual(
            (sample["load1"], sample["procs"], sample["uptime"]), (0.0, 121, 5440.11)
        )
        self.assertFalse(
            {"psi_cpu", "psi_mem", "psi_io", "net_rx", "disk_read"} & set(sample)
        )

    def test_without_swap_there_is_no_percentage_of_it(self):
        self.assertNotIn("swap", sample_of("bonded"))

    def test_files_that_hold_nonsense_leave_cpu_and_ram_alone(self):
        sample = sample_of("broken", **SLURM)
        self.assertEqual(
            set(sample) - {"agent_cpu", "agent_rss"},
            {
                "node",
                "user",
                "version",
                "cpus",
                "cpu",
                "ram",
                "mem_total",
                "mem_used",
                "job",
                "job_name",
                "job_cpus",
            },
        )

    def test_what_a_bond_a_bridge_or_a_partition_counts_is_not_counted_again(self):
        probe, write = copy_of(self, "bonded")
        sampler = agent.Sampler(probe)
        self.assertEqual(sampler.hardware["net"], ["eth0", "eth1"])
        self.assertEqual(sampler.hardware["block"], ["nvme0n1", "sda"])
        before = sampler.now
        dev = (
            probe.read("proc/net/dev")
            .replace(" 1000000 ", " 1500000 ")
            .replace("3000000", "9000000")
            .replace("400000", "400100")
        )
        write("proc/net/dev", dev)
        write(
            "proc/diskstats",
            probe.read("proc/diskstats")
            .replace("2000 10 500 0 4000", "2100 10 500 0 4010")
            .replace("80000", "80001"),
        )
        sample = sampler.sample()
        seconds = sampler.now - before
        for key, count in (
            ("net_rx", 500000),
            ("net_tx", 100),
            ("disk_read", 101 * 512),
            ("disk_write", 10 * 512),
        ):
            self.assertAlmostEqual(sample[key] * seconds, count, delta=count / 1000.0)

    def test_in_a_container_without_devices_all_interfaces_but_loopback_count(self):
        self.assertEqual(agent.Sampler(tree("slurm-v1")).hardware["net"], ["eth0"])

    def test_cpu_is_the_delta_between_samples_and_stays_when_the_counters_stand(self):
        probe, write = copy_of(self, "bonded")
        write("proc/stat", "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1\n")
        sampler = agent.Sampler(probe)
        for busy, idle, percent in (
            (1000, 3000, 25.0),
            (1000, 3000, 25.0),
            (1000, 2990, 25.0),
            (1100, 2990, 100.0),
            (1200, 2980, 100.0),
            (1200, 4000, 0.0),
            (50, 60, 0.0),
        ):
            write("proc/stat", "cpu  %d 0 0 %d 0 0 0 0 0 0\ncpu0 1\n" % (busy, idle))
            self.assertEqual(sampler.sample()["cpu"], percent, (busy, idle))

    def test_every_cpu_of_a_large_node_is_counted(self):
        probe, write = copy_of(self, "bonded")
        line = "cpu%d 8428212 74712 5184213 1326541123 134012 0 320412 1712 41212 0\n"
        for cpus in (1024, 4096):
            write(
                "proc/stat",
                "cpu  9 0 0 9 0 0 0 0 0 0\n"
                + "".join(line % n for n in range(cpus))
                + "intr 1 2\n",
            )
            self.assertEqual(agent.Sampler(probe).sample()["cpus"], cpus)

    def test_swap_of_a_container_that_makes_no_sense_is_left_out(self):
        probe, write = copy_of(self, "bonded")
        write(
            "proc/meminfo",
            "MemTotal: 1000 kB\nMemAvailable: 500 kB\n"
            "SwapTotal: 10 kB\nSwapFree: 70 kB\n",
        )
        sample = agent.Sampler(probe).sample()
        self.assertEqual(sample["ram"], 50.0)
        self.assertNotIn("swap", sample)

    def test_a_node_without_cpu_or_ram_says_which_file_lacks_what(self):
        for path, text, words in (
            ("proc/meminfo", "odd\n", "no ram in .*/proc/meminfo: there is no line"),
            ("proc/stat", "intr 1\n", "no cpu in .*/proc/stat: it does not begin"),
            (
                "proc/meminfo",
                "MemTotal: 10 kB\nMemFree: 90 kB\n",
                "no ram in .*no sense",
            ),
        ):
            probe, write = copy_of(self, "bonded")
            write(path, text)
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                agent.Sampler(probe)

    def test_a_source_that_is_missing_takes_no_key_of_another_with_it(self):
        whole = set(sample_of("debian"))
        for path, keys in (
            ("proc/loadavg", {"load1", "procs"}),
            ("proc/uptime", {"uptime"}),
            ("proc/pressure/cpu", {"psi_cpu"}),
            ("proc/pressure/memory", {"psi_mem"}),
            ("proc/net/dev", {"net_rx", "net_tx"}),
            ("proc/diskstats", {"disk_read", "disk_write"}),
            ("proc/self/statm", {"agent_rss"}),
        ):
            probe, _ = copy_of(self, "debian")
            os.unlink(probe.where(path))
            with self.subTest(path):
                self.assertEqual(whole - set(agent.Sampler(probe).sample()), keys)

    def test_a_filesystem_that_is_gone_does_not_hide_the_other(self):
        real = os.statvfs
        keys = {"disk", "disk_tmp", "disk_shm"}
        for gone, key in (
            (".", "disk"),
            ("/tmp", "disk_tmp"),
            ("/dev/shm", "disk_shm"),
        ):

            def statvfs(path, gone=gone):
                if path == gone:
                    raise OSError(116, "Stale file handle")
                return real(path)

            with self.subTest(gone), mock.patch.object(agent.os, "statvfs", statvfs):
                known = agent.collect(agent.Sampler(tree("bonded")).slow_readers)
                self.assertEqual(keys & set(known), keys - {key})

    def statvfs(self, **fields):
        """What the filesystems read as, where each is like this."""
        known = {"f_flag": 0, "f_blocks": 100, "f_bfree": 60, "f_bavail": 50}
        known.update({"f_files": 1000, "f_ffree": 20, **fields})
        answer = mock.Mock(**known)
        with mock.patch.object(agent.os, "statvfs", return_value=answer) as asked:
            known = agent.collect(agent.Sampler(tree("bonded")).slow_readers)
        names = ("disk", "inodes", "disk_tmp", "inodes_tmp", "disk_shm", "inodes_shm")
        return {key: known[key] for key in names if key in known}, asked

    def test_space_and_inodes_are_those_of_df_where_somebody_can_write(self):
        known, asked = self.statvfs()
        self.assertEqual(known["disk"], 44.4)
        self.assertEqual(
            known,
            {
                "disk": 44.4,
                "inodes": 98.0,
                "disk_tmp": 44.4,
                "inodes_tmp": 98.0,
                "disk_shm": 44.4,
            },
        )
        self.assertEqual(
            [call[0][0] for call in asked.call_args_list], [".", "/tmp", "/dev/shm"]
        )
        known, _ = self.statvfs(f_files=0)
        self.assertEqual(set(known), {"disk", "disk_tmp", "disk_shm"})
        known, _ = self.statvfs(f_flag=os.ST_RDONLY)
        self.assertEqual(known, {})

    def test_the_working_directory_is_that_of_the_job(self):
        sampler = agent.Sampler(tree("bonded"))
        facts = {"job": "7", "job_name": "fit", "cpus": {}, "directory": "/scratch/a b"}
        agent.apply_facts(sampler, facts)
        with mock.patch.object(agent.os, "statvfs", side_effect=OSError) as asked:
            agent.collect(sampler.slow_readers)
        self.assertEqual(asked.call_args_list[0][0][0], "/scratch/a b")

    def test_a_limit_that_cannot_be_read_leaves_the_memory_of_the_job(self):
        probe, _ = copy_of(self, "slurm-v1")
        os.unlink(probe.where(JOB_OF_V1 + "/memory.limit_in_bytes"))
        with mock.patch.dict(os.environ, SLURM):
            sample = agent.Sampler(probe).sample()
        self.assertEqual(sample["job_mem"], 160632832)
        self.assertNotIn("job_mem_limit", sample)

    def test_files_of_a_filesystem_that_died_are_opened_anew_once_it_is_back(self):
        """As lxcfs started again: what was open fails for ever, the path leads to another."""
        probe, _ = copy_of(self, "bonded")
        sampler = agent.Sampler(probe)
        process = subprocess.Popen(["sleep", "600"])
        with open("/proc/%d/stat" % process.pid) as dead:
            process.kill()
            process.wait()
            for file in probe.open_files.values():
                os.dup2(dead.fileno(), file)  # reads of it give ESRCH
        path = probe.where("proc/meminfo")
        os.rename(path, path + ".away")
        with mock.patch.object(agent, "log") as log:
            for _ in range(3):
                self.assertNotIn("ram", sampler.sample())
            self.assertEqual(log.call_count, 1, log.call_args_list)
            self.assertIn("%r: no samples until it is back" % path, log.call_args[0][0])
            os.rename(path + ".away", path)
            for _ in range(3):
                self.assertTrue({"cpu", "ram", "mem_total"} <= set(sampler.sample()))
            self.assertEqual(log.call_count, 2, log.call_args_list)
            self.assertIn("known again", log.call_args[0][0])

    def test_the_limit_of_a_job_is_known_from_the_environment_or_squeue(self):
        environ = dict(SLURM, SLURM_JOB_START_TIME="4102441200")
        with mock.patch.dict(os.environ, environ):
            known = dict(agent.Sampler(tree("debian")).read_time_left())
        self.assertEqual(known["job_time_limit"], 3600)

    def test_amd_gpus_are_cards_that_tell_not_their_second_names(self):
        with mock.patch.dict(os.environ, {"PATH": "/nowhere"}):
            self.assertEqual(
                gpus_of(agent.Sampler(tree("amd"))),
                {"gpus": 2, "gpu": 50.0, "gpu_min": 10.0, "gpu_mem": 12.5},
            )

    def test_a_node_without_a_gpu_has_no_gpu_keys(self):
        with mock.patch.dict(os.environ, {"PATH": "/nowhere"}):
            self.assertEqual(gpus_of(agent.Sampler(tree("debian"))), {})

    def test_every_tree_says_where_it_came_from_and_gives_a_sample(self):
        for folder in sorted(os.listdir(TREES)):
            with self.subTest(folder):
                self.assertTrue(
                    os.path.getsize(os.path.join(TREES, folder, "NOTE")) > 60
                )
                self.assertIn("cpu", sample_of(folder))

    def test_files_are_opened_once_and_read_again_in_place(self):
        sampler = agent.Sampler(tree("slurm-v1"))
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            sampler.sample()
        self.assertEqual(set(os.listdir("/proc/self/fd")), before)

    def test_a_long_file_is_read_to_its_end_and_an_endless_one_is_not(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        with open(os.path.join(folder, "long"), "w") as file:
            file.write("x" * 50000)
        probe = agent.Probe(folder, folder)
        self.assertEqual(len(probe.read("proc/long")), 50000)
        os.symlink("/dev/zero", os.path.join(folder, "endless"))
        self.assertEqual(len(probe.read("proc/endless")), agent.FILE_BYTES)
        with open("/proc/self/maps") as file:  # the kernel gives a page at a time
            size = len(file.read())
        self.assertGreater(
            len(agent.Probe().read("proc/self/maps")), min(size - 2000, 20000)
        )
        self.assertGreater(size, 7000)


class Job(unittest.TestCase):
    GIB = 2**30

    def test_v1_counts_the_whole_job_anonymous_and_shared(self):
        sample = sample_of("slurm-v1", **dict(SLURM, SLURM_JOB_CPUS_PER_NODE="4"))
        self.assertEqual(sample["job_mem"], 160632832)
        self.assertEqual(sample["job_cache"], 204800)
        self.assertEqual(sample["job_mem_limit"], 600 * 2**20)
        self.assertEqual(sample["job_ram"], 25.5)
        self.assertEqual((sample["job_cpus"], sample["job_cpu"]), (4, 0.0))
        self.assertEqual((sample["job"], sample["job_name"]), ("4711", "train"))
        self.assertEqual(sample["node"], "node017")

    def test_v2_counts_the_whole_job_and_shows_the_page_cache_apart(self):
        for kind in ("slurm-v2", "slurm-sluid", "slurm-unified"):
            with self.subTest(kind):
                sample = sample_of(kind, **SLURM)
                self.assertEqual(sample["job_mem"], 12025908428 + self.GIB)
                self.assertEqual(sample["job_cache"], 41126494208 - self.GIB)
                self.assertEqual(sample["job_mem_limit"], 64 * self.GIB)
                self.assertEqual(sample["job_ram"], 19.1)
                self.assertEqual(sample["job_cpu"], 0.0)

    def test_a_hybrid_without_a_limit_has_bytes_and_no_percentage(self):
        sample = sample_of("slurm-hybrid", **SLURM)
        self.assertEqual((sample["job_mem"], sample["job_cache"]), (52428800, 1048576))
        self.assertIn("job_cpu", sample)
        self.assertFalse({"job_mem_limit", "job_ram"} & set(sample))

    def test_max_is_no_limit(self):
        probe, write = copy_of(self, "slurm-v2")
        write(
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/memory.max", "max\n"
        )
        sample = agent.Sampler(probe).sample()
        self.assertIn("job_mem", sample)
        self.assertFalse({"job_mem_limit", "job_ram"} & set(sample))

    def test_outside_of_slurm_nothing_is_known_of_a_job(self):
        for kind in ("debian", "centos6", "bonded"):
            self.assertFalse(
                [key for key in sample_of(kind) if key.startswith("job")], kind
            )

    def test_a_cgroup_that_cannot_be_read_is_unknown(self):
        probe, _ = copy_of(self, "slurm-v2")
        shutil.rmtree(probe.where("sys/fs"))
        with mock.patch.dict(os.environ, SLURM):
            sample = agent.Sampler(probe).sample()
        self.assertFalse({"job_mem", "job_cpu", "job_ram"} & set(sample))
        self.assertEqual(sample["job_cpus"], 16)

    def test_job_cpu_is_percent_of_the_allocated_cpus(self):
        for kind, path, one in (
            ("slurm-v1", "cpuacct/slurm_c1/uid_4242/job_3/cpuacct.usage", "%d\n"),
            (
                "slurm-v2",
                "system.slice/slurmstepd.scope/job_4711/cpu.stat",
                "usage_usec %d\n",
            ),
        ):
            probe, write = copy_of(self, kind)
            unit = 10**9 if kind == "slurm-v1" else 10**6
            with self.subTest(kind), mock.patch.dict(os.environ, SLURM):
                sampler = agent.Sampler(probe)
                write("sys/fs/cgroup/" + path, one % (10000 * unit))
                sampler.sample()
                before = sampler.now
                write("sys/fs/cgroup/" + path, one % (10004 * unit))
                percent = sampler.sample()["job_cpu"]
                self.assertAlmostEqual(
                    percent, 100 * 4 / (sampler.now - before) / 16, delta=percent / 100
                )

    def test_the_allocated_cpus_are_those_of_this_node(self):
        for text, nth, cpus in (
            ("4", "0", 4),
            ("72(x2),36", "0", 72),
            ("72(x2),36", "1", 72),
            ("72(x2),36", "2", 36),
            ("1(x3)", "", 1),
        ):
            with self.subTest(text + "/" + nth):
                environ = {"SLURM_JOB_CPUS_PER_NODE": text, "SLURM_NODEID": nth}
                self.assertEqual(sample_of("debian", **environ)["job_cpus"], cpus)
        for text, nth in (("4", "1"), ("", "0"), ("four", "0"), ("4", "x")):
            with self.subTest(text + "/" + nth):
                environ = {"SLURM_JOB_CPUS_PER_NODE": text, "SLURM_NODEID": nth}
                self.assertNotIn("job_cpus", sample_of("debian", **environ))

    def test_names_that_slurm_has_are_cut_to_what_the_master_takes(self):
        sample = sample_of("debian", SLURM_JOB_ID="7", SLURM_JOB_NAME="\u2713" * 200)
        self.assertEqual(sample["job_name"], "\u2713" * 85)


class StandIns(unittest.TestCase):
    """Commands of the cluster, played by scripts on PATH."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        path = mock.patch.dict(
            os.environ, {"PATH": self.folder + ":" + os.environ["PATH"]}
        )
        path.start()
        self.addCleanup(path.stop)
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            del os.environ[name]

    def play(self, name, script):
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n%s\n" % script)
        os.chmod(path, 0o755)

    def test_nvidia_smi_is_asked_for_what_is_shown(self):
        self.play(
            "nvidia-smi",
            'echo "$@" >%s/asked; echo "0, GPU-1, NVIDIA A100, 35, 1024, 40960"'
            % self.folder,
        )
        self.assertEqual(
            gpus_of(agent.Sampler(tree("debian"))),
            {"gpus": 1, "gpu": 35.0, "gpu_min": 35.0, "gpu_mem": 2.5},
        )
        with open(self.folder + "/asked") as file:
            self.assertEqual(
                file.read(),
                "--query-gpu=index,uuid,name,utilization.gpu,memory.used,memory.total"
                " --format=csv,noheader,nounits\n",
            )

    def test_nvidia_smi_that_fails_is_no_gpu(self):
        self.play(
            "nvidia-smi", "echo NVIDIA-SMI has failed because it could not; exit 9"
        )
        self.assertEqual(gpus_of(agent.Sampler(tree("debian"))), {})

    def test_nvidia_smi_that_hangs_is_ended_with_its_children_and_holds_nothing_up(
        self,
    ):
        self.play(
            "nvidia-smi",
            "trap '' TERM; echo $$ >%s/pid; sleep 600; sleep 600" % self.folder,
        )
        with mock.patch.object(agent, "WAIT_SECONDS", 1):
            began = time.monotonic()
            self.assertEqual(gpus_of(agent.Sampler(tree("debian"))), {})
        self.assertLess(time.monotonic() - began, 8)
        with open(self.folder + "/pid") as file:
            pid = int(file.read())
        eventually(lambda: not support.alive(pid), 5)

    def test_an_agent_with_a_hanging_nvidia_smi_samples_on_the_beat_and_ends_at_once(
        self,
    ):
        self.play("nvidia-smi", "exec sleep 600")
        with support.start(
            "agent.py",
            "--port",
            support.closed_port(),
            "--interval",
            "0.2",
            "--verbose",
            env={"PATH": os.environ["PATH"]},
        ) as tool:
            eventually(lambda: tool.log.count("'cpu'") > 10, 10)
            began = time.monotonic()
            self.assertEqual(tool.stop(), 0)
            self.assertLess(time.monotonic() - began, 2)

    def test_results_of_a_thread_that_hangs_are_forgotten(self):
        sampler = agent.Sampler(tree("debian"))
        sampler.slow = time.monotonic(), {"gpu": 5.0}
        self.assertEqual(sampler.sample()["gpu"], 5.0)
        sampler.slow = time.monotonic() - 61, {"gpu": 5.0}
        self.assertNotIn("gpu", sampler.sample())

    def test_squeue_is_asked_once_for_the_end_of_the_job(self):
        self.play("squeue", 'echo "$@" >>%s/asked; echo 1-00:00:10' % self.folder)
        os.environ["SLURM_JOB_ID"] = "4711"
        sampler = agent.Sampler(tree("debian"))
        for _ in range(3):
            left = dict(sampler.read_time_left())["job_time_left"]
        self.assertTrue(86400 < left <= 86410)
        with open(self.folder + "/asked") as file:
            self.assertEqual(file.read(), "-h -j 4711 -o %L %l\n")
        sampler.asked -= agent.SQUEUE_SECONDS
        dict(sampler.read_time_left())
        with open(self.folder + "/asked") as file:
            self.assertEqual(file.read().count("\n"), 2)

    def test_squeue_that_fails_later_takes_back_nothing_that_it_told(self):
        self.play("squeue", "echo 1-00:00:10 2-00:00:00")
        os.environ["SLURM_JOB_ID"] = "4711"
        sampler = agent.Sampler(tree("debian"))
        dict(sampler.read_time_left())
        self.play("squeue", "exit 1")
        sampler.asked -= agent.SQUEUE_SECONDS
        known = dict(sampler.read_time_left())
        self.assertTrue(86400 < known["job_time_left"] <= 86410)
        self.assertEqual(known["job_time_limit"], 172800)

    def test_an_end_of_the_job_that_is_no_time_is_not_sent(self):
        self.play("squeue", "exit 1")
        for text in ("inf", "-inf", "nan", "-5", "1e999", "soon"):
            os.environ["SLURM_JOB_END_TIME"] = text
            with self.subTest(text), mock.patch.object(agent, "log") as log:
                known = dict(agent.Sampler(tree("debian")).read_time_left())
                self.assertEqual(known, {})
                self.assertIn(repr(text), log.call_args[0][0])

    def test_squeue_is_not_asked_when_slurm_has_told_the_end_or_there_is_no_job(self):
        self.play("squeue", "touch %s/asked" % self.folder)
        self.assertEqual(dict(agent.Sampler(tree("debian")).read_time_left()), {})
        os.environ.update(
            SLURM_JOB_ID="4711", SLURM_JOB_END_TIME=str(int(time.time()) + 100)
        )
        left = dict(agent.Sampler(tree("debian")).read_time_left())["job_time_left"]
        self.assertTrue(95 < left <= 100)
        self.assertFalse(os.path.exists(self.folder + "/asked"))

    def test_a_job_without_a_limit_has_no_time_left_and_squeue_is_not_asked_again(self):
        self.play("squeue", "echo >>%s/asked; echo UNLIMITED" % self.folder)
        os.environ["SLURM_JOB_ID"] = "4711"
        sampler = agent.Sampler(tree("debian"))
        for _ in range(3):
            self.assertEqual(agent.collect([sampler.read_time_left]), {})
        with open(self.folder + "/asked") as file:
            self.assertEqual(file.read(), "\n")

    def test_a_job_id_is_one_word_and_never_a_command(self):
        self.play("squeue", 'echo "$3" >%s/asked; echo 10:00' % self.folder)
        os.environ["SLURM_JOB_ID"] = job = "1 2; touch %s/harm $(touch %s/harm)" % (
            self.folder,
            self.folder,
        )
        dict(agent.Sampler(tree("debian")).read_time_left())
        self.assertFalse(os.path.exists(self.folder + "/harm"))
        with open(self.folder + "/asked") as file:
            self.assertEqual(file.read(), job + "\n")


class Truth(unittest.TestCase):
    """This machine, seen twice."""

    def test_load_is_that_of_getloadavg(self):
        sampler = agent.Sampler()
        eventually(
            lambda: abs(sampler.sample()["load1"] - os.getloadavg()[0]) < 0.02, 5
        )

    def test_cpus_are_those_of_nproc(self):
        self.assertEqual(
            agent.Sampler().sample()["cpus"],
            int(subprocess.check_output(["nproc", "--all"])),
        )

    def test_memory_is_that_of_free(self):
        def agrees():
            sample = agent.Sampler().sample()
            lines = subprocess.check_output(["free", "-b"]).decode().splitlines()
            total, available = int(lines[1].split()[1]), int(lines[1].split()[6])
            self.assertEqual(sample["mem_total"], total)
            return abs(sample["ram"] - 100 * (1 - available / total)) < 1

        eventually(agrees, 5)

    def test_filesystems_are_those_of_df(self):
        def agrees():
            sample = agent.collect(agent.Sampler().slow_readers)
            for key, path, flags in (
                ("disk", ".", "-P"),
                ("disk_tmp", "/tmp", "-P"),
                ("disk_shm", "/dev/shm", "-P"),
                ("inodes", ".", "-Pi"),
            ):
                words = subprocess.check_output(["df", flags, path]).decode()
                line = words.splitlines()[1]
                if line.split()[4] == "-":
                    continue  # it counts none
                self.assertAlmostEqual(
                    sample[key], int(line.split()[4][:-1]), delta=1.05
                )
            return True

        eventually(agrees, 5)

    def test_cpu_goes_up_under_load_and_down_again(self):
        sampler = agent.Sampler()
        time_of = lambda: agent.parse_cpu(sampler.probe.read("proc/stat"))  # noqa: E731
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(os.cpu_count())
        ]
        try:
            sampler.sample()
            before, start = time_of(), time.monotonic()
            eventually(lambda: time.monotonic() - start > 1, 5)
            percent, after = sampler.sample()["cpu"], time_of()
        finally:
            for process in busy:
                process.kill()
                process.wait()
        self.assertGreater(percent, 90)
        idle, total = after[0] - before[0], after[1] - before[1]
        self.assertAlmostEqual(percent, 100 * (1 - idle / total), delta=3)

    def test_the_first_sample_has_a_real_delta_within_half_a_second(self):
        began = time.monotonic()
        sample = agent.get_system_stats()
        self.assertLess(time.monotonic() - began, 5)  # the slow readings are in it
        self.assertTrue(0 <= sample["cpu"] <= 100)
        self.assertIn("disk", sample)

    def test_bytes_over_loopback_are_not_network_traffic(self):
        sampler = agent.Sampler()
        if "net_rx" not in sampler.sample():
            self.skipTest("no network interface here")
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with listener, socket.create_connection(listener.getsockname()) as sender:
            receiver = listener.accept()[0]
            thread = threading.Thread(target=sender.sendall, args=(b"x" * 2**24,))
            thread.start()
            left = 2**24
            while left:
                left -= len(receiver.recv(65536))
            thread.join()
            receiver.close()
        self.assertLess(sampler.sample()["net_rx"], 2**24)

    def test_its_own_cost_is_what_proc_says(self):
        sampler = agent.Sampler()
        busy_until = time.process_time() + 0.3
        while time.process_time() < busy_until:
            pass
        sample = sampler.sample()
        self.assertGreater(sample["agent_cpu"], 10)
        with open("/proc/self/status") as file:
            rss = int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) * 1024
        self.assertAlmostEqual(sample["agent_rss"], rss, delta=rss / 10)

    def test_a_sample_is_what_the_wire_allows(self):
        sample = agent.get_system_stats()
        self.assertLessEqual(len(sample), 64)
        self.assertLess(len(pickle.dumps(sample, protocol=4)), 16384)
        for key, value in sample.items():
            self.assertIn(type(value), (str, int, float), key)
            if type(value) is float:
                self.assertTrue(math.isfinite(value), key)


class CommandLine(unittest.TestCase):
    BAD = (  # words, what the one line must hold
        (["--nonsense"], "--nonsense.*allowed: --host --port"),
        (["extra"], "extra.*allowed"),
        (["--hos", "x"], "--hos x.*allowed"),
        (["--port", "0"], "--port: '0'; allowed: 1 to 65535"),
        (["--port", "65536"], "--port: '65536'; allowed: 1 to 65535"),
        (["--port", "-1"], "port"),
        (["--port", "http"], "--port: 'http'; allowed: 1 to 65535"),
        (["--port", ""], "--port: ''; allowed: 1 to 65535"),
        (["--port"], "--port: expected one argument"),
        (["--host", ""], "--host: ''; allowed: HOST or HOST:PORT"),
        (["--host", "a b"], "--host: 'a b'; allowed"),
        (["--host", "login,"], "--host: 'login,'; allowed"),
        (["--host", "login,,b"], "--host: 'login,,b'; allowed"),
        (["--host", "::1"], r"--host: '::1'; allowed: .*IPv6 in \[ \]"),
        (["--host", "login:0"], "--host: 'login:0'; allowed"),
        (["--host", "login:99999"], "--host: 'login:99999'; allowed"),
        (["--host", "login:"], "--host: 'login:'; allowed"),
        (["--host", "http://login"], "--host: 'http://login'; allowed"),
        (["--host", "\u001b[31mred"], r"--host: '\\x1b\[31mred'; allowed"),
        (["--interval", "0"], "--interval: '0'; allowed: 0.1 to 60 seconds"),
        (["--interval", "0.05"], "allowed: 0.1 to 60 seconds"),
        (["--interval", "60.5"], "allowed: 0.1 to 60 seconds"),
        (["--interval", "61"], "allowed: 0.1 to 60 seconds"),
        (["--interval", "nan"], "allowed: 0.1 to 60 seconds"),
        (["--interval", "1e1"], "allowed: 0.1 to 60 seconds"),
        (["--interval", "2 s"], "allowed: 0.1 to 60 seconds"),
        (["--name", ""], "--name: ''; allowed: 1 to 63 printable characters"),
        (["--name", "  "], "--name: '  '; allowed: 1 to 63 printable characters"),
        (["--name", "x" * 64], "allowed: 1 to 63 printable characters"),
        (["--name", "a\nb"], r"--name: 'a\\nb'; allowed: 1 to 63 printable characters"),
        (["--"], "allowed: .* COMMAND"),
        (["--once", "--", "true"], "allowed: .*COMMAND.*not with --once"),
    )

    def test_bad_usage_is_one_line_that_says_what_is_allowed(self):
        for words, pattern in self.BAD:
            with self.subTest(words):
                done = (
                    subprocess.run(
                        [
                            support.PYTHON,
                            "-c",
                            "import sys, agent; sys.exit(agent.main(sys.argv[1:]))",
                        ]
                        + words,
                        cwd=support.ROOT,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        timeout=20,
                    )
                    if len(words) == 1
                    else None
                )
                code, text = (
                    (done.returncode, done.stderr.decode())
                    if done
                    else self.refusal(words)
                )
                self.assertEqual(code, 2)
                self.assertRegex(text, r"\A[^\n]*error: [^\n]*%s[^\n]*\n\Z" % pattern)

    def refusal(self, words):
        """(exit code, stderr) of main in this process."""
        with mock.patch("sys.stderr") as stderr, self.assertRaises(SystemExit) as stop:
            agent.main(words)
        return stop.exception.code, "".join(
            call[0][0] for call in stderr.write.call_args_list
        )

    def test_good_usage_is_taken(self):
        for text, hosts in (
            ("login", [("login", None)]),
            ("10.0.0.1:9,login", [("10.0.0.1", 9), ("login", None)]),
            ("[::1]:13580", [("::1", 13580)]),
            ("[fe80::1%eth0]", [("fe80::1%eth0", None)]),
            ("a_b.c-d:65535", [("a_b.c-d", 65535)]),
        ):
            with self.subTest(text):
                self.assertEqual(agent.hosts_argument(text), hosts)
        for kind, values in (
            (
                agent.interval_argument,
                {
                    "0.1": 0.1,
                    ".5": 0.5,
                    "1": 1.0,
                    "2.": 2.0,
                    "9.75": 9.75,
                    "59.9": 59.9,
                    "60": 60.0,
                    "60.0": 60.0,
                },
            ),
            (agent.port_argument, {"1": 1, "13579": 13579, "65535": 65535}),
            (
                agent.name_argument,
                {"c1": "c1", "x" * 63: "x" * 63, "K\u00f6ln 3": "K\u00f6ln 3"},
            ),
        ):
            for text, value in values.items():
                with self.subTest(text):
                    self.assertEqual(kind(text), value)
                    self.assertIs(type(kind(text)), type(value))

    def test_a_bad_variable_of_the_environment_is_bad_usage_too(self):
        for name, value in (("SENTINEL_PORT", "http"), ("SENTINEL_HOST", "a b")):
            done = support.run("agent.py", "--once", env={name: value})
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, r"\A[^\n]*error: [^\n]*allowed[^\n]*\n\Z")

    def test_an_empty_variable_is_none(self):
        done = support.run(
            "agent.py",
            "--once",
            env={
                "SENTINEL_PORT": "",
                "SENTINEL_HOST": "",
                "SENTINEL_SECRET_FILE": "",
                "SLURM_JOB_END_TIME": "",
            },
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_once_prints_one_sample_as_json(self):
        done = support.run(
            "agent.py",
            "--once",
            "--name",
            "K\u00f6ln 3",
            "--interval",
            "0.5",
            env={"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": "4102444800"},
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        sample = json.loads(done.stdout)
        self.assertEqual(done.stdout.count("\n"), 1)
        self.assertEqual(
            (sample["node"], sample["job"], sample["interval"]),
            ("K\u00f6ln 3", "42", 0.5),
        )
        self.assertGreater(sample["job_time_left"], 10**6)
        self.assertTrue(
            {
                "cpu",
                "ram",
                "user",
                "load1",
                "cpus",
                "mem_total",
                "mem_used",
                "version",
                "disk",
                "disk_tmp",
                "disk_shm",
            }
            <= set(sample)
        )

    def test_the_node_is_named_by_flag_by_slurm_or_by_its_host(self):
        host = socket.gethostname().split(".")[0]
        for words, environ, name in (
            (["--name", "a"], {"SLURMD_NODENAME": "b"}, "a"),
            ([], {"SLURMD_NODENAME": "b"}, "b"),
            ([], {}, host),
        ):
            done = support.run("agent.py", "--once", *words, env=environ)
            self.assertEqual(json.loads(done.stdout)["node"], name)

    def test_another_proc_than_linux_has_is_one_error_line(self):
        done = support.run("agent.py", "--procfs", "/nonexistent", "--once")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Aerror: [^\n]*/nonexistent/[^\n]*\n\Z")

    def test_other_trees_can_be_read_by_flag(self):
        done = support.run(
            "agent.py",
            "--once",
            "--procfs",
            os.path.join(TREES, "slurm-v2/proc"),
            "--sysfs",
            os.path.join(TREES, "slurm-v2/sys"),
            env=SLURM,
        )
        sample = json.loads(done.stdout)
        self.assertEqual((sample["cpus"], sample["job_ram"]), (64, 19.1))

    def test_help_names_every_flag_and_the_exit_codes(self):
        done = support.run("agent.py", "--help")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for word in (
            "--host",
            "--port",
            "--interval",
            "--name",
            "--secret-file",
            "--procfs",
            "--sysfs",
            "--once",
            "--report",
            "--verbose",
            "-- ./my_app",
            "127",
            "SENTINEL_HOST",
            "SENTINEL_PORT",
        ):
            self.assertIn(word, done.stdout)

    def test_the_oldest_and_the_newest_python_here_run_it(self):
        pythons = support.pythons()
        for version in (min(pythons), max(pythons)):
            with self.subTest(version):
                done = support.run(
                    "-W",
                    "error",
                    "agent.py",
                    "--once",
                    python=pythons[version],
                    cwd=support.ROOT,
                )
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn("ram", json.loads(done.stdout))


class OffLinux(unittest.TestCase):
    START = "import sys; sys.platform = 'darwin'; import agent; sys.exit(agent.main(['--once']))"
    PSUTIL = textwrap.dedent("""
        import collections
        def cpu_times(n=[0]):
            n[0] += 1
            return collections.namedtuple("t", "user nice system idle")(n[0] * 3, 0, 0, n[0])
        def virtual_memory():
            return collections.namedtuple("m", "total available")(1000 << 20, 250 << 20)
        def swap_memory():
            return collections.namedtuple("m", "total free")(100 << 20, 90 << 20)
        def pids():
            return [1, 2, 3]
        """)

    def run_with(self, folder, text):
        with open(os.path.join(folder, "psutil.py"), "w") as file:
            file.write(text)
        return support.run(
            "-c", self.START, cwd=support.ROOT, env={"PYTHONPATH": folder}
        )

    def test_psutil_is_used_where_there_is_no_proc(self):
        with tempfile.TemporaryDirectory() as folder:
            done = self.run_with(folder, self.PSUTIL)
        self.assertEqual(done.returncode, 0, done.stderr)
        sample = json.loads(done.stdout)
        self.assertEqual(
            (sample["cpu"], sample["ram"], sample["swap"]), (75.0, 75.0, 10.0)
        )
        self.assertEqual((sample["mem_total"], sample["procs"]), (1000 << 20, 3))
        self.assertIn("disk", sample)

    def test_without_psutil_it_is_one_line_that_says_the_cure(self):
        with tempfile.TemporaryDirectory() as folder:
            done = self.run_with(folder, "raise ImportError('none')")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aerror: [^\n]*pip install --user psutil\n\Z")

    @support.requires("module psutil")
    def test_real_psutil_agrees(self):
        sample = agent.Sampler(agent.PsutilProbe()).sample()
        self.assertAlmostEqual(sample["ram"], agent.Sampler().sample()["ram"], delta=3)


if __name__ == "__main__":
    unittest.main()
