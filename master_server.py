#!/usr/bin/env python3
"""master_server.py - see every node of your Slurm jobs live, with an account and nothing else.

    agents --TCP--> collector --> shared-memory table --> dashboard --HTTP--> browser, curl
                        `-> alerts: log, --alert-command

Run it on the login node or on your laptop, start agent.py where there is work, and open the
address that it prints.  It needs Python 3.8 or newer and nothing more; it writes no file.
Three processes: this one supervises, the collector has one thread for each agent, and the
dashboard answers browsers.  Either of the two is started again when it dies.

Exit codes: 0 stopped by SIGINT or SIGTERM, 1 could not start, 2 bad usage.
"""
import argparse
import base64
import collections
import contextlib
import csv
import errno
import hashlib
import heapq
import hmac
import html
import io
import ipaddress
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import resource
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from multiprocessing import resource_tracker
try:
    from multiprocessing import shared_memory
except ImportError:                     # Python 3.6 and 3.7: main() says what is needed
    shared_memory = None  # type: ignore[assignment]

# ============================================================================
# Constants
# ============================================================================

VERSION = "1.0"
MAX_SAMPLE = 16384                      # bytes of one pickled sample
MAX_KEYS = 64                           # keys of a sample
MAX_TEXT = 255                          # UTF-8 bytes of a string
MAX_OPCODES = 8 * MAX_KEYS              # opcodes of a pickle
MAX_INTERVAL = 60.0                     # seconds between samples that an agent may announce
MAX_RATE = 100                          # samples a second from one agent, over RATE_WINDOW
RATE_WINDOW = 5.0                       # seconds
RECV_SIZE = 2048                        # bytes; a blocked read holds this much memory
STACK_SIZE = 128 * 1024                 # bytes of stack for each thread
BACKLOG = 4096                          # connections that may wait for accept()
SOURCE_SHARE = 7 / 8                    # of the slots, for one address other than loopback
MAX_WAITING = 1024                      # agents that have not sent a sample yet
REFUSAL_WINDOW = 10.0                   # seconds for which refusals of one source are counted
MAX_SOURCES = 256                       # sources whose refusals are counted apart
EVENTS = 128                            # events kept in the ring
GONE_SECONDS = 600.0                    # how long a node that left is remembered
LOCK_SECONDS = 2.0                      # to wait for the table's lock
READ_SECONDS = 2.0                      # to wait for a whole copy without the lock
BEAT_SECONDS = 0.5                      # between two heartbeats of the collector
STALE_SECONDS = 3.0                     # without a heartbeat: the collector has stopped
STOP_SECONDS = 3.0                      # from SIGTERM to SIGKILL of a role
MAX_BACKOFF = 2.0                       # seconds before a role is started again
EXIT_LOCK = 75                          # exit code of a role that could not get the lock
COMMAND_SECONDS = 30.0                  # for one run of --alert-command
GATHER_SECONDS = 1.0                    # quiet time that ends an alert storm
STORM_SECONDS = 5.0                     # the longest that an alert waits for others of its kind
STORM_SIZE = 4                          # more alerts of a kind are told by one command
MAX_ALERTS = 20000                      # alerts waiting for the command
HTTP_SECONDS = 5.0                      # for a whole request, and for its whole answer
MAX_CLIENTS = 128                       # HTTP connections at once
MAX_REQUEST_LINE = 4096                 # bytes
MAX_REQUEST = 16384                     # bytes of request line and headers
FRESH_SECONDS = 0.25                    # for which a copy of the table serves every request

LOOPBACK = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger("sentinel")

# ============================================================================
# Metrics: the one list.  Layout, JSON, CSV, Prometheus, text and page follow.
# ============================================================================

Metric = collections.namedtuple("Metric", "key code unit label prometheus help")

METRICS = (
    Metric("cpu", "f", "%", "CPU", "cpu_percent", "CPU time in use, all cores together"),
    Metric("ram", "f", "%", "RAM", "ram_percent", "Memory that is not available"),
    Metric("node", "64s", "", "Node", "", "Name of the monitored machine"),
    Metric("job", "24s", "", "Job", "", "Slurm job id"),
    Metric("job_name", "64s", "", "Job name", "", "Slurm job name"),
    Metric("user", "32s", "", "User", "", "User that runs the agent"),
    Metric("version", "16s", "", "Agent", "", "Version of the agent"),
    Metric("interval", "d", "s", "Interval", "interval_seconds", "Time between samples"),
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
    Metric("job_cpus", "d", "", "Job CPUs", "job_cpus", "CPUs allocated to the job here"),
    Metric("job_cpu", "d", "%", "Job CPU", "job_cpu_percent", "Allocated CPUs in use"),
    Metric("job_mem", "d", "B", "Job memory", "job_memory_bytes", "Anonymous and shared memory"),
    Metric("job_cache", "d", "B", "Job cache", "job_cache_bytes", "Page cache of the job"),
    Metric("job_mem_limit", "d", "B", "Job limit", "job_memory_limit_bytes", "Memory limit"),
    Metric("job_ram", "d", "%", "Job RAM", "job_ram_percent", "Job's memory limit in use"),
    Metric("job_time_left", "d", "s", "Time left", "job_time_left_seconds",
           "Time until the job's limit"),
    Metric("agent_cpu", "d", "%", "Agent CPU", "agent_cpu_percent", "The agent's own CPU"),
    Metric("agent_rss", "d", "B", "Agent memory", "agent_rss_bytes", "The agent's own memory"),
)
TEXTS = tuple(m.key for m in METRICS if m.code.endswith("s"))
NUMBERS = tuple(m.key for m in METRICS if not m.code.endswith("s"))
DETAILS = tuple(m for m in METRICS if m.code != "f")   # those that a slot does not hold
DETAIL_KEYS = tuple(m.key for m in DETAILS)

# ============================================================================
# Wire: bytes -> sample.  Bounded, one error type, and no unpickler.
# ============================================================================


class WireError(Exception):
    """What a peer sent is not a sample; the text says why, and is safe to send and to log."""


def read_number(code, size):
    """The reader of a fixed-size value: (buffer, position) -> (value, position behind it)."""
    unpack = struct.Struct(code).unpack_from

    def read(buf, pos):
        return unpack(buf, pos)[0], pos + size
    return read


def read_long(buf, pos):
    """LONG1: a length byte and that many bytes of a little-endian integer."""
    end = pos + 1 + buf[pos]
    if end - pos > 9:
        raise WireError("an integer of more than 64 bits")
    if end > len(buf):
        raise IndexError
    return int.from_bytes(buf[pos + 1:end], "little", signed=True), end


def read_text(code, size):
    """The reader of a string whose length has this many bytes."""
    unpack = struct.Struct(code).unpack_from

    def read(buf, pos):
        length, = unpack(buf, pos)
        if length > MAX_TEXT:
            raise WireError("a string of %d bytes; at most %d are allowed" % (length, MAX_TEXT))
        start, end = pos + size, pos + size + length
        if end > len(buf):
            raise IndexError
        try:
            return str(buf[start:end], "utf-8"), end
        except UnicodeDecodeError:
            raise WireError("a string that is not UTF-8") from None
    return read


