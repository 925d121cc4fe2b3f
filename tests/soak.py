#!/usr/bin/env python3
"""soak.py keeps agents coming and going for a long time and watches what the master keeps of them.

    python3 tests/soak.py                               1,000 agents, 20 minutes
    python3 tests/soak.py --agents 200 --minutes 2      for a look

The agents are those of load.py, through port_forward.py. All the time some leave, with a goodbye, a
reset, a close or in silence, and others come; somebody looks at the page. Every few seconds the
memory (PSS), threads and descriptors of each process are noted. In the end the load stops, and
what it leaves behind is compared with what was there before it came.

Exit code 0: memory was flat after the first quarter of the time (judged if that took 15 minutes in
all), no agent was dropped, no slot, thread or descriptor stayed behind. Else 1.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time

import bench
import support
from master_server import number

LOOK_SECONDS = 5.0
WARM_UP = 0.25  # of the time: memory may grow for so long
FLAT = 0.02  # growth of the memory in all of the rest that is none
LEAST_SECONDS = 15 * 60  # a shorter soak shows growth, and does not judge it
EMPTY_SECONDS = 30.0  # for the last slots, threads and descriptors to be given back
LATE_SECONDS = 10.0  # in which a slot follows the agent that comes or goes


def count_threads(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def count_descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def look(pids):
    """{process: {"memory": bytes, "threads":, "descriptors":}} of {process: pid}."""
    return {
        name: {
            "memory": bench.own_pss(pid),
            "threads": count_threads(pid),
            "descriptors": count_descriptors(pid),
        }
        for name, pid in pids.items()
    }


def processes(fleet):
    """{what it is: pid} of the fleet's processes; the master's children as it logged them."""
    pids = {
        role: int(fleet.master.logged(r"%s started, pid (\d+)" % role).group(1))
        for role in ("collector", "dashboard")
    }
    return dict(pids, supervisor=fleet.master.pid, bridge=fleet.bridge.pid)


def soak(fleet, pids, minutes, churn):
    """[(seconds since the start, look)] until the time is over, and the slots worst astray."""
    start, looks, astray = time.monotonic(), [], 0
    while time.monotonic() < start + 60 * minutes:
        time.sleep(LOOK_SECONDS)
        status = bench.fetch(fleet.master.page)[0]
        if status != 200:
            raise ValueError("the page answered %d" % status)
        looks.append((time.monotonic() - start, look(pids)))
        slots = len(support.nodes(fleet.master.page))
        astray = max(astray, abs(slots - fleet.report()["agents"]))
        if len(looks) % 12 == 0:
            report = fleet.report()
            print(
                "%3.0f min: %s MiB, %d came and went, %d lost"
                % (
                    looks[-1][0] / 60,
                    ", ".join(
                        "%s %.1f" % (name, each["memory"] / bench.MIB)
                        for name, each in looks[-1][1].items()
                    ),
                    report["left"],
                    report["lost"],
                ),
                file=sys.stderr,
                flush=True,
            )
    return looks, bench.at_most(
        "slots more or fewer than agents at worst",
        astray,
        "",
        LATE_SECONDS * churn,
        "%d looks" % len(looks),
    )


def judge_memory(looks):
    """A row for each process: its growth after the warm-up, as a part of its memory."""
    late = [(at, each) for at, each in looks if at >= WARM_UP * looks[-1][0]]
    for name in late[0][1]:
        points = [(at / 3600, each[name]["memory"]) for at, each in late]
        slope, size = bench.fit_slope(points), points[-1][1]
        growth = slope * (points[-1][0] - points[0][0]) / size
        row = bench.at_most(
            "%s: memory grew by" % name,
            100 * growth,
            "%",
            100 * FLAT,
            "%+.0f KiB an hour, %.1f MiB" % (slope / bench.KIB, size / bench.MIB),
        )
        yield (
            row
            if points[-1][0] * 3600 >= LEAST_SECONDS
            else row._replace(bound=None, note=row.note + "; too short a time to judge")
        )


def judge_rest(before, after, slots_left):
    """Rows for what stayed when the agents had gone."""
    for name in after:
        for kind in ("threads", "descriptors"):
            yield bench.at_most(
                "%s: %s that stayed behind" % (name, kind),
                after[name][kind] - before[name][kind],
                "",
                0,
            )
    yield bench.at_most("slots that stayed behind", slots_left, "", 0)


def run(options, folder):
    """The rows of one soak."""
    fleet = bench.Fleet(
        bench.Stage(False, folder), options.agents, bridge=True, churn=options.churn
    )
    fleet.before_load = lambda: setattr(fleet, "empty", look(processes(fleet)))
    with fleet:
        pids = processes(fleet)
        looks, slots = soak(fleet, pids, options.minutes, options.churn)
        report = fleet.report()
        fleet.load.kill()
        after = wait_until_empty(fleet, pids)
        slots_left = len(support.nodes(fleet.master.page))
    yield bench.told(
        "agents that came and went", report["left"], "", "%d samples" % report["sent"]
    )
    yield bench.at_most(
        "agents that the master dropped",
        report["lost"],
        "",
        0,
        bench.told_reasons(report),
    )
    yield slots
    yield from judge_memory(looks)
    yield from judge_rest(fleet.empty, after, slots_left)


def wait_until_empty(fleet, pids):
    """The look when all is as it was before, or should be."""

    def left(now):
        return sum(
            now[name][kind] > fleet.empty[name][kind]
            for name in now
            for kind in ("threads", "descriptors")
        )

    deadline = time.monotonic() + EMPTY_SECONDS
    while (
        support.nodes(fleet.master.page) or left(look(pids))
    ) and time.monotonic() < deadline:
        time.sleep(1.0)
    return look(pids)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--agents",
        type=number(int, 1, 10000, "number"),
        default=1000,
        help="at once (1000)",
    )
    add(
        "--minutes",
        type=number(float, 1, 10000, "number"),
        default=20.0,
        help="for so long (20)",
    )
    add(
        "--churn",
        type=number(float, 0, 1000, "number"),
        default=5.0,
        help="agents that leave and come each second (5)",
    )
    add("--json", metavar="FILE", help="write the figures there, too")
    return parser


def main(argv=None):
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.json:
        bench.check_writable(parser, options.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine = bench.describe_machine()
    with tempfile.TemporaryDirectory(prefix="sentinel-soak-") as folder:
        rows = list(run(options, folder))
    print(bench.MACHINE % machine)
    print(
        "%d agents, %g minutes, %g of them replaced each second"
        % (options.agents, options.minutes, options.churn)
    )
    print(bench.render_table(rows))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {
                    "machine": machine,
                    "rows": [dict(row._asdict(), holds=row.holds) for row in rows],
                },
                file,
                indent=1,
            )
    return 0 if all(row.within(1.0) for row in rows) else 1


if __name__ == "__main__":
    support.COMPILED = False
    sys.exit(main())
