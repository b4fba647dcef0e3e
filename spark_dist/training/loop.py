"""The loop of `train` and `distill`, read from top to bottom."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_tools.errors import Interrupted, UserError
from data_tools.progress import console, progress_bar
from spark_dist.config import TrainingOptions
from spark_dist.data.batches import Batch, SliceDataset, to_device
from spark_dist.data.loader import Prefetcher
from spark_dist.data.order import EpochSampler
from spark_dist.networks.checkpoint import ModelCard, load_weights, save_network
from spark_dist.teacher.targets import TeacherTargets

from .checkpoint import load_part, load_state, newest_state, save_state
from .distillation import Distillation
from .distributed import Pace, saveable


def fit(
    accelerator: Accelerator,
    distillation: Distillation,
    teacher: TeacherTargets,
    loader: Prefetcher,
    validate: Callable[[torch.nn.Module], dict[str, float]],
    options: TrainingOptions,
    epochs: int,
    until: int,
    folder: Path,
    card: ModelCard,
    tracker,
) -> None:
    """Train until `until` of `epochs` are over, and leave the student of the best val Dice in folder/best.safetensors.

    `teacher(batch)` gives the distiller's targets. `validate(student)` gives figures of which `val/dice` decides. The
    run goes on from the newest whole state in folder/checkpoints, to the same weights as if it had never stopped.

    Raises `Interrupted` after a signal to stop, with the state saved; `UserError` if the loss is not finite.
    """
    sampler: EpochSampler = loader.batch_sampler
    optimizer = torch.optim.Adam(distillation.parameters(), lr=options.lr, fused=True)
    model, optimizer = accelerator.prepare(distillation, optimizer)
    average = moving_average(distillation.student, options.ema)
    student = average.module if average else distillation.student
    state_of_optimizer, scaler = saveable(accelerator, optimizer), accelerator.scaler
    saved = {"model": distillation, "optimizer": state_of_optimizer, "average": average, "scaler": scaler}
    state = {"epoch": 0, "step": 0, "best": -1.0, "losses": []} | resume(accelerator, folder, saved)
    done = state["epoch"] * sampler.steps + state["step"]
    losses = Losses(accelerator, loader.dataset, sampler.accumulate, state["losses"])
    pace = Pace(accelerator, options.checkpoint_minutes, options.checkpoint_steps, done)
    with progress_bar(folder.name, epochs * sampler.steps, done, accelerator.is_main_process) as advance:
        for epoch in range(state["epoch"], until):
            lr = cosine(*options.learning_rates, epoch / epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            sampler.epoch, sampler.start = epoch, state["step"]
            for part, raw in enumerate(loader, start=sampler.start * sampler.accumulate):
                # Dropout and masks depend on where the run is, not on how it came here.
                torch.manual_seed(step_seed(options.seed, epoch, part, accelerator.process_index))
                batch = to_device(raw, loader.dataset, accelerator.device)
                with accelerator.accumulate(model):
                    terms = model(batch.image, *teacher(batch), batch.index, batch.known)
                    accelerator.backward(sum(terms.values()) * sampler.weight(part))
                    if options.clip and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(distillation.parameters(), options.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.add(batch, terms, sampler.weight(part))
                step, left = divmod(part + 1, sampler.accumulate)
                if left:
                    continue
                if average:
                    average.update_parameters(distillation.student)
                if step == sampler.steps or step % options.log_every == 0:
                    done = epoch * sampler.steps + step
                    tracker.metrics({f"train/{k}": v for k, v in losses.flush().items()}, done)
                    stopping, due = pace.look(done)
                    if step < sampler.steps and (stopping or due):
                        state |= {"epoch": epoch, "step": step, "losses": losses.epoch}
                        checkpoint(accelerator, folder, done, state, saved, teacher, options.keep_checkpoints)
                    if step < sampler.steps and stopping:
                        raise Interrupted(f"stopped as told after epoch {epoch + 1} step {step}; resumes there")
                advance(f"epoch {epoch + 1}/{epochs} loss {losses.latest:.3f} best {max(state['best'], 0):.3f}")
            figures = {"lr": lr, "train/loss_epoch": losses.epoch_mean()}
            if options.validates(epoch, sampler.steps) or epoch + 1 == until:
                # Each process has seen other samples: the running statistics are those of the main process.
                broadcast([*distillation.buffers(), *student.buffers()])
                figures |= validate(student)
                if figures["val/dice"] > state["best"]:
                    state["best"] = figures["val/dice"]
                    if accelerator.is_main_process:
                        found = replace(card, epoch=epoch + 1, val_dice=state["best"])
                        save_network(folder / "best.safetensors", student, found)
            tracker.metrics(figures, done)
            if accelerator.is_main_process:
                shown = f", val Dice {figures['val/dice']:.4f}" if "val/dice" in figures else ""
                console.print(
                    f"{folder.name}: epoch {epoch + 1}/{epochs}, loss {figures['train/loss_epoch']:.4f}{shown}"
                )
            state |= {"epoch": epoch + 1, "step": 0, "losses": []}
            checkpoint(accelerator, folder, done, state, saved, teacher, options.keep_checkpoints)
            if pace.look(done)[0]:
                raise Interrupted(f"stopped as told after epoch {epoch + 1}; the same command goes on from there")


def cosine(start: float, end: float, part: float) -> float:
    """Cosine annealing from `start` to `end`, where `part` in [0, 1] of the run is over."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def step_seed(*place: int) -> int:
    """A seed for one step of one process."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def moving_average(student: torch.nn.Module, decay: float) -> AveragedModel | None:
    """A copy of the student that follows it, weights and running statistics; nothing for a decay of 0."""
    if not decay:
        return None
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval()


def checkpoint(
    accelerator: Accelerator,
    folder: Path,
    done: int,
    state: dict[str, Any],
    saved: dict[str, Any],
    teacher: TeacherTargets,
    keep: int,
) -> None:
    """Save everything that the rest of the run depends on: what the objects in `saved` hold, and where the run is.

    Random numbers are no part of it: they follow from the seed, the epoch, the step and the process.
    """
    teacher.flush()
    tensors = {name: part.state_dict() for name, part in saved.items() if part is not None}
    if accelerator.is_main_process:
        how = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
        save_state(folder / "checkpoints", done, state | tensors | how, keep)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Give the objects in `saved` what the newest whole checkpoint holds, and return the rest of it; nothing if there
    is none."""
    (path,) = broadcast_object_list([newest_state(folder / "checkpoints") if accelerator.is_main_process else None])
    if path is None:
        return {}
    state, precision = load_state(path), accelerator.mixed_precision
    if accelerator.scaler is None or "scaler" not in state:
        # Only fp16 has one, and a job may go on in another precision.
        saved = {name: part for name, part in saved.items() if name != "scaler"}
        state.pop("scaler", None)
    for name, part in saved.items():
        if isinstance(part, torch.nn.Module):
            load_weights(part, state.pop(name), str(path))
        elif part is not None:
            load_part(part, state.pop(name), path)
    before, now = state.pop("precision", precision), precision
    if before != now:
        accelerator.print(f"{folder.name}: goes on with mixed precision {now} instead of {before}")
    before, now = state.pop("processes"), accelerator.num_processes
    if before != now:
        accelerator.print(
            f"{folder.name}: goes on with {now} processes instead of {before} and the same slices in each batch, "
            "but sums are rounded in another order, so that the weights are not the same to the bit"
        )
    return state


