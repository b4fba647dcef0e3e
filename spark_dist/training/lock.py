"""One job at a time in a folder, on all machines that share it.

    FOLDER/job.lock    who works there, as JSON; the file's time is that of the last heartbeat

Its creation is exclusive on file servers too; locks of the operating system hold on one machine alone, or not at all,
depending on how a folder is mounted. A holder that is a process of this machine is alive or not. One of another machine
is alive as long as the file's time moves on; how long ago that was is told by the file server's clock.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.progress import console
from data_tools.workers import machine, started

FILE = "job.lock"
BEAT = 10
"""Seconds between heartbeats."""
STALE = 120
"""Seconds without a heartbeat after which a process of another machine is taken for dead. A client of a file server may
keep what it knows of a file for half as long."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an existing folder as long as the block lasts, or until this process ends in whatever way.

    Raises `UserError`, naming the holder, if another process has it. A process that was stopped for minutes and finds
    that another machine has taken over ends at once.
    """
    file, own = folder / FILE, json.dumps(this_process())
    take(file, own)
    for aside in folder.glob(f".{FILE}.{'[0-9a-f]' * 32}"):
        aside.unlink(missing_ok=True)
    released = threading.Event()
    heart = threading.Thread(target=beat, args=(file, own, released), daemon=True)
    heart.start()
    try:
        yield
    finally:
        released.set()
        heart.join()
        with suppress(OSError):
            if file.read_text() == own:
                file.unlink()


def this_process() -> dict[str, Any]:
    """Facts that tell this process from all others."""
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M"),
        "id": uuid.uuid4().hex,
    }


def take(file: Path, own: str) -> None:
    """Make the lock, or take it over from a dead holder. Raises `UserError` if the holder is alive."""
    while not create(file, own):
        # Whatever is not there any more was removed by its holder, or by another that takes over.
        with suppress(FileNotFoundError):
            found = file.read_text(errors="replace")
            if lives(file, found):
                raise UserError(
                    f"{file.parent}: {who(found)} works in this folder; wait until it has ended, or give another "
                    f"--out (if there is no such process any more, remove {file})"
                )
            # Renamed first, so that of two that find the holder dead only one removes this very file.
            aside = file.with_name(f".{FILE}.{uuid.uuid4().hex}")
            file.rename(aside)
            if aside.read_text(errors="replace") == found:
                aside.unlink()
            else:
                aside.rename(file)


def create(file: Path, own: str) -> bool:
    """Make the lock unless there is one."""
    try:
        with open(file, "x") as lock:
            try:
                lock.write(own)
                lock.flush()
            except OSError:
                file.unlink()
                raise
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"{file}: can't be written ({error.strerror}); make room, and run the same command again"
        ) from None
    return True


def lives(file: Path, found: str) -> bool:
    """Whether the holder that a lock names is alive; this takes up to `STALE` seconds for one of another machine."""
    holder = read(found)
    if holder.get("machine") == machine():
        return started(holder["pid"]) == holder["started"]
    last = file.stat().st_mtime_ns
    left = STALE - (clock(file.parent) - last) / 1e9
    if left > 0:
        console.print(f"{file.parent}: held by {who(found)}; looking whether it is alive (for {STALE} s at most)")
    end = time.monotonic() + min(left, STALE)
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        # What is opened is asked of the file server anew.
        with open(file) as again:
            if os.fstat(again.fileno()).st_mtime_ns != last:
                return True
    return False


def clock(folder: Path) -> int:
    """The time in ns, as the machine tells it on which a folder lies."""
    aside = folder / f".{FILE}.{uuid.uuid4().hex}"
    aside.touch()
    now = aside.stat().st_mtime_ns
    aside.unlink()
    return now


def read(found: str) -> dict[str, Any]:
    """The holder that a lock's text names; nothing for a text that is damaged, or not written yet."""
    try:
        holder = json.loads(found)
        return holder if {"host", "machine", "pid", "started", "since"} <= holder.keys() else {}
    except (ValueError, AttributeError):
        return {}


def who(found: str) -> str:
    """The holder, for people."""
    holder = read(found)
    return "process {pid} on {host} (since {since})".format(**holder) if holder else "an unknown process"


def beat(file: Path, own: str, released: threading.Event) -> None:
    """Show that the holder is alive, until it is not, or `released`."""
    while not released.wait(BEAT):
        try:
            found = file.read_text(errors="replace")
            if found == own:
                os.utime(file)
        except FileNotFoundError:
            with suppress(UserError):
                create(file, own)
            continue
        except OSError:
            continue  # The file server does not answer; it may do so again.
        if found != own:
            print(f"error: {file.parent}: {who(found)} has taken over this folder", file=sys.stderr, flush=True)
            os._exit(1)
