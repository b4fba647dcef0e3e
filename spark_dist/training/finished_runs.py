"""The finished runs on a tracking server, with the metrics of their test cases."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.errors import UserError, unknown_name
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.comparison import Run
from spark_dist.evaluation.folds import pool_folds
from spark_dist.evaluation.metrics import read_cases
from spark_dist.networks.cost import Model, gflops_of

from .compared_options import options_of
from .mlflow_client import SQLITE, absolute_uri, make_client, trouble

STAGE_TAGS = ("dataset", "task", "split", "role", "network", "seed")
"""Tags that each stage's run has."""


def load_runs(tracking_uri: str, name: str = "") -> tuple[list[Run], list[str]]:
    """The finished runs of an experiment, oldest first, and lines on those that are left out.

    Of several runs of one kind and seed, the last counts. Raises `UserError` if there is no such server or experiment,
    or nothing in it is finished.
    """
    client, experiments = reach(tracking_uri)
    if not name and len(experiments) == 1:
        name = next(iter(experiments))
    if name not in experiments:
        if not experiments:
            raise UserError(f"{tracking_uri}: no experiment there yet; train something with this --tracking-uri")
        raise UserError(f"{tracking_uri}: {unknown_name('experiment', name, experiments)}")
    items = {item.info.run_id: item for item in all_runs(client, experiments[name])}
    runs: list[Run] = []
    unfinished = []
    for item in items.values():
        tags = item.data.tags
        if not {"journal", *STAGE_TAGS, "width", "method", "parameters"} <= tags.keys():
            continue  # a job above its stages, or somebody else's
        parent = items.get(tags.get("mlflow.parentRunId"))
        job = tags.get("job") or (parent.info.run_name if parent else "")
        title = f"{job}/{item.info.run_name}" if job else item.info.run_name
        cases = test_cases(client, item.info.run_id, title)
        if cases is None:
            unfinished.append(title)
            continue
        above = (parent.data.tags if parent else {}) | tags  # one network's training has no run above it
        role = "student" if tags["role"] == "network" else tags["role"]  # one trained alone is a student alone
        params = dict(item.data.params)
        given = role == "teacher" and "epochs" not in params  # it was trained in another job
        if "fold" in above and "steps" not in params:
            params.pop("epochs", None)  # of an older run, which as many steps made others in each fold
        options = ((), ()) if given else options_of(params, role == "student" and tags["method"] != "none")
        loaded = Run(
            **{key: tags[key] for key in STAGE_TAGS} | {"role": role},
            width=float(tags["width"]),
            method=tags["method"] or "none",
            teacher=above.get("teacher", "") if role == "student" else "",
            parameters=int(tags["parameters"]),
            cases=cases,
            data=above.get("data", ""),
            fold=above.get("fold", ""),
            crossval=above.get("crossval", ""),
            gflops=operations(item),
            latency_ms=item.data.metrics.get("latency_ms"),
            options=options[0],
            method_options=options[1],
        )
        runs.append(loaded)
    runs, notes = with_known_data(runs)
    runs = without_repeated(runs)
    found: dict[tuple, Run] = {}
    replaced = 0
    for item in runs:
        key = (*item.kind, item.seed)
        replaced += key in found and found[key].cases != item.cases
        found[key] = item
    if unfinished:
        notes.append(f"not finished, so not in the table: {', '.join(unfinished)}")
    if replaced:
        notes.append(f"of runs alike in network, method, options and seed the last is shown; {replaced} older left out")
    if not found:
        raise UserError(f"{tracking_uri}: no run in '{name}' has test metrics yet")
    pooled, lines = pool_folds(list(found.values()))
    return pooled, [*notes, *lines]


def without_repeated(runs: list[Run]) -> list[Run]:
    """Runs without those of teachers that only tested what another run has trained, and so tell no options."""
    trained = [(*item.subject, item.seed, item.cases) for item in runs if item.options]
    return [item for item in runs if item.options or (*item.subject, item.seed, item.cases) not in trained]


def with_known_data(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Runs in which those from before data were logged by their content have that of the others of the same names, if
    all of these are of the same data; and a line on them."""
    known: dict[tuple, set[str]] = {}
    for item in runs:
        known.setdefault(item.names, set()).update({item.data} - {""})
    old = sum(not item.data for item in runs)
    adopted = [
        replace(item, data=next(iter(known[item.names]))) if not item.data and len(known[item.names]) == 1 else item
        for item in runs
    ]
    note = f"{old} runs do not say which cases they are of: they are compared by the names of dataset and split"
    return adopted, [note] if old else []


def operations(item) -> float | None:
    """GFLOPs of a run's network on one slice of its crop: as logged, else computed; None for a network that is not
    known here."""
    if "gflops" in item.data.metrics:
        return item.data.metrics["gflops"]
    tags, params = item.data.tags, item.data.params
    try:
        crop = json.loads(params["crop"].replace("(", "[").replace(")", "]"))
        rows, columns = (crop, crop) if isinstance(crop, int) else crop
        spec = SliceSpec(tags["task"], Crop((rows, columns)), context=int(params.get("context", 0)))
        return gflops_of(Model(tags["network"], float(tags["width"]), spec.channels, spec.classes), spec.crop.size)
    except (KeyError, ValueError, TypeError, UserError):
        return None


def reach(tracking_uri: str) -> tuple[Any, dict[str, str]]:
    """A client of a tracking server, and the ids of its experiments by name."""
    uri = absolute_uri(tracking_uri)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise UserError(f"{tracking_uri}: no such database; give the --tracking-uri of the training jobs")
    try:
        client = make_client(uri)
        return client, {e.name: e.experiment_id for e in client.search_experiments() if e.name != "Default"}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{tracking_uri}: {trouble(error)}") from None


def all_runs(client, experiment_id: str) -> Iterable[Any]:
    """The MLflow runs of an experiment, oldest first."""
    page = None
    while page is None or page.token:
        page = client.search_runs(
            [experiment_id], order_by=["attributes.start_time ASC"], page_token=page.token if page else None
        )
        yield from page


def test_cases(client, run_id: str, title: str) -> dict[str, dict[str, float]] | None:
    """The metrics of a run's test cases, or None if it did not come that far."""
    if "test_cases.json" not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(client.download_artifacts(run_id, "test_cases.json", folder))
        try:
            return read_cases(file)
        except UserError:
            raise UserError(f"run {title} ({run_id}): its artifact test_cases.json is damaged; log it again") from None
