"""Which augmentation, which slices, how many steps: python -m benchmarks.slices Task04_Hippocampus WORK

Hippocampus, 120 labelled cases, the student alone, three seeds: augmentation none, flips and full × slices labelled
and all × as many steps as five epochs of the labelled slices have, and three times as many. Whatever is there is not
computed again. Writes results/slices.md of what is finished; --report does only that.
"""

from itertools import product
from pathlib import Path
from statistics import mean

from benchmarks.jobs import arguments_of, begin, hippocampus, of_cases, run_job
from data_tools.files import write_text
from spark_dist.evaluation.intervals import over_seeds
from spark_dist.training.journal import read_journal

RESULTS = Path(__file__).parent / "results"
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
    "compile": "true",
    "experiment": "slices",
}


def cells() -> list[tuple[int, str, str, int]]:
    """(steps, augmentation, slices, seed), the cheap ones first."""
    return [(s, a, k, seed) for s, seed, a, k in product(STEPS, SEEDS, AUGMENT, SLICES)]


def folder(work: Path, steps: int, augment: str, slices: str, seed: int) -> Path:
    return work / "runs" / f"{augment}-{slices}-{steps}" / f"seed{seed}"


def best_val(network: Path) -> float:
    """The best mean Dice over the val cases while training, which is what chose the weights."""
    return max(
        metric["val/dice"] for _, event in read_journal(network) if "val/dice" in (metric := event.get("metrics", {}))
    )


def report(work: Path) -> None:
    """results/slices.md"""
    lines = [
        "# Augmentation, slices, steps: hippocampus, 120 labelled cases, enet alone",
        "",
        "`python -m benchmarks.slices`: 20 val and 60 test cases, 16 slices a step, means over seeds; the interval of",
        "the test Dice is over seeds and cases.",
        "",
        "| augmentation | slices | steps | seeds | val Dice | test Dice | HD95, mm | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for steps, augment, slices in product(STEPS, AUGMENT, SLICES):
        folders = [folder(work, steps, augment, slices, seed) for seed in SEEDS]
        runs = [each for each in folders if (each / "network" / "test_cases.json").exists()]
        if not runs:
            lines.append(f"| {augment} | {slices} | {steps} | not run | | | | |")
            continue
        dice = over_seeds([of_cases(run / "network") for run in runs])
        far = over_seeds([of_cases(run / "network", "hd95") for run in runs])
        val = mean(best_val(run / "network") for run in runs)
        minutes = mean(float((run / "minutes.txt").read_text()) for run in runs)
        lines.append(
            f"| {augment} | {slices} | {steps} | {len(runs)} | {val:.4f} | {dice['mean']:.4f} [{dice['low']:.3f}, "
            f"{dice['high']:.3f}] | {far['mean']:.2f} | {minutes:.1f} |"
        )
    write_text(RESULTS / "slices.md", "\n".join([*lines, ""]))


def main() -> None:
    parser = arguments_of(__doc__)
    options = parser.parse_args()
    work = options.work
    if not options.report:
        begin(work)
        store = hippocampus(options.nifti, work, "organ=1,tumour=2")
        for steps, augment, slices, seed in cells():
            given = (
                COMMON | AUGMENT[augment] | {"slices": slices, "steps": steps, "val-steps": steps // 5, "seed": seed}
            )
            given |= {"dataset": store, "tracking-uri": f"sqlite:///{work}/mlflow.db"}
            run = folder(work, steps, augment, slices, seed)
            run_job("train", given, run, run / "network")
    report(work)


if __name__ == "__main__":
    main()
