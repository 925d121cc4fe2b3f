"""Store and forward: what a master missed while it was away is sent, and put in its place."""

import contextlib
import math
import multiprocessing
import os
import pickle
import re
import socket
import sys
import tempfile
import time
import unittest
import unittest.mock

import beside
import support
import test_herd
from support import PlainAgent, eventually, start_master
from test_agent_link import DummyServer, start_agent

sys.path.insert(0, support.ROOT)
import agent
import master_server as master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

HURRY = (
    "agent.PAST_SECONDS = 1.0; agent.UNSAVED_SECONDS = 3.0; agent.MAX_BACKOFF_SECONDS = 0.5;"
    " agent.BACKOFF_SECONDS = 0.2; agent.MAX_FULL_SECONDS = 0.2"
)
FAST = "master_server.ROW_SECONDS = 1; master_server.LOOK_SECONDS = 0.2"
CUT_SECONDS = 5.0
JOB = {"SLURM_JOB_ID": "4711"}
NOW = 1700000000.0


def reading(number=0):
    return {"cpu": number % 100, "ram": 2.0, "node": "c1", "load1": 0.5}


class Store(unittest.TestCase):
    """What is kept, and what of it goes when."""

    def setUp(self):
        self.past = agent.Past()

    def fill(self, count, ok_at=-math.inf, step=agent.PAST_SECONDS):
        for number in range(count):
            self.past.note(reading(number), number * step, ok_at)

    def grant(self):
        self.past.resume(math.inf)
        self.past.hear(b"ok parts\nok\nok past\n")

    def ages(self, now):
        return [part["age"] for part in self.past.slice(now)]

    def test_one_reading_of_every_ten_seconds_is_kept(self):
        self.fill(101, step=2.0)
        self.assertEqual(
            [when for when, _ in self.past.recent], list(range(0, 201, 10))
        )

    def test_an_hour_is_kept_and_the_oldest_goes_first(self):
        self.fill(1000)
        self.grant()
        self.assertEqual(len(self.past.waiting), 361)
        self.assertEqual(self.ages(9990.0)[0], 3600.0)

    def test_the_bytes_are_bounded_and_counted(self):
        most = agent.MAX_PAST_BYTES
        agent.MAX_PAST_BYTES = 500
        self.addCleanup(setattr, agent, "MAX_PAST_BYTES", most)
        self.fill(50)
        self.past.resume(math.inf)
        self.fill(100)
        kept = self.past.waiting + self.past.recent
        self.assertEqual(self.past.size, sum(len(text) for _, text in kept))
        self.assertLessEqual(self.past.size, 500)
        self.assertGreater(self.past.size, 400)
        self.assertEqual(kept[-1][0], 990.0)

    def test_what_the_master_has_heard_is_forgotten_but_for_what_it_may_not_have_saved(
        self,
    ):
        self.fill(100)
        self.past.note(reading(), 1000.0, 999.0)
        self.assertEqual([when for when, _ in self.past.recent], [990.0, 1000.0])

    def test_the_oldest_go_first_and_at_most_fifty_a_second(self):
        self.fill(200)
        self.grant()
        sent = []
        for beat in range(40):
            now = 2000.0 + beat / 10
            sent.append(self.past.slice(now))
            self.past.hear(b"ok\nok past\n")
        for first in range(31):
            self.assertLessEqual(sum(map(len, sent[first : first + 10])), 50)
        ages = [part["age"] for parts in sent for part in parts]
        self.assertEqual(len(ages), 200)
        self.assertEqual(ages, sorted(ages, reverse=True))
        self.assertEqual(self.past.size, 0)

    def test_a_slice_that_was_not_taken_is_sent_again_and_none_is_sent_before(self):
        self.fill(60)
        self.assertEqual(self.past.slice(700.0), [])  # nobody has asked
        self.grant()
        first = self.past.slice(700.0)
        self.assertEqual((len(first), first[0]["age"]), (50, 700.0))
        self.assertEqual(self.past.slice(702.0), [])
        self.past.hear(b"full past\n")
        self.past.slice_at = 0.0
        again = self.past.slice(703.0)
        self.assertEqual((len(again), again[0]["age"]), (50, 703.0))
        self.grant()  # the connection broke meanwhile, and there is another
        self.assertEqual(self.ages(705.0)[0], 705.0)
        self.past.hear(b"ok past\n")
        self.assertEqual(len(self.ages(708.0)), 10)

    def test_what_is_on_its_way_may_become_too_old(self):
        self.fill(60)
        self.grant()
        self.past.slice(600.0)
        self.past.note(reading(), 3800.0, -math.inf)  # 20 are too old by now
        self.past.hear(b"ok past\n")
        self.assertEqual([when for when, _ in self.past.waiting][0], 500.0)

    def test_a_reading_has_all_that_a_record_holds(self):
        self.assertEqual(set(master.RECORDED), set(agent.PAST_KEYS))
        self.assertEqual(set(master.RECORDED), set(master.PAST_KEYS))


