#!/usr/bin/env python3
"""bench.py measures what Cluster Sentinel costs, beside what others cost, on this machine.

    python3 tests/bench.py                      everything, three quarters of an hour
    python3 tests/bench.py --only page          one measurement (--list names them)
    python3 tests/bench.py --quick              2 minutes; exit 1 when a ratio is far over its bound

A table goes to stdout and every figure to a JSON file (bench.json here; --json names another).

The real tools and their peers run as processes on loopback, until they are steady. CPU is that of
whole process trees: utime and stime of /proc/PID/stat, taken from the same counter in nanoseconds
where the clock of a process can be read (clock_getcpuclockid(3)), and that of the children it
has reaped. Memory is PSS (/proc/PID/smaps_rollup). Two things that are compared run side by side,
or in turns when they would disturb each other, so that a busy machine slows both.

What a wake-up costs depends on the processor: a bare Python loop takes twice what a C loop takes
on one kind, and four times on another. So what wakes up every few seconds is judged beside a bare
loop of the same interpreter, in the same seconds, by the median of ten pairs or windows; and
--quick, which CI runs on any machine, judges ratios and counts only. All else is told without its
bound. Instructions are counted where valgrind is, and told.

What a measurement needs and does not find (gcc, nginx, prometheus, socat, iperf3, node_exporter,
collectd, valgrind) is named and skipped. Exit codes: 0 every bound holds (--quick: within a
third), 1 not, or a measurement failed, or with SENTINEL_TEST_ALL=1 it was skipped.
"""

# The rooms, from the top; a room uses only rooms above it.
#
#   rows           one figure, its bound, the table
#   promises       every figure that is measured: its unit and its bound
#   arithmetic     percentiles and fits
#   measuring      CPU, memory, a steady state, the machine
#   needs          programs, descriptors, ports
#   sink           what agents send to, and samples of a real agent
#   fleet          a master, and a load that is N agents
#   Prometheus     what the master is compared with
#   stage          one run, and the list of its benches
#   bare loops     the least that an interpreter can do, beside all that wakes up now and then
#   benches        of the agent, of agents in jobs, of the master, the herd, records, the page, the
#                  terminal, the bridge, of times, of other agents
#   command line   run them, write the figures, judge

import argparse
import collections
import contextlib
import fcntl
import gzip
import http.client
import json
import math
import mmap
import os
import pickle
import platform
import random
import resource
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time

import support  # before the tools: it knows where they are
import load
import master_server
import test_herd
from test_parts import IN_A_JOB, remove_cgroup
from test_terminal import open_terminal

INTERVAL = 2.0  # seconds between two samples, and between two scrapes
TOLERANCE = 4 / 3  # how far over its bound a row may be in --quick
PORTABLE_UNITS = ("x", "")  # a ratio and a count: their bounds hold on any machine
SAMPLES = 6  # samples of the real agent that the load takes in turn
SETTLE_LIMIT = 30.0  # seconds to become steady in
SETTLED = 0.2  # how far apart two windows of INTERVAL may be, of the larger ...
SETTLED_SHARE = 0.005  # ... or of a core
KEEPS_UP = 0.9  # the part of samples or scrapes that must have been done in time
OWN_VALUES = 5  # values that Prometheus adds to each target's, such as `up`
START_LIMIT = 90.0  # seconds for 10,000 agents to be connected and answered
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
KIB, MIB = 1024.0, 1024.0**2
FOLDER = os.path.dirname(os.path.abspath(__file__))
PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"


# ==========================================================================================
# Rows: one figure, its bound, the table
# ==========================================================================================


class Row(collections.namedtuple("Row", "what value unit bound sense note")):
    """One figure. bound is None for one that is only told; sense says which side is good."""

    @property
    def holds(self):
        """Is it within its bound? None without one."""
        return None if self.bound is None else self.within(1.0)

    def within(self, tolerance):
        """Is the value within the bound, or over it by less than that factor?"""
        if self.bound is None:
            return True
        if self.sense == "<=":
            return self.value <= self.bound * tolerance
        return self.value * tolerance >= self.bound

    @property
    def portable(self):
        """Is it a ratio or a count, which no processor changes?"""
        return self.unit in PORTABLE_UNITS

    def only_told(self):
        """The same figure without its bound."""
        return self._replace(bound=None, sense="")

    def cells(self):
        """The table's columns: what, measured, bound, holds."""
        measured = show(self.value, self.unit) + (
            " (%s)" % self.note if self.note else ""
        )
        if self.bound is None:
            return self.what, measured, "", ""
        return (
            self.what,
            measured,
            "%s %s" % (self.sense, show(self.bound, self.unit)),
            "yes" if self.holds else "NO",
        )


def at_most(what, value, unit, bound, note=""):
    return Row(what, value, unit, bound, "<=", note)


def at_least(what, value, unit, bound, note=""):
    return Row(what, value, unit, bound, ">=", note)


def told(what, value, unit, note=""):
    return Row(what, value, unit, None, "", note)


def show(value, unit):
    """A value with three digits that count, and its unit."""
    digits = (
        0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    )
    if 0 < abs(value) < 0.1:
        digits = 1 - math.floor(math.log10(abs(value)))
    return ("%.*f %s" % (digits, value, unit)).strip()


def render_table(rows):
    """A Markdown table that can be read as it is."""
    lines = [("what", "measured", "bound", "holds")] + [row.cells() for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| %s |" % " | ".join(cell.ljust(width) for cell, width in zip(line, widths))
        for line in lines
    )


# ==========================================================================================
# Promises: every figure that is measured, its unit, and the bound that it is to keep
# ==========================================================================================


# key: what is measured, unit, which side is good, bound; without the last two it is only told
PROMISES = {
    # the agent
    # 1.5 to 2.05 on one machine, as what ran in between has left its pages in the caches or not:
    # a bound of 1.8 flipped with the neighbours.  What it does is bounded by its instructions
    "agent / bare loop": (
        "agent, cpu and ram only: CPU per sample / bare loop",
        "x",
        "<=",
        2.2,
    ),
    "whole agent / bare loop": (
        "agent, everything on: CPU per sample / bare loop",
        "x",
        "<=",
        4,
    ),
    "agent / C loop": ("agent, cpu and ram only: CPU per sample / C loop", "x"),
    "agent's CPU": ("agent, everything on, every 2 s: CPU", "% of a core", "<=", 0.06),
    "agent's memory": ("agent, everything on: memory (PSS)", "MiB", "<=", 16),
    "agent: instructions": (
        "agent, cpu and ram only: instructions a sample",
        "thousand",
    ),
    "whole agent: instructions": (
        "agent, everything on: instructions a sample",
        "thousand",
    ),
    "bare loop: instructions": ("bare loop: instructions a sample", "thousand"),
    "agent: instructions / bare loop": (
        "agent, cpu and ram only: instructions a sample / bare loop",
        "x",
        "<=",
        7,
    ),
    "C loop: instructions": ("C loop: instructions a sample", "thousand"),
    # the agent in a job
    "8 ranks: CPU": ("agent, a job of 8 processes: CPU", "% of a core"),
    "8 ranks / bare loop": ("agent, a job of 8 processes: CPU / bare loop", "x"),
    "256 ranks: CPU": (
        "agent, a job of 256 processes: CPU",
        "% of a core",
        "<=",
        0.3,
    ),
    "256 ranks / bare loop": (
        "agent, a job of 256 processes: CPU / bare loop",
        "x",
        "<=",
        15,
    ),
    "8 GPUs: CPU": ("agent, 8 GPUs (stand-in for NVML): CPU", "% of a core"),
    "8 GPUs / bare loop": (
        "agent, 8 GPUs (stand-in for NVML): CPU / bare loop",
        "x",
    ),
    "slower: spin": (
        "a job that spins on every CPU takes longer with an agent",
        "%",
        "<=",
        0.2,
    ),
    "slower: stream": (
        "a job that streams memory on every CPU takes longer with an agent",
        "%",
        "<=",
        0.2,
    ),
    # the herd and the relay, 10 jobs of 4 nodes
    "herd: CPU": ("herd, 10 jobs x 4 nodes: CPU", "% of a core", "<=", 0.1),
    "herd / bare loop": ("herd, 10 jobs x 4 nodes: CPU / bare loop", "x", "<=", 5),
    "herd: memory": ("herd, 10 jobs x 4 nodes: memory (PSS)", "MiB", "<=", 25),
    "questions: CPU": ("herd's squeue and scontrol (stand-ins): CPU", "% of a core"),
    "sruns: CPU": ("herd's 10 sruns (stand-ins): CPU", "% of a core"),
    "sruns: memory": ("herd's 10 sruns (stand-ins): memory (PSS)", "MiB"),
    "relay: CPU": ("relay, 10 jobs x 4 nodes: CPU", "% of a core"),
    "relay / bare loop": ("relay, 10 jobs x 4 nodes: CPU / bare loop", "x"),
    "relay: memory": ("relay, 10 jobs x 4 nodes: memory (PSS)", "MiB"),
    # the master, nobody watching
    "empty master": ("master, no agents: CPU", "% of a core", "<=", 0.1),
    "empty master / Prometheus": (
        "master, no agents: CPU / Prometheus without targets",
        "x",
        "<=",
        0.15,
    ),
    "20 agents": ("master, 20 agents at 2 s: CPU", "% of a core"),
    # 0.3 % of a core on a machine where 1,000 agents took 7 %, and Prometheus with 200 targets
    # as much: the master of 1,000 agents takes less now, and is no measure of a machine any more
    "20 agents / Prometheus": (
        "master, 20 agents at 2 s: CPU / Prometheus with 200 targets",
        "x",
        "<=",
        0.3 / 7,
    ),
    "200 even: CPU": (
        "master, 200 agents at 2 s, even: CPU / Prometheus",
        "x",
        "<=",
        0.25,
    ),
    "200 even: memory": ("master, 200 agents at 2 s, even: memory / Prometheus", "x"),
    "200 burst: CPU": (
        "master, 200 agents at 2 s, burst: CPU / Prometheus",
        "x",
        "<=",
        0.25,
    ),
    "1000 even: CPU": ("master, 1,000 agents at 2 s, even: CPU / Prometheus", "x"),
    "1000 even: memory": (
        "master, 1,000 agents at 2 s, even: memory / Prometheus",
        "x",
    ),
    "1000 burst: CPU": ("master, 1,000 agents at 2 s, burst: CPU / Prometheus", "x"),
    "1000 in jobs: CPU": (
        "master, 1,000 nodes of 50 jobs with ranks and GPUs, at 2 s: CPU",
        "% of a core",
    ),
    "5000 even: CPU": (
        "master, 5,000 agents at 2 s, even: CPU / Prometheus",
        "x",
        "<=",
        0.25,
    ),
    "5000 even: memory": (
        "master, 5,000 agents at 2 s, even: memory / Prometheus",
        "x",
        "<=",
        0.25,
    ),
    "5000 burst: CPU": (
        "master, 5,000 agents at 2 s, burst: CPU / Prometheus",
        "x",
        "<=",
        0.25,
    ),
    "10000: memory": (
        "master, 10,000 agents: memory (PSS) an agent",
        "KiB",
        "<=",
        32,
    ),
    "10000 even: CPU": (
        "master, 10,000 agents at 2 s, even: CPU",
        "% of a core",
        "<=",
        40,
    ),
    "10000 even: lost": (
        "master, 10,000 agents at 2 s, even: false lost in 60 s",
        "",
        "<=",
        0,
    ),
    "10000 burst: CPU": (
        "master, 10,000 agents at 2 s, burst: CPU",
        "% of a core",
        "<=",
        40,
    ),
    "10000 burst: lost": (
        "master, 10,000 agents at 2 s, burst: false lost in 60 s",
        "",
        "<=",
        0,
    ),
    "growth: CPU": (
        "growth of the master's CPU with 200 to 10,000 agents: exponent",
        "",
    ),
    "growth: memory": (
        "growth of the master's memory with 200 to 10,000 agents: exponent",
        "",
    ),
    "growth: size": (
        "growth of the page's size with 200 to 10,000 agents: exponent",
        "",
    ),
    "growth: time": (
        "growth of the page's time with 200 to 10,000 agents: exponent",
        "",
    ),
    "growth: page by jobs": (
        "growth of the page's time with 1 to 100 jobs of 100 nodes: exponent",
        "",
    ),
    "growth: API by jobs": (
        "growth of /api/jobs' time with 1 to 100 jobs of 100 nodes: exponent",
        "",
    ),
    "growth: page by nodes": (
        "growth of the page's time with 100 jobs of 1 to 100 nodes: exponent",
        "",
    ),
    "growth: API by nodes": (
        "growth of /api/jobs' time with 100 jobs of 1 to 100 nodes: exponent",
        "",
    ),
    "growth: /jobs by records": (
        "growth of /jobs' time with 10 to 10,000 records: exponent",
        "",
    ),
    "growth: first /jobs by records": (
        "growth of the time of the first /jobs with 10 to 10,000 records: exponent",
        "",
    ),
    # the page
    "page": (
        "page of 1,000 nodes while 1,000 agents send: p99",
        "ms",
        "<=",
        60,
    ),
    "terminal: CPU": ("terminal, 1,000 nodes: CPU", "% of a core", "<=", 2),
    "terminal / bare loop": ("terminal, 1,000 nodes: CPU / bare loop", "x", "<=", 100),
    "terminal: memory": ("terminal, 1,000 nodes: memory (PSS)", "MiB"),
    "job page": (
        "/job/ID of 64 nodes that send: p99",
        "ms",
        "<=",
        100,
    ),
    "record page": (
        "/record/ID of 24 h x 64 nodes, that runs: p99",
        "ms",
        "<=",
        100,
    ),
    "past job page": (
        "/job/ID of 24 h x 64 nodes, that has ended: p99",
        "ms",
        "<=",
        100,
    ),
    "first past job page": (
        "/job/ID of 24 h x 64 nodes, that has ended: the first time",
        "ms",
    ),
    "/jobs": ("/jobs of 1,000 records: p99", "ms", "<=", 100),
    "first /jobs": ("/jobs of 1,000 records: the first time", "ms"),
    # the recorder, 200 nodes in 10 jobs
    "recorder: CPU": ("recorder, 200 nodes: CPU", "% of a core", "<=", 0.2),
    "recorder / bare loop": ("recorder, 200 nodes: CPU / bare loop", "x", "<=", 10),
    "recorder: memory": ("recorder, 200 nodes: memory (PSS)", "MiB"),
    "record: size": (
        "records of jobs of 20 nodes that take a day: a node and day",
        "MiB",
        "<=",
        2,
    ),
    "record of one node: size": (
        "records of a job of one node that takes a day: a node and day",
        "MiB",
        "<=",
        2,
    ),
    "lock: a sample": (
        "the table's lock, 1,000 agents, held while a sample is written: p99.9",
        "ms",
        "<=",
        1,
    ),
    "lock: a copy": (
        "the table's lock, 1,000 agents, held while all of it is copied: p90",
        "ms",
        "<=",
        1,
    ),
    # the bridge
    "1 stream": ("bridge, 1 stream: throughput / socat", "x", ">=", 1.5),
    "50 streams": ("bridge, 50 streams: throughput / socat", "x"),
    "idle bridge": ("bridge, 1,000 idle agents: CPU", "% of a core", "<=", 0.1),
    "busy bridge": ("bridge, 1,000 agents at 2 s: CPU", "% of a core"),
    # time
    "detection": (
        "a killed node leaves the table after its last sample: worst of 20",
        "s",
        "<=",
        5.5,
    ),
    "start": ("from `python3 master_server.py` to a served page", "ms"),
    # other agents
    "node_exporter: CPU": ("agent, everything on: CPU / node_exporter", "x"),
    "node_exporter: memory": ("agent, everything on: memory / node_exporter", "x"),
    "collectd: CPU": ("agent, everything on: CPU / collectd", "x"),
    "collectd: memory": ("agent, everything on: memory / collectd", "x"),
}


