"""Which augmentation, which slices, how many steps: python -m benchmarks.slices Task04_Hippocampus WORK

Hippocampus, 120 labelled cases, the student alone, three seeds: augmentation none, flips and full × slices labelled
and all × as many steps as five epochs of the labelled slices have, and three times as many. What is finished is kept in
results/slices.json, and is not computed again; results/slices.md is made of it, which is all that --report does. With
--part 1/2 and --part 2/2 two may work in WORK side by side.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean, median

from benchmarks.jobs import Finding, arguments_of, begin, collect, hippocampus, run_job
from data_tools.files import write_text
from data_tools.options import parse_part
from spark_dist.evaluation.intervals import over_seeds

RESULTS = Path(__file__).parent / "results"
FINDINGS = RESULTS / "slices.json"
STEPS = (1000, 3000)
SLICES = ("labelled", "all")
AUGMENT = {
    "none": {"augment": "none"},
    "flips": {"augment": "flips"},
    "full": {"augment": "full", "mirror": "false", "quarter-turns": "false", "views": -1},
}
SEEDS = (0, 1, 2)
COMMON = {
    "task": "organ",
    "crop": 64,
    "crop-shift": "[0,0]",
    "batch-size": 16,
    "lr": 3e-3,
    "network": "enet",
    "channels-last": "true",
    "picture-every": 0,
    "experiment": "slices",
}


Job = tuple[int, str, str, int]
"""Steps, augmentation, slices, seed."""


def jobs() -> list[Job]:
    """All jobs, the cheap ones first."""
    return [(s, a, k, seed) for s, seed, a, k in product(STEPS, SEEDS, AUGMENT, SLICES)]


def name(steps: int, augment: str, slices: str, seed: int) -> str:
    """A job's name among the findings."""
    return f"augment {augment}, slices {slices}, {steps} steps, seed {seed}"


def folder(work: Path, job: Job) -> Path:
    return work / "runs" / name(*job).replace(", ", "-").replace(" ", "-")


def findings_of(work: Path) -> dict[str, Finding]:
    """All findings so far, by the names of their jobs."""
    return collect(FINDINGS, ((name(*job), folder(work, job), folder(work, job) / "network") for job in jobs()))


def report(findings: Mapping[str, Finding]) -> None:
    """results/slices.md"""
    lines = [
        "# Augmentation, slices, steps: hippocampus, 120 labelled cases, enet alone",
        "",
        "`python -m benchmarks.slices`: 20 val and 60 test cases, 16 slices a step, means over seeds; the interval of",
        "the test Dice is over seeds and cases; minutes are the median.",
        "",
        "| augmentation | slices | steps | seeds | val Dice | test Dice | HD95, mm | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for steps, augment, slices in product(STEPS, AUGMENT, SLICES):
        runs = [found for seed in SEEDS if (found := findings.get(name(steps, augment, slices, seed)))]
        if not runs:
            lines.append(f"| {augment} | {slices} | {steps} | not run | | | | |")
            continue
        val, minutes = mean(run.val for run in runs), median(run.minutes for run in runs)
        dice, far = (over_seeds(values) for values in zip(*((run.dice, run.hd95) for run in runs), strict=True))
        lines.append(
            f"| {augment} | {slices} | {steps} | {len(runs)} | {val:.4f} | {dice['mean']:.4f} "
            f"[{dice['low']:.3f}, {dice['high']:.3f}] | {far['mean']:.2f} | {minutes:.1f} |"
        )
    write_text(RESULTS / "slices.md", "\n".join([*lines, ""]))


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS, help="steps (%(default)s)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth job, from the Kth (%(default)s)")
    options = parser.parse_args()
    work = options.work
    if not options.report:
        begin(work)
        store = hippocampus(options.nifti, work, "organ=1,tumour=2")
        part, parts = parse_part(options.part)
        for job in jobs()[part - 1 :: parts]:
            steps, augment, slices, seed = job
            if steps not in options.steps or name(*job) in findings_of(work):
                continue
            given = (
                COMMON | AUGMENT[augment] | {"slices": slices, "steps": steps, "val-steps": steps // 5, "seed": seed}
            )
            given |= {"dataset": store, "tracking-uri": f"sqlite:///{work}/mlflow.db"}
            run_job("train", given, folder(work, job), folder(work, job) / "network")
    report(findings_of(work))


if __name__ == "__main__":
    main()
