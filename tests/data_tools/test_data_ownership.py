"""What is not ours stays: folders and files of the same names and shapes as those that this program removes; and what
is ours is known again, wherever somebody moves it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from nifti_cases import all_but_identity, all_files, save_kits

from data_tools.cli import main
from data_tools.creation import aside, create_store
from data_tools.errors import Conflict, UserError
from data_tools.files import remove_abandoned
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
from data_tools.sealed import read_sealed, seal
from data_tools.store import delete_case, open_store, write_case
from data_tools.workers import signature

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


KITS = ["--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]


def prepare(kits, store, *more):
    return main(["prepare", str(kits), str(store), *KITS, *more])


def verify(store, *more):
    return main(["verify", str(store), "--workers", "1", *map(str, more)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two cohorts with the same names of cases, and the stores a.zarr and b.zarr of them."""
    folder = tmp_path_factory.mktemp("made")
    save_kits(folder / "a", 3)
    save_kits(folder / "b", 4, (10, 12, 7))
    shutil.rmtree(folder / "b" / "case_00000")
    for name in "ab":
        assert prepare(folder / name, folder / f"{name}.zarr") == 0
    assert main(["split", str(folder / "a.zarr"), "--train", "1", "--val", "1", "--test", "1"]) == 0
    return folder


@pytest.fixture
def cohorts(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "in")
    capsys.readouterr()
    return tmp_path / "in"


def test_a_store_has_an_identity_and_its_cases_repeat_it(cohorts):
    first, second = (open_store(cohorts / name) for name in ("a.zarr", "b.zarr"))
    assert first.identity != second.identity
    assert read_sealed(first.path / "cases/case_00001")["store"] == first.identity
    assert read_sealed(first.path / "cases/case_00001")["case"] == "case_00001"
    shutil.copytree(first.path, cohorts / "copy.zarr")
    assert open_store(cohorts / "copy.zarr").identity == first.identity
    assert prepare(cohorts / "a", cohorts / "again.zarr") == 0
    again = open_store(cohorts / "again.zarr")
    assert again.identity != first.identity
    assert again.fingerprint() == first.fingerprint() != second.fingerprint()


def test_another_cohort_does_not_replace_cases_unasked(cohorts, capsys):
    before = all_files(cohorts / "a.zarr/cases")
    assert prepare(cohorts / "b", cohorts / "a.zarr") == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in err] == ["case_00001", "case_00002"]
    assert "the store has a case case_00001 of other files (image, label); pass --replace to replace it, or" in err[0]
    assert verify(cohorts / "a.zarr", "--source", cohorts / "b", "--repair") == 1
    assert "1 sound, 1 no source, 2 changed" in capsys.readouterr().out
    now = all_files(cohorts / "a.zarr/cases")
    assert {name: now[name] for name in before} == before
    assert {name.split("/")[0] for name in now.keys() - before} == {"case_00003"}
    assert prepare(cohorts / "b", cohorts / "a.zarr", "--replace") == 0
    cases = open_store(cohorts / "a.zarr").cases
    assert [case.shape for case in cases.values()] == [(6, 10, 12), *[(7, 12, 10)] * 3]


def test_verify_replaces_when_it_is_asked(cohorts, capsys):
    line = [cohorts / "a.zarr", "--source", cohorts / "b"]
    assert main(["verify", *map(str, line), "--replace"]) == 2
    assert verify(*line, "--repair", "--replace") == 1
    assert "3 repaired" in capsys.readouterr().out
    assert verify(*line, "--repair") == 1
    assert "3 sound, 1 no source" in capsys.readouterr().out


def swap(store, other):
    (store / "cases/case_00001").rename(store / "aside")
    (store / "cases/case_00002").rename(store / "cases/case_00001")
    (store / "aside").rename(store / "cases/case_00002")


HANDS = {
    "cases copied from another store": (
        lambda store, other: shutil.copytree(other / "cases", store / "cases", dirs_exist_ok=True),
        "is a case of another store",
        ["case_00001", "case_00002", "case_00003"],
    ),
    "stores merged": (
        lambda store, other: shutil.copytree(other, store, dirs_exist_ok=True),
        "is a case of another store",
        ["case_00000"],
    ),
    "folders swapped": (swap, "was renamed or copied", ["case_00001", "case_00002"]),
    "a folder copied": (
        lambda store, other: shutil.copytree(store / "cases/case_00001", store / "cases/case_00009"),
        "was renamed or copied",
        ["case_00009"],
    ),
    "a folder renamed": (
        lambda store, other: (store / "cases/case_00001").rename(store / "cases/case_00009"),
        "was renamed or copied",
        ["case_00001", "case_00009"],
    ),
    "a folder removed": (
        lambda store, other: shutil.rmtree(store / "cases/case_00002"),
        "the case's folder is gone",
        ["case_00002"],
    ),
}


