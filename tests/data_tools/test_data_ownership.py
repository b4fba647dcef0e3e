"""What is not ours stays: folders and files of the same names and shapes as those that this program removes."""

import json
import os
import shutil

import pytest
from nifti_cases import all_files

from data_tools.errors import UserError
from data_tools.ownership import (
    MADE_BY,
    check_free,
    check_output,
    fingerprint,
    made_here,
    mark,
    owned,
    remove_owned,
)
from data_tools.store import create_store

CACHE = {"version": 2, "method": "spark", "crop": [8, 8]}


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "caches" / fingerprint(CACHE)
    mark(folder, "cache", **CACHE)
    (folder / "segments" / "1").mkdir(parents=True)
    (folder / "segments" / "1" / "keys").write_bytes(b"x")
    return folder


def test_a_marked_folder_is_ours_and_is_removed(cache, tmp_path):
    assert owned(cache, "cache") == {"format": "spark-dist teacher cache", **CACHE}
    assert owned(cache, "job") is owned(cache, "store") is None
    remove_owned(cache, "cache")
    assert list((tmp_path / "caches").iterdir()) == []
    mark(tmp_path / "job", "job", seed=3)
    mark(tmp_path / "job", "job", seed=4)
    assert owned(tmp_path / "job", "job")["seed"] == 4
    assert [file.name for file in (tmp_path / "job").iterdir()] == ["job.json"]
    create_store(tmp_path / "s.zarr", {"labels": {"organ": [1]}})
    assert owned(tmp_path / "s.zarr", "store")["labels"] == {"organ": [1]}


def test_a_cache_of_an_earlier_version_is_ours(cache):
    description = {key: value for key, value in CACHE.items() if key != "version"}
    (cache / "description.json").write_text(json.dumps(description))
    assert owned(cache, "cache")["method"] == "spark"


@pytest.mark.parametrize(
    "change",
    {
        "renamed": lambda folder: folder.rename(folder.with_name("cache")),
        "no mark": lambda folder: (folder / "description.json").unlink() or folder,
        "another's": lambda folder: (folder / "description.json").write_text('{"format": "x"}') and folder,
        "edited": lambda folder: (folder / "description.json").write_text(json.dumps(CACHE | {"crop": [9]})) and folder,
        "a list": lambda folder: (folder / "description.json").write_text("[]") and folder,
        "deep": lambda folder: (folder / "description.json").write_text("[" * 100_000) and folder,
        "empty": lambda folder: (folder / "description.json").write_bytes(b"") or folder,
        "a link": lambda folder: folder.with_name("elsewhere").symlink_to(folder) or folder.with_name("elsewhere"),
    }.values(),
)
def test_any_other_folder_of_this_shape_stays(cache, tmp_path, change):
    folder = change(cache)
    before = all_files(tmp_path)
    for kind in ("cache", "store", "job"):
        for patterns in (None, ["**/*"]):
            with pytest.raises(UserError, match="so nothing of it is removed"):
                remove_owned(folder, kind, patterns)
    assert all_files(tmp_path) == before


def test_a_link_in_the_place_of_a_folder_of_ours(cache, tmp_path):
    moved = cache.rename(tmp_path / cache.name)
    cache.symlink_to(moved)
    before = all_files(moved)
    with pytest.raises(UserError, match="is a link to"):
        remove_owned(cache, "cache")
    assert all_files(moved) == before


def test_what_lies_behind_a_link_stays(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.png").write_bytes(b"x")
    job = tmp_path / "job"
    mark(job, "job")
    (job / "linked").symlink_to(tmp_path / "theirs")
    (job / "a.png").write_bytes(b"x")
    (job / "notes.txt").write_text("x")
    remove_owned(job, "job", ["*.png", "linked/*.png", "../theirs/*.png"])
    assert sorted(os.listdir(job)) == ["job.json", "linked", "notes.txt"]
    remove_owned(job, "job")
    assert os.listdir(tmp_path / "theirs") == ["a.png"]


def test_only_a_new_folder_or_one_of_ours_is_free(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (cache, tmp_path / "empty", tmp_path / "new"):
        check_free(folder, "cache")
    shutil.rmtree(cache / "segments")
    for folder, kind in ((cache, "job"), (tmp_path, "job"), (cache / "description.json", "cache")):
        with pytest.raises(UserError, match="name an empty or new folder"):
            check_free(folder, kind)


def test_a_mark_of_another_cache_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not the name of a cache"):
        mark(tmp_path / "mine", "cache", **CACHE)
    assert not list(tmp_path.iterdir())


def test_only_what_says_so_was_made_here(tmp_path):
    file = tmp_path / "index.html"
    check_output(file)
    file.write_text("<html>\n<!-- thesis -->" + " " * 5000 + MADE_BY)
    assert not made_here(file)
    with pytest.raises(UserError, match=r"index\.html: exists and was not made by spark-dist; move it away"):
        check_output(file)
    file.write_text(f"<html><!-- {MADE_BY} -->")
    check_output(file)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="was not made"):
        check_output(tmp_path / "link")
