"""The pure parts of the benchmarks: fits, bounds, table, pacing.  The timings are bench.py's."""

import contextlib
import io
import itertools
import json
import os
import pickle
import struct
import tempfile
import time
import unittest
from unittest import mock

import bench
import load
import soak
import support


class Figures(unittest.TestCase):
    def test_the_exponent_of_a_power_law_is_found(self):
        for exponent in (0.0, 0.5, 1.0, 2.0):
            points = [(n, 0.07 * n**exponent) for n in (200, 1000, 5000, 10000)]
            self.assertAlmostEqual(bench.fit_exponent(points), exponent)

    def test_noise_on_both_sides_leaves_the_exponent(self):
        points = [(100, 1.1), (100, 1 / 1.1), (10000, 100 * 1.1), (10000, 100 / 1.1)]
        self.assertAlmostEqual(bench.fit_exponent(points), 1.0)

    def test_the_slope_of_a_line_is_found(self):
        self.assertAlmostEqual(
            bench.fit_slope([(x, 3 - 0.25 * x) for x in (1, 2, 5, 9)]), -0.25
        )

    def test_the_cost_of_a_sample_is_of_what_each_tool_sent_itself(self):
        before = [(1.0, 10), (2.0, 20)]
        after = [(1.006, 16), (2.012, 23)]
        first, second = bench.per_sample(before, after)
        self.assertAlmostEqual(first, 0.001)
        self.assertAlmostEqual(second, 0.004)

    def test_two_disturbed_pairs_of_ten_change_nothing_of_the_ratio(self):
        bare = [0.001] * 10
        self.assertAlmostEqual(bench.median_ratio([0.002] * 10, bare), 2.0)
        disturbed = [0.9, 0.5] + [0.002] * 8
        self.assertAlmostEqual(bench.median_ratio(disturbed, bare), 2.0)
        rising = [0.001 * (1 + turn) for turn in range(10)]
        self.assertAlmostEqual(bench.median_ratio(rising, rising), 1.0)

    def test_a_load_is_the_median_of_its_windows_and_the_share_of_all_of_them(self):
        looks = [{"time": 0.0, "bare": 0.0, "herd": 0.0}]
        for window in range(10):
            last = looks[-1]
            herd = 9.0 if window == 4 else 0.02  # one window is disturbed
            looks.append(
                {
                    "time": last["time"] + 10.0,
                    "bare": last["bare"] + 0.004,
                    "herd": last["herd"] + herd,
                }
            )
        load = bench.loads_of(looks)["herd"]
        self.assertAlmostEqual(load.ratio, 5.0)
        self.assertAlmostEqual(load.bare, 0.0004)
        self.assertAlmostEqual(load.share, (9 * 0.02 + 9.0) / 100)

    def test_how_much_longer_a_job_takes_is_the_median_of_pairs_and_has_an_error(self):
        without = [2.0 + 0.1 * turn for turn in range(20)]  # the machine gets slower
        with_agent = [1.001 * seconds for seconds in without]
        with_agent[3] = 9.0  # and a neighbour is busy once
        longer, error = bench.slowed_by(with_agent, without)
        self.assertAlmostEqual(longer, 0.1)
        self.assertAlmostEqual(error, 0.0)
        noisy = [
            seconds * (1.01 if turn % 2 else 0.99)
            for turn, seconds in enumerate(without)
        ]
        longer, error = bench.slowed_by(noisy, without)
        self.assertGreater(error, 0.2)

    def test_a_job_that_is_slowed_is_judged_only_where_that_is_sure(self):
        for longer, error, holds in (
            (0.1, 0.05, True),
            (0.3, 0.05, False),
            (0.3, 0.11, None),
            (-5.0, 0.5, None),
        ):
            with self.subTest(longer=longer, error=error):
                row = bench.slower_row("spin", longer, error)
                self.assertEqual(row.holds, holds)
                self.assertEqual("too noisy" in row.note, holds is None)

    def test_a_day_of_a_record_has_the_rows_that_the_recorder_writes(self):
        self.assertEqual(bench.rows_of_a_day(64), 360 + 4 * 180 + 90)
        self.assertGreater(bench.rows_of_a_day(1), bench.rows_of_a_day(64))
        row = b'{"row":1,' + b" " * 90 + b"}\n"
        once = b'{"job":{}}\n' + b'{"nodes":{}}\n'
        gpus = b'{"gpus":' + b" " * 50 + b"}\n"
        rows = bench.rows_of_a_day(64)
        self.assertAlmostEqual(
            bench.day_of_record(once + 3 * row + 2 * gpus, 64),
            len(once) + rows * len(row) + rows / 6 * len(gpus),
        )

    def test_a_percentile_is_one_of_the_values(self):
        values = list(range(100, 0, -1))
        self.assertEqual(
            [bench.percentile(values, p) for p in (0, 1, 50, 99, 99.5, 100)],
            [1, 1, 50, 99, 100, 100],
        )
        self.assertEqual(bench.percentile([7], 99), 7)

    def test_a_value_is_shown_with_the_digits_that_count(self):
        cases = [
            (0, ""),
            (3, "x"),
            (0.4567, "x"),
            (12.34, "MiB"),
            (123.4, "ms"),
            (0.01234, "%"),
            (0.06, "%"),
        ]
        self.assertEqual(
            [bench.show(*case) for case in cases],
            ["0", "3 x", "0.46 x", "12.3 MiB", "123 ms", "0.012 %", "0.060 %"],
        )