@pytest.mark.parametrize(("hand", "message", "cases"), HANDS.values(), ids=HANDS)
def test_cases_that_somebody_moved_are_found(cohorts, capsys, hand, message, cases):
    store = cohorts / "a.zarr"
    hand(store, cohorts / "b.zarr")
    capsys.readouterr()
    with pytest.raises(UserError, match=message):
        open_store(store)
    before = all_files(store / "cases")
    before = {name: content for name, content in before.items() if name.startswith("case_")}
    assert verify(store) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in err if "cases/case_" in line] == cases
    assert any(message in line for line in err)
    # Nothing of it is replaced unasked: only what is gone is prepared again.
    verify(store, "--source", cohorts / "a", "--repair")
    assert before.items() <= all_files(store / "cases").items()


@pytest.mark.parametrize("how", ["folders swapped", "cases copied from another store", "a folder removed"])
def test_cases_that_somebody_moved_are_prepared_again(cohorts, how):
    before = all_files(cohorts / "a.zarr")
    HANDS[how][0](cohorts / "a.zarr", cohorts / "b.zarr")
    shutil.rmtree(cohorts / "a.zarr/cases/case_00003", ignore_errors=True)
    assert verify(cohorts / "a.zarr", "--source", cohorts / "a", "--repair", "--replace") == 0
    assert all_files(cohorts / "a.zarr") == before


def test_a_case_that_shall_be_gone(cohorts):
    shutil.rmtree(cohorts / "b.zarr/cases/case_00002")
    (cohorts / "b.zarr/known/case_00002").unlink()
    assert list(open_store(cohorts / "b.zarr").cases) == ["case_00001", "case_00003"]
    assert verify(cohorts / "b.zarr") == 0


@pytest.mark.parametrize("replace", [[], ["--replace"]])
def test_a_case_that_is_a_link_leads_to_anothers(cohorts, replace):
    """Which keeps all it has; the link alone is replaced, when that is asked for."""
    folder = cohorts / "a.zarr/cases/case_00001"
    shutil.rmtree(folder)
    folder.symlink_to(cohorts / "b.zarr/cases/case_00001")
    before = all_files(cohorts / "b.zarr")
    assert prepare(cohorts / "a", cohorts / "a.zarr", *replace) == (0 if replace else 1)
    assert all_files(cohorts / "b.zarr") == before
    assert folder.is_symlink() == (not replace)
    assert verify(cohorts / "b.zarr") == 0


@pytest.mark.parametrize("more", [[], ["--replace"], ["--dry-run", "--replace"]])
def test_a_case_of_a_split_keeps_its_label(cohorts, capsys, more):
    for k in range(3):
        (cohorts / f"a/case_0000{k}/segmentation.nii.gz").unlink()
    before = all_files(cohorts / "a.zarr")
    assert prepare(cohorts / "a", cohorts / "a.zarr", "--unlabelled", *more) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3
    assert "has no label, and case case_00000 is in part " in err[0]
    assert all_files(cohorts / "a.zarr") == before


def test_a_case_that_loses_its_label_is_a_conflict(cohorts, capsys):
    (cohorts / "b/case_00001/segmentation.nii.gz").unlink()
    assert prepare(cohorts / "b", cohorts / "b.zarr", "--unlabelled") == 1
    assert "of other files (label); pass --replace" in capsys.readouterr().err
    assert prepare(cohorts / "b", cohorts / "b.zarr", "--unlabelled", "--replace") == 0
    assert not open_store(cohorts / "b.zarr").cases["case_00001"].labelled


def shaped(folder: Path, attributes: dict) -> None:
    """Somebody's Zarr group that looks like a case."""
    group = zarr.create_group(folder, attributes=attributes)
    for kind in ("image", "label"):
        group.create_array(kind, data=np.ones((2, 3, 4), np.int16))