class OnTheWire(unittest.TestCase):
    """What an agent sends to a server that the test plays."""

    def serve(self, server, first):
        """Answer as a master does: `first` to the first sample of a connection."""

        def serve(sock):
            answer = first
            is_past = False
            with contextlib.suppress(EOFError, OSError), sock.makefile("rb") as stream:
                while True:
                    sent = pickle.load(stream)
                    server.samples.append((time.monotonic(), sent))
                    is_past = is_past or sent.get("part") == "past"
                    if sent.get("ack") and not server.is_silent:
                        sock.sendall(answer + b"ok past\n" * is_past)
                        answer = b"ok\n"
                        is_past = False

        server.is_silent = False
        server.serve = serve

    def after_a_cut(self, first, answer):
        """What an agent sends that was alone for a while before a server was there."""
        with DummyServer() as server:
            port = server.port
        tool = start_agent("--port", port, "--interval", "0.2", patch=HURRY)
        self.addCleanup(tool.stop)
        eventually(lambda: "cannot reach" in tool.log)
        time.sleep(2.5)  # agents take some readings meanwhile
        server = DummyServer(port, answer=answer)
        self.addCleanup(server.close)
        self.serve(server, first)
        return server

    def test_the_live_sample_comes_first_and_the_past_behind_it(self):
        server = self.after_a_cut(b"ok parts\nok\nok past\n", b"")
        eventually(lambda: [sent for sent in server.dicts if "age" in sent])
        before = len(server.dicts)
        eventually(lambda: len(server.dicts) > before + 5)
        sent = server.dicts
        self.assertTrue(sent[0].get("ack"))
        past = [part for part in sent if part.get("part") == "past"]
        ages = [part["age"] for part in past]
        self.assertGreater(ages[0], 2.0)
        self.assertEqual(ages, sorted(ages, reverse=True))
        self.assertTrue(all("cpu" in part and "node" not in part for part in past))

    def test_an_older_master_gets_nothing(self):
        server = self.after_a_cut(b"ok parts\nok\n", b"")
        eventually(lambda: len(server.dicts) > 10)
        self.assertFalse([sent for sent in server.dicts if "age" in sent])

    def test_what_was_sent_into_a_silence_is_sent_again(self):
        with DummyServer() as server:
            self.serve(server, b"ok parts\nok\nok past\n")
            patch = HURRY + "; agent.ANSWER_SECONDS = 3.0; agent.UNSAVED_SECONDS = 0.0"
            flags = ("--port", server.port, "--interval", "0.2")
            tool = start_agent(*flags, patch=patch)
            self.addCleanup(tool.stop)
            eventually(lambda: len(server.dicts) > 5)
            server.is_silent = True
            silent = time.monotonic()
            eventually(lambda: server.connections == 2)
            seconds = time.monotonic() - silent
            server.is_silent = False

            def past():
                return [part for part in server.samples if "age" in part[1]]

            eventually(lambda: past() and "age" not in server.dicts[-1])
            self.assertGreater(past()[0][0], silent)  # on the first there was none
            times = [when - part["age"] for when, part in past()]
            self.assertLess(times[0] - silent, 1.5)
            self.assertGreater(len(times), seconds - 1)
            self.assertLess(max(b - a for a, b in zip(times, times[1:])), 2.0)

    def test_the_word_of_one_connection_does_not_count_on_the_next(self):
        patch = unittest.mock.patch.object(agent, "log")
        patch.start()
        self.addCleanup(patch.stop)
        link = agent.Link([("127.0.0.1", 1)], b"", 2.0)
        for answer, count in ((b"ok\nok past\n", 1), (b"ok\n", 0)):
            ours, theirs = socket.socketpair()
            self.addCleanup(ours.close)
            self.addCleanup(theirs.close)
            ours.setblocking(False)
            link.past.note(reading(), time.monotonic() - 20, -math.inf)
            link.sock = ours
            link.heard = time.monotonic()
            theirs.sendall(answer)
            link.exchange()
            link.send_past(reading())
            self.assertEqual(link.past.sent, count)
            link.past.hear(b"full past\n")  # it may try again, it was told
            link.lose("lost", OSError("cut"))
            link.past.slice_at = 0.0
            self.assertEqual(link.past.slice(time.monotonic()), [])


