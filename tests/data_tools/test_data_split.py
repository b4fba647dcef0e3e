import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_cases import all_files

from data_tools.cli import main
from data_tools.creation import create_store
from data_tools.errors import UserError
from data_tools.split import PARTS, split_by_folds, split_by_shares, splits_by_lists, with_unlabelled
from data_tools.store import open_store, write_case


def a_store(with_tumour: int, without: int):
    """Cases with the ones that have a tumour first."""
    cases = {}
    for k in range(with_tumour + without):
        cases[f"c{k:03}"] = SimpleNamespace(labelled=True, label_counts=np.array([[9, 9, k < with_tumour]]))
    return SimpleNamespace(path="s.zarr", cases=cases)


def fractions(train, val, test):
    return dict(zip(PARTS, (train, val, test), strict=True))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 10), st.integers(0, 10), st.integers(0, 2**32))
def test_shares_hold_in_all_cases_and_in_those_with_tumour(with_tumour, without, val, test, seed):
    store = a_store(with_tumour, without)
    shares = fractions(1 - (val + test) / 20, val / 20, test / 20)
    try:
        split = split_by_shares(store, shares, seed)
    except UserError:
        assert min(share for share in shares.values() if share) * len(store.cases) <= 2
        return
    assert sorted(name for part in PARTS for name in split[part]) == list(store.cases)
    for part in PARTS:
        tumours = sum(store.cases[name].label_counts[0, 2] for name in split[part])
        assert abs(len(split[part]) - shares[part] * len(store.cases)) < 1
        assert abs(tumours - shares[part] * with_tumour) <= 1.5
        assert bool(split[part]) >= (shares[part] > 0)
    assert split == split_by_shares(store, shares, seed) | {"seed": seed, "made": {"shares": shares}}


