"""Every network as an ONNX file."""

import re

import pytest
import torch
from conftest import ROOT, model_card, thorough_but
from torch import nn

from data_tools.errors import UserError
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.networks import NETWORKS, build_network
from spark_dist.networks.onnx import LARGEST_DIFFERENCE, OnnxNetwork, difference, export_onnx

CROP, OTHER = (64, 64), (32, 96)
UNEXPORTABLE: dict[str, str] = {}
"""Networks that can't be exported, and why."""
BOUND = {"pspnet", "unet2022", "universeg"}
"""Networks that are exported for slices of one size: adaptive pooling is, windows shrink and shift with the size, and a
support set has a size of its own."""
ALWAYS = {"enet", "pspnet", "unet"}
"""Networks that are exported in every run of the tests; the others take up to a minute each."""
ROWS: dict[str, tuple[str, str]] = {}
"""Each network's slices and figures in docs/export.md, as its test has found them."""


def settled(name):
    """A small network whose running statistics are half way to those of what it is shown, so that its logits are
    neither tiny nor, where a channel hardly varies, a matter of rounding; and slices for it."""
    torch.manual_seed(0)
    network, slices = build_network(name, width=0.1), torch.rand(4, 1, *CROP) * 2 - 1
    if hasattr(network, "set_support"):
        network.set_support(slices, (slices > 0).float())
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
        network.train()(slices)
    return network.eval(), slices


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(sorted(NETWORKS), ALWAYS))
def test_a_network_has_the_same_logits_by_onnxruntime(name, tmp_path):
    network, slices = settled(name)
    card = model_card(network=name, width=0.1, spec=SliceSpec("organ", Crop(CROP)))
    if name in UNEXPORTABLE:
        with pytest.raises(UserError, match=re.escape(UNEXPORTABLE[name])):
            export_onnx(tmp_path / "n.onnx", network, card)
        ROWS[name] = UNEXPORTABLE[name], "–"
        return
    plane = export_onnx(tmp_path / "n.onnx", network, card)
    exported = OnnxNetwork(tmp_path / "n.onnx")
    assert plane == exported.bound_to == (CROP if name in BOUND else None)
    found = difference(network, exported, slices)
    if plane is None:
        found = max(found, difference(network, exported, torch.rand(1, 1, *OTHER) * 2 - 1))
    assert found < LARGEST_DIFFERENCE
    largest = float(network(slices).logits.detach().abs().max())
    ROWS[name] = "of the training's size" if plane else "of any size", f"{found:.1e} | {largest:.1f}"


@pytest.mark.slow
def test_the_table_of_exports_is_up_to_date(request):
    """But for its figures, which differ a little from machine to machine; as far as networks were exported."""
    file = ROOT / "docs" / "export.md"
    head, rows, tail = re.split(r"(?<=\n)((?:\| `.*\n)+)", file.read_text(), maxsplit=1)
    if request.config.getoption("--write-tables") and len(ROWS) == len(NETWORKS):
        rows = "".join(f"| `{name}` | {slices} | {figures} |\n" for name, (slices, figures) in sorted(ROWS.items()))
        file.write_text(head + rows + tail)
    written = dict(re.findall(r"\| `(.*?)` \| (.*?) \|", rows))
    assert written.keys() == NETWORKS.keys()
    assert {name: written[name] for name in ROWS} == {name: slices for name, (slices, _) in ROWS.items()}, (
        "run pytest tests/networks/test_onnx.py --write-tables"
    )
