"""Pictures while a network trains, in files as MLflow's pages look for them."""

import time
import uuid
from pathlib import Path

import cv2
import numpy as np

from data_tools.files import write_atomically

SMALL = 256
"""Pixels of the longer side of a picture in the list."""


def write_picture(folder: Path, key: str, picture: np.ndarray, step: int) -> list[Path]:
    """Write a picture (H, W, 3) uint8 RGB and a small one for lists, under the names by which MLflow's `log_image`
    makes series of them. One that is there already, from before a kill, is replaced."""
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+"
    for left in folder.glob(f"{name}*"):
        left.unlink()
    name += f"{int(time.time() * 1000)}+{uuid.uuid4()}"
    rows, columns = picture.shape[:2]
    size = [max(1, side * SMALL // max(rows, columns)) for side in (columns, rows)]
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    files = {f"{name}.png": picture, f"{name}+compressed.webp": small}
    for file, pixels in files.items():
        _, data = cv2.imencode(Path(file).suffix, pixels[..., ::-1])
        write_atomically(folder / file, lambda aside, data=data: aside.write_bytes(data.tobytes()))
    return [folder / file for file in files]