# The opcodes of pickletools that a flat dict of None, bool, int, float and str needs.
PROTO, FRAME, EMPTY_DICT, MARK, SETITEM, SETITEMS, STOP = 0x80, 0x95, 0x7d, 0x28, 0x73, 0x75, 0x2e
VALUES = {
    0x4e: lambda buf, pos: (None, pos),                                     # NONE
    0x88: lambda buf, pos: (True, pos), 0x89: lambda buf, pos: (False, pos),
    0x4b: read_number("<B", 1), 0x4d: read_number("<H", 2),                 # BININT1, BININT2
    0x4a: read_number("<i", 4), 0x8a: read_long,                            # BININT, LONG1
    0x47: read_number(">d", 8),                                             # BINFLOAT
    0x8c: read_text("<B", 1), 0x58: read_text("<I", 4),                     # ..._BINUNICODE
}
MEMO_GET = {0x68: read_number("<B", 1), 0x6a: read_number("<I", 4)}         # BINGET, LONG_...
MEMO_PUT = {0x71: read_number("<B", 1), 0x72: read_number("<I", 4)}         # BINPUT, LONG_...
MEMOIZE = 0x94


def parse_pickle(buf, pos=0):
    """Read one pickled flat dict (protocols 2 to 5) from buf[pos:]: (dict, position behind it).

    None while it is incomplete; WireError as soon as it cannot become one.  Nothing is taken
    on trust: lengths are compared with the limits before memory is taken, and every opcode
    that builds anything but a flat dict is refused by name (pickletools lists them).
    """
    start = pos
    try:
        if buf[pos] != PROTO:
            raise WireError(foreign_reason(buf[pos:pos + 8]))
        if not 2 <= buf[pos + 1] <= 5:
            raise WireError("pickle protocol %d; 2 to 5 are allowed" % buf[pos + 1])
        sample, end = parse_opcodes(buf, pos + 2, start + MAX_SAMPLE)
    except (IndexError, struct.error):
        if len(buf) - start >= MAX_SAMPLE:
            raise WireError("a sample of more than %d bytes" % MAX_SAMPLE) from None
        return None
    if end - start > MAX_SAMPLE:
        raise WireError("a sample of more than %d bytes" % MAX_SAMPLE)
    return sample, end


def parse_opcodes(buf, pos, limit):
    """The opcodes of one pickle behind its PROTO; IndexError or struct.error: more is needed."""
    result, marked, items, memo = None, False, [], {}   # items: keys and values not yet set
    for _ in range(MAX_OPCODES):
        op = buf[pos]
        pos += 1
        if op in VALUES and result is not None:
            value, pos = VALUES[op](buf, pos)
            items.append(value)
        elif op == MEMOIZE:
            memo[len(memo)] = items[-1] if items else WireError
        elif op in MEMO_PUT:
            index, pos = MEMO_PUT[op](buf, pos)
            memo[index] = items[-1] if items else WireError
        elif op in MEMO_GET and result is not None:
            index, pos = MEMO_GET[op](buf, pos)
            if memo.get(index, WireError) is WireError:
                raise WireError("a sample that is no flat dict")
            items.append(memo[index])
        elif op == FRAME:
            length, = struct.unpack_from("<Q", buf, pos)
            pos += 8
            if length > limit - pos:
                raise WireError("a sample of more than %d bytes" % MAX_SAMPLE)
        elif op == EMPTY_DICT and result is None:
            result = {}
        elif op == MARK and result is not None and not marked and not items:
            marked = True
        elif op == SETITEMS and marked or op == SETITEM and not marked and len(items) == 2:
            set_items(result, items)
            marked, items = False, []
        elif op == STOP and result is not None and not items and not marked:
            return result, pos
        else:
            raise WireError("pickle opcode 0x%02x; a flat dict of None, bool, int, float and str"
                            " is allowed" % op)
    raise WireError("a sample of more than %d opcodes" % MAX_OPCODES)


def set_items(result, items):
    """Move [key, value, key, value ...] into the dict."""
    keys = items[::2]
    if len(items) % 2 or not all(type(key) is str for key in keys):
        raise WireError("keys that are not strings")
    result.update(zip(keys, items[1::2]))
    if len(result) > MAX_KEYS:
        raise WireError("more than %d keys" % MAX_KEYS)


def foreign_reason(head):
    """Why bytes that do not begin a pickle are refused."""
    if head[:1] in b"GHPOD" and head[1:3].isalpha():
        return "HTTP on the agents' port; the dashboard has a port of its own"
    if head[:2] == b"\x16\x03":
        return "TLS on the agents' port; agents send plain pickles"
    return "bytes that are no pickle of protocol 2 to 5"


def clean_text(text):
    """The text with every control or invisible character replaced."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def check_sample(raw):
    """The known keys of a decoded dict, as {key: float or clean str}; WireError without cpu, ram.

    An optional key of the wrong type is unknown and left out; so is one that nobody knows.
    """
    sample = {}
    for key in ("cpu", "ram"):
        value = raw.get(key)
        if type(value) not in (int, float) or not 0 <= value <= 100:
            raise WireError("%s must be a number from 0 to 100, not %s" % (
                key, ascii(value)[:40] if key in raw else "missing"))
    for key in NUMBERS:
        value = raw.get(key)
        if value is not None and type(value) in (int, float):
            if not math.isfinite(value):
                raise WireError("%s is not finite" % key)
            sample[key] = float(value)
    for key in TEXTS:
        value = raw.get(key)
        if value and type(value) is str:
            sample[key] = clean_text(value)
    return sample


# ============================================================================
# Table: the only room that knows offsets, the lock and the sequence number
# ============================================================================

SLOT = struct.Struct("i64sff")          # native, as the plan has it: 76 bytes, no padding
DETAIL = struct.Struct("=dd64s" + "".join(m.code for m in DETAILS))
EVENT = struct.Struct("=d12s64s24s32s64sff256s")
HEADER = struct.Struct("=8sIIqq")
SEQUENCE = struct.Struct("=Q")
COUNTS = struct.Struct("=QQdQ")
MAGIC = b"SENTINEL"
LAYOUT = 1
PAGE = 16384                            # the largest page of a common system, in bytes
EVENT_KEYS = ("time", "kind", "node", "job", "user", "address", "cpu", "ram", "text")


class TableError(Exception):
    """The shared memory cannot be had; the text says why and what to do."""


def start_time(pid):
    """When a process started, in clock ticks since boot (proc(5), stat field 22).

    0 where there is no /proc but the process lives, None when there is no such process.
    """
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return None if os.path.exists("/proc/self/stat") else 0


@contextlib.contextmanager
def untracked():
    """Keep the resource tracker out: it would unlink a live segment when a reader ends."""
    saved = resource_tracker.register, resource_tracker.unregister
    resource_tracker.register = resource_tracker.unregister = lambda name, kind: None
    try:
        yield
    finally:
        resource_tracker.register, resource_tracker.unregister = saved


class Snapshot:
    """A whole copy of the table at one instant.

    nodes: a dict for each used slot: slot, address, age, since, alerts and every metric;
    events: dicts, oldest first.  What is unknown is None.  beat: seconds since the collector
    last said that it is well.
    """

    def __init__(self, capacity, slots, details, ring, counts):
        now = time.monotonic()
        count, self.samples, beat, _ = counts
        self.time, self.capacity, self.beat = time.time(), capacity, now - beat
        self.nodes = [self._node(slot, detail, now) for slot, detail in
                      zip(SLOT.iter_unpack(slots), DETAIL.iter_unpack(details)) if slot[0]]
        rows = [EVENT.unpack_from(ring, n % EVENTS * EVENT.size)
                for n in range(max(0, count - EVENTS), count)]
        self.events = [dict(zip(EVENT_KEYS, map(known, row))) for row in rows]

    @staticmethod
    def _node(slot, detail, now):
        seen, since, alerts = detail[:3]
        node = {"slot": slot[0], "address": known(slot[1]),
                "cpu": round(slot[2], 2), "ram": round(slot[3], 2),
                "age": round(max(0.0, now - seen), 2), "since": since, "alerts": known(alerts)}
        node.update(zip(DETAIL_KEYS, map(known, detail[3:])))
        return node


def known(value):
    """A field's value as Python has it: empty text and NaN are None."""
    if type(value) is bytes:
        return value.rstrip(b"\0").decode("utf-8", "ignore") or None
    return value if value == value else None


