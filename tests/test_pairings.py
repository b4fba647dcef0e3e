"""Every method takes a step with unet as teacher of every network, and with every network as teacher of enet."""

import runpy

import pytest
import torch
from conftest import ROOT

from data_tools.errors import UserError
from spark_dist.distillation import Distillation
from spark_dist.distillers import DISTILLERS, build_distiller
from spark_dist.networks import NETWORKS, NetworkOutput, build_network

CROP = 64
WIDTH = {"enet": 0.5}
"""Width of a network where it is not 0.1. A bottleneck of one channel between two batch norms has a scale that makes no
difference, so its weight would not learn."""


def tiny(name):
    torch.manual_seed(0)
    network = build_network(name, width=WIDTH.get(name, 0.1))
    if hasattr(network, "set_support"):
        image = torch.randn(4, 1, CROP, CROP)
        network.set_support(image, (image > 0).float())
    return network


def step(method, student, teacher):
    """One step of a fresh distiller; the names of parameters that got no gradient or did not change."""
    torch.manual_seed(1)
    image = torch.randn(4, 1, CROP, CROP)
    target = (image[:, 0] > 0.5).float()
    mask = torch.stack([1 - target, target], dim=1)
    distiller = build_distiller(method, student=student.taps, teacher=teacher.taps, samples=4)
    model = Distillation(student, distiller)
    # Gradients may be as small as layer scales make them: eps must not swallow the step.
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-30)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        output = NetworkOutput(*(t.float() for t in teacher.eval()(image)))
        targets = distiller.teacher_targets(output, mask)
    terms = model.train()(image, mask, targets, torch.arange(4))
    loss = sum(terms.values())
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    return [key for key, p in model.named_parameters() if p.grad is None or torch.equal(p, before[key])]


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_network_learns_and_teaches_with_every_method(network):
    problems = {}
    for method in sorted(DISTILLERS):
        for student, teacher in ((network, "unet"), ("enet", network)):
            if method == "tfkd" and student != teacher:
                with pytest.raises(UserError, match="same"):
                    step(method, tiny(student), tiny(teacher))
                continue
            if stuck := step(method, tiny(student), tiny(teacher)):
                problems[method, student, teacher] = stuck
    assert problems == {}


def test_the_table_of_methods_is_up_to_date():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "methods.md").read_text() == generate["methods_table"]()
