"""test_reader.py the tool: it prints the table from outside and never harms it."""

import json
import os
import re
import signal
import unittest

import beside
import support
from test_port_forward import folder_of_false_modules
from support import MasterTest, eventually, get, nodes, row_of, stays

load_tests = beside.load_tests  # in a process of its own: it mostly waits


class Reader(MasterTest):
    def read(self, *flags, **more):
        return support.run("test_reader.py", "--port", self.master.port, *flags, **more)

    def test_it_prints_a_line_for_each_slot_in_use(self):
        for number in (1, 2):
            self.agent().send({"cpu": 10 + number, "ram": 40.5, "node": "c%d" % number})
            self.row(node="c%d" % number)
        done = self.read()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for row in nodes(self.master.page):
            self.assertRegex(
                done.stdout,
                r"(?m)^%s .*\b%s %%.*\b40\.5 %%.* %d +%s"
                % (row["node"], row["cpu"], row["slot"], re.escape(row["address"])),
            )

    def test_an_empty_table_is_a_result_too(self):
        with support.start_master() as master:
            done = support.run("test_reader.py", "--port", master.port)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            done = support.run("test_reader.py", "--port", master.port, "--json")
            self.assertEqual(json.loads(done.stdout)["nodes"], [])

    def test_json_is_what_the_api_holds(self):
        self.agent().send({"cpu": 12.5, "ram": 40.5, "node": "é<&>", "load1": 0.25})
        self.row(node="é<&>")
        ours = json.loads(self.read("--json").stdout)
        theirs = json.loads(get(self.master.page, "/api/nodes").text)
        self.assertEqual(set(ours), set(theirs))
        for whole in (ours, theirs):
            whole.pop("time")
            for row in whole["nodes"]:
                row.pop("age")
        self.assertEqual(ours["nodes"], theirs["nodes"])
        self.assertEqual(ours["capacity"], theirs["capacity"])

    def test_when_the_agent_updates_it_shows_the_new_numbers(self):
        agent = self.agent()
        for cpu in (21.5, 84.5):
            agent.send({"cpu": cpu, "ram": 1, "node": "updates", "interval": 60})
            self.row(node="updates", cpu=cpu)
            self.assertRegex(
                self.read().stdout, r"updates.*\b%s\b|\b%s\b.*updates" % (cpu, cpu)
            )

    def test_watch_prints_again_and_again_until_ctrl_c(self):
        agent = self.agent()
        agent.send({"cpu": 33.5, "ram": 1, "node": "watched", "interval": 60})
        self.row(node="watched")
        with support.start(
            "test_reader.py", "--port", self.master.port, "--watch"
        ) as watch:
            eventually(lambda: "33.5" in watch.out)
            agent.send({"cpu": 66.5, "ram": 1, "node": "watched", "interval": 60})
            eventually(lambda: "66.5" in watch.out, 5)
            self.assertNotIn("\x1b", watch.out, "no escapes into a pipe")
            watch.send_signal(signal.SIGINT)
            self.assertEqual((watch.wait(), watch.log), (0, ""))

    def test_watch_ends_as_usual_when_its_terminal_goes_away(self):
        with support.start(
            "test_reader.py", "--port", self.master.port, "--watch"
        ) as watch:
            eventually(lambda: watch.out)
            watch.send_signal(signal.SIGHUP)
            self.assertEqual((watch.wait(), watch.log), (0, ""))

    def test_watch_goes_on_when_sighup_was_ignored_at_the_start(self):
        def ignore_hangup():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        with support.start(
            "test_reader.py",
            "--port",
            self.master.port,
            "--watch",
            preexec_fn=ignore_hangup,
        ) as watch:
            eventually(lambda: watch.out)
            watch.send_signal(signal.SIGHUP)
            before = len(watch.out)
            eventually(lambda: len(watch.out) > before)

    def test_the_users_own_modules_beside_it_are_not_looked_at(self):
        folder = folder_of_false_modules(self, "test_reader.py", "master_server.py")
        script = os.path.join(folder, "test_reader.py")
        for flags in ((), ("-I",)):
            with self.subTest(flags):
                done = support.run(*flags, script, "--port", self.master.port)
                self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_without_the_master_beside_it_it_says_so_in_one_line(self):
        folder = folder_of_false_modules(self, "test_reader.py")
        done = support.run(os.path.join(folder, "test_reader.py"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aerror: .*master_server\.py beside it.*\n\Z")

    def test_a_system_without_unix_parts_is_told_in_one_line(self):
        code = (
            "import sys; sys.path.insert(0, %r); import test_reader;"
            " test_reader.os.name = 'nt'; sys.exit(test_reader.main([]))"
        )
        done = support.run("-c", code % support.ROOT)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aerror: .*needs Linux.*WSL.*\n\Z")

    def test_watch_ends_with_the_master(self):
        with support.start_master() as master:
            watch = support.start("test_reader.py", "--port", master.port, "--watch")
            with watch:
                eventually(lambda: watch.out)
                master.stop()
                self.assertEqual(watch.wait(), 1)
                self.assertRegex(watch.log, r"\Aerror: [^\n]+\n\Z")

    @support.slow("many readers")
    def test_any_number_of_readers_and_even_killed_ones_never_harm_the_table(self):
        agent = self.agent()
        agent.send({"cpu": 5.5, "ram": 1, "node": "unharmed", "interval": 60})
        self.row(node="unharmed")
        name = "sentinel_%d" % self.master.port
        versions = {v: path for v, path in support.pythons().items() if v >= (3, 8)}
        for version, python in versions.items():
            with self.subTest("Python %d.%d" % version):
                done = self.read(python=python)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn("unharmed", done.stdout)
                with support.start(
                    "test_reader.py",
                    "--port",
                    self.master.port,
                    "--watch",
                    python=python,
                ) as watch:
                    eventually(lambda w=watch: "unharmed" in w.out)
                    watch.send_signal(signal.SIGKILL)
                    watch.wait()
                self.assertEqual(watch.log, "")
        stays(
            lambda: (
                name in support.shm_names()
                and row_of(self.master.page, node="unharmed")
            ),
            1,
        )

    def test_no_master_is_one_clear_line(self):
        for flags in (
            ("--port", support.closed_port()),
            ("--shm-name", "sentinel_nobody"),
        ):
            with self.subTest(flags):
                done = support.run("test_reader.py", *flags)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(
                    done.stderr, r"\Aerror: [^\n]*sentinel_[^\n]*master[^\n]*\n\Z"
                )

    def test_what_is_no_table_is_one_clear_line(self):
        for content in (b"", b"x", b"\0" * 65536, b"SENTINEL" * 8192):
            with self.subTest(len(content)):
                name = "sentinel_odd_%d" % self.master.port
                with open("/dev/shm/" + name, "wb") as file:
                    file.write(content)
                self.addCleanup(support.unlink_shm, [name])
                done = support.run("test_reader.py", "--shm-name", name)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, r"\Aerror: [^\n]+\n\Z")

    def test_a_closed_pipe_ends_it_quietly(self):
        with support.start(
            "test_reader.py",
            "--port",
            self.master.port,
            "--watch",
            stdout=support.subprocess.PIPE,
        ) as watch:
            eventually(lambda: watch.out)
        done = support.subprocess.run(
            "%s %s/test_reader.py --port %d | true"
            % (support.PYTHON, support.ROOT, self.master.port),
            shell=True,
            stderr=support.subprocess.PIPE,
        )
        self.assertEqual(done.stderr, b"")


if __name__ == "__main__":
    unittest.main()