class Table:
    """The shared memory; numbers in native byte order, text UTF-8 and NUL padded.

        offset 0    slots     capacity x SLOT     slot id (1-based, 0 = empty), address, cpu, ram
                    details   capacity x DETAIL   seen, since, alerts, then DETAILS in their order
                    events    EVENTS x EVENT      a ring: event n is in row n % EVENTS
        size - 72   HEADER    magic, layout, capacity, the master's pid and its start time
        size - 40   SEQUENCE  odd while a write is under way
        size - 32   COUNTS    events and samples so far, the collector's heartbeat, highest slot

    Times are time.time(), but seen and the heartbeat are time.monotonic(): a machine has one.
    Writers hold the lock.  A reader outside the process tree has none: it copies until the
    sequence number was even and had not changed (``snapshot`` does either).
    """

    def __init__(self, shm, lock=None):
        self.shm, self.buf, self.lock = shm, shm.buf, lock
        self.header = shm.size - HEADER.size - SEQUENCE.size - COUNTS.size
        self.sequence_at = self.header + HEADER.size
        self.counts_at = self.sequence_at + SEQUENCE.size
        if self.header < 0:
            raise TableError("shared memory %s is no master's" % shm.name)
        self.magic, self.layout, capacity, self.pid, self.start = \
            HEADER.unpack_from(self.buf, self.header)
        self._set_capacity(capacity)

    def _set_capacity(self, capacity):
        self.capacity = capacity
        self.details_at = capacity * SLOT.size
        self.events_at = self.details_at + capacity * DETAIL.size

    @classmethod
    def create(cls, name, capacity):
        """Make the segment; one whose owner is dead is replaced, one whose owner lives is not."""
        size = capacity * (SLOT.size + DETAIL.size) + EVENTS * EVENT.size
        size += HEADER.size + SEQUENCE.size + COUNTS.size
        size += -size % PAGE
        try:
            with untracked():
                try:
                    shm = shared_memory.SharedMemory(name, create=True, size=size)
                except FileExistsError:
                    cls._discard(name)
                    shm = shared_memory.SharedMemory(name, create=True, size=size)
            table = cls(shm)
        except (OSError, ValueError) as error:
            raise TableError("no shared memory %s: %s; give another --port or --shm-name"
                             % (name, error.args[-1])) from None
        try:
            # tmpfs promises space that it may not have: a write would then end in SIGBUS
            getattr(os, "posix_fallocate", lambda *args: None)(shm._fd, 0, size)
        except OSError as error:
            table.unlink()
            raise TableError("no room for %d bytes of shared memory: %s; free some of /dev/shm or"
                             " lower --max-agents" % (size, error.strerror)) from None
        HEADER.pack_into(shm.buf, table.header, MAGIC, LAYOUT, capacity, os.getpid(),
                         start_time(os.getpid()))
        table._set_capacity(capacity)
        return table

    @classmethod
    def attach(cls, name, lock=None):
        """Open a live master's segment; TableError when there is none or its master is gone."""
        try:
            with untracked():
                table = cls(shared_memory.SharedMemory(name), lock)
        except FileNotFoundError:
            raise TableError("no shared memory %s: no master is running there" % name) from None
        except (OSError, ValueError) as error:
            raise TableError("no shared memory %s: %s" % (name, error.args[-1])) from None
        if (table.magic, table.layout) != (MAGIC, LAYOUT):
            raise TableError("shared memory %s is of no master of this version" % name)
        if not table.owner_lives():
            raise TableError("the master that made shared memory %s (pid %d) is gone"
                             % (name, table.pid))
        return table

    def owner_lives(self):
        """Whether the master that made the segment still runs."""
        return self.magic == MAGIC and start_time(self.pid) == self.start

    @classmethod
    def _discard(cls, name):
        """Remove what a killed master left behind; TableError when it is somebody's."""
        old = cls(shared_memory.SharedMemory(name))
        try:
            if old.owner_lives():
                raise TableError("the master with pid %d uses shared memory %s; stop it, or give"
                                 " another --port or --shm-name" % (old.pid, name))
            if old.magic not in (MAGIC, bytes(len(MAGIC))):
                raise TableError("shared memory %s is no master's; give another --shm-name" % name)
            old.shm.unlink()
        finally:
            old.close()

    def close(self):
        """Let go of the mapping; the segment stays."""
        self.buf = None
        self.shm.close()

    def unlink(self):
        """Remove the segment: for its creator alone."""
        self.close()
        with untracked(), contextlib.suppress(FileNotFoundError):
            self.shm.unlink()

    def reset(self):
        """Empty the slots and mend the sequence number: for who knows that nobody else writes."""
        self.buf[:self.details_at] = bytes(self.details_at)
        sequence, = SEQUENCE.unpack_from(self.buf, self.sequence_at)
        SEQUENCE.pack_into(self.buf, self.sequence_at, sequence + sequence % 2)
        events, samples, beat, _ = COUNTS.unpack_from(self.buf, self.counts_at)
        COUNTS.pack_into(self.buf, self.counts_at, events, samples, beat, 0)

    @contextlib.contextmanager
    def locked(self):
        """Hold the lock; a role that cannot have it in time ends (its holder was killed)."""
        if not self.lock.acquire(True, LOCK_SECONDS):
            log.error("the table's lock is stuck: its holder was killed or stopped")
            os._exit(EXIT_LOCK)
        try:
            yield
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def writing(self):
        """Hold the lock and keep the sequence number odd."""
        with self.locked():
            sequence, = SEQUENCE.unpack_from(self.buf, self.sequence_at)
            SEQUENCE.pack_into(self.buf, self.sequence_at, sequence + 1)
            try:
                yield
            finally:
                SEQUENCE.pack_into(self.buf, self.sequence_at, sequence + 2)

    def write(self, index, address, sample, since, alerts):
        """Put a sample into a slot; address is text, since is time.time() of the connection."""
        slot = (index + 1, address.encode(), sample["cpu"], sample["ram"])
        detail = [time.monotonic(), since, alerts.encode()]
        for metric in DETAILS:
            value = sample.get(metric.key)
            if metric.code == "d":
                detail.append(math.nan if value is None else value)
            else:
                detail.append(value.encode("utf-8", "replace") if value else b"")
        with self.writing():
            SLOT.pack_into(self.buf, index * SLOT.size, *slot)
            DETAIL.pack_into(self.buf, self.details_at + index * DETAIL.size, *detail)

    def clear(self, index):
        """Empty a slot."""
        with self.writing():
            SLOT.pack_into(self.buf, index * SLOT.size, 0, b"", 0.0, 0.0)

    def beat(self, samples, highest):
        """Note that the collector is well: samples so far, slots in use are below highest."""
        with self.writing():
            events, _, _, _ = COUNTS.unpack_from(self.buf, self.counts_at)
            COUNTS.pack_into(self.buf, self.counts_at, events, samples, time.monotonic(), highest)

    def add_event(self, kind, text, sample=None, address=""):
        """Append to the ring; sample, if any, is the node's last one."""
        sample = sample or {}
        names = [(sample.get(key) or "").encode() for key in ("node", "job", "user")]
        row = [time.time(), kind.encode()] + names + [
            address.encode(), sample.get("cpu", math.nan), sample.get("ram", math.nan),
            text.encode()]
        with self.writing():
            events, samples, beat, highest = COUNTS.unpack_from(self.buf, self.counts_at)
            EVENT.pack_into(self.buf, self.events_at + events % EVENTS * EVENT.size, *row)
            COUNTS.pack_into(self.buf, self.counts_at, events + 1, samples, beat, highest)

    def snapshot(self):
        """A Snapshot: copied under the lock, or without it until the copy is whole."""
        if self.lock:
            with self.locked():
                copy = self._copy()
            return Snapshot(self.capacity, *copy)
        deadline = time.monotonic() + READ_SECONDS
        while time.monotonic() < deadline:
            before = bytes(self.buf[self.sequence_at:self.counts_at])
            copy = self._copy()
            if before[0] % 2 == 0 and before == self.buf[self.sequence_at:self.counts_at]:
                return Snapshot(self.capacity, *copy)
            time.sleep(0.001)
        raise TableError("no whole copy of the table in %g s: a write never ended" % READ_SECONDS)

    def _copy(self):
        counts = COUNTS.unpack_from(self.buf, self.counts_at)
        end = self.details_at + counts[3] * DETAIL.size
        return (bytes(self.buf[:counts[3] * SLOT.size]), bytes(self.buf[self.details_at:end]),
                bytes(self.buf[self.events_at:self.events_at + EVENTS * EVENT.size]), counts)


