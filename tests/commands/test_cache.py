"""Teacher caches as users fill, list, check and lose them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, model_card
from nifti_cases import all_files
from safetensors.torch import load_file

from data_tools.location import open_array
from data_tools.ownership import fingerprint, mark
from data_tools.workers import signature
from spark_dist.cli import main
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.training.frozen_teacher import only_generation

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 8, "--student-width", 0.25)
SMALL += ("--slices", "labelled")


@pytest.fixture(scope="module")
def job(tiny_store, tmp_path_factory):
    """The options of a distill job with a teacher."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "best.safetensors"
    save_network(path, build_network("unet", width=0.05), model_card(network="unet", width=0.05))
    return ("--dataset", tiny_store, *SMALL, "--teacher-checkpoint", path, "--method", "spark", "--epochs", 2)


@pytest.fixture
def cache(job, tmp_path, monkeypatch, capsys):
    """A function that runs the command in this process and returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, code=0, options=job):
        assert main(["cache", *map(str, options), "--cache-folder", "caches", *map(str, arguments)]) == code
        out = capsys.readouterr()
        return out.out + out.err

    return run


def entries(root):
    """The bytes of every entry of the one cache in a folder: key → array → bytes."""
    (folder,) = (path.parent for path in root.glob("*/segments"))
    found = {}
    for segment in sorted((folder / "segments").iterdir()):
        if segment.suffix == ".tmp":
            continue
        arrays = {p.name: open_array(p).read().result() for p in segment.iterdir() if p.is_dir()}
        for row, key in enumerate(arrays.pop("keys")):
            entry = {name: values[row].tobytes() for name, values in arrays.items()}
            assert found.setdefault(int(key), entry) == entry
    return found


@pytest.mark.launch
@pytest.mark.slow
def test_entries_are_the_same_to_the_byte_for_any_number_of_processes_and_after_kills(launch, job, tmp_path):
    found = {}
    for processes in (1, 2, 3):
        folder = f"of-{processes}"
        output = launch(processes, "cache", *job, "--cache-folder", folder, cwd=tmp_path)
        found[processes] = entries(tmp_path / folder)
        n = len(found[processes])
        assert f"{n} of {n} entries" in output.stdout
    assert len(found[1]) > 30
    assert found[1] == found[2] == found[3]

    line = [sys.executable, "-c", "import spark_dist.data.cache as t; t.SEGMENT_BYTES = 50_000\n"]
    line[2] += "from spark_dist.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    line += ["cache", *map(str, job), "--cache-folder", "killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    draw = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob("killed/*/segments/*")):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    launch(2, "cache", *job, "--cache-folder", "killed", cwd=tmp_path)
    assert entries(tmp_path / "killed") == found[1]


def test_filled_listed_verified_and_pruned(cache, tmp_path):
    assert "0 of" in cache()
    n = len(entries(tmp_path / "caches"))
    assert f"{n} of {n} entries there" in cache()
    assert "4 entries computed again: 0 differ, 0 damaged" in cache("--verify", 4)
    table = cache("--list", options=())
    assert all(word in table for word in ("unet ×0.05", "spark", "tiny organ", "32×32", "float16", f" {n} ", "MiB"))
    cache("--prune", 1, options=())
    assert entries(tmp_path / "caches")
    assert "removed" in cache("--prune", 0, options=())
    assert not list((tmp_path / "caches").iterdir())
    assert "no such folder" in cache("--list", "--cache-folder", "nowhere", code=2, options=())
    assert "give the options of the distill job" in cache(code=2, options=())


def test_only_what_bears_a_caches_mark_is_pruned(cache, tmp_path):
    cache()
    (ours,) = (tmp_path / "caches").iterdir()
    (tmp_path / "caches" / "patient" / "segments").mkdir(parents=True)
    (tmp_path / "caches" / "patient" / "segments" / "liver.nrrd").write_bytes(b"x")
    for name, description in (("copy", None), ("edited", b"{}"), ("empty", b"")):
        shutil.copytree(ours, tmp_path / "caches" / name)
        if description is not None:
            (tmp_path / "caches" / name / "description.json").write_bytes(description)
    shutil.copytree(ours, tmp_path / "elsewhere" / ours.name)
    (tmp_path / "caches" / "job").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(ours)
    ours.symlink_to(tmp_path / "elsewhere" / ours.name)
    before = all_files(tmp_path)
    said = cache("--prune", 0, options=())
    assert all(f"caches/{name}: left alone" in said for name in ("patient", "copy", "edited", "empty"))
    assert "is a link" in said
    assert all_files(tmp_path) == before


def test_of_what_killed_processes_left_in_a_cache_only_the_old_and_its_own_is_pruned(cache, tmp_path):
    cache()
    (folder,) = (tmp_path / "caches").iterdir()
    name = f"{time.time_ns():020}-0123abcd"
    places = [folder / "trial-0123abcd.tmp/segments/x", folder / f"segments/{name}.tmp/keys"]
    places += [folder / f".description.json.{signature(os.getpid())}.tmp"]
    theirs = [folder / "trial-notes.tmp/x", folder / "segments/notes.tmp", folder / ".description.json.notes.tmp"]
    for place in (*places, *theirs):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"x")
    before = all_files(tmp_path)
    cache("--prune", 1, options=())
    assert all_files(tmp_path) == before
    aged = [path for path in folder.rglob("*") if path.name != "description.json"]
    for path in aged:
        os.utime(path, (0, 0))
    cache("--prune", 1, options=())
    gone = {str(place.relative_to(tmp_path)) for place in places}
    assert all_files(tmp_path) == {path: data for path, data in before.items() if path not in gone}
    # Segments behind a link are somebody else's.
    (folder / "segments").rename(tmp_path / "elsewhere")
    (folder / "segments").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / f"{name}.tmp").mkdir()
    os.utime(tmp_path / "elsewhere" / f"{name}.tmp", (0, 0))
    cache("--prune", 1, options=())
    assert (tmp_path / "elsewhere" / f"{name}.tmp").exists()


def test_a_generation_that_is_over_is_removed_and_nothing_else(tmp_path, monkeypatch):
    def generation(weights, **facts):
        facts = {"version": 2, "method": "spark", "teacher_weights": weights} | facts
        folder = tmp_path / "caches" / fingerprint(facts)
        mark(folder, "cache", **facts)
        (folder / "segments").mkdir()
        (folder / "segments" / "keys").write_bytes(b"x")
        return folder

    monkeypatch.chdir(tmp_path)
    job = SimpleNamespace(folder=tmp_path / "job", accelerator=Accelerator(cpu=True))
    first, second, other = generation("1"), generation("2"), generation("3", method="kd")
    only_generation(job, first)
    only_generation(job, first)
    assert first.exists()
    only_generation(job, second)
    assert sorted(path for path in first.parent.iterdir()) == sorted([second, other])

    moved = tmp_path / "elsewhere" / second.name
    shutil.copytree(second, moved)
    before = {path: data for path, data in all_files(tmp_path).items() if "generation" not in path}
    for text in ("", " ", ".", "..", str(tmp_path), str(moved), "caches", str(other), other.name, "a\0b", "\udcff"):
        (tmp_path / "job" / "generation.txt").write_text(text, errors="surrogateescape")
        only_generation(job, second)
        assert {path: data for path, data in all_files(tmp_path).items() if "generation" not in path} == before, text


def test_a_cache_folder_is_reached_through_parents_and_links(cache, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    for folder in ("deep/../caches-1", "link/../caches-2"):
        said = cache("--cache-folder", folder)
        assert "writing ends here" not in said
        assert "0 of" in said
    assert entries(tmp_path / "caches-1") == entries(tmp_path / "deep" / "caches-2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_format_is_verified(cache, dtype):
    cache("--cache-dtype", dtype)
    assert "6 entries computed again: 0 differ, 0 damaged" in cache("--cache-dtype", dtype, "--verify", 6)


def test_entries_of_another_teacher_are_found(cache, tmp_path):
    cache()
    for path in tmp_path.glob("caches/*/segments/*/keys"):
        array = np.array(open_array(path).read().result())
        order = np.random.default_rng(0).permutation(len(array))
        import tensorstore as ts

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        ts.open(spec, open=True).result().write(array[order]).result()
    assert "differ" in cache("--verify", 6, code=2)


def test_a_damaged_entry_is_found_and_written_anew(cache, tmp_path):
    cache()
    before = entries(tmp_path / "caches")
    flip(tmp_path / "caches")
    with pytest.raises(ValueError, match="Digest mismatch"):
        entries(tmp_path / "caches")
    assert "1 damaged and written anew" in cache("--verify", 1000)
    assert "0 differ, 0 damaged" in cache("--verify", 1000)
    assert len(before) > 30


def flip(root):
    """Flip one bit of one entry; returns the file."""
    shard = sorted(root.glob("*/segments/*/low/c/0/0/0/0"))[0]
    data = bytearray(shard.read_bytes())
    data[100] ^= 8
    shard.write_bytes(data)


@pytest.mark.launch
@pytest.mark.slow
def test_a_flipped_bit_changes_nothing_but_the_log(launch, job, tmp_path):
    logs = {}
    for name in ("whole", "damaged"):
        options = (*job, "--cache", "on", "--cache-folder", f"cache-{name}", "--out", name)
        launch(1, "cache", *job, "--cache-folder", f"cache-{name}", cwd=tmp_path)
        if name == "damaged":
            flip(tmp_path / "cache-damaged")
        logs[name] = launch(1, "distill", *options, cwd=tmp_path)
    assert "0 by a teacher forward" in logs["whole"].stdout
    assert "1 damaged entries" in logs["damaged"].stdout
    assert "computed again" in logs["damaged"].stderr
    a, b = (load_file(tmp_path / name / "student" / "best.safetensors") for name in logs)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.launch
@pytest.mark.slow
def test_auto_takes_the_faster_to_the_same_weights(job, tmp_path):
    """Once the teacher is made to dawdle, once the reading."""
    start = "import sys, time, spark_dist.networks.unet as u, spark_dist.data.cache as c\n"
    start += "def dawdle(f): return lambda *a: (time.sleep(1), f(*a))[1]\n"
    dawdling = {
        "teacher": "u.UNet.forward = dawdle(u.UNet.forward)\n",
        "reading": "c.TeacherCache.start_reading = dawdle(c.TeacherCache.start_reading)\n",
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = (*job, "--augment", "none")  # Else, nothing is seen twice in so few epochs.
    said = {}
    for name, code in dawdling.items():
        code = start + code + "from spark_dist.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", code, "distill", *map(str, job), "--cache-folder", f"cache-{name}", "--out", name]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        said[name] = done.stdout
    assert "ms by the teacher" in said["teacher"]
    assert "--cache auto: uses the cache" in said["teacher"]
    assert list(tmp_path.glob("cache-teacher/*/segments/*"))
    assert "--cache auto: computes the teacher at every step" in said["reading"]
    assert not list(tmp_path.glob("cache-reading/*/segments/*"))
    a, b = (load_file(tmp_path / name / "student" / "best.safetensors") for name in dawdling)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.launch
@pytest.mark.slow
def test_canonical_keeps_one_entry_a_slice_and_says_how_far_off_it_is(launch, job, tmp_path):
    output = launch(1, "distill", *job, "--cache", "canonical", "--out", "job", cwd=tmp_path).stdout
    assert "turned features: approximate" in output
    keys = entries(tmp_path / "runs" / "teacher-cache")
    assert all(key % 8 == 0 for key in keys)
    assert f"{len(keys)} targets read from the cache, {len(keys)} by a teacher forward" in output


@pytest.mark.slow
def test_a_full_disk_ends_caching_and_training_goes_on(launch, job, small_disk, tmp_path):
    small = small_disk("200k")
    options = (*job, "--cache-folder", small / "cache")
    done = launch(1, "distill", *options, "--cache", "on", "--out", "job", cwd=tmp_path)
    assert "no room" in done.stdout
    assert "training goes on without" in done.stderr
    assert (tmp_path / "job" / "student" / "test_cases.json").exists()
    assert "make room" in launch(1, "cache", *options, cwd=tmp_path, code=2).stderr
