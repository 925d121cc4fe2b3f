#!/usr/bin/env python3
"""port_forward.py carries TCP connections from one port to another, byte for byte.

`ssh -R` listens on the login node's loopback only, where no compute node can reach it. This can:

    compute nodes              login node                                 laptop
    agent.py --TCP--> 0.0.0.0:13580 =bridge=> 127.0.0.1:13579 --ssh -R--> master_server.py
    near --pump--> far    A connection is two pumps. Each passes on the end of its source when
    near <--pump-- far    all before it went out; when both ends went out, it is over.

One thread, one epoll, one buffer: an idle connection is free, a slow reader holds 256 KiB at most.
In one command from the laptop, with no file on the cluster, for as long as that ssh lives:
    ssh -R 13579:localhost:13579 login 'python3 - --remote-port 13579' < port_forward.py
Exit codes: 0 stopped (SIGINT, SIGTERM, or that ssh is gone), 1 cannot listen, 2 bad usage.
"""

import argparse
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Dict, List, Optional

CHUNK = 256 * 1024  # bytes read at once, and the most that wait for a slow reader
BACKLOG = 1024  # connections that the kernel holds until they are accepted
IDLE_LIMIT = 150  # seconds without a byte; an agent sends at least every 60 s
TICK = 10  # seconds between looks at that limit, and between like log lines
TCP_OPTIONS = {"KEEPIDLE": 30, "KEEPINTVL": 10, "KEEPCNT": 3, "SYNCNT": 3, "NODELAY": 1}
IN, OUT = 1, 4  # EPOLLIN, EPOLLOUT; EPOLLERR and EPOLLHUP come with any mask, ...
NOTHING = 1 << 30  # ... but only once with this one, EPOLLONESHOT: epoll_ctl(2)