def figure(key, value, note=""):
    """The row of what a bench has measured."""
    what, unit, *promise = PROMISES[key]
    sense, bound = promise or ("", None)
    return Row(what, value, unit, bound, sense, note)


# ==========================================================================================
# Arithmetic: percentiles and fits
# ==========================================================================================


def percentile(values, percent):
    """The smallest value that so many percent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100.0) - 1)]


def fit_slope(points):
    """The slope of the least-squares line through [(x, y)]."""
    x, y = (statistics.mean(column) for column in zip(*points))
    return sum((a - x) * (b - y) for a, b in points) / sum(
        (a - x) ** 2 for a, _ in points
    )


def fit_exponent(points):
    """The exponent k of the least-squares fit cost = c * n ** k through [(n, cost)], by logs."""
    return fit_slope([(math.log(n), math.log(cost)) for n, cost in points])


# ==========================================================================================
# Measuring: CPU, memory, a steady state, the machine
# ==========================================================================================


def stat_seconds(pid):
    """CPU seconds so far of one process, and of the children that it has reaped."""
    with open("/proc/%d/stat" % pid) as file:
        words = file.read().rpartition(")")[2].split()[11:15]
    user, system, reaped_user, reaped_system = (int(word) for word in words)
    return (user + system) / CLOCK_TICKS, (reaped_user + reaped_system) / CLOCK_TICKS


def own_seconds(pid):
    """CPU seconds so far of one process alone."""
    clock = (~pid << 3) | 2  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
    try:
        return time.clock_gettime(clock)
    except OSError:
        return stat_seconds(pid)[0]


def reaped_seconds(pid):
    """CPU seconds of the children that a process has waited for; counted in ticks."""
    return stat_seconds(pid)[1]


def cpu_seconds(*pids):
    """CPU seconds so far of the processes, their descendants, and the children they reaped."""
    total = 0.0
    for pid in pids:
        total += own_seconds(pid) + reaped_seconds(pid)
        for each in support.descendants(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += own_seconds(each) + reaped_seconds(each)
    return total


def own_memory(pid, part="Pss"):
    """Bytes of one process: its proportional set size, or another of smaps_rollup, proc(5)."""
    with open("/proc/%d/smaps_rollup" % pid) as file:
        words = file.read().split()
    return int(words[words.index(part + ":") + 1]) * 1024


def pss_bytes(*pids):
    """Proportional set size of the processes and all their descendants."""
    return sum(
        own_memory(each) for pid in pids for each in [pid] + support.descendants(pid)
    )


def cpu_share(seconds, *groups):
    """The share of one core that each group of pids takes, over the same so many seconds."""
    start, before = time.monotonic(), [cpu_seconds(*pids) for pids in groups]
    time.sleep(seconds)
    after, end = [cpu_seconds(*pids) for pids in groups], time.monotonic()
    return [(late - early) / (end - start) for early, late in zip(before, after)]


def settle(*pids):
    """Wait until two windows in a row show the same CPU share; say so if that never happens."""
    deadline, shares = time.monotonic() + SETTLE_LIMIT, []
    while time.monotonic() < deadline:
        shares = shares[-1:] + cpu_share(INTERVAL, pids)
        if len(shares) == 2 and (
            max(shares) - min(shares) <= max(SETTLED * max(shares), SETTLED_SHARE)
        ):
            return
    print(
        "  not steady after %g s: %s of a core" % (SETTLE_LIMIT, shares),
        file=sys.stderr,
    )


def busy_share(seconds=1.0):
    """The share of all cores that was busy for that long: how quiet is this machine?"""

    def look():
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    idle, total = look()
    time.sleep(seconds)
    later = look()
    return 1.0 - (later[0] - idle) / max(1, later[1] - total)


MACHINE = (
    "%(cores)d cores of %(cpu)s, Linux %(kernel)s, Python %(python)s, commit %(commit)s,"
    " %(time)s"
)


def describe_machine():
    """What the figures depend on."""
    with open("/proc/cpuinfo") as file:
        models = [
            line.partition(":")[2].strip()
            for line in file
            if line.startswith("model name")
        ]
    commit = (
        subprocess.run(
            ["git", "-C", FOLDER, "rev-parse", "--short", "HEAD"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        ).stdout
        if shutil.which("git")
        else b""
    )
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.decode().strip() or "unknown",
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "busy_before": round(busy_share(), 3),
    }


# ==========================================================================================
# Needs: programs, descriptors, ports
# ==========================================================================================


class Missing(Exception):
    """What a measurement needs is not here; the text names it."""


def need(*names):
    """The path of the first of these commands that is here; Missing when none is."""
    for name in names:
        path = shutil.which(name, path=PATH)
        if path:
            return path
    raise Missing(names[0])


def need_descriptors(count):
    """Have so many for this process and what it starts; Missing when the system allows fewer."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
        except (ValueError, OSError):
            raise Missing("%d file descriptors (ulimit -n)" % count) from None


def free_port():
    return support.closed_port()


def listens(port):
    """Does something listen on that port of loopback?  Found out without a connection to it."""
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file]
    return any(row[3] == "0A" and row[1].endswith(":%04X" % port) for row in rows[1:])


def run_peer(*command):
    """Start a program that is none of ours; like a tool, it ends with this process."""
    return support.Tool([str(word) for word in command], dict(os.environ, PATH=PATH))


