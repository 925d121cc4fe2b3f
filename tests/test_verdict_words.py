"""What a verdict says, and for how long: the same thing everywhere, until it is refuted."""

import re
import types
import unittest

import support  # noqa: F401  (the path to the tools)
from test_verdicts import GB, NOW, ended, gpu, job, lines, node, rules, silent, unused

import master_server
from master_server import diagnose


def memory_job(values, limit=100.0, **more):
    """A job of one node whose memory was so many GB, every ten seconds up to now."""
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
            at = began - kind.age
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


class Late(unittest.TestCase):
    """Nodes of all jobs that fall silent together are hardly the fault of each of them."""

    def test_most_nodes_together_are_told_later_and_with_the_likely_cause(self):
        for ago, rule in ((12, "fine"), (44, "fine"), (50, "node_silent")):
            with self.subTest(ago):
                evidence = job(node("c1"), silent("c2", ago))
                together = evidence._replace(burst=NOW - ago + 1)
                self.assertEqual(rules(evidence), ["node_silent"])
                self.assertEqual(rules(together), [rule])
                before = evidence._replace(burst=NOW - ago - 60)
                self.assertEqual(rules(before), ["node_silent"])
        (line,) = lines(together)
        said = (
            "most nodes of all jobs fell silent together: the master or its network was"
        )
        self.assertIn(said, line)


class Evidence(unittest.TestCase):
    """With little to go by nobody is told that nothing is wrong."""

    def said(self, evidence):
        (verdict,) = diagnose(evidence)
        self.assertEqual((verdict.severity, verdict.rule), ("fine", "fine"))
        return verdict

    def test_a_running_job_is_fine_once_most_checks_have_had_their_time(self):
        for count, what in ((2, "fine so far"), (31, "fine")):
            load = [(NOW - 10 * k, 100.0) for k in range(count)][::-1]
            memory = [(moment, 1.0 * GB) for moment, _ in load]
            verdict = self.said(job(node(job_cpu=load, job_mem=memory), nodes=1))
            self.assertEqual(verdict.what, what)
            since = master_server.clock_words(load[0][0])
            told = "1 node, %d samples of each since %s" % (count, since)
            self.assertEqual(verdict.proof, told)

    def test_the_proof_says_how_many_of_the_nodes_are_seen(self):
        proof = self.said(job(node("c1"), node("c2"), nodes=25)).proof
        self.assertTrue(proof.startswith("2 of 25 nodes, 13 samples"), proof)

    def test_memory_that_is_nearly_full_since_a_moment_ago_is_not_called_fine(self):
        values = [50.0] * 40 + [94.0]
        verdict = self.said(memory_job(values))
        self.assertEqual(verdict.what, "fine so far")
        self.assertIn("94 % of the memory of c1 in use just now", verdict.proof)
        self.assertEqual(self.said(memory_job([50.0] * 40 + [89.0])).what, "fine")

    def test_a_job_that_waits_or_has_ended_well_is_fine(self):
        waiting = job(state="PENDING", reason="Priority", nodes=1)
        self.assertEqual(self.said(waiting).what, "fine")
        self.assertEqual(
            self.said(ended("COMPLETED", node(), limit=3600.0)).what, "fine"
        )


class Deaths(unittest.TestCase):
    """Out of memory is one sentence, with a line that can be pasted."""

    def test_the_line_to_paste_has_a_number_where_a_limit_is_known(self):
        for more, cure in (
            ({"mem": 192.0 * GB}, "--mem=231G"),
            ({}, "scontrol show job 4711 | grep -i mem  # and ask for more: --mem="),
        ):
            (verdict,) = diagnose(
                job(state="OUT_OF_MEMORY", exit="0:125", end=NOW - 60, **more)
            )
            self.assertEqual(verdict.cure, cure)

    def test_what_the_kernel_killed_in_a_job_that_still_runs_is_no_promise(self):
        (line,) = lines(job(node(oom_kill=1)))
        self.assertIn(
            "; the job still runs: memory peak higher than any sample: ", line
        )


class Everywhere(unittest.TestCase):
    """A job has one verdict, with the same figures, in the list, on its page and in its record."""

    def told(self, state, what, recorded):
        facts = dict.fromkeys(master_server.JOB_KEYS)
        facts.update(job="7", raw="7", state=state)
        verdict = {
            "severity": "fine",
            "what": what,
            "proof": "p",
            "cure": "",
            "rule": "fine",
        }
        record = master_server.Record("7")
        record.facts.update(facts)
        record.verdicts = recorded
        archive = types.SimpleNamespace(
            record=lambda name: record, list=lambda: [master_server.summarize(record)]
        )
        site = types.SimpleNamespace(archive=archive)
        view = types.SimpleNamespace(
            time=NOW, jobs=[facts], nodes=[], made={}, verdicts={"7": [verdict]}
        )
        found = master_server.find_record(view, "7", site).verdicts
        (summary,) = master_server.all_summaries(view, site)
        self.assertEqual(summary["verdicts"], found)
        return found[0]["what"]

    def test_the_newest_verdict_on_a_job_that_runs_is_that_of_now(self):
        old = [{"severity": "advice", "what": "of before", "rule": "r"}]
        self.assertEqual(self.told("RUNNING", "of now", old), "of now")
        self.assertEqual(self.told("COMPLETED", "of now", old), "of before")
        self.assertEqual(self.told("COMPLETED", "of now", None), "of now")

    def test_a_young_job_is_told_so_in_its_row(self):
        for what, text in (
            ("fine so far", "fine so far"),
            ("fine", None),
        ):
            facts = dict.fromkeys(master_server.JOB_KEYS)
            facts.update(job="7", raw="7", state="RUNNING")
            verdict = {"severity": "fine", "what": what}
            view = types.SimpleNamespace(
                time=NOW, jobs=[facts], nodes=[], made={}, verdicts={"7": [verdict]}
            )
            self.assertEqual(master_server.judge_job(view, [facts]), ("fine", text))

    def test_a_death_that_nobody_has_judged_is_judged_by_what_slurm_says(self):
        """But not at once: who has watched the job knows more, and tells it in a moment."""
        for ago, count in ((19, 0), (20, 1)):
            facts = dict.fromkeys(master_server.JOB_KEYS)
            facts.update(job="7", raw="7", state="FAILED", exit="3:0", end=NOW - ago)
            view = types.SimpleNamespace(
                time=NOW, jobs=[facts], nodes=[], made={}, verdicts={}
            )
            self.assertEqual(len(master_server.verdicts_of(view)), count)


class AlertWords(unittest.TestCase):
    def test_what_fires_is_said_in_words(self):
        for rule, value, words in (
            ("job_ram>90", 90.0869, "90.1 % of its memory in use (alert above 90 %)"),
            ("cpu>80 for 9", 97.0, "CPU 97 % (alert above 80 % for 9 s)"),
            ("gpu<5", None, "GPU (alert below 5 %)"),
            ("job_time_left<600", 480, "8 min of its time left (alert below 600 s)"),
            ("mem_used>1000", 3 * GB, "Memory used 3 GB (alert above 1000 B)"),
            ("net_rx>1000", 2**30, "Received 1 GB/s (alert above 1000 B/s)"),
            ("load1>7", 8.25, "Load 8.25 (alert above 7)"),
        ):
            with self.subTest(rule):
                found = master_server.alert_words(master_server.parse_rule(rule), value)
                self.assertEqual(found, words)


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
