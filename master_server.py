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
#   Verdicts       what is known of a job -> what is wrong with it, or why it died: pure
#   Collector      agents' sockets -> wire -> table and alerts: a thread for each agent
#   The page       a copy of the table -> HTML, and nobody else knows HTML.  Eight rooms: Style
#                  sheet, Script, Markup, Readings, Selection, Jobs, Columns, Pages
#   For programs   a copy of the table -> JSON, CSV, text, Prometheus
#   Dashboard      browsers' sockets -> request -> pages: a thread for each connection
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
import shlex
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
    Metric("gpu", "d", "%", "GPU", "gpu_percent", "GPU utilisation, mean of all"),
    Metric("gpu_mem", "d", "%", "GPU memory", "gpu_memory_percent", "GPU memory in use"),
    # the job on the node
    Metric("job_cpus", "d", "", "Job CPUs", "job_cpus", "CPUs allocated to the job here"),
    Metric("job_cpu", "d", "%", "Job CPU", "job_cpu_percent", "Allocated CPUs in use"),
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
# Verdicts: what is known of a job -> what is wrong with it, why it died.  Pure
# ============================================================================
#
# diagnose() puts a job's evidence to the one table of checks, CHECKS.  A check names what it
# needs: facts of Slurm, readings of a node, and curves that cover its time without a hole.  A
# node of which that is not known is not shown to it, so a check whose evidence is incomplete is
# silent: a false verdict costs more than a missing one.
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
ALONE_SECONDS = 45.0  # the only node may be silent so long: Slurm tells ends every 30 s
SILENT_SECONDS = 5.0  # and one of several that go on
MAX_NUMBER = 1e18  # no reading is larger; what claims to be is unknown
MAX_LISTED = 4  # names in a sentence
MAX_CPUS = 8192  # of one node
MAX_CPU_LIST = 90  # characters: a longer list of CPUs may have been cut
GIB = 2.0**30
MIB = 2.0**20
IDLE_CPUS = 0.1  # CPUs in use, and less, are none
ONE_CPU = (0.85, 1.1)  # CPUs in use by one thread that never waits
QUIET_BYTES = 1e5  # a second, read and written: no I/O to speak of
SLOW_BYTES = 5e6  # a second: what waits for I/O and moves no more has a slow filesystem
IDLE_GPU = 1.0  # percent busy
UNUSED_GPU = 100 * MIB  # of a GPU's memory: no program has opened it
MARGIN = 1.2  # a fifth more than was needed: what to ask for next time

# The same words are in agent.py's report.
OUT_OF_MEMORY = "out of memory: the kernel killed %s"
BELOW_PEAK = "memory peak above the highest sample, %.3g GB of %.3g GB"
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
SEVERITIES = ("died", "problem", "advice", "fine")  # the worst first
ARROW_COLUMN = 100  # where cures begin, at most
MARKS = {"died": "died ", "problem": "! ", "advice": ". ", "fine": ""}
EXIT_CODES = {"fine": 0, "advice": 1, "problem": 2, "died": 3}
RUNNING_STATES = ("", "RUNNING", "COMPLETING")  # "": Slurm was not asked
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")
# key of a sample, what is full, percent from which on it is
FILESYSTEMS = (
    ("disk_tmp", "/tmp", 98.0),
    ("disk_shm", "/dev/shm", 98.0),
    ("inodes_tmp", "the list of files (inodes) of /tmp", 98.0),
    ("disk", "the working directory's filesystem", 99.5),
    ("inodes", "the list of files (inodes) of the working directory", 99.5),
)
# keys that are texts; all others are numbers
FACT_TEXTS = [key for key, code in JOB_FACTS if code.endswith("s")]
FACT_TEXTS += ["cancelled_by", "derived_exit", "failed_step"]
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
PARTS = ("ranks", "gpus")


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
        verdicts.insert(0, Verdict("fine", "fine", case.describe(), "", "fine"))
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
            )
        )
    return verdicts


def knows(case: "Case", node: NodeEvidence, check: Check) -> bool:
    """Whether all is known of a node that a check needs."""
    for need in check.needs:
        if need in PARTS:
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
            key: clean_curve(latest(curves[key], key), now)
            for key in CURVES.keys() & curves
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


class Case:
    """A job's evidence without what cannot be true, and what all checks ask of it."""

    def __init__(self, job: JobEvidence) -> None:
        self.now = clean_number(job.now) or 0.0
        self.facts = clean_dict(job.facts, FACT_TEXTS)
        self.nodes = [clean_node(node, self.now) for node in job.nodes]
        self.state = str(self.facts.get("state", "")).split(" ")[0].rstrip("+")
        self.start = float(self.facts.get("start", 0.0))
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
        self.is_running = self.state in RUNNING_STATES and not self.is_over
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
        """For how long it ran, in seconds."""
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
        longest = max(len(node.curves.get("job_mem", ())) for node in self.nodes)
        words = count_words(len(self.nodes), "node")
        return "%s, %d samples of each" % (words, longest) if longest else words


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
    if seconds < 100:
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
    """Whether a node has done nothing: no CPU, no I/O.  One that has worked is given more time."""
    points = [cpus_in_use(node, value) for _, value in node.curves["job_cpu"]]
    if sum(used >= 0.5 for used in points) >= 3:
        seconds = max(seconds, LONG_SECONDS)
    return lasts(
        node,
        "job_cpu",
        case.now,
        seconds,
        lambda value: cpus_in_use(node, value) <= IDLE_CPUS,
    ) and is_quiet(case, node, seconds)