def fetch(port, path="/", seconds=10):
    """(status, body, seconds it took) of one GET."""
    start = time.monotonic()
    connection = http.client.HTTPConnection(support.HOST, port, timeout=seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return response.status, body, time.monotonic() - start
    finally:
        connection.close()


# ==========================================================================================
# Sink: what agents send to, and samples of a real agent
# ==========================================================================================


class Sink:
    """Answers "ok" to whatever comes and counts it, on a thread.

    .port is its first port, .ports are all of them; .count is the number of messages,
    .counts[port] that of one port.  With `parts` it says that it takes these, too.
    """

    def __init__(self, ports=1, parts=False):
        self.said = b"ok parts\nok\n" if parts else b"ok\n"
        self.listeners = set()
        self.socks = set()
        self.ports = []
        self.counts = collections.Counter()
        self.stopping = False
        self.selector = selectors.DefaultSelector()
        for _ in range(ports):
            self.listen()
        self.port = self.ports[0]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @property
    def count(self):
        return sum(self.counts.values())

    def listen(self):
        listener = socket.create_server((support.HOST, 0), backlog=1024)
        port = listener.getsockname()[1]
        self.listeners.add(listener)
        self.ports.append(port)
        self.counts[port] = 0
        self.selector.register(listener, selectors.EVENT_READ, port)

    def run(self):
        while not self.stopping:
            for key, _ in self.selector.select(0.2):
                if key.fileobj in self.listeners:
                    self.accept(key.fileobj, key.data)
                else:
                    self.answer(key.fileobj, key.data)

    def accept(self, listener, port):
        sock = listener.accept()[0]
        self.socks.add(sock)
        self.selector.register(sock, selectors.EVENT_READ, port)

    def answer(self, sock, port):
        try:
            if sock.recv(65536):
                self.counts[port] += 1
                sock.send(self.said)
                return
        except OSError:
            pass
        self.selector.unregister(sock)
        self.socks.discard(sock)
        sock.close()

    def close(self):
        self.stopping = True
        self.thread.join()
        for sock in self.socks | self.listeners:
            sock.close()
        self.selector.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


JOB_VALUES = {  # what an agent tells more where there are a job's cgroup and GPUs
    "job_name": "train",
    "job_cpu": 87.5,
    "job_mem": 9.5e9,
    "job_mem_limit": 64e9,
    "job_ram": 14.8,
    "job_cpus": 16.0,
    "job_time_left": 50000.0,
    "job_time_limit": 86400.0,
    "gpus": 4,
    "gpu": 91.25,
    "gpu_min": 88.0,
    "gpu_mem": 47.5,
}
RANKS_OF_A_NODE, GPUS_OF_A_NODE = 8, 4
LOOKS = 16  # different ones


def some_look(number):
    """What an agent tells of a node with eight ranks and four GPUs: a list of parts."""
    ranks = RANKS_OF_A_NODE
    parts = [{"part": "look", "look": number, "processes": ranks, "shown": ranks}]
    parts[0]["cpus"] = "0-15"
    parts.append({"part": "core", "first": 0, "busy": "9898989898989898"})
    for rank in range(ranks):
        parts.append(
            {
                "part": "rank",
                "pid": 40000 + rank,
                "rank": rank,
                "local_rank": rank,
                "step": "0",
                "program": "python3",
                "cpu": 180.0 + number + rank,
                "mem": 1.2e9 + 1e6 * number,
                "peak": 1.5e9,
                "threads": 9,
                "running": 2,
                "cpus": "%d-%d" % (2 * rank, 2 * rank + 1),
                "on": "%d" % (2 * rank),
                "state": "R",
                "read": 1e5,
                "write": 2e4,
                "read_total": 1e9 + 1e6 * number,
                "write_total": 2e8,
                "gpu": "%d" % (rank // 2),
            }
        )
    for index in range(GPUS_OF_A_NODE):
        parts.append(
            {
                "part": "gpu",
                "index": index,
                "uuid": "GPU-%08d-0000-0000-0000-000000000000" % index,
                "name": "NVIDIA A100-SXM4-80GB",
                "gpu": 90 + (number + index) % 10,
                "mem_used": 3.8e10 + 1e7 * number,
                "mem_total": 8.5e10,
                "power": 310.5 + number,
                "power_limit": 400,
                "temp": 61,
                "processes": 2,
            }
        )
    return parts


def record_samples(count=SAMPLES):
    """Samples that a real agent sent on this machine, dicts; they announce INTERVAL."""
    with socket.create_server((support.HOST, 0)) as listener:
        listener.settimeout(support.PATIENCE)
        with support.start(
            "agent.py", "--port", listener.getsockname()[1], "--interval", "0.5"
        ):
            sock = listener.accept()[0]
            sock.settimeout(support.PATIENCE)
            with sock, sock.makefile("rb") as stream:
                samples = []
                for _ in range(count):
                    samples.append(dict(pickle.load(stream), interval=INTERVAL))
                    sock.sendall(b"ok\n")
    return samples[1:]  # the first has no rates yet


# ==========================================================================================
# Fleet: a master, and a load that is N agents
# ==========================================================================================


class Fleet:
    """A master with N agents that send; entered, it is steady.

    before_load, if it is set, is called when master and bridge are there and no agent is.
    """

    before_load = None

    def __init__(
        self,
        stage,
        count,
        pace="even",
        bridge=False,
        patch="",
        churn=0,
        jobs=0,
        looks=True,
        flags=(),
    ):
        """jobs: so many have the agents as nodes; looks: and these tell of ranks and GPUs.

        flags: of the master.
        """
        need_descriptors(count * (2 if bridge else 1) + 200)
        self.count = count
        self.options = ["--pace", pace, "--churn", churn]
        if jobs:
            samples, file_of_looks = stage.job_files()
            self.options += ["--samples", samples, "--jobs", jobs]
            if looks:
                self.options += ["--looks", file_of_looks]
        else:
            self.options += ["--samples", stage.samples_file()]
        self.bridged, self.patch, self.flags = bridge, patch, flags
        self.most = (
            count - 2 * INTERVAL * churn
        )  # at once: who is replaced comes when due

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with self.stack:
            self.start()
            self.stack = self.stack.pop_all()
        return self

    def start(self):
        self.master = support.start_master(
            "--max-agents", self.count + 100, *self.flags, patch=self.patch
        )
        self.stack.callback(self.master.kill)
        (self.empty_share,) = cpu_share(INTERVAL, [self.master.pid])
        self.empty_pss = pss_bytes(self.master.pid)
        port, self.bridge = self.master.port, None
        if self.bridged:
            self.bridge = self.stack.enter_context(start_bridge(port))
            port = self.bridge.port
        if self.before_load:
            self.before_load()
        self.load = support.start("tests/load.py", port, self.count, *self.options)
        self.stack.callback(self.load.kill)
        support.eventually(
            lambda: self.report()["agents"] >= self.most, START_LIMIT, "connect"
        )
        support.eventually(
            lambda: (
                self.done_since(self.report(), 2 * INTERVAL)["answered"]
                >= KEEPS_UP * self.most / self.count
            ),
            START_LIMIT,
            "answers in time",
        )
        settle(self.master.pid)

    def report(self):
        """What load.py said last."""
        return json.loads(self.load.out.strip().rpartition("\n")[2])

    def done_since(self, before, wait=0.0):
        """{"sent": part of the samples that were due since that report, "answered": likewise}."""
        time.sleep(wait)
        now = self.report()
        due = self.count * max(1.0, now["time"] - before["time"]) / INTERVAL
        return {key: (now[key] - before[key]) / due for key in ("sent", "answered")}

    def __exit__(self, *_):
        self.master.stop()  # first, or it would tell of every agent that it is lost
        self.stack.close()


def role_of(master, name):
    """The pid of one of a master's processes, as it has logged it."""
    return int(master.logged(r"%s started, pid (\d+)" % name).group(1))


def start_bridge(port):
    """A running port_forward.py to that port: .port is its own."""
    bridge = support.start(
        "port_forward.py",
        "--host",
        support.HOST,
        "--local-port",
        0,
        "--remote-port",
        port,
    )
    bridge.port = bridge.listening()
    return bridge


# ==========================================================================================
# Prometheus: what the master is compared with, and the targets that it scrapes
# ==========================================================================================

NGINX = """
daemon off; master_process off; pid %(folder)s/nginx.pid; error_log %(folder)s/error.log crit;
worker_rlimit_nofile 8192;
events { worker_connections 4096; }
http { access_log off; default_type text/plain; keepalive_requests 1000000;
       client_body_temp_path %(folder)s; proxy_temp_path %(folder)s;
       fastcgi_temp_path %(folder)s; uwsgi_temp_path %(folder)s; scgi_temp_path %(folder)s;
       server { listen 127.0.0.1:%(port)d; root %(folder)s/www; } }
"""
PROMETHEUS = """
global: { scrape_interval: %(interval)gs, scrape_timeout: %(interval)gs }
scrape_configs:
  - job_name: sentinel
    file_sd_configs: [ files: [ "%(folder)s/targets.json" ] ]
"""


class Prometheus:
    """Prometheus scraping N targets with as many values as a sample has; entered, it is steady.

    nginx serves the targets: one file, rewritten every second with the values of another sample.
    All of it is in Prometheus's favour: no HELP, no labels, few connections, a young database.
    """

    def __init__(self, stage, count):
        self.count, self.samples = count, stage.samples()
        self.programs = need("prometheus"), need("nginx")
        self.values = len(exposition(self.samples[0]).splitlines())
        self.round = count * (
            self.values + OWN_VALUES
        )  # what it stores when it has seen all

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with self.stack:
            self.start(self.stack.enter_context(tempfile.TemporaryDirectory()))
            self.stack = self.stack.pop_all()
        return self

    def start(self, folder):
        prometheus, nginx = self.programs
        port, self.port = free_port(), free_port()
        self.stop_writing = threading.Event()
        os.mkdir(folder + "/www")
        writer = threading.Thread(target=self.write_values, args=(folder,))
        writer.start()
        self.stack.callback(writer.join)
        self.stack.callback(self.stop_writing.set)
        targets = [
            {
                "targets": ["%s:%d" % (support.HOST, port)],
                "labels": {"instance": "node-%05d" % i},
            }
            for i in range(self.count)
        ]
        facts = {"folder": folder, "port": port, "interval": INTERVAL}
        for name, text in (
            ("nginx.conf", NGINX % facts),
            ("prometheus.yml", PROMETHEUS % facts),
            ("targets.json", json.dumps(targets)),
        ):
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        self.nginx = self.stack.enter_context(
            run_peer(nginx, "-p", folder, "-c", folder + "/nginx.conf")
        )
        self.tool = self.stack.enter_context(
            run_peer(
                prometheus,
                "--config.file",
                folder + "/prometheus.yml",
                "--storage.tsdb.path",
                folder + "/data",
                "--web.listen-address",
                "%s:%d" % (support.HOST, self.port),
                "--log.level",
                "error",
            )
        )
        support.eventually(
            lambda: self.scraped() >= 2 * self.round, START_LIMIT, "scrapes"
        )
        settle(self.tool.pid)

    def write_values(self, folder):
        turn = 0
        while not self.stop_writing.is_set():
            with open(folder + "/new", "w") as file:
                file.write(exposition(self.samples[turn % len(self.samples)]))
            os.rename(folder + "/new", folder + "/www/metrics")
            turn += 1
            self.stop_writing.wait(1.0)

    def scraped(self):
        """Values that Prometheus stored so far, as it says itself."""
        for line in fetch(self.port, "/metrics")[1].decode().splitlines():
            if line.startswith("prometheus_tsdb_head_samples_appended_total"):
                return float(line.split()[-1])
        raise ValueError("Prometheus does not tell how much it stored")

    def __exit__(self, *_):
        self.stack.close()


def exposition(sample):
    """A sample's numbers as a target of Prometheus."""
    return "".join(
        "sentinel_%s %r\n" % (key, float(value))
        for key, value in sample.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )


# ==========================================================================================
# Stage: one run, and the list of its benches
# ==========================================================================================

BENCHES = collections.OrderedDict()  # name: (function, in --quick)


def bench(quick=False):
    """Register a function of a Stage that yields rows; its docstring says how it measures."""

    def register(function):
        BENCHES[function.__name__] = function, quick
        return function

    return register


class Stage:
    """One run: its length, what benches share, and what they found out for one another."""

    def __init__(self, quick, folder):
        self.quick, self.folder, self.recorded = quick, folder, None
        self.tolerance = TOLERANCE if quick else 1.0

    def seconds(self, full, quick):
        return quick if self.quick else full

    def samples(self):
        if self.recorded is None:
            self.recorded = record_samples()
        return self.recorded

    def samples_file(self):
        return self.json_file("samples.json", self.samples)

    def job_files(self):
        """(samples of agents in jobs, looks of such agents): the names of two files."""

        def samples():
            return [dict(sample, **JOB_VALUES) for sample in self.samples()]

        return self.json_file("in_jobs.json", samples), self.json_file(
            "looks.json", lambda: [some_look(number) for number in range(1, LOOKS + 1)]
        )

    def json_file(self, name, make):
        """The path of a file in the stage's folder; it is written once."""
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            with open(path, "w") as file:
                json.dump(make(), file)
        return path

    def python(self):
        """An interpreter that shares the memory of its program with no other process here.

        None, if most of it is in a shared library, which all share.
        """
        with open("/proc/self/maps") as file:
            if "libpython" in file.read():
                return None
        path = os.path.join(self.folder, "python3")
        if not os.path.exists(path):
            shutil.copy(os.path.realpath(sys.executable), path)
        return path


# ==========================================================================================
# Bare loops: the least that an interpreter can do, and what is measured beside them
# ==========================================================================================

BARE_LOOP = """
import json, os, pickle, socket, sys, time
port, interval, sample = int(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
sock = socket.create_connection(("127.0.0.1", port))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
ticks = os.open("/proc/stat", os.O_RDONLY)
memory = os.open("/proc/meminfo", os.O_RDONLY)
due = time.monotonic()
while True:
    os.pread(ticks, 256, 0)
    os.pread(memory, 2048, 0)
    sock.send(pickle.dumps(sample, 4))
    due += interval
    time.sleep(max(0.0, due - time.monotonic()))
"""
PAIRS = 10  # agents beside as many loops
KEYS_OF_A_LOOP = (
    "node",
    "user",
    "version",
    "interval",
    "ack",
    "cpus",
    "cpu",
    "ram",
    "mem_total",
    "mem_used",
)


class Beside:
    """Programs of several kinds side by side, each sending to a port of its own every INTERVAL.

    They start one by one, evenly, a kind after the other: in a crowd each would find warm in the
    caches what the one before it used, and a node has one agent.
    """

    def __init__(self, kinds, sink):
        """kinds: {name: function of a port that starts one}; PAIRS of each are started."""
        self.sink = sink
        self.stack = contextlib.ExitStack()
        self.tools = {name: [] for name in kinds}
        ports = iter(sink.ports)
        for _ in range(PAIRS):
            for name, start_one in kinds.items():
                time.sleep(INTERVAL / (PAIRS * len(kinds)))
                port = next(ports)
                tool = self.stack.enter_context(start_one(port))
                self.tools[name].append((tool, port))

    def wait(self):
        """Wait until each has sent three times: what it does at its start is over."""
        support.eventually(lambda: min(self.sink.counts.values()) >= 3)

    def measure(self, seconds):
        """{name: [CPU seconds a sample of each tool]}, all in the same seconds."""
        before = self.look()
        time.sleep(seconds)
        after = self.look()
        return {name: per_sample(before[name], after[name]) for name in self.tools}

    def look(self):
        """{name: [(CPU seconds, samples) of each tool so far]}."""
        seen = {}
        for name, tools in self.tools.items():
            seen[name] = [
                (cpu_seconds(tool.pid), self.sink.counts[port]) for tool, port in tools
            ]
        return seen

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()


def per_sample(before, after):
    """CPU seconds a sample of each tool, from two looks at [(CPU seconds, samples)]."""
    costs = []
    for (cpu, samples), (later_cpu, later_samples) in zip(before, after):
        costs.append((later_cpu - cpu) / max(1, later_samples - samples))
    return costs


def median_ratio(ours, theirs):
    """The median of the ratios of neighbours: what disturbs two of ten changes nothing."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs))


def ratio_note(ours, theirs):
    """The medians behind a ratio, in microseconds."""
    return "%.0f / %.0f us a sample, %d pairs" % (
        statistics.median(ours) * 1e6,
        statistics.median(theirs) * 1e6,
        len(ours),
    )


def start_bare_loop(stage, port):
    """The least that this interpreter can do: BARE_LOOP."""
    sample = json.dumps(small_sample(stage))
    return support.start("-c", BARE_LOOP, port, INTERVAL, sample)


def small_sample(stage):
    """What an agent sends that reads cpu and ram only."""
    sample = stage.samples()[0]
    return {key: sample[key] for key in KEYS_OF_A_LOOP if key in sample}


Load = collections.namedtuple("Load", "share ratio bare")
Load.__doc__ = """What something takes: its share of a core, the median over the windows of what it
takes beside one bare loop, and the share of a core of such a loop."""


def beside_bare(stage, seconds, meters):
    """{name: Load} of meters, beside ten bare loops, in ten windows of so many seconds.

    meters: {name: function that returns CPU seconds so far}
    """
    kinds = {"bare": lambda port: start_bare_loop(stage, port)}
    with Sink(PAIRS) as sink, Beside(kinds, sink) as beside:
        beside.wait()
        loops = [tool.pid for tool, _ in beside.tools["bare"]]
        looks = [look_at(meters, loops)]
        for _ in range(PAIRS):
            time.sleep(seconds)
            looks.append(look_at(meters, loops))
    return loads_of(looks)


def look_at(meters, loops):
    """{"time": seconds, "bare": CPU seconds of a bare loop, and of each meter}."""
    look = {name: meter() for name, meter in meters.items()}
    look["bare"] = sum(own_seconds(pid) for pid in loops) / len(loops)
    look["time"] = time.monotonic()
    return look


def loads_of(looks):
    """{name: Load} out of the looks that the windows lie between."""
    first, last = looks[0], looks[-1]
    share = {
        key: (last[key] - first[key]) / (last["time"] - first["time"]) for key in first
    }
    loads = {}
    for name in set(first) - {"bare", "time"}:
        ratios = [
            (late[name] - early[name]) / (late["bare"] - early["bare"])
            for early, late in zip(looks, looks[1:])
        ]
        loads[name] = Load(share[name], statistics.median(ratios), share["bare"])
    return loads


def either(stage, *rows):
    """Rows of which one must hold: when one does, those that do not are only told.

    A bound in percent of a core is one for a machine whose bare loop takes 0.02 % of a core; on a
    slower one the same bound is so many bare loops.
    """
    bounded = [row for row in rows if row.bound is not None]
    if not any(row.within(stage.tolerance) for row in bounded):
        return list(rows)
    return [row if row.within(stage.tolerance) else row.only_told() for row in rows]


def load_rows(stage, name, load):
    """The rows of a Load: what it takes, and what that is beside a bare loop."""
    note = "%.4f / %.4f %% of a core, %d windows"
    note %= (100 * load.share, 100 * load.bare, PAIRS)
    return either(
        stage,
        figure("%s: CPU" % name, 100 * load.share),
        figure("%s / bare loop" % name, load.ratio, note),
    )


# ==========================================================================================
# Benches of the agent
# ==========================================================================================

C_LOOP = r"""
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)                 /* c_loop PORT SECONDS < SAMPLE */
{
    static char sample[4096], buffer[4096];
    ssize_t size = read(0, sample, sizeof sample);
    int one = 1, sock = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    struct timespec beat;
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (argc < 3 || connect(sock, (struct sockaddr *)&to, sizeof to))
        return 1;
    int ticks = open("/proc/stat", O_RDONLY), memory = open("/proc/meminfo", O_RDONLY);
    clock_gettime(CLOCK_MONOTONIC, &beat);
    for (;;) {
        if (pread(ticks, buffer, 256, 0) < 0 || pread(memory, buffer, 2048, 0) < 0)
            return 1;
        recv(sock, buffer, sizeof buffer, MSG_DONTWAIT);
        if (send(sock, sample, size, MSG_NOSIGNAL) != size)
            return 1;
        beat.tv_sec += atoi(argv[2]);
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &beat, 0);
    }
}
"""
CPU_AND_RAM_ONLY = (
    """
