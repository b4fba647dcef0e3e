import argparse
import os
import pkgutil
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_cases import all_files, save_kits

import data_tools
from data_tools.cli import main, parser
from data_tools.store import open_store


def options():
    """(subcommand, option) of all of them."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [(name, action) for name, command in commands.choices.items() for action in command._actions]


@pytest.mark.parametrize(("command", "option"), options(), ids=lambda part: getattr(part, "dest", part))
def test_every_option_has_help(command, option):
    assert option.help
    if option.default not in (None, argparse.SUPPRESS) and option.default is not False:
        assert f"default {option.default}" in option.help


@pytest.mark.parametrize(
    "line",
    [
        "",
        "prepar",
        "phantom",
        "phantom OUT --cases 0",
        "phantom OUT --seed -1",
        "phantom OUT --size ten",
        "prepare IN OUT --layout kits",
        "prepare IN OUT --layout nnunet --labels organ=1",
        "prepare IN OUT --layout kits --labels organ=1 --part 2/1",
        "prepare IN OUT --layout kits --labels organ=1 --size x",
        "prepare IN OUT --layout kits --labels organ=1 --spacing 1",
        "prepare IN OUT --layout kits --labels organ=1 --other ignore",
        "prepare IN OUT --layout kits --labels organ=1 --workers 0",
        "prepare IN OUT --layout kits --labels organ=1 --channel -1",
        "prepare IN OUT --layout kits --labels organ=1 --window",
        "prepare IN OUT --layout kits --labels organ=1 --window 5",
        "prepare IN OUT --layout kits --labels organ=1 --image-pattern {case}.nii",
        "prepare IN OUT --layout pairs --labels organ=1 --image-pattern {case}.nii",
        "prepare IN OUT --layout kits --labels organ",
        "prepare IN OUT --layout msd --labels organ=1",
        "prepare IN OUT --layout kits --labels organ=1",
        "split OUT --train a",
        "split OUT",
        "info OUT",
        "info",
    ],
)
def test_a_wrong_line_is_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(line.split())
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_disk_that_can_not_be_written(tmp_path, capsys):
    save_kits(tmp_path / "kits", 1)
    (tmp_path / "file").touch()
    store = str(tmp_path / "file" / "s.zarr")
    assert main(["prepare", str(tmp_path / "kits"), store, "--layout", "kits", "--labels", "organ=1"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file: File exists\n"


def test_info(tmp_path, capsys):
    store = str(tmp_path / "s.zarr")
    save_kits(tmp_path / "kits", 8)
    main(
        ["prepare", str(tmp_path / "kits"), store, "--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    )
    main(["split", store])
    capsys.readouterr()
    assert main(["info", store]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "case_0000" in line]
    assert rows[0] == ["case_00000", "6", "10×12", "2.5", "0.7", "0.8", "LPS", "int16", "4", "1", "-200…300"]
    assert len(rows) == 8
    size = sum(file.stat().st_size for file in (tmp_path / "s.zarr").rglob("*") if file.is_file())
    assert f"8 cases, 48 slices, {size / 2**20:.1f} MiB, fingerprint {open_store(store).fingerprint()}" in out
    assert "labels organ=1, tumour=2; window -200…300" in out
    assert "split 'default': 6 train, 1 val, 1 test, seed 0" in out


def test_all_of_data_tools_without_torch():
    names = [f"data_tools.{module.name}" for module in pkgutil.iter_modules(data_tools.__path__)]
    assert len(names) > 8
    modules = ", ".join(name for name in names if not name.endswith("__main__"))
    code = f"import {modules}, sys; sys.exit(' '.join({{'torch', 'spark_dist', 'monai'}} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "data_tools", "--help"], check=False, capture_output=True, text=True)
    assert result.returncode == 0
    assert "phantom" in result.stdout


HOSTILE = ["a[", "x]b$", "{y}_^$x_{"]
"""Folders whose names mean something to what draws tables, pages and figures."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A store of four cases."""
    folder = tmp_path_factory.mktemp("prepared")
    options = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    assert main(["prepare", str(save_kits(folder / "kits", 4)), str(folder / "s.zarr"), *options]) == 0
    return folder / "s.zarr"


