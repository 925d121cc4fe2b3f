"""Screens on the terminal: the model without curses, then in real terminals.

test_reader.py --tui and master_server.py --tui.  What a terminal's end means for the master
without screens is in test_terminal.py.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import time
import unittest
from fcntl import ioctl

import beside
import support
from support import MasterTest, eventually, nodes, requires, start_master
import test_herd
from test_jobs import facts
from test_lines import LineAgent
from test_pages import HOSTILE, event, job, node, view
from test_terminal import open_terminal

import test_reader

load_tests = beside.load_tests  # in a process of its own: it mostly waits

master = test_reader.load_master_server()

UTF8 = test_reader.Letters("utf-8")
ASCII = test_reader.Letters("ANSI_X3.4-1968")  # as nl_langinfo() has it for LC_ALL=C
WIDTH, HEIGHT = 80, 24


def snapshot(*rows, parts=None, verdicts=None, **more):
    """A snapshot of these nodes, half a second old."""
    snap = view(rows, **more)
    snap.copied = 1.0  # see test_pages.node: they were seen at 0.5
    snap.make_node = lambda row: dict(
        zip(master.NODE_KEYS, map(master.from_field, row))
    )
    if parts:
        snap.parts = lambda slot: parts.get(slot) or master.Parts({}, [], [], [])
    snap.verdicts = verdicts or {}
    return snap


def verdict(*words):
    """A verdict, as a snapshot has it."""
    return dict(zip(("severity", "what", "proof", "cure", "rule"), words))


def screens(snap, letters=UTF8):
    """A view of a snapshot."""
    made = test_reader.View(master, letters)
    made.take(snap)
    return made


def lines_of(shown, width=WIDTH, height=HEIGHT):
    """The screen as texts."""
    lines = test_reader.render_screen(shown, width, height)
    return [test_reader.text_of(line).rstrip() for line in lines]


def press(shown, *keys):
    for key in keys:
        shown.press(key)


def chosen(shown, width=WIDTH):
    """The line of the chosen row."""
    return [line for line in lines_of(shown, width) if line.startswith(">")][0]


def some_jobs():
    """Three jobs: one whose node c3 idles, one that waits, one that has failed."""
    rows = [
        node(
            n, node="c%d" % n, job="7", job_name="md", user="ann", cpu=cpu, job_cpu=cpu
        )
        for n, cpu in ((1, 94.0), (2, 88.0), (3, 1.5))
    ]
    rows.append(node(9, node="login1", load1=0.5))
    jobs = [
        job(7, job_name="md", user="ann", start=1700000000 - 8000, limit=43200.0),
        job(8, job_name="next", state="PENDING", reason="Priority"),
        job(6, job_name="old", state="FAILED", exit="3:0", start=1.0, end=2.0),
    ]
    return snapshot(*rows, jobs=jobs)


# ==========================================================================================
# The model
# ==========================================================================================


class Lines(unittest.TestCase):
    def test_texts_are_cut_and_filled_by_the_columns_that_they_take(self):
        for text, width, expected in (
            ("abc", 5, "abc  "),
            ("abcdef", 3, "abc"),
            ("학습하기", 5, "학습 "),
            ("학습", 4, "학습"),
            ("", 2, "  "),
        ):
            self.assertEqual(test_reader.pad(text, width), expected)
        self.assertEqual(test_reader.pad("7 %", 5, True), "  7 %")

    def test_a_time_is_written_as_slurm_does(self):
        for seconds, expected in (
            (None, "-"),
            (0, "0:00"),
            (59.9, "0:00"),
            (8000, "2:13"),
            (86400 + 4 * 3600, "1-04:00"),
        ):
            self.assertEqual(test_reader.clock(seconds), expected)

    def test_a_bar_is_as_long_as_its_value_and_is_empty_where_that_is_not_known(self):
        for percent, blocks, ascii_bar in (
            (0, "    ", "...."),
            (50, "\u2588\u2588  ", "||.."),
            (100, "\u2588" * 4, "||||"),
            (250, "\u2588" * 4, "||||"),
            (53.2, "\u2588\u2588\u258f ", "||.."),
            (None, "    ", "    "),
        ):
            self.assertEqual(UTF8.bar(percent, 4), blocks)
            self.assertEqual(ASCII.bar(percent, 4), ascii_bar)

    def test_no_text_of_a_peer_acts_on_a_terminal_or_breaks_an_encoding(self):
        texts = HOSTILE + [
            "\x1b[2J\x1b]0;owned\x07",
            "a\nb\rc\x08d",
            "\x9b5A",
            "\ud800",
        ]
        for letters in (UTF8, ASCII, test_reader.Letters("no such encoding")):
            for text in texts:
                shown = letters.clean(text)
                self.assertTrue(shown.isprintable(), ascii(text))
                self.assertEqual(len(shown.encode(letters.encoding)) > 0, bool(text))
        self.assertEqual(ASCII.clean("é학\x1b[2J"), "??" + "?[2J")


class Screens(unittest.TestCase):
    def test_every_screen_has_its_size_whatever_names_there_are(self):
        rows = [
            node(n, node=text, job=text[:20], job_name=text, user=text, alerts=text)
            for n, text in enumerate(HOSTILE + ["\x1b[2J"], 1)
        ]
        jobs = [job(n, job_name=text, reason=text) for n, text in enumerate(HOSTILE)]
        snap = snapshot(*rows, jobs=jobs, events=[event("lost", t) for t in HOSTILE])
        for letters in (UTF8, ASCII):
            for width, height in (
                (1, 1),
                (2, 2),
                (10, 3),
                (40, 8),
                (80, 24),
                (200, 60),
            ):
                shown = screens(snap, letters)
                for keys in (
                    ("?",),
                    ("x",),
                    ("s",),
                    ("escape",),
                    ("/",),
                    ("\u1100",),
                    ("escape",),
                    ("enter",),
                    ("s",),
                    ("down", "enter"),
                    ("enter",),
                    ("pagedown",),
                ):
                    press(shown, *keys)
                    drawn = test_reader.render_screen(shown, width, height)
                    self.assertEqual(len(drawn), height)
                    lines = [test_reader.text_of(line) for line in drawn]
                    for line in lines:
                        self.assertLessEqual(test_reader.columns_of(line), width)
                        self.assertTrue(line.isprintable(), ascii(line))
                        line.encode(letters.encoding)
                self.assertEqual(shown.depth, test_reader.NODE)

    def test_the_job_that_needs_the_user_is_first_and_says_why(self):
        lines = lines_of(screens(some_jobs()))
        self.assertRegex(lines[0], r"^3 jobs, 4 nodes - 1 died +\d\d:\d\d:\d\d, live$")
        self.assertRegex(lines[1], r"^X 6: \d\d:\d\d: exit code 3 - Slurm says FAILED")
        self.assertRegex(lines[3], r"^>X 6 +old .*FAILED .* \d\d:\d\d: exit code 3")
        self.assertRegex(lines[4], r"^ \* 7 +md +.* 3 .* 61 % +20 % +c3 idle$")
        self.assertRegex(lines[6], r"^   8 +next +.*PENDING +- .* - +- +Priority")
        self.assertRegex(lines[5], r"^   \(no job\) .* 1 .* 10 % +20 %$")

    def test_all_that_is_said_of_the_chosen_job_is_below_the_list(self):
        proof = "c02 gpu 3, c03 gpu 0-3 at 0 %, at most 57.6 GB each, " + "x" * 40
        verdict = {
            "severity": "problem",
            "what": "5 of 16 GPUs idle for 21 min",
            "proof": proof,
            "cure": "--gres=gpu:2",
        }
        snap = snapshot(
            jobs=[job(1, job_name="train"), job(2, state="PENDING", reason="Priority")]
        )
        snap.verdicts = {"1": [verdict]}
        shown = screens(snap)
        text = "\n".join(lines_of(shown))
        self.assertIn(" 1 train\n ! 5 of 16 GPUs idle for 21 min\n", text)
        self.assertIn("-> --gres=gpu:2", text)
        below = text[text.index(" 1 train") :]
        self.assertIn(proof.replace(" ", ""), "".join(below.split()))
        press(shown, "down")
        text = "\n".join(lines_of(shown))
        self.assertIn(" 2\n   Priority", text)
        press(shown, "?")
        self.assertNotIn("   Priority", "\n".join(lines_of(shown)))
        press(shown, "x", "up")
        for height in range(1, 12):  # a list comes before it
            drawn = test_reader.render_screen(shown, 80, height)
            self.assertEqual(len(drawn), height)

    def test_what_is_cut_off_ends_in_a_sign_of_it(self):
        wrong = verdict(
            "problem", "it leaks", "a proof of some length " * 4, "--mem=9G", ""
        )
        snap = snapshot(node(1, job="7"), jobs=[job(7)], verdicts={"7": [wrong] * 5})
        for letters, sign in ((UTF8, "\u2026"), (ASCII, ">")):
            lines = lines_of(screens(snap, letters))
            for line in lines[1:3]:
                self.assertRegex(line, r"^! 7: it leaks - a proof .*%s$" % sign)
            self.assertTrue(lines[3].endswith(sign + " (2 more)"), lines[3])
            self.assertEqual([len(line) for line in lines[1:4]], [WIDTH] * 3)

    def test_the_users_column_is_there_when_they_are_several(self):
        jobs = [job(1, user="ann"), job(2, user="ann")]
        self.assertNotIn("User", lines_of(screens(snapshot(jobs=jobs)), 200)[1])
        jobs[1]["user"] = "bo"
        self.assertIn("User", lines_of(screens(snapshot(jobs=jobs)), 200)[1])

    def test_a_wide_screen_has_the_time_too(self):
        lines = lines_of(screens(some_jobs()), 120)
        self.assertRegex(lines[4], r" 3 2:13/12:00 +\S+ +61 %")

    def test_the_tasks_of_an_array_are_one_row(self):
        tasks = [job(n, job="5_%d" % n, array="5", job_name="fit") for n in range(5)]
        tasks[0]["state"] = "COMPLETED"
        tasks[1]["state"] = "PENDING"
        lines = lines_of(screens(snapshot(jobs=tasks)), 120)
        self.assertRegex(lines[0], r"^1 job, 0 nodes ")
        self.assertRegex(
            lines[2], r"^>  5 +fit +RUNNING +- .*3 running, 1 pending, 1 done"
        )

    def test_nodes_of_a_job_are_found_by_each_of_its_ids(self):
        rows = [node(1, node="a", job="100"), node(2, node="b", job="9_3")]
        array_task = job(100, job="9_3", array="9")
        shown = screens(snapshot(*rows, jobs=[array_task]))
        self.assertEqual(len(shown.groups), 1)
        press(shown, "enter")
        self.assertEqual([row["key"] for row in shown.rows()], ["a", "b"])

    def test_a_job_that_slurm_says_nothing_of_is_one_as_well(self):
        row = node(1, node="a", job="5", job_time_limit=7200, job_time_left=3600)
        lines = lines_of(screens(snapshot(row)), 120)
        self.assertRegex(lines[2], r"^>  5 +RUNNING +1 +1:00/2:00 ")

    def test_alerts_and_lost_nodes_are_problems_and_unknown_is_a_dash(self):
        rows = [node(1, node="a", job="5", alerts="ram>95_for_30"), node(2, job="6")]
        lost = event("lost", "b", text="no sample for 5 s", job="6")
        shown = screens(snapshot(*rows, events=[lost]))
        lines = lines_of(shown)
        self.assertIn("2 with a problem", lines[0])
        self.assertRegex(lines[2], r"^>! 5 .* a: RAM 20 % \(alert above 95 %\u2026$")
        self.assertRegex(lines[3], r"^ ! 6 .* 2 .* b lost$")
        self.assertNotIn("GPU", lines[1])
        press(shown, "down", "enter")
        lines = lines_of(shown, 200)
        self.assertRegex(lines[2], r"^>10\.0\.0\.2:40002 .* 10\.0 %")
        self.assertRegex(lines[3], r"^ b +- +- +.*lost at \S+: no sample for 5 s$")
        press(shown, "down", "enter")
        self.assertRegex(lines_of(shown)[1], "not there any more: lost at")

    def test_what_happened_to_a_whole_job_is_told_of_the_job(self):
        told = dict(event("problem", "", text="it leaks", job="48217"), address="")
        lines = lines_of(screens(snapshot(node(1), events=[told])))
        self.assertTrue(any("problem job 48217: it leaks" in line for line in lines))

    def test_a_silent_collector_and_a_failed_look_are_told(self):
        shown = screens(snapshot(beat=9.0))
        self.assertRegex(lines_of(shown)[0], "OLD: the collector .* silent for 9 s")
        shown.trouble = "no whole copy"
        self.assertRegex(lines_of(shown)[0], "no whole copy$")

    def test_agents_that_found_no_room_are_told(self):
        shown = screens(snapshot(turned_away=3, why="ulimit -u"))
        self.assertIn(
            "3 agents turned away in the last minute: uli", lines_of(shown)[0]
        )

    def test_two_nodes_of_one_name_can_both_be_opened(self):
        shown = screens(
            snapshot(node(1, node="a", cpu=1.0), node(2, node="a", cpu=2.0))
        )
        press(shown, "enter", "down", "enter")
        self.assertRegex("\n".join(lines_of(shown)), r"(?s)slot 2.*CPU 2\.0 %")


class Verdicts(unittest.TestCase):
    def test_they_are_on_top_and_in_the_row_the_worst_first(self):
        told = {
            "7": [
                verdict("problem", "GPU 3 of c3 idle", "0 % for 14 min", "--gres", "r"),
                verdict("fine", "all is well", "", "", "r"),
            ],
            "8": [verdict("died", "out of memory", "c9", "--mem=6G", "r")],
            "9": [verdict("advice", "hint %d" % n, "", "", "r") for n in range(5)],
        }
        jobs = [job(number) for number in (7, 8, 9)]
        shown = screens(snapshot(jobs=jobs, verdicts=told))
        lines = lines_of(shown)
        self.assertTrue(lines[1].startswith("X 8: out of memory - c9 - --mem=6G"))
        self.assertTrue(lines[2].startswith("! 7: GPU 3 of c3 idle - 0 % for 14 min"))
        self.assertEqual(lines[3], "* 9: hint 0 (4 more)")
        rows = [line[:5] for line in lines[5:8]]
        self.assertEqual(rows, [">X 8 ", " ! 7 ", " * 9 "])
        self.assertIn(" - 1 died - 1 with a problem", lines[0])
        press(shown, "down", "enter")
        self.assertEqual(lines_of(shown)[1].partition(" - ")[0], "! GPU 3 of c3 idle")
        self.assertNotIn("out of memory", "\n".join(lines_of(shown)))

    def test_a_job_without_any_has_none(self):
        for told in ({}, {"2": [verdict("died", "of old age")]}):
            shown = screens(snapshot(jobs=[job(1)], verdicts=told))
            self.assertTrue(lines_of(shown)[2].startswith(">  1 "))


class Parts(unittest.TestCase):
    def screen(self, letters, width=WIDTH):
        told = master.Parts(
            {"part": "look", "cpus": "0-3,8"},
            [{"first": 0, "busy": "0950"}, {"first": 4, "busy": "-9"}],
            [
                {
                    "rank": 0,
                    "pid": 4411,
                    "program": "python3",
                    "cpu": 99.5,
                    "state": "R",
                },
                {
                    "rank": 1,
                    "pid": 4412,
                    "program": "\x1b[2J",
                    "cpu": None,
                    "mem": 2**31,
                },
                {
                    "rank": 2,
                    "pid": 4413,
                    "program": "wide",
                    "cpu": 400.0,
                    "cpus": "0-7",
                },
            ],
            [
                {"index": 0, "name": "H100", "gpu": 95.0, "mem_used": 2**30},
                {"index": 3, "error": "cannot be read", "power": 88.4},
            ],
        )
        row = node(1, node="c1", job="7", load1=3.0)
        shown = screens(snapshot(row, jobs=[job(7)], parts={1: told}), letters)
        press(shown, "enter", "enter")
        return lines_of(shown, width)

    def test_ranks_gpus_and_cpus_of_a_node_have_their_figures(self):
        text = "\n".join(self.screen(ASCII, 160))
        self.assertIn("CPUs, those of the job: 0-3,8", text)
        self.assertRegex(text, r"(?m)^ +0 0950-9 *$")
        self.assertRegex(text, r"(?m)^ +0 H100 +\|+ +95\.0 % +1\.0 GB")
        self.assertRegex(text, r"(?m)^ +3 .* 88 cannot be read *$")
        self.assertRegex(text, r"(?m)^ +0 +4411 python3 +R +\|+\.* +99\.5 %")
        self.assertRegex(text, r"(?m)^ +1 +4412 \?\[2J +- +2\.0 GB")
        # its bar is of the CPUs that it may use
        self.assertRegex(text, r"(?m)^ +2 +4413 wide +\|{5}\.{5} +400\.0 %")
        self.assertRegex(text, r"Load 3\.0")

    def test_blocks_only_where_there_are_any(self):
        self.assertIn("     0  \u2588\u2585 -\u2588", self.screen(UTF8))
        "\n".join(self.screen(ASCII)).encode("ascii")

    def test_a_node_without_parts_has_its_readings(self):
        shown = screens(snapshot(node(1, node="c1", swap=5.0), parts={}))
        press(shown, "enter", "enter")
        text = "\n".join(lines_of(shown))
        self.assertIn("Swap 5.0 %", text)
        self.assertNotIn("Ranks", text)


class Keys(unittest.TestCase):
    def setUp(self):
        rows = [
            node(n, node="c%d" % n, cpu=float(n), ram=99.0 - n, job="7")
            for n in range(1, 41)
        ]
        self.shown = screens(snapshot(*rows, jobs=[job(7), job(8, job_name="other")]))

    def test_enter_and_escape_go_in_and_out_and_the_row_stays_chosen(self):
        press(self.shown, "down")
        self.assertRegex(chosen(self.shown), "^>  8 ")
        press(self.shown, "up", "enter")
        press(self.shown, "down", "down", "right")
        self.assertRegex(lines_of(self.shown)[0], "^c3  of 7 ")
        press(self.shown, "left")
        self.assertRegex(chosen(self.shown), "^>c3 ")
        press(self.shown, "escape")
        self.assertRegex(chosen(self.shown), "^>  7 ")
        press(self.shown, "escape")
        self.assertEqual(self.shown.depth, test_reader.JOBS)

    def test_the_list_moves_under_the_chosen_row_to_both_ends(self):
        press(self.shown, "enter")
        lines_of(self.shown)
        self.assertEqual(self.shown.page, HEIGHT - 3)  # title, heading and keys
        for keys, name in (
            (("end",), "c40"),
            (("pageup",), "c%d" % (40 - self.shown.page)),
            (("home",), "c1"),
            (("up",), "c1"),
            (("pagedown", "down"), "c%d" % (2 + self.shown.page)),
        ):
            press(self.shown, *keys)
            self.assertRegex(chosen(self.shown), "^>%s " % name)

    def test_the_chosen_row_is_the_same_node_when_others_come_and_go(self):
        press(self.shown, "enter", "down", "down")
        for names in ((2, 3, 4), (1, 2, 3), (3,)):
            rows = [node(n, node="c%d" % n, job="7") for n in names]
            self.shown.take(snapshot(*rows, jobs=[job(7)]))
            self.assertRegex(chosen(self.shown), "^>c3 ")
        self.shown.take(snapshot(node(9, node="c9", job="7"), jobs=[job(7)]))
        self.assertRegex(chosen(self.shown), "^>c9 ")

    def test_a_job_and_a_node_may_leave_while_they_are_open(self):
        press(self.shown, "enter", "enter")
        self.shown.take(snapshot(node(2, node="c2", job="7"), jobs=[job(7)]))
        self.assertIn("not there any more", lines_of(self.shown)[1])
        self.shown.take(snapshot())
        self.assertIn("7 is not there any more", lines_of(self.shown)[0])
        press(self.shown, "escape", "escape")
        self.assertIn("no jobs and no nodes yet", lines_of(self.shown)[2])
        press(self.shown, "enter", "down", "end", "s", "enter", "/", "a", "enter")
        self.assertEqual(self.shown.depth, test_reader.JOBS)

    def test_words_filter_and_escape_shows_all_again(self):
        press(self.shown, "/", *"C40")
        self.assertEqual([row["key"] for row in self.shown.rows()], ["7"])
        self.assertRegex(lines_of(self.shown)[-1], "^Filter: C40_$")
        press(self.shown, "backspace", "backspace", "backspace", *"OTHER", "enter")
        self.assertEqual([row["key"] for row in self.shown.rows()], ["8"])
        self.assertRegex(lines_of(self.shown)[-1], "^filter: OTHER ")
        press(self.shown, "escape", "home", "enter", "/", *"c1", "enter")
        self.assertEqual(len(self.shown.rows()), 11)
        press(self.shown, "/", "q")
        self.assertFalse(self.shown.has_ended, "it is a letter here")
        self.assertIn("nothing has these words", lines_of(self.shown)[2])
        press(self.shown, "escape")
        self.assertEqual(len(self.shown.rows()), 40)

    def test_a_column_sorts_and_once_more_the_other_way_round(self):
        press(self.shown, "enter", "s", "down", "enter")
        self.assertRegex(lines_of(self.shown)[-1], r"s:sort \(CPU down\)")
        self.assertEqual(self.shown.rows()[0]["key"], "c40")
        press(self.shown, "s", "enter")
        self.assertEqual(self.shown.rows()[0]["key"], "c1")
        press(self.shown, "s", "down", "escape")
        self.assertEqual(self.shown.rows()[0]["key"], "c1")
        press(self.shown, "s", "up", "up", "enter", "home")
        self.assertEqual([row["key"] for row in self.shown.rows()][:2], ["c1", "c2"])

    def test_help_and_its_end_and_the_ends_of_all(self):
        press(self.shown, "?")
        self.assertIn("choose a row", lines_of(self.shown)[1])
        press(self.shown, "x")
        self.assertIn("Job", lines_of(self.shown)[1])
        for keys in (("q",), ("f10",), ("?", "q"), ("enter", "enter", "q")):
            shown = screens(some_jobs())
            press(shown, *keys)
            self.assertTrue(shown.has_ended, keys)

    def test_the_last_line_tells_the_keys_of_what_is_open(self):
        shown = screens(some_jobs())
        press(shown, "s")
        self.assertIn("Enter:sort by it", lines_of(shown)[-1])
        press(shown, "escape", "?")
        self.assertIn("any key:back", lines_of(shown)[-1])
        press(shown, "x")
        self.assertIn("Enter:nodes", lines_of(shown)[-1])

    def test_keys_that_there_are_not_do_nothing(self):
        before = lines_of(self.shown)
        press(self.shown, "other", "x", "é", "\x00")
        self.assertEqual(lines_of(self.shown), before)
        press(self.shown, "enter", "enter", "/", "s", "enter")
        self.assertEqual(self.shown.depth, test_reader.NODE)


# ==========================================================================================
# In terminals
# ==========================================================================================

TEXTS = (  # the keys of a node's row that are shown, and their columns' metrics
    "cpu",
    "ram",
    "job_cpu",
    "gpu",
    "load1",
    "net_rx",
)
PARTS = (
    {"part": "look", "look": 1, "cpus": "0-3", "processes": 2, "shown": 2},
    {"part": "core", "look": 1, "first": 0, "busy": "0950-9"},
    {"part": "rank", "look": 1, "pid": 4411, "rank": 0, "cpu": 99.5, "mem": 2.0**31},
    {"part": "rank", "look": 1, "pid": 4412, "rank": 1, "cpu": 3.5, "program": "sh"},
    {"part": "gpu", "look": 1, "index": 3, "gpu": 95.5, "mem_used": 2.0**35},
)
CLEAN = {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "NO_COLOR": None}


def environment(**changes):
    """This environment with those changes; None removes a name."""
    env = dict(os.environ, **CLEAN)
    env.update(changes)
    return {name: value for name, value in env.items() if value is not None}


class Pty:
    """A tool on a terminal of its own; what it writes there is kept."""

    def __init__(self, test, command, size=(24, 80), env=None, **more):
        self.ours, self.theirs, take_terminal = open_terminal()
        self.set_size(*size)
        self.before = termios.tcgetattr(self.theirs)
        more.setdefault("stderr", self.theirs)
        self.tool = support.Tool(
            command,
            env or environment(),
            stdin=self.theirs,
            stdout=self.theirs,
            preexec_fn=take_terminal,
            **more,
        )
        test.addCleanup(self.close)
        test.addCleanup(self.tool.kill)
        self.said = b""
        os.set_blocking(self.ours, False)

    def set_size(self, rows, columns):
        ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self):
        """Everything that was written so far."""
        with contextlib.suppress(BlockingIOError, OSError):
            while True:
                self.said += os.read(self.ours, 65536)
        return self.said

    def press(self, keys):
        os.write(self.ours, keys.encode())

    def shows(self, text, seconds=support.PATIENCE):
        eventually(lambda: text.encode() in self.read(), seconds, text)

    def end(self):
        """The exit code; what it says until then must have a reader."""
        eventually(lambda: (self.read(), self.tool.code is not None)[1])
        self.read()
        return self.tool.code

    def close(self):
        for end in (self.ours, self.theirs):
            with contextlib.suppress(OSError):
                os.close(end)


def reader_command(port, *flags):
    return support.command_of(["test_reader.py", "--port", port, "--tui", *flags])


class Shown(MasterTest):
    """A master with four nodes of a job, and a job that waits."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp()
        cls.agents = [LineAgent(cls.master.port) for _ in range(4)]
        for number, agent in enumerate(cls.agents):
            sample = {
                "cpu": 90.5 + number,
                "ram": 40.25,
                "node": "c%d" % number,
                "job": "4711",
                "job_cpu": 80.5 + number,
                "gpu": 7.5,
                "load1": 3.25,
                "net_rx": 1e6,
                "interval": 60,
            }
            agent.send(sample)
            if number == 2:
                for part in PARTS:
                    agent.send(part)
                agent.send(sample)  # which ends the look
        with support.PlainAgent(cls.master.port) as relay:
            relay.send(facts("4711", job_name="train\x1b[2J"))
            relay.send(facts("4712", state="PENDING", reason="Priority", start=None))
            relay.send({"bye": "told"})
            relay.read_to_end()
        eventually(lambda: len(nodes(cls.master.page)) == 4)

    @classmethod
    def tearDownClass(cls):
        for agent in cls.agents:
            agent.close()
        shutil.rmtree(cls.folder)
        super().tearDownClass()

    def check_rows(self, text, texts=("cpu", "ram")):
        """Every node of /api/nodes has a line with its figures."""
        for row in nodes(self.master.page):
            figures = [master.render_value(key, row[key]) for key in texts]
            pattern = r"(?m)^[> ]%s .*%s" % (
                row["node"],
                ".*".join(map(re.escape, figures)),
            )
            self.assertRegex(text, pattern)


