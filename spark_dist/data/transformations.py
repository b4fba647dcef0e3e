"""Small changes of geometry and of intensities in the plane, each a pure function of a few uniform numbers.

The set, its probabilities and most of its ranges are those of nnU-Net's 2D training (Isensee et al., Nature Methods
2021), but rotation, scaling and shift are small and in every view: a teacher cache keeps only some views of a slice.

All that is geometric becomes one affine map, so that a slice is interpolated once. A new transformation is one function
and one line at the end of `GEOMETRIC` or `INTENSITY`; those before it keep their random numbers.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

Uniforms = np.ndarray
"""(4,) numbers in [0, 1), a transformation's own."""


def between(low: float, high: float, u: float) -> float:
    """Uniform between two numbers."""
    return low + (high - low) * u


def log_between(low: float, high: float, u: float) -> float:
    """Uniform between two numbers on a logarithmic scale."""
    return math.exp(between(math.log(low), math.log(high), u))


# Geometric: (crop size, uniforms) → 3×3, from centred (row, column) in the crop to centred (row, column) in the slice.


def rotation(size: tuple[int, int], u: Uniforms) -> np.ndarray:
    """±15 degrees."""
    angle = math.radians(between(-15, 15, u[0]))
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def scaling(size: tuple[int, int], u: Uniforms) -> np.ndarray:
    """0.85 to 1.18 times as large."""
    factor = log_between(0.85, 1 / 0.85, u[0])
    return np.diag([1 / factor, 1 / factor, 1])


def shift(size: tuple[int, int], u: Uniforms) -> np.ndarray:
    """Up to a twentieth of the crop's sides."""
    rows, columns = (between(-0.05, 0.05, v) * side for v, side in zip(u, size, strict=False))
    return np.array([[1, 0, rows], [0, 1, columns], [0, 0, 1]])


GEOMETRIC: dict[str, Callable[[tuple[int, int], Uniforms], np.ndarray]] = {
    "rotation": rotation,
    "scaling": scaling,
    "shift": shift,
}
"""In every view, in this order from the crop to the slice."""


# Intensity: (image (C, H, W) float32 in [0, 1], uniforms) → the same.


def noise(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """Gaussian noise of a standard deviation up to 5% of the window."""
    random = np.random.default_rng(np.frombuffer(u[1:3].tobytes(), np.uint64))
    return image + np.float32(between(0, 0.05, u[0])) * random.standard_normal(image.shape, np.float32)


def blur(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """Gaussian, of a standard deviation of 0.5 to 1 pixels."""
    sigma = between(0.5, 1, u[0])
    return each(image, lambda plane: cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))


def brightness(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """All intensities times 0.75 to 1.25."""
    return image * np.float32(between(0.75, 1.25, u[0]))


def contrast(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """Distances from the mean times 0.75 to 1.25, within the range of before."""
    mean, low, high = image.mean(), image.min(), image.max()
    return ((image - mean) * np.float32(between(0.75, 1.25, u[0])) + mean).clip(low, high)


def low_resolution(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """As if pixels had been up to twice as large."""
    factor = between(0.5, 1, u[0])
    height, width = image.shape[1:]
    small = (max(1, round(width * factor)), max(1, round(height * factor)))

    def coarse(plane: np.ndarray) -> np.ndarray:
        return cv2.resize(
            cv2.resize(plane, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC
        )

    return each(image, coarse)


def gamma(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """To the power of 0.7 to 1.5, relative to its own range."""
    low, high = image.min(), image.max()
    if high - low < 1e-6:
        return image
    return ((image - low) / (high - low)) ** np.float32(log_between(0.7, 1.5, u[0])) * (high - low) + low


def gamma_inverted(image: np.ndarray, u: Uniforms) -> np.ndarray:
    """Gamma of the negative."""
    return 1 - gamma(1 - image, u)


def each(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Every plane of an image (C, H, W) changed."""
    return np.stack([change(plane) for plane in image])


INTENSITY: dict[str, tuple[float, Callable[[np.ndarray, Uniforms], np.ndarray]]] = {
    "noise": (0.1, noise),
    "blur": (0.2, blur),
    "brightness": (0.15, brightness),
    "contrast": (0.15, contrast),
    "low resolution": (0.25, low_resolution),
    "gamma of the negative": (0.1, gamma_inverted),
    "gamma": (0.3, gamma),
}
"""With these probabilities, in this order."""


def uniforms(*place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The random numbers of one view of one slice, in [0, 1): (len(GEOMETRIC), 4) and (len(INTENSITY), 5) for the
    transformations, and (4,) for orientation and crop."""
    streams = np.random.SeedSequence(place).spawn(3)
    counts = ((len(GEOMETRIC), 4), (len(INTENSITY), 5), (4,))
    return tuple(np.random.default_rng(s).random(count) for s, count in zip(streams, counts, strict=True))


def affine(size: tuple[int, int], numbers: np.ndarray) -> np.ndarray:
    """The geometric transformations as one map (3×3) between places off the crop's centre and off the slice's."""
    matrix = np.eye(3)
    for transformation, u in zip(GEOMETRIC.values(), numbers, strict=True):
        matrix = transformation(size, u) @ matrix
    return matrix


def warp(plane: np.ndarray, matrix: np.ndarray, size: tuple[int, int], fill: float, nearest: bool) -> np.ndarray:
    """A slice (H, W) seen through an affine map (3×3) from (row, column) in the result to (row, column) in the slice.

    `fill` is what lies beyond the slice; `nearest` for labels.
    """
    rows_last = matrix[[1, 0, 2]][:, [1, 0, 2]]  # OpenCV's places are (column, row)
    how = cv2.WARP_INVERSE_MAP | (cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR)
    return cv2.warpAffine(plane, rows_last[:2], size[::-1], flags=how, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


def changed(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The intensity transformations of an image (C, H, W) float32 in [0, 1]; what leaves the range is clipped."""
    for (probability, transformation), u in zip(INTENSITY.values(), numbers, strict=True):
        if u[0] < probability:
            image = transformation(image, u[1:])
    return np.clip(image, 0, 1, dtype=np.float32)


def in_window(image: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Intensities as float32, 0 at the window's low end and 1 at its high end, clipped."""
    low, high = np.float32(window[0]), np.float32(window[1])
    return ((image.astype(np.float32) - low) / (high - low)).clip(0, 1)
