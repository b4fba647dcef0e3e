import argparse
import os
import pkgutil
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from nifti_cases import save_kits

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
