"""A seeded mutation fuzzer for what reads a stranger's bytes: the decoder and its short way.

Every input has one of three outcomes: a flat dict, None while it is incomplete, or WireError;
and what holds for one holds for what it began with, what follows it, and parse_shape.

SENTINEL_TEST_SEED    another seed (1)
SENTINEL_FUZZ_INPUTS  how many inputs (200,000)
"""

import multiprocessing
import os
import pickle
import pickletools
import random
import struct
import sys
import time
import unittest

from master_server import WireError, check_sample, parse_pickle
from test_wire import harmless, hostile, same, shape_differs, slowly_unpickled

SEED = int(os.environ.get("SENTINEL_TEST_SEED", "1"))
INPUTS = int(os.environ.get("SENTINEL_FUZZ_INPUTS", "200000"))
CODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
# what the arguments of opcodes become: the edges of every size that there is
EDGES = [struct.pack("<" + code, value) for code, values in (
    ("B", (0, 1, 2, 5, 6, 8, 9, 127, 128, 254, 255)), ("H", (0, 255, 256, 0xffff)),
    ("I", (0, 255, 256, 16384, 16385, 0x7fffffff, 0x80000000, 0xffffffff)),
    ("Q", (0, 16384, 16385, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1))) for value in values]
EDGES += [struct.pack(">d", value) for value in (0.0, -0.0, 100.0, 100.1, -1.0, 1e308)]
EDGES += [b"\x7f\xf8" + bytes(6), b"\x7f\xf0" + bytes(6), b"\xff\xf0" + bytes(6), b"\xff" * 8]


# ==========================================================================================
# Mutations
# ==========================================================================================

def places(data):
    """Where the opcodes of a pickle are, as far as pickletools can tell."""
    found = [0]
    try:
        for _, _, at in pickletools.genops(data):
            found.append(at)
    except Exception:       # hostile seeds are no pickles: their first part will do
        return found
    return found


class Mutator:
    """Makes inputs out of seeds: random.Random decides, so that a seed repeats them all."""

    def __init__(self, seeds, rng):
        self.rng = rng
        self.seeds = [(data, places(data)) for data in seeds]
        self.ways = [self.flip, self.flip, self.overwrite, self.truncate, self.splice, self.repeat,
                     self.delete, self.edge, self.edge, self.swap, self.swap, self.insert]

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
        del data[self.place(data):]

    def splice(self, data, at):
        """The begin of one seed and the end of another, cut at opcodes."""
        other, there = self.rng.choice(self.seeds)
        data[self.rng.choice(at):] = other[self.rng.choice(there):]

    def repeat(self, data, at):
        """A part twice, or many times."""
        begin = self.place(data)
        part = bytes(data[begin:begin + self.rng.randrange(1, 40)])
        data[begin:begin] = part * self.rng.choice((1, 1, 2, 10, 300))

    def delete(self, data, at):
        """A part missing."""
        begin = self.place(data)
        del data[begin:begin + self.rng.randrange(1, 12)]

    def edge(self, data, at):
        """A length, index or number at an edge of its size, right behind an opcode."""
        begin = self.rng.choice(at) + 1
        edge = self.rng.choice(EDGES)
        data[begin:begin + len(edge)] = edge

    def swap(self, data, at):
        """Another opcode in the place of one."""
        begin = self.rng.choice(at)
        data[begin:begin + 1] = self.rng.choice(CODES)

    def insert(self, data, at):
        """An opcode more, maybe with an argument."""
        begin = self.rng.choice(at)
        data[begin:begin] = self.rng.choice(CODES) + self.rng.choice((b"", b"", *EDGES))


def seeds():
    """Valid samples of every protocol and an agent's own, what atheris found, the hostile table."""
    agents = {"cpu": 15.5, "ram": 40.2, "node": "c1", "user": "ada", "job": "4711", "ack": True,
              "job_name": "train", "version": "1.0", "interval": 2.0, "load1": 0.5, "cpus": 64,
              "mem_total": 1 << 38, "mem_used": 2.5e10, "net_rx": 1e6, "procs": 512.0}
    good = [pickle.dumps(agents, protocol) for protocol in (2, 3, 4)]
    good += [data for _, data in harmless() if len(data) < 2000]
    good += [pickle.dumps({"auth": "ab" * 32}, 2), pickle.dumps({"bye": "finished"}, 2), *FOUND]
    bad = [data for _, data, _ in hostile() if len(data) < 2000]
    return good * (8 * len(bad) // len(good)) + bad


# Inputs of special interest that atheris (coverage-guided, one hour) came up with.
FOUND = ()


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
        return ("" if isinstance(more, WireError) else "refused, and then not"), "refused"
    result, size, _ = found
    cut = rng.randrange(1, size)
    if result_of(data[:cut]) is not None:
        return "%d bytes of a sample are not incomplete" % cut, "dict"
    again = result_of(data[:size] + b"\x80\x02}u.")
    if not isinstance(again, tuple) or again[1] != size or not same(again[0], result):
        return "what follows changes it", "dict"
    if any(type(value) not in (type(None), bool, int, float, str) for value in result.values()):
        return "a value that is not flat", "dict"
    wrong = shape_differs(data, rng)
    if wrong:
        return wrong, "dict"
    try:
        checked = check_sample(result)
    except WireError:
        return "", "dict"
    kinds = {type(value) for key, value in checked.items() if key != "ack"}
    if (not kinds <= {float, str} or checked.get("ack", True) is not True
            or not all(0 <= checked[key] <= 100 for key in ("cpu", "ram"))):
        return "check_sample let %r through" % checked, "sample"
    return "", "sample"


def disagreement(data):
    """What the standard library says otherwise of an input that was taken; None if it cannot."""
    result, size, _ = parse_pickle(data)
    try:
        theirs = slowly_unpickled(data[:size])
    except Exception:       # a memo without a value, a wrong frame: refused there, harmless here
        return None
    return "" if type(theirs) is dict and same(theirs, result) else "pickle says %r" % theirs


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
                wrong, outcomes["compared"] = said or "", outcomes["compared"] + (said == "")
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
        parts = pool.starmap(fuzz, [(SEED * 100 + part, INPUTS // 8) for part in range(8)])
        pool.close()
        pool.join()
        for wrong, _ in parts:
            self.assertEqual(wrong, "")
        total = {key: sum(part[key] for _, part in parts) for key in parts[0][1]}
        sys.stderr.write("%d inputs in %.0f s: %s " % (INPUTS, time.monotonic() - start, total))
        for outcome, share in (("incomplete", 0.02), ("refused", 0.2), ("sample", 0.05),
                               ("compared", 0.01)):
            self.assertGreater(total[outcome], INPUTS * share, "else it tries too little")


if __name__ == "__main__":
    unittest.main()
