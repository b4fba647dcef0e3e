"""The files under launch/: accelerate's configurations, DeepSpeed among them."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, free_port, keep_signals

from spark_dist.cli import main
from spark_dist.training.checkpoint import load_state, newest_state, states
from spark_dist.training.journal import read_journal

CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 6, "--log-every", 1)
SMALL += ("--slices", "labelled")
SMALL += ("--network", "enet", "--width", 0.25, "--epochs", 3, "--checkpoint-steps", 5, "--keep-checkpoints", 9)


@pytest.mark.parametrize("path", [*CONFIGS, ROOT / "accelerate_config.yaml"], ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # raises for unknown keys
    keys = yaml.safe_load(path.read_text())
    assert config.num_processes == keys["num_processes"]
    assert str(config.distributed_type.value) == keys["distributed_type"]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_takes_the_configuration(stage, monkeypatch):
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig

    from spark_dist.training.distributed import deepspeed_settings

    keys = yaml.safe_load((ROOT / "launch" / "accelerate" / f"deepspeed_zero{stage}.yaml").read_text())
    settings = keys["deepspeed_config"]
    plugin = DeepSpeedPlugin(
        zero_stage=settings["zero_stage"],
        offload_optimizer_device=settings["offload_optimizer_device"],
        offload_param_device=settings["offload_param_device"],
        zero3_init_flag=settings["zero3_init_flag"],
    )
    written = plugin.deepspeed_config | deepspeed_settings(accumulate=4, clip=0.0) | {"train_batch_size": 4}
    config = DeepSpeedConfig(written)
    assert config.zero_optimization_stage == stage
    assert config.gradient_clipping == 0
    assert config.gradient_accumulation_steps == 4


def launch_with(config, folder, out, *arguments):
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port"]
    line += [free_port(), "-m", "spark_dist.train", *arguments, *SMALL, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        list(map(str, line)), cwd=folder, env=environment, capture_output=True, text=True, timeout=800
    )
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    return result


def losses(folder):
    return {
        e["step"]: e["metrics"]["train/loss"] for _, e in read_journal(folder) if "train/loss" in e.get("metrics", {})
    }


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed builds its operators with g++")
def test_zero_2_trains_as_ddp_does_and_resumes(jobs, tiny_store, tmp_path):
    pytest.importorskip("deepspeed")
    config = yaml.safe_load((ROOT / "launch" / "accelerate" / "deepspeed_zero2.yaml").read_text())
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2}))
    data = ("--dataset", tiny_store, "--clip", 0.5)
    assert jobs("train", *data, *SMALL, "--out", "ddp", folder=tmp_path, processes=2)[0] == [0, 0]
    launch_with("zero.yaml", tmp_path, "zero", *data)
    ddp, zero = losses(tmp_path / "ddp" / "network"), losses(tmp_path / "zero" / "network")
    assert list(zero) == list(range(1, 13))
    for step, loss in ddp.items():
        assert zero[step] == pytest.approx(loss, rel=1e-4), step

    shutil.copytree(tmp_path / "zero", tmp_path / "again")
    folder = tmp_path / "again" / "network"
    for path in (*states(folder / "checkpoints")[1:], folder / "test_cases.json"):
        path.unlink()
    launch_with("zero.yaml", tmp_path, "again", *data)
    whole, again = (load_state(newest_state(tmp_path / out / "network" / "checkpoints")) for out in ("zero", "again"))
    assert all(torch.equal(whole["model"][key], again["model"][key]) for key in whole["model"])

    code = "import sys; sys.modules['deepspeed'] = None; from spark_dist.networks.checkpoint import load_network; "
    code += f"print(load_network({str(tmp_path / 'zero' / 'network' / 'best.safetensors')!r})[1])"
    assert "enet" in subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "use --accumulate 3"),
    ],
)
def test_what_a_configuration_asks_for_in_vain_is_said(monkeypatch, variable, value, message):
    from data_tools.errors import UserError
    from spark_dist.training.distributed import make_accelerator

    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        make_accelerator()


@pytest.mark.parametrize(("gpus", "message"), [(1, "with 1 GPU, .* --num-processes 1,"), (2, "with 2 GPUs")])
def test_each_process_needs_a_gpu_of_its_own(monkeypatch, capfd, tiny_store, tmp_path, gpus, message):
    """The GPUs are simulated: they are only counted, before anything touches them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    data = ("--dataset", str(tiny_store), "--task", "organ", "--crop", "32", "--crop-shift", "[0,0]")
    with keep_signals():
        assert main(["train", *data, "--network", "enet", "--out", "job"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(f"^error: 4 processes on a machine {message}", line)
    assert not (tmp_path / "job").exists()
