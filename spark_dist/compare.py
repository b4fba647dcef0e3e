"""A table of MLflow runs: teacher, student alone, student distilled: spark-dist compare --experiment NAME"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.compare")

import csv
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from data_tools.errors import UserError, unknown_name
from data_tools.progress import console
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds
from spark_dist.evaluation.metrics import read_cases
from spark_dist.training.mlflow_client import SQLITE, absolute_uri, brief, make_client

from .options import ServerOptions


@dataclass(kw_only=True)
class CompareOptions(ServerOptions):
    """Compare the runs of an experiment on their test cases."""

    experiment: str = ""
    """MLflow experiment (dataset-task); may be left out where there is only one."""
    metric: str = "dice"
    """The metric to compare: dice, hd95, assd, voe, or dice_labelled (the original's protocol)."""
    csv: Path | None = None
    """CSV file for the table."""
    json: Path | None = None
    """JSON file for the table."""


OPTIONS = CompareOptions

STAGE_TAGS = ("dataset", "task", "split", "role", "network", "seed")
"""Tags that each stage's run has."""


@dataclass(frozen=True)
class Run:
    """A finished run of a teacher or student."""

    dataset: str
    task: str
    split: str
    role: str
    network: str
    width: float
    method: str
    teacher: str
    """Network of a distilled student's teacher."""
    seed: str
    parameters: int
    cases: dict[str, dict[str, float]]
    """Metrics of the test cases."""

    @property
    def data(self) -> tuple:
        """What runs must share to be compared at all."""
        return self.dataset, self.task, self.split

    @property
    def kind(self) -> tuple:
        """What runs of several seeds have in common."""
        return *self.data, self.role, self.network, self.width, self.method, self.teacher

    @property
    def distilled(self) -> bool:
        return self.role == "student" and self.method != "none"

    @property
    def order(self) -> tuple:
        """Teachers first, then each network alone and distilled."""
        return self.role != "teacher", self.distilled, self.network, self.width, self.method, self.teacher


@dataclass(frozen=True)
class Row:
    """A line of the table, of one run or of one kind of run over its seeds. Dice and differences are fractions of 1."""

    dataset: str
    task: str
    split: str
    role: str
    network: str
    width: float
    method: str
    teacher: str
    seeds: str
    parameters: int
    cases: int
    mean: float
    low: float
    high: float
    misses: int
    """Cases without a finite value, which the mean is without."""
    hd95: float
    hd95_misses: int
    difference: float | None = None
    """To the student alone, with its interval; none for teachers and students alone."""
    difference_low: float | None = None
    difference_high: float | None = None
    difference_misses: int | None = None
    against: str | None = None
    """The student alone of the "same seed", or the mean over "all seeds" where there is none of that seed."""

    @property
    def title(self) -> str:
        if self.role == "teacher":
            return "teacher"
        if self.method == "none":
            return "student alone"
        return f"student, {self.method}" + (f" ({self.teacher})" if self.teacher else "")


def run(options: CompareOptions) -> None:
    """Print the table, and write it if asked to."""
    runs, notes = load_runs(options.tracking_uri, options.experiment)
    rows = compare(runs, options.metric)
    for data in dict.fromkeys((row.dataset, row.task, row.split) for row in rows):
        show(as_table([row for row in rows if (row.dataset, row.task, row.split) == data], options.metric))
    for note in notes:
        console.print(note)
    write_rows(rows, options.csv, options.json)


def load_runs(tracking_uri: str, name: str = "") -> tuple[list[Run], list[str]]:
    """The finished runs of an experiment, oldest first, and lines on those that are left out.

    Of several runs of one kind and seed, the last counts. Raises `UserError` if there is no such server or experiment,
    or nothing in it is finished.
    """
    client, experiments = reach(tracking_uri)
    if not name and len(experiments) == 1:
        name = next(iter(experiments))
    if name not in experiments:
        if not experiments:
            raise UserError(f"{tracking_uri}: no experiment there yet; train something with this --tracking-uri")
        raise UserError(f"{tracking_uri}: {unknown_name('experiment', name, experiments)}")
    items = {item.info.run_id: item for item in all_runs(client, experiments[name])}
    found: dict[tuple, Run] = {}
    unfinished, replaced = [], 0
    for item in items.values():
        tags = item.data.tags
        if not {"journal", *STAGE_TAGS, "width", "method", "parameters"} <= tags.keys():
            continue  # a job above its stages, or somebody else's
        parent = items.get(tags.get("mlflow.parentRunId"))
        title = f"{parent.info.run_name}/{item.info.run_name}" if parent else item.info.run_name
        cases = test_cases(client, item.info.run_id, title)
        if cases is None:
            unfinished.append(title)
            continue
        loaded = Run(
            **{key: tags[key] for key in STAGE_TAGS},
            width=float(tags["width"]),
            method=tags["method"] or "none",
            teacher=parent.data.tags.get("teacher", "") if parent and tags["role"] == "student" else "",
            parameters=int(tags["parameters"]),
            cases=cases,
        )
        key = (*loaded.kind, loaded.seed)
        replaced += key in found and found[key].cases != cases
        found[key] = loaded
    notes = []
    if unfinished:
        notes.append(f"not finished, so not in the table: {', '.join(unfinished)}")
    if replaced:
        notes.append(f"of runs with equal network, method and seed the last is shown; {replaced} older left out")
    if not found:
        raise UserError(f"{tracking_uri}: no run in '{name}' has test metrics yet")
    return list(found.values()), notes


def reach(tracking_uri: str) -> tuple[Any, dict[str, str]]:
    """A client of a tracking server, and the ids of its experiments by name."""
    uri = absolute_uri(tracking_uri)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise UserError(f"{tracking_uri}: no such database; give the --tracking-uri of the training jobs")
    try:
        client = make_client(uri)
        return client, {e.name: e.experiment_id for e in client.search_experiments() if e.name != "Default"}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{tracking_uri}: can't be reached ({brief(error)})") from None


def all_runs(client, experiment_id: str) -> Iterable[Any]:
    """The MLflow runs of an experiment, oldest first."""
    page = None
    while page is None or page.token:
        page = client.search_runs(
            [experiment_id], order_by=["attributes.start_time ASC"], page_token=page.token if page else None
        )
        yield from page


def test_cases(client, run_id: str, title: str) -> dict[str, dict[str, float]] | None:
    """The metrics of a run's test cases, or None if it did not come that far."""
    if "test_cases.json" not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(client.download_artifacts(run_id, "test_cases.json", folder))
        try:
            return read_cases(file)
        except UserError:
            raise UserError(f"run {title} ({run_id}): its artifact test_cases.json is damaged; log it again") from None


def compare(runs: Sequence[Run], metric: str = "dice") -> list[Row]:
    """A row for each run, then one over all seeds for each kind of run that has several.

    The difference of a distilled student is to the student alone: same data, network, width and seed, paired by case;
    to the mean over all seeds where there is none of its seed. An interval over several seeds is over seeds and cases
    (see `intervals`), one of a single run over its cases.
    """
    known = set.intersection(*(set(metrics) for item in runs for metrics in item.cases.values()))
    if metric not in known:
        raise UserError(f"{unknown_name('metric', metric, known)}")
    kinds: dict[tuple, list[Run]] = defaultdict(list)
    for item in sorted(runs, key=lambda item: (item.data, item.order, int(item.seed))):
        kinds[item.kind].append(item)
    single = [make_row([item], runs, metric) for members in kinds.values() for item in members]
    return single + [make_row(members, runs, metric) for members in kinds.values() if len(members) > 1]


def make_row(members: Sequence[Run], runs: Sequence[Run], metric: str) -> Row:
    """A row for runs that differ in their seed only."""
    first = members[0]
    values = [values_of(item, metric) for item in members]
    summary = over_seeds(values)
    hd95 = over_seeds([values_of(item, "hd95") for item in members])
    return Row(
        **{field.name: getattr(first, field.name) for field in fields(Run) if field.name not in ("seed", "cases")},
        seeds=first.seed if len(members) == 1 else f"{len(members)} seeds",
        **{key: summary[key] for key in ("cases", "mean", "low", "high", "misses")},
        hd95=hd95["mean"],
        hd95_misses=hd95["misses"],
        **against_alone(members, values, runs, metric),
    )


def against_alone(
    members: Sequence[Run], values: Sequence[dict[str, float]], runs: Sequence[Run], metric: str
) -> dict[str, float | str]:
    """The difference of distilled students of some seeds to the students alone; nothing if there are none."""
    first = members[0]
    alone = {
        item.seed: values_of(item, metric)
        for item in runs
        if (item.role, item.method) == ("student", "none")
        and (item.data, item.network, item.width) == (first.data, first.network, first.width)
    }
    if not first.distilled or not alone:
        return {}
    paired = all(item.seed in alone for item in members)
    base = [alone[item.seed] for item in members] if paired else list(alone.values())
    difference = difference_over_seeds(values, base, paired)
    return {
        "difference": difference["mean"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "difference_misses": difference["misses"],
        "against": "same seed" if paired else "all seeds",
    }


def values_of(item: Run, metric: str) -> dict[str, float]:
    """A run's metric of each case."""
    return {case: metrics[metric] for case, metrics in item.cases.items()}


def as_table(rows: Sequence[Row], metric: str) -> Table:
    """Rows of the same data for people. Differences are in points: hundredths for overlap metrics."""
    scale = 100 if metric.startswith(("dice", "voe", "rvd")) else 1
    data = f"{rows[0].dataset}, {rows[0].task}, split {rows[0].split}"
    table = Table(title=f"{data}: test {metric} of {rows[0].cases} cases, mean and 95% interval", box=HORIZONTALS)
    for name in (
        "",
        "network",
        "seed",
        "parameters",
        metric,
        "HD95 mm",
        "points to alone" if scale == 100 else "to alone",
    ):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before and "seeds" in row.seeds and "seeds" not in before.seeds:
            table.add_section()
        difference = ""
        if row.difference is not None:
            parts = [scale * part for part in (row.difference, row.difference_low, row.difference_high)]
            difference = finite("{:+.2f} [{:+.2f}, {:+.2f}]", *parts) + missed(row.difference_misses)
            difference += "*" if row.against == "all seeds" else ""
        table.add_row(
            row.title,
            row.network if row.width == 1 else f"{row.network} ×{row.width:g}",
            row.seeds,
            f"{row.parameters:,}",
            finite("{:.4f} [{:.3f}, {:.3f}]", row.mean, row.low, row.high) + missed(row.misses),
            finite("{:.1f}", row.hd95) + missed(row.hd95_misses),
            difference,
        )
    table.caption = "\n".join(remarks(rows))
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader of a table must know of its differences and intervals."""
    lines = []
    if any(row.against == "all seeds" for row in rows):
        lines.append("* no student alone of the same seed: to the mean of those there are")
    several = [row.seeds for row in rows if row.seeds.endswith(" seeds")]
    if len(several) < len(rows):
        lines.append("one seed: the interval is over cases alone and says nothing of another seed")
    if "2 seeds" in several:
        lines.append(
            "2 seeds: the interval misses the true value more often than one time in twenty; take three or more"
        )
    return lines


def finite(pattern: str, *values: float) -> str:
    """Values in a pattern, or a dash where every case is missed."""
    return "–" if math.isnan(values[0]) else pattern.format(*values)


def missed(misses: int) -> str:
    """Says that a mean is without some cases."""
    return f" ({misses} missed)" if misses else ""


def show(table: Table) -> None:
    """Print a table whole: in a narrow terminal its cells fold, in a file or pipe it is as wide as it must be."""
    wide = Console(width=1000, markup=False).measure(table).maximum
    (console if console.is_terminal else Console(width=wide, highlight=False, markup=False)).print(table)


def write_rows(rows: Sequence[Row], csv_file: Path | None, json_file: Path | None) -> None:
    """Write rows to files. What is not a finite number is left empty (CSV) or null (JSON)."""
    plain = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(row).items()}
        for row in rows
    ]
    for file in filter(None, (csv_file, json_file)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if json_file:
        json_file.write_text(json.dumps(plain, indent=1, allow_nan=False))
    if csv_file:
        with open(csv_file, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(plain)
