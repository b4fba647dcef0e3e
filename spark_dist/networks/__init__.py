"""Segmentation networks by name.

A network is an `nn.Module` built as `Network(in_channels, classes, width)`. It has the attributes `taps`
(`Taps`: channels and stride of its two feature maps) and `stride` (the crop's sides must be multiples of it),
and its forward takes (N, in_channels, H, W) and returns a `NetworkOutput`. Every parameter takes part in the
logits. A new network is one file and one line here.
"""

from functools import partial

from torch import nn

from data_tools.errors import unknown_name

from .base import NetworkOutput, Tap, Taps
from .deeplabv3plus import DeepLabV3Plus
from .enet import ENet
from .erfnet import ERFNet
from .espnet import ESPNet
from .mnet import MNet
from .mobilenetv2 import MobileNetV2
from .pspnet import PSPNet
from .raunet import RAUNet
from .resnet import ResNet
from .unet import UNet
from .unet2022 import UNet2022
from .unetplusplus import UNetPlusPlus
from .universeg import UniverSeg

__all__ = ["NETWORKS", "NetworkOutput", "Tap", "Taps", "build_network"]

NETWORKS = {
    "deeplabv3+": DeepLabV3Plus,
    "enet": ENet,
    "erfnet": ERFNet,
    "espnet": ESPNet,
    "mnet": MNet,
    "mobilenetv2": MobileNetV2,
    "pspnet": PSPNet,
    "raunet": RAUNet,
    "resnet18": partial(ResNet, "resnet18"),
    "resnet34": partial(ResNet, "resnet34"),
    "resnet50": partial(ResNet, "resnet50"),
    "unet": UNet,
    "unet++": UNetPlusPlus,
    "unet2022": UNet2022,
    "universeg": UniverSeg,
}


def build_network(name: str, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> nn.Module:
    """A network with fresh weights.

    `width` multiplies the number of filters of every layer (1.0 is the published network).

    Raises `UserError` for a name that is not in `NETWORKS`.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    return NETWORKS[name](in_channels=in_channels, classes=classes, width=width)
