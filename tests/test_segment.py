"""The name of the shared memory vanishes under a running master: RemoveIPC=yes, logind.conf(5)."""

import errno
import os
import signal
import time
import unittest
from unittest import mock

import beside
import support
from support import PlainAgent, eventually, nodes, requires, start_master
from test_table import TableTest, row

import master_server
from master_server import TableError

load_tests = beside.load_tests  # in a process of its own: it mostly waits

# The fast run does not wait for the real ones; what takes long has them.
SHORT = {} if support.LONG else {"NAME_SECONDS": 0.3, "MAX_BACKOFF": 0.5}


class Vanished(unittest.TestCase):
    def begin(self, **more):
        master = start_master("--timeout", 60, constants=SHORT, **more)
        self.addCleanup(master.stop)
        self.name = "sentinel_%d" % master.port
        self.path = "/dev/shm/" + self.name
        return master

    def read(self, master):
        return support.run("test_reader.py", "--port", master.port)

    def role(self, master, name):
        return int(master.logged(r"(?s).*%s started, pid (\d+)" % name).group(1))

    def test_the_name_is_looked_for_often_enough_to_be_there_again_within_ten_seconds(
        self,
    ):
        self.assertLessEqual(master_server.NAME_SECONDS, 8)

    def test_a_process_that_ends_puts_the_look_at_the_name_off_by_nothing(self):
        supervisor = object.__new__(master_server.Supervisor)
        passed = 0.75 * master_server.NAME_SECONDS
        vars(supervisor).update(names=[], running={}, delay={}, wakeup=0)
        supervisor.looked = time.monotonic() - passed
        with mock.patch("multiprocessing.connection.wait") as wait:
            supervisor.wait()
        seconds = wait.call_args[0][1]
        self.assertLessEqual(0, seconds)
        self.assertLessEqual(seconds, master_server.NAME_SECONDS - passed)

    def test_the_name_is_made_again_and_no_agent_notices(self):
        master = self.begin()
        with PlainAgent(master.port) as agent:
            agent.send({"cpu": 15.5, "ram": 40.2, "node": "c1"})
            eventually(lambda: nodes(master.page))
            for cpu in (25.0, 35.0):  # twice
                inode = os.stat(self.path).st_ino
                os.unlink(self.path)
                eventually(lambda: os.stat(self.path).st_ino != inode, 10)  # noqa: B023
                done = eventually(lambda: self.read(master), 10)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                agent.send({"cpu": cpu, "ram": 40.2, "node": "c1"})
                eventually(lambda: "%.1f %%" % cpu in self.read(master).stdout)  # noqa: B023
                eventually(lambda: nodes(master.page)[0]["cpu"] == cpu)  # noqa: B023
        kinds = [event["kind"] for event in support.events(master.page)]
        self.assertEqual(kinds.count("connected"), 1)
        self.assertNotIn("lost", kinds)
        self.assertEqual(master.log.count("was gone: made again"), 2)
        self.assertEqual(master.stop(), 0)
        self.assertFalse(os.path.exists(self.path))

    def test_a_role_that_is_killed_without_a_name_comes_back_with_the_same_table(self):
        for method in ("fork", "spawn", "forkserver"):
            with self.subTest(method):
                master = self.begin(method=method)
                for name in ("dashboard", "collector"):
                    os.unlink(self.path)
                    os.kill(self.role(master, name), signal.SIGKILL)
                    master.logged("(?s)%s ended.*%s started" % (name, name))

                    def takes_a_sample(master=master):
                        with PlainAgent(master.port) as agent:
                            agent.send({"cpu": 1.0, "ram": 2.0, "node": "back"})
                            return eventually(lambda: nodes(master.page), 3)

                    eventually(takes_a_sample)
                    eventually(lambda: os.path.exists(self.path), 10)
                eventually(
                    lambda master=master: any(
                        event["node"] == "back" for event in support.events(master.page)
                    )
                )
                self.assertEqual(master.stop(), 0)
                self.assertFalse(os.path.exists(self.path))
                self.assertNotIn("Traceback", master.log)

    def test_a_reader_that_watches_goes_on(self):
        master = self.begin()
        with PlainAgent(master.port) as agent:
            agent.send({"cpu": 15.5, "ram": 40.2, "node": "c1"})
            eventually(lambda: nodes(master.page))
            with support.start(
                "test_reader.py", "--watch", "--port", master.port
            ) as reader:
                eventually(lambda: "15.5 %" in reader.out)
                os.unlink(self.path)
                eventually(lambda: os.path.exists(self.path), 10)

                def shows_the_new():
                    agent.send({"cpu": 77.5, "ram": 40.2, "node": "c1"})
                    return "77.5 %" in reader.out

                eventually(shows_the_new)

    def test_a_name_that_somebody_else_has_taken_is_left_alone_and_told_once(self):
        master = self.begin()
        os.unlink(self.path)
        with open(self.path, "wb") as file:
            file.write(b"mine")
        self.addCleanup(lambda: os.path.exists(self.path) and os.unlink(self.path))
        master.logged("is gone and cannot be made again: File exists")
        with PlainAgent(master.port) as agent:
            agent.send({"cpu": 15.5, "ram": 40.2})
            eventually(lambda: nodes(master.page))
        self.assertEqual(master.stop(), 0)
        self.assertEqual(master.log.count("cannot be made again"), 1)
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), b"mine")


