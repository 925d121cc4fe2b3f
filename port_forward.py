#!/usr/bin/env python3
"""port_forward.py carries TCP connections from one port to another, byte for byte.

`ssh -R` listens on the login node's loopback only, where no compute node can reach it.
This listens where they can, and carries what they send into the tunnel:

    compute nodes            login node                                laptop
    agent.py ==TCP==> 0.0.0.0:13580 =bridge=> 127.0.0.1:13579 ==ssh -R==> master_server.py

On the login node, beside a tunnel that is there already:

    python3 port_forward.py

Tunnel and bridge in one command from the laptop. It leaves no file on the cluster and
lasts as long as that ssh:

    ssh -R 13579:localhost:13579 login 'python3 - --remote-port 13579' < port_forward.py

Exit codes: 0 stopped (SIGINT, SIGTERM, SIGHUP, or that ssh is gone), 1 cannot run or
listen, 2 bad usage.
"""

# The rooms, each using only those above it:
#
#     pump           one way of a connection: sockets only
#     bridge         all connections: the epoll, the limits, the log
#     command line   flags, signals, addresses
#
#     near ==pump==> far      A connection is two pumps. Each passes on the end of its
#     near <==pump== far      source once all bytes before it went out. When both ends
#                             went out, the connection is over.
#
# There is one thread, one epoll and one buffer: an idle connection costs no time, and a
# slow reader holds no more than one chunk.

import sys

if __name__ == "__main__":
    # Python looks for modules beside the script first (or, for a script from standard
    # input, in the working directory), unless it was told not to. A select.py of the
    # user's in there would take the place of the standard library's.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]

import argparse
import select
import signal
import socket
import time
from contextlib import suppress
from typing import Any, Dict, List, Optional, Set

VERSION = "2.0"

# ======================================== pump ========================================

CHUNK = 256 * 1024  # bytes read at once, and the most that wait for a slow reader
TCP_OPTIONS = {
    "TCP_KEEPIDLE": 30,  # seconds of silence before the kernel asks whether it lives
    "TCP_KEEPINTVL": 10,  # seconds from one such question to the next
    "TCP_KEEPCNT": 3,  # questions without an answer that end the connection
    "TCP_SYNCNT": 3,  # repetitions of a connect that is not answered
    "TCP_NODELAY": 1,  # a sample goes out at once
}

# What epoll watches a socket for (epoll_ctl(2)). It reports EPOLLERR and EPOLLHUP
# whatever it was asked for, again and again. Only EPOLLONESHOT reports them just once.
IN = 1  # EPOLLIN
OUT = 4  # EPOLLOUT
NOTHING = 1 << 30  # EPOLLONESHOT


class Pump:
    """One way of a connection: what is read from `source` is written to `sink`.

    While `rest` waits for the sink, the source is not read. `ended` says that nothing
    more will be read, `moved` when something last happened, `mask` what the source is
    watched for. `name` is how the log calls the peer at the source.
    """

    def __init__(
        self, source: socket.socket, sink: socket.socket, name: str, mask: int
    ) -> None:
        self.source = source
        self.sink = sink
        self.name = name
        self.mask = mask
        self.rest = b""
        self.ended = False
        self.moved = time.monotonic()
        source.setblocking(False)
        source.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in TCP_OPTIONS.items():
            source.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def read(self, buffer: memoryview) -> None:
        """Read once and pass it on. OSError: the source is broken, or has nothing."""
        count = self.source.recv_into(buffer)
        if count == 0:
            self.ended = True
        else:
            self.write(buffer[:count])

    def write(self, chunk: Any) -> None:
        """Send what the sink takes and keep the rest.

        A broken sink ends this way. Why it broke is told by reading from it.
        """
        try:
            sent = self.sink.send(chunk)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.rest = b""
            self.ended = True
            return
        self.rest = bytes(chunk[sent:])

    def pass_end(self) -> None:
        """Once the source has ended, end the sink. Nothing waits then: see `read`."""
        if self.ended:
            with suppress(OSError):  # the sink is gone; a second time does no harm
                self.sink.shutdown(socket.SHUT_WR)


# ======================================= bridge =======================================

IDLE_LIMIT = 150  # seconds without a byte; an agent sends at least every 60 s
TICK = 10  # seconds between looks at that limit, and between like log lines


def log(text: str) -> None:
    """Write a line to stderr. When nobody reads that any more, Bridge.run ends."""
    with suppress(OSError):
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


