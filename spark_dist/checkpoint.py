"""What is kept of a run: a network that others can load, and the state that a run goes on from."""

import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data_tools.errors import UserError

from .networks import build_network

log = logging.getLogger(__name__)

FORMAT = "spark-dist network"
UMASK = os.umask(0)
os.umask(UMASK)


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path), make it durable, and only then give it its name.

    Raises `UserError` if it can't be written, for instance on a full disk; what was there before is left as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read.
        aside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path}: can't be written ({reason}); make room, and run the same command again") from None
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small text file, whole or not at all."""
    write_atomically(path, lambda aside: aside.write_text(text))


def save_network(path: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Weights of a network, with what is needed to build it again: at least `network` and `width`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    metadata = {"format": FORMAT, "description": json.dumps(dict(description))}
    write_atomically(path, lambda aside: save_file(tensors, aside, metadata=metadata))


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A saved network and its description.

    Raises `UserError` if the file is missing, damaged or not one of this program's, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the best.safetensors of a training job")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); copy it again or train again") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a network saved by spark-dist (its metadata lack the format '{FORMAT}')")
    description = json.loads(metadata["description"])
    network = build_network(description["network"], width=description["width"])
    load_weights(network, tensors, f"{path} ({description['network']}, width {description['width']:g})")
    return network, description


def load_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Load a state dict whole. Raises `UserError` naming the first keys that differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        differing = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise UserError(f"{what}: the weights belong to another network ({differing[:300]})") from None


def save_state(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> None:
    """The state of a run after so many steps: tensors and plain values. The latest `keep` states stay."""
    write_atomically(folder / f"step-{step:09}.pt", lambda aside: torch.save(dict(state), aside))
    for path in states(folder)[:-keep]:
        path.unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """The saved states of a run, the oldest first."""
    return sorted(folder.glob("step-*.pt"))


def newest_state(folder: Path) -> Path | None:
    """The newest state that is whole, or None if none was ever saved. A damaged one is renamed, with a warning.

    Raises `UserError` if all are damaged.
    """
    for unfinished in folder.glob(".step-*.tmp"):
        unfinished.unlink()
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
    """What is wrong with a saved state. torch reads its zip archive without looking at the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return broken and f"wrong checksum of {broken}"
    except Exception as error:  # zipfile's errors are of many kinds
        return str(error)


def load_state(path: Path) -> dict[str, Any]:
    """A saved state. Nothing in it is unpickled that is not a tensor or a plain value."""
    return torch.load(path, map_location="cpu", weights_only=True)
