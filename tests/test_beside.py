"""beside.py: what ran in other processes is told as if it had run in the one that was started."""

import os
import re
import sys
import tempfile
import unittest

import slowest
import support

PLAIN = """
import unittest

class Plain(unittest.TestCase):
    def test_of_this_process(self):
        pass
"""
WAITING = """
import os, signal, unittest
from beside import load_tests

class Mixed(unittest.TestCase):
    def test_good(self):
        pass
    def test_failing(self):
        self.assertEqual(1, 2, "no such luck")
    def test_broken(self):
        {}["no such key"]
    def test_skipped(self):
        self.skipTest("not today")
    def test_in_parts(self):
        for part in (1, 2, 3):
            with self.subTest(part=part):
                self.assertNotEqual(part, 2)
        with self.subTest("broken part"):
            1 / 0
    @unittest.expectedFailure
    def test_known(self):
        self.fail()
    @unittest.expectedFailure
    def test_known_no_longer(self):
        pass

@unittest.skip("no class today")
class Skipped(unittest.TestCase):
    def test_one(self):
        pass

class BadStart(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no start")
    def test_never(self):
        pass
"""
DYING = """
import os, unittest
from beside import load_tests

class Dying(unittest.TestCase):
    def test_a_good_one(self):
        pass
    def test_b_that_ends_the_process(self):
        os._exit(7)
    def test_c_that_never_runs(self):
        pass
"""
PROCESS = """
import os, unittest
from beside import load_tests

class Process(unittest.TestCase):
    def test_which(self):
        with open(%r, "a") as file:
            file.write("%%d\\n" %% os.getpid())
"""

IN_PARTS = """
import os, unittest, beside
load_tests = beside.in_parts(2)

class Parts(unittest.TestCase):
    def note(self):
        with open(%r, "a") as file:
            file.write("%%d\\n" %% os.getpid())
    test_a = test_b = test_c = note
"""

ENDLESS = """
import os, time, unittest
import support
from beside import load_tests

class Endless(unittest.TestCase):
    def test_until_it_is_interrupted(self):
        with support.start("-c", "import time; time.sleep(60)") as tool:
            with open(%r, "a") as file:
                file.write("%%d\\n%%d\\n" %% (os.getpid(), tool.pid))
            time.sleep(60)
"""


