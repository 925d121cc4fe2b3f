#!/usr/bin/env python3
"""soak.py keeps agents coming and going for a long time and watches what the master keeps of them.

    python3 tests/soak.py                               1,000 agents, 20 minutes
    python3 tests/soak.py --agents 200 --minutes 2      for a look
    python3 tests/soak.py --my-jobs                     jobs that come and go, 20 minutes

The agents are those of load.py, through port_forward.py. All the time some leave, with a goodbye, a
reset, a close or in silence, and others come; somebody looks at the page. Every few seconds the
memory, threads and descriptors of each process are noted. Memory is what a process has allocated
(Anonymous in smaps_rollup, proc(5)). The shared table and the files of programs are not in it:
their sizes are fixed. A page that a process of the master has from its parent counts whole, whether
it is still shared or not: with a part of it, as in Pss, one would grow when another writes to its
own copy. In the end the load stops, and what it leaves behind is compared with what was there
before it came.

With --my-jobs it is a real Slurm that is watched (lab.sh, as root): all the time jobs start on the
two nodes, and end well, fail, are cancelled or run out of memory, and `--my-jobs` puts a step into
each. The master has room for fewer jobs than usual, so that its table is soon full. Then the jobs
stop, and no slot, step, process, thread or descriptor may stay behind; nor anything at all when the
master has ended.

Exit code 0: memory was flat after the first quarter of the time (with --my-jobs the first half, as
ended jobs are remembered for ten minutes; judged if that took 15 minutes in all), no agent was
dropped, nothing stayed behind. Else 1.
"""
# The rooms, from the top; a room uses only rooms above it.
#
#   looks          what processes take, from the outside
#   verdicts       rows out of looks
#   a load         the agents of load.py that come and go
#   my jobs        jobs of a real Slurm that come and go
#   command line   run one of the two, write the figures, judge

import argparse
import collections
import contextlib
import functools
import json
import operator
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time

import bench
import support
import test_lab
import test_lab_job
from master_server import number

LOOK_SECONDS = 5.0
WARM_UP = 0.25  # of the time: memory may grow for so long
FLAT = 0.02  # growth of the memory in all of the rest that is none
JOBS_WARM_UP = 0.5  # with --my-jobs: what has ended is remembered for ten minutes
# The table remembers the last 512 jobs, which would take the soak two hours.  With room for so many
# it is full before memory is judged.
LAST_JOBS = 24
LEAST_SECONDS = 15 * 60  # a shorter soak shows growth, and does not judge it
EMPTY_SECONDS = 30.0  # for the last slots, threads and descriptors to be given back
LATE_SECONDS = 10.0  # in which a slot follows the agent that comes or goes


# ==========================================================================================
# Looks: what processes take, from the outside
# ==========================================================================================


