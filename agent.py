#!/usr/bin/env python3
"""agent.py - tell the master of Cluster Sentinel how this node and your job are doing.

The promise: one file, Python 3.6 or newer, nothing to install, no root. It only reads, listens
nowhere, talks to one address and takes less than a thousandth of a core.

    /proc, /sys ------> parsers -> rates -> sample => link == pickles over TCP ==> master
    statvfs, nvidia-smi, squeue (may hang) --^  ^      ^  <== ok, error REASON ==
                                                '------'-- loop: every 2 s, on the beat

    python3 agent.py --host login                    watch until SIGINT or SIGTERM
    python3 agent.py --host login -- ./my_app args   run a command and watch while it runs
    python3 agent.py --jobs                          put an agent into each of my running jobs
    python3 agent.py --once                          print one sample as JSON

Exit codes: 0 done or stopped, 1 failed, 2 bad usage; a command's own, 128+n by signal n, 127 none.
"""
# The rooms, from the top; a room uses only rooms above it.
#
#   parsers       text in, values out: no files, no clock
#   probe         the only door to files and commands
#   rates         counters into change per second
#   gpus          those of the job, one by one: a driver may hang, so on a thread of its own
#   sample        one reader a source: a new metric is one reader in the Sampler's list
#   parts         what a flat sample cannot hold: the job's processes, CPUs and GPUs
#   link          the connection to the master: dial, hear, send, dial again; what it missed
#   outlet        the same with stdout in its place
#   report        what a job used of what it asked for
#   loop          clock, signals, the command that is watched
#   herd          where squeue and srun are: an agent for each job
#   relay         where the master is: a connection for each agent of the herd
#   command line  flags, environment, main(argv=None) -> int

import os
import sys

if __name__ == "__main__":
    # CPython keeps the tree that it has parsed the main program into for as long as that runs:
    # 8 MiB of this one, since 3.9.  Of a text that `exec` gets compiled it keeps none.  So the
    # same process starts once more, with that.  It takes 75 ms, for which no COMMAND waits.  A
    # text from a pipe cannot be read again, and a debugger would lose its program: these have
    # other words.
    restart = """\
"agent.py"
import sys
__file__ = sys.argv.pop(1)
with open(__file__, "rb") as file:
    AGENT_TEXT = file.read()
exec(compile(AGENT_TEXT, __file__, "exec"))"""
    words = getattr(sys, "orig_argv", [])  # since Python 3.10
    is_script = words[-len(sys.argv) :] == sys.argv and sys.argv[0] != "-"
    is_awaited = "--" in sys.argv or "--once" in sys.argv
    if is_script and not is_awaited and sys.executable and os.path.isfile(sys.argv[0]):
        options = words[1 : -len(sys.argv)]  # of the interpreter
        try:
            os.execv(
                sys.executable, [sys.executable, *options, "-c", restart, *sys.argv]
            )
        except OSError:
            pass  # then it takes more memory
    # A json.py or select.py of the user's own, in this folder, must not hide the standard
    # library's: the folder that Python searches first comes last.
    sys.path.append(sys.path.pop(0))

import argparse
import contextlib
import functools
import getpass
import json
import math
import pickle
import re
import select
import signal
import socket
import threading
import time
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)

VERSION = "2.0"
Value = Union[str, float]  # float stands for int and bool, too (PEP 484)
Sample = Dict[str, Value]  # what is unknown has no key
Reading = Iterable[Tuple[str, Value]]
Reader = Callable[[], Reading]


# ============================================================================
# Parsers: text in, values out; ValueError or LookupError for a text of another kind
# ============================================================================

# Numbers of a file: its name, key and pattern of each.  proc(5), kernel document accounting/psi.rst
NUMBERS = (
    # 0.20 0.18 0.12 1/80 11206
    ("proc/loadavg", (("load1", r"(\S+)"), ("procs", r"/(\d+)"))),
    ("proc/uptime", (("uptime", r"(\S+)"),)),  # 350735.47 234388.90
    # some avg10=1.12 avg60=...
    ("proc/pressure/cpu", (("psi_cpu", r"some avg10=(\S+)"),)),
    ("proc/pressure/memory", (("psi_mem", r"some avg10=(\S+)"),)),
    ("proc/pressure/io", (("psi_io", r"some avg10=(\S+)"),)),
)
# Sums over devices: keys, class of devices, file, columns (name, in, out), bytes in one unit.
# proc(5), kernel document admin-guide/iostats.rst
COUNTERS = (
    # eth0: 171199307    3251    0    0    0     0          0         0   139424    1862 ...
    (
        ("net_rx", "net_tx"),
        "net",
        "proc/net/dev",
        (0, 1, 9),
        1,
    ),
    #  254       0 vda 31056 7269 1864882 11864 10381 6470 2203312 5835 0 8748 18356 ...
    (
        ("disk_read", "disk_write"),
        "block",
        "proc/diskstats",
        (2, 5, 9),
        512,
    ),
)
TIME_LEFT = r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)$"  # 1-02:03:04 of squeue(1), %L and %l
# 72(x2),36 in SLURM_JOB_CPUS_PER_NODE, sbatch(1)
CPUS_PER_NODE = r"(\d+)(?:\(x(\d+)\))?"
# The variables that a scheduler sets in a job: its id, its name, the element of an array; and how
# its commands call that.  An element of 0 (LSF) or "undefined" (Grid Engine) is none.
# sbatch(1), qsub(1B) of PBS, bsub(1), flux-environment(7), qsub(1) of Grid Engine
SCHEDULERS = (
    ("SLURM_JOB_ID", "SLURM_JOB_NAME", "", ""),
    ("PBS_JOBID", "PBS_JOBNAME", "", ""),  # 12.server, 12[7].server
    ("LSB_JOBID", "LSB_JOBNAME", "LSB_JOBINDEX", "%s[%s]"),
    ("FLUX_JOB_ID", "FLUX_JOB_NAME", "", ""),
    ("JOB_ID", "JOB_NAME", "SGE_TASK_ID", "%s.%s"),
)
# The directory above the job's in /proc/self/cgroup, whatever the job's own is called
JOB_PARENTS = (
    r"/uid_\d+",  # Slurm v1: 4:memory:/slurm_c1/uid_4242/job_1/step_0/task_0
    r"slurmstepd\.scope",  # v2: 0::/system.slice/slurmstepd.scope/job_1/step_0/user/task_0
    r"/pbs_jobs\.service/job(?:id|s)",  # PBS: 5:memory:/pbs_jobs.service/jobid/12.server
    r"/lsf/[^/\n]+",  # LSF: 9:memory:/lsf/cluster1/job.12.4711.1700000000
    r"/UGE",  # Univa Grid Engine: 3:memory:/UGE/12.1
)
# controllers, path of the job, what is below of it
JOB_CGROUP = re.compile(
    r"^\d+:([^:]*):(.*?(?:%s)/[^/\n]+)(.*)" % "|".join(JOB_PARENTS), re.M
)
#   READ: 7 7 0 1120 229680 0 11 12 0    operations, sent, timed out, bytes out, bytes in,
#                                        ms in the queue, ms of round trips, ms in all
NFS_OPERATION = re.compile(r"^\s+[A-Z_\d]+: (\d+) (?:\d+ ){5}(\d+) \d+", re.M)
# read_bytes    27 samples [bytes] 4096 1048576 25804800      (smallest, largest, sum)
LUSTRE_BYTES = r"^%s\s+\d+ samples \[bytes\] \d+ \d+ (\d+)"
TEXT_BYTES = 255  # the most that the master takes of a text


def find_line(text: str, name: str) -> int:
    """Return where the line is that begins with the name, -1 without one."""
    at = text.find("\n" + name) + 1
    if at or text.startswith(name):
        return at
    return -1


def number_at(text: str, start: int) -> int:
    """Return the number that is next there."""
    return int(text[start : start + 30].split(None, 1)[0])


def number(text: str, name: str) -> int:
    """Return the number behind the name that begins a line; ValueError names what is missing."""
    at = find_line(text, name)
    if at < 0:
        raise ValueError("there is no line %r" % name.strip())
    return number_at(text, at + len(name))


def number_or(text: str, name: str, default: int) -> int:
    """Return the number behind the name that begins a line, or the default without one."""
    at = find_line(text, name)
    if at >= 0:
        return number_at(text, at + len(name))
    return default


def parse_cpu(text: str) -> Tuple[int, int]:
    """Return (idle, total) ticks since boot from /proc/stat, proc(5); iowait is idle, too."""
    # cpu  84282 747 51842 1326541 1340 0 3204 17 412 0     (the guest's 412 are in user's, too)
    if not text.startswith("cpu "):
        raise ValueError("it does not begin with a line 'cpu'")
    line = text[: text.index("\n")]
    ticks = list(map(int, line.split()[1:9]))
    idle = ticks[3]
    iowait = ticks[4]
    return idle + iowait, sum(ticks)


def parse_meminfo(text: str) -> Tuple[int, ...]:
    """Return (total, available, swap total, swap free) bytes from /proc/meminfo, proc(5).

    Without swap lines both are 0. In an LXC container MemAvailable may be the machine's, larger
    than the container's MemTotal: then MemFree is what there is.
    """
    # MemTotal:       24684096 kB
    total = number(text, "MemTotal:")
    available = number_or(text, "MemAvailable:", -1)
    if available < 0:
        available = available_before_3_14(text)
    if available > total:
        available = number(text, "MemFree:")
    swap = number_or(text, "SwapTotal:", 0)
    unused = number_or(text, "SwapFree:", 0) if swap else 0
    return total * 1024, available * 1024, swap * 1024, unused * 1024


def available_before_3_14(text: str) -> int:
    """Return the KiB that free(1) took as available before Linux 3.14 had MemAvailable."""
    reclaimable = ("Buffers:", "Cached:", "SReclaimable:")
    cached = sum(number_or(text, name, 0) for name in reclaimable)
    return number(text, "MemFree:") + cached - number_or(text, "Shmem:", 0)


def parse_counters(
    text: str, columns: Tuple[int, int, int], devices: List[str]
) -> Optional[Tuple[int, int]]:
    """Return the sums of two columns over the lines of these devices, None without any line.

    The columns are those of the name and of what went in and out; a name may end with a colon.
    """
    at_name, at_in, at_out = columns
    counted_in = 0
    counted_out = 0
    is_known = False
    for line in text.replace(":", " ").split("\n"):
        words = line.split(None, at_out + 1)
        if len(words) > at_out and words[at_name] in devices:
            counted_in += int(words[at_in])
            counted_out += int(words[at_out])
            is_known = True
    return (counted_in, counted_out) if is_known else None


def parse_duration(text: str) -> Optional[float]:
    """Return the seconds of 1-02:03:04 or 5:00, squeue(1); None for UNLIMITED and the like."""
    found = re.match(TIME_LEFT, text)
    if not found:
        return None
    days, hours, minutes, seconds = [int(part or 0) for part in found.groups()]
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def parse_nfs(text: str) -> Tuple[int, int]:
    """Return (operations, ms of round trips) of all NFS mounts, nfsiostat(8) of mountstats.

    A mount that is bound to several places is listed as often, with the same counters.
    """
    # device server:/home mounted on /home with fstype nfs4 statvers=1.1
    mounts = set()
    for block in re.split(r"^device ", text, flags=re.M):
        head, _, counters = block.partition("\n")
        if " with fstype nfs" in head and "per-op statistics" in counters:
            mounts.add((head.partition(" mounted on ")[0], counters))
    operations = 0
    waited = 0
    for _, counters in mounts:
        _, _, counters = counters.partition("per-op statistics")
        for count, milliseconds in NFS_OPERATION.findall(counters):
            operations += int(count)
            waited += int(milliseconds)
    return operations, waited


def clip(text: str) -> str:
    """Return a text the master takes: UTF-8 of at most 255 bytes."""
    return text.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")


# ============================================================================
# Probe: the only door to files and commands
# ============================================================================

FILE_BYTES = 65536  # the most that is read of a file or an answer
STAT_BYTES = 4194304  # ... of /proc/stat when its CPUs are counted: 4,096 have 400 KB
MOUNTS_BYTES = 4194304  # ... and of mountstats: 4 KB a mount of NFS
PART_BYTES = 2048  # a shorter answer of the kernel is a whole file
WAIT_SECONDS = 5.0  # for a connection, a challenge, nvidia-smi or squeue
SLOW_SECONDS = 10.0  # between two rounds of what may hang
NO_GPU_SECONDS = 60.0  # the same for GPUs where there was none
STALE_SECONDS = 60.0  # older results of it are unknown


class Probe:
    """Reads files named "proc/stat" or "sys/..."; each is opened once and read again in place."""

    def __init__(self, procfs: str = "/proc", sysfs: str = "/sys") -> None:
        self.roots = {"proc": procfs, "sys": sysfs}
        self.open_files: Dict[str, int] = {}

    def where(self, path: str) -> str:
        """Return the real path of a file."""
        root, slash, rest = path.partition("/")
        return self.roots[root] + slash + rest

    def read(self, path: str, limit: int = FILE_BYTES) -> str:
        """Return up to `limit` bytes of a file; OSError if it cannot be read.

        /proc gives about a page at a time, and makes all of it anew to say that it has ended.
        What is much shorter than a page is whole: no file that is read here has longer lines.

        One that fails is opened anew the next time: behind the old descriptor there may be
        a file system that has gone (lxcfs, a cgroup) while the path leads to a new one.
        """
        if path not in self.open_files:
            self.open_files[path] = os.open(self.where(path), os.O_RDONLY)
        file = self.open_files[path]
        try:
            text = chunk = os.pread(file, limit, 0)
            while len(chunk) >= PART_BYTES and len(text) < limit:
                chunk = os.pread(file, limit - len(text), len(text))
                text += chunk
        except OSError as error:
            del self.open_files[path]
            os.close(file)
            raise OSError(error.errno, error.strerror, self.where(path)) from None
        return text.decode("utf-8", "replace")

    def peek(self, path: str, limit: int = FILE_BYTES) -> str:
        """Return up to `limit` bytes of a file and close it: for what may soon be gone."""
        file = os.open(self.where(path), os.O_RDONLY)
        try:
            text = chunk = os.read(file, limit)
            while chunk and len(text) < limit:
                chunk = os.read(file, limit - len(text))
                text += chunk
        finally:
            os.close(file)
        return text.decode("utf-8", "replace")

    def names(self, path: str) -> List[str]:
        """Return the sorted names in a directory, none if there is no such directory."""
        with contextlib.suppress(OSError):
            return sorted(os.listdir(self.where(path)))
        return []

    def tree(self, path: str) -> List[str]:
        """Return a directory and all below it that are directories, in a cgroup's tree."""
        found = [path]
        for folder in found:
            with contextlib.suppress(OSError):
                if os.stat(self.where(folder)).st_nlink == 2:  # nothing below: stat(2)
                    continue
                with os.scandir(self.where(folder)) as entries:
                    below = [entry.name for entry in entries if entry.is_dir()]
                found += ["%s/%s" % (folder, name) for name in sorted(below)]
        return found

    def ask(self, command: str) -> str:
        """Return what a command prints within its time, nothing if there is no such command."""
        name = command.split()[0]
        paths = [os.path.join(folder, name) for folder in os.get_exec_path()]
        if not any(os.access(path, os.X_OK) for path in paths):
            return ""
        timed = "timeout -k 1 %d %s </dev/null 2>/dev/null" % (WAIT_SECONDS, command)
        with os.popen(timed) as pipe:
            return str(pipe.read(FILE_BYTES))


class PsutilProbe(Probe):
    """The same door where there is no /proc: psutil's numbers in the words of proc(5)."""

    def read(self, path: str, limit: int = FILE_BYTES) -> str:
        readers = {
            "proc/stat": self.stat,
            "proc/meminfo": self.meminfo,
            "proc/loadavg": self.loadavg,
        }
        return readers[path]()

    @staticmethod
    def stat() -> str:
        import psutil

        times = psutil.cpu_times()
        busy = 100 * (sum(times) - times.idle)
        cpus = "\ncpu" * (os.cpu_count() or 1)
        return "cpu  %d 0 0 %d 0 0 0 0%s\n" % (busy, 100 * times.idle, cpus)

    @staticmethod
    def meminfo() -> str:
        import psutil

        ram = psutil.virtual_memory()
        swap = psutil.swap_memory()
        lines = (
            ("MemTotal", ram.total),
            ("MemAvailable", ram.available),
            ("SwapTotal", swap.total),
            ("SwapFree", swap.free),
        )
        return "".join("%s: %d kB\n" % (name, size >> 10) for name, size in lines)

    @staticmethod
    def loadavg() -> str:
        import psutil

        return "%f 0/%d" % (os.getloadavg()[0], len(psutil.pids()))


# ============================================================================
# Rates: counters into change per second
# ============================================================================


class Rates(Dict[str, Tuple[float, float]]):
    """Remembers each counter and the time it was read at, in monotonic seconds."""

    def change(self, key: str, counter: float, now: float) -> Reading:
        """Yield (key, change per second), nothing if it has just begun or went back."""
        before = self.get(key)
        self[key] = (counter, now)
        if before is None:
            return
        counted, then = before
        if counter >= counted and now > then:
            per_second = (counter - counted) / (now - then)
            # to three digits; round() is slow
            yield key, int(1000 * per_second + 0.5) / 1000


# ============================================================================
# GPUs: those of the job, one by one
# ============================================================================
#
# NVIDIA's library is asked within this process, nvidia-smi where that cannot be, and AMD's
# driver has files in /sys.  Any of it may hang: `Gpus.refresh` runs on a thread of its own.

NVML_LIBRARY = "libnvidia-ml.so.1"
NVML_NO_PERMISSION = 4  # numbers of nvml.h, nvmlReturn_t
NVML_NOT_FOUND = 6
NVML_GPU_IS_LOST = 15
NVML_RESET_REQUIRED = 16
NVML_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
NVML_MEMORY_V2 = 40 | 2 << 24  # NVML_STRUCT_VERSION(Memory, 2)
NVML_PROCESS_FUNCTIONS = (  # name, bytes of one nvmlProcessInfo_t
    ("nvmlDeviceGetComputeRunningProcesses_v3", 24),
    ("nvmlDeviceGetComputeRunningProcesses_v2", 24),
    ("nvmlDeviceGetComputeRunningProcesses", 16),
)
MAX_GPU_PROCESSES = 256  # of one GPU; more are not told apart
FAULTS = {
    NVML_GPU_IS_LOST: "lost: the driver cannot reach it any more",
    NVML_RESET_REQUIRED: "it has failed and must be reset",
}
# nvmlClocksEventReasons; an idle GPU (bit 0) is not slowed
THROTTLE_REASONS = (
    (0x02, "clocks set by an application"),
    (0x04, "power cap"),
    (0x08, "hardware slowdown"),
    (0x10, "sync boost"),
    (0x20, "heat (driver)"),
    (0x40, "heat (hardware)"),
    (0x80, "power brake"),
    (0x100, "display clocks"),
)
NVIDIA_SMI = "nvidia-smi --query-gpu=%s --format=csv,noheader,nounits"
SMI_FIELDS = ("index", "uuid", "name", "utilization.gpu", "memory.used", "memory.total")
SMI_DETAILS = (
    "power.draw",
    "enforced.power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
    "mig.mode.current",
)
AMD_BUSY = "gpu_busy_percent"


class Gpu:
    """One GPU, or one MIG instance of it: who it is, and what was read of it last."""

    def __init__(self, index: int, uuid: str = "", name: str = "") -> None:
        self.index = index
        self.uuid = uuid
        self.name = name
        self.minor: Optional[int] = None  # N of /dev/nvidiaN
        self.handle: Any = None
        self.known: Sample = {}
        self.pids: List[int] = []

    def number_on_node(self) -> int:
        """Return the number that Slurm gives it, whichever the process may open."""
        return self.index if self.minor is None else self.minor

    def part(self) -> Sample:
        """Return it as a flat dict, without what is unknown."""
        part: Sample = {"part": "gpu", "index": self.index}
        if self.uuid:
            part["uuid"] = clip(self.uuid)
        if self.name:
            part["name"] = clip(self.name)
        part.update(self.known)
        return part


def summarise_gpus(parts: List[Sample]) -> Reading:
    """Yield gpus, gpu and gpu_min (percent busy: mean, least), gpu_mem (percent in use)."""
    if parts:
        yield "gpus", len(parts)
    busy = [float(part["gpu"]) for part in parts if "gpu" in part]
    if busy:
        yield "gpu", round(sum(busy) / len(busy), 1)
        yield "gpu_min", min(busy)
    sized = [part for part in parts if "mem_used" in part and part.get("mem_total")]
    used = sum(float(part["mem_used"]) for part in sized)
    total = sum(float(part["mem_total"]) for part in sized)
    if total:
        yield "gpu_mem", round(100.0 * used / total, 1)


def throttle_words(reasons: int) -> str:
    """Return why the clocks of a GPU are lowered, "" if they are not."""
    return ", ".join(words for bit, words in THROTTLE_REASONS if reasons & bit)


def parse_nvidia_smi(text: str) -> List[Gpu]:
    """Return the GPUs of nvidia-smi's CSV: SMI_FIELDS, and SMI_DETAILS if they were asked for."""
    # 0, GPU-5c89..., NVIDIA A100-SXM4-40GB, 35, 1024, 40960, 61.5, 400.00, 34, 0x...04, Disabled
    gpus = []
    for line in text.splitlines():
        words = line.split(", ")
        if words[0].isdigit() and len(words) >= len(SMI_FIELDS):
            gpus.append(gpu_of_smi(dict(zip(SMI_FIELDS + SMI_DETAILS, words))))
    return gpus


