import json
import shutil

import nibabel
import numpy as np
import pytest
from nifti_cases import all_files, rewrite_json, save, save_kits

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.store import open_store, write_split
from data_tools.verify import ranges

NAMES = ["case_00000", "case_00001", "case_00002"]


@pytest.fixture
def kits(tmp_path):
    return save_kits(tmp_path / "kits")


@pytest.fixture
def store(kits, tmp_path):
    prepare = ["prepare", str(kits), str(tmp_path / "s.zarr"), "--layout", "kits", "--labels", "organ=1,tumour=2"]
    assert main([*prepare, "--workers", "1"]) == 0
    write_split(tmp_path / "s.zarr", "default", {"train": NAMES[:1], "val": NAMES[1:2], "test": NAMES[2:], "seed": 0})
    return tmp_path / "s.zarr"


@pytest.fixture
def verify(store, kits, capsys):
    """Run `spark-data verify` in one process: exit code, lines of stdout and of stderr."""

    def verify(*options, source=False):
        capsys.readouterr()
        more = ["--source", str(kits)] if source else []
        code = main(["verify", str(store), "--workers", "1", *more, *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return verify


def test_a_sound_store(verify, store):
    before = all_files(store)
    for source in (False, True):
        code, out, err = verify(source=source)
        assert (code, err) == (0, [])
        assert out[-1] == "3 cases: 3 sound"
        assert sum(line.split()[:1] == [name] and line.split()[-1] == "sound" for line in out for name in NAMES) == 3
    assert all_files(store) == before


def flip(file, place=-40):
    content = bytearray(file.read_bytes())
    content[place] ^= 8
    file.write_bytes(content)


def test_damage_is_named_and_healed(verify, store):
    before = all_files(store)
    flip(store / "cases/case_00001/image/c/0/0/0", 60)
    shutil.rmtree(store / "cases/case_00002/label/c")
    code, out, err = verify()
    assert code == 1
    assert err[0].startswith("error: case_00001: image slice ")
    assert err[1] == "error: case_00002: label slice 0–5 can't be read"
    assert out[-1] == "3 cases: 1 sound, 2 damaged"
    code, out, err = verify("--repair", source=True)
    assert code == 0
    assert [line.split(": ")[:2] for line in err] == [["note", "case_00001"], ["note", "case_00002"]]
    assert out[-1] == "3 cases: 1 sound, 2 repaired"
    assert all_files(store) == before
    assert verify()[0] == 0


def test_repair_needs_the_source(verify):
    code, _, (line,) = verify("--repair")
    assert code == 2
    assert "--repair prepares damaged cases again and needs --source" in line


@pytest.mark.parametrize("file", ["zarr.json", "cases/zarr.json", "splits/zarr.json", "splits/default/zarr.json"])
@pytest.mark.parametrize("how", ["flip", "empty", "gone"])
def test_metadata_of_the_store_are_restored_from_their_copy(verify, store, file, how):
    before = all_files(store)
    {"flip": flip, "empty": lambda file: file.write_bytes(b""), "gone": lambda file: file.unlink()}[how](store / file)
    code, _, err = verify()
    assert code == 1
    assert err == [f"error: {store / file}: damaged"]
    code, _, err = verify("--repair", source=True)
    assert (code, err) == (0, [f"error: {store / file}: damaged, and restored from its copy"])
    assert all_files(store) == before


def test_a_split_that_is_lost_is_told_of(verify, store):
    flip(store / "splits/default/zarr.json")
    flip(store / "splits/default/copy/zarr.json")
    code, _, err = verify("--repair", source=True)
    assert code == 1
    assert all("damaged, and so are its copies; make a new one" in line for line in err)


def test_voxels_are_compared_with_the_source(verify, store, kits):
    """What no checksum can know: a store that is whole, but not of these files."""
    group = store / "cases/case_00001"
    import zarr

    zarr.open_array(group / "image")[2] = 5
    assert verify()[0] == 0
    code, _, (line,) = verify(source=True)
    assert code == 1
    assert line == "error: case_00001: image slice 2 differs from its source"
    assert verify("--repair", source=True)[0] == verify(source=True)[0] == 0


def test_wrong_label_counts(verify, store):
    import zarr

    zarr.open_array(store / "cases/case_00001/label")[3, 0, 0] = 2
    code, _, (line,) = verify()
    assert code == 1
    assert line == "error: case_00001: label counts of slice 3 are wrong"


def test_sources_that_changed_or_are_gone_or_new(verify, store, kits):
    save(kits / "case_00000" / "segmentation.nii.gz", np.zeros((12, 10, 6), np.uint8))
    shutil.rmtree(kits / "case_00001")
    shutil.copytree(kits / "case_00002", kits / "case_00003")
    code, out, err = verify(source=True)
    assert code == 1
    assert out[-1] == "4 cases: 1 sound, 1 changed, 1 no source, 1 missing"
    assert "its source (label) is another file now; prepare it again with --replace" in err[0]
    before = all_files(store / "cases" / "case_00000")
    assert verify("--repair", source=True)[1][-1] == "4 cases: 1 sound, 1 changed, 1 no source, 1 repaired"
    assert all_files(store / "cases" / "case_00000") == before
    shutil.rmtree(store / "cases" / "case_00003")
    code, out, err = verify("--repair", "--replace", source=True)
    assert code == 1
    assert "case_00001: its files are not in the source folder; it can't be prepared again" in err[1]
    assert out[-1] == "4 cases: 1 sound, 2 repaired, 1 no source"
    assert len(open_store(store).cases) == 4


def test_a_repair_that_fails_says_why_and_keeps_the_case(verify, store, kits):
    flip(store / "cases/case_00001/image/c/0/0/0", 60)
    before = all_files(store)
    (kits / "case_00001" / "imaging.nii.gz").write_bytes(b"")
    code, _, (line,) = verify("--repair", source=True)
    assert code == 1
    assert "preparing it again failed: " in line
    assert "imaging.nii.gz is truncated or damaged" in line
    assert all_files(store) == before


def test_an_interrupted_case_is_missing(verify, store):
    rewrite_json(store / "cases/case_00001/zarr.json", attributes={})
    code, _, (line,) = verify()
    assert code == 1
    assert line == "error: case_00001: not in the store, or not complete; prepare it"
    assert verify("--repair", source=True)[0] == 0


def test_options_of_the_store_are_used_again(tmp_path, capsys):
    """Size, channel, patterns, spacing, percentiles, cases without labels."""
    for k in range(2):
        voxels = np.random.default_rng(k).integers(0, 500, (8, 9, 4, 2), np.int16)
        save(tmp_path / f"in/{k}_mr.nii.gz", voxels, np.eye(4))
    save(tmp_path / "in/0_seg.nii.gz", np.ones((8, 9, 4), np.uint8), np.eye(4))
    patterns = ["--image-pattern", "{case}_mr.nii.gz", "--label-pattern", "{case}_seg.nii.gz"]
    options = ["--layout", "pairs", *patterns, "--labels", "organ=1", "--channel", "1", "--size", "6", "--unlabelled"]
    options += ["--spacing", "1,2,3", "--window", "percentile", "--workers", "1"]
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "s.zarr"), *options]) == 0
    line = ["verify", str(tmp_path / "s.zarr"), "--source", str(tmp_path / "in"), "--workers", "1"]
    assert main(line) == 0
    before = all_files(tmp_path / "s.zarr")
    for case in "01":
        flip(tmp_path / "s.zarr/cases" / case / "image/c/0/0/0", 40)
    capsys.readouterr()
    assert main([*line, "--repair"]) == 0
    assert "2 repaired" in capsys.readouterr().out
    assert all_files(tmp_path / "s.zarr") == before


