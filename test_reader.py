#!/usr/bin/env python3
"""test_reader.py - show what a running master holds in its shared memory.

    master_server.py --> shared memory sentinel_PORT --> test_reader.py --> terminal, stdout

It attaches from outside and only reads: run it as often as you like, it never harms the
table. It runs on the master's machine, with master_server.py beside it.

    python3 test_reader.py                  the table of the master on port 13579, once
    python3 test_reader.py --watch          again and again, until Ctrl-C
    python3 test_reader.py --tui            screens: jobs, their nodes, ranks and GPUs; q quits
    python3 test_reader.py --jobs           the jobs that were recorded; this needs no master

Exit codes: 0 done, 1 no master, no whole copy or no records, 2 bad usage.
"""

# The rooms of this file, in their order. All but the last two are pure.
#
#   Lines           texts and looks; what an encoding can show
#   Jobs            a snapshot -> jobs with their nodes, what needs the user first
#   Tables          rows -> lines, of the columns that have room
#   Screens         what is open and chosen -> the lines of the whole screen
#   The terminal    curses, signals, the log of a master that runs on the same terminal
#   Command line    flags, and what they start

import sys
import textwrap

if __name__ == "__main__":
    # Python looks for modules beside the script first, unless it was told not to. A
    # json.py of the user's in there would take the place of the standard library's.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]

