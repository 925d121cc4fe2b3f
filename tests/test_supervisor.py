"""The master as a set of processes: how it ends, what it leaves, what it survives."""

import contextlib
import functools
import os
import pickle
import random
import re
import signal
import socket
import threading
import time
import shutil
import tempfile
import unittest
import unittest.mock

import beside
import support
from support import (
    HOST,
    PlainAgent,
    alive,
    descendants,
    eventually,
    events,
    get,
    nodes,
    requires,
    row_of,
    stays,
)

import master_server

load_tests = beside.load_tests  # in a process of its own: it mostly waits

BACK = 5  # seconds until a killed role answers again on the same port
SHOWN = 10  # seconds until the agents are shown again
# what a tool must never say, whatever was done to it
NOISE = "Traceback|resource_tracker|leaked|Exception ignored|Warning:|Error\\b"


def role_pid(master, role):
    """The pid of the role's latest process; its start is a line in the log."""
    return int(re.findall(r"%s started, pid (\d+)" % role, master.log)[-1])


def assert_healthy(master):
    """Within the limit; a collector that has just been started has not beaten yet."""
    eventually(lambda: get(master.page, "/healthz").status == 200, BACK, "healthy")


class SenderLoop:
    """Agents that send ten times a second and connect again whenever they lose the master."""

    def __init__(self, port, count):
        self.port, self.ended = port, threading.Event()
        self.names = {"load%d" % number for number in range(count)}
        self.threads = [
            threading.Thread(target=self.run, args=(name,), daemon=True)
            for name in self.names
        ]
        for thread in self.threads:
            thread.start()

    def run(self, name):
        while not self.ended.wait(0.05):
            with contextlib.suppress(OSError), PlainAgent(self.port) as agent:
                while not self.ended.wait(0.1):
                    agent.send({"cpu": 50, "ram": 50, "node": name})

    def shown(self, page):
        rows = nodes(page)
        return {row["node"] for row in rows if row["age"] < 2} == self.names and len(
            rows
        ) == len(self.names)

    def close(self):
        self.ended.set()
        for thread in self.threads:
            thread.join()


SIGNAL_AT_ONCE = """
import os
create = master_server.Table.create

def create_and_be_told(*arguments):
    table = create(*arguments)
    os.kill(os.getpid(), %d)
    return table

master_server.Table.create = create_and_be_told
"""


class Neighbours(unittest.TestCase):
    """What may lie beside the master, and where it cannot run."""

    def test_modules_of_the_users_own_beside_it_do_not_hide_the_standard_library(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        for name in ("json", "select", "socket", "queue", "html", "signal", "logging"):
            with open(os.path.join(folder, name + ".py"), "w") as file:
                file.write("raise RuntimeError('the wrong %s')\n" % name)
        for name in ("master_server.py", "agent.py"):
            shutil.copy(os.path.join(support.ROOT, name), folder)
        path = os.path.join(folder, "master_server.py")
        flags = ("--port", 0, "--dashboard-port", 0, "--with-agent")
        with support.start(path, *flags, cwd=folder) as master:
            page = master.listening("dashboard")
            eventually(lambda: support.nodes(page))
            self.assertEqual(master.stop(), 0)
            self.assertNotIn("Traceback", master.log)

    def test_a_system_without_unix_parts_is_told_in_one_line(self):
        # The standard library itself looks at os.name while it is imported.
        for before, after in (
            ("sys.modules['resource'] = None", "pass"),
            ("pass", "os.name = 'nt'"),
        ):
            lacking = (before, after)
            start = (
                "import os, sys; %s; import master_server; %s;"
                " sys.exit(master_server.main([]))" % lacking
            )
            with self.subTest(lacking):
                done = support.run("-c", start, cwd=support.ROOT)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, r"\Aerror: [^\n]*WSL\n\Z")


