"""A student learns from slices without ground truth, by the teacher's prediction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cli import main as spark_data
from data_tools.errors import UserError
from spark_dist.cli import main
from spark_dist.data.order import EpochSampler, Order

JOB = ["--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--batch-size", "8", "--slices", "all"]
JOB += ["--augment", "full", "--views", "2", "--student-width", "0.25", "--teacher-width", "0.05", "--lr", "1e-4"]


@given(
    known=st.integers(3, 90),
    unlabelled=st.integers(3, 90),
    batch_size=st.integers(6, 20),
    share=st.sampled_from([0.25, 0.5, 0.75]),
    views=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_both_kinds_and_an_epoch_goes_through_one_of_them(known, unlabelled, batch_size, share, views):
    order = Order(known, batch_size, 5, views, unlabelled, share)
    try:
        EpochSampler(order, 0, 2)
    except UserError:
        assert min(round(batch_size * share), batch_size - round(batch_size * share)) <= 3 or min(known, unlabelled) < 6
        return
    for epoch in range(3):
        whole = EpochSampler(order)
        whole.epoch = epoch
        batches, ranks = list(whole), []
        for rank in range(2):
            sampler = EpochSampler(order, rank, 2)
            sampler.epoch = epoch
            ranks.append(sampler)
        shares = [list(sampler) for sampler in ranks]
        rows = [key // views for batch in batches for key in batch]
        kinds = [row for row in rows if row < known], [row for row in rows if row >= known]
        ranges = range(known), range(known, known + unlabelled)
        assert any(sorted(kind) == list(every) for kind, every in zip(kinds, ranges, strict=True))
        for step, batch in enumerate(batches):
            assert len(batch) <= batch_size
            assert sorted(batch) == sorted(shares[0][step] + shares[1][step])
            for part in (batch, shares[0][step], shares[1][step]):
                of_a_kind = sum(key // views >= known for key in part)
                assert 0 < of_a_kind < len(part)
            weights = [s.weight(step) * len(part[step]) for s, part in zip(ranks, shares, strict=True)]
            assert sum(s.weight(step) for s in ranks) == pytest.approx(2)
            assert weights[0] / len(shares[0][step]) == pytest.approx(2 * len(shares[0][step]) / len(batch))


def test_each_pass_shows_the_next_view_of_every_slice():
    order = Order(6, 4, 0, 3, 30, 0.5)
    seen = [[], []]
    for epoch in range(3):
        for batch in order.epoch(epoch):
            for kind, keys in zip(seen, batch, strict=True):
                kind += keys.tolist()
    for keys, n in zip(seen, (6, 30), strict=True):
        for start in range(0, len(keys) - n + 1, n):
            assert len({key // 3 for key in keys[start : start + n]}) == n
    assert len(set(seen[1])) == 90


@pytest.fixture(scope="module")
def job(tiny_store, tmp_path_factory):
    """A store whose split `few` hides labels, and a teacher that was trained on the others; runs distil jobs there."""
    folder = tmp_path_factory.mktemp("unlabelled")
    assert spark_data(["split", str(tiny_store), "--name", "few", "--hide-labels", "2"]) == 0
    common = [*JOB, "--split", "few", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    common += ["--cache-folder", str(folder / "cache")]
    first = [*common, "--dataset", str(tiny_store), "--method", "kd", "--steps", "2", "--out", str(folder / "first")]
    assert main(["distill", *first]) == 0
    teacher = ["--teacher-checkpoint", str(folder / "first/teacher/best.safetensors")]

    def run(name, *options, store=tiny_store):
        out = ["--dataset", str(store), "--out", str(folder / name)]
        assert main(["distill", *common, *teacher, *out, "--unlabelled-share", "0.5", *options]) == 0
        state = sorted((folder / name / "student/checkpoints").glob("step-*.pt"))[-1]
        model = torch.load(state, weights_only=True)["model"]
        return {key: x for key, x in model.items() if x.is_floating_point()}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft", "spark"])
def test_cached_equals_live(job, method):
    options = ("--method", method, "--steps", "6", "--cache-dtype", "float32")
    live = job(f"live-{method}", *options, "--cache", "off")
    cached = job(f"cached-{method}", *options, "--cache", "on")
    for name, x in live.items():
        torch.testing.assert_close(cached[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_no_hidden_label_reaches_training(job, tiny_store, tmp_path):
    """Labels of the hidden cases are overwritten with what would be noticed, and nothing changes."""
    import shutil

    import zarr

    from data_tools.store import open_store

    poisoned = tmp_path / tiny_store.name
    shutil.copytree(tiny_store, poisoned)
    hidden = open_store(poisoned).splits["few"]["unlabelled"]
    assert len(hidden) == 2
    for name in hidden:
        label = zarr.open_group(poisoned / "cases" / name)["label"]
        label[:] = np.full(label.shape, 255, np.uint8)
    options = ("--method", "soft", "--steps", "6", "--cache", "off")
    clean, other = job("clean", *options), job("poisoned", *options, store=poisoned)
    assert all(torch.equal(clean[name], other[name]) for name in clean)


def test_a_split_without_unlabelled_cases_is_an_error(tiny_store, tmp_path, capsys):
    options = [*JOB, "--dataset", str(tiny_store), "--out", str(tmp_path / "job"), "--unlabelled-share", "0.5"]
    assert main(["distill", *options]) == 2
    assert "has no unlabelled case" in capsys.readouterr().err


def test_the_two_networks_at_once_need_ground_truth(tiny_store, tmp_path, capsys):
    options = [*JOB, "--dataset", str(tiny_store), "--out", str(tmp_path / "job"), "--unlabelled-share", "0.5"]
    assert main(["distill", *options, "--together", "live"]) == 2
    assert "leave out --together live" in capsys.readouterr().err
