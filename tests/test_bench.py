"""The pure parts of the benchmarks: fits, bounds, table, pacing.  The timings are bench.py's."""

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import unittest
from unittest import mock

import bench
import load
import support


class Figures(unittest.TestCase):
    def test_the_exponent_of_a_power_law_is_found(self):
        for exponent in (0.0, 0.5, 1.0, 2.0):
            points = [(n, 0.07 * n ** exponent) for n in (200, 1000, 5000, 10000)]
            self.assertAlmostEqual(bench.fit_exponent(points), exponent)

    def test_noise_on_both_sides_leaves_the_exponent(self):
        points = [(100, 1.1), (100, 1 / 1.1), (10000, 100 * 1.1), (10000, 100 / 1.1)]
        self.assertAlmostEqual(bench.fit_exponent(points), 1.0)

    def test_the_slope_of_a_line_is_found(self):
        self.assertAlmostEqual(bench.fit_slope([(x, 3 - 0.25 * x) for x in (1, 2, 5, 9)]), -0.25)

    def test_a_percentile_is_one_of_the_values(self):
        values = list(range(100, 0, -1))
        self.assertEqual([bench.percentile(values, p) for p in (0, 1, 50, 99, 99.5, 100)],
                         [1, 1, 50, 99, 100, 100])
        self.assertEqual(bench.percentile([7], 99), 7)

    def test_a_value_is_shown_with_the_digits_that_count(self):
        cases = [(0, ""), (3, "x"), (0.4567, "x"), (12.34, "MiB"), (123.4, "ms"), (0.01234, "%"),
                 (0.06, "%")]
        self.assertEqual([bench.show(*case) for case in cases],
                         ["0", "3 x", "0.46 x", "12.3 MiB", "123 ms", "0.012 %", "0.060 %"])


class Bounds(unittest.TestCase):
    def test_a_row_holds_on_its_bound_and_not_past_it(self):
        for value, at_most, at_least in ((1.9, True, False), (2.0, True, True), (2.1, False, True)):
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

    def test_what_is_only_told_holds(self):
        self.assertTrue(bench.told("", 10 ** 9, "s").holds)


class Table(unittest.TestCase):
    ROWS = [bench.at_most("agent", 2.25, "x", 2.5, "9 / 4 us"), bench.told("start", 300, "ms"),
            bench.at_least("bridge", 1.0, "x", 1.3)]

    def test_it_is_markdown_that_can_be_read_as_it_is(self):
        self.assertEqual(bench.render_table(self.ROWS).splitlines(), [
            "| what   | measured          | bound     | holds |",
            "| ------ | ----------------- | --------- | ----- |",
            "| agent  | 2.25 x (9 / 4 us) | <= 2.50 x | yes   |",
            "| start  | 300 ms            |           |       |",
            "| bridge | 1 x               | >= 1.30 x | NO    |"])

    def test_the_json_holds_every_figure(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "bench.json")
            bench.write_json(path, {"cores": 2}, [("one", row) for row in self.ROWS],
                             {"peer": "missing here: peer"}, {})
            with open(path) as file:
                content = json.load(file)
        self.assertEqual(content["machine"], {"cores": 2})
        self.assertEqual(content["skipped"], {"peer": "missing here: peer"})
        self.assertEqual([row["holds"] for row in content["rows"]], [True, True, False])
        self.assertEqual(content["rows"][0]["bound"], 2.5)

    def run_benches(self, quick, **benches):
        with mock.patch.dict(bench.BENCHES, {name: (function, quick) for name, function in
                                             benches.items()}), \
                contextlib.redirect_stderr(io.StringIO()):
            return bench.run_benches(list(benches), bench.Stage(quick, ""))

    def test_what_is_far_over_its_bound_has_a_second_chance_when_it_is_quick(self):
        for quick, values, expected in ((False, [3.0, 1.0], 3.0), (True, [3.0, 1.0], 1.0),
                                        (True, [2.5, 1.0], 2.5)):
            with self.subTest(quick=quick, values=values):
                left = iter(values)
                rows, _, _ = self.run_benches(quick, noisy=lambda stage, left=left: [
                    bench.at_most("", next(left), "x", 2.0)])
                self.assertEqual([row.value for _, row in rows], [expected])

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
    def test_cpu_counts_a_process_and_its_children(self):
        burn = "import time\nwhile time.process_time() < 0.3: pass\n"
        nested = burn + "import subprocess, sys\nsubprocess.run([sys.executable, '-c', %r])\n" \
            "print('done', flush=True)\ntime.sleep(60)" % burn
        with support.start("-c", nested) as tool:
            support.eventually(lambda: "done" in tool.out)
            self.assertGreater(bench.cpu_seconds(tool.pid), 0.55)
            self.assertLess(bench.cpu_seconds(tool.pid), 5)

    def test_memory_counts_what_is_touched(self):
        fill = "held = b'x' * 2 ** 25\nprint('done', flush=True)\nimport time; time.sleep(60)"
        with support.start("-c", fill) as tool:
            support.eventually(lambda: "done" in tool.out)
            self.assertTrue(2 ** 25 < bench.pss_bytes(tool.pid) < 2 ** 26)

    def test_a_listener_is_found_without_a_connection(self):
        with bench.Sink() as sink:
            self.assertTrue(bench.listens(sink.port))
        self.assertFalse(bench.listens(bench.free_port()))

    def test_a_target_of_prometheus_has_the_sample_s_numbers_and_nothing_else(self):
        text = bench.exposition({"cpu": 15.5, "cpus": 4, "node": "c1", "ack": True})
        self.assertEqual(text, "sentinel_cpu 15.5\nsentinel_cpus 4.0\n")


