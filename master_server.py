#!/usr/bin/env python3
"""master_server.py - see every node of your Slurm jobs live, with an account and nothing else.

    agents --TCP--> collector --> shared-memory table --> dashboard --HTTP--> browser, curl
                        `-> alerts: log, --alert-command

Run it on the login node or on your laptop, start agent.py where there is work, and open the
address that it prints.  It needs Python 3.8 or newer, and writes no file but a secret that you
ask for.  Three processes: this one supervises, the collector has one thread for each agent, and
the dashboard answers browsers.  Either of the two is started again when it dies.

Exit codes: 0 stopped by SIGINT, SIGTERM or SIGHUP, 1 could not start, 2 bad usage.
"""

# The rooms of this file, in their order.  A room uses the rooms above it, and none below.
#
#   Words          the few constants and types that several rooms share
#   Metrics        the one list of what is measured; all formats and layouts follow from it
#   Wire           bytes of a peer -> a sample: bounded, and nothing here unpickles
#   Table          shared memory: the only room that knows offsets, lock and sequence number
#   Alerts         rules -> what fires and what is resolved; the runner of --alert-command
#   Collector      agents' sockets -> wire -> table and alerts: a thread for each agent
#   The page       a copy of the table -> HTML, and nobody else knows HTML.  Eight rooms: Style
#                  sheet, Script, Markup, Readings, Selection, Jobs, Columns, Pages
#   For programs   a copy of the table -> JSON, CSV, text, Prometheus
#   Dashboard      browsers' sockets -> request -> pages: a thread for each connection
#   Demo           invented jobs, for --demo: what their agents would send, by the clock
#   Supervisor     processes and signals: the only room that starts or ends a process of ours
#   Command line   flags -> options, and the way from there to the supervisor

import os
import sys

if __name__ == "__main__":
    # A json.py or select.py of the user's own, in this folder, must not hide the standard
    # library's: the folder that Python searches first comes last.
    sys.path.append(sys.path.pop(0))

import argparse
import array
import base64
import collections
import contextlib
import csv
import functools
import gzip
import hashlib
import heapq
import hmac
import html
import io
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
import signal
import socket
import struct
import subprocess
import threading
import time
import unicodedata
import urllib.parse
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
    import resource
except ImportError:  # Windows: main() says what is needed
    resource = None  # type: ignore[assignment]
try:
    from multiprocessing import resource_tracker, shared_memory
except ImportError:  # Python 3.6 and 3.7: main() says what is needed
    shared_memory = None  # type: ignore[assignment]

# ============================================================================
# Words: what several rooms share
# ============================================================================

MAX_SAMPLE = 16384  # bytes of one pickled sample
RECEIVE_SIZE = 1024  # bytes that are read at a time; a sample has 600 to 800
GONE_SECONDS = 600.0  # how long a node that left is remembered
STALE_SECONDS = 3.0  # without a heartbeat: the collector has stopped
EXIT_LOCK = 75  # exit code of a role that could not get the table's lock
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEMO_NOTICE = "A demonstration: all of these jobs and nodes are invented"

Message = Dict[str, Any]  # a decoded dict, or a node of a snapshot
Row = Tuple[Any, ...]  # a sample, as METRICS has it: floats, UTF-8; see UNKNOWN
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
    Metric("disk_read", "d", "B/s", "Disk read", "disk_read_bytes_per_second", "Disk reads"),
    Metric("disk_write", "d", "B/s", "Disk write", "disk_write_bytes_per_second", "Disk writes"),
    Metric("net_rx", "d", "B/s", "Received", "network_receive_bytes_per_second", "Received"),
    Metric("net_tx", "d", "B/s", "Sent", "network_transmit_bytes_per_second", "Sent"),
    Metric("psi_cpu", "d", "%", "CPU wait", "pressure_cpu_percent", "Tasks waiting for CPU"),
    Metric("psi_mem", "d", "%", "Memory wait", "pressure_memory_percent",
           "Tasks waiting for memory"),
    Metric("psi_io", "d", "%", "I/O wait", "pressure_io_percent", "Tasks waiting for I/O"),
    Metric("procs", "d", "", "Processes", "processes", "Processes and threads"),
    Metric("uptime", "d", "s", "Uptime", "uptime_seconds", "Time since the node's boot"),
    Metric("gpus", "d", "", "GPUs", "gpus", "GPUs that the agent sees"),
    Metric("gpu", "d", "%", "GPU", "gpu_percent", "GPU utilisation, mean of all"),
    Metric("gpu_mem", "d", "%", "GPU memory", "gpu_memory_percent", "GPU memory in use"),
    # the job on the node
    Metric("job_cpus", "d", "", "Job CPUs", "job_cpus", "CPUs allocated to the job here"),
    Metric("job_cpu", "d", "%", "Job CPU", "job_cpu_percent", "Allocated CPUs in use"),
    Metric("job_mem", "d", "B", "Job memory", "job_memory_bytes", "Anonymous and shared memory"),
    Metric("job_cache", "d", "B", "Job cache", "job_cache_bytes", "Page cache of the job"),
    Metric("job_mem_limit", "d", "B", "Job limit", "job_memory_limit_bytes", "Memory limit"),
    Metric("job_ram", "d", "%", "Job RAM", "job_ram_percent", "Job's memory limit in use"),
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

# Of each float in a pickle: where its 8 bytes begin, and its key
Spots = Tuple[Tuple[int, Any], ...]


class WireError(Exception):
    """What a peer sent is not a sample.  The text says why; it is safe to send and to log."""


def parse_pickle(data: bytes) -> Optional[Tuple[Message, int, Spots]]:
    """Read the pickled flat dict (protocols 2 to 5) that data begins with: (dict, size, floats).

    None while it is incomplete; WireError as soon as it cannot become one.  Nothing is built
    but that dict, and no length that a peer claims is believed: it is compared with its limit.
    """
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
    return "bytes that are no pickle of protocol 2 to 5"


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
    would not know which one counts.
    """
    changing = {key for _, key in floats if type(message.get(key)) is float}
    if len(changing) < len(floats):
        return None
    layout, mask, order = shape_layout(len(data), floats)
    rest = tuple(
        unknown if key in changing else value
        for key, value, unknown in zip(INDEX, row, UNKNOWN)
    )
    fixed = int.from_bytes(data, "big") & mask
    return Shape(layout, mask, fixed, order, rest)


def parse_shape(data: bytes, shape: Shape) -> Optional[Row]:
    """The row in data if it is a sample of that shape with good floats; None: parse_pickle."""
    if len(data) != shape.layout.size:
        return None
    if int.from_bytes(data, "big") & shape.mask != shape.fixed:
        return None
    floats = shape.layout.unpack(data)
    if not math.isfinite(sum(floats)):
        return None
    row = shape.order(floats + shape.rest)
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


def check_sample(message: Message) -> Row:
    """The row of a decoded dict, wrong types as unknown; WireError without cpu and ram."""
    for key in ("cpu", "ram"):
        value = message.get(key)
        if not is_number(value) or not 0 <= value <= 100:  # type: ignore[operator]
            found = ascii(value)[:40] if key in message else "missing"
            raise WireError(
                "%s must be a number from 0 to 100, and is %s" % (key, found)
            )
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
JOBS = 512  # jobs that are remembered
JOB_SECONDS = (
    900.0  # after which a job that has not ended and is not told of is forgotten
)
LOCK_SECONDS = 2.0  # to wait for the table's lock
LOCK_POLL = 0.001  # between two tries
READ_SECONDS = 2.0  # to wait for a whole copy without the lock
READ_POLL = 0.001  # between two tries
PAGE = 16384  # the largest page of a common system, in bytes
FOLDER = "/dev/shm/"  # where Linux shows segments as files

MAGIC = b"SENTINEL"
LAYOUT = 3  # to be changed with any of these structs; see the docstring of Table
SLOT = struct.Struct("i64sff")  # native, as the plan has it: 76 bytes, no padding
DETAIL = struct.Struct("=dd64s" + "".join(m.code for m in DETAILS))
EVENT = struct.Struct("=d12s64s24s32s64sdd256s")
JOB = struct.Struct("=d" + "".join(code for _, code in JOB_FACTS))
NOTES = struct.Struct("=QQQQ128s")
HEADER = struct.Struct("=8sIIqq")
SEQUENCE = struct.Struct("=Q")
COUNTS = struct.Struct("=QQdQ")
FIRST = struct.Struct("=Q")  # the first field of NOTES and of COUNTS

# A row of Snapshot.rows(): a slot's fields, then its details'
NODE_KEYS = ("slot", "address", "cpu", "ram", "age", "since", "alerts") + tuple(
    m.key for m in DETAILS
)
EVENT_KEYS = ("time", "kind", "node", "job", "user", "address", "cpu", "ram", "text")
JOB_RAW = 1 + JOB_KEYS.index("raw")  # in a row of JOB, which begins with the time seen
JOB_STATE = 1 + JOB_KEYS.index("state")


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
    """The index of a job's row: its own, a free one, or that of one to be forgotten; else -1."""
    best = -1
    oldest = math.inf
    for index, row in enumerate(rows):
        if row[JOB_RAW] == raw:
            return index
        if not row[JOB_RAW].strip(b"\0"):
            seen = -math.inf
        elif has_ended(row) or now - row[0] > JOB_SECONDS:
            seen = row[0]
        else:
            continue
        if seen < oldest:
            oldest = seen
            best = index
    return best


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


class Copy(NamedTuple):
    """The bytes of a table at one instant, as the picture of Table has them."""

    slots: bytes
    details: bytes
    events: bytes
    jobs: bytes
    notes: bytes
    counts: Counts