class Losses:
    """Loss terms wait on the device until they are wanted, so that no step waits for the device."""

    def __init__(self, accelerator: Accelerator, dataset: SliceDataset, accumulate: int, epoch: list[float]):
        """`epoch` holds the losses of the epoch's steps so far."""
        self.accelerator, self.dataset, self.accumulate, self.epoch = accelerator, dataset, accumulate, epoch
        self.waiting: list[tuple[Batch, dict[str, Tensor], float]] = []
        self.latest = math.nan

    def add(self, batch: Batch, terms: dict[str, Tensor], weight: float) -> None:
        """Keep the terms of a batch's part; `weight` is this process's share (see `EpochSampler.weight`)."""
        self.waiting.append((batch.keys, {k: v.detach() for k, v in terms.items()}, weight))

    def flush(self) -> dict[str, float]:
        """Means over the steps since the last flush, of the global batch's terms and of their sum, `loss`.

        Raises `UserError` on every process if any of them is not finite, naming the slices of the first such batch.
        """
        local = torch.stack([torch.stack(list(terms.values())) * weight for _, terms, weight in self.waiting])
        parts = self.accelerator.reduce(local.float(), "mean").cpu()
        names = list(self.waiting[0][1])
        if not parts.isfinite().all():
            self.complain(names, parts, local.cpu())
        steps = parts.unflatten(0, (-1, self.accumulate)).mean(dim=1)
        self.epoch += steps.sum(dim=1).tolist()
        self.waiting = []
        means = dict(zip(names, steps.mean(dim=0).tolist(), strict=True))
        self.latest = sum(means.values())
        return means | {"loss": self.latest}

    def complain(self, names: list[str], parts: Tensor, local: Tensor) -> NoReturn:
        """Name the slices of the first batch whose loss is not finite, on whichever process they were."""
        first = int((~parts.isfinite()).any(dim=1).nonzero()[0])
        keys = [] if local[first].isfinite().all() else self.waiting[first][0]
        rows = sorted({int(key) // self.dataset.views.count for part in gather_object([keys]) for key in part})
        raise UserError(
            "the loss is not finite ("
            + ", ".join(f"{name} {value:g}" for name, value in zip(names, parts[first].tolist(), strict=True))
            + f") in the batch of {', '.join(self.dataset.table.name(row) for row in rows)}; "
            "look at these slices, or lower --lr or the method's weights"
        )

    def epoch_mean(self) -> float:
        """The mean loss over the steps since this was last asked for."""
        values, self.epoch = self.epoch, []
        return sum(values) / len(values)
