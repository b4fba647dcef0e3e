"""SPARK from second moments against SPARK as its formulas say it, in float64."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from golden import random_case
from torch import nn

from benchmarks.plain_spark import PlainSPARK, plain_distance
from spark_dist.distillers.features import connector, hierarchical_mse, pool_to, pooled_levels, size_of, smaller
from spark_dist.distillers.quadratic import centred, distance, distance_through, pooled_columns, power
from spark_dist.distillers.spark import SPARK
from spark_dist.networks.base import NetworkOutput, Tap, Taps

STUDENT = Taps(Tap(4, 2), Tap(6, 8))
TEACHERS = {
    "connectors": Taps(Tap(7, 2), Tap(10, 16)),
    "one connector less": Taps(Tap(6, 2), Tap(10, 16)),
    "no connectors": Taps(Tap(6, 2), Tap(6, 16)),
    "a finer teacher": Taps(Tap(7, 1), Tap(10, 4)),
}


def trained(module):
    """Norms with weights and running statistics of their own."""
    generator = torch.Generator().manual_seed(5)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def close(a, b, what=""):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 112), (32, 32), (16, 16)])
@pytest.mark.parametrize("kind", TEACHERS)
def test_spark_equals_its_formulas(kind, size, training):
    student_taps = Taps(Tap(6, 2), Tap(6, 8)) if kind == "no connectors" else STUDENT
    torch.manual_seed(0)
    plain = trained(PlainSPARK(student_taps, TEACHERS[kind], reference_crop=40, high_low=0.3).double()).train(training)
    fast = SPARK(student_taps, TEACHERS[kind], reference_crop=40, high_low=0.3).double().train(training)
    fast.load_state_dict(plain.state_dict())
    assert bool(list(fast.parameters())) == (kind != "no connectors")
    student, teacher, mask = random_case(student_taps, TEACHERS[kind], n=3, size=size)
    # Off the centre, so that something is lost if moments are subtracted carelessly.
    student, teacher = (NetworkOutput(*(x.double() + 1 for x in output)) for output in (student, teacher))
    mask = mask.double()
    found = []
    for distiller in (plain, fast):
        used = NetworkOutput(*(x.clone().requires_grad_() for x in student))
        ced = distiller(used, distiller.teacher_targets(teacher, mask), mask, torch.arange(3))["ced"]
        ced.backward()
        assert ced.dtype == torch.float64
        gradients = {f"student {name}": x.grad for name, x in used._asdict().items() if name != "logits"}
        gradients |= {name: p.grad for name, p in distiller.named_parameters()}
        found.append({"ced": ced.detach()} | gradients | dict(distiller.named_buffers()))
    for name, value in found[0].items():
        scale = 1 if name.startswith("student") else value.abs().max().clamp(min=1)
        close(found[1][name] / scale, value / scale, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("own", "other"),
    [
        ((12, 12), (12, 12)),
        ((24, 24), (12, 12)),
        ((15, 13), (15, 13)),
        ((15, 13), (7, 5)),
        ((6, 10), (6, 10)),
        ((9, 9), (4, 4)),
        ((5, 8), (3, 2)),
        ((8, 8), (2, 2)),
        ((7, 7), (1, 1)),
        ((3, 9), (1, 4)),
        ((6, 6), (30, 30)),
    ],
)
def test_the_distance_through_a_connector_at_every_pooling_level_and_at_odd_sizes(own, other, training):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, *own, generator=generator, dtype=torch.float64) + 2
    y = torch.randn(2, 5, *other, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    layers = trained(connector(3, 5)).double().train(training)
    found = []
    for way in ("plain", "moments"):
        used, through = x.clone().requires_grad_(), copy.deepcopy(layers)
        if way == "plain":
            loss = plain_distance(used, y, through)
        else:
            size = smaller(own, other)
            student, teacher = centred(used), pool_to(y, size)
            squares, columns = power(teacher), pooled_columns(teacher)
            loss = distance_through(through, student, pool_to(student.map, size), teacher, columns, squares)
        loss.backward()
        found.append([loss.detach(), used.grad, *(p.grad for p in through.parameters()), *through.buffers()])
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("size", [(12, 12), (15, 13), (6, 10), (4, 4), (5, 2), (1, 3), (8, 6)])
def test_pooled_levels_are_those_of_the_map_itself(size):
    x, y = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 3, *size, dtype=torch.float64)
    levels = pooled_levels(x)
    assert [size_of(level) for level in levels[1:]] == [(s, s) for s in (4, 2, 1) if s < min(size)]
    for level in levels:
        close(level, pool_to(x, size_of(level)))
    expected = plain_distance(x, y, torch.nn.Identity())
    close(hierarchical_mse(x, y), expected)
    close(distance(x, y, pooled_columns(y)), expected)


def test_a_channel_without_variance_is_borne_in_float32():
    x = torch.randn(2, 3, 8, 8) * 1e3
    x[:, 1] = 500
    x = x.requires_grad_()
    y = torch.randn(2, 5, 8, 8)
    layers = connector(3, 5)
    with torch.no_grad():
        layers[0].weight[0] = torch.tensor([0, 1.0, 0]).view(3, 1, 1)
    student = centred(x)
    loss = distance_through(layers, student, student.map, y, pooled_columns(y), power(y))
    torch.testing.assert_close(loss, plain_distance(x, y, layers), rtol=1e-3, atol=1e-5)
    loss.backward()
    assert x.grad.isfinite().all()


def synchronised(rank: int, folder: str) -> None:
    """A process of two whose norm has the statistics of both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y, layers = synchronised_case()
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    layers = nn.SyncBatchNorm.convert_sync_batchnorm(layers)
    used = x[part].requires_grad_()
    loss = through_moments(used, y[part], layers) * len(used) * 2 / 5
    loss.backward()
    found = [loss.detach() / 2, *(p.grad / 2 for p in layers.parameters())]
    for value in found:
        dist.all_reduce(value)
    torch.save([used.grad / 2, *found, *layers.buffers()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def synchronised_case():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    x = x + torch.arange(5).view(5, 1, 1, 1)
    y = torch.randn(5, 4, 4, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return x, y, trained(connector(3, 4)).double()


def through_moments(x, y, layers):
    student = centred(x)
    pooled = pool_to(student.map, size_of(y))
    return distance_through(layers, student, pooled, y, pooled_columns(y), power(y))


def test_a_norm_over_all_processes_is_that_of_one(tmp_path):
    torch.multiprocessing.spawn(synchronised, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    x, y, layers = synchronised_case()
    loss = through_moments(x.requires_grad_(), y, layers)
    loss.backward()
    close(torch.cat([first[0], second[0]]), x.grad)
    for values in (first, second):
        for a, b in zip(
            values[1:], [loss.detach(), *(p.grad for p in layers.parameters()), *layers.buffers()], strict=True
        ):
            close(a, b)