def gpu_of_smi(words: Dict[str, str]) -> Gpu:
    """Return a GPU from the words of nvidia-smi; [N/A] and [Not Supported] are unknown."""
    gpu = Gpu(int(words["index"]), words["uuid"], words["name"])
    known = gpu.known
    fields = [
        ("gpu", "utilization.gpu", 1),
        ("mem_used", "memory.used", 2**20),
        ("mem_total", "memory.total", 2**20),
        ("power", "power.draw", 1),
        ("power_limit", "enforced.power.limit", 1),
        ("temp", "temperature.gpu", 1),
    ]
    if words.get("mig.mode.current") == "Enabled":
        known["mig"] = (
            "on"  # the memory is that of the whole card, not of the job's part
        )
        fields = fields[3:]
    for key, name, unit in fields:
        word = words.get(name, "")
        if re.match(r"\d+(\.\d+)?$", word):
            known[key] = float(word) * unit
        elif re.search("lost|reset", word):
            known["error"] = clip(word.strip("[]"))
    reasons = words.get("clocks_throttle_reasons.active", "")
    if re.match("0x[0-9a-fA-F]+$", reasons) and throttle_words(int(reasons, 16)):
        known["throttle"] = throttle_words(int(reasons, 16))
    return gpu


def visible_gpus(gpus: List[Gpu], visible: str) -> List[Gpu]:
    """Return those that CUDA_VISIBLE_DEVICES names: numbers, or the beginnings of UUIDs.

    As CUDA has it, the first name that fits none ends the list; "" and NoDevFiles are none.
    The numbers count the GPUs that this process may open.
    """
    numbers = sorted({gpu.index for gpu in gpus})
    chosen: List[Gpu] = []
    for word in visible.replace(" ", "").split(","):
        if word.isdigit():
            nth = int(word)
            fit = [gpu for gpu in gpus if gpu.index in numbers[nth : nth + 1]]
        else:
            fit = [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
        if not fit:
            break
        chosen += [gpu for gpu in fit if gpu not in chosen]
    return chosen


def numbered_gpus(gpus: List[Gpu], numbers: str) -> List[Gpu]:
    """Return those that SLURM_JOB_GPUS names: the node's own numbers, N of /dev/nvidiaN.

    Where no more can be seen than the job has, the devices are constrained: all are the job's.
    """
    wanted = {int(word) for word in re.findall(r"\d+", numbers)}
    if len({gpu.index for gpu in gpus}) <= len(wanted):
        return gpus
    return [gpu for gpu in gpus if gpu.number_on_node() in wanted]


def slurm_gpus(environ: Dict[str, str]) -> str:
    """Return the numbers that Slurm gives the GPUs of this step or job, "" if it says none."""
    return environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS") or ""


def choose_nvidia(gpus: List[Gpu], environ: Dict[str, str]) -> List[Gpu]:
    """Return the job's; all of them where nothing says which these are."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return visible_gpus(gpus, environ["CUDA_VISIBLE_DEVICES"])
    if slurm_gpus(environ):
        return numbered_gpus(gpus, slurm_gpus(environ))
    return gpus


def choose_amd(gpus: List[Gpu], environ: Dict[str, str]) -> List[Gpu]:
    """Return the job's: /sys shows all cards, constrained or not, so Slurm's numbers come first."""
    if slurm_gpus(environ):
        chosen = numbered_gpus(gpus, slurm_gpus(environ))
        if chosen:
            return chosen
    if "ROCR_VISIBLE_DEVICES" in environ:
        return visible_gpus(gpus, environ["ROCR_VISIBLE_DEVICES"])
    return gpus


class NvmlError(OSError):
    """What the library answered in place of a value: errno is its nvmlReturn_t."""


class Nvml:
    """NVIDIA's management library, nvml.h; OSError or ImportError where there is none."""

    def __init__(self) -> None:
        import ctypes

        self.c = ctypes
        self.library: Any = ctypes.CDLL(NVML_LIBRARY)
        self.call("nvmlInit_v2")
        self.uuids: Dict[int, str] = {}  # of each index: a lost GPU tells no more
        self.names: Dict[int, str] = {}

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function; NvmlError if it fails or this driver does not have it."""
        try:
            asked: Any = getattr(self.library, function)
            code = asked(*arguments)
        except AttributeError:
            raise NvmlError(0, "there is no %s" % function) from None
        if code:
            self.library.nvmlErrorString.restype = self.c.c_char_p
            words = self.library.nvmlErrorString(code) or b""
            raise NvmlError(code, words.decode("utf-8", "replace"))

    def number(self, function: str, handle: Any, *more: int) -> int:
        """Return what a function writes behind its last argument."""
        value = self.c.c_ulonglong(0)  # little endian: an unsigned int fits in front
        self.call(function, handle, *more, self.c.byref(value))
        return int(value.value)

    def text(self, function: str, handle: Any) -> str:
        """Return the text that a function writes; its buffer's size comes last."""
        buffer = self.c.create_string_buffer(NVML_TEXT_BYTES)
        self.call(function, handle, buffer, NVML_TEXT_BYTES)
        return buffer.value.decode("utf-8", "replace")

    def gpus(self) -> List[Gpu]:
        """Return all that this process may open; a MIG instance stands for itself."""
        count = self.c.c_uint(0)
        self.call("nvmlDeviceGetCount_v2", self.c.byref(count))
        gpus: List[Gpu] = []
        for index in range(count.value):
            gpu = Gpu(index, self.uuids.get(index, ""), self.names.get(index, ""))
            gpu.handle = self.c.c_void_p()
            try:
                handle = self.c.byref(gpu.handle)
                self.call("nvmlDeviceGetHandleByIndex_v2", index, handle)
                self.identify(gpu)
                gpus += self.instances(gpu) or [gpu]
            except NvmlError as error:
                if error.errno not in (NVML_NO_PERMISSION, NVML_NOT_FOUND):
                    gpu.known["error"] = fault_words(error)
                    gpus.append(gpu)
        return gpus

    def identify(self, gpu: Gpu) -> None:
        """Set UUID, name and number of the device file."""
        gpu.uuid = self.uuids[gpu.index] = self.text("nvmlDeviceGetUUID", gpu.handle)
        with contextlib.suppress(NvmlError):
            gpu.name = self.text("nvmlDeviceGetName", gpu.handle)
            self.names[gpu.index] = gpu.name
        with contextlib.suppress(NvmlError):
            gpu.minor = self.number("nvmlDeviceGetMinorNumber", gpu.handle)

    def instances(self, gpu: Gpu) -> List[Gpu]:
        """Return the MIG instances of a GPU that this process may use, none without MIG."""
        mode = self.c.c_uint(0)
        pending = self.c.c_uint(0)
        try:
            self.call(
                "nvmlDeviceGetMigMode",
                gpu.handle,
                self.c.byref(mode),
                self.c.byref(pending),
            )
        except NvmlError:  # it has none
            return []
        if not mode.value:
            return []
        gpu.known["mig"] = "on"
        found = []
        for nth in range(self.number("nvmlDeviceGetMaxMigDeviceCount", gpu.handle)):
            part = Gpu(gpu.index, name=gpu.name)
            part.minor = gpu.minor
            part.handle = self.c.c_void_p()
            with contextlib.suppress(NvmlError):
                handle = self.c.byref(part.handle)
                self.call(
                    "nvmlDeviceGetMigDeviceHandleByIndex", gpu.handle, nth, handle
                )
                part.uuid = self.text("nvmlDeviceGetUUID", part.handle)
                with contextlib.suppress(NvmlError):
                    part.name = self.text("nvmlDeviceGetName", part.handle)
                profile = re.search(r"MIG (\S+)$", part.name)
                part.known["mig"] = profile.group(1) if profile else "an instance"
                found.append(part)
        return found

    def read(self, gpu: Gpu, details: bool) -> None:
        """Read a GPU: what it does not support stays unknown, a fault is told in words."""
        readers = [self.read_busy]
        # with MIG on, the memory is that of all who share the card
        if gpu.known.get("mig") != "on":
            readers.append(self.read_memory)
        if details:
            readers += [
                self.read_power,
                self.read_power_limit,
                self.read_temperature,
                self.read_throttle,
                self.read_processes,
            ]
        for reader in readers:
            if "error" in gpu.known:
                return
            try:
                reader(gpu)
            except NvmlError as error:
                if error.errno in FAULTS:
                    gpu.known["error"] = fault_words(error)

    def read_busy(self, gpu: Gpu) -> None:
        rates = (self.c.c_uint * 2)()  # of the GPU, of its memory
        self.call("nvmlDeviceGetUtilizationRates", gpu.handle, rates)
        gpu.known["gpu"] = int(rates[0])

    def read_memory(self, gpu: Gpu) -> None:
        """The second version leaves out what the driver keeps for itself, as nvidia-smi does."""
        words = (self.c.c_ulonglong * 5)(NVML_MEMORY_V2)
        try:
            self.call("nvmlDeviceGetMemoryInfo_v2", gpu.handle, words)
            _, total, _, _, used = words
        except NvmlError as error:
            if error.errno in FAULTS:
                raise
            self.call("nvmlDeviceGetMemoryInfo", gpu.handle, words)
            total, _, used = words[:3]
        gpu.known["mem_used"] = used
        gpu.known["mem_total"] = total

    def read_power(self, gpu: Gpu) -> None:
        milliwatts = self.number("nvmlDeviceGetPowerUsage", gpu.handle)
        gpu.known["power"] = milliwatts / 1000

    def read_power_limit(self, gpu: Gpu) -> None:
        milliwatts = self.number("nvmlDeviceGetEnforcedPowerLimit", gpu.handle)
        gpu.known["power_limit"] = milliwatts / 1000

    def read_temperature(self, gpu: Gpu) -> None:
        gpu.known["temp"] = self.number("nvmlDeviceGetTemperature", gpu.handle, 0)

    def read_throttle(self, gpu: Gpu) -> None:
        name = "nvmlDeviceGetCurrentClocksThrottleReasons"
        words = throttle_words(self.number(name, gpu.handle))
        if words:
            gpu.known["throttle"] = words

    def read_processes(self, gpu: Gpu) -> None:
        """Note who computes on it; the processes of others are counted as well."""
        for function, size in NVML_PROCESS_FUNCTIONS:
            count = self.c.c_uint(MAX_GPU_PROCESSES)
            buffer = self.c.create_string_buffer(size * MAX_GPU_PROCESSES)
            try:
                self.call(function, gpu.handle, self.c.byref(count), buffer)
            except NvmlError as error:
                if error.errno in FAULTS:
                    raise
                continue
            raw = buffer.raw
            rows = range(0, size * count.value, size)
            pids = [int.from_bytes(raw[at : at + 4], sys.byteorder) for at in rows]
            gpu.pids = sorted(set(pids))
            gpu.known["processes"] = len(gpu.pids)
            return


def fault_words(error: NvmlError) -> str:
    """Return what is wrong with a GPU that cannot be read."""
    return clip(FAULTS.get(error.errno or 0) or "the driver says: %s" % error.strerror)


class Gpus:
    """The GPUs of the job as the last round found them."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.environ: Dict[str, str] = dict(os.environ)
        self.details = False  # somebody takes more than the summary
        self.hurry = threading.Event()  # the next round is to begin at once
        self.nvml: Optional[Nvml] = None
        self.begun = math.inf  # monotonic, as `ended`: the round that goes on, the last
        self.ended = -math.inf
        self.parts: List[Sample] = []
        self.owners: Dict[int, List[int]] = {}  # pid: numbers of its GPUs

    def refresh(self) -> None:
        """Read them all; this may hang."""
        self.begun = time.monotonic()
        try:
            gpus = self.read_nvidia() + self.read_amd()
        finally:
            self.begun = math.inf
        owners: Dict[int, List[int]] = {}
        for gpu in gpus:
            for pid in gpu.pids:
                owners.setdefault(pid, []).append(gpu.index)
        self.parts = [gpu.part() for gpu in gpus]
        self.owners = owners
        self.ended = time.monotonic()

    def refresh_for_ever(self) -> None:
        """Read them again and again, on a thread."""
        while True:
            with contextlib.suppress(OSError, ValueError, LookupError):
                self.refresh()
            self.hurry.wait(SLOW_SECONDS if self.parts else NO_GPU_SECONDS)
            self.hurry.clear()

    def start(self) -> threading.Thread:
        """Have a thread read them again and again."""
        thread = threading.Thread(target=self.refresh_for_ever, daemon=True)
        thread.start()
        return thread

    def wait(self, seconds: float) -> None:
        """Read them once, and wait no longer than this for it."""
        thread = threading.Thread(target=self.refresh, daemon=True)
        thread.start()
        thread.join(seconds)

    def want_details(self) -> None:
        """Have the details read from now on."""
        if not self.details:
            self.details = True
            self.hurry.set()

    def fresh(self) -> bool:
        """Whether the last round is young enough to be told."""
        return time.monotonic() - self.ended < STALE_SECONDS

    def look(self) -> List[Sample]:
        """Return a part for each; where the driver hangs, its words in place of the values."""
        if self.fresh():
            return self.parts
        silent = time.monotonic() - max(self.ended, min(self.begun, time.monotonic()))
        if silent < STALE_SECONDS:
            return []  # the first round has just begun
        words = "no answer from the driver for %.0f s" % silent
        parts: List[Sample] = []
        for part in self.parts or [{"part": "gpu"}]:
            known = ("part", "index", "uuid", "name", "mig")
            kept = {key: value for key, value in part.items() if key in known}
            parts.append(dict(kept, error=words))
        return parts

    def read_nvidia(self) -> List[Gpu]:
        """Return the job's NVIDIA GPUs, by the library or else by nvidia-smi."""
        try:
            self.nvml = self.nvml or Nvml()
            chosen = choose_nvidia(self.nvml.gpus(), self.environ)
        except (OSError, ImportError):  # no library, no driver
            self.nvml = None
            return choose_nvidia(self.ask_nvidia_smi(), self.environ)
        for gpu in chosen:
            self.nvml.read(gpu, self.details)
        return chosen

    def ask_nvidia_smi(self) -> List[Gpu]:
        """Return all GPUs that nvidia-smi lists; an old one does not know each of the details."""
        gpus: List[Gpu] = []
        if self.details:
            fields = ",".join(SMI_FIELDS + SMI_DETAILS)
            gpus = parse_nvidia_smi(self.probe.ask(NVIDIA_SMI % fields))
        if not gpus:
            fields = ",".join(SMI_FIELDS)
            gpus = parse_nvidia_smi(self.probe.ask(NVIDIA_SMI % fields))
        return gpus

    def read_amd(self) -> List[Gpu]:
        """Return the job's AMD GPUs, from the files of amdgpu (kernel document gpu/amdgpu)."""
        cards = []
        for name in self.probe.names("sys/class/drm"):
            card = "sys/class/drm/%s/device" % name
            # the renderD128 of a card is the same GPU
            number = re.match(r"card(\d+)$", name)
            if number and AMD_BUSY in self.probe.names(card):
                cards.append((int(number.group(1)), card))
        gpus = []
        for index, (_, card) in enumerate(sorted(cards)):
            gpu = Gpu(index)
            gpu.handle = card
            unique = self.amd_text(card + "/unique_id")
            gpu.uuid = "GPU-" + unique if unique else ""
            gpu.name = self.amd_text(card + "/product_name")
            gpus.append(gpu)
        chosen = choose_amd(gpus, self.environ)
        for gpu in chosen:
            self.read_amd_card(gpu)
        return chosen

    def read_amd_card(self, gpu: Gpu) -> None:
        """Read the files of one card; those that it does not have stay unknown."""
        files = [
            ("gpu", AMD_BUSY, 1.0),
            ("mem_used", "mem_info_vram_used", 1.0),
            ("mem_total", "mem_info_vram_total", 1.0),
        ]
        if self.details:
            for name in self.probe.names(gpu.handle + "/hwmon"):
                folder = "hwmon/%s/" % name
                files += [
                    ("power", folder + "power1_input", 1e6),
                    ("power", folder + "power1_average", 1e6),
                    ("power_limit", folder + "power1_cap", 1e6),
                    ("temp", folder + "temp1_input", 1e3),
                ]
        for key, file, unit in files:
            text = self.amd_text("%s/%s" % (gpu.handle, file))
            if text.isdigit():
                gpu.known[key] = int(text) / unit

    def amd_text(self, path: str) -> str:
        """Return what a file of the driver says, "" if it does not."""
        with contextlib.suppress(OSError):
            return self.probe.peek(path).strip()
        return ""


# ============================================================================
# Sample: all readings of one node at one instant, one reader a source
# ============================================================================

FIRST_SECONDS = 0.25  # the first sample covers so much time
SQUEUE_SECONDS = 300.0  # squeue is never asked twice within this time
NO_LIMIT = 2**60  # bytes: cgroup v1 says 2 ** 63 - 4096 for no limit
WIDE_SECONDS = 10.0  # between two rounds of what reads many files, and at least ...
WIDE_FACTOR = 1000.0  # ... so many times what the last one took, up to ...
MAX_WIDE_SECONDS = 50.0  # ... this
EARLY_ROUNDS = 3  # of these, as many come as soon as they may
MAX_PROCESSES = 4096  # of a job that are read
MAX_KEPT_GROUPS = 16  # cgroups whose OOM kills are read with each sample
# keys of the space and of the inodes in use, directory; "": the job's working directory.
# A tmpfs has no inodes to speak of.
FILESYSTEMS = (
    ("disk", "inodes", ""),
    ("disk_tmp", "inodes_tmp", "/tmp"),
    ("disk_shm", "", "/dev/shm"),
)
# its clients' counters: /proc before Lustre 2.12, then debugfs, which few may read
LUSTRE_FOLDERS = ("proc/fs/lustre/llite", "sys/kernel/debug/lustre/llite")
# keys, files in order of preference: before Linux 4.5 the 64-bit counters were apart
PORT_COUNTERS = (
    ("ib_rx", ("counters_ext/port_rcv_data_64", "counters/port_rcv_data")),
    ("ib_tx", ("counters_ext/port_xmit_data_64", "counters/port_xmit_data")),
)
STUCK_COUNTER = 2**32 - 1  # where a port's counter of 32 bits stays


def collect(readers: Iterable[Reader]) -> Sample:
    """Return all that the readers know; one that fails leaves out the rest of its keys.

    So a reader reads one source: what is missing takes no key of another source with it.
    """
    known: Sample = {}
    for reader in readers:
        try:
            known.update(reader())
        except (OSError, ValueError, LookupError, ArithmeticError):
            pass  # unknown is no key, not zero
    return known


class Sampler:
    """Reads a Linux node: each reader yields (key, value), or raises what `collect` passes over.

    A new metric that is one number of a file is one more pattern of NUMBERS.  Any other is one more
    reader in `self.readers`, in `self.slow_readers` if what it reads may hang, or in
    `self.wide_readers` if it reads many files.  master_server.py shows it once its METRICS list
    it.
    """

    def __init__(self, probe: Optional[Probe] = None, name: str = "") -> None:
        self.probe = probe or Probe()
        self.name = name
        self.rates = Rates()
        self.gpus = Gpus(self.probe)
        self.now = 0.0  # monotonic time of the last sample
        # the last round of the slow readers, and of the wide ones: when, result
        self.slow: Tuple[float, Sample] = (-math.inf, {})
        self.wide: Tuple[float, Sample] = (-math.inf, {})
        self.idle = 0  # ticks, and so is total
        self.total = 0
        self.percent = 0.0  # CPU in use, as it was last
        self.trouble = ""  # what keeps cpu or ram from being known now
        self.directory = "."  # where the job works
        self.find_end_of_job()
        self.require_cpu_and_ram()
        self.hardware = {kind: self.find_hardware(kind) for kind in ("net", "block")}
        # {controller: directory of the job's cgroup}, and of the own one in it
        self.job: Dict[str, str] = {}
        self.own: Dict[str, str] = {}
        with contextlib.suppress(OSError, LookupError):
            self.find_job()
        self.groups = [self.own["memory"]] if "memory" in self.own else []
        self.killed: Dict[str, int] = {}  # by the OOM killer, by cgroup
        self.refused = 0  # allocations, for want of memory: job_mem_failcnt
        self.is_one_gone = False  # of the cgroups, since the last sample
        self.has_lost_count = False  # of kills, with a cgroup that is gone
        self.nfs = (0, 0)  # operations, ms of their round trips
        self.fixed = collect(
            [self.identify, self.identify_job, self.find_job_cpus, self.count_cpus]
        )
        self.readers: List[Reader] = [
            self.read_cpu,
            self.read_memory,
            *[self.number_reader(*source) for source in NUMBERS],
            *[functools.partial(self.read_counters, *source) for source in COUNTERS],
            self.read_agent,
            self.read_gpus,
        ]
        if self.job:
            self.readers += [
                self.read_job_cpu,
                self.read_job_memory,
                self.read_job_peak,
                self.read_job_events,
            ]
        self.slow_readers: List[Reader] = [
            *[functools.partial(self.read_ports, *source) for source in PORT_COUNTERS],
            *[
                functools.partial(self.read_filesystem, *source)
                for source in FILESYSTEMS
            ],
            self.read_time_left,
        ]
        self.wide_readers: List[Reader] = [
            self.read_job_io,
            self.find_groups,
            self.read_nfs,
            self.read_lustre,
        ]
        self.sample()  # the first rates begin here

    # ---- what does not change ----------------------------------------------------------

    def require_cpu_and_ram(self) -> None:
        """Raise OSError or ValueError, naming the file, if cpu or ram cannot be known here."""
        self.require("cpu", "proc/stat", self.read_cpu)
        self.require("ram", "proc/meminfo", self.read_memory)

    def require(self, key: str, path: str, reader: Reader) -> Sample:
        """Return what the reader knows; OSError or ValueError, naming the file, without the key."""
        try:
            known = dict(reader())
        except (ValueError, LookupError, ArithmeticError) as error:
            file = self.probe.where(path)
            raise ValueError("no %s in %s: %s" % (key, file, error)) from None
        if key not in known:
            file = self.probe.where(path)
            raise ValueError("no %s in %s: its numbers make no sense" % (key, file))
        return known

    def identify(self) -> Reading:
        """Yield who this is: node and user."""
        environ = os.environ
        host = socket.gethostname().split(".")[0]
        yield "version", VERSION
        yield "node", clip(self.name or environ.get("SLURMD_NODENAME") or host)
        yield "user", clip(getpass.getuser())  # KeyError, OSError: a uid without a name

    def identify_job(self) -> Reading:
        """Yield id and name of the job, from the first scheduler that has set them."""
        environ = os.environ
        for variable, name, element, form in SCHEDULERS:
            if environ.get(variable) and (not element or element in environ):
                job = environ[variable].partition(".")[0]  # without the server's name
                nth = environ.get(element, "")
                if nth.strip("0").isdigit():
                    job = form % (job, nth)
                yield "job", clip(job)
                if environ.get(name):
                    yield "job_name", clip(environ[name])
                return

    def count_cpus(self) -> Reading:
        yield "cpus", self.probe.read("proc/stat", STAT_BYTES).count("\ncpu")

    def find_hardware(self, kind: str) -> List[str]:
        """Return the devices of a class: bonds, bridges and partitions count again what they do."""
        folder = "sys/class/" + kind
        names = self.probe.names(folder)
        real = [n for n in names if "device" in self.probe.names(folder + "/" + n)]
        if real or kind != "net":
            return real
        return [name for name in names if name != "lo"]  # in a container

    def find_job(self) -> None:
        """Set the directory of the job's cgroup for each controller; v2 is the controller ""."""
        text = self.probe.read("proc/self/cgroup")
        for controllers, path, below in JOB_CGROUP.findall(text):
            for name in controllers.split(","):
                for mount in (controllers, name or "unified"):
                    folder = "sys/fs/cgroup/%s%s" % (mount, path)
                    if self.probe.names(folder):
                        self.job[name] = folder
                        self.own[name] = folder + below

    def find_job_cpus(self) -> Reading:
        """Yield the CPUs that Slurm has given to the job on this node."""
        groups = re.findall(CPUS_PER_NODE, os.environ["SLURM_JOB_CPUS_PER_NODE"])
        cpus = []
        for each, nodes in groups:
            cpus += [int(each)] * int(nodes or 1)
        yield "job_cpus", cpus[int(os.environ.get("SLURM_NODEID") or 0)]

    def find_end_of_job(self) -> None:
        """Set the end and the limit of the job, as far as the environment tells them."""
        self.end_time = environment_time("SLURM_JOB_END_TIME")
        self.time_limit = 0.0  # seconds; 0 is unknown
        start = environment_time("SLURM_JOB_START_TIME")
        if self.end_time > start > 0:
            self.time_limit = self.end_time - start
        # when squeue was asked last: never again if there is no need
        self.asked = math.inf if self.end_time else -math.inf

    # ---- the sample ---------------------------------------------------------------------

    def sample(self) -> Sample:
        """Return what is known now."""
        self.now = time.monotonic()
        known = dict(self.fixed)
        known.update(collect(self.readers))
        for then, round_of_it in (self.slow, self.wide):
            if self.now - then < STALE_SECONDS:
                known.update(round_of_it)
        if self.trouble or "cpu" not in known or "ram" not in known:
            self.look_again(known)
        return known

    def look_again(self, known: Sample) -> None:
        """Complete a sample that lacks cpu or ram; log once that it cannot be, and that it can."""
        trouble = ""
        try:
            if "cpu" not in known:
                known.update(self.require("cpu", "proc/stat", self.read_cpu))
            if "ram" not in known:
                known.update(self.require("ram", "proc/meminfo", self.read_memory))
        except (OSError, ValueError) as error:
            trouble = str(error)
        if trouble and not self.trouble:
            log("%s: no samples until it is back" % trouble)
        elif self.trouble and not trouble:
            log("cpu and ram are known again")
        self.trouble = trouble

    def widen_for_ever(self) -> None:
        """Do the readings of many files, on a thread.

        The first few come soon: the second knows what is read in a second, or the third, if the
        job's processes were not there yet.
        """
        rounds = 0
        while True:
            begun = time.monotonic()
            self.wide = (begun, collect(self.wide_readers))
            took = time.monotonic() - begun
            rounds += 1
            factor = WIDE_FACTOR if rounds >= EARLY_ROUNDS else 0.0
            time.sleep(min(max(WIDE_SECONDS, factor * took), MAX_WIDE_SECONDS))

    def refresh_for_ever(self) -> None:
        """Do the readings that may hang (a dead file server, a GPU's driver), on a thread.

        What hangs must not hide what many files tell of it: that has a thread of its own.
        """
        threading.Thread(target=self.widen_for_ever, daemon=True).start()
        while True:
            self.slow = (time.monotonic(), collect(self.slow_readers))
            time.sleep(SLOW_SECONDS)

    # ---- readers --------------------------------------------------------------------------

    def read_cpu(self) -> Reading:
        idle, total = parse_cpu(self.probe.read("proc/stat", 256))
        elapsed = total - self.total
        idled = max(0, idle - self.idle)  # iowait may go back
        if elapsed > 0:
            busy = max(0, elapsed - idled)
            # to one digit, half up: round() is slow
            tenths = (1000 * busy + elapsed // 2) // elapsed
            self.percent = tenths / 10
        self.idle = idle
        self.total = total
        yield "cpu", self.percent

    def read_memory(self) -> Reading:
        text = self.probe.read("proc/meminfo", 1024)
        total, available, swap, unused = parse_meminfo(text)
        used = total - available
        if 0 <= used <= total:
            tenths = (1000 * used + total // 2) // total  # as in read_cpu
            yield "ram", tenths / 10
            yield "mem_used", float(used)
        yield "mem_total", total
        if swap and unused <= swap:
            yield "swap", round(100.0 * (swap - unused) / swap, 1)

    def number_reader(self, path: str, numbers: Iterable[Tuple[str, str]]) -> Reader:
        """Return a reader of the numbers of a file: [(key, pattern)]."""
        compiled = [(key, re.compile(pattern)) for key, pattern in numbers]
        return functools.partial(self.read_numbers, path, compiled)

    def read_numbers(
        self, path: str, numbers: Iterable[Tuple[str, "re.Pattern[str]"]]
    ) -> Reading:
        text = self.probe.read(path)
        for key, pattern in numbers:
            yield key, float(pattern.findall(text)[0])

    def read_counters(
        self,
        keys: Tuple[str, str],
        kind: str,
        path: str,
        columns: Tuple[int, int, int],
        unit: int,
    ) -> Reading:
        """Yield what went in and what went out, of all devices of a class together."""
        text = self.probe.read(path)
        counted = parse_counters(text, columns, self.hardware[kind])
        if counted:  # no device is not the same as one without traffic
            for key, units in zip(keys, counted):
                yield from self.rates.change(key, unit * units, self.now)

    def read_job_cpu(self) -> Reading:
        if "cpuacct" in self.job:  # cgroup v1
            path = "%s/cpuacct.usage" % self.job["cpuacct"]
            used = int(self.probe.read(path)) / 1e9
        else:
            path = "%s/cpu.stat" % self.job[""]
            used = number(self.probe.read(path), "usage_usec ") / 1e6
        share = 100.0 * used / float(self.fixed["job_cpus"])
        yield from self.rates.change("job_cpu", share, self.now)

    def read_job_memory(self) -> Reading:
        """Yield the job's memory, cgroup-v1/memory.rst and cgroup-v2.rst: cache is no use of it."""
        if "memory" in self.job:  # cgroup v1
            folder = self.job["memory"]
            text = self.probe.read("%s/memory.stat" % folder)
            anonymous = number(text, "total_rss ")
            shared = number_or(text, "total_shmem ", 0)  # since Linux 4.15
            cache = number(text, "total_cache ")
            limit = "%s/memory.limit_in_bytes" % folder
        else:
            folder = self.job[""]
            text = self.probe.read("%s/memory.stat" % folder)
            anonymous = number(text, "anon ")
            shared = number_or(text, "shmem ", 0)
            cache = number(text, "file ")
            limit = "%s/memory.max" % folder
        used = anonymous + shared
        yield "job_mem", float(used)
        yield "job_cache", float(cache - shared)
        most = int(self.probe.read(limit))  # ValueError for "max": there is none
        if most < NO_LIMIT:
            yield "job_mem_limit", most
            yield "job_ram", round(100.0 * used / most, 1)

    def read_job_peak(self) -> Reading:
        """Yield the most that the kernel has ever charged the job with, page cache included."""
        if "memory" in self.job:
            path = "%s/memory.max_usage_in_bytes" % self.job["memory"]
        else:
            path = "%s/memory.peak" % self.job[""]  # since Linux 5.19
        yield "job_mem_peak", float(self.probe.read(path))

    def read_job_events(self) -> Reading:
        """Yield how often the job's limit was hit, and how often the kernel killed for it.

        v2 counts for the whole tree. v1 counts kills in the leaf where they were, since Linux
        4.13, and the leaf of a step is gone a second later: what it had counted is kept.  Where
        the limit was hit, and a leaf is gone that told of no kill yet, none is not known.
        """
        if "memory" not in self.job:
            events = self.probe.read("%s/memory.events" % self.job[""])
            yield "job_mem_failcnt", number(events, "max ")
            yield "oom_kill", number(events, "oom_kill ")
            return
        refused = int(self.probe.read("%s/memory.failcnt" % self.job["memory"]))
        yield "job_mem_failcnt", refused
        for group in self.groups[:MAX_KEPT_GROUPS]:
            try:
                self.count_kills(group, self.probe.read(group + "/memory.oom_control"))
            except OSError:
                self.is_one_gone = True
            except ValueError:
                continue
        if self.is_one_gone and refused > self.refused:
            self.has_lost_count = True
        self.is_one_gone = False
        self.refused = refused
        killed = sum(tuple(self.killed.values()))  # a thread adds to them
        if killed or self.killed and not self.has_lost_count:
            yield "oom_kill", killed

    def count_kills(self, group: str, text: str) -> None:
        """Note the kills in a cgroup of v1, from its memory.oom_control."""
        # oom_kill_disable 0 / under_oom 0 / oom_kill 1
        self.killed[group] = max(number(text, "oom_kill "), self.killed.get(group, 0))

    def find_groups(self) -> Reading:
        """Look for the cgroups of v1 in which processes may be killed; few are read in between."""
        own = self.own["memory"]
        rest = [name for name in self.probe.tree(self.job["memory"]) if name != own]
        if not set(self.groups) <= {own, *rest}:
            self.is_one_gone = True
        self.groups = [own, *rest]
        for group in self.groups[MAX_KEPT_GROUPS:]:
            with contextlib.suppress(OSError, ValueError):
                text = self.probe.peek(group + "/memory.oom_control")
                self.count_kills(group, text)
        return ()

    def job_processes(self) -> List[int]:
        """Return the pids of the job's processes on this node, but for this one."""
        # by the freezer Slurm keeps track of processes: one cgroup a step, not one a task
        controllers = [name for name in ("freezer", "memory", "") if name in self.job]
        pids: Set[int] = set()
        for folder in self.probe.tree(self.job[controllers[0]]):
            with contextlib.suppress(OSError):
                pids.update(map(int, self.probe.peek(folder + "/cgroup.procs").split()))
        return sorted(pids - {0, os.getpid()})[:MAX_PROCESSES]  # 0 is one out of sight

    def read_job_io(self) -> Reading:
        """Yield what the job's processes read and write by system calls, on any filesystem.

        What a process has done its parent inherits, so the sum goes back only when the parent
        is not of the job: then the rate is unknown for a round.
        """
        read = []
        written = []
        for pid in self.job_processes():
            with contextlib.suppress(OSError, ValueError):  # it has ended, or is root's
                text = self.probe.peek("proc/%d/io" % pid)
                read.append(number(text, "rchar:"))
                written.append(number(text, "wchar:"))
        now = time.monotonic()
        if read:
            yield from self.rates.change("job_read", sum(read), now)
            yield from self.rates.change("job_write", sum(written), now)

    def read_nfs(self) -> Reading:
        """Yield operations a second of all NFS mounts, and the mean of their round trips."""
        text = self.probe.peek("proc/self/mountstats", MOUNTS_BYTES)
        if " with fstype nfs" not in text:
            return
        before, waited_before = self.nfs
        operations, waited = self.nfs = parse_nfs(text)
        known = list(self.rates.change("nfs_ops", operations, time.monotonic()))
        yield from known
        if known and operations > before and waited >= waited_before:
            seconds = (waited - waited_before) / 1000.0
            yield "nfs_rtt", round(seconds / (operations - before), 6)

    def read_lustre(self) -> Reading:
        """Yield what this node reads from Lustre and writes to it."""
        texts = []
        for folder in LUSTRE_FOLDERS:
            for mount in self.probe.names(folder):
                texts.append(self.probe.peek("%s/%s/stats" % (folder, mount)))
        now = time.monotonic()
        for key, name in (
            ("lustre_read", "read_bytes"),
            ("lustre_write", "write_bytes"),
        ):
            sums = re.findall(LUSTRE_BYTES % name, "\n".join(texts), re.M)
            if texts:
                yield from self.rates.change(key, sum(map(int, sums)), now)

    def read_ports(self, key: str, files: Iterable[str]) -> Reading:
        """Yield the bytes of all ports of InfiniBand and Omni-Path, which count words of four."""
        words = []
        for device in self.probe.names("sys/class/infiniband"):
            ports = "sys/class/infiniband/%s/ports" % device
            for port in self.probe.names(ports):
                count = self.read_port(
                    ["%s/%s/%s" % (ports, port, file) for file in files]
                )
                if count is not None:
                    words.append(count)
        if words:
            yield from self.rates.change(key, 4 * sum(words), time.monotonic())

    def read_port(self, paths: Iterable[str]) -> Optional[int]:
        """Return the first counter that can be read, None for one that no longer counts."""
        for path in paths:
            with contextlib.suppress(OSError, ValueError):
                count = int(self.probe.peek(path))
                return None if count == STUCK_COUNTER else count
        return None

    def read_agent(self) -> Reading:
        yield from self.rates.change("agent_cpu", 100.0 * time.process_time(), self.now)
        pages = int(self.probe.read("proc/self/statm").split()[1])
        yield "agent_rss", float(pages * os.sysconf("SC_PAGE_SIZE"))

    def read_time_left(self) -> Reading:
        now = time.monotonic()
        if os.environ.get("SLURM_JOB_ID") and now - self.asked >= SQUEUE_SECONDS:
            self.asked = now  # seldom: sites forbid squeue in a loop
            with contextlib.suppress(OSError, LookupError):
                self.ask_for_end()
        if self.end_time:
            yield "job_time_left", max(0.0, round(self.end_time - time.time(), 1))
        if self.time_limit:
            yield "job_time_limit", self.time_limit

    def ask_for_end(self) -> None:
        """Set the end and the limit of the job by squeue(1): time left, time limit."""
        words = self.probe.ask('squeue -h -j "$SLURM_JOB_ID" -o "%L %l"').split()
        left = parse_duration(words[0])
        if left is not None:
            self.end_time = time.time() + left
        self.time_limit = parse_duration(words[1]) or 0.0 if len(words) > 1 else 0.0

    def read_filesystem(self, disk: str, inodes: str, path: str) -> Reading:
        """Yield how full a filesystem is, as df(1) has it: not one that nobody can write to."""
        space = os.statvfs(path or self.directory)
        if space.f_flag & os.ST_RDONLY:
            return  # an image of a container is always full
        if inodes and space.f_files:  # Btrfs has no count of them
            used = space.f_files - space.f_ffree
            yield inodes, round(100.0 * used / space.f_files, 1)
        used = space.f_blocks - space.f_bfree
        yield disk, round(100.0 * used / (used + space.f_bavail), 1)

    def read_gpus(self) -> Reading:
        if self.gpus.fresh():
            yield from summarise_gpus(self.gpus.parts)


def environment_time(name: str) -> float:
    """Return the time.time() in a variable of Slurm's; 0 if it is none, which is told."""
    text = os.environ.get(name) or "0"
    with contextlib.suppress(ValueError):
        moment = float(text)
        if 0 <= moment < math.inf:  # nan is not
            return moment
    log("%s is %r, which is no time: it is left out" % (name, text))
    return 0.0


def get_system_stats(sampler: Optional[Sampler] = None) -> Sample:
    """Return one sample of the next 0.25 s, {'cpu': 15.5, 'ram': 40.2, ...}: percent, bytes, s."""
    sampler = sampler or Sampler()
    sampler.gpus.wait(WAIT_SECONDS)
    collect(sampler.wide_readers)  # their rates begin here
    time.sleep(FIRST_SECONDS)
    sample = sampler.sample()
    sample.update(collect([*sampler.wide_readers, *sampler.slow_readers]))
    return sample


def apply_facts(sampler: Sampler, facts: Dict[str, Any]) -> None:
    """Take over what a step's environment lacks or has wrong of its job: name, CPUs, end, place."""
    for key in ("job", "job_name"):
        sampler.fixed[key] = clip(str(facts[key]))
    cpus = facts["cpus"].get(sampler.fixed["node"])
    if cpus:
        sampler.fixed["job_cpus"] = cpus
    gpus = facts.get("gpus", {}).get(sampler.fixed["node"])
    environ = sampler.gpus.environ
    if gpus and not slurm_gpus(environ):
        environ["SLURM_JOB_GPUS"] = gpus
        if environ.get("CUDA_VISIBLE_DEVICES") in ("", "NoDevFiles"):
            del environ["CUDA_VISIBLE_DEVICES"]  # the step has none, the job has
    if facts.get("end"):
        sampler.end_time = float(facts["end"])
        sampler.time_limit = float(facts.get("limit") or 0.0)
        sampler.asked = math.inf
    if facts.get("directory"):
        sampler.directory = str(facts["directory"])


# ============================================================================
# Parts: who does the work of the job on this node, a look every ten seconds
# ============================================================================
#
# A look is a list of flat dicts, each with its kind and the number of the look:
#
#   {"part": "look", ...}    how many processes the job has, how many are shown, its CPUs
#   {"part": "core", ...}    how busy 240 CPUs of the node are, a character each
#   {"part": "rank", ...}    one process of the job
#   {"part": "gpu", ...}     one GPU of the job
#
# Processes are those in the tree of the job's cgroup, so never others of the same user.

PART_SECONDS = 10.0  # from one look to the next, and at least ...
PART_SHARE = 0.0015  # ... so long that looks take no more than this of a core
SECOND_LOOK_SECONDS = 2.0  # from the first look to the second
LOOK_PATIENCE = 0.2  # seconds that the loop waits for a look
MAX_RANKS = 64  # processes of a look
TOP_RANKS = 24  # so many of the busiest are among them, and of the largest, ...
IDLE_RANKS = 8  # ... and so many ranks that do the least
MAX_THREADS = 64  # of a process whose threads are looked at
CORES_A_PART = 240
MAX_CORES = 8192
STAT_LINE = 128  # the most bytes that a line of a CPU has in /proc/stat
ENVIRON_BYTES = 262144
# All of a job's processes are in the cgroup of the first of these that there is
PROCESS_CGROUPS = ("", "freezer", "cpuset", "memory", "cpuacct")
# Who has started a rank has told it its number: the innermost starter first.  Slurm gives a
# batch script a 0, too, which then is no rank's; RANK alone may be a leftover of the user's.
RANK_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("RANK", "LOCAL_RANK"),
    ("PMI_RANK", "MPI_LOCALRANKID"),
    ("PMIX_RANK", "PMIX_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_LOCALID"),
    ("RANK", ""),
)


class ProcessStat(NamedTuple):
    """What /proc/PID/stat says, proc(5)."""

    name: str
    state: str
    ticks: int  # of user and system time
    threads: int
    started: int  # ticks since boot: with the pid it tells a process from a later one
    pages: int  # resident
    cpu: int  # it last ran on


def parse_stat(text: str) -> ProcessStat:
    """Return what is used of /proc/PID/stat; the name may hold blanks and parentheses."""
    # 4411 (my (app)) R 4400 4411 ... 14: utime stime 20: threads 22: start 24: rss 39: cpu
    head, _, tail = text.rpartition(")")
    words = tail.split()
    return ProcessStat(
        head.partition("(")[2],
        words[0],
        int(words[11]) + int(words[12]),
        int(words[17]),
        int(words[19]),
        int(words[21]),
        int(words[36]),
    )


def parse_status(text: str) -> Sample:
    """Return mem and peak (bytes), cpus (a list text) and uid of /proc/PID/status."""
    known: Sample = {"uid": number(text, "Uid:")}
    for key, name in (("mem", "VmRSS:"), ("peak", "VmHWM:")):
        if "\n" + name in text:  # a zombie has none
            known[key] = 1024 * number(text, name)
    allowed = text.partition("\nCpus_allowed_list:")[2].split(None, 1)
    if allowed and len(allowed[0]) <= TEXT_BYTES:
        known["cpus"] = allowed[0]
    return known


def parse_io(text: str) -> Tuple[int, int]:
    """Return (read, written) bytes of /proc/PID/io: of all calls, whatever they read from."""
    return number(text, "rchar:"), number(text, "wchar:")


def program_of(words: List[str]) -> str:
    """Return what a command line runs; "" for an empty one.

    Of python3 /usr/bin/jupyter-lab that is jupyter-lab, and of python3 -m ipykernel_launcher it
    is ipykernel_launcher: services are known by their names.  A script of the user's, train.py,
    is told as python3.
    """
    program = os.path.basename(words[0].partition(" ")[0]) if words else ""
    if not program.startswith("python"):
        return program
    for word, following in zip(words[1:], words[2:]):
        if word == "-m" and following:
            return following
        if not word.startswith("-"):
            is_installed = os.path.basename(os.path.dirname(word)) == "bin"
            return os.path.basename(word) if is_installed else program
    return program


def parse_wchan(text: str) -> str:
    """Return the kernel's function that a process waits in, "" if it runs or that is hidden."""
    return "" if text in ("", "0") else clip(text.strip())


def parse_environ(text: str, in_step: bool) -> Sample:
    """Return rank and local_rank of /proc/PID/environ, as far as it names them."""
    known: Sample = {}
    words = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
    for rank, local in RANK_NAMES:
        complete = rank in words and (local in words or rank != "RANK" or not local)
        if not complete or rank == "SLURM_PROCID" and not in_step:
            continue
        if words[rank].isdigit():
            known["rank"] = int(words[rank])
            if words.get(local, "").isdigit():
                known["local_rank"] = int(words[local])
            return known
    return known


def parse_cpu_list(text: str) -> Set[int]:
    """Return the numbers of 0-3,8, cpuset(7), List format."""
    cpus: Set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), min(int(last or first), MAX_CORES) + 1))
    return cpus


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Return the numbers as 0-3,8."""
    runs: List[List[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(
        str(first) if first == last else "%d-%d" % (first, last) for first, last in runs
    )


def parse_cores(text: str) -> Dict[int, Tuple[int, int]]:
    """Return {CPU: (idle, total) ticks since boot} of the lines cpuN of /proc/stat."""
    cores = {}
    for line in text.split("\n")[:-1]:  # the last one may be cut off
        if not line.startswith("cpu"):
            break
        words = line.split()
        if len(words) > 5 and words[0] != "cpu":
            ticks = [int(word) for word in words[1:9]]
            cores[int(words[0][3:])] = (ticks[3] + ticks[4], sum(ticks))
    return cores


def busy_cores(
    before: Dict[int, Tuple[int, int]], after: Dict[int, Tuple[int, int]]
) -> Dict[int, float]:
    """Return {CPU: share of the time that it was busy, 0 to 1} between two readings."""
    busy = {}
    for cpu, (idle, total) in after.items():
        idle_before, total_before = before.get(cpu, (idle, total))
        elapsed = total - total_before
        if elapsed > 0:
            busy[cpu] = min(1.0, max(0.0, 1 - (idle - idle_before) / elapsed))
    return busy


def core_parts(busy: Dict[int, float], count: int) -> Iterable[Sample]:
    """Yield the strip: a character a CPU, tenths that it was busy, - where that is unknown."""
    for first in range(0, count, CORES_A_PART):
        strip = ""
        for cpu in range(first, min(first + CORES_A_PART, count)):
            strip += str(min(9, int(10 * busy[cpu] + 1e-9))) if cpu in busy else "-"
        yield {"part": "core", "first": first, "busy": strip}


class Process:
    """A process of the job: what does not change, and its counters at the last look."""

    def __init__(self, pid: int, step: str, stat: ProcessStat) -> None:
        self.pid = pid
        self.step = step
        self.stat = stat
        self.counted = time.monotonic()  # when the stat was read
        self.cpu: Optional[float] = None  # percent of one core since the look before
        self.io: Optional[Tuple[int, int, float]] = None  # read, written, when
        self.facts: Sample = {}  # rank, local_rank, program
        self.is_shown = True
        self.is_settled = False  # seen twice: it has become the program that it will be

    def update(self, stat: ProcessStat) -> None:
        """Take in a new reading."""
        now = time.monotonic()
        elapsed = now - self.counted
        if elapsed > 0:
            seconds = (stat.ticks - self.stat.ticks) / os.sysconf("SC_CLK_TCK")
            self.cpu = 100.0 * seconds / elapsed
        self.stat = stat
        self.counted = now

    def weight(self) -> float:
        """Return what the busiest have most of, at the first look their time so far."""
        return float(self.stat.ticks) if self.cpu is None else self.cpu


def choose_processes(processes: List[Process]) -> List[Process]:
    """Return the processes that are shown, MAX_RANKS at most.

    Always the busiest, the largest and the ranks that do the least; then who comes first.
    """
    if len(processes) <= MAX_RANKS:
        return processes
    by_weight = sorted(processes, key=lambda process: process.weight(), reverse=True)
    by_size = sorted(processes, key=lambda process: process.stat.pages, reverse=True)
    ranks = [process for process in by_weight if "rank" in process.facts]
    chosen = by_weight[:TOP_RANKS] + by_size[:TOP_RANKS] + ranks[-IDLE_RANKS:]
    for rest in (ranks, by_weight):
        for process in sorted(rest, key=by_rank):
            if len(set(chosen)) < MAX_RANKS:
                chosen.append(process)
    return list(set(chosen))


def by_rank(process: Process) -> Tuple[float, int]:
    """A key to sort by: ranks in their order, then those without a number."""
    return float(process.facts.get("rank", math.inf)), process.pid


class Cores:
    """How busy each CPU of the node is, and which of them are the job's."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.probe = sampler.probe
        self.counted: Dict[int, Tuple[int, int]] = {}
        self.busy: Dict[int, float] = {}
        self.read_at = -math.inf
        self.allowed: Set[int] = set()  # CPUs on which the job's processes may run
        self.cpus: Set[int] = set()
        with contextlib.suppress(OSError, ValueError, LookupError):
            text = self.probe.read("proc/self/status")
            self.allowed = parse_cpu_list(str(parse_status(text)["cpus"]))
        self.find_cpus()
        if self.cpus:
            self.refresh()

    def find_cpus(self) -> None:
        """Set the job's CPUs: its cpuset, else those on which its processes may run.

        Where CPUs are not constrained the latter are more than the job has: then it is unknown.
        """
        self.cpus = set()
        if "job" not in self.sampler.fixed:
            return
        job = self.sampler.job
        for controller, name in (
            ("", "cpuset.cpus.effective"),
            ("cpuset", "cpuset.cpus"),
        ):
            with contextlib.suppress(OSError, ValueError):
                if controller in job:
                    text = self.probe.peek("%s/%s" % (job[controller], name))
                    self.cpus = parse_cpu_list(text)
            if self.cpus:
                return
        given = self.sampler.fixed.get("job_cpus")
        if given is None or len(self.allowed) <= int(given):
            self.cpus = set(self.allowed)

    def refresh(self) -> None:
        """Read /proc/stat, unless that was done a moment ago."""
        now = time.monotonic()
        if self.busy and now - self.read_at < 0.95 * PART_SECONDS:
            return
        lines = int(self.sampler.fixed.get("cpus", MAX_CORES)) + 1
        counted = parse_cores(self.probe.read("proc/stat", STAT_LINE * lines))
        self.busy = busy_cores(self.counted, counted) or self.busy
        self.counted = counted
        self.read_at = now

    def strip(self) -> List[Sample]:
        """Return the parts of all CPUs, none before they are known."""
        count = max(self.counted, default=-1) + 1 if self.busy else 0
        return list(core_parts(self.busy, min(count, MAX_CORES)))

    def read_busy(self) -> Reading:
        """Yield how many of the job's CPUs are more than half busy: a reader of the Sampler."""
        if self.cpus:
            self.refresh()
            known = [self.busy[cpu] for cpu in self.cpus if cpu in self.busy]
            if known:
                yield "cores_busy", sum(busy > 0.5 for busy in known)