class Load(unittest.TestCase):
    SAMPLE = {"cpu": 0.0, "ram": 0.0, "load1": 1.5, "user": "me", "ack": True, "cpus": 2}

    def test_an_agent_keeps_its_name_and_who_replaces_it_has_the_next(self):
        with bench.Sink() as sink:
            crowd = load.Load(load.build_parser().parse_args([str(sink.port), "2"]))
            for index in (0, 1, 0, 1, 0):
                self.assertTrue(crowd.talk(index))
            self.assertEqual(crowd.name_of, {0: b"node-00000", 1: b"node-00001"})
            crowd.replace(0)
            self.assertTrue(crowd.talk(0) and crowd.talk(1))
            self.assertEqual(crowd.name_of, {0: b"node-00002", 1: b"node-00001"})
            for sock in crowd.socks.values():
                sock.close()

    def test_a_template_is_filled_with_name_and_values(self):
        template = load.Template(self.SAMPLE)
        for name, cpu, ram in (("node-00007", 15.5, 40.2), ("node-99999", 80.0, 5.0)):
            data = template.fill(name.encode(), struct.pack(">d", cpu), struct.pack(">d", ram))
            self.assertEqual(pickle.loads(data), dict(self.SAMPLE, node=name, cpu=cpu, ram=ram))

    def test_agents_connect_one_after_another_over_the_ramp(self):
        self.assertEqual([load.first_due(i, 4, 2.0) for i in range(4)], [0.0, 0.5, 1.0, 1.5])

    def test_an_even_load_keeps_its_distance_and_a_burst_meets(self):
        self.assertEqual(load.next_due(10.5, 2.0, "even"), 12.5)
        self.assertEqual({load.next_due(due, 2.0, "burst") for due in (10.0, 10.5, 11.9)}, {12.0})

    def test_a_load_sends_reads_and_notices_who_was_dropped(self):
        with bench.Sink() as sink, support.start(
                "tests/load.py", sink.port, 3, "--interval", "0.2") as tool:
            def report():
                return json.loads(tool.out.splitlines()[-1])
            support.eventually(lambda: report()["agents"] == 3 and report()["answered"] > 6)
            for sock in list(sink.socks)[:1]:
                sock.shutdown(2)
            support.eventually(lambda: report()["lost"] == 1)
            self.assertEqual(report()["agents"], 2)

    def test_churn_replaces_agents_by_new_ones(self):
        with bench.Sink() as sink, support.start(
                "tests/load.py", sink.port, 4, "--interval", "0.2", "--churn", 10) as tool:
            def report():
                return json.loads(tool.out.splitlines()[-1])
            support.eventually(lambda: report()["left"] >= 6)
            self.assertEqual(report()["lost"], 0)
            support.eventually(lambda: report()["agents"] >= 3)
            self.assertEqual(tool.stop(), 0)


if __name__ == "__main__":
    unittest.main()
