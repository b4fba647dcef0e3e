"""What a job does when a process, the memory, the loss or the tracking server fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, free_port, thorough_but
from safetensors.torch import load_file

from spark_dist.cli import main
from spark_dist.training.journal import read_journal

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 6, "--log-every", 2)
SMALL += ("--slices", "labelled")
SMALL += ("--network", "enet", "--width", 0.25)
CROPS = "crops of 32×32 never see 0.0% of the training cases' target"
"""The line that every job of these begins with."""


def start(folder, *arguments, restarts=0, processes=2):
    """`accelerate launch` with some processes, its output in folder/output.txt."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config-file", ROOT / "accelerate_config.yaml"]
    line += ["--num-processes", processes, "--max-restarts", restarts, "--main-process-port", free_port()]
    line += ["-m", "spark_dist.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(list(map(str, line)), cwd=folder, env=environment, stdout=output, stderr=output)


def kill_rank(launcher, rank):
    """`kill -9` for one of a launcher's processes."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "spark_dist.train" in child.cmdline():
            child.kill()
            return
    raise AssertionError(f"no process {rank}")


def wait_for(path, pattern, launcher):
    while not list(path.glob(pattern)):
        assert launcher.poll() is None, (path.parents[2] / "output.txt").read_text()
        time.sleep(0.01)


@pytest.mark.launch
@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_is_named_and_the_same_command_goes_on(tiny_store, tmp_path):
    command = ("--dataset", tiny_store, *SMALL, "--epochs", 20, "--out", "job")
    launcher = start(tmp_path, *command)
    states = tmp_path / "job" / "network" / "checkpoints"
    wait_for(states, "step-*.pt", launcher)
    kill_rank(launcher, 1)
    killed = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - killed < 25
    output = (tmp_path / "output.txt").read_text()
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", output)
    assert "Connection closed by peer" not in output

    launcher = start(tmp_path, *command)
    assert launcher.wait(600) == 0, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "job" / "network" / "test_cases.json").exists()


@pytest.mark.launch
@pytest.mark.slow
def test_a_job_restarts_by_itself_as_often_as_processes_die(tiny_store, tmp_path):
    launcher = start(tmp_path, "--dataset", tiny_store, *SMALL, "--epochs", 30, "--out", "job", restarts=2)
    states = tmp_path / "job" / "network" / "checkpoints"
    wait_for(states, "step-*.pt", launcher)
    for rank in (1, 0):
        before = max(states.glob("step-*.pt"))
        while max(states.glob("step-*.pt")) == before:
            assert launcher.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.01)
        kill_rank(launcher, rank)
    assert launcher.wait(600) == 0, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "job" / "network" / "test_cases.json").exists()


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_end_with_their_launcher_and_the_same_command_takes_over(jobs, tiny_store, tmp_path, processes):
    command = ("--dataset", tiny_store, *SMALL, "--epochs", 12, "--out", "job")
    launcher = start(tmp_path, *command, processes=processes)
    wait_for(tmp_path / "job" / "network" / "checkpoints", "step-*.pt", launcher)
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [child for child in children if "spark_dist.train" in child.cmdline()]
    assert len(ranks) == processes
    launcher.kill()
    launcher.wait(30)
    assert not psutil.wait_procs(ranks, timeout=15)[1]
    codes, log = jobs("train", *command, folder=tmp_path, processes=processes)
    assert codes == [0] * processes, log
    logged = [
        (key, event["step"])
        for _, event in read_journal(tmp_path / "job" / "network")
        for key in event.get("metrics", ())
        if not key.startswith("system/")
    ]
    assert len(logged) == len(set(logged))


@pytest.mark.slow
def test_an_error_of_one_process_comes_first(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 1, "--out", "job")
    codes, log = jobs("train", *arguments, folder=tmp_path, processes=2, place="step", n=2, error="it broke", rank=1)
    assert codes == [1, 2]
    lines = log.strip().splitlines()
    assert lines == [CROPS, "error: it broke", "process 0: another process has ended; its error comes before this line"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "place"), [(0, "step"), (1, "evaluation")])
def test_a_stopped_process_is_told_in_a_line(jobs, tiny_store, tmp_path, rank, place):
    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 2, "--out", "job", "--timeout-minutes", 0.1)
    fault = {"place": place, "n": 1, "signal": signal.SIGSTOP, "rank": rank}
    codes, log = jobs("train", *arguments, folder=tmp_path, processes=2, **fault)
    assert sorted(codes) == [-signal.SIGKILL, 1]
    crops, line = log.strip().splitlines()
    assert crops == CROPS
    assert line.startswith(f"process {1 - rank}: another process has not answered for --timeout-minutes")
    # The same command goes on.
    codes, log = jobs("train", *arguments, folder=tmp_path, processes=2)
    assert codes == [0, 0], log


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 1, "--lr", 1e30, "--log-every", 1, "--out", "job")
    codes, log = jobs("train", *arguments, folder=tmp_path, processes=2)
    assert codes == [2, 2]
    assert log.count("error: ") == 1
    events = [event for _, event in read_journal(tmp_path / "job" / "network")]
    assert events[-1]["status"] == "FAILED"
    assert f"error: {events[-1]['tags']['failure']}" in log
    assert any("system/memory_mib" in event.get("metrics", {}) for event in events)
    assert "the loss is not finite" in log
    assert "case_0" in log


@pytest.mark.slow
def test_out_of_memory_says_what_to_try(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 1, "--crop", 1024, "--out", "job")
    codes, log = jobs("train", *arguments, folder=tmp_path, memory=700 * 2**20)
    assert codes == [2], log
    assert "out of memory with 6 slices of 1024×1024" in log
    assert "--accumulate 2, --batch-size 3" in log


@pytest.mark.slow
@pytest.mark.parametrize("size", thorough_but(["120k", "400k", "800k"], {"120k", "800k"}))
def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_room(jobs, tiny_store, small_disk, tmp_path, size):
    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 3, "--checkpoint-steps", 2)
    disk = small_disk(size)
    codes, log = jobs("train", *arguments, "--out", disk / "job", folder=tmp_path)
    assert codes == [2], log
    (line,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert str(disk) in line
    assert "make room" in line
    assert "Traceback" not in log
    shutil.copytree(disk / "job", tmp_path / "moved")
    codes, log = jobs("train", *arguments, "--out", "moved", folder=tmp_path)
    assert codes == [0], log
    codes, log = jobs("train", *arguments, "--out", "whole", folder=tmp_path)
    a, b = (load_file(tmp_path / out / "network" / "best.safetensors") for out in ("moved", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_job_without_its_server_trains_and_is_sent_later(jobs, tiny_store, tmp_path, monkeypatch, capsys):
    import mlflow

    arguments = ("--dataset", tiny_store, *SMALL, "--epochs", 2, "--experiment", "late", "--out", "job")
    arguments += ("--tracking-uri", f"http://127.0.0.1:{free_port()}")
    codes, log = jobs("train", *arguments, folder=tmp_path)
    assert codes == [0]
    assert "can't be reached (" in log
    assert "; training goes on" in log
    assert "The runs in a browser" not in log
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["track-sync", "job", "--tracking-uri", "sqlite:///late.db"]) == 0
    assert "/#/experiments/1/runs?workflowType=machine_learning" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/late.db")
    experiment = client.get_experiment_by_name("late")
    (student,) = client.search_runs([experiment.experiment_id])
    assert student.info.run_name == "alone enet"
    assert student.data.tags["job"] == "job"
    assert "mlflow.parentRunId" not in student.data.tags
    assert {"system/memory_mib", "test_dice", "train/loss", "parameters"} < student.data.metrics.keys()
    assert "config.yaml" in {file.path for file in client.list_artifacts(student.info.run_id)}
    assert [m.step for m in client.get_metric_history(student.info.run_id, "val/dice")] == [4, 8]
    assert "best.safetensors" in {file.path for file in client.list_artifacts(student.info.run_id)}
    assert main(["track-sync", "nowhere"]) == 2
