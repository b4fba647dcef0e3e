"""Options: their help, recipes, and what must be given (mistakes in them: `test_hostile.py`)."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from data_tools.errors import UserError
from spark_dist.cli import COMMANDS, main
from spark_dist.options import flag
from spark_dist.parsing import parse

DATA = ("--dataset", "d.zarr", "--task", "organ")
NEEDED = {
    "train": (*DATA, "--network", "enet"),
    "distill": DATA,
    "cache": (),
    "evaluate": ("a.safetensors", "--dataset", "d.zarr"),
    "predict": ("a.safetensors", "scan.nii"),
    "compare": (),
    "profile": (),
    "picture": ("a.safetensors", "--dataset", "d.zarr"),
    "explain": ("a.safetensors", "--dataset", "d.zarr"),
    "views": DATA,
    "crossval": ("distill", *DATA),
    "export": ("a.safetensors", "a.onnx", "--dataset", "d.zarr"),
    "sweep": ("grid.yaml",),
    "track-sync": ("folder",),
}
"""What each command can't do without."""


def options_of(command):
    return import_module(f"spark_dist.{command.replace('-', '_')}").OPTIONS


def parsed(command, *arguments):
    return parse(options_of(command), [*NEEDED[command], *map(str, arguments)], f"spark-dist {command}")


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        parse(options_of(command), ["--help"], f"spark-dist {command}")
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_must_be_given_is_named(command, capsys):
    if not NEEDED[command]:
        return
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert " must be given (see " in error
    assert all(word in error for word in NEEDED[command] if word.startswith("--"))


def test_bounds_hold_without_a_command_line_too():
    from spark_dist.config import TrainOptions

    with pytest.raises(UserError, match="--batch-size must be at least 1, not 0"):
        TrainOptions(dataset="d.zarr", task="organ", network="enet", batch_size=0)


def test_a_second_recipe_is_an_error_that_names_both(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("epochs: 3\n")
    assert main(["train", *NEEDED["train"], "--config", "a.yaml", "--config=b.yaml"]) == 2
    assert "--config is given more than once (a.yaml, b.yaml)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("cache: off", "cache", "off"),
        ("cache: on", "cache", "on"),
        ("cache: true", "cache", "on"),
        ("cache: 'off'", "cache", "off"),
        ("cache: canonical", "cache", "canonical"),
        ("augment: full", "augment", "full"),
        ("crop: [64, 32]", "crop", (64, 32)),
        ("epochs:", "epochs", 90),
        ("out: runs/a", "out", parsed("train", "--out", "runs/a").out),
        ("weights: {gain: 3}", "weights", {"gain": 3.0}),
        ("teacher_checkpoint: a", "teacher_checkpoint", [Path("a")]),
        ("teacher_checkpoint: [a, b]", "teacher_checkpoint", [Path("a"), Path("b")]),
    ],
)
def test_recipes(tmp_path, line, name, value):
    (tmp_path / "recipe.yaml").write_text(f"{line}\n")
    assert getattr(parsed("distill", "--config", tmp_path / "recipe.yaml"), name) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--teacher-checkpoint", "a"), ["a"]),
        (("--teacher-checkpoint", "a b", "é.safetensors", "--epochs", "3"), ["a b", "é.safetensors"]),
        (("--teacher-checkpoint=a", "--epochs=3"), ["a"]),
        (("--teacher-checkpoint=a", "b"), ["a", "b"]),
        (("--teacher-checkpoint", "[a, b]"), ["a", "b"]),
    ],
)
def test_an_option_may_take_several_paths(words, value):
    assert parsed("distill", *words).teacher_checkpoint == [Path(path) for path in value]


TERMS = {
    "train": (
        "gradient accumulation",
        "gradient clipping",
        "exponential moving average",
        "data augmentation",
        "batch normalisation",
        "learning rate",
        "cosine annealing",
        "linear scaling rule",
        "random seed",
        "data loader",
        "checkpoint",
        "MLflow experiment",
        "torch.compile",
        "memory format",
        "ImageNet",
        "timeout",
        "output folder",
    ),
    "distill": ("distillation method", "online distillation", "temperature", "teacher cache", "quantised"),
}


@pytest.mark.parametrize(("command", "term"), [(command, term) for command, terms in TERMS.items() for term in terms])
def test_help_speaks_the_fields_language(command, term, capsys):
    assert term.lower() in " ".join(help_of(command, capsys).lower().split())


def test_help_shows_options_in_groups(capsys):
    text = help_of("distill", capsys)
    places = [text.index(f"\n{title}:\n") for title in ("Distillation", "Teacher cache", "Data", "Optimisation")]
    places += [text.index(f"\n{title}:\n") for title in ("Schedule", "Job folder and checkpoints", "Tracking (MLflow)")]
    assert places == sorted(places)
    data, optimisation = text.index("\nData:\n"), text.index("\nOptimisation:\n")
    assert data < text.index("  --crop ") < optimisation < text.index("  --batch-size ")
    # The cache command inherits the groups, what it declares anew included.
    text = help_of("cache", capsys)
    assert text.index("  --list") < text.index("\nData:\n") < text.index("  --dataset ")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_defaults(command, capsys):
    text = " ".join(help_of(command, capsys).split())
    for field in fields(options_of(command)):
        if isinstance(field.default, int | float) and field.name not in ("prune",):
            shown = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
            assert re.search(rf"{flag(field.name)} .*?\(default: {re.escape(shown)}\)", text), field.name
    assert "<class" not in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_no_option_with_an_underscore(command, capsys):
    assert not re.findall(r"--[a-z]+_\w+", help_of(command, capsys))


def texts():
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.yaml"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    for folder in ("spark_dist", "data_tools", "launch"):
        files += [file for file in ROOT.glob(f"{folder}/**/*") if file.suffix in (".py", ".sh", ".yaml", ".sbatch")]
    return files


@pytest.mark.parametrize("file", texts(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_text_spells_an_option_with_an_underscore(file):
    # The README has a table of the original system's own options.
    text = re.sub(r"## From the original's commands.*?(?=\n## )", "", file.read_text(), flags=re.DOTALL)
    assert not re.findall(r"--[a-z]+_\w+", text)


@pytest.mark.parametrize("command", ["compare", "picture", "profile", "track-sync"])
def test_commands_run_as_modules(command, tmp_path):
    module = f"spark_dist.{command.replace('-', '_')}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", module, "--nonsense", "3"]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"python -m {module} --help" in result.stderr
    assert result.stderr.startswith("error: ")


def test_the_docstring_of_picture_is_a_command_that_is_understood():
    words = import_module("spark_dist.picture").__doc__.split(": ")[1].replace("…", "").split()
    assert words[:2] == ["spark-dist", "picture"]
    assert parse(options_of("picture"), words[2:], "picture").checkpoints
