"""Where networks look: the maps, and the command that draws them."""

import numpy as np
import pytest
import torch
from conftest import model_card, undecided
from matplotlib.image import imread
from torch import nn

from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.explanation import explain, grad_cam
from spark_dist.evaluation.panel import ShownSlice, shown_slice
from spark_dist.networks import NETWORKS, NetworkOutput, build_network
from spark_dist.networks.checkpoint import load_named, save_network


class Toy(nn.Module):
    """Low is the slice and its negative; high is low's mean over 2×2 pixels; the target's logit is 3 low₀ − low₁ +
    2 high₀, and the background's counts for nothing."""

    stride, bound_to = 2, None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x):
        low = x * self.weight.view(1, 2, 1, 1)
        high = nn.functional.avg_pool2d(low, 2)
        target = 3 * low[:, 0] - low[:, 1] + 2 * nn.functional.interpolate(high, scale_factor=2)[:, 0]
        return NetworkOutput(torch.stack([100 * low[:, 0], target], dim=1), low, high)


def test_the_maps_of_a_network_whose_gradients_are_known():
    image = np.random.default_rng(0).integers(-100, 100, (3, 5, 8)).astype(np.int16)
    shown = ShownSlice("", image, 1, (-100, 100), np.zeros((5, 8)))
    maps = explain(Toy(), shown, SliceSpec("organ", Crop((4, 4))), [1])
    x = image[1] / 100
    # ∂/∂low₀ is 3 + 2, high's share included, and ∂/∂low₁ is −1, at each pixel.
    assert np.allclose(maps["Grad-CAM, low"], np.maximum(5 * x - 1 * -x, 0), atol=1e-5)
    assert np.allclose(maps["attention, low"], x**2 / np.linalg.norm(np.pad(x**2, ((0, 1), (0, 0)), constant_values=1)))
    # Five rows are padded to six by −1; a pixel of high stands for four of the logits.
    high = np.pad(x, ((0, 1), (0, 0)), constant_values=-1).reshape(3, 2, 4, 2).mean(axis=(1, 3))
    padded = torch.from_numpy(np.pad(x, ((0, 1), (0, 0)), constant_values=-1)[None, None]).float()
    assert np.allclose(grad_cam(Toy()(padded), [1])["high"][0], np.maximum(8 * high, 0), atol=1e-5)
    assert maps["Grad-CAM, high"].shape == (5, 8)
    assert not grad_cam(Toy()(padded), [0])["high"].any()


