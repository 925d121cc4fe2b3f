#!/usr/bin/env python3
"""master_server.py - see all of your Slurm jobs live, with an account and nothing else.

    python3 master_server.py --ssh you@login    on your laptop
    python3 master_server.py --my-jobs          on the login node
    python3 master_server.py --demo             invented jobs, to have a look
    python3 master_server.py                    where agents that you start yourself dial

Then open the address that it prints, or add --tui for screens in the terminal.

    agents --TCP--> collector --> shared-memory table --> dashboard --HTTP--> browser, curl
                        `-> alerts: log, --alert-command, --notify

It needs Python 3.8 or newer, and agent.py beside it for the jobs.  It writes no file but records
of the jobs that it watches, and a secret that you ask for.  Its processes: this one supervises,
the collector has one thread for each agent, the dashboard answers browsers, and the recorder
keeps the records.  Each of these is started again when it dies.

Exit codes: 0 stopped by SIGINT, SIGTERM or SIGHUP, 1 could not start, 2 bad usage;
of --explain: 0 fine, 1 advice, 2 problem, 3 died, 4 no record of such a job.
"""

# The rooms of this file, in their order.  A room uses the rooms above it, and none below.
#
#   Words          the few constants and types that several rooms share
#   Metrics        the one list of what is measured; all formats and layouts follow from it
#   Wire           bytes of a peer -> a sample: bounded, and nothing here unpickles
#   Table          shared memory: the only room that knows offsets, lock and sequence number
#   Alerts         rules -> what fires and what is resolved; the runner of --alert-command
#   Verdicts       what is known of a job -> what is wrong with it, or why it died: pure
#   Notify         events and verdicts -> messages to chats, phones and mail: --notify
#   Collector      agents' sockets -> wire -> table and alerts: a thread for each agent
#   Records        a job's whole life -> a file of its own, and back
#   The page       a copy of the table -> HTML, and nobody else knows HTML.  Nine rooms: Style
#                  sheet, Script, Markup, Readings, Selection, Jobs, Headline, Columns, Pages
#   For programs   a copy of the table -> JSON, CSV, text, Prometheus
#   Reports        records -> HTML, JSON, CSV, text: whole jobs, of now and of the past
#   Dashboard      browsers' sockets -> request -> pages: a thread for each connection
#   Terminal       --tui: the log goes through a pipe, and test_reader.py shows screens above it
#   Demo           invented jobs, for --demo: what their agents would send, by the clock
#   Recorder       a copy of the table -> records, on a thread that may wait for a disk
#   Supervisor     processes and signals: the only room that starts or ends a process of ours
#   Command line   flags -> options, and the way from there to the supervisor

import os
import sys

if __name__ == "__main__":
    # CPython keeps the tree that it has parsed the main program into for as long as that runs:
    # 25 MiB of this one, since 3.9, which each role would have as well.  Of a text that `exec`
    # gets compiled it keeps none.  So the same process starts once more, with that, if it is to
    # stay.  A text from a pipe cannot be read again, and a debugger would lose its program.
    # With the GNU C library each thread keeps what it has freed last, for itself alone: 3 KiB of
    # each agent's.  It is told at the start of a process not to (mallopt(3), GLIBC_TUNABLES), and
    # no other program that this one starts is to know of it.
    TUNABLES = "glibc.malloc.tcache_count=0"
    RESTART = (
        """\
"master_server.py"
import os
import sys
if os.environ.get("GLIBC_TUNABLES") == "%s":
    del os.environ["GLIBC_TUNABLES"]
__file__ = sys.argv[1]
sys.argv[:2] = [__file__]
if sys.path[:1] == [""]:
    sys.path[0] = os.path.dirname(os.path.abspath(__file__))
with open(__file__, "rb") as file:
    CODE = compile(file.read(), __file__, "exec")
exec(CODE)"""
        % TUNABLES
    )
    words = getattr(sys, "orig_argv", [])  # since Python 3.10
    options = words[1 : -len(sys.argv)]  # of the interpreter
    is_script = words[-len(sys.argv) :] == sys.argv and os.path.isfile(sys.argv[0])
    is_first = not {"-c", "-m"}.intersection(options)
    is_brief = any(
        word.startswith(("-h", "--help", "--version", "--explain"))
        for word in sys.argv[1:]
    )
    if is_script and is_first and not is_brief and sys.executable:
        restarted = [sys.executable, *options, "-c", RESTART, *sys.argv]
        environ = dict({"GLIBC_TUNABLES": TUNABLES}, **os.environ)
        try:
            os.execve(sys.executable, restarted, environ)
        except OSError:
            pass  # then it takes more memory
    # A json.py or select.py of the user's own, in this folder, must not hide the standard
    # library's: the folder that Python searches first comes last.
    sys.path.append(sys.path.pop(0))

import _thread
import argparse
import array
import base64
import bisect
import collections
import contextlib
import csv
import errno
import functools
import gc
import getpass
import gzip
import hashlib
import heapq
import hmac
import html
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import operator
import queue
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import types
import unicodedata
import urllib.parse
import zlib
from http import HTTPStatus
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows: main() says what is needed
    resource = None  # type: ignore[assignment]
try:
    from multiprocessing import resource_tracker, shared_memory
except ImportError:  # Python 3.6 and 3.7: main() says what is needed
    shared_memory = None  # type: ignore[assignment]

# ============================================================================
# Words: what several rooms share
# ============================================================================

VERSION = "2.0"
MAX_SAMPLE = 16384  # bytes of one pickled sample
RECEIVE_SIZE = 1024  # bytes that are read at a time; a sample has 600 to 800
GONE_SECONDS = 600.0  # how long a node that left is remembered
STALE_SECONDS = 3.0  # without a heartbeat: the collector has stopped
EXIT_LOCK = 75  # exit code of a role that could not get the table's lock
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEMO_NOTICE = "A demonstration: all of these jobs and nodes are invented"

Message = Dict[str, Any]  # a decoded dict, or a node of a snapshot
Row = Tuple[Any, ...]  # a sample, as METRICS has it: floats, UTF-8; see UNKNOWN
PartRow = Tuple[str, Row]  # a kind of PART_FIELDS, and what it has
PastRow = Tuple[float, Row]  # time.time(), and what PAST_KEYS were then
Address = Tuple[Any, ...]  # a peer's, as accept() has it: host, port, ...
Serve = Callable[[socket.socket, Address], None]  # what a thread does with a connection
log = logging.getLogger("sentinel")

# ============================================================================
# Metrics: the one list.  Layout, JSON, CSV, Prometheus, text and page follow.
# ============================================================================


class Metric(NamedTuple):
    """One thing that an agent measures or says of its node."""

    key: str  # in a sample, in JSON and in the header of the CSV
    code: str  # in the table, as struct has it: f or d for a number, 64s for a text
    unit: str  # %, B (bytes), B/s, s (seconds); "" for a text and for a bare number
    label: str  # on the page
    prometheus: str  # the name in /metrics, behind sentinel_; "" when it is not there
    help: str  # what it is, for people


# A new one is a line here and a reader in agent.py; tests/README.md has a table of them.
# fmt: off
METRICS = (
    # cpu and ram come first: every sample has them, and they alone are in the slot itself
    Metric("cpu", "f", "%", "CPU", "cpu_percent", "CPU time in use, all cores together"),
    Metric("ram", "f", "%", "RAM", "ram_percent", "Memory that is not available"),
    # who sends; the collector keeps these of each node: see KEPT
    Metric("node", "64s", "", "Node", "", "Name of the monitored machine"),
    Metric("job", "24s", "", "Job", "", "Slurm job id"),
    Metric("job_name", "64s", "", "Job name", "", "Slurm job name"),
    Metric("user", "32s", "", "User", "", "User that runs the agent"),
    Metric("version", "16s", "", "Agent", "", "Version of the agent"),
    Metric("interval", "d", "s", "Interval", "interval_seconds", "Time between samples"),
    # the node
    Metric("load1", "d", "", "Load", "load1", "Load average of one minute"),
    Metric("cpus", "d", "", "CPUs", "cpus", "CPUs that are online"),
    Metric("mem_total", "d", "B", "Memory", "memory_total_bytes", "Memory of the node"),
    Metric("mem_used", "d", "B", "Memory used", "memory_used_bytes", "Memory not available"),
    Metric("swap", "d", "%", "Swap", "swap_percent", "Swap space in use"),
    Metric("disk", "d", "%", "Disk", "disk_percent", "Working directory's filesystem in use"),
    Metric("disk_tmp", "d", "%", "/tmp", "disk_tmp_percent", "Filesystem of /tmp in use"),
    Metric("disk_shm", "d", "%", "/dev/shm", "disk_shm_percent", "Memory of /dev/shm in use"),
    Metric("inodes", "d", "%", "Inodes", "inodes_percent",
           "Inodes of the working directory's filesystem in use"),
    Metric("inodes_tmp", "d", "%", "/tmp inodes", "inodes_tmp_percent", "Inodes of /tmp in use"),
    Metric("disk_read", "d", "B/s", "Disk read", "disk_read_bytes_per_second",
           "Read from the node's local disks"),
    Metric("disk_write", "d", "B/s", "Disk write", "disk_write_bytes_per_second",
           "Written to the node's local disks"),
    Metric("net_rx", "d", "B/s", "Received", "network_receive_bytes_per_second", "Received"),
    Metric("net_tx", "d", "B/s", "Sent", "network_transmit_bytes_per_second", "Sent"),
    Metric("ib_rx", "d", "B/s", "IB received", "infiniband_receive_bytes_per_second",
           "Received over InfiniBand or Omni-Path, all ports"),
    Metric("ib_tx", "d", "B/s", "IB sent", "infiniband_transmit_bytes_per_second",
           "Sent over InfiniBand or Omni-Path, all ports"),
    Metric("nfs_ops", "d", "/s", "NFS calls", "nfs_operations_per_second",
           "Operations on the node's NFS mounts"),
    Metric("nfs_rtt", "d", "s", "NFS answer", "nfs_round_trip_seconds",
           "Mean round trip of an NFS operation"),
    Metric("lustre_read", "d", "B/s", "Lustre read", "lustre_read_bytes_per_second",
           "Read from Lustre by the node"),
    Metric("lustre_write", "d", "B/s", "Lustre write", "lustre_write_bytes_per_second",
           "Written to Lustre by the node"),
    Metric("psi_cpu", "d", "%", "CPU wait", "pressure_cpu_percent", "Tasks waiting for CPU"),
    Metric("psi_mem", "d", "%", "Memory wait", "pressure_memory_percent",
           "Tasks waiting for memory"),
    Metric("psi_io", "d", "%", "I/O wait", "pressure_io_percent", "Tasks waiting for I/O"),
    Metric("procs", "d", "", "Processes", "processes", "Processes and threads"),
    Metric("uptime", "d", "s", "Uptime", "uptime_seconds", "Time since the node's boot"),
    Metric("gpus", "d", "", "GPUs", "gpus", "GPUs that the agent sees"),
    Metric("gpu", "d", "%", "GPU", "gpu_percent", "GPU utilisation, mean"),
    Metric("gpu_min", "d", "%", "Idlest GPU", "gpu_min_percent", "Utilisation of the idlest GPU"),
    Metric("gpu_mem", "d", "%", "GPU memory", "gpu_memory_percent", "GPU memory in use"),
    # the job on the node
    Metric("job_cpus", "d", "", "Job CPUs", "job_cpus", "CPUs allocated to the job here"),
    Metric("job_cpu", "d", "%", "Job CPU", "job_cpu_percent", "Allocated CPUs in use"),
    Metric("cores_busy", "d", "", "Busy CPUs", "cores_busy", "Job's CPUs over half busy"),
    Metric("job_mem", "d", "B", "Job memory", "job_memory_bytes", "Anonymous and shared memory"),
    Metric("job_cache", "d", "B", "Job cache", "job_cache_bytes", "Page cache of the job"),
    Metric("job_mem_peak", "d", "B", "Job peak", "job_memory_peak_bytes",
           "Most memory ever, as the kernel counts: with page cache"),
    Metric("job_mem_limit", "d", "B", "Job limit", "job_memory_limit_bytes", "Memory limit"),
    Metric("job_mem_failcnt", "d", "", "Limit hit", "job_memory_limit_hits",
           "How often the memory limit was hit"),
    Metric("oom_kill", "d", "", "OOM kills", "job_oom_kills",
           "Processes of the job that the kernel killed for want of memory"),
    Metric("job_ram", "d", "%", "Job RAM", "job_ram_percent", "Job's memory limit in use"),
    Metric("job_read", "d", "B/s", "Job read", "job_read_bytes_per_second",
           "Read by the job's processes, cache and pipes included"),
    Metric("job_write", "d", "B/s", "Job write", "job_write_bytes_per_second",
           "Written by the job's processes, cache and pipes included"),
    Metric("job_time_limit", "d", "s", "Time limit", "job_time_limit_seconds",
           "Time limit of the job"),
    Metric("job_time_left", "d", "s", "Time left", "job_time_left_seconds",
           "Time until the job's limit"),
    # the agent itself
    Metric("agent_cpu", "d", "%", "Agent CPU", "agent_cpu_percent", "The agent's own CPU"),
    Metric("agent_rss", "d", "B", "Agent memory", "agent_rss_bytes", "The agent's own memory"),
)
# fmt: on
TEXTS = {m.key: m for m in METRICS if m.code.endswith("s")}
NUMBERS = {m.key: m for m in METRICS if m.key not in TEXTS}
# Bytes and counts: a whole number of them is written whole.  A load is neither.
WHOLE = [key for key, m in NUMBERS.items() if m.unit in ("B", "") and key != "load1"]
DETAILS = METRICS[2:]  # those that a slot does not hold
INDEX = {m.key: index for index, m in enumerate(METRICS)}  # where it is in a Row
KEPT = INDEX["interval"] + 1  # of a row: what is kept of it to tell of its node
UNKNOWN: Row = tuple(b"" if m.key in TEXTS else math.nan for m in METRICS)

# What Slurm says of a job, as the herd of agent.py --jobs passes it on: key, struct code
JOB_FACTS = (
    ("job", "24s"),  # as squeue has it: 4711, 4711_3, 4711_[4-9]
    ("raw", "24s"),  # the id that srun takes
    ("array", "24s"),
    ("job_name", "64s"),
    ("user", "32s"),
    ("state", "16s"),  # PENDING, RUNNING, COMPLETED ...: squeue(1), JOB STATE CODES
    ("reason", "64s"),
    ("partition", "32s"),
    ("nodelist", "128s"),
    ("exit", "16s"),  # CODE:SIGNAL
    ("derived_exit", "16s"),  # of the worst step: 0:125 is out of memory
    ("cancelled_by", "32s"),  # a user, or the uid of one without a name
    ("failed_step", "64s"),  # the first, in words; only accounting tells
    ("nodes", "d"),
    ("cpus", "d"),
    ("gpus", "d"),
    ("mem", "d"),  # bytes that were asked for, as squeue's %m
    ("submit", "d"),  # time.time(), and so are start and end
    ("start", "d"),
    ("end", "d"),
    ("limit", "d"),  # seconds
)
JOB_KEYS = tuple(key for key, _ in JOB_FACTS)
WHOLE_FACTS = ("nodes", "cpus", "gpus", "mem")  # counts and bytes, as WHOLE

# What an agent tells of a job's processes, CPUs and GPUs on its node, a dict each: {"part": "rank",
# ...}.  All dicts of one instant are a look, which begins with {"part": "look", ...}.
# The kinds, and of each: key, struct code
PART_FIELDS = {
    "look": (
        ("look", "d"),  # counts the looks of an agent
        ("processes", "d"),  # of the job on this node
        ("shown", "d"),  # of them, as ranks
        ("cpus", "255s"),  # that the job may use: 0-3,8
    ),
    "core": (
        ("first", "d"),  # the CPU of the first character
        ("busy", "240s"),  # a character a CPU: 0 to 9 tenths, - unknown
    ),
    "rank": (
        ("pid", "d"),
        ("rank", "d"),  # of all in the job or step
        ("local_rank", "d"),  # of those on the node
        ("step", "12s"),
        ("program", "32s"),
        ("cpu", "d"),  # % of one core
        ("mem", "d"),  # bytes
        ("peak", "d"),
        ("threads", "d"),
        ("running", "d"),  # threads that can run
        ("cpus", "96s"),  # that it may use
        ("on", "48s"),  # where its threads ran last
        ("state", "4s"),  # R, S, D ...: proc(5)
        ("wchan", "32s"),  # what it waits in
        ("read", "d"),  # bytes per second
        ("write", "d"),
        ("read_total", "d"),  # bytes
        ("write_total", "d"),
        ("gpu", "32s"),  # indices of the GPUs that it uses
    ),
    "gpu": (
        ("index", "d"),
        ("uuid", "48s"),
        ("name", "48s"),
        ("gpu", "d"),  # % busy
        ("mem_used", "d"),  # bytes
        ("mem_total", "d"),
        ("power", "d"),  # watts
        ("power_limit", "d"),
        ("temp", "d"),  # degrees Celsius
        ("throttle", "48s"),  # why it is slowed
        ("mig", "48s"),
        ("processes", "d"),
        ("error", "64s"),  # why it cannot be read
    ),
}
PART_KINDS = tuple(PART_FIELDS)
WHOLE_PARTS = (  # counts and bytes, as WHOLE
    "look processes shown first pid rank local_rank mem peak threads running"
    " read_total write_total index mem_used mem_total"
).split()
# What an agent tells of the time of a cut: {"part": "past", "age": SECONDS, "cpu": ..., ...}
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
MAX_AGE = 3700.0  # seconds: agents keep an hour, and it takes a while to send it
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

# ============================================================================
# Wire: bytes -> sample.  Bounded, one error type, and nothing that unpickles.
# ============================================================================
#
# A sample is a pickled flat dict, and a pickle is a program for a small machine with a stack.
# pickletools.dis() shows that of {"cpu": 15.5} in protocol 4 so (with the bytes themselves):
#
#     80 04                       PROTO             4
#     95 13 00 00 00 00 00 00 00  FRAME             19 bytes follow
#     7d                          EMPTY_DICT
#     94                          MEMOIZE           so that a later BINGET can repeat it
#     8c 03 63 70 75              SHORT_BINUNICODE  'cpu', 3 bytes
#     94                          MEMOIZE
#     47 40 2f 00 00 00 00 00 00  BINFLOAT          15.5
#     73                          SETITEM           or MARK before many items, SETITEMS after
#     2e                          STOP
#
# pickle.loads() would run whatever program a peer sends.  Here each opcode is looked at, the
# dict is built by this code, and an opcode that a flat dict does not need ends the connection.

MAX_KEYS = 64  # keys of a sample
MAX_TEXT = 255  # UTF-8 bytes of a string
MAX_OPCODES = 8 * MAX_KEYS  # opcodes of a pickle
PROTOCOLS = range(2, 6)

# The opcodes that a flat dict of None, bool, int, float and str needs, as pickletools lists
# them: the byte, its name and its argument.  See MAX_SIZES for what an argument may be.
OPCODES = {
    code: (name, struct.Struct(layout))
    for code, name, layout in (
        (0x80, "PROTO", "B"),
        (0x95, "FRAME", "<Q"),
        (0x2E, "STOP", ""),
        # the dict
        (0x7D, "EMPTY_DICT", ""),
        (0x28, "MARK", ""),
        (0x73, "SETITEM", ""),
        (0x75, "SETITEMS", ""),
        # the memo: what was put there comes again by its number
        (0x94, "MEMOIZE", ""),
        (0x71, "BINPUT", "B"),
        (0x72, "LONG_BINPUT", "<I"),
        (0x68, "BINGET", "B"),
        (0x6A, "LONG_BINGET", "<I"),
        # keys and values
        (0x4E, "NONE", ""),
        (0x88, "NEWTRUE", ""),
        (0x89, "NEWFALSE", ""),
        (0x4B, "BININT1", "B"),
        (0x4D, "BININT2", "<H"),
        (0x4A, "BININT", "<i"),
        (0x47, "BINFLOAT", ">d"),
        (0x8A, "LONG1", "B"),
        (0x8C, "SHORT_BINUNICODE", "B"),
        (0x58, "BINUNICODE", "<I"),
    )
}
# The argument of these is the size of the bytes that follow and are the value: at most so many.
MAX_SIZES = {"LONG1": 8, "SHORT_BINUNICODE": MAX_TEXT, "BINUNICODE": MAX_TEXT}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SCALARS = {"BININT1", "BININT2", "BININT", "BINFLOAT"} | set(MAX_SIZES)
PUTS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
GETS = {"BINGET", "LONG_BINGET"}
FLOAT = struct.Struct(">d")  # the argument of a BINFLOAT

# Of each float in a pickle: where its 8 bytes begin, and its key
Spots = Tuple[Tuple[int, Any], ...]


class WireError(Exception):
    """What a peer sent is not a sample.  The text says why; it is safe to send and to log."""


def parse_pickle(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """Read the pickled flat dict (protocols 2 to 5) that data begins with: (dict, size, floats).

    None while it is incomplete; WireError as soon as it cannot become one.  Nothing is built
    but that dict, and no length that a peer claims is believed: it is compared with its limit.
    """
    return parse_usual(data) or parse_opcodes(data)


def parse_usual(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """What parse_opcodes() returns, in a fifth of the time, of what CPython's pickler writes.

    None for all else: what is rare, incomplete, too long or wrong is for parse_opcodes().
    """
    frame = int.from_bytes(data[3:11], "little")
    if data[:3] != b"\x80\x04\x95" or frame > MAX_SAMPLE or data[11:14] != b"}\x94(":
        return None
    result: Message = {}
    floats: List[Tuple[int, Any]] = []
    memo: List[Any] = [None]  # the dict, then the texts
    key: Any = None
    value: Any
    at = 14
    try:
        while True:
            code = data[at]
            if code == 0x8C:  # SHORT_BINUNICODE, and MEMOIZE behind it
                end = at + 2 + data[at + 1]
                value = data[at + 2 : end].decode()
                if data[end] != 0x94:
                    return None
                memo.append(value)
                at = end + 1
            elif code == 0x47:  # BINFLOAT
                value = FLOAT.unpack_from(data, at + 1)[0]
                if not math.isfinite(value):
                    return None
                floats.append((at + 1, key))
                at += 9
            elif code == 0x4B:  # BININT1
                value = data[at + 1]
                at += 2
            elif code == 0x4D:  # BININT2
                value = data[at + 1] + 256 * data[at + 2]
                at += 3
            elif code == 0x4A:  # BININT
                value = int.from_bytes(data[at + 1 : at + 5], "little", signed=True)
                at += 5
            elif code == 0x8A and data[at + 1] <= MAX_SIZES["LONG1"]:
                end = at + 2 + data[at + 1]
                value = int.from_bytes(data[at + 2 : end], "little", signed=True)
                at = end
            elif code == 0x68:  # BINGET
                value = memo[data[at + 1]]
                at += 2
                if value is None:
                    return None
            elif code == 0x75 and key is None and data[at + 1] == 0x2E:
                end = at + 2  # behind SETITEMS and STOP
                is_good = len(result) <= MAX_KEYS and end <= MAX_SAMPLE
                return (result, end, tuple(floats)) if is_good else None
            else:
                return None
            if key is not None:
                result[key] = value
                key = None
            elif type(value) is str and value not in result:
                key = value
            else:
                return None
    except (IndexError, struct.error, UnicodeDecodeError):
        return None


def parse_opcodes(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """The same as parse_pickle(), opcode by opcode."""
    if data[0] != 0x80:
        raise WireError(foreign_reason(data))
    result: Message = {}
    items: List[Any] = []  # the stack: keys and values that are not in the dict yet
    memo: Dict[int, Any] = {}
    floats: List[Tuple[int, Any]] = []
    has_begun = False  # the dict is there
    is_marked = False  # a MARK is below the items, which waits for SETITEMS
    for name, arg, start, end in read_opcodes(data[:MAX_SAMPLE]):
        top = items[-1] if items else None
        if name in SCALARS:
            if name == "BINFLOAT":
                floats.append((start, top))
            items.append(arg)
        elif name in CONSTANTS:
            items.append(CONSTANTS[name])
        elif name in PUTS:
            memo[len(memo) if arg is None else arg] = top
        elif name in GETS and type(memo.get(arg)) is str:
            items.append(memo[arg])  # picklers memoize strings alone
        elif name == "EMPTY_DICT" and not has_begun:
            has_begun = True
        elif name == "MARK" and has_begun and not is_marked and not items:
            is_marked = True
        elif name == ("SETITEMS" if is_marked else "SETITEM"):
            set_items(result, items)
            items = []
            is_marked = False
        elif name == "STOP" and has_begun and not items and not is_marked:
            return result, end, tuple(floats)
        elif name == "FRAME" or name == "PROTO" and end == 2:
            continue  # they say nothing about the dict
        else:
            raise WireError("pickle opcode %s here; a sample is one flat dict" % name)
    if len(data) < MAX_SAMPLE:
        return None
    raise WireError("a sample of more than %d bytes" % MAX_SAMPLE)


def read_opcodes(data: bytes) -> Iterator[Tuple[str, Any, int, int]]:
    """(name, argument, where that begins, where it ends) of each opcode that is whole.

    Of an opcode of MAX_SIZES the argument is the value that follows.  WireError for an opcode
    or an argument that no sample has, as soon as it is seen.
    """
    end = 0
    for _ in range(MAX_OPCODES):
        if end == len(data):
            return
        if data[end] not in OPCODES:
            raise WireError(
                "pickle opcode 0x%02x; a sample is one flat dict of None, bool, int,"
                " float and str" % data[end]
            )
        name, layout = OPCODES[data[end]]
        start = end + 1
        end = start + layout.size
        if end > len(data):
            return
        arg: Any = layout.unpack_from(data, start)[0] if layout.size else None
        if name in MAX_SIZES:
            check_size(name, arg)
            start = end
            end = start + arg
            if end > len(data):
                return
            arg = read_sized(name, data[start:end])
        elif name in ("PROTO", "FRAME", "BINFLOAT"):
            check_argument(name, arg)
        yield name, arg, start, end
    raise WireError("a sample of more than %d opcodes" % MAX_OPCODES)


def check_size(name: str, size: int) -> None:
    """WireError when more bytes are to follow an opcode than may."""
    if size > MAX_SIZES[name]:
        raise WireError(
            "pickle opcode %s of %d bytes; at most %d are allowed"
            % (name, size, MAX_SIZES[name])
        )


def check_argument(name: str, arg: Any) -> None:
    """WireError for a protocol, a frame or a float that no sample has."""
    if name == "PROTO":
        is_good = arg in PROTOCOLS
    elif name == "FRAME":
        is_good = arg <= MAX_SAMPLE
    else:
        is_good = math.isfinite(arg)
    if not is_good:
        raise WireError(
            "%s %s; pickle protocols 2 to 5, frames of at most %d bytes and finite"
            " floats are allowed" % (name, arg, MAX_SAMPLE)
        )


def read_sized(name: str, raw: bytes) -> Union[int, str]:
    """The value of an integer's or a string's bytes."""
    if name == "LONG1":
        return int.from_bytes(raw, "little", signed=True)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise WireError("text that is not UTF-8") from None


def set_items(result: Message, items: List[Any]) -> None:
    """Put [key, value, key, value ...] into the dict."""
    keys = items[::2]
    values = items[1::2]
    if len(keys) != len(values) or not all(type(key) is str for key in keys):
        raise WireError("a dict with keys that are not text")
    result.update(zip(keys, values))
    if len(result) > MAX_KEYS:
        raise WireError("more than %d keys" % MAX_KEYS)


def foreign_reason(data: bytes) -> str:
    """Why bytes that do not begin a pickle are refused."""
    if re.match(rb"[A-Z]{1,8} ?", data) and data[:1] in b"CDGHOPT":
        return "HTTP on the agents' port; browsers have a port of their own"
    if data[:2] == b"\x16\x03":
        return "TLS on the agents' port; agents speak without it"
    return "bytes that are no pickle of protocol 2 to 5, and no JSON object"


# A sample may be a line of JSON as well (RFC 8259), for what cannot write pickles, such as a
# shell:
#
#     {"cpu": 15.5, "ram": 40.25, "node": "c1"}\n
#
# No pickle begins with a brace: that is the opcode of nothing.  The keys, the limits and the
# answers are those of pickles.  json.loads() would follow whatever nesting a peer sends, takes
# NaN, and the last of two equal keys: so pairs are taken one by one here, by a pattern that has
# no room for nesting, and json.loads() only ever sees one text or number.

JSON_BLANKS = r"[ \t\r]*"
JSON_TEXT = r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
JSON_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
JSON_VALUE = "%s|%s|null|true|false" % (JSON_TEXT, JSON_NUMBER)
JSON_PAIR = re.compile(  # a key, its value, and what is to follow: more, or the end
    "{0}({1}){0}:{0}({2}){0}([,}}])".format(JSON_BLANKS, JSON_TEXT, JSON_VALUE)
)
JSON_EMPTY = re.compile(JSON_BLANKS + "}")
JSON_END = re.compile(JSON_BLANKS)
JSON_DIGITS = 20  # of a whole number of 64 bits, with its sign
MAX_INT = 2**63 - 1


def parse_message(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """Read the flat dict that data begins with, a pickle or a line of JSON: see parse_pickle."""
    if data[:1] == b"{":
        return parse_line(data)
    return parse_pickle(data)


def parse_line(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """Read the JSON object that fills the first line of data: (dict, size of the line, ()).

    None while the line has no end; WireError when it is too long or no flat object.
    """
    size = data.find(b"\n", 0, MAX_SAMPLE) + 1
    if not size:
        if len(data) < MAX_SAMPLE:
            return None
        raise WireError("a sample of more than %d bytes" % MAX_SAMPLE)
    try:
        line = data[: size - 1].decode()
    except UnicodeDecodeError:
        raise WireError("text that is not UTF-8") from None
    result: Message = {}
    at = 1  # behind the brace
    empty = JSON_EMPTY.match(line, at)
    if empty:
        at = empty.end()
    while not empty:
        pair = JSON_PAIR.match(line, at)
        if not pair:
            raise not_flat(at)
        at = pair.end()
        key, value, mark = pair.groups()
        set_pair(result, read_json(key, at), read_json(value, at))
        if mark == "}":
            break
    if not JSON_END.fullmatch(line, at):
        raise not_flat(at)
    return result, size, ()


def not_flat(at: int) -> WireError:
    """What to raise where a line is no flat object, behind so many characters."""
    return WireError(
        "JSON that is not one flat dict of null, true, false, numbers and text a line,"
        " from character %d on" % (at + 1)
    )


def set_pair(result: Message, key: Any, value: Any) -> None:
    """Put a key and its value into the dict; WireError when it has that key, or too many."""
    if key in result:
        raise WireError("the key %s twice" % ascii(key)[:40])
    result[key] = value
    if len(result) > MAX_KEYS:
        raise WireError("more than %d keys" % MAX_KEYS)


def read_json(token: str, at: int) -> Any:
    """The value of one text, number or constant of JSON, which ends about there."""
    is_whole = token.lstrip("-").isdigit()
    if is_whole and len(token) > JSON_DIGITS:
        raise WireError("a whole number of more than 64 bits")
    try:
        value = json.loads(token)
    except ValueError:  # a backslash before what it cannot stand before
        raise not_flat(at) from None
    if is_whole and not -MAX_INT - 1 <= value <= MAX_INT:
        raise WireError("a whole number of more than 64 bits")
    if type(value) is float and not math.isfinite(value):
        raise WireError("%s; only finite floats are allowed" % token[:40])
    if type(value) is str:
        check_text(value)
    return value


def check_text(text: str) -> None:
    """WireError when a text of JSON is too long, or holds what UTF-8 cannot write."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half of a pair of \\u escapes
        raise WireError("text that is not UTF-8") from None
    if size > MAX_TEXT:
        raise WireError("a text of %d bytes; at most %d are allowed" % (size, MAX_TEXT))


# The short way.  Two samples of an agent differ, most of the time, in the bytes of their floats
# alone.  So of a sample that was found good its Shape is kept, and the next one is only compared
# with it, which takes a tenth of the time to read it again.  A sample of cpu and ram:
#
#     sample    ..}(..cpuG  15.5      ..ramG  40.25     u.
#     layout    10x         d         6x      d         2x      unpacks (15.5, 40.25)
#     mask      1111111111  00000000  111111  00000000  11      1: the byte must be the same
#     fixed     ..}(..cpuG  00000000  ..ramG  00000000  u.      what it must be there
#
# Taken as one large integer each, `sample & mask == fixed` compares all those bytes at once.
# The new row is picked from the new floats and, behind them, the rest of the old row:
#
#     floats + rest     (15.5, 40.25) + (nan, nan, b"c1", b"4711", ...)
#     order              0     1                   4      5              a place for each of a Row

FLOAT_SIZE = 8  # bytes of a BINFLOAT
FLOAT_MASK = (1 << 8 * FLOAT_SIZE) - 1


class Shape(NamedTuple):
    """What the samples share that differ in their floats alone."""

    size: int  # bytes of a sample
    layout: struct.Struct  # unpacks the floats of a sample, in their order there
    mask: int  # all bits set but those of the floats
    fixed: int  # what a sample has under the mask
    order: Callable[[Row], Row]  # floats + rest -> row
    rest: Row  # the row, with what is unknown in place of the floats


@functools.lru_cache(maxsize=256)
def shape_layout(size: int, floats: Spots) -> Tuple[struct.Struct, int, Any]:
    """(layout, mask, order) of the shape of samples of so many bytes, with floats there.

    The samples of thousands of agents have few such shapes: they share these three.
    """
    code = ">"
    mask = (1 << 8 * size) - 1
    end = 0  # of the float before
    for start, _ in floats:
        code += "%dxd" % (start - end)
        end = start + FLOAT_SIZE
        bits_behind = 8 * (size - end)
        mask ^= FLOAT_MASK << bits_behind
    code += "%dx" % (size - end)
    # a float for which there is no metric, or a metric that is a text, is in no row
    float_keys = [key if key in NUMBERS else None for _, key in floats]
    sources = float_keys + list(INDEX)
    places = [sources.index(key) for key in INDEX]  # of its float, else in the rest
    return struct.Struct(code), mask, operator.itemgetter(*places)


def make_shape(
    data: bytes, message: Message, row: Row, floats: Spots
) -> Optional[Shape]:
    """The shape of a good sample: its bytes, its dict, its row and where its floats are.

    None when a float is not the value of its key, because that came twice: then the short way
    would not know which one counts.  None for a line of JSON, whose numbers have no fixed size.
    """
    if data[:1] == b"{":
        return None
    changing = {key for _, key in floats if type(message.get(key)) is float}
    if len(changing) < len(floats):
        return None
    layout, mask, order = shape_layout(len(data), floats)
    rest = tuple(
        unknown if key in changing else value
        for key, value, unknown in zip(INDEX, row, UNKNOWN)
    )
    fixed = int.from_bytes(data, "big") & mask
    return Shape(len(data), layout, mask, fixed, order, rest)


def parse_shape(data: bytes, shape: Shape) -> Optional[Row]:
    """The row in data if it is a sample of that shape with good floats; None: parse_pickle."""
    size, layout, mask, fixed, order, rest = shape
    if len(data) != size or int.from_bytes(data, "big") & mask != fixed:
        return None
    floats = layout.unpack(data)
    if not math.isfinite(sum(floats)):
        return None
    row: Row = order(floats + rest)
    if 0 <= row[0] <= 100 and 0 <= row[1] <= 100:
        return row
    return None


def clean_text(text: str) -> str:
    """The text with every control or invisible character replaced."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def is_number(value: Any) -> bool:
    """Whether a decoded value is one: bool, which Python takes for an int, is none."""
    return type(value) in (int, float)


def check_percents(message: Message) -> None:
    """WireError without cpu and ram."""
    for key in ("cpu", "ram"):
        value = message.get(key)
        if not is_number(value) or not 0 <= value <= 100:  # type: ignore[operator]
            found = ascii(value)[:40] if key in message else "missing"
            raise WireError(
                "%s must be a number from 0 to 100, and is %s" % (key, found)
            )


def check_sample(message: Message) -> Row:
    """The row of a decoded dict, wrong types as unknown; WireError without cpu and ram."""
    check_percents(message)
    row = list(UNKNOWN)
    for index, key in enumerate(INDEX):
        value = message.get(key)
        if type(value) is str and key in TEXTS:
            row[index] = clean_text(value).encode()
        elif is_number(value) and key in NUMBERS:
            row[index] = float(value)  # type: ignore[arg-type]
    return tuple(row)


def check_job(message: Message) -> Row:
    """The row of a message {"part": "job", ...}, wrong types unknown; WireError without an id."""
    row: List[Any] = []
    for key, code in JOB_FACTS:
        value = message.get(key)
        if code == "d":
            row.append(float(value) if is_number(value) else math.nan)  # type: ignore[arg-type]
        elif type(value) is str:
            row.append(clean_text(value).encode())
        else:
            row.append(b"")
    job, raw = row[:2]
    if not job or not raw:
        raise WireError("a job without its id")
    return tuple(row)


def check_part(message: Message) -> Optional[PartRow]:
    """The row of a message {"part": KIND, ...}, wrong types unknown; None for a kind of later."""
    kind = message["part"]
    if kind not in PART_FIELDS:
        return None
    row: List[Any] = []
    for key, code in PART_FIELDS[kind]:
        value = message.get(key)
        if code == "d":
            row.append(float(value) if is_number(value) else math.nan)  # type: ignore[arg-type]
        elif type(value) is str:
            row.append(clean_text(value).encode())
        else:
            row.append(b"")
    return kind, tuple(row)


def check_past(message: Message, now: float) -> PastRow:
    """What a message {"part": "past", ...} tells; WireError without cpu, ram or a good age."""
    check_percents(message)
    age = message.get("age")
    if not is_number(age) or not 0 < age <= MAX_AGE:  # type: ignore[operator]
        found = ascii(age)[:40] if "age" in message else "missing"
        raise WireError(
            "age must be a number of seconds up to %g, and is %s" % (MAX_AGE, found)
        )
    row = [math.nan] * len(PAST_KEYS)
    for index, key in enumerate(PAST_KEYS):
        value = message.get(key)
        if is_number(value):
            row[index] = float(value)  # type: ignore[arg-type]
    return now - age, tuple(row)  # type: ignore[operator]


def check_auth(message: Message, secret: bytes, nonce: str) -> None:
    """WireError unless the message is {"auth": HMAC-SHA256 of the nonce in hex} (RFC 2104)."""
    answer = message.get("auth")
    if type(answer) is not str:
        raise WireError("a secret is required: start the agent with --secret-file")
    right = hmac.new(secret, nonce.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(right.encode(), answer.encode()):
        raise WireError("wrong secret: give master and agent the same --secret-file")


# ============================================================================
# Table: the only room that knows offsets, the lock and the sequence number
# ============================================================================

EVENTS = 128  # events kept in the ring
JOBS = 512  # jobs that are remembered, and whose verdicts are
PARTS = 4096  # processes, GPUs and strips of CPUs of all nodes together
VERDICT_BYTES = 1536  # of a job's verdicts as JSON
LOOK_PARTS = 128  # of them at most in one look of an agent
PAST = 4096  # readings of the past that wait for the recorder
JOB_SECONDS = 900.0  # a job that has not ended and is not told of is then forgotten
LOCK_SECONDS = 2.0  # to wait for the table's lock
LOCK_POLL = 0.001  # between two tries
READ_SECONDS = 2.0  # to wait for a whole copy without the lock
READ_POLL = 0.001  # between two tries
CLAIM_SECONDS = 2.0  # to wait for masters that start at the same moment
PAGE = 16384  # the largest page of a common system, in bytes
FOLDER = "/dev/shm/"  # where Linux shows segments as files

MAGIC = b"SENTINEL"
SLOT = struct.Struct("i64sff")  # native, as the plan has it: 76 bytes, no padding
DETAIL = struct.Struct("=dd64s" + "".join(m.code for m in DETAILS))
SEEN = struct.Struct("=d")  # the first field of DETAIL
EVENT = struct.Struct("=d12s64s24s32s64sdd256s")
JOB = struct.Struct("=d" + "".join(code for _, code in JOB_FACTS))
# raw job id, time, number of the change that wrote it, severity, JSON
VERDICT = struct.Struct("=24sdQ12s%ds" % VERDICT_BYTES)
PART_HEAD = struct.Struct("=iBd")  # slot, kind + 1 (0: free), seen
PART_BODIES = {
    kind: struct.Struct("=" + "".join(code for _, code in fields))
    for kind, fields in PART_FIELDS.items()
}
PART_SIZE = PART_HEAD.size + max(body.size for body in PART_BODIES.values())
PAST_HEAD = struct.Struct("=QQ")  # written ever, and of these taken
PAST_ROW = struct.Struct("=d64s24s%dd" % len(PAST_KEYS))  # time, node, job
NOTES = struct.Struct("=QQQQ128sQQQQQQ")
HEADER = struct.Struct("=8sIIqq")
SEQUENCE = struct.Struct("=Q")
COUNTS = struct.Struct("=QQdQ")
FIRST = struct.Struct("=Q")  # the first field of NOTES and of COUNTS
# A number that changes with the fields and structs above: a table of others is not read.
# The first item is to be raised when they stay and mean something else.
LAYOUT = zlib.crc32(
    repr(
        (
            5,
            [(m.key, m.code) for m in METRICS],
            JOB_FACTS,
            PART_FIELDS,
            (EVENTS, JOBS, PARTS, PAST, PAST_KEYS),
            [s.format for s in (SLOT, DETAIL, EVENT, VERDICT, PART_HEAD, PAST_ROW)],
            [s.format for s in (NOTES, HEADER, SEQUENCE, COUNTS)],
        )
    ).encode()
)

PICK_PAST = operator.itemgetter(*(INDEX[key] for key in PAST_KEYS))
# A row of Snapshot.rows(): a slot's fields, then its details'
NODE_KEYS = ("slot", "address", "cpu", "ram", "age", "since", "alerts") + tuple(
    m.key for m in DETAILS
)
NODE_TEXTS = ("address", "alerts", *TEXTS)
EVENT_KEYS = ("time", "kind", "node", "job", "user", "address", "cpu", "ram", "text")
JOB_RAW = 1 + JOB_KEYS.index("raw")  # in a row of JOB, which begins with the time seen
JOB_STATE = 1 + JOB_KEYS.index("state")

# The newest look of a node: a dict, and lists of dicts, with the keys of PART_FIELDS
Parts = NamedTuple(
    "Parts",
    [
        ("look", Message),
        ("cores", List[Message]),
        ("ranks", List[Message]),
        ("gpus", List[Message]),
    ],
)


class TableError(Exception):
    """The shared memory cannot be had; the text says why and what to do."""


def from_field(value: Any) -> Union[str, float, None]:
    """A field's value as Python has it: empty text and NaN are None."""
    if type(value) is bytes:
        # a text that was too long may end in the middle of a character
        return value.rstrip(b"\0").decode("utf-8", "ignore") or None
    return value if value == value else None


def has_ended(row: Row) -> bool:
    """Whether a job's row of the table is of one that has ended."""
    return from_field(row[JOB_STATE]) in ENDED_STATES


def find_job_place(rows: List[Row], raw: bytes, now: float) -> int:
    """The index of a job's row: its own, a new one, or that of one to be forgotten; else -1.

    rows: those that are in use, of JOBS.
    """
    best = -1
    oldest = math.inf
    for index, row in enumerate(rows):
        if row[JOB_RAW] == raw:
            return index
        may_go = has_ended(row) or now - row[0] > JOB_SECONDS
        if may_go and row[0] < oldest:
            oldest = row[0]
            best = index
    return len(rows) if len(rows) < JOBS else best


def start_time(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since boot (proc(5), stat field 22).

    None when there is no such process, 0 when there is no /proc to tell.
    """
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # it is there, and another user's
        return 0
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state = fields[0]  # field 3: the name in brackets is before it
    if state in (b"Z", b"X"):  # dead, and not waited for yet
        return None
    return int(fields[19])


@contextlib.contextmanager
def untracked() -> Iterator[None]:
    """Keep the resource tracker out: it would unlink a live segment when a reader ends."""
    tracker: Any = resource_tracker
    saved = tracker.register, tracker.unregister
    tracker.register = tracker.unregister = lambda name, kind: None
    try:
        yield
    finally:
        tracker.register, tracker.unregister = saved


def open_segment(name: str) -> Any:
    """The segment of that name; OSError, or ValueError when it is empty."""
    with untracked():
        return shared_memory.SharedMemory(name)


@contextlib.contextmanager
def one_at_a_time(folder: str) -> Iterator[None]:
    """Hold off others who look for a segment's owner and make one: flock(2) of the folder.

    Without it two masters that start together could both take the name of a dead one.  As
    anybody can hold this lock, it is waited for a while and no longer.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # there is none, as on macOS
        yield
        return
    try:
        deadline = time.monotonic() + CLAIM_SECONDS
        while not try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(READ_POLL)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file, unless somebody else has; True where its filesystem knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def make_segment(name: str, size: int) -> Any:
    """A new segment, with all the room that it needs; OSError, with no segment left behind."""
    with untracked():
        shm = shared_memory.SharedMemory(name, create=True, size=size)
    try:
        # tmpfs promises room that it may not have: a write would then end in SIGBUS
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(shm._fd, 0, shm.size)  # type: ignore[attr-defined]
    except OSError:
        remove_segment(shm)
        raise
    return shm


def remove_segment(shm: Any) -> None:
    """Close a segment and take its name away, if it still has it."""
    shm.close()
    with untracked(), contextlib.suppress(FileNotFoundError):
        shm.unlink()


def check_owner(shm: Any) -> None:
    """TableError when the segment is another user's: anybody may make one, as a trap."""
    if os.fstat(shm._fd).st_uid != os.getuid():
        raise TableError(
            "shared memory %s is another user's; give another --port or --shm-name"
            % shm.name
        )


class Segment:
    """A segment by its descriptor, for a role: the name may be gone when it starts.

    It has the attributes of a SharedMemory. A fork inherits the descriptor; by spawn and
    forkserver it is sent along.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.size = 0
        self.buf: Any = None

    def map(self) -> "Segment":
        """Map it into this process."""
        self.size = os.fstat(self._fd).st_size
        self.buf = memoryview(mmap.mmap(self._fd, self.size))
        return self

    def __getstate__(self) -> Tuple[Any, str]:
        return multiprocessing.reduction.DupFd(self._fd), self.name

    def __setstate__(self, state: Tuple[Any, str]) -> None:
        sent, name = state
        self.__init__(sent.detach(), name)  # type: ignore[misc]

    def close(self) -> None:
        """Nothing to do: the process ends with it."""


class Counts(NamedTuple):
    """The fields of COUNTS."""

    events: int  # that there have been, ever
    samples: int
    beat: float  # time.monotonic() at which the collector was well
    used: int  # no slot from this index on is taken


class Notes(NamedTuple):
    """The fields of NOTES."""

    has_moved: int  # 1 once the table is in another segment
    jobs_left_out: int  # that there was no room for
    turned_away: int  # agents, since the start
    turned_away_lately: int
    turned_away_why: bytes
    parts_used: int  # no row of the parts from this index on is taken
    parts_left_out: int  # looks that there was no room for
    verdict_changes: int  # so far
    verdicts_told: int  # the last change that the collector has told of
    jobs_used: int  # no place of a job from this index on is taken
    verdicts_used: int  # nor one of a verdict


class Copy(NamedTuple):
    """The bytes of a table at one instant, as the picture of Table has them."""

    slots: bytes
    details: bytes
    events: bytes
    jobs: bytes
    verdicts: bytes
    parts: bytes
    notes: bytes
    counts: Counts


class Snapshot:
    """A whole copy of the table at one instant.

    nodes: a dict for each used slot, with NODE_KEYS (age in seconds), made when first asked for;
    events: dicts with EVENT_KEYS, oldest first, of all_events that there have been; left: the
    same, or what a reader remembers of who left; missed: when (time.time()) the newest of those
    came that it never saw.  What is unknown is None.  beat: seconds since the collector last said
    that it is well.  turned_away, turned_away_lately, turned_away_why: agents that there was no
    room for, since the start and in the last minute.
    """

    def __init__(self, capacity: int, copy: Copy) -> None:
        self.capacity = capacity
        self.time = time.time()
        self.copied = time.monotonic()
        self.slots = copy.slots
        self.details = copy.details
        self.job_rows = copy.jobs
        self.verdict_rows = copy.verdicts
        self.part_rows = copy.parts
        self.looks: Optional[Dict[int, Parts]] = None  # once they were asked for
        self.dicts: Optional[List[Message]] = None  # nodes, once they were asked for
        self.before: Optional[Snapshot] = None  # one that was just like it in many rows
        self.made: Dict[str, Any] = {}  # what pages have made of it, to be made once
        self.samples = copy.counts.samples
        self.beat = self.copied - copy.counts.beat
        self.events = read_ring(copy.events, copy.counts.events)
        self.all_events = copy.counts.events
        self.left = self.events
        self.missed = -math.inf
        if self.all_events > len(self.events):
            self.missed = self.events[0]["time"]
        notes = Notes(*NOTES.unpack(copy.notes))
        self.jobs_left_out = notes.jobs_left_out
        self.parts_left_out = notes.parts_left_out
        self.turned_away = notes.turned_away
        self.turned_away_lately = notes.turned_away_lately
        self.turned_away_why = from_field(notes.turned_away_why) or ""

    def rows(self) -> Iterator[Row]:
        """The used slots as the table has them: NODE_KEYS, with the time seen instead of an age."""
        slots = SLOT.iter_unpack(self.slots)
        details = DETAIL.iter_unpack(self.details)
        for slot, detail in zip(slots, details):
            if slot[0]:
                yield slot + detail

    @property
    def nodes(self) -> List[Message]:
        """The used slots as dicts."""
        if self.dicts is None:
            # assigned when it is whole: another thread may ask meanwhile
            before = self.before
            if before is None or before.dicts is None:
                self.dicts = [self.make_node(row) for row in self.rows()]
            else:
                self.dicts = self.make_nodes_after(before, before.dicts)
            self.before = None
        return self.dicts

    def make_nodes_after(
        self, before: "Snapshot", dicts: Iterable[Message]
    ) -> List[Message]:
        """The used slots as dicts: of a row that is as it was before, the dict is copied."""
        known = {node["slot"] - 1: node for node in dicts}
        nodes = []
        rows = itertools.zip_longest(self.raw_rows(), before.raw_rows())
        for index, (raw, raw_before) in enumerate(rows):
            if raw is None:  # the collector began anew and has fewer rows now
                break
            slot, detail = raw
            old = known.get(index)
            if old and raw == raw_before:
                (seen,) = SEEN.unpack_from(detail)
                age = round(max(0.0, self.copied - seen), 2)
                nodes.append(dict(old, age=age))
                continue
            row = SLOT.unpack(slot) + DETAIL.unpack(detail)
            if row[0]:
                nodes.append(self.make_node(row))
        return nodes

    def has_room_for_look(self) -> bool:
        """Whether there is room among the parts for the largest look at a node."""
        return count_parts(self.part_rows) + LOOK_PARTS <= PARTS

    def raw_rows(self) -> Iterator[Tuple[bytes, bytes]]:
        """The bytes of each slot, and of the details beside it."""
        return zip(
            split_rows(self.slots, SLOT.size), split_rows(self.details, DETAIL.size)
        )

    def make_node(self, row: Row) -> Message:
        """A row of rows() as a dict."""
        node: Message = dict(
            zip(NODE_KEYS, [None if value != value else value for value in row])
        )
        for key in NODE_TEXTS:
            node[key] = node[key].rstrip(b"\0").decode("utf-8", "ignore") or None
        node["cpu"] = round(node["cpu"], 2)
        node["ram"] = round(node["ram"], 2)
        seen = node["age"]
        node["age"] = round(max(0.0, self.copied - seen), 2)
        write_whole(node, WHOLE)
        return node

    @property
    def jobs(self) -> List[Message]:
        """What Slurm says of each job that is not forgotten: dicts with JOB_KEYS."""
        jobs = []
        for seen, *row in JOB.iter_unpack(self.job_rows):
            job: Message = dict(zip(JOB_KEYS, map(from_field, row)))
            if job["job"] is None:
                continue
            is_old = self.time - seen > JOB_SECONDS
            if is_old and job["state"] not in ENDED_STATES:
                continue
            write_whole(job, WHOLE_FACTS)
            jobs.append(job)
        return jobs

    def parts(self, slot: int) -> Parts:
        """The newest look of the node in a slot; empty when there is none."""
        if self.looks is None:
            self.looks = read_parts(self.part_rows)
        return self.looks.get(slot) or Parts({}, [], [], [])

    @property
    def verdicts(self) -> Dict[str, List[Message]]:
        """What is judged of each job, by its raw id, the worst first: see Verdict."""
        judged = {}
        for raw, _, _, severity, text in VERDICT.iter_unpack(self.verdict_rows):
            if severity.strip(b"\0"):
                judged[str(from_field(raw))] = json.loads(text.rstrip(b"\0"))
        return judged


def split_rows(rows: bytes, size: int) -> Iterator[bytes]:
    """The bytes of each row."""
    return (row for (row,) in struct.iter_unpack("%ds" % size, rows))


def count_parts(rows: bytes) -> int:
    """How many rows of the parts are in use."""
    starts = range(0, len(rows), PART_SIZE)
    return sum(PART_HEAD.unpack_from(rows, at)[1] > 0 for at in starts)


def read_parts(rows: bytes, slots: Optional[Iterable[int]] = None) -> Dict[int, Parts]:
    """The looks by slot: of all, or of some."""
    looks: Dict[int, Parts] = {}
    for at in range(0, len(rows), PART_SIZE):
        slot, number, seen = PART_HEAD.unpack_from(rows, at)
        if not number or (slots is not None and slot not in slots):
            continue
        kind = PART_KINDS[number - 1]
        body = PART_BODIES[kind].unpack_from(rows, at + PART_HEAD.size)
        part: Message = {}
        for (key, _), value in zip(PART_FIELDS[kind], map(from_field, body)):
            if key in WHOLE_PARTS and value is not None and value.is_integer():  # type: ignore[union-attr]
                value = int(value)
            part[key] = value
        look = looks.setdefault(slot, Parts({}, [], [], []))
        if kind == "look":
            look.look.update(part, time=seen)
        else:
            {"core": look.cores, "rank": look.ranks, "gpu": look.gpus}[kind].append(
                part
            )
    return looks


def read_ring(ring: bytes, count: int) -> List[Message]:
    """The events in the ring as dicts, oldest first; count: those that there have been, ever."""
    events: List[Message] = []
    for number in range(max(0, count - EVENTS), count):
        row = EVENT.unpack_from(ring, number % EVENTS * EVENT.size)
        events.append(dict(zip(EVENT_KEYS, map(from_field, row))))
    return events


def write_whole(row: Message, keys: Iterable[str]) -> None:
    """Make whole numbers of those floats of a dict that are whole."""
    for key in keys:
        value = row[key]
        if value is not None and value.is_integer():
            row[key] = int(value)


def past_rows(ring: bytes, first: int, end: int) -> List[Row]:
    """The readings with these numbers: time, node, job, PAST_KEYS."""
    return [
        PAST_ROW.unpack_from(ring, number % PAST * PAST_ROW.size)
        for number in range(first, end)
    ]


class Table:
    """The shared memory; numbers in native byte order, text UTF-8 and NUL padded.

        offset 0    slots     capacity x SLOT     slot id (1-based, 0 = empty), address, cpu, ram
                    details   capacity x DETAIL   seen, since, alerts, then DETAILS in their order
                    events    EVENTS x EVENT      a ring: event n is in row n % EVENTS
                    jobs      JOBS x JOB          seen, then JOB_FACTS in their order
                    verdicts  JOBS x VERDICT      of each job that was judged, anywhere
                    parts     PARTS x PART_SIZE   PART_HEAD, then PART_FIELDS of its kind
                    past      PAST_HEAD           readings so far, and those the recorder has taken
                              PAST x PAST_ROW     a ring: reading n is in row n % PAST
        size - 280  NOTES     1 once the table has moved, jobs there was no room for,
                              agents turned away, lately, and why; part rows to look at,
                              looks there was no room for, changes of verdicts so far,
                              and of these those that were told; jobs and verdicts to look at
        size - 72   HEADER    magic, layout, capacity, the master's pid and its start time
        size - 40   SEQUENCE  odd while a write is under way
        size - 32   COUNTS    events and samples so far, the collector's heartbeat, slots to look at

    Times are time.time(), but seen and the heartbeat are time.monotonic(): a machine has one.
    Who writes holds the lock: ``with table``.  A reader outside the process tree has none: it
    copies until the sequence number was even and had not changed; ``snapshot`` does either.

    Somebody may take the segment's name away while all who have it mapped go on: RemoveIPC=yes
    of logind.conf(5), or rm.  The supervisor then makes a new segment of that name, copies the
    old one and notes there that the table has moved (``renew``); who next takes the lock, or
    reads without it, finds the note and maps the new one (``follow``).
    """

    # ---- making, opening and removing

    def __init__(self, shm: Any, lock: Any = None) -> None:
        self.shm = shm
        self.buf = shm.buf
        self.lock = lock
        check_owner(shm)
        # what is no table may be too small for these: its header is then no header of ours
        self.counts_at = shm.size - COUNTS.size
        self.sequence_at = self.counts_at - SEQUENCE.size
        self.header_at = max(0, self.sequence_at - HEADER.size)
        self.notes_at = max(0, self.header_at - NOTES.size)
        self.load()

    def load(self) -> None:
        """Read the header, and what a writer keeps count of."""
        header = HEADER.unpack_from(self.buf, self.header_at)
        self.magic, self.layout, self.capacity, self.pid, self.start = header
        self.details_at = self.capacity * SLOT.size
        self.events_at = self.details_at + self.capacity * DETAIL.size
        self.jobs_at = self.events_at + EVENTS * EVENT.size
        self.verdicts_at = self.jobs_at + JOBS * JOB.size
        self.parts_at = self.verdicts_at + JOBS * VERDICT.size
        self.parts_end = self.parts_at + PARTS * PART_SIZE
        self.past_at = self.parts_end + PAST_HEAD.size
        self.past_end = self.past_at + PAST * PAST_ROW.size
        (self.sequence,) = SEQUENCE.unpack_from(self.buf, self.sequence_at)
        (self.events,) = FIRST.unpack_from(self.buf, self.counts_at)
        notes = self.notes()
        self.jobs_left_out = notes.jobs_left_out
        self.parts_used = notes.parts_used
        self.parts_left_out = notes.parts_left_out
        self.free_parts: List[int] = []  # a heap of places that were given back
        self.fresh_parts = 0  # the first place that was never given

    def notes(self) -> Notes:
        """What is noted beside the counts, as it is now."""
        return Notes(*NOTES.unpack_from(self.buf, self.notes_at))

    @staticmethod
    def size_for(capacity: int) -> int:
        """The bytes of a segment for so many slots, in whole pages."""
        size = capacity * (SLOT.size + DETAIL.size)
        size += EVENTS * EVENT.size + JOBS * (JOB.size + VERDICT.size)
        size += PARTS * PART_SIZE
        size += PAST_HEAD.size + PAST * PAST_ROW.size
        size += NOTES.size + HEADER.size + SEQUENCE.size + COUNTS.size
        return size + -size % PAGE

    @classmethod
    def create(cls, name: str, capacity: int) -> "Table":
        """Make the segment; one whose owner is dead is replaced, one whose owner lives is not."""
        size = cls.size_for(capacity)
        pid = os.getpid()
        header = (MAGIC, LAYOUT, capacity, pid, start_time(pid))
        try:
            with one_at_a_time(FOLDER):
                cls.discard(name)
                table = cls(make_segment(name, size))
                HEADER.pack_into(table.buf, table.header_at, *header)
        except FileExistsError:
            raise TableError(
                "shared memory %s is somebody else's; give another --port or"
                " --shm-name" % name
            ) from None
        except OSError as error:
            raise TableError(
                "no shared memory of %d bytes: %s; free some of /dev/shm or lower"
                " --max-agents" % (size, error.strerror)
            ) from None
        COUNTS.pack_into(table.buf, table.counts_at, 0, 0, time.monotonic(), 0)
        table.load()
        if not table.has_name():
            # one that started at the same moment took it for a dead one's
            raise TableError(
                "another master has just taken shared memory %s; give another --port or"
                " --shm-name" % name
            )
        return table

    @classmethod
    def attach(cls, name: str, lock: Any = None) -> "Table":
        """Open a live master's segment; TableError when there is none or its master is gone."""
        try:
            table = cls(open_segment(name), lock)
        except (OSError, ValueError, struct.error):
            raise TableError(
                "no master's shared memory %s here: is the master running, as this"
                " user, with this --port or --shm-name?" % name
            ) from None
        is_known = table.magic == MAGIC and table.layout == LAYOUT
        if not is_known or table.past_end > table.notes_at:
            raise TableError("shared memory %s is of no master of this version" % name)
        if not table.owner_lives():
            raise TableError(
                "the master (pid %d) that made shared memory %s is gone"
                % (table.pid, name)
            )
        return table

    @classmethod
    def inherit(cls, segment: Segment, lock: Any) -> "Table":
        """Open the supervisor's segment by its descriptor, for a role."""
        return cls(segment.map(), lock)

    def segment(self) -> Segment:
        """What a role needs to open this table."""
        return Segment(self.shm._fd, self.shm.name)

    @classmethod
    def discard(cls, name: str) -> None:
        """Remove what a killed master left; TableError or OSError when it is somebody's."""
        try:
            old = cls(open_segment(name))
        except FileNotFoundError:
            return
        except ValueError:  # it is empty: its maker was killed right then
            if os.stat(FOLDER + name).st_uid != os.getuid():
                raise FileExistsError from None
            os.unlink(FOLDER + name)
            return
        except (OSError, struct.error):
            raise FileExistsError from None
        if old.owner_lives():
            raise TableError(
                "the master with pid %d uses shared memory %s; stop it, or give"
                " another --port or --shm-name" % (old.pid, name)
            )
        if old.magic not in (MAGIC, bytes(8)):
            raise FileExistsError
        old.unlink()

    def owner_lives(self) -> bool:
        """Whether the master that made the segment still runs."""
        return bool(self.magic == MAGIC and start_time(self.pid) == self.start)

    def unlink(self) -> None:
        """Remove the segment, unless its name is somebody else's by now: for its creator alone."""
        is_ours = self.has_name()
        self.buf = None
        if is_ours:
            remove_segment(self.shm)
        else:
            self.shm.close()

    def reset(self) -> None:
        """Empty slots and parts and end a broken write: for who knows that nobody else writes."""
        self.buf[: self.details_at] = bytes(self.details_at)
        self.buf[self.parts_at : self.parts_end] = bytes(PARTS * PART_SIZE)
        (self.sequence,) = SEQUENCE.unpack_from(self.buf, self.sequence_at)
        self.sequence += self.sequence % 2
        SEQUENCE.pack_into(self.buf, self.sequence_at, self.sequence)

    # ---- a segment whose name has gone

    def has_name(self) -> bool:
        """Whether the segment still is what its name leads to: somebody may have unlinked it."""
        if not os.path.isdir(FOLDER):
            return True  # nobody but shm_unlink() can take it away, as on macOS
        try:
            named = os.stat(FOLDER + self.shm.name)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self.shm._fd))

    def renew(self, lock: Any) -> bool:
        """Move the table to a new segment of its name; False when the lock is not to be had.

        For the supervisor.  A name that is somebody else's by now is left alone, and without
        room for another segment nothing is changed: TableError.
        """
        try:
            new = make_segment(self.shm.name, self.shm.size)
        except OSError as error:
            raise TableError(
                "shared memory %s is gone and cannot be made again: %s"
                % (self.shm.name, error.strerror)
            ) from None
        if not lock.acquire(timeout=LOCK_SECONDS):
            remove_segment(new)
            return False
        try:
            new.buf[: self.shm.size] = self.buf[: self.shm.size]
            FIRST.pack_into(self.buf, self.notes_at, 1)
        finally:
            lock.release()
        self.use(new)
        return True

    def has_moved(self) -> bool:
        """Whether the supervisor has noted that the table is elsewhere now."""
        return bool(self.buf[self.notes_at])

    def follow(self) -> None:
        """Go on with the segment that the table has moved to; TableError when it is not there.

        The name may be somebody else's by now: only a copy of this very table is one.
        """
        name = self.shm.name
        try:
            new = open_segment(name)
        except (OSError, ValueError):
            raise TableError(
                "shared memory %s has moved, and is not to be found" % name
            ) from None
        check_owner(new)
        old_header = bytes(self.buf[self.header_at : self.sequence_at])
        new_header = bytes(new.buf[self.header_at : self.sequence_at])
        if new.size != self.shm.size or new_header != old_header:
            raise TableError("shared memory %s is another table now" % name)
        self.use(new)

    def use(self, shm: Any) -> None:
        """Go on with another segment of the same layout."""
        self.buf = None
        self.shm.close()
        self.shm = shm
        self.buf = shm.buf

    # ---- writing

    def acquire(self) -> None:
        """Take the lock; a role that cannot have it in time ends (its holder was killed).

        Nobody blocks in the semaphore: a thread that is woken there owns the lock while it still
        waits for the interpreter, and with thousands of threads all wait for that one.
        """
        if not self.lock.acquire(False):
            self.wait_for_lock()
        if self.buf[self.notes_at]:  # has_moved(), without a call for each sample
            try:
                self.follow()
            except TableError as error:
                log.error("%s", error)
                os._exit(EXIT_LOCK)

    def wait_for_lock(self) -> None:
        """Take the lock as soon as it is free; end this role when that takes too long."""
        deadline = time.monotonic() + LOCK_SECONDS
        while not self.lock.acquire(False):
            if time.monotonic() > deadline:
                log.error(
                    "the table's lock is stuck: who held it was killed or stopped"
                )
                os._exit(EXIT_LOCK)
            time.sleep(LOCK_POLL)

    def __enter__(self) -> None:
        """Begin to write: hold the lock and keep the sequence number odd.

        It is read each time, as two processes write: the collector and the recorder.
        """
        self.acquire()
        self.sequence = SEQUENCE.unpack_from(self.buf, self.sequence_at)[0] | 1
        SEQUENCE.pack_into(self.buf, self.sequence_at, self.sequence)

    def __exit__(self, kind: Any, *error: Any) -> None:
        """End it; after an error the number stays odd until the next write ends."""
        if kind is None:
            self.sequence += 1
            SEQUENCE.pack_into(self.buf, self.sequence_at, self.sequence)
        self.lock.release()

    def write(
        self, index: int, address: str, row: Row, since: float, alerts: str
    ) -> None:
        """Put a sample into a slot; address is text, since is time.time() of the connection.

        This is done for every sample: what ``with self`` does is written out here.
        """
        # of a row, cpu and ram are in the slot and the rest, DETAILS, beside it
        cpu, ram, *details = row
        at = index * SLOT.size
        detail_at = self.details_at + index * DETAIL.size
        host = address.encode()
        names = alerts.encode()
        now = time.monotonic()
        self.acquire()
        try:
            buf = self.buf
            number = SEQUENCE.unpack_from(buf, self.sequence_at)[0] | 1
            SEQUENCE.pack_into(buf, self.sequence_at, number)
            SLOT.pack_into(buf, at, index + 1, host, cpu, ram)
            DETAIL.pack_into(buf, detail_at, now, since, names, *details)
            SEQUENCE.pack_into(buf, self.sequence_at, number + 1)
        finally:  # after an error the number stays odd until the next write ends
            self.lock.release()

    def clear(self, index: int) -> None:
        """Empty a slot."""
        with self:
            SLOT.pack_into(self.buf, index * SLOT.size, 0, b"", 0.0, 0.0)

    def beat(
        self,
        samples: int,
        used: int,
        turned_away: int = 0,
        turned_away_lately: int = 0,
        why: str = "",
    ) -> None:
        """Say that the collector is well, with what it counts.

        samples so far; no slot from ``used`` on is taken; how many agents were turned away since
        the start and in the last minute, and why.
        """
        now = time.monotonic()
        with self:
            COUNTS.pack_into(self.buf, self.counts_at, self.events, samples, now, used)
            notes = self.notes()._replace(
                has_moved=0,
                jobs_left_out=self.jobs_left_out,
                turned_away=turned_away,
                turned_away_lately=turned_away_lately,
                turned_away_why=why.encode(),
                parts_used=self.parts_used,
                parts_left_out=self.parts_left_out,
            )
            NOTES.pack_into(self.buf, self.notes_at, *notes)

    def write_job(self, row: Row) -> None:
        """Put what Slurm says of a job in its place, or in that of the oldest that has ended.

        For one thread at a time: to look for the place takes too long to hold the lock for it.
        """
        self.acquire()
        try:
            jobs = self._copy_jobs()
        finally:
            self.lock.release()
        now = time.time()
        raw = row[JOB_KEYS.index("raw")].ljust(24, b"\0")
        rows = list(JOB.iter_unpack(jobs))
        place = find_job_place(rows, raw, now)
        with self:
            if place < 0:
                self.jobs_left_out += 1
            else:
                JOB.pack_into(self.buf, self.jobs_at + place * JOB.size, now, *row)
            if place == len(rows):
                notes = self.notes()._replace(jobs_used=place + 1)
                NOTES.pack_into(self.buf, self.notes_at, *notes)

    def write_parts(self, index: int, look: List[PartRow], places: List[int]) -> None:
        """Put a look of the node in a slot into the places, which are made as many as it needs.

        Without room for all of it, the look is left out.  For the collector; under a lock of its
        own, as it has many threads.
        """
        missing = len(look) - len(places)
        if missing > len(self.free_parts) + PARTS - self.fresh_parts:
            self.parts_left_out += 1
            return
        for _ in range(missing):
            if self.free_parts:
                places.append(heapq.heappop(self.free_parts))
            else:
                places.append(self.fresh_parts)
                self.fresh_parts += 1
        places.sort()  # readers find a look in its order
        now = time.time()
        rows = [self.pack_part(index, part, now) for part in look]
        used = max(self.parts_used, max(places) + 1)
        with self:
            if used > self.parts_used:  # readers are to see all of the look
                self.parts_used = used
                notes = self.notes()._replace(parts_used=used)
                NOTES.pack_into(self.buf, self.notes_at, *notes)
            for place, row in zip(places, rows):
                self.put_part(place, row)
            for place in places[len(rows) :]:
                self.put_part(place, bytes(PART_HEAD.size))
        for place in places[len(rows) :]:
            heapq.heappush(self.free_parts, place)
        del places[len(rows) :]

    def pack_part(self, index: int, part: PartRow, now: float) -> bytes:
        """The bytes of a row of the parts."""
        kind, row = part
        head = PART_HEAD.pack(index + 1, PART_KINDS.index(kind) + 1, now)
        return head + PART_BODIES[kind].pack(*row)

    def put_part(self, place: int, row: bytes) -> None:
        """Write a row of the parts, or the begin of one."""
        at = self.parts_at + place * PART_SIZE
        self.buf[at : at + len(row)] = row

    def write_past(self, node: str, job: str, readings: List[PastRow]) -> bool:
        """Append readings of a node to the ring: False without room for all of them.

        For the collector; under a lock of its own, as it has many threads.
        """
        written, taken = PAST_HEAD.unpack_from(self.buf, self.parts_end)
        if written + len(readings) - taken > PAST:
            return False
        with self:
            for when, row in readings:
                at = self.past_at + written % PAST * PAST_ROW.size
                names = (node.encode(), job.encode())
                PAST_ROW.pack_into(self.buf, at, when, *names, *row)
                written += 1
            FIRST.pack_into(self.buf, self.parts_end, written)
        return True

    def take_past(self) -> List[Row]:
        """The readings that have come since the last time: time, node, job, PAST_KEYS.

        For the recorder alone.
        """
        written, taken = PAST_HEAD.unpack_from(self.buf, self.parts_end)
        if written == taken:
            return []
        with self:
            written, taken = PAST_HEAD.unpack_from(self.buf, self.parts_end)
            ring = bytes(self.buf[self.past_at : self.past_end])
            PAST_HEAD.pack_into(self.buf, self.parts_end, written, written)
        return past_rows(ring, taken, written)

    def read_past(self, known: int) -> Tuple[int, List[Row]]:
        """How many readings there were, and of them those after so many: as take_past().

        For whoever shows them: the recorder takes its own all the same.
        """
        ring = b""
        self.acquire()
        try:
            written, _ = PAST_HEAD.unpack_from(self.buf, self.parts_end)
            if written != known:
                ring = bytes(self.buf[self.past_at : self.past_end])
        finally:
            self.lock.release()
        return written, past_rows(ring, max(known, written - PAST), written)

    def last_reading(self, index: int) -> PastRow:
        """The sample of a slot as a reading of the past.  For the collector."""
        self.acquire()
        try:
            slot = SLOT.unpack_from(self.buf, index * SLOT.size)
            at = self.details_at + index * DETAIL.size
            seen, _, _, *details = DETAIL.unpack_from(self.buf, at)
        finally:
            self.lock.release()
        when = time.time() - (time.monotonic() - seen)
        return when, PICK_PAST(slot[2:] + tuple(details))

    def write_verdicts(self, raw: str, verdicts: List[Message]) -> None:
        """Put what is judged of a job in its place, or in that of the one judged longest ago.

        verdicts: dicts with the fields of a Verdict, the worst first; of too many the last are
        left out.  For the recorder alone.
        """
        severity = verdicts[0]["severity"]
        text = json.dumps(verdicts)
        while len(text) > VERDICT_BYTES:
            verdicts = verdicts[:-1]
            text = json.dumps(verdicts)
        self.acquire()
        try:
            rows = self._copy_verdicts()
        finally:
            self.lock.release()
        job = raw.encode()[:24].ljust(24, b"\0")
        used = len(rows) // VERDICT.size
        # not its own, when, place
        best = (True, -math.inf if used < JOBS else math.inf, used)
        for place, (owner, when, _, _, _) in enumerate(VERDICT.iter_unpack(rows)):
            best = min(best, (owner != job, when, place))
        place = best[2]
        with self:
            notes = self.notes()
            change = notes.verdict_changes + 1
            used = max(used, place + 1)
            notes = notes._replace(verdict_changes=change, verdicts_used=used)
            NOTES.pack_into(self.buf, self.notes_at, *notes)
            row = (job, time.time(), change, severity.encode(), text.encode())
            at = self.verdicts_at + place * VERDICT.size
            VERDICT.pack_into(self.buf, at, *row)

    def verdict_changes(self) -> int:
        """How often verdicts have been written: a look at the copy is worth it when it grows."""
        return self.notes().verdict_changes

    def verdicts_told(self) -> int:
        """The last change of verdicts that the collector has told of."""
        return self.notes().verdicts_told

    def note_told(self, changes: int) -> None:
        """Note up to which change of verdicts all has been told: for the collector."""
        with self:
            notes = self.notes()._replace(verdicts_told=changes)
            NOTES.pack_into(self.buf, self.notes_at, *notes)

    def add_event(
        self, kind: str, text: str, node: str, row: Row = UNKNOWN, address: str = ""
    ) -> None:
        """Append to the ring; row is the node's last sample."""
        fields = (
            time.time(),
            kind.encode(),
            node.encode(),
            row[INDEX["job"]],
            row[INDEX["user"]],
            address.encode(),
            row[INDEX["cpu"]],
            row[INDEX["ram"]],
            text.encode(),
        )
        with self:
            place = self.events_at + self.events % EVENTS * EVENT.size
            EVENT.pack_into(self.buf, place, *fields)
            self.events += 1
            FIRST.pack_into(self.buf, self.counts_at, self.events)

    # ---- reading

    def snapshot(self) -> Snapshot:
        """A Snapshot, copied under the lock, or without one until the copy is whole."""
        copy = self.copy_locked() if self.lock else self.copy_unlocked()
        return Snapshot(self.capacity, copy)

    def copy_locked(self) -> Copy:
        """A copy, taken under the lock."""
        self.acquire()
        try:
            return self._copy()
        finally:
            self.lock.release()

    def copy_unlocked(self) -> Copy:
        """A copy during which nobody wrote; TableError when there was none in time."""
        deadline = time.monotonic() + READ_SECONDS
        while time.monotonic() < deadline:
            if self.has_moved():
                self.follow()
            (before,) = SEQUENCE.unpack_from(self.buf, self.sequence_at)
            copy = self._copy()
            (after,) = SEQUENCE.unpack_from(self.buf, self.sequence_at)
            if before == after and before % 2 == 0:
                return copy
            time.sleep(READ_POLL)
        raise TableError(
            "no whole copy of the table in %g s: a write never ended" % READ_SECONDS
        )

    def _copy(self) -> Copy:
        """The bytes as they are: whole if nobody writes meanwhile."""
        counts = Counts(*COUNTS.unpack_from(self.buf, self.counts_at))
        used = min(counts.used, self.capacity)
        details_end = self.details_at + used * DETAIL.size
        parts_used = min(self.notes().parts_used, PARTS)
        return Copy(
            bytes(self.buf[: used * SLOT.size]),
            bytes(self.buf[self.details_at : details_end]),
            bytes(self.buf[self.events_at : self.jobs_at]),
            self._copy_jobs(),
            self._copy_verdicts(),
            bytes(self.buf[self.parts_at : self.parts_at + parts_used * PART_SIZE]),
            bytes(self.buf[self.notes_at : self.header_at]),
            counts,
        )

    def _copy_jobs(self) -> bytes:
        """The places of jobs that are in use.  Lock must be held by the caller."""
        used = min(self.notes().jobs_used, JOBS)
        return bytes(self.buf[self.jobs_at : self.jobs_at + used * JOB.size])

    def _copy_verdicts(self) -> bytes:
        """The places of verdicts that are in use.  Lock must be held by the caller."""
        used = min(self.notes().verdicts_used, JOBS)
        end = self.verdicts_at + used * VERDICT.size
        return bytes(self.buf[self.verdicts_at : end])


# ============================================================================
# Alerts: rules -> firing and resolved, pure; and the runner of the command
# ============================================================================

COMMAND_SECONDS = 30.0  # for one run of --alert-command
QUIET_SECONDS = 0.25  # without another alert: those that came are told
GATHER_SECONDS = 1.0  # the same in an alert storm
STORM_SECONDS = 5.0  # the longest that an alert waits for others
STORM_SIZE = 4  # more alerts of a kind are told by one command
STORM_NAMES = 20  # of the nodes and jobs of a storm, so many are named
MAX_ALERTS = 20000  # alerts waiting for the command
FLAP_SECONDS = 600.0  # for which changes and brief visits are counted
FLAP_CHANGES = 8  # of a rule on a node, or of a node, that are told one by one
FLAP_VISITS = 20  # brief visits of one address: told one by one, 4 events each at most
BRIEF_SECONDS = 2.0  # a visit that is no longer is a brief one
SETTLE_SECONDS = 60.0  # without a change: what was withheld last is told
MAX_FLAPPING = 8192  # things that are counted so
LAST_PART = 0.1  # of a job's time limit
DEFAULT_RULES = ("cpu>90", "job_ram>90", "job_time_left<600")
RULE = re.compile(
    r"\s*(\w+)\s*([<>])\s*(\d+(?:\.\d+)?)"  # METRIC>NUMBER
    r"(?:\s+for\s+(\d+(?:\.\d+)?)\s*s?)?\s*"  # for SECONDS
)


class Alert(NamedTuple):
    """What --alert-command is told, as SENTINEL_EVENT and so on."""

    event: str  # alert, lost, problem or died
    node: str
    job: str
    metric: str
    value: Union[float, str]
    threshold: Union[float, str]
    text: str  # what the log says


class Rule(NamedTuple):
    """A metric past a threshold for some seconds: 'ram>95 for 30'."""

    metric: str
    op: str
    threshold: float
    seconds: float
    is_default: bool = False

    def applies(self, row: Row) -> bool:
        """Whether the rule is meant for such a node: a default one knows a healthy job.

        A job that uses its CPUs is no alert, nor is a short job that has just begun: the end of
        its time is near when less than a tenth of it is left. What is not known is no alert.
        """
        if not self.is_default:
            return True
        if self.metric == "cpu":
            return not row[INDEX["job"]]
        if self.metric == "job_time_left":
            left = row[INDEX["job_time_left"]]
            return bool(left < row[INDEX["job_time_limit"]] * LAST_PART)
        return True

    def crossed(self, value: float, margin: float = 0.0) -> bool:
        """Whether the value is past the threshold, or has not come back by the margin."""
        if self.op == ">":
            return value > max(0.0, self.threshold - margin)
        return value < self.threshold + margin

    def margin(self) -> float:
        """How far behind the threshold a value has to be for the alert to be resolved."""
        if NUMBERS[self.metric].unit == "%":
            return 5.0
        return self.threshold * 0.05

    def __str__(self) -> str:
        text = "%s%s%g" % (self.metric, self.op, self.threshold)
        if self.seconds:
            text += " for %g" % self.seconds
        return text


def parse_rule(text: str) -> Union[Rule, str]:
    """An argparse type: 'cpu>90' or 'ram>95 for 30' -> Rule; 'lost' and 'no-lost' as they are."""
    if text in ("lost", "no-lost"):
        return text
    match = RULE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            "%r is no rule; METRIC>NUMBER and METRIC<NUMBER are, with ' for SECONDS' behind if you"
            " like, and lost and no-lost" % text
        )
    metric, op, threshold, seconds = match.groups()
    if metric not in NUMBERS:
        raise argparse.ArgumentTypeError(
            "%r in %r is no metric; there are %s" % (metric, text, ", ".join(NUMBERS))
        )
    return Rule(metric, op, float(threshold), float(seconds or 0))


def limits_of(rules: Iterable[Rule]) -> List[Tuple[int, float, float]]:
    """Of each rule: where its metric is in a Row, and from where to where it is not crossed."""
    limits = []
    for rule in rules:
        is_above = rule.op == ">"
        lowest = -math.inf if is_above else rule.threshold
        highest = rule.threshold if is_above else math.inf
        limits.append((INDEX[rule.metric], lowest, highest))
    return limits


def is_within(limits: Iterable[Tuple[int, float, float]], row: Row) -> bool:
    """Whether no rule is crossed, as nearly always.  What is unknown crosses none."""
    for index, lowest, highest in limits:
        value = row[index]
        if value > highest or value < lowest:
            return False
    return True


def judge(
    rules: Sequence[Rule], state: Dict[Rule, Optional[float]], row: Row, now: float
) -> List[Tuple[str, Rule, float]]:
    """What a sample changes: [("alert" or "resolved", rule, value)].

    state is one node's: {rule: time at which it was crossed, or None once it fires}.  To be
    resolved takes 5 points (of percents) or 5 % (of anything else) more than to fire.
    """
    changes = []
    for rule in rules:
        value = row[INDEX[rule.metric]]
        if rule.crossed(value) and rule.applies(row):
            since = state.setdefault(rule, now)
            if since is not None and now - since >= rule.seconds:
                state[rule] = None
                changes.append(("alert", rule, value))
        elif state and rule in state and value == value:  # what is unknown is not equal
            fires = state[rule] is None
            if not fires:
                del state[rule]
            elif not rule.crossed(value, rule.margin()):
                del state[rule]
                changes.append(("resolved", rule, value))
    return changes


class Event(NamedTuple):
    """What there is to tell of a node: in the ring and the log, by a command."""

    kind: str  # connected, finished, lost, alert, resolved, flapping, problem or died
    node: str
    row: Row  # the node's last sample, KEPT of it at least
    address: str
    text: str
    rule: Optional[Rule] = None
    value: Union[float, str] = ""

    def job(self) -> str:
        """The job's id, or ""."""
        return str(self.row[INDEX["job"]], "utf-8")

    def subject(self) -> str:
        """The node, and its job if it has one."""
        job = self.job()
        if not self.node:
            return "job %s" % job
        return "%s (job %s)" % (self.node, job) if job else self.node


class Flap:
    """What is counted of one thing that comes and goes."""

    __slots__ = ("since", "changes", "was_told", "last")

    def __init__(self, now: float, changes: int) -> None:
        self.since = now  # time.monotonic() from which on changes are counted
        self.changes = changes
        self.was_told = False  # that it is flapping
        self.last = now  # time.monotonic() of the last change


class Flapping:
    """Bounds what one thing that comes and goes can tell: a rule on a node, a node, an address.

    More than so many changes of it within so many seconds is flapping.  That is told once, with
    the count, and again after as long.  The changes are withheld until it is quiet again; then
    the last of them is told, since it is how things are.
    """

    def __init__(self, changes: int, seconds: float) -> None:
        self.changes = changes
        self.seconds = seconds
        self.lock = threading.Lock()
        self.known: Dict[Any, Flap] = collections.OrderedDict()
        # what the last change of each would have told
        self.withheld: Dict[Any, Sequence[Event]] = {}
        self.dropped: List[Event] = []  # withheld of what is counted no more

    def count(self, key: Any) -> int:
        """Count a change: 0 if it is to be told, else how many there were; -1 if that was told."""
        now = time.monotonic()
        with self.lock:
            flap = self.known.get(key)
            if flap is None or now - flap.since > self.seconds:
                flap = self.begin(key, flap, now)
            flap.changes += 1
            flap.last = now
            if flap.changes <= self.changes:
                return 0
            if flap.was_told:
                return -1
            flap.was_told = True
            return flap.changes

    def begin(self, key: Any, before: Optional[Flap], now: float) -> Flap:
        """Count from now on.  Lock must be held by the caller.

        One that goes on as before is told again at once, not first believed for a while.
        """
        goes_on = before is not None and before.was_told
        if before is not None:
            goes_on = goes_on and now - before.last <= self.seconds
            del self.known[key]
            self.withheld.pop(key, None)  # it is not how things are any more
        if len(self.known) >= MAX_FLAPPING:
            oldest = next(iter(self.known))
            del self.known[oldest]
            self.dropped += self.withheld.pop(oldest, ())
        flap = Flap(now, self.changes if goes_on else 0)
        self.known[key] = flap
        return flap

    def withhold(self, key: Any, events: Sequence[Event]) -> None:
        """Keep what the last change would have told, in place of what was kept before."""
        with self.lock:
            flap = self.known.get(key)
            if flap is None:
                self.dropped += events
            else:
                flap.last = time.monotonic()
                self.withheld[key] = events

    def settled(self) -> List[Event]:
        """What was withheld of that which has been quiet for long enough to be told."""
        now = time.monotonic()
        with self.lock:
            events = self.dropped
            self.dropped = []
            for key in list(self.withheld):
                flap = self.known[key]
                if now - flap.last <= SETTLE_SECONDS:
                    continue
                quiet = "quiet now, after %d changes" % flap.changes
                for event in self.withheld.pop(key):
                    text = "%s; %s" % (event.text, quiet)
                    events.append(event._replace(text=text))
        return events


class Visits(Flapping):
    """Bounds what an address can tell by brief visits, under whatever names.

    Many that come and go at once are a crowd, no loop: a visit counts only when an earlier brief
    one had ended before, and each that has ended makes one other count.
    """

    def __init__(self, changes: int, seconds: float) -> None:
        super().__init__(changes, seconds)
        # address -> (brief visits that ended, time.monotonic() of the last one's end)
        self.ended: Dict[str, Tuple[int, float]] = collections.OrderedDict()

    def end_brief(self, source: str) -> None:
        """Note that a brief visit has ended."""
        with self.lock:
            count, _ = self.ended.pop(source, (0, 0.0))
            if len(self.ended) >= MAX_FLAPPING:
                del self.ended[next(iter(self.ended))]
            self.ended[source] = (count + 1, time.monotonic())

    def begin_visit(self, source: str) -> int:
        """0 if the visit is to be told, else as count() has it."""
        return self.count(source) if self.is_return(source) else 0

    def is_return(self, source: str) -> bool:
        """Whether one who comes may be one who was here before, briefly."""
        with self.lock:
            count, when = self.ended.pop(source, (0, 0.0))
            if not count or time.monotonic() - when > self.seconds:
                return False
            if count > 1:
                self.ended[source] = (count - 1, when)
            return True


def gather(waiting: "queue.Queue[Any]", quiet: float) -> List[Any]:
    """Wait for something, then for what comes along with it: until it is quiet for so long.

    In a storm the quiet has to be longer; but nothing waits for more than STORM_SECONDS.
    """
    batch = [waiting.get()]
    deadline = time.monotonic() + STORM_SECONDS
    while time.monotonic() < deadline:
        is_storm = len(batch) > STORM_SIZE
        try:
            batch.append(waiting.get(timeout=GATHER_SECONDS if is_storm else quiet))
        except queue.Empty:
            break
    return batch


def name_some(names: Iterable[str]) -> str:
    """Names with blanks between, each once, and dots instead of those that are too many."""
    different = list(dict.fromkeys(names))
    if len(different) > STORM_NAMES:
        different[STORM_NAMES:] = ["..."]
    return " ".join(different)


class CommandRunner:
    """Runs --alert-command on a thread of its own: one run at a time, a storm told once."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.alerts: queue.Queue[Alert] = queue.Queue(MAX_ALERTS)
        threading.Thread(target=self.run, name="alerts", daemon=True).start()

    def post(self, alert: Alert) -> None:
        """Have an alert told; never blocks."""
        with contextlib.suppress(queue.Full):
            self.alerts.put_nowait(alert)

    def run(self) -> None:
        """Tell what is posted, for ever."""
        while True:
            for group in self.groups(gather(self.alerts, QUIET_SECONDS)):
                try:
                    self.call(group)
                except Exception as error:  # this thread has to go on, whatever it was
                    log.error("alert command failed: %s", error)

    def groups(self, alerts: Iterable[Alert]) -> List[List[Alert]]:
        """Lists of alerts that one run each should tell: many of a kind together."""
        kinds: Dict[Tuple[Any, ...], List[Alert]] = {}
        for alert in alerts:
            kind = (alert.event, alert.metric, alert.threshold)
            kinds.setdefault(kind, []).append(alert)
        groups = []
        for group in kinds.values():
            if len(group) > STORM_SIZE:
                groups.append(group)
            else:
                groups.extend([alert] for alert in group)
        return groups

    def call(self, group: List[Alert]) -> None:
        """Run the command for alerts of one kind; at its limit, kill it and all it started."""
        begun = time.monotonic()
        code = self.run_command(self.environment(group))
        if code < 0 and time.monotonic() - begun >= COMMAND_SECONDS:
            log.error("alert command failed: killed after %g s", COMMAND_SECONDS)
        elif code:
            log.error("alert command failed: %s", describe_exit(code))

    def environment(self, group: List[Alert]) -> Dict[bytes, bytes]:
        """The environment of a run: the facts are in it, never in the command's text."""
        facts: Dict[str, Any] = group[0]._asdict()
        facts["node"] = name_some(alert.node for alert in group)
        facts["job"] = name_some(alert.job for alert in group)
        facts["count"] = len(group)
        env = dict(os.environb)  # bytes: no locale can object to a name
        for key, value in facts.items():
            env[b"SENTINEL_" + key.upper().encode()] = str(value).encode()
        return env

    def run_command(self, env: Dict[bytes, bytes]) -> int:
        """Run the command: its exit code, or minus the signal that ended it.

        The shell that kills it is in the command's own process group, so that the limit outlives
        a collector that dies meanwhile.
        """
        killer = "(sleep %g; kill -9 -$$) >/dev/null 2>&1 &" % COMMAND_SECONDS
        process = subprocess.Popen(
            ["/bin/sh", "-c", killer + ' eval "$0"', self.command],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=env,
            start_new_session=True,
        )
        code = process.wait()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return code


def describe_exit(code: int) -> str:
    """How a process ended, by its exit code or minus its signal."""
    return "signal %d" % -code if code < 0 else "exit code %d" % code


# ============================================================================
# Verdicts: what is known of a job -> what is wrong with it, why it died.  Pure
# ============================================================================
#
# diagnose() puts a job's evidence to the one table of checks, CHECKS.  A check names what it
# needs: facts of Slurm, readings of a node, and curves that cover its time without a hole.  A
# node of which that is not known is not shown to it, so a check whose evidence is incomplete is
# silent: a false verdict costs more than a missing one.
#
# A verdict that was given stays until that is refuted on which it rests: of memory that grows, or
# is nearly full, a wobble is no refutation, but a fall is, and so are minutes without growth.
# While most checks have not had their time, a job is fine so far, and that is what is said.
#
# Thresholds come from those who have mailed users for years; the source is in each check:
#
#   jobstats    github.com/PrincetonUniversity/jobstats, config.py
#   JDS         github.com/PrincetonUniversity/job_defense_shield, docs/alert
#   cc-backend  github.com/ClusterCockpit/cc-backend, configs/tagger/jobclasses

HOLD_SECONDS = 60.0  # how long most things have to last before they are told
LONG_SECONDS = 300.0  # the same for what a healthy job may do for a while, too
SOON_SECONDS = 20.0  # and for what cannot wait
CURVE_STEP = 10.0  # between two points of a curve
MAX_HOLE = 2.5 * CURVE_STEP  # between two points: a longer hole is no evidence
ALONE_SECONDS = (
    45.0  # all nodes: those of a suspended job are, and Slurm is asked every 30 s
)
PATIENT_SECONDS = 1200.0  # for what a person or a service may wait for
SILENT_SECONDS = 5.0  # and one of several that go on
BURST_SECONDS = 3.0  # in which nodes are lost together: one may have sent just before
BURST_LOSSES = 3  # nodes that are lost together at least ...
BURST_SHARE = 0.5  # ... of all that there are
MAX_NUMBER = 1e18  # no reading is larger; what claims to be is unknown
MAX_LISTED = 4  # names in a sentence
MAX_CPUS = 8192  # of one node, as CONFIG_NR_CPUS has it at most on x86
MAX_CPU_LIST = 90  # characters: a longer list of CPUs may have been cut
GIB = 2.0**30
MIB = 2.0**20
IDLE_CPUS = 0.1  # CPUs in use, and less, are none
WORKING_CPUS = 0.5  # and from this on some are
CORE_CPUS = (
    2  # the CPUs of one core where it has two threads: who asked for one has both
)
ONE_CPU = (0.85, 1.1)  # CPUs in use by one thread that never waits
CROWDED_PERCENT = 50.0  # of the time some thread waits for a CPU
QUIET_BYTES = 1e5  # a second, read and written: no I/O to speak of
LEAST_QUIET = 30.0  # seconds for which that is known at least
MAPPED_PERCENT = 20.0  # of the time something waits for I/O: a mapped file, perhaps
SLOW_BYTES = 5e6  # a second: what waits for I/O and moves no more has a slow filesystem
FEW_PERCENT = 40.0  # of the CPUs: less than one thread on each core of two threads
IDLE_GPU = 1.0  # percent busy
TOOTH = 1.05  # memory that is given back now and then may be that much more at times
WORKING_GPUS = 50.0  # percent busy, in the mean of a node's: they are at work
LEFT_OUT_CPU = 5.0  # percent of its CPUs: a node that does no more has nothing to do
UNUSED_GPU = 100 * MIB  # of a GPU's memory: no program has opened it
MARGIN = 1.2  # a fifth more than was needed: what to ask for next time
NEAR_LIMIT = 0.9  # of the limit of memory: little is left from here on
FALLEN = 0.05  # of the limit: memory that is so much lower has fallen ...
RISEN = 0.01  # ... and so much higher has grown
STILL = 0.002  # ... and with no more between the least and the most stands still
LEAST_RISES = 4  # from one point to the next: a line needs some
GROWTH_POINTS = 130  # of a curve: what was before is not looked at
GROWTH_SECONDS = 180.0  # without another height: memory does not grow any more

STILL_GREW = (
    "if that is enough: it still grew when it was killed; a leak only takes longer"
)

# The same words are in agent.py's report.
OUT_OF_MEMORY = "out of memory: the kernel killed %s"
BELOW_PEAK = "memory peak higher than any sample: the highest was %.3g GB of %.3g GB"
MEMORY_PEAK = "memory peak %.3g GB of %.3g GB"
KERNEL_COUNT = "kernel's count, 1 run, %d samples"
SAMPLED_COUNT = "sampled, 1 run, %d samples"

# Linux's on all processors that clusters have; a laptop's own may differ
SIGNALS = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    10: "SIGUSR1",
    11: "SIGSEGV",
    12: "SIGUSR2",
    13: "SIGPIPE",
    14: "SIGALRM",
    15: "SIGTERM",
    24: "SIGXCPU",
    25: "SIGXFSZ",
    31: "SIGSYS",
}
# an agent that is told to end says these; of a command they tell nothing
ASKED_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM")
# Slurm ends with these what is left of a job that is over: a step of ours, perhaps
LEFTOVER_SIGNALS = (9, 15)
# what a signal means, and what to do: {node} is where, {job} the id
SIGNAL_WORDS = {
    "SIGSEGV": "it used memory that is not its own (segmentation fault)",
    "SIGBUS": "it used memory that is not there",
    "SIGILL": "it is compiled for another kind of processor",
    "SIGABRT": "it gave up by itself: its last lines say why",
    "SIGFPE": "it divided by zero, or the like",
    "SIGXFSZ": "a file became larger than the limit",
    "SIGXCPU": "its limit of CPU time was reached",
    "SIGKILL": "who sent it is not known",
}
SIGNAL_CURES = {
    "SIGSEGV": "ulimit -s unlimited  # before srun, if its stack was too small",
    "SIGBUS": "df -h /dev/shm /tmp  # in the job: a full one ends programs so",
    "SIGILL": "srun --nodes=1 --constraint=FEATURE ...  # or compile it on the node itself",
}
SHELLS = ("bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh")
# what a person works with, by its name
DESKS = (
    r"jupyter|ipykernel|ipython|rsession|rserver|code-server|vscode|tmux|screen|sshd|ttyd"
    r"|Xvnc|websockify"
)
# and what else waits: for a person, for requests or for jobs of its own
WAITERS = (
    DESKS
    + r"|MATLAB|scheduler|server|snakemake|nextflow|ollama|vllm|tensorboard|streamlit"
    r"|uvicorn|gunicorn|mongod|mysqld|postgres|nginx|httpd|raylet|dask|^node$|^java$|^R$"
)
# what prepares the work of a job, and does it on one CPU for a while, by its name
PREPARERS = (
    r"^(make|cmake|ninja|configure|conda|mamba|pip3?|cc1|cc1plus|f951|ld|collect2|rustc|nvcc"
    r"|cicc|ptxas|tar|gzip|gunzip|pigz|xz|bzip2|zstd|unzip|cp|rsync|wget|curl|scp|git"
    r"|apptainer|singularity|unsquashfs|mksquashfs)$"
)
SEVERITIES = ("died", "problem", "advice", "fine")  # the worst first
ARROW_COLUMN = 100  # where cures begin, at most
MARKS = {"died": "died ", "problem": "! ", "advice": ". ", "fine": ""}
FINE_SO_FAR = "fine so far"  # fine, as far as it has been seen
EXIT_CODES = {"fine": 0, "advice": 1, "problem": 2, "died": 3}
RUNNING_STATES = ("", "RUNNING", "COMPLETING")  # "": Slurm was not asked
ENDING_STATE = "COMPLETING"  # what is left of it is being ended
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")
# key of a sample, what is full, percent from which on it is
FILESYSTEMS = (
    ("disk_tmp", "/tmp", 98.0),
    ("disk_shm", "/dev/shm", 98.0),
    ("inodes_tmp", "the list of files (inodes) of /tmp", 98.0),
    ("disk", "the working directory's filesystem", 99.5),
    ("inodes", "the list of files (inodes) of the working directory", 99.5),
)
# readings that a label and a number would not tell well
READING_WORDS = {
    "job_ram": "{} of its memory in use",
    "job_cpu": "{} of its CPUs in use",
    "job_time_left": "{} of its time left",
}
OWN_TMP = 'export TMPDIR="$SLURM_SUBMIT_DIR/tmp"; mkdir -p "$TMPDIR"'
FREE_SHM = "ls -l /dev/shm  # remove what is yours, or ask for more --mem"
LOOK_AROUND = "df -h . ; df -i .  # in the working directory"
FULL_CURES = {
    "disk_tmp": OWN_TMP,
    "disk_shm": FREE_SHM,
    "inodes_tmp": OWN_TMP,
    "disk": LOOK_AROUND,
    "inodes": LOOK_AROUND,
}
# keys that are texts; all others are numbers
FACT_TEXTS = [key for key, code in JOB_FACTS if code.endswith("s")]
RANK_TEXTS = ("part", "program", "cpus", "on", "state", "wchan", "gpu", "step")
GPU_TEXTS = ("part", "uuid", "name", "throttle", "mig", "error")
# the curves that checks look at, and how many of their last points; of job_mem all, for the peak
CURVES = dict.fromkeys(("job_cpu", "gpu", "gpu_min"), 130)
CURVES.update(dict.fromkeys(("job_read", "job_write", "psi_io", "psi_mem"), 40))
CURVES.update(dict.fromkeys(("disk_read", "disk_write", "net_rx", "net_tx"), 40))
CURVES.update({key: 10 for key, _, _ in FILESYSTEMS})
CURVES.update(cpu=10, job_mem=0)
POSITIVE = ("job_cpus", "job_mem_limit", "cpus", "mem_total", "job_time_limit")

Figures = Dict[str, Any]  # what fills the words of a check
Curve = List[Tuple[float, float]]  # (time.time(), value), the oldest first, 10 s apart


class Verdict(NamedTuple):
    """What is wrong with a job, why we think so, and what to type."""

    severity: str  # one of SEVERITIES
    what: str
    proof: str
    cure: str  # a line to paste, or ""
    rule: str  # name of the check
    place: str = ""  # the nodes, the GPU, the CPUs or the filesystem that it is about


class NodeEvidence(NamedTuple):
    """What is known of one node of a job."""

    name: str
    sample: Dict[str, Any]  # the newest, keys of METRICS
    curves: Dict[str, Curve]
    ranks: List[Dict[str, Any]]  # newest parts of each kind
    gpus: List[Dict[str, Any]]
    cores: Dict[int, float]  # CPU -> share busy, 0 to 1
    cpus: Set[int]  # those of the job; empty when unknown
    lost: Optional[float]  # when it fell silent


class JobEvidence(NamedTuple):
    """What is known of a job.

    facts are JOB_FACTS, and where accounting tells them: cancelled_by (a user or a uid),
    derived_exit (CODE:SIGNAL of the worst step), failed_step (words for it).
    """

    facts: Dict[str, Any]
    nodes: List[NodeEvidence]
    events: List[Dict[str, Any]]  # time, kind, node, text: as the table has them
    now: float
    burst: Optional[float] = None  # when most nodes of all jobs fell silent together


class Goodbye(NamedTuple):
    """How an agent left: its wrapped command's end, where it has one."""

    time: float
    node: str
    bye: str  # exit 3, SIGSEGV, SIGTERM, finished
    report: str

    @property
    def is_failure(self) -> bool:
        """Whether it tells the end of a command that failed."""
        if self.bye.startswith("exit "):
            return self.bye != "exit 0"
        return self.bye.startswith("SIG") and self.bye not in ASKED_SIGNALS


class Check(NamedTuple):
    """One rule: what it needs, when it speaks, and its words."""

    name: str
    severity: str
    phase: str  # RUNNING, ENDED or ANY of a job
    find: Callable[["Case", List[NodeEvidence], float], Iterable[Figures]]
    what: str
    proof: str
    cure: str
    source: str  # of the threshold
    facts: Tuple[str, ...] = ()  # of Slurm's, all needed
    needs: Tuple[str, ...] = ()  # of a node's sample or parts, all needed
    holds: Tuple[str, ...] = ()  # curves of a node that must cover the seconds
    seconds: float = 0.0  # for how long
    instead_of: Tuple[str, ...] = ()  # checks that this one explains better


RUNNING = "running"
ENDED = "ended"
ANY = "any"
LISTED = ("ranks", "gpus")
# of a check's figures: what says where, in this order
PLACES = ("name", "node", "nodes", "names", "index", "allowed")


def diagnose(job: JobEvidence) -> List[Verdict]:
    """Say what is wrong with a job, the worst first; it is fine when nothing is."""
    case = Case(job)
    verdicts: List[Verdict] = []
    replaced: Set[str] = set()
    for check in CHECKS:
        if check.name in replaced:
            continue
        found = judge_check(case, check)
        if found:
            replaced.update(check.instead_of)
        verdicts += found
    verdicts = [verdict for verdict in verdicts if verdict.rule not in replaced]
    if all(verdict.severity == "fine" for verdict in verdicts):
        what = case.verdict_of_fine()
        verdicts.insert(0, Verdict("fine", what, case.describe(), "", "fine"))
    return sorted(verdicts, key=lambda verdict: SEVERITIES.index(verdict.severity))


def judge_check(case: "Case", check: Check) -> List[Verdict]:
    """Put a job to one check, if all is known that it needs."""
    if check.phase == RUNNING and not case.is_running:
        return []
    if check.phase == ENDED and not case.is_over:
        return []
    if any(key not in case.facts for key in check.facts):
        return []
    nodes = case.live if check.phase == RUNNING else case.nodes
    nodes = [node for node in nodes if knows(case, node, check)]
    if not nodes and (check.needs or check.holds):
        return []
    verdicts = []
    for figures in check.find(case, nodes, check.seconds):
        figures.setdefault("job", case.job)
        verdicts.append(
            Verdict(
                figures.get("severity", check.severity),
                check.what.format(**figures),
                check.proof.format(**figures).rstrip("; "),
                check.cure.format(**figures),
                check.name,
                place_words(figures),
            )
        )
    return fold_verdicts(verdicts)


def place_words(figures: Figures) -> str:
    """What tells a verdict from others of the same check: c1, or c1 GPU 3."""
    words = [str(figures[key]) for key in PLACES if key in figures]
    return " ".join(words)


def fold_verdicts(verdicts: List[Verdict]) -> List[Verdict]:
    """Some of many verdicts of one check, the worst first; the last tells of the rest."""
    verdicts.sort(key=lambda verdict: SEVERITIES.index(verdict.severity))
    rest = len(verdicts) - MAX_LISTED
    if rest > 0:
        last = verdicts[MAX_LISTED - 1]
        proof = "%s; and so at %d more places" % (last.proof, rest)
        if rest == 1:
            proof = "%s; and so at 1 more place" % last.proof
        verdicts[MAX_LISTED - 1 :] = [last._replace(proof=proof)]
    return verdicts


def knows(case: "Case", node: NodeEvidence, check: Check) -> bool:
    """Whether all is known of a node that a check needs."""
    for need in check.needs:
        if need in LISTED:
            if not getattr(node, need):
                return False
        elif need not in node.sample:
            return False
    return all(lasts(node, key, case.now, check.seconds, is_any) for key in check.holds)


# ---- evidence, cleaned -------------------------------------------------------------


def clean_number(value: Any) -> Optional[float]:
    """A reading as a float; None for what cannot be one, and for what no reading can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= MAX_NUMBER:  # NaN is neither
        return None
    return float(value)


def is_any(value: float) -> bool:
    """Passes every value of a curve: they are clean."""
    return True


def clean_dict(values: Any, texts: Iterable[str]) -> Dict[str, Any]:
    """What can be true of a dict in which these keys are texts, and all others numbers."""
    known: Dict[str, Any] = {}
    if not isinstance(values, dict):
        return known
    for key, value in values.items():
        number = clean_number(value)
        if key in texts:
            text = "%d" % number if number is not None else value
            if isinstance(text, str) and text:
                known[key] = text
        elif number is not None and (number > 0 or key not in POSITIVE):
            known[key] = number
    return known


def clean_dicts(parts: Any, texts: Iterable[str]) -> List[Dict[str, Any]]:
    """The same for each of a list."""
    return [clean_dict(part, texts) for part in parts or () if isinstance(part, dict)]


def clean_curve(points: Any, now: float) -> Curve:
    """The points of a curve that can be true, the oldest first."""
    end = now + CURVE_STEP
    try:  # nearly always all of them are
        known = [
            (moment, value)
            for moment, value in points
            if 0 <= moment <= end and 0 <= value <= MAX_NUMBER
        ]
        known.sort()
        return known
    except (TypeError, ValueError):
        return clean_odd_curve(points, end)


def latest(points: Any, key: str) -> Any:
    """What is looked at of a curve."""
    return points[-CURVES[key] :] if isinstance(points, list) else points


def clean_odd_curve(points: Any, end: float) -> Curve:
    """The same, for a curve of which some points are no pairs of numbers."""
    known = []
    for point in points if isinstance(points, (list, tuple)) else ():
        if isinstance(point, (list, tuple)) and len(point) == 2:
            moment = clean_number(point[0])
            value = clean_number(point[1])
            if moment is not None and value is not None and moment <= end:
                known.append((moment, value))
    return sorted(known)


def clean_node(node: NodeEvidence, now: float) -> NodeEvidence:
    """A node's evidence without what cannot be true."""
    curves = node.curves if isinstance(node.curves, dict) else {}
    cores = node.cores if isinstance(node.cores, dict) else {}
    return NodeEvidence(
        str(node.name),
        clean_dict(node.sample, TEXTS),
        {
            key: clean_curve(latest(curves.get(key, []), key), now)
            for key in CURVES  # an empty one where nothing is known
        },
        clean_dicts(node.ranks, RANK_TEXTS),
        clean_dicts(node.gpus, GPU_TEXTS),
        {cpu: busy for cpu, busy in cores.items() if clean_number(busy) is not None},
        {cpu for cpu in node.cpus or () if isinstance(cpu, int)},
        clean_number(node.lost),
    )


def parse_cpu_list(text: Any) -> Set[int]:
    """0-3,8 -> {0, 1, 2, 3, 8}, as Cpus_allowed_list of proc(5) has it; empty for no such text."""
    cpus: Set[int] = set()
    if not isinstance(text, str) or len(text) > MAX_CPU_LIST:
        return cpus
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return cpus
    for part in text.split(","):
        first, _, last = part.partition("-")
        end = int(last or first)
        if end >= MAX_CPUS:
            return set()
        cpus.update(range(int(first), end + 1))
    return cpus


def parse_exit(text: Any) -> Optional[Tuple[int, int]]:
    """CODE:SIGNAL of Slurm -> both as numbers; None for another text."""
    match = (
        re.fullmatch(r"(\d{1,3}):(\d{1,3})", text) if isinstance(text, str) else None
    )
    return (int(match.group(1)), int(match.group(2))) if match else None


def parse_goodbye(event: Dict[str, Any]) -> Optional[Goodbye]:
    """An event of kind finished -> how the agent left; None for any other event."""
    moment = clean_number(event.get("time"))
    text = event.get("text")
    if event.get("kind") != "finished" or moment is None or not isinstance(text, str):
        return None
    bye, _, report = text.partition("; ")
    return Goodbye(moment, str(event.get("node")), bye, report)


def last_heard(node: NodeEvidence) -> float:
    """When the newest point of a node's curves was; 0 without one."""
    return max((curve[-1][0] for curve in node.curves.values() if curve), default=0.0)


def nodes_of_run(nodes: List[NodeEvidence], start: float) -> List[NodeEvidence]:
    """The nodes without what is known of a run before this one: the job was requeued.

    Slurm's clock tells when this run began.  Where nothing is known of it by ours, the two do
    not agree, and all is kept.
    """
    since = start - CURVE_STEP
    known = [node for node in nodes if last_heard(node) >= since]
    if not known:
        return nodes
    heard = [node for node in nodes if node in known or not last_heard(node)]
    return [
        node._replace(
            curves={
                key: [point for point in curve if point[0] >= since]
                for key, curve in node.curves.items()
            }
        )
        for node in heard
    ]


class Case:
    """A job's evidence without what cannot be true, and what all checks ask of it."""

    def __init__(self, job: JobEvidence) -> None:
        self.now = clean_number(job.now) or 0.0
        self.burst = clean_number(job.burst)
        self.facts = clean_dict(job.facts, FACT_TEXTS)
        self.nodes = [clean_node(node, self.now) for node in job.nodes]
        self.state = str(self.facts.get("state", "")).split(" ")[0].rstrip("+")
        self.start = float(self.facts.get("start", 0.0))
        if self.state not in WAITING_STATES:
            self.nodes = nodes_of_run(self.nodes, self.start)
        self.job = shlex.quote(
            str(self.facts.get("raw") or self.facts.get("job") or "")
        )
        self.job = self.job if self.job != "''" else "JOB"
        self.exit = parse_exit(self.facts.get("exit"))
        events = [event for event in job.events or () if isinstance(event, dict)]
        self.goodbyes = self.find_goodbyes(events)
        has_left = {goodbye.node for goodbye in self.goodbyes}
        self.live = [
            node
            for node in self.nodes
            if node.lost is None and node.name not in has_left
        ]
        self.silent = [
            node
            for node in self.nodes
            if node.lost is not None and node.name not in has_left
        ]
        self.failure = next(
            (goodbye for goodbye in self.goodbyes if goodbye.is_failure), None
        )
        self.first_node = self.find_first_node()
        self.has_ended = self.state in ENDED_STATES
        have_left = self.all_have_left()
        self.is_over = self.has_ended or have_left
        self.is_running = (
            self.state in RUNNING_STATES
            and self.state != ENDING_STATE
            and not self.is_over
        )
        ended_well = all(goodbye.bye == "exit 0" for goodbye in self.goodbyes)
        self.has_completed = self.state == "COMPLETED" or have_left and ended_well

    def find_goodbyes(self, events: List[Dict[str, Any]]) -> List[Goodbye]:
        """The goodbye of each node that has not been heard of since, the first of all first.

        Two agents may have been on a node: what the one that saw a command fail has said counts.
        """
        last: Dict[str, Goodbye] = {}
        heard = {node.name: last_heard(node) for node in self.nodes}
        for event in events:
            name = str(event.get("node"))
            goodbye = parse_goodbye(event)
            if name not in heard or not self.is_of_job(event):
                continue
            if event.get("kind") == "connected":
                last.pop(name, None)
            elif goodbye and goodbye.time >= max(self.start, heard[name]) - CURVE_STEP:
                told = last.get(name)
                last[name] = told if told and told.is_failure else goodbye
        return sorted(last.values())

    def is_of_job(self, event: Dict[str, Any]) -> bool:
        """Whether an event is of this job, as far as it tells."""
        ids = [self.facts[key] for key in ("job", "raw") if key in self.facts]
        return not ids or event.get("job") in (None, "", *ids)

    def all_have_left(self) -> bool:
        """Whether every node of the job has said goodbye, though Slurm has told no end yet."""
        count = self.facts.get("nodes", len(self.nodes))
        return (
            self.state in RUNNING_STATES
            and 0 < len(self.goodbyes) == len(self.nodes)
            and len(self.nodes) >= count
        )

    def is_whole(self, nodes: List[NodeEvidence]) -> bool:
        """Whether these are all nodes of the job."""
        count = self.facts.get("nodes", len(self.nodes))
        return 0 < len(nodes) == len(self.nodes) and len(nodes) >= count

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a heterogeneous job, which waits for the others: 12+1."""
        return "+" in str(self.facts.get("job", ""))

    @property
    def has_gpus(self) -> bool:
        """Whether the job has, or may have, GPUs."""
        if self.facts.get("gpus"):
            return True
        return any(node.gpus or node.sample.get("gpus") for node in self.nodes)

    def find_first_node(self) -> str:
        """The node on which the script runs, and mostly rank 0: Slurm sorts them."""
        for node in self.nodes:
            if any(rank.get("rank") == 0 for rank in node.ranks):
                return node.name
        names = [node.name for node in self.nodes]
        return min(names, key=lambda name: (len(name), name), default="")

    @property
    def kills(self) -> Dict[str, int]:
        """{node: processes that the kernel killed for want of memory}, where there are any."""
        counts = {}
        for node in self.nodes:
            count = int(node.sample.get("oom_kill", 0))
            for goodbye in self.goodbyes:
                if goodbye.node == node.name:
                    count = max(count, parse_kills(goodbye.report))
            if count:
                counts[node.name] = count
        return counts

    @property
    def end(self) -> Optional[float]:
        """When it ended, as far as anybody tells."""
        end: Optional[float] = self.facts.get("end")
        if self.has_ended and end and self.start <= end <= self.now + 60:
            return end
        moments = [goodbye.time for goodbye in self.goodbyes]
        moments += [node.lost for node in self.silent if node.lost is not None]
        return max(moments, default=None)

    @property
    def ran(self) -> Optional[float]:
        """For how long it ran, in seconds: by one clock, that of Slurm, where it tells both."""
        end = self.facts.get("end") if self.has_ended else None
        if end is None or end < self.start:
            end = self.end
        return end - self.start if end and self.start and end >= self.start else None

    def testimony(self) -> str:
        """What each source says of the end, in its own words: where they differ, all is said."""
        words = []
        for goodbye in self.goodbyes:
            if goodbye.is_failure:
                at = clock_words(goodbye.time, "%H:%M:%S")
                words.append("%s on %s at %s" % (goodbye.bye, goodbye.node, at))
        words = words[:MAX_LISTED]
        for name, count in list(self.kills.items())[:MAX_LISTED]:
            words.append("the kernel's count on %s is %d" % (name, count))
        if self.facts.get("failed_step"):
            words.append("first step that failed: %s" % self.facts["failed_step"])
        if self.state:
            details = [self.facts.get("exit"), self.facts.get("reason")]
            told = ", ".join(str(detail) for detail in details if detail)
            told = " (%s)" % told if told else ""
            words.append("Slurm says %s%s" % (self.state, told))
        derived = self.facts.get("derived_exit", "0:0")
        if derived not in ("0:0", self.facts.get("exit")):
            words.append("its worst step ended with %s" % derived)
        return "; ".join(words)

    def describe(self) -> str:
        """What there is to go by, for a job that is fine."""
        if self.state in WAITING_STATES:
            return "it waits: %s" % self.facts.get("reason", "Slurm has told no reason")
        if not self.nodes:
            return "no node of it has sent a sample"
        count = int(self.facts.get("nodes", 0))
        words = count_words(len(self.nodes), "node")
        if count > len(self.nodes):
            words = "%d of %s" % (len(self.nodes), count_words(count, "node"))
        curves = [node.curves["job_mem"] or node.curves["cpu"] for node in self.nodes]
        longest = max(curves, key=len)
        if longest:
            since = clock_words(longest[0][0])
            samples = count_words(len(longest), "sample")
            words += ", %s of each since %s" % (samples, since)
        if self.is_running:
            words += self.full_words()
        return words

    def verdict_of_fine(self) -> str:
        """What is said of a job with which nothing is wrong, as far as it has been seen."""
        if self.state in WAITING_STATES:
            return "fine"
        if not self.nodes:
            return FINE_SO_FAR
        if not self.is_running:
            return "fine"
        are_seen = all(is_seen(node) for node in self.live)
        is_whole = len(self.live) == len(self.nodes)
        return (
            "fine" if are_seen and is_whole and not self.full_words() else FINE_SO_FAR
        )

    def full_words(self) -> str:
        """; 94 % of the memory of c1 in use, not yet for 20 s: "" where there is enough of it."""
        for node in self.live:
            limit = node.sample.get("job_mem_limit")
            used = node.sample.get("job_mem", 0.0)
            if limit and used > NEAR_LIMIT * limit:
                share = 100 * min(1.0, used / limit)
                words = "; %.0f %% of the memory of %s in use just now"
                return words % (share, node.name)
        return ""


def is_seen(node: NodeEvidence) -> bool:
    """Whether a node has been seen for as long as most checks take."""
    known = [key for key in ("job_cpu", "job_mem") if node.curves[key]]
    if not known:  # of the rest there is less
        return has_covered(node, "cpu", (CURVES["cpu"] - 1) * CURVE_STEP)
    return any(has_covered(node, key, LONG_SECONDS) for key in known)


def lasting(
    node: NodeEvidence,
    key: str,
    now: float,
    passes: Callable[[float], bool],
    enough: float = math.inf,
) -> float:
    """For how many seconds up to now every point of a curve has passed, without a hole.

    It is not looked at for longer than enough.
    """
    since = now
    for moment, value in reversed(node.curves.get(key, ())):
        if since - moment > MAX_HOLE or not passes(value):
            break
        since = min(since, moment)
        if now - since >= enough:
            break
    return now - since


def lasts(
    node: NodeEvidence,
    key: str,
    now: float,
    seconds: float,
    passes: Callable[[float], bool],
) -> bool:
    """Whether every point of a curve has passed for so long."""
    enough = seconds - CURVE_STEP / 2
    return lasting(node, key, now, passes, enough) >= enough


def recent(node: NodeEvidence, key: str, now: float, seconds: float) -> List[float]:
    """The values of a curve in the last seconds."""
    since = now - seconds - CURVE_STEP / 2
    return [value for moment, value in node.curves.get(key, ()) if moment >= since]


def mean_of(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def median_of(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return 0.0
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


# ---- words -------------------------------------------------------------------------


def clock_words(moment: Optional[float], form: str = "%H:%M") -> str:
    """A time of day where the master runs."""
    if moment is None or moment > 1e11:
        return "an unknown time"
    return time.strftime(form, time.localtime(moment))


def time_words(seconds: float) -> str:
    """A duration: 45 s, 20 min, 3 h 10 min."""
    if seconds < 120:
        return "%d s" % round(seconds)
    minutes = int(seconds / 60)
    if minutes < 100:
        return "%d min" % minutes
    return "%d h %d min" % divmod(minutes, 60)


def count_words(count: int, noun: str) -> str:
    """1 node, 2 nodes, 2 processes."""
    plural = "es" if noun.endswith("s") else "s"
    return "%d %s%s" % (count, noun, "" if count == 1 else plural)


def list_words(names: Sequence[str]) -> str:
    """c1, c2, c3, c4 and 12 more."""
    words = ", ".join(names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        words += " and %d more" % (len(names) - MAX_LISTED)
    return words


def range_words(numbers: Iterable[int]) -> str:
    """0-3, 8: the way back from parse_cpu_list."""
    parts: List[List[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    words = ["%d" % a if a == b else "%d-%d" % (a, b) for a, b in parts]
    return list_words(words)


def size_words(size: float) -> str:
    """A size in memory: 58 GB, 3 MB."""
    if size < 0.1 * GIB:
        return "%d MB" % round(size / MIB)
    return "%.3g GB" % (size / GIB)


def reading_words(key: str, value: float) -> str:
    """What a reading is, in a few words: 91 % of its memory in use, CPU 97 %."""
    metric = NUMBERS[key]
    if metric.unit == "%":
        amount = "%.3g %%" % value
    elif metric.unit in ("B", "B/s"):
        amount = size_words(value) + metric.unit[1:]
    elif metric.unit == "s":
        amount = time_words(value)
    else:
        amount = ("%.6g %s" % (value, metric.unit)).strip()
    return READING_WORDS.get(key, metric.label + " {}").format(amount)


def alert_words(rule: Rule, value: Optional[float]) -> str:
    """What makes a rule fire, in words: 91 % of its memory in use (alert above 90 %)."""
    past = "above" if rule.op == ">" else "below"
    limit = ("%g %s" % (rule.threshold, NUMBERS[rule.metric].unit)).strip()
    lasting_for = " for %g s" % rule.seconds if rule.seconds else ""
    reading = NUMBERS[rule.metric].label
    if value is not None:
        reading = reading_words(rule.metric, value)
    return "%s (alert %s %s%s)" % (reading, past, limit, lasting_for)


def memory_flag(size: float) -> str:
    """The flag of sbatch for a fifth more than that: --mem=74G.  agent.py has the same."""
    unit, name = (GIB, "G") if size >= GIB else (100 * MIB, "00M")
    return "--mem=%d%s" % (max(1, math.ceil(MARGIN * size / unit)), name)


def flag_bytes(flag: str) -> float:
    """What memory_flag asks for."""
    return float(flag[6:-1]) * (GIB if flag.endswith("G") else MIB)


def time_flag(seconds: float) -> str:
    """The flag of sbatch for a fifth more time than that, in steps of five minutes."""
    minutes = 5 * max(1, math.ceil(MARGIN * seconds / 300))
    return "--time=%02d:%02d:00" % divmod(minutes, 60)


def rank_words(rank: Dict[str, Any]) -> str:
    """rank 37 (my_app); what is no rank has a process id."""
    number = rank.get("rank", rank.get("pid"))
    kind = "rank" if "rank" in rank else "process"
    program = " (%s)" % rank["program"] if "program" in rank else ""
    if number is None:
        return "a process" + program
    return "%s %d%s" % (kind, number, program)


def largest_rank_words(ranks: List[Dict[str, Any]]) -> str:
    """rank 37 (my_app) had 58 GB, the others at most 0.3 GB; "" when that is not known."""
    sizes = [rank for rank in ranks if "mem" in rank]
    if not sizes:
        return ""
    first, *others = sorted(sizes, key=lambda rank: -rank["mem"])
    words = "%s had %s" % (rank_words(first), size_words(first["mem"]))
    if others:
        words += ", the others at most %s" % size_words(others[0]["mem"])
    return words


def parse_kills(report: str) -> int:
    """How many processes the kernel killed, from an agent's report; 0 when it tells of none."""
    match = re.search(r"the kernel killed (\d{1,6}) process", report)
    return int(match.group(1)) if match else 0


# ---- CPUs --------------------------------------------------------------------------


def cpus_in_use(node: NodeEvidence, percent: float) -> float:
    """Percent of the job's CPUs on a node as a number of CPUs."""
    return float(percent * node.sample["job_cpus"] / 100)


def is_idle_for(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether a node has done nothing: no CPU, no I/O.

    One that has worked is given more time: twice as long as it paused before and went on.
    """

    def is_idle(value: float) -> bool:
        return cpus_in_use(node, value) <= IDLE_CPUS

    if not lasts(node, "job_cpu", case.now, seconds, is_idle):
        return False
    points = node.curves["job_cpu"]
    works = sum(cpus_in_use(node, value) >= WORKING_CPUS for _, value in points)
    if works >= 3:
        seconds = max(seconds, LONG_SECONDS, 2 * longest_pause(points, is_idle))
    if not lasts(node, "job_cpu", case.now, seconds, is_idle):
        return False
    return is_quiet(case, node, min(seconds, LONG_SECONDS))


def longest_pause(points: Curve, is_idle: Callable[[float], bool]) -> float:
    """For how many seconds a curve was idle at most before it went on."""
    longest = 0.0
    since: Optional[float] = None
    for moment, value in points:
        if not is_idle(value):
            longest = max(longest, moment - since if since is not None else 0.0)
            since = None
        elif since is None:
            since = moment
    return longest


def is_quiet(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether a node is known to read and write nothing; what is not known is not quiet."""

    def all_quiet(*keys: str) -> bool:
        # a rate takes two rounds of an agent that reads many files: it is known later
        known = min(seconds, LEAST_QUIET)
        return all(
            lasts(node, key, case.now, known, lambda value: value <= QUIET_BYTES)
            and max(recent(node, key, case.now, seconds)) <= QUIET_BYTES
            for key in keys
        )

    if any(rank.get("state") == "D" for rank in node.ranks):
        return False  # a file that is mapped is read without a call
    waits_for_files = functools.partial(operator.le, MAPPED_PERCENT)
    if lasts(node, "psi_io", case.now, min(seconds, LEAST_QUIET), waits_for_files):
        return False  # and nobody may have looked at it while it waited
    if "job_read" in node.sample and "job_write" in node.sample:
        return all_quiet("job_read", "job_write")
    # all traffic of the node; a network of another kind shows in the wait for I/O
    waits = lasts(node, "psi_io", case.now, seconds, lambda value: value < 5)
    return waits and all_quiet("disk_read", "disk_write", "net_rx", "net_tx")


def find_idle_job(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.has_gpus or case.is_part or not case.is_whole(nodes):
        return
    may_wait = is_perhaps_waiting(nodes)
    if may_wait:
        seconds = PATIENT_SECONDS
    elif any(is_pausing(node) for node in nodes):
        seconds = LONG_SECONDS
    if all(is_idle_for(case, node, seconds) for node in nodes):
        idle = min(
            lasting(node, "job_cpu", case.now, lambda value: value <= 5)
            for node in nodes
        )
        yield {
            "severity": "advice" if may_wait else "problem",
            "cpus": count_words(int(sum(n.sample["job_cpus"] for n in nodes)), "CPU"),
            "nodes": list_words([node.name for node in nodes]),
            "time": time_words(idle),
        }


def is_perhaps_waiting(nodes: List[NodeEvidence]) -> bool:
    """Whether a job may wait for a person, for requests, or for jobs that it has started itself.

    It does for all that is known where no process of it is: after salloc, say.
    """
    if sum(node.sample["job_cpus"] for node in nodes) <= CORE_CPUS:
        return True
    ranks = [rank for node in nodes for rank in node.ranks]
    return all(is_shell(rank) for rank in ranks) or serves_others(nodes)


def is_pausing(node: NodeEvidence) -> bool:
    """Whether a program sleeps until a time: it asks again for a licence, or for a file."""
    return any("nanosleep" in str(rank.get("wchan", "")) for rank in node.ranks)


def is_shell(rank: Dict[str, Any]) -> bool:
    """Whether a process is a shell: bash, or -bash after a login."""
    return str(rank.get("program", "")).lstrip("-") in SHELLS


def serves_others(nodes: List[NodeEvidence]) -> bool:
    """Whether a program of a job waits for a person, for requests or for other jobs."""
    return has_program(WAITERS, nodes) or is_a_persons(nodes)


def has_program(pattern: str, nodes: List[NodeEvidence]) -> bool:
    """Whether a process has such a name."""
    names = [str(rank.get("program", "")) for node in nodes for rank in node.ranks]
    return any(re.search(pattern, name) for name in names)


def is_a_persons(nodes: List[NodeEvidence]) -> bool:
    """Whether a person works in a job.

    A shell is a person's where the job has no script: srun --pty bash, or salloc.
    """
    if has_program(DESKS, nodes):
        return True
    ranks = [rank for node in nodes for rank in node.ranks]
    steps = {str(rank["step"]) for rank in ranks if "step" in rank}
    if not steps or "batch" in steps:
        return False
    return "interactive" in steps or any(is_shell(rank) for rank in ranks)


def find_idle_nodes(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.has_gpus:
        return
    idle = [node for node in nodes if is_idle_for(case, node, seconds)]
    used = {
        node.name: cpus_in_use(
            node, mean_of(recent(node, "job_cpu", case.now, seconds))
        )
        for node in nodes
    }
    busy = [node for node in nodes if used[node.name] >= 0.5]
    idle = [node for node in idle if not is_perhaps_a_master(case, node)]
    if idle and busy:
        lasted = min(
            lasting(node, "job_cpu", case.now, lambda value: value <= 5)
            for node in idle
        )
        yield {
            "idle": len(idle),
            "all": max(int(case.facts.get("nodes", 0)), len(case.nodes)),
            "names": list_words([node.name for node in idle]),
            "busy": busy[0].name,
            "used": used[busy[0].name],
            "cpus": busy[0].sample["job_cpus"],
            "time": time_words(lasted),
        }


def is_perhaps_a_master(case: Case, node: NodeEvidence) -> bool:
    """Whether nothing may be on a node but the rank that hands out work to the others."""
    has_others = any(rank.get("rank", 0) > 0 for rank in node.ranks)
    return node.name == case.first_node and not has_others


def find_serial(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.has_gpus:
        return
    serial = [node for node in nodes if is_serial(case, node, seconds)]
    rest = [node for node in nodes if node not in serial]
    if serial and all(is_idle_for(case, node, seconds) for node in rest):
        node = serial[0]
        yield {
            "nodes": list_words([node.name for node in serial]),
            "cpus": int(node.sample["job_cpus"]),
            "time": time_words(
                lasting(node, "job_cpu", case.now, lambda value: is_one(node, value))
            ),
        }


def find_idle_cpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.has_gpus or case.is_part or not case.is_whole(nodes):
        return
    if any(is_preparing(node) for node in nodes) or serves_others(nodes):
        return
    most = {node.name: few_in_use(case, node, seconds) for node in nodes}
    if not all(most.values()):
        return
    busiest = max(nodes, key=lambda node: most[node.name])
    used = math.ceil(most[busiest.name] - 0.1)  # a little is of us, and of the shell
    tasks = sum(rank.get("cpu", 0) > 20 for rank in busiest.ranks)
    flag = "--ntasks=%d" if tasks >= used else "--cpus-per-task=%d"
    yield {
        "used": used,
        "cpus": int(busiest.sample["job_cpus"]),
        "nodes": list_words([node.name for node in nodes]),
        "time": time_words(seconds),
        "cure": flag % used,
    }


def few_in_use(case: Case, node: NodeEvidence, seconds: float) -> float:
    """How many CPUs a node has used at most where some always work and most never did; else 0.

    Of two threads of a core one may be left idle on purpose: half of the CPUs are all of them.
    """
    least = ONE_CPU[1]

    def works(percent: float) -> bool:
        return cpus_in_use(node, percent) > least

    points = [value for _, value in node.curves["job_cpu"]]
    if max(points) > FEW_PERCENT or not lasts(
        node, "job_cpu", case.now, seconds, works
    ):
        return 0.0
    return cpus_in_use(node, max(points))


def is_one(node: NodeEvidence, percent: float) -> bool:
    """Whether about one CPU is in use."""
    least, most = ONE_CPU
    return least <= cpus_in_use(node, percent) <= most


def is_serial(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether one thread does all the work of a node that has several cores, and always did."""
    if node.sample["job_cpus"] <= CORE_CPUS:
        return False
    if len([rank for rank in node.ranks if rank.get("cpu", 0) > 20]) > 1:
        return False
    if is_a_persons([node]):
        seconds = PATIENT_SECONDS
    elif is_preparing(node):
        seconds = LONG_SECONDS
    points = [cpus_in_use(node, value) for _, value in node.curves["job_cpu"]]
    return max(points) <= 1.5 and lasts(
        node, "job_cpu", case.now, seconds, lambda value: is_one(node, value)
    )


def is_preparing(node: NodeEvidence) -> bool:
    """Whether the work of a node is yet to come: it compiles, unpacks or copies."""
    return has_program(PREPARERS, [node])


def find_few_cpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        groups: Dict[Tuple[int, ...], List[Dict[str, Any]]] = {}
        for rank in node.ranks:
            allowed = parse_cpu_list(rank.get("cpus"))
            if allowed and rank.get("cpu", 0) >= 2:
                groups.setdefault(tuple(sorted(allowed)), []).append(rank)
        used = {cpu for allowed_cpus in groups for cpu in allowed_cpus}
        for allowed_cpus, sharers in groups.items():
            count = len(allowed_cpus)
            ranks = fair_sharers(sharers)
            threads = sum(running_threads(rank) for rank in ranks)
            load = sum(rank["cpu"] for rank in ranks) / 100
            total = node.sample["job_cpus"]
            least = ONE_CPU[0] * count
            # one thread more for a moment is no harm where the others have CPUs of their own
            is_tight = threads >= 2 * count or threads > count and len(used) < total
            is_full = load >= least and is_tight and count < total
            if len(ranks) == 1 and not waits_for_cpus(node):
                continue  # its other threads have run for a moment: they look after messages
            if is_full and lasts(
                node,
                "job_cpu",
                case.now,
                seconds,
                functools.partial(leaves_cpus_idle, node, least),
            ):
                numbers = [int(rank["rank"]) for rank in ranks if "rank" in rank]
                own = "%d CPUs" % total
                yield {
                    "threads": count_words(threads, "thread"),
                    "ranks": ranks_words(numbers),
                    "cpu": "CPU" if count == 1 else "CPUs",
                    "allowed": range_words(allowed_cpus),
                    "node": node.name,
                    "own": range_words(node.cpus) if node.cpus else own,
                }


def running_threads(rank: Dict[str, Any]) -> int:
    """How many threads of a process could run at the last look."""
    return int(rank.get("running", 1))


def fair_sharers(ranks: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Those of some processes on the same CPUs that compute, not a small helper beside them."""
    load = sum(rank["cpu"] for rank in ranks)
    threads = sum(running_threads(rank) for rank in ranks)
    return [
        rank
        for rank in ranks
        if 2 * rank["cpu"] * threads >= load * running_threads(rank)
    ]


def ranks_words(numbers: List[int]) -> str:
    """ " of ranks 0-3"; "" for processes that are no ranks."""
    if not numbers:
        return ""
    noun = "rank" if len(set(numbers)) == 1 else "ranks"
    return " of %s %s" % (noun, range_words(numbers))


def leaves_cpus_idle(node: NodeEvidence, least: float, percent: float) -> bool:
    """Whether at least so many CPUs are in use, and others of the job are not."""
    return percent <= 90 and cpus_in_use(node, percent) >= least


def find_many_threads(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        cpus = node.sample["job_cpus"]
        ranks = [rank for rank in node.ranks if rank.get("running")]
        running = sum(rank["running"] for rank in ranks)
        is_full = lasts(node, "job_cpu", case.now, seconds, lambda value: value >= 95)
        if is_full and is_crowded(node) and running >= 1.2 * cpus:
            yield {
                "severity": "problem"
                if running >= 2 * cpus and not is_preparing(node)
                else "advice",
                "running": int(running),
                "cpus": int(cpus),
                "node": node.name,
                "ranks": count_words(len(ranks), "process"),
                "cure": "make -j%d  # or as many of its like as there are CPUs" % cpus
                if is_preparing(node)
                else "export OMP_NUM_THREADS=%d" % max(1, int(cpus // len(ranks))),
            }


def waits_for_cpus(node: NodeEvidence) -> bool:
    """Whether threads have waited for CPUs for a while, or that is not known."""
    return bool(node.sample.get("psi_cpu", 100.0) >= CROWDED_PERCENT)


def is_crowded(node: NodeEvidence) -> bool:
    """Whether threads have waited for CPUs for a while: a burst of them is soon over."""
    if "psi_cpu" in node.sample:
        return waits_for_cpus(node)
    return bool(node.sample.get("load1", 0.0) >= 1.2 * node.sample["job_cpus"])


def find_uneven(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if not case.is_whole(nodes) or len({n.sample["job_cpus"] for n in nodes}) != 1:
        return
    means = {
        node.name: mean_of(recent(node, "job_cpu", case.now, seconds)) for node in nodes
    }
    for node in nodes:
        others = [value for name, value in means.items() if name != node.name]
        most = median_of(others)
        is_behind = others and most >= 50 and 5 <= means[node.name] < most / 2
        if (
            is_behind
            and node.name != case.first_node
            and lasts(
                node, "job_cpu", case.now, seconds, functools.partial(operator.gt, most)
            )
        ):
            yield {
                "node": node.name,
                "percent": means[node.name],
                "most": most,
                "time": time_words(seconds),
            }


def find_odd_node(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if not case.is_whole(nodes) or len(nodes) < 4:
        return
    if len({len(node.ranks) for node in nodes}) != 1:
        return  # the last node often has fewer ranks
    sizes = {
        node.name: mean_of(recent(node, "job_mem", case.now, seconds)) for node in nodes
    }
    for node in nodes:
        others = [size for name, size in sizes.items() if name != node.name]
        middle = median_of(others)
        do_agree = all(abs(size - middle) <= 0.15 * middle for size in others)
        size = sizes[node.name]
        is_odd = size > 2 * middle or size < middle / 2
        # the first node may gather what the others have computed
        if do_agree and is_odd and middle >= GIB and node.name != case.first_node:
            yield {
                "node": node.name,
                "size": size_words(size),
                "middle": size_words(middle),
                "others": count_words(len(others), "other"),
                "exclude": shlex.quote(node.name),
            }


# ---- GPUs --------------------------------------------------------------------------


def find_idle_gpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    names: List[str] = []
    places: List[Tuple[int, str, str]] = []
    memory: List[float] = []
    times: List[float] = []
    counts: List[int] = []  # of each node
    left_out: List[str] = []
    for node in nodes:
        idle, lasted = idle_gpus(case, node, seconds)
        if idle and len(idle) == len(node.gpus) and is_left_out(case, node):
            left_out.append(node.name)
        counts.append(len(idle))
        if idle:
            numbers = [int(gpu["index"]) for gpu in idle if "index" in gpu]
            names.append("%s gpu %s" % (node.name, range_words(numbers)))
            places.append((len(idle), names[-1], node.name))
            memory += [gpu["mem_used"] for gpu in idle if "mem_used" in gpu]
            times += [lasted] * len(idle)
    if not times:
        return
    total = sum(len(node.gpus) for node in nodes)
    total = max(total, int(case.facts.get("gpus", 0)))
    each = ", at most %s each" % size_words(max(memory)) if memory else ""
    more = ""
    if left_out:
        more += "; %s: no CPU works, either" % list_words(left_out)
    now = sum(is_idle_gpu(gpu) for node in nodes for gpu in node.gpus)
    if now > len(times):
        more += "; %d more are idle just now" % (now - len(times))
    if len(times) == total:
        cure = (
            "srun --jobid=%s --overlap --pty nvidia-smi  # does the program find them?"
            % case.job
        )
    elif case.is_whole(nodes) and min(counts):  # --gres is of each node
        least = max(len(node.gpus) for node in nodes) - min(counts)
        cure = "--gres=gpu:%d  # or does the program know of more than one GPU?" % max(
            1, least
        )
    else:
        _, words, name = max(places, key=operator.itemgetter(0))
        cure = "srun --jobid=%s --overlap --nodes=1 --nodelist=%s --pty nvidia-smi" % (
            case.job,
            shlex.quote(name),
        )
        cure += "  # which ranks should use %s?" % words
    yield {
        "severity": "advice" if serves_others(nodes) else "problem",
        "idle": len(times),
        "all": total,
        "time": time_words(min(times)),
        "names": list_words(names),
        "memory": each + more,
        "cure": cure,
    }


def is_idle_gpu(gpu: Dict[str, Any]) -> bool:
    """Whether a GPU does nothing just now: what is not known is not idle."""
    busy = gpu.get("gpu")
    return busy is not None and busy <= IDLE_GPU


def idle_gpus(
    case: Case, node: NodeEvidence, seconds: float
) -> Tuple[List[Dict[str, Any]], float]:
    """The GPUs of a node that have been idle, and for how long; none when one cannot be read.

    One that no program has opened, while another works, is told after the seconds.  The rest may
    belong to a program that still starts: it is given more time.
    """
    if any("gpu" not in gpu or "index" not in gpu for gpu in node.gpus):
        return [], 0.0
    idle = [gpu for gpu in node.gpus if is_idle_gpu(gpu)]
    are_all = len(idle) == len(node.gpus)
    key = "gpu" if are_all else "gpu_min"
    lasted = lasting(node, key, case.now, lambda value: value <= IDLE_GPU)
    patience = idle_gpu_patience(case, node, are_all)
    if are_all and is_left_out(case, node):
        patience = LONG_SECONDS
    if lasted >= patience - CURVE_STEP / 2:
        return idle, lasted
    works = any(
        gpu["gpu"] > IDLE_GPU
        for other in case.live
        for gpu in other.gpus
        if "gpu" in gpu
    )
    unused = [gpu for gpu in idle if is_unused(gpu)]
    if works and lasted >= seconds - CURVE_STEP / 2:
        return unused, lasted
    return [], 0.0


def is_left_out(case: Case, node: NodeEvidence) -> bool:
    """Whether the CPUs of a node do nothing, either, while most GPUs of all others are at work."""
    others = [other for other in case.live if other.name != node.name]
    if not others or "job_cpus" not in node.sample:
        return False
    rest = recent(node, "job_cpu", case.now, LONG_SECONDS)
    if not rest or max(rest) > LEFT_OUT_CPU:
        return False
    for other in others:
        shares = recent(other, "gpu", case.now, LONG_SECONDS)
        if not shares or min(shares) < WORKING_GPUS:
            return False
    return True


def idle_gpu_patience(case: Case, node: NodeEvidence, are_all: bool) -> float:
    """For how long GPUs of a node may be idle.

    All of them: CPUs prepare the data or files are copied, a service waits.  Some of them, after
    all had worked: one validates what they have learnt.
    """
    if not are_all:
        worked = sum(value > IDLE_GPU for _, value in node.curves["gpu_min"])
        return PATIENT_SECONDS if worked >= 3 else LONG_SECONDS
    points = node.curves["job_cpu"]
    is_known = bool(points) and "job_cpus" in node.sample
    works = not is_known or cpus_in_use(node, points[-1][1]) >= WORKING_CPUS
    if works or not all(is_unused(gpu) for gpu in node.gpus):
        return PATIENT_SECONDS
    if serves_others([node]) or moves_files(case, node):
        return PATIENT_SECONDS
    return LONG_SECONDS


def moves_files(case: Case, node: NodeEvidence) -> bool:
    """Whether a node reads or writes, as far as that is known."""
    return any(
        mean_of(recent(node, key, case.now, LONG_SECONDS)) > QUIET_BYTES
        for key in ("job_read", "job_write")
    )


def is_unused(gpu: Dict[str, Any]) -> bool:
    """Whether no program has opened a GPU: as far as it tells, it holds next to nothing."""
    if "processes" in gpu and gpu["processes"] > 0:
        return False
    return bool(gpu.get("mem_used", MAX_NUMBER) < UNUSED_GPU)


def find_starved_gpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        cpus = node.sample["job_cpus"]
        share = mean_of(recent(node, "gpu", case.now, seconds))
        is_low = lasts(node, "gpu", case.now, seconds, lambda value: value < 50)
        one = functools.partial(is_one, node)
        is_fed_by_one = cpus >= 2 and lasts(node, "job_cpu", case.now, seconds, one)
        if IDLE_GPU < share < 25 and is_low and is_fed_by_one:
            yield {"node": node.name, "share": share, "cpus": int(cpus)}


def find_slowed_gpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        for gpu in node.gpus:
            reason = str(gpu.get("throttle", "")).lower()
            is_harmful = re.search(r"heat|thermal|slowdown|brake", reason)
            if is_harmful and gpu.get("gpu", 0) >= 50 and "index" in gpu:
                heat = ", %d °C" % gpu["temp"] if "temp" in gpu else ""
                yield {
                    "node": node.name,
                    "index": int(gpu["index"]),
                    "reason": gpu["throttle"],
                    "heat": heat,
                    "exclude": shlex.quote(node.name),
                }


# ---- memory ------------------------------------------------------------------------


def fit_line(points: Curve) -> Tuple[float, float]:
    """Least squares: the slope a second, and the share of the variance that it explains."""
    middle_time = mean_of([moment for moment, _ in points])
    middle = mean_of([value for _, value in points])
    across = sum((moment - middle_time) ** 2 for moment, _ in points)
    up = sum((value - middle) ** 2 for _, value in points)
    both = sum((moment - middle_time) * (value - middle) for moment, value in points)
    if across <= 0 or up <= 0:
        return 0.0, 0.0
    return both / across, both * both / (across * up)


def points_until(points: Curve, place: int, seconds: float) -> Curve:
    """The points of the seconds up to one of them, it included."""
    since = points[place][0] - seconds - CURVE_STEP / 2
    first = place
    while first and points[first - 1][0] >= since:
        first -= 1
    return points[first : place + 1]


def grows_steadily(
    node: NodeEvidence, points: Curve, limit: float, seconds: float
) -> bool:
    """Whether memory has done nothing but grow, in a line that meets the limit soon."""
    used = points[-1][1]
    if len(points) <= LEAST_RISES or not limit / 2 <= used < limit:
        return False
    moments = [moment for moment, _ in points]
    if moments[-1] - moments[0] < seconds - CURVE_STEP / 2:
        return False
    for sooner, later in zip(points, points[1:]):
        if later[1] <= sooner[1] or later[0] - sooner[0] > MAX_HOLE:
            return False
    slope, share = fit_line(points)
    if share < 0.95 or (limit - used) / slope > 600:
        return False
    reads = node.curves.get("job_read", [])  # it may not reach as far back
    then = [value for moment, value in reads if moments[0] <= moment <= moments[-1]]
    return used >= 0.8 * limit or not may_load(
        then or [value for _, value in reads], slope
    )


def may_load(reads: List[float], slope: float) -> bool:
    """Whether memory may grow by what is read: that ends with the files.  Unknown is maybe."""
    return not reads or mean_of(reads) >= slope / 2


def growing_since(node: NodeEvidence, seconds: float) -> Optional[float]:
    """Since when a node's memory grows towards its limit; None if it does not.

    It does once it grew steadily for the seconds, and does so until that is refuted: memory
    fell, stood still, or reached no new height for a while.  A program whose memory grows also
    frees some now and then.
    """
    limit = node.sample["job_mem_limit"]
    points = node.curves["job_mem"][-GROWTH_POINTS:]
    newest = points[-1]
    lately = [used for moment, used in points if moment >= newest[0] - GROWTH_SECONDS]
    has_moved = max(lately) - min(lately) >= STILL * limit  # most jobs have not
    if newest[1] < (0.5 - FALLEN) * limit or not has_moved:
        return None
    since: Optional[float] = None
    height = 0.0  # the highest so far, and when that was
    reached = 0.0
    before = math.inf
    rises = 0  # one after the other
    for place, (moment, used) in enumerate(points):
        rises = rises + 1 if used > before else 0
        before = used
        if rises >= LEAST_RISES and used >= limit / 2:
            window = points_until(points, place, seconds)
            if grows_steadily(node, window, limit, seconds):
                since = window[0][0] if since is None else since
                height = used
                reached = moment
                continue
        if since is None:
            continue
        last = [value for _, value in points_until(points, place, SOON_SECONDS)]
        is_still = len(last) >= 3 and max(last) - min(last) <= STILL * limit
        if used >= height + RISEN * limit:
            height = used
            reached = moment
        has_fallen = used < height - FALLEN * limit
        if is_still or has_fallen or moment - reached > GROWTH_SECONDS:
            since = None
    return since


def find_growth(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    found = []
    for node in nodes:
        points = node.curves["job_mem"]
        used = points[-1][1]
        limit = node.sample["job_mem_limit"]
        if used <= TOOTH * given_back(points):
            continue  # as much was given back before, and will be again
        begun = growing_since(node, seconds)
        if begun is not None:
            since = max(begun, case.now - GROWTH_SECONDS)
        elif climbs(case, node):
            since = case.now - LONG_SECONDS - CURVE_STEP / 2
        else:
            continue
        points = [point for point in points if point[0] >= since]
        slope, _ = fit_line(points)
        if slope > 0:
            left = max(0.0, limit - used) / slope
            found.append((left, slope, used, limit, node, points[0][0]))
    if found:
        left, slope, used, limit, node, since = min(found, key=operator.itemgetter(0))
        largest = largest_rank_words(node.ranks)
        pace = "at this pace it is full in %s" % time_words(left)
        yield {
            "node": node.name,
            "used": used / GIB,
            "limit": limit / GIB,
            "pace": size_words(60 * slope),
            "left": pace if used < limit else "it is full",
            "time": time_words(CURVE_STEP * round((case.now - since) / CURVE_STEP)),
            "largest": "; " + largest if largest else "",
            "flag": memory_flag(limit),
        }


def climbs(case: Case, node: NodeEvidence) -> bool:
    """Whether memory has grown towards its limit step by step: no straight line for a minute."""
    if not lasts(node, "job_mem", case.now, LONG_SECONDS, is_any):
        return False
    since = case.now - LONG_SECONDS - CURVE_STEP / 2
    points = [point for point in node.curves["job_mem"] if point[0] >= since]
    used = points[-1][1]
    limit = node.sample["job_mem_limit"]
    if len(points) <= LEAST_RISES or not limit / 2 <= used < limit:
        return False
    slope, share = fit_line(points)
    steps = [later[1] - sooner[1] for sooner, later in zip(points, points[1:])]
    growth = used - points[0][1]
    is_up = min(steps) >= -0.1 * growth  # some are level, or a little down
    if share < 0.95 or slope <= 0 or not is_up or (limit - used) / slope > 600:
        return False
    reads = recent(node, "job_read", case.now, LONG_SECONDS)
    return used >= 0.8 * limit or not may_load(reads, slope)


def given_back(points: Curve) -> float:
    """The most that memory had been before a tenth of it was given back; 0 if it never was."""
    top = 0.0
    highest = 0.0
    for _, value in points:
        top = max(top, value)
        if value <= 0.9 * top:
            highest = top
    return highest


def find_little_memory(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        limit = node.sample["job_mem_limit"]
        if is_nearly_full(case, node, seconds):
            used = node.curves["job_mem"][-1][1]
            largest = largest_rank_words(node.ranks)
            yield {
                "severity": "problem" if used > 0.95 * limit else "advice",
                "node": node.name,
                "used": used / GIB,
                "limit": limit / GIB,
                "percent": min(100.0, 100 * used / limit),
                "largest": "; " + largest if largest else "",
                "flag": memory_flag(limit),
            }


def is_nearly_full(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether memory was above 90 % for so long, in the last minutes, and has not fallen since.

    What is nearly full does not become fine because a little was freed for a moment.
    """
    limit = node.sample["job_mem_limit"]
    enough = seconds - CURVE_STEP / 2
    end: Optional[float] = None  # of a time above 90 %
    later = case.now
    for moment, used in reversed(node.curves["job_mem"]):
        if used < (NEAR_LIMIT - FALLEN) * limit:
            return False
        if used <= NEAR_LIMIT * limit or later - moment > MAX_HOLE:
            end = None
        if used > NEAR_LIMIT * limit:
            end = moment if end is None else end
            if end - moment >= enough:
                return case.now - end <= GROWTH_SECONDS
        later = moment
    return False


def find_cache(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        used = node.sample["job_mem"]
        cache = node.sample["job_cache"]
        limit = node.sample["job_mem_limit"]
        if used <= 0.9 * limit and used + cache >= 0.95 * limit:
            yield {
                "node": node.name,
                "cache": size_words(cache),
                "used": size_words(used),
                "limit": size_words(limit),
            }


class MemoryPeak(NamedTuple):
    """What a job needed on the node where it needed most."""

    sampled: float
    peak: float  # by the kernel where it counts
    limit: float
    samples: int
    is_counted: bool  # by the kernel, on all nodes

    @property
    def source(self) -> str:
        """Whose count it is, of how many runs and samples."""
        return (KERNEL_COUNT if self.is_counted else SAMPLED_COUNT) % self.samples


def memory_peak(case: Case, nodes: List[NodeEvidence]) -> MemoryPeak:
    """The peak of these nodes; the kernel's count holds the page cache as well."""
    sampled = 0.0
    counted = 0.0
    for node in nodes:
        points = [value for _, value in node.curves["job_mem"]]
        sampled = max([sampled, node.sample["job_mem"]] + points)
        counted = max(counted, node.sample.get("job_mem_peak", 0.0))
    return MemoryPeak(
        sampled,
        max(sampled, counted),
        min(node.sample["job_mem_limit"] for node in nodes),
        sum(len(node.curves["job_mem"]) for node in nodes),
        all("job_mem_peak" in node.sample for node in nodes),
    )


def find_too_much_memory(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if not case.is_whole(nodes) or case.kills or not may_advise(case):
        return
    if case.is_running and serves_others(nodes):
        return  # what a person will do with it is not known
    if any(not has_covered(node, "job_mem", seconds) for node in nodes):
        return
    if all(has_whole_node(node) for node in nodes):
        return  # nobody else could use its memory
    known = memory_peak(case, nodes)
    cached = max(node.sample["job_mem"] + node.sample["job_cache"] for node in nodes)
    ample = max(known.peak, cached)  # what the page cache had was of use, too
    flag = memory_flag(known.peak)
    is_low = flag_bytes(memory_flag(ample)) <= known.limit / 2
    if known.limit - ample < GIB:
        return
    if is_low and (not case.is_running or are_flat(case, nodes, known, seconds)):
        yield memory_figures(case, known, flag)


def has_whole_node(node: NodeEvidence) -> bool:
    """Whether all CPUs of a node are the job's."""
    return bool(node.sample["job_cpus"] >= node.sample["cpus"] > CORE_CPUS)


def find_tight_memory(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if not case.is_whole(nodes) or case.kills or not case.has_completed:
        return
    known = memory_peak(case, nodes)
    if known.sampled > 0.9 * known.limit:
        # all that the kernel counted may be page cache, what was sampled is none
        yield memory_figures(case, known, memory_flag(known.sampled))


def memory_figures(case: Case, known: MemoryPeak, flag: str) -> Figures:
    """What the advice on memory says."""
    return {
        "peak": MEMORY_PEAK % (known.peak / GIB, known.limit / GIB),
        "so_far": " so far" if case.is_running else "",
        "source": known.source,
        "flag": flag,
    }


def may_advise(case: Case) -> bool:
    """Whether what a job has used tells anything of its next run."""
    return case.is_running or case.has_completed or case.state == "TIMEOUT"


def has_covered(node: NodeEvidence, key: str, seconds: float) -> bool:
    """Whether a curve is that long."""
    points = node.curves.get(key, [])
    return bool(points) and points[-1][0] - points[0][0] >= seconds - CURVE_STEP / 2


def are_flat(
    case: Case, nodes: List[NodeEvidence], known: MemoryPeak, seconds: float
) -> bool:
    """Whether no node's memory has risen for so long: then the peak is perhaps the last."""
    for node in nodes:
        if not lasts(node, "job_mem", case.now, seconds, is_any):
            return False
        points = recent(node, "job_mem", case.now, seconds)
        if max(points) - points[0] > 0.02 * known.peak:
            return False
    return True


def find_swapping(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        is_used = node.sample["swap"] >= 20
        waits = functools.partial(operator.le, 10)
        if is_used and lasts(node, "psi_mem", case.now, seconds, waits):
            yield {
                "node": node.name,
                "swap": node.sample["swap"],
                "wait": min(recent(node, "psi_mem", case.now, seconds)),
            }


# ---- files, time, nodes ------------------------------------------------------------


def find_io_wait(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        waiting = [rank for rank in node.ranks if rank.get("state") == "D"]
        known = [rank for rank in node.ranks if "read" in rank and "write" in rank]
        if not waiting or len(known) < len(node.ranks):
            continue
        rate = sum(rank["read"] + rank["write"] for rank in known)
        waits = lasts(node, "psi_io", case.now, seconds, lambda value: value >= 50)
        idles = lasts(node, "job_cpu", case.now, seconds, lambda value: value < 50)
        if waits and idles and rate < SLOW_BYTES:
            yield {
                "node": node.name,
                "ranks": count_words(len(waiting), "process"),
                "wait": min(recent(node, "psi_io", case.now, seconds)),
                "rate": rate / 1e6,
            }


def find_full_filesystem(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for key, name, least in FILESYSTEMS:
        full = [
            node
            for node in nodes
            if node.sample.get(key, 0) >= least
            and lasts(
                node, key, case.now, seconds, functools.partial(operator.le, least)
            )
        ]
        if full:
            yield {
                "name": name,
                "nodes": list_words([node.name for node in full]),
                "percent": full[0].sample[key],
                "cure": FULL_CURES[key],
            }


def find_time_left(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    # a node's clock may be wrong, and the limit may have been raised: Slurm knows
    left = median_of([node.sample["job_time_left"] for node in nodes])
    limit = max(node.sample["job_time_limit"] for node in nodes)
    end = case.facts.get("end", 0.0)
    left = max(left, end - case.now)
    if left < 600 and left < limit * LAST_PART:
        yield {
            "left": time_words(left),
            "limit": time_words(limit),
            "flag": time_flag(limit),
        }


def find_too_much_time(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    ran = case.ran
    limit = case.facts["limit"]
    if case.state != "COMPLETED" or ran is None or ran < seconds:
        return
    if ran < 0.6 * limit and limit - ran >= 1800:
        yield {
            "ran": time_words(ran),
            "limit": time_words(limit),
            "flag": time_flag(ran),
        }


def find_silent_nodes(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    moments = [(node.lost or 0.0, node.name) for node in case.silent]
    if not moments:
        return
    first, name = min(moments)
    # then it is hardly the nodes: they are back when the master or its network is
    is_burst = case.burst is not None and abs(case.burst - first) <= 2 * BURST_SECONDS
    patience = seconds if case.live and not is_burst else ALONE_SECONDS
    if case.now - first < patience:
        return
    others = [other for _, other in sorted(moments)[1:]]
    rest = "; then %s" % list_words(others) if others else ""
    live = [node.name for node in case.live]
    words = "still sending: %s" % list_words(live) if live else "no other sends"
    if is_burst:
        words += "; most nodes of all jobs fell silent together: the master or its"
        words += " network was late, perhaps"
    yield {
        "node": name,
        "quoted": shlex.quote(name),
        "time": clock_words(first, "%H:%M:%S"),
        "ago": time_words(case.now - first),
        "rest": rest,
        "live": words,
    }


def find_survived_kill(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    kills = case.kills
    if kills and (case.is_running or case.has_completed):
        yield {
            "kills": OUT_OF_MEMORY % count_words(sum(kills.values()), "process"),
            "nodes": list_words(list(kills)),
            "goes": goes_words(case),
            "proof": memory_proof(case),
            "flag": more_memory(case),
        }


def goes_words(case: Case) -> str:
    """How the job went on after something in it had failed."""
    if case.is_running:
        return "the job still runs"
    if case.state == "COMPLETED":
        return "Slurm says COMPLETED"
    return "the command ended with exit code 0"


def find_requeued(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state not in WAITING_STATES:
        return
    ran = [node for node in nodes if any(node.curves.values())]
    if ran:
        last = max(last_heard(node) for node in ran)
        reason = str(case.facts.get("reason", "Slurm has told no reason"))
        is_held = "held" in reason.lower()
        update = "scontrol update JobId=%s Requeue=0  # if it must not start twice"
        yield {
            "nodes": list_words([node.name for node in ran]),
            "time": clock_words(last),
            "reason": reason,
            "waits": "is held" if is_held else "waits to start again",
            "cure": ("scontrol release %s" if is_held else update) % case.job,
        }


def find_failed_step(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    derived = parse_exit(case.facts.get("derived_exit"))
    words = []
    if case.failure:
        words.append("%s on %s" % (case.failure.bye, case.failure.node))
    elif case.facts.get("failed_step"):
        words.append(str(case.facts["failed_step"]))
    elif derived and derived != (0, 0) and derived[1] not in LEFTOVER_SIGNALS:
        is_memory = derived == (0, 125)
        code = "a step ended with %d:%d" % derived
        words.append("a step was out of memory" if is_memory else code)
    if words and (case.is_running or case.state == "COMPLETED"):
        yield {
            "words": words[0],
            "goes": goes_words(case),
            "proof": case.testimony(),
        }


# ---- deaths ------------------------------------------------------------------------


def killed_limit(case: Case) -> float:
    """The limit of memory where the kernel killed, or of all nodes; 0 when it is not known."""
    limits = {
        node.name: node.sample["job_mem_limit"]
        for node in case.nodes
        if "job_mem_limit" in node.sample
    }
    killed = [limits[name] for name in case.kills if name in limits]
    asked = float(case.facts.get("mem", 0.0))  # of each node
    return max(killed or limits.values(), default=asked)


def more_memory(case: Case) -> str:
    """What to ask for where the memory was too little: to look it up, where it is not known."""
    limit = killed_limit(case)
    if limit:
        return memory_flag(limit)
    return "scontrol show job %s | grep -i mem  # and ask for more: --mem=" % case.job


def memory_proof(case: Case) -> str:
    """What is known of memory on the node that was short of it."""
    nodes = [node for node in case.nodes if node.name in case.kills] or case.nodes
    nodes = [n for n in nodes if "job_mem" in n.sample and "job_mem_limit" in n.sample]
    if not nodes:
        return ""
    node = max(
        nodes, key=lambda n: float(n.sample["job_mem"] / n.sample["job_mem_limit"])
    )
    points = node.curves.get("job_mem", [])
    used = max([node.sample["job_mem"]] + [value for _, value in points])
    words = [BELOW_PEAK % (used / GIB, node.sample["job_mem_limit"] / GIB)]
    if len(nodes) > 1:
        words.insert(0, "fullest: %s" % node.name)
    seen = sum(rank.get("mem", 0.0) for rank in node.ranks)
    largest = largest_rank_words(node.ranks)
    if largest and seen >= node.sample["job_mem_limit"] / 2:
        words.append(largest)  # else it came and went between two looks
    slope, lasted = last_growth(node)
    if slope:
        growth = (size_words(60 * slope), time_words(lasted))
        words.append("it grew by %s a minute for %s" % growth)
    return "; ".join(words) + "; "


def last_growth(node: NodeEvidence) -> Tuple[float, float]:
    """(bytes a second, for how many seconds): how memory grew up to the end; (0, 0) if not."""
    points = node.curves.get("job_mem", [])[-60:]
    if len(points) < 5:
        return 0.0, 0.0
    slope, share = fit_line(points)
    used = max(value for _, value in points)
    if share < 0.9 or 60 * slope <= 0.01 * used:
        return 0.0, 0.0
    return slope, points[-1][0] - points[0][0]


def death(case: Case, **figures: Any) -> Figures:
    """The figures that all deaths have."""
    figures["time"] = clock_words(case.end)
    figures["testimony"] = case.testimony()
    return figures


def find_out_of_memory(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    kills = case.kills
    derived = parse_exit(case.facts.get("derived_exit"))
    told = case.state == "OUT_OF_MEMORY" or case.exit == (0, 125)
    told = told or case.state == "FAILED" and derived == (0, 125)
    counted = kills and case.state in ("", "RUNNING", "COMPLETING", "FAILED")
    if not told and not counted:
        return
    names = list(kills)
    if not kills and len(case.nodes) == 1:
        names = [case.nodes[0].name]
    where = " on %s" % list_words(names) if names else ""
    if kills:
        words = OUT_OF_MEMORY % count_words(sum(kills.values()), "process") + where
    else:
        words = "out of memory%s, says Slurm; the kernel's count was not seen" % where
    flag = more_memory(case)
    proof = memory_proof(case)
    holder = one_holder(case)
    if holder:
        flag += "  # or distribute: %s holds it all" % holder
    elif flag.startswith("--mem=") and any(last_growth(node)[0] for node in case.nodes):
        flag += "  # " + STILL_GREW
    yield death(case, words=words, proof=proof, flag=flag)


def one_holder(case: Case) -> str:
    """The rank that has most of the memory of several; "" when there is none."""
    ranks = [rank for node in case.nodes for rank in node.ranks if "mem" in rank]
    ranks.sort(key=lambda rank: -rank["mem"])
    if len(ranks) >= 3 and ranks[0]["mem"] > 10 * ranks[1]["mem"]:
        return rank_words(ranks[0]).split(" (")[0]
    return ""


def find_time_limit(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state not in ("TIMEOUT", "DEADLINE"):
        return
    limit = case.facts.get("limit") or case.ran
    ran = case.ran
    busy = [node for node in case.nodes if node.curves.get("job_cpu")]
    last = mean_of([value for node in busy for _, value in node.curves["job_cpu"][-6:]])
    yield death(
        case,
        limit=" of %s" % time_words(limit) if limit else "",
        ran="it ran for %s; " % time_words(ran) if ran else "",
        busy="CPUs %.0f %% busy at the end; " % last if busy else "",
        flag=time_flag(1.5 * limit) if limit else "--time",
    )


def find_node_failure(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state not in ("NODE_FAIL", "BOOT_FAIL"):
        return
    silent = sorted((node.lost or 0.0, node.name) for node in case.silent)
    words = "a node failed"
    proof = ""
    if silent:
        words = "node %s failed" % silent[0][1]
        order = [
            "%s at %s" % (name, clock_words(moment, "%H:%M:%S"))
            for moment, name in silent
        ]
        proof = "fell silent first: %s; " % list_words(order)
    exclude = " --exclude=%s" % shlex.quote(silent[0][1]) if silent else ""
    yield death(case, words=words, proof=proof, exclude=exclude)


def find_preempted(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state == "PREEMPTED":
        yield death(case)


def find_cancelled(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state != "CANCELLED":
        return
    match = re.search(r"\bby (\w+)", str(case.facts["state"]))
    who = case.facts.get("cancelled_by", match.group(1) if match else None)
    words = "; by whom is not known without accounting"
    if who in ("0", "root"):
        words = " by root: an administrator, or Slurm itself"
    elif who is not None:
        words = " by %s" % ("user %s" % who if str(who).isdigit() else who)
    ran = "after %s; " % time_words(case.ran) if case.ran else ""
    yield death(case, who=words, ran=ran)


class Ending(NamedTuple):
    """How a command ended, and who says so."""

    code: Optional[int]
    signal: str  # SIGSEGV; "" without one
    node: str  # "" when that is not known


def find_ending(case: Case) -> Optional[Ending]:
    """How a failed job's command ended: by the wrapper, who saw it, else by Slurm."""
    if case.failure:
        bye = case.failure.bye
        code = int(bye[5:]) if re.fullmatch(r"exit \d{1,3}", bye) else None
        named = bye if bye.startswith("SIG") else ""
        if code is not None and code > 128:
            named = SIGNALS.get(code - 128, "")
        return Ending(code, named, case.failure.node)
    if case.exit and case.state not in RUNNING_STATES:
        code, number = case.exit
        if number not in SIGNALS and code > 128:
            number = code - 128
        node = case.nodes[0].name if len(case.nodes) == 1 else ""
        return Ending(code, SIGNALS.get(number, ""), node)
    return None


def failed_ending(case: Case) -> Optional[Ending]:
    """How the command of a job ended that failed, or has failed as far as its agents tell."""
    if case.state in ("FAILED", "") or case.state in RUNNING_STATES:
        return find_ending(case)
    return None


def find_signal(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    ending = failed_ending(case)
    if not ending or not ending.signal:
        return
    meaning = SIGNAL_WORDS.get(ending.signal, "somebody sent it, or the program itself")
    cure = SIGNAL_CURES.get(ending.signal, "")
    if ending.signal == "SIGBUS":
        full = full_shared_memory(case)
        if full:
            meaning = "its shared memory had no room: %s" % full
            cure = FREE_SHM
    if ending.signal == "SIGILL" and ending.node:
        meaning += " than %s has" % ending.node
    yield death(
        case,
        signal=ending.signal,
        where=" on %s" % ending.node if ending.node else "",
        meaning=meaning,
        shell=shell_words(ending),
        cure=cure,
    )


def shell_words(ending: Ending) -> str:
    """Where a signal's number comes from an exit code, that is said."""
    if ending.code is not None and ending.code > 128:
        return "exit code %d is how a shell tells it; " % ending.code
    return ""


def full_shared_memory(case: Case) -> str:
    """/dev/shm of c1 at 100 %; "" when none is full, or that is not known."""
    for node in case.nodes:
        if node.sample.get("disk_shm", 0) >= 98:
            return "/dev/shm of %s at %.0f %%" % (node.name, node.sample["disk_shm"])
    return ""


def find_not_started(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    ending = failed_ending(case)
    if ending and ending.code in (126, 127):
        is_missing = ending.code == 127
        yield death(
            case,
            code=ending.code,
            words="there is no such command"
            if is_missing
            else "the command cannot be run",
            where=" on %s" % ending.node if ending.node else "",
            cure="module load ...  # or the program's whole path, which the nodes must see"
            if is_missing
            else "chmod +x PROGRAM  # and its first line must name what runs it",
        )


def find_no_output_file(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.state == "FAILED" and case.exit == (0, 53):
        yield death(case)


def find_exit_code(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    ending = failed_ending(case)
    if case.state == "FAILED" and not ending:
        yield death(case, words="it failed", where="")
    elif ending and ending.code is not None:
        where = " on %s" % ending.node if ending.node else ""
        yield death(case, words="exit code %d" % ending.code, where=where)


SRUN_BIND = 'srun --cpu-bind=cores --cpus-per-task="$SLURM_CPUS_PER_TASK" PROGRAM'
DIED = "{time}: "

CHECKS: Tuple[Check, ...] = (
    # ---- deaths: the first that fits tells why; what each source says is in the proof
    Check(
        name="out_of_memory",
        severity="died",
        phase=ENDED,
        find=find_out_of_memory,
        what=DIED + "{words}",
        proof="{proof}{testimony}",
        cure="{flag}",
        source="Linux cgroup-v2.rst, memory.events oom_kill; cgroup-v1 memory.oom_control",
        instead_of=(
            "signal",
            "not_started",
            "exit_code",
            "failed_step",
            "kill_survived",
        ),
    ),
    Check(
        name="time_limit",
        severity="died",
        phase=ENDED,
        facts=("state",),
        find=find_time_limit,
        what=DIED + "time limit{limit} reached",
        proof="{ran}{busy}{testimony}",
        cure="{flag}",
        source="squeue(1), JOB STATE CODES: TIMEOUT, DEADLINE",
        instead_of=("signal", "not_started", "exit_code"),
    ),
    Check(
        name="node_failure",
        severity="died",
        phase=ENDED,
        facts=("state",),
        find=find_node_failure,
        what=DIED + "{words}",
        proof="{proof}{testimony}",
        cure="sbatch --requeue{exclude} SCRIPT",
        source="squeue(1), JOB STATE CODES: NODE_FAIL, BOOT_FAIL",
        instead_of=("signal", "not_started", "exit_code"),
    ),
    Check(
        name="preempted",
        severity="died",
        phase=ENDED,
        facts=("state",),
        find=find_preempted,
        what=DIED + "preempted: a job of higher priority took its nodes",
        proof="{testimony}",
        cure="sbatch --requeue --signal=B:TERM@60 SCRIPT  # and save its state on SIGTERM",
        source="squeue(1), JOB STATE CODES: PREEMPTED",
        instead_of=("signal", "not_started", "exit_code"),
    ),
    Check(
        name="cancelled",
        severity="died",
        phase=ENDED,
        facts=("state",),
        find=find_cancelled,
        what=DIED + "cancelled{who}",
        proof="{ran}{testimony}",
        cure="",
        source="squeue(1), JOB STATE CODES: CANCELLED; sacct(1), State: CANCELLED by UID",
        instead_of=("signal", "not_started", "exit_code"),
    ),
    Check(
        name="no_output_file",
        severity="died",
        phase=ENDED,
        facts=("state", "exit"),
        find=find_no_output_file,
        what=DIED + "it did not start: its output file could not be opened",
        proof="{testimony}",
        cure='mkdir -p "$(dirname OUTPUT)"  # the directory of --output must be there',
        source="Slurm, slurmd: ESLURMD_IO_ERROR ends a script with 0:53",
        instead_of=("signal", "not_started", "exit_code"),
    ),
    Check(
        name="signal",
        severity="died",
        phase=ENDED,
        find=find_signal,
        what=DIED + "{signal}{where}: {meaning}",
        proof="{shell}{testimony}",
        cure="{cure}",
        source="signal(7); wait status of the wrapper's command; Slurm's CODE:SIGNAL",
        instead_of=("not_started", "exit_code"),
    ),
    Check(
        name="not_started",
        severity="died",
        phase=ENDED,
        find=find_not_started,
        what=DIED + "exit code {code}{where}: {words}",
        proof="{testimony}",
        cure="{cure}",
        source="POSIX shell, 2.8.2: 126 cannot be executed, 127 not found",
        instead_of=("exit_code",),
    ),
    Check(
        name="exit_code",
        severity="died",
        phase=ENDED,
        find=find_exit_code,
        what=DIED + "{words}{where}",
        proof="{testimony}",
        cure="",
        source="squeue(1), JOB STATE CODES: FAILED",
    ),
    # ---- what went wrong, though the job did not end of it
    Check(
        name="kill_survived",
        severity="problem",
        phase=ANY,
        find=find_survived_kill,
        what="{kills} on {nodes}; {goes}",
        proof="{proof}",
        cure="{flag}",
        source="Linux cgroup-v2.rst, memory.events oom_kill; cgroup-v1 memory.oom_control",
        instead_of=("memory_near_limit",),
    ),
    Check(
        name="failed_step",
        severity="problem",
        phase=ANY,
        find=find_failed_step,
        what="{words}, and {goes}",
        proof="{proof}",
        cure="set -e  # at the top of the script: it then ends with the first that fails",
        source="wait status of the wrapper's command; scontrol(1), DerivedExitCode",
    ),
    Check(
        name="requeued",
        severity="problem",
        phase=ANY,
        facts=("state",),
        find=find_requeued,
        what="requeued: it ran until {time} on {nodes} and {waits}",
        proof="{reason}",
        cure="{cure}",
        source="squeue(1), JOB STATE CODES: REQUEUED; Slurm's lab, a node that was cut off",
    ),
    Check(
        name="node_silent",
        severity="problem",
        phase=RUNNING,
        seconds=SILENT_SECONDS,
        find=find_silent_nodes,
        what="{node} fell silent at {time}, {ago} ago{rest}",
        proof="no goodbye; {live}",
        cure="scontrol show node {quoted} | grep -E 'State|Reason'",
        source="the collector's deadline: no sample, and no goodbye",
    ),
    # ---- CPUs
    Check(
        name="few_cpus",
        severity="problem",
        phase=RUNNING,
        needs=("job_cpus", "ranks"),
        holds=("job_cpu",),
        seconds=HOLD_SECONDS,
        find=find_few_cpus,
        what="{threads}{ranks} share {cpu} {allowed} of {node}",
        proof="they may use: {allowed}; the job has {own}",
        cure=SRUN_BIND,
        source="proc(5), Cpus_allowed_list; JDS, serial_allocating_multiple: 0.85",
        instead_of=("serial", "many_threads"),
    ),
    Check(
        name="serial",
        severity="problem",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("job_cpu",),
        seconds=HOLD_SECONDS,
        find=find_serial,
        what="1 of {cpus} CPUs of {nodes} at work for {time}",
        proof="as much as one thread can, and no more: the program is serial, or bound to one CPU",
        cure="--cpus-per-task=1  # or, if it can use threads:"
        ' export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"',
        source="JDS, serial_allocating_multiple: efficiency / (100 % / CPUs) >= 0.85",
    ),
    Check(
        name="idle_cpus",
        severity="advice",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("job_cpu",),
        seconds=LONG_SECONDS,
        find=find_idle_cpus,
        what="at most {used} of {cpus} CPUs of {nodes} at work for {time}",
        proof="never more since it is watched: the rest are idle",
        cure="{cure}",
        source="jobstats, CPU_UTIL: low overall CPU utilization",
    ),
    Check(
        name="idle_job",
        severity="problem",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("job_cpu",),
        seconds=HOLD_SECONDS,
        find=find_idle_job,
        what="{cpus} idle for {time}",
        proof="nothing computes, reads or writes on {nodes}",
        cure="scontrol show job {job} | grep StdOut  # what are the last lines of that file?",
        source="jobstats: zero CPU utilization",
    ),
    Check(
        name="idle_nodes",
        severity="problem",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("job_cpu",),
        seconds=HOLD_SECONDS,
        find=find_idle_nodes,
        what="{idle} of {all} nodes idle for {time}: {names}",
        proof="{busy} uses {used:.1f} of {cpus:.0f} CPUs; the rest do nothing, no I/O either",
        cure='srun --nodes="$SLURM_NNODES" PROGRAM  # without srun it runs on the first node'
        " alone; or --nodes=1",
        source="jobstats: unused nodes of a job of several nodes",
        instead_of=("uneven_nodes",),
    ),
    Check(
        name="many_threads",
        severity="advice",
        phase=RUNNING,
        needs=("job_cpus", "ranks"),
        holds=("job_cpu",),
        seconds=HOLD_SECONDS,
        find=find_many_threads,
        what="{running} threads take turns on {cpus} CPUs of {node}",
        proof="they are all ready to run, of {ranks}, and the CPUs are full",
        cure="{cure}",
        source="cc-backend, highload: load > 1.2 x CPUs",
    ),
    Check(
        name="uneven_nodes",
        severity="advice",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("job_cpu",),
        seconds=LONG_SECONDS,
        find=find_uneven,
        what="{node} computes less than half of what the other nodes do",
        proof="CPUs {percent:.0f} % busy for {time}, the others {most:.0f} %",
        cure="srun --distribution=block --ntasks-per-node=N PROGRAM  # as many ranks on each",
        source="cc-backend, parameters: node load imbalance; half is ours",
    ),
    # ---- GPUs
    Check(
        name="idle_gpus",
        severity="problem",
        phase=RUNNING,
        needs=("gpus",),
        holds=("gpu",),
        seconds=HOLD_SECONDS,
        find=find_idle_gpus,
        what="{idle} of {all} GPUs idle for {time}",
        proof="{names} at 0 %{memory}",
        cure="{cure}",
        source="jobstats: unused GPUs, after MIN_RUNTIME_SECONDS = 10 x 30 s",
        instead_of=("starved_gpus",),
    ),
    Check(
        name="starved_gpus",
        severity="advice",
        phase=RUNNING,
        needs=("job_cpus",),
        holds=("gpu", "job_cpu"),
        seconds=2 * HOLD_SECONDS,
        find=find_starved_gpus,
        what="the GPUs of {node} wait for one busy CPU",
        proof="GPUs {share:.0f} % busy, 1 of {cpus} CPUs at work",
        cure="--cpus-per-task=8  # and as many workers in the data loader: num_workers",
        source="jobstats, GPU_UTIL_BLACK = 25 %",
    ),
    Check(
        name="slowed_gpus",
        severity="advice",
        phase=RUNNING,
        needs=("gpus",),
        find=find_slowed_gpus,
        what="GPU {index} of {node} is slowed down: {reason}",
        proof="it is busy{heat}; a power cap alone would be no defect",
        cure="sbatch --exclude={exclude} SCRIPT  # and tell the cluster's support",
        source="NVML, nvmlClocksThrottleReasons: thermal slowdown, power brake",
    ),
    # ---- memory
    Check(
        name="memory_grows",
        severity="problem",
        phase=RUNNING,
        needs=("job_mem", "job_mem_limit"),
        holds=("job_mem",),
        seconds=HOLD_SECONDS,
        find=find_growth,
        what="memory of {node} grows steadily: {left}",
        proof="{used:.3g} GB of {limit:.3g} GB, {pace} more a minute for {time}{largest}",
        cure="{flag}  # if it needs that; a leak only takes longer",
        source="cc-backend, parameters: memory leak slope; straight line with R2 >= 0.95",
        instead_of=("memory_near_limit",),
    ),
    Check(
        name="memory_near_limit",
        severity="advice",
        phase=RUNNING,
        needs=("job_mem", "job_mem_limit"),
        holds=("job_mem",),
        seconds=SOON_SECONDS,
        find=find_little_memory,
        what="memory of {node} is nearly full: {used:.3g} GB of {limit:.3g} GB",
        proof="{percent:.0f} %, page cache not counted{largest}",
        cure="{flag}",
        source="cc-backend, highMemoryUsage: 0.9",
    ),
    Check(
        name="swapping",
        severity="problem",
        phase=RUNNING,
        needs=("swap",),
        holds=("psi_mem",),
        seconds=HOLD_SECONDS,
        find=find_swapping,
        what="{node} swaps: processes wait for memory {wait:.0f} % of the time",
        proof="{swap:.0f} % of its swap space is in use",
        cure="--exclusive  # or more --mem: fewer share the node then",
        source="Linux, accounting/psi.rst: some avg10 of memory",
    ),
    Check(
        name="page_cache",
        severity="fine",
        phase=RUNNING,
        needs=("job_mem", "job_cache", "job_mem_limit"),
        find=find_cache,
        what="the memory of {node} is full of page cache, and that is no problem",
        proof="{cache} are files that the kernel drops when memory is needed; the program has"
        " {used} of {limit}",
        cure="",
        source="Linux cgroup-v2.rst, memory.stat: file",
    ),
    # ---- files, I/O
    Check(
        name="waits_for_io",
        severity="advice",
        phase=RUNNING,
        needs=("ranks",),
        holds=("psi_io", "job_cpu"),
        seconds=HOLD_SECONDS,
        find=find_io_wait,
        what="{ranks} of {node} wait for I/O and move only {rate:.1f} MB/s",
        proof="{wait:.0f} % of the time something waits there (PSI)",
        cure='cp -r INPUT "${{TMPDIR:-/tmp}}"  # many small files: work on the node\'s own disk',
        source="Linux, accounting/psi.rst: some avg10 of io; proc(5), state D",
    ),
    Check(
        name="full_filesystem",
        severity="problem",
        phase=RUNNING,
        seconds=SOON_SECONDS,
        find=find_full_filesystem,
        what="{name} is full on {nodes}",
        proof="{percent:.0f} % in use",
        cure="{cure}",
        source="df(1): used / (used + available)",
    ),
    # ---- the end of the time; the next run
    Check(
        name="time_limit_near",
        severity="advice",
        phase=RUNNING,
        needs=("job_time_left", "job_time_limit"),
        find=find_time_left,
        what="{left} left of {limit}; whether that is enough is not known",
        proof="a job does not tell how far it is",
        cure="{flag} --signal=B:USR1@300  # next time; the script can save its state on USR1",
        source="the default alert job_time_left<600, and less than a tenth of the limit",
    ),
    Check(
        name="odd_node",
        severity="advice",
        phase=RUNNING,
        needs=("job_mem",),
        holds=("job_mem",),
        seconds=LONG_SECONDS,
        find=find_odd_node,
        what="{node} is unlike its peers: {size} of memory",
        proof="the {others} have {middle} each",
        cure="sbatch --exclude={exclude} SCRIPT  # does it happen again, then it is not the node",
        source="ours: twice or half of a median on which all others agree within 15 %",
    ),
    Check(
        name="too_much_memory",
        severity="advice",
        phase=ANY,
        needs=("job_mem", "job_cache", "job_mem_limit", "job_cpus", "cpus"),
        seconds=HOLD_SECONDS,
        find=find_too_much_memory,
        what="{peak}{so_far}",
        proof="{source}",
        cure="{flag}",
        source="jobstats: MIN_MEMORY_USAGE, and 20 % more than was used",
    ),
    Check(
        name="tight_memory",
        severity="advice",
        phase=ENDED,
        needs=("job_mem", "job_mem_limit"),
        find=find_tight_memory,
        what="{peak}: that was close",
        proof="{source}",
        cure="{flag}",
        source="cc-backend, highMemoryUsage: 0.9",
    ),
    Check(
        name="too_much_time",
        severity="advice",
        phase=ENDED,
        facts=("start", "end", "limit"),
        seconds=HOLD_SECONDS,
        find=find_too_much_time,
        what="ran for {ran} of {limit}",
        proof="1 run; a shorter job starts sooner",
        cure="{flag}",
        source="jobstats, TIME_EFFICIENCY_BLACK = 60 %",
    ),
)


# ---- verdicts as text and as JSON --------------------------------------------------


def render_verdicts(verdicts: Iterable[Verdict]) -> List[str]:
    """A line a verdict for people: its mark, what, the proof, and what to type."""
    rows = []
    for verdict in verdicts:
        text = MARKS.get(verdict.severity, "") + verdict.what
        if verdict.proof:
            text += ": " + verdict.proof
        rows.append((text, verdict.cure))
    width = max([len(text) for text, cure in rows if cure], default=0)
    return [
        "%s  -> %s" % (text.ljust(min(width, ARROW_COLUMN)), cure) if cure else text
        for text, cure in rows
    ]


def verdicts_json(verdicts: Iterable[Verdict]) -> List[Dict[str, str]]:
    """Verdicts as plain dicts, for JSON."""
    return [dict(verdict._asdict()) for verdict in verdicts]


def parse_verdicts(rows: Any) -> List[Verdict]:
    """The way back; what is no verdict is left out, as that of another version may be."""
    verdicts = []
    for row in rows if isinstance(rows, list) else ():
        values = [str(row.get(key, "")) for key in Verdict._fields if type(row) is dict]
        if values and values[0] in SEVERITIES and values[1]:
            verdicts.append(Verdict(*values))
    return verdicts


def words_of_fine(what: Any) -> str:
    """What a verdict says, where its severity stands beside it."""
    plain = {"fine": "nothing is wrong", FINE_SO_FAR: "nothing is wrong so far"}
    return plain.get(str(what), str(what))


def explain_code(verdicts: Iterable[Verdict]) -> int:
    """The exit code of --explain: 0 fine, 1 advice, 2 problem, 3 died."""
    codes = [EXIT_CODES.get(verdict.severity, 0) for verdict in verdicts]
    return max(codes, default=0)


# ============================================================================
# Notify: what people are told where they are: in a chat, on the phone, by mail
# ============================================================================

NOTIFY_SECONDS = 10.0  # for one try
NOTIFY_WAITS = (2.0, 10.0, 30.0)  # seconds before the second try, the third, the last
MAX_RETRY_AFTER = 60.0  # seconds that a service may ask for before the next try
NOTIFY_PAUSE = 10.0  # between two messages: what happens meanwhile is told by one
NOTIFY_LINES = 20  # of a message
MAX_NOTICES = 5000  # waiting for one place
NOTIFY_AGENT = "cluster-sentinel"  # Discord refuses the name that urllib gives itself
MAX_URL_FILE = 4096  # bytes that are read of @FILE
TRY_AGAIN = (408, 425, 429)  # and from 500 on: HTTP codes of what may pass
YOUNG_SECONDS = 120.0  # a job that began earlier had begun before it was watched
SETTLED_SECONDS = 60.0  # until agents that were here before have come back
END_SECONDS = 30.0  # that the end of a job waits for its verdict
VERDICTS_SECONDS = 5.0  # between two looks at the verdicts
MAX_NEWS_JOBS = 4096  # jobs that are remembered


class Notice(NamedTuple):
    """One thing that people are told."""

    kind: str  # started, ended, problem or lost
    node: str
    job: str
    words: str

    def subject(self) -> str:
        """The node, its job, or both."""
        job = "job %s" % self.job if self.job else ""
        if self.node and job:
            return "%s (%s)" % (self.node, job)
        return self.node or job

    def line(self) -> str:
        """The whole of it: our own word comes first, whatever a peer's are."""
        return "%s: %s: %s" % (self.kind, self.subject(), self.words)


class Notification(NamedTuple):
    """A message about one or many notices."""

    title: str
    lines: List[str]
    notices: List[Notice]

    def text(self) -> str:
        """For where there is no title beside the text."""
        if len(self.notices) == 1:
            return self.lines[0]
        return "\n".join([self.title] + self.lines)

    def is_urgent(self) -> bool:
        """Whether somebody should look now."""
        return any(notice.kind in ("problem", "lost") for notice in self.notices)


def compose(notices: List[Notice], left_out: int = 0) -> Notification:
    """One message for notices that came together; many of a kind and a job are one line."""
    groups: Dict[Tuple[str, str], List[Notice]] = {}
    for notice in notices:
        groups.setdefault((notice.kind, notice.job), []).append(notice)
    lines = []
    for group in groups.values():
        if len(group) > STORM_SIZE:
            lines.append(storm_line(group))
        else:
            lines.extend(notice.line() for notice in group)
    if len(lines) > NOTIFY_LINES:
        more = len(lines) - NOTIFY_LINES
        lines[NOTIFY_LINES:] = ["and %d more lines like these" % more]
    if left_out:
        lines.append("and %d more that there was no room for" % left_out)
    return Notification(notification_title(notices), lines, notices)


def storm_line(group: List[Notice]) -> str:
    """One line for many notices of a kind and a job."""
    first = group[0]
    where = " of job %s" % first.job if first.job else ""
    names = name_some(notice.node for notice in group)
    return "%s: %d times%s: %s: %s ..." % (
        first.kind,
        len(group),
        where,
        names,
        first.words,
    )


def notification_title(notices: List[Notice]) -> str:
    """What a message is about, in a few words."""
    if len(notices) == 1:
        return "Cluster Sentinel: %s: %s" % (notices[0].kind, notices[0].subject())
    counts = collections.Counter(notice.kind for notice in notices)
    words = ["%s: %d" % pair for pair in counts.items()]
    return "Cluster Sentinel: " + ", ".join(words)


def shorten(text: str, size: int) -> str:
    """The text, cut so that its UTF-8 has no more than so many bytes."""
    encoded = text.encode()
    if len(encoded) <= size:
        return text
    return encoded[: size - 3].decode("utf-8", "ignore") + "..."


# ---- where it is sent to


class NotifyError(Exception):
    """A message was not taken; the text says why, and holds no address.

    may_pass: whether to try again, after ``wait`` seconds at least.
    """

    def __init__(self, text: str, may_pass: bool = True, wait: float = 0.0) -> None:
        super().__init__(text)
        self.may_pass = may_pass
        self.wait = wait


class Target(NamedTuple):
    """Where messages go: --notify, taken apart.  Path and query of a URL are as good as a password.

    It is shown as its service and host alone.
    """

    service: "Service"
    url: str  # without user and password; "" for mail
    host: str
    authorization: str  # a header's value, or ""
    address: str  # for mail

    def __str__(self) -> str:
        if self.address:
            return "%s to %s" % (self.service.name, self.address)
        return "%s at %s" % (self.service.name, self.host)

    def hide(self, text: str) -> str:
        """The text without what nobody else may know."""
        parts = urllib.parse.urlsplit(self.url)
        for secret in (self.authorization, parts.query, parts.path.strip("/")):
            if secret:
                text = text.replace(secret, "...")
        return text


class Service(NamedTuple):
    """A way to tell people; a new one is one line in SERVICES."""

    name: str  # as in NAME+https://...
    hosts: Tuple[str, ...]  # URLs of these, and of hosts below them, are its own
    size: int  # bytes of text that it takes
    send: Callable[[Target, Notification, int], None]  # NotifyError


def send_ntfy(target: Target, what: Notification, size: int) -> None:
    """docs.ntfy.sh/publish, "Publish as JSON": to the root, with the topic inside."""
    parts = urllib.parse.urlsplit(target.url)
    folder, _, topic = parts.path.rpartition("/")
    root = urllib.parse.urlunsplit((parts.scheme, parts.netloc, folder + "/", "", ""))
    message = {
        "topic": urllib.parse.unquote(topic),
        "title": what.title,
        "message": shorten("\n".join(what.lines), size),
        "priority": 4 if what.is_urgent() else 3,
        "tags": ["warning"] if what.is_urgent() else [],
    }
    post_json(target, root, message)


def send_slack(target: Target, what: Notification, size: int) -> None:
    """Slack's incoming webhooks (and Mattermost's): &, < and > are escaped, or they would call."""
    text = html.escape(shorten(what.text(), size), quote=False)
    post_json(target, target.url, {"text": text})


def send_teams(target: Target, what: Notification, size: int) -> None:
    """Teams, "When a webhook request is received": an Adaptive Card of texts without Markdown."""
    blocks = []
    for line in shorten(what.text(), size).split("\n"):
        run = {"type": "TextRun", "text": line}
        blocks.append({"type": "RichTextBlock", "inlines": [run]})
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.2",
        "body": blocks,
    }
    attachment = {
        "contentType": "application/vnd.microsoft.card.adaptive",
        "contentUrl": None,
        "content": card,
    }
    message = {"type": "message", "attachments": [attachment]}
    post_json(target, target.url, message)


def send_discord(target: Target, what: Notification, size: int) -> None:
    """Discord's Execute Webhook; no name of a node calls anybody."""
    message = {
        "content": shorten(what.text(), size),
        "allowed_mentions": {"parse": []},
    }
    post_json(target, target.url, message)


def send_telegram(target: Target, what: Notification, size: int) -> None:
    """Telegram's sendMessage, with the chat_id of the URL."""
    parts = urllib.parse.urlsplit(target.url)
    message: Dict[str, Any] = dict(urllib.parse.parse_qsl(parts.query))
    message["text"] = shorten(what.text(), size)
    message["link_preview_options"] = {"is_disabled": True}
    bare = urllib.parse.urlunsplit(parts._replace(query=""))
    post_json(target, bare, message)


def send_webhook(target: Target, what: Notification, size: int) -> None:
    """Any program's own: the words, and what they were made of."""
    events = []
    for kind, node, job, words in what.notices[:NOTIFY_LINES]:
        events.append({"event": kind, "node": node, "job": job, "text": words})
    message = {
        "title": what.title,
        "text": shorten(what.text(), size),
        "count": len(what.notices),
        "events": events,
    }
    post_json(target, target.url, message)


def send_mail(target: Target, what: Notification, size: int) -> None:
    """mail(1).  It would take a line that begins with ~ for a command: ours begin with a word."""
    body = shorten("\n".join(what.lines), size) + "\n"
    try:
        code = subprocess.run(
            ["mail", "-s", what.title, target.address],
            input=body.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=NOTIFY_SECONDS,
        ).returncode
    except FileNotFoundError:
        raise NotifyError("there is no mail command here", may_pass=False) from None
    except subprocess.TimeoutExpired:
        raise NotifyError("mail did not end within %g s" % NOTIFY_SECONDS) from None
    if code:
        raise NotifyError("mail ended with %s" % describe_exit(code))


SERVICES = (
    Service("ntfy", ("ntfy.sh",), 3500, send_ntfy),
    Service("slack", ("hooks.slack.com",), 3500, send_slack),
    Service(
        "teams",
        ("webhook.office.com", "logic.azure.com", "api.powerplatform.com"),
        8000,
        send_teams,
    ),
    Service("discord", ("discord.com", "discordapp.com"), 1900, send_discord),
    Service("telegram", ("api.telegram.org",), 3500, send_telegram),
    Service("webhook", (), 8000, send_webhook),
    Service("mail", (), 8000, send_mail),
)
BY_NAME = {service.name: service for service in SERVICES}


def parse_target(text: str) -> Target:
    """--notify, taken apart; ValueError with words that do not hold the text."""
    name, _, address = text.partition(":")
    if name == "mail":
        address = address or user_name()
        if not re.fullmatch(r"[^\s-]\S*", address) or not address.isprintable():
            raise ValueError("mail:ADDRESS needs an address, and mail alone a user")
        return Target(BY_NAME["mail"], "", "", "", address)
    return parse_url(text)


def parse_url(text: str) -> Target:
    """[NAME+]http[s]://[USER:PASSWORD@]HOST... as a Target; ValueError as parse_target."""
    name, plus, rest = text.partition("+")
    if not plus or name not in BY_NAME:
        name, rest = "", text
    try:
        parts = urllib.parse.urlsplit(rest)
        host = parts.hostname or ""
        port = parts.port
    except ValueError:
        raise ValueError("that is no URL: its host or port is wrong") from None
    is_clean = rest.isascii() and rest.isprintable() and " " not in rest
    if parts.scheme not in ("http", "https") or not host or not is_clean:
        raise ValueError(
            "that is no URL to notify; https://... is, or NAME+https://... with one of %s,"
            " or mail" % ", ".join(BY_NAME)
        )
    service = BY_NAME[name] if name else service_of(host)
    if service.name == "mail":
        raise ValueError("mail takes no URL; mail and mail:ADDRESS are right")
    if service.name == "ntfy" and not parts.path.strip("/"):
        raise ValueError("an ntfy URL ends with its topic: https://ntfy.sh/TOPIC")
    if service.name == "telegram" and "chat_id" not in dict(
        urllib.parse.parse_qsl(parts.query)
    ):
        raise ValueError(
            "a telegram URL is https://api.telegram.org/botTOKEN/sendMessage?chat_id=ID"
        )
    place = join_host(host, port)
    url = urllib.parse.urlunsplit(parts._replace(netloc=place, fragment=""))
    return Target(service, url, host, basic_authorization(parts), "")


def service_of(host: str) -> Service:
    """Whose URLs these are; a plain webhook if nobody's."""
    for service in SERVICES:
        for known in service.hosts:
            if host == known or host.endswith("." + known):
                return service
    return BY_NAME["webhook"]


def join_host(host: str, port: Optional[int]) -> str:
    """The host and port of a URL (RFC 3986)."""
    bracketed = "[%s]" % host if ":" in host else host
    return bracketed if port is None else "%s:%d" % (bracketed, port)


def basic_authorization(parts: urllib.parse.SplitResult) -> str:
    """The header for a URL's user and password (RFC 7617), or ""."""
    if parts.username is None:
        return ""
    pair = "%s:%s" % (parts.username, parts.password or "")
    return "Basic " + base64.b64encode(urllib.parse.unquote(pair).encode()).decode()


def user_name() -> str:
    """Who runs the master; "" when that cannot be found out."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return ""


def notify_argument(text: str) -> str:
    """An argparse type: what parse_target takes, or @FILE with it; errors do not repeat it."""
    try:
        if text.startswith("@"):
            with open(text[1:], encoding="ascii") as file:
                text = file.read(MAX_URL_FILE).strip()
        target = parse_target(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            "cannot read the file with the URL: %s" % error.strerror
        ) from None
    except UnicodeError:
        raise argparse.ArgumentTypeError("the file holds no URL") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if target.service.name == "mail" and not shutil.which("mail"):
        raise argparse.ArgumentTypeError("there is no mail command here")
    return text


def post_json(target: Target, url: str, message: Dict[str, Any]) -> None:
    """POST a message; NotifyError unless it is taken.  Nobody sends it on elsewhere."""
    # here, as they take 6 MiB with ssl, and most masters notify nobody
    import http.client
    import urllib.error
    import urllib.request

    headers = {
        "Content-Type": "application/json",
        "User-Agent": NOTIFY_AGENT,
    }
    if target.authorization:
        headers["Authorization"] = target.authorization
    opener = urllib.request.OpenerDirector()  # without the handler of redirects
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, json.dumps(message).encode(), headers)
    try:
        opener.open(request, timeout=NOTIFY_SECONDS).close()
    except urllib.error.HTTPError as error:
        with error:
            raise NotifyError(
                "HTTP %d %s" % (error.code, error.reason),
                error.code in TRY_AGAIN or error.code >= 500,
                retry_after(error.headers.get("Retry-After")),
            ) from None
    except urllib.error.URLError as error:
        raise NotifyError(str(error.reason)) from None
    except OSError as error:
        raise NotifyError(str(error.strerror or error)) from None
    except http.client.HTTPException as error:
        raise NotifyError("no HTTP answer (%s)" % type(error).__name__) from None


def retry_after(text: Optional[str]) -> float:
    """The seconds of the header, RFC 9110, as far as we wait; 0 if it is no number."""
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return min(seconds, MAX_RETRY_AFTER) if seconds > 0 else 0.0


# ---- who sends it


class Try(threading.Thread):
    """One try, on a thread of its own: a name server or an answer that drips holds up nobody."""

    def __init__(self, target: Target, what: Notification) -> None:
        super().__init__(name="try", daemon=True)
        self.target = target
        self.what = what
        self.error: Optional[NotifyError] = None

    def run(self) -> None:
        service = self.target.service
        try:
            service.send(self.target, self.what, service.size)
        except NotifyError as error:
            self.error = error
        except Exception as error:  # whatever it is, its text may hold the address
            self.error = NotifyError("a defect: %s" % type(error).__name__)


class Courier:
    """Brings messages to one place, on a thread of its own."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.waiting: queue.Queue[Notice] = queue.Queue(MAX_NOTICES)
        self.left_out = 0  # notices that there was no room for
        self.last_try: Optional[Try] = None
        threading.Thread(target=self.run, name="courier", daemon=True).start()

    def put(self, notice: Notice) -> None:
        """Have a notice told; never blocks."""
        try:
            self.waiting.put_nowait(notice)
        except queue.Full:
            self.left_out += 1

    def run(self) -> None:
        """Tell what is put, for ever: one message for what comes together."""
        while True:
            notices = gather(self.waiting, GATHER_SECONDS)
            left_out = self.left_out
            self.left_out = 0
            try:
                self.deliver(compose(notices, left_out))
            except Exception as error:  # this thread has to go on, whatever it was
                log.error("cannot notify %s: %s", self.target, type(error).__name__)
            time.sleep(NOTIFY_PAUSE)

    def deliver(self, what: Notification) -> None:
        """Try until the message is taken, as often as is sensible."""
        for wait in NOTIFY_WAITS + (math.inf,):
            error = self.try_once(what)
            if error is None:
                return
            words = self.target.hide(str(error))
            if wait == math.inf or not error.may_pass:
                log.error("cannot notify %s: %s", self.target, words)
                return
            if wait == NOTIFY_WAITS[0]:
                log.warning("cannot notify %s yet: %s", self.target, words)
            time.sleep(max(wait, error.wait))

    def try_once(self, what: Notification) -> Optional[NotifyError]:
        """Send it; what went wrong, if anything."""
        if self.last_try and self.last_try.is_alive():
            return NotifyError("the try before still hangs")
        self.last_try = Try(self.target, what)
        self.last_try.start()
        self.last_try.join(NOTIFY_SECONDS)
        if self.last_try.is_alive():
            return NotifyError("no answer within %g s" % NOTIFY_SECONDS)
        return self.last_try.error


class Notifier:
    """Tells people what happens, in all the places that --notify names."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.couriers = [Courier(parse_target(text)) for text in targets]

    def put(self, event_kind: str, node: str, job: str, words: str) -> None:
        """Have something told; never blocks.  Kinds are started, ended, problem and lost."""
        texts = [clean_text(" ".join(text.split())) for text in (node, job, words)]
        notice = Notice(event_kind, *texts)
        for courier in self.couriers:
            courier.put(notice)


# ---- what is worth a message


class News:
    """Picks from all that happens what people are told: each thing once, and jobs as a whole.

    A job begins and ends as Slurm says, where it is asked; else with its first and last node.
    """

    def __init__(self, notifier: Notifier) -> None:
        self.notifier = notifier
        self.began = time.monotonic()
        self.lock = threading.Lock()  # of what follows
        self.states: Dict[str, str] = collections.OrderedDict()  # by raw id, of Slurm
        self.names: Dict[str, str] = {}  # of a job, by its raw id
        self.nodes: Dict[str, int] = collections.Counter()  # of a job, that are here
        self.begun: Set[str] = set()  # jobs of nodes that are here
        # raw id -> (time.monotonic(), node, words) of a job whose end is to be told
        self.ending: Dict[str, Tuple[float, str, str]] = {}
        self.told: Set[Tuple[str, str]] = set()  # raw id, rule: problems of a job
        self.verdicts: Dict[str, List[Message]] = {}  # by raw id
        self.changes = 0  # of the verdicts, when they were last looked at
        self.looked = -math.inf

    def know(self, rows: Iterable[Row]) -> None:
        """Take note of jobs that were known before: rows of the table."""
        for row in rows:
            raw = from_field(row[JOB_RAW])
            if raw:
                self.states[str(raw)] = str(from_field(row[JOB_STATE]))

    def enter(self, job: str) -> None:
        """A node of the job is here."""
        with self.lock:
            self.nodes[job] += 1

    def leave(self, job: str) -> None:
        """A node of the job has left."""
        with self.lock:
            self.nodes[job] -= 1
            if not self.nodes[job]:
                del self.nodes[job]
                self.begun.discard(job)

    def tell_event(self, event: Event) -> None:
        """Tell what an event means, if it is worth a message."""
        job = event.job()
        if event.kind in ("alert", "flapping"):
            self.notifier.put("problem", event.node, job, event.text)
        elif event.kind == "lost":
            self.notifier.put("lost", event.node, job, event.text)
        elif event.kind == "connected" and self.is_begin(job):
            self.notifier.put("started", event.node, job, "its first node is here")
        elif event.kind == "finished" and self.is_end(job):
            self.end_job(job, event.node, event.text)

    def is_begin(self, job: str) -> bool:
        """Whether a node that comes is the first of its job, and nobody else tells that."""
        with self.lock:
            if not job or job in self.states or job in self.begun:
                return False
            self.begun.add(job)
        return time.monotonic() - self.began > SETTLED_SECONDS

    def is_end(self, job: str) -> bool:
        """Whether a node that left was the last of its job, and nobody else tells that."""
        with self.lock:
            return bool(job) and job not in self.states and job not in self.nodes

    def tell_job(self, row: Row) -> None:
        """Tell what Slurm says of a job, if that is new."""
        facts = dict(zip(JOB_KEYS, map(from_field, row)))
        raw = str(facts["raw"])
        state = str(facts["state"])
        with self.lock:
            before = self.states.pop(raw, None)
            self.states[raw] = state
            self.names[raw] = str(facts["job"])
            if len(self.states) > MAX_NEWS_JOBS:
                oldest = next(iter(self.states))
                del self.states[oldest]
                self.names.pop(oldest, None)
        if state == before:
            return
        if state == "RUNNING" and (before or is_fresh(facts["start"])):
            words = "on %s" % (facts["nodelist"] or "its nodes")
            self.notifier.put("started", "", self.name_of(raw), words)
        elif state in ENDED_STATES and before and before not in ENDED_STATES:
            self.end_job(raw, "", words_of_end(facts))

    def name_of(self, raw: str) -> str:
        """A job's id as people know it."""
        with self.lock:
            return self.names.get(raw, raw)

    def end_job(self, raw: str, node: str, words: str) -> None:
        """Have the end of a job told, as soon as its verdict is there."""
        with self.lock:
            self.ending[raw] = (time.monotonic(), node, words)

    def look(self, table: Table) -> None:
        """Tell what is due: the problems of jobs, and ends with their verdicts."""
        now = time.monotonic()
        changes = table.verdict_changes()
        if changes != self.changes and now - self.looked > VERDICTS_SECONDS:
            self.looked = now
            self.changes = changes
            self.verdicts = table.snapshot().verdicts
            self.tell_problems()
        with self.lock:
            ending = list(self.ending.items())
        for raw, (since, node, words) in ending:
            verdicts = self.verdicts.get(raw, [])
            worst = verdicts[0] if verdicts else None
            is_judged = worst is not None and worst.get("severity") == "died"
            has_waited = not changes or now - since > END_SECONDS
            if is_judged or has_waited:
                self.tell_end(raw, node, words, worst)

    def tell_end(
        self, raw: str, node: str, words: str, worst: Optional[Message]
    ) -> None:
        """Tell that a job has ended, with its worst verdict."""
        with self.lock:
            self.ending.pop(raw, None)
        if worst is not None and worst.get("severity") != "fine":
            words = "%s; %s" % (words, words_of_verdict(worst))
        self.notifier.put("ended", node, self.name_of(raw), words)

    def tell_problems(self) -> None:
        """Tell the problems of running jobs that are new."""
        for raw, verdicts in self.verdicts.items():
            for verdict in verdicts:
                key = (raw, str(verdict.get("rule")))
                if verdict.get("severity") == "problem" and key not in self.told:
                    self.told.add(key)
                    words = words_of_verdict(verdict)
                    self.notifier.put("problem", "", self.name_of(raw), words)
        self.told = {key for key in self.told if key[0] in self.verdicts}


def is_fresh(start: Union[str, float, None]) -> bool:
    """Whether a job that began then (time.time()) has just begun."""
    if not isinstance(start, float):
        return False
    return abs(time.time() - start) < YOUNG_SECONDS


def words_of_end(facts: Message) -> str:
    """How Slurm says that a job ended."""
    words = [str(facts["state"])]
    if facts["exit"] not in (None, "0:0"):
        words.append("exit code %s" % facts["exit"])
    if facts["start"] and facts["end"]:
        minutes, seconds = divmod(max(0, int(facts["end"] - facts["start"])), 60)
        words.append("after %d:%02d:%02d" % (divmod(minutes, 60) + (seconds,)))
    return ", ".join(words)


def words_of_verdict(verdict: Message) -> str:
    """A verdict in one line: what, the proof, the cure."""
    parts = [verdict.get(key) for key in ("what", "proof", "cure")]
    return "; ".join(str(part) for part in parts if part)


# ============================================================================
# Collector: sockets -> wire -> table, alerts
# ============================================================================

MAX_INTERVAL = 60.0  # seconds between samples that an agent may announce
MAX_RATE = 100  # messages a second from one agent, ...
RATE_SECONDS = 10.0  # ... counted until there are as many as may come in this time
PAST_SLICE = 64  # readings of the past between two samples
MAX_ACCEPTS = 256  # connections that are taken at a time, between two heartbeats
SOURCE_SHARE = 7 / 8  # of the slots, for one address other than loopback
MAX_WAITING = 1024  # agents that have not sent a sample yet
REFUSAL_SECONDS = 10.0  # seconds for which refusals of one source are counted
MAX_REFUSAL_SECONDS = 3600.0  # that long when it does not end: it doubles
MAX_SOURCES = 8  # sources whose refusals are counted apart
BEAT_SECONDS = 1.0  # between two heartbeats of the collector
GATHER_FROM, GATHER_UNTIL = 50, 2000  # samples a second that are gathered ...
GATHER_SECONDS = 0.4  # ... for so long,
GATHER_MOST = 256  # or until there are so many
PIN_CPU = 0.1  # of a core, from which on a collector is a busy one
PIN_SECONDS = 5.0  # between two looks at where its threads are to run
LINGER_SECONDS = 0.5  # for a peer to read why it is sent away
THE_NODE = "the node"  # what comes and goes when it is no rule
AGAIN_SECONDS = 600.0  # from one time that a problem of a job is told to the next

VerdictKey = Tuple[str, str, str, str]  # raw id of the job, severity, rule, place


def split_address(address: Address) -> Tuple[str, str]:
    """A peer's (host, port, ...) -> (host, the address tuple that slots hold, as text)."""
    host = address[0].partition("%")[0]
    is_mapped = host.startswith("::ffff:") and "." in host  # IPv4 on an IPv6 socket
    if is_mapped:
        host = host[len("::ffff:") :]
    return host, "('%s', %d)" % (host, address[1])


class Waiting:
    """Sockets that have not said yet what they want: bounded, and idle ones lock nobody out.

    When one is too many, the oldest of the busiest source is shut down; its thread sees that.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self.socks: Dict[socket.socket, str] = {}  # to their sources, oldest first

    def add(self, sock: socket.socket, source: str) -> None:
        """Take a socket in."""
        with self.lock:
            self.socks[sock] = source
            if len(self.socks) <= self.limit:
                return
            oldest = self.oldest_of_busiest()
            del self.socks[oldest]
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)

    def oldest_of_busiest(self) -> socket.socket:
        """The socket that has to make room.  Lock must be held by the caller."""
        counts = collections.Counter(self.socks.values())
        busiest = counts.most_common(1)[0][0]
        return next(sock for sock, source in self.socks.items() if source == busiest)

    def remove(self, sock: socket.socket) -> None:
        """Let go of a socket, if it is here."""
        with self.lock:
            self.socks.pop(sock, None)


class RefusalCount:
    """What is counted of the refusals of one source."""

    def __init__(self, since: float, seconds: float) -> None:
        self.since = since  # time.monotonic()
        self.seconds = seconds  # for which they are counted
        self.count = 0  # of those that were not told
        self.reason = ""  # of the last one


class Refusals:
    """Tells refusals so that a flood pushes nothing useful out: one a source and 10 s, or more."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tell = tell
        self.lock = threading.Lock()
        self.sources: Dict[str, RefusalCount] = {}

    def add(self, source: str, reason: str) -> None:
        """Count a refusal; the first of a source is told at once."""
        with self.lock:
            if len(self.sources) >= MAX_SOURCES and source not in self.sources:
                source = "other addresses"
            counted = self.sources.get(source)
            if counted is None:
                counted = RefusalCount(time.monotonic(), REFUSAL_SECONDS)
                self.sources[source] = counted
                is_first = True
            else:
                counted.count += 1
                is_first = False
            counted.reason = reason
        if is_first:
            self.tell(source, reason)

    def flush(self) -> None:
        """Tell what was counted, for each source whose time is over."""
        now = time.monotonic()
        told = []
        with self.lock:
            for source, counted in list(self.sources.items()):
                if now - counted.since < counted.seconds:
                    continue
                del self.sources[source]
                if counted.count:  # it goes on: from now on it is told less often
                    told.append((source, counted))
                    longer = min(2 * counted.seconds, MAX_REFUSAL_SECONDS)
                    self.sources[source] = RefusalCount(now, longer)
        for source, counted in told:
            more = "and %d more in %g s" % (counted.count, counted.seconds)
            self.tell(source, "%s (%s)" % (counted.reason, more))


class Shortage(NamedTuple):
    """Why a connection cannot be served, and what to do about it."""

    reason: str
    cure: str


def descriptor_shortage(error: OSError) -> Shortage:
    """What accept(2) lacks."""
    reason = str(error.strerror)
    if error.errno == errno.EMFILE:
        return Shortage(reason, "raise ulimit -n")
    if error.errno == errno.ENFILE:
        return Shortage(reason, "raise fs.file-max, or run the master elsewhere")
    return Shortage(reason, "free some memory, or run the master elsewhere")


class Spare:
    """A descriptor in reserve: without it nobody could be told that there are no more."""

    def __init__(self) -> None:
        self.fd: Optional[int] = None
        self.keep()

    def keep(self) -> None:
        """Have one again, if there is one to be had."""
        if self.fd is None:
            with contextlib.suppress(OSError):
                self.fd = os.open(os.devnull, os.O_RDONLY)

    def give(self) -> bool:
        """Give it away for a connection; False when there is none."""
        if self.fd is None:
            return False
        os.close(self.fd)
        self.fd = None
        return True


class TurnedAway:
    """Counts the agents that there were no threads or descriptors for."""

    def __init__(self) -> None:
        self.total = 0
        self.why = ""
        self.seconds: Deque[List[int]] = collections.deque()  # [second, agents in it]

    def add(self, why: str) -> None:
        """Count one."""
        now = int(time.monotonic())
        self.total += 1
        self.why = why
        if self.seconds and self.seconds[-1][0] == now:
            self.seconds[-1][1] += 1
        else:
            self.seconds.append([now, 1])

    def lately(self) -> int:
        """How many there were in the last minute."""
        while self.seconds and self.seconds[0][0] < time.monotonic() - 60:
            self.seconds.popleft()
        return sum(count for _, count in self.seconds)


class Kept:
    """What a peer on probation has told, by what it is about."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # for which the peer has to stay
        self.events: Dict[str, Sequence[Event]] = {}


class Probation:
    """Peers that may be gone again in a moment: what they tell waits until they have stayed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Dict["Peer", Kept] = {}

    def begin(self, peer: "Peer", seconds: float) -> None:
        """Let what the peer tells wait until it has been here for so long."""
        with self.lock:
            self.kept.setdefault(peer, Kept(seconds))

    def keep(self, peer: "Peer", what: str, events: Sequence[Event]) -> bool:
        """Keep events of a peer that is on probation; else False, and they are to be told."""
        with self.lock:
            kept = self.kept.get(peer)
            if kept is None:
                return False
            if events[0].kind == "resolved" and what in kept.events:
                del kept.events[what]  # nobody was told that it fired
            else:
                kept.events[what] = events
            return True

    def end(self, peer: "Peer") -> Dict[str, Sequence[Event]]:
        """Let go of a peer: what was kept of it."""
        with self.lock:
            kept = self.kept.pop(peer, None)
            return kept.events if kept else {}

    def passed(self) -> List["Peer"]:
        """Those who have stayed for long enough."""
        with self.lock:
            return [
                peer for peer, kept in self.kept.items() if peer.stay() > kept.seconds
            ]


class Silence(Exception):
    """No whole sample came in time."""


class Peer:
    """One agent's connection, for its thread."""

    __slots__ = (
        "sock",
        "source",
        "address",
        "came",
        "timeout",
        "receive_timeout",
        "buffer",
        "data",
        "due",
        "count",
        "counted_from",
        "gathered",
        "taken",
        "slot",
        "since",
        "known_as",
        "job",
        "shape",
        "ack",
        "row",
        "state",
        "alerts",
        "look",
        "places",
        "past",
    )

    def __init__(self, sock: socket.socket, address: Address, timeout: float) -> None:
        self.sock = sock
        self.source, self.address = split_address(address)
        self.came = time.monotonic()
        self.timeout = timeout  # seconds without a sample, after which it is lost
        self.receive_timeout = timeout  # what the socket has
        self.buffer = memoryview(bytearray(RECEIVE_SIZE))
        self.data = b""  # what has come and is no whole message yet
        self.due = self.came + timeout  # when the next message has to be whole
        self.count = 0  # messages ...
        self.counted_from = self.came  # ... since then
        self.gathered = 0  # samples that Batch had wait ...
        self.taken = 0  # ... and those of them that have been taken
        self.slot = -1  # -1: none yet
        self.since = time.time()
        self.known_as = self.address  # or the node's name: that of its first sample
        self.job = ""  # that of its first sample
        self.shape: Optional[Shape] = None  # of its samples
        self.ack = False
        self.row = UNKNOWN  # the last sample, KEPT of it
        self.state: Dict[Rule, Optional[float]] = {}  # as judge() has it
        self.alerts = ""  # the rules that fire
        self.look: List[PartRow] = []  # parts that came since the last sample
        self.places: List[int] = []  # of its last look in the table
        self.past: List[PastRow] = []  # that came since the last sample

    def stay(self) -> float:
        """For how many seconds it has been here."""
        return time.monotonic() - self.came

    def node_key(self) -> Tuple[str, ...]:
        """What comes and goes with it: an address's node, since anybody may give any name."""
        return (self.source, self.known_as, self.job)

    def text(self, key: str) -> str:
        """A text of the last sample."""
        return str(self.row[INDEX[key]], "utf-8")

    def firing(self) -> List[Rule]:
        """The rules that fire."""
        return [rule for rule, since in self.state.items() if since is None]

    def event(
        self,
        kind: str,
        text: str,
        rule: Optional[Rule] = None,
        value: Union[float, str] = "",
    ) -> Event:
        """Something to tell of this peer."""
        return Event(kind, self.known_as, self.row, self.address, text, rule, value)

    def say(self, line: bytes) -> None:
        """Write if there is room for it: a peer that never reads is served all the same."""
        try:
            self.sock.send(line, socket.MSG_DONTWAIT)
        except OSError:  # no suppress(): it takes longer than all else here
            pass

    def receive(self, seconds: float) -> bytes:
        """At most RECEIVE_SIZE bytes, b"" at the end; Silence when none came in time."""
        if seconds != self.receive_timeout:
            set_timeout(self.sock, seconds)
            self.receive_timeout = seconds
        try:  # recv() would keep some KiB more for each thread
            return bytes(self.buffer[: self.sock.recv_into(self.buffer)])
        except BlockingIOError:
            raise Silence from None

    def parse(self, data: bytes, auth: bool) -> Tuple[Union[Row, Message, None], int]:
        """What data begins with and its size: a sample's row, or any other message as it came.

        None while it is incomplete; WireError.
        """
        parsed = parse_message(data)
        if not parsed:
            return None, 0
        message, size, floats = parsed
        is_goodbye = type(message.get("bye")) is str
        is_part = type(message.get("part")) is str
        if auth or is_goodbye or is_part:
            return message, size
        row = check_sample(message)
        self.shape = make_shape(data[:size], message, row, floats)
        self.ack = message.get("ack") is True
        return row, size

    def messages(self, auth: bool) -> Iterator[Any]:
        """What comes, as parse has it, each whole within the deadline after the one before.

        auth: the first one is the answer to a challenge.
        """
        while True:
            seconds = self.due - time.monotonic() if self.data else self.timeout
            before = len(self.data)
            # the bytes get no name of their own: it would keep them while we wait
            self.data += self.receive(seconds)
            if len(self.data) == before:
                if self.data:
                    raise ConnectionError("closed in the middle of a sample")
                return
            while self.data:
                # most are a sample of the shape that the one before had, and of its size
                shape = self.shape
                message: Any = parse_shape(self.data, shape) if shape else None
                size = len(self.data)
                if message is None:
                    message, size = self.parse(self.data, auth)
                    if message is None:
                        if time.monotonic() > self.due:
                            raise Silence
                        break
                    auth = False
                self.data = self.data[size:]
                self.count_message()
                yield message
                message = None  # freed before the thread waits again

    def count_message(self) -> None:
        """Note that a message came; WireError when there are too many of them."""
        now = time.monotonic()
        self.due = now + self.timeout
        self.count += 1
        if self.count >= MAX_RATE * RATE_SECONDS:
            self.check_rate(now)

    def check_rate(self, now: float) -> None:
        """WireError if those that were counted came too fast; count anew."""
        if now - self.counted_from < RATE_SECONDS:
            raise WireError("more than %d samples a second" % MAX_RATE)
        self.counted_from = now
        self.count = 0


class Batch:
    """Where samples are taken: each by the thread it came to, or some together a moment later.

    A thread that takes a sample every two seconds finds none of what it needs in the caches of
    its processor.  With 200 agents a sample that is taken behind another costs a quarter less.
    With few there is none to wait for; with thousands the caches are warm without it.  One that
    waits is in the table, and answered, up to GATHER_SECONDS later.
    """

    def __init__(self, take: Callable[[Peer, Row], None], pinning: "Pinning") -> None:
        self.take = take
        self.pinning = pinning
        self.thread: Optional[threading.Thread] = None  # until it is needed
        self.waiting: Deque[Tuple[Peer, Row]] = collections.deque()
        self.lock = threading.Lock()  # of who takes those
        self.came = threading.Event()  # the first of those that wait for their moment
        self.gathers = False
        self.samples = 0  # of the collector, when it was looked ...
        self.looked = time.monotonic()  # ... last

    def look(self, samples: int) -> None:
        """See now and then, by all samples so far, whether they are to be gathered."""
        now = time.monotonic()
        seconds = now - self.looked
        if seconds >= BEAT_SECONDS:
            rate = (samples - self.samples) / seconds
            self.gathers = GATHER_FROM <= rate < GATHER_UNTIL and self.has_thread()
            self.samples = samples
            self.looked = now

    def has_thread(self) -> bool:
        """Whether there is a thread for those that wait; it is started when first asked for."""
        if not self.thread:
            thread = threading.Thread(target=self.run, daemon=True)
            with contextlib.suppress(RuntimeError):  # no more threads for now
                thread.start()
                self.thread = thread
        return self.thread is not None

    def add(self, peer: Peer, row: Row) -> None:
        """Have a sample taken, behind all that came of this peer before it."""
        if not self.gathers and peer.gathered == peer.taken:
            self.take(peer, row)
            return
        peer.gathered += 1
        self.waiting.append((peer, row))
        if not self.came.is_set():
            self.came.set()
        # who has the lock takes this one, too: to wait for it would be no use
        if len(self.waiting) >= GATHER_MOST and self.lock.acquire(False):
            self.take_waiting()

    def finish(self, peer: Peer) -> None:
        """Have all samples of a peer taken before anything else of it is done."""
        if peer.gathered != peer.taken:
            self.lock.acquire()
            self.take_waiting()

    def take_waiting(self) -> None:
        """Take those that wait, with the lock, and release it; a defect ends its peer alone."""
        try:
            while self.waiting:
                peer, row = self.waiting.popleft()
                try:
                    self.take(peer, row)
                except Exception:
                    log.exception("a defect, met while taking from %s", peer.address)
                    peer.say(b"error a defect of the master\n")
                    with contextlib.suppress(OSError):
                        peer.sock.shutdown(socket.SHUT_RD)  # its thread sees that
                peer.taken += 1
        finally:
            self.lock.release()

    def run(self) -> None:
        """Take those that wait, each time after their moment, for ever."""
        self.pinning.threads.add(threading.get_native_id())
        while True:
            self.came.wait()
            time.sleep(GATHER_SECONDS)
            self.came.clear()
            self.lock.acquire()
            self.take_waiting()


class Collector:
    """The role that listens to agents: a thread for each of them."""

    def __init__(
        self, listener: socket.socket, table: Table, options: argparse.Namespace
    ) -> None:
        self.listener = listener
        self.table = table
        self.options = options
        self.waiting = Waiting(MAX_WAITING)
        self.refusals = Refusals(self.tell_refusal)
        self.flapping = Flapping(FLAP_CHANGES, FLAP_SECONDS)
        self.visits = Visits(FLAP_VISITS, FLAP_SECONDS)
        self.early = Flapping(FLAP_VISITS, FLAP_SECONDS)  # alerts in brief visits
        self.probation = Probation()
        self.pinning = Pinning()
        self.batch = Batch(self.take, self.pinning)
        self.limits = limits_of(options.rules)
        self.runner: Optional[CommandRunner] = None
        if options.alert_command:
            self.runner = CommandRunner(options.alert_command)
        self.judged = Judged(table)
        self.news: Optional[News] = None
        if options.notify:
            self.news = News(Notifier(options.notify))
        self.lock = threading.Lock()  # of what follows
        self.free = list(range(table.capacity))  # slots, a heap
        self.used = 0  # slots from this index on have never been in use
        self.slots: Dict[str, int] = collections.Counter()  # slots in use by source
        self.samples = 0
        self.lost: Dict[Tuple[str, str], float] = {}  # (node, job) -> time.monotonic()
        self.turned_away = TurnedAway()

    # ---- the role

    def run(self) -> None:
        """Accept agents until the supervisor is gone."""
        self.table.acquire()
        self.table.reset()
        self.table.lock.release()
        if self.news:
            self.news.know(JOB.iter_unpack(self.table.snapshot().job_rows))
        accept_loop(
            self.listener,
            self.waiting,
            self.serve,
            self.options.timeout,
            self.beat,
            self.turn_away,
        )

    def beat(self) -> float:
        """Say that this role is well, and do what is due now and then; seconds to the next."""
        self.beat_table()
        self.refusals.flush()
        for peer in self.probation.passed():
            self.end_probation(peer)
        self.announce(*self.visits.settled())
        self.announce(*self.flapping.settled())
        self.forget_lost()
        self.pinning.look()
        self.batch.look(self.samples)
        self.announce(*self.judged.look(self.table))
        if self.news:
            self.news.look(self.table)
        return BEAT_SECONDS

    def forget_lost(self) -> None:
        """Forget those who have been lost for so long that they are no more shown."""
        oldest = time.monotonic() - GONE_SECONDS
        with self.lock:
            self.lost = {key: when for key, when in self.lost.items() if when > oldest}

    def turn_away(
        self, sock: socket.socket, address: Address, shortage: Shortage
    ) -> None:
        """Tell an agent that there is no room for it, and why."""
        why = "no room for more agents here (%s): %s" % shortage
        with self.lock:
            self.turned_away.add(why)
            count = self.turned_away.lately()
        text = "%s; turned away in the last minute: %d" % (why, count)
        with contextlib.suppress(OSError):
            sock.send(b"error %s\n" % text.encode(), socket.MSG_DONTWAIT)
            sock.shutdown(socket.SHUT_WR)
            # unread input would turn the close into a reset, which overtakes the line
            sock.recv(MAX_SAMPLE, socket.MSG_DONTWAIT)
        sock.close()
        self.refusals.add(split_address(address)[0], why)

    def beat_table(self) -> None:
        """Write the counts, in their order: who waits for the table must not overtake."""
        with self.lock:
            self.table.beat(
                self.samples,
                self.used,
                self.turned_away.total,
                self.turned_away.lately(),
                self.turned_away.why,
            )

    # ---- one connection

    def serve(self, sock: socket.socket, address: Address) -> None:
        """Everything between a connection's begin and its end."""
        thread = threading.get_native_id()
        self.pinning.threads.add(thread)
        peer = Peer(sock, address, self.options.timeout)
        kind = "refused"
        text = "a defect of the master"
        try:
            kind, text = self.converse(peer)
        except Silence:
            kind = "lost"
            text = "no sample for %g s" % peer.timeout
        except WireError as error:
            text = str(error)
        except OSError as error:
            kind = "lost"
            text = "the connection broke (%s)" % (error.strerror or error)
        except Exception:
            log.exception("a defect, met while serving %s", peer.address)
        finally:
            self.waiting.remove(sock)
            if kind != "finished":
                peer.say(b"error %s\n" % text.encode())
                if kind == "refused" or peer.slot < 0:
                    self.refusals.add(peer.source, text)
            if peer.slot >= 0:
                self.leave(peer, kind, text)
            close_gently(peer.sock)
            self.pinning.threads.discard(thread)

    def converse(self, peer: Peer) -> Tuple[str, str]:
        """Take samples until the peer says goodbye or closes: how it ended, (kind, text)."""
        nonce = secrets.token_hex(16) if self.options.secret else None
        if nonce:
            peer.say(b"challenge %s\n" % nonce.encode())
        for message in peer.messages(bool(nonce)):
            # a tuple is a sample's row; before the answer to a challenge there is none, as
            # messages() then gives the first one as it came
            if type(message) is tuple:
                self.take(peer, message)
                message = None
                self.take_alike(peer)
            elif nonce:
                check_auth(message, self.options.secret, nonce)
                nonce = None
            elif message.get("part") == "job":
                row = check_job(message)
                with self.lock:
                    self.table.write_job(row)
                if self.news:
                    self.news.tell_job(row)
            elif message.get("part") == "past":
                add_past(peer, message)
            elif "part" in message:
                add_part(peer, message)
            elif "bye" in message:
                said = [message["bye"], message.get("report")]
                words = [clean_text(text) for text in said if type(text) is str]
                return "finished", "; ".join(words)
            message = None  # freed before the thread waits again: what is kept is cold
        if peer.text("version"):
            return "lost", "closed without a goodbye"
        return "finished", "closed"

    def take_alike(self, peer: Peer) -> None:
        """Take samples as long as each comes alone and has the shape of the one before.

        Nearly all do.  This is what messages() does, in fewer steps: some percent of what a sample
        takes when hundreds of agents send.  What is different is left to it.
        """
        shape = peer.shape
        try:
            while shape and not peer.data:
                data = peer.receive(peer.timeout)
                row = parse_shape(data, shape)
                if row is None:
                    peer.data = data  # nothing, at the end
                    return
                data = b""  # freed before the thread waits again
                peer.count_message()
                self.batch.add(peer, row)
                row = None
        finally:
            self.batch.finish(peer)

    def take(self, peer: Peer, row: Row) -> None:
        """Put a sample into the table, tell what it means, answer it."""
        peer.row = row[:KEPT]
        is_new = peer.slot < 0
        if is_new:
            self.enter(peer)
        self.samples += 1
        changes: List[Tuple[str, Rule, float]] = []
        if peer.state or not is_within(self.limits, row):
            changes = judge(self.options.rules, peer.state, row, time.monotonic())
        if changes:
            names = [str(rule).replace(" ", "_") for rule in peer.firing()]
            peer.alerts = " ".join(names)
        self.table.write(peer.slot, peer.address, row, peer.since, peer.alerts)
        if peer.look:
            self.write_look(peer, peer.look)
            peer.look = []
        if is_new:
            self.welcome(peer)
        for kind, rule, value in changes:
            self.tell_change(peer, kind, rule, value)
        if peer.ack:
            takes_parts = is_new and peer.text("version")
            peer.say(b"ok parts\nok\n" if takes_parts else b"ok\n")
            if takes_parts and self.options.record:
                peer.say(b"ok past\n")
        if peer.past:
            self.keep_past(peer)
        if self.options.verbose:
            values = zip(INDEX, map(from_field, row))
            known = {key: value for key, value in values if value is not None}
            log.debug("%s sent %s", peer.event("", "").subject(), known)

    def enter(self, peer: Peer) -> None:
        """Give the peer a slot; WireError when there is none for it."""
        interval = peer.row[INDEX["interval"]]
        if not math.isnan(interval):  # it is known
            interval = min(interval, MAX_INTERVAL)
            peer.timeout = max(peer.timeout, 2.5 * interval)
        share = max(1, self.table.capacity * SOURCE_SHARE)
        with self.lock:
            if not self.free:
                raise WireError("master is full (%d agents)" % self.table.capacity)
            if peer.source not in LOOPBACK and self.slots[peer.source] >= share:
                raise WireError(
                    "too many agents of %s; the rest is for others" % peer.source
                )
            peer.slot = heapq.heappop(self.free)
            self.slots[peer.source] += 1
            peer.known_as = peer.text("node") or peer.address
            peer.job = peer.text("job")
            self.used = max(self.used, peer.slot + 1)
        self.waiting.remove(peer.sock)
        if self.news:
            self.news.enter(peer.job)

    def welcome(self, peer: Peer) -> None:
        """Tell that a node is there, and whether it was lost before."""
        self.beat_table()
        with self.lock:
            since = self.lost.pop((peer.known_as, peer.job), None)
        events = [peer.event("connected", "from %s" % peer.address)]
        if since is not None:
            away = time.monotonic() - since
            events.append(peer.event("resolved", "lost: back after %.0f s" % away))
        if self.count_move(peer):
            self.flapping.withhold(peer.node_key(), ())  # that it had left, say
            self.probation.begin(peer, SETTLE_SECONDS)
        if self.count_visit(peer):
            self.probation.begin(peer, BRIEF_SECONDS)
        if not self.probation.keep(peer, THE_NODE, events):
            self.announce(*events)

    def tell_change(self, peer: Peer, kind: str, rule: Rule, value: float) -> None:
        """Tell that a sample made a rule fire, or was the end of it."""
        words = alert_words(rule, value)
        if peer.stay() <= BRIEF_SECONDS and self.early.count(peer.source):
            self.probation.begin(peer, BRIEF_SECONDS)
        self.tell_rule(peer, peer.event(kind, words, rule, value))

    def write_look(self, peer: Peer, look: List[PartRow]) -> None:
        """Show a look of a node: it is whole when the next sample comes."""
        with self.lock:
            self.table.write_parts(peer.slot, look, peer.places)

    def keep_past(self, peer: Peer) -> None:
        """Hand what a peer told of the past to the recorder, and say whether there is room."""
        readings = peer.past
        peer.past = []
        if not self.options.record:
            return
        with self.lock:
            is_kept = self.table.write_past(peer.known_as, peer.job, readings)
        peer.say(b"ok past\n" if is_kept else b"full past\n")

    def keep_last(self, peer: Peer) -> None:
        """Hand the last sample of a job's node to the recorder, which may not have looked since."""
        last = self.table.last_reading(peer.slot)
        with self.lock:
            self.table.write_past(peer.known_as, peer.job, [last])

    def leave(self, peer: Peer, kind: str, text: str) -> None:
        """Free the peer's slot and tell how it ended."""
        if peer.past:
            self.keep_past(peer)
        if self.options.record and peer.job and kind != "refused":
            self.keep_last(peer)
        self.table.clear(peer.slot)
        if peer.places:
            self.write_look(peer, [])
        with self.lock:
            heapq.heappush(self.free, peer.slot)
            self.slots[peer.source] -= 1
            if not self.slots[peer.source]:
                del self.slots[peer.source]
            if kind == "lost":
                self.lost[peer.known_as, peer.job] = time.monotonic()
        if self.news:
            self.news.leave(peer.job)
        if peer.stay() <= BRIEF_SECONDS:
            self.visits.end_brief(peer.source)
        # one that was here for long is no part of what comes and goes under its name
        flaps = peer.stay() <= SETTLE_SECONDS and self.count_move(peer)
        kept = self.probation.end(peer)
        for rule in peer.firing():
            if str(rule) not in kept:
                words = "%s: the node is gone" % str(rule)
                self.tell_rule(peer, peer.event("resolved", words, rule))
        last = [peer.event(kind, text)]
        if kind == "refused":
            return
        if flaps:
            self.flapping.withhold(peer.node_key(), last)
        elif THE_NODE in kept:  # nobody knows that it was here
            self.visits.withhold(peer.source, last)
        else:
            self.announce(*last)

    # ---- what is told, and what is not

    def count_visit(self, peer: Peer) -> bool:
        """Whether the peer's address comes and goes too often for this visit to be told yet."""
        visits = self.visits.begin_visit(peer.source)
        if visits > 0:
            words = (
                "%d brief visits from %s within %.0f min: no more is told of such for as long"
                % (visits, peer.source, FLAP_SECONDS / 60)
            )
            self.announce(peer.event("flapping", words))
        return visits != 0

    def count_move(self, peer: Peer) -> bool:
        """Whether the peer's node comes and goes too often for this time to be told yet."""
        moves = self.flapping.count(peer.node_key())
        self.tell_flapping(peer, THE_NODE, moves)
        return moves != 0

    def tell_rule(self, peer: Peer, event: Event) -> None:
        """Announce that a rule fires or is resolved, unless it does so too often."""
        what = str(event.rule)
        if self.probation.keep(peer, what, [event]):
            return
        key = (peer.address, what)
        changes = self.flapping.count(key)
        self.tell_flapping(peer, what, changes)
        if changes:
            self.flapping.withhold(key, [event])
        else:
            self.announce(event)

    def tell_flapping(self, peer: Peer, what: str, changes: int) -> None:
        """Announce that something is flapping, if a count of its changes says so."""
        if changes > 0:
            words = (
                "%s came and went %d times within %.0f min: no more is told of it until it"
                " is quiet" % (what, changes, FLAP_SECONDS / 60)
            )
            self.announce(peer.event("flapping", words))

    def end_probation(self, peer: Peer) -> None:
        """Tell what was kept of a peer that has stayed."""
        for what, events in self.probation.end(peer).items():
            if what == THE_NODE:
                self.announce(*events)
            else:
                self.tell_rule(peer, events[0])

    def announce(self, *events: Event) -> None:
        """Tell events: to the ring, the log and, when they are alerts, the command."""
        for event in events:
            self.announce_one(event)

    def announce_one(self, event: Event) -> None:
        """One event: to the ring, the log and, when it is an alert, the command."""
        self.table.add_event(
            event.kind, event.text, event.node, event.row, event.address
        )
        if self.news and (event.kind != "lost" or self.options.lost):
            self.news.tell_event(event)
        is_lost = event.kind == "lost" and self.options.lost
        if event.kind not in ("alert", "problem", "died") and not is_lost:
            log.info("%s %s: %s", event.kind, event.subject(), event.text)
            return
        log.critical(
            "CRITICAL WARNING: %s%s: %s%s",
            event.subject(),
            " lost" if is_lost else "",
            event.text,
            "\a" if sys.stderr.isatty() else "",
        )
        if self.runner:
            rule = event.rule
            metric = rule.metric if rule else event.kind
            threshold: Union[float, str] = rule.threshold if rule else ""
            facts = (event.kind, event.node, event.job(), metric)
            self.runner.post(Alert(*facts, event.value, threshold, event.text))

    def tell_refusal(self, source: str, reason: str) -> None:
        """One event for one or many refusals of a source."""
        log.warning("refused %s: %s", source, reason)
        self.table.add_event("refused", reason, source)


class Told:
    """What was told of one problem of a job."""

    __slots__ = ("since", "changes")

    def __init__(self, now: float) -> None:
        self.since = now  # time.monotonic() when it was told last
        self.changes = 0  # how often it has come since then


class Judged:
    """Picks from the verdicts what has become a problem or a death.

    A death is told at once.  A problem that goes and comes back is told again after AGAIN_SECONDS
    at the soonest, with how often it came; and no more than so many of one check of a job are told
    within that time, wherever they are.

    How far they were told is noted in the table: a collector that starts again goes on there.
    """

    def __init__(self, table: Table) -> None:
        self.known: Set[VerdictKey] = set()  # that there were at the last look
        self.told: Dict[VerdictKey, Told] = {}
        self.changes = table.verdicts_told()
        self.due = math.inf  # time.monotonic() when one that has waited may be told
        now = time.monotonic()
        rows = VERDICT.iter_unpack(table.snapshot().verdict_rows)
        old = [row for row in rows if row[2] <= self.changes]
        for raw, _, _, severity, text in old:
            if severity.strip(b"\0"):
                for verdict in json.loads(text.rstrip(b"\0")):
                    key = key_of_verdict(str(from_field(raw)), verdict)
                    self.known.add(key)
                    self.told[key] = Told(now)

    def look(self, table: Table) -> List[Event]:
        """What is new since the last look."""
        changes = table.verdict_changes()
        now = time.monotonic()
        if changes == self.changes and now < self.due:
            return []
        self.changes = changes
        events = self.pick(table.snapshot(), now)
        table.note_told(changes)
        return events

    def pick(self, view: Snapshot, now: float) -> List[Event]:
        """What of the verdicts is to be told now."""
        names = {job["raw"]: job["job"] for job in view.jobs}
        events = []
        known = set()
        self.due = math.inf
        for raw, verdicts in view.verdicts.items():
            for verdict in verdicts:
                key = key_of_verdict(raw, verdict)
                known.add(key)
                words = self.words(key, verdict, now)
                if words:
                    job = names.get(raw, raw)
                    events.append(event_of_job(verdict["severity"], job, words))
        self.known = known
        self.told = {
            key: told
            for key, told in self.told.items()
            if key in known or now - told.since < AGAIN_SECONDS
        }
        return events

    def words(self, key: VerdictKey, verdict: Message, now: float) -> str:
        """What is to be told of a verdict now; "" when that is nothing."""
        severity = verdict["severity"]
        told = self.told.get(key)
        is_back = key not in self.known
        if severity == "died":
            self.told[key] = Told(now)
            return words_of_verdict(verdict) if is_back else ""
        if severity != "problem":
            return ""
        if told is None:
            wait = self.wait(key, now)
            if wait > 0:
                self.due = min(self.due, now + wait)
                return ""
            self.told[key] = Told(now)
            return words_of_verdict(verdict)
        told.changes += is_back
        if not told.changes:
            return ""
        again = told.since + AGAIN_SECONDS
        if now < again:
            self.due = min(self.due, again)
            return ""
        self.told[key] = Told(now)
        times = "once" if told.changes == 1 else "%d times" % told.changes
        last = "came back %s in %s" % (times, time_words(now - told.since))
        return "%s; %s" % (words_of_verdict(verdict), last)

    def wait(self, key: VerdictKey, now: float) -> float:
        """For how many seconds nothing more may be told of a check of a job."""
        raw, severity, rule, _ = key
        moments = sorted(
            told.since
            for other, told in self.told.items()
            if other[:3] == (raw, severity, rule)
        )
        if len(moments) < MAX_LISTED:
            return 0.0
        return moments[-MAX_LISTED] + AGAIN_SECONDS - now


def key_of_verdict(raw: str, verdict: Message) -> VerdictKey:
    """What makes a verdict another one: the job, its severity, the rule and the place."""
    place = str(verdict.get("place", ""))
    return raw, str(verdict["severity"]), str(verdict["rule"]), place


def event_of_job(kind: str, job: str, words: str) -> Event:
    """An event of a job as a whole."""
    row = list(UNKNOWN)
    row[INDEX["job"]] = job.encode()
    return Event(kind, "", tuple(row), "", words)


def add_part(peer: Peer, message: Message) -> None:
    """Keep a part until its look is whole; WireError when there are too many."""
    part = check_part(message)
    if part is None or peer.slot < 0:
        return
    if part[0] == "look":
        peer.look = []
    elif not peer.look:
        raise WireError("a part %s before its look" % part[0])
    if len(peer.look) >= LOOK_PARTS:
        raise WireError("more than %d parts in a look" % LOOK_PARTS)
    peer.look.append(part)


def add_past(peer: Peer, message: Message) -> None:
    """Keep a reading of the past until the next sample; WireError when there are too many."""
    reading = check_past(message, time.time())
    if peer.slot < 0:
        return
    if len(peer.past) >= PAST_SLICE:
        raise WireError("more than %d readings of the past at once" % PAST_SLICE)
    peer.past.append(reading)


class Pinning:
    """Where the peers' threads may run: on the main thread's CPU while the role is busy.

    One at a time has the interpreter: passing it from CPU to CPU takes as long as their work.
    """

    def __init__(self) -> None:
        self.threads: Set[int] = set()  # the ids that the kernel has for them
        self.looked = time.monotonic()
        self.spent = 0.0  # seconds of CPU, when it was last looked
        self.is_busy = False

    def look(self) -> None:
        """Look now and then whether the role is busy."""
        now = time.monotonic()
        if now <= self.looked + PIN_SECONDS or not hasattr(os, "sched_setaffinity"):
            return
        spent = time.process_time()
        least = PIN_CPU / 2 if self.is_busy else PIN_CPU  # pinned ones take less
        self.is_busy = spent - self.spent > least * (now - self.looked)
        self.looked = now
        self.spent = spent
        with contextlib.suppress(OSError):
            self.pin()

    def pin(self) -> None:
        """Have the threads of peers run where they should; the main one runs anywhere."""
        cpus = {self.own_cpu()} if self.is_busy else os.sched_getaffinity(0)
        for thread in list(self.threads):  # alert commands are to run anywhere
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, cpus)

    def own_cpu(self) -> int:
        """The CPU that the main thread ran on last: proc(5), /proc/PID/stat, field 39."""
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[39 - 3])  # the first behind the name is field 3


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Have the kernel end a read in time, socket(7): Python's way would add a poll to each."""
    micros = max(1000, int(seconds * 1e6))
    timeval = struct.pack("ll", *divmod(micros, 1000000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def close_gently(sock: socket.socket) -> None:
    """Close so that what was written arrives: unread input would turn the close into a reset."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER_SECONDS)
        for _ in range(8):
            if not sock.recv(MAX_SAMPLE):
                break
    sock.close()


def start_thread(serve: Serve, sock: socket.socket, address: Address) -> None:
    """Run serve(sock, address) on a thread; RuntimeError when there can be none.

    A threading.Thread would keep 2 KiB more for each: nobody waits for these, or asks their names.
    A method is called as the function that it is: one call less in C, with which the stack of an
    agent's thread stays within two pages.
    """
    if isinstance(serve, types.MethodType):
        _thread.start_new_thread(serve.__func__, (serve.__self__, sock, address))
    else:
        _thread.start_new_thread(serve, (sock, address))


def hang_up(sock: socket.socket, address: Address, shortage: Shortage) -> None:
    """Close a connection that cannot be served."""
    sock.close()


def accept_loop(
    listener: socket.socket,
    waiting: Waiting,
    serve: Serve,
    timeout: float,
    beat: Callable[[], Optional[float]] = lambda: None,
    turn_away: Callable[[socket.socket, Address, Shortage], None] = hang_up,
) -> None:
    """Run serve(socket, address) on a thread for each connection, until the supervisor is gone.

    One that there is no thread or descriptor for goes to turn_away(socket, address, shortage).
    beat() is called between connections, and after as many seconds as it returns, if any.
    """

    def greet(sock: socket.socket, address: Address) -> Optional[Shortage]:
        shortage = start_serving(sock, address, waiting, serve, timeout)
        if shortage:
            turn_away(sock, address, shortage)
        return shortage

    listener.setblocking(False)
    parent = multiprocessing.parent_process()
    spare = Spare()
    told = -math.inf
    while parent and parent.is_alive():
        seconds = beat()
        spare.keep()
        multiprocessing.connection.wait([listener, parent.sentinel], seconds)
        shortage, is_stuck = accept_waiting(listener, spare, greet, turn_away)
        if shortage and time.monotonic() - told > REFUSAL_SECONDS:
            log.error("cannot take new connections for now: %s", shortage.reason)
            told = time.monotonic()
        if is_stuck:
            time.sleep(BEAT_SECONDS)  # they go on waiting: to look at once is no use


def accept_waiting(
    listener: socket.socket,
    spare: Spare,
    greet: Callable[[socket.socket, Address], Optional[Shortage]],
    turn_away: Callable[[socket.socket, Address, Shortage], None],
) -> Tuple[Optional[Shortage], bool]:
    """Greet all who wait, or as many as may come between two heartbeats.

    The shortage that somebody was turned away for, if any; and whether others cannot even be
    turned away.
    """
    shortage = None
    for _ in range(MAX_ACCEPTS):
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            break
        except ConnectionError:
            continue  # it has gone meanwhile
        except OSError as error:
            shortage = descriptor_shortage(error)
            if not spare.give():
                return shortage, True
            try:
                sock, address = listener.accept()
            except OSError as again:
                # somebody else has taken the spare one, or the peer has gone
                spare.keep()
                return shortage, not isinstance(again, BlockingIOError)
            turn_away(sock, address, shortage)
            spare.keep()
        else:
            shortage = greet(sock, address) or shortage
    return shortage, False


def start_serving(
    sock: socket.socket,
    address: Address,
    waiting: Waiting,
    serve: Serve,
    timeout: float,
) -> Optional[Shortage]:
    """Start a thread for a connection; what is short if there can be none.

    The timeout is set here: a thread that calls setsockopt() needs 4 KiB more of its stack.
    """
    sock.setblocking(True)
    with contextlib.suppress(OSError):  # gone already, as its thread will see
        set_timeout(sock, timeout)
    waiting.add(sock, split_address(address)[0])
    try:
        start_thread(serve, sock, address)
    except RuntimeError as error:
        waiting.remove(sock)
        return Shortage(str(error), "raise TasksMax or ulimit -u")
    return None


# ============================================================================
# Records: a job's whole life, in a file of JSON lines, and back
# ============================================================================
#
# A record is only ever appended to, so that whoever is killed leaves all but half a line:
#
#     {"job": {"job": "4711", "state": "RUNNING", ...}, "time": 1700000000, "format": 1}
#     {"nodes": {"c1": {"cpus": 64, ...}, "c2": {}}}         all so far: rows have their order
#     {"row": 1700000010, "step": 10, "cpu": [0, 41.5, 83, 83, 0]}  least, mean, most, each node
#     {"late": 1700000007, "node": "c2", "cpu": 83, ...}     a reading that came after a cut
#     {"event": {"time": 1700000011, "kind": "lost", "node": "c2", "text": "..."}}
#     {"verdicts": [{"severity": "advice", "what": ...}], "time": 1700000020}
#     {"ranks": [{"node": "c1", "rank": 3, ...}], "time": 1700000020}
#     {"gpus": {"c1 0": [97, 31e9, 250, 61]}, "time": 1700000020}   GPU_KEYS of each
#     {"gap": 1700000100, "until": 1700000160}               nobody recorded in between
#     {"end": {"time": 1700003600}}
#
# Later lines count more than earlier ones; a line that cannot be read counts for nothing.
# Each master writes a file of its own, JOB.WRITER.jsonl: two that watch the same job need no
# lock, and what they wrote is put together when it is read.  A job that has ended is packed:
# JOB.WRITER.jsonl.gz, of which the first gzip member holds nothing but {"summary": ...}.
# Beside a large one lies JOB.sketch.gz, which is all that a page shows of it.

RECORD_FORMAT = 1
ROW_SECONDS = 10  # from one row to the next, as long as a job is young ...
FINE_SECONDS = 7200  # ... that long; then half as many, whenever its age doubles
MANY_NODES = 16  # of more nodes the rows get fewer after half that time
KEEP_SECONDS = 365 * 86400  # how old a record may get ...
KEEP_BYTES = 200 * 10**6  # ... and how large all of them together
IDLE_SECONDS = 2 * 86400  # a file that nobody has written to for so long is packed, too
MAX_RECORD = 64 * 2**20  # bytes of a file that are read
MAX_HEAD = 65536  # bytes of its begin or its end that a summary is read from ...
USUAL_HEAD = 2048  # ... of which these few mostly are enough
SUMMARY_VERDICTS = 3  # in a summary
KEPT_RECORDS = 4  # that an archive has at hand
ARCHIVE_SECONDS = 3.0  # that a disk may take to answer it
READ_SECONDS = 0.5  # that it reads summaries for, until it looks what else is asked for
SETTLED_SECONDS = 2.0  # since a folder changed: a further change has another time
GROWS_SECONDS = (
    600.0  # since it was last written: then a file is read as one that grows
)
SUMMARIZED = ("cpu", "job_cpu", "job_mem", "gpu")  # metrics that a summary rests upon
SKETCH_FORMAT = 1
SKETCHED_BYTES = 2**18  # of a record: a larger one has a sketch beside it
CURVE_POINTS = 400  # of a curve over a whole job
MAP_COLUMNS = 120  # cells of the map for each node
MAP_LEVELS = 10  # shades
LEVEL_DIGITS = "0123456789A"  # each level as a text
LEAST_AXIS = 1.0  # seconds
RECORDED = (  # metrics with least, mean and most over the nodes
    "cpu",
    "job_cpu",
    "ram",
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
BY_NODE = ("cpu", "job_cpu", "ram", "job_mem", "gpu", "gpu_mem")  # and of each node
CHARTED = ("job_cpu", "job_mem", "gpu", "gpu_mem", "cpu", "ram") + RECORDED[7:]
NODE_FACTS = ("cpus", "mem_total", "gpus", "job_cpus", "job_mem_limit")
GPU_KEYS = ("gpu", "mem_used", "power", "temp")
RECORD_NAME = re.compile(r"([A-Za-z0-9_%]+)\.([A-Za-z0-9_-]+)\.jsonl(\.gz)?")
# A state of Slurm's is a death without any other evidence ...
DEADLY_STATES = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL")


class RecordError(Exception):
    """A record cannot be had; the text says why."""


class RecordRow(NamedTuple):
    """A row of a record: what is unknown is None, and of a metric all or nothing is there."""

    time: float  # at its end
    step: float  # seconds that it stands for
    names: List[str]  # the nodes, in the order of what follows
    values: Dict[
        str, List[Optional[float]]
    ]  # metric -> [least, mean, most, each node...]


class Late(NamedTuple):
    """What a node told after a cut."""

    time: float
    node: str
    values: Dict[str, float]  # metrics of RECORDED


# ---- lines


def record_line(line: Message) -> bytes:
    """A line of a record."""
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


def short_number(value: Optional[float]) -> str:
    """A number with four digits, as JSON has it; null if it is unknown."""
    if value is None or not math.isfinite(value):
        return "null"
    return "%.4g" % value


def row_line(row: RecordRow) -> bytes:
    """A row's line: json.dumps() would write sixteen digits of every number."""
    fields = ['"row":%.1f' % row.time, '"step":%g' % row.step]
    for key, values in row.values.items():
        fields.append('"%s":[%s]' % (key, ",".join(map(short_number, values))))
    return ("{%s}\n" % ",".join(fields)).encode()


def late_line(when: float, node: str, readings: Iterable[float]) -> bytes:
    """The line of a node's reading of the past; readings: those of PAST_KEYS, NaN is unknown."""
    fields = ['"late":%.1f' % when, '"node":%s' % json.dumps(node, ensure_ascii=False)]
    for key, value in zip(PAST_KEYS, readings):
        if key in RECORDED and math.isfinite(value):
            fields.append('"%s":%s' % (key, short_number(value)))
    return ("{%s}\n" % ",".join(fields)).encode("utf-8", "replace")


def read_lines(data: bytes) -> Iterator[Message]:
    """The lines of a record that are whole, wherever it was cut."""
    for line in data.split(b"\n"):
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            yield message


def step_of(age: float, nodes: int) -> int:
    """The seconds between two rows of a job of that age."""
    fine = FINE_SECONDS / 2 if nodes > MANY_NODES else FINE_SECONDS
    step = ROW_SECONDS
    while age >= fine:
        step *= 2
        fine *= 2
    return step


def merge_rows(rows: Sequence[RecordRow]) -> RecordRow:
    """One row in place of several that follow each other; the last one has the most nodes."""
    last = rows[-1]
    width = {key: len(values) for row in rows for key, values in row.values.items()}
    merged: Dict[str, List[Optional[float]]] = {}
    for key, size in width.items():
        columns = [row.values[key] for row in rows if key in row.values]
        least = [values[0] for values in columns if values[0] is not None]
        most = [values[2] for values in columns if values[2] is not None]
        means = [
            mean_known(values[place] for values in columns if place < len(values))
            for place in range(size)
        ]
        means[0] = min(least) if least else None
        means[2] = max(most) if most else None
        merged[key] = means
    step = last.time - rows[0].time + rows[0].step
    return RecordRow(last.time, step, last.names, merged)


def mean_known(values: Iterable[Optional[float]]) -> Optional[float]:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def halve(rows: Sequence[RecordRow]) -> List[RecordRow]:
    """Half as many rows: two become one, unless there is a gap between them."""
    halved = []
    index = 0
    while index < len(rows):
        pair = rows[index : index + 2]
        if len(pair) == 2 and is_gap(*pair):
            pair = pair[:1]
        halved.append(merge_rows(pair))
        index += len(pair)
    return halved


def is_gap(before: RecordRow, after: RecordRow) -> bool:
    """Whether something is missing between two rows."""
    return after.time - before.time > 2.5 * max(before.step, after.step)


def without_overlap(rows: Iterable[RecordRow]) -> List[RecordRow]:
    """The rows by time; where several stand for the same time, the finest, then the widest.

    Rows of other nodes tell of something else: each command of several leaves its own record.
    """
    rows = list(rows)
    if all(map(is_after, rows[1:], rows)):
        return rows
    times: List[float] = []
    steps: List[float] = []
    kept: List[RecordRow] = []
    for row in sorted(rows, key=lambda row: (row.step, -len(row.names), row.time)):
        place = bisect.bisect_left(times, row.time)
        is_told = any(
            abs(times[index] - row.time) < 0.75 * steps[index]
            and not are_of_others(row.names, kept[index].names)
            for index in (place - 1, place)
            if 0 <= index < len(times)
        )
        if not is_told:
            times.insert(place, row.time)
            steps.insert(place, row.step)
            kept.insert(place, row)
    return kept


def is_after(row: RecordRow, before: RecordRow) -> bool:
    """Whether a row stands for later time than another, all of it."""
    return row.time - before.time >= 0.75 * max(row.step, before.step)


def are_of_others(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether no node is in both, as far as they are known."""
    return bool(names and others) and set(names).isdisjoint(others)


def add_late(rows: List[RecordRow], late: Iterable[Late], names: List[str]) -> None:
    """Put what nodes told after a cut in its place: into rows by time, or in rows of its own.

    names: the nodes, in the order that they have in all rows.
    """
    times = [row.time for row in rows]
    within: Dict[int, List[Late]] = {}  # by the index of a row
    between: Dict[int, List[Late]] = {}
    for point in late:
        index = bisect.bisect_left(times, point.time)
        if index < len(rows) and point.time > rows[index].time - rows[index].step:
            within.setdefault(index, []).append(point)
        else:
            between.setdefault(int(point.time // ROW_SECONDS), []).append(point)
    places = {name: place for place, name in enumerate(names)}
    for index, points in within.items():
        rows[index] = with_late(rows[index], points, places)
    for points in between.values():
        when = max(point.time for point in points)
        index = bisect.bisect_left(times, when)
        step = float(ROW_SECONDS)
        if index:
            step = round(min(step, when - times[index - 1]), 1)
        rows.append(with_late(RecordRow(when, step, names, {}), points, places))
    rows.sort(key=operator.attrgetter("time"))


def with_late(
    row: RecordRow, points: Iterable[Late], places: Dict[str, int]
) -> RecordRow:
    """The row with the readings of those nodes of which it has none."""
    values = {key: list(old) for key, old in row.values.items()}
    means = values.setdefault("cpu", [None, None, None])
    count = sum(mean is not None for mean in means[3:])  # nodes in the row
    for point in points:
        place = 3 + places[point.node]
        if place < len(means) and means[place] is not None:
            continue
        for key, value in point.values.items():
            band = values.setdefault(key, [None, None, None])
            put_late(band, value, count)
            if key in BY_NODE:
                band += [None] * (place + 1 - len(band))
                band[place] = value
        count += 1
    for key in BY_NODE:
        if key in values:
            values[key][1] = mean_known(values[key][3:])
    return row._replace(names=list(places), values=values)


def put_late(band: List[Optional[float]], value: float, count: int) -> None:
    """Count a reading in least, mean and most of so many others."""
    least, mean, most = band[:3]
    if least is None or mean is None or most is None:
        band[:3] = [value] * 3
    else:
        mean = (mean * count + value) / (count + 1)
        band[:3] = [min(least, value), mean, max(most, value)]


# ---- a record


class Record:
    """What is known of a job, put together from the lines of its files."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.facts: Message = dict.fromkeys(JOB_KEYS)
        self.facts["job"] = job
        self.nodes: Dict[str, Message] = {}
        self.names: Dict[str, List[str]] = {}  # of each file: the nodes of its rows
        self.taken: Dict[str, int] = {}  # of each file: its bytes that are in here
        self.files: List[Any] = []  # them, each a RecordFile, as they were before
        self.rows: List[RecordRow] = []
        self.late: List[Late] = []
        self.events: List[Message] = []
        self.verdicts: Optional[List[Message]] = None  # None: nobody has judged
        self.ranks: List[Message] = []
        self.gpus: Dict[str, List[Tuple[float, List[Optional[float]]]]] = {}
        self.gaps: List[Tuple[float, float]] = []
        self.end: Optional[Message] = None
        self.begun = math.inf  # time of its first line
        self.judged = self.ranked = self.told = -math.inf  # times of what is the newest

    def add_file(self, path: str, content: bytes) -> None:
        """Add what a file has, or has got since; a line without an end is for the next time."""
        whole = content[: content.rfind(b"\n") + 1]
        self.taken[path] = self.taken.get(path, 0) + len(whole)
        self.add(read_lines(whole), path)

    def add(self, lines: Iterable[Message], path: str = "") -> "Record":
        """Add the lines of one file, or more of them."""
        for line in lines:
            try:
                if "nodes" in line:
                    self.names[path] = list(line["nodes"])
                self.add_line(line, self.names.get(path, []))
            except (AttributeError, KeyError, TypeError, ValueError):
                continue  # it is no line of ours
        return self

    def add_line(self, line: Message, names: List[str]) -> None:
        """Add a line: names are those of its file's last line of nodes."""
        if "row" in line:
            when = float(line["row"])
            step = float(line["step"])
            values = {key: value for key, value in line.items() if type(value) is list}
            if all(len(value) >= 3 for value in values.values()):
                self.rows.append(RecordRow(when, step, names, values))
        elif "late" in line:
            name = str(line["node"])
            known = {key: float(line[key]) for key in RECORDED if key in line}
            if "cpu" in known:
                self.nodes.setdefault(name, {})
                self.late.append(Late(float(line["late"]), name, known))
        elif "job" in line:
            self.add_facts(line["job"], float(line["time"]))
        elif "nodes" in line:
            for name, facts in line["nodes"].items():
                self.nodes.setdefault(name, {}).update(facts)
        elif "event" in line:
            event = dict(dict.fromkeys(EVENT_KEYS), **line["event"])
            event["time"] = float(event["time"])
            self.events.append(event)
        elif "verdicts" in line:
            if float(line["time"]) >= self.judged:
                self.judged = float(line["time"])
                self.verdicts = [dict(verdict) for verdict in line["verdicts"]]
        elif "ranks" in line:
            if float(line["time"]) >= self.ranked:
                self.ranked = float(line["time"])
                self.ranks = [dict(rank) for rank in line["ranks"]]
        elif "gpus" in line:
            when = float(line["time"])
            for name, reading in line["gpus"].items():
                self.gpus.setdefault(name, []).append((when, list(reading)))
        elif "gap" in line:
            self.gaps.append((float(line["gap"]), float(line["until"])))
        elif "end" in line:
            end = dict(line["end"], time=float(line["end"]["time"]))
            if self.end is None or end["time"] >= self.end["time"]:
                self.end = end

    def add_facts(self, facts: Message, when: float) -> None:
        """What Slurm says of the job: the newest word on each thing."""
        self.begun = min(self.begun, when)
        is_newest = when >= self.told
        self.told = max(self.told, when)
        for key in JOB_KEYS:
            value = facts.get(key)
            if value is not None and (is_newest or self.facts[key] is None):
                self.facts[key] = value

    def finish(self) -> "Record":
        """Put in order what came from several files."""
        self.rows = without_overlap(self.rows)
        self.put_nodes_in_order()
        add_late(self.rows, self.late, list(self.nodes))
        self.late = []
        events = {
            (event["time"], event["kind"], event["node"]): event
            for event in self.events
        }
        self.events = sorted(events.values(), key=operator.itemgetter("time"))
        for readings in self.gpus.values():
            readings.sort(key=operator.itemgetter(0))
        if self.has_ended and self.facts["state"] not in ENDED_STATES:
            self.facts["state"] = None  # its agents said goodbye, and Slurm nothing
        if self.verdicts is None and self.facts["state"] in DEADLY_STATES:
            self.verdicts = verdicts_json(find_deaths(self)) or None
        return self

    def put_nodes_in_order(self) -> None:
        """Have the first nodes of this record in every row, in the same order."""
        names = list(self.nodes)
        is_in_order: Dict[int, bool] = {}
        rows = []
        for row in self.rows:
            key = id(row.names)
            if key not in is_in_order:
                is_in_order[key] = names[: len(row.names)] == row.names
            rows.append(row if is_in_order[key] else in_order_of(row, names))
        self.rows = rows

    def columns(self, key: str) -> List[Tuple[Optional[float], ...]]:
        """For each node: its mean in each row of this metric; see ``rows_of``."""
        means = [row.values[key][3:] for row in self.rows_of(key)]
        return list(itertools.zip_longest(*means))

    def rows_of(self, key: str) -> List[RecordRow]:
        """The rows in which a metric is known."""
        return [row for row in self.rows if key in row.values]

    def copy(self) -> "Record":
        """One to which lines can be added, while this one is looked at."""
        other = Record(self.job)
        for name, value in self.__dict__.items():
            is_shared = not isinstance(value, (dict, list))
            other.__dict__[name] = value if is_shared else value.copy()
        other.gpus = {name: looks[:] for name, looks in self.gpus.items()}
        other.nodes = {name: dict(facts) for name, facts in self.nodes.items()}
        return other

    @property
    def span(self) -> Tuple[float, float]:
        """The times between which there is something to tell."""
        first = self.facts["start"] or self.begun
        last = self.facts["start"] or 0.0
        if self.rows:
            first = min(first, self.rows[0].time - self.rows[0].step)
            last = max(last, self.rows[-1].time)
        if not math.isfinite(first):
            first = last
        if self.has_ended:
            last = max(last, self.facts["end"] or 0.0)
        return first, max(first, last)

    @property
    def watched(self) -> Tuple[float, float]:
        """The times between which there are curves; all of its span without any."""
        first, last = self.span
        if self.rows:
            first = max(first, self.rows[0].time - self.rows[0].step)
        return first, max(first, last)

    @property
    def has_ended(self) -> bool:
        """Whether the job is over, by what Slurm or its agents said."""
        return self.facts["state"] in ENDED_STATES or bool(
            self.end and self.end["time"] >= self.told - ROW_SECONDS
        )

    def lines(self) -> List[bytes]:
        """The whole record as the lines of one file."""
        names = list(self.nodes)
        lines = [job_line(self.facts, self.begun if self.rows else self.told)]
        lines.append(record_line({"nodes": self.nodes}))
        lines += [row_line(in_order_of(row, names)) for row in self.rows]
        lines += [record_line({"event": event}) for event in self.events]
        for gap, until in self.gaps:
            lines.append(record_line({"gap": gap, "until": until}))
        looks: Dict[float, Message] = {}
        for name, readings in self.gpus.items():
            for when, reading in readings:
                looks.setdefault(when, {})[name] = reading
        for when, gpus in looks.items():
            lines.append(record_line({"gpus": gpus, "time": when}))
        if self.ranks:
            lines.append(record_line({"ranks": self.ranks, "time": self.ranked}))
        if self.verdicts is not None:
            line = {"verdicts": self.verdicts, "time": self.judged}
            lines.append(record_line(line))
        if self.end:
            lines.append(record_line({"end": self.end}))
        return lines


def find_deaths(record: Record) -> List[Verdict]:
    """What a job died of that no recorder has judged: agent.py wrote its record, or Slurm did."""
    nodes = []
    for place, (name, facts) in enumerate(record.nodes.items()):
        curves = {}
        for key in BY_NODE:
            columns = record.columns(key)
            means = columns[place] if place < len(columns) else ()
            points = zip(record.rows_of(key), means)
            curves[key] = [(row.time, mean) for row, mean in points if mean is not None]
        sample: Message = dict.fromkeys(INDEX)
        sample.update(facts)
        sample.update({key: curve[-1][1] for key, curve in curves.items() if curve})
        ranks = [rank for rank in record.ranks if rank.get("node") == name]
        nodes.append(NodeEvidence(name, sample, curves, ranks, [], {}, set(), None))
    _, end = record.span
    evidence = JobEvidence(record.facts, nodes, record.events, end)
    return [verdict for verdict in diagnose(evidence) if verdict.severity == "died"]


def in_order_of(row: RecordRow, names: List[str]) -> RecordRow:
    """The row with its nodes in another order."""
    if row.names == names:
        return row
    places = {name: place for place, name in enumerate(row.names)}
    values: Dict[str, List[Optional[float]]] = {}
    for key, old in row.values.items():
        values[key] = old[:3]
        if len(old) > 3:
            for name in names:
                place = 3 + places.get(name, len(old))
                values[key].append(old[place] if place < len(old) else None)
    return RecordRow(row.time, row.step, names, values)


def job_line(facts: Message, when: float) -> bytes:
    """The line that tells what Slurm says of a job."""
    known = {key: facts[key] for key in JOB_KEYS if facts.get(key) is not None}
    return record_line({"job": known, "time": round(when, 1), "format": RECORD_FORMAT})


def parse_record(job: str, data: bytes) -> Record:
    """A record out of the bytes of one file."""
    return Record(job).add(read_lines(data)).finish()


def summarize(record: Record) -> Message:
    """What a list of jobs tells of one: JOB_KEYS, and what it used; None if that is not known."""
    summary = dict(record.facts)
    first, last = record.span
    summary["names"] = list(record.nodes)
    summary["nodes"] = summary["nodes"] or len(record.nodes) or None
    summary["time"] = last
    summary["ran"] = last - first if record.rows or summary["start"] else None
    summary["has_ended"] = record.has_ended
    summary["weight"] = sum(row.step for row in record.rows)
    key = "job_cpu" if any("job_cpu" in row.values for row in record.rows) else "cpu"
    summary["cpu"] = weighted_mean(record.rows, key)
    summary["gpu"] = weighted_mean(record.rows, "gpu")
    summary["peak"] = largest(record.rows, "job_mem")
    limits = [facts.get("job_mem_limit") for facts in record.nodes.values()]
    summary["mem_limit"] = max((limit for limit in limits if limit), default=None)
    cpus = [facts.get("job_cpus") for facts in record.nodes.values()]
    summary["got_cpus"] = sum(filter(None, cpus)) or None
    verdicts = record.verdicts
    summary["verdicts"] = None if verdicts is None else verdicts[:SUMMARY_VERDICTS]
    return summary


def weighted_mean(rows: Sequence[RecordRow], key: str) -> Optional[float]:
    """The mean of a metric over the job's life."""
    total = weight = 0.0
    for row in rows:
        values = row.values.get(key)
        if values and values[1] is not None:
            total += row.step * values[1]
            weight += row.step
    return total / weight if weight else None


def largest(rows: Sequence[RecordRow], key: str) -> Optional[float]:
    """The largest reading of a metric on any node."""
    most = [row.values[key][2] for row in rows if key in row.values]
    return max((value for value in most if value is not None), default=None)


BLANK_SUMMARY = summarize(Record(""))


def merge_summaries(one: Message, other: Message) -> Message:
    """What two files say of one job: the newer one's facts, and what either has seen."""
    old, new = sorted((one, other), key=lambda summary: summary["time"] or 0)
    merged = {
        key: old.get(key) if new.get(key) is None else new[key]
        for key in {**old, **new}
    }
    for key in ("peak", "mem_limit", "got_cpus", "ran"):
        known = [summary[key] for summary in (old, new) if summary.get(key) is not None]
        merged[key] = max(known, default=None)
    merged["names"] = list(dict.fromkeys(old["names"] + new["names"]))
    for key in ("cpu", "gpu"):
        known = [part for part in (old, new) if part.get(key) is not None]
        weight = sum(part["weight"] for part in known)
        if weight:
            total = sum(part["weight"] * part[key] for part in known)
            merged[key] = total / weight
    merged["weight"] = old["weight"] + new["weight"]
    merged["has_ended"] = old["has_ended"] or new["has_ended"]
    return merged


def severity_of(summary: Message) -> str:
    """The worst of what was found: of SEVERITIES, or "" when nobody can tell."""
    found = [verdict.get("severity") for verdict in summary["verdicts"] or ()]
    if summary["state"] in DEADLY_STATES:
        return "died"
    for severity in SEVERITIES:
        if severity in found:
            return severity
    return "" if summary["verdicts"] is None else "fine"


# ---- sketches: what a page shows of a record


class Piece(NamedTuple):
    """The points of a curve between two gaps, as columns: each stands for a row or several."""

    times: List[float]  # at their ends
    steps: List[float]  # seconds
    least: List[float]
    means: List[float]
    most: List[float]


class NodeMap(NamedTuple):
    """How much each node had of a metric over the time, in MAP_COLUMNS columns."""

    top: float  # what the highest level stands for
    # node -> for each column one of LEVEL_DIGITS; a blank is unknown
    levels: Dict[str, str]


class Sketch(NamedTuple):
    """What a page shows of a record, as thin as a page is.

    It is made in a fraction of a second of a record of days, and read in a fraction of that.
    """

    summary: Message
    first: float  # the begin of its time axis: since then it was watched
    last: float
    steps: List[int]  # seconds that rows stand for: the least and the most
    nodes: List[Message]  # of each node: what it did over the whole job
    gpus: List[Message]
    ranks: List[Message]
    events: List[Message]
    verdicts: Optional[List[Message]]
    curves: Dict[str, List[Piece]]  # by metric
    maps: Dict[str, NodeMap]


def make_sketch(record: Record) -> Sketch:
    """The sketch of a record."""
    first, last = record.watched
    last = max(first + LEAST_AXIS, last)
    known = {key: known_rows(record.rows, key) for key in CHARTED}
    cpu = "job_cpu" if known["job_cpu"] else "cpu"
    totals: Dict[str, List[Optional[Total]]] = {}
    maps = {}
    for key in (cpu, "job_mem", "gpu"):
        rows = known[key]
        means = [row.values[key][3:] for row in rows]
        totals[key] = node_totals(rows, means)
        if rows:
            maps[key] = make_map(record, key, rows, means, (first, last))
    has_all = len(totals[cpu]) == len(record.nodes) and None not in totals[cpu]
    if cpu == "job_cpu" and not has_all:
        rows = known["cpu"]
        means = [row.values["cpu"][3:] for row in rows]
        totals["cpu"] = node_totals(rows, means)
    steps = sorted({round(row.step) for row in record.rows}) or [ROW_SECONDS]
    return Sketch(
        summarize(record),
        first,
        last,
        [steps[0], steps[-1]],
        run_node_rows(record, totals),
        gpu_rows(record),
        record.ranks,
        record.events,
        record.verdicts,
        make_curves(record.rows, known),
        maps,
    )


def most_of(sketch: Sketch, key: str) -> Optional[float]:
    """The largest point of a metric's curve."""
    return max((max(piece.most) for piece in sketch.curves.get(key, ())), default=None)


def start_of(sketch: Sketch) -> float:
    """When its job began, which may have been before it was watched."""
    return min(sketch.first, sketch.summary["start"] or sketch.first)


def known_rows(rows: Sequence[RecordRow], key: str) -> List[RecordRow]:
    """The rows in which least, mean and most of a metric are known."""
    found = [row for row in rows if key in row.values]
    return [row for row in found if None not in row.values[key][:3]]


def make_curves(
    rows: Sequence[RecordRow], known: Dict[str, List[RecordRow]]
) -> Dict[str, List[Piece]]:
    """The curves of all metrics, with few enough points for a chart."""
    together = max(1, -(-len(rows) // CURVE_POINTS))
    whole = in_portions(rows, together)
    curves = {}
    for key, there in known.items():
        is_whole = len(there) == len(rows)
        portions = whole if is_whole else in_portions(there, together)
        if there:
            curves[key] = [make_piece(portion, key) for portion in portions]
    return curves


class Portion(NamedTuple):
    """Rows without a gap between them, and how they are put together to points."""

    rows: List[RecordRow]
    bounds: List[Tuple[int, int]]  # of each point: its first row, its last and one
    times: List[float]
    steps: List[float]


def in_portions(rows: Sequence[RecordRow], together: int) -> List[Portion]:
    """The rows in portions, of which so many rows together are a point."""
    portions = []
    for piece in in_pieces(rows):
        begins = range(0, len(piece), together)
        bounds = [(begin, min(begin + together, len(piece))) for begin in begins]
        times = [piece[end - 1].time for _, end in bounds]
        firsts = [piece[begin] for begin, _ in bounds]
        steps = [when - first.time + first.step for when, first in zip(times, firsts)]
        portions.append(Portion(piece, bounds, times, steps))
    return portions


def in_pieces(rows: Sequence[RecordRow]) -> List[List[RecordRow]]:
    """The rows in pieces without a gap."""
    pieces: List[List[RecordRow]] = []
    before: Optional[RecordRow] = None
    for row in rows:
        if before is None or is_gap(before, row):
            pieces.append([])
        pieces[-1].append(row)
        before = row
    return pieces


def make_piece(portion: Portion, key: str) -> Piece:
    """The curve of a metric over a portion, in all rows of which it is known."""
    bands: List[Any] = [row.values[key] for row in portion.rows]
    bounds = portion.bounds
    least = [band[0] for band in bands]
    means = [band[1] for band in bands]
    most = [band[2] for band in bands]
    return Piece(
        portion.times,
        portion.steps,
        [min(least[begin:end]) for begin, end in bounds],
        [sum(means[begin:end]) / (end - begin) for begin, end in bounds],
        [max(most[begin:end]) for begin, end in bounds],
    )


def make_map(
    record: Record,
    key: str,
    rows: Sequence[RecordRow],
    means: Sequence[Sequence[Optional[float]]],
    span: Tuple[float, float],
) -> NodeMap:
    """The map of a metric; means: of each row the mean of each node."""
    columns: List[Sequence[Optional[float]]] = [()] * MAP_COLUMNS
    for column, begin, end in map_slices(rows, span):
        there = list(itertools.zip_longest(*means[begin:end]))
        try:
            count = end - begin
            columns[column] = [total / count for total in map(sum, there)]  # type: ignore[arg-type]
        except TypeError:  # not all of them are known
            columns[column] = list(map(mean_known, there))
    top = 100.0
    if NUMBERS[key].unit != "%":
        known = [value for means in columns for value in means if value is not None]
        top = max(known, default=0.0) or 1.0
    texts = [level_digits(means, top) for means in columns]
    lines = map("".join, itertools.zip_longest(*texts, fillvalue=" "))
    levels = dict.fromkeys(record.nodes, " " * MAP_COLUMNS)
    levels.update(zip(record.nodes, lines))
    return NodeMap(top, levels)


def level_digits(means: Sequence[Optional[float]], top: float) -> List[str]:
    """The level of each mean as a digit; a blank where it is unknown."""
    scale = MAP_LEVELS / top
    return [
        " " if value is None else LEVEL_DIGITS[level_of(value * scale)]
        for value in means
    ]


def level_of(share: float) -> int:
    """The level that is next to so many levels."""
    return min(max(int(share + 0.5), 0), MAP_LEVELS)


def map_slices(
    rows: Sequence[RecordRow], span: Tuple[float, float]
) -> List[Tuple[int, int, int]]:
    """Which rows are in which column of the map: (column, first, last and one) of each."""
    seconds = span[1] - span[0]
    ends = [row.time for row in rows]
    begins = [row.time - row.step for row in rows]
    slices = []
    for column in range(MAP_COLUMNS):
        begin = span[0] + seconds * column / MAP_COLUMNS
        end = span[0] + seconds * (column + 1) / MAP_COLUMNS
        first = bisect.bisect_right(ends, begin + 0.01)
        last = bisect.bisect_left(begins, end - 0.01)
        if first < last:
            slices.append((column, first, last))
    return slices


Total = Tuple[float, float]  # mean and most of a node, over a job


def node_totals(
    rows: Sequence[RecordRow], means: Sequence[Sequence[Optional[float]]]
) -> List[Optional[Total]]:
    """The mean and the most of each node; None where nothing is known."""
    steps = [row.step for row in rows]
    duration = sum(steps)
    totals: List[Optional[Total]] = []
    for values in itertools.zip_longest(*means):
        try:
            mean_there = sum(map(operator.mul, values, steps)) / duration
            totals.append((mean_there, max(values)))  # type: ignore[arg-type, type-var]
        except TypeError:  # not all of them are known
            known = [value for value in values if value is not None]
            totals.append((sum(known) / len(known), max(known)) if known else None)
    return totals


def run_node_rows(
    record: Record, totals: Dict[str, List[Optional[Total]]]
) -> List[Message]:
    """What each node did over the whole job; totals: of metrics, in the order of its nodes."""
    rows = []
    for place, (name, facts) in enumerate(record.nodes.items()):
        found = {
            key: each[place] if place < len(each) else None
            for key, each in totals.items()
        }
        cpu = found.get("job_cpu") or found.get("cpu")
        memory = found["job_mem"]
        gpu = found["gpu"]
        rows.append(
            {
                "node": name,
                "job_cpus": facts.get("job_cpus"),
                "cpu": cpu and cpu[0],
                "cpu_most": cpu and cpu[1],
                "mem": memory and memory[0],
                "mem_most": memory and memory[1],
                "gpu": gpu and gpu[0],
            }
        )
    return rows


def gpu_rows(record: Record) -> List[Message]:
    """What each GPU did."""
    rows = []
    for name, readings in record.gpus.items():
        columns = list(zip(*(reading for _, reading in readings)))
        known = [[value for value in column if is_number(value)] for column in columns]
        known += [[]] * (len(GPU_KEYS) - len(known))
        busy, memory, power, temperature = known[: len(GPU_KEYS)]
        rows.append(
            {
                "name": name,
                "gpu": mean_known(busy),
                "most": max(busy, default=None),
                "mem": max(memory, default=None),
                "power": max(power, default=None),
                "temp": max(temperature, default=None),
            }
        )
    return rows


# ---- files


def safe_name(job: str) -> str:
    """A job's id as the begin of a file's name: a peer chose it, and it may hold ../ and NUL."""
    quoted = urllib.parse.quote(job, safe="", errors="replace")
    return quoted.replace(".", "%2E").replace("-", "%2D").replace("~", "%7E")


def writer_name(pid: int, start: int) -> str:
    """What tells one master's files from all others', on all machines of a home."""
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:40]
    return "%s-%d-%d" % (host, pid, start)


def make_folder(folder: str) -> None:
    """Make the folder of the records, for its owner alone, if it is not there."""
    above = os.path.dirname(folder)
    if above and not os.path.isdir(above):
        make_folder(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)


def append_lines(path: str, data: bytes) -> int:
    """Append whole lines, after half a one at most that a killed writer left: the bytes taken.

    What did not fit any more, as the disk is full, is to be given again: less is taken than
    there is, up to the end of a line.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
        written = os.write(file, data)
    finally:
        os.close(file)  # which is where a network filesystem tells of a quota
    if written == len(data):
        return written
    return data.rfind(b"\n", 0, written) + 1


def unpack(data: bytes) -> bytes:
    """The content of a gzip file, as far as it is whole; of its first MAX_RECORD bytes."""
    content = b""
    while data and len(content) < MAX_RECORD:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            content += member.decompress(data, MAX_RECORD - len(content))
        except zlib.error:
            break
        data = member.unused_data
    return content


def read_file(path: str) -> bytes:
    """The content of a record's file, packed or not."""
    with open(path, "rb") as file:
        data = file.read(MAX_RECORD)
    return unpack(data) if path.endswith(".gz") else data


def write_file(path: str, data: bytes, mark: str) -> None:
    """Write a whole file, or none: it gets its name when all of it is there."""
    unfinished = "%s.%s.new" % (path, mark)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with os.fdopen(os.open(unfinished, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def pack(path: str, job: str, mark: str) -> None:
    """Pack a file that is not written to any more; what was packed before stays in it."""
    data = read_file(path)
    packed = path + ".gz"
    with contextlib.suppress(FileNotFoundError):
        before = read_file(packed)
        if not before.endswith(data):
            data = before + data
    summary = summarize(parse_record(job, data))
    head = gzip.compress(record_line({"summary": summary}), mtime=0)
    lines = b"\n".join(
        line for line in data.split(b"\n") if not line.startswith(b'{"summary"')
    )
    write_file(packed, head + gzip.compress(lines, mtime=0), mark)
    os.unlink(path)


class RecordFile(NamedTuple):
    """A file in the folder of the records."""

    job: str
    path: str
    size: int
    changed: int  # in nanoseconds, as os.stat() has it

    @property
    def is_packed(self) -> bool:
        """Whether its job had ended when it was last written."""
        return self.path.endswith(".gz")


def list_files(folder: str, job: Optional[str] = None) -> List[RecordFile]:
    """The files of records, of all jobs or of one; none if there is no such folder (OSError)."""
    begin = "" if job is None else safe_name(job) + "."
    files = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(begin):
                continue
            match = RECORD_NAME.fullmatch(entry.name)
            if not match:
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                name = urllib.parse.unquote(match.group(1))
                file = RecordFile(name, entry.path, stat.st_size, stat.st_mtime_ns)
                files.append(file)
    return sorted(files)


def look_again(file: RecordFile) -> RecordFile:
    """A file as it is now; as it was, if it is gone just now."""
    with contextlib.suppress(FileNotFoundError):
        stat = os.stat(file.path)
        return file._replace(size=stat.st_size, changed=stat.st_mtime_ns)
    return file


def read_record(folder: str, job: str) -> Optional[Record]:
    """All that is recorded of a job; None if that is nothing."""
    for _ in range(3):  # a file may be packed, and so have another name, just now
        files = list_files(folder, job)
        try:
            contents = [read_file(file.path) for file in files]
        except FileNotFoundError:
            continue
        record = Record(job)
        record.files = files
        for file, content in zip(files, contents):
            record.add_file(file.path, content)
        return record.finish() if files else None
    return None


def sketch_path(folder: str, job: str) -> str:
    """Where the sketch of a job is."""
    return os.path.join(folder, safe_name(job) + ".sketch.gz")


def write_sketch(folder: str, record: Record, mark: str) -> None:
    """Write the sketch of a record that takes long to read; it says of which files it is."""
    if sum(record.taken.values()) > SKETCHED_BYTES:
        line = {"sketch": make_sketch(record), "format": SKETCH_FORMAT}
        line["files"] = name_files(record.files)
        packed = gzip.compress(record_line(line), mtime=0)
        write_file(sketch_path(folder, record.job), packed, mark)


def name_files(files: Sequence[RecordFile]) -> List[Any]:
    """Files and how they are, without their folder, which may be moved."""
    return [[os.path.basename(file.path), file.size, file.changed] for file in files]


def read_sketch(folder: str, job: str, files: Sequence[RecordFile]) -> Optional[Sketch]:
    """The sketch of a job, if there is one and it is of these files as they are (OSError)."""
    try:
        with open(sketch_path(folder, job), "rb") as file:
            data = file.read(MAX_RECORD)
    except FileNotFoundError:
        return None
    try:
        line = json.loads(unpack(data))
        if line["format"] != SKETCH_FORMAT or line["files"] != name_files(files):
            return None
        sketch = Sketch(*line["sketch"])
        curves = {
            key: [Piece(*piece) for piece in pieces]
            for key, pieces in sketch.curves.items()
        }
        maps = {key: NodeMap(*nodes) for key, nodes in sketch.maps.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None  # not written by us, or not to its end
    return sketch._replace(curves=curves, maps=maps)


def read_summary(file: RecordFile) -> Message:
    """A file's summary: a packed one begins with it, and of others it is made."""
    if file.is_packed:
        with open(file.path, "rb", buffering=0) as stream:
            head = stream.read(USUAL_HEAD)
            summary = summary_in(head)
            if summary is None:
                summary = summary_in(head + stream.read(MAX_HEAD))
        if summary:
            return {**BLANK_SUMMARY, "job": file.job, **summary}
    return summarize(parse_record(file.job, read_file(file.path)))


def summary_in(head: bytes) -> Optional[Message]:
    """The summary that a packed file begins with; None if it is not whole, or none is there."""
    with contextlib.suppress(zlib.error):
        first = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, MAX_HEAD)
        for line in read_lines(first):
            if isinstance(line.get("summary"), dict):
                summary: Message = line["summary"]
                return summary
    return None


def read_from(path: str, at: int) -> bytes:
    """The whole lines of a file from there on."""
    with open(path, "rb") as file:
        file.seek(at)
        data = file.read(MAX_RECORD)
    return data[: data.rfind(b"\n") + 1]


class Digest:
    """The summary of a file that grows: only what it has got since the last time is read.

    It holds a thin record, with what a summary rests upon and nothing else.
    """

    def __init__(self, job: str) -> None:
        self.record = Record(job)
        self.size = 0  # bytes that have been read, up to the end of a line

    def read_on(self, file: RecordFile) -> Message:
        """The summary of the file as it is now."""
        data = read_from(file.path, self.size)
        self.size += len(data)
        self.record.add(filter(None, map(thin_line, read_lines(data)))).finish()
        return summarize(self.record)


def thin_line(line: Message) -> Optional[Message]:
    """A line of a record with what a summary rests upon; None without any of it.

    A node that is known in a row has the mean of all, so that a late reading still counts as
    it should.
    """
    if "row" not in line:
        return None if {"gpus", "ranks", "event", "gap"} & set(line) else line
    thin = {"row": line["row"], "step": line.get("step")}
    for key in SUMMARIZED:
        values = line.get(key)
        if isinstance(values, list) and len(values) >= 3:
            mean = values[1]
            nodes = [mean if value is not None else None for value in values[3:]]
            thin[key] = values[:3] + nodes
    return thin


def prune(folder: str, now: float, mark: str) -> int:
    """Remove the oldest records, and pack those that nobody writes to: how many are gone.

    Nothing is removed of a job that is still recorded.
    """
    count = 0
    jobs: Dict[str, List[RecordFile]] = {}
    for file in list_files(folder):
        if not file.is_packed and file.changed / 1e9 < now - IDLE_SECONDS:
            pack(file.path, file.job, mark)
        else:
            jobs.setdefault(file.job, []).append(file)
    ages = {
        job: max(file.changed for file in files) / 1e9 for job, files in jobs.items()
    }
    sizes = {job: size_of_job(folder, files) for job, files in jobs.items()}
    total = sum(sizes.values())
    for job in sorted(jobs, key=lambda job: ages[job]):
        is_old = ages[job] < now - KEEP_SECONDS
        if not is_old and total <= KEEP_BYTES:
            break
        if all(file.is_packed for file in jobs[job]):
            total -= sizes[job]
            count += 1
            paths = [file.path for file in jobs[job]]
            paths += [report_path(folder, job), sketch_path(folder, job)]
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    return count


def size_of_job(folder: str, files: Sequence[RecordFile]) -> int:
    """The bytes that a job's files take, its report and its sketch among them."""
    size = sum(file.size for file in files)
    for path in (report_path, sketch_path):
        with contextlib.suppress(OSError):
            size += os.stat(path(folder, files[0].job)).st_size
    return size


def report_path(folder: str, job: str) -> str:
    """Where the report of a job is."""
    return os.path.join(folder, safe_name(job) + ".html")


class Archive:
    """Reads records for those who must not wait for a disk: on a thread of its own."""

    def __init__(self, folder: str, seconds: float = ARCHIVE_SECONDS) -> None:
        self.folder = folder
        self.seconds = seconds
        self.questions: queue.Queue[Any] = queue.Queue(64)
        # the folder's time, and its files
        self.listed: Tuple[int, List[RecordFile]] = (-1, [])
        self.summaries: Dict[str, Tuple[RecordFile, Message]] = {}
        self.unread = 0  # files of which there is no summary yet
        self.digests: Dict[str, Digest] = {}  # by path, of files that still grow
        self.records: Dict[str, Tuple[List[RecordFile], Optional[Record]]] = {}
        self.sketches: Dict[str, Tuple[List[RecordFile], Sketch]] = {}
        threading.Thread(target=self.run, name="archive", daemon=True).start()

    def run(self) -> None:
        """Answer questions, for ever; as long as there are none, read what is unread."""
        while True:
            try:
                question, answer = self.questions.get(block=not self.unread)
            except queue.Empty:
                self.read_on()
                continue
            try:
                answer.put((question(), None))
            except Exception as error:  # whoever has asked is told
                answer.put((None, error))

    def ask(self, question: Callable[[], Any]) -> Any:
        """What the question returns, or RecordError when the disk does not answer in time."""
        answer: queue.Queue[Any] = queue.Queue(1)
        try:
            self.questions.put_nowait((question, answer))
            result, error = answer.get(timeout=self.seconds)
        except (queue.Full, queue.Empty):
            raise RecordError(
                "%s does not answer: its disk hangs" % self.folder
            ) from None
        if isinstance(error, OSError):
            text = "%s cannot be read: %s" % (self.folder, error.strerror)
            raise RecordError(text) from error
        if error:
            raise error
        return result

    def files(self, jobs: Set[str]) -> List[RecordFile]:
        """The files of some jobs, or of all if none is given."""
        files: List[RecordFile] = self.ask(lambda: self.list_files(jobs))
        return files

    def list_files(self, jobs: Iterable[str] = ()) -> List[RecordFile]:
        """The files of some jobs, or of all.

        As long as no name in the folder has changed, only files that grow are looked at.
        """
        if jobs:
            return [
                file for job in sorted(jobs) for file in list_files(self.folder, job)
            ]
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:
            return []
        before, files = self.listed
        if changed != before or time.time() - changed / 1e9 < SETTLED_SECONDS:
            files = list_files(self.folder)
        else:
            files = [file if file.is_packed else look_again(file) for file in files]
        self.listed = (changed, files)
        return files

    def list(self) -> List[Message]:
        """The summaries of all jobs; RecordError as long as there are too many to read at once."""
        until = time.monotonic() + self.seconds
        while True:
            summaries: Optional[List[Message]] = self.ask(self.read_list)
            if summaries is not None:
                return summaries
            if time.monotonic() > until:
                read = len(self.summaries)
                text = "%s is being read, %d records so far: ask again in a few seconds"
                raise RecordError(text % (self.folder, read))

    def record(self, job: str) -> Optional[Record]:
        """The record of a job."""
        record: Optional[Record] = self.ask(lambda: self.read(job))
        return record

    def sketch(self, job: str) -> Optional[Sketch]:
        """The sketch of a job's record."""
        sketch: Optional[Sketch] = self.ask(lambda: self.read_or_make_sketch(job))
        return sketch

    def read_or_make_sketch(self, job: str) -> Optional[Sketch]:
        """The sketch that is at hand, or else beside the record, or else made of the record."""
        files = list_files(self.folder, job)
        before, sketch = self.sketches.pop(job, ([], None))
        if before != files or sketch is None:
            sketch = read_sketch(self.folder, job, files)
        if sketch is None:
            record = self.read(job)
            if record is None:
                return None
            sketch = make_sketch(record)
        keep_newest(self.sketches, job, (files, sketch))
        return sketch

    def read_list(self) -> Optional[List[Message]]:
        """The summaries of all jobs; None as long as some are not read yet."""
        self.read_summaries(self.list_files())
        return None if self.unread else merge_by_job(self.summaries.values())

    def read_on(self) -> None:
        """Read more of what is unread; what cannot be read is for those who ask."""
        try:
            self.read_summaries(self.list_files())
        except OSError:
            self.unread = 0

    def read_summaries(self, files: Sequence[RecordFile]) -> None:
        """Read what has changed, of files that grew the rest, for READ_SECONDS at most."""
        until = time.monotonic() + READ_SECONDS
        known: Dict[str, Tuple[RecordFile, Message]] = {}
        digests: Dict[str, Digest] = {}
        unread = 0
        for file in files:
            digest = self.find_digest(file)
            if digest:
                digests[file.path] = digest
            before = self.summaries.get(file.path)
            if before and before[0] == file:
                known[file.path] = before
            elif time.monotonic() > until:
                unread += 1
            else:
                with contextlib.suppress(FileNotFoundError):
                    summary = digest.read_on(file) if digest else read_summary(file)
                    known[file.path] = (file, summary)
        self.summaries = known
        self.digests = digests
        self.unread = unread

    def find_digest(self, file: RecordFile) -> Optional[Digest]:
        """The digest of a file that grows; None for one that does not."""
        if file.is_packed or time.time() - file.changed / 1e9 > GROWS_SECONDS:
            return None
        digest = self.digests.get(file.path)
        if digest is None or file.size < digest.size:
            return Digest(file.job)
        return digest

    def read(self, job: str) -> Optional[Record]:
        """The record of a job; the last few are kept, and of a file that grew the rest is read."""
        files = list_files(self.folder, job)
        before, record = self.records.pop(job, ([], None))
        if record and before != files:
            record = self.read_more(record, before, files)
        if not record and files:
            record = read_record(self.folder, job)
        if record:
            keep_newest(self.records, job, (files, record))
        return record

    def read_more(
        self, record: Record, before: List[RecordFile], files: List[RecordFile]
    ) -> Optional[Record]:
        """The record with what its files have got since; None if they are other files."""
        if [file.path for file in before] != [file.path for file in files]:
            return None
        more = record.copy()
        for old, new in zip(before, files):
            if old == new:
                continue
            if new.is_packed or new.size < old.size:
                return None
            more.add_file(new.path, read_from(new.path, record.taken[new.path]))
        return more.finish()


def keep_newest(kept: Dict[str, Any], job: str, value: Any) -> None:
    """Keep something of a job, and of the jobs before the last few nothing."""
    kept[job] = value
    while len(kept) > KEPT_RECORDS:
        del kept[next(iter(kept))]


def merge_by_job(found: Iterable[Tuple[RecordFile, Message]]) -> List[Message]:
    """One summary for each job."""
    jobs: Dict[str, Message] = {}
    for file, summary in found:
        before = jobs.get(file.job)
        jobs[file.job] = merge_summaries(before, summary) if before else summary
    return list(jobs.values())


def list_jobs(folder: str) -> List[Message]:
    """The summaries of all jobs in a folder, the newest first (OSError)."""
    files = list_files(folder)
    jobs = merge_by_job((file, read_summary(file)) for file in files)
    return sorted(jobs, key=lambda job: job["time"] or 0, reverse=True)


# ============================================================================
# Style sheet of the page
# ============================================================================

STYLE_SHEET = """\
/* Colours and the base size */
:root {
  color-scheme: light dark;
  overflow-anchor: none;
  --bg: #fff;
  --fg: #1a1f26;
  --dim: #586371;
  --line: #dde2e8;
  --card: #f4f6f9;
  --cpu: #2563c9;
  --ram: #0b8a70;
  --bad: #b3261e;
  --good: #08705a;
  --tile: #7ba3ea;
  font: clamp(14px, 10.5px + 0.33vw, 24px)/1.5 system-ui;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0f1318;
    --fg: #e4e9ef;
    --dim: #97a3b2;
    --line: #29313b;
    --card: #171c23;
    --cpu: #6ea8ff;
    --ram: #35b79b;
    --bad: #ff8a80;
    --good: #4cc9ad;
    --tile: #3b6cb8;
  }
}

/* Text and links */
* {
  box-sizing: border-box;
}
[hidden] {
  display: none;
}
:focus-visible {
  outline: 2px solid;
}
body {
  margin: 0 auto;
  max-width: 165rem;
  padding: 1rem clamp(0.6rem, 2vw, 2rem);
  background: var(--bg);
  color: var(--fg);
  font-variant-numeric: tabular-nums;
}
a {
  color: var(--cpu);
}
h1 {
  font-size: 1.5rem;
  margin: 0 0 0.6rem;
  line-height: 1.2;
  overflow-wrap: anywhere;
}
header {
  display: flex;
  flex-wrap: wrap;
  gap: 0 1.5rem;
  align-items: baseline;
  justify-content: space-between;
}
header h1 {
  flex: 1 1 auto;
}
header p {
  margin: 0 0 0.6rem;
  color: var(--dim);
}
nav {
  margin: 0 0 0.8rem;
}
nav a {
  margin-right: 1rem;
}
caption,
h2 {
  text-align: left;
  font: 600 1.05rem system-ui;
}
small,
footer,
dt,
label,
thead th,
.axis {
  color: var(--dim);
  font-size: 0.85rem;
}
.finished {
  color: var(--dim);
}
.fine {
  color: var(--good);
}
.u {
  color: var(--dim);
}
.bad {
  color: var(--bad);
}
.lost,
.alert,
.problem,
.died {
  font-weight: 700;
}

/* The notice of a page that is not renewed */
.old {
  position: sticky;
  top: 0;
  z-index: 2;
  margin: 0 0 0.6rem;
  padding: 0.4rem 0.8rem;
  background: var(--bad);
  color: var(--bg);
  font-weight: 600;
}
.stale {
  filter: grayscale(1);
}

/* The cards with what matters */
dl,
.graphs {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: 0.6rem;
  margin: 0;
}
dl {
  margin-top: 1.4rem;
}
dl div,
figure,
pre {
  background: var(--card);
  padding: 0.5rem 0.8rem;
  margin: 0;
  min-width: 0;
  overflow: auto;
}
dd {
  margin: 0;
  font-size: 1.35rem;
}
label,
dd small {
  display: grid;
}

/* The form */
form {
  display: flex;
  flex-wrap: wrap;
  gap: 0.5rem 0.8rem;
  margin: 1rem 0;
}
label {
  flex: 0 1 10rem;
  min-width: 7rem;
}
form button {
  align-self: end;
  padding: 0.25rem 0.8rem;
  font: inherit;
}
input,
select {
  font: inherit;
  color: var(--fg);
  background: var(--bg);
  border: 1px solid var(--dim);
  padding: 0.2rem 0.5rem;
  min-width: 0;
}

/* Tables */
section {
  margin: 0 0 1.4rem;
  min-width: 0;
}
.scroll {
  overflow-x: auto;
  /* a shadow at an edge tells that there is more behind it */
  background:
    linear-gradient(to right, var(--bg) 1rem, transparent) left / 2.5rem 100% local,
    linear-gradient(to left, var(--bg) 1rem, transparent) right / 2.5rem 100% local,
    linear-gradient(to right, var(--line), transparent) left / 1rem 100%,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100%;
  background-repeat: no-repeat;
}
#jobs .w {
  width: 24%;
}
#jobs td:not(.n) {
  white-space: normal;
}
.t {
  min-width: 10.5rem;
  overflow-wrap: anywhere;
}
.g {
  min-width: 7rem;
}
#ended .bar {
  display: none;
}
@media (min-width: 1151px) {
  /* as wide as they ever need to be, so that columns stay where they are */
  #jobs [data-what="CPU"] {
    min-width: 5rem;
  }
  #jobs [data-what="Time"],
  #jobs [data-what="Memory"] {
    min-width: 9.4rem;
  }
}
@media (max-width: 1150px) {
  /* a row is a card: what is said in it matters most, and must not be outside of the screen */
  .cards thead {
    display: none;
  }
  .cards tr {
    display: flex;
    flex-wrap: wrap;
    padding: 0.3rem 0;
    border-bottom: 1px solid var(--line);
  }
  .cards td,
  .cards th {
    border: 0;
    min-width: 5.5rem;
    max-width: 100%;
    white-space: normal;
  }
  .cards caption {
    display: block;
  }
  .cards .w,
  #jobs .w {
    width: auto;
  }
  .cards .u {
    display: none;
  }
  .cards [data-what]::before {
    content: attr(data-what) " ";
    color: var(--dim);
  }
}
@media (max-width: 700px) {
  .cards td,
  .cards th {
    min-width: 0;
  }
  .cards td.w,
  #jobs td.w {
    width: 100%;
  }
  /* whose row it is stays in sight */
  tbody th {
    position: sticky;
    left: 0;
    z-index: 1;
    min-width: 4.5rem;
    max-width: 8rem;
    background: var(--bg);
  }
  tbody .job {
    max-width: none;
  }
}
@media (pointer: coarse) {
  td a,
  th a,
  nav a {
    display: inline-block;
    padding: 0.4rem 0;
  }
}
table {
  border-collapse: collapse;
  width: 100%;
}
th,
td {
  text-align: left;
  padding: 0.18rem 0.55rem;
  border-bottom: 1px solid var(--line);
  font-weight: 400;
  white-space: nowrap;
  position: relative;
  z-index: 0;
}
thead a {
  color: inherit;
}
[aria-sort] {
  font-weight: 700;
}
[aria-sort="ascending"] a::after {
  content: "\\2191" / "";
}
[aria-sort="descending"] a::after {
  content: "\\2193" / "";
}
.job {
  background: var(--card);
}
.job div {
  position: sticky;
  left: 0.55rem;
  width: fit-content;
  max-width: calc(100vw - 3rem);
  white-space: normal;
}
.n {
  text-align: right;
}
.w {
  white-space: normal;
  overflow-wrap: anywhere;
  min-width: 9.6rem;
}

/* The bar below a percentage */
.bar {
  position: absolute;
  bottom: 0;
  left: 2px;
  z-index: -1;
  width: calc(100% - 4px);
  height: 4px;
  background: var(--line);
  fill: var(--cpu);
}
.bar.ram,
.bar.job_ram {
  fill: var(--ram);
}
@media (prefers-reduced-motion: no-preference) {
  .bar rect {
    transition: width 0.3s;
  }
}

/* Curves: small ones in a table, large ones on the page of a node */
.line {
  width: 8rem;
  height: 1.3rem;
  overflow: visible;
  vertical-align: middle;
  border-bottom: 1px solid var(--line);
}
path {
  fill: none;
  stroke: var(--cpu);
  stroke-width: 1.5;
  stroke-linecap: round;
  vector-effect: non-scaling-stroke;
}
path.ram,
path.job_ram,
path.job_mem {
  stroke: var(--ram);
}
td path.ram {
  stroke-dasharray: 3 2;
}
path.at {
  stroke: var(--fg);
  stroke-width: 1;
}
.graphs {
  grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  margin: 0 0 1rem;
}
.plot {
  display: grid;
  grid-template-columns: auto 1fr;
  gap: 0 0.5rem;
}
figure .line {
  width: 100%;
  height: 6rem;
  background: linear-gradient(var(--line), var(--line)) 0 50% / 100% 1px no-repeat;
  border-top: 1px solid var(--line);
}
figure .line:hover {
  cursor: crosshair;
}
figcaption output {
  float: right;
}
.axis {
  display: flex;
  justify-content: space-between;
}
.axis.y {
  flex-direction: column;
  text-align: right;
}
.axis.x {
  grid-column: 2;
}
@media (min-width: 700px) {
  .large {
    grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr));
  }
  .large .line {
    height: 9rem;
  }
}

/* The strip of a node's CPUs */
.strip {
  width: 100%;
  min-width: 12rem;
  height: 1rem;
  vertical-align: middle;
}
.strip path {
  stroke-linecap: butt;
  stroke-width: 0.9rem;
}
.strip .idle {
  stroke: var(--tile);
  opacity: 0.35;
}
.strip .other {
  stroke: var(--line);
}

/* The map: a tile is filled up to --v and shows its label when it is pointed at */
.map {
  position: relative;
  display: grid;
  gap: 2px;
  margin-top: 0.2rem;
  grid-template-columns: repeat(auto-fill, minmax(1.15rem, 1fr));
}
.map a {
  height: 1.15rem;
  text-align: center;
  font: 700 0.8rem/1.15rem system-ui;
  text-decoration: none;
  color: var(--fg);
  background: linear-gradient(to top, var(--tile) var(--v), var(--line) 0);
}
.map a:hover::after,
.map a:focus::after {
  content: attr(aria-label);
  position: absolute;
  bottom: 100%;
  left: 0;
  right: 0;
  font: 1rem/1.6 system-ui;
  text-align: left;
  background: var(--bg);
}
.map .al {
  outline: 2px solid var(--bad);
}
.map .al::before {
  content: "!";
}

/* Wide screens: what left and what happened beside the table of nodes */
@media (min-width: 1800px) {
  main {
    display: grid;
    gap: 0 2.5rem;
    grid-template-columns: minmax(0, 1fr) 34rem;
    grid-auto-flow: row dense;
  }
  main > * {
    grid-column: 1 / -1;
  }
  #nodes,
  #ended {
    grid-column: 1;
  }
  aside {
    grid-column: 2;
    grid-row: span 2;
  }
  /* rows are cards, as on a phone */
  aside thead {
    display: none;
  }
  aside tr {
    display: flex;
    flex-wrap: wrap;
    padding: 0.2rem 0;
    border-bottom: 1px solid var(--line);
  }
  aside td,
  aside th {
    border: 0;
    min-width: 0;
  }
  aside td.w {
    width: 100%;
  }
}
"""
TILE_STEPS = 20  # how finely a tile of the map shows its percentage
TILE_LEVELS = "".join(
    ".v%d { --v: %d%%; }\n" % (step, 100 // TILE_STEPS * step)
    for step in range(TILE_STEPS + 1)
)
STYLE = STYLE_SHEET + TILE_LEVELS

# ============================================================================
# Script of the page
# ============================================================================

SCRIPT = """\
"use strict";
// Every 2 s: fetch this very page, and change in place what differs.

const main = document.querySelector("main");
const notice = document.getElementById("notice");
let answered = new Date();
let asked = 0;
let open = 0;

function morphAttributes(old, wanted) {
  for (const {name} of [...old.attributes]) {
    if (!wanted.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const {name, value} of wanted.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}
function morphChild(parent, index, wanted) {
  const at = parent.childNodes[index] || null;
  const twin = wanted.id ? document.getElementById(wanted.id) : at;
  const isTwin = twin && twin.parentNode === parent
    && twin.nodeName === wanted.nodeName && twin.id === wanted.id;
  if (!isTwin) {
    parent.insertBefore(wanted, at);
    return;
  }
  // an element with an id is kept wherever it goes
  if (twin !== at) parent.insertBefore(twin, at);
  if (wanted.nodeType === Node.ELEMENT_NODE) morph(twin, wanted);
  else if (twin.data !== wanted.data) twin.data = wanted.data;
}
function morph(old, wanted) {
  morphAttributes(old, wanted);
  const ids = new Set([...wanted.children].map(child => child.id));
  for (const child of [...old.children]) {
    if (!ids.has(child.id)) child.remove();
  }
  const nodes = [...wanted.childNodes];
  nodes.forEach((node, index) => morphChild(old, index, node));
  while (old.childNodes.length > nodes.length) old.lastChild.remove();
}
function show(page) {
  const focus = document.activeElement;
  // what is in sight stays where it is, whatever comes above it
  const sections = [...main.querySelectorAll("header, dl, form, section")];
  const seen = sections.find(each => each.getBoundingClientRect().bottom > 0) || main;
  const top = seen.getBoundingClientRect().top;
  const selection = getSelection();
  const {isCollapsed, anchorNode, anchorOffset, focusNode, focusOffset} = selection;
  morph(main, page.querySelector("main"));
  scrollBy(0, seen.isConnected ? seen.getBoundingClientRect().top - top : 0);
  if (focus !== document.activeElement) focus.focus({preventScroll: true});
  try {
    const ends = [anchorNode, anchorOffset, focusNode, focusOffset];
    if (!isCollapsed) selection.setBaseAndExtent(...ends);
  } catch (error) { /* that text is gone */ }
  tell();
  document.title = page.title;
  answered = new Date();
  notice.hidden = true;
}
async function update() {
  const mine = ++asked;
  const signal = AbortSignal.timeout(5000);
  try {
    open++;
    const answer = await fetch(location, {headers: {Accept: "text/html"}, signal});
    const text = await answer.text();
    if (mine !== asked) return;  // another one was asked for meanwhile
    const page = new DOMParser().parseFromString(text, "text/html");
    if (!answer.ok) throw RangeError(page.body.textContent);
    show(page);
  } catch (error) {
    const since = answered.toTimeString().slice(0, 8);
    const reason = error instanceof RangeError ? error.message : "";
    notice.textContent = `No answer since ${since}, asking every 2 s. ${reason}`;
    main.classList.add("stale");
    notice.hidden = false;
  } finally {
    open--;
  }
}
function go(how, url) {
  history[how](null, "", url);
  update();
}
addEventListener("popstate", update);
document.addEventListener("visibilitychange", () => document.hidden || update());
// A value of a graph: under the pointer, or where the arrow keys have moved to.
let pointed = null;

function tell() {
  const figure = pointed && document.getElementById(pointed.id);
  if (!figure) return;
  const values = figure.dataset.values.split(" ");
  const last = values.length - 1;
  const at = pointed.at = Math.max(0, Math.min(last, pointed.at));
  const value = values[at];
  const time = new Date(1000 * (figure.dataset.end - (last - at) * figure.dataset.step));
  const unit = figure.dataset.unit;
  const words = value === "" ? "unknown" : (value / figure.dataset.size).toFixed(1) + unit;
  figure.querySelector("output").textContent = time.toTimeString().slice(0, 8) + " " + words;
  const line = figure.querySelector(".line");
  const mark = line.querySelector(".at") || line.appendChild(line.firstChild.cloneNode());
  mark.setAttribute("class", "at");
  mark.setAttribute("d", `M${at} 0v100`);
}
document.addEventListener("pointermove", event => {
  const figure = event.target.closest("figure");
  const line = figure && figure.querySelector(".line");
  if (!line) return;
  const box = line.getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  const last = figure.dataset.values.split(" ").length - 1;
  pointed = {id: figure.id, at: Math.round(share * last)};
  tell();
});
document.addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const figure = event.target.closest("figure");
  if (!step || !figure) return;
  const last = figure.dataset.values.split(" ").length;
  if (!pointed || pointed.id !== figure.id) pointed = {id: figure.id, at: last};
  pointed.at += step;
  tell();
  event.preventDefault();
});
document.addEventListener("input", event => {
  const fields = [...new FormData(event.target.form)];
  const filled = fields.filter(([key, value]) => value);
  go("replaceState", "./?" + new URLSearchParams(filled));
});
document.addEventListener("click", event => {
  const link = event.target.closest("a[href^='./?']");
  const isAside = event.ctrlKey || event.metaKey || event.shiftKey;
  if (!link || isAside) return;
  go("pushState", link.href);
  event.preventDefault();
});
if (location.search.includes("token=")) history.replaceState(null, "", location.pathname);
setInterval(() => document.hidden || open || update(), 2000);
"""

# ============================================================================
# Markup of the page: every template, and the one way to put values into them
# ============================================================================
#
# Every address in it is relative to the overview, by the base of PAGE_HTML, and none begins
# with a slash: so the page works under whatever prefix a proxy shows it.

PAGE_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{title} - Cluster Sentinel</title>
  <base href="{root}">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <link rel="icon" href="data:,">
  <style>{style}</style>
  <noscript><meta http-equiv="refresh" content="2"></noscript>
</head>
<body>
  <p id="notice" class="old" role="status" hidden></p>
  <main>
    <header>
      <h1>{title}</h1>
      <p>{now}, {state}</p>
    </header>{notice}
    {parts}
    <footer>
      <a href="./jobs">Jobs of the past</a>
      <a href="./nodes.txt">Text</a>
      <a href="./nodes.csv">CSV</a>
      <a href="./api/nodes">JSON</a>
      <a href="./metrics">Prometheus</a>
      \u00b7 {cost}
    </footer>
  </main>
  <script>{script}</script>
</body>
</html>
"""
NOTICE_HTML = """
    <p><strong>{text}</strong></p>"""
PLACES_HTML = """
    <nav aria-label="Pages"><a href="./">All jobs and nodes</a>{more}</nav>"""
RECORD_LINK_HTML = """
      <a href="{href}">This job from its start until now</a>"""
JOB_LINK_HTML = """
      <a href="{href}">Job {job} {words}</a>"""
EMPTY_HTML = """
    <section>
      <p>No agents yet: run on the node that you want to see</p>
      <pre>python3 agent.py --host {host} --port {port}{secret}</pre>
      <p>or on every node of a job</p>
      <pre>SENTINEL_HOST={host} SENTINEL_PORT={port} sbatch run_agent.slurm</pre>
    </section>"""

WATCHING_HTML = """
    <section>
      <p>None of your jobs is here yet. One that runs appears after a few seconds, one that starts
        within half a minute of its start.</p>
      <p>If one of yours runs and is not here, the lines of the log that begin with
        <code>agent:</code> say what keeps it away.</p>
    </section>"""
NO_MATCH_HTML = """
    <section>
      <p>No node matches. <a href="./">Show all</a></p>
    </section>"""

CARDS_HTML = """
    <dl>{cards}
    </dl>"""
CARD_HTML = """
      <div>
        <dt>{label}</dt>
        <dd>{figure} <small>{remark}</small></dd>
      </div>"""

FORM_HTML = """
    <form action="./" role="search">
      <label>Filter <input type="search" name="q" value="{words}"></label>{selects}
      <input type="hidden" name="sort" value="{sort}">
      <noscript><button type="submit">Show</button></noscript>
    </form>"""
SELECT_HTML = """
      <label>{label}
        <select name="{key}">
          <option value="">{first}</option>{options}
        </select>
      </label>"""
OPTION_HTML = """
          <option>{value}</option>"""
CHOSEN_OPTION_HTML = """
          <option selected>{value}</option>"""

MAP_HTML = """
    <section>
      <h2>{label} of every node</h2>
      <div class="map">{tiles}
      </div>
    </section>"""
TILE_HTML = """
        <a id="t{slot}" class="{kind}" href="{href}" aria-label="{label}"></a>"""

TABLE_HTML = """
    <section id="{name}" class="{kind}" tabindex="0" aria-label="{caption}">
      <table>
        <caption>{caption}</caption>
        <thead>
          <tr>{headings}</tr>
        </thead>{bodies}
      </table>{end}
    </section>"""
HEADING_HTML = '<th scope="col" class="{align}">{label}</th>'
SORTED_HEADING_HTML = '<th scope="col" class="{align}" aria-sort="{order}">{label}</th>'
BODY_HTML = """
        <tbody id="{id}">{heading}{rows}
        </tbody>"""
BODY_HEADING_HTML = """
          <tr><th class="job" scope="rowgroup" colspan="{span}"><div>{heading}</div></th></tr>"""
ROW_HTML = """
          <tr id="{id}">{cells}</tr>"""
CELL_HTML = '<td class="{kind}">{content}</td>'
CELL_START = "<td"
NAMED_CELL_START_HTML = '<td data-what="{what}"'
CURVES_CELL_HTML = "<td>{curves}</td>"
BAD_CELL_HTML = '<td><b class="bad">{words}</b></td>'
LINK_CELL_HTML = '<td><a href="{href}">{text}</a></td>'
JOB_NAME_CELL_HTML = '<td class="t"><a href="{href}">{text}</a></td>'
NODE_CELL_HTML = '<th scope="row" class="w"><a href="{href}">{name}</a>{marks}</th>'
NO_NODE_CELL_HTML = '<th scope="row" class="w">-</th>'
MARK_HTML = '<b class="bad"> \u26a0\xa0{mark}</b>'
PERCENT_CELL_HTML = (
    '<td class="n">{text}'
    '<svg class="bar {key}" viewBox="0 0 100 1" aria-hidden="true"'
    ' preserveAspectRatio="none"><rect width="{width}" height="1"/></svg></td>'
)
JOB_HEADING_HTML = '<b>Job <a href="{href}">{job}</a></b> {words}'
NO_JOB_HEADING_HTML = "<b>No job</b> "
LINK_HTML = '<a href="{href}">{text}</a>'
PAGES_HTML = """
      <nav aria-label="Pages of the table">Pages:{links}
      </nav>"""
PAGE_LINK_HTML = """
        <a href="{href}">{number}</a>"""
THIS_PAGE_LINK_HTML = """
        <a href="{href}" aria-current="page">{number}</a>"""

CURVES_HTML = (
    '<svg class="line" viewBox="0 0 {last} 100" preserveAspectRatio="none"'
    ' aria-hidden="true">{paths}</svg>'
)
PATH_HTML = '<path class="{key}" d="{path}"/>'
STRIP_CELL_HTML = (
    '<td class="w"><svg class="strip" viewBox="0 0 {last} 2" preserveAspectRatio="none"'
    ' role="img" aria-label="{label}">{paths}</svg></td>'
)
GRAPHS_HTML = """
    <div class="graphs {kind}">{graphs}
    </div>"""
GRAPH_HTML = """
      <figure id="{id}" tabindex="0" aria-label="{label}" data-values="{values}"
       data-end="{end}" data-step="{step}" data-size="{size}" data-unit="{unit}">
        <figcaption>{label} <b>{now}</b> <output></output></figcaption>
        <div class="plot">
          <div class="axis y"><span>{top}</span><span>{half}</span><span>0</span></div>
          {curve}
          <div class="axis x">
            <span>{from_time}</span><span>{mid_time}</span><span>{to_time}</span>
          </div>
        </div>
      </figure>"""
ASIDE_HTML = """
    <aside>{tables}
    </aside>"""


# Most texts have none of these, and html.escape() takes its time
find_special: Callable[[Any], Any] = re.compile("[&<>\"']").search


class Html(str):
    """Markup: what ``fill`` made.  Any other text is escaped on its way in."""


def as_markup(value: object) -> str:
    """A value as markup: a list stands for its items, None for nothing."""
    if isinstance(value, str):
        is_plain = isinstance(value, Html) or not find_special(value)
        return value if is_plain else html.escape(value)
    if isinstance(value, list):
        return "".join(map(as_markup, value))
    return "" if value is None else as_markup(str(value))


def fill(template: str, *values: object, **named: object) -> Html:
    """Put values into the {} and the {name} of a template; what is no markup is escaped.

    A page has thousands of them: what needs no escape is left as it is.
    """
    for name, value in named.items():
        kind = type(value)
        is_plain = (
            kind is Html or kind is int or kind is str and not find_special(value)
        )
        if not is_plain:
            named[name] = as_markup(value)
    if values:
        return Html(template.format(*map(as_markup, values), **named))
    return Html(template.format_map(named))


# ============================================================================
# Readings: what a value is called, and how people, pages and sorting see it
# ============================================================================

UNITS = {metric.key: metric.unit for metric in METRICS}
UNITS.update(age="s", ran="s", limit="s")  # of columns that are no metrics
UNITS.update(
    mem="B", peak="B", read="B/s", write="B/s", read_total="B", write_total="B"
)
UNITS.update(mem_used="B", mem_total="B", power="W", power_limit="W", temp="\u00b0C")
SCALES = {  # larger units of a unit, the smallest first
    "s": (("min", 60), ("h", 3600), ("d", 86400)),
    # as Slurm counts: --mem=74G is 74 GB here, and 74 * 2**30 bytes
    "B": (("KB", 2**10), ("MB", 2**20), ("GB", 2**30), ("TB", 2**40)),
}
LARGER_UNITS = {  # of a reading: how many of its own units each is
    key: [
        (size, unit + whole[len(base) :])
        for base, units in SCALES.items()
        if whole.partition("/")[0] == base
        for unit, size in units
    ]
    for key, whole in UNITS.items()
}
FRACTIONS = ("load1",)  # numbers without a unit that are no counts
SMALL = ("nfs_rtt",)  # numbers that are thousandths of their unit
SMALL_TOP = 0.01  # the least upper end of their graphs
MAX_DIGITS = 8  # of a number; a longer one is no machine's, and is written as 1e+99


def render_value(key: str, value: Any) -> str:
    """A reading for people: fixed digits and a unit; a dash if it is unknown."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if key == "time":
        return time.strftime("%T", time.localtime(value))
    size, unit = scale_of(key, value)
    digits = 1 if unit or key in FRACTIONS else 0
    if key in SMALL and size == 1:
        digits = 4
    number = "%.*f" % (digits, value / size)
    if len(number) > MAX_DIGITS:
        number = "%.0e" % value
    return ("%s %s" % (number, unit)).rstrip()


def scale_of(key: str, value: float) -> Tuple[int, str]:
    """The unit that suits a reading, and how many of the reading's own units it is."""
    suits = (1, UNITS.get(key, ""))
    for larger in LARGER_UNITS.get(key, ()):
        if abs(value) < larger[0]:
            break
        suits = larger
    return suits


def name_of(row: Message) -> str:
    """What to call the node of a row: its name, or HOST:PORT."""
    name: str = row["node"] or row["address"] or ""
    if name.startswith("('"):
        return re.sub(r"\('(.*)', (\d+)\)", r"\1:\2", name)
    return name


def path_of(row: Message) -> str:
    """Where the page of the row's node is, seen from the overview."""
    return named_path("node", name_of(row))


@functools.lru_cache(maxsize=4096)
def named_path(folder: str, name: str) -> str:
    """Where the page of that name in a folder is, seen from the overview.

    Browsers take . and .. for folders, also when they are escaped, and many a proxy undoes
    the escape of a slash: such a name is not in the path but in the query.
    """
    if name in (".", "..") or "/" in name:
        return "./%s/?name=%s" % (folder, urllib.parse.quote(name, ""))
    return "./%s/%s" % (folder, urllib.parse.quote(name, ""))


def natural(value: Any) -> Any:
    """A key to sort by: c2 comes before c10."""
    return natural_text(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=4096)
def natural_text(text: str) -> str:
    """A text with its numbers so long that they sort as numbers."""
    return re.sub(r"\d+", lambda digits: digits.group().zfill(20), text.lower())


def mean(rows: Sequence[Message], key: str) -> float:
    """The mean of a reading that every row has; rows must not be empty."""
    total: float = sum(row[key] for row in rows)
    return total / len(rows)


# ============================================================================
# Selection: which nodes a query asks for, who left, and what matters
# ============================================================================

Query = Dict[str, str]  # the fields behind the ? of an address
IDLE = 10.0  # percent: a node below is idle ...
BUSY = 50.0  # percent: ... if the rest of its job is above
SEARCHED_JOB = ("job", "raw", "job_name", "user", "state", "text")  # likewise, of a job
SEARCHED = (*TEXTS, "address", "marks")  # where the words of a filter are looked for


def select(view: Snapshot, query: Query) -> List[Message]:
    """Copies of the rows that a query asks for, in its order; what is unknown comes last.

    Each has marks: the rules that fire, and "idle" when the rest of its job works without it.
    """
    jobs: Dict[Optional[str], List[Message]] = {}
    for node in view.nodes:
        jobs.setdefault(node["job"], []).append(with_marks(node))
    words = query.get("q", "").lower().split()
    found: List[Message] = []
    for job, rows in jobs.items():
        if job:
            mark_idle(rows)
        found += rows
    if words or query.get("job") or query.get("user"):
        found = [row for row in found if is_asked_for(row, query, words)]
    return in_order(found, query.get("sort") or "node")


def with_marks(node: Message) -> Message:
    """A copy of a node's row with its load, in percent, and the rules that fire as marks."""
    rules = (node["alerts"] or "").split()
    row = dict(node)
    row["load"] = node["cpu"] if node["job_cpu"] is None else node["job_cpu"]
    row["marks"] = [rule.replace("_for_", " for ") for rule in rules]
    return row


def mark_idle(rows: List[Message]) -> None:
    """Mark the nodes of one job that idle while the others work."""
    for place in idle_places(rows):
        rows[place]["marks"].append("idle")


def idle_places(nodes: List[Message]) -> List[int]:
    """Which nodes of one job idle while the others work, by their places in the list."""
    loads = [
        node["cpu"] if node["job_cpu"] is None else node["job_cpu"] for node in nodes
    ]
    total = sum(loads)
    others = len(loads) - 1
    return [
        place
        for place, load in enumerate(loads)
        if load < IDLE and total - load > BUSY * others
    ]


def is_asked_for(row: Message, query: Query, words: List[str]) -> bool:
    """Whether a row is of the query's job and user, and has every word somewhere."""
    for key in ("job", "user"):
        if query.get(key) and query[key] != row[key]:
            return False
    if not words:
        return True
    text = "\n".join(str(row[key] or "") for key in SEARCHED).lower()
    return all(word in text for word in words)


def in_order(rows: List[Message], sort: str) -> List[Message]:
    """Rows by a key, or by -key from the largest on; those that do not have it come last."""
    key = sort.lstrip("-")
    known = [row for row in rows if row.get(key) is not None]
    unknown = [row for row in rows if row.get(key) is None]
    known.sort(key=lambda row: natural(row[key]), reverse=sort.startswith("-"))
    return known + unknown


def is_more_gone(view: Snapshot) -> bool:
    """Whether more nodes left within GONE_SECONDS than there are events of."""
    return view.missed > view.time - GONE_SECONDS


def gone(view: Snapshot, kind: str) -> List[Message]:
    """The nodes that left like this within GONE_SECONDS and are not back, the newest first."""
    last_events: Dict[Tuple[str, Optional[str]], Message] = {}
    for event in view.left:
        is_recent = event["time"] > view.time - GONE_SECONDS
        if is_recent and event["kind"] in ("finished", "lost"):
            last_events[name_of(event), event["job"]] = event
    if last_events:
        for node in view.nodes:
            last_events.pop((name_of(node), node["job"]), None)
    left = [
        event
        for event in view.left
        if event["kind"] == kind
        and last_events.get((name_of(event), event["job"])) is event
    ]
    return left[::-1]


# ============================================================================
# Jobs: what Slurm says of them, in the order and the words of the page
# ============================================================================

# Verdicts that need the job's user, the worst first
NEEDS = ("died", "problem", "advice")
BAD_ENDS = (
    "FAILED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
)
JUDGED_SECONDS = 20.0  # after its end: who has watched a job has judged it by then
SHOWN_GPUS = 8  # of a job, each by itself
# A process is odd when a reading is further from the median of the job than so many times the
# median of these distances, and than so much
ODD_SPREADS = 5.0
ODD_CPU = 20.0  # % of a core
ODD_BYTES = 64.0 * 2**20


def all_jobs(view: Snapshot) -> List[Message]:
    """The jobs that Slurm says something of, and those that only agents tell of."""
    jobs = view.jobs
    known = {name for job in jobs for name in (job["job"], job["raw"])}
    nodes: Dict[str, List[Message]] = {}
    for node in view.nodes:
        if node["job"] and node["job"] not in known:
            nodes.setdefault(node["job"], []).append(node)
    return jobs + [job_of_nodes(name, rows) for name, rows in nodes.items()]


def job_of_nodes(name: str, rows: List[Message]) -> Message:
    """A job that only agents tell of: what they do not know is None."""
    job: Message = dict.fromkeys(JOB_KEYS)
    job.update(job=name, raw=name, state="RUNNING", nodes=len(rows))
    for key in ("job_name", "user"):
        job[key] = rows[0][key]
    left = rows[0]["job_time_left"]
    limit = rows[0]["job_time_limit"]
    if left is not None and limit is not None:
        job.update(limit=limit, start=rows[0]["since"] - (limit - left))
    return job


def jobs_in_order(view: Snapshot) -> List[Message]:
    """The jobs that Slurm says something of, those that have not ended first, by their ids."""
    return sorted(
        view.jobs,
        key=lambda job: (job["state"] in ENDED_STATES, natural(job["job"])),
    )


def job_rows(view: Snapshot) -> List[Message]:
    """A row for each job, the tasks of an array in one; what needs its user comes first."""
    if "jobs" not in view.made:
        view.made["jobs"] = make_job_rows(view)
    rows: List[Message] = view.made["jobs"]
    return rows


def make_job_rows(view: Snapshot) -> List[Message]:
    """The rows of ``job_rows``."""
    arrays: Dict[Any, List[Message]] = {}
    for job in all_jobs(view):
        arrays.setdefault(job["array"] or job["raw"], []).append(job)
    nodes: Dict[str, List[Message]] = {}
    for node in view.nodes:
        if node["job"]:
            nodes.setdefault(node["job"], []).append(node)
    rows = []
    for tasks in arrays.values():
        theirs = []
        for task in tasks:
            for name in {task["job"], task["raw"]}:
                theirs += nodes.get(name, [])
        rows.append(job_row(view, tasks, theirs))
    return sorted(rows, key=job_order)


def job_order(row: Message) -> Tuple[Any, ...]:
    """A key to sort jobs by: the worst verdict; running, pending, the newest end; then the id."""
    severity = row["severity"]
    need = NEEDS.index(severity) if severity in NEEDS else len(NEEDS)
    states = ("running", "pending", "ended")
    ended = -(row["end"] or 0) if row["phase"] == "ended" else 0
    return need, states.index(row["phase"]), ended, natural(row["job"])


def job_row(view: Snapshot, tasks: List[Message], nodes: List[Message]) -> Message:
    """The row of a job, or of all tasks of an array, with what its nodes use.

    To what is known of the first task come: severity and text, which are its verdict or what
    Slurm says; phase; clock, cpu, memory and gpu with what is used of what was asked for, as
    text, and clock_share and memory_share in percent.
    """
    job = tasks[0]
    severity, text = judge_job(view, tasks)
    trouble = trouble_of_nodes(nodes, len(tasks) == 1)
    if trouble and severity not in NEEDS:  # what is judged stays what it is
        severity, text = severity or trouble[0], trouble[1]
    row = dict(job, slot=job["raw"], severity=severity, text=text, tasks=len(tasks))
    row["phase"] = phase_of(tasks)
    ran = run_time(job, view.time)
    row.update(clock=None, clock_share=None)
    if len(tasks) > 1:
        row.update(job=job["array"], state=count_tasks(tasks), nodes=None)
    elif ran is not None:
        row["clock"] = render_clock(ran)
        if job["limit"]:
            limit = render_clock(job["limit"])
            if limit.endswith(" h"):  # one unit is enough for both
                row["clock"] = row["clock"].replace(" h", "")
            row["clock"] += " of " + limit
            row["clock_share"] = 100 * ran / job["limit"]
    row["cpu"] = mean_of_known(nodes, "job_cpu", "cpu")
    row.update(memory_of_job(nodes))
    row["gpu"] = render_gpus(view, nodes)
    return row


def trouble_of_nodes(
    nodes: List[Message], is_one_job: bool
) -> Optional[Tuple[str, str]]:
    """(severity, what) of a job's nodes: rules that fire, one that idles; None if all is well."""
    alerts = [node for node in nodes if node["alerts"]]
    if len(alerts) == 1:
        words = ", ".join(words_of_alerts(alerts[0]))
        return "problem", "%s: %s" % (name_of(alerts[0]), words)
    if alerts:
        return "problem", "alerts on %d nodes" % len(alerts)
    idle = idle_places(nodes) if is_one_job and len(nodes) > 1 else []
    if len(idle) == 1:
        return "advice", "%s idle" % name_of(nodes[idle[0]])
    return ("advice", "%d nodes idle" % len(idle)) if idle else None


def words_of_alerts(node: Message) -> List[str]:
    """What the rules that fire on a node say of it."""
    words = []
    for text in node["alerts"].split():
        with contextlib.suppress(argparse.ArgumentTypeError):
            rule = parse_rule(text.replace("_for_", " for "))
            if isinstance(rule, Rule):
                text = alert_words(rule, node.get(rule.metric))
        words.append(text)
    return words


# What squeue folds into one line, tasks of an array that wait: 4711_[4-9,12-30:6%2].  A long
# id is cut, also here.
FOLDED_TASKS = re.compile(r"_\[([\d,:-]+)(?:%\d+)?(\]?)")
TASK_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def count_tasks(tasks: List[Message]) -> str:
    """How many tasks of an array are in which state: 12 running, 150 pending, 1 failed."""
    counts = {"RUNNING": 0, "PENDING": 0}  # these come first
    cut = set()
    for task in tasks:
        state = task["state"] or "UNKNOWN"
        count, is_whole = tasks_in(task["job"] or "")
        counts[state] = counts.get(state, 0) + count
        if not is_whole:
            cut.add(state)
    words = []
    for state, count in counts.items():
        if count:
            more = "+" if state in cut else ""
            word = "done" if state == "COMPLETED" else state.lower().replace("_", " ")
            words.append("%d%s %s" % (count, more, word))
    return ", ".join(words)


def tasks_in(job: str) -> Tuple[int, bool]:
    """How many tasks an id stands for, at least; and whether it is the whole id."""
    folded = FOLDED_TASKS.search(job)
    if not folded:
        return 1, True
    is_whole = bool(folded.group(2))
    ranges = folded.group(1).split(",")
    if not is_whole:
        ranges.pop()  # it may be half of one
    count = 0
    for text in ranges:
        found = TASK_RANGE.fullmatch(text)
        if found:
            first, last, step = (int(number or 0) for number in found.groups())
            count += max(0, last - first) // (step or 1) + 1
    return max(1, count), is_whole


def verdicts_of(view: Snapshot) -> Dict[str, List[Message]]:
    """What is judged of each job, read once for a copy of the table."""
    if "verdicts" not in view.made:
        view.made["verdicts"] = dict(deaths_of(view), **view.verdicts)
    verdicts: Dict[str, List[Message]] = view.made["verdicts"]
    return verdicts


def deaths_of(view: Snapshot) -> Dict[str, List[Message]]:
    """Why jobs died of which Slurm alone has told: in the words of any other verdict."""
    deaths = {}
    for job in view.jobs:
        ended = job["end"] or view.time
        if job["state"] in BAD_ENDS and view.time - ended >= JUDGED_SECONDS:
            found = diagnose(JobEvidence(job, [], [], view.time))
            died = [verdict for verdict in found if verdict.severity == "died"]
            if died:
                deaths[job["raw"]] = verdicts_json(died)
    return deaths


def judge_job(
    view: Snapshot, tasks: List[Message]
) -> Tuple[Optional[str], Optional[str]]:
    """(severity, what) of a job or of the tasks of an array: the worst there is.

    Without a verdict it is what Slurm says; how many tasks ended badly is told with it.
    """
    judged = verdicts_of(view)
    found = []
    is_young = False
    for task in tasks:
        for verdict in judged.get(task["raw"], [])[:1]:
            found.append((verdict["severity"], verdict["what"]))
            is_young = is_young or verdict["what"] == FINE_SO_FAR
        if task["raw"] not in judged and task["state"] in BAD_ENDS:
            words = [task["state"].lower().replace("_", " ")] + remarks(task)
            found.append(("died", ", ".join(words)))
    order = (*NEEDS, "fine")
    found.sort(
        key=lambda verdict: order.index(verdict[0]) if verdict[0] in order else 9
    )
    if found and found[0][0] in NEEDS:
        severity, what = found[0]
        count = sum(verdict[0] == severity for verdict in found)
        return severity, what if count == 1 else "%s (tasks: %d)" % (what, count)
    said = ", ".join(remarks(tasks[0])) if len(tasks) == 1 else ""
    if is_young and not said:
        said = FINE_SO_FAR
    return ("fine" if found else None), said or None


def phase_of(tasks: List[Message]) -> str:
    """Whether a job is running, pending or ended: an array is what is most alive in it."""
    states = {task["state"] for task in tasks}
    if not states.difference(ENDED_STATES):
        return "ended"
    return "pending" if states.issubset({"PENDING", *ENDED_STATES}) else "running"


def render_clock(seconds: float) -> str:
    """A time as Slurm writes it, without its seconds where there are hours: 1-02:03, 2:13, 0:05."""
    minutes = int(seconds) // 60
    days, hours = divmod(minutes // 60, 24)
    if days:
        return "%d-%02d:%02d" % (days, hours, minutes % 60)
    return "%d:%02d h" % (hours, minutes % 60) if hours else "%d min" % minutes


def mean_of_known(rows: List[Message], *keys: str) -> Optional[float]:
    """The mean of the first of these readings that some row has."""
    for key in keys:
        known = [row[key] for row in rows if row[key] is not None]
        if known:
            return float(sum(known) / len(known))
    return None


def memory_of_job(nodes: List[Message]) -> Message:
    """The memory of a job on the node that is nearest to its limit there."""
    known = [node for node in nodes if node["job_ram"] is not None]
    if not known:
        return {"memory": None, "memory_share": None}
    worst = max(known, key=lambda node: node["job_ram"])
    text = "%.0f %%" % worst["job_ram"]
    if worst["job_mem_limit"]:
        limit = render_value("job_mem_limit", worst["job_mem_limit"])
        text += " of " + limit.replace(".0 ", " ")
    return {"memory": text, "memory_share": worst["job_ram"]}


def render_gpus(view: Snapshot, nodes: List[Message]) -> Optional[str]:
    """How busy each GPU of a job is, in percent; of many the least, the mean and the most."""
    busy: List[float] = []
    for node in nodes:
        gpus = [gpu["gpu"] for gpu in view.parts(node["slot"]).gpus]
        known = [value for value in gpus if value is not None]
        if not known and node["gpu"] is not None:
            known = [node["gpu"]]
        busy += known
    if not busy:
        return None
    if len(busy) <= SHOWN_GPUS:
        return " ".join("%.0f" % value for value in busy)
    idle = sum(value <= IDLE_GPU for value in busy)
    words = "mean %.0f" % (sum(busy) / len(busy))
    if idle:
        return "%s, %d of %d idle" % (words, idle, len(busy))
    return "%s, %.0f to %.0f (%d)" % (words, min(busy), max(busy), len(busy))


def run_time(job: Message, now: float) -> Optional[float]:
    """For how many seconds a job has run or ran; None before it starts."""
    if not job["start"] or job["state"] == "PENDING":
        return None
    has_ended = job["state"] in ENDED_STATES and job["end"]
    end: float = job["end"] if has_ended else now
    return max(0.0, end - float(job["start"]))


def remarks(job: Message) -> List[str]:
    """What else there is to say: why it waits or ended, and when it is expected to start."""
    words = []
    if job["reason"]:
        words.append(job["reason"])
    if job["exit"] not in (None, "0:0"):
        words.append("exit code " + job["exit"])
    if job["state"] == "PENDING" and job["start"]:
        is_soon = job["start"] - time.time() < 12 * 3600
        form = "%R" if is_soon else "%F %R"
        start = time.strftime(form, time.localtime(job["start"]))
        words.append("expected " + start)
    return words


def find_job(view: Snapshot, name: str) -> Optional[Message]:
    """What is known of a job, by its id as Slurm or as an agent says it; None for no such job.

    Of a job that only agents tell of, most is None.
    """
    for job in view.jobs:
        if name in (job["job"], job["raw"]):
            return job
    rows = [node for node in view.nodes if node["job"] == name]
    return job_of_nodes(name, rows) if rows and name else None


def find_tasks(view: Snapshot, name: str) -> List[Message]:
    """The tasks of the array of that id, or the job as a list of one; empty for no such job."""
    tasks = [job for job in view.jobs if name and job["array"] == name]
    if len(tasks) > 1:
        return tasks
    job = find_job(view, name)
    if job is None and "_[" in name:  # tasks that waited, and run or have ended by now
        return find_tasks(view, name.partition("_[")[0])
    return [job] if job else tasks


def with_record(row: Message, summary: Optional[Message]) -> Message:
    """The row of a task with what is recorded of it, where its nodes do not tell any more."""
    if not summary or row["phase"] != "ended":
        return row
    row = dict(row)
    if row["cpu"] is None:
        row["cpu"] = summary["cpu"]
    if row["memory"] is None and summary["peak"] and summary["mem_limit"]:
        peak = {"job_ram": 100 * summary["peak"] / summary["mem_limit"]}
        row.update(memory_of_job([dict(peak, job_mem_limit=summary["mem_limit"])]))
    severity = severity_of(summary)
    if row["severity"] is None and severity:
        row["severity"] = severity
    return row


def nodes_of_jobs(view: Snapshot, jobs: Sequence[Message]) -> List[Message]:
    """The nodes on which an agent watches one of the jobs, in their order."""
    return [row for job in jobs for row in nodes_of_job(view, job)]


def nodes_of_job(view: Snapshot, job: Message) -> List[Message]:
    """The nodes on which an agent watches the job, in their order."""
    names = (job["job"], job["raw"])
    rows = [with_marks(node) for node in view.nodes if node["job"] in names]
    if len(rows) > 1:
        mark_idle(rows)
    return in_order(rows, "node")


def ranks_of_job(view: Snapshot, rows: List[Message]) -> List[Message]:
    """The job's processes on all its nodes, odd ones first, then by rank.

    Each has its node and its slot, a name of its own on the page.
    """
    ranks = []
    for row in rows:
        for rank in view.parts(row["slot"]).ranks:
            rank = dict(rank, node=name_of(row), address=row["address"])
            rank["slot"] = "%d-%s" % (row["slot"], rank["pid"])
            ranks.append(rank)
    for key, least in (("cpu", ODD_CPU), ("mem", ODD_BYTES)):
        mark_odd(ranks, key, least)
    return sorted(ranks, key=rank_order)


def mark_odd(ranks: List[Message], key: str, least: float) -> None:
    """Note of each process whether a reading of it is unlike that of the most."""
    known = [rank[key] for rank in ranks if rank[key] is not None]
    if len(known) < 3:
        return
    middle = median_of(known)
    spread = median_of([abs(value - middle) for value in known])
    for rank in ranks:
        if rank[key] is not None:
            away = abs(rank[key] - middle)
            if away > least and away > ODD_SPREADS * spread:
                rank["odd"] = True
                rank["marks"] = ["odd"]


def rank_order(rank: Message) -> Tuple[Any, ...]:
    """A key to sort processes by."""
    number = math.inf if rank["rank"] is None else rank["rank"]
    return not rank.get("odd"), number, natural(rank["node"]), -(rank["cpu"] or 0)


def gpus_of_job(view: Snapshot, rows: List[Message]) -> List[Message]:
    """The job's GPUs on all its nodes; one that idles while another works is marked."""
    gpus = []
    for row in rows:
        for gpu in view.parts(row["slot"]).gpus:
            gpu = dict(gpu, node=name_of(row), address=row["address"])
            gpu["slot"] = "%d-%s" % (row["slot"], gpu["uuid"] or gpu["index"])
            gpus.append(gpu)
    known = [gpu for gpu in gpus if gpu["gpu"] is not None]
    if known and max(gpu["gpu"] for gpu in known) > BUSY:
        for gpu in known:
            if gpu["gpu"] < IDLE:
                gpu["marks"] = ["idle"]
    return gpus


def cpus_of(parts: Parts) -> Dict[int, Optional[int]]:
    """How busy each CPU of a node is, in tenths; None is unknown."""
    busy: Dict[int, Optional[int]] = {}
    for core in parts.cores:
        for number, char in enumerate(core["busy"] or "", int(core["first"] or 0)):
            busy[number] = int(char) if char.isdigit() else None
    return busy


# ============================================================================
# Headline: what matters of it all, in a line and a few figures
# ============================================================================


LEFT_OUT = (
    "There is room for %d processes, GPUs and strips of CPUs of all jobs together:"
    " those of %s of %d are not shown."
)


def render_turned_away(view: Snapshot) -> str:
    """How many agents found no room lately, and why."""
    count = view.turned_away_lately
    agents = "1 agent" if count == 1 else "%d agents" % count
    return "%s turned away in the last minute: %s" % (agents, view.turned_away_why)


def trouble_of(view: Snapshot, rows: List[Message]) -> str:
    """What is wrong, in a line; "" if nothing is."""
    if view.beat > STALE_SECONDS:
        return (
            "The collector has been silent for %.0f s: what you see is old" % view.beat
        )
    counts = (
        ("alerts on %s", sum(bool(row["alerts"]) for row in rows)),
        ("%s idle", sum("idle" in row["marks"] for row in rows)),
        ("%s lost", len(gone(view, "lost"))),
    )
    kinds = [kind % counted(count, "node") for kind, count in counts if count]
    if is_more_gone(view):
        kinds = ["at least " + kind if "lost" in kind else kind for kind in kinds]
    trouble = trouble_of_jobs(view)
    if kinds:
        trouble.append(", ".join(kinds))
    if view.turned_away_lately:
        trouble.append(render_turned_away(view))
    return "; ".join(trouble)


def trouble_of_jobs(view: Snapshot) -> List[str]:
    """How many jobs died or have a problem: a list of one line, or none."""
    severities = [job["severity"] for job in job_rows(view)]
    counts = trouble_words(severities)
    if not counts:
        return []
    return ["%s: %s" % (counted(len(severities), "job"), ", ".join(counts))]


def trouble_words(severities: Sequence[str]) -> List[str]:
    """How many jobs died and how many have a problem, as far as there are any."""
    counts = (
        ("%d died", severities.count("died")),
        ("%d with a problem", severities.count("problem")),
    )
    return [words % count for words, count in counts if count]


def counted(count: int, word: str) -> str:
    """1 job, 2 jobs."""
    return "%d %s%s" % (count, word, "" if count == 1 else "s")


def headline(view: Snapshot, rows: List[Message]) -> str:
    """The first words of the page: whether all is well."""
    trouble = trouble_of(view, rows)
    if trouble:
        return "\u26a0 " + trouble
    jobs = len(job_rows(view))
    words = "All is well" if rows or jobs else "No nodes"
    return "%s: %s" % (words, counted(jobs, "job")) if jobs else words


Card = NamedTuple("Card", [("label", str), ("figure", str), ("remark", str)])


def cards_of(view: Snapshot, rows: List[Message]) -> List[Card]:
    """The figures under the headline; none as long as there is no node."""
    if not rows:
        return []
    jobs = {row["job"] for row in rows} - {None}
    cards = [Card("Nodes", "%d" % len(rows), "jobs: %d" % len(jobs))]
    for key in ("cpu", "ram"):
        reading = operator.itemgetter(key)
        least = min(rows, key=reading)
        most = max(rows, key=reading)
        figure = "%.1f %%" % mean(rows, key)
        ends = (least[key], name_of(least), most[key], name_of(most))
        remark = "%.0f %% %s to %.0f %% %s" % ends
        cards.append(Card(NUMBERS[key].label, figure, remark))
    age = min(row["age"] for row in rows)
    taken = render_value("time", view.time - age)
    cards.append(Card("Newest sample", taken, "%.1f s ago" % age))
    return cards


def figures(view: Snapshot, rows: List[Message]) -> Tuple[str, List[Card]]:
    """What matters: the headline and the cards."""
    return headline(view, rows), cards_of(view, rows)


# ============================================================================
# Columns: a table is a list of them; a new column is one line in such a list
# ============================================================================

LEFT = ""  # classes of the style sheet
RIGHT = "n"
WRAPPED = "w"
BREAKABLE = "t"  # anywhere, when there is little room
SHORT = "g"  # some words, in more than one line when there is little room
UNKNOWN_CELL = "u"  # beside one of the others
CARD_TABLES = ("jobs", "ended", "verdicts", "events", "lost", "finished")
SELF_EVIDENT = "severity job job_name user state time when kind node text what".split()
RECENT_POINTS = 30  # of a curve in a table
RECENT_STEP = 5  # every fifth tick: the last five minutes
SIGNS = {"died": "\u2716", "problem": "\u26a0", "advice": "\u2022", "fine": "\u2713"}
TILES_KEPT = 4096  # of the map
PATHS_KEPT = 512  # templates of curves, one for each number of points
MOVE = "M%d %dh0"  # a path begins anew with a dot, should no line follow
DRAW = "L%d %d"

# what is shown beside a row: Dashboard, or what a test puts in its place
Site = Any
Draw = Callable[["Column", Message, Site], Html]


def link(query: Query, **state: object) -> str:
    """The address of the page in the query's state, but for what is given."""
    state = dict(query, **state)
    keys = ("q", "job", "user", "group", "map", "sort", "page")
    fields = [(key, state[key]) for key in keys if state.get(key)]
    return "./?" + urllib.parse.urlencode(fields)


def draw_text(column: "Column", row: Message, site: Site) -> Html:
    """The reading and nothing more."""
    return plain_cell(column.align, render_value(column.key, row.get(column.key)))


@functools.lru_cache(maxsize=4096)
def plain_cell(align: str, text: str) -> Html:
    """A cell with a text; a page has thousands of them, and many are alike."""
    kind = (align + " " + UNKNOWN_CELL).strip() if text == "-" else align
    return fill(CELL_HTML, kind=kind, content=text)


def draw_percent(column: "Column", row: Message, site: Site) -> Html:
    """A percentage with a bar behind it."""
    value = row.get(column.key)
    if value is None:
        return draw_text(column, row, site)
    return fill(
        PERCENT_CELL_HTML,
        text=render_value(column.key, value),
        key=column.key,
        width=min(max(value, 0), 100),
    )


def draw_node(column: "Column", row: Message, site: Site) -> Html:
    """The node's name, a link to its page, with the marks that it has."""
    if not name_of(row):  # what happened to a job as a whole
        return fill(NO_NODE_CELL_HTML)
    marks = [fill(MARK_HTML, mark=mark) for mark in row.get("marks", ())]
    return fill(NODE_CELL_HTML, href=path_of(row), name=name_of(row), marks=marks)


def draw_job(column: "Column", row: Message, site: Site) -> Html:
    """The job's id, a link to its nodes."""
    job = row.get("job")
    if not job:
        return draw_text(column, row, site)
    return fill(LINK_CELL_HTML, href=link({}, job=job), text=job)


def draw_job_page(column: "Column", row: Message, site: Site) -> Html:
    """The job's id, a link to its page; to the nodes of an array's tasks."""
    job = row.get("job")
    if not job:
        return draw_text(column, row, site)
    return fill(LINK_CELL_HTML, href=named_path("job", job), text=job)


def draw_job_name(column: "Column", row: Message, site: Site) -> Html:
    """The job's name, which leads where its id does."""
    name = row.get("job_name")
    if not name or not row.get("job"):
        return draw_text(column, row, site)
    return fill(JOB_NAME_CELL_HTML, href=named_path("job", row["job"]), text=name)


def draw_severity(column: "Column", row: Message, site: Site) -> Html:
    """A verdict in a word, with a sign when it needs the user."""
    severity = row.get("severity") or ""
    sign = SIGNS.get(severity)
    if not sign:
        return fill(CELL_HTML, kind=UNKNOWN_CELL, content=severity or "-")
    words = "%s\xa0%s" % (sign, severity)
    if severity in ("died", "problem"):
        return fill(BAD_CELL_HTML, words=words)
    return fill(CELL_HTML, kind=severity, content=words)


def draw_share(column: "Column", row: Message, site: Site) -> Html:
    """A text with a bar behind it, for a share in percent."""
    share = row.get(column.key + "_share")
    if share is None:
        return draw_text(column, row, site)
    return fill(
        PERCENT_CELL_HTML,
        text=row[column.key],
        key=column.key,
        width="%.1f" % min(max(share, 0), 100),
    )


def draw_rank_cpu(column: "Column", row: Message, site: Site) -> Html:
    """Percent of one core, with a bar for the share of all CPUs that the process may use."""
    value = row.get(column.key)
    if value is None:
        return draw_text(column, row, site)
    cpus = max(1, len(parse_cpu_list(row.get("cpus"))))
    return fill(
        PERCENT_CELL_HTML,
        text=render_value(column.key, value),
        key=column.key,
        width="%.1f" % min(max(value / cpus, 0), 100),
    )


def draw_strip(column: "Column", row: Message, site: Site) -> Html:
    """A node's CPUs in a row: those of the job that are busy, those that idle, and the others."""
    busy: Dict[int, Optional[int]] = row["busy"]
    paths = dict.fromkeys(("busy", "idle", "other"), "")
    counts = dict.fromkeys(paths, 0)
    for place, (cpu, tenths) in enumerate(sorted(busy.items())):
        kind = "busy" if (tenths or 0) >= 5 else "idle"
        if row["job_cpus"] and cpu not in row["job_cpus"]:
            kind = "other"
        paths[kind] += "M%d 1h.8" % place
        counts[kind] += 1
    label = "%d of the job's CPUs busy, %d idle, %d not of the job" % (
        counts["busy"],
        counts["idle"],
        counts["other"],
    )
    drawn = [
        fill(PATH_HTML, key=kind, path=path) for kind, path in paths.items() if path
    ]
    return fill(STRIP_CELL_HTML, last=len(busy), label=label, paths=drawn)


def draw_kind(column: "Column", row: Message, site: Site) -> Html:
    """What kind of event it is, which is the cell's class, too."""
    return fill(CELL_HTML, kind=row["kind"], content=row["kind"])


def draw_recent(column: "Column", row: Message, site: Site) -> Html:
    """The last five minutes of CPU and RAM."""
    series = {}
    for key in ("cpu", "ram"):
        values = from_first_known(site.series(row, key, RECENT_POINTS, RECENT_STEP))
        if len(values) < 3:  # a young node: every reading of it
            values = from_first_known(site.series(row, key, RECENT_POINTS, 1))
        series[key] = values
    points = max(2, *map(len, series.values()))
    return fill(CURVES_CELL_HTML, curves=draw_curves(series, points, 100))


def from_first_known(values: List[float]) -> List[float]:
    """The readings from the first that is known on: a curve begins at its left.

    One beyond a float is unknown, too: NaN.
    """
    first = 0
    while first < len(values) and not math.isfinite(values[first]):
        first += 1
    known = values[first:]
    if math.isfinite(sum(known)):  # all of them, as a rule
        return known
    return [value if math.isfinite(value) else math.nan for value in known]


def draw_curves(series: Dict[str, List[float]], points: int, top: float) -> Html:
    """A curve for each metric's readings, from 0 to top, with gaps where they are unknown."""
    paths = [
        fill(PATH_HTML, key=key, path=path_through(values, top))
        for key, values in series.items()
    ]
    return fill(CURVES_HTML, last=points - 1, paths=paths)


def path_through(values: List[float], top: float) -> str:
    """The path of a curve in a box that is 100 high (SVG 2, 9.3)."""
    scale = 100 / top
    heights = [100 - scale * value for value in values]
    if not heights or sum(heights) != sum(heights):
        return path_with_gaps(heights)
    if min(heights) < 0 or max(heights) > 100:
        heights = [max(0.0, min(100.0, height)) for height in heights]
    return whole_path(len(heights)) % tuple(heights)


@functools.lru_cache(maxsize=PATHS_KEPT)
def whole_path(points: int) -> str:
    """The template of a path through so many heights, none of which is unknown."""
    return "M0 %dh0" + "".join("L%d %%d" % x for x in range(1, points))


def path_with_gaps(heights: List[float]) -> str:
    """The path of a curve some of whose heights are unknown: NaN."""
    path = []
    pen = MOVE
    for x, height in enumerate(heights):
        if height != height:
            pen = MOVE
            continue
        path.append(pen % (x, max(0.0, min(100.0, height))))
        pen = DRAW
    return "".join(path)


class Column(NamedTuple):
    """A column of a table.

    key: of the value in a row, by which the table can be sorted; heading: what is written above;
    align: LEFT, RIGHT or WRAPPED; draw: makes the cell of a row.
    """

    key: str
    heading: str
    align: str = LEFT
    draw: Draw = draw_text


def kind_of_table(name: str) -> str:
    """The class of a table: on a phone the rows of some are cards."""
    return "scroll cards" if name in CARD_TABLES else "scroll"


def draw_cells(
    name: str, columns: Sequence[Column], row: Message, site: Site
) -> List[Html]:
    """The cells of a row; those of a card say what they are, as its table shows no headings."""
    cells = [column.draw(column, row, site) for column in columns]
    if name in CARD_TABLES:
        return [name_cell(*pair) for pair in zip(columns, cells)]
    return cells


def name_cell(column: Column, cell: Html) -> Html:
    """A cell with the heading of its column, unless it tells that by itself."""
    if column.key in SELF_EVIDENT or not cell.startswith(CELL_START):
        return cell
    start = fill(NAMED_CELL_START_HTML, what=column.heading)
    return Html(start + cell[len(CELL_START) :])


def of_metric(key: str) -> Column:
    """The column of a metric, as METRICS describes it."""
    metric = METRICS[INDEX[key]]
    if key in TEXTS:
        return Column(key, metric.label)
    if metric.unit == "%":
        return Column(key, metric.label, RIGHT, draw_percent)
    return Column(key, metric.label, RIGHT)


NODE = Column("node", "Node", LEFT, draw_node)
JOB_ID = Column("job", "Job", LEFT, draw_job)
TIME = Column("time", "Time")
KIND = Column("kind", "Kind", LEFT, draw_kind)
WHAT = Column("text", "What", WRAPPED)

COLUMNS = (
    NODE,
    JOB_ID,
    of_metric("job_name"),
    of_metric("user"),
    of_metric("cpu"),
    of_metric("ram"),
    Column("recent", "Last 5 min", LEFT, draw_recent),
    of_metric("job_cpu"),
    of_metric("job_ram"),
    of_metric("gpu"),
    of_metric("job_time_left"),
    of_metric("load1"),
    Column("age", "Age", RIGHT),
    Column("slot", "Slot", RIGHT),
    Column("address", "Address"),
)
LAST_KNOWN_COLUMNS = (*COLUMNS, TIME, KIND, WHAT)
GONE_COLUMNS = (NODE, JOB_ID, of_metric("cpu"), of_metric("ram"), TIME, WHAT)
EVENT_COLUMNS = (TIME, KIND, NODE, JOB_ID, WHAT)
NODE_EVENT_COLUMNS = (TIME, KIND, JOB_ID, WHAT)
READING_COLUMNS = (
    Column("reading", "Reading"),
    Column("now", "Now"),
    Column("meaning", "Meaning"),
)
RANK_COLUMNS = (
    NODE,
    Column("rank", "Rank", RIGHT),
    Column("pid", "PID", RIGHT),
    Column("program", "Program"),
    Column("cpu", "CPU (of one core)", RIGHT, draw_rank_cpu),
    Column("mem", "Memory", RIGHT),
    Column("peak", "Peak", RIGHT),
    Column("gpu", "GPU", RIGHT),
    Column("threads", "Threads", RIGHT),
    Column("running", "Can run", RIGHT),
    Column("cpus", "May use CPUs"),
    Column("on", "Ran on CPUs"),
    Column("state", "State"),
    Column("wchan", "Waits in"),
    Column("read", "Reads now", RIGHT),
    Column("write", "Writes now", RIGHT),
    Column("read_total", "Read in all", RIGHT),
    Column("write_total", "Written in all", RIGHT),
    Column("step", "Step"),
)
GPU_COLUMNS = (
    NODE,
    Column("index", "GPU", RIGHT),
    Column("name", "Model"),
    Column("gpu", "Busy", RIGHT, draw_percent),
    Column("mem_used", "Memory used", RIGHT),
    Column("mem_total", "Memory", RIGHT),
    Column("power", "Power", RIGHT),
    Column("power_limit", "Power limit", RIGHT),
    Column("temp", "Temperature", RIGHT),
    Column("throttle", "Slowed by"),
    Column("processes", "Processes", RIGHT),
    Column("mig", "MIG"),
    Column("error", "Error", WRAPPED),
)
CPU_COLUMNS = (
    NODE,
    Column("cpus", "The job's CPUs"),
    Column("busy", "Busy, idle, not of the job", LEFT, draw_strip),
)
VERDICT_COLUMNS = (
    Column("severity", "Verdict", LEFT, draw_severity),
    Column("job", "Job", LEFT, draw_job_page),
    Column("what", "What", WRAPPED),
    Column("proof", "Proof", WRAPPED),
    Column("cure", "What to do", WRAPPED),
)
JOB_COLUMNS = (
    Column("severity", "Verdict", LEFT, draw_severity),
    Column("job", "Job", LEFT, draw_job_page),
    Column("job_name", "Job name", BREAKABLE, draw_job_name),
    of_metric("user"),
    Column("state", "State", SHORT),
    Column("nodes", "Nodes", RIGHT),
    Column("clock", "Time", RIGHT, draw_share),
    Column("cpu", "CPU", RIGHT, draw_percent),
    Column("memory", "Memory", RIGHT, draw_share),
    Column("gpu", "GPU %", SHORT),
    WHAT,
)

# ============================================================================
# Pages: a snapshot -> HTML.  With the rooms above, the only one that knows HTML.
# ============================================================================

MAP_FROM = 61  # nodes: so many get a map
PAGE_ROWS = 100  # nodes: more get a table in pages
NEW_EVENTS = 20  # events on the page
FOLDED_EVENTS = ("connected", "finished")  # those of a job's nodes are one row, ...
FOLD_SECONDS = 10.0  # ... if they are no further apart
SHOWN_OTHERS = 8  # nodes that are named in such a row
FINE = 300  # points of the graphs of CPU and RAM: one a tick
COARSE = 60  # points of the other graphs ...
FIFTH = 5  # ... one in so many ticks
# Numbers that hardly ever change, that fall as the clock goes, or that another graph shows.
# Each of the others takes 240 bytes of a node's ring.
NO_GRAPHS = (
    "interval",
    "cpus",
    "mem_total",
    "mem_used",
    "uptime",
    "gpus",
    "job_cpus",
    "job_mem_peak",
    "job_mem_limit",
    "job_mem_failcnt",
    "oom_kill",
    "job_time_limit",
    "job_time_left",
    "cores_busy",  # job_cpu
    "disk_shm",
    "inodes",
    "inodes_tmp",
)
GRAPHS = tuple(key for key in NUMBERS if key not in NO_GRAPHS)
FINE_GRAPHS = GRAPHS[:2]  # CPU and RAM
# What matters most, in this order
LARGE_GRAPHS = ("job_cpu", "cpu", "job_ram", "ram", "gpu", "gpu_min")
LAST_GRAPHS = ("agent_cpu", "agent_rss")
TICK_SECONDS = 2.0  # between two looks at the table, for the graphs
SCALED_NODES = 64  # of a job: more of them do not share a scale

# What the tables of a job's page have, by their names
JOB_PAGE_COLUMNS = {
    "jobs": JOB_COLUMNS,
    "verdicts": VERDICT_COLUMNS,
    "nodes": COLUMNS,
    "cores": CPU_COLUMNS,
    "ranks": RANK_COLUMNS,
    "gpus": GPU_COLUMNS,
    "events": EVENT_COLUMNS,
}
TOLD_OF_JOB = ("job", "job_name", "user")  # the page tells it of all nodes

# rows of a table, under a heading of their own or none
Body = NamedTuple("Body", [("heading", Optional[Html]), ("rows", List[Message])])
# what a select offers: a field of the query, what is shown for "", other values
Choice = NamedTuple("Choice", [("key", str), ("first", str), ("values", List[str])])


class Page:
    """A snapshot for a query as HTML; site has options, cost and series (see Dashboard)."""

    def __init__(self, view: Snapshot, query: Query, site: Site) -> None:
        self.view = view
        self.query = query
        self.site = site
        self.rows = select(view, query)
        self.job_rows = job_rows(view)

    def all_nodes(self) -> str:
        """The page: what matters, every live node, what has gone and what happened."""
        is_filtered = any(self.query.get(key) for key in ("q", "job", "user"))
        everything = select(self.view, {}) if is_filtered else self.rows
        title = headline(self.view, everything)
        return self.whole(
            title,
            self.jobs(),
            self.cards(cards_of(self.view, self.rows)),
            self.form() if self.view.nodes else self.empty(),
            fill(NO_MATCH_HTML) if everything and not self.rows else None,
            self.node_map() if len(self.rows) >= MAP_FROM else None,
            self.nodes() if self.rows else None,
            self.ended_jobs(),
            self.aside(),
        )

    def one_node(self) -> str:
        """The page of a node: graphs, every reading, events; "" if it is not known."""
        name = self.query["node"]
        events = [event for event in self.view.events if name_of(event) == name][::-1]
        rows = [row for row in self.rows if name_of(row) == name] or events[:1]
        if not rows:
            return ""
        parts = [self.places(rows), self.trouble(rows), self.last_known(rows)]
        for number, row in enumerate(rows, 1):
            parts.append(self.graphs(row))
            parts.append(self.readings(number, row))
        parts.append(
            self.table("events", "Events", NODE_EVENT_COLUMNS, [Body(None, events)])
        )
        return self.whole(name, *parts, root="../")

    def one_job(self) -> str:
        """The page of a job: what is asked for, its nodes, CPUs, processes, GPUs and events."""
        tasks = find_tasks(self.view, self.query["job"])
        if not tasks:
            return ""
        rows = nodes_of_jobs(self.view, tasks)
        names = {name for job in tasks for name in (job["job"], job["raw"])}
        events = [event for event in self.view.events if event["job"] in names][::-1]
        several = len(tasks) > 1
        name = tasks[0]["array"] if several else tasks[0]["job"]
        title = "Job %s %s" % (name, tasks[0]["job_name"] or "")
        jobs = [
            job_row(self.view, [job], nodes_of_job(self.view, job)) for job in tasks
        ]
        if several:
            past = getattr(self.site, "past_jobs", {})
            jobs = [with_record(job, past.get(job["job"])) for job in jobs]
        jobs.sort(key=job_order)
        sign = SIGNS[jobs[0]["severity"]] if jobs[0]["severity"] in NEEDS else ""
        return self.whole(
            (sign + " " + title).strip(),
            fill(PLACES_HTML, more=None if several else self.record_link(tasks[0])),
            self.known_table("jobs", count_tasks(tasks) if several else "Job", jobs),
            self.known_table("verdicts", "Verdicts", self.verdict_rows(tasks)),
            self.known_table("nodes", "Nodes", rows, () if several else TOLD_OF_JOB),
            self.left_out(rows),
            self.known_table("cores", "CPUs", self.cpu_rows(rows)),
            self.known_table("ranks", "Processes", ranks_of_job(self.view, rows)),
            self.known_table("gpus", "GPUs", gpus_of_job(self.view, rows)),
            self.known_table("events", "Events", events, () if several else ("job",)),
            root="../",
        )

    def left_out(self, rows: List[Message]) -> Optional[Html]:
        """That the table has no room for what some nodes of a job tell of their processes."""
        missing = [row for row in rows if not self.view.parts(row["slot"]).look]
        if not self.view.parts_left_out or not missing or self.view.has_room_for_look():
            return None
        words = LEFT_OUT % (PARTS, counted(len(missing), "node"), len(rows))
        return fill(PARAGRAPH_HTML, text=words)

    def trouble(self, rows: List[Message]) -> Optional[Html]:
        """What is wrong with the jobs that a node is in."""
        names = {row["job"] for row in rows if row["job"]}
        tasks = [job for job in map(self.find_job, sorted(names)) if job]
        found = [row for row in self.verdict_rows(tasks) if row["severity"] in NEEDS]
        return self.known_table("verdicts", "Verdicts on its job", found)

    def find_job(self, name: str) -> Optional[Message]:
        """What is known of a job."""
        return find_job(self.view, name)

    def verdict_rows(self, tasks: List[Message]) -> List[Message]:
        """What is judged of a job, or of the tasks of an array, the worst first."""
        judged = verdicts_of(self.view)
        rows = []
        for task in tasks:
            for verdict in judged.get(task["raw"], []):
                if len(tasks) > 1 and verdict["severity"] == "fine":
                    continue  # its row says so
                job = task["job"] if len(tasks) > 1 else None
                what = words_of_fine(verdict["what"])
                rows.append(dict(verdict, what=what, job=job))
        order = (*NEEDS, "fine")
        rows.sort(
            key=lambda row: (
                order.index(row["severity"]) if row["severity"] in order else 9
            )
        )
        return [dict(row, slot=number) for number, row in enumerate(rows, 1)]

    def places(self, rows: List[Message]) -> Html:
        """Links from the page of a node: to all, and to the jobs that it is in."""
        links = [
            fill(
                JOB_LINK_HTML,
                href=named_path("job", row["job"]),
                job=row["job"],
                words=row.get("job_name"),
            )
            for row in rows
            if row["job"]
        ]
        return fill(PLACES_HTML, more=links)

    def record_link(self, job: Message) -> Optional[Html]:
        """The way to what is recorded of a job, if anything is."""
        if not getattr(self.site.options, "record", None):
            return None
        return fill(RECORD_LINK_HTML, href=named_path("record", job["job"]))

    def cpu_rows(self, rows: List[Message]) -> List[Message]:
        """A row for each node that tells of its CPUs."""
        found = []
        for row in rows:
            parts = self.view.parts(row["slot"])
            busy = cpus_of(parts)
            if busy:
                cpus = parts.look.get("cpus")
                found.append(
                    dict(row, cpus=cpus, busy=busy, job_cpus=parse_cpu_list(cpus))
                )
        return found

    def known_table(
        self, name: str, caption: str, rows: List[Message], told: Sequence[str] = ()
    ) -> Optional[Html]:
        """A table of a job's page, without the columns that have nothing to tell, or nothing new.

        None without rows.
        """
        known = [
            column
            for column in JOB_PAGE_COLUMNS[name]
            if column.draw is draw_recent or has_any(rows, column)
            if column.key not in told
        ]
        if not rows:
            return None
        return self.table(name, caption, known, [Body(None, rows)])

    def whole(self, title: str, *parts: Optional[Html], root: str = "./") -> str:
        """A page around its parts; root: where the overview is, seen from this page."""
        return fill(
            PAGE_HTML,
            title=title,
            root=root,
            notice=demo_notice(self.site),
            now=render_value("time", self.view.time),
            state="live" if self.view.beat <= STALE_SECONDS else "old",
            style=Html(STYLE),
            parts=list(parts),
            cost=self.site.cost.get("text"),
            script=Html(SCRIPT),
        )

    # -- parts of the page of all nodes ------------------------------------

    def cards(self, cards: List[Card]) -> Optional[Html]:
        """What matters, in figures."""
        if not cards:
            return None
        drawn = [fill(CARD_HTML, **card._asdict()) for card in cards]
        return fill(CARDS_HTML, cards=drawn)

    def empty(self) -> Html:
        """What to do as long as there is no agent."""
        options = self.site.options
        if watches_jobs(options):
            return fill(WATCHING_HTML)
        host = options.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        secret = ""
        if options.secret_file:
            secret = " --secret-file " + options.secret_file
        return fill(EMPTY_HTML, host=host, port=options.port, secret=secret)

    def form(self) -> Html:
        """The state of the page, to be changed."""
        maps = ["ram"] if len(self.view.nodes) >= MAP_FROM else []
        choices = (
            Choice("job", "all", self.known_values("job")),
            Choice("user", "all", self.known_values("user")),
            Choice("group", "by job", ["no"]),
            Choice("map", "cpu", maps),
        )
        return fill(
            FORM_HTML,
            words=self.query.get("q"),
            selects=[self.drop_down(choice) for choice in choices if choice.values],
            sort=self.query.get("sort"),
        )

    def known_values(self, key: str) -> List[str]:
        """Every value that some node has, in order."""
        values = {node[key] for node in self.view.nodes if node[key]}
        return sorted(values, key=natural)

    def drop_down(self, choice: Choice) -> Html:
        """One choice of the form."""
        options = []
        for value in choice.values:
            is_chosen = self.query.get(choice.key) == value
            template = CHOSEN_OPTION_HTML if is_chosen else OPTION_HTML
            options.append(fill(template, value=value))
        return fill(
            SELECT_HTML,
            label=choice.key.capitalize(),
            key=choice.key,
            first=choice.first,
            options=options,
        )

    def asked_job_rows(self) -> List[Message]:
        """The jobs that the query asks for, by themselves or by one of their nodes."""
        words = self.query.get("q", "").lower().split()
        job, user = self.query.get("job"), self.query.get("user")
        if not (words or job or user):
            return self.job_rows
        names = {row["job"] for row in self.rows if row["job"]}
        names |= {name.partition("_")[0] for name in names}  # arrays
        rows = []
        for row in self.job_rows:
            text = "\n".join(str(row[key] or "") for key in SEARCHED_JOB).lower()
            has_words = bool(words) and all(word in text for word in words)
            may_be = not job and user in (None, "", row["user"])
            if names & {row["job"], row["raw"]} or has_words and may_be:
                rows.append(row)
        return rows

    def jobs(self) -> Optional[Html]:
        """The table of jobs, but for those that ended well."""
        rows = [
            row
            for row in self.asked_job_rows()
            if row["phase"] != "ended" or row["severity"] in NEEDS
        ]
        if not rows:
            return None
        return self.table("jobs", "Jobs", self.job_columns(rows), [Body(None, rows)])

    def ended_jobs(self) -> Optional[Html]:
        """The table of jobs that ended, and that need nobody."""
        rows = [
            row
            for row in self.asked_job_rows()
            if row["phase"] == "ended" and row["severity"] not in NEEDS
        ]
        if not rows:
            return None
        columns = self.job_columns(rows)
        return self.table("ended", "Ended jobs", columns, [Body(None, rows)])

    def job_columns(self, rows: List[Message]) -> List[Column]:
        """The columns that have something to tell; the user's when there are several."""
        users = {row["user"] for row in rows}
        columns = []
        for column in JOB_COLUMNS:
            if column.key == "user" and len(users) < 2:
                continue
            if column.key in ("job", "state") or has_any(rows, column):
                columns.append(column)
        return columns

    def node_map(self) -> Html:
        """A tile for each node, filled as high as its reading."""
        key = "ram" if self.query.get("map") == "ram" else "cpu"
        tiles = [
            draw_tile(
                row["slot"],
                name_of(row),
                row["job"],
                row["cpu"],
                row["ram"],
                row[key],
                ", ".join(row["marks"]),
                bool(row["alerts"]),
            )
            for row in self.rows
        ]
        return fill(MAP_HTML, label=NUMBERS[key].label, tiles=tiles)

    def nodes(self) -> Html:
        """The table of nodes: by job unless group=no, in pages when there are many."""
        has_jobs = any(row["job"] for row in self.rows)
        is_grouped = has_jobs and not self.query.get("group")
        jobs: Dict[str, List[Message]] = {}
        for row in self.rows:
            job = (row["job"] or "") if is_grouped else ""
            jobs.setdefault(job, []).append(row)
        last_page = math.ceil(len(self.rows) / PAGE_ROWS)
        page = self.page_number(last_page)
        shown = self.slots_of_page(jobs, page)
        bodies = []
        for job, rows in jobs.items():
            heading = self.job_heading(job, rows) if is_grouped else None
            shown_rows = [row for row in rows if row["slot"] in shown]
            if shown_rows:
                bodies.append(Body(heading, shown_rows))
        return self.table(
            "nodes",
            "Nodes",
            self.node_columns(is_grouped),
            bodies,
            sort=self.query.get("sort") or "node",
            end=self.page_links(page, last_page) if last_page > 1 else None,
        )

    def page_number(self, last: int) -> int:
        """The page of the table that is asked for, or one that is there."""
        asked = self.query.get("page", "")
        if not asked.isdecimal():
            return 1
        return min(max(int(asked), 1), last)

    def slots_of_page(self, jobs: Dict[str, List[Message]], page: int) -> Set[int]:
        """The slots of the nodes on a page of the table."""
        slots = [row["slot"] for rows in jobs.values() for row in rows]
        first = PAGE_ROWS * (page - 1)
        return set(slots[first : first + PAGE_ROWS])

    def node_columns(self, is_grouped: bool) -> List[Column]:
        """The columns that have something to tell, and that no heading tells already."""
        told = ("job", "job_name", "user") if is_grouped else ()
        columns = []
        for column in COLUMNS:
            is_drawn = column.draw in (draw_node, draw_recent)  # from other values
            if column.key not in told and (is_drawn or has_any(self.rows, column)):
                columns.append(column)
        return columns

    def job_heading(self, job: str, rows: List[Message]) -> Html:
        """What is written above the nodes of a job."""
        if not job:
            return fill(NO_JOB_HEADING_HTML)
        words = [
            rows[0]["job_name"],
            rows[0]["user"],
            "nodes: %d" % len(rows),
            "CPU: %.1f %%" % mean(rows, "cpu"),
        ]
        known = " \u00b7 ".join(word for word in words if word)
        return fill(JOB_HEADING_HTML, href=link({}, job=job), job=job, words=known)

    def page_links(self, page: int, last: int) -> Html:
        """Links to the pages of the table."""
        links = []
        for number in range(1, last + 1):
            template = THIS_PAGE_LINK_HTML if number == page else PAGE_LINK_HTML
            href = link(self.query, page=number)
            links.append(fill(template, href=href, number=number))
        return fill(PAGES_HTML, links=links)

    def aside(self) -> Html:
        """Who left, and what happened."""
        lost = gone(self.view, "lost")
        finished = gone(self.view, "finished")
        newest = fold_events(self.view.events[::-1])[:NEW_EVENTS]
        tables = []
        for name, caption, columns, rows in (
            ("lost", "Recently gone", GONE_COLUMNS, lost),
            ("finished", "Recently finished", GONE_COLUMNS, finished),
            ("events", "Events", EVENT_COLUMNS, newest),
        ):
            if rows:
                tables.append(self.table(name, caption, columns, [Body(None, rows)]))
        return fill(ASIDE_HTML, tables=tables)

    # -- parts of the page of one node -------------------------------------

    def last_known(self, rows: List[Message]) -> Html:
        """The rows of a node: more than one when it is in several jobs."""
        columns = [column for column in LAST_KNOWN_COLUMNS if has_any(rows, column)]
        return self.table("nodes", "Last known", columns, [Body(None, rows)])

    def graphs(self, row: Message) -> Html:
        """A graph for each metric of which some reading of the last ten minutes is known."""
        small = [key for key in GRAPHS if key not in LARGE_GRAPHS + LAST_GRAPHS]
        groups = []
        for kind, keys in (("large", LARGE_GRAPHS), ("", (*small, *LAST_GRAPHS))):
            drawn = [self.graph(row, NUMBERS[key]) for key in keys]
            graphs = [graph for graph in drawn if graph]
            if graphs:
                groups.append(fill(GRAPHS_HTML, kind=kind, graphs=graphs))
        return Html("".join(groups))

    def graph(self, row: Message, metric: Metric) -> Optional[Html]:
        """What is known of a metric's last ten minutes; None if nothing is."""
        key = metric.key
        is_fine = key in FINE_GRAPHS
        points = FINE if is_fine else COARSE
        step = TICK_SECONDS if is_fine else FIFTH * TICK_SECONDS
        values = from_first_known(self.site.series(row, key, points, 1))
        if not values:
            return None
        top = 100.0 if metric.unit == "%" else self.top_of(row, key, points)
        size, unit = scale_of(key, top)
        end = row.get("time") or self.view.time
        span = step * (len(values) - 1)
        return fill(
            GRAPH_HTML,
            id="graph-%s-%s" % (key, row.get("slot", 0)),
            label=metric.label,
            now=render_value(key, row.get(key)),
            curve=draw_curves({key: values}, max(2, len(values)), top),
            values=" ".join(
                "" if value != value else "%.4g" % value for value in values
            ),
            end=int(end),
            step="%g" % step,
            size=size,
            unit=" " + unit if unit else "",
            top=render_value(key, top),
            half=render_value(key, top / 2),
            from_time=render_value("time", end - span),
            mid_time=render_value("time", end - span / 2),
            to_time=render_value("time", end),
        )

    def top_of(self, row: Message, key: str, points: int) -> float:
        """The upper end of a graph: the same for all nodes of a job, unless they are many."""
        rows = [other for other in self.view.nodes if other["job"] == row["job"]]
        if not row["job"] or len(rows) > SCALED_NODES:
            rows = [row]
        known = [SMALL_TOP if key in SMALL else 1.0]
        for other in rows:
            known += self.site.series(other, key, points, 1)
        return max(value for value in known if value == value)

    def readings(self, number: int, row: Message) -> Html:
        """Every reading that a row has, and what it means."""
        readings: List[Message] = []
        for slot, metric in enumerate(METRICS, 1):
            now = render_value(metric.key, row.get(metric.key))
            if now != "-":
                readings.append(
                    {
                        "slot": slot,
                        "reading": metric.label,
                        "now": now,
                        "meaning": metric.help,
                    }
                )
        name = "readings%d" % number
        return self.table(name, "Readings", READING_COLUMNS, [Body(None, readings)])

    # -- tables ------------------------------------------------------------

    def table(
        self,
        name: str,
        caption: str,
        columns: Sequence[Column],
        bodies: Sequence[Body],
        sort: str = "",
        end: Optional[Html] = None,
    ) -> Html:
        """A table that scrolls by itself; sort: it can be sorted, and this is how it is."""
        return fill(
            TABLE_HTML,
            name=name,
            kind=kind_of_table(name),
            caption=caption,
            headings=[self.heading(column, sort) for column in columns],
            bodies=[self.body(name, columns, body) for body in bodies],
            end=end,
        )

    def heading(self, column: Column, sort: str) -> Html:
        """The cell above a column: a link that sorts by it, or that turns the order around."""
        align = RIGHT if column.align == RIGHT else LEFT
        label: object = column.heading
        if sort and column.draw is not draw_recent:
            turned = "-" + column.key if sort == column.key else column.key
            href = link(self.query, sort=turned, page="")
            label = fill(LINK_HTML, href=href, text=label)
        if sort not in (column.key, "-" + column.key):
            return fill(HEADING_HTML, align=align, label=label)
        order = "descending" if sort.startswith("-") else "ascending"
        return fill(SORTED_HEADING_HTML, align=align, order=order, label=label)

    def body(self, name: str, columns: Sequence[Column], body: Body) -> Html:
        """Some rows of a table; an id keeps them what they are when the page is renewed."""
        group = "all"
        heading = None
        if body.heading:
            group = urllib.parse.quote(body.rows[0]["job"] or "")
            heading = fill(BODY_HEADING_HTML, span=len(columns), heading=body.heading)
        rows = [self.row(name, columns, row) for row in body.rows]
        return fill(BODY_HTML, id="%s-%s" % (name, group), heading=heading, rows=rows)

    def row(self, name: str, columns: Sequence[Column], row: Message) -> Html:
        """A row of a table: a node or a reading by its slot, an event by its time."""
        number = row.get("slot") or int(row["time"] * 1e6)
        cells = draw_cells(name, columns, row, self.site)
        return fill(ROW_HTML, id="%s_%s" % (name, number), cells=cells)


@functools.lru_cache(maxsize=TILES_KEPT)
def draw_tile(
    slot: int,
    name: str,
    job: Optional[str],
    cpu: float,
    ram: float,
    percent: float,
    marks: str,
    fires: bool,
) -> Html:
    """The tile of a node on the map, as high as percent; its label tells what colour cannot.

    Between two pages few nodes have sent: the other tiles are those that were drawn before.
    """
    level = "v%d" % round(percent * TILE_STEPS / 100)
    label = "%s, job %s, CPU %.1f %%, RAM %.1f %% %s"
    return fill(
        TILE_HTML,
        slot=slot,
        kind=level + " al" if fires else level,
        href=named_path("node", name),
        label=label % (name, job or "-", cpu, ram, marks),
    )


def fold_events(events: List[Message]) -> List[Message]:
    """Events, the newest first; what many nodes of a job did at once is told in one row."""
    folded: List[Message] = []
    firsts: Dict[Any, Message] = {}
    for event in events:
        key = (event["kind"], event["job"])
        first = firsts.get(key)
        if event["kind"] not in FOLDED_EVENTS or not event["job"]:
            folded.append(event)
        elif first and first["time"] - event["time"] < FOLD_SECONDS:
            first["others"].append(name_of(event))
        else:
            firsts[key] = dict(event, others=[])
            folded.append(firsts[key])
    for event in folded:
        others = sorted(event.get("others", ()), key=natural)
        if others:
            more = ", ".join(others[:SHOWN_OTHERS])
            more += ", ..." if len(others) > SHOWN_OTHERS else ""
            event["text"] = "and %s: %s" % (counted(len(others), "more node"), more)
    return folded


def demo_notice(site: Site) -> Optional[Html]:
    """That all is invented, if it is."""
    options = getattr(site, "options", None)
    if not getattr(options, "demo", False):
        return None
    return fill(NOTICE_HTML, text=DEMO_NOTICE)


def has_any(rows: List[Message], column: Column) -> bool:
    """Whether some row has a value for the column."""
    return any(row.get(column.key) is not None for row in rows)


def render_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of all nodes."""
    return Page(view, query, site).all_nodes()


def render_job_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of the job that the query names; "" if it is not known."""
    return Page(view, query, site).one_job()


def render_node_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of the node that the query names; "" if it is not known."""
    return Page(view, query, site).one_node()


# ============================================================================
# Pages for programs: a snapshot -> JSON, CSV, text, Prometheus
# ============================================================================

FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # half and full width
MAX_CELL = 32  # letters of a reading in the text table


def as_json(answer: Message) -> str:
    """An answer as one line of JSON."""
    return json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n"


def render_nodes_json(view: Snapshot, query: Query, site: Site = None) -> str:
    """The live table as JSON."""
    return as_json(
        {"time": round(view.time, 3), "capacity": view.capacity, "nodes": view.nodes}
    )


def render_jobs_json(view: Snapshot, query: Query, site: Site = None) -> str:
    """The jobs as JSON: what Slurm says of each; times in seconds since 1970, mem in bytes."""
    judged = verdicts_of(view)
    jobs = [
        dict(job, verdicts=judged.get(job["raw"], [])) for job in jobs_in_order(view)
    ]
    return as_json(
        {"time": round(view.time, 3), "left_out": view.jobs_left_out, "jobs": jobs}
    )


def render_job_json(view: Snapshot, query: Query, site: Site = None) -> str:
    """One job as JSON with its nodes, and of each its CPUs, ranks and GPUs; "" for no such job."""
    job = find_job(view, query["job"])
    if not job:
        return ""
    nodes = []
    for row in nodes_of_job(view, job):
        parts = view.parts(row["slot"])
        node = {key: row[key] for key in NODE_KEYS}
        node.update(
            look=parts.look, cores=parts.cores, ranks=parts.ranks, gpus=parts.gpus
        )
        nodes.append(node)
    answer = dict(job, verdicts=verdicts_of(view).get(job["raw"], []), nodes=nodes)
    return as_json({"time": round(view.time, 3), "job": answer})


def render_events_json(view: Snapshot, query: Query, site: Site = None) -> str:
    """The events as JSON, the oldest first."""
    return as_json({"events": view.events})


def render_csv(view: Snapshot, query: Query, site: Site = None) -> str:
    """The live table as CSV (RFC 4180), in which no text is a formula to a spreadsheet."""
    keys = ["slot", "address", "age", "since", "alerts"]
    keys += [metric.key for metric in METRICS]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(keys)
    for node in view.nodes:
        table.writerow([as_csv(node[key]) for key in keys])
    return text.getvalue()


def as_csv(value: Any) -> Any:
    """A value as a cell of CSV: what a spreadsheet would compute is quoted."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value


def render_nodes_text(view: Snapshot, query: Query, site: Site = None) -> str:
    """The live table as aligned text; width in the query cuts its lines."""
    nodes = select(view, query)
    title, cards = figures(view, nodes)
    lines = [" | ".join([title] + [" ".join(card) for card in cards])]
    jobs = job_rows(view)
    if view.jobs or verdicts_of(view):  # of others the nodes tell as much
        lines += text_table(jobs, JOB_COLUMNS) + [""]
    lines += text_table(nodes, COLUMNS)
    return cut_lines("".join(line + "\n" for line in lines), query)


def cut_lines(text: str, query: Query) -> str:
    """A text whose lines are cut at the width in the query, if there is one."""
    width = query.get("width", "")
    if not width.isdecimal():
        return text
    cut = int(width)
    return "".join(line[:cut] + "\n" for line in text.splitlines())


def text_table(rows: List[Message], columns: Sequence[Column]) -> List[str]:
    """The lines of a table with the columns that have something to tell, its heading first."""
    always = ("node", "cpu", "ram")
    known = [
        column for column in columns if column.key in always or has_any(rows, column)
    ]
    table = [[column.heading for column in known]]
    table += [[text_cell(column, row) for column in known] for row in rows]
    widths = [max(map(text_width, texts)) for texts in zip(*table)]
    lines = []
    for texts in table:
        cells = map(align, known, texts, widths)
        lines.append("  ".join(cells).rstrip())
    return lines


def text_cell(column: Column, row: Message) -> str:
    """What a cell says; what one acts upon or has to read is whole."""
    if column.key == "node":
        return name_of(row)
    text = render_value(column.key, row.get(column.key))
    is_ours = column.align == WRAPPED or column.key == "state"
    return text if is_ours else text[:MAX_CELL]


def text_width(text: str) -> int:
    """How many columns of a terminal a text takes (Unicode, UAX 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide


def align(column: Column, text: str, width: int) -> str:
    """A text with blanks, so that it takes the width of its column."""
    blanks = " " * (width - text_width(text))
    return blanks + text if column.align == RIGHT else text + blanks


class Family(NamedTuple):
    """What Prometheus calls a metric family: its series by their labels, without sentinel_."""

    name: str
    help: str
    series: Iterable[Tuple[str, Optional[float]]]


def render_metrics(view: Snapshot, query: Query, site: Site) -> str:
    """Prometheus text format 0.0.4; a collector that is silent has no nodes."""
    nodes = nodes_by_labels(view.nodes) if view.beat <= STALE_SECONDS else {}
    families = node_families(nodes)
    families.append(Family("nodes", "Nodes that send", [("", len(nodes))]))
    families += master_families(view, site)
    return "".join(map(render_family, families))


def node_families(nodes: Dict[str, Message]) -> List[Family]:
    """What is known of the nodes, each with its labels: METRICS, ages and alerts."""
    families = []
    for metric in METRICS:
        if metric.prometheus:
            series = [(labels, node[metric.key]) for labels, node in nodes.items()]
            name = "node_" + metric.prometheus
            families.append(Family(name, metric.help, series))
    ages = [(labels, node["age"]) for labels, node in nodes.items()]
    families.append(Family("node_age_seconds", "Time since the last sample", ages))
    alerts = []
    for labels, node in nodes.items():
        for rule in (node["alerts"] or "").split():
            alerts.append((labels + ',rule="%s"' % rule, 1))
    families.append(Family("node_alert", "Rule that fires", alerts))
    return families


def master_families(view: Snapshot, site: Site) -> List[Family]:
    """What the master itself has seen and takes."""
    lost = [(labels_of(event), 1) for event in gone(view, "lost")]
    totals: Tuple[Tuple[str, str, Optional[float]], ...] = (
        ("samples_total", "Samples taken", view.samples),
        (
            "turned_away_total",
            "Agents turned away for want of threads or descriptors",
            view.turned_away,
        ),
        (
            "turned_away_lately",
            "Agents turned away in the last minute",
            view.turned_away_lately,
        ),
        (
            "looks_left_out_total",
            "Looks at a node's processes and GPUs that there was no room for",
            view.parts_left_out,
        ),
        (
            "collector_silence_seconds",
            "Time since the collector's heartbeat",
            view.beat,
        ),
        (
            "master_cpu_seconds_total",
            "CPU time of the master",
            site.cost.get("seconds"),
        ),
        (
            "master_memory_bytes",
            "The master's resident memory",
            site.cost.get("memory"),
        ),
    )
    families = [Family("node_lost", "Node that was lost in the last ten minutes", lost)]
    families += [Family(name, text, [("", value)]) for name, text, value in totals]
    return families


def nodes_by_labels(nodes: List[Message]) -> Dict[str, Message]:
    """The nodes by labels of their own: two of one name have their slots, too."""
    named: Dict[str, Message] = {}
    for node in nodes:
        labels = labels_of(node)
        if labels in named:
            labels = labels_of(node, slot=str(node["slot"]))
        named[labels] = node
    return named


def labels_of(row: Message, **more: str) -> str:
    """The labels of a node's series, escaped: JSON's escapes are a part of Prometheus'."""
    named = {"node": name_of(row), "job": row["job"] or "", "user": row["user"] or ""}
    named.update(more)
    return ",".join(
        "%s=%s" % (key, json.dumps(value, ensure_ascii=False))
        for key, value in named.items()
    )


def render_family(family: Family) -> str:
    """The lines of a family; a series without a value has none."""
    name = "sentinel_" + family.name
    kind = "counter" if name.endswith("_total") else "gauge"
    lines = ["# HELP %s %s\n" % (name, family.help), "# TYPE %s %s\n" % (name, kind)]
    for labels, value in family.series:
        if value is not None:
            lines.append("%s{%s} %.15g\n" % (name, labels, value))
    return "".join(lines)


def render_health(view: Snapshot, query: Query, site: Site) -> str:
    """That the collector is well, with what keeps agents away; and what the master takes."""
    lines = ["ok"]
    if view.turned_away_lately:
        lines[0] += ", but " + render_turned_away(view)
    if "verbose" in query:
        lines.append(site.cost["text"])
    return "".join(line + "\n" for line in lines)


HTML = "text/html; charset=utf-8"
JSON = "application/json; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
CSV = "text/csv; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
ROUTES: Dict[str, Tuple[str, Callable[..., str]]] = {
    "/": (HTML, render_page),
    "/node/": (HTML, render_node_page),
    "/api/nodes": (JSON, render_nodes_json),
    "/api/jobs": (JSON, render_jobs_json),
    "/job/": (HTML, render_job_page),
    "/api/job/": (JSON, render_job_json),
    "/api/events": (JSON, render_events_json),
    "/nodes.csv": (CSV, render_csv),
    "/nodes.txt": (TEXT, render_nodes_text),
    "/metrics": (PROMETHEUS, render_metrics),
    "/healthz": (TEXT, render_health),
}

# ============================================================================
# Reports: records -> HTML, CSV, JSON and text: jobs of the past, and those that run
# ============================================================================

REPORT_STYLE = """\
/* Reports: the charts of a whole job, the map of its nodes over time, verdicts; print */
.charts {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr));
  gap: 0.6rem;
  margin: 0 0 1rem;
}
.charts figure {
  grid-column: auto;
}
.charts svg {
  display: block;
  width: 100%;
  height: auto;
}
svg text {
  fill: var(--dim);
  font: 12px system-ui;
}
.grid {
  stroke: var(--line);
  stroke-width: 1;
}
.limit {
  stroke: var(--bad);
  stroke-dasharray: 6 4;
}
.mark {
  stroke: var(--bad);
  stroke-width: 1;
  stroke-dasharray: 1 3;
}
.mark.end {
  stroke: var(--fg);
  stroke-dasharray: none;
}
.band {
  fill: var(--cpu);
  stroke: none;
  opacity: 0.22;
}
.other {
  stroke: var(--ram);
  stroke-dasharray: 5 3;
}
.band.other {
  fill: var(--ram);
  stroke: none;
}
.cell {
  fill: var(--cpu);
  stroke: none;
}
.map path {
  stroke-width: inherit;
  stroke-linecap: butt;
  vector-effect: none;
}
#jobs [data-what] {
  min-width: 0; /* this page does not renew itself */
}
#jobs .w {
  min-width: 16rem;
}
#jobs td:not(.w, .t, .s) {
  white-space: nowrap;
}
@media (max-width: 1500px) {
  #jobs .w {
    min-width: 12rem;
  }
  #jobs .t {
    min-width: 10.5rem;
  }
  #jobs td,
  #jobs th {
    padding: 0.18rem 0.35rem;
  }
}
@media (max-width: 1150px) {
  #jobs .w {
    min-width: 0;
    width: 100%;
  }
  #jobs .n .bar {
    display: none;
  }
}
.choice label {
  flex: 1 1 16rem;
  max-width: 32rem;
}
@media (max-width: 700px) {
  #jobs .t {
    min-width: 0;
  }
  #use td,
  #compare td,
  #failures td,
  #spread td,
  #spread th,
  #nodes td,
  #nodes th {
    white-space: normal;
    padding: 0.18rem 0.3rem;
  }
  #compare td,
  #failures td {
    overflow-wrap: anywhere;
  }
  #spread tr > :last-child {
    display: none;
  }
}
@media screen {
  #jobs td.d {
    white-space: nowrap;
  }
}
.verdicts {
  list-style: none;
  margin: 0 0 1.4rem;
  padding: 0;
}
.verdicts li {
  background: var(--card);
  border-left: 0.3rem solid var(--dim);
  margin: 0 0 0.5rem;
  padding: 0.4rem 0.8rem;
  overflow-wrap: anywhere;
}
.verdicts .problem,
.verdicts .died {
  border-color: var(--bad);
}
.verdicts p {
  margin: 0.2rem 0 0;
}
pre {
  white-space: pre-wrap;
  overflow-wrap: anywhere;
}
@media print {
  @page {
    size: A4;
    margin: 12mm;
  }
  :root {
    --bg: #fff;
    --fg: #000;
    --dim: #444;
    --line: #ccc;
    --card: #fff;
    --cpu: #2563c9;
    --ram: #0b8a70;
    --bad: #b3261e;
    font-size: 10px;
  }
  body {
    padding: 0;
  }
  nav,
  form {
    display: none;
  }
  .charts {
    grid-template-columns: 1fr 1fr;
  }
  figure,
  li,
  tr,
  dl div {
    break-inside: avoid;
  }
  .scroll {
    overflow: visible;
  }
  th,
  td {
    white-space: normal;
    overflow-wrap: anywhere;
  }
  .cell,
  .band {
    print-color-adjust: exact;
  }
}
"""

REPORT_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{title} - Cluster Sentinel</title>
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <link rel="icon" href="data:,">
  <style>{style}</style>
</head>
<body>
  <main>{nav}
    <h1>{title}</h1>{parts}
    <footer>{footer}</footer>
  </main>
</body>
</html>
"""
REPORT_NAV_HTML = """
    <nav aria-label="Pages"><a href="{root}./">All jobs and nodes</a>
      <a href="{root}jobs">Jobs of the past</a></nav>"""
PARAGRAPH_HTML = """
    <p>{text}</p>"""
MISSING_HTML = """
    <p>{words}. <a href="{root}jobs">The list of jobs</a> has those that are known.</p>"""
SECTION_HTML = """
    <section>
      <h2>{heading}</h2>{parts}
    </section>"""
VERDICTS_HTML = """
    <ul class="verdicts">{verdicts}
    </ul>"""
VERDICT_HTML = """
      <li class="{severity}"><b>{word}:</b> {what}{proof}{cure}</li>"""
PROOF_HTML = "<p><small>{}</small></p>"
CURE_HTML = "<p>\u2192 <code>{}</code></p>"
PASTE_HTML = """
      <pre>{lines}</pre>
      <p><small>{why}</small></p>"""
CHARTS_HTML = """
    <div class="charts">{charts}
    </div>"""
CHART_HTML = """
      <figure>
        <figcaption>{label} <b>{words}</b></figcaption>
        <svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}: {words}">{drawn}</svg>
      </figure>"""
TEXT_SVG = '<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
PATH_SVG = '<path class="{kind}" d="{path}"/>'
MAP_SVG = (
    '<g class="map" transform="translate({x} {y}) scale({width} {height})"'
    ' stroke-width="{line}">{shades}</g>'
)
SHADE_SVG = '<path stroke-opacity="{share}" d="{path}"/>'
DOWNLOAD_HTML = (
    '<a id="record" download="{name}" href="data:application/gzip;base64,{data}">'
    "The record itself</a>, as JSON lines in gzip. "
)
TIME_CELL_HTML = '<td class="{kind}" title="{title}">{text}</td>'
BAD_TEXT_CELL_HTML = '<td class="w"><span class="bad">{text}</span></td>'
JOBS_FORM_HTML = """
    <form role="search" action="jobs">
      <label>Filter <input type="search" name="q" value="{words}"></label>{selects}
      <input type="hidden" name="sort" value="{sort}">
      <button type="submit">Show</button>
    </form>"""
JOBS_LINKS_HTML = """
    <p><a href="{text}">Text</a> <a href="{csv}">CSV</a> <a href="{json}">JSON</a></p>"""
BARS_HTML = (
    '<td><svg class="line" viewBox="0 0 {width} 100" preserveAspectRatio="none"'
    ' role="img" aria-label="{words}"><path class="cell" d="{path}"/></svg></td>'
)
RUNS_LINK_HTML = """
    <p><a href="../runs?{query}">All runs of {name}</a></p>"""
COMPARED_HTML = """
    <p>{name}: <a href="{href}">{title}</a>. {words}</p>"""
COMPARE_FORM_HTML = """
    <form action="{root}compare">
      <input type="hidden" name="a" value="{job}">
      <label>Compare with job <input type="text" name="b" value=""></label>
      <button type="submit">Compare</button>
      <small>Without an id you choose from a list.</small>
    </form>"""
CHOICE_FORM_HTML = """
    <form class="choice" action="compare">{selects}
      <label>or B by its id <input type="text" name="id" value=""></label>
      <button type="submit">Compare</button>
    </form>"""
CHOICE_HTML = """
      <label>Job {label}
        <select name="{key}">{options}
        </select>
      </label>"""
CHOICE_OPTION_HTML = """
          <option value="{job}"{selected}>{words}</option>"""

MAX_REPORT = 2**20  # bytes of a report: the record in it gets thinner until it fits
CHART_WIDTH = 600  # of a chart's box, in which ...
CHART_HEIGHT = 170
CHART_LEFT = 78  # ... the curve has this
CHART_RIGHT = 588
CHART_TOP = 10
CHART_BOTTOM = 146
MAP_NODES = 128  # nodes in the map
MAP_CELL = 14  # height of a cell, as long as there are few
MAX_MARKS = 40  # events in a chart
MAX_ROWS = 500  # of a table in a report
JOBS_PAGE = 200  # jobs on a page
URGENT_SECONDS = 86400.0  # after its end a death is first in the list of jobs
MIN_RUNS = 3  # that advice on many runs rests upon, at least
SUFFICES = 0.995  # the share of runs that what is advised would have sufficed for
RUNS_TIME_MARGIN = 1.2  # of the time that so many runs took
CPU_SLACK = 0.1  # of a CPU: what is busy beside the program itself
SPREAD_BARS = 20
MAX_CHOICES = 100  # jobs in a list to choose from
MAX_WHERE = 8  # nodes and jobs that are named of a kind of failure
MEMORY_MARGIN = 1.2  # of the peak, to ask for ...
TIME_MARGIN = 1.5  # ... and of the time that one run took
TIME_STEPS = (  # seconds between two marks of a time axis
    (1, 2, 5, 10, 15, 30)
    + tuple(60 * n for n in (1, 2, 5, 10, 15, 30))
    + tuple(3600 * n for n in (1, 2, 3, 6, 12))
    + tuple(86400 * n for n in (1, 2, 7, 14, 28, 91, 364))
)
EVENTS_MARKED = ("lost", "alert")
SEVERITY_WORDS = {
    "fine": "\u2713 Fine",
    "advice": "\u2022 Advice",
    "problem": "\u26a0 Problem",
    "died": "\u2716 Died",
    "": "Not judged",
}
EXPLAIN_CODES = {"fine": 0, "": 0, "advice": 1, "problem": 2, "died": 3}
EXIT_UNKNOWN = 4  # of --explain: there is no record of such a job
UNITS.update(
    peak="B", mem_limit="B", ran="s", mean="s", most="s", power="W", temp="\u00b0C"
)
UNITS.update(peak_mem="B", read_total="B", write_total="B", rank_cpu="%", got="")

# ---- axes and curves


class Series(NamedTuple):
    """Curves for charts; kind: their class, shift: what makes their time the axis' own."""

    curves: Dict[str, List[Piece]]  # by metric
    kind: str = ""
    shift: float = 0.0
    name: str = ""  # what tells them from others in the same charts


class Axis(NamedTuple):
    """A time axis: of the clock, or since a job's start."""

    first: float
    last: float
    is_clock: bool = True

    def place(self, when: float) -> float:
        """Where a time is, in a chart's box."""
        share = (when - self.first) / (self.last - self.first)
        return CHART_LEFT + (CHART_RIGHT - CHART_LEFT) * share

    def marks(self) -> Iterator[Tuple[float, str]]:
        """The times that are written below, at whole minutes or hours: (place, words)."""
        span = self.last - self.first
        step = next((step for step in TIME_STEPS if span / step <= 7), TIME_STEPS[-1])
        offset = time.localtime(self.first).tm_gmtoff if self.is_clock else 0
        when = -(-(self.first + offset) // step) * step - offset
        if not self.is_clock:
            when = 0.0
        while when <= self.last:
            yield self.place(when), self.words(when, step)
            when += step

    def words(self, when: float, step: float) -> str:
        """How a time is written, as exactly as the step needs it."""
        if not self.is_clock:
            return elapsed_words(int(when), step)
        moment = time.localtime(when)
        if step >= 86400 or moment[3:6] == (0, 0, 0):
            return time.strftime("%d %b", moment)
        return time.strftime("%R" if step >= 60 else "%T", moment)


def elapsed_words(seconds: int, step: float) -> str:
    """A time since a start, as exactly as the step between marks needs it."""
    if not seconds:
        return "start"
    for size, unit, larger in ((86400, "d", ""), (3600, "h", ""), (60, "min", "h")):
        if step >= size:
            if larger and seconds >= 60 * size:
                return "%d:%02d %s" % (*divmod(seconds // size, 60), larger)
            return "%d %s" % (seconds // size, unit)
    if seconds >= 60:
        return "%d:%02d min" % divmod(seconds, 60)
    return "%d s" % seconds


class Mark(NamedTuple):
    """An upright line in a chart: when something happened, and what."""

    time: float
    words: str


def nice_top(key: str, most: float) -> Tuple[float, float]:
    """A round end for a value axis, and the step between its marks."""
    if UNITS.get(key) == "%":
        return max(100.0, most), 50.0
    unit = 1.0
    for _, size in SCALES.get(UNITS.get(key, "").partition("/")[0], ()):
        if most >= size:
            unit = size
    share = max(most / unit, 1e-9)
    power = 10.0 ** math.floor(math.log10(share))
    factor = next(
        factor for factor in (1, 2, 2.5, 5, 10) if share <= factor * power * 1.001
    )
    top = factor * power * unit
    return top, top / (2 if factor in (1, 2, 10) else 5 if factor == 2.5 else 5)


def draw_chart(
    key: str,
    several: Sequence[Series],
    axis: Axis,
    limit: Optional[float] = None,
    marks: Sequence[Mark] = (),
) -> Optional[Html]:
    """Least, mean and most of a metric over the time; None when nothing is known."""
    curves = [(series, series.curves.get(key, [])) for series in several]
    everything = [piece for _, pieces in curves for piece in pieces]
    if not everything:
        return None
    most = max(max(piece.most) for piece in everything)
    is_near = limit is not None and most < limit < 3 * most
    top, step = nice_top(key, float(limit or 0) if is_near else most)
    drawn = [draw_axes(key, axis, top, step)]
    for series, pieces in curves:
        own_axis = Axis(axis.first + series.shift, axis.last + series.shift)
        places = [places_of(tuple(piece.times), own_axis) for piece in pieces]
        for piece, texts in zip(pieces, places):
            drawn.append(draw_band(series, piece, texts, top))
        for piece, texts in zip(pieces, places):
            drawn.append(draw_mean(series, piece, texts, top))
    if limit is not None and limit <= top:
        path = "M%d %.1fH%d" % (CHART_LEFT, height_of(limit, top), CHART_RIGHT)
        drawn.append(fill(PATH_SVG, kind="limit", path=path))
        drawn.append(limit_text(key, limit, top))
    drawn += draw_marks(marks, axis)
    words = [
        (series.name + " " + curve_words(key, pieces)).lstrip()
        for series, pieces in curves
        if pieces
    ]
    return fill(
        CHART_HTML,
        label=NUMBERS[key].label,
        words="; ".join(words),
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        drawn=drawn,
    )


def limit_text(key: str, limit: float, top: float) -> Html:
    """What the line of a limit is, above it or, at the top of the chart, below."""
    y = height_of(limit, top)
    y += 13 if y < CHART_TOP + 12 else -4
    words = "limit %s" % render_value(key, limit)
    place = CHART_LEFT + 4
    return fill(TEXT_SVG, x=place, y="%.0f" % y, anchor="start", text=words)


def draw_marks(marks: Sequence[Mark], axis: Axis) -> List[Html]:
    """Upright lines where something happened; of each kind the first says what it was."""
    drawn = []
    told: Set[str] = set()
    for when, words in marks[:MAX_MARKS]:
        x = axis.place(when)
        kind = "mark" if words in EVENTS_MARKED else "mark end"
        path = "M%.1f %dV%d" % (x, CHART_TOP, CHART_BOTTOM)
        drawn.append(fill(PATH_SVG, kind=kind, path=path))
        if words in told:
            continue
        told.add(words)
        anchor, away = ("end", -4) if x > CHART_WIDTH / 2 else ("start", 4)
        y = CHART_BOTTOM - 6 - 14 * (len(told) - 1)
        place = "%.0f" % (x + away)
        drawn.append(fill(TEXT_SVG, x=place, y=y, anchor=anchor, text=words))
    return drawn


def curve_words(key: str, pieces: Sequence[Piece]) -> str:
    """A curve in words: its least, mean and most."""
    weight = sum(sum(piece.steps) for piece in pieces)
    total = sum(sum(map(operator.mul, piece.steps, piece.means)) for piece in pieces)
    least = min(min(piece.least) for piece in pieces)
    most = max(max(piece.most) for piece in pieces)
    middle = total / max(weight, 1e-9)
    texts = [render_value(key, value) for value in (least, middle, most)]
    return "%s to %s, mean %s" % (texts[0], texts[2], texts[1])


def height_of(value: float, top: float) -> float:
    """Where a value is, in a chart's box."""
    share = min(max(value / top, 0.0), 1.0)
    return CHART_BOTTOM - (CHART_BOTTOM - CHART_TOP) * share


def draw_axes(key: str, axis: Axis, top: float, step: float) -> Html:
    """The lines and words of both axes."""
    parts: List[Html] = []
    path = ""
    value = 0.0
    while value <= top * 1.001:
        y = height_of(value, top)
        path += "M%d %.1fH%d" % (CHART_LEFT, y, CHART_RIGHT)
        text = render_value(key, value)
        parts.append(
            fill(
                TEXT_SVG, x=CHART_LEFT - 6, y="%.0f" % (y + 4), anchor="end", text=text
            )
        )
        value += step
    parts += time_texts(axis, CHART_BOTTOM + 17)
    for x, _ in axis.marks():
        path += "M%.1f %dV%d" % (x, CHART_TOP, CHART_BOTTOM)
    return Html(fill(PATH_SVG, kind="grid", path=path) + "".join(parts))


def time_texts(axis: Axis, y: int) -> List[Html]:
    """The words below a time axis; the last ones end where the axis does."""
    texts = []
    for x, text in axis.marks():
        anchor = "end" if x > CHART_RIGHT - CHART_TOP else "middle"
        texts.append(fill(TEXT_SVG, x="%.0f" % x, y=y, anchor=anchor, text=text))
    return texts


@functools.lru_cache(maxsize=64)
def places_of(times: Tuple[float, ...], axis: Axis) -> List[str]:
    """Where points are on the time axis, as text: most metrics of a job have the same times."""
    return ["%.1f " % axis.place(when) for when in times]


def draw_band(series: Series, piece: Piece, places: Sequence[str], top: float) -> Html:
    """The area between least and most."""
    there = curve_points(places, piece.most, top)
    back = curve_points(places, piece.least, top)
    path = "M%sZ" % "L".join(there + back[::-1])
    return fill(PATH_SVG, kind=("band " + series.kind).rstrip(), path=path)


def draw_mean(series: Series, piece: Piece, places: Sequence[str], top: float) -> Html:
    """The curve of the mean; a point alone is a short line."""
    points = curve_points(places, piece.means, top)
    end = "h1" if len(points) == 1 else ""
    return fill(PATH_SVG, kind=series.kind, path="M" + "L".join(points) + end)


# Every height in a chart as text: writing the number anew for each point takes most of a page.
HEIGHTS = [
    "%.1f" % (CHART_BOTTOM - tenths / 10)
    for tenths in range(10 * (CHART_BOTTOM - CHART_TOP) + 1)
]


def curve_points(
    places: Sequence[str], values: Sequence[float], top: float
) -> List[str]:
    """The points of a curve, as a path has them."""
    if min(values) < 0 or max(values) > top:
        values = [min(max(value, 0.0), top) for value in values]
    scale = (len(HEIGHTS) - 1) / top
    return [
        place + HEIGHTS[int(scale * value + 0.5)]
        for place, value in zip(places, values)
    ]


def draw_map(key: str, nodes: NodeMap, axis: Axis) -> Optional[Html]:
    """A row for each node, the darker the more: which one is not like the others?"""
    names = sorted(nodes.levels, key=natural)[:MAP_NODES]
    if len(names) < 2:
        return None
    paths = map_paths([nodes.levels[name] for name in names])
    cell = map_cell(len(names))
    shades = []
    for level, path in sorted(paths.items()):
        share = 0.04 + 0.96 * LEVEL_DIGITS.index(level) / MAP_LEVELS
        shades.append(fill(SHADE_SVG, share="%.2f" % share, path=path))
    drawn = [
        fill(
            MAP_SVG,
            x=CHART_LEFT,
            y=CHART_TOP + cell / 2,
            width=(CHART_RIGHT - CHART_LEFT) / MAP_COLUMNS,
            height=cell,
            line="%.2f" % (1 - 1 / cell),
            shades=shades,
        )
    ]
    every = max(1, -(-12 // cell))
    for place in range(0, len(names), every):
        y = CHART_TOP + cell * place + cell // 2 + 4
        text = names[place][:11]
        drawn.append(fill(TEXT_SVG, x=CHART_LEFT - 6, y=y, anchor="end", text=text))
    bottom = CHART_TOP + cell * len(names)
    drawn += time_texts(axis, bottom + 17)
    words = "each node over time, from 0 (faint) to %s (strong)" % render_value(
        key, nodes.top
    )
    return fill(
        CHART_HTML,
        label=NUMBERS[key].label,
        words=words,
        width=CHART_WIDTH,
        height=bottom + 24,
        drawn=drawn,
    )


def map_cell(nodes: int) -> int:
    """How high a cell is."""
    return MAP_CELL if nodes <= 32 else MAP_CELL // 2


SAME_LEVELS = re.compile(r"(\w)\1*")


def map_paths(lines: Sequence[str]) -> Dict[str, str]:
    """For each level of shade: the path along its cells; lines: of each node its levels.

    A cell is as wide and as high as 1.
    """
    places = ["M%d " % column for column in range(MAP_COLUMNS)]
    lengths = ["h%d" % count for count in range(MAP_COLUMNS + 1)]
    paths: Dict[str, List[str]] = {level: [] for level in LEVEL_DIGITS}
    for node, line in enumerate(lines):
        y = str(node)
        for same in SAME_LEVELS.finditer(line):
            begin, end = same.span()
            path = places[begin] + y + lengths[end - begin]
            paths[line[begin]].append(path)
    return {level: "".join(pieces) for level, pieces in paths.items() if pieces}


# ---- tables


def draw_date(column: Column, row: Message, site: Site) -> Html:
    """A day and a time."""
    return fill(CELL_HTML, kind=column.align, content=render_date(row.get(column.key)))


def draw_moment(column: Column, row: Message, site: Site) -> Html:
    """A day and a time, to the second."""
    text = time.strftime("%F %T", time.localtime(row[column.key]))
    return fill(CELL_HTML, kind=column.align, content=text)


def render_date(when: Optional[float]) -> str:
    """A day and a time for people."""
    if not when:
        return "-"
    return time.strftime("%F %R", time.localtime(when))


def short_date(when: float, now: float) -> str:
    """A time as short as it is clear: 01:05 of today, 28 Nov 22:50, 2025-11-28."""
    moment = time.localtime(when)
    today = time.localtime(now)
    if moment[:3] == today[:3]:
        return time.strftime("%R", moment)
    is_near = abs(when - now) < 300 * 86400
    return time.strftime("%d %b %R" if is_near else "%F", moment)


def moment_words(job: Message, now: float) -> Tuple[str, str]:
    """When a job ended, started or may start: (short, and with all that there is to say)."""
    prefix = "since "
    when, words = job["start"], "started"
    if job["state"] == "PENDING" and when:
        prefix = "expected "
        words = "expected to start"
    elif job["state"] == "PENDING":
        when, words = job["submit"], "submitted"
    elif is_over_by_now(job):
        prefix = ""
        when, words = job["end"] or job["time"], "ended"
    if not when:
        return "-", ""
    text = short_date(when, now)
    if " " not in text:  # else there is little room, and the state says the same
        text = prefix + text
    return text, "%s %s" % (words, render_date(when))


def is_over_by_now(job: Message) -> bool:
    """Whether a job has ended, as far as Slurm or its agents tell."""
    return job["state"] in ENDED_STATES or bool(job["has_ended"])


def draw_when(column: Column, row: Message, site: Site) -> Html:
    """When a job ended, or since when it runs or waits."""
    text, title = moment_words(row, time.time())
    kind = UNKNOWN_CELL if text == "-" else LEFT
    return fill(TIME_CELL_HTML, kind=kind, title=title, text=text)


def draw_why(column: Column, row: Message, site: Site) -> Html:
    """What is wrong with a job, how it died, or why there is no verdict on it."""
    text = verdict_text(row)
    if not text:
        return fill(CELL_HTML, kind="w " + UNKNOWN_CELL, content="-")
    if severity_of(row) in ("died", "problem"):
        return fill(BAD_TEXT_CELL_HTML, text=text)
    return fill(CELL_HTML, kind="w", content=text)


def draw_state(column: Column, row: Message, site: Site) -> Html:
    """A job's state in words."""
    return fill(CELL_HTML, kind="s", content=plain_state(row["state"]))


def plain_state(state: Optional[str]) -> str:
    """A state of Slurm's as people write it; of a job that only agents know of: unknown."""
    return (state or "unknown").lower().replace("_", " ")


def draw_clock(column: Column, row: Message, site: Site) -> Html:
    """How long a job ran of its time limit, as the overview has it."""
    text = clock_text(row["ran"], row["limit"]) if row["state"] != "PENDING" else None
    if text is None and row["limit"]:
        text = "limit " + render_clock(row["limit"])
    return fill(CELL_HTML, kind=RIGHT if text else RIGHT_UNKNOWN, content=text or "-")


def clock_text(ran: Optional[float], limit: Optional[float]) -> Optional[str]:
    """7 min of 2:00 h; None when it has not run."""
    if ran is None:
        return None
    text = render_clock(ran)
    if not limit:
        return text
    whole = render_clock(limit)
    if whole.endswith(" h"):  # one unit is enough for both
        text = text.replace(" h", "")
    return "%s of %s" % (text, whole)


def draw_busy(column: Column, row: Message, site: Site) -> Html:
    """How busy all CPUs or GPUs of a job were in the mean: 57 % of 128."""
    busy = row[column.key]
    count = row[column.key + "s"]
    asked = render_value("nodes", count)
    if busy is None:
        text = "asked " + asked if count else "-"
        return fill(CELL_HTML, kind=RIGHT_UNKNOWN, content=text)
    text = "%.0f %%" % busy + (" of " + asked if count else "")
    width = "%.1f" % min(busy, 100.0)
    return fill(PERCENT_CELL_HTML, text=text, key=column.key, width=width)


def draw_memory(column: Column, row: Message, site: Site) -> Html:
    """The peak of the node with the most, of what that node has for the job."""
    text = memory_text(row["peak"], row["mem_limit"] or row["mem"])
    share = None
    if row["peak"] and row["mem_limit"]:
        share = 100 * row["peak"] / row["mem_limit"]
    if share is None:
        kind = RIGHT if row["peak"] else RIGHT_UNKNOWN
        return fill(CELL_HTML, kind=kind, content=text or "-")
    width = "%.1f" % min(share, 100.0)
    return fill(PERCENT_CELL_HTML, text=text, key="job_ram", width=width)


def memory_text(peak: Optional[float], limit: Optional[float]) -> str:
    """67 of 128 GB; "" when nothing is known."""
    if peak is None:
        return "asked " + short_size(limit) if limit else ""
    if not limit:
        return short_size(peak)
    used, whole = short_size(peak), short_size(limit)
    if used.split()[-1] == whole.split()[-1]:
        used = used.split()[0]
    return "%s of %s" % (used, whole)


def short_size(size: float) -> str:
    """A size with two or three digits: 16 GB, 5.2 GB."""
    number, unit = render_value("mem", size).split()
    if float(number) >= 10 or number.endswith(".0"):
        number = "%.0f" % float(number)
    return "%s %s" % (number, unit)


def draw_record(column: Column, row: Message, site: Site) -> Html:
    """A job's id, a link to its report."""
    href = "record/" + urllib.parse.quote(row["job"], "")
    return fill(LINK_CELL_HTML, href=href, text=row["job"])


def verdict_words(summary: Message) -> str:
    """The worst verdict on a job in a line."""
    severity = severity_of(summary)
    text = verdict_text(summary)
    if not severity:
        return text[:1].upper() + text[1:]
    words = SEVERITY_WORDS[severity]
    return "%s: %s" % (words, words_of_fine(text)) if text else words


# by a verdict that says no more than its severity
NOT_SAID = ("fine", "Nothing is wrong")


def verdict_text(summary: Message) -> str:
    """What the worst verdict on a job says, or why there is none; "" when all is said."""
    severity = severity_of(summary)
    for verdict in summary["verdicts"] or ():
        if verdict.get("severity") == severity and verdict.get("what") not in NOT_SAID:
            return str(verdict.get("what"))
    if severity == "died":
        words = [plain_state(summary["state"])]
        if summary["exit"]:
            words.append("exit code " + summary["exit"])
        return ", ".join(words)
    if severity:
        return ""
    if summary["state"] == "PENDING":
        return remarks(summary)[0] if summary["reason"] else ""
    if is_watched_job(summary):
        return "not judged"
    return "nobody watched it" if is_over_by_now(summary) else "no verdict yet"


RIGHT_UNKNOWN = RIGHT + " " + UNKNOWN_CELL


def draw_text_as(key: str) -> Draw:
    """The reading of a column as another one is written."""

    def draw(column: Column, row: Message, site: Site) -> Html:
        text = render_value(key, row.get(column.key))
        kind = RIGHT_UNKNOWN if text == "-" else column.align
        return fill(CELL_HTML, kind=kind, content=text)

    return draw


DATED = "d"  # a class of the style sheet, as LEFT is
AS_BYTES = draw_text_as("mem")
AS_PERCENT = draw_text_as("cpu")
AS_COUNT = draw_text_as("nodes")
RECORD_COLUMNS = (
    Column("job", "Job", LEFT, draw_record),
    Column("job_name", "Name"),
    Column("user", "User"),
    Column("state", "State"),
    Column("severity", "Verdict", WRAPPED),
    Column("nodes", "Nodes", RIGHT),
    Column("cpus", "CPUs", RIGHT, AS_COUNT),
    Column("gpus", "GPUs", RIGHT, AS_COUNT),
    Column("ran", "Ran", RIGHT),
    Column("limit", "Time limit", RIGHT),
    Column("cpu", "CPU", RIGHT, draw_percent),
    Column("gpu", "GPU", RIGHT, draw_percent),
    Column("peak", "Peak memory", RIGHT, AS_BYTES),
    Column("mem", "Memory asked for", RIGHT),
    Column("start", "Started", DATED, draw_date),
    Column("end", "Ended", DATED, draw_date),
)
JOBS_COLUMNS = (  # of the page; what matters most is at the left
    Column("severity", "Verdict", LEFT, draw_severity),
    Column("job", "Job", LEFT, draw_record),
    Column("job_name", "Name", BREAKABLE),
    Column("user", "User"),
    Column("state", "State", LEFT, draw_state),
    Column("when", "When", LEFT, draw_when),
    Column("text", "What", WRAPPED, draw_why),
    Column("nodes", "Nodes", RIGHT),
    Column("ran", "Time", RIGHT, draw_clock),
    Column("cpu", "CPUs", RIGHT, draw_busy),
    Column("gpu", "GPUs", RIGHT, draw_busy),
    Column("peak", "Memory", RIGHT, draw_memory),
)
USE_COLUMNS = (
    Column("what", "What"),
    Column("asked", "Asked for", RIGHT),
    Column("got", "Got", RIGHT),
    Column("used", "Used", RIGHT),
)
RUN_NODE_COLUMNS = (
    Column("node", "Node"),
    Column("job_cpus", "CPUs", RIGHT, AS_COUNT),
    Column("cpu", "CPU, mean", RIGHT, AS_PERCENT),
    Column("cpu_most", "CPU, most", RIGHT, AS_PERCENT),
    Column("mem", "Memory, mean", RIGHT, AS_BYTES),
    Column("mem_most", "Memory, most", RIGHT, AS_BYTES),
    Column("gpu", "GPU, mean", RIGHT, AS_PERCENT),
)
RUN_RANK_COLUMNS = (
    Column("rank", "Rank", RIGHT, AS_COUNT),
    Column("node", "Node"),
    Column("pid", "PID", RIGHT, AS_COUNT),
    Column("program", "Program"),
    Column("cpu", "CPU", RIGHT, AS_PERCENT),
    Column("mem", "Memory", RIGHT, AS_BYTES),
    Column("peak", "Peak", RIGHT, AS_BYTES),
    Column("threads", "Threads", RIGHT, AS_COUNT),
    Column("cpus", "Its CPUs", LEFT),
    Column("state", "State"),
    Column("read_total", "Read", RIGHT, AS_BYTES),
    Column("write_total", "Written", RIGHT, AS_BYTES),
)
RUN_GPU_COLUMNS = (
    Column("name", "GPU"),
    Column("gpu", "Busy, mean", RIGHT, AS_PERCENT),
    Column("most", "Busy, most", RIGHT, AS_PERCENT),
    Column("mem", "Memory, most", RIGHT, AS_BYTES),
    Column("power", "Power, most", RIGHT),
    Column("temp", "Temperature, most", RIGHT),
)
RUN_EVENT_COLUMNS = (
    Column("time", "Time", LEFT, draw_moment),
    KIND,
    Column("node", "Node"),
    WHAT,
)
COMPARE_COLUMNS = (
    Column("what", "What"),
    Column("a", "A", RIGHT),
    Column("b", "B", RIGHT),
    Column("words", "B against A", WRAPPED),
)


def draw_table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Message],
    headings: Optional[Sequence[Html]] = None,
) -> Optional[Html]:
    """A table of what is known; None without a row."""
    if not rows:
        return None
    always = columns[0].key
    known = [
        place
        for place, column in enumerate(columns)
        if column.key in (always, "severity", "job", "text")
        or any(row.get(column.key) is not None for row in rows)
    ]
    if headings is None:
        headings = [
            fill(HEADING_HTML, align=heading_align(column), label=column.heading)
            for column in columns
        ]
    lines = []
    for number, row in enumerate(rows[:MAX_ROWS]):
        cells = draw_cells(name, [columns[place] for place in known], row, None)
        lines.append(fill(ROW_HTML, id="%s_%d" % (name, number), cells=cells))
    body = fill(BODY_HTML, id=name + "-all", heading=None, rows=lines)
    return fill(
        TABLE_HTML,
        name=name,
        kind=kind_of_table(name),
        caption=caption,
        headings=[headings[place] for place in known],
        bodies=body,
        end=None,
    )


def heading_align(column: Column) -> str:
    """The class of the cell above a column."""
    return RIGHT if column.align == RIGHT else LEFT


# ---- one job


def is_watched_job(summary: Message) -> bool:
    """Whether anything but Slurm told of a job."""
    return bool(summary["weight"])


def how_it_went(summary: Message) -> str:
    """A job's state in a sentence."""
    state = summary["state"] or "UNKNOWN"
    words = [state.capitalize().replace("_", " ")]
    if not summary["state"]:
        words = ["Its agents left" if summary["has_ended"] else "Seen"]
    if summary["reason"] not in (None, "None"):
        words.append("(%s)" % summary["reason"])
    if summary["exit"] not in (None, "0:0"):
        words.append("with exit code %s" % summary["exit"])
    if summary["end"] and state in ENDED_STATES:
        words.append("on %s" % render_date(summary["end"]))
    if summary["ran"] is not None:
        words.append("after %s" % render_value("ran", summary["ran"]))
    if summary["limit"] is not None:
        words.append("of %s" % render_value("limit", summary["limit"]))
    return " ".join(words)


def title_of(summary: Message) -> str:
    """What a job is called."""
    return " ".join(filter(None, ("Job", summary["job"], summary["job_name"])))


UNWATCHED = (
    "Nobody watched this job: no agent ran beside it. What it used is not known; this is what"
    " Slurm alone says."
)


def unwatched_note(summary: Message) -> Optional[Html]:
    """That nobody has watched a job that is over, if so: dashes alone do not say why."""
    if is_watched_job(summary) or not is_over_by_now(summary):
        return None
    return fill(PARAGRAPH_HTML, text=UNWATCHED)


def cure_of(verdict: Message) -> str:
    """The line to paste of a verdict; "" when it lacks its number: --mem alone is an error."""
    cure = str(verdict.get("cure") or "")
    return "" if cure in ("--mem", "--time") else cure


def known_only(rows: Sequence[Message]) -> List[Message]:
    """The rows without their dashes, so that a column of nothing else is left out."""
    return [
        {key: None if text == "-" else text for key, text in row.items()}
        for row in rows
    ]


def draw_verdicts(sketch: Sketch) -> Html:
    """What was found, the worst first."""
    summary = sketch.summary
    verdicts = list(sketch.verdicts or ())
    if summary["state"] in DEADLY_STATES and not any(
        verdict.get("severity") == "died" for verdict in verdicts
    ):
        verdicts.insert(0, {"severity": "died", "what": how_it_went(summary)})
    if not verdicts:
        severity = severity_of(summary)
        nothing = "nothing was found" if severity else "there is no verdict on it"
        verdicts = [{"severity": severity, "what": nothing}]
    items = []
    for verdict in verdicts:
        severity = verdict.get("severity") or ""
        what = verdict.get("what")
        proof = verdict.get("proof")
        cure = cure_of(verdict)
        items.append(
            fill(
                VERDICT_HTML,
                severity=severity if severity in SEVERITIES else "",
                word=SEVERITY_WORDS.get(severity, severity),
                what=words_of_fine(what),
                proof=fill(PROOF_HTML, proof) if proof else None,
                cure=fill(CURE_HTML, cure) if cure else None,
            )
        )
    return fill(VERDICTS_HTML, verdicts=items)


def use_rows(summary: Message, nodes: int, gpus: int) -> List[Message]:
    """What was asked for, what Slurm gave and what was used of it."""
    busy = None
    if summary["cpu"] is not None and summary["got_cpus"]:
        busy = summary["cpu"] * summary["got_cpus"] / 100
    peak = render_value("mem", summary["peak"])
    if summary["peak"] is not None and summary["mem_limit"]:
        peak += " (%.0f %%)" % (100 * summary["peak"] / summary["mem_limit"])
    rows = (
        ("Nodes", summary["nodes"], nodes or None, None),
        ("CPUs", summary["cpus"], summary["got_cpus"], busy),
        (
            "Memory of the node with the most",
            render_value("mem", summary["mem"]),
            render_value("mem", summary["mem_limit"]),
            peak,
        ),
        ("GPUs", summary["gpus"], gpus or None, busy_gpus(summary)),
        (
            "Time",
            render_value("limit", summary["limit"]),
            None,
            render_value("ran", summary["ran"]),
        ),
    )
    texts = []
    for what, asked, got, used in rows:
        known = [show_amount(value) for value in (asked, got, used)]
        if any(text != "-" for text in known):
            texts.append(dict(zip(("what", "asked", "got", "used"), [what] + known)))
    return texts


def busy_gpus(summary: Message) -> Optional[float]:
    """How many GPUs a job kept busy, in the mean."""
    if summary["gpu"] is None or not summary["gpus"]:
        return None
    return float(summary["gpu"] * summary["gpus"] / 100)


def show_amount(value: Any) -> str:
    """An amount of CPUs and the like for people; a text is one already."""
    if isinstance(value, float) and not value.is_integer():
        return "%.1f" % value
    return render_value("nodes", value)


def suggestions(summary: Message) -> List[str]:
    """The #SBATCH lines that this one run speaks for."""
    lines = []
    peak = summary["peak"]
    state = summary["state"]
    limit = summary["mem_limit"] or summary["mem"]
    if state == "OUT_OF_MEMORY" and limit:
        # as the verdict says
        lines.append("#SBATCH " + memory_flag(limit))
    elif state == "COMPLETED" and peak:
        wanted = memory_to_ask(peak)
        if not summary["mem_limit"] or abs(wanted * GIB - summary["mem_limit"]) > GIB:
            lines.append("#SBATCH --mem=%dG" % wanted)
    if state == "TIMEOUT" and summary["limit"]:
        lines.append("#SBATCH --time=%s" % slurm_time(2 * summary["limit"]))
    elif state == "COMPLETED" and summary["ran"] and summary["limit"]:
        wanted = TIME_MARGIN * summary["ran"]
        if wanted < summary["limit"] / 2:
            lines.append("#SBATCH --time=%s" % slurm_time(wanted))
    return lines


def memory_to_ask(peak: float) -> int:
    """GB to ask for, by a peak in bytes."""
    return max(1, int(-(-MEMORY_MARGIN * peak // GIB)))


def slurm_time(seconds: float) -> str:
    """A time as sbatch takes it, in whole steps of ten minutes, or of one for a short job."""
    step = 600 if seconds > 3600 else 60
    minutes = int(-(-seconds // step)) * step // 60
    days, minutes = divmod(minutes, 1440)
    text = "%02d:%02d:00" % divmod(minutes, 60)
    return "%d-%s" % (days, text) if days else text


def draw_suggestions(summary: Message) -> Optional[Html]:
    """The lines to paste, and what they rest upon."""
    lines = suggestions(summary)
    if not lines:
        return None
    why = (
        "This rests on one run, of which a sample was taken every few seconds: a peak"
        " between two of them may have been higher."
    )
    if not is_watched_job(summary):
        why = (
            "This rests on one run that nobody watched: it is a fifth more than the memory"
            " that it asked for, or twice its time."
        )
    paste = fill(PASTE_HTML, lines="\n".join(lines), why=why)
    return fill(SECTION_HTML, heading="To ask for next time", parts=paste)


def charted_first(verdicts: Sequence[Message]) -> List[str]:
    """The metrics of charts: first those that the verdicts, the worst first, are about."""
    keys: List[str] = []
    for verdict in verdicts:
        rule = verdict.get("rule")
        if rule == "out_of_memory":
            keys.append("job_mem")
        for check in CHECKS:
            if check.name == rule:
                keys += check.holds + check.needs
    wanted = [key for key in keys if key in CHARTED]
    return list(dict.fromkeys((*wanted, *CHARTED)))


def marks_of(events: Sequence[Message], summary: Message, axis: Axis) -> List[Mark]:
    """What is marked in the charts of a job: its end, alerts, and nodes that fell silent."""
    marks = []
    if is_over_by_now(summary) and summary["end"]:
        died = severity_of(summary) == "died"
        words = "died" if died else "ended"
        when = min(summary["end"], axis.last)
        marks.append(
            Mark(when, "%s %s" % (words, time.strftime("%R", time.localtime(when))))
        )
    for event in events:
        if event["kind"] in EVENTS_MARKED and axis.first < event["time"] < axis.last:
            marks.append(Mark(event["time"], event["kind"]))
    return marks


def job_parts(sketch: Sketch) -> List[Optional[Html]]:
    """Everything that there is to show of a job."""
    summary = sketch.summary
    axis = Axis(sketch.first, sketch.last)
    marks = marks_of(sketch.events, summary, axis)
    series = [Series(sketch.curves)]
    charts = []
    flat = []
    for key in charted_first(sketch.verdicts or ()):
        if most_of(sketch, key) == 0:
            flat.append(NUMBERS[key].label)
            continue
        limit = summary["mem_limit"] if key == "job_mem" else None
        charts.append(draw_chart(key, series, axis, limit, marks))
    words = span_words(sketch)
    if flat:
        words += " Always 0: %s." % ", ".join(flat)
    maps = [draw_map(key, nodes, axis) for key, nodes in sketch.maps.items()]
    uses = known_only(use_rows(summary, len(sketch.nodes), len(sketch.gpus)))
    nodes = sorted(sketch.nodes, key=lambda row: natural(row["node"]))
    gpus = sorted(sketch.gpus, key=lambda row: natural(row["name"]))
    ranks = sorted(sketch.ranks, key=lambda rank: -(rank.get("mem") or 0.0))
    return [
        fill(PARAGRAPH_HTML, text=how_it_went(summary)),
        unwatched_note(summary),
        draw_verdicts(sketch),
        draw_table("use", "Asked, got, used", USE_COLUMNS, uses),
        draw_suggestions(summary),
        draw_section("Over time", charts, words),
        draw_section("Node by node", maps),
        draw_table("nodes", "Nodes", RUN_NODE_COLUMNS, nodes),
        draw_table("ranks", "Ranks at the end", RUN_RANK_COLUMNS, ranks),
        draw_table("gpus", "GPUs", RUN_GPU_COLUMNS, gpus),
        draw_table("events", "Events", RUN_EVENT_COLUMNS, sketch.events),
    ]


def draw_section(
    heading: str, charts: List[Optional[Html]], words: str = ""
) -> Optional[Html]:
    """Charts under a heading."""
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return None
    parts = [fill(PARAGRAPH_HTML, text=words)] if words else []
    parts.append(fill(CHARTS_HTML, charts=drawn))
    return fill(SECTION_HTML, heading=heading, parts=parts)


def span_words(sketch: Sketch) -> str:
    """The times of a record, and how fine it is."""
    zone = time.strftime("%Z", time.localtime(sketch.last))
    least, most = sketch.steps
    fine = "%d" % least if least == most else "%d to %d" % (least, most)
    words = (
        "From %s to %s %s; a point stands for %s s, the area reaches from the least to the"
        " most of all nodes."
        % (render_date(sketch.first), render_date(sketch.last), zone, fine)
    )
    start = sketch.summary["start"]
    if start and sketch.first - start > 2 * ROW_SECONDS:
        words += " It was watched since then, and had started on %s." % render_date(
            start
        )
    return words


def render_document(
    title: str, parts: Sequence[Optional[Html]], root: Optional[str], footer: object
) -> str:
    """A whole page; root leads to the pages of the master, None if there is none."""
    nav = None if root is None else fill(REPORT_NAV_HTML, root=root)
    return fill(
        REPORT_HTML,
        title=title,
        style=Html(STYLE + REPORT_STYLE),
        nav=nav,
        parts=list(parts),
        footer=footer,
    )


def render_report(record: Record) -> str:
    """The report of a job as one file that needs nothing else, with the record in it."""
    sketch = make_sketch(record)
    parts = job_parts(sketch)
    written = "Written on %s by Cluster Sentinel." % render_date(time.time())
    page = render_document(title_of(sketch.summary), parts, None, "\0")
    room = MAX_REPORT - len(page.encode("utf-8", "replace")) - 1000
    data = pack_into(record, room)
    name = safe_name(record.job) + ".jsonl.gz"
    footer = fill("{} {}", fill(DOWNLOAD_HTML, name=name, data=data), written)
    return page.replace("\0", footer)


def pack_into(record: Record, room: int) -> str:
    """The record in base64, as thin as it must be to have room."""
    rows = record.rows
    thin = record.copy()
    while True:
        thin.rows = rows
        packed = gzip.compress(b"".join(thin.lines()), 6, mtime=0)
        data = base64.b64encode(packed).decode()
        if len(data) <= room or len(rows) < 2:
            return data
        for _ in range(max(1, int(math.log2(len(data) / max(1, room))))):
            rows = halve(rows)


def record_of_report(job: str, page: str) -> Record:
    """The record that a report holds; RecordError if there is none in it."""
    match = re.search(r'href="data:application/gzip;base64,([A-Za-z0-9+/=]*)"', page)
    if not match:
        raise RecordError("no record in this file")
    return parse_record(job, unpack(base64.b64decode(match.group(1))))


def record_as_json(record: Record) -> Message:
    """A record for programs: JOB_KEYS, what it used, and all its curves."""
    answer = summarize(record)
    answer["severity"] = severity_of(answer) or None
    answer["verdicts"] = record.verdicts
    answer["nodes_seen"] = record.nodes
    answer["ranks"] = record.ranks
    by_name = sorted(gpu_rows(record), key=lambda row: natural(row["name"]))
    answer["gpus_seen"] = by_name
    answer["events"] = record.events
    answer["gaps"] = record.gaps
    answer["rows"] = [
        dict(row.values, time=row.time, step=row.step) for row in record.rows
    ]
    return answer


def is_past(view: Snapshot, job: str) -> bool:
    """Whether the live page of a job has nothing to show, but the records may.

    The page of an array lists its tasks, also those that have ended.
    """
    tasks = find_tasks(view, job)
    if len(tasks) > 1:
        return False
    return not tasks or tasks[0]["state"] in ENDED_STATES


def find_record(view: Optional[Snapshot], job: str, site: Site) -> Optional[Record]:
    """What is known of a job, by the records and by Slurm just now."""
    record: Optional[Record] = site.archive.record(job)
    for facts in view.jobs if view else ():
        if job in (facts["job"], facts["raw"]):
            live = record.copy() if record else Record(facts["job"])
            for key in JOB_KEYS:
                if facts[key] is not None:
                    live.facts[key] = facts[key]
            live.verdicts = newest_verdicts(view, live.facts, live.verdicts)
            return live
    return record


def find_sketch(view: Snapshot, job: str, site: Site) -> Optional[Sketch]:
    """What a page shows of a job, by the records and by Slurm just now."""
    sketch: Optional[Sketch] = site.archive.sketch(job)
    for facts in view.jobs:
        if job in (facts["job"], facts["raw"]):
            known = {key: facts[key] for key in JOB_KEYS if facts[key] is not None}
            if sketch and known.items() <= sketch.summary.items():
                return sketch  # Slurm says nothing that is not recorded
            record = find_record(view, job, site)
            return make_sketch(record) if record else None
    return sketch


def newest_verdicts(
    view: Any, job: Message, recorded: Optional[List[Message]]
) -> Optional[List[Message]]:
    """What is judged of a job: of one that runs, its record has the figures of minutes ago."""
    if recorded and job["state"] in ENDED_STATES:
        return recorded
    return verdicts_of(view).get(job["raw"] or job["job"], recorded)


def render_record_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of a job, live or past; "" if nothing is known of it."""
    sketch = find_sketch(view, query["job"], site)
    if sketch is None:
        return ""
    summary = sketch.summary
    parts = job_parts(sketch)
    for field, key in (("array", "array"), ("name", "job_name")):
        name = summary[key]
        if name:
            link_query = urllib.parse.urlencode({field: name})
            parts.append(fill(RUNS_LINK_HTML, query=link_query, name=name))
    parts.append(fill(COMPARE_FORM_HTML, root="../", job=summary["job"]))
    return render_document(title_of(summary), [demo_notice(site), *parts], "../", "")


def missing_words(path: str, query: Query) -> str:
    """What an address lacks that leads to no job: a parameter, or one that is known."""
    if path == "/runs":
        names = [query[key] for key in ("name", "array") if query.get(key)]
        if not names:
            return "Which runs? The parameter name or array is missing: /runs?name=NAME"
        return "No run of %s is known" % " and ".join(names)
    if path == "/compare":
        jobs = [query[key] for key in ("a", "b") if query.get(key)]
        return "No such job, or none of %s is known" % " and ".join(jobs)
    if not query.get("job"):
        return "Which job? Its id is missing: %sID" % path
    return "Nothing is known of a job %s" % query["job"]


def render_missing(path: str, query: Query, site: Site) -> str:
    """The page for an address that leads to no job."""
    root = "../" if path.endswith("/") else ""
    more = fill(MISSING_HTML, words=missing_words(path, query), root=root)
    return render_document("Nothing to show", [demo_notice(site), more], root, "")


def render_record_json(view: Snapshot, query: Query, site: Site) -> str:
    """A job as JSON; "" if nothing is known of it."""
    record = find_record(view, query["job"], site)
    return "" if record is None else as_json(record_as_json(record))


# ---- many jobs


def select_jobs(view: Snapshot, query: Query, site: Site) -> List[Message]:
    """The jobs that a query asks for, live and past, in its order."""
    return pick_jobs(all_summaries(view, site), query)


def all_summaries(view: Snapshot, site: Site) -> List[Message]:
    """The summaries of all jobs, live and past."""
    jobs = {job["job"]: job for job in site.archive.list()}
    for facts in view.jobs:
        summary = jobs.get(facts["job"]) or summarize(Record(facts["job"]))
        told = {key: facts[key] for key in JOB_KEYS if facts[key] is not None}
        is_over = facts["state"] in ENDED_STATES
        jobs[facts["job"]] = dict(summary, has_ended=is_over, **told)
        judged = judged_now(view, facts)
        if judged and not (is_over and summary["verdicts"]):
            jobs[facts["job"]]["verdicts"] = judged
        elif not is_over and severity_of(jobs[facts["job"]]) == "died":
            jobs[facts["job"]]["verdicts"] = None  # of a run before this one
        if not is_over and facts["start"]:
            jobs[facts["job"]]["ran"] = run_time(facts, view.time)
    for job in jobs.values():
        job["severity"] = severity_of(job) or None
        job["when"] = moment_of(job)
    return list(jobs.values())


def judged_now(view: Snapshot, facts: Message) -> Optional[List[Message]]:
    """What the overview says of a job; None if nobody has judged it."""
    verdicts = verdicts_of(view).get(facts["raw"])
    if verdicts or facts["state"] in ENDED_STATES:
        return verdicts
    trouble = trouble_of_nodes(nodes_of_one(view, facts), True)
    return [{"severity": trouble[0], "what": trouble[1]}] if trouble else verdicts


def nodes_of_one(view: Snapshot, facts: Message) -> List[Message]:
    """The nodes on which an agent watches the job."""
    names = (facts["job"], facts["raw"])
    return [node for node in view.nodes if node["job"] in names]


def moment_of(job: Message) -> Optional[float]:
    """When a job ended, started or was submitted: what it is sorted by."""
    keys = ("end", "time") if is_over_by_now(job) else ("start",)
    if job["state"] == "PENDING":
        keys = ("submit",)
    known = [float(job[key]) for key in keys if job[key]]
    return known[0] if known else None


def pick_jobs(jobs: Iterable[Message], query: Query) -> List[Message]:
    """Those that a query asks for, in its order; else what needs the user comes first."""
    words = query.get("q", "").lower().split()
    found = [job for job in jobs if is_job_asked_for(job, query, words)]
    found.sort(key=lambda job: natural(job["job"]))
    if query.get("sort"):
        return in_order(found, query["sort"])
    now = time.time()
    return sorted(found, key=lambda job: job_need(job, now))


def job_need(job: Message, now: float) -> Tuple[Any, ...]:
    """A key to sort jobs by: lately died or in trouble, running, pending; then the newest.

    It is the same at each look: a job that runs has its place by its start.
    """
    when = job["when"] or 0.0
    phase = 2 if is_over_by_now(job) else 1 if job["state"] == "PENDING" else 0
    needs = ("died", "problem").index(job["severity"]) if is_urgent(job, now) else 2
    return needs, phase, -when


def is_urgent(job: Message, now: float) -> bool:
    """Whether a job has died or is in trouble, not longer ago than a day."""
    is_old = is_over_by_now(job) and now - (job["when"] or 0.0) > URGENT_SECONDS
    return job["severity"] in ("died", "problem") and not is_old


def is_job_asked_for(job: Message, query: Query, words: Sequence[str]) -> bool:
    """Whether a job is of the query's state, user and verdict, and has every word somewhere."""
    for key in ("state", "user", "severity"):
        if query.get(key) and query[key] != (job[key] or ""):
            return False
    if not words:
        return True
    keys = ("job", "job_name", "user", "state", "partition", "reason", "nodelist")
    text = "\n".join(str(job[key] or "") for key in keys)
    text = (text + "\n" + verdict_words(job)).lower()
    return all(word in text for word in words)


def jobs_link(path: str, query: Query, **state: object) -> str:
    """The address of the list of jobs in the query's state, but for what is given."""
    state = dict(query, **state)
    keys = ("q", "state", "user", "severity", "sort", "page")
    fields = [(key, state[key]) for key in keys if state.get(key)]
    return path + "?" + urllib.parse.urlencode(fields)


def render_jobs_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of all jobs, of today and of the past."""
    everything = all_summaries(view, site)
    jobs = pick_jobs(everything, query)
    last = max(1, -(-len(jobs) // JOBS_PAGE))
    asked = query.get("page", "")
    page = min(max(int(asked), 1), last) if asked.isdecimal() else 1
    shown = jobs[JOBS_PAGE * (page - 1) : JOBS_PAGE * page]
    columns = jobs_columns(everything)
    parts: List[Optional[Html]] = [
        fill(PARAGRAPH_HTML, text=jobs_words(everything)),
        jobs_form(everything, query),
        draw_table("jobs", "Jobs", columns, shown, job_headings(query, columns))
        or fill(PARAGRAPH_HTML, text="No job matches" if everything else "No jobs yet"),
        page_list(query, page, last) if last > 1 else None,
        fill(
            JOBS_LINKS_HTML,
            text=jobs_link("jobs.txt", query),
            csv=jobs_link("jobs.csv", query),
            json=jobs_link("jobs.json", query),
        ),
    ]
    title = "Jobs of now and of the past"
    return render_document(title, [demo_notice(site), *parts], "", "")


def jobs_words(jobs: Sequence[Message]) -> str:
    """How many jobs there are in which state, and when that was so: the page is not live."""
    trouble = trouble_words([severity_of(job) for job in jobs])
    texts = [", ".join(each) for each in (trouble, state_words(jobs)) if each]
    words = "%s: %s. " % (count_words(len(jobs), "job"), "; ".join(texts))
    now = "As of %s; this page does not renew itself." % time.strftime("%R")
    return words + now if jobs else now


def jobs_columns(jobs: Sequence[Message]) -> List[Column]:
    """The columns of the list; all jobs of one user need no column for that."""
    users = {job["user"] for job in jobs if job["user"]}
    return [column for column in JOBS_COLUMNS if column.key != "user" or len(users) > 1]


def state_words(jobs: Iterable[Message]) -> List[str]:
    """How many jobs are in which state, the most first."""
    counts = collections.Counter(plain_state(job["state"]) for job in jobs)
    return ["%d %s" % (count, state) for state, count in counts.most_common()]


def jobs_form(jobs: Sequence[Message], query: Query) -> Html:
    """The filter of the list of jobs."""
    selects = []
    for key in ("state", "user", "severity"):
        values = sorted({job[key] for job in jobs if job[key]}, key=natural)
        options = [
            fill(
                CHOSEN_OPTION_HTML if query.get(key) == value else OPTION_HTML,
                value=value,
            )
            for value in values
        ]
        label = "Verdict" if key == "severity" else key.capitalize()
        if len(values) > 1 or query.get(key):
            selects.append(
                fill(SELECT_HTML, label=label, key=key, first="all", options=options)
            )
    return fill(
        JOBS_FORM_HTML,
        words=query.get("q"),
        selects=selects,
        sort=query.get("sort"),
    )


def job_headings(query: Query, columns: Sequence[Column]) -> List[Html]:
    """The cells above the list of jobs: links that sort it."""
    sort = query.get("sort") or ""
    cells = []
    for column in columns:
        turned = "-" + column.key if sort == column.key else column.key
        href = jobs_link("jobs", query, sort=turned, page="")
        label: Union[str, Html] = column.heading
        if column.key != WHAT.key:  # which has no order
            label = fill(LINK_HTML, href=href, text=column.heading)
        align = heading_align(column)
        if sort.lstrip("-") == column.key:
            order = "descending" if sort.startswith("-") else "ascending"
            cells.append(
                fill(SORTED_HEADING_HTML, align=align, order=order, label=label)
            )
        else:
            cells.append(fill(HEADING_HTML, align=align, label=label))
    return cells


def page_list(query: Query, page: int, last: int) -> Html:
    """Links to the pages of the list."""
    links = []
    for number in range(1, last + 1):
        template = THIS_PAGE_LINK_HTML if number == page else PAGE_LINK_HTML
        href = jobs_link("jobs", query, page=number)
        links.append(fill(template, href=href, number=number))
    return fill(PAGES_HTML, links=links)


JOBS_CSV_KEYS = (
    *JOB_KEYS,
    "ran",
    "cpu",
    "gpu",
    "peak",
    "mem_limit",
    "got_cpus",
    "severity",
)


def render_jobs_csv(view: Snapshot, query: Query, site: Site) -> str:
    """The list of jobs as CSV; times in seconds since 1970, memory in bytes."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([*JOBS_CSV_KEYS, "verdict"])
    for job in select_jobs(view, query, site):
        cells = [as_csv(job.get(key)) for key in JOBS_CSV_KEYS]
        table.writerow([*cells, as_csv(verdict_words(job))])
    return text.getvalue()


def render_records_json(view: Snapshot, query: Query, site: Site) -> str:
    """The list of jobs as JSON."""
    jobs = select_jobs(view, query, site)
    return as_json({"time": round(view.time, 3), "jobs": jobs})


# ---- two jobs


def render_compare_page(view: Snapshot, query: Query, site: Site) -> str:
    """Two jobs on the same axes, and what is different, in words; "" if one is not known.

    As long as one is not given, there are lists to choose from.
    """
    if not (query.get("a") and query.get("b")):
        return render_choice_page(view, query, site)
    sketches = [find_sketch(view, query.get(key, ""), site) for key in ("a", "b")]
    if None in sketches:
        return ""
    one, other = (sketch for sketch in sketches if sketch)
    first, second = one.summary, other.summary
    starts = [start_of(sketch) for sketch in (one, other)]
    lengths = [one.last - starts[0], other.last - starts[1]]
    axis = Axis(0.0, max(lengths), is_clock=False)
    series = [
        Series(one.curves, "", starts[0], "A"),
        Series(other.curves, "other", starts[1], "B"),
    ]
    charts = [
        draw_chart(key, series, axis)
        for key in CHARTED
        if most_of(one, key) or most_of(other, key)
    ]
    words = (
        "A, job %s, is the full line; B, job %s, the broken one. Time since each start."
        % (
            first["job"],
            second["job"],
        )
    )
    both = (("A", first), ("B", second))
    blind = [letter for letter, summary in both if not is_watched_job(summary)]
    if blind:
        words = "%s was not watched: there is no curve of it. Time since the start."
        words = words % blind[0]
    parts = [
        compared_job("A", first),
        compared_job("B", second),
        draw_table(
            "compare", "Differences", COMPARE_COLUMNS, compare_rows(first, second)
        ),
        draw_section("Over time", charts, words)
        or fill(PARAGRAPH_HTML, text="Neither was watched: there are no curves."),
    ]
    title = "Jobs %s and %s" % (first["job"], second["job"])
    return render_document(title, [demo_notice(site), *parts], "", "")


def compared_job(name: str, summary: Message) -> Html:
    """Which job it is, a link to its page, and how it went."""
    return fill(
        COMPARED_HTML,
        name=name,
        href="record/" + urllib.parse.quote(summary["job"], ""),
        title=title_of(summary),
        words=how_it_went(summary),
    )


def render_choice_page(view: Snapshot, query: Query, site: Site) -> str:
    """Lists of the jobs that can be compared: first of the same name, then the newest."""
    jobs = [job for job in all_summaries(view, site) if job["state"] != "PENDING"]
    jobs.sort(key=lambda job: -(job["when"] or 0.0))
    names = {job["job"]: job["job_name"] for job in jobs}
    chosen = {key: query[key] for key in ("a", "b") if query.get(key)}
    name = names.get(next(iter(chosen.values()), ""))
    jobs.sort(key=lambda job: job["job_name"] != name)
    selects = []
    for key in ("a", "b"):
        others = [job for key_of, job in chosen.items() if key_of != key]
        choices = [job for job in jobs if job["job"] not in others]
        shown = chosen.get(key)
        if key == "b" and not chosen and len(jobs) > 1:
            shown = jobs[1]["job"]  # a job is not compared with itself
        # what is chosen is in the list, however long that is
        choices.sort(key=lambda job: job["job"] != chosen.get(key))
        options = [choice(job, shown) for job in choices[:MAX_CHOICES]]
        selects.append(fill(CHOICE_HTML, label=key.upper(), key=key, options=options))
    parts = [
        demo_notice(site),
        fill(
            PARAGRAPH_HTML,
            text="Two jobs are compared, as /compare?a=ID&b=ID. Choose them here.",
        ),
        fill(CHOICE_FORM_HTML, selects=selects),
    ]
    return render_document("Compare two jobs", parts, "", "")


def choice(job: Message, chosen: Optional[str]) -> Html:
    """A job in a list to choose from."""
    text, _ = moment_words(job, time.time())
    words = [job["job"], job["job_name"], plain_state(job["state"]), text]
    is_chosen = job["job"] == chosen
    return fill(
        CHOICE_OPTION_HTML,
        job=job["job"],
        selected=Html(" selected") if is_chosen else None,
        words=" ".join(filter(None, words)),
    )


COMPARED = (  # what is compared: a label, the key, and how it is written
    ("State", "state", "state"),
    ("Verdict", "severity", "severity"),
    ("Nodes", "nodes", "nodes"),
    ("CPUs", "cpus", "nodes"),
    ("Ran", "ran", "ran"),
    ("Time limit", "limit", "limit"),
    ("CPU, mean", "cpu", "cpu"),
    ("GPU, mean", "gpu", "gpu"),
    ("Peak memory of a node", "peak", "mem"),
    ("Memory limit of a node", "mem_limit", "mem"),
)


def compare_rows(one: Message, other: Message) -> List[Message]:
    """What is known of either, side by side."""
    rows = []
    for label, key, written in COMPARED:
        pair = [summary.get(key) for summary in (one, other)]
        if key == "mem_limit":  # as Slurm says, where no agent has seen it
            pair = [summary[key] or summary["mem"] for summary in (one, other)]
        if key == "severity":
            pair = [severity_of(summary) or None for summary in (one, other)]
        if key == "state":
            pair = [plain_state(state) for state in pair]
        if pair == [None, None]:
            continue
        texts = [render_value(written, value) for value in pair]
        words = difference_words(*pair)
        rows.append({"what": label, "a": texts[0], "b": texts[1], "words": words})
    return rows


def difference_words(one: Any, other: Any) -> str:
    """How the second differs from the first."""
    if one is None or other is None:
        return "known of one only"
    if not is_number(one) or not is_number(other):
        return "the same" if one == other else "different"
    if one == other or abs(other - one) < 0.02 * max(abs(one), abs(other)):
        return "the same"
    if not one:
        return "more"
    ratio = other / one
    if ratio >= 2:
        return "%.1f times as much" % ratio
    return "%.0f %% %s" % (abs(ratio - 1) * 100, "more" if ratio > 1 else "less")


# ---- many runs of the same: an array, or jobs of one name


class Spread(NamedTuple):
    """How the values of many runs are spread."""

    runs: int
    least: float
    median: float
    high: float  # nine of ten are not above
    most: float
    bars: List[
        int
    ]  # runs in each of SPREAD_BARS equal parts from the least to the most


def spread_of(values: Sequence[Optional[float]]) -> Optional[Spread]:
    """The spread of the values that are known; None if there are none."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    least, most = known[0], known[-1]
    bars = [0] * SPREAD_BARS
    for value in known:
        share = (value - least) / (most - least) if most > least else 0.0
        bars[min(SPREAD_BARS - 1, int(share * SPREAD_BARS))] += 1
    return Spread(
        len(known), least, quantile(known, 0.5), quantile(known, 0.9), most, bars
    )


def quantile(known: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that is not below so large a share of them."""
    return known[max(0, math.ceil(share * len(known)) - 1)]


def busy_cpus(job: Message) -> Optional[float]:
    """How many CPUs a run kept busy, in the mean."""
    if job["cpu"] is None or not job["got_cpus"]:
        return None
    return float(job["cpu"] * job["got_cpus"] / 100)


def advise(jobs: Sequence[Message]) -> List[Tuple[str, str]]:
    """What to ask for next time, and what that rests upon: (line, words); by three runs or more.

    Only runs that completed count: one that was killed shows how much it got, not what it needs.
    """
    done = [job for job in jobs if job["state"] == "COMPLETED"]
    advice = []
    peaks = sorted(job["peak"] for job in done if job["peak"])
    deaths = advise_after_deaths(jobs)
    if deaths:
        advice.append(deaths)
    elif len(peaks) >= MIN_RUNS:
        wanted = MEMORY_MARGIN * quantile(peaks, SUFFICES) / 2**20
        mebibytes = int(-(-wanted // 64)) * 64
        enough = sum(peak <= mebibytes * 2**20 for peak in peaks)
        size = "%dM" % mebibytes if mebibytes % 1024 else "%dG" % (mebibytes // 1024)
        words = "the largest peak was %s" % render_value("mem", peaks[-1])
        advice.append(("#SBATCH --mem=" + size, suffice_words(enough, peaks, words)))
    times = sorted(job["ran"] for job in done if job["ran"])
    if len(times) >= MIN_RUNS:
        wanted = RUNS_TIME_MARGIN * quantile(times, SUFFICES)
        line = "#SBATCH --time=" + slurm_time(wanted)
        words = "the longest took %s" % render_value("ran", times[-1])
        enough = sum(seconds <= wanted for seconds in times)
        advice.append((line, suffice_words(enough, times, words)))
    busy = sorted(filter(None, map(busy_cpus, done)))
    if len(busy) >= MIN_RUNS:
        wanted = max(1, math.ceil(quantile(busy, SUFFICES) - CPU_SLACK))
        got = max(job["got_cpus"] for job in done if job["got_cpus"])
        names = max(len(job["names"]) for job in done)
        if wanted < got and names == 1:
            words = "%d runs kept at most %.1f of %d CPUs busy"
            line = "#SBATCH --cpus-per-task=%d" % wanted
            advice.append((line, words % (len(busy), busy[-1], got)))
    return advice


def advise_after_deaths(jobs: Sequence[Message]) -> Optional[Tuple[str, str]]:
    """What memory to ask for when runs died of it: more than any that completed or died had."""
    dead = [job for job in jobs if job["state"] == "OUT_OF_MEMORY"]
    limits = [job["mem_limit"] or job["mem"] for job in dead]
    killed = max(filter(None, limits), default=None)
    if killed is None:
        return None
    done = [job["peak"] for job in jobs if job["state"] == "COMPLETED" and job["peak"]]
    words = "more than the %s that %s died of; whether it is enough is not known" % (
        short_size(killed),
        count_words(len(dead), "run"),
    )
    return "#SBATCH " + memory_flag(max(done + [killed])), words


def suffice_words(enough: int, known: Sequence[float], words: str) -> str:
    """For how many runs it would have sufficed."""
    return "would have sufficed for %d of %d runs; %s" % (enough, len(known), words)


def failure_rows(jobs: Sequence[Message]) -> List[Message]:
    """Runs that did not complete, by how they ended and where."""
    groups: Dict[str, List[Message]] = {}
    for job in jobs:
        if job["state"] in ENDED_STATES and job["state"] != "COMPLETED":
            cause = plain_state(job["state"])
            if job["exit"] not in (None, "0:0"):
                cause += ", exit code " + job["exit"]
            groups.setdefault(cause, []).append(job)
    rows = []
    for cause, failed in sorted(groups.items(), key=lambda item: -len(item[1])):
        nodes = collections.Counter(name for job in failed for name in job["names"])
        where = [
            "%d on %s" % (count, name) for name, count in nodes.most_common(MAX_WHERE)
        ]
        rows.append(
            {
                "cause": cause,
                "count": len(failed),
                "where": ", ".join(where) or None,
                "which": [job["job"] for job in failed],
            }
        )
    return rows


def spread_rows(jobs: Sequence[Message]) -> List[Message]:
    """A row for memory, time and CPUs of many runs."""
    rows = []
    for what, written, values in (
        ("Peak memory of a node", "mem", [job["peak"] for job in jobs]),
        ("Time", "ran", [job["ran"] for job in jobs]),
        ("CPUs busy", "load1", [busy_cpus(job) for job in jobs]),
    ):
        spread = spread_of(values)
        if spread is None:
            continue
        row: Message = {"what": what, "count": spread.runs, "bars": spread.bars}
        for key in ("least", "median", "high", "most"):
            row[key] = render_value(written, getattr(spread, key))
        rows.append(row)
    return rows


def draw_which(column: Column, row: Message, site: Site) -> Html:
    """Some jobs, each a link to its page."""
    links: List[Html] = []
    for job in row["which"][:MAX_WHERE]:
        href = "record/" + urllib.parse.quote(job, "")
        links.append(fill("{} ", fill(LINK_HTML, href=href, text=job)))
    more = len(row["which"]) - MAX_WHERE
    if more > 0:
        links.append(fill("and {} more", more))
    return fill(CELL_HTML, kind=column.align, content=links)


def draw_bars(column: Column, row: Message, site: Site) -> Html:
    """A row of bars; in words: how many runs each stands for."""
    if row["count"] < MIN_RUNS:
        return fill(CELL_HTML, kind=UNKNOWN_CELL, content="-")
    top = max(row["bars"])
    path = ""
    for place, count in enumerate(row["bars"]):
        height = 100 * count / top
        path += "M%d 100v-%.1fh8v%.1fz" % (10 * place, height, height)
    words = "runs from the least to the most: %s" % ", ".join(map(str, row["bars"]))
    return fill(BARS_HTML, width=10 * len(row["bars"]), path=path, words=words)


SPREAD_COLUMNS = (
    Column("what", "What"),
    Column("count", "Runs", RIGHT, AS_COUNT),
    Column("least", "Least", RIGHT),
    Column("median", "Median", RIGHT),
    Column("high", "9 of 10 below", RIGHT),
    Column("most", "Most", RIGHT),
    Column("bars", "Distribution", LEFT, draw_bars),
)
FAILURE_COLUMNS = (
    Column("cause", "How it ended"),
    Column("count", "Runs", RIGHT, AS_COUNT),
    Column("where", "On nodes", WRAPPED),
    Column("which", "Jobs", WRAPPED, draw_which),
)


def runs_asked_for(view: Snapshot, query: Query, site: Site) -> List[Message]:
    """The runs of an array, or of a name and a user."""
    keys = {"array": "array", "name": "job_name", "user": "user"}
    wanted = {keys[key]: query[key] for key in keys if query.get(key)}
    if not set(wanted) & {"array", "job_name"}:
        return []
    return [
        job
        for job in select_jobs(view, {}, site)
        if all(job[key] == value for key, value in wanted.items())
    ]


def render_runs_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of many runs of the same; "" if there are none."""
    jobs = runs_asked_for(view, query, site)
    if not jobs:
        return ""
    words = state_words(jobs)
    done = [job for job in jobs if job["state"] in ENDED_STATES]
    advice = advise(done)
    lines = "\n".join(line for line, _ in advice)
    flags = [(line.split()[-1], words) for line, words in advice]
    why = ". ".join("%s: %s" % pair for pair in flags)
    paste = fill(PASTE_HTML, lines=lines, why=why)
    if not advice:
        text = (
            "Nothing yet: advice takes %d runs that completed and were watched, or one that"
            " died of its memory limit." % MIN_RUNS
        )
        paste = fill(PARAGRAPH_HTML, text=text)
    title = "Runs of %s" % (query.get("name") or query.get("array"))
    caption = "Jobs"
    if len(jobs) > MAX_ROWS:
        caption = "The first %d of these jobs" % MAX_ROWS
    parts = [
        fill(
            PARAGRAPH_HTML,
            text="%s: %s" % (count_words(len(jobs), "run"), ", ".join(words)),
        ),
        draw_table("spread", "What they used", SPREAD_COLUMNS, spread_rows(done)),
        draw_table("failures", "Failures", FAILURE_COLUMNS, failure_rows(done)),
        fill(SECTION_HTML, heading="To ask for next time", parts=paste),
        draw_table("jobs", caption, jobs_columns(jobs), jobs),
    ]
    return render_document(title, [demo_notice(site), *parts], "", "")


# ---- text


def render_jobs_text(jobs: Sequence[Message]) -> str:
    """The list of jobs for a terminal."""
    columns = [
        column
        for column in RECORD_COLUMNS
        if column.key in ("job", "severity")
        or any(job.get(column.key) is not None for job in jobs)
    ]
    table = [[column.heading for column in columns]]
    for job in jobs:
        table.append([job_cell(column, job) for column in columns])
    widths = [max(map(text_width, texts)) for texts in zip(*table)]
    lines = []
    for texts in table:
        lines.append("  ".join(map(align, columns, texts, widths)).rstrip())
    return "".join(line + "\n" for line in lines)


def render_jobs_list(view: Snapshot, query: Query, site: Site) -> str:
    """The list of jobs as aligned text, live and past; width in the query cuts its lines."""
    return cut_lines(render_jobs_text(select_jobs(view, query, site)), query)


def job_cell(column: Column, job: Message) -> str:
    """What a cell says."""
    if column.key == "severity":
        return verdict_words(job)
    if column.draw is draw_date:
        return render_date(job.get(column.key))
    return render_value(column.key, job.get(column.key))


def explain_text(record: Record) -> str:
    """What became of a job, or will, for a terminal."""
    summary = summarize(record)
    lines = ["%s: %s" % (title_of(summary), how_it_went(summary))]
    verdicts = record.verdicts or ()
    for verdict in verdicts:
        word = SEVERITY_WORDS.get(verdict.get("severity") or "", "")
        what = verdict.get("what")
        lines.append("%s: %s" % (word, words_of_fine(what)))
        if verdict.get("proof"):
            lines.append("    %s" % verdict["proof"])
        if cure_of(verdict):
            lines.append("    -> %s" % cure_of(verdict))
    if not verdicts:
        lines.append(SEVERITY_WORDS[severity_of(summary)])
    for use in use_rows(summary, len(record.nodes), len(record.gpus)):
        amounts = (
            ("asked for", use["asked"]),
            ("got", use["got"]),
            ("used", use["used"]),
        )
        known = ["%s %s" % amount for amount in amounts if amount[1] != "-"]
        lines.append("%s: %s" % (use["what"], ", ".join(known)))
    lines += suggestions(summary)
    return "".join(clean_text(line) + "\n" for line in lines)


def explain(folder: str, job: str, as_program: bool) -> Tuple[str, int]:
    """What --explain prints of a job, and its exit code; RecordError without a record."""
    try:
        record = read_record(folder, job)
    except OSError as error:
        raise RecordError("%s cannot be read: %s" % (folder, error.strerror)) from None
    if record is None:
        raise RecordError(
            "no record of job %s in %s; test_reader.py --jobs lists what there is"
            % (clean_text(job), folder)
        )
    code = EXPLAIN_CODES[severity_of(summarize(record))]
    if not as_program:
        return explain_text(record), code
    answer = record_as_json(record)
    del answer["rows"]
    return as_json(dict(answer, code=code)), code


REPORT_ROUTES: Dict[str, Tuple[str, Callable[..., str]]] = {
    "/jobs": (HTML, render_jobs_page),
    "/jobs.csv": (CSV, render_jobs_csv),
    "/jobs.txt": (TEXT, render_jobs_list),
    "/jobs.json": (JSON, render_records_json),
    "/record/": (HTML, render_record_page),
    "/api/record/": (JSON, render_record_json),
    "/compare": (HTML, render_compare_page),
    "/runs": (HTML, render_runs_page),
}


# ============================================================================
# Dashboard: sockets -> request -> pages
# ============================================================================

HTTP_SECONDS = 5.0  # for a whole request, and for its whole answer
LINGER_READ = 1.0  # seconds without input, after an answer, until its socket is closed
MAX_CLIENTS = 128  # HTTP connections at once
MAX_REQUEST_LINE = 4096  # bytes
MAX_REQUEST = 16384  # bytes of request line and headers
MAX_FIELDS = 16  # of a query
END_OF_HEAD = b"\r\n\r\n"
REQUEST = re.compile(
    rb"([A-Za-z]+) ([!-~]+) HTTP/1\.\d\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*\r\n)*)\r\n"
)
MAX_REPORTS = 16  # pages of records that are kept, as long as these stay the same
NUMERIC_HOST = re.compile(r"[\d.]+|\[[\da-f:.]+\]")  # 127.0.0.1, [::1]


def policy_hash(text: str) -> str:
    """How a Content-Security-Policy names the one style sheet or script that may be used."""
    digest = hashlib.sha256(text.encode()).digest()
    return "'sha256-%s'" % base64.b64encode(digest).decode()


CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'self'",
        "frame-ancestors 'none'",
        "style-src " + policy_hash(STYLE),
        "script-src " + policy_hash(SCRIPT),
    )
)
HEADERS = {  # of every answer
    "Content-Type": TEXT,
    "Connection": "close",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}

# -- requests ------------------------------------------------------------------

Fields = Dict[str, str]  # headers: of a request by their names in lower case


REPORT_POLICY = (
    "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'; style-src 'sha256-%s'"
    % base64.b64encode(
        hashlib.sha256((STYLE + REPORT_STYLE).encode()).digest()
    ).decode()
)


class HTTPError(Exception):
    """A request that gets another answer than a page: status, text, more headers."""

    def __init__(
        self, status: int, text: str, headers: Optional[Fields] = None
    ) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.headers = headers or {}


class Request(NamedTuple):
    """What a browser asks for; the query is decoded, the path is as it came."""

    method: str
    path: str
    query: Query
    fields: Fields


def read_request(sock: socket.socket) -> bytes:
    """The bytes of request line and headers, bounded in size and time; HTTPError."""
    deadline = time.monotonic() + HTTP_SECONDS
    data = b""
    while END_OF_HEAD not in data:
        chunk = receive_before(sock, deadline)
        if not chunk:
            break
        data += chunk
        check_limits(data)
    head, end, _ = data.partition(END_OF_HEAD)
    return head + end


def receive_before(sock: socket.socket, deadline: float) -> bytes:
    """Some bytes of a request, b"" at the end; HTTPError when none come in time."""
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        return sock.recv(RECEIVE_SIZE)
    except socket.timeout:
        raise HTTPError(408, "no whole request in %g s" % HTTP_SECONDS) from None


def check_limits(data: bytes) -> None:
    """HTTPError as soon as the bytes cannot become a request, or one of a decent size."""
    if not data[:1].isalpha():
        raise HTTPError(400, "this is no HTTP request; if it was https://, try http://")
    line, _, _ = data.partition(b"\r\n")
    if len(line) > MAX_REQUEST_LINE:
        raise HTTPError(414, "a request line of more than %d bytes" % MAX_REQUEST_LINE)
    if len(data) > MAX_REQUEST:
        raise HTTPError(431, "headers of more than %d bytes" % MAX_REQUEST)


def parse_request(head: bytes) -> Request:
    """The bytes of a request, taken apart; HTTPError (RFC 9112)."""
    match = REQUEST.fullmatch(head)
    if match and match.group(1) not in (b"GET", b"HEAD"):
        raise HTTPError(
            405, "only GET and HEAD: this server is read-only", {"Allow": "GET, HEAD"}
        )
    if not match or not match.group(2).startswith(b"/"):
        raise HTTPError(
            400, "a request must be: GET /path HTTP/1.1, and a header: Name: value"
        )
    method, target, lines = (part.decode("latin-1") for part in match.groups())
    path, _, query = target.partition("?")
    return Request(method, path, parse_query(query), parse_fields(lines))


def parse_query(text: str) -> Query:
    """The fields behind the ? of an address; of two with one name, the last."""
    try:
        pairs = urllib.parse.parse_qsl(
            text, keep_blank_values=True, max_num_fields=MAX_FIELDS
        )
    except ValueError:
        raise HTTPError(400, "more than %d fields in the query" % MAX_FIELDS) from None
    return dict(pairs)


def parse_fields(lines: str) -> Fields:
    """The headers of a request, each line of which has a colon."""
    fields = {}
    for line in lines.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    return fields


# What stands behind such a path, or in ?name=, is the value of that field of the query.
NAMED_ROUTES = {
    "/node/": "node",
    "/api/job/": "job",
    "/job/": "job",
    "/api/record/": "job",
    "/record/": "job",
}


class Route(NamedTuple):
    """The entry of ROUTES that a path leads to, and the name behind it."""

    path: str
    name: str


def find_route(path: str) -> Route:
    """Where a path leads by its end; HTTPError when it leads nowhere.

    What it begins with is the prefix of a proxy that passes it on, and any folder but that of
    a name is the overview: /node/c1 and /a/prefix/node/c1 are the same, / and /a/prefix/, too.
    """
    folder, _, last = path.rpartition("/")
    for route in NAMED_ROUTES:
        if (folder + "/").endswith(route):
            return Route(route, urllib.parse.unquote(last))
    if not last:
        return Route("/", "")
    decoded = urllib.parse.unquote(path)
    routes = [*ROUTES, *REPORT_ROUTES]
    for route in routes:
        if route != "/" and decoded.endswith(route):
            return Route(route, "")
    raise HTTPError(404, "no such page; there are " + " ".join(routes))


def render_head(status: int, headers: Fields, size: int) -> bytes:
    """The bytes before a body of that size."""
    lines = ["HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase)]
    lines += ["%s: %s" % field for field in headers.items()]
    lines.append("Content-Length: %d" % size)
    return "\r\n".join(lines).encode("latin-1") + END_OF_HEAD


# -- history -------------------------------------------------------------------

PICK_NAME = operator.itemgetter(*map(NODE_KEYS.index, ("node", "address", "job")))
PICK_GRAPHS = operator.itemgetter(*map(NODE_KEYS.index, GRAPHS))
FINE_COUNT = len(FINE_GRAPHS)
# Percentages of one CPU, or of those that a job may use: there may be more than 100 of them.
BEYOND_100 = ("job_cpu", "agent_cpu")
PERCENTS = frozenset(
    GRAPHS.index(m.key)
    for m in METRICS
    if m.unit == "%" and m.key in GRAPHS and m.key not in BEYOND_100
)
GAP = (math.nan,) * len(GRAPHS)
HUNDREDTHS = 100  # in a percent, as a ring has it
NO_PERCENT = 0xFFFF  # NaN, as a ring has it
BLANK_FINE = array.array("H", [NO_PERCENT]) * (FINE_COUNT * FINE)
BLANK_PERCENTS = array.array("H", [NO_PERCENT]) * COARSE
BLANK_NUMBERS = array.array("f", [math.nan]) * COARSE


def pack_percent(percent: float) -> int:
    """A percentage as 16 bits: hundredths of a percent, 655.34 at most, or NO_PERCENT."""
    if math.isnan(percent):
        return NO_PERCENT
    return int(min(max(HUNDREDTHS * percent + 0.5, 0), NO_PERCENT - 1))


def unpack_percents(packed: Iterable[int]) -> List[float]:
    """The percentages again."""
    return [math.nan if each == NO_PERCENT else each / HUNDREDTHS for each in packed]


class Held(NamedTuple):
    """The COARSE metrics of a ring, in their order there, as places in GRAPHS; and the rest."""

    percents: Tuple[int, ...]
    numbers: Tuple[int, ...]
    missing: Tuple[int, ...]


NOTHING_HELD = Held((), (), tuple(range(FINE_COUNT, len(GRAPHS))))


class Ring:
    """The readings of a node, as History has them."""

    __slots__ = ("last", "held", "percents", "numbers")

    def __init__(self, last: int, held: Held, percents: Any, numbers: Any) -> None:
        self.last = last  # tick of the newest
        self.held = held
        self.percents = percents  # an array of pack_percent()'s
        self.numbers = numbers  # an array of floats


EMPTY_RING = Ring(-FINE, NOTHING_HELD, BLANK_FINE, BLANK_NUMBERS[:0])


class Stretch(NamedTuple):
    """Where an array of a ring holds a metric: readings from first on, one in so many ticks."""

    first: int
    size: int
    ticks: int


def stretch_of(number: int, held: Held) -> Stretch:
    """Where the readings of one of GRAPHS are; it is one of FINE_GRAPHS, or held."""
    if number < FINE_COUNT:
        return Stretch(number * FINE, FINE, 1)
    if number in PERCENTS:
        first = FINE_COUNT * FINE + held.percents.index(number) * COARSE
    else:
        first = held.numbers.index(number) * COARSE
    return Stretch(first, COARSE, FIFTH)


def put_readings(ring: Ring, first: int, end: int, values: Sequence[float]) -> None:
    """Write what GRAPHS were from a tick on until before another, over those a ring ago."""
    for number in range(FINE_COUNT):
        percent = pack_percent(values[number])
        for tick in range(first, end):
            ring.percents[number * FINE + tick % FINE] = percent
    fifths = range(-(-first // FIFTH), (end - 1) // FIFTH + 1)
    if not fifths:
        return
    percents = [pack_percent(values[number]) for number in ring.held.percents]
    numbers = [values[number] for number in ring.held.numbers]
    for fifth in fifths:
        at = fifth % COARSE
        if percents:
            coarse = slice(FINE_COUNT * FINE + at, None, COARSE)
            ring.percents[coarse] = array.array("H", percents)
        if numbers:
            ring.numbers[at::COARSE] = array.array("f", numbers)


def fill_readings(ring: Ring, tick: int, values: Sequence[float]) -> None:
    """Write what GRAPHS were at a tick, where there is room for it and nothing is known yet."""
    numbers = list(range(FINE_COUNT))
    if tick % FIFTH == 0:
        numbers += ring.held.percents + ring.held.numbers
    for number in numbers:
        stretch = stretch_of(number, ring.held)
        at = stretch.first + tick // stretch.ticks % stretch.size
        if number in PERCENTS:
            if ring.percents[at] == NO_PERCENT:
                ring.percents[at] = pack_percent(values[number])
        elif math.isnan(ring.numbers[at]):
            ring.numbers[at] = values[number]


class History:
    """The last ten minutes of every node, in a ring for each; unknown is NaN.

    A ring has FINE readings of CPU, FINE of RAM, and COARSE of each other metric of GRAPHS
    that the node has ever sent: percentages in an array of 16 bits, all else in one of floats:

        cpu, one a tick | ram, one a tick | swap, one in FIFTH ticks | disk, ... | ...
        load1, one in FIFTH ticks | net_rx, ... | ...

    The reading of a tick is at the tick modulo the size: it replaces that of ten minutes ago.
    """

    def __init__(self) -> None:
        self.tick = 0  # the newest
        self.rings: Dict[Any, Ring] = {}  # by (name or address, job)
        self.helds: Dict[Any, Any] = {}  # those of all rings, each once

    def add(self, view: Snapshot, tick: int) -> None:
        """Note the readings of a tick; forget nodes that have been away for longer than a ring."""
        if view.beat < STALE_SECONDS:
            for row in view.rows():
                node, address, job = map(from_field, PICK_NAME(row))
                self.note((node or address, job), PICK_GRAPHS(row), tick)
        self.forget(tick, 2 * view.capacity)
        self.tick = tick

    def note(self, key: Any, values: Sequence[float], tick: int) -> None:
        """Write a node's readings; they stand for the ticks that were left out before, if few."""
        ring = self.rings.get(key)
        if not ring:
            ring = Ring(tick - 1, NOTHING_HELD, BLANK_FINE[:], BLANK_NUMBERS[:0])
            self.rings[key] = ring
        last = ring.last
        if last >= tick:
            return
        if tick // FIFTH > last // FIFTH:
            ring = self.rings[key] = self.hold(ring, values)
        first = last + 1
        if tick - last > FIFTH:  # a longer gap is one in the graph, too
            put_readings(ring, max(first, tick - FINE + 1), tick, GAP)
            first = tick
        put_readings(ring, first, tick + 1, values)
        ring.last = tick

    def hold(self, ring: Ring, values: Sequence[float]) -> Ring:
        """The ring with room for the metrics that are known now and were not before."""
        missing = ring.held.missing
        more = [number for number in missing if values[number] == values[number]]
        if not more:
            return ring
        percents = tuple(number for number in more if number in PERCENTS)
        numbers = tuple(number for number in more if number not in PERCENTS)
        held = Held(
            ring.held.percents + percents,
            ring.held.numbers + numbers,
            tuple(number for number in missing if number not in more),
        )
        return Ring(
            ring.last,
            self.helds.setdefault(held, held),
            ring.percents + BLANK_PERCENTS * len(percents),
            ring.numbers + BLANK_NUMBERS * len(numbers),
        )

    def add_past(self, rows: Sequence[Row], now: float) -> None:
        """Put readings of the time of a cut in their place, where nothing is known.

        Each stands for FIFTH ticks, and the newest until the live ones of a node that is back.
        """
        for when, node, job, *readings in reversed(rows):
            key = (from_field(node), from_field(job))
            tick = self.tick - round((now - when) / TICK_SECONDS)
            known = dict(zip(PAST_KEYS, readings))
            values = [known.get(metric, math.nan) for metric in GRAPHS]
            if key not in self.rings or self.rings[key].last < self.tick:
                self.note(key, GAP, self.tick)
            ring = self.hold(self.rings[key], values)
            self.rings[key] = ring
            is_live = ring.percents[self.tick % FINE] != NO_PERCENT
            end = min(tick + 2 * FIFTH, self.tick) if is_live else tick + 1
            for at in range(max(tick - FIFTH, self.tick - FINE) + 1, end):
                fill_readings(ring, at, values)

    def forget(self, tick: int, limit: int) -> None:
        """Drop the rings with nothing left in them; all that are not in use when too many are."""
        kept = FINE if len(self.rings) <= limit else 1
        self.rings = {
            key: ring for key, ring in self.rings.items() if tick - ring.last < kept
        }
        if len(self.helds) > len(self.rings):  # of rings that are gone or have grown
            helds = [ring.held for ring in self.rings.values()]
            self.helds = dict(zip(helds, helds))

    def series(self, row: Message, metric: str, points: int, step: int) -> List[float]:
        """A metric's last readings, every step-th of them, oldest first."""
        if metric not in GRAPHS:
            return []
        number = GRAPHS.index(metric)
        key = (row["node"] or row["address"], row["job"])
        ring = self.rings.get(key, EMPTY_RING)
        last = ring.last
        if number in ring.held.missing:
            return [math.nan] * points
        stretch = stretch_of(number, ring.held)
        stride = step * stretch.ticks
        newest = self.tick - self.tick % stride
        oldest = newest - (points - 1) * stride
        held = ring.percents if number in PERCENTS else ring.numbers
        first = oldest // stretch.ticks
        readings = read_stretch(held, stretch, first, step, points)
        forgotten = (last - FINE - oldest) // stride + 1
        if forgotten > 0:
            readings[:forgotten] = [math.nan] * min(forgotten, points)
        told = max(0, (last - oldest) // stride + 1)
        readings[told:] = [math.nan] * (points - told)
        return readings


def read_stretch(
    held: Any, stretch: Stretch, oldest: int, step: int, points: int
) -> List[float]:
    """Every step-th reading of a stretch from that of a tick on, so many, a ring's at most."""
    at = oldest % stretch.size
    end = stretch.first + stretch.size
    readings = held[stretch.first + at : end : step].tolist()
    after = (at - stretch.size) % step  # where it goes on, at the beginning
    readings += held[stretch.first + after : stretch.first + at : step].tolist()
    readings = readings[:points]
    return unpack_percents(readings) if held.typecode == "H" else readings


# -- what the master takes -----------------------------------------------------

COST = "This master takes %.1f %% of a core and %s of resident memory for %.1f samples a second"
ACCOUNTS = 7  # of what the master took, 10 s apart: a minute's mean


class Account(NamedTuple):
    """What the master has taken and done up to a moment."""

    time: float  # time.monotonic()
    seconds: float  # of CPU
    samples: int


def measure(pid: int) -> Optional[Tuple[float, int]]:
    """(CPU seconds, resident bytes) of a process and its descendants, by proc(5); or None."""
    pids = [pid]
    ticks = 0
    pages = 0
    for each in pids:  # which grows meanwhile
        try:
            with open("/proc/%d/stat" % each) as file:
                fields = file.read().rpartition(")")[2].split()
            with open("/proc/%d/task/%d/children" % (each, each)) as file:
                children = file.read().split()
        except OSError:
            continue  # it has ended
        pids.extend(map(int, children))
        ticks += sum(map(int, fields[11:15]))  # and of those that it has waited for
        pages += int(fields[21])
    if not pages:
        return None
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    return seconds, pages * os.sysconf("SC_PAGE_SIZE")


# -- the role ------------------------------------------------------------------

FRESH_SECONDS = 0.25  # for which a copy of the table serves every request
MAX_LEFT = 1024  # who left, to be remembered
WATCHED_SECONDS = 60.0  # without a request: only every fifth tick has a look
MAX_RESERVED = 16  # connections that wait for the thread in reserve


class Reserve:
    """A thread in reserve: without it no page could tell that there are no more threads."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.waiting: "queue.Queue[Tuple[socket.socket, Address]]" = queue.Queue(
            MAX_RESERVED
        )
        threading.Thread(target=self.serve_for_ever, daemon=True).start()

    def take(self, sock: socket.socket, address: Address, shortage: Shortage) -> None:
        """Have a connection served after those before it; one too many is closed."""
        try:
            self.waiting.put_nowait((sock, address))
        except queue.Full:
            hang_up(sock, address, shortage)

    def serve_for_ever(self) -> None:
        """Serve one connection after another."""
        while True:
            self.serve(*self.waiting.get())


class Dashboard:
    """The role that answers browsers: a thread for each connection, one request each."""

    def __init__(
        self, listener: socket.socket, table: Table, options: argparse.Namespace
    ) -> None:
        self.listener = listener
        self.table = table
        self.options = options
        self.waiting = Waiting(MAX_CLIENTS)
        self.asked = -math.inf  # time.monotonic() of the last request
        self.woken = threading.Event()  # by a request
        self.lock = threading.Lock()  # of the next three
        self.view = table.snapshot()
        self.viewed = time.monotonic()
        self.bodies: Dict[Any, bytes] = {}  # of this view, by what was asked for
        self.cost: Message = {"text": "What this master takes is not known"}
        self.accounts: Deque[Account] = collections.deque(maxlen=ACCOUNTS)
        self.history = History()
        self.past = 0  # readings of the time of a cut that are in it
        self.series = self.history.series
        self.hosts = {
            socket.gethostname().lower(),
            options.dashboard_host.lower(),
            "localhost",
            *options.allow_host,
        }
        self.archive: Optional[Archive] = None  # until it is asked for
        self.past_jobs: Dict[str, Message] = {}  # summaries of records ...
        self.past_due = 0.0  # ... and when they are to be read again: time.monotonic()
        # (path, whether it is packed, query) -> files and facts that it was made of, body:
        # a page of records
        self.reports: Dict[Any, Tuple[Any, bytes]] = {}

    def run(self) -> None:
        """Answer until the supervisor is gone."""
        threading.Thread(target=self.watch, daemon=True).start()
        reserve = Reserve(self.serve)
        accept_loop(
            self.listener,
            self.waiting,
            self.serve,
            HTTP_SECONDS,
            turn_away=reserve.take,
        )

    # -- beside the requests -----------------------------------------------

    def watch(self) -> None:
        """Every TICK_SECONDS: add to the history, and see what the master itself takes.

        As long as nobody asks for a page, it sleeps from one tick that is due to the next.
        """
        self.hosts.add(socket.getfqdn().lower())  # which may take its time
        start = time.monotonic()
        looked = -1
        while True:
            tick = int((time.monotonic() - start) / TICK_SECONDS)
            if tick > looked:
                self.try_to_look(tick)
                looked = tick
            self.woken.clear()
            is_busy = self.is_watched() or tick == 0
            period = TICK_SECONDS if is_busy else FIFTH * TICK_SECONDS
            seconds = period - (time.monotonic() - start) % period
            if is_busy:
                time.sleep(seconds)
            else:
                self.woken.wait(seconds)

    def is_watched(self) -> bool:
        """Whether somebody has asked for something lately."""
        return time.monotonic() - self.asked < WATCHED_SECONDS

    def try_to_look(self, tick: int) -> None:
        """Do what is due at a tick; a defect in it ends nothing."""
        try:
            self.look(tick)
        except Exception:
            log.exception("a defect, met while keeping the history")

    def look(self, tick: int) -> None:
        """What is due at a tick; the first figures need not be waited for."""
        is_due = tick % FIFTH == 0 or tick == 1
        if is_due or self.is_watched():
            self.history.add(self.fresh(), tick)
            self.past, late = self.table.read_past(self.past)
            self.history.add_past(late, time.time())
        taken = measure(self.table.pid) if is_due else None
        if taken:
            self.account(*taken)

    def account(self, seconds: float, memory: int) -> None:
        """Note what the master has taken; it tells what it takes, a mean over the accounts."""
        now = Account(time.monotonic(), seconds, self.view.samples)
        self.accounts.append(now)
        self.cost.update(seconds=seconds, memory=memory)
        first = self.accounts[0]
        if first is now:
            return
        passed = now.time - first.time
        cpu = max(0.0, now.seconds - first.seconds) / passed
        # fewer samples than before: the collector started again
        rate = max(0.0, now.samples - first.samples) / passed
        resident = render_value("agent_rss", memory)
        self.cost["text"] = COST % (100 * cpu, resident, rate)

    def fresh(self) -> Snapshot:
        """A snapshot, taken at most once in FRESH_SECONDS, whoever asks."""
        with self.lock:
            if time.monotonic() - self.viewed > FRESH_SECONDS:
                view = self.table.snapshot()
                view.left = self.who_left(view)
                view.before = self.view
                self.view.before = None  # else all of them would be kept
                self.view = view
                self.viewed = time.monotonic()
                self.bodies = {}
            return self.view

    def who_left(self, view: Snapshot) -> List[Message]:
        """Who left lately, the newest last, also those whose event the ring has lost since."""
        known = {}
        for event in self.view.left + view.events:
            is_recent = event["time"] > view.time - GONE_SECONDS
            if is_recent and event["kind"] in ("finished", "lost"):
                known[event["time"], name_of(event)] = event
        events = sorted(known.values(), key=lambda event: event["time"])
        if view.all_events - self.view.all_events <= EVENTS:
            view.missed = self.view.missed
        return events[-MAX_LEFT:]

    # -- one request -------------------------------------------------------

    def serve(self, sock: socket.socket, address: Address) -> None:
        """Read one request, answer it, close."""
        deadline = time.monotonic() + 2 * HTTP_SECONDS
        try:
            answer = self.respond(sock)
            sock.settimeout(HTTP_SECONDS)
            sock.sendall(answer)
            sock.shutdown(socket.SHUT_WR)
            # unread input would turn the close into a reset
            sock.settimeout(LINGER_READ)
            while sock.recv(MAX_REQUEST) and time.monotonic() < deadline:
                pass
        except OSError:
            pass  # the client went away; there is nobody to tell
        except Exception:
            log.exception("a defect, met while answering %s", address[0])
        finally:
            self.waiting.remove(sock)
            sock.close()

    def respond(self, sock: socket.socket) -> bytes:
        """Read a request: the bytes of its answer."""
        headers = dict(HEADERS)
        method = "GET"
        status = 200
        try:
            request = parse_request(read_request(sock))
            method = request.method
            body = self.answer(request, headers)
        except HTTPError as error:
            status = error.status
            body = error.text.encode() + b"\n"
            headers.update(error.headers)
        head = render_head(status, headers, len(body))
        return head if method == "HEAD" else head + body

    def answer(self, request: Request, headers: Fields) -> bytes:
        """The body of an answer; what is to be said of it goes to headers; HTTPError."""
        self.check_host(request)
        self.check_token(request, headers)
        path, name = find_route(request.path)
        query = request.query
        if "text/html" not in request.fields.get("accept", "text/html"):  # curl
            path = {"/": "/nodes.txt", "/jobs": "/jobs.txt"}.get(path, path)
        if path in NAMED_ROUTES:
            query[NAMED_ROUTES[path]] = name or query.get("name", "")
        if path in ("/job/", "/api/job/") and is_past(self.fresh(), query["job"]):
            path = path.replace("job", "record")
        if path in REPORT_ROUTES:
            return self.answer_report(path, query, request.fields, headers)
        if path == "/job/" and len(find_tasks(self.fresh(), query["job"])) > 1:
            self.look_into_records()
        kind, _ = ROUTES[path]
        is_zipped = "gzip" in request.fields.get("accept-encoding", "")
        body = self.body(path, query, is_zipped)
        headers["Content-Type"] = kind
        headers["Vary"] = "Accept, Accept-Encoding"
        if is_zipped:
            headers["Content-Encoding"] = "gzip"
        return body

    def answer_report(
        self, path: str, query: Query, fields: Fields, headers: Fields
    ) -> bytes:
        """The body of a page that is made of records, which may have to wait for a disk."""
        self.asked = time.monotonic()
        kind, render = REPORT_ROUTES[path]
        with self.lock:
            self.archive = self.archive or Archive(self.options.archive)
        is_zipped = "gzip" in fields.get("accept-encoding", "")
        if path == "/compare" and query.get("id"):  # typed in, beside a list of jobs
            query["b"] = query.pop("id")
        key = (path, is_zipped, tuple(sorted(query.items())))
        view = self.fresh()
        jobs = {query[name] for name in ("job", "a", "b") if query.get(name)}
        if path == "/compare" and len(jobs) == 1:
            jobs = set()  # the other one is to be chosen among all
        try:
            files = self.archive.files(jobs)
            facts: List[Any] = [
                job for job in view.jobs if not jobs or job["job"] in jobs
            ]
            if not jobs:  # a list of jobs has live verdicts, and says as of when
                facts += [verdicts_of(view), time.strftime("%R")]
            made_of, body = self.reports.get(key, (None, b""))
            if made_of != (files, facts):
                body = render(view, query, self).encode("utf-8", "replace")
                if body and is_zipped:
                    body = gzip.compress(body, 1)
                with self.lock:
                    while len(self.reports) >= MAX_REPORTS:
                        del self.reports[next(iter(self.reports))]
                    self.reports[key] = ((files, facts), body)
        except RecordError as error:
            raise HTTPError(503, str(error)) from None
        if not body:
            raise self.missing(path, query, fields)
        headers.update({"Content-Type": kind, "Vary": "Accept, Accept-Encoding"})
        headers["Content-Security-Policy"] = REPORT_POLICY
        if is_zipped:
            headers["Content-Encoding"] = "gzip"
        return body

    def look_into_records(self) -> None:
        """Have the summaries of recorded jobs at hand, now and then: a disk may take its time."""
        now = time.monotonic()
        with self.lock:
            is_due = bool(self.options.record) and now >= self.past_due
            if not is_due:
                return
            self.past_due = now + ROW_SECONDS
            self.archive = self.archive or Archive(self.options.archive)
        try:
            self.past_jobs = {job["job"]: job for job in self.archive.list()}
        except RecordError:
            self.past_due = now + 6 * ROW_SECONDS

    def missing(self, path: str, query: Query, fields: Fields) -> HTTPError:
        """The answer to an address that leads to no job: a page for a browser, else a line."""
        accepted = fields.get("accept", "")
        if REPORT_ROUTES[path][0] != HTML or "text/html" not in accepted:
            words = missing_words(path, query)
            return HTTPError(404, words + "; /jobs has a list of those that are known")
        page = render_missing(path, query, self)
        headers = {"Content-Type": HTML, "Content-Security-Policy": REPORT_POLICY}
        return HTTPError(404, page, headers)

    def check_host(self, request: Request) -> None:
        """HTTPError for a Host that is not ours: a page elsewhere whose name leads here."""
        host = request.fields.get("host", "localhost")
        host = re.sub(r":\d*$", "", host).lower()
        if host not in self.hosts and not NUMERIC_HOST.fullmatch(host):
            raise HTTPError(
                421,
                "this master does not know itself by that name: use its address,"
                " or start it with --allow-host NAME",
            )

    def check_token(self, request: Request, headers: Fields) -> None:
        """HTTPError without the token; who has it in the query gets a cookie, as Jupyter does."""
        token = self.options.dashboard_token
        if token is None:
            return
        key = hashlib.sha256(token.encode()).hexdigest()
        cookie = "sentinel_%d=%s" % (self.options.dashboard_port, key)
        is_in_query = "token" in request.query
        bearer = request.fields.get("authorization", "")[len("Bearer ") :]
        offer = request.query.pop("token", bearer)
        if hmac.compare_digest(hashlib.sha256(offer.encode()).hexdigest(), key):
            if is_in_query and "text/html" in request.fields.get("accept", ""):
                go_to_overview(request, offer)
            # Without a Path it is for the folder that the browser asked for (RFC 6265,
            # 5.1.4): ours, and not the other tools of the proxy that it goes through.
            headers["Set-Cookie"] = cookie + "; HttpOnly; SameSite=Strict"
        elif not has_cookie(request, cookie):
            raise HTTPError(
                401,
                "a token is needed: open the address with ?token= that the master"
                " printed at its start, or send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    def body(self, path: str, query: Query, is_zipped: bool) -> bytes:
        """What one of ROUTES gives for a query, made once for a view, whoever asks; HTTPError."""
        self.asked = time.monotonic()
        self.woken.set()
        view = self.fresh()
        if path == "/healthz" and view.beat > STALE_SECONDS:
            raise HTTPError(503, "the collector has been silent for %.0f s" % view.beat)
        key = (path, is_zipped, tuple(sorted(query.items())))
        with self.lock:
            if key not in self.bodies:
                self.bodies[key] = self.render(view, path, query, is_zipped)
            return self.bodies[key]

    def render(self, view: Snapshot, path: str, query: Query, is_zipped: bool) -> bytes:
        """Make the body of one of ROUTES; HTTPError when the query's node or job is not known."""
        _, render = ROUTES[path]
        text = render(view, query, self)
        if not text:
            raise HTTPError(404, "no such node or job; it may have left long ago")
        body = text.encode("utf-8", "replace")
        return gzip.compress(body, 1) if is_zipped else body


def go_to_overview(request: Request, token: str) -> None:
    """HTTPError for a page in a folder of its own: the cookie of the overview is for all pages."""
    path, _ = find_route(request.path)
    if path in NAMED_ROUTES:
        root = "../" * (path.count("/") - 1)
        location = root + "?" + urllib.parse.urlencode({"token": token})
        raise HTTPError(303, "open the overview first", {"Location": location})


def has_cookie(request: Request, cookie: str) -> bool:
    """Whether the request brings this NAME=VALUE, compared in a time that tells nothing."""
    offers = request.fields.get("cookie", "").split(";")
    return any(
        hmac.compare_digest(offer.strip().encode(), cookie.encode()) for offer in offers
    )


# ============================================================================
# Demo: invented jobs, sent over the wire as real agents send theirs
# ============================================================================
#
# All of it follows from the time alone: a job runs for a while, ends, and soon after the next
# of its kind begins.  Whoever looks for a few minutes sees a node that idles, a node that falls
# silent and comes back, memory that grows until the job dies of it, and jobs that wait.  The
# job that died is submitted again with more memory, and then runs for an hour.

DEMO_USER = "demo"
DEMO_INTERVAL = 2.0  # seconds between two samples of a node
DEMO_LOOK = 5  # samples between two looks at ranks and GPUs
DEMO_PAUSE = 30.0  # seconds from the end of a job to the next of its kind
DEMO_AGAIN = 60.0  # seconds after which all facts of jobs are told again
DEMO_SILENCE = (90.0, 130.0)  # seconds of every ten minutes: a node sends nothing
DEMO_SILENT_NODE = "c12"
DEMO_IDLE_NODE = "c03"
DEMO_SLOWED_GPU = ("c04", 2)
DEMO_UNUSED_GPU = ("c02", 3)
DEMO_CPUS = 32  # of a node
DEMO_RANKS = 4  # processes of a job on a node
DEMO_SECONDS = 2.0  # to connect, or for a line of the collector
DEMO_KNOWN_SECONDS = 3600.0  # after its end a job is known for so long
DEMO_TASKS = 40  # of an array
DEMO_PAST = 900.0  # seconds before the beginning of which jobs are judged


DEMO_MORE = 1.2  # times the memory of a job that died of it, for the next one ...
DEMO_ENOUGH = 0.8  # ... which takes so much of what was not enough before


class DemoJob(NamedTuple):
    """A kind of invented job, of which one after the other runs."""

    number: int  # the id of the first
    name: str
    nodes: Tuple[str, ...]
    memory: float  # bytes of a node that it asks for
    seconds: float  # that it runs
    limit: float  # seconds that it asks for
    age: float  # seconds that it has run when the demonstration begins
    cpu: float  # percent of its CPUs that it uses
    full: float  # percent of its memory that it uses at its end
    gpus: int = 0  # of a node
    array: str = ""
    ending: str = "COMPLETED"
    again: float = (
        0.0  # seconds of the next one, if that asks for more memory and ends well
    )


# fmt: off
DEMO_JOBS = (
    DemoJob(48211, "train_resnet50", ("c01", "c02", "c03", "c04"), 128 * GIB,
            14400, 43200, 7980, cpu=77, full=66, gpus=4),
    DemoJob(48213, "md_npt_310K", ("c11", "c12", "c13", "c14", "c15"), 64 * GIB,
            7200, 14400, 2400, cpu=94, full=58),
    DemoJob(48217, "assemble_genome", ("c21",), 192 * GIB,
            420, 7200, 150, cpu=61, full=100, ending="OUT_OF_MEMORY", again=3600),
    DemoJob(48305, "fit", ("c31",), 16 * GIB,
            240, 1800, 100, cpu=98, full=35, array="48300"),
)
# fmt: on


class DemoRun(NamedTuple):
    """One run of a DemoJob: its id, when it started, and for how long it has run."""

    number: int
    start: float  # time.time()
    passed: float  # seconds; at most those that it runs
    is_over: bool
    seconds: float  # that it runs
    memory: float  # bytes of a node that it asks for
    full: float  # percent of them that it uses at its end
    ending: str


def demo_run(job: DemoJob, began: float, now: float) -> DemoRun:
    """What of a job runs now, or has just ended, in a demonstration that began then."""
    lengths = [job.seconds, job.again] if job.again else [job.seconds]
    cycle = sum(lengths) + DEMO_PAUSE * len(lengths)
    rounds, passed = divmod(now - began + job.age, cycle)
    start = began - job.age + rounds * cycle
    count = int(rounds) * len(lengths)
    memory = job.memory
    full = job.full
    ending = job.ending
    if job.again and passed >= job.seconds + DEMO_PAUSE:
        passed -= job.seconds + DEMO_PAUSE
        start += job.seconds + DEMO_PAUSE
        count += 1
        memory = DEMO_MORE * job.memory
        full = job.full * DEMO_ENOUGH / DEMO_MORE
        ending = "COMPLETED"
    seconds = job.again if count % len(lengths) else job.seconds
    return DemoRun(
        job.number
        + count * (1 if job.array else 1000),  # its next task, or another job
        start,
        min(passed, seconds),
        passed >= seconds,
        seconds,
        memory,
        full,
        ending,
    )


def demo_ended(job: DemoJob, began: float, now: float) -> List[DemoRun]:
    """The runs of a job before the one of now, as long as they are known."""
    run = demo_run(job, began, now)
    ended = []
    for _ in range(demo_task(job, run)[1] - 1 if job.array else 1):
        run = demo_run(job, began, run.start - 1)
        if now - run.start - run.seconds < DEMO_KNOWN_SECONDS:
            ended.append(run)
    return ended


def demo_task(job: DemoJob, run: DemoRun) -> Tuple[int, int]:
    """The array of a run, and the task's number in it, from 1: after the last, another array."""
    arrays, place = divmod(run.number - int(job.array) - 1, DEMO_TASKS)
    return int(job.array) + 1000 * arrays, place + 1


def demo_raw(job: DemoJob, run: DemoRun) -> int:
    """The number that Slurm gives a run."""
    return sum(demo_task(job, run)) if job.array else run.number


def demo_id(job: DemoJob, run: DemoRun) -> str:
    """A run's id, as squeue has it: 48211, 48300_5."""
    return "%d_%d" % demo_task(job, run) if job.array else str(run.number)


def demo_facts(job: DemoJob, run: DemoRun) -> Message:
    """What Slurm would say of a run."""
    facts: Message = {
        "job": demo_id(job, run),
        "raw": str(demo_raw(job, run)),
        "job_name": job.name,
        "user": DEMO_USER,
        "state": run.ending if run.is_over else "RUNNING",
        "partition": "gpu" if job.gpus else "cpu",
        "nodelist": ",".join(job.nodes),
        "nodes": len(job.nodes),
        "cpus": DEMO_CPUS * len(job.nodes),
        "mem": run.memory,
        "submit": run.start - 900,
        "start": run.start,
        "limit": job.limit,
    }
    if job.gpus:
        facts["gpus"] = job.gpus * len(job.nodes)
    if job.array:
        facts["array"] = str(demo_task(job, run)[0])
    if run.is_over:
        facts["end"] = run.start + run.seconds
        facts["exit"] = "0:0" if run.ending == "COMPLETED" else "0:125"
    return facts


def demo_waiting(began: float, now: float) -> List[Message]:
    """What Slurm would say of the jobs that wait: the rest of an array, and one job."""
    common: Message = {
        "user": DEMO_USER,
        "state": "PENDING",
        "partition": "cpu",
        "nodes": 1,
        "cpus": DEMO_CPUS,
        "mem": 16 * GIB,
        "submit": began - 1800,
        "limit": 1800.0,
    }
    waiting = []
    for job in DEMO_JOBS:
        if job.array:
            array, task = demo_task(job, demo_run(job, began, now))
            if task == DEMO_TASKS:
                continue
            tasks = "%d-%d" % (task + 1, DEMO_TASKS)
            number = "%d_[%s]" % (array, tasks)
            facts = dict(common, job=number, raw=str(array), array=str(array))
            facts.update(job_name=job.name, reason="JobArrayTaskLimit")
            waiting.append(facts)
    last = dict(common, job="48400", raw="48400", job_name="postprocess")
    last.update(reason="Priority", start=began + 5400)
    waiting.append(last)
    return waiting


def demo_wave(name: str, what: str, now: float) -> float:
    """A number from -1 to 1 that swings slowly, for each node and reading in its own way."""
    phase = sum((name + what).encode())
    return 0.7 * math.sin(now / 11 + phase) + 0.3 * math.sin(now / 2.7 + 2 * phase)


def demo_cpu(job: DemoJob, name: str, run: DemoRun, now: float) -> float:
    """Percent of its CPUs that a job uses on a node; less while it begins."""
    if name == DEMO_IDLE_NODE:
        return 1.2 + demo_wave(name, "cpu", now)
    swing = 5 * demo_wave(name, "cpu", now)
    begin = min(1.0, run.passed / 15)
    return min(100.0, max(0.5, (job.cpu + swing) * begin))


def demo_memory(job: DemoJob, name: str, run: DemoRun, now: float) -> float:
    """Percent of its memory that a job uses on a node: it grows."""
    share = run.passed / run.seconds
    full = run.full * (0.5 + 0.5 * share) + 0.1 * demo_wave(name, "ram", now)
    return min(100.0, max(1.0, full))


def demo_sample(job: DemoJob, name: str, run: DemoRun, now: float) -> Message:
    """What the agent of a node would send."""
    sample: Message = {
        "node": name,
        "job": demo_id(job, run),
        "job_name": job.name,
        "user": DEMO_USER,
        "version": "demo",
        "interval": DEMO_INTERVAL,
    }
    sample.update(demo_node(job, name, run, now))
    sample.update(demo_job(job, name, run, now))
    if job.gpus:
        gpus = demo_gpus(job, name, now)
        busy = [gpu["gpu"] for gpu in gpus]
        used = sum(gpu["mem_used"] for gpu in gpus)
        sample["gpus"] = job.gpus
        sample["gpu"] = sum(busy) / len(busy)
        sample["gpu_min"] = min(busy)
        sample["gpu_mem"] = 100 * used / sum(gpu["mem_total"] for gpu in gpus)
    return sample


def demo_node(job: DemoJob, name: str, run: DemoRun, now: float) -> Message:
    """The readings of a node as a whole."""
    cpu = demo_cpu(job, name, run, now)
    memory = 256 * GIB
    used = demo_memory(job, name, run, now) / 100 * run.memory + 6 * GIB
    readings: Message = {
        "cpu": cpu,
        "ram": 100 * used / memory,
        "load1": cpu * DEMO_CPUS / 100,
        "cpus": DEMO_CPUS,
        "mem_total": memory,
        "mem_used": used,
        "swap": 0.0,
        "disk": 61.0,
        "disk_tmp": 12.0,
        "disk_shm": 1.5,
        "inodes": 34.0,
        "inodes_tmp": 0.5,
        "psi_cpu": 0.6,
        "psi_mem": 0.0,
        "psi_io": 1.4,
        "nfs_rtt": 0.0014,
        "procs": 412,
        "uptime": 1e6 + now - run.start,
        "agent_cpu": 0.04,
        "agent_rss": 14 * 2.0**20,
    }
    for key, mean in (
        ("disk_read", 2e6),
        ("disk_write", 4e6),
        ("net_rx", 9e6),
        ("net_tx", 8e6),
        ("nfs_ops", 40.0),
    ):
        readings[key] = mean * (1 + demo_wave(name, key, now))
    if len(job.nodes) > 1:
        for key in ("ib_rx", "ib_tx"):
            readings[key] = 6e8 * (1 + demo_wave(name, key, now))
    if job.gpus:
        readings["lustre_read"] = 1.8e8 * (1 + demo_wave(name, "lustre", now))
        readings["lustre_write"] = 3e5
    return readings


def demo_job(job: DemoJob, name: str, run: DemoRun, now: float) -> Message:
    """The readings of a job on a node; one whose memory is full is killed at its very end."""
    full = demo_memory(job, name, run, now)
    used = full / 100 * run.memory
    is_killed = (
        run.ending == "OUT_OF_MEMORY" and run.seconds - run.passed < 2 * DEMO_INTERVAL
    )
    busy = demo_busy(job, name, run, now)
    return {
        "job_cpus": DEMO_CPUS,
        "job_cpu": demo_cpu(job, name, run, now),
        "cores_busy": sum(tenths >= "5" for tenths in busy),
        "job_mem": used,
        "job_cache": min(0.05 * run.memory, run.memory - used),
        "job_mem_limit": run.memory,
        "job_mem_peak": min(run.memory, used + 0.05 * run.memory),
        "job_mem_failcnt": 7 if is_killed else 0,
        "oom_kill": 1 if is_killed else 0,
        "job_ram": full,
        "job_read": 2e7 * (1 + demo_wave(name, "job_read", now)),
        "job_write": 5e6 * (1 + demo_wave(name, "job_write", now)),
        "job_time_limit": job.limit,
        "job_time_left": job.limit - run.passed,
    }


def demo_busy(job: DemoJob, name: str, run: DemoRun, now: float) -> str:
    """How busy each CPU of a node is, in tenths."""
    mean = demo_cpu(job, name, run, now) / 10
    tenths = [mean + demo_wave(name, "cpu%d" % cpu, now) for cpu in range(DEMO_CPUS)]
    return "".join("%d" % min(9, max(0, value)) for value in tenths)


def demo_gpus(job: DemoJob, name: str, now: float) -> List[Message]:
    """The GPUs of a node: one of all does nothing, and one is slowed by its power limit."""
    gpus = []
    for index in range(job.gpus):
        busy = 93 + 5 * demo_wave(name, "gpu%d" % index, now)
        is_used = (name, index) != DEMO_UNUSED_GPU
        if name == DEMO_IDLE_NODE or not is_used:
            busy = 0.0
        gpu: Message = {
            "part": "gpu",
            "index": index,
            "uuid": "GPU-demo-%s-%d" % (name, index),
            "name": "invented GPU",
            "gpu": busy,
            "mem_used": (0.72 if is_used else 0.01) * 80 * GIB,
            "mem_total": 80 * GIB,
            "power": 60 + 3.2 * busy,
            "power_limit": 400.0,
            "temp": 34 + busy / 3,
            "processes": 1 if is_used else 0,
        }
        if (name, index) == DEMO_SLOWED_GPU:
            gpu.update(throttle="power cap", power=399.0, temp=71.0)
        gpus.append(gpu)
    return gpus


def demo_ranks(job: DemoJob, name: str, run: DemoRun, now: float) -> List[Message]:
    """The processes of a job on a node."""
    ranks = []
    cpus = DEMO_CPUS // DEMO_RANKS
    first = job.nodes.index(name) * DEMO_RANKS
    used = demo_job(job, name, run, now)["job_mem"] / DEMO_RANKS
    mean = demo_cpu(job, name, run, now)
    for local_rank in range(DEMO_RANKS):
        begin = local_rank * cpus
        share = 1 + 0.04 * demo_wave(name, "rank%d" % local_rank, now)
        rank: Message = {
            "part": "rank",
            "pid": 4000 + local_rank,
            "rank": first + local_rank,
            "local_rank": local_rank,
            "step": "0",
            "program": job.name.partition("_")[0],
            "cpu": min(100.0, mean * share) * cpus,
            "mem": used,
            "peak": used,
            "threads": cpus,
            "running": round(cpus * mean / 100),
            "cpus": "%d-%d" % (begin, begin + cpus - 1),
            "on": "%d-%d" % (begin, begin + cpus - 1),
            "state": "R",
            "read": 5e6 * share,
            "write": 1e6 * share,
            "read_total": 5e6 * run.passed,
            "write_total": 1e6 * run.passed,
        }
        if name == DEMO_IDLE_NODE:
            rank.update(state="S", wchan="futex_wait_queue", read=0.0, write=0.0)
        if job.gpus:
            rank["gpu"] = str(local_rank)
        ranks.append(rank)
    return ranks


def demo_parts(
    job: DemoJob, name: str, run: DemoRun, now: float, look: int
) -> List[Message]:
    """What a look at a node finds: its CPUs, the job's processes and GPUs."""
    parts: List[Message] = [
        {
            "part": "look",
            "processes": DEMO_RANKS,
            "shown": DEMO_RANKS,
            "cpus": "0-%d" % (DEMO_CPUS - 1),
        },
        {"part": "core", "first": 0, "busy": demo_busy(job, name, run, now)},
    ]
    parts += demo_ranks(job, name, run, now)
    parts += demo_gpus(job, name, now)
    return [dict(part, look=look) for part in parts]


def write_sample(message: Message) -> bytes:
    """The bytes of a flat dict of texts and numbers, as the wire has them: see OPCODES."""
    data = b"\x80\x02}("
    for key, value in message.items():
        data += write_text(key)
        if isinstance(value, str):
            data += write_text(value)
        else:
            data += b"G" + struct.pack(">d", value)
    return data + b"u."


def write_text(text: str) -> bytes:
    """BINUNICODE and a text."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


class DemoAgent:
    """A connection to the collector, as an agent has it."""

    def __init__(self, address: Tuple[str, int], secret: Optional[bytes]) -> None:
        self.sock = socket.create_connection(address, DEMO_SECONDS)
        if secret:
            line = self.sock.makefile("rb").readline(RECEIVE_SIZE)
            nonce = line.partition(b" ")[2].strip()
            answer = hmac.new(secret, nonce, hashlib.sha256).hexdigest()
            self.send({"auth": answer})

    def send(self, message: Message) -> None:
        """Send a sample, a part or a goodbye; OSError when the collector is gone."""
        self.sock.sendall(write_sample(message))

    def close(self, words: str) -> None:
        """Say goodbye."""
        with contextlib.suppress(OSError):
            self.send({"bye": words})
        self.sock.close()


class Demo:
    """The role that plays the agents of invented jobs, and Slurm."""

    def __init__(
        self, listener: None, table: Table, options: argparse.Namespace
    ) -> None:
        self.address = (reachable(options.host), options.port)
        self.secret = options.secret
        self.began = options.demo_began
        self.agents: Dict[Tuple[str, str], DemoAgent] = {}  # by (node, job)
        self.told: Dict[str, Message] = {}  # facts, by raw id
        self.told_all = -math.inf  # time.time()
        self.look = 0

    def run(self) -> None:
        """Play until the supervisor is gone."""
        parent = multiprocessing.parent_process()
        due = time.monotonic()
        while parent and parent.is_alive():
            try:
                self.play(time.time())
            except OSError as error:
                log.debug("the demonstration: %s", error)  # a collector starts again
            due = max(due + DEMO_INTERVAL, time.monotonic())
            seconds = due - time.monotonic()
            multiprocessing.connection.wait([parent.sentinel], seconds)

    def play(self, now: float) -> None:
        """Send what is due at a moment."""
        facts = demo_waiting(self.began, now)
        self.look += 1
        for job in DEMO_JOBS:
            run = demo_run(job, self.began, now)
            for each in (*demo_ended(job, self.began, now), run):
                facts.append(demo_facts(job, each))
            for name in job.nodes:
                self.play_node(job, name, run, now)
        self.tell(facts, now)

    def play_node(self, job: DemoJob, name: str, run: DemoRun, now: float) -> None:
        """Send a sample of a node, or say goodbye once its job is over."""
        key = (name, demo_id(job, run))
        if run.is_over:
            if key in self.agents:
                self.agents.pop(key).close("the job has ended: " + run.ending)
            return
        first, last = DEMO_SILENCE
        if name == DEMO_SILENT_NODE and first <= (now - self.began) % 600 < last:
            return
        messages = [demo_sample(job, name, run, now)]
        if self.look % DEMO_LOOK == 0:
            messages += demo_parts(job, name, run, now, self.look // DEMO_LOOK)
        try:
            if key not in self.agents:
                self.agents[key] = DemoAgent(self.address, self.secret)
            for message in messages:
                self.agents[key].send(message)
        except OSError:
            agent = self.agents.pop(key, None)
            if agent:
                agent.sock.close()

    def tell(self, facts: List[Message], now: float) -> None:
        """Tell the facts that have changed, now and then all: the collector may be a new one."""
        if now - self.told_all > DEMO_AGAIN:
            self.told = {}
            self.told_all = now
        news = [each for each in facts if self.told.get(each["raw"]) != each]
        if not news:
            return
        agent = DemoAgent(self.address, self.secret)
        for each in news:
            agent.send(dict(each, part="job"))
            self.told[each["raw"]] = each
        agent.close("told")


def demo_past(
    began: float, now: float, seconds: float, step: float
) -> Iterator[Tuple[float, DemoJob, DemoRun]]:
    """Each job that runs now, at each step of so many seconds before, the oldest first."""
    for back in range(int(seconds / step), 0, -1):
        when = now - back * step
        for job in DEMO_JOBS:
            run = demo_run(job, began, when)
            if not run.is_over and run.start == demo_run(job, began, now).start:
                yield when, job, run


def demo_row(sample: Message, seen: float) -> Row:
    """A sample as Snapshot.rows() has it: seen by time.monotonic()."""
    row: List[Any] = [0, b"", *UNKNOWN[:2], seen, math.nan, b"", *UNKNOWN[2:]]
    for key, value in sample.items():
        if key in INDEX:
            place = NODE_KEYS.index(key)
            row[place] = value.encode() if isinstance(value, str) else float(value)
    return tuple(row)


def parts_of(told: List[Message]) -> Parts:
    """A look at a node as Snapshot.parts() has it."""
    kinds: Dict[str, List[Message]] = {kind: [] for kind in PART_FIELDS}
    for part in told:
        known: Message = {key: part.get(key) for key, _ in PART_FIELDS[part["part"]]}
        kinds[part["part"]].append(known)
    return Parts(kinds["look"][0], kinds["core"], kinds["rank"], kinds["gpu"])


def fill_history(dashboard: Dashboard, began: float) -> None:
    """Have a dashboard know what it would, had it been there before the beginning."""
    now = time.time()
    for when, job, run in demo_past(began, now, FINE * TICK_SECONDS, 2 * TICK_SECONDS):
        tick = round((when - now) / TICK_SECONDS)
        for name in job.nodes:
            row = demo_row(demo_sample(job, name, run, when), 0.0)
            dashboard.history.note((name, demo_id(job, run)), PICK_GRAPHS(row), tick)


def fill_recordings(recorder: Any, began: float) -> None:
    """Have the recorder know what it would, had it been there before the beginning."""
    now = time.time()
    if now - began > ROW_SECONDS:
        return  # it is one that started again, and all of that is recorded
    for when, job, run in demo_past(began, now, DEMO_PAST, ROW_SECONDS):
        facts: Message = dict.fromkeys(JOB_KEYS)
        facts.update(demo_facts(job, run))
        recording = recorder.recording(facts["job"], when)
        recording.tell(facts, when)
        for name in job.nodes:
            row = demo_row(demo_sample(job, name, run, when), time.monotonic())
            recording.take(name, row, when)
            if now - when < 2 * ROW_SECONDS:
                told = demo_parts(job, name, run, when, 0)
                recording.traces[name].take_parts(parts_of(told))
        recording.close_row(when)
    for recording in recorder.recordings.values():
        recording.diagnose_due = now


# What a role is told of the time before the beginning
DEMO_FILLS: Dict[str, Callable[[Any, float], None]] = {
    "dashboard": fill_history,
    "recorder": fill_recordings,
}


# ============================================================================
# Terminal: screens in place of the log, and a terminal that is sane behind them
# ============================================================================
#
# With --tui the master's stderr, and that of all it starts, is a pipe.  test_reader.py, which has
# the terminal, reads it: it shows the last lines below its screens, and copies them to the real
# stderr as long as there are none, while ssh asks for a password say.
#
#     roles, agents, ssh --stderr--> pipe --> test_reader.py --> terminal
#
# Nothing waits for the one who reads: what there is no room for in the pipe is lost.  When the
# user leaves the screens the master is told by SIGTERM, as by anybody else.


class Terminal:
    """The master's terminal and its stderr, as they were before the screens."""

    def __init__(self) -> None:
        self.modes: Any = None  # None: this is no terminal
        with contextlib.suppress(termios.error, OSError):
            self.modes = termios.tcgetattr(0)
        self.stderr = os.dup(2)
        self.log, log_end = os.pipe()
        os.set_blocking(log_end, False)
        os.dup2(log_end, 2)
        os.close(log_end)

    def close(self) -> None:
        """Give stderr and the terminal back."""
        os.dup2(self.stderr, 2)
        self.restore()

    def restore(self) -> None:
        """Give the terminal its modes again: screens that were killed did not."""
        with contextlib.suppress(termios.error, OSError):
            # in the background, setting them would stop us
            if self.modes and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSADRAIN, self.modes)


class Screens(subprocess.Popen):  # type: ignore[type-arg]
    """test_reader.py --tui as a child, under the names that a multiprocessing.Process has."""

    def __init__(self, options: argparse.Namespace) -> None:
        terminal = options.terminal
        terminal.restore()
        command = [sys.executable, beside("test_reader.py"), "--tui"]
        command += ["--shm-name", options.shm_name, "--log", str(terminal.log)]
        if options.ssh:
            command.append("--after-login")
        end, held = os.pipe()
        self.sentinel = os.fdopen(end, "rb", 0)  # it ends with the process
        super().__init__(command, stderr=terminal.stderr, pass_fds=(terminal.log, held))
        os.close(held)

    @property
    def exitcode(self) -> Optional[int]:
        """The exit code, or minus the signal; None while it runs."""
        return self.poll()

    def join(self, timeout: Optional[float] = None) -> None:
        """Wait for its end, so many seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


# ============================================================================
# Recorder: the table -> a record of each job, on a thread that may wait for a disk
# ============================================================================

LOOK_SECONDS = 2.0  # between two looks at the table ...
MANY_SLOTS = 128  # ... with more nodes in jobs, it is ROW_SECONDS
MAX_RECORDINGS = 1024  # jobs at once, and nodes of each: peers choose their names
MAX_TRACES = 4096
DIAGNOSE_SECONDS = 15.0  # between two verdicts on a job, at least ...
DIAGNOSE_SHARE = 1000  # ... and so many times of what it takes to judge all of them
VERDICT_SECONDS = 300.0  # until figures that changed are worth another line
TRACE_POINTS = 360  # of a node's curves, one a row: the last hour
MAX_TRACED = 1024  # nodes with curves
TAIL_ROWS = 60  # rows before a job's end that are kept as they were: ten minutes
RANK_ROWS = 30  # rows of the record from one list of ranks to the next
GPU_ROWS = 6  # and from one look at the GPUs to the next
MAX_RANKS = 64  # in such a list ...
MAX_LAST_RANKS = 256  # ... and in the last one
MAX_JOB_EVENTS = 256  # of one job, that are kept as evidence
LINGER_JOB_SECONDS = 60.0  # that nodes may send on after their job's end
LEFT_SECONDS = 30.0  # after the last goodbye: a job that only agents know of is over
MAX_BACKLOG = 8 * 2**20  # bytes that wait for a disk
RETRY_SECONDS = 5.0  # until what failed is tried again
HANG_SECONDS = 10.0  # of one call: the disk hangs
FLUSH_SECONDS = 2.0  # for what waits, when the master ends
PRUNE_SECONDS = 3600.0  # between two looks for what is too old
JOB_AT = NODE_KEYS.index("job")
NODE_AT = NODE_KEYS.index("node")
PICK_RECORDED = operator.itemgetter(*map(NODE_KEYS.index, RECORDED))
PICK_FACTS = operator.itemgetter(*map(NODE_KEYS.index, NODE_FACTS))
RANK_KEYS = (
    "rank",
    "local_rank",
    "step",
    "pid",
    "program",
    "cpu",
    "mem",
    "peak",
    "threads",
    "cpus",
    "on",
    "state",
    "wchan",
    "read_total",
    "write_total",
    "gpu",
)


Diagnose = Callable[[JobEvidence], List[Verdict]]


class Work(NamedTuple):
    """Something that is to be done for a job's files."""

    # "lines", "past" (lines, unless the job's end is recorded), "pack", "report", or
    # "missing report"
    kind: str
    job: str
    data: bytes = b""  # lines
    head: bytes = b""  # what goes before them in a new file


class RecordWriter:
    """Writes records on a thread of its own; whoever posts never waits for a disk.

    What fails is tried again until it passes, for each job by itself and in its order; that is
    told in one line, and in another when it has passed.
    """

    def __init__(self, folder: str, mark: str, render: Callable[[Record], str]) -> None:
        self.folder = folder
        self.mark = mark
        self.render = render
        self.changed = threading.Condition()  # of what follows
        self.waiting: Dict[str, Deque[Work]] = {}
        self.size = 0
        self.retry: Dict[str, float] = {}  # job -> time.monotonic() of the next try
        self.busy_since: Optional[float] = None
        self.is_in_trouble = False
        self.hang_told = False
        self.opened: Set[str] = set()  # paths that this process has written to
        self.lost: Set[str] = set()  # jobs of which lines were forgotten
        self.pruned = -math.inf
        threading.Thread(target=self.run, name="records", daemon=True).start()

    # ---- whoever posts

    def post(self, work: Work) -> None:
        """Have it done, after what else waits for that job; never blocks."""
        with self.changed:
            self.waiting.setdefault(work.job, collections.deque()).append(work)
            self.size += len(work.data)
            while self.size > MAX_BACKLOG:
                self.drop()
            self.changed.notify()

    def drop(self) -> None:
        """Forget the oldest lines of the job that has the most waiting."""
        job = max(self.waiting, key=lambda job: len(self.waiting[job]))
        self.size -= len(self.waiting[job].popleft().data)
        self.lost.add(job)
        if not self.waiting[job]:
            del self.waiting[job]

    def check(self) -> None:
        """Tell when the disk hangs: the thread that waits for it cannot."""
        since = self.busy_since
        if since is None or time.monotonic() - since < HANG_SECONDS:
            return
        if not self.hang_told:
            self.hang_told = True
            self.tell_trouble("it does not answer")

    def finish(self, seconds: float) -> bool:
        """Wait until nothing waits any more, so many seconds at most."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while self.waiting or self.busy_since is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self.changed.wait(min(left, 0.1))
        return True

    # ---- the thread

    def run(self) -> None:
        """Do what is posted, for ever."""
        while True:
            work = self.take()
            try:
                rest = self.do(work)
            except OSError as error:
                self.put_back(work, work.data)
                self.tell_trouble(error.strerror or str(error))
                self.hang_told = False
            except Exception:
                log.exception("a defect, met while recording job %s", work.job)
            else:
                if rest:
                    self.put_back(work, rest, seconds=0.0)
                else:
                    self.tell_passed(work.job)
            finally:
                with self.changed:
                    self.busy_since = None
                    self.changed.notify_all()

    def take(self) -> Work:
        """Wait for something to do."""
        with self.changed:
            while True:
                now = time.monotonic()
                for job, works in self.waiting.items():
                    if now < self.retry.get(job, 0.0):
                        continue
                    work = works.popleft()
                    if not works:
                        del self.waiting[job]
                    self.size -= len(work.data)
                    self.busy_since = now
                    return work
                self.changed.wait(1.0 if self.waiting else None)

    def put_back(self, work: Work, rest: bytes, seconds: float = RETRY_SECONDS) -> None:
        """Try again later, before what came after it."""
        with self.changed:
            works = self.waiting.setdefault(work.job, collections.deque())
            works.appendleft(work._replace(data=rest))
            self.size += len(rest)
            self.retry[work.job] = time.monotonic() + seconds

    def tell_trouble(self, why: str) -> None:
        """Tell that nothing can be written, once."""
        if not self.is_in_trouble:
            self.is_in_trouble = True
            log.error(
                "cannot record in %s for now: %s; what happens meanwhile is kept, at most"
                " %d MB of it",
                self.folder,
                why,
                MAX_BACKLOG // 2**20,
            )

    def tell_passed(self, job: str) -> None:
        """Tell that the trouble is over, once all of it is."""
        self.retry.pop(job, None)
        self.hang_told = False
        if self.is_in_trouble and not self.retry:
            self.is_in_trouble = False
            log.info("recording in %s again", self.folder)

    # ---- what is done

    def do(self, work: Work) -> bytes:
        """Do it: the rest of the lines, if not all of them found room (OSError)."""
        path = self.path_of(work.job)
        if work.kind == "report":
            self.write_report(work.job)
        elif work.kind == "missing report":
            if not os.path.exists(report_path(self.folder, work.job)):
                self.write_report(work.job)
        elif work.kind == "pack":
            if os.path.exists(path):
                pack(path, work.job, self.mark)
            self.opened.discard(path)
        elif work.kind != "past" or self.is_news(work):
            return self.append(path, work)
        return b""

    def path_of(self, job: str) -> str:
        """This master's file for a job."""
        name = "%s.%s.jsonl" % (safe_name(job), self.mark)
        return os.path.join(self.folder, name)

    def append(self, path: str, work: Work) -> bytes:
        """Append lines, after what a new or an interrupted file needs: the rest of them."""
        if self.opened and not os.path.isdir(self.folder):
            self.opened.clear()
            log.warning("%s was gone: made again", self.folder)
        make_folder(self.folder)
        before = b""
        if not os.path.exists(path) or work.job in self.lost:
            before = work.head
            self.lost.discard(work.job)
        elif path not in self.opened:
            before = gap_line(path, work.data)
        self.opened.add(path)
        if before:
            append_lines(path, before)
        taken = append_lines(path, work.data)
        return work.data[taken:]

    def is_news(self, work: Work) -> bool:
        """Whether a job that had ended before this process began is not recorded yet."""
        record = read_record(self.folder, work.job)
        return record is None or not record.has_ended

    def write_report(self, job: str) -> None:
        """Write the report of a job, by all that is recorded of it; then look for what is old."""
        record = read_record(self.folder, job)
        if record:
            text = self.render(record).encode("utf-8", "replace")
            write_file(report_path(self.folder, job), text, self.mark)
            write_sketch(self.folder, record, self.mark)
            for cached in (plain_cell, places_of):  # the next report is of another job
                cached.cache_clear()
        if time.monotonic() - self.pruned > PRUNE_SECONDS:
            prune(self.folder, time.time(), self.mark)
            self.pruned = time.monotonic()


def gap_line(path: str, data: bytes) -> bytes:
    """A line for the time between a file's last row and the first of data; b"" without these."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_HEAD))
        tail = file.read(MAX_HEAD)
    before = [line["row"] for line in read_lines(tail) if "row" in line]
    after = [line["row"] for line in read_lines(data) if "row" in line]
    if not before:
        return b""
    until = after[0] if after else time.time()
    return record_line({"gap": before[-1], "until": round(until, 1)})


class Traced(NamedTuple):
    """Metrics of which a node's curves have as many points."""

    points: int
    keys: List[str]
    pick: Any  # them, out of a sample, as a tuple


def make_traced() -> List[Traced]:
    """The metrics that CURVES has, with those together that have as many points."""
    groups: Dict[int, List[str]] = {}
    for key, points in CURVES.items():
        if key in NUMBERS:
            groups.setdefault(points or TRACE_POINTS, []).append(key)
    traced = []
    for points, keys in groups.items():
        places = [NODE_KEYS.index(key) for key in keys]
        pick: Any = operator.itemgetter(*places)
        if len(places) == 1:  # it would pick no tuple
            pick = operator.itemgetter(slice(places[0], places[0] + 1))
        traced.append(Traced(points, keys, pick))
    return traced


TRACED = make_traced()


class Curves:
    """The last hour of a node at most: of each metric so much as checks look at."""

    def __init__(self) -> None:
        self.times = array.array("d")
        # for each of TRACED: the readings of its keys, row by row
        self.readings = [array.array("f") for _ in TRACED]

    def add(self, now: float, sample: Row) -> None:
        """Append a sample."""
        self.times.append(now)
        if len(self.times) >= 2 * TRACE_POINTS:
            del self.times[:TRACE_POINTS]
        for readings, traced in zip(self.readings, TRACED):
            readings.extend(traced.pick(sample))
            size = traced.points * len(traced.keys)
            if len(readings) >= 2 * size:
                del readings[:size]

    def known(self) -> Dict[str, Curve]:
        """The curves of the metrics that are known."""
        curves = {}
        for readings, (points, keys, _) in zip(self.readings, TRACED):
            last = readings[-points * len(keys) :]
            times = self.times[-(len(last) // len(keys)) :]
            for place, key in enumerate(keys):
                values = last[place :: len(keys)]
                curve = [point for point in zip(times, values) if point[1] == point[1]]
                if curve:
                    curves[key] = curve
        return curves


Range = Optional[Tuple[float, float, float]]  # least, mean, most; None if unknown
NO_RANGES: List[Range] = [None] * len(RECORDED)


def range_of(values: Sequence[float]) -> Range:
    """The range of the values that are not NaN."""
    total = sum(values)
    if total != total:
        values = [value for value in values if value == value]
        total = sum(values)
    if not values:
        return None
    return min(values), total / len(values), max(values)


class Trace:
    """A node of a job: its newest sample, its curves, and what its next row is made of."""

    def __init__(self, name: str, place: int) -> None:
        self.name = name
        self.place = place
        self.sample: Row = ()
        self.slot = -1
        self.seen = -math.inf  # time.time() of the last look that found it
        self.lost: Optional[float] = None
        self.curves = Curves()
        self.ranks: List[Message] = []
        self.gpus: List[Message] = []
        self.cores: Dict[int, float] = {}
        self.cpus: Set[int] = set()
        # where its newest look at its parts is, as the table has it: (rows, slot)
        self.unread: Optional[Tuple[bytes, int]] = None
        self.looks: List[Row] = []  # RECORDED at each look since the last row

    def take_looks(self, now: float) -> List[Range]:
        """The range of each of RECORDED since the last row; it begins a new one."""
        if not self.looks:
            return NO_RANGES
        if self.place < MAX_TRACED:
            self.curves.add(now, self.sample)
        if len(self.looks) == 1:  # as with MANY_SLOTS
            ranges = [
                (value, value, value) if value == value else None
                for value in self.looks[0]
            ]
        else:
            ranges = list(map(range_of, zip(*self.looks)))
        self.looks = []
        return ranges

    def take_parts(self, parts: Parts) -> None:
        """Note a node's newest look: its ranks, GPUs and cores."""
        self.ranks = list(parts.ranks)
        self.gpus = list(parts.gpus)
        self.cpus = parse_cpu_list(parts.look.get("cpus"))
        self.cores = {
            cpu: min(1.0, (tenths + 0.5) / 10)
            for cpu, tenths in cpus_of(parts).items()
            if tenths is not None
        }

    def evidence(self, view: Snapshot) -> NodeEvidence:
        """What a verdict can rest upon."""
        node = view.make_node(self.sample)
        sample = {key: node[key] for key in INDEX}
        return NodeEvidence(
            self.name,
            sample,
            self.curves.known(),
            self.ranks,
            self.gpus,
            self.cores,
            self.cpus,
            self.lost,
        )


class Recording:
    """A job that is being recorded: what has been seen of it, and what its next lines say."""

    def __init__(self, job: str, now: float) -> None:
        self.job = job
        self.begun = now
        self.facts: Message = dict.fromkeys(JOB_KEYS)
        self.facts["job"] = job
        self.is_known = False  # whether Slurm says something of it
        self.traces: Dict[str, Trace] = {}
        self.nodes: Dict[str, Message] = {}  # as the last line of nodes has them
        self.seen = now  # when one of its nodes was there
        self.fine: List[RecordRow] = []  # rows that are not written yet
        self.tail: Deque[RecordRow] = collections.deque(maxlen=TAIL_ROWS)
        self.written = 0  # rows
        self.step = ROW_SECONDS
        self.events: Deque[Message] = collections.deque(maxlen=MAX_JOB_EVENTS)
        self.verdicts: Optional[List[Message]] = None
        self.said: Any = None  # of the verdicts: those of the last line
        self.said_at = -math.inf
        self.diagnose_due = now + ROW_SECONDS
        self.ended_at: Optional[float] = None
        self.has_failed = False  # the verdicts' code
        self.burst: Optional[float] = None  # as in JobEvidence
        self.lines: List[bytes] = []

    # ---- what comes

    def take(self, name: str, row: Row, now: float) -> None:
        """Note the newest sample of a node."""
        trace = self.traces.get(name)
        if trace is None:
            if len(self.traces) >= MAX_TRACES:
                return
            trace = self.traces[name] = Trace(name, len(self.traces))
        trace.sample = row
        trace.slot = row[0]
        trace.seen = self.seen = now
        trace.lost = None
        trace.looks.append(PICK_RECORDED(row))

    def tell(self, facts: Message, now: float) -> None:
        """Note what Slurm says; what is new of an end is judged at once."""
        self.is_known = True
        if any(facts[key] not in (None, self.facts[key]) for key in JOB_KEYS):
            for key in JOB_KEYS:
                if facts[key] is not None:
                    self.facts[key] = facts[key]
            self.lines.append(job_line(self.facts, now))
            if self.facts["state"] in ENDED_STATES:
                self.diagnose_due = now
        if self.facts["state"] in ENDED_STATES and self.ended_at is None:
            self.ended_at = now

    def guess(self, now: float) -> None:
        """What the agents of a job say of it, when Slurm says nothing."""
        sample = next(iter(self.traces.values())).sample
        known = dict(zip(NODE_KEYS, map(from_field, sample)))
        facts: Message = dict.fromkeys(JOB_KEYS)
        facts.update(
            job=self.job,
            raw=known["job"],
            job_name=known["job_name"],
            user=known["user"],
            state="RUNNING",
            limit=known["job_time_limit"],
        )
        limit, left = known["job_time_limit"], known["job_time_left"]
        if self.facts["start"] is None and limit and left is not None:
            facts["start"] = round(now - float(limit) + float(left))
        self.tell(facts, now)
        self.is_known = False

    def hear(self, event: Message) -> None:
        """Note an event."""
        kept = {key: event[key] for key in EVENT_KEYS if event[key] is not None}
        self.events.append(event)
        self.lines.append(record_line({"event": kept}))
        trace = self.traces.get(name_of(event))
        if trace and event["kind"] == "lost":
            trace.lost = event["time"]

    def point_at_parts(self, rows: bytes) -> None:
        """Note where the newest looks are; of a node that has left, its last one is read."""
        for trace in self.traces.values():
            if trace.seen == self.seen:
                trace.unread = (rows, trace.slot)
        places = [trace.unread for trace in self.traces.values() if trace.unread]
        if any(place[0] is not rows for place in places):
            self.read_parts()

    def read_parts(self) -> None:
        """Read the newest looks: most are replaced by others before anybody asks for them."""
        places: Dict[int, Tuple[bytes, Dict[int, Trace]]] = {}
        for trace in self.traces.values():
            if trace.unread:
                rows, slot = trace.unread
                places.setdefault(id(rows), (rows, {}))[1][slot] = trace
                trace.unread = None
        for rows, traces in places.values():
            for slot, parts in read_parts(rows, traces).items():
                if parts.look:
                    traces[slot].take_parts(parts)

    # ---- what is written

    def close_row(self, now: float) -> None:
        """End a row of ROW_SECONDS, and write it if it is time for one."""
        self.name_nodes()
        row = self.make_row(now)
        if row is None:
            return
        if self.fine and is_gap(self.fine[-1], row):
            self.write_rows()
        self.fine.append(row)
        self.tail.append(row)
        age = now - (self.facts["start"] or self.begun)
        self.step = step_of(age, len(self.traces))
        if row.time - self.fine[0].time + ROW_SECONDS > self.step - ROW_SECONDS / 2:
            self.write_rows()
            self.write_parts()

    def name_nodes(self) -> None:
        """Name the nodes that are new, or that have other CPUs or memory than before."""
        before = self.nodes
        self.nodes = {}
        for trace in self.traces.values():
            values = map(from_field, PICK_FACTS(trace.sample))
            known = zip(NODE_FACTS, values)
            facts = {key: value for key, value in known if value is not None}
            self.nodes[trace.name] = facts
        if self.nodes != before:
            self.lines.append(record_line({"nodes": self.nodes}))

    def make_row(self, now: float) -> Optional[RecordRow]:
        """What was seen since the last row; None if that is nothing."""
        values: Dict[str, List[Optional[float]]] = {}
        nodes = [trace.take_looks(now) for trace in self.traces.values()]
        for key, ranges in zip(RECORDED, zip(*nodes)):
            known = [each for each in ranges if each]
            if not known:
                continue
            means = [each[1] if each else None for each in ranges]
            least = min(each[0] for each in known)
            most = max(each[2] for each in known)
            values[key] = [least, mean_known(means), most]
            if key in BY_NODE:
                values[key] += means
        if not values:
            return None
        when = round(min(now, self.seen), 1)
        step = float(ROW_SECONDS)
        if self.tail:
            step = min(step, when - self.tail[-1].time)
        else:
            step = min(step, max(LOOK_SECONDS, when - self.begun))
        return RecordRow(when, round(step, 1), list(self.traces), values)

    def write_rows(self) -> None:
        """Write the rows that wait, as one."""
        if self.fine:
            is_alone = len(self.fine) == 1
            row = self.fine[0] if is_alone else merge_rows(self.fine)
            self.lines.append(row_line(row))
            self.fine = []
            self.written += 1

    def write_parts(self) -> None:
        """Now and then: how the GPUs are, and the ranks."""
        if self.written % GPU_ROWS == 1:
            self.write_gpus()
        if self.written % RANK_ROWS == 1:
            self.write_ranks(MAX_RANKS)

    def write_gpus(self) -> None:
        """How each GPU is."""
        self.read_parts()
        gpus = {}
        for trace in self.traces.values():
            for gpu in trace.gpus:
                name = "%s %s" % (trace.name, gpu.get("index"))
                gpus[name] = [gpu.get(key) for key in GPU_KEYS]
        if gpus:
            when = round(self.seen, 1)
            self.lines.append(record_line({"gpus": gpus, "time": when}))

    def write_ranks(self, most: int) -> None:
        """The ranks with the most memory, and those that work the least."""
        self.read_parts()
        ranks = []
        for trace in self.traces.values():
            for rank in trace.ranks:
                kept = {key: rank[key] for key in RANK_KEYS if key in rank}
                ranks.append(dict(kept, node=trace.name))
        if not ranks:
            return
        ranks.sort(key=lambda rank: rank.get("cpu") or 0.0)
        idlest = ranks[: most // 4]
        rest = sorted(ranks[most // 4 :], key=lambda rank: -(rank.get("mem") or 0.0))
        shown = rest[: most - len(idlest)] + idlest
        shown.sort(key=lambda rank: -(rank.get("mem") or 0.0))
        line = {"ranks": shown, "of": len(ranks), "time": round(self.seen, 1)}
        self.lines.append(record_line(line))

    # ---- verdicts, and the end

    @property
    def raw(self) -> str:
        """The id that Slurm takes."""
        return str(self.facts["raw"] or self.job)

    def judge(
        self, diagnose: Diagnose, view: Snapshot, now: float, jobs: int = 1
    ) -> bool:
        """Have the job judged, and write down what is new: whether there is something to tell.

        jobs: how many share the time that there is for that.
        """
        began = time.thread_time()
        self.read_parts()
        nodes = [trace.evidence(view) for trace in self.traces.values()]
        events = list(self.events)
        evidence = JobEvidence(self.facts, nodes, events, now, self.burst)
        try:
            found = [dict(verdict._asdict()) for verdict in diagnose(evidence)]
        except Exception:
            if not self.has_failed:
                log.exception("a defect, met while judging job %s", self.job)
            self.has_failed = True
            return False
        spent = time.thread_time() - began
        self.diagnose_due = now + max(DIAGNOSE_SECONDS, DIAGNOSE_SHARE * spent * jobs)
        was_told = bool(self.verdicts)
        self.verdicts = found
        words = [re.sub(r"[\d.]+", "", str(verdict)) for verdict in found]
        is_old = now - self.said_at > VERDICT_SECONDS and found
        if words != self.said or is_old:
            self.write_verdicts(now)
            self.said = words
        return bool(found) or was_told

    def told_verdicts(self) -> List[Message]:
        """What the table is told; nothing is told by a word, too."""
        nothing = dict.fromkeys(("proof", "cure", "rule"), "")
        return self.verdicts or [
            dict(nothing, severity="fine", what="Nothing is wrong")
        ]

    def write_verdicts(self, now: float) -> None:
        """Write what was found last."""
        if self.verdicts is not None:
            line = {"verdicts": self.verdicts, "time": round(now, 1)}
            self.lines.append(record_line(line))
            self.said_at = now

    def is_over(self, now: float) -> bool:
        """Whether the job has ended, and all has been seen that there was to see."""
        silent = now - self.seen
        if self.ended_at is not None:
            lingers = now - self.ended_at < LINGER_JOB_SECONDS
            return silent > SILENT_SECONDS or not lingers
        if self.is_known:
            return False
        said_goodbye = {
            name_of(event): event["kind"] == "finished"
            for event in self.events
            if event["kind"] in ("finished", "lost")
        }
        all_did = bool(said_goodbye) and all(said_goodbye.values())
        return silent > (LEFT_SECONDS if all_did else GONE_SECONDS)

    def finish(self, now: float) -> None:
        """Write the last lines."""
        self.name_nodes()
        fine = list(self.tail) if self.step > ROW_SECONDS else self.fine
        self.write_rows()
        self.lines += map(row_line, fine)
        self.write_gpus()
        self.write_ranks(MAX_LAST_RANKS)
        self.write_verdicts(now)
        end = {"time": round(now, 1), "seen": round(self.seen, 1)}
        self.lines.append(record_line({"end": end}))

    def head(self) -> bytes:
        """What a new file begins with."""
        first = job_line(self.facts, self.begun)
        return first + record_line({"nodes": self.nodes})

    def take_lines(self) -> bytes:
        """The lines that are to be written now."""
        lines = b"".join(self.lines)
        self.lines = []
        return lines


def row_of_past(node: bytes, job: bytes, readings: Sequence[float]) -> Row:
    """A reading of the past as a row of NODE_KEYS: of the rest nothing is known."""
    seen = time.monotonic()
    row = [0, b"", *UNKNOWN[:2], seen, math.nan, b"", *UNKNOWN[2:]]
    row[NODE_AT] = node
    row[JOB_AT] = job
    for key, reading in zip(PAST_KEYS, readings):
        row[NODE_KEYS.index(key)] = reading
    return tuple(row)


class NoWriter:
    """Stands for a RecordWriter with --no-record: jobs are judged, and nothing is written."""

    def post(self, work: Work) -> None:
        """Forget it."""

    def check(self) -> None:
        """Nothing hangs."""

    def finish(self, seconds: float) -> bool:
        """Nothing waits."""
        return True


class Recorder:
    """The role that judges jobs and records them: it looks at the table, and its writer writes."""

    def __init__(
        self,
        listener: Any,
        table: Table,
        options: argparse.Namespace,
        judge: Diagnose = diagnose,
    ) -> None:
        self.table = table
        self.diagnose = judge
        mark = writer_name(table.pid, table.start)
        self.writer: Union[RecordWriter, NoWriter] = NoWriter()
        if options.record:
            self.writer = RecordWriter(options.record, mark, render_report)
        self.recordings: Dict[str, Recording] = {}
        self.done: Dict[str, Message] = {}  # job -> facts when it was over
        self.told: Set[Any] = set()  # events that were there at the last look
        self.has_looked = False
        self.losses: Deque[float] = collections.deque(maxlen=EVENTS)
        self.burst: Optional[float] = (
            None  # the last time that most nodes were lost together
        )
        self.facts: Dict[str, Message] = {}  # by job and by raw id
        # by a sample's job, node and address, until Slurm says something new: where it belongs
        self.places: Dict[Any, Tuple[Optional[Recording], str]] = {}
        self.row_due = 0.0  # time.monotonic()

    def run(self) -> None:
        """Look at the table until the supervisor is gone, or ends this."""
        parent = multiprocessing.parent_process()
        assert parent
        ends: List[int] = []
        wakeup, wakeup_end = os.pipe()
        os.set_blocking(wakeup_end, False)
        signal.set_wakeup_fd(wakeup_end)
        signal.signal(signal.SIGTERM, lambda number, _: ends.append(number))
        while not ends and parent.is_alive():
            pause = float(ROW_SECONDS)
            try:
                pause = self.look(self.table.snapshot(), time.time())
            except Exception:
                log.exception("a defect, met while recording")
            self.writer.check()
            multiprocessing.connection.wait([parent.sentinel, wakeup], pause)
        self.stop()

    def stop(self) -> None:
        """Write what was seen and is not written; the jobs go on."""
        for recording in self.recordings.values():
            recording.close_row(time.time())
            recording.write_rows()
            self.post(recording)
        self.writer.finish(FLUSH_SECONDS)

    def look(self, view: Snapshot, now: float) -> float:
        """Take a look: the seconds until the next."""
        is_due = time.monotonic() >= self.row_due - LOOK_SECONDS / 4
        if is_due:
            self.row_due = time.monotonic() + ROW_SECONDS
            before = self.facts
            self.read_facts(view, now)
            if self.facts != before or len(self.places) > 2 * view.capacity:
                self.places = {}
        if view.beat < STALE_SECONDS:  # else what is in the table is old
            self.take_samples(view, now)
        self.take_past(now)
        self.take_events(view)
        if not is_due:
            self.judge_ends(view, now)
        else:
            for recording in list(self.recordings.values()):
                self.go_on(recording, view, now)
        nodes = sum(len(recording.traces) for recording in self.recordings.values())
        return LOOK_SECONDS if nodes <= MANY_SLOTS else float(ROW_SECONDS)

    def recording(self, job: str, now: float) -> Recording:
        """The recording of a job; a new one if there is none."""
        if job not in self.recordings:
            self.recordings[job] = Recording(job, now)
        return self.recordings[job]

    def read_facts(self, view: Snapshot, now: float) -> None:
        """Note what Slurm says of the jobs."""
        self.facts = {}
        for facts in view.jobs:
            job = facts["job"]
            self.facts[job] = facts
            if facts["raw"]:
                self.facts[facts["raw"]] = facts
            if job in self.recordings:
                self.recordings[job].tell(facts, now)
            elif facts["state"] in ENDED_STATES:
                self.learn_more(facts, now)
            elif facts["state"] not in (None, "PENDING"):
                self.recording(job, now).tell(facts, now)
        for job, recording in self.recordings.items():
            if job not in self.facts:
                recording.is_known = False
        for job in [job for job in self.done if job not in self.facts]:
            del self.done[job]

    def learn_more(self, facts: Message, now: float) -> None:
        """Record what is said of a job after its end, or by now of one that nobody watched."""
        job = facts["job"]
        before = self.done.get(job)
        if before == facts:
            return
        self.done[job] = facts
        end = {"time": round(now, 1)}
        lines = job_line(facts, now) + record_line({"end": end})
        is_news = before is not None
        self.writer.post(Work("lines" if is_news else "past", job, lines))
        self.writer.post(Work("pack", job))
        self.writer.post(Work("report" if is_news else "missing report", job))

    def take_samples(self, view: Snapshot, now: float) -> None:
        """Note the newest sample of each node that is in a job."""
        for row in view.rows():
            key = (row[JOB_AT], row[NODE_AT], row[1])
            if key not in self.places:
                self.places[key] = self.find_place(row, now)
            recording, name = self.places[key]
            if recording:
                recording.take(name, row, now)

    def find_place(self, row: Row, now: float) -> Tuple[Optional[Recording], str]:
        """The recording that a sample is for, None if for none, and its node's name."""
        known_as = from_field(row[JOB_AT])
        if not known_as:
            return None, ""
        facts = self.facts.get(str(known_as))
        job = facts["job"] if facts else str(known_as)
        if job not in self.recordings:
            if facts and facts["state"] in ENDED_STATES:
                return None, ""  # it sends on after its job's end
            if len(self.recordings) >= MAX_RECORDINGS:
                return None, ""
        names = dict(zip(("node", "address"), map(from_field, (row[NODE_AT], row[1]))))
        return self.recording(job, now), name_of(names)

    def take_events(self, view: Snapshot) -> None:
        """Note the events that are new, each for its job."""
        told = set()
        for event in view.events:
            key = (event["time"], event["kind"], event["node"], event["text"])
            told.add(key)
            if event["kind"] == "lost" and key not in self.told:
                self.note_loss(event["time"])
            facts = self.facts.get(event["job"] or "")
            job = facts["job"] if facts else event["job"]
            recording = self.recordings.get(job)
            if recording is None or key in self.told:
                continue
            # what was there before this process began is recorded: but for jobs that it has missed
            if self.has_looked or event["time"] >= recording.begun:
                recording.hear(event)
        self.told = told
        self.has_looked = True

    def note_loss(self, when: float) -> None:
        """Note that a node was lost, and whether most were at that time: that is a burst."""
        self.losses.append(when)
        together = sum(abs(when - other) <= BURST_SECONDS for other in self.losses)
        nodes = sum(len(recording.traces) for recording in self.recordings.values())
        # of more than the ring of events holds, there are as many as it holds
        most = max(BURST_LOSSES, BURST_SHARE * min(nodes, EVENTS))
        if together >= most:
            self.burst = when

    def judge_ends(self, view: Snapshot, now: float) -> None:
        """Judge the jobs whose end Slurm has just told: people wait for why."""
        for facts in view.jobs if self.recordings else []:
            recording = self.recordings.get(facts["job"])
            if recording and facts["state"] in ENDED_STATES:
                recording.tell(facts, now)
                if now >= recording.diagnose_due:
                    self.judge(recording, view, now)

    def judge(self, recording: Recording, view: Snapshot, now: float) -> None:
        """Have a job judged, and the table told."""
        jobs = len(self.recordings)
        recording.burst = self.burst
        if recording.judge(self.diagnose, view, now, jobs):
            self.table.write_verdicts(recording.raw, recording.told_verdicts())

    def take_past(self, now: float) -> None:
        """Record what agents told of the time of a cut, also of jobs that ended meanwhile.

        What a node said last is there, too: that of one which came and went between two looks
        is all that there is of it.
        """
        late: Dict[str, List[bytes]] = {}
        for when, node, known_as, *readings in self.table.take_past():
            name = str(from_field(node))
            job = str(from_field(known_as))
            facts = self.facts.get(job)
            job = facts["job"] if facts else job
            if self.has_missed(job, name):
                row = row_of_past(node, known_as, readings)
                self.recording(job, when).take(name, row, min(when, now))
            else:
                line = late_line(when, name, readings)
                late.setdefault(job, []).append(line)
        for job, lines in late.items():
            if job in self.recordings:
                self.recordings[job].lines += lines
            elif job in self.done:
                self.writer.post(Work("lines", job, b"".join(lines)))
                self.writer.post(Work("pack", job))
                self.writer.post(Work("report", job))

    def has_missed(self, job: str, name: str) -> bool:
        """Whether no look has found that node of a job that is, or may be, recorded."""
        if job in self.recordings:
            return name not in self.recordings[job].traces
        return job not in self.done and len(self.recordings) < MAX_RECORDINGS

    def go_on(self, recording: Recording, view: Snapshot, now: float) -> None:
        """Every ROW_SECONDS: a row, a verdict, or the end."""
        if recording.traces and recording.job not in self.facts:
            recording.guess(now)
        recording.point_at_parts(view.part_rows)
        recording.close_row(now)
        is_over = recording.is_over(now)
        if is_over or now >= recording.diagnose_due:
            self.judge(recording, view, now)
        if is_over:
            recording.finish(now)
            self.done[recording.job] = self.facts.get(recording.job, recording.facts)
            del self.recordings[recording.job]
            self.places = {}
        self.post(recording)
        if is_over:
            self.writer.post(Work("pack", recording.job))
            self.writer.post(Work("report", recording.job))

    def post(self, recording: Recording) -> None:
        """Have the new lines of a job written."""
        lines = recording.take_lines()
        if lines:
            self.writer.post(Work("lines", recording.job, lines, recording.head()))


# ============================================================================
# Supervisor: processes and signals
# ============================================================================

BACKLOG = 4096  # connections that may wait for accept()
STACK_SIZE = 128 * 1024  # bytes of stack for each thread
GARBAGE = 20000  # objects that the dashboard makes between two looks for garbage
STOP_SECONDS = 3.0  # from SIGTERM to SIGKILL of a role
MIN_BACKOFF = 0.1  # seconds before a role is started again ...
MAX_BACKOFF = 2.0  # ... which double up to this as long as it keeps ending
STEADY_SECONDS = 20.0  # a role that ran for so long begins with MIN_BACKOFF again
NAME_SECONDS = 5.0  # between two looks whether the segment still has its name
# SIGHUP: the terminal has gone, with the ssh or the window that it was in
ENDING_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]

Wanted = Callable[[argparse.Namespace], bool]


class StartError(Exception):
    """The master cannot start; the text says why and what to do."""


def give_memory_back() -> None:
    """Return to the system what compiling this file took, before each role has it as well.

    What is there by now stays: a role that looks for garbage need not look through it, and so
    goes on to share its memory.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(ImportError, OSError, AttributeError):  # another libc
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


# -- roles: what runs in a process of its own ----------------------------------


class Role(NamedTuple):
    """What one process of the master does: begin(listener, table, options).run(), for ever.

    The listener is the one of this name, None for a role that nobody connects to.
    """

    name: str
    begin: Callable[..., Any]
    is_wanted: Wanted


def always(options: argparse.Namespace) -> bool:
    """Of a role that every master has."""
    return True


def is_judged(options: argparse.Namespace) -> bool:
    """Of the role that judges jobs, and records them if that is wanted."""
    return bool(options.record or options.demo) or watches_jobs(options)


def is_demo(options: argparse.Namespace) -> bool:
    """Of the role that plays the agents of a demonstration."""
    return bool(options.demo)


ROLES = (
    Role("collector", Collector, always),
    Role("dashboard", Dashboard, always),
    Role("recorder", Recorder, is_judged),
    Role("demo", Demo, is_demo),
)


def run_role(
    name: str,
    listener: Optional[socket.socket],
    segment: Segment,
    lock: Any,
    options: argparse.Namespace,
) -> None:
    """The body of a child process: set it up, and run the role for as long as it goes."""
    signal.set_wakeup_fd(-1)
    # Ctrl-C, or the end of the terminal, reaches the supervisor as well
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is lost with a role
    setup_log(options.verbose)
    threading.stack_size(STACK_SIZE)
    if name == "collector":
        # Its threads are never busy for long.  Being asked for the interpreter by
        # thousands that wait would cost it a core.
        sys.setswitchinterval(1.0)
    if name == "dashboard":
        # A page of a thousand nodes takes thousands of objects and leaves no cycles.  Looking
        # for some through all that is there takes a third of the page's time, now and then.
        gc.set_threshold(GARBAGE)
    begin = {role.name: role.begin for role in ROLES}[name]
    begun = begin(listener, Table.inherit(segment, lock), options)
    if options.demo and name in DEMO_FILLS:
        DEMO_FILLS[name](begun, options.demo_began)
    begun.run()


def setup_log(verbose: bool) -> None:
    """Log to stderr, one line a message, without a buffer.

    What a closed terminal or pipe has not taken would else be flushed again before a role is
    started, which would then fail, and at the end, which would then be exit code 120.
    """
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    if raw is not None:
        sys.stderr = io.TextIOWrapper(
            raw, sys.stderr.encoding, sys.stderr.errors, write_through=True
        )
    logging.logThreads = False  # or it would keep a name for each thread that logs
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
    )


# -- agents: agent.py as a child -----------------------------------------------


class AgentProcess(subprocess.Popen):  # type: ignore[type-arg]
    """agent.py as a child, under the names that a multiprocessing.Process has.

    Its stdout is a pipe: it ends with the agent, and tells it when the supervisor has ended.
    """

    def __init__(self, options: argparse.Namespace, more: Sequence[str] = ()) -> None:
        command = [sys.executable, beside("agent.py")]
        command += ["--host", reachable(options.host), "--port", str(options.port)]
        if options.secret_file:
            command += ["--secret-file", options.secret_file]
        command += more
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.sentinel = self.stdout

    @property
    def exitcode(self) -> Optional[int]:
        """The exit code, or minus the signal; None while it runs."""
        return self.poll()

    def join(self, timeout: Optional[float] = None) -> None:
        """Wait for its end, so many seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


def watches_jobs(options: argparse.Namespace) -> bool:
    """Whether the master is to watch the user's jobs by itself."""
    return options.my_jobs is not None or bool(options.ssh)


def watcher_flags(options: argparse.Namespace, again: bool) -> List[str]:
    """The flags of the agent.py that watches jobs; again: it must not ask for a password."""
    flags = ["--jobs"]
    if options.my_jobs:
        flags.append(",".join(options.my_jobs))
    if options.ssh:
        flags += ["--ssh", options.ssh]
    if again:
        flags.append("--again")
    return flags


# -- the supervisor ------------------------------------------------------------


class Supervisor:
    """Starts the roles and the agents, starts again what ends, stops all on a signal.

    A new one takes the signals over, so that whatever is made next is also removed again.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.roles = [role.name for role in ROLES if role.is_wanted(options)]
        self.agents: List[str] = []  # of agent.py
        if options.with_agent:
            self.agents.append("agent")
        if watches_jobs(options):
            self.agents.append("watcher")
        self.names = self.roles + self.agents
        if options.tui:
            self.names.append("screens")
        self.watcher_began = False
        self.has_failed = False  # the watcher could not begin: the user is to mend that
        self.listeners: Dict[str, socket.socket] = {}  # by the roles' names
        self.table: Any = None
        self.lock: Any = None
        self.running: Dict[str, Any] = {}  # name -> process
        self.started = dict.fromkeys(self.names, -math.inf)  # time.monotonic()
        self.delay = dict.fromkeys(self.names, 0.0)  # seconds from then to the next
        self.trouble: Dict[str, str] = {}  # name -> why it cannot start
        self.looked = time.monotonic()  # at the segment's name
        self.signals: List[int] = []
        self.wakeup = self.take_signals()

    def take_signals(self) -> int:
        """Note the signals that end us; the descriptor that can be read when one came."""
        wakeup, end = os.pipe()
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end)
        for number in ENDING_SIGNALS:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGHUP and is_ignored:
                continue  # under nohup: the end of the terminal is none of ours
            signal.signal(number, self.note_signal)
        return wakeup

    def note_signal(self, number: int, frame: Any) -> None:
        """A signal's handler."""
        self.signals.append(number)

    def run(self, listeners: Dict[str, socket.socket], table: Table) -> None:
        """Supervise until a signal comes."""
        self.listeners = listeners
        self.table = table
        self.new_lock()
        give_memory_back()
        try:
            while not self.signals and not self.has_failed:
                self.start_missing()
                self.wait()
                self.reap()
                self.look_after_name()
        finally:
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            # agents first, while there is somebody to say goodbye to, and to show it
            self.stop(self.agents)
            self.stop([name for name in self.names if name not in self.roles])
            self.stop(self.roles)

    def wait(self) -> None:
        """Until a signal comes, a process ends, one is to be started, or a look is due."""
        ends = [process.sentinel for process in self.running.values()]
        missing = [self.delay[name] for name in self.names if name not in self.running]
        next_look = self.looked + NAME_SECONDS - time.monotonic()
        seconds = max(0.0, min([next_look] + missing))
        multiprocessing.connection.wait([self.wakeup] + ends, seconds)

    # -- starting ----------------------------------------------------------

    def start_missing(self) -> None:
        """Start what does not run and has waited for its turn."""
        now = time.monotonic()
        for name in self.names:
            passed = now - self.started[name]
            if name in self.running or passed < self.delay[name]:
                continue
            if passed > STEADY_SECONDS:
                self.delay[name] = MIN_BACKOFF
            else:
                self.delay[name] = min(MAX_BACKOFF, 2 * self.delay[name])
            self.started[name] = now
            try:
                self.running[name] = self.start(name)
            except (OSError, StartError) as error:
                self.tell(name, "cannot start the %s for now: %s" % (name, error))
            else:
                self.trouble.pop(name, None)
                log.info("%s started, pid %d", name, self.running[name].pid)

    def start(self, name: str) -> Any:
        """Start a role or an agent."""
        if name == "agent":
            return AgentProcess(self.options)
        if name == "watcher":
            flags = watcher_flags(self.options, self.watcher_began)
            self.watcher_began = True
            return AgentProcess(self.options, flags)
        if name == "screens":
            return Screens(self.options)
        return self.start_role(name)

    def start_role(self, name: str) -> Any:
        """Start a role, with its listener, the table and the lock."""
        if not self.lock:
            self.new_lock()
        listener = self.listeners.get(name)
        segment = self.table.segment()
        arguments = (name, listener, segment, self.lock, self.options)
        role = multiprocessing.Process(target=run_role, name=name, args=arguments)
        role.start()
        return role

    def new_lock(self) -> None:
        """A fresh lock and clean slots, for when no role runs; StartError."""
        try:
            self.lock = multiprocessing.Lock()
        except OSError as error:
            raise StartError(
                "no lock: %s; free some of /dev/shm" % error.strerror
            ) from None
        self.table.load()
        self.table.reset()

    # -- ending ------------------------------------------------------------

    def reap(self) -> None:
        """Take note of what has ended; one that could not get the lock takes all roles along."""
        ended = [name for name, each in self.running.items() if is_over(each)]
        if self.signals or not ended:
            return
        codes = self.stop(ended)
        for name, code in zip(ended, codes):
            if name == "watcher" and code == 1:
                self.has_failed = True  # it has said why
                return
            log.error("%s ended (%s); starting it again", name, describe_exit(code))
        if EXIT_LOCK in codes:
            self.stop(self.roles)
            self.lock = None

    def stop(self, names: Iterable[str]) -> List[int]:
        """End processes, by SIGTERM, a deadline and SIGKILL: their exit codes."""
        processes = [self.running.pop(name) for name in names if name in self.running]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return [process.exitcode for process in processes]

    # -- the segment's name ------------------------------------------------

    def look_after_name(self) -> None:
        """Make the segment's name again when it is gone, by RemoveIPC=yes of logind.conf(5) say."""
        now = time.monotonic()
        if now - self.looked < NAME_SECONDS or self.signals:
            return
        self.looked = now
        if self.table.has_name() or not self.lock:
            return
        try:
            if self.table.renew(self.lock):
                name = self.table.shm.name
                log.warning("shared memory %s was gone: made again", name)
                self.trouble.pop("table", None)
        except TableError as error:
            self.tell("table", str(error))

    def tell(self, name: str, trouble: str) -> None:
        """Log what is wrong with something, once until it changes."""
        if self.trouble.get(name) != trouble:
            log.error("%s", trouble)
        self.trouble[name] = trouble


def is_over(process: Any) -> bool:
    """Whether a process has ended, by its sentinel."""
    return bool(multiprocessing.connection.wait([process.sentinel], 0))


# -- names and addresses -------------------------------------------------------


def open_listener(flag: str, host: str, port: int) -> socket.socket:
    """A listening socket; ValueError (a bad host) or StartError when it cannot be had."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise ValueError(
            "argument %shost: %r is no address of this machine; 127.0.0.1 (for"
            " itself) and 0.0.0.0 (from everywhere) are" % (flag, host)
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise StartError(
            "cannot listen on %s: %s; give another %sport or %shost"
            % (join_address(host, port), error.strerror, flag, flag)
        ) from None


def join_address(host: str, port: int) -> str:
    """host:port, or [host]:port for IPv6 (RFC 3986)."""
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def reachable(host: str) -> str:
    """The address at which this machine reaches its own listener on the host."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def beside(name: str) -> str:
    """The path of a file in this one's folder."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


# ============================================================================
# Command line
# ============================================================================

AGENT_PORT = 13579
PAGE_PORT = 8080
NEXT_PORTS = 20  # that are tried when a usual one is taken, if it may be another
TOKEN_BYTES = 24  # of a token that is made here
SECRET_BYTES = 32  # of a secret that is made here

# -- types of flags: a text -> what it means, or ArgumentTypeError --------------


def number(kind: Any, low: float, high: float, what: str) -> Callable[[str], Any]:
    """An argparse type: a number within bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(
            "%r is no %s from %g to %g" % (text, what, low, high)
        )

    return parse


port_argument = number(int, 0, 65535, "port")


def shm_argument(text: str) -> str:
    """An argparse type: a name of shared memory (shm_open(3); macOS allows 31 bytes)."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,30}", text):
        return text
    raise argparse.ArgumentTypeError(
        "%r is no name of shared memory; 1 to 30 letters, digits, _ and - are" % text
    )


def jobs_argument(text: str) -> List[str]:
    """An argparse type: ids of jobs with commas between."""
    jobs = [job for job in text.split(",") if job]
    if all(re.fullmatch(r"\d+(?:_\d+|\+\d+)?", job) for job in jobs):
        return jobs
    raise argparse.ArgumentTypeError(
        "%r is no list of jobs; ids with commas between are: 4711,4712_3" % text
    )


def login_argument(text: str) -> str:
    """An argparse type: where ssh goes; never what ssh would take as a flag."""
    if re.fullmatch(r"[^\s-]\S*", text) and text.isprintable():
        return text
    raise argparse.ArgumentTypeError(
        "%r is no login node; [USER@]LOGIN as ssh takes it is" % text
    )


def host_argument(text: str) -> List[str]:
    """An argparse type: names under which browsers may ask, with commas between."""
    hosts = [host.lower() for host in text.split(",") if host]
    if hosts and all(re.fullmatch(r"[a-z0-9._-]+", host) for host in hosts):
        return hosts
    raise argparse.ArgumentTypeError(
        "%r is no list of host names; names without a port are: ood.example.org,localhost"
        % text
    )


def token_argument(text: str) -> str:
    """An argparse type: a token for the dashboard; auto makes one."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no token; auto makes a good one")
    return secrets.token_urlsafe(TOKEN_BYTES) if text == "auto" else text


# -- flags, a function for each group of them -----------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, end = __doc__.partition("\n\nExit codes")
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # else ten lines of it hide the one that says what is wrong
        description=about,
        epilog="Exit codes" + end,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add_group in FLAG_GROUPS:
        add_group(parser.add_argument)
    return parser


def add_listening(add: Callable[..., Any]) -> None:
    """Where agents and browsers are listened to."""
    add(
        "--host",
        default="127.0.0.1",
        help="listen for agents here (127.0.0.1); 0.0.0.0 if they are on other machines",
    )
    add(
        "--port",
        type=port_argument,
        help="port for agents (13579); 0 picks a free one",
    )
    add(
        "--dashboard-host",
        metavar="HOST",
        default="127.0.0.1",
        help="listen for browsers here (127.0.0.1)",
    )
    add(
        "--dashboard-port",
        metavar="PORT",
        type=port_argument,
        help="port for browsers (8080); 0 picks a free one",
    )


def add_limits(add: Callable[..., Any]) -> None:
    """How many agents there may be, and when one is lost."""
    add(
        "--max-agents",
        type=number(int, 1, 65536, "number"),
        default=1024,
        metavar="N",
        help="how many agents may send at once (1024)",
    )
    add(
        "--timeout",
        type=number(float, 0.5, 3600, "number of seconds"),
        default=5.0,
        metavar="SECONDS",
        help="silence after which an agent is lost (5)",
    )


def add_alerts(add: Callable[..., Any]) -> None:
    """What is an alert, and what is done about it."""
    add(
        "--alert",
        type=parse_rule,
        action="append",
        metavar="RULE",
        default=[],
        help="alert on METRIC>NUMBER or METRIC<NUMBER, with ' for SECONDS' behind if you like,"
        " instead of on %s; may be repeated; no-lost: lost nodes are no alert"
        % " and ".join(DEFAULT_RULES),
    )
    add(
        "--alert-command",
        metavar="CMD",
        help="shell command for each alert; the facts are in SENTINEL_EVENT, SENTINEL_NODE,"
        " SENTINEL_JOB, SENTINEL_METRIC, SENTINEL_VALUE, SENTINEL_THRESHOLD, SENTINEL_TEXT,"
        " SENTINEL_COUNT;"
        " what it starts ends with it",
    )


def add_trust(add: Callable[..., Any]) -> None:
    """Who may send, and who may look."""
    add(
        "--notify",
        type=notify_argument,
        action="append",
        metavar="URL|@FILE|mail",
        help="tell there when a job starts, ends or has a problem, and when a node is lost: a URL"
        " of %s, or any other that takes JSON; a file with it, as others can see your command"
        " line; mail[:ADDRESS]; may be repeated"
        % ", ".join(service.name for service in SERVICES if service.hosts),
    )
    add(
        "--secret-file",
        metavar="FILE",
        help="take samples only from agents with the same secret; made if there is no FILE",
    )
    add(
        "--dashboard-token",
        type=token_argument,
        metavar="TOKEN|auto",
        help="answer only who knows it; auto makes one, which others cannot see in the list of"
        " processes, and prints the whole address",
    )
    add(
        "--allow-host",
        type=host_argument,
        default=[],
        metavar="NAME[,NAME]",
        help="answer browsers that know the page by such a name, too: that of a proxy",
    )


def add_table(add: Callable[..., Any]) -> None:
    """Where the live table is."""
    add(
        "--shm-name",
        type=shm_argument,
        metavar="NAME",
        help="name of the shared memory (sentinel_PORT)",
    )


def add_sources(add: Callable[..., Any]) -> None:
    """What the master watches by itself."""
    add(
        "--my-jobs",
        type=jobs_argument,
        nargs="?",
        const=[],
        metavar="IDS",
        help="watch all of my running jobs, or these (4711,4712), by a step in each",
    )
    add(
        "--ssh",
        type=login_argument,
        metavar="[USER@]LOGIN",
        help="watch my jobs on the cluster behind that login node, by one ssh",
    )
    add("--with-agent", action="store_true", help="watch this machine, too")
    add(
        "--demo",
        action="store_true",
        help="show invented jobs, to have a look at the page without a cluster",
    )


def add_records(add: Callable[..., Any]) -> None:
    """What is kept of jobs, and what is told of it."""
    add(
        "--record",
        metavar="DIR",
        help="record each job in a file of this folder, for a year or 200 MB of them"
        " (~/.sentinel/jobs, when jobs are watched)",
    )
    add(
        "--no-record",
        action="store_true",
        help="record nothing; what there is can be read",
    )
    add(
        "--explain",
        metavar="JOB",
        help="tell by its record what became of a job, and start nothing; exit codes: 0 fine,"
        " 1 advice, 2 problem, 3 died, 4 no such record",
    )
    add("--json", action="store_true", help="with --explain: for programs")


def add_talk(add: Callable[..., Any]) -> None:
    """What is told on the terminal."""
    add(
        "--tui",
        action="store_true",
        help="show screens on the terminal, jobs, their nodes, ranks and GPUs, above the log",
    )
    add("--verbose", action="store_true", help="log every sample")
    add("--version", action="version", version=VERSION)


FLAG_GROUPS = (
    add_listening,
    add_limits,
    add_alerts,
    add_trust,
    add_table,
    add_sources,
    add_records,
    add_talk,
)

# -- from flags to a running master ---------------------------------------------


def main(argv: Optional[List[str]] = None) -> int:
    """Run the master: its exit code."""
    if cannot_run():
        return 1
    parser = build_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error("%s: no flag of this tool; --help lists them" % " ".join(unknown))
    options.lost = "no-lost" not in options.alert
    options.rules = rules_of(options)
    setup_log(options.verbose)
    options.archive = os.path.abspath(options.record or default_folder())
    if options.record and options.no_record:
        parser.error("argument --no-record: not allowed with argument --record")
    if options.json and not options.explain:
        parser.error("--json goes with --explain")
    if options.explain:
        return run_explain(options)
    if options.record or watches_jobs(options) and not options.no_record:
        options.record = options.archive
    try:
        return run_master(options)
    except ValueError as error:
        parser.error(str(error))
    except (StartError, TableError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 1


def cannot_run() -> bool:
    """Whether this Python lacks what the master needs; says so."""
    tool = os.path.basename(sys.argv[0])
    if os.name != "posix" or resource is None:
        print(
            "error: %s needs a Unix, as Linux or macOS; on Windows run it in WSL"
            % tool,
            file=sys.stderr,
        )
        return True
    if shared_memory is None:
        print(
            "error: %s needs Python 3.8 or newer, and this is %d.%d; try python3.11 or 'module"
            " load python'" % ((tool,) + sys.version_info[:2]),
            file=sys.stderr,
        )
        return True
    return False


def rules_of(options: argparse.Namespace) -> List[Rule]:
    """The rules that were given, or the default ones."""
    given = [rule for rule in options.alert if isinstance(rule, Rule)]
    if given:
        return given
    return [
        parse_rule(text)._replace(is_default=True)  # type: ignore[union-attr]
        for text in DEFAULT_RULES
    ]


def run_master(options: argparse.Namespace) -> int:
    """Bind, make the table, supervise: 0 when a signal ended it."""
    need_scripts(options)
    check_demo(options)
    options.secret = read_secret(options.secret_file) if options.secret_file else None
    raise_limits()
    options.demo_began = time.time()
    supervisor = Supervisor(options)
    with contextlib.ExitStack() as stack:
        if options.demo and options.record is None:
            options.archive = make_demo_folder(stack)
            options.record = None if options.no_record else options.archive
        listeners = listen(options, stack)
        options.shm_name = options.shm_name or "sentinel_%d" % options.port
        table = Table.create(options.shm_name, options.max_agents)
        stack.callback(table.unlink)
        if options.tui:
            options.terminal = Terminal()
            stack.callback(options.terminal.close)
        # should this process be killed, the tracker may clean up behind it, but silently
        sys.warnoptions.append("ignore:resource_tracker")
        tell_addresses(options)
        supervisor.run(listeners, table)
    log.info("stopped")
    return int(supervisor.has_failed)


def make_demo_folder(stack: contextlib.ExitStack) -> str:
    """A new folder for records of invented jobs, which are not to be among the user's own.

    It is gone when the stack is.  StartError when none can be made.
    """
    import tempfile  # here, as it takes time that every other start can do without

    try:
        folder = tempfile.mkdtemp(prefix="sentinel-demo-")
    except OSError as error:
        raise StartError(
            "no folder for the demonstration's records: %s; TMPDIR or --record names another"
            % error.strerror
        ) from None
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def need_scripts(options: argparse.Namespace) -> None:
    """StartError when a flag needs another of our scripts and it is not there."""
    for flag, is_given, script in (
        ("--with-agent", options.with_agent, "agent.py"),
        ("--my-jobs", options.my_jobs is not None, "agent.py"),
        ("--ssh", options.ssh, "agent.py"),
        ("--tui", options.tui, "test_reader.py"),
    ):
        if is_given and not os.path.exists(beside(script)):
            raise StartError(
                "%s needs %s beside master_server.py: copy it there" % (flag, script)
            )


def check_demo(options: argparse.Namespace) -> None:
    """ValueError when what is invented would be shown among what is real."""
    if options.demo and (options.with_agent or watches_jobs(options)):
        raise ValueError(
            "argument --demo: not allowed with --my-jobs, --ssh or --with-agent, for it"
            " would show invented nodes among real ones"
        )


def read_secret(path: str) -> bytes:
    """The secret in a file that nobody else may read; one is made there if there is no file."""
    try:
        make_secret(path)
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(MAX_SAMPLE).strip()
    except OSError as error:
        raise StartError("no secret in %s: %s" % (path, error.strerror)) from None
    if mode & 0o077:
        raise StartError(
            "others can read the secret in %s; run: chmod 600 %s" % (path, path)
        )
    if not secret:
        raise StartError("no secret in %s; remove the file and it is made anew" % path)
    return secret


def make_secret(path: str) -> None:
    """Write a new secret to a file, unless there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES) + "\n")
    log.info("made a secret in %s: give it to the agents by --secret-file", path)


def raise_limits() -> None:
    """Allow as many descriptors as the system lets us: one for each agent."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says unlimited, and means less
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(
    options: argparse.Namespace, stack: contextlib.ExitStack
) -> Dict[str, socket.socket]:
    """Open the listeners, and note their ports in the options."""
    listeners = open_listeners(options, stack)
    options.port = port_of(listeners["collector"])
    may_have_moved = options.dashboard_port is None
    options.dashboard_port = port_of(listeners["dashboard"])
    options.has_moved = may_have_moved and options.dashboard_port != PAGE_PORT
    return listeners


def open_listeners(
    options: argparse.Namespace, stack: contextlib.ExitStack
) -> Dict[str, socket.socket]:
    """The listeners by the names of their roles; the stack closes them."""
    may_move = watches_jobs(options) or options.demo
    listeners = {}
    for role, flag, host, given, usual in (
        ("collector", "--", options.host, options.port, AGENT_PORT),
        (
            "dashboard",
            "--dashboard-",
            options.dashboard_host,
            options.dashboard_port,
            PAGE_PORT,
        ),
    ):
        listener = open_port(flag, host, given, usual, may_move)
        listeners[role] = stack.enter_context(listener)
    return listeners


def default_folder() -> str:
    """Where records are; ~/.sentinel may be a secret by now, which is no folder."""
    home = os.path.expanduser("~")
    folder = os.path.join(home, ".sentinel")
    if os.path.exists(folder) and not os.path.isdir(folder):
        return os.path.join(home, ".sentinel-jobs")
    return os.path.join(folder, "jobs")


def run_explain(options: argparse.Namespace) -> int:
    """Print what the record of a job says: the exit code for its worst verdict."""
    try:
        text, code = explain(options.archive, options.explain, options.json)
    except RecordError as error:
        print("error: %s" % error, file=sys.stderr)
        return EXIT_UNKNOWN
    encoding = sys.stdout.encoding or "utf-8"  # of a terminal that may have no arrows
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    return code


def open_port(
    flag: str, host: str, given: Optional[int], usual: int, may_move: bool
) -> socket.socket:
    """A listener on the port that was given, or the usual one.

    On a login node that is often a colleague's: who may move takes the next free one.
    """
    if given is not None:
        return open_listener(flag, host, given)
    last = usual + NEXT_PORTS if may_move else usual
    for port in range(usual, last):
        with contextlib.suppress(StartError):
            return open_listener(flag, host, port)
    return open_listener(flag, host, last)


def port_of(listener: socket.socket) -> int:
    """The port that a listener has."""
    port: int = listener.getsockname()[1]
    return port


def tell_addresses(options: argparse.Namespace) -> None:
    """Log where it listens, where to look, and who could send."""
    page = options.dashboard_port
    if options.has_moved:
        log.warning(
            "port %d is taken, perhaps by a colleague's page; yours is at port %d: on your"
            " laptop, ssh -L %d:localhost:%d",
            PAGE_PORT,
            page,
            page,
            page,
        )
    log.info("collector listening on %s", join_address(options.host, options.port))
    log.info(
        "dashboard listening on %s: open %s - Ctrl-C stops",
        join_address(options.dashboard_host, options.dashboard_port),
        page_address(options),
    )
    if options.demo:
        log.warning("%s", DEMO_NOTICE)
    if options.record:
        log.info("recording jobs in %s", options.record)
    if options.host not in LOOPBACK and not options.secret:
        log.warning(
            "anybody who reaches port %d can send samples: --secret-file keeps"
            " strangers out",
            options.port,
        )


def page_address(options: argparse.Namespace) -> str:
    """The address to open in a browser on this machine."""
    host = options.dashboard_host
    if reachable(host) in LOOPBACK:
        host = "localhost"
    address = "http://%s/" % join_address(host, options.dashboard_port)
    if options.dashboard_token:
        address += "?" + urllib.parse.urlencode({"token": options.dashboard_token})
    return address


if __name__ == "__main__":
    sys.exit(main())
