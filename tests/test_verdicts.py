"""What is wrong with a job, and why it died: the rules, on evidence made by hand.

Every check has a job that it is meant for.  A healthy job gets no verdict but fine, and no check
speaks when anything that it needs is missing.
"""

import json
import math
import os
import random
import shlex
import signal
import sys
import unittest

import support  # noqa: F401, it finds the tools

import agent
import master_server
from master_server import JobEvidence, NodeEvidence, Verdict, diagnose

GB = 2**30
NOW = 1.8e9
FUZZED = 20000 if os.environ.get("SENTINEL_TEST_ALL") == "1" else 1000


# ---- builders ----------------------------------------------------------------------


def flat(value, seconds=120):
    """A curve that stays where it is, up to now."""
    return [(NOW - seconds + 10 * k, float(value)) for k in range(seconds // 10 + 1)]


def ramp(first, last, seconds=120):
    """A curve that rises steadily, up to now."""
    steps = seconds // 10
    return [
        (NOW - seconds + 10 * k, first + (last - first) * k / steps)
        for k in range(steps + 1)
    ]


def wave(low, high, seconds=600, period=40):
    """A curve that is high for half of each period."""
    return [
        (moment, high if k * 10 % period < period / 2 else low)
        for k, (moment, _) in enumerate(flat(0, seconds))
    ]


def node(name="c1", ranks=(), gpus=(), cpus=(), lost=None, online=64, **readings):
    """A node with 4 CPUs at work, 1 of 4 GB and no I/O; a reading may be a number or a curve."""
    known = {
        "cpus": online,
        "cpu": 100.0,
        "job_cpu": 100.0,
        "job_cpus": 4,
        "job_mem": 1.0 * GB,
        "job_cache": 0.1 * GB,
        "job_mem_limit": 2 * GB,
        "job_read": 0.0,
        "job_write": 0.0,
        "psi_io": 0.0,
        "disk_tmp": 10.0,
        "disk": 50.0,
        **readings,
    }
    curves = {}
    sample = {}
    for key, value in known.items():
        if value is None:
            continue
        curves[key] = value if isinstance(value, list) else flat(value)
        sample[key] = curves[key][-1][1]
    return NodeEvidence(
        name, sample, curves, list(ranks), list(gpus), {}, set(cpus), lost
    )


def asleep(name="c1", job_cpu=0.0, ranks=None, **readings):
    """A node whose program does nothing."""
    if ranks is None:
        ranks = [rank(0, 0.0, state="S", running=0)]
    return node(name, ranks, job_cpu=job_cpu, **readings)


def silent(name, ago):
    """A node that was as busy as any, and fell silent."""
    known = node(name)
    curves = {
        key: [point for point in curve if point[0] <= NOW - ago]
        for key, curve in known.curves.items()
    }
    return known._replace(lost=NOW - ago, curves=curves)


def rank(number, cpu=100.0, cpus="0-3", **more):
    return {
        "part": "rank",
        "pid": 4000 + number,
        "rank": number,
        "program": "my_app",
        "cpu": cpu,
        "cpus": cpus,
        "running": 1,
        "state": "R",
        "mem": 0.2 * GB,
        "read": 0.0,
        "write": 0.0,
        **more,
    }


def gpu(index, busy=90.0, **more):
    return {
        "part": "gpu",
        "index": index,
        "gpu": busy,
        "mem_used": 20.0 * GB,
        "mem_total": 80.0 * GB,
        "processes": 1,
        **more,
    }


def unused(index):
    return gpu(index, 0.0, mem_used=3 * 2**20, processes=0)


def job(*nodes, events=(), **facts):
    """A job that has been running for an hour."""
    known = {
        "job": "4711",
        "raw": "4711",
        "state": "RUNNING",
        "start": NOW - 3600,
        "limit": 5400.0,
        "nodes": len(nodes),
        **facts,
    }
    return JobEvidence(known, list(nodes), list(events), NOW)


def earlier(known):
    """A node whose curves end a minute ago."""
    curves = {
        key: [(moment - 60, value) for moment, value in curve]
        for key, curve in known.curves.items()
    }
    return known._replace(curves=curves)


def ended(state, *nodes, events=(), **facts):
    """A job that ended a minute ago, and so did the curves of its nodes."""
    nodes = [earlier(known) if known.lost is None else known for known in nodes]
    facts = {"state": state, "end": NOW - 60, **facts}
    return job(*nodes, events=events, **facts)


def left(bye, name="c1", ago=3.0, report="ran 0:10:00", **more):
    """The event of an agent's goodbye."""
    return {
        "time": NOW - ago,
        "kind": "finished",
        "node": name,
        "text": "%s; %s" % (bye, report),
        **more,
    }


def clock(moment):
    return master_server.clock_words(moment)


ENDED_AT = clock(NOW - 60)

NO_IO = {"job_read": flat(0, 600), "job_write": flat(0, 600)}
LONG_NO_IO = {"job_read": flat(0, 1300), "job_write": flat(0, 1300)}
# now and then as busy as the others, a third of the time
SPIKES = [
    (moment, 10.0 if k % 3 else 97.0) for k, (moment, _) in enumerate(flat(0, 400))
]
# 6 % of four CPUs, then 5 %, then nothing
DOZED = [
    (moment, 0.0 if moment >= NOW - 120 else 5.0 if moment >= NOW - 230 else 6.0)
    for moment, _ in flat(0, 600)
]

# three points on each step, and the straight line through them
STAIRS = [
    (moment, (1.0 + 0.2 * (k // 3)) * GB) for k, (moment, _) in enumerate(flat(0, 390))
]
# a tenth of a minute's growth is given back now and then
NOISY = [
    (moment, value - (0.0 if k % 4 else 0.05 * GB))
    for k, (moment, value) in enumerate(ramp(2.0 * GB, 3.5 * GB, 390))
]
# memory as a collector of garbage leaves it: up, and back again
SAWTOOTH = ramp(0.4 * GB, 1.82 * GB, 1000)[:-10] + ramp(0.4 * GB, 1.7 * GB, 90)

# ---- sick jobs: name -> (evidence, the rule, what its line says) -----------------------

BOUND = [rank(k, cpu=25.0, cpus="0") for k in range(4)]
SICK = {
    "a serial program on 4 CPUs": (
        job(node(job_cpu=25.0)),
        "serial",
        r"! 1 of 4 CPUs of c1 at work for 2 min: .*-> --cpus-per-task=1",
    ),
    "all on CPU 0": (
        job(node(job_cpu=25.0, ranks=BOUND, cpus={0, 1, 2, 3})),
        "few_cpus",
        r"! 4 threads of ranks 0-3 share CPU 0 of c1: they may use: 0; the job has 0-3"
        r"  -> srun --cpu-bind=cores --cpus-per-task=\"\$SLURM_CPUS_PER_TASK\"",
    ),
    "32 threads of one rank on CPU 0": (
        job(
            node(
                job_cpu=100 / 32,
                job_cpus=32,
                ranks=[rank(0, cpus="0", running=32, threads=32)],
            )
        ),
        "few_cpus",
        r"! 32 threads of rank 0 share CPU 0 of c1: .*the job has 32 CPUs",
    ),
    "one of two nodes asleep": (
        job(node("c1"), node("c2", job_cpu=0.0)),
        "idle_nodes",
        r"! 1 of 2 nodes idle for .*: c2: c1 uses 4\.0 of 4 CPUs",
    ),
    "2 of 16 CPUs at work": (
        job(node(job_cpus=16, job_cpu=flat(12.5, 400))),
        "idle_cpus",
        r"\. at most 2 of 16 CPUs of c1 at work for 5 min: .*-> --cpus-per-task=2",
    ),
    "three ranks on 16 CPUs": (
        job(
            node(
                job_cpus=16,
                job_cpu=flat(18.7, 400),
                ranks=[rank(k, 99.0, "0-15") for k in range(3)],
            )
        ),
        "idle_cpus",
        r"\. at most 3 of 16 CPUs of c1 at work for 5 min: .*-> --ntasks=3",
    ),
    "everything asleep": (
        job(asleep("c1", job_cpu=0.1), asleep("c2")),
        "idle_job",
        r"! 8 CPUs idle for .*: nothing computes, reads or writes on c1, c2",
    ),
    "asleep for long, and perhaps it waits for a person": (
        job(asleep(ranks=[], job_cpu=flat(0, 1250), **LONG_NO_IO)),
        "idle_job",
        r"\. 4 CPUs idle for 20 min: nothing computes",
    ),
    "asleep, and hardly awake before": (
        job(asleep(job_cpu=DOZED, job_read=flat(0, 600), job_write=flat(0, 600))),
        "idle_job",
        r"! 4 CPUs idle for 3 min: nothing computes",
    ),
    "the last of three nodes asleep, and hardly awake before": (
        job(
            node("c1"),
            node("c2", job_cpu=50.0),
            asleep("c3", job_cpu=DOZED, ranks=[rank(2)]),
        ),
        "idle_nodes",
        r"! 1 of 3 nodes idle for 3 min: c3: c1 uses 4\.0 of 4 CPUs",
    ),
    "more threads than CPUs": (
        job(
            node(
                ranks=[rank(0, 200.0, running=4), rank(1, 200.0, running=4)],
                psi_cpu=90.0,
            )
        ),
        "many_threads",
        r"! 8 threads take turns on 4 CPUs of c1: .*-> export OMP_NUM_THREADS=2",
    ),
    "a build with far more compilers than CPUs": (
        job(
            node(
                ranks=[rank(k, 20.0, program="cc1plus") for k in range(20)],
                psi_cpu=99.0,
            )
        ),
        "many_threads",
        r"\. 20 threads take turns on 4 CPUs of c1: .*-> make -j4 ",
    ),
    "a few more threads than CPUs": (
        job(node(ranks=[rank(0, 400.0, running=5)], load1=4.8)),
        "many_threads",
        r"\. 5 threads take turns on 4 CPUs of c1: .*-> export OMP_NUM_THREADS=4",
    ),
    "one of three nodes with half of the work": (
        job(
            node("c1", job_cpu=flat(95, 400)),
            node("c2", job_cpu=flat(30, 400)),
            node("c3", job_cpu=flat(94, 400)),
        ),
        "uneven_nodes",
        r"\. c2 computes less than half .*: CPUs 30 % busy for 5 min, the others 94 %",
    ),
    "three of four GPUs idle": (
        job(
            node("c1", gpus=[gpu(0), unused(1)], gpu=45, gpu_min=flat(0, 1200)),
            node("c2", gpus=[unused(0), unused(1)], gpu=flat(0, 1200), gpu_min=0),
            gpus=4,
        ),
        "idle_gpus",
        r"! 3 of 4 GPUs idle for 20 min: c1 gpu 1, c2 gpu 0-1 at 0 %, at most 3 MB each"
        r"  -> --gres=gpu:1  # or does the program know of more than one GPU\?",
    ),
    "all GPUs idle, though a program holds them": (
        job(node(gpus=[gpu(0, 0.0)], gpu=flat(0, 1300)), gpus=1),
        "idle_gpus",
        r"! 1 of 1 GPUs idle for 21 min: c1 gpu 0 at 0 %, at most 20 GB each"
        r"  -> srun --jobid=4711",
    ),
    "a GPU that one data loader feeds": (
        job(node(job_cpu=25.0, gpu=20.0, gpus=[gpu(0, 20.0)]), gpus=1),
        "starved_gpus",
        r"\. the GPUs of c1 wait for one busy CPU: GPUs 20 % busy, 1 of 4 CPUs at work",
    ),
    "a GPU that is too hot": (
        job(node(gpus=[gpu(1, 99.0, throttle="heat (hardware)", temp=91)], gpu=99)),
        "slowed_gpus",
        r"\. GPU 1 of c1 is slowed down: heat \(hardware\): it is busy, 91 °C",
    ),
    "a leak": (
        job(
            node(
                job_mem=ramp(1.0 * GB, 3.0 * GB, 60),
                job_mem_limit=4 * GB,
                ranks=[rank(k, mem=(2.5 if k == 3 else 0.2) * GB) for k in range(4)],
            )
        ),
        "memory_grows",
        r"! memory of c1 grows steadily: at this pace it is full in 30 s: 3 GB of 4 GB, 2 GB"
        r" more a minute for 60 s; rank 3 \(my_app\) had 2\.5 GB, the others at most 0\.2 GB"
        r"  -> --mem=5G ",
    ),
    "a leak with each step of a loop, every 30 s": (
        job(node(job_mem=STAIRS, job_mem_limit=4 * GB)),
        "memory_grows",
        r"! memory of c1 grows steadily: .* more a minute for 5 min",
    ),
    "a leak beyond what was used and given back before": (
        job(
            node(
                job_mem=flat(2.5 * GB, 200)[:-7] + ramp(1.0 * GB, 3.0 * GB, 60),
                job_mem_limit=4 * GB,
            )
        ),
        "memory_grows",
        r"! memory of c1 grows steadily: at this pace it is full in 30 s",
    ),
    "memory nearly full": (
        job(node(job_mem=0.97 * 2 * GB)),
        "memory_near_limit",
        r"! memory of c1 is nearly full: 1\.94 GB of 2 GB: 97 %.*-> --mem=3G",
    ),
    "memory at 92 percent": (
        job(node(job_mem=0.92 * 2 * GB)),
        "memory_near_limit",
        r"\. memory of c1 is nearly full: 1\.84 GB of 2 GB: 92 %",
    ),
    "a node that swaps": (
        job(node(swap=60.0, psi_mem=25.0)),
        "swapping",
        r"! c1 swaps: processes wait for memory 25 % of the time: 60 %",
    ),
    "waiting for I/O": (
        job(
            node(
                job_cpu=10.0,
                psi_io=70.0,
                ranks=[rank(k, 2.0, state="D", read=1e5) for k in range(4)],
            )
        ),
        "waits_for_io",
        r"\. 4 processes of c1 wait for I/O and move only 0\.4 MB/s: 70 %.*\$\{TMPDIR:-/tmp\}",
    ),
    "/tmp full": (
        job(node("c1"), node("c2", disk_tmp=100.0)),
        "full_filesystem",
        r"! /tmp is full on c2: 100 % in use  -> export TMPDIR=\"\$SLURM_SUBMIT_DIR/tmp\"",
    ),
    "/dev/shm full": (
        job(node(disk_shm=99.0)),
        "full_filesystem",
        r"! /dev/shm is full on c1: 99 % in use  -> ls -l /dev/shm ",
    ),
    "no inodes": (
        job(node(inodes=100.0)),
        "full_filesystem",
        r"! the list of files \(inodes\) of the working directory is full on c1: 100 % in use"
        r"  -> df -h \. ; df -i \.",
    ),
    "no inodes in /tmp": (
        job(node(inodes_tmp=99.0)),
        "full_filesystem",
        r"! the list of files \(inodes\) of /tmp is full on c1: 99 % in use  -> export TMPDIR",
    ),
    "the time limit near": (
        job(node(job_time_left=400.0, job_time_limit=36000.0)),
        "time_limit_near",
        r"\. 6 min left of 10 h 0 min; whether that is enough is not known:.*-> --time=12:00:00",
    ),
    "a node unlike its peers": (
        job(
            *[
                node(
                    "c%d" % k,
                    job_mem=flat((9 if k == 3 else 3) * GB, 400),
                    job_mem_limit=16 * GB,
                )
                for k in range(1, 6)
            ]
        ),
        "odd_node",
        r"\. c3 is unlike its peers: 9 GB of memory: the 4 others have 3 GB each",
    ),
    "a node cut off": (
        job(node("c1"), silent("c2", 12)),
        "node_silent",
        r"! c2 fell silent at %s, 12 s ago: no goodbye; still sending: c1"
        % master_server.clock_words(NOW - 12, "%H:%M:%S"),
    ),
    "the only node cut off": (
        job(silent("c1", 50)),
        "node_silent",
        r"! c1 fell silent at .*, 50 s ago: no goodbye; no other sends",
    ),
    "two nodes cut off, one after the other": (
        job(node("c1"), silent("c3", 12), silent("c2", 9)),
        "node_silent",
        r"! c3 fell silent at .*, 12 s ago; then c2: no goodbye; still sending: c1",
    ),
    "over-asked memory": (
        job(node(job_mem=61.0 * GB, job_mem_peak=61.0 * GB, job_mem_limit=256 * GB)),
        "too_much_memory",
        r"\. memory peak 61 GB of 256 GB so far: kernel's count, 1 run, 13 samples"
        r"  -> --mem=74G",
    ),
    "over-asked memory, told after the end": (
        ended("COMPLETED", node(job_mem=61.0 * GB, job_mem_limit=256 * GB)),
        "too_much_memory",
        r"\. memory peak 61 GB of 256 GB: sampled, 1 run, 13 samples  -> --mem=74G",
    ),
    "over-asked memory, when the wrapped command has ended well": (
        job(
            node(job_mem=61.0 * GB, job_mem_limit=256 * GB),
            events=[left("exit 0")],
            state="",
        ),
        "too_much_memory",
        r"\. memory peak 61 GB of 256 GB: sampled, 1 run",
    ),
    "memory that was only just enough": (
        ended("COMPLETED", node(job_mem=60.0 * GB, job_mem_limit=64 * GB)),
        "tight_memory",
        r"\. memory peak 60 GB of 64 GB: that was close: sampled.*-> --mem=72G",
    ),
    "over-asked time": (
        ended("COMPLETED", node(), start=NOW - 3660, limit=86400.0),
        "too_much_time",
        r"\. ran for 60 min of 24 h 0 min: 1 run.*-> --time=01:15:00",
    ),
    "a step that the kernel killed, and the script goes on": (
        job(node(oom_kill=1)),
        "kill_survived",
        r"! out of memory: the kernel killed 1 process on c1; the job still runs: memory peak"
        r" higher than any sample: the highest was 1 GB of 2 GB.*-> --mem=3G",
    ),
    "a step that the kernel killed, and Slurm saw no harm": (
        ended("COMPLETED", node(oom_kill=2)),
        "kill_survived",
        r"! out of memory: the kernel killed 2 processes on c1; Slurm says COMPLETED",
    ),
    "a step that failed, and the script went on": (
        ended("COMPLETED", node(), exit="0:0", events=[left("exit 3", ago=65)]),
        "failed_step",
        r"! exit 3 on c1, and Slurm says COMPLETED: exit 3 on c1 at .*Slurm says COMPLETED \(0:0\)",
    ),
    "a step that failed, as accounting tells": (
        ended("COMPLETED", node(), derived_exit="2:0"),
        "failed_step",
        r"! a step ended with 2:0, and Slurm says COMPLETED",
    ),
    "a step that a signal ended, and the script went on": (
        ended("COMPLETED", node(), derived_exit="0:11"),
        "failed_step",
        r"! a step ended with 0:11, and Slurm says COMPLETED",
    ),
    "a step out of memory, and the script went on": (
        ended("COMPLETED", node(), derived_exit="0:125"),
        "failed_step",
        r"! a step was out of memory, and Slurm says COMPLETED",
    ),
    "one of two wrapped commands ended badly": (
        job(node("c1"), node("c2"), events=[left("SIGSEGV", "c2")]),
        "failed_step",
        r"! SIGSEGV on c2, and the job still runs",
    ),
    "requeued": (
        job(node(), state="PENDING", reason="BeginTime"),
        "requeued",
        r"! requeued: it ran until %s on c1 and waits to start again: BeginTime"
        r"  -> scontrol update JobId=4711 Requeue=0 " % clock(NOW),
    ),
    "requeued, and held": (
        job(node(), state="PENDING", reason="launch failed requeued held"),
        "requeued",
        r"! requeued: it ran until %s on c1 and is held: launch failed requeued held"
        r"  -> scontrol release 4711" % clock(NOW),
    ),
    "a service with a GPU that nobody asks for long": (
        job(
            node(
                gpus=[gpu(0, 0.0)],
                gpu=flat(0, 1300),
                ranks=[rank(0, 1.0, program="vllm")],
            ),
            gpus=1,
        ),
        "idle_gpus",
        r"\. 1 of 1 GPUs idle for 21 min: c1 gpu 0 at 0 %",
    ),
    "a leak with noise in it": (
        job(node(job_mem=NOISY, job_mem_limit=4 * GB)),
        "memory_grows",
        r"! memory of c1 grows steadily: .* more a minute for 5 min",
    ),
}

LEAKY = [rank(36 + k, mem=(0.3 if k != 1 else 58) * GB) for k in range(4)]
DEAD = {
    "out of memory, one rank of four": (
        ended(
            "OUT_OF_MEMORY",
            node("c1", job_mem_limit=64 * GB),
            node(
                "c2",
                oom_kill=1,
                job_mem=ramp(20 * GB, 58 * GB, 1200),
                job_mem_limit=64 * GB,
                ranks=LEAKY,
            ),
            exit="0:125",
            reason="OutOfMemory",
        ),
        "out_of_memory",
        r"died %s: out of memory: the kernel killed 1 process on c2: memory peak higher than any"
        r" sample: the highest was 58 GB of 64 GB; rank 37 \(my_app\) had 58 GB, the others"
        r" at most 0\.3 GB; it grew by 1\.9 GB a minute for .*; the kernel's count on c2 is 1;"
        r" Slurm says OUT_OF_MEMORY \(0:125, OutOfMemory\)  -> --mem=77G  # or distribute: rank 37"
        % ENDED_AT,
    ),
    "out of memory, told by the wrapper before Slurm tells": (
        job(
            node(job_mem_limit=0.195 * GB, job_mem=0.178 * GB),
            events=[
                left(
                    "SIGKILL",
                    report=master_server.OUT_OF_MEMORY % "1 process" + "; ran 0:01",
                )
            ],
        ),
        "out_of_memory",
        r"died %s: out of memory: the kernel killed 1 process on c1: memory peak higher than any"
        r" sample: the highest was 0\.178 GB of 0\.195 GB; .*SIGKILL on c1 at .*Slurm says"
        r" RUNNING  -> --mem=300M" % clock(NOW - 3),
    ),
    "out of memory, by Slurm's word alone": (
        ended("OUT_OF_MEMORY", node(), exit="0:125"),
        "out_of_memory",
        r"died %s: out of memory on c1, says Slurm; the kernel's count was not seen: memory peak"
        % ENDED_AT,
    ),
    "out of memory on one of two nodes, by Slurm's word alone": (
        ended(
            "OUT_OF_MEMORY",
            node("c1"),
            node("c2", job_mem=1.9 * GB, ranks=[rank(5, mem=1.7 * GB)]),
        ),
        "out_of_memory",
        r"died %s: out of memory, says Slurm; the kernel's count was not seen: fullest: c2; memory"
        r" peak higher than any sample: the highest was 1\.9 GB of 2 GB; rank 5 \(my_app\) had"
        % ENDED_AT,
    ),
    "the kernel and Slurm disagree": (
        ended("FAILED", node(oom_kill=1), exit="1:0"),
        "out_of_memory",
        r"died .*: out of memory: .*the kernel's count on c1 is 1; Slurm says FAILED \(1:0\)",
    ),
    "out of memory in a step, by Slurm's word": (
        ended("FAILED", node(), exit="1:0", derived_exit="0:125"),
        "out_of_memory",
        r"died %s: out of memory on c1, says Slurm; .*Slurm says FAILED \(1:0\);"
        r" its worst step ended with 0:125  ->" % ENDED_AT,
    ),
    "a step out of memory, and then the time limit": (
        ended("TIMEOUT", node(), derived_exit="0:125"),
        "time_limit",
        r"died %s: time limit" % ENDED_AT,
    ),
    "exit 137 is no proof": (
        ended("FAILED", node(job_mem=1.9 * GB), exit="137:0"),
        "signal",
        r"died %s: SIGKILL on c1: who sent it is not known: exit code 137 is how a shell tells it"
        % ENDED_AT,
    ),
    "the time limit": (
        ended("TIMEOUT", node(), limit=3600.0, start=NOW - 3665, reason="TimeLimit"),
        "time_limit",
        r"died %s: time limit of 60 min reached: it ran for 60 min; CPUs 100 %% busy at the end;"
        r" Slurm says TIMEOUT \(TimeLimit\)  -> --time=01:50:00" % ENDED_AT,
    ),
    "a node that failed": (
        ended("NODE_FAIL", node("c1"), silent("c3", 90), silent("c2", 100)),
        "node_failure",
        r"died %s: node c2 failed: fell silent first: c2 at .*, c3 at .*Slurm says NODE_FAIL"
        r"  -> sbatch --requeue --exclude=c2 SCRIPT" % ENDED_AT,
    ),
    "preempted": (
        ended("PREEMPTED", node()),
        "preempted",
        r"died %s: preempted: .*--requeue" % ENDED_AT,
    ),
    "cancelled, nobody knows by whom": (
        ended("CANCELLED", node(), exit="0:15"),
        "cancelled",
        r"died %s: cancelled; by whom is not known without accounting" % ENDED_AT,
    ),
    "cancelled by a user": (
        ended("CANCELLED by 4242", node()),
        "cancelled",
        r"died %s: cancelled by user 4242" % ENDED_AT,
    ),
    "cancelled by root": (
        ended("CANCELLED", node(), cancelled_by=0),
        "cancelled",
        r"died %s: cancelled by root: an administrator" % ENDED_AT,
    ),
    "no output file": (
        ended("FAILED", node(), exit="0:53"),
        "no_output_file",
        r"died %s: it did not start: its output file could not be opened" % ENDED_AT,
    ),
    "a segmentation fault, by Slurm": (
        ended("FAILED", node(), exit="0:11"),
        "signal",
        r"died %s: SIGSEGV on c1: it used memory .*-> ulimit -s unlimited" % ENDED_AT,
    ),
    "a segmentation fault, by the wrapper": (
        job(node(), events=[left("SIGSEGV")]),
        "signal",
        r"died %s: SIGSEGV on c1: .*SIGSEGV on c1 at .*; Slurm says RUNNING"
        % clock(NOW - 3),
    ),
    "a bus error with a full /dev/shm": (
        ended("FAILED", node(disk_shm=100.0), exit="135:0"),
        "signal",
        r"died %s: SIGBUS on c1: its shared memory had no room: /dev/shm of c1 at 100 %%"
        % ENDED_AT,
    ),
    "a bus error": (
        ended("FAILED", node(), exit="0:7"),
        "signal",
        r"died %s: SIGBUS on c1: it used memory that is not there.*df -h /dev/shm"
        % ENDED_AT,
    ),
    "the wrong processor": (
        ended("FAILED", node("c1"), node("c2"), events=[left("SIGILL", "c2", ago=61)]),
        "signal",
        r"died %s: SIGILL on c2: it is compiled for another kind of processor than c2 has"
        % ENDED_AT,
    ),
    "exit 127": (
        ended("FAILED", node(), exit="127:0"),
        "not_started",
        r"died %s: exit code 127 on c1: there is no such command.*-> module load"
        % ENDED_AT,
    ),
    "exit 126": (
        job(node(), events=[left("exit 126")], state=""),
        "not_started",
        r"died %s: exit code 126 on c1: the command cannot be run.*chmod \+x"
        % clock(NOW - 3),
    ),
    "another exit code; the first that failed is told": (
        ended(
            "FAILED",
            node("c1"),
            node("c2"),
            exit="3:0",
            events=[left("exit 4", "c1", ago=64), left("exit 3", "c2", ago=66)],
        ),
        "exit_code",
        r"died %s: exit code 3 on c2: exit 3 on c2 at .*; exit 4 on c1 at .*; Slurm says FAILED"
        % ENDED_AT,
    ),
    "the wrapper and Slurm disagree": (
        ended("FAILED", node(), exit="1:0", events=[left("exit 3", ago=61)]),
        "exit_code",
        r"died %s: exit code 3 on c1: exit 3 on c1 at .*; Slurm says FAILED \(1:0\)"
        % ENDED_AT,
    ),
    "failed, and nothing more": (
        ended("FAILED"),
        "exit_code",
        r"died %s: it failed: Slurm says FAILED" % ENDED_AT,
    ),
}


def before_it(known, *curves):
    """A node whose curves begin with these points, of a run before this one."""
    kept = dict(known.curves)
    for key, curve in curves:
        kept[key] = curve + kept[key]
    return known._replace(curves=kept)


def long_ago(known, seconds):
    """A node that has not been heard of for so long, though nothing told of its end."""
    curves = {
        key: [(moment - seconds, value) for moment, value in curve]
        for key, curve in known.curves.items()
    }
    return known._replace(curves=curves)


STARTED = {"start": NOW - 300}
LONG_GPU = {"gpu": flat(0, 900), "gpu_min": flat(0, 900)}
# healthy jobs: name -> evidence.  Of the first ones only their processes tell that they are
KNOWN_BY_PROCESSES = {
    "Jupyter under python3, its kernel idle": job(
        asleep(
            ranks=[
                rank(0, 0.0, state="S", running=0, program="bash", step="batch"),
                rank(1, 0.3, state="S", running=0, program="jupyter-lab", step="batch"),
                rank(2, 0.0, state="S", running=0, program="ipykernel_launcher"),
            ],
            job_cpu=flat(0.2, 900),
            job_mem_limit=64 * GB,
            **LONG_NO_IO,
        )
    ),
    "a notebook with a GPU whose user thinks": job(
        asleep(
            ranks=[rank(0, 0.0, program="ipykernel_launcher", state="S", running=0)],
            job_cpu=flat(0.2, 900),
            gpus=[unused(0)],
            **LONG_GPU,
            **LONG_NO_IO,
        ),
        gpus=1,
    ),
    "python in the shell of srun --pty bash, its user thinks": job(
        asleep(
            ranks=[
                rank(0, 0.0, program="-bash", step="0", state="S", running=0),
                rank(1, 0.0, program="python3", step="0", state="S", running=0),
            ],
            job_cpu=flat(0, 900),
            job_mem_limit=64 * GB,
            **LONG_NO_IO,
        )
    ),
    "gdb in the shell of salloc": job(
        asleep(
            ranks=[
                rank(0, 0.0, program="tmux: server", step="interactive"),
                rank(1, 0.0, program="gdb", step="interactive"),
            ],
            job_cpu=flat(0, 900),
            **LONG_NO_IO,
        )
    ),
    "a shell of a login": job(
        asleep(
            ranks=[rank(0, 0.0, program="-bash", state="S", running=0)],
            job_cpu=flat(0, 900),
            **LONG_NO_IO,
        )
    ),
    "it waits for a licence, and asks again every 30 s": job(
        asleep(
            ranks=[
                rank(0, 0.0, program="bash", step="batch", wchan="do_wait"),
                rank(1, 0.0, program="solver", wchan="hrtimer_nanosleep", state="S"),
            ],
            job_cpu=flat(0.1, 280),
        )
    ),
    "a configure script before a parallel build": job(
        node(job_cpu=flat(25, 200), ranks=[rank(0, 96.0, program="configure")])
    ),
    "a library is linked by one thread for minutes": job(
        node(
            job_cpu=flat(26, 200),
            ranks=[rank(0, 0.1, program="make"), rank(1, 99.0, program="ld")],
        )
    ),
    "data are unpacked before the parallel part": job(
        node(job_cpu=flat(25, 250), job_write=5e7, ranks=[rank(0, 97.0, program="tar")])
    ),
    "a parallel build that uses few of many CPUs for a while": job(
        node(
            job_cpus=32,
            job_cpu=flat(7, 400),
            ranks=[rank(k, 99.0, program="cc1plus") for k in range(2)],
        )
    ),
    "MPI ranks whose progress threads run now and then": job(
        node(
            job_cpus=8,
            job_cpu=50.0,
            psi_cpu=6.0,
            ranks=[rank(k, 99.0, str(k), running=2, threads=3) for k in range(4)],
        )
    ),
    "MPI ranks with progress threads on CPUs of their own": job(
        node(
            job_cpus=8,
            job_cpu=60.0,
            psi_cpu=2.0,
            ranks=[rank(k, 118.0, "%d,%d" % (k, k + 4), running=2) for k in range(4)],
        )
    ),
    "a mapped file that is read at random: a look finds nobody waiting": job(
        asleep(psi_io=35.0, job_cpu=1.5)
    ),
    "one of four GPUs validates what all have learnt": job(
        node(
            gpus=[gpu(0), *[gpu(k, 0.0) for k in (1, 2, 3)]],
            gpu=flat(20, 1200),
            gpu_min=flat(85, 1200)[:-60] + flat(0, 590),
        ),
        gpus=4,
    ),
    "a data loader that starts: it reads an index of files": job(
        node(
            job_cpu=8.0,
            job_read=flat(5e6, 900),
            gpus=[unused(0)],
            ranks=[rank(0, 30.0, state="S", read=5e6)],
            **LONG_GPU,
        ),
        gpus=1,
    ),
    "data are copied to the node's own disk before the GPU works": job(
        node(
            job_cpu=10.0,
            job_read=flat(2e8, 900),
            job_write=flat(2e8, 900),
            gpus=[unused(0)],
            ranks=[rank(0, 40.0, program="rsync")],
            **LONG_GPU,
        ),
        gpus=1,
    ),
    "memory in saw teeth: what grows is given back": job(
        node(job_mem=SAWTOOTH, job_mem_limit=2 * GB)
    ),
    "a cluster of workers that wait for tasks": job(
        asleep(
            ranks=[rank(k, 0.5, program="dask worker", state="S") for k in range(4)],
            job_cpu=flat(0.5, 900),
            **LONG_NO_IO,
        )
    ),
}
HEALTHY = {
    "a mapped file, larger than the limit of memory": job(
        node(
            job_mem=0.3 * GB,
            job_cache=1.6 * GB,
            job_mem_peak=2 * GB,
            ranks=[rank(0, 390.0, mem=1.9 * GB, running=4)],
        )
    ),
    "a task of an array that takes 40 s": ended(
        "COMPLETED",
        node(job_cpus=1, job_mem=flat(0.2 * GB, 30), job_mem_limit=8 * GB),
        job="4711_7",
        raw="4718",
        start=NOW - 100,
        limit=3600.0,
    ),
    "requeued, and it runs again on another node": job(
        long_ago(node("c1", oom_kill=1, lost=NOW - 400), 400),
        node("c2", job_cpu=flat(100, 290)),
        nodes=1,
        **STARTED,
    ),
    "requeued, and it runs again on one of two nodes that said goodbye": job(
        long_ago(node("c1", job_time_left=10.0, job_time_limit=5400.0), 900),
        node("c2", job_cpu=flat(100, 290), job_time_left=5000.0, job_time_limit=5400.0),
        events=[left("SIGTERM", "c1", ago=900)],
        nodes=1,
        **STARTED,
    ),
    "requeued, and it runs again on the same node": ended(
        "COMPLETED",
        before_it(
            node(job_mem=flat(GB, 120)), ("job_mem", [(NOW - 3000, 1.95 * GB)] * 9)
        ),
        start=NOW - 400,
        limit=400.0,
    ),
    "a part of a heterogeneous job waits for the others": job(
        asleep(job_cpu=flat(0, 900), **LONG_NO_IO), job="4711+2", raw="4713"
    ),
    "suspended, and resumed a while ago": job(
        node(job_cpu=flat(100, 900)[:-40] + flat(0, 20), job_mem=flat(GB, 900)[:-40])
    ),
    "memory that was freed later": job(
        node(
            job_mem=flat(1.7 * GB, 300) + ramp(1.7 * GB, 0.2 * GB, 60),
            job_mem_limit=2 * GB,
        )
    ),
    "I/O only": job(
        node(
            job_cpu=1.0,
            job_read=2e8,
            psi_io=80.0,
            ranks=[rank(0, 4.0, state="D", read=2e8)],
        )
    ),
    "I/O only, of which only the node's traffic is known": job(
        node(
            job_cpu=1.0,
            job_read=None,
            job_write=None,
            disk_read=2e8,
            disk_write=0.0,
            net_rx=0.0,
            net_tx=0.0,
        )
    ),
    "asleep for 30 s": job(node(job_cpu=flat(0, 30)), start=NOW - 30),
    "asleep for 30 s after an hour of work": job(
        node(job_cpu=flat(100, 600)[:-3] + flat(0, 30))
    ),
    "bursty": job(node(job_cpu=wave(0, 100))),
    "bursty, with long pauses": job(node(job_cpu=wave(0, 100, 1200, 240))),
    "bursty on one CPU": job(node(job_cpu=wave(0, 25))),
    "busy-waiting ranks": job(
        node(ranks=[rank(k, 100.0, cpus=str(k)) for k in range(4)])
    ),
    "busy-waiting ranks of a hybrid program": job(
        node(
            job_cpus=8,
            ranks=[rank(k, 400.0, cpus="0-7", running=4) for k in range(2)],
        )
    ),
    "master and workers on one node": job(
        node(job_cpu=75.0, ranks=[rank(0, 0.1, state="S", running=0)] + [rank(1)] * 3)
    ),
    "a master on a node of its own": job(
        node("c1", job_cpu=0.2, job_cpus=1), node("c2", job_cpus=4)
    ),
    "a master of several CPUs on a node of its own": job(
        node("c1", job_cpu=0.2, ranks=[rank(0, 0.2, state="S", running=0)]),
        node("c2", ranks=[rank(k) for k in range(1, 5)]),
    ),
    "very short": ended("COMPLETED", node(job_cpu=flat(25, 10)), start=NOW - 70),
    "very short with much memory": ended(
        "COMPLETED",
        node(job_mem=flat(GB, 10), job_mem_limit=256 * GB),
        start=NOW - 70,
        limit=60.0,
    ),
    "at 89 percent of its memory": job(node(job_mem=0.89 * 2 * GB)),
    "page cache at the limit": job(
        node(job_mem=0.2 * GB, job_cache=1.79 * GB, job_mem_peak=2 * GB)
    ),
    "page cache at a large limit": ended(
        "COMPLETED",
        node(
            job_mem=2 * GB,
            job_cache=253 * GB,
            job_mem_peak=256 * GB,
            job_mem_limit=256 * GB,
        ),
        limit=3600.0,
    ),
    "memory that is filled, and then stays": job(
        node(job_mem=ramp(0.2 * GB, 1.7 * GB, 120)[:-3] + flat(1.7 * GB, 20))
    ),
    "the start of a job: memory still grows": job(
        node(job_mem=ramp(0.1 * GB, 2 * GB, 120), job_mem_limit=256 * GB)
    ),
    "GPUs at work, CPUs not": job(
        node(job_cpu=2.0, gpus=[gpu(0), gpu(1)], gpu=90.0, gpu_min=88.0), gpus=2
    ),
    "a GPU job that still starts": job(
        node(job_cpu=25.0, gpus=[unused(0)], gpu=0.0, gpu_min=0.0), gpus=1
    ),
    "GPUs at their power cap": job(
        node(gpus=[gpu(0, 99.0, throttle="power cap")], gpu=99.0), gpus=1
    ),
    "a GPU job that prepares its data on the CPUs": job(
        node(job_cpu=95.0, gpus=[unused(0)], gpu=flat(0, 900), gpu_min=flat(0, 900)),
        gpus=1,
    ),
    "an inference server without requests": job(
        node(
            job_cpu=0.5,
            gpus=[gpu(0, 0.0), gpu(1, 0.0)],
            gpu=flat(0, 900),
            gpu_min=flat(0, 900),
            ranks=[rank(0, 1.0, program="vllm", state="S", running=0)],
        ),
        gpus=2,
    ),
    "GPUs that take turns": job(
        node(gpus=[gpu(0), gpu(1, 0.0)], gpu=wave(30, 60), gpu_min=wave(0, 40)), gpus=2
    ),
    "one thread a node, and one CPU": job(
        node("c1", job_cpus=1, job_cpu=100.0), node("c2", job_cpus=1, job_cpu=100.0)
    ),
    "half of the CPUs, by two threads each": job(node(job_cpu=50.0)),
    "a serial end of a parallel job": job(
        node(job_cpu=flat(100, 600)[:-10] + flat(25, 90))
    ),
    "a notebook whose user thinks": job(
        asleep(
            ranks=[rank(0, 0.1, program="jupyter-lab", state="S", running=0)],
            job_cpu=flat(0.1, 900),
            **LONG_NO_IO,
        )
    ),
    "salloc, and nothing is started yet": job(
        asleep(ranks=[], job_cpu=flat(0, 900), **LONG_NO_IO)
    ),
    "a shell whose user is away": job(
        asleep(
            ranks=[rank(0, 0.0, program="bash", state="S", running=0)],
            job_cpu=flat(0, 900),
            **LONG_NO_IO,
        )
    ),
    "the head of a workflow, which waits for jobs of its own": job(
        asleep(job_cpus=1, job_cpu=flat(1.0, 900), **LONG_NO_IO)
    ),
    "the leader of a heterogeneous job": job(
        asleep(job_cpu=flat(0, 600), **NO_IO), job="4711+0"
    ),
    "the workers of a heterogeneous job": job(node(), job="4711+1"),
    "a file that is mapped and read from a slow filesystem": job(
        asleep(ranks=[rank(0, 0.5, state="D", running=0)])
    ),
    "an I/O server that writes every four minutes": job(
        node("c1"),
        node(
            "c2",
            job_cpu=wave(0, 60, 1200, 480),
            ranks=[rank(1, 1.0, state="S")],
            **LONG_NO_IO,
        ),
    ),
    "one thread on the two CPUs of a core": job(node(job_cpus=2, job_cpu=50.0)),
    "two threads on two cores of two CPUs each": job(
        node(job_cpu=50.0, ranks=[rank(0, cpus="0,64"), rank(1, cpus="1,65")])
    ),
    "hybrid ranks, each with one thread more for a moment": job(
        node(
            job_cpus=8,
            job_cpu=88.0,
            ranks=[
                rank(k, 352.0, "%d-%d" % (4 * k, 4 * k + 3), running=5)
                for k in range(2)
            ],
        )
    ),
    "a rank and a small helper on the same CPU": job(
        node(
            job_cpu=45.0,
            job_cpus=4,
            ranks=[rank(0, 96.0, "0"), rank(1, 3.0, "0")]
            + [rank(k, 40.0, "1-3") for k in (2, 3)],
        )
    ),
    "a burst of threads that collect garbage": job(
        node(ranks=[rank(0, 390.0, running=16)], psi_cpu=8.0)
    ),
    "checkpoints: all ranks wait while they are written": job(
        node(
            job_cpu=wave(5, 100, 1200, 120),
            psi_io=60.0,
            job_write=3e8,
            ranks=[rank(k, 5.0, state="D", write=8e7) for k in range(4)],
        )
    ),
    "data that is loaded into memory, as fast as it is read": job(
        node(
            job_mem=ramp(1.0 * GB, 3.0 * GB, 100),
            job_mem_limit=4 * GB,
            job_read=2.1e7,
        )
    ),
    "the last of five nodes with fewer ranks": job(
        *[
            node(
                "c%d" % k,
                job_mem=flat(3 * GB, 400),
                job_mem_limit=6 * GB,
                job_cpu=flat(100, 400),
                ranks=[rank(4 * k + n) for n in range(4)],
            )
            for k in range(1, 5)
        ],
        node(
            "c5",
            job_mem=flat(1 * GB, 400),
            job_mem_limit=6 * GB,
            job_cpu=flat(50, 400),
            ranks=[rank(20), rank(21)],
        ),
    ),
    "little memory on nodes that nobody else can use": job(
        node(job_mem_limit=256 * GB, online=4)
    ),
    "a node whose clock is an hour ahead": job(
        node("c1", job_time_left=3000.0, job_time_limit=36000.0),
        node("c2", job_time_left=0.0, job_time_limit=36000.0),
        node("c3", job_time_left=3010.0, job_time_limit=36000.0),
        end=NOW + 3000,
    ),
    "a time limit that was raised": job(
        node(job_time_left=60.0, job_time_limit=3600.0), end=NOW + 7200
    ),
    "a master whose clock is an hour behind": ended(
        "COMPLETED", node(), start=NOW + 100, end=NOW + 3500, limit=3600.0
    ),
    "all of a job that is suspended falls silent": job(silent("c1", 40)),
    "a job that has just started": job(
        node(job_cpu=flat(0, 0), job_mem=flat(0.01 * GB, 0)), start=NOW - 3
    ),
    "a job that is being ended": job(asleep(), silent("c2", 30), state="COMPLETING"),
    "a task of an array on one CPU": job(node(job_cpus=1), job="4711_3", raw="4714"),
    "a container's image and a full disk of others' are not known": job(
        node(disk=None, disk_tmp=None)
    ),
    "ended well": ended("COMPLETED", node(), limit=3600.0),
    "ended well, told by the wrapper": job(node(), events=[left("exit 0")], state=""),
    "ended well, and Slurm ended what was left of its steps": ended(
        "COMPLETED", node(), derived_exit="0:15", limit=3600.0
    ),
    "the same, and one was killed": ended(
        "COMPLETED", node(), derived_exit="0:9", limit=3600.0
    ),
    "a sidecar that was told to end": job(node(), events=[left("SIGTERM")]),
    "an agent that came back": job(
        node(),
        events=[left("exit 3", ago=900), {"kind": "connected", "node": "c1"}],
    ),
    "another job's agent on the node": job(node(), events=[left("exit 3", job="4712")]),
    "waiting": job(state="PENDING", reason="Resources", nodes=2, start=NOW + 60),
    "ended a second ago, and Slurm has not told": job(silent("c1", 8)),
    "an attached agent's end a second before Slurm tells": job(
        node(), events=[left("no longer watched")]
    ),
}


def lines(evidence):
    return master_server.render_verdicts(diagnose(evidence))


def rules(evidence):
    return [verdict.rule for verdict in diagnose(evidence)]


class Sick(unittest.TestCase):
    def test_each_sick_job_is_told_with_node_rank_figures_and_cure(self):
        for name, (evidence, rule, pattern) in SICK.items():
            with self.subTest(name):
                self.assertEqual(rules(evidence), [rule])
                self.assertRegex(lines(evidence)[0], r"\A" + pattern)

    def test_each_death_is_told_with_its_time_place_cause_and_sources(self):
        for name, (evidence, rule, pattern) in DEAD.items():
            with self.subTest(name):
                self.assertEqual(rules(evidence), [rule])
                self.assertRegex(lines(evidence)[0], r"\A" + pattern)

    def test_what_explains_another_verdict_takes_its_place(self):
        full = 0.97 * 2 * GB
        for evidence, rule in (
            (job(node(oom_kill=1, job_mem=full)), "kill_survived"),
            (job(node(oom_kill=1, job_mem=full, swap=90)), "kill_survived"),
            (
                job(node(job_mem=ramp(1.1 * GB, 1.98 * GB, 120))),
                "memory_grows",
            ),
            (
                job(
                    node("c1", job_cpu=25.0, ranks=BOUND),
                    node("c2", ranks=[rank(5, 400.0, running=8)], psi_cpu=90.0),
                ),
                "few_cpus",
            ),
            (
                job(
                    node("c1", job_cpu=flat(90, 400)),
                    node("c2", job_cpu=flat(30, 400)),
                    asleep("c3", ranks=[rank(2)]),
                ),
                "idle_nodes",
            ),
            (
                job(
                    node("c1", job_cpu=25.0, gpu=20.0, gpus=[gpu(0, 20.0)]),
                    node("c2", job_cpu=25.0, gpu=0.0, gpus=[unused(0)]),
                    gpus=2,
                ),
                "idle_gpus",
            ),
            (ended("FAILED", node(oom_kill=1), exit="127:0"), "out_of_memory"),
            (ended("FAILED", node(oom_kill=1), exit="137:0"), "out_of_memory"),
            (
                ended("FAILED", node(), exit="0:11", events=[left("exit 127", ago=61)]),
                "not_started",
            ),
        ):
            with self.subTest(rule, evidence=evidence.facts):
                self.assertEqual(rules(evidence), [rule])

    def test_a_command_that_failed_on_one_node_is_no_death_while_another_goes_on(self):
        for bye in ("exit 127", "exit 3", "SIGBUS"):
            evidence = job(node("c1"), node("c2"), events=[left(bye, "c2")])
            self.assertEqual(rules(evidence), ["failed_step"])

    def test_each_check_of_the_table_has_a_job_here(self):
        told = {rule for _, rule, _ in list(SICK.values()) + list(DEAD.values())}
        notes = {"page_cache"}
        self.assertEqual({check.name for check in master_server.CHECKS}, told | notes)


class Healthy(unittest.TestCase):
    def test_a_healthy_job_is_fine_and_nothing_else(self):
        for name, evidence in {**KNOWN_BY_PROCESSES, **HEALTHY}.items():
            with self.subTest(name):
                verdicts = diagnose(evidence)
                self.assertEqual({verdict.severity for verdict in verdicts}, {"fine"})
                self.assertEqual(verdicts[0].rule, "fine")
                said = r"\A(fine|fine so far): "
                self.assertRegex(lines(evidence)[0], said)

    def test_page_cache_is_said_to_be_no_problem(self):
        text = lines(HEALTHY["page cache at the limit"])[1]
        self.assertRegex(
            text, "memory of c1 is full of page cache, and that is no problem"
        )
        self.assertRegex(text, "1.79 GB are files .*the program has 0.2 GB of 2 GB")
        over = HEALTHY["page cache at a large limit"]
        self.assertEqual(rules(over), ["fine"])  # it is of no use any more


# ---- edges: rule -> pairs of jobs, of which only the first is told -------------------

IO = {"job_cpu": 10.0, "psi_io": 70.0}
OTHER_IO = {"job_read": None, "job_write": None, "disk_read": 0.0, "disk_write": 0.0}


def worked(count):
    """So many points of work, from 200 s ago on, and no work in the points up to 180 s ago."""
    return [(NOW - 200 + 10 * k, 90.0 if k < count else 0.0) for k in range(3)]


def paused(before, since):
    """A curve of work with a pause in it, and one that has lasted since then."""
    work = flat(90, 1300)
    points = len(work)
    now = points - since // 10 - 1
    first = now - before // 10 - 10
    return [
        (moment, 0.0 if k > now or first < k <= first + before // 10 else value)
        for k, (moment, value) in enumerate(work)
    ]


def waiting(**more):
    return [rank(0, 2.0, **{"state": "D", "read": 1e5, **more})]


LOADED = ramp(1.0 * GB, 3.0 * GB, 60)


def clocks(*lefts):
    """A job whose nodes do not agree how much time is left."""
    return job(
        *[
            node("c%d" % k, job_time_left=left, job_time_limit=36000.0)
            for k, left in enumerate(lefts)
        ]
    )


def with_fewer_ranks(evidence, name):
    """The same job with two ranks on each node but one on that."""
    nodes = [
        known._replace(ranks=[rank(0)] if known.name == name else [rank(0), rank(1)])
        for known in evidence.nodes
    ]
    return evidence._replace(nodes=nodes)


def pinned(running, **more):
    """A rank of so many threads on CPUs 0 and 1."""
    return [rank(0, 190.0, "0-1", **{"running": running, **more})]


def leak(first, last, limit, seconds=60):
    return job(
        node(job_mem=ramp(first * GB, last * GB, seconds), job_mem_limit=limit * GB)
    )


def grown(used, limit, **more):
    return job(node(job_mem=used * GB, job_mem_limit=limit * GB, **more))


def crowd(running, psi_cpu=90.0, **readings):
    """A job with so many threads that can run."""
    return job(node(ranks=[rank(0, running=running)], psi_cpu=psi_cpu, **readings))


def peers(*sizes):
    return job(
        *[
            node("c%d" % k, job_mem=flat(size * GB, 400), job_mem_limit=64 * GB)
            for k, size in enumerate(sizes, 1)
        ]
    )


def uneven(*shares, seconds=400):
    return job(
        *[
            node("c%d" % k, job_cpu=flat(share, seconds))
            for k, share in enumerate(shares, 1)
        ]
    )


def sharing(count, cpu):
    """Ranks on one CPU of which nobody knows how many threads could run."""
    ranks = [rank(k, cpu, "0") for k in range(count)]
    for known in ranks:
        del known["running"]
    return ranks


def gapped(gap):
    """A serial program that was not seen for so long, 30 s ago."""
    late = [(NOW - 10 * k, 25.0) for k in (3, 2, 1, 0)]
    early = [(NOW - 30 - gap - 10 * k, 25.0) for k in (3, 2, 1, 0)]
    return job(node(job_cpu=early + late))


def worked_long_ago(**more):
    """A job that has done nothing for five minutes, after a minute of work."""
    known = {"job_cpu": flat(90, 600)[:-32] + flat(0, 310), "job_write": flat(0, 600)}
    return job(asleep(**known, **more))


def holding(megabytes):
    """A GPU of whose memory so much is in use, and no process is known."""
    return gpu(1, 0.0, mem_used=megabytes * 2**20, processes=0)


def noisy(fall):
    """A leak of 4 MB a second, of which so many GB are given back once."""
    points = [(moment, value) for moment, value in ramp(2.0 * GB, 3.4 * GB, 350)]
    points[-9] = (points[-9][0], points[-10][1] - fall * GB)
    return job(
        node(
            job_mem=points[:-3] + [(NOW - 20, points[-4][1])] + points[-2:],
            job_mem_limit=4 * GB,
        )
    )


def timed():
    """A program that sleeps until a time."""
    return [rank(0, 0.0, state="S", running=0, wchan="hrtimer_nanosleep")]


def stairs(seconds, last=()):
    """The last seconds of a leak in steps; its last point may be another."""
    points = STAIRS[-1 - seconds // 10 :]
    points = points[:-1] + list(last) if last else points
    return job(node(job_mem=points, job_mem_limit=4 * GB))


def grown_again(before, least=2.4):
    """A job whose memory grows to 3 GB, and had once been that many."""
    points = flat(before * GB, 200)[:-7] + ramp(least * GB, 3.0 * GB, 60)
    return job(node(job_mem=points, job_mem_limit=4 * GB))


def few(percent, seconds=400, name="c1", job_cpus=16, **more):
    """A job that has always used so much of its CPUs."""
    return job(node(name, job_cpus=job_cpus, job_cpu=flat(percent, seconds), **more))


def spinning(count):
    """A rank with so many threads on one CPU."""
    return [rank(0, 100.0, "0", running=count)]


def written(program, **more):
    """The job that one program of that name is, on one of four CPUs."""
    return job(node(job_cpu=25.0, ranks=[rank(0, 99.0, program=program)], **more))


def all_idle(seconds, **more):
    """A GPU that no program has opened for so long, and CPUs without work."""
    known = {"gpus": [unused(0)], "gpu": flat(0, seconds), "job_cpu": 2.0, **more}
    return job(node(**known), gpus=1)


def some_idle(seconds, before):
    """One of two GPUs idle for so long, though a program holds it; so many points of work."""
    points = [(NOW - seconds - 10 * (before - k), 50.0) for k in range(before)]
    return job(
        node(gpus=[gpu(0), gpu(1, 0.0)], gpu=45, gpu_min=points + flat(0, seconds))
    )


def dead_of_memory(*sizes):
    """A job out of memory, whose ranks had so many GB."""
    ranks = [rank(k, mem=size * GB) for k, size in enumerate(sizes)]
    return ended("OUT_OF_MEMORY", node(ranks=ranks, job_mem_limit=12 * GB))


EDGES = {
    "serial": (
        (gapped(25), gapped(26)),
        (job(node(job_cpu=21.25)), job(node(job_cpu=21.24))),
        (job(node(job_cpu=27.5)), job(node(job_cpu=27.6))),
        (job(node(job_cpu=21.5)), job(node(job_cpu=21.0))),
        (job(node(job_cpu=27.0)), job(node(job_cpu=28.0))),
        (job(node(job_cpu=flat(25, 60))), job(node(job_cpu=flat(25, 40)))),
        (job(node(job_cpu=34.0, job_cpus=3)), job(node(job_cpu=50.0, job_cpus=2))),
        (job(node(job_cpu=25.0)), job(node(job_cpu=50.0))),
        (job(node(job_cpu=25.0)), job(node(job_cpu=25.0), gpus=1)),
        (
            job(node(job_cpu=25.0, ranks=[rank(0)])),
            job(node(job_cpu=25.0, ranks=[rank(0, 50.0), rank(1, 50.0)])),
        ),
        (
            job(node(job_cpu=25.0, ranks=[rank(0, 80.0), rank(1, 20.0)])),
            job(node(job_cpu=25.0, ranks=[rank(0, 79.0), rank(1, 21.0)])),
        ),
        (
            job(node(job_cpu=flat(37.5, 300)[:-9] + flat(25, 80))),
            job(node(job_cpu=flat(37.6, 300)[:-9] + flat(25, 80))),
        ),
        (
            job(node(job_cpu=flat(30, 300)[:-9] + flat(25, 80))),
            job(node(job_cpu=flat(60, 300)[:-9] + flat(25, 80))),
        ),
        (
            job(node("c1", job_cpu=25.0), node("c2", job_cpu=25.0)),
            job(node("c1", job_cpu=25.0), node("c2", job_cpu=60.0)),
        ),
        (written("makers"), written("make")),
        (written("R"), written("ipython")),
        (
            job(node(job_cpu=flat(25, 1200), ranks=[rank(0, program="ipython")])),
            job(node(job_cpu=flat(25, 1180), ranks=[rank(0, program="ipython")])),
        ),
        (
            job(node(job_cpu=flat(25, 300), ranks=[rank(0, program="make")])),
            job(node(job_cpu=flat(25, 280), ranks=[rank(0, program="make")])),
        ),
    ),
    "idle_cpus": (
        (few(12.5), few(12.5, job_cpus=8, seconds=200)),
        (few(12.5, seconds=300), few(12.5, seconds=280)),
        (few(6.9), few(6.8)),
        (few(40.0), few(40.1)),
        (few(12.5), few(12.5, gpus=[gpu(0)])),
        (few(12.5), few(12.5)._replace(facts={"nodes": 2})),
        (few(12.5), few(12.5, ranks=[rank(0, program="make")])),
        (few(12.5), few(12.5, ranks=[rank(0, program="mysqld")])),
        (few(12.5), job(*few(12.5).nodes, job="4711+1")),
        (
            job(*few(12.5).nodes, *few(12.5, name="c2").nodes),
            job(*few(12.5).nodes, *few(90.0, name="c2").nodes),
        ),
        (
            few(12.5),
            job(node(job_cpus=16, job_cpu=[(NOW - 900, 90.0), *flat(12.5, 400)])),
        ),
    ),
    "few_cpus": (
        (
            job(node(job_cpu=22.5, job_cpus=4, ranks=sharing(2, 45.0))),
            job(node(job_cpu=22.5, job_cpus=4, ranks=sharing(1, 90.0))),
        ),
        (
            job(node(job_cpu=90.0, ranks=BOUND)),
            job(node(job_cpu=90.1, ranks=BOUND)),
        ),
        (
            job(node(job_cpu=21.25, ranks=BOUND)),
            job(node(job_cpu=21.24, ranks=BOUND)),
        ),
        (
            job(node(job_cpu=25.0, ranks=[rank(0, 75.0, "0"), rank(1, 25.0, "0")])),
            job(node(job_cpu=25.0, ranks=[rank(0, 75.1, "0"), rank(1, 24.9, "0")])),
        ),
        (
            job(node(job_cpu=25.0, psi_cpu=50.0, ranks=spinning(2))),
            job(node(job_cpu=25.0, psi_cpu=49.0, ranks=spinning(2))),
        ),
        (
            job(node(job_cpu=25.0, psi_cpu=0.0, ranks=BOUND)),
            job(node(job_cpu=25.0, psi_cpu=0.0, ranks=spinning(2))),
        ),
        (job(node(job_cpu=25.0, ranks=BOUND)), job(node(job_cpu=95.0, ranks=BOUND))),
        (job(node(job_cpu=25.0, ranks=BOUND)), job(node(job_cpu=20.0, ranks=BOUND))),
        (
            job(node(job_cpu=25.0, ranks=BOUND)),
            job(node(job_cpu=25.0, ranks=BOUND, job_cpus=1)),
        ),
        (
            job(node(job_cpu=25.0, ranks=BOUND)),
            job(node(job_cpu=25.0, ranks=[rank(0, cpus="0")])),
        ),
        (
            job(node(job_cpu=25.0, ranks=BOUND)),
            job(node(job_cpu=25.0, ranks=[dict(r, cpu=20.0) for r in BOUND])),
        ),
        (
            job(node(job_cpu=flat(25, 60), ranks=BOUND)),
            job(node(job_cpu=flat(25, 40), ranks=BOUND)),
        ),
        (
            job(node(job_cpu=25.0, ranks=[rank(k, 42.5, "0") for k in (0, 1)])),
            job(node(job_cpu=25.0, ranks=[rank(k, 42.4, "0") for k in (0, 1)])),
        ),
        (
            job(node(job_cpu=25.0, ranks=[rank(k, 2.0, "0") for k in range(48)])),
            job(node(job_cpu=25.0, ranks=[rank(k, 1.9, "0") for k in range(50)])),
        ),
        (
            job(node(job_cpu=25.0, ranks=BOUND)),
            job(node(job_cpu=25.0, ranks=[dict(r, cpus="") for r in BOUND])),
        ),
        (
            job(node(job_cpu=44.0, ranks=BOUND, job_cpus=2)),
            job(node(job_cpu=88.0, ranks=BOUND, job_cpus=1)),
        ),
        (
            job(node(job_cpu=80.0, ranks=[*pinned(3), rank(9, 50.0, "2")])),
            job(node(job_cpu=80.0, ranks=[*pinned(3), rank(9, 50.0, "2-3")])),
        ),
        (
            job(node(job_cpu=80.0, ranks=[*pinned(4), rank(9, 50.0, "2-3")])),
            job(node(job_cpu=80.0, ranks=[*pinned(3), rank(9, 50.0, "2-3")])),
        ),
        (
            job(node(job_cpu=25.0, ranks=[rank(0, 70.0, "0"), rank(1, 30.0, "0")])),
            job(node(job_cpu=25.0, ranks=[rank(0, 90.0, "0"), rank(1, 10.0, "0")])),
        ),
    ),
    "idle_job": (
        (job(asleep(job_cpu=flat(0, 60))), job(asleep(job_cpu=flat(0, 50)))),
        (job(asleep(job_cpu=2.5)), job(asleep(job_cpu=2.6))),
        (
            job(asleep(job_cpu=[*flat(0, 600)[:-21], *worked(2), *flat(0, 170)])),
            job(asleep(job_cpu=[*flat(0, 600)[:-21], *worked(3), *flat(0, 170)])),
        ),
        (job(asleep(job_read=1e5)), job(asleep(job_read=1.1e5))),
        (job(asleep(job_read=flat(0, 30))), job(asleep(job_read=flat(0, 20)))),
        (
            job(asleep(job_read=[(NOW - 70, 2e5), *flat(0, 60)])),
            job(asleep(job_read=[(NOW - 50, 2e5), *flat(0, 40)])),
        ),
        (job(asleep(job_cpu=0)), job(asleep(job_cpu=0, job_write=2e5))),
        (job(asleep(job_cpu=0)), job(asleep(job_cpu=0, gpu=50.0), gpus=1)),
        (job(asleep(job_cpu=0)), job(asleep(job_cpu=0, job_read=None))),
        (
            job(asleep(job_cpu=0, net_rx=0.0, net_tx=0.0, **OTHER_IO)),
            job(asleep(job_cpu=0, net_rx=2e5, net_tx=0.0, **OTHER_IO)),
        ),
        (
            job(asleep(job_cpu=0, net_rx=0.0, net_tx=0.0, **OTHER_IO)),
            job(asleep(job_cpu=0, net_rx=0.0, net_tx=0.0, **{**OTHER_IO, "psi_io": 9})),
        ),
        (
            job(asleep(net_rx=0.0, net_tx=0.0, **{**OTHER_IO, "psi_io": 4.9})),
            job(asleep(net_rx=0.0, net_tx=0.0, **{**OTHER_IO, "psi_io": 5.0})),
        ),
        (
            job(asleep(net_rx=0.0, net_tx=0.0, **{**OTHER_IO, "job_read": 0.0})),
            job(asleep(net_rx=2e5, net_tx=0.0, **{**OTHER_IO, "job_read": 0.0})),
        ),
        (
            job(asleep(job_cpu=0, net_rx=0.0, net_tx=0.0, **OTHER_IO)),
            job(asleep(job_cpu=0, net_rx=0.0, net_tx=0.0, ranks=waiting(), **OTHER_IO)),
        ),
        (
            job(asleep(job_cpu=flat(90, 600)[:-31] + flat(0, 300), **NO_IO)),
            job(asleep(job_cpu=flat(90, 600)[:-21] + flat(0, 200), **NO_IO)),
        ),
        (
            job(asleep(job_cpu=flat(12, 600)[:-21] + flat(0, 200), **NO_IO)),
            job(asleep(job_cpu=flat(13, 600)[:-21] + flat(0, 200), **NO_IO)),
        ),
        (job(asleep(), nodes=1), job(asleep(), nodes=2)),
        (job(asleep()), job(asleep(), job="4711+1")),
        (job(asleep(job_cpus=3)), job(asleep(job_cpus=2))),
        (
            job(asleep(job_cpu=flat(0, 1200), job_cpus=2, **LONG_NO_IO)),
            job(asleep(job_cpu=flat(0, 1180), job_cpus=2, **LONG_NO_IO)),
        ),
        (job(asleep()), job(asleep(ranks=[]))),
        (job(asleep()), job(asleep(ranks=[rank(0, 0.0, program="bash")]))),
        (job(asleep()), job(asleep(ranks=[rank(0, 0.0, program="jupyter-lab")]))),
        (job(asleep()), job(asleep(ranks=[rank(0, 0.0, state="D")]))),
        (
            job(asleep(job_cpu=flat(0, 300), ranks=timed())),
            job(asleep(job_cpu=flat(0, 280), ranks=timed())),
        ),
        (
            job(asleep(ranks=[rank(0, 0.0, program="bash", step="batch"), rank(1)])),
            job(asleep(ranks=[rank(0, 0.0, program="bash", step="0"), rank(1)])),
        ),
        (
            job(asleep(ranks=[rank(0, 0.0, step="0")])),
            job(asleep(ranks=[rank(0, 0.0, step="interactive")])),
        ),
        (job(asleep(psi_io=19.9)), job(asleep(psi_io=20.0))),
        (
            job(asleep(job_cpu=flat(12.4, 600)[:-21] + flat(0, 200), **NO_IO)),
            job(asleep(job_cpu=flat(12.5, 600)[:-21] + flat(0, 200), **NO_IO)),
        ),
        (
            worked_long_ago(job_read=flat(0, 600)),
            worked_long_ago(job_read=[(NOW - 290, 2e5), *flat(0, 280)]),
        ),
        (
            job(asleep(psi_io=flat(30, 120)[:-1] + [(NOW, 0.0)])),
            job(asleep(psi_io=flat(30, 30))),
        ),
        (
            job(asleep(job_cpu=paused(150, 310), **LONG_NO_IO)),
            job(asleep(job_cpu=paused(180, 310), **LONG_NO_IO)),
        ),
    ),
    "idle_nodes": (
        (
            job(node("c1"), node("c2", job_cpu=flat(0, 60))),
            job(node("c1"), node("c2", job_cpu=flat(0, 50))),
        ),
        (
            job(node("c1", job_cpu=12.5), node("c2", job_cpu=0)),
            job(node("c1", job_cpu=12.4), node("c2", job_cpu=0)),
        ),
        (
            job(node("c1", job_cpu=0, ranks=[rank(0), rank(1)]), node("c2")),
            job(node("c1", job_cpu=0, ranks=[rank(0)]), node("c2")),
        ),
        (
            job(asleep("c1", ranks=[rank(1)]), node("c2")),
            job(asleep("c1", ranks=[{"pid": 7}]), node("c2")),
        ),
        (
            job(node("c1"), node("c2", job_cpu=0)),
            job(node("c1"), node("c2", job_cpu=0), gpus=2),
        ),
        (
            job(node("c1"), node("c2", job_cpu=0)),
            job(node("c1"), node("c2", job_cpu=0, job_write=1e6)),
        ),
    ),
    "many_threads": (
        (crowd(5, job_cpu=95.0), crowd(5, job_cpu=94.0)),
        (crowd(5, job_cpu=flat(95, 60)), crowd(5, job_cpu=flat(95, 40))),
        (crowd(5), crowd(4)),
        (crowd(24, job_cpus=20), crowd(23, job_cpus=20)),
        (crowd(5, psi_cpu=50.0), crowd(5, psi_cpu=49.0)),
        (crowd(5, psi_cpu=None, load1=4.8), crowd(5, psi_cpu=None, load1=4.7)),
        (crowd(5), crowd(5, psi_cpu=None)),
    ),
    "uneven_nodes": (
        (uneven(95, 40), uneven(95, 50)),
        (uneven(50, 20), uneven(49.9, 20)),
        (uneven(95, 5), uneven(95, 4.9)),
        (
            uneven(95, 40),
            job(node("c1", job_cpu=flat(95, 400)), node("c2", job_cpu=SPIKES)),
        ),
        (uneven(95, 6, 94), uneven(40, 95, 94)),
        (uneven(95, 40, seconds=300), uneven(95, 40, seconds=200)),
        (uneven(95, 40), uneven(95, 40)._replace(facts={"nodes": 3})),
        (
            uneven(95, 40),
            job(node("c1", job_cpu=flat(95, 400)), node("c2", job_cpus=16, job_cpu=40)),
        ),
    ),
    "idle_gpus": (
        (
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=flat(0, 60))),
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=flat(0, 40))),
        ),
        (
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=1)),
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=2)),
        ),
        (
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=0)),
            job(node(gpus=[gpu(0), gpu(1, 0.0)], gpu=45, gpu_min=0)),
        ),
        (
            job(node(gpus=[gpu(0), holding(99.9)], gpu=45, gpu_min=0)),
            job(node(gpus=[gpu(0), holding(100)], gpu=45, gpu_min=0)),
        ),
        (
            job(node(gpus=[gpu(0), unused(1)], gpu=45, gpu_min=0)),
            job(node(gpus=[gpu(0), dict(unused(1), processes=1)], gpu=45, gpu_min=0)),
        ),
        (
            job(node(gpus=[gpu(0, 0.0)], gpu=flat(0, 1200))),
            job(node(gpus=[gpu(0, 0.0)], gpu=flat(0, 1180))),
        ),
        (
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=12.0)),
            job(node(gpus=[unused(0)], gpu=flat(0, 280), job_cpu=12.0)),
        ),
        (
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=12.0)),
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=13.0)),
        ),
        (
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=12.0)),
            job(node(gpus=[gpu(0, 0.0)], gpu=flat(0, 300), job_cpu=12.0)),
        ),
        (
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=12.0)),
            job(node(gpus=[unused(0)], gpu=flat(0, 300), job_cpu=None)),
        ),
        (
            job(node(gpus=[gpu(0), gpu(1, 0.0)], gpu=45, gpu_min=flat(0, 300))),
            job(node(gpus=[gpu(0), gpu(1, 0.0)], gpu=45, gpu_min=flat(0, 280))),
        ),
        (all_idle(300), all_idle(280)),
        (
            job(node(gpus=[gpu(0), dict(unused(1), gpu=1.0)], gpu=45, gpu_min=1)),
            job(node(gpus=[gpu(0), dict(unused(1), gpu=1.1)], gpu=45, gpu_min=1)),
        ),
        (
            all_idle(300, job_read=flat(1e5, 900)),
            all_idle(300, job_read=flat(1.1e5, 900)),
        ),
        (all_idle(1200, job_write=1e8), all_idle(1180, job_write=1e8)),
        (all_idle(300), all_idle(300, ranks=[rank(0, program="ipykernel_launcher")])),
        (some_idle(300, 2), some_idle(300, 3)),
        (some_idle(1200, 9), some_idle(1180, 9)),
        (
            job(node(gpus=[gpu(0, 0.0)], gpu=flat(0, 1200))),
            job(node(gpus=[{"index": 0, "mig": "1g.10gb"}], gpu=flat(0, 1200))),
        ),
    ),
    "starved_gpus": (
        (
            job(node(job_cpu=25.0, gpu=flat(10, 120)[:-1] + [(NOW, 49.9)])),
            job(node(job_cpu=25.0, gpu=flat(10, 120)[:-1] + [(NOW, 50.0)])),
        ),
        (job(node(job_cpu=25.0, gpu=24.9)), job(node(job_cpu=25.0, gpu=25.0))),
        (
            job(node(job_cpu=50.0, job_cpus=2, gpu=20.0)),
            job(node(job_cpu=100.0, job_cpus=1, gpu=20.0)),
        ),
        (
            job(node(job_cpu=25.0, gpu=24.0)),
            job(node(job_cpu=25.0, gpu=26.0)),
        ),
        (job(node(job_cpu=25.0, gpu=2.0)), job(node(job_cpu=25.0, gpu=1.0))),
        (job(node(job_cpu=25.0, gpu=20.0)), job(node(job_cpu=40.0, gpu=20.0))),
        (
            job(node(job_cpu=25.0, gpu=20.0)),
            job(node(job_cpu=100.0, job_cpus=1, gpu=20.0)),
        ),
        (
            job(node(job_cpu=25.0, gpu=20.0)),
            job(node(job_cpu=25.0, gpu=flat(20, 90))),
        ),
        (
            job(node(job_cpu=25.0, gpu=20.0)),
            job(node(job_cpu=25.0, gpu=flat(10, 120)[:-1] + [(NOW, 80.0)])),
        ),
    ),
    "slowed_gpus": (
        (
            job(node(gpus=[gpu(0, throttle="HW slowdown")])),
            job(node(gpus=[gpu(0, throttle="power cap")])),
        ),
        (
            job(node(gpus=[gpu(0, throttle="power cap, power brake")])),
            job(node(gpus=[gpu(0, throttle="clocks set by an application")])),
        ),
        (
            job(node(gpus=[gpu(0, 50.0, throttle="thermal")])),
            job(node(gpus=[gpu(0, 40.0, throttle="thermal")])),
        ),
    ),
    "memory_grows": (
        (leak(1.0, 2.0, 3.9), leak(1.0, 1.9, 4.0)),
        (leak(2.9, 3.0, 3.9), leak(2.9, 3.0, 4.1)),
        (leak(1.0, 3.0, 4.0, 60), leak(1.0, 3.0, 4.0, 40)),
        (stairs(390), stairs(280)),
        (stairs(390), stairs(390, [(NOW, 3.15 * GB)])),
        (noisy(0.19), noisy(0.21)),
        (grown_again(2.85), grown_again(2.87)),
        (grown_again(2.9, 2.62), grown_again(2.9, 2.6)),
        (
            job(node(job_mem=LOADED, job_mem_limit=4 * GB, job_read=0.01 * GB)),
            job(node(job_mem=LOADED, job_mem_limit=4 * GB, job_read=0.02 * GB)),
        ),
        (
            job(node(job_mem=LOADED, job_mem_limit=3.7 * GB, job_read=0.02 * GB)),
            job(node(job_mem=LOADED, job_mem_limit=3.8 * GB, job_read=0.02 * GB)),
        ),
        (
            leak(1.0, 3.0, 4.0),
            job(node(job_mem=wave(1.0 * GB, 3.0 * GB), job_mem_limit=4 * GB)),
        ),
        (
            leak(1.0, 3.0, 4.0),
            job(
                node(
                    job_mem=ramp(1.0 * GB, 3.0 * GB, 60)[:-1] + [(NOW, 2.5 * GB)],
                    job_mem_limit=4 * GB,
                )
            ),
        ),
    ),
    "memory_near_limit": (
        (grown(0.91, 1), grown(0.90, 1)),
        (grown(1.801, 2), grown(1.8, 2)),
        (
            job(node(job_mem=flat(1.95 * GB, 20))),
            job(node(job_mem=flat(1.95 * GB, 10))),
        ),
    ),
    "swapping": (
        (job(node(swap=20.0, psi_mem=10.0)), job(node(swap=19.0, psi_mem=10.0))),
        (job(node(swap=20.0, psi_mem=10.0)), job(node(swap=20.0, psi_mem=9.9))),
        (
            job(node(swap=20.0, psi_mem=flat(10, 60))),
            job(node(swap=20.0, psi_mem=flat(10, 40))),
        ),
    ),
    "waits_for_io": (
        (job(node(ranks=waiting(), **IO)), job(node(ranks=waiting(state="S"), **IO))),
        (job(node(ranks=waiting(), **IO)), job(node(ranks=waiting(read=6e6), **IO))),
        (
            job(node(ranks=waiting(read=4.9e6), **IO)),
            job(node(ranks=waiting(read=5e6), **IO)),
        ),
        (
            job(node(ranks=waiting(), **{**IO, "psi_io": 50.0})),
            job(node(ranks=waiting(), **{**IO, "psi_io": 49.9})),
        ),
        (
            job(node(ranks=waiting(), **{**IO, "job_cpu": 49.9})),
            job(node(ranks=waiting(), **{**IO, "job_cpu": 50.0})),
        ),
        (
            job(node(ranks=waiting(), **{**IO, "psi_io": flat(70, 60)})),
            job(node(ranks=waiting(), **{**IO, "psi_io": flat(70, 40)})),
        ),
        (
            job(node(ranks=waiting(), **IO)),
            job(node(ranks=waiting(), **{**IO, "psi_io": 49})),
        ),
        (
            job(node(ranks=waiting(), **IO)),
            job(node(ranks=waiting(), **{**IO, "job_cpu": 50})),
        ),
        (
            job(node(ranks=waiting(), **IO)),
            job(node(ranks=waiting() + [{"pid": 5}], **IO)),
        ),
    ),
    "full_filesystem": (
        (job(node(disk_tmp=98.0)), job(node(disk_tmp=97.0))),
        (job(node(disk_shm=98.0)), job(node(disk_shm=97.0))),
        (job(node(disk=99.6)), job(node(disk=99.0))),
        (job(node(inodes=99.6)), job(node(inodes=99.0))),
        (job(node(inodes_tmp=98.0)), job(node(inodes_tmp=97.0))),
        (job(node(disk_tmp=flat(99, 20))), job(node(disk_tmp=flat(99, 10)))),
    ),
    "time_limit_near": (
        (
            job(node(job_time_left=599.0, job_time_limit=36000.0)),
            job(node(job_time_left=601.0, job_time_limit=36000.0)),
        ),
        (
            job(node(job_time_left=29.0, job_time_limit=300.0)),
            job(node(job_time_left=31.0, job_time_limit=300.0)),
        ),
        (
            job(node(job_time_left=500.0, job_time_limit=36000.0), end=NOW + 599),
            job(node(job_time_left=500.0, job_time_limit=36000.0), end=NOW + 601),
        ),
        (
            clocks(500.0, 500.0, 9000.0),
            clocks(500.0, 9000.0, 9000.0),
        ),
    ),
    "odd_node": (
        (peers(3, 7, 3, 3), peers(3, 6, 3, 3)),
        (peers(3, 1, 3, 3), peers(3, 1.6, 3, 3)),
        (peers(3, 7, 3, 3), peers(7, 3, 3, 3)),
        (peers(3, 7, 3, 3), peers(3, 7, 3)),
        (peers(3, 9, 3, 3), peers(3, 9, 4, 3)),
        (peers(3, 9, 3.44, 3), peers(3, 9, 3.46, 3)),
        (peers(2, 9, 2.25, 2), peers(2, 9, 2.375, 2)),
        (peers(3, 6.01, 3, 3), peers(3, 6, 3, 3)),
        (peers(3, 1.49, 3, 3), peers(3, 1.5, 3, 3)),
        (peers(1, 3, 1, 1), peers(0.99, 3, 0.99, 0.99)),
        (peers(3, 9, 3, 3), peers(0.3, 0.9, 0.3, 0.3)),
        (peers(3, 1, 3, 3), with_fewer_ranks(peers(3, 1, 3, 3), "c2")),
    ),
    "node_silent": (
        (
            job(node("c1"), silent("c2", 30), start=NOW - 120),
            job(node("c1"), long_ago(silent("c2", 30), 300), start=NOW - 120),
        ),
        (
            job(long_ago(silent("c1", 50), 300), nodes=1, start=NOW + 60),
            job(node("c1"), long_ago(silent("c2", 30), 300), start=NOW - 60),
        ),
        (job(node("c1"), silent("c2", 5)), job(node("c1"), silent("c2", 4))),
        (job(silent("c1", 45)), job(silent("c1", 44))),
        (
            job(node("c1"), silent("c2", 30)),
            job(node("c1"), silent("c2", 30), events=[left("exit 0", "c2", ago=30)]),
        ),
        (
            job(node("c1"), silent("c2", 30)),
            job(node("c1"), silent("c2", 30), state="COMPLETING"),
        ),
    ),
    "too_much_memory": (
        (grown(61, 256), grown(107, 256)),
        (grown(0.4, 2), grown(0.4, 1.2)),
        (grown(61, 256, online=5), grown(61, 256, online=4)),
        (
            grown(61, 256, online=2, job_cpus=2),
            grown(61, 256, online=3, job_cpus=3),
        ),
        (
            grown(61, 256, job_mem_peak=61.0 * GB),
            grown(61, 256, job_mem_peak=200.0 * GB),
        ),
        (
            grown(61, 256),
            job(node(job_mem=ramp(58 * GB, 61 * GB), job_mem_limit=256 * GB)),
        ),
        (
            job(node(job_mem=flat(61 * GB, 60), job_mem_limit=256 * GB)),
            job(node(job_mem=flat(61 * GB, 40), job_mem_limit=256 * GB)),
        ),
        (grown(61, 256), grown(61, 256)._replace(facts={"nodes": 2})),
        (
            grown(61, 256, ranks=[rank(0, 400.0, running=4)]),
            grown(61, 256, ranks=[rank(0, 400.0, running=4, program="jupyter-lab")]),
        ),
        (
            ended("COMPLETED", node(job_mem_limit=256 * GB, lost=NOW - 60)),
            ended("FAILED", node(job_mem_limit=256 * GB)),
        ),
    ),
    "tight_memory": (
        (
            ended("COMPLETED", node(job_mem=1.81 * GB)),
            ended("COMPLETED", node(job_mem=1.79 * GB)),
        ),
        (
            ended("COMPLETED", node(job_mem=1.81 * GB)),
            ended("COMPLETED", node(job_mem=0.2 * GB, job_mem_peak=2.0 * GB)),
        ),
    ),
    "too_much_time": (
        (
            ended("COMPLETED", node(), limit=3540 / 0.59),
            ended("COMPLETED", node(), limit=3540 / 0.61),
        ),
        (
            ended("COMPLETED", node(), start=NOW - 660, limit=2401.0),
            ended("COMPLETED", node(), start=NOW - 660, limit=2399.0),
        ),
        (
            ended("COMPLETED", node(), start=NOW - 600, end=NOW + 120, limit=3600),
            ended("COMPLETED", node(), start=NOW - 600, end=NOW + 7200, limit=3600),
        ),
        (
            ended("COMPLETED", node(), start=NOW - 120),
            ended("COMPLETED", node(), start=NOW - 119),
        ),
        (ended("COMPLETED", node(), limit=9e4), ended("TIMEOUT", node(), limit=9e4)),
    ),
    "kill_survived": ((job(node(oom_kill=1)), job(node(oom_kill=0))),),
    "out_of_memory": (
        (ended("FAILED", node(oom_kill=1)), ended("FAILED", node(oom_kill=0))),
        (ended("FAILED", node(oom_kill=1)), ended("CANCELLED", node(oom_kill=1))),
        (ended("FAILED", node(oom_kill=1)), ended("TIMEOUT", node(oom_kill=1))),
    ),
}


