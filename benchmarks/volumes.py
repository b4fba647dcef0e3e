"""Synthetic CT volumes, and the ways to prepare them that `benchmarks.store` compares."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2
import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter, zoom

SHAPE = (64, 512, 512)
DISTINCT = 4
"""Volumes; all others are the same ones under other names."""


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
