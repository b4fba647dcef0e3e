"""CONTRIBUTING.md is followed to the letter in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

BLOCK = re.compile(r"^( *)```python\n *# (\S+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the network and the method that the guide adds."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("spark_dist", "data_tools", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "accelerate_config.yaml"):
        shutil.copy(ROOT / part, folder)
    for _, name, code in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()):
        file, code = folder / name, textwrap.dedent(code)
        if file.exists():
            place = code.rstrip().splitlines()[-2] + "\n"
            assert place in file.read_text()
            code = file.read_text().replace(place, code)
        file.write_text(code)
    return folder


def run(folder, *command, cwd=None):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *map(str, command)]
    result = subprocess.run(line, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


def test_the_guide_adds_four_files(copy):
    assert len(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())) == 4
    assert (copy / "spark_dist/networks/mynet.py").exists()


@pytest.mark.slow
def test_what_was_added_trains_and_distils(copy, tiny_store, tmp_path):
    options = ("--dataset", tiny_store, "--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--epochs", 1)
    options += ("--teacher", "unet", "--teacher-width", 0.05, "--student", "mynet", "--method", "mymethod")
    assert "student: test Dice" in run(copy, "spark_dist.distill", *options, "--weights.maps", 0.5, cwd=tmp_path)


@pytest.mark.slow
def test_the_tests_over_the_registries_cover_it(copy):
    files = (
        "tests/networks/test_networks.py",
        "tests/teacher/test_teacher_cache.py",
        "tests/distillers/test_pairings.py",
    )
    summary = run(copy, "pytest", *files, "-k", "mynet or mymethod", "-p", "no:cacheprovider").splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 6


@pytest.mark.slow
def test_the_code_of_the_guide_is_formatted(copy):
    for command in (("check",), ("format", "--check")):
        run(copy, "ruff", *command, "spark_dist")
