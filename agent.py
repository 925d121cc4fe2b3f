#!/usr/bin/env python3
"""agent.py - tell the Cluster Sentinel how this node and this job are doing.

The promise: one file, Python 3.6 or newer, standard library, no root, nothing to install. It only
reads, it listens nowhere, it talks to one address, and it takes less than a thousandth of a core.
It is kept under 650 lines so that you can read all of it before you run it.

    /proc /sys --> parsers --> rates --> sample --> link == pickles over TCP ==> master
      (probe)                              ^          ^  <== "ok", "error REASON" ==
                                           `-- loop --'  every 2 s, on the beat

    python3 agent.py --host login            watch this node until SIGINT or SIGTERM
    python3 agent.py --once                  print one sample as JSON

Exit codes: 0 done or stopped by a signal, 1 could not do it, 2 bad usage.
"""

import argparse
import getpass
import os
import pickle
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Union

VERSION = "1.0"
FIRST_SECONDS = 0.25        # the first sample covers this much time
INTERVAL_SECONDS = (0.1, 60.0)
CONNECT_SECONDS = 5.0       # for each address of a candidate, and for the challenge
GOODBYE_SECONDS = 0.5       # how long an ending agent waits for the master to take its goodbye
ANSWER_SECONDS = 10.0       # without an answer for so long (or 3 intervals): connect again
SILENT_SECONDS = 60.0       # that wait doubles up to this while no answer ever came
BACKOFF_SECONDS = (1.0, 30.0)
STEADY_SECONDS = 5.0        # a connection that held this long was a good one
TEXT_BYTES = 255            # the master's limit for a text
ANSWER_BYTES = 1024         # one line from the master is never longer
FILE_BYTES = 65536          # more of a /proc or /sys file is never read
PORT = 13579

Value = Union[str, float]                       # float stands for int and bool, too (PEP 484)
Sample = Dict[str, Value]                       # what is sent: unknown is no key at all
Reading = Dict[str, Optional[Value]]            # what a reader found: unknown is None
Address = Tuple[str, int]                       # host, port


# ==============================================================================================
# Parsers: text in, values out. parse_cpu, parse_meminfo, parse_loadavg, clip, printable
# ==============================================================================================

class Memory(NamedTuple):
    """Bytes, as /proc/meminfo has them."""

    total: int
    available: int
    swap_total: int
    swap_free: int


