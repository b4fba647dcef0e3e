"""`spark-data`: phantom, prepare, split, preview, stats, info."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import INTERRUPTED, UserError, one_line, say_error
from .labels import DEFAULT_LABELS, check_regions, parse_labels, parse_regions
from .layouts import LAYOUTS
from .options import (
    Options,
    default_window,
    parse_part,
    parse_size,
    parse_spacing,
    parse_window,
    place,
    share_of_cases,
    split_name,
    store_place,
    whole,
)
from .progress import console, progress
from .report import add_case, cases_table, folder_size, window_text
from .workers import cores

DEFAULT_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


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
        help='JSON file with {"train": [case, …], "val": […], "test": […]}, or a list of these for several splits',
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

    stats = commands.add_parser("stats", help="sizes, spacings, volumes, intensities: tables and a figure")
    stats.add_argument("store", type=store_place, help="slice store")
    stats.add_argument("--out", type=place, help="PNG to write (default: STORE's name with -stats.png)")
    stats.set_defaults(run=run_stats)

    info = commands.add_parser("info", help="what is in a store")
    info.add_argument("store", type=store_place, help="slice store")
    info.set_defaults(run=run_info)
    return top


def run_phantom(options: argparse.Namespace) -> int:
    from .phantom import check_place, write_phantom

    with progress(options.cases, "phantom") as bar:
        for k in range(options.cases):
            check_place(options.out, options.seed, k, options.size)
        for k in bar.track(range(options.cases), task_id=bar.task_ids[0]):
            write_phantom(options.out, options.seed, k, options.size)
    console.print(f"{options.cases} cases in {options.out}")
    return 0


def run_prepare(options: argparse.Namespace) -> int:
    from .layouts import choose, find_sources
    from .prepare import prepare

    patterns = (options.image_pattern, options.label_pattern)
    if options.layout != "pairs" and any(patterns):
        raise UserError(f"--image-pattern and --label-pattern belong to --layout pairs, not {options.layout}")
    if options.labels is None and not options.unlabelled:
        options.labels = DEFAULT_LABELS.get(options.layout)
    if options.labels is None and not options.unlabelled:
        raise UserError("--labels: say which values of the label files are what, like anterior=1,posterior=2")
    check_regions(options.labels or {}, options.regions or {})
    settings = Options(
        store=options.store,
        labels=options.labels or {},
        regions=options.regions,
        other=options.other == "background",
        window=options.window or default_window(options.layout, options.input),
        channel=options.channel,
        size=options.size,
        layout=options.layout,
        patterns=patterns if options.layout == "pairs" else None,
        spacing=options.spacing,
        replace=options.replace,
    )
    sources = find_sources(options.input, options.layout, patterns, options.channel, options.unlabelled)
    sources = choose(sources, options.only, options.part)
    workers = options.workers or cores()
    if options.dry_run:
        from .plan import plan

        return 1 if plan(sources, settings, workers) else 0
    return 1 if prepare(sources, settings, workers) else 0


def run_verify(options: argparse.Namespace) -> int:
    from .verify import Repair, verify

    patterns = (options.image_pattern, options.label_pattern)
    patterns = patterns if any(patterns) else None
    repair = Repair(options.repair, options.replace)
    return 1 if verify(options.store, options.source, patterns, repair, options.workers or cores()) else 0


def run_export(options: argparse.Namespace) -> int:
    from .export import export

    export(options.store, options.case, options.out, options.label, options.prediction)
    console.print(f"{options.case} in {options.out}")
    return 0


def run_split(options: argparse.Namespace) -> int:
    from .split import split_by_folds, split_by_shares, split_text, splits_by_lists, with_unlabelled
    from .store import open_store, write_splits

    given = {part: share for part in DEFAULT_SHARES if (share := getattr(options, part)) is not None}
    if sum(map(bool, (given, options.folds, options.lists))) > 1:
        raise UserError("give the parts (--train, --val, --test), or --folds, or --lists, and not two of these")
    store = open_store(options.store)
    there = [name for name in store.splits if re.fullmatch(re.escape(options.name) + r"(-fold\d+)?", name)]
    if options.keep and there:
        for name in there:
            console.print(f"split '{name}': {split_text(store.splits[name])}; it stays as it is")
        return 0
    if options.lists:
        records = splits_by_lists(store, options.lists)
    elif options.folds:
        records = split_by_folds(store, options.folds, options.seed)
    else:
        records = [split_by_shares(store, given_shares(given), options.seed)]
    records = [with_unlabelled(store, record, options.hide_labels) for record in records]
    folds = options.folds or len(records) > 1
    named = {f"{options.name}-fold{k}" if folds else options.name: record for k, record in enumerate(records)}
    # Those of a run that was stopped in the middle are there, and the same command goes on.
    new = {name: record for name, record in named.items() if json.loads(json.dumps(record)) != store.splits.get(name)}
    write_splits(options.store, new)
    for name, record in named.items():
        console.print(f"split '{name}': {split_text(record)}{'' if name in new else '; it was there already'}")
        if left_out := set(store.cases).difference(*(record.get(part, ()) for part in (*DEFAULT_SHARES, "unlabelled"))):
            console.print(f"note: in no part: {', '.join(sorted(left_out)[:10])}{' …' if len(left_out) > 10 else ''}")
    return 0


def given_shares(given: dict[str, float]) -> dict[str, float]:
    """The shares of all parts: the default ones if none is given, else 0 for a part that is not."""
    return {part: given.get(part, 0) if given else share for part, share in DEFAULT_SHARES.items()}


def run_preview(options: argparse.Namespace) -> int:
    from .layouts import named
    from .preview import preview
    from .store import open_store

    store = open_store(options.store)
    cases = named(store.cases, options.only)
    page = preview(store, options.out or Path(f"{options.store.stem}-preview"), cases, options.slices)
    console.print(f"{len(cases)} cases in {page}")
    return 0


def run_stats(options: argparse.Namespace) -> int:
    from .stats import stats
    from .store import open_store

    stats(open_store(options.store), options.out or Path(f"{options.store.stem}-stats.png"))
    return 0


def run_info(options: argparse.Namespace) -> int:
    from .split import split_text
    from .store import open_store

    store = open_store(options.store)
    table = cases_table(str(options.store), list(store.regions), ["window"])
    for case in store.cases.values():
        add_case(table, case.name, case, "{:g}…{:g}".format(*case.window))
    console.print(table)
    slices = sum(case.shape[0] for case in store.cases.values())
    size = folder_size(options.store)
    console.print(f"{len(store.cases)} cases, {slices} slices, {size}, fingerprint {store.fingerprint()}")
    labels = ", ".join(f"{name}={'+'.join(map(str, store.attributes['labels'][name]))}" for name in store.labels)
    console.print(f"labels {labels}; {window_text(store.attributes['window'])}")
    unions = {name: [store.labels[value - 1] for value in values] for name, values in store.regions.items()}
    if declared := {name: labels for name, labels in unions.items() if labels != [name]}:
        console.print("regions " + ", ".join(f"{name}={'+'.join(labels)}" for name, labels in declared.items()))
    for name, split in store.splits.items():
        console.print(f"split '{name}': {split_text(split)}")
    return 0