class Bridge:
    """Connects whoever comes to `listener` with `target`, until `run` returns.

    `target` is a row of getaddrinfo(). A byte that can be read from `wake` ends `run`.
    """

    def __init__(
        self, listener: socket.socket, target: Any, wake: socket.socket
    ) -> None:
        self.listener = listener
        self.family = target[0]
        self.target = target[4]
        self.target_name = "{}:{}".format(*self.target)
        self.pumps: Dict[int, Pump] = {}  # by the file descriptor of the source
        self.repeats: Dict[str, int] = {}  # how often a line was not logged again
        self.buffer = memoryview(bytearray(CHUNK))
        self.now = time.monotonic()
        self.tick_due = self.now
        self.epoll = select.epoll()
        self.epoll.register(listener, IN)
        self.epoll.register(wake, IN)
        self.enders: Set[int] = {wake.fileno()}  # an event on one of them ends `run`
        self.watch_the_log()

    def watch_the_log(self) -> None:
        """End when the ssh at the other end of stdout or stderr is gone.

        A terminal is left out, since it sends SIGHUP. A file cannot be watched.
        """
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                if stream and not stream.isatty():
                    self.epoll.register(stream, 0)
                    self.enders.add(stream.fileno())

    def run(self) -> None:
        """Carry until a signal comes, or until nobody reads the log any more."""
        listener_fd = self.listener.fileno()
        while True:
            events = self.epoll.poll(TICK)
            self.now = time.monotonic()
            for fd, _ in events:
                pump = self.pumps.get(fd)
                if pump:
                    self.serve(pump)
                elif fd == listener_fd:
                    self.accept()
                elif fd in self.enders:
                    return
                # Any other was closed by an event before it.
            if self.now >= self.tick_due:
                self.tick()

    def accept(self) -> None:
        """Take a connection and begin to connect it with the target.

        When that cannot be done, nobody is accepted until a connection ends or the next
        tick comes: the kernel lets them wait.
        """
        try:
            # The far socket comes first: who is accepted can be served.
            far = socket.socket(self.family)
            near, address = self.listener.accept()
            # The far socket becomes writable when it is connected or refused; until
            # then there is no use in reading from the near one.
            out = Pump(near, far, address[0], NOTHING)
            back = Pump(far, near, self.target_name, OUT)
            with suppress(BlockingIOError):
                far.connect(self.target)
        except OSError as error:  # out of descriptors, or no route
            self.complain(f"cannot take new connections: {error.strerror}")
            self.epoll.modify(self.listener, NOTHING)
            return
        for pump in (out, back):
            self.pumps[pump.source.fileno()] = pump
            self.epoll.register(pump.source, pump.mask)

    def serve(self, pump: Pump) -> None:
        """Carry what can be carried to and from the source of this pump."""
        twin = self.pumps[pump.sink.fileno()]
        pump.moved = self.now
        twin.moved = self.now
        try:
            if twin.rest:
                twin.write(twin.rest)
            if not pump.rest and not pump.ended:
                pump.read(self.buffer)
        except BlockingIOError:
            pass
        except OSError as error:  # it was reset or refused: neither way goes on
            self.complain(f"{pump.name}: {error.strerror}")
            pump.ended = True
            twin.ended = True
            twin.rest = b""
        pump.pass_end()
        twin.pass_end()
        self.watch(pump, twin)
        self.watch(twin, pump)
        if pump.mask == NOTHING and twin.mask == NOTHING:
            self.close(pump)

    def watch(self, pump: Pump, twin: Pump) -> None:
        """Watch the source of `pump`, into which `twin` writes, for what is wanted."""
        mask = 0
        if not pump.rest and not pump.ended:
            mask |= IN
        if twin.rest:
            mask |= OUT
        if not mask:
            mask = NOTHING
        if mask != pump.mask:
            self.epoll.modify(pump.source, mask)
            pump.mask = mask

    def close(self, pump: Pump) -> None:
        """Forget both ways of a connection: there is room for another one."""
        for end in (pump.source, pump.sink):
            del self.pumps[end.fileno()]
            end.close()  # this takes it out of the epoll as well
        self.epoll.modify(self.listener, IN)

    def complain(self, line: str) -> None:
        """Log a line that is new since the last ticks, and count one that is not."""
        if line in self.repeats:
            self.repeats[line] += 1
        else:
            self.repeats[line] = 0
            log(line)

    def tick(self) -> None:
        """Do what is done every TICK seconds."""
        self.tick_due = self.now + TICK
        self.close_silent()
        self.log_repeats()
        self.epoll.modify(self.listener, IN)

    def close_silent(self) -> None:
        """Close each connection on which nothing has come for too long."""
        for pump in list(self.pumps.values()):
            if self.now - pump.moved <= IDLE_LIMIT:
                continue
            if pump.source.fileno() in self.pumps:  # not closed with its twin just now
                self.complain(f"{pump.name}: closed, silent for {IDLE_LIMIT} s")
                self.close(pump)

    def log_repeats(self) -> None:
        """Say how often each line came again. One that came no more is new again."""
        repeated = {line: count for line, count in self.repeats.items() if count}
        for line, count in repeated.items():
            log(f"{line} ({count} more in {TICK} s)")
        self.repeats = dict.fromkeys(repeated, 0)