class Bounds(unittest.TestCase):
    def test_a_row_holds_on_its_bound_and_not_past_it(self):
        for value, at_most, at_least in (
            (1.9, True, False),
            (2.0, True, True),
            (2.1, False, True),
        ):
            with self.subTest(value):
                self.assertEqual(bench.at_most("", value, "x", 2.0).holds, at_most)
                self.assertEqual(bench.at_least("", value, "x", 2.0).holds, at_least)

    def test_a_third_more_is_noise_and_further_is_not(self):
        self.assertTrue(bench.at_most("", 2.6, "x", 2.0).within(bench.TOLERANCE))
        self.assertFalse(bench.at_most("", 2.7, "x", 2.0).within(bench.TOLERANCE))
        self.assertTrue(bench.at_least("", 1.6, "x", 2.0).within(bench.TOLERANCE))
        self.assertFalse(bench.at_least("", 1.4, "x", 2.0).within(bench.TOLERANCE))

    def test_none_may_be_lost_whatever_the_tolerance(self):
        self.assertTrue(bench.at_most("", 0, "", 0).holds)
        self.assertFalse(bench.at_most("", 1, "", 0).within(bench.TOLERANCE))

    def test_what_has_no_bound_neither_holds_nor_fails(self):
        row = bench.told("", 10**9, "s")
        self.assertIsNone(row.holds)
        self.assertTrue(row.within(1.0))

    def test_of_two_bounds_one_is_enough_and_without_any_both_are_told_to_fail(self):
        for quick, share, ratio, judged in (
            (False, 0.09, 9.0, [True, None]),
            (False, 0.2, 4.0, [None, True]),
            (False, 0.09, 4.0, [True, True]),
            (False, 0.11, 5.5, [False, False]),
            (True, 0.11, 9.0, [False, None]),  # by less than the third: it is forgiven
        ):
            with self.subTest(quick=quick, share=share, ratio=ratio):
                rows = bench.either(
                    bench.Stage(quick, ""),
                    bench.at_most("share", share, "% of a core", 0.1),
                    bench.at_most("ratio", ratio, "x", 5.0),
                )
                self.assertEqual([row.holds for row in rows], judged)

    def test_rows_without_a_bound_do_not_stand_for_those_with_one(self):
        rows = bench.either(
            bench.Stage(False, ""),
            bench.told("share", 0.2, "% of a core"),
            bench.at_most("ratio", 9.0, "x", 5.0),
        )
        self.assertEqual([row.holds for row in rows], [None, False])