class Parts:
    """Looks at the job's processes, CPUs and GPUs, as long as somebody takes it."""

    def __init__(self, sampler: Sampler, attached: bool = False) -> None:
        self.sampler = sampler
        self.probe = sampler.probe
        self.attached = attached  # by a step of our own: all of that is ours
        self.cores = Cores(sampler)
        sampler.readers.append(self.cores.read_busy)
        self.known: Dict[int, Process] = {}
        self.looks = 0
        self.due = -math.inf  # monotonic
        self.looking = False  # a thread is at it
        self.ready: List[Sample] = []

    def take(self) -> List[Sample]:
        """Return a look that is ready; none between two, or while a process cannot be read.

        The kernel may make a reader wait for a process that hangs itself (its memory's lock):
        a thread looks, and the loop waits for it no longer than a moment.
        """
        if not self.looking and time.monotonic() >= self.due:
            self.looking = True
            thread = threading.Thread(target=self.look_aside, daemon=True)
            thread.start()
            thread.join(LOOK_PATIENCE)
        look = self.ready
        self.ready = []
        return look

    def look_aside(self) -> None:
        """Look, on a thread."""
        try:
            self.ready = self.look()
        except (OSError, ValueError, LookupError):
            self.rest(0.0)  # the next time, perhaps
        finally:
            self.looking = False

    def look(self) -> List[Sample]:
        """Return the parts of one look, and set the time of the next."""
        began = time.process_time()
        self.looks += 1
        processes = self.read_processes()
        chosen = sorted(choose_processes(processes), key=by_rank)
        ranks = [self.rank_part(process) for process in chosen]
        ranks = [part for part in ranks if part]
        self.cores.find_cpus()
        with contextlib.suppress(OSError, ValueError, LookupError):
            self.cores.refresh()
        self.sampler.gpus.want_details()
        head: Sample = {"part": "look", "shown": len(ranks)}
        if self.folder():
            head["processes"] = len(processes)
        cpus = format_cpu_list(self.cores.cpus)
        if cpus and len(cpus) <= TEXT_BYTES:
            head["cpus"] = cpus
        cost = time.process_time() - began
        head["interval"] = self.rest(cost)
        parts = [head] + self.cores.strip() + ranks
        parts += [dict(part) for part in self.sampler.gpus.look()]
        for part in parts:
            part["look"] = self.looks
        return parts

    def rest(self, cost: float) -> float:
        """Return the seconds to the next look, and note when it is due: rarer if it is dear.

        The second look comes soon: it is the first that knows how busy a process is.
        """
        pause = max(PART_SECONDS, round(cost / PART_SHARE, 1))
        if self.looks == 1:
            pause = min(pause, SECOND_LOOK_SECONDS)
        # a little less: else the beat at which it is due may come just before
        self.due = time.monotonic() + pause - 0.1
        return pause

    # ---- who is in the job --------------------------------------------------------------

    def folder(self) -> str:
        """Return the directory of the job's cgroup, "" if this is no job's."""
        job = self.sampler.job
        for controller in PROCESS_CGROUPS + tuple(sorted(job)):
            if controller in job:
                return str(job[controller])
        return ""

    def pids(self) -> Dict[int, str]:
        """Return {pid: step} of the job's processes, without the step of our own."""
        pids: Dict[int, str] = {}
        root = self.folder()
        if not root:
            return pids
        own = ""
        me = os.getpid()
        for folder in self.probe.tree(root):
            if folder.endswith("/slurm"):  # cgroup v2: where slurmstepd itself is
                continue
            step = re.search(r"/step_([^/]+)", folder[len(root) :])
            name = step.group(1) if step else ""
            with contextlib.suppress(OSError, ValueError):
                for word in self.probe.peek(folder + "/cgroup.procs").split():
                    pids[int(word)] = name
                    if int(word) == me:
                        own = name
        for pid in [pid for pid, name in pids.items() if name == own]:
            if self.attached or pid == me:
                del pids[pid]
        pids.pop(0, None)  # of another pid namespace
        return pids

    def read_processes(self) -> List[Process]:
        """Return the job's processes that are the user's own work; refusals are silent."""
        known: Dict[int, Process] = {}
        for pid, step in self.pids().items():
            try:
                stat = parse_stat(self.probe.peek("proc/%d/stat" % pid))
                if stat.state in "ZX":
                    continue
                process = self.known.get(pid)
                if process and process.stat[::4] == stat[::4]:  # name and start
                    process.update(stat)
                    if not process.is_settled:
                        process.is_settled = True
                        self.identify(process)
                else:
                    process = Process(pid, step, stat)
                    self.identify(process)
                known[pid] = process
            except (OSError, ValueError, LookupError):
                continue
        self.known = known
        return [process for process in known.values() if process.is_shown]

    def identify(self, process: Process) -> None:
        """Read who a process is; slurmstepd and agents of other masters are not shown."""
        folder = "proc/%d/" % process.pid
        name = process.stat.name
        owner = parse_status(self.probe.peek(folder + "status"))["uid"]
        if owner != os.getuid() or name.startswith("slurmstepd"):
            process.is_shown = False
            return
        words: List[str] = []
        with contextlib.suppress(OSError):
            words = self.probe.peek(folder + "cmdline").split("\0")
        if "--lifeline" in words and "--stdout" in words:
            process.is_shown = False
            return
        process.facts = {"program": clip(program_of(words) or name)}
        with contextlib.suppress(OSError):
            text = self.probe.peek(folder + "environ", ENVIRON_BYTES)
            in_step = process.step not in ("batch", "extern", "interactive")
            process.facts.update(parse_environ(text, in_step))

    # ---- one process --------------------------------------------------------------------

    def rank_part(self, process: Process) -> Sample:
        """Return what is known of a process, nothing once it has gone."""
        part: Sample = {"part": "rank", "pid": process.pid}
        part.update(process.facts)
        if process.step:
            part["step"] = clip(process.step)
        if process.cpu is not None:
            part["cpu"] = round(process.cpu, 1)
        part["mem"] = process.stat.pages * os.sysconf("SC_PAGE_SIZE")
        part["threads"] = process.stat.threads
        part["state"] = process.stat.state
        gpus = self.sampler.gpus.owners.get(process.pid)
        if gpus:
            part["gpu"] = ",".join(str(index) for index in sorted(set(gpus)))
        for reader in (
            self.read_status,
            self.read_threads,
            self.read_wchan,
            self.read_io,
        ):
            try:
                part.update(reader(process))
            except ProcessLookupError:
                return {}
            except (OSError, ValueError, LookupError):
                continue
        return part

    def read_status(self, process: Process) -> Reading:
        known = parse_status(self.probe.peek("proc/%d/status" % process.pid))
        del known["uid"]
        if "cpus" in known:
            self.cores.allowed |= parse_cpu_list(str(known["cpus"]))
        return known.items()

    def read_threads(self, process: Process) -> Reading:
        """Yield how many threads can run, and the CPUs that they last ran on."""
        if process.stat.threads >= MAX_THREADS:
            return
        stats = [process.stat]
        if process.stat.threads > 1:
            stats = []
            folder = "proc/%d/task" % process.pid
            for name in self.probe.names(folder):
                with contextlib.suppress(OSError):
                    text = self.probe.peek("%s/%s/stat" % (folder, name))
                    stats.append(parse_stat(text))
        if stats:
            yield "running", sum(stat.state == "R" for stat in stats)
            on = format_cpu_list({stat.cpu for stat in stats})
            if len(on) <= TEXT_BYTES:
                yield "on", on

    def read_wchan(self, process: Process) -> Reading:
        wchan = parse_wchan(self.probe.peek("proc/%d/wchan" % process.pid))
        if wchan:
            yield "wchan", wchan

    def read_io(self, process: Process) -> Reading:
        """Yield the bytes that its calls read and wrote: of files, pipes and terminals alike."""
        read, written = parse_io(self.probe.peek("proc/%d/io" % process.pid))
        now = time.monotonic()
        before = process.io
        process.io = (read, written, now)
        if before and now > before[2]:
            yield "read", round((read - before[0]) / (now - before[2]), 1)
            yield "write", round((written - before[1]) / (now - before[2]), 1)
        yield "read_total", read
        yield "write_total", written