import sys
sys.path.insert(0, %r)
import agent
start = agent.Sampler.__init__
def restricted(self, *args, **named):
    start(self, *args, **named)
    self.readers, self.slow_readers = [self.read_cpu, self.read_memory], []
agent.Sampler.__init__ = restricted
agent.Sampler.refresh_for_ever = lambda self: None
agent.Gpus.refresh_for_ever = lambda self: None
sys.exit(agent.main(sys.argv[1:]))
"""
    % support.ROOT
)


def compile_c_loop(folder):
    """Compile C_LOOP; its path."""
    path = os.path.join(folder, "c_loop")
    subprocess.run(
        [need("gcc", "cc"), "-O2", "-x", "c", "-", "-o", path],
        check=True,
        input=C_LOOP.encode(),
        timeout=60,
    )
    return path


def start_small_agent(port):
    """agent.py with its other readers switched off."""
    return support.start("-c", CPU_AND_RAM_ONLY, "--port", port)


def start_c_loop(path, sample, port):
    """C_LOOP, which gets the bytes that it is to send by stdin."""
    command = [path, str(port), "%d" % INTERVAL]
    loop = support.Tool(command, {}, stdin=subprocess.PIPE)
    loop.process.stdin.write(sample)
    loop.process.stdin.close()
    return loop


@bench(quick=True)
def agent_bare(stage):
    """Ten agents that read cpu and ram, ten with everything on, ten bare loops, every 2 s.

    A bare loop is what the same interpreter does at least: two preads, a pickle of the same
    sample, a send, a sleep.
    """
    kinds = collections.OrderedDict()
    kinds["agent"] = start_small_agent
    kinds["bare"] = lambda port: start_bare_loop(stage, port)
    kinds["full"] = lambda port: start_full_agent(stage, port)
    stage.samples()
    with Sink(PAIRS * len(kinds)) as sink, Beside(kinds, sink) as beside:
        beside.wait()
        costs = beside.measure(stage.seconds(60, 20))
    bare = costs["bare"]
    for key, ours in (
        ("agent / bare loop", costs["agent"]),
        ("whole agent / bare loop", costs["full"]),
    ):
        yield figure(key, median_ratio(ours, bare), ratio_note(ours, bare))


@bench()
def agent_c(stage):
    """Ten agents that read cpu and ram alone beside ten C loops, every 2 s, CPU per sample.

    The C loop makes the same two reads, takes the same answer and sends a sample of the same
    bytes; it parses nothing and packs nothing.
    """
    path = compile_c_loop(stage.folder)
    sample = pickle.dumps(small_sample(stage), protocol=4)
    kinds = collections.OrderedDict()
    kinds["agent"] = start_small_agent
    kinds["C"] = lambda port: start_c_loop(path, sample, port)
    with Sink(PAIRS * len(kinds)) as sink, Beside(kinds, sink) as beside:
        beside.wait()
        costs = beside.measure(40)
    ratio = median_ratio(costs["agent"], costs["C"])
    yield figure("agent / C loop", ratio, ratio_note(costs["agent"], costs["C"]))


JOB = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "bench",
    "SLURM_NODEID": "0",
    "SLURM_JOB_CPUS_PER_NODE": "1",
    "SLURM_CPUS_ON_NODE": "1",
}


def start_full_agent(stage, port, *flags):
    """agent.py with everything on (GPUs and the job's cgroup are looked for, and are not here).

    Its interpreter is a copy, unless it is in a shared library: a node has no other Python that
    shares the memory of its program with it.
    """
    python = stage.python()
    env = dict(JOB, PYTHONHOME=sys.base_prefix) if python else JOB
    return support.start("agent.py", "--port", port, *flags, python=python, env=env)


def cost_of_a_sample(share, count):
    """A note: what each sample of so many agents costs, from their share of a core."""
    return "%.0f us a sample" % (share * INTERVAL / count * 1e6)


@bench()
def agent_full(stage):
    """Ten agents with everything on, every 2 s, one by one; then the memory of one alone."""
    with Sink() as sink, contextlib.ExitStack() as stack:
        agents = []
        for _ in range(10):
            time.sleep(INTERVAL / 10)
            agents.append(stack.enter_context(start_full_agent(stage, sink.port)))
        support.eventually(lambda: sink.count >= 30)
        (share,) = cpu_share(60, [agent.pid for agent in agents])
        for agent in agents[1:]:
            agent.stop()
        memory = pss_bytes(agents[0].pid)
    yield figure("agent's CPU", 100 * share / 10, cost_of_a_sample(share, 10))
    yield figure("agent's memory", memory / MIB)


COUNTED = (10, 50)  # samples of the two runs whose difference is counted
COUNTED_INTERVAL = (
    0.5  # seconds between two samples; valgrind makes a program 50 times slower
)


class Counted:
    """A program under valgrind, once for few samples and once for many, both at once."""

    def __init__(self, stage, name, command, env, stdin):
        """command: a function of a port, to which the program sends."""
        self.runs = []
        self.totals = []  # (samples, instructions) of the runs that are done
        self.stack = contextlib.ExitStack()
        for samples in COUNTED:
            sink = self.stack.enter_context(Sink())
            path = os.path.join(stage.folder, "%s.%d" % (name, samples))
            # the agent starts itself once more; what else it starts has a file of its own
            words = [need("valgrind"), "--tool=callgrind", "--trace-children=yes"]
            words.append("--callgrind-out-file=%s.%%p" % path)
            words += [str(word) for word in command(sink.port)]
            tool = support.Tool(words, env, stdin=subprocess.PIPE)
            self.stack.callback(tool.kill)
            tool.process.stdin.write(stdin)
            tool.process.stdin.close()
            self.runs.append((samples, sink, path, tool))

    def is_done(self):
        """Whether both have sent their samples; one that has is stopped at once."""
        for run in self.runs[:]:
            samples, sink, path, tool = run
            if sink.count >= samples:
                tool.stop()
                count = counted_in("%s.%d" % (path, tool.pid))
                self.totals.append((sink.count, count))
                self.runs.remove(run)
        return not self.runs

    def instructions(self):
        """Instructions a sample: the count of the long run less that of the short one."""
        return fit_slope(self.totals)

    def close(self):
        self.stack.close()


def counted_in(path):
    """The instructions that a file of callgrind's counts."""
    with open(path) as file:
        for line in file:
            if line.startswith(("summary:", "totals:")):
                return int(line.split()[1])
    raise ValueError("%s counts nothing" % path)


@bench()
def instructions(stage):
    """Instructions a sample in user space, by callgrind: agents, the bare loop, the C loop.

    What the kernel does for them is not counted.  All run at once: counts need no quiet machine.
    """
    need("valgrind")
    sample = small_sample(stage)
    python = [support.PYTHON]
    small = ["-c", CPU_AND_RAM_ONLY]
    whole = [os.path.join(support.ROOT, "agent.py")]
    flags = ["--interval", COUNTED_INTERVAL, "--port"]
    programs = (
        ("agent", lambda port: python + small + flags + [port]),
        ("whole agent", lambda port: python + whole + flags + [port]),
        (
            "bare loop",
            lambda port: (
                python + ["-c", BARE_LOOP, port, COUNTED_INTERVAL, json.dumps(sample)]
            ),
        ),
        ("C loop", lambda port: [compile_c_loop(stage.folder), port, 1]),
    )
    env = dict(os.environ, PYTHONHASHSEED="0", **JOB)
    with contextlib.ExitStack() as stack:
        counted = {}
        for name, command in programs:
            packed = pickle.dumps(sample, protocol=4) if name == "C loop" else b""
            counted[name] = Counted(stage, name, command, env, packed)
            stack.callback(counted[name].close)
        support.eventually(
            lambda: not [each for each in counted.values() if not each.is_done()],
            2 * START_LIMIT,
            "samples under valgrind",
        )
        for name, each in counted.items():
            yield figure("%s: instructions" % name, each.instructions() / 1000)
        agent, bare = counted["agent"], counted["bare loop"]
        ratio = agent.instructions() / bare.instructions()
        yield figure("agent: instructions / bare loop", ratio)


# ==========================================================================================
# Benches of agents in jobs: ranks, GPUs, and whether they slow the job
# ==========================================================================================


@contextlib.contextmanager
def agent_with_ranks(count, port):
    """An agent in a job of so many processes that sleep, in a real cgroup (v1)."""
    if not os.path.exists("/sys/fs/cgroup/freezer/cgroup.procs"):
        raise Missing("cgroup v1")
    top = "/sys/fs/cgroup/freezer/bench%d-%d" % (os.getpid(), count)
    root = top + "/uid_0/job_7"
    try:
        os.makedirs(root)
    except OSError as error:
        raise Missing("the right to make a cgroup (%s)" % error.strerror) from None
    agent = os.path.join(support.ROOT, "agent.py")
    words = (root, count, 0, agent, "--port", port)
    tool = support.start("-c", IN_A_JOB, *words, env={"SLURM_JOB_ID": "7"})
    try:
        yield tool
    finally:
        tool.kill()
        remove_cgroup(top)


@bench()
def ranks(stage):
    """Agents in a job of 8 processes and in one of 256, every 2 s, beside bare loops.

    The processes sleep: what an agent reads of them is the same.  Looks at ranks come every ten
    seconds, or less often where they cost much.
    """
    counts = (8, 256)
    with Sink(len(counts), parts=True) as sink, contextlib.ExitStack() as stack:
        meters = {}
        for count, port in zip(counts, sink.ports):
            tool = stack.enter_context(agent_with_ranks(count, port))
            meters[count] = lambda pid=tool.pid: own_seconds(pid)
        support.eventually(lambda: min(sink.counts.values()) >= 10, START_LIMIT)
        loads = beside_bare(stage, 10, meters)
    for count in counts:
        yield from load_rows(stage, "%d ranks" % count, loads[count])


WITH_STUB = (
    """
import sys
sys.path.insert(0, %r)
import agent
agent.NVML_LIBRARY = sys.argv.pop(1)
sys.exit(agent.main(sys.argv[1:]))
"""
    % support.ROOT
)


@bench()
def gpus(stage):
    """An agent that asks a stand-in for NVIDIA's library about eight GPUs, beside bare loops.

    What a driver takes to answer is not in it: tests/README.md has that of real cards.
    """
    library = os.path.join(stage.folder, "libnvidia-ml.so.1")
    source = os.path.join(FOLDER, "nvml_stub.c")
    command = [need("gcc", "cc"), "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True, timeout=60)
    with Sink(parts=True) as sink, support.start(
        "-c", WITH_STUB, library, "--port", sink.port, env=JOB
    ) as tool:
        support.eventually(lambda: sink.count >= 10)
        meters = {"8 GPUs": lambda: own_seconds(tool.pid)}
        loads = beside_bare(stage, 10, meters)
    yield from load_rows(stage, "8 GPUs", loads["8 GPUs"])


JOB_PROGRAM = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)         /* job CPU spin|stream; "ROUNDS\n" in, seconds out */
{
    enum { WORDS = 1 << 23 };           /* 64 MiB, more than a cache has */
    static unsigned long words[WORDS];
    unsigned long value = 1, sum = 0;
    long rounds;
    cpu_set_t set;
    if (argc < 3)
        return 1;
    CPU_ZERO(&set);
    CPU_SET(atoi(argv[1]), &set);
    sched_setaffinity(0, sizeof set, &set);
    memset(words, 1, sizeof words);
    while (scanf("%ld", &rounds) == 1) {
        double start = now();
        while (rounds-- > 0) {
            if (argv[2][1] == 'p')
                for (int i = 0; i < 1000000; i++)
                    value = value * 6364136223846793005UL + 1442695040888963407UL;
            else
                for (int i = 0; i < WORDS; i++)
                    sum += words[i] += i;
        }
        printf("%.6f %lu\n", now() - start, value + sum);
        fflush(stdout);
    }
    return 0;
}
"""
TURNS = 20  # pairs of a job with an agent and one without
TURN_SECONDS = 2.0  # of each
MORE_OFTEN = 20  # than every INTERVAL: what that takes stands out from the noise


class SlowedJob:
    """A job with a process on each CPU, which does the same work again and again."""

    def __init__(self, path, kind):
        self.processes = []
        for cpu in sorted(os.sched_getaffinity(0)):
            command = [path, str(cpu), kind]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.processes.append(process)
        self.rounds = 1
        for _ in range(3):  # which warms it up, too
            seconds = self.run() / self.rounds
            self.rounds = max(1, round(TURN_SECONDS / 2 / seconds))
        self.rounds *= 2

    def run(self):
        """Do the work once: the mean of the seconds that the processes took."""
        for process in self.processes:
            process.stdin.write(b"%d\n" % self.rounds)
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes]
        return statistics.mean(float(line.split()[0]) for line in lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def slowed_by(with_agent, without):
    """(percent that a job takes longer, how far that is from sure), by pairs of seconds."""
    parts = [100 * (mine / other - 1) for mine, other in zip(with_agent, without)]
    quarter = statistics.quantiles(parts, n=4)
    # of a normal distribution: the standard error of a median, from the quartiles
    error = 1.2533 * (quarter[2] - quarter[0]) / 1.349 / math.sqrt(len(parts))
    return statistics.median(parts), error


@bench()
def slower(stage):
    """Does it slow the job?  One that spins and one that streams memory, on every CPU.

    The same work is done with an agent beside it and without, in turns, 20 pairs of 2 s each;
    "without" is an agent that is stopped by SIGSTOP.  It samples 20 times as often as it does by
    itself, and a twentieth of what that takes is told: the median of the pairs, and its error.
    Where the error is more than half the bound, the machine is too noisy, and nothing is judged.
    """
    path = os.path.join(stage.folder, "job")
    command = [need("gcc", "cc"), "-O2", "-x", "c", "-", "-o", path]
    subprocess.run(command, check=True, input=JOB_PROGRAM.encode(), timeout=60)
    interval = ("--interval", INTERVAL / MORE_OFTEN)
    with Sink(parts=True) as sink, start_full_agent(
        stage, sink.port, *interval
    ) as agent:
        support.eventually(lambda: sink.count >= 3)
        for kind in ("spin", "stream"):
            seconds = {True: [], False: []}
            with SlowedJob(path, kind) as job:
                for turn in range(TURNS):
                    for is_beside in (turn % 2 == 0, turn % 2 == 1):
                        number = signal.SIGCONT if is_beside else signal.SIGSTOP
                        agent.send_signal(number)
                        seconds[is_beside].append(job.run())
            agent.send_signal(signal.SIGCONT)
            longer, error = slowed_by(seconds[True], seconds[False])
            yield slower_row(kind, longer / MORE_OFTEN, error / MORE_OFTEN)


def slower_row(kind, longer, error):
    """The row of a job that takes so many percent longer; only told when that is not sure."""
    note = "+- %.3f, %d pairs of %.1f s" % (error, TURNS, TURN_SECONDS)
    row = figure("slower: " + kind, longer, note)
    if 2 * error <= row.bound:
        return row
    return row._replace(note=note + "; too noisy to judge").only_told()


# ==========================================================================================
# Benches of the master, nobody watching
# ==========================================================================================


def measure_fleet(fleet, seconds, peer=None):
    """(share of a core of the master, that of Prometheus, part of its scrapes it did in time).

    ValueError when the load could not send what was due, or the master could not answer it: then
    the share is that of less work. A Prometheus that is late has its share as if it were not.
    """
    before, stored = fleet.report(), peer.scraped() if peer else 0.0
    shares = cpu_share(seconds, [fleet.master.pid], [peer.tool.pid] if peer else [])
    done = fleet.done_since(before)
    if min(done.values()) < KEEPS_UP:
        raise ValueError(
            "too busy: %.0f %% of the samples were sent and %.0f %% answered in time"
            % (100 * done["sent"], 100 * done["answered"])
        )
    scraped = (
        (peer.scraped() - stored) / peer.round * INTERVAL / seconds if peer else 1.0
    )
    return shares[0], shares[1] / scraped if scraped < KEEPS_UP else shares[1], scraped


def told_reasons(report):
    """Why agents were dropped, and how many for each reason."""
    return ", ".join("%s: %d" % reason for reason in report["reasons"].items())


def against_prometheus(stage, count, paces, seconds):
    """A fleet of each pace beside one Prometheus: rows of CPU for the same work, and of memory."""
    with Prometheus(stage, count) as peer:
        for pace in paces:
            with Fleet(stage, count, pace) as fleet:
                share, theirs, scraped = measure_fleet(fleet, seconds, peer)
                memory = pss_bytes(fleet.master.pid)
                their_memory = pss_bytes(peer.tool.pid)
                report = fleet.report()
            note = "%.1f / %.1f %% of a core, %d values" % (
                100 * share,
                100 * theirs,
                peer.values,
            )
            if scraped < KEEPS_UP:
                note += ", %.0f %% of its scrapes in time" % (100 * scraped)
            yield figure("%d %s: CPU" % (count, pace), share / theirs, note)
            if pace == "even":
                note = "%.0f / %.0f MiB" % (memory / MIB, their_memory / MIB)
                yield figure("%d even: memory" % count, memory / their_memory, note)
            if report["lost"]:  # a row of its own only then: none is to be lost
                what = "master, %s agents at 2 s, %s: false lost"
                what %= (format(count, ","), pace)
                yield at_most(what, report["lost"], "", 0, told_reasons(report))


@bench(quick=True)
def master_idle(stage):
    """A master that nobody sends to and nobody looks at: how often it wakes up."""
    seconds = stage.seconds(60, 20)
    with support.start_master() as master:
        settle(master.pid)
        before = support.wakeups(master.pid)
        time.sleep(seconds)
        count = support.wakeups(master.pid) - before
    yield at_most(
        "master, idle: wake-ups a second, all processes", count / seconds, "", 2
    )


@bench()
def master_empty(stage):
    """A master without agents, beside a Prometheus without targets."""
    with contextlib.ExitStack() as stack:
        groups = [[stack.enter_context(support.start_master()).pid]]
        if shutil.which("prometheus", path=PATH):
            groups.append([stack.enter_context(start_idle_prometheus(stage)).pid])
        settle(*sum(groups, []))
        shares = cpu_share(60, *groups)
    row = figure("empty master", 100 * shares[0])
    if len(shares) == 1:
        return [row]
    note = "%.3f / %.3f %% of a core" % (100 * shares[0], 100 * shares[1])
    ratio = figure("empty master / Prometheus", shares[0] / shares[1], note)
    return either(stage, row, ratio)


def start_idle_prometheus(stage):
    """A Prometheus that has nothing to scrape."""
    path = os.path.join(stage.folder, "idle.yml")
    with open(path, "w") as file:
        file.write("global: { scrape_interval: %gs }\n" % INTERVAL)
    return run_peer(
        need("prometheus"),
        "--config.file",
        path,
        "--storage.tsdb.path",
        os.path.join(stage.folder, "idle"),
        "--web.listen-address",
        "%s:%d" % (support.HOST, free_port()),
        "--log.level",
        "error",
    )


@bench()
def master_20(stage):
    """A master with 20 agents at 2 s beside Prometheus with 200 targets, which is the measure."""
    with Prometheus(stage, 200) as peer, Fleet(stage, 20) as fleet:
        share, theirs, _ = measure_fleet(fleet, 60, peer)
    yield figure("20 agents", 100 * share, cost_of_a_sample(share, 20))
    note = "%.2f / %.1f %% of a core" % (100 * share, 100 * theirs)
    yield figure("20 agents / Prometheus", share / theirs, note)


@bench(quick=True)
def master_200(stage):
    """200 agents and Prometheus with 200 targets of as many values, both every 2 s, at once."""
    paces = ["even"] if stage.quick else ["even", "burst"]
    return against_prometheus(stage, 200, paces, stage.seconds(40, 14))


@bench()
def master_1000(stage):
    """The same with 1,000."""
    return against_prometheus(stage, 1000, ["even", "burst"], 30)


@bench()
def master_5000(stage):
    """The same with 5,000."""
    return against_prometheus(stage, 5000, ["even", "burst"], 40)


@bench()
def master_10000(stage):
    """10,000 agents at 2 s for 60 s, evenly and then all of them at once every 2 s."""
    for pace in ("even", "burst"):
        with Fleet(stage, 10000, pace) as fleet:
            share = measure_fleet(fleet, 60)[0]
            memory, report = pss_bytes(fleet.master.pid), fleet.report()
        if pace == "even":
            note = "%.0f MiB in all" % (memory / MIB)
            yield figure("10000: memory", memory / 10000 / KIB, note)
        note = cost_of_a_sample(share, 10000)
        yield figure("10000 %s: CPU" % pace, 100 * share, note)
        yield figure("10000 %s: lost" % pace, report["lost"], told_reasons(report))


def costs(fleet):
    """{cost: value} of a fleet's master, less what the empty master cost."""
    share, pages = measure_fleet(fleet, 20)[0], []
    for _ in range(5):
        time.sleep(0.5)  # one that is not in the cache any more
        pages.append(fetch(fleet.master.page, seconds=60)[1:])
    return {
        "CPU": share - fleet.empty_share,
        "memory": pss_bytes(fleet.master.pid) - fleet.empty_pss,
        "size": len(pages[0][0]),
        "time": statistics.median(took for _, took in pages),
    }


@bench()
def growth(stage):
    """Each cost of the master, alone, with 200 to 10,000 agents: the exponent, fitted by logs."""
    points = collections.defaultdict(list)
    for count in (200, 1000, 5000, 10000):
        with Fleet(stage, count) as fleet:
            for cost, value in costs(fleet).items():
                points[cost].append((count, value))
    for cost, line in points.items():
        last = "%.2f in the last step" % fit_exponent(line[-2:])
        yield figure("growth: %s" % cost, fit_exponent(line), last)


def tell_jobs(master, count):
    """Have a master know what Slurm says of so many jobs of a load, as a relay tells it."""
    with support.PlainAgent(master.port) as relay:
        for number in range(count):
            facts = {"part": "job", "state": "RUNNING", "user": "ann", "nodes": 100}
            facts["job"] = facts["raw"] = load.JOB % number
            facts.update(job_name="train", start=time.time() - 60, limit=86400.0)
            relay.send(facts)
        relay.send({"bye": "told"})
        support.eventually(
            lambda: fetch(master.page, "/api/jobs")[1].count(b'"job": ') == count,
            START_LIMIT,
            "jobs that are told",
        )


def time_of(port, path):
    """The median of the seconds that a page takes which is made anew, of five."""
    times = []
    for _ in range(5):
        time.sleep(0.5)
        status, _, took = fetch(port, path, seconds=60)
        if status != 200:
            raise ValueError("%s answered %d" % (path, status))
        times.append(took)
    return statistics.median(times)


def growth_rows(points):
    """The rows of exponents: points are {key: [(count, cost)]}."""
    for key, line in points.items():
        last = "%.2f in the last step, %.0f ms" % (
            fit_exponent(line[-2:]),
            1000 * line[-1][1],
        )
        yield figure("growth: " + key, fit_exponent(line), last)


@bench()
def growth_jobs(stage):
    """The time of the page and of /api/jobs, with 1 to 100 jobs of 1 to 100 nodes that send.

    They tell of no ranks and GPUs: the table has room for those of some 300 nodes.
    """
    points = collections.defaultdict(list)
    for jobs, nodes in ((1, 100), (10, 100), (100, 1), (100, 10), (100, 100)):
        with Fleet(stage, jobs * nodes, jobs=jobs, looks=False) as fleet:
            tell_jobs(fleet.master, jobs)
            for name, path in (("page", "/"), ("API", "/api/jobs")):
                took = time_of(fleet.master.page, path)
                if nodes == 100:
                    points[name + " by jobs"].append((jobs, took))
                if jobs == 100:
                    points[name + " by nodes"].append((nodes, took))
    return growth_rows(points)


# ==========================================================================================
# Benches of the herd and the relay
# ==========================================================================================

WATCHED_JOBS, NODES_OF_A_JOB = 10, 4
FIRST_JOB = 4711


def write_stand_ins(folder):
    """Slurm's commands, which know of ten jobs of four nodes; and the Python of these nodes."""

    def write(name, text, mode=0o600):
        path = os.path.join(folder, name)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, mode)

    for name, text in test_herd.COMMANDS.items():
        if name != "python3":  # nodes start it as people do
            write(name, text.format(python=support.PYTHON, folder=folder), 0o700)
    queue = ""
    for number in range(WATCHED_JOBS):
        job = str(FIRST_JOB + number)
        names = ["c%d" % (NODES_OF_A_JOB * number + n) for n in range(NODES_OF_A_JOB)]
        queue += test_herd.row(job, nodes=",".join(names), limit="1-00:00:00")
        write("job." + job, test_herd.details(job, nodes=names))
    write("queue", queue)
    write("squeue.mode", "")
    write("srun.mode", "")
    os.symlink(sys.executable, os.path.join(folder, "python3"))


