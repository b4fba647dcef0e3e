"""The folds of a cross-validation as one run, in which every case is tested once."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from .comparison import Run


def pool_folds(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs in which those on all folds of a cross-validation, which differ in nothing else, are one; and lines on those
    that can't be pooled, which stay as they are.

    The pooled run has the metrics of all test cases, each by the network that has not seen it.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for item in runs:
        facts = (item.task, item.role, item.network, item.width, item.method, item.teacher, item.seed)
        facts += (item.options, item.method_options)
        groups[(item.crossval, *facts) if item.crossval else (id(item),)].append(item)
    found, notes = [], []
    for members in groups.values():
        if not members[0].crossval:
            found += members
        elif why := not_whole(members):
            found += members
            notes.append(f"{title(members[0])}: not pooled, as {why}; each fold has a table of its own")
        else:
            found.append(pooled(members))
    return found, notes


def not_whole(members: Sequence[Run]) -> str:
    """The reason why folds are no whole cross-validation; "" if they are one."""
    there = {int(item.fold.split(" of ")[0]) for item in members}
    missing = sorted(set(range(int(members[0].fold.split(" of ")[1]))) - there)
    if missing:
        return f"fold {', '.join(map(str, missing))} is not finished"
    if sum(len(item.cases) for item in members) > len(set().union(*(item.cases for item in members))):
        return "some cases are tested in several folds"
    return ""


def pooled(members: Sequence[Run]) -> Run:
    """All folds as one run."""
    first = min(members, key=lambda item: int(item.fold.split(" of ")[0]))
    cases = {case: metrics for item in members for case, metrics in item.cases.items()}
    folds = first.fold.split(" of ")[1]
    return replace(
        first, split=f"{base(first.split)}, {folds} folds", data=first.crossval, fold="", crossval="", cases=cases
    )


def title(item: Run) -> str:
    """The runs of a cross-validation for people."""
    how = item.role if item.method == "none" else f"{item.role}, {item.method}"
    return f"{how} {item.network}, seed {item.seed}, folds of split {base(item.split)}"


def base(split: str) -> str:
    """The name that `spark-data split --folds` was given."""
    return re.sub(r"-fold\d+$", "", split)