# ======================================== pump ========================================
class Pump:
    """One way of a connection; while `rest` waits for the sink, the source is not read."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, name: str, mask: int
    ) -> None:
        self.source, self.sink, self.name, self.mask = source, sink, name, mask
        self.rest, self.ended, self.moved = b"", False, time.monotonic()
        source.setblocking(False)
        source.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in TCP_OPTIONS.items():
            source.setsockopt(
                socket.IPPROTO_TCP, getattr(socket, "TCP_" + option), value
            )

    def write(self, chunk: Any) -> None:
        """Send what the sink takes. When it is broken, reading from it will tell why."""
        try:
            self.rest = bytes(chunk[self.sink.send(chunk) :])
        except BlockingIOError:
            self.rest = bytes(chunk)
        except OSError:
            self.rest, self.ended = b"", True


# ======================================= bridge =======================================
def log(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more: that ends Bridge.run()
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


class Bridge:
    """Connects the peers of `listener` to `target`, a row of getaddrinfo(), until run() returns."""

    def __init__(
        self, listener: socket.socket, target: Any, wake: socket.socket
    ) -> None:
        self.listener, self.wake, self.family, self.target = (
            listener,
            wake,
            target[0],
            target[4],
        )
        self.pumps: Dict[int, Pump] = {}  # by the file descriptor of the source
        self.repeats: Dict[str, int] = {}  # how often a line was not logged again
        self.epoll, self.buffer = select.epoll(), memoryview(bytearray(CHUNK))
        self.now = self.due = time.monotonic()
        self.epoll.register(listener, IN)
        self.epoll.register(wake, IN)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a file cannot be watched; a terminal sends SIGHUP
                if stream and not stream.isatty():
                    self.epoll.register(stream, 0)

    def run(self) -> None:  # until a signal, or until nobody reads the log any more
        while True:
            events = self.epoll.poll(TICK)
            self.now = time.monotonic()
            for fd, _ in events:
                if fd in self.pumps:
                    self.serve(self.pumps[fd])
                elif fd == self.listener.fileno():
                    self.accept()
                elif fd in (
                    1,
                    2,
                    self.wake.fileno(),
                ):  # else it was closed a moment ago
                    return
            if self.now >= self.due:
                self.tick()

    def accept(self) -> None:
        try:
            far = socket.socket(self.family)  # first: who is accepted can be served
            near, address = self.listener.accept()
            out = Pump(
                near, far, address[0], NOTHING
            )  # connected or refused: back tells
            back = Pump(far, near, "{}:{}".format(*self.target), OUT)
            with suppress(BlockingIOError):
                far.connect(self.target)
        except OSError as error:  # out of descriptors, or no route
            self.complain(f"cannot take new connections: {error.strerror}")
            self.epoll.modify(
                self.listener, NOTHING
            )  # until one ends, or the next tick
            return
        for pump in (out, back):
            self.pumps[pump.source.fileno()] = pump
            self.epoll.register(pump.source, pump.mask)

    def serve(self, pump: Pump) -> None:
        """Carry what can be carried to and from the source of this pump."""
        twin = self.pumps[pump.sink.fileno()]
        pump.moved = twin.moved = self.now
        try:
            if twin.rest:
                twin.write(twin.rest)
            if not pump.rest and not pump.ended:
                count = pump.source.recv_into(self.buffer)
                pump.ended = not count
                pump.write(self.buffer[:count])
        except BlockingIOError:
            pass
        except OSError as error:
            self.complain(f"{pump.name}: {error.strerror}")
            pump.ended, twin.ended, twin.rest = True, True, b""
        for one, other in ((pump, twin), (twin, pump)):
            if one.ended:  # so nothing waits: else it had not been read
                with suppress(OSError):  # again does no harm
                    one.sink.shutdown(socket.SHUT_WR)
            mask = (0 if one.rest or one.ended else IN) | (
                OUT if other.rest else 0
            ) or NOTHING
            if mask != one.mask:
                self.epoll.modify(one.source, mask)
                one.mask = mask
        if pump.mask == twin.mask == NOTHING:
            self.close(pump)

    def close(self, pump: Pump) -> None:
        for end in (pump.source, pump.sink):
            del self.pumps[end.fileno()]
            end.close()  # which takes it out of the epoll as well
        self.epoll.modify(self.listener, IN)

    def complain(self, line: str) -> None:
        count = self.repeats[line] = self.repeats.get(line, -1) + 1
        if not count:
            log(line)

    def tick(self) -> None:
        self.due = self.now + TICK
        for pump in list(self.pumps.values()):
            if (
                pump.source.fileno() in self.pumps
                and self.now - pump.moved > IDLE_LIMIT
            ):
                self.complain(f"{pump.name}: closed, silent for {IDLE_LIMIT} s")
                self.close(pump)
        for line, count in self.repeats.items():
            if count:
                log(f"{line} ({count} more in {TICK} s)")
        self.repeats = {line: 0 for line, count in self.repeats.items() if count}
        self.epoll.modify(self.listener, IN)


# ==================================== command line ====================================
def parse_port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port (1 to 65535; 0: any that is free)"
        )
    return int(text)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="port_forward.py", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--host", default="0.0.0.0", help="listen here; default %(default)s"
    )
    parser.add_argument(
        "--local-port", default=13580, type=parse_port, help="default %(default)s"
    )
    parser.add_argument(
        "--remote-host", default="127.0.0.1", help="go there; default %(default)s"
    )
    parser.add_argument(
        "--remote-port", default=13579, type=parse_port, help="default %(default)s"
    )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"{unknown[0]}: not --host, --local-port, --remote-host, --remote-port"
        )
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # `wake` has recorded it
    resource.setrlimit(
        resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2
    )
    ends = (args.host, args.local_port), (args.remote_host, args.remote_port)
    if 0 in ends[1] or ends[1] == (
        args.host.replace("0.0.0.0", "127.0.0.1"),
        args.local_port,
    ):
        parser.error(
            "--remote-port: 1 to 65535, and not the port that it listens on itself"
        )
    try:
        near, far = [
            min(socket.getaddrinfo(*end, type=socket.SOCK_STREAM)) for end in ends
        ]
        listener = socket.socket(near[0])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(near[4])
        listener.listen(BACKLOG)
    except (socket.gaierror, UnicodeError) as error:
        parser.error(
            f"--host {args.host!r}, --remote-host {args.remote_host!r}: {error}"
        )
    except OSError as error:
        parser.exit(
            1, "error: cannot listen on {}:{}: {}\n".format(*ends[0], error.strerror)
        )
    log(
        "listening on {}:{}, carrying to {}:{}".format(
            *listener.getsockname()[:2], *far[4][:2]
        )
    )
    Bridge(listener, far, wake).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
