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
#   sample        one reader a source: a new metric is one reader in the Sampler's list
#   link          the connection to the master: dial, hear, send, dial again
#   outlet        the same with stdout in its place
#   report        what a job used of what it asked for
#   loop          clock, signals, the command that is watched
#   herd          where squeue and srun are: an agent for each job
#   relay         where the master is: a connection for each agent of the herd
#   command line  flags, environment, main(argv=None) -> int

import os
import sys

if __name__ == "__main__":
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
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple, Union

VERSION = "1.0"
Value = Union[str, float]  # float stands for int and bool, too (PEP 484)
Sample = Dict[str, Value]  # what is unknown has no key
Reading = Iterable[Tuple[str, Value]]
Reader = Callable[[], Reading]


# ============================================================================
# Parsers: text in, values out; ValueError or LookupError for a text of another kind
# ============================================================================

# key, file, pattern: proc(5), kernel document accounting/psi.rst
NUMBERS = (
    ("load1", "proc/loadavg", r"(\S+)"),  # 0.20 0.18 0.12 1/80 11206
    ("procs", "proc/loadavg", r"/(\d+)"),
    ("uptime", "proc/uptime", r"(\S+)"),  # 350735.47 234388.90
    ("psi_cpu", "proc/pressure/cpu", r"some avg10=(\S+)"),  # some avg10=1.12 avg60=...
    ("psi_mem", "proc/pressure/memory", r"some avg10=(\S+)"),
    ("psi_io", "proc/pressure/io", r"some avg10=(\S+)"),
)
# keys, class of devices, file, pattern (name, in, out), bytes in one: proc(5), iostats.rst
COUNTERS = (
    # eth0: 171199307    3251    0    0    0     0          0         0   139424    1862 ...
    (
        ("net_rx", "net_tx"),
        "net",
        "proc/net/dev",
        r"(\S+): *(\d+)(?: +\d+){7} +(\d+)",
        1,
    ),
    #  254       0 vda 31056 7269 1864882 11864 10381 6470 2203312 5835 0 8748 18356 ...
    (
        ("disk_read", "disk_write"),
        "block",
        "proc/diskstats",
        r" (\S+) \d+ \d+ (\d+) \d+ \d+ \d+ (\d+)",
        512,
    ),
)
TIME_LEFT = r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)$"  # 1-02:03:04 of squeue(1), %L and %l
CPUS_PER_NODE = (
    r"(\d+)(?:\(x(\d+)\))?"  # 72(x2),36 in SLURM_JOB_CPUS_PER_NODE, sbatch(1)
)
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


def number(text: str, name: str) -> int:
    """Return the number behind the name that begins a line; ValueError names what is missing."""
    at = ("\n" + text).find("\n" + name)
    if at < 0:
        raise ValueError("there is no line %r" % name.strip())
    start = at + len(name)
    return int(text[start : start + 30].split(None, 1)[0])


def number_or(text: str, name: str, default: int) -> int:
    """Return the number behind the name that begins a line, or the default without one."""
    if "\n" + name in "\n" + text:
        return number(text, name)
    return default


def parse_cpu(text: str) -> Tuple[int, int]:
    """Return (idle, total) ticks since boot from /proc/stat, proc(5); iowait is idle, too."""
    # cpu  84282 747 51842 1326541 1340 0 3204 17 412 0     (the guest's 412 are in user's, too)
    if not text.startswith("cpu "):
        raise ValueError("it does not begin with a line 'cpu'")
    line = text[: text.index("\n")]
    ticks = [int(word) for word in line.split()[1:9]]
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
    if "MemAvailable:" in text:
        available = number(text, "MemAvailable:")
    else:
        available = available_before_3_14(text)
    if available > total:
        available = number(text, "MemFree:")
    swap = number_or(text, "SwapTotal:", 0)
    unused = number_or(text, "SwapFree:", 0)
    return total * 1024, available * 1024, swap * 1024, unused * 1024


def available_before_3_14(text: str) -> int:
    """Return the KiB that free(1) took as available before Linux 3.14 had MemAvailable."""
    reclaimable = ("Buffers:", "Cached:", "SReclaimable:")
    cached = sum(number_or(text, name, 0) for name in reclaimable)
    return number(text, "MemFree:") + cached - number_or(text, "Shmem:", 0)


