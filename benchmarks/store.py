"""The slice store against other ways of storing slices, side by side in one run.

    python -m benchmarks.store [--volumes 24] [--folder FOLDER] [--augment full]

Synthetic CT volumes of 512×512×64 are written as .nii.gz and prepared in each way: four of them, and for the store,
whose command takes a second to start, the same ones over and over under other names. Then batches of 16 random slices
of the four are read, cropped to 384, oriented and windowed to float32 NCHW with an integer mask. Compared:

    store     spark-data and spark_dist.data
    npz       the original system's way: one compressed .npz for each slice (float64 CT, int8 mask; ten threads), read
              with np.load, then window, crop, one-hot and turns in Python
    blosc2    memory-mapped blosc2 arrays with small blocks, as nnU-Net v2 stores them, and the store's own transforms
    monai     MONAI's PersistentDataset: windowed and cropped slices cached as .pt, MONAI's random flips and turns
    memory    MONAI's CacheDataset: the same, cached in memory, which must hold the whole data set as float32
    raw       a memory map of int16, and the store's own transforms: the limit

All ways are measured in turn, round after round; a ratio is the median of the rounds' ratios. The figure goes to
benchmarks/results/store.png, the numbers to store.json beside it.

With `--augment full`, only reading is measured, of augmented slices, into store-augmented.json: the store's, MONAI's
PersistentDataset with MONAI's transforms, and blosc2 with those of nnU-Net v2 (see `benchmarks.augmented`).
"""

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from benchmarks import augmented, readers
from benchmarks.readers import BATCH, SPEC
from benchmarks.volumes import DISTINCT, PREPARE, SHAPE, write_volumes
from data_tools.store import open_store, write_split
from spark_dist.data.batches import SliceDataset
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.slices import SliceTable, slice_table
from spark_dist.data.views import ORIENTATIONS

RESULTS = Path(__file__).parent / "results"
TARGETS = {"npz": 8, "monai": 3, "memory": 1, "blosc2": 1.2, "raw": 0.6}


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds that something takes, and that all cores work for it, its processes included."""
    start, worked = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - worked


Streams = dict[str, Callable[[int], Iterator]]
"""For each way, what makes an endless stream of ready batches with a number of workers."""


def rates(
    make: Streams, check: Callable[[dict], None], workers: int, rounds: int, span: float
) -> dict[str, list[float]]:
    """Batches per second of each way in each round of about `span` seconds; `check` compares what they read."""
    streams = {name: factory(workers) for name, factory in make.items()}
    if not workers:
        check(streams)
    for stream in streams.values():
        for _ in range(2 + 4 * workers):
            next(stream)
    found = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            # Batches that are ready beforehand are not counted, nor may workers go on while others are measured.
            for _ in range(2 * workers):
                next(stream)
            start, batches = time.perf_counter(), 0
            while (now := time.perf_counter()) - start < span:
                next(stream)
                batches += 1
            found[name].append(batches / (now - start))
            if workers:
                time.sleep(0.3)
    return found


def files_and_bytes(folder: Path) -> tuple[int, int]:
    """Number of files, and their bytes."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return len(sizes), sum(sizes)


def loader_growth(table: SliceTable) -> dict[str, float]:
    """Resident memory in MiB early and late in 10,000 epochs' worth of indices, a batch read in every 25th epoch."""
    dataset, sampler = SliceDataset(table, SPEC), EpochSampler(Order(len(table), BATCH, 0, ORIENTATIONS))
    memory = {}
    for epoch in range(10_000):
        sampler.epoch = epoch
        batches = list(sampler)
        if epoch % 25 == 0:
            dataset.__getitems__(batches[epoch % len(batches)])
        if epoch in (1_000, 9_999):
            gc.collect()
            memory[f"after {epoch + 1} epochs"] = psutil.Process().memory_info().rss / 2**20
    return memory


