"""What the README and the recipes tell people to type."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, model_card

from data_tools.cli import parser
from data_tools.scans import Preparation
from spark_dist.cli import COMMANDS
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.options import shown
from spark_dist.parsing import parse

README = (ROOT / "README.md").read_text()


def commands():
    """The README's command lines, continued lines joined and comments taken off."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def command_module(name):
    return import_module(f"spark_dist.{name.replace('-', '_')}")


def test_there_are_commands():
    assert len(list(commands())) > 10


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "spark-data":
        assert parser().parse_args(words[1:]).run
    elif words[0] == "spark-dist":
        parse(command_module(words[1]).OPTIONS, words[2:], "spark-dist")
    elif words[:2] == ["accelerate", "launch"]:
        assert Path(words[words.index("--config-file") + 1]).is_file()
        module = words.index("-m") + 1
        parse(import_module(words[module]).OPTIONS, words[module + 1 :], words[module])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    else:
        assert words[0] == "mlflow"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    facts = {"preparation": Preparation(kind="fixed", low=0, high=100), "label_values": (1,)}
    save_network(tmp_path / "best.safetensors", build_network("enet", width=0.25), model_card(**facts))
    monkeypatch.chdir(tmp_path)
    names = {"volume": np.random.default_rng(0).integers(0, 100, (20, 24, 3)), "affine": np.diag([-1.0, 1, 3, 1])}
    exec(code, names)
    assert names["label"].shape == names["volume"].shape
    assert set(np.unique(names["label"])) <= {0, 1}


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_serve_both_commands(recipe):
    from spark_dist.config import DistillOptions, TrainOptions
    from spark_dist.training.checks import check

    check(parse(TrainOptions, ["--config", str(recipe), "--network", "enet"], "train"))
    check(parse(DistillOptions, ["--config", str(recipe)], "distill"))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_its_help(command, capsys):
    options = command_module(command).OPTIONS
    with pytest.raises(SystemExit):
        parse(options, ["--help"], command)
    text = capsys.readouterr().out
    for field in options.__dataclass_fields__.values():
        assert re.search(rf"{shown(field)}\b[^\n]*\n?\s+\S", text), field.name


@pytest.mark.launch
@pytest.mark.slow
def test_the_quickstart_runs_from_volumes_to_the_comparison(tmp_path):
    script = ["bash", ROOT / "launch" / "quickstart.sh", tmp_path]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"CASES": "16", "STEPS": "10", "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    result = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    table = result.stdout.split("Comparison on the test cases")[1]
    for row in ("teacher", "student alone", "student, soft"):
        assert row in table
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
    assert "mlflow ui" in table
