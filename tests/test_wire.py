"""The decoder: what it takes, what it refuses and why, and that nothing hostile costs memory.

`hostile()` is the one table of hostile inputs.  It is tried here under RLIMIT_AS, a process for
each input, and over real sockets in test_trust.py; test_fuzz.py mutates it.
"""

import hmac
import io
import json
import math
import os
import pickle
import pickletools
import random
import re
import resource
import ssl
import struct
import sys
import tempfile
import time
import unittest
from unittest import mock

import support
from support import requires

import master_server
from master_server import (
    WireError,
    check_sample,
    make_shape,
    parse_line,
    parse_message,
    parse_opcodes,
    parse_pickle,
    parse_shape,
    parse_usual,
)

MAX_SAMPLE, MAX_KEYS, MAX_TEXT = 16384, 64, 255  # as design.md has them
ROOM = 16 << 20  # bytes of address space that a decode may take beyond what is there
PEAK = 1024  # KiB by which a decode may raise the process's peak
ALLOWED = set(
    """PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE MEMOIZE BINPUT LONG_BINPUT BINGET
    LONG_BINGET""".split()
)
NOT_FLAT = "flat dict|at most"


# ==========================================================================================
# Assembler: short, text, real, sample, dumps
# ==========================================================================================


def short(value):
    """A text of up to 255 bytes, as protocol 4 writes it."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"\x8c" + bytes([len(raw)]) + raw


def text(value, length=None):
    """A text as protocol 2 writes it, with another length than its own if one is given."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw) if length is None else length) + raw


def real(value):
    """A float."""
    return b"G" + struct.pack(">d", value)


CPU, RAM = short("cpu") + real(15.5), short("ram") + real(40.25)


def sample(*items):
    """A whole sample that holds these encoded keys and values, too."""
    return b"\x80\x04}(" + CPU + RAM + b"".join(items) + b"u."


def of_size(size):
    """A valid sample of that many bytes exactly."""
    items, room = [], size - len(sample())
    while room:
        key = short("%03d" % len(items) + "k" * (MAX_TEXT - 3 if room > 1000 else 0))
        length = min(MAX_TEXT, room - len(key) - 2)
        if 0 < room - len(key) - 2 - length < 10:
            length -= 10  # or what is left would be too little for a key
        items.append(key + short("x" * length))
        room -= len(items[-1])
    return sample(*items)


# ==========================================================================================
# The hostile table
# ==========================================================================================


def running_code(path):
    """(what, pickle) of pickles with which the standard unpickler calls os.mkdir(path)."""
    call, args = b"cos\nmkdir\n", text(path) + b"\x85"
    stack = short("os") + short("mkdir") + b"\x93"
    yield "GLOBAL and REDUCE", b"\x80\x02" + call + args + b"R."
    yield "STACK_GLOBAL and REDUCE", b"\x80\x04" + stack + args + b"R."
    yield "INST", b"\x80\x02(" + text(path) + b"ios\nmkdir\n."
    yield "OBJ", b"\x80\x02(" + call + text(path) + b"o."
    yield "EXT1", b"\x80\x02\x82\x77" + args + b"R."
    yield "EXT2", b"\x80\x02\x83\x77\0" + args + b"R."
    yield "EXT4", b"\x80\x02\x84\x77\0\0\0" + args + b"R."
    yield "a value of a dict", b"\x80\x02}" + text("cpu") + call + args + b"Rs."
    yield "a key of a dict", b"\x80\x02}" + call + args + b"RK\x01s."
    yield "what POP drops", b"\x80\x02" + call + args + b"R0}."
    yield "behind a good sample", sample()[:-1] + call + args + b"R0."
    yield "protocol 0", b"cos\nmkdir\n(S'%s'\ntR." % path.encode()


def making_objects():
    """(what, pickle) of pickles that make or change objects, or ask the program for one."""
    proto, cls = b"\x80\x04", short("collections") + short("Counter") + b"\x93"
    yield "NEWOBJ", proto + cls + b")\x81."
    yield "NEWOBJ_EX", proto + cls + b")}\x92."
    yield "BUILD", proto + cls + b")\x81}" + short("a") + b"K\x01sb."
    yield "BUILD on a dict", proto + b"}}b."
    yield "GLOBAL alone", b"\x80\x02cos\nsystem\n."
    yield "GLOBAL without an end", b"\x80\x02cos"
    yield "INST without an end", b"\x80\x02(ios\nsys"
    yield "STACK_GLOBAL alone", proto + short("os") + short("system") + b"\x93."
    yield "REDUCE on numbers", proto + b"}(K\x01K\x02R."
    yield "OBJ on nothing", proto + b"(o."
    yield "PERSID", b"\x80\x02Pcpu\n."
    yield "PERSID without an end", b"\x80\x02P"
    yield "BINPERSID", b"\x80\x02" + text("cpu") + b"Q."
    yield "NEXT_BUFFER", b"\x80\x05\x97."
    yield "READONLY_BUFFER", b"\x80\x05" + short("x") + b"\x98."
    for code in b"\x82\x83\x84":
        yield "EXT %x without an end" % code, b"\x80\x02" + bytes([code])


