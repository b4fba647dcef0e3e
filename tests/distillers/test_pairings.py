"""Every method takes a step with unet as teacher of every network, and with every network as teacher of enet."""

import runpy

import pytest
import torch
from conftest import ROOT

from data_tools.errors import UserError
from spark_dist.distillers import DISTILLERS, build_distiller
from spark_dist.networks import NETWORKS, NetworkOutput, build_network
from spark_dist.training.distillation import Distillation

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


def problem(method, student, teacher):
    """What is wrong with a pairing, or nothing."""
    if method == "tfkd" and student != teacher:
        with pytest.raises(UserError, match="same"):
            step(method, tiny(student), tiny(teacher))
        return ""
    stuck = step(method, tiny(student), tiny(teacher))
    return f"no step for {', '.join(stuck)}" if stuck else ""


ROWS: dict[str, str] = {}
"""Each network's row of docs/pairings.md, as its test has found it."""
HEAD = """# Pairs of networks under every method

For each network and method: **S** it learns from a U-Net, **T** it teaches an ENet: every parameter of student and
method gets a gradient and changes in a step. `tfkd` wants teacher and student to be of one kind, and says so.

"""


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_network_learns_and_teaches_with_every_method(network):
    found = {}
    for method in sorted(DISTILLERS):
        pairs = {"S": (network, "unet"), "T": ("enet", network)}
        found[method] = {letter: problem(method, *pair) for letter, pair in pairs.items()}
    marks = {
        method: " ".join(letter if not wrong else f"{letter}: {wrong}" for letter, wrong in pairs.items())
        for method, pairs in found.items()
    }
    if network not in ("unet", "enet"):
        marks["tfkd"] = "–"
    marks["tfkd"] = {"unet": "S", "enet": "T"}.get(network, marks["tfkd"])
    ROWS[network] = f"| `{network}` | {' | '.join(marks.values())} |"
    assert [wrong for pairs in found.values() for wrong in pairs.values() if wrong] == []


@pytest.mark.slow
def test_the_table_of_pairings_is_up_to_date(request):
    if len(ROWS) < len(NETWORKS):
        pytest.skip("only some of the networks were asked for")
    lines = [
        f"| | {' | '.join(f'`{method}`' for method in sorted(DISTILLERS))} |",
        "|---" * (len(DISTILLERS) + 1) + "|",
    ]
    table = HEAD + "\n".join([*lines, *(ROWS[network] for network in sorted(NETWORKS))]) + "\n"
    file = ROOT / "docs" / "pairings.md"
    if request.config.getoption("--write-tables"):
        file.write_text(table)
    assert file.read_text() == table, "run pytest tests/distillers/test_pairings.py --write-tables"


@pytest.mark.parametrize("file", ["methods.md", "networks.md"])
def test_a_generated_table_is_up_to_date(file):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / file).read_text() == generate["TABLES"][file]()
