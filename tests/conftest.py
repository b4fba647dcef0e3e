import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_tools.creation import create_store
from data_tools.store import write_case, write_split
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.networks.checkpoint import ModelCard

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SPARK_DIST_SHARED", ROOT.parent / "shared"))


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write the tables of docs/ that tests make")
    parser.addoption("--thorough", action="store_true", help="with the tests marked thorough")
    parser.addoption(
        "--record-traces", action="store_true", help="record what tests/test_golden_traces.py compares with"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--thorough") or config.getoption("--write-tables"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
    items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def thorough_but(cases, always):
    """Parameters of a test of which only some are tried in every run, the others with --thorough."""
    return [pytest.param(case, marks=() if case in always else pytest.mark.thorough) for case in cases]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real volumes and reference values that lie beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED} (set SPARK_DIST_SHARED)")
    return SHARED


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of its own that is as small as asked for: small_disk("64k")."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(line, check=False, capture_output=True).returncode:
            pytest.skip("a small disk can't be mounted here (needs root)")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """Eleven small cases with a bright organ and a tumour in it; an odd number of test cases and of slices."""
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    create_store(
        path,
        {
            "labels": {"organ": [1], "tumour": [2]},
            "window": {"kind": "fixed", "low": -200, "high": 300},
            "layout": "kits",
        },
    )
    random = np.random.default_rng(0)
    names = [f"case_{k:05}" for k in range(11)]
    for k, name in enumerate(names):
        shape = (5 + k % 3, 40 + k, 44)
        z, y, x = np.indices(shape)
        distance = np.hypot((y - 18 - k % 4) / 9, (x - 20 + k % 5) / 7)
        label = ((distance < 1) & (z > 0)).astype(np.uint8)
        label[(distance < 0.4) & (z > 1)] = 2
        image = np.where(label > 0, 120, -20) + np.where(label == 2, -50, 0) + random.normal(0, 40, shape)
        write_case(
            path,
            name,
            image.round().astype(np.int16),
            label,
            {
                "affine": np.diag([3.0, 0.8, 0.7, 1.0]).tolist(),
                "spacing": [3.0, 0.8, 0.7],
                "window": [-200.0, 300.0],
                "source": {"image": f"{name}.nii.gz", "image_sha256": str(k)},
            },
        )
    write_split(path, "default", {"train": names[:5], "val": names[5:8], "test": names[8:], "seed": 0})
    return path


@pytest.fixture(scope="session")
def launch():
    """Run a module of spark_dist as users do, or a script of these tests: launch(2, "train", "--epochs", 1, cwd=…)
    starts two processes."""

    def run(processes: int, command: str, *arguments, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
        start = [sys.executable, "-m"]
        if processes > 1:
            config = ROOT / "accelerate_config.yaml"
            start += ["accelerate.commands.launch", "--config_file", config, "--num_processes", processes]
            start += ["--main_process_port", free_port(), "-m"]
        if command.endswith(".py"):
            start, command = start[:-1], ROOT / "tests" / "scripts" / command
        else:
            command = f"spark_dist.{command}"
        line = [str(part) for part in [*start, command, *arguments]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-6000:]}"
        return result

    return run


@contextmanager
def keep_signals():
    """Jobs that run in the tests' own process leave its signal handlers as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def model_card(**facts) -> ModelCard:
    """The card of a network that was trained on the tiny store."""
    usual = {"network": "enet", "width": 0.25, "seed": 0, "dataset": "tiny", "split": "default"}
    usual |= {"spec": SliceSpec("organ", Crop((32, 32)))}
    return ModelCard(**usual | facts)


def undecided(network: nn.Module) -> nn.Module:
    """A network of random weights whose last layer is shifted and scaled so that it predicts half of what looks like a
    slice of these stores as the target, and is neither sure nor unsure."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    inside = (rows - 22).hypot(columns - 24) < 9
    with torch.no_grad():
        logits = network.eval()(torch.where(inside, 0.3, -0.3) + 0.16 * torch.randn(4, 1, 48, 48)).logits
        margin = logits[:, 1] - logits[:, 0]
        weight, bias = list(network.parameters())[-2:]
        assert len(weight) == len(bias) == 2
        scale = 2 / margin.std()
        weight *= scale
        bias *= scale
        bias[1] -= margin.median() * scale
    return network


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def jobs():
    """Run a module of spark_dist as a job of some processes, with a fault if there shall be one, and return the exit
    codes and the output (see scripts/jobs.py)."""
    server = subprocess.Popen(
        # Not as a script, which the jobs' data workers would import again.
        [sys.executable, "-c", "import jobs; jobs.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests/scripts"},
    )

    def run(command, *arguments, folder: Path, processes: int = 1, **fault):
        folder.mkdir(exist_ok=True)
        job = {"command": command, "arguments": [str(a) for a in arguments], "folder": str(folder)}
        print(json.dumps(job | {"processes": processes, "fault": fault or None}), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        return answer["codes"], Path(answer["log"]).read_text()

    yield run
    server.stdin.close()
    server.wait(120)


@contextmanager
def installing() -> Iterator[None]:
    """Installing Debian's packages: one process of the tests at a time, since apt waits for nobody."""
    with open(Path(tempfile.gettempdir()) / "spark-dist-tests.apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def mlflow_server(folder: Path, port: int, **settings: str) -> Iterator[subprocess.Popen]:
    """An MLflow server with everything in a folder, as launch/mlflow_server.sh starts it, once it answers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PORT": str(port), "WORKERS": "1", "PATH": path} | settings
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "a") as output:
        line = ["bash", ROOT / "launch" / "mlflow_server.sh", folder]
        server = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.2)
        else:
            raise AssertionError(f"the server does not answer: {log.read_text()}")
        yield server
    finally:
        kill(server)


def kill(process: subprocess.Popen) -> None:
    """Kill a process that has a session of its own, with all of it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
