"""The share of the target that training's crops never see."""

from typing import NamedTuple

import numpy as np

from .augmentation import Views
from .slices import SliceTable, VoxelReader

LOOKED_AT = 512
"""How many slices are looked at, evenly over those that show the target."""
MUCH = 0.01
"""The share from which on there is a warning."""


class Unseen(NamedTuple):
    """The part of the target that lies outside every crop."""

    share: float
    case: str
    """The case of which most is unseen."""
    of_case: float
    """Its share."""


def unseen_target(table: SliceTable, task: str, views: Views) -> Unseen:
    """The part of the target that crops never see in a table of slices that show it; augmentation's shifts don't count.

    Raises `UserError` for a damaged slice.
    """
    if views.anywhere:
        return Unseen(0.0, table.cases[0], 0.0)
    rows = np.unique(np.linspace(0, len(table) - 1, min(LOOKED_AT, len(table))).round().astype(int))
    reader, classes = VoxelReader(table.store), table.store.task(task)
    counts = np.zeros((len(rows), 2), np.int64)

    def look(n: int) -> None:
        row = rows[n]
        label = reader.slice(table.cases[table.case[row]], "label", int(table.slice[row]))
        target = classes.classes_of(label) > 0
        counts[n] = target.sum(), target[views.crop.overlap(label.shape)[0]].sum()

    reader.each(look, len(rows))
    of_cases = np.zeros((len(table.cases), 2), np.int64)
    np.add.at(of_cases, table.case[rows], counts)
    shares = 1 - of_cases[:, 1] / of_cases[:, 0].clip(min=1)
    shares[of_cases[:, 0] == 0] = 0
    total = of_cases.sum(axis=0)
    worst = int(shares.argmax())
    return Unseen(float(1 - total[1] / total[0]), table.cases[worst], float(shares[worst]))


def coverage_line(found: Unseen, views: Views) -> str:
    """The part that crops never see, for people; a warning where it is much."""
    if views.anywhere:
        return "crops lie anywhere in the plane: all of the target is within their reach"
    size = "×".join(map(str, views.crop.size))
    line = f"crops of {size} never see {found.share:.1%} of the training cases' target"
    if found.share <= MUCH:
        return line
    return (
        f"warning: {line} ({found.of_case:.0%} of {found.case}'s); choose --crop and --crop-shift (spark-data stats "
        "suggests them), or --crop-at anywhere"
    )