class AtTheMaster(unittest.TestCase):
    """What a master takes, and what it does with it."""

    def master(self, *flags):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        tool = start_master("--record", folder.name, *flags, patch=FAST)
        self.addCleanup(tool.stop)
        return tool, folder.name

    def agent(self, tool, node="c1"):
        peer = PlainAgent(tool.port)
        self.addCleanup(peer.close)
        self.send(peer, node)
        return peer

    def send(self, peer, node="c1", cpu=50.0):
        peer.send(
            {
                "cpu": cpu,
                "ram": 2.0,
                "node": node,
                "job": "4711",
                "version": "1.0",
                "ack": True,
            }
        )

    def past(self, age, **more):
        return dict({"part": "past", "age": age, "cpu": 90.0, "ram": 3.0}, **more)

    def test_an_age_that_cannot_be_is_refused(self):
        tool, _ = self.master()
        for more in (
            {"age": 0},
            {"age": -1.0},
            {"age": 3700.5},
            {"age": 1e300},
            {"age": "9"},
            {"age": None},
            {"age": True},
            {"age": 9, "cpu": 101},
            {"age": 9, "ram": None},
        ):
            with self.subTest(more):
                peer = self.agent(tool, "h%r" % more["age"])
                peer.send(dict(self.past(1), **more))
                words = peer.read_to_end().splitlines()
                self.assertEqual(words[:3], ["ok parts", "ok", "ok past"])
                self.assertRegex(words[3], "^error (age|cpu|ram) must be a number")
        eventually(lambda: not support.nodes(tool.page))

    def test_there_is_a_most_of_readings_between_two_samples(self):
        tool, _ = self.master()
        peer = self.agent(tool)
        for number in range(master.PAST_SLICE + 1):
            peer.send(self.past(100.0 + number))
        self.assertIn("error more than 64 readings", peer.read_to_end())

    def test_the_past_is_recorded_in_its_place_and_what_is_live_stays(self):
        tool, folder = self.master()
        peer = self.agent(tool)
        for number in range(20):
            peer.send(self.past(230.0 - number * 10, job_mem=1e300, disk_read="x"))
        self.send(peer)
        said = [peer.read_line() for _ in range(5)]
        self.assertEqual(said, ["ok parts", "ok", "ok past", "ok", "ok past"])
        eventually(lambda: support.nodes(tool.page)[0]["cpu"] == 50.0)

        def rows():
            self.send(peer)
            record = master.read_record(folder, "4711")
            return record and [row for row in record.rows if row.values["cpu"][1] == 90]

        past = eventually(lambda: len(rows() or []) == 20 and rows())
        now = time.time()
        for number, row in enumerate(past):
            self.assertAlmostEqual(row.time, now - 230.0 + number * 10, delta=15)
        self.assertEqual(past[0].values["cpu"], [90.0] * 4)
        self.assertEqual(past[0].values["ram"], [3.0] * 4)
        self.assertNotIn("disk_read", past[0].values)

    def test_a_master_that_records_nothing_does_not_ask_for_it(self):
        with start_master() as tool:
            peer = self.agent(tool)
            self.send(peer)
            said = [peer.read_line() for _ in range(3)]
            self.assertEqual(said, ["ok parts", "ok", "ok"])
            peer.send(self.past(9))  # nor does it answer
            self.send(peer)
            self.send(peer)
            self.assertEqual([peer.read_line() for _ in range(2)], ["ok", "ok"])


