"""A teacher that is trained along with its student."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from spark_dist.networks.checkpoint import ModelCard, load_card, save_network

from .job import Job
from .tracking import Tracker
from .validation import validation


@dataclass
class Beside:
    """A network that is trained along with the stage's own, with a folder, a model card and a run of its own."""

    network: nn.Module
    folder: Path
    card: ModelCard
    tracker: Tracker

    def __post_init__(self):
        best = self.folder / "best.safetensors"
        self.best = load_card(best).val_dice if best.exists() else -1.0

    def validation(self, job: Job) -> Callable[[nn.Module], dict[str, float]]:
        """Like the function `validation`, but both networks are looked at; this one's best is kept in its folder."""
        look = validation(job)

        def validate(network: nn.Module) -> dict[str, float]:
            own = look(self.network)
            if own["val/dice"] > self.best:
                self.best = own["val/dice"]
                if job.accelerator.is_main_process:
                    save_network(self.folder / "best.safetensors", self.network, replace(self.card, val_dice=self.best))
            return look(network) | {f"teacher/{key}": value for key, value in own.items()}

        return validate

    def tracking(self, tracker: Tracker) -> "Beside":
        """Takes the place of the stage's tracker in the loop: a teacher's figures go to the teacher's run."""
        self.stage = tracker
        return self

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        own = {key.removeprefix("teacher/"): v for key, v in values.items() if key.startswith("teacher/")}
        own |= {"train/loss": values["train/teacher"]} if "train/teacher" in values else {}
        if own:
            self.tracker.metrics(own, step)
        self.stage.metrics({key: v for key, v in values.items() if not key.startswith("teacher/")}, step)