class Snapshot:
    """A whole copy of the table at one instant.

    nodes: a dict for each used slot, with NODE_KEYS (age in seconds), made when first asked for;
    events: dicts with EVENT_KEYS, oldest first; left: the same, or what a reader remembers of
    who left.  What is unknown is None.  beat: seconds since the collector last said that it is
    well.  turned_away, turned_away_lately, turned_away_why: agents that there was no room for,
    since the start and in the last minute.
    """

    def __init__(self, capacity: int, copy: Copy) -> None:
        self.capacity = capacity
        self.time = time.time()
        self.copied = time.monotonic()
        self.slots = copy.slots
        self.details = copy.details
        self.job_rows = copy.jobs
        self.dicts: Optional[List[Message]] = None  # nodes, once they were asked for
        self.samples = copy.counts.samples
        self.beat = self.copied - copy.counts.beat
        self.events = read_ring(copy.events, copy.counts.events)
        self.left = self.events
        _, left_out, turned_away, lately, why = NOTES.unpack(copy.notes)
        self.jobs_left_out = left_out
        self.turned_away = turned_away
        self.turned_away_lately = lately
        self.turned_away_why = from_field(why) or ""

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
            self.dicts = [self.make_node(row) for row in self.rows()]
        return self.dicts

    def make_node(self, row: Row) -> Message:
        """A row of rows() as a dict."""
        node: Message = dict(zip(NODE_KEYS, map(from_field, row)))
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


class Table:
    """The shared memory; numbers in native byte order, text UTF-8 and NUL padded.

        offset 0    slots     capacity x SLOT     slot id (1-based, 0 = empty), address, cpu, ram
                    details   capacity x DETAIL   seen, since, alerts, then DETAILS in their order
                    events    EVENTS x EVENT      a ring: event n is in row n % EVENTS
                    jobs      JOBS x JOB          seen, then JOB_FACTS in their order
        size - 232  NOTES     1 once the table has moved, jobs there was no room for,
                              agents turned away, lately, and why
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
        self.jobs_end = self.jobs_at + JOBS * JOB.size
        (self.sequence,) = SEQUENCE.unpack_from(self.buf, self.sequence_at)
        (self.events,) = FIRST.unpack_from(self.buf, self.counts_at)
        self.jobs_left_out = NOTES.unpack_from(self.buf, self.notes_at)[1]

    @staticmethod
    def size_for(capacity: int) -> int:
        """The bytes of a segment for so many slots, in whole pages."""
        size = capacity * (SLOT.size + DETAIL.size)
        size += EVENTS * EVENT.size + JOBS * JOB.size
        size += NOTES.size + HEADER.size + SEQUENCE.size + COUNTS.size
        return size + -size % PAGE

    @classmethod
    def create(cls, name: str, capacity: int) -> "Table":
        """Make the segment; one whose owner is dead is replaced, one whose owner lives is not."""
        size = cls.size_for(capacity)
        try:
            cls.discard(name)
            table = cls(make_segment(name, size))
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
        pid = os.getpid()
        header = (MAGIC, LAYOUT, capacity, pid, start_time(pid))
        HEADER.pack_into(table.buf, table.header_at, *header)
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
        if not is_known or table.jobs_end > table.notes_at:
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
        """Empty the slots and end a broken write: for who knows that nobody else writes."""
        self.buf[: self.details_at] = bytes(self.details_at)
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
        deadline = time.monotonic() + LOCK_SECONDS
        while not self.lock.acquire(False):
            if time.monotonic() > deadline:
                log.error(
                    "the table's lock is stuck: who held it was killed or stopped"
                )
                os._exit(EXIT_LOCK)
            time.sleep(LOCK_POLL)
        if self.has_moved():
            try:
                self.follow()
            except TableError as error:
                log.error("%s", error)
                os._exit(EXIT_LOCK)

    def __enter__(self) -> None:
        """Begin to write: hold the lock and keep the sequence number odd."""
        self.acquire()
        SEQUENCE.pack_into(self.buf, self.sequence_at, self.sequence + 1)

    def __exit__(self, kind: Any, *error: Any) -> None:
        """End it; after an error the number stays odd until the next write ends."""
        if kind is None:
            self.sequence += 2
            SEQUENCE.pack_into(self.buf, self.sequence_at, self.sequence)
        self.lock.release()

    def write(
        self, index: int, address: str, row: Row, since: float, alerts: str
    ) -> None:
        """Put a sample into a slot; address is text, since is time.time() of the connection."""
        slot = (index + 1, address.encode()) + row[:2]
        detail = (time.monotonic(), since, alerts.encode()) + row[2:]
        with self:
            SLOT.pack_into(self.buf, index * SLOT.size, *slot)
            DETAIL.pack_into(self.buf, self.details_at + index * DETAIL.size, *detail)

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
        refused = (turned_away, turned_away_lately, why.encode())
        with self:
            COUNTS.pack_into(self.buf, self.counts_at, self.events, samples, now, used)
            notes = (0, self.jobs_left_out) + refused
            NOTES.pack_into(self.buf, self.notes_at, *notes)

    def write_job(self, row: Row) -> None:
        """Put what Slurm says of a job in its place, or in that of the oldest that has ended.

        For one thread at a time: to look for the place takes too long to hold the lock for it.
        """
        self.acquire()
        try:
            jobs = bytes(self.buf[self.jobs_at : self.jobs_end])
        finally:
            self.lock.release()
        now = time.time()
        raw = row[JOB_KEYS.index("raw")].ljust(24, b"\0")
        place = find_job_place(list(JOB.iter_unpack(jobs)), raw, now)
        with self:
            if place < 0:
                self.jobs_left_out += 1
            else:
                JOB.pack_into(self.buf, self.jobs_at + place * JOB.size, now, *row)

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
        return Copy(
            bytes(self.buf[: used * SLOT.size]),
            bytes(self.buf[self.details_at : details_end]),
            bytes(self.buf[self.events_at : self.jobs_at]),
            bytes(self.buf[self.jobs_at : self.jobs_end]),
            bytes(self.buf[self.notes_at : self.header_at]),
            counts,
        )


# ============================================================================
# Alerts: rules -> firing and resolved, pure; and the runner of the command
# ============================================================================

COMMAND_SECONDS = 30.0  # for one run of --alert-command
GATHER_SECONDS = 1.0  # quiet time that ends an alert storm
STORM_SECONDS = 5.0  # the longest that an alert waits for others of its kind
STORM_SIZE = 4  # more alerts of a kind are told by one command
MAX_ALERTS = 20000  # alerts waiting for the command
FLAP_SECONDS = 600.0  # within which ...
FLAP_CHANGES = (
    8  # ... a rule may fire and be resolved on a node, and a node come and go
)
BRIEF_SECONDS = 2.0  # a visit that is shorter, of which ...
FLAP_VISITS = 40  # ... one source may make so many, by whatever names
CROWD = 8  # ... if no more of its agents are here
MAX_FLAPPING = 8192  # of what is counted so
RULE = re.compile(
    r"\s*(\w+)\s*([<>])\s*(\d+(?:\.\d+)?)(?:\s+for\s+(\d+(?:\.\d+)?)\s*s?)?\s*"
)
LAST_PART = 0.1  # of a job's time limit
DEFAULT_RULES = ("cpu>90", "job_ram>90", "job_time_left<600")
Alert = NamedTuple(
    "Alert",
    [
        ("event", str),
        ("node", str),
        ("job", str),
        ("metric", str),
        ("value", Union[float, str]),
        ("threshold", Union[float, str]),
    ],
)


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

    def __str__(self) -> str:
        return "%s%s%g%s" % (
            self[:3] + (" for %g" % self.seconds if self.seconds else "",)
        )


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
        elif state and rule in state and value == value:
            margin = 5.0 if NUMBERS[rule.metric].unit == "%" else rule.threshold * 0.05
            if state[rule] is not None:
                del state[rule]
            elif not rule.crossed(value, margin):
                del state[rule]
                changes.append(("resolved", rule, value))
    return changes


class Flapping:
    """Bounds what one thing that comes and goes can tell: a rule on a node, a node, a source.

    More than CHANGES of it within SECONDS is flapping. That is told once, with the count, and
    again after as long; the changes themselves are told no more until it is quiet again.
    """

    def __init__(self, changes: int, seconds: float) -> None:
        self.changes = changes
        self.seconds = seconds
        self.lock = threading.Lock()
        # key -> [since, changes since then, whether flapping was told, the last change]
        self.known: Dict[Any, List[Any]] = collections.OrderedDict()

    def count(self, key: Any) -> int:
        """Count a change: 0 if it is to be told, else how many there were; -1 if that was told."""
        now = time.monotonic()
        with self.lock:
            entry = self.known.get(key)
            if entry is None or now - entry[0] > self.seconds:
                was_flapping = (
                    entry is not None and entry[2] and now - entry[3] <= self.seconds
                )
                self.known.pop(key, None)
                if len(self.known) >= MAX_FLAPPING:
                    del self.known[next(iter(self.known))]
                # one that goes on like this is told again, not first believed for a while
                begun = self.changes if was_flapping else 0
                entry = self.known[key] = [now, begun, False, now]
            entry[1] += 1
            entry[3] = now
            if entry[1] <= self.changes:
                return 0
            if entry[2]:
                return -1
            entry[2] = True
            return int(entry[1])

    def is_flapping(self, key: Any) -> bool:
        """Whether it was flapping lately, without counting a change."""
        with self.lock:
            entry = self.known.get(key)
            return bool(
                entry and entry[2] and time.monotonic() - entry[0] <= self.seconds
            )


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
            for group in self.gather():
                try:
                    self.call(group)
                except Exception as error:  # this thread has to go on, whatever it was
                    log.error("alert command failed: %s", error)

    def gather(self) -> List[List[Alert]]:
        """Wait for alerts, and for the end of a storm: lists that one run each should tell."""
        batch, deadline, quiet = (
            [self.alerts.get()],
            time.monotonic() + STORM_SECONDS,
            0.25,
        )
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                batch.append(self.alerts.get(timeout=quiet))
                quiet = GATHER_SECONDS if len(batch) > STORM_SIZE else quiet
        groups: Dict[Tuple[Any, ...], List[Alert]] = {}
        for alert in batch:
            groups.setdefault((alert.event, alert.metric, alert.threshold), []).append(
                alert
            )
        return [
            part
            for group in groups.values()
            for part in (
                [group] if len(group) > STORM_SIZE else [[alert] for alert in group]
            )
        ]

    def call(self, group: List[Alert]) -> None:
        """Run the command for alerts of one kind; at its limit, kill it and all it started.

        The facts are in the environment, never in the command's text.  The shell that kills it
        is in its own process group, so that the limit outlives a collector that dies meanwhile.
        """
        facts: Dict[str, Any] = dict(group[0]._asdict(), count=len(group))
        for key in ("node", "job"):
            names = list(dict.fromkeys(getattr(alert, key) for alert in group))
            facts[key] = " ".join(names[:20] + ["..."] * (len(names) > 20))
        env = dict(os.environb)  # bytes: no locale can object to a name
        env.update(
            (b"SENTINEL_" + key.upper().encode(), str(value).encode())
            for key, value in facts.items()
        )
        watched = (
            '(sleep %g; kill -9 -$$) >/dev/null 2>&1 & eval "$0"' % COMMAND_SECONDS
        )
        process = subprocess.Popen(
            ["/bin/sh", "-c", watched, self.command],
            stdout=2,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        begin, code = time.monotonic(), process.wait()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        if code < 0 and time.monotonic() - begin >= COMMAND_SECONDS:
            log.error("alert command failed: killed after %g s", COMMAND_SECONDS)
        elif code:
            log.error("alert command failed: %s", describe_exit(code))


def describe_exit(code: int) -> str:
    """How a process ended, by its exit code or minus its signal."""
    return "signal %d" % -code if code < 0 else "exit code %d" % code


# ============================================================================
# Collector: sockets -> wire -> table, alerts
# ============================================================================

MAX_INTERVAL = 60.0  # seconds between samples that an agent may announce
MAX_RATE = 100  # samples a second from one agent, over RATE_SECONDS
RATE_SECONDS = 5.0  # seconds
MAX_ACCEPTS = 256  # connections that are taken at a time, between two heartbeats
SOURCE_SHARE = 7 / 8  # of the slots, for one address other than loopback
MAX_WAITING = 1024  # agents that have not sent a sample yet
REFUSAL_SECONDS = 10.0  # seconds for which refusals of one source are counted
MAX_REFUSAL_SECONDS = 3600.0  # that long when it does not end: it doubles
MAX_SOURCES = 8  # sources whose refusals are counted apart
BEAT_SECONDS = 0.5  # between two heartbeats of the collector
IDLE_SECONDS = 1.0  # between two of them without an agent
PIN_CPU = 0.1  # of a core, from which on a collector is a busy one
PIN_SECONDS = 5.0  # between two looks at where its threads are to run
LINGER_SECONDS = 0.5  # for a peer to read why it is sent away


def split_address(address: Address) -> Tuple[str, str]:
    """A peer's (host, port, ...) -> (host, the address tuple that slots hold, as text)."""
    host = address[0].partition("%")[0]
    host = host[7:] if host.startswith("::ffff:") and "." in host else host
    return host, "('%s', %d)" % (host, address[1])