def is_quiet(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether a node is known to read and write nothing; what is not known is not quiet."""

    def all_quiet(*keys: str) -> bool:
        return all(
            lasts(node, key, case.now, seconds, lambda value: value <= QUIET_BYTES)
            for key in keys
        )

    if "job_read" in node.sample and "job_write" in node.sample:
        return all_quiet("job_read", "job_write")
    if any(rank.get("state") == "D" for rank in node.ranks):
        return False
    # all traffic of the node; a network of another kind shows in the wait for I/O
    waits = lasts(node, "psi_io", case.now, seconds, lambda value: value < 5)
    return waits and all_quiet("disk_read", "disk_write", "net_rx", "net_tx")


def find_idle_job(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    if case.has_gpus or not case.is_whole(nodes):
        return
    if all(is_idle_for(case, node, seconds) for node in nodes):
        idle = min(
            lasting(node, "job_cpu", case.now, lambda value: value <= 5)
            for node in nodes
        )
        yield {
            "cpus": count_words(int(sum(n.sample["job_cpus"] for n in nodes)), "CPU"),
            "nodes": list_words([node.name for node in nodes]),
            "time": time_words(idle),
        }


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


def is_one(node: NodeEvidence, percent: float) -> bool:
    """Whether about one CPU is in use."""
    least, most = ONE_CPU
    return least <= cpus_in_use(node, percent) <= most


def is_serial(case: Case, node: NodeEvidence, seconds: float) -> bool:
    """Whether one thread does all the work of a node that has several CPUs, and always did."""
    if node.sample["job_cpus"] < 2:
        return False
    if len([rank for rank in node.ranks if rank.get("cpu", 0) > 20]) > 1:
        return False
    points = [cpus_in_use(node, value) for _, value in node.curves["job_cpu"]]
    return max(points) <= 1.5 and lasts(
        node, "job_cpu", case.now, seconds, lambda value: is_one(node, value)
    )


def find_few_cpus(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        groups: Dict[Tuple[int, ...], List[Dict[str, Any]]] = {}
        for rank in node.ranks:
            allowed = parse_cpu_list(rank.get("cpus"))
            if allowed and rank.get("cpu", 0) >= 2:
                groups.setdefault(tuple(sorted(allowed)), []).append(rank)
        for allowed_cpus, ranks in groups.items():
            count = len(allowed_cpus)
            threads = sum(int(rank.get("running", 1)) for rank in ranks)
            load = sum(rank["cpu"] for rank in ranks) / 100
            total = node.sample["job_cpus"]
            least = ONE_CPU[0] * count
            is_full = load >= least and threads > count and count < total
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
        if is_full and running >= 1.2 * cpus and running >= cpus + 1:
            yield {
                "severity": "problem" if running >= 2 * cpus else "advice",
                "running": int(running),
                "cpus": int(cpus),
                "node": node.name,
                "ranks": count_words(len(ranks), "process"),
                "each": max(1, int(cpus // len(ranks))),
            }


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
    memory: List[float] = []
    times: List[float] = []
    for node in nodes:
        idle, lasted = idle_gpus(case, node, seconds)
        if idle:
            numbers = [int(gpu["index"]) for gpu in idle if "index" in gpu]
            names.append("%s gpu %s" % (node.name, range_words(numbers)))
            memory += [gpu["mem_used"] for gpu in idle if "mem_used" in gpu]
            times += [lasted] * len(idle)
    if not times:
        return
    total = sum(len(node.gpus) for node in nodes)
    total = max(total, int(case.facts.get("gpus", 0)))
    are_all = len(times) == total
    each = ", at most %s each" % size_words(max(memory)) if memory else ""
    yield {
        "idle": len(times),
        "all": total,
        "time": time_words(min(times)),
        "names": list_words(names),
        "memory": each,
        "cure": "srun --jobid=%s --overlap --pty nvidia-smi  # does the program find them?"
        % case.job
        if are_all
        else "--gres=gpu:%d  # or does the program know of more than one GPU?"
        % max(1, (total - len(times)) // len(nodes)),
    }


def idle_gpus(
    case: Case, node: NodeEvidence, seconds: float
) -> Tuple[List[Dict[str, Any]], float]:
    """The GPUs of a node that have been idle, and for how long; none when one cannot be read.

    One that no program has opened, while another works, is told after the seconds.  The rest may
    belong to a program that still starts: it is given more time.
    """
    if any("gpu" not in gpu or "index" not in gpu for gpu in node.gpus):
        return [], 0.0
    idle = [gpu for gpu in node.gpus if gpu["gpu"] <= IDLE_GPU]
    are_all = len(idle) == len(node.gpus)
    key = "gpu" if are_all else "gpu_min"
    lasted = lasting(node, key, case.now, lambda value: value <= IDLE_GPU)
    if lasted >= LONG_SECONDS - CURVE_STEP / 2:
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


def find_growth(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    found = []
    for node in nodes:
        since = case.now - seconds - CURVE_STEP / 2
        points = [point for point in node.curves["job_mem"] if point[0] >= since]
        if len(points) < 5:
            continue
        slope, share = fit_line(points)
        used = points[-1][1]
        limit = node.sample["job_mem_limit"]
        steps = [later[1] - sooner[1] for sooner, later in zip(points, points[1:])]
        is_steady = share >= 0.95 and all(step > 0 for step in steps)
        if is_steady and slope > 0 and limit / 2 <= used < limit:
            left = (limit - used) / slope
            if left <= 600:
                found.append((left, slope, used, limit, node))
    if found:
        left, slope, used, limit, node = min(found, key=lambda entry: entry[0])
        largest = largest_rank_words(node.ranks)
        yield {
            "node": node.name,
            "used": used / GIB,
            "limit": limit / GIB,
            "pace": size_words(60 * slope),
            "left": time_words(left),
            "time": time_words(seconds),
            "largest": "; " + largest if largest else "",
            "flag": memory_flag(limit),
        }


def find_little_memory(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    for node in nodes:
        limit = node.sample["job_mem_limit"]
        share = lambda value: value > 0.9 * limit  # noqa: B023, E731
        if lasts(node, "job_mem", case.now, seconds, share):
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
    if any(not has_covered(node, "job_mem", seconds) for node in nodes):
        return
    known = memory_peak(case, nodes)
    cached = max(node.sample["job_mem"] + node.sample["job_cache"] for node in nodes)
    ample = max(known.peak, cached)  # what the page cache had was of use, too
    flag = memory_flag(known.peak)
    is_low = flag_bytes(memory_flag(ample)) <= known.limit / 2
    if known.limit - ample < GIB:
        return
    if is_low and (not case.is_running or are_flat(case, nodes, known, seconds)):
        yield memory_figures(case, known, flag)


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
                "cure": 'export TMPDIR="$SLURM_SUBMIT_DIR/tmp"; mkdir -p "$TMPDIR"'
                if key != "disk" and key != "inodes"
                else "df -h . ; df -i .  # in the working directory",
            }


def find_time_left(
    case: Case, nodes: List[NodeEvidence], seconds: float
) -> Iterator[Figures]:
    left = min(node.sample["job_time_left"] for node in nodes)
    limit = max(node.sample["job_time_limit"] for node in nodes)
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
    patience = seconds if case.live else ALONE_SECONDS
    first, name = min(moments)
    if case.now - first < patience:
        return
    others = [other for _, other in sorted(moments)[1:]]
    rest = "; then %s" % list_words(others) if others else ""
    live = [node.name for node in case.live]
    yield {
        "node": name,
        "quoted": shlex.quote(name),
        "time": clock_words(first, "%H:%M:%S"),
        "ago": time_words(case.now - first),
        "rest": rest,
        "live": "still sending: %s" % list_words(live) if live else "no other sends",
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
            "flag": memory_flag(killed_limit(case)) if killed_limit(case) else "--mem",
        }


def goes_words(case: Case) -> str:
    """How the job went on after something in it had failed."""
    if case.is_running:
        return "the job goes on"
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
        yield {
            "nodes": list_words([node.name for node in ran]),
            "time": clock_words(last),
            "reason": case.facts.get("reason", "Slurm has told no reason"),
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
    elif derived and derived != (0, 0):
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
    return max(killed or limits.values(), default=0.0)


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
    largest = largest_rank_words(node.ranks)
    if largest:
        words.append(largest)
    slope, share = fit_line(points[-60:])
    if len(points) >= 5 and share >= 0.9 and 60 * slope > 0.01 * used:
        lasted = time_words(points[-1][0] - points[-60:][0][0])
        words.append("it grew by %s a minute for %s" % (size_words(60 * slope), lasted))
    return "; ".join(words) + "; "


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
    if kills:
        words = OUT_OF_MEMORY % count_words(sum(kills.values()), "process")
    else:
        words = "out of memory, says Slurm; the kernel's count was not seen"
    where = " on %s" % list_words(list(kills)) if kills else ""
    limit = killed_limit(case)
    flag = memory_flag(limit) if limit else "--mem"
    proof = memory_proof(case)
    holder = one_holder(case)
    if holder:
        flag += "  # or distribute: %s holds it all" % holder
    yield death(case, words=words, where=where, proof=proof, flag=flag)


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
            cure = "ls -l /dev/shm  # remove what is yours, or ask for more --mem"
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
        what=DIED + "{words}{where}",
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
        what="requeued: it ran until {time} on {nodes} and waits to start again",
        proof="{reason}",
        cure="scontrol update JobId={job} Requeue=0  # if it must not start twice",
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
        cure="export OMP_NUM_THREADS={each}",
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
        what="memory of {node} grows steadily: at this pace it is full in {left}",
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
        needs=("job_mem", "job_cache", "job_mem_limit"),
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


def explain_code(verdicts: Iterable[Verdict]) -> int:
    """The exit code of --explain: 0 fine, 1 advice, 2 problem, 3 died."""
    codes = [EXIT_CODES.get(verdict.severity, 0) for verdict in verdicts]
    return max(codes, default=0)


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

    def beat(self) -> None:
        """Say that this role is well, and do what is due now and then."""
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
    beat: Callable[[], None] = lambda: None,
    turn_away: Callable[[socket.socket, Address, str], None] = hang_up,
) -> None:
    """Run serve(socket, address) on a thread for each connection, until the supervisor is gone.

    One that there is no thread or descriptor for goes to turn_away(socket, address, reason).
    """
    listener.setblocking(False)
    parent = multiprocessing.parent_process()
    told = -math.inf
    spare = os.open(os.devnull, os.O_RDONLY)
    while parent and parent.is_alive():
        beat()
        multiprocessing.connection.wait([listener, parent.sentinel], BEAT_SECONDS)
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
  go("replaceState", "/?" + new URLSearchParams(filled));
});
document.addEventListener("click", event => {
  const link = event.target.closest("a[href^='/?']");
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

PAGE_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{title} - Cluster Sentinel</title>
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <link rel="icon" href="data:,">
  <style>{style}</style>
  <noscript><meta http-equiv="refresh" content="2"></noscript>
</head>
<body>
  <p id="notice" class="old" role="status" hidden></p>
  <main>
    <h1>{title}</h1>
    {parts}
    <footer>
      <a href="/nodes.txt">Text</a>
      <a href="/nodes.csv">CSV</a>
      <a href="/api/nodes">JSON</a>
      <a href="/metrics">Prometheus</a>
      \u00b7 {cost}
    </footer>
  </main>
  <script>{script}</script>
</body>
</html>
"""
ALL_NODES_LINK_HTML = """
    <p><a href="/">All nodes</a></p>"""
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
    <form role="search">
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
SMALL = ("nfs_rtt",)  # numbers that are thousandths of their unit
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
    if key in SMALL and size == 1:
        digits = 4
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
    """Where the page of the row's node is."""
    return "/node/" + urllib.parse.quote(name_of(row), "")


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
    return "/?" + urllib.parse.urlencode(fields)


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
    "job_mem_peak",
    "job_mem_limit",
    "job_mem_failcnt",
    "oom_kill",
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
        return self.whole(name, *parts)

    def whole(self, title: str, *parts: Optional[Html]) -> str:
        """A page around its parts."""
        return fill(
            PAGE_HTML,
            title=title,
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
MAX_CLIENTS = 128  # HTTP connections at once
MAX_REQUEST_LINE = 4096  # bytes
MAX_REQUEST = 16384  # bytes of request line and headers
FRESH_SECONDS = 0.25  # for which a copy of the table serves every request
REQUEST = re.compile(
    rb"([A-Za-z]+) ([!-~]+) HTTP/1\.\d\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*\r\n)*)\r\n"
)
COST = "This master takes %.1f %% of a core and %s of resident memory for %.1f samples a second"
ACCOUNTS = 7  # of what the master took, 10 s apart: a minute's mean
PICK_NAME = operator.itemgetter(*map(NODE_KEYS.index, ("node", "address", "job")))
PICK_GRAPHS = operator.itemgetter(*map(NODE_KEYS.index, GRAPHS))
GAP = (math.nan,) * len(GRAPHS)
BLANK = array.array("f", GAP[:2] * FINE + GAP[2:] * COARSE)
MAX_LEFT = 1024  # who left, to be remembered
TICK_SECONDS = 2.0  # between two looks at the table, for the graphs
WATCHED_SECONDS = 60.0  # without a request: only every fifth tick has a look
HEADERS = {
    "Content-Type": TEXT,
    "Connection": "close",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; img-src data:; connect-src 'self'; form-action"
    " 'self'; base-uri 'none'; frame-ancestors 'none'; style-src '%s'; script-src '%s'"
    % tuple(
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (STYLE, SCRIPT)
    ),
}


class HTTPError(Exception):
    """(status, text, headers): a request that gets another answer than a page."""


def parse_request(head: bytes) -> Tuple[str, str, Query, Dict[str, str]]:
    """The bytes of a request -> method, path, query, headers; HTTPError (RFC 9112)."""
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
    headers = [line.partition(":") for line in lines.split("\r\n")[:-1]]
    path, _, query = target.partition("?")
    try:
        fields = dict(
            urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=16)
        )
    except ValueError:
        raise HTTPError(400, "more than 16 fields in the query") from None
    return (
        method,
        urllib.parse.unquote(path),
        fields,
        {name.lower(): value.strip() for name, _, value in headers},
    )


def read_request(sock: socket.socket) -> bytes:
    """The bytes of request line and headers, bounded in size and time; HTTPError."""
    deadline, data, chunk = time.monotonic() + HTTP_SECONDS, b"", b"-"
    while chunk and b"\r\n\r\n" not in data:
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = sock.recv(RECEIVE_SIZE)
        except socket.timeout:
            raise HTTPError(408, "no whole request in %g s" % HTTP_SECONDS) from None
        data += chunk
        if chunk and not data[:1].isalpha():
            raise HTTPError(
                400, "this is no HTTP request; if it was https://, try http://"
            )
        if len(data.partition(b"\r\n")[0]) > MAX_REQUEST_LINE:
            raise HTTPError(
                414, "a request line of more than %d bytes" % MAX_REQUEST_LINE
            )
        if len(data) > MAX_REQUEST:
            raise HTTPError(431, "headers of more than %d bytes" % MAX_REQUEST)
    return data[: data.find(b"\r\n\r\n") + 4]


class History:
    """The last ten minutes of every node, in one array of floats each; unknown is NaN.

    cpu x FINE, ram x FINE: one a tick; each of the other GRAPHS x COARSE: one in FIFTH ticks
    """

    def __init__(self) -> None:
        self.tick = 0
        self.rings: Dict[Any, Tuple[int, Any]] = {}  # (name, job) -> last tick, array

    def add(self, view: Snapshot, tick: int) -> None:
        """Note the readings of a tick; forget nodes that have been away for longer than a ring."""
        for row in view.rows() if view.beat < STALE_SECONDS else ():
            node, address, job = map(from_field, PICK_NAME(row))
            key, values = (node or address, job), PICK_GRAPHS(row)
            last, ring = self.rings.get(key) or (tick - 1, BLANK[:])
            for at in range(max(last + 1, tick - FINE + 1), tick + 1):
                known = (
                    tick - last <= FIFTH or at == tick
                )  # a longer gap is one in the graph, too
                ring[at % FINE], ring[FINE + at % FINE], *rest = (
                    values if known else GAP
                )
                if at % FIFTH == 0:
                    ring[2 * FINE + at // FIFTH % COARSE :: COARSE] = array.array(
                        "f", rest
                    )
            self.rings[key] = tick, ring
        kept = FINE if len(self.rings) <= 2 * view.capacity else 1
        self.rings = {
            key: (last, ring)
            for key, (last, ring) in self.rings.items()
            if tick - last < kept
        }
        self.tick = tick

    def series(self, row: Message, metric: str, points: int, step: int) -> List[float]:
        """A metric's last readings, every step-th of them, oldest first."""
        if metric not in GRAPHS:
            return []
        index, (last, ring) = (
            GRAPHS.index(metric),
            self.rings.get((name_of(row), row["job"]), (-FINE, ())),
        )
        start, size, unit = (
            (index * FINE, FINE, 1)
            if index < 2
            else (2 * FINE + (index - 2) * COARSE, COARSE, FIFTH)
        )
        step *= unit
        end = self.tick - self.tick % step
        return [
            ring[start + tick // unit % size]
            if last - FINE < tick <= last
            else math.nan
            for tick in range(end - (points - 1) * step, end + 1, step)
        ]


def measure(pid: int) -> Optional[Tuple[float, int]]:
    """(CPU seconds, resident bytes) of a process and its descendants, by proc(5); or None."""
    pids, ticks, pages = [pid], 0, 0
    for pid in pids:
        with contextlib.suppress(OSError), open("/proc/%d/stat" % pid) as stat, open(
            "/proc/%d/task/%d/children" % (pid, pid)
        ) as children:
            fields = stat.read().rpartition(")")[2].split()
            pids.extend(map(int, children.read().split()))
            ticks += sum(map(int, fields[11:15]))  # and of those that it has waited for
            pages += int(fields[21])
    return (
        (ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))
        if pages
        else None
    )


class Dashboard:
    """The role that answers browsers: a thread for each connection, one request each."""

    def __init__(
        self, listener: socket.socket, table: Table, options: argparse.Namespace
    ) -> None:
        self.listener, self.table, self.options = listener, table, options
        self.lock, self.waiting = threading.Lock(), Waiting(MAX_CLIENTS)
        self.view, self.viewed = table.snapshot(), time.monotonic()
        self.asked = -math.inf  # time.monotonic() of the last request
        self.bodies: Dict[Any, bytes] = {}  # of this view
        self.cost: Message = {"text": "What this master takes is not known"}
        self.accounts: Deque[Tuple[float, float, int]] = collections.deque(
            maxlen=ACCOUNTS
        )
        self.history = History()
        self.series = self.history.series
        self.names = {
            socket.gethostname().lower(),
            options.dashboard_host.lower(),
            "localhost",
        }

    def run(self) -> None:
        """Answer until the supervisor is gone."""
        threading.Thread(target=self.watch, daemon=True).start()
        accept_loop(self.listener, self.waiting, self.serve, HTTP_SECONDS)

    def watch(self) -> None:
        """Every TICK_SECONDS: add to the history, and see what the master itself takes."""
        self.names.add(socket.getfqdn().lower())  # which may take its time
        start = time.monotonic()
        while True:
            try:
                tick = int((time.monotonic() - start) / TICK_SECONDS)
                due = (
                    tick % FIFTH == 0 or tick == 1
                )  # the first figures need not be waited for
                if due or time.monotonic() - self.asked < WATCHED_SECONDS:
                    self.history.add(self.fresh(), tick)
                taken = measure(self.table.pid) if due else None
                if taken:
                    self.account(*taken)
            except Exception:
                log.exception("a defect, met while keeping the history")
            time.sleep(TICK_SECONDS - (time.monotonic() - start) % TICK_SECONDS)

    def account(self, seconds: float, memory: int) -> None:
        """Note what the master has taken; it tells what it takes, a mean over the accounts."""
        self.accounts.append((time.monotonic(), seconds, self.view.samples))
        self.cost.update(seconds=seconds, memory=memory)
        if len(self.accounts) > 1:
            first, last = self.accounts[0], self.accounts[-1]
            cpu, rate = (
                max(0.0, last[i] - first[i]) / (last[0] - first[0]) for i in (1, 2)
            )  # fewer samples: the collector started again
            self.cost["text"] = COST % (
                100 * cpu,
                render_value("agent_rss", memory),
                rate,
            )

    def serve(self, sock: socket.socket, address: Address) -> None:
        """Read one request, answer it, close."""
        method, status, headers = "GET", 200, dict(HEADERS)
        deadline = time.monotonic() + 2 * HTTP_SECONDS
        try:
            try:
                method, path, query, fields = parse_request(read_request(sock))
                body = self.answer(path, query, fields, headers)
            except HTTPError as error:
                status, text, *more = error.args
                body = text.encode() + b"\n"
                headers.update(*more)
            sock.settimeout(HTTP_SECONDS)
            sock.sendall(
                (
                    "HTTP/1.1 %d %s\r\n%sContent-Length: %d\r\n\r\n"
                    % (
                        status,
                        HTTPStatus(status).phrase,
                        "".join("%s: %s\r\n" % field for field in headers.items()),
                        len(body),
                    )
                ).encode("latin-1")
                + (b"" if method == "HEAD" else body)
            )
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(1.0)  # unread input would turn the close into a reset
            while sock.recv(MAX_REQUEST) and time.monotonic() < deadline:
                pass
        except OSError:
            pass  # the client went away; there is nobody to tell
        except Exception:
            log.exception("a defect, met while answering %s", address[0])
        finally:
            self.waiting.remove(sock)
            sock.close()

    def fresh(self) -> Snapshot:
        """A snapshot, taken at most once in FRESH_SECONDS, whoever asks.

        Who left, once seen, is remembered, even when other events push that out of the ring.
        """
        with self.lock:
            if time.monotonic() - self.viewed > FRESH_SECONDS:
                view, self.viewed, self.bodies = (
                    self.table.snapshot(),
                    time.monotonic(),
                    {},
                )
                known = {
                    (event["time"], name_of(event)): event
                    for event in self.view.left + view.events
                    if event["kind"] in ("finished", "lost")
                    and event["time"] > view.time - GONE_SECONDS
                }
                view.left = sorted(known.values(), key=lambda event: event["time"])[
                    -MAX_LEFT:
                ]
                self.view = view
            return self.view

    def admit(
        self, query: Query, fields: Dict[str, str], headers: Dict[str, str]
    ) -> None:
        """HTTPError for a Host that is not ours (DNS rebinding) or no token (Jupyter's way)."""
        host = re.sub(r":\d*$", "", fields.get("host", "localhost")).lower()
        if host not in self.names and not re.fullmatch(r"[\d.]+|\[[\da-f:.]+\]", host):
            raise HTTPError(
                421,
                "this master does not know itself by that name: use its address,"
                " or start it with --dashboard-host NAME",
            )
        if self.options.dashboard_token is None:
            return
        key = hashlib.sha256(self.options.dashboard_token.encode()).hexdigest()
        cookie = "sentinel_%d=%s" % (self.options.dashboard_port, key)
        offer = query.pop("token", fields.get("authorization", "")[len("Bearer ") :])
        if hmac.compare_digest(hashlib.sha256(offer.encode()).hexdigest(), key):
            headers["Set-Cookie"] = cookie + "; Path=/; HttpOnly; SameSite=Strict"
        elif not any(
            hmac.compare_digest(part.strip().encode(), cookie.encode())
            for part in fields.get("cookie", "").split(";")
        ):
            raise HTTPError(
                401,
                "a token is needed: open the address with ?token= that the master"
                " printed at its start, or send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    def answer(
        self, path: str, query: Query, fields: Dict[str, str], headers: Dict[str, str]
    ) -> bytes:
        """The body of an answer; what is to be said of it goes to headers; HTTPError."""
        self.admit(query, fields, headers)
        if path == "/" and "text/html" not in fields.get("accept", "text/html"):
            path = "/nodes.txt"  # curl
        if path.startswith("/node/"):
            path, query["node"] = "/node/", path[len("/node/") :]
        if path not in ROUTES:
            raise HTTPError(404, "no such page; there are " + " ".join(ROUTES))
        self.asked, view, (kind, render) = time.monotonic(), self.fresh(), ROUTES[path]
        if path == "/healthz" and view.beat > STALE_SECONDS:
            raise HTTPError(503, "the collector has been silent for %.0f s" % view.beat)
        zipped = "gzip" in fields.get("accept-encoding", "")
        key = path, zipped, tuple(sorted(query.items()))
        with self.lock:
            body = self.bodies.get(key)
            if body is None:
                body = render(view, query, self).encode("utf-8", "replace")
                if not body:
                    raise HTTPError(404, "no such node; it may have left long ago")
                body = self.bodies[key] = gzip.compress(body, 1) if zipped else body
        headers.update({"Content-Type": kind, "Vary": "Accept, Accept-Encoding"})
        headers.update({"Content-Encoding": "gzip"} if zipped else {})
        return body


# ============================================================================
# Supervisor: processes and signals
# ============================================================================

BACKLOG = 4096  # connections that may wait for accept()
STACK_SIZE = 128 * 1024  # bytes of stack for each thread
STOP_SECONDS = 3.0  # from SIGTERM to SIGKILL of a role
MAX_BACKOFF = 2.0  # seconds before a role is started again
# SIGHUP: the terminal has gone, with the ssh or the window that it was in
ENDING_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]
AGENT_PORT = 13579
PAGE_PORT = 8080
NEXT_PORTS = 20  # that are tried when a usual one is taken and jobs are watched
NAME_SECONDS = 5.0  # between two looks whether the segment still has its name


