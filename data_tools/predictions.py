"""Predictions by a foreign model for the cases of a store, prepared beside them so that a student can learn from them.

    STORE/predictions/<name>/<case>/               Zarr group; attributes: see `facts` in `foreign.prepare_prediction`
    STORE/predictions/<name>/<case>/label          (Z, H, W) uint8, as the store's labels: from a NIfTI label map
    STORE/predictions/<name>/<case>/probabilities  (Z, L, H, W) float16 of the store's L labels: from nnU-Net's .npz

A case's folder is made aside and renamed, so that one that is there is complete.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .sealed import is_sealed, read_sealed
from .store import Store

FORMAT = "spark-dist prediction"


def prediction_facts(store: Store, name: str, cases: Sequence[str]) -> dict[str, Any]:
    """The facts kept of predictions, by case: the files that they were made of, and what their values mean."""
    return {case: read_sealed(prediction_of(store, name, case)[0]) for case in cases}


def prediction_of(store: Store, name: str, case: str) -> tuple[Path, str]:
    """The folder of a case's prediction and its array: `label` or `probabilities`.

    Raises `UserError` if it is not there, damaged, or was made for another image.
    """
    folder = store.path / "predictions" / name / case
    if not is_sealed(folder):
        names = sorted(place.name for place in (store.path / "predictions").glob("*") if place.is_dir())
        if name not in names:
            known = f"; there are {', '.join(names)}" if names else ""
            raise UserError(
                f"{store.path}: has no predictions '{name}'{known}; prepare them with spark-data predictions"
            )
        raise UserError(
            f"{store.path}: case {case} has no prediction '{name}'; put its file into the folder of the others, and "
            "run spark-data predictions again"
        )
    facts = read_sealed(folder)
    if facts.get("image_sha256") != store.cases[case].source.get("image_sha256"):
        raise UserError(
            f"{folder}: was made for another image of case {case}; predict it again, and run spark-data predictions "
            "with --replace"
        )
    return folder, "label" if (folder / "label").is_dir() else "probabilities"
