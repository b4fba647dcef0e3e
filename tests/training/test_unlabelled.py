"""A student learns from slices without ground truth, by the teacher's prediction."""

import copy
import json
import shutil
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import zarr
from conftest import model_card, undecided
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_tools.cli import main as spark_data
from data_tools.errors import UserError
from data_tools.store import open_store, write_case, write_split
from spark_dist.cli import main
from spark_dist.config import DistillOptions
from spark_dist.data.batches import Batch, SliceDataset
from spark_dist.data.cache import CacheLayout, TeacherCache
from spark_dist.data.number_formats import PREDICTION
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.slices import SliceTable
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.distillers import DISTILLERS, build_distiller
from spark_dist.losses import margin
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.training.checkpoint import load_state, newest_state
from spark_dist.training.checks import check_shares
from spark_dist.training.distillation import Distillation
from spark_dist.training.job import training_table, transfer_table

JOB = ["--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--batch-size", "8", "--slices", "all"]
JOB += ["--augment", "full", "--views", "2", "--student-width", "0.25", "--teacher-width", "0.05", "--lr", "1e-4"]
SIX_STEPS = ["--steps", "6", "--val-every", "9"]
CACHED = ["--cache", "on", "--cache-dtype", "float32", "--cache-folder", "cache"]


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
def distil(jobs, tiny_store, tmp_path_factory):
    """A function that distils on a split whose labels are hidden of two cases, and returns the job's output; a job of
    the same name goes on."""
    folder = tmp_path_factory.mktemp("unlabelled")
    assert spark_data(["split", str(tiny_store), "--name", "few", "--hide-labels", "2"]) == 0
    torch.manual_seed(1)
    spec = SliceSpec("organ", Crop((32, 32)))
    card = model_card(network="unet", width=0.05, spec=spec, trained_on=())
    save_network(folder / "teacher.safetensors", undecided(build_network("unet", width=0.05)), card)
    common = [*JOB, "--split", "few", "--teacher-checkpoint", "../teacher.safetensors", "--unlabelled-share", "0.5"]
    common += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--log-every", "1", "--checkpoint-steps", "1"]

    def run(name, method, *options, store=tiny_store, command="distill", code=0, **fault):
        options = ["--dataset", store, "--method", method, "--out", "job", *options]
        codes, log = jobs(command, *common, *options, folder=folder / name, **fault)
        assert set(codes) == {code}, log
        return folder / name / "job" / "student"

    yield run
    shutil.rmtree(tiny_store / "splits" / "few")  # all tests share the store


def last_state(stage):
    return load_state(newest_state(stage / "checkpoints"))


def assert_close(stage, other, **tolerance):
    weights = last_state(stage)["model"]
    for name, x in last_state(other)["model"].items():
        torch.testing.assert_close(weights[name], x, **tolerance)


@pytest.fixture(scope="module", params=["soft", "spark"])
def live(request, distil):
    """A method, and a student that learned by it from a teacher at every step."""
    return request.param, distil(f"live-{request.param}", request.param, *SIX_STEPS, "--cache", "off")


