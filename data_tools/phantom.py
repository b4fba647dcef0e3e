"""Synthetic abdominal CT with organ and tumour, for trying everything out.

Not a model of anatomy: a body with fat, spine, a large neighbour and small ones whose Hounsfield units (HU) lie close
to the organ's, two bean-shaped target organs, and tumours of low contrast and any size in most of them.
"""

import os
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter

from .errors import UserError
from .nifti import write_image

ORIENTATIONS = ("IPL", "RAS", "LPS", "LAS", "PIR", "SAR", "ARS")


def write_phantom(folder: Path, seed: int, k: int, size: int) -> None:
    """Write case `k` of a seed as NIfTI in the KiTS layout. What is there of it already stays."""
    for file, image in files_of(folder, seed, k, size).items():
        if not file.exists():
            write_image(file, image)


def check_place(folder: Path, seed: int, k: int, size: int) -> None:
    """Raise `UserError` if the place of case `k` holds anything but this very case, or a part of it."""
    case = folder / case_name(k)
    if not os.path.lexists(case):
        return
    files = files_of(folder, seed, k, size)
    # A run that is killed leaves hidden files.
    found = [file for file in case.iterdir() if not file.name.startswith(".")] if case.is_dir() else [case]
    if not all(file in files and same(file, files[file]) for file in found):
        raise UserError(
            f"{case}: exists and is not case {k} of seed {seed} and size {size}; nothing was written, name another "
            "folder"
        )


def same(file: Path, image: nibabel.Nifti1Image) -> bool:
    """Whether a file holds this image."""
    try:
        return igzip.decompress(file.read_bytes()) == image.to_bytes()
    except (OSError, EOFError, igzip.IsalError):
        return False


def case_name(k: int) -> str:
    """The folder of case `k`."""
    return f"case_{k:05}"


def files_of(folder: Path, seed: int, k: int, size: int) -> dict[Path, nibabel.Nifti1Image]:
    """The files of case `k` of a seed, with its axes in an order of its own."""
    random = np.random.default_rng([seed, k])
    image, label, affine = phantom(random, size)
    turn = ornt_transform(axcodes2ornt("IPL"), axcodes2ornt(random.choice(ORIENTATIONS)))
    affine = affine @ inv_ornt_aff(turn, image.shape)
    voxels = {"imaging": image, "segmentation": label}
    return {
        folder / case_name(k) / f"{name}.nii.gz": nibabel.Nifti1Image(apply_orientation(x, turn), affine)
        for name, x in voxels.items()
    }


def phantom(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (Z, H, W) int16 in HU, label (Z, H, W) uint8, affine; axes to inferior, posterior, left.

    `size` is about the number of pixels of a slice's side.
    """
    shape = (int(random.integers(20, 33)), *(int(random.integers(size - 8, size + 9)) for _ in range(2)))
    spacing = np.array([random.uniform(3, 5), *[random.uniform(3.2, 4.0) * 96 / size] * 2])
    z, y, x = (
        (np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)
    )  # mm from the centre of the volume
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    texture = [gaussian_filter(random.standard_normal(shape), sigma) for sigma in (1.0, 3.0, 6.0)]
    texture = [t / t.std() for t in texture]

    def blob(centre, radii, wobble=0.15, turn=0.0):
        """Place of a wobbly ellipsoid: centre and radii in mm (z, y, x), turned in the plane."""
        v, u = y - centre[1], x - centre[2]
        v, u = np.cos(turn) * v - np.sin(turn) * u, np.sin(turn) * v + np.cos(turn) * u
        distance = np.sqrt(((z - centre[0]) / radii[0]) ** 2 + (v / radii[1]) ** 2 + (u / radii[2]) ** 2)
        return distance + wobble * texture[2] < 1

    image = np.full(shape, -1000.0)
    body = blob((0, 0, 0), (1e9, random.uniform(105, 125), random.uniform(135, 155)), 0.03)
    inner = blob((0, 0, 0), (1e9, random.uniform(90, 98), random.uniform(118, 128)), 0.05)
    image[body] = -100
    image[inner] = random.uniform(20, 45)
    organ_hu = random.uniform(95, 150)
    image[blob((random.uniform(-40, 0), -20, -65), (70, 60, 50))] = organ_hu + random.uniform(-35, 35)
    image[blob((random.uniform(-30, 10), -10, 85), (35, 35, 25))] = organ_hu + random.uniform(-30, 30)
    for _ in range(random.integers(6, 11)):
        centre = (random.uniform(-60, 60), random.uniform(-60, 60), random.uniform(-90, 90))
        radii = random.uniform(9, 24, 3)
        image[blob(centre, radii, 0.2, random.uniform(0, np.pi)) & inner] = random.choice(
            [organ_hu + random.uniform(-25, 25), random.uniform(-80, 60), random.uniform(50, 120)]
        )
    image[blob((0, 62, 0), (1e9, 20, 22), 0.1)] = random.uniform(250, 450)

    label = np.zeros(shape, np.uint8)
    for side in (-1, 1):
        centre = np.array([random.uniform(-15, 20), random.uniform(15, 45), side * random.uniform(52, 75)])
        radii = np.array([random.uniform(32, 48), random.uniform(20, 28), random.uniform(18, 26)])
        turn = random.uniform(-0.6, 0.6)
        hilum = centre - [0, 0, side * radii[2]]
        organ = blob(centre, radii, 0.12, turn) & ~blob(hilum, radii * [0.45, 0.5, 0.6], 0.1) & inner
        image[organ] = organ_hu + random.uniform(-6, 6)
        image[blob(hilum, radii * [0.3, 0.3, 0.4], 0.1) & ~organ & inner] = organ_hu + random.uniform(-40, 25)
        label[organ] = 1
        if random.random() < 0.6:
            edge = centre + random.uniform(-0.9, 0.9, 3) * radii
            tumour = blob(edge, np.exp(random.uniform(np.log(5), np.log(24))) * random.uniform(0.8, 1.2, 3), 0.15)
            tumour &= inner & (image > -50)
            image[tumour] = organ_hu + random.choice([-1, 1]) * random.uniform(18, 55)
            label[tumour] = 2
    image = gaussian_filter(image, (0.3, 0.6, 0.6))
    image += 8 * texture[1] + gaussian_filter(random.standard_normal(shape), (0, 0.5, 0.5)) * random.uniform(25, 45)
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0, -spacing[2]], [0, -spacing[1], 0], [-spacing[0], 0, 0]]
    affine[:3, 3] = random.uniform(-100, 100, 3)
    return image.clip(-1024, 3071).round().astype(np.int16), label, affine