def memory_bombs():
    """(what, bytes, reason) of what makes an unpickler reserve or build far more than it got."""
    four, eight = struct.Struct("<I").pack, struct.Struct("<Q").pack
    yield "nine bytes for 4 GiB", bytes.fromhex("80025d72000000102e"), NOT_FLAT
    yield "LONG_BINPUT 2**32-1 alone", b"\x80\x02}r\xff\xff\xff\xff.", "cpu"
    yield "LONG_BINPUT 2**31", b"\x80\x02}r" + four(1 << 31) + b".", "cpu"
    yield "LONG_BINGET of nothing", b"\x80\x02}j\xff\xff\xff\xff.", NOT_FLAT
    for name, code in (
        ("BINUNICODE8", b"\x8d"),
        ("BINBYTES8", b"\x8e"),
        ("BYTEARRAY8", b"\x96"),
    ):
        for size in (1 << 62, (1 << 64) - 1, 1 << 40, 1 << 32, 300):
            yield "%s of %d" % (name, size), b"\x80\x05}" + code + eight(size), NOT_FLAT
        yield name + " without its length", b"\x80\x05}" + code, NOT_FLAT
    for name, code in (("BINBYTES", b"B"), ("BINSTRING", b"T"), ("LONG4", b"\x8b")):
        for size in ((1 << 32) - 1, (1 << 31) - 1, 1 << 31, 1 << 20):
            yield "%s of %d" % (name, size), b"\x80\x03}" + code + four(size), NOT_FLAT
    for size in ((1 << 32) - 1, (1 << 31) - 1, 1 << 20, 16385, 256):
        yield "BINUNICODE of %d" % size, b"\x80\x02}" + text("x", size), "255"
    for size in ((1 << 64) - 1, 1 << 63, 1 << 40, 1 << 32, 16385):
        yield "FRAME of %d" % size, b"\x80\x04\x95" + eight(size), NOT_FLAT + "|16384"
    for what, code in (
        ("lists", b"]"),
        ("marks", b"("),
        ("dicts", b"}"),
        ("tuples", b")"),
    ):
        yield "8,000 " + what, b"\x80\x02" + code * 8000, NOT_FLAT
        yield "8,000 %s in a dict" % what, b"\x80\x02}(" + code * 8000, NOT_FLAT
    yield "a tuple nested 8,000 deep", b"\x80\x02)" + b"\x85" * 8000 + b".", NOT_FLAT
    nested = {}
    for _ in range(300):
        nested = {"a": nested}
    yield "dicts nested 300 deep", pickle.dumps(nested, 2), NOT_FLAT
    yield (
        "tuples doubled 60 times",
        b"\x80\x02K\x01q\0" + b"h\0h\0\x86q\0" * 60 + b".",
        NOT_FLAT,
    )
    yield (
        "lists doubled 60 times",
        b"\x80\x02]q\0" + b"](h\0h\0eq\0" * 60 + b".",
        NOT_FLAT,
    )
    yield "a dict in itself", b"\x80\x02}q\0" + text("a") + b"h\0s.", NOT_FLAT
    yield "DUP 8,000 times", b"\x80\x02K\x01" + b"2" * 8000, NOT_FLAT
    yield "an int of 9,000 digits", b"\x80\x02L" + b"9" * 9000 + b"L\n.", NOT_FLAT
    yield (
        "an int of 255 bytes",
        b"\x80\x02}(" + CPU + RAM + short("x") + (b"\x8a\xff" + b"\x7f" * 255 + b"u."),
        "64 bits|at most 8",
    )
    yield (
        "the same text 8,000 times",
        b"\x80\x04}(" + short("a") + b"\x94" + b"h\0" * 8000,
        ("opcodes"),
    )
    yield "16 KiB of None", b"\x80\x02}(" + b"N" * 16500, "opcodes"
    yield "a pickle that only memoizes", b"\x80\x02}" + b"q\0" * 9000, "opcodes"
    yield "protocols without end", b"\x80\x02" * 9000, "opcode"
    yield "frames without end", b"\x80\x04" + (b"\x95" + eight(0)) * 2000, "opcodes"


