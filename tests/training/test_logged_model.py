"""A trained network as a model of MLflow."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, model_card, undecided

from data_tools.preparation import Preparation
from spark_dist.evaluation.prediction import load_student
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.training.mlflow_client import make_client
from spark_dist.training.tracking import open_run, sync


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a job whose student is registered, and the address of its database."""
    folder = tmp_path_factory.mktemp("job") / "student"
    folder.mkdir()
    torch.manual_seed(1)
    preparation = Preparation(kind="fixed", low=-200, high=300)
    card = model_card(network="unet", width=0.05, preparation=preparation, label_values=(3,), val_dice=0.81234, epoch=4)
    save_network(folder / "best.safetensors", undecided(build_network("unet", 1, 2, 0.05)), card)
    rows, columns = np.indices((48, 48))
    inside = np.hypot(rows - 22, columns - 24) < 9
    noise = np.random.default_rng(0).normal(0, 40, (3, 48, 48))
    slices = (np.where(inside, 120, -20) + noise).round().astype(np.int16)
    np.save(folder / "example.npy", slices)
    uri = f"sqlite:///{folder}/mlflow.db"
    tracker = open_run(uri, "e", "spark enet", folder, {}, {})
    tracker.metrics({"test_dice": 0.8, "loss": 3}, 0)
    tracker.model(folder / "best.safetensors", folder / "example.npy", "organ-student")
    tracker.finish("FINISHED")
    return folder, uri


def test_it_segments_slices_as_the_checkpoint_does(logged):
    folder, uri = logged
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/organ-student/1")
    finally:
        mlflow.set_tracking_uri(before)
    slices = np.load(folder / "example.npy")
    found = model.predict(slices.astype(np.float32))
    student = load_student(folder / "best.safetensors")
    # Slices one above the other, rows to posterior (−y) and columns to left (−x in RAS+).
    volume, affine = slices.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])
    assert set(np.unique(found)) == {0, 3}
    assert (found == student.predict(volume, affine).transpose(2, 1, 0)).all()
    assert (model.predict(slices[:1].astype(np.float32)) == found[:1]).all()
    assert model.metadata.get_input_schema().inputs[0].shape == (-1, -1, -1)


def test_the_model_says_what_it_is_and_holds_nothing_pickled(logged):
    client = make_client(logged[1])
    (version,) = client.search_model_versions("name = 'organ-student'")
    (model,) = client.search_logged_models(["1"])
    assert version.source == model.artifact_location
    for text in (version.description, model.tags["mlflow.note.content"]):
        assert "unet that segments organ" in text
        assert "| val_dice | 0.8123 |" in text
        assert "| window | fixed -200 to 300 |" in text
    assert [(m.key, m.value) for m in model.metrics] == [("test_dice", 0.8)]
    files = {path.name for path in (logged[0] / "mlartifacts").rglob("*") if path.is_file()}
    assert {"best.safetensors", "served_model.py", "input_example.json", "MLmodel"} < files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]


def test_a_model_that_is_sent_twice_is_one(logged):
    folder, uri = logged
    (folder / "tracking.json").unlink()
    assert sync(folder, uri) > 2
    client = make_client(uri)
    assert len(client.search_logged_models(["1"])) == len(client.search_model_versions("name = 'organ-student'")) == 1


@pytest.mark.slow
def test_mlflow_serves_it(logged, tmp_path):
    folder, uri = logged
    port = free_port()
    line = [Path(sys.executable).with_name("mlflow"), "models", "serve", "--model-uri", "models:/organ-student/1"]
    line += ["--env-manager", "local", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            list(map(str, line)), env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1)
                break
            except OSError:
                time.sleep(0.3)
        slices = np.load(folder / "example.npy")[:1]
        question = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": slices.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(question, timeout=60) as response:
            answer = np.array(json.load(response)["predictions"])
    finally:
        os.killpg(server.pid, 9)
        server.wait(30)
    assert (answer == load_student(folder / "best.safetensors").predict_slices(slices)).all()
    assert set(np.unique(answer)) == {0, 3}
