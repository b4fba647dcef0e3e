import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError
from spark_dist.networks import NETWORKS, build_network
from spark_dist.networks.resnet import load_pretrained

# parameters, GFLOPs at 384×384 (a multiply-add counts 2), channels and stride of low and high
EXPECTED = {
    # 2.048 GFLOPs were measured without bottleneck 3.5, which is 17,408 weights at 48×48: another 0.080.
    "enet": (353_761, 2.048 + 0.080, (16, 2), (128, 8)),
    "erfnet": (2_063_130 - 258, 14.869, (16, 2), (128, 8)),
    "espnet": (183_725, 1.229, (16, 2), (256, 8)),
    "mobilenetv2": (2_228_996 - 2_562, 19.141, (32, 2), (1280, 8)),
    "pspnet": (46_706_626, 207.176, (64, 2), (2048, 8)),
    "raunet": (22_143_394, 26.462, (64, 2), (128, 8)),
    "resnet18": (11_177_538, 10.660, (64, 2), (128, 8)),
    "resnet34": (21_285_698, 21.531, (64, 2), (128, 8)),
    "resnet50": (23_512_130, 24.024, (64, 2), (512, 8)),
    "unet": (34_525_954, 293.742, (128, 2), (1024, 16)),
}


def stride_of(name):
    with torch.device("meta"):
        return build_network(name, width=0.1).stride


def build_for(name, height, columns, in_channels=1, classes=2, width=0.1):
    """A network that takes slices of this size, with a support set where it wants one."""
    torch.manual_seed(0)
    network = build_network(name, in_channels, classes, width)
    if hasattr(network, "set_support"):
        labels = torch.randint(classes, (3, 1, height, columns))
        network.set_support(torch.randn(3, in_channels, height, columns), labels)
    return network


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_network_is_what_it_was_published_as(name):
    parameters, gflops, low, high = EXPECTED[name]
    with torch.device("meta"):
        network = build_network(name).eval()
        slices = torch.zeros(1, 1, 384, 384)
        with FlopCounterMode(display=False) as counter:
            output = network(slices)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.02)
    assert network.taps == (low, high)
    assert output.logits.shape == (1, 2, 384, 384)
    assert output.low.shape == (1, low[0], 384 // low[1], 384 // low[1])
    assert output.high.shape == (1, high[0], 384 // high[1], 384 // high[1])


@pytest.mark.parametrize(
    ("in_channels", "classes", "width"), [(1, 2, 0.25), (3, 7, 0.1), (1, 2, 0.02), (3, 3, 0.1), (5, 3, 0.02)]
)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_parameter_gets_a_gradient_and_taps_are_as_declared(name, in_channels, classes, width):
    stride = stride_of(name)
    height, columns = 2 * stride, 3 * stride
    network = build_for(name, height, columns, in_channels, classes, width)
    output = network(torch.randn(2, in_channels, height, columns))
    assert output.logits.shape == (2, classes, height, columns)
    for feature, tap in zip((output.low, output.high), network.taps, strict=True):
        assert feature.shape == (2, tap.channels, height // tap.stride, columns // tap.stride)
    output.logits.square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_logits_are_raw(name):
    side = 2 * stride_of(name)
    network = build_for(name, side, side).eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 1, side, side)).logits
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_bf16_autocast(name):
    side = 2 * stride_of(name)
    network = build_for(name, side, side)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.randn(2, 1, side, side))
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_size_that_does_not_fit_is_refused(name):
    with torch.device("meta"):
        stride = stride_of(name)
        side = 4 * stride
        network = build_for(name, side, side).eval()
        for height, columns in ((side, side - stride // 2), (side + 1, side)):
            with pytest.raises(UserError, match=f"{re.escape(name)} .*{stride}.*{height}×{columns}"):
                network(torch.zeros(1, 1, height, columns))


@pytest.mark.parametrize("name", ["pspnet", "raunet"])
def test_batch_norm_of_a_global_mean_refuses_to_train_on_one_slice(name):
    network = build_network(name, width=0.1)
    slices = torch.randn(1, 1, 64, 64)
    with pytest.raises(UserError, match=f"{name}.*batch of two"):
        network(slices)
    network.eval()(slices)


@pytest.mark.parametrize(("name", "dropout"), [("enet", {0.01, 0.1}), ("erfnet", {0.03, 0.3}), ("pspnet", {0.1})])
def test_dropout_is_as_published(name, dropout):
    network = build_network(name, width=0.1)
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout2d)} - {0} == dropout


