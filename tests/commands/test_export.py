"""Networks as ONNX files."""

import numpy as np
import pytest
import torch
from conftest import model_card
from test_predict import AFFINE, PREPARED, volume

from spark_dist import load_student
from spark_dist.cli import main
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
