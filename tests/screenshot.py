#!/usr/bin/env python3
"""screenshot.py makes the README's picture anew: tests/screenshot.png, the real page under load.

    python3 tests/screenshot.py [--seconds 400] [--file tests/screenshot.png]

The master's own demonstration, whose invented agents send what real ones would, and Chromium. It
takes six minutes because the graphs show five, and because a GPU must idle for that long before
it is told.
"""

import argparse
import os
import tempfile
import time

import support
from support import start_master

from browser import Browser


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument(
        "--file", default=os.path.join(support.ROOT, "tests", "screenshot.png")
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_master(
        "--demo", "--record", folder
    ) as master, Browser() as browser:
        browser.show_as(1280, 960)
        address = "http://localhost:%d/" % master.page
        browser.open(address)  # somebody watches: finer graphs
        time.sleep(options.seconds)
        browser.open(address)
        browser.screenshot(options.file)


if __name__ == "__main__":
    main()
