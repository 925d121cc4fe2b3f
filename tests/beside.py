#!/usr/bin/env python3
"""beside.py runs test modules that mostly wait in processes of their own, beside the other ones.

    load_tests = beside.load_tests          # in such a module
    load_tests = beside.in_parts(2)         # in one that takes long: two processes share its tests

unittest runs one test after the other, and the tests here wait twice as long as they work. So in
the fast run each module with this line has its own process, AT_ONCE of them at a time, while the
process that was started runs all other modules. When unittest comes to the last of these modules,
it is told what became of each test, in the usual order, as if it had run them itself: the names,
the tracebacks and the counts are the same.

One such module alone, one class or one test runs in the process that was started. So does
everything when long tests were asked for, on a machine with one CPU, and with
SENTINEL_TEST_IN_TURN=1.
"""

# The rooms, from the top.
#
#   suites   what unittest calls in the process that was started
#   results  what is told to unittest's result
#   steward  a process that starts the others, AT_ONCE of them at a time
#   module   a process that runs the tests of a module
#
# They share a folder: N.json has the tests of the Nth module, N.told a line of JSON for each call
# of unittest. There are no threads: tests fork this process.

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

import support

AT_ONCE = 9  # processes beside the one that was started
# those that take the longest, the longest first, see slowest.py: else all would wait for the last
FIRST = (
    "test_herd",
    "test_recorder",
    "test_supervisor",
    "test_agent",
    "test_parts",
    "test_end_to_end",
    "test_agent_command",
    "test_bad_input",
    "test_demo",
    "test_tui",
    "test_reports",
)
END_SECONDS = 30  # for a process that was told to end
IN_TURN = (
    support.LONG
    or (os.cpu_count() or 1) < 2
    or os.environ.get("SENTINEL_TEST_IN_TURN") == "1"
)


# ==========================================================================================
# Suites: what unittest calls in the process that was started
# ==========================================================================================


def load_tests(loader, tests, pattern):
    """What unittest calls for a module that has this name; see load_tests in its manual."""
    wanted = list(flat(tests))
    if IN_TURN or not wanted:
        return tests
    return Beside(wanted)


