"""What a job imports only when it needs it, for programs that fork many jobs: imported once, before the forks."""

import gc

import alembic.autogenerate
import alembic.command  # noqa: F401
import jsonargparse  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import mlflow.store.tracking.sqlalchemy_store
import mlflow.system_metrics.system_metrics_monitor
import mlflow.tracing  # noqa: F401
import monai.metrics.utils
import pygments.formatters  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
import torch

from spark_dist.networks import build_network


def before_forks() -> None:
    """Load what would be loaded in every fork, and leave it out of the forks' garbage collection."""
    dir(monai.metrics.utils)
    with torch.device("meta"):
        build_network("enet")
    gc.freeze()