import argparse
import collections
import contextlib
import functools
import importlib.util
import locale
import operator
import os
import select
import shutil
import signal
import time
import unicodedata
from typing import (
    Any,
    Deque,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

WATCH_SECONDS = 2  # from one look of --watch to the next
HOME = "\x1b[H"  # what a terminal takes for: to the top, ...
CLEAR_LINE = "\x1b[K"  # ... empty the rest of this line, ...
CLEAR_BELOW = "\x1b[J"  # ... empty all that is below


class ReaderError(Exception):
    """What keeps this program from its work, as a line for the user."""


# ============================================================================
# Lines: what a screen is made of, before anything is shown
# ============================================================================

Message = Dict[str, Any]  # a row: of a node, a job, a rank or a GPU
Span = Tuple[str, str]  # a text, and its look
Line = List[Span]

# The looks. Each can be told from the text alone: marks, brackets and > say the same.
PLAIN = ""
BOLD = "bold"
DIM = "dim"
HEADING = "heading"
CHOSEN = "chosen"
GOOD = "good"
ADVICE = "advice"
PROBLEM = "problem"

# Eighths of a block, from the left, and from below
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
ELLIPSIS = "\u2026"
HEIGHTS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


class Letters:
    """What an encoding can show: the one way of a text to the screen."""

    def __init__(self, encoding: str) -> None:
        try:
            "".encode(encoding)
        except LookupError:
            encoding = "ascii"
        self.encoding = encoding
        self.has_blocks = self.clean(EIGHTHS) == EIGHTHS

    def clean(self, text: str) -> str:
        """The text with a ? for what would act on a terminal, or cannot be written on it."""
        if text.isascii() and text.isprintable():
            return text
        shown = "".join(char if char.isprintable() else "?" for char in text)
        return shown.encode(self.encoding, "replace").decode(self.encoding)

    def fit(self, text: str, width: int) -> str:
        """A text for so many columns: where it is cut, its end tells that."""
        if columns_of(text) <= width:
            return text
        end = ELLIPSIS if self.has_blocks else ">"
        return cut(text, max(0, width - 1)) + end

    def bar(self, percent: Optional[float], width: int) -> str:
        """A bar of so many columns for a value from 0 to 100; blanks if it is not known."""
        if percent is None:
            return " " * width
        eighths = round(max(0.0, min(100.0, percent)) / 100 * width * 8)
        if not self.has_blocks:
            return ("|" * round(eighths / 8)).ljust(width, ".")
        whole, rest = divmod(eighths, 8)
        bar = EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")
        return bar.ljust(width)

    def strip(self, tenths: str) -> str:
        """A CPU's busy tenths, 0 to 9, as a letter each; - where it is not known."""
        if not self.has_blocks:
            return tenths
        return "".join(HEIGHTS[min(8, int(c))] if c.isdigit() else c for c in tenths)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes (Unicode, UAX 11)."""
    if text.isascii():
        return len(text)
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def cut(text: str, room: int) -> str:
    """The beginning of a text that has room in so many columns."""
    if text.isascii():
        return text[:room]
    while columns_of(text) > room:
        text = text[:-1]
    return text


def pad(text: str, width: int, to_right: bool = False) -> str:
    """A text that takes so many columns exactly."""
    text = cut(text, width)
    blanks = " " * (width - columns_of(text))
    return blanks + text if to_right else text + blanks


def cut_line(line: Line, width: int) -> Line:
    """The beginning of a line that has room in so many columns."""
    shown: Line = []
    for text, look in line:
        text = cut(text, width)
        width -= columns_of(text)
        shown.append((text, look))
    return shown


def text_of(line: Line) -> str:
    """A line without its looks."""
    return "".join(text for text, _ in line)


def clock(seconds: Optional[float]) -> str:
    """A time as Slurm writes it, without seconds: 2:13, 1-04:00; a dash if it is not known."""
    if seconds is None:
        return "-"
    minutes = int(seconds // 60)
    days, rest = divmod(minutes, 24 * 60)
    if days:
        return "%d-%02d:%02d" % (days, rest // 60, rest % 60)
    return "%d:%02d" % (rest // 60, rest % 60)


# ============================================================================
# Jobs and their nodes: a snapshot -> what the screens show
# ============================================================================

OUTSIDE = "(no job)"  # what nodes outside of jobs are listed under
# what lists have of a node: to decode all fields of a thousand nodes takes too long
NODE_TEXTS = ("node", "job", "job_name", "user", "version", "address", "alerts")
NODE_NUMBERS = (
    "slot",
    "cpu",
    "ram",
    "age",
    "job_cpu",
    "job_ram",
    "gpu",
    "gpu_mem",
    "load1",
    "psi_io",
    "net_rx",
    "net_tx",
    "disk_read",
    "disk_write",
    "job_time_limit",
    "job_time_left",
)
TEXTS_KEPT = 16384  # that are decoded once: they are the same in the next snapshot
MARKS = {"died": "X", "problem": "!", "advice": "*", "fine": " "}
LOOKS = {"died": PROBLEM, "problem": PROBLEM, "advice": ADVICE, "fine": PLAIN}
SEVERITIES = tuple(MARKS)  # the worst first, ...
NEEDS = SEVERITIES[:-1]  # ... of which these need the job's user


class Group(NamedTuple):
    """A job, or all tasks of an array, or the nodes outside of jobs."""

    key: str
    row: Message  # what the list of jobs shows of it: see JOB_COLUMNS
    nodes: List[Message]  # live, with marks; then those that were lost
    verdicts: List[Any]  # the worst first


def verdicts_of(
    master_server: Any, snapshot: Any, tasks: List[Message]
) -> List[Message]:
    """The verdicts on a job or the tasks of an array that need its user, the worst first."""
    judged = master_server.verdicts_of(snapshot)
    found: List[Message] = []
    for task in tasks:
        found += judged.get(task["raw"], [])
    found = [verdict for verdict in found if verdict["severity"] in NEEDS]
    return sorted(found, key=lambda verdict: NEEDS.index(verdict["severity"]))


@functools.lru_cache(maxsize=TEXTS_KEPT)
def read_text(field: bytes) -> Optional[str]:
    """A text of the table; None if there is none."""
    return field.rstrip(b"\0").decode("utf-8", "ignore") or None


def picker(master_server: Any, keys: Sequence[str]) -> Any:
    """What takes the fields of these keys out of a row of a snapshot."""
    places = [master_server.NODE_KEYS.index(key) for key in keys]
    return operator.itemgetter(*places)


def read_nodes(master_server: Any, snapshot: Any) -> List[Message]:
    """The nodes with what lists have of them."""
    texts_in = picker(master_server, NODE_TEXTS)
    numbers_in = picker(master_server, NODE_NUMBERS)
    nodes = []
    names: Set[Tuple[str, str]] = set()
    for row in snapshot.rows():
        node: Message = dict(zip(NODE_TEXTS, map(read_text, texts_in(row))))
        known = [value if value == value else None for value in numbers_in(row)]
        node.update(zip(NODE_NUMBERS, known))
        node["cpu"] = round(node["cpu"], 2)
        node["ram"] = round(node["ram"], 2)
        node["age"] = round(max(0.0, snapshot.copied - node["age"]), 2)
        node = master_server.with_marks(node)
        node["what"] = None
        node["told"] = []
        if node["alerts"]:
            node["told"] = master_server.words_of_alerts(node)
        node["key"] = master_server.name_of(node)
        if (node["job"], node["key"]) in names:  # two agents there
            node["key"] += " #%d" % node["slot"]
        names.add((node["job"], node["key"]))
        nodes.append(node)
    return nodes


def lost_nodes(master_server: Any, snapshot: Any) -> List[Message]:
    """A row without readings for each node that was lost and is not back."""
    nodes = []
    for event in master_server.gone(snapshot, "lost"):
        node: Message = dict.fromkeys(NODE_TEXTS + NODE_NUMBERS)
        for key in ("node", "job", "user", "address"):
            node[key] = event[key]
        at = master_server.render_value("time", event["time"])
        node["marks"] = []
        node["load"] = None
        node["key"] = master_server.name_of(node)
        node["what"] = "lost at %s: %s" % (at, event["text"] or "-")
        nodes.append(node)
    return nodes


def group_jobs(master_server: Any, snapshot: Any) -> List[Group]:
    """Every job with its nodes, what needs the user first."""
    nodes_of = by_job(read_nodes(master_server, snapshot))
    for key, nodes in nodes_of.items():
        if key != OUTSIDE:
            master_server.mark_idle(nodes)
    lost_of = by_job(lost_nodes(master_server, snapshot))
    groups = []
    for tasks in fold_arrays(master_server.jobs_in_order(snapshot)):
        keys = {task[key] for task in tasks for key in ("job", "raw", "array")}
        keys.discard(None)
        row = row_of_tasks(master_server, snapshot, tasks)
        if row["state"] in master_server.ENDED_STATES:
            lost = []  # its nodes left with it
        else:
            lost = take_all(lost_of, keys)
        nodes = take_all(nodes_of, keys)
        groups.append(
            make_group(row, nodes, lost, verdicts_of(master_server, snapshot, tasks))
        )
    for key in sorted(set(nodes_of) | set(lost_of), key=master_server.natural):
        nodes = nodes_of.get(key, [])
        lost = lost_of.get(key, [])
        row = row_of_nodes(key, nodes or lost)
        verdicts = verdicts_of(master_server, snapshot, [{"raw": key}])
        groups.append(make_group(row, nodes, lost, verdicts))
    ended = master_server.ENDED_STATES
    return sorted(groups, key=lambda group: urgency(group, ended))


def fold_arrays(jobs: Iterable[Message]) -> Iterable[List[Message]]:
    """The jobs, each in a list; the tasks of an array in one, where its first task is."""
    arrays: Dict[Any, List[Message]] = {}
    for job in jobs:
        arrays.setdefault(job["array"] or job["raw"], []).append(job)
    return arrays.values()


def row_of_tasks(master_server: Any, snapshot: Any, tasks: List[Message]) -> Message:
    """A row for a job, or for all tasks of an array: what Slurm says, and the judgement."""
    job = tasks[0]
    severity, text = master_server.judge_job(snapshot, tasks)
    row = dict(job, slot=job["raw"], severity=severity, text=text)
    row["ran"] = master_server.run_time(job, snapshot.time)
    if len(tasks) > 1:
        row.update(job=job["array"], state=main_state(tasks), nodes=None, ran=None)
        counts = master_server.count_tasks(tasks)
        row["text"] = "; ".join(([text] if text else []) + [counts])
    return row


def main_state(tasks: List[Message]) -> Optional[str]:
    """The state of an array: that of a task that runs, or waits, or the first one's."""
    states: List[Optional[str]] = [task["state"] for task in tasks]
    for state in ("RUNNING", "PENDING"):
        if state in states:
            return state
    return states[0]


def by_job(nodes: List[Message]) -> Dict[str, List[Message]]:
    """Nodes by their jobs."""
    nodes_of: Dict[str, List[Message]] = {}
    for node in nodes:
        nodes_of.setdefault(node["job"] or OUTSIDE, []).append(node)
    return nodes_of


def take_all(rows_of: Dict[str, List[Message]], keys: Iterable[str]) -> List[Message]:
    """The rows under any of the keys, taken out."""
    rows: List[Message] = []
    for key in keys:
        rows += rows_of.pop(key, [])
    return rows


def row_of_nodes(key: str, nodes: List[Message]) -> Message:
    """A row for a job of which Slurm says nothing: what its nodes say."""
    first = nodes[0]
    limit = first["job_time_limit"]
    left = first["job_time_left"]
    is_known = limit is not None and left is not None
    return {
        "slot": key,
        "job": key,
        "job_name": first["job_name"],
        "user": first["user"],
        "state": None if key == OUTSIDE else "RUNNING",
        "nodes": None,
        "ran": limit - left if is_known else None,
        "limit": limit,
        "severity": None,
        "text": None,
    }


def make_group(
    row: Message, nodes: List[Message], lost: List[Message], verdicts: List[Any]
) -> Group:
    """A job with its nodes, and the row that sums them up."""
    for node in nodes + lost:
        node["severity"] = "advice" if node["marks"] else "fine"
        if node["alerts"] or node["slot"] is None:
            node["severity"] = "problem"
        idle = [mark for mark in node["marks"] if mark == "idle"]
        node["what"] = ", ".join(node.get("told", []) + idle) or node["what"]
    found = [row["severity"]] + [verdict["severity"] for verdict in verdicts]
    severity = worst_of(found, nodes, lost)
    words = [row["text"]] if row["text"] else []
    if not words and verdicts:
        words = [verdicts[0]["what"]]
    words += sum_up(nodes, lost)
    time_used = "-"
    if row["ran"] is not None:
        time_used = clock(row["ran"])
        if row["limit"]:
            time_used += "/" + clock(row["limit"])
    row = dict(
        row,
        key=str(row["slot"]),
        severity=severity,
        mark=MARKS[severity],
        count=len(nodes) + len(lost) or row["nodes"],
        used=time_used,
        cpu=mean_of(nodes, "load"),
        ram=mean_of(nodes, "job_ram", "ram"),
        gpu=mean_of(nodes, "gpu"),
        what="; ".join(words) or None,
    )
    return Group(row["key"], row, nodes + lost, verdicts)


def worst_of(found: List[Any], nodes: List[Message], lost: List[Message]) -> str:
    """The worst of what is judged; where nothing is, of alerts, lost and idle nodes."""
    found = [severity for severity in found if severity]
    if found:
        lost, nodes = [], []
    if lost or any(node["alerts"] for node in nodes):
        found.append("problem")
    if any("idle" in node["marks"] for node in nodes):
        found.append("advice")
    for severity in SEVERITIES:
        if severity in found:
            return severity
    return "fine"


def sum_up(nodes: List[Message], lost: List[Message]) -> List[str]:
    """What is wrong with nodes, in a few words each."""
    words = []
    for what, rows in (
        ("lost", lost),
        ("alert", [node for node in nodes if node["alerts"]]),
        ("idle", [node for node in nodes if "idle" in node["marks"]]),
    ):
        if len(rows) > 1:
            words.append("%d %s" % (len(rows), what))
        elif rows and what == "alert":
            words.append("%s: %s" % (rows[0]["key"], rows[0]["what"]))
        elif rows:
            words.append("%s %s" % (rows[0]["key"], what))
    return words


def mean_of(nodes: List[Message], *keys: str) -> Optional[float]:
    """The mean of the first of these readings that a node has; None where none has any."""
    values = []
    for node in nodes:
        known = [node[key] for key in keys if node[key] is not None]
        values += known[:1]
    return sum(values) / len(values) if values else None


def urgency(group: Group, ended_states: Sequence[str]) -> Tuple[int, int]:
    """A key to sort jobs by: the worst first; then those that run, wait, and have ended."""
    state = group.row["state"]
    if state == "RUNNING":
        place = 0
    elif group.key == OUTSIDE:
        place = 1
    else:
        place = 3 if state in ended_states else 2
    return SEVERITIES.index(group.row["severity"]), place


# ============================================================================
# Tables: rows -> lines, of columns that have room
# ============================================================================

BAR_COLUMNS = 10  # of a terminal, that a bar takes
GAP = 1  # between two columns
LAST_COLUMNS = 16  # that the last column of a table has before others have any
SORTED_BY = {"used": "ran"}  # where the value that counts is not what is shown


class Column(NamedTuple):
    """A column of a table on the screen.

    key: of the value in a row; width: columns of the terminal, at most so many for a text;
    importance: 0 is always there, and the larger ones leave first when there is no room.
    """

    key: str
    heading: str
    width: int
    importance: int
    is_number: bool = False
    unit_of: str = (
        ""  # the metric whose unit the values have, if it is not the key's; or %
    )


JOB_COLUMNS = (
    Column("mark", "", 1, 0),
    Column("job", "Job", 16, 0),
    Column("job_name", "Name", 15, 3),
    Column("user", "User", 10, 8),
    Column("state", "State", 13, 1),
    Column("count", "Nodes", 5, 4, True),
    Column("used", "Time", 20, 5),
    Column("bar", "", BAR_COLUMNS, 7),
    Column("cpu", "CPU", 5, 1, True, "%"),
    Column("ram", "Mem", 5, 3, True, "%"),
    Column("gpu", "GPU", 5, 3, True, "%"),
    Column("what", "What", 100, 2),
)
NODE_COLUMNS = (
    Column("key", "Node", 30, 0),
    Column("bar", "", BAR_COLUMNS, 5),
    Column("cpu", "CPU", 7, 0, True),
    Column("ram", "RAM", 7, 1, True),
    Column("job_cpu", "Job CPU", 7, 2, True),
    Column("job_ram", "Job RAM", 7, 2, True),
    Column("gpu", "GPU", 7, 2, True),
    Column("gpu_mem", "GPU mem", 7, 6, True),
    Column("load1", "Load", 6, 3, True),
    Column("psi_io", "I/O wait", 8, 7, True),
    Column("net_rx", "Received", 11, 7, True),
    Column("net_tx", "Sent", 11, 7, True),
    Column("disk_read", "Disk read", 11, 8, True),
    Column("disk_write", "Disk write", 11, 8, True),
    Column("age", "Age", 7, 3, True),
    Column("slot", "Slot", 5, 6, True),
    Column("address", "Address", 28, 9),
    Column("what", "What", 100, 1),
)
GPU_COLUMNS = (
    Column("index", "GPU", 4, 0, True),
    Column("name", "Name", 20, 4),
    Column("bar", "", BAR_COLUMNS, 5),
    Column("gpu", "Busy", 7, 0, True, "gpu"),
    Column("mem_used", "Memory", 10, 1, True),
    Column("mem_total", "of", 10, 2, True),
    Column("power", "W", 6, 3, True, "procs"),
    Column("power_limit", "of", 6, 6, True, "procs"),
    Column("temp", "C", 5, 3, True, "procs"),
    Column("processes", "Procs", 5, 5, True),
    Column("mig", "MIG", 12, 7),
    Column("throttle", "Throttled by", 20, 4),
    Column("error", "Error", 40, 3),
)
RANK_COLUMNS = (
    Column("rank", "Rank", 5, 0, True, "procs"),
    Column("pid", "PID", 8, 0, True, "procs"),
    Column("step", "Step", 6, 5),
    Column("program", "Program", 16, 1),
    Column("state", "S", 1, 2),
    Column("bar", "", BAR_COLUMNS, 8),
    Column("cpu", "CPU", 9, 0, True),
    Column("mem", "Memory", 9, 1, True),
    Column("peak", "Peak", 9, 4, True, "mem_used"),
    Column("threads", "Thr", 4, 4, True, "procs"),
    Column("running", "Run", 4, 5, True, "procs"),
    Column("gpu", "GPUs", 6, 3),
    Column("cpus", "May use", 12, 5),
    Column("on", "Ran on", 12, 5),
    Column("read", "Reads now", 11, 6, True, "disk_read"),
    Column("write", "Writes now", 11, 6, True, "disk_write"),
    Column("wchan", "Waits in", 20, 7),
)


class Table:
    """The columns of a table that have room on a screen, and the lines of its rows."""

    def __init__(
        self,
        master_server: Any,
        letters: Letters,
        columns: Sequence[Column],
        rows: Sequence[Message],
        width: int,
        bar_key: str,
    ) -> None:
        self.master_server = master_server
        self.letters = letters
        self.width = width
        self.bar_key = bar_key
        self.widths: Dict[str, int] = {}
        last = columns[-1]
        room = width - 1  # a mark of the chosen row comes first
        for column in sorted(columns, key=lambda column: column.importance):
            needed = self.width_of(column, rows)
            if column is last:
                needed = min(needed, LAST_COLUMNS)
            if needed and (needed + GAP <= room or not column.importance):
                self.widths[column.key] = needed
                room -= needed + GAP
        if last.key in self.widths:
            more = self.width_of(last, rows) - self.widths[last.key]
            self.widths[last.key] += max(0, min(more, room))
        self.columns = [column for column in columns if column.key in self.widths]

    def width_of(self, column: Column, rows: Sequence[Message]) -> int:
        """The columns of the terminal that a column would like; 0 if no row has its value."""
        if column.key == "bar":
            return column.width if rows else 0
        if column.is_number:
            is_known = any(row.get(column.key) is not None for row in rows)
            return column.width if is_known or not column.importance else 0
        texts = [row[column.key] for row in rows if row.get(column.key)]
        if not texts and column.importance:
            return 0
        widest = max([columns_of(str(text)) for text in texts] or [0])
        return min(column.width, max(widest, len(column.heading), 1))

    def heading(self) -> Line:
        """The line of the columns' names."""
        cells = [
            pad(column.heading, self.widths[column.key], column.is_number)
            for column in self.columns
        ]
        return [(pad(" " + (" " * GAP).join(cells), self.width), HEADING)]

    def line(self, row: Message, is_chosen: bool) -> Line:
        """The line of a row."""
        cells = [self.cell(column, row) for column in self.columns]
        text = (">" if is_chosen else " ") + (" " * GAP).join(cells)
        look = LOOKS[row.get("severity") or ("advice" if row.get("what") else "fine")]
        return [(text, CHOSEN if is_chosen else look)]

    def cell(self, column: Column, row: Message) -> str:
        """What a column says of a row, in its width."""
        width = self.widths[column.key]
        if column.key == "bar":
            percent = row.get(self.bar_key)
            if percent is not None and row.get("cpus") and "pid" in row:
                cpus = self.master_server.parse_cpu_list(row["cpus"])
                percent /= max(1, len(cpus))  # of those that the process may use
            return self.letters.bar(percent, width)
        text = self.letters.clean(self.reading(column, row))
        if not column.is_number:
            text = self.letters.fit(text, width)
        return pad(text, width, column.is_number)

    def reading(self, column: Column, row: Message) -> str:
        """A value for people; what a peer has sent in place of a number is a text."""
        value = row.get(column.key)
        if value is None:
            return "-" if column.is_number else ""
        if isinstance(value, str):
            return value
        if column.unit_of == "%":
            return "%.0f %%" % value
        key = column.unit_of or column.key
        text: str = self.master_server.render_value(key, value)
        return text


# ============================================================================
# Screens: what is open and chosen, and the lines of it
# ============================================================================
#
#   Jobs        Enter -->  Nodes of a job  Enter -->  Node: its GPUs, ranks, CPUs, readings
#               <-- Esc                    <-- Esc
#
#   title       what there is, and the time of it
#   verdicts    the worst three
#   table       a heading, and the rows that have room
#   notes       the last lines of the log, or the last events
#   keys        or what is asked for

JOBS, NODES, NODE = range(3)  # how deep one is
MAX_VERDICTS = 3
MIN_DETAILS = 3  # lines: a blank one, a job, what is said of it
NOTES = 3  # lines below, if ...
NOTES_FROM = 16  # ... there are so many in all
METRIC_COLUMNS = 26  # of the terminal, for a reading on a node's screen
KEY_BARS = {
    JOBS: "Enter:nodes  /:filter  s:sort  ?:help  q:quit",
    NODES: "Enter:node  Esc:jobs  /:filter  s:sort  ?:help  q:quit",
    NODE: "Up Down:scroll  Esc:nodes  ?:help  q:quit",
}
ASKED_BARS = {
    "sort": "Up Down:choose  Enter:sort by it  Esc:back",
    "help": "any key:back  q:quit",
}
HELP = """
 Up Down PgUp PgDn Home End   choose a row
 Enter, Right                 open it: a job's nodes, a node's ranks and GPUs
 Esc, Left, Backspace         back
 /                            only the rows with these words; Esc: all again
 s                            sort by a column; once more: the other way round
 Ctrl-L                       draw the screen again
 ?, F1                        this page
 q, F10, Ctrl-C               quit

 In front of a job:   X it died   ! a problem   * a hint
 A dash is what is not known; it is never shown as 0.

 Ranks:  Thr threads, Run those of them that can run, S the state: R runs, S sleeps,
         D waits for a disk;  the bar is of the CPUs that the rank may use
""".strip("\n")


class View:
    """The state of the screens: what the last snapshot holds, and what the user has chosen."""

    def __init__(self, master_server: Any, letters: Letters) -> None:
        self.master_server = master_server
        self.letters = letters
        self.snapshot: Any = None
        self.groups: List[Group] = []
        self.trouble = ""  # why there is no newer snapshot
        self.log: Any = None  # the master's Log, if it runs on the same terminal
        self.path: List[str] = []  # the keys of what is open: a job's, a node's
        self.chosen = ["", "", ""]  # the key of the chosen row of each depth
        self.places = [0, 0, 0]  # where that row was when it was last there
        self.sorts = ["", "key", ""]
        self.words = ["", "", ""]  # of the filter
        self.asked = ""  # "filter", "sort" or "help" while that is open
        self.choice = 0  # in the list of what can be sorted by
        self.page = 10  # rows that have room
        self.has_ended = False

    # ---- what there is

    def take(self, snapshot: Any) -> None:
        """Show this snapshot from now on."""
        self.snapshot = snapshot
        self.groups = group_jobs(self.master_server, snapshot)
        self.trouble = ""

    @property
    def depth(self) -> int:
        """JOBS, NODES or NODE."""
        return len(self.path)

    def group(self) -> Optional[Group]:
        """The job that is open."""
        for group in self.groups:
            if self.path and group.key == self.path[0]:
                return group
        return None

    def node(self) -> Optional[Message]:
        """The node that is open, as the list of nodes has it."""
        group = self.group()
        for node in group.nodes if group else ():
            if node["key"] == self.path[1]:
                return node
        return None

    def columns(self) -> Sequence[Column]:
        """Those of the list that is open; the user's when there are several."""
        if self.depth:
            return NODE_COLUMNS
        users = {group.row["user"] for group in self.groups}
        return [
            column for column in JOB_COLUMNS if column.key != "user" or len(users) > 1
        ]

    def rows(self) -> List[Message]:
        """The rows of the list that is open, filtered and sorted."""
        words = self.words[self.depth].lower().split()
        if self.depth == JOBS:
            rows = [group.row for group in self.groups if has_words(group, words)]
        else:
            group = self.group()
            rows = list(group.nodes) if group else []
        if self.depth and words:
            asked_for = self.master_server.is_asked_for
            rows = [row for row in rows if asked_for(row, {}, words)]
        sort = self.sorts[self.depth]
        if sort:
            key = sort.lstrip("-")
            sort = sort.replace(key, SORTED_BY.get(key, key))
            rows = self.master_server.in_order(rows, sort)
        return rows

    def chosen_place(self, rows: List[Message]) -> int:
        """Which row is chosen: that of the key, or what came in its place."""
        key = self.chosen[self.depth]
        for place, row in enumerate(rows):
            if row["key"] == key:
                return place
        return max(0, min(self.places[self.depth], len(rows) - 1))

    # ---- keys

    def press(self, key: str) -> None:
        """Act on a key: a character, or a name of KEYS."""
        if self.asked == "filter":
            self.press_in_filter(key)
        elif self.asked == "sort":
            self.press_in_sort(key)
        elif self.asked:
            self.asked = ""
            self.has_ended = key in ("q", "f10")
        elif key in ("q", "f10"):
            self.has_ended = True
        elif key in ("?", "f1"):
            self.asked = "help"
        elif key in ("/", "f3", "f4") and self.depth < NODE:
            self.asked = "filter"
        elif key in ("s", "f6") and self.depth < NODE:
            self.ask_for_sort()
        elif key in ("enter", "right"):
            self.open_chosen()
        elif key in ("escape", "left", "backspace"):
            self.go_back(key)
        else:
            self.move(key)

    def press_in_filter(self, key: str) -> None:
        """A key while words are typed."""
        words = self.words[self.depth]
        if key == "escape":
            words = ""
            self.asked = ""
        elif key == "enter":
            self.asked = ""
        elif key == "backspace":
            words = words[:-1]
        elif len(key) == 1:
            words += key
        else:
            self.move(key)
        self.words[self.depth] = words

    def sortable(self) -> List[Column]:
        """What the list that is open can be sorted by."""
        return [column for column in self.columns() if column.heading]

    def ask_for_sort(self) -> None:
        """Open the list of columns at the one that counts."""
        self.asked = "sort"
        keys = [column.key for column in self.sortable()]
        key = self.sorts[self.depth].lstrip("-")
        self.choice = keys.index(key) if key in keys else 0

    def press_in_sort(self, key: str) -> None:
        """A key while a column is chosen to sort by."""
        columns = self.sortable()
        if key == "up":
            self.choice = max(0, self.choice - 1)
        elif key == "down":
            self.choice = min(len(columns) - 1, self.choice + 1)
        elif key in ("enter", "s"):
            self.sort_by(columns[self.choice])
            self.asked = ""
        elif key in ("escape", "q"):
            self.asked = ""

    def sort_by(self, column: Column) -> None:
        """Sort by a column: numbers from the largest on; the same again the other way round."""
        sort = "-" + column.key if column.is_number else column.key
        if self.sorts[self.depth] == sort:
            sort = column.key if column.is_number else "-" + column.key
        self.sorts[self.depth] = sort

    def open_chosen(self) -> None:
        """Go one deeper."""
        if self.depth == NODE:
            return
        rows = self.rows()
        if rows:
            key = rows[self.chosen_place(rows)]["key"]
            self.chosen[self.depth] = key
            self.path.append(key)
            self.places[self.depth] = 0
            self.chosen[self.depth] = ""

    def go_back(self, key: str) -> None:
        """Show all rows again after a filter, else go back to the list before."""
        if key == "escape" and self.words[self.depth]:
            self.words[self.depth] = ""
        elif self.path:
            self.words[self.depth] = ""
            self.chosen[self.depth - 1] = self.path.pop()

    def move(self, key: str) -> None:
        """Choose another row, or scroll a node's screen."""
        steps = {
            "up": -1,
            "down": 1,
            "pageup": -self.page,
            "pagedown": self.page,
            "home": -(10**6),
            "end": 10**6,
        }
        if key not in steps:
            return
        if self.depth == NODE:
            self.places[NODE] = max(0, self.places[NODE] + steps[key])
            return
        rows = self.rows()
        if rows:
            place = self.chosen_place(rows) + steps[key]
            place = max(0, min(place, len(rows) - 1))
            self.places[self.depth] = place
            self.chosen[self.depth] = rows[place]["key"]

    # ---- lines

    def title(self, width: int) -> Line:
        """The first line: what there is, whether all is well, and the time of it."""
        if self.snapshot is None:
            return [("Cluster Sentinel", BOLD)]
        now = self.master_server.render_value("time", self.snapshot.time)
        state = "live"
        if self.trouble:
            state = self.trouble
        elif self.snapshot.beat > self.master_server.STALE_SECONDS:
            state = "OLD: the collector has been silent for %.0f s" % self.snapshot.beat
        right = "%s, %s" % (now, state)
        words = self.headline()
        is_bad = any(
            group.row["severity"] in ("died", "problem") for group in self.groups
        )
        left = pad(words, max(0, width - columns_of(right) - 1))
        return [(left, PROBLEM if is_bad else BOLD), (" " + right, PLAIN)]

    def headline(self) -> str:
        """How many jobs and nodes there are, and how many of the jobs need the user."""
        if self.depth:
            return self.letters.clean(self.open_names())
        jobs = [group for group in self.groups if group.key != OUTSIDE]
        nodes = sum(
            node["slot"] is not None for group in self.groups for node in group.nodes
        )
        severities = [group.row["severity"] for group in self.groups]
        words = "%s, %s" % (counted(len(jobs), "job"), counted(nodes, "node"))
        for severity, what in (("died", "died"), ("problem", "with a problem")):
            count = severities.count(severity)
            if count:
                words += " - %d %s" % (count, what)
        if self.snapshot.turned_away_lately:
            words += " - " + self.master_server.render_turned_away(self.snapshot)
        return self.letters.clean(words)

    def open_names(self) -> str:
        """The job and the node that are open, in words."""
        group = self.group()
        if group is None:
            return "%s is not there any more" % self.path[0]
        row = group.row
        words = [row["job"], row["job_name"], row["state"]]
        if row["ran"] is not None:
            words.append(row["used"])
        names = "  ".join(str(word) for word in words if word)
        if self.depth == NODE:
            return "%s  of %s" % (self.path[1], names)
        return "%s  %s" % (names, counted(row["count"] or 0, "node"))

    def verdict_lines(self, width: int, room: int) -> List[Line]:
        """What is wrong, of all jobs or of the one that is open, the worst first."""
        group = self.group()
        groups = [group] if group else self.groups
        found = [(verdict, group) for group in groups for verdict in group.verdicts]
        found.sort(key=lambda pair: SEVERITIES.index(pair[0]["severity"]))
        lines: List[Line] = []
        for verdict, group in found[:room]:
            words = [verdict.get(key) for key in ("what", "proof", "cure")]
            text = " - ".join(str(word) for word in words if word)
            name = "" if self.depth else "%s: " % group.row["job"]
            severity = verdict["severity"]
            text = self.letters.clean("%s %s%s" % (MARKS[severity], name, text))
            more = ""
            if len(found) > room and len(lines) == room - 1:
                more = " (%d more)" % (len(found) - room)
            text = self.letters.fit(text, width - len(more))
            lines.append([(text, LOOKS[severity]), (more, DIM)])
        return lines

    def detail_lines(self, width: int, room: int) -> List[Line]:
        """All that is said of the chosen job, or of the one that is open: lists cut it off."""
        group = self.group() or self.chosen_group()
        has_room = room >= MIN_DETAILS and self.depth != NODE and not self.asked
        if group is None or not has_room:
            return []
        texts = []
        for verdict in group.verdicts:
            texts.append((" %s %s" % (MARKS[verdict["severity"]], verdict["what"])))
            texts += ["   " + verdict[key] for key in ("proof",) if verdict[key]]
            texts += ["   -> " + verdict[key] for key in ("cure",) if verdict[key]]
        if not texts and group.row["what"]:
            texts = ["   " + group.row["what"]]
        if not texts:
            return []
        name = " ".join(filter(None, (group.row["job"], group.row["job_name"])))
        lines: List[Line] = [[], [(" " + self.letters.clean(name), HEADING)]]
        for text in texts:
            wrapped = textwrap.wrap(
                self.letters.clean(text), max(20, width - 1), subsequent_indent="     "
            )
            lines += [[(line, PLAIN)] for line in wrapped]
        return lines[:room]

    def chosen_group(self) -> Optional[Group]:
        """The job that is chosen in the list of jobs."""
        rows = self.rows()
        key = rows[self.chosen_place(rows)]["key"] if rows else None
        for group in self.groups:
            if group.key == key:
                return group
        return None

    def note_lines(self, room: int) -> List[Line]:
        """The last lines of the log; without one, the last events."""
        if self.log is not None:
            texts = list(self.log.lines)[-room:]
        elif self.snapshot is None:
            texts = []
        else:
            texts = [self.event_text(event) for event in self.snapshot.events[-room:]]
        return [[(self.letters.clean(text), DIM)] for text in texts]

    def event_text(self, event: Message) -> str:
        """An event in a line."""
        at = self.master_server.render_value("time", event["time"])
        what = self.master_server.name_of(event) or "job %s" % event["job"]
        return "%s %s %s: %s" % (at, event["kind"], what, event["text"] or "-")

    def last_line(self, width: int) -> Line:
        """The keys, or what is asked for."""
        words = self.words[min(self.depth, NODES)]
        if self.asked == "filter":
            return [("Filter: ", BOLD), (self.letters.clean(words), PLAIN), ("_", BOLD)]
        if self.asked:
            return [(pad(ASKED_BARS[self.asked], width), HEADING)]
        keys = KEY_BARS[self.depth]
        if self.sorts[self.depth]:
            keys = keys.replace("s:sort", "s:sort (%s)" % self.sorted_by())
        if words and self.depth < NODE:
            keys = self.letters.clean("filter: %s  " % words) + keys
        return [(pad(keys, width), HEADING)]

    def sorted_by(self) -> str:
        """What the list that is open is sorted by, in words."""
        sort = self.sorts[self.depth]
        names = {column.key: column.heading for column in self.columns()}
        way = "down" if sort.startswith("-") else "up"
        return "%s %s" % (names[sort.lstrip("-")], way)

    def body(self, width: int, room: int) -> List[Line]:
        """The list or the node that is open, in so many lines at most."""
        if self.asked == "help":
            return self.help_lines()[:room]
        if self.asked == "sort":
            return self.sort_lines(room)
        if self.depth == NODE:
            return self.node_lines(width, room)
        return self.list_lines(width, room)

    def help_lines(self) -> List[Line]:
        """What the keys and marks mean, and where the master's page is."""
        texts = HELP.split("\n")
        if self.log and self.log.page:
            texts += ["", self.letters.clean(" The page: " + self.log.page)]
        return [[(text, PLAIN)] for text in texts]

    def sort_lines(self, room: int) -> List[Line]:
        """The columns that can be sorted by, the chosen one marked."""
        columns = self.sortable()
        lines: List[Line] = [[(" Sort by", HEADING)]]
        first = window(self.choice, len(columns), room - 1)
        for place in range(first, min(len(columns), first + room - 1)):
            is_chosen = place == self.choice
            text = (">" if is_chosen else " ") + columns[place].heading
            lines.append([(text, CHOSEN if is_chosen else PLAIN)])
        return lines

    def list_lines(self, width: int, room: int) -> List[Line]:
        """The heading, and the rows around the chosen one."""
        rows = self.rows()
        bar_key = "load" if self.depth else "cpu"
        columns = self.columns()
        table = Table(self.master_server, self.letters, columns, rows, width, bar_key)
        self.page = max(1, room - 1)
        lines = [table.heading()]
        if not rows:
            lines.append([(self.empty_words(), DIM)])
            return lines
        chosen = self.chosen_place(rows)
        self.places[self.depth] = chosen
        first = window(chosen, len(rows), self.page)
        for place in range(first, min(len(rows), first + self.page)):
            lines.append(table.line(rows[place], place == chosen))
        return lines

    def empty_words(self) -> str:
        """Why a list is empty."""
        if self.words[self.depth]:
            return " nothing has these words; Esc shows all"
        if self.depth:
            return " no node of this job sends samples"
        return " no jobs and no nodes yet"

    def node_lines(self, width: int, room: int) -> List[Line]:
        """A node: what it is, its GPUs, ranks and CPUs, and all readings; scrolled."""
        node = self.node()
        if node is None or node["slot"] is None:
            what = node["what"] if node else "it left"
            return [[(self.letters.clean(" not there any more: %s" % what), PROBLEM)]]
        lines = self.node_head(node)
        parts = self.snapshot.parts(node["slot"])
        lines += self.core_lines(parts, width)
        for name, columns, rows, bar_key in (
            ("GPUs", GPU_COLUMNS, parts.gpus, "gpu"),
            ("Ranks", RANK_COLUMNS, parts.ranks, "cpu"),
        ):
            lines += self.part_lines(name, columns, rows, width, bar_key)
        lines += self.metric_lines(node["slot"], width)
        self.page = max(1, room - 1)
        last = max(0, len(lines) - room)
        first = min(self.places[NODE], last)
        self.places[NODE] = first
        return lines[first : first + room]

    def node_head(self, node: Message) -> List[Line]:
        """Who it is, and what is wrong with it."""
        age = self.master_server.render_value("age", node["age"])
        words = "slot %d, %s, last sample %s ago" % (node["slot"], node["address"], age)
        if node["user"]:
            words += ", agent of " + node["user"]
        lines: List[Line] = [[(self.letters.clean(" " + words), PLAIN)]]
        if node["what"]:
            lines.append([(self.letters.clean(" ! " + node["what"]), PROBLEM)])
        return lines

    def core_lines(self, parts: Any, width: int) -> List[Line]:
        """How busy each CPU is, a letter for each."""
        cores = sorted(parts.cores, key=lambda part: part["first"] or 0)
        tenths = "".join(str(part["busy"] or "") for part in cores)
        if not tenths:
            return []
        cpus = parts.look.get("cpus")
        head = " CPUs" + (", those of the job: %s" % cpus if cpus else "")
        lines: List[Line] = [[(self.letters.clean(head), BOLD)]]
        shown = self.letters.clean(self.letters.strip(tenths))
        room = max(10, (width - 8) // 10 * 10)
        for first in range(0, len(shown), room):
            lines.append([("%6d " % first, DIM), (shown[first : first + room], GOOD)])
        return lines

    def part_lines(
        self,
        name: str,
        columns: Sequence[Column],
        rows: List[Message],
        width: int,
        bar_key: str,
    ) -> List[Line]:
        """A table of GPUs or ranks; none without rows."""
        if not rows:
            return []
        table = Table(self.master_server, self.letters, columns, rows, width, bar_key)
        lines: List[Line] = [[(" %s: %d" % (name, len(rows)), BOLD)], table.heading()]
        return lines + [table.line(row, False) for row in rows]

    def metric_lines(self, slot: int, width: int) -> List[Line]:
        """All readings that the node has, side by side."""
        full = find_node(self.snapshot, slot)
        cells = []
        for metric in self.master_server.METRICS:
            value = full.get(metric.key)
            if value is None:
                continue
            text = self.master_server.render_value(metric.key, value)
            cell = "%s %s" % (metric.label, text)
            cells.append(pad(self.letters.clean(cell), METRIC_COLUMNS - 1) + " ")
        in_line = max(1, (width - 1) // METRIC_COLUMNS)
        lines: List[Line] = [[(" Readings", BOLD)]]
        for first in range(0, len(cells), in_line):
            lines.append([(" " + "".join(cells[first : first + in_line]), PLAIN)])
        return lines


def find_node(snapshot: Any, slot: int) -> Message:
    """All fields of the node in a slot; none if it has just left."""
    for row in snapshot.rows():
        if row[0] == slot:
            node: Message = snapshot.make_node(row)
            return node
    return {}


def has_words(group: Group, words: List[str]) -> bool:
    """Whether a job, or the name of one of its nodes, has every word somewhere."""
    if not words:
        return True
    row = group.row
    texts = [row[key] for key in ("job", "job_name", "user", "state", "what")]
    texts += [node["key"] for node in group.nodes]
    text = "\n".join(str(text or "") for text in texts).lower()
    return all(word in text for word in words)


def counted(count: int, word: str) -> str:
    """1 node, 2 nodes."""
    return "%d %s%s" % (count, word, "" if count == 1 else "s")


def window(chosen: int, count: int, room: int) -> int:
    """The first of the rows that have room, so that the chosen one is in the middle of them."""
    return max(0, min(chosen - room // 2, count - room))


def render_screen(view: View, width: int, height: int) -> List[Line]:
    """The lines of the whole screen: so many, and none of them wider."""
    notes = view.note_lines(NOTES) if height >= NOTES_FROM else []
    verdicts = view.verdict_lines(width, MAX_VERDICTS) if height >= NOTES_FROM else []
    room = max(1, height - 2 - len(verdicts) - len(notes))
    body = view.body(width, room)
    body += view.detail_lines(width, room - len(body))
    body += [[]] * (room - len(body))
    lines = [view.title(width)] + verdicts + body + notes + [view.last_line(width)]
    return [cut_line(line, width) for line in lines[:height]]


def render_text(view: View, width: int) -> str:
    """One screen as plain text, with every job and every node of it."""
    lines = [view.title(width)] + view.verdict_lines(width, 10**6)
    lines += view.list_lines(width, len(view.groups) + 1)
    for group in view.groups:
        if group.nodes:
            view.path = [group.key]
            lines += [[], [(view.letters.clean(view.open_names()), PLAIN)]]
            lines += view.list_lines(width, len(group.nodes) + 1)
    view.path = []
    texts = [text_of(cut_line(line, width)).rstrip() for line in lines]
    return "".join(text + "\n" for text in texts)


# ============================================================================
# The terminal: keys, colours, signals. Only here is curses known
# ============================================================================

REFRESH_SECONDS = 2.0  # from one snapshot to the next, ...
REFRESH_FACTOR = 75  # ... or so many times the CPU time of one, if that is longer
ESCAPE_MILLISECONDS = "50"  # in which the rest of a key's sequence must follow an Esc
LOG_LINES = 50  # of the master's log that are kept
LAST_LINES = 5  # of them, that are printed when the screen is left
LOG_BYTES = 65536  # that are read at a time
RESIZE = getattr(signal, "SIGWINCH", None)
ENDING_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
CHARACTERS = {
    "\n": "enter",
    "\r": "enter",
    "\x1b": "escape",
    "\x7f": "backspace",
    "\b": "backspace",
    "\x0c": "redraw",
}
KEYS = {
    "KEY_UP": "up",
    "KEY_DOWN": "down",
    "KEY_LEFT": "left",
    "KEY_RIGHT": "right",
    "KEY_PPAGE": "pageup",
    "KEY_NPAGE": "pagedown",
    "KEY_HOME": "home",
    "KEY_END": "end",
    "KEY_ENTER": "enter",
    "KEY_BACKSPACE": "backspace",
    "KEY_F(1)": "f1",
    "KEY_F(3)": "f3",
    "KEY_F(4)": "f4",
    "KEY_F(6)": "f6",
    "KEY_F(10)": "f10",
}


def why_no_screen() -> str:
    """Why a screen cannot be shown here; "" if it can."""
    for stream in (sys.stdin, sys.stdout):
        if stream is None or not stream.isatty():
            return "this is no terminal"
    try:
        import curses
    except ImportError:
        return "this Python has no curses"
    name = ascii(os.environ.get("TERM", ""))
    try:
        curses.setupterm()
    except curses.error:
        return "the terminal TERM=%s is not known here" % name
    if not curses.tigetstr("cup"):
        return "the terminal TERM=%s cannot move its cursor" % name
    return ""


def find_encoding() -> str:
    """The encoding of the locale, as the C library that writes to the terminal has it."""
    try:
        locale.setlocale(locale.LC_ALL, "")
        return locale.nl_langinfo(locale.CODESET)
    except (locale.Error, AttributeError):
        return "ascii"


class Signals:
    """Records what ends the screen, and wakes the one who waits for keys."""

    def __init__(self) -> None:
        self.ended: List[int] = []
        self.wakeup, self.wakeup_end = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self.wakeup_end, False)
        signal.set_wakeup_fd(self.wakeup_end)
        for name in ENDING_SIGNALS:
            number = getattr(signal, name, None)
            # nohup has SIGHUP ignored: then the end of the terminal is none of ours
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.ended.append(number))
        if RESIZE:
            signal.signal(RESIZE, lambda number, _: None)  # to be woken is enough

    def drain(self) -> None:
        """Forget that there were signals to wake up for."""
        with contextlib.suppress(OSError):
            os.read(self.wakeup, LOG_BYTES)


class Log:
    """The master's log, which comes through a pipe while the screen is on."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.lines: Deque[str] = collections.deque(maxlen=LOG_LINES)
        self.rest = b""
        self.page = ""  # the address of the master's page, as the log has it
        self.has_ended = False
        os.set_blocking(end, False)

    def read(self) -> bytes:
        """What there is by now; its lines are kept, too."""
        try:
            data = os.read(self.end, LOG_BYTES)
        except BlockingIOError:
            return b""
        self.has_ended = not data
        lines = (self.rest + data).split(b"\n")
        self.rest = lines.pop()[-LOG_BYTES:]
        for line in lines:
            text = line.decode("utf-8", "replace")
            self.lines.append(text)
            if "open http" in text:
                self.page = text.partition("open ")[2]
        return data

    def read_behind_screens(self) -> bytes:
        """What there is by now; it goes to stderr, too, if that is a file."""
        return self.read() if os.isatty(2) else self.copy()

    def copy(self) -> bytes:
        """What there is by now, once it is written to stderr."""
        read = data = self.read()
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(2, data) :]
        return read


class Screen:
    """The terminal as curses has it, from `with` on to the end, whatever that is."""

    def __enter__(self) -> "Screen":
        import curses

        self.curses = curses
        os.environ.setdefault("ESCDELAY", ESCAPE_MILLISECONDS)
        self.window = curses.initscr()
        try:
            curses.noecho()
            curses.cbreak()
            self.window.keypad(True)
            self.window.nodelay(True)
            with contextlib.suppress(curses.error):
                curses.curs_set(0)
            self.attributes = self.choose_attributes()
        except BaseException:
            curses.endwin()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(self.curses.error):
            self.curses.curs_set(1)
        with contextlib.suppress(self.curses.error):
            self.curses.endwin()

    def choose_attributes(self) -> Dict[str, int]:
        """How each look is shown: with colours where there are any and nobody objects."""
        curses = self.curses
        attributes = {
            PLAIN: curses.A_NORMAL,
            BOLD: curses.A_BOLD,
            DIM: curses.A_DIM,
            HEADING: curses.A_REVERSE,
            CHOSEN: curses.A_REVERSE | curses.A_BOLD,
            GOOD: curses.A_NORMAL,
            ADVICE: curses.A_NORMAL,
            PROBLEM: curses.A_BOLD,
        }
        if os.environ.get("NO_COLOR"):
            return attributes
        with contextlib.suppress(curses.error):
            curses.start_color()
            if not curses.has_colors():
                return attributes
            curses.use_default_colors()
            for number, (look, color) in enumerate(
                (
                    (GOOD, curses.COLOR_GREEN),
                    (ADVICE, curses.COLOR_YELLOW),
                    (PROBLEM, curses.COLOR_RED),
                ),
                1,
            ):
                curses.init_pair(number, color, -1)
                attributes[look] |= curses.color_pair(number)
        return attributes

    def fit(self) -> Tuple[int, int]:
        """The terminal's (width, height), which curses is told when they have changed."""
        size = os.get_terminal_size(sys.stdout.fileno())
        width = max(1, size.columns)
        height = max(1, size.lines)
        if self.window.getmaxyx() != (height, width):
            self.curses.resizeterm(height, width)
        return width, height

    def show(self, lines: List[Line]) -> None:
        """Put these lines on the screen; curses sends what differs."""
        self.window.erase()
        for y, line in enumerate(lines):
            with contextlib.suppress(self.curses.error):  # it has just become smaller
                self.window.move(y, 0)
                for text, look in line:
                    self.window.addstr(text, self.attributes[look])
        self.window.refresh()

    def key(self) -> str:
        """The next key that was pressed, by its name; "" when there is none."""
        try:
            key = self.window.get_wch()
        except self.curses.error:
            return ""
        if isinstance(key, str):
            return CHARACTERS.get(key, key)
        name = self.curses.keyname(key).decode("ascii", "replace")
        return KEYS.get(name, "other")


class Front:
    """What --tui shows, from the first snapshot to the last."""

    def __init__(
        self, master_server: Any, table: Any, log: Optional[Log], signals: Signals
    ) -> None:
        self.table = table
        self.master_server = master_server
        self.log = log
        self.signals = signals
        self.view = View(master_server, Letters(find_encoding()))
        if log:
            self.view.log = log
        self.reason = ""  # why it ended, if that was not by a key or a signal

    def run(self) -> None:
        """Show the screens until the user, a signal or the end of the master ends it."""
        with Screen() as screen:
            due = 0.0
            while not self.has_ended():
                begun = time.process_time()
                is_due = time.monotonic() >= due
                if is_due:
                    self.look()
                width, height = screen.fit()
                # the last column stays free: a terminal would scroll, or wrap
                screen.show(render_screen(self.view, max(1, width - 1), height))
                if is_due:
                    took = time.process_time() - begun
                    due = time.monotonic() + max(REFRESH_SECONDS, REFRESH_FACTOR * took)
                self.wait(screen, max(0.0, due - time.monotonic()))
                key = screen.key()
                while key:
                    if key == "redraw":
                        screen.window.clear()
                    self.view.press(key)
                    key = screen.key()

    def has_ended(self) -> bool:
        """Whether there is an end of any kind."""
        return bool(self.view.has_ended or self.signals.ended or self.reason)

    def look(self) -> None:
        """Take a snapshot; when the master has ended, that is the end."""
        try:
            self.view.take(self.table.snapshot())
        except self.master_server.TableError as error:
            self.view.trouble = str(error)
        if not self.table.owner_lives():
            self.reason = "the master (pid %d) has ended" % self.table.pid

    def wait(self, screen: Screen, seconds: float) -> None:
        """Wait for a key, a signal or a line of the log, so long at most."""
        poll = select.poll()
        poll.register(sys.stdin.fileno(), select.POLLIN)
        poll.register(self.signals.wakeup, select.POLLIN)
        if self.log and not self.log.has_ended:
            poll.register(self.log.end, select.POLLIN)
        ready = dict(poll.poll(seconds * 1000))
        if ready.get(sys.stdin.fileno(), 0) & (select.POLLHUP | select.POLLERR):
            self.view.has_ended = True  # the terminal has gone
        if self.signals.wakeup in ready:
            self.signals.drain()
        if self.log and self.log.end in ready:
            said = self.log.read_behind_screens()
            if b"CRITICAL WARNING" in said:
                screen.curses.beep()


def show_screens(master_server: Any, table: Any, options: argparse.Namespace) -> None:
    """--tui: the screens; where there can be none, one as text, and why."""
    reason = why_no_screen()
    if options.log is not None:
        serve_master(master_server, table, options, reason)
        return
    if reason:
        view = View(master_server, Letters(sys.stdout.encoding or "ascii"))
        view.take(table.snapshot())
        show(render_text(view, shutil.get_terminal_size().columns), False)
        print(
            "no screens, as %s: this is how it is now; --watch shows nodes again and again"
            % reason,
            file=sys.stderr,
        )
        return
    front = Front(master_server, table, None, Signals())
    front.run()
    if front.reason:
        raise ReaderError(front.reason)


def serve_master(
    master_server: Any, table: Any, options: argparse.Namespace, reason: str
) -> None:
    """Show screens for a master that runs on this terminal, with its log below.

    What the log says before and after the screens goes to stderr. A user who leaves them ends
    the master.
    """
    log = Log(options.log)
    signals = Signals()
    if reason:
        print("no screens, as %s: the log instead" % reason, file=sys.stderr)
    elif await_login(table, log, signals, options.after_login):
        front = Front(master_server, table, log, signals)
        front.run()
        if os.isatty(2):
            for line in list(log.lines)[-LAST_LINES:]:
                print(front.view.letters.clean(line), file=sys.stderr)
        if table.owner_lives():
            os.kill(table.pid, signal.SIGTERM)
        signals.ended = [number for number in signals.ended if number == signal.SIGTERM]
    while not signals.ended and not log.has_ended:
        select.select([log.end, signals.wakeup], [], [])
        signals.drain()
        log.copy()
    log.copy()


def await_login(table: Any, log: Log, signals: Signals, is_needed: bool) -> bool:
    """Wait until ssh asks for no password any more; False if it ends before.

    It is over with the first thing that comes from over there: words, a job or a node.
    """
    if is_needed:
        print("the screens come with the first answer of the cluster", file=sys.stderr)
    while is_needed and not signals.ended and not log.has_ended:
        select.select([log.end, signals.wakeup], [], [], 1.0)
        signals.drain()
        log.copy()
        snapshot = table.snapshot()
        spoke = any(" agent: " in line for line in log.lines)
        if spoke or snapshot.jobs or any(True for _ in snapshot.rows()):
            break
    return not signals.ended and not log.has_ended


# ============================================================================
# Command line
# ============================================================================


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
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=master_server.VERSION)
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
    parser.add_argument(
        "--tui",
        action="store_true",
        help="show screens on the terminal: jobs, their nodes, ranks and GPUs",
    )
    # what master_server.py --tui gives: where its log comes from, and whether ssh may ask
    parser.add_argument("--log", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument("--after-login", action="store_true", help=argparse.SUPPRESS)
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
    if options.tui:
        show_screens(master_server, table, options)
        return
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
    parser = build_parser(master_server)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error("%s: no flag of this tool; --help lists them" % " ".join(unknown))
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
