"""Whatever a user, an editor or a terminal does to a command ends in a result or in one line, never in a traceback, and
what was there before stays."""

import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, keep_signals
from nifti_cases import all_files, save, save_kits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_tools import cli as data_cli
from data_tools.creation import create_store
from data_tools.store import open_store, write_case, write_split
from spark_dist import cli
from spark_dist.training.mlflow_client import make_client
from spark_dist.training.tracking import SENDS

JOB = "--dataset tiny.zarr --task organ --crop 32 --crop-shift [0,0] --batch-size 8 --slices labelled --epochs 1"
TRAIN = f"{JOB} --network enet --width 0.25"
DATA = "best.safetensors --dataset tiny.zarr"
PREPARE = "spark-data prepare kits new.zarr --labels organ=1,tumour=2 --workers 1"
USUAL = {
    "train": TRAIN,
    "distill": f"{JOB} --student-width 0.25 --teacher enet --teacher-width 0.25 --teacher-checkpoint best.safetensors",
    "evaluate": DATA,
    "picture": DATA,
    "explain": DATA,
    "export": "best.safetensors new.onnx --dataset tiny.zarr",
    "predict": "best.safetensors scan.nii --out new",
    "views": JOB,
    "profile": "enet",
    "sweep": "grid.yaml",
}
"""Words of commands that a try leaves out; those of the try come later, and count."""


class Try(NamedTuple):
    """A command in a hostile situation, and words that its one line has, or, if it ends well, its output."""

    line: str
    """A command of spark-dist without its usual words, or a whole line that begins with the program."""
    words: str
    situation: str = ""
    code: int = 2
    encoding: str = "utf-8"
    """The terminal's."""


def write(place: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / place).write_bytes(text.encode("latin-1"))


def unfinished(folder: Path) -> Path:
    """Makes the job one that has still to be tested; returns its newest state."""
    (folder / "job/network/test_cases.json").unlink()
    return max((folder / "job/network/checkpoints").glob("step-*.pt"))


def state_without(part: str) -> Callable[[Path], object]:
    def change(folder):
        path = unfinished(folder)
        torch.save(torch.load(path, weights_only=True) | {part: {}}, path)

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def describe(change: Callable[[dict], str]) -> Callable[[Path], object]:
    """Edits what is written beside a network's weights."""

    def edit(folder):
        with safe_open(folder / "best.safetensors", framework="pt") as file:
            metadata = file.metadata()
        metadata |= {"description": change(json.loads(metadata["description"]))}
        save_file(load_file(folder / "best.safetensors"), folder / "best.safetensors", metadata)

    return edit


def note(**changes) -> Callable[[Path], object]:
    """Edits what is noted of a job's run in MLflow."""

    def edit(folder):
        file = folder / "job/network/tracking.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def of_a_sweep(name: str) -> Callable[[Path], object]:
    """Makes the job one of a sweep, which MLflow does not have yet."""

    def edit(folder):
        (folder / "job/network/tracking.json").unlink()
        journal = folder / "job/network/tracking.jsonl"
        first, *rest = journal.read_text().splitlines(keepends=True)
        journal.write_text(json.dumps(json.loads(first) | {"shared": name, "id": "0" * 32}) + "\n" + "".join(rest))

    return edit


def foreign_run(folder: Path) -> str:
    """Somebody else's run in the job's experiment, with a tag and a file of ours; returns its id."""
    client = make_client(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny-organ").experiment_id
    run = client.create_run(experiment, tags={"mlflow.runName": "foreign", "role": "student"}).info.run_id
    client.log_artifact(run, str(folder / "job/network/test_cases.json"))
    return run


def below(name: str) -> Callable[[Path], object]:
    """Copies weights and store into a folder, which has a folder for caches too."""

    def copy(folder):
        (folder / name / "caches").mkdir(parents=True)
        shutil.copy(folder / "best.safetensors", folder / name)
        shutil.copytree(folder / "tiny.zarr", folder / name / "tiny.zarr")

    return copy


def one_slice(folder: Path) -> None:
    create_store(folder / "one.zarr", {"labels": {"organ": [1]}, "window": {"kind": "fixed", "low": 0, "high": 9}})
    facts = {"affine": np.eye(4).tolist(), "spacing": [4, 1, 1], "window": [0, 9], "source": {}}
    write_case(folder / "one.zarr", "a", np.zeros((1, 20, 20), np.int16), np.ones((1, 20, 20), np.uint8), facts)


def nearly_whole(folder: Path) -> None:
    import nibabel

    file = save_kits(folder / "kits", 1) / "case_00000/segmentation.nii.gz"
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 1.0000001, image.affine), file)


