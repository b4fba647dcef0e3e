"""A trained teacher in one checkpoint, or in several whose probabilities are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from data_tools.errors import UserError
from spark_dist.networks.checkpoint import ModelCard, load_card, load_network
from spark_dist.networks.ensemble import averaged

WITH_FLIPS = " with flips"
"""Ends the name of a teacher that is averaged over flips."""


@dataclass(frozen=True)
class SavedNetworks:
    """One checkpoint or several, as one teacher: its probabilities are the mean of theirs, with `flips` over the four
    flips of a slice too."""

    checkpoints: tuple[Path, ...]
    flips: bool = False

    def load(self) -> tuple[nn.Module, ModelCard]:
        """The network and its card. Raises `UserError` as `load_network` and `check_alike` do."""
        check_alike(self.checkpoints)
        networks, cards = zip(*(load_network(path) for path in self.checkpoints), strict=True)
        return averaged(networks, self.flips), card_of_several(cards, self.flips)

    def card(self) -> ModelCard:
        """The card alone."""
        return card_of_several([load_card(path) for path in self.checkpoints], self.flips)


def card_of_several(cards: Sequence[ModelCard], flips: bool) -> ModelCard:
    """One card for several networks: the first one's, but for the name, `unet+unet` or `unet with flips`, and the
    images that any of them learned from."""
    known = [card.trained_on for card in cards]
    return replace(
        cards[0],
        network="+".join(card.network for card in cards) + WITH_FLIPS * flips,
        trained_on=None if None in known else tuple(sorted({image for images in known for image in images})),
    )


def check_alike(checkpoints: Sequence[Path]) -> None:
    """Raises `UserError` for networks that do not see the same slices, or tell the same classes apart."""
    first, *others = checkpoints
    wanted = facts_of(load_card(first))
    for path in others:
        found = facts_of(load_card(path))
        for name, value in wanted.items():
            if found[name] != value and (found[name] and value):  # earlier versions did not know all
                raise UserError(
                    f"{path}: has {name} {found[name]}, and {first} has {value}; the checkpoints of one teacher must "
                    "be of one task, and see slices alike"
                )


def facts_of(card: ModelCard) -> dict[str, str]:
    """All that checkpoints of one teacher must have in common, as people would say it."""
    facts = {field.name: getattr(card.spec, field.name) for field in fields(card.spec) if field.name != "threshold"}
    crop = facts.pop("crop")
    facts |= {"crop": "×".join(map(str, crop.size)), "crop shift": list(crop.shift)}
    facts |= {"classes": card.classes, "preparation of scans": card.preparation or ""}
    return {name: str(value) for name, value in facts.items()}
