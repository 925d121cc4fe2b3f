"""What .ci/run installs: tried with a PATH of few commands and a made-up apt-get."""

import os
import shutil
import subprocess
import tempfile
import unittest
from unittest import mock

import support

RUN = os.path.join(support.ROOT, ".ci", "run")
EXIT_NOT_INSTALLED = 3
# what the script itself needs; all else is missing, but for what a test adds
COMMANDS = (
    "awk bash cat chmod cut dirname grep mktemp paste rm sed sort tail tee env".split()
)
# it "installs" a package by making the command of that name, and has no package named in $BROKEN
APT_GET = """#!/bin/bash
echo "$*" >>"$APT_LOG"
[ "$2" = update ] && exit 0
for word; do
    case $word in
    "$BROKEN") echo "E: Unable to correct problems, you have held broken packages."; exit 100 ;;
    -* | install) ;;
    *) for command in $(sed -n "s|^    \\([a-z0-9_.-]*\\)  *$word\\$|\\1|p" "$RUN"); do
           printf '#!/bin/sh\\nexit 0\\n' >"$BIN/$command"; chmod +x "$BIN/$command"
       done ;;
    esac
done
"""


class Install(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.bin = os.path.join(folder.name, "bin")
        self.log = os.path.join(folder.name, "apt")
        os.mkdir(self.bin)
        for name in COMMANDS:
            os.symlink(shutil.which(name), os.path.join(self.bin, name))
        self.add_command("apt-get", APT_GET)
        open(self.log, "w").close()

    def add_command(self, name, text="#!/bin/sh\nexit 0\n"):
        path = os.path.join(self.bin, name)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o755)

    def run_it(self, *words, broken="none"):
        env = {
            "PATH": self.bin,
            "BIN": self.bin,
            "APT_LOG": self.log,
            "BROKEN": broken,
            "RUN": RUN,
        }
        return subprocess.run(
            ["/bin/bash", RUN, *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=60,
        )

    def asked_for(self):
        """The packages of each call of apt-get that installs, in order."""
        calls = []
        with open(self.log) as file:
            for line in file:
                words = line.split()
                if "install" in words:
                    packages = [word for word in words if not word.startswith("-")]
                    calls.append(packages[1:])
        return calls

    def test_it_installs_what_is_missing_at_once_and_a_second_time_nothing(self):
        done = self.run_it("install")
        self.assertEqual(done.returncode, 0, done.stdout)
        (packages,) = self.asked_for()
        self.assertIn("slurm-wlm", packages)
        self.assertEqual(packages.count("slurm-wlm"), 1)
        done = self.run_it("install")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("nothing is missing", done.stdout)
        self.assertEqual(len(self.asked_for()), 1)

    def test_a_node_and_npm_that_are_there_are_left_alone_whose_ever_they_are(self):
        self.add_command("node")
        self.add_command("npm")
        self.assertEqual(self.run_it("install", broken="npm").returncode, 0)
        (packages,) = self.asked_for()
        self.assertFalse({"node", "nodejs", "npm"} & set(packages))

    def test_one_that_cannot_be_had_is_named_with_its_reason_after_all_the_rest(self):
        done = self.run_it("install", broken="npm")
        self.assertEqual(done.returncode, EXIT_NOT_INSTALLED, done.stdout)
        self.assertIn("failed: npm: E: Unable to correct problems", done.stdout)
        self.assertIn("still missing: npm (package npm)", done.stdout)
        self.assertEqual(done.stdout.count("still missing"), 1)
        together, *apart = self.asked_for()
        self.assertEqual(apart, [[package] for package in together])

    def test_the_whole_run_ends_there_and_says_so(self):
        done = self.run_it(broken="npm")
        self.assertEqual(done.returncode, EXIT_NOT_INSTALLED, done.stdout)
        self.assertIn("NOT INSTALLED: nothing was tested", done.stdout)
        self.assertNotIn("=== python3 -m unittest", done.stdout)

    def test_another_word_is_bad_usage(self):
        done = self.run_it("instal")
        self.assertEqual(done.returncode, 2)
        self.assertIn("usage: bash .ci/run [install]", done.stdout)
        self.assertEqual(self.asked_for(), [])


class Slow(unittest.TestCase):
    def test_what_takes_long_is_skipped_by_name_unless_it_is_asked_for(self):
        reasons = ["takes long (a minute): SENTINEL_TEST_ALL=1"]
        for asked, expected in ((False, reasons), (True, [])):
            with self.subTest(asked), mock.patch.object(support, "LONG", asked):

                @support.slow("a minute")
                class Long(unittest.TestCase):
                    def runTest(self):
                        pass

                result = unittest.TestResult()
                Long().run(result)
                self.assertEqual([why for _, why in result.skipped], expected)


if __name__ == "__main__":
    unittest.main()
