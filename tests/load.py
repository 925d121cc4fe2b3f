#!/usr/bin/env python3
"""load.py sends what a thousand agents would, from one process that costs little itself.

    python3 tests/load.py PORT COUNT [--pace even|burst] [--interval 2] [--churn 5] [--ramp 10]
                                     [--jobs 10] [--looks FILE]

An agent here is a socket and a place in a heap of due times. Its samples are pickled once, and only
its name, job, cpu and ram are written into the bytes of each; --samples names a JSON list of
samples (of the real agent, say) to take in turn. With --jobs they are the nodes of so many jobs,
and with --looks each tells of its ranks and GPUs behind every fifth sample. Even: one after
another, spread over the interval. Burst: all of them at once, every interval. Once a second a line
of JSON tells on stdout how it goes, see `Load.report`. Every sample reads the answer to the one
before, so an agent that the master dropped is noticed within an interval. It ends on SIGTERM or
SIGINT, or when nobody reads its stdout.
"""

import argparse
import collections
import gc
import heapq
import itertools
import json
import os
import pickle
import random
import resource
import signal
import socket
import struct
import sys
import time

PLAIN = [{"cpu": 15.5, "ram": 40.2, "version": "1.0", "ack": True}]
NAME = "node-%07d"  # all of one length: a name is written over another
JOB = "7%06d"  # likewise
LOOK_EVERY = 5  # samples from one look of an agent to the next
TICK = 0.001  # seconds: a shorter sleep costs more than it spreads
REPORT_SECONDS = 1.0
VALUES = 1024  # different values of cpu and ram
LOWEST, HIGHEST = 5.0, 85.0  # percent: nothing that would fire an alert
CONNECTS_PER_SECOND = 500.0
CONNECT_SECONDS = 10.0
ANSWER_BYTES = 4096
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST, as a crash does
WAYS = ("goodbye", "reset", "close", "silence")  # how agents leave under churn, in turn
SILENT_SECONDS = 10.0  # then a silent one's socket is closed; the master was sooner


# ==========================================================================================
# Samples: pickled once, written over for each agent
# ==========================================================================================


class Template:
    """The bytes of one sample, and where name, job, cpu and ram stand in them."""

    def __init__(self, sample, in_jobs=False):
        sample = dict(sample, node=NAME % 0)
        if in_jobs:
            sample["job"] = JOB % 0
        self.data = bytearray(pickle.dumps(sample, protocol=4))
        self.name = self.data.index((NAME % 0).encode())
        self.job = self.data.index((JOB % 0).encode()) if in_jobs else None
        self.floats = [self.find_float(key) for key in ("cpu", "ram")]

    def find_float(self, key):
        """Where the 8 bytes of a key's value are."""
        lead = (
            b"\x8c" + bytes([len(key)]) + key.encode() + b"\x94G"
        )  # text, memoize, float
        return self.data.index(lead) + len(lead)

    def fill(self, name, cpu, ram, job=b""):
        """The bytes with another name and job (bytes) and values (8 bytes each)."""
        data = self.data
        if len(name) != len(NAME % 0):
            raise ValueError(
                "a name of another length would spoil the pickle: %r" % name
            )
        data[self.name : self.name + len(name)] = name
        if self.job is not None:
            data[self.job : self.job + len(job)] = job
        for at, value in zip(self.floats, (cpu, ram)):
            data[at : at + 8] = value
        return data


def read_samples(path):
    """The samples in a JSON file, PLAIN without one; cpu and ram are floats."""
    if not path:
        return PLAIN
    with open(path, encoding="utf-8") as file:
        return [dict(sample, cpu=0.0, ram=0.0) for sample in json.load(file)]


def read_looks(path):
    """The looks in a JSON file, each a list of parts, as bytes that follow a sample; or none."""
    if not path:
        return []
    with open(path, encoding="utf-8") as file:
        looks = json.load(file)
    return [b"".join(pickle.dumps(part, protocol=4) for part in look) for look in looks]


# ==========================================================================================
# Pacing
# ==========================================================================================


def first_due(index, count, ramp):
    """Seconds after the start at which an agent connects: one after another over the ramp."""
    return index * ramp / count


