#!/usr/bin/env python3
"""screenshot.py makes the README's picture anew: tests/screenshot.png, the real page under load.

    python3 tests/screenshot.py [--seconds 330] [--file tests/screenshot.png]

A master, agents of four jobs that compute, idle, fill their memory, finish and fall silent, and
Chromium. The agents here send what real ones would, from one process; all the rest is the real
thing. It takes five and a half minutes because the graphs show five.
"""

import argparse
import contextlib
import math
import os
import random
import time

import support
from support import PlainAgent, start_master

from browser import Browser

GIB = 2.0**30
JOBS = (  # id, name, user, nodes, CPU, memory limit in GiB, GPUs a node
    ("48211", "train_resnet50", "alice", 6, 88.0, 128, 4),
    ("48213", "md_npt_310K", "bjorn", 5, 96.0, 64, 0),
    ("48214", "array_fit_3", "chloe", 1, 99.0, 16, 0),
    ("48217", "postprocess", "minjun", 3, 55.0, 64, 0),
)


class Node:
    """One node of a job: its readings swing slowly around what its job does."""

    def __init__(self, port, number, chance, job=None):
        self.job, self.chance, self.phase = job, chance, chance.random() * 6
        self.known = {
            "node": "c%03d" % number if job else "login",
            "user": "alice",
            "version": "1.0",
            "interval": 2.0,
            "cpus": 32.0,
            "mem_total": 256 * GIB,
        }
        self.agent = PlainAgent(port)
        if job:
            self.known.update(
                zip(("job", "job_name", "user"), job),
                job_cpus=32.0,
                job_mem_limit=job[5] * GIB,
            )

    def sample(self, second):
        mean = self.job[4] if self.job else 6.0
        cpu = mean + 3 * math.sin(second / 23 + self.phase) + self.chance.uniform(-4, 2)
        if self.job and (second + 9 * self.phase) % 75 < 12:
            cpu *= 0.45  # it writes a checkpoint
        if self.known["node"] == "c009":
            cpu = self.chance.uniform(0, 2)  # one that idles while its job works
        used = (
            32
            + 18 * math.sin(self.phase)
            + second / 40
            + 4 * math.sin(second / 17 + self.phase)
        )
        cpu, ram = min(max(cpu, 0.3), 100.0), min(max(used, 3), 97)
        sample = dict(
            self.known, cpu=cpu, ram=ram, load1=cpu * 0.32, mem_used=ram * 2.56 * GIB
        )
        if self.job:
            share = min(96.0, ram * 1.1 + 10 * (self.job[0] == "48217"))
            sample.update(
                job_cpu=cpu,
                job_ram=share,
                job_mem=share / 100 * self.job[5] * GIB,
                job_time_left=3 * 3600.0 + 1500 - second,
            )
        if self.job and self.job[6]:
            sample.update(
                gpus=4.0, gpu=min(99.0, 90 + 6 * math.sin(second / 31 + self.phase))
            )
        return sample


def show(port, seconds):
    """Send as these jobs would, for so long; one node finishes, one is lost, near the end."""
    chance = random.Random(11)
    nodes = [Node(port, 0, chance)]
    for job in JOBS:
        for _ in range(job[3]):
            nodes.append(Node(port, len(nodes), chance, job))
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        second = time.monotonic() - start
        if second > seconds - 60 and len(nodes) == 1 + sum(job[3] for job in JOBS):
            nodes.pop().agent.close()  # lost: no goodbye
            done = nodes.pop()
            done.agent.send(
                {
                    "bye": "finished",
                    "report": "exit 0 after 2:13:05; memory peak 11.20"
                    " GB of 64.00 GB; asked for 64.0 GB: --mem=14G would do",
                }
            )
            done.agent.close()
        for node in nodes:
            node.agent.send(node.sample(second))
        time.sleep(2)
    return nodes


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument(
        "--file", default=os.path.join(support.ROOT, "tests", "screenshot.png")
    )
    options = parser.parse_args()
    with start_master(
        "--alert", "job_ram>65"
    ) as master, contextlib.ExitStack() as stack, Browser() as browser:
        browser.show_as(1280, 1180)
        browser.open(
            "http://localhost:%d/" % master.page
        )  # somebody watches: finer graphs
        for node in show(master.port, options.seconds):
            stack.callback(node.agent.close)
        browser.open("http://localhost:%d/" % master.page)
        browser.screenshot(options.file)


if __name__ == "__main__":
    main()
