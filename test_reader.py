#!/usr/bin/env python3
"""test_reader.py - print what a running master holds in its shared memory.

    master_server.py --> shared memory sentinel_PORT --> test_reader.py --> stdout

It attaches from outside and only reads: run it as often as you like, it never harms the table.
It runs on the master's machine, with master_server.py beside it.

Exit codes: 0 done, 1 no master or no whole copy, 2 bad usage.
"""

import argparse
import os
import sys
import time
from typing import List, Optional


def main(argv: Optional[List[str]] = None) -> int:
    """Print the table once, or again and again: the exit code."""
    try:
        import master_server
    except ImportError:
        print(
            "error: test_reader.py needs master_server.py beside it; copy it there",
            file=sys.stderr,
        )
        return 1
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
        "--json", action="store_true", help="print what /api/nodes holds"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="print again every 2 s, in place on a terminal, until Ctrl-C",
    )
    options = parser.parse_args(argv)
    if master_server.too_old():
        return 1
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Attach and print: the exit code."""
    import master_server

    render = (
        master_server.render_nodes_json
        if options.json
        else master_server.render_nodes_text
    )
    try:
        table = master_server.Table.attach(
            options.shm_name or "sentinel_%d" % options.port
        )
        while True:
            text = render(table.snapshot(), {})
            if options.watch and sys.stdout.isatty():
                text = "\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J"
            sys.stdout.write(text)
            sys.stdout.flush()
            if not options.watch:
                return 0
            time.sleep(2)
            if not table.owner_lives():
                raise master_server.TableError(
                    "the master (pid %d) has ended" % table.pid
                )
    except master_server.TableError as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