def test_what_is_no_store(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no slice store here" in capsys.readouterr().err


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert ranges(range(0, 40, 2)).endswith("14 …")


def test_a_kill_while_a_split_is_written_leaves_none(store):
    shutil.copytree(store / "splits/default", store / "splits/other")
    rewrite_json(store / "splits/other/zarr.json", attributes={})
    assert list(open_store(store).splits) == ["default"]
    write_split(store, "other", {"train": [], "val": [], "test": NAMES})
    assert open_store(store).splits["other"]["test"] == NAMES
    with pytest.raises(UserError, match="exists"):
        write_split(store, "other", {})
    assert json.loads((store / "splits/other/copy/zarr.json").read_text()) == json.loads(
        (store / "splits/other/zarr.json").read_text()
    )


def test_damaged_predictions_are_named(verify, store, kits, tmp_path):
    for number, case in enumerate(NAMES):
        truth = kits / case / "segmentation.nii.gz"
        if number < 2:
            (tmp_path / "maps").mkdir(exist_ok=True)
            shutil.copy(truth, tmp_path / "maps" / f"{case}.nii.gz")
        label = np.asarray(nibabel.load(truth).dataobj).transpose(2, 1, 0)
        (tmp_path / "soft").mkdir(exist_ok=True)
        np.savez(tmp_path / "soft" / f"{case}.npz", probabilities=np.stack([label == k for k in range(3)]))
    for name in ("maps", "soft"):
        assert main(["predictions", str(store), str(tmp_path / name), "--name", name]) == 0
    before = all_files(store)
    code, out, err = verify(source=True)
    assert (code, err) == (0, [])
    assert out[-2:] == ["predictions 'maps': 2 sound", "predictions 'soft': 3 sound"]
    kept = store / "predictions"
    flip(kept / "soft/case_00000/probabilities/c/0/0/0/0", 60)
    shutil.rmtree(kept / "soft/case_00001/probabilities/c")
    rewrite_json(kept / "soft/case_00002/zarr.json", attributes={"format": "other"})
    shutil.copytree(kept / "maps/case_00001", kept / "maps/case_00002")
    shutil.copytree(kept / "maps/case_00001", kept / "maps/somebody")
    damaged = all_files(store)
    code, out, err = verify("--repair", source=True)
    assert code == 1
    assert out[-3:] == ["3 cases: 3 sound", "predictions 'maps': 2 sound, 2 damaged", "predictions 'soft': 3 damaged"]
    expected = {
        "maps/case_00002": "was made for another image",
        "maps/somebody": "is of a case that the store lacks",
        "soft/case_00000": "probabilities slice ",
        "soft/case_00001": "probabilities slice 0–5 can't be read",
        "soft/case_00002": "not what was written",
    }
    for line, (place, problem) in zip(err, expected.items(), strict=True):
        assert line.startswith(f"error: {kept / place}")
        assert problem in line
        assert line.endswith("move it away, and run spark-data predictions again")
    assert all_files(store) == damaged
    for place in expected:
        shutil.move(kept / place, tmp_path / place.replace("/", "-"))
    for name in ("maps", "soft"):
        assert main(["predictions", str(store), str(tmp_path / name), "--name", name]) == 0
    assert all_files(store) == before
    assert verify()[0] == 0
