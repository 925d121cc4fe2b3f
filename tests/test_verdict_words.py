"""What a verdict says, and for how long: the same thing everywhere, until it is refuted."""

import re
import unittest

import support  # noqa: F401  (the path to the tools)
from test_verdicts import GB, NOW, gpu, job, lines, node, rules, unused

import master_server
from master_server import diagnose


def memory_job(values, limit=100.0, **more):
    """A job of one node whose memory was so many GiB, every ten seconds up to now."""
    first = NOW - 10 * (len(values) - 1)
    curve = [(first + 10 * k, value * GB) for k, value in enumerate(values)]
    return job(node(job_mem=curve, job_mem_limit=limit * GB, **more))


def climb(first, step, count):
    """So many values, each a step above the one before."""
    return [first + step * k for k in range(count)]


class Steady(unittest.TestCase):
    """A verdict that was given stays until its evidence is refuted."""

    GROWN = climb(40, 2, 16)  # to 70 of 100

    def test_a_wobble_does_not_silence_the_verdict_on_growing_memory(self):
        for name, later in (
            ("as before", [72, 74]),
            ("one step back", [69.5]),
            ("up and down", [69.5, 71.5, 71, 73, 72.5, 75]),
            ("a short stop", [70.0]),
            ("slower", climb(70.3, 0.3, 30)),
        ):
            with self.subTest(name):
                self.assertEqual(
                    rules(memory_job(self.GROWN + list(later))), ["memory_grows"]
                )

    def test_it_is_refuted_when_memory_fell_stands_still_or_grows_no_more(self):
        swing = [69.0, 70.3]
        for name, later in (
            ("fell", [64.9]),
            ("stands still", [70.0, 70.0]),
            ("grows no more", swing * 10),
            ("fell, and swings", [60.0, 62.0, 60.5]),
        ):
            with self.subTest(name):
                self.assertEqual(rules(memory_job(self.GROWN + later)), ["fine"])
        self.assertEqual(rules(memory_job(self.GROWN + swing * 4)), ["memory_grows"])

    def test_the_time_that_is_left_does_not_jump(self):
        """The pace is that of some minutes: a wobble of 1 % changes it by little."""
        values = []
        told = []
        for k in range(40):
            values.append(50 + 1.2 * k + (0.9 if k % 3 else -0.9))
        for count in range(12, 40):
            (line,) = lines(memory_job(climb(30, 2.0, 11) + values[:count]))
            found = re.search(r"full in (\d+) (s|min)", line)
            self.assertTrue(found, line)
            amount, unit = found.groups()
            told.append(int(amount) * (60 if unit == "min" else 1))
        for sooner, later in zip(told, told[1:]):
            self.assertLessEqual(later, sooner + 60)
        self.assertGreater(told[0], told[-1])

    def test_memory_that_grows_up_to_the_limit_is_full_and_not_fine(self):
        (line,) = lines(memory_job(climb(40, 2, 30) + [100.0]))
        self.assertRegex(line, r"! memory of c1 grows steadily: it is full: 100 ")

    def test_what_is_nearly_full_stays_so_until_it_falls(self):
        full = [80.0] * 3 + [92.0] * 3
        for name, later, rule in (
            ("a little less", [89.0], "memory_near_limit"),
            ("up and down", [89.0, 91.0, 89.5, 90.5], "memory_near_limit"),
            ("fell", [84.0], "fine"),
            ("fell, and came back", [84.0, 89.0], "fine"),
            ("long ago", [89.0] * 19, "fine"),
            ("some minutes ago", [89.0] * 17, "memory_near_limit"),
        ):
            with self.subTest(name):
                self.assertEqual(rules(memory_job(full + later)), [rule])

    def test_no_moment_of_the_demonstrations_job_that_dies_of_memory_is_fine(self):
        """From the first minute on, whenever one looks, up to its death."""
        kind = next(
            each for each in master_server.DEMO_JOBS if each.ending == "OUT_OF_MEMORY"
        )
        for began in (NOW, NOW + 17, NOW + 31):
            curves = {}
            at = began + kind.seconds - kind.age + master_server.DEMO_PAUSE
            for passed in range(0, int(kind.seconds), 10):
                now = at + passed
                run = master_server.demo_run(kind, began, now)
                sample = master_server.demo_sample(kind, "c21", run, now)
                for key in master_server.CURVES:
                    if key in sample:
                        curves.setdefault(key, []).append((now, sample[key]))
                evidence = master_server.NodeEvidence(
                    "c21", sample, dict(curves), [], [], {}, set(), None
                )
                facts = master_server.demo_facts(kind, run)
                found = diagnose(master_server.JobEvidence(facts, [evidence], [], now))
                if passed >= 120:
                    self.assertEqual(
                        [verdict.rule for verdict in found], ["memory_grows"], passed
                    )


