"""Interrupted equals uninterrupted, to the bit, wherever and however often the interruption came."""

import json
import random
import signal
import time

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import model_card
from safetensors.torch import load_file

from data_tools.errors import UserError
from spark_dist.data.order import EpochSampler, Order
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.training.checkpoint import load_state, newest_state, resume, save_state
from spark_dist.training.journal import read_journal

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 6, "--log-every", 2)
SMALL += ("--slices", "labelled")
SMALL += ("--teacher", "unet", "--teacher-width", 0.05, "--student-width", 0.25, "--method", "crd", "--epochs", 5)
SMALL += ("--checkpoint-steps", 2, "--cache", "on", "--cache-folder", "cache", "--experiment", "resume")
REQUEUE = 75


def trace(folder):
    """All that a job leaves behind, but for what it says of the machine."""
    found = {}
    for stage in ("teacher", "student"):
        part = folder / "job" / stage
        state = load_state(newest_state(part / "checkpoints"))
        found |= {f"{stage} best {k}": v for k, v in load_file(part / "best.safetensors").items()}
        found |= {f"{stage} {k}": v for k, v in state["model"].items()}
        found |= {
            f"{stage} Adam {n} {k}": v for n, values in state["optimizer"]["state"].items() for k, v in values.items()
        }
        found |= {f"{stage} average {k}": v for k, v in state.get("average", {}).items()}
        found[f"{stage} best"] = state["best"]
        found[f"{stage} cases"] = json.loads((part / "test_cases.json").read_text())["cases"]
        logged = [(k, e["step"], v) for _, e in read_journal(part) for k, v in e.get("metrics", {}).items()]
        logged = [(k, step, v) for k, step, v in logged if not k.startswith(("system/", "cache/", "speed/"))]
        assert len({(k, step) for k, step, _ in logged}) == len(logged)
        found[f"{stage} logged"] = sorted(logged)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def interrupt(jobs, arguments, folder, processes, faults):
    """Run a job again and again with the faults in turn, and at last without one."""
    struck = 0
    for fault in faults:
        codes, log = jobs("distill", *arguments, folder=folder, processes=processes, **fault)
        if fault["signal"] == signal.SIGKILL:
            assert codes[fault["rank"]] in (-signal.SIGKILL, 0), log
            struck += codes[fault["rank"]] != 0
        else:
            assert set(codes) <= {REQUEUE, 0}, log
            struck += codes[0] != 0
    codes, log = jobs("distill", *arguments, folder=folder, processes=processes)
    assert not any(codes), log
    return struck