# the same for the words of a verdict: of two jobs, the first has them
WORDS = (
    (grown(0.951 * 2, 2), grown(0.95 * 2, 2), r"^! memory of c1 is nearly full"),
    (crowd(8), crowd(7), r"^! \d threads take turns"),
    (few(13.1), few(13.2), r"^\. at most 2 of 16 CPUs"),
    (
        few(12.5, ranks=[rank(0, 20.1, "0-15"), rank(1, 20.1, "0-15")]),
        few(12.5, ranks=[rank(0, 20.0, "0-15"), rank(1, 20.0, "0-15")]),
        "--ntasks=2$",
    ),
    (
        crowd(8),
        job(node(ranks=[rank(0, running=8, program="make")], psi_cpu=90.0)),
        r"^! \d threads take turns",
    ),
    (
        job(asleep(job_cpu=0.0, job_cpus=3)),
        job(asleep(job_cpus=2, job_cpu=flat(0, 1250), **LONG_NO_IO)),
        "^! . CPUs idle",
    ),
    (
        job(node(ranks=[rank(k, 50.0) for k in range(8)], psi_cpu=90.0)),
        job(node(ranks=[rank(k, 200.0, running=4) for k in range(2)], psi_cpu=90.0)),
        "OMP_NUM_THREADS=1$",
    ),
    (
        job(node(oom_kill=1, job_mem=1.0 * GB, ranks=[rank(0, mem=1.0 * GB)])),
        job(node(oom_kill=1, job_mem=1.0 * GB, ranks=[rank(0, mem=0.99 * GB)])),
        "rank 0 .* had 1 GB",
    ),
    (
        job(node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.03 * GB, 100))),
        job(node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.015 * GB, 100))),
        "it grew by",
    ),
    (
        job(node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.5 * GB, 40))),
        job(node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.5 * GB, 30))),
        "it grew by",
    ),
    (
        job(node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.5 * GB, 40))),
        job(node(oom_kill=1, job_mem=wave(1.0 * GB, 1.5 * GB, 40))),
        "it grew by",
    ),
    (
        ended("OUT_OF_MEMORY", node(oom_kill=1, job_mem=ramp(1.0 * GB, 1.5 * GB, 40))),
        ended("OUT_OF_MEMORY", node(oom_kill=1, job_mem=wave(1.0 * GB, 1.5 * GB, 40))),
        r"-> --mem=\w+  # if that is enough: it still grew when it was killed",
    ),
    (
        dead_of_memory(11.0, 1.0, 0.5),
        dead_of_memory(10.0, 1.0, 0.5),
        r"# or distribute: rank 0 holds it all",
    ),
    (dead_of_memory(11.0, 1.0, 0.5), dead_of_memory(11.0, 1.0), r"# or distribute"),
    (
        ended("FAILED", node(disk_shm=98.0), exit="0:7"),
        ended("FAILED", node(disk_shm=97.9), exit="0:7"),
        "its shared memory had no room",
    ),
    (
        ended("FAILED", node(), exit="129:0"),
        ended("FAILED", node(), exit="128:0"),
        "SIGHUP on c1: .*exit code 129 is how a shell tells it",
    ),
)


