"""Recipe lines that fit a store: crop, batch, and how it might be prepared."""

import json
import math
from itertools import product

import numpy as np

from .arrays import SHARD_SLICES
from .location import finished, open_array
from .store import Case, Store

COVERED = 0.99
"""The share of cases whose whole target a crop shall hold."""
MULTIPLE = 32
"""What the sides of crops are multiples of, as every network takes them."""
BYTES_PER_PIXEL = 10_000
"""Of a training step of unet at width 1, the largest usual teacher: 7,150 are kept for the gradient (float32), and as
much again for a while of the layer at work. The student's step is far smaller."""
FIXED_BYTES = 2**30
"""Of its weights, gradients and Adam's moments, and of the GPU's own."""
USUAL_BATCH = 16
"""The batch that the default learning rates were found with; a larger one is not suggested."""
LARGEST_SHARE = 0.05
"""Of the slices that show a target, the most that a batch holds (nnU-Net; Isensee et al., Nature Methods 2021)."""


def suggested_recipe(store: Store, percentiles: tuple[float, float], memory: float) -> str:
    """Lines for a recipe (YAML), with what `prepare` might be told as comments.

    `percentiles` are the intensities of the labelled voxels' 0.5 and 99.5%, NaN without any; `memory` (GiB) is what a
    process has for its share of a batch. Raises `UserError` for damaged labels.
    """
    cases = [case for case in store.cases.values() if case.labelled and case.label_counts[:, 1:].any()]
    size, shift = suggested_crop([(case, box_of_labels(store, case)) for case in cases])
    batch = suggested_batch(size, memory, sum(len(case.slices_with(*case.regions)) for case in cases))
    rows, columns = (np.median([case.spacing[axis] for case in store.cases.values()]) for axis in (1, 2))
    prepare, why = f"--plane-spacing {rows:.3g},{columns:.3g}", "the cases' median spacing"
    if store.attributes["window"]["kind"] == "fixed" and np.isfinite(percentiles).all():
        prepare = f"--window={percentiles[0]:.0f},{percentiles[1]:.0f} {prepare}"
        why = f"the 0.5 and 99.5% of labelled intensities, {why}"
    return "\n".join(
        [
            f"# spark-data prepare … {prepare}",
            f"# ({why}; for a store that is prepared anew)",
            f"dataset: {json.dumps(str(store.path))}",
            f"crop: {size[0] if size[0] == size[1] else list(size)}  # holds all labels of {COVERED:.0%} of the cases",
            f"crop_shift: {list(shift)}",
            f"batch_size: {min(batch, USUAL_BATCH)}  # unet at width 1 takes up to {batch} in {memory:g} GiB",
        ]
    )


def box_of_labels(store: Store, case: Case) -> np.ndarray:
    """The first and the last row, and the first and the last column, that any label of a case has: (2, 2)."""
    labels, what = open_array(store.path / "cases" / case.name / "label"), f"{store.path}: case {case.name}"
    shown, found = np.zeros(case.shape[1:], bool), np.flatnonzero(case.label_counts[:, 1:].any(axis=1))
    for start in range(int(found[0]), int(found[-1]) + 1, SHARD_SLICES):
        stop = min(start + SHARD_SLICES, int(found[-1]) + 1)
        shown |= (finished(labels[start:stop].read(), what) > 0).any(axis=0)
    return np.array([np.flatnonzero(shown.any(axis=axis))[[0, -1]] for axis in (1, 0)])


def suggested_crop(boxes: list[tuple[Case, np.ndarray]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest crop (rows, columns) with sides of multiples of 32 that holds the boxes of 99% of the cases, and how
    far off the slices' centres it lies."""
    if not boxes:
        return (MULTIPLE, MULTIPLE), (0, 0)
    planes, places = np.array([case.shape[1:] for case, _ in boxes]), np.array([box for _, box in boxes])
    shift = np.median(places.sum(axis=2) / 2 - (planes - 1) / 2, axis=0).round().astype(int)

    def held(sides: np.ndarray) -> np.ndarray:
        """Whether crops of these sides (…) hold each case's box, axis by axis (n, 2)."""
        starts = (planes - sides) // 2 + shift
        return (starts <= places[:, :, 0]) & (places[:, :, 1] < starts + sides)

    largest = -(-2 * int(planes.max()) // MULTIPLE) * MULTIPLE
    sides = np.arange(MULTIPLE, largest + 2 * MULTIPLE, MULTIPLE)
    holds = np.stack([held(np.array([side, side])) for side in sides])
    wanted = math.ceil(COVERED * len(boxes))
    # One side is chosen for each length of the other.
    fitting = [
        (rows, columns)
        for rows, columns in product(range(len(sides)), repeat=2)
        if (holds[rows, :, 0] & holds[columns, :, 1]).sum() >= wanted
    ]
    best = min(fitting, key=lambda pair: (sides[pair[0]] * sides[pair[1]], abs(pair[0] - pair[1])))
    return tuple(int(sides[n]) for n in best), tuple(shift.tolist())


def suggested_batch(size: tuple[int, int], memory: float, slices: int) -> int:
    """The largest power of two that a process has the memory (GiB) for, and that is no large part of the slices."""
    fits = (memory * 2**30 - FIXED_BYTES) / (BYTES_PER_PIXEL * size[0] * size[1])
    return 2 ** max(0, int(math.log2(max(1, min(fits, max(2, LARGEST_SHARE * slices))))))
