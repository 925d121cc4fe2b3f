"""The bridge: real processes over loopback, every byte compared."""

import contextlib
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

import beside
import support
from support import HOST, PATIENCE, eventually

import port_forward  # found by way of support

load_tests = beside.load_tests  # in a process of its own: it mostly waits

MIB = 1 << 20
FALSE_MODULES = (  # a user's files could have these names
    "argparse",
    "contextlib",
    "importlib",
    "json",
    "multiprocessing",
    "resource",
    "select",
    "signal",
    "socket",
    "typing",
)
PATCHED = """\
import sys; sys.path.insert(0, %r)
import port_forward
%%s
sys.exit(port_forward.main())
"""

# Tells at its end how many pumps there are; those in cycles would be.
COUNT_PUMPS = """\
import atexit, gc
gc.disable()
atexit.register(lambda: print("pumps:", sum(
    isinstance(thing, port_forward.Pump) for thing in gc.get_objects())))
"""


def start_bridge(remote_port, *flags, patch="", **more):
    """A bridge to that port of this machine; .port is where it listens."""
    words = ["-c", PATCHED % support.ROOT % patch] if patch else ["port_forward.py"]
    words += ["--host", HOST, "--local-port", "0", "--remote-port", remote_port]
    bridge = support.start(*words, *flags, **more)
    bridge.port = bridge.listening()
    return bridge


def connect(port):
    return socket.create_connection((HOST, port), PATIENCE)


def receive(sock, size=1 << 62):
    """All that comes until the end, or `size` bytes of it."""
    received = bytearray()
    while len(received) < size:
        chunk = sock.recv(min(MIB, size - len(received)))
        if not chunk:
            break
        received += chunk
    return bytes(received)


def send_in_pieces(sock, data, seed):
    """Everything, in pieces of 1 byte to 300 kB, then the end."""
    pieces, at = random.Random(seed), 0
    while at < len(data):
        size = pieces.choice((1, 10, 1000, 100000, 300000))
        sock.sendall(data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


def together(*calls):
    """Run them on threads of their own; the list of what they returned."""
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True)
        for index in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    return results


