"""What is particular to several processes, in one place."""

import gc
import os
import re
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from data_tools.errors import UserError

from .data import STOP_SIGNALS

_asked: list[int] = []
"""The signals to stop that have come."""


def listen_for_stop() -> None:
    """From now on, a signal to stop does not end the process but is looked at by `Pace`."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _asked.append(number))


class Pace:
    """When to save and when to stop; all processes agree on it after a step."""

    def __init__(self, accelerator: Accelerator, minutes: float, steps: int, done: int):
        """A checkpoint is due when the last one, now at step `done`, is `minutes` or `steps` (0: any number) old."""
        self.accelerator, self.minutes, self.steps = accelerator, minutes, steps
        self.saved = time.monotonic(), done

    def look(self, step: int) -> tuple[bool, bool]:
        """After `step` steps: whether any process was asked to stop, and whether a checkpoint is due."""
        now, (when, at) = time.monotonic(), self.saved
        due = now - when > 60 * self.minutes or 0 < self.steps <= step - at
        flags = torch.tensor([len(_asked), due and self.accelerator.is_main_process], dtype=torch.float32)
        flags = self.accelerator.reduce(flags.to(self.accelerator.device), "sum") > 0
        stopping, due = flags.tolist()
        if due:
            self.saved = now, step
        return stopping, due


def first_to_say(text: str) -> bool:
    """Whether no other process of the job has said this yet. Before they form a group, the first speaks."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        # The store behind the process group is what is left to agree by when processes fail on their own.
        return dist.distributed_c10d._get_default_store().add(f"spark-dist said {text}", 1) == 1
    except RuntimeError:
        return True


def lost_contact(error: Exception) -> bool:
    """Whether an error is but the consequence of another process's end."""
    ended = r"closed by peer|reset by peer|broken pipe|remote process exited|network error|socket timeout"
    return dist.is_initialized() and isinstance(error, RuntimeError) and bool(re.search(ended, str(error), re.I))


def make_accelerator(accumulate: int = 1, clip: float = 0.0, timeout: float = 30.0) -> Accelerator:
    """The process group that `accelerate launch` (or torchrun, or nobody) set up, and what the loop does with
    gradients: the parts that a batch is `accumulate`d of, and the norm that DeepSpeed clips them to. After `timeout`
    minutes of waiting for a process that is there but does not answer, the others end.

    Raises `UserError` if processes were started that do not know of each other, which would train as many separate
    networks, for fp16 on a CPU, which would silently train in float32, or if the launcher was told to accumulate.
    """
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if told not in ("1", str(accumulate)):
        raise UserError(
            f"the launcher's configuration says gradient_accumulation_steps {told}; use --accumulate {told}"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    # Naming the backend where there is a GPU would replace NCCL; `cpu=True` would turn DeepSpeed off.
    backend = {} if cuda else {"backend": "gloo"}
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout), **backend)]
    if not cuda and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("fp16 needs a GPU; use --mixed_precision bf16 or no")
    accelerator = Accelerator(
        cpu=not cuda and not deepspeed,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=handlers if started > 1 or deepspeed else [],
    )
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but they form a group of {accelerator.num_processes}; "
            "launch with: accelerate launch --config_file accelerate_config.yaml"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(accelerator, accumulate, clip)
    return accelerator


def configure_deepspeed(accelerator: Accelerator, accumulate: int, clip: float) -> None:
    """Settings that DeepSpeed has a say in, made those of the loop."""
    accelerator.deepspeed_plugin.deepspeed_config.update(
        gradient_accumulation_steps=accumulate,
        gradient_clipping=clip,  # it would be 1
        train_micro_batch_size_per_gpu=1,  # only for its own figures: batches come from our own sampler
        zero_allow_untested_optimizer=True,
    )


def shut_down(accelerator: Accelerator) -> None:
    """Leave the process group. Without this order, processes sometimes abort at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
