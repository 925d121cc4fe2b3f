"""Records: a job's life as a file, read back wherever it was cut; no process but many writers."""

import gzip
import io
import math
import multiprocessing
import os
import random
import stat
import tempfile
import time
import unittest
import unittest.mock

import support

import master_server as master

NOW = 1700000000.0
DAY = 86400
HOSTILE = (
    "../../etc/passwd",
    "a/b",
    "4711.c1-1-1",
    "",
    ".",
    "..",
    "a\0b",
    "x" * 24,
    "é_~-%",
)


def facts(job="4711", **known):
    """What Slurm says of a job."""
    told = dict.fromkeys(master.JOB_KEYS)
    told.update(job=job, raw=job, state="RUNNING", start=NOW, limit=3600.0)
    told.update(known)
    return told


def row(when, cpu, step=10.0, names=("c1", "c2"), **more):
    """A row with one metric of two nodes, and others."""
    known = [value for value in cpu if value is not None]
    values = {"cpu": [min(known), sum(known) / len(known), max(known), *cpu]}
    values.update(more)
    return master.RecordRow(when, step, list(names), values)


def a_record(rows=20, job="4711", state="COMPLETED"):
    """The lines of a small record, one of each kind at least."""
    lines = [
        master.job_line(facts(job), NOW),
        master.record_line({"nodes": {"c1": {"job_cpus": 8.0}, "c2": {}}}),
    ]
    for number in range(1, rows + 1):
        lines.append(
            master.row_line(
                row(NOW + 10 * number, [float(number), 2.5], job_mem=[1e9, 2e9, 3e9])
            )
        )
    verdict = {
        "severity": "problem",
        "what": "it leaks \u2713",
        "proof": "p",
        "cure": "c",
    }
    lines += [
        master.record_line(
            {"event": {"time": NOW + 55, "kind": "lost", "node": "c2", "text": "gone"}}
        ),
        master.record_line({"verdicts": [verdict], "time": NOW + 60}),
        master.record_line({"ranks": [{"node": "c1", "rank": 3}], "time": NOW + 60}),
        master.record_line({"gpus": {"c1 0": [97, 3e10, 250, 61]}, "time": NOW + 60}),
        master.job_line(facts(job, state=state, end=NOW + 10 * rows), NOW + 10 * rows),
        master.record_line({"end": {"time": NOW + 10 * rows, "state": state}}),
    ]
    return b"".join(lines)


def write(folder, name, data):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(data)
    return path


