"""The commands of `spark-data`: from the options on the command line to an exit code (0, or 1 if a case failed).

Each imports what it needs when it runs, as some of that takes long.
"""

import json
import re
from argparse import Namespace
from pathlib import Path

from .errors import UserError
from .labels import DEFAULT_LABELS, check_regions
from .options import Options, default_window
from .progress import console, progress
from .report import add_case, cases_table, folder_size, window_text
from .workers import cores

DEFAULT_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def run_phantom(options: Namespace) -> int:
    """Write phantoms."""
    from .phantom import check_place, write_phantom

    with progress(options.cases, "phantom") as bar:
        for k in range(options.cases):
            check_place(options.out, options.seed, k, options.size)
        for k in bar.track(range(options.cases), task_id=bar.task_ids[0]):
            write_phantom(options.out, options.seed, k, options.size)
    console.print(f"{options.cases} cases in {options.out}")
    return 0


def run_prepare(options: Namespace) -> int:
    """Prepare volumes, or with `--dry-run` say what that would do."""
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
    if options.size and options.plane_spacing:
        raise UserError("--size and --plane-spacing both say how slices are resampled; give one of them")
    settings = Options(
        store=options.store,
        labels=options.labels or {},
        regions=options.regions,
        other=options.other == "background",
        window=options.window or default_window(options.layout, options.input),
        channel=options.channel,
        size=options.size,
        plane_spacing=options.plane_spacing,
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


def run_predictions(options: Namespace) -> int:
    """Prepare the predictions of a foreign model."""
    from .foreign import Foreign, prepare_predictions
    from .store import open_store

    store = open_store(options.store)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder")
    labels = options.labels or store.attributes["labels"]
    foreign = Foreign(options.folder, options.name, labels, options.other == "background")
    return 1 if prepare_predictions(store, foreign, options.only, options.replace) else 0


def run_verify(options: Namespace) -> int:
    """Verify a store, and repair it if told."""
    from .verify import Repair, verify

    patterns = (options.image_pattern, options.label_pattern)
    patterns = patterns if any(patterns) else None
    repair = Repair(options.repair, options.replace)
    return 1 if verify(options.store, options.source, patterns, repair, options.workers or cores()) else 0


def run_export(options: Namespace) -> int:
    """Write a case as NIfTI."""
    from .export import export

    export(options.store, options.case, options.out, options.label, options.prediction)
    console.print(f"{options.case} in {options.out}")
    return 0


def run_split(options: Namespace) -> int:
    """Divide the cases of a store."""
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


def run_preview(options: Namespace) -> int:
    """Draw contact sheets."""
    from .layouts import named
    from .preview import preview
    from .store import open_store

    store = open_store(options.store)
    cases = named(store.cases, options.only)
    page = preview(store, options.out or Path(f"{options.store.stem}-preview"), cases, options.slices)
    console.print(f"{len(cases)} cases in {page}")
    return 0


def run_stats(options: Namespace) -> int:
    """Print tables and draw a figure."""
    from .stats import stats
    from .store import open_store

    stats(open_store(options.store), options.out or Path(f"{options.store.stem}-stats.png"), options.memory)
    return 0


def run_info(options: Namespace) -> int:
    """Print a table of the cases, and what a store says of itself."""
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
