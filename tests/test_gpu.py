"""GPUs one by one, and only the job's: NVIDIA's library, nvidia-smi, AMD's files in /sys.

nvml_stub.c stands in for libnvidia-ml.so.1, with eight GPUs of known values; the whole agent runs
with it.  What a real card said is in README.md, "On a real GPU".
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import support
from support import eventually, stays

sys.path.insert(0, support.ROOT)
import agent

HERE = os.path.dirname(os.path.abspath(__file__))
GIB = 2**30
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
    "NVML_STUB",
    "NVML_STUB_FILE",
    "NVML_STUB_PID",
)
# The agent with shorter times than it has, so that a test need not wait a minute
HURRIED = """\
import sys
sys.path.insert(0, %r)
import agent
agent.SLOW_SECONDS = 0.2
agent.STALE_SECONDS = 1.0
agent.PART_SECONDS = 0.3
agent.SECOND_LOOK_SECONDS = 0.3
agent.WAIT_SECONDS = 1.0
sys.exit(agent.main(sys.argv[1:]))
"""
STUB = ""


def setUpModule():
    global STUB
    compiler = shutil.which("cc")
    if not compiler:
        return
    folder = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, folder)
    STUB = os.path.join(folder, "libnvidia-ml.so.1")
    source = os.path.join(HERE, "nvml_stub.c")
    command = [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", STUB, source]
    subprocess.run(command, check=True)


@contextlib.contextmanager
def environment(**variables):
    """These variables, and none other that says whose a GPU is."""
    with mock.patch.dict(os.environ):
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        yield


def gpu(index, uuid="", minor=None):
    found = agent.Gpu(index, uuid)
    found.minor = minor
    return found


class Choice(unittest.TestCase):
    """Which of a node's GPUs are the job's: by the variables that schedulers and users set."""

    @staticmethod
    def indices(gpus, **environ):
        return [found.index for found in agent.choose_nvidia(gpus, environ)]

    def test_cuda_visible_devices_names_numbers_or_beginnings_of_uuids(self):
        gpus = [gpu(n, "GPU-%d%d" % (n, n)) for n in range(8)]
        for text, expected in (
            ("2,3", [2, 3]),
            ("3, 2", [3, 2]),
            ("GPU-5,GPU-11", [5, 1]),
            ("GPU-55", [5]),
            ("1,9,2", [1]),  # as CUDA has it: what comes behind a wrong one is not seen
            ("-1", []),
            ("", []),
            ("NoDevFiles", []),
            ("1,1", [1]),
        ):
            with self.subTest(text):
                self.assertEqual(
                    self.indices(gpus, CUDA_VISIBLE_DEVICES=text), expected
                )

    def test_in_a_device_cgroup_its_numbers_count_what_can_be_opened(self):
        gpus = [gpu(4), gpu(6)]
        self.assertEqual(self.indices(gpus, CUDA_VISIBLE_DEVICES="1"), [6])

    def test_slurms_numbers_are_those_of_the_device_files(self):
        gpus = [gpu(n, minor=7 - n) for n in range(8)]
        self.assertEqual(self.indices(gpus, SLURM_JOB_GPUS="0,1"), [6, 7])
        self.assertEqual(
            self.indices(gpus, SLURM_JOB_GPUS="0,1", SLURM_STEP_GPUS="1"), [6]
        )
        self.assertEqual(
            self.indices([gpu(n) for n in range(8)], SLURM_JOB_GPUS="0,1"), [0, 1]
        )

    def test_where_the_job_sees_no_more_than_it_has_all_are_its(self):
        gpus = [gpu(0, minor=2), gpu(1, minor=3)]
        self.assertEqual(self.indices(gpus, SLURM_JOB_GPUS="2,3"), [0, 1])
        self.assertEqual(self.indices(gpus, SLURM_JOB_GPUS="6,7"), [0, 1])

    def test_what_cuda_sees_goes_before_what_slurm_says_and_no_word_is_all(self):
        gpus = [gpu(n) for n in range(4)]
        self.assertEqual(
            self.indices(gpus, SLURM_JOB_GPUS="0,1,2", CUDA_VISIBLE_DEVICES="2"), [2]
        )
        self.assertEqual(self.indices(gpus), [0, 1, 2, 3])

    def test_a_mig_instance_goes_by_its_own_uuid(self):
        gpus = [gpu(0, "MIG-1"), gpu(0, "MIG-2"), gpu(1, "GPU-3")]
        chosen = agent.choose_nvidia(gpus, {"CUDA_VISIBLE_DEVICES": "MIG-2"})
        self.assertEqual([found.uuid for found in chosen], ["MIG-2"])
        chosen = agent.choose_nvidia(gpus, {"CUDA_VISIBLE_DEVICES": "1"})
        self.assertEqual([found.uuid for found in chosen], ["GPU-3"])

    def test_amd_goes_by_slurm_first_for_its_files_show_every_card(self):
        cards = [gpu(n, "GPU-%d" % n) for n in range(4)]
        for environ, expected in (
            ({}, [0, 1, 2, 3]),
            ({"ROCR_VISIBLE_DEVICES": "1,GPU-3"}, [1, 3]),
            ({"ROCR_VISIBLE_DEVICES": "0,1", "SLURM_JOB_GPUS": "2,3"}, [2, 3]),
            ({"ROCR_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "129"}, [0]),
        ):
            with self.subTest(environ):
                chosen = agent.choose_amd(cards, environ)
                self.assertEqual([found.index for found in chosen], expected)

    def test_a_step_that_was_given_none_knows_the_jobs_by_what_scontrol_told(self):
        text = (
            "     Nodes=c1 CPU_IDs=0-1 Mem=100 GRES=gpu:a100:3(IDX:0,2-3)\n"
            "     Nodes=c[2-3] CPU_IDs=4 Mem=100 GRES=craynetwork:1,gpu:1(IDX:7)\n"
            "     Nodes=c4 CPU_IDs=4 Mem=100 GRES=\n"
        )
        gpus = agent.parse_job_gpus(text)
        self.assertEqual(gpus, {"c1": "0,2,3", "c2": "7", "c3": "7"})
        facts = {"job": "7", "job_name": "x", "cpus": {}, "gpus": gpus}
        for environ, expected in (
            ({}, [0, 2, 3]),
            ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, [0, 2, 3]),
            ({"CUDA_VISIBLE_DEVICES": "2"}, [2]),
            ({"SLURM_STEP_GPUS": "3"}, [3]),
        ):
            with self.subTest(environ), environment(SLURMD_NODENAME="c1", **environ):
                sampler = agent.Sampler()
                agent.apply_facts(sampler, facts)
                self.assertEqual(
                    self.indices([gpu(n) for n in range(8)], **sampler.gpus.environ),
                    expected,
                )


class NvidiaSmi(unittest.TestCase):
    def test_details_are_read_and_what_is_not_told_is_unknown(self):
        (found,) = agent.parse_nvidia_smi(
            "3, GPU-5c, NVIDIA A100-SXM4-40GB, 35, 1024, 40960, 61.55, 400.00, 34,"
            " 0x0000000000000024, Disabled\n"
        )
        self.assertEqual(
            found.part(),
            {
                "part": "gpu",
                "index": 3,
                "uuid": "GPU-5c",
                "name": "NVIDIA A100-SXM4-40GB",
                "gpu": 35,
                "mem_used": GIB,
                "mem_total": 40 * GIB,
                "power": 61.55,
                "power_limit": 400,
                "temp": 34,
                "throttle": "power cap, heat (driver)",
            },
        )
        (found,) = agent.parse_nvidia_smi(
            "0, GPU-5c, NVIDIA T4, [N/A], [N/A], 15360, [Not Supported], [N/A], 34,"
            " 0x0000000000000001, [N/A]\n"
        )
        self.assertEqual(found.known, {"mem_total": 15 * GIB, "temp": 34})

    def test_with_mig_the_cards_memory_is_not_taken_for_the_jobs(self):
        (found,) = agent.parse_nvidia_smi(
            "0, GPU-5c, NVIDIA A100, [N/A], 9000, 40960, 61.5, 400.00, 34, 0x0, Enabled\n"
        )
        self.assertEqual(
            found.known, {"mig": "on", "power": 61.5, "power_limit": 400, "temp": 34}
        )

    def test_a_lost_gpu_is_told_in_its_words(self):
        (found,) = agent.parse_nvidia_smi(
            "0, GPU-5c, NVIDIA A100, [GPU is lost], 1, 2\n"
        )
        self.assertEqual(found.known["error"], "GPU is lost")

    def test_an_old_one_that_does_not_know_the_details_is_asked_without(self):
        probe = agent.Probe()
        answers = ['Field "mig.mode.current" is not a valid field to query.\n', ""]
        answers[1] = "0, GPU-1, NVIDIA K80, 5, 10, 100\n"
        asked = []

        def ask(command):
            asked.append(command)
            return answers["mig" not in command]

        gpus = agent.Gpus(probe)
        with mock.patch.object(probe, "ask", ask), environment():
            gpus.details = True
            self.assertEqual([gpu.index for gpu in gpus.ask_nvidia_smi()], [0])
            gpus.details = False
            gpus.ask_nvidia_smi()
        self.assertEqual(len(asked), 3)


class Amd(unittest.TestCase):
    def test_a_card_is_read_with_its_sensors_and_in_the_order_of_its_number(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)

        def write(card, name, text):
            path = os.path.join(folder, "class/drm", card, "device", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text + "\n")

        for card, busy in (("card10", "70"), ("card2", "0")):
            write(card, "gpu_busy_percent", busy)
            write(card, "mem_info_vram_used", "1000")
            write(card, "mem_info_vram_total", "4000")
        write("card2", "unique_id", "4e3c9e5a")
        write("card2", "product_name", "Instinct MI250X")
        write("card2", "hwmon/hwmon3/power1_average", "93000000")
        write("card2", "hwmon/hwmon3/power1_cap", "560000000")
        write("card2", "hwmon/hwmon3/temp1_input", "41000")
        with environment(PATH="/nowhere"):
            gpus = agent.Gpus(agent.Probe("/proc", folder))
            gpus.details = True
            gpus.refresh()
        first, second = gpus.parts
        self.assertEqual(
            first,
            {
                "part": "gpu",
                "index": 0,
                "uuid": "GPU-4e3c9e5a",
                "name": "Instinct MI250X",
                "gpu": 0,
                "mem_used": 1000,
                "mem_total": 4000,
                "power": 93,
                "power_limit": 560,
                "temp": 41,
            },
        )
        self.assertEqual((second["index"], second["gpu"]), (1, 70))


class WithStub(unittest.TestCase):
    def setUp(self):
        if not STUB:
            self.skipTest("missing here: cc")
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.file = os.path.join(folder, "now")

    def happen(self):
        with open(self.file, "w"):
            pass


class Library(WithStub):
    """The stub within this process."""

    def read(self, stub="", details=True, **variables):
        variables.update(NVML_STUB=stub, NVML_STUB_FILE=self.file)
        with environment(**variables), mock.patch.object(agent, "NVML_LIBRARY", STUB):
            gpus = agent.Gpus(agent.Probe())
            gpus.details = details
            gpus.refresh()
        return gpus

    def summary(self, *words, **variables):
        return dict(agent.summarise_gpus(self.read(*words, **variables).parts))

    def test_all_that_a_gpu_tells(self):
        gpus = self.read(NVML_STUB_PID="4411")
        self.assertEqual(len(gpus.parts), 8)
        self.assertEqual(
            gpus.parts[1],
            {
                "part": "gpu",
                "index": 1,
                "uuid": "GPU-00000001-bbbb",
                "name": "NVIDIA Stub",
                "gpu": 10,
                "mem_used": 2 * GIB,
                "mem_total": 80 * GIB,
                "power": 101,
                "power_limit": 400,
                "temp": 61,
                "processes": 1,
            },
        )
        self.assertEqual(gpus.owners, {4411: [1]})
        self.assertEqual(gpus.parts[5]["throttle"], "power cap, heat (hardware)")
        self.assertEqual(gpus.parts[0]["processes"], 0)

    def test_only_the_jobs_own_make_mean_and_least(self):
        every = {"gpus": 8, "gpu": 35, "gpu_min": 0, "gpu_mem": 5.6}
        own = {"gpus": 2, "gpu": 25, "gpu_min": 20, "gpu_mem": 4.4}
        self.assertEqual(self.summary(), every)
        self.assertEqual(self.summary(CUDA_VISIBLE_DEVICES="2,3"), own)
        self.assertEqual(
            self.summary(CUDA_VISIBLE_DEVICES="GPU-00000002,GPU-00000003-bbbb"), own
        )
        self.assertEqual(self.summary(SLURM_JOB_GPUS="2,3"), own)
        self.assertEqual(
            self.summary("minors", SLURM_JOB_GPUS="4,5"), own
        )  # numbered backwards
        self.assertEqual(self.summary(CUDA_VISIBLE_DEVICES="NoDevFiles"), {})

    def test_in_either_kind_of_device_cgroup_the_job_has_what_it_can_open(self):
        for kind, indices in (("constrained", [0, 1]), ("forbidden", [2, 3])):
            for variables in (
                {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_GPUS": "2,3"},
                {"SLURM_JOB_GPUS": "2,3"},
                {},
            ):
                with self.subTest(kind, **variables):
                    parts = self.read(kind, **variables).parts
                    self.assertEqual([part["index"] for part in parts], indices)
                    self.assertEqual([part["gpu"] for part in parts], [20, 30])

    def test_mig_instances_are_said_and_their_utilisation_is_not_guessed(self):
        gpus = self.read("mig", NVML_STUB_PID="4411", CUDA_VISIBLE_DEVICES="0")
        self.assertEqual([part["mig"] for part in gpus.parts], ["1g.10gb", "2g.20gb"])
        for part in gpus.parts:
            self.assertNotIn("gpu", part)
            self.assertNotIn("power", part)
        self.assertEqual(gpus.parts[1]["mem_total"], 20 * GIB)
        self.assertEqual(gpus.owners, {4411: [0]})
        self.assertEqual(
            self.summary("mig", CUDA_VISIBLE_DEVICES="MIG-00000002-aaaa"),
            {"gpus": 1, "gpu_mem": 10},
        )

    def test_a_split_card_of_which_no_instance_can_be_used_does_not_pass_for_the_jobs(
        self,
    ):
        part = self.read("mighidden").parts[0]
        self.assertEqual(part["mig"], "on")
        self.assertNotIn("mem_used", part)

    def test_what_a_gpu_does_not_support_has_no_key(self):
        parts = self.read("unsupported").parts
        self.assertFalse({"gpu", "power"} & set(parts[1]))
        self.assertEqual((parts[1]["temp"], parts[1]["power_limit"]), (61, 400))
        self.assertEqual(self.summary("unsupported")["gpus"], 8)

    def test_a_lost_gpu_is_told_beside_the_others(self):
        parts = self.read("lost").parts
        self.assertEqual(
            parts[2],
            {
                "part": "gpu",
                "index": 2,
                "error": "lost: the driver cannot reach it any more",
            },
        )
        self.assertEqual([part.get("gpu") for part in parts[3:]], [30, 40, 50, 60, 70])

    def test_a_gpu_that_falls_off_the_bus_keeps_its_name(self):
        variables = {"NVML_STUB": "falls", "NVML_STUB_FILE": self.file}
        with environment(**variables), mock.patch.object(agent, "NVML_LIBRARY", STUB):
            gpus = agent.Gpus(agent.Probe())
            gpus.refresh()
            self.assertEqual(gpus.parts[2]["gpu"], 20)
            self.happen()
            gpus.refresh()
        self.assertEqual(gpus.parts[2]["uuid"], "GPU-00000002-bbbb")
        self.assertIn("lost", gpus.parts[2]["error"])
        self.assertNotIn("gpu", gpus.parts[2])

    def test_an_old_driver_tells_with_its_old_functions(self):
        parts = self.read("old", NVML_STUB_PID="4411").parts
        self.assertEqual(parts[1]["mem_used"], 2.5 * GIB)
        self.assertEqual(parts[1]["processes"], 1)

    def test_nobody_asks_for_more_than_the_summary_needs(self):
        parts = self.read(details=False).parts
        self.assertEqual(
            set(parts[5]),
            {"part", "index", "uuid", "name", "gpu", "mem_used", "mem_total"},
        )

    def test_who_begins_to_take_the_details_need_not_wait_for_the_next_round(self):
        stub = mock.patch.object(agent, "NVML_LIBRARY", STUB)
        with environment(), stub, mock.patch.object(agent, "SLOW_SECONDS", 600):
            gpus = agent.Gpus(agent.Probe())
            gpus.start()
            eventually(lambda: len(gpus.parts) == 8)
            self.assertNotIn("power", gpus.parts[0])
            gpus.want_details()
            eventually(lambda: "power" in gpus.parts[0])

    def test_without_a_driver_nvidia_smi_is_asked(self):
        probe = agent.Probe()
        with environment(NVML_STUB="nodriver", CUDA_VISIBLE_DEVICES="1"):
            gpus = agent.Gpus(probe)
            answer = "0, GPU-0, A, 5, 10, 100\n1, GPU-1, A, 7, 10, 100\n"
            library = mock.patch.object(agent, "NVML_LIBRARY", STUB)
            with library, mock.patch.object(probe, "ask", lambda command: answer):
                gpus.refresh()
        self.assertEqual([part["gpu"] for part in gpus.parts], [7])


class WholeAgent(WithStub):
    """agent.py --stdout with the stub as its libnvidia-ml.so.1."""

    def start(self, stub="", *flags, **variables):
        env = dict.fromkeys(VARIABLES)
        env.update(
            variables,
            NVML_STUB=stub,
            NVML_STUB_FILE=self.file,
            LD_LIBRARY_PATH=os.path.dirname(STUB),
        )
        flags = flags or ("--stdout", "--interval", "0.1")
        tool = support.start("-c", HURRIED % support.ROOT, *flags, env=env)
        self.addCleanup(tool.stop)
        self.tool = tool
        return tool

    def lines(self):
        text = self.tool.out
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def sample(self):
        """The newest sample."""
        return [line for line in self.lines() if "cpu" in line and "ram" in line][-1]

    def gpus(self):
        """The parts of the GPUs in the newest look that is whole."""
        looks = [line["look"] for line in self.lines() if line.get("part") == "look"]
        whole = looks[-2]  # the one after it has begun
        return [
            line
            for line in self.lines()
            if line.get("part") == "gpu" and line["look"] == whole
        ]

    def test_a_job_on_a_part_of_the_node_shows_its_own_gpus(self):
        self.start(CUDA_VISIBLE_DEVICES="2,3", SLURM_JOB_ID="7")
        sample = eventually(lambda: "gpu" in self.sample() and self.sample())
        self.assertEqual(
            (sample["gpus"], sample["gpu"], sample["gpu_min"]), (2, 25, 20)
        )
        parts = eventually(
            lambda: [part for part in self.gpus() if "power" in part] and self.gpus()
        )
        self.assertEqual([part["index"] for part in parts], [2, 3])
        self.assertEqual([part["temp"] for part in parts], [62, 63])
        self.assertEqual([part["power"] for part in parts], [102, 103])

    def test_a_call_that_hangs_delays_nothing_and_is_told(self):
        self.start("hang")
        eventually(lambda: "gpu" in self.sample() and "disk" in self.sample())
        self.happen()
        eventually(lambda: "gpu" not in self.sample())
        known = self.sample()
        self.assertFalse({"gpu", "gpus", "gpu_min", "gpu_mem"} & set(known))
        parts = eventually(
            lambda: self.gpus() and "error" in self.gpus()[0] and self.gpus()
        )
        self.assertEqual([part["uuid"][:12] for part in parts][3], "GPU-00000003")
        for part in parts:
            self.assertRegex(part["error"], r"^no answer from the driver for \d+ s$")
            self.assertNotIn("gpu", part)
        before = len(self.lines())
        stays(lambda: "disk" in self.sample(), 2)
        self.assertGreater(len(self.lines()) - before, 12)
        began = time.monotonic()
        self.assertEqual(self.tool.stop(), 0)
        self.assertLess(time.monotonic() - began, 3)

    def test_a_library_that_hangs_at_once_delays_nothing_and_is_told(self):
        self.start("hanginit")
        eventually(lambda: "disk" in self.sample())
        (part,) = eventually(self.gpus)
        self.assertRegex(part["error"], "no answer from the driver for")
        self.assertNotIn("index", part)

    def test_a_gpu_that_is_lost_meanwhile_is_told_and_the_mean_is_that_of_the_rest(
        self,
    ):
        self.start("falls", CUDA_VISIBLE_DEVICES="2,3")
        eventually(lambda: self.sample()["gpu"] == 25)
        self.happen()
        eventually(lambda: self.sample()["gpu"] == 30)
        lost, other = eventually(
            lambda: "error" in self.gpus()[0] and self.gpus(), what="the words"
        )
        self.assertEqual((lost["index"], other["gpu"]), (2, 30))
        self.assertEqual(self.sample()["gpus"], 2)

    def test_one_sample_does_not_wait_for_a_driver_that_hangs(self):
        tool = self.start("hanginit", "--once")
        self.assertEqual(tool.wait(10), 0)
        self.assertIn("cpu", json.loads(tool.out))

    def test_one_sample_has_the_gpus(self):
        tool = self.start("", "--once", CUDA_VISIBLE_DEVICES="7")
        self.assertEqual(tool.wait(10), 0)
        self.assertEqual(json.loads(tool.out)["gpu"], 70)


if __name__ == "__main__":
    unittest.main()