def start_watcher(stage, folder, port):
    """agent.py --jobs among the stand-ins: the relay, which starts the herd.

    Forty agents start at once on this machine, and not on forty: a step has time for that.
    """
    agent = support.with_constants("agent.py", ATTACH_SECONDS=90.0)
    python = stage.python()
    env = {"PATH": folder + os.pathsep + os.environ["PATH"]}
    if python:
        env["PYTHONHOME"] = sys.base_prefix
    return support.start(agent, "--jobs", "--port", port, python=python, env=env)


def children(pid):
    """The pids of a process's children."""
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return [int(word) for word in file.read().split()]


@bench()
def herd(stage):
    """The herd with ten jobs of four nodes on the login node, and the relay, beside bare loops.

    Stand-ins take the place of squeue, scontrol and srun; the agents behind them are real ones.
    What the herd starts is told apart: its questions to Slurm, of which it asks one in 30 s, and
    its sruns, which are programs of Slurm's own and not in this figure.
    """
    count = WATCHED_JOBS * NODES_OF_A_JOB
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=stage.folder))
        write_stand_ins(folder)
        master = stack.enter_context(support.start_master())
        relay = stack.enter_context(start_watcher(stage, folder, master.port))
        support.eventually(
            lambda: len(support.nodes(master.page)) == count, START_LIMIT, "agents"
        )
        (herd,) = children(relay.pid)
        sruns = children(herd)
        meters = {
            "herd": lambda: own_seconds(herd),
            "relay": lambda: own_seconds(relay.pid),
            "questions": lambda: reaped_seconds(herd),
            "sruns": lambda: sum(own_seconds(pid) for pid in sruns),
        }
        settle(herd, relay.pid)
        loads = beside_bare(stage, 12, meters)
        memory = {"herd": own_memory(herd), "relay": own_memory(relay.pid)}
        memory["sruns"] = sum(own_memory(pid) for pid in sruns)
    for name in ("herd", "relay"):
        yield from load_rows(stage, name, loads[name])
        yield figure("%s: memory" % name, memory[name] / MIB)
    yield figure("questions: CPU", 100 * loads["questions"].share)
    yield figure("sruns: CPU", 100 * loads["sruns"].share)
    yield figure("sruns: memory", memory["sruns"] / MIB)


