"""A table of MLflow runs: teacher, student alone, student distilled: spark-dist compare --experiment NAME"""

import csv
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from data_tools.errors import UserError, unknown_name

from .metrics import paired_difference, read_cases, summarise
from .progress import console
from .tracking import absolute_uri, make_client


@dataclass(kw_only=True)
class CompareOptions:
    """Compare the runs of an experiment on their test cases."""

    experiment: str = ""
    """MLflow experiment (dataset-task); may be left out where there is only one."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow tracking server, or a local SQLite file."""
    figure: str = "dice"
    """The figure to compare: dice, hd95, assd, voe, or dice_labelled (the original's protocol)."""
    csv: Path | None = None
    """CSV file for the table."""
    json: Path | None = None
    """JSON file for the table."""


OPTIONS = CompareOptions


@dataclass(frozen=True)
class Run:
    """A finished run of a teacher or student."""

    run_id: str
    network: str
    width: float
    role: str
    method: str
    seed: str
    split: str
    parameters: int
    cases: dict[str, dict[str, float]]
    started: int

    @property
    def kind(self) -> tuple:
        """What runs of several seeds have in common."""
        return self.role, self.network, self.width, self.method

    @property
    def title(self) -> str:
        if self.role == "teacher":
            return "teacher"
        return "student alone" if self.method == "none" else f"student, {self.method}"


@dataclass(frozen=True)
class Row:
    """A line of the table. Dice and differences are fractions of 1."""

    title: str
    network: str
    width: float
    seeds: str
    parameters: int
    cases: int
    mean: float
    low: float
    high: float
    misses: int
    hd95: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None


def run(options: CompareOptions) -> None:
    """Print the table, and write it if asked to."""
    runs, unfinished = load_runs(options.tracking_uri, options.experiment)
    rows = compare(runs, options.figure)
    console.print(as_table(rows, options.figure))
    if unfinished:
        console.print(f"not finished, so not in the table: {', '.join(unfinished)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def load_runs(tracking_uri: str, name: str) -> tuple[list[Run], list[str]]:
    """The finished runs of an experiment, oldest first, and the names of those that are not finished.

    Of several runs of one network, method and seed, the last counts.
    """
    client = make_client(absolute_uri(tracking_uri))
    experiments = {e.name: e for e in client.search_experiments() if e.name != "Default"}
    if not name and len(experiments) == 1:
        name = next(iter(experiments))
    if name not in experiments:
        if not experiments:
            raise UserError(f"{tracking_uri}: no experiment there yet; train something with this --tracking-uri")
        raise UserError(f"{tracking_uri}: {unknown_name('experiment', name, experiments)}")
    found: dict[tuple, Run] = {}
    unfinished = []
    page = None
    while page is None or page.token:
        page = client.search_runs(
            [experiments[name].experiment_id],
            filter_string="tags.role != ''",
            order_by=["attributes.start_time ASC"],
            page_token=page.token if page else None,
        )
        for item in page:
            cases = test_cases(client, item.info.run_id)
            if cases is None:
                unfinished.append(item.info.run_name)
                continue
            tags = item.data.tags
            loaded = Run(
                run_id=item.info.run_id,
                network=tags["network"],
                width=float(tags["width"]),
                role=tags["role"],
                method=tags["method"],
                seed=tags["seed"],
                split=tags["split"],
                parameters=int(tags["parameters"]),
                cases=cases,
                started=item.info.start_time,
            )
            found[(*loaded.kind, loaded.seed, loaded.split)] = loaded
    if not found:
        raise UserError(f"{tracking_uri}: no run in '{name}' has test figures yet")
    return list(found.values()), unfinished


def test_cases(client, run_id: str) -> dict[str, dict[str, float]] | None:
    """The figures of a run's test cases, or None if it did not come that far."""
    if "test_cases.json" not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return read_cases(Path(client.download_artifacts(run_id, "test_cases.json", folder)))


def compare(runs: Sequence[Run], figure: str = "dice") -> list[Row]:
    """A row for each kind of run and seed, and for a kind of several seeds one over all of them.

    The difference of a distilled student is to the student alone: same network, width and seed, paired by case. Over
    several seeds, each case's mean over the seeds comes first, so that the interval is over cases.
    """
    known = next(iter(runs[0].cases.values()))
    if figure not in known:
        raise UserError(f"{unknown_name('figure', figure, known)}")
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for item in runs:
        groups[(*item.kind, item.split)].append(item)
    order = {"teacher": 0, "student alone": 1}
    rows = []
    for members in sorted(groups.values(), key=lambda g: (order.get(g[0].title, 2), g[0].network, g[0].method)):
        parts = [[member] for member in sorted(members, key=lambda m: int(m.seed))]
        for part in parts + ([members] if len(members) > 1 else []):
            rows.append(make_row(part, runs, figure))
    return rows


def make_row(members: Sequence[Run], runs: Sequence[Run], figure: str) -> Row:
    first = members[0]
    values, hd95 = over_seeds(members, figure), over_seeds(members, "hd95")
    summary = summarise(list(values.values()))
    difference = None
    if first.role == "student" and first.method != "none":
        alone = [
            other
            for member in members
            for other in runs
            if (other.role, other.method) == ("student", "none")
            and (other.network, other.width, other.seed, other.split)
            == (member.network, member.width, member.seed, member.split)
        ]
        if len(alone) == len(members):
            difference = paired_difference(values, over_seeds(alone, figure))
    return Row(
        title=first.title,
        network=first.network,
        width=first.width,
        seeds=first.seed if len(members) == 1 else f"{len(members)} seeds",
        parameters=first.parameters,
        cases=summary["cases"],
        mean=summary["mean"],
        low=summary["low"],
        high=summary["high"],
        misses=summary["misses"],
        hd95=summarise(list(hd95.values()))["mean"],
        difference=difference and difference["mean"],
        difference_low=difference and difference["low"],
        difference_high=difference and difference["high"],
    )


def over_seeds(members: Sequence[Run], figure: str) -> dict[str, float]:
    """Each case's mean figure over runs of several seeds."""
    cases = set.intersection(*(set(member.cases) for member in members))
    return {case: float(np.mean([member.cases[case][figure] for member in members])) for case in sorted(cases)}


def as_table(rows: Sequence[Row], figure: str) -> Table:
    """For people. Differences are in points: hundredths for overlap figures."""
    table = Table(title=f"test {figure} (mean over cases with its 95% interval)")
    for name in ("", "network", "seed", "parameters"):
        table.add_column(name, no_wrap=True, justify="right" if name == "parameters" else "left")
    for name in (figure, "HD95 mm", "against student alone"):
        table.add_column(name, no_wrap=True, justify="right")
    for row in rows:
        scale = 100 if figure.startswith(("dice", "voe")) else 1
        difference = "" if row.difference is None else f"{scale * row.difference:+.2f} "
        if row.difference is not None:
            difference += f"[{scale * row.difference_low:+.2f}, {scale * row.difference_high:+.2f}]"
        missed = f", {row.misses} missed" if row.misses else ""
        width = "" if row.width == 1 else f" ×{row.width:g}"
        hd95 = "" if math.isnan(row.hd95) else f"{row.hd95:.1f}"
        values = f"{row.mean:.4f} [{row.low:.3f}, {row.high:.3f}]{missed}".replace("[", "\\[")
        style = "bold" if "seeds" in row.seeds else ""
        cells = (row.title, f"{row.network}{width}", row.seeds, f"{row.parameters:,}", values, hd95)
        table.add_row(*cells, difference.replace("[", "\\["), style=style)
    return table
