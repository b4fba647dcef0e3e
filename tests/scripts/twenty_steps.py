"""Twenty steps of Adam of every method on 31 samples in batches of nine, however many processes share them. Writes each
method's weights to argv[1]."""

import sys

import torch
from method_network import distillation, freeze_statistics, made_up_targets
from safetensors.torch import save_file

from spark_dist.data.order import EpochSampler, Order
from spark_dist.distillers import DISTILLERS
from spark_dist.training.distributed import make_accelerator, shut_down

N, SIDE, BATCH, STEPS = 31, 32, 9, 20

accelerator = make_accelerator()
weights = {}
for method in sorted(DISTILLERS):
    module = distillation(method, N)
    image, mask, output = made_up_targets(N, SIDE)
    model, optimizer = accelerator.prepare(module, torch.optim.Adam(module.parameters(), lr=1e-3))
    freeze_statistics(module)
    sampler = EpochSampler(Order(N, BATCH, 0), accelerator.process_index, accelerator.num_processes)
    for epoch in range(STEPS // sampler.steps):
        sampler.epoch = epoch
        for step, keys in enumerate(sampler):
            mine = torch.tensor(keys)
            targets = module.distiller.teacher_targets(type(output)(*(t[mine] for t in output)), mask[mine])
            accelerator.backward(sum(model(image[mine], mask[mine], targets, mine).values()) * sampler.weight(step))
            optimizer.step()
            optimizer.zero_grad()
    weights |= {f"{method}/{name}": p.detach().clone() for name, p in module.named_parameters()}
if accelerator.is_main_process:
    save_file(weights, sys.argv[1])
shut_down(accelerator)