class Ring(unittest.TestCase):
    """The region of the table between collector and recorder."""

    def setUp(self):
        name = "sentinel_past%d" % os.getpid()
        self.table = master.Table.create(name, 4)
        self.table.lock = multiprocessing.Lock()
        self.addCleanup(self.table.unlink)

    def readings(self, first, count):
        row = (1.0,) * len(master.PAST_KEYS)
        return [(float(number), row) for number in range(first, first + count)]

    def test_each_reading_is_taken_once_and_in_its_order(self):
        taken = []
        for first in range(0, 3 * master.PAST, 1000):  # some times around
            self.assertTrue(
                self.table.write_past("c1", "4711", self.readings(first, 1000))
            )
            taken += self.table.take_past()
        self.assertEqual([row[0] for row in taken], list(range(len(taken))))
        self.assertEqual(master.from_field(taken[0][1]), "c1")
        self.assertEqual(master.from_field(taken[0][2]), "4711")
        self.assertEqual(self.table.take_past(), [])

    def test_without_room_for_all_none_is_taken_and_nothing_is_overwritten(self):
        room = master.PAST
        self.assertTrue(self.table.write_past("c1", "1", self.readings(0, room - 10)))
        self.assertFalse(self.table.write_past("c1", "1", self.readings(5000, 11)))
        self.assertTrue(self.table.write_past("c1", "1", self.readings(6000, 10)))
        times = [row[0] for row in self.table.take_past()]
        self.assertEqual(times[0], 0.0)
        self.assertEqual(len(times), room)
        self.assertEqual(times[-1], 6009.0)
        self.assertTrue(self.table.write_past("c1", "1", self.readings(0, room)))


class InTheRecord(unittest.TestCase):
    """Where a late reading goes when a record is read."""

    def record(self, *late):
        """Two nodes, of which c2 is silent from 20 to 40, and nobody records to 80."""
        lines = [{"nodes": {"c1": {}, "c2": {}}}]
        for when, first, second in (
            (10, 10, 30),
            (20, 10, 30),
            (30, 10, None),
            (40, 10, None),
            (80, 10, 30),
        ):
            known = [value for value in (first, second) if value is not None]
            band = [min(known), sum(known) / len(known), max(known)]
            row = {"row": NOW + when, "step": 10, "cpu": band + [first, second]}
            row["load1"] = list(band)
            lines.append(row)
        lines += [
            {"late": NOW + when, "node": node, "cpu": cpu, "load1": cpu}
            for when, node, cpu in late
        ]
        return master.Record("1").add(lines).finish()

    def cpu(self, record):
        return {row.time - NOW: row.values["cpu"][3:] for row in record.rows}

    def test_it_fills_the_place_of_its_node_and_no_other(self):
        record = self.record((25, "c2", 50), (35, "c2", 60), (15, "c2", 99))
        cpu = self.cpu(record)
        self.assertEqual(cpu[30], [10, 50])
        self.assertEqual(cpu[40], [10, 60])
        self.assertEqual(cpu[20], [10, 30])  # it was known
        (row,) = [row for row in record.rows if row.time == NOW + 30]
        self.assertEqual(row.values["cpu"][:3], [10, 30, 50])
        self.assertEqual(row.values["load1"], [10, 30, 50])

    def test_where_there_is_no_row_it_makes_one_for_all_nodes(self):
        late = [(when, "c1", 20) for when in (51, 61)]
        late += [(when, "c2", 40) for when in (52, 62)]
        record = self.record(*late)
        cpu = self.cpu(record)
        self.assertEqual(sorted(cpu), [10, 20, 30, 40, 52, 62, 80])
        self.assertEqual(cpu[52], [20, 40])
        (row,) = [row for row in record.rows if row.time == NOW + 62]
        self.assertEqual(row.values["cpu"][:3], [20, 30, 40])
        self.assertEqual(row.values["load1"], [20, 30, 40])

    def test_it_stays_in_its_place_when_more_is_read_and_when_it_is_written_again(self):
        record = self.record((25, "c2", 50), (52, "c2", 40), (55, "c3", 70))
        cpu = self.cpu(record)
        self.assertEqual(cpu[55], [None, 40, 70])
        more = record.copy().add([{"late": NOW + 65, "node": "c1", "cpu": 5}]).finish()
        self.assertEqual(self.cpu(more), {**cpu, 65: [5]})
        again = master.parse_record("1", b"".join(record.lines()))
        for when, values in self.cpu(again).items():
            self.assertEqual(values[: len(cpu[when])], cpu[when])

    def test_a_late_line_that_is_none_is_left_out(self):
        lines = (
            {"late": "x", "node": "c1", "cpu": 1},
            {"late": NOW, "cpu": 1},
            {"late": NOW, "node": "c1", "cpu": None},
            {"late": NOW, "node": "c1", "ram": 5},
        )
        record = master.Record("1").add(lines).finish()
        self.assertEqual(record.rows, [])


