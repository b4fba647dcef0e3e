"""Trained networks at work: whole scans to label maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data_tools.errors import UserError
from data_tools.scans import Scan, on_scan_grid, scan_of
from spark_dist.networks.checkpoint import ModelCard, load_network
from spark_dist.networks.ensemble import averaged

from .inference import class_probabilities, largest_components, predicted_classes

ALIKE = ("spec", "classes", "preparation", "label_values")
"""Entries that the model cards of an ensemble share."""


class Prediction(NamedTuple):
    """A scan's prediction, in the scan's axial slices."""

    classes: np.ndarray
    """(Z, H, W) uint8."""
    probabilities: np.ndarray | None
    """(C − 1, Z, H, W) float32, of each class but the background."""


@dataclass(frozen=True)
class Predictor:
    """A trained network, or the mean of several, and all that it needs to know of scans."""

    network: nn.Module
    card: ModelCard
    largest_component: bool = False
    """Keep only the largest component of each class."""

    @property
    def values(self) -> tuple[int, ...]:
        """The value of each class in a label map, 0 for the background first."""
        return (0, *self.card.label_values)

    def predict(self, volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """The label map of a `volume` (its three axes in any order and direction) in its intensities, with the
        `affine` (4×4) from its indices to RAS+ mm, as nibabel has both; on the same grid, 0 the background.

        Raises `UserError` for what is no volume.
        """
        scan = scan_of(volume, affine, self.card.preparation)
        return on_scan_grid(self.predict_scan(scan).classes, scan, self.values)

    def predict_scan(
        self, scan: Scan, probabilities: bool = False, advance: Callable[[int], object] = lambda slices: None
    ) -> Prediction:
        """The prediction for a scan, with `probabilities` if asked for. `advance` is told of the slices as they are
        done, so many at a time."""
        return self._predict(scan.image, scan.window, probabilities, advance)

    def predict_slices(self, slices: np.ndarray) -> np.ndarray:
        """The label map of axial `slices` (N, H, W) of one scan in its intensities, one behind the other, which lie and
        are as fine as those that the network learned from: rows to posterior, columns to left.

        Raises `UserError` for what is no stack of slices, or constant where the window is by the intensities.
        """
        if slices.ndim != 3 or not slices.size:
            raise UserError(f"slices of shape {slices.shape}; give one or several of a scan, (N, H, W)")
        window = self.card.preparation.window(slices, Path("slices"))
        return np.array(self.values)[self._predict(slices, window).classes]

    def _predict(
        self,
        image: np.ndarray,
        window: Sequence[float],
        probabilities: bool = False,
        advance: Callable[[int], object] = lambda slices: None,
    ) -> Prediction:
        """The prediction for slices (Z, H, W) of which `window` become −1 and 1."""
        classes, shares = np.zeros(image.shape, np.uint8), None
        spec = self.card.spec
        for start, part in class_probabilities(self.network, image, window, spec):
            found, slices = part[:, 1:].swapaxes(0, 1), slice(start, start + len(part))
            classes[slices] = predicted_classes(found, spec.threshold)
            if probabilities:
                shares = np.empty((len(found), *classes.shape), np.float32) if shares is None else shares
                shares[:, slices] = found
            advance(len(part))
        return Prediction(largest_components(classes) if self.largest_component else classes, shares)


def load_student(
    *checkpoints: str | Path,
    flips: bool = False,
    largest_component: bool = False,
    threshold: float | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """The way from scans to label maps: a checkpoint, or the mean of the probabilities of several; with `flips`, over
    the four flips of each slice too. `threshold` counts rather than the checkpoint's. It works on a GPU if there is one
    and no other `device` is named.

    Raises `UserError` for a checkpoint that is damaged or does not know how scans are prepared, and for several that
    differ in it, or in what they tell apart.
    """
    loaded = [load_network(Path(path)) for path in checkpoints]
    cards = [card for _, card in loaded]
    for path, card in zip(checkpoints, cards, strict=True):
        if card.preparation is None or card.label_values is None:
            raise UserError(
                f"{path}: its model card does not say which intensities and labels it learned from, as an earlier "
                "version saved it; train it again"
            )
        if differing := [name for name in ALIKE if getattr(card, name) != getattr(cards[0], name)]:
            name = differing[0]
            raise UserError(
                f"{checkpoints[0]} and {path}: networks whose {name} differs can't be averaged "
                f"({getattr(cards[0], name)} and {getattr(card, name)}); predict with each by itself"
            )
    networks = [network for network, _ in loaded]
    network = averaged(networks, flips)
    spec = replace(cards[0].spec, threshold=threshold or cards[0].spec.threshold)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(network.to(device), replace(cards[0], spec=spec), largest_component)
