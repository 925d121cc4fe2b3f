#!/usr/bin/env python3
"""slowest.py runs tests one after the other and says which of them took the time, and the CPU.

    python3 tests/slowest.py                         the fast run
    python3 tests/slowest.py test_herd test_wire     some files
    SENTINEL_TEST_ALL=1 python3 tests/slowest.py     all of it

What a class needs before its first test counts for that test. CPU is that of all processes that a
test has started; it says more than the time where others load the machine. Exit codes are
unittest's.
"""

import collections
import contextlib
import os
import sys
import time
import unittest

import support

SHOWN = 25  # classes, and tests: those that work most, then those that take longest
FOLDER = os.path.dirname(os.path.abspath(__file__))


class Timed(unittest.TextTestResult):
    """Notes what each test took, from the end of the one before."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.took = collections.Counter()
        self.worked = collections.Counter()
        self.before = time.monotonic(), cpu_seconds()

    def stopTest(self, test):
        now = time.monotonic(), cpu_seconds()
        self.took[test.id()] = now[0] - self.before[0]
        self.worked[test.id()] = now[1] - self.before[1]
        self.before = now
        super().stopTest(test)


def cpu_seconds():
    """What this process, those that it has waited for and all that run below it have worked."""
    seconds = sum(os.times()[:4])
    for pid in support.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            seconds += support.cpu_seconds(pid)
    return seconds


def sums(counts, parts):
    """The same counts by the first parts of the tests' names: 1 for files, 2 for classes."""
    total = collections.Counter()
    for name, count in counts.items():
        total[".".join(name.split(".")[:parts])] += count
    return total


def render(took, worked):
    """The files, and the slowest classes and tests, a line each, what works most first."""
    lines = []
    for title, parts, shown in (
        ("Files", 1, None),
        ("Classes", 2, SHOWN),
        ("Tests", 3, SHOWN),
    ):
        lines.append("\n%s: seconds of CPU, seconds" % title)
        times = sums(took, parts)
        work = sums(worked, parts)
        for name, seconds in work.most_common(shown):
            lines.append("%7.1f %7.1f  %s" % (seconds, times[name], name))
    totals = sum(worked.values()), sum(took.values())
    lines.append("%7.1f %7.1f  all" % totals)
    return "\n".join(lines)


def main():
    os.environ["SENTINEL_TEST_IN_TURN"] = "1"  # before the tests are loaded
    if sys.argv[1:]:
        tests = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
    else:
        tests = unittest.defaultTestLoader.discover(FOLDER)
    del os.environ["SENTINEL_TEST_IN_TURN"]  # tests of such runs have one of their own
    result = unittest.TextTestRunner(resultclass=Timed).run(tests)
    print(render(result.took, result.worked))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
