"""Which data something was made from, whatever the store and its folder are called."""

from collections.abc import Mapping

from data_tools.ownership import fingerprint
from data_tools.split import PARTS
from data_tools.store import Store


def case_fingerprint(store: Store, name: str) -> str:
    """A hash of all that a case's voxels, labels and slices follow from."""
    case = store.cases[name]
    facts = {
        "source": {key: value for key, value in case.source.items() if key.endswith("_sha256")},
        "labels": store.attributes["labels"],
        "shape": case.shape,
        "affine": case.affine.tolist(),
        "window": case.window,
        "label_counts": case.label_counts.tolist(),
    }
    return fingerprint(facts)


def image_fingerprint(store: Store, name: str) -> str:
    """A hash of a case's image file, by which it is known in any store and under any name."""
    source = store.cases[name].source
    return fingerprint({"image": source.get("image_sha256") or case_fingerprint(store, name)})


def fold_of(store: Store, split: str, data: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The tags `fold` ("0 of 5") and `crossval`, a hash that the folds of one cross-validation share; none for a split
    that is no fold. `data` are the split's hashes (see `split_fingerprints`)."""
    record = store.splits[split]
    made = record.get("made") or {}
    if "folds" not in made:
        return {}
    cases = {name: found for part in data.values() for name, found in part.items()}
    shared = {"cases": cases, "made": {key: made[key] for key in made if key != "fold"}, "seed": record["seed"]}
    return {"fold": f"{made['fold']} of {made['folds']}", "crossval": fingerprint(shared)}


def split_fingerprints(store: Store, split: str) -> dict[str, dict[str, str]]:
    """Part → case → hash, for all cases of a split. Raises `UserError` if there is no such split, or a case is gone."""
    parts = (*PARTS, "unlabelled")
    return {part: {name: case_fingerprint(store, name) for name in store.split(split, part)} for part in parts}
