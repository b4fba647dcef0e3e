"""When distilling helps: python -m benchmarks.distillation Task04_Hippocampus WORK

A grid over (regime × draw × arm) through the project's own commands. A regime is a number of labelled cases, the other
training cases being there without their labels; a draw is its own labelled cases, its own teacher and its own seed,
shared by all arms. Val and test cases are the same in all. Whatever is there is not computed again, so that it can be
stopped and started at any time. Each cell is a run in WORK/mlflow.db. What is finished is kept in
results/distillation.json, and goes on from there without WORK, too; results/distillation.{md,png} are made of it, which
is all that --report does.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.jobs import Finding, arguments_of, begin, collect, run_job
from data_tools.files import write_text
from data_tools.split import deal
from data_tools.store import open_store
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds

RESULTS = Path(__file__).parent / "results"
FINDINGS = RESULTS / "distillation.json"
VAL, TEST = 20, 60
DRAWS = 8
"""The most draws."""


@dataclass(frozen=True)
class Arm:
    """A way to train a network: the method, the teachers, the cases."""

    method: str = ""
    """Distillation method; none for a network trained alone."""
    unlabelled: float = 0.0
    """Share of unlabelled slices in a batch."""
    teachers: tuple[str, ...] = ("teacher",)
    """The arms whose networks teach, as one teacher of the mean of their probabilities."""
    network: str = "enet"
    width: float = 1.0
    all_labels: bool = False
    """With the labels of all training cases."""
    seed: int = 0
    """What is added to the draw's seed."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options that differ from the common ones."""


TEACHER = {"network": "unet", "width": 0.25, "options": {"steps": 2000}}
LONG = {"steps": 6000, "val-steps": 1000}
ARMS = {
    "teacher": Arm(**TEACHER),
    "alone": Arm(),
    "soft, unlabelled": Arm("soft", 0.5),
    "soft, unlabelled, enet as teacher": Arm("soft", 0.5, ("alone",)),
    "soft, unlabelled, share 0.875": Arm("soft", 0.875),
    "soft, unlabelled, 6000 steps of 8": Arm("soft", 0.5, options=LONG | {"batch-size": 8}),
    "alone, 6000 steps of 8": Arm(options=LONG | {"batch-size": 8}),
    "spark, unlabelled": Arm("spark", 0.5),
    "alone, 6000 steps": Arm(options=LONG),
    "soft, unlabelled, 6000 steps": Arm("soft", 0.5, options=LONG),
    "second teacher": Arm(**TEACHER, seed=100),
    "third teacher": Arm(**TEACHER, seed=200),
    "soft, unlabelled, three teachers": Arm("soft", 0.5, ("teacher", "second teacher", "third teacher")),
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
"""The arms, in the order in which they are run."""

CONTRASTS = [
    ("soft, unlabelled", "soft, unlabelled, enet as teacher"),
    ("spark, unlabelled", "soft, unlabelled"),
    ("soft, unlabelled, 6000 steps", "alone, 6000 steps"),
]
"""Pairs of arms whose difference is reported besides those to the student alone."""

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
    "picture-every": 0,
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
    def name(self) -> str:
        """Its name among the findings."""
        return f"{self.labelled} labelled, draw {self.draw}: {self.arm}"

    @property
    def teachers(self) -> list["Cell"]:
        """The cells whose networks teach its student."""
        arm = ARMS[self.arm]
        return [Cell(self.labelled, self.draw, name) for name in (arm.teachers if arm.method else ())]

    @property
    def split(self) -> str:
        return "all" if ARMS[self.arm].all_labels else f"labelled{self.labelled}-draw{self.draw}"

    def folder(self, work: Path) -> Path:
        regime = f"all-draw{self.draw}" if ARMS[self.arm].all_labels else self.split
        return work / "runs" / regime / self.arm.replace(", ", "-").replace(" ", "-")

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
        "seed": cell.draw + arm.seed,
        "tracking-uri": f"sqlite:///{work}/mlflow.db",
        "steps": options.steps,
        "compile": str(options.compile).lower(),
    }
    if not arm.method:
        return "train", given | {"network": arm.network, "width": arm.width, "views": -1} | arm.options
    teacher = ARMS[arm.teachers[0]]
    given |= {
        "method": arm.method,
        "student": arm.network,
        "student-width": arm.width,
        "teacher": teacher.network,
        "teacher-width": teacher.width,
        "teacher-checkpoint": [each.network(work) / "best.safetensors" for each in cell.teachers],
        "unlabelled-share": arm.unlabelled,
        "cache": "on",
        "cache-folder": work / "teacher-cache",
    }
    return "distill", given | arm.options


def findings_of(work: Path, labelled: Sequence[int]) -> dict[str, Finding]:
    """All findings so far, by the names of their cells."""
    cells = (Cell(number, draw, arm) for number, draw, arm in product(labelled, range(DRAWS), ARMS))
    return collect(FINDINGS, ((cell.name, cell.folder(work), cell.network(work)) for cell in cells))


def compute(cell: Cell, work: Path, options: argparse.Namespace) -> None:
    """Compute a cell, unless its network is there; so, too, the teachers that it needs."""
    for teacher in cell.teachers:
        compute(teacher, work, options)
    command, given = arguments(cell, work, options)
    run_job(command, given, cell.folder(work), cell.network(work))


