"""Predictions of networks beside the ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from data_tools.store import TASKS, Store
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import SliceSpec

from .figures import prediction_figure
from .inference import probabilities
from .metrics import dice, overlap_counts


def predictions_picture(
    store: Store,
    cases: Sequence[str],
    spec: SliceSpec,
    networks: Mapping[str, nn.Module],
    path: Path,
    rows: int = 4,
) -> None:
    """Image, truth and each network's prediction in the fullest slice of up to `rows` cases, spread over `cases`."""
    reader = VoxelReader(store)
    drawn = []
    for position in np.unique(np.linspace(0, len(cases) - 1, min(rows, len(cases))).astype(int)):
        case = store.cases[cases[position]]
        z = int(case.label_counts[:, TASKS[spec.task]].sum(axis=1).argmax())
        image, label = (reader.slice(case.name, kind, z)[np.newaxis] for kind in ("image", "label"))
        truth = spec.target(label)
        predictions = {}
        for name, network in networks.items():
            predicted = probabilities(network, image, case.window, spec)[0] >= spec.threshold
            predictions[name] = (predicted[0], float(dice(overlap_counts(predicted, truth).sum(axis=0))))
        low, high = case.window
        shown = np.clip((image[0].astype(np.float32) - low) / (high - low), 0, 1) * 2 - 1
        drawn.append({"case": case.name, "slice": z, "image": shown, "truth": truth[0], "predictions": predictions})
    prediction_figure(drawn, path)