class StartError(Exception):
    """The master cannot start; the text says why and what to do."""


def setup_log(verbose: bool) -> None:
    """Log to stderr, one line a message."""
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
    )


def open_listener(flag: str, host: str, port: int) -> socket.socket:
    """A listening socket; ValueError (a bad host) or StartError when it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ValueError(
            "argument %shost: %r is no address of this machine; 127.0.0.1 (for"
            " itself) and 0.0.0.0 (from everywhere) are" % (flag, host)
        ) from None
    listener = socket.socket(family, kind, proto)
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


def run_role(
    name: str,
    listener: socket.socket,
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
    if name == "collector":  # its threads are never busy for long; being asked for the
        sys.setswitchinterval(1.0)  # interpreter by thousands that wait costs it a core
    role: Any = {"collector": Collector, "dashboard": Dashboard}[name]
    role(listener, Table.inherit(segment, lock), options).run()


class AgentProcess(subprocess.Popen):  # type: ignore[type-arg]
    """agent.py as a child, under the names that a multiprocessing.Process has.

    Its stdout is a pipe: it ends with the agent, and tells it when the supervisor has ended.
    """

    def __init__(self, options: argparse.Namespace, more: Sequence[str] = ()) -> None:
        command = [
            sys.executable,
            beside("agent.py"),
            "--host",
            reachable(options.host),
            "--port",
            str(options.port),
        ]
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


class Supervisor:
    """Starts the roles (and the agent), starts again what ends, stops all on a signal.

    A new one takes the signals over, so that whatever is made next is also removed again.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names = ["collector", "dashboard"]
        if options.with_agent:
            self.names.append("agent")
        if watches_jobs(options):
            self.names.append("watcher")
        self.watcher_began = False
        self.has_failed = False  # the watcher could not begin: the user is to mend that
        self.lock: Any = None
        self.running: Dict[str, Any] = {}  # name -> process
        self.signals: List[int] = []
        self.started = dict.fromkeys(self.names, -math.inf)  # time.monotonic()
        self.delay = dict.fromkeys(self.names, 0.0)  # seconds from then to the next
        self.trouble: Dict[str, str] = {}  # name -> why it cannot start
        self.looked = time.monotonic()  # at the segment's name
        self.wakeup, wakeup_end = os.pipe()
        os.set_blocking(wakeup_end, False)
        signal.set_wakeup_fd(wakeup_end)
        for number in ENDING_SIGNALS:
            # nohup has SIGHUP ignored: then the end of the terminal is none of ours
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.signals.append(number))

    def run(self, listeners: Dict[str, socket.socket], table: Table) -> None:
        """Supervise until a signal comes."""
        self.listeners, self.table = listeners, table
        self.new_lock()
        try:
            while not self.signals and not self.has_failed:
                self.start_missing()
                waits = [
                    self.delay[name] for name in self.names if name not in self.running
                ]
                waits.append(NAME_SECONDS)
                multiprocessing.connection.wait(
                    [self.wakeup]
                    + [process.sentinel for process in self.running.values()],
                    min(waits),
                )
                self.reap()
                self.look_after_name()
        finally:
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.stop(
                ["agent", "watcher"]
            )  # first: while there is somebody to say goodbye to
            self.stop(self.names)

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

    def look_after_name(self) -> None:
        """Make the segment's name again when it is gone, by RemoveIPC=yes of logind.conf(5) say."""
        now = time.monotonic()
        if now - self.looked < NAME_SECONDS or self.signals:
            return
        self.looked = now
        if self.table.has_name() or not self.lock:
            return
        name = self.table.shm.name
        try:
            if self.table.renew(self.lock):
                log.warning("shared memory %s was gone: made again", name)
                self.trouble.pop("table", None)
        except TableError as error:
            if self.trouble.get("table") != str(error):
                log.error("%s", error)
            self.trouble["table"] = str(error)

    def start_missing(self) -> None:
        """Start what does not run and has waited for its turn."""
        now = time.monotonic()
        for name in self.names:
            if name in self.running or now < self.started[name] + self.delay[name]:
                continue
            fresh = now - self.started[name] > 10 * MAX_BACKOFF
            self.delay[name] = 0.1 if fresh else min(MAX_BACKOFF, 2 * self.delay[name])
            self.started[name] = now
            try:
                self.running[name] = self.start(name)
            except (OSError, StartError) as error:
                if self.trouble.get(name) != str(error):
                    log.error("cannot start the %s for now: %s", name, error)
                self.trouble[name] = str(error)
            else:
                self.trouble.pop(name, None)
                log.info("%s started, pid %d", name, self.running[name].pid)

    def start(self, name: str) -> Any:
        """Start a role or the agent."""
        if name == "agent":
            return AgentProcess(self.options)
        if name == "watcher":
            again = self.watcher_began
            self.watcher_began = True
            return AgentProcess(self.options, watcher_flags(self.options, again))
        if not self.lock:
            self.new_lock()
        role = multiprocessing.Process(
            target=run_role,
            name=name,
            args=(
                name,
                self.listeners[name],
                self.table.segment(),
                self.lock,
                self.options,
            ),
        )
        role.start()
        return role

    def reap(self) -> None:
        """Take note of what has ended; one that could not get the lock takes all roles along."""
        ended = [
            name
            for name, process in self.running.items()
            if multiprocessing.connection.wait([process.sentinel], 0)
        ]
        if self.signals or not ended:
            return
        codes = self.stop(ended)
        for name, code in zip(ended, codes):
            if name == "watcher" and code == 1:
                self.has_failed = True  # it has said why
                return
            log.error("%s ended (%s); starting it again", name, describe_exit(code))
        if EXIT_LOCK in codes:
            self.stop(self.listeners)
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


