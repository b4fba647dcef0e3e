"""Training jobs of a benchmark: through the project's own commands, each computed once."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.files import write_text
from data_tools.store import open_store
from spark_dist.evaluation.metrics import read_cases
from spark_dist.training.journal import read_journal


def arguments_of(doc: str) -> argparse.ArgumentParser:
    """A parser of the arguments that all grids of jobs take: the data, where to work, and --report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nifti", type=Path, help="hippocampus task of the Medical Segmentation Decathlon")
    folder = "folder of the store, the runs and MLflow's database"
    parser.add_argument("work", type=lambda text: Path(text).absolute(), help=folder)
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    return parser


def begin(work: Path) -> None:
    """Make the folder to work in. Jobs take one core each, unless told otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work.mkdir(parents=True, exist_ok=True)


def hippocampus(nifti: Path, work: Path, labels: str) -> Path:
    """The store of the Decathlon's hippocampus task, with 60% of the cases for training and 30% for the test."""
    store, spark_data = work / "hippocampus.zarr", (sys.executable, "-m", "data_tools")
    subprocess.run([*spark_data, "prepare", nifti, store, "--layout", "msd", "--labels", labels], check=True)
    if "default" not in open_store(store).splits:
        subprocess.run([*spark_data, "split", store, "--train", "0.6", "--val", "0.1", "--test", "0.3"], check=True)
    return store


def run_job(command: str, options: Mapping, folder: Path, network: Path) -> None:
    """`spark-dist COMMAND` with options into `folder`, unless what it says of the network's test cases is there.

    Its output goes to folder/output.txt, the minutes it took to minutes.txt. Exits with a line if it fails.
    """
    if (network / "test_cases.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    line = [sys.executable, "-m", f"spark_dist.{command}", *as_options(options | {"out": folder})]
    with open(folder / "output.txt", "a") as output:
        code = subprocess.run(line, stdout=output, stderr=subprocess.STDOUT).returncode
    minutes = (time.monotonic() - begun) / 60
    if code:
        sys.exit(f"{folder} ended with {code}; see {output.name}")
    write_text(folder / "minutes.txt", f"{minutes:.2f}")
    dice = np.mean(list(of_cases(network).values()))
    print(f"{folder.parent.name:22} {folder.name:36} {dice:.4f}  {minutes:.1f} min", flush=True)


def as_options(given: Mapping) -> list[str]:
    """Options as a command takes them; a list is several values of one."""
    values = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    return [text for key, value in values.items() for text in (f"--{key}", *map(str, value))]


def of_cases(network: Path, metric: str = "dice", part: str = "test") -> dict[str, float] | None:
    """A metric of every case, if the network is finished."""
    file = network / f"{part}_cases.json"
    return {name: metrics[metric] for name, metrics in read_cases(file).items()} if file.exists() else None


@dataclass(frozen=True)
class Finding:
    """The results of one finished job of a grid, which outlive the job's folder."""

    val: float
    """The best mean Dice over the val cases while training, which chose the weights."""
    minutes: float
    dice: dict[str, float]
    """Of each test case."""
    hd95: dict[str, float]
    """Of each test case, in mm."""


def finding(folder: Path, network: Path) -> Finding | None:
    """The results of a job, if it is finished."""
    if not (network / "test_cases.json").exists():
        return None
    metrics = [event.get("metrics", {}) for _, event in read_journal(network)]
    val = max(each["val/dice"] for each in metrics if "val/dice" in each)
    minutes = float((folder / "minutes.txt").read_text())
    return Finding(val, minutes, of_cases(network), of_cases(network, "hd95"))


def collect(file: Path, jobs: Iterable[tuple[str, Path, Path]]) -> dict[str, Finding]:
    """The findings that a file keeps and those of finished jobs (name, folder, its network's), kept from now on."""
    new = {name: found for name, folder, network in jobs if (found := finding(folder, network))}
    findings = read_findings(file) | new
    if new:
        write_findings(file, findings)
    return findings


def read_findings(file: Path) -> dict[str, Finding]:
    """The findings of a grid by the names of its jobs, as `write_findings` left them."""
    if not file.exists():
        return {}
    record = json.loads(file.read_text())

    def by_case(values: Sequence[float | None]) -> dict[str, float]:
        return {case: math.inf if v is None else v for case, v in zip(record["cases"], values, strict=True)}

    return {
        name: Finding(job["val"], job["minutes"], by_case(job["dice"]), by_case(job["hd95"]))
        for name, job in record["jobs"].items()
    }


def write_findings(file: Path, findings: Mapping[str, Finding]) -> None:
    """Keep a grid's findings, a job a line; all are of the same test cases."""
    cases = sorted(next(iter(findings.values())).dice)

    def values(by_case: Mapping[str, float], digits: int) -> list[float | None]:
        return [round(by_case[case], digits) if math.isfinite(by_case[case]) else None for case in cases]

    lines = [
        f"{json.dumps(name)}: "
        + json.dumps(
            {"val": round(f.val, 5), "minutes": f.minutes, "dice": values(f.dice, 5), "hd95": values(f.hd95, 2)}
        )
        for name, f in sorted(findings.items())
    ]
    write_text(file, f'{{"cases": {json.dumps(cases)},\n"jobs": {{\n' + ",\n".join(lines) + "\n}}\n")