class Promises(unittest.TestCase):
    """The bounds are those of the list of costs; nothing loosens one by the way."""

    def test_each_bound_is_the_one_that_was_promised(self):
        for key, bound in (
            ("agent / bare loop", 2.2),
            ("whole agent / bare loop", 4),
            ("agent: instructions / bare loop", 7),
            ("agent's memory", 16),
            ("256 ranks: CPU", 0.3),
            ("slower: spin", 0.2),
            ("slower: stream", 0.2),
            ("empty master", 0.1),
            ("empty master / Prometheus", 0.15),
            ("200 even: CPU", 0.25),
            ("5000 even: CPU", 0.25),
            ("5000 even: memory", 0.25),
            ("10000 even: CPU", 40),
            ("10000: memory", 32),
            ("10000 burst: lost", 0),
            ("herd: CPU", 0.1),
            ("herd: memory", 25),
            ("recorder: CPU", 0.2),
            ("record: size", 2),
            ("page", 60),
            ("lock: a sample", 1),
            ("job page", 100),
            ("past job page", 100),
            ("/jobs", 100),
            ("terminal: CPU", 2),
            ("1 stream", 1.5),
            ("detection", 5.5),
        ):
            with self.subTest(key):
                self.assertEqual(bench.figure(key, 0.0).bound, bound)

    def test_what_is_so_many_bare_loops_is_as_much_where_one_takes_two_hundredths(self):
        for name in ("herd", "recorder", "terminal", "256 ranks"):
            with self.subTest(name):
                share = bench.figure("%s: CPU" % name, 0.0).bound
                loops = bench.figure("%s / bare loop" % name, 0.0).bound
                self.assertAlmostEqual(share / 0.02, loops)