def test_another_seed_is_another_split():
    store, shares = a_store(20, 20), fractions(0.7, 0.15, 0.15)
    assert len({tuple(split_by_shares(store, shares, seed)["test"]) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "wrong", [(0.7, 0.7, -0.4), (0.5, 0.2, 0.2), (float("nan"), 0.5, 0.5), (5, 5, 1), (5.5, 4.5, 0), (12, -2, 0)]
)
def test_fractions_of_one(wrong):
    with pytest.raises(UserError, match="sum to 1"):
        split_by_shares(a_store(5, 5), fractions(*wrong), 0)


@pytest.mark.parametrize(("cases", "sizes"), [(210, (151, 17, 42)), (131, (94, 11, 26)), (3, (3, 0, 0))])
def test_numbers_of_cases_are_kept_exactly(cases, sizes):
    store = a_store(cases // 3, cases - cases // 3)
    split = split_by_shares(store, fractions(*sizes), 0)
    assert [len(split[part]) for part in PARTS] == list(sizes)
    tumours = [sum(store.cases[name].label_counts[0, 2] for name in split[part]) for part in PARTS]
    assert tumours == pytest.approx([size * (cases // 3) / cases for size in sizes], abs=1.5)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(3, 12), st.integers(0, 2**32))
def test_each_case_is_tested_in_one_fold(with_tumour, without, folds, seed):
    store = a_store(with_tumour, without)
    if len(store.cases) < folds:
        with pytest.raises(UserError, match=f"no more than the {len(store.cases)} cases with labels"):
            split_by_folds(store, folds, seed)
        return
    splits = split_by_folds(store, folds, seed)
    assert sorted(name for split in splits for name in split["test"]) == list(store.cases)
    for k, split in enumerate(splits):
        assert sorted(name for part in PARTS for name in split[part]) == list(store.cases)
        assert split["val"] == splits[(k + 1) % folds]["test"]
        assert abs(len(split["test"]) - len(store.cases) / folds) < 1
        tumours = sum(store.cases[name].label_counts[0, 2] for name in split["test"])
        assert abs(tumours - with_tumour / folds) <= 1.5
    assert splits == split_by_folds(store, folds, seed)


def test_cases_without_labels_are_in_no_part(tmp_path):
    store = a_store(6, 6)
    for name in ("c001", "c010"):
        store.cases[name].labelled = False
    (tmp_path / "lists.json").write_text('{"train": ["c000"], "val": ["c010"]}')
    for split in (split_by_shares(store, fractions(6, 2, 2), 0), split_by_folds(store, 3, 0)[0]):
        assert sorted(name for part in PARTS for name in split[part]) == sorted(store.cases.keys() - {"c001", "c010"})
    with pytest.raises(UserError, match="case 'c010' has no labels"):
        splits_by_lists(store, tmp_path / "lists.json")


def test_fixed_lists(tmp_path):
    file = tmp_path / "splits.json"
    one = {"train": ["c003", "c001"], "val": ["c000"], "test": ["c002"]}
    file.write_text(json.dumps([one, {"train": ["c000"], "val": ["c001"]}]))
    first, second = splits_by_lists(a_store(2, 2), file)
    assert first == {**one, "train": ["c001", "c003"], "seed": None, "made": {"lists": "splits.json"}}
    assert second["test"] == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"train": ["c000", "c001"], "test": ["c000"]}', "case 'c000' is named twice"),
        ('{"train": ["c000", "c01"]}', "there is no case 'c01'; did you mean c001"),
        ('{"train": "c000"}', "write"),
        ('{"training": ["c000"]}', "write"),
        ('{"train": []}', "write"),
        ("[]", "write"),
        ("3", "write"),
        ('{"train": [', "can't be read as JSON"),
    ],
)
def test_wrong_lists(tmp_path, text, error):
    file = tmp_path / "splits.json"
    file.write_text(text)
    with pytest.raises(UserError, match=error) as caught:
        splits_by_lists(a_store(2, 2), file)
    assert str(file) in str(caught.value)


FOLDS = [{"train": ["c002", "c003", "c001"], "val": ["c000"]}, {"train": ["c000", "c003", "c002"], "val": ["c001"]}]
FOLDS += [{"train": ["c000", "c001"], "val": ["c003", "c002"]}]


def test_nnunets_folds_are_folds_of_a_cross_validation(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(FOLDS))
    made = {"lists": "splits_final.json", "folds": 3}
    assert splits_by_lists(a_store(2, 2), file) == [
        {"train": ["c002", "c003"], "val": ["c001"], "test": ["c000"], "seed": None, "made": made | {"fold": 0}},
        {"train": ["c000"], "val": ["c002", "c003"], "test": ["c001"], "seed": None, "made": made | {"fold": 1}},
        {"train": ["c001"], "val": ["c000"], "test": ["c002", "c003"], "seed": None, "made": made | {"fold": 2}},
    ]


@pytest.mark.parametrize(
    ("folds", "error"),
    [
        (FOLDS[:2], "it takes 3 folds or more"),
        ([*FOLDS[:2], {"train": ["c000", "c001", "c002", "c003"]}], "fold 2 has no val cases"),
        ([*FOLDS[:2], {"train": ["c000"], "val": ["c003", "c002"]}], "case 'c001' is not in all folds"),
        ([*FOLDS, FOLDS[1]], "case 'c001' is in the val part of two folds"),
    ],
)
def test_folds_that_are_no_cross_validation_are_refused(tmp_path, folds, error):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(folds))
    with pytest.raises(UserError, match=error) as caught:
        splits_by_lists(a_store(2, 2), file)
    assert str(file) in str(caught.value)


def test_lists_that_test_each_case_once_are_folds(tmp_path):
    file = tmp_path / "mine.json"
    one = {"train": ["c000", "c001"], "val": ["c002"], "test": ["c003"]}
    for other, folds in (
        (one | {"train": ["c003", "c001"], "test": ["c000"]}, [(0, 2), (1, 2)]),
        (one, [(None, None)] * 2),
    ):
        file.write_text(json.dumps([one, other]))
        found = [record["made"] for record in splits_by_lists(a_store(2, 2), file)]
        assert [(made.get("fold"), made.get("folds")) for made in found] == folds


def test_fewer_cases_than_parts():
    with pytest.raises(UserError, match=r"2 cases leave test \(0.2\) without any; prepare more cases"):
        split_by_shares(a_store(1, 1), fractions(0.5, 0.3, 0.2), 0)
    assert split_by_shares(a_store(1, 1), fractions(0.5, 0, 0.5), 0)["val"] == []


def test_command(tmp_path, capsys):
    path = tmp_path / "s.zarr"
    create_store(path, {"labels": {"organ": [1]}})
    facts = {"affine": np.eye(4).tolist(), "spacing": [1, 1, 1], "window": [0, 1], "source": {}}
    for k in range(10):
        label = np.full((2, 2, 2), 2 * (k % 2), np.uint8)
        write_case(path, f"c{k}", np.zeros((2, 2, 2), np.int16), label, facts)
    assert main(["split", str(path), "--train", "0.6", "--val", "0.2", "--test", "0.2", "--seed", "3"]) == 0
    record = open_store(path).splits["default"]
    assert [len(record[part]) for part in PARTS] == [6, 2, 2]
    assert record["seed"] == 3
    assert record["made"] == {"shares": fractions(0.6, 0.2, 0.2)}
    assert main(["split", str(path)]) == 2
    assert main(["split", str(path), "--name", "../evil"]) == 2
    assert main(["split", str(path), "--name", "second"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "a split 'default' exists" in errors[0]
    assert open_store(path).splits["default"] == record


def test_command_for_folds_and_lists(tiny_store, tmp_path, capsys):
    path = tmp_path / "s.zarr"
    shutil.copytree(tiny_store, path)
    assert main(["split", str(path), "--folds", "4", "--seed", "1", "--name", "cv"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[3].startswith("split 'cv-fold3': fold 3 of 4, ")
    assert sorted(open_store(path).splits) == ["cv-fold0", "cv-fold1", "cv-fold2", "cv-fold3", "default"]
    # One name of five is taken, so that none is written.
    assert main(["split", str(path), "--folds", "5", "--name", "cv"]) == 2
    assert "cv-fold0' exists" in capsys.readouterr().err
    assert len(open_store(path).splits) == 5
    lists = tmp_path / "mine.json"
    lists.write_text('{"train": ["case_00000"], "val": ["case_00001"], "test": ["case_00002"]}')
    assert main(["split", str(path), "--lists", str(lists), "--name", "mine"]) == 0
    out = capsys.readouterr().out
    assert "split 'mine': lists of mine.json, 1 train, 1 val, 1 test\n" in out
    assert "note: in no part: case_00003, " in out
    assert main(["split", str(path), "--lists", str(lists), "--folds", "3", "--name", "both"]) == 2


KILLED = """
import os, signal, sys
from data_tools import cli, store
left, real = int(sys.argv[1]), store.write_sealed if hasattr(store, "write_sealed") else store._write_sealed
def write(*parts):
    global left
    left -= 1
    real(*parts)
    left or os.kill(os.getpid(), signal.SIGKILL)
store.write_sealed = store._write_sealed = write
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("writes", [1, 4, 5])
def test_folds_that_were_killed_in_the_middle_are_completed_by_the_same_command(tiny_store, tmp_path, capsys, writes):
    shutil.copytree(tiny_store, tmp_path / "s.zarr")
    shutil.copytree(tiny_store, tmp_path / "whole.zarr")
    line = ["--folds", "5", "--name", "cv"]
    run = subprocess.run([sys.executable, "-c", KILLED, str(writes), "split", tmp_path / "s.zarr", *line], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(open_store(tmp_path / "s.zarr").splits) < 6
    for store in ("s.zarr", "whole.zarr"):
        assert main(["split", str(tmp_path / store), *line]) == 0
    assert all_files(tmp_path / "s.zarr") == all_files(tmp_path / "whole.zarr")
    capsys.readouterr()
    assert main(["split", str(tmp_path / "s.zarr"), *line]) == 0
    assert capsys.readouterr().out.count("; it was there already") == 5
    assert main(["split", str(tmp_path / "s.zarr"), *line, "--seed", "1"]) == 2


def test_a_split_is_kept_however_it_was_made(tiny_store, tmp_path, capsys):
    shutil.copytree(tiny_store, tmp_path / "s.zarr")
    before = all_files(tmp_path)
    assert main(["split", str(tmp_path / "s.zarr"), "--keep"]) == 0
    assert "split 'default': 5 train, 3 val, 3 test, seed 0; it stays as it is" in capsys.readouterr().out
    assert all_files(tmp_path) == before
    assert main(["split", str(tmp_path / "s.zarr"), "--keep", "--name", "other"]) == 0
    assert sorted(open_store(tmp_path / "s.zarr").splits) == ["default", "other"]


def test_unlabelled_cases_are_a_part_of_their_own(tmp_path):
    store = a_store(6, 6)
    split = split_by_shares(store, fractions(0.5, 0.25, 0.25), 0)
    assert with_unlabelled(store, split, 0) == split
    hidden = with_unlabelled(store, split, 4)
    assert len(hidden["train"]) == 2
    assert sorted(hidden["train"] + hidden["unlabelled"]) == split["train"]
    assert (hidden["val"], hidden["test"]) == (split["val"], split["test"])
    assert hidden == with_unlabelled(store, split, 4)
    store.cases["bare"] = SimpleNamespace(labelled=False)
    assert with_unlabelled(store, split, 0)["unlabelled"] == ["bare"]
    assert "bare" in with_unlabelled(store, split, 4)["unlabelled"]
    with pytest.raises(UserError, match="--hide-labels 6: 6 cases are in train"):
        with_unlabelled(store, split, 6)


def test_lists_may_name_unlabelled_cases(tmp_path):
    store = a_store(3, 3)
    store.cases["c001"].labelled = store.cases["c005"].labelled = False
    file = tmp_path / "lists.json"
    one = {"train": ["c000"], "val": ["c003"], "test": ["c002"]}
    file.write_text(json.dumps([one | {"unlabelled": ["c004", "c001"]}, one]))
    named, unnamed = splits_by_lists(store, file)
    assert with_unlabelled(store, named, 0)["unlabelled"] == ["c001", "c004"]  # with its label hidden, and without any
    assert with_unlabelled(store, unnamed, 0)["unlabelled"] == ["c001", "c005"]
    file.write_text(json.dumps(one | {"unlabelled": ["c000"]}))
    with pytest.raises(UserError, match="case 'c000' is named twice"):
        splits_by_lists(store, file)
