"""The time of a prediction: python -m benchmarks.predict

One volume in int16 becomes a label map: by the `Predictor` that `spark-dist predict` uses, and by MONAI's inferer for
slices (a `SlidingWindowInferer` whose window is the plane) between MONAI's windowing and an argmax; beside both, the
network's own forward passes over slices that are prepared already. The same network, batch, torch and threads. They
take turns, in an order that is drawn anew for each round, so that what else the machine does falls on all alike; a
figure is the median of the rounds. Reading and writing files is not measured. Freed memory is kept, as by all commands
of spark-dist; --glibc leaves that to glibc's defaults, as any other program does.

On a machine that others use as well, `--clock cpu --threads 1` counts the seconds of all of the process's threads in
place of the wall clock's.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.inferers import SliceInferer
from monai.transforms import ScaleIntensityRange

from data_tools.preparation import Preparation
from data_tools.scans import scan_of
from spark_dist.cli import keep_freed_memory
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.inference import BATCH
from spark_dist.evaluation.prediction import Predictor
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import ModelCard

WINDOW = (-200, 300)
"""HU"""
RESULTS = Path(__file__).parent / "results" / "predict.md"


def volume(side: int, slices: int) -> np.ndarray:
    """Smooth noise in whole HU, axes as nibabel has them (X, Y, Z) int16."""
    coarse = np.random.default_rng(0).normal(0, 150, (-(-side // 8), -(-side // 8), slices))
    return np.rint(coarse.repeat(8, 0).repeat(8, 1)[:side, :side]).astype(np.int16)


def contestants(network: torch.nn.Module, card: ModelCard, voxels: np.ndarray) -> dict[str, Callable[[], object]]:
    """The functions that are measured, by name. The first two return the label map (Z, H, W)."""
    scan = scan_of(voxels, np.diag([-1.0, -1.0, 1.0, 1.0]), card.preparation)
    predictor = Predictor(network, card)
    window = ScaleIntensityRange(*WINDOW, -1, 1, clip=True)
    inferer = SliceInferer(roi_size=scan.image.shape[1:], sw_batch_size=BATCH, spatial_dim=0)
    prepared = window(torch.from_numpy(scan.image).float())[:, None].split(BATCH)

    @torch.no_grad()
    def monai() -> np.ndarray:
        slices = window(torch.from_numpy(scan.image).float())
        return inferer(slices[None, None], lambda x: network(x).logits).argmax(dim=1)[0].numpy().astype(np.uint8)

    @torch.no_grad()
    def alone() -> None:
        for batch in prepared:
            network(batch)

    return {"predict": lambda: predictor.predict_scan(scan).classes, "MONAI": monai, "the network alone": alone}


def measure(work: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each round."""
    seconds, order, generator = {name: [] for name in work}, list(work), random.Random(0)
    for k in range(rounds):
        generator.shuffle(order)
        for name in order:
            start = clock()
            work[name]()
            seconds[name].append(clock() - start)
        print(
            f"round {k + 1} of {rounds}: { ({name: round(times[-1], 1) for name, times in seconds.items()}) }",
            flush=True,
        )
    return seconds


def table(seconds: dict[str, list[float]], about: str) -> str:
    own = statistics.median(seconds["the network alone"])
    lines = [about, "", "| | seconds (median) | fastest and slowest | of the network's own time |", "|---|---|---|---|"]
    for name, times in seconds.items():
        middle = statistics.median(times)
        lines.append(f"| {name} | {middle:.1f} | {min(times):.1f} … {max(times):.1f} | {middle / own:.3f} |")
    ratio = statistics.median(m / p for m, p in zip(seconds["MONAI"], seconds["predict"], strict=True))
    return "\n".join(
        [*lines, "", f"MONAI takes {ratio:.3f} times as long as predict (median of the rounds' ratios).", ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="enet")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--glibc", action="store_true", help="do not keep freed memory")
    options = parser.parse_args()
    if not options.glibc:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = build_network(options.network, width=options.width).eval()
    card = ModelCard(
        network=options.network,
        width=options.width,
        seed=0,
        dataset="noise",
        split="default",
        spec=SliceSpec("organ", Crop((options.side, options.side))),
        preparation=Preparation(kind="fixed", low=WINDOW[0], high=WINDOW[1]),
        label_values=(1,),
    )
    few = contestants(network, card, volume(options.side, 4))
    agree = (few["predict"]() == few["MONAI"]()).mean()  # and all is warmed up
    few["the network alone"]()
    work = contestants(network, card, volume(options.side, options.slices))
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    machine = f"torch {torch.__version__}, {platform.processor() or platform.machine()}"
    about = (
        f"{options.network}, {options.side}×{options.side}×{options.slices}, {options.threads} threads, "
        f"{options.clock} clock, median of {options.rounds} rounds, {machine}, freed memory "
        f"{'given back' if options.glibc else 'kept'}; {100 * agree:.3f} % of voxels have the "
        "same label by predict and by MONAI."
    )
    text = table(measure(work, options.rounds, clock), about)
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