# ============================================================================
# Alerts: rules -> firing and resolved, pure; and the runner of the command
# ============================================================================

RULE = re.compile(r"\s*([a-z_0-9]+)\s*([<>])\s*(\d+(?:\.\d+)?)\s*(?:for\s+(\d+(?:\.\d+)?)\s*s?)?\s*")
DEFAULT_RULES = ("cpu>90", "job_ram>90", "job_time_left<600")


class Rule(collections.namedtuple("Rule", "metric op threshold seconds")):
    """A condition on a metric that must hold for some seconds, e.g. 'ram>95 for 30'."""
    __slots__ = ()

    def crossed(self, value):
        """Whether the value is past the threshold."""
        return value > self.threshold if self.op == ">" else value < self.threshold

    def is_back(self, value):
        """Whether the value is back by 5 points (percents) or 5 % (anything else)."""
        margin = 5.0 if self.metric in PERCENTS else self.threshold * 0.05
        if self.op == ">":
            return value <= max(self.threshold - margin, 0)
        return value >= self.threshold + margin

    def __str__(self):
        wait = " for %g" % self.seconds if self.seconds else ""
        return "%s%s%g%s" % (self.metric, self.op, self.threshold, wait)


PERCENTS = tuple(m.key for m in METRICS if m.unit == "%")


def parse_rule(text):
    """'cpu>90', 'ram>95 for 30', 'lost' or 'no-lost' -> Rule or the word; ValueError."""
    if text in ("lost", "no-lost"):
        return text
    match = RULE.fullmatch(text)
    if not match:
        raise ValueError("%r is no rule; write METRIC>NUMBER or METRIC<NUMBER, with ' for SECONDS'"
                         " behind it if you like, lost or no-lost" % text)
    metric, op, threshold, seconds = match.groups()
    if metric not in NUMBERS:
        raise ValueError("%r in %r is no metric; there are %s" % (metric, text, ", ".join(NUMBERS)))
    return Rule(metric, op, float(threshold), float(seconds or 0))


def judge(rules, state, sample, now):
    """What a sample changes: a list of ("alert" or "resolved", rule, value).

    state belongs to one node: {rule: time it was crossed, or None from when it fires}.
    """
    changes = []
    for rule in rules:
        value = sample.get(rule.metric)
        if value is None:
            continue
        if rule.crossed(value):
            since = state.setdefault(rule, now)
            if since is not None and now - since >= rule.seconds:
                state[rule] = None
                changes.append(("alert", rule, value))
        elif rule in state and (state[rule] is not None or rule.is_back(value)):
            if state.pop(rule) is None:
                changes.append(("resolved", rule, value))
    return changes


Alert = collections.namedtuple("Alert", "event node job metric value threshold")


class CommandRunner:
    """Runs --alert-command on a thread of its own: one run at a time, storms told once."""

    def __init__(self, command):
        self.command = command
        self.alerts = queue.Queue(MAX_ALERTS)
        self.thread = threading.Thread(target=self.run, name="alert command", daemon=True)
        self.thread.start()

    def post(self, alert):
        """Have the command told; never blocks."""
        with contextlib.suppress(queue.Full):
            self.alerts.put_nowait(alert)

    def run(self):
        """Tell what is posted, for ever."""
        while True:
            for group in self.gather():
                try:
                    self.call(group)
                except OSError as error:
                    log.error("alert command failed: %s", error)

    def gather(self):
        """Wait for alerts: lists that one run each should tell."""
        batch, deadline = [self.alerts.get()], time.monotonic() + STORM_SECONDS
        quiet = GATHER_SECONDS / 4
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                batch.append(self.alerts.get(timeout=quiet))
                quiet = GATHER_SECONDS if len(batch) > STORM_SIZE else quiet
        groups = collections.OrderedDict()
        for alert in batch:
            groups.setdefault((alert.event, alert.metric, alert.threshold), []).append(alert)
        return [part for group in groups.values() for part in
                ([group] if len(group) > STORM_SIZE else [[alert] for alert in group])]

    def call(self, group):
        """Run the command for alerts of one kind; kill it, with all that it started, at its limit.

        The facts are in the environment and never in the command's text.
        """
        facts = dict(group[0]._asdict(), count=len(group))
        for key in ("node", "job"):
            names = list(collections.OrderedDict((getattr(alert, key), None) for alert in group))
            facts[key] = " ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        env = dict(os.environ, **{"SENTINEL_" + key.upper(): str(value)
                                  for key, value in facts.items()})
        process = subprocess.Popen(self.command, shell=True, env=env, stdin=subprocess.DEVNULL,
                                   stdout=sys.stderr.fileno(), start_new_session=True)
        try:
            code = process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.error("alert command failed: killed after %g s", COMMAND_SECONDS)
        else:
            if code:
                log.error("alert command failed: exit code %d", code)


# ============================================================================
# Collector: sockets -> wire -> table, alerts
# ============================================================================


def format_address(address):
    """A peer's (host, port, ...) as the address tuple that slots hold; IPv4 stays IPv4."""
    host = address[0].partition("%")[0]
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    return "('%s', %d)" % (host, address[1])


def source_of(address):
    """The address whose connections are counted together: an IPv4 host or an IPv6 /64."""
    host = ipaddress.ip_address(address[0].partition("%")[0])
    host = getattr(host, "ipv4_mapped", None) or host
    if host.version == 6 and not host.is_loopback:
        return str(ipaddress.ip_network((host, 64), strict=False))
    return str(host)


class Silence(Exception):
    """No whole sample came in time."""


class Waiting:
    """Sockets that have not yet said what they want: bounded, so that idle ones lock nobody out.

    When one is too many, the oldest of the busiest source is shut down, and its thread sees it.
    """

    def __init__(self, limit):
        self.limit, self.lock, self.sources, self.count = limit, threading.Lock(), {}, 0

    def add(self, source, sock):
        """Take a socket in."""
        with self.lock:
            victim = None
            if self.count >= self.limit:
                busiest = max(self.sources, key=lambda key: len(self.sources[key]))
                victim = next(iter(self.sources[busiest]))
                self._drop(busiest, victim)
            self.sources.setdefault(source, collections.OrderedDict())[sock] = None
            self.count += 1
        if victim:
            with contextlib.suppress(OSError):
                victim.shutdown(socket.SHUT_RDWR)

    def remove(self, source, sock):
        """Let go of a socket, if it is here."""
        with self.lock:
            self._drop(source, sock)

    def _drop(self, source, sock):
        if sock in self.sources.get(source, ()):
            del self.sources[source][sock]
            self.count -= 1
            if not self.sources[source]:
                del self.sources[source]


