"""What every network must do in the loop, in a tiny variant."""

import numpy as np
import pytest
import torch
from conftest import thorough_but

from data_tools.phantom import phantom
from spark_dist.evaluation.metrics import dice, overlap_counts
from spark_dist.losses import segmentation
from spark_dist.networks import NETWORKS, build_network

TINY = {"enet": 1.0, "espnet": 1.0, "universeg": 1.0}
"""Width of the tiny variant, where it is not 0.25: these are small as they are."""
COARSE = {"resnet18", "resnet34", "resnet50"}
"""Networks whose logits lie on a grid of 32 pixels. They are shown a close-up, enlarged eight times."""


@pytest.fixture(scope="module")
def four_slices():
    """Image (4, 1, 64, 64) in [−1, 1] and target (4, 64, 64) of phantom slices, and the 32×32 pixels about an organ."""
    image, label, _ = phantom(np.random.default_rng(0), 72)
    fullest = np.argsort(-(label > 0).sum(axis=(1, 2)))[:4]
    image, target = np.clip((image[fullest] + 200) / 500, 0, 1) * 2 - 1, label[fullest] > 0
    row, column = (int(np.flatnonzero(target.any(axis=axes)).min()) for axes in ((0, 2), (0, 1)))
    rows, columns = slice(row - 8, row + 24), slice(column - 4, column + 28)
    image, target = torch.from_numpy(image).float().unsqueeze(1), torch.from_numpy(target)
    near = image[..., rows, columns], target[:, rows, columns]
    enlarged = [t.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2) for t in near]
    return {"whole": (image[..., :64, :64], target[:, :64, :64]), "near": enlarged}


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(sorted(NETWORKS), {"enet", "erfnet", "unet"}))
def test_a_network_can_learn_four_slices_by_heart(name, four_slices):
    image, target = four_slices["near" if name in COARSE else "whole"]
    mask = torch.stack([~target, target], dim=1).float()
    torch.manual_seed(0)
    network = build_network(name, width=TINY.get(name, 0.25))
    if hasattr(network, "set_support"):
        network.set_support(image, mask[:, 1:])
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    best = 0.0
    for step in range(400):
        loss = segmentation(network(image).logits, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            with torch.no_grad():
                predicted = network(image).logits.argmax(dim=1).bool()
            best = max(best, dice(overlap_counts(predicted.numpy(), target.numpy()).sum(axis=0)))
            if best > 0.9:
                return
    pytest.fail(f"Dice {best:.3f} after {step + 1} steps")


@pytest.mark.launch
@pytest.mark.slow
def test_every_network_trains_in_two_processes(launch, tmp_path):
    result = launch(2, "ddp_step.py", cwd=tmp_path)
    assert [line for line in result.stdout.splitlines() if line.endswith(" ok")] == [
        f"{n} ok" for n in sorted(NETWORKS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(sorted(NETWORKS), {"enet", "raunet", "unet"}))
def test_every_network_compiles_as_one_graph(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = build_network(name, width=0.1)
    image = torch.randn(2, 1, 64, 64)
    if hasattr(network, "set_support"):
        network.set_support(image, (image > 0).float())
    # Without code generation, which would take a C++ compiler and half a minute for each network.
    compiled = torch.compile(network.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image).logits, network(image).logits)
