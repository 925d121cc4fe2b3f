#!/usr/bin/env python3
"""test_reader.py - print what a running master holds in its shared memory.

    master_server.py --> shared memory sentinel_PORT --> test_reader.py --> stdout

It attaches from outside and only reads: run it as often as you like, it never harms the
table. It runs on the master's machine, with master_server.py beside it.

    python3 test_reader.py                  the table of the master on port 13579, once
    python3 test_reader.py --watch          again and again, until Ctrl-C
    python3 test_reader.py --jobs           the jobs that were recorded; this needs no master

Exit codes: 0 done, 1 no master, no whole copy or no records, 2 bad usage.
"""

import sys

if __name__ == "__main__":
    # Python looks for modules beside the script first, unless it was told not to. A
    # json.py of the user's in there would take the place of the standard library's.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]

import argparse
import importlib.util
import os
import signal
import time
from typing import Any, List, Optional

WATCH_SECONDS = 2  # from one look of --watch to the next
HOME = "\x1b[H"  # what a terminal takes for: to the top, ...
CLEAR_LINE = "\x1b[K"  # ... empty the rest of this line, ...
CLEAR_BELOW = "\x1b[J"  # ... empty all that is below


class ReaderError(Exception):
    """What keeps this program from its work, as a line for the user."""


def load_master_server() -> Any:
    """The module master_server, from beside this file and from nowhere else."""
    if os.name != "posix":
        raise ReaderError(
            "test_reader.py needs Linux or another Unix, as the master does; on Windows,"
            " WSL has it"
        )
    folder = os.path.dirname(os.path.realpath(__file__))
    path = os.path.join(folder, "master_server.py")
    if not os.path.exists(path):
        raise ReaderError(
            "test_reader.py needs master_server.py beside it; copy it there"
        )
    spec = importlib.util.spec_from_file_location("master_server", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["master_server"] = module
    spec.loader.exec_module(module)
    return module


def build_parser(master_server: Any) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--port",
        type=master_server.number(int, 1, 65535, "port"),
        default=13579,
        help="the master's port for agents (default: 13579)",
    )
    which.add_argument(
        "--shm-name",
        type=master_server.shm_argument,
        metavar="NAME",
        help="name of the shared memory (default: sentinel_PORT)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what /api/nodes or /jobs.json holds"
    )
    parser.add_argument(
        "--jobs",
        action="store_true",
        help="print the recorded jobs and how they ended, the newest first",
    )
    parser.add_argument(
        "--record",
        metavar="DIR",
        help="where the records are (default: ~/.sentinel/jobs)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="print again every 2 s, in place on a terminal, until Ctrl-C",
    )
    return parser


def show(text: str, in_place: bool) -> None:
    """Print a copy of the table, over the one before it if it is to stay in place."""
    if in_place and sys.stdout.isatty():
        lines = text.replace("\n", CLEAR_LINE + "\n")
        text = HOME + lines + CLEAR_BELOW
    sys.stdout.write(text)
    sys.stdout.flush()


def read_table(master_server: Any, options: argparse.Namespace) -> None:
    """Attach to the table and print it, once or until its master ends (TableError)."""
    render = master_server.render_nodes_text
    if options.json:
        render = master_server.render_nodes_json
    name = options.shm_name or "sentinel_%d" % options.port
    table = master_server.Table.attach(name)
    while True:
        show(render(table.snapshot(), {}), in_place=options.watch)
        if not options.watch:
            return
        time.sleep(WATCH_SECONDS)
        if not table.owner_lives():
            raise ReaderError("the master (pid %d) has ended" % table.pid)


def read_records(master_server: Any, options: argparse.Namespace) -> None:
    """Print the jobs that were recorded; a folder that is not there is an error."""
    folder = options.record or master_server.default_folder()
    if not os.path.isdir(folder):
        raise ReaderError("no records in %s; --record DIR says where they are" % folder)
    try:
        jobs = master_server.list_jobs(folder)
    except OSError as error:
        raise ReaderError("%s cannot be read: %s" % (folder, error.strerror)) from error
    if options.json:
        show(
            master_server.as_json({"time": round(time.time(), 3), "jobs": jobs}), False
        )
    else:
        show(master_server.render_jobs_text(jobs), False)


def run(argv: Optional[List[str]]) -> int:
    """Read the flags, then the table: the exit code."""
    master_server = load_master_server()
    options = build_parser(master_server).parse_args(argv)
    if master_server.cannot_run():
        return 1
    try:
        if options.jobs:
            read_records(master_server, options)
        else:
            read_table(master_server, options)
    except master_server.TableError as error:
        raise ReaderError(str(error)) from error
    except BrokenPipeError:  # whoever reads our output has seen enough
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # for the flush at the end of Python
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Print the table once, or again and again: the exit code."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # it is under nohup
        signal.signal(hangup, signal.default_int_handler)
    try:
        return run(argv)
    except ReaderError as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
