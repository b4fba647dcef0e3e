"""From a command line to a command, and from a mistake to one line.

Nothing here imports what takes long, so that Ctrl-C is understood from the start.
"""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module

from data_tools.errors import Interrupted, UserError, unknown_name
from data_tools.workers import end_with_launcher

COMMANDS = {
    "train": "train a network without a teacher",
    "distill": "train a student with a teacher",
    "crossval": "train or distill on every fold of a cross-validation",
    "cache": "fill a teacher cache ahead of training; list, verify, prune caches",
    "evaluate": "per-case metrics of a checkpoint on one part of a split",
    "export": "a trained network as an ONNX file",
    "predict": "label maps of NIfTI scans",
    "compare": "table of runs: teacher, student alone, student distilled",
    "profile": "parameters, GFLOPs, activation memory and latency of networks",
    "picture": "predictions of checkpoints beside the ground truth, as a PNG",
    "explain": "where networks look in a slice: Grad-CAM and attention maps, as a PNG",
    "views": "a training slice in the views that training sees of it, as a PNG",
    "sweep": "combinations of a grid of options, for an array of jobs",
    "track-sync": "send what an MLflow server that was down did not get",
}
"""Each command is the module of its name, with _ for -: `OPTIONS` (a dataclass) and `run(options)`."""

REQUEUE = 75
"""Exit code of a job that was told to stop, saved its state and wants to be started again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt, from malloc.h."""


def main(argv: Sequence[str] | None = None) -> int:
    """`spark-dist COMMAND …`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: spark-dist COMMAND [options]   (spark-dist COMMAND --help lists them)\n")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: {unknown_name('command', argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return command(f"spark_dist.{argv[0].replace('-', '_')}", argv[1:], f"spark-dist {argv[0]}")


def command(module: str, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a command's module with the options on the command line. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    end_with_launcher()
    keep_freed_memory()
    try:
        # The modules import torch, which takes seconds: only the one that is needed is loaded.
        with ended_by_interrupt():
            loaded, parsing = import_module(module), import_module("spark_dist.parsing")
        loaded.run(parsing.parse(loaded.OPTIONS, argv, program or f"python -m {module}"))
        return 0
    except UserError as error:
        # One that comes from a loader's worker brings the worker's traceback along, and ends with its own line.
        say_error(f"error: {str(error).strip().splitlines()[-1].removeprefix('data_tools.errors.UserError: ')}")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        say_error(f"error: {error.filename}: {error.strerror}; mend that, and the same command goes on from there")
        return 2
    except Interrupted as stop:
        say_error(str(stop))
        return REQUEUE
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error) or isinstance(error, MemoryError):
            reason = " ".join(str(error).split())[:160]
            say_error(f"error: out of memory ({reason}); try smaller networks, slices or batches")
            return 2
        from spark_dist.training.distributed import lost_contact

        if not (why := lost_contact(error)):
            raise
        print(f"process {os.environ['RANK']}: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED


def keep_freed_memory() -> None:
    """Have glibc keep what large tensors leave for the next ones. By default it gives it back to the system, whose
    pages then come anew one by one: half of the time that a network takes on a slice of 512×512 on two CPU cores.

    What is 1 GiB or larger is given back nevertheless. Whoever sets MALLOC_TRIM_THRESHOLD_ knows better.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        with suppress(AttributeError, OSError, TypeError):  # not glibc
            set_option = ctypes.CDLL(None).mallopt
            set_option(M_TRIM_THRESHOLD, 2**31 - 1)
            set_option(M_MMAP_THRESHOLD, 2**30)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: an exception in the middle of an import may come out as another one, or not at
    all."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return

    def end(number, frame) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_anything() -> None:
    """A character that the terminal does not have is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say_error(text: str) -> None:
    """A line on the error stream, once for all processes of the job that have the same to say."""
    from spark_dist.training.distributed import first_to_say

    if first_to_say(text):
        print(text, file=sys.stderr, flush=True)


def module_main(module: str) -> None:
    """Run a command's module as the program (`python -m`), before anything else is imported."""
    sys.exit(command(module))
