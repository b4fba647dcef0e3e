"""Labels, regions and tasks: their names, and the classes that they become."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_cases import AFFINE, save

from data_tools.cli import main
from data_tools.creation import create_store
from data_tools.errors import UserError
from data_tools.labels import Task, check_regions, fullest, make_task, parse_labels, parse_regions, regions_of
from data_tools.split import PARTS, split_by_shares
from data_tools.store import open_store

LESION = {"organ": [1], "tumour": [2]}
names = st.from_regex(r"[a-z][a-z0-9_.-]{0,6}", fullmatch=True).filter(lambda name: name not in ("all", "background"))


def known(labels: str, regions: str = "") -> dict[str, tuple[int, ...]]:
    """The regions of a store of these labels."""
    return regions_of({"labels": parse_labels(labels), "regions": parse_regions(regions) if regions else None})


def test_every_label_is_a_region_and_a_tumour_belongs_to_its_organ():
    assert known("anterior=1,posterior=2") == {"anterior": (1,), "posterior": (2,)}
    assert known("organ=1,tumour=2") == {"organ": (1, 2), "tumour": (2,)}
    assert known("organ=1,tumour=2", "organ=organ") == {"organ": (1,), "tumour": (2,)}
    assert known("organ=7,cyst=3,tumour=2") == {"organ": (1, 3), "cyst": (2,), "tumour": (3,)}
    found = known("liver=5,left=2,right=3", "kidneys=left+right")
    assert found == {"liver": (1,), "left": (2,), "right": (3,), "kidneys": (2, 3)}


def test_stores_of_earlier_versions_have_the_organ_first():
    assert regions_of({"labels": {"tumour": [2], "organ": [1]}}) == {"organ": (1, 2), "tumour": (2,)}
    assert regions_of({"labels": {"organ": [1, 3]}}) == {"organ": (1,)}
    assert regions_of({"labels": {}}) == {}


@pytest.mark.parametrize(
    ("labels", "regions", "message"),
    [
        ("a=1,b=2", "c=a+d", "there is no label 'd'"),
        ("a=1,b=2", "c=a+a", "names a label twice"),
        ("a=1,b=2,c=3", "a=b+c", "there is a label 'a', which must be a part of it"),
        ("a=1,b=2", "all=a+b", "'all' can't be a name"),
        ("a=1,b=2", "a", "write it like"),
        ("a=1,b=2", "c=a,c=b", "'c' is there twice"),
    ],
)
def test_regions_that_are_none(labels, regions, message):
    with pytest.raises(UserError, match=f"--regions.*{message}"):
        check_regions(parse_labels(labels), parse_regions(regions))


@pytest.mark.parametrize(
    ("task", "regions", "values"),
    [
        ("organ", ["organ"], ((1, 2),)),
        ("tumour", ["tumour"], ((2,),)),
        ("organ,tumour", ["organ", "tumour"], ((1,), (2,))),
        (" organ , tumour ", ["organ", "tumour"], ((1,), (2,))),
        ("all", ["organ", "tumour"], ((1,), (2,))),
    ],
)
def test_the_classes_of_organ_and_tumour(task, regions, values):
    found = make_task(task, known("organ=1,tumour=2"), "s.zarr")
    assert (list(found.regions), found.values, found.classes) == (regions, values, 1 + len(regions))


def test_all_leaves_out_regions_that_are_made_of_others():
    found = make_task("all", known("a=1,b=2,c=3", "whole=a+b+c,some=a+b"), "s.zarr")
    assert list(found.regions) == ["a", "b", "c"]
    nested = make_task("all", known("oedema=2,core=1,enhancing=4", "oedema=oedema+core+enhancing"), "s.zarr")
    assert nested.values == ((1,), (2,), (3,))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("liver", "s.zarr: --task liver: there is no region 'liver'; did you mean organ, tumour"),
        ("organ,tumor", "there is no region 'tumor'; did you mean tumour"),
        ("tumour,organ", "all of 'tumour' belongs to later regions too"),
        ("organ,", "name regions once each"),
        ("organ,organ", "name regions once each"),
        ("organ,all", "there is no region 'all'"),
    ],
)
def test_tasks_that_are_none(task, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_task(task, known("organ=1,tumour=2"), "s.zarr")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no labels"):
        make_task("all", {}, "s.zarr")


@given(st.lists(st.sets(st.integers(1, 6), min_size=1), min_size=1, max_size=5), st.integers(0, 2**32))
def test_a_voxel_is_of_the_last_region_that_it_lies_in(groups, seed):
    task = Task({f"r{k}": tuple(sorted(group)) for k, group in enumerate(groups)})
    label = np.random.default_rng(seed).integers(0, 8, (3, 5, 7)).astype(np.uint8)
    classes = task.classes_of(label)
    for voxel, found in zip(label.ravel(), classes.ravel(), strict=True):
        inside = [k for k, group in enumerate(groups, start=1) if voxel in group]
        assert found == (inside[-1] if inside else 0)
    for group in groups:
        try:
            union = task.inside(tuple(group))
        except ValueError:
            continue
        np.testing.assert_array_equal(np.isin(classes, union), np.isin(label, list(group)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_the_fullest_places_come_first(places, regions, seed):
    counts = np.random.default_rng(seed).integers(0, 3, (places, regions))
    order = fullest(counts)
    assert sorted(order) == list(range(places))
    assert (np.diff((counts > 0).sum(axis=1)[order]) <= 0).all()
    one = fullest(counts[:, :1])
    assert counts[one[0], 0] == counts[:, 0].max()


@given(
    st.dictionaries(names, st.integers(1, 99), min_size=1, max_size=6).filter(
        lambda labels: len(set(labels.values())) == len(labels)
    )
)
def test_labels_are_read_as_they_are_written(labels):
    text = ",".join(f"{name}={value}" for name, value in labels.items())
    assert list(parse_labels(text).items()) == [(name, [value]) for name, value in labels.items()] or set(labels) == {
        "organ",
        "tumour",
    }


@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=8, max_size=40), st.integers(0, 2**32))
def test_every_part_has_its_share_of_each_label(has, seed):
    cases = {
        f"c{k:03}": SimpleNamespace(labelled=True, label_counts=np.array([[9, *row]])) for k, row in enumerate(has)
    }
    store = SimpleNamespace(path="s.zarr", cases=cases)
    shares = dict(zip(PARTS, (0.5, 0.25, 0.25), strict=True))
    split = split_by_shares(store, shares, seed)
    found = np.array(has).sum(axis=0)
    # The rarest is balanced first, and the others within it and without it.
    for label, allowed in zip(np.argsort(found, kind="stable"), (1.5, 3, 6), strict=True):
        for part in PARTS:
            number = sum(cases[name].label_counts[0, 1 + label] for name in split[part])
            assert abs(number - shares[part] * found[label]) <= allowed


def label_map(folder, name, values, shape=(6, 10, 12)):
    """A case in layout pairs whose label map holds these values in bands of rows."""
    label = np.zeros(shape, np.uint8)
    for k, value in enumerate(values):
        label[1:, k : k + 2] = value
    save(folder / f"{name}_ct.nii.gz", np.random.default_rng(0).normal(0, 50, shape).astype(np.int16), AFFINE)
    save(folder / f"{name}_seg.nii.gz", label, AFFINE)


PAIRS = ["--layout", "pairs", "--image-pattern", "{case}_ct.nii.gz", "--label-pattern", "{case}_seg.nii.gz"]


def test_the_names_of_labels_from_the_command_line_and_back(tmp_path, capsys):
    """Prepared, listed, looked at, exported with the source's values, and found sound."""
    label_map(tmp_path / "in", "case", (7, 3, 200))
    store, line = tmp_path / "s.zarr", ["--labels", "right=3,left=7,spleen=200", "--regions", "kidneys=left+right"]
    prepare = ["prepare", str(tmp_path / "in"), str(store), *PAIRS, "--workers", "1"]
    assert main([*prepare, *line]) == 0
    assert open_store(store).regions == {"right": (1,), "left": (2,), "spleen": (3,), "kidneys": (1, 2)}
    capsys.readouterr()
    assert main(["info", str(store)]) == 0
    out = capsys.readouterr().out
    assert "labels right=3, left=7, spleen=200; window" in out
    assert "regions kidneys=right+left" in out
    assert "right, left, spleen and kidneys: slices with it" in " ".join(out.split())
    assert main(["preview", str(store), "--out", str(tmp_path / "look")]) == 0
    assert "kidneys volume" in (tmp_path / "look" / "index.html").read_text()
    assert main(["stats", str(store), "--out", str(tmp_path / "stats.png")]) == 0
    assert "spleen ml" in capsys.readouterr().out
    assert main(["verify", str(store), "--source", str(tmp_path / "in"), "--workers", "1"]) == 0
    assert main(["export", str(store), "case", str(tmp_path / "back.nii.gz"), "--label"]) == 0
    import nibabel

    source, back = (nibabel.load(f) for f in (tmp_path / "in" / "case_seg.nii.gz", tmp_path / "back.nii.gz"))
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(source.dataobj))
    # The order of labels is that of their stored values, so that another one is another store.
    for other in (["--labels", "left=7,right=3,spleen=200", *line[2:]], line[:2]):
        capsys.readouterr()
        assert main([*prepare, *other]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "this store was made with" in error


def test_values_that_are_not_declared_are_named(tmp_path, capsys):
    label_map(tmp_path / "in", "case", (1, 2, 9))
    line = ["prepare", str(tmp_path / "in"), str(tmp_path / "s.zarr"), *PAIRS, "--labels", "liver=2,spleen=1"]
    assert main([*line, "--workers", "1"]) == 1
    assert "case_seg.nii.gz: label 9 is not declared; add it to --labels" in capsys.readouterr().err


def test_kits_and_lits_have_organ_and_tumour_where_nothing_is_said(tmp_path, capsys):
    from nifti_cases import save_kits

    save_kits(tmp_path / "kits", 1)
    assert (
        main(["prepare", str(tmp_path / "kits"), str(tmp_path / "s.zarr"), "--layout", "kits", "--workers", "1"]) == 0
    )
    assert open_store(tmp_path / "s.zarr").attributes["labels"] == LESION
    assert main(["prepare", str(tmp_path), str(tmp_path / "t.zarr"), *PAIRS]) == 2
    assert "--labels: say which values" in capsys.readouterr().err


def test_a_store_does_not_change_its_regions(tmp_path):
    create_store(tmp_path / "s.zarr", {"labels": LESION})
    with pytest.raises(UserError, match="made with regions=None, not"):
        create_store(tmp_path / "s.zarr", {"labels": LESION, "regions": {"organ": ["organ"]}})
