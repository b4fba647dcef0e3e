"""A job's folder: whose it is, one job at a time, the same data, and no stage that is done by half."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from nifti_cases import all_files
from safetensors.torch import load_file

from data_tools.errors import UserError
from data_tools.ownership import mark, owned
from data_tools.store import open_store, write_split
from spark_dist.cli import main
from spark_dist.config import TrainOptions
from spark_dist.data.identity import image_fingerprint, split_fingerprints
from spark_dist.networks.checkpoint import load_card
from spark_dist.training.folder import check_folder, claim, discard
from spark_dist.training.journal import append, finished, read_journal
from spark_dist.training.lock import FILE, locked

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 8, "--log-every", 2, "--epochs", 2)
SMALL += ("--slices", "labelled")
ALONE = (*SMALL, "--network", "enet", "--width", 0.25)
TAUGHT = (*SMALL, "--teacher", "unet", "--teacher-width", 0.05, "--student-width", 0.25, "--method", "kd")
KILL = {"signal": int(signal.SIGKILL)}
KILLED = [-signal.SIGKILL]


def options(store, folder, **changes):
    facts = {"dataset": store, "task": "organ", "network": "enet", "crop": 32, "out": folder}
    return TrainOptions(**facts | changes)


def data(store):
    return split_fingerprints(open_store(store), "default") | {"teacher": None}


@pytest.fixture
def theirs(tmp_path):
    """A folder of somebody's with files of all names that a job's have."""
    folder = tmp_path / "theirs"
    for part in (folder, folder / "teacher", folder / "student"):
        (part / "checkpoints").mkdir(parents=True)
        names = ("config.yaml", "best.safetensors", "test_cases.json", "generation.txt", "a.png", "predictions.png")
        names += ("checkpoints/step-000000001.pt", "checkpoints/step-000000001-good.pt", "checkpoints/.step-notes.tmp")
        for name in (*names, "tracking.jsonl", "tracking-notes.txt"):
            (part / name).write_text("lr: 0.1")
    return folder


MINE = {
    "options alone": lambda folder: None,
    "a mark of another program": lambda folder: (folder / "job.json").write_text('{"format": "a job"}'),
    "a journal of MLflow's": lambda folder: (folder / "tracking.jsonl").write_text('{"params": {"lr": 0.1}}\n'),
    "only a folder": lambda folder: [file.unlink() for file in folder.iterdir() if file.is_file()],
}


@pytest.mark.parametrize("change", MINE.values(), ids=MINE)
def test_a_folder_of_somebodys_is_refused_and_stays(theirs, change):
    change(theirs)
    before = all_files(theirs)
    with pytest.raises(UserError, match=r"that no job of spark-dist made; give another --out$"):
        check_folder(theirs)
    with pytest.raises(UserError, match="no job of spark-dist"):
        discard(theirs)
    assert all_files(theirs) == before


@pytest.mark.slow
def test_overwrite_in_a_folder_of_somebodys_changes_nothing(jobs, tiny_store, theirs, tmp_path):
    before = all_files(theirs)
    command = ("--dataset", tiny_store, *ALONE, "--out", theirs)
    for more in ((), ("--overwrite", "true")):
        codes, log = jobs("train", *command, *more, folder=tmp_path)
        assert codes == [2]
        assert log.strip() == f"error: {theirs}: has a config.yaml that no job of spark-dist made; give another --out"
    assert all_files(theirs) == before


def test_only_what_a_job_writes_is_discarded(theirs):
    mark(theirs, "job", version=1)
    discard(theirs)
    left = {str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file()}
    kept = {"checkpoints/step-000000001-good.pt", "checkpoints/.step-notes.tmp"}
    stage = {"config.yaml", "generation.txt", "a.png", "tracking-notes.txt", *kept}
    assert left == {
        *("job.json", "a.png", "tracking-notes.txt", "best.safetensors", "test_cases.json", "predictions.png"),
        *("checkpoints/step-000000001.pt", *kept),
        *(f"{part}/{name}" for part in ("teacher", "student") for name in stage),
    }


def test_a_job_from_before_the_mark_goes_on_and_is_marked(tiny_store, tmp_path):
    wanted = options(tiny_store, tmp_path / "job")
    claim(wanted.folder, wanted, data(tiny_store))
    (wanted.folder / "job.json").unlink()
    with pytest.raises(UserError, match=r"has a config.yaml that no job"):
        check_folder(wanted.folder)
    params = json.loads(json.dumps(vars(wanted), default=str))
    append(wanted.folder, {"id": "0", "experiment": "e", "name": "job", "parent": None, "params": params})
    check_folder(wanted.folder)
    with pytest.raises(UserError, match=r"holds a job with lr=0.001, not 0.1"):
        claim(wanted.folder, options(tiny_store, tmp_path / "job", lr=0.1), data(tiny_store))
    claim(wanted.folder, wanted, data(tiny_store))
    assert owned(wanted.folder, "job")["data"] == data(tiny_store)


def test_what_is_half_discarded_is_not_gone_on_with(tiny_store, tmp_path):
    first = options(tiny_store, tmp_path / "job")
    claim(first.folder, first, data(tiny_store))
    (first.folder / "student").mkdir()
    (first.folder / "student" / "best.safetensors").write_bytes(b"x")
    mark(first.folder, "job", version=1)  # as a kill leaves it just after --overwrite has begun
    claim(first.folder, first, data(tiny_store))
    assert not (first.folder / "student" / "best.safetensors").exists()


@pytest.mark.parametrize("text", ["", "- a", "{", "\0", "lr"])
def test_options_that_are_none_are_said(tiny_store, tmp_path, text):
    first = options(tiny_store, tmp_path / "job")
    claim(first.folder, first, data(tiny_store))
    (first.folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml: not the options of a job .* restore it, give another --out"):
        claim(first.folder, first, data(tiny_store))


def test_a_job_goes_on_with_the_data_that_it_began_with(tiny_store, tmp_path):
    store, wanted = tmp_path / "tiny.zarr", options(tiny_store, tmp_path / "job")
    claim(wanted.folder, wanted, data(tiny_store))
    shutil.copytree(tiny_store, store)
    claim(wanted.folder, wanted, data(store))  # the same, elsewhere
    before = all_files(wanted.folder)

    def refused(now):
        with pytest.raises(UserError) as error:
            claim(wanted.folder, wanted, now)
        assert all_files(wanted.folder) == before
        return str(error.value)

    now = data(store)
    now["val"]["case_00006"] = "0" * 16
    assert "job: case case_00006 of the val cases was prepared anew since this job began" in refused(now)
    assert "teacher-checkpoint held other weights" in refused(data(store) | {"teacher": "0" * 16})
    now = data(store)
    now["train"]["case_9"] = now["train"].pop("case_00000")
    assert "case case_00000 of the train cases is gone since" in refused(now)
    shutil.rmtree(store / "splits" / "default")
    record = {part: list(cases) for part, cases in data(tiny_store).items() if cases}
    record["test"].append(record["train"].pop())
    write_split(store, "default", record | {"seed": 0})
    assert "case case_00004 of the train cases is gone since" in refused(data(store))
    mark(wanted.folder, "job", version=1, data=3)
    before = all_files(wanted.folder)
    assert "is new since" in refused(data(tiny_store))


@pytest.mark.slow
def test_another_teacher_of_the_same_path_is_said(jobs, tiny_store, tmp_path):
    for seed in (1, 2):
        codes, log = jobs("train", "--dataset", tiny_store, *ALONE, "--seed", seed, "--out", f"{seed}", folder=tmp_path)
        assert codes == [0], log
    teacher = tmp_path / "best.safetensors"
    shutil.copy(tmp_path / "1" / "network" / "best.safetensors", teacher)
    command = ("--dataset", tiny_store, *SMALL, "--teacher", "enet", "--teacher-checkpoint", teacher, "--out", "job")
    command += ("--student-width", 0.25, "--method", "kd")
    codes, log = jobs("distill", *command, folder=tmp_path, place="step", n=3, **KILL)
    assert codes == KILLED, log
    shutil.copy(tmp_path / "2" / "network" / "best.safetensors", teacher)
    before = all_files(tmp_path / "job")
    codes, log = jobs("distill", *command, folder=tmp_path)
    assert codes == [2]
    assert "error: job: its --teacher-checkpoint held other weights when this job began" in log
    assert {k: v for k, v in all_files(tmp_path / "job").items() if k != FILE} == {
        k: v for k, v in before.items() if k != FILE
    }


@pytest.mark.slow
def test_of_two_jobs_in_a_folder_the_second_says_who_holds_it(jobs, tiny_store, tmp_path):
    command = ("--dataset", tiny_store, *ALONE, "--out", "job")
    (tmp_path / "job").mkdir()
    with locked(tmp_path / "job"):
        before = all_files(tmp_path / "job")
        codes, log = jobs("train", *command, folder=tmp_path, processes=2)
        assert codes == [2, 2]
        (line,) = (line for line in log.splitlines() if "error" in line)
        assert line.startswith(f"error: job: process {os.getpid()} on {os.uname().nodename} (since ")
        assert all_files(tmp_path / "job") == before
    codes, log = jobs("train", *command, folder=tmp_path, processes=2)
    assert codes == [0, 0], log
    assert not list((tmp_path / "job").glob("*.lock"))


def table(folder, monkeypatch):
    """What `compare` shows."""
    monkeypatch.chdir(folder)
    assert main(["compare", "--json", "rows.json"]) == 0
    return json.loads((folder / "rows.json").read_text())


def ends(folder):
    """All that a distill job ends in."""
    for stage in ("teacher", "student"):
        assert finished(folder / "job" / stage)
        logged = [key for _, event in read_journal(folder / "job" / stage) for key in event.get("metrics", ())]
        assert logged.count("test/dice") == 1
    return {stage: load_file(folder / "job" / stage / "best.safetensors") for stage in ("teacher", "student")}


def assert_same(a, b):
    assert all(torch.equal(a[stage][key], value) for stage, tensors in b.items() for key, value in tensors.items())


class Whole(NamedTuple):
    """A job that was never interrupted."""

    folder: Path
    durations: list[float]
    """Seconds that jobs like this one took, the latest last."""


@pytest.fixture(scope="module")
def whole(jobs, tiny_store, tmp_path_factory):
    """A distill job that nothing happens to."""
    folder, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
    codes, log = jobs("distill", "--dataset", tiny_store, *TAUGHT, "--out", "job", folder=folder)
    assert codes == [0], log
    return Whole(folder, [time.monotonic() - begun])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "calls"), [("tested", (1, 1)), ("end of a run", (1, 2, 2)), ("sending", (1, 2, 3))])
def test_a_stage_is_done_when_all_is_written_and_sent(jobs, tiny_store, tmp_path, monkeypatch, whole, place, calls):
    """Killed as each stage, and the job, has its figures, ends its run, or has ended it and waits for the server."""
    command = ("--dataset", tiny_store, *TAUGHT, "--out", "job")
    for n in calls:
        codes, log = jobs("distill", *command, folder=tmp_path, place=place, n=n, **KILL)
        assert codes == KILLED, log
    codes, log = jobs("distill", *command, folder=tmp_path)
    assert codes == [0], log
    assert_same(ends(tmp_path), ends(whole.folder))
    assert table(tmp_path, monkeypatch) == table(whole.folder, monkeypatch)


@pytest.mark.slow
def test_a_given_teacher_is_in_the_table_after_a_kill(jobs, tiny_store, tmp_path, monkeypatch, whole):
    teacher = whole.folder / "job" / "teacher" / "best.safetensors"
    command = ("--dataset", tiny_store, *TAUGHT, "--teacher-checkpoint", teacher, "--out", "job")
    codes, log = jobs("distill", *command, folder=tmp_path, place="tested", n=1, **KILL)
    assert codes == KILLED, log
    codes, log = jobs("distill", *command, folder=tmp_path)
    assert codes == [0], log
    assert [row["role"] for row in table(tmp_path, monkeypatch)] == ["teacher", "student"]


@pytest.mark.slow
def test_a_networks_card_names_what_it_was_trained_on(tiny_store, whole):
    store = open_store(tiny_store)
    expected = sorted(image_fingerprint(store, name) for name in store.split("default", "train"))
    for stage in ("teacher", "student"):
        assert list(load_card(whole.folder / "job" / stage / "best.safetensors").trained_on) == expected


MOMENTS = int(os.environ.get("SPARK_DIST_MOMENTS", 6))
"""At how many moments of a job's life it is killed."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_any_moment_it_ends_as_if_nothing_had_been(jobs, tiny_store, tmp_path, monkeypatch, whole, moment):
    command = ("--dataset", tiny_store, *TAUGHT, "--out", "job")
    share = (moment + random.Random(moment).random()) / MOMENTS
    for n in range(4):
        tried, begun = tmp_path / str(n), time.monotonic()
        tried.mkdir()
        codes, log = jobs("distill", *command, folder=tried, after=whole.durations[-1] * share, **KILL)
        if codes == KILLED:
            break
        # Where others work on the machine too, the job that was measured can have been a slow one.
        assert codes == [0], log
        whole.durations.append(time.monotonic() - begun)
    assert codes == KILLED or moment == MOMENTS - 1, log
    codes, log = jobs("distill", *command, folder=tried)
    assert codes == [0], log
    assert_same(ends(tried), ends(whole.folder))
    assert table(tried, monkeypatch) == table(whole.folder, monkeypatch)
