"""One network for two regions beside two binary networks: python -m benchmarks.regions Task04_Hippocampus WORK

Hippocampus' anterior and posterior part, 120 labelled cases, the student alone, the same steps each, three seeds.
Whatever is there is not computed again. Writes results/regions.md of what is finished; --report does only that.
"""

from pathlib import Path

from benchmarks.jobs import arguments_of, begin, hippocampus, of_cases, run_job
from data_tools.files import write_text
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds

RESULTS = Path(__file__).parent / "results"
REGIONS = ("anterior", "posterior")
TASKS = ("anterior,posterior", *REGIONS)
SEEDS = (0, 1, 2)
COMMON = {
    "crop": "[64,48]",
    "crop-shift": "[0,0]",
    "augment": "full",
    "mirror": "false",
    "quarter-turns": "false",
    "views": -1,
    "batch-size": 16,
    "lr": 3e-3,
    "network": "enet",
    "channels-last": "true",
    "compile": "true",
    "experiment": "regions",
}


def network(work: Path, task: str, seed: int) -> Path:
    return work / "runs" / task.replace(",", "+") / f"seed{seed}" / "network"


def report(work: Path, steps: int) -> None:
    """results/regions.md"""
    lines = [
        "# One network for two regions, and one for each: hippocampus, 120 labelled cases, enet",
        "",
        f"`python -m benchmarks.regions`: {steps} steps of 16 slices for each network, 60 test cases. The difference",
        "is that of one network for both to one for the region alone, paired by seed and case, in points of Dice, with",
        "its 95% interval over seeds and cases.",
        "",
        "| region | seeds | one for both | one for each | difference |",
        "|---|---|---|---|---|",
    ]
    for region in REGIONS:
        pairs = [
            (both, single)
            for seed in SEEDS
            if (both := of_cases(network(work, TASKS[0], seed), f"dice.{region}"))
            and (single := of_cases(network(work, region, seed)))
        ]
        if pairs:
            both, single = map(list, zip(*pairs, strict=True))
            found = difference_over_seeds(both, single, paired=True)
            mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
            values = " | ".join(f"{over_seeds(runs)['mean']:.4f}" for runs in (both, single))
            lines.append(f"| {region} | {len(pairs)} | {values} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |")
    write_text(RESULTS / "regions.md", "\n".join([*lines, ""]))


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="steps of each network (%(default)s)")
    options = parser.parse_args()
    work = options.work
    if not options.report:
        begin(work)
        store = hippocampus(options.nifti, work, "anterior=1,posterior=2")
        for seed in SEEDS:
            for task in TASKS:
                given = COMMON | {"task": task, "steps": options.steps, "val-steps": 500, "seed": seed}
                given |= {"dataset": store, "tracking-uri": f"sqlite:///{work}/mlflow.db"}
                where = network(work, task, seed)
                run_job("train", given, where.parent, where)
    report(work, options.steps)


if __name__ == "__main__":
    main()
