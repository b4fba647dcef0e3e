"""Stores in an object store: a local server that speaks S3."""

import os
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nibabel
import numpy as np
import pytest
from conftest import free_port
from nifti_cases import save_kits

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.location import kvstore, located, resolved
from data_tools.store import open_store


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket on a server that runs as long as this module's tests."""
    server = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", server.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            wait_for(f"{server}/moto-api/")
            located("s3://data/x").fs.mkdir("data")
            yield "s3://data"
        finally:
            process.kill()
            process.wait()


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urlopen(url).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(url)


def test_places():
    assert kvstore(located("a/b.zarr")) == {"driver": "file", "path": os.path.abspath("a/b.zarr")}
    assert str(located("s3://bucket/a/b.zarr")) == "s3://bucket/a/b.zarr"
    # What an option of type Path makes of a URL.
    assert str(located(located("x").with_name("s3:") / "bucket" / "b.zarr")) == "s3://bucket/b.zarr"
    assert kvstore(located("s3://bucket/a/b.zarr"))["path"] == "a/b.zarr/"


@pytest.mark.slow
def test_a_store_in_a_bucket_is_the_one_in_a_folder(bucket, tmp_path, capsys):
    from spark_dist.data.batches import SliceDataset
    from spark_dist.data.slices import slice_table
    from spark_dist.data.views import Crop, SliceSpec

    save_kits(tmp_path / "kits", 3)
    places = [str(tmp_path / "s.zarr"), f"{bucket}/folder/s.zarr"]
    for place in places:
        options = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
        assert main(["prepare", str(tmp_path / "kits"), place, *options]) == 0
        assert "3 prepared" in capsys.readouterr().out
        assert main(["prepare", str(tmp_path / "kits"), place, *options]) == 0
        assert "3 unchanged" in capsys.readouterr().out
        assert main(["split", place, "--train", "1", "--val", "1", "--test", "1"]) == 0
        assert main(["split", place]) == 2
        assert main(["info", place]) == 0
    local, remote = (open_store(place) for place in places)
    assert remote.fingerprint() == local.fingerprint()
    assert remote.splits == local.splits
    batches = []
    for store in (local, remote):
        table = slice_table(store, "default", "train", "organ")
        batches.append(SliceDataset(table, SliceSpec("organ", Crop((8, 8)))).__getitems__([0, 9, 18]))
    for kind in ("image", "label", "window"):
        np.testing.assert_array_equal(getattr(batches[0], kind), getattr(batches[1], kind))
    capsys.readouterr()
    assert main(["preview", places[1], "--out", str(tmp_path / "look"), "--only", "case_00000"]) == 0
    assert (tmp_path / "look" / "sheets" / "case_00000.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_store_in_a_bucket_is_verified_repaired_and_exported(bucket, tmp_path, capsys):
    kits, place = str(save_kits(tmp_path / "kits", 2)), f"{bucket}/whole.zarr"
    options = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    assert main(["prepare", kits, place, *options]) == 0
    assert main(["verify", place, "--source", kits, "--workers", "1"]) == 0
    assert "2 sound" in capsys.readouterr().out
    shard = located(place) / "cases" / "case_00001" / "image" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(bytes(data))
    assert main(["verify", place, "--workers", "1"]) == 1
    assert "error: case_00001: image slice" in capsys.readouterr().err
    assert main(["verify", place, "--source", kits, "--repair", "--workers", "2"]) == 0
    assert "1 repaired" in capsys.readouterr().out
    for kind, options in (("imaging", []), ("segmentation", ["--label"])):
        out, source = tmp_path / f"{kind}.nii.gz", tmp_path / "kits" / "case_00001" / f"{kind}.nii.gz"
        assert main(["export", place, "case_00001", str(out), *options]) == 0
        found, whole = nibabel.load(out), nibabel.load(source)
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.asanyarray(whole.dataobj))
        np.testing.assert_array_equal(found.affine, whole.affine)
    assert main(["stats", place, "--out", str(tmp_path / "stats.png")]) == 0
    assert (tmp_path / "stats.png").stat().st_size > 10_000


def test_damage_in_a_bucket_is_found(bucket, tiny_store, capsys):
    from spark_dist.data.batches import SliceDataset
    from spark_dist.data.slices import slice_table
    from spark_dist.data.views import Crop, SliceSpec

    place = located(f"{bucket}/damaged.zarr")
    place.fs.put(str(tiny_store), place.path, recursive=True)
    table = slice_table(open_store(place), "default", "train", "organ")
    assert SliceDataset(table, SliceSpec("organ", Crop((16, 16)))).__getitems__([0]).label.any()
    shard = place / "cases" / "case_00000" / "image" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(bytes(data))
    rows = np.flatnonzero(table.case == 0) * 8
    with pytest.raises(UserError, match=r"case_00000 slice \d is damaged"):
        SliceDataset(table, SliceSpec("organ", Crop((16, 16)))).__getitems__(rows)
    place.fs.rm(shard.path)
    with pytest.raises(UserError, match=r"case_00000 slice \d is damaged"):
        SliceDataset(table, SliceSpec("organ", Crop((16, 16)))).__getitems__([0])


@pytest.mark.parametrize("address", ["s3://data/nothing.zarr", "s3://no-such-bucket/s.zarr"])
def test_what_is_not_there_is_one_line(bucket, address, capsys):
    assert main(["info", address]) == 2
    assert capsys.readouterr().err.startswith(f"error: {address}: no slice store here")


def test_a_server_that_is_down_is_one_line(bucket, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    located("s3://data/s.zarr").fs.clear_instance_cache()
    try:
        assert main(["info", "s3://data/s.zarr"]) == 2
    finally:
        located("s3://data/s.zarr").fs.clear_instance_cache()
    assert "s3://data/s.zarr" in (error := capsys.readouterr().err)
    assert "can't be reached" in error
    assert len(error.splitlines()) == 1


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "upath", None)
    assert main(["info", "s3://data/s.zarr"]) == 2
    assert capsys.readouterr().err == ("error: s3://data/s.zarr: upath is missing; pip install 'spark-dist[cloud]'\n")


@pytest.mark.parametrize("place", ["../s.zarr", "link/../../s.zarr", "../other/deep/../../s.zarr", "linked.zarr"])
def test_paths_through_parents_and_links(tmp_path, monkeypatch, capsys, place):
    """What a shell takes for the store, every command takes for it."""
    save_kits(tmp_path / "kits", 1)
    line = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    assert main(["prepare", str(tmp_path / "kits"), str(tmp_path / "s.zarr"), *line]) == 0
    (tmp_path / "work").mkdir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "other" / "deep")
    (tmp_path / "work" / "linked.zarr").symlink_to("../s.zarr")
    monkeypatch.chdir(tmp_path / "work")
    if not os.path.exists(place):
        (tmp_path / "other" / "s.zarr").symlink_to(tmp_path / "s.zarr")
    capsys.readouterr()
    assert main(["verify", place, "--workers", "1"]) == 0
    assert main(["prepare", "../kits", place, *line]) == 0
    assert "1 unchanged" in capsys.readouterr().out
    assert main(["export", place, "case_00000", "out.nii.gz"]) == 0
    assert main(["preview", place, "--out", "look"]) == 0
    assert resolved(located(place)) == tmp_path / "s.zarr"
