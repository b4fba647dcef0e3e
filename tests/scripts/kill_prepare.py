"""Prepare a store in a process that is killed at random moments, again and again: SOURCE STORE SEED KILLS."""

import os
import random
import signal
import sys
import time

from data_tools import prepare  # noqa: F401  imported once, so that a moment is one of the preparing
from data_tools.cli import main

source, store, seed, kills = sys.argv[1:]
moments = random.Random(int(seed))
for _ in range(int(kills)):
    start, ready = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(ready, b"x")
        os._exit(main(["prepare", source, store, "--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]))
    os.read(start, 1)
    time.sleep(moments.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