def count_threads(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def count_descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def look(pids):
    """{process: {"memory": bytes, "shared": bytes, "threads":, "descriptors":}} of {process: pid}.

    "shared" is its part of the shared table and of files that are mapped, proc(5).
    """
    return {
        name: {
            "memory": bench.own_memory(pid, "Anonymous"),
            "shared": bench.own_memory(pid, "Pss_Shmem")
            + bench.own_memory(pid, "Pss_File"),
            "threads": count_threads(pid),
            "descriptors": count_descriptors(pid),
        }
        for name, pid in pids.items()
    }


def in_mebibytes(seen):
    """The memory of each process and its part of what is shared, in words."""
    return ", ".join(
        "%s %.1f+%.1f" % (name, each["memory"] / bench.MIB, each["shared"] / bench.MIB)
        for name, each in seen.items()
    )


def wait_until(is_good, see, seconds):
    """See again and again until that is good, for so long at most: what was seen last."""
    deadline = time.monotonic() + seconds
    seen = see()
    while not is_good(seen) and time.monotonic() < deadline:
        time.sleep(1.0)
        seen = see()
    return seen


def left_behind(before, now):
    """Of how many processes there are more threads or descriptors than before."""
    return sum(
        now[name][kind] > before[name][kind]
        for name in now
        for kind in ("threads", "descriptors")
    )


# ==========================================================================================
# Verdicts: rows out of looks
# ==========================================================================================


def judge_memory(looks, warm_up=WARM_UP):
    """A row for each process: its growth after the warm-up, as a part of its memory."""
    late = [(at, each) for at, each in looks if at >= warm_up * looks[-1][0]]
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


# ==========================================================================================
# A load: the agents of load.py that come and go
# ==========================================================================================


def processes(fleet):
    """{what it is: pid} of the fleet's processes; the master's children as it logged them."""
    pids = {
        role: bench.role_of(fleet.master, role) for role in ("collector", "dashboard")
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
                    in_mebibytes(looks[-1][1]),
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


def run_load(options, folder):
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

    nodes = functools.partial(support.nodes, fleet.master.page)
    wait_until(operator.not_, nodes, EMPTY_SECONDS)
    return wait_until(
        lambda seen: not left_behind(fleet.empty, seen),
        lambda: look(pids),
        EMPTY_SECONDS,
    )


# ==========================================================================================
# My jobs: those of a real Slurm that come and go
# ==========================================================================================


# How jobs go on: what each of its processes does; all begin with a sleep of their own length
SCRIPT = """\
#!/bin/bash
srun --ntasks=$SLURM_NNODES --ntasks-per-node=1 bash -c %s
"""
ENDINGS = collections.OrderedDict(
    [
        ("well", "sleep %d"),
        ("failed", "sleep %d; exit 3"),
        ("cancelled", "sleep 600"),
        ("spinning", "timeout %d python3 -c 'while True: pass'; true"),
        ("out of memory", "sleep %d; exec python3 -c 'b = bytes(1 << 29)'"),
    ]
)
JOBS_AT_ONCE = 8
JOB_SECONDS = (
    45,
    120,
)  # how long they run: a job is attached to after 20 s, at the next look
EVERY_SECONDS = 5.0  # from one job to the next, while there is room
ROLES = ("collector", "dashboard", "recorder")
LEFT_SECONDS = 90.0  # for steps to end, and for the page to have no node left


class Jobs:
    """Jobs of the lab that come and go."""

    def __init__(self, lab):
        self.lab = lab
        self.running = {}  # id: when it is to be cancelled
        self.counts = collections.Counter()  # by how they end
        self.turns = 0
        self.next_at = 0.0

    def step(self):
        """Submit a job if it is time for one, and cancel those whose time it is."""
        now = time.monotonic()
        queue = self.lab.queue()
        self.running = {job: due for job, due in self.running.items() if job in queue}
        for job, due in self.running.items():
            if now > due:
                self.lab.run("login", "scancel", job)
        if now >= self.next_at and len(queue) < JOBS_AT_ONCE:
            self.next_at = now + EVERY_SECONDS
            self.submit()

    def submit(self):
        """Start the next job: its kind and its size in turn, its length by chance."""
        kind = list(ENDINGS)[self.turns % len(ENDINGS)]
        nodes = 1 + self.turns // len(ENDINGS) % 2
        self.turns += 1
        seconds = random.uniform(*JOB_SECONDS)
        command = ENDINGS[kind]
        if "%" in command:
            command %= seconds
        name = "job-%d.sh" % (self.turns % (2 * JOBS_AT_ONCE))
        with open(self.lab.path(name), "w") as file:
            file.write(SCRIPT % shlex.quote(command))
        os.chmod(self.lab.path(name), 0o755)
        flags = (
            "-N%d" % nodes,
            "--ntasks-per-node=1",
            "--mem=100",
            "-t15",
            "-o/dev/null",
        )
        job = self.lab.sbatch(*flags, "-J" + kind.split()[0], name)
        self.running[job] = time.monotonic() + (
            seconds if kind == "cancelled" else 10 * JOB_SECONDS[1]
        )
        self.counts[kind] += 1


def inner_pid(pid):
    """The pid that a process has in its own namespace, proc(5)."""
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"(?m)^NSpid:.*\s(\d+)$", file.read()).group(1))


def command_words(pid):
    """The words of a process's command line; none if it has ended."""
    with contextlib.suppress(OSError), open("/proc/%d/cmdline" % pid, "rb") as file:
        return file.read().split(b"\0")
    return []


def find_watchers(master):
    """{what it is: pid} of a master of the lab, its roles, relay and herd, as seen from outside."""
    roles = {}
    for role in ROLES:
        roles[bench.role_of(master, role)] = role
    pids = {}
    for pid in support.descendants(master.pid):
        words = command_words(pid)
        if b"--herd" in words:
            pids["herd"] = pid
        elif b"--jobs" in words:
            pids["relay"] = pid
        elif any(b"python" in word for word in words[:1]):
            role = roles.get(inner_pid(pid))
            if role:
                pids[role] = pid
            elif b"master_server.py" in words and b"--my-jobs" in words:
                pids.setdefault("supervisor", pid)
    missing = {*ROLES, "supervisor", "relay", "herd"} - set(pids)
    if missing:
        raise LookupError("no process is %s" % ", ".join(sorted(missing)))
    return pids


def family_of(pids):
    """How many processes there are below the supervisor, itself among them."""
    return 1 + len(support.descendants(pids["supervisor"]))


def memory_of_sruns(herd):
    """The memory of each srun of the herd, in bytes."""
    sizes = []
    for pid in bench.children(herd):
        if command_words(pid)[:1] == [b"srun"]:
            with contextlib.suppress(OSError, ValueError):
                sizes.append(bench.own_memory(pid))
    return sizes


def steps_of(lab):
    """How many steps of ours Slurm knows."""
    return lab.run("login", "squeue", "-s", "-h", "-o", "%j").split().count("sentinel")


