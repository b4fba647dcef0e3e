"""Layouts of data sets: where the images and labels lie."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import UserError, say_error, unknown_name


@dataclass(frozen=True)
class Source:
    """The two files of a case. Either may be missing; a case that is found twice has two sources."""

    case: str
    image: Path
    label: Path | None
    """None for a volume that is not meant to have one, such as those of a challenge's test set."""


def find_kits(root: Path) -> list[Source]:
    """KiTS19, 21 and 23, case_00000/imaging.nii.gz and segmentation.nii.gz or aggregated_MAJ_seg.nii.gz, also below
    the data/ or dataset/ of a clone."""
    found = []
    for place in (root, root / "data", root / "dataset", root / "kits21" / "data"):
        for folder in (folder for folder in sorted(place.glob("case_*")) if folder.is_dir()):
            files = files_in(folder)
            # KiTS21 asked three people for each structure, and the second is what most of them said.
            labels = named_nifti(files, "segmentation") + named_nifti(files, "aggregated_MAJ_seg")
            images = named_nifti(files, "imaging") or [folder / "imaging.nii.gz"]
            found += pairs_of(folder.name, images, labels or [folder / "segmentation.nii.gz"])
    return found


def find_lits(root: Path) -> list[Source]:
    """LiTS, volume-N.nii and segmentation-N.nii, in one folder, in data/ and segmentation/, or in the download's
    Training Batch 1 and 2; test-volume-N.nii has no label."""
    batches = [folder for folder in sorted(root.glob("Training[ _-]*[12]")) if folder.is_dir()]
    places = [(root, root), (root / "data", root / "segmentation"), *((folder, folder) for folder in batches)]
    found = []
    for images, labels in places:
        volumes, segmentations = numbered(images, "volume"), numbered(labels, "segmentation")
        # A label without an image is a case too, that lacks its image.
        for number in sorted(volumes.keys() | segmentations.keys()):
            image = volumes.get(number, [images / f"volume-{number}.nii"])
            label = segmentations.get(number, [labels / f"segmentation-{number}.nii.gz"])
            found += [pair for file in image for pair in pairs_of(f"volume-{int(number):03}", [file], label)]
    for images in (root, root / "data", *(folder for folder in sorted(root.glob("Test*")) if folder.is_dir())):
        for number, files in numbered(images, "test-volume").items():
            found += [Source(f"test-volume-{int(number):03}", file, None) for file in files]
    return found


def find_msd(root: Path) -> list[Source]:
    """Medical Segmentation Decathlon, the pairs under `training` in dataset.json; those under `test` have no label."""
    description = dataset_json(root, "msd")
    found = []
    try:
        for pair in description.get("training", []):
            image = root / pair["image"]
            found.append(Source(stem(image), image, root / pair["label"]))
        for entry in description.get("test", []):
            image = root / (entry["image"] if isinstance(entry, dict) else entry)
            found.append(Source(stem(image), image, None))
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f'{root}/dataset.json: training must be a list of {{"image": …, "label": …}}, and test one of images'
        ) from None
    return found


def find_nnunet(root: Path, channel: int | None = None) -> list[Source]:
    """nnU-Net (both versions), imagesTr/CASE_0000.nii.gz and labelsTr/CASE.nii.gz; --channel 1 takes CASE_0001;
    imagesTs has no label."""
    ending = str(dataset_json(root, "nnunet").get("file_ending", ".nii.gz"))
    if ending not in (".nii.gz", ".nii"):
        raise UserError(f"{root}/dataset.json: images that end in {ending}; convert them to .nii.gz")
    found = []
    for folder, labels in (("imagesTr", "labelsTr"), ("imagesTs", None)):
        channels: dict[str, list[int]] = {}
        images, files = with_ending(root / folder, ending), with_ending(root / (labels or folder), ending)
        for name in images:
            if part := re.fullmatch(r"(.+)_(\d{4})", name):
                channels.setdefault(part[1], []).append(int(part[2]))
        # A label without an image is a case too, that lacks its image.
        for name in files if labels else ():
            channels.setdefault(name, [channel or 0])
        several = sorted({number for numbers in channels.values() for number in numbers})
        if len(several) > 1 and channel is None:
            choices = ", ".join(map(str, several))
            raise UserError(f"{root}/{folder}: has channels {choices}; pick one with --channel {several[0]}")
        for case in channels:
            name = f"{case}_{channel if channel is not None else several[0]:04}"
            image = images.get(name, root / folder / f"{name}{ending}")
            found.append(Source(case, image, files.get(case, root / labels / f"{case}{ending}") if labels else None))
    return found


def find_pairs(root: Path, image_pattern: str | None, label_pattern: str | None) -> list[Source]:
    """images like "ct/{case}.nii.gz" (--image-pattern) with the label of the same {case} (--label-pattern)."""
    for option, pattern in (("--image-pattern", image_pattern), ("--label-pattern", label_pattern)):
        if not pattern or "{case}" not in pattern:
            raise UserError(f'{option}: layout pairs needs a pattern with {{case}}, such as "{{case}}_ct.nii.gz"')
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(
                f"{option} {pattern}: is below the data set's folder, so that it can't begin with / or have .."
            )
    images, labels = matching(root, image_pattern), matching(root, label_pattern)
    found = [
        Source(case, image, labels.get(case, root / label_pattern.replace("{case}", case)))
        for case, image in images.items()
    ]
    # With "{case}.nii.gz" and "{case}_seg.nii.gz" in one folder, a label looks like an image too, or the other way
    # round; and with "{case}.nii.gz" for labels, so do a case's other files.
    taken = {source.label for source in found}
    found = [source for source in found if source.image not in taken]
    taken, cases = {source.image for source in found}, tuple(source.case for source in found)
    for case, label in labels.items():
        if found and label not in taken and not case.startswith(cases):
            found.append(Source(case, root / image_pattern.replace("{case}", case), label))
    return found


