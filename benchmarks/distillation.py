"""When distilling helps: python -m benchmarks.distillation Task04_Hippocampus WORK

A grid over (regime × draw × arm) through the project's own commands. A regime is a number of labelled cases, the other
training cases being there without their labels; a draw is its own labelled cases, its own teacher and its own seed,
shared by all arms. Val and test cases are the same in all. Whatever is there is not computed again, so that it can be
stopped and started at any time. Each cell is a run in WORK/mlflow.db. Writes results/distillation.{md,json,png} of what
is finished; --report does only that.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.jobs import arguments_of, begin, of_cases, run_job
from data_tools.files import write_text
from data_tools.split import deal
from data_tools.store import open_store
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds

RESULTS = Path(__file__).parent / "results"
VAL, TEST = 20, 60
METRIC = "dice"


@dataclass(frozen=True)
class Arm:
    """A way to train a student: the teacher, and the cases."""

    method: str = ""
    """Distillation method; none for a network trained alone."""
    unlabelled: float = 0.0
    """Share of unlabelled slices in a batch."""
    teacher: str = "teacher"
    """The arm whose network teaches."""
    network: str = "enet"
    width: float = 1.0
    steps: int = 0
    """Optimizer steps, if not those of all."""
    all_labels: bool = False
    """With the labels of all training cases."""


ARMS = {
    "teacher": Arm(network="unet", width=0.25, steps=700),
    "teacher, 2000 steps": Arm(network="unet", width=0.25, steps=2000),
    "alone": Arm(),
    "soft, unlabelled": Arm("soft", 0.5),
    "soft, unlabelled, teacher of 2000 steps": Arm("soft", 0.5, "teacher, 2000 steps"),
    "soft, unlabelled, enet as teacher": Arm("soft", 0.5, "alone"),
    "spark, unlabelled": Arm("spark", 0.5),
    "kd, unlabelled": Arm("kd", 0.5),
    "soft": Arm("soft"),
    "spark": Arm("spark"),
    "kd": Arm("kd"),
    "cwd, unlabelled": Arm("cwd", 0.5),
    "dist, unlabelled": Arm("dist", 0.5),
    "at, unlabelled": Arm("at", 0.5),
    "emkd, unlabelled": Arm("emkd", 0.5),
    "all labels": Arm(all_labels=True),
}
"""The arms, in the order in which they are run: an arm's teacher stands before it."""

