"""The options that runs are told apart by when they are compared."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from spark_dist.config import DistillOptions, TrainingOptions
from spark_dist.evaluation.comparison import Choices

from .folder import MAY_DIFFER, plain

NOT_COMPARED = {*MAY_DIFFER, "dataset", "task", "split", "seed", "network", "width", "method", "weights", "teacher"}
NOT_COMPARED |= {"teacher_checkpoint", "teacher_width", "experiment", "sweep", "channels_last", "compile"}
"""Options that runs are known by in other ways, that name them or their files, or that results depend on by rounding
alone."""


def options_of(params: Mapping[str, str], distilled: bool) -> tuple[Choices, Choices]:
    """The options that a run's results depend on: those that any training has, and those of distilling alone. One that
    the run does not tell, as it came later, has its default."""
    defaults = {key: str(value) for key, value in plain(DistillOptions(dataset=Path(), task="organ")).items()}
    values = defaults | dict(params)
    values.pop("steps" if values["steps"] == "0" else "epochs")
    any_training = {part.name for part in fields(TrainingOptions)} - NOT_COMPARED
    distilling = defaults.keys() - any_training - NOT_COMPARED | {key for key in params if key.startswith("method.")}
    parts = (any_training, distilling if distilled else set())
    return tuple(tuple((key, values[key]) for key in sorted(names & values.keys())) for names in parts)
