import json

import pytest

from data_tools.errors import UserError
from data_tools.layouts import (
    LAYOUTS,
    find_kits,
    find_lits,
    find_msd,
    find_nnunet,
    find_pairs,
    find_sources,
    modality,
)


@pytest.fixture
def touch(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return touch


def listed(sources, root):
    return [
        (s.case, s.image.relative_to(root).as_posix(), s.label and s.label.relative_to(root).as_posix())
        for s in sources
    ]


def test_kits(tmp_path, touch):
    touch("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "case_00001/imaging.nii", "kits.json")
    touch("case_00002/segmentation.nii")
    assert listed(find_kits(tmp_path), tmp_path) == [
        ("case_00000", "case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"),
        ("case_00001", "case_00001/imaging.nii", "case_00001/segmentation.nii.gz"),
        ("case_00002", "case_00002/imaging.nii.gz", "case_00002/segmentation.nii"),
    ]


@pytest.mark.parametrize("place", ["", "data/", "dataset/", "kits21/data/"])
def test_kits_21_and_clones(tmp_path, touch, place):
    case = f"{place}case_00000/"
    touch(f"{case}imaging.nii.gz", f"{case}aggregated_MAJ_seg.nii.gz", f"{case}aggregated_OR_seg.nii.gz")
    touch(f"{case}segmentations/kidney_instance-1_annotation-1.nii.gz", f"{place}case_00001/imaging.nii.gz")
    assert listed(find_kits(tmp_path), tmp_path) == [
        ("case_00000", f"{case}imaging.nii.gz", f"{case}aggregated_MAJ_seg.nii.gz"),
        ("case_00001", f"{place}case_00001/imaging.nii.gz", f"{place}case_00001/segmentation.nii.gz"),
    ]


def test_kits_with_labels_of_two_kinds(tmp_path, touch):
    touch("case_00000/imaging.nii.gz", "case_00000/aggregated_MAJ_seg.nii.gz", "case_00000/segmentation.nii.gz")
    assert [s.case for s in find_kits(tmp_path)] == ["case_00000"] * 2


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


def test_lits_as_downloaded(tmp_path, touch):
    touch("Training Batch 1/volume-0.nii", "Training Batch 1/segmentation-0.nii", "Training Batch 2/volume-28.nii")
    touch("Training Batch 2/segmentation-28.nii", "Test Data/test-volume-3.nii", "test-volume-4.nii.gz")
    assert sorted(listed(find_lits(tmp_path), tmp_path)) == [
        ("test-volume-003", "Test Data/test-volume-3.nii", None),
        ("test-volume-004", "test-volume-4.nii.gz", None),
        ("volume-000", "Training Batch 1/volume-0.nii", "Training Batch 1/segmentation-0.nii"),
        ("volume-028", "Training Batch 2/volume-28.nii", "Training Batch 2/segmentation-28.nii"),
    ]


def test_nnunet(tmp_path, touch):
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}))
    touch("imagesTr/a_1_0000.nii.gz", "labelsTr/a_1.nii.gz", "labelsTr/b.nii.gz", "imagesTs/c_0000.nii.gz")
    touch("imagesTr/notes.txt", "labelsTr/x.nii")
    assert listed(find_nnunet(tmp_path), tmp_path) == [
        ("a_1", "imagesTr/a_1_0000.nii.gz", "labelsTr/a_1.nii.gz"),
        ("b", "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"),
        ("c", "imagesTs/c_0000.nii.gz", None),
    ]
    assert modality(tmp_path, "nnunet") == "{'0': 'MRI'}"
    touch("imagesTr/a_1_0001.nii.gz")
    with pytest.raises(UserError, match=r"imagesTr: has channels 0, 1; pick one with --channel 0"):
        find_nnunet(tmp_path)
    assert [s.image.name for s in find_nnunet(tmp_path, 1)] == ["a_1_0001.nii.gz", "b_0001.nii.gz", "c_0001.nii.gz"]
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    with pytest.raises(UserError, match=r"dataset\.json: images that end in \.png"):
        find_nnunet(tmp_path)


