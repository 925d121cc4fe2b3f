#!/usr/bin/env python3
"""agent.py - tell the master of Cluster Sentinel how this node and your job are doing.

The promise: one file, Python 3.6 or newer, nothing to install, no root. It only reads, listens
nowhere, talks to one address and takes less than a thousandth of a core. Read it
before you run it: it is one file, in the order of the picture.

    /proc, /sys ------> parsers -> rates -> sample => link == pickles over TCP ==> master
    statvfs, nvidia-smi, squeue (may hang) --^  ^      ^  <== ok, error REASON ==
                                                '------'-- loop: every 2 s, on the beat

    python3 agent.py --host login                    watch until SIGINT or SIGTERM
    python3 agent.py --host login -- ./my_app args   run a command and watch while it runs
    python3 agent.py --once                          print one sample as JSON

Exit codes: 0 done or stopped, 1 failed, 2 bad usage; a command's own, 128+n by signal n, 127 none.
"""

import argparse
import contextlib
import getpass
import json
import math
import os
import pickle
import re
import select
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple, Union

VERSION = "1.0"
FIRST_SECONDS = 0.25  # the first sample covers so much time
SLOW_SECONDS = (
    10.0,
    60.0,
)  # between two rounds of what may hang; older results are unknown
SQUEUE_SECONDS = 300.0  # squeue is never asked twice within this time
WAIT_SECONDS = 5.0  # for a connection, a challenge, nvidia-smi or squeue
ANSWER_SECONDS = (
    10.0,
    60.0,
)  # without an ok for so long dial again; doubles till the first ok
BACKOFF_SECONDS = 1.0, 30.0  # from one dial to the next; doubles till the first ok
GOODBYE_SECONDS = 0.5  # for the master to take the goodbye
FILE_BYTES, ANSWER_BYTES, TEXT_BYTES = (
    65536,
    1024,
    255,
)  # read at most; the master's for texts
Value = Union[str, float]  # float stands for int and bool, too (PEP 484)
Sample = Dict[str, Value]  # what is unknown has no key
Reading = Iterable[Tuple[str, Value]]


# ---- Parsers: text in, values out; ValueError or LookupError for a text of another kind --------
NUMBERS = (  # key, file, pattern: proc(5), kernel doc accounting/psi.rst
    ("load1", "proc/loadavg", r"(\S+)"),  # 0.20 0.18 0.12 1/80 11206
    ("procs", "proc/loadavg", r"/(\d+)"),
    ("uptime", "proc/uptime", r"(\S+)"),  # 350735.47 234388.90
    (
        "psi_cpu",
        "proc/pressure/cpu",
        r"some avg10=(\S+)",
    ),  # some avg10=1.12 avg60=0.72 ...
    ("psi_mem", "proc/pressure/memory", r"some avg10=(\S+)"),
    ("psi_io", "proc/pressure/io", r"some avg10=(\S+)"),
)
COUNTERS = (  # keys, class, file, pattern (name, in, out), bytes: proc(5), iostats.rst
    # eth0: 171199307    3251    0    0    0     0          0         0   139424    1862    0 ...
    ("net_rx net_tx", "net", "proc/net/dev", r"(\S+): *(\d+)(?: +\d+){7} +(\d+)", 1),
    #  254       0 vda 31056 7269 1864882 11864 10381 6470 2203312 5835 0 8748 18356 ...
    (
        "disk_read disk_write",
        "block",
        "proc/diskstats",
        r" (\S+) \d+ \d+ (\d+) \d+ \d+ \d+ (\d+)",
        512,
    ),
)
TIME_LEFT = r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)$"  # 1-02:03:04 from squeue(1), %L
CPUS_PER_NODE = (
    r"(\d+)(?:\(x(\d+)\))?"  # 72(x2),36 in SLURM_JOB_CPUS_PER_NODE, sbatch(1)
)
# Controllers, path of the job: what is below uid_N (v1), slurmstepd.scope (v2), whatever its name
# 4:memory:/slurm_c1/uid_4242/job_1/step_0/task_0
# 0::/system.slice/slurmstepd.scope/job_1/step_0/user/task_0
JOB_CGROUP = re.compile(
    r"^\d+:([^:]*):(.*?(?:/uid_\d+|slurmstepd\.scope)/[^/\n]+)", re.M
)


def number(text: str, name: str) -> int:
    """Return the number behind the name that begins a line."""
    start = ("\n" + text).index("\n" + name) + len(name)
    return int(text[start : start + 30].split(None, 1)[0])


