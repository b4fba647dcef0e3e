"""Gradients of every method for one global batch of five samples, however many processes share it. Writes argv[1]."""

import sys

import torch
from safetensors.torch import save_file
from torch import nn

from spark_dist.data import EpochSampler
from spark_dist.distillation import Distillation
from spark_dist.distillers import DISTILLERS, build_distiller
from spark_dist.distributed import make_accelerator, shut_down
from spark_dist.networks import NetworkOutput, Tap, Taps

N, SIDE = 5, 32
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


accelerator = make_accelerator()
sampler = EpochSampler(N, N, 0, (0,), accelerator.process_index, accelerator.num_processes)
mine = torch.tensor([key // 8 for key in next(iter(sampler))])
gradients = {}
for method in sorted(DISTILLERS):
    torch.manual_seed(0)
    student = Student()
    distiller = build_distiller(method, student=STUDENT, teacher=STUDENT if method == "tfkd" else TEACHER, samples=N)
    image = torch.randn(N, 1, SIDE, SIDE)
    target = (image[:, 0] > 0.5).float()
    mask = torch.stack([1 - target, target], dim=1)
    maps = [torch.randn(N, tap.channels, SIDE // tap.stride, SIDE // tap.stride) for tap in TEACHER]
    output = NetworkOutput(torch.randn(N, 2, SIDE, SIDE), *(m.relu() for m in maps))
    targets = distiller.teacher_targets(NetworkOutput(*(t[mine] for t in output)), mask[mine])
    module = Distillation(student, distiller)
    model = accelerator.prepare(module)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    terms = model(image[mine], mask[mine], targets, mine)
    accelerator.backward(sum(terms.values()) * sampler.weight(0))
    gradients |= {f"{method}/{name}": p.grad.clone() for name, p in module.named_parameters()}
if accelerator.is_main_process:
    save_file(gradients, sys.argv[1])
shut_down(accelerator)
