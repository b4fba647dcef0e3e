import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from golden import SEEDS, golden_inputs, golden_values, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_dist import losses
from spark_dist.networks.base import Tap, Taps


@pytest.mark.parametrize("seed", SEEDS)
def test_the_segmentation_loss_and_its_parts_have_the_reference_values(shared, seed):
    student, _, mask = golden_inputs(seed)
    expected = golden_values(shared, seed)["segmentation"]
    assert losses.focal(student.logits, mask).item() == pytest.approx(expected["focal(gamma=2)"], rel=1e-5)
    assert losses.soft_dice(student.logits, mask).item() == pytest.approx(expected["soft dice"], rel=1e-5)
    assert losses.segmentation(student.logits, mask).item() == pytest.approx(expected["0.5*focal+0.5*dice"], rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_has_the_reference_value(shared, seed):
    student, teacher, _ = golden_inputs(seed, same_channels=True)
    expected = golden_values(shared, seed)["SPARK_parts_same_channels"]["mask_kl_T4"]
    assert losses.kl(student.logits, teacher.logits, 4).item() == pytest.approx(expected, rel=1e-5)


def test_the_kl_is_that_of_the_teacher_from_the_student():
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 2, 2, 5, 5))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(axis=1, keepdims=True) for x in (student, teacher))
    expected = 4 * (q * np.log(q / p)).sum(axis=1).mean()
    assert losses.kl(torch.tensor(student), torch.tensor(teacher), 2).item() == pytest.approx(expected, rel=1e-5)
    assert losses.kl(torch.tensor(teacher), torch.tensor(teacher), 2).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("focus", [0.5, 1.0])
def test_a_focused_kl_is_a_weighted_mean(focus):
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 2, 3, 5, 5))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(axis=1, keepdims=True) for x in (student, teacher))
    weight = 1 - focus * np.minimum(p, q)[:, 0]
    expected = 4 * (weight * (q * np.log(q / p)).sum(axis=1)).sum() / weight.sum()
    assert losses.kl(torch.tensor(student), torch.tensor(teacher), 2, focus=focus).item() == pytest.approx(expected)


def test_background_beyond_doubt_does_not_dilute_a_focused_kl():
    student, teacher = several(classes=2)[0], several(classes=2)[0].flip(0)
    certain = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1).expand(9, 2, 8, 8)
    drowned = torch.cat([student, certain]), torch.cat([teacher, certain])
    alone = losses.kl(student, teacher, 1, focus=1).item()
    assert losses.kl(*drowned, 1, focus=1).item() == pytest.approx(alone, rel=1e-4)
    assert losses.kl(*drowned, 1).item() == pytest.approx(losses.kl(student, teacher, 1).item() / 4, rel=1e-4)
    # Nor does it let pass what the student alone takes for the target.
    mistaken = drowned[0].clone()
    mistaken[-1] *= -1
    assert losses.kl(mistaken, drowned[1], 1, focus=1) > 10 * alone
    assert losses.kl(certain, certain, 1, focus=1).item() == pytest.approx(0, abs=1e-6)


def test_the_dice_is_of_the_batch_and_not_a_mean_over_slices():
    logits = torch.tensor([[-9.0, 9.0], [9.0, -9.0]]).view(2, 2, 1, 1).expand(2, 2, 8, 8)
    mask = torch.zeros(2, 2, 8, 8)
    mask[0, 1] = mask[1, 1, :4] = 1
    mask[:, 0] = 1 - mask[:, 1]
    # The first slice is right; half of the second is missed: 2·64 / (64 + 96).
    assert losses.soft_dice(logits, mask).item() == pytest.approx(1 - 129 / 161, rel=1e-4)


