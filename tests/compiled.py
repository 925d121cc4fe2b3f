#!/usr/bin/env python3
"""compiled.py runs a tool as `python3 TOOL` does, from bytecode that is made once for all tests.

    python3 compiled.py FOLDER /path/of/master_server.py --port 0
    python3 compiled.py FOLDER -c "import master_server; ..."

Python keeps the bytecode of what is imported, never that of the program that it was told to run.
Compiling master_server.py takes more CPU than all else that a start does, and the tests start it
hundreds of times. So FOLDER keeps the bytecode of the four tools, for as long as the tests run.
What the tool sees is what it would see without this: its __file__, sys.argv, sys.path[0] and a
__main__ of its own.
"""

import contextlib
import functools
import marshal
import os
import sys
import types
from importlib import machinery

TOOLS = ("agent.py", "master_server.py", "port_forward.py", "test_reader.py")


def code_of(folder, path):
    """The code object of a file, which is compiled when the folder has none of this very file."""
    status = os.stat(path)
    name = "%s-%s-%d-%d" % (
        path.replace("/", "+"),
        sys.implementation.cache_tag,
        status.st_mtime_ns,
        status.st_size,
    )
    kept = os.path.join(folder, name)
    try:
        with open(kept, "rb") as file:
            return marshal.loads(file.read())  # ten times as fast as `load`
    except (OSError, ValueError, EOFError):
        pass
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    keep(kept, code)
    return code


def keep(path, code):
    """Write it for the next one; who may not, as another user, goes without."""
    part = "%s-%d" % (path, os.getpid())
    try:
        with open(part, "wb") as file:
            marshal.dump(code, file)
        os.replace(part, path)
    except OSError:
        pass


def install(folder):
    """Have the tools imported from that folder as well."""
    usual = machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        path = loader.get_filename(name)
        if os.path.basename(path) in TOOLS:
            return code_of(folder, path)
        return usual(loader, name)

    machinery.SourceFileLoader.get_code = get_code


def compile_text(folder, text, path, *more, **named):
    """What `compile` returns; agent.py starts itself once more as statements that call it."""
    if os.path.basename(path) in TOOLS:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read() == text:
                return code_of(folder, path)
    return compile(text, path, *more, **named)


def run(folder, words):
    """Become the program: words are what follows `python3` on a command line."""
    install(folder)
    main = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.path[0] = ""
        main.compile = functools.partial(compile_text, folder)
        code = compile(words.pop(1), "<string>", "exec", dont_inherit=True)
    else:
        sys.path[0] = os.path.dirname(words[0])
        main.__file__ = words[0]
        code = code_of(folder, words[0])
    sys.argv[:] = words
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
