#!/usr/bin/env python3
"""dummy_task.py - does sbatch work at all, and where does the output go? Needs no network.

Prints where and as whom it runs, counts for a few seconds, and ends with 0:

    python3 utils/dummy_task.py [SECONDS]           here, now
    sbatch utils/run_dummy_task.slurm [SECONDS]     on a compute node, when Slurm has one
"""

import getpass
import os
import socket
import sys
import time


def main():
    seconds = sys.argv[1] if len(sys.argv) > 1 else "3"
    if not seconds.isdecimal() or len(seconds) > 4:
        print(
            "error: %r is no number of seconds (0 to 9999)" % seconds, file=sys.stderr
        )
        return 2
    print("node    %s" % socket.gethostname())
    print("user    %s" % getpass.getuser())
    print("job     %s" % os.environ.get("SLURM_JOB_ID", "none: not started by Slurm"))
    print("folder  %s" % os.getcwd())
    print("python  %s %s" % (sys.version.split()[0], sys.executable))
    print("this line went to stderr", file=sys.stderr)
    for second in range(1, int(seconds) + 1):
        time.sleep(1)
        print("%d of %s seconds" % (second, seconds), flush=True)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
