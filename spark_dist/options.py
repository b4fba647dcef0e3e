"""Types of options: numbers with bounds, and the base class that checks them."""

import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from data_tools.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Range of numbers that an option takes: never infinite ones, nor NaN."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def broken_by(self, number: float) -> str | None:
        """The bound that a number breaks, in words, or None."""
        if isinstance(number, float) and not math.isfinite(number):
            return "a finite number"
        kept = {
            "at_least": number >= self.at_least,
            "above": number > self.above,
            "at_most": number <= self.at_most,
            "below": number < self.below,
        }
        return next((f"{n.replace('_', ' ')} {getattr(self, n):,}" for n, within in kept.items() if not within), None)


MANY = 10**9
Count = Annotated[int, Bounds(at_least=1, at_most=MANY)]
Natural = Annotated[int, Bounds(at_least=0, at_most=MANY)]
Seed = Annotated[int, Bounds(at_least=0, below=2**32)]
"""A seed that NumPy, Python and torch all take."""
Pixels = Annotated[int, Bounds(at_least=1, at_most=2**14)]
Offset = Annotated[int, Bounds(at_least=-(2**14), at_most=2**14)]
Context = Annotated[int, Bounds(at_least=0, at_most=64)]
Workers = Annotated[int, Bounds(at_least=0, at_most=1024)]
Minutes = Annotated[float, Bounds(above=0, at_most=MANY)]
Number = Annotated[float, Bounds()]
NonNegative = Annotated[float, Bounds(at_least=0)]
Width = Annotated[float, Bounds(above=0, at_most=16)]
Probability = Annotated[float, Bounds(above=0, below=1)]
Decay = Annotated[float, Bounds(at_least=0, below=1)]


@dataclass(kw_only=True)
class Options:
    """The base of every command's options, which keep the bounds that their types declare.

    A field with `positional` (its help) in its metadata is an argument without `--`.
    """

    def __post_init__(self):
        """Raises `UserError` naming the first option out of its bounds, or an argument that is empty."""
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            for value in parts_of(getattr(self, field.name)):
                if isinstance(value, str | Path) and "\0" in str(value):
                    raise UserError(f"{shown(field)} holds a zero byte")
                if value == "" and "positional" in field.metadata:
                    raise UserError(f"argument {field.name} is empty; is a variable not set?")
                for bounds in bounds_in(hints[field.name]):
                    if isinstance(value, int | float) and (broken := bounds.broken_by(value)):
                        raise UserError(f"{shown(field)} must be {broken}, not {reprlib.repr(value)}")


@dataclass(kw_only=True)
class ServerOptions(Options):
    """Tracking (MLflow)"""

    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow tracking server, or a local SQLite file."""

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"databricks|[a-z][a-z0-9+.-]*:.+", self.tracking_uri):
            raise UserError(
                f"--tracking-uri '{self.tracking_uri}': give a server (http://host:5000) or a file (sqlite:///mlflow.db)"
            )


def flag(name: str) -> str:
    """An option as people type it."""
    return f"--{name.replace('_', '-')}"


def shown(field: Field) -> str:
    """An option's name in help and errors."""
    return field.name if "positional" in field.metadata else flag(field.name)


def bounds_in(hint: Any) -> Iterator[Bounds]:
    """The bounds declared anywhere in a type."""
    for part in get_args(hint):
        if isinstance(part, Bounds):
            yield part
        else:
            yield from bounds_in(part)


def parts_of(value: Any) -> list[Any]:
    """The single values of an option."""
    return list(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value])
