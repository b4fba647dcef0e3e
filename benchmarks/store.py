"""The slice store against other ways of storing slices, side by side in one run.

    python -m benchmarks.store [--volumes 24] [--folder FOLDER]

Synthetic CT volumes of 512×512×64 are written as .nii.gz and prepared in each way: four of them, and for the store,
whose command takes a second to start, the same ones over and over under other names. Then batches of 16 random slices
of the four are read, cropped to 384, oriented and windowed to float32 NCHW with an integer mask. Compared:

    store     spark-data and spark_dist.data
    npz       the original system's way: one compressed .npz for each slice (float64 CT, int8 mask; ten threads), read
              with np.load, then window, crop, one-hot and turns in Python
    blosc2    memory-mapped blosc2 arrays with small blocks, as nnU-Net v2 stores them, and the store's own transforms
    monai     MONAI's PersistentDataset: windowed and cropped slices cached as .pt, MONAI's random flips and turns
    raw       a memory map of int16, and the store's own transforms: the limit

All ways are measured in turn, round after round; a ratio is the median of the rounds' ratios. The figure goes to
benchmarks/results/store.png, the numbers to store.json beside it.
"""

import argparse
import gc
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter, zoom
from torch.utils.data import DataLoader, Dataset

from data_tools.store import Store, open_store, write_split
from spark_dist.data.batches import RawBatch, SliceDataset, windowed
from spark_dist.data.cache import Entries
from spark_dist.data.loader import training_loader
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.shared_memory import ALIGNMENT, empty_array
from spark_dist.data.slices import SliceTable, slice_table
from spark_dist.data.views import ORIENTATIONS, Crop, SliceSpec, orient

SHAPE = (64, 512, 512)
DISTINCT = 4
CROP = Crop((384, 384), (-14, -4))
SPEC = SliceSpec("organ", CROP)
BATCH = 16
WINDOW = (-200.0, 300.0)
KINDS = {"image": np.int16, "label": np.uint8}
RESULTS = Path(__file__).parent / "results"
TARGETS = {"npz": 8, "monai": 3, "blosc2": 1.2, "raw": 0.6}


# The volumes ----------------------------------------------------------------------------------------------------------