class Edges(unittest.TestCase):
    def test_of_two_jobs_on_the_two_sides_of_a_threshold_one_has_the_words(self):
        for number, (told, untold, words) in enumerate(WORDS):
            with self.subTest(words, number=number):
                self.assertRegex(lines(told)[0], words)
                self.assertNotRegex("\n".join(lines(untold)), words)

    def test_of_two_jobs_on_the_two_sides_of_a_threshold_one_is_told(self):
        for rule, pairs in EDGES.items():
            for number, (told, untold) in enumerate(pairs):
                with self.subTest(rule, number=number):
                    self.assertIn(rule, rules(told))
                    self.assertNotIn(rule, rules(untold))


class Evidence(unittest.TestCase):
    """What is not known is no evidence."""

    CHECKS = {check.name: check for check in master_server.CHECKS}

    def all(self):
        for name, (evidence, rule, _) in [*SICK.items(), *DEAD.items()]:
            yield name, evidence, self.CHECKS[rule]

    def each_node(self, evidence, change):
        return evidence._replace(nodes=[change(known) for known in evidence.nodes])

    def test_without_a_reading_that_it_needs_a_check_is_silent(self):
        for name, evidence, check in self.all():
            for need in check.needs:
                for value in (None, math.nan, math.inf, -1.0, "much", True):
                    part = need in master_server.LISTED
                    if part and value is not None:
                        continue

                    def change(known, need=need, value=value, part=part):
                        if part:
                            return known._replace(**{need: []})
                        return known._replace(sample={**known.sample, need: value})

                    with self.subTest(name, need=need, value=value):
                        self.assertNotIn(
                            check.name, rules(self.each_node(evidence, change))
                        )

    def test_a_job_that_ended_before_any_curve_is_judged_all_the_same(self):
        known = [(name, evidence) for name, evidence, _ in self.all()]
        for name, evidence in [*known, *HEALTHY.items()]:
            bare = self.each_node(evidence, lambda node: node._replace(curves={}))
            for state in (evidence.facts.get("state"), "COMPLETED"):
                with self.subTest(name, state=state):
                    facts = {**bare.facts, "state": state}
                    self.assertTrue(diagnose(bare._replace(facts=facts)))

    def test_without_a_curve_over_all_of_its_time_a_check_is_silent(self):
        changes = {
            "none": lambda curve: [],
            "one point": lambda curve: curve[-1:],
            "a hole": lambda curve: curve[:-4] + curve[-1:],
            "unknown at times": lambda curve: [
                (moment, math.nan if -50 < moment - NOW < -15 else value)
                for moment, value in curve
            ],
            "stale": lambda curve: [(moment - 40, value) for moment, value in curve],
            "of the future": lambda curve: [
                (moment + 9e3, value) for moment, value in curve
            ],
            "no curve": lambda curve: "much",
        }
        for name, evidence, check in self.all():
            for key in check.holds:
                for words, change in changes.items():

                    def cut(known, key=key, change=change):
                        curve = change(known.curves.get(key, []))
                        return known._replace(curves={**known.curves, key: curve})

                    with self.subTest(name, key=key, change=words):
                        self.assertNotIn(
                            check.name, rules(self.each_node(evidence, cut))
                        )

    def test_points_that_are_none_hide_no_others(self):
        for odd in (None, "x", (NOW,), (NOW, "x"), ("x", 1.0), [NOW, None]):
            evidence, rule, _ = SICK["a serial program on 4 CPUs"]

            def add(known, odd=odd):
                curve = [*known.curves["job_cpu"], odd]
                return known._replace(curves={**known.curves, "job_cpu": curve})

            with self.subTest(odd=odd):
                self.assertEqual(rules(self.each_node(evidence, add)), [rule])

    def test_without_a_fact_that_it_needs_a_check_is_silent(self):
        for name, evidence, check in self.all():
            for key in check.facts:
                facts = {**evidence.facts, key: None}
                with self.subTest(name, key=key):
                    self.assertNotIn(check.name, rules(evidence._replace(facts=facts)))

    def test_what_is_told_of_a_whole_job_needs_all_of_its_nodes(self):
        whole = (
            "idle_job",
            "uneven_nodes",
            "odd_node",
            "too_much_memory",
            "tight_memory",
        )
        for name, evidence, check in self.all():
            if check.name in whole:
                facts = {**evidence.facts, "nodes": len(evidence.nodes) + 1}
                with self.subTest(name):
                    self.assertNotIn(check.name, rules(evidence._replace(facts=facts)))

    def test_a_job_that_waits_or_is_suspended_has_no_problem(self):
        for name, (evidence, _, _) in SICK.items():
            if evidence.facts["state"] == "RUNNING":
                facts = {**evidence.facts, "state": "SUSPENDED"}
                found = diagnose(evidence._replace(facts=facts))
                with self.subTest(name):
                    self.assertEqual({verdict.severity for verdict in found}, {"fine"})

    def test_a_problem_is_told_after_a_minute_and_a_death_at_once(self):
        for name in (
            "a serial program on 4 CPUs",
            "all on CPU 0",
            "one of two nodes asleep",
            "a leak",
            "over-asked memory",
            "/tmp full",
        ):
            evidence, rule, _ = SICK[name]

            def young(known):
                return known._replace(
                    curves={key: curve[-7:] for key, curve in known.curves.items()}
                )

            with self.subTest(name):
                self.assertIn(rule, rules(self.each_node(evidence, young)))
                self.assertLessEqual(self.CHECKS[rule].seconds, 75)
        for check in master_server.CHECKS:
            if check.severity == "died":
                self.assertEqual(check.seconds, 0)

    def test_enough_is_looked_at_of_each_curve_that_a_check_needs(self):
        for check in master_server.CHECKS:
            for key in check.holds:
                points = master_server.CURVES[key] or 9e9
                with self.subTest(check.name, key=key):
                    self.assertGreater(10 * points, 1.2 * check.seconds)

    def test_odd_evidence_is_no_error_and_its_verdicts_are_whole(self):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        cases = [evidence for _, evidence, _ in self.all()] + list(HEALTHY.values())
        for number in range(FUZZED):
            evidence = spoil(chance.choice(cases), chance)
            with self.subTest(seed=seed, number=number):
                found = diagnose(evidence)
                self.assertTrue(found)
                for verdict in found:
                    self.assertIn(verdict.severity, master_server.SEVERITIES)
                    self.assertTrue(verdict.what)
                    text = " ".join(verdict)
                    self.assertNotRegex(text, r"\bnan\b|\binf\b|None|(?<!\$)\{|e\+\d")
                self.assertEqual(
                    master_server.parse_verdicts(
                        json.loads(json.dumps(master_server.verdicts_json(found)))
                    ),
                    found,
                )

    def test_healthy_jobs_stay_fine_when_something_is_not_known(self):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        for name, evidence in HEALTHY.items():
            for number in range(FUZZED // 50):
                less = forget(evidence, chance)
                found = diagnose(less)
                with self.subTest(name, seed=seed, number=number):
                    self.assertEqual({verdict.severity for verdict in found}, {"fine"})


ODD = (
    None,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1,
    1e300,
    10**400,
    "",
    "x",
    "9" * 300,
)
ODD += (
    True,
    [],
    {},
    (1,),
    2**63,
    -0.0,
    1e-300,
    "0-99999999",
    "exit 999",
    "0:999",
    b"x",
)


def spoil_dict(values, chance):
    """Some of a dict's values become odd, or are gone."""
    spoiled = dict(values)
    for key in list(spoiled):
        if chance.random() < 0.2:
            spoiled[key] = chance.choice(ODD)
        elif chance.random() < 0.05:
            del spoiled[key]
    return spoiled


def spoil_curve(curve, chance):
    draw = chance.random()
    if draw < 0.7:
        return curve
    if draw < 0.75:
        return chance.choice(ODD)
    return [
        chance.choice((point, chance.choice(ODD), (NOW, chance.choice(ODD))))
        for point in curve
    ]


def spoil(evidence, chance):
    nodes = []
    for known in evidence.nodes:
        nodes.append(
            known._replace(
                sample=spoil_dict(known.sample, chance),
                curves={
                    key: spoil_curve(curve, chance)
                    for key, curve in known.curves.items()
                },
                ranks=[spoil_dict(part, chance) for part in known.ranks],
                gpus=[spoil_dict(part, chance) for part in known.gpus],
                lost=chance.choice((known.lost, known.lost, chance.choice(ODD))),
                cpus=chance.choice((known.cpus, set(), None)),
            )
        )
    events = [spoil_dict(event, chance) for event in evidence.events]
    return evidence._replace(
        facts=spoil_dict(evidence.facts, chance), nodes=nodes, events=events
    )


def forget(evidence, chance):
    """Some readings, curves and parts are not known."""
    nodes = []
    for known in evidence.nodes:
        kept = {key for key in known.sample if chance.random() < 0.8}
        nodes.append(
            known._replace(
                sample={key: known.sample[key] for key in kept},
                curves={
                    key: curve for key, curve in known.curves.items() if key in kept
                },
                ranks=known.ranks if chance.random() < 0.8 else [],
                gpus=known.gpus if chance.random() < 0.8 else [],
            )
        )
    return evidence._replace(nodes=nodes)


class Bounds(unittest.TestCase):
    """What can be true of a reading, and what is made of it."""

    def test_of_readings(self):
        for value, known in (
            (0, 0.0),
            (1e18, 1e18),
            (1.001e18, None),
            (-0.001, None),
            (True, None),
        ):
            self.assertEqual(master_server.clean_number(value), known)
        for number, known in ((0, {}), (0.5, {"job_cpus": 0.5}), (1, {"job_cpus": 1})):
            self.assertEqual(master_server.clean_dict({"job_cpus": number}, ()), known)
        self.assertEqual(master_server.clean_dict({"swap": 0}, ()), {"swap": 0.0})

    def test_of_points_of_a_curve(self):
        known = [(0.0, 0.0), (NOW, 1e18), (NOW + 10, 1.0)]
        unknown = [(NOW + 10.1, 1.0), (-1.0, 1.0), (NOW, 1.1e18), (NOW, -1.0)]
        for odd in ([], ["x"]):
            points = known + unknown + odd
            self.assertEqual(master_server.clean_curve(points, NOW), known)

    def test_of_lists_of_cpus(self):
        for text, count in (
            ("0-8191", 8192),
            ("0-8192", 0),
            ("8191", 1),
            ("8192", 0),
        ):
            cpus = master_server.parse_cpu_list(text)
            self.assertEqual(len(cpus), count, text)
        self.assertEqual(
            len(master_server.parse_cpu_list("1" * 3 + ",1" * 43 + "1")), 3
        )
        self.assertEqual(
            len(master_server.parse_cpu_list("1" * 4 + ",1" * 43 + "1")), 0
        )

    def test_of_the_end_of_a_job(self):
        for end, told in (
            (NOW - 100, NOW - 100),
            (NOW + 60, NOW + 60),
            (NOW + 61, None),
            (NOW - 101, None),
        ):
            evidence = job(state="FAILED", start=NOW - 100, end=end)
            self.assertEqual(master_server.Case(evidence).end, told)
        for end, ran in ((NOW - 100, 0.0), (NOW - 99, 1.0), (NOW - 101, None)):
            evidence = job(state="FAILED", start=NOW - 100, end=end)
            self.assertEqual(master_server.Case(evidence).ran, ran)

    def test_of_a_goodbye(self):
        for ago, is_one in ((10.0, True), (10.1, False)):
            evidence = job(node(), events=[left("exit 3", ago=ago)])
            self.assertEqual(bool(master_server.Case(evidence).goodbyes), is_one)

    def test_of_all_nodes_there_is_one_at_least(self):
        case = master_server.Case(job(nodes=0))
        self.assertFalse(case.is_whole([]))
        self.assertFalse(case.all_have_left())
        self.assertFalse(case.is_over)

    def test_of_a_run_that_was_before_this_one(self):
        for ago, count in ((310.0, 2), (311.0, 1)):
            older = long_ago(node("c1", job_mem=flat(GB, 60)), ago)
            evidence = job(older, node("c2"), start=NOW - 300)
            self.assertEqual(len(master_server.Case(evidence).nodes), count)
        for ago, points in ((310.0, 2), (311.0, 1)):
            known = node("c1", job_cpu=[(NOW - ago, 1.0), (NOW, 1.0)])
            case = master_server.Case(job(known, start=NOW - 300))
            self.assertEqual(len(case.nodes[0].curves["job_cpu"]), points)
        never = job(node("c1")._replace(curves={}), node("c2"), start=NOW - 300)
        self.assertEqual(len(master_server.Case(never).nodes), 2)
        waits = job(long_ago(node("c1"), 900), state="PENDING", start=NOW - 300)
        self.assertEqual(len(master_server.Case(waits).nodes), 1)

    def test_of_means(self):
        self.assertEqual(master_server.mean_of([]), 0)
        for values, median in (([], 0), ([3], 3), ([9, 1], 5), ([9, 1, 2], 2)):
            self.assertEqual(master_server.median_of(values), median)
        self.assertEqual(master_server.median_of([4, 3, 9, 1]), 3.5)

    def test_of_memory_that_was_given_back(self):
        for values, most in (
            ([], 0),
            ([1, 5, 9], 0),
            ([10, 9.1], 0),
            ([10, 9], 10),
            ([10, 5, 20], 10),
            ([10, 5, 20, 18], 20),
        ):
            points = [(NOW + k, value) for k, value in enumerate(values)]
            self.assertEqual(master_server.given_back(points), most)

    def test_of_words(self):
        for seconds, words in ((119.4, "119 s"), (120, "2 min"), (5999, "99 min")):
            self.assertEqual(master_server.time_words(seconds), words)
        self.assertEqual(master_server.time_words(6000), "1 h 40 min")
        for moment in (None, 1.1e11):
            self.assertEqual(master_server.clock_words(moment), "an unknown time")
        self.assertRegex(master_server.clock_words(9e10), r"\A\d\d:\d\d\Z")
        self.assertRegex(master_server.clock_words(1e11), r"\A\d\d:\d\d\Z")
        self.assertEqual(master_server.list_words(list("abcd")), "a, b, c, d")
        self.assertEqual(
            master_server.list_words(list("abcde")), "a, b, c, d and 1 more"
        )
        self.assertEqual(master_server.range_words([0, 1, 8, 9, 10]), "0-1, 8-10")
        self.assertEqual(master_server.size_words(0.1 * GB), "0.1 GB")
        self.assertEqual(master_server.size_words(0.099 * GB), "101 MB")
        self.assertEqual(master_server.time_flag(0), "--time=00:05:00")
        ranks = [rank(k, mem=size * GB) for k, size in enumerate((1, 4, 2))]
        words = master_server.largest_rank_words(ranks)
        self.assertEqual(words, "rank 1 (my_app) had 4 GB, the others at most 2 GB")
        long = Verdict("fine", "x" * 120, "", "y", "a")
        short = Verdict("fine", "x", "", "y", "a")
        text = master_server.render_verdicts([long, short])
        self.assertEqual(text, ["x" * 120 + "  -> y", "x" + " " * 99 + "  -> y"])


class Advice(unittest.TestCase):
    def test_the_next_size_is_a_fifth_more_and_never_less_than_was_seen(self):
        for size in (1, 1e6, 1e8, 0.5 * GB, 0.99 * GB, GB, 1.01 * GB, 61 * GB, 5e12):
            flag = master_server.memory_flag(size)
            with self.subTest(flag):
                self.assertRegex(flag, r"\A--mem=\d+[GM]\Z")
                asked = master_server.flag_bytes(flag)
                self.assertGreaterEqual(asked, 1.2 * size * (1 - 1e-9))
                self.assertLessEqual(asked, 1.2 * size + GB)

    def test_it_rests_on_the_kernels_peak_where_there_is_one(self):
        for counted, flag in ((None, "--mem=74G"), (70.0 * GB, "--mem=84G")):
            evidence = job(
                node(job_mem=61.0 * GB, job_mem_limit=256 * GB, job_mem_peak=counted)
            )
            (verdict,) = diagnose(evidence)
            self.assertEqual(verdict.cure, flag)
            source = "sampled" if counted is None else "kernel's count"
            self.assertEqual(verdict.proof, source + ", 1 run, 13 samples")

    def test_a_spike_that_is_over_counts(self):
        curve = flat(10 * GB, 300)
        curve[3] = (curve[3][0], 70.0 * GB)
        (verdict,) = diagnose(job(node(job_mem=curve, job_mem_limit=256 * GB)))
        self.assertEqual(verdict.cure, "--mem=84G")

    def test_times_are_rounded_up_to_five_minutes(self):
        for seconds, flag in (
            (1, "00:05"),
            (250, "00:05"),
            (251, "00:10"),
            (36000, "12:00"),
        ):
            self.assertEqual(master_server.time_flag(seconds), "--time=%s:00" % flag)


class Text(unittest.TestCase):
    def verdicts(self):
        return [
            Verdict("died", "13:41: out of memory on c2", "rank 37", "--mem=80G", "a"),
            Verdict("problem", "idle", "at 0 %", "", "b"),
            Verdict("advice", "memory", "61 of 256 GB", "--mem=74G", "c"),
            Verdict("fine", "fine", "2 nodes", "", "fine"),
        ]

    def test_a_line_a_verdict_with_its_mark(self):
        self.assertEqual(
            master_server.render_verdicts(self.verdicts()),
            [
                "died 13:41: out of memory on c2: rank 37  -> --mem=80G",
                "! idle: at 0 %",
                ". memory: 61 of 256 GB                    -> --mem=74G",
                "fine: 2 nodes",
            ],
        )

    def test_json_and_back(self):
        rows = json.loads(json.dumps(master_server.verdicts_json(self.verdicts())))
        keys = {"severity", "what", "proof", "cure", "rule", "place"}
        self.assertEqual(set(rows[0]), keys)
        self.assertEqual(master_server.parse_verdicts(rows), self.verdicts())
        for odd in (None, 3, "x", {}, [None], [{}], [{"severity": "x", "what": "y"}]):
            self.assertEqual(master_server.parse_verdicts(odd), [])
        older = master_server.parse_verdicts([{"severity": "fine", "what": "fine"}])
        self.assertEqual(older, [Verdict("fine", "fine", "", "", "")])

    def test_the_exit_code_is_that_of_the_worst(self):
        for count, code in ((4, 3), (3, 2), (2, 1), (1, 0), (0, 0)):
            last = self.verdicts()[4 - count :]
            self.assertEqual(master_server.explain_code(last), code)

    def test_of_many_nodes_with_the_same_problem_four_are_told_the_worst_first(self):
        def near(count):
            shares = [0.96 if number == 7 else 0.92 for number in range(count)]
            nodes = [
                node("c%d" % number, job_mem=share * 2 * GB)
                for number, share in enumerate(shares)
            ]
            return diagnose(job(*nodes))

        self.assertEqual(len(near(4)), 4)
        self.assertNotIn("more place", near(4)[-1].proof)
        self.assertRegex(near(5)[-1].proof, "; and so at 1 more place$")
        found = near(500)
        self.assertEqual([verdict.place for verdict in found], ["c7", "c0", "c1", "c2"])
        self.assertEqual(found[0].severity, "problem")
        self.assertRegex(found[-1].proof, "; and so at 496 more places$")

    def test_a_verdict_names_its_place_by_which_it_is_known_again(self):
        for name, place in (
            ("all on CPU 0", "c1 0"),
            ("one of two nodes asleep", "c2"),
            ("a GPU that is too hot", "c1 1"),
            ("three of four GPUs idle", "c1 gpu 1, c2 gpu 0-1"),
            ("/tmp full", "/tmp c2"),
            ("everything asleep", "c1, c2"),
            ("over-asked time", ""),
        ):
            with self.subTest(name):
                self.assertEqual(diagnose(SICK[name][0])[0].place, place)

    def test_the_worst_comes_first(self):
        evidence = job(
            node(
                job_cpu=25.0,
                job_time_left=30.0,
                job_time_limit=3600.0,
                job_mem=1.99 * GB,
            )
        )
        found = [verdict.severity for verdict in diagnose(evidence)]
        self.assertEqual(found, ["problem", "problem", "advice"])

    def test_names_are_quoted_where_a_shell_reads_them(self):
        evil = "c1; rm -rf ~ {job}"
        for evidence in (
            ended("NODE_FAIL", silent(evil, 90)),
            job(node("c1"), silent(evil, 30)),
            job(node(evil, gpus=[gpu(0, throttle="thermal")])),
        ):
            words = shlex.split(diagnose(evidence)[0].cure, comments=True)
            self.assertTrue([word for word in words if word.endswith(evil)], words)
        evidence = job(asleep(), raw="1; reboot", job="1; reboot")
        self.assertIn("scontrol show job '1; reboot' |", diagnose(evidence)[0].cure)

    def test_a_cure_is_safe_to_paste(self):
        commands = {"chmod", "cp", "df", "export", "ls", "mkdir", "module", "sbatch"}
        commands |= {"make", "scontrol", "set", "srun", "ulimit"}
        for evidence, _, _ in [*SICK.values(), *DEAD.values()]:
            for verdict in diagnose(evidence):
                words = shlex.split(verdict.cure, comments=True)
                with self.subTest(verdict.cure):
                    self.assertFalse(verdict.proof.endswith((";", " ")))
                    if words:
                        first = words[0]
                        self.assertTrue(first in commands or first.startswith("--"))

    def test_a_rule_names_its_source(self):
        for check in master_server.CHECKS:
            with self.subTest(check.name):
                self.assertGreater(len(check.source), 10)
                self.assertIn(check.severity, master_server.SEVERITIES)

    def test_lists_of_cpus_and_the_way_back(self):
        for text, cpus in (
            ("0", {0}),
            ("0-3,8", {0, 1, 2, 3, 8}),
            ("0-99999999", set()),
            ("3-1", set()),
            (",".join(map(str, range(0, 90, 2))), set()),
            ("x", set()),
            ("", set()),
            (None, set()),
        ):
            self.assertEqual(master_server.parse_cpu_list(text), cpus)
        self.assertEqual(master_server.range_words([8, 0, 1, 2, 3]), "0-3, 8")

    @unittest.skipUnless(
        sys.platform.startswith("linux"), "missing here: Linux's numbers"
    )
    def test_signals_have_their_names(self):
        for number, name in master_server.SIGNALS.items():
            self.assertEqual(signal.Signals(number).name, name)

    def test_durations(self):
        for seconds, words in (
            (0, "0 s"),
            (99, "99 s"),
            (150, "2 min"),
            (11400, "3 h 10 min"),
        ):
            self.assertEqual(master_server.time_words(seconds), words)


class SameWords(unittest.TestCase):
    """The report of agent.py, which cannot import the master, says the same."""

    def report(self, before=None, ended="", seconds=10.0, **last):
        """The report of two samples; before: the kernel's counts at the start."""
        report = agent.Report(before)
        sample = {"cpu": 1.0, "job_cpu": 1.0, "cpus": 4, "job_cpus": 4, **last}
        for _ in range(2):
            report.add(sample, seconds)
        return list(report.lines(sample, ended))

    def out_of_memory(self, kills=1, **more):
        return self.report(
            {"oom_kill": 2},
            "SIGKILL",
            oom_kill=2 + kills,
            job_mem=0.178 * GB,
            job_mem_limit=0.195 * GB,
            **more,
        )

    def test_the_sentences_are_equal(self):
        for name in (
            "OUT_OF_MEMORY",
            "BELOW_PEAK",
            "MEMORY_PEAK",
            "KERNEL_COUNT",
            "SAMPLED_COUNT",
            "MARGIN",
        ):
            self.assertEqual(getattr(agent, name), getattr(master_server, name), name)

    def test_the_same_size_is_advised(self):
        for size in (0, 1, 1e8, 0.99 * GB, GB, 61 * GB, 5e12):
            self.assertEqual(agent.memory_flag(size), master_server.memory_flag(size))

    def test_a_command_that_the_kernel_killed_was_out_of_memory(self):
        self.assertEqual(
            self.out_of_memory(),
            [
                "out of memory: the kernel killed 1 process",
                "ran 0:00:20",
                "CPU mean 1.0 %, peak 1.0 % of 4 CPUs",
                "memory peak higher than any sample: the highest was 0.178 GB of 0.195 GB",
                "asked for 0.195 GB, which was too little: --mem=300M may do",
            ],
        )

    def test_the_verdict_on_it_has_the_words_of_the_report(self):
        for kills in (1, 2):
            text = self.out_of_memory(kills)
            evidence = job(
                node(job_mem=0.178 * GB, job_mem_limit=0.195 * GB),
                events=[left("SIGKILL", report=agent.clip("; ".join(text)))],
            )
            (verdict,) = diagnose(evidence)
            self.assertEqual(verdict.severity, "died")
            self.assertIn(text[0], verdict.what)
            self.assertIn(text[3], verdict.proof)
            self.assertIn(verdict.cure, text[4])

    def test_advice_has_the_words_of_the_report(self):
        for peak, source in (
            (None, "sampled, 1 run, 2"),
            (70.0 * GB, "kernel's count, 1 run, 2"),
        ):
            last = {"job_mem": 61.0 * GB, "job_mem_limit": 256.0 * GB}
            if peak:
                last["job_mem_peak"] = peak
            text = "; ".join(self.report(**last))
            evidence = job(
                node(job_mem=61.0 * GB, job_mem_limit=256 * GB, job_mem_peak=peak)
            )
            (verdict,) = diagnose(evidence)
            self.assertIn("(%s samples): %s would do" % (source, verdict.cure), text)
            self.assertIn(verdict.proof.split(", 1 run")[0], text)

    def test_what_was_killed_before_the_start_is_none_of_its_own(self):
        text = "; ".join(self.out_of_memory(kills=0))
        self.assertNotIn("out of memory", text)
        self.assertIn("memory peak 0.178 GB of 0.195 GB", text)

    def test_where_the_kernel_counts_no_kills_137_is_no_proof(self):
        last = {"job_mem": 1.9 * GB, "job_mem_limit": 2.0 * GB}
        for ended, refused, is_told in (
            ("SIGKILL", 9, True),
            ("exit 137", 9, True),
            ("exit 137", 0, False),
            ("exit 1", 9, False),
        ):
            counts = {"job_mem_failcnt": 1}
            last["job_mem_failcnt"] = 1 + refused
            text = "; ".join(self.report(counts, ended, **last))
            self.assertNotIn("out of memory", text)
            self.assertEqual("count of kills is not known" in text, is_told)

    def test_a_peak_of_page_cache_is_no_want_of_memory(self):
        last = {
            "job_mem": 0.2 * GB,
            "job_mem_limit": 4.0 * GB,
            "job_mem_peak": 4.0 * GB,
        }
        self.assertNotIn("--mem", "; ".join(self.report(**last)))
        last = {
            "job_mem": 3.9 * GB,
            "job_mem_limit": 4.0 * GB,
            "job_mem_peak": 4.0 * GB,
        }
        self.assertIn("--mem=5G would do", "; ".join(self.report(**last)))


if __name__ == "__main__":
    unittest.main()