class Lines(unittest.TestCase):
    def test_what_was_written_is_read_back(self):
        record = master.parse_record("4711", a_record())
        self.assertEqual(record.facts["state"], "COMPLETED")
        self.assertEqual(record.facts["limit"], 3600)
        self.assertEqual(list(record.nodes), ["c1", "c2"])
        self.assertEqual(len(record.rows), 20)
        self.assertEqual(record.rows[4].time, NOW + 50)
        self.assertEqual(record.rows[4].values["cpu"], [2.5, 3.75, 5, 5, 2.5])
        self.assertEqual(record.rows[4].values["job_mem"], [1e9, 2e9, 3e9])
        self.assertEqual(record.events[0]["text"], "gone")
        self.assertIsNone(record.events[0]["cpu"])
        self.assertEqual(record.verdicts[0]["what"], "it leaks \u2713")
        self.assertEqual(record.ranks, [{"node": "c1", "rank": 3}])
        self.assertEqual(record.gpus, {"c1 0": [(NOW + 60, [97, 3e10, 250, 61])]})
        self.assertTrue(record.has_ended)

    def test_a_record_written_out_again_says_the_same(self):
        record = master.parse_record("4711", a_record())
        again = master.parse_record("4711", b"".join(record.lines()))
        for name in ("facts", "nodes", "rows", "verdicts", "ranks", "gpus", "end"):
            self.assertEqual(getattr(again, name), getattr(record, name), name)
        self.assertEqual(again.events, record.events)

    def test_a_record_cut_at_any_byte_is_read_up_to_there(self):
        whole = a_record(8)
        kinds = []
        for size in range(len(whole) + 1):
            record = master.parse_record("4711", whole[:size])
            lines = whole[:size].count(b"\n")
            # a line is whole without its newline, too
            rows = [line for line in whole.split(b"\n")[:lines] if b'"row"' in line]
            self.assertIn(len(record.rows) - len(rows), (0, 1), size)
            self.assertEqual(master.summarize(record)["job"], "4711")
            kinds.append(bool(record.end))
        self.assertTrue(kinds[-1])
        self.assertFalse(kinds[-3])

    def test_a_packed_record_cut_at_any_byte_is_read_up_to_there(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "4711.a-1-1.jsonl")
            write(folder, "4711.a-1-1.jsonl", a_record(8))
            master.pack(path, "4711", "m")
            with open(path + ".gz", "rb") as file:
                whole = file.read()
            counts = []
            for size in range(len(whole) + 1):
                record = master.parse_record("4711", master.unpack(whole[:size]))
                counts.append(len(record.rows))
            self.assertEqual(counts, sorted(counts))
            self.assertEqual(counts[-1], 8)

    def test_damage_in_the_middle_costs_its_line_alone(self):
        lines = a_record(8).split(b"\n")
        for index in range(2, 10):
            damaged = lines[:index] + [lines[index][:7]] + lines[index + 1 :]
            record = master.parse_record("4711", b"\n".join(damaged))
            self.assertEqual(len(record.rows), 7)
            self.assertTrue(record.end)

    def test_lines_that_are_none_of_ours_are_passed_over(self):
        strange = (
            b"[1]\nnull\n\xff\xfe\n{}\n" + b"[" * 100000 + b'\n{"row":"x","step":1}\n'
            b'{"row":1,"step":1,"cpu":[1]}\n{"nodes":3}\n{"verdicts":[3],"time":1}\n'
            b'{"job":[],"time":1}\n{"event":{}}\n{"end":{}}\n{"gap":1}\n'
        )
        record = master.parse_record("4711", strange + a_record(3))
        self.assertEqual(len(record.rows), 3)
        self.assertEqual(len(record.events), 1)

    def test_unknown_is_not_zero(self):
        line = master.row_line(row(NOW, [5.0, None]))
        self.assertIn(b"null", line)
        record = master.parse_record(
            "1", master.record_line({"nodes": {"c1": {}, "c2": {}}}) + line
        )
        self.assertEqual(record.rows[0].values["cpu"], [5, 5, 5, 5, None])
        self.assertIsNone(master.summarize(record)["gpu"])
        self.assertIsNone(master.summarize(record)["peak"])

    def test_a_later_word_of_slurm_counts_and_an_unknown_one_takes_nothing_back(self):
        data = master.job_line(facts(state="RUNNING", reason="None"), NOW + 5)
        data += master.job_line(facts(state="FAILED", limit=None, exit="1:0"), NOW + 9)
        data += master.job_line(facts(state="PENDING"), NOW)
        told = master.parse_record("4711", data).facts
        self.assertEqual((told["state"], told["exit"]), ("FAILED", "1:0"))
        self.assertEqual(told["limit"], 3600)


