"""CONTRIBUTING.md is followed to the letter in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import nibabel
import numpy as np
import pytest
from conftest import ROOT

from data_tools.labels import make_task
from data_tools.store import open_store

BLOCK = re.compile(r"^( *)```python\n *# (\S+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with all that the guide adds."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("spark_dist", "data_tools", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "accelerate_config.yaml"):
        shutil.copy(ROOT / part, folder)
    for indent, name, code in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()):
        file, code = folder / name, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        if file.exists():
            # It goes to the one line that it has in common with the file.
            there = file.read_text().splitlines(keepends=True)
            (place,) = {line for line in code.splitlines(keepends=True) if line.strip() and line in there}
            code = "".join(there).replace(place, code)
        file.write_text(code)
    return folder


def run(folder, *command, cwd=None):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *map(str, command)]
    result = subprocess.run(line, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


def test_the_guide_adds_a_file_and_a_line_for_each(copy):
    blocks = [name for _, name, _ in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())]
    added = [name for name in blocks if not (ROOT / name).exists()]
    assert added == ["spark_dist/networks/mynet.py", "spark_dist/distillers/mymethod.py", "spark_dist/mycommand.py"]
    lines = [name for name in blocks if (ROOT / name).exists()]
    assert len(set(lines)) == len(added) + 2  # and the transformation and the region
    assert all((copy / name).exists() for name in added)


def test_the_transformation_that_was_added_is_the_last_one_and_tested(copy):
    code = "from spark_dist.data.transformations import INTENSITY; print(list(INTENSITY)[-1])"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True)
    assert result.stdout == "bias field\n"
    assert "1 passed" in run(copy, "pytest", "tests/data/test_augmentation.py", "-k", "bias", "-p", "no:cacheprovider")


def test_the_command_that_was_added_runs(copy, tiny_store):
    assert "case_00008, case_00009, case_00010" in run(copy, "spark_dist.mycommand", "--dataset", tiny_store)
    code = "import sys; from spark_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "mycommand", "--dataset", str(tiny_store)]
    result = subprocess.run(line, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)
    assert "case_00008, case_00009, case_00010" in result.stdout


def test_the_region_that_is_declared_is_known_to_every_command(copy, tmp_path):
    """By the command line of the guide in a plain copy of the project, and by the line that it adds."""
    (line,) = re.findall(
        r"^(spark-data prepare .* --regions .*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    (tmp_path / "DATA").mkdir()
    description = {"training": [{"image": "./a.nii.gz", "label": "./a_seg.nii.gz"}], "modality": {"0": "CT"}}
    (tmp_path / "DATA" / "dataset.json").write_text(json.dumps(description))
    label = np.zeros((8, 9, 4), np.uint8)
    label[1:3], label[3:5], label[5:7] = 1, 2, 3
    for name, voxels in (("a", label.astype(np.int16) * 50), ("a_seg", label)):
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "DATA" / f"{name}.nii.gz")
    run(ROOT, "data_tools", *line.split()[1:], "--workers", 1, cwd=tmp_path)
    assert "regions kidneys=left_kidney+right_kidney" in run(ROOT, "data_tools", "info", "abdomen.zarr", cwd=tmp_path)
    without = line.split(" --regions")[0].replace("abdomen.zarr", "other.zarr")
    run(copy, "data_tools", *without.split()[1:], "--workers", 1, cwd=tmp_path)
    assert "regions kidneys=left_kidney+right_kidney" in run(copy, "data_tools", "info", "other.zarr", cwd=tmp_path)
    assert "regions" not in run(ROOT, "data_tools", "info", "other.zarr", cwd=tmp_path)
    task = make_task("liver,kidneys", open_store(tmp_path / "abdomen.zarr").regions, "abdomen.zarr")
    assert task.values == ((1,), (2, 3))


def lint_imports(folder):
    line = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run([*line, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("spark_dist/data/order.py", "import spark_dist.teacher.targets", "imports run downwards only"),
        ("spark_dist/compare.py", "import spark_dist.evaluate", "commands never import each other"),
        ("spark_dist/networks/enet.py", "import spark_dist.data.slices", "Networks and methods know nothing of data"),
        ("data_tools/plan.py", "import torch", "What touches NIfTI imports no torch"),
    ],
)
def test_an_import_that_a_room_may_not_have_fails_the_linter(copy, tmp_path, file, line, broken):
    for part in ("spark_dist", "data_tools", "pyproject.toml"):
        (shutil.copytree if (copy / part).is_dir() else shutil.copy)(copy / part, tmp_path / part)
    if broken.startswith("imports"):
        assert lint_imports(tmp_path).returncode == 0
    with open(tmp_path / file, "a") as source:
        source.write(f"\n{line}  # noqa\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0, result.stdout
    (contract,) = (text for text in result.stdout.splitlines() if "BROKEN" in text)
    assert broken in contract


def test_the_table_of_rooms_is_the_contract_of_the_linter():
    rooms = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = [re.sub(r"\.py|/|`", "", name) for room in rooms for name in room.split(", ")]
    (layers,) = (
        contract["layers"]
        for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    below = [part.removeprefix("spark_dist.") for layer in layers[1:] for part in layer.split(" | ")]
    assert [name.removeprefix("spark_dist") for name in listed] == ["<command>", *below, "launch"]


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