class Start(unittest.TestCase):
    def assertOneError(self, tool, reason):
        self.assertEqual(tool.wait(), 1)
        self.assertRegex(tool.log, r"\Aerror: [^\n]*%s[^\n]*\n\Z" % reason)

    def test_a_port_in_use_is_one_line_and_nothing_is_half_started(self):
        with socket.socket() as taken:
            taken.bind((HOST, 0))
            taken.listen(1)
            busy, free = taken.getsockname()[1], support.closed_port()
            name = "sentinel_of_%d" % os.getpid()
            for flags in (
                ("--port", busy, "--dashboard-port", free),
                ("--port", free, "--dashboard-port", busy),
            ):
                with self.subTest(flags), support.start(
                    "master_server.py", *flags, "--shm-name", name
                ) as master:
                    self.assertOneError(master, r"%d.*use.*port" % busy)
                    self.assertNotIn(name, support.shm_names())
                    with self.assertRaises(ConnectionRefusedError):
                        PlainAgent(free)

    def test_two_masters_on_one_machine_and_a_name_that_is_taken(self):
        with support.start_master(
            "--shm-name", "sentinel_of_%d" % os.getpid()
        ) as first, support.start_master() as second:
            for number, master in enumerate((first, second)):
                with PlainAgent(master.port) as agent:
                    agent.send({"cpu": number, "ram": 1})
                    self.assertEqual(
                        eventually(lambda m=master: nodes(m.page))[0]["cpu"], number
                    )
            with support.start(
                "master_server.py",
                "--port",
                0,
                "--dashboard-port",
                0,
                "--shm-name",
                "sentinel_of_%d" % os.getpid(),
            ) as third:
                self.assertOneError(third, r"pid %d.*--shm-name" % first.pid)
            assert_healthy(first)
            self.assertIn("sentinel_of_%d" % os.getpid(), support.shm_names())

    def test_a_name_of_shared_memory_that_something_else_uses_is_respected(self):
        name = "sentinel_other_%d" % os.getpid()
        path = "/dev/shm/" + name
        with open(path, "wb") as file:
            file.write(b"somebody else's" * 1000)
        self.addCleanup(support.unlink_shm, [name])
        with support.start(
            "master_server.py", "--port", 0, "--dashboard-port", 0, "--shm-name", name
        ) as master:
            self.assertOneError(master, "--shm-name")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), b"somebody else's" * 1000)

    def test_it_says_what_it_listens_on_and_where_to_look(self):
        with support.start_master() as master:
            self.assertRegex(
                master.log, r"collector listening on 127\.0\.0\.1:%d" % master.port
            )
            self.assertRegex(
                master.log, r"dashboard listening on 127\.0\.0\.1:%d" % master.page
            )
            self.assertIn("http://localhost:%d" % master.page, master.log)
            self.assertIn("Ctrl-C", master.log)
            self.assertEqual(master.out, "")

    @support.slow("other Pythons")
    @requires("python 3.6", "python 3.7")
    def test_an_old_python_is_told_what_is_needed_and_how_to_get_it(self):
        for version in ((3, 6), (3, 7)):
            for tool in ("master_server.py", "test_reader.py"):
                with self.subTest(tool=tool, version=version):
                    done = support.run(tool, python=support.pythons()[version])
                    self.assertEqual((done.returncode, done.stdout), (1, ""))
                    self.assertRegex(
                        done.stderr,
                        r"\Aerror: .*3\.8.*%d\.%d.*python3\.11.*"
                        r"module load python.*\n\Z" % version,
                    )

    def test_it_works_on_ipv6_too(self):
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                self.skipTest("no IPv6 here")
        with support.start_master(
            "--host", "::1", "--dashboard-host", "::1"
        ) as master, PlainAgent(master.port, "::1") as agent:
            agent.send({"cpu": 1, "ram": 1})
            row = eventually(
                lambda: support.json.loads(
                    get(master.page, "/api/nodes", host="::1").text
                )["nodes"]
            )[0]
            self.assertEqual(row["address"], "('::1', %d)" % agent.address[1])


