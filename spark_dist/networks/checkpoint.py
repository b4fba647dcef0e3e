"""A trained network in a file that others can load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_tools.errors import UserError
from data_tools.files import write_atomically

from . import build_network

FORMAT = "spark-dist network"


def save_network(path: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Weights of a network, with what is needed to build it again: at least `network` and `width`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    metadata = {"format": FORMAT, "description": json.dumps(dict(description))}

    def write(aside: Path) -> None:
        try:
            save_file(tensors, aside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_atomically(path, write)


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


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict whole. Raises `UserError` naming the first keys that differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        differing = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise UserError(f"{what}: the weights belong to another network ({differing[:300]})") from None
