"""Load of a job's machine, as MLflow's page of system metrics shows it."""

import os
from contextlib import suppress

import psutil

from .mlflow_client import prepare_mlflow


class SystemMetrics:
    """Readings of the machine on which a job's main process runs."""

    def __init__(self):
        here = psutil.Process()
        # All processes of a job on this machine are children of the launcher, which need not be one of the job.
        self.several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
        self.first = here.parent() if self.several else here
        self.gpus = gpu_monitor()

    def read(self) -> dict[str, float]:
        """The machine's CPU load in percent, the memory in MiB of all processes of the job, and the load, the memory
        and the power of each GPU in the units of MLflow's own collector.
        """
        values = {"cpu_percent": psutil.cpu_percent(), "memory_mib": memory(self.processes()) / 2**20}
        if self.gpus:
            self.gpus.collect_metrics()
            values |= self.gpus.aggregate_metrics()
            self.gpus.clear_metrics()
        return {f"system/{name}": value for name, value in values.items()}

    def processes(self) -> list[psutil.Process]:
        """The job's processes on this machine, with the workers that read batches."""
        try:
            return self.first.children(recursive=True) + ([] if self.several else [self.first])
        except psutil.NoSuchProcess:  # the launcher was killed
            return [psutil.Process()]


def memory(processes: list[psutil.Process]) -> int:
    """Bytes of memory in use by processes; what they share counts once."""
    own, shared = 0, 0
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            found = process.memory_info()
            own += found.rss - getattr(found, "shared", 0)
            shared = max(shared, getattr(found, "shared", 0))
    return own + shared


def gpu_monitor():
    """MLflow's collector of GPU metrics, or nothing on a machine without GPUs."""
    prepare_mlflow()
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return GPUMonitor()
    except (ImportError, RuntimeError):
        return None