TEXTS = {
    "list": "- a\n- b\n",
    "cut": "epochs: [",
    "words": "plain words",
    "empty": "",
    "bytes": "\0\xff",
    "null": "null",
}
STATES = {
    "empty": {},
    "half": {"epoch": 1},
    "a list": [1, 2],
    "words": "words",
    "of text": {"epoch": "1", "step": 0, "best": 0.5, "losses": [], "model": {}, "optimizer": {}, "processes": 1},
    "no plain value": Path("no plain value"),
}
CARDS = {
    "no JSON": lambda found: "no JSON",
    "a list": lambda found: "[1, 2]",
    "empty": lambda found: "{}",
    "of network 5": lambda found: json.dumps(found | {"network": 5}),
    "of an unknown network": lambda found: json.dumps(found | {"network": "nonet"}),
    "of a width in words": lambda found: json.dumps(found | {"width": "wide"}),
    "of width -1": lambda found: json.dumps(found | {"width": -1}),
}
NOTES = {
    "empty": write("job/network/tracking.json", ""),
    "a list": write("job/network/tracking.json", "[]"),
    "zeros": write("job/network/tracking.json", "\0\0"),
    "of no run": note(run_id="../.."),
    "of another's run": lambda folder: note(run_id=foreign_run(folder))(folder),
    "beyond the journal": note(sent=10**9),
}
MARKUP = ["[/x]", "[bold]", "[red]a[/red]", "a[x"]
NAMES = ["$x", "$\\alpha$", "a$b$c$", "$\\nocommand$", "[/x]", "x_1^2", "%s", "{}", "Ärzte…⟶"]
RECIPES = {
    "epochs: many": "--epochs can't be many; it takes a whole number",
    "epochs: 1.5": "--epochs can't be 1.5; it takes a whole number",
    "rounds: 0": "--rounds must be at least 1, not 0",
    "slices: most": "--slices can't be most; it takes all or labelled or mixed",
    "weights: 3": "--weights can't be 3; it takes names with a number each",
    "weights: {gain: much}": "--weights can't be much",
    "out: 5": "--out can't be 5; it takes a path",
    'out: "a\\0b"': "--out holds a zero byte",
    "5: 5": "there is no option '5'",
    "- epochs": "a recipe is a list of 'option: value' lines",
    "a: b: c": "can't be read as a recipe",
    "\x80": "can't be read as a recipe",
    # The teacher is looked for when all options are understood.
    "cache: off": "nowhere.safetensors: ",
}
SITUATIONS: dict[str, Callable[[Path], object]] = {
    "": lambda folder: None,
    **{f"config.yaml is {name}": write("job/config.yaml", text) for name, text in TEXTS.items()},
    "config.yaml has one option": write("job/config.yaml", "epochs: 1\n"),
    **{
        f"the state is {name}": lambda folder, state=state: torch.save(state, unfinished(folder))
        for name, state in STATES.items()
    },
    "the state is of another network": state_without("model"),
    "the state is of another optimizer": state_without("optimizer"),
    "the state is cut": lambda folder: cut(unfinished(folder)),
    "weights are cut": lambda folder: cut(folder / "best.safetensors"),
    "weights have no card": lambda folder: save_file(
        load_file(folder / "best.safetensors"), folder / "best.safetensors"
    ),
    **{f"the card is {name}": describe(change) for name, change in CARDS.items()},
    **{f"tracking.json is {name}": change for name, change in NOTES.items()},
    "the job is one of a sweep it's": of_a_sweep("it's"),
    "somebody else's run is there": foreign_run,
    "a grid it's": write("it's.yaml", "seed: [1]\n"),
    **{f"below {name}": below(name) for name in MARKUP},
    "new.onnx is somebody's": write("new.onnx", "mine"),
    "mine.png is somebody's": write("mine.png", "mine"),
    "a case of one slice": one_slice,
    "a label of 1.0000001": nearly_whole,
    "volumes": lambda folder: save_kits(folder / "kits", 1),
    **{f"recipe {line}": write("recipe.yaml", f"{line}\n") for line in RECIPES},
}
"""What happened before the command, by its name."""