def join_address(host: str, port: int) -> str:
    """host:port, or [host]:port for IPv6 (RFC 3986)."""
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def beside(name: str) -> str:
    """The path of a file in this one's folder."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


def reachable(host: str) -> str:
    """The address at which this machine reaches its own listener on the host."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


# ============================================================================
# Command line
# ============================================================================


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


def token_argument(text: str) -> str:
    """An argparse type: a token for the dashboard; auto makes one."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no token; auto makes a good one")
    return secrets.token_urlsafe(24) if text == "auto" else text


def read_secret(path: str) -> bytes:
    """The secret in a file that nobody else may read; one is made there if there is no file."""
    try:
        with contextlib.suppress(FileExistsError):
            with os.fdopen(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w"
            ) as file:
                file.write(secrets.token_hex(32) + "\n")
            log.info(
                "made a secret in %s: give it to the agents by --secret-file", path
            )
        with open(path, "rb") as file:
            mode, secret = (
                os.fstat(file.fileno()).st_mode,
                file.read(MAX_SAMPLE).strip(),
            )
    except OSError as error:
        raise StartError("no secret in %s: %s" % (path, error.strerror)) from None
    if mode & 0o077:
        raise StartError(
            "others can read the secret in %s; run: chmod 600 %s" % (path, path)
        )
    if not secret:
        raise StartError("no secret in %s; remove the file and it is made anew" % path)
    return secret


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    port = number(int, 0, 65535, "port")
    about, _, end = __doc__.partition("\n\nExit codes")
    parser = argparse.ArgumentParser(
        description=about,
        epilog="Exit codes" + end,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="listen for agents here (127.0.0.1); 0.0.0.0 if they are on other machines",
    )
    add(
        "--port",
        type=port,
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
        type=port,
        help="port for browsers (8080); 0 picks a free one",
    )
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
        "--shm-name",
        type=shm_argument,
        metavar="NAME",
        help="name of the shared memory (sentinel_PORT)",
    )
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
    add("--verbose", action="store_true", help="log every sample")
    return parser


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


def main(argv: Optional[List[str]] = None) -> int:
    """Run the master: its exit code."""
    if cannot_run():
        return 1
    parser = build_parser()
    options = parser.parse_args(argv)
    options.lost = "no-lost" not in options.alert
    options.rules = [rule for rule in options.alert if isinstance(rule, Rule)] or [
        parse_rule(text)._replace(is_default=True)  # type: ignore[union-attr]
        for text in DEFAULT_RULES
    ]
    setup_log(options.verbose)
    try:
        return run_master(options)
    except ValueError as error:
        parser.error(str(error))
    except (StartError, TableError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 1


def watches_jobs(options: argparse.Namespace) -> bool:
    """Whether the master is to watch the user's jobs by itself."""
    return options.my_jobs is not None or bool(options.ssh)


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


