#!/usr/bin/env python3
"""beside.py runs test modules that mostly wait in processes of their own, beside the other ones.

    load_tests = beside.load_tests          # in such a module

unittest runs one test after the other, and the tests here wait twice as long as they work. So in
the fast run each module with this line has its own process, AT_ONCE of them at a time, while the
process that was started runs all other modules. When unittest comes to the last of these modules,
it is told what became of each test, in the usual order, as if it had run them itself: the names,
the tracebacks and the counts are the same.

One such module alone, one class or one test runs in the process that was started. So does
everything when long tests were asked for, on a machine with one CPU, and with
SENTINEL_TEST_IN_TURN=1.
"""

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import unittest

import support

AT_ONCE = 3  # processes beside the one that was started
END_SECONDS = 30  # for a process that was told to end
IN_TURN = (
    support.LONG
    or (os.cpu_count() or 1) < 2
    or os.environ.get("SENTINEL_TEST_IN_TURN") == "1"
)


# ==========================================================================================
# In the process that was started: Beside, load_tests
# ==========================================================================================


class Beside(unittest.TestSuite):
    """The tests of one module. The first one to be run starts all, the last one tells of all."""

    every = []  # of this run, in unittest's order

    def __init__(self, tests):
        super().__init__(tests)
        self.told = queue.Queue()  # lines of the process, then None
        self.process = None
        Beside.every.append(self)

    def run(self, result, debug=False):
        if debug or len(Beside.every) == 1:
            return super().run(result, debug)
        if self is Beside.every[0]:
            start_processes(list(Beside.every))
        if self is Beside.every[-1]:
            for suite in Beside.every:
                suite.tell(result)
        return result

    def run_process(self):
        """Run the module's tests in a process and keep what it tells."""
        task = {"path": sys.path, "names": [test.id() for test in flat(self)]}
        reading, writing = os.pipe()
        command = [sys.executable, os.path.abspath(__file__), str(writing)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[writing]
        )
        os.close(writing)
        with self.process.stdin as pipe:
            pipe.write(json.dumps(task).encode())
        with open(reading, encoding="utf-8") as lines:
            for line in lines:
                self.told.put(json.loads(line))
        self.process.wait()

    def tell(self, result):
        """Tell the result what became of each test; of one that is not told, that it failed."""
        tests = {test.id(): test for test in flat(self)}
        for told in iter(self.told.get, None):
            if result.shouldStop or told["what"] == "ended":
                return
            pass_on(result, tests, told)
            if told["what"] == "stopTest":
                tests.pop(told["test"], None)
        for test in tests.values():
            result.startTest(test)
            result.addError(test, error_of("its process ended before it had run"))
            result.stopTest(test)


def load_tests(loader, tests, pattern):
    """What unittest calls for a module that has this name; see load_tests in its manual."""
    wanted = list(flat(tests))
    if IN_TURN or not wanted:
        return tests
    return Beside(wanted)


def flat(suite):
    """The tests of a suite of suites."""
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from flat(each)
        else:
            yield each


def start_processes(suites):
    """Have AT_ONCE threads run the suites, each the next one that nobody has begun."""
    due = queue.Queue()
    for suite in suites:
        due.put(suite)

    def work():
        while True:
            try:
                suite = due.get_nowait()
            except queue.Empty:
                return
            try:
                suite.run_process()
            finally:
                suite.told.put(None)

    for _ in range(AT_ONCE):
        threading.Thread(target=work, daemon=True).start()
    atexit.register(end_processes, due, suites)


def end_processes(due, suites):
    """When the run is interrupted: start no more, and have each end what it started."""
    while not due.empty():
        due.get()
    running = [each.process for each in suites if each.process]
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


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
# In a process of its own: Teller, main
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


def main():
    """Run the tests named on stdin and write what becomes of them to a descriptor."""
    task = json.load(sys.stdin)
    sys.path[:] = task["path"]
    with open(int(sys.argv[1]), "w", encoding="utf-8") as stream:
        suite = unittest.defaultTestLoader.loadTestsFromNames(task["names"])
        with contextlib.suppress(KeyboardInterrupt):  # what it started ends at its exit
            teller = Teller(stream)
            suite.run(teller)
            teller.write("ended")


if __name__ == "__main__":
    main()
