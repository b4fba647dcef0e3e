"""A job's folder: whose it is, which job it holds, and what of it may be removed.

FOLDER/job.json       the mark by which it is known for a job's; and the cases and the teacher that the job learns
                      from, as hashes, once it has begun
FOLDER/config.yaml    its options
FOLDER/job.lock       who works in it (see `lock`)
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError
from data_tools.files import write_text
from data_tools.ownership import mark, owned, remove_owned
from spark_dist.config import TrainingOptions

from .checkpoint import STATE
from .journal import description

VERSION = 1
MAY_DIFFER = (
    "out",
    "overwrite",
    "allow_teacher_overlap",
    "tracking_uri",
    "picture_every",
    "register",
    "workers",
    "log_every",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_checkpoints",
    "timeout_minutes",
    "cache_folder",
    "cache_memory",
)
"""Options in which a resumed job may differ from what it was."""

RUN = ("tracking.json", "tracking.jsonl")
JOB = ("config.yaml", "generation.txt", "support.txt", *RUN)
STATES = (STATE, STATE.replace(".pt", ".damaged"), f".{STATE}.*.tmp")
STAGE = (
    "best.safetensors",
    "test_cases.json",
    "cases.json",
    "predictions.png",
    "example.npy",
    "images/*.png",
    "images/*.webp",
    *RUN,
    *(f"checkpoints/{name}" for name in STATES),
)
"""All that a job writes, beside its mark."""
STAGES = ("network", "teacher", "student")


def check_folder(folder: Path) -> None:
    """Raise `UserError` if something in a folder that bears no job's mark has a name that a job would write to."""
    if owned(folder, "job") is not None or made_before(folder):
        return
    for name in ("job.json", *JOB, *STAGES):
        if (folder / name).exists():
            raise UserError(f"{folder}: has a {name} that no job of spark-dist made; give another --out")


def made_before(folder: Path) -> bool:
    """Whether a folder is that of a job from before folders bore a mark, by its options and the journal of its run."""
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text())
        params = (description(folder) or {})["params"]
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return False
    return isinstance(options, dict) and len(options) > 0 and options.keys() <= params.keys()


def claim(folder: Path, options: TrainingOptions, data: Mapping[str, Any]) -> None:
    """Begin a job in a checked folder that nobody else works in, or find that it holds this very job, which goes on.

    `data` are the hashes that the job's results follow from: those of a split's cases by part and name, and `teacher`;
    with a foreign teacher, `predicted` are those of its predictions by case.
    Raises `UserError`, and changes nothing, if the folder holds a job with other options or data.
    """
    wanted = {key: value for key, value in plain(options).items() if key not in MAY_DIFFER}
    facts = owned(folder, "job") or {}
    begun = "data" in facts or (not facts and (folder / "config.yaml").exists())
    if begun and not options.overwrite:
        check_options(folder, wanted)
        check_data(folder, facts.get("data", data), data)
    else:
        # Without data, the mark says that what is left here of another job is still to be removed.
        mark(folder, "job", version=VERSION)
        discard(folder)
        write_text(folder / "config.yaml", yaml.safe_dump(wanted, sort_keys=False))
    mark(folder, "job", version=VERSION, data=data)


def discard(folder: Path) -> None:
    """Remove what a job leaves in its folder, and nothing else. Raises `UserError` if the folder is not a job's."""
    remove_owned(folder, "job", [*JOB, *(f"{stage}/{name}" for stage in STAGES for name in STAGE)])


def check_options(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise `UserError` if a folder's job has other options."""
    file, advice = folder / "config.yaml", "give another --out, or --overwrite to begin again"
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
    if not isinstance(found, dict):
        raise UserError(f"{file}: not the options of a job ({str(found)[:160]}); restore it, {advice}")
    if differing := [key for key, value in wanted.items() if found.get(key) != value]:
        key = differing[0]
        raise UserError(f"{folder}: holds a job with {key}={found.get(key)!r}, not {wanted[key]!r}; {advice}")


def check_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` if a folder's job began with other cases or another teacher, naming the first of them."""
    advice = "put back what it was, give another --out, or --overwrite to begin again"
    for part, cases in now.items():
        found = before.get(part) if isinstance(before, dict) else None
        if part == "teacher":
            if found != cases:
                raise UserError(f"{folder}: its --teacher-checkpoint held other weights when this job began; {advice}")
            continue
        found = found if isinstance(found, dict) else {}
        if differing := sorted({name for name in found | cases if found.get(name) != cases.get(name)}):
            name = differing[0]
            what = "is new" if name not in found else "is gone" if name not in cases else "was prepared anew"
            raise UserError(f"{folder}: case {name} of the {part} cases {what} since this job began; {advice}")


def plain(options: TrainingOptions) -> dict[str, Any]:
    """Options as YAML and JSON can hold them."""
    return json.loads(json.dumps(asdict(options), default=str))