def in_parts(count):
    """A load_tests for a module whose tests so many processes share."""

    def load(loader, tests, pattern):
        wanted = list(flat(tests))
        if IN_TURN or not wanted:
            return tests
        size = -(-len(wanted) // count)
        parts = [wanted[at : at + size] for at in range(0, len(wanted), size)]
        return unittest.TestSuite(map(Beside, parts))

    return load


def flat(suite):
    """The tests of a suite of suites."""
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from flat(each)
        else:
            yield each


class Beside(unittest.TestSuite):
    """The tests of a module, or a part. The first one to be run starts all, the last one tells."""

    every = []  # of this run, in unittest's order
    folder = ""  # that is shared with the processes
    steward = None

    def __init__(self, tests):
        super().__init__(tests)
        self.module = tests[0].__class__.__module__
        Beside.every.append(self)

    def run(self, result, debug=False):
        if debug or len({suite.module for suite in Beside.every}) == 1:
            return super().run(result, debug)
        if self is Beside.every[0]:
            self.start_all()
        if self is Beside.every[-1]:
            for number, suite in enumerate(Beside.every):
                suite.tell(result, number)
        return result

    @staticmethod
    def start_all():
        Beside.folder = tempfile.mkdtemp(prefix="sentinel-beside-")
        atexit.register(shutil.rmtree, Beside.folder, ignore_errors=True)
        for number, suite in enumerate(Beside.every):
            names = [test.id() for test in flat(suite)]
            task = {"path": sys.path, "names": names}
            with open(path_of(Beside.folder, number, "json"), "w") as file:
                json.dump(task, file)
        Beside.steward = start_process(Beside.folder, len(Beside.every))
        atexit.register(end_process, Beside.steward)

    def tell(self, result, number):
        """Tell the result what became of each test; of one that is not told, that it failed."""
        tests = {test.id(): test for test in flat(self)}
        for told in follow(path_of(Beside.folder, number, "told"), Beside.steward):
            if result.shouldStop or told["what"] == "ended":
                return
            pass_on(result, tests, told)
            if told["what"] == "stopTest":
                tests.pop(told["test"], None)
        for test in tests.values():
            result.startTest(test)
            result.addError(test, error_of("its process ended before it had run"))
            result.stopTest(test)


def path_of(folder, number, kind):
    return os.path.join(folder, "%d.%s" % (number, kind))


def start_process(*words):
    """Start this file; the folders of the site, if there are any, come with the path of a task."""
    command = [sys.executable, "-S", os.path.abspath(__file__)]
    return subprocess.Popen(command + [str(word) for word in words])


def end_process(process):
    """Have a process end what it has started, and itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow(path, writer):
    """Yield what is in a file of JSON lines and what is still to come, until "over"."""
    while not os.path.exists(path) and writer.poll() is None:
        time.sleep(support.POLL)
    if not os.path.exists(path):
        return
    rest = ""
    with open(path, encoding="utf-8") as file:
        while True:
            over = writer.poll() is not None
            rest += file.read()
            *lines, rest = rest.split("\n")
            for line in lines:
                try:
                    told = json.loads(line)
                except ValueError:  # its process ended in the midst of it
                    continue
                if told["what"] == "over":
                    return
                yield told
            if over:
                return
            if not lines:
                time.sleep(support.POLL)


# ==========================================================================================
# Results: what is told to unittest's result
# ==========================================================================================


class Elsewhere(Exception):
    """What went wrong in another process; its text is the traceback of there."""


class FailedElsewhere(Elsewhere, AssertionError):
    """The same of a failure, which unittest keeps apart from errors."""


def error_of(text, failed=False):
    """What unittest wants to know of an error: (class, error, traceback)."""
    kind = FailedElsewhere if failed else Elsewhere
    return kind, kind("\n" + text), None


class Described:
    """Stands for what is no test of the suite: a subTest, or a setUpClass."""

    failureException = AssertionError

    def __init__(self, text):
        self.text = text

    def id(self):
        return self.text

    def shortDescription(self):
        return None

    def __str__(self):
        return self.text


def pass_on(result, tests, told):
    """Call the result as unittest would."""
    what, text = told["what"], told["text"]
    test = tests.get(told["test"]) or Described(told["test"])
    if what == "addSubTest":
        error = error_of(text, told["failed"])
        result.addSubTest(test, Described(told["subtest"]), error)
    elif what == "addDuration":
        if hasattr(result, what):  # from Python 3.12 on
            result.addDuration(test, float(text))
    elif what == "addSkip":
        result.addSkip(test, text)
    elif text:
        getattr(result, what)(test, error_of(text))
    else:
        getattr(result, what)(test)


# ==========================================================================================
# Steward: a process that starts the others
# ==========================================================================================


def run_all(folder, count):
    """Run so many modules, AT_ONCE at a time; end them when nobody waits for them any more."""
    parent = os.getppid()
    due = sorted(range(count), key=lambda number: rank(folder, number))
    running = {}
    try:
        while (due or running) and os.getppid() == parent:
            while due and len(running) < AT_ONCE:
                number = due.pop(0)
                running[number] = start_process(folder, number, "module")
            for number, process in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    with open(path_of(folder, number, "told"), "a") as file:
                        file.write('\n{"what": "over"}\n')
            time.sleep(support.POLL)
    finally:
        for process in running.values():
            end_process(process)


def rank(folder, number):
    """The place of a module among those of FIRST; behind them for any other."""
    with open(path_of(folder, number, "json")) as file:
        module = json.load(file)["names"][0].split(".")[0]
    return FIRST.index(module) if module in FIRST else len(FIRST)


# ==========================================================================================
# Module: a process that runs the tests of a module
# ==========================================================================================


class Teller(unittest.TestResult):
    """Writes a line for each call of unittest."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream
        self.started = 0.0

    def write(self, what, test="", text="", **more):
        line = dict(more, what=what, test=test, text=text)
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def traceback_of(self, test, error):
        return self._exc_info_to_string(error, test).rstrip("\n")

    def startTest(self, test):
        self.started = time.monotonic()
        self.write("startTest", test.id())
        super().startTest(test)

    def stopTest(self, test):
        self.write("addDuration", test.id(), str(time.monotonic() - self.started))
        self.write("stopTest", test.id())
        super().stopTest(test)

    def addSuccess(self, test):
        self.write("addSuccess", test.id())

    def addUnexpectedSuccess(self, test):
        self.write("addUnexpectedSuccess", test.id())

    def addSkip(self, test, reason):
        self.write("addSkip", test.id(), reason)

    def addError(self, test, err):
        self.write("addError", test.id(), self.traceback_of(test, err))

    def addFailure(self, test, err):
        self.write("addFailure", test.id(), self.traceback_of(test, err))

    def addExpectedFailure(self, test, err):
        self.write("addExpectedFailure", test.id(), self.traceback_of(test, err))

    def addSubTest(self, test, subtest, err):
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            text = self.traceback_of(test, err)
            self.write(
                "addSubTest", test.id(), text, subtest=str(subtest), failed=failed
            )


def run_module(folder, number):
    """Run the tests of a module and write what becomes of them."""
    with open(path_of(folder, number, "json")) as file:
        task = json.load(file)
    sys.path[:] = task["path"]
    with open(path_of(folder, number, "told"), "a", encoding="utf-8") as stream:
        suite = unittest.defaultTestLoader.loadTestsFromNames(task["names"])
        teller = Teller(stream)
        suite.run(teller)
        teller.write("ended")


def main():
    folder, number = sys.argv[1], int(sys.argv[2])
    with contextlib.suppress(KeyboardInterrupt):  # what it started ends at its exit
        if sys.argv[3:] == ["module"]:
            run_module(folder, number)
        else:
            run_all(folder, number)


if __name__ == "__main__":
    main()
