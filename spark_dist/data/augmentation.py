"""Which views of a slice training sees."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from .transformations import Uniforms, affine, changed, in_window, uniforms, warp
from .views import Crop, orient, orientation_matrix

UNLIMITED = 2**32
"""Views of a slice that has a new one in each epoch."""


@dataclass(frozen=True)
class Views:
    """The views that training sees of slices: view `number` of row `row` is a pure function of these fields and both.

    `none`: crops as they are. `flips`: in one of the orientations that the switches allow. `full`: that, with all
    transformations above on top.
    """

    crop: Crop
    augment: Literal["none", "flips", "full"] = "none"
    mirror: bool = True
    """Flips are among the orientations."""
    quarter_turns: bool = True
    """Quarter turns are among the orientations, in a crop that is no square half turns only. Two flips are a half turn,
    too, so that only without `mirror` and without these everything stays upright."""
    anywhere: bool = False
    """Crops lie anywhere in the plane, a third of them around a voxel of the target, instead of all at one place."""
    number: int = 0
    """How many views a slice has (0: see `count`; −1: a new one in each epoch)."""
    seed: int = 0

    @cached_property
    def orientations(self) -> tuple[int, ...]:
        """The orientations that occur (see `views.TURNS`)."""
        if self.augment == "none":
            return (0,)
        rows, columns = self.crop.size
        turns = range(4) if self.quarter_turns and rows == columns else (0, 2)
        if not self.mirror and not self.quarter_turns:
            turns = (0,)
        return tuple(turn + flip for flip in ((0, 4) if self.mirror else (0,)) for turn in turns)

    @property
    def count(self) -> int:
        """Views are numbered from 0 to `count` − 1: one, or one for each orientation with `flips`, or eight where there
        are more than that, if no number is asked for."""
        if self.number < 0:
            return UNLIMITED
        return self.number or (8 if self.drawn else len(self.orientations))

    @property
    def drawn(self) -> bool:
        """Whether views are drawn at random; otherwise they are the orientations."""
        return self.augment == "full" or self.anywhere

    @property
    def in_window(self) -> bool:
        """Whether views are float32 with 0 and 1 in the place of the window's ends, and not the store's intensities."""
        return self.augment == "full"

    def of(
        self,
        row: int,
        number: int,
        image: Sequence[np.ndarray],
        label: np.ndarray,
        window: Sequence[float],
        target: np.ndarray,
    ) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """A view of a slice: the channels of its image (H, W) each, all seen alike, and its label (H, W), at the crop's
        size.

        `target` (H, W) bool is what crops from anywhere lie around. The image is in the store's intensities, or for
        `full` float32 with 0 and 1 in the place of `window`'s ends.
        """
        crop, orientation, matrix, intensity = self.place(row, number, label.shape, target)
        if matrix is None:
            fill = np.floor(window[0])
            planes = [orient(crop.of(plane, fill), orientation) for plane in image]
            return planes, orient(crop.of(label, 0), orientation)
        planes = [warp(in_window(plane, window), matrix, crop.size, 0, nearest=False) for plane in image]
        return changed(np.stack(planes), intensity), warp(label, matrix, crop.size, 0, nearest=True)

    def of_planes(
        self, row: int, number: int, planes: Sequence[np.ndarray], target: np.ndarray, nearest: bool
    ) -> list[np.ndarray]:
        """Further planes (H, W) of a slice where `of` shows its image, 0 beyond them; interpolated linearly unless
        `nearest`."""
        crop, orientation, matrix, _ = self.place(row, number, planes[0].shape, target)
        if matrix is None:
            return [orient(crop.of(plane, 0), orientation) for plane in planes]
        return [warp(plane, matrix, crop.size, 0, nearest) for plane in planes]

    def place(
        self, row: int, number: int, plane: tuple[int, int], target: np.ndarray
    ) -> tuple[Crop, int, np.ndarray | None, np.ndarray]:
        """Where a view lies in a slice of size `plane`: crop, orientation, for `full` the map (3×3) from the crop to
        the slice that has both in it, and the numbers of the intensity transformations."""
        if not self.drawn:
            return self.crop, self.orientations[number % len(self.orientations)], None, np.zeros(0)
        geometric, intensity, drawn = uniforms(self.seed, 3, row, number)
        full = self.augment == "full"
        orientation = self.orientations[
            int(drawn[0] * len(self.orientations)) if full else number % len(self.orientations)
        ]
        crop = replace(self.crop, shift=shift_to(self.crop, plane, target, drawn[1:])) if self.anywhere else self.crop
        if not full:
            return crop, orientation, None, intensity
        matrix = crop.centre_of(plane) @ affine(crop.size, geometric) @ orientation_matrix(orientation) @ crop.centred()
        return crop, orientation, matrix, intensity


def shift_to(crop: Crop, plane: tuple[int, int], target: np.ndarray, u: Uniforms) -> tuple[int, int]:
    """How far a crop lies off the slice's centre so that it is anywhere in the plane, or in a third of the draws around
    a voxel of `target` (H, W) bool, if there is one; as nnU-Net oversamples foreground."""
    found = np.flatnonzero(target) if u[0] < 1 / 3 else ()
    place = np.unravel_index(found[int(u[1] * len(found))], plane) if len(found) else (None, None)
    result = []
    for length, size, at, v in zip(plane, crop.size, place, u[1:], strict=False):
        room = max(length - size, 0)
        start = round(v * room) if at is None else min(max(int(at) - size // 2, 0), room)
        result.append(start - (length - size) // 2 if length >= size else 0)
    return tuple(result)
