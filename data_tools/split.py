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
    if not all(f >= 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"the parts must be fractions that sum to 1, not {', '.join(map(str, fractions.values()))}")
    random = np.random.default_rng(seed)
    groups: tuple[list[str], list[str]] = ([], [])
    for name, case in store.cases.items():
        groups[bool(len(case.task_slices("tumour")))].append(name)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    # One group after the other, each case to the part that lacks most: that keeps the shares in each group and in all.
    order = [name for group in groups for name in random.permutation(group).tolist()]
    for seen, name in enumerate(order, start=1):
        parts[max(PARTS, key=lambda part: fractions[part] * seen - len(parts[part]))].append(name)
    for part in PARTS:
        if fractions[part] > 0 and not parts[part]:
            raise UserError(
                f"{store.path}: {len(store.cases)} cases leave {part} ({fractions[part]:g}) without any; "
                "prepare more cases, or change the fractions"
            )
    return {**{part: sorted(names) for part, names in parts.items()}, "seed": seed, "fractions": dict(fractions)}