def parse_cpu(text: str) -> Tuple[int, int]:
    """Return (idle, total) ticks since boot from the first line of /proc/stat, proc(5).

    Waiting for I/O is idle. Guest time is left out: user and nice hold it already.
    """
    # cpu  84282 747 51842 1326541 1340 0 3204 17 412 0
    ticks = [int(field) for field in text[:text.index("\n")].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def parse_meminfo(text: str) -> Memory:
    """Return the memory of the node from /proc/meminfo, proc(5)."""
    # MemTotal:       24684096 kB
    def find(name: str) -> Optional[int]:
        start = text.find(name + ":")
        return int(text[start + len(name) + 1:start + 40].split(None, 1)[0]) if start >= 0 else None

    total, available = find("MemTotal"), find("MemAvailable")
    if available is None:       # before Linux 3.14: the sum that free(1) takes
        available = sum(find(name) or 0 for name in ("MemFree", "Buffers", "\nCached",
                                                     "SReclaimable")) - (find("Shmem") or 0)
    if not total:
        raise ValueError("no MemTotal in %r" % text[:60])
    swap_total, swap_free = find("SwapTotal") or 0, find("SwapFree") or 0
    return Memory(total * 1024, available * 1024, swap_total * 1024, swap_free * 1024)


def parse_loadavg(text: str) -> Tuple[float, int]:
    """Return (load over one minute, processes and threads) from /proc/loadavg, proc(5)."""
    # 0.20 0.18 0.12 1/80 11206
    fields = text.split()
    return float(fields[0]), int(fields[3].split("/")[1])


def clip(text: str) -> str:
    """Return a text the master takes: valid UTF-8 of at most 255 bytes."""
    return text.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")


def printable(text: str) -> str:
    """Return a text from a peer as it may reach the log: no control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


# ==============================================================================================
# Probe: the only door to files.
# ==============================================================================================

class Probe:
    """Reads proc/... and sys/... files: each is opened once and read again in place."""

    def __init__(self, procfs: str = "/proc", sysfs: str = "/sys") -> None:
        self.roots = {"proc": procfs, "sys": sysfs}
        self.open_files: Dict[str, int] = {}

    def where(self, path: str) -> str:
        """Return the real path of "proc/stat" or "sys/class/net"."""
        root, _, rest = path.partition("/")
        return os.path.join(self.roots[root], rest)

    def read(self, path: str, limit: int = FILE_BYTES) -> Optional[str]:
        """Return at most `limit` bytes of a file as text, None if it cannot be read."""
        try:
            fd = self.open_files.get(path)
            if fd is None:
                fd = self.open_files[path] = os.open(self.where(path), os.O_RDONLY)
            text = chunk = os.pread(fd, limit, 0)
            while chunk and len(text) < limit:      # /proc gives a page of records at a time
                chunk = os.pread(fd, limit - len(text), len(text))
                text += chunk
            return text.decode("utf-8", "replace")
        except OSError:                             # gone: an ended cgroup, an unplugged disk
            stale = self.open_files.pop(path, None)
            if stale is not None:
                os.close(stale)
            return None

    def need(self, path: str, limit: int = FILE_BYTES) -> str:
        """Return what `read` does; OSError if the file cannot be read."""
        text = self.read(path, limit)
        if text is None:
            raise OSError("cannot read %s" % self.where(path))
        return text


# ==============================================================================================
# Rates: counters into percent and per second.
# ==============================================================================================

class CpuRate:
    """Turns (idle, total) ticks into percent busy since the call before."""

    def __init__(self, idle: int, total: int) -> None:
        self.idle, self.total, self.percent = idle, total, 0.0

    def update(self, idle: int, total: int) -> float:
        """Return percent, one decimal; the value before if the counters stood or went back."""
        elapsed, idled = total - self.total, idle - self.idle
        if elapsed > 0:         # idled: iowait may go back a little, proc(5)
            self.percent = round(100.0 * min(max(elapsed - idled, 0), elapsed) / elapsed, 1)
        self.idle, self.total = idle, total
        return self.percent


# ==============================================================================================
# Sample: all readings of one node at one instant, one reader a file.
# ==============================================================================================

class Sampler:
    """Reads a Linux node; a new one takes its first counters at once."""

    STAT_BYTES, MEMINFO_BYTES = 256, 1024       # what is needed stands at the start of both

    def __init__(self, probe: Optional[Probe] = None) -> None:
        self.probe = probe or Probe()
        everything = self.probe.need("proc/stat")
        self.cpu = CpuRate(*parse_cpu(everything))
        self.fixed: Sample = {"cpus": everything.count("\ncpu")}
        self.readers = [self.read_cpu, self.read_memory, self.read_load]

    def read_cpu(self) -> Reading:
        """cpu: percent busy since the sample before."""
        return {"cpu": self.cpu.update(*parse_cpu(self.probe.need("proc/stat", self.STAT_BYTES)))}

    def read_memory(self) -> Reading:
        """ram, swap: percent in use; mem_total, mem_used: bytes."""
        memory = parse_meminfo(self.probe.need("proc/meminfo", self.MEMINFO_BYTES))
        used = memory.total - memory.available
        return {"ram": round(100.0 * used / memory.total, 1),
                "mem_total": memory.total, "mem_used": float(used),
                "swap": round(100.0 - 100.0 * memory.swap_free / memory.swap_total, 1)
                if memory.swap_total else None}

    def read_load(self) -> Reading:
        """load1: the load average of one minute."""
        return {"load1": parse_loadavg(self.probe.need("proc/loadavg", 128))[0]}

    def sample(self) -> Sample:
        """Return what is known now; OSError or ValueError if cpu or ram are not."""
        sample = dict(self.fixed)
        for reader in self.readers:
            try:
                reading = reader()
            except (OSError, ValueError, LookupError):
                if reader in self.readers[:2]:
                    raise
                continue
            sample.update((key, value) for key, value in reading.items() if value is not None)
        return sample


class PsutilSampler(Sampler):
    """The same for a system without /proc, by psutil; ImportError if it is missing."""

    def __init__(self) -> None:
        import psutil  # type: ignore[import-untyped,unused-ignore] # pylint: disable=all
        self.psutil: Any = psutil
        self.psutil.cpu_percent()
        self.fixed = {"cpus": psutil.cpu_count()}
        self.readers = [self.read_cpu, self.read_memory, self.read_load]

    def read_cpu(self) -> Reading:
        return {"cpu": float(self.psutil.cpu_percent())}

    def read_memory(self) -> Reading:
        memory, swap = self.psutil.virtual_memory(), self.psutil.swap_memory()
        used = memory.total - memory.available
        return {"ram": round(100.0 * used / memory.total, 1),
                "mem_total": memory.total, "mem_used": float(used),
                "swap": float(swap.percent) if swap.total else None}

    def read_load(self) -> Reading:
        return {"load1": os.getloadavg()[0]}


def get_system_stats(sampler: Optional[Sampler] = None) -> Sample:
    """Return one sample such as {'cpu': 15.5, 'ram': 40.2, ...}: percent, one decimal.

    `cpu` covers the time since the call before with this sampler; without one, 0.25 s from now.
    """
    if sampler is None:
        sampler = Sampler()
        time.sleep(FIRST_SECONDS)
    return sampler.sample()


def identify(name: Optional[str], interval: float) -> Sample:
    """Return the keys that stay the same for as long as this agent lives."""
    environ = os.environ
    try:
        user: Optional[str] = getpass.getuser()
    except (ImportError, KeyError, OSError):        # a uid without a name
        user = None
    identity = {"node": name or environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
                "user": user, "job": environ.get("SLURM_JOB_ID"),
                "job_name": environ.get("SLURM_JOB_NAME"), "version": VERSION}
    sample: Sample = {key: clip(text) for key, text in identity.items() if text}
    sample.update(interval=interval, ack=True)
    return sample


# ==============================================================================================
# Link: connect, send, hear the answers, back off. Nothing here blocks the loop.
# ==============================================================================================

class Refused(OSError):
    """The other side is there and cannot be our master; the text says why."""


def log(text: str) -> None:
    """Write one line to stderr; a log that nobody can read any more is no error."""
    try:
        sys.stderr.write("%s agent: %s\n" % (time.strftime("%H:%M:%S"), text))
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass


def show(address: Address) -> str:
    """Return HOST:PORT, [HOST]:PORT for IPv6."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address


def why(error: Exception) -> str:
    """Return the short reason of an OSError."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def authenticate(sock: socket.socket, secret: bytes) -> None:
    """Answer the master's challenge; fails closed when there is none (design: Wire)."""
    import hashlib
    import hmac
    line, deadline = b"", time.monotonic() + CONNECT_SECONDS
    while not line.endswith(b"\n") and len(line) < ANSWER_BYTES:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            byte = sock.recv(1)         # byte by byte: what follows the line is not ours to read
        except socket.timeout:
            break
        if not byte:
            raise Refused("it closed the connection" if not line else "it broke off its greeting")
        line += byte
    word, _, nonce = line.rstrip(b"\r\n").partition(b" ")
    if word == b"error":
        raise Refused(printable(nonce.decode("utf-8", "replace")))
    if word != b"challenge" or not nonce:
        raise Refused("it asks for no secret; start the master with --secret-file, too")
    proof = hmac.new(secret, nonce, hashlib.sha256).hexdigest()
    sock.settimeout(CONNECT_SECONDS)
    sock.sendall(pickle.dumps({"auth": proof}, protocol=4))


def dial(address: Address, secret: Optional[bytes]) -> socket.socket:
    """Return a connected non-blocking socket; OSError, UnicodeError (a bad name) if it fails."""
    sock = socket.create_connection(address, CONNECT_SECONDS)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secret is not None:
            authenticate(sock, secret)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Link:
    """The connection to the first candidate that answers.

    idle --(retry_at)--> dialling on a thread --> up --(closed, refused, silent)--> idle
    The thread is there because name lookup cannot be told to hurry; it ends when it has dialled.
    """

    def __init__(self, candidates: List[Address], secret: Optional[bytes], interval: float,
                 waker: socket.socket) -> None:
        self.candidates, self.secret, self.waker = candidates, secret, waker
        self.sock: Optional[socket.socket] = None
        self.dialling = False
        self.dialled: Optional[Tuple[Address, Optional[socket.socket], str]] = None
        self.address = candidates[0]
        self.retry_at = self.since = self.heard = 0.0       # monotonic seconds
        self.backoff = BACKOFF_SECONDS[0]
        self.patience = max(ANSWER_SECONDS, 3 * interval)
        self.answered = self.ever_answered = False          # on this connection; in this life
        self.unsent = self.unread = b""
        self.said: Set[str] = set()

    def advance(self, now: float) -> bool:
        """Take up a new connection or dial when it is time; True if one is newly up."""
        if self.dialled is not None:
            (self.address, self.sock, problem), self.dialled = self.dialled, None
            self.dialling = False
            if self.sock is None:
                self.back_off(now, "cannot reach the master", problem)
                return False
            self.since = self.heard = now
            self.answered, self.unsent, self.unread = False, b"", b""
            self.say("connected to %s" % show(self.address))
            return True
        if self.sock is None and not self.dialling and now >= self.retry_at:
            self.dialling = True
            threading.Thread(target=self.dial_in_turn, daemon=True).start()
        return False

    def dial_in_turn(self) -> None:
        """Dial each candidate until one takes the call; runs on its own thread."""
        problems = []
        for address in self.candidates:
            try:
                self.dialled = address, dial(address, self.secret), ""
                break
            except (OSError, UnicodeError) as error:
                problems.append("%s: %s" % (show(address), why(error)))
        else:
            self.dialled = self.candidates[0], None, "; ".join(problems)
        try:
            self.waker.send(b"\0")
        except OSError:             # the agent has ended meanwhile
            pass

    def send(self, sample: Sample, now: float) -> None:
        """Send a sample if there is a connection and the one before is out."""
        self.hear(now)
        if self.sock is not None and now - self.heard > self.patience:
            self.give_up(now)
        if self.sock is None:
            return
        try:
            data = self.unsent or pickle.dumps(sample, protocol=4)
            self.unsent = data[self.sock.send(data):]
        except BlockingIOError:     # a full pipe: this sample is skipped, the next will tell
            self.unsent = self.unsent and data
        except OSError as error:
            self.lose(now, why(error))

    def hear(self, now: float) -> None:
        """Read the answers that are there: ok, error REASON; anything else is passed over."""
        while self.sock is not None:
            try:
                text = self.sock.recv(ANSWER_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                return self.lose(now, why(error))
            if not text:
                return self.lose(now, "it closed the connection")
            lines = (self.unread + text).split(b"\n")
            self.unread = lines.pop()[-ANSWER_BYTES:]
            for line in lines:
                if line == b"ok":
                    self.heard = now
                    if not self.answered:
                        self.accept()
                elif line.startswith(b"error "):
                    return self.lose(now, printable(line[6:].decode("utf-8", "replace")))
            if text == b"ok\n":     # the usual case, and it costs one call, not two
                return

    def accept(self) -> None:
        """The first ok of a connection: all is well."""
        self.answered = self.ever_answered = True
        self.backoff = BACKOFF_SECONDS[0]
        self.said = {"connected to %s" % show(self.address)}

    def give_up(self, now: float) -> None:
        """Leave a connection on which the answers stopped: behind a tunnel it looks alive."""
        self.goodbye({"bye": "reconnecting"}, 0.0)
        silence = "no answer for %.0f s" % self.patience
        if not self.ever_answered:
            self.patience = max(min(2 * self.patience, SILENT_SECONDS), self.patience)
        self.backoff = BACKOFF_SECONDS[0]
        self.lose(now, silence)

    def lose(self, now: float, reason: str) -> None:
        """Close a connection and say why, once."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.answered or now - self.since > STEADY_SECONDS:
            self.backoff = BACKOFF_SECONDS[0]
            self.said.clear()
        if not self.answered and self.address in self.candidates:
            turn = self.candidates.index(self.address) + 1      # give the others a chance
            self.candidates = self.candidates[turn:] + self.candidates[:turn]
        self.back_off(now, "lost the master at %s" % show(self.address), reason)

    def back_off(self, now: float, event: str, reason: str) -> None:
        """Set the time of the next try: 1 to 30 s, doubled, and spread so that a crowd parts."""
        delay = min(self.backoff * (1 + os.urandom(1)[0] / 512.0), BACKOFF_SECONDS[1])
        self.retry_at = now + delay
        self.backoff = min(2 * self.backoff, BACKOFF_SECONDS[1])
        self.say("%s (%s)" % (event, reason), ": retrying in %.0f s" % delay)

    def say(self, text: str, more: str = "") -> None:
        """Log a transition, and not again until the link has been well in between."""
        if text not in self.said:
            self.said.add(text)
            log(text + more)

    def goodbye(self, farewell: Sample, seconds: float) -> None:
        """Send the last words, wait so long for the master to take them, and close."""
        if self.sock is None:
            return
        sock, self.sock = self.sock, None
        try:
            sock.settimeout(seconds)
            sock.sendall(self.unsent + pickle.dumps(farewell, protocol=4))
            sock.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + seconds
            # Answers left unread would turn our FIN into a RST, and that may overtake the goodbye.
            while sock.recv(ANSWER_BYTES) and time.monotonic() < deadline:
                pass
        except OSError:
            pass
        sock.close()


# ==============================================================================================
# Loop: wait, sample, send, on the beat; until a signal or the end of the reader of our stdout.
# ==============================================================================================

def next_beat(beat: float, interval: float, now: float) -> float:
    """Return the first time after now that is a whole number of intervals after the beat."""
    return beat + interval * max(1, int((now - beat) / interval) + 1)


class Agent:
    """Binds a sampler and a link to the clock and the signals."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, sampler: Sampler, identity: Sample, candidates: List[Address],
                 secret: Optional[bytes], verbose: bool = False) -> None:
        self.sampler, self.identity, self.verbose = sampler, identity, verbose
        self.interval = float(identity["interval"])
        self.wakeup, waker = socket.socketpair()        # written by signals and the dialling thread
        for sock in self.wakeup, waker:
            sock.setblocking(False)
        self.link = Link(candidates, secret, self.interval, waker)
        self.signals: List[int] = []
        self.ending = ""
        self.stdout = 1 if is_pipe(1) else None         # its reader is whoever started us

    def run(self) -> int:
        """Send samples until the end; return the exit code."""
        signal.set_wakeup_fd(self.link.waker.fileno())
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, lambda caught, _: self.signals.append(caught))
        gap = min(FIRST_SECONDS, self.interval)
        now = last = time.monotonic()
        beat = now + gap
        while not self.ending:
            if self.link.advance(now):
                beat = min(beat, max(now, last + gap))
            if now >= beat:
                self.tell(now)
                last, beat = now, next_beat(beat, self.interval, now)
            self.wait(beat if self.link.sock or self.link.dialling
                      else min(beat, self.link.retry_at))
            now = time.monotonic()
        self.link.goodbye({"bye": self.ending}, GOODBYE_SECONDS)
        return 0

    def tell(self, now: float) -> None:
        """Take one sample and send it."""
        try:
            sample = dict(self.identity)
            sample.update(get_system_stats(self.sampler))
        except (OSError, ValueError, LookupError) as error:
            self.link.say("no sample (%s)" % why(error))
            return
        self.link.send(sample, now)
        if self.verbose:
            log(repr(sample))

    def wait(self, until: float) -> None:
        """Sleep until a time, a signal, a dialled connection or the end of a peer."""
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        if self.stdout is not None:
            poll.register(self.stdout, 0)
        if self.link.sock is not None:      # its answers can wait for the next sample, its end not
            poll.register(self.link.sock, HANGUP)
        for fd, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000):
            if fd == self.wakeup.fileno():
                self.wakeup.recv(4096)
            elif fd == self.stdout:
                self.ending = "finished"
            else:
                self.link.hear(time.monotonic())
        if self.signals:
            self.ending = signal.Signals(self.signals[0]).name