# ==========================================================================================
# Benches of records
# ==========================================================================================

DAY = 86400.0


def rows_of_a_day(nodes):
    """How many rows the record of a job has that takes a day."""
    age, rows = 0.0, 0
    while age < DAY:
        age += master_server.step_of(age, nodes)
        rows += 1
    return rows


def day_of_record(content, nodes):
    """The bytes that a record takes in a day, from the lines of its first minute or two."""
    sizes = collections.defaultdict(list)
    for line in content.splitlines(keepends=True):
        sizes[line[2 : line.index(b'"', 2)].decode()].append(len(line))
    rows = rows_of_a_day(nodes)
    times = {
        "row": rows,
        "gpus": rows / master_server.GPU_ROWS,
        "ranks": rows / master_server.RANK_ROWS,
        "verdicts": DAY / master_server.VERDICT_SECONDS,
    }
    return sum(
        statistics.mean(each) * times.get(kind, len(each))
        for kind, each in sizes.items()
    )


def day_of_records(folder, count, jobs):
    """(MiB a node and day of the records in a folder, of so many nodes in so many jobs; a note).

    ValueError as long as they have not got a line of each kind.
    """
    total = packed = 0.0
    files = [file.path for file in master_server.list_files(folder)]
    if len(files) < jobs:
        raise ValueError("%d records of %d so far" % (len(files), jobs))
    for path in files:
        with open(path, "rb") as file:
            content = file.read()
        if content.count(b'{"gpus"') < 2 or b'{"ranks"' not in content:
            raise ValueError("not all kinds of lines are in %s yet" % path)
        size = day_of_record(content, count // jobs)
        total += size
        packed += size * len(gzip.compress(content)) / len(content)
    note = "%.2f MiB in gzip, with 8 ranks and 4 GPUs a node" % (packed / count / MIB)
    return total / count / MIB, note


# All kinds of lines come soon: only their sizes are wanted.
SOON = "; ".join(
    "master_server.%s = 2" % name for name in ("ROW_SECONDS", "GPU_ROWS", "RANK_ROWS")
)


def judged(master, jobs):
    """Whether each job has been judged once."""
    for number in range(jobs):
        path = "/api/job/" + load.JOB % number
        answer = json.loads(fetch(master.page, path)[1])
        if not answer["job"]["verdicts"]:
            return False
    return True


@bench()
def recorder(stage):
    """The recorder with 200 nodes of 10 jobs, each with 8 ranks and 4 GPUs, beside bare loops.

    What is judged again and again is in it, and of ranks and GPUs what is recorded now and then.
    The size of a day is worked out from a minute of a job of 20 nodes, and of ten of one: so many
    lines of each kind has a day.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=stage.folder))
        flags = ("--record", folder)
        fleet = stack.enter_context(Fleet(stage, 200, jobs=10, flags=flags))
        pid = role_of(fleet.master, "recorder")
        # all at once, which is not how it goes on
        support.eventually(lambda: judged(fleet.master, 10), START_LIMIT)
        loads = beside_bare(stage, 10, {"recorder": lambda: own_seconds(pid)})
        memory = own_memory(pid)
    yield from load_rows(stage, "recorder", loads["recorder"])
    yield figure("recorder: memory", memory / MIB)
    for key, nodes, jobs in (
        ("record: size", 20, 1),
        ("record of one node: size", 10, 10),
    ):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=stage.folder))
            flags = ("--record", folder)
            fleet = Fleet(stage, nodes, jobs=jobs, flags=flags, patch=SOON)
            stack.enter_context(fleet)
            size, note = support.eventually(
                lambda: day_of_records(folder, nodes, jobs),  # noqa: B023
                START_LIMIT,
            )
        yield figure(key, size, note)


def write_record(folder, job, nodes, hours, state, chance):
    """A job's record, packed if it has ended: curves that swing, with noise that stays."""
    end = time.time() - 60
    start = end - 3600 * hours
    record = master_server.Record(job)
    facts = dict.fromkeys(master_server.JOB_KEYS)
    facts.update(job=job, raw=job, job_name="train", user="ann", state=state)
    facts.update(start=start, limit=2 * DAY, nodes=nodes, cpus=16 * nodes, mem=2.0**36)
    names = [load.NAME % number for number in range(nodes)]
    record.nodes = {
        name: {"job_cpus": 16.0, "job_mem_limit": 2.0**36} for name in names
    }
    when = start
    while when < end:
        step = master_server.step_of(when - start, nodes)
        when += step
        values = {}
        for key in master_server.RECORDED:
            top = 100.0 if master_server.UNITS[key] == "%" else 1e10
            wave = top * (0.5 + 0.4 * math.sin((when - start) / 600))
            means = [wave * chance.uniform(0.5, 1) for _ in names]
            values[key] = [min(means), statistics.fmean(means), max(means)]
            if key in master_server.BY_NODE:
                values[key] += means
        record.rows.append(master_server.RecordRow(when, float(step), names, values))
    if state in master_server.ENDED_STATES:
        facts.update(end=end, exit="0:0")
        record.end = {"time": end}
    verdict = {
        "severity": "advice",
        "what": "Memory was asked for and not used",
        "proof": "9.5 of 64 GiB",
        "cure": "--mem=12G",
        "rule": "r",
    }
    record.verdicts, record.judged = [verdict], end
    record.add_facts(facts, end)
    path = os.path.join(folder, job + ".bench-1-1.jsonl")
    with open(path, "wb") as file:
        file.write(b"".join(record.finish().lines()))
    if record.end:  # as the recorder leaves it
        master_server.pack(path, job, "bench")
        record = master_server.read_record(folder, job)
        master_server.write_sketch(folder, record, "bench")


class Asked:
    """How long a page takes, made anew each time: nobody has asked with such a query before.

    .first is the first time, .times are the others, in milliseconds; .cpu is what the dashboard
    takes for each of these, in milliseconds of CPU.
    """

    def __init__(self, master, path, count):
        self.times = []
        dashboard = role_of(master, "dashboard")
        self.first = self.ask_first(master.page, path + "?n=first")
        before = own_seconds(dashboard)
        for number in range(count):
            self.times.append(self.ask(master.page, "%s?n=%d" % (path, number)))
            time.sleep(random.uniform(0, 0.1))
        self.cpu = 1000 * (own_seconds(dashboard) - before) / count

    def ask_first(self, port, path):
        """Ask again while the records are still being read: the time until the page is there."""
        start = time.monotonic()
        while fetch(port, path, seconds=60)[0] == 503:
            if time.monotonic() - start > START_LIMIT:
                break
            time.sleep(0.2)
        seconds = time.monotonic() - start
        self.ask(port, path)
        return 1000 * seconds

    @staticmethod
    def ask(port, path):
        status, _, took = fetch(port, path, seconds=60)
        if status != 200:
            raise ValueError("%s answered %d" % (path, status))
        return 1000 * took

    def row(self, key):
        """The row of its 99th percentile."""
        note = "p50 %.0f ms, %.0f ms of CPU, %d times, each made anew"
        note %= (percentile(self.times, 50), self.cpu, len(self.times))
        return figure(key, percentile(self.times, 99), note)


@bench()
def job_page(stage):
    """/job/ID of a job of 64 nodes and 24 hours: one that has ended, and one that sends."""
    chance = random.Random(1)
    job = load.JOB % 0
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        write_record(folder, "4711", 64, 24, "COMPLETED", chance)
        write_record(folder, job, 64, 24, "RUNNING", chance)
        with Fleet(stage, 64, jobs=1, flags=("--record", folder)) as fleet:
            tell_jobs(fleet.master, 1)
            live = Asked(fleet.master, "/job/" + job, 100)
            past = Asked(fleet.master, "/job/4711", 100)
            recorded = Asked(fleet.master, "/record/" + job, 100)
    yield live.row("job page")
    yield recorded.row("record page")
    yield past.row("past job page")
    yield figure("first past job page", past.first)


def write_many_records(folder, first, last):
    """Records of short jobs that have ended: JOB of one number up to another."""
    chance = random.Random(first)
    kinds = []
    with tempfile.TemporaryDirectory() as other:
        for state in ("COMPLETED", "COMPLETED", "FAILED", "TIMEOUT"):
            write_record(other, load.JOB % 0, 1, 0.2, state, chance)
            (file,) = master_server.list_files(other)
            head, facts, rest = master_server.read_file(file.path).split(b"\n", 2)
            kinds.append((head + b"\n", facts + b"\n", gzip.compress(rest)))
            os.unlink(file.path)
    for number in range(first, last):
        job = load.JOB % number
        *named, rest = chance.choice(kinds)
        path = os.path.join(folder, job + ".bench-1-1.jsonl.gz")
        with open(path, "wb") as file:
            for line in named:
                named_so = line.replace((load.JOB % 0).encode(), job.encode())
                file.write(gzip.compress(named_so, 1))
            file.write(rest)


@bench()
def jobs_page(stage):
    """/jobs with 10 to 10,000 records of jobs that have ended."""
    points = collections.defaultdict(list)
    made = 0
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        for count in (10, 100, 1000, 10000):
            write_many_records(folder, made, count)
            made = count
            flags = ("--record", folder)
            with support.start_master(*flags) as master:
                asked = 100 if count == 1000 else 10
                pages = Asked(master, "/jobs", asked)
            middle = statistics.median(pages.times)
            points["/jobs by records"].append((count, middle / 1000))
            points["first /jobs by records"].append((count, pages.first / 1000))
            if count == 1000:
                yield pages.row("/jobs")
                yield figure("first /jobs", pages.first)
    yield from growth_rows(points)


# ==========================================================================================
# Benches of the terminal
# ==========================================================================================


@contextlib.contextmanager
def screens(port):
    """test_reader.py --tui on a terminal of 80 x 24 characters: (the tool, a function that reads).

    The function returns how much was written to the terminal since it was called last.
    """
    ours, theirs, take_terminal = open_terminal()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    path = os.path.join(support.ROOT, "test_reader.py")
    tool = support.Tool(
        [support.PYTHON, path, "--port", str(port), "--tui"],
        dict(os.environ, TERM="xterm-256color"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=take_terminal,
    )

    def read():
        size = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                size += len(os.read(ours, 65536))
        return size

    try:
        yield tool, read
    finally:
        tool.kill()
        os.close(ours)
        os.close(theirs)


@bench()
def terminal(stage):
    """The screens of test_reader.py --tui with 1,000 nodes of 50 jobs, beside bare loops."""
    with Fleet(stage, 1000, jobs=50) as fleet:
        tell_jobs(fleet.master, 50)
        with screens(fleet.master.port) as (tool, read):
            support.eventually(lambda: read() > 1000)

            def meter():
                if not read():
                    raise ValueError("the screen stands still")
                return own_seconds(tool.pid)

            master = fleet.master.pid
            meters = {"terminal": meter, "master": lambda: cpu_seconds(master)}
            loads = beside_bare(stage, 4, meters)
            memory = own_memory(tool.pid)
    yield from load_rows(stage, "terminal", loads["terminal"])
    yield figure("terminal: memory", memory / MIB)
    yield figure("1000 in jobs: CPU", 100 * loads["master"].share)


# ==========================================================================================
# Benches of the page
# ==========================================================================================


@bench()
def page(stage):
    """The page of 1,000 nodes while 1,000 agents send: a request about every 50 ms, one by one.

    Most are answered from the cache of a quarter of a second; p99 is that of one made anew.
    """
    with Fleet(stage, 1000) as fleet:
        times, sizes = [], []
        for _ in range(400):
            status, body, took = fetch(fleet.master.page)
            if status != 200:
                raise ValueError("the page answered %d" % status)
            times.append(1000 * took)
            sizes.append(len(body))
            time.sleep(random.uniform(0, 0.1))
    note = "p50 %.0f ms, %.0f KiB" % (
        percentile(times, 50),
        statistics.mean(sizes) / KIB,
    )
    yield figure("page", percentile(times, 99), note)


BUCKETS = 100000  # of 10 us: how often the lock was held for so long
HOLDERS = ("collector", "dashboard", "MainProcess")
LOCK_PATCH = """
import mmap, time
import multiprocessing
file = open(%r, "r+b")
held = mmap.mmap(file.fileno(), 0)
size, names = %d, %r
counts = {name: memoryview(held).cast("Q")[n * size:(n + 1) * size]
          for n, name in enumerate(names)}
class TimedLock:
    def __init__(self, lock):
        self.lock, self.since = lock, 0.0
    def acquire(self, *args):
        got = self.lock.acquire(*args)
        if got:
            self.since = time.perf_counter()
        return got
    def release(self):
        took = int((time.perf_counter() - self.since) * 1e5)
        counts[multiprocessing.current_process().name][min(size - 1, took)] += 1
        self.lock.release()
plain = multiprocessing.Lock
multiprocessing.Lock = lambda: TimedLock(plain())
"""


@bench()
def lock(stage):
    """How long the table's lock is held with 1,000 agents and a page every 100 ms.

    The lock of a running master is wrapped: each release notes how long it was held, in a file.
    The collector writes one sample at a time, the dashboard copies the whole table.  The worst
    of each is told beside it: what a holder waits for when the load takes its CPU away.
    """
    path = os.path.join(stage.folder, "held")
    with open(path, "wb") as file:
        file.write(bytes(8 * BUCKETS * len(HOLDERS)))
    with Fleet(stage, 1000, patch=LOCK_PATCH % (path, BUCKETS, HOLDERS)) as fleet:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            fetch(fleet.master.page)
            time.sleep(0.1)
    with open(path, "rb") as file, mmap.mmap(
        file.fileno(), 0, access=mmap.ACCESS_READ
    ) as held:
        counts = [n for (n,) in struct.iter_unpack("=Q", held)]
    for n, key, percent in (
        (0, "lock: a sample", 99.9),
        (1, "lock: a copy", 90),  # 3 a second, no more
    ):
        holds = []
        for bucket, count in enumerate(counts[n * BUCKETS : (n + 1) * BUCKETS]):
            holds += [bucket / 100.0] * count
        note = "%d times, worst %.2f ms" % (len(holds), max(holds))
        yield figure(key, percentile(holds, percent), note)


# ==========================================================================================
# Benches of the bridge
# ==========================================================================================


def throughput(port, streams, seconds):
    """Bits a second that iperf3 gets to its server through that port."""
    command = [
        need("iperf3"),
        "-c",
        support.HOST,
        "-p",
        str(port),
        "-P",
        str(streams),
        "-t",
        str(seconds),
        "-J",
    ]
    for _ in range(10):
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60)
        answer = json.loads(done.stdout.decode())
        if "busy" not in answer.get("error", ""):
            break
        time.sleep(0.5)  # the server still ends the test before
    if "error" in answer:
        raise ValueError("iperf3: " + answer["error"])
    return answer["end"]["sum_received"]["bits_per_second"]


@bench(quick=True)
def bridge_throughput(stage):
    """iperf3 through port_forward.py and through socat, in turns; the median of each."""
    iperf, socat = need("iperf3"), need("socat")
    target, port = free_port(), free_port()
    rounds = stage.seconds(5, 3)
    with run_peer(iperf, "-s", "-B", support.HOST, "-p", target), start_bridge(
        target
    ) as ours, run_peer(
        socat,
        "TCP-LISTEN:%d,bind=%s,fork,reuseaddr,backlog=128" % (port, support.HOST),
        "TCP:%s:%d" % (support.HOST, target),
    ):
        support.eventually(lambda: listens(target) and listens(port))
        for streams, key in ((1, "1 stream"), (50, "50 streams")):
            speeds = []
            for _ in range(rounds):
                mine = throughput(ours.port, streams, 2)
                speeds.append((mine, throughput(port, streams, 2)))
            mine, theirs = (statistics.median(column) for column in zip(*speeds))
            note = "%.1f / %.1f Gbit/s" % (mine / 1e9, theirs / 1e9)
            yield figure(key, mine / theirs, note)
            if stage.quick:
                break


@bench()
def bridge_idle(stage):
    """1,000 connections through the bridge on which nothing is said."""
    with Sink() as sink, start_bridge(
        sink.port
    ) as bridge, contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(
                socket.create_connection((support.HOST, bridge.port), 10)
            )
        support.eventually(lambda: len(sink.socks) == 1000)
        settle(bridge.pid)
        (share,) = cpu_share(30, [bridge.pid])
        memory = pss_bytes(bridge.pid)
    yield figure("idle bridge", 100 * share, "%.1f MiB" % (memory / MIB))


@bench()
def bridge_agents(stage):
    """1,000 agents at 2 s through the bridge: what they cost there."""
    with Fleet(stage, 1000, bridge=True) as fleet:
        (share,) = cpu_share(20, [fleet.bridge.pid])
        memory = pss_bytes(fleet.bridge.pid)
    yield figure("busy bridge", 100 * share, "%.1f MiB" % (memory / MIB))


# ==========================================================================================
# Benches of times
# ==========================================================================================


@bench(quick=True)
def detection(stage):
    """Twenty nodes send, then fall silent at odd moments; until each has left the table."""
    trials, last, gone, beats = 20, {}, {}, [0.0] * 20
    with support.start_master() as master, contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(support.PlainAgent(master.port)) for _ in range(trials)
        ]
        stops = [time.monotonic() + random.uniform(1, 3) for _ in agents]
        while len(gone) < trials:
            now = time.monotonic()
            for i, agent in enumerate(agents):
                if beats[i] <= now < stops[i]:
                    agent.send({"cpu": 15.5, "ram": 40.2})
                    last[i], beats[i] = time.monotonic(), now + random.uniform(0.2, 0.6)
            here = support.slots("sentinel_%d" % master.port)
            for i, agent in enumerate(agents):
                if now > stops[i] and i not in gone and repr(agent.address) not in here:
                    gone[i] = time.monotonic() - last[i]
            if now > max(stops) + 20:
                raise ValueError("a silent node stays in the table")
            time.sleep(0.01)
    median = statistics.median(gone.values())
    yield figure("detection", max(gone.values()), "median %.2f s" % median)