@pytest.fixture(scope="module")
def hostile(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile").joinpath(*HOSTILE, "[/x]$s_{.zarr")
    shutil.copytree(prepared, path)
    return path


@pytest.mark.parametrize("command", ["info", "verify --workers 1", "preview --only case_00000 --out", "stats --out"])
def test_names_that_mean_something_to_others(hostile, capsys, command):
    command, *more = command.split()
    if more[-1:] == ["--out"]:
        more.append(str(hostile.parent / f"[/x]$_{{.{command}"))
    assert main([command, str(hostile), *more]) == 0
    assert "[/x]$" in capsys.readouterr().out


def run_module(*line, **environment):
    line, environment = [sys.executable, "-m", "data_tools", *map(str, line)], os.environ | environment
    return subprocess.run(line, check=False, capture_output=True, cwd=ROOT, env=environment)


def test_a_terminal_without_unicode(prepared):
    for encoding in ("latin-1", "ascii"):
        result = run_module("info", prepared, PYTHONIOENCODING=encoding)
        assert (result.returncode, result.stderr) == (0, b"")
        assert b"case_00000" in result.stdout


def test_ctrl_c_while_it_is_imported(tmp_path):
    (tmp_path / "rich.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    result = run_module("--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (result.returncode, result.stderr) == (130, b"interrupted; the same command goes on from here\n")


COSTLY = {
    "cases": ["1", "0", "-1", "1e3", "100001", "9" * 30],
    "size": ["32", "40", "31", "-5", "1025", "7,9", "0,4", "8193", "1,2,3"],
    "workers": ["1", "0", "-1", "1.0", ""],
    "slices": ["1", "2", "0", "-3", "1001", "9" * 5000],
}
"""Values of options that would take long, or much memory, with some of all numbers."""
TELLING = [
    "organ=1,tumour=2",
    "organ=1",
    "organ=1+9",
    "organ=0",
    "tumour=1",
    "organ=-1",
    "organ=1e9",
    "3/8",
    "9/8",
    "1/0",
]
TELLING += [
    "-200,300",
    "300,-200",
    "nan,1",
    "percentile",
    "0.7",
    "0.15",
    "-0.1",
    "2",
    "1e9",
    "nan",
    "inf",
    "1,1,1",
    "0,1,2",
]
TELLING += ["{case}/imaging.nii.gz", "{case}/segmentation.nii.gz", "/{case}.nii", "../{case}", "{case}", "{case}{case}"]
TELLING += [
    "case_00000",
    "case_*",
    "case_9",
    "*",
    "",
    "default",
    "../x",
    "a" * 300,
    "[/x]",
    "$x_{",
    "\udcff",
    "-1",
    "1" * 30,
]
PLACES = ["s.zarr", "kits", "theirs", "theirs/index.html", "theirs/zarr.json", "out", "out/new.nii.gz", "out/x.png"]
PLACES += ["masks", "../here/out/p", "nowhere", "", "theirs/notes.txt/x", "l" * 300, "{x}_$y", "lists.json", "out/[/x]"]


def values_of(action):
    """Values for an option, most of which it does not take."""
    if action.choices:
        return st.sampled_from([*action.choices, "", "no"])
    if action.dest in COSTLY:
        return st.sampled_from(COSTLY[action.dest])
    if action.dest in ("out", "input", "store", "source", "lists", "prediction", "folder"):
        return st.sampled_from(PLACES)
    numbers = st.one_of(st.integers(-3, 9), st.integers(), st.floats())
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=[]), max_size=8)
    return st.one_of(st.sampled_from(TELLING), numbers.map(str), text)


USUAL = {
    "store": "s.zarr",
    "input": "kits",
    "folder": "masks",
    "case": "case_00000",
    "layout": "kits",
    "labels": "organ=1,tumour=2",
    "workers": "1",
    "cases": "1",
    "slices": "1",
    "size": "32",
}
"""What an option has that is not tried, where the default is costly or there is none."""


@st.composite
def lines(draw, command):
    """A command line of a subcommand with any values for a few of its options and places."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = [action for action in commands.choices[command]._actions if action.dest != "help"]
    tried = draw(st.lists(st.sampled_from(actions), max_size=3))
    line = [command]
    for action in actions:
        usual = USUAL | {"out": "out/new.nii.gz" if command == "export" else "out/new"}
        if command == "predictions":
            usual |= {"name": "theirs", "labels": None}
        if command == "prepare":
            usual |= {"store": "out/new.zarr", "size": None}
        if action not in tried and (action.nargs == 0 or usual.get(action.dest) is None):
            continue
        value = draw(values_of(action)) if action in tried and action.nargs != 0 else usual.get(action.dest)
        if action.nargs == 0:
            line.append(action.option_strings[0])
        else:
            line.append(f"{action.option_strings[0]}={value}" if action.option_strings else value)
    return line


@pytest.fixture(scope="module")
def work(prepared, tmp_path_factory):
    """A folder with a data set, its store, and what is somebody else's."""
    folder = tmp_path_factory.mktemp("any") / "here"
    shutil.copytree(prepared.parent / "kits", folder / "kits", ignore=lambda *_: ["case_00002", "case_00003"])
    options = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    assert main(["prepare", str(folder / "kits"), str(folder / "s.zarr"), *options]) == 0
    (folder / "lists.json").write_text('{"train": ["case_00000"], "val": ["case_00001"]}')
    (folder / "masks").mkdir()
    for case in ("case_00000", "case_00001"):
        shutil.copy(folder / "kits" / case / "segmentation.nii.gz", folder / "masks" / f"{case}.nii.gz")
    (folder / "theirs").mkdir()
    for name in ("index.html", "zarr.json", "notes.txt"):
        (folder / "theirs" / name).write_text("{}")
    return folder


MORE = int(os.environ.get("SPARK_DIST_EXAMPLES", 1))
EXAMPLES = {"preview": 20, "stats": 20, "phantom": 40}
COMMANDS = ["phantom", "prepare", "predictions", "verify", "export", "split", "preview", "stats", "info"]


def test_all_commands_are_tried():
    assert sorted({name for name, _ in options()}) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_any_values_of_all_options(work, monkeypatch, capsys, command):
    """No traceback, an error of one line for each mistake, and nothing that was there before is changed."""
    monkeypatch.chdir(work)
    theirs = {name: content for name, content in all_files(work.parent).items() if "/s.zarr/" not in name}
    names = {*os.listdir(work), "out", "nowhere", "l" * 300, "{x}_$y", "s-preview", "s-stats.png"}

    @settings(max_examples=MORE * EXAMPLES.get(command, 60), deadline=None, database=None)
    @given(lines(command))
    def check(line):
        capsys.readouterr()
        files = all_files(work / "s.zarr").items()
        stored = {name: content for name, content in files if name.startswith(("cases/case_", "predictions/"))}
        try:
            code = main(line)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert code in ((0, 1, 2) if command in ("prepare", "predictions", "verify") else (0, 2))
        assert "Traceback" not in out + err
        if code == 2:
            assert len(err.splitlines()) == 1, err
            assert err.startswith("error: ")
        assert theirs.items() <= all_files(work.parent).items()
        if "--replace" not in line:
            assert stored.items() <= all_files(work / "s.zarr").items()
        assert set(os.listdir(work)) <= names
        assert os.listdir(work.parent) == ["here"]

    check()
