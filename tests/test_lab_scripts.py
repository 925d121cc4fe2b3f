"""utils/dummy_task.py without a cluster; the job scripts themselves are tested in test_lab.py."""

import os
import socket
import unittest

import support

TASK = os.path.join("utils", "dummy_task.py")


class DummyTask(unittest.TestCase):
    def test_it_says_where_it_runs_counts_and_is_done(self):
        done = support.run(TASK, "1", env={"SLURM_JOB_ID": "42"}, cwd=support.ROOT)
        self.assertEqual(done.returncode, 0, done.stderr)
        for line in (
            "node    " + socket.gethostname(),
            "job     42",
            "folder  " + support.ROOT,
            "1 of 1 seconds",
            "done",
        ):
            self.assertIn(line, done.stdout.splitlines())
        self.assertEqual(done.stderr, "this line went to stderr\n")

    def test_without_slurm_it_says_so(self):
        self.assertIn(
            "job     none: not started by Slurm", support.run(TASK, "0").stdout
        )

    def test_a_mistake_is_one_line_and_exit_2(self):
        for words in (["soon"], ["-1"], ["99999"], [""]):
            with self.subTest(words):
                done = support.run(TASK, *words)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertRegex(done.stderr, r"^error: .*0 to 9999.*\n$")


if __name__ == "__main__":
    unittest.main()