class Refusals:
    """Tells refusals so that a flood pushes nothing useful out: one a source and 10 s."""

    def __init__(self, tell):
        self.tell, self.lock, self.sources = tell, threading.Lock(), {}

    def add(self, source, reason):
        """Count a refusal; the first of a source is told at once."""
        with self.lock:
            if source not in self.sources and len(self.sources) >= MAX_SOURCES:
                source = "other addresses"
            if source in self.sources:
                entry = self.sources[source]
                entry[1:] = [entry[1] + 1, reason]
                return
            self.sources[source] = [time.monotonic(), 0, reason]
        self.tell(source, reason)

    def flush(self):
        """Tell what was counted in windows that are over."""
        now = time.monotonic()
        with self.lock:
            over = {source: entry for source, entry in self.sources.items()
                    if now - entry[0] >= REFUSAL_WINDOW}
            for source, (_, count, reason) in over.items():
                if count:
                    self.sources[source] = [now, 0, reason]
                else:
                    del self.sources[source]
        for source, (_, count, reason) in over.items():
            if count:
                self.tell(source, "%s (%d refused in %g s)" % (reason, count, REFUSAL_WINDOW))


class Peer:
    """One agent's connection, for its thread."""
    __slots__ = ("sock", "address", "source", "timeout", "limit", "slot", "sample", "since",
                 "state", "alerts", "said")

    def __init__(self, sock, address, timeout):
        self.sock, self.address = sock, format_address(address)
        self.source, self.timeout, self.limit = source_of(address), timeout, None
        self.slot, self.sample, self.since = None, None, time.time()
        self.state, self.alerts, self.said = {}, "", 0

    @property
    def name(self):
        """What to call the node: its name, or its address."""
        return (self.sample or {}).get("node") or self.address

    def __str__(self):
        job = (self.sample or {}).get("job")
        return "%s (job %s)" % (self.name, job) if job else self.name

    def say(self, line):
        """Write a line if there is room for it; a peer that never reads is served all the same."""
        with contextlib.suppress(OSError):
            self.sock.send(line.encode() + b"\n", socket.MSG_DONTWAIT)

    def recv(self, seconds):
        """Up to RECV_SIZE bytes, b"" at the end; Silence after so many seconds."""
        if seconds != self.limit:       # in the kernel: a timeout of Python's adds a poll a read
            micros = max(1000, int(seconds * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                 struct.pack("ll", micros // 1000000, micros % 1000000))
            self.limit = seconds
        try:
            return self.sock.recv(RECV_SIZE)
        except BlockingIOError:
            raise Silence from None

    def messages(self):
        """The dicts that the peer sends, each within the deadline after the one before."""
        buf, due, count, window = b"", None, 0, time.monotonic()
        while True:
            left = due - time.monotonic() if buf else self.timeout
            chunk = self.recv(left) if left > 0 else None
            if chunk is None:
                raise Silence
            if not chunk:
                if buf:
                    raise ConnectionError("closed in the middle of a sample")
                return
            now = time.monotonic()
            if not buf:
                due = now + self.timeout
            buf += chunk
            while buf:
                message = parse_pickle(buf)
                if message is None:
                    break
                buf, due = buf[message[1]:], now + self.timeout
                count += 1
                if count > MAX_RATE * RATE_WINDOW:
                    raise WireError("more than %d samples a second" % MAX_RATE)
                yield message[0]
            if now - window > RATE_WINDOW:
                count, window = 0, now


class Collector:
    """The role that listens to agents: a thread for each of them."""

    def __init__(self, listener, table, options):
        self.listener, self.table, self.options = listener, table, options
        self.secret = options.secret
        self.lock = threading.Lock()        # of free, slots and gone
        self.free = list(range(table.capacity))
        self.slots = collections.Counter()  # slots in use by source
        self.gone = {}                      # (node, job) -> time.monotonic() when it was lost
        self.samples, self.highest = 0, 0
        self.waiting = Waiting(MAX_WAITING)
        self.refusals = Refusals(self.tell_refusal)
        self.runner = CommandRunner(options.alert_command) if options.alert_command else None

    def run(self):
        """Accept agents until the supervisor is gone."""
        with self.table.locked():
            self.table.reset()
        accept_loop(self.listener, self.start, self.beat)

    def beat(self):
        """Say that this role is well, and do what is due now and then."""
        self.table.beat(self.samples, self.highest)
        self.refusals.flush()
        now = time.monotonic()
        with self.lock:
            for key in [key for key, when in self.gone.items() if now - when > GONE_SECONDS]:
                del self.gone[key]

    def start(self, sock, address):
        """Give a new connection its thread."""
        try:
            peer = Peer(sock, address, self.options.timeout)
            self.waiting.add(peer.source, sock)
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()
        except RuntimeError:
            peer.say("error the master has no more threads")
            self.refusals.add(peer.source, "no more threads (ulimit -u)")
            self.waiting.remove(peer.source, sock)
            sock.close()

    def serve(self, peer):
        """Everything between a connection's begin and its end."""
        kind, text = "lost", ""
        try:
            kind, text = self.converse(peer)
        except Silence:
            text = "no sample for %g s" % peer.timeout
            peer.say("error " + text)
        except WireError as error:
            kind, text = "refused", str(error)
            peer.say("error " + text)
            self.refusals.add(peer.source, text)
        except OSError as error:
            text = "the connection broke: %s" % (error.strerror or error)
        except Exception:
            log.exception("a defect, met while serving %s", peer.address)
        finally:
            self.waiting.remove(peer.source, peer.sock)
            if peer.slot is not None:
                self.leave(peer, kind, text)
            elif kind == "lost" and text.startswith("no sample"):
                self.refusals.add(peer.source, text)
            peer.sock.close()

    def converse(self, peer):
        """Take samples until the peer says goodbye or closes: how it ended, (kind, text)."""
        nonce = secrets.token_hex(16) if self.secret else None
        if nonce:
            peer.say("challenge " + nonce)
        for message in peer.messages():
            if nonce:
                check_auth(message, self.secret, nonce)
                nonce = None
            elif type(message.get("bye")) is str:
                report = message.get("report")
                parts = [message["bye"]] + ([report] if type(report) is str else [])
                return "finished", clean_text("; ".join(parts))
            else:
                self.take(peer, message)
        if peer.sample and peer.sample.get("version"):
            return "lost", "closed without a goodbye"
        return "finished", "closed"

    def take(self, peer, message):
        """Put a sample into the table, answer it and see what it means."""
        sample = peer.sample = check_sample(message)
        self.samples += 1
        if peer.slot is None:
            self.enter(peer)
        changes = judge(self.options.rules, peer.state, sample, time.monotonic())
        if changes:
            firing = [rule for rule, since in peer.state.items() if since is None]
            peer.alerts = " ".join(str(rule).replace(" ", "_") for rule in firing)
        self.table.write(peer.slot, peer.address, sample, peer.since, peer.alerts)
        if message.get("ack"):
            peer.say("ok")
        if peer.said == 0:
            self.welcome(peer)
        for kind, rule, value in changes:
            self.tell(kind, peer, "%s is %g (%s)" % (rule.metric, value, rule), rule, value)
        log.debug("%s sent %s", peer.address, message)

    def enter(self, peer):
        """Give the peer a slot; WireError when there is none for it."""
        peer.timeout = max(peer.timeout, 2.5 * min(peer.sample.get("interval", 0), MAX_INTERVAL))
        with self.lock:
            if not self.free:
                raise WireError("master is full (%d agents)" % self.table.capacity)
            if (peer.source not in LOOPBACK
                    and self.slots[peer.source] >= max(1, self.table.capacity * SOURCE_SHARE)):
                raise WireError("master has too many agents of %s" % peer.source)
            peer.slot = heapq.heappop(self.free)
            self.slots[peer.source] += 1
            self.highest = max(self.highest, peer.slot + 1)
        self.waiting.remove(peer.source, peer.sock)

    def welcome(self, peer):
        """Tell that a node is there, or that one which was lost is back."""
        peer.said = 1
        self.table.beat(self.samples, self.highest)
        self.tell("connected", peer, "from %s" % peer.address)
        with self.lock:
            lost = self.gone.pop((peer.name, peer.sample.get("job")), None)
        if lost is not None:
            self.tell("resolved", peer, "lost: back after %.0f s" % (time.monotonic() - lost))

    def leave(self, peer, kind, text):
        """Free the peer's slot and tell how it ended."""
        self.table.clear(peer.slot)
        with self.lock:
            heapq.heappush(self.free, peer.slot)
            self.slots[peer.source] -= 1
            if not self.slots[peer.source]:
                del self.slots[peer.source]
            if kind == "lost" and self.options.lost:
                self.gone[(peer.name, peer.sample.get("job"))] = time.monotonic()
        for rule in [rule for rule, since in peer.state.items() if since is None]:
            self.tell("resolved", peer, "%s: the node left" % str(rule))
        if kind != "refused":
            self.tell(kind, peer, text)

    def tell(self, kind, peer, text, rule=None, value=""):
        """One event: ring, log and, if it is an alert, the command."""
        self.table.add_event(kind, text, peer.sample, peer.address)
        if kind == "alert" or kind == "lost" and self.options.lost:
            bell = "\a" if sys.stderr.isatty() else ""
            log.critical("CRITICAL WARNING: %s %s: %s%s", kind, peer, text, bell)
            if self.runner:
                self.runner.post(Alert(kind, peer.name, peer.sample.get("job") or "",
                                       rule.metric if rule else "lost", value,
                                       rule.threshold if rule else ""))
        else:
            log.info("%s %s: %s", kind, peer, text)

    def tell_refusal(self, source, reason):
        """One event for refusals of a source."""
        log.warning("refused %s: %s", source, reason)
        self.table.add_event("refused", reason, {"node": source})


def check_auth(message, secret, nonce):
    """WireError unless the message is {"auth": HMAC-SHA256 of the nonce, in hex}."""
    answer = message.get("auth")
    if type(answer) is not str:
        raise WireError("a secret is required: start the agent with --secret-file")
    right = hmac.new(secret, nonce.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(right.encode(), answer.encode("utf-8", "replace")):
        raise WireError("wrong secret: give master and agent the same --secret-file")


def accept_loop(listener, start, beat=None):
    """Hand each new connection to start(socket, address); ends with the supervisor.

    Out of descriptors is told once, and waited for.
    """
    listener.setblocking(False)
    parent = multiprocessing.parent_process()
    short = False
    while parent.is_alive():
        if beat:
            beat()
        multiprocessing.connection.wait([listener, parent.sentinel], BEAT_SECONDS)
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            for _ in range(BACKLOG):
                try:
                    sock, address = listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                        raise
                    if not short:
                        log.error("no new connections for now: %s (ulimit -n)", error.strerror)
                    short = True
                    time.sleep(BEAT_SECONDS)
                    break
                short = False
                sock.setblocking(True)
                start(sock, address)


# ============================================================================
# Pages: a snapshot -> HTML, JSON, CSV, text, metrics.  The only room that knows HTML.
# ============================================================================

COLUMNS = ("slot", "address", "node", "job", "user", "cpu", "ram", "age")
LABELS = dict({m.key: m.label for m in METRICS}, slot="Slot", address="Address", age="Age")
UNITS = dict({m.key: m.unit for m in METRICS}, age="s")
STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #8884; }
.n { text-align: right; font-variant-numeric: tabular-nums; } .warn { color: #c22; }
"""
PAGE_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>%(title)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>%(style)s</style>
<noscript><meta http-equiv="refresh" content="2"></noscript></head>
<body><main>%(body)s</main></body></html>
"""


def style_hash():
    """The Content-Security-Policy source that allows STYLE and nothing else."""
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()


def render_value(key, value):
    """A metric's value for people, with its unit."""
    if value is None:
        return "-"
    unit = UNITS.get(key, "")
    if unit == "%":
        return "%.1f %%" % value
    if unit in ("B", "B/s"):
        power = min(4, max(0, int(math.log(max(value, 1), 1024))))
        return "%.1f %s" % (value / 1024 ** power, ("", "Ki", "Mi", "Gi", "Ti")[power] + unit)
    if unit == "s":
        return "%.1f s" % value
    return "%g" % value if isinstance(value, float) else str(value)


def render_table(caption, keys, rows):
    """An HTML table; keys name the columns."""
    numeric = {key: ' class="n"' if key in NUMBERS or key in ("slot", "age") else ""
               for key in keys}
    head = "".join('<th scope="col"%s>%s</th>' % (numeric[key], html.escape(
        LABELS.get(key, key.capitalize()))) for key in keys)
    body = "\n".join("<tr>%s</tr>" % "".join(
        "<td%s>%s</td>" % (numeric[key], html.escape(render_value(key, row.get(key))))
        for key in keys) for row in rows)
    return ("<table><caption>%s</caption><thead><tr>%s</tr></thead><tbody>\n%s\n</tbody></table>"
            % (html.escape(caption), head, body))


def render_page(view, query):
    """The page: every live node, and what happened."""
    nodes, events = view.nodes, view.events[::-1]
    notice = "" if view.beat < STALE_SECONDS else (
        '<p class="warn">The collector has not answered for %.0f s: these numbers are old.</p>'
        % view.beat)
    rows = [dict(event, time=time.strftime("%H:%M:%S", time.localtime(event["time"])))
            for event in events]
    body = "<h1>Cluster Sentinel</h1>%s%s%s" % (
        notice, render_table("%d nodes" % len(nodes), COLUMNS, nodes),
        render_table("Events", ("time", "kind", "node", "text"), rows))
    return PAGE_HTML % {"title": "%d nodes" % len(nodes), "style": STYLE, "body": body}


def render_nodes_json(view, query):
    """The live table as JSON."""
    return json.dumps({"time": round(view.time, 3), "capacity": view.capacity,
                       "nodes": view.nodes}, ensure_ascii=False, allow_nan=False) + "\n"


def render_nodes_text(view, query):
    """The live table as aligned text."""
    rows = [[LABELS[key] for key in COLUMNS]] + [
        [render_value(key, node[key]) for key in COLUMNS] for node in view.nodes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "".join("  ".join(
        cell.rjust(width) if key in ("slot", "cpu", "ram", "age") else cell.ljust(width)
        for key, cell, width in zip(COLUMNS, row, widths)).rstrip() + "\n" for row in rows)


def render_events_json(view, query):
    """The ring of events as JSON, oldest first."""
    return json.dumps({"events": view.events}, ensure_ascii=False, allow_nan=False) + "\n"


def render_health(view, query):
    """One word: this is only called while all is well."""
    return "ok\n"


HTML, JSON, TEXT = ("text/html; charset=utf-8", "application/json; charset=utf-8",
                    "text/plain; charset=utf-8")
ROUTES = {"/": (HTML, render_page), "/api/nodes": (JSON, render_nodes_json),
          "/api/events": (JSON, render_events_json), "/healthz": (TEXT, render_health)}

# ============================================================================
# Dashboard: sockets -> request -> pages
# ============================================================================

Request = collections.namedtuple("Request", "method path query headers")
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
           405: "Method Not Allowed", 408: "Request Timeout", 414: "URI Too Long",
           421: "Misdirected Request", 431: "Request Header Fields Too Large",
           500: "Internal Server Error", 503: "Service Unavailable",
           505: "HTTP Version Not Supported"}


class HTTPError(Exception):
    """A request that gets another answer than a page."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def parse_request(head):
    """The bytes of a request line and headers -> Request; HTTPError (RFC 9112)."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not re.fullmatch(r"HTTP/\d\.\d", words[2]):
        raise HTTPError(400, "the request line must be: GET /path HTTP/1.1")
    if not words[2].startswith("HTTP/1."):
        raise HTTPError(505, "HTTP/1.0 or HTTP/1.1, please")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise HTTPError(400, "a header must be: Name: value")
        headers[name.lower()] = value.strip()
    if words[0] not in ("GET", "HEAD"):
        raise HTTPError(405, "only GET and HEAD: this server is read-only")
    target = urllib.parse.urlsplit(words[1])
    if not target.path.startswith("/"):
        raise HTTPError(400, "the path must begin with /")
    query = dict(urllib.parse.parse_qsl(target.query, max_num_fields=16))
    return Request(words[0], urllib.parse.unquote(target.path), query, headers)


class Dashboard:
    """The role that answers browsers: a thread for each connection, one request each."""

    def __init__(self, listener, table, options):
        self.listener, self.table, self.options = listener, table, options
        self.lock = threading.Lock()        # of view
        self.view, self.viewed = None, -math.inf
        self.waiting = Waiting(MAX_CLIENTS)
        self.port = listener.getsockname()[1]

    def run(self):
        """Answer until the supervisor is gone."""
        accept_loop(self.listener, self.start)

    def start(self, sock, address):
        """Give a new connection its thread."""
        source = source_of(address)
        self.waiting.add(source, sock)
        try:
            threading.Thread(target=self.serve, args=(sock, source), daemon=True).start()
        except RuntimeError:
            log.error("no more threads (ulimit -u)")
            self.waiting.remove(source, sock)
            sock.close()

    def serve(self, sock, source):
        """Read one request, answer it, close."""
        method, status, headers = "GET", 200, {}
        try:
            try:
                request = parse_request(self.read_head(sock))
                method = request.method
                content_type, text, headers = self.answer(request)
            except HTTPError as error:
                status, content_type, text = error.status, TEXT, "%s\n" % error
                if status == 405:
                    headers = {"Allow": "GET, HEAD"}
            self.send(sock, status, content_type, text, headers, method)
        except OSError:
            pass                            # the client went away; there is nobody to tell
        except Exception:
            log.exception("a defect, met while answering %s", source)
        finally:
            self.waiting.remove(source, sock)
            sock.close()

    @staticmethod
    def read_head(sock):
        """The bytes of request line and headers, bounded in size and time; HTTPError."""
        deadline, data = time.monotonic() + HTTP_SECONDS, b""
        while b"\r\n\r\n" not in data:
            line = data.partition(b"\r\n")[0]
            if len(line) > MAX_REQUEST_LINE:
                raise HTTPError(414, "a request line of more than %d bytes" % MAX_REQUEST_LINE)
            if len(data) > MAX_REQUEST:
                raise HTTPError(431, "headers of more than %d bytes" % MAX_REQUEST)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                chunk = sock.recv(RECV_SIZE)
            except socket.timeout:
                raise HTTPError(408, "no whole request in %g s" % HTTP_SECONDS) from None
            if not chunk:
                raise ConnectionError
            data += chunk
        return data.partition(b"\r\n\r\n")[0]

    def answer(self, request):
        """A request's content type, text and further headers; HTTPError."""
        view = self.fresh_view()
        route = ROUTES.get(request.path)
        if not route:
            raise HTTPError(404, "no such page; there are " + " ".join(ROUTES))
        if request.path == "/healthz" and view.beat > STALE_SECONDS:
            raise HTTPError(503, "the collector has not answered for %.0f s" % view.beat)
        return route[0], route[1](view, request.query), {}

    def fresh_view(self):
        """A snapshot, taken at most once in FRESH_SECONDS, whoever asks."""
        with self.lock:
            if time.monotonic() - self.viewed > FRESH_SECONDS:
                self.view, self.viewed = self.table.snapshot(), time.monotonic()
            return self.view

    @staticmethod
    def send(sock, status, content_type, text, headers, method):
        """Write the whole answer within its deadline."""
        body = text.encode("utf-8", "replace")
        fields = {
            "Content-Type": content_type, "Content-Length": len(body), "Connection": "close",
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; img-src data:; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; style-src "
            + style_hash()}
        fields.update(headers)
        head = "HTTP/1.1 %d %s\r\n%s\r\n" % (status, REASONS[status], "".join(
            "%s: %s\r\n" % field for field in fields.items()))
        sock.settimeout(HTTP_SECONDS)
        sock.sendall(head.encode("latin-1") + (b"" if method == "HEAD" else body))
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # unread input would turn the close into a reset
            sock.settimeout(1.0)
            while sock.recv(RECV_SIZE):
                pass


# ============================================================================
# Supervisor: processes and signals
# ============================================================================


class UsageError(Exception):
    """A flag's value cannot be used; the text names the flag and what is allowed."""


class StartError(Exception):
    """The master cannot start; the text says why and what to do."""


def setup_log(verbose):
    """Log to stderr, one line a message."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr,
                        level=logging.DEBUG if verbose else logging.INFO)


def open_listener(flag, host, port):
    """A listening socket; UsageError or StartError when it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UsageError("argument %shost: %r is no name or address of this machine; try 127.0.0.1"
                         " (only here) or 0.0.0.0 (everybody)" % (flag, host)) from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise StartError("cannot listen on %s:%d: %s; give another %shost or %sport" % (
            host, port, error.strerror, flag, flag)) from None


def run_role(name, listener, lock, options):
    """The body of a child process: set it up and run the role for as long as it goes."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the supervisor as well
    signal.signal(signal.SIGTERM, signal.SIG_DFL)   # nothing is lost with a role
    setup_log(options.verbose)
    threading.stack_size(STACK_SIZE)
    role = {"collector": Collector, "dashboard": Dashboard}[name]
    role(listener, Table.attach(options.shm_name, lock), options).run()


class Supervisor:
    """Starts the roles, starts again what dies, and stops all on SIGINT or SIGTERM.

    --with-agent adds agent.py, a program of its own: its stdout is a pipe, which ends with it,
    and which tells it when the supervisor has ended.
    """

    def __init__(self, listeners, table, options):
        self.listeners, self.table, self.options = listeners, table, options
        self.names = list(listeners) + ["agent"] * options.with_agent
        self.lock, self.running, self.signals = None, {}, []
        self.started = dict.fromkeys(self.names, 0.0)
        self.delay = dict.fromkeys(self.names, 0.0)
        self.wakeup, self.wakeup_end = os.pipe()

    def run(self):
        """Supervise until a signal comes."""
        os.set_blocking(self.wakeup_end, False)
        signal.set_wakeup_fd(self.wakeup_end)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        self.new_lock()
        try:
            while not self.signals:
                self.start_missing()
                waits = [self.delay[name] for name in self.names if name not in self.running]
                multiprocessing.connection.wait(
                    [self.wakeup] + [sentinel for _, sentinel in self.running.values()],
                    min(waits) if waits else None)
                self.reap()
        finally:
            self.stop(self.names)

    def new_lock(self):
        """A fresh lock and clean slots, for when no role runs."""
        self.lock = multiprocessing.Lock()
        self.table.reset()

    def start_missing(self):
        """Start what does not run and has waited long enough."""
        for name in self.names:
            if name in self.running or time.monotonic() < self.started[name] + self.delay[name]:
                continue
            long_ago = time.monotonic() - self.started[name] > 10 * MAX_BACKOFF
            self.delay[name] = 0.1 if long_ago else min(MAX_BACKOFF, 2 * self.delay[name])
            self.started[name] = time.monotonic()
            try:
                process, sentinel = self.spawn(name)
            except OSError as error:
                log.error("cannot start the %s: %s", name, error.strerror)
                continue
            self.running[name] = process, sentinel
            log.info("%s started, pid %d", name, process.pid)

    def spawn(self, name):
        """Start a role or the agent: the process, and what is readable when it has ended."""
        if name == "agent":
            command = [sys.executable, agent_path(), "--host",
                       reachable(self.options.host), "--port", str(self.options.port)]
            if self.options.secret_file:
                command += ["--secret-file", self.options.secret_file]
            agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            return agent, agent.stdout
        role = multiprocessing.Process(target=run_role, name=name, args=(
            name, self.listeners[name], self.lock, self.options))
        role.start()
        return role, role.sentinel

    def reap(self):
        """Take note of what has ended; a role without the lock takes the other one with it."""
        ready = multiprocessing.connection.wait([s for _, s in self.running.values()], 0)
        ended = {name: process for name, (process, sentinel) in self.running.items()
                 if sentinel in ready}
        if self.signals or not ended:
            return
        stuck = False
        self.stop(ended)
        for name, process in ended.items():
            code = process.returncode if name == "agent" else process.exitcode
            log.error("%s ended with %s; starting it again", name,
                      "signal %d" % -code if code < 0 else "exit code %d" % code)
            stuck = stuck or code == EXIT_LOCK
        if stuck:
            self.stop(self.listeners)
            self.new_lock()

    def stop(self, names):
        """End processes: SIGTERM, a deadline, SIGKILL."""
        stopping = [self.running.pop(name)[0] for name in names if name in self.running]
        for process in stopping:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in stopping:
            wait = process.wait if isinstance(process, subprocess.Popen) else process.join
            with contextlib.suppress(subprocess.TimeoutExpired):
                wait(max(0.01, deadline - time.monotonic()))
            process.kill()
            wait()


def agent_path():
    """Where agent.py is: beside this file."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.py")


def reachable(host):
    """An address at which this machine reaches a listener on the host."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


# ============================================================================
# Command line
# ============================================================================


def bounded(kind, low, high, what):
    """An argparse type: a number within bounds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError("%r is not %s from %g to %g" % (text, what, low, high))
        return value
    return parse


def rule_argument(text):
    """An argparse type: an alert rule."""
    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shm_argument(text):
    """An argparse type: a name of shared memory (shm_open(3))."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,30}", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(
            "%r is no name of shared memory; 1 to 30 letters, digits, _ and - are" % text)
    return text


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps the description's lines."""


def build_parser():
    """The command line."""
    port = bounded(int, 0, 65535, "a port")
    parser = argparse.ArgumentParser(
        prog="master_server.py", description=__doc__.partition("\n\nRun it")[0],
        epilog="Exit codes" + __doc__.partition("Exit codes")[2], formatter_class=Formatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1",
        help="where to listen for agents; 0.0.0.0 for those on other machines")
    add("--port", type=port, default=13579, help="port for agents; 0 picks a free one")
    add("--dashboard-host", default="127.0.0.1", help="where to listen for browsers")
    add("--dashboard-port", type=port, default=8080, help="port for browsers; 0 picks a free one")
    add("--max-agents", type=bounded(int, 1, 65536, "a number"), default=1024, metavar="N",
        help="how many agents may send at once")
    add("--timeout", type=bounded(float, 0.5, 3600, "a number of seconds"), default=5.0,
        metavar="SECONDS", help="silence after which an agent is lost")
    add("--alert", type=rule_argument, action="append", metavar="RULE", default=[],
        help="when to alert, instead of %s: METRIC>NUMBER or METRIC<NUMBER, with ' for SECONDS'"
        " behind it; may be repeated; no-lost: not when a node is lost"
        % " and ".join(DEFAULT_RULES).replace("%", "%%"))
    add("--alert-command", metavar="CMD", help="shell command to run for each alert; the facts"
        " are in SENTINEL_EVENT, _NODE, _JOB, _METRIC, _VALUE, _THRESHOLD, _COUNT")
    add("--shm-name", type=shm_argument, metavar="NAME",
        help="name of the shared memory (sentinel_PORT unless given)")
    add("--with-agent", action="store_true", help="watch this machine, too")
    add("--verbose", action="store_true", help="log every sample")
    return parser


def main(argv=None):
    """Run the master: its exit code."""
    if sys.version_info < (3, 8):
        print("error: master_server.py needs Python 3.8 or newer, this is %d.%d; try python3.11"
              " or 'module load python'" % sys.version_info[:2], file=sys.stderr)
        return 1
    parser = build_parser()
    options = parser.parse_args(argv)
    options.rules = [rule for rule in options.alert if isinstance(rule, Rule)]
    if not options.rules:
        options.rules = [parse_rule(text) for text in DEFAULT_RULES]
    options.lost = "no-lost" not in options.alert
    options.secret = options.secret_file = None
    setup_log(options.verbose)
    try:
        return run_master(options)
    except UsageError as error:
        parser.error(str(error))
    except (StartError, TableError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 1


def run_master(options):
    """Bind, make the table, supervise: 0 when a signal ended it."""
    if options.with_agent and not os.path.exists(agent_path()):
        raise StartError("--with-agent needs agent.py beside master_server.py; copy it there")
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(open_listener("--", options.host, options.port))
        dashboard = stack.enter_context(
            open_listener("--dashboard-", options.dashboard_host, options.dashboard_port))
        options.port, options.dashboard_port = (
            listener.getsockname()[1] for listener in (collector, dashboard))
        options.shm_name = options.shm_name or "sentinel_%d" % options.port
        raise_descriptor_limit()
        table = Table.create(options.shm_name, options.max_agents)
        stack.callback(table.unlink)
        # should this process be killed, the tracker may clean up behind it, but silently
        sys.warnoptions.append("ignore:resource_tracker")
        log.info("collector listening on %s:%d", options.host, options.port)
        log.info("dashboard listening on %s:%d: open http://%s:%d/ - Ctrl-C ends it all",
                 options.dashboard_host, options.dashboard_port,
                 "localhost" if reachable(options.dashboard_host) in LOOPBACK
                 else options.dashboard_host, options.dashboard_port)
        Supervisor({"collector": collector, "dashboard": dashboard}, table, options).run()
    log.info("stopped")
    return 0


def raise_descriptor_limit():
    """Let this process and its children open as many files as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):      # macOS: no limit is more than it takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
