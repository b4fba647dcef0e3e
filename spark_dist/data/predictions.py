"""The predictions of a foreign teacher that lie in a store, in the views in which training sees their slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_tools.errors import UserError
from data_tools.labels import Task
from data_tools.location import finished
from data_tools.predictions import prediction_of
from data_tools.shards import PendingSlice, SliceReader, damage_named
from data_tools.store import Store

from .augmentation import Views
from .cache import CacheLayout, Entries
from .number_formats import PREDICTION, as_tensor
from .shared_memory import empty_array
from .slices import SliceTable, VoxelReader

PROBABILITIES = "probabilities"
"""The target that is the probability of each class but the background, (N, C − 1, H, W)."""


@dataclass(frozen=True)
class PendingPredictions:
    """Predictions whose reads have been started, and the array that they are put into."""

    task: Task
    views: Views
    keys: np.ndarray
    """(N,)"""
    names: list[str]
    """(N,) for errors."""
    reads: list[PendingSlice]
    labels: list[PendingSlice | None]
    """The ground truth, where crops lie around it."""
    array: np.ndarray
    """(N, H, W) classes, or (N, C − 1, H, W) probabilities."""

    def fill(self, n: int) -> None:
        """Decode sample n."""
        row, number = divmod(int(self.keys[n]), self.views.count)
        with damage_named(self.names[n]):
            label = None if self.labels[n] is None else self.task.classes_of(self.labels[n].read()) > 0
            stored = self.reads[n].read()
        if stored.ndim == 2:
            plane = self.task.classes_of(stored)
            self.array[n] = self.views.of_planes(row, number, [plane], target(label, plane), nearest=True)[0]
            return
        planes = of_classes(stored, self.task)
        self.array[n] = self.views.of_planes(row, number, planes, target(label, planes[0]), nearest=False)


def of_classes(stored: np.ndarray, task: Task) -> list[np.ndarray]:
    """The probability of each class of a task but the background, each (…) float32, from those of the store's labels
    (L, …)."""
    return [stored[[value - 1 for value in values]].astype(np.float32).sum(axis=0) for values in task.values]


def read_prediction(store: Store, name: str, case: str) -> tuple[np.ndarray, str]:
    """All of a case's prediction, and its kind: `label` (Z, H, W), or `probabilities` (L, Z, H, W) of the store's
    labels. Raises `UserError` if it is not there or damaged."""
    folder, kind = prediction_of(store, name, case)
    stored = finished(SliceReader(folder / kind).array.read(), f"{store.path}: prediction '{name}' of case {case}")
    return (stored, kind) if kind == "label" else (stored.swapaxes(0, 1), kind)


def target(label: np.ndarray | None, plane: np.ndarray) -> np.ndarray:
    """The target that crops from anywhere lie around, (H, W) bool: nothing where there is no ground truth."""
    return np.zeros(plane.shape, bool) if label is None else label


class StoredPredictions:
    """The predictions of one name for the slices of a table. They are read like the entries of a teacher cache (see
    `TeacherCache`) that has all of them."""

    def __init__(self, table: SliceTable, name: str, task: Task, views: Views):
        """Raises `UserError` if a case lacks its prediction, or some are label maps and some probabilities."""
        self.table, self.name, self.task, self.views = table, name, task, views
        self.kind = kind_of_predictions(table.store, name, table.cases)
        self.voxels = VoxelReader(table.store)
        self._readers: dict[str, SliceReader] = {}

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}

    @cached_property
    def layout(self) -> CacheLayout:
        """The arrays of a sample."""
        size = self.views.crop.size
        shapes = {PREDICTION: size} if self.kind == "label" else {PROBABILITIES: (len(self.task.values), *size)}
        return CacheLayout(len(self.table) * self.views.count, shapes, "float32", views=self.views.count)

    def start_reading(self, keys: np.ndarray) -> PendingPredictions:
        """Have the predictions of samples fetched."""
        names, reads, labels = [], [], []
        for row in keys // self.views.count:
            case, z = self.table.cases[self.table.case[row]], int(self.table.slice[row])
            names.append(f"{self.table.store.path}: prediction '{self.name}' of {self.table.name(row)}")
            with damage_named(names[-1]):
                reads.append(self.reader(case).start(z))
                around = self.views.anywhere and row < self.table.with_ground_truth
                labels.append(self.voxels.slices(case, "label").start(z) if around else None)
        ((shape, dtype),) = self.layout.arrays().values()
        array = empty_array((len(keys), *shape), dtype)
        return PendingPredictions(self.task, self.views, keys, names, reads, labels, array)

    def finish_reading(self, pending: PendingPredictions) -> Entries:
        """Predictions that have been filled."""
        (name,) = self.layout.arrays()
        return Entries({name: as_tensor(pending.array)})

    def reader(self, case: str) -> SliceReader:
        """The reader of a case's prediction, opened once."""
        if case not in self._readers:
            folder, kind = prediction_of(self.table.store, self.name, case)
            self._readers[case] = SliceReader(folder / kind)
        return self._readers[case]


def kind_of_predictions(store: Store, name: str, cases: Sequence[str]) -> str:
    """The kind of the predictions of cases: `label` or `probabilities`.

    Raises `UserError` if one is not there, or they are not all of one kind.
    """
    kinds = {case: prediction_of(store, name, case)[1] for case in cases}
    first = next(iter(kinds.values()))
    if other := [case for case, kind in kinds.items() if kind != first]:
        raise UserError(
            f"{store.path}: prediction '{name}' of case {other[0]} is of {kinds[other[0]]}, and that of {cases[0]} of "
            f"{first}; prepare all from files of one kind, with --replace"
        )
    return first
