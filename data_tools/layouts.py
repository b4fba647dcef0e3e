"""Where the images and labels of a data set lie."""

import glob
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import UserError, unknown_name


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
            # KiTS21 asked three people for each structure, and this is what most of them said.
            majority = [file for file in nifti(folder / "aggregated_MAJ_seg") if file.exists()]
            labels = [file for file in nifti(folder / "segmentation") if file.exists() or not majority]
            found += pairs_of(folder.name, nifti(folder / "imaging"), labels + majority)
    return found


def find_lits(root: Path) -> list[Source]:
    """LiTS, volume-N.nii and segmentation-N.nii, in one folder, in data/ and segmentation/, or in the download's
    Training Batch 1 and 2; test-volume-N.nii has no label."""
    batches = [folder for folder in sorted(root.glob("Training[ _-]*[12]")) if folder.is_dir()]
    places = [(root, root), (root / "data", root / "segmentation"), *((folder, folder) for folder in batches)]
    found = []
    for images, labels in places:
        for image in sorted(images.glob("volume-*")):
            if number := re.fullmatch(r"volume-(\d+)\.nii(\.gz)?", image.name):
                case = f"volume-{int(number[1]):03}"
                found += pairs_of(case, [image], nifti(labels / f"segmentation-{number[1]}"))
    for images in (root, root / "data", *(folder for folder in sorted(root.glob("Test*")) if folder.is_dir())):
        for image in sorted(images.glob("test-volume-*")):
            if number := re.fullmatch(r"test-volume-(\d+)\.nii(\.gz)?", image.name):
                found.append(Source(f"test-volume-{int(number[1]):03}", image, None))
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
        for image in sorted((root / folder).glob(f"*_????{ending}")):
            if part := re.fullmatch(r"(.+)_(\d{4})", image.name.removesuffix(ending)):
                channels.setdefault(part[1], []).append(int(part[2]))
        # A label without an image is a case too, that lacks its image.
        if labels:
            for label in sorted((root / labels).glob(f"*{ending}")):
                channels.setdefault(label.name.removesuffix(ending), [channel or 0])
        several = sorted({number for numbers in channels.values() for number in numbers})
        if len(several) > 1 and channel is None:
            choices = ", ".join(map(str, several))
            raise UserError(f"{root}/{folder}: has channels {choices}; pick one with --channel {several[0]}")
        for case in channels:
            image = root / folder / f"{case}_{channel if channel is not None else several[0]:04}{ending}"
            found.append(Source(case, image, root / labels / f"{case}{ending}" if labels else None))
    return found


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
    "nnunet": find_nnunet,
    "pairs": find_pairs,
}


def dataset_json(root: Path, layout: str) -> dict:
    """What dataset.json says, which the Decathlon and nnU-Net have."""
    file = root / "dataset.json"
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: the {layout} layout needs this file ({error})") from None


def modality(root: Path, layout: str) -> str:
    """How the images were made, as dataset.json says it: CT, MRI, …; "" where nothing does."""
    if layout not in ("msd", "nnunet"):
        return ""
    description = dataset_json(root, layout)
    return str(description.get("channel_names", description.get("modality", "")))


def pairs_of(case: str, images: list[Path], labels: list[Path]) -> list[Source]:
    """Every image with every label: one source if all is as it should be."""
    return [Source(case, image, label) for image in images for label in labels]


def nifti(path: Path) -> list[Path]:
    """`path`.nii.gz and `path`.nii, whichever are there; the first if neither is."""
    files = [path.with_name(path.name + suffix) for suffix in (".nii.gz", ".nii")]
    return [file for file in files if file.exists()] or files[:1]


def stem(path: Path) -> str:
    """A file's name without its endings."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


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
    return sorted(chosen)
