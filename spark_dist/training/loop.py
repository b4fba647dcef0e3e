"""The loop of `train` and `distill`, read from top to bottom."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_tools.errors import Interrupted, UserError
from data_tools.progress import console, progress_bar
from spark_dist.config import TrainingOptions
from spark_dist.data.batches import Batch, SliceDataset, to_device
from spark_dist.data.loader import Prefetcher
from spark_dist.networks.checkpoint import ModelCard, save_network
from spark_dist.teacher.targets import ForeignTargets, TeacherTargets

from .checkpoint import resume, save_checkpoint
from .distillation import Distillation
from .distributed import Pace, saveable
from .live import LiveTeacher
from .tracking import Tracker
from .validation import Validate


@dataclass(frozen=True)
class Teaching:
    """A student with its distiller, and the teacher behind it."""

    distillation: Distillation
    targets: TeacherTargets | ForeignTargets
    """The frozen teacher's targets for a batch; none where it trains, or there is no teacher."""
    live_teacher: LiveTeacher | None = None


@dataclass(frozen=True)
class StageRun:
    """Settings of a stage: how its network trains, for how long, and where its results go."""

    options: TrainingOptions
    epochs: int
    """Epochs of the learning rate's schedule."""
    stop_epoch: int
    """The epoch to stop after, for now."""
    folder: Path
    card: ModelCard
    tracker: Tracker
    draw: Callable[[torch.nn.Module], np.ndarray]
    """From a network to a picture of its predictions, (H, W, 3) uint8."""


def fit(accelerator: Accelerator, teaching: Teaching, loader: Prefetcher, validate: Validate, run: StageRun) -> None:
    """Train until `run.stop_epoch` is over, and leave the student of the best val Dice in folder/best.safetensors.

    The run goes on from the newest whole state in folder/checkpoints, to the same weights as if it had never stopped.

    Raises `Interrupted` after a signal to stop, with the state saved; `UserError` if the loss is not finite.
    """
    options, distillation, sampler = run.options, teaching.distillation, loader.batch_sampler
    optimizer = torch.optim.Adam(distillation.parameters(), lr=options.lr, fused=True)
    model, optimizer = accelerator.prepare(distillation, optimizer)
    average = moving_average(distillation.student, options.ema)
    student = average.module if average else distillation.student
    saved = {"model": distillation, "optimizer": saveable(accelerator, optimizer)}
    saved |= {"average": average, "scaler": accelerator.scaler}
    state = {"epoch": 0, "step": 0, "best": -1.0, "losses": []} | resume(accelerator, run.folder, saved)
    done, total = state["epoch"] * sampler.steps + state["step"], run.epochs * sampler.steps
    losses = Losses(accelerator, loader.dataset, sampler.accumulate, state["losses"])
    pace = Pace(accelerator, options.checkpoint_minutes, options.checkpoint_steps, done)
    with progress_bar(run.folder.name, total, done, accelerator.is_main_process) as advance:
        model.train()
        begun, from_step = time.monotonic(), done
        for epoch, part, raw in parts_of_batches(loader, state["epoch"], state["step"], run.stop_epoch):
            lr = cosine(*options.learning_rates, epoch / run.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout and masks depend on where the run is, not on how it came here.
            torch.manual_seed(step_seed(options.seed, epoch, part, accelerator.process_index))
            batch = to_device(raw, loader.dataset, accelerator.device)
            with accelerator.accumulate(model):
                terms = model(batch.image, *teaching.targets(batch), batch.index, batch.known)
                terms = distillation.scheduled(terms, epoch * sampler.steps + part // sampler.accumulate, total)
                accelerator.backward(sum(terms.values()) * sampler.weight(part))
                if options.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(distillation.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad()
            losses.add(batch, terms, sampler.weight(part))
            step, parts_left = divmod(part + 1, sampler.accumulate)
            if parts_left:
                continue
            if average:
                average.update_parameters(distillation.student)
            advance(f"epoch {epoch + 1}/{run.epochs} loss {losses.latest:.3f} best {max(state['best'], 0):.3f}")
            done, epoch_over = epoch * sampler.steps + step, step == sampler.steps
            if not epoch_over and step % options.log_every:
                continue
            metrics = {f"train/{name}": value for name, value in losses.flush().items()}
            if teaching.live_teacher:
                teaching.live_teacher.tracker.metrics({"train/loss": metrics["train/teacher"]}, done)
            state |= {"epoch": epoch, "step": step, "losses": losses.epoch}
            if epoch_over:
                metrics |= {"lr": lr, "train/loss_epoch": losses.epoch_mean()}
                metrics |= speed(time.monotonic() - begun, done - from_step, sampler.steps, options.batch_size)
                state |= {"epoch": epoch + 1, "step": 0, "losses": losses.epoch}
            if epoch_over and (options.validates(epoch, sampler.steps) or epoch + 1 == run.stop_epoch):
                # Each process has seen other samples: the running statistics are those of the main process.
                broadcast([*distillation.buffers(), *student.buffers()])
                if teaching.live_teacher:
                    teaching.live_teacher.validate(accelerator, validate, epoch + 1, done)
                metrics |= validate(student)
                if accelerator.is_main_process and options.draws(epoch, sampler.steps):
                    run.tracker.image("val_predictions", run.draw(student), done)
                best, state["best"] = state["best"], max(state["best"], metrics["val/dice"])
                if state["best"] > best and accelerator.is_main_process:
                    card = replace(run.card, epoch=epoch + 1, val_dice=state["best"])
                    save_network(run.folder / "best.safetensors", student, card)
                model.train()
            run.tracker.metrics(metrics, done)
            if epoch_over:
                begun, from_step = time.monotonic(), done
            if epoch_over and accelerator.is_main_process:
                console.print(epoch_line(run, epoch, metrics))
            stopping, due = pace.look(done)
            if epoch_over or stopping or due:
                teaching.targets.flush()
                save_checkpoint(accelerator, run.folder, done, state, saved, options.keep_checkpoints)
            if stopping:
                place = f"epoch {epoch + 1}" if epoch_over else f"epoch {epoch + 1} step {step}"
                raise Interrupted(f"stopped as told after {place}; the same command goes on from there")


def parts_of_batches(
    loader: Prefetcher, epoch: int, step: int, stop_epoch: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The batches from a step of an epoch to the end of epoch `stop_epoch`, in the parts that they are accumulated of:
    epoch, part's position in it, and part."""
    sampler = loader.batch_sampler
    for current in range(epoch, stop_epoch):
        sampler.epoch, sampler.start = current, step if current == epoch else 0
        for part, raw in enumerate(loader, start=sampler.start * sampler.accumulate):
            yield current, part, raw


def speed(seconds: float, steps: int, epoch_steps: int, batch_size: int) -> dict[str, float]:
    """Speed of training, without validation, by the steps that this process took of an epoch."""
    return {
        "speed/epoch_seconds": seconds * epoch_steps / steps,
        "speed/slices_per_second": steps * batch_size / seconds,
    }


def epoch_line(run: StageRun, epoch: int, metrics: Mapping[str, float]) -> str:
    """An epoch for people."""
    found = f", val Dice {metrics['val/dice']:.4f}" if "val/dice" in metrics else ""
    return f"{run.folder.name}: epoch {epoch + 1}/{run.epochs}, loss {metrics['train/loss_epoch']:.4f}{found}"


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