class IdleGPUs(unittest.TestCase):
    """The line to paste fits all nodes of the job."""

    def four_nodes(self, *, idle_cpu=0.5, others=90.0):
        used = [gpu(0), gpu(1)]
        asleep = [gpu(0, 0.0), gpu(1, 0.0)]
        nodes = [
            node("c%d" % k, gpus=used, gpu=[(t, others) for t, _ in SPAN], gpu_min=80.0)
            for k in (1, 2, 4)
        ]
        third = node(
            "c3",
            gpus=asleep,
            gpu=[(t, 0.0) for t, _ in SPAN],
            gpu_min=[(t, 0.0) for t, _ in SPAN],
            job_cpu=[(t, idle_cpu) for t, _ in SPAN],
        )
        return job(*nodes, third, gpus=8)

    def test_fewer_gpus_are_offered_where_every_node_has_so_many_idle(self):
        nodes = [
            node(
                "c%d" % k,
                gpus=[gpu(0), gpu(1), unused(2)]
                + ([unused(3)] if k == 2 else [gpu(3)]),
                gpu=60,
                gpu_min=[(t, 0.0) for t, _ in SPAN],
            )
            for k in (1, 2)
        ]
        (line,) = lines(job(*nodes, gpus=8))
        self.assertRegex(line, r"3 of 8 GPUs idle .*-> --gres=gpu:3  #")

    def test_where_one_node_uses_all_of_its_own_the_place_is_named(self):
        nodes = [
            node("c1", gpus=[gpu(0), gpu(1)], gpu=90, gpu_min=80),
            node(
                "c2",
                gpus=[gpu(0), unused(1)],
                gpu=45,
                gpu_min=[(t, 0.0) for t, _ in SPAN],
            ),
        ]
        (line,) = lines(job(*nodes, gpus=4))
        self.assertNotIn("--gres", line)
        self.assertRegex(line, r"1 of 4 GPUs idle .*: c2 gpu 1 at 0 %")
        self.assertIn("--overlap --nodes=1 --nodelist=c2 --pty nvidia-smi", line)
        self.assertTrue(line.endswith("# which ranks should use c2 gpu 1?"), line)

    def test_a_node_of_which_nothing_is_known_is_not_taken_for_one_with_idle_gpus(self):
        here = node(
            "c2", gpus=[gpu(0), unused(1)], gpu=45, gpu_min=[(t, 0.0) for t, _ in SPAN]
        )
        (line,) = lines(job(here, node("c1"), nodes=2, gpus=4))
        self.assertNotIn("--gres", line)

    def test_a_node_that_does_nothing_is_told_after_minutes_where_all_others_work(self):
        (line,) = lines(self.four_nodes())
        self.assertRegex(line, r"! 2 of 8 GPUs idle for 5 min: c3 gpu 0-1 at 0 %")
        self.assertIn("c3: no CPU works, either", line)
        for evidence in (self.four_nodes(idle_cpu=6.0), self.four_nodes(others=40.0)):
            self.assertEqual(rules(evidence), ["fine"])

    def test_the_column_and_the_verdict_count_the_same_gpus_as_idle(self):
        self.assertTrue(master_server.is_idle_gpu({"gpu": 1.0}))
        self.assertFalse(master_server.is_idle_gpu({"gpu": 1.1}))
        self.assertFalse(master_server.is_idle_gpu({}))
        busy = [90.0] * 8 + [1.0, 1.1]
        view = master_server_view(busy)
        told = master_server.render_gpus(view, view.nodes)
        self.assertTrue(told.endswith(", 1 of 10 idle"), told)

    def test_gpus_that_are_idle_for_less_time_are_counted_beside_the_others(self):
        here = node(
            "c1",
            gpus=[gpu(0), unused(1), gpu(2, 0.0)],
            gpu=45,
            gpu_min=[(t, 0.0) for t, _ in SPAN[-12:]],
        )
        (line,) = lines(job(here, gpus=3))
        self.assertRegex(line, "1 of 3 GPUs idle .*; 1 more are idle just now")


SPAN = [(NOW - 300 + 10 * k, 0.0) for k in range(31)]


def master_server_view(busy):
    """A copy of the table in which one node has these GPUs."""
    from test_pages import node as row
    from test_pages import view

    snapshot = view([row(1, job="1")])
    gpus = [{"gpu": value} for value in busy]
    snapshot.parts = lambda slot: master_server.Parts({}, [], [], gpus)
    return snapshot


if __name__ == "__main__":
    unittest.main()
