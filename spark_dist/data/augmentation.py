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
    """Quarter turns are among the orientations, where the crop is a square."""
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
        orientation = self.orientations[number % len(self.orientations)]
        if not self.drawn:
            return oriented(self.crop, orientation, image, label, window)
        geometric, intensity, drawn = uniforms(self.seed, 3, row, number)
        crop = self.crop
        if self.anywhere:
            crop = replace(crop, shift=shift_to(crop, label.shape, target, drawn[1:]))
        if self.augment != "full":
            return oriented(crop, orientation, image, label, window)
        orientation = self.orientations[int(drawn[0] * len(self.orientations))]
        matrix = (
            crop.centre_of(label.shape)
            @ affine(crop.size, geometric)
            @ orientation_matrix(orientation)
            @ crop.centred()
        )
        planes = [warp(in_window(plane, window), matrix, crop.size, 0, nearest=False) for plane in image]
        return changed(np.stack(planes), intensity), warp(label, matrix, crop.size, 0, nearest=True)


def oriented(
    crop: Crop, orientation: int, image: Sequence[np.ndarray], label: np.ndarray, window: Sequence[float]
) -> tuple[Sequence[np.ndarray], np.ndarray]:
    """A crop of a slice's channels and label (H, W) each, in one of the eight orientations."""
    fill = np.floor(window[0])
    return [orient(crop.of(plane, fill), orientation) for plane in image], orient(crop.of(label, 0), orientation)


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