HANGUP = getattr(select, "POLLRDHUP", getattr(select, "POLLIN", 1))     # POLLRDHUP: Linux only


def is_pipe(fd: int) -> bool:
    """Return whether a file descriptor is a pipe or a socket."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


# ==============================================================================================
# Command line
# ==============================================================================================

class OneLineParser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized"):
            message += "; allowed: %s" % " ".join(sorted(
                flag for flag in self._option_string_actions if flag.startswith("--")))
        self.exit(2, "error: %s\n" % printable(message))


def parse_candidates(text: str, default_port: int) -> List[Address]:
    """Return the addresses in HOST[:PORT][,NEXT...]; ValueError says what is wrong."""
    # login,10.0.0.1:13580,[fe80::1%eth0]:13580
    candidates = []
    for part in text.split(","):
        match = re.match(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([A-Za-z0-9_.-]+))(?::(.*))?$", part)
        if not match or len(part) > TEXT_BYTES:
            raise ValueError("%r is no host; allowed: HOST or HOST:PORT, an IPv6 address in [ ], "
                             "several with commas between them" % part)
        port = parse_port(match.group(3)) if match.group(3) is not None else default_port
        candidates.append((match.group(1) or match.group(2), port))
    return candidates


def parse_port(text: str) -> int:
    """Return a TCP port; ValueError if it is none."""
    if not re.match(r"[0-9]{1,5}$", text) or not 1 <= int(text) <= 65535:
        raise ValueError("%r is no port; allowed: 1 to 65535" % text)
    return int(text)


def parse_interval(text: str) -> float:
    """Return seconds; ValueError if out of range."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not INTERVAL_SECONDS[0] <= seconds <= INTERVAL_SECONDS[1]:
        raise ValueError("%r is no interval; allowed: %g to %g seconds"
                         % ((text,) + INTERVAL_SECONDS))
    return seconds


