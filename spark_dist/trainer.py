"""The loop of `train` and `distill`, read from top to bottom."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.utils.data import DataLoader

from data_tools.errors import UserError

from .checkpoint import load_state, load_weights, save_network, save_state
from .cli import Interrupted
from .config import TrainingOptions
from .data import ORIENTATIONS, Batch, EpochSampler, SliceTable, to_device
from .distillation import Distillation
from .progress import console, progress_bar
from .teacher_cache import TeacherTargets


def fit(
    accelerator: Accelerator,
    distillation: Distillation,
    teacher: TeacherTargets,
    loader: DataLoader,
    validate: Callable[[torch.nn.Module], dict[str, float]],
    options: TrainingOptions,
    epochs: int,
    folder: Path,
    description: dict[str, Any],
    tracker,
) -> None:
    """Train `distillation` for `epochs`, and leave the student of the best val Dice in folder/best.safetensors.

    `teacher(batch)` gives the distiller's targets. `validate(student)` gives figures of which `val/dice` decides. The
    run goes on from folder/state.pt if there is one, to the same weights as if it had never stopped.

    Raises `Interrupted` after a signal to stop, with the state saved; `UserError` if the loss is not finite.
    """
    sampler: EpochSampler = loader.batch_sampler
    table: SliceTable = loader.dataset.table
    optimizer = torch.optim.Adam(distillation.parameters(), lr=options.lr)
    model, optimizer = accelerator.prepare(distillation, optimizer)
    losses, stop = Losses(accelerator, table), StopSignal()
    state = {"epoch": 0, "step": 0, "best": -1.0, "losses": []}
    state |= resume(folder / "state.pt", distillation, optimizer)
    losses.epoch = state["losses"]
    done = state["epoch"] * sampler.steps + state["step"]
    with progress_bar(folder.name, epochs * sampler.steps, done, accelerator.is_main_process) as advance:
        for epoch in range(state["epoch"], epochs):
            lr = cosine(options.lr, options.lr_min, epoch / epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            sampler.epoch, sampler.start = epoch, state["step"]
            for step, raw in enumerate(loader, start=sampler.start):
                # Dropout and masks depend on where the run is, not on how it came here.
                torch.manual_seed(step_seed(options.seed, epoch, step, accelerator.process_index))
                batch = to_device(raw, options.task, accelerator.device)
                terms = model(batch.image, batch.mask, teacher(batch), batch.index)
                accelerator.backward(sum(terms.values()) * sampler.weight(step))
                optimizer.step()
                optimizer.zero_grad()
                losses.add(batch, terms, sampler.weight(step))
                last = step + 1 == sampler.steps
                if last or (step + 1) % options.log_every == 0:
                    means = losses.flush()
                    tracker.metrics({f"train/{k}": v for k, v in means.items()}, epoch * sampler.steps + step + 1)
                    stopping, due = stop.agreed(accelerator, options.checkpoint_minutes)
                    if not last and (stopping or due):
                        state |= {"epoch": epoch, "step": step + 1, "losses": losses.epoch}
                        checkpoint(accelerator, folder, state, distillation, optimizer, teacher)
                    if stopping and not last:
                        raise Interrupted(f"stopped as told after epoch {epoch + 1} step {step + 1}; resumes there")
                advance(f"epoch {epoch + 1}/{epochs} loss {losses.latest:.3f} best {max(state['best'], 0):.3f}")
            figures = {"lr": lr, "train/loss_epoch": losses.epoch_mean()}
            if (epoch + 1) % options.val_every == 0 or epoch + 1 == epochs:
                # Each process has seen other samples: the running statistics are those of the main process.
                broadcast(list(distillation.buffers()))
                figures |= validate(distillation.student)
                if figures["val/dice"] > state["best"]:
                    state["best"] = figures["val/dice"]
                    if accelerator.is_main_process:
                        facts = description | {"epoch": epoch + 1, "val_dice": state["best"]}
                        save_network(folder / "best.safetensors", distillation.student, facts)
            tracker.metrics(figures, (epoch + 1) * sampler.steps)
            if accelerator.is_main_process:
                shown = f", val Dice {figures['val/dice']:.4f}" if "val/dice" in figures else ""
                console.print(
                    f"{folder.name}: epoch {epoch + 1}/{epochs}, loss {figures['train/loss_epoch']:.4f}{shown}"
                )
            state |= {"epoch": epoch + 1, "step": 0, "losses": []}
            checkpoint(accelerator, folder, state, distillation, optimizer, teacher)
            if stopping:
                raise Interrupted(f"stopped as told after epoch {epoch + 1}; the same command goes on from there")


def cosine(start: float, end: float, part: float) -> float:
    """Cosine annealing from `start` to `end`, where `part` in [0, 1] of the run is over."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def step_seed(*place: int) -> int:
    """A seed for one step of one process."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def checkpoint(
    accelerator: Accelerator,
    folder: Path,
    state: dict[str, Any],
    distillation,
    optimizer,
    teacher: TeacherTargets,
) -> None:
    """Save everything that the rest of the run depends on."""
    teacher.flush()
    if accelerator.is_main_process:
        weights = {"model": distillation.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(folder / "state.pt", state | weights)
    accelerator.wait_for_everyone()


def resume(path: Path, distillation: Distillation, optimizer) -> dict[str, Any]:
    """Load weights and optimizer from a saved state, and return the rest of it; nothing if there is none."""
    state = load_state(path)
    if state is None:
        return {}
    load_weights(distillation, state.pop("model"), str(path))
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


class Losses:
    """Loss terms wait on the device until they are wanted, so that no step waits for the device."""

    def __init__(self, accelerator: Accelerator, table: SliceTable):
        self.accelerator, self.table = accelerator, table
        self.waiting: list[tuple[Batch, dict[str, Tensor], float]] = []
        self.latest = math.nan
        self.epoch: list[float] = []

    def add(self, batch: Batch, terms: dict[str, Tensor], weight: float) -> None:
        """Keep a step's terms; `weight` is this process's share (see `EpochSampler.weight`)."""
        self.waiting.append((batch.keys, {k: v.detach() for k, v in terms.items()}, weight))

    def flush(self) -> dict[str, float]:
        """Means over the steps since the last flush, of the global batch's terms and of their sum, `loss`.

        Raises `UserError` on every process if any of them is not finite, naming the slices of the first such batch.
        """
        local = torch.stack([torch.stack(list(terms.values())) * weight for _, terms, weight in self.waiting])
        steps = self.accelerator.reduce(local.float(), "mean").cpu()
        if not steps.isfinite().all():
            first = int((~steps.isfinite()).any(dim=1).nonzero()[0])
            keys, terms, _ = self.waiting[first]
            rows = sorted({int(key) // ORIENTATIONS for key in keys})
            raise UserError(
                "the loss is not finite ("
                + ", ".join(f"{name} {value:g}" for name, value in zip(terms, steps[first].tolist(), strict=True))
                + f") in the batch of {', '.join(self.table.name(row) for row in rows)}; "
                "look at these slices, or lower --lr or the method's weights"
            )
        names = list(self.waiting[0][1])
        self.epoch += steps.sum(dim=1).tolist()
        self.waiting = []
        means = dict(zip(names, steps.mean(dim=0).tolist(), strict=True))
        self.latest = sum(means.values())
        return means | {"loss": self.latest}

    def epoch_mean(self) -> float:
        """The mean loss over the steps since this was last asked for."""
        values, self.epoch = self.epoch, []
        return sum(values) / len(values)


class StopSignal:
    """SIGTERM and SIGUSR1 ask the job to stop; all processes agree on it after a step."""

    def __init__(self):
        self.asked = False
        self.saved = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def agreed(self, accelerator: Accelerator, minutes: float) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether the last checkpoint is `minutes` old."""
        due = accelerator.is_main_process and time.monotonic() - self.saved > 60 * minutes
        flags = torch.tensor([float(self.asked), float(due)], device=accelerator.device)
        stopping, due = (accelerator.reduce(flags, "sum") > 0).tolist()
        if due:
            self.saved = time.monotonic()
        return stopping, due