class Told(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = scratch.name

    def write(self, **modules):
        for name, text in modules.items():
            with open(os.path.join(self.folder, name + ".py"), "w") as file:
                file.write(text)

    def environment(self, in_turn=False):
        env = dict(os.environ, PYTHONPATH=os.path.join(support.ROOT, "tests"))
        for name in ("SENTINEL_TEST_ALL", "SENTINEL_TEST_SLOW"):
            env.pop(name, None)
        env["SENTINEL_TEST_IN_TURN"] = "1" if in_turn else ""
        return env

    def discover(self, *flags, in_turn=False):
        """What `python3 -m unittest discover` says, without what differs in each run."""
        done = support.subprocess.run(
            [sys.executable, "-S", "-m", "unittest", "discover", "-v", *flags],
            cwd=self.folder,
            env=self.environment(in_turn),
            stdout=support.subprocess.PIPE,
            stderr=support.subprocess.STDOUT,
            universal_newlines=True,
            timeout=60,
        )
        return done.returncode, re.sub(r" in [\d.]+s", "", done.stdout)

    def outcomes(self, said):
        """The lines that say how a test ended, and the last one.

        Of what failed the headlines only: in between unittest sets parts of a test apart.
        """
        lines = said.splitlines()
        ends = r"\.\.\. (?!FAIL|ERROR).|^(FAIL|ERROR|UNEXPECTED SUCCESS): |^Ran "
        return [line for line in lines if re.search(ends, line)] + lines[-1:]

    @unittest.skipIf((os.cpu_count() or 1) < 2, "one CPU: nothing runs beside")
    def test_names_outcomes_and_counts_are_those_of_one_process(self):
        self.write(test_a=PLAIN, test_b=WAITING, test_c=WAITING, test_d=PLAIN)
        code, said = self.discover()
        in_turn_code, in_turn = self.discover(in_turn=True)
        self.assertEqual(code, in_turn_code)
        self.assertNotIn("Elsewhere", in_turn)
        self.assertEqual(
            sorted(self.outcomes(said)), sorted(self.outcomes(in_turn)), said
        )
        for words in ("no such luck", "KeyError: 'no such key'", "OSError: no start"):
            self.assertEqual(said.count(words), in_turn.count(words))
        self.assertRegex(said, r'test_b.py", line \d+, in test_failing')

    def test_a_process_that_ends_too_early_fails_the_tests_that_it_did_not_run(self):
        self.write(test_a=DYING, test_b=PROCESS % os.devnull)
        code, said = self.discover()
        self.assertEqual(code, 1)
        self.assertRegex(said, r"test_a_good_one .*ok")
        self.assertRegex(said, r"ERROR: test_b_that_ends_the_process")
        self.assertRegex(said, r"ERROR: test_c_that_never_runs")
        self.assertIn("its process ended before it had run", said)

    def test_it_is_another_process_only_where_there_are_several_modules(self):
        pids = os.path.join(self.folder, "pids")
        self.write(test_a=PROCESS % pids, test_b=PROCESS % pids)
        for flags, in_turn, processes in (
            ((), False, 2),
            ((), True, 1),
            (("-p", "test_a.py"), False, 1),
        ):
            with self.subTest(flags=flags, in_turn=in_turn):
                if os.path.exists(pids):
                    os.unlink(pids)
                self.assertEqual(self.discover(*flags, in_turn=in_turn)[0], 0)
                with open(pids) as file:
                    self.assertEqual(len(set(file)), processes)

    @unittest.skipIf((os.cpu_count() or 1) < 2, "one CPU: nothing runs beside")
    def test_a_module_in_parts_has_a_process_for_each(self):
        pids = os.path.join(self.folder, "pids")
        self.write(test_a=IN_PARTS % pids, test_b=WAITING)
        for flags, in_turn, processes in (
            ((), False, 2),
            ((), True, 1),
            (("-p", "test_a.py"), False, 1),
        ):
            with self.subTest(flags=flags, in_turn=in_turn):
                said = self.discover(*flags, in_turn=in_turn)[1]
                for name in ("test_a", "test_b", "test_c"):
                    self.assertRegex(said, name + r" \(test_a\.Parts.*ok")
                with open(pids) as file:
                    found = file.read().split()
                os.unlink(pids)
                self.assertEqual((len(found), len(set(found))), (3, processes))

    @unittest.skipIf((os.cpu_count() or 1) < 2, "one CPU: nothing runs beside")
    def test_an_interrupted_run_leaves_no_process(self):
        pids = os.path.join(self.folder, "pids")
        self.write(test_a=ENDLESS % pids, test_b=ENDLESS % pids)
        run = support.Tool(
            [sys.executable, "-S", "-m", "unittest", "discover"],
            self.environment(),
            cwd=self.folder,
        )
        self.addCleanup(run.stop)

        def started():
            with open(pids) as file:
                found = [int(line) for line in file]
            return found if len(found) == 4 else None

        family = support.eventually(started)
        self.assertTrue(all(map(support.alive, family)))
        run.send_signal(support.signal.SIGTERM)
        self.assertNotEqual(run.wait(), 0)
        self.assertFalse(any(map(support.alive, family)), "it waits for them")


class Slowest(unittest.TestCase):
    def test_what_works_most_comes_first_and_classes_are_summed(self):
        took = {
            "test_a.One.test_x": 2.0,
            "test_a.One.test_y": 2.5,
            "test_b.Two.test_z": 30,
        }
        worked = {
            "test_a.One.test_x": 1.5,
            "test_a.One.test_y": 0.5,
            "test_b.Two.test_z": 1,
        }
        lines = slowest.render(took, worked).splitlines()
        self.assertEqual(
            [line.split() for line in lines if line.startswith(" ")],
            [
                ["2.0", "4.5", "test_a"],
                ["1.0", "30.0", "test_b"],
                ["2.0", "4.5", "test_a.One"],
                ["1.0", "30.0", "test_b.Two"],
                ["1.5", "2.0", "test_a.One.test_x"],
                ["1.0", "30.0", "test_b.Two.test_z"],
                ["0.5", "2.5", "test_a.One.test_y"],
                ["3.0", "34.5", "all"],
            ],
        )

    def test_the_work_of_what_a_test_starts_counts_while_it_runs_and_after(self):
        before = slowest.cpu_seconds()
        spin = "import time\nwhile time.process_time() < 0.5: pass\n"
        with support.start("-c", spin + "time.sleep(60)") as tool:
            support.eventually(lambda: slowest.cpu_seconds() - before >= 0.45)
        self.assertTrue(tool.code)
        self.assertGreaterEqual(slowest.cpu_seconds() - before, 0.45)

    def test_it_runs_what_is_named_and_tells_whether_it_failed(self):
        done = support.run("tests/slowest.py", "test_wire.Decoder", "no_such_test")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"(?m)^ +[\d.]+ +[\d.]+  test_wire\.Decoder$")


if __name__ == "__main__":
    unittest.main()
