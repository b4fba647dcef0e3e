"""The page on which a person finds the runs in MLflow: its address, and the columns of its list."""

import json
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

VIEW = "results"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""The tag of an experiment that holds a view of its list of runs, which an address names."""
COLUMNS = (
    *("test_dice", "student/difference_to_alone", "test_hd95_mm", "test_misses"),
    *("best_val_dice", "parameters", "gflops"),
)
"""The metrics by which runs are chosen; by itself, MLflow's list shows none."""

AS_EVER = {
    **{"searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL"},
    **{"lifecycleFilter": "Active", "modelVersionFilter": "All Runs", "datasetsFilter": []},
    **{"runsExpanded": {}, "runsPinned": [], "runsHidden": [], "runsHiddenMode": "FIRST_10_RUNS"},
    **{"runsVisibilityMap": {}, "groupBy": None, "groupsExpanded": {}, "useGroupedValuesInCharts": True},
    **{"viewMaximized": False, "runListHidden": False, "isAccordionReordered": False, "hideEmptyCharts": True},
    "autoRefreshEnabled": True,
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}
"""All else in a view as it is without one: pages of MLflow before 3.15 do not add what is not there."""


def results_view() -> str:
    """A view of a list of runs with a column for each metric of a run's results, as MLflow's pages save one."""
    widths = {f"metrics.`{name}`": 50 + 8 * len(name) for name in COLUMNS}
    state = {"selectedColumns": [*widths, "attributes.`Dataset`"], "columnOrder": [*widths], "columnWidths": widths}
    state |= AS_EVER
    made = int(time.time() * 1000)
    # MLflow before 3.15 takes the state itself; since then it has a name and a place in the menu of views.
    saved = {"name": VIEW.title(), "createdAt": made, "updatedAt": made, "state": json.dumps(state)}
    return json.dumps(state | saved)


def show_results(client, experiment_id: str) -> None:
    """Give an experiment its view of results, unless it has one, which somebody may have changed since."""
    from mlflow.exceptions import MlflowException

    # Not worth holding up a run where only some may change experiments.
    with suppress(MlflowException):
        if VIEW_TAG not in client.get_experiment(experiment_id).tags:
            client.set_experiment_tag(experiment_id, VIEW_TAG, results_view())


def how_to_look(uri: str, state: dict[str, Any]) -> str:
    """Page with the runs beside a journal's (see `read_state`), and what starts MLflow's pages of a
    local database; "" as long as the server has none of it."""
    if state["experiment_id"] is None:
        return ""
    uri = re.sub(r"//[^/@]*@", "//", uri)  # a password
    server = uri.startswith("http")
    base = uri.rstrip("/") if server else "http://127.0.0.1:5000"
    # Without the type MLflow opens its page for language models.
    wanted = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    address = f"{base}/#/experiments/{state['experiment_id']}/runs?{wanted}"
    if server:
        return f"The runs in a browser: {address}"
    program = Path(sys.executable).with_name("mlflow")
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    command = shlex.join([str(program), "ui", "--host", "127.0.0.1", "--backend-store-uri", uri])
    return f"The runs in a browser: MLFLOW_DISABLE_TELEMETRY=true {command}\n{'and open':>22} {address}"