@pytest.mark.slow
def test_cached_equals_live_and_killed_equals_undisturbed(live, distil):
    method, student = live
    cached = distil(f"cached-{method}", method, *SIX_STEPS, *CACHED)
    assert_close(cached, student, rtol=1e-4, atol=1e-5)
    killed = (f"killed-{method}", method, *SIX_STEPS, *CACHED)
    distil(*killed, place="step", n=5, signal=signal.SIGKILL, code=-signal.SIGKILL)
    resumed = distil(*killed)
    assert_close(resumed, cached, rtol=0, atol=0)
    best = [load_file(folder / "best.safetensors") for folder in (cached, resumed)]
    assert all(torch.equal(x, best[1][name]) for name, x in best[0].items())
    cases = [json.loads((folder / "test_cases.json").read_text())["cases"] for folder in (cached, resumed)]
    assert cases[0] == cases[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft", "spark"])
def test_two_processes_train_as_one_does(method, distil):
    options = (method, *SIX_STEPS, "--cache", "off", "--student", "without-norm")
    one, two = (distil(f"of-{n}-{method}", *options, command="distill_without_norm.py", processes=n) for n in (1, 2))
    assert_close(two, one, rtol=1e-5, atol=1e-6)


def with_poison(store, hidden, path):
    """A copy of a store, in which the labels of some cases are what no label is."""
    shutil.copytree(store, path)
    for name in hidden:
        label = zarr.open_group(path / "cases" / name)["label"]
        label[:] = np.full(label.shape, 255, np.uint8)
    return path


@pytest.mark.parametrize("augment", ["none", "flips", "full"])
def test_nothing_of_a_hidden_label_is_in_a_batch(tiny_store, tmp_path, augment):
    """Of the student's, cached or live; the teacher's own training does not see the case at all."""
    found = []
    for path in (tiny_store, with_poison(tiny_store, ["case_00003", "case_00004"], tmp_path / "poisoned.zarr")):
        store = open_store(path)
        train = store.splits["default"] | {"train": ["case_00000", "case_00001", "case_00002"]}
        store.splits["hidden"] = train | {"unlabelled": ["case_00003", "case_00004"]}
        chosen = {"dataset": path, "task": "organ", "split": "hidden", "crop": (32, 32), "augment": augment}
        options = DistillOptions(**chosen, slices="all", unlabelled_share=0.5)
        table = training_table(store, options)
        assert set(table.cases) == set(train["train"])
        dataset = SliceDataset(transfer_table(table, options), options.slice_spec, views=options.slice_views)
        raw = dataset.__getitems__(np.arange(len(dataset.table)) * options.slice_views.count)
        found.append((raw.image, raw.label, raw.window))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_no_hidden_label_reaches_training(live, distil, tiny_store, tmp_path):
    """Labels of the hidden cases are overwritten with what would be noticed, and nothing changes."""
    method, student = live
    hidden = open_store(tiny_store).splits["few"]["unlabelled"]
    assert len(hidden) == 2
    poisoned = with_poison(tiny_store, hidden, tmp_path / tiny_store.name)
    other = distil(f"poisoned-{method}", method, *SIX_STEPS, "--cache", "off", store=poisoned)
    assert_close(other, student, rtol=0, atol=0)


@pytest.mark.parametrize("method", sorted(DISTILLERS))
def test_every_method_takes_a_step_with_slices_without_ground_truth(method):
    """Every parameter gets a gradient from a batch of either kind, and what lies in the masks of the slices without
    ground truth makes no difference."""
    torch.manual_seed(0)
    student, teacher = (build_network("unet", width=0.05) for _ in range(2))
    image, known = torch.randn(4, 1, 32, 32), torch.tensor([True, True, False, False])
    target = (image[:, 0] > 0.5).float()
    found = []
    for seen in (target, torch.where(known.view(-1, 1, 1), target, 1 - target)):
        torch.manual_seed(1)
        distiller = build_distiller(method, student=student.taps, teacher=teacher.taps, samples=4)
        targets = TeacherTargets(teacher, distiller, None, nullcontext, predicts=True)
        model = Distillation(copy.deepcopy(student), distiller)
        mask = torch.stack([1 - seen, seen], dim=1)
        batch = Batch(image, mask, torch.arange(4), known, np.arange(4), None)
        terms = model(image, *targets(batch), batch.index, known)
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_slices_with_labels_come_from_the_cache_beside_others_that_are_new(tmp_path):
    """Of a batch with both kinds, each kind is read if it is there, whatever the other; to the bit as computed anew."""
    torch.manual_seed(0)
    teacher = undecided(build_network("unet", width=0.05))
    distiller = build_distiller("soft", student=teacher.taps, teacher=teacher.taps, samples=6)
    layout = CacheLayout(6, {"margin": [1, 32, 32], PREDICTION: [32, 32]}, "float32", views=1)
    image, label = torch.randn(6, 1, 32, 32), torch.rand(6, 1, 32, 32).round()
    mask, known = torch.cat([1 - label, label], dim=1), torch.tensor([True, False, True, True, False, False])

    def targets():
        return TeacherTargets(teacher, distiller, TeacherCache(tmp_path, layout), nullcontext, predicts=True)

    def batch(rows):
        return Batch(image[rows], mask[rows], torch.tensor(rows), known[rows], np.array(rows), None)

    first, later = targets(), targets()
    first(batch([0, 1, 2]))
    first.flush()
    (_, found), (_, computed) = later(batch([2, 4, 0, 5])), targets()(batch([2, 4, 0, 5]))
    assert (later.hits, later.forwards) == (2, 2)
    assert torch.equal(found["margin"], computed["margin"])
    torch.testing.assert_close(found["margin"], margin(teacher.eval()(image[[2, 4, 0, 5]]).logits))


@pytest.mark.parametrize(
    ("share", "batch_size", "processes", "message"),
    [
        (0.9, 8, 2, "leave some of 2 processes without a slice of each kind (--unlabelled-share 0.9)"),
        (0.05, 16, 2, "leave some of 2 processes without a slice of each kind (--unlabelled-share 0.05)"),
        (0.99, 8, 1, "batches of 8 would have 0 slices with ground truth and 8 slices without ground truth"),
    ],
)
def test_a_share_that_leaves_out_one_kind_is_an_error(tiny_store, share, batch_size, processes, message):
    options = DistillOptions(dataset=tiny_store, task="organ", batch_size=batch_size, unlabelled_share=share)
    table = SliceTable(None, ("case",), np.zeros(40, np.int32), np.arange(40, dtype=np.int32), unlabelled=20)
    with pytest.raises(UserError) as error:
        check_shares(options, table, processes)
    assert message in str(error.value)


def without_label(store, name, path):
    """A copy of a store, in which a case has no label."""
    shutil.copytree(store, path)
    case = open_store(path).cases[name]
    attributes = {"affine": case.affine.tolist(), "spacing": case.spacing, "window": case.window, "source": {}}
    image = zarr.open_group(path / "cases" / name, mode="r")["image"][:]
    write_case(path, name, image, None, attributes)
    return path


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_case_without_label_is_in_no_part_but_unlabelled(tiny_store, tmp_path, capsys, part):
    name = open_store(tiny_store).splits["default"][part][0]
    bare = without_label(tiny_store, name, tmp_path / "bare.zarr")
    options = [*JOB, "--dataset", str(bare), "--out", str(tmp_path / "job")]
    assert main(["distill", *options]) == 2
    error = capsys.readouterr().err
    assert f"case '{name}' of the {part} part of split 'default' has lost its label" in error
    assert error.count("\n") == 1
    record = open_store(bare).splits["default"]
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({p: record[p] for p in ("train", "val", "test")}))
    assert spark_data(["split", str(bare), "--lists", str(lists), "--name", "again"]) == 2
    assert f"case '{name}' has no labels" in capsys.readouterr().err
    lists.write_text(json.dumps({p: [n for n in record[p] if n != name] for p in ("train", "val", "test")}))
    assert spark_data(["split", str(bare), "--lists", str(lists), "--name", "again"]) == 0
    assert open_store(bare).splits["again"]["unlabelled"] == [name]