def reset(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def cpu_seconds(pid):
    with open("/proc/%d/schedstat" % pid) as file:
        return int(file.read().split()[0]) / 1e9


def tcp_table():
    """The rows of /proc/net/tcp: 1 local, 2 remote, 3 state, 4 queues, 5 timer, 9 inode."""
    with open("/proc/net/tcp") as file:
        return [line.split() for line in file.readlines()[1:]]


def folder_of_false_modules(test, *tools):
    """A folder with copies of these tools and files that hide the standard library."""
    folder = tempfile.mkdtemp(prefix="sentinel-false-")
    test.addCleanup(shutil.rmtree, folder)
    for name in FALSE_MODULES:
        with open(os.path.join(folder, name + ".py"), "w") as file:
            file.write("raise SystemExit('the false %s was imported')\n" % name)
    for name in tools:
        shutil.copy(os.path.join(support.ROOT, name), folder)
    return folder


class BridgeTest(unittest.TestCase):
    """Each test has a far side, `self.far`, and a bridge to it."""

    patch = ""

    def setUp(self):
        self.far = socket.socket()
        self.addCleanup(self.far.close)
        self.far.bind((HOST, 0))
        self.far.listen(1024)
        self.far.settimeout(PATIENCE)
        self.bridge = start_bridge(self.far.getsockname()[1], patch=self.patch)
        self.addCleanup(self.bridge.stop)

    def pair(self):
        """A near socket and the far one that it is connected to."""
        near = connect(self.bridge.port)
        self.addCleanup(near.close)
        far = self.far.accept()[0]
        self.addCleanup(far.close)
        far.settimeout(PATIENCE)
        return near, far

    def descriptors(self):
        """How many it has open; its epoll, made after "listening on", is one of them."""

        def count():
            folder = "/proc/%d/fd/" % self.bridge.pid
            links = [os.readlink(folder + name) for name in os.listdir(folder)]
            return len(links) if "anon_inode:[eventpoll]" in links else None

        return eventually(count)


class Bytes(BridgeTest):
    def test_random_pieces_arrive_as_they_were_sent_both_ways_at_once(self):
        near, far = self.pair()
        out, back = os.urandom(3 * MIB + 17), os.urandom(2 * MIB + 1)
        _, _, at_far, at_near = together(
            lambda: send_in_pieces(near, out, 1),
            lambda: send_in_pieces(far, back, 2),
            lambda: receive(far),
            lambda: receive(near),
        )
        self.assertTrue(at_far == out and at_near == back, "not what was sent")

    @support.slow("64 MiB")
    def test_64_mib_both_ways_at_once_are_byte_exact(self):
        near, far = self.pair()
        out, back = os.urandom(MIB + 3) * 64, os.urandom(MIB + 5) * 64
        _, _, at_far, at_near = together(
            lambda: (near.sendall(out), near.shutdown(socket.SHUT_WR)),
            lambda: (far.sendall(back), far.shutdown(socket.SHUT_WR)),
            lambda: receive(far),
            lambda: receive(near),
        )
        self.assertTrue(at_far == out and at_near == back, "not what was sent")

    def test_small_samples_arrive_at_once_and_one_by_one(self):
        near, far = self.pair()
        for number in range(200):
            near.sendall(b"%d" % number)
            self.assertEqual(far.recv(100), b"%d" % number)
            far.sendall(b"ok\n")
            self.assertEqual(near.recv(100), b"ok\n")

    def test_300_connections_at_once_each_get_their_own_bytes(self):
        self.bridge.send_signal(
            signal.SIGSTOP
        )  # it has no time for the first hundred yet
        nears = [connect(self.bridge.port) for _ in range(100)]
        self.bridge.send_signal(signal.SIGCONT)
        nears += [connect(self.bridge.port) for _ in range(200)]
        for near in nears:
            self.addCleanup(near.close)
            near.sendall(b"from %5d" % near.getsockname()[1])
        fars = []
        for _ in nears:
            fars.append(self.far.accept()[0])
            self.addCleanup(fars[-1].close)
            fars[-1].sendall(receive(fars[-1], 10).replace(b"from", b"to"))
        for near in nears:
            self.assertEqual(receive(near, 8), b"to %5d" % near.getsockname()[1])

    @support.slow("a slow reader")
    def test_a_slow_reader_makes_the_writer_wait_and_gets_everything(self):
        near, far = self.pair()
        before = self.memory()
        near.setblocking(False)
        data, sent = os.urandom(MIB) * 64, 0
        while select.select([], [near], [], 0.5)[1]:  # until the whole way is full
            sent += near.send(data[sent:])
        self.assertLess(sent, len(data), "nothing ever waited")
        self.assertLess(
            self.memory() - before, 4 * MIB, "the bridge keeps what the kernel should"
        )
        near.setblocking(True)
        rest, received = together(
            lambda: (near.sendall(data[sent:]), near.shutdown(socket.SHUT_WR)),
            lambda: receive(far),
        )
        self.assertTrue(received == data, "not what was sent")

    def memory(self):
        with open("/proc/%d/statm" % self.bridge.pid) as file:
            return int(file.read().split()[1]) * resource.getpagesize()


class Ends(BridgeTest):
    def test_a_half_close_is_passed_on_after_the_bytes_before_it(self):
        for name in ("near", "far"):
            with self.subTest("the %s side ends first" % name):
                first, second = self.pair() if name == "near" else self.pair()[::-1]
                data, answer = os.urandom(5 * MIB), os.urandom(5 * MIB)
                sender = threading.Thread(target=send_in_pieces, args=(first, data, 3))
                sender.start()
                self.assertTrue(receive(second) == data, "not what was sent")
                sender.join()
                second.sendall(answer[:1])
                self.assertEqual(
                    receive(first, 1), answer[:1]
                )  # the other way still lives
                sender = threading.Thread(
                    target=send_in_pieces, args=(second, answer[1:], 4)
                )
                sender.start()
                self.assertTrue(receive(first) == answer[1:], "not what was sent")
                sender.join()

    def test_both_sockets_are_closed_once_both_sides_have_ended(self):
        before = self.descriptors()
        near, far = self.pair()
        near.close()
        self.assertEqual(receive(far), b"")
        self.assertEqual(self.descriptors(), before + 2)
        far.close()
        eventually(lambda: self.descriptors() == before)

    def test_a_reset_on_one_side_closes_the_other_with_one_line_in_the_log(self):
        for name, host in (
            ("far", r"127\.0\.0\.1:%d" % self.far.getsockname()[1]),
            ("near", r"127\.0\.0\.1"),
        ):
            with self.subTest(name):
                before = self.descriptors()
                near, far = self.pair()
                gone, left = (near, far) if name == "near" else (far, near)
                reset(gone)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(receive(left), b"")
                self.bridge.logged(r"(?m)^[\d:]+ %s: Connection reset by peer$" % host)
                eventually(
                    lambda before=before: self.descriptors() == before,
                    what="the bridge keeps nothing, although the other side is still open",
                )

    def test_what_the_far_side_sent_before_it_vanished_still_arrives(self):
        near, far = self.pair()
        far.sendall(b"error no such thing\n")
        self.assertEqual(receive(near, 5), b"error")  # it has reached the near side
        reset(far)
        self.assertEqual(receive(near), b" no such thing\n")

    def test_writing_to_a_side_that_has_gone_ends_the_writer_too(self):
        near, far = self.pair()
        far.close()
        self.assertEqual(receive(near), b"")
        with self.assertRaises(OSError):
            for _ in range(1000):
                near.sendall(b"sample" * 1000)
                time.sleep(0.001)
        self.assertNotIn(
            " 127.0.0.1: ", self.bridge.log, "the near side is not to blame"
        )

    @support.slow("watches it idle")
    def test_an_end_that_waits_behind_a_reader_that_does_not_read_burns_nothing(self):
        near, far = self.pair()
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(receive(far), b"")
        data, sent = os.urandom(MIB) * 32, 0
        far.setblocking(False)
        while not self.waits(far):  # until the near side takes no more
            sent += far.send(data[sent : sent + MIB // 4])
            self.assertLess(sent, len(data), "nothing ever waited")
        far.close()  # so epoll has an EPOLLHUP to report that nobody can act on
        before = cpu_seconds(self.bridge.pid)
        time.sleep(0.5)  # the time over which it is measured
        self.assertLess(cpu_seconds(self.bridge.pid) - before, 0.1)
        self.assertTrue(receive(near) == data[:sent], "not what was sent")

    def waits(self, far):
        """Whether the bridge sleeps before what the far side has sent; False once it has all.

        There is room for more in its far socket then, so that an end arrives there.
        """
        looks, deadline = 0, time.monotonic() + PATIENCE
        while looks < 5:
            self.assertLess(time.monotonic(), deadline, "the bridge does not sleep")
            unread = self.unread()
            if not unread and not self.unsent(far):
                return False
            looks = looks + 1 if unread and self.state() == "S" else 0
            time.sleep(0.01 if looks == 0 else 0.1)
        return True

    def state(self):
        """What the bridge does: S is to sleep, proc(5)."""
        with open("/proc/%d/stat" % self.bridge.pid) as file:
            return file.read().rpartition(")")[2].split()[0]

    def unread(self):
        """The bytes that the bridge has not read from its far socket."""
        return int(self.queues(self.far.getsockname()[1]).split(":")[1], 16)

    def unsent(self, far):
        """The bytes that the far side's kernel has not got rid of."""
        return int(self.queues(far.getpeername()[1]).split(":")[0], 16)

    def queues(self, port):
        """What waits to be sent and to be read, UNSENT:UNREAD, where the peer has that port."""
        rows = [row for row in tcp_table() if row[2].endswith(":%04X" % port)]
        return rows[0][4]

    def test_a_killed_bridge_ends_both_sides_and_its_port_is_free_again_at_once(self):
        near, far = self.pair()
        self.bridge.stop(signal.SIGKILL)
        for side in (near, far):
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(receive(side), b"")
        with support.start(
            "port_forward.py",
            "--host",
            HOST,
            "--local-port",
            self.bridge.port,
            "--remote-port",
            self.far.getsockname()[1],
        ) as again:
            self.assertEqual(again.listening(), self.bridge.port)

    def test_keepalive_is_on_for_both_sides_and_nothing_waits_to_be_sent(self):
        one, other = self.pair()
        port_forward.Pump(one, other, "", 0.0)
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ):
            self.assertEqual(one.getsockopt(level, option), value)
        ports = (":%04X" % self.bridge.port, ":%04X" % self.far.getsockname()[1])
        timers = {
            tuple(row[1:3]): row[5][:2]
            for row in tcp_table()
            if row[3] == "01"
            and (row[1].endswith(ports[0]) or row[2].endswith(ports[1]))
        }  # rows may repeat
        self.assertEqual(list(timers.values()), ["02", "02"], "02 is a keepalive timer")


class NothingKept(BridgeTest):
    patch = COUNT_PUMPS

    def test_what_ended_is_freed_at_once_and_not_left_to_the_garbage_collector(self):
        before = self.descriptors()
        for end in (socket.socket.close, reset):
            for turn in (1, -1):
                first, last = self.pair()[::turn]
                end(first)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(receive(last), b"")
                last.close()
        eventually(lambda: self.descriptors() == before)
        self.bridge.stop()
        self.assertEqual(self.bridge.out, "pumps: 0\n")


class Limits(unittest.TestCase):
    def far_side(self):
        far = socket.socket()
        self.addCleanup(far.close)
        far.bind((HOST, 0))
        far.listen(1024)
        far.settimeout(PATIENCE)
        return far

    def bridge(self, far, **more):
        bridge = start_bridge(
            far.getsockname()[1] if isinstance(far, socket.socket) else far, **more
        )
        self.addCleanup(bridge.stop)
        return bridge

    def test_a_refused_far_side_closes_the_near_one_and_repeats_are_one_line_with_a_count(
        self,
    ):
        bridge = self.bridge(support.closed_port(), patch="port_forward.TICK = 2")
        start = time.monotonic()
        for _ in range(50):
            with connect(bridge.port) as near, contextlib.suppress(
                ConnectionResetError
            ):
                self.assertEqual(receive(near), b"")
        refused = r"127\.0\.0\.1:\d+: Connection refused(?: \((\d+) more in 2 s\))?\n"
        eventually(
            lambda: (
                sum(int(count or 1) for count in re.findall(refused, bridge.log)) == 50
            )
        )
        self.assertLess(
            len(re.findall(refused, bridge.log)), 3 + (time.monotonic() - start) / 2
        )

    @support.slow("waits for a limit")
    def test_a_silent_connection_is_closed_after_the_idle_limit_and_a_live_one_is_not(
        self,
    ):
        far = self.far_side()
        bridge = self.bridge(
            far, patch="port_forward.IDLE_LIMIT, port_forward.TICK = 3, 0.2"
        )
        live, live_far = connect(bridge.port), far.accept()[0]
        silent, silent_far = connect(bridge.port), far.accept()[0]
        for sock in (live, live_far, silent, silent_far):
            self.addCleanup(sock.close)
        start = time.monotonic()
        while not select.select([silent], [], [], 0.5)[0]:
            live.sendall(b"sample")
            self.assertLess(time.monotonic() - start, PATIENCE)
        self.assertGreater(time.monotonic() - start, 2.8)
        self.assertEqual(receive(silent) + receive(silent_far), b"")
        bridge.logged("closed, silent for 3 s")
        live.sendall(b"the end")
        live.shutdown(socket.SHUT_WR)
        self.assertTrue(receive(live_far).endswith(b"samplethe end"))

    def test_the_idle_limit_is_out_of_reach_of_the_slowest_agent(self):
        self.assertGreater(port_forward.IDLE_LIMIT, 2 * 60)

    def test_out_of_descriptors_is_one_line_and_those_who_wait_are_served_later(self):
        far = self.far_side()
        bridge = self.bridge(
            far,
            patch="import resource; resource.setrlimit("
            "resource.RLIMIT_NOFILE, (30, 30))",
        )
        nears = [connect(bridge.port) for _ in range(40)]
        for near in nears:
            self.addCleanup(near.close)
            near.sendall(b"x")
        bridge.logged("cannot take new connections: Too many open files")
        before = cpu_seconds(bridge.pid)
        time.sleep(0.5)  # the time over which it is measured
        self.assertLess(cpu_seconds(bridge.pid) - before, 0.1)
        served = 0
        while served < len(nears):
            far_end = far.accept()[0]
            self.assertEqual(far_end.recv(1), b"x")
            far_end.close()
            nears[served].close()
            served += 1
        self.assertEqual(bridge.log.count("Too many open files"), 1)
        with connect(bridge.port) as near:
            near.sendall(b"again")
            with far.accept()[0] as far_end:
                self.assertEqual(receive(far_end, 5), b"again")

    def test_the_limit_of_descriptors_is_raised_as_far_as_allowed(self):
        far = self.far_side()
        bridge = self.bridge(
            far,
            patch="import resource; resource.setrlimit("
            "resource.RLIMIT_NOFILE, (30, 300))",
        )
        with contextlib.ExitStack() as sockets:
            for _ in range(100):
                sockets.enter_context(connect(bridge.port))
                sockets.enter_context(far.accept()[0])
        self.assertNotIn("Too many", bridge.log)

    def test_idle_connections_cost_nothing(self):
        far = self.far_side()
        bridge = self.bridge(far)
        with contextlib.ExitStack() as sockets:
            for _ in range(200):
                sockets.enter_context(connect(bridge.port))
                sockets.enter_context(far.accept()[0])
            before = cpu_seconds(bridge.pid)
            time.sleep(1)  # the time over which it is measured
            self.assertLess(cpu_seconds(bridge.pid) - before, 0.01)

    def test_only_changes_are_logged(self):
        far = self.far_side()
        bridge = self.bridge(far)
        for _ in range(20):
            with connect(bridge.port), far.accept()[0]:
                pass
        self.assertEqual(len(bridge.log.splitlines()), 1, bridge.log)


class CommandLine(unittest.TestCase):
    def test_a_busy_port_is_one_line_and_exit_1(self):
        with socket.socket() as other:
            other.bind((HOST, 0))
            other.listen(1)
            port = other.getsockname()[1]
            done = support.run("port_forward.py", "--host", HOST, "--local-port", port)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(
            done.stderr,
            r"^error: cannot listen on 127\.0\.0\.1:%d: Address already "
            r"in use[^\n]*\n$" % port,
        )

    def test_a_mistake_is_one_line_with_what_is_allowed_and_exit_2(self):
        table = (
            (["--local-port", "65536"], r"--local-port: '65536' is no port \(.*65535"),
            (["--local-port", "-1"], "--local-port"),
            (["--local-port", "ssh"], "--local-port: 'ssh' is no port"),
            (["--remote-port", "0"], "--remote-port: 1 to 65535"),
            (["--remote-port", "9" * 5000], "--remote-port"),
            (["--remote-port"], "--remote-port: expected one argument"),
            (
                ["--port", "1"],
                "--port: not --host, --local-port, --remote-host, --remote-port",
            ),
            (["more"], "more: not --host, --local-port, --remote-host, --remote-port"),
            (["--host", "no host"], "--host 'no host'.* not known|--host"),
            (["--remote-host", ""], "--remote-host ''"),
            (["--remote-host", "a..b"], "--remote-host 'a..b'"),
            (["--host", "a\x1b[31m"], r"--host 'a\\x1b"),
            (
                ["--local-port", "7", "--remote-port", "7"],
                "not the port that it listens on",
            ),
        )
        every = support.run_each("port_forward.py", [flags for flags, _ in table])
        every.append(support.run("port_forward.py", *table[0][0]))
        for done, (flags, says) in zip(every, [*table, table[0]]):
            with self.subTest(" ".join(flags)[:80]):
                self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                self.assertRegex(done.stderr, says)

    def test_an_address_of_another_machine_is_one_line_and_exit_1(self):
        done = support.run(
            "port_forward.py", "--host", "192.0.2.1", "--local-port", "0"
        )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(
            done.stderr, r"^error: cannot listen on 192\.0\.2\.1:0: [^\n]+\n$"
        )

    def test_sigint_and_sigterm_end_it_with_0_also_in_the_midst_of_traffic(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(signal.Signals(number).name), socket.socket() as listener:
                listener.bind((HOST, 0))
                listener.listen(1)
                with start_bridge(listener.getsockname()[1]) as bridge, connect(
                    bridge.port
                ) as near, listener.accept()[0]:
                    near.sendall(b"x" * MIB)
                    start = time.monotonic()
                    bridge.send_signal(number)
                    self.assertEqual(bridge.wait(), 0)
                    self.assertLess(time.monotonic() - start, 2)
                    self.assertNotIn("Traceback", bridge.log)

    def test_sighup_ends_it_with_0_unless_it_was_ignored_at_the_start(self):
        with start_bridge(support.closed_port()) as bridge:
            bridge.send_signal(signal.SIGHUP)
            self.assertEqual(bridge.wait(), 0)
            self.assertNotIn("Traceback", bridge.log)

        def ignore_hangup():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        port = support.closed_port()
        with start_bridge(port, preexec_fn=ignore_hangup) as bridge:
            bridge.send_signal(signal.SIGHUP)
            with connect(bridge.port):
                bridge.logged("Connection refused")
            bridge.send_signal(signal.SIGTERM)
            self.assertEqual(bridge.wait(), 0)

    def test_the_users_own_modules_beside_the_script_are_not_looked_at(self):
        folder = folder_of_false_modules(self, "port_forward.py")
        script = os.path.join(folder, "port_forward.py")
        for flags in ((), ("-I",)):
            with self.subTest("beside it, %s" % (flags,)), support.start(
                *flags, script, "--host", HOST, "--local-port", "0"
            ) as bridge:
                bridge.listening()
        with self.subTest("in the working directory"), open(
            script
        ) as text, support.start(
            "-", "--host", HOST, "--local-port", "0", stdin=text, cwd=folder
        ) as bridge:
            bridge.listening()

    def test_a_system_without_unix_parts_is_told_in_one_line(self):
        for missing in (
            "sys.modules['resource'] = None; import select; del select.epoll",
            "import select; del select.epoll",
        ):
            with self.subTest(missing):
                code = "import sys; %s; sys.path.insert(0, %r); %s" % (
                    missing,
                    support.ROOT,
                    "import port_forward; port_forward.main([])",
                )
                done = support.run("-c", code)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, r"\Aerror: .*needs Linux.*WSL.*\n\Z")

    def test_help_says_what_it_is_for_and_gives_an_example(self):
        done = support.run("port_forward.py", "--help")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("carries TCP connections", done.stdout)
        self.assertRegex(done.stdout, r"ssh -R \S+ login 'python3 - .*port_forward\.py")

    def test_it_carries_to_and_from_ipv6_where_there_is_some(self):
        listener = socket.socket(socket.AF_INET6)
        self.addCleanup(listener.close)
        try:
            listener.bind(("::1", 0))
        except OSError:
            self.skipTest("missing here: IPv6")
        listener.listen(1)
        with start_bridge(
            listener.getsockname()[1], "--remote-host", "::1"
        ) as bridge, connect(bridge.port) as near, listener.accept()[0] as far:
            near.sendall(b"six")
            self.assertEqual(receive(far, 3), b"six")

    def test_it_works_from_standard_input_and_ends_when_nobody_reads_it_any_more(self):
        for end in ("pipe", "socket"):  # sshd has either, as it was built
            for stream in ("stdout", "stderr"):
                with self.subTest("%s is a %s" % (stream, end)):
                    ours, theirs = (
                        [sock.detach() for sock in socket.socketpair()]
                        if end == "socket"
                        else os.pipe()
                    )
                    streams = {
                        "stdout": subprocess.DEVNULL,
                        "stderr": subprocess.DEVNULL,
                    }
                    streams[stream] = theirs
                    with open(
                        os.path.join(support.ROOT, "port_forward.py")
                    ) as script, support.start(
                        "-",
                        "--host",
                        HOST,
                        "--local-port",
                        "0",
                        stdin=script,
                        **streams,
                    ) as bridge:
                        os.close(theirs)
                        eventually(lambda bridge=bridge: self.listens(bridge.pid))
                        os.close(ours)
                        self.assertEqual(bridge.wait(5), 0)

    def test_a_log_in_a_file_ends_nothing(self):
        with open(os.devnull, "w") as log, support.start(
            "port_forward.py",
            "--host",
            HOST,
            "--local-port",
            "0",
            stdout=log,
            stderr=log,
        ) as bridge:
            eventually(lambda: self.listens(bridge.pid))
            support.stays(lambda: bridge.code is None, 0.5)

    @staticmethod
    def listens(pid):
        """Whether one of its sockets is a TCP listener."""
        folder = "/proc/%d/fd/" % pid
        links = [os.readlink(folder + fd) for fd in os.listdir(folder)]
        return any(
            "socket:[%s]" % row[9] in links for row in tcp_table() if row[3] == "0A"
        )


if __name__ == "__main__":
    unittest.main()
