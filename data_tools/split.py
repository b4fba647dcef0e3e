"""Cases to train, val and test: by shares, by folds, or by fixed lists."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, unknown_name
from .store import Store

PARTS = ("train", "val", "test")
UNLABELLED = "unlabelled"


def split_by_shares(store: Store, shares: Mapping[str, float], seed: int) -> dict[str, Any]:
    """A seeded split into parts that are fractions of 1 (0.7), or numbers of cases (168) that sum to the store's.

    Every part has about the same share of the cases with each label. Raises `UserError` if the shares sum to neither,
    or a part that should have cases would get none.
    """
    total, shown = sum(shares.values()), ", ".join(f"{share:g}" for share in shares.values())
    cases, sound = len(labelled(store)), all(share >= 0 for share in shares.values())
    if sound and abs(total - 1) < 1e-6:
        sizes = rounded([shares[part] * cases for part in PARTS])
    elif sound and total == cases and all(share == int(share) for share in shares.values()):
        sizes = [int(shares[part]) for part in PARTS]
    else:
        raise UserError(
            "the parts must be fractions that sum to 1, or numbers of cases that sum to the "
            f"{cases} with labels in the store, not {shown}"
        )
    for part, size in zip(PARTS, sizes, strict=True):
        if shares[part] and not size:
            raise UserError(
                f"{store.path}: {cases} cases leave {part} ({shares[part]:g}) without any; "
                "prepare more cases, or change the fractions"
            )
    groups = deal(store, sizes, seed)
    return {**dict(zip(PARTS, groups, strict=True)), "seed": seed, "made": {"shares": dict(shares)}}


def split_by_folds(store: Store, folds: int, seed: int) -> list[dict[str, Any]]:
    """The splits of a cross-validation: in split k, fold k is test, the next fold is val and the others are train.

    So each case is tested once, by a network whose epoch was chosen on other cases. Every fold has about the same
    share of the cases with each label. Raises `UserError` for fewer than 3 folds, or fewer cases than folds.
    """
    cases = len(labelled(store))
    if not 3 <= folds <= cases:
        raise UserError(
            f"--folds {folds}: one fold is for test, one for val and the others for train, so that it takes 3 folds "
            f"or more, and no more than the {cases} cases with labels in {store.path}"
        )
    groups = deal(store, rounded([cases / folds] * folds), seed)
    records = []
    for k in range(folds):
        test, val, *train = groups[k:] + groups[:k]
        parts = {"train": sorted(name for group in train for name in group), "val": val, "test": test}
        records.append({**parts, "seed": seed, "made": {"fold": k, "folds": folds}})
    return records


def splits_by_lists(store: Store, file: Path) -> list[dict[str, Any]]:
    """The split, or the splits of a cross-validation, of a JSON file with {"train": [case, …], "val": …, "test": …},
    or a list of these. A part `unlabelled` names cases whose labels, if they have any, training does not see.

    Lists in which no split has a test part, such as nnU-Net's splits_final.json, are folds (see `with_tests`).

    Raises `UserError` if it is something else, names a case that is not in the store, or names one twice.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as JSON ({error})") from None
    splits = found if isinstance(found, list) else [found]
    if not splits or not all(is_split(split) for split in splits):
        raise UserError(f'{file}: write {{"train": [case, …], "val": […], "test": […]}}, or a list of these')
    records = []
    for split in splits:
        names = Counter(name for part in (*PARTS, UNLABELLED) for name in split.get(part, []))
        if unknown := [name for name in names if name not in store.cases]:
            raise UserError(f"{file}: {unknown_name('case', unknown[0], store.cases)} ({store.path})")
        bare = [name for part in PARTS for name in split.get(part, []) if not store.cases[name].labelled]
        if bare:
            raise UserError(
                f"{file}: case '{bare[0]}' has no labels, so that it can be in no part but {UNLABELLED}; take it out"
            )
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"{file}: case '{twice[0]}' is named twice; a case belongs to one part")
        parts = {part: sorted(split.get(part, [])) for part in PARTS}
        parts |= {UNLABELLED: sorted(split[UNLABELLED])} if UNLABELLED in split else {}
        records.append({**parts, "seed": None, "made": {"lists": file.name}})
    if len(records) > 1 and not any(record["test"] for record in records):
        records = with_tests(records, file)
    if is_crossval(records):
        for k, record in enumerate(records):
            record["made"] |= {"fold": k, "folds": len(records)}
    return records


