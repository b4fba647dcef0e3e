"""The labels of a store, the regions that are made of them, and tasks of one region or several.

A store declares its labels in order, and a label's stored value is its position, from 1. A region is a set of labels:
every label is one, and others are declared. A task is one region or several.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import UserError, unknown_name

NAME = re.compile(r"[^\W\d_][\w.-]*")
"""Names of labels and regions. They are words of options, and parts of metrics' names."""
RESERVED = ("all", "background")
MOST = 255
"""Labels that a store may have, whose voxels are uint8."""
REGIONS = {
    "organ": ("organ", "tumour"),  # a tumour lies in its organ and belongs to it
}
"""Regions that stores have by themselves, if they have all these labels."""
LESION = REGIONS["organ"]
DEFAULT_LABELS = {"kits": {"organ": [1], "tumour": [2]}, "lits": {"organ": [1], "tumour": [2]}}
"""Source values of the labels of layouts that are of one data set."""


def parse_labels(text: str) -> dict[str, list[int]]:
    """`anterior=1,posterior=2+3` to the source values of each label. Raises `UserError`."""
    mapping: dict[str, list[int]] = {}
    for name, values in parts_of(text, "--labels", "anterior=1,posterior=2 or organ=1+3 (0 is background)"):
        if not all(re.fullmatch(r"[+-]?\d{1,10}", value) and 0 < abs(int(value)) < 2**31 for value in values):
            raise UserError(f"--labels {text}: write it like anterior=1,posterior=2 or organ=1+3 (0 is background)")
        mapping[name] = [int(value) for value in values]
    counts = Counter(value for group in mapping.values() for value in group)
    if repeated := [value for value, count in counts.items() if count > 1]:
        names = [name for name, group in mapping.items() if repeated[0] in group]
        raise UserError(
            f"--labels {text}: value {repeated[0]} is given more than once ({', '.join(names)}); labels can't overlap, "
            "and --regions makes unions of them"
        )
    if len(mapping) > MOST:
        raise UserError(f"--labels: {len(mapping)} labels, and a store has {MOST} at most")
    return in_order(mapping)


def parse_regions(text: str) -> dict[str, list[str]]:
    """`organ=organ+tumour` to the labels of each region. Raises `UserError`."""
    return dict(parts_of(text, "--regions", "organ=organ+tumour,kidneys=left+right"))


def parts_of(text: str, option: str, example: str) -> list[tuple[str, list[str]]]:
    """Names and what is behind each, of `a=b+c,d=e`. Raises `UserError` for a name that can't be one, or is there
    twice."""
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        name, _, values = (word.strip() for word in part.partition("="))
        if not name or not values:
            raise UserError(f"{option} {text}: write it like {example}")
        if not NAME.fullmatch(name) or name in RESERVED:
            raise UserError(
                f"{option} {text}: '{name}' can't be a name; use letters, digits and . _ - after a letter, and not "
                f"{' or '.join(RESERVED)}"
            )
        if name in found:
            raise UserError(f"{option} {text}: '{name}' is there twice")
        found[name] = [value.strip() for value in values.split("+")]
    return list(found.items())


def check_regions(labels: Mapping[str, Any], regions: Mapping[str, Sequence[str]]) -> None:
    """Raise `UserError` for a region of labels that are not declared, or with the name of a label that is no part."""
    for name, parts in regions.items():
        text = f"--regions {name}={'+'.join(parts)}"
        for part in parts:
            if part not in labels:
                raise UserError(f"{text}: {unknown_name('label', part, labels)}")
        if len(set(parts)) < len(parts):
            raise UserError(f"{text}: names a label twice")
        if name in labels and name not in parts:
            raise UserError(f"{text}: there is a label '{name}', which must be a part of it; take another name")


def in_order(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Labels in the order of their stored values, from 1: as they are declared, but the organ before the tumour
    wherever these are all, as in stores that earlier versions made."""
    return {name: labels[name] for name in LESION} if set(labels) == set(LESION) else dict(labels)


def source_values(labels: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The source's value of each stored label."""
    return np.array([0, *(values[0] for values in in_order(labels).values())])


def regions_of(attributes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The stored values of each region of a store with these attributes: first of each label's, in order."""
    values = {name: value for value, name in enumerate(in_order(attributes.get("labels", {})), start=1)}
    regions = {name: [name] for name in values}
    regions |= {name: list(labels) for name, labels in REGIONS.items() if values.keys() >= set(labels)}
    regions |= attributes.get("regions") or {}
    return {name: tuple(sorted(values[label] for label in labels)) for name, labels in regions.items()}


@dataclass(frozen=True)
class Task:
    """The classes that are told apart in a store: the background, and a class for each region, a later one winning over
    an earlier where they overlap."""

    regions: Mapping[str, tuple[int, ...]]
    """The stored values of each region."""

    @cached_property
    def values(self) -> tuple[tuple[int, ...], ...]:
        """The stored values of each class but the background."""
        groups = list(self.regions.values())
        later = [set().union(*groups[position + 1 :]) for position in range(len(groups))]
        return tuple(tuple(v for v in group if v not in won) for group, won in zip(groups, later, strict=True))

    @property
    def classes(self) -> int:
        """How many classes there are, the background among them."""
        return 1 + len(self.regions)

    def classes_of(self, label: np.ndarray) -> np.ndarray:
        """Stored labels (…) to classes (…) uint8."""
        table = np.zeros(MOST + 1, np.uint8)
        for number, group in enumerate(self.values, start=1):
            table[list(group)] = number
        return table[label]

    def inside(self, region: Sequence[int]) -> list[int]:
        """The classes that a region of these stored values consists of. Raises `ValueError` if it cuts through one."""
        found = [number for number, group in enumerate(self.values, start=1) if set(group) & set(region)]
        if set(region) != set().union(*(self.values[number - 1] for number in found)):
            raise ValueError("is no union of classes")
        return found


def names_in(task: str) -> list[str]:
    """The regions that a task names, `anterior,posterior`. Raises `UserError` for one that is empty or there twice."""
    names = [name.strip() for name in task.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--task {task}: name regions once each, like organ or anterior,posterior, or all")
    return names


def make_task(task: str, known: Mapping[str, tuple[int, ...]], where: str) -> Task:
    """The task that names these regions, or `all`, of the `known` ones of `where`.

    `all` are those that have voxels of their own, the larger first, so that smaller ones win. Raises `UserError` for a
    region that is not known, or is wholly hidden by later ones.
    """
    if task == "all":
        names = sorted(known, key=lambda name: -len(known[name]))
        whole = Task({name: known[name] for name in names})
        names = [name for name, group in zip(names, whole.values, strict=True) if group]
    else:
        names = names_in(task)
    for name in names:
        if name not in known:
            raise UserError(f"{where}: --task {task}: {unknown_name('region', name, known)}")
    found = Task({name: known[name] for name in names})
    if not names:
        raise UserError(f"{where}: has no labels, so that there is nothing to segment; prepare cases with --labels")
    for name, group in zip(names, found.values, strict=True):
        if not group:
            raise UserError(
                f"{where}: --task {task}: all of '{name}' belongs to later regions too, which win; name it after "
                "those that it lies in, or leave it out if they are its parts"
            )
    return found


def fullest(counts: np.ndarray) -> np.ndarray:
    """Places (n,) by their voxels of regions (n, R): the most regions first, and of these most of the smallest."""
    by_size = np.argsort(-counts.sum(axis=0), kind="stable")
    return np.lexsort((*(-counts[:, by_size]).T, -(counts > 0).sum(axis=1)))
