"""Per-case metrics of a network on whole volumes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from data_tools.errors import UserError
from data_tools.labels import names_in
from data_tools.store import Store
from spark_dist.data.predictions import of_classes, read_prediction
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import SliceSpec

from .inference import covering, largest_components, predicted_classes, probabilities
from .intervals import summarise
from .metrics import TOLERANCE, case_metrics

LABELLED_THRESHOLD = 0.4
"""The threshold of the original system's protocol, `labelled-slices` (see `predicted_classes`)."""


class Region(NamedTuple):
    """A region that is measured, in the ground truth and in predictions."""

    values: Sequence[int]
    """Its stored values."""
    classes: Sequence[int]
    """The network's classes inside it."""


def measured_regions(store: Store, spec: SliceSpec, task: str | None = None) -> dict[str, Region]:
    """The regions of a network's task, or of another `task`, by their names in a store.

    A network of one region may be measured on any other. Raises `UserError` for regions that the store does not have,
    or that are no union of the network's classes.
    """
    if task not in (None, "all") and len(spec.regions) == 1:
        (values,) = store.task(one_region(task)).regions.values()
        return {task: Region(values, [1])}
    trained, found = store.task(spec.task), {}
    wanted = list(spec.regions) if task is None else list(store.regions) if task == "all" else names_in(task)
    for name in wanted:
        (values,) = store.task(name).regions.values()
        try:
            found[name] = Region(values, trained.inside(values))
        except ValueError:
            if task != "all":
                raise UserError(
                    f"--task {task}: '{name}' is no union of the network's classes, which are {', '.join(spec.regions)}"
                ) from None
    return found


def one_region(task: str) -> str:
    """A task of one region. Raises `UserError` for several."""
    if len(names_in(task)) > 1:
        raise UserError(f"--task {task}: the network tells one region from the background; name one")
    return task


def evaluate_cases(
    accelerator: Accelerator,
    network: nn.Module,
    store: Store,
    cases: Sequence[str],
    spec: SliceSpec,
    tolerance: float | None = TOLERANCE,
    regions: Mapping[str, Region] | None = None,
    largest_component: bool = False,
) -> dict[str, dict[str, Any]]:
    """Every case's metrics, by case name, the same on every process (see `case_metrics`); of several `regions`, which
    are the task's if not given, each metric's mean over them, and behind a dot its value for each, `dice.anterior`.

    Cases are shared among the processes and each is predicted whole by one of them, so that the metrics do not depend
    on how many there are. Both protocols: `volume` at `spec.threshold` over whole planes, and `labelled-slices` at
    `LABELLED_THRESHOLD`; the former with the `largest_component` of each class alone, if so told. `tolerance` (mm) is
    that of the surface Dice; None leaves out the metrics of surfaces, which take longest. Its parameters
    are the data's (store, cases, regions) and the protocol's.
    """
    reader = VoxelReader(store)

    def predict(name: str, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        case, image = store.cases[name], reader.case(name, "image")
        whole, labelled = both_protocols(network, image, shown, case.window, spec)
        return largest_components(whole) if largest_component else whole, labelled

    return measure_cases(accelerator, store, cases, regions or measured_regions(store, spec), predict, tolerance)


def evaluate_predictions(
    accelerator: Accelerator, store: Store, prediction: str, cases: Sequence[str], spec: SliceSpec
) -> dict[str, dict[str, Any]]:
    """The metrics of the predictions of a foreign model that lie in the store, as `evaluate_cases` gives those of a
    network. Raises `UserError` if a case has none, or a damaged one."""
    task = store.task(spec.task)

    def predict(name: str, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stored, kind = read_prediction(store, prediction, name)
        if kind == "label":
            return (classes := task.classes_of(stored)), classes
        found = np.stack(of_classes(stored, task))
        return predicted_classes(found, spec.threshold), predicted_classes(found, LABELLED_THRESHOLD)

    return measure_cases(accelerator, store, cases, measured_regions(store, spec), predict)


def measure_cases(
    accelerator: Accelerator,
    store: Store,
    cases: Sequence[str],
    regions: Mapping[str, Region],
    predict: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]],
    tolerance: float | None = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """Every case's metrics (see `evaluate_cases`). `predict` takes a case's name and which of its slices show a region
    (Z,), and gives the classes (Z, H, W) of the protocols `volume` and `labelled-slices`."""
    reader, own = VoxelReader(store), {}
    for name in shares(store, cases, accelerator.num_processes)[accelerator.process_index]:
        label = reader.case(name, "label")
        shown = np.isin(label, [value for region in regions.values() for value in region.values]).any(axis=(1, 2))
        whole, labelled = predict(name, shown)
        spacing = store.cases[name].spacing
        found = {
            region: case_metrics(
                np.isin(whole, classes), np.isin(label, values), spacing, np.isin(labelled, classes), tolerance
            )
            for region, (values, classes) in regions.items()
        }
        own[name] = over_regions(found)
    return dict(sorted(item for part in gather_object([own]) for item in part.items()))


def both_protocols(
    network: nn.Module, image: np.ndarray, shown: np.ndarray, window: Sequence[float], spec: SliceSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted classes (Z, H, W) of the protocol `volume`, and those of `labelled-slices`: of the training's crop
    alone, as the original system saw slices, and only in those that are `shown` (Z,)."""
    found = probabilities(network, image, window, spec)
    whole = predicted_classes(found, spec.threshold)
    if covering(spec.crop, image.shape[1:], network.stride) == spec.crop:
        return whole, predicted_classes(found, LABELLED_THRESHOLD)
    labelled = np.zeros_like(whole)
    if shown.any():
        found = probabilities(network, image, window, spec, whole=False, slices=np.flatnonzero(shown))
        labelled[shown] = predicted_classes(found, LABELLED_THRESHOLD)
    return whole, labelled


def over_regions(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """A case's metrics from those of its regions: the only region's; of several, the means over them, infinite where
    one is missed, and behind them each region's own."""
    first, *others = found.values()
    if not others:
        return dict(first)
    means = {key: float(np.mean([metrics[key] for metrics in found.values()])) for key in first}
    return means | {f"{key}.{region}": value for region, metrics in found.items() for key, value in metrics.items()}


def shares(store: Store, cases: Sequence[str], world: int) -> list[list[str]]:
    """Cases for each process, so that their slices are about even."""
    result: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(cases, key=lambda name: (-store.cases[name].shape[0], name)):
        least = load.index(min(load))
        result[least].append(name)
        load[least] += store.cases[name].shape[0]
    return result


def summaries(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each metric's mean, 95% interval and misses over cases (see `metrics.summarise`)."""
    return {key: summarise([metrics[key] for metrics in cases.values()]) for key in next(iter(cases.values()))}


def format_summaries(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics that one looks at first, in a line."""
    dice, hd95 = summary["dice"], summary["hd95"]
    text = f"Dice {dice['mean']:.4f} [{dice['low']:.4f}, {dice['high']:.4f}] over {dice['cases']} cases"
    text += f", HD95 {hd95['mean']:.1f} mm"
    return text + (f" without {hd95['misses']} missed cases" if hd95["misses"] else "")