class Terminal(Shown):
    """How a terminal is left, and what is said where there is none."""

    def open(self, **more):
        shown = Pty(self, reader_command(self.master.port), **more)
        shown.shows("4711")
        return shown

    def test_every_end_leaves_the_terminal_as_it_was(self):
        def key(keys):
            return lambda shown: shown.press(keys)

        def send(number):
            return lambda shown: shown.tool.send_signal(number)

        for what, end in (
            ("q", key("q")),
            ("F10", key("\x1b[21~")),
            ("Ctrl-C", key("\x03")),
            ("Ctrl-\\", key("\x1c")),
            ("SIGINT", send(signal.SIGINT)),
            ("SIGTERM", send(signal.SIGTERM)),
            ("SIGHUP", send(signal.SIGHUP)),
        ):
            for term in ("xterm-256color", "vt100"):
                if term == "vt100" and what not in ("q", "Ctrl-C"):
                    continue
                if not support.LONG and what in ("F10", "Ctrl-\\", "SIGINT"):
                    continue
                with self.subTest(what, term=term):
                    shown = self.open(env=environment(TERM=term))
                    self.assertNotEqual(termios.tcgetattr(shown.theirs), shown.before)
                    end(shown)
                    self.assertEqual(shown.end(), 0)
                    self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)
                    self.assertNotIn(b"Traceback", shown.said)
                    if term != "vt100":
                        self.assertIn(b"\x1b[?1049l", shown.said, "the old screen")
                        self.assertLess(
                            shown.said.rindex(b"\x1b[?25l"),
                            shown.said.rindex(b"\x1b[?25h")
                            if b"\x1b[?25h" in shown.said
                            else shown.said.rindex(b"\x1b[?12l"),
                            "the cursor is there again",
                        )

    def test_a_terminal_that_goes_away_ends_it(self):
        shown = self.open()
        os.close(shown.theirs)
        os.close(shown.ours)
        eventually(lambda: shown.tool.code is not None)
        self.assertEqual(shown.tool.code, 0)

    def test_the_end_of_the_master_ends_it_in_one_line(self):
        with start_master() as other:
            shown = Pty(self, reader_command(other.port))
            shown.shows("no jobs and no nodes yet")
            other.stop()
            self.assertEqual(shown.end(), 1)
        said = shown.said.decode().rpartition("error: ")[2]
        self.assertRegex(said, r"\Athe master \(pid \d+\) has ended\r\n\Z")
        self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)

    def test_no_name_of_a_peer_prints_an_escape_sequence(self):
        shown = self.open()
        shown.press("\r")
        shown.shows("c3")
        shown.press("\r")
        shown.shows("slot")
        shown.press("q")
        shown.end()
        self.assertIn("train\ufffd[2J", shown.said.decode())
        self.assertNotIn(b"train\x1b", shown.said)

    def test_where_there_can_be_no_screen_one_is_printed_and_why(self):
        for what, changes, reason in (
            ("TERM=dumb", {"TERM": "dumb"}, "TERM='dumb' cannot move its cursor"),
            ("no TERM", {"TERM": None}, "TERM='' is not known here"),
            ("an odd TERM", {"TERM": "\x1b[2J"}, r"TERM='\x1b[2J' is not known here"),
            ("no curses", {"PYTHONPATH": self.without_curses()}, "no curses"),
        ):
            with self.subTest(what):
                command = reader_command(self.master.port)
                shown = Pty(self, command, env=environment(**changes))
                self.assertEqual(shown.end(), 0)
                text = shown.said.decode()
                self.assertIn(reason, text)
                self.assertNotIn("\x1b", text)
                self.check_rows(text)
                self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)

    def test_without_a_terminal_it_prints_one_screen_and_why(self):
        for encoding in ("utf-8", "ascii"):
            done = support.run(
                *reader_command(self.master.port)[1:],
                env={"COLUMNS": "200", "PYTHONIOENCODING": encoding},
            )
            self.assertEqual(done.returncode, 0)
            self.assertRegex(
                done.stderr, r"\Ano screens, as this is no terminal: .*\n\Z"
            )
            self.assertRegex(done.stdout, r"(?m)^.{3}4712 .*PENDING.* Priority$")
            self.check_rows(done.stdout)

    def without_curses(self):
        """A folder in which _curses cannot be imported, as in a Python built without it."""
        folder = os.path.join(self.folder, "without")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "_curses.py"), "w") as file:
            file.write("raise ImportError('No module named _curses')\n")
        return folder