def classifier(network, **more):
    """Weights as of an ImageNet classifier with the encoder of `network`."""
    torch.manual_seed(1)
    weights = {k: torch.rand(v.shape).to(v.dtype) for k, v in network.encoder.state_dict().items()}
    return weights | {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)} | more


@pytest.mark.parametrize(("name", "keys"), [("resnet18", 122), ("resnet34", 218), ("resnet50", 320), ("raunet", 218)])
def test_the_encoder_has_torchvisions_names(name, keys):
    with torch.device("meta"):
        weights = classifier(build_network(name))
    assert len(weights) == keys
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.downsample.1.bias"} <= set(weights)
    assert weights["conv1.weight"].shape == (64, 3, 7, 7)
    assert weights["layer4.0.downsample.0.weight"].shape[:2] == ((2048, 1024) if name == "resnet50" else (512, 256))


@pytest.mark.parametrize("name", ["raunet", "pspnet", "resnet18", "resnet50"])
@pytest.mark.parametrize(("file", "save"), [("a.safetensors", save_file), ("a.pth", torch.save)])
def test_pretrained_weights_fill_the_encoder(tmp_path, name, file, save):
    network = build_network(name, width=0.05)
    weights = classifier(network)
    save(weights, tmp_path / file)
    load_pretrained(network, tmp_path / file)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", ["raunet", "pspnet"])
@pytest.mark.parametrize("in_channels", [2, 3, 5, 6])
def test_pretrained_weights_for_neighbouring_slices(tmp_path, name, in_channels):
    network = build_network(name, in_channels, width=0.05)
    weights = classifier(network, **{"conv1.weight": torch.rand(len(network.encoder.conv1.weight), 3, 7, 7)})
    if name == "pspnet":
        weights["conv1.weight"] = weights["conv1.weight"][..., :3, :3].contiguous()
    save_file(weights, tmp_path / "a.safetensors")
    load_pretrained(network, tmp_path / "a.safetensors")
    kernels, colours = network.encoder.conv1.weight, weights["conv1.weight"]
    assert kernels.shape[1] == in_channels
    for c in range(in_channels):
        torch.testing.assert_close(kernels[:, c], colours[:, c % 3] * 3 / in_channels)
    if in_channels == 3:
        assert torch.equal(kernels, colours)
    assert torch.equal(network.encoder.bn1.bias, weights["bn1.bias"])


def test_pretrained_weights_without_counters_of_batches(tmp_path):
    network = build_network("resnet18", width=0.05)
    weights = {k: v for k, v in classifier(network).items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth")
    load_pretrained(network, tmp_path / "old.pth")
    assert torch.equal(network.encoder.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_wrong_pretrained_weights_are_refused(tmp_path):
    network = build_network("resnet18", width=0.05)
    before = network.encoder.conv1.weight.clone()
    weights = classifier(network, **{"conv1.weight": torch.zeros(5, 3, 7, 7), "layer5.weight": torch.zeros(2)})
    del weights["bn1.bias"]
    torch.save(weights, tmp_path / "other.pth")
    wanted = r"other.pth.*3 keys differ.*conv1.weight \(5×3×7×7 in.*bn1.bias \(none in the file.*layer5.weight \(2 in"
    with pytest.raises(UserError, match=wanted):
        load_pretrained(network, tmp_path / "other.pth")
    assert torch.equal(network.encoder.conv1.weight, before)

    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for file, reason in {
        "list.pth": "holds a list",
        "text.pth": "is no state dict",
        "text.safetensors": "is no state dict",
        "missing.pth": "does not exist",
    }.items():
        with pytest.raises(UserError, match=f"{file} {reason}"):
            load_pretrained(network, tmp_path / file)
    with pytest.raises(UserError, match="ResNet encoder, which UNet has not"):
        load_pretrained(build_network("unet", width=0.05), tmp_path / "other.pth")