class Table(unittest.TestCase):
    ROWS = [
        bench.at_most("agent", 2.25, "x", 2.5, "9 / 4 us"),
        bench.told("start", 300, "ms"),
        bench.at_least("bridge", 1.0, "x", 1.3),
    ]

    def test_it_is_markdown_that_can_be_read_as_it_is(self):
        self.assertEqual(
            bench.render_table(self.ROWS).splitlines(),
            [
                "| what   | measured          | bound     | holds |",
                "| ------ | ----------------- | --------- | ----- |",
                "| agent  | 2.25 x (9 / 4 us) | <= 2.50 x | yes   |",
                "| start  | 300 ms            |           |       |",
                "| bridge | 1 x               | >= 1.30 x | NO    |",
            ],
        )

    def test_the_json_holds_every_figure(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "bench.json")
            bench.write_json(
                path,
                {"cores": 2},
                [("one", row) for row in self.ROWS],
                {"peer": "missing here: peer"},
                {},
            )
            with open(path) as file:
                content = json.load(file)
        self.assertEqual(content["machine"], {"cores": 2})
        self.assertEqual(content["skipped"], {"peer": "missing here: peer"})
        self.assertEqual([row["holds"] for row in content["rows"]], [True, None, False])
        self.assertEqual(content["rows"][0]["bound"], 2.5)

    def run_benches(self, quick, **benches):
        with mock.patch.dict(
            bench.BENCHES,
            {name: (function, quick) for name, function in benches.items()},
        ), contextlib.redirect_stderr(io.StringIO()):
            return bench.run_benches(list(benches), bench.Stage(quick, ""))

    def test_what_is_far_over_its_bound_has_a_second_chance_when_it_is_quick_and_says_so(
        self,
    ):
        for quick, bound, values, expected, note in (
            (False, 2.0, [3.0, 1.0], 3.0, ""),
            (True, 2.0, [3.0, 1.0], 1.0, "3 x at first"),
            (True, 2.0, [2.5, 1.0], 2.5, ""),
            (True, 0, [1, 0], 1, ""),
        ):
            with self.subTest(quick=quick, values=values):
                left = iter(values)
                rows, _, _ = self.run_benches(
                    quick,
                    noisy=lambda stage, left=left, bound=bound: [
                        bench.at_most("", next(left), "x", bound)
                    ],
                )
                self.assertEqual(
                    [(row.value, row.note) for _, row in rows], [(expected, note)]
                )

    def test_a_quick_run_judges_ratios_and_counts_and_tells_the_rest(self):
        def mixed(stage):
            yield bench.at_most("ratio", 9.0, "x", 2.0)
            yield bench.at_most("count", 9, "", 0)
            for unit in ("ms", "% of a core", "MiB", "KiB", "s"):
                yield bench.at_most(unit, 9.0, unit, 2.0)

        for quick, judged in ((True, ["ratio", "count"]), (False, None)):
            with self.subTest(quick=quick):
                rows, _, _ = self.run_benches(quick, mixed=mixed)
                self.assertEqual(len(rows), 7)
                over = [row.what for _, row in rows if row.holds is False]
                self.assertEqual(over, judged or [row.what for _, row in rows])

    def test_the_exit_code_tells_whether_all_was_measured_and_holds(self):
        def lacks(stage):
            raise bench.Missing("peer")

        def breaks(stage):
            raise ValueError("broken")

        for code, everything, flags, function in (
            (0, "", [], lambda stage: [bench.at_most("", 2.0, "x", 2.0)]),
            (1, "", [], lambda stage: [bench.at_most("", 2.1, "x", 2.0)]),
            (0, "", ["--quick"], lambda stage: [bench.at_most("", 2.6, "x", 2.0)]),
            (0, "", ["--quick"], lambda stage: [bench.at_most("", 1.9, "x", 2.0)]),
            (1, "", ["--quick"], lambda stage: [bench.at_most("", 2.7, "x", 2.0)]),
            (1, "", [], breaks),
            (0, "", [], lacks),
            (1, "1", [], lacks),
        ):
            with self.subTest(
                code=code, flags=flags
            ), tempfile.TemporaryDirectory() as folder, mock.patch.dict(
                os.environ, {"SENTINEL_TEST_ALL": everything}
            ), mock.patch.object(
                bench, "BENCHES", {"one": (function, True)}
            ), mock.patch.object(bench, "busy_share", return_value=0.0), mock.patch(
                "signal.signal"
            ), contextlib.redirect_stdout(
                io.StringIO()
            ) as told, contextlib.redirect_stderr(io.StringIO()):
                path = os.path.join(folder, "bench.json")
                self.assertEqual(bench.main(flags + ["--json", path]), code)
                self.assertTrue(os.path.exists(path))
                self.assertEqual(
                    code == 0 and "| NO " in told.getvalue(),
                    "1 over its bound, by less" in told.getvalue(),
                )

    def test_figures_that_cannot_be_written_are_refused_before_the_work(self):
        for module in (bench, soak):
            with self.subTest(
                module.__name__
            ), tempfile.TemporaryDirectory() as folder, mock.patch.object(
                module, "describe_machine", create=True
            ) as work, contextlib.redirect_stderr(io.StringIO()) as told:
                for path in (folder, os.path.join(folder, "none", "x.json")):
                    with self.assertRaises(SystemExit) as end:
                        module.main(["--json", path])
                    self.assertEqual(end.exception.code, 2)
                    self.assertIn(
                        "no file can be written at %r" % path, told.getvalue()
                    )
                work.assert_not_called()

    def test_what_is_missing_is_skipped_by_name_and_what_breaks_fails_alone(self):
        def lacks(stage):
            yield bench.told("first", 1, "")
            bench.need("no-such-program")

        def breaks(stage):
            raise ValueError("broken")
            yield

        rows, skipped, failed = self.run_benches(False, lacks=lacks, breaks=breaks)
        self.assertEqual([(name, row.what) for name, row in rows], [("lacks", "first")])
        self.assertEqual(skipped, {"lacks": "missing here: no-such-program"})
        self.assertEqual(failed, {"breaks": "ValueError: broken"})