COMMON = {
    "task": "organ",
    "crop": "[64,48]",
    "crop-shift": "[0,0]",
    "slices": "all",
    "augment": "full",
    "mirror": "false",
    "quarter-turns": "false",
    "batch-size": 16,
    "lr": 3e-3,
    "val-steps": 500,
    "channels-last": "true",
    "experiment": "distillation",
}
"""Options of all jobs."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    labelled: int
    draw: int
    arm: str

    @property
    def split(self) -> str:
        return "all" if ARMS[self.arm].all_labels else f"labelled{self.labelled}-draw{self.draw}"

    def folder(self, work: Path) -> Path:
        return work / "runs" / self.split / self.arm.replace(", ", "-").replace(" ", "-")

    def network(self, work: Path) -> Path:
        """The folder of the network that this cell is about."""
        return self.folder(work) / ("student" if ARMS[self.arm].method else "network")


def prepare(nifti: Path, work: Path, labelled: Sequence[int], draws: int) -> None:
    """The store and the splits of all draws."""
    store = work / "hippocampus.zarr"
    spark_data = (sys.executable, "-m", "data_tools")
    subprocess.run(
        [*spark_data, "prepare", nifti, store, "--layout", "msd", "--labels", "organ=1,tumour=2"], check=True
    )
    found = open_store(store)
    train, val, test = deal(found, [len(found.cases) - VAL - TEST, VAL, TEST], seed=0)
    wanted = {"all": {"train": train, "val": val, "test": test}}
    for draw in range(draws):
        order = np.random.default_rng([1, draw]).permutation(train).tolist()
        for number in labelled:
            parts = {"train": order[:number], "unlabelled": order[number:], "val": val, "test": test}
            wanted[f"labelled{number}-draw{draw}"] = parts
    for name, parts in wanted.items():
        if name not in found.splits:
            write_text(work / "split.json", json.dumps(parts))
            subprocess.run([*spark_data, "split", store, "--lists", work / "split.json", "--name", name], check=True)


def arguments(cell: Cell, work: Path, options: argparse.Namespace) -> tuple[str, Mapping]:
    """The command of a cell and its options."""
    arm = ARMS[cell.arm]
    given = COMMON | {
        "dataset": work / "hippocampus.zarr",
        "split": cell.split,
        "seed": cell.draw,
        "tracking-uri": f"sqlite:///{work}/mlflow.db",
        "steps": arm.steps or options.steps,
        "compile": str(options.compile).lower(),
    }
    if not arm.method:
        given |= {"network": arm.network, "width": arm.width, "views": -1}
        return "train", given
    teacher = ARMS[arm.teacher]
    given |= {
        "method": arm.method,
        "student": arm.network,
        "student-width": arm.width,
        "teacher": teacher.network,
        "teacher-width": teacher.width,
        "teacher-checkpoint": Cell(cell.labelled, cell.draw, arm.teacher).network(work) / "best.safetensors",
        "unlabelled-share": arm.unlabelled,
        "cache": "on",
        "cache-folder": work / "teacher-cache",
    }
    return "distill", given


def run(cell: Cell, work: Path, options: argparse.Namespace) -> None:
    """Compute a cell, unless it is there."""
    command, given = arguments(cell, work, options)
    run_job(command, given, cell.folder(work), cell.network(work))


def dice(cell: Cell, work: Path) -> dict[str, float] | None:
    """Test Dice of every case, if the cell is finished."""
    return of_cases(cell.network(work), METRIC)


@dataclass(frozen=True)
class Result:
    """The findings on an arm in a regime; differences and intervals are in points, over draws and cases."""

    labelled: int
    arm: str
    draws: int
    dice: float
    difference: float | None = None
    """To the student alone of the same draws."""
    low: float | None = None
    high: float | None = None
    gap_closed: float | None = None
    """The difference over that of its own teacher to the student alone."""
    control: tuple[float, float, float] | None = None
    """Difference to the arm whose teacher is like the student, low and high."""
    minutes: float | None = None


def results(work: Path, labelled: Sequence[int], draws: int) -> list[Result]:
    """The findings so far: an arm is compared in the draws in which both it and the student alone are."""
    found = []
    for number in labelled:
        values = {arm: {d: v for d in range(draws) if (v := dice(Cell(number, d, arm), work))} for arm in ARMS}
        for arm in ARMS:
            if values[arm]:
                found.append(result(number, arm, values, work))
    return found


def result(labelled: int, arm: str, values: Mapping[str, Mapping[int, dict]], work: Path) -> Result:
    def to(other: str) -> tuple[float, float, float] | None:
        both = sorted(values[arm].keys() & values[other].keys())
        if not both or arm == other:
            return None
        pairs = [values[arm][d] for d in both], [values[other][d] for d in both]
        found = difference_over_seeds(*pairs, paired=True)
        return tuple(100 * found[key] for key in ("mean", "low", "high"))

    minutes = [
        float(file.read_text())
        for d in values[arm]
        if (file := Cell(labelled, d, arm).folder(work) / "minutes.txt").exists()
    ]
    alone = to("alone")
    teacher = ARMS[arm].teacher
    both = sorted(values[arm].keys() & values["alone"].keys() & values[teacher].keys())
    gap = (
        np.mean([[np.mean(list(values[a][d].values())) for a in (arm, "alone", teacher)] for d in both], axis=0)
        if both
        else None
    )
    closed = (gap[0] - gap[1]) / (gap[2] - gap[1]) if gap is not None and gap[2] > gap[1] and ARMS[arm].method else None
    return Result(
        labelled,
        arm,
        len(values[arm]),
        over_seeds(list(values[arm].values()))["mean"],
        *(alone or (None, None, None)),
        closed,
        to("soft, unlabelled, enet as teacher") if arm == "soft, unlabelled" else None,
        float(np.mean(minutes)) if minutes else None,
    )


def report(found: Sequence[Result], options: argparse.Namespace) -> None:
    """results/distillation.{md,json,png}"""
    teacher = ARMS["teacher"]
    write_text(RESULTS / "distillation.json", json.dumps([asdict(item) for item in found], indent=1) + "\n")
    lines = [
        "# When distilling helps: hippocampus",
        "",
        f"`python -m benchmarks.distillation`: {TEST} test cases; enet, {options.steps} steps of 16 slices.",
        f"The teacher is a unet ×{teacher.width:g}, {teacher.steps} steps on the labelled cases. Differences are in",
        "points of Dice to the student alone of the same draw, with 95% intervals over draws and cases. A draw is",
        "its own labelled cases, teacher and seed.",
        "",
        "| labelled | arm | draws | test Dice | to alone | gap closed | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in found:
        difference = "" if item.difference is None else f"{item.difference:+.2f} [{item.low:+.2f}, {item.high:+.2f}]"
        closed = "" if item.gap_closed is None else f"{item.gap_closed:.0%}"
        minutes = "" if item.minutes is None else f"{item.minutes:.1f}"
        lines.append(
            f"| {item.labelled} | {item.arm} | {item.draws} | {item.dice:.4f} | {difference} | {closed} | {minutes} |"
        )
    for item in found:
        if item.control:
            mean, low, high = item.control
            lines += ["", f"{item.labelled} labelled: `{item.arm}` over the same with an enet as its teacher: "]
            lines[-1] += f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] points."
    there = {(item.labelled, item.arm): item.draws for item in found}
    for number in options.labelled:
        missing = [
            f"{arm} ({there.get((number, arm), 0)} of {options.draws})"
            for arm in ARMS
            if there.get((number, arm), 0) < options.draws
        ]
        lines += [
            "",
            f"Not run with {number} labelled, or not in all draws: " + ("; ".join(missing) or "nothing") + ".",
        ]
    lines.append("")
    write_text(RESULTS / "distillation.md", "\n".join(lines))
    draw_figure(found, RESULTS / "distillation.png")


def draw_figure(found: Sequence[Result], path: Path) -> None:
    """Differences to the student alone with their intervals, a panel for each regime."""
    from matplotlib.figure import Figure

    regimes = sorted({item.labelled for item in found if item.difference is not None})
    if not regimes:
        return
    shown = [[item for item in found if item.labelled == number and item.difference is not None] for number in regimes]
    figure = Figure(figsize=(8, 1 + 0.32 * sum(map(len, shown)) + 0.5 * len(shown)), dpi=120, layout="constrained")
    ratios = [max(1, len(items)) for items in shown]
    panels = figure.subplots(len(regimes), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axis, number, items in zip(panels, regimes, shown, strict=True):
        for row, item in enumerate(items):
            bars = [[item.difference - item.low], [item.high - item.difference]]
            color = "#0072b2" if ARMS[item.arm].unlabelled else "#d55e00" if ARMS[item.arm].method else "#555555"
            axis.errorbar(item.difference, row, xerr=bars, fmt="o", color=color, capsize=3)
        axis.axvline(0, color="#999999", linewidth=1)
        axis.set_yticks(range(len(items)), [f"{item.arm} ({item.draws})" for item in items])
        axis.set_ylim(len(items) - 0.5, -0.5)
        axis.set_title(f"{number} labelled cases", fontsize=10, loc="left")
    panels[-1].set_xlabel("points of test Dice to the student alone, 95% interval over draws and cases")
    figure.savefig(path)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--labelled", type=int, nargs="+", default=[5, 12], help="labelled cases (%(default)s)")
    parser.add_argument("--draws", type=int, default=5, help="draws (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="draw to begin with (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=3000, help="steps of the student (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="faster steps (torch.compile)")
    options = parser.parse_args()
    work = options.work
    if not options.report:
        begin(work)
        prepare(options.nifti, work, options.labelled, options.draws)
        for number in options.labelled:
            for draw in range(options.first, options.draws):
                for arm in options.arms:
                    run(Cell(number, draw, arm), work, options)
    report(results(work, options.labelled, options.draws), options)


if __name__ == "__main__":
    main()