def parse_cpu(text: str) -> Tuple[int, int]:
    """Return (idle, total) ticks since boot from /proc/stat, proc(5); iowait is idle, too."""
    # cpu  84282 747 51842 1326541 1340 0 3204 17 412 0     (the guest's 412 are in user's, too)
    ticks = [int(word) for word in text[: text.index("\n")].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def parse_meminfo(text: str) -> Tuple[int, ...]:
    """Return (total, available, swap total, swap free) bytes from /proc/meminfo, proc(5)."""
    # MemTotal:       24684096 kB
    if "MemAvailable:" not in text:  # before Linux 3.14: the sum that free(1) took
        text += "\nMemAvailable: %d\n" % (
            sum(
                number(text, name)
                for name in ("MemFree:", "Buffers:", "Cached:", "SReclaimable:")
            )
            - number(text, "Shmem:")
        )
    return tuple(
        [
            number(text, name) * 1024
            for name in ("MemTotal:", "MemAvailable:", "SwapTotal:", "SwapFree:")
        ]
    )


def parse_gpus(text: str) -> Reading:
    """Yield gpus, gpu (mean percent busy) and gpu_mem (percent in use) from nvidia-smi's CSV."""
    # 35, 1024, 40960           [N/A] where the GPU does not tell
    rows = [line.split(", ") for line in text.splitlines() if line.count(", ") == 2]
    busy, used, total = (
        [int(row[n]) for row in rows if row[n].isdigit()] for n in range(3)
    )
    if rows:
        yield "gpus", len(rows)
    if busy:
        yield "gpu", round(sum(busy) / len(busy), 1)
    if total:
        yield "gpu_mem", round(100.0 * sum(used) / sum(total), 1)


# ---- Probe: the only door to files and commands ----------------------------------------------
class Probe:
    """Reads files named "proc/stat" or "sys/..."; each is opened once and read again in place."""

    def __init__(self, procfs: str = "/proc", sysfs: str = "/sys") -> None:
        self.roots = {"proc": procfs, "sys": sysfs}
        self.open_files: Dict[str, int] = {}

    def where(self, path: str) -> str:
        return self.roots[path.split("/")[0]] + path[path.index("/") :]

    def read(self, path: str, limit: int = FILE_BYTES) -> str:
        """Return up to `limit` bytes of a file; OSError if it cannot be read."""
        if path not in self.open_files:
            self.open_files[path] = os.open(self.where(path), os.O_RDONLY)
        text = chunk = os.pread(self.open_files[path], limit, 0)
        while chunk and len(text) < limit:  # /proc gives about a page at a time
            chunk = os.pread(self.open_files[path], limit - len(text), len(text))
            text += chunk
        return text.decode("utf-8", "replace")

    def names(self, path: str) -> List[str]:
        """Return the sorted names in a directory, none if there is no such directory."""
        with contextlib.suppress(OSError):
            return sorted(os.listdir(self.where(path)))
        return []

    def ask(self, command: str) -> str:
        """Return what a command prints within its time, nothing if there is no such command."""
        name, timed = command.split()[0], "timeout -k 1 %d %s" % (WAIT_SECONDS, command)
        if not any(
            os.access(os.path.join(path, name), os.X_OK) for path in os.get_exec_path()
        ):
            return ""
        with os.popen(timed + " </dev/null 2>/dev/null") as pipe:
            return str(pipe.read(FILE_BYTES))


class PsutilProbe(Probe):
    """The same door where there is no /proc: psutil's numbers in the words of proc(5)."""

    def read(self, path: str, limit: int = FILE_BYTES) -> str:
        import psutil

        times, ram, swap = (
            psutil.cpu_times(),
            psutil.virtual_memory(),
            psutil.swap_memory(),
        )
        ticks = (
            100 * (sum(times) - times.idle),
            100 * times.idle,
            "\ncpu" * (os.cpu_count() or 1),
        )
        kib = ram.total >> 10, ram.available >> 10, swap.total >> 10, swap.free >> 10
        return {
            "proc/stat": "cpu %d 0 0 %d 0 0 0 0%s\n" % ticks,
            "proc/meminfo": "MemTotal: %d\nMemAvailable: %d\nSwapTotal: %d\nSwapFree: %d"
            % kib,
            "proc/loadavg": "%f 0/%d" % (os.getloadavg()[0], len(psutil.pids())),
        }[path]


# ---- Rates: counters into change per second --------------------------------------------------
class Rates(Dict[str, Tuple[float, float]]):
    """Remembers each counter and the time it was read at, in monotonic seconds."""

    def change(self, key: str, counter: float, now: float) -> Reading:
        """Yield (key, change per second), nothing if it has just begun or went back."""
        then, self[key] = self.get(key), (counter, now)
        if then is not None and counter >= then[0] and now > then[1]:
            yield key, round((counter - then[0]) / (now - then[1]), 3)


# ---- Sample: all readings of one node at one instant, one reader a source --------------------
AMD_FILES = "gpu_busy_percent", "mem_info_vram_used", "mem_info_vram_total"
NVIDIA_SMI = (
    "nvidia-smi --query-gpu=utilization.gpu,memory.used,memory.total"
    " --format=csv,noheader,nounits"
)
CGROUP_1 = "memory", "limit_in_bytes", "total_rss ", "total_shmem ", "total_cache "
CGROUP_2 = (
    "",
    "max",
    "anon ",
    "shmem ",
    "file ",
)  # controller, limit, lines of memory.stat


def clip(text: str) -> str:
    """Return a text the master takes: UTF-8 of at most 255 bytes."""
    return text.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")


def collect(readers: Iterable[Callable[[], Reading]]) -> Sample:
    """Return all that the readers know; one that fails leaves out the rest of its keys."""
    known: Sample = {}
    for reader in readers:
        try:
            known.update(reader())
        except (
            OSError,
            ValueError,
            LookupError,
            ArithmeticError,
        ):  # unknown is no key, not zero
            pass
    return known


class Sampler:
    """Reads a Linux node: each reader yields (key, value), or raises what `collect` passes over."""

    def __init__(self, probe: Optional[Probe] = None, name: str = "") -> None:
        self.probe, self.rates, self.now, self.name = (
            probe or Probe(),
            Rates(),
            0.0,
            name,
        )
        self.slow: Tuple[float, Sample] = (
            -math.inf,
            {},
        )  # the last round: when, result
        self.end_time = float(os.environ.get("SLURM_JOB_END_TIME") or 0)
        self.asked = math.inf if self.end_time else -math.inf
        parse_meminfo(
            self.probe.read("proc/meminfo")
        )  # no node can do without these two
        text = self.probe.read("proc/stat")
        self.idle, self.total, self.percent = parse_cpu(text) + (0.0,)
        self.hardware = {kind: self.find_hardware(kind) for kind in ("net", "block")}
        self.job = collect(
            [self.find_job]
        )  # {controller: directory of the job's cgroup}
        self.fixed = collect([self.identify, self.find_job_cpus])
        self.fixed.update(cpus=text.count("\ncpu"), version=VERSION)
        self.readers = [
            self.read_cpu,
            self.read_memory,
            self.read_numbers,
            self.read_counters,
            self.read_job_cpu,
            self.read_job_memory,
            self.read_agent,
        ]
        self.slow_readers = [self.read_filesystems, self.read_time_left, self.read_gpus]
        self.sample()  # the first rates begin here

    def identify(self) -> Reading:
        environ, host = os.environ, socket.gethostname().split(".")[0]
        yield "node", clip(self.name or environ.get("SLURMD_NODENAME") or host)
        for key, variable in ("job", "SLURM_JOB_ID"), ("job_name", "SLURM_JOB_NAME"):
            if environ.get(variable):
                yield key, clip(environ[variable])
        yield "user", clip(getpass.getuser())  # KeyError, OSError: a uid without a name

    def find_hardware(self, kind: str) -> List[str]:
        """Return the devices of a class: bonds, bridges and partitions count again what they do."""
        parts = {
            name: self.probe.names("sys/class/%s/%s" % (kind, name))
            for name in self.probe.names("sys/class/" + kind)
        }
        return [name for name in parts if "device" in parts[name]] or [
            name for name in parts if kind == "net" and name != "lo"
        ]  # in a container

    def find_job(self) -> Reading:
        """Yield (controller, directory of the job's cgroup); v2 is the controller ""."""
        for controllers, path in JOB_CGROUP.findall(
            self.probe.read("proc/self/cgroup")
        ):
            for name in controllers.split(","):
                for mount in controllers, name or "unified":
                    if self.probe.names("sys/fs/cgroup/%s%s" % (mount, path)):
                        yield name, "sys/fs/cgroup/%s%s" % (mount, path)

    def find_job_cpus(self) -> Reading:
        groups = re.findall(CPUS_PER_NODE, os.environ["SLURM_JOB_CPUS_PER_NODE"])
        cpus = [int(each) for each, nodes in groups for _ in range(int(nodes or 1))]
        yield "job_cpus", cpus[int(os.environ.get("SLURM_NODEID") or 0)]

    def sample(self) -> Sample:
        """Return what is known now."""
        self.now, (then, slow) = time.monotonic(), self.slow
        fresh = slow if self.now - then < SLOW_SECONDS[1] else {}
        return dict(self.fixed, **collect(self.readers), **fresh)

    def refresh_for_ever(self) -> None:
        """Do the readings that may hang (a dead file server, a GPU's driver), on a thread."""
        while True:
            self.slow = time.monotonic(), collect(self.slow_readers)
            time.sleep(SLOW_SECONDS[0])

    def read_cpu(self) -> Reading:
        idle, total = parse_cpu(self.probe.read("proc/stat", 256))
        elapsed, idled = (
            total - self.total,
            max(0, idle - self.idle),
        )  # iowait may go back
        if elapsed > 0:
            self.percent = (
                (1000 * max(0, elapsed - idled) + elapsed // 2) // elapsed / 10
            )
        self.idle, self.total = idle, total
        yield "cpu", self.percent

    def read_memory(self) -> Reading:
        total, available, swap, unused = parse_meminfo(
            self.probe.read("proc/meminfo", 1024)
        )
        yield (
            "ram",
            (1000 * (total - available) + total // 2) // total / 10,
        )  # round() is slow
        yield "mem_total", total
        yield "mem_used", float(total - available)
        if swap:
            yield "swap", round(100.0 * (swap - unused) / swap, 1)

    def read_numbers(self) -> Reading:
        for key, path, pattern in NUMBERS:
            yield key, float(re.findall(pattern, self.probe.read(path))[0])

    def read_counters(self) -> Reading:
        for keys, kind, path, pattern, unit in COUNTERS:
            rows = [
                (int(into), int(out))
                for name, into, out in re.findall(pattern, self.probe.read(path))
                if name in self.hardware[kind]
            ]
            for key, column in zip(keys.split(), zip(*rows)):
                yield from self.rates.change(key, unit * sum(column), self.now)

    def read_job_cpu(self) -> Reading:
        v1 = "cpuacct" in self.job  # nanoseconds in v1, microseconds in v2
        path = (
            "%s/cpuacct.usage" % self.job["cpuacct"]
            if v1
            else "%s/cpu.stat" % self.job[""]
        )
        text = self.probe.read(path)
        used = int(text) / 1e9 if v1 else number(text, "usage_usec ") / 1e6
        share = 100.0 * used / float(self.fixed["job_cpus"])
        yield from self.rates.change("job_cpu", share, self.now)

    def read_job_memory(self) -> Reading:
        controller, limit, anonymous, shared, cache = (
            CGROUP_1 if "memory" in self.job else CGROUP_2
        )
        text = self.probe.read("%s/memory.stat" % self.job[controller])
        in_shared = (
            number(text, shared) if shared in text else 0
        )  # v1: since Linux 4.15
        used = number(text, anonymous) + in_shared
        yield "job_mem", float(used)
        yield "job_cache", float(number(text, cache) - in_shared)
        most = int(
            self.probe.read("%s/memory.%s" % (self.job[controller], limit))
        )  # or "max"
        if most < 2**60:  # v1 says 2 ** 63 - 4096 for no limit
            yield "job_mem_limit", most
            yield "job_ram", round(100.0 * used / most, 1)

    def read_agent(self) -> Reading:
        pages = int(self.probe.read("proc/self/statm").split()[1])
        yield "agent_rss", float(pages * os.sysconf("SC_PAGE_SIZE"))
        yield from self.rates.change("agent_cpu", 100.0 * time.process_time(), self.now)

    def read_time_left(self) -> Reading:
        if "job" in self.fixed and time.monotonic() - self.asked >= SQUEUE_SECONDS:
            self.asked = time.monotonic()  # seldom: sites forbid squeue in a loop
            left = re.findall(
                TIME_LEFT, self.probe.ask('squeue -h -j "$SLURM_JOB_ID" -o %L')
            )[0]
            self.end_time = time.time() + sum(
                int(part or 0) * unit for part, unit in zip(left, (86400, 3600, 60, 1))
            )
        if self.end_time:
            yield "job_time_left", max(0.0, round(self.end_time - time.time(), 1))

    def read_filesystems(self) -> Reading:
        for key, path in ("disk_tmp", "/tmp"), ("disk", "."):
            space = os.statvfs(path)
            used = space.f_blocks - space.f_bfree  # percent as df(1) has it
            yield key, round(100.0 * used / (used + space.f_bavail), 1)

    def read_gpus(self) -> Reading:
        cards = [
            "sys/class/drm/%s/device" % name
            for name in self.probe.names("sys/class/drm")
            if name.startswith("card")
        ]  # the renderD128 of a card is the same GPU
        texts = [
            ", ".join(
                self.probe.read("%s/%s" % (card, file)).strip() for file in AMD_FILES
            )
            for card in cards
            if AMD_FILES[0] in self.probe.names(card)
        ]
        return parse_gpus("\n".join(texts + [self.probe.ask(NVIDIA_SMI)]))


def get_system_stats(sampler: Optional[Sampler] = None) -> Sample:
    """Return one sample of the next 0.25 s, {'cpu': 15.5, 'ram': 40.2, ...}: percent, bytes, s."""
    sampler = sampler or Sampler()
    time.sleep(FIRST_SECONDS)
    return dict(sampler.sample(), **collect(sampler.slow_readers))


# ---- Link: dial, hear, send, dial again ------------------------------------------------------
def log(text: str, end: str = "\n") -> None:
    """Write a line to stderr, over the line before if that had another end (on a terminal)."""
    text = "".join(
        char if char.isprintable() else "?" for char in text
    )  # a peer may say it
    with contextlib.suppress(
        OSError, ValueError
    ):  # a log that nobody reads stops nothing
        start = ("\r\033[K" if sys.stderr.isatty() else "") + time.strftime("%H:%M:%S")
        print(
            "%s agent: %s%s" % (start, text, end), end="", file=sys.stderr, flush=True
        )


def prove(sock: socket.socket, secret: bytes) -> None:
    """Answer the master's challenge; OSError, and nothing is sent, if there is none."""
    import hmac

    line = b""
    with contextlib.suppress(socket.timeout):
        line = sock.makefile("rb", 0).readline(
            ANSWER_BYTES
        )  # 0: what follows is for `exchange`
    if not re.match(rb"challenge \S+\r?\n", line):
        raise OSError(
            line.decode("utf-8", "replace").strip()
            or "it asks for no secret: start the master with --secret-file, too"
        )
    proof = hmac.new(secret, line.split()[1], "sha256").hexdigest()
    sock.sendall(pickle.dumps({"auth": proof}, protocol=4))


class Link:
    """The connection to a candidate: dialled, up, lost (closed, refused, silent), dialled again."""

    def __init__(
        self, hosts: List[Tuple[str, int]], secret: bytes, interval: float
    ) -> None:
        self.candidates, self.secret, self.peer = hosts, secret, ""
        self.heard = self.retry_at = 0.0  # monotonic: the last ok, the next dial
        self.backoff, self.patience = (
            BACKOFF_SECONDS[0],
            max(ANSWER_SECONDS[0], 3 * interval),
        )
        self.sent, self.answered, self.ever_answered = 0, False, False
        self.sock: Optional[socket.socket] = None
        self.said: Set[str] = set()  # what is known since the last good link

    def dial(self, wake: int) -> None:
        """Call the candidate whose turn it is; on a thread, for name lookup cannot be hurried."""
        (host, port), sock = self.candidates[0], None
        self.peer = "%s:%d" % ("[%s]" % host if ":" in host else host, port)
        try:
            sock = socket.create_connection((host, port), WAIT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.secret:
                prove(sock, self.secret)
            sock.setblocking(False)
            self.heard, self.sock = time.monotonic(), sock
        except Exception as error:  # UnicodeError: no possible name
            self.lose("cannot reach", error, sock)
        os.write(wake, b"\0")

    def exchange(self, message: Optional[Sample] = None) -> None:
        """Hear what has come, then send a message; a link that fails is dialled again later."""
        if self.sock is None:
            return
        try:
            try:
                text = self.sock.recv(ANSWER_BYTES)
                if b"ok\n" in text:
                    self.heard, self.answered, self.ever_answered = (
                        time.monotonic(),
                        True,
                        True,
                    )
                if b"error " in text or not text:
                    raise OSError(
                        text.partition(b"error ")[2].decode("utf-8", "replace").strip()
                        or "it closed the connection"
                    )
            except BlockingIOError:  # no answer yet
                pass
            if time.monotonic() - self.heard > self.patience:
                self.sock.send(pickle.dumps({"bye": "reconnecting"}, protocol=4))
                raise OSError("no answer for %.0f s" % self.patience)
            packed = pickle.dumps(message, protocol=4)
            if message and self.sock.send(packed) < len(packed):
                raise OSError("it takes no more")
            self.sent += bool(message)
        except (OSError, ValueError) as error:
            self.lose("lost", error, self.sock)
        if self.answered or self.sent > 1:  # who takes the call may yet hang up at once
            self.say("connected to " + self.peer)

    def lose(self, event: str, error: Exception, sock: Optional[socket.socket]) -> None:
        """Hang up, say why, set the time of the next dial: spread, so that a crowd parts."""
        if sock is not None:
            sock.close()
        if self.answered or self.sent > 2:  # it was a good one
            self.backoff = BACKOFF_SECONDS[0]
            self.said.clear()
        if not self.answered:
            self.candidates.append(self.candidates.pop(0))
        if self.sent and not self.ever_answered:
            self.patience = max(
                self.patience, min(2 * self.patience, ANSWER_SECONDS[1])
            )
        self.sock, self.sent, self.answered = None, 0, False
        delay = self.backoff * (1 - os.urandom(1)[0] / 512) / len(self.candidates)
        self.backoff = min(2 * self.backoff, BACKOFF_SECONDS[1])
        self.retry_at = time.monotonic() + delay
        self.say(
            "%s the master at %s (%s)"
            % (event, self.peer, getattr(error, "strerror", "") or error),
            ": retrying in %.1f s" % delay,
        )

    def say(self, news: str, more: str = "") -> None:
        if news not in self.said:
            self.said.add(news)
            log(news + more)

    def close(self, farewell: Sample) -> None:
        """Send the goodbye and wait for the master to take it."""
        self.exchange(farewell)
        sock, self.sock = self.sock, None
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.settimeout(GOODBYE_SECONDS)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(
                    ANSWER_BYTES
                ):  # left unread it would turn the end into a RST
                    pass


# ---- Report: what a job used of what it asked for --------------------------------------------
class Report(Dict[str, Tuple[float, float, float]]):
    """Sums samples up, {key: (seconds, mean, peak)}; each has the weight of the time it covers."""

    def add(self, sample: Sample, seconds: float) -> None:
        """Count a sample that covers so many seconds."""
        for key in "cpu", "job_cpu", "mem_used", "job_mem", "gpu":
            if key in sample:
                value, (known, mean, peak) = (
                    float(sample[key]),
                    self.get(key, (0.0, 0.0, 0.0)),
                )
                mean += (value - mean) * seconds / (known + seconds)
                self[key] = known + seconds, mean, max(peak, value)

    def lines(self, last: Sample) -> Iterable[str]:
        """Yield the report for people, a line a subject."""
        cpu, job = (
            "job_cpu" if "job_cpu" in self else "cpu",
            "job_" if "job_mem" in self else "",
        )
        minutes, seconds = divmod(round(self["cpu"][0]), 60)
        yield "ran %d:%02d:%02d" % (minutes // 60, minutes % 60, seconds)
        yield "CPU mean %.1f %%, peak %.1f %% of %s%s CPUs" % (
            self[cpu][1:] + ("the node's " * (cpu == "cpu"), last.get(cpu + "s"))
        )
        peak = self["job_mem" if job else "mem_used"][2] / 2**30
        limit = float(last.get(job + "mem_limit", last.get("mem_total", 0))) / 2**30
        yield "memory peak %.3g GB of %s%.3g GB" % (
            peak,
            "" if job else "the node's ",
            limit,
        )
        if "gpu" in self:
            yield "GPU mean %.1f %% of %s" % (self["gpu"][1], last.get("gpus"))
        unit, name = (1.0, "G") if peak >= 1 else (0.1, "00M")
        need = math.ceil(1.2 * peak / unit)  # a fifth more than the peak
        if "job_mem_limit" in last and (
            need * unit < 0.8 * limit or peak > 0.9 * limit
        ):
            yield "asked for %.3g GB, peak %.3g GB: --mem=%d%s would do" % (
                limit,
                peak,
                need,
                name,
            )


# ---- Loop: wait, sample, send, on the beat ---------------------------------------------------
class Agent:
    """Binds sampler, link and command to the clock and the signals."""

    def __init__(self, args: argparse.Namespace, sampler: Sampler, link: Link) -> None:
        self.args, self.sampler, self.link, self.report = args, sampler, link, Report()
        self.ending, (self.awake, self.wake) = (
            "",
            os.pipe(),
        )  # signals, dialled links: wake
        os.set_blocking(self.wake, False)
        self.signals: List[int] = []
        self.command: Any = None

    def run(self) -> int:
        """Watch until a signal or the end of the command; return the exit code."""
        signal.set_wakeup_fd(self.wake)
        for name in (
            "SIGTERM",
            "SIGINT",
            "SIGHUP",
            "SIGQUIT",
            "SIGUSR1",
            "SIGUSR2",
            "SIGCHLD",
        ):
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN or name == "SIGINT":  # nohup
                signal.signal(number, lambda caught, _: self.signals.append(caught))
        if self.args.command:
            import subprocess

            self.command = subprocess.Popen(self.args.command, close_fds=False)
        try:
            self.watch()
            self.finish()
        except Exception as error:  # the command must not notice
            log("stopped watching: %r" % error)
        while self.command and self.command.poll() is None:
            self.wait(time.monotonic() + WAIT_SECONDS)
        code: int = self.command.returncode if self.command else int(not self.ending)
        return code if code >= 0 else 128 - code

    def watch(self) -> None:
        """Sample and send on the beat until the end."""
        threading.Thread(target=self.sampler.refresh_for_ever, daemon=True).start()
        beat = self.sampler.now + FIRST_SECONDS
        while not self.ending:
            now = time.monotonic()
            if now >= self.link.retry_at:
                self.link.retry_at = math.inf
                threading.Thread(
                    target=self.link.dial, args=(self.wake,), daemon=True
                ).start()
            if (
                self.link.sock is not None and not self.link.sent
            ):  # the master waits for it
                beat = min(beat, max(self.sampler.now + FIRST_SECONDS, now))
            if now >= beat:
                self.link.exchange(self.take())
                beat += self.args.interval * (1 + (now - beat) // self.args.interval)
            self.wait(min(beat, self.link.retry_at))

    def wait(self, until: float) -> None:
        """Sleep until then or a signal, a dialled link, the end of the master or of our reader."""
        poll = select.poll()
        poll.register(self.awake, select.POLLIN)
        if self.link.sock is not None:  # after the first ok only its end is urgent
            hangup = getattr(select, "POLLRDHUP", select.POLLIN)
            poll.register(
                self.link.sock, hangup if self.link.answered else select.POLLIN
            )
        if self.args.piped:
            poll.register(1, 0)
        ready = dict(poll.poll(max(0.0, until - time.monotonic()) * 1000))
        if self.awake in ready:
            os.read(self.awake, FILE_BYTES)
        elif 1 in ready:
            self.ending = "finished"
        elif ready:
            self.link.exchange()
        while self.signals:
            name = signal.Signals(self.signals.pop(0)).name
            typed = name in ("SIGINT", "SIGQUIT") and os.isatty(
                0
            )  # then the command has it, too
            if self.command and name != "SIGCHLD" and not typed:
                self.command.send_signal(getattr(signal, name))
            if (
                name == "SIGTERM"
                or not self.command
                and name in ("SIGINT", "SIGHUP", "SIGQUIT")
            ):
                self.ending = name
        code = self.command.poll() if self.command else None
        if code is not None:
            self.ending = "exit %d" % code if code >= 0 else signal.Signals(-code).name

    def take(self) -> Sample:
        """Take one sample, for the report, too, and show it."""
        before, sample = self.sampler.now, self.sampler.sample()
        self.report.add(sample, self.sampler.now - before)
        if self.args.verbose:
            log(repr(sample))
        elif self.args.live:
            log(
                "cpu %(cpu)s %%, ram %(ram)s %%, " % sample
                + ("acknowledged by " if self.link.answered else "no answer from ")
                + self.link.peer,
                end="",
            )
        return sample

    def finish(self) -> None:
        """Take a last sample, write the report and say goodbye."""
        last, farewell = self.take(), {"bye": self.ending}
        lines = list(self.report.lines(last))
        if self.command or self.args.report or "job" in last:
            farewell["report"] = clip("; ".join(lines))
            for line in lines:
                log("report of %s, %s: %s" % (last["node"], self.ending, line))
        log("goodbye: %s" % self.ending)
        self.link.close(dict(farewell))
        if self.args.report:
            with self.args.report as file:
                json.dump(
                    dict(last, ended=self.ending, text=lines, totals=self.report), file
                )


# ---- Command line ----------------------------------------------------------------------------
PORT = r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]"
HOST = (
    r"(?:\[([\w.:%%]+)\]|([\w.-]+))(?::(%s))?(?![^,])" % PORT
)  # login, [fe80::1%%ib0]:9
CHECKS = {  # flag: pattern, what it allows
    "host": (
        "%s(?:,%s)*" % (HOST, HOST),
        "HOST or HOST:PORT, IPv6 in [ ], commas between",
    ),
    "port": (PORT, "1 to 65535"),
    "interval": (
        r"0?\.[1-9]\d*|[1-9](\.\d*)?|[1-5]\d(\.\d*)?|60(\.0*)?",
        "0.1 to 60 seconds",
    ),
    "name": (
        r"(?=.*\S)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,63}",
        "1 to 63 printable characters",
    ),
}


def read_secret(path: str) -> bytes:
    """Return the secret in a file that only its owner can read; OSError with the cure."""
    with open(path, "rb") as file:
        secret, mode = file.read(FILE_BYTES).strip(), os.fstat(file.fileno()).st_mode
    if mode & 0o077 or not secret:
        raise OSError("%s is empty or others can read it: chmod 600 it" % path)
    return secret


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; the environment has defaults, for job scripts."""
    get = os.environ.get
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
        metavar="HOST[:PORT][,NEXT...]",
        default=get("SENTINEL_HOST") or "127.0.0.1",
        help="the master; several are tried in turn (SENTINEL_HOST)",
    )
    add(
        "--port",
        default=get("SENTINEL_PORT") or "13579",
        help="its port (SENTINEL_PORT, 13579)",
    )
    add(
        "--interval",
        default="2",
        metavar="SECONDS",
        help="from one sample to the next (2)",
    )
    add(
        "--name",
        metavar="NODE",
        help="what this node is called (SLURMD_NODENAME or hostname)",
    )
    add(
        "--secret-file",
        metavar="FILE",
        default=get("SENTINEL_SECRET_FILE"),
        help="the master's",
    )
    add("--procfs", metavar="DIR", default="/proc", help="where proc(5) is (/proc)")
    add("--sysfs", metavar="DIR", default="/sys", help="where sysfs(5) is (/sys)")
    add(
        "--report",
        metavar="FILE",
        help="write the end-of-job report there as JSON, too",
    )
    add("--once", action="store_true", help="print one sample as JSON and exit")
    add("--verbose", action="store_true", help="log each sample")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args, unknown = parser.parse_known_args(words[:cut])
    flags, args.command = " --".join(vars(args)).replace("_", "-"), words[cut + 1 :]
    if unknown or words[cut:] == ["--"] or args.once and args.command:
        parser.error(
            "%s; allowed: --%s, or -- and a COMMAND (not with --once)"
            % (" ".join(unknown + words[cut:]), flags)
        )
    for flag, (pattern, allowed) in CHECKS.items():
        text = getattr(args, flag)
        if text is not None and not re.match(r"(?:%s)\Z" % pattern, text):
            parser.error("--%s %r; allowed: %s" % (flag, text, allowed))
    args.interval = float(args.interval)
    args.piped = not (args.command or sys.stdout is None or sys.stdout.isatty())
    args.live = not args.command and sys.stderr is not None and sys.stderr.isatty()
    hosts = [
        (a or b, int(port or args.port)) for a, b, port in re.findall(HOST, args.host)
    ]
    try:
        secret = read_secret(args.secret_file) if args.secret_file else b""
        linux = sys.platform.startswith("linux")
        sampler = Sampler(
            (Probe if linux else PsutilProbe)(args.procfs, args.sysfs), args.name
        )
        sampler.fixed.update(interval=args.interval, ack=True)
        if args.once:
            print(json.dumps(get_system_stats(sampler)))
            return 0
        args.report = open(args.report, "w") if args.report else None
        return Agent(args, sampler, Link(hosts, secret, args.interval)).run()
    except ImportError:
        parser.exit(
            1,
            "error: off Linux it needs psutil: python3 -m pip install --user psutil\n",
        )
    except (OSError, ValueError, LookupError) as error:
        print("error: %s" % error, file=sys.stderr)
        if getattr(error, "filename", None) in args.command[:1]:
            return 127 if isinstance(error, FileNotFoundError) else 126
    return 1


if __name__ == "__main__":
    sys.exit(main())
