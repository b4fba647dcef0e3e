"""The command line of `spark-data`."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import (
    DEFAULT_SHARES,
    run_export,
    run_info,
    run_phantom,
    run_predictions,
    run_prepare,
    run_preview,
    run_split,
    run_stats,
    run_verify,
)
from .errors import INTERRUPTED, UserError, one_line, say_error
from .labels import parse_labels, parse_regions
from .layouts import LAYOUTS
from .options import (
    gibibytes,
    parse_part,
    parse_plane_spacing,
    parse_size,
    parse_spacing,
    parse_window,
    place,
    prediction_name,
    share_of_cases,
    split_name,
    store_place,
    whole,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code: 0, 1 if a case failed, 2 for a mistake of the user."""
    for stream in (sys.stdout, sys.stderr):
        # Neither a terminal without Unicode nor a name that is none ends a run in the middle.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parser().parse_args(argv)
        return options.run(options)
    except UserError as error:
        say_error(error)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say_error(f"{place}{error.strerror or error}")
        return 2
    except MemoryError:
        say_error("does not fit into memory; use fewer --workers, or a smaller --size")
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="spark-data", description="NIfTI volumes to slice stores.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    phantom = commands.add_parser("phantom", help="write synthetic abdominal CT in the KiTS layout")
    phantom.add_argument("out", type=place, help="folder to write to")
    phantom.add_argument("--cases", type=whole(1, 100_000), default=12, help="number of cases (default 12)")
    phantom.add_argument(
        "--seed", type=whole(0), default=0, help="seed (default 0); case k is the same however many there are"
    )
    phantom.add_argument(
        "--size",
        type=whole(32, 1024),
        default=96,
        help="length of a slice's side in pixels, give or take 8 (default 96)",
    )
    phantom.set_defaults(run=run_phantom)

    prepare = commands.add_parser("prepare", help="volumes to a slice store; cases that are there are skipped")
    prepare.add_argument("input", type=place, help="folder of the data set")
    prepare.add_argument("store", type=store_place, help="slice store to make or to go on with")
    prepare.add_argument(
        "--layout",
        choices=sorted(LAYOUTS),
        required=True,
        help="how the folder is arranged. " + " ".join(f"{name}: {LAYOUTS[name].__doc__}" for name in sorted(LAYOUTS)),
    )
    prepare.add_argument(
        "--labels",
        type=parse_labels,
        help="names of the labels and their values in the source, in order: anterior=1,posterior=2 or "
        "liver=5,kidney=2+3; default of kits and lits: organ=1,tumour=2",
    )
    prepare.add_argument(
        "--regions",
        type=parse_regions,
        help="regions that are several labels together: kidneys=left+right,abdomen=liver+spleen. Every label is one by "
        "itself, and where labels are organ and tumour, region organ is both",
    )
    prepare.add_argument("--other", choices=["background"], help="take undeclared label values as background")
    prepare.add_argument(
        "--window",
        type=parse_window,
        help="intensities that become −1 and 1: LOW,HIGH (HU) or percentile (0.5 and 99.5 of each case); default: "
        "-200,300; lits -60,140; msd of MR percentile",
    )
    prepare.add_argument("--channel", type=whole(0), help="which channel, from 0; needed for images with several")
    prepare.add_argument("--image-pattern", help='layout pairs: images below the folder, like "ct/{case}.nii.gz"')
    prepare.add_argument("--label-pattern", help='layout pairs: labels below the folder, like "organs/{case}.nii.gz"')
    prepare.add_argument(
        "--unlabelled",
        action="store_true",
        help="take volumes without a label too, for prediction; without any label, --labels can be left out",
    )
    prepare.add_argument(
        "--size",
        type=parse_size,
        help="resample slices in their plane to 512, or ROWS,COLUMNS: images linearly, labels to the nearest",
    )
    prepare.add_argument(
        "--plane-spacing",
        type=parse_plane_spacing,
        help="resample slices in their plane to a spacing in mm instead, 0.8 or ROWS,COLUMNS: to the nearest whole "
        "number of pixels over the same area",
    )
    prepare.add_argument(
        "--spacing",
        type=parse_spacing,
        help="X,Y,Z in mm along a file's axes, for files whose header has none (LiTS volumes 28 to 47)",
    )
    prepare.add_argument("--only", help="prepare these cases alone: case_00001,case_0002? (* and ? as in a shell)")
    prepare.add_argument(
        "--part",
        type=parse_part,
        help="K/N: the k-th of n parts of the cases, so that n machines can fill one store at the same time",
    )
    prepare.add_argument(
        "--replace", action="store_true", help="replace cases of the store that were made of other files"
    )
    prepare.add_argument(
        "--workers", type=whole(1), help="number of parallel processes, one case in each (default: one per core)"
    )
    prepare.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: say what would become of each case, which errors the headers show, and the bytes and the "
        "time to expect, measured on one case",
    )
    # Values that begin with a minus, as argparse knows them: so that `--window -200,300` can be written.
    prepare._negative_number_matcher = re.compile(r"-[\d.]+(,-?[\d.]+)?$")
    prepare.set_defaults(run=run_prepare)

    predictions = commands.add_parser(
        "predictions", help="a foreign model's predictions for the cases of a store, for a student to learn from"
    )
    predictions.add_argument("store", type=store_place, help="slice store")
    predictions.add_argument(
        "folder",
        type=place,
        help="CASE.nii.gz or CASE.nii (label maps), or CASE.npz (nnU-Net's softmax, which counts where there are both)",
    )
    predictions.add_argument("--name", type=prediction_name, required=True, help="what they are called in the store")
    predictions.add_argument(
        "--labels",
        type=parse_labels,
        help="which of their values (of an .npz: classes) are the store's labels, like organ=2+3,tumour=5; default: "
        "those that the store was made with",
    )
    predictions.add_argument("--other", choices=["background"], help="take undeclared values as background")
    predictions.add_argument("--only", help="these cases alone, as for prepare")
    predictions.add_argument("--replace", action="store_true", help="replace predictions that were made of other files")
    predictions.set_defaults(run=run_predictions)

    verify = commands.add_parser("verify", help="whether every byte of a store is as it was written")
    verify.add_argument("store", type=store_place, help="slice store")
    verify.add_argument(
        "--source", type=place, help="folder of the data set: compare every voxel with the NIfTI files there"
    )
    verify.add_argument("--image-pattern", help="layout pairs: if images have other names than when they were prepared")
    verify.add_argument("--label-pattern", help="layout pairs: the same for labels")
    verify.add_argument(
        "--repair", action="store_true", help="restore damaged metadata, and prepare damaged cases again from --source"
    )
    verify.add_argument(
        "--replace", action="store_true", help="with --repair: replace sound cases too, if --source has other files"
    )
    verify.add_argument(
        "--workers", type=whole(1), help="number of parallel processes, one case in each (default: one per core)"
    )
    verify.set_defaults(run=run_verify)

    export = commands.add_parser("export", help="a case back to NIfTI, on its source's grid")
    export.add_argument("store", type=store_place, help="slice store")
    export.add_argument("case", help="name of the case")
    export.add_argument("out", type=place, help="file to write, .nii.gz or .nii")
    what = export.add_mutually_exclusive_group()
    what.add_argument("--label", action="store_true", help="the label rather than the image")
    what.add_argument(
        "--prediction", type=place, help="a .npy file or Zarr array (slices, rows, columns) in place of the case's own"
    )
    export.set_defaults(run=run_export)

    split = commands.add_parser("split", help="divide the cases into train, val and test")
    split.add_argument("store", type=store_place, help="slice store")
    for part, share in DEFAULT_SHARES.items():
        split.add_argument(
            f"--{part}",
            type=share_of_cases,
            help=f"fraction of the cases (0.7), or their number (168) (default {share})",
        )
    split.add_argument("--seed", type=whole(0), default=0, help="seed of the division (default 0)")
    split.add_argument(
        "--folds",
        type=whole(3),
        help="K splits NAME-fold0 … for a cross-validation: fold k is test, the next one val, the others train",
    )
    split.add_argument(
        "--lists",
        type=place,
        help='JSON file with {"train": [case, …], "val": […], "test": […]}, or a list of these for several splits; '
        "folds without test, such as nnU-Net's splits_final.json, are tested on their val cases and validated on the "
        "next one's",
    )
    split.add_argument(
        "--hide-labels",
        type=whole(0),
        default=0,
        metavar="N",
        help="train sees N of its cases without their labels, beside those that have none (default 0)",
    )
    split.add_argument(
        "--name", type=split_name, default="default", help="name of the split (default default); a split never changes"
    )
    split.add_argument(
        "--keep", action="store_true", help="leave a split of this name as it is, however it was made, and end well"
    )
    split.set_defaults(run=run_split)

    preview = commands.add_parser("preview", help="a contact sheet of each case, and one HTML page over all")
    preview.add_argument("store", type=store_place, help="slice store")
    preview.add_argument("--out", type=place, help="folder to write to (default: STORE's name with -preview)")
    preview.add_argument("--only", help="draw these cases alone, as for prepare; the sheets of others stay")
    preview.add_argument("--slices", type=whole(1, 1000), default=10, help="slices of each case (default 10)")
    preview.set_defaults(run=run_preview)

    stats = commands.add_parser("stats", help="sizes, spacings, volumes, intensities, and a recipe's lines")
    stats.add_argument("store", type=store_place, help="slice store")
    stats.add_argument("--out", type=place, help="PNG to write (default: STORE's name with -stats.png)")
    stats.add_argument("--memory", type=gibibytes, default=8, help="GiB for the suggested batch (default 8)")
    stats.set_defaults(run=run_stats)

    info = commands.add_parser("info", help="what is in a store")
    info.add_argument("store", type=store_place, help="slice store")
    info.set_defaults(run=run_info)
    return top
