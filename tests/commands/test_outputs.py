"""What evaluate and picture write, and what they leave."""

import shutil

import pytest
from conftest import model_card
from nifti_cases import all_files

from spark_dist.cli import main
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "best.safetensors", build_network("enet", width=0.25), model_card(width=0.25))
    return "best.safetensors"


@pytest.mark.parametrize(
    ("command", "name"), [("evaluate", "zarr.json"), ("picture", "zarr.png"), ("picture", "a.pdf")]
)
def test_a_file_of_somebodys_is_not_written_over_and_one_of_ours_is(
    tiny_store, tmp_path, checkpoint, capsys, command, name
):
    line = [command, checkpoint, "--dataset", str(tiny_store), "--out", name]
    assert main(line) == 0
    ours = (tmp_path / name).read_bytes()
    assert main(line) == 0
    shutil.copy(tiny_store / "zarr.json", tmp_path / name)
    before = all_files(tmp_path)
    capsys.readouterr()
    assert main(line) == 2
    error = f"error: {name}: exists and was not made by spark-dist; move it away, or name another --out"
    assert capsys.readouterr().err.strip() == error
    assert all_files(tmp_path) == before
    assert before[name] != ours