def volume(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A CT-like volume (Z, H, W): a body with organs in air on a table, with the noise of a soft reconstruction, which
    is about half as strong in air."""
    z, y, x = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
    image = np.full(SHAPE, -1000, np.float32)
    label = np.zeros(SHAPE, np.uint8)
    image[np.broadcast_to((np.abs(y - 0.72) < 0.015) & (np.abs(x) < 0.8), SHAPE)] = -300
    image[np.broadcast_to((y / 0.62) ** 2 + (x / 0.85) ** 2 < 1, SHAPE)] = -100
    inside = np.broadcast_to((y / 0.55) ** 2 + (x / 0.76) ** 2 < 1, SHAPE)
    image[inside] = 40

    def ball(low: float, high: float) -> np.ndarray:
        centre, radii = random.uniform((-0.6, -0.3, -0.5), (0.6, 0.3, 0.5)), random.uniform(low, high, 3) * (3, 1, 1)
        places = ((axis - c) / r for axis, c, r in zip((z, y, x), centre, radii, strict=True))
        return (sum(place**2 for place in places) < 1) & inside

    for _ in range(40):
        image[ball(0.02, 0.2)] = random.choice([-950, -80, 10, 60, 110, 180])
    for _ in range(2):
        organ = ball(0.15, 0.25)
        image[organ], label[organ] = 150, 1
        tumour = ball(0.03, 0.1) & organ
        image[tumour], label[tumour] = 90, 2
    # Tissue varies, by some HU over some millimetres.
    texture = zoom(random.standard_normal((16, 64, 64), dtype=np.float32), (4, 8, 8), order=1)
    image[inside] += 25 * texture[inside]
    image[np.broadcast_to(((y - 0.4) / 0.1) ** 2 + (x / 0.12) ** 2 < 1, SHAPE)] = 400
    for k in range(len(image)):
        noise = gaussian_filter(random.standard_normal(SHAPE[1:], dtype=np.float32), 0.7)
        image[k] = gaussian_filter(image[k], 0.8) + noise / noise.std() * np.where(image[k] < -500, 10, 18)
    return image.clip(-1024, 3071).round().astype(np.int16), label


def write_volumes(folder: Path, number: int) -> None:
    """Volumes in the KiTS layout, slices first. After the first ones they are the same again, under other names."""
    affine = np.array([[0, 0, -0.78, 0], [0, -0.78, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 1]])
    for k in range(number):
        case = folder / f"case_{k:05}"
        case.mkdir(parents=True)
        if k >= DISTINCT:
            for file in (folder / f"case_{k % DISTINCT:05}").iterdir():
                os.link(file, case / file.name)
            continue
        for name, voxels in zip(("imaging", "segmentation"), volume(np.random.default_rng(k)), strict=True):
            nibabel.save(nibabel.Nifti1Image(voxels, affine), case / f"{name}.nii.gz")


def cases_of(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, image and label of each distinct case, slices first in memory too."""
    for case in sorted(folder.iterdir())[:DISTINCT]:
        files = (nibabel.load(case / f"{name}.nii.gz") for name in ("imaging", "segmentation"))
        yield case.name, *(np.ascontiguousarray(file.dataobj) for file in files)


# Ways to prepare them -------------------------------------------------------------------------------------------------


def prepare_store(nifti: Path, out: Path) -> None:
    """The command as users run it, its start included."""
    command = [sys.executable, "-m", "data_tools", "prepare", nifti, out, "--layout", "kits", "--labels"]
    subprocess.run([*map(str, command), "organ=1,tumour=2"], check=True, stdout=subprocess.DEVNULL)


def prepare_npz(nifti: Path, out: Path) -> None:
    """One file for each slice, ten threads."""
    out.mkdir()
    with ThreadPoolExecutor(10) as pool:
        for name, image, label in cases_of(nifti):
            ct, mask = image.astype(np.float64), label.astype(np.int8)
            save = [
                pool.submit(np.savez_compressed, out / f"{name}_{z}", ct=ct[z], mask=mask[z]) for z in range(len(ct))
            ]
            for future in save:
                future.result()


def prepare_blosc2(nifti: Path, out: Path) -> None:
    """One file for each array; blocks that fit the first cache, chunks of a slice."""
    out.mkdir()
    for name, *arrays in cases_of(nifti):
        for kind, array in zip(("image", "label"), arrays, strict=True):
            blosc2.asarray(
                array,
                urlpath=str(out / f"{name}_{kind}.b2nd"),
                chunks=(1, *SHAPE[1:]),
                blocks=(1, 128, 128 // array.itemsize),
                cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
                mmap_mode="w+",
            )


def prepare_raw(nifti: Path, out: Path) -> None:
    """One .npy for each array."""
    out.mkdir()
    for name, image, label in cases_of(nifti):
        np.save(out / f"{name}_image.npy", image)
        np.save(out / f"{name}_label.npy", label)


PREPARE = {"store": prepare_store, "npz": prepare_npz, "blosc2": prepare_blosc2, "raw": prepare_raw}


# Ways to read batches -------------------------------------------------------------------------------------------------


class MappedDataset(Dataset):
    """Batches with the store's transforms from arrays that are indexed like NumPy's."""

    def __init__(self, table: SliceTable, folder: Path, ending: str):
        self.table, self.folder, self.ending = table, folder, ending
        self.arrays = {}

    def open(self, name: str, kind: str):
        """An array, opened when it is first needed."""
        if (name, kind) not in self.arrays:
            path = str(self.folder / f"{name}_{kind}.{self.ending}")
            if self.ending == "npy":
                self.arrays[name, kind] = np.load(path, mmap_mode="r")
            else:
                self.arrays[name, kind] = blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})
        return self.arrays[name, kind]

    def __getitems__(self, keys: list[int]) -> RawBatch:
        rows, columns = CROP.overlap(SHAPE[1:])[0]
        arrays = {kind: empty_array((len(keys), 1, *CROP.size), dtype) for kind, dtype in KINDS.items()}
        for n, key in enumerate(keys):
            name = self.table.cases[self.table.case[key // ORIENTATIONS]]
            z = int(self.table.slice[key // ORIENTATIONS])
            for kind, out in arrays.items():
                out[n, 0] = orient(self.open(name, kind)[z, rows, columns], key % ORIENTATIONS)
        arrays["label"] = arrays["label"][:, 0]
        arrays["window"], arrays["keys"] = empty_array((len(keys), 2), np.float32), np.array(keys)
        arrays["window"][:] = WINDOW
        return RawBatch(**{kind: torch.from_numpy(array) for kind, array in arrays.items()}, entries=Entries(None))

    def batch_bytes(self, n: int) -> int:
        """Bytes of a batch, at most."""
        return n * (math.prod(CROP.size) * 3 + 3 * ALIGNMENT)


class NpzDataset(Dataset):
    """The original's: everything for one slice in Python."""

    def __init__(self, table: SliceTable, folder: Path):
        self.table, self.folder = table, folder

    def __getitem__(self, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, orientation = divmod(key, ORIENTATIONS)
        name = f"{self.table.cases[self.table.case[row]]}_{self.table.slice[row]}.npz"
        with np.load(self.folder / name) as file:
            ct, mask = file["ct"], file["mask"]
        ct = (np.clip(ct, *WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 2 - 1
        mask = np.stack([mask == 0, mask > 0]).astype(np.float32)
        rows, columns = CROP.overlap(SHAPE[1:])[0]
        ct, mask = ct[rows, columns], mask[:, rows, columns]
        if orientation >= 4:
            ct, mask = ct[:, ::-1], mask[..., ::-1]
        ct, mask = np.rot90(ct, orientation % 4), np.rot90(mask, orientation % 4, axes=(1, 2))
        return torch.from_numpy(ct.astype(np.float32))[None], torch.from_numpy(mask.copy())


def monai_dataset(table: SliceTable, raw: Path, folder: Path) -> Dataset:
    """Slices by row, the deterministic part cached on disk."""
    from monai.data import PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureTyped,
        Lambda,
        RandFlipd,
        RandRotate90d,
        ScaleIntensityRanged,
        SpatialCropd,
    )

    arrays = {file.stem: np.load(file, mmap_mode="r") for file in raw.glob("*.npy")}

    def load(item: dict) -> dict:
        kinds = ("image", "label")
        return {kind: np.array(arrays[f"{item['case']}_{kind}"][item["slice"]])[None] for kind in kinds}

    inside = CROP.overlap(SHAPE[1:])[0]
    start, end = ([getattr(part, side) for part in inside] for side in ("start", "stop"))
    transforms = Compose(
        [
            Lambda(load),
            EnsureTyped(["image", "label"], dtype=[torch.float32, torch.uint8], track_meta=False),
            ScaleIntensityRanged("image", *WINDOW, -1, 1, clip=True),
            SpatialCropd(["image", "label"], roi_start=start, roi_end=end),
            RandFlipd(["image", "label"], prob=0.5, spatial_axis=1),
            RandRotate90d(["image", "label"], prob=0.75, max_k=3),
        ]
    )
    items = [{"case": table.cases[c], "slice": int(z)} for c, z in zip(table.case, table.slice, strict=True)]
    return PersistentDataset(items, transforms, cache_dir=folder)


def loaders(table: SliceTable, folders: dict[str, Path]) -> dict[str, Callable[[int], Iterator]]:
    """For each way, what makes an endless stream of ready batches with a number of workers."""

    def sampler() -> EpochSampler:
        return EpochSampler(Order(len(table), BATCH, 0, ORIENTATIONS))

    def endless(loader: DataLoader, epochs: EpochSampler, ready: Callable) -> Iterator:
        for epoch in range(10**9):
            epochs.epoch = epoch
            yield from map(ready, loader)

    def own(dataset: Dataset, workers: int) -> Iterator:
        epochs = sampler()
        return endless(
            training_loader(dataset, epochs, workers), epochs, lambda b: (windowed(b.image, b.window), b.label)
        )

    def by_slice(dataset: Dataset, workers: int, ready: Callable, keyed: bool = True) -> Iterator:
        epochs = sampler()
        batches = epochs if keyed else RowsOf(epochs)
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers else None,
        )
        return endless(loader, epochs, ready)

    monai = monai_dataset(table, folders["raw"], folders["monai"])
    for row in range(len(table)):
        monai[row]  # now it is in its cache
    return {
        "store": lambda n: own(SliceDataset(table, SPEC), n),
        "npz": lambda n: by_slice(NpzDataset(table, folders["npz"]), n, lambda b: (b[0], b[1])),
        "monai": lambda n: by_slice(monai, n, lambda b: (b["image"], b["label"]), keyed=False),
        "blosc2": lambda n: own(MappedDataset(table, folders["blosc2"], "b2nd"), n),
        "raw": lambda n: own(MappedDataset(table, folders["raw"], "npy"), n),
    }


class RowsOf:
    """A sampler's batches as rows of the slice table, without the orientations."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        return ([key // ORIENTATIONS for key in keys] for keys in self.sampler)


def check_equal(streams: dict[str, Iterator]) -> None:
    """The ways that say they do the same do the same."""
    image, label = next(streams["store"])
    for name in ("raw", "blosc2"):
        other, mask = next(streams[name])
        assert torch.equal(image, other), name
        assert torch.equal(label, mask), name
    other, mask = next(streams["npz"])
    assert torch.allclose(image, other, atol=1e-6)
    assert torch.equal(mask[:, 1] > 0, label > 0)
    assert next(streams["monai"])[0].shape == image.shape


# Measuring ------------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """How long something takes, and how long all cores work for it, its processes included."""
    start, worked = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - worked


def rates(make: dict[str, Callable[[int], Iterator]], workers: int, rounds: int, span: float) -> dict[str, list[float]]:
    """Batches per second of each way in each round of about `span` seconds."""
    streams = {name: factory(workers) for name, factory in make.items()}
    if not workers:
        check_equal(streams)
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
    """How many files there are, and their bytes."""
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


# The report -----------------------------------------------------------------------------------------------------------


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
    colours = {"store": "#159f8e", "npz": "#9aa3ad", "monai": "#b58bc9", "blosc2": "#e0a33c", "raw": "#5b6470"}
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
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--volumes", type=int, default=24, help="volumes that the store is made of (default 24)")
    options.add_argument("--rounds", type=int, default=7, help="rounds of each way of reading (default 7)")
    options.add_argument("--span", type=float, default=1.0, help="seconds of a round (default 1)")
    options.add_argument("--folder", type=Path, help="where to work, kept (default: a temporary folder)")
    options = options.parse_args()
    warnings.filterwarnings("ignore", module="monai|torch")
    torch.set_num_threads(1)
    work = options.folder or Path(tempfile.mkdtemp(prefix="spark-store-"))
    try:
        result = measure(work, options)
    finally:
        if not options.folder:
            shutil.rmtree(work)
    report(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, RESULTS / "store.png")


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
    store: Store = open_store(folders["store"])
    write_split(folders["store"], "all", {"train": list(store.cases)[:DISTINCT], "val": [], "test": [], "seed": 0})
    table = slice_table(open_store(folders["store"]), "all", "train", "organ", "all")
    result["batches"], result["ratios"] = {}, {}
    for workers in (0, 2):
        print(f"reading with {workers} workers", flush=True)
        found = rates(loaders(table, folders), workers, options.rounds, options.span)
        result["batches"][str(workers)] = {name: statistics.median(values) for name, values in found.items()}
        result["ratios"][str(workers)] = {
            name: statistics.median(a / b for a, b in zip(found["store"], found[name], strict=True)) for name in TARGETS
        }
        gc.collect()
    print("10,000 epochs", flush=True)
    result["memory"] = memory | loader_growth(table)
    return result


if __name__ == "__main__":
    main()
