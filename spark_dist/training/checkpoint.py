"""The state that a run goes on from."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from data_tools.errors import UserError
from data_tools.files import unfinished, write_atomically
from spark_dist.networks.checkpoint import load_weights

PARTS = {"epoch": int, "step": int, "best": float, "losses": list, "model": dict, "optimizer": dict, "processes": int}
"""The parts of every saved state, and their types."""
STATE = f"step-{'[0-9]' * 9}.pt"
"""The names of saved states, as a pattern: a copy that somebody keeps beside them has another."""

log = logging.getLogger(__name__)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, place: Mapping[str, Any], parts: Mapping[str, Any], keep: int
) -> None:
    """Save everything that the rest of a stage depends on: what the objects in `parts` hold, and where the run is.

    Random numbers are no part of it: they follow from the seed, the epoch, the step and the process.
    """
    tensors = {name: part.state_dict() for name, part in parts.items() if part is not None}
    if accelerator.is_main_process:
        how = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
        save_state(folder / "checkpoints", step, place | tensors | how, keep)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Give the objects in `parts` what a stage's newest whole checkpoint holds, and return the rest of it, the place in
    the run; nothing if there is none."""
    (path,) = broadcast_object_list([newest_state(folder / "checkpoints") if accelerator.is_main_process else None])
    if path is None:
        return {}
    state, precision = load_state(path), accelerator.mixed_precision
    if accelerator.scaler is None or "scaler" not in state:
        # Only fp16 has one, and a job may go on in another precision.
        parts = {name: part for name, part in parts.items() if name != "scaler"}
        state.pop("scaler", None)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
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


def epochs_done(accelerator: Accelerator, folder: Path) -> int:
    """The whole epochs that a stage has behind it, by its newest saved state."""
    done = 0
    if accelerator.is_main_process and (path := newest_state(folder / "checkpoints")):
        done = load_state(path)["epoch"]
    return broadcast_object_list([done])[0]


def save_state(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> None:
    """The state of a run after so many steps: tensors and plain values. The latest `keep` states stay."""
    write_atomically(folder / f"step-{step:09}.pt", lambda aside: torch.save(dict(state), aside))
    for path in states(folder)[:-keep]:
        path.unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """The saved states of a run, the oldest first."""
    return sorted(folder.glob(STATE))


def newest_state(folder: Path) -> Path | None:
    """The newest state that is whole, or None if none was ever saved. A damaged one is renamed, with a warning.

    Raises `UserError` if all are damaged.
    """
    for left in unfinished(folder, STATE):  # nobody else works in this job's folder
        left.unlink()
    damaged = []
    for path in reversed(states(folder)):
        if (damage := damage_of(path)) is None:
            for other in damaged:
                other.replace(other.with_suffix(".damaged"))
            return path
        damaged.append(path)
        log.warning("%s: the saved state is damaged (%s); it is passed over", path, damage)
    if damaged:
        raise UserError(f"{folder}: every saved state is damaged; remove this folder to begin the stage again")
    return None


def damage_of(path: Path) -> str | None:
    """The damage to a saved state, or None. torch reads its zip archive without looking at the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return broken and f"wrong checksum of {broken}"
    except Exception as error:  # zipfile's errors are of many kinds
        return str(error)


def load_state(path: Path) -> dict[str, Any]:
    """A saved state. Nothing in it is unpickled that is not a tensor or a plain value.

    Raises `UserError` for a file that holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [key for key, kind in PARTS.items() if not isinstance(state[key], kind)]
    except Exception as error:  # torch's errors are of many kinds
        raise other_state(path, error) from None
    if wrong:
        raise other_state(path, f"wrong {', '.join(wrong)}")
    return state


def load_part(part: Any, state: Any, path: Path) -> None:
    """Give an optimizer, or what else has a state, what was saved of it. Raises `UserError` if it is another one's."""
    try:
        part.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # they are not made to be given something else
        raise other_state(path, error) from None


def other_state(path: Path, why: Any) -> UserError:
    """The error for a file that does not hold what this job saved."""
    return UserError(
        f"{path}: holds no state of this job ({str(why).strip().splitlines()[0][:160]}); remove the file, and the job "
        "goes on from the one before"
    )
