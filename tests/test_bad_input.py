"""Whatever a user, an editor or a terminal does to a command ends in one line, never in a traceback."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, keep_signals
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_tools.store import open_store, write_split
from spark_dist.cli import main

SMALL = ("--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--batch-size", "8")
SMALL += ("--slices", "labelled")
TRAIN = ("train", "--dataset", "tiny.zarr", *SMALL, "--network", "enet", "--width", "0.25", "--epochs", "1")
DISTILL = ("distill", "--dataset", "tiny.zarr", *SMALL, "--student-width", "0.25", "--epochs", "1", "--teacher", "enet")
DISTILL += ("--teacher-width", "0.25", "--teacher-checkpoint", "best.safetensors")
EVALUATE = ("evaluate", "best.safetensors", "--dataset", "tiny.zarr")
PICTURE = ("picture", "best.safetensors", "--dataset", "tiny.zarr")


@pytest.fixture(scope="module")
def trained(jobs, tiny_store, tmp_path_factory):
    """A folder with a store, and a job that is done."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_store, folder / "tiny.zarr")
    whole = open_store(folder / "tiny.zarr").splits["default"]
    for part in ("train", "val", "test"):
        write_split(folder / "tiny.zarr", f"no-{part}", {**whole, part: []})
    codes, log = jobs(*TRAIN, "--out", "job", folder=folder)
    assert codes == [0], log
    shutil.copy(folder / "job" / "network" / "best.safetensors", folder)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of `trained`, which is the working directory."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def one_line(capsys, *command, code=2):
    """The one line of a command that fails."""
    capsys.readouterr()
    with keep_signals():
        assert main([str(word) for word in command]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("error: ")


def unfinished(folder):
    """Makes a job one that has still to be tested; returns its newest state."""
    (folder / "job" / "network" / "test_cases.json").unlink()
    return max((folder / "job" / "network" / "checkpoints").glob("step-*.pt"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def describe(path, change):
    """Edit what is written beside a network's weights."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["description"])
    save_file(load_file(path), path, metadata | {"description": change(description)})


@pytest.mark.parametrize("text", ["- a\n- b\n", "epochs: [", "plain words", "", "\x00\xff", "null"])
def test_an_edited_record_of_a_job(here, capsys, text):
    (here / "job" / "config.yaml").write_bytes(text.encode("latin-1"))
    line = one_line(capsys, *TRAIN, "--out", "job")
    assert line.startswith("job/config.yaml: not the options of a job (")


def test_a_record_that_lacks_an_option_is_another_jobs(here, capsys):
    (here / "job" / "config.yaml").write_text("epochs: 1\n")
    assert one_line(capsys, *TRAIN, "--out", "job").startswith("job: holds a job with ")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"epoch": 1},
        [1, 2],
        "words",
        {"epoch": "1", "step": 0, "best": 0.5, "losses": [], "model": {}, "optimizer": {}, "processes": 1},
        Path("no plain value"),
    ],
    ids=str,
)
def test_a_checkpoint_that_holds_something_else(here, capsys, state):
    torch.save(state, unfinished(here))
    assert "holds no state of this job (" in one_line(capsys, *TRAIN, "--out", "job")


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_of_another_network(here, capsys, part):
    path = unfinished(here)
    state = torch.load(path, weights_only=True)
    torch.save(state | {part: {}}, path)
    line = one_line(capsys, *TRAIN, "--out", "job")
    assert str(path.relative_to(here)) in line


def test_a_checkpoint_that_was_cut_off(here, capsys, caplog):
    cut(unfinished(here))
    assert "every saved state is damaged" in one_line(capsys, *TRAIN, "--out", "job")


@pytest.mark.parametrize("command", [EVALUATE, PICTURE, DISTILL], ids=lambda command: command[0])
def test_weights_that_were_cut_off(here, capsys, command):
    cut(here / "best.safetensors")
    assert one_line(capsys, *command).startswith("best.safetensors: not a whole .safetensors file")


@pytest.mark.parametrize("command", [EVALUATE, PICTURE, DISTILL], ids=lambda command: command[0])
@pytest.mark.parametrize(
    "change",
    [
        lambda found: "no JSON",
        lambda found: "[1, 2]",
        lambda found: "{}",
        lambda found: json.dumps(found | {"network": 5}),
        lambda found: json.dumps(found | {"network": "nonet"}),
        lambda found: json.dumps(found | {"width": "wide"}),
        lambda found: json.dumps(found | {"width": -1}),
    ],
    ids=["no JSON", "list", "empty", "network 5", "unknown network", "width in words", "width -1"],
)
def test_an_edited_description_of_weights(here, capsys, command, change):
    describe(here / "best.safetensors", change)
    assert one_line(capsys, *command).startswith("best.safetensors")


@pytest.mark.parametrize("command", [EVALUATE, PICTURE, DISTILL], ids=lambda command: command[0])
def test_weights_without_metadata(here, capsys, command):
    save_file(load_file(here / "best.safetensors"), here / "best.safetensors")
    assert "not a network saved by spark-dist" in one_line(capsys, *command)


@pytest.mark.parametrize("command", [EVALUATE, PICTURE], ids=lambda command: command[0])
def test_a_part_without_cases(here, capsys, command):
    line = one_line(capsys, *command, "--split", "no-test")
    assert line == "tiny.zarr: the test part of split 'no-test' has no case; name another --split"


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_no_job_begins_without_one_of_the_parts(here, capsys, part):
    assert f"the {part} part of split 'no-{part}'" in one_line(capsys, *TRAIN, "--split", f"no-{part}", "--out", "new")
    assert not (here / "new").exists()


@pytest.mark.parametrize("out", ["picture.txt", "picture", "a.b/picture", "picture.PNG.zip"])
def test_a_picture_in_a_format_that_there_is_not(here, capsys, out):
    assert "is no format of pictures; use " in one_line(capsys, *PICTURE, "--out", out)


@pytest.mark.parametrize("name", ["$x", "$\\alpha$", "a$b$c$", "$\\nocommand$", "[/x]", "x_1^2", "%s", "{}", "Ärzte…⟶"])
def test_a_picture_of_a_network_with_any_name(here, name):
    assert main(["picture", f"{name}=best.safetensors", "--dataset", "tiny.zarr", "--rows", "1", "--out", "p.svg"]) == 0
    assert (here / "p.svg").stat().st_size > 10_000


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cpu:3", "Cuda", "$"])
def test_a_device_that_there_is_not(here, capsys, device):
    line = one_line(capsys, "profile", "enet", "--crop", "32", "--device", device)
    assert line.startswith(f"--device {device}: there is none of that name here, only ")


@pytest.mark.parametrize("uri", ["mlflow.db", "", "host", "/a/b", "//host"])
@pytest.mark.parametrize("command", [("compare",), ("track-sync", "job"), TRAIN], ids=lambda command: command[0])
def test_a_tracking_server_that_is_none(here, capsys, command, uri):
    assert one_line(capsys, *command, "--tracking-uri", uri).startswith(f"--tracking-uri '{uri}': give a server")


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[red]a[/red]", "a[x"])
def test_paths_that_look_like_markup(here, capsys, name):
    (here / name).mkdir(parents=True)
    shutil.copy(here / "best.safetensors", here / name)
    shutil.copytree(here / "tiny.zarr", here / name / "tiny.zarr")
    checkpoint, data = f"{name}/best.safetensors", ("--dataset", f"{name}/tiny.zarr")
    assert main(["evaluate", checkpoint, *data, "--out", f"{name}/a.json"]) == 0
    assert main(["picture", checkpoint, *data, "--rows", "1", "--out", f"{name}/a.png"]) == 0
    output = capsys.readouterr().out
    assert f"{checkpoint}: organ, test" in " ".join(output.split())
    assert f"wrote {name}/a.png" in output
    (here / name / "cache").mkdir()
    assert main(["cache", "--list", "--cache-folder", f"{name}/cache"]) == 0
    assert f"{name}/cache" in " ".join(capsys.readouterr().out.split())


def test_progress_bars_show_names_as_they_are(monkeypatch):
    from rich.console import Console

    from data_tools import progress

    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, markup=False, width=120))
    with progress.progress_bar("[/x]", 3) as advance:
        advance("[/y]")
    assert "[/x]" in shown.getvalue()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (EVALUATE, 0),
        ((*PICTURE, "--rows", "1"), 0),
        (("profile", "enet", "--crop", "32", "--repeats", "1"), 0),
        (("profile", "enet", "--crop", "⟶"), 2),
        (("evaluate", "⟶…×\udcff.safetensors", "--dataset", "tiny.zarr"), 2),
        (("train", "--help"), 0),
        (("--help",), 0),
    ],
    ids=lambda part: " ".join(part[:2]).encode("ascii", "replace").decode() if isinstance(part, tuple) else None,
)
def test_a_terminal_that_lacks_characters(here, monkeypatch, encoding, command, code):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    if "--help" in command[1:]:
        with pytest.raises(SystemExit):
            main(command)
    else:
        assert main(command) == code
    for stream in streams:
        stream.flush()
    assert b"".join(stream.buffer.getvalue() for stream in streams)


@pytest.mark.parametrize("start", ["-m spark_dist.profile", "-m spark_dist.train --help", "script"])
def test_ctrl_c_while_modules_are_imported(tmp_path, start):
    """The interrupt comes while torch is loaded, or some time later."""
    words = start.split() if start != "script" else ["-c", "from spark_dist.cli import main; main(['profile'])"]
    with open(tmp_path / "err", "w") as err:
        line, environment = [sys.executable, *words], os.environ | {"PYTHONPATH": str(ROOT)}
        # Where the tests run in a shell's background, Ctrl-C is ignored and children inherit that.
        process = subprocess.Popen(
            line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=err, preexec_fn=listen_to_ctrl_c
        )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.random() / 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert (tmp_path / "err").read_text() == "interrupted\n"


def listen_to_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_job_that_was_begun_in_another_folder_goes_on_there(here, capsys):
    (here / "job" / "network").rename(here / "job" / "student")
    (here / "job" / "student" / "test_cases.json").unlink()
    with keep_signals():
        assert main([*TRAIN, "--out", "job"]) == 0
    said = capsys.readouterr().out
    assert "student: test Dice" in said
    assert "epoch 1/1" not in said
    assert not (here / "job" / "network").exists()
