"""A student of convolutions and a made-up teacher, for scripts that go through all methods."""

import torch
from torch import nn

from spark_dist.distillers import build_distiller
from spark_dist.networks import NetworkOutput, Tap, Taps
from spark_dist.training.distillation import Distillation

STUDENT = Taps(low=Tap(4, 2), high=Tap(6, 8))
TEACHER = Taps(low=Tap(8, 2), high=Tap(10, 16))


class Student(nn.Module):
    """Without normalisation and dropout, which make a step depend on how the batch is shared."""

    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(1, 4, 2, stride=2)
        self.high = nn.Conv2d(4, 6, 4, stride=4)
        self.head = nn.ConvTranspose2d(6, 2, 8, stride=8)

    def forward(self, x):
        low = self.low(x).tanh()
        high = self.high(low).tanh()
        return NetworkOutput(self.head(high), low, high)


def distillation(method, samples):
    """A fresh student and a method, the same in every process."""
    torch.manual_seed(0)
    student = Student()
    teacher = STUDENT if method == "tfkd" else TEACHER
    return Distillation(student, build_distiller(method, student=STUDENT, teacher=teacher, samples=samples))


def freeze_statistics(module):
    """Batch norms no longer look at the batch, which differs with how it is shared."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def made_up_targets(n, side):
    """Images, masks and a teacher's outputs of n samples."""
    image = torch.randn(n, 1, side, side)
    target = (image[:, 0] > 0.5).float()
    maps = [torch.randn(n, tap.channels, side // tap.stride, side // tap.stride) for tap in TEACHER]
    output = NetworkOutput(torch.randn(n, 2, side, side), *(m.relu() for m in maps))
    return image, torch.stack([1 - target, target], dim=1), output
