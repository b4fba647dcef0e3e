"""Where the images and labels of a data set lie."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


@dataclass(frozen=True)
class Source:
    """The two files of a case."""

    case: str
    image: Path
    label: Path


def find_kits(root: Path) -> list[Source]:
    """KiTS19: case_00000/imaging.nii.gz and segmentation.nii.gz."""
    return [
        Source(folder.name, nifti(folder / "imaging"), nifti(folder / "segmentation"))
        for folder in sorted(root.glob("case_*"))
        if folder.is_dir()
    ]


def find_lits(root: Path) -> list[Source]:
    """LiTS: volume-N.nii and segmentation-N.nii, in one folder or in data/ and segmentation/."""
    found = []
    images = sorted(p for pattern in ("volume-*.nii*", "data/volume-*.nii*") for p in root.glob(pattern))
    for image in images:
        number = re.fullmatch(r"volume-(\d+)\.nii(\.gz)?", image.name)
        if number:
            folder = root / "segmentation" if image.parent.name == "data" else image.parent
            found.append(Source(f"volume-{int(number[1]):03}", image, nifti(folder / f"segmentation-{number[1]}")))
    return found


def find_msd(root: Path) -> list[Source]:
    """Medical Segmentation Decathlon: the pairs under `training` in dataset.json."""
    pairs = msd_description(root).get("training", [])
    return [
        Source(re.sub(r"\.nii(\.gz)?$", "", Path(pair["image"]).name), root / pair["image"], root / pair["label"])
        for pair in pairs
    ]


def msd_description(root: Path) -> dict:
    """What dataset.json says."""
    file = root / "dataset.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: the msd layout needs this file ({error})") from None


def find_pairs(root: Path, image_pattern: str, label_pattern: str) -> list[Source]:
    """Files that match `image_pattern`, such as "images/{case}_ct.nii.gz", with the label that has the same {case}."""
    for option, pattern in (("--image-pattern", image_pattern), ("--label-pattern", label_pattern)):
        if not pattern or pattern.count("{case}") != 1:
            raise UserError(f'{option}: layout pairs needs a pattern with one {{case}}, such as "{{case}}_ct.nii.gz"')
    expression = re.compile(re.escape(image_pattern).replace(re.escape("{case}"), r"([^/]+)").replace(r"\*", r"[^/]*"))
    found = []
    for image in sorted(root.glob(image_pattern.replace("{case}", "*"))):
        if match := expression.fullmatch(image.relative_to(root).as_posix()):
            found.append(Source(match[1], image, root / label_pattern.replace("{case}", match[1])))
    return found


LAYOUTS: dict[str, Callable[..., list[Source]]] = {
    "kits": find_kits,
    "lits": find_lits,
    "msd": find_msd,
    "pairs": find_pairs,
}


def nifti(stem: Path) -> Path:
    """The file `stem`.nii.gz, or `stem`.nii if that is what exists."""
    plain = stem.with_name(stem.name + ".nii")
    return plain if plain.exists() else stem.with_name(stem.name + ".nii.gz")