class Thinning(unittest.TestCase):
    def test_two_rows_become_one_with_the_least_the_mean_and_the_most_of_both(self):
        rows = [row(NOW, [1.0, 3.0]), row(NOW + 10, [5.0, None])]
        (merged,) = master.halve(rows)
        self.assertEqual(merged.values["cpu"], [1, 3.5, 5, 3, 3])
        self.assertEqual((merged.time, merged.step), (NOW + 10, 20))

    def test_a_node_that_came_later_is_known_from_then_on(self):
        rows = [row(NOW, [4.0], names=["c1"]), row(NOW + 10, [6.0, 8.0])]
        (merged,) = master.halve(rows)
        self.assertEqual(merged.values["cpu"][3:], [5, 8])

    def test_rows_are_not_merged_over_a_gap(self):
        rows = [
            row(NOW, [1.0, 1.0]),
            row(NOW + 90, [3.0, 3.0]),
            row(NOW + 100, [5.0, 5.0]),
        ]
        self.assertEqual([one.time for one in master.halve(rows)], [NOW, NOW + 100])

    def test_the_rows_of_a_long_job_get_fewer(self):
        self.assertEqual(master.step_of(0, 1), 10)
        self.assertEqual(master.step_of(7199, 16), 10)
        self.assertEqual(master.step_of(7200, 16), 20)
        self.assertEqual(master.step_of(3600, 17), 20)
        self.assertEqual(master.step_of(14400, 16), 40)
        for days, nodes, most in ((1, 16, 2100), (7, 64, 2100), (30, 4, 4000)):
            age = rows = 0
            while age < days * DAY:
                age += master.step_of(age, nodes)
                rows += 1
            self.assertLess(rows, most)

    def test_of_rows_for_the_same_time_the_finest_are_kept(self):
        coarse = [row(NOW + 320 * n, [1.0, 1.0], step=320.0) for n in range(1, 6)]
        fine = [row(NOW + 1200 + 10 * n, [2.0, 2.0]) for n in range(60)]
        kept = master.without_overlap(coarse + fine)
        self.assertEqual(
            [one.time for one in kept if one.step == 320],
            [NOW + 320, NOW + 640, NOW + 960],
        )
        self.assertEqual(len(kept), 63)
        self.assertEqual(kept, sorted(kept, key=lambda one: one.time))

    def test_rows_of_other_nodes_for_the_same_time_are_kept(self):
        rows = [
            row(NOW + 1, [1.0], step=1.5, names=["c1"]),
            row(NOW + 1.1, [2.0], step=1.6, names=["c2"]),
            row(NOW + 1.2, [3.0], step=1.7, names=["c2"]),
        ]
        kept = master.without_overlap(rows)
        self.assertEqual([one.names for one in kept], [["c1"], ["c2"]])
        self.assertEqual([one.time for one in kept], [NOW + 1, NOW + 1.1])

    def test_rows_with_a_little_jitter_are_all_kept(self):
        chance = random.Random(3)
        rows = [
            row(NOW + 10 * n + chance.uniform(-1, 1), [1.0, 1.0]) for n in range(500)
        ]
        self.assertEqual(len(master.without_overlap(rows)), 500)


