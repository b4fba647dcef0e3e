"""Everything particular to several processes, in one place."""

import gc
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from data_tools.errors import UserError
from data_tools.workers import STOP_SIGNALS

Result = TypeVar("Result")

DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
"""Running statistics are made equal where they are used, before an evaluation, rather than at every step."""
# The option's new name is unknown to all torch but the newest.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

_asked: list[int] = []
"""The signals to stop that have come."""


def listen_for_stop() -> None:
    """From now on, a signal to stop does not end the process but is looked at by `Pace`."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _asked.append(number))


class Pace:
    """Time to save and to stop; all processes agree on it after a step."""

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


def by_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """The result of what only the main process does, on all of them.

    A `UserError` is raised, and so said, by the main process alone; the others end.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as raised:
            error = raised
    result, failed = broadcast_object_list([result, error is not None])
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


def first_to_say(text: str) -> bool:
    """Whether no other process of the job has said this yet."""
    if not dist.is_initialized():
        # A mistake that all make before they form a group: the first process ends the others by its own end.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)
        return not _asked
    try:
        # The store behind the process group is what is left to agree by when processes fail on their own.
        return dist.distributed_c10d._get_default_store().add(f"spark-dist said {text}", 1) == 1
    except RuntimeError:
        return True


def lost_contact(error: Exception) -> str | None:
    """A line on an error that is but the consequence of what another process did; None for all others."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if re.search(r"timed out (after )?waiting|wait timeout|timeout caused pair closure", text, re.I):
        return (
            "another process has not answered for --timeout-minutes; see whether it is stopped or hangs, and the same "
            "command goes on from the last checkpoint"
        )
    ended = r"closed by peer|reset by peer|broken pipe|remote process exited|network error|socket timeout"
    if re.search(ended, text, re.I):
        return "another process has ended; its error comes before this line"
    return None


def make_accelerator(accumulate: int = 1, clip: float = 0.0, timeout: float = 30.0) -> Accelerator:
    """The process group that `accelerate launch` (or torchrun, or nobody) set up, and what the loop does with
    gradients: the parts that a batch is `accumulate`d of, and the norm that DeepSpeed clips them to. After `timeout`
    minutes of waiting for a process that is there but does not answer, the others end.

    Raises `UserError` if processes were started that do not know of each other, which would train as many separate
    networks, for more processes than GPUs, for fp16 on a CPU, which would silently train in float32, for FSDP, or if
    the launcher was told to accumulate.
    """
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if told not in ("1", str(accumulate)):
        raise UserError(
            f"the launcher's configuration says gradient_accumulation_steps {told}; use --accumulate {told}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        # Accelerate turns it on for accelerators only, so that it can't be tested without one.
        raise UserError("FSDP is not supported; use DDP (multi_gpu.yaml) or DeepSpeed ZeRO (deepspeed_zero2.yaml)")
    started = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if cuda and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count())
    # Naming the backend where there is a GPU would replace NCCL; `cpu=True` would turn DeepSpeed off.
    backend = {} if cuda else {"backend": "gloo"}
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout), **backend)
    if not cuda and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("fp16 needs a GPU; use --mixed-precision bf16 or no")
    join_again(group)
    accelerator = Accelerator(
        cpu=not cuda and not deepspeed,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[group, DistributedDataParallelKwargs(**DDP)] if started > 1 or deepspeed else [],
    )
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but they form a group of {accelerator.num_processes}; "
            "launch with: accelerate launch --config-file accelerate_config.yaml"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.mixed_precision != "no":
            raise UserError("with DeepSpeed, mixed_precision must be 'no'; use DDP (multi_gpu.yaml) for bf16 and fp16")
        accelerator.deepspeed_plugin.deepspeed_config.update(deepspeed_settings(accumulate, clip))
    return accelerator


def check_gpus(processes: int, gpus: int) -> None:
    """Raises `UserError` for more processes than GPUs on this machine, as NCCL takes one process on each."""
    if processes > gpus:
        raise UserError(
            f"{processes} processes on a machine with {gpus} GPU{'s' * (gpus != 1)}, and each needs one of its own; "
            f"launch with --num-processes {gpus}, or with ACCELERATE_USE_CPU=true on the CPU"
        )


def join_again(how: InitProcessGroupKwargs) -> None:
    """Form the group after the launcher's `--max-restarts` started the processes anew.

    Before that, the group that failed left its addresses in the launcher's store, which torchrun's static rendezvous
    keeps; the new one must not find them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=how.timeout))
    store = dist.PrefixStore(f"restart {restarts}", store)
    dist.init_process_group(how.backend, store=store, rank=rank, world_size=world, timeout=how.timeout)


def deepspeed_settings(accumulate: int, clip: float) -> dict[str, Any]:
    """Settings that the loop decides and DeepSpeed has to know."""
    return {
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,  # it would be 1
        "train_micro_batch_size_per_gpu": 1,  # only for its own metrics: batches come from our own sampler
        "zero_allow_untested_optimizer": True,
    }


class ZeroOptimizerState:
    """DeepSpeed's optimizer, of which each process has a part, as one that is saved and loaded whole."""

    PARTS = ("base_optimizer_state", "single_partition_of_fp32_groups")
    """Of its state what is tensors and plain values; the rest follows from the configuration."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, list]:
        """The parts of all processes."""
        state = self.optimizer.state_dict()
        return {"shards": gather_object([{key: state[key] for key in self.PARTS}])}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Take back this process's part. Raises `UserError` if there are more or fewer."""
        shards, rank, world = state["shards"], dist.get_rank(), dist.get_world_size()
        if len(shards) != world:
            raise UserError(f"a DeepSpeed job goes on with as many processes as it had, {len(shards)}, not {world}")
        self.optimizer.load_state_dict(
            [self.optimizer.state_dict() | shards[rank]] * world, load_from_fp32_weights=True
        )


def saveable(accelerator: Accelerator, optimizer):
    """The part of a prepared optimizer that goes into a checkpoint."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroOptimizerState(optimizer.optimizer)
    return optimizer


def shut_down(accelerator: Accelerator) -> None:
    """Leave the process group. Without this order, processes sometimes abort at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
