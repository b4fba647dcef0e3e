"""Send what an MLflow server that was down did not get: spark-dist track-sync FOLDER."""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.track_sync")

from dataclasses import dataclass, field
from pathlib import Path

from data_tools.progress import console
from spark_dist.training.tracking import page_of, sync

from .options import ServerOptions


@dataclass(kw_only=True)
class SyncOptions(ServerOptions):
    """Send what the runs of a job that has ended could not send to their MLflow server."""

    folder: str = field(metadata={"positional": "folder of a job (its --out)"})


OPTIONS = SyncOptions


def run(options: SyncOptions) -> None:
    """Send, and say how much there was, and where to see it."""
    sent = sync(Path(options.folder), options.tracking_uri)
    console.print(f"{options.folder}: {sent} entries sent to {options.tracking_uri}", markup=False)
    console.print(page_of(Path(options.folder), options.tracking_uri), markup=False)