class Measuring(unittest.TestCase):
    def test_it_is_steady_when_two_windows_agree_and_never_after_one(self):
        for shares, windows in (
            ([0.5, 0.5], 2),
            ([0.5, 0.3, 0.25], 3),
            ([0.001, 0.004], 2),
        ):
            with self.subTest(shares), mock.patch.object(
                bench, "cpu_share", side_effect=[[share] for share in shares]
            ) as measured:
                bench.settle(1)
                self.assertEqual(measured.call_count, windows)

    def test_what_is_never_steady_is_told(self):
        told = io.StringIO()
        with mock.patch.object(bench, "SETTLE_LIMIT", 0.05), contextlib.redirect_stderr(
            told
        ), mock.patch.object(
            bench, "cpu_share", side_effect=itertools.cycle([[0.1], [0.9]])
        ):
            bench.settle(1)
        self.assertIn("not steady", told.getvalue())

    def test_a_load_or_a_master_that_falls_behind_is_no_figure(self):
        for sent, answered, fails in (
            (1000, 1000, False),
            (1000, 800, True),
            (800, 800, True),
        ):
            fleet = bench.Fleet.__new__(bench.Fleet)
            reports = [
                {"sent": 0, "answered": 0, "time": 0.0},
                {"sent": sent, "answered": answered, "time": 20.0},
            ]
            fleet.count, fleet.master = 100, mock.Mock(pid=1)
            fleet.report = iter(reports).__next__
            with self.subTest(sent=sent, answered=answered), mock.patch.object(
                bench, "cpu_share", return_value=[0.3, 0.0]
            ):
                if fails:
                    self.assertRaisesRegex(
                        ValueError, "too busy", bench.measure_fleet, fleet, 20
                    )
                else:
                    self.assertEqual(bench.measure_fleet(fleet, 20)[0], 0.3)

    def test_cpu_counts_a_process_and_its_children(self):
        burn = "import time\nwhile time.process_time() < 0.3: pass\n"
        nested = (
            burn
            + "import subprocess, sys\nsubprocess.run([sys.executable, '-c', %r])\n"
            "print('done', flush=True)\ntime.sleep(60)" % burn
        )
        with support.start("-c", nested) as tool:
            support.eventually(lambda: "done" in tool.out)
            self.assertGreater(bench.cpu_seconds(tool.pid), 0.55)
            self.assertLess(bench.cpu_seconds(tool.pid), 5)

    def test_a_child_that_ends_while_it_is_looked_at_is_no_error(self):
        with support.start("-c", "import time; time.sleep(60)") as tool:
            gone = tool.pid + 2**22 + 1  # no process has that pid
            with mock.patch.object(support, "descendants", return_value=[gone]):
                self.assertLess(bench.cpu_seconds(tool.pid), 5)

    def test_memory_counts_what_is_touched(self):
        fill = "held = b'x' * 2 ** 25\nprint('done', flush=True)\nimport time; time.sleep(60)"
        with support.start("-c", fill) as tool:
            support.eventually(lambda: "done" in tool.out)
            self.assertTrue(2**25 < bench.pss_bytes(tool.pid) < 2**26)

    def test_a_sink_counts_each_of_its_ports_apart(self):
        with bench.Sink(3) as sink, support.PlainAgent(
            sink.ports[1]
        ) as one, support.PlainAgent(sink.ports[2]) as two:
            for agent, times in ((one, 2), (two, 1)):
                for _ in range(times):
                    agent.send_bytes(b"x")
                    self.assertEqual(agent.read_line(), "ok")
            self.assertEqual([sink.counts[port] for port in sink.ports], [0, 2, 1])
            self.assertEqual(sink.count, 3)

    def test_programs_side_by_side_are_measured_in_the_same_seconds(self):
        sender = (
            "import socket, sys, time\n"
            "sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
            "while True: sock.send(b'x'); time.sleep(0.1)\n"
        )

        def start_one(port):
            return support.start("-c", sender, port)

        with mock.patch.object(bench, "PAIRS", 2), mock.patch.object(
            bench, "INTERVAL", 0.1
        ), bench.Sink(4) as sink, bench.Beside(
            {"one": start_one, "two": start_one}, sink
        ) as beside:
            beside.wait()
            costs = beside.measure(0.5)
        self.assertEqual(list(costs), ["one", "two"])
        for each in costs["one"] + costs["two"]:
            self.assertTrue(0 < each < 0.05, costs)

    def test_a_listener_is_found_without_a_connection(self):
        with bench.Sink() as sink:
            self.assertTrue(bench.listens(sink.port))
        self.assertFalse(bench.listens(bench.free_port()))

    def test_a_target_of_prometheus_has_the_sample_s_numbers_and_nothing_else(self):
        text = bench.exposition({"cpu": 15.5, "cpus": 4, "node": "c1", "ack": True})
        self.assertEqual(text, "sentinel_cpu 15.5\nsentinel_cpus 4.0\n")


