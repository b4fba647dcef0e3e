"""Cases to train, val and test."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import UserError
from .store import Store

PARTS = ("train", "val", "test")


def make_split(store: Store, fractions: Mapping[str, float], seed: int) -> dict[str, Any]:
    """A seeded split by case, with about the same share of cases with tumour in every part.

    Raises `UserError` if the fractions are no fractions of 1, or there are fewer cases than parts.
    """
    if any(f < 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"the parts must be fractions that sum to 1, not {', '.join(map(str, fractions.values()))}")
    random = np.random.default_rng(seed)
    groups: tuple[list[str], list[str]] = ([], [])
    for name, case in store.cases.items():
        groups[bool(len(case.task_slices("tumour")))].append(name)
    # Cases with and without tumour, each in random order, interleaved evenly, and then cut in places that spread them.
    order = sorted(
        ((rank + 0.5) / len(group), name)
        for group in groups
        for rank, name in enumerate(random.permutation(group).tolist())
    )
    target = {part: fractions[part] * len(order) for part in PARTS}
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for position, (_, name) in enumerate(order, start=1):
        share = position / len(order)
        parts[max(PARTS, key=lambda part: target[part] * share - len(parts[part]))].append(name)
    for part in PARTS:
        if fractions[part] > 0 and not parts[part]:
            raise UserError(
                f"{store.path}: {len(store.cases)} cases leave {part} ({fractions[part]:g}) without any; "
                "prepare more cases, or change the fractions"
            )
    return {**{part: sorted(names) for part, names in parts.items()}, "seed": seed, "fractions": dict(fractions)}