# ==================================== command line ====================================

BACKLOG = 1024  # connections that the kernel holds until they are accepted
FLAGS = "--host, --local-port, --remote-host, --remote-port"


def is_port(text: str) -> bool:
    """Whether this is a number from 0 to 65535."""
    return text.isdecimal() and len(text) <= 5 and int(text) <= 65535


def local_port(text: str) -> int:
    """The argparse type of a port to listen on; 0 lets the kernel choose."""
    if not is_port(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port (1 to 65535; 0: any that is free)"
        )
    return int(text)


def remote_port(text: str) -> int:
    """The argparse type of a port to connect to."""
    if not is_port(text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"1 to 65535, and {text!r} is not")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Its errors are one line each, without the usage."""
    parser = argparse.ArgumentParser(
        prog="port_forward.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="0.0.0.0",
        help="listen here (default: %(default)s)",
    )
    parser.add_argument(
        "--local-port",
        metavar="PORT",
        default=13580,
        type=local_port,
        help="listen on this port; 0: any that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--remote-host",
        metavar="HOST",
        default="127.0.0.1",
        help="carry to this host (default: %(default)s)",
    )
    parser.add_argument(
        "--remote-port",
        metavar="PORT",
        default=13579,
        type=remote_port,
        help="carry to this port of it (default: %(default)s)",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def parse_flags(
    parser: argparse.ArgumentParser, argv: Optional[List[str]]
) -> argparse.Namespace:
    """The flags. A mistake ends the program with 2."""
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"{unknown[0]}: not {FLAGS}")
    own_host = flags.host.replace("0.0.0.0", "127.0.0.1")
    if (flags.remote_host, flags.remote_port) == (own_host, flags.local_port):
        parser.error("--remote-port: not the port that it listens on itself")
    return flags


def first_address(host: str, port: int) -> Any:
    """A row of getaddrinfo(), IPv4 if there is one. socket.gaierror, UnicodeError."""
    return min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


def open_listener(address: Any) -> socket.socket:
    """Listen on a row of getaddrinfo(). OSError."""
    listener = socket.socket(address[0])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address[4])
    listener.listen(BACKLOG)
    return listener


def catch_signals() -> socket.socket:
    """A socket that can be read once a signal has asked this process to end."""
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach())
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is under nohup
        signals.append(signal.SIGHUP)
    for number in signals:
        signal.signal(number, lambda *_: None)  # the kernel's byte in `wake` is enough
    return wake


def raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets this user have."""
    import resource  # here, since Windows has none

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Optional[List[str]] = None) -> int:
    """Carry until asked to end: the exit code."""
    parser = build_parser()
    flags = parse_flags(parser, argv)
    if not hasattr(select, "epoll"):
        parser.exit(
            1,
            "error: port_forward.py needs Linux, as login nodes have; on Windows,"
            " WSL has it\n",
        )
    wake = catch_signals()
    raise_descriptor_limit()
    try:
        near = first_address(flags.host, flags.local_port)
        far = first_address(flags.remote_host, flags.remote_port)
        listener = open_listener(near)
    except (socket.gaierror, UnicodeError) as error:
        parser.error(
            f"--host {flags.host!r}, --remote-host {flags.remote_host!r}: {error}"
        )
    except OSError as error:
        place = f"{flags.host}:{flags.local_port}"
        parser.exit(1, f"error: cannot listen on {place}: {error.strerror}\n")
    here = "{}:{}".format(*listener.getsockname())
    there = "{}:{}".format(*far[4])
    log(f"listening on {here}, carrying to {there}")
    Bridge(listener, far, wake).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