def report(result: dict) -> None:
    """Print the ratios beside their targets."""
    print(f"\n{result['machine']}")
    rows = [
        (f"prepare, slices per {what} over npz", result[key]["store"] / result[key]["npz"], "≥", 15)
        for key, what in (("prepare", "second"), ("work", "core's second"))
    ]
    rows += [
        (f"{what} over npz", result[what]["store"] / result[what]["npz"], "≤", t)
        for what, t in (("bytes", 0.75), ("files", 0.01))
    ]
    for workers, found in result["ratios"].items():
        rows += [(f"batches/s over {name}, {workers} workers", found[name], "≥", TARGETS[name]) for name in TARGETS]
    for what, ratio, sign, target in rows:
        met = ratio >= target if sign == "≥" else ratio <= target
        print(f"  {what:36}{ratio:8.3g}   target {sign} {target:<5g} {'met' if met else 'MISSED'}")
    print(
        "  batches/s: "
        + "; ".join(
            f"{w} workers " + ", ".join(f"{n} {r:.3g}" for n, r in f.items()) for w, f in result["batches"].items()
        )
    )
    print("  memory MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in result["memory"].items()))


def draw(result: dict, path: Path) -> None:
    """The figure."""
    colours = {"store": "#159f8e", "npz": "#9aa3ad", "monai": "#b58bc9", "memory": "#7d5a94"}
    colours |= {"blosc2": "#e0a33c", "raw": "#5b6470"}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 2.4))
    for axis, key, title in ((axes[0], "prepare", "prepared slices per second"), (axes[1], "bytes", "KB per slice")):
        values = {name: value / (1000 if key == "bytes" else 1) for name, value in result[key].items()}
        bars = axis.bar(list(values), list(values.values()), color=[colours[name] for name in values])
        axis.bar_label(bars, [f"{value:.0f}" for value in values.values()], fontsize=8)
        axis.set_title(title, fontsize=9)
    names = list(next(iter(result["batches"].values())))
    for k, (workers, found) in enumerate(result["batches"].items()):
        x = np.arange(len(names)) + (k - 0.5) * 0.4
        bars = axes[2].bar(x, [found[n] for n in names], 0.38, color=[colours[n] for n in names], alpha=1 - 0.4 * k)
        over = result["ratios"][workers]
        labels = [f"{found[n]:.0f}" + (f"\n({over[n]:.2g}×)" if n in over else "") for n in names]
        axes[2].bar_label(bars, labels, fontsize=7)
    axes[2].set_xticks(range(len(names)), names)
    axes[2].set_title("ready batches of 16 per second: 0 workers, 2 workers; (store over this)", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.suptitle(f"slices of 512×512 — {result['machine']}", fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def machine() -> str:
    """The processor and the versions, in a line."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    cores = len(os.sched_getaffinity(0))
    processor = names[0] if names else platform.processor()
    return f"{processor}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    """Measure, print and draw."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--volumes", type=int, default=24, help="volumes that the store is made of (default 24)")
    options.add_argument("--rounds", type=int, default=7, help="rounds of each way of reading (default 7)")
    options.add_argument("--span", type=float, default=1.0, help="seconds of a round (default 1)")
    options.add_argument("--folder", type=Path, help="where to work, kept (default: a temporary folder)")
    options.add_argument("--augment", choices=["flips", "full"], default="flips", help="what slices are read with")
    options = options.parse_args()
    warnings.filterwarnings("ignore", module="monai|torch")
    torch.set_num_threads(1)
    work = options.folder or Path(tempfile.mkdtemp(prefix="spark-store-"))
    name = "store" if options.augment == "flips" else "store-augmented"
    try:
        result = measure(work, options) if options.augment == "flips" else measure_augmented(work, options)
    finally:
        if not options.folder:
            shutil.rmtree(work)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if options.augment == "flips":
        report(result)
        draw(result, RESULTS / f"{name}.png")
    else:
        report_reading(result)


def measure(work: Path, options: argparse.Namespace) -> dict:
    """All the numbers."""
    nifti = work / "nifti"
    if not nifti.exists():
        print(f"writing {options.volumes} volumes", flush=True)
        write_volumes(nifti, options.volumes)
    result = {"machine": machine(), "slices": DISTINCT * SHAPE[0], "prepare": {}, "work": {}, "bytes": {}, "files": {}}
    folders = {name: work / name for name in (*PREPARE, "monai")}
    for name, prepare in PREPARE.items():
        print(f"preparing: {name}", flush=True)
        shutil.rmtree(folders[name], ignore_errors=True)
        slices = (options.volumes if name == "store" else DISTINCT) * SHAPE[0]
        wall, work = seconds(lambda prepare=prepare, name=name: prepare(nifti, folders[name]))
        result["prepare"][name], result["work"][name] = slices / wall, slices / work
        files, size = files_and_bytes(folders[name])
        result["files"][name], result["bytes"][name] = files / slices, size / slices
    memory = {"peak of a prepare process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}
    table = table_of(folders["store"])
    result |= read(readers.loaders(table, folders), readers.check_equal, options)
    print("10,000 epochs", flush=True)
    result["memory"] = memory | loader_growth(table)
    return result


def measure_augmented(work: Path, options: argparse.Namespace) -> dict:
    """The numbers of reading augmented slices."""
    folders = {name: work / name for name in ("store", "blosc2", "raw", "monai")}
    write_volumes(work / "nifti", DISTINCT)
    for name in ("store", "blosc2", "raw"):
        print(f"preparing: {name}", flush=True)
        PREPARE[name](work / "nifti", folders[name])
    table = table_of(folders["store"])
    read_all = augmented.loaders(table, folders)
    return {"machine": machine(), "slices": len(table)} | read(read_all, augmented.check_alike, options)


def table_of(folder: Path) -> SliceTable:
    """All slices of the distinct volumes of a store."""
    cases = list(open_store(folder).cases)[:DISTINCT]
    write_split(folder, "all", {"train": cases, "val": [], "test": [], "seed": 0})
    return slice_table(open_store(folder), "all", "train", "organ", "all")


def read(make: Streams, check: Callable[[dict], None], options: argparse.Namespace) -> dict:
    """Ready batches per second without workers and with two, and the store's over each other way's."""
    result = {"batches": {}, "ratios": {}}
    for workers in (0, 2):
        print(f"reading with {workers} workers", flush=True)
        found = rates(make, check, workers, options.rounds, options.span)
        result["batches"][str(workers)] = {name: statistics.median(values) for name, values in found.items()}
        result["ratios"][str(workers)] = {
            name: statistics.median(a / b for a, b in zip(found["store"], found[name], strict=True))
            for name in make
            if name != "store"
        }
        gc.collect()
    return result


def report_reading(result: dict) -> None:
    """Print ready batches per second, and the store's over each other way's."""
    print(f"\n{result['machine']}")
    for workers, found in result["batches"].items():
        for name, rate in found.items():
            ratio = result["ratios"][workers].get(name)
            print(f"  {workers} workers, {name:8}{rate:8.3g}" + (f"   the store {ratio:.2f} times" if ratio else ""))


if __name__ == "__main__":
    main()
