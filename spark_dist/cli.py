"""From a command line or a recipe to options, and from a mistake to one line."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from data_tools.errors import Interrupted, UserError, unknown_name

set_parsing_settings(docstring_parse_attribute_docstrings=True)

COMMANDS = {
    "train": "train a network without a teacher",
    "distill": "train a student with a teacher",
    "cache": "fill a teacher cache ahead of training; list, verify, prune caches",
    "evaluate": "per-case figures of a checkpoint on one part of a split",
    "compare": "table of runs: teacher, student alone, student distilled",
    "profile": "parameters, GFLOPs, activation memory and latency of networks",
    "picture": "predictions of checkpoints beside the truth, as a PNG",
    "sweep": "combinations of a grid of options, for an array of jobs",
    "track-sync": "send what an MLflow server that was down did not get",
}
"""Each command is the module of its name, with _ for -: `OPTIONS` (a dataclass) and `run(options)`."""

REQUEUE = 75
"""Exit code of a job that was told to stop, saved its state and wants to be started again (EX_TEMPFAIL)."""


def main(argv: Sequence[str] | None = None) -> int:
    """`spark-dist COMMAND …`."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
    try:
        # The modules import torch, which takes seconds: only the one that is needed is loaded.
        loaded = import_module(module)
        loaded.run(parse(loaded.OPTIONS, argv, program or f"python -m {module}"))
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
        from spark_dist.training.distributed import lost_contact

        if not lost_contact(error):
            raise
        rank = os.environ["RANK"]
        print(f"process {rank}: another process has ended; its error comes before this line", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130


def say_error(text: str) -> None:
    """A line on the error stream, once for all processes of the job that have the same to say."""
    from spark_dist.training.distributed import first_to_say

    if first_to_say(text):
        print(text, file=sys.stderr, flush=True)


def parse(options: type, argv: Sequence[str], program: str) -> Any:
    """An `options` object from arguments and an optional recipe (`--config FILE`, YAML); arguments win.

    A dataclass field with `positional` (its help) in its metadata is an argument without `--`.

    Raises `UserError` for anything that does not fit.
    """
    argv = [re.sub(r"^--[a-z][a-z0-9.-]*", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    argv = with_values(argv, {f"--{field.name}" for field in fields(options) if field.type is bool})
    parser = ArgumentParser(prog=program, exit_on_error=False, allow_abbrev=False, description=options.__doc__)
    parser.add_argument("--config", metavar="FILE", help="Recipe: a YAML file of options (train and distill).")
    positional = [field for field in fields(options) if "positional" in field.metadata]
    for field in positional:
        parser.add_argument(field.name, nargs=field.metadata.get("nargs"), help=field.metadata["positional"])
    parser.add_class_arguments(options, skip={field.name for field in positional})
    try:
        parser.set_defaults(read_recipe(recipe, options) if (recipe := _config_argument(argv)) else {})
        parsed = parser.parse_args(argv)
    except UserError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise UserError(f"{message} (see {program} --help)") from None
    return options(**{field.name: getattr(parsed, field.name) for field in fields(options)})


def with_values(argv: Sequence[str], switches: set[str]) -> list[str]:
    """Arguments in which a switch without a value has `true`."""
    found = []
    for position, argument in enumerate(argv):
        found.append(argument)
        if argument in switches and (position + 1 == len(argv) or argv[position + 1].startswith("--")):
            found.append("true")
    return found


def _config_argument(argv: Sequence[str]) -> str | None:
    for position, argument in enumerate(argv):
        if argument == "--config":
            return argv[position + 1] if position + 1 < len(argv) else None
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def read_recipe(path: str, options: type) -> dict[str, Any]:
    """The recipe's settings that are among `options`.

    One recipe serves both train and distill, so each takes what it knows; a key that neither knows is an error.
    """
    try:
        with open(path) as file:
            recipe = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: can't be read as a recipe ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a list of 'option: value' lines")
    known = recipe_keys() | {field.name for field in fields(options)}
    for key in recipe:
        if key not in known:
            raise UserError(f"{path}: {unknown_name('option', key, known)}")
    return {key: value for key, value in recipe.items() if key in {field.name for field in fields(options)}}


def recipe_keys() -> set[str]:
    """The options of train and distill."""
    from .config import DistillOptions, TrainOptions

    return {field.name for options in (TrainOptions, DistillOptions) for field in fields(options)}


def module_main(module: str) -> None:
    """What `python -m` of a command's module runs."""
    sys.exit(command(module))
