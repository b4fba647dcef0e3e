"""Whether distilling helped, as the run of a job says it: the student beside its teacher and the student alone."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from data_tools.errors import UserError
from data_tools.ownership import owned
from spark_dist.evaluation.comparison import Choices, differing, options_text
from spark_dist.evaluation.intervals import paired_difference, summarise
from spark_dist.evaluation.metrics import read_cases
from spark_dist.networks.checkpoint import ModelCard, load_card

from .compared_options import options_of
from .distributed import by_main
from .job import Job
from .journal import finished
from .validation import log_table

ENDS = {"": "mean", "_low": "low", "_high": "high"}
"""How the metrics of an interval end."""
OF_THE_TEACHER = ("teacher", "predicted")
"""What a job's folder knows of its data that a student alone has no part in."""


def log_outcome(job: Job) -> None:
    """Log the difference of a job's student to the student alone on the test cases, where a job beside this one has
    trained that, and a description of the job's run that says it."""

    def say() -> str:
        try:
            return outcome(job)
        except UserError as error:  # a job that is done does not fail by what became of its files since
            return f"warning: not compared with the student alone: {error}"

    if line := by_main(job.accelerator, say):
        job.say(line)


def outcome(job: Job) -> str:
    """Log it, and return a line for people; "" where there is no student alone."""
    student = job.folder / "student"
    card, dice = load_card(student / "best.safetensors"), test_dice(student)
    beside, alone = student_alone(job.folder, card)
    rows, text, line = {}, "", ""
    if (job.folder / "teacher" / "test_cases.json").exists():
        rows["teacher"] = test_dice(job.folder / "teacher")
    if beside:
        rows["student alone"] = alone
        found = paired_difference(dice, alone)
        values = {f"student/difference_to_alone{end}": found[key] for end, key in ENDS.items()}
        job.tracker.metrics(values, step=0)
        job.tracker.tags({"student_alone": str(beside.parent)})
        text = "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found)
        line = f"student: {text} in test Dice to the student alone in {beside.parent}"
        if other := options_text(unlike(job.folder, beside.parent), options_in(beside.parent)):
            line, text = f"{line}, which has other options: {other}", f"{text}, that one having other options: {other}"
    rows[f"student, {card.method}"] = dice
    job.tracker.tags({"mlflow.note.content": description(rows, text)})
    log_table(job.tracker, student)  # beside that of a student alone, which has no run above it
    return line


def student_alone(folder: Path, card: ModelCard) -> tuple[Path | None, dict[str, float]]:
    """The stage of a finished job in a folder beside this one that trained the same network without a teacher, with
    its Dice of each test case: same data, split, task, width and seed; of several, the one whose options differ in the
    fewest, and of these the latest."""
    data, found = data_of(folder), []
    for stage in [file.parent for file in folder.resolve().parent.glob("*/network/test_cases.json")]:
        try:
            other, dice = load_card(stage / "best.safetensors"), test_dice(stage)
            distance = len(unlike(folder, stage.parent))
        except UserError:  # not this job's files
            continue
        if data_of(stage.parent) == data and kind(other) == kind(card) and finished(stage):
            found.append((distance, -(stage / "test_cases.json").stat().st_mtime, stage, dice))
    return min(found)[2:] if found else (None, {})


def unlike(folder: Path, other: Path) -> set[str]:
    """The names of the options of training in which two jobs differ."""
    return differing(options_in(folder), options_in(other))


def options_in(folder: Path) -> Choices:
    """A job's options of training, as its folder has them. Raises `UserError` if they can't be read."""
    file = folder / "config.yaml"
    try:
        options = yaml.safe_load(file.read_text())
        return options_of({key: str(value) for key, value in options.items()}, distilled=False)[0]
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        raise UserError(f"{file}: not the options of a job") from None


def kind(card: ModelCard) -> tuple:
    """All that a student alone has in common with one distilled."""
    return card.network, card.width, card.seed, card.split, card.spec.task


def data_of(folder: Path) -> dict | None:
    """Hashes of the cases of a job's split, by part and name."""
    data = (owned(folder, "job") or {}).get("data")
    return {k: v for k, v in data.items() if k not in OF_THE_TEACHER} if isinstance(data, dict) else None


def test_dice(stage: Path) -> dict[str, float]:
    """A stage's Dice of each test case."""
    return {case: metrics["dice"] for case, metrics in read_cases(stage / "test_cases.json").items()}


def description(rows: Mapping[str, Mapping[str, float]], difference: str) -> str:
    """Markdown on the Dice of each network, and on the difference of the student to the student alone."""
    lines = ["| | test Dice | 95% interval |", "|---|---|---|"]
    for name, dice in rows.items():
        found = summarise(list(dice.values()))
        lines.append("| {} | {mean:.4f} | {low:.4f} to {high:.4f} |".format(name, **found))
    last = (
        f"Distilled less alone, paired by case: **{difference}**. An interval over one seed says nothing of another."
        if difference
        else "No job beside this one has trained the student alone with the same data and seed; train it, and the same "
        "command adds the difference."
    )
    return "\n".join([*lines, "", last])