def parse_gpus(text: str) -> Reading:
    """Yield gpus, gpu (mean percent busy) and gpu_mem (percent in use) from nvidia-smi's CSV."""
    # 35, 1024, 40960           [N/A] where the GPU does not tell
    rows = [line.split(", ") for line in text.splitlines() if line.count(", ") == 2]
    busy = [int(row[0]) for row in rows if row[0].isdigit()]
    used = [int(row[1]) for row in rows if row[1].isdigit()]
    total = [int(row[2]) for row in rows if row[2].isdigit()]
    if rows:
        yield "gpus", len(rows)
    if busy:
        yield "gpu", round(sum(busy) / len(busy), 1)
    if total:
        yield "gpu_mem", round(100.0 * sum(used) / sum(total), 1)


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
STAT_BYTES = (
    4194304  # ... and of /proc/stat when its CPUs are counted: 4,096 have 400 KB
)
MOUNTS_BYTES = 4194304  # ... and of mountstats: 4 KB a mount of NFS
WAIT_SECONDS = 5.0  # for a connection, a challenge, nvidia-smi or squeue


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

        One that fails is opened anew the next time: behind the old descriptor there may be
        a file system that has gone (lxcfs, a cgroup) while the path leads to a new one.
        """
        if path not in self.open_files:
            self.open_files[path] = os.open(self.where(path), os.O_RDONLY)
        file = self.open_files[path]
        try:
            text = chunk = os.pread(file, limit, 0)
            while chunk and len(text) < limit:  # /proc gives about a page at a time
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
            yield key, round((counter - counted) / (now - then), 3)


# ============================================================================
# Sample: all readings of one node at one instant, one reader a source
# ============================================================================

FIRST_SECONDS = 0.25  # the first sample covers so much time
SLOW_SECONDS = 10.0  # between two rounds of what may hang
STALE_SECONDS = 60.0  # older results of it are unknown
SQUEUE_SECONDS = 300.0  # squeue is never asked twice within this time
AMD_FILES = ("gpu_busy_percent", "mem_info_vram_used", "mem_info_vram_total")
NVIDIA_SMI = (
    "nvidia-smi --query-gpu=utilization.gpu,memory.used,memory.total"
    " --format=csv,noheader,nounits"
)
NO_LIMIT = 2**60  # bytes: cgroup v1 says 2 ** 63 - 4096 for no limit
WIDE_SECONDS = 10.0  # between two rounds of what reads many files, and at least ...
WIDE_FACTOR = 1000.0  # ... so many times what the last one took, up to ...
MAX_WIDE_SECONDS = 50.0  # ... this
MAX_PROCESSES = 4096  # of a job that are read
MAX_KEPT_GROUPS = 16  # cgroups whose OOM kills are read with each sample
FILESYSTEMS = (("disk", "."), ("disk_tmp", "/tmp"))
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

    A new metric is one more reader in `self.readers`, in `self.slow_readers` if what it reads
    may hang, or in `self.wide_readers` if it reads many files; master_server.py shows it once
    its METRICS list it.
    """

    def __init__(self, probe: Optional[Probe] = None, name: str = "") -> None:
        self.probe = probe or Probe()
        self.name = name
        self.rates = Rates()
        self.now = 0.0  # monotonic time of the last sample
        # the last round of the slow readers, and of the wide ones: when, result
        self.slow: Tuple[float, Sample] = (-math.inf, {})
        self.wide: Tuple[float, Sample] = (-math.inf, {})
        self.idle = 0  # ticks, and so is total
        self.total = 0
        self.percent = 0.0  # CPU in use, as it was last
        self.trouble = ""  # what keeps cpu or ram from being known now
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
        self.nfs = (0, 0)  # operations, ms of their round trips
        self.fixed = collect(
            [self.identify, self.identify_job, self.find_job_cpus, self.count_cpus]
        )
        self.readers: List[Reader] = [
            self.read_cpu,
            self.read_memory,
            *[functools.partial(self.read_number, *source) for source in NUMBERS],
            *[functools.partial(self.read_counters, *source) for source in COUNTERS],
            self.read_job_cpu,
            self.read_job_memory,
            self.read_job_peak,
            self.read_job_events,
            self.read_agent,
        ]
        self.slow_readers: List[Reader] = [
            *[functools.partial(self.read_ports, *source) for source in PORT_COUNTERS],
            *[
                functools.partial(self.read_filesystem, *source)
                for source in FILESYSTEMS
            ],
            self.read_time_left,
            self.read_gpus,
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
        """Do the readings of many files, on a thread."""
        while True:
            begun = time.monotonic()
            self.wide = (begun, collect(self.wide_readers))
            took = time.monotonic() - begun
            time.sleep(min(max(WIDE_SECONDS, WIDE_FACTOR * took), MAX_WIDE_SECONDS))

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
            self.percent = (
                (1000 * busy + elapsed // 2) // elapsed / 10
            )  # round() is slow
        self.idle = idle
        self.total = total
        yield "cpu", self.percent

    def read_memory(self) -> Reading:
        text = self.probe.read("proc/meminfo", 1024)
        total, available, swap, unused = parse_meminfo(text)
        used = total - available
        if 0 <= used <= total:
            yield "ram", (1000 * used + total // 2) // total / 10
            yield "mem_used", float(used)
        yield "mem_total", total
        if swap and unused <= swap:
            yield "swap", round(100.0 * (swap - unused) / swap, 1)

    def read_number(self, key: str, path: str, pattern: str) -> Reading:
        yield key, float(re.findall(pattern, self.probe.read(path))[0])

    def read_counters(
        self, keys: Tuple[str, str], kind: str, path: str, pattern: str, unit: int
    ) -> Reading:
        devices = self.hardware[kind]
        rows = []
        for name, received, sent in re.findall(pattern, self.probe.read(path)):
            if name in devices:
                rows.append((int(received), int(sent)))
        for key, column in zip(keys, zip(*rows)):
            yield from self.rates.change(key, unit * sum(column), self.now)

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
        4.13, and the leaf of a step is gone a second later: what it had counted is kept.
        """
        if "memory" not in self.job:
            events = self.probe.read("%s/memory.events" % self.job[""])
            yield "job_mem_failcnt", number(events, "max ")
            yield "oom_kill", number(events, "oom_kill ")
            return
        for group in self.groups[:MAX_KEPT_GROUPS]:
            with contextlib.suppress(OSError, ValueError):
                self.count_kills(group, self.probe.read(group + "/memory.oom_control"))
        if self.killed:
            yield "oom_kill", sum(tuple(self.killed.values()))  # a thread adds to them
        path = "%s/memory.failcnt" % self.job["memory"]
        yield "job_mem_failcnt", int(self.probe.read(path))

    def count_kills(self, group: str, text: str) -> None:
        """Note the kills in a cgroup of v1, from its memory.oom_control."""
        # oom_kill_disable 0 / under_oom 0 / oom_kill 1
        self.killed[group] = max(number(text, "oom_kill "), self.killed.get(group, 0))

    def find_groups(self) -> Reading:
        """Look for the cgroups of v1 in which processes may be killed; few are read in between."""
        own = self.own["memory"]
        rest = [name for name in self.probe.tree(self.job["memory"]) if name != own]
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

    def read_filesystem(self, key: str, path: str) -> Reading:
        space = os.statvfs(path)
        used = space.f_blocks - space.f_bfree  # percent as df(1) has it
        yield key, round(100.0 * used / (used + space.f_bavail), 1)

    def read_gpus(self) -> Reading:
        texts = []
        for name in self.probe.names("sys/class/drm"):
            card = "sys/class/drm/%s/device" % name
            # the renderD128 of a card is the same GPU
            if name.startswith("card") and AMD_FILES[0] in self.probe.names(card):
                values = [self.probe.read("%s/%s" % (card, file)) for file in AMD_FILES]
                texts.append(", ".join(value.strip() for value in values))
        texts.append(self.probe.ask(NVIDIA_SMI))
        return parse_gpus("\n".join(texts))


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
    collect(sampler.wide_readers)  # their rates begin here
    time.sleep(FIRST_SECONDS)
    sample = sampler.sample()
    sample.update(collect([*sampler.wide_readers, *sampler.slow_readers]))
    return sample


def apply_facts(sampler: Sampler, facts: Dict[str, Any]) -> None:
    """Take over what a step's environment lacks or has wrong: name, CPUs, end of its job."""
    for key in ("job", "job_name"):
        sampler.fixed[key] = clip(str(facts[key]))
    cpus = facts["cpus"].get(sampler.fixed["node"])
    if cpus:
        sampler.fixed["job_cpus"] = cpus
    if facts.get("end"):
        sampler.end_time = float(facts["end"])
        sampler.time_limit = float(facts.get("limit") or 0.0)
        sampler.asked = math.inf


# ============================================================================
# Link: dial, hear, send, dial again
# ============================================================================

ANSWER_BYTES = 1024  # read at once of what the master says
ANSWER_SECONDS = (
    10.0  # without an ok for so long: dial again; doubles until the first ok ...
)
MAX_ANSWER_SECONDS = 60.0  # ... up to this
BACKOFF_SECONDS = 1.0  # from one dial to the next; doubles until the first ok ...
MAX_BACKOFF_SECONDS = 30.0  # ... up to this
GOODBYE_SECONDS = 0.5  # for the master to take the goodbye


def log(text: str, end: str = "\n") -> None:
    """Write a line to stderr, over the line before if that had another end (on a terminal)."""
    text = "".join(
        char if char.isprintable() else "?" for char in text
    )  # a peer may say it
    with contextlib.suppress(
        OSError, ValueError
    ):  # a log that nobody reads stops nothing
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
            self.sock = sock
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
            if message:
                self.send(self.sock, message)
        except (OSError, ValueError) as error:
            self.lose("lost", error)
            return
        if self.answered or self.sent > 1:  # who takes the call may yet hang up at once
            self.say("connected to " + self.peer)

    def hear(self, sock: socket.socket) -> None:
        """Take note of an ok; OSError for an error, an end, or too long a silence."""
        try:
            answer = sock.recv(ANSWER_BYTES)
        except BlockingIOError:  # no answer yet
            answer = None
        if answer is not None:
            if b"ok\n" in answer:
                self.heard = time.monotonic()
                self.answered = True
                self.ever_answered = True
            if not answer or b"error " in answer:
                raise OSError(error_in(answer) or "it closed the connection")
        if time.monotonic() - self.heard > self.patience:
            sock.send(pickle.dumps({"bye": "reconnecting"}, protocol=4))
            raise OSError("no answer for %.0f s" % self.patience)

    def send(self, sock: socket.socket, message: Sample) -> None:
        """Send a whole message: nothing may follow a part of one."""
        packed = pickle.dumps(message, protocol=4)
        if sock.send(packed) < len(packed):
            raise OSError("it takes no more")
        self.sent += 1

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
        spread = 1 - os.urandom(1)[0] / 512
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
            while sock.recv(
                ANSWER_BYTES
            ):  # left unread it would turn the end into a RST
                pass


class Outlet:
    """The way of the samples to stdout, a line of JSON each: in the place of a Link."""

    sock = None
    answered = True
    sent = 1
    peer = "stdout"
    retry_at = math.inf

    def __init__(self) -> None:
        self.closed = False

    def start_dialling(self, wake: int) -> None:
        """There is nobody to dial."""

    def exchange(self, message: Optional[Sample] = None) -> None:
        """Write a message; nothing more once nobody reads."""
        if message and not self.closed:
            try:
                os.write(1, json.dumps(message).encode() + b"\n")
            except OSError:
                self.closed = True

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
BELOW_PEAK = "memory peak above the highest sample, %.3g GB of %.3g GB"
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

    def add(self, sample: Sample, seconds: float) -> None:
        """Count a sample that covers so many seconds."""
        self.samples += 1
        self.seconds += seconds
        for key in REPORTED:
            if key in sample:
                value = float(sample[key])
                known, mean, peak = self.get(key, (0.0, 0.0, 0.0))
                mean += (value - mean) * seconds / (known + seconds)
                self[key] = (known + seconds, mean, max(peak, value))

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
            yield "it had reached its memory limit; this kernel counts no kills"
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


class Agent:
    """Binds sampler, link and command to the clock and the signals."""

    def __init__(
        self, args: argparse.Namespace, sampler: Sampler, link: Union[Link, Outlet]
    ) -> None:
        self.args = args
        self.sampler = sampler
        self.link = link
        self.report = Report(collect([sampler.read_job_events]))
        self.ending = ""  # why it ends, once it does
        self.signals: List[int] = []
        self.command: Any = None
        self.awake, self.wake = os.pipe()  # signals and dialled links write a byte
        os.set_blocking(self.wake, False)

    def start(self) -> None:
        """Catch signals and start the command.

        OSError with the command's name if it cannot be run, without one if no process can be had.
        """
        self.catch_signals()
        if self.args.command:
            import subprocess

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
            return exit_status(self.command.returncode)
        return 0 if self.ending else 1

    def outlast(self) -> None:
        """Pass signals on until the command has ended, whatever has become of the watching."""
        poll = select.poll()
        poll.register(self.awake, select.POLLIN)
        while self.command.poll() is None:
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
        threading.Thread(target=self.sampler.refresh_for_ever, daemon=True).start()
        interval = self.args.interval
        beat = self.sampler.now + FIRST_SECONDS
        while not self.ending:
            now = time.monotonic()
            if now >= self.link.retry_at:
                self.link.start_dialling(self.wake)
            if self.link.sock is not None and not self.link.sent:
                # the master waits for the first sample
                beat = min(beat, max(self.sampler.now + FIRST_SECONDS, now))
            if now >= beat:
                sample = self.take()
                # without cpu or ram the master would refuse it
                self.link.exchange(None if self.sampler.trouble else sample)
                beat += interval * (1 + (now - beat) // interval)
            self.wait(min(beat, self.link.retry_at))

    def wait(self, until: float) -> None:
        """Sleep until then, or until something happens, and act on what has happened."""
        ready = self.poll(until)
        if self.awake in ready:
            os.read(self.awake, FILE_BYTES)
        elif self.args.lifeline and 0 in ready:
            if not os.read(0, FILE_BYTES):
                self.ending = "no longer watched"
        elif 1 in ready:
            self.ending = "finished"  # who read our stdout has gone
        elif ready:
            self.link.exchange()
        self.handle_signals()
        code = self.command.poll() if self.command else None
        if code is not None:
            self.ending = ending_of(code)

    def poll(self, until: float) -> Dict[int, int]:
        """Wait for a wake-up, the master, our reader or our input: {descriptor: what}."""
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
        return dict(poll.poll(max(0.0, until - time.monotonic()) * 1000))

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
        if self.args.report:
            facts = dict(last, ended=self.ending, text=lines, totals=self.report)
            with self.args.report as file:
                json.dump(facts, file)


# ============================================================================
# Herd: where squeue and srun are.  It looks for jobs and puts an agent into each
# ============================================================================
#
# What the herd prints, a line each, and the relay understands:
#
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
RETRY_SECONDS = 300.0  # after the last rung
ATTACH_SECONDS = 20.0  # for a step's first line
DEAF_SECONDS = 20.0  # without a sign of the relay: it is cut off
REFRESH_SECONDS = 60.0  # between two times that the master is told of every job
PING_SECONDS = 5.0  # between two signs of life of the relay
GATHER_SECONDS = 0.5  # lines that come within this time are sent on together
LEAVE_SECONDS = 3.0  # for agents to say goodbye at the end
MAX_ENDED = 5  # ended jobs that Slurm is asked about after each look
MAX_OUTPUT = 4 * 1024 * 1024  # bytes of squeue's answer

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
            if not chunk:
                break
            chunks.append(chunk)
    return b"".join(chunks)


class Step:
    """One srun of ours within a job: an agent on each of its nodes."""

    def __init__(self, key: str, command: List[str], text: bytes) -> None:
        import subprocess

        self.key = key
        self.since = time.monotonic()
        self.lines = 0
        self.rest = b""
        self.words = b""
        # srun takes options from SLURM_*: those of a job that we may run in are not meant
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SALLOC"))
            or name == "SLURM_CONF"
        }
        self.process: Any = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on the terminal is for the herd alone
        )
        unblock(self.process.stdin, self.process.stdout, self.process.stderr)
        self.unsent = pack_text(text)

    def feed(self) -> None:
        """Write what srun has not taken yet of the agent's text; its stdin stays open."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.unsent:
                count = os.write(self.process.stdin.fileno(), self.unsent)
                self.unsent = self.unsent[count:]

    def read(self) -> Iterable[bytes]:
        """Yield the whole lines that have come, as the herd prints them."""
        self.words = (self.words + read_pipe(self.process.stderr))[-FILE_BYTES:]
        lines = (self.rest + read_pipe(self.process.stdout)).split(b"\n")
        self.rest = lines.pop()[-FILE_BYTES:]
        for line in lines:
            task, colon, text = line.partition(b": ")  # srun --label
            if colon and text.startswith(b"{"):
                self.lines += 1
                yield b"@ %s.%s %s" % (self.key.encode(), task.strip(), text)

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
        self.attach_at = 0.0  # time.monotonic()
        self.question: Optional[Question] = None
        self.ended = False
        self.told: Optional[Sample] = None

    @property
    def name(self) -> str:
        return str(self.facts["job"])

    @property
    def nodes(self) -> List[str]:
        return parse_hostlist(str(self.facts.get("nodelist", "")))


class Herd:
    """Looks for the user's jobs and keeps one step of ours in each that runs."""

    def __init__(self, wanted: List[str], text: bytes) -> None:
        self.wanted = wanted  # ids, or none for all jobs
        self.text = text
        self.jobs: Dict[str, Job] = {}  # by raw id
        self.look_at = 0.0
        self.looking: Optional[Question] = None
        self.asking: List[Tuple[Job, Question]] = []  # how jobs ended
        self.said: Set[str] = set()
        self.heard = time.monotonic()
        self.signals: List[int] = []

    def run(self) -> int:
        """Herd until the relay is gone; return the exit code."""
        note_signals(self.signals)
        try:
            while self.relay_lives():
                self.look()
                self.attach_due()
                self.pass_lines()
        finally:
            self.leave()
        return 0

    def relay_lives(self) -> bool:
        """Wait a moment for a sign of the relay; False when it is gone."""
        busy = (
            self.looking
            or self.asking
            or any(
                job.question or any(not step.lines for step in job.steps)
                for job in self.jobs.values()
            )
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
        try:
            while data:
                data = data[os.write(1, data) :]
        except OSError:
            self.signals.append(signal.SIGPIPE)

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
                self.update(parse_squeue(asked.text()))
        self.hear_ends()

    def update(self, rows: List[Sample]) -> None:
        """Take in what squeue told: new jobs, new states, jobs that have gone."""
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
                job.ended = facts.get("state") in ENDED_STATES
            was_running = job.facts.get("state") == "RUNNING"
            job.facts = facts
            if (
                facts.get("state") == "RUNNING"
                and not was_running
                or job.attach_at == 0
            ):
                age = time.time() - float(facts.get("start", 0.0))
                job.attach_at = now + max(0.0, YOUNG_SECONDS - age)
        asks = 0
        for raw, job in list(self.jobs.items()):
            over = raw not in seen or job.facts.get("state") in ENDED_STATES
            if over and not job.ended and asks < MAX_ENDED:
                asks += 1
                job.ended = True
                self.ask_end(job)
            elif raw not in seen and job.ended and not job.steps:
                del self.jobs[raw]
        self.tell_facts()

    def is_wanted(self, facts: Sample) -> bool:
        """Whether a job is one of the ids that the user gave."""
        names = (facts.get("job"), facts.get("raw"), facts.get("array"))
        return not self.wanted or any(name in self.wanted for name in names)

    def tell_facts(self) -> None:
        """Pass on what changed of each job, and name those that are not watched."""
        for job in self.jobs.values():
            if job.facts != job.told:
                job.told = job.facts
                self.put(b"= " + json.dumps(job.facts).encode())
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
                raw = str(job.facts["raw"])
                job.question = Question(["scontrol", "-d", "show", "job", raw])

    def attach(self, job: Job, question: Question) -> None:
        """Start the step of the job's rung with what scontrol told."""
        known = parse_scontrol(question.text())
        if question.error or known.get("JobState") != "RUNNING":
            job.attach_at = time.monotonic() + LOOK_SECONDS
            if question.error:
                self.say("job %s: %s" % (job.name, question.error))
            return
        cpus = parse_job_nodes(question.text())
        nodes = sorted(cpus, key=natural_name) or job.nodes
        facts = {
            "job": job.name,
            "job_name": str(job.facts.get("job_name", "")),
            "end": job.facts.get("end"),
            "limit": job.facts.get("limit"),
            "cpus": cpus,
        }
        job.tries += 1
        groups = [[node] for node in nodes] if job.rung == 1 else [nodes]
        for number, group in enumerate(groups):
            key = "%s.%d-%d" % (job.facts["raw"], job.tries, number)
            command = self.step_command(job, group, facts)
            try:
                job.steps.append(Step(key, command, self.text))
            except OSError as error:
                self.say("job %s: srun: %s" % (job.name, error.strerror))
                job.attach_at = time.monotonic() + RETRY_SECONDS

    def step_command(
        self, job: Job, nodes: List[str], facts: Dict[str, Any]
    ) -> List[str]:
        """Return the srun that puts an agent on these nodes of the job."""
        count = len(nodes)
        command = [
            "srun",
            "--jobid=%s" % job.facts["raw"],
            "--overlap",
            "--mem=0",
            "--immediate=10",
            "--job-name=sentinel",
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
        return command + ["sh", "-c", FIND_PYTHON, BOOTSTRAP] + flags

    def pass_lines(self) -> None:
        """Send on what the agents wrote, and see which steps have ended."""
        for job in self.jobs.values():
            for step in list(job.steps):
                step.feed()
                for line in step.read():
                    self.put(line)
                late = not step.lines and time.monotonic() - step.since > ATTACH_SECONDS
                if step.process.poll() is not None or late:
                    for line in step.read():
                        self.put(line)
                    self.end_step(job, step, late)

    def end_step(self, job: Job, step: Step, late: bool) -> None:
        """Take leave of a step; one that never told anything moves the job on a rung."""
        step.kill()
        job.steps.remove(step)
        self.put(b"- " + step.key.encode())
        if job.steps:
            return
        now = time.monotonic()
        self.look_at = min(self.look_at, now + 1.0)  # the job may have ended
        if step.lines:
            job.attach_at = now + LOOK_SECONDS
            if job.tries >= MAX_STEPS:
                job.attach_at = now + RETRY_SECONDS
            return
        reason = "no answer in %.0f s" % ATTACH_SECONDS if late else step.reason()
        one_node = len(job.nodes) == 1
        job.rung += 2 if job.rung == 0 and one_node else 1
        if job.rung > 2:
            job.rung = 0
            job.attach_at = now + RETRY_SECONDS
            following = "the next try is in %.0f s" % RETRY_SECONDS
        else:
            job.attach_at = now
            following = ("one step a node", "without GPUs")[job.rung - 1]
        self.say("job %s: cannot attach (%s): %s" % (job.name, reason, following))

    # ---- endings ------------------------------------------------------------

    def ask_end(self, job: Job) -> None:
        """Ask Slurm once how a job ended; it remembers for some minutes."""
        command = ["scontrol", "show", "job", str(job.facts["raw"])]
        self.asking.append((job, Question(command)))

    def hear_ends(self) -> None:
        """Pass on how jobs ended: from scontrol, else from sacct."""
        for job, question in list(self.asking):
            if not question.ready():
                continue
            self.asking.remove((job, question))
            if question.command[0] == "scontrol":
                known = parse_scontrol(question.text())
                if question.error or "JobState" not in known:
                    command = ["sacct", "-X", "-P", "-n", "-j", str(job.facts["raw"])]
                    command += ["-o", "State,ExitCode,End"]
                    self.asking.append((job, Question(command)))
                    continue
                words = [
                    known["JobState"],
                    known.get("ExitCode", ""),
                    known.get("EndTime", ""),
                ]
                reason = known.get("Reason", "")
            else:
                words = (question.text().strip() + "||").split("|")[:3]
                reason = ""
            self.tell_end(job, words, reason)

    def tell_end(self, job: Job, words: List[str], reason: str) -> None:
        """Pass on a job's last facts."""
        state, code, end = words
        facts = dict(job.facts)
        facts.pop("reason", None)
        facts["state"] = state.split(" ")[0] or "UNKNOWN"
        if reason not in ("", "None"):
            facts["reason"] = reason
        if code:
            facts["exit"] = code
        moment = parse_time(end)
        if moment is not None:
            facts["end"] = moment
        job.facts = job.told = facts
        self.put(b"= " + json.dumps(facts).encode())

    def leave(self) -> None:
        """Let the agents say goodbye, then end what is left."""
        steps = [step for job in self.jobs.values() for step in job.steps]
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
        self.retry_at = 0.0
        self.trouble = ""

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
            self.hear(self.sock)
            self.sock.settimeout(WAIT_SECONDS)
            self.sock.sendall(pickle.dumps(message, protocol=4))
        except OSError as error:
            self.close()
            self.trouble = str(getattr(error, "strerror", "") or error)
            self.retry_at = time.monotonic() + BACKOFF_SECONDS
            return False
        return True

    @staticmethod
    def hear(sock: socket.socket) -> None:
        """Raise OSError if the master has hung up: its words come first."""
        sock.settimeout(0)
        try:
            answer = sock.recv(ANSWER_BYTES)
        except BlockingIOError:
            return
        words = answer.partition(b"error ")[2].decode("utf-8", "replace").strip()
        raise OSError(words or "it closed the connection")

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Relay:
    """Runs the herd, here or behind ssh, and speaks to the master for its agents."""

    def __init__(
        self, command: List[str], text: bytes, dial: Callable[[], Line]
    ) -> None:
        self.command = command
        self.text = text
        self.dial = dial
        self.lines: Dict[str, Line] = {}  # by the herd's key
        self.known: Dict[str, Sample] = {}  # what Slurm says, by raw id
        self.untold: Dict[str, Sample] = {}  # what of it the master has not heard yet
        self.refresh_at = 0.0
        self.said: Set[str] = set()
        self.signals: List[int] = []
        self.rest = b""

    def take(self, line: bytes) -> None:
        """Act on one line of the herd."""
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
        try:
            sample = json.loads(text.decode())
        except ValueError:
            return
        line = self.lines.get(key)
        if line is None:
            line = self.lines[key] = self.dial()
        if line.send(sample):
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
            begun = time.monotonic()
            status, words = self.run_herd(first)
            heard = bool(self.known or self.lines)
            for key in list(self.lines):
                self.end_step(key.rpartition(".")[0])
            if self.signals:
                break
            if first and not heard and status:
                log("error: %s" % (words or "the herd ended with %d" % status))
                return 1
            first = False
            if time.monotonic() - begun > RETRY_SECONDS / 10:
                backoff = BACKOFF_SECONDS
            log("%s: trying again in %.0f s" % (words or "the herd ended", backoff))
            self.pause(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        return 0

    def pause(self, seconds: float) -> None:
        """Wait so long, or for a signal."""
        until = time.monotonic() + seconds
        while not self.signals and time.monotonic() < until:
            time.sleep(0.1)

    def run_herd(self, first: bool) -> Tuple[int, str]:
        """Start the herd and serve it to its end: its exit status and last words."""
        import subprocess

        command = list(self.command)
        if command[0] == "ssh" and not first:
            command[1:1] = ["-o", "BatchMode=yes"]  # never ask for a password by itself
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
            if herd.stdout.fileno() in ready and not self.read_herd(herd):
                break
            self.pass_facts()
        self.end_herd(herd)
        words += read_pipe(herd.stderr)
        said = words.decode("utf-8", "replace").strip().splitlines()
        return herd.returncode, said[-1].strip() if said else ""

    def read_herd(self, herd: Any) -> bool:
        """Act on what the herd has printed; False at its end."""
        data = read_pipe(herd.stdout)
        if not data:
            return False
        lines = (self.rest + data).split(b"\n")
        self.rest = lines.pop()
        for line in lines:
            self.take(line)
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
    for name in (
        "SIGPIPE",
        "SIGXFSZ",
    ):  # Python ignores them; a program of another kind may not
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
    return run_agent(args)


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
    sys.exit(code)