FOREIGN = {
    "a folder": lambda folder: (folder / "thesis").mkdir(parents=True) or (folder / "thesis/a.tex").write_text("x"),
    "a file": lambda folder: folder.write_text("x"),
    "an empty group's shape": lambda folder: shaped(folder, {}),
    "a group's shape": lambda folder: shaped(folder, {"affine": [1], "source": {}}),
    "only images": lambda folder: shaped(folder, {}) or (folder / "zarr.json").unlink(),
    "a damaged group": lambda folder: shaped(folder, {}) or (folder / "zarr.json").write_text("{"),
    "notes in a case": lambda folder: (folder / "notes.txt").write_text("x"),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_every_way_that_removes_leaves_foreign_folders(cohorts, foreign):
    store = cohorts / "a.zarr"
    folder = store / "cases/case_00001"
    if foreign is FOREIGN["notes in a case"]:
        (cohorts / "a/case_00001").rename(cohorts / "a/case_00005")
        (cohorts / "b/case_00001").rename(cohorts / "a/case_00001")
    else:
        delete_case(store, "case_00001")
        (store / "known/case_00001").unlink(missing_ok=True)
    foreign(folder)
    before = all_files(cohorts)
    arrays = np.zeros((2, 3, 4), np.int16), None, {}
    for way in (
        lambda: delete_case(store, "case_00001"),
        lambda: delete_case(store, "case_00001", foreign=True),
        lambda: write_case(store, "case_00001", *arrays),
        lambda: write_case(store, "case_00001", *arrays, replace=True),
    ):
        with pytest.raises(UserError, match="case_00001"):
            way()
    for more in ([], ["--replace"]):
        assert prepare(cohorts / "a", store, "--only", "case_00001", *more) == 1
        assert verify(store, "--source", cohorts / "a", "--repair", *more) == 1
    assert before.items() <= all_files(cohorts).items()


@pytest.mark.parametrize("foreign", ["a folder", "a file", "a group's shape", "a damaged group"])
def test_a_split_leaves_foreign_folders(cohorts, capsys, foreign):
    folder = cohorts / "b.zarr/splits/default"
    FOREIGN[foreign](folder)
    before = all_files(cohorts)
    assert main(["split", str(cohorts / "b.zarr"), "--train", "1", "--val", "1", "--test", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert all_files(cohorts) == before


def older(store: Path) -> Path:
    """A store as earlier versions made it."""
    for folder in (store, store / "cases", store / "splits", *(store / "cases").glob("*/")):
        facts = read_sealed(folder)
        seal(folder, {key: value for key, value in facts.items() if key not in ("identity", "store", "case")})
    shutil.rmtree(store / "known")
    return store


def test_a_store_of_an_earlier_version_opens_and_gets_an_identity(cohorts, capsys):
    whole, store = all_but_identity(cohorts / "a.zarr"), older(cohorts / "a.zarr")
    assert open_store(store).identity is None
    assert verify(store) == 0
    assert "note: " in (err := capsys.readouterr().err)
    assert "made by an earlier version; spark-data prepare gives it an identity" in err
    assert prepare(cohorts / "a", store) == 0
    assert "3 unchanged" in capsys.readouterr().out
    assert all_but_identity(store) == whole
    assert verify(store) == 0
    assert not capsys.readouterr().err
    shutil.copytree(cohorts / "b.zarr/cases/case_00003", store / "cases/case_00003")
    with pytest.raises(Conflict, match="another store"):
        open_store(store)


KILLED = """
import os, signal, sys
from data_tools import cli, identity, store
left = int(sys.argv[1])
def killing(module, name):
    real = getattr(module, name)
    def work(*parts):
        global left
        result = real(*parts)
        left -= 1
        left or os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, work)
for module, name in ((identity, "begin"), (identity, "remove"), (identity, "seal"), (store, "write_arrays"),
                     (store, "write_sealed"), (store, "set_known")):
    killing(module, name)
cli.main(sys.argv[2:])
"""


def killed_after(steps: int, *line) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(steps), *map(str, line)], check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 6, 7])
def test_killed_while_a_case_is_replaced(cohorts, steps):
    """Between any two steps: marked as incomplete, image, label and folder removed, arrays, attributes, known."""
    line = ["prepare", cohorts / "b", cohorts / "a.zarr", *KITS, "--replace"]
    killed_after(steps, *line)
    assert len(open_store(cohorts / "a.zarr").cases) in (2, 3)
    assert main(list(map(str, line))) == 0
    assert verify(cohorts / "a.zarr", "--source", cohorts / "b", "--repair") == 1
    assert all((case.shape == (7, 12, 10)) == (name > "case_00000") for name, case in open_store(line[2]).cases.items())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_killed_while_a_store_gets_its_identity(cohorts, steps):
    whole, store = all_but_identity(cohorts / "a.zarr"), older(cohorts / "a.zarr")
    killed_after(steps, "prepare", cohorts / "a", store, *KITS)
    assert len(open_store(store).cases) == 3
    assert prepare(cohorts / "a", store) == 0
    assert all_but_identity(store) == whole


