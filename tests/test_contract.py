"""The promises that the files themselves make: imports, syntax, README, shape."""

import ast
import functools
import os
import re
import subprocess
import sys
import unittest

import support

TOOLS = (
    "agent.py",
    "master_server.py",
    "port_forward.py",
    "test_reader.py",
)
OTHERS = ("utils/dummy_task.py",)
SHAPE = {
    "agent.py",
    "master_server.py",
    "port_forward.py",
    "test_reader.py",
    "run_agent.slurm",
    "net_debug.slurm",
    "utils",
    "tests",
    "README.md",
    "LICENSE",
    ".ci",
    ".gitignore",
}
NOT_STDLIB = {"agent.py": {"psutil"}, "test_reader.py": {"master_server"}}
# flags that the README names and that belong to ssh, sbatch, srun, curl, pip and the like
FOREIGN_FLAGS = set(
    """
    --array --cpus-per-task --export --gres --job-name --mem --nodes --ntasks --ntasks-per-node
    --output --overlap --partition --signal --strict --time --version --wait
""".split()
)


def text_of(name):
    with open(os.path.join(support.ROOT, name), encoding="utf-8") as file:
        return file.read()


@functools.lru_cache()
def trees():
    """(name, syntax tree) of every tool."""
    return [
        (name, ast.parse(text_of(name), name, feature_version=(3, 6)))
        for name in (*TOOLS, *OTHERS)
    ]


def tracked():
    """The files that git keeps or would keep; all there are when this is no git checkout."""
    if os.path.exists(os.path.join(support.ROOT, ".git")):
        listed = subprocess.check_output(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=support.ROOT,
        )
        names = listed.decode("utf-8").splitlines()
    else:
        names = [
            os.path.relpath(os.path.join(folder, name), support.ROOT)
            for folder, _, files in os.walk(support.ROOT)
            for name in files
        ]
    return [name for name in names if os.path.isfile(os.path.join(support.ROOT, name))]


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))


class Imports(unittest.TestCase):
    @unittest.skipIf(sys.version_info < (3, 10), "sys.stdlib_module_names came in 3.10")
    def test_the_tools_import_the_standard_library_only(self):
        for name, tree in trees():
            allowed = set(sys.stdlib_module_names) | NOT_STDLIB.get(name, set())
            for node in ast.walk(tree):
                modules = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else ["." * node.level + (node.module or "")]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for module in modules:
                    with self.subTest("%s:%d" % (name, node.lineno)):
                        self.assertIn(module.split(".")[0], allowed)

    def test_the_master_holds_nothing_that_could_unpickle_or_evaluate(self):
        forbidden = {
            "pickle",
            "_pickle",
            "cPickle",
            "marshal",
            "shelve",
            "Unpickler",
            "eval",
            "exec",
            "Listener",
            "Client",
        }
        for node in ast.walk(dict(trees())["master_server.py"]):
            named = {
                getattr(node, "id", None),
                getattr(node, "attr", None),
                getattr(node, "module", None),
            }
            if isinstance(node, ast.alias):
                named.add(node.name)
            self.assertFalse(
                named & forbidden, "line %s" % getattr(node, "lineno", "?")
            )

    def test_importing_a_tool_does_nothing(self):
        probe = (
            "import sys, threading, os; import %s as tool; "
            "threads = threading.active_count(); "
            "children = open('/proc/self/task/%%d/children' %% os.getpid()).read(); "
            "links = [os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')"
            " if os.path.exists('/proc/self/fd/' + fd)]; "
            "assert threads == 1, threads; assert not children, children; "
            "assert not any('socket' in link or 'shm' in link for link in links), links; "
            "assert callable(tool.main)"
        )
        for name in TOOLS:
            with self.subTest(name):
                done = support.run("-c", probe % name[:-3], cwd=support.ROOT)
                self.assertEqual(
                    (done.returncode, done.stdout, done.stderr), (0, "", "")
                )


