import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from nifti_cases import read, rewrite_json

from data_tools.creation import create_store
from data_tools.errors import UserError
from data_tools.store import delete_case, open_store, write_case, write_split

FACTS = {
    "labels": {"organ": [1], "tumour": [2]},
    "window": {"kind": "fixed", "low": -200, "high": 300},
    "layout": "kits",
}


@pytest.fixture
def path(tmp_path):
    create_store(tmp_path / "s.zarr", FACTS)
    return tmp_path / "s.zarr"


def write(path, name="a", shape=(5, 8, 9), dtype=np.int16, **attributes):
    random = np.random.default_rng(0)
    image = random.integers(-1000, 3000, shape).astype(dtype)
    label = random.integers(0, 3, shape).astype(np.uint8)
    facts = {"affine": np.eye(4).tolist(), "spacing": [3, 1, 1], "window": [-200, 300], "source": {"image_sha256": "1"}}
    write_case(path, name, image, label, facts | attributes)
    return image, label


@pytest.mark.parametrize("slices", [1, 64, 70, 130])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_both_readers_give_what_was_written(path, slices, dtype):
    image, label = write(path, shape=(slices, 8, 9), dtype=dtype)
    case = open_store(path).cases["a"]
    assert case.shape == image.shape
    assert case.dtype == np.dtype(dtype).name
    for key, voxels in (("image", image), ("label", label)):
        for found in (read(path, "a", key), zarr.open_array(path / "cases" / "a" / key, mode="r")[...]):
            assert found.dtype == voxels.dtype
            np.testing.assert_array_equal(found, voxels)


def test_one_file_per_64_slices(path):
    write(path, shape=(130, 8, 9))
    assert sum(file.is_file() for file in (path / "cases" / "a" / "image" / "c").rglob("*")) == 3


def test_empty_chunks_are_written(path):
    write_case(path, "a", np.zeros((70, 4, 4), np.int16), np.zeros((70, 4, 4), np.uint8), {})
    for key in ("image", "label"):
        rewrite_json(path / "cases" / "a" / key / "zarr.json", fill_value=7)
        assert not read(path, "a", key).any(), "a chunk of zeros was left out, and reads as the fill value"


def test_a_flipped_bit_is_found(path):
    write(path, shape=(4, 32, 32))
    (shard,) = (file for file in (path / "cases" / "a" / "image" / "c").rglob("*") if file.is_file())
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="Digest mismatch"):
        read(path, "a", "image")


@pytest.fixture(scope="module")
def opened():
    """Files that this process opens for writing, while `opened.on`."""

    class Opened(list):
        on = False

    files = Opened()

    def hook(event, arguments):
        if files.on and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            files.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)
    return files


def test_all_that_a_killed_run_can_leave_lies_in_the_case(path, opened):
    """Even a temporary file: what lies elsewhere would stay for ever. But that the case was complete is noted last."""
    opened.on = True
    write(path)
    opened.on = False
    assert len(opened) > 4
    assert opened.pop() == path / "known" / "a"
    assert all(file.is_relative_to(path / "cases" / "a") for file in opened)


def test_two_that_make_a_store_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: create_store(tmp_path / "s.zarr", FACTS), range(8)))
    assert [file.name for file in tmp_path.iterdir()] == ["s.zarr"]
    with pytest.raises(UserError, match="made with layout"):
        create_store(tmp_path / "s.zarr", FACTS | {"layout": "lits"})


def test_label_counts(path):
    label = np.zeros((4, 3, 3), np.uint8)
    label[1, 0, 0], label[2, :2, 0], label[3, 0, 0] = 1, (1, 2), 2
    write_case(path, "a", np.zeros((4, 3, 3), np.int16), label, full())
    case = open_store(path).cases["a"]
    assert case.label_counts.tolist() == [[9, 0, 0], [8, 1, 0], [7, 1, 1], [8, 0, 1]]
    assert case.slices_with("organ").tolist() == [1, 2, 3]
    assert case.slices_with("tumour").tolist() == [2, 3]


def full():
    return {"affine": np.eye(4).tolist(), "spacing": [1, 1, 1], "window": [0, 1], "source": {}}


def test_a_case_that_fails_leaves_nothing(path, monkeypatch):
    write(path, "good")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Group, "update_attributes", fail)
    with pytest.raises(OSError, match="No space"):
        write(path, "a")
    assert list(open_store(path).cases) == ["good"]
    assert [folder.name for folder in (path / "cases").iterdir() if folder.is_dir()] == ["good"]