# ============================================================================
# Link: dial, hear, send, dial again
# ============================================================================

ANSWER_BYTES = 1024  # read at once of what the master says
ANSWER_SECONDS = 10.0  # without an ok: dial again; doubles until the first ok ...
MAX_ANSWER_SECONDS = 60.0  # ... up to this
BACKOFF_SECONDS = 1.0  # from one dial to the next; doubles until the first ok ...
MAX_BACKOFF_SECONDS = 30.0  # ... up to this
GOODBYE_SECONDS = 0.5  # for the master to take the goodbye
PAST_SECONDS = 10.0  # from one reading that is kept for a master to the next ...
MAX_PAST_SECONDS = 3600.0  # ... how old the oldest may get ...
MAX_PAST_BYTES = 262144  # ... and how large all together
UNSAVED_SECONDS = 15.0  # that a master had heard, and not written when it was killed
MAX_PAST_SLICE = 50  # readings that are sent together ...
SLICE_SECONDS = 1.0  # ... and from one such slice to the next, at least
MAX_FULL_SECONDS = 8.0  # from one try to the next while the master has no room
# What a master's records hold of a sample
PAST_KEYS = (
    "cpu",
    "ram",
    "job_cpu",
    "job_mem",
    "job_ram",
    "gpu",
    "gpu_mem",
    "load1",
    "net_rx",
    "net_tx",
    "disk_read",
    "disk_write",
    "swap",
    "psi_mem",
    "psi_io",
)


def log(text: str, end: str = "\n") -> None:
    """Write a line to stderr, over the line before if that had another end (on a terminal)."""
    # some of it a peer may have said
    text = "".join(char if char.isprintable() else "?" for char in text)
    # a log that nobody reads stops nothing
    with contextlib.suppress(OSError, ValueError):
        erase = "\r\033[K" if sys.stderr.isatty() else ""
        line = "%s%s agent: %s%s" % (erase, time.strftime("%H:%M:%S"), text, end)
        print(line, end="", file=sys.stderr, flush=True)


def prove(sock: socket.socket, secret: bytes) -> None:
    """Answer the master's challenge; OSError, and nothing is sent, if there is none."""
    import hmac

    line = b""
    with contextlib.suppress(socket.timeout):
        # without a buffer: what follows the line is for `hear`
        line = sock.makefile("rb", 0).readline(ANSWER_BYTES)
    if not re.match(rb"challenge \S+\r?\n", line):
        raise OSError(
            line.decode("utf-8", "replace").strip()
            or "it asks for no secret: start the master with --secret-file, too"
        )
    nonce = line.split()[1]
    proof = hmac.new(secret, nonce, "sha256").hexdigest()
    sock.sendall(pickle.dumps({"auth": proof}, protocol=4))


def reason_of(error: Exception) -> str:
    """Return why a connection failed, in words."""
    return str(getattr(error, "strerror", "") or error)


def error_in(answer: bytes) -> str:
    """Return the reason behind "error " in what the master said, or ""."""
    return answer.partition(b"error ")[2].decode("utf-8", "replace").strip()


class Past:
    """Readings that the master has perhaps not got: one every PAST_SECONDS, sent after a cut.

        note() --> recent --resume(): a new connection--> waiting --slice()--> sent
                     |                                       ^                  |
                     '--> forgotten: it has them             '---"full past"----+--"ok past"-->

    A master that takes them says ``ok past`` after the first sample of a connection, and again
    once it has a slice.  They carry their age, so that it does not matter what the clocks say.
    """

    def __init__(self) -> None:
        # (monotonic time, packed by us: what makes a sample is at hand for that), as is
        self.recent: List[Tuple[float, bytes]] = []
        self.waiting: List[Tuple[float, bytes]] = []  # ... that: oldest first
        self.size = 0  # bytes of both
        self.noted = -math.inf  # when the last one was
        self.sent = 0  # of those that wait, the first so many are on their way
        self.is_wanted = False  # the master takes a slice
        self.slice_at = 0.0  # when the next one may go

    def note(self, sample: Sample, now: float, ok_at: float) -> None:
        """Keep a sample if it is time to; ok_at: when the master was last known to hear us."""
        while self.recent and self.recent[0][0] < ok_at - UNSAVED_SECONDS:
            self.drop(self.recent)
        if now - self.noted < 0.95 * PAST_SECONDS:  # a beat is never quite on time
            return
        self.noted = now
        known = {key: sample[key] for key in PAST_KEYS if key in sample}
        packed = pickle.dumps(known, protocol=4)
        self.recent.append((now, packed))
        self.size += len(packed)
        while self.size > MAX_PAST_BYTES:
            self.drop(self.waiting or self.recent)
        for readings in (self.waiting, self.recent):
            while readings and now - readings[0][0] > MAX_PAST_SECONDS:
                self.drop(readings)

    def drop(self, readings: List[Tuple[float, bytes]]) -> None:
        """Forget the oldest of the readings."""
        self.size -= len(readings.pop(0)[1])
        if readings is self.waiting and self.sent:
            self.sent -= 1

    def resume(self, since: float) -> None:
        """There is a connection since then: what may not have come before is to be sent."""
        while self.recent and self.recent[0][0] < since:
            self.waiting.append(self.recent.pop(0))
        self.sent = 0
        self.is_wanted = False

    def hear(self, said: bytes) -> None:
        """Take note of what the master says of the past."""
        lines = said.split(b"\n")[:-1]
        if b"ok past" in lines:
            for _ in range(self.sent):
                self.drop(self.waiting)
            self.is_wanted = True
        elif b"full past" in lines:
            self.sent = 0
            self.is_wanted = True
            # spread: there is little room because many send at once
            spread = os.urandom(1)[0] / 256
            self.slice_at = time.monotonic() + MAX_FULL_SECONDS * spread

    def slice(self, now: float) -> List[Sample]:
        """Return the parts that may be sent now."""
        if not self.is_wanted or not self.waiting or now < self.slice_at:
            return []
        self.slice_at = now + SLICE_SECONDS
        self.is_wanted = False
        parts: List[Sample] = []
        for taken, packed in self.waiting[:MAX_PAST_SLICE]:
            part: Sample = {"part": "past", "age": round(now - taken, 2)}
            part.update(pickle.loads(packed))
            parts.append(part)
        self.sent = len(parts)
        return parts


