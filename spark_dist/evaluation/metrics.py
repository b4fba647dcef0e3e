"""Overlap and surface distances on whole volumes, and their summary over cases.

The target of a prediction and of the ground truth are boolean volumes (Z, H, W). A case's metrics are a flat dict:
dice, voe, rvd, false_positive_ml, hd, hd95, assd and surface_dice of the protocol `volume` (all slices), and
dice_labelled, voe_labelled and rvd_labelled of the protocol `labelled-slices` (only slices that show the target, which
is how the original system measured). Where a network tells several regions apart, these are the means over them, and
`dice.anterior` is that of one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from data_tools.ownership import MADE_BY

TOLERANCE = 1.0
"""Tolerance of the surface Dice in mm, that of the Medical Segmentation Decathlon for the hippocampus."""


def overlap_counts(prediction: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
    """Voxels in each slice, (Z, 3) int64: in both, predicted, true."""
    volumes = (prediction & ground_truth, prediction, ground_truth)
    return np.stack([v.sum(axis=(1, 2), dtype=np.int64) for v in volumes], axis=1)


def dice(counts: np.ndarray) -> float:
    """Dice of summed counts (3,). Nothing predicted where nothing is: 1."""
    both, predicted, true = (int(v) for v in counts)
    return 2 * both / (predicted + true) if predicted + true else 1.0


def voe(counts: np.ndarray) -> float:
    """Volumetric overlap error, 1 − intersection over union."""
    both, predicted, true = (int(v) for v in counts)
    return 1 - both / (predicted + true - both) if predicted + true else 0.0


def rvd(counts: np.ndarray) -> float:
    """Relative volume difference, (predicted − true) / true; infinite where something is predicted and nothing is."""
    _, predicted, true = (int(v) for v in counts)
    if true == 0:
        return math.inf if predicted else 0.0
    return (predicted - true) / true


def false_positive_ml(counts: np.ndarray, spacing: Sequence[float]) -> float:
    """Millilitres predicted in slices that do not show the target, which are all of a case without it.

    `counts` (Z, 3) as `overlap_counts` gives them, `spacing` in mm for each axis.
    """
    return float(counts[counts[:, 2] == 0, 1].sum() * math.prod(spacing) / 1000)


def between_surfaces(
    prediction: np.ndarray, ground_truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from each surface voxel of the prediction to the ground truth's surface, and back; `spacing` in
    mm for each axis.

    A surface is the voxels of a volume that touch what is outside it by a face (also at the volume's border). Where one
    of them has nothing, the other's distances are infinite.
    """
    if not prediction.any() or not ground_truth.any():
        return tuple(np.full(int(v.any()), math.inf) for v in (prediction, ground_truth))
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    # Only the part of the volume that holds either of them: the rest takes time and changes nothing.
    box = tuple(slice(np.flatnonzero(v)[0], np.flatnonzero(v)[-1] + 1) for v in occupied(prediction | ground_truth))
    surfaces = get_mask_edges(prediction[box], ground_truth[box], crop=False)
    return tuple(
        np.asarray(get_surface_distance(*pair, spacing=list(spacing)), dtype=np.float64)
        for pair in (surfaces, surfaces[::-1])
    )


def surface_distances(there: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """hd, hd95 and assd in mm from the distances `between_surfaces`.

    hd: the largest distance from either surface to the other; hd95: the larger of the two directions' 95th percentiles;
    assd: the mean over the voxels of both surfaces. Nothing in both: 0; nothing in one of them: infinite, a miss.
    """
    if not (there.size and back.size):
        value = math.inf if there.size or back.size else 0.0
        return {"hd": value, "hd95": value, "assd": value}
    return {
        "hd": float(max(there.max(), back.max())),
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float((there.sum() + back.sum()) / (there.size + back.size)),
    }


def surface_dice(there: np.ndarray, back: np.ndarray, tolerance: float) -> float:
    """The share of the voxels of both surfaces that lie within `tolerance` mm of the other, from the distances
    `between_surfaces`. Nothing in both: 1.

    Nikolov et al., arXiv 1809.04430, with a voxel for an element of the surface, as MONAI's SurfaceDiceMetric has it by
    default.
    """
    distances = np.concatenate([there, back])
    return float((distances <= tolerance).mean()) if distances.size else 1.0


def occupied(volume: np.ndarray) -> list[np.ndarray]:
    """For each axis, the indices at which the volume has anything."""
    return [volume.any(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]


def case_metrics(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    spacing: Sequence[float],
    labelled: np.ndarray | None = None,
    tolerance: float | None = TOLERANCE,
) -> dict[str, float]:
    """All metrics of a case; without a `tolerance` (mm) for the surface Dice, all but those of surfaces.

    `labelled` is the prediction for the protocol `labelled-slices`, where it differs.
    """
    counts = overlap_counts(prediction, ground_truth)
    shown = overlap_counts(prediction if labelled is None else labelled, ground_truth)[counts[:, 2] > 0]
    overlap = {"dice": dice, "voe": voe, "rvd": rvd}
    result = {name: metric(counts.sum(axis=0)) for name, metric in overlap.items()}
    result["false_positive_ml"] = false_positive_ml(counts, spacing)
    if tolerance is not None:
        between = between_surfaces(prediction, ground_truth, spacing)
        result |= surface_distances(*between) | {"surface_dice": surface_dice(*between, tolerance)}
    return result | {f"{name}_labelled": metric(shown.sum(axis=0)) for name, metric in overlap.items()}


def write_cases(path: Path, cases: Mapping[str, Mapping[str, float]], **facts: Any) -> None:
    """Metrics of every case as JSON, with `facts` about them. Infinite values are written as "inf"."""
    from data_tools.files import write_text

    rows = {case: {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()} for case, metrics in cases.items()}
    write_text(Path(path), json.dumps({"software": MADE_BY, **facts, "cases": rows}, indent=1, allow_nan=False))


def read_cases(path: Path) -> dict[str, dict[str, float]]:
    """Metrics of every case as `write_cases` wrote them. Raises `UserError` if the file is damaged."""
    try:
        rows = json.loads(Path(path).read_text())["cases"]
        return {case: {key: float(value) for key, value in metrics.items()} for case, metrics in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read as metrics of cases ({error}); evaluate the checkpoint again") from None