READ = ("evaluate", "picture", "distill", "explain", "export", "predict")
"""Commands that read trained weights."""
TRIES = [
    # Out of bounds, or of another kind.
    Try("train --crop 0", "--crop must be at least 1, not 0"),
    Try("train --crop -32", "--crop must be at least 1, not -32"),
    Try("train --crop [64,0]", "--crop must be at least 1, not 0"),
    Try("train --crop 1000000", "--crop must be at most 16,384, not 1000000"),
    Try("train --crop [3]", "--crop can't be [3]; it takes a whole number or [a whole number, a whole number]"),
    Try("train --crop-shift [0,100000]", "--crop-shift must be at most 16,384"),
    Try("train --width -1", "--width must be above 0, not -1.0"),
    Try("train --width 0", "--width must be above 0, not 0.0"),
    Try("train --seed -1", "--seed must be at least 0, not -1"),
    Try(f"train --seed {2**32}", "--seed must be below 4,294,967,296"),
    Try("train --workers -1", "--workers must be at least 0, not -1"),
    Try("train --support-slices 0", "--support-slices must be at least 1, not 0"),
    Try("train --batch-size 0", "--batch-size must be at least 1, not 0"),
    Try("train --batch-size 2.5", "--batch-size can't be 2.5; it takes a whole number"),
    Try("train --lr .inf", "--lr must be a finite number, not inf"),
    Try("train --lr 1e-3 --lr-min 1", "--lr-min (1) must be at most --lr (0.001)"),
    Try("train --ema 1", "--ema must be below 1, not 1.0"),
    Try("train --checkpoint-minutes -1", "--checkpoint-minutes must be at least 0"),
    Try("train --timeout-minutes 0", "--timeout-minutes must be above 0"),
    Try("train --threshold 1", "--threshold must be below 1, not 1.0"),
    Try("train --augment maybe", "--augment can't be maybe; it takes none or flips or full"),
    Try("train --task organ,", "--task organ,: name regions once each, like organ or anterior,posterior, or all"),
    Try("train --task organ,organ", "--task organ,organ: name regions once each"),
    Try("train --epoch 3", "there is no option '--epoch'; did you mean --epochs"),
    Try("distill --cache-memory -1", "--cache-memory must be at least 0, not -1"),
    Try("distill --teacher-width -1", "--teacher-width must be above 0"),
    Try("distill --weights.gain much", "--weights can't be much; it takes names with a number each"),
    Try("distill --weights.gain .nan", "--weights must be a finite number, not nan"),
    Try("distill --rounds 0", "--rounds must be at least 1"),
    Try("cache --prune -1", "--prune must be at least 0, not -1"),
    Try("cache --verify -1", "--verify must be at least 0, not -1"),
    Try("evaluate --threshold 0", "--threshold must be above 0, not 0.0"),
    Try("evaluate --threshold 2", "--threshold must be below 1, not 2.0"),
    Try("evaluate --surface-tolerance -1", "--surface-tolerance must be at least 0, not -1"),
    Try("evaluate --tta turns", "--tta can't be turns; it takes none or flips"),
    Try("predict --tta turns", "--tta can't be turns; it takes none or flips"),
    Try("picture --rows 0", "--rows must be at least 1, not 0"),
    Try("explain --rows 0", "--rows must be at least 1, not 0"),
    Try("explain --log-to nowhere", "--log-to nowhere: no job that has ended"),
    Try("profile --crop 0", "--crop must be at least 1, not 0"),
    Try("profile --width -1", "--width must be above 0"),
    Try("profile --repeats 0", "--repeats must be at least 1"),
    Try("sweep --task -1", "--task must be at least 0"),
    # Empty, as of a variable that is not set.
    *(
        Try(f"{line}=", f"{line.split()[1]} is empty; is a variable not set?")
        for line in ("train --out", "evaluate --dataset", "profile --csv")
    ),
    Try("spark-dist track-sync ''", "argument folder is empty; is a variable not set?"),
    Try("spark-dist predict best.safetensors '' --out new", "argument inputs is empty; is a variable not set?"),
    # Recipes.
    *(
        Try("distill --config recipe.yaml --teacher-checkpoint nowhere.safetensors", words, f"recipe {line}")
        for line, words in RECIPES.items()
    ),
    # What there is not.
    *(
        Try(
            f"{command} --split no-test",
            "tiny.zarr: the test part of split 'no-test' has no case; name another --split",
        )
        for command in ("evaluate", "picture", "explain")
    ),
    *(
        Try(f"train --split no-{part} --out new", f"the {part} part of split 'no-{part}'")
        for part in ("train", "val", "test")
    ),
    *(
        Try(f"picture --out {out}", "is no format of pictures; use ")
        for out in ("picture.txt", "picture", "a.b/picture", "picture.PNG.zip")
    ),
    Try("export", "new.onnx: exists; remove it, or name another file", "new.onnx is somebody's"),
    *(
        Try(
            f"{command} {option} mine.png",
            f"mine.png: exists and was not made by spark-dist; move it away, or name another {option}",
            "mine.png is somebody's",
        )
        for command, option in (("explain --slices case_00008:2", "--out"), ("views", "--picture"))
    ),
    Try("explain --out a.txt", "--out a.txt: 'txt' is no format of pictures"),
    *(
        Try(f"profile --device {device}", f"--device {device}: there is none of that name here, only ")
        for device in ("cuda:99", "gpu", "meta", "cpu:3", "Cuda", "$")
    ),
    *(
        Try(f"{command} --tracking-uri={uri}", f"--tracking-uri '{uri}': give a server")
        for command in ("compare", "spark-dist track-sync job", "train")
        for uri in ("mlflow.db", "", "host", "/a/b", "//host")
    ),
    Try(
        f"{PREPARE} --layout pairs --image-pattern=/data/{{case}}.nii --label-pattern={{case}}.nii",
        "--image-pattern /data/{case}.nii: is below the data set's folder",
        "volumes",
    ),
    # Edited, cut off, of something else.
    *(
        Try("train --out job", "job/config.yaml: not the options of a job (", f"config.yaml is {name}")
        for name in TEXTS
    ),
    Try("train --out job", "job: holds a job with ", "config.yaml has one option"),
    *(Try("train --out job", "holds no state of this job (", f"the state is {name}") for name in STATES),
    *(
        Try("train --out job", "job/network/checkpoints/step-", f"the state is of another {part}")
        for part in ("network", "optimizer")
    ),
    Try("train --out job", "every saved state is damaged", "the state is cut"),
    *(Try(command, "best.safetensors: not a whole .safetensors file", "weights are cut") for command in READ),
    *(Try(command, "not a network saved by spark-dist", "weights have no card") for command in READ),
    *(Try(command, "best.safetensors", f"the card is {name}") for command in READ[:3] for name in CARDS),
    *(
        Try("spark-dist track-sync job", " entries sent to sqlite:///mlflow.db", f"tracking.json is {name}", 0)
        for name in NOTES
    ),
    Try("compare", "tiny, organ", "somebody else's run is there", 0),
    Try("spark-dist track-sync job", " entries sent to sqlite:///mlflow.db", "the job is one of a sweep it's", 0),
    Try("""spark-dist sweep "it's.yaml" --task 1""", "--sweep=it's", "a grid it's", 0),
    Try("spark-data preview one.zarr", "one-preview/index.html", "a case of one slice", 0),
    Try(f"{PREPARE} --layout kits", "it holds 1.0000001, 2.0000002; ", "a label of 1.0000001", 1),
    # Names that mean something to what draws tables and figures, and terminals that lack characters.
    *(
        Try(
            f"spark-dist picture {shlex.quote(name)}=best.safetensors --dataset tiny.zarr --rows 1 --out p.svg",
            "wrote p.svg",
            code=0,
        )
        for name in NAMES
    ),
    *(
        Try(
            f"spark-dist evaluate '{name}/best.safetensors' --dataset '{name}/tiny.zarr' --out '{name}/a.json'",
            f"{name}/best.safetensors: organ, test",
            f"below {name}",
            0,
        )
        for name in MARKUP
    ),
    Try(
        "spark-dist picture [/x]/best.safetensors --dataset [/x]/tiny.zarr --rows 1 --out [/x]/a.png",
        "wrote [/x]/a.png",
        "below [/x]",
        0,
    ),
    *(Try(f"cache --list --cache-folder '{name}/caches'", f"{name}/caches", f"below {name}", 0) for name in MARKUP),
    *(
        Try(line, words, "", code, encoding)
        for encoding in ("latin-1", "ascii")
        for line, words, code in (
            ("evaluate", "organ, test", 0),
            ("picture --rows 1", "wrote ", 0),
            ("profile --crop 32 --repeats 1", "enet", 0),
            ("profile --crop ⟶", "--crop can't be ?", 2),
            ("spark-dist evaluate ⟶…×\udcff.safetensors --dataset tiny.zarr", "no such checkpoint", 2),
            ("train --help", "usage: ", 0),
            ("spark-dist --help", "usage: ", 0),
        )
    ),
]