def draw(generator, count, processes):
    """Faults of all kinds at all places, three or more, most of them at steps."""
    places = ["step"] * (count - 3) + ["checkpoint", "evaluation", "cache"]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1] * count
    generator.shuffle(places)
    return [
        {
            "place": place,
            "signal": int(number),
            "n": generator.randint(1, 5) if place == "step" else 1,
            # Only the first process writes checkpoints.
            "rank": generator.randrange(processes) if place == "step" else 0,
        }
        for place, number in zip(places, signals, strict=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "workers", "accumulate", "faults", "options"),
    [
        (1, 0, 1, 5, ""),
        (2, 0, 2, 5, ""),
        pytest.param(1, 0, 1, 12, "", marks=pytest.mark.thorough),
        pytest.param(2, 0, 2, 12, "", marks=pytest.mark.thorough),
        (1, 2, 2, 3, ""),
        (2, 2, 1, 3, ""),
        (1, 0, 1, 5, "--slices mixed --target-share 0.3"),
        (1, 1, 1, 4, "--slices all --augment full --crop-at anywhere --views 3"),
        (1, 0, 1, 5, "--slices all --task organ,tumour --context 1"),
    ],
)
def test_interrupted_equals_uninterrupted(jobs, tiny_store, tmp_path, processes, workers, accumulate, faults, options):
    arguments = ("--dataset", tiny_store, *SMALL, "--workers", workers, "--accumulate", accumulate, "--out", "job")
    arguments += tuple(options.split())
    if accumulate > 1:
        arguments += ("--ema", 0.9, "--clip", 0.5, "--distill-schedule", "cosine", "--distill-warmup", 0.25)
    codes, log = jobs("distill", *arguments, folder=tmp_path / "whole", processes=processes)
    assert not any(codes), log
    generator = random.Random(processes * 100 + workers * 10 + accumulate)
    drawn = draw(generator, faults, processes)
    struck = interrupt(jobs, arguments, tmp_path / "parts", processes, drawn)
    assert struck == faults
    assert_same(trace(tmp_path / "whole"), trace(tmp_path / "parts"))
    assert not list((tmp_path / "parts" / "job").rglob(".step-*.tmp"))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--out", "job")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert jobs("distill", *arguments, folder=whole)[0] == [0]
    assert jobs("distill", *arguments, folder=parts, place="step", n=8, signal=signal.SIGKILL)[0] == [-signal.SIGKILL]
    states = sorted((parts / "job" / "teacher" / "checkpoints").glob("step-*.pt"))
    assert len(states) == 2
    data = bytearray(states[1].read_bytes())
    data[len(data) // 2] ^= 1  # one bit in a tensor
    states[1].write_bytes(data)
    codes, log = jobs("distill", *arguments, folder=parts)
    assert codes == [0]
    assert f"{states[1].name}: the saved state is damaged" in log
    assert_same(trace(whole), trace(parts))


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-{step:09}.pt").write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(UserError, match="every saved state is damaged"):
            newest_state(tmp_path)


def test_of_saved_states_the_latest_stay_and_whatever_somebody_keeps_beside_them(tmp_path):
    kept = {"step-000000001-good.pt", "step-best.pt", ".step-notes.tmp"}
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    for step in range(4):
        save_state(tmp_path, step, {"step": step}, keep=2)
    assert newest_state(tmp_path).name == "step-000000003.pt"
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000002.pt", "step-000000003.pt", *kept}


@pytest.mark.slow
def test_workers_end_with_a_killed_job(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--workers", 1, "--out", "job")
    codes, log = jobs("distill", *arguments, folder=tmp_path, place="step", n=2, signal=signal.SIGKILL)
    assert codes == [-signal.SIGKILL], log

    def left():
        here = [p for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] == str(tmp_path)]
        return [p for p in here if "forkserver" in " ".join(p.info["cmdline"] or ())]

    end = time.monotonic() + 60
    while left():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_goes_on_with_another_number_of_processes(jobs, tiny_store, tmp_path):
    arguments = ("--dataset", tiny_store, *SMALL, "--method", "kd", "--out", "job")
    codes, _ = jobs("distill", *arguments, folder=tmp_path, processes=2, place="step", n=6, signal=signal.SIGTERM)
    assert codes == [REQUEUE] * 2
    codes, log = jobs("distill", *arguments, folder=tmp_path)
    assert codes == [0]
    assert "1 processes instead of 2" in log


@pytest.mark.parametrize(("before", "now"), [("no", "fp16"), ("fp16", "no"), ("fp16", "fp16")])
def test_a_job_may_go_on_in_another_precision(tmp_path, capsys, before, now):
    network, scaler = torch.nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=8)
    place = {"epoch": 1, "step": 0, "best": 0.5, "losses": []}
    held = {"model": network.state_dict(), "optimizer": {}, "processes": 1, "precision": before} | place
    held |= {"scaler": torch.amp.GradScaler("cpu", init_scale=4).state_dict()} if before == "fp16" else {}
    save_state(tmp_path / "checkpoints", 1, held, keep=1)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.state._mixed_precision = scaler if now == "fp16" else None, now
    saved = {"model": torch.nn.Linear(2, 2), "scaler": accelerator.scaler}
    try:
        found = resume(accelerator, tmp_path, saved)
        assert {key: found[key] for key in place} == place
    finally:
        accelerator.state._mixed_precision = "no"
    assert torch.equal(saved["model"].weight, network.weight)
    assert scaler.get_scale() == (4 if before == now else 8)
    assert (f"precision {now} instead of {before}" in capsys.readouterr().out) == (before != now)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_number_of_processes_sees_the_rest_of_the_epoch(accumulate):
    """Nothing is repeated or dropped, and the batches are the same."""

    def batches(world, start):
        ranks = [EpochSampler(Order(53, 9, 3, 8), rank, world, accumulate) for rank in range(world)]
        for sampler in ranks:
            sampler.epoch, sampler.start = 2, start
        shares = zip(*(list(sampler) for sampler in ranks), strict=True)
        return [[key for share in part for key in share] for part in shares]

    first, rest = batches(2, 0)[: 2 * accumulate], batches(3, 2)
    assert first + rest == batches(1, 0)
    assert len({key // 8 for part in first + rest for key in part}) == 53


def test_weights_of_parts_make_the_mean_of_the_batch():
    samplers = [EpochSampler(Order(53, 9, 3, 8), rank, 2, 3) for rank in range(2)]
    value = {key: float(key) for sampler in samplers for share in sampler for key in share}
    shares = list(zip(*(list(sampler) for sampler in samplers), strict=True))
    for step in range(samplers[0].steps):
        parts = range(3 * step, 3 * step + 3)
        keys = [key for part in parts for share in shares[part] for key in share]
        mean = sum(
            sampler.weight(part) * sum(value[k] for k in share) / len(share) / 2 / 3
            for part in parts
            for sampler, share in zip(samplers, shares[part], strict=True)
        )
        assert mean == pytest.approx(sum(value[k] for k in keys) / len(keys))


def test_a_saved_network_is_as_readable_as_other_files(tmp_path):
    save_network(tmp_path / "a.safetensors", build_network("enet", width=0.25), model_card())
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
