"""Runs jobs of several processes, each a fork of this one, which has imported everything: a job starts in a tenth of
the time, so that tests can interrupt many.

Reads a JSON object a line: `command` (a module of spark_dist or a script beside this one), `arguments`, `folder`
(where it runs), `processes` and `fault` if there shall be one: `signal` sent to itself by process `rank` at the
`n`-th `place` (see `PLACES`) or `after` so many seconds, or an `error` raised there, or no more than so much `memory`,
in bytes. Answers with the processes' exit codes, negative for signals, and the name of the file with their output.
"""

import io
import json
import os
import random
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from late_imports import before_forks

import spark_dist.data.cache
import spark_dist.distill
import spark_dist.evaluate
import spark_dist.evaluation.cases
import spark_dist.train
import spark_dist.training.checkpoint
import spark_dist.training.loop
import spark_dist.training.tracking
import spark_dist.training.validation
from data_tools.errors import UserError
from spark_dist.cli import command

torch.set_num_threads(1)


def strike_at(owner, name, fault, half=None):
    """Make the n-th call of a function send the signal: before it, or, with `half`, when half of it is done."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*arguments, **keywords):
        calls[0] += 1
        if calls[0] != fault["n"]:
            return original(*arguments, **keywords)
        if "error" in fault:
            raise UserError(fault["error"])
        if half:
            return half(original, lambda: os.kill(os.getpid(), fault["signal"]), *arguments, **keywords)
        os.kill(os.getpid(), fault["signal"])
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def half_saved(save, strike, state, path):
    buffer = io.BytesIO()
    save(state, buffer)
    data = buffer.getvalue()
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        strike()
        file.write(data[len(data) // 2 :])


def written_unnamed(write, strike, *arguments, **keywords):
    write(*arguments, **keywords)
    strike()


PLACES = {
    "step": (spark_dist.training.loop, "to_device", None),
    "checkpoint": (torch, "save", half_saved),
    "evaluation": (spark_dist.evaluation.cases, "probabilities", None),
    "cache": (spark_dist.data.cache, "write_segment", written_unnamed),
    "tested": (spark_dist.training.validation, "write_cases", written_unnamed),
    "end of a run": (spark_dist.training.tracking.Tracker, "finish", None),
    "sending": (spark_dist.training.tracking.Tracker, "_wait", None),
}


def process(job, rank, port, log):
    """What one process of a job does, until its exit."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(job["folder"])
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fault = job.get("fault")
    if fault and "memory" in fault:
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + fault["memory"],) * 2)
    elif fault and "after" in fault:
        threading.Timer(fault["after"], os.kill, (os.getpid(), fault["signal"])).start()
    elif fault and fault.get("rank", 0) == rank:
        owner, name, half = PLACES[fault["place"]]
        strike_at(owner, name, fault, half)
    # Whatever a process has of chance must not matter.
    random.seed()
    if job["command"].endswith(".py"):
        sys.argv[1:] = job["arguments"]
        runpy.run_path(str(Path(__file__).with_name(job["command"])), run_name="__main__")
        sys.exit(0)
    sys.exit(command(f"spark_dist.{job['command']}", job["arguments"]))


def run(job):
    """Run a job to its end. When one of its processes is dead, the others have some seconds to find out."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = os.path.join(job["folder"], f"output-{port}.txt")
    running, stopped = {}, (job.get("fault") or {}).get("signal") == signal.SIGSTOP
    for rank in range(job["processes"]):
        child = os.fork()
        if not child:
            try:
                process(job, rank, port, log)
            except SystemExit as stop:
                sys.stdout.flush()
                sys.stderr.flush()
                # As an interpreter's end does, but for threads of the fork's parent that are not there.
                os._exit(stop.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        running[child] = rank
    codes, end = [None] * job["processes"], time.monotonic() + 300
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            if codes.count(None) and any(codes):
                end = min(end, time.monotonic() + (1 if stopped else 20))
        elif time.monotonic() > end:
            for child in running:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return {"codes": codes, "log": log}


def serve():
    """Answer line by line."""
    before_forks()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