def test_grad_cam_is_that_of_monai():
    """On a network whose feature maps are the output of layers that have a name."""
    from monai.visualize import GradCAM

    class Logits(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).logits

    torch.manual_seed(4)
    network, x = build_network("enet", width=0.25).eval(), torch.randn(1, 1, 32, 48)
    found = grad_cam(network(x), [1])
    for tap, layer in (("low", "network.initial"), ("high", "network.stage3")):
        expected = GradCAM(Logits(network), layer).compute_map(x, class_idx=1)[:, 0].detach()
        assert expected.max() > 0
        assert torch.allclose(found[tap], expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_logits_of_every_network_have_gradients_by_its_maps(name):
    torch.manual_seed(0)
    network, x = build_network(name, width=0.125).eval(), torch.randn(1, 1, 32, 32)
    if hasattr(network, "set_support"):
        network.set_support(x, (x > 0).long())
    output = network(x)
    for tap in ("low", "high"):
        gradient = torch.autograd.grad(output.logits[:, 1].sum(), getattr(output, tap), retain_graph=True)[0]
        assert gradient.abs().max() > 0
    assert all(found.isfinite().all() for found in grad_cam(output, [1]).values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks that are unsure, one of another crop, and one of two regions."""
    folder = tmp_path_factory.mktemp("explain")
    cards = {"a": {}, "b": {}, "crop": {"spec": SliceSpec("organ", Crop((48, 48)))}}
    cards["both"] = {"spec": SliceSpec("organ,tumour", Crop((32, 32))), "classes": 3}
    for seed, (name, facts) in enumerate(cards.items()):
        torch.manual_seed(seed)
        network = build_network("unet", classes=facts.get("classes", 2), width=0.25)
        save_network(
            folder / f"{name}.safetensors",
            network if name == "both" else undecided(network),
            model_card(network="unet", **facts),
        )
    return folder


def run(capsys, *words, code=0):
    """What the command prints."""
    assert main(["explain", *map(str, words)]) == code
    found = capsys.readouterr()
    return " ".join((found.out if code == 0 else found.err).split())


def test_the_worst_slices_are_drawn(folder, tiny_store, capsys, tmp_path):
    names = [f"a={folder}/a.safetensors", f"b={folder}/b.safetensors"]
    out, store = tmp_path / "new" / "e.png", open_store(tiny_store)
    text = run(capsys, *names, "--dataset", tiny_store, "--rows", 2, "--out", out)
    networks, spec = load_named(names)
    dice = {}
    for name in store.split("default", "test"):
        z = int(store.cases[name].voxels("organ")[:, 0].argmax())
        shown = shown_slice(store, name, z, spec)
        dice[f"{name} slice {z}"] = np.mean([shown.predicted(network, spec)[1] for network in networks.values()])
    assert len(set(dice.values())) == 3
    assert text == f"wrote {out}: {', '.join(sorted(dice, key=dice.get)[:2])}"
    two = imread(out).shape
    text = run(capsys, *names, "--dataset", tiny_store, "--slices", "case_00009:1", "--out", out)
    assert text.endswith("case_00009 slice 1")
    assert imread(out).shape[0] < 0.7 * two[0]


def test_a_region_of_several_is_explained(folder, tiny_store, capsys, tmp_path):
    sizes = {}
    for region in ("", "organ", "tumour"):
        line = [folder / "both.safetensors", "--dataset", tiny_store, "--slices", "case_00008:2", "--region", region]
        run(capsys, *line, "--out", tmp_path / "e.png")
        sizes[region] = imread(tmp_path / "e.png")
    assert sizes[""].shape == sizes["tumour"].shape
    assert (sizes["organ"] != sizes["tumour"]).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--slices", "case_00008"], "--slices case_00008: write each as CASE:INDEX, such as case_00008:0"),
        (["a", "--slices", "case_00008:-1"], "write each as CASE:INDEX"),
        (["a", "--slices", "case_00008:99"], "case_00008 has slices 0 to 6"),
        (["a", "--slices", "case_00000:1"], "there is no case of this part 'case_00000'"),
        (["a", "--region", "liver"], "--region: there is no region of these networks 'liver'"),
        (["a", "a"], "another network is called 'explain"),
        (["a", "N=crop"], "its task, crop or threshold is not that of"),
        (["missing"], "no such checkpoint"),
        (["a", "--split", "none"], "split"),
    ],
)
def test_bad_input_is_one_line(folder, tiny_store, capsys, tmp_path, words, message):
    def place(word):
        name, _, path = word.rpartition("=")
        return f"{name}{'=' * bool(name)}{folder / path}.safetensors"

    count = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    words = [*map(place, words[:count]), *words[count:]]
    text = run(capsys, *words, "--dataset", tiny_store, "--out", tmp_path / "e.png", code=2)
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "e.png").exists()


def test_an_onnx_file_has_no_maps(folder, tiny_store, capsys, tmp_path):
    out = tmp_path / "a.onnx"
    assert main(["export", str(folder / "a.safetensors"), str(out), "--dataset", str(tiny_store)]) == 0
    capsys.readouterr()
    text = run(capsys, out, "--dataset", tiny_store, "--out", tmp_path / "e.png", code=2)
    assert text == f"error: {out}: an ONNX file has no feature maps; give the .safetensors that it was made of"