class Link:
    """The connection to the master, through the first candidate that answers.

        waiting --time of the next dial--> dialling --connected--> up --first ok--> answered
           ^                                  |                     |                  |
           '------------ lose(): refused, closed, silent, full -----'------------------'

    waiting     sock is None, retry_at is when to dial
    dialling    sock is None, retry_at is infinite; a thread is at it
    up          sock is there, answered is False: nobody has said ok on it yet
    answered    sock is there, answered is True
    """

    def __init__(
        self, hosts: List[Tuple[str, int]], secret: bytes, interval: float
    ) -> None:
        self.candidates = hosts
        self.secret = secret
        self.peer = ""
        self.sock: Optional[socket.socket] = None
        self.retry_at = 0.0  # monotonic, and so is heard: the last ok or the dial
        self.heard = 0.0
        self.backoff = BACKOFF_SECONDS
        self.patience = max(ANSWER_SECONDS, 3 * interval)
        self.sent = 0  # messages on this connection
        self.answered = False
        self.announced = False  # in the log
        self.takes_parts = False  # the master has said so on this connection
        self.half_line = b""  # of an answer
        self.unsent = b""  # of the last look
        self.past = Past()
        self.ok_at = -math.inf  # when the last ok came, on any connection
        self.ever_answered = False
        self.said: Set[str] = set()  # what is known since the last good link

    def start_dialling(self, wake: int) -> None:
        """Dial on a thread, for a name lookup cannot be hurried."""
        self.retry_at = math.inf
        threading.Thread(target=self.dial, args=(wake,), daemon=True).start()

    def dial(self, wake: int) -> None:
        """Call the candidate whose turn it is, and wake the loop by a byte."""
        host, port = self.candidates[0]
        self.peer = "%s:%d" % ("[%s]" % host if ":" in host else host, port)
        sock = None
        try:
            sock = socket.create_connection((host, port), WAIT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.secret:
                prove(sock, self.secret)
            sock.setblocking(False)
            self.heard = time.monotonic()
            self.sock = sock  # last: from here on the loop uses it
        except Exception as error:  # UnicodeError: no possible name
            if sock is not None:
                sock.close()
            self.lose("cannot reach", error)
        with contextlib.suppress(OSError):  # a full pipe wakes the loop as well
            os.write(wake, b"\0")

    def exchange(self, message: Optional[Sample] = None) -> None:
        """Hear what has come, then send a message; a link that fails is dialled again later."""
        if self.sock is None:
            return
        try:
            self.hear(self.sock)
            if self.flush(self.sock) and message:
                self.send(self.sock, message)
        except (OSError, ValueError) as error:
            self.lose("lost", error)
            return
        # who takes the call may yet hang up at once
        if not self.announced and (self.answered or self.sent > 1):
            self.announced = True
            self.say("connected to " + self.peer)

    def hear(self, sock: socket.socket) -> None:
        """Take note of an ok; OSError for an error, an end, or too long a silence."""
        try:
            answer = sock.recv(ANSWER_BYTES)
        except BlockingIOError:  # no answer yet
            answer = None
        if answer == b"ok\n" and self.answered and not self.half_line:
            self.heard = self.ok_at = time.monotonic()  # as nearly always: no news
            return
        if answer is not None:
            said = self.half_line + answer
            lines = said.split(b"\n")
            self.half_line = lines.pop()[-ANSWER_BYTES:]
            if b"ok" in lines or b"ok parts" in lines:
                if not self.answered:
                    self.past.resume(self.heard)  # when it was dialled
                self.heard = time.monotonic()
                self.ok_at = self.heard
                self.answered = True
                self.ever_answered = True
            if b"ok parts" in lines:
                self.takes_parts = True
            if b" past\n" in said:
                self.past.hear(said)
            if not answer or b"error " in answer:
                raise OSError(error_in(answer) or "it closed the connection")
        if time.monotonic() - self.heard > self.patience:
            if not self.unsent:
                sock.send(pickle.dumps({"bye": "reconnecting"}, protocol=4))
            raise OSError("no answer for %.0f s" % self.patience)

    def send(self, sock: socket.socket, message: Sample) -> None:
        """Send a whole message: nothing may follow a part of one."""
        packed = pickle.dumps(message, protocol=4)
        if sock.send(packed) < len(packed):
            raise OSError("it takes no more")
        self.sent += 1

    def send_look(self, parts: List[Sample]) -> None:
        """Send the parts of one look behind the sample; what does not fit goes later."""
        if self.sock is None or self.unsent:
            return
        self.unsent = b"".join(pickle.dumps(part, protocol=4) for part in parts)
        try:
            self.flush(self.sock)
        except (OSError, ValueError) as error:
            self.lose("lost", error)

    def send_past(self, sample: Sample) -> None:
        """Send what the master missed behind the sample, and keep that: it may miss it, too."""
        now = time.monotonic()
        if self.past.is_wanted and self.sock is not None and not self.unsent:
            parts = self.past.slice(now)
            if parts:
                self.send_look(parts)
        self.past.note(sample, now, self.ok_at)

    def flush(self, sock: socket.socket) -> bool:
        """Send on what is left of a look; whether all of it is gone, so that more may follow."""
        if not self.unsent:
            return True
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[sock.send(self.unsent) :]
        return not self.unsent

    def lose(self, event: str, error: Exception) -> None:
        """Hang up, say why, set the time of the next dial: spread, so that a crowd parts."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        was_good = self.answered or self.sent > 2
        if was_good:
            self.backoff = BACKOFF_SECONDS
            self.said.clear()
        if not self.answered:
            self.candidates.append(self.candidates.pop(0))
        if self.sent and not self.ever_answered:
            longer = min(2 * self.patience, MAX_ANSWER_SECONDS)
            self.patience = max(self.patience, longer)
        self.sent = 0
        self.answered = False
        self.announced = False
        self.takes_parts = False
        self.past.is_wanted = False
        self.half_line = b""
        self.unsent = b""
        spread = 1 - os.urandom(1)[0] / 512  # from a half to one
        delay = self.backoff * spread / len(self.candidates)
        self.backoff = min(2 * self.backoff, MAX_BACKOFF_SECONDS)
        self.retry_at = time.monotonic() + delay
        news = "%s the master at %s (%s)" % (event, self.peer, reason_of(error))
        self.say(news, ": retrying in %.1f s" % delay)

    def say(self, news: str, more: str = "") -> None:
        """Log what is new since the last good link."""
        if news not in self.said:
            self.said.add(news)
            log(news + more)

    def close(self, farewell: Sample) -> None:
        """Send the goodbye and wait for the master to take it."""
        self.exchange(farewell)
        sock = self.sock
        self.sock = None
        if sock is None:
            return
        with contextlib.suppress(OSError):
            sock.settimeout(GOODBYE_SECONDS)
            sock.shutdown(socket.SHUT_WR)
            # what is left unread would turn the end into a RST
            while sock.recv(ANSWER_BYTES):
                pass


class Outlet:
    """The way of the samples to stdout, a line of JSON each: in the place of a Link."""

    sock = None
    answered = True
    takes_parts = True
    sent = 1
    peer = "stdout"
    retry_at = math.inf

    def __init__(self) -> None:
        self.closed = False

    def start_dialling(self, wake: int) -> None:
        """There is nobody to dial."""

    def exchange(self, message: Optional[Sample] = None) -> None:
        """Write a message; nothing more once nobody reads."""
        if message:
            self.send_look([message])

    def send_look(self, parts: List[Sample]) -> None:
        """Write dicts, a line each."""
        data = b"".join(json.dumps(part).encode() + b"\n" for part in parts)
        while data and not self.closed:
            try:
                data = data[os.write(1, data) :]
            except OSError:
                self.closed = True

    def send_past(self, sample: Sample) -> None:
        """Nothing: whoever reads the lines keeps what the master misses."""

    def close(self, farewell: Sample) -> None:
        """Write the goodbye."""
        self.exchange(farewell)


# ============================================================================
# Report: what a job used of what it asked for
# ============================================================================

REPORTED = ("cpu", "job_cpu", "mem_used", "job_mem", "gpu")
GIB = 2.0**30
MIB = 2.0**20
MARGIN = 1.2  # a fifth more than was needed: what to ask for next time
KILLED = ("SIGKILL", "exit 137")  # as a command ends that the kernel has killed

# The same words are in the verdicts of master_server.py.
OUT_OF_MEMORY = "out of memory: the kernel killed %s"
BELOW_PEAK = "memory peak higher than any sample: the highest was %.3g GB of %.3g GB"
MEMORY_PEAK = "memory peak %.3g GB of %.3g GB"
KERNEL_COUNT = "kernel's count, 1 run, %d samples"
SAMPLED_COUNT = "sampled, 1 run, %d samples"


def memory_flag(size: float) -> str:
    """Return sbatch's flag for a fifth more than that: --mem=74G. The master has the same."""
    unit, name = (GIB, "G") if size >= GIB else (100 * MIB, "00M")
    return "--mem=%d%s" % (max(1, math.ceil(MARGIN * size / unit)), name)


class Report(Dict[str, Tuple[float, float, float]]):
    """Sums samples up, {key: (seconds, mean, peak)}; each has the weight of the time it covers.

    before has the kernel's counts as they were: what was killed then is none of this report's.
    """

    def __init__(self, before: Optional[Sample] = None) -> None:
        super().__init__()
        self.before = before or {}
        self.samples = 0
        self.seconds = 0.0  # covered by all samples
        self.least: Dict[str, float] = {}

    def add(self, sample: Sample, seconds: float) -> None:
        """Count a sample that covers so many seconds."""
        self.samples += 1
        self.seconds += seconds
        for key in REPORTED:
            if key not in sample:
                continue
            value = float(sample[key])
            known, mean, peak = self.get(key, (0.0, 0.0, 0.0))
            known += seconds
            mean += (value - mean) * seconds / known
            self[key] = (known, mean, value if value > peak else peak)
            if not value >= self.least.get(key, math.inf):
                self.least[key] = value

    def lines(self, last: Sample, ended: str = "") -> Iterable[str]:
        """Yield the report for people, a line a subject; last is the last sample."""
        kills = self.risen("oom_kill", last)
        if kills:
            words = "1 process" if kills == 1 else "%d processes" % kills
            yield OUT_OF_MEMORY % words
        yield self.duration_line()
        if "job_cpu" in self or "cpu" in self:
            yield self.cpu_line(last)
        if "job_mem" in self or "mem_used" in self:
            yield self.memory_line(last, kills)
        if "gpu" in self:
            yield "GPU mean %.1f %% of %s" % (self["gpu"][1], last.get("gpus"))
        is_uncounted = "oom_kill" not in last and self.risen("job_mem_failcnt", last)
        if ended in KILLED and is_uncounted:
            yield "it had reached its memory limit; the kernel's count of kills is not known"
        if "job_mem" in self and "job_mem_limit" in last:
            yield from self.advise_memory(last, kills)
        if "job_mem_peak" in last:
            counted = float(last["job_mem_peak"]) / GIB
            yield "the kernel's peak, with page cache, %.3g GB" % counted

    def risen(self, key: str, last: Sample) -> int:
        """Return by how much a counter has risen since the start; 0 without one."""
        return max(0, int(last.get(key, 0)) - int(self.before.get(key, 0)))

    def memory_line(self, last: Sample, kills: int) -> str:
        in_job = "job_mem" in self
        peak = self["job_mem" if in_job else "mem_used"][2] / GIB
        most = float(last.get("mem_total", 0.0)) / GIB
        if not in_job:
            return "memory peak %.3g GB of the node's %.3g GB" % (peak, most)
        if "job_mem_limit" in last:
            most = float(last["job_mem_limit"]) / GIB
        return (BELOW_PEAK if kills else MEMORY_PEAK) % (peak, most)

    def advise_memory(self, last: Sample, kills: int) -> Iterable[str]:
        """Yield what to ask for next time, if that is another size.

        The kernel's peak holds the page cache as well: it is enough, but no sign of want.
        """
        limit = float(last["job_mem_limit"])
        sampled = self["job_mem"][2]
        peak = max(sampled, float(last.get("job_mem_peak", 0.0)))
        if kills:
            asked = "asked for %.3g GB, which was too little" % (limit / GIB)
            yield "%s: %s may do" % (asked, memory_flag(limit))
            return
        source = KERNEL_COUNT if "job_mem_peak" in last else SAMPLED_COUNT
        if sampled > 0.9 * limit:
            peak = sampled
            source = SAMPLED_COUNT
        flag = memory_flag(peak)
        unit = GIB if flag.endswith("G") else MIB
        if float(flag[6:-1]) * unit < 0.8 * limit or sampled > 0.9 * limit:
            sizes = "asked for %.3g GB, peak %.3g GB" % (limit / GIB, peak / GIB)
            yield "%s (%s): %s would do" % (sizes, source % self.samples, flag)

    def duration_line(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return "ran %d:%02d:%02d" % (hours, minutes, seconds)

    def cpu_line(self, last: Sample) -> str:
        in_job = "job_cpu" in self
        _, mean, peak = self["job_cpu" if in_job else "cpu"]
        cpus = last.get("job_cpus" if in_job else "cpus")
        owner = "" if in_job else "the node's "
        return "CPU mean %.1f %%, peak %.1f %% of %s%s CPUs" % (mean, peak, owner, cpus)


# ---- the record of a command, as the masters' recorders write theirs -----------------

RECORD_SECONDS = 2.0  # that a disk may keep us from ending
RECORD_FORMAT = 1  # of the lines: see the room of the records in master_server.py
RECORDED = ("cpu", "job_cpu", "job_mem", "gpu")  # those of REPORTED that a row can have
# what Slurm tells in the environment and a sample does not have: key, variable, its type
TOLD_OF_JOB = (
    ("partition", "SLURM_JOB_PARTITION", str),
    ("nodes", "SLURM_JOB_NUM_NODES", int),
    ("mem", "SLURM_MEM_PER_NODE", lambda text: int(text) * 2**20),
)


class Life(NamedTuple):
    """A command from its start to its end."""

    command: List[str]
    start: float  # time.time()
    seconds: float
    code: Optional[int]  # as subprocess has it; None while it runs on
    usage: Any  # of it and its children, as os.wait4() has it; None while it runs on

    @property
    def end(self) -> float:
        return self.start + self.seconds

    def state(self, kills: int) -> Sample:
        """Return how it ended, as Slurm would say it; nothing while it runs on."""
        if self.code is None:
            return {}
        if self.code == 0:
            return {"state": "COMPLETED", "exit": "0:0"}
        codes = (self.code, 0) if self.code > 0 else (0, -self.code)
        state = "OUT_OF_MEMORY" if kills else "FAILED"
        return {"state": state, "exit": "%d:%d" % codes}


def own_job(last: Sample, life: Life) -> Sample:
    """Return the facts of the job that a command is in; without a job it is one of its own."""
    environ = os.environ
    facts: Sample = {"start": round(life.start, 3), "end": round(life.end, 3)}
    if "job" in last:
        facts["job"] = facts["raw"] = last["job"]
    else:
        facts["job"] = "%s-%d-%d" % (last["node"], life.start, os.getpid())
    facts["job_name"] = last.get("job_name", clip(os.path.basename(life.command[0])))
    for key, known in (("user", "user"), ("limit", "job_time_limit")):
        if known in last:
            facts[key] = last[known]
    array = environ.get("SLURM_ARRAY_JOB_ID")
    if "job" in last and array:
        facts["array"] = array
        facts["job"] = "%s_%s" % (array, environ.get("SLURM_ARRAY_TASK_ID"))
    for key, variable, kind in TOLD_OF_JOB:
        with contextlib.suppress(KeyError, ValueError):
            facts[key] = kind(environ[variable])
    return facts


def record_row(last: Sample, report: Report, life: Life, cpus: int) -> Dict[str, Any]:
    """Return the one row of a record: least, mean, most and the node's mean of each metric.

    What the kernel has counted of the command tells of more than samples do, if it was short.
    """
    row: Dict[str, Any] = {
        "row": round(life.end, 3),
        "step": round(life.seconds, 3),
    }
    for key in RECORDED:
        if key in report:
            _, mean, peak = report[key]
            row[key] = [report.least[key], mean, peak, mean]
    if life.usage is not None:
        spent = life.usage.ru_utime + life.usage.ru_stime
        mean = 100 * spent / life.seconds / cpus
        least, _, most, _ = row.get("job_cpu", [mean] * 4)
        row["job_cpu"] = [min(least, mean), mean, max(most, mean), mean]
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
        peak = float(life.usage.ru_maxrss * unit)
        least, mean, most, _ = row.get("job_mem", [None, None, peak, None])
        row["job_mem"] = [least, mean, max(most, peak), mean]
    for key in RECORDED:
        if key in row:
            row[key] = [value and float("%.4g" % value) for value in row[key]]
    return row


def record_lines(
    last: Sample, report: Report, life: Life, told: str
) -> Iterable[Dict[str, Any]]:
    """Yield the record of a command, a line each; told is its report."""
    facts = own_job(last, life)
    facts.update(life.state(report.risen("oom_kill", last)))
    yield {"job": facts, "time": round(life.end, 3), "format": RECORD_FORMAT}
    cpus = int(last.get("job_cpus") or last.get("cpus") or 1)
    known: Sample = {"job_cpus": cpus}
    for key in ("cpus", "mem_total", "gpus", "job_mem_limit"):
        if key in last:
            known[key] = last[key]
    yield {"nodes": {last["node"]: known}}
    yield record_row(last, report, life, cpus)
    event = {"time": round(life.end, 3), "kind": "finished", "node": last["node"]}
    yield {"event": dict(event, text=told)}
    if life.code is not None:
        yield {"end": {"time": round(life.end, 3)}}


def record_path(folder: str, job: str, start: float) -> str:
    """Return the path of the one file that this process writes of a job."""
    name = ""
    for byte in job.encode("utf-8", "replace"):
        is_plain = chr(byte).isalnum() and byte < 128 or byte == ord("_")
        name += chr(byte) if is_plain else "%%%02X" % byte
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:40]
    mark = "%s-%d-%d" % (host, os.getpid(), start)
    return os.path.join(folder, "%s.%s.jsonl" % (name, mark))


def append_record(path: str, lines: Iterable[Dict[str, Any]]) -> None:
    """Append lines to the record of a command, for its owner alone; OSError."""
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    data = text.encode()
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        if os.write(file, data) < len(data):
            raise OSError("no room for all of it")
    finally:
        os.close(file)  # which is where a network filesystem tells of a quota


def append_in_time(path: str, lines: Iterable[Dict[str, Any]]) -> None:
    """Append them, for a while at most: a disk that hangs or is full is one line."""
    failures = ["it does not answer"]

    def append() -> None:
        try:
            append_record(path, lines)
            failures.clear()
        except Exception as error:
            failures[:] = [getattr(error, "strerror", None) or str(error)]

    thread = threading.Thread(target=append, daemon=True)
    thread.start()
    thread.join(RECORD_SECONDS)
    for why in failures:
        log("cannot record in %s: %s" % (os.path.dirname(path), why))


# ============================================================================
# Loop: wait, sample, send, on the beat
# ============================================================================

ENDING_SIGNALS = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")
CAUGHT_SIGNALS = ENDING_SIGNALS + ("SIGUSR1", "SIGUSR2", "SIGCHLD")
TYPED_SIGNALS = ("SIGINT", "SIGQUIT")  # a terminal sends them to the command as well


def ending_of(code: int) -> str:
    """Return how a process ended, from its code: exit 3, SIGKILL; signal 40 has no name."""
    if code >= 0:
        return "exit %d" % code
    try:
        return signal.Signals(-code).name
    except ValueError:
        return "signal %d" % -code


def exit_status(code: int) -> int:
    """Return what a shell makes of a process's code: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def give_memory_back() -> None:
    """Return to the system what compiling this file took: glibc keeps some MiB of it."""
    with contextlib.suppress(ImportError, OSError, AttributeError):  # another libc
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


class Agent:
    """Binds sampler, link and command to the clock and the signals."""

    def __init__(
        self, args: argparse.Namespace, sampler: Sampler, link: Union[Link, Outlet]
    ) -> None:
        self.args = args
        self.sampler = sampler
        self.link = link
        self.parts = Parts(sampler, attached=bool(args.lifeline))
        self.report = Report(collect([sampler.read_job_events]))
        self.ending = ""  # why it ends, once it does
        self.signals: List[int] = []
        self.command: Any = None
        self.start_time = time.time()  # of the command
        self.started = time.monotonic()
        self.seconds = 0.0  # that the command took, once it has ended ...
        self.usage: Any = None  # ... and what of the machine: see os.wait4()
        self.last = dict(sampler.fixed)  # the newest sample
        self.told = ""  # at the goodbye
        self.recorded = ""  # where a part of the record is
        self.awake, self.wake = os.pipe()  # signals and dialled links write a byte
        os.set_blocking(self.wake, False)
        self.polled: Any = None  # the link's socket as `poller` was made for it
        self.poller: Any = None

    def start(self) -> None:
        """Catch signals and start the command.

        OSError with the command's name if it cannot be run, without one if no process can be had.
        """
        self.catch_signals()
        if self.args.command:
            import subprocess

            self.start_time = time.time()
            self.started = time.monotonic()
            self.command = subprocess.Popen(self.args.command, close_fds=False)

    def run(self) -> int:
        """Watch until a signal or the end of the command; return the exit code."""
        try:
            self.watch()
            self.finish()
        except Exception as error:  # the command must not notice
            log("stopped watching: %r" % error)
        if self.command:
            self.outlast()
            self.try_to_record()
            return exit_status(self.command.returncode)
        return 0 if self.ending else 1

    def outlast(self) -> None:
        """Pass signals on until the command has ended, whatever has become of the watching."""
        poll = select.poll()
        poll.register(self.awake, select.POLLIN)
        while self.poll_command() is None:
            if poll.poll(WAIT_SECONDS * 1000):
                os.read(self.awake, FILE_BYTES)
            self.handle_signals()

    def catch_signals(self) -> None:
        """Note signals and wake up, but for those that are ignored (nohup): so has the command.

        SIGCHLD is never ignored: the exit code would be lost.  Nor is SIGINT without a command:
        a shell script has it ignored by what it starts in the background, as a sidecar.
        """
        signal.set_wakeup_fd(self.wake)
        for name in CAUGHT_SIGNALS:
            number = getattr(signal, name)
            heeded = name == "SIGCHLD" or name == "SIGINT" and not self.args.command
            if heeded or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda caught, _: self.signals.append(caught))

    def watch(self) -> None:
        """Sample and send on the beat until the end."""
        give_memory_back()
        threading.Thread(target=self.sampler.refresh_for_ever, daemon=True).start()
        self.sampler.gpus.start()
        interval = self.args.interval
        beat = self.sampler.now + FIRST_SECONDS
        while not self.ending:
            now = time.monotonic()
            if now >= self.link.retry_at:
                self.link.start_dialling(self.wake)
            if self.link.sock is not None and not self.link.sent:
                # the master waits for the first sample: as soon as it covers enough
                soon = max(now, self.sampler.now + FIRST_SECONDS)
                beat = min(beat, soon)
            if now >= beat:
                sample = self.take()
                # without cpu or ram the master would refuse it
                self.link.exchange(None if self.sampler.trouble else sample)
                self.send_parts()
                if not self.sampler.trouble:
                    self.link.send_past(sample)
                missed = (now - beat) // interval  # beats, while it was held up
                beat += interval * (1 + missed)
            self.wait(min(beat, self.link.retry_at))

    def send_parts(self) -> None:
        """Send a look behind the sample, when it is time and somebody takes it."""
        if self.link.takes_parts:
            look = self.parts.take()
            if look:
                self.link.send_look(look)
        else:
            # of a GPU only what the sample tells is read
            self.sampler.gpus.details = False

    def wait(self, until: float) -> None:
        """Sleep until then, or until something happens, and act on what has happened."""
        ready = self.poll(until)
        if not ready:
            pass  # as nearly always: it is time for the next sample
        elif self.awake in ready:
            os.read(self.awake, FILE_BYTES)
        elif self.args.lifeline and 0 in ready:
            if not os.read(0, FILE_BYTES):
                self.ending = "no longer watched"
        elif 1 in ready:
            self.ending = "finished"  # who read our stdout has gone
        else:
            self.link.exchange()
        if self.signals:
            self.handle_signals()
        code = self.poll_command() if self.command else None
        if code is not None:
            self.ending = ending_of(code)

    def poll_command(self) -> Optional[int]:
        """Return the code of the command once it has ended; what it has used is kept."""
        if self.command.returncode is None:
            # as Popen.poll(), which drops what the kernel has counted
            with contextlib.suppress(ChildProcessError):
                pid, status, usage = os.wait4(self.command.pid, os.WNOHANG)
                if pid and os.WIFSIGNALED(status):
                    self.command.returncode = -os.WTERMSIG(status)
                elif pid:
                    self.command.returncode = os.WEXITSTATUS(status)
                if pid:
                    self.seconds = time.monotonic() - self.started
                    self.usage = usage
        code: Optional[int] = self.command.poll()
        return code

    def poll(self, until: float) -> Dict[int, int]:
        """Wait for a wake-up, the master, our reader or our input: {descriptor: what}."""
        polled = (self.link.sock, self.link.answered)
        if polled != self.polled:
            self.polled = polled
            self.poller = self.make_poller()
        return dict(self.poller.poll(max(0.0, until - time.monotonic()) * 1000))

    def make_poller(self) -> Any:
        """Return what waits for all of these, as the link is now."""
        poll = select.poll()
        poll.register(self.awake, select.POLLIN)
        if self.link.sock is not None:
            wanted = select.POLLIN
            if self.link.answered:  # then only its end is urgent
                wanted = getattr(select, "POLLRDHUP", select.POLLIN)
            poll.register(self.link.sock, wanted)
        if self.args.piped:
            poll.register(1, 0)
        if self.args.lifeline:
            poll.register(0, select.POLLIN)
        return poll

    def handle_signals(self) -> None:
        """Act on the signals that have come."""
        while self.signals:
            self.handle_signal(signal.Signals(self.signals.pop(0)).name)

    def handle_signal(self, name: str) -> None:
        """Pass a signal on to the command, or end of it."""
        if self.command:
            was_typed = name in TYPED_SIGNALS and os.isatty(0)
            if name != "SIGCHLD" and not was_typed:
                try:
                    self.command.send_signal(getattr(signal, name))
                except OSError as error:  # it has become another user's (su, sudo)
                    log("%s cannot be passed on: %s" % (name, error.strerror))
            if name == "SIGTERM":
                self.ending = name
        elif name in ENDING_SIGNALS:
            self.ending = name

    def take(self) -> Sample:
        """Take one sample, for the report, too, and show it."""
        before = self.sampler.now
        sample = self.sampler.sample()
        self.last = sample
        self.report.add(sample, self.sampler.now - before)
        if self.args.verbose:
            log(repr(sample))
        elif self.args.live:
            answer = "acknowledged by" if self.link.answered else "no answer from"
            readings = "cpu %s %%, ram %s %%" % (sample.get("cpu"), sample.get("ram"))
            log("%s, %s %s" % (readings, answer, self.link.peer), end="")
        return sample

    def finish(self) -> None:
        """Take a last sample, write the report and say goodbye."""
        last = self.take()
        lines = list(self.report.lines(last, self.ending))
        farewell: Sample = {"bye": self.ending}
        if self.command or self.args.report or "job" in last:
            farewell["report"] = clip("; ".join(lines))
            for line in lines:
                log("report of %s, %s: %s" % (last["node"], self.ending, line))
        log("goodbye: %s" % self.ending)
        self.link.close(farewell)
        self.told = clip("; ".join([self.ending, *lines]))
        if self.command and self.command.returncode is None:
            self.try_to_record()  # it may be killed before it ends
        if self.args.report:
            facts = dict(last, ended=self.ending, text=lines, totals=self.report)
            with self.args.report as file:
                json.dump(facts, file)

    def try_to_record(self) -> None:
        """Write the record if there is to be one; nothing that is wrong with it goes further."""
        try:
            if self.args.record:
                self.record()
        except Exception as error:
            log("cannot record in %s: %r" % (self.args.record, error))

    def record(self) -> None:
        """Write the record of the command, or how it ended if the rest is there."""
        seconds = self.seconds or time.monotonic() - self.started
        code = self.command.returncode
        life = Life(self.args.command, self.start_time, seconds, code, self.usage)
        lines = list(record_lines(self.last, self.report, life, self.told))
        if self.recorded:
            lines = [line for line in lines if "job" in line or "end" in line]
        else:
            job = lines[0]["job"]["job"]
            self.recorded = record_path(self.args.record, job, life.start)
        append_in_time(self.recorded, lines)


# ============================================================================
# Herd: where squeue and srun are.  It looks for jobs and puts an agent into each
# ============================================================================
#
# What the herd prints, a line each, and the relay understands:
#
#   * herd          the first line: what came before is a login shell's
#   @ KEY LINE      LINE is what the agent KEY (job, step, task) wrote to its stdout
#   = FACTS         what Slurm says of a job: a flat JSON object
#   ! WORDS         for the user's log
#   - KEY           the step KEY has ended; no line of it will follow
#
# What it reads: any byte says that the relay lives; the end of its input ends it.

LOOK_SECONDS = 30.0  # between two runs of squeue, and at least ...
LOOK_FACTOR = 20.0  # ... so many times what the last one took
QUESTION_SECONDS = 25.0  # for one run of squeue, scontrol or sacct
YOUNG_SECONDS = 20.0  # a job younger than this is not attached to
MAX_ATTACHED = 30  # jobs with a step of ours at once
MAX_STEPS = 3  # tries of a job: rungs of the ladder, or steps that ended
MAX_SINGLE_STEPS = 16  # of a job at once, where each of its nodes needs one of its own
LAST_RUNG = 2  # 0: one step for all nodes, 1: one step a node, 2: without GPUs
RETRY_SECONDS = 300.0  # after the last rung
ATTACH_SECONDS = 20.0  # for a step's first line, and at least ...
ATTACH_FACTOR = 10.0  # ... so many times what scontrol took; doubled by ladders ...
MAX_ATTACH_SECONDS = 120.0  # ... up to this
# after the last rung, if one was slow: it doubles, up to RETRY_SECONDS
SLOW_RETRY_SECONDS = 30.0
MAX_SLOW = 8  # ladders that ended so and are counted
DEAF_SECONDS = 20.0  # without a sign of the relay: it is cut off
REFRESH_SECONDS = 60.0  # between two times that the master is told of every job
PING_SECONDS = 5.0  # between two signs of life of the relay
GATHER_SECONDS = 0.5  # lines that come within this time are sent on together
REAP_SECONDS = 5.0  # between two looks whether a srun has ended that says nothing
LEAVE_SECONDS = 3.0  # for agents to say goodbye at the end
MAX_ENDED = 5  # ended jobs that Slurm is asked about after each look, and at once
# after the agents of a job have left, Slurm is asked whether it has ended
END_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
MAX_ACCOUNTS = 3  # times that accounting is asked about a job: it may lag behind
MAX_OUTPUT = 4 * 1024 * 1024  # bytes of squeue's answer
GREETING = b"* herd"
# srun's words for a controller or a node that is slow: no refusal.  slurm_errno.c of Slurm
SLOW_WORDS = (
    r"timed out|Unable to contact|Connection (?:refused|reset)|Zero Bytes|[Tt]ry again"
    r"|temporarily unable|Resource temporarily unavailable"
)
STEP_NAME = "sentinel"  # of ours, as squeue and sacct show it
# between two tries to reach the herd again: a second, doubled up to this
MAX_AWAY_SECONDS = 15.0
CONNECT_SECONDS = 20  # for ssh to reach the login node again
SSH_FAILED = 255  # the exit code of ssh where it has not begun, ssh(1)
# ssh's words where somebody would have to type something.  ssh(1), sshconnect2.c of OpenSSH
REFUSED_WORDS = (
    r"Permission denied|Too many authentication failures|verification failed"
)

ENDED_STATES = (
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "CANCELLED",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
)
# squeue(1): the name comes last, for it may hold any character
SQUEUE_FIELDS = (
    ("job", "%i"),
    ("raw", "%A"),
    ("array", "%F"),
    ("state", "%T"),
    ("user", "%u"),
    ("partition", "%P"),
    ("nodes", "%D"),
    ("cpus", "%C"),
    ("mem", "%m"),
    ("gres", "%b"),
    ("submit", "%V"),
    ("start", "%S"),
    ("end", "%e"),
    ("limit", "%l"),
    ("reason", "%r"),
    ("nodelist", "%N"),
    ("job_name", "%j"),
)
# sacct(1): the name comes last, for it may hold any character
SACCT_FIELDS = ("JobID", "State", "ExitCode", "End", "JobName")
FAILED_STEP_STATES = ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL")
# The agent's text comes compressed on stdin, its size in a line before it.
BOOTSTRAP = (
    "import sys; sys.path.append(sys.path.pop(0)); import zlib; "
    "stdin = sys.stdin.buffer; "
    "AGENT_TEXT = zlib.decompress(stdin.read(int(stdin.readline()))); "
    'exec(compile(AGENT_TEXT, "agent.py", "exec"))'
)
FIND_PYTHON = """\
for python in python3 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 \
python3.7 python3.6 /usr/libexec/platform-python; do \
"$python" -c "import sys; sys.exit(sys.version_info < (3, 6))" 2>/dev/null && \
exec "$python" -c "$0" "$@"; done; \
echo "no python3 of 3.6 or later on $(uname -n)" >&2; exit 127"""
# A step of ours never fails: Slurm tells the worst code of all steps as the job's derived one.
STEP_PYTHON = 'trap "exit 0" TERM; ' + FIND_PYTHON.replace("exit 127", "exit 0")


def own_text() -> bytes:
    """Return this program as a file has it, wherever it came from."""
    text = globals().get("AGENT_TEXT")
    if text is None:
        with open(os.path.abspath(__file__), "rb") as file:
            text = file.read()
    return bytes(text)


def pack_text(text: bytes) -> bytes:
    """Return what BOOTSTRAP reads from its stdin."""
    import zlib

    packed = zlib.compress(text, 6)
    return b"%d\n%s" % (len(packed), packed)


@functools.lru_cache(maxsize=1024)  # squeue tells the same again and again
def parse_time(text: str) -> Optional[float]:
    """Return the time.time() of 2026-11-27T13:41:00, local time; None for N/A."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def parse_size(text: str) -> Optional[float]:
    """Return the bytes of 500M or 16G, squeue(1); megabytes without a letter."""
    found = re.match(r"([\d.]+)([KMGTP]?)", text)
    if not found:
        return None
    power = "KMGTP".index(found.group(2) or "M") + 1
    return float(found.group(1)) * 1024.0**power


def parse_hostlist(text: str) -> List[str]:
    """Return the names of c[1-3,07],login, hostlist(7) of Slurm."""
    names = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        heads = [""]
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            tails = [fixed] if fixed else expand_ranges(ranges)
            heads = [head + tail for head in heads for tail in tails]
        names.extend(heads)
    return names


def expand_ranges(text: str) -> List[str]:
    """Return the numbers of 1-3,07 as they are written, with their zeros in front."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            numbers.append("%0*d" % (len(first), number))
    return numbers


def parse_squeue(text: str) -> List[Sample]:
    """Return the facts of each job in squeue's answer: numbers in seconds and bytes."""
    jobs = []
    for line in text.splitlines():
        words = line.split("|", len(SQUEUE_FIELDS) - 1)
        if len(words) == len(SQUEUE_FIELDS):
            names = [name for name, _ in SQUEUE_FIELDS]
            jobs.append(job_facts(dict(zip(names, words))))
    return jobs


def job_facts(words: Dict[str, str]) -> Sample:
    """Return a job's facts from the words of squeue; what it does not tell has no key."""
    facts: Sample = {}
    for key in ("job", "raw", "state", "user", "partition", "job_name", "nodelist"):
        if words[key] not in ("", "N/A", "(null)"):
            facts[key] = clip(words[key])
    if words["reason"] not in ("", "None", "N/A"):
        facts["reason"] = clip(words["reason"])
    if "_" in words["job"]:
        facts["array"] = words["array"]
    for key in ("nodes", "cpus"):
        if words[key].isdigit():
            facts[key] = int(words[key])
    gpus = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", words["gres"])
    if gpus:
        facts["gpus"] = sum(map(int, gpus)) * int(facts.get("nodes", 1))
    readers = (
        ("mem", parse_size),
        ("submit", parse_time),
        ("start", parse_time),
        ("end", parse_time),
        ("limit", parse_duration),
    )
    for key, reader in readers:
        value = reader(words[key])
        if value is not None:
            facts[key] = value
    return facts


def parse_scontrol(text: str) -> Dict[str, str]:
    """Return the KEY=VALUE words of `scontrol -d show job`; the first of each key."""
    # JobId=7 JobName=train / UserId=tester(4242) GroupId=... / JobState=RUNNING Reason=None
    #      Nodes=c[1-2] CPU_IDs=0-1 Mem=100 GRES=gpu:2(IDX:0,3)
    known: Dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text):
        known.setdefault(key, value)
    return known


