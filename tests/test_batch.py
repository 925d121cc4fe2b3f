"""Samples that are gathered for a moment while many come: in order, and nothing of it is lost."""

import pickle
import socket
import time
import unittest
import unittest.mock

import beside
from support import MasterTest, PlainAgent, eventually, row_of

import master_server
from master_server import Batch, Pinning

load_tests = beside.load_tests  # in a process of its own: it mostly waits


class Peer:
    """What a batch needs of a peer."""

    def __init__(self, name):
        self.address = name
        self.gathered = self.taken = 0
        self.sock, self.other_end = socket.socketpair()
        self.sock.settimeout(5)
        self.other_end.settimeout(5)

    def say(self, line):
        self.sock.send(line)

    def close(self):
        self.sock.close()
        self.other_end.close()


class Batches(unittest.TestCase):
    """One by one, and gathered."""

    def setUp(self):
        self.taken = []
        self.batch = Batch(lambda *sample: self.taken.append(sample), Pinning())
        self.a, self.b = self.peer("a"), self.peer("b")

    def peer(self, name):
        peer = Peer(name)
        self.addCleanup(peer.close)
        return peer

    def rows(self):
        return [row for _, row in self.taken]

    def test_as_long_as_few_come_each_is_taken_at_once(self):
        self.batch.add(self.a, 1)
        self.batch.add(self.b, 2)
        self.assertEqual(self.taken, [(self.a, 1), (self.b, 2)])
        self.assertFalse(self.batch.came.is_set())

    def test_gathered_ones_wait_and_are_taken_in_their_order(self):
        self.batch.gathers = True
        for number in range(5):
            self.batch.add((self.a, self.b)[number % 2], number)
        self.assertEqual(self.taken, [])
        self.assertTrue(self.batch.came.is_set())
        self.batch.finish(self.b)
        self.assertEqual(self.rows(), [0, 1, 2, 3, 4])
        self.assertFalse(self.batch.lock.locked())

    def test_one_that_comes_when_they_are_not_gathered_any_more_overtakes_none(self):
        self.batch.gathers = True
        self.batch.add(self.a, 1)
        self.batch.add(self.a, 2)
        self.batch.gathers = False
        self.batch.add(self.a, 3)
        self.batch.add(self.b, 4)  # of which none waits
        self.assertEqual(self.rows(), [4])
        self.batch.finish(self.a)
        self.assertEqual(self.rows(), [4, 1, 2, 3])
        self.batch.add(self.a, 5)
        self.assertEqual(self.rows(), [4, 1, 2, 3, 5])

    def test_who_has_none_that_wait_ends_without_the_others(self):
        self.batch.gathers = True
        self.batch.add(self.a, 1)
        self.batch.finish(self.b)
        self.assertEqual(self.taken, [])

    def test_no_more_than_some_hundred_wait(self):
        self.batch.gathers = True
        for number in range(master_server.GATHER_MOST - 1):
            self.batch.add(self.a, number)
        self.assertEqual(self.taken, [])
        with self.batch.lock:  # somebody takes them just now
            self.batch.add(self.a, -1)
            self.assertEqual(self.taken, [])
        self.batch.add(self.b, -2)
        self.assertEqual(len(self.taken), master_server.GATHER_MOST + 1)
        self.assertFalse(self.batch.lock.locked())

    def test_one_that_comes_just_when_they_are_taken_is_not_left_over(self):
        self.batch.gathers = True
        clear = self.batch.came.clear

        def clear_late():
            if len(self.taken) < 2:
                self.batch.add(self.b, 2)
            clear()

        self.batch.came.clear = clear_late
        self.assertTrue(self.batch.has_thread())
        self.batch.add(self.a, 1)
        eventually(lambda: self.rows() == [1, 2], 5, "both are taken")

    def look(self, count):
        """Whether they are gathered when so many come in a second."""
        self.batch.looked = time.monotonic() - 1.0
        self.batch.look(self.batch.samples + count)
        return self.batch.gathers

    def test_without_a_thread_for_them_none_are_gathered(self):
        refused = RuntimeError("can't start new thread")
        with unittest.mock.patch("threading.Thread.start", side_effect=refused):
            self.assertFalse(self.look(1000))
        self.assertTrue(self.look(1000))

    def test_they_are_gathered_from_so_many_a_second_on_and_until_there_are_very_many(
        self,
    ):
        for count, expected in ((45, False), (60, True), (1900, True), (2100, False)):
            with self.subTest(count=count):
                self.assertEqual(self.look(count), expected)
        self.assertTrue(self.look(60))
        self.batch.look(self.batch.samples)  # too soon to tell
        self.assertTrue(self.batch.gathers)

    def test_a_defect_ends_the_connection_that_met_it_and_no_other(self):
        def take(peer, row):
            if peer is self.a:
                raise ZeroDivisionError
            self.taken.append((peer, row))

        self.batch = Batch(take, Pinning())
        self.batch.gathers = True
        for peer, row in ((self.b, 1), (self.a, 2), (self.b, 3)):
            self.batch.add(peer, row)
        with self.assertLogs("sentinel", "ERROR") as log:
            self.batch.finish(self.a)
        self.assertIn("taking from a", log.output[0])
        self.assertEqual(self.rows(), [1, 3])
        self.assertEqual(self.a.taken, 1)
        self.assertEqual(self.a.other_end.recv(100), b"error a defect of the master\n")
        self.assertEqual(self.a.sock.recv(100), b"")  # what its thread sees
        self.b.sock.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.b.sock.recv(100)