def past_limits():
    """(what, bytes, reason) of samples one past each limit, or with what JSON cannot say."""

    def dumped(**changes):
        return pickle.dumps({**{"cpu": 1, "ram": 1}, **changes}, 2)

    many = {"k%d" % number: 1 for number in range(MAX_KEYS - 1)}
    yield "16,385 bytes", of_size(MAX_SAMPLE + 1), "16384"
    yield "65 keys", dumped(**many), "64 keys"
    yield (
        "65 keys one by one",
        b"\x80\x04}"
        + b"".join(short("k%d" % number) + b"Ns" for number in range(65))
        + b".",
        "64 keys",
    )
    yield "256 bytes of text", dumped(node="x" * 256), "255"
    yield (
        "256 bytes of 4-byte characters",
        sample(short("node") + text("\U0001f600" * 64)),
        "255",
    )
    yield "a key of 256 bytes", dumped(**{"k" * 256: 1}), "255"
    yield "2**63", dumped(x=2**63), "64 bits|at most 8"
    yield "-2**63 - 1", dumped(x=-(2**63) - 1), "64 bits|at most 8"
    for name, value in (("NaN", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        for key in ("cpu", "ram", "load1", "unknown"):
            yield "%s as %s" % (name, key), dumped(**{key: value}), "finite"
    yield "a signalling NaN", sample(short("x") + b"G\x7f\xf0\0\0\0\0\0\1"), "finite"
    for key in ("cpu", "ram"):
        for value in (
            True,
            False,
            None,
            "50",
            -1,
            101,
            100.00000000000001,
            -5e-324,
            1 << 62,
        ):
            yield (
                "%s is %r" % (key, value),
                dumped(**{key: value}),
                ("%s must be a number from 0 to 100" % key),
            )
        rest = {name: 1 for name in ("cpu", "ram", "load1") if name != key}
        yield "no " + key, pickle.dumps(rest, 2), key + ".*missing"
    yield "nothing", b"\x80\x02}.", "cpu.*missing"
    for what, raw in (
        ("a lone surrogate", "\ud800"),
        ("a lone low surrogate", "a\udfff"),
        ("surrogates in pairs", "\ud83d\ude00"),
    ):
        yield what, sample(short("node") + short(raw)), "UTF-8"
        yield what + " in a long text", sample(short("node") + text(raw)), "UTF-8"
        yield what + " as key", sample(short(raw) + b"N"), "UTF-8"
    for raw in (b"\xff", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"ok\x80"):
        yield (
            "text of %r" % raw,
            sample(short("node") + b"\x8c" + bytes([len(raw)]) + raw),
            "UTF-8",
        )
        yield (
            "long text of %r" % raw,
            sample(short("node") + b"X" + struct.pack("<I", len(raw)) + raw),
            "UTF-8",
        )
    for number in (0, 1, 6, 255):
        yield (
            "protocol %d by name" % number,
            b"\x80" + bytes([number]) + sample()[2:],
            "protocol",
        )


def from_the_memo():
    """(what, bytes, reason) of values that no pickler memoizes: a shape would not know them."""
    for name, code in (
        ("a float", real(15.5)),
        ("an int", b"K\x05"),
        ("None", b"N"),
        ("True", b"\x88"),
        ("a big int", b"\x8a\x01\x05"),
    ):
        yield (
            name + " from the memo",
            b"\x80\x04}(" + short("cpu") + code + b"\x94" + short("ram") + b"h\0u.",
            NOT_FLAT,
        )
        yield (
            name + " from a huge index",
            b"\x80\x04}("
            + short("cpu")
            + code
            + (b"r\xff\xff\xff\xff" + short("ram") + b"j\xff\xff\xff\xffu."),
            NOT_FLAT,
        )


def other_shapes():
    """(what, bytes, reason) of pickles of something else than a flat dict, and broken ones."""
    for protocol in (2, 4):
        for value in (
            [1],
            (1, 2),
            1,
            "text",
            None,
            {1: 2},
            {None: 1},
            {"a": [1]},
            {"a": {}},
            {"a": b"x"},
            {"a": 1j},
            {"cpu", "ram"},
            {"a": (1,)},
            {b"a": 1},
            {1.5: 1},
        ):
            yield (
                "%r in protocol %d" % (value, protocol),
                pickle.dumps(value, protocol),
                (NOT_FLAT + "|not text"),
            )
    for protocol in (0, 1):
        yield (
            "protocol %d" % protocol,
            pickle.dumps({"cpu": 1, "ram": 1}, protocol),
            "protocol",
        )
    yield "a value without a key", b"\x80\x02}(" + CPU + b"K\x01u.", "not text"
    yield "two dicts", b"\x80\x02}}.", NOT_FLAT
    yield "two marks", b"\x80\x02}((" + CPU + b"u.", NOT_FLAT
    yield "items without a mark", b"\x80\x02}" + CPU + b"u.", NOT_FLAT
    yield "one item within a mark", b"\x80\x02}(" + CPU + b"s.", NOT_FLAT
    yield "a stop within a mark", b"\x80\x02}(.", NOT_FLAT
    yield "a stop before the dict", b"\x80\x02.", NOT_FLAT
    yield "a stop with a value left", b"\x80\x02}K\x01.", NOT_FLAT
    yield "the memo before it is filled", b"\x80\x02}h\0.", NOT_FLAT
    yield "POP", b"\x80\x02}0.", NOT_FLAT
    yield "POP_MARK", b"\x80\x02}(1.", NOT_FLAT
    yield "numbers as text", b"\x80\x02}(" + text("cpu") + b"I15\nu.", NOT_FLAT
    yield "a float as text", b"\x80\x02}(" + text("cpu") + b"F15\nu.", NOT_FLAT


def client_hello():
    """What a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        ssl.create_default_context().wrap_bio(
            incoming, outgoing, server_hostname="localhost"
        ).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def other_protocols():
    """(what, bytes, reason) of programs that think that something else listens here."""
    for method in (
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "DELETE",
        "OPTIONS",
        "PATCH",
        "TRACE",
        "CONNECT",
    ):
        yield (
            method,
            b"%s / HTTP/1.1\r\nHost: localhost\r\n\r\n" % method.encode(),
            "HTTP",
        )
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP"
    yield "a TLS hello", client_hello(), "TLS"
    yield "half a TLS hello", client_hello()[:20], "TLS"
    yield "SSH", b"SSH-2.0-OpenSSH_9.2\r\n", "no pickle"
    yield "Redis", b"*1\r\n$4\r\nPING\r\n", "no pickle"
    yield (
        "a list of JSON",
        b'[{"cpu": 15.5, "ram": 40.2}]\n',
        "no pickle.*no JSON object",
    )
    yield "a text of JSON", b'"cpu"\n', "no pickle.*no JSON object"
    yield "JSON behind a blank", b' {"cpu": 15.5, "ram": 40.2}\n', "no JSON object"
    yield "JSON behind a mark", b'\xef\xbb\xbf{"cpu": 1, "ram": 1}\n', "no JSON object"
    yield "a lot of zeros", bytes(20000), "no pickle"
    rng = random.Random(7)
    yield "noise", b"\x13" + bytes(rng.randrange(256) for _ in range(5000)), "no pickle"


# ---- lines of JSON


def line(*pairs):
    """A line of JSON with cpu, ram and these pairs, each as it is written."""
    good = ('"cpu": 15.5', '"ram": 40.25')
    return ("{%s}\n" % ", ".join(good + pairs)).encode("utf-8", "surrogatepass")


def line_of_size(size):
    """A valid line of that many bytes exactly, with its newline."""
    return line()[:-2] + b" " * (size - len(line())) + b"}\n"


def lines_past_limits():
    """(what, line, reason) of lines one past each limit, or with what a pickle cannot say."""
    yield "a line of 16,385 bytes", line_of_size(MAX_SAMPLE + 1), "16384"
    yield "a line without an end", line()[:-1] + b" " * MAX_SAMPLE, "16384"
    yield "a text without an end", b'{"cpu": "' + b"x" * MAX_SAMPLE, "16384"
    many = ['"k%d": 1' % number for number in range(MAX_KEYS - 1)]
    yield "a line of 65 keys", line(*many), "64 keys"
    yield "a line of 3,000 keys", line(*['"%d":1' % n for n in range(1500)]), "64 keys"
    long = '"%s"' % ("x" * (MAX_TEXT + 1))
    yield "a line with 256 bytes of text", line('"node": ' + long), "255"
    yield "a line with a key of 256 bytes", line(long + ": 1"), "255"
    yield "256 bytes in escapes", line('"node": "%s"' % (r"\u00e9" * 128)), "255"
    yield "256 bytes in pairs", line('"node": "%s"' % (r"\ud83d\ude00" * 64)), "255"
    yield "7,500 escapes", line('"node": "%s"' % (r"\n" * 7500)), "255"
    for number in ("%d" % 2**63, "%d" % (-(2**63) - 1), "9" * 40, "-" + "9" * 9000):
        yield "%.30s... in a line" % number, line('"x": ' + number), "64 bits"
    for number in ("1e999", "-1e999", "1" * 400 + ".5"):
        yield "%.9s... in a line" % number, line('"x": ' + number), "finite"
    for word in ("NaN", "Infinity", "-Infinity", "nan", "True", "None", "undefined"):
        yield "the word " + word, line('"x": ' + word), NOT_FLAT
    for key in ("cpu", "node", r"\u0063pu"):
        pair = '"%s": 1' % key
        yield "the key %s twice" % key, line(pair, pair), "twice"
    for key, value in (
        ("cpu", "true"),
        ("ram", "101"),
        ("cpu", '"5"'),
        ("ram", "null"),
    ):
        other = {"cpu": "ram", "ram": "cpu"}[key]
        yield (
            "a line whose %s is %s" % (key, value),
            ('{"%s": %s, "%s": 1}\n' % (key, value, other)).encode(),
            "%s must be a number from 0 to 100" % key,
        )
    yield "an empty object", b"{}\n", "cpu.*missing"
    yield "an object of blanks", b"{ \t }\n", "cpu.*missing"
    yield "a line without ram", b'{"cpu": 1}\n', "ram.*missing"
    for what, pair in (
        ("half a pair of escapes", r'"node": "\ud83d"'),
        ("a low half alone", r'"node": "a\ude00b"'),
        ("half a pair as key", r'"\ud83d": 1'),
        ("a surrogate as bytes", '"node": "\ud800"'),
    ):
        yield what + " in a line", line(pair), "UTF-8"
    for raw in (b"\xff", b"\xc0\x80", b"\xe2\x82", b"ok\x80"):
        yield "a line with %r" % raw, line('"node": "%"').replace(b"%", raw), "UTF-8"


def other_lines():
    """(what, line, reason) of lines of something else than a flat object, and broken ones."""
    for depth in (1, 50, 900, 8000):
        lists = "[" * depth + "]" * depth
        dicts = '{"a":' * (depth // 3) + "{}" + "}" * (depth // 3)
        yield "lists nested %d deep" % depth, line('"a": ' + lists), NOT_FLAT
        yield "objects nested %d deep" % depth, line('"a": ' + dicts), NOT_FLAT
    yield "only braces", b"{" * 8000 + b"\n", NOT_FLAT
    yield "lists without an end", line('"a": ' + "[" * 8000), NOT_FLAT
    for what, text_ in (
        ("a comma at the end", '{"cpu": 1, "ram": 1,}'),
        ("a comma at the start", '{, "cpu": 1, "ram": 1}'),
        ("two commas", '{"cpu": 1,, "ram": 1}'),
        ("no comma", '{"cpu": 1 "ram": 1}'),
        ("no colon", '{"cpu" 1, "ram": 1}'),
        ("no value", '{"cpu": , "ram": 1}'),
        ("no end", '{"cpu": 1, "ram": 1'),
        ("two objects in a line", '{"cpu": 1, "ram": 1} {"cpu": 1, "ram": 1}'),
        ("something behind it", '{"cpu": 1, "ram": 1};'),
        ("single quotes", "{'cpu': 1, 'ram': 1}"),
        ("a bare key", "{cpu: 1, ram: 1}"),
        ("a number as key", '{1: 1, "cpu": 1, "ram": 1}'),
        ("a zero in front", '{"cpu": 01, "ram": 1}'),
        ("a plus", '{"cpu": +1, "ram": 1}'),
        ("a point without digits", '{"cpu": 1., "ram": 1}'),
        ("no digit before the point", '{"cpu": .5, "ram": 1}'),
        ("a hexadecimal number", '{"cpu": 0x1, "ram": 1}'),
        ("an Arabic digit", '{"cpu": \u0661, "ram": 1}'),
        ("a comment", '{"cpu": 1, /* all */ "ram": 1}'),
        ("an escape that there is not", r'{"cpu": 1, "ram": 1, "node": "\x41"}'),
        ("half an escape", r'{"cpu": 1, "ram": 1, "node": "\u00"}'),
        ("a backslash at the end", '{"cpu": 1, "ram": 1, "node": "\\"}'),
        ("a control character", '{"cpu": 1, "ram": 1, "node": "\x1b[2J"}'),
        ("a NUL", '{"cpu": 1, "ram": 1, "node": "\0"}'),
        ("a tab in a text", '{"cpu": 1, "ram": 1, "node": "\t"}'),
        ("a foreign blank", '{\u00a0"cpu": 1, "ram": 1}'),
        ("a form feed", '{"cpu": 1,\f"ram": 1}'),
    ):
        yield what + " in a line", text_.encode() + b"\n", NOT_FLAT
    yield "a pickle in braces", b"{" + sample() + b"\n", "UTF-8|" + NOT_FLAT


def harmless_lines():
    """[(what, line)] at each limit exactly, or odd: each is a sample."""
    many = ['"k%d": 1' % number for number in range(MAX_KEYS - 2)]
    return [
        ("a line of 16,384 bytes", line_of_size(MAX_SAMPLE)),
        ("a line of 64 keys", line(*many)),
        ("a line with 255 bytes", line('"node": "%s"' % ("\u20ac" * 85))),
        ("255 bytes in escapes", line('"node": "%s"' % (r"\u20ac" * 85))),
        ("a line with a key of 255 bytes", line('"%s": null' % ("k" * MAX_TEXT))),
        ("2**63 - 1 in a line", line('"x": %d' % (2**63 - 1), '"y": %d' % -(2**63))),
        ("floats in a line", line('"x": 1.7976931348623157e308', '"y": -5E-324')),
        ("a float of 9,000 digits", line('"x": 0.%s1' % ("0" * 9000))),
        ("constants", line('"a": null', '"ack": false', '"b": true')),
        ("escapes", line(r'"node": "\"\\\/\b\f\n\r\t\u0000\u00e9\ud83d\ude00{}[],:"')),
        ("a text of digits", line('"job": "%s"' % ("9" * 40))),
        ("no blanks", b'{"cpu":0,"ram":100,"node":"c1"}\n'),
        ("many blanks", b'{\t"cpu" :\r1 , "ram"\t: 1 } \r\n'),
    ]


def hostile(path="/nonexistent/sentinel"):
    """[(what, bytes, pattern of the reason)]: each must be refused, with that reason."""
    table = [
        ("runs code: " + what, data, NOT_FLAT + "|no pickle")
        for what, data in running_code(path)
    ]
    table += [
        ("makes objects: " + what, data, NOT_FLAT) for what, data in making_objects()
    ]
    for part in (
        memory_bombs,
        past_limits,
        from_the_memo,
        other_shapes,
        other_protocols,
        lines_past_limits,
        other_lines,
    ):
        table += part()
    names = [what for what, _, _ in table]
    assert len(set(names)) == len(names), sorted(names)
    return table


def harmless():
    """[(what, bytes)] at each limit exactly, or odd: each is a sample."""
    full = dict(
        {"k%d" % number: number for number in range(MAX_KEYS - 2)}, cpu=1, ram=1
    )
    table = [
        ("16,384 bytes", of_size(MAX_SAMPLE)),
        ("64 keys", pickle.dumps(full, 4)),
        ("255 bytes of text", sample(short("node") + short("x" * 255))),
        (
            "255 bytes of 3-byte characters",
            sample(short("node") + short("\u20ac" * 85)),
        ),
        ("a key of 255 bytes", sample(short("é" * 127 + "x") + b"N")),
        ("2**63 - 1", pickle.dumps({"cpu": 1, "ram": 1, "x": 2**63 - 1}, 2)),
        ("-2**63", pickle.dumps({"cpu": 1, "ram": 1, "x": -(2**63)}, 2)),
        ("the largest float", sample(short("x") + real(sys.float_info.max))),
        ("the smallest float", sample(short("x") + real(5e-324))),
        ("0 and 100", pickle.dumps({"cpu": 0, "ram": 100}, 3)),
        ("-0.0 and 100.0", pickle.dumps({"cpu": -0.0, "ram": 100.0}, 5)),
        (
            "a huge index of the memo",
            sample(
                short("node") + short("n") + b"r\xff\xff\xff\xff",
                short("user") + b"j\xff\xff\xff\xff",
            ),
        ),
        (
            "a key from the memo",
            sample(
                short("node") + b"\x94" + short("a") + b"\x94", short("user") + b"h\1"
            ),
        ),
        ("a key twice", sample(short("cpu") + b"K\x07")),
        ("items one by one", b"\x80\x02}" + CPU + b"s" + RAM + b"s."),
        ("items in two parts", b"\x80\x02}(" + CPU + b"u(" + RAM + b"u."),
        ("no items, then some", b"\x80\x02}(u(" + CPU + RAM + b"u."),
        (
            "a frame",
            b"\x80\x04\x95" + struct.pack("<Q", len(sample()) - 2) + sample()[2:],
        ),
    ]
    for protocol in (2, 3, 4, 5):
        if protocol <= pickle.HIGHEST_PROTOCOL:
            table.append(
                (
                    "everything, protocol %d" % protocol,
                    pickle.dumps(
                        {
                            "cpu": 15.5,
                            "ram": 40.2,
                            "node": "c1",
                            "job": "4711",
                            "ack": True,
                            "no": False,
                            "none": None,
                            "byte": 200,
                            "two": 60000,
                            "four": -5,
                            "long": 2**40,
                            "user": "ünï",
                            "version": "1.0",
                            "interval": 2.0,
                        },
                        protocol,
                    ),
                )
            )
    return table


# ==========================================================================================
# Decoder
# ==========================================================================================


def outcome(data):
    """What the collector makes of bytes: "sample", "incomplete" or the reason; nothing else."""
    try:
        parsed = parse_message(data)
        if parsed is None:
            return "incomplete"
        check_sample(parsed[0])
    except WireError as error:
        return str(error)
    return "sample"


def slowly_unpickled(data):
    """What the standard library makes of a pickle, without the C unpickler's appetite."""
    return pickle._Unpickler(io.BytesIO(data)).load()


class Decoder(unittest.TestCase):
    """Bytes in; a flat dict, None while it is incomplete, or the one error out."""

    def test_it_says_what_pickle_says_of_every_flat_dict(self):
        for what, data in harmless():
            with self.subTest(what):
                result, size, _ = parse_pickle(data)
                expected = slowly_unpickled(data)
                self.assertEqual(
                    (list(result.items()), size), (list(expected.items()), len(data))
                )
                self.assertEqual(
                    [type(value) for value in result.values()],
                    [type(value) for value in expected.values()],
                )
                self.assertEqual(outcome(data), "sample")

    def test_a_line_says_what_json_says_of_it(self):
        for what, data in harmless_lines():
            with self.subTest(what):
                result, size, floats = parse_message(data)
                expected = json.loads(data.decode())
                self.assertEqual(repr(result), repr(expected))
                self.assertEqual((size, floats), (len(data), ()))
                self.assertEqual(outcome(data), "sample")

    def test_no_pickle_begins_as_a_line_does(self):
        for opcode in pickletools.opcodes:
            self.assertNotEqual(opcode.code, "{", opcode.name)

    def test_what_follows_a_line_is_left_for_the_next_one(self):
        for rest in (line(), b"{", b"\n", sample(), b"\xff" * 20000):
            result, size, _ = parse_message(line('"node": "c1"') + rest)
            self.assertEqual(result, {"cpu": 15.5, "ram": 40.25, "node": "c1"})
            self.assertEqual(size, len(line('"node": "c1"')))

    def test_a_line_takes_no_time_whatever_is_in_it(self):
        long = b"x" * 16000
        for what, data in (
            ("escapes", b'{"' + rb"\"" * 8000 + b"\n"),
            ("blanks", b'{"cpu"' + b" " * 16000 + b"\n"),
            ("blanks without a text", b"{" + b" \t" * 8000 + b"\n"),
            ("digits", b'{"cpu":' + b"1" * 16000 + b"x\n"),
            ("a fraction", b'{"cpu":0.' + b"1" * 16000 + b"x\n"),
            ("an exponent", b'{"cpu":1e' + b"1" * 16000 + b"\n"),
            ("two texts", b'{"' + long[:8000] + b'":"' + long[:8000] + b'"x\n'),
            ("quotes", b'{"' + b'"' * 16000 + b"\n"),
        ):
            with self.subTest(what):
                start = time.process_time()
                self.assertRegex(outcome(data), NOT_FLAT + "|finite|64 bits|255")
                self.assertLess(time.process_time() - start, 0.1)

    def test_every_beginning_of_a_sample_is_incomplete(self):
        for what, data in harmless() + harmless_lines():
            with self.subTest(what):
                step = 1 if len(data) < 1000 else 41
                for end in range(1, len(data), step):
                    self.assertIsNone(parse_message(data[:end]), end)

    def test_what_follows_a_sample_is_left_for_the_next_one(self):
        first, second = sample(), pickle.dumps({"cpu": 1, "ram": 2}, 2)
        for rest in (second, second[:1], b"GET / HTTP/1.1\r\n", b"\0" * 20000):
            result, size, _ = parse_pickle(first + rest)
            self.assertEqual((result["cpu"], size), (15.5, len(first)))

    def test_each_hostile_input_has_its_reason_and_so_has_all_that_begins_with_it(self):
        for what, data, reason in hostile():
            with self.subTest(what):
                said = outcome(data)
                self.assertRegex(said, reason)
                self.assertLess(len(said), 200)
                self.assertTrue(said.isprintable() and said.isascii(), said)
                if "cpu" not in reason and "ram" not in reason:
                    for more in (b".", b"\0" * 100, sample()):
                        self.assertRegex(outcome(data + more), reason)

    def test_no_opcode_but_those_of_a_flat_dict_gets_past_the_decoder(self):
        for opcode in pickletools.opcodes:
            if opcode.name in ALLOWED:
                continue
            code = opcode.code.encode("latin-1")
            for before in (
                b"\x80\x04",
                b"\x80\x04}",
                b"\x80\x04}(",
                b"\x80\x04}(K\x01K\x02",
                b"\x80\x04}(" + CPU,
                sample()[:-1],
            ):
                for after in (b"", b"\0" * 40, b"os\nsystem\n.", b"\xff" * 9):
                    with self.subTest(opcode.name, before=before, after=after):
                        self.assertRegex(outcome(before + code + after), NOT_FLAT)

    def test_bytes_that_are_no_opcode_at_all_are_refused_too(self):
        known = {ord(opcode.code) for opcode in pickletools.opcodes}
        for code in set(range(256)) - known:
            with self.subTest(code):
                self.assertRegex(outcome(b"\x80\x04}" + bytes([code])), NOT_FLAT)

    def test_what_can_be_no_sample_any_more_is_refused_at_16_kib_at_the_latest(self):
        endless = (
            b"\x80\x04}(" + short("k") + b"X" + struct.pack("<I", 255) + b"x" * 255
        )
        endless += b"".join(
            short("k%d" % number) + short("x" * 255) for number in range(80)
        )
        self.assertEqual(outcome(endless[:5000]), "incomplete")
        for size in (MAX_SAMPLE, MAX_SAMPLE + 1, len(endless)):
            self.assertRegex(outcome(endless[:size]), "16384")

    def test_check_sample_keeps_what_is_known_and_drops_what_has_the_wrong_type(self):
        message = {
            "cpu": 1,
            "ram": 2.5,
            "node": 7,
            "job": None,
            "load1": "high",
            "cpus": True,
            "user": 1.5,
            "swap": 0,
            "whatever": 5,
            "ack": True,
            "job_name": "",
            "version": "1\n2\x1b[0m\u202e\x9b",
        }
        self.assertEqual(
            known(check_sample(message)),
            {
                "cpu": 1.0,
                "ram": 2.5,
                "swap": 0.0,
                "version": "1\ufffd2\ufffd[0m\ufffd\ufffd",
            },
        )

    def test_check_auth_takes_the_right_answer_alone(self):
        secret, nonce = b"open sesame", "a1b2c3"
        right = hmac.new(secret, nonce.encode(), "sha256").hexdigest()
        with mock.patch("hmac.compare_digest", wraps=hmac.compare_digest) as compare:
            self.assertIsNone(master_server.check_auth({"auth": right}, secret, nonce))
        self.assertEqual(compare.call_count, 1, "in constant time")
        for what, answer in (
            ("wrong", "0" * 64),
            ("short", right[:-1]),
            ("upper case", right.upper()),
            ("not ASCII", "é" * 64),
            ("empty", ""),
        ):
            with self.subTest(what), self.assertRaisesRegex(WireError, "wrong secret"):
                master_server.check_auth({"auth": answer}, secret, nonce)
        for answer in (None, True, 5, 1.5):
            with self.subTest(answer), self.assertRaisesRegex(
                WireError, "--secret-file"
            ):
                master_server.check_auth({"auth": answer}, secret, nonce)


# ==========================================================================================
# Shapes: the short way for samples that differ in their floats alone
# ==========================================================================================

ODD_FLOATS = (
    0.0,
    -0.0,
    1.5,
    50.0,
    99.25,
    100.0,
    101.0,
    -1.0,
    5e-324,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    struct.unpack(">d", b"\x7f\xf0\0\0\0\0\0\1")[0],
)


def known(row):
    """What a row knows, as a dict with its types."""
    values = {
        key: master_server.from_field(value)
        for key, value in zip(master_server.INDEX, row)
    }
    return {key: value for key, value in values.items() if value is not None}


def shape_of(data):
    """(the shape that the collector keeps of a sample or None, the sample's size)."""
    message, size, floats = parse_pickle(data)
    if "bye" in message or "auth" in message:
        return None, size
    try:
        return make_shape(data[:size], message, check_sample(message), floats), size
    except WireError:
        return None, size


def shape_differs(data, rng):
    """What is wrong with what the short way says of samples like data; "" when nothing is."""
    shape, size = shape_of(data)
    if not shape:
        return ""
    changed = bytearray(data[:size])
    for at, _ in parse_pickle(data)[2]:
        changed[at : at + 8] = struct.pack(">d", rng.choice(ODD_FLOATS))
    flipped = bytearray(changed)
    flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
    for other in (
        data[:size],
        bytes(changed),
        bytes(flipped),
        data,
        data[:size] + b".",
        data[: size - 1],
    ):
        said = parse_shape(other, shape)
        if said is None:
            continue
        try:
            parsed = parse_pickle(other)
            checked = check_sample(parsed[0])
        except WireError as error:
            return "takes %r, which is refused: %s" % (other, error)
        if parsed[1] != len(other) or repr(said) != repr(checked):
            return "says %r of %r, and the decoder %r" % (said, other, checked)
    return ""


def same(one, other):
    """Whether two dicts hold the same values of the same types."""
    return sorted(map(repr, one.items())) == sorted(map(repr, other.items()))


class Shapes(unittest.TestCase):
    """parse_shape takes nothing that parse_pickle refuses, and says nothing else of it."""

    @support.slow("fuzzing")
    def test_a_shape_never_says_anything_else_than_the_decoder(self):
        rng = random.Random(4)
        odd = [
            ("a float twice", sample(short("cpu") + real(1.25))),
            ("ack as a float", sample(short("ack") + real(1.5))),
            ("a text as a float", sample(short("node") + real(1.5))),
            ("a float, then an int", sample(short("cpu") + b"K\x05")),
            (
                "an int, then a float",
                sample(short("x") + b"K\x05", short("x") + real(1.0)),
            ),
            (
                "a key from the memo",
                b"\x80\x04}("
                + short("cpu")
                + b"\x94"
                + real(1)
                + short("ram")
                + real(2)
                + b"h\0"
                + real(3)
                + b"u.",
            ),
            (
                "bytes of a float that look like opcodes",
                sample(short("x") + b"G" + b"u.G(u.}."),
            ),
        ]
        for what, data in harmless() + odd:
            with self.subTest(what):
                for _ in range(200):
                    self.assertEqual(shape_differs(data, rng), "")

    def test_a_line_has_no_shape(self):
        message, size, floats = parse_line(line())
        row = check_sample(message)
        self.assertIsNone(make_shape(line()[:size], message, row, floats))

    def test_an_agents_samples_do_go_the_short_way(self):
        for protocol in (2, 4):
            data = pickle.dumps(
                {"cpu": 15.5, "ram": 40.2, "node": "c1", "load1": 0.5}, protocol
            )
            after = pickle.dumps(
                {"cpu": 16.5, "ram": 41.2, "node": "c1", "load1": 1e9}, protocol
            )
            said = parse_shape(after, shape_of(data)[0])
            self.assertEqual(known(said), pickle.loads(after))


def framed(*items, frame=100):
    """A dict of these encoded items, as CPython's pickler begins and ends one."""
    begin = b"\x80\x04\x95" + struct.pack("<Q", frame) + b"}\x94("
    return begin + b"".join(items) + b"u."


def memoized(value):
    """A text as CPython's pickler writes it."""
    return short(value) + b"\x94"


def differs(data):
    """What is wrong with what parse_usual() says of data; "" when nothing is."""
    usual = parse_usual(data)
    if usual is None:
        return ""
    try:
        right = parse_opcodes(data)
    except WireError as error:
        return "takes %r, which is refused: %s" % (data, error)
    if repr(usual) != repr(right):
        return "says %r of %r, and the decoder %r" % (usual, data, right)
    return ""


TOLD = {  # values of all kinds and sizes that an agent sends
    "part": "rank",
    "rank": 0,
    "pid": 40000,
    "threads": 255,
    "running": 256,
    "mem": 1 << 31,
    "read_total": MAX_SAMPLE << 40,
    "gpu": -1,
    "look": 65535,
    "cpu": 180.5,
    "ram": -0.0,
    "program": "",
    "cpus": "0-1",
    "on": "\u00e9\u4e00",
    "state": "rank",  # a text that the memo has
    "program2": "x" * MAX_TEXT,
}


class Usual(unittest.TestCase):
    """parse_usual() takes nothing that parse_opcodes() refuses, and says nothing else of it."""

    def test_what_an_agent_tells_goes_the_short_way(self):
        data = pickle.dumps(TOLD, protocol=4)
        result, size, floats = parse_usual(data + b"\x80")
        self.assertEqual((result, list(result)), (TOLD, list(TOLD)))
        self.assertEqual(size, len(data))
        self.assertEqual([key for _, key in floats], ["cpu", "ram"])

    def test_a_dict_from_its_beginning_to_its_end_and_with_each_bit_flipped(self):
        data = pickle.dumps(TOLD, protocol=4)
        for end in range(1, len(data)):
            self.assertIsNone(parse_usual(data[:end]), end)
        for at in range(len(data)):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                self.assertEqual(differs(bytes(flipped)), "")

    def test_nothing_that_is_odd_or_hostile_is_taken_for_what_it_is_not(self):
        one = memoized("cpu") + real(1.0)
        many = [memoized("k%d" % number) + real(1.0) for number in range(MAX_KEYS + 1)]
        long = [memoized("k%d" % number) + memoized("x" * 250) for number in range(64)]
        for what, data in (
            ("a frame that is too long", framed(one, frame=MAX_SAMPLE + 1)),
            ("a key twice", framed(one, one)),
            ("a float that is not finite", framed(memoized("cpu") + real(math.inf))),
            (
                "an integer of nine bytes",
                framed(memoized("k") + b"\x8a\x09" + bytes(9)),
            ),
            ("a number for a key", framed(b"K\x05" + real(1.0))),
            ("a key without a value", framed(one, memoized("ram"))),
            ("the dict itself, by the memo", framed(memoized("k") + b"h\0")),
            ("what the memo has not", framed(memoized("k") + b"h\x09")),
            ("a text that is not UTF-8", framed(b"\x8c\x01\xff\x94" + real(1.0))),
            ("a text that is not kept", framed(short("cpu") + real(1.0))),
            ("too many keys", framed(*many)),
            ("more than a sample may take", framed(*long)),
            ("no dict", b"\x80\x04\x95" + bytes(8) + b"]\x94(" + one + b"u."),
            ("another protocol", b"\x80\x06" + framed(one)[2:]),
        ):
            with self.subTest(what):
                self.assertIsNone(parse_usual(data))
        for what, data in everything_refused_and_taken():
            with self.subTest(what):
                self.assertEqual(differs(data), "")


def everything_refused_and_taken():
    """The tables of hostile and of harmless pickles."""
    return [(what, data) for what, data, _ in hostile()] + list(harmless())


# ==========================================================================================
# Memory: each hostile input in a process of its own, under RLIMIT_AS
# ==========================================================================================


def peak():
    """The most memory that this process ever had resident, in KiB (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_one(decode, data):
    """Decode under RLIMIT_AS and return (outcome, KiB by which the peak rose)."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    before = peak()
    try:
        said = decode(data)
    except BaseException as error:  # whatever it is, it is the outcome
        said = "%s: %s" % (type(error).__name__, error)
    return said, peak() - before


def everything():
    """Both tables: what is refused, and what is taken."""
    return hostile() + harmless() + harmless_lines()


def measure(decode=outcome, table=None):
    """[(what, outcome, KiB)] of a table, each input in a child of its own."""
    found = []
    decode(sample())  # what Python loads for the first one
    for what, data, *_ in table or everything():
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            decode(sample())
            os.write(write_end, json.dumps(measure_one(decode, data)).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as file:
            answer = file.read()
        _, status = os.waitpid(child, 0)
        found.append(
            (what, *(json.loads(answer) if answer else ("died: %d" % status, 0)))
        )
    return found


def unpickle(data):
    """What a forbidden unpickler makes of bytes: for the tests of the measurement itself."""

    class Forbidding(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError("no globals")

    Forbidding(io.BytesIO(data)).load()
    return "sample"


@requires("/proc/self/statm")
class Memory(unittest.TestCase):
    """Nothing that a peer can send makes the decoder take memory."""

    def measured(self, *words):
        done = support.run(__file__, *words, seconds=120)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return json.loads(done.stdout)

    @support.slow("a process for each input")
    def test_each_hostile_input_is_refused_within_a_mebibyte(self):
        found = self.measured("measure")
        self.assertEqual(len(found), len(everything()))
        for (what, said, rise), (_, _, *reason) in zip(found, everything()):
            with self.subTest(what):
                self.assertRegex(said, reason[0] if reason else "^sample$")
                self.assertLess(rise, PEAK)

    def test_the_measurement_sees_what_an_unpickler_would_take(self):
        found = {what: said for what, said, _ in self.measured("unpickle")}
        self.assertRegex(found["nine bytes for 4 GiB"], "MemoryError")
        self.assertRegex(found["LONG_BINPUT 2**31"], "MemoryError")

    def test_the_pickles_that_run_code_do_run_it_in_an_unpickler_and_not_here(self):
        import copyreg

        copyreg.add_extension("os", "mkdir", 0x77)
        self.addCleanup(copyreg.remove_extension, "os", "mkdir", 0x77)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "made")
            for what, data in running_code(path):
                with self.subTest(what):
                    self.assertRegex(outcome(data), NOT_FLAT + "|no pickle")
                    self.assertFalse(os.path.exists(path))
                    pickle.loads(data)
                    os.rmdir(path)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure()))
    elif sys.argv[1:] == ["unpickle"]:
        bombs = [row for row in memory_bombs() if re.search("nine|LONG_BINPUT", row[0])]
        print(json.dumps(measure(unpickle, bombs)))
    else:
        unittest.main()