class Files(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.join(folder.name, "a", "jobs")
        master.make_folder(self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def test_folder_and_files_are_for_their_owner_alone(self):
        os.umask(os.umask(0))
        path = self.path("1.a-1-1.jsonl")
        master.append_lines(path, b"{}\n")
        master.pack(path, "1", "m")
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(path + ".gz").st_mode), 0o600)

    def test_no_id_of_a_job_leads_out_of_the_folder(self):
        for job in HOSTILE:
            name = master.safe_name(job)
            with self.subTest(job):
                self.assertNotIn("/", name)
                self.assertNotIn(".", name)
                if job:
                    path = self.path(name + ".a-1-1.jsonl")
                    master.append_lines(path, a_record(2, job))
                    self.assertEqual(os.path.dirname(path), self.folder)
                    record = master.read_record(self.folder, job)
                    self.assertEqual(len(record.rows), 2)
        self.assertEqual(
            sorted(file.job for file in master.list_files(self.folder)),
            sorted(filter(None, HOSTILE)),
        )

    def test_who_goes_on_after_a_kill_begins_a_line_of_its_own(self):
        path = self.path("1.a-1-1.jsonl")
        write(self.folder, "1.a-1-1.jsonl", a_record(2)[:-9])
        added = master.row_line(row(NOW + 500, [1.0, 1.0]))
        self.assertEqual(master.append_lines(path, added), len(added))
        record = master.parse_record("1", master.read_file(path))
        self.assertEqual(record.rows[-1].time, NOW + 500)

    def test_several_writers_of_one_job_are_put_together(self):
        early = a_record(10)
        late = b"".join(
            [master.job_line(facts(state="FAILED"), NOW + 500)]
            + [master.record_line({"nodes": {"c2": {}, "c3": {}}})]
            + [
                master.row_line(row(NOW + 10 * n, [9.0, 1.0], names=["c2", "c3"]))
                for n in range(5, 30)
            ]
        )
        write(self.folder, "4711.a-1-1.jsonl", early)
        write(self.folder, "4711.b-2-2.jsonl", late)
        write(self.folder, "47.b-2-2.jsonl", a_record(1, "47"))
        record = master.read_record(self.folder, "4711")
        self.assertEqual(list(record.nodes), ["c1", "c2", "c3"])
        self.assertEqual(
            [one.time for one in record.rows], [NOW + 10 * n for n in range(1, 30)]
        )
        self.assertEqual(record.facts["state"], "FAILED")
        again = master.parse_record("4711", b"".join(record.lines()))
        self.assertEqual(again.rows[-1].values["cpu"][3:], [None, 9, 1])
        summaries = {job["job"]: job for job in master.list_jobs(self.folder)}
        self.assertEqual(set(summaries), {"4711", "47"})
        self.assertEqual(summaries["4711"]["names"], ["c1", "c2", "c3"])

    def test_ten_masters_write_into_one_folder_without_a_broken_line(self):
        jobs = ["1", "2", "3"]
        context = multiprocessing.get_context("fork")
        writers = [
            context.Process(target=write_much, args=(self.folder, number, jobs))
            for number in range(10)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(support.PATIENCE)
            self.assertEqual(writer.exitcode, 0)
        for file in master.list_files(self.folder):
            lines = master.read_file(file.path).split(b"\n")
            self.assertEqual(lines.pop(), b"")
            self.assertEqual(
                len(list(master.read_lines(b"\n".join(lines)))), len(lines)
            )
        for job in jobs:
            events = master.read_record(self.folder, job).events
            self.assertEqual(len(events), 10 * 50)

    def test_a_packed_file_begins_with_its_summary_and_holds_the_rest(self):
        path = self.path("4711.a-1-1.jsonl")
        write(self.folder, "4711.a-1-1.jsonl", a_record(50))
        before = master.list_jobs(self.folder)
        master.pack(path, "4711", "m")
        self.assertEqual(os.listdir(self.folder), ["4711.a-1-1.jsonl.gz"])
        (file,) = master.list_files(self.folder)
        with open(file.path, "rb") as stream:
            data = stream.read()
        self.assertEqual(gzip.decompress(data).count(b'"row"'), 50)
        self.assertEqual(master.list_jobs(self.folder), before)
        with open(file.path, "wb") as stream:  # the summary alone is what a list reads
            stream.write(data[:-40])
        self.assertEqual(master.list_jobs(self.folder), before)

    def test_a_job_that_goes_on_after_its_end_is_packed_once_more(self):
        path = self.path("4711.a-1-1.jsonl")
        write(self.folder, "4711.a-1-1.jsonl", a_record(5))
        master.pack(path, "4711", "m")
        later = master.row_line(row(NOW + 900, [1.0, 2.0]))
        write(self.folder, "4711.a-1-1.jsonl", later)
        self.assertEqual(len(master.read_record(self.folder, "4711").rows), 6)
        master.pack(path, "4711", "m")
        self.assertEqual(len(master.read_record(self.folder, "4711").rows), 6)
        self.assertEqual(len(os.listdir(self.folder)), 1)

    def test_a_kill_between_packing_and_removing_does_no_harm(self):
        path = self.path("4711.a-1-1.jsonl")
        write(self.folder, "4711.a-1-1.jsonl", a_record(5))
        master.pack(path, "4711", "m")
        write(self.folder, "4711.a-1-1.jsonl", a_record(5))
        self.assertEqual(len(master.read_record(self.folder, "4711").rows), 5)
        master.pack(path, "4711", "m")
        self.assertEqual(len(master.read_record(self.folder, "4711").rows), 5)

    def test_the_oldest_records_go_when_there_are_too_many_or_they_are_too_old(self):
        for number, days in enumerate((400, 30, 20, 10, 3), 1):
            name = "%d.a-1-1.jsonl.gz" % number
            write(self.folder, name, bytes(80 * 10**6 if days > 3 else 100))
            write(self.folder, "%d.html" % number, b"report")
            os.utime(self.path(name), (NOW - days * DAY,) * 2)
        write(self.folder, "6.a-1-1.jsonl", a_record(3))  # it runs
        os.utime(self.path("6.a-1-1.jsonl"), (NOW - 60,) * 2)
        self.assertEqual(master.prune(self.folder, NOW, "m"), 2)
        left = {file.job for file in master.list_files(self.folder)}
        self.assertEqual(left, {"3", "4", "5", "6"})
        self.assertFalse(os.path.exists(self.path("1.html")))
        self.assertTrue(os.path.exists(self.path("3.html")))

    def test_nothing_is_removed_of_a_job_that_runs(self):
        write(self.folder, "1.a-1-1.jsonl.gz", b"x" * 100)
        write(self.folder, "6.a-1-1.jsonl", a_record(3))
        with unittest.mock.patch.object(master, "KEEP_BYTES", 10):
            self.assertEqual(master.prune(self.folder, time.time(), "m"), 1)
        self.assertEqual(os.listdir(self.folder), ["6.a-1-1.jsonl"])

    def test_what_a_killed_master_left_is_packed_when_nobody_writes_to_it(self):
        write(self.folder, "7.a-1-1.jsonl", a_record(3, "7", state="RUNNING"))
        os.utime(self.path("7.a-1-1.jsonl"), (NOW - 3 * DAY,) * 2)
        master.prune(self.folder, NOW, "m")
        self.assertEqual(os.listdir(self.folder), ["7.a-1-1.jsonl.gz"])
        self.assertEqual(len(master.read_record(self.folder, "7").rows), 3)

    def test_a_full_disk_leaves_no_half_packed_file(self):
        write(self.folder, "7.a-1-1.jsonl", a_record(3))

        def full(*_):
            raise OSError(28, "No space left on device")

        with unittest.mock.patch.object(os, "fsync", full), self.assertRaises(OSError):
            master.pack(self.path("7.a-1-1.jsonl"), "7", "m")
        self.assertEqual(os.listdir(self.folder), ["7.a-1-1.jsonl"])

    def test_no_folder_is_an_empty_list(self):
        self.assertEqual(master.list_jobs(self.path("none")), [])
        self.assertIsNone(master.read_record(self.path("none"), "1"))


def write_much(folder, number, jobs):
    """What one of ten masters does."""
    for event in range(50):
        for job in jobs:
            path = os.path.join(folder, "%s.h-%d-1.jsonl" % (job, number))
            line = {
                "time": NOW + event,
                "kind": "k",
                "node": "n%d" % number,
                "text": "x" * 200,
            }
            master.append_lines(path, master.record_line({"event": line}))


class Summaries(unittest.TestCase):
    def test_the_mean_is_over_time_and_the_peak_is_the_largest(self):
        data = master.record_line(
            {"nodes": {"c1": {"job_cpus": 4.0}, "c2": {"job_cpus": 4.0}}}
        )
        data += master.row_line(row(NOW, [10.0, 10.0], job_mem=[1e9, 1e9, 5e9]))
        data += master.row_line(
            row(NOW + 40, [50.0, 50.0], step=30.0, job_mem=[1e9, 1e9, 2e9])
        )
        summary = master.summarize(master.parse_record("1", data))
        self.assertEqual(summary["cpu"], 40)
        self.assertEqual(summary["peak"], 5e9)
        self.assertEqual(summary["got_cpus"], 8)

    def test_the_worst_verdict_or_a_deadly_state_is_what_a_job_is_called(self):
        summary = master.summarize(master.parse_record("1", a_record()))
        self.assertEqual(master.severity_of(summary), "problem")
        self.assertEqual(master.severity_of(dict(summary, state="TIMEOUT")), "died")
        self.assertEqual(master.severity_of(dict(summary, verdicts=[])), "fine")
        self.assertEqual(master.severity_of(dict(summary, verdicts=None)), "")


class Sketches(unittest.TestCase):
    """What a page shows of a large record lies beside it, and counts only as long as it is true."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        patch = unittest.mock.patch.object(master, "SKETCHED_BYTES", 1000)
        patch.start()
        self.addCleanup(patch.stop)
        path = write(self.folder, "4711.a-1-1.jsonl", a_record(50))
        master.pack(path, "4711", "m")
        self.packed = path + ".gz"
        self.record = master.read_record(self.folder, "4711")
        master.write_sketch(self.folder, self.record, "m")
        self.path = master.sketch_path(self.folder, "4711")

    def find(self):
        """The sketch beside the record, if it counts."""
        files = master.list_files(self.folder, "4711")
        return master.read_sketch(self.folder, "4711", files)

    def change(self, path, data):
        with open(path, "wb") as file:
            file.write(data)

    def test_it_says_what_the_record_says(self):
        self.assertEqual(self.find(), master.make_sketch(self.record))

    def test_the_record_itself_is_not_read_for_a_page(self):
        archive = master.Archive(self.folder)
        with unittest.mock.patch.object(master, "read_file", side_effect=OSError):
            self.assertEqual(archive.sketch("4711"), self.find())
            self.assertIsNone(archive.sketch("47"))

    def test_a_record_that_has_changed_is_read_itself(self):
        with open(self.packed, "rb") as file:
            data = file.read()
        late = a_record(60)
        for name, change in (
            ("cut", lambda: self.change(self.packed, data[:-9])),
            ("longer", lambda: self.change(self.packed, data + gzip.compress(late))),
            ("another", lambda: write(self.folder, "4711.b-2-2.jsonl", late)),
            ("gone", lambda: os.unlink(self.packed)),
        ):
            with self.subTest(name):
                self.change(self.packed, data)
                master.write_sketch(
                    self.folder, master.read_record(self.folder, "4711"), "m"
                )
                self.assertTrue(self.find())
                change()
                self.assertIsNone(self.find())
                found = master.Archive(self.folder).sketch("4711")
                record = master.read_record(self.folder, "4711")
                self.assertEqual(found, master.make_sketch(record))

    def test_one_that_is_cut_anywhere_or_none_of_ours_counts_for_nothing(self):
        with open(self.path, "rb") as file:
            whole = file.read()
        content = gzip.decompress(whole)
        strange = [whole[:size] for size in range(len(whole))]
        strange.append(b"\0" * 2**16)
        strange += map(gzip.compress, (b"", b"[]", b"3", b"{}", b"[" * 10**5))
        strange.append(gzip.compress(content.replace(b'"format":1', b'"format":0')))
        files = content[content.index(b',"format"') :]
        strange.append(gzip.compress(b'{"sketch":[1,2]' + files))
        strange.append(gzip.compress(b'{"sketch":[1,2,3,4,5,6,7,8,9,10,11]' + files))
        sketch = self.find()
        self.assertTrue(sketch)
        for data in strange:
            self.change(self.path, data)
            found = self.find()
            # a checksum of eight bytes ends it, and an empty line before that
            if whole.startswith(data) and len(data) > len(whole) - 12:
                self.assertIn(found, (None, sketch))
            else:
                self.assertIsNone(found, data[:80])

    def test_a_small_record_has_none_and_it_goes_with_its_record(self):
        path = write(self.folder, "5.a-1-1.jsonl", a_record(1, "5"))
        with unittest.mock.patch.object(master, "SKETCHED_BYTES", 2**18):
            master.write_sketch(self.folder, master.read_record(self.folder, "5"), "m")
        os.unlink(path)
        names = sorted(os.listdir(self.folder))
        self.assertEqual(names, ["4711.a-1-1.jsonl.gz", "4711.sketch.gz"])
        with unittest.mock.patch.object(master, "KEEP_BYTES", 10):
            master.prune(self.folder, time.time(), "m")
        self.assertEqual(os.listdir(self.folder), [])


class Archives(unittest.TestCase):
    def test_a_disk_that_hangs_is_told_in_time(self):
        with tempfile.TemporaryDirectory() as folder:
            fifo = os.path.join(folder, "1.a-1-1.jsonl")
            os.mkfifo(
                fifo
            )  # open() waits for a writer, as it does for a server that is gone
            archive = master.Archive(folder, seconds=0.2)
            began = time.monotonic()
            for _ in range(3):
                with self.assertRaisesRegex(master.RecordError, "does not answer"):
                    archive.record("1")
            self.assertLess(time.monotonic() - began, 5)
            with open(fifo, "wb"):
                pass  # it passes
            os.unlink(fifo)
            self.assertIsNone(support.eventually(lambda: [archive.record("1")])[0])

    def reading(self, question):
        """What an archive answers, and the bytes that it read of each file."""
        counts = {}
        real = open

        def counted(path, mode, buffering=-1):
            file = real(path, mode, buffering=0)
            name = os.path.basename(path)
            counts.setdefault(name, 0)

            class Counted(io.BufferedReader):
                def read(self, size=-1):
                    data = super().read(size)
                    counts[name] += len(data)
                    return data

            return Counted(file)

        with unittest.mock.patch.object(master, "open", counted, create=True):
            return question(), counts

    def test_only_what_changed_is_read_again_and_of_what_grew_the_rest(self):
        with tempfile.TemporaryDirectory() as folder:
            for number in range(5):
                write(folder, "%d.a-1-1.jsonl" % number, a_record(2, str(number)))
            archive = master.Archive(folder)
            jobs, first = self.reading(archive.list)
            self.assertEqual((len(jobs), len(first)), (5, 5))
            added = master.job_line(facts("3", state="FAILED"), NOW + 99)
            with open(os.path.join(folder, "3.a-1-1.jsonl"), "ab") as file:
                file.write(added)
            jobs, again = self.reading(archive.list)
            self.assertEqual(again, {"3.a-1-1.jsonl": len(added)})
            states = {job["job"]: job["state"] for job in jobs}
            self.assertEqual(states["3"], "FAILED")
            self.assertEqual(self.reading(archive.list)[1], {})

    def test_a_line_that_is_half_written_when_it_is_read_is_there_the_next_time_once(
        self,
    ):
        content = a_record(20, "3")
        whole = [each.time for each in master.parse_record("3", content).rows]
        last = content.rindex(b'{"row"')
        for cut in (last, last + 5, content.index(b"\n", last)):
            with tempfile.TemporaryDirectory() as folder:
                path = write(folder, "3.a-1-1.jsonl", content[:cut])
                archive = master.Archive(folder)
                archive.record("3")
                with open(path, "ab") as file:
                    file.write(content[cut:])
                rows = [each.time for each in archive.record("3").rows]
                self.assertEqual(rows, whole, cut)

    def test_a_file_that_is_packed_or_written_anew_is_read_again(self):
        with tempfile.TemporaryDirectory() as folder:
            path = write(folder, "3.a-1-1.jsonl", a_record(20, "3"))
            archive = master.Archive(folder)
            archive.list()
            with open(path, "wb") as file:
                file.write(master.job_line(facts("3", state="PENDING"), NOW))
            self.assertEqual(archive.list()[0]["state"], "PENDING")
            master.pack(path, "3", "m")
            (job,), read = self.reading(archive.list)
            self.assertEqual(job["state"], "PENDING")
            self.assertEqual(list(read), ["3.a-1-1.jsonl.gz"])
            self.assertEqual(archive.digests, {})

    def test_what_is_read_line_by_line_is_what_the_whole_file_says(self):
        lines = a_record(30).splitlines(True)
        late = {"cpu": 90.0, "job_mem": 5e9}
        readings = [late.get(key, math.nan) for key in master.PAST_KEYS]
        lines.append(master.row_line(row(NOW + 310, [5.0, None])))
        lines.append(master.late_line(NOW + 305, "c2", readings))
        lines.append(master.late_line(NOW + 404, "c2", readings))
        with tempfile.TemporaryDirectory() as folder:
            path = write(folder, "1.a-1-1.jsonl", b"")
            archive = master.Archive(folder)
            for count in range(len(lines)):
                with open(path, "ab") as file:
                    file.write(lines[count][:7])
                archive.list()  # half a line, which is read again once it is whole
                with open(path, "ab") as file:
                    file.write(lines[count][7:])
                (found,) = archive.list()
            whole = master.summarize(master.read_record(folder, "1"))
        for key, value in whole.items():
            with self.subTest(key):
                if isinstance(value, float):
                    self.assertAlmostEqual(found[key], value, places=6)
                else:
                    self.assertEqual(found[key], value)

    def test_many_files_are_read_a_few_at_a_time_and_others_are_answered_meanwhile(
        self,
    ):
        with tempfile.TemporaryDirectory() as folder:
            for number in range(50):
                write(folder, "%d.a-1-1.jsonl" % number, a_record(2, str(number)))
            real = master.read_from
            names = []

            def slow(path, at):
                names.append(path)
                time.sleep(0.01)
                return real(path, at)

            slices = unittest.mock.patch.object(master, "READ_SECONDS", 0.02)
            with slices, unittest.mock.patch.object(master, "read_from", slow):
                archive = master.Archive(folder, seconds=0.0)
                here = unittest.mock.patch.object(archive, "ask", lambda asked: asked())
                told = self.assertRaisesRegex(
                    master.RecordError, "is being read, [0-9]"
                )
                with here, told:
                    archive.list()
                self.assertGreater(archive.unread, 0)
                archive.seconds = support.PATIENCE
                self.assertEqual(archive.record("7").job, "7")
                # it goes on by itself
                support.eventually(lambda: not archive.unread)
                self.assertEqual(len(archive.list()), 50)
            self.assertEqual(len(names), len(set(names)))

    def test_what_comes_and_goes_in_a_folder_that_rests_is_seen(self):
        with tempfile.TemporaryDirectory() as folder:
            for job in ("1", "2", "3"):
                path = write(folder, job + ".a-1-1.jsonl", a_record(2, job))
                if job != "3":
                    master.pack(path, job, "m")
            archive = master.Archive(folder)
            with unittest.mock.patch.object(master, "SETTLED_SECONDS", -math.inf):
                archive.list()
                with unittest.mock.patch.object(os, "scandir", side_effect=OSError):
                    self.assertEqual(len(archive.list()), 3)
                    with open(path, "ab") as file:  # of what grows, the end is read
                        file.write(
                            master.job_line(facts("3", state="FAILED"), NOW + 99)
                        )
                    states = {job["job"]: job["state"] for job in archive.list()}
                    self.assertEqual(states["3"], "FAILED")
                for change, left in (
                    (lambda: os.unlink(folder + "/1.a-1-1.jsonl.gz"), {"2", "3"}),
                    (lambda: master.pack(path, "3", "m"), {"2", "3"}),
                    (lambda: write(folder, "4.b-1-1.jsonl", b""), {"2", "3", "4"}),
                    (lambda: write(folder, "notes.txt", b"x"), {"2", "3", "4"}),
                    (lambda: os.unlink(path + ".gz"), {"2", "4"}),
                ):
                    change()
                    found = {job["job"] for job in archive.list()}
                    self.assertEqual(found, left)
            self.assertEqual({file.job for file in archive.files({"2", "3"})}, {"2"})

    def test_a_thousand_records_are_listed_by_their_beginnings(self):
        with tempfile.TemporaryDirectory() as folder:
            path = write(folder, "0.a-1-1.jsonl", a_record(8000, "0"))
            master.pack(path, "0", "m")
            archive = master.Archive(folder)
            _, read = self.reading(archive.list)
            self.assertLessEqual(sum(read.values()), master.MAX_HEAD)


if __name__ == "__main__":
    unittest.main()
