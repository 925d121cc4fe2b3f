"""A seeded mutation fuzzer for what reads a stranger's bytes: the decoder, and HTTP requests.

Every pickle has one of three outcomes: a flat dict, None while it is incomplete, or WireError;
and what holds for one holds for what it began with, what follows it, and parse_shape.  So has
every line of JSON, and a dict is what the standard library says of it, too.  Every
request is one that can be answered, or HTTPError.

SENTINEL_TEST_SEED    another seed (1)
SENTINEL_FUZZ_INPUTS  how many inputs (200,000; 4,000 unless what takes long is asked for)
"""

import json
import math
import multiprocessing
import os
import pickle
import pickletools
import random
import struct
import sys
import time
import unittest

import support
from master_server import (
    UNKNOWN,
    HTTPError,
    WireError,
    check_sample,
    parse_line,
    parse_pickle,
    parse_request,
)
from test_wire import (
    harmless,
    harmless_lines,
    hostile,
    line,
    real,
    same,
    shape_differs,
    short,
    slowly_unpickled,
)

SEED = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
INPUTS = int(
    os.environ.get("SENTINEL_FUZZ_INPUTS") or (200000 if support.LONG else 4000)
)
CODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
# what the arguments of opcodes become: the edges of every size that there is
EDGES = [
    struct.pack("<" + code, value)
    for code, values in (
        ("B", (0, 1, 2, 5, 6, 8, 9, 127, 128, 254, 255)),
        ("H", (0, 255, 256, 0xFFFF)),
        ("I", (0, 255, 256, 16384, 16385, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
        ("Q", (0, 16384, 16385, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)),
    )
    for value in values
]
EDGES += [struct.pack(">d", value) for value in (0.0, -0.0, 100.0, 100.1, -1.0, 1e308)]
EDGES += [
    b"\x7f\xf8" + bytes(6),
    b"\x7f\xf0" + bytes(6),
    b"\xff\xf0" + bytes(6),
    b"\xff" * 8,
]


# ==========================================================================================
# Mutations
# ==========================================================================================


def places(data):
    """Where the opcodes of a pickle are, as far as pickletools can tell."""
    found = [0]
    try:
        for _, _, at in pickletools.genops(data):
            found.append(at)
    except Exception:  # hostile seeds are no pickles: their first part will do
        return found
    return found


class Mutator:
    """Makes inputs out of seeds: random.Random decides, so that a seed repeats them all."""

    codes, edges, places = CODES, EDGES, staticmethod(places)

    def __init__(self, seeds, rng):
        self.rng = rng
        self.seeds = [(data, self.places(data)) for data in seeds]
        self.ways = [
            self.flip,
            self.flip,
            self.overwrite,
            self.truncate,
            self.splice,
            self.repeat,
            self.delete,
            self.edge,
            self.edge,
            self.swap,
            self.swap,
            self.insert,
        ]

    def make(self):
        """One input, one to four mutations away from a seed."""
        data, at = self.rng.choice(self.seeds)
        data = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 1, 1, 2, 2, 3))):
            self.rng.choice(self.ways)(data, at)
        return bytes(data) or b"\x80"

    def place(self, data):
        return self.rng.randrange(len(data) + 1)

    def flip(self, data, at):
        """Another bit."""
        if data:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)

    def overwrite(self, data, at):
        """Another byte."""
        if data:
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)

    def truncate(self, data, at):
        """No end."""
        del data[self.place(data) :]

    def splice(self, data, at):
        """The begin of one seed and the end of another, cut at opcodes."""
        other, there = self.rng.choice(self.seeds)
        data[self.rng.choice(at) :] = other[self.rng.choice(there) :]

    def repeat(self, data, at):
        """A part twice, or many times."""
        begin = self.place(data)
        part = bytes(data[begin : begin + self.rng.randrange(1, 40)])
        data[begin:begin] = part * self.rng.choice((1, 1, 2, 10, 300))

    def delete(self, data, at):
        """A part missing."""
        begin = self.place(data)
        del data[begin : begin + self.rng.randrange(1, 12)]

    def edge(self, data, at):
        """A length, index or number at an edge of its size, right behind an opcode."""
        begin = self.rng.choice(at) + 1
        edge = self.rng.choice(self.edges)
        data[begin : begin + len(edge)] = edge

    def swap(self, data, at):
        """Another opcode in the place of one."""
        begin = self.rng.choice(at)
        data[begin : begin + 1] = self.rng.choice(self.codes)

    def insert(self, data, at):
        """An opcode more, maybe with an argument."""
        begin = self.rng.choice(at)
        more = self.rng.choice((b"", b"", *self.edges))
        data[begin:begin] = self.rng.choice(self.codes) + more