def with_tests(records: Sequence[Mapping[str, Any]], file: Path) -> list[dict[str, Any]]:
    """The splits of a cross-validation whose folds have train and val cases only, with test cases as in
    `split_by_folds`: in split k, the val cases of fold k are test, and those of the next fold are val, not train.

    Raises `UserError` naming the `file` if there are fewer than 3 folds, or one does not hold the same cases as the
    others, or a case is val in several.
    """
    if len(records) < 3:
        raise UserError(
            f"{file}: one fold is for test, one for val and the others for train, so that it takes 3 folds or more; "
            "or give each a test part"
        )
    for k, record in enumerate(records):
        if not record["val"]:
            raise UserError(f"{file}: fold {k} has no val cases, which would be its test set")
        if differing := cases_of(record) ^ cases_of(records[0]):
            raise UserError(f"{file}: case '{min(differing)}' is not in all folds; each must name the same cases")
        for other in records[:k]:
            if twice := set(record["val"]) & set(other["val"]):
                raise UserError(f"{file}: case '{min(twice)}' is in the val part of two folds; each is tested in one")
    folds = [record["val"] for record in records]
    return [
        {**record, "train": [name for name in record["train"] if name not in val], "val": val, "test": record["val"]}
        for record, val in zip(records, folds[1:] + folds[:1], strict=True)
    ]


def is_crossval(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether splits are the folds of a cross-validation: several of the same cases, each tested in one at the most."""
    tests = [record["test"] for record in records]
    return (
        len(records) > 1
        and all(tests)
        and len(set().union(*tests)) == sum(map(len, tests))
        and all(cases_of(record) == cases_of(records[0]) for record in records)
    )


def cases_of(record: Mapping[str, Any]) -> set[str]:
    """The cases of all parts of a split."""
    return {name for part in (*PARTS, UNLABELLED) for name in record.get(part, [])}


def with_unlabelled(store: Store, record: Mapping[str, Any], hide: int) -> dict[str, Any]:
    """A split with the fourth part `unlabelled`: the store's cases without labels, and `hide` of the train cases at
    random, whose labels training does not see, as if nobody had drawn them. Without any, the split as it is.

    Raises `UserError` if that leaves no train case with its label.
    """
    if hide >= len(record["train"]) and hide:
        raise UserError(
            f"--hide-labels {hide}: {len(record['train'])} cases are in train, and one at least must keep its label"
        )
    hidden = sorted(np.random.default_rng([record["seed"] or 0, hide]).permutation(record["train"])[:hide].tolist())
    bare = [name for name, case in store.cases.items() if not case.labelled]
    # Lists name the cases they mean; none is added to them.
    bare = record.get(UNLABELLED, bare)
    if not hidden and not bare:
        return dict(record)
    train = [name for name in record["train"] if name not in hidden]
    made = record["made"] | ({"hidden": hide} if hide else {})
    return {**record, "train": train, UNLABELLED: sorted([*bare, *hidden]), "made": made}


def is_split(found: Any) -> bool:
    """Whether something read from JSON has the form of a split: a part or more, each a list of names."""
    return (
        isinstance(found, dict)
        and found.keys() <= {*PARTS, UNLABELLED}
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values())
        and any(found.values())
    )


def labelled(store: Store) -> list[str]:
    """The cases that can be in a part: those with labels."""
    return [name for name, case in store.cases.items() if case.labelled]


def rounded(sizes: Sequence[float]) -> list[int]:
    """Sizes as whole numbers of the same sum, each less than 1 off (largest remainder)."""
    whole = np.floor(np.asarray(sizes) + 1e-6).astype(int)
    missing = round(sum(sizes)) - whole.sum()
    whole[np.argsort(whole - np.asarray(sizes), kind="stable")[:missing]] += 1
    return whole.tolist()


def deal(store: Store, sizes: Sequence[int], seed: int) -> list[list[str]]:
    """All cases with labels to groups of these sizes at random, with about the same share of those with each label in
    each, of the rarest most closely."""
    random = np.random.default_rng(seed)
    groups: list[list[str]] = [[] for _ in sizes]
    names = labelled(store)
    has = np.array([store.cases[name].label_counts[:, 1:].any(axis=0) for name in names])
    rarest = np.argsort(has.sum(axis=0), kind="stable")
    alike: dict[tuple[bool, ...], list[str]] = {}
    for name, row in zip(names, has[:, rarest].tolist(), strict=True):
        alike.setdefault(tuple(row), []).append(name)
    # First those without the rarest label, then those with it, and so on within each; each case to the group that lacks
    # most: that keeps the shares.
    order = [name for key in sorted(alike) for name in random.permutation(alike[key]).tolist()]
    for seen, name in enumerate(order, start=1):
        open_groups = [g for g, size in enumerate(sizes) if len(groups[g]) < size]
        lacking = {g: sizes[g] * seen / len(order) - len(groups[g]) for g in open_groups}
        groups[max(lacking, key=lacking.get)].append(name)
    return [sorted(group) for group in groups]


def split_text(record: Mapping[str, Any]) -> str:
    """A split in words: how it was made and the sizes of its parts."""
    made = dict(record.get("made", {}))
    how = f"fold {made['fold']} of {made['folds']}, " if "folds" in made else ""
    how += f"lists of {made['lists']}, " if "lists" in made else ""
    seed = "" if record["seed"] is None else f", seed {record['seed']}"
    unlabelled = f", {len(record['unlabelled'])} unlabelled" if record.get("unlabelled") else ""
    return how + ", ".join(f"{len(record[part])} {part}" for part in PARTS) + unlabelled + seed
