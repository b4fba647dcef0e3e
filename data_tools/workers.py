"""Processes: those that work for another one, and those that are alive."""

import hashlib
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a job to save its state and end."""

STARTED_BY = "SPARK_DIST_STARTED_BY"
"""Environment variable that names the process of ours which started a job, perhaps through a launcher."""

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "SLURM_STEP_ID", STARTED_BY)
"""Environment variables that torchrun, accelerate, srun and crossval set in the processes that they start."""

FORGOTTEN = 3600
"""Seconds after which what another machine's process made aside, and has not touched since, was left by a kill."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """From now on, this process ends when the one that it works for does.

    One whose parent was killed would wait for ever, as what it was forked from lives on.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_launcher() -> None:
    """From now on, this process ends soon after its launcher (see `LAUNCHERS`) or what started that does.

    One whose launcher was killed would train on beside those that the same command starts next.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return  # nobody launched it
    launcher = os.getppid()
    first, _, birth = os.environ.get(STARTED_BY, "").partition(" ")

    def watch() -> None:
        while os.getppid() == launcher and (not first or str(started(int(first))) == birth):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def started_by_this() -> dict[str, str]:
    """The environment of processes that end with this one, whatever launches them (see `end_with_launcher`)."""
    return {STARTED_BY: f"{os.getpid()} {started(os.getpid())}"}


def machine() -> str:
    """Name of where numbers of processes mean the same as here: a host since its start, or a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # Not Linux: all other processes are judged by their heartbeat.


def started(pid: int) -> str | None:
    """Start of a process of this machine, in ticks since the machine did; None if it is dead."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] in "ZX" else facts[19]


def signature(pid: int) -> str:
    """A process of this machine in the name of a file or folder that it makes aside: machine, number, start."""
    return f"{hashlib.sha256(machine().encode()).hexdigest()[:8]}-{pid}-{started(pid)}"


def is_abandoned(path: Path) -> bool:
    """Whether the process whose `signature` is in a name is gone; False for a name without one, which is not ours."""
    found = re.search(r"\.(([0-9a-f]{8})-(\d+)-[^-.]+)(-[0-9a-f]{8})?\.(new|tmp)$", path.name)
    if not found:
        return False
    if signature(0).startswith(found[2]):
        return found[1] != signature(int(found[3]))
    try:
        return time.time() - path.stat().st_mtime > FORGOTTEN
    except FileNotFoundError:
        return False