def time_to_page():
    """Seconds from the start of a master to its first page, served."""
    port, start = free_port(), time.monotonic()

    def served():
        with contextlib.suppress(ConnectionError):
            return fetch(port)[0] == 200
        return False

    with support.start("master_server.py", "--port", 0, "--dashboard-port", port):
        while not served():
            if time.monotonic() - start > support.PATIENCE:
                raise ValueError("no page from the master")
            time.sleep(0.005)
        return time.monotonic() - start


@bench()
def startup(stage):
    """From the start of master_server.py to the first page, served: the median of five."""
    times = [1000 * time_to_page() for _ in range(5)]
    yield figure("start", statistics.median(times), "worst %.0f ms" % max(times))


# ==========================================================================================
# Benches of other agents
# ==========================================================================================

COLLECTD = """
Interval %(interval)g
BaseDir "%(folder)s"
PIDFile "%(folder)s/pid"
LoadPlugin cpu
LoadPlugin memory
LoadPlugin load
LoadPlugin swap
LoadPlugin uptime
LoadPlugin interface
LoadPlugin disk
LoadPlugin df
LoadPlugin network
<Plugin network>
  Server "127.0.0.1" "%(port)d"
</Plugin>
"""


def beside_agent(stage, pid, ask=None):
    """(cpu, memory) of an agent with everything on and of a peer, at the same time."""
    with Sink() as sink, start_full_agent(stage, sink.port) as agent:
        support.eventually(lambda: sink.count >= 3)
        stop = threading.Event()

        def scrape():
            while ask and not stop.wait(INTERVAL):
                ask()

        scraper = threading.Thread(target=scrape)
        scraper.start()
        settle(pid)
        shares = cpu_share(60, [agent.pid], [pid])
        stop.set()
        scraper.join()
        return (shares[0], pss_bytes(agent.pid)), (shares[1], pss_bytes(pid))