def run_master(options: argparse.Namespace) -> int:
    """Bind, make the table, supervise: 0 when a signal ended it."""
    moves = watches_jobs(options)
    for flag, given in (
        ("--with-agent", options.with_agent),
        ("--my-jobs", options.my_jobs is not None),
        ("--ssh", options.ssh),
    ):
        if given and not os.path.exists(beside("agent.py")):
            raise StartError(
                "%s needs agent.py beside master_server.py: copy it there" % flag
            )
    options.secret = read_secret(options.secret_file) if options.secret_file else None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(
        ValueError, OSError
    ):  # macOS says unlimited, and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    supervisor = Supervisor(options)
    with contextlib.ExitStack() as stack:
        listeners = {
            "collector": stack.enter_context(
                open_port("--", options.host, options.port, AGENT_PORT, moves)
            ),
            "dashboard": stack.enter_context(
                open_port(
                    "--dashboard-",
                    options.dashboard_host,
                    options.dashboard_port,
                    PAGE_PORT,
                    moves,
                )
            ),
        }
        options.port, options.dashboard_port = (
            listener.getsockname()[1] for listener in listeners.values()
        )
        options.shm_name = options.shm_name or "sentinel_%d" % options.port
        table = Table.create(options.shm_name, options.max_agents)
        stack.callback(table.unlink)
        # should this process be killed, the tracker may clean up behind it, but silently
        sys.warnoptions.append("ignore:resource_tracker")
        log.info("collector listening on %s", join_address(options.host, options.port))
        log.info(
            "dashboard listening on %s: open http://%s/%s - Ctrl-C stops",
            join_address(options.dashboard_host, options.dashboard_port),
            join_address(
                "localhost"
                if reachable(options.dashboard_host) in LOOPBACK
                else options.dashboard_host,
                options.dashboard_port,
            ),
            options.dashboard_token
            and "?" + urllib.parse.urlencode({"token": options.dashboard_token})
            or "",
        )
        if options.host not in LOOPBACK and not options.secret:
            log.warning(
                "anybody who reaches port %d can send samples: --secret-file keeps"
                " strangers out",
                options.port,
            )
        supervisor.run(listeners, table)
    log.info("stopped")
    return int(supervisor.has_failed)


if __name__ == "__main__":
    sys.exit(main())