@pytest.fixture(scope="module")
def trained(jobs, tiny_store, tmp_path_factory):
    """A folder with a store, and a job that is done and in MLflow."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_store, folder / "tiny.zarr")
    whole = open_store(folder / "tiny.zarr").splits["default"]
    for part in ("train", "val", "test"):
        write_split(folder / "tiny.zarr", f"no-{part}", {**whole, part: []})
    codes, log = jobs("train", *shlex.split(TRAIN), "--out", "job", folder=folder)
    assert codes == [0], log
    codes, log = jobs("track_sync", "job", folder=folder)
    assert codes == [0], log
    shutil.copy(folder / "job" / "network" / "best.safetensors", folder)
    (folder / "grid.yaml").write_text("seed: [1, 2]\n")
    save(folder / "scan.nii", np.arange(32 * 32 * 2, dtype=np.int16).reshape(32, 32, 2))
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of `trained`, which is the working directory."""
    shutil.copytree(trained, tmp_path / "here")
    note = tmp_path / "here/job/network/tracking.json"
    note.write_text(note.read_text().replace(str(trained), str(tmp_path / "here")))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    for thread in threading.enumerate():
        if thread.name == SENDS:  # which still writes into this folder, by its relative name
            thread.join(60)


def run(line, monkeypatch, encoding="utf-8"):
    """Exit code, output and errors of a command in a terminal."""
    words = shlex.split(line)
    if words[0] not in ("spark-dist", "spark-data"):
        words = ["spark-dist", words[0], *shlex.split(USUAL.get(words[0], "")), *words[1:]]
    program = {"spark-dist": cli.main, "spark-data": data_cli.main}[words[0]]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch, keep_signals():
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            code = program(words[1:])
        except SystemExit as stop:  # --help
            code = stop.code
        for stream in streams:
            stream.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


