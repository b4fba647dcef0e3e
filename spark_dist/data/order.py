"""Which slice is seen when, and in which view: a function of (seed, epoch, slice).

Nothing here has a state that a checkpoint would need. A sample is named by its key = row in the slice table × number of
views + view number, and the teacher cache uses the same keys.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_tools.errors import UserError

from .augmentation import UNLIMITED


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The order in which an epoch visits n slices."""
    return np.random.default_rng([seed, 4 * stream, epoch]).permutation(n)


def view_numbers(n: int, seed: int, epoch: int, views: int, stream: int = 0) -> np.ndarray:
    """Each slice's view in an epoch, (n,).

    A slice goes through all its `views` in a random order once per block of so many epochs, so that each draw is
    uniform and everything that can be seen has been seen after the first block. If they are unlimited, each epoch has
    its own.
    """
    if views == UNLIMITED:
        return np.full(n, epoch)
    block, position = divmod(epoch, views)
    orders = np.random.default_rng([seed, 4 * stream + 1, block]).permuted(np.tile(np.arange(views), (n, 1)), axis=1)
    return orders[:, position]


class Stream(NamedTuple):
    """Slices that are gone through again and again: each pass in another order, with another view of each slice."""

    number: int
    first: int
    """Row of the first slice."""
    size: int
    """Slices."""
    each_epoch: int
    """Samples that an epoch takes of it."""

    def keys(self, start: int, stop: int, seed: int, views: int) -> np.ndarray:
        """The keys from position `start` to `stop` of the endless sequence."""
        passes = []
        for epoch in range(start // self.size, -(-stop // self.size)):
            order = permutation(self.size, seed, epoch, self.number)
            numbers = view_numbers(self.size, seed, epoch, views, self.number)[order]
            passes.append((self.first + order) * views + numbers)
        begin = start // self.size * self.size
        return np.concatenate(passes)[start - begin : stop - begin] if passes else np.zeros(0, np.int64)


KINDS = ("with ground truth", "without ground truth", "without the target")
"""The kinds of slices of streams 0, 1 and 2."""


@dataclass(frozen=True)
class Order:
    """The samples of every epoch, and how they form batches; the same for any number of processes.

    Where all slices are of one kind, an epoch visits every slice once, in ceil(slices / batch_size) batches whose sizes
    differ by one at the most: none is dropped or repeated, and no batch is a tiny remainder. With slices that show no
    target or have no ground truth as kinds of their own, each batch has its share of each kind; the kind that takes
    most batches to go through determines the epoch, and of the others each pass begins where the one before ended,
    whatever the epoch.
    """

    slices: int
    """Slices with ground truth: the first rows of the slice table."""
    batch_size: int
    seed: int
    views: int = 1
    """Views of each slice (see `augmentation.Views.count`)."""
    unlabelled: int = 0
    """Slices without ground truth: the rows behind them."""
    share: float = 0.5
    """Share of unlabelled slices in a batch, where there are any."""
    without_target: int = 0
    """Slices that show no target, where they are a kind of their own: the last ones with ground truth."""
    target_share: float = 0.5
    """Share of slices that show the target among a batch's slices with ground truth, where there are such kinds."""

    @cached_property
    def _kinds(self) -> list[tuple[int, int, int, int]]:
        """Of each kind of slices, in the order of their rows: its stream's number, its first row, how many there are,
        and how many in a full batch."""
        without = round(self.batch_size * self.share) if self.unlabelled else 0
        known, shown = self.batch_size - without, self.slices - self.without_target
        empty = known - round(known * self.target_share) if self.without_target else 0
        kinds = [(0, 0, shown, known - empty)]
        if self.without_target:
            kinds.append((2, shown, self.without_target, empty))
        if self.unlabelled:
            kinds.append((1, self.slices, self.unlabelled, without))
        return kinds

    @property
    def shares(self) -> str:
        """The options that say which share each kind of slices has, with their values."""
        target = [f"--target-share {self.target_share:g}"] * bool(self.without_target)
        return ", ".join(target + [f"--unlabelled-share {self.share:g}"] * bool(self.unlabelled))

    @cached_property
    def steps(self) -> int:
        """Batches in an epoch. Raises `UserError` for shares that leave one kind out of every batch."""
        if not all(each for *_, each in self._kinds):
            counts = " and ".join(f"{each} slices {KINDS[number]}" for number, _, _, each in self._kinds)
            raise UserError(
                f"{self.shares}: batches of {self.batch_size} would have {counts}; change a share or --batch-size"
            )
        return max(-(-size // each) for *_, size, each in self._kinds)

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The kinds of slices."""
        return tuple(
            Stream(number, first, size, size if -(-size // each) == self.steps else self.steps * each)
            for number, first, size, each in self._kinds
        )

    def sizes(self, step: int) -> list[int]:
        """How many samples of each stream a batch has."""
        return [s.each_epoch * (step + 1) // self.steps - s.each_epoch * step // self.steps for s in self.streams]

    def epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """The batches of an epoch, each as the keys of each stream."""
        whole = [s.keys(epoch * s.each_epoch, (epoch + 1) * s.each_epoch, self.seed, self.views) for s in self.streams]
        cuts = [[s.each_epoch * step // self.steps for step in range(1, self.steps)] for s in self.streams]
        return [list(parts) for parts in zip(*map(np.split, whole, cuts), strict=True)]

    def visited(self, epochs: Iterable[int]) -> np.ndarray:
        """The keys of all samples that some epochs see, in the order in which they are first seen."""
        keys = np.concatenate([part for epoch in epochs for batch in self.epoch(epoch) for part in batch])
        return keys[np.sort(np.unique(keys, return_index=True)[1])]


class EpochSampler:
    """Yields this process's share of each part of each global batch of an epoch, as keys.

    Each batch is cut into `accumulate` parts, and each part into the processes' shares, evenly and each kind of slices
    for itself. Parts do not depend on the number of processes.
    """

    def __init__(self, order: Order, rank: int = 0, world: int = 1, accumulate: int = 1):
        self.order, self.rank, self.world, self.accumulate = order, rank, world, accumulate
        self.steps = order.steps
        if not all(self.fewest):
            parts = f", each in {accumulate} parts," if accumulate > 1 else ""
            kind = f" of each kind ({order.shares})" if order.shares else ""
            raise UserError(
                f"{order.slices + order.unlabelled} training slices in batches of {order.batch_size}{parts} leave some "
                f"of {world} processes without a slice{kind}; use fewer processes or a larger --batch-size"
            )
        self.epoch = 0
        """The epoch whose batches come next."""
        self.start = 0
        """Its first batch, for a run that goes on in the middle."""

    @property
    def largest_share(self) -> int:
        """The most slices that this process has at a time."""
        per_batch = (math.ceil(stream.each_epoch / self.steps) for stream in self.order.streams)
        return sum(math.ceil(math.ceil(size / self.accumulate) / self.world) for size in per_batch)

    @property
    def fewest(self) -> list[int]:
        """The fewest slices of each kind that any process has at a time."""
        return [stream.each_epoch // self.steps // self.accumulate // self.world for stream in self.order.streams]

    @property
    def smallest(self) -> int:
        """The fewest slices that any process has at a time."""
        return sum(self.fewest)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.order.epoch(self.epoch)[self.start :]:
            for parts in zip(*(np.array_split(keys, self.accumulate) for keys in batch), strict=True):
                yield np.concatenate([np.array_split(part, self.world)[self.rank] for part in parts]).tolist()

    def weight(self, part: int) -> float:
        """The factor on this process's mean loss over a part, parts being counted through the epoch.

        With it, the average over the processes and over the parts of a batch is the mean over the batch's slices: a
        mean over `share` of `batch` slices stands for share / batch of them, and averaging divides by the number of
        shares.
        """
        step, position = divmod(part, self.accumulate)
        kinds = self.order.sizes(step)
        share = sum(split_size(split_size(size, self.accumulate, position), self.world, self.rank) for size in kinds)
        return share * self.world * self.accumulate / sum(kinds)


def split_size(items: int, parts: int, position: int) -> int:
    """How many of `items` the part at `position` has after `np.array_split`, which gives the remainder to the first."""
    return items // parts + (position < items % parts)
