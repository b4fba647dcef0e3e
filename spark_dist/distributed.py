"""What is particular to several processes, in one place."""

import gc
import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from data_tools.errors import UserError


def make_accelerator() -> Accelerator:
    """The process group that `accelerate launch` (or torchrun, or nobody) set up.

    Raises `UserError` if processes were started that do not know of each other, which would train as many separate
    networks, or for fp16 on a CPU, which would silently train in float32.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    # Naming the backend where there is a GPU would replace NCCL; `cpu=True` would turn DeepSpeed off.
    handlers = [] if cuda or started == 1 else [InitProcessGroupKwargs(backend="gloo")]
    if not cuda and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("fp16 needs a GPU; use --mixed_precision bf16 or no")
    accelerator = Accelerator(cpu=not cuda and not deepspeed, kwargs_handlers=handlers)
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but they form a group of {accelerator.num_processes}; "
            "launch with: accelerate launch --config_file accelerate_config.yaml"
        )
    return accelerator


def shut_down(accelerator: Accelerator) -> None:
    """Leave the process group. Without this order, processes sometimes abort at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