class Addresses(unittest.TestCase):
    """What is told of where the page is."""

    def told(self, dashboard_port, taken):
        """What is logged by a master with that flag, where so many ports are taken."""
        with contextlib.ExitStack() as stack:
            usual = support.closed_port()
            for port in range(usual, usual + taken):
                other = stack.enter_context(socket.socket())
                other.bind((HOST, port))
                other.listen(1)
            stack.enter_context(
                unittest.mock.patch.object(master_server, "PAGE_PORT", usual)
            )
            words = ["--my-jobs", "--port", "0"]
            if dashboard_port is not None:
                words += ["--dashboard-port", str(dashboard_port)]
            options = master_server.build_parser().parse_args(words)
            options.secret, options.rules, options.lost = None, [], True
            master_server.listen(options, stack)
            logs = stack.enter_context(self.assertLogs("sentinel"))
            master_server.tell_addresses(options)
            return usual, "\n".join(logs.output)

    def test_a_page_that_had_to_move_says_what_to_type_on_the_laptop(self):
        usual, words = self.told(None, taken=1)
        self.assertIn("port %d is taken" % usual, words)
        found = re.search(r"ssh -L (\d+):localhost:(\d+)", words)
        self.assertEqual(found.group(1), found.group(2))
        self.assertGreater(int(found.group(1)), usual)

    def test_a_page_at_its_usual_port_or_the_one_asked_for_says_nothing_of_it(self):
        self.assertNotIn("taken", self.told(None, taken=0)[1])
        self.assertNotIn("taken", self.told(0, taken=1)[1])


TREE_KEPT = 8 * 2**20  # bytes, and more: the parse tree of the program


def resident_bytes(pid):
    """The memory that the process has, proc(5)."""
    with open("/proc/%d/statm" % pid) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def has_own_words():
    """Does the interpreter tell how it was called?"""
    tells = support.run("-c", "import sys; print(hasattr(sys, 'orig_argv'))").stdout
    return tells.strip() == "True"