def test_a_split_without_unlabelled_cases_is_an_error(tiny_store, tmp_path, capsys):
    options = [*JOB, "--dataset", str(tiny_store), "--out", str(tmp_path / "job"), "--unlabelled-share", "0.5"]
    assert main(["distill", *options]) == 2
    assert "has no unlabelled case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (main, ("evaluate", "best.safetensors", "--part", "unlabelled"), "--part can't be unlabelled"),
        (
            main,
            ("distill", "--task", "organ", "--unlabelled-share", "0.5", "--together", "live"),
            "leave out --together",
        ),
        (main, ("explain", "best.safetensors", "--slices", "case_00000:0"), "no case of this part 'case_00000'"),
        (main, ("explain", "best.safetensors", "--part", "train", "--slices", "case_00000:0"), "'case_00000'"),
        (spark_data, ("export", "bare.zarr", "case_00000", "out.nii", "--label"), "case case_00000 has no label"),
    ],
)
def test_what_needs_ground_truth_names_what_has_none(
    tiny_store, tmp_path, monkeypatch, capsys, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    store = open_store(without_label(tiny_store, "case_00000", tmp_path / "bare.zarr"))
    record = store.splits["default"]
    write_split(store.path, "bare", record | {"train": record["train"][1:], "unlabelled": ["case_00000"]})
    save_network(tmp_path / "best.safetensors", build_network("enet", width=0.25), model_card())
    data = ("--dataset", "bare.zarr", "--split", "bare") if command is main else ()
    assert command([*arguments, *data]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.zarr", "best.safetensors"]
