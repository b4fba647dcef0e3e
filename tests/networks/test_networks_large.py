"""What is particular to unet++, deeplabv3+, mnet, unet2022 and universeg; what holds for all is in test_networks.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError
from spark_dist.networks import build_network
from spark_dist.networks.mnet import SliceConv3d
from spark_dist.networks.unet2022 import Attention, Residual

# parameters, GFLOPs at 384×384 (a multiply-add counts 2), channels and stride of low and high
EXPECTED = {
    "deeplabv3+": (56_795_962 - 2_049_000, 272.478, (32, 2), (2048, 8)),
    # 142.645 GFLOPs were measured with 3×3×3 kernels on volumes of depth 1, of which two thirds meet only padding.
    "mnet": (8_774_848 - 768, 142.645 - 71.303, (48, 2), (96, 16)),
    "unet++": (36_628_546, 619.891, (128, 2), (512, 8)),
    "unet2022": (41_173_164 - 18_436, 57.733, (96, 4), (768, 32)),
    # With 8 examples; 49.622 GFLOPs were measured with the last block's support side, whose result nobody takes:
    # a 3×3 convolution of 16 to 16 channels over 8 maps.
    "universeg": (74_674 - 2_320, 49.622 - 2 * 9 * 16 * 16 * 8 * 384**2 / 1e9, (16, 1), (16, 4)),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_network_is_what_it_was_published_as(name):
    parameters, gflops, low, high = EXPECTED[name]
    with torch.device("meta"):
        network = build_network(name).eval()
        if name == "universeg":
            network.set_support(torch.zeros(8, 1, 384, 384), torch.zeros(8, 1, 384, 384))
        slices = torch.zeros(1, 1, 384, 384)
        with FlopCounterMode(display=False) as counter:
            output = network(slices)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.002)
    assert network.taps == (low, high)
    assert output.logits.shape == (1, 2, 384, 384)
    assert output.low.shape == (1, low[0], 384 // low[1], 384 // low[1])
    assert output.high.shape == (1, high[0], 384 // high[1], 384 // high[1])


def tiny(name, width=0.1, seed=0):
    torch.manual_seed(seed)
    return build_network(name, width=width)


@torch.no_grad()
def test_unetplusplus_is_nested_as_in_the_paper():
    network = tiny("unet++").eval()
    x = torch.randn(1, 1, 32, 48)

    def node(i, j):
        if j == 0:
            return network.encoder[i](x if i == 0 else F.max_pool2d(node(i - 1, 0), 2))
        below = F.interpolate(node(i + 1, j - 1), scale_factor=2, mode="bilinear", align_corners=True)
        return network.nested[i][j - 1](torch.cat([*(node(i, k) for k in range(j)), below], dim=1))

    output = network(x)
    torch.testing.assert_close(output.logits, network.head(node(0, 4)))
    torch.testing.assert_close(output.low, node(1, 0))
    torch.testing.assert_close(output.high, node(3, 0))


@torch.no_grad()
def test_mnet_is_meshed_as_in_the_paper():
    network = tiny("mnet").eval()
    x = torch.randn(1, 1, 32, 48)
    down = {(level - r, r): cell for level, cells in enumerate(network.down) for r, cell in enumerate(cells)}
    up = {(3 - k - r, r): cell for k, cells in enumerate(network.up) for r, cell in enumerate(cells)}

    def fused(flat, deep, change):
        """By the absolute difference, if there are both."""
        maps = [change(m) for m in (flat, deep) if m is not None]
        return (maps[0] - maps[1]).abs() if len(maps) == 2 else maps[0]

    def encoded(flats, deeps):
        """2D and 3D map after so many steps as a 2D and as a 3D map."""
        if flats == deeps == 0:
            return down[0, 0](x.unsqueeze(2))
        flat = encoded(flats - 1, deeps)[0] if flats else None
        deep = encoded(flats, deeps - 1)[1] if deeps else None
        return down[flats, deeps](fused(flat, deep, lambda m: F.max_pool3d(m, (1, 2, 2))))

    def decoded(flats, deeps):
        if flats + deeps == 4:
            return encoded(flats, deeps)
        skip = fused(*encoded(flats, deeps), lambda m: m)
        size = skip.shape[2:]
        below = fused(
            decoded(flats + 1, deeps)[0],
            decoded(flats, deeps + 1)[1],
            lambda m: F.interpolate(m, size, mode="trilinear", align_corners=False),
        )
        return up[flats, deeps](torch.cat([skip, below], dim=1))

    output = network(x)
    flat, deep = decoded(0, 0)
    torch.testing.assert_close(output.logits, network.head(flat + deep)[:, :, 0])
    torch.testing.assert_close(output.low, encoded(1, 0)[0][:, :, 0])
    torch.testing.assert_close(output.high, encoded(4, 0)[0][:, :, 0])


def test_mnet_refuses_a_slice_that_ends_as_one_pixel():
    with pytest.raises(UserError, match="mnet needs slices larger than 16×16"):
        tiny("mnet")(torch.randn(1, 1, 16, 16))


def test_deeplab_is_dilated_to_a_stride_of_8():
    network = tiny("deeplabv3+")
    depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    # Entry flow, then sixteen blocks of the middle flow and the first of the exit flow, then the end of that.
    assert [m.dilation[0] for m in depthwise] == [1] * 9 + [2] * (16 + 1) * 3 + [4] * 3
    assert [m.stride[0] for m in depthwise] == [1, 1, 2, 1, 1, 2] + [1] * (3 + 17 * 3 + 3)
    assert {m.dilation[0] for m in network.pyramid.modules() if isinstance(m, nn.Conv2d)} == {1, 12, 24, 36}
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5, 0.1]


def test_deeplab_refuses_to_train_on_one_slice():
    network = tiny("deeplabv3+", 0.05)
    with pytest.raises(UserError, match=r"deeplabv3\+.*batch of two"):
        network(torch.randn(1, 1, 64, 64))
    network.eval()(torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 160), (192, 192), (224, 96)])
def test_unet2022_takes_small_crops(size):
    network = tiny("unet2022")
    output = network(torch.randn(1, 1, *size))
    assert output.logits.shape == (1, 2, *size)
    assert output.high.shape[2:] == (size[0] // 32, size[1] // 32)
    output.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def attention(side, shifted, heads=2, channels=6):
    torch.manual_seed(0)
    module = Attention(channels, heads, side, shifted)
    nn.init.normal_(module.position)
    return module


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 2)])
def test_attention_in_one_window(size):
    """Against a loop over pixels. A window smaller than the module's uses the biases of the offsets it has."""
    module = attention(4, shifted=True)
    x = torch.randn(1, 6, *size)
    normed = module.norm(x)
    pixels = [(i, j) for i in range(size[0]) for j in range(size[1])]
    expected = torch.empty_like(x)
    for i, j in pixels:
        parts = []
        for head in range(2):
            q, k, v = ({p: module.qkv(normed[0, :, *p]).view(3, 2, 3)[part, head] for p in pixels} for part in range(3))
            scores = [q[i, j] @ k[a, b] / 3**0.5 + module.position[head, i - a + 3, j - b + 3] for a, b in pixels]
            weights = torch.stack(scores).softmax(dim=0)
            parts.append(sum(w * v[p] for w, p in zip(weights, pixels, strict=True)))
        expected[0, :, i, j] = module.project(torch.cat(parts) + module.depthwise(normed)[0, :, i, j])
    torch.testing.assert_close(module(x), expected)


