import re
import time

import nibabel
import numpy as np
import pytest
from nifti_cases import all_files, save_kits

from data_tools.cli import main
from data_tools.phantom import phantom


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    start = time.process_time()
    assert main(["phantom", str(folder)]) == 0
    assert time.process_time() - start < 12
    return folder


def test_a_case_depends_on_seed_and_number_only(twelve, tmp_path):
    main(["phantom", str(tmp_path / "a"), "--cases", "2"])
    main(["phantom", str(tmp_path / "b"), "--cases", "2", "--seed", "1"])
    files, default = all_files(tmp_path / "a"), all_files(twelve)
    assert len(files) == 4
    assert all(default[name] == content for name, content in files.items())
    assert not set(all_files(tmp_path / "b").values()) & set(files.values())


def test_files_are_ct_in_different_grids(twelve):
    shapes, spacings, orientations = set(), set(), set()
    for case in sorted(twelve.iterdir()):
        image, label = (nibabel.load(case / f"{name}.nii.gz") for name in ("imaging", "segmentation"))
        assert image.get_data_dtype() == np.int16
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert 20 <= min(image.shape) <= 40
        assert 88 <= sorted(image.shape)[1] <= max(image.shape) <= 104
        assert {0, 1} <= set(np.unique(label.dataobj)) <= {0, 1, 2}
        shapes.add(image.shape)
        spacings.add(image.header.get_zooms())
        orientations.add(nibabel.aff2axcodes(image.affine))
    assert len(shapes) == len(spacings) == 12
    assert len(orientations) >= 4


def test_the_task_is_not_a_threshold(twelve):
    """Organ and tumour lie close to each other and to what is around, and tumours have many sizes, or are not there."""
    sizes, contrasts = [], []
    for k in range(30):
        image, label, affine = phantom(np.random.default_rng([0, k]), 96)
        organ, tumour = image[label == 1], image[label == 2]
        threshold = (image > organ.mean() - 2 * organ.std()) & (image < organ.mean() + 2 * organ.std())
        assert 2 * (threshold & (label > 0)).sum() / (threshold.sum() + (label > 0).sum()) < 0.6
        assert organ.std() > 15
        if len(tumour):
            sizes.append(len(tumour) * abs(np.linalg.det(affine)))
            contrasts.append(abs(tumour.mean() - organ.mean()))
    assert 15 < len(sizes) < 30
    assert max(sizes) > 10 * min(sizes)
    assert max(contrasts) < 80


def test_a_real_case_of_the_same_name_stays(tmp_path, capsys):
    """And nothing is written beside it: phantoms among real cases would be trained on."""
    kits = save_kits(tmp_path / "kits", 1)
    (kits / "case_00000").rename(kits / "case_00001")
    before = all_files(tmp_path)
    assert main(["phantom", str(kits), "--cases", "2", "--size", "40"]) == 2
    assert re.fullmatch(r"error: .*case_00001: exists and is not case 1 of seed 0 .*\n", capsys.readouterr().err)
    assert all_files(tmp_path) == before


def test_phantoms_that_are_there_stay_and_what_lacks_is_written(tmp_path, capsys):
    line = ["phantom", str(tmp_path / "a"), "--size", "40", "--cases"]
    assert main([*line, "2"]) == 0
    whole = all_files(tmp_path)
    (tmp_path / "a/case_00001/segmentation.nii.gz").unlink()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.gz")}
    assert main([*line, "2"]) == 0
    assert all_files(tmp_path) == whole
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    for wrong in (["--seed", "1"], ["--size", "41"]):
        assert main([*line, "1", *wrong]) == 2
    (tmp_path / "a/case_00000/notes.txt").write_text("mine")
    assert main([*line, "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