class OnThePage(unittest.TestCase):
    """The curves of the live pages have what came late, too."""

    TICKS = 150  # five minutes of them

    def setUp(self):
        self.now = time.time()
        self.history = master.History()
        self.row = {"node": "c1", "address": "a", "job": "4711"}

    def live(self, ticks):
        """What the dashboard has seen live: readings of 10 %, at these ticks."""
        row = master.row_of_past(b"c1", b"4711", [10.0] * len(master.PAST_KEYS))
        for tick in ticks:
            self.history.tick = tick
            self.history.note(("c1", "4711"), master.PICK_GRAPHS(row), tick)

    def late(self, first, last, value=50.0):
        """What a node tells of the time between two ticks, one reading for five of them."""
        values = (value,) * len(master.PAST_KEYS)
        rows = []
        for tick in range(first, last + 1, master.FIFTH):
            when = self.now - (self.history.tick - tick) * master.TICK_SECONDS
            rows.append((when, b"c1", b"4711") + values)
        self.history.add_past(rows, self.now)

    def known(self, metric):
        ticks = 1 if metric in master.FINE_GRAPHS else master.FIFTH
        count = self.TICKS // ticks
        return self.history.series(self.row, metric, count, 1)

    def test_a_hole_is_filled_and_what_was_live_stays(self):
        self.live([*range(100), *range(130, 151)])  # away for a minute
        for metric in ("cpu", "job_mem"):
            self.assertTrue(any(map(math.isnan, self.known(metric))))
        self.late(90, 127)
        self.assertEqual(set(self.known("cpu")), {10.0, 50.0})
        self.assertEqual(self.known("cpu").count(50.0), 30)
        self.assertEqual(self.known("job_mem").count(50.0), 6)
        self.assertFalse(any(map(math.isnan, self.known("job_mem"))))

    def test_a_dashboard_that_began_after_the_cut_has_what_was_before(self):
        self.live([3])
        self.late(-60, 0)
        cpu = self.known("cpu")
        self.assertEqual(cpu.count(50.0), 65 + 2)  # and a short gap is bridged
        self.assertEqual(cpu[-1], 10.0)

    def test_a_node_that_no_look_has_found_yet_and_what_is_too_old(self):
        self.history.tick = 400
        self.late(-1000, 395)
        self.assertEqual(self.known("cpu").count(50.0), self.TICKS - master.FIFTH)
        self.live([401])
        self.assertEqual(self.known("cpu")[-1], 10.0)

    def test_a_page_after_a_cut_has_no_hole(self):
        with tempfile.TemporaryDirectory() as folder:
            patch = FAST + "; master_server.TICK_SECONDS = 0.2"
            with start_master("--record", folder, patch=patch) as tool:
                peer = PlainAgent(tool.port)
                self.addCleanup(peer.close)
                first = {"cpu": 10.0, "ram": 2.0, "node": "c1", "job": "4711"}
                first.update(version="1.0", ack=True)

                def values():
                    peer.send(first)
                    page = support.get(tool.page, "/node/c1").text
                    curve = re.search(
                        r'id="graph-cpu-[^>]*?data-values="([^"]*)"', page
                    )
                    return curve.group(1).split(" ") if curve else [""]

                eventually(lambda: values()[-1] == "10")
                for age in range(1, 21):  # 20 s, a hundred ticks
                    part = {"part": "past", "age": float(age), "cpu": 90.0, "ram": 3.0}
                    peer.send(part)
                eventually(lambda: values().count("90") >= 20)
                self.assertNotIn("", values())