class Waiting:
    """Sockets that have not said yet what they want: bounded, and idle ones lock nobody out.

    When one is too many, the oldest of the busiest source is shut down; its thread sees that.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.lock = limit, threading.Lock()
        self.socks: Dict[socket.socket, str] = {}  # to their sources, oldest first

    def add(self, sock: socket.socket, source: str) -> None:
        """Take a socket in."""
        with self.lock:
            self.socks[sock] = source
            if len(self.socks) <= self.limit:
                return
            busiest = collections.Counter(self.socks.values()).most_common(1)[0][0]
            oldest = next(
                sock for sock, source in self.socks.items() if source == busiest
            )
            del self.socks[oldest]
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)

    def remove(self, sock: socket.socket) -> None:
        """Let go of a socket, if it is here."""
        with self.lock:
            self.socks.pop(sock, None)


class Refusals:
    """Tells refusals so that a flood pushes nothing useful out: one a source and 10 s, or more."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tell, self.lock = tell, threading.Lock()
        self.sources: Dict[str, List[Any]] = {}  # [since, seconds, count, reason]

    def add(self, source: str, reason: str) -> None:
        """Count a refusal; the first of a source is told at once."""
        with self.lock:
            if len(self.sources) >= MAX_SOURCES and source not in self.sources:
                source = "other addresses"
            first = source not in self.sources
            entry = self.sources.setdefault(
                source, [time.monotonic(), REFUSAL_SECONDS, -1, ""]
            )
            entry[2:] = entry[2] + 1, reason
        if first:
            self.tell(source, reason)

    def flush(self) -> None:
        """Tell what was counted, for each source whose time is over."""
        now = time.monotonic()
        with self.lock:
            over = [
                (source, list(entry))
                for source, entry in self.sources.items()
                if now - entry[0] >= entry[1]
            ]
            for source, (_, seconds, count, reason) in over:
                del self.sources[source]
                if count:
                    self.sources[source] = [
                        now,
                        min(2 * seconds, MAX_REFUSAL_SECONDS),
                        0,
                        reason,
                    ]
        for source, (_, seconds, count, reason) in over:
            if count:
                self.tell(source, "%s (and %d more in %g s)" % (reason, count, seconds))


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


class Silence(Exception):
    """No whole sample came in time."""


class Peer:
    """One agent's connection, for its thread."""

    __slots__ = (
        "sock",
        "source",
        "address",
        "timeout",
        "receive_timeout",
        "buffer",
        "slot",
        "since",
        "known_as",
        "shape",
        "ack",
        "row",
        "state",
        "alerts",
    )

    def __init__(self, sock: socket.socket, address: Address, timeout: float) -> None:
        self.sock, self.timeout, self.receive_timeout = sock, timeout, timeout
        self.source, self.address = split_address(address)
        self.buffer = memoryview(bytearray(RECEIVE_SIZE))
        self.slot, self.since, self.alerts = -1, time.time(), ""  # -1: no slot yet
        self.known_as = self.address  # or the node's name: that of its first sample
        self.shape: Optional[Shape] = None
        self.row, self.ack = UNKNOWN, False
        self.state: Dict[Rule, Optional[float]] = {}

    def text(self, key: str) -> str:
        """A text of the last sample."""
        return str(self.row[INDEX[key]], "utf-8")

    def __str__(self) -> str:
        return self.known_as + (
            " (job %s)" % self.text("job") if self.text("job") else ""
        )

    def say(self, line: bytes) -> None:
        """Write if there is room for it: a peer that never reads is served all the same."""
        with contextlib.suppress(OSError):
            self.sock.send(line, socket.MSG_DONTWAIT)

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
        """What data begins with and its size: a sample's row, or an auth or goodbye as it came.

        None while it is incomplete; WireError.
        """
        parsed = parse_pickle(data)
        if not parsed:
            return None, 0
        message, size, floats = parsed
        is_other = type(message.get("bye")) is str or type(message.get("part")) is str
        if auth or is_other:
            return message, size
        row = check_sample(message)
        self.shape = make_shape(data[:size], message, row, floats)
        self.ack = message.get("ack") is True
        return row, size

    def messages(self, auth: bool) -> Iterator[Any]:
        """What comes, as parse has it, each whole within the deadline after the one before."""
        data, since, count = b"", time.monotonic(), 0
        due = since + self.timeout
        while True:
            size = len(data)
            data += self.receive(self.timeout if not data else due - time.monotonic())
            if len(data) == size:
                if data:
                    raise ConnectionError("closed in the middle of a sample")
                return
            now = time.monotonic()
            while data:
                message: Any = parse_shape(data, self.shape) if self.shape else None
                size = len(data)
                if message is None:
                    message, size = self.parse(data, auth)
                    if message is None:
                        if now > due:
                            raise Silence
                        break
                    auth = False
                data = data[size:]
                yield message
                message, count, due = None, count + 1, now + self.timeout
            if now - since > RATE_SECONDS:
                if count > MAX_RATE * (now - since):
                    raise WireError("more than %d samples a second" % MAX_RATE)
                since, count = now, 0


