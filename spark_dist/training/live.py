"""A teacher that is trained along with its student."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from spark_dist.networks.checkpoint import ModelCard, load_card, save_network

from .tracking import Tracker
from .validation import Validate


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that trains at every step of its student's stage, with a folder and a run of its own."""

    network: nn.Module
    folder: Path
    card: ModelCard
    tracker: Tracker

    def validate(self, accelerator: Accelerator, validate: Validate, epoch: int, step: int) -> None:
        """Its metrics on the val cases after so many epochs and steps; the weights with the best Dice stay."""
        metrics = validate(self.network)
        self.tracker.metrics(metrics, step)
        if accelerator.is_main_process:
            best = self.folder / "best.safetensors"
            if not best.exists() or metrics["val/dice"] > load_card(best).val_dice:
                save_network(best, self.network, replace(self.card, epoch=epoch, val_dice=metrics["val/dice"]))