class Soak(unittest.TestCase):
    def memory(self, *sizes):
        """The rows of looks, one a minute, at a process of so many MiB."""
        return list(
            soak.judge_memory(
                [
                    (60.0 * minute, {"bridge": {"memory": size * 2**20}})
                    for minute, size in enumerate(sizes)
                ]
            )
        )

    def test_memory_may_grow_at_first_and_not_after_that(self):
        (warm,) = self.memory(*[5, 8] + [10] * 18)
        self.assertTrue(warm.holds)
        (grows,) = self.memory(*[10 + 0.05 * minute for minute in range(20)])
        self.assertFalse(grows.holds)
        self.assertIn("+3072 KiB an hour", grows.note)
        (shrinks,) = self.memory(*[10 - 0.05 * minute for minute in range(20)])
        self.assertTrue(shrinks.holds)

    def test_a_short_soak_shows_growth_and_does_not_judge_it(self):
        (short,) = self.memory(*range(10, 25))
        self.assertIsNone(short.holds)
        self.assertIn("too short", short.note)
        (long,) = self.memory(*range(10, 26))
        self.assertFalse(long.holds)

    def test_nonsense_is_refused_before_the_work(self):
        for flags in (
            ["--minutes", "0"],
            ["--agents", "0"],
            ["--churn", "-1"],
            ["--minutes", "x"],
        ):
            with self.subTest(flags), contextlib.redirect_stderr(
                io.StringIO()
            ) as told, self.assertRaises(SystemExit) as end:
                soak.build_parser().parse_args(flags)
            self.assertEqual(end.exception.code, 2)
            self.assertIn(flags[0], told.getvalue())

    def test_what_has_ended_is_remembered_for_a_while_by_who_watches_jobs(self):
        sizes = [10 + 0.05 * min(minute, 10) for minute in range(20)]
        looks = [
            (60.0 * minute, {"relay": {"memory": size * 2**20}})
            for minute, size in enumerate(sizes)
        ]
        (late,) = soak.judge_memory(looks, soak.JOBS_WARM_UP)
        self.assertTrue(late.holds)
        (early,) = soak.judge_memory(looks, 0.0)
        self.assertFalse(early.holds)

    def test_jobs_end_in_each_way_on_one_node_and_on_two(self):
        lab = mock.Mock()
        lab.queue.return_value = {}
        lab.sbatch.side_effect = map(str, itertools.count(1))
        with tempfile.TemporaryDirectory() as folder:
            lab.path = lambda name: os.path.join(folder, name)
            jobs = soak.Jobs(lab)
            for _ in range(2 * len(soak.ENDINGS)):
                jobs.next_at = 0.0
                jobs.step()
            names = sorted(os.listdir(folder))
            for name in names:
                with open(os.path.join(folder, name)) as file:
                    self.assertIn("srun --ntasks=$SLURM_NNODES", file.read())
        nodes = [call.args[0] for call in lab.sbatch.mock_calls]
        self.assertEqual(
            nodes, ["-N1"] * len(soak.ENDINGS) + ["-N2"] * len(soak.ENDINGS)
        )
        self.assertEqual(set(jobs.counts.values()), {2})
        lab.queue.return_value = dict.fromkeys("12345678", "RUNNING")  # no room
        jobs.next_at = 0.0
        jobs.step()
        self.assertEqual(jobs.turns, 2 * len(soak.ENDINGS))
        jobs.running["3"] = 0.0
        lab.queue.return_value = {"3": "RUNNING"}
        jobs.next_at = time.monotonic() + 60
        jobs.step()
        lab.run.assert_called_with("login", "scancel", "3")

    def test_each_thread_descriptor_and_slot_that_stays_is_seen(self):
        def look(threads=1, descriptors=9):
            return {
                "collector": {
                    "memory": 1,
                    "threads": threads,
                    "descriptors": descriptors,
                }
            }

        for after, slots, bad in (
            (look(), 0, 0),
            (look(threads=2), 0, 1),
            (look(descriptors=10), 0, 1),
            (look(), 1, 1),
        ):
            rows = list(soak.judge_rest(look(), after, slots))
            self.assertEqual(sum(not row.holds for row in rows), bad)