def soak_jobs(lab, pids, browser, minutes):
    """Look while jobs come and go.

    What was seen: ([(seconds since the start, look)], jobs, most nodes, memory of the sruns).
    """
    jobs = Jobs(lab)
    start = time.monotonic()
    looks, most, sruns = [], 0, []
    while time.monotonic() < start + 60 * minutes:
        until = time.monotonic() + LOOK_SECONDS
        jobs.step()
        most = max(most, len(browser.nodes()))
        looks.append((time.monotonic() - start, look(pids)))
        sruns += memory_of_sruns(pids["herd"])
        if len(looks) % 12 == 0:
            print(
                "%3.0f min: %s MiB, %d jobs so far"
                % (looks[-1][0] / 60, in_mebibytes(looks[-1][1]), jobs.turns),
                file=sys.stderr,
                flush=True,
            )
        time.sleep(max(0.0, until - time.monotonic()))
    return looks, jobs, most, sruns


def run_jobs(options, folder):
    """The rows of a soak with jobs of a real Slurm."""
    for thing in test_lab.NEEDS:
        if thing != "root":
            bench.need(thing)
    lab = test_lab_job.Lab()
    try:
        lab.up()
        yield from watch_jobs(lab, options.minutes)
    finally:
        lab.down()


def watch_jobs(lab, minutes):
    """The same, once the lab is up."""
    test_lab.LAB = lab
    shared = shared_memory_of(lab)
    small = support.with_constants("master_server.py", JOBS=LAST_JOBS)
    shutil.copy(small, lab.path("master_server.py"))
    master = lab.start("login", "python3", "master_server.py", "--my-jobs")
    master.listening("dashboard")
    pids = support.eventually(lambda: find_watchers(master), bench.START_LIMIT)
    browser = test_lab.Browser("login")
    browser.nodes()
    # a question to Slurm may be under way
    family = wait_until(lambda count: False, lambda: family_of(pids), LOOK_SECONDS)
    before = look(pids)
    looks, jobs, most, sruns = soak_jobs(lab, pids, browser, minutes)
    lab.no_jobs()

    def rest():
        return len(browser.nodes()), steps_of(lab)

    nodes, steps = wait_until(lambda seen: not any(seen), rest, LEFT_SECONDS)
    after = wait_until(
        lambda seen: not left_behind(before, seen), lambda: look(pids), EMPTY_SECONDS
    )
    processes = wait_until(
        lambda count: count <= family, lambda: family_of(pids), EMPTY_SECONDS
    )
    kinds = ", ".join("%d %s" % (count, kind) for kind, count in jobs.counts.items())
    yield bench.told("jobs that came and went", jobs.turns, "", kinds)
    yield bench.at_least("nodes of jobs seen at once", most, "", 2)
    if sruns:
        size = statistics.mean(sruns) / bench.MIB
        yield bench.told("an srun of the herd: memory (PSS)", size, "MiB")
    yield from judge_memory(looks, JOBS_WARM_UP)
    yield from judge_rest(before, after, nodes)
    yield bench.at_most("steps that stayed behind", steps, "", 0)
    extra = processes - family
    yield bench.at_most("processes that stayed behind", extra, "", 0)
    ended = len(pids) - sum(map(support.alive, pids.values()))
    yield bench.at_most("processes that have ended meanwhile", ended, "", 0)
    browser.tool.stop()
    watched = support.descendants(master.pid)
    yield bench.at_most("exit code of the master", master.stop(), "", 0)
    yield from judge_end(lab, shared, watched)


def shared_memory_of(lab):
    """What there is in /dev/shm of the login node."""
    return set(lab.run("login", "ls", "/dev/shm").split())


def judge_end(lab, shared, watched):
    """Rows for what a master leaves that has ended."""

    def alive():
        agents = sum(len(lab.pids(host, "agent.py")) for host in ("c1", "c2"))
        return sum(map(support.alive, watched)), agents, steps_of(lab)

    processes, agents, steps = wait_until(
        lambda seen: not any(seen), alive, EMPTY_SECONDS
    )
    yield bench.at_most("processes after the master's end", processes, "", 0)
    yield bench.at_most("agents after the master's end", agents, "", 0)
    yield bench.at_most("steps after the master's end", steps, "", 0)
    kept = len(shared_memory_of(lab) - shared)
    yield bench.at_most("shared memory after the master's end", kept, "", 0)


# ==========================================================================================
# Command line
# ==========================================================================================


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
    add(
        "--my-jobs",
        action="store_true",
        help="watch jobs of a real Slurm that come and go (lab.sh, as root)",
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
        run = run_jobs if options.my_jobs else run_load
        try:
            rows = list(run(options, folder))
        except bench.Missing as error:
            parser.error("missing here: %s" % error)
    print(bench.MACHINE % machine)
    if options.my_jobs:
        print("jobs that come and go, %g minutes" % options.minutes)
    else:
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
