"""A few slices on which people watch networks: the same ones whatever the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import cv2
import numpy as np
from torch import nn

from data_tools.labels import fullest
from data_tools.store import Store
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import SliceSpec

from .inference import predicted_classes, probabilities
from .metrics import dice, overlap_counts

TILE, CAPTION = 256, 22
"""Pixels of a tile's side, and of the line of text above it."""
REGIONS = ("#35c2b0", "#3355ff", "#fff48a", "#6e1a66", "#c8a8ff", "#00513f", "#b6ffb0", "#5a2a00")
"""Colours of the classes in turn, which differ in lightness, so that colour-blind people tell the first six apart."""
LINE = "#f2b134"
"""Colour of the prediction where there is one class, whose own the ground truth has."""
DARK = 255
"""Sum of red, green and blue up to which a line is seen better on white than on black."""
FILLED = 0.4
"""Share of the colour where the ground truth is."""


@dataclass(frozen=True)
class ShownSlice:
    """A slice with all that its prediction needs."""

    name: str
    image: np.ndarray
    """(N, H, W) in the store's intensities: the slice and those of its neighbours that a network sees with it."""
    position: int
    """Of the slice among them."""
    window: Sequence[float]
    """The intensities that become −1 and 1."""
    ground_truth: np.ndarray
    """(H, W) classes."""

    @property
    def grey(self) -> np.ndarray:
        """(H, W) in [0, 1]."""
        low, high = self.window
        return np.clip((self.image[self.position].astype(np.float32) - low) / (high - low), 0, 1)

    def predicted(self, network: nn.Module, spec: SliceSpec) -> tuple[np.ndarray, float]:
        """(H, W) classes by a network, and its Dice, the mean over the classes but the background."""
        found = probabilities(network, self.image, self.window, spec, slices=[self.position])
        classes, truth = predicted_classes(found, spec.threshold), self.ground_truth[np.newaxis]
        numbers = range(1, len(found) + 1)
        return classes[0], float(np.mean([dice(overlap_counts(classes == n, truth == n).sum(axis=0)) for n in numbers]))


def shown_slice(store: Store, name: str, z: int, spec: SliceSpec) -> ShownSlice:
    """A slice of a labelled case."""
    reader, case = VoxelReader(store), store.cases[name]
    near = np.unique(spec.neighbours([z], case.shape[0])).tolist()
    image = np.stack([reader.slice(name, "image", other) for other in near])
    truth = store.task(spec.task).classes_of(reader.slice(name, "label", z))
    return ShownSlice(f"{name}, slice {z}", image, near.index(z), case.window, truth)


def fullest_slice(store: Store, name: str, spec: SliceSpec) -> int:
    """The slice of a case that shows most of the target."""
    return int(fullest(store.cases[name].voxels(*store.task(spec.task).regions))[0])


def shown_slices(store: Store, cases: Sequence[str], spec: SliceSpec, count: int = 4) -> list[ShownSlice]:
    """The fullest slice of up to `count` of the cases."""
    names = [cases[n] for n in np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int))]
    return [shown_slice(store, name, fullest_slice(store, name, spec), spec) for name in names]


def draw_panel(network: nn.Module, slices: Sequence[ShownSlice], spec: SliceSpec) -> np.ndarray:
    """Slices side by side, near their target, (H, W, 3) uint8 RGB: the ground truth filled, the network's prediction
    as lines."""
    several = len(spec.regions) > 1
    colours = [rgb(colour) for _, colour in zip(spec.regions, cycle(REGIONS), strict=False)]
    tiles = []
    for shown in slices:
        classes, score = shown.predicted(network, spec)
        box = around(shown.ground_truth > 0, margin=1.0)
        picture = np.repeat(enlarged(255 * shown.grey[box], cv2.INTER_CUBIC)[..., None], 3, axis=2)
        truth, lines = (enlarged(part[box], cv2.INTER_NEAREST) for part in (shown.ground_truth, classes))
        for number, colour in enumerate(colours, start=1):
            picture[truth == number] = (1 - FILLED) * picture[truth == number] + FILLED * np.array(colour)
        for number, colour in enumerate(colours, start=1):
            contours, _ = cv2.findContours((lines == number).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            line = colour if several else rgb(LINE)
            cv2.drawContours(picture, contours, -1, (0, 0, 0) if sum(line) > DARK else (255, 255, 255), 4)
            cv2.drawContours(picture, contours, -1, line, 2)
        tiles.append(
            np.concatenate([caption(f"{shown.name}: Dice {score:.3f}"), picture.clip(0, 255).astype(np.uint8)])
        )
    return np.concatenate(tiles, axis=1)


def enlarged(plane: np.ndarray, interpolation: int) -> np.ndarray:
    """A plane (H, W) as large as a tile, black where it is no square."""
    kind = np.float32 if interpolation == cv2.INTER_CUBIC else np.uint8
    rows, columns = (round(TILE * side / max(plane.shape)) for side in plane.shape)
    tile = np.zeros((TILE, TILE), kind)
    tile[:rows, :columns] = cv2.resize(plane.astype(kind), (columns, rows), interpolation=interpolation)
    return tile


def caption(text: str) -> np.ndarray:
    """A line of text above a tile, as much of it as there is room for."""
    line = np.full((CAPTION, TILE, 3), 255, np.uint8)
    cv2.putText(line, text, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return line


def rgb(colour: str) -> tuple[int, ...]:
    """A colour like #35c2b0 in numbers to 255."""
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def around(region: np.ndarray, margin: float = 0.6) -> tuple[slice, slice]:
    """A square window around a region (H, W), larger by a margin, so that small targets can be seen."""
    if not region.any():
        return slice(None), slice(None)
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    side = int(max(np.ptp(rows), np.ptp(columns), min(region.shape) // 4) * (1 + margin)) + 1
    box = []
    for found, length in zip((rows, columns), region.shape, strict=True):
        start = max(0, min((found[0] + found[-1] - side) // 2, length - side))
        box.append(slice(start, start + side))
    return tuple(box)
