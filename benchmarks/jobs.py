"""Training jobs of a benchmark: through the project's own commands, each computed once."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.files import write_text
from data_tools.store import open_store
from spark_dist.evaluation.metrics import read_cases


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
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def of_cases(network: Path, metric: str = "dice", part: str = "test") -> dict[str, float] | None:
    """A metric of every case, if the network is finished."""
    file = network / f"{part}_cases.json"
    return {name: metrics[metric] for name, metrics in read_cases(file).items()} if file.exists() else None
