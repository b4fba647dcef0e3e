"""The targets that a frozen teacher gives for a batch."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist.data.batches import Batch
from spark_dist.data.cache import TeacherCache
from spark_dist.data.number_formats import PREDICTION, decode
from spark_dist.data.predictions import StoredPredictions
from spark_dist.data.views import orient_batch, upright_batch
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import NetworkOutput

LEAST = 1e-4
"""The least probability of a class in a foreign prediction; what float16 tells from 0 beside 1 is not much less."""


class TeacherTargets:
    """The frozen teacher: a batch's targets from the cache, or from a forward pass where they are not in it.

    Without a teacher (`None`) there are no targets.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        distiller: Distiller,
        cache: TeacherCache | None,
        autocast: Callable,
        predicts: bool = False,
        hard: bool = False,
    ):
        """With `predicts`, the teacher's prediction is among the targets: it is the mask of slices that have none. With
        `hard`, the method learns from the predicted classes in place of the probabilities."""
        self.predicts = predicts
        self.hard = hard
        self.teacher = teacher and teacher.eval().requires_grad_(False)
        self.distiller = distiller
        self.cache = cache
        self.autocast = autocast
        self.forwards = self.hits = self.damaged = 0

    @property
    def taught(self) -> bool:
        """Whether there are any targets."""
        return self.teacher is not None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The masks (N, C, H, W) that a batch is learned from, the ground truth or where there is none the teacher's
        prediction; and the method's targets (see `Distiller.teacher_targets`), in float32."""
        if self.teacher is None:
            return batch.mask, {}
        targets = self.targets(batch)
        if batch.known is None:
            return batch.mask, targets
        return completed(batch.mask, batch.known, targets.pop(PREDICTION).long()), targets

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """The targets of a batch, the prediction included."""
        turns = self.cache.layout.turns(batch.keys) if self.cache is not None and self.cache.layout.canonical else None
        if batch.targets is not None:
            self.hits += len(batch.keys)
            targets = decode(batch.targets)
        else:
            image, mask = batch.image, batch.mask
            if turns is not None:
                image, mask = upright_batch(image, turns), upright_batch(mask, turns)
            targets = self.looked_up(batch, image, mask)
        if turns is None:
            return targets
        return {name: orient_batch(x, turns) if x.ndim > 2 else x for name, x in targets.items()}

    def looked_up(self, batch: Batch, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The targets of a batch that was not read as a whole, for its images and masks as the cache has them.

        With a cache, its slices with ground truth and those without are each looked up, or computed, on their own: the
        few with labels come back long before all of the others were seen once. These two parts are never divided
        further, so that what is computed does not depend on what is there, not even in its rounding.
        """
        if self.cache is None:
            self.forwards += len(batch.keys)
            return self.compute(image, mask, batch.known)
        self.damaged += len(batch.damaged)
        self.cache.mark_missing(batch.damaged)
        if batch.known is None:
            return self.of_part(batch.keys, image, mask, None)
        known = batch.known.cpu().numpy()
        parts = [part for part in map(np.flatnonzero, (known, ~known)) if len(part)]
        found = [self.of_part(batch.keys[part], image[part], mask[part], batch.known[part]) for part in parts]
        place = np.argsort(np.concatenate(parts))
        return {name: torch.cat([part[name] for part in found])[place] for name in found[0]}

    def of_part(self, keys: np.ndarray, image: Tensor, mask: Tensor, known: Tensor | None) -> dict[str, Tensor]:
        """The targets of a part of a batch, from the cache if all are there."""
        entries = self.cache.read(keys)
        self.damaged += len(entries.damaged)
        if entries.arrays is not None:
            self.hits += len(keys)
            return decode({name: x.to(image.device) for name, x in entries.arrays.items()})
        self.forwards += len(keys)
        return self.cache.add(self.cache.layout.stored(keys), self.compute(image, mask, known))

    @torch.no_grad()
    def compute(self, image: Tensor, mask: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
        """The targets of images (N, 1, H, W) and masks (N, C, H, W), of which those `known` (N,) are ground truth, by a
        forward pass."""
        with self.autocast():
            output = NetworkOutput(*(t.float() for t in self.teacher(image)))
        if self.hard:
            output = output._replace(logits=hard_logits(output.logits.argmax(dim=1), mask.shape[1]))
        if not self.predicts:
            return self.distiller.teacher_targets(output, mask)
        prediction = output.logits.argmax(dim=1)
        if known is not None:
            mask = completed(mask, known, prediction)
        return self.distiller.teacher_targets(output, mask) | {PREDICTION: prediction}

    def flush(self) -> None:
        """Write what was computed, so that it can be read."""
        if self.cache is not None:
            self.cache.flush()


class ForeignTargets:
    """The targets of a foreign teacher's predictions, which lie in the store and are read with each batch."""

    taught = True
    forwards = damaged = 0

    def __init__(self, distiller: Distiller, predictions: StoredPredictions, hard: bool):
        """With `hard`, the method learns from the predicted classes in place of the probabilities."""
        self.distiller, self.cache, self.hard = distiller, predictions, hard
        self.hits = 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `TeacherTargets`."""
        self.hits += len(batch.keys)
        ((name, predicted),) = decode(batch.targets).items()
        if name == PREDICTION:
            logits = hard_logits(predicted.long(), batch.mask.shape[1])
        else:
            logits = logits_of_probabilities(torch.cat([1 - predicted.sum(dim=1, keepdim=True), predicted], dim=1))
        classes = logits.argmax(dim=1)
        if self.hard:
            logits = hard_logits(classes, batch.mask.shape[1])
        mask = batch.mask if batch.known is None else completed(batch.mask, batch.known, classes)
        # Methods that learn from predictions look at nothing else.
        return mask, self.distiller.teacher_targets(NetworkOutput(logits, logits, logits), mask)

    def flush(self) -> None:
        """There is nothing to write."""


def hard_logits(classes: Tensor, count: int) -> Tensor:
    """Logits (N, C, H, W) of classes (N, H, W) that are beyond doubt."""
    return logits_of_probabilities(F.one_hot(classes, count).movedim(-1, 1).float())


def logits_of_probabilities(probabilities: Tensor) -> Tensor:
    """Logits (N, C, H, W) of probabilities, of which none counts as less than `LEAST`."""
    return probabilities.clamp(min=LEAST).log()


def completed(mask: Tensor, known: Tensor, prediction: Tensor) -> Tensor:
    """Masks (N, C, H, W) in which those that are not `known` (N,) are the predicted classes (N, H, W), one-hot."""
    predicted = F.one_hot(prediction, mask.shape[1]).movedim(-1, 1).to(mask.dtype)
    return torch.where(known.view(-1, 1, 1, 1), mask, predicted)