def test_msd(tmp_path):
    pair = {"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [pair], "test": ["./imagesTs/liver_2.nii.gz"]}))
    assert listed(find_msd(tmp_path), tmp_path) == [
        ("liver_1", "imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz"),
        ("liver_2", "imagesTs/liver_2.nii.gz", None),
    ]


@pytest.mark.parametrize(
    "content", [None, "{", "[1]", '{"training": ["a.nii.gz"]}', '{"training": [{"image": "a"}]}', '{"test": [1]}']
)
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


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"msd", "nnunet"}))
def test_nothing_there(tmp_path, layout):
    with pytest.raises(UserError, match=f"no case in layout {layout}"):
        find_sources(tmp_path, layout, ("{case}.nii", "{case}_seg.nii"))
    with pytest.raises(UserError, match="no such folder"):
        find_sources(tmp_path / "missing", layout, ("{case}.nii", "{case}_seg.nii"))


def test_unlabelled_volumes_are_asked_for(tmp_path, touch):
    touch("volume-1.nii", "segmentation-1.nii", "volume-2.nii", "test-volume-3.nii")
    assert [s.case for s in find_sources(tmp_path, "lits")] == ["volume-001", "volume-002"]
    found = {s.case: s.label and s.label.name for s in find_sources(tmp_path, "lits", unlabelled=True)}
    assert found == {"volume-001": "segmentation-1.nii", "volume-002": None, "test-volume-003": None}


def test_names_in_capitals(tmp_path, touch):
    touch("volume-3.NII.GZ", "Segmentation-3.nii", "test-volume-4.Nii")
    assert listed(find_lits(tmp_path), tmp_path) == [
        ("volume-003", "volume-3.NII.GZ", "Segmentation-3.nii"),
        ("test-volume-004", "test-volume-4.Nii", None),
    ]
    touch("case_0/imaging.NII.GZ", "case_0/segmentation.nii.gz")
    assert listed(find_kits(tmp_path), tmp_path)[0][1] == "case_0/imaging.NII.GZ"
    (tmp_path / "dataset.json").write_text("{}")
    touch("imagesTr/a_0000.NII.GZ", "imagesTs/b_0000.nii.GZ", "labelsTr/a.nii.gz")
    assert listed(find_nnunet(tmp_path), tmp_path) == [
        ("a", "imagesTr/a_0000.NII.GZ", "labelsTr/a.nii.gz"),
        ("b", "imagesTs/b_0000.nii.GZ", None),
    ]


def test_a_label_without_an_image_is_a_case(tmp_path, touch):
    """Which fails, naming the image that is missing."""
    touch("volume-1.nii", "segmentation-1.nii", "segmentation-2.nii")
    assert [(s.case, s.image.name) for s in find_lits(tmp_path)] == [
        ("volume-001", "volume-1.nii"),
        ("volume-002", "volume-2.nii"),
    ]
    touch("ct/a.nii.gz", "seg/a.nii.gz", "seg/b.nii.gz")
    assert listed(find_pairs(tmp_path, "ct/{case}.nii.gz", "seg/{case}.nii.gz"), tmp_path) == [
        ("a", "ct/a.nii.gz", "seg/a.nii.gz"),
        ("b", "ct/b.nii.gz", "seg/b.nii.gz"),
    ]


def test_other_files_of_a_case_are_no_labels_without_an_image(tmp_path, touch):
    touch("a_ct.nii.gz", "a_pet.nii.gz", "a.nii.gz", "b_ct.nii.gz")
    assert [s.case for s in find_pairs(tmp_path, "{case}_ct.nii.gz", "{case}.nii.gz")] == ["a", "b"]


def test_files_that_are_nearly_named_so_are_told_of(tmp_path, touch, capsys):
    touch("volume-1.nii", "volume-2 (1).nii.gz", "segmentation-1.nii", "volume-3.json")
    assert [s.case for s in find_lits(tmp_path)] == ["volume-001"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: {tmp_path}/volume-2 (1).nii.gz: left out, as it is not named like volume-12.nii"


@pytest.mark.parametrize("pattern", ["../{case}.nii", "{case}/../x.nii"])
def test_patterns_that_lead_elsewhere(tmp_path, pattern):
    with pytest.raises(UserError, match=r"--image-pattern .*: is below the data set's folder"):
        find_pairs(tmp_path, pattern, "{case}.nii")
