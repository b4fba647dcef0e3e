"""Two steps of every network under DistributedDataParallel, which refuses parameters that take no part."""

import torch

from spark_dist.distillers.plain import Plain
from spark_dist.networks import NETWORKS, build_network
from spark_dist.training.distillation import Distillation
from spark_dist.training.distributed import make_accelerator, shut_down

accelerator = make_accelerator()
for name in sorted(NETWORKS):
    torch.manual_seed(0)
    network = build_network(name, width=0.1)
    image = torch.randn(2, 1, 64, 64)
    if hasattr(network, "set_support"):
        network.set_support(image, (image > 0).float())
    module = Distillation(network, Plain())
    model, optimizer = accelerator.prepare(module, torch.optim.Adam(module.parameters()))
    assert not model.find_unused_parameters
    target = (image[:, 0] > 0).float()
    for _ in range(2):
        terms = model(image, torch.stack([1 - target, target], dim=1), {}, torch.arange(2))
        accelerator.backward(sum(terms.values()))
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"{name} ok")
shut_down(accelerator)
