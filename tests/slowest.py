#!/usr/bin/env python3
"""slowest.py runs tests one after the other and says which of them took the time.

    python3 tests/slowest.py                         the fast run
    python3 tests/slowest.py test_herd test_wire     some files
    SENTINEL_TEST_ALL=1 python3 tests/slowest.py     all of it

What a class needs before its first test counts for that test. Exit codes are unittest's.
"""

import collections
import os
import sys
import time
import unittest

SHOWN = 25  # tests, and classes
FOLDER = os.path.dirname(os.path.abspath(__file__))


class Timed(unittest.TextTestResult):
    """Notes how long each test took, from the end of the one before."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.took = {}
        self.before = time.monotonic()

    def stopTest(self, test):
        now = time.monotonic()
        self.took[test.id()] = now - self.before
        self.before = now
        super().stopTest(test)


def render(took):
    """The slowest classes and tests, a line each, the slowest first."""
    classes = collections.Counter()
    for name, seconds in took.items():
        classes[name.rpartition(".")[0]] += seconds
    lines = []
    for title, times in (("classes", classes), ("tests", collections.Counter(took))):
        lines.append("\nThe slowest %s, in seconds:" % title)
        for name, seconds in times.most_common(SHOWN):
            lines.append("%7.1f  %s" % (seconds, name))
    return "\n".join(lines)


def main():
    os.environ["SENTINEL_TEST_IN_TURN"] = "1"  # before the tests are loaded
    sys.path.insert(0, FOLDER)
    if sys.argv[1:]:
        tests = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
    else:
        tests = unittest.defaultTestLoader.discover(FOLDER)
    result = unittest.TextTestRunner(resultclass=Timed).run(tests)
    print(render(result.took))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
