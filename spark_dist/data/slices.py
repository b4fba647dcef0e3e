"""The slices of a store, and how their voxels are read."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from data_tools.errors import UserError
from data_tools.location import finished
from data_tools.shards import SliceReader, damage_named
from data_tools.store import Store
from data_tools.workers import cores


@dataclass(frozen=True)
class SliceTable:
    """The slices of some cases, as arrays rather than objects, so that workers share their memory."""

    store: Store
    cases: tuple[str, ...]
    case: np.ndarray
    """(n,) position of each slice's case in `cases`."""
    slice: np.ndarray
    """(n,) each slice's index in its case."""
    unlabelled: int = 0
    """How many slices, the last ones, count as without ground truth, whatever the store knows of them."""
    without_target: int = 0
    """How many slices, the last ones with ground truth, show no target, where batches have a share of either kind."""

    def __len__(self) -> int:
        return len(self.case)

    @property
    def with_ground_truth(self) -> int:
        """How many slices, the first ones, have ground truth."""
        return len(self) - self.unlabelled

    def name(self, row: int) -> str:
        """A slice as a person would name it."""
        return f"{self.cases[self.case[row]]} slice {self.slice[row]}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources, windows and places of all slices."""
        facts = [[name, c.source, c.window, c.shape] for name in self.cases for c in [self.store.cases[name]]]
        digest = hashlib.sha256(json.dumps([facts, *labels_of(self.store)], sort_keys=True).encode())
        digest.update(np.stack([self.case, self.slice]).astype(np.int64).tobytes())
        if self.unlabelled:
            digest.update(str(self.unlabelled).encode())
        return digest.hexdigest()[:16]


def labels_of(store: Store) -> list[Any]:
    """Facts that stored labels follow from, and what regions are made of them, where any are declared."""
    return [store.attributes[key] for key in ("labels", "regions") if key in store.attributes]


def slice_table(store: Store, split: str, part: str, task: str, slices: str = "labelled") -> SliceTable:
    """The slices of one part of a split: those that show any of the task's regions (`labelled`), `all`, or all with
    those that show none at the end (`mixed`).

    Raises `UserError` if there is none, with `mixed` none of one kind, or no such task.
    """
    regions, cases = store.task(task).regions, part_of_split(store, split, part)
    shown = [set(store.cases[name].slices_with(*regions)) for name in cases]
    rows = [(n, z) for n, name in enumerate(cases) for z in range(store.cases[name].shape[0])]
    empty = [(n, z) for n, z in rows if z not in shown[n]] if slices == "mixed" else []
    if slices != "all":
        rows = [(n, z) for n, z in rows if z in shown[n]]
    if slices == "mixed" and not empty:
        raise UserError(
            f"{store.path}: every slice of the {part} part of split '{split}' shows {task}, so there is nothing to "
            "mix; use --slices all"
        )
    if not rows:
        raise UserError(
            f"{store.path}: the {part} part of split '{split}' has no slice with {task}; "
            "make another split (spark-data split --name), or train another task"
        )
    case, index = np.array(rows + empty, dtype=np.int32).T
    return SliceTable(store=store, cases=cases, case=case, slice=index, without_target=len(empty))


def with_unlabelled(table: SliceTable, split: str) -> SliceTable:
    """A table of training slices, and behind them all slices of the split's unlabelled cases.

    Raises `UserError` if the split has none.
    """
    store, cases = table.store, tuple(table.store.split(split, "unlabelled"))
    if not cases:
        raise UserError(
            f"{store.path}: split '{split}' has no unlabelled case; prepare some with spark-data prepare --unlabelled "
            "and make another split, or leave out --unlabelled-share"
        )
    depths = [store.cases[name].shape[0] for name in cases]
    case = np.repeat(np.arange(len(cases)), depths) + len(table.cases)
    index = np.concatenate([np.arange(depth) for depth in depths])
    return replace(
        table,
        cases=table.cases + cases,
        case=np.concatenate([table.case, case]).astype(np.int32),
        slice=np.concatenate([table.slice, index]).astype(np.int32),
        unlabelled=len(index),
    )


def part_of_split(store: Store, split: str, part: str) -> tuple[str, ...]:
    """The cases of one part of a split. Raises `UserError` if there is none, or one has lost its label."""
    cases = tuple(store.split(split, part))
    if not cases:
        raise UserError(f"{store.path}: the {part} part of split '{split}' has no case; name another --split")
    if bare := [name for name in cases if not store.cases[name].labelled]:
        raise UserError(
            f"{store.path}: case '{bare[0]}' of the {part} part of split '{split}' has lost its label; "
            "prepare it again with its label, or make another split (spark-data split --name)"
        )
    return cases


class VoxelReader:
    """Reads voxels of a store.

    Arrays are opened when they are first needed, in the process that needs them: threads do not survive a fork, and
    handles are left behind when this object is sent to a worker.
    """

    def __init__(self, store: Store):
        self.path = store.path
        self._reset_handles()

    def _reset_handles(self) -> None:
        self._readers: dict[tuple[str, str], SliceReader] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._reset_handles()

    def slices(self, case: str, kind: str) -> SliceReader:
        """The reader of slices of the `image` or `label` of a case."""
        if self._process != os.getpid():
            self._reset_handles()
        if (case, kind) not in self._readers:
            self._readers[case, kind] = SliceReader(self.path / "cases" / case / kind)
        return self._readers[case, kind]

    def each(self, work: Callable[[int], None], count: int) -> None:
        """work(0) … work(count − 1), on this process's share of the cores; in a loader's worker one after the other."""
        threads = max(1, min(decoding_threads(), count))

        def share(first: int) -> None:
            for n in range(first, count, threads):
                work(n)

        if threads > 1 and self._threads is None:
            self._threads = ThreadPoolExecutor(decoding_threads() - 1, thread_name_prefix="decode")
        others = [self._threads.submit(share, first) for first in range(1, threads)]
        share(0)
        for other in others:
            other.result()

    def slice(self, case: str, kind: str, z: int) -> np.ndarray:
        """One slice of a case, (H, W). Raises `UserError` naming it if it is damaged."""
        with damage_named(f"{self.path}: {case} slice {z}"):
            return self.slices(case, kind).start(z).read().copy()

    def case(self, case: str, kind: str) -> np.ndarray:
        """All voxels of a case, (Z, H, W)."""
        return finished(self.slices(case, kind).array.read(), f"{self.path}: case {case}")


def decoding_threads() -> int:
    """How many threads of this process may decode at a time."""
    if get_worker_info() is not None:
        return 1
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
