"""Any value for any option of any command: a result or one line, never a traceback, and nothing is written outside the
folders that the command names."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import keep_signals
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nifti_cases import save

import spark_dist.training.job
import spark_dist.training.stage
from data_tools.errors import Interrupted
from data_tools.files import write_text
from data_tools.store import open_store, write_split, write_splits
from spark_dist import cache, crossval, export, profile
from spark_dist.cli import COMMANDS, REQUEUE, main
from spark_dist.networks.cost import Cost
from spark_dist.options import flag

DATA = {"dataset": "tiny.zarr"}
JOB = DATA | {"task": "organ", "crop": "32", "crop-shift": "[0,0]", "batch-size": "8", "epochs": "2", "out": "new"}
TEACHER = {"teacher": "enet", "teacher-width": "0.25", "teacher-checkpoint": "best.safetensors"}
GIVEN = {
    "train": (JOB | {"network": "enet"}, ()),
    "distill": (JOB | TEACHER, ()),
    "cache": (JOB | TEACHER | {"cache-folder": "caches"}, ()),
    "crossval": (JOB | {"network": "enet", "split": "cv", "fold": "0"}, ("train",)),
    "evaluate": (DATA | {"split": "short", "out": "new.json"}, ("best.safetensors",)),
    "export": (DATA, ("best.safetensors", "new.onnx")),
    "predict": ({"out": "new"}, ("best.safetensors", "scan.nii")),
    "compare": (
        {"csv": "new.csv", "json": "new.json", "markdown": "new.md", "latex": "new.tex", "figure": "new.png"},
        (),
    ),
    "profile": ({"crop": "32", "csv": "new.csv", "json": "new.json"}, ("enet",)),
    "picture": (DATA | {"rows": "1", "out": "new.png"}, ("best.safetensors",)),
    "explain": (DATA | {"slices": "case_00008:2", "out": "new.png"}, ("best.safetensors",)),
    "views": (JOB | {"picture": "new.png", "show": "2"}, ()),
    "sweep": ({}, ("grid.yaml",)),
    "track-sync": ({}, ("job",)),
}
"""Options and arguments with which each command does something; one of them, or another one, then gets any value."""
OUTPUTS = ("out", "csv", "json", "markdown", "latex", "figure", "picture", "log-to", "cache-folder", "folder")
"""Options and arguments that name what a command may write."""

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([10**9, 2**31, 2**63, 10**40, -0.0, 1e308, 1e-320])
)
ODD_WORDS = r"""
. .. - -- -1 null ~ true no [] [1,2] [[1]] {} {a:1} &a *a !!python/name:os.system %s {0} $x [/x] \x é…⟶ 1e3 0x10 a=b
all test val tumour cpu live off int8 tfkd rkd unet2022 universeg no-test tiny.zarr best.safetensors grid.yaml job
job/config.yaml job/student nothing/there
"""
ODD = ODD_WORDS.split()
ODD += ["", " ", "a: b", "a\nb", "\udcff", "x" * 300]
WORDS = st.one_of(st.text(max_size=12), st.sampled_from(ODD))
ALWAYS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
ALWAYS |= {"phases": [Phase.generate]}
"""The same examples in every run of the tests, none of them twice."""
VALUES = st.one_of(NUMBERS.map(str), WORDS)


@pytest.fixture(scope="module")
def folder(jobs, tiny_store, tmp_path_factory):
    """A folder with all that the commands want: a store, a job and its weights, MLflow's database, a grid."""
    folder = tmp_path_factory.mktemp("any") / "here"
    folder.mkdir()
    shutil.copytree(tiny_store, folder / "tiny.zarr")
    options = ("--dataset", "tiny.zarr", "--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--epochs", 1)
    codes, log = jobs("train", *options, "--network", "enet", "--width", 0.25, "--out", "job", folder=folder)
    assert codes == [0], log
    shutil.copy(folder / "job" / "network" / "best.safetensors", folder)
    whole = open_store(folder / "tiny.zarr").splits["default"]
    write_split(folder / "tiny.zarr", "short", whole | {"test": whole["test"][:1]})
    save(folder / "scan.nii", np.arange(32 * 32 * 2, dtype=np.int16).reshape(32, 32, 2))
    whole = {"train": whole["train"], "val": whole["val"], "test": whole["test"], "seed": 0}
    write_splits(folder / "tiny.zarr", {f"cv-fold{k}": whole | {"made": {"fold": k, "folds": 3}} for k in range(3)})
    (folder / "grid.yaml").write_text("seed: [1, 2]\nmethod: [kd, spark]\n")
    (folder / "caches" / "foreign" / "segments").mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def stops_where_the_work_begins(folder, monkeypatch):
    """Jobs end when they have claimed their folder, and networks are not measured: all before that is real."""

    @contextmanager
    def stop(*_, **__):
        raise Interrupted("all is checked")
        yield

    def begin(*_, **__):
        raise Interrupted("all is checked")

    for name in COMMANDS:  # A module that is imported meanwhile would keep what stands here for a test.
        import_module(f"spark_dist.{name.replace('-', '_')}")
    for module in (spark_dist.training.job, spark_dist.training.stage):
        monkeypatch.setattr(module, "tracked", stop)
    monkeypatch.setattr(cache, "make_accelerator", begin)
    monkeypatch.setattr(crossval, "start", begin)
    monkeypatch.setattr(export, "export_onnx", lambda path, *_: write_text(path, "all is checked") or begin())
    monkeypatch.setattr(profile, "measure", lambda networks, *_: [Cost(name, 1, 1.0, 1.0, 1.0) for name in networks])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(folder)


