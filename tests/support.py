"""What the tests share: real processes, patience with a limit, and plain clients.

    with start_master("--alert", "cpu>50") as master:           # ports picked freely
        with PlainAgent(master.port) as agent:
            agent.send({"cpu": 15.5, "ram": 40.2})
            row = eventually(lambda: nodes(master.page)[0])

Nothing here sleeps to wait: `eventually` polls, `stays` watches. Whatever was started ends,
also when a test fails or is interrupted, and is found by its pid, never by its name.

SENTINEL_TEST_PYTHON  the interpreter that runs the tools (this one by default)
SENTINEL_TEST_ALL=1   all of it: what takes long runs, and what cannot be tested for want of
                      something fails; else both are skipped, by name
SENTINEL_TEST_SLOW=1  what takes long runs
SENTINEL_TEST_CODE    the folder with the tools' bytecode, where one is shared (a new one)
"""
# The rooms, from the top; a room uses only rooms above it.
#
#   patience       wait for what is to come, watch what is to stay
#   proc           which processes there are, and who started whom
#   tools          run a tool to its end, or start one and close it
#   masters        a master on free ports, with limits of the test's own
#   shared memory  what lies in /dev/shm
#   agents         the plan's five-line agent, which may send anything; a port without a master
#   requests       what the master's page, API and events say
#   test case      tests that share one master
#   needs          what a test cannot do without, and what takes long

import atexit
import collections
import functools
import html
import http.client
import importlib.util
import json
import os
import pickle
import py_compile
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import compiled

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.environ.get("SENTINEL_TEST_PYTHON") or sys.executable
HOST = "127.0.0.1"
PATIENCE = 20  # seconds that a busy machine may take for what takes a fraction of one
STOP_LIMIT = 20  # seconds to end after SIGTERM; then SIGKILL, which a test can see
POLL = 0.05  # seconds between two looks
EVERYTHING = os.environ.get("SENTINEL_TEST_ALL") == "1"
LONG = EVERYTHING or os.environ.get("SENTINEL_TEST_SLOW") == "1"
MAX_SLOTS = 1024  # what the master has without --max-agents
COMPILED = True  # tools start from bytecode that is there; bench.py has them start as people do

if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# Under nohup, or in the background of a script, a signal is ignored, also by the tools that are
# started here.  One that is caught is a tool's own again, execve(2), and still ends no test.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)


# ==========================================================================================
# Patience: wait for what is to come, watch what is to stay
# ==========================================================================================


def _look(check):
    """Return (value, text) of a check; one that raises does not hold yet: its value is None."""
    try:
        value = check()
        return value, repr(value)
    except (
        AssertionError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        http.client.HTTPException,
    ) as error:
        return None, "%s: %s" % (type(error).__name__, error)


def eventually(check, seconds=PATIENCE, what=""):
    """Call `check` until it is truthy and return that; past the limit, fail with its last value."""
    start = time.monotonic()
    while True:
        late = time.monotonic() - start > seconds
        value, text = _look(check)
        if value:
            return value
        if late:
            raise AssertionError(
                "not within %.1f s%s; last seen: %.2000s"
                % (seconds, what and ": " + what, text)
            )
        time.sleep(POLL)