def seeds():
    """Valid samples of every protocol and an agent's own, what was found, the hostile table."""
    agents = {
        "cpu": 15.5,
        "ram": 40.2,
        "node": "c1",
        "user": "ada",
        "job": "4711",
        "ack": True,
        "job_name": "train",
        "version": "1.0",
        "interval": 2.0,
        "load1": 0.5,
        "cpus": 64,
        "mem_total": 1 << 38,
        "mem_used": 2.5e10,
        "net_rx": 1e6,
        "procs": 512.0,
    }
    good = [pickle.dumps(agents, protocol) for protocol in (2, 3, 4)]
    good += [data for _, data in harmless() if len(data) < 2000]
    good += [
        pickle.dumps({"auth": "ab" * 32}, 2),
        pickle.dumps({"bye": "finished"}, 2),
        *FOUND,
    ]
    bad = [data for _, data, _ in hostile() if len(data) < 2000]
    return good * (8 * len(bad) // len(good)) + bad


# Pickles that once were decoded in two ways.  (Atheris, coverage-guided, found no other in 85
# minutes and 8.5 million inputs.)
FOUND = (
    # a float from the memo: the short way knew one of the two
    b"\x80\x04}(" + short("cpu") + real(1.5) + b"\x94" + short("ram") + b"h\0u.",
    # two floats whose sum is none
    b"\x80\x04}("
    + short("cpu")
    + real(1)
    + short("ram")
    + real(2)
    + short("a")
    + real(1e308)
    + short("b")
    + real(1e308)
    + b"u.",
)


# ==========================================================================================
# What must hold for any bytes
# ==========================================================================================


def result_of(data):
    """(dict, size, shape), None, or the WireError; any other exception goes through."""
    try:
        return parse_pickle(data)
    except WireError as error:
        return error


def defect(data, rng):
    """What is wrong with how an input is decoded; "" when nothing is.  And the outcome."""
    found = result_of(data)
    if found is None:
        return ("incomplete, but too long" if len(data) >= 16384 else ""), "incomplete"
    if isinstance(found, WireError):
        if not str(found).isprintable() or len(str(found)) > 200:
            return "a reason that cannot be logged: %r" % found, "refused"
        more = result_of(data + b"u.")
        return (
            "" if isinstance(more, WireError) else "refused, and then not"
        ), "refused"
    result, size, _ = found
    cut = rng.randrange(1, size)
    if result_of(data[:cut]) is not None:
        return "%d bytes of a sample are not incomplete" % cut, "dict"
    again = result_of(data[:size] + b"\x80\x02}u.")
    if not isinstance(again, tuple) or again[1] != size or not same(again[0], result):
        return "what follows changes it", "dict"
    if any(
        type(value) not in (type(None), bool, int, float, str)
        for value in result.values()
    ):
        return "a value that is not flat", "dict"
    wrong = shape_differs(data, rng)
    if wrong:
        return wrong, "dict"
    try:
        checked = check_sample(result)
    except WireError:
        return "", "dict"
    if list(map(type, checked)) != list(map(type, UNKNOWN)) or not all(
        0 <= value <= 100 for value in checked[:2]
    ):
        return "check_sample let %r through" % (checked,), "sample"
    return "", "sample"


def disagreement(data):
    """What the standard library says otherwise of an input that was taken; None if it cannot."""
    result, size, _ = parse_pickle(data)
    try:
        theirs = slowly_unpickled(data[:size])
    except (
        Exception
    ):  # a memo without a value, a wrong frame: refused there, harmless here
        return None
    return (
        ""
        if type(theirs) is dict and same(theirs, result)
        else "pickle says %r" % theirs
    )


def fuzz(seed, count):
    """(what is wrong first, {outcome: how many})."""
    rng = random.Random(seed)
    mutator = Mutator(seeds(), rng)
    outcomes = dict.fromkeys(("incomplete", "refused", "dict", "sample", "compared"), 0)
    for number in range(count):
        data = mutator.make()
        try:
            wrong, outcome = defect(data, rng)
            if outcome == "sample" and not wrong and not outcomes["sample"] % 4:
                said = disagreement(data)
                wrong, outcomes["compared"] = (
                    said or "",
                    outcomes["compared"] + (said == ""),
                )
        except Exception as error:
            wrong = "%s: %s" % (type(error).__name__, error)
        if wrong:
            return "seed %d, input %d: %s\n%r" % (seed, number, wrong, data), outcomes
        outcomes[outcome] += 1
    return "", outcomes


class Fuzz(unittest.TestCase):
    def test_two_hundred_thousand_mutated_inputs_have_no_outcome_but_the_three(self):
        start = time.monotonic()
        pool = multiprocessing.get_context("fork").Pool(2)
        parts = pool.starmap(
            fuzz, [(SEED * 100 + part, INPUTS // 8) for part in range(8)]
        )
        pool.close()
        pool.join()
        for wrong, _ in parts:
            self.assertEqual(wrong, "")
        total = {key: sum(part[key] for _, part in parts) for key in parts[0][1]}
        sys.stderr.write(
            "%d inputs in %.0f s: %s " % (INPUTS, time.monotonic() - start, total)
        )
        for outcome, share in (
            ("incomplete", 0.02),
            ("refused", 0.2),
            ("sample", 0.05),
            ("compared", 0.01),
        ):
            self.assertGreater(
                total[outcome], INPUTS * share, "else it tries too little"
            )


# ==========================================================================================
# Lines of JSON
# ==========================================================================================

LIMITS = {"keys": 64, "text": 255, "int": 1 << 63}  # as test_wire.py has them


class LineMutator(Mutator):
    """As pickles: the same mutations, at the marks of a line."""

    codes = [bytes([code]) for code in b'{}[]:,"\\ \t\r\n\0-+.eE0159tfnuNI\x7f\x80\xff']
    edges = [
        b"9223372036854775807",
        b"-9223372036854775808",
        b"9223372036854775808",
        b"1e308",
        b"1e309",
        b"-0",
        b"-0.0",
        b"5e-324",
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
        b'"' + b"x" * 255 + b'"',
        b'"' + b"x" * 256 + b'"',
        rb'"\ud83d\ude00"',
        rb'"\ud83d"',
        rb'"\u00"',
        b"[[]]",
        b'{"a": 1}',
        b'"cpu": 5, ',
        b"\xc3\xbc",
    ]

    @staticmethod
    def places(data):
        return [at for at, code in enumerate(data) if code in b'{}:," \\'] or [0]


def flat_json(data):
    """What the standard library says of a line, if that is within the limits; else None."""

    def refuse(word):
        raise ValueError(word)

    try:
        text = data.decode()
        pairs = json.loads(
            text, object_pairs_hook=lambda found: found, parse_constant=refuse
        )
        if not text.startswith("{") or len(dict(pairs)) != len(pairs):
            return None
        for scalar in (scalar for pair in pairs for scalar in pair):
            if type(scalar) is list or type(scalar) is float and math.isinf(scalar):
                return None
            if type(scalar) is str and len(scalar.encode()) > LIMITS["text"]:
                return None
            if type(scalar) is int and not -LIMITS["int"] <= scalar < LIMITS["int"]:
                return None
    except (ValueError, RecursionError):
        return None
    return dict(pairs) if len(pairs) <= LIMITS["keys"] else None


class Lines(unittest.TestCase):
    def outcome(self, data):
        """How a line is decoded; fails when that is not as it must be."""
        begin, newline, rest = data.partition(b"\n")
        expected = flat_json(begin) if newline and len(begin) < 16384 else None
        try:
            found = parse_line(data)
        except WireError as error:
            self.assertTrue(str(error).isprintable() and len(str(error)) < 200, data)
            self.assertIsNone(expected, "refused: %s %r" % (error, data))
            with self.assertRaises(WireError, msg=data):
                parse_line(data + b'}\n{"cpu": 1}\n')
            return "refused"
        if found is None:
            self.assertTrue(not newline and len(data) < 16384, data)
            return "incomplete"
        result, size, floats = found
        self.assertEqual((size, floats), (len(begin) + 1, ()), data)
        self.assertEqual(repr(result), repr(expected), data)
        self.assertEqual(repr(parse_line(data[:size] + rest[::-1])[0]), repr(result))
        self.assertIsNone(parse_line(data[: size - 1]), data)
        try:
            check_sample(result)
        except WireError:
            return "dict"
        return "sample"

    def test_fifty_thousand_mutated_lines_are_what_json_says_or_refused(self):
        rng, outcomes = random.Random(SEED), {}
        good = [data for _, data in harmless_lines() if len(data) < 2000]
        good += [
            line('"node": "c1"', '"job": "4711"', '"ack": true', '"cpus": 64'),
            b'{"auth": "%s"}\n' % (b"ab" * 32),
            b'{"bye": "finished"}\n',
            b'{"part": "rank", "look": 7, "pid": 4411, "cpu": 99.5}\n' * 2,
        ]
        bad = [data for _, data, _ in hostile() if data[:1] == b"{"]
        bad = [data for data in bad if len(data) < 2000]
        mutator = LineMutator(good * 8 + bad, rng)
        for _ in range(INPUTS // 4):
            outcome = self.outcome(b"{" + mutator.make()[1:])
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        sys.stderr.write("%d lines: %s " % (INPUTS // 4, outcomes))
        for outcome, share in (
            ("refused", 0.2),
            ("sample", 0.03),
            ("incomplete", 0.02),
            ("dict", 0.03),
        ):
            least = INPUTS / 4 * share
            self.assertGreater(outcomes.get(outcome, 0), least, outcomes)


# ==========================================================================================
# Requests
# ==========================================================================================

# Requests of the two kinds that atheris came up with: a traceback instead of an answer, once.
FOUND_REQUESTS = (
    b"GET //[1 HTTP/1.1\r\n\r\n",
    b"GET //[x]y HTTP/1.1\r\n\r\n",
    b"GET /?" + b"&a" * 17 + b" HTTP/1.1\r\n\r\n",
    b"GET /?;&&=&&&%&%%2 HTTP/1.1\r\n\r\n",
)
REQUESTS = FOUND_REQUESTS + (
    b"GET / HTTP/1.1\r\nHost: localhost:8080\r\n\r\n",
    b"HEAD /api/nodes?sort=-cpu&q=c1&job=42 HTTP/1.0\r\nHost: 127.0.0.1\r\nCookie: a=b\r\n\r\n",
    b"GET /node/%C3%BC%2f%00%ff?token=abc HTTP/1.1\r\nHost: [::1]:8080\r\n"
    b"Authorization: Bearer abc\r\nAccept: */*\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
)


class RequestMutator(Mutator):
    """As pickles: the same mutations, at the marks of a request."""

    codes = [bytes([code]) for code in b" /?&=%:;\r\n\t\0#[]@\\+\x7f\x80\xff"]
    edges = [
        b"\r\n",
        b"\r\n\r\n",
        b" HTTP/1.1",
        b" HTTP/9.9",
        b"//",
        b"..",
        b"%00",
        b"%",
        b"[::1",
        b"&" * 20,
        b"A: b\r\n" * 50,
        b"x" * 3000,
        b"Host: x\r\n",
        b"http://a/",
        b"*",
        b"\n ",
    ]

    @staticmethod
    def places(data):
        return [at for at, code in enumerate(data) if code in b" /?&=:\r"] or [0]


class Requests(unittest.TestCase):
    def outcome(self, data):
        start = time.process_time()
        try:
            method, path, query, headers = parse_request(data)
        except HTTPError as error:
            status, text = error.args[:2]
            self.assertTrue(400 <= status <= 505 and len(text) < 300, data)
            return status
        finally:
            self.assertLess(time.process_time() - start, 1, data)
        self.assertIn(method, ("GET", "HEAD"), data)
        self.assertTrue(path.startswith("/"), data)
        self.assertLessEqual(len(query), 16, data)
        self.assertEqual(
            {
                type(text)
                for text in (path, *query, *query.values(), *headers, *headers.values())
            },
            {str},
            data,
        )
        return 200

    def test_what_was_found_has_an_answer(self):
        for data in REQUESTS:
            with self.subTest(data):
                self.assertIn(self.outcome(data), (200, 400, 405))

    def test_twenty_five_thousand_mutated_requests_are_a_request_or_an_error(self):
        rng, outcomes = random.Random(SEED), {}
        mutator = RequestMutator(REQUESTS, rng)
        for _ in range(INPUTS // 8):
            status = self.outcome(mutator.make())
            outcomes[status] = outcomes.get(status, 0) + 1
        sys.stderr.write("%d requests: %s " % (INPUTS // 8, outcomes))
        least = min(outcomes.get(status, 0) for status in (200, 400, 405))
        self.assertGreater(least, INPUTS / 2000, outcomes)


if __name__ == "__main__":
    unittest.main()
