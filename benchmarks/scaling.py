"""The cost of a second process: python -m benchmarks.scaling [--network enet] [--batch 4] [--crop 192]

Weak scaling, one thread a process, the same number of slices in each. Three kinds of steps take turns in one run, so
that what else the machine does falls on all alike: one process alone; two at the same time that know nothing of each
other; two under DistributedDataParallel with gloo. Efficiency is the time of the first over that of the third; the
second says how much of what is missing is the machine's (cores, caches, memory) and not the communication's.

Each turn is two steps, of which the second counts. The processes keep freed memory, as all commands do: else glibc
gives some back after each step of the third kind, and the system has 20,000 pages to clear in the next one. A job has
200 (minor faults of `spark_dist.train` with 8 epochs less those with 2, by steps).
"""

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from spark_dist.cli import keep_freed_memory
from spark_dist.networks import build_network
from spark_dist.training.distributed import DDP

TARGET = 0.9


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    """Measure in one of the two processes; the first prints."""
    keep_freed_memory()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    networks = [build_network(options.network) for _ in range(2)]
    parallel = DistributedDataParallel(networks[1], **DDP)
    optimizers = [torch.optim.Adam(network.parameters(), fused=True) for network in networks]
    image = torch.randn(options.batch, 1, options.crop, options.crop)
    target = (image[:, 0] > 0).float()
    mask = torch.stack([1 - target, target], dim=1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(image).logits, mask)
        loss.backward()
        optimizer.step()

    def reduce(size: int) -> float:
        flat = torch.zeros(size)
        start = time.perf_counter()
        dist.all_reduce(flat)
        return time.perf_counter() - start

    size = sum(p.numel() for p in networks[0].parameters())
    times: dict[str, list[float]] = {"alone": [], "two, apart": [], "two, DDP": []}
    reduces = []
    for number in range(options.rounds + 1):
        for name in times:
            dist.barrier()
            if name == "alone" and rank:
                continue
            for _ in range(2):
                start = time.perf_counter()
                if name == "two, DDP":
                    step(parallel, optimizers[1])
                else:
                    step(networks[0], optimizers[0])
                taken = time.perf_counter() - start
            if number:
                times[name].append(taken)
        dist.barrier()
        reduces.append(reduce(size))
    if rank == 0:
        report(options, size, times, statistics.median(reduces))
    dist.destroy_process_group()


def report(options: argparse.Namespace, size: int, times: dict[str, list[float]], reduced: float) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{options.network}, {options.batch}×{options.crop}², {len(times['alone'])} rounds, one thread a process")
    for name, value in median.items():
        print(f"  {name:11} {1000 * value:8.1f} ms a step, efficiency {median['alone'] / value:.3f}")
    megabytes = 4 * size / 1e6
    print(f"  all-reduce of {megabytes:.1f} MB alone: {1000 * reduced:.1f} ms, {megabytes / 1000 / reduced:.2f} GB/s")
    efficiency = median["alone"] / median["two, DDP"]
    apart = median["alone"] / median["two, apart"]
    print(
        f"  efficiency {efficiency:.3f} (target {TARGET}): the machine keeps {apart:.3f} of two processes that do not "
        f"talk, communication and its bookkeeping {efficiency / apart:.3f} of that"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="enet")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(work, args=(port, options), nprocs=2)


if __name__ == "__main__":
    main()