def stays(check, seconds, what=""):
    """Watch for that long that `check` is truthy every time."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        value, text = _look(check)
        if not value:
            raise AssertionError(
                "held for %.1f of %.1f s only%s; then: %.2000s"
                % (time.monotonic() - start, seconds, what and ": " + what, text)
            )
        time.sleep(POLL)


# ==========================================================================================
# Proc: which processes there are, and who started whom
# ==========================================================================================


def _stat(pid):
    """(state, parent's pid) of /proc/PID/stat; the name in front may hold blanks and ")"."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def wakeups(pid):
    """How often the threads of a process and of its descendants have gone to sleep, proc(5)."""
    total = 0
    for each in [pid] + descendants(pid):
        for thread in os.listdir("/proc/%d/task" % each):
            with open("/proc/%d/task/%s/status" % (each, thread)) as file:
                found = re.search(r"(?m)^voluntary_ctxt_switches:\s+(\d+)", file.read())
            total += int(found.group(1))
    return total


def cpu_seconds(pid):
    """The CPU time of a process and of the children that it has waited for."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def alive(pid):
    """Does it run (or is it stopped)?  One that only waits to be reaped does not."""
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def descendants(pid):
    """The pids of its children, their children and so on that are alive."""
    children = collections.defaultdict(list)
    for name in os.listdir("/proc"):
        try:
            state, parent = _stat(int(name))
        except (OSError, ValueError):
            continue
        if state not in "ZX":
            children[parent].append(int(name))
    found = list(children[pid])
    for child in found:
        found += children[child]
    return found


# ==========================================================================================
# Tools: run one to its end, or start one and close it
# ==========================================================================================


def command_of(argv, python=None, as_typed=False):
    """The command line of a tool: command_of(["agent.py", "--once"]); its name stands for its path.

    Anything else ("-c", "-m", a path) goes as it is. What starts a tool of this repository, or
    imports one, has the bytecode ready, see compiled.py, and leaves out the site's folders (-S):
    the tools need none, and where much is installed, looking there takes longer than all the rest.
    """
    words = [str(word) for word in argv]
    if not os.path.isabs(words[0]) and os.path.exists(os.path.join(ROOT, words[0])):
        words[0] = os.path.join(ROOT, words[0])
    if COMPILED and not as_typed and _is_ours(words):
        words[:0] = ["-S", compiled.__file__, code_folder()]
    return [python or PYTHON] + words


def _is_ours(words):
    """Whether a tool runs, or a copy with other constants, or statements that import one."""
    if words[0] == "-c":
        return any("import " + tool[:-3] in words[1] for tool in compiled.TOOLS)
    folder, name = os.path.split(words[0])
    is_copy = os.path.dirname(folder) == _copy_folder()
    return name in compiled.TOOLS and (folder == ROOT or is_copy)


@functools.lru_cache()
def _copy_folder():
    """A folder for copies of the tools; it is removed at the end."""
    folder = tempfile.mkdtemp(prefix="sentinel-copies-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache()
def code_folder():
    """Where the tools' bytecode is, for this process and those that it starts to run tests."""
    folder = os.environ.get("SENTINEL_TEST_CODE")
    if not folder:
        folder = tempfile.mkdtemp(prefix="sentinel-code-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["SENTINEL_TEST_CODE"] = folder
    return folder


compiled.install(code_folder())  # tests import the tools, too


def _environment(changes):
    """Return this environment without what changes a tool's defaults; None removes a name."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SENTINEL_", "SLURM"))
    }
    env.update(changes or {})
    return {name: str(value) for name, value in env.items() if value is not None}


def run(*argv, python=None, env=None, stdin="", seconds=60, as_typed=False, **more):
    """Run a tool to its end: a CompletedProcess whose stdout and stderr are text.

    as_typed: without the bytecode that is ready, as a person does.
    """
    return subprocess.run(
        command_of(argv, python, as_typed),
        env=_environment(env),
        input=stdin,
        timeout=seconds,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        **more,
    )


_EACH = """\
import json, os, signal, sys, tempfile
import %(module)s as tool
results = []
for flags in json.load(sys.stdin):
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        sys.argv[:] = [%(path)r] + flags
        sys.exit(tool.main())
    status = os.waitpid(child, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    for file in files:
        file.seek(0)
    results.append([code] + [file.read().decode("utf-8", "replace") for file in files])
print(json.dumps(results))
"""


def run_each(tool, table, seconds=60):
    """Run a tool to its end with each list of flags of a table: a CompletedProcess for each.

    Each is a process of its own, but all are forks of one that has imported the tool: for tables
    of what ends at once, as after 20 s it is killed. What is to be seen of a start needs `run`.
    """
    names = {"module": tool[:-3], "path": os.path.join(ROOT, tool)}
    table = [[str(word) for word in flags] for flags in table]
    done = run("-c", _EACH % names, stdin=json.dumps(table), cwd=ROOT, seconds=seconds)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == len(table), done
    return [
        subprocess.CompletedProcess([tool, *flags], *result)
        for flags, result in zip(table, results)
    ]


def start(*argv, python=None, env=None, as_typed=False, **more):
    """Start a tool: start("agent.py", "--port", 13579).  Close what comes back, or use `with`."""
    return Tool(command_of(argv, python, as_typed), _environment(env), **more)


class Tool:
    """A running tool, the leader of a process group of its own.

    .pid  .log (stderr so far)  .out (stdout so far)  .code (None while it runs)
    """

    _running = set()

    def __init__(self, command, env, **more):
        more.setdefault("stdin", subprocess.DEVNULL)
        more.setdefault("stdout", subprocess.PIPE)
        more.setdefault("stderr", subprocess.PIPE)
        self.command = command
        self.process = subprocess.Popen(
            command, env=env, start_new_session=True, **more
        )
        Tool._running.add(self)
        self.pid = self.process.pid
        self._chunks = {"out": [], "log": []}
        self._readers = []
        self._start_reader(self.process.stdout, "out")
        self._start_reader(self.process.stderr, "log")

    def _start_reader(self, pipe, name):
        if pipe:
            reader = threading.Thread(target=self._read, args=(pipe, name), daemon=True)
            reader.start()
            self._readers.append(reader)

    def _read(self, pipe, name):
        with pipe:
            for chunk in iter(lambda: os.read(pipe.fileno(), 65536), b""):
                self._chunks[name].append(chunk)

    def _text(self, name):
        return b"".join(self._chunks[name]).decode("utf-8", "replace")

    @property
    def log(self):
        return self._text("log")

    @property
    def out(self):
        return self._text("out")

    @property
    def code(self):
        return self.process.poll()

    def listening(self, role="", seconds=PATIENCE):
        """The port that the tool names: "listening on HOST:PORT", of that role if one is given."""
        line = r"%s *listening on (?:http://)?(?:\[[^]]*\]|[^\s:]*):(\d+)" % re.escape(
            role
        )
        return int(self.logged(line, seconds).group(1))

    def logged(self, pattern, seconds=PATIENCE):
        """Wait until the log holds the pattern and return the match."""

        def look():
            if self.code is None:
                return re.search(pattern, self.log)
            self._finish_reading()
            return re.search(pattern, self.log) or "ended"

        try:
            found = eventually(look, seconds, "%r in the log" % pattern)
        except AssertionError as error:
            raise AssertionError("%s\n%s" % (error, self.log)) from None
        if found == "ended":
            raise AssertionError(
                "ended with %s before %r:\n%s" % (self.code, pattern, self.log)
            )
        return found

    def send_signal(self, number, group=False):
        """Send a signal to the tool, or to all of its group as a terminal's Ctrl-C does."""
        if group:
            os.killpg(self.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self, seconds=PATIENCE):
        """The exit code, once it has ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                "still running after %s s: %s\n%s"
                % (seconds, " ".join(self.command), self.log)
            ) from None
        self._finish_reading()
        return self.process.returncode

    def stop(self, number=signal.SIGTERM, seconds=STOP_LIMIT):
        """Ask it to end, see to it that its whole group has, and return the exit code."""
        if self.code is None:
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        return self.process.returncode

    def kill(self):
        """SIGKILL to whatever is left of the group, stopped or not."""
        if self in Tool._running:
            Tool._running.discard(self)
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            self._finish_reading()

    def _finish_reading(self):
        for reader in self._readers:
            reader.join(5)  # a grandchild may hold the pipe

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


# A terminated test run unwinds as an interrupted one does, and so ends what it started. Who starts
# it in the background of a script has SIGINT ignored: the tools must not inherit that.
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nor must they inherit what few users have: it hides what becomes of lines that nobody takes, or
# makes each test_reader.py compile the master_server.py that it imports.
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@atexit.register
def _kill_all():
    for tool in list(Tool._running):
        tool.kill()


# ==========================================================================================
# Masters: on free ports, with limits of the test's own
# ==========================================================================================


PATCHED = """\
import multiprocessing, sys
sys.path.insert(0, %r)
import master_server
multiprocessing.set_start_method("fork")
%s
sys.exit(master_server.main(sys.argv[1:]))
"""
_BY_METHOD = """\
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    sys.argv[0] = %r
    runpy.run_path(%r, run_name="__main__")
"""


def _ready(path, flags, python=None, as_typed=False, **_):
    """What each process of a start method runs, and would compile: the file, or its bytecode.

    The bytecode is this Python's, and has no other tool beside it.
    """
    is_alone = not any(flag in flags for flag in ("--with-agent", "--my-jobs", "--ssh"))
    if as_typed or not (COMPILED and is_alone) or (python or PYTHON) != sys.executable:
        return path
    name = "%s-%s.pyc" % (path.replace("/", "+"), sys.implementation.cache_tag)
    ready = os.path.join(code_folder(), name)
    if not os.path.exists(ready):
        py_compile.compile(path, ready, doraise=True)
    return ready


def with_constants(tool, **constants):
    """The path of a copy of a tool that waits less: with_constants("agent.py", WAIT_SECONDS=1)."""
    with open(os.path.join(ROOT, tool), encoding="utf-8") as file:
        text = file.read()
    for name, value in constants.items():
        line = r"(?m)^%s = [\d.]+" % name
        text, count = re.subn(line, "%s = %s" % (name, value), text)
        assert count == 1, "%s has no constant %s" % (tool, name)
    changes = ["%s-%s" % change for change in sorted(constants.items())]
    folder = os.path.join(_copy_folder(), "_".join(changes))
    path = os.path.join(folder, tool)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    return path


def start_master(*flags, patch="", method="", constants=None, **more):
    """Start a master on free ports and wait for them: .port for agents, .page for browsers.

    patch: statements that change the module (a limit, say) before it runs, by fork.
    method: multiprocessing's start method, set before the file runs as the main program.
    constants: those of a copy that runs instead, see with_constants.
    """
    path = os.path.join(ROOT, "master_server.py")
    if constants:
        path = with_constants("master_server.py", **constants)
    argv = [path]
    if patch:
        argv = ["-c", PATCHED % (ROOT, patch)]
    elif method:
        argv = ["-S", "-c", _BY_METHOD % (path, _ready(path, flags, **more)), method]
    for flag in ("--port", "--dashboard-port"):
        argv += [] if flag in flags else [flag, "0"]
    is_watching = {"--my-jobs", "--ssh"} & set(flags)
    is_told = {"--record", "--no-record"} & set(flags)
    if is_watching and not is_told and "HOME" not in (more.get("env") or {}):
        argv.append("--no-record")  # the home is that of who runs the tests
    master = start(*(argv + list(flags)), **more)
    try:
        master.port = master.listening("collector")
        master.page = master.listening("dashboard")
    except BaseException:
        master.stop()
        raise
    return master


# ==========================================================================================
# Shared memory: what lies in /dev/shm
# ==========================================================================================


def shm_names():
    """What there is in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def shm_of(pid):
    """What a process and its descendants have mapped of /dev/shm: segments and semaphores."""
    names = set()
    for each in [pid] + descendants(pid):
        try:
            with open("/proc/%d/maps" % each) as file:
                names.update(re.findall(r" /dev/shm/(.+)$", file.read(), re.M))
        except OSError:
            continue
    return {name for name in names if not name.endswith(" (deleted)")}


def unlink_shm(names):
    """Clean up behind a process that was not given the time to."""
    for name in names:
        if os.path.exists("/dev/shm/" + name):
            os.unlink("/dev/shm/" + name)


def slots(name):
    """{address: (slot id, cpu, ram)}, read from offset 0 as the plan lays it out."""
    with open("/dev/shm/" + name, "rb") as file:
        data = file.read(MAX_SLOTS * struct.calcsize("i64sff"))
    return {
        address.rstrip(b"\0").decode(): (number, cpu, ram)
        for number, address, cpu, ram in struct.iter_unpack("i64sff", data)
        if number
    }


# ==========================================================================================
# Agents: the plan's five lines, which may send anything
# ==========================================================================================


class PlainAgent:
    """The plan's five-line agent: connects, writes pickles, need not read."""

    def __init__(self, port, host=HOST, source=None):
        self.socket = socket.create_connection((host, port), PATIENCE, source)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = self.socket.getsockname()[:2]
        self._unread = b""

    def send(self, sample, protocol=2):
        self.socket.sendall(pickle.dumps(sample, protocol))

    def send_bytes(self, data, step=None):
        """Raw bytes, in segments of `step` bytes if it is given."""
        for at in range(0, len(data), step or len(data) or 1):
            self.socket.sendall(data[at : at + step] if step else data)

    def read_line(self, seconds=PATIENCE):
        """The master's next line without its end; "" when it has closed the connection."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread and self._receive(deadline):
            pass
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("utf-8")

    def read_answer(self):
        """The answer to a sample: what else the master says that it takes is passed over."""
        line = self.read_line()
        while line in ("ok parts", "ok past"):
            line = self.read_line()
        return line

    def read_to_end(self, seconds=PATIENCE):
        """Everything until the master closes the connection; fails if it does not."""
        deadline = time.monotonic() + seconds
        while self._receive(deadline):
            pass
        text, self._unread = self._unread, b""
        return text.decode("utf-8")

    def _receive(self, deadline):
        self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            chunk = self.socket.recv(65536)
        except socket.timeout:
            raise AssertionError(
                "no answer in time; so far: %r" % self._unread
            ) from None
        except ConnectionResetError:
            chunk = b""
        finally:
            self.socket.settimeout(PATIENCE)
        self._unread += chunk
        return chunk

    def reset(self):
        """Close with RST, as a machine that was restarted does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def closed_port(host=HOST):
    """A port on which nothing listens (a moment ago it was free)."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


# ==========================================================================================
# Requests: what the master's page, API and events say
# ==========================================================================================


Answer = collections.namedtuple("Answer", "status headers text")


def get(port, path="/", method="GET", headers=None, seconds=PATIENCE, host=HOST):
    """One HTTP request: an Answer whose headers are an email.message.Message."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request(method, path, headers=headers or {})
        with connection.getresponse() as response:
            return Answer(
                response.status, response.msg, response.read().decode("utf-8")
            )
    finally:
        connection.close()


def _json(port, path, key):
    answer = get(port, path)
    if answer.status != 200:
        raise AssertionError("GET %s: %s %s" % (path, answer.status, answer.text))
    return json.loads(answer.text)[key]


def nodes(port):
    """The rows of /api/nodes."""
    return _json(port, "/api/nodes", "nodes")


def row_of(page, **wanted):
    """The one row of /api/nodes with these values, or None."""
    rows = [
        row
        for row in nodes(page)
        if all(row.get(key) == value for key, value in wanted.items())
    ]
    assert len(rows) <= 1, rows
    return rows[0] if rows else None


def events(port, kind=None):
    """The entries of /api/events, of one kind if it is given."""
    return [
        event
        for event in _json(port, "/api/events", "events")
        if kind in (None, event["kind"])
    ]


def page_text(port, path="/"):
    """What a reader sees of a page: without tags, styles and scripts, with single blanks."""
    return text_of_page(get(port, path).text)


def text_of_page(page):
    """The same of a page that is in a file."""
    words = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", page)
    return re.sub(r"\s+", " ", html.unescape(words))


# ==========================================================================================
# Test case: tests that share one master
# ==========================================================================================


class MasterTest(unittest.TestCase):
    """Tests that share one master, started with `flags`, `patch` and `env`."""

    flags = ()
    patch = ""
    env = None

    @classmethod
    def setUpClass(cls):
        cls.master = start_master(*cls.flags, patch=cls.patch, env=cls.env)

    @classmethod
    def tearDownClass(cls):
        cls.master.stop()
        log = cls.master.log
        assert "Traceback" not in log and "resource_tracker" not in log, log

    def agent(self, **more):
        agent = PlainAgent(self.master.port, **more)
        self.addCleanup(agent.close)
        return agent

    def real_agent(self, *flags, **more):
        agent = start("agent.py", "--port", self.master.port, *flags, **more)
        self.addCleanup(agent.stop)
        return agent

    def row(self, seconds=PATIENCE, **wanted):
        return eventually(
            lambda: row_of(self.master.page, **wanted), seconds, str(wanted)
        )

    def gone(self, seconds=PATIENCE, **wanted):
        return eventually(
            lambda: row_of(self.master.page, **wanted) is None,
            seconds,
            "%s is gone" % wanted,
        )

    def event(self, kind, node, seconds=PATIENCE):
        """The last event of that kind about that node, once there is one."""
        return eventually(
            lambda: [
                event
                for event in events(self.master.page, kind)
                if event["node"] == node
            ],
            seconds,
            "%s %s" % (kind, node),
        )[-1]


# ==========================================================================================
# Needs: what a test cannot do without, and what takes long
# ==========================================================================================


@functools.lru_cache()
def pythons(first=(3, 6), last=(3, 13)):
    """{(3, 6): path, ...} of the interpreters under ~/.pyenv and on PATH that really start."""
    found = {sys.version_info[:2]: sys.executable}
    pyenv = os.path.expanduser("~/.pyenv/versions")
    names = sorted(os.listdir(pyenv)) if os.path.isdir(pyenv) else []
    for name in names:
        path = os.path.join(pyenv, name, "bin", "python")
        found.setdefault(_version(path), path)
    for minor in range(first[1], last[1] + 1):
        path = shutil.which("python3.%d" % minor)
        if path and (3, minor) not in found and _version(path):
            found[3, minor] = path
    return {
        version: path
        for version, path in found.items()
        if version and first <= version <= last
    }


def _version(path):
    """(3, 11), or None if it does not start, as a shim without its version."""
    try:
        out = subprocess.check_output(
            [path, "-c", "import sys; print(*sys.version_info[:2])"],
            stderr=subprocess.DEVNULL,
        )
        return tuple(int(number) for number in out.split())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _have(thing):
    """A command; or "root", a "/path", "module NAME", "python 3.6"."""
    kind, _, name = thing.partition(" ")
    if thing == "root":
        return os.geteuid() == 0
    if thing.startswith("/"):
        return os.path.exists(thing)
    if kind == "module":
        return importlib.util.find_spec(name) is not None
    if kind == "python":
        return tuple(int(number) for number in name.split(".")) in pythons()
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    return shutil.which(thing, path=path) is not None


def requires(*things):
    """Decorate a test or a TestCase: skipped, with the name, where one of the things is missing.

    With SENTINEL_TEST_ALL=1 it fails instead.
    """
    missing = [thing for thing in things if not _have(thing)]
    reason = "missing here: " + ", ".join(missing)
    if not missing:
        return lambda test: test
    if not EVERYTHING:
        return unittest.skip(reason)

    def fail(*_):
        raise AssertionError(reason)

    def decorate(test):
        if isinstance(test, type):
            test.setUpClass = classmethod(fail)
            return test
        fail.__name__, fail.__doc__ = test.__name__, test.__doc__
        return fail

    return decorate


def slow(why):
    """Decorate a test or a TestCase that takes long: skipped, with the reason, unless asked for.

    SENTINEL_TEST_ALL=1 asks for it, and so does SENTINEL_TEST_SLOW=1.
    """
    return unittest.skipUnless(LONG, "takes long (%s): SENTINEL_TEST_ALL=1" % why)


if __name__ == "__main__":  # .ci/run asks: which interpreters are there?
    for version, interpreter in sorted(pythons().items()):
        print("%d.%d" % version, interpreter)
