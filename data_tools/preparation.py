"""How images are prepared, as stores and model cards remember it; it touches no file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a store prepares images, and a scan that a network shall see as it saw them."""

    kind: Literal["fixed", "percentile"]
    """What `low` and `high` are: intensities, the same for all scans, or percentiles of each scan's own."""
    low: float
    """What becomes −1."""
    high: float
    """What becomes 1."""
    size: tuple[int, int] | None = None
    """Rows and columns that slices are resampled to; None: as they are."""
    plane_spacing: tuple[float, float] | None = None
    """mm between rows and between columns that slices are resampled to instead."""
    channel: int | None = None
    """Which one of several channels in a fourth axis."""

    def __post_init__(self):
        """Raises `ValueError` for a window without a width, a size without pixels, and pixels without a size."""
        if not -np.inf < self.low < self.high < np.inf:
            raise ValueError(f"an intensity window from {self.low} to {self.high}")
        if self.size and min(self.size) < 1:
            raise ValueError(f"slices of {self.size} pixels")
        if self.plane_spacing and not 0 < min(self.plane_spacing) <= max(self.plane_spacing) < np.inf:
            raise ValueError(f"a plane spacing of {self.plane_spacing} mm")

    @classmethod
    def of_store(cls, attributes: Mapping[str, Any]) -> "Preparation":
        """That of a store with these attributes."""
        pairs = {key: attributes.get(key) and tuple(attributes[key]) for key in ("size", "plane_spacing")}
        return cls(**attributes["window"], **pairs, channel=attributes.get("channel"))

    def window(self, voxels: np.ndarray, path: Path) -> tuple[float, float]:
        """The intensities of a volume that become −1 and 1. Raises `UserError` for a constant image."""
        return resolve_window({"kind": self.kind, "low": self.low, "high": self.high}, voxels, path)


def resolve_window(window: dict[str, Any], voxels: np.ndarray, path: Path) -> tuple[float, float]:
    """The intensities that become −1 and 1 in one case. Raises `UserError` for a constant image."""
    if window["kind"] == "fixed":
        return window["low"], window["high"]
    low, high = (float(value) for value in np.percentile(voxels, (window["low"], window["high"])))
    if low == high:
        raise UserError(f"{path}: a constant image, nearly all voxels are {low:g}; take the case out, or give --window")
    return low, high
