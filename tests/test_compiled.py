"""compiled.py: a tool that starts from ready bytecode sees what it would see without it."""

import json
import os
import sys
import tempfile
import unittest

import beside
import support

load_tests = beside.load_tests  # in a process of its own: it mostly waits

# what a program can tell of how it was started, and its line numbers
PROGRAM = """
import json, os, sys
def where():
    return sys._getframe().f_lineno
import __main__
print(json.dumps([__name__, __file__, sys.argv, sys.path, where(), __main__.where is where,
    where.__code__.co_filename, sorted(set(globals()) - {"__annotations__", "__cached__"})]))
sys.exit(7)
"""
COMPILED = os.path.join(support.ROOT, "tests", "compiled.py")


class Compiled(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.kept = os.path.join(scratch.name, "kept")
        os.mkdir(self.kept)
        self.path = os.path.join(scratch.name, "agent.py")
        self.write(PROGRAM)

    def write(self, text):
        with open(self.path, "w") as file:
            file.write(text)

    def run_compiled(self, *words, python=None):
        return support.run(COMPILED, self.kept, *words, python=python)

    def test_a_program_sees_what_it_sees_as_a_person_starts_it(self):
        plain = support.run(self.path, "--flag", "a b", "")
        for _ in range(2):  # compiled, then from the folder
            done = self.run_compiled(self.path, "--flag", "a b", "")
            self.assertEqual(done.returncode, 7)
            self.assertEqual(done.stderr, "")
            self.assertEqual(json.loads(done.stdout), json.loads(plain.stdout))
        self.assertEqual(len(os.listdir(self.kept)), 1)

    def test_a_changed_file_is_compiled_again(self):
        self.run_compiled(self.path)
        self.write("print('changed')")
        self.assertEqual(self.run_compiled(self.path).stdout, "changed\n")

    def test_each_version_of_python_has_its_own(self):
        versions = support.pythons()
        for version in {min(versions), max(versions)}:
            done = self.run_compiled(self.path, python=versions[version])
            self.assertEqual((done.returncode, done.stderr), (7, ""))

    def test_what_is_kept_is_used_by_statements_that_import_it_too(self):
        self.write("KEPT = 1")
        statements = "import sys; sys.path[0] = sys.argv[1]; import agent; print(agent)"
        folder = os.path.dirname(self.path)
        done = self.run_compiled("-c", statements, folder)
        self.assertIn(self.path, done.stdout)
        self.assertEqual(len(os.listdir(self.kept)), 1)

    def test_statements_that_compile_the_text_of_a_tool_have_what_is_kept(self):
        """As those do with which the agent starts once more; of another text there is none."""
        self.write("print('kept')")
        statements = "import sys; exec(compile({}, sys.argv[1], 'exec'))"
        own = statements.format("open(sys.argv[1], 'rb').read()")
        for text, said, kept in (
            (statements.format("b'print(1)'"), "1", 0),
            (own, "kept", 1),
        ):
            with self.subTest(text):
                done = self.run_compiled("-c", text, self.path)
                self.assertEqual((done.stdout, done.stderr), (said + "\n", ""))
                self.assertEqual(len(os.listdir(self.kept)), kept)

    def test_without_a_folder_that_can_be_written_it_runs_as_well(self):
        os.rmdir(self.kept)
        self.assertEqual(self.run_compiled(self.path).returncode, 7)

    def test_tools_and_statements_that_import_them_start_so_unless_asked(self):
        for words, is_compiled in (
            (("agent.py", "--once"), True),
            (("-c", "import master_server"), True),
            (("-c", "print()"), False),
            ((self.path,), False),
        ):
            with self.subTest(words):
                command = support.command_of(words)
                self.assertEqual(COMPILED in command, is_compiled)
                self.assertNotIn(COMPILED, support.command_of(words, as_typed=True))

    def test_what_roles_start_from_is_bytecode_where_no_other_tool_is_beside_it(self):
        path = os.path.join(support.ROOT, "master_server.py")
        is_own = sys.executable == support.PYTHON
        self.assertEqual(support._ready(path, ("--port", 0)).endswith(".pyc"), is_own)
        for flags, more in (
            (("--with-agent",), {}),
            ((), {"as_typed": True}),
            ((), {"python": "/another/python3"}),
        ):
            self.assertEqual(support._ready(path, flags, **more), path)


class AsTyped(unittest.TestCase):
    """Each tool once more, started exactly as the README has it."""

    def test_agent_master_and_reader_work_together(self):
        with support.start_master(as_typed=True) as master:
            flags = ("--port", master.port, "--name", "typed")
            with support.start("agent.py", *flags, as_typed=True):
                support.eventually(lambda: support.row_of(master.page, node="typed"))
                shown = support.run(
                    "test_reader.py", "--port", master.port, as_typed=True
                )
                self.assertIn("typed", shown.stdout)
            words = support.descendants(master.pid) + [master.pid]
            for pid in words:
                with open("/proc/%d/cmdline" % pid) as file:
                    self.assertNotIn("compiled.py", file.read())
            self.assertEqual(master.stop(), 0)
        self.assertNotIn("Traceback", master.log)

    def test_the_bridge_forwards(self):
        with support.start_master(as_typed=True) as master:
            flags = ("--remote-port", master.port, "--local-port", 0)
            bridge = support.start("port_forward.py", *flags, as_typed=True)
            self.addCleanup(bridge.stop)
            with support.PlainAgent(bridge.listening()) as agent:
                agent.send({"cpu": 1.5, "ram": 2.5, "node": "bridged"})
                support.eventually(lambda: support.row_of(master.page, node="bridged"))


if __name__ == "__main__":
    unittest.main()
