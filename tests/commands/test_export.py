"""Networks as ONNX files."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import model_card, undecided
from test_predict import AFFINE, PREPARED, volume

from data_tools.store import open_store, write_split
from spark_dist import load_student
from spark_dist.cli import main
from spark_dist.evaluation.metrics import read_cases
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network


def test_an_exported_network_predicts_as_the_checkpoint(tmp_path, tiny_store, capsys):
    torch.manual_seed(0)
    path, out = tmp_path / "best.safetensors", tmp_path / "best.onnx"
    save_network(path, build_network("resnet18", width=0.25), model_card(network="resnet18", **PREPARED))
    line = [str(word) for word in ("export", path, out, "--dataset", tiny_store)]
    assert main(line) == 0
    assert "any size in multiples of 32; logits differ by" in capsys.readouterr().out
    one, other = load_student(path), load_student(out)
    assert other.card == one.card
    # A plane of another size than that of the example.
    assert np.array_equal(one.predict(volume(), AFFINE), other.predict(volume(), AFFINE))
    assert main(line) == 2
    assert "exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("text.onnx", "not a whole ONNX file"), ("no.onnx", "no such file")])
def test_a_damaged_file_is_one_line(tmp_path, name, message, capsys):
    (tmp_path / "text.onnx").write_text("text")
    (tmp_path / "a.nii").touch()
    assert main(["predict", str(tmp_path / name), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert len(lines := capsys.readouterr().err.splitlines()) == 1
    assert message in lines[0]


@pytest.fixture(scope="module")
def int8(tmp_path_factory, tiny_store):
    """A folder with a checkpoint and its int8 network, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    network = undecided(build_network("unet", width=0.1))
    save_network(folder / "best.safetensors", network, model_card(network="unet", width=0.1, **PREPARED))
    line = ["export", folder / "best.safetensors", folder / "best.onnx", "--dataset", tiny_store]
    return folder, [str(word) for word in [*line, "--int8", "--calibration-slices", 16]]


@pytest.mark.slow
def test_int8_says_what_it_costs_and_predicts_like_the_checkpoint(int8, tiny_store, capsys):
    folder, line = int8
    assert main(line) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"on 16 training slices: val Dice (\S+), in float (\S+) \((\S+) points\); (\S+) MB, in float (\S+)", said
    )
    dice, floating, points, size, whole = map(float, found.groups())
    assert points == pytest.approx(100 * (dice - floating), abs=0.011)
    assert size == pytest.approx((folder / "best.onnx").stat().st_size / 1e6, abs=0.005)
    assert size < 0.5 * whole
    measured = {}
    for name in ("best.onnx", "best.safetensors"):
        line = ["evaluate", folder / name, "--dataset", tiny_store, "--part", "val", "--out", folder / f"{name}.json"]
        assert main([*map(str, line)]) == 0
        measured[name] = np.mean([case["dice"] for case in read_cases(folder / f"{name}.json").values()])
    assert measured == pytest.approx({"best.onnx": dice, "best.safetensors": floating}, abs=1e-4)
    one, other = load_student(folder / "best.safetensors"), load_student(folder / "best.onnx")
    assert other.card == one.card
    labels = [student.predict(volume(), AFFINE) for student in (one, other)]
    assert 0.8 < (labels[0] == labels[1]).mean() < 1


@pytest.mark.slow
def test_profile_measures_files_beside_networks(int8, capsys):
    folder, line = int8
    if not (folder / "best.onnx").exists():
        assert main(line) == 0
    files = [str(folder / name) for name in ("best.safetensors", "best.onnx")]
    assert main(["profile", "enet", *files, "--crop", "32", "--repeats", "2", "--json", str(folder / "t.json")]) == 0
    rows = json.loads((folder / "t.json").read_text())
    assert [row["network"] for row in rows] == ["enet", *files]
    assert (
        rows[1]["parameters"]
        == rows[2]["parameters"]
        == sum(p.numel() for p in build_network("unet", width=0.1).parameters())
    )
    assert rows[1]["gflops"] == rows[2]["gflops"] > 0
    assert all(row["latency_ms"] > 0 for row in rows)
    assert rows[2]["activations_mib"] is None
    assert "to the first" in capsys.readouterr().out
    assert main(["profile", files[1], "--crop", "40"]) == 2
    assert capsys.readouterr().err == f"error: --crop 40 must be a multiple of 16 for {files[1]}\n"


def test_int8_without_training_slices_is_one_line(int8, tiny_store, tmp_path, capsys):
    store = shutil.copytree(tiny_store, tmp_path / "tiny.zarr")
    write_split(store, "none", open_store(store).splits["default"] | {"train": []})
    line = [*int8[1], "--split", "none", "--dataset", str(store)]
    assert main([*line[:2], str(tmp_path / "a.onnx"), *line[3:]]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {store}: the train part of split 'none' has no case; name another"
    )
    assert not (tmp_path / "a.onnx").exists()


def test_without_onnxruntime_it_names_what_to_install(int8, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = int8[1]
    assert main([*line[:2], str(tmp_path / "a.onnx"), *line[3:]]) == 2
    assert len(lines := capsys.readouterr().err.splitlines()) == 1
    assert "pip install -e '.[export]'" in lines[0]
    assert not (tmp_path / "a.onnx").exists()