def compare(name, ours, theirs):
    """The rows of an agent beside another one."""
    note = "%.3f / %.3f %% of a core" % (100 * ours[0], 100 * theirs[0])
    yield figure("%s: CPU" % name, ours[0] / theirs[0], note)
    note = "%.1f / %.1f MiB" % (ours[1] / MIB, theirs[1] / MIB)
    yield figure("%s: memory" % name, ours[1] / theirs[1], note)


@bench()
def node_exporter(stage):
    """An agent beside Prometheus's node_exporter with its defaults, scraped every 2 s."""
    port = free_port()
    with run_peer(
        need("prometheus-node-exporter", "node_exporter"),
        "--web.listen-address",
        "%s:%d" % (support.HOST, port),
    ) as peer:
        support.eventually(lambda: fetch(port, "/metrics")[0] == 200)
        yield from compare(
            "node_exporter",
            *beside_agent(stage, peer.pid, lambda: fetch(port, "/metrics")),
        )


@bench()
def collectd(stage):
    """An agent beside collectd, which reads as much every 2 s and sends it by UDP."""
    program = need("collectd")
    with tempfile.TemporaryDirectory() as folder, socket.socket(
        type=socket.SOCK_DGRAM
    ) as sink:
        sink.bind((support.HOST, 0))
        path = os.path.join(folder, "collectd.conf")
        with open(path, "w") as file:
            file.write(
                COLLECTD
                % {
                    "interval": INTERVAL,
                    "folder": folder,
                    "port": sink.getsockname()[1],
                }
            )
        with run_peer(program, "-f", "-C", path) as peer:
            yield from compare("collectd", *beside_agent(stage, peer.pid))


# ==========================================================================================
# Command line
# ==========================================================================================


def measure(name, stage, rows):
    """Run one bench; its rows are put into the list and shown as soon as they are known.

    With --quick a row that is neither a ratio nor a count is told without its bound.
    """
    function, _ = BENCHES[name]
    rows.clear()
    for row in function(stage):
        if stage.quick and not row.portable:
            row = row.only_told()
        rows.append(row)
        print("  " + "  ".join(cell for cell in row.cells() if cell), file=sys.stderr)


def run_benches(names, stage):
    """Run them in order: (rows with the bench they are of, what was skipped or failed).

    With --quick, one that is far over a bound has a second chance, for its windows are short,
    and says so; but not one that counts what must not happen at all.
    """
    rows, skipped, failed = [], {}, {}
    for name in names:
        start, found = time.monotonic(), []
        print("%s ..." % name, file=sys.stderr, flush=True)
        try:
            measure(name, stage, found)
            over = [row for row in found if not row.within(TOLERANCE)]
            if stage.quick and over and all(row.bound for row in over):
                print("  far over its bound: once more", file=sys.stderr)
                measure(name, stage, found)
                first = {
                    row.what: "%s at first" % show(row.value, row.unit) for row in over
                }
                found[:] = [
                    row._replace(
                        note=", ".join(filter(None, (row.note, first.get(row.what))))
                    )
                    for row in found
                ]
        except Missing as error:
            skipped[name] = "missing here: %s" % error
        except (
            AssertionError,
            ArithmeticError,
            LookupError,
            OSError,
            ValueError,
            http.client.HTTPException,
            subprocess.SubprocessError,
        ) as error:
            failed[name] = "%s: %.500s" % (type(error).__name__, error)
        rows += [(name, row) for row in found]
        for text in (skipped.get(name), failed.get(name)):
            if text:
                print("  " + text, file=sys.stderr)
        print("  %.0f s" % (time.monotonic() - start), file=sys.stderr, flush=True)
    return rows, skipped, failed


def check_writable(parser, path):
    """End with a usage error when no file can be made there: before the work, not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        parser.error("--json: no file can be written at %r" % path)


def write_json(path, machine, rows, skipped, failed):
    """Every figure, for programs."""
    with open(path, "w") as file:
        json.dump(
            {
                "machine": machine,
                "skipped": skipped,
                "failed": failed,
                "rows": [
                    dict(row._asdict(), bench=name, holds=row.holds)
                    for name, row in rows
                ],
            },
            file,
            indent=1,
        )
        file.write("\n")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--only",
        metavar="NAME",
        action="append",
        choices=list(BENCHES),
        help="this measurement; may be repeated",
    )
    add("--quick", action="store_true", help="for CI: less of it, for less long")
    add(
        "--json",
        metavar="FILE",
        default="bench.json",
        help="write the figures there (bench.json)",
    )
    add("--list", action="store_true", help="name and explain the measurements")
    return parser


def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.list:
        for name, (function, _) in BENCHES.items():
            print("%-18s %s" % (name, function.__doc__.partition("\n")[0]))
        return 0
    check_writable(parser, options.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the tools end, too
    machine = describe_machine()
    names = options.only or [
        name for name, (_, quick) in BENCHES.items() if quick or not options.quick
    ]
    with tempfile.TemporaryDirectory(prefix="sentinel-bench-") as folder:
        rows, skipped, failed = run_benches(names, Stage(options.quick, folder))
    print(MACHINE % machine)
    if machine["busy_before"] > 0.1:
        print(
            "busy with something else when this began (%.0f %%): do not trust the figures"
            % (100 * machine["busy_before"])
        )
    print(render_table([row for _, row in rows]))
    for title, names in (("skipped", skipped), ("failed", failed)):
        for name, text in names.items():
            print("%s: %s: %s" % (title, name, text))
    write_json(options.json, machine, rows, skipped, failed)
    tolerance = TOLERANCE if options.quick else 1.0
    forgiven = sum(row.holds is False and row.within(tolerance) for _, row in rows)
    if forgiven:
        print(
            "%d over its bound, by less than the third that --quick allows for noise"
            % forgiven
        )
    if failed or skipped and os.environ.get("SENTINEL_TEST_ALL") == "1":
        return 1
    return 0 if all(row.within(tolerance) for _, row in rows) else 1


if __name__ == "__main__":
    support.COMPILED = False
    sys.exit(main())
