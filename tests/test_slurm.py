"""The batch scripts, on a real SLURM of two nodes on this machine; without one, what they would run."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time

import pytest
import torch
from conftest import ROOT, installing

from data_tools.store import open_store, write_splits
from spark_dist.training.checkpoint import load_state, newest_state

SCRIPTS = [*sorted((ROOT / "launch" / "slurm").glob("*.s*")), *sorted((ROOT / "launch").glob("*.sh"))]
SMALL = "--crop 32 --crop-shift [0,0] --batch-size 6 --log-every 1 --checkpoint-steps 2 --student-width 0.25"
SMALL += " --slices labelled"
RECIPE = """
dataset: {store}
task: organ
crop: 32
crop_shift: [0, 0]
batch_size: 6
epochs: 2
log_every: 1
teacher: unet
teacher_width: 0.05
student: enet
student_width: 0.25
method: kd
cache_folder: {folder}/cache
tracking_uri: sqlite:///{folder}/mlflow.db
experiment: pipeline
"""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    result = subprocess.run(["shellcheck", "-x", "-P", ROOT, path], capture_output=True, text=True)
    assert not result.returncode, result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "printed"),
    [
        ("prepare", "DATA kits.zarr --layout kits", "spark-data prepare DATA kits.zarr --layout kits --part 3/4"),
        ("train", "--network unet", "--num-machines 2 --num-processes 8 --main-process-ip localhost"),
        ("distill", "--method kd", "--rdzv-backend c10d -m spark_dist.distill --method kd"),
        ("cache", "--method kd", "-m spark_dist.cache --method kd"),
        ("sweep", "launch/slurm/sweep.yaml", "-m spark_dist.distill --method=kd --student=mobilenetv2 --seed=1"),
    ],
)
def test_dry_run(script, arguments, printed):
    line = ["bash", f"launch/slurm/{script}.sbatch", "--dry-run", *arguments.split()]
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_ARRAY_TASK_ID": "3"}
    environment = os.environ | job | {"SLURM_ARRAY_TASK_COUNT": "4"}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert printed in result.stdout, result.stderr


def test_dry_run_of_a_fold(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "s.zarr")
    fold = {"train": ["case_00000"], "val": ["case_00001"], "test": ["case_00002"], "seed": 0}
    write_splits(tmp_path / "s.zarr", {f"cv-fold{k}": fold | {"made": {"fold": k, "folds": 3}} for k in range(3)})
    line = ["bash", "launch/slurm/crossval.sbatch", "--dry-run", "train", "--dataset", tmp_path / "s.zarr"]
    line += ["--task", "organ", "--network", "enet", "--split", "cv"]
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "-m spark_dist.train" in result.stdout, result.stderr
    assert "--split=cv-fold2" in result.stdout


def pipeline(*line, **environment):
    line = ["bash", "launch/slurm/pipeline.sh", *map(str, line), "DATA", "--layout", "kits"]
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_pipeline_reads_its_recipe_as_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "dataset: \"our data.zarr\"  # on scratch\ntask: 'organ' # or tumour\nteacher_width: 0.25 # small\n"
    )
    result = pipeline("--dry-run", tmp_path / "recipe.yaml")
    jobs = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(jobs) == 6, result.stderr
    assert "our data.zarr" in jobs[0]
    assert shlex.split(jobs[1][-1])[-1] == "our data.zarr"
    assert jobs[2][-6:] == ["--network", "unet", "--width", "0.25", "--out", "runs/our data-organ/teacher"]
    assert shlex.split(jobs[5][-1])[-1] == "our data-organ"
    (tmp_path / "recipe.yaml").write_text("task: organ\n")
    result = pipeline("--dry-run", tmp_path / "recipe.yaml")
    assert result.returncode
    assert result.stderr == f"error: {tmp_path}/recipe.yaml: has no dataset; the pipeline needs both\n"


def test_the_pipeline_run_again_goes_on_at_the_split(tiny_store, tmp_path):
    """Which somebody made in another way."""
    shutil.copytree(tiny_store, tmp_path / "s.zarr")
    (tmp_path / "recipe.yaml").write_text(f"dataset: {tmp_path}/s.zarr\ntask: organ\n")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    # What is a command of its own is run at once, and a failure ends the chain.
    sbatch.write_text('#!/bin/bash\nif [[ "$*" == *"spark-data split"* ]]; then bash -c "${@: -1}" >&2; fi && echo 7\n')
    sbatch.chmod(0o755)
    result = pipeline(tmp_path / "recipe.yaml", PATH=f"{sbatch.parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert "5 train, 3 val, 3 test, seed 0; it stays as it is" in result.stderr
    assert result.stdout.count("--dependency=afterok:7") == 5


def test_a_grid_with_a_mistake(tmp_path, capsys):
    from spark_dist.cli import main

    (tmp_path / "grid.yaml").write_text("metod: [kd]\n")
    assert main(["sweep", str(tmp_path / "grid.yaml")]) == 2
    assert "did you mean method" in capsys.readouterr().err
    assert main(["sweep", str(ROOT / "launch" / "slurm" / "sweep.yaml"), "--task", "13"]) == 2
    assert "has 12 combinations" in capsys.readouterr().err


class Cluster:
    """A SLURM that was started for these tests."""

    def __init__(self, box):
        self.box, self.folder = box, tempfile.mkdtemp(prefix="slurm-")
        os.chmod(self.folder, 0o755)  # munge asks for it
        self.environment = os.environ | {"SLURM_BOX_DIR": self.folder, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment |= {"ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml"}

    def __call__(self, *line, check=True, **environment):
        line = ["bash", self.box, *map(str, line)]
        environment = self.environment | environment
        result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
        assert not check or not result.returncode, result.stdout + result.stderr
        return result.stdout

    def submit(self, *line, **environment):
        """The number of a job."""
        return self("exec", "sbatch", "--parsable", *line, **environment).split(";")[0].strip()

    def restarts(self, job):
        return int(re.search(r"Restarts=(\d+)", self("exec", "scontrol", "show", "job", job))[1])


@pytest.fixture(scope="module")
def slurm(shared):
    box = shared / "tools" / "slurm_box.sh"
    if os.geteuid() or not box.exists():
        pytest.skip("starting a SLURM takes root and slurm_box.sh")
    cluster = Cluster(box)
    with installing():
        cluster("up")
    yield cluster
    cluster("down")
    shutil.rmtree(cluster.folder, ignore_errors=True)


def logs(folder):
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


@pytest.fixture(scope="module")
def piped(slurm, tmp_path_factory):
    """The pipeline from volumes to the comparison, run on two nodes."""
    folder = tmp_path_factory.mktemp("pipeline")
    subprocess.run(["spark-data", "phantom", folder / "nifti", "--cases", "10", "--size", "48"], check=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(store=folder / "phantom.zarr", folder=folder))
    line = ["exec", "launch/slurm/pipeline.sh", folder / "recipe.yaml", folder / "nifti", "--layout", "kits"]
    line += ["--labels", "organ=1,tumour=2"]
    flags = f"--output={folder}/%x-%j.log --gpus-per-node=1 --nodes=1"
    tracking = f"--tracking-uri sqlite:///{folder}/mlflow.db --experiment pipeline"
    slurm(*line, PARTS="4", SBATCH_FLAGS=flags, RUNS=str(folder / "runs"), COMPARE=tracking)
    jobs = slurm("exec", "squeue", "-h", "-o", "%A").split()
    last = max(map(int, jobs))
    slurm("wait", last, 700, check=False)
    return folder


@pytest.mark.slow
def test_the_pipeline_runs_end_to_end(piped):
    assert len(open_store(piped / "phantom.zarr").cases) == 10, logs(piped)
    assert (piped / "runs" / "phantom-organ" / "distilled" / "student" / "test_cases.json").exists(), logs(piped)
    (compared,) = piped.glob("spark-compare-*.log")
    assert "kd" in compared.read_text(), logs(piped)
    assert "0 by a teacher forward" in next(piped.glob("spark-distill-*.log")).read_text()


@pytest.mark.slow
def test_a_job_on_two_nodes_that_is_preempted_twice_ends_as_an_undisturbed_one(slurm, jobs, tiny_store, tmp_path):
    options = ["--dataset", tiny_store, "--task", "organ", *SMALL.split(), "--teacher", "unet", "--teacher-width", 0.05]
    options += ["--method", "kd", "--epochs", 40, "--teacher-epochs", 2, "--cache-folder", tmp_path / "cache"]
    options += ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    sbatch = [f"--output={tmp_path}/%x-%j.log", "--nodes=2", "--gpus-per-node=1"]
    job = slurm.submit(*sbatch, "launch/slurm/distill.sbatch", *options, "--out", tmp_path / "preempted")
    states = tmp_path / "preempted" / "student" / "checkpoints"
    for number, preempt in enumerate((("scontrol", "requeue", job), ("scancel", "--batch", "--signal=USR1", job))):
        end = time.monotonic() + 600
        while "RUNNING" not in slurm("exec", "squeue", "-h", "-o", "%T"):
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.2)
        before = max(states.glob("step-*.pt"), default=None)
        while max(states.glob("step-*.pt"), default=None) == before:
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.05)
        slurm("exec", *preempt)
        while slurm.restarts(job) == number:
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.2)
    slurm("wait", job, 500)
    assert slurm.restarts(job) == 2
    assert "back into the queue" in logs(tmp_path)
    codes, log = jobs("distill", *options, "--out", "whole", folder=tmp_path / "on-one", processes=2)
    assert codes == [0, 0], log
    whole, parts = (
        load_state(newest_state(folder / "student" / "checkpoints"))
        for folder in (tmp_path / "on-one" / "whole", tmp_path / "preempted")
    )
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert whole["best"] == parts["best"]


@pytest.mark.slow
def test_a_sweep_is_an_array_whose_runs_stand_below_one(slurm, piped, tmp_path):
    import mlflow

    (tmp_path / "grid.yaml").write_text("method: [kd, at]\nstudent: [enet]\nseed: [1, 2]\n")
    teacher = piped / "runs" / "phantom-organ" / "teacher" / "network" / "best.safetensors"
    array = slurm.submit(
        *(f"--output={tmp_path}/%x-%A-%a.log", "--gpus-per-node=1", "--array=1-4", "launch/slurm/sweep.sbatch"),
        *(tmp_path / "grid.yaml", "--config", piped / "recipe.yaml", "--teacher-checkpoint", teacher),
        *("--tracking-uri", f"sqlite:///{tmp_path}/sweep.db"),
        RUNS=str(tmp_path),
    )
    slurm("wait", array, 500)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/sweep.db")
    runs = client.search_runs([client.get_experiment_by_name("pipeline").experiment_id])
    (above,) = (run for run in runs if run.data.tags.get("sweep") == "grid")
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == above.info.run_id]
    assert len(below) == 4
    line = ["spark-dist", "compare", "--tracking-uri", f"sqlite:///{tmp_path}/sweep.db", "--experiment", "pipeline"]
    table = subprocess.run(line, cwd=ROOT, env=slurm.environment, capture_output=True, text=True).stdout
    assert table.count("kd") >= 2
    assert table.count(" at ") >= 2