def tree(folder):
    """Everything in a folder, with what would change if it were written to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        found[path] = (facts.st_size, facts.st_mtime_ns) if path.is_file() else None
    return found


def restore(folder, before):
    """Take away what is new."""
    for path in sorted(tree(folder), reverse=True):
        if path not in before:
            path.rmdir() if path.is_dir() else path.unlink()


def options_of(command):
    return import_module(f"spark_dist.{command.replace('-', '_')}").OPTIONS


def check(folder, command, option, value):
    """Run a command in which an option, or an argument, has some value."""
    options, arguments = GIVEN[command]
    positional = [field for field in fields(options_of(command)) if "positional" in field.metadata]
    places = {field.name: -1 if "nargs" in field.metadata else k for k, field in enumerate(positional)}
    if option in places:
        arguments = list(arguments)
        arguments[places[option]] = value
    else:
        options = options | {option: value}
    words = [f"--{name}={part}" for name, part in options.items()]
    named = [part for name, part in options.items() if name in OUTPUTS]
    named += [arguments[k] for name, k in places.items() if name in OUTPUTS]
    named = [Path(os.path.normpath(folder / part)) for part in named if part]
    before = tree(folder.parent)
    with keep_signals():
        try:
            code = main([command, *words, "--", *arguments] if arguments else [command, *words])
        except SystemExit as stop:  # --help
            code = stop.code
    after = tree(folder.parent)
    restore(folder.parent, before)
    assert code in (0, 2, REQUEUE), words
    changed = [path for path in after if after[path] != before.get(path, "new")]
    # Folders that lead to a place are made.
    ours = {above for place in named for above in (place, *place.parents) if above not in before} | {*named}
    aside = [path for path in changed if path not in ours and not any(place in path.parents for place in named)]
    # MLflow's database lies where it was told to lie, and SQLite touches it when it is read.
    assert not [path for path in aside if not path.name.startswith("mlflow.db")], words
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_any_value_is_a_result_or_one_line(command, folder, capsys):
    names = [*(flag(field.name)[2:] for field in fields(options_of(command))), "config"]

    @settings(max_examples=int(os.environ.get("SPARK_DIST_EXAMPLES", 2)), **ALWAYS)
    @given(st.lists(VALUES, min_size=len(names), max_size=len(names)))
    def every_option(values):
        for option, value in zip(names, values, strict=True):
            if option in OUTPUTS:
                value = within(folder, value)
            if value.startswith(("http", "sqlite")):  # what would wait for a server
                continue
            capsys.readouterr()
            check(folder, command, option, value)
            assert "Traceback" not in capsys.readouterr().err

    every_option()


def within(folder, value):
    """A path that may be written to: one that lies in this test's folders."""
    value = value.lstrip("/")
    place = Path(os.path.normpath(folder / value.replace("\0", "")))
    return value if folder.parent in place.parents else "elsewhere"
