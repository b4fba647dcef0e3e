"""The targets that a frozen teacher gives for a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark_dist.data.batches import Batch
from spark_dist.data.cache import TeacherCache
from spark_dist.data.number_formats import decode
from spark_dist.data.views import ORIENTATIONS, orient_batch, upright_batch
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import NetworkOutput


class TeacherTargets:
    """The frozen teacher: a batch's targets from the cache, or from a forward pass where they are not in it.

    Without a teacher (`None`) there are no targets.
    """

    def __init__(self, teacher: nn.Module | None, distiller: Distiller, cache: TeacherCache | None, autocast: Callable):
        self.teacher = teacher and teacher.eval().requires_grad_(False)
        self.distiller = distiller
        self.cache = cache
        self.autocast = autocast
        self.forwards = self.hits = self.damaged = 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The method's targets for a batch (see `Distiller.teacher_targets`), in float32."""
        if self.teacher is None:
            return {}
        turns = batch.keys % ORIENTATIONS if self.cache is not None and self.cache.canonical else None
        if batch.targets is not None:
            self.hits += len(batch.keys)
            targets = decode(batch.targets)
        else:
            self.forwards += len(batch.keys)
            self.damaged += len(batch.damaged)
            image, mask = batch.image, batch.mask
            if turns is not None:
                image, mask = upright_batch(image, turns), upright_batch(mask, turns)
            targets = self.compute(image, mask)
            if self.cache is not None:
                self.cache.mark_missing(batch.damaged)
                targets = self.cache.add(self.cache.stored(batch.keys), targets)
        if turns is None:
            return targets
        return {name: orient_batch(x, turns) if x.ndim > 2 else x for name, x in targets.items()}

    @torch.no_grad()
    def compute(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The targets of images (N, 1, H, W) and masks (N, 2, H, W), by a forward pass."""
        with self.autocast():
            output = self.teacher(image)
        return self.distiller.teacher_targets(NetworkOutput(*(t.float() for t in output)), mask)

    def flush(self) -> None:
        """Write what was computed, so that it can be read."""
        if self.cache is not None:
            self.cache.flush()
