"""Which slice is seen when, and how it is oriented: a function of (seed, epoch, slice).

Nothing here has a state that a checkpoint would need. A sample is named by its key = row in the slice table × 8 +
orientation, and the teacher cache uses the same keys."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_tools.errors import UserError

from .views import ORIENTATIONS


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n slices."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def orientations(n: int, seed: int, epoch: int, choices: Sequence[int]) -> np.ndarray:
    """Each slice's orientation in an epoch, (n,).

    A slice goes through all `choices` in a random order once per block of len(choices) epochs, so that each draw is
    uniform and everything that can be seen has been seen after the first block.
    """
    block, position = divmod(epoch, len(choices))
    orders = np.random.default_rng([seed, 1, block]).permuted(np.tile(np.asarray(choices), (n, 1)), axis=1)
    return orders[:, position]


def epoch_keys(n: int, seed: int, epoch: int, choices: Sequence[int]) -> np.ndarray:
    """The keys of the n samples of an epoch, in its order."""
    order = permutation(n, seed, epoch)
    return order * ORIENTATIONS + orientations(n, seed, epoch, choices)[order]


def visited(n: int, seed: int, epochs: Iterable[int], choices: Sequence[int]) -> np.ndarray:
    """The keys of all samples that some epochs see of n slices, in the order in which they are first seen."""
    keys = np.concatenate([epoch_keys(n, seed, epoch, choices) for epoch in epochs])
    return keys[np.sort(np.unique(keys, return_index=True)[1])]


class EpochSampler:
    """Yields this process's share of each part of each global batch of an epoch, as keys.

    An epoch is cut into ceil(n / batch_size) batches whose sizes differ by one at the most, each batch into
    `accumulate` parts likewise, and each part into the processes' shares: no slice is dropped or repeated, and no batch
    is a tiny remainder. Parts do not depend on the number of processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        choices: Sequence[int],
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        self.n, self.seed, self.choices, self.rank, self.world = n, seed, tuple(choices), rank, world
        self.accumulate = accumulate
        self.steps = -(-n // batch_size)
        if not self.smallest:
            parts = f", each in {accumulate} parts," if accumulate > 1 else ""
            raise UserError(
                f"{n} training slices in batches of {batch_size}{parts} leave some of {world} processes without a "
                "slice; use fewer processes or a larger --batch-size"
            )
        self.epoch = 0
        self.start = 0

    @property
    def largest_share(self) -> int:
        """The most slices that this process has at a time."""
        part = math.ceil(math.ceil(self.n / self.steps) / self.accumulate)
        return math.ceil(part / self.world)

    @property
    def smallest(self) -> int:
        """The fewest slices that any process has at a time."""
        return self.n // self.steps // self.accumulate // self.world

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        keys = epoch_keys(self.n, self.seed, self.epoch, self.choices)
        for step in range(self.start, self.steps):
            low, high = self.n * step // self.steps, self.n * (step + 1) // self.steps
            for part in np.array_split(keys[low:high], self.accumulate):
                yield np.array_split(part, self.world)[self.rank].tolist()

    def weight(self, part: int) -> float:
        """What this process's mean loss over a part counts in the average over processes and over the batch's parts,
        so that it is the global batch's mean. Parts are counted through the epoch."""
        step, place = divmod(part, self.accumulate)
        size = self.n * (step + 1) // self.steps - self.n * step // self.steps
        part = size // self.accumulate + (place < size % self.accumulate)
        share = part // self.world + (self.rank < part % self.world)
        return share * self.world * self.accumulate / size
