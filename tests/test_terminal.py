"""The terminal goes away, or stops the master for a while: that is an ordinary end, or none."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import termios
import unittest

import beside
import support
from support import PlainAgent, eventually, nodes, start_master

load_tests = beside.load_tests  # in a process of its own: it mostly waits


def open_terminal():
    """(our end, their end, a preexec_fn that makes their end the terminal of a session)."""
    ours, theirs = os.openpty()

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    return ours, theirs, take_terminal


def port_in(text, role):
    """The port on which a role listens, by the log."""
    return int(re.search(role + r" listening on \S+:(\d+)", text).group(1))


class Gone(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.log = os.path.join(self.folder, "log")

    def text(self):
        if not os.path.exists(self.log):
            return ""
        with open(self.log) as file:
            return file.read()

    def command(self):
        path = os.path.join(support.ROOT, "master_server.py")
        flags = ["--port", "0", "--dashboard-port", "0", "--with-agent"]
        return [support.PYTHON, path] + flags

    def kill(self, pids):
        """End what still runs, when a test has failed."""
        for pid in filter(support.alive, pids):
            os.kill(pid, signal.SIGKILL)

    def family(self, master):
        """The pids of a master and all that it has started; their shared memory is noted."""
        self.shared = support.shm_of(master)
        self.assertTrue(any(name.startswith("sentinel_") for name in self.shared))
        return [master] + support.descendants(master)

    def assertEnded(self, pids):
        """All processes have ended, and their shared memory is gone."""
        eventually(lambda: not any(map(support.alive, pids)), 10)
        eventually(lambda: not self.shared & support.shm_names())

    def test_a_closed_terminal_ends_the_master_in_order(self):
        for where in ("file", "terminal"):
            with self.subTest("log on a " + where):
                ours, theirs, take_terminal = open_terminal()
                with open(self.log, "w") as log:
                    master = support.Tool(
                        self.command(),
                        dict(os.environ),
                        stdin=theirs,
                        stdout=theirs,
                        stderr=log if where == "file" else theirs,
                        preexec_fn=take_terminal,
                    )
                self.addCleanup(master.kill)
                os.close(theirs)
                if where == "file":
                    eventually(lambda: "connected" in self.text())
                else:
                    said = b""
                    while b"connected" not in said:
                        said += os.read(ours, 65536)
                family = self.family(master.pid)
                self.assertGreaterEqual(len(family), 4)
                os.close(ours)
                self.assertEqual(master.wait(15), 0)
                self.assertEnded(family)
                if where == "file":
                    self.assertRegex(self.text(), r"goodbye: SIG(HUP|TERM)")
                    self.assertRegex(self.text(), r"stopped\n\Z")
                    self.assertNotIn("Traceback", self.text())

    def test_sighup_ends_it_unless_it_was_ignored_at_the_start(self):
        with start_master() as master:
            family = self.family(master.pid)
            master.send_signal(signal.SIGHUP, group=True)
            self.assertEqual(master.wait(), 0)
            self.assertRegex(master.log, r"stopped\n\Z")
            self.assertEnded(family)

        def ignore():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        with start_master(preexec_fn=ignore) as master:
            family = self.family(master.pid)
            master.send_signal(signal.SIGHUP, group=True)
            with PlainAgent(master.port) as agent:
                agent.send({"cpu": 1.0, "ram": 1.0})
                eventually(lambda: nodes(master.page))
            self.assertTrue(all(map(support.alive, family)))
            self.assertEqual(master.stop(), 0)

    def test_a_master_that_was_stopped_and_goes_on_serves_again(self):
        with start_master("--with-agent") as master:
            eventually(lambda: nodes(master.page))
            master.send_signal(
                signal.SIGSTOP, group=True
            )  # as Ctrl-Z, which nobody may ignore
            pids = [master.pid] + support.descendants(master.pid)
            eventually(lambda: all(support._stat(pid)[0] == "T" for pid in pids))
            master.send_signal(signal.SIGCONT, group=True)  # as fg, and as bg
            eventually(lambda: nodes(master.page))
            self.assertEqual(master.stop(), 0)
            self.assertNotIn("Traceback", master.log)

    @support.requires("bash")
    def test_ctrl_z_fg_and_bg_of_a_shell_stop_it_and_let_it_go_on(self):
        ours, theirs, take_terminal = open_terminal()
        self.addCleanup(os.close, ours)
        shell = support.Tool(
            ["bash", "--norc", "--noprofile", "-i"],
            dict(os.environ, PS1="", HISTFILE=""),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_terminal,
        )
        self.addCleanup(shell.kill)
        os.close(theirs)

        def press(keys):
            os.write(ours, keys.encode())

        def state():
            return {support._stat(pid)[0] for pid in family}

        line = " ".join(self.command() + ["--timeout", "60", "2>", self.log])
        press(line + "\n")
        eventually(lambda: "connected" in self.text())
        family = self.family(support.descendants(shell.pid)[0])
        self.addCleanup(self.kill, family)
        page = port_in(self.text(), "dashboard")
        port = port_in(self.text(), "collector")
        with PlainAgent(port) as agent:
            for cpu, command in ((1.0, "fg\n"), (2.0, "bg\n")):
                press("\x1a")
                eventually(lambda: state() == {"T"})
                agent.send({"cpu": cpu, "ram": 1.0, "node": "plain"})
                press(command)
                eventually(lambda cpu=cpu: support.row_of(page, node="plain", cpu=cpu))
                eventually(lambda: len(nodes(page)) == 2)  # its own agent, too
            press("fg\n")
            eventually(lambda: os.tcgetpgrp(ours) in family)
            press("\x03")
            eventually(lambda: "stopped\n" in self.text())
        self.assertEnded(family)
        self.assertNotIn("Traceback", self.text())

    def test_a_log_that_nobody_reads_any_more_stops_nothing(self):
        ours, theirs = os.pipe()
        master = support.Tool(self.command(), dict(os.environ), stderr=theirs)
        self.addCleanup(master.kill)
        os.close(theirs)
        said = b""
        while b"connected" not in said:
            said += os.read(ours, 65536)
        os.close(ours)  # what is logged from now on is an EPIPE
        text = said.decode()
        page = port_in(text, "dashboard")
        for role in ("collector", "dashboard"):
            pid = int(re.search(role + r" started, pid (\d+)", text).group(1))
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not support.alive(pid))
            eventually(lambda: nodes(page))
        family = self.family(master.pid)
        master.send_signal(signal.SIGHUP)
        self.assertEqual(master.wait(), 0)
        self.assertEnded(family)

    @support.requires("nohup")
    def test_under_nohup_the_end_of_the_terminal_is_none_of_its(self):
        ours, theirs, take_terminal = open_terminal()
        with open(self.log, "w") as log:
            master = support.Tool(
                ["nohup"] + self.command(),
                dict(os.environ),
                stdin=theirs,
                stderr=log,
                preexec_fn=take_terminal,
            )
        self.addCleanup(master.kill)
        os.close(theirs)
        eventually(lambda: "connected" in self.text())
        family = self.family(master.pid)
        page = port_in(self.text(), "dashboard")
        os.close(ours)
        support.stays(lambda: nodes(page) and all(map(support.alive, family)), 1)
        master.send_signal(signal.SIGTERM)
        self.assertEqual(master.wait(), 0)
        self.assertEnded(family)

    @support.requires("tmux")
    def test_a_tmux_session_that_is_killed_ends_it(self):
        socket = os.path.join(self.folder, "tmux")
        line = "exec %s 2>%s" % (" ".join(self.command()), self.log)
        tmux = ["tmux", "-S", socket]
        subprocess.check_call(tmux + ["new-session", "-d", line])
        try:
            eventually(lambda: "connected" in self.text())
            role = int(re.search(r"collector started, pid (\d+)", self.text()).group(1))
            _, master = support._stat(role)
            family = self.family(master)
        finally:
            subprocess.check_call(tmux + ["kill-session"])
        eventually(lambda: "stopped" in self.text())
        self.assertEnded(family)


if __name__ == "__main__":
    unittest.main()
