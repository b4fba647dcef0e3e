"""SPARK with its parts on and off: python -m benchmarks.spark_parts STORE WORK --draw SPLIT TEACHER [--draw …]

What each part adds where few cases are labelled, and `soft` beside them. A draw is a split with unlabelled
cases and a teacher's checkpoint for it, shared by all arms; its number is the seed. The options are those of
benchmarks.distillation; `--set crop=[48,32]` changes one. Whatever is there is not computed again. `--gradients 200`
trains `spark` and `soft` for so many steps in this process and measures, for each loss term, the norm of its gradient
with respect to the student's parameters. Writes results/spark_parts.md of what is finished; --report does only that.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from benchmarks.distillation import COMMON
from benchmarks.jobs import as_options, begin, of_cases, run_job
from data_tools.files import write_text
from data_tools.store import open_store
from spark_dist.config import DistillOptions
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.order import EpochSampler
from spark_dist.distillers import build_distiller
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import load_card
from spark_dist.parsing import parse
from spark_dist.teacher.saved import SavedNetworks
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.training.distillation import Distillation
from spark_dist.training.job import training_table, transfer_table

RESULTS = Path(__file__).parent / "results"
ARMS = {
    "spark": {},
    "soft": {"method": "soft"},
    "without CED": {"weights.ced": 0},
    "CED alone": {"weights.kl": 0},
    "without cross terms": {"weights.high_low": 0, "weights.low_high": 0},
    "KL as in soft": {"weights.kl": 0.5, "weights.temperature": 1},
    "gain 5": {"weights.gain": 5},
    "gain 80": {"weights.gain": 80},
}
"""Options in which an arm differs from SPARK with its defaults."""
MEASURED = ("spark", "soft")
"""Arms whose gradients are measured."""
LOOKED_AT = (0, 1, 3, 10, 30, 100, 199, 300, 1000, 3000)
"""Steps at which they are."""


@dataclass(frozen=True)
class Draw:
    """A split with its teacher."""

    number: int
    split: str
    teacher: Path

    def folder(self, work: Path, arm: str) -> Path:
        return work / "runs" / self.split / f"parts-{arm.replace(' ', '-')}"

    def dice(self, work: Path, arm: str) -> dict[str, float] | None:
        """Test Dice of every case, if an arm is finished."""
        return of_cases(self.folder(work, arm) / "student")


def options_of(draw: Draw, arm: str, options: argparse.Namespace) -> dict:
    """The options of an arm's job."""
    card, work = load_card(draw.teacher), options.work
    given = COMMON | {
        "dataset": options.store,
        "split": draw.split,
        "seed": draw.number,
        "tracking-uri": f"sqlite:///{work}/mlflow.db",
        "experiment": "spark-parts",
        "steps": options.steps,
        "method": "spark",
        "student": "enet",
        "teacher": card.network,
        "teacher-width": card.width,
        "teacher-checkpoint": draw.teacher,
        "unlabelled-share": 0.5,
        "cache": "on",
        "cache-folder": work / "teacher-cache",
    }
    return given | dict(text.split("=", 1) for text in options.set) | ARMS[arm]


def gradients(given: Mapping, steps: int) -> list[dict[str, float]]:
    """The norm of each loss term's gradient with respect to the student's parameters, and its cosine to that of the
    segmentation loss, at some of the first `steps` steps of a job with these options, without a cache."""
    o = parse(DistillOptions, as_options(given), "distill")
    store = open_store(o.dataset)
    spec = replace(o.slice_spec, task=",".join(store.task(o.task).regions))
    table = transfer_table(training_table(store, o), o)
    set_seed(o.seed)
    student = build_network(o.student, spec.channels, spec.classes, o.student_width)
    teacher, _ = SavedNetworks(tuple(o.teacher_checkpoint)).load()
    distiller = build_distiller(o.method, student.taps, teacher.taps, len(table), **o.weights)
    targets = TeacherTargets(teacher, distiller, None, nullcontext, predicts=table.unlabelled > 0)
    model, dataset = Distillation(student, distiller), SliceDataset(table, spec, views=o.slice_views)
    optimizer = torch.optim.Adam(model.parameters(), lr=o.lr)
    found = []
    for step, keys in zip(range(steps), batches(EpochSampler(o.order(table))), strict=False):
        batch = to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))
        terms = model(batch.image, *targets(batch), batch.index, batch.known)
        if step in LOOKED_AT:
            found.append({"step": step} | norms(terms, student))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return found