def pick_job(text: str, raw: str) -> str:
    """Return what scontrol says of one job: asked for the first of an array, it tells of all."""
    records = re.split(r"\n(?=JobId=)", text)
    own = [record for record in records if record.startswith("JobId=%s " % raw)]
    return own[0] if own else text


def parse_end(known: Dict[str, str]) -> Sample:
    """Return the facts of a job's end from the words of scontrol; none while it has not ended."""
    if known.get("JobState") not in ENDED_STATES:
        return {}
    facts: Sample = {"state": known["JobState"]}
    if known.get("Reason", "None") != "None":
        facts["reason"] = clip(known["Reason"])
    for key, word in (("exit", "ExitCode"), ("derived_exit", "DerivedExitCode")):
        if word in known:
            facts[key] = known[word]
    moment = parse_time(known.get("EndTime", ""))
    if moment is not None:
        facts["end"] = moment
    return facts


def parse_sacct(text: str, job: str) -> Sample:
    """Return the facts of a job's end from the lines of sacct: its own, and those of its steps."""
    # 7|CANCELLED by 4242|0:0|2026-11-27T13:41:00|train
    # 7.batch|CANCELLED|0:15|2026-11-27T13:41:00|batch
    # 7.0|FAILED|3:0|2026-11-27T13:40:10|python3
    facts: Sample = {}
    failed = []
    for line in text.splitlines():
        words = line.split("|", len(SACCT_FIELDS) - 1)
        if len(words) < len(SACCT_FIELDS):
            continue
        name, state, code, end, program = words
        if name == job:
            facts.update(parse_accounted_end(state, code, end))
        elif name.startswith(job + ".") and state in FAILED_STEP_STATES:
            step = name[len(job) + 1 :]
            if step not in ("batch", "extern") and program != STEP_NAME:
                failed.append((end, step_words(step, program, state, code)))
    if failed:
        facts["failed_step"] = clip(min(failed)[1])
    return facts


def parse_accounted_end(state: str, code: str, end: str) -> Sample:
    """Return the facts of a job's end from sacct's words for it; none while it has not ended."""
    state, _, by = state.partition(" by ")
    if state not in ENDED_STATES:
        return {}
    facts: Sample = {"state": state, "exit": code}
    if by:
        facts["cancelled_by"] = user_name(by)
    moment = parse_time(end)
    if moment is not None:
        facts["end"] = moment
    return facts


def step_words(step: str, program: str, state: str, code: str) -> str:
    """Return how a step failed, in words."""
    if state == "FAILED":
        status, _, number = code.partition(":")
        how = "exit code %s" % status if number == "0" else "signal %s" % number
    else:
        how = state.replace("_", " ").lower()
    return "step %s (%s): %s" % (step, program, how)


def user_name(uid: str) -> str:
    """Return the name of a user, or the number where nobody knows the name."""
    import pwd

    try:
        return clip(pwd.getpwuid(int(uid)).pw_name)
    except (KeyError, ValueError, OverflowError):
        return clip(uid)


def parse_job_gpus(text: str) -> Dict[str, str]:
    """Return {node: numbers of the job's GPUs there} from the same lines."""
    gpus = {}
    for nodes, ids in re.findall(
        r"\bNodes=(\S+) .*\bgpu\b[^ ,]*\(IDX:([\d,-]+)\)", text
    ):
        for node in parse_hostlist(nodes):
            gpus[node] = ",".join(expand_ranges(ids))
    return gpus


def parse_job_directory(text: str) -> str:
    """Return where the job works, from the same lines; its path may hold blanks."""
    found = re.search(r"^ +WorkDir=(/.*)$", text, re.M)
    return found.group(1) if found else ""


def parse_job_nodes(text: str) -> Dict[str, int]:
    """Return {node: CPUs of the job there} from the lines of `scontrol -d show job`."""
    cpus = {}
    for nodes, ids in re.findall(r"\bNodes=(\S+) CPU_IDs=(\S+) ", text):
        count = len(expand_ranges(ids))
        for node in parse_hostlist(nodes):
            cpus[node] = count
    return cpus


def note_signals(signals: List[int]) -> None:
    """Have the signals that end it noted in a list, but for those that are ignored (nohup)."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda caught, _: signals.append(caught))


class Question:
    """A command of Slurm's that is asked and not waited for."""

    def __init__(self, command: List[str]) -> None:
        import subprocess

        self.command = command
        self.asked = time.monotonic()
        self.took = 0.0
        self.answer = b""
        self.error = ""
        try:
            self.process: Any = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self.process = None
            self.error = "%s: %s" % (command[0], error.strerror)
            return
        unblock(self.process.stdout, self.process.stderr)

    def ready(self) -> bool:
        """Whether the answer is whole, or will never be: then `error` says why."""
        if self.process is None:
            return True
        self.took = time.monotonic() - self.asked
        chunk = read_pipe(self.process.stdout)
        self.answer += chunk
        ended = self.process.poll() is not None
        late = self.took > QUESTION_SECONDS or len(self.answer) > MAX_OUTPUT
        if not ended and not late:
            return False
        if late:
            self.process.kill()
            self.process.wait()
            self.error = "%s gave no answer in %.0f s" % (self.command[0], self.took)
        elif self.process.returncode:
            words = read_pipe(self.process.stderr).decode("utf-8", "replace").strip()
            self.error = "%s: %s" % (
                self.command[0],
                words.splitlines()[-1:] or "failed",
            )
            if words:
                self.error = "%s: %s" % (self.command[0], words.splitlines()[-1])
        self.answer += read_pipe(self.process.stdout)
        self.process.stdout.close()
        self.process.stderr.close()
        self.process = None
        return True

    def text(self) -> str:
        return self.answer.decode("utf-8", "replace")


def unblock(*pipes: Any) -> None:
    """Have reads and writes of pipes return at once."""
    for pipe in pipes:
        os.set_blocking(pipe.fileno(), False)


def read_pipe(pipe: Any) -> bytes:
    """Return what a pipe that does not block holds now."""
    chunks = []
    with contextlib.suppress(OSError, ValueError):
        while True:
            chunk = os.read(pipe.fileno(), FILE_BYTES)
            chunks.append(chunk)
            if len(chunk) < FILE_BYTES:
                break
    return b"".join(chunks)


