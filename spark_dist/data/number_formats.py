"""The number formats in which a teacher's targets are stored, and the way back."""

import math
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

DTYPES = ("float16", "bfloat16", "float32", "int8")

FEW = 16
"""A target of at most so many values a sample stays in float32: rounding it would save nothing."""

PREDICTION = "prediction"
"""The target that is the teacher's predicted class in each pixel, (N, H, W): whole numbers."""

SCALE = ".scale"
"""Behind a target's name, it names the array with the scales of an int8 target."""

ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "int8": 0.5 / 127}
"""The largest rounding error: of a value relative to itself, and for int8 to the largest value of its channel."""


def stored_arrays(shapes: Mapping[str, Sequence[int]], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arrays that hold targets of these shapes a sample: name → (shape a sample, number format)."""
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = tuple(shape), stored_dtype(name, shape, dtype)
        if arrays[name][1] == "int8":
            arrays[name + SCALE] = channels(shape), "float32"
    return arrays


def stored_dtype(name: str, shape: Sequence[int], dtype: str) -> str:
    """The number format in which a target of this shape a sample is stored."""
    if name == PREDICTION:
        return "uint8"
    return "float32" if math.prod(shape) <= FEW else dtype


def channels(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an int8 target's scales: one for each channel (C, H, W), or for the whole of (H, W) or (C,)."""
    return tuple(shape[:1]) if len(shape) > 2 else (1,)


def entry_bytes(shapes: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Bytes of one entry, uncompressed."""
    return sum(math.prod(shape) * numpy_dtype(kind).itemsize for shape, kind in stored_arrays(shapes, dtype).values())


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's type of a number format, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def encode(targets: Mapping[str, Tensor], dtype: str) -> dict[str, np.ndarray]:
    """Targets (N, …) as the arrays that are stored (see `stored_arrays`)."""
    arrays = {}
    for name, x in targets.items():
        x, kind = x.detach().float(), stored_dtype(name, x.shape[1:], dtype)
        if kind == "int8":
            flat = x.reshape(len(x), *channels(x.shape[1:]), -1)
            scale = flat.abs().amax(dim=2) / 127
            x = (flat / scale.clamp(min=1e-30).unsqueeze(2)).round().view_as(x).to(torch.int8)
            arrays[name + SCALE] = scale.cpu().numpy()
        elif kind == "float16":
            x = x.clamp(-65504, 65504)  # Values beyond the format's range would be read back as infinite.
        arrays[name] = as_array(x.to(getattr(torch, kind)).cpu().contiguous())
    return arrays


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The targets, in float32, from the arrays that were stored."""
    targets = {}
    for name, x in stored.items():
        if name.endswith(SCALE):
            continue
        if (scale := stored.get(name + SCALE)) is not None:
            flat = x.reshape(*scale.shape, -1).float() * scale.unsqueeze(2)
            targets[name] = flat.view(x.shape)
        else:
            targets[name] = x.float()
    return targets


def as_array(x: Tensor) -> np.ndarray:
    """Numpy knows bfloat16 by an extension only, torch not at all: between the two it travels as 16 bits."""
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def as_tensor(x: np.ndarray) -> Tensor:
    """The way back from `as_array`."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