def batches(sampler: EpochSampler) -> Iterator[Sequence[int]]:
    """The keys of the batches of one epoch after another."""
    while True:
        yield from sampler
        sampler.epoch += 1


def norms(terms: Mapping[str, Tensor], student: nn.Module) -> dict[str, float]:
    """|∇| of each term with respect to the student's parameters, and the cosines `TERM·segmentation`."""
    parameters, of_term = list(student.parameters()), {}
    for name, term in terms.items():
        parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        of_term[name] = torch.cat([part.flatten() for part in parts])
    truth = of_term["segmentation"]
    found = {name: gradient.norm().item() for name, gradient in of_term.items()}
    cosines = {
        f"{name}·segmentation": torch.cosine_similarity(gradient, truth, dim=0).item()
        for name, gradient in of_term.items()
        if name != "segmentation"
    }
    return found | cosines


def report(draws: Sequence[Draw], options: argparse.Namespace) -> None:
    """results/spark_parts.md"""
    lines = [
        "# SPARK's parts, where few cases are labelled",
        "",
        f"`python -m benchmarks.spark_parts`: enet, {options.steps} steps, half of each batch without labels.",
        "Differences in points of test Dice with 95% intervals over draws and cases, of the draws in which both are.",
        "",
        "| arm | draws | test Dice | to spark | to soft |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        there = [found for draw in draws if (found := draw.dice(options.work, arm))]
        dice = f"{over_seeds(there)['mean']:.4f}" if there else "not run"
        to = [difference(draws, arm, other, options.work) for other in ("spark", "soft")]
        lines.append(f"| {arm} | {len(there)} | {dice} | {' | '.join(to)} |")
    for draw in draws:
        for arm in MEASURED:
            if (file := gradients_file(draw, arm, options.work)).exists():
                lines += ["", f"Gradients of the loss terms, `{arm}`, {draw.split}:", ""]
                lines += as_table(json.loads(file.read_text()))
    write_text(RESULTS / "spark_parts.md", "\n".join([*lines, ""]))


def difference(draws: Sequence[Draw], arm: str, other: str, work: Path) -> str:
    """An arm over another one, in points; nothing if no draw has both, or they are the same."""
    pairs = [(a, b) for draw in draws if (a := draw.dice(work, arm)) and (b := draw.dice(work, other))]
    if arm == other or not pairs:
        return ""
    found = difference_over_seeds(*map(list, zip(*pairs, strict=True)), paired=True)
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * found[key] for key in ("mean", "low", "high")))


def as_table(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Rows of the same keys in Markdown."""
    return [
        f"| {' | '.join(rows[0])} |",
        "|---" * len(rows[0]) + "|",
        *(f"| {' | '.join(f'{value:.3g}' for value in row.values())} |" for row in rows),
    ]


def gradients_file(draw: Draw, arm: str, work: Path) -> Path:
    return work / "gradients" / f"{draw.split}-{arm}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=lambda text: Path(text).absolute(), help="slice store")
    folder = "folder of the runs and MLflow's database"
    parser.add_argument("work", type=lambda text: Path(text).absolute(), help=folder)
    parser.add_argument("--draw", nargs=2, action="append", required=True, metavar=("SPLIT", "TEACHER"))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=3000, help="steps of the student (%(default)s)")
    parser.add_argument(
        "--gradients", type=int, default=0, help="steps over which gradients are measured (%(default)s)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of the jobs")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    options = parser.parse_args()
    draws = [Draw(n, split, Path(teacher).absolute()) for n, (split, teacher) in enumerate(options.draw)]
    if not options.report:
        begin(options.work)
        for draw in draws:
            for arm in MEASURED if options.gradients else ():
                if not (file := gradients_file(draw, arm, options.work)).exists():
                    found = gradients(options_of(draw, arm, options), options.gradients)
                    write_text(file, json.dumps(found, indent=1))
            for arm in options.arms:
                run = draw.folder(options.work, arm)
                run_job("distill", options_of(draw, arm, options), run, run / "student")
    report(draws, options)


if __name__ == "__main__":
    main()
