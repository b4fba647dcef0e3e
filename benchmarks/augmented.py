"""The ways to read augmented batches that `benchmarks.store --augment full` compares.

Each does what `augment: full` does, with the same probabilities and ranges, by its own library: small rotations,
scalings and shifts of every slice, one of eight orientations, and at random noise, blur, brightness, contrast, low
resolution and gamma. Labels are interpolated by the nearest neighbour.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.readers import CROP, SPEC, WINDOW, own_stream, torch_stream
from spark_dist.data.augmentation import Views
from spark_dist.data.batches import SliceDataset
from spark_dist.data.slices import SliceTable

ANGLE, SCALE, SHIFT = np.pi / 12, (0.85, 1 / 0.85), 0.05 * CROP.size[0]
"""Radians, factors and pixels, as in `spark_dist.data.transformations`."""
AROUND = (slice(0, 484), slice(0, 504))
"""The largest part of a slice that has the crop's centre in its own."""


def with_monai(table: SliceTable, raw: Path, folder: Path) -> Dataset:
    """Windowed slices in MONAI's PersistentDataset, and MONAI's random transforms."""
    from monai.data import PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureTyped,
        Lambda,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandGaussianSmoothd,
        RandRotate90d,
        RandScaleIntensityd,
        RandScaleIntensityFixedMeand,
        RandSimulateLowResolutiond,
        ScaleIntensityRanged,
    )

    arrays = {file.stem: np.load(file, mmap_mode="r") for file in raw.glob("*.npy")}
    kinds = ("image", "label")

    def load(item: dict) -> dict:
        return {kind: np.array(arrays[f"{item['case']}_{kind}"][item["slice"]][AROUND])[None] for kind in kinds}

    transforms = Compose(
        [
            Lambda(load),
            EnsureTyped(kinds, dtype=[torch.float32, torch.uint8], track_meta=False),
            ScaleIntensityRanged("image", *WINDOW, 0, 1, clip=True),
            RandAffined(
                kinds,
                CROP.size,
                prob=1,
                rotate_range=ANGLE,
                translate_range=SHIFT,
                # Factors on the grid, around 1, the same in both axes only by chance.
                scale_range=(SCALE[0] - 1, SCALE[1] - 1),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
                cache_grid=True,
            ),
            RandFlipd(kinds, prob=0.5, spatial_axis=1),
            RandRotate90d(kinds, prob=0.75, max_k=3),
            RandGaussianNoised("image", prob=0.1, std=0.05),
            RandGaussianSmoothd("image", sigma_x=(0.5, 1), sigma_y=(0.5, 1), prob=0.2),
            RandScaleIntensityd("image", factors=0.25, prob=0.15),
            RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=0.15),
            RandSimulateLowResolutiond("image", prob=0.25, upsample_mode="bilinear", zoom_range=(0.5, 1)),
            RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )
    items = [{"case": table.cases[c], "slice": int(z)} for c, z in zip(table.case, table.slice, strict=True)]
    dataset = PersistentDataset(items, transforms, cache_dir=folder)
    for row in range(len(table)):
        dataset[row]  # now it is in its cache
    return dataset


class Blosc2Dataset(Dataset):
    """Slices of memory-mapped blosc2 arrays and batchgeneratorsv2's transforms: nnU-Net v2's pipeline in 2D."""

    def __init__(self, table: SliceTable, folder: Path):
        self.table, self.folder, self.arrays = table, folder, {}
        self.transforms = nnunet_transforms()

    def open(self, name: str, kind: str) -> blosc2.NDArray:
        """An array, opened when it is first needed."""
        if (name, kind) not in self.arrays:
            path = str(self.folder / f"{name}_{kind}.b2nd")
            self.arrays[name, kind] = blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})
        return self.arrays[name, kind]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        name, z = self.table.cases[self.table.case[row]], int(self.table.slice[row])
        image, label = (torch.from_numpy(self.open(name, kind)[z, *AROUND])[None] for kind in ("image", "label"))
        low, high = WINDOW
        image = image.to(torch.float32).sub_(low).div_(high - low).clamp_(0, 1)
        seen = self.transforms(image=image, segmentation=label)
        return seen["image"], seen["segmentation"]


def nnunet_transforms() -> Callable[..., dict[str, Tensor]]:
    """The transforms of nnU-Net v2's trainer."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    spatial = SpatialTransform(
        CROP.size,
        # Centres lie at most the shift off the middle.
        patch_center_dist_from_border=[(part.stop - part.start) / 2 - SHIFT for part in AROUND],
        random_crop=True,
        p_rotation=1,
        rotation=(-ANGLE, ANGLE),
        p_scaling=1,
        scaling=SCALE,
        p_synchronize_scaling_across_axes=1,
        mode_seg="nearest",
    )
    factor, power = BGContrast((0.75, 1.25)), BGContrast((0.7, 1.5))
    intensity = [
        (0.1, GaussianNoiseTransform((0, 0.05))),
        (0.2, GaussianBlurTransform((0.5, 1), benchmark=True)),
        (0.15, MultiplicativeBrightnessTransform(factor, False)),
        (0.15, ContrastTransform(factor, True, False)),
        (0.25, SimulateLowResolutionTransform((0.5, 1), False, True, None)),
        (0.1, GammaTransform(power, 1, False, 1, p_retain_stats=0)),
        (0.3, GammaTransform(power, 0, False, 1, p_retain_stats=0)),
    ]
    return ComposeTransforms(
        [
            spatial,
            RandomTransform(Rot90Transform(1, (1, 2, 3), {0, 1}), 0.75),
            *(RandomTransform(transform, probability) for probability, transform in intensity),
            MirrorTransform((0, 1)),
        ]
    )


def loaders(table: SliceTable, folders: dict[str, Path]) -> dict[str, Callable[[int], Iterator]]:
    """For each way, what makes an endless stream of ready batches with a number of workers."""
    views, monai = Views(CROP, "full"), with_monai(table, folders["raw"], folders["monai"])
    nnunet = Blosc2Dataset(table, folders["blosc2"])

    def ready(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return image.clamp_(0, 1).mul_(2).sub_(1), label[:, 0]

    return {
        "store": lambda n: own_stream(SliceDataset(table, SPEC, views=views), table, n),
        "monai": lambda n: torch_stream(monai, table, n, lambda b: ready(b["image"], b["label"])),
        "blosc2": lambda n: torch_stream(nnunet, table, n, lambda b: ready(*b)),
    }


def check_alike(streams: dict[str, Iterator]) -> None:
    """The ways show slices alike: intensities and the part that has a label are, on the mean over some batches."""
    found = {}
    for name, stream in streams.items():
        batches = [next(stream) for _ in range(8)]
        assert {image.shape[1:] for image, _ in batches} == {(1, *CROP.size)}, name
        means = [(image.mean(), image.std(), (label > 0).float().mean()) for image, label in batches]
        found[name] = torch.tensor(means).mean(dim=0)
    for name, values in found.items():
        assert torch.allclose(values, found["store"], rtol=0.1, atol=0), (name, values, found["store"])