class AsTyped(unittest.TestCase):
    """`python3 master_server.py`: one process, without the tree that it was parsed into."""

    def test_no_process_keeps_the_tree_that_the_program_was_parsed_into(self):
        path = os.path.join(support.ROOT, "master_server.py")
        flags = ("--port", "0", "--dashboard-port", "0")
        with open(path, "rb") as file:
            from_pipe = support.start("-", *flags, stdin=file)
        self.addCleanup(from_pipe.kill)
        from_file = support.start_master(as_typed=True)
        self.addCleanup(from_file.kill)
        if not has_own_words():
            self.skipTest("Python before 3.10 does not tell its own words")
        for role in ("collector", "dashboard"):
            pids = [
                int(tool.logged(r"%s started, pid (\d+)" % role).group(1))
                for tool in (from_pipe, from_file)
            ]
            saved = resident_bytes(pids[0]) - resident_bytes(pids[1])
            self.assertGreater(saved, TREE_KEPT, role)

    def test_it_stays_one_process_with_its_words_and_those_of_its_interpreter(self):
        words = ("-W", "error", os.path.join(support.ROOT, "master_server.py"))
        flags = ("--port", "0", "--dashboard-port", "0", "--shm-name", "own_words")
        master = support.start(*words, *flags)
        self.addCleanup(master.kill)
        master.logged("dashboard started")
        with open("/proc/%d/cmdline" % master.pid) as file:
            told = file.read().split("\0")
        self.assertEqual(told[1:3], ["-W", "error"])
        self.assertEqual(told[-len(flags) - 1 : -1], list(flags))
        self.assertEqual(len(support.descendants(master.pid)), 2)
        self.assertEqual(master.stop(), 0)

    def test_what_it_tells_the_c_library_no_other_program_hears(self):
        heard = re.compile(r"(?m)^GLIBC_TUNABLES=(.*)$")
        for own, of_master, of_child in (
            ({}, ["glibc.malloc.tcache_count=0"], []),
            ({"GLIBC_TUNABLES": "glibc.malloc.check=0"},)
            + (["glibc.malloc.check=0"],) * 2,
        ):
            with self.subTest(own), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "environment")
                master = support.start_master(
                    "--alert",
                    "ram>0.1",
                    "--alert-command",
                    "env >%s.new; mv %s.new %s" % (path, path, path),
                    as_typed=True,
                    env=own,
                )
                self.addCleanup(master.kill)
                if not has_own_words():
                    self.skipTest("Python before 3.10 does not tell its own words")
                with open("/proc/%d/environ" % master.pid) as file:
                    self.assertEqual(
                        heard.findall(file.read().replace("\0", "\n")), of_master
                    )
                with support.PlainAgent(master.port) as agent:
                    agent.send({"node": "n", "cpu": 50.0, "ram": 50.0})
                    support.eventually(functools.partial(os.path.exists, path))
                with open(path) as file:
                    self.assertEqual(heard.findall(file.read()), of_child)

    def test_its_name_in_messages_is_its_own(self):
        done = support.run("master_server.py", "--nonsense", as_typed=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("master_server.py: error: ", done.stderr)


class Idle(unittest.TestCase):
    """With nobody sending and nobody watching it hardly ever wakes up, and is there at once."""

    def test_it_wakes_up_at_most_twice_a_second_in_all_of_its_processes(self):
        def rate():
            before = support.wakeups(master.pid)
            start = time.monotonic()
            stays(lambda: True, 5)
            passed = time.monotonic() - start
            return (support.wakeups(master.pid) - before) / passed

        with support.start_master() as master:
            for role in ("collector", "dashboard"):
                master.logged(role + " started")
            # the first seconds are those of the start
            eventually(lambda: rate() <= 2, what="2 wake-ups a second")
            self.assertEqual(get(master.page, "/healthz").status, 200)
            with PlainAgent(master.port) as agent:
                agent.send({"cpu": 1, "ram": 1, "ack": True})
                self.assertRegex(agent.read_line(1), "^ok")
            self.assertEqual(master.stop(), 0)


class End(unittest.TestCase):
    """Nothing is left after any ordinary end."""

    def end(self, how, method=""):
        """Start, use it, end it by `how`, and look for what it left."""
        with support.start_master(method=method) as master, PlainAgent(
            master.port
        ) as agent:
            agent.send({"cpu": 1, "ram": 1})
            eventually(lambda: nodes(master.page))
            children, segments = descendants(master.pid), support.shm_of(master.pid)
            self.assertIn("sentinel_%d" % master.port, segments)
            self.assertGreaterEqual(len(children), 2)
            how(master)
            self.assertEqual(master.wait(), 0, master.log)
            eventually(lambda: not any(map(alive, children)), 3, "no process left")
            self.assertEqual(segments & support.shm_names(), set())
            self.assertNotRegex(master.log, NOISE)
            for port in (master.port, master.page):
                with self.assertRaises(ConnectionRefusedError):
                    PlainAgent(port)
        return master

    def test_sigint_and_sigterm_end_it_with_0_and_nothing_is_left(self):
        for method in ("fork", "forkserver", "spawn"):
            numbers = [signal.SIGTERM]
            if method == "fork" or support.LONG:
                numbers.append(signal.SIGINT)
            for number in numbers:
                with self.subTest(method=method, signal=number.name):
                    self.end(lambda master, n=number: master.send_signal(n), method)

    def test_ctrl_c_in_a_terminal_reaches_all_processes_at_once(self):
        for method in ("fork", "spawn") if support.LONG else ("fork",):
            with self.subTest(method=method):
                self.end(
                    lambda master: master.send_signal(signal.SIGINT, group=True), method
                )

    def test_sigint_and_sighup_are_for_the_supervisor_and_end_no_role(self):
        for method in ("fork", "spawn") if support.LONG else ("spawn",):
            with self.subTest(method=method), support.start_master(
                method=method
            ) as master, PlainAgent(master.port) as agent:
                agent.send({"cpu": 1, "ram": 1})
                eventually(lambda m=master: nodes(m.page))
                for role in master_server.ROLES:
                    if role.name + " started" in master.log:
                        for number in (signal.SIGINT, signal.SIGHUP):
                            os.kill(role_pid(master, role.name), number)
                agent.send({"cpu": 2, "ram": 1})
                eventually(lambda m=master: row_of(m.page, cpu=2))
                self.assertNotIn("again", master.log)
                self.assertNotRegex(master.log, NOISE)

    def test_a_second_signal_while_it_stops_changes_nothing(self):
        def insist(master):
            for _ in range(200):
                for number in (signal.SIGTERM, signal.SIGINT):
                    with contextlib.suppress(ProcessLookupError):
                        master.send_signal(number, group=True)
                if master.code is not None:
                    return
                time.sleep(0.002)

        self.end(insist)

    @support.slow("many moments")
    def test_a_signal_during_the_start_ends_it_as_well(self):
        for delay in (0.0, 0.01, 0.03, 0.1):
            with self.subTest(delay=delay):
                master = support.start(
                    "master_server.py", "--port", 0, "--dashboard-port", 0
                )
                with master:
                    master.logged("collector listening")
                    stays(lambda: True, delay)
                    name = "sentinel_%d" % master.listening("collector")
                    master.send_signal(signal.SIGTERM)
                    self.assertEqual(master.wait(), 0)
                    self.assertNotIn(name, support.shm_names())
                    self.assertNotRegex(master.log, NOISE)

    def test_a_signal_just_after_the_segment_was_made_leaves_nothing(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            name = "sentinel_early_%d" % os.getpid()
            self.addCleanup(support.unlink_shm, [name])
            with self.subTest(number.name), support.start(
                "-c",
                support.PATCHED % (support.ROOT, SIGNAL_AT_ONCE % number),
                "--port",
                0,
                "--dashboard-port",
                0,
                "--shm-name",
                name,
            ) as master:
                self.assertEqual(master.wait(), 0)
                self.assertNotIn(name, support.shm_names())
                self.assertNotRegex(master.log, NOISE)

    @support.slow("a hundred agents")
    def test_it_ends_in_time_with_a_hundred_agents_and_open_requests(self):
        with support.start_master() as master, contextlib.ExitStack() as stack:
            for _ in range(100):
                agent = stack.enter_context(PlainAgent(master.port))
                agent.send({"cpu": 1, "ram": 1})
            for _ in range(20):
                stack.enter_context(PlainAgent(master.page)).send_bytes(b"GET / HT")
            eventually(lambda: len(nodes(master.page)) == 100)
            start = time.monotonic()
            self.assertEqual(master.stop(), 0)
            self.assertLess(time.monotonic() - start, 5)
            self.assertNotRegex(master.log, NOISE)

    def test_a_master_that_was_told_to_stop_starts_again_on_the_same_ports_at_once(
        self,
    ):
        with support.start_master() as first, PlainAgent(first.port) as agent:
            agent.send({"cpu": 1, "ram": 1})
            eventually(lambda: nodes(first.page))
            self.assertEqual(first.stop(), 0)
            ports = ("--port", first.port, "--dashboard-port", first.page)
            with support.start_master(*ports) as again:
                assert_healthy(again)


class Killed(unittest.TestCase):
    """kill -9 of any process."""

    def test_a_segment_left_by_kill_9_of_everything_is_replaced_at_the_next_start(self):
        for method in ("fork", "spawn") if support.LONG else ("spawn",):
            with self.subTest(method=method), support.start_master(
                method=method
            ) as first:
                with PlainAgent(first.port) as agent:
                    agent.send({"cpu": 1, "ram": 1, "node": "before"})
                    eventually(lambda m=first: nodes(m.page))
                    self.addCleanup(support.unlink_shm, support.shm_of(first.pid))
                    first.send_signal(signal.SIGKILL, group=True)
                    first.wait()
                name = "sentinel_%d" % first.port
                self.assertIn(name, support.shm_names())
                done = support.run("test_reader.py", "--port", first.port)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                ports = ("--port", first.port, "--dashboard-port", first.page)
                with support.start_master(*ports) as second, PlainAgent(
                    second.port
                ) as agent:
                    self.assertEqual(nodes(second.page), [])
                    agent.send({"cpu": 1, "ram": 1, "node": "after"})
                    eventually(lambda m=second: row_of(m.page, node="after"))
                    self.assertEqual(second.stop(), 0)
                self.assertNotIn(name, support.shm_names())
                self.assertNotRegex(second.log, NOISE)

    def test_a_killed_role_is_back_within_5_s_on_the_same_port_and_agents_within_10(
        self,
    ):
        ways = {"fork": ["collector", "dashboard"], "spawn": ["collector"]}
        if support.LONG:
            ways["fork"].append("collector")
            ways["forkserver"] = ["dashboard"]
        for method, roles in ways.items():
            with support.start_master(method=method) as master, support.start(
                "agent.py", "--port", master.port, "--name", "real"
            ):
                eventually(lambda m=master: row_of(m.page, node="real"))
                for role in roles:
                    with self.subTest(role=role, method=method):
                        self.kill_and_watch(master, role)
                master.stop()
                self.assertNotRegex(master.log, NOISE)

    def kill_and_watch(self, master, role):
        ghosts = [PlainAgent(master.port) for _ in range(4)]  # that will not come back
        for ghost in ghosts:
            self.addCleanup(ghost.close)
            ghost.send({"cpu": 1, "ram": 1, "node": "ghost", "interval": 60})
        eventually(lambda: len(nodes(master.page)) == 5)
        pid, start = role_pid(master, role), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        if role == "dashboard":
            for ghost in ghosts:
                ghost.close()
        eventually(
            lambda: role_pid(master, role) != pid and alive(role_pid(master, role)),
            BACK,
        )
        assert_healthy(master)
        with PlainAgent(master.port) as agent:
            agent.send({"cpu": 1, "ram": 1, "ack": True})
            self.assertEqual(agent.read_line(BACK), "ok")
        eventually(
            lambda: (
                row_of(master.page, node="real")
                and row_of(master.page, node="real")["age"] < time.monotonic() - start
            ),
            SHOWN,
        )
        eventually(
            lambda: [row["node"] for row in nodes(master.page)] == ["real"], SHOWN
        )
        stays(lambda: len(nodes(master.page)) == 1, 0.5, "one row, not two")
        self.assertEqual(
            list(support.slots("sentinel_%d" % master.port)),
            [row["address"] for row in nodes(master.page)],
        )

    def test_both_roles_killed_at_once_come_back(self):
        with support.start_master() as master, support.start(
            "agent.py", "--port", master.port, "--name", "real"
        ):
            eventually(lambda: row_of(master.page, node="real"))
            for role in ("collector", "dashboard"):
                os.kill(role_pid(master, role), signal.SIGKILL)
            start = time.monotonic()
            eventually(
                lambda: (
                    (row_of(master.page, node="real") or {"age": 99})["age"]
                    < time.monotonic() - start
                ),
                SHOWN,
            )
            assert_healthy(master)

    @support.slow("each way to start a process")
    def test_the_children_of_a_killed_supervisor_end_within_5_s(self):
        for method in ("fork", "forkserver", "spawn"):
            with self.subTest(method=method), support.start_master(
                "--with-agent", method=method
            ) as master, PlainAgent(master.port) as agent:
                agent.send({"cpu": 1, "ram": 1})
                eventually(lambda m=master: len(nodes(m.page)) == 2)
                children = descendants(master.pid)
                self.assertGreaterEqual(len(children), 3)
                self.addCleanup(support.unlink_shm, support.shm_of(master.pid))
                master.send_signal(signal.SIGKILL)
                eventually(lambda c=children: not any(map(alive, c)), 5)
                self.assertNotRegex(master.log, NOISE)
                with support.start_master(
                    "--port", master.port, "--dashboard-port", master.page
                ) as again:
                    assert_healthy(again)

    def test_a_stopped_collector_is_told_by_healthz_and_by_the_page(self):
        with support.start_master() as master, PlainAgent(master.port) as agent:
            agent.send({"cpu": 1, "ram": 1, "node": "n", "interval": 60})
            eventually(lambda: row_of(master.page, node="n"))
            os.kill(role_pid(master, "collector"), signal.SIGSTOP)
            answer = eventually(
                lambda: (
                    get(master.page, "/healthz").status == 503
                    and get(master.page, "/healthz")
                ),
                10,
            )
            self.assertRegex(answer.text, "collector")
            self.assertRegex(support.page_text(master.page), r"(?i)collector has \w+")
            os.kill(role_pid(master, "collector"), signal.SIGCONT)
            assert_healthy(master)
            self.assertTrue(row_of(master.page, node="n"))
            self.assertEqual(master.stop(), 0)

    @support.slow("twenty kills")
    def test_twenty_kills_at_random_moments_under_load_are_survived(self):
        seed = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
        chance = random.Random(seed)
        with support.start_master(patch="master_server.MAX_BACKOFF = 0.2") as master:
            load = SenderLoop(master.port, 20)
            self.addCleanup(load.close)
            for number in range(20):
                eventually(
                    lambda: load.shown(master.page),
                    SHOWN,
                    "seed %d.%d" % (seed, number),
                )
                stays(lambda: True, chance.uniform(0, 0.2))
                role = chance.choice(("collector", "dashboard"))
                pid = role_pid(master, role)
                os.kill(pid, signal.SIGKILL)
                eventually(lambda r=role, p=pid: role_pid(master, r) != p, BACK)
            eventually(lambda: load.shown(master.page), SHOWN)
            self.assertEqual(master.stop(), 0)
        self.assertNotRegex(master.log, NOISE)


# A sample of the node "dies" kills the collector inside the table's lock, half written; a
# request for a path with "dies" kills the dashboard while it copies.
DIE_INSIDE = """
import os, signal
copy, write = master_server.Table._copy, master_server.Table.write

def deadly_write(self, index, address, row, *more):
    if b"dies" in row:
        with self:
            master_server.SLOT.pack_into(self.buf, index * 76, 99, b"half a row", 1.0, 1.0)
            os.kill(os.getpid(), signal.SIGKILL)
    return write(self, index, address, row, *more)

def deadly_copy(self):
    if self.lock and os.path.exists(os.environ["DIES"]):
        os.unlink(os.environ["DIES"])
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(self)

master_server.Table.write, master_server.Table._copy = deadly_write, deadly_copy
"""


class LockHolder(unittest.TestCase):
    """A SIGKILLed holder leaves the lock locked for ever."""

    def setUp(self):
        self.trigger = "/tmp/sentinel-test-dies-%d" % os.getpid()
        self.master = support.start_master(patch=DIE_INSIDE, env={"DIES": self.trigger})
        self.addCleanup(self.master.stop)
        agent = support.start("agent.py", "--port", self.master.port, "--name", "real")
        self.addCleanup(agent.stop)
        eventually(lambda: row_of(self.master.page, node="real"))

    def assertRecovered(self, pids):
        """New processes, a new lock, clean slots; agents are back and old events stay."""
        eventually(
            lambda: (
                role_pid(self.master, "collector") != pids[0]
                and role_pid(self.master, "dashboard") != pids[1]
            ),
            8,
            "both started again",
        )
        start = time.monotonic()
        eventually(
            lambda: (
                (row_of(self.master.page, node="real") or {"age": 99})["age"]
                < time.monotonic() - start
            ),
            SHOWN,
        )
        self.assertEqual([row["node"] for row in nodes(self.master.page)], ["real"])
        assert_healthy(self.master)
        # its row is there before its event
        eventually(lambda: self.visits("real") >= 2, what="events stay")
        self.assertEqual(self.master.stop(), 0)
        self.assertNotRegex(self.master.log, NOISE)

    def visits(self, name):
        """How often a node has connected, by the events."""
        connected = events(self.master.page, "connected")
        return [event["node"] for event in connected].count(name)

    def test_a_collector_killed_in_the_middle_of_a_write_is_recovered_from(self):
        pids = role_pid(self.master, "collector"), role_pid(self.master, "dashboard")
        with PlainAgent(self.master.port) as agent:
            agent.send({"cpu": 1, "ram": 1, "node": "dies"})
            self.assertRecovered(pids)

    def test_a_dashboard_killed_while_it_copies_is_recovered_from(self):
        pids = role_pid(self.master, "collector"), role_pid(self.master, "dashboard")
        with open(self.trigger, "w"):
            pass

        def dies():
            with contextlib.suppress(OSError, support.http.client.HTTPException):
                get(self.master.page)
            return not os.path.exists(self.trigger)

        eventually(dies)
        self.assertRecovered(pids)


# Accepted sockets inherit the listener's send buffer: a few thousand answers fill this one.
SMALL_BUFFERS = """
import socket
open_listener = master_server.open_listener

def open_small(*arguments):
    listener = open_listener(*arguments)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    return listener

master_server.open_listener, master_server.MAX_RATE = open_small, 1e9
"""


class NeverReads(unittest.TestCase):
    def test_an_agent_that_never_reads_is_served_all_the_same(self):
        with support.start_master(
            patch=SMALL_BUFFERS
        ) as master, socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.settimeout(support.PATIENCE)
            deaf.connect((HOST, master.port))
            deaf.sendall(6000 * pickle.dumps({"cpu": 1, "ram": 1, "ack": True}, 2))
            deaf.sendall(pickle.dumps({"cpu": 2.5, "ram": 1, "node": "deaf"}))
            eventually(lambda: row_of(master.page, node="deaf", cpu=2.5))


if __name__ == "__main__":
    unittest.main()
