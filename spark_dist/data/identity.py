"""Which data something was made from, whatever the store and its folder are called."""

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


def split_fingerprints(store: Store, split: str) -> dict[str, dict[str, str]]:
    """Part → case → hash, for all cases of a split. Raises `UserError` if there is no such split, or a case is gone."""
    parts = (*PARTS, "unlabelled")
    return {part: {name: case_fingerprint(store, name) for name in store.split(split, part)} for part in parts}