KILLED_ASIDE = """
import os, signal, sys
from pathlib import Path
from data_tools import creation, files
left, real = int(sys.argv[1]), {place}
def work(*parts):
    global left
    left -= 1
    left < 0 and os.kill(os.getpid(), signal.SIGKILL)
    return real(*parts)
{place} = work
creation.create_store(Path(sys.argv[2]), {{"labels": {{}}}})
"""


@pytest.mark.parametrize(
    ("place", "calls"), [("files.os.fsync", 0), ("files.os.fsync", 1), ("files.os.fsync", 2), ("Path.rename", 0)]
)
def test_killed_while_a_store_is_made_nothing_of_it_stays(tmp_path, place, calls):
    """Before the first, second and third part of it is durable, and before it gets its name."""
    for name in (".s.zarr.notes.new", ".s.zarr.1-1-1-1.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    os.utime(tmp_path / ".s.zarr.notes.new", (0, 0))
    theirs = all_files(tmp_path)
    code = KILLED_ASIDE.format(place=place)
    run = subprocess.run([sys.executable, "-c", code, str(calls), str(tmp_path / "s.zarr")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".s.zarr.*.new"))) == 3
    create_store(tmp_path / "s.zarr", {"labels": {}})
    assert {path.name for path in tmp_path.iterdir()} == {"s.zarr", ".s.zarr.notes.new", ".s.zarr.1-1-1-1.new"}
    shutil.rmtree(tmp_path / "s.zarr")
    assert all_files(tmp_path) == theirs


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
from data_tools.files import write_atomically
write_atomically(Path(sys.argv[1]), lambda aside: aside.write_text("half") and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_of_a_file_only_what_killed_processes_left_is_removed(tmp_path):
    file, elsewhere = tmp_path / "a[1].nii.gz", tmp_path / ".a[1].nii.gz.0123abcd-7-7.tmp"
    for name in ("notes", "123", "notes-1-1", "0123abcd-1"):
        (tmp_path / f".{file.name}.{name}.tmp").write_text("mine")
    for theirs in (elsewhere, tmp_path / f".{file.name}.{signature(os.getpid())}.tmp", tmp_path / "a1.nii.gz"):
        theirs.write_text("half")
    before = all_files(tmp_path)
    run = subprocess.run([sys.executable, "-c", KILLED_WRITING, str(file)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(all_files(tmp_path)) == len(before) + 1
    remove_abandoned(file)
    assert all_files(tmp_path) == before
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    remove_abandoned(file)
    assert all_files(tmp_path) == {name: text for name, text in before.items() if name != elsewhere.name}


@pytest.mark.parametrize("name", [".notes.tmp", ".zarr.json.notes.tmp", "image.partial", "zarr.notes.partial"])
def test_a_hidden_file_of_somebodys_in_a_case_is_no_part_of_it(cohorts, name):
    store = cohorts / "a.zarr"
    (store / "cases/case_00001" / name).write_text("mine")
    with pytest.raises(UserError, match="which is no part of a case; move it away"):
        delete_case(store, "case_00001")
    assert (store / "cases/case_00001" / name).read_text() == "mine"
    (store / "cases/case_00001" / name).rename(store / f"cases/case_00001/.zarr.json.{signature(os.getpid())}.tmp")
    delete_case(store, "case_00001")
    assert not (store / "cases/case_00001").exists()


def test_what_another_process_makes_aside_is_left_until_it_is_forgotten(tmp_path):
    create_store(tmp_path / "s.zarr", {"labels": {}})
    alive, elsewhere = aside(tmp_path / "s.zarr"), tmp_path / ".s.zarr.0123abcd-7-7-01234567.new"
    for folder in (alive, elsewhere):
        shutil.copytree(tmp_path / "s.zarr", folder)
    create_store(tmp_path / "s.zarr", {"labels": {}})
    assert alive.exists()
    assert elsewhere.exists()
    for folder in (alive, elsewhere):
        os.utime(folder, (0, 0))
    create_store(tmp_path / "s.zarr", {"labels": {}})
    assert alive.exists()
    assert not elsewhere.exists()
