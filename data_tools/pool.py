"""One job at a time in each of several processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import zarr

from .workers import end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")


def results(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, lost: Callable[[Job, str], Result]
) -> Iterator[Result]:
    """The result of `work` on each job as it is done, one job at a time in each of `workers` processes.

    A job that was not done, as a process was killed, has the result of `lost`, which is given the reason.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        # Workers start here, and inherit that Ctrl-C is left to the main process, even while they still import.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = {pool.submit(work, job): job for job in jobs}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield lost(futures[future], "as a worker process was killed (out of memory?); use fewer --workers")
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """End when the main process ends, and use one thread."""
    zarr.config.set({"threading.max_workers": 1})
    end_with_parent()
