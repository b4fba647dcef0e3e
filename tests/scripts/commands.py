"""Runs command lines of spark-dist, each in a process of its own that is a fork of this one, two at a time.

Reads a JSON list of groups of tasks; a group begins when the one before is done. A task is the `folder` that it runs
in, its `arguments` and its `environment`. An argument with a `*` is the one file that it matches.
"""

import glob
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from late_imports import before_forks

from spark_dist.cli import main


def run(task: dict) -> int:
    """The exit code of one task; what it says is in its folder."""
    os.chdir(task["folder"])
    os.environ |= task["environment"]
    out = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    arguments = []
    for argument in task["arguments"]:
        (argument,) = glob.glob(argument) if "*" in argument else [argument]
        arguments.append(argument)
    return main(arguments)


if __name__ == "__main__":
    groups = json.load(sys.stdin)
    for command in ("train", "distill"):
        main([command, "--no-such-option"])
    before_forks()
    # A process has one task: what a job leaves in memory does not reach the next.
    pool = multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1)
    for group in groups:
        for task, code in zip(group, pool.map(run, group, chunksize=1), strict=True):
            if code:
                said = Path(task["folder"], "output.txt").read_text()
                sys.exit(f"{task['folder']}: exit code {code}\n{said}")
    pool.close()
    pool.join()