def reached(module, pixel, side):
    """Where the output depends on a pixel of the input, by attention alone."""
    nn.init.zeros_(module.depthwise.weight)
    x = torch.randn(1, 6, side, side, requires_grad=True)
    rows = []
    for i in range(side):
        for j in range(side):
            (grad,) = torch.autograd.grad(module(x)[0, :, i, j].square().sum(), x)
            rows.append(bool(grad[0, :, *pixel].abs().sum() > 0))
    return {(k // side, k % side) for k, hit in enumerate(rows) if hit}


def test_attention_stays_in_its_window():
    def square(top, bottom, left, right):
        return {(i, j) for i in range(top, bottom) for j in range(left, right)}

    assert reached(attention(4, shifted=False), (1, 5), 8) == square(0, 4, 4, 8)
    # Shifted by 2, windows start at 2; what is before and after is not joined around the edges.
    assert reached(attention(4, shifted=True), (1, 5), 8) == square(0, 2, 2, 6)
    assert reached(attention(4, shifted=True), (7, 7), 8) == square(6, 8, 6, 8)
    # Seven pixels are padded to eight.
    assert reached(attention(4, shifted=False), (6, 2), 7) == square(4, 7, 0, 4)


def test_a_dropped_block_leaves_a_sample_as_it_is():
    torch.manual_seed(0)
    module = Residual(nn.Identity(), 0.25)
    x = torch.ones(4000, 1, 1, 1)
    out = module(x).flatten()
    assert out.unique().tolist() == pytest.approx([1, 1 + 1 / 0.75])
    assert out.mean() == pytest.approx(2, abs=0.05)
    assert torch.equal(module.eval()(x), 2 * x)


@pytest.fixture
def examples():
    torch.manual_seed(1)
    images = torch.randn(3, 1, 32, 40)
    return images, (images > 0.5).float()


@torch.no_grad()
def test_universeg_segments_by_its_examples(examples):
    network = tiny("universeg", 0.5).eval()
    x = torch.randn(2, 1, 32, 40)
    images, labels = examples
    network.set_support(images, labels)
    logits = network(x).logits
    torch.testing.assert_close(network(x[1:]).logits, logits[1:])  # each slice by itself
    network.set_support(images.flip(0), labels.flip(0))
    torch.testing.assert_close(network(x).logits, logits)  # in any order
    for other in ((images, 1 - labels), (images.roll(1, dims=0), labels), (images[:2], labels[:2])):
        network.set_support(*other)
        assert not torch.allclose(network(x).logits, logits, atol=1e-3)


@torch.no_grad()
def test_universeg_is_shown_each_class_of_its_examples(examples):
    torch.manual_seed(0)
    network = build_network("universeg", classes=3, width=0.5).eval()
    x, (images, labels) = torch.randn(2, 1, 32, 40), examples
    logits = {}
    for name, shown in {"two": labels, "three": labels + (images > 1), "swapped": 2 * labels}.items():
        network.set_support(images, shown)
        assert torch.equal(network.support(x)[0, :, 1:].argmax(dim=1), shown[:, 0].long())
        logits[name] = network(x).logits
    assert not torch.allclose(logits["two"], logits["three"], atol=1e-3)
    assert not torch.allclose(logits["two"], logits["swapped"], atol=1e-3)


def test_universeg_keeps_a_copy_of_its_examples(examples):
    network = tiny("universeg", 0.5)
    images, labels = examples
    network.set_support(images, labels)
    images.zero_()
    assert network.support_images.abs().sum() > 0


def test_universeg_without_fitting_examples(examples):
    network = tiny("universeg", 0.5)
    with pytest.raises(UserError, match="universeg has no support set; call set_support"):
        network(torch.randn(1, 1, 32, 40))
    network.set_support(*examples)
    with pytest.raises(UserError, match=r"support set has slices of 32×40, not 40×32"):
        network(torch.randn(1, 1, 40, 32))


@torch.no_grad()
def test_universeg_is_saved_with_its_examples(examples, tmp_path):
    network = tiny("universeg", 0.5).eval()
    network.set_support(*examples)
    x = torch.randn(2, 1, 32, 40)
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    unset = tiny("universeg", 0.5, seed=2).eval()
    others = tiny("universeg", 0.5, seed=2).eval()
    others.set_support(torch.randn(5, 1, 16, 16), torch.ones(5, 1, 16, 16))
    inside = nn.ModuleDict({"student": unset})
    inside.load_state_dict({f"student.{k}": v for k, v in load_file(tmp_path / "network.safetensors").items()})
    others.load_state_dict(load_file(tmp_path / "network.safetensors"))
    for loaded in (unset, others):
        torch.testing.assert_close(loaded(x).logits, network(x).logits, rtol=0, atol=0)


@torch.no_grad()
def test_universeg_without_examples_can_be_saved_and_loaded(tmp_path):
    save_file(tiny("universeg", 0.5).state_dict(), tmp_path / "network.safetensors")
    network = tiny("universeg", 0.5, seed=2)
    network.load_state_dict(load_file(tmp_path / "network.safetensors"))
    with pytest.raises(UserError, match="no support set"):
        network(torch.randn(1, 1, 32, 32))


def test_universeg_in_bf16(examples):
    network = tiny("universeg", 0.5).bfloat16()
    network.set_support(*examples)
    assert network(torch.randn(1, 1, 32, 40).bfloat16()).logits.isfinite().all()


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_mnet_convolves_a_slice_as_a_volume_of_depth_one(kernel):
    torch.manual_seed(0)
    ours = SliceConv3d(3, 5, kernel, padding="same").double()
    volume = nn.Conv3d(3, 5, kernel, padding="same").double()
    volume.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 1, 9, 11, dtype=torch.float64)
    results = [module(x) for module in (ours, volume)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, volume.weight.grad)
    torch.testing.assert_close(ours.bias.grad, volume.bias.grad)