class Whole(unittest.TestCase):
    """Real agents, and a master that is killed and started again on the same port."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        patch = unittest.mock.patch.object(master, "ROW_SECONDS", 1)  # as in FAST
        patch.start()
        self.addCleanup(patch.stop)

    def master(self, port=0):
        tool = start_master("--record", self.folder, "--port", port, patch=FAST)
        self.addCleanup(tool.stop)
        return tool

    def record(self, job="4711"):
        return master.read_record(self.folder, job) or master.Record(job)

    def kill_for_a_while(self, tool, job="4711"):
        """Kill the master, start another: the time of the record's last row before."""
        eventually(lambda: len(self.record(job).rows) >= 2)
        tool.kill()
        killed = time.time()
        last = self.record(job).rows[-1].time
        time.sleep(CUT_SECONDS)
        self.master(tool.port)
        eventually(lambda: self.record(job).rows[-1].time > killed + CUT_SECONDS + 1)
        return last

    def check_no_hole(self, after, interval, job="4711"):
        """No hole of more than two intervals, and what was told has been live or late."""

        def holes():
            times = [row.time for row in self.record(job).rows]
            pairs = zip(times, times[1:])
            return [pair for pair in pairs if pair[1] - pair[0] > 2.1 * interval]

        eventually(lambda: not holes(), what="no hole")
        late = [row for row in self.record(job).rows if row.time > after]
        self.assertGreater(len(late), CUT_SECONDS / interval - 1)
        for row in late:
            self.assertLessEqual(row.values["cpu"][1], 100)

    def test_the_master_is_killed_and_the_record_has_no_hole(self):
        tool = self.master()
        flags = ("--port", tool.port, "--interval", "0.2", "--name", "c1")
        old = sorted(support.pythons())[0]
        # a clock that is a day behind, and the oldest Python
        clock = "; import time; real = time.time; time.time = lambda: real() - 86400"
        python = support.pythons()[old]
        node = start_agent(*flags, patch=HURRY + clock, env=JOB, python=python)
        self.addCleanup(node.stop)
        last = self.kill_for_a_while(tool)
        self.check_no_hole(last, 1.0)
        self.assertEqual(list(self.record().nodes), ["c1"])

    @support.slow("it waits for a herd and its agents")
    def test_a_relay_keeps_what_its_agents_say_for_the_next_master(self):
        seconds = {"PAST_SECONDS": 1.0, "UNSAVED_SECONDS": 3.0, "BACKOFF_SECONDS": 0.2}
        slurm = test_herd.Slurm(self, ATTACH_SECONDS=20.0, **seconds)
        slurm.write("queue", test_herd.row())
        slurm.write("job.7", test_herd.details())
        tool = self.master()
        watcher = slurm.watch(tool)
        self.addCleanup(watcher.stop)
        last = self.kill_for_a_while(tool, "7")
        self.check_no_hole(last, 2.0, "7")  # what the herd's agents have as interval


if __name__ == "__main__":
    unittest.main()
