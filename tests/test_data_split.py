from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.split import PARTS, make_split
from data_tools.store import create_store, open_store, write_case


def a_store(with_tumour: int, without: int):
    """Cases with the ones that have a tumour first."""
    cases = {}
    for k in range(with_tumour + without):
        cases[f"c{k:03}"] = SimpleNamespace(task_slices=lambda _, has=k < with_tumour: np.arange(has))
    return SimpleNamespace(path="s.zarr", cases=cases)


def fractions(train, val, test):
    return dict(zip(PARTS, (train, val, test), strict=True))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 10), st.integers(0, 10), st.integers(0, 2**32))
def test_shares_hold_in_all_cases_and_in_those_with_tumour(with_tumour, without, val, test, seed):
    store = a_store(with_tumour, without)
    shares = fractions(1 - (val + test) / 20, val / 20, test / 20)
    try:
        split = make_split(store, shares, seed)
    except UserError:
        assert min(share for share in shares.values() if share) * len(store.cases) <= 2
        return
    assert sorted(name for part in PARTS for name in split[part]) == list(store.cases)
    for part in PARTS:
        tumours = sum(len(store.cases[name].task_slices("tumour")) for name in split[part])
        assert abs(len(split[part]) - shares[part] * len(store.cases)) <= 1.5
        assert abs(tumours - shares[part] * with_tumour) <= 1.5
        assert bool(split[part]) >= (shares[part] > 0)
    assert split == make_split(store, shares, seed) | {"seed": seed, "fractions": shares}


def test_another_seed_is_another_split():
    store, shares = a_store(20, 20), fractions(0.7, 0.15, 0.15)
    assert len({tuple(make_split(store, shares, seed)["test"]) for seed in range(5)}) == 5


@pytest.mark.parametrize("wrong", [(0.7, 0.7, -0.4), (0.5, 0.2, 0.2), (float("nan"), 0.5, 0.5)])
def test_fractions_of_one(wrong):
    with pytest.raises(UserError, match="sum to 1"):
        make_split(a_store(5, 5), fractions(*wrong), 0)


def test_fewer_cases_than_parts():
    with pytest.raises(UserError, match=r"2 cases leave test \(0.2\) without any; prepare more cases"):
        make_split(a_store(1, 1), fractions(0.5, 0.3, 0.2), 0)
    assert make_split(a_store(1, 1), fractions(0.5, 0, 0.5), 0)["val"] == []


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
    assert record["fractions"] == fractions(0.6, 0.2, 0.2)
    assert main(["split", str(path)]) == 2
    assert main(["split", str(path), "--name", "../evil"]) == 2
    assert main(["split", str(path), "--name", "second"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "a split 'default' exists" in errors[0]
    assert open_store(path).splits["default"] == record