def several(n: int = 3, classes: int = 3, size: tuple[int, int] = (8, 8)):
    """Random logits and a mask of several classes."""
    output, _, mask = random_case(Taps(Tap(1, 1), Tap(1, 1)), Taps(Tap(1, 1), Tap(1, 1)), n, size, classes=classes)
    return output.logits, mask


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_losses_of_several_classes(classes):
    logits, mask = several(classes=classes, size=(16, 32))
    z, y = logits.double().numpy(), mask.double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    true = (p * y).sum(axis=1)
    of_class = [1 - (2 * (p * y)[:, c].sum() + 1) / ((p + y)[:, c].sum() + 1) for c in range(1, classes)]
    assert losses.focal(logits, mask).item() == pytest.approx(-((1 - true) ** 2 * np.log(true)).mean(), rel=1e-5)
    assert losses.soft_dice(logits, mask).item() == pytest.approx(np.mean(of_class), rel=1e-5)
    assert losses.cross_entropy(logits, mask).item() == pytest.approx(-np.log(true).mean(), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_margin_is_all_that_the_probabilities_need(classes):
    logits = several(classes=classes)[0]
    margin = losses.margin(logits)
    assert margin.shape == (3, classes - 1, 8, 8)
    again = losses.logits_of(margin)
    torch.testing.assert_close(again.softmax(dim=1), logits.softmax(dim=1))
    torch.testing.assert_close(again.mean(dim=1), torch.zeros(3, 8, 8))


def test_the_margin_of_two_classes_lies_half_on_either_side():
    margin = losses.margin(several(classes=2)[0])
    assert torch.equal(losses.logits_of(margin), torch.cat([-margin / 2, margin / 2], dim=1))


TRUTH = {
    "focal": losses.focal,
    "cross entropy": losses.cross_entropy,
    "soft Dice": losses.soft_dice,
    "segmentation": losses.segmentation,
    "KL": lambda logits, mask, known=None: losses.kl(logits, mask, 3.0, known),
    "focused KL": lambda logits, mask, known=None: losses.kl(logits, mask, 3.0, known, focus=0.9),
}
"""Losses of the samples whose truth is known."""


@pytest.mark.parametrize("loss", TRUTH.values(), ids=TRUTH)
def test_what_is_not_known_does_not_count(loss):
    logits, mask = several(n=4)
    known = torch.tensor([False, True, True, False])
    used = logits.clone().requires_grad_()
    found = loss(used, mask, known)
    found.backward()
    assert found.item() == pytest.approx(loss(logits[1:3], mask[1:3]).item(), rel=1e-6)
    assert not used.grad[~known].any()
    assert used.grad[known].any()
    assert torch.equal(loss(logits, mask, torch.ones(4, dtype=torch.bool)), loss(logits, mask))


@pytest.mark.parametrize("loss", TRUTH.values(), ids=TRUTH)
def test_without_anything_known_the_loss_and_its_gradient_are_zero(loss):
    logits, mask = several()
    logits.requires_grad_()
    found = loss(logits, mask, torch.zeros(3, dtype=torch.bool))
    found.backward()
    assert found.item() == 0
    assert not logits.grad.any()


THREADS = ThreadPoolExecutor(4)


def in_processes(monkeypatch, parts, work):
    """`work` of every part at once, each in a thread in the place of a process; sums are those of all."""
    barrier, rank, given = threading.Barrier(len(parts)), threading.local(), [None] * len(parts)

    def sum_of_all(x):
        given[rank.is_] = x
        barrier.wait(10)
        total = sum(given)
        barrier.wait(10)
        return total

    def start(number):
        rank.is_ = number
        return work(parts[number])

    monkeypatch.setattr(losses, "sum_over_processes", sum_of_all)
    found = list(THREADS.map(start, range(len(parts))))
    monkeypatch.undo()
    return found


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=2, max_size=4))
def test_shares_of_a_batch_have_its_loss_whatever_is_known_in_each(shares):
    known = torch.tensor([k for share in shares for k in share])
    logits, mask = several(n=len(known), size=(4, 8))
    parts = torch.arange(len(known)).split([len(share) for share in shares])

    def values(z, rows):
        return torch.stack([loss(z[rows], mask[rows], known[rows]) for loss in TRUTH.values()])

    def gradients(losses, z):
        return torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses])

    logits.requires_grad_()
    expected = values(logits, slice(None))
    with pytest.MonkeyPatch.context() as patch:
        found = in_processes(patch, parts, lambda rows: values(logits, rows))
    # As the loop weighs them: by their shares of the samples.
    found = sum(each * len(rows) / len(known) for each, rows in zip(found, parts, strict=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, logits), gradients(expected, logits))