def matching(root: Path, pattern: str) -> dict[str, Path]:
    """The files below a folder that match a pattern, by their {case}."""
    found = {}
    parts = Path(pattern).parts
    shared = next(k for k, part in enumerate(parts, start=1) if "{case}" in part)
    for length in sorted({shared, len(parts)}):
        names = Path(*parts[:length]).as_posix().split("{case}")
        first, *others = map(re.escape, names)
        expression = re.compile(first + r"(?P<case>[^/.][^/]*)" + "(?P=case)".join(others))
        for path in sorted(root.glob("*".join(map(glob.escape, names)))):
            match = expression.fullmatch(path.relative_to(root).as_posix())
            # A case's folder that can't be looked into has the file that will be asked for, and is told of then.
            if match and (length == len(parts) or (path.is_dir() and not os.access(path, os.X_OK, effective_ids=True))):
                found[match["case"]] = root / pattern.replace("{case}", match["case"])
    return found


LAYOUTS: dict[str, Callable[..., list[Source]]] = {
    "kits": find_kits,
    "lits": find_lits,
    "msd": find_msd,
    "nnunet": find_nnunet,
    "pairs": find_pairs,
}


def dataset_json(root: Path, layout: str) -> dict:
    """The contents of dataset.json, which the Decathlon and nnU-Net have."""
    file = root / "dataset.json"
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: the {layout} layout needs this file ({error})") from None


def modality(root: Path, layout: str) -> str:
    """Modality of the images by dataset.json: CT, MRI, …; "" where nothing does."""
    if layout not in ("msd", "nnunet"):
        return ""
    description = dataset_json(root, layout)
    return str(description.get("channel_names", description.get("modality", "")))


def pairs_of(case: str, images: list[Path], labels: list[Path]) -> list[Source]:
    """Every image with every label: one source if all is as it should be."""
    return [Source(case, image, label) for image in images for label in labels]


def files_in(folder: Path) -> list[Path]:
    """Files of a folder, sorted; nothing if it is not there or can't be read, which its files then say."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def named_nifti(files: Iterable[Path], name: str) -> list[Path]:
    """Those of the files that are `name`.nii.gz or `name`.nii."""
    return [file for file in files if file.name != stem(file) == name]


def numbered(folder: Path, kind: str) -> dict[str, list[Path]]:
    """The files `kind`-N.nii.gz or .nii of a folder by N. A note tells of NIfTI files whose name is nearly that."""
    found: dict[str, list[Path]] = {}
    for file in files_in(folder):
        if number := re.fullmatch(rf"{kind}-(\d+)\.nii(\.gz)?", file.name, re.IGNORECASE | re.ASCII):
            found.setdefault(number[1], []).append(file)
        elif re.match(rf"{kind}.*\.nii", file.name, re.IGNORECASE):
            say_error(f"{file}: left out, as it is not named like {kind}-12.nii", "note")
    return found


def with_ending(folder: Path, ending: str) -> dict[str, Path]:
    """The files of a folder that end so, in small letters or capitals, by the rest of their names."""
    files = [file for file in files_in(folder) if file.name.lower().endswith(ending)]
    return {file.name[: -len(ending)]: file for file in files}


def stem(path: Path) -> str:
    """A file's name without its endings."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def find_sources(
    root: Path,
    layout: str,
    patterns: Sequence[str | None] | None = None,
    channel: int | None = None,
    unlabelled: bool = False,
) -> list[Source]:
    """The cases of a data set; volumes without a label too if `unlabelled`. Raises `UserError` if there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    more = {"pairs": patterns or (None, None), "nnunet": (channel,)}
    sources = LAYOUTS[layout](root, *more.get(layout, ()))
    if unlabelled:
        sources = [s if s.label and s.label.is_file() else replace(s, label=None) for s in sources]
    else:
        sources = [source for source in sources if source.label]
    if not sources:
        raise UserError(f"{root}: no case in layout {layout} ({' '.join(LAYOUTS[layout].__doc__.split())})")
    return sources


def choose(sources: Sequence[Source], only: str | None, part: tuple[int, int] | None) -> list[Source]:
    """The sources of the cases `only` names (separated by commas, * and ? allowed), and of these part k of n.

    Raises `UserError` for a name that is no case's.
    """
    names = named({source.case for source in sources}, only)
    if part is not None:
        names = names[part[0] - 1 :: part[1]]
    return [source for source in sources if source.case in set(names)]


def named(cases: Iterable[str], only: str | None) -> list[str]:
    """The cases that `only` names, sorted; all if it is None. Raises `UserError` for a name that is no case's."""
    names = sorted(cases)
    if only is None:
        return names
    chosen = set()
    for pattern in filter(None, (pattern.strip() for pattern in only.split(","))):
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"--only {only}: {unknown_name('case', pattern, names)}")
        chosen.update(matching)
    if not chosen:
        raise UserError("--only: names no case; give names or patterns with commas between, or leave it out")
    return sorted(chosen)