def parse_name(text: str) -> str:
    """Return a node's name; ValueError if the master would not show it as it is."""
    if not text.strip() or not text.isprintable() or clip(text) != text:
        raise ValueError("%r is no node name; allowed: 1 to %d bytes of printable text"
                         % (text[:40], TEXT_BYTES))
    return text


def read_secret(path: str) -> bytes:
    """Return the secret in a file that its owner alone can read; OSError says the cure."""
    with open(path, "rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise OSError("others can read it; run: chmod 600 %s" % path)
        secret = file.read(FILE_BYTES).strip()
    if not secret:
        raise OSError("it is empty; put the secret of the master's --secret-file in it")
    return secret


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; the environment gives defaults, for job scripts."""
    environ = os.environ
    parser = OneLineParser(
        prog="agent.py", allow_abbrev=False,
        description="Watch this node and send a sample every few seconds to the master.",
        epilog="Environment: SENTINEL_HOST, SENTINEL_PORT and SENTINEL_SECRET_FILE are defaults.")
    add = parser.add_argument
    add("--host", metavar="HOST[,NEXT...]", default=environ.get("SENTINEL_HOST") or "127.0.0.1",
        help="the master's address, HOST or HOST:PORT, IPv6 in [ ]; several are tried in turn")
    add("--port", default=environ.get("SENTINEL_PORT") or str(PORT),
        help="the master's port (%d)" % PORT)
    add("--interval", default="2", metavar="SECONDS", help="time between samples, 0.1 to 60 (2)")
    add("--name", metavar="NODE", help="name of this node (SLURMD_NODENAME, else the host name)")
    add("--secret-file", metavar="FILE", default=environ.get("SENTINEL_SECRET_FILE") or None,
        help="file with the secret that the master's --secret-file has, too")
    add("--procfs", metavar="DIR", default="/proc", help="where proc(5) is mounted (/proc)")
    add("--sysfs", metavar="DIR", default="/sys", help="where sysfs(5) is mounted (/sys)")
    add("--once", action="store_true", help="print one sample as JSON and exit")
    add("--verbose", action="store_true", help="log each sample")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Replace the texts in args by their values; exits 2 with one line if one is wrong."""
    flag = "--port"
    try:
        args.port = parse_port(args.port)
        flag = "--host"
        args.candidates = parse_candidates(args.host, args.port)
        flag = "--interval"
        args.interval = parse_interval(args.interval)
        flag = "--name"
        args.name = args.name if args.name is None else parse_name(args.name)
        for flag, path in ("--procfs", args.procfs), ("--sysfs", args.sysfs):
            if flag == "--procfs" and not os.path.isdir(path):
                raise ValueError("%r is no directory" % path)
    except ValueError as error:
        parser.error("argument %s: %s" % (flag, error))


def open_sampler(args: argparse.Namespace) -> Sampler:
    """Return the sampler for this system; OSError, ValueError, ImportError if there is none."""
    if sys.platform.startswith("linux"):
        return Sampler(Probe(args.procfs, args.sysfs))
    try:
        return PsutilSampler()
    except ImportError:
        raise OSError("this system has no /proc; run: python3 -m pip install --user psutil")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    try:
        step = "cannot use the secret file %s" % args.secret_file
        secret = read_secret(args.secret_file) if args.secret_file else None
        step = "cannot read this node"
        sampler = open_sampler(args)
        identity = identify(args.name, args.interval)
        if args.once:
            import json
            time.sleep(FIRST_SECONDS)
            identity.update(get_system_stats(sampler))
            print(json.dumps(identity))
            return 0
    except (OSError, ValueError, LookupError) as error:
        print("error: %s: %s" % (step, printable(why(error))), file=sys.stderr)
        return 1
    return Agent(sampler, identity, args.candidates, secret, args.verbose).run()


if __name__ == "__main__":
    sys.exit(main())