class Collector:
    """The role that listens to agents: a thread for each of them."""

    def __init__(
        self, listener: socket.socket, table: Table, options: argparse.Namespace
    ) -> None:
        self.listener, self.table, self.options = listener, table, options
        self.lock = threading.Lock()  # of what follows
        self.free = list(range(table.capacity))
        self.slots: Dict[str, int] = collections.Counter()  # slots in use by source
        self.lost: Dict[Tuple[str, str], float] = {}  # (node, job) -> time.monotonic()
        self.samples, self.used = 0, 0  # of slots: how many have ever been in use
        self.looked, self.spent, self.pinned = time.monotonic(), 0.0, False
        self.waiting = Waiting(MAX_WAITING)
        self.refusals = Refusals(self.tell_refusal)
        self.flapping = Flapping(FLAP_CHANGES, FLAP_SECONDS)
        self.visits = Flapping(FLAP_VISITS, FLAP_SECONDS)
        self.turned_away = TurnedAway()
        self.runner = (
            CommandRunner(options.alert_command) if options.alert_command else None
        )

    def run(self) -> None:
        """Accept agents until the supervisor is gone."""
        self.table.acquire()
        self.table.reset()
        self.table.lock.release()
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
        now, spent = time.monotonic(), time.process_time()
        with self.lock:
            self.lost = {
                key: when
                for key, when in self.lost.items()
                if when > now - GONE_SECONDS
            }
        if now > self.looked + PIN_SECONDS and hasattr(os, "sched_setaffinity"):
            least = PIN_CPU / 2 if self.pinned else PIN_CPU  # pinned ones take less
            self.pinned = spent - self.spent > least * (now - self.looked)
            self.looked, self.spent = now, spent
            pin_threads(self.pinned)
        return BEAT_SECONDS if self.slots else IDLE_SECONDS

    def turn_away(self, sock: socket.socket, address: Address, error: str) -> None:
        """Tell an agent that there is no room for it, and why."""
        why = (
            "no room for more agents here (%s): raise TasksMax or ulimit -u -n" % error
        )
        with self.lock:
            self.turned_away.add(why)
            count = self.turned_away.lately()
        text = "%s; turned away in the last minute: %d" % (why, count)
        with contextlib.suppress(OSError):
            sock.send(b"error %s\n" % text.encode(), socket.MSG_DONTWAIT)
            sock.shutdown(socket.SHUT_WR)
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

    def serve(self, sock: socket.socket, address: Address) -> None:
        """Everything between a connection's begin and its end."""
        peer = Peer(sock, address, self.options.timeout)
        kind, text = "refused", "a defect of the master"
        try:
            kind, text = self.converse(peer)
        except Silence:
            kind, text = "lost", "no sample for %g s" % peer.timeout
        except WireError as error:
            text = str(error)
        except OSError as error:
            kind, text = "lost", "the connection broke (%s)" % (error.strerror or error)
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

    def converse(self, peer: Peer) -> Tuple[str, str]:
        """Take samples until the peer says goodbye or closes: how it ended, (kind, text)."""
        nonce = secrets.token_hex(16) if self.options.secret else None
        if nonce:
            peer.say(b"challenge %s\n" % nonce.encode())
        for message in peer.messages(bool(nonce)):
            if type(message) is tuple:
                self.take(peer, message)
            elif nonce:
                check_auth(message, self.options.secret, nonce)
                nonce = None
            elif message.get("part") == "job":
                row = check_job(message)
                with self.lock:
                    self.table.write_job(row)
            elif "bye" in message:
                return "finished", "; ".join(
                    clean_text(message[key])
                    for key in ("bye", "report")
                    if type(message.get(key)) is str
                )
            message = None  # freed before the thread waits again: what is kept is cold
        if peer.text("version"):
            return "lost", "closed without a goodbye"
        return "finished", "closed"

    def take(self, peer: Peer, row: Row) -> None:
        """Put a sample into the table, tell what it means, answer it."""
        peer.row = row[:KEPT]
        new = peer.slot < 0
        if new:
            self.enter(peer)
        self.samples += 1
        changes = judge(self.options.rules, peer.state, row, time.monotonic())
        if changes:
            peer.alerts = " ".join(
                str(rule).replace(" ", "_")
                for rule, since in peer.state.items()
                if since is None
            )
        self.table.write(peer.slot, peer.address, row, peer.since, peer.alerts)
        if new:
            self.welcome(peer)
        for kind, rule, value in changes:
            self.tell(
                kind,
                peer,
                "%s is %g (%s)" % (rule.metric, value, str(rule)),
                rule,
                value,
            )
        if peer.ack:
            peer.say(b"ok\n")
        if self.options.verbose:
            log.debug(
                "%s sent %s",
                peer,
                {
                    key: from_field(value)
                    for key, value in zip(INDEX, row)
                    if from_field(value) is not None
                },
            )

    def enter(self, peer: Peer) -> None:
        """Give the peer a slot; WireError when there is none for it."""
        interval = min(
            peer.row[INDEX["interval"]], MAX_INTERVAL
        )  # or NaN, which is no larger
        peer.timeout = max(peer.timeout, 2.5 * interval)
        with self.lock:
            if not self.free:
                raise WireError("master is full (%d agents)" % self.table.capacity)
            if peer.source not in LOOPBACK and (
                self.slots[peer.source] >= max(1, self.table.capacity * SOURCE_SHARE)
            ):
                raise WireError(
                    "too many agents of %s; the rest is for others" % peer.source
                )
            peer.slot = heapq.heappop(self.free)
            self.slots[peer.source] += 1
            peer.known_as = peer.text("node") or peer.address
            self.used = max(self.used, peer.slot + 1)
        self.waiting.remove(peer.sock)

    def welcome(self, peer: Peer) -> None:
        """Tell that a node is there, and whether it was lost before."""
        self.beat_table()
        with self.lock:
            since = self.lost.pop((peer.known_as, peer.text("job")), None)
        if self.visits.is_flapping(peer.source):
            return
        told = self.tell("connected", peer, "from %s" % peer.address)
        if told and since is not None:
            away = time.monotonic() - since
            self.tell("resolved", peer, "lost: back after %.0f s" % away)

    def leave(self, peer: Peer, kind: str, text: str) -> None:
        """Free the peer's slot and tell how it ended."""
        self.table.clear(peer.slot)
        with self.lock:
            heapq.heappush(self.free, peer.slot)
            self.slots[peer.source] -= 1
            if not self.slots[peer.source]:
                del self.slots[peer.source]
            if kind == "lost":
                self.lost[peer.known_as, peer.text("job")] = time.monotonic()
        if self.is_restless(peer):
            return
        for rule in [rule for rule, since in peer.state.items() if since is None]:
            self.tell("resolved", peer, "%s: the node is gone" % str(rule), rule)
        if kind != "refused":
            self.tell(kind, peer, text)

    def is_restless(self, peer: Peer) -> bool:
        """Whether the peer's source comes and goes so often that this visit is not told."""
        with self.lock:
            others = self.slots.get(peer.source, 0)
        if time.time() - peer.since > BRIEF_SECONDS or others > CROWD:
            return False  # a crowd that is lost at once is no loop
        visits = self.visits.count(peer.source)
        if visits > 0:
            self.announce(
                "flapping",
                peer,
                "%d brief visits from %s within %.0f min: no more is told of them for as long"
                % (visits, peer.source, FLAP_SECONDS / 60),
            )
        return visits != 0

    def is_flapping(self, kind: str, peer: Peer, rule: Optional[Rule]) -> bool:
        """Whether this comes and goes so often that it is not told; that is told once."""
        if rule:
            what = str(rule)
        elif kind in ("connected", "finished", "lost"):
            what = "the node"
        else:
            return False
        changes = self.flapping.count((peer.known_as, peer.text("job"), what))
        if changes > 0:
            self.announce(
                "flapping",
                peer,
                "%s came and went %d times within %.0f min: no more is told of it for as long"
                % (what, changes, FLAP_SECONDS / 60),
            )
        return changes != 0

    def tell(
        self,
        kind: str,
        peer: Peer,
        text: str,
        rule: Optional[Rule] = None,
        value: Union[float, str] = "",
    ) -> bool:
        """Announce an event, unless its kind is flapping; whether it was."""
        if self.is_flapping(kind, peer, rule):
            return False
        self.announce(kind, peer, text, rule, value)
        return True

    def announce(
        self,
        kind: str,
        peer: Peer,
        text: str,
        rule: Optional[Rule] = None,
        value: Union[float, str] = "",
    ) -> None:
        """One event: to the ring, the log and, when it is an alert, the command."""
        self.table.add_event(kind, text, peer.known_as, peer.row, peer.address)
        if kind == "alert" or kind == "lost" and self.options.lost:
            log.critical(
                "CRITICAL WARNING: %s%s: %s%s",
                peer,
                " lost" if kind == "lost" else "",
                text,
                "\a" if sys.stderr.isatty() else "",
            )
            if self.runner:
                self.runner.post(
                    Alert(
                        kind,
                        peer.known_as,
                        peer.text("job"),
                        rule.metric if rule else "lost",
                        value,
                        rule.threshold if rule else "",
                    )
                )
        else:
            log.info("%s %s: %s", kind, peer, text)

    def tell_refusal(self, source: str, reason: str) -> None:
        """One event for one or many refusals of a source."""
        log.warning("refused %s: %s", source, reason)
        self.table.add_event("refused", reason, source)