class Load(unittest.TestCase):
    SAMPLE = {
        "cpu": 0.0,
        "ram": 0.0,
        "load1": 1.5,
        "user": "me",
        "ack": True,
        "cpus": 2,
    }

    def test_an_agent_keeps_its_name_and_who_replaces_it_has_the_next(self):
        with bench.Sink() as sink:
            crowd = load.Load(load.build_parser().parse_args([str(sink.port), "2"]))
            for index in (0, 1, 0, 1, 0):
                self.assertTrue(crowd.talk(index))
            self.assertEqual(crowd.name_of, {0: b"node-0000000", 1: b"node-0000001"})
            crowd.replace(0)
            self.assertTrue(crowd.talk(0) and crowd.talk(1))
            self.assertEqual(crowd.name_of, {0: b"node-0000002", 1: b"node-0000001"})
            for sock in crowd.socks.values():
                sock.close()

    def test_a_template_is_filled_with_name_and_values(self):
        template = load.Template(self.SAMPLE)
        for name, cpu, ram in (
            ("node-0000007", 15.5, 40.2),
            ("node-9999999", 80.0, 5.0),
        ):
            data = template.fill(
                name.encode(), struct.pack(">d", cpu), struct.pack(">d", ram)
            )
            self.assertEqual(
                pickle.loads(data), dict(self.SAMPLE, node=name, cpu=cpu, ram=ram)
            )
        with self.assertRaisesRegex(ValueError, "node-10000000"):
            template.fill(b"node-10000000", bytes(8), bytes(8))

    def test_agents_are_dealt_out_to_jobs_and_tell_of_their_ranks_in_turn(self):
        options = ["1", "6", "--jobs", "3"]
        crowd = load.Load(load.build_parser().parse_args(options))
        jobs = [crowd.job_of(index) for index in range(6)]
        self.assertEqual(jobs, [b"7000000", b"7000001", b"7000002"] * 2)
        data = crowd.templates.__next__().fill(
            b"node-0000001", bytes(8), bytes(8), jobs[1]
        )
        self.assertEqual(pickle.loads(data)["job"], "7000001")
        crowd.looks = [b"first", b"second"]
        sent = mock.Mock()
        told = []
        for turn in range(12):
            crowd.tell_look(3, sent)
            told += [(turn, call.args[0]) for call in sent.send.mock_calls]
            sent.reset_mock()
        self.assertEqual(told, [(2, b"first"), (7, b"second")])

    def test_agents_connect_one_after_another_over_the_ramp(self):
        self.assertEqual(
            [load.first_due(i, 4, 2.0) for i in range(4)], [0.0, 0.5, 1.0, 1.5]
        )

    def test_an_even_load_keeps_its_distance_and_a_burst_meets(self):
        self.assertEqual(load.next_due(10.5, 2.0, "even"), 12.5)
        self.assertEqual(
            {load.next_due(due, 2.0, "burst") for due in (10.0, 10.5, 11.9)}, {12.0}
        )

    def test_a_load_sends_reads_and_notices_who_was_dropped(self):
        with bench.Sink() as sink, support.start(
            "tests/load.py", sink.port, 3, "--interval", "0.2"
        ) as tool:

            def report():
                return json.loads(tool.out.splitlines()[-1])

            support.eventually(
                lambda: report()["agents"] == 3 and report()["answered"] > 6
            )
            for sock in list(sink.socks)[:1]:
                sock.shutdown(2)
            support.eventually(lambda: report()["lost"] == 1)
            self.assertEqual(report()["agents"], 2)

    def test_churn_replaces_agents_by_new_ones(self):
        with bench.Sink() as sink, support.start(
            "tests/load.py", sink.port, 4, "--interval", "0.2", "--churn", 10
        ) as tool:

            def report():
                return json.loads(tool.out.splitlines()[-1])

            support.eventually(lambda: report()["left"] >= 6)
            self.assertEqual(report()["lost"], 0)
            support.eventually(lambda: report()["agents"] >= 3)
            self.assertEqual(tool.stop(), 0)


if __name__ == "__main__":
    unittest.main()
