"""A trained network as a model of MLflow: loaded by `mlflow.pyfunc`, served by `mlflow models serve`."""

import tempfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import numpy as np

from spark_dist.networks.checkpoint import ModelCard, load_card

PACKAGES = Path(__file__).parents[2]
"""Where the packages lie whose code goes along with a model."""
SCRIPT = PACKAGES / "spark_dist" / "evaluation" / "served_model.py"
NAME = "segmentation"
RESULTS = ("test_dice", "test_dice_low", "test_dice_high", "test_misses", "best_val_dice", "parameters", "gflops")
"""The run's metrics that are the model's too."""


def log_model(client, run_id: str, checkpoint: Path, example: Path, register: str) -> None:
    """Log a saved network as the model of an MLflow run, and as a version of the registered model of a name. What is
    there already, from an attempt whose answer was lost, is not made again.

    The network's weights are the checkpoint itself; nothing in the model is pickled. `example` holds slices (N, H, W).
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    card = load_card(checkpoint)
    text = describe(card)
    model = model_of(client, run_id) or client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=f"{NAME}-{card.network}",
        source_run_id=run_id,
        tags={"mlflow.note.content": text},
        params={key: str(value) for key, value in facts_of(card).items()},
        model_type=NAME,
    )
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:
            about = Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id)
            save(Path(folder) / "model", checkpoint, np.load(example, allow_pickle=False), about)
            client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        client.log_batch(run_id, metrics=metrics_of(client, run_id, model.model_id))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    found = client.search_registered_models(f"name = '{register}'")
    if not found:
        client.create_registered_model(register)
    if not [v for v in client.search_model_versions(f"name = '{register}'") if v.run_id == run_id]:
        source = model.artifact_location
        client.create_model_version(register, source, run_id, description=text, model_id=model.model_id)


def model_of(client, run_id: str):
    """The model that was logged for a run; None if there is none."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return found[0] if found else None


def metrics_of(client, run_id: str, model_id: str) -> list:
    """A run's results as those of its model, which the list of models shows."""
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    return [
        Metric(key, m.value, m.timestamp, m.step, run_id=run_id, model_id=model_id)
        for key in RESULTS
        if key in known
        for m in client.get_metric_history(run_id, key)[-1:]
    ]


def save(folder: Path, checkpoint: Path, example: np.ndarray, about) -> None:
    """Write a model as MLflow lays it out, with the code that it needs."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    whole = (-1, -1, -1)
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(SCRIPT),
        artifacts={"checkpoint": str(checkpoint)},
        code_paths=[str(PACKAGES / name) for name in ("spark_dist", "data_tools")],
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.float32), whole)]), Schema([TensorSpec(np.dtype(np.int64), whole)])
        ),
        input_example=example.astype(np.float32),
        pip_requirements=requirements(),
        mlflow_model=about,
    )


def requirements() -> list[str]:
    """The packages that this one needs, as it declares them."""
    try:
        return [line for line in requires("spark-dist") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # run from a folder
        return ["torch", "mlflow"]


def facts_of(card: ModelCard) -> dict[str, object]:
    """The facts of a card that people ask for."""
    facts = {key: getattr(card, key) for key in ("network", "width", "method", "seed", "dataset", "split", "epoch")}
    facts |= {
        "task": card.spec.task,
        "threshold": card.spec.threshold,
        "val_dice": card.val_dice and round(card.val_dice, 4),
    }
    facts |= {"label_values": card.label_values, "context": card.spec.context, "store": card.store}
    if card.preparation:
        facts |= {"window": f"{card.preparation.kind} {card.preparation.low:g} to {card.preparation.high:g}"}
    return facts


def describe(card: ModelCard) -> str:
    """A model card in Markdown."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts_of(card).items())
    return (
        f"{card.network} that segments {card.spec.task}. Takes axial slices (N, H, W) of one scan in the scan's own "
        "intensities, in the resolution that it was trained in, rows to posterior and columns to left; returns their "
        f"label map, 0 the background.\n\n| | |\n|---|---|\n{rows}"
    )