@requires("tmux")
class Tmux(Shown):
    """What is on the screen in the end, as tmux has it."""

    def tmux(self, *words):
        path = os.path.join(self.folder, "tmux-" + self.id().rpartition(".")[2])
        return subprocess.check_output(["tmux", "-S", path, *words]).decode()

    def start(self, width, height, command=(), **changes):
        env = environment(**changes)
        words = ["env", "-u", "NO_COLOR"]
        words += ["%s=%s" % (name, env[name]) for name in ("LC_ALL", "TERM")]
        words += command or reader_command(self.master.port)
        size = ["-x", str(width), "-y", str(height)]
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", *size, *words)
        self.addCleanup(self.tmux, "kill-server")

    def screen(self):
        return self.tmux("capture-pane", "-p")

    def see(self, pattern):
        eventually(lambda: re.search(pattern, self.screen()), what=pattern)
        return self.screen()

    def check_screens(self, width, texts=("cpu", "ram")):
        """The figures of each screen are those of /api/nodes and /api/jobs."""
        text = self.see(r"(?m)^>. 4711 .*RUNNING .* 4 ")
        load = sum(row["job_cpu"] for row in nodes(self.master.page)) / 4
        self.assertRegex(text, r"(?m)^>. 4711 .* %.0f %%" % load)
        self.assertRegex(text, r"(?m)^   4712 .*PENDING .*Priority")
        self.assertRegex(text, r"\A2 jobs, 4 nodes .*, live\n")
        self.tmux("send-keys", "Enter")
        self.check_rows(self.see(r"(?m)^>c0 "), texts)
        self.tmux("send-keys", "Down", "Down", "Enter")
        text = self.see(r"\Ac2  of 4711 ")
        row = self.row(node="c2")
        self.assertIn("slot %d, %s" % (row["slot"], row["address"]), text)
        for key in TEXTS:
            label = master.NUMBERS[key].label
            figure = "%s %s" % (label, master.render_value(key, row[key]))
            self.assertIn(" " + figure + " ", text.replace("\n", " \n"))
        self.check_parts(text)
        self.tmux("send-keys", "Left")
        self.see(r"(?m)^>c2 ")
        return text

    def check_parts(self, text):
        """The figures of c2's ranks and GPUs are those of /api/job/4711."""
        job = json.loads(support.get(self.master.page, "/api/job/4711").text)["job"]
        (found,) = [node for node in job["nodes"] if node["node"] == "c2"]
        self.assertEqual((len(found["ranks"]), len(found["gpus"])), (2, 1))
        for rank in found["ranks"]:
            cpu = master.render_value("cpu", rank["cpu"])
            line = r"(?m)^ +%d +%d .*%s" % (rank["rank"], rank["pid"], cpu)
            self.assertRegex(text, line)
        for gpu in found["gpus"]:
            used = master.render_value("mem_used", gpu["mem_used"])
            busy = master.render_value("gpu", gpu["gpu"])
            self.assertRegex(text, r"(?m)^ +%d .*%s +%s" % (gpu["index"], busy, used))

    def test_80x24(self):
        self.start(80, 24)
        self.check_screens(80, ("cpu", "ram", "job_cpu", "gpu", "load1"))

    def test_200x60(self):
        self.start(200, 60)
        self.check_screens(200, ("cpu", "ram", "job_cpu", "gpu", "load1", "net_rx"))

    def test_a_vt100_in_the_c_locale(self):
        self.start(80, 24, TERM="vt100", LC_ALL="C")
        text = self.check_screens(80)
        text.encode("ascii")
        self.tmux("send-keys", "Left")
        self.see(r"(?m)^>. 4711 .*train\?\[2J ").encode("ascii")

    def test_another_size_shows_at_once(self):
        self.start(80, 24)
        self.see("4711")
        for width, height in ((120, 40), (40, 10), (200, 60), (80, 24)):
            self.tmux("resize-window", "-x", str(width), "-y", str(height))
            start = time.monotonic()

            def fits(width=width, height=height):
                lines = self.screen().split("\n")
                right = lines[0].endswith("live") and len(lines[0]) == width - 1
                return right and lines[height - 1].startswith("Enter:nodes")

            eventually(fits, 5, "%dx%d" % (width, height))
            self.assertLess(time.monotonic() - start, 5)

    @requires("bash")
    def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(self):
        path = os.path.join(self.folder, "modes")
        self.start(80, 24, command=["bash", "--norc", "--noprofile", "-i"])
        type_ = functools.partial(self.tmux, "send-keys")
        line = " ".join(reader_command(self.master.port))
        type_(
            "stty -a >%s.1; %s; stty -a >%s.2; echo done" % (path, line, path), "Enter"
        )
        self.see("4711")
        type_("C-z")
        self.see("Stopped")
        type_("stty -a >%s.3; fg" % path, "Enter")
        self.see("(?m)^>. 4711")
        type_("q")
        self.see("(?m)^done")
        modes = []
        for end in (".1", ".2", ".3"):
            with open(path + end) as file:
                modes.append(file.read())
        self.assertEqual(modes, modes[:1] * 3)