class Gathering(MasterTest):
    """A real master that gathers all samples, from its second second on."""

    flags = ("--timeout", "3")
    patch = "master_server.GATHER_FROM, master_server.GATHER_SECONDS = 0.0, 0.5"

    @staticmethod
    def sample(name, cpu):
        return pickle.dumps(
            {"node": name, "cpu": cpu, "ram": 20.5, "ack": True}, protocol=4
        )

    def answer_time(self, agent, name):
        """Seconds until a sample is answered."""
        begun = time.monotonic()
        agent.send_bytes(self.sample(name, 10.5))
        self.assertEqual(agent.read_answer(), "ok")
        return time.monotonic() - begun

    def gather(self, agent, name):
        """Send until the master gathers: an answer takes its time then."""
        agent.send_bytes(self.sample(name, 10.5))
        self.assertEqual(agent.read_answer(), "ok")
        eventually(lambda: self.answer_time(agent, name) > 0.3, 30, "gathers")

    def test_the_last_sample_before_the_end_is_in_the_table_and_no_row_is_left(self):
        with PlainAgent(self.master.port) as agent:
            self.gather(agent, "ends")
            agent.send_bytes(self.sample("ends", 33.5))
            agent.send_bytes(pickle.dumps({"bye": "done"}, protocol=4))
            self.assertEqual(agent.read_answer(), "ok")
            agent.read_to_end()
        self.event("finished", "ends")
        time.sleep(0.6)  # by then, what was gathered would have been taken
        self.assertIsNone(row_of(self.master.page, node="ends"))

    def test_who_closes_at_once_leaves_no_row(self):
        with PlainAgent(self.master.port) as agent:
            self.gather(agent, "closes")
            agent.send_bytes(self.sample("closes", 33.5))
        self.gone(node="closes")
        time.sleep(0.6)
        self.assertIsNone(row_of(self.master.page, node="closes"))

    def test_a_sample_of_another_shape_comes_behind_those_that_wait(self):
        with PlainAgent(self.master.port) as agent:
            self.gather(agent, "changes")
            agent.send_bytes(self.sample("changes", 33.5))
            other = {"node": "changes", "cpu": 44.5, "ram": 20.5, "load1": 1.5}
            time.sleep(0.05)
            agent.send_bytes(pickle.dumps(dict(other, ack=True), protocol=4))
            self.assertEqual([agent.read_answer() for _ in range(2)], ["ok", "ok"])
            row = self.row(node="changes", load1=1.5)
            self.assertEqual(row["cpu"], 44.5)
            time.sleep(0.6)
            self.assertEqual(self.row(node="changes")["cpu"], 44.5)


if __name__ == "__main__":
    unittest.main()