def next_due(due, interval, pace):
    """The time of the sample after the one at `due`: an interval later, or with all others."""
    if pace == "even":
        return due + interval
    return (due // interval + 1) * interval


# ==========================================================================================
# Load
# ==========================================================================================


class Load:
    """All the agents of this process."""

    def __init__(self, options):
        self.options = options
        self.templates = [
            dict(sample, interval=options.interval)
            for sample in read_samples(options.samples)
        ]
        self.templates = itertools.cycle(
            [Template(sample, options.jobs > 0) for sample in self.templates]
        )
        self.looks = read_looks(options.looks)
        self.looked = collections.Counter()  # index: samples sent
        self.values = itertools.cycle(
            [
                struct.pack(">d", round(random.uniform(LOWEST, HIGHEST), 1))
                for _ in range(VALUES)
            ]
        )
        self.socks, self.names = (
            {},
            itertools.count(),
        )  # index: socket; names are never reused
        self.name_of, self.due = {}, []
        self.silent = collections.deque()  # (until, socket)
        self.sent = self.answered = self.lost = self.left = 0
        self.late, self.reasons, self.stopping = 0.0, {}, []

    def run(self):
        """Send until told to stop."""
        start = time.monotonic()
        count, ramp = self.options.count, self.options.ramp
        self.due = [(start + first_due(i, count, ramp), i) for i in range(count)]
        heapq.heapify(self.due)
        report_at = change_at = start + REPORT_SECONDS
        while not self.stopping and self.due:
            now = time.monotonic()
            while self.due[0][0] <= now and not self.stopping:
                self.serve(now)
                if not self.due:
                    break
            if now >= report_at:
                report_at = now + REPORT_SECONDS
                self.report()
            if self.options.churn and now >= change_at and now - start > ramp:
                change_at = now + 1.0 / self.options.churn
                if self.socks:
                    self.replace(random.choice(list(self.socks)))
            time.sleep(max(TICK, self.due[0][0] - time.monotonic()) if self.due else 0)
        self.report()

    def serve(self, now):
        """Let the agent that is due send, and say when it is due again."""
        due, index = self.due[0]
        self.late = max(self.late, now - due)
        if self.talk(index):
            later = next_due(due, self.options.interval, self.options.pace)
            heapq.heapreplace(self.due, (max(later, now), index))
        else:
            heapq.heappop(self.due)

    def talk(self, index):
        """Read the last answer, send a sample; False when the master dropped this agent."""
        try:
            sock = self.socks.get(index) or self.connect(index)
            if index in self.name_of and not self.hear(sock):
                raise ConnectionError("closed by the master")
            if index not in self.name_of:
                self.name_of[index] = (NAME % next(self.names)).encode()
            sock.send(
                next(self.templates).fill(
                    self.name_of[index],
                    next(self.values),
                    next(self.values),
                    self.job_of(index),
                )
            )
            self.sent += 1
            if self.looks:
                self.tell_look(index, sock)
            return True
        except OSError as error:
            self.lost += 1
            text = str(error.strerror or error)
            self.reasons[text] = self.reasons.get(text, 0) + 1
            if index in self.socks:
                self.socks.pop(index).close()
            return False

    def job_of(self, index):
        """The job of an agent, as bytes: the agents are dealt out to the jobs in turn."""
        return (
            (JOB % (index % self.options.jobs)).encode() if self.options.jobs else b""
        )

    def tell_look(self, index, sock):
        """Send a look behind every fifth sample of an agent; not all of them at once."""
        count = self.looked[index]
        self.looked[index] += 1
        if (count + index) % LOOK_EVERY == 0:
            sock.send(self.looks[count // LOOK_EVERY % len(self.looks)])

    def connect(self, index):
        """A new connection."""
        sock = socket.create_connection(
            (self.options.host, self.options.port), CONNECT_SECONDS
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.socks[index] = sock
        return sock

    def hear(self, sock):
        """Take what the master wrote; False at the end, ConnectionError with its reason."""
        try:
            text = sock.recv(ANSWER_BYTES)
        except BlockingIOError:
            return True
        if text == b"ok\n":  # nearly always
            self.answered += 1
            return True
        self.answered += text.count(b"ok\n")
        if b"error " in text:
            raise ConnectionError(
                text[text.index(b"error ") :].decode("utf-8", "replace").strip()
            )
        return bool(text)

    def replace(self, index):
        """One agent leaves, in one way or another; the next sample is of a new one's."""
        sock = self.socks.pop(index)
        self.name_of.pop(index)
        way = WAYS[self.left % len(WAYS)]
        self.left += 1
        now = time.monotonic()
        while self.silent and self.silent[0][0] < now:
            self.silent.popleft()[1].close()
        if way == "silence":
            self.silent.append((now + SILENT_SECONDS, sock))
            return
        try:
            if way == "goodbye":
                sock.send(pickle.dumps({"bye": "finished"}, protocol=4))
            elif way == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        except OSError:
            pass  # the next sample of a dropped one would have told
        sock.close()

    def report(self):
        """One line: agents, samples, answers, who was dropped and why, worst delay, CPU, time."""
        print(
            json.dumps(
                {
                    "agents": len(self.socks),
                    "sent": self.sent,
                    "answered": self.answered,
                    "lost": self.lost,
                    "left": self.left,
                    "reasons": self.reasons,
                    "late": round(self.late, 4),
                    "cpu": round(time.process_time(), 3),
                    "time": round(time.monotonic(), 3),
                }
            ),
            flush=True,
        )
        self.late = 0.0


# ==========================================================================================
# Command line
# ==========================================================================================


def raise_limit(need):
    """Have that many descriptors, if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < need:
        top = hard if hard == resource.RLIM_INFINITY else max(need, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, top))
        except (ValueError, OSError):  # only root may pass the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("port", type=int)
    add("count", type=int)
    add("--host", default="127.0.0.1")
    add("--pace", choices=("even", "burst"), default="even")
    add(
        "--interval",
        type=float,
        default=2.0,
        help="seconds between samples of one agent",
    )
    add(
        "--ramp",
        type=float,
        help="seconds in which all connect (500 in one, at least --interval)",
    )
    add(
        "--churn",
        type=float,
        default=0.0,
        help="agents replaced by new ones each second",
    )
    add("--samples", help="JSON file: list of samples to send in turn")
    add("--jobs", type=int, default=0, help="so many jobs have the agents as nodes")
    add("--looks", help="JSON file: list of looks, each a list of parts, sent in turn")
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    if options.ramp is None:
        options.ramp = max(options.interval, options.count / CONNECTS_PER_SECOND)
    options.ramp = max(1, round(options.ramp / options.interval)) * options.interval
    raise_limit(options.count + 100)
    load = Load(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: load.stopping.append(caught))
    gc.disable()  # no cycles here, and a pause would be a burst
    try:
        load.run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