class Moving(TableTest):
    """A table that goes to another segment, in this process."""

    def moved(self):
        """(the supervisor's table, one that was attached before it was moved)."""
        table = self.create()
        table.write(0, "x", row(node="c1"), 0.0, "")
        table.beat(1, 1)
        follower = self.attach(table)
        os.unlink("/dev/shm/" + table.shm.name)
        self.assertFalse(table.has_name())
        self.assertTrue(table.renew(table.lock))
        self.assertTrue(table.has_name())
        return table, follower

    def test_who_has_the_old_segment_finds_the_new_one(self):
        table, follower = self.moved()
        table.write(0, "x", row(node="c2"), 0.0, "")
        for reader in (follower, self.attach(table)):
            self.assertEqual(reader.snapshot().nodes[0]["node"], "c2")

    def test_a_writer_writes_what_it_has_into_the_new_segment(self):
        table, writer = self.moved()
        writer.lock = table.lock
        writer.write(0, "x", row(node="c3"), 0.0, "")
        job = tuple(5.0 if code == "d" else b"7" for _, code in master_server.JOB_FACTS)
        writer.write_job(job)
        snapshot = self.attach(table).snapshot()
        self.assertEqual(snapshot.nodes[0]["node"], "c3")
        self.assertEqual(snapshot.jobs[0]["job"], "7")

    def test_without_room_for_the_new_segment_the_old_one_is_kept(self):
        table = self.create()
        table.write(0, "x", row(node="c1"), 0.0, "")
        table.beat(1, 1)
        os.unlink("/dev/shm/" + table.shm.name)
        full = OSError(errno.ENOSPC, "No space left on device")
        no_room = mock.patch("os.posix_fallocate", side_effect=full)
        with no_room, self.assertRaisesRegex(TableError, "No space left"):
            table.renew(table.lock)
        self.assertFalse(os.path.exists("/dev/shm/" + table.shm.name))
        self.assertEqual(table.snapshot().nodes[0]["node"], "c1")

    def test_a_name_that_is_another_table_by_now_is_not_followed(self):
        table, follower = self.moved()
        path = "/dev/shm/" + table.shm.name
        for what, content in (
            ("another layout", bytes(table.shm.size)),
            ("another size", bytes(4096)),
            ("empty", b""),
        ):
            with self.subTest(what):
                os.unlink(path)
                with open(path, "wb") as file:
                    file.write(content)
                with self.assertRaisesRegex(TableError, "another table|not to be"):
                    follower.snapshot()
        os.unlink(path)
        with self.assertRaisesRegex(TableError, "not to be found"):
            follower.snapshot()

    @requires("root")
    def test_another_users_segment_of_that_name_is_not_followed(self):
        table, follower = self.moved()
        path = "/dev/shm/" + table.shm.name
        with open(path, "rb") as file:
            content = file.read()
        os.unlink(path)
        with open(path, "wb") as file:
            file.write(content)
        os.chown(path, 65534, 65534)
        self.addCleanup(os.unlink, path)
        with self.assertRaisesRegex(TableError, "another user's"):
            follower.snapshot()

    def test_a_lock_that_is_stuck_leaves_no_new_segment_behind(self):
        table = self.create()
        os.unlink("/dev/shm/" + table.shm.name)
        table.lock.acquire()
        with mock.patch("master_server.LOCK_SECONDS", 0.05):
            self.assertFalse(table.renew(table.lock))
        self.assertFalse(table.has_name())


if __name__ == "__main__":
    unittest.main()
