"""What is kept of a run: a network that others can load, and the state that a run goes on from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data_tools.errors import UserError

from .networks import build_network

FORMAT = "spark-dist network"


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


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """The state of a run: tensors and plain values."""
    write_atomically(path, lambda aside: torch.save(dict(state), aside))


def load_state(path: Path) -> dict[str, Any] | None:
    """The saved state of a run, or None if there is none yet."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: the saved state is damaged ({str(error).splitlines()[0][:120]}); "
            "remove it to begin this stage again"
        ) from None
