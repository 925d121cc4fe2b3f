"""The shared table: its layout as the picture has it, whole copies, owners, and who removes it."""

import contextlib
import math
import multiprocessing
import os
import random
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
import time
import unittest
import unittest.mock

import beside
import support
from support import eventually, requires

import master_server
from master_server import DETAILS, EVENTS, Table, TableError

load_tests = beside.load_tests  # in a process of its own: it mostly waits

SEED = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
SLOT = struct.Struct("i64sff")  # as the plan has it
VALUES = {"cpu": 15.5, "ram": 40.25}
KEYS = {m.key for m in master_server.METRICS}


def row(**values):
    """A Row with VALUES and these."""
    values = {
        key: value.encode() if isinstance(value, str) else value
        for key, value in dict(VALUES, **values).items()
    }
    return tuple(
        values.get(m.key, unknown)
        for m, unknown in zip(master_server.METRICS, master_server.UNKNOWN)
    )


def segment_name(what):
    return "sentinel_t_%s_%d" % (what[:12], os.getpid())


class TableTest(unittest.TestCase):
    """Tests with a table of their own."""

    def create(self, capacity=8, lock=None, name=None):
        table = Table.create(name or segment_name(self._testMethodName[5:]), capacity)
        self.addCleanup(self.discard, table)
        table.lock = lock or multiprocessing.Lock()
        return table

    def discard(self, table):
        if table.buf is not None:
            table.unlink()

    def attach(self, table):
        reader = Table.attach(table.shm.name)
        self.addCleanup(self.close, reader)
        return reader

    @staticmethod
    def close(table):
        table.buf = None
        table.shm.close()


# ==========================================================================================
# Layout
# ==========================================================================================