def test_an_empty_slice_found_empty_costs_nothing():
    logits = torch.tensor([20.0, -20.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    mask = torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)], dim=1)
    assert losses.segmentation(logits, mask).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_hard_labels_the_dice_semimetric_loss_is_the_soft_dice(seed):
    student, _, mask = golden_inputs(seed)
    hard = 100 * (2 * mask - 1)
    expected = losses.soft_dice(student.logits, mask).item()
    assert losses.dice_semimetric(student.logits, hard).item() == pytest.approx(expected, rel=1e-5)


def test_the_dice_semimetric_loss_is_least_at_the_soft_label_where_soft_dice_is_not():
    def logits(p):
        return torch.tensor([[1 - p], [p]]).log().view(1, 2, 1, 1).expand(1, 2, 16, 16)

    found = {p: losses.dice_semimetric(logits(p), logits(0.4)).item() for p in (0.2, 0.3, 0.4, 0.5, 0.9)}
    assert found[0.4] == pytest.approx(0, abs=1e-6)
    assert min(found, key=found.get) == 0.4
    soft = torch.full((1, 2, 16, 16), 0.6)
    assert losses.soft_dice(logits(0.9), soft) < losses.soft_dice(logits(0.6), soft)


def test_the_dice_semimetric_loss_of_several_classes_is_their_mean_without_the_background():
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 6, 6))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (student, teacher))
    of_class = [np.abs(p - q)[:, c].sum() / ((p + q)[:, c].sum() + 1) for c in (1, 2, 3)]
    found = losses.dice_semimetric(torch.tensor(student), torch.tensor(teacher))
    assert found.item() == pytest.approx(np.mean(of_class), rel=1e-5)


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_half_precision_logits_give_float32_losses_and_finite_gradients(size):
    student, teacher, mask = golden_inputs(0)
    logits = (size * student.logits).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.segmentation(logits, mask) + losses.kl(logits, (size * teacher.logits).bfloat16(), 4)
        loss = loss + losses.dice_semimetric(logits, (size * teacher.logits).bfloat16())
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.isfinite().all()
    exact = losses.segmentation(logits.float(), mask) + losses.kl(logits.float(), size * teacher.logits, 4)
    exact = exact + losses.dice_semimetric(logits.float(), size * teacher.logits)
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def train_on_a_part(rank: int, folder: str) -> None:
    """What a process of two does with its part of four slices under DDP, which averages gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, _, mask = golden_inputs(0)
    part = slice(0, 3) if rank == 0 else slice(3, 4)
    logits = student.logits[part].requires_grad_()
    loss = losses.segmentation(logits, mask[part]) * (len(logits) * 2 / 4)
    loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    with torch.no_grad():
        alone = losses.segmentation(logits, mask[part])
    torch.save({"loss": mean, "gradient": logits.grad / 2, "alone": alone}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(train_on_a_part, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    student, _, mask = golden_inputs(0)
    logits = student.logits.requires_grad_()
    loss = losses.segmentation(logits, mask)
    loss.backward()
    assert [part["loss"].item() for part in parts] == [pytest.approx(loss.item(), rel=1e-6)] * 2
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), logits.grad, rtol=1e-5, atol=1e-9)
    # Without gradients, nothing is shared: a process can evaluate by itself.
    assert parts[1]["alone"].item() == pytest.approx(losses.segmentation(logits[3:], mask[3:]).item(), rel=1e-6)