# ==========================================================================================
# master_server.py --tui
# ==========================================================================================


SSH = """\
#!/bin/sh
# asks for a password as ssh does, and runs its last word
printf 'password: ' >/dev/tty
read answer </dev/tty
[ "$answer" = "open sesame" ] || exit 255
for word; do :; done
exec sh -c "$word"
"""


class OfMaster(unittest.TestCase):
    """The master's own screens: its log stands below, and all of it ends together."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def start(self, *flags, wait="connected", **more):
        ports = ["--port", 0, "--dashboard-port", 0]
        words = ["master_server.py", *ports, "--with-agent", "--tui", *flags]
        shown = Pty(self, support.command_of(words), **more)
        if wait:
            shown.shows(wait)
            self.family = [shown.tool.pid] + support.descendants(shown.tool.pid)
            self.shared = support.shm_of(shown.tool.pid)
            self.addCleanup(self.kill, self.family)
        return shown

    def kill(self, pids):
        """End what still runs, when a test has failed."""
        for pid in filter(support.alive, pids):
            os.kill(pid, signal.SIGKILL)

    def screens_of(self, shown):
        """The pid of test_reader.py."""
        found = []
        for pid in support.descendants(shown.tool.pid):
            with open("/proc/%d/cmdline" % pid, "rb") as file:
                if b"test_reader.py" in file.read():
                    found.append(pid)
        (pid,) = found
        return pid

    def assertSane(self, shown):
        """All has ended, and the terminal is as it was."""
        eventually(lambda: not any(map(support.alive, self.family)), 10)
        eventually(lambda: not self.shared & support.shm_names())
        self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)
        self.assertNotIn(b"Traceback", shown.said)

    def test_q_ctrl_c_and_sigterm_end_all_and_leave_the_last_lines(self):
        for what, end in (
            ("q", lambda shown: shown.press("q")),
            ("Ctrl-C", lambda shown: shown.press("\x03")),
            ("SIGTERM", lambda shown: shown.tool.send_signal(signal.SIGTERM)),
        ):
            with self.subTest(what):
                shown = self.start()
                self.assertNotEqual(termios.tcgetattr(shown.theirs), shown.before)
                end(shown)
                self.assertEqual(shown.end(), 0)
                self.assertSane(shown)
                left = shown.said.decode().rpartition("\x1b[?1049l")[2]
                self.assertRegex(left, r"agent: connected to .*\r\n")
                self.assertRegex(left, r"stopped\r\n\Z")

    def test_a_closed_terminal_ends_all(self):
        shown = self.start()
        os.close(shown.ours)
        eventually(lambda: shown.tool.code is not None)
        self.assertEqual(shown.tool.code, 0)
        eventually(lambda: not any(map(support.alive, self.family)), 10)
        eventually(lambda: not self.shared & support.shm_names())

    def test_killed_screens_come_again_and_the_terminal_is_sane_in_the_end(self):
        shown = self.start()
        pid = self.screens_of(shown)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: (shown.read(), self.screens_of(shown) != pid)[1])
        shown.shows("screens ended (signal 9); starting it again")
        self.family.append(self.screens_of(shown))
        shown.press("q")
        self.assertEqual(shown.end(), 0)
        self.assertSane(shown)

    def test_a_killed_master_takes_its_screens_along(self):
        shown = self.start()
        shown.tool.send_signal(signal.SIGKILL)
        eventually(lambda: (shown.read(), not any(map(support.alive, self.family)))[1])
        self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)
        support.unlink_shm(self.shared)

    def test_a_log_in_a_file_is_whole(self):
        path = os.path.join(self.folder, "log")
        with open(path, "w") as log:
            shown = self.start(stderr=log)
        shown.press("q")
        self.assertEqual(shown.end(), 0)
        self.assertSane(shown)
        with open(path) as file:
            text = file.read()
        for line in ("collector listening", "goodbye: SIGTERM", "stopped"):
            self.assertEqual(text.count(line), 1, text)

    def test_where_there_can_be_no_screens_the_log_is_as_ever(self):
        shown = self.start(env=environment(TERM="dumb"))
        shown.shows("the log instead")
        self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)
        shown.press("\x03")
        self.assertEqual(shown.end(), 0)
        self.assertSane(shown)
        text = shown.said.decode()
        self.assertIn("TERM='dumb' cannot move its cursor", text)
        self.assertNotIn("\x1b[?1049h", text)
        for line in ("collector listening", "agent: connected", "stopped"):
            self.assertEqual(text.count(line), 1, text)
        with start_master("--tui") as master_:
            master_.logged("no screens, as this is no terminal: the log instead")
            self.assertEqual(master_.stop(), 0)
            self.assertIn("stopped", master_.log)

    def test_the_other_script_must_be_beside_it(self):
        for name in ("master_server.py", "agent.py"):
            shutil.copy(os.path.join(support.ROOT, name), self.folder)
        path = os.path.join(self.folder, "master_server.py")
        done = support.run(path, "--tui", "--port", "0", "--dashboard-port", "0")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(
            done.stderr, r"\Aerror: --tui needs test_reader.py beside .*\n\Z"
        )

    def test_screens_wait_until_ssh_asks_for_nothing_any_more(self):
        with start_master() as other:
            read_end, write_end = os.pipe()
            self.addCleanup(os.close, write_end)
            command = reader_command(
                other.port, "--log", str(read_end), "--after-login"
            )
            shown = Pty(self, command, pass_fds=[read_end])
            os.close(read_end)
            self.family, self.shared = [shown.tool.pid], set()
            os.write(write_end, b"12:00:00 watcher started, pid 7\n")
            shown.shows("watcher started")
            support.stays(lambda: b"\x1b[?1049h" not in shown.read(), 1.5)
            self.assertEqual(termios.tcgetattr(shown.theirs), shown.before)
            os.write(write_end, b"12:00:09 agent: job 5: cannot attach\n")
            shown.shows("\x1b[?1049h")
            shown.shows("no jobs and no nodes yet")
            shown.press("q")
            other.wait()  # it is told to end
            shown.tool.send_signal(signal.SIGTERM)
            self.assertEqual(shown.end(), 0)
            self.assertSane(shown)

    @support.slow("it waits for a herd and its agents")
    def test_ssh_asks_on_the_terminal_and_then_the_screens_show_the_jobs(self):
        slurm = test_herd.Slurm(self, ATTACH_SECONDS=30)  # on a busy machine
        for name in ("master_server.py", "test_reader.py"):
            shutil.copy(os.path.join(support.ROOT, name), slurm.folder)
        os.chmod(slurm.write("ssh", SSH), 0o700)
        slurm.write("queue", test_herd.row(nodes="c[1-2]"))
        slurm.write("job.7", test_herd.details(nodes=["c1", "c2"]))
        path = slurm.folder + os.pathsep + os.environ["PATH"]
        command = [support.PYTHON, os.path.join(slurm.folder, "master_server.py")]
        command += ["--port", "0", "--dashboard-port", "0", "--ssh", "login", "--tui"]
        command.append("--no-record")
        shown = Pty(self, command, env=environment(PATH=path))
        shown.shows("password: ")
        support.stays(lambda: b"\x1b[?1049h" not in shown.read(), 1.5)
        self.family = [shown.tool.pid] + support.descendants(shown.tool.pid)
        self.addCleanup(self.kill, self.family)
        self.shared = support.shm_of(shown.tool.pid)
        shown.press("open sesame\n")
        shown.shows("\x1b[?1049h")
        shown.shows("train|it")
        shown.press("\r")
        shown.shows("c2")
        shown.press("q")
        self.assertEqual(shown.end(), 0)
        self.assertSane(shown)

    def test_a_terminal_that_takes_nothing_any_more_stops_no_sample(self):
        shown = self.start("--verbose", "--timeout", "60")
        pid = self.screens_of(shown)
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(lambda: support.alive(pid) and os.kill(pid, signal.SIGCONT))
        port = support._look(lambda: self.port_of(shown))[0]
        with support.PlainAgent(port) as agent:
            for number in range(900):  # their log is larger than a pipe
                agent.send({"cpu": 1, "ram": 1, "node": "n" * 250, "ack": True})
                self.assertEqual(agent.read_line(), "ok", number)
        os.kill(pid, signal.SIGCONT)
        shown.press("q")
        self.assertEqual(shown.end(), 0)
        self.assertSane(shown)

    def port_of(self, shown):
        """The port for agents of a master: that of its shared memory's name."""
        (name,) = [name for name in self.shared if name.startswith("sentinel_")]
        return int(name.rpartition("_")[2])


@support.slow("a thousand agents")
class Load(unittest.TestCase):
    def test_a_thousand_nodes_take_two_hundredths_of_a_core_at_most(self):
        with start_master() as big:
            load = support.start("tests/load.py", big.port, 1000)
            self.addCleanup(load.stop)
            eventually(lambda: len(nodes(big.page)) == 1000, 60)
            shown = Pty(self, reader_command(big.port))
            shown.shows("1000 nodes")
            for keys in ("", "\r"):
                shown.press(keys)
                time.sleep(3)
                before = self.spent(shown.tool.pid)
                time.sleep(15)
                shown.read()
                share = (self.spent(shown.tool.pid) - before) / 15
                self.assertLess(share, 0.02)
            shown.press("q")
            self.assertEqual(shown.end(), 0)

    def spent(self, pid):
        """CPU seconds of a process (proc(5), stat fields 14 and 15)."""
        with open("/proc/%d/stat" % pid) as file:
            ticks = file.read().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    unittest.main()
