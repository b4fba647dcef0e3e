"""The ways to read batches that `benchmarks.store` compares."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.volumes import SHAPE
from spark_dist.data.batches import RawBatch, SliceDataset, windowed
from spark_dist.data.cache import Entries
from spark_dist.data.loader import training_loader
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.shared_memory import ALIGNMENT, empty_array
from spark_dist.data.slices import SliceTable
from spark_dist.data.views import ORIENTATIONS, Crop, SliceSpec, orient

CROP = Crop((384, 384), (-14, -4))
SPEC = SliceSpec("organ", CROP)
BATCH = 16
WINDOW = (-200.0, 300.0)
KINDS = {"image": np.int16, "label": np.uint8}


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


def monai_datasets(table: SliceTable, raw: Path, folder: Path) -> dict[str, Dataset]:
    """Slices by row, the deterministic part cached on disk and in memory."""
    from monai.data import CacheDataset, PersistentDataset
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
    on_disk = PersistentDataset(items, transforms, cache_dir=folder)
    for row in range(len(table)):
        on_disk[row]  # now it is in its cache
    return {"monai": on_disk, "memory": CacheDataset(items, transforms, progress=False)}


def own_stream(dataset: Dataset, table: SliceTable, workers: int) -> Iterator:
    """Ready batches without end by the training's loader."""
    sampler = EpochSampler(Order(len(table), BATCH, 0, ORIENTATIONS))
    loader = training_loader(dataset, sampler, workers)
    return endless(loader, sampler, lambda b: (windowed(b.image, b.window), b.label))


def torch_stream(dataset: Dataset, table: SliceTable, workers: int, ready: Callable, keyed: bool = False) -> Iterator:
    """Ready batches without end by torch's loader, slice by slice; `keyed` if a slice is known by its key, and not by
    its row."""
    sampler = EpochSampler(Order(len(table), BATCH, 0, ORIENTATIONS))
    loader = DataLoader(
        dataset,
        batch_sampler=sampler if keyed else RowsOf(sampler),
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    return endless(loader, sampler, ready)


def endless(loader: DataLoader, sampler: EpochSampler, ready: Callable) -> Iterator:
    """The batches of one epoch after another, made ready."""
    for epoch in range(10**9):
        sampler.epoch = epoch
        yield from map(ready, loader)


def loaders(table: SliceTable, folders: dict[str, Path]) -> dict[str, Callable[[int], Iterator]]:
    """For each way, what makes an endless stream of ready batches with a number of workers."""
    monai, npz = monai_datasets(table, folders["raw"], folders["monai"]), NpzDataset(table, folders["npz"])

    def monais(name: str, workers: int) -> Iterator:
        return torch_stream(monai[name], table, workers, lambda b: (b["image"], b["label"]))

    return {
        "store": lambda n: own_stream(SliceDataset(table, SPEC), table, n),
        "npz": lambda n: torch_stream(npz, table, n, lambda b: (b[0], b[1]), keyed=True),
        "monai": partial(monais, "monai"),
        "memory": partial(monais, "memory"),
        "blosc2": lambda n: own_stream(MappedDataset(table, folders["blosc2"], "b2nd"), table, n),
        "raw": lambda n: own_stream(MappedDataset(table, folders["raw"], "npy"), table, n),
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
    for name in ("monai", "memory"):
        assert next(streams[name])[0].shape == image.shape
