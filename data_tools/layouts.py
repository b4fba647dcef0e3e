"""Where the images and labels of a data set lie."""

import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


@dataclass(frozen=True)
class Source:
    """The two files of a case. Either may be missing; a case that is found twice has two sources."""

    case: str
    image: Path
    label: Path


def find_kits(root: Path) -> list[Source]:
    """KiTS19, case_00000/imaging.nii.gz and segmentation.nii.gz."""
    folders = (folder for folder in sorted(root.glob("case_*")) if folder.is_dir())
    return [
        Source(folder.name, image, label)
        for folder in folders
        for image in nifti(folder / "imaging")
        for label in nifti(folder / "segmentation")
    ]


def find_lits(root: Path) -> list[Source]:
    """LiTS, volume-N.nii and segmentation-N.nii, in one folder or in data/ and segmentation/."""
    found = []
    for images, labels in ((root, root), (root / "data", root / "segmentation")):
        for image in sorted(images.glob("volume-*")):
            if number := re.fullmatch(r"volume-(\d+)\.nii(\.gz)?", image.name):
                case = f"volume-{int(number[1]):03}"
                found += [Source(case, image, label) for label in nifti(labels / f"segmentation-{number[1]}")]
    return found


def find_msd(root: Path) -> list[Source]:
    """Medical Segmentation Decathlon, the pairs under `training` in dataset.json."""
    found = []
    for pair in msd_description(root).get("training", []):
        try:
            image, label = Path(pair["image"]), Path(pair["label"])
        except (TypeError, KeyError):
            raise UserError(f"{root}/dataset.json: {pair} under training is no pair of image and label") from None
        found.append(Source(re.sub(r"\.nii(\.gz)?$", "", image.name), root / image, root / label))
    return found


def msd_description(root: Path) -> dict:
    """What dataset.json says."""
    file = root / "dataset.json"
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: the msd layout needs this file ({error})") from None


def find_pairs(root: Path, image_pattern: str | None, label_pattern: str | None) -> list[Source]:
    """images like "ct/{case}.nii.gz" (--image-pattern) with the label of the same {case} (--label-pattern)."""
    for option, pattern in (("--image-pattern", image_pattern), ("--label-pattern", label_pattern)):
        if not pattern or "{case}" not in pattern:
            raise UserError(f'{option}: layout pairs needs a pattern with {{case}}, such as "{{case}}_ct.nii.gz"')
    first, *others = map(re.escape, image_pattern.split("{case}"))
    expression = re.compile(first + r"(?P<case>[^/.][^/]*)" + "(?P=case)".join(others))
    found = []
    for image in sorted(root.glob("*".join(map(glob.escape, image_pattern.split("{case}"))))):
        if match := expression.fullmatch(image.relative_to(root).as_posix()):
            found.append(Source(match["case"], image, root / label_pattern.replace("{case}", match["case"])))
    # With "{case}.nii.gz" and "{case}_seg.nii.gz" in one folder, a label looks like an image too.
    labels = {source.label for source in found}
    return [source for source in found if source.image not in labels]


LAYOUTS: dict[str, Callable[..., list[Source]]] = {
    "kits": find_kits,
    "lits": find_lits,
    "msd": find_msd,
    "pairs": find_pairs,
}


def nifti(stem: Path) -> list[Path]:
    """`stem`.nii.gz and `stem`.nii, whichever are there; the first if neither is."""
    files = [stem.with_name(stem.name + suffix) for suffix in (".nii.gz", ".nii")]
    return [file for file in files if file.exists()] or files[:1]
