"""The name of the shared memory vanishes under a running master: RemoveIPC=yes, logind.conf(5)."""

import os
import signal
import unittest

import support
from support import PlainAgent, eventually, nodes, start_master

SHORT = "master_server.NAME_SECONDS = 0.5"


class Vanished(unittest.TestCase):
    def begin(self, **more):
        master = start_master("--timeout", 60, **more)
        self.addCleanup(master.stop)
        self.name = "sentinel_%d" % master.port
        self.path = "/dev/shm/" + self.name
        return master

    def read(self, master):
        return support.run("test_reader.py", "--port", master.port)

    def role(self, master, name):
        return int(master.logged(r"(?s).*%s started, pid (\d+)" % name).group(1))

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
                events = support.events(master.page)
                self.assertTrue(any(event["node"] == "back" for event in events))
                self.assertEqual(master.stop(), 0)
                self.assertFalse(os.path.exists(self.path))
                self.assertNotIn("Traceback", master.log)

    def test_a_reader_that_watches_goes_on(self):
        master = self.begin(patch=SHORT)
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
        master = self.begin(patch=SHORT)
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


if __name__ == "__main__":
    unittest.main()