class Syntax(unittest.TestCase):
    def test_the_oldest_and_the_newest_python_here_compile_every_tool(self):
        versions = sorted(support.pythons())
        self.compile_on({versions[0], versions[-1]})

    @support.slow("the Pythons between")
    def test_every_python_from_3_6_on_that_is_here_compiles_every_tool(self):
        self.compile_on(support.pythons())

    def compile_on(self, versions):
        check = (
            "import sys\nfor name in sys.argv[1:]:\n"
            "    compile(open(name, encoding='utf-8').read(), name, 'exec')"
        )
        for version in versions:
            with self.subTest("Python %d.%d" % version):
                subprocess.check_output(
                    [support.pythons()[version], "-W", "error", "-c", check]
                    + [*TOOLS, *OTHERS],
                    cwd=support.ROOT,
                    stderr=subprocess.STDOUT,
                )

    def test_the_syntax_is_that_of_3_6(self):
        for name, tree in trees():
            with self.subTest(name):
                self.assertTrue(tree.body)

    def test_no_exception_is_caught_without_a_name(self):
        for name, tree in trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.ExceptHandler):
                    self.assertIsNotNone(
                        node.type, "%s:%d: bare except" % (name, node.lineno)
                    )


class Repository(unittest.TestCase):
    def test_the_top_level_holds_what_the_shape_names_and_nothing_else(self):
        self.assertEqual({name.split("/")[0] for name in tracked()}, SHAPE)

    def test_no_file_holds_a_secret_or_a_path_of_the_machine_it_was_written_on(self):
        homes = r"(?<!/proc/%d)/(?:root|work|farm)/"
        pattern = re.compile(
            "%s|PRIVATE KEY-----|AKIA[0-9A-Z]{16}|ghp_[0-9A-Za-z]{20}" % homes
        )
        for name in tracked():
            with open(os.path.join(support.ROOT, name), "rb") as file:
                text = file.read().decode("latin-1")
            for found in pattern.finditer(
                "" if name == "tests/test_contract.py" else text
            ):
                self.fail("%s holds %r" % (name, found.group()))


class Version(unittest.TestCase):
    def test_every_tool_tells_the_version_of_the_changelog(self):
        (version,) = re.findall(r"(?m)\A.*?^- \*\*([\d.]+)\*\*", changelog(), re.S)
        for name in TOOLS:
            done = support.run(name, "--version")
            self.assertEqual((done.returncode, done.stdout), (0, version + "\n"), name)


def changelog():
    return text_of("README.md").partition("### CHANGELOG")[2]


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.readme = text_of("README.md") + text_of("tests/README.md")
        cls.flags = {
            name: flags_in(support.run(name, "--help").stdout) for name in TOOLS
        }

    def test_every_flag_that_the_readme_names_exists(self):
        others = [
            flags_in(support.run("tests/" + name, "--help").stdout)
            for name in ("bench.py", "soak.py")
        ]
        known = set.union(FOREIGN_FLAGS, *self.flags.values(), *others)
        self.assertEqual(flags_in(self.readme) - known, set())

    def test_every_flag_of_every_tool_is_named_in_the_readme(self):
        for name, flags in self.flags.items():
            with self.subTest(name):
                self.assertTrue(flags)
                self.assertEqual(flags - flags_in(self.readme) - {"--help"}, set())

    def test_every_variable_that_the_readme_names_is_one_that_a_tool_knows(self):
        variables = r"\bSENTINEL_[A-Z]+(?:_[A-Z]+)*"
        known = set()
        for name in [*tracked(), "README.md"]:
            if name.endswith((".py", ".slurm")) or name == ".ci/run":
                known.update(re.findall(variables, text_of(name)))
        self.assertEqual(set(re.findall(variables, self.readme)) - known, set())

    def test_every_test_that_the_readme_names_exists(self):
        known = {"test_reader"}
        for name in tracked():
            if name.startswith("tests/") and name.endswith(".py"):
                known.add(os.path.basename(name)[:-3])
                known.update(re.findall(r"(?m)^ *def (\w+)\(", text_of(name)))
        self.assertEqual(set(re.findall(r"\btest_\w+", self.readme)) - known, set())

    def test_every_file_that_the_readme_names_exists(self):
        for name in re.findall(r"\b[\w./-]+\.(?:py|slurm)\b", self.readme):
            found = [os.path.join(folder, name) for folder in ("", "utils", "tests")]
            with self.subTest(name):
                self.assertTrue(
                    any(
                        os.path.exists(os.path.join(support.ROOT, path))
                        for path in found
                    )
                )

    def test_the_readme_names_every_file_of_the_shape(self):
        for name in SHAPE - {".ci", ".gitignore", "README.md", "tests", "utils"}:
            with self.subTest(name):
                self.assertIn(name, self.readme)


if __name__ == "__main__":
    unittest.main()
