"""The measured cost and gain of a teacher cache on this machine."""

import shutil
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from spark_dist.data.batches import Batch
from spark_dist.data.cache import TeacherCache
from spark_dist.data.number_formats import decode

from .targets import TeacherTargets

TRIAL = f"trial-{'[0-9a-f]' * 8}"
"""The names of the folders that a measurement writes to, as a pattern."""


class Trial(NamedTuple):
    """The cost and the gain of a cache on this machine."""

    forward: float
    """Seconds for a slice by the teacher."""
    read: float
    """Seconds for a slice from the cache, just written."""
    error: dict[str, float]
    """For each target, how far what is read is from what the teacher gives: root mean square, relative."""


def try_cache(targets: TeacherTargets, cache: TeacherCache, batch: Batch) -> Trial:
    """Measure teacher and cache on a batch; nothing is left of it in the cache."""

    def seconds(work: Callable[[], dict[str, Tensor]]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            found = work()
            # The device has finished once a value of each has arrived.
            [x.flatten()[0].item() for x in found.values()]
            times.append(time.perf_counter() - start)
        return min(times) / len(batch.keys)

    device = batch.image.device
    aside = cache.folder / f"trial-{uuid.uuid4().hex[:8]}.tmp"
    trial = TeacherCache(aside, cache.layout, cache.memory)
    exact = targets.compute(batch.image, batch.mask, batch.known)
    again = TeacherTargets(targets.teacher, targets.distiller, trial, targets.autocast, targets.predicts, targets.hard)
    given = again.targets(batch)
    exact = {name: x.float() for name, x in exact.items()}
    error = {name: float((given[name] - x).norm() / x.norm().clamp(min=1e-12)) for name, x in exact.items()}
    trial.flush()

    def read() -> dict[str, Tensor]:
        arrays = trial.read(batch.keys).arrays
        return decode({name: x.to(device) for name, x in arrays.items()})

    try:
        forward = seconds(lambda: targets.compute(batch.image, batch.mask, batch.known))
        return Trial(forward, float("inf") if trial.full else seconds(read), error)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
