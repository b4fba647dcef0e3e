"""A trained network in a file that others can load."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_tools.errors import UserError, unknown_name
from data_tools.files import write_atomically
from data_tools.labels import NAME
from data_tools.preparation import Preparation
from spark_dist.data.views import SliceSpec

from . import NETWORKS, build_network

FORMAT = "spark-dist network"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The facts saved beside a network's weights: what builds it again, what it was trained for and on, how well."""

    network: str
    """Name in `NETWORKS`."""
    width: PositiveFloat
    """Factor on the network's number of filters."""
    classes: PositiveInt = 2
    """The background, and one for each region of `spec`."""
    in_channels: PositiveInt = 1
    method: str = "none"
    """The distillation method that it was taught by."""
    seed: NonNegativeInt
    dataset: str
    """Name of the slice store."""
    store: str = ""
    """The store's fingerprint."""
    split: str
    trained_on: tuple[str, ...] | None = None
    """Hashes of the images that it, and a teacher of its, learned from (see `data.identity`); None if not known."""
    spec: SliceSpec
    """How it sees slices."""
    preparation: Preparation | None = None
    """How scans are prepared before it sees slices of them; None if an earlier version saved it."""
    label_values: tuple[int, ...] | None = None
    """The value of each class but the background in the label files that the store was made of; None as above."""
    epoch: int | None = None
    """Epochs that the weights were trained for."""
    val_dice: float | None = None
    """Mean Dice over the val cases."""


_CARDS = TypeAdapter(ModelCard)


def save_network(path: Path, network: nn.Module, card: ModelCard) -> None:
    """Weights of a network and its card, as one .safetensors file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    metadata = {"format": FORMAT, "description": card_json(card)}

    def write(aside: Path) -> None:
        try:
            save_file(tensors, aside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_atomically(path, write)


def card_json(card: ModelCard) -> str:
    """A card as JSON."""
    return _CARDS.dump_json(card).decode()


def is_checkpoint(item: str) -> bool:
    """Whether an argument names a trained network in a file."""
    return item.lower().endswith((".safetensors", ".onnx"))


def load_network(path: Path) -> tuple[nn.Module, ModelCard]:
    """A saved network and its card, from a .safetensors or an .onnx file; the latter's has no feature maps.

    Raises `UserError` if the file is missing, damaged or not one of this program's, or holds another network.
    """
    if Path(path).suffix.lower() == ".onnx":
        from .onnx import OnnxNetwork

        network = OnnxNetwork(Path(path))
        return network, network.card
    card, tensors = _read(Path(path), weights=True)
    network = build_network(card.network, card.in_channels, card.classes, card.width)
    load_weights(network, tensors, f"{path} ({card.network}, width {card.width:g})")
    return network, card


def load_named(items: Sequence[str]) -> tuple[dict[str, nn.Module], SliceSpec]:
    """Networks by name, and how all of them see slices. Each is `PATH`, named by its folder, or `NAME=PATH`.

    Raises `UserError` as `load_network` does, for two of one name, and for networks that see slices differently.
    """
    networks, specs = {}, []
    for item in items:
        name, path = item.split("=", 1) if "=" in item else (Path(item).absolute().parent.name, item)
        if name in networks:
            raise UserError(f"{item}: another network is called '{name}' too; give each a name, NAME=PATH")
        networks[name], card = load_network(Path(path))
        specs.append(card.spec)
        if card.spec != specs[0]:
            raise UserError(f"{item}: its task, crop or threshold is not that of {items[0]}; draw each in a picture")
    return networks, specs[0]


def load_card(path: Path) -> ModelCard:
    """The card of a saved network. Raises `UserError` as `load_network` does."""
    return _read(Path(path), weights=False)[0]


def _read(path: Path, weights: bool) -> tuple[ModelCard, dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the best.safetensors of a training job")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if weights}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); copy it again or train again") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a network saved by spark-dist (its metadata lack the format '{FORMAT}')")
    try:
        return parse_card(metadata.get("description", "")), tensors
    except ValueError as error:
        raise UserError(
            f"{path}: the model card is damaged or edited ({error}); copy it again or train again"
        ) from None


def parse_card(text: str) -> ModelCard:
    """A card from its JSON. Raises `ValueError` that names the first wrong field."""
    facts = json.loads(text)
    if isinstance(facts, dict) and "spec" not in facts:  # cards were flat once
        facts["spec"] = {key: facts[key] for key in ("task", "threshold") if key in facts}
        facts["spec"]["crop"] = {"size": facts.get("crop"), "shift": facts.get("crop_shift")}
    try:
        card = _CARDS.validate_python(facts)  # what other versions know besides is no harm
    except ValidationError as error:
        first = error.errors()[0]
        found = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}{found}".removeprefix(": ")) from None
    if card.network not in NETWORKS:
        raise ValueError(f"network: {unknown_name('network', card.network, NETWORKS)}")
    names = card.spec.task.split(",")
    if not all(NAME.fullmatch(name) for name in names) or len(names) + 1 != card.classes:
        raise ValueError(f"spec.task: {card.spec.task!r:.60} are no names of {card.classes - 1} regions")
    if card.in_channels != card.spec.channels:
        raise ValueError(f"in_channels: {card.in_channels} are not those of a context of {card.spec.context} slices")
    return card


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict whole. Raises `UserError` naming the first keys that differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        differing = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise UserError(f"{what}: the weights belong to another network ({differing[:300]})") from None