def lasting(folder):
    """The files that a command which fails leaves as they are: all but the records for MLflow."""
    return {
        name: content
        for name, content in all_files(folder).items()
        if not {"tracking", "mlflow"} & {*Path(name).name.split(".")}
    }


@pytest.mark.parametrize(
    "hostile", TRIES, ids=lambda hostile: ascii(" ".join((hostile.line, hostile.situation, hostile.encoding)))
)
def test_a_hostile_try_ends_in_a_result_or_one_line(here, monkeypatch, hostile):
    SITUATIONS[hostile.situation](here)
    before = lasting(here)
    code, output, errors = run(hostile.line, monkeypatch, hostile.encoding)
    assert code == hostile.code, errors
    if code:
        (said,) = errors.strip().splitlines()
        assert said.startswith("error: ")
    else:
        said = " ".join(output.split())
    assert hostile.words in said
    assert before.items() <= lasting(here).items()
    if code == 2:
        assert before == lasting(here)


def test_progress_bars_show_names_as_they_are(monkeypatch):
    from rich.console import Console

    from data_tools import progress

    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, markup=False, width=120))
    with progress.progress_bar("[/x]", 3) as advance:
        advance("[/y]")
    assert "[/x]" in shown.getvalue()


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


def test_a_job_that_was_begun_in_another_folder_goes_on_there(here, monkeypatch):
    (here / "job" / "network").rename(here / "job" / "student")
    (here / "job" / "student" / "test_cases.json").unlink()
    code, said, _ = run("train --out job", monkeypatch)
    assert code == 0
    assert "student: test Dice" in said
    assert "epoch 1/1" not in said
    assert not (here / "job" / "network").exists()