class Layout(TableTest):
    """What the docstring of Table promises to readers in other languages."""

    def test_slots_are_at_offset_0_one_behind_the_other(self):
        for capacity in (1, 10, 1024):
            with self.subTest(capacity):
                table = self.create(capacity, name=segment_name("slots%d" % capacity))
                for index in (0, capacity // 2, capacity - 1):
                    table.write(
                        index, "('10.77.2.11', %d)" % (40000 + index), row(), 0.0, ""
                    )
                with open("/dev/shm/" + table.shm.name, "rb") as file:
                    rows = list(SLOT.iter_unpack(file.read(SLOT.size * capacity)))
                self.assertEqual(SLOT.size, 76)
                used = {0, capacity // 2, capacity - 1}
                for index, (number, address, cpu, ram) in enumerate(rows):
                    self.assertEqual(number, index + 1 if index in used else 0)
                    if index in used:
                        text = "('10.77.2.11', %d)" % (40000 + index)
                        self.assertEqual(address, text.encode().ljust(64, b"\0"))
                        self.assertEqual((cpu, ram), (15.5, 40.25))

    def test_the_picture_names_the_places_at_which_things_are(self):
        table = self.create(3)
        picture = {
            name: int(at)
            for at, name in re.findall(r"size - (\d+) +([A-Z]+)", Table.__doc__)
        }
        for name, at in picture.items():
            with self.subTest(name):
                self.assertEqual(
                    table.shm.size - at, getattr(table, name.lower() + "_at")
                )
        self.assertEqual(set(picture), {"NOTES", "HEADER", "SEQUENCE", "COUNTS"})
        raw = bytes(table.buf)
        magic, layout, capacity, pid, start = struct.unpack_from(
            "=8sIIqq", raw, len(raw) - picture["HEADER"]
        )
        self.assertEqual(
            (magic, layout, capacity, pid),
            (b"SENTINEL", master_server.LAYOUT, 3, os.getpid()),
        )
        with open("/proc/self/stat") as file:
            self.assertEqual(start, int(file.read().rpartition(")")[2].split()[19]))
        self.assertEqual(
            struct.unpack_from("=Q", raw, len(raw) - picture["SEQUENCE"]), (0,)
        )

    def test_details_follow_the_slots_and_have_one_field_for_each_metric(self):
        table = self.create(4)
        numbers = {m.key: 1000.0 + at for at, m in enumerate(DETAILS) if m.code == "d"}
        texts = {m.key: m.key + "!" for m in DETAILS if m.code.endswith("s")}
        table.write(2, "x", row(**numbers, **texts), 12.5, "cpu>90")
        layout = struct.Struct("=dd64s" + "".join(m.code for m in DETAILS))
        seen, since, alerts, *rest = layout.unpack_from(
            bytes(table.buf), 4 * SLOT.size + 2 * layout.size
        )
        self.assertAlmostEqual(seen, time.monotonic(), delta=5)
        self.assertEqual((since, alerts.rstrip(b"\0")), (12.5, b"cpu>90"))
        for m, value in zip(DETAILS, rest):
            self.assertEqual(
                value if m.code == "d" else value.rstrip(b"\0").decode(),
                numbers.get(m.key, texts.get(m.key)),
                m.key,
            )

    def test_unknown_is_nan_or_empty_in_memory_and_none_in_a_snapshot(self):
        table = self.create()
        table.write(0, "x", row(), 0.0, "")
        table.beat(1, 1)
        layout = struct.Struct("=dd64s" + "".join(m.code for m in DETAILS))
        rest = layout.unpack_from(bytes(table.buf), 8 * SLOT.size)[3:]
        for m, value in zip(DETAILS, rest):
            self.assertTrue(
                math.isnan(value) if m.code == "d" else not value.strip(b"\0"), m.key
            )
        (node,) = table.snapshot().nodes
        self.assertEqual({node[m.key] for m in DETAILS}, {None})

    def test_bytes_and_counts_are_whole_numbers_and_a_load_is_none(self):
        table = self.create()
        table.write(0, "x", row(cpus=4.0, mem_total=2.0**40, load1=2.0), 0.0, "")
        table.beat(1, 1)
        (node,) = table.snapshot().nodes
        found = {key: repr(node[key]) for key in ("cpus", "mem_total", "load1")}
        expected = {"cpus": "4", "mem_total": "1099511627776", "load1": "2.0"}
        self.assertEqual(found, expected)

    def test_text_that_is_too_long_is_cut_at_a_whole_character(self):
        table = self.create()
        table.beat(0, 1)
        for node in (
            "x" * 255,
            "é" * 100,
            "\u20ac" * 85,
            "\U0001f6a8" * 60,
            "a" + "é" * 100,
        ):
            with self.subTest(node[:2]):
                table.write(0, "x", row(node=node), 0.0, node)
                table.add_event("connected", node * 4, node, row(job=node, user=node))
                snapshot = table.snapshot()
                for text in (
                    snapshot.nodes[0]["node"],
                    snapshot.events[-1]["node"],
                    snapshot.events[-1]["text"],
                    snapshot.nodes[0]["alerts"],
                ):
                    self.assertTrue(text and (node * 4).startswith(text), text)
                    self.assertGreaterEqual(len(text.encode()), 58)

    def test_the_ring_keeps_the_last_128_events_in_order(self):
        table = self.create()
        for number in range(300):
            table.add_event("connected", "event %d" % number, "n%d" % number)
            events = table.snapshot().events
            first = max(0, number + 1 - EVENTS)
            self.assertEqual(
                [event["node"] for event in events],
                ["n%d" % each for each in range(first, number + 1)],
            )
        self.assertEqual(
            (EVENTS, events[-1]["kind"], events[-1]["text"], events[-1]["cpu"]),
            (128, "connected", "event 299", None),
        )

    def test_it_is_known_since_when_events_are_missed(self):
        table = self.create()
        for number in range(EVENTS + 1):
            self.assertEqual(table.snapshot().missed, -math.inf)
            table.add_event("lost", "event %d" % number, "n")
        view = table.snapshot()
        self.assertEqual(view.all_events, EVENTS + 1)
        self.assertEqual(view.missed, view.events[0]["time"])

    def test_the_largest_table_can_be_made_and_its_last_slot_be_read(self):
        table = self.create(65536)
        table.write(65535, "('::1', 1)", row(node="last"), 0.0, "")
        table.beat(1, 65536)
        (node,) = table.snapshot().nodes
        self.assertEqual((node["slot"], node["node"]), (65536, "last"))

    def test_nobody_else_may_read_it(self):
        table = self.create()
        mode = os.stat("/dev/shm/" + table.shm.name).st_mode
        self.assertEqual(stat.S_IMODE(mode), 0o600)

    def test_no_room_is_promised_that_is_not_there(self):
        table = self.create(1024)
        found = os.stat("/dev/shm/" + table.shm.name)
        self.assertGreaterEqual(found.st_blocks * 512, found.st_size)


# ==========================================================================================
# Whole copies
# ==========================================================================================


def write_for_ever(name, lock, capacity, started):
    """A writer: every number and text of a row says the same count."""
    table = Table.attach(name, lock)
    keys = [m.key for m in master_server.METRICS if m.key in master_server.NUMBERS]
    table.beat(0, capacity)
    for count in range(1 << 30):
        index, value = count % capacity, count % 97
        numbers = dict.fromkeys(keys, float(value))
        table.write(
            index,
            "('10.0.0.%d', 1)" % value,
            row(**numbers, node="n%d" % value, user="n%d" % value),
            float(value),
            "n%d" % value,
        )
        if count == 2 * capacity:
            started.set()


def torn(node):
    """Whether a row mixes two writes."""
    values = {node["cpu"], node["ram"], node["since"]}
    values |= {node[m.key] for m in DETAILS if m.code == "d"}
    texts = {node["node"], node["user"], node["alerts"]}
    return (
        len(values) != 1
        or texts != {"n%d" % node["cpu"]}
        or node["address"] != "('10.0.0.%d', 1)" % node["cpu"]
    )


class WholeCopies(TableTest):
    """A copy is whole, with the lock and without it."""

    capacity = 40

    def writer(self, table):
        context = multiprocessing.get_context("fork")
        started = context.Event()
        writer = context.Process(
            target=write_for_ever,
            daemon=True,
            args=(table.shm.name, table.lock, self.capacity, started),
        )
        writer.start()
        self.addCleanup(writer.join)
        self.addCleanup(writer.kill)
        self.assertTrue(started.wait(support.PATIENCE))
        return writer

    @support.slow("seconds of writes")
    def test_readers_with_and_without_the_lock_see_no_torn_row(self):
        table = self.create(self.capacity)
        self.writer(table)
        for how, reader in (("with", table), ("without", self.attach(table))):
            with self.subTest(how + " the lock"):
                counts = set()
                for _ in range(300):
                    snapshot = reader.snapshot()
                    self.assertEqual(len(snapshot.nodes), self.capacity)
                    self.assertEqual(
                        [node for node in snapshot.nodes if torn(node)], []
                    )
                    counts.add(snapshot.nodes[0]["cpu"])
                self.assertGreater(len(counts), 3, "it did change all the time")

    def test_a_copy_that_is_taken_without_care_is_torn_now_and_then(self):
        """Else the test above would show nothing."""
        table = self.create(self.capacity)
        self.writer(table)
        reader = self.attach(table)

        def careless():
            copy = master_server.Snapshot(self.capacity, reader._copy())
            return any(map(torn, copy.nodes))

        eventually(careless, 30)

    def test_the_number_is_odd_while_a_write_is_under_way_and_even_after_it(self):
        table = self.create()

        def number():
            return struct.unpack_from("=Q", table.buf, table.sequence_at)[0]

        before = number()
        with table:
            self.assertEqual(number() % 2, 1)
        self.assertEqual((number() % 2, number() > before), (0, True))
        for act in (
            lambda: table.write(0, "x", row(), 0.0, ""),
            lambda: table.clear(0),
            lambda: table.beat(1, 1),
            lambda: table.add_event("lost", "x", "n"),
        ):
            before = number()
            act()
            self.assertEqual((number() % 2, number() > before), (0, True))

    def test_a_write_that_never_ended_is_told_by_a_reader_and_ended_by_a_reset(self):
        table = self.create()
        table.write(0, "x", row(), 0.0, "")
        table.beat(1, 1)
        table.add_event("connected", "stays", "n")
        struct.pack_into("=Q", table.buf, table.sequence_at, 7)
        reader = self.attach(table)
        start = time.monotonic()
        with self.assertRaisesRegex(TableError, "never ended"):
            reader.snapshot()
        self.assertAlmostEqual(
            time.monotonic() - start, master_server.READ_SECONDS, delta=1.5
        )
        table.load()
        table.reset()
        snapshot = reader.snapshot()
        self.assertEqual(
            (snapshot.nodes, [event["text"] for event in snapshot.events]),
            ([], ["stays"]),
        )

    @support.slow("waits for limits")
    def test_who_cannot_have_the_lock_in_time_ends_with_its_own_exit_code(self):
        table = self.create()
        table.lock.acquire()
        for act in (table.snapshot, lambda: table.clear(0)):
            start = time.monotonic()
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                act()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            self.assertEqual(status >> 8, master_server.EXIT_LOCK)
            self.assertAlmostEqual(time.monotonic() - start, 2, delta=1.5)

    def test_nobody_waits_inside_the_lock(self):
        table, asked = self.create(), []
        lock = table.lock

        class Watched:
            release = lock.release

            def acquire(self, *args):
                asked.append(args)
                return lock.acquire(*args)

        lock.acquire()
        threading.Timer(0.2, lock.release).start()
        table.lock = Watched()
        table.clear(0)
        self.assertEqual(set(asked), {(False,)})
        self.assertGreater(len(asked), 2)

    def test_the_lock_is_free_again_after_an_error_inside_it(self):
        table = self.create()
        with self.assertRaises(ZeroDivisionError), table:
            1 / 0  # noqa: B018
        self.assertTrue(table.lock.acquire(False))
        table.lock.release()
        table.write(0, "x", row(), 0.0, "")
        table.beat(1, 1)
        self.assertEqual(len(self.attach(table).snapshot().nodes), 1)

    def test_snapshots_agree_with_what_was_written_for_random_tables(self):
        rng, table, expected = random.Random(SEED), self.create(16), {}
        reader = self.attach(table)
        table.beat(0, 16)
        for _ in range(400):
            index = rng.randrange(16)
            if rng.random() < 0.3:
                table.clear(index)
                expected.pop(index + 1, None)
            else:
                values = {
                    "cpu": rng.randrange(101),
                    "ram": rng.randrange(101),
                    "node": "n%d" % rng.randrange(9),
                }
                for m in rng.sample([m for m in DETAILS if m.code == "d"], 5):
                    values[m.key] = float(rng.randrange(1 << 20))
                table.write(index, "a", row(**values), 0.0, "")
                expected[index + 1] = values
            for each in (table, reader):
                found = {
                    node["slot"]: {
                        key: value
                        for key, value in node.items()
                        if key in KEYS and value is not None
                    }
                    for node in each.snapshot().nodes
                }
                self.assertEqual(found, expected)

    def test_of_a_row_that_is_as_it_was_the_dict_is_copied_and_only_its_age_is_new(
        self,
    ):
        table = self.create(8)
        table.beat(0, 8)
        for index in range(5):
            table.write(index, "a%d" % index, row(cpu=10.0 * index), 0.0, "")
        before = table.snapshot()
        self.assertEqual(len(before.nodes), 5)
        table.write(1, "a1", row(cpu=99.0), 0.0, "cpu>90")
        table.clear(2)
        table.write(6, "a6", row(cpu=66.0), 0.0, "")
        time.sleep(0.02)  # an age that can be seen
        after = table.snapshot()
        plain = [after.make_node(each) for each in after.rows()]
        after.before = before
        made = []
        real = master_server.Snapshot.make_node
        with unittest.mock.patch.object(
            master_server.Snapshot,
            "make_node",
            lambda view, each: made.append(each[0]) or real(view, each),
        ):
            self.assertEqual(after.nodes, plain)
        self.assertEqual(made, [2, 7])
        self.assertIsNone(after.before)  # else all snapshots would be kept
        self.assertIsNot(after.nodes[0], before.nodes[0])

    def test_jobs_and_verdicts_are_copied_as_far_as_there_are_some(self):
        table = self.create()
        self.assertEqual(table.snapshot().job_rows, b"")
        self.assertEqual(table.snapshot().verdict_rows, b"")
        fine = dict.fromkeys(("what", "proof", "cure", "rule"), "x")
        for number in range(3):
            table.write_job(self.job(number))
            table.write_job(self.job(number))
            table.write_verdicts(str(number), [dict(fine, severity="fine")])
        for view in (table.snapshot(), self.attach(table).snapshot()):
            self.assertEqual(len(view.job_rows), 3 * master_server.JOB.size)
            self.assertEqual(len(view.verdict_rows), 3 * master_server.VERDICT.size)
            self.assertEqual([job["job"] for job in view.jobs], ["0", "1", "2"])
            self.assertEqual(sorted(view.verdicts), ["0", "1", "2"])

    def test_a_job_that_has_ended_makes_room_only_when_there_is_no_other(self):
        with unittest.mock.patch.object(master_server, "JOBS", 4):
            table = self.create()
            for number in range(4):
                table.write_job(
                    self.job(number, "COMPLETED" if number < 2 else "RUNNING")
                )
            self.assertEqual(len(table.snapshot().jobs), 4)
            table.write_job(self.job(4))
            table.write_job(self.job(5))
            table.write_job(self.job(6))
            jobs = {job["job"] for job in table.snapshot().jobs}
            self.assertEqual(jobs, {"2", "3", "4", "5"})
            self.assertEqual(table.jobs_left_out, 1)

    def test_a_look_can_be_read_as_soon_as_it_is_written(self):
        table = self.create()
        rank = master_server.check_part({"part": "rank", "pid": 1})
        table.write_parts(0, [rank] * 3, [])
        self.assertEqual(len(table.snapshot().parts(1).ranks), 3)

    @staticmethod
    def job(number, state="RUNNING"):
        """A job as the table takes it."""
        facts = {"job": str(number), "raw": str(number), "state": state}
        return master_server.check_job(facts)


# ==========================================================================================
# Owners
# ==========================================================================================


class Owners(TableTest):
    """Only the creator removes a segment; a dead one's is replaced, a living one's respected."""

    def raw(self, name, content, uid=None, mode=0o600):
        path = "/dev/shm/" + name
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
        if uid is not None:
            os.chown(path, uid, uid)
        self.addCleanup(lambda: os.path.exists(path) and os.unlink(path))
        return path

    def header(self, table, **changes):
        """The table's bytes with another header."""
        raw = bytearray(table.buf)
        fields = dict(
            {
                "magic": b"SENTINEL",
                "layout": master_server.LAYOUT,
                "capacity": 8,
                "pid": os.getpid(),
                "start": master_server.start_time(os.getpid()),
            },
            **changes,
        )
        struct.pack_into("=8sIIqq", raw, table.header_at, *fields.values())
        return bytes(raw)

    def ended_pid(self):
        child = subprocess.Popen(["true"])
        child.wait()
        return child.pid

    def test_a_living_master_is_respected(self):
        table = self.create()
        table.write(0, "x", row(), 0.0, "")
        table.beat(1, 1)
        with self.assertRaisesRegex(TableError, "pid %d.*--shm-name" % os.getpid()):
            Table.create(table.shm.name, 8)
        self.assertEqual(len(self.attach(table).snapshot().nodes), 1)

    def test_what_a_killed_master_left_is_replaced_and_not_read(self):
        table = self.create()
        for what, changes in (
            ("no such process", {"pid": self.ended_pid()}),
            ("the pid is another process's now", {"start": 1}),
        ):
            with self.subTest(what):
                name = segment_name("left")
                self.raw(name, self.header(table, **changes))
                with self.assertRaisesRegex(TableError, "gone"):
                    Table.attach(name)
                again = self.create(4, name=name)
                self.assertEqual((again.capacity, again.pid), (4, os.getpid()))
                self.assertEqual(again.snapshot().nodes, [])
                again.unlink()

    def test_what_a_master_left_that_was_killed_while_it_made_its_segment_is_replaced(
        self,
    ):
        for size in (0, 65536):
            with self.subTest(size):
                name = segment_name("unmade%d" % size)
                self.raw(name, bytes(size))
                with self.assertRaises(TableError):
                    Table.attach(name)
                self.assertEqual(self.create(4, name=name).capacity, 4)

    def test_what_is_no_table_is_left_alone(self):
        for content in (b"x", b"somebody else's" * 9000, os.urandom(65536)):
            with self.subTest(len(content)):
                name = segment_name("other")
                path = self.raw(name, content)
                with self.assertRaisesRegex(TableError, "--shm-name"):
                    Table.create(name, 8)
                with self.assertRaises(TableError):
                    Table.attach(name)
                with open(path, "rb") as file:
                    self.assertEqual(file.read(), content)

    def test_a_header_that_lies_is_one_error(self):
        table = self.create()
        at = table.shm.size - 32  # COUNTS
        lies = {
            "layout": self.header(table, layout=99),
            "magic": self.header(table, magic=b"x"),
            "capacity": self.header(table, capacity=1 << 31),
            "a little more capacity": self.header(table, capacity=2000),
        }
        for what, counts in (
            ("used slots", (0, 0, 0.0, 1 << 40)),
            ("events", (1 << 60, 0, 0.0, 8)),
        ):
            raw = bytearray(self.header(table))
            struct.pack_into("=QQdQ", raw, at, *counts)
            lies[what] = bytes(raw)
        for what, content in lies.items():
            with self.subTest(what):
                name = segment_name("lies")
                self.raw(name, content)
                with contextlib.suppress(TableError):
                    reader = Table.attach(name)
                    self.addCleanup(self.close, reader)
                    snapshot = reader.snapshot()
                    self.assertLessEqual(len(snapshot.nodes), 8)
                    self.assertLessEqual(len(snapshot.events), EVENTS)
                done = support.run("test_reader.py", "--shm-name", name)
                self.assertNotIn("Traceback", done.stderr)

    @support.slow("another user")
    @requires("root")
    def test_a_segment_of_another_user_is_neither_read_nor_removed(self):
        table = self.create()
        table.write(0, "\x1b[2J", row(node="\x1b[2J"), 0.0, "")
        table.beat(1, 1)
        for what, content in (
            ("alive", self.header(table)),
            ("dead", self.header(table, pid=self.ended_pid())),
            ("unmade", bytes(65536)),
            ("empty", b""),
        ):
            with self.subTest(what):
                name = segment_name("foreign")
                path = self.raw(name, content, uid=65534, mode=0o666)
                with self.assertRaises(TableError):
                    Table.attach(name)
                with self.assertRaisesRegex(TableError, "--shm-name"):
                    Table.create(name, 8)
                done = support.run("test_reader.py", "--shm-name", name)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, r"\Aerror: [^\n]+\n\Z")
                self.assertTrue(os.path.exists(path))

    def test_a_reader_that_ends_in_any_way_leaves_the_segment(self):
        table = self.create()
        code = (
            "import sys, os, signal; sys.path.insert(0, %r); import master_server; "
            "table = master_server.Table.attach(%r); table.snapshot(); %%s"
            % (support.ROOT, table.shm.name)
        )
        for end in (
            "",
            "sys.exit(3)",
            "os._exit(1)",
            "os.kill(os.getpid(), 9)",
            "1 / 0",
            "os.kill(os.getpid(), 15)",
        ):
            with self.subTest(end):
                done = support.run("-W", "error", "-c", code % end)
                if end != "1 / 0":
                    self.assertEqual(done.stderr, "")
                self.assertNotIn("resource_tracker", done.stderr)
                self.assertTrue(os.path.exists("/dev/shm/" + table.shm.name))

    def test_a_table_with_other_metrics_is_not_read(self):
        with open(os.path.join(support.ROOT, "master_server.py")) as file:
            text = file.read()
        uptime = '    Metric("uptime", '
        more = '    Metric("more", "d", "", "More", "more", "A later metric"),\n'
        later = text.replace(uptime, more + uptime, 1)
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        attach = "import master_server; master_server.Table.attach(%r)"
        code = attach % self.create().shm.name
        for source, answer in ((text, ""), (later, "no master of this version")):
            with open(os.path.join(folder, "master_server.py"), "w") as file:
                file.write(source)
            done = support.run("-c", code, cwd=folder)
            self.assertRegex(done.stderr, answer or r"\A\Z")

    def test_a_forked_child_that_ends_leaves_the_segment(self):
        table = self.create()
        context = multiprocessing.get_context("fork")
        child = context.Process(target=table.snapshot)
        child.start()
        child.join()
        self.assertTrue(os.path.exists("/dev/shm/" + table.shm.name))
        table.unlink()
        self.assertFalse(os.path.exists("/dev/shm/" + table.shm.name))

    @requires("/dev/shm")
    def test_one_master_at_a_time_looks_for_the_owner_of_a_name(self):
        name = segment_name("claim")
        made = []
        thread = threading.Thread(target=lambda: made.append(Table.create(name, 4)))
        with unittest.mock.patch.object(
            master_server, "CLAIM_SECONDS", support.PATIENCE
        ):
            with master_server.one_at_a_time(master_server.FOLDER):
                thread.start()
                support.stays(lambda: not made, 0.3)
            thread.join()
        made[0].unlink()

    @requires("/dev/shm")
    def test_who_keeps_others_from_looking_delays_a_master_only(self):
        name = segment_name("kept")
        folder = master_server.FOLDER
        brief = unittest.mock.patch.object(master_server, "CLAIM_SECONDS", 0.05)
        with brief, master_server.one_at_a_time(folder):
            Table.create(name, 4).unlink()

    def test_many_masters_that_start_at_once_with_one_name_are_one_master(self):
        name = segment_name("race")
        tools = [
            support.start(
                "master_server.py",
                "--port",
                0,
                "--dashboard-port",
                0,
                "--shm-name",
                name,
            )
            for _ in range(4)
        ]
        for tool in tools:
            self.addCleanup(tool.stop)
        eventually(lambda: sum(tool.code is not None for tool in tools) == 3)
        (alive,) = [tool for tool in tools if tool.code is None]
        alive.logged("dashboard started")
        for tool in tools:
            if tool is not alive:
                self.assertEqual(tool.wait(), 1)
                self.assertRegex(tool.log, r"\Aerror: [^\n]*--shm-name[^\n]*\n\Z")
        self.assertEqual(
            support.get(alive.listening("dashboard"), "/healthz").status, 200
        )
        self.assertEqual(alive.stop(), 0)
        self.assertNotIn(name, support.shm_names())


if __name__ == "__main__":
    unittest.main()
