"""Options of preparation, and how they are written on a command line."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import UserError
from .layouts import modality
from .location import located
from .store import check_name, read_attributes

HU_WINDOWS = {"kits": (-200.0, 300.0), "lits": (-60.0, 140.0)}
"""Hounsfield units that the original system maps to −1 and 1."""
PERCENTILES = (0.5, 99.5)
LARGEST_SIDE = 8192
"""Pixels of a slice's side that `--size` and `--plane-spacing` may ask for."""


@dataclass(frozen=True)
class Options:
    """Options by which volumes become a store."""

    store: Path
    labels: dict[str, list[int]]
    other: bool
    window: dict[str, Any]
    channel: int | None = None
    size: tuple[int, int] | None = None
    """Rows and columns that all slices are resampled to."""
    plane_spacing: tuple[float, float] | None = None
    """mm between rows and between columns that all slices are resampled to."""
    layout: str = "kits"
    patterns: tuple[str, str] | None = None
    """Images and labels in layout pairs."""
    spacing: tuple[float, float, float] | None = None
    """mm along a file's axes, for files that do not know theirs."""
    regions: dict[str, list[str]] | None = None
    """Labels of the regions that are declared beside the labels themselves."""
    replace: bool = False
    """Replace sound cases that are made of other files."""

    def facts(self) -> dict[str, Any]:
        """The options that a store remembers: all cases of a store are made alike."""
        facts = {"labels": self.labels, "other": self.other, "window": self.window, "layout": self.layout}
        further = {"channel": self.channel, "size": self.size, "patterns": self.patterns, "regions": self.regions}
        further["plane_spacing"] = self.plane_spacing
        return facts | {key: value for key, value in further.items() if value is not None}


def options_of(store: Path) -> Options:
    """The options that a store was made with. Raises `UserError`."""
    facts = read_attributes(store)
    return Options(store, **{field.name: facts[field.name] for field in fields(Options) if field.name in facts})


def default_window(layout: str, root: Path) -> dict[str, Any]:
    """The layout's own window, percentiles for MR. Raises `UserError`."""
    low, high = HU_WINDOWS.get(layout, HU_WINDOWS["kits"])
    return parse_window("percentile" if "MR" in modality(root, layout).upper() else f"{low},{high}")


def parse_window(text: str) -> dict[str, Any]:
    """`LOW,HIGH` or `percentile`. Raises `UserError`."""
    if text == "percentile":
        return {"kind": "percentile", "low": PERCENTILES[0], "high": PERCENTILES[1]}
    try:
        low, high = (float(value) for value in text.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--window {text}: write LOW,HIGH (for instance -200,300) or percentile")
    return {"kind": "fixed", "low": low, "high": high}


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `512,384` (rows, columns). Raises `UserError`."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number <= LARGEST_SIDE for number in numbers):
        raise UserError(f"--size {text}: write 512, or ROWS,COLUMNS")
    return numbers[0], numbers[-1]


def parse_plane_spacing(text: str) -> tuple[float, float]:
    """`0.8` or `0.8,0.7` (mm between rows, between columns). Raises `UserError`."""
    numbers = lengths(text)
    if len(numbers) not in (1, 2):
        raise UserError(f"--plane-spacing {text}: write a length in mm, like 0.8, or two, ROWS,COLUMNS")
    return numbers[0], numbers[-1]


def parse_spacing(text: str) -> tuple[float, float, float]:
    """`0.7,0.7,2.5`, mm along the three axes of a file. Raises `UserError`."""
    numbers = lengths(text)
    if len(numbers) != 3:
        raise UserError(f"--spacing {text}: write three lengths in mm, along the file's axes, like 0.7,0.7,2.5")
    return numbers


def lengths(text: str) -> tuple[float, ...]:
    """Lengths in mm, separated by commas; none if any is no length that a voxel may have."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        return ()
    return numbers if all(1e-4 < number < 1e3 for number in numbers) else ()


def parse_part(text: str) -> tuple[int, int]:
    """`3/8` to (3, 8). Raises `UserError`."""
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split("/")]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--part {text}: write K/N with K from 1 to N, like 1/8 … 8/8")
    return numbers[0], numbers[1]


def whole(lowest: int, highest: int | None = None):
    """A type of option: a whole number from `lowest` up, or to `highest`."""
    limits = f"from {lowest} up" if highest is None else f"from {lowest} to {highest}"

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or not lowest <= int(text) <= (highest or int(text)):
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number {limits}")
        return int(text)

    return number


def gibibytes(text: str) -> float:
    """A type of option: an amount of memory."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is no amount of memory in GiB, like 8 or 0.5")
    return number


def place(text: str) -> Path:
    """A type of option: a file or a folder. An empty text, as of a shell's variable that is not set, is neither."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def store_place(text: str) -> Path:
    """A type of option: a slice store, in a folder or a bucket."""
    return located(place(text))


def share_of_cases(text: str) -> float:
    """A type of option: a fraction, or a number of cases."""
    try:
        share = int(text) if text.isdecimal() else float(text)
    except ValueError:
        share = -1
    if not (0 <= share <= 1 or (share == int(share) if 1 < share < 1e9 else False)):
        raise argparse.ArgumentTypeError(f"'{text}' is no fraction (0.7) and no number of cases (168)")
    return share


def prediction_name(text: str) -> str:
    """A type of option: what can be the name of predictions."""
    check_name("prediction", text)
    return text


def split_name(text: str) -> str:
    """A type of option: what can be the name of a split."""
    check_name("split", text)
    return text
