import json

import pytest

from data_tools.errors import UserError
from data_tools.layouts import LAYOUTS, find_kits, find_lits, find_msd, find_pairs
from data_tools.prepare import find_sources


@pytest.fixture
def touch(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return touch


def listed(sources, root):
    return [(s.case, s.image.relative_to(root).as_posix(), s.label.relative_to(root).as_posix()) for s in sources]


def test_kits(tmp_path, touch):
    touch("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "case_00001/imaging.nii", "kits.json")
    touch("case_00002/segmentation.nii")
    assert listed(find_kits(tmp_path), tmp_path) == [
        ("case_00000", "case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"),
        ("case_00001", "case_00001/imaging.nii", "case_00001/segmentation.nii.gz"),
        ("case_00002", "case_00002/imaging.nii.gz", "case_00002/segmentation.nii"),
    ]


def test_kits_with_two_files_of_a_kind(tmp_path, touch):
    touch("case_00000/imaging.nii.gz", "case_00000/imaging.nii", "case_00000/segmentation.nii.gz")
    assert [s.case for s in find_kits(tmp_path)] == ["case_00000"] * 2


@pytest.mark.parametrize(("images", "labels"), [("", ""), ("data/", "segmentation/")])
def test_lits(tmp_path, touch, images, labels):
    touch(f"{images}volume-7.nii", f"{labels}segmentation-7.nii", f"{images}volume-10.nii.gz", f"{images}volume-x.nii")
    assert listed(sorted(find_lits(tmp_path), key=lambda s: s.case), tmp_path) == [
        ("volume-007", f"{images}volume-7.nii", f"{labels}segmentation-7.nii"),
        ("volume-010", f"{images}volume-10.nii.gz", f"{labels}segmentation-10.nii.gz"),
    ]


def test_msd(tmp_path):
    pair = {"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [pair], "test": ["./imagesTs/liver_2.nii.gz"]}))
    assert listed(find_msd(tmp_path), tmp_path) == [("liver_1", "imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz")]


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"training": ["a.nii.gz"]}', '{"training": [{"image": "a"}]}'])
def test_msd_without_a_good_description(tmp_path, content):
    if content:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        find_msd(tmp_path)


def test_pairs(tmp_path, touch):
    touch("a_ct.nii.gz", "b c_ct.nii.gz", "a_organs.nii.gz", ".hidden_ct.nii.gz", "sub/d_ct.nii.gz")
    assert listed(find_pairs(tmp_path, "{case}_ct.nii.gz", "{case}_organs.nii.gz"), tmp_path) == [
        ("a", "a_ct.nii.gz", "a_organs.nii.gz"),
        ("b c", "b c_ct.nii.gz", "b c_organs.nii.gz"),
    ]


def test_pairs_in_folders(tmp_path, touch):
    touch("ct/x.nii", "y/y_ct.nii", "y/z_ct.nii", "w[1]/ct.nii")
    assert listed(find_pairs(tmp_path, "ct/{case}.nii", "seg/{case}.nii"), tmp_path) == [("x", "ct/x.nii", "seg/x.nii")]
    assert listed(find_pairs(tmp_path, "{case}/{case}_ct.nii", "{case}/seg.nii"), tmp_path) == [
        ("y", "y/y_ct.nii", "y/seg.nii")
    ]
    assert listed(find_pairs(tmp_path, "{case}[1]/ct.nii", "{case}/seg.nii"), tmp_path) == [
        ("w", "w[1]/ct.nii", "w/seg.nii")
    ]


def test_pairs_whose_labels_look_like_images(tmp_path, touch):
    touch("a.nii.gz", "a_seg.nii.gz", "b.nii.gz")
    assert [s.case for s in find_pairs(tmp_path, "{case}.nii.gz", "{case}_seg.nii.gz")] == ["a", "b"]


@pytest.mark.parametrize("patterns", [(None, "{case}.nii"), ("{case}.nii", None), ("a.nii", "{case}.nii")])
def test_pairs_need_two_patterns(tmp_path, patterns):
    with pytest.raises(UserError, match=r"--(image|label)-pattern: .* \{case\}"):
        find_pairs(tmp_path, *patterns)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"msd"}))
def test_nothing_there(tmp_path, layout):
    with pytest.raises(UserError, match=f"no case in layout {layout}"):
        find_sources(tmp_path, layout, ("{case}.nii", "{case}_seg.nii"))
    with pytest.raises(UserError, match="no such folder"):
        find_sources(tmp_path / "missing", layout, ("{case}.nii", "{case}_seg.nii"))
