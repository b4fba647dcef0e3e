"""How a slice is seen: its target, its crop and its orientation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from data_tools.labels import names_in

ORIENTATIONS = 8
"""The dihedral group D4: orientation = quarter turns + 4 × (flipped left to right first)."""
ROWS, COLUMNS = -2, -1
"""An image's last two axes."""
TURNS = (
    (False, ()),
    (True, (ROWS,)),
    (False, (ROWS, COLUMNS)),
    (True, (COLUMNS,)),
    (False, (COLUMNS,)),
    (True, ()),
    (False, (ROWS,)),
    (True, (ROWS, COLUMNS)),
)
"""Each orientation: whether the image is transposed, and which axes are then reversed."""
FLIP_CODES = {(ROWS,): 0, (COLUMNS,): 1, (ROWS, COLUMNS): -1}
"""OpenCV's names for the axes that are reversed."""


@dataclass(frozen=True)
class Crop:
    """A window of fixed size in the plane of a slice, off the slice's centre by `shift` pixels (rows, columns).

    Where it reaches beyond the slice, it is filled with the intensity that maps to −1 and with background.
    """

    size: tuple[PositiveInt, PositiveInt]
    shift: tuple[int, int] = (0, 0)

    def overlap(self, plane: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of a slice of size `plane` that the crop covers, and where in the crop that part lies."""
        inside, placed = [], []
        for length, size, shift in zip(plane, self.size, self.shift, strict=True):
            start = (length - size) // 2 + shift
            low, high = max(start, 0), min(start + size, length)
            inside.append(slice(low, max(low, high)))
            placed.append(slice(low - start, max(low, high) - start))
        return tuple(inside), tuple(placed)

    def centred(self) -> np.ndarray:
        """The map (3×3) from (row, column) in the crop to what is left of it from the crop's centre."""
        rows, columns = self.size
        return np.array([[1, 0, -(rows - 1) / 2], [0, 1, -(columns - 1) / 2], [0, 0, 1]])

    def centre_of(self, plane: tuple[int, int]) -> np.ndarray:
        """The map (3×3) from (row, column) off the crop's centre to (row, column) in a slice of size `plane`."""
        starts = [
            (length - size) // 2 + shift for length, size, shift in zip(plane, self.size, self.shift, strict=True)
        ]
        rows, columns = (start + (size - 1) / 2 for start, size in zip(starts, self.size, strict=True))
        return np.array([[1, 0, rows], [0, 1, columns], [0, 0, 1]])

    def of(self, image: np.ndarray, fill: float) -> np.ndarray:
        """The crop of a slice (H, W): a view of it, or a copy with `fill` where the crop reaches beyond."""
        inside, placed = self.overlap(image.shape)
        cropped = image[inside]
        if cropped.shape == self.size:
            return cropped
        filled = np.full(self.size, fill, image.dtype)
        filled[placed] = cropped
        return filled


@dataclass(frozen=True)
class SliceSpec:
    """How a network sees slices: what it segments, which part of the plane it is given, and what counts as predicted.

    The same in training, in evaluation and in pictures, and saved beside the weights. Which intensities become −1 and 1
    is a fact of each case (`Case.window`) and no part of it.
    """

    task: str
    """The regions that are told apart, separated by commas: a class each, after the background (see `labels.Task`)."""
    crop: Crop
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which a voxel is predicted as the target."""
    context: Annotated[int, Field(ge=0)] = 0
    """Neighbouring slices on either side that a network is given as further input channels (2.5D)."""

    @property
    def channels(self) -> int:
        """A network's input channels."""
        return 2 * self.context + 1

    def neighbours(self, slices: Sequence[int], depth: int) -> np.ndarray:
        """The slices (N, channels) of a volume of `depth` that a network is given for N slices, from the lowest to the
        highest; where the volume ends, its last one is repeated."""
        around = np.arange(-self.context, self.context + 1)
        return np.clip(np.asarray(slices)[:, None] + around, 0, depth - 1)

    @property
    def regions(self) -> tuple[str, ...]:
        """The names of the regions, which are those of classes 1 to C − 1."""
        return tuple(names_in(self.task))

    @property
    def classes(self) -> int:
        """C, the background included."""
        return 1 + len(self.regions)


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W) in one of the eight orientations, perhaps as a view.

    OpenCV goes through an image in blocks; a copy of NumPy's `rot90` takes ten times as long.
    """
    transposed, flipped = TURNS[orientation]
    if transposed:
        image = cv2.transpose(image)
    return cv2.flip(image, FLIP_CODES[flipped]) if flipped else image


def orientation_matrix(orientation: int) -> np.ndarray:
    """The map (3×3) from (row, column) off the centre of an oriented slice to that off the slice's own centre."""
    transposed, flipped = TURNS[orientation]
    signs = np.diag([-1.0 if axis in flipped else 1.0 for axis in (-2, -1)] + [1.0])
    return np.eye(3)[[1, 0, 2]] @ signs if transposed else signs


def orient_batch(x: Tensor, orientations: np.ndarray) -> Tensor:
    """Samples of x (N, …, H, W), each in its orientation (N,), as `orient` does it."""

    def turn(sample: Tensor, orientation: int) -> Tensor:
        transposed, flipped = TURNS[orientation]
        return (sample.mT if transposed else sample).flip(flipped)

    return torch.stack([turn(*each) for each in zip(x, orientations, strict=True)])


def upright_batch(x: Tensor, orientations: np.ndarray) -> Tensor:
    """Samples of x (N, …, H, W) turned back from their orientations (N,): the inverse of `orient_batch`."""

    def turn_back(sample: Tensor, orientation: int) -> Tensor:
        transposed, flipped = TURNS[orientation]
        sample = sample.flip(flipped)
        return sample.mT if transposed else sample

    return torch.stack([turn_back(*each) for each in zip(x, orientations, strict=True)])
