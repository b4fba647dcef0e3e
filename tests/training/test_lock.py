"""The lock of a job's folder: real processes, on one machine and on machines with other names."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from conftest import ROOT

from data_tools.errors import UserError
from spark_dist.training import lock
from spark_dist.training.lock import FILE, locked, this_process

HOLD = """
import socket, sys, time
from spark_dist.training import lock
lock.BEAT, lock.STALE = 0.2, 4
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
from data_tools.errors import UserError
from pathlib import Path
try:
    with lock.locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which holds the folder until it is told to go on, on a host of any name."""
    running = []

    def start(host=""):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        line = [sys.executable, "-c", HOLD, str(tmp_path), host]
        running.append(
            subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-1, text=True)
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 4)


def end(process):
    """`kill -9`, after which a process is a zombie, as nobody waits for it."""
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_the_second_is_told_who_holds_the_folder_and_takes_over_from_the_dead(hold, tmp_path):
    first = hold()
    assert first.stdout.readline() == "held\n"
    second = hold()
    said = second.stdout.readline()
    assert f"{tmp_path}: process {first.pid} on {os.uname().nodename} (since 2" in said
    assert "works in this folder; wait until it has ended, or give another --out" in said
    end(first)
    killed = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - killed < lock.STALE / 2
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert "works in this folder" in hold().stdout.readline()
    third = hold()
    assert third.stdout.readline() == "held\n"
    third.communicate("go on\n", timeout=30)
    assert third.returncode == 0
    assert not list(tmp_path.iterdir())


def test_on_another_host_what_counts_is_the_heartbeat(hold, tmp_path):
    first = hold("node1")
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {first.pid} on node1 .* works in this folder"), locked(tmp_path):
        pass
    end(first)
    killed = time.monotonic()
    second = hold("node2")
    assert "held by process" in second.stdout.readline()
    assert second.stdout.readline() == "held\n"
    assert time.monotonic() - killed > lock.STALE / 2
    end(second)
    os.utime(tmp_path / FILE, (0, time.time() - 60))
    with locked(tmp_path):  # at once, without a word
        pass


def test_who_was_stopped_and_finds_another_in_its_folder_ends(hold, tmp_path):
    first = hold("node1")
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)
    with locked(tmp_path):
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(30) == 1
        assert "has taken over this folder" in first.stderr.read()
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("host", ["", "node1"])
def test_of_many_that_find_a_dead_holder_one_takes_over(hold, tmp_path, host):
    first = hold("node1" if host else "")
    first.stdout.readline()
    end(first)
    os.utime(tmp_path / FILE, (0, 0))
    others = [hold(f"{host}-{k}" if host else "") for k in range(6)]
    said = [next(line for line in iter(other.stdout.readline, "") if "looking" not in line) for other in others]
    assert sorted(line == "held\n" for line in said) == [False] * 5 + [True]


def test_what_a_killed_process_left_beside_the_lock_is_removed_and_somebodys_file_stays(tmp_path):
    (tmp_path / f".{FILE}.{uuid.uuid4().hex}").write_text("{}")
    (tmp_path / f".{FILE}.notes").write_text("mine")
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [f".{FILE}.notes", FILE]
    assert os.listdir(tmp_path) == [f".{FILE}.notes"]


def test_a_lock_that_is_removed_is_made_again(hold, tmp_path):
    first = hold()
    first.stdout.readline()
    (tmp_path / FILE).unlink()
    time.sleep(1)
    assert str(first.pid) in hold().stdout.readline()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"host": 1', "\0"])
def test_a_damaged_lock_holds_until_it_is_stale(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "STALE", 0.5)
    (tmp_path / FILE).write_text(text)
    begun = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begun > 0.4


def test_a_process_of_the_same_number_is_another(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(this_process() | {"started": "1"}))
    begun = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begun < lock.STALE / 2