def test_a_case_without_its_attributes_is_invisible(path):
    write(path, "good")
    write(path, "a")
    rewrite_json(path / "cases" / "a" / "zarr.json", attributes={})
    assert list(open_store(path).cases) == ["good"]


@pytest.mark.parametrize("file", ["zarr.json", "cases/a/zarr.json", "cases/a/image/zarr.json", "splits/s/zarr.json"])
def test_metadata_that_changed_are_an_error(path, file):
    """Any change: a bit of the affine, of a key's name, of an array's codecs."""
    write(path)
    write_split(path, "s", {"train": ["a"], "val": [], "test": []})
    good = (path / file).read_bytes()
    for place in range(0, len(good), 7):
        for changed in (good[:place], good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]):
            (path / file).write_bytes(changed)
            try:
                meaning = json.loads(changed)
            except ValueError:
                meaning = None
            if meaning != json.loads(good):
                with pytest.raises(UserError, match=r"zarr\.json: |a Zarr group, but no|of version"):
                    open_store(path)
    (path / file).write_bytes(good)
    assert open_store(path)


def test_a_case_without_labels(path):
    write_case(path, "a", np.zeros((3, 4, 4), np.int16), None, full())
    case = open_store(path).cases["a"]
    assert not case.labelled
    assert case.label_counts.shape == (0, 3)
    assert not len(case.slices_with("organ"))
    assert not (path / "cases" / "a" / "label").exists()


def test_a_case_replaces_one_of_its_name(path):
    write(path, shape=(130, 8, 9))
    image, _ = write(path, shape=(3, 4, 5))
    np.testing.assert_array_equal(read(path, "a", "image"), image)
    assert open_store(path).cases["a"].shape == (3, 4, 5)


def test_delete_case(path):
    write(path, "a")
    write(path, "b")
    delete_case(path, "a")
    delete_case(path, "a")
    assert list(open_store(path).cases) == ["b"]


@pytest.mark.parametrize("name", ["..", "a/b", "", ".a", "a*", "[a]"])
def test_names_that_are_no_folders(path, name):
    with pytest.raises(UserError, match="can't be the name of a case"):
        write(path, name)
    with pytest.raises(UserError, match="can't be the name of a split"):
        write_split(path, name, {})


def test_a_store_is_made_once(path):
    write(path)
    create_store(path, FACTS)
    assert list(open_store(path).cases) == ["a"]
    with pytest.raises(UserError, match=r"s\.zarr: this store was made with layout='kits', not 'lits'"):
        create_store(path, FACTS | {"layout": "lits"})


def test_what_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no slice store"):
        create_store(tmp_path, FACTS)
    with pytest.raises(UserError, match="no slice store"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    for use in (open_store, lambda path: create_store(path, FACTS)):
        with pytest.raises(UserError, match="no slice store"):
            use(tmp_path / "other.zarr")


def test_a_store_of_another_version(path):
    write(path)
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    rewrite_json(path / "zarr.json", attributes=attributes | {"version": 0})
    with pytest.raises(UserError, match=r"s\.zarr: a slice store of version 0, and this program reads version 2; prep"):
        open_store(path)
    with pytest.raises(UserError, match=r"s\.zarr: this store was made with version=0, not 2"):
        create_store(path, FACTS)


def test_an_empty_store_and_a_damaged_one(path):
    with pytest.raises(UserError, match="no complete case"):
        open_store(path)
    write(path)
    (path / "cases" / "a" / "image" / "zarr.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"image/zarr\.json: can't be read"):
        open_store(path)


def test_a_split_never_changes(path):
    write(path)
    record = {"train": ["a"], "val": [], "test": ["b"], "seed": 0}
    write_split(path, "default", record)
    with pytest.raises(UserError, match="a split 'default' exists"):
        write_split(path, "default", record)
    store = open_store(path)
    assert store.splits == {"default": record}
    assert store.split("default", "train") == ["a"]
    with pytest.raises(UserError, match="split 'default' names cases that are not in the store: b"):
        store.split("default", "test")
    with pytest.raises(UserError, match="no split 'defalt'; did you mean default"):
        store.split("defalt", "train")


def test_the_fingerprint_follows_the_voxels_and_nothing_else(path):
    write(path)
    first = open_store(path).fingerprint()
    write_split(path, "default", {"train": ["a"], "val": [], "test": []})
    write(path)
    assert open_store(path).fingerprint() == first
    write(path, window=[-100, 300])
    second = open_store(path).fingerprint()
    write(path, source={"image_sha256": "2"})
    third = open_store(path).fingerprint()
    write(path, "b")
    assert len({first, second, third, open_store(path).fingerprint()}) == 4