class Step:
    """One srun of ours within a job: an agent on each of its nodes."""

    def __init__(
        self, key: str, command: List[str], text: bytes, patience: float
    ) -> None:
        import subprocess

        self.key = key
        self.since = time.monotonic()
        self.patience = patience  # seconds for the first line
        self.lines = 0
        self.tasks: Set[bytes] = set()  # that have told something, and ...
        self.gone: Set[bytes] = set()  # ... have said goodbye
        self.rest = b""
        self.halves: Dict[bytes, bytes] = {}  # of lines, by task
        self.words = b""
        # srun takes options from SLURM_*: those of a job that we may run in are not meant
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SALLOC"))
            or name == "SLURM_CONF"
        }
        process: Any = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on the terminal is for the herd alone
        )
        unblock(process.stdin, process.stdout, process.stderr)
        self.process = process
        self.out: int = process.stdout.fileno()
        self.error: int = process.stderr.fileno()
        self.unsent = pack_text(text)

    def feed(self) -> None:
        """Write what srun has not taken yet of the agent's text; its stdin stays open."""
        if not self.unsent:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.unsent:
                count = os.write(self.process.stdin.fileno(), self.unsent)
                self.unsent = self.unsent[count:]

    def read(self) -> Iterable[bytes]:
        """Yield the whole lines that have come, as the herd prints them."""
        lines = (self.rest + read_pipe(self.process.stdout)).split(b"\n")
        self.rest = lines.pop()[-FILE_BYTES:]
        for line in lines:
            task, colon, text = line.partition(b": ")  # srun --label
            text = self.whole(task, text) if colon else b""
            if text:
                self.lines += 1
                self.tasks.add(task)
                if b'"bye": ' in text:
                    self.gone.add(task)
                yield b"@ %s.%s %s" % (self.key.encode(), task.strip(), text)

    def whole(self, task: bytes, text: bytes) -> bytes:
        """Return a line of an agent: srun breaks what a task writes after each 1,024 bytes."""
        if not text.startswith(b'{"'):
            text = self.halves.get(task, b"") + text
        self.halves.pop(task, None)
        if not text.startswith(b"{"):
            return b""  # no agent's
        if not text.endswith(b"}") and len(text) < FILE_BYTES:
            self.halves[task] = text
            return b""
        return text

    def has_left(self) -> bool:
        """Whether all agents of it that told something have said goodbye."""
        return bool(self.tasks) and self.tasks == self.gone

    def release(self) -> None:
        """End srun's input: the agents see it, say goodbye and end."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        """End what is left of it, and wait for that."""
        self.release()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()

    def hear(self) -> None:
        """Take note of what srun says."""
        self.words = (self.words + read_pipe(self.process.stderr))[-FILE_BYTES:]

    def reason(self) -> str:
        """Return the last line that srun said of its end."""
        words = self.words.decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in words if "error" in line] or words
        return errors[-1] if errors else "srun ended with %s" % self.process.poll()


class Job:
    """What the herd knows of one of the user's jobs."""

    def __init__(self, facts: Sample) -> None:
        self.facts = facts
        self.steps: List[Step] = []
        self.tries = 0
        self.rung = 0
        self.slow_rung: Optional[int] = None  # the first that was too slow
        # times that the ladder ended so; then only that rung is tried
        self.slow_times = 0
        self.attach_at = 0.0  # time.monotonic()
        self.question: Optional[Question] = None
        self.ended = False
        self.ending: Sample = {}  # what Slurm has told of its end
        self.ended_at = 0.0  # time.monotonic()
        self.ask_at: List[float] = []  # when to ask whether it has ended
        self.accounts = 0  # how often accounting may yet be asked about it
        self.told: Optional[Sample] = None

    def take_row(self, facts: Sample, asked: float) -> None:
        """Take in what squeue, which was asked then, tells of it: less than is known of an end."""
        is_over = facts.get("state") in ENDED_STATES
        if self.ended and not is_over and asked > self.ended_at:
            self.ended = False  # it was requeued
            self.ending = {}
        if not self.ending:
            self.facts = facts
        elif is_over:
            self.facts = dict(facts, **self.ending)

    def take_end(self, facts: Sample) -> None:
        """Take in what Slurm tells of its end."""
        self.ended = True
        self.ended_at = time.monotonic()
        self.ask_at = []
        self.ending = dict(self.ending, **facts)
        known = {key: self.facts[key] for key in self.facts if key != "reason"}
        self.facts = dict(known, **self.ending)

    def expect_end(self) -> None:
        """Have Slurm asked at once, and some times later, whether it has ended."""
        if not self.ended and not self.ask_at:
            now = time.monotonic()
            self.ask_at = [now + seconds for seconds in END_SECONDS]

    def patience(self, took: float) -> float:
        """How long to wait for a step's first line, where scontrol took so long to answer.

        A slow controller or a loaded node is no refusal: it is given more time, and more again.
        """
        seconds = max(ATTACH_SECONDS, ATTACH_FACTOR * took) * 2.0**self.slow_times
        return min(seconds, max(ATTACH_SECONDS, MAX_ATTACH_SECONDS))

    def step_down(self, is_slow: bool) -> Tuple[float, str]:
        """Choose what follows a step that told nothing: after how many seconds, in words.

        is_slow: there was no answer, or none that refuses.
        """
        if is_slow and self.slow_rung is None:
            self.slow_rung = self.rung
        is_last = self.rung == LAST_RUNG or (is_slow and self.slow_times)
        if not is_last:
            self.rung += 2 if self.rung == 0 and len(self.nodes) == 1 else 1
            return 0.0, ("one step a node", "without GPUs")[self.rung - 1]
        seconds = RETRY_SECONDS
        self.rung = 0
        if self.slow_rung is None:
            self.slow_times = 0
        else:  # slow, as far as anybody knows: soon again, where nothing was refused
            seconds = min(seconds, SLOW_RETRY_SECONDS * 2.0**self.slow_times)
            self.rung = self.slow_rung
            self.slow_times = min(self.slow_times + 1, MAX_SLOW)
            self.slow_rung = None
        return seconds, "the next try is in %.0f s" % seconds

    def take_answer(self) -> None:
        """Note that a step of it has told something."""
        self.slow_times = 0
        self.slow_rung = None

    @property
    def name(self) -> str:
        return str(self.facts["job"])

    @property
    def nodes(self) -> List[str]:
        return parse_hostlist(str(self.facts.get("nodelist", "")))

    @property
    def asked_as(self) -> str:
        """What scontrol calls this job alone: 12+1 for a part of a heterogeneous job."""
        return self.name if "+" in self.name else str(self.facts["raw"])

    @property
    def srun_options(self) -> List[str]:
        """What leads srun to this job: it takes a part of a heterogeneous job by its leader."""
        leader, plus, part = self.name.partition("+")
        if plus:
            return ["--jobid=%s" % leader, "--het-group=%s" % part]
        return ["--jobid=%s" % self.facts["raw"]]


class Herd:
    """Looks for the user's jobs and keeps one step of ours in each that runs."""

    def __init__(self, wanted: List[str], text: bytes) -> None:
        self.wanted = wanted  # ids, or none for all jobs
        self.text = text
        self.jobs: Dict[str, Job] = {}  # by raw id
        self.look_at = 0.0
        self.reap_at = 0.0
        self.looking: Optional[Question] = None
        self.asking: List[Tuple[Job, Question]] = []  # how jobs ended
        self.has_accounting = True  # until sacct says otherwise
        self.said: Set[str] = set()
        self.heard = time.monotonic()
        self.signals: List[int] = []

    def run(self) -> int:
        """Herd until the relay is gone; return the exit code."""
        note_signals(self.signals)
        os.set_blocking(1, False)
        self.put(b"\n" + GREETING)
        try:
            while self.relay_lives():
                self.look()
                self.attach_due()
                self.pass_lines()
                self.ask_ends()
        finally:
            self.leave()
        return 0

    def relay_lives(self) -> bool:
        """Wait a moment for a sign of the relay; False when it is gone."""
        busy = (
            self.looking
            or self.asking
            or any(job.question or job.ask_at for job in self.jobs.values())
            or not all(step.lines for step in self.steps())
        )
        poll = select.poll()
        poll.register(0, select.POLLIN)
        if poll.poll(100 if busy else GATHER_SECONDS * 1000):
            if not os.read(0, FILE_BYTES):
                return False
            self.heard = time.monotonic()
            if not busy:
                time.sleep(GATHER_SECONDS)  # a ping must not hurry the lines
        return not self.signals and time.monotonic() - self.heard < DEAF_SECONDS

    def put(self, line: bytes) -> None:
        """Write a line for the relay; the herd ends when nobody takes it."""
        data = line + b"\n"
        if signal.SIGPIPE in self.signals:
            return
        try:
            while data:
                try:
                    data = data[os.write(1, data) :]
                except BlockingIOError:
                    if not self.is_taken():
                        raise
        except OSError:
            self.signals.append(signal.SIGPIPE)

    def is_taken(self) -> bool:
        """Wait until our output takes more; False when the relay has been silent for too long.

        Behind a cable that is cut sshd takes as much as its window holds, and then nothing.
        """
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(1, select.POLLOUT)
        while time.monotonic() - self.heard < DEAF_SECONDS:
            ready = dict(poll.poll(GATHER_SECONDS * 1000))
            if 0 in ready:
                if os.read(0, FILE_BYTES):
                    self.heard = time.monotonic()
                else:
                    poll.unregister(0)  # it closes, and still takes our last lines
            if 1 in ready:
                return True
        return False

    def put_lines(self, lines: List[bytes]) -> None:
        """Write lines at once: each time wakes the relay, or ssh and all that is behind it."""
        if lines:
            self.put(b"\n".join(lines))

    def say(self, words: str) -> None:
        """Tell the user something, once."""
        if words not in self.said:
            self.said.add(words)
            self.put(b"! " + clip(words).replace("\n", " ").encode())

    # ---- looking ------------------------------------------------------------

    def look(self) -> None:
        """Ask squeue when it is time, and take its answer when it is there."""
        now = time.monotonic()
        if self.looking is None and now >= self.look_at:
            form = "|".join(code for _, code in SQUEUE_FIELDS)
            self.looking = Question(
                ["squeue", "-h", "-t", "all", "-u", str(os.getuid()), "-o", form]
            )
        if self.looking is not None and self.looking.ready():
            asked, self.looking = self.looking, None
            self.look_at = now + max(LOOK_SECONDS, LOOK_FACTOR * asked.took)
            if asked.error:
                self.say(
                    "%s: the next look is in %.0f s" % (asked.error, self.look_at - now)
                )
            else:
                self.said = {
                    words for words in self.said if "the next look" not in words
                }
                self.update(parse_squeue(asked.text()), asked.asked)
        self.hear_ends()

    def update(self, rows: List[Sample], asked: float) -> None:
        """Take in what squeue told that was asked then: new jobs, new states, who has gone."""
        now = time.monotonic()
        seen = set()
        for facts in rows:
            raw = str(facts.get("raw", ""))
            if not raw or not self.is_wanted(facts):
                continue
            seen.add(raw)
            job = self.jobs.get(raw)
            if job is None:
                job = self.jobs[raw] = Job(facts)
            was_running = job.facts.get("state") == "RUNNING"
            job.take_row(facts, asked)
            if (
                job.facts.get("state") == "RUNNING"
                and not was_running
                or job.attach_at == 0
            ):
                age = time.time() - float(facts.get("start", 0.0))
                job.attach_at = now + max(0.0, YOUNG_SECONDS - age)
        over = []
        for raw, job in list(self.jobs.items()):
            is_over = raw not in seen or job.facts.get("state") in ENDED_STATES
            if is_over and not job.ended:
                over.append(job)
            elif raw not in seen and job.ended and not job.steps:
                del self.jobs[raw]
        over.sort(key=lambda job: not job.tries)  # those that were watched come first
        for job in over[:MAX_ENDED]:
            job.ended = True
            job.ended_at = time.monotonic()
            self.ask_end(job)
        busy = [job for job, _ in self.asking]
        late = [job for job in self.jobs.values() if job.accounts and job not in busy]
        for job in late[:MAX_ENDED]:
            self.ask_accounting(job)
        self.tell_facts()

    def is_wanted(self, facts: Sample) -> bool:
        """Whether a job is one of the ids that the user gave."""
        names = (facts.get("job"), facts.get("raw"), facts.get("array"))
        return not self.wanted or any(name in self.wanted for name in names)

    def tell_facts(self) -> None:
        """Pass on what changed of each job, and name those that are not watched."""
        for job in self.jobs.values():
            self.tell(job)
        unwatched = [job.name for job in self.running()[MAX_ATTACHED:]]
        if unwatched:
            self.say(
                "%d more run unwatched: --my-jobs %s"
                % (len(unwatched), ",".join(unwatched[:10]))
            )

    def running(self) -> List[Job]:
        """Return the jobs that run, in squeue's order."""
        return [
            job
            for job in self.jobs.values()
            if job.facts.get("state") == "RUNNING" and not job.ended
        ]

    # ---- attaching ----------------------------------------------------------

    def attach_due(self) -> None:
        """Begin with each job whose turn it is, while there is room."""
        now = time.monotonic()
        for job in self.running()[:MAX_ATTACHED]:
            if job.question is not None and job.question.ready():
                question, job.question = job.question, None
                self.attach(job, question)
            elif not job.steps and not job.question and now >= job.attach_at:
                job.question = Question(["scontrol", "-d", "show", "job", job.asked_as])

    def attach(self, job: Job, question: Question) -> None:
        """Start the step of the job's rung with what scontrol told."""
        text = pick_job(question.text(), str(job.facts["raw"]))
        known = parse_scontrol(text)
        if question.error or known.get("JobState") != "RUNNING":
            job.attach_at = time.monotonic() + LOOK_SECONDS
            if parse_end(known):
                self.take_end(job, parse_end(known))
            elif known.get("JobState") == "COMPLETING":
                job.expect_end()
            if question.error:
                self.say("job %s: %s" % (job.name, question.error))
            return
        cpus = parse_job_nodes(text)
        nodes = sorted(cpus, key=natural_name) or job.nodes
        facts = {
            "job": job.name,
            "job_name": str(job.facts.get("job_name", "")),
            "end": job.facts.get("end"),
            "limit": job.facts.get("limit"),
            "cpus": cpus,
            "gpus": parse_job_gpus(text),
            "directory": parse_job_directory(text),
        }
        job.tries += 1
        for number, group in enumerate(self.groups(job, nodes)):
            key = "%s.%d-%d" % (job.facts["raw"], job.tries, number)
            command = self.step_command(job, group, facts)
            try:
                patience = job.patience(question.took)
                job.steps.append(Step(key, command, self.text, patience))
            except OSError as error:
                self.say("job %s: srun: %s" % (job.name, error.strerror))
                job.attach_at = time.monotonic() + RETRY_SECONDS

    def groups(self, job: Job, nodes: List[str]) -> List[List[str]]:
        """Return the nodes of each step of the job's rung: no srun for each of a hundred."""
        if job.rung != 1:
            return [nodes]
        left = nodes[MAX_SINGLE_STEPS:]
        if left:
            self.say(
                "job %s: only one step a node works, so %d of its %d nodes are not watched: "
                "from %s on" % (job.name, len(left), len(nodes), left[0])
            )
        return [[node] for node in nodes[:MAX_SINGLE_STEPS]]

    def step_command(
        self, job: Job, nodes: List[str], facts: Dict[str, Any]
    ) -> List[str]:
        """Return the srun that puts an agent on these nodes of the job."""
        count = len(nodes)
        command = [
            "srun",
            *job.srun_options,
            "--overlap",
            "--mem=0",
            "--immediate=10",
            "--job-name=%s" % STEP_NAME,
            "--nodes=%d" % count,
            "--ntasks=%d" % count,
            "--ntasks-per-node=1",
            "--nodelist=%s" % ",".join(nodes),
            "--input=all",
            "--label",
            "--unbuffered",
            "--kill-on-bad-exit=0",
            "--wait=0",
        ]
        if job.rung == 2:
            command.append("--gres=none")
        flags = ["--stdout", "--lifeline", "--facts", json.dumps(facts)]
        return command + ["sh", "-c", STEP_PYTHON, BOOTSTRAP] + flags

    def pass_lines(self) -> None:
        """Send on what the agents wrote, and see which steps have ended."""
        now = time.monotonic()
        is_time = now >= self.reap_at
        if is_time:
            self.reap_at = now + REAP_SECONDS
        speaking = self.speaking()
        lines: List[bytes] = []
        for job in self.jobs.values():
            for step in list(job.steps):
                is_quiet = step.out not in speaking and step.error not in speaking
                if is_quiet and step.lines and not is_time:
                    continue
                step.feed()
                if step.out in speaking:
                    lines += step.read()
                    if all(other.has_left() for other in job.steps):
                        job.expect_end()
                if step.error in speaking:
                    step.hear()
                if step.lines:
                    job.take_answer()
                late = not step.lines and now - step.since > step.patience
                if step.process.poll() is not None or late:
                    step.hear()
                    self.put_lines(lines + list(step.read()))
                    lines = []
                    self.end_step(job, step, late)
        self.put_lines(lines)

    def steps(self) -> List[Step]:
        """Return the steps of all jobs."""
        return [step for job in self.jobs.values() for step in job.steps]

    def speaking(self) -> Set[int]:
        """Return the descriptors of the steps that hold something: most of them do not."""
        poll = select.poll()
        for step in self.steps():
            poll.register(step.out, select.POLLIN)
            poll.register(step.error, select.POLLIN)
        return {pipe for pipe, _ in poll.poll(0)}

    def end_step(self, job: Job, step: Step, late: bool) -> None:
        """Take leave of a step; one that never told anything moves the job on a rung."""
        step.kill()
        job.steps.remove(step)
        self.put(b"- " + step.key.encode())
        if job.steps:
            return
        now = time.monotonic()
        if step.lines:
            job.expect_end()
            job.attach_at = now + LOOK_SECONDS
            if job.tries >= MAX_STEPS:
                job.attach_at = now + RETRY_SECONDS
            return
        reason = "no answer in %.0f s" % step.patience if late else step.reason()
        is_slow = late or bool(re.search(SLOW_WORDS, reason))
        pause, following = job.step_down(is_slow)
        job.attach_at = now + pause
        self.say("job %s: cannot attach (%s): %s" % (job.name, reason, following))

    # ---- endings ------------------------------------------------------------

    def ask_ends(self) -> None:
        """Ask of each job whose agents have left whether it has ended, when it is time."""
        now = time.monotonic()
        asked = [job for job, _ in self.asking]
        for job in self.jobs.values():
            if len(self.asking) >= MAX_ENDED:
                return
            if job.ask_at and now >= job.ask_at[0] and job not in asked:
                job.ask_at = [moment for moment in job.ask_at if moment > now]
                self.ask_end(job)

    def ask_end(self, job: Job) -> None:
        """Ask Slurm how a job ended; it remembers for some minutes."""
        command = ["scontrol", "-d", "show", "job", job.asked_as]
        self.asking.append((job, Question(command)))

    def ask_accounting(self, job: Job) -> None:
        """Ask who cancelled a job and which step failed: only accounting tells."""
        if self.has_accounting and job.accounts > 0:
            job.accounts -= 1
            command = ["sacct", "-P", "-n", "-j", str(job.facts["raw"])]
            command += ["-o", ",".join(SACCT_FIELDS)]
            self.asking.append((job, Question(command)))

    def hear_ends(self) -> None:
        """Take in how jobs ended: from scontrol, and from sacct what that does not know."""
        for job, question in list(self.asking):
            if not question.ready():
                continue
            self.asking.remove((job, question))
            if question.command[0] == "scontrol":
                self.hear_scontrol(job, question)
            else:
                self.hear_sacct(job, question)

    def hear_scontrol(self, job: Job, question: Question) -> None:
        """Take in what scontrol told of a job that has left squeue, or was left by its agents."""
        known = parse_scontrol(pick_job(question.text(), str(job.facts["raw"])))
        facts = {} if question.error else parse_end(known)
        if facts:
            self.take_end(job, facts)
        elif job.ended and not job.ending:
            if known and not question.error:
                job.ended = False  # not yet: the next look will tell
            elif self.has_accounting:  # scontrol has forgotten it
                job.accounts = 1
                self.ask_accounting(job)
            else:
                self.take_unknown_end(job)

    def take_end(self, job: Job, facts: Sample) -> None:
        """Take in how a job ended, pass it on, and ask for the rest if it did not end well."""
        job.take_end(facts)
        self.tell(job)
        is_fine = facts.get("state") == "COMPLETED"
        if not is_fine or facts.get("derived_exit", "0:0") != "0:0":
            job.accounts = MAX_ACCOUNTS
            self.ask_accounting(job)

    def take_unknown_end(self, job: Job) -> None:
        """Pass on that a job has ended, where nobody remembers how."""
        state = str(job.facts.get("state"))
        job.take_end({"state": state if state in ENDED_STATES else "UNKNOWN"})
        self.tell(job)

    def hear_sacct(self, job: Job, question: Question) -> None:
        """Take in what accounting told of a job: all of it, if scontrol had forgotten it."""
        if "disabled" in question.error or "No such file" in question.error:
            self.has_accounting = False
        facts = {} if question.error else parse_sacct(question.text(), job.name)
        if not job.ended:
            return  # it was requeued meanwhile
        if "state" in facts:
            job.accounts = 0
        elif not job.ending:
            self.take_unknown_end(job)
            return
        # scontrol knows better what both of them tell
        job.take_end(dict(facts, **job.ending))
        self.tell(job)

    def tell(self, job: Job) -> None:
        """Pass on the facts of a job, if they are new."""
        if job.facts != job.told:
            job.told = job.facts
            self.put(b"= " + json.dumps(job.facts).encode())

    def leave(self) -> None:
        """Let the agents say goodbye, then end what is left."""
        steps = self.steps()
        for step in steps:
            step.release()
        deadline = time.monotonic() + LEAVE_SECONDS
        while steps and time.monotonic() < deadline:
            time.sleep(0.05)
            for step in list(steps):
                for line in step.read():
                    self.put(line)
                if step.process.poll() is not None:
                    steps.remove(step)
        for step in steps:
            step.kill()


