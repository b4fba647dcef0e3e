"""Gradients of every method for one global batch of five samples, however many processes share it. Writes argv[1]."""

import sys

import torch
from method_network import distillation, freeze_statistics, made_up_targets
from safetensors.torch import save_file

from spark_dist.data.order import EpochSampler, Order
from spark_dist.distillers import DISTILLERS
from spark_dist.networks import NetworkOutput
from spark_dist.training.distributed import make_accelerator, shut_down

N, SIDE = 5, 32

accelerator = make_accelerator()
sampler = EpochSampler(Order(N, N, 0), accelerator.process_index, accelerator.num_processes)
mine = torch.tensor(next(iter(sampler)))
gradients = {}
for method in sorted(DISTILLERS):
    module = distillation(method, N)
    image, mask, output = made_up_targets(N, SIDE)
    targets = module.distiller.teacher_targets(NetworkOutput(*(t[mine] for t in output)), mask[mine])
    model = accelerator.prepare(module)
    freeze_statistics(module)
    terms = model(image[mine], mask[mine], targets, mine)
    accelerator.backward(sum(terms.values()) * sampler.weight(0))
    gradients |= {f"{method}/{name}": p.grad.clone() for name, p in module.named_parameters()}
if accelerator.is_main_process:
    save_file(gradients, sys.argv[1])
shut_down(accelerator)