def pin_threads(busy: bool) -> None:
    """Have the peers' threads run on the main thread's CPU when busy; it goes where there is room.

    One at a time has the interpreter: passing it from CPU to CPU takes as long as their work.
    """
    with contextlib.suppress(OSError), open("/proc/self/stat") as file:
        cpu = int(file.read().rpartition(")")[2].split()[36])  # proc(5), field 39
        cpus = {cpu} if busy else os.sched_getaffinity(0)
        for thread in threading.enumerate():
            if isinstance(thread, ServeThread):  # alert commands are to run anywhere
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread.native_id or -1, cpus)


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Have the kernel end a read in time, socket(7): Python's way would add a poll to each."""
    micros = max(1000, int(seconds * 1e6))
    sock.setsockopt(
        socket.SOL_SOCKET,
        socket.SO_RCVTIMEO,
        struct.pack("ll", micros // 1000000, micros % 1000000),
    )


def close_gently(sock: socket.socket) -> None:
    """Close so that what was written arrives: unread input would turn the close into a reset."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER_SECONDS)
        for _ in range(8):
            if not sock.recv(MAX_SAMPLE):
                break
    sock.close()


class ServeThread(threading.Thread):
    """serve(sock, address) on a thread: the less its run() stacks up, the fewer pages it keeps."""

    def __init__(self, serve: Serve, sock: socket.socket, address: Address) -> None:
        super().__init__(daemon=True)
        self.serve, self.sock, self.address = serve, sock, address

    def run(self) -> None:
        self.serve(self.sock, self.address)


def hang_up(sock: socket.socket, address: Address, error: str) -> None:
    """Close a connection that cannot be served."""
    sock.close()


def accept_loop(
    listener: socket.socket,
    waiting: Waiting,
    serve: Serve,
    timeout: float,
    beat: Callable[[], Optional[float]] = lambda: None,
    turn_away: Callable[[socket.socket, Address, str], None] = hang_up,
) -> None:
    """Run serve(socket, address) on a thread for each connection, until the supervisor is gone.

    One that there is no thread or descriptor for goes to turn_away(socket, address, reason).
    beat() is called between connections, and after as many seconds as it returns, if any.
    """
    listener.setblocking(False)
    parent = multiprocessing.parent_process()
    told = -math.inf
    spare = os.open(os.devnull, os.O_RDONLY)
    while parent and parent.is_alive():
        seconds = beat()
        multiprocessing.connection.wait([listener, parent.sentinel], seconds)
        error = ""
        try:
            for _ in range(MAX_ACCEPTS):
                sock, address = listener.accept()
                failure = start_serving(sock, address, waiting, serve, timeout)
                if failure:
                    turn_away(sock, address, failure)
                    error = failure
        except (BlockingIOError, ConnectionError):
            pass
        except OSError as full:  # no descriptors or memory: it passes
            error = str(full.strerror)
            os.close(spare)  # makes room for one, to tell it so
            with contextlib.suppress(OSError):
                turn_away(*listener.accept(), error)
            spare = os.open(os.devnull, os.O_RDONLY)
        if error:
            if time.monotonic() - told > REFUSAL_SECONDS:
                log.error("cannot take new connections for now: %s", error)
                told = time.monotonic()
            time.sleep(BEAT_SECONDS)


def start_serving(
    sock: socket.socket,
    address: Address,
    waiting: Waiting,
    serve: Serve,
    timeout: float,
) -> str:
    """Start a thread for a connection; why there is none, or "".

    The timeout is set here: a thread that calls setsockopt() needs 4 KiB more of its stack.
    """
    sock.setblocking(True)
    with contextlib.suppress(OSError):  # gone already, as its thread will see
        set_timeout(sock, timeout)
    waiting.add(sock, split_address(address)[0])
    try:
        ServeThread(serve, sock, address).start()
    except RuntimeError as error:
        waiting.remove(sock)
        return str(error)
    return ""


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
.axis,
.finished {
  color: var(--dim);
  font-size: 0.85rem;
}
.bad {
  color: var(--bad);
}
.lost,
.alert {
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
}
#jobs {
  margin-top: 1rem;
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
.job {
  background: var(--card);
}
.n {
  text-align: right;
}
.w {
  white-space: normal;
  overflow-wrap: anywhere;
  min-width: 9.6rem;
}

/* The bar behind a percentage */
.bar {
  position: absolute;
  top: 2px;
  left: 2px;
  z-index: -1;
  width: calc(100% - 4px);
  height: calc(100% - 4px);
  fill: var(--cpu);
  opacity: 0.25;
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
path.ram {
  stroke: var(--ram);
  stroke-dasharray: 3 2;
}
.graphs {
  grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  margin: 0 0 1rem;
}
figure .line {
  display: block;
  width: 100%;
  height: 6rem;
}
.axis {
  display: flex;
  justify-content: space-between;
}
@media (min-width: 700px) {
  figure:nth-child(-n+2) {
    grid-column: span 2;
  }
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
    grid-template-columns: minmax(0, 1fr) 44rem;
  }
  main > * {
    grid-column: 1 / -1;
  }
  #nodes {
    grid-column: 1;
  }
  aside {
    grid-column: 2;
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
  const selection = getSelection();
  const {isCollapsed, anchorNode, anchorOffset, focusNode, focusOffset} = selection;
  morph(main, page.querySelector("main"));
  if (focus !== document.activeElement) focus.focus({preventScroll: true});
  try {
    const ends = [anchorNode, anchorOffset, focusNode, focusOffset];
    if (!isCollapsed) selection.setBaseAndExtent(...ends);
  } catch (error) { /* that text is gone */ }
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
    <h1>{title}</h1>{notice}
    {parts}
    <footer>
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
ALL_NODES_LINK_HTML = """
    <p><a href="./">All nodes</a></p>"""
EMPTY_HTML = """
    <section>
      <p>No agents yet: run on the node that you want to see</p>
      <pre>python3 agent.py --host {host} --port {port}{secret}</pre>
      <p>or on every node of a job</p>
      <pre>SENTINEL_HOST={host} SENTINEL_PORT={port} sbatch run_agent.slurm</pre>
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
    <section id="{name}" class="scroll" tabindex="0" aria-label="{caption}">
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
          <tr><th class="job" scope="rowgroup" colspan="{span}">{heading}</th></tr>"""
ROW_HTML = """
          <tr id="{id}">{cells}</tr>"""
CELL_HTML = '<td class="{kind}">{content}</td>'
CURVES_CELL_HTML = "<td>{curves}</td>"
LINK_CELL_HTML = '<td><a href="{href}">{text}</a></td>'
NODE_CELL_HTML = (
    '<th scope="row" class="w"><a href="{href}">{name}</a>{marks}</th>'  # of its row
)
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
      <nav>Pages:{links}
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
GRAPHS_HTML = """
    <div class="graphs">{graphs}
    </div>"""
GRAPH_HTML = """
      <figure>
        <figcaption>{label} <b>{now}</b></figcaption>
        {curve}
        <div class="axis">
          <span>10 min ago</span>
          <span>{least} to {most}</span>
        </div>
      </figure>"""
ASIDE_HTML = """
    <aside>{tables}
    </aside>"""


SPECIAL = re.compile(
    "[&<>\"']"
)  # most texts have none, and html.escape() takes its time


class Html(str):
    """Markup: what ``fill`` made.  Any other text is escaped on its way in."""


def as_markup(value: object) -> str:
    """A value as markup: a list stands for its items, None for nothing."""
    if isinstance(value, Html):
        return value
    if isinstance(value, list):
        return "".join(map(as_markup, value))
    text = "" if value is None else str(value)
    return html.escape(text) if SPECIAL.search(text) else text


def fill(template: str, *values: object, **named: object) -> Html:
    """Put values into the {} and the {name} of a template; what is no markup is escaped."""
    for name, value in named.items():
        named[name] = as_markup(value)
    return Html(template.format(*map(as_markup, values), **named))


# ============================================================================
# Readings: what a value is called, and how people, pages and sorting see it
# ============================================================================

UNITS = {metric.key: metric.unit for metric in METRICS}
UNITS.update(age="s", ran="s", limit="s", mem="B")  # of columns that are no metrics
SCALES = {  # larger units of a unit, the smallest first
    "s": (("min", 60), ("h", 3600), ("d", 86400)),
    "B": (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)),
}
FRACTIONS = ("load1",)  # numbers without a unit that are no counts
MAX_DIGITS = 8  # of a number; a longer one is no machine's, and is written as 1e+99


def render_value(key: str, value: Any) -> str:
    """A reading for people: fixed digits and a unit; a dash if it is unknown."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if key == "time":
        return time.strftime("%T", time.localtime(value))
    unit, slash, per = UNITS.get(key, "").partition("/")
    size = 1
    for larger_unit, larger_size in SCALES.get(unit, ()):
        if abs(value) >= larger_size:
            size = larger_size
            unit = larger_unit
    digits = 1 if unit or key in FRACTIONS else 0
    number = "%.*f" % (digits, value / size)
    if len(number) > MAX_DIGITS:
        number = "%.0e" % value
    return ("%s %s%s%s" % (number, unit, slash, per)).rstrip()


def name_of(row: Message) -> str:
    """What to call the node of a row: its name, or HOST:PORT."""
    name: str = row["node"] or row["address"] or ""
    if name.startswith("('"):
        return re.sub(r"\('(.*)', (\d+)\)", r"\1:\2", name)
    return name


def path_of(row: Message) -> str:
    """Where the page of the row's node is, seen from the overview.

    Browsers take . and .. for folders, also when they are escaped, and many a proxy undoes
    the escape of a slash: such a name is not in the path but in the query.
    """
    name = name_of(row)
    if name in (".", "..") or "/" in name:
        return "./node/?name=" + urllib.parse.quote(name, "")
    return "./node/" + urllib.parse.quote(name, "")


def natural(value: Any) -> Any:
    """A key to sort by: c2 comes before c10."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\d+", lambda digits: digits.group().zfill(20), value.lower())


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
        found += [row for row in rows if is_asked_for(row, query, words)]
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
    total = sum(row["load"] for row in rows)
    others = len(rows) - 1
    for row in rows:
        rest = total - row["load"]
        if row["load"] < IDLE and rest > BUSY * others:
            row["marks"].append("idle")


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
        ("alerts", sum(bool(row["alerts"]) for row in rows)),
        ("idle", sum("idle" in row["marks"] for row in rows)),
        ("lost", len(gone(view, "lost"))),
    )
    kinds = ["%s: %d" % (kind, count) for kind, count in counts if count]
    trouble = [", ".join(kinds).capitalize()] if kinds else []
    if view.turned_away_lately:
        trouble.append(render_turned_away(view))
    return "; ".join(trouble)


def headline(view: Snapshot, rows: List[Message]) -> str:
    """The first words of the page: whether all is well."""
    trouble = trouble_of(view, rows)
    if trouble:
        return "\u26a0 " + trouble
    return "All is well" if rows else "No nodes"


Card = NamedTuple("Card", [("label", str), ("figure", str), ("remark", str)])


def cards_of(view: Snapshot, rows: List[Message]) -> List[Card]:
    """The figures under the headline; none as long as there is no node."""
    if not rows:
        return []
    jobs = {row["job"] for row in rows} - {None}
    cards = [Card("Nodes", "%d" % len(rows), "jobs: %d" % len(jobs))]
    for key in ("cpu", "ram"):
        worst, name = max((row[key], name_of(row)) for row in rows)
        figure = "%.1f %%" % mean(rows, key)
        remark = "worst: %.1f %% %s" % (worst, name)
        cards.append(Card(NUMBERS[key].label, figure, remark))
    age = min(row["age"] for row in rows)
    taken = render_value("time", view.time - age)
    cards.append(Card("Newest sample", taken, "%.1f s ago" % age))
    return cards


def figures(view: Snapshot, rows: List[Message]) -> Tuple[str, List[Card]]:
    """What matters: the headline and the cards."""
    return headline(view, rows), cards_of(view, rows)


# ============================================================================
# Jobs: what Slurm says of them, in the order and the words of the page
# ============================================================================


def jobs_in_order(view: Snapshot) -> List[Message]:
    """The jobs, those that have not ended first, by their ids."""
    return sorted(
        view.jobs,
        key=lambda job: (job["state"] in ENDED_STATES, natural(job["job"])),
    )


def fold_arrays(jobs: Iterable[Message]) -> Iterator[List[Message]]:
    """The jobs, each in a list; the tasks of an array in one, where its first task is."""
    arrays: Dict[Any, List[Message]] = {}
    for job in jobs:
        arrays.setdefault(job["array"] or job["raw"], []).append(job)
    return iter(arrays.values())


def job_row(tasks: List[Message], now: float) -> Message:
    """A row of the page's table of jobs, for a job or all tasks of an array."""
    job = tasks[0]
    row = dict(job, slot=job["raw"])
    if len(tasks) > 1:
        states = collections.Counter(task["state"] or "UNKNOWN" for task in tasks)
        counts = ["%d %s" % (count, state.lower()) for state, count in states.items()]
        row.update(job=job["array"], state=", ".join(counts), ran=None, text=None)
        return row
    row.update(ran=run_time(job, now), text=", ".join(remarks(job)) or None)
    return row


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
        start = time.strftime("%F %R", time.localtime(job["start"]))
        words.append("expected " + start)
    return words


# ============================================================================
# Columns: a table is a list of them; a new column is one line in such a list
# ============================================================================

LEFT = ""  # classes of the style sheet
RIGHT = "n"
WRAPPED = "w"
RECENT_POINTS = 30  # of a curve in a table
RECENT_STEP = 5  # every fifth tick: the last five minutes
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
    text = render_value(column.key, row.get(column.key))
    return fill(CELL_HTML, kind=column.align, content=text)


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
    marks = [fill(MARK_HTML, mark=mark) for mark in row.get("marks", ())]
    return fill(NODE_CELL_HTML, href=path_of(row), name=name_of(row), marks=marks)


def draw_job(column: "Column", row: Message, site: Site) -> Html:
    """The job's id, a link to its nodes."""
    job = row.get("job")
    if not job:
        return draw_text(column, row, site)
    return fill(LINK_CELL_HTML, href=link({}, job=job), text=job)


def draw_kind(column: "Column", row: Message, site: Site) -> Html:
    """What kind of event it is, which is the cell's class, too."""
    return fill(CELL_HTML, kind=row["kind"], content=row["kind"])


def draw_recent(column: "Column", row: Message, site: Site) -> Html:
    """The last five minutes of CPU and RAM."""
    series = {
        key: site.series(row, key, RECENT_POINTS, RECENT_STEP) for key in ("cpu", "ram")
    }
    return fill(CURVES_CELL_HTML, curves=draw_curves(series, RECENT_POINTS, 100))


def draw_curves(series: Dict[str, List[float]], points: int, top: float) -> Html:
    """A curve for each metric's readings, from 0 to top, with gaps where they are unknown."""
    paths = [
        fill(PATH_HTML, key=key, path=path_through(values, top))
        for key, values in series.items()
    ]
    return fill(CURVES_HTML, last=points - 1, paths=paths)


def path_through(values: List[float], top: float) -> str:
    """The path of a curve in a box that is 100 high (SVG 2, 9.3)."""
    path = ""
    pen = MOVE
    for x, value in enumerate(values):
        if math.isnan(value):
            pen = MOVE
            continue
        share = min(max(value / top, 0), 1)
        path += pen % (x, 100 - 100 * share)
        pen = DRAW
    return path


class Column(NamedTuple):
    """A column of a table.

    key: of the value in a row, by which the table can be sorted; heading: what is written above;
    align: LEFT, RIGHT or WRAPPED; draw: makes the cell of a row.
    """

    key: str
    heading: str
    align: str = LEFT
    draw: Draw = draw_text


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
JOB_COLUMNS = (
    JOB_ID,
    of_metric("job_name"),
    Column("state", "State"),
    Column("nodes", "Nodes", RIGHT),
    of_metric("cpus"),
    Column("mem", "Memory asked for", RIGHT),
    Column("ran", "Ran", RIGHT),
    Column("limit", "Time limit", RIGHT),
    WHAT,
)

# ============================================================================
# Pages: a snapshot -> HTML.  With the rooms above, the only one that knows HTML.
# ============================================================================

MAP_FROM = 61  # nodes: so many get a map
PAGE_ROWS = 100  # nodes: more get a table in pages
NEW_EVENTS = 20  # events on the page
FINE = 300  # points of the graphs of CPU and RAM: one a tick
COARSE = 60  # points of the other graphs ...
FIFTH = 5  # ... one in so many ticks
NO_GRAPHS = (  # numbers that hardly ever change, or that another graph shows
    "interval",
    "cpus",
    "mem_total",
    "mem_used",
    "uptime",
    "gpus",
    "job_cpus",
    "job_mem_limit",
    "job_time_limit",
)
GRAPHS = tuple(key for key in NUMBERS if key not in NO_GRAPHS)
FINE_GRAPHS = GRAPHS[:2]  # CPU and RAM

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

    def all_nodes(self) -> str:
        """The page: what matters, every live node, what has gone and what happened."""
        title, cards = figures(self.view, self.rows)
        return self.whole(
            title,
            self.cards(cards),
            self.jobs(),
            self.form() if self.view.nodes else self.empty(),
            self.node_map() if len(self.rows) >= MAP_FROM else None,
            self.nodes() if self.rows else None,
            self.aside(),
        )

    def one_node(self) -> str:
        """The page of a node: graphs, every reading, events; "" if it is not known."""
        name = self.query["node"]
        events = [event for event in self.view.events if name_of(event) == name][::-1]
        rows = [row for row in self.rows if name_of(row) == name] or events[:1]
        if not rows:
            return ""
        parts = [fill(ALL_NODES_LINK_HTML), self.last_known(rows)]
        for number, row in enumerate(rows, 1):
            parts.append(self.graphs(row))
            parts.append(self.readings(number, row))
        parts.append(
            self.table("events", "Events", NODE_EVENT_COLUMNS, [Body(None, events)])
        )
        return self.whole(name, *parts, root="../")

    def whole(self, title: str, *parts: Optional[Html], root: str = "./") -> str:
        """A page around its parts; root: where the overview is, seen from this page."""
        return fill(
            PAGE_HTML,
            title=title,
            root=root,
            notice=self.notice(),
            style=Html(STYLE),
            parts=list(parts),
            cost=self.site.cost.get("text"),
            script=Html(SCRIPT),
        )

    def notice(self) -> Optional[Html]:
        """That all is invented, if it is."""
        if not getattr(self.site.options, "demo", False):
            return None
        return fill(NOTICE_HTML, text=DEMO_NOTICE)

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

    def jobs(self) -> Optional[Html]:
        """The table of jobs, when a watcher tells of any."""
        folded = fold_arrays(jobs_in_order(self.view))
        rows = [job_row(tasks, self.view.time) for tasks in folded]
        if not rows:
            return None
        return self.table("jobs", "Jobs", JOB_COLUMNS, [Body(None, rows)])

    def node_map(self) -> Html:
        """A tile for each node, filled as high as its reading."""
        key = "ram" if self.query.get("map") == "ram" else "cpu"
        tiles = [self.tile(row, row[key]) for row in self.rows]
        return fill(MAP_HTML, label=NUMBERS[key].label, tiles=tiles)

    def tile(self, row: Message, percent: float) -> Html:
        """The tile of a node; its label tells what its colour cannot."""
        level = "v%d" % round(percent * TILE_STEPS / 100)
        label = "%s, job %s, CPU %.1f %%, RAM %.1f %% %s" % (
            name_of(row),
            row["job"] or "-",
            row["cpu"],
            row["ram"],
            ", ".join(row["marks"]),
        )
        return fill(
            TILE_HTML,
            slot=row["slot"],
            kind=level + " al" if row["alerts"] else level,
            href=path_of(row),
            label=label,
        )

    def nodes(self) -> Html:
        """The table of nodes: by job unless group=no, in pages when there are many."""
        has_jobs = any(row["job"] for row in self.rows)
        is_grouped = has_jobs and not self.query.get("group")
        jobs: Dict[str, List[Message]] = {}
        for row in self.rows:
            job = (row["job"] or "") if is_grouped else ""
            jobs.setdefault(job, []).append(row)
        last_page = -(-len(self.rows) // PAGE_ROWS)
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
        newest = self.view.events[: -NEW_EVENTS - 1 : -1]
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
        """A graph for each metric of which the last ten minutes are known."""
        graphs = [self.graph(row, NUMBERS[key]) for key in GRAPHS]
        return fill(GRAPHS_HTML, graphs=graphs)

    def graph(self, row: Message, metric: Metric) -> Optional[Html]:
        """The last ten minutes of a metric; None if they are unknown."""
        points = FINE if metric.key in FINE_GRAPHS else COARSE
        values = self.site.series(row, metric.key, points, 1)
        known = [value for value in values if math.isfinite(value)]
        if not known:
            return None
        top = 100 if metric.unit == "%" else max(known + [1])
        return fill(
            GRAPH_HTML,
            label=metric.label,
            now=render_value(metric.key, row.get(metric.key)),
            curve=draw_curves({metric.key: values}, points, top),
            least=render_value(metric.key, min(known)),
            most=render_value(metric.key, max(known)),
        )

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
        cells = [column.draw(column, row, self.site) for column in columns]
        return fill(ROW_HTML, id="%s_%s" % (name, number), cells=cells)


def has_any(rows: List[Message], column: Column) -> bool:
    """Whether some row has a value for the column."""
    return any(row.get(column.key) is not None for row in rows)


def render_page(view: Snapshot, query: Query, site: Site) -> str:
    """The page of all nodes."""
    return Page(view, query, site).all_nodes()


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
    jobs = jobs_in_order(view)
    return as_json(
        {"time": round(view.time, 3), "left_out": view.jobs_left_out, "jobs": jobs}
    )


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
    lines += text_table(nodes)
    width = query.get("width", "")
    cut = int(width) if width.isdecimal() else None
    return "".join(line[:cut] + "\n" for line in lines)


def text_table(nodes: List[Message]) -> List[str]:
    """The lines of the table of nodes, its heading first."""
    always = ("node", "cpu", "ram")
    columns = [
        column for column in COLUMNS if column.key in always or has_any(nodes, column)
    ]
    table = [[column.heading for column in columns]]
    table += [[text_cell(column, node) for column in columns] for node in nodes]
    widths = [max(map(text_width, texts)) for texts in zip(*table)]
    lines = []
    for texts in table:
        cells = map(align, columns, texts, widths)
        lines.append("  ".join(cells).rstrip())
    return lines


def text_cell(column: Column, node: Message) -> str:
    """What a cell says; a node's name is whole, as it is what one acts upon."""
    if column.key == "node":
        return name_of(node)
    return render_value(column.key, node[column.key])[:MAX_CELL]


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
    "/api/events": (JSON, render_events_json),
    "/nodes.csv": (CSV, render_csv),
    "/nodes.txt": (TEXT, render_nodes_text),
    "/metrics": (PROMETHEUS, render_metrics),
    "/healthz": (TEXT, render_health),
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
NAMED_ROUTES = {"/node/": "node"}


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
    for route in ROUTES:
        if route != "/" and decoded.endswith(route):
            return Route(route, "")
    raise HTTPError(404, "no such page; there are " + " ".join(ROUTES))


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
GAP = (math.nan,) * len(GRAPHS)
BLANK = array.array("f", GAP[:FINE_COUNT] * FINE + GAP[FINE_COUNT:] * COARSE)


class Curve(NamedTuple):
    """Where a ring of History holds a metric: readings from first on, one in so many ticks."""

    first: int
    size: int
    ticks: int


def curve_of(metric: str) -> Curve:
    """Where the readings of one of GRAPHS are."""
    number = GRAPHS.index(metric)
    if number < FINE_COUNT:
        return Curve(number * FINE, FINE, 1)
    first = FINE_COUNT * FINE + (number - FINE_COUNT) * COARSE
    return Curve(first, COARSE, FIFTH)


def put_readings(ring: Any, tick: int, values: Sequence[float]) -> None:
    """Write what GRAPHS were at a tick, over what they were a whole ring ago."""
    for number in range(FINE_COUNT):
        ring[number * FINE + tick % FINE] = values[number]
    if tick % FIFTH == 0:
        first = FINE_COUNT * FINE + tick // FIFTH % COARSE
        ring[first::COARSE] = array.array("f", values[FINE_COUNT:])


class History:
    """The last ten minutes of every node, in a ring of floats for each; unknown is NaN.

    A ring has FINE readings of CPU, FINE of RAM, and COARSE of each other metric of GRAPHS:

        cpu, one a tick | ram, one a tick | load1, one in FIFTH ticks | swap, ... | ...

    The reading of a tick is at the tick modulo the size: it replaces that of ten minutes ago.
    """

    def __init__(self) -> None:
        self.tick = 0  # the newest
        # (name or address, job) -> the tick of its newest readings, its ring
        self.rings: Dict[Any, Tuple[int, Any]] = {}

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
        last, ring = self.rings.get(key) or (tick - 1, BLANK[:])
        is_bridged = tick - last <= FIFTH  # a longer gap is one in the graph, too
        for at in range(max(last + 1, tick - FINE + 1), tick):
            put_readings(ring, at, values if is_bridged else GAP)
        if last < tick:
            put_readings(ring, tick, values)
        self.rings[key] = tick, ring

    def forget(self, tick: int, limit: int) -> None:
        """Drop the rings with nothing left in them; all that are not in use when too many are."""
        kept = FINE if len(self.rings) <= limit else 1
        self.rings = {
            key: (last, ring)
            for key, (last, ring) in self.rings.items()
            if tick - last < kept
        }

    def series(self, row: Message, metric: str, points: int, step: int) -> List[float]:
        """A metric's last readings, every step-th of them, oldest first."""
        if metric not in GRAPHS:
            return []
        curve = curve_of(metric)
        key = (row["node"] or row["address"], row["job"])
        last, ring = self.rings.get(key) or (-FINE, BLANK)
        stride = step * curve.ticks
        newest = self.tick - self.tick % stride
        oldest = newest - (points - 1) * stride
        readings = []
        for tick in range(oldest, newest + 1, stride):
            if last - FINE < tick <= last:
                at = tick // curve.ticks % curve.size
                readings.append(ring[curve.first + at])
            else:
                readings.append(math.nan)
        return readings


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
TICK_SECONDS = 2.0  # between two looks at the table, for the graphs
WATCHED_SECONDS = 60.0  # without a request: only every fifth tick has a look


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
        self.series = self.history.series
        self.hosts = {
            socket.gethostname().lower(),
            options.dashboard_host.lower(),
            "localhost",
            *options.allow_host,
        }

    def run(self) -> None:
        """Answer until the supervisor is gone."""
        threading.Thread(target=self.watch, daemon=True).start()
        accept_loop(self.listener, self.waiting, self.serve, HTTP_SECONDS)

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
            sock.settimeout(
                LINGER_READ
            )  # unread input would turn the close into a reset
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
        if path == "/" and "text/html" not in request.fields.get("accept", "text/html"):
            path = "/nodes.txt"  # curl
        if path in NAMED_ROUTES:
            query[NAMED_ROUTES[path]] = name or query.get("name", "")
        kind, _ = ROUTES[path]
        is_zipped = "gzip" in request.fields.get("accept-encoding", "")
        body = self.body(path, query, is_zipped)
        headers["Content-Type"] = kind
        headers["Vary"] = "Accept, Accept-Encoding"
        if is_zipped:
            headers["Content-Encoding"] = "gzip"
        return body

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
        """Make the body of one of ROUTES; HTTPError when the query's node is not known."""
        _, render = ROUTES[path]
        text = render(view, query, self)
        if not text:
            raise HTTPError(404, "no such node; it may have left long ago")
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
# silent and comes back, memory that grows until the job dies of it, and jobs that wait.

DEMO_USER = "demo"
DEMO_INTERVAL = 2.0  # seconds between two samples of a node
DEMO_LOOK = 5  # samples between two looks at ranks and GPUs
DEMO_PAUSE = 30.0  # seconds from the end of a job to the next of its kind
DEMO_AGAIN = 60.0  # seconds after which all facts of jobs are told again
DEMO_SILENCE = (90.0, 130.0)  # seconds of every ten minutes: a node sends nothing
DEMO_SILENT_NODE = "c12"
DEMO_IDLE_NODE = "c03"
DEMO_CPUS = 32  # of a node
DEMO_RANKS = 4  # processes of a job on a node
DEMO_SECONDS = 2.0  # to connect, or for a line of the collector
GIB = 2.0**30


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


# fmt: off
DEMO_JOBS = (
    DemoJob(48211, "train_resnet50", ("c01", "c02", "c03", "c04"), 128 * GIB,
            14400, 43200, 7980, cpu=77, full=66, gpus=4),
    DemoJob(48213, "md_npt_310K", ("c11", "c12", "c13", "c14", "c15"), 64 * GIB,
            7200, 14400, 2400, cpu=94, full=58),
    DemoJob(48217, "assemble_genome", ("c21",), 192 * GIB,
            420, 7200, 150, cpu=61, full=100, ending="OUT_OF_MEMORY"),
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


def demo_run(job: DemoJob, began: float, now: float) -> DemoRun:
    """What of a job runs now, or has just ended, in a demonstration that began then."""
    cycle = job.seconds + DEMO_PAUSE
    count, passed = divmod(now - began + job.age, cycle)
    step = 1 if job.array else 1000  # the next task of the array, or another job
    return DemoRun(
        job.number + int(count) * step,
        began - job.age + count * cycle,
        min(passed, job.seconds),
        passed >= job.seconds,
    )


def demo_id(job: DemoJob, run: DemoRun) -> str:
    """A run's id, as squeue has it: 48211, 48300_5."""
    if not job.array:
        return str(run.number)
    return "%s_%d" % (job.array, run.number - int(job.array))


def demo_facts(job: DemoJob, run: DemoRun) -> Message:
    """What Slurm would say of a run."""
    facts: Message = {
        "job": demo_id(job, run),
        "raw": str(run.number),
        "job_name": job.name,
        "user": DEMO_USER,
        "state": job.ending if run.is_over else "RUNNING",
        "partition": "gpu" if job.gpus else "cpu",
        "nodelist": ",".join(job.nodes),
        "nodes": len(job.nodes),
        "cpus": DEMO_CPUS * len(job.nodes),
        "mem": job.memory,
        "submit": run.start - 900,
        "start": run.start,
        "limit": job.limit,
    }
    if job.gpus:
        facts["gpus"] = job.gpus * len(job.nodes)
    if job.array:
        facts["array"] = job.array
    if run.is_over:
        facts["end"] = run.start + job.seconds
        facts["exit"] = "0:0" if job.ending == "COMPLETED" else "0:125"
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
            task = demo_run(job, began, now).number - int(job.array)
            number = "%s_[%d-%d]" % (job.array, task + 1, task + 35)
            facts = dict(common, job=number, raw=job.array, array=job.array)
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


def demo_sample(job: DemoJob, name: str, run: DemoRun, now: float) -> Message:
    """What the agent of a node would send."""
    cpu = demo_cpu(job, name, run, now)
    share = run.passed / job.seconds
    full = job.full * (0.5 + 0.5 * share) + demo_wave(name, "ram", now)
    full = min(100.0, max(1.0, full))
    memory = 256 * GIB
    used = full / 100 * job.memory
    sample: Message = {
        "node": name,
        "job": demo_id(job, run),
        "job_name": job.name,
        "user": DEMO_USER,
        "version": "demo",
        "interval": DEMO_INTERVAL,
        "cpu": cpu,
        "ram": 100 * (used + 6 * GIB) / memory,
        "load1": cpu * DEMO_CPUS / 100,
        "cpus": DEMO_CPUS,
        "mem_total": memory,
        "mem_used": used + 6 * GIB,
        "disk_read": 2e6 * (1 + demo_wave(name, "read", now)),
        "disk_write": 4e6 * (1 + demo_wave(name, "write", now)),
        "net_rx": 9e6 * (1 + demo_wave(name, "rx", now)),
        "net_tx": 8e6 * (1 + demo_wave(name, "tx", now)),
        "job_cpus": DEMO_CPUS,
        "job_cpu": cpu,
        "job_mem": used,
        "job_mem_limit": job.memory,
        "job_ram": full,
        "job_time_limit": job.limit,
        "job_time_left": job.limit - run.passed,
    }
    if job.gpus:
        readings = [gpu["gpu"] for gpu in demo_gpus(job, name, now)]
        sample["gpus"] = job.gpus
        sample["gpu"] = sum(readings) / len(readings)
        sample["gpu_mem"] = 72.0
    return sample


def demo_gpus(job: DemoJob, name: str, now: float) -> List[Message]:
    """The GPUs of a node; the last of one node does nothing."""
    gpus = []
    for index in range(job.gpus):
        busy = 93 + 5 * demo_wave(name, "gpu%d" % index, now)
        if name == DEMO_IDLE_NODE or (name, index) == ("c02", 3):
            busy = 0.0
        gpus.append(
            {
                "part": "gpu",
                "index": index,
                "name": "invented GPU",
                "gpu": busy,
                "mem_used": 0.72 * 80 * GIB,
                "mem_total": 80 * GIB,
                "power": 60 + 3.2 * busy,
                "power_limit": 400.0,
                "temp": 34 + busy / 3,
                "processes": 1,
            }
        )
    return gpus


def demo_ranks(job: DemoJob, name: str, run: DemoRun, now: float) -> List[Message]:
    """The processes of a job on a node."""
    ranks = []
    cpus = DEMO_CPUS // DEMO_RANKS
    first = job.nodes.index(name) * DEMO_RANKS
    used = demo_sample(job, name, run, now)["job_mem"] / DEMO_RANKS
    for local_rank in range(DEMO_RANKS):
        begin = local_rank * cpus
        ranks.append(
            {
                "part": "rank",
                "pid": 4000 + local_rank,
                "rank": first + local_rank,
                "local_rank": local_rank,
                "step": "0",
                "program": job.name.partition("_")[0],
                "cpu": cpus * demo_cpu(job, name, run, now),
                "mem": used,
                "peak": used,
                "threads": cpus,
                "cpus": "%d-%d" % (begin, begin + cpus - 1),
                "state": "R",
            }
        )
    return ranks


def demo_parts(
    job: DemoJob, name: str, run: DemoRun, now: float, look: int
) -> List[Message]:
    """What a look at a node finds: its CPUs, the job's processes and GPUs."""
    busy = min(9, int(demo_cpu(job, name, run, now) / 10))
    parts: List[Message] = [
        {
            "part": "look",
            "processes": DEMO_RANKS,
            "shown": DEMO_RANKS,
            "cpus": "0-%d" % (DEMO_CPUS - 1),
        },
        {"part": "core", "first": 0, "busy": str(busy) * DEMO_CPUS},
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
        self.began = time.time()
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
            facts.append(demo_facts(job, run))
            for name in job.nodes:
                self.play_node(job, name, run, now)
        self.tell(facts, now)

    def play_node(self, job: DemoJob, name: str, run: DemoRun, now: float) -> None:
        """Send a sample of a node, or say goodbye once its job is over."""
        key = (name, demo_id(job, run))
        if run.is_over:
            if key in self.agents:
                self.agents.pop(key).close("the job has ended: " + job.ending)
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


# ============================================================================
# Supervisor: processes and signals
# ============================================================================

BACKLOG = 4096  # connections that may wait for accept()
STACK_SIZE = 128 * 1024  # bytes of stack for each thread
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


def is_demo(options: argparse.Namespace) -> bool:
    """Of the role that plays the agents of a demonstration."""
    return bool(options.demo)


ROLES = (
    Role("collector", Collector, always),
    Role("dashboard", Dashboard, always),
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
    begin = {role.name: role.begin for role in ROLES}[name]
    begin(listener, Table.inherit(segment, lock), options).run()


def setup_log(verbose: bool) -> None:
    """Log to stderr, one line a message."""
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
        try:
            while not self.signals and not self.has_failed:
                self.start_missing()
                self.wait()
                self.reap()
                self.look_after_name()
        finally:
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.stop(self.agents)  # while there is somebody to say goodbye to
            self.stop(self.roles)

    def wait(self) -> None:
        """Until a signal comes, a process ends, one is to be started, or a look is due."""
        ends = [process.sentinel for process in self.running.values()]
        missing = [self.delay[name] for name in self.names if name not in self.running]
        seconds = min([NAME_SECONDS] + missing)
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
        " SENTINEL_JOB, SENTINEL_METRIC, SENTINEL_VALUE, SENTINEL_THRESHOLD, SENTINEL_COUNT;"
        " what it starts ends with it",
    )


def add_trust(add: Callable[..., Any]) -> None:
    """Who may send, and who may look."""
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


def add_talk(add: Callable[..., Any]) -> None:
    """How much the log tells."""
    add("--verbose", action="store_true", help="log every sample")


FLAG_GROUPS = (
    add_listening,
    add_limits,
    add_alerts,
    add_trust,
    add_table,
    add_sources,
    add_talk,
)

# -- from flags to a running master ---------------------------------------------


def main(argv: Optional[List[str]] = None) -> int:
    """Run the master: its exit code."""
    if cannot_run():
        return 1
    parser = build_parser()
    options = parser.parse_args(argv)
    options.lost = "no-lost" not in options.alert
    options.rules = rules_of(options)
    setup_log(options.verbose)
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
    need_agent(options)
    check_demo(options)
    options.secret = read_secret(options.secret_file) if options.secret_file else None
    raise_limits()
    supervisor = Supervisor(options)
    with contextlib.ExitStack() as stack:
        listeners = open_listeners(options, stack)
        options.port = port_of(listeners["collector"])
        options.dashboard_port = port_of(listeners["dashboard"])
        options.shm_name = options.shm_name or "sentinel_%d" % options.port
        table = Table.create(options.shm_name, options.max_agents)
        stack.callback(table.unlink)
        # should this process be killed, the tracker may clean up behind it, but silently
        sys.warnoptions.append("ignore:resource_tracker")
        tell_addresses(options)
        supervisor.run(listeners, table)
    log.info("stopped")
    return int(supervisor.has_failed)


def need_agent(options: argparse.Namespace) -> None:
    """StartError when a flag needs agent.py and it is not there."""
    for flag, is_given in (
        ("--with-agent", options.with_agent),
        ("--my-jobs", options.my_jobs is not None),
        ("--ssh", options.ssh),
    ):
        if is_given and not os.path.exists(beside("agent.py")):
            raise StartError(
                "%s needs agent.py beside master_server.py: copy it there" % flag
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
    log.info("collector listening on %s", join_address(options.host, options.port))
    log.info(
        "dashboard listening on %s: open %s - Ctrl-C stops",
        join_address(options.dashboard_host, options.dashboard_port),
        page_address(options),
    )
    if options.demo:
        log.warning("%s", DEMO_NOTICE)
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