def natural_name(name: str) -> List[Any]:
    """A key to sort by: c2 comes before c10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ============================================================================
# Relay: where the master is.  It starts the herd and dials for each agent of it
# ============================================================================


class Line:
    """The connection to the master for one agent of the herd."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self.host = host
        self.port = port
        self.secret = secret
        self.sock: Optional[socket.socket] = None
        self.takes_parts = False  # the master has said so on this connection
        self.parts: List[Sample] = []  # that wait to be sent together
        self.past = Past()
        self.ok_at = -math.inf  # when a sample was sent last
        self.retry_at = 0.0
        self.trouble = ""

    def send_sample(self, sample: Sample) -> bool:
        """Send a sample, and what the master missed behind it; see `send`."""
        is_sent = self.send(sample)
        now = time.monotonic()
        if is_sent:
            self.ok_at = now
            self.parts += self.past.slice(now)
        self.past.note(sample, now, self.ok_at)
        return is_sent

    def send(self, message: Dict[str, Any]) -> bool:
        """Send a message; False while the master does not take it, `trouble` says why."""
        if self.sock is None and time.monotonic() < self.retry_at:
            return False
        try:
            if self.sock is None:
                self.sock = socket.create_connection(
                    (self.host, self.port), WAIT_SECONDS
                )
                if self.secret:
                    prove(self.sock, self.secret)
                self.past.resume(time.monotonic())
                # the answer to the first sample says what the master takes
                if "cpu" in message:
                    message = dict(message, ack=True)
            self.hear(self.sock)
            self.sock.settimeout(WAIT_SECONDS)
            self.sock.sendall(pickle.dumps(message, protocol=4))
        except OSError as error:
            self.fail(error)
            return False
        return True

    def send_parts(self) -> None:
        """Send the parts that have come, all at once, if the master takes them."""
        packed = b"".join(pickle.dumps(part, protocol=4) for part in self.parts)
        self.parts = []
        if self.sock is not None and self.takes_parts:
            try:
                self.sock.settimeout(WAIT_SECONDS)
                self.sock.sendall(packed)
            except OSError as error:
                self.fail(error)

    def hear(self, sock: socket.socket) -> None:
        """Take note of what the master takes; OSError if it has hung up: its words come first."""
        sock.settimeout(0)
        try:
            answer = sock.recv(ANSWER_BYTES)
        except BlockingIOError:
            return
        if b"ok parts\n" in answer:
            self.takes_parts = True
        self.past.hear(answer)
        if not answer or b"error " in answer:
            raise OSError(error_in(answer) or "it closed the connection")

    def fail(self, error: OSError) -> None:
        """Hang up for a moment."""
        self.close()
        self.trouble = reason_of(error)
        self.retry_at = time.monotonic() + BACKOFF_SECONDS

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.takes_parts = False


class Relay:
    """Runs the herd, here or behind ssh, and speaks to the master for its agents."""

    def __init__(
        self, command: List[str], text: bytes, dial: Callable[[], Line]
    ) -> None:
        self.command = command
        self.is_ssh = command[0] == "ssh"
        self.text = text
        self.dial = dial
        self.lines: Dict[str, Line] = {}  # by the herd's key
        self.known: Dict[str, Sample] = {}  # what Slurm says, by raw id
        self.untold: Dict[str, Sample] = {}  # what of it the master has not heard yet
        self.refresh_at = 0.0
        self.said: Set[str] = set()
        self.told_ends: Set[str] = set()  # why the herd ended, since it spoke last
        self.signals: List[int] = []
        self.rest = b""
        self.greeted = False  # the herd has begun to speak
        self.before = ""  # the last line of the login shell's, before that

    def take(self, line: bytes) -> None:
        """Act on one line of the herd; those before its greeting are a login shell's."""
        if not self.greeted:
            self.greeted = line == GREETING
            if self.greeted:
                self.before = ""
            elif line.strip():
                self.before = line.decode("utf-8", "replace").strip()[:TEXT_BYTES]
            return
        kind, _, text = line.partition(b" ")
        if kind == b"@":
            key, _, sample = text.partition(b" ")
            self.pass_sample(key.decode(), sample)
        elif kind == b"!":
            log(text.decode("utf-8", "replace"))
        elif kind == b"-":
            self.end_step(text.decode())
        elif kind == b"=":
            facts = json.loads(text.decode())
            self.known[str(facts.get("raw"))] = facts
            self.untold[str(facts.get("raw"))] = facts
        elif line.strip():
            log("over there: " + line.decode("utf-8", "replace")[:TEXT_BYTES])

    def pass_sample(self, key: str, text: bytes) -> None:
        """Send an agent's line to the master on the connection of that agent."""
        line = self.lines.get(key)
        if text.startswith(b'{"part"') and not (line and line.takes_parts):
            return
        try:
            sample = json.loads(text.decode())
        except ValueError:
            return
        if line is not None and "part" in sample:
            line.parts.append(sample)
            return
        if line is None:
            line = self.lines[key] = self.dial()
        send = line.send_sample if "cpu" in sample else line.send
        if send(sample):
            self.said.discard(line.trouble)
        elif line.trouble not in self.said:
            self.said.add(line.trouble)
            log("the master does not take samples: %s" % line.trouble)
        if "bye" in sample:
            line.close()

    def end_step(self, step: str) -> None:
        """Close the connections of a step's agents: who said no goodbye is lost."""
        for key in [key for key in self.lines if key.rpartition(".")[0] == step]:
            self.lines.pop(key).close()

    def pass_facts(self) -> None:
        """Tell the master what Slurm says of the jobs, on a connection of a moment.

        Now and then all is told again: the master may have started again meanwhile.
        """
        now = time.monotonic()
        if now >= self.refresh_at:
            self.refresh_at = now + REFRESH_SECONDS
            self.untold.update(self.known)
        if not self.untold:
            return
        line = self.dial()
        for raw, facts in list(self.untold.items()):
            if not line.send(dict(facts, part="job")):
                self.refresh_at = min(self.refresh_at, now + PING_SECONDS)
                return
            del self.untold[raw]
            if facts.get("state") in ENDED_STATES:
                self.known.pop(raw, None)
        line.send({"bye": "told"})
        line.close()

    def run(self, first: bool = True) -> int:
        """Keep the herd running until a signal comes or nobody reads our stdout."""
        note_signals(self.signals)
        backoff = BACKOFF_SECONDS
        while not self.signals:
            status, words = self.run_herd(first)
            heard = bool(self.known or self.lines)
            for key in list(self.lines):
                self.end_step(key.rpartition(".")[0])
            if self.signals:
                break
            if first and not heard and status:
                reason = words or "the herd ended with %d" % status
                if self.is_ssh and status == SSH_FAILED:
                    reason += ": first see that `ssh %s true` works" % self.command[-2]
                log("error: %s" % reason)
                return 1
            first = False
            if self.greeted:
                backoff = BACKOFF_SECONDS
                self.told_ends = set()
            is_refused = self.is_ssh and re.search(REFUSED_WORDS, words)
            self.tell_end(words or "the herd ended", bool(is_refused))
            self.pause(RETRY_SECONDS if is_refused else backoff)
            backoff = min(2 * backoff, MAX_AWAY_SECONDS)
        return 0

    def tell_end(self, words: str, is_refused: bool) -> None:
        """Say why the herd has ended: the same once until it has spoken again."""
        if words in self.told_ends:
            return
        self.told_ends.add(words)
        following = "trying again until it answers"
        if is_refused:
            following = (
                "nothing is asked for in the background: start it again to log in, or give ssh "
                "a key; it is tried again every %.0f minutes" % (RETRY_SECONDS / 60)
            )
        log("%s: %s" % (words, following))

    def pause(self, seconds: float) -> None:
        """Wait so long, or for a signal."""
        until = time.monotonic() + seconds
        while not self.signals and time.monotonic() < until:
            time.sleep(0.1)

    def run_herd(self, first: bool) -> Tuple[int, str]:
        """Start the herd and serve it to its end: its exit status and last words."""
        import subprocess

        command = list(self.command)
        if self.is_ssh and not first:
            # never ask for a password by itself, nor wait for minutes for a dead end
            timeout = "ConnectTimeout=%d" % CONNECT_SECONDS
            command[1:1] = ["-o", "BatchMode=yes", "-o", timeout]
        try:
            herd: Any = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=ignore_typed_signals,
            )
        except OSError as error:
            return 1, "%s: %s" % (command[0], error.strerror)
        words = b""
        with contextlib.suppress(OSError):
            os.write(herd.stdin.fileno(), pack_text(self.text))
        poll = select.poll()
        for pipe in (herd.stdout, herd.stderr):
            os.set_blocking(pipe.fileno(), False)
            poll.register(pipe.fileno(), select.POLLIN)
        if not sys.stdout.isatty():
            poll.register(1, 0)  # its reader is the supervisor, or nobody
        asked = time.monotonic()
        self.rest = b""
        self.greeted = False
        self.before = ""
        while not self.signals:
            ready = dict(poll.poll(PING_SECONDS * 1000))
            if 1 in ready:
                self.signals.append(signal.SIGPIPE)
                break
            if time.monotonic() - asked >= PING_SECONDS:
                asked = time.monotonic()
                with contextlib.suppress(OSError):
                    os.write(herd.stdin.fileno(), b"\n")
            if herd.stderr.fileno() in ready:
                words = (words + read_pipe(herd.stderr))[-FILE_BYTES:]
                if ready[herd.stderr.fileno()] & select.POLLHUP:
                    poll.unregister(herd.stderr.fileno())
            if herd.stdout.fileno() in ready:
                was_greeted = self.greeted
                if not self.read_herd(herd):
                    break
                if self.greeted and not was_greeted:
                    words = b""  # a banner of sshd's is no reason for an end
            self.pass_facts()
        self.end_herd(herd)
        words += read_pipe(herd.stderr)
        said = words.decode("utf-8", "replace").strip().splitlines()
        return herd.returncode, said[-1].strip() if said else self.before

    def read_herd(self, herd: Any) -> bool:
        """Act on what the herd has printed; False at its end."""
        data = read_pipe(herd.stdout)
        if not data:
            return False
        lines = (self.rest + data).split(b"\n")
        self.rest = lines.pop()[-MAX_OUTPUT:]
        for line in lines:
            self.take(line)
        for connection in self.lines.values():
            if connection.parts:
                connection.send_parts()
        return True

    def end_herd(self, herd: Any) -> None:
        """Close the herd's input and hear its last lines; kill it when it takes too long."""
        with contextlib.suppress(OSError):
            herd.stdin.close()
        deadline = time.monotonic() + LEAVE_SECONDS + 1.0
        while herd.poll() is None and time.monotonic() < deadline:
            self.read_herd(herd)
            time.sleep(0.05)
        self.read_herd(herd)
        if herd.poll() is None:
            herd.kill()
        herd.wait()


def ignore_typed_signals() -> None:
    """Ctrl-C is for the relay: it ends the herd in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def herd_command(wanted: List[str], login: str) -> List[str]:
    """Return what starts the herd: here, or through ssh with nothing written there."""
    flags = ["--herd"] + (["--jobs", ",".join(wanted)] if wanted else [])
    if not login:
        return [sys.executable, "-c", BOOTSTRAP] + flags
    import shlex

    words = ["exec", "sh", "-c", FIND_PYTHON, BOOTSTRAP] + flags
    remote = " ".join(shlex.quote(word) for word in words)
    alive = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=2"]
    return ["ssh", "-T", "-x", "-a"] + alive + ["--", login, remote]


# ============================================================================
# Command line
# ============================================================================

HOST = r"(?:\[([\w.:%]+)\]|([\w.-]+))(?::(\d+))?"  # login, login:9, [fe80::1%ib0]:9
Hosts = List[Tuple[str, Optional[int]]]


class UsageError(argparse.ArgumentTypeError):
    """A value of a flag or a variable is not one that is allowed; the text says what is."""

    def __init__(self, text: str, allowed: str) -> None:
        super().__init__("%r; allowed: %s" % (text, allowed))


def port_argument(text: str) -> int:
    """An argparse type: a port."""
    if re.match(r"\d{1,5}\Z", text) and 1 <= int(text) <= 65535:
        return int(text)
    raise UsageError(text, "1 to 65535")


def hosts_argument(text: str) -> Hosts:
    """An argparse type: HOST[:PORT][,NEXT...] -> [(host, port or None)]."""
    hosts: Hosts = []
    for part in text.split(","):
        found = re.match(HOST + r"\Z", part)
        port = found.group(3) if found else None
        if not found or port is not None and not 1 <= int(port) <= 65535:
            raise UsageError(text, "HOST or HOST:PORT, IPv6 in [ ], commas between")
        name = found.group(1) or found.group(2)
        hosts.append((name, int(port) if port else None))
    return hosts


def interval_argument(text: str) -> float:
    """An argparse type: seconds between two samples."""
    if re.match(r"(?:\d+\.?\d*|\.\d+)\Z", text) and 0.1 <= float(text) <= 60:
        return float(text)
    raise UsageError(text, "0.1 to 60 seconds")


def name_argument(text: str) -> str:
    """An argparse type: a name of a node."""
    if re.match(r"(?=.*\S)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,63}\Z", text):
        return text
    raise UsageError(text, "1 to 63 printable characters")


def jobs_argument(text: str) -> List[str]:
    """An argparse type: ids of jobs with commas between; none of them means all."""
    jobs = [job for job in text.split(",") if job]
    if all(re.match(r"\d+(?:_\d+|\+\d+)?\Z", job) for job in jobs):
        return jobs
    raise UsageError(text, "ids of jobs with commas between: 4711,4712_3")


def login_argument(text: str) -> str:
    """An argparse type: where ssh goes; never what ssh would take as a flag."""
    if re.match(r"[^\s\x00-\x1f-][^\s\x00-\x1f]*\Z", text):
        return text
    raise UsageError(text, "[USER@]LOGIN as ssh takes it")


# variable, flag, its type, its default: for job scripts
ENVIRONMENT = (
    ("SENTINEL_HOST", "host", hosts_argument, "127.0.0.1"),
    ("SENTINEL_PORT", "port", port_argument, "13579"),
    ("SENTINEL_SECRET_FILE", "secret_file", str, ""),
)


def take_environment(args: argparse.Namespace) -> None:
    """Complete the flags by what the environment has; ValueError names a bad variable."""
    for variable, flag, kind, default in ENVIRONMENT:
        if getattr(args, flag) is None:
            try:
                setattr(args, flag, kind(os.environ.get(variable) or default))
            except argparse.ArgumentTypeError as error:
                raise ValueError("%s: %s" % (variable, error)) from None


def read_secret(path: str) -> bytes:
    """Return the secret in a file that only its owner can read; OSError with the cure."""
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        secret = file.read(FILE_BYTES).strip()
    if mode & 0o077 or not secret:
        raise OSError("%s is empty or others can read it: chmod 600 it" % path)
    return secret


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; the defaults are in ENVIRONMENT."""
    parser = argparse.ArgumentParser(
        prog="agent.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--host",
        type=hosts_argument,
        metavar="HOST[:PORT][,NEXT...]",
        help="the master; several are tried in turn (SENTINEL_HOST, 127.0.0.1)",
    )
    add("--port", type=port_argument, help="its port (SENTINEL_PORT, 13579)")
    add(
        "--interval",
        type=interval_argument,
        default=2.0,
        metavar="SECONDS",
        help="from one sample to the next (2)",
    )
    add(
        "--name",
        type=name_argument,
        metavar="NODE",
        help="what this node is called (SLURMD_NODENAME or hostname)",
    )
    add("--secret-file", metavar="FILE", help="the master's (SENTINEL_SECRET_FILE)")
    add("--procfs", metavar="DIR", default="/proc", help="where proc(5) is (/proc)")
    add("--sysfs", metavar="DIR", default="/sys", help="where sysfs(5) is (/sys)")
    add(
        "--report",
        metavar="FILE",
        help="write the end-of-job report there as JSON, too",
    )
    add(
        "--record",
        metavar="DIR",
        help="leave a record of the COMMAND there, for /jobs, /runs and --explain",
    )
    add("--once", action="store_true", help="print one sample as JSON and exit")
    add("--stdout", action="store_true", help="print samples, a line of JSON each")
    add(
        "--jobs",
        type=jobs_argument,
        nargs="?",
        const=[],
        metavar="IDS",
        help="watch each of my running jobs, or these, by a step of its own",
    )
    add(
        "--ssh",
        type=login_argument,
        metavar="[USER@]LOGIN",
        help="with --jobs: those of the cluster behind that login node",
    )
    add("--verbose", action="store_true", help="log each sample")
    add("--version", action="version", version=VERSION)
    # what the halves of --jobs and their agents say to each other
    add("--herd", action="store_true", help=argparse.SUPPRESS)
    add("--lifeline", action="store_true", help=argparse.SUPPRESS)
    add("--again", action="store_true", help=argparse.SUPPRESS)
    add("--facts", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parse_words(
    parser: argparse.ArgumentParser, words: List[str]
) -> argparse.Namespace:
    """Return the flags, and as `command` what follows a --; bad usage ends with exit code 2."""
    cut = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_args(words[:cut])
    args.command = words[cut + 1 :]
    unknown += (
        words[cut:] if words[cut:] == ["--"] or args.once and args.command else []
    )
    if unknown:
        hidden = ("herd", "lifeline", "again", "facts", "command")
        flags = [name.replace("_", "-") for name in vars(args) if name not in hidden]
        parser.error(
            "%s; allowed: --%s, or -- and a COMMAND (not with --once)"
            % (" ".join(unknown), " --".join(flags))
        )
    if args.record and not args.command:
        parser.error("--record: only with -- and a COMMAND")
    args.piped = not (args.command or sys.stdout is None or sys.stdout.isatty())
    args.live = not args.command and sys.stderr is not None and sys.stderr.isatty()
    return args


def prepare_agent(args: argparse.Namespace) -> Agent:
    """Return an agent that is ready to run; any error says what keeps it from watching."""
    hosts = [(host, port or args.port) for host, port in args.host]
    secret = read_secret(args.secret_file) if args.secret_file else b""
    sampler = prepare_sampler(args)
    args.report = open(args.report, "w") if args.report else None
    if args.stdout:
        return Agent(args, sampler, Outlet())
    sampler.fixed["ack"] = True
    return Agent(args, sampler, Link(hosts, secret, args.interval))


def prepare_sampler(args: argparse.Namespace) -> Sampler:
    """Return what reads this node; ImportError where that takes psutil."""
    kind = Probe if sys.platform.startswith("linux") else PsutilProbe
    sampler = Sampler(kind(args.procfs, args.sysfs), args.name or "")
    sampler.fixed["interval"] = args.interval
    if args.facts:
        apply_facts(sampler, args.facts)
    return sampler


def run_unwatched(command: List[str], reason: str) -> int:
    """Become the command: whatever is wrong with the watching, the work has to be done."""
    log("not watching, the command runs without: %s" % reason)
    # Python ignores these two; a program of another kind may not
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print("error: %s: %s" % (error.strerror, command[0]), file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def run_agent(args: argparse.Namespace) -> int:
    """Watch this node, around a command if there is one; return the exit code."""
    try:
        agent = prepare_agent(args)
    except ImportError:
        reason = "off Linux it needs psutil: python3 -m pip install --user psutil"
    except Exception as error:
        known = isinstance(error, (OSError, ValueError, LookupError))
        if not known and not args.command:
            raise
        reason = str(error) or repr(error)
    else:
        try:
            agent.start()
        except OSError as error:
            if error.filename is not None:  # there is no such command
                print("error: %s" % error, file=sys.stderr)
                return 127 if isinstance(error, FileNotFoundError) else 126
            reason = "no second process: %s" % error.strerror
        else:
            return agent.run()
    if args.command:
        return run_unwatched(args.command, reason)
    print("error: %s" % reason, file=sys.stderr)
    return 1


def run_once(args: argparse.Namespace) -> int:
    """Print one sample."""
    try:
        sampler = prepare_sampler(args)
    except ImportError:
        print(
            "error: off Linux it needs psutil: python3 -m pip install --user psutil",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError, LookupError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    sampler.fixed["ack"] = True
    Parts(sampler)  # its readers are part of a sample
    print(json.dumps(get_system_stats(sampler)))
    return 0


def run_watcher(args: argparse.Namespace) -> int:
    """Watch the jobs: start the herd, and speak to the master for its agents."""
    try:
        secret = read_secret(args.secret_file) if args.secret_file else b""
    except OSError as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    host, port = args.host[0]
    command = herd_command(args.jobs or [], args.ssh or "")
    dial = lambda: Line(host, port or args.port, secret)  # noqa: E731
    return Relay(command, own_text(), dial).run(first=not args.again)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; return the exit code."""
    if os.name != "posix":
        print(
            "error: agent.py needs a Unix, as Linux or macOS; on Windows run it in WSL",
            file=sys.stderr,
        )
        return 1
    fill_closed_streams()
    parser = build_parser()
    args = parse_words(parser, sys.argv[1:] if argv is None else argv)
    try:
        take_environment(args)
    except ValueError as error:
        if args.command:
            return run_unwatched(args.command, str(error))
        parser.error(str(error))
    if args.herd:
        return Herd(args.jobs or [], own_text()).run()
    if args.jobs is not None or args.ssh:
        return run_watcher(args)
    if args.once:
        return run_once(args)
    code = run_agent(args)
    return 0 if args.lifeline else code  # the exit code of a step: see STEP_PYTHON


def fill_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed: no pipe of ours is to take its place.

    Only for this process: a command does not inherit it, so its streams stay closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def spare_exit_code() -> None:
    """Let no log that cannot be written (a full disk) become the exit code of the command."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


if __name__ == "__main__":
    code = main()
    spare_exit_code()
    # a thread that is in a driver, a disk or the log would abort the interpreter's end
    os._exit(code)