@dataclass(frozen=True)
class Result:
    """The findings on an arm in a regime; differences and intervals are in points, over draws and cases."""

    labelled: int
    arm: str
    draws: int
    val: float
    dice: float
    difference: tuple[float, float, float] | None
    """To the student alone of the same draws, low and high."""
    gap_closed: float | None
    """The difference over that of its own teacher to the student alone."""
    minutes: float


def results(findings: Mapping[str, Finding], labelled: Sequence[int]) -> list[Result]:
    """The findings so far: an arm is compared in the draws in which both it and the student alone are."""
    return [
        result(number, arm, found, findings)
        for number in labelled
        for arm in ARMS
        if (found := [f for d in range(DRAWS) if (f := findings.get(Cell(number, d, arm).name))])
    ]


def result(labelled: int, arm: str, found: Sequence[Finding], findings: Mapping[str, Finding]) -> Result:
    alone = difference(labelled, arm, "alone", findings)
    teacher = difference(labelled, ARMS[arm].teachers[0], "alone", findings) if ARMS[arm].method else None
    return Result(
        labelled,
        arm,
        len(found),
        mean(f.val for f in found),
        over_seeds([f.dice for f in found])["mean"],
        alone,
        alone[0] / teacher[0] if alone and teacher and teacher[0] > 0 else None,
        mean(f.minutes for f in found),
    )


def difference(
    labelled: int, arm: str, other: str, findings: Mapping[str, Finding]
) -> tuple[float, float, float] | None:
    """Points of Dice of an arm over another in the draws of both, with its interval."""
    pairs = [
        (findings[x], findings[y])
        for draw in range(DRAWS)
        if (x := Cell(labelled, draw, arm).name) in findings and (y := Cell(labelled, draw, other).name) in findings
    ]
    if not pairs or arm == other:
        return None
    found = difference_over_seeds([a.dice for a, _ in pairs], [b.dice for _, b in pairs], paired=True)
    return tuple(100 * found[key] for key in ("mean", "low", "high"))


def report(found: Sequence[Result], findings: Mapping[str, Finding], options: argparse.Namespace) -> None:
    """results/distillation.{md,png}"""
    lines = [
        "# When distilling helps: hippocampus",
        "",
        f"`python -m benchmarks.distillation`: {VAL} val and {TEST} test cases; enet, {options.steps} steps of 16",
        "slices, if the arm does not say otherwise. Differences are in points of Dice to the student alone of the same",
        "draw, with 95% intervals over draws and cases. A draw is its own labelled cases, teacher and seed. Val Dice",
        "is that of the best epoch. Single findings: distillation.json.",
        "",
        "| labelled | arm | draws | val Dice | test Dice | to alone | gap closed | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in found:
        closed = "" if item.gap_closed is None else f"{item.gap_closed:.0%}"
        lines.append(
            f"| {item.labelled} | {item.arm} | {item.draws} | {item.val:.4f} | {item.dice:.4f} "
            f"| {points(item.difference)} | {closed} | {item.minutes:.1f} |"
        )
    for number, (arm, other) in product(options.labelled, CONTRASTS):
        if contrast := difference(number, arm, other, findings):
            lines += ["", f"{number} labelled, `{arm}` over `{other}`: {points(contrast)}."]
    there = {(item.labelled, item.arm): item.draws for item in found}
    for number in options.labelled:
        missing = [
            f"{arm} ({there.get((number, arm), 0)} of {options.draws})"
            for arm in ARMS
            if there.get((number, arm), 0) < options.draws
        ]
        if missing:
            lines += ["", f"Not run with {number} labelled, or not in all draws: " + "; ".join(missing) + "."]
    write_text(RESULTS / "distillation.md", "\n".join([*lines, ""]))
    draw_figure(found, RESULTS / "distillation.png")


def points(difference: tuple[float, float, float] | None) -> str:
    """A difference in points and its interval, for people."""
    return "" if difference is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference)


def draw_figure(found: Sequence[Result], path: Path) -> None:
    """Differences to the student alone with their intervals, a panel for each regime."""
    from matplotlib.figure import Figure

    regimes = sorted({item.labelled for item in found if item.difference})
    if not regimes:
        return
    shown = [[item for item in found if item.labelled == number and item.difference] for number in regimes]
    figure = Figure(figsize=(8, 1 + 0.32 * sum(map(len, shown)) + 0.5 * len(shown)), dpi=120, layout="constrained")
    ratios = [len(items) for items in shown]
    panels = figure.subplots(len(regimes), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axis, number, items in zip(panels, regimes, shown, strict=True):
        for row, item in enumerate(items):
            value, low, high = item.difference
            color = "#0072b2" if ARMS[item.arm].unlabelled else "#d55e00" if ARMS[item.arm].method else "#555555"
            axis.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
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
        for number, draw, arm in product(options.labelled, range(options.first, options.draws), options.arms):
            cell = Cell(number, draw, arm)
            if cell.name not in findings_of(work, options.labelled):
                compute(cell, work, options)
    findings = findings_of(work, options.labelled)
    report(results(findings, options.labelled), findings, options)


if __name__ == "__main__":
    main()
