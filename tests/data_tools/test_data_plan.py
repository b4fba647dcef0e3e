"""`spark-data prepare --dry-run`."""

import re
from pathlib import Path

import numpy as np
import pytest
from nifti_cases import all_files, save, save_kits
from test_data_prepare import DAMAGES, LABELS

from data_tools import plan
from data_tools.cli import main
from data_tools.store import open_store

ROW = re.compile(r"^ *(case_\S+) .* (new|changed|unchanged|error) *$")
BECOMES = {"new": "prepared", "changed": "prepared", "unchanged": "unchanged", "error": "failed"}
VOXELS = ("NaN", "too large", "undeclared", "no whole label", "cut off")
"""Damages that headers do not show."""


@pytest.fixture
def kits(tmp_path):
    return save_kits(tmp_path / "kits")


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run `spark-data prepare` on kits/ in one process: exit code, lines of stdout and of stderr."""

    def prepare(*more, labels=LABELS):
        capsys.readouterr()
        places = [str(tmp_path / "kits"), str(tmp_path / "s.zarr")]
        code = main(["prepare", *places, "--layout", "kits", *labels, "--workers", "1", *more])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return prepare


def state(folder: Path) -> dict:
    """All that is below a folder, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def statuses(out: list[str]) -> dict[str, str]:
    """The table's last column by its first."""
    return {row[1]: row[2] for line in out if (row := ROW.match(line))}


def prepared_statuses(out: list[str]) -> dict[str, str]:
    rows = (re.match(r"^ *(case_\S+) .* (prepared|unchanged|failed) *$", line) for line in out)
    return {row[1]: row[2] for row in rows if row}


def test_nothing_is_written_and_the_run_does_what_was_said(kits, prepare, tmp_path):
    before = state(tmp_path)
    code, out, err = prepare("--dry-run")
    assert (code, err) == (0, [])
    assert statuses(out) == dict.fromkeys(("case_00000", "case_00001", "case_00002"), "new")
    assert "3 cases: 3 new, 0 changed, 0 unchanged, 0 with an error; window -200…300; nothing was written" in out
    assert state(tmp_path) == before
    prepare("--only", "case_0000[01]")
    save(kits / "case_00001" / "segmentation.nii.gz", np.zeros((12, 10, 6), np.uint8))
    before = state(tmp_path), all_files(tmp_path)
    code, out, (line,) = prepare("--dry-run")
    assert code == 1
    assert "the store has a case case_00001 of other files (label)" in line
    code, out, err = prepare("--dry-run", "--replace")
    assert (code, err) == (0, [])
    said = statuses(out)
    assert said == {"case_00000": "unchanged", "case_00001": "changed", "case_00002": "new"}
    assert (state(tmp_path), all_files(tmp_path)) == before
    assert prepared_statuses(prepare("--replace")[1]) == {case: BECOMES[status] for case, status in said.items()}
    code, out, err = prepare("--dry-run")
    assert (code, err) == (0, [])
    assert set(statuses(out).values()) == {"unchanged"}
    assert not any(line.startswith(("to write:", "time:")) for line in out)


def test_another_spacing_and_damaged_metadata_are_changes(prepare, tmp_path):
    kits = tmp_path / "kits"
    for k, affine in enumerate((np.eye(4), np.diag([0.7, 0.7, 2, 1]))):
        for file in ("imaging", "segmentation"):
            save(kits / f"case_{k}" / f"{file}.nii.gz", np.ones((8, 8, 4), np.uint8), affine)
    out = prepare("--dry-run")[1]
    assert any(line.startswith("note: case_0: the header has no spacing") for line in out)
    prepare()
    more = ("--spacing", "0.5,0.5,5")
    assert statuses(prepare("--dry-run", *more)[1]) == {"case_0": "changed", "case_1": "unchanged"}
    file = tmp_path / "s.zarr/cases/case_1/zarr.json"
    file.write_text(file.read_text().replace('"window"', '"w1ndow"'))
    assert statuses(prepare("--dry-run")[1]) == {"case_0": "unchanged", "case_1": "changed"}
    assert prepared_statuses(prepare()[1]) == {"case_0": "unchanged", "case_1": "prepared"}


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in VOXELS])
def test_errors_that_names_and_headers_show(kits, prepare, tmp_path, name):
    """They are the run's own, and the other cases are told of."""
    damage, message = DAMAGES[name]
    damage(kits / "case_00001")
    before = state(tmp_path)
    code, out, err = prepare("--dry-run")
    assert code == 1
    (line,) = err
    assert message in line
    assert sorted(statuses(out).values()) == ["error", "new", "new"]
    assert state(tmp_path) == before
    assert prepare()[2] == err


@pytest.mark.parametrize("name", VOXELS)
def test_errors_that_the_sample_shows(kits, prepare, name):
    """Three cases of one size: the sample is the second."""
    damage, message = DAMAGES[name]
    damage(kits / "case_00001")
    code, out, err = prepare("--dry-run")
    assert code == 1
    (line,) = err
    assert message in line
    assert statuses(out)["case_00001"] == "error"
    assert any(line.startswith("both are estimates from case_0000") for line in out)


def test_a_header_that_is_cut_off(kits, prepare):
    file = kits / "case_00000" / "imaging.nii.gz"
    file.write_bytes(file.read_bytes()[:80])
    code, out, err = prepare("--dry-run")
    assert code == 1
    assert err[0].startswith(f"error: case_00000: {file} is truncated or damaged")
    assert statuses(out)["case_00000"] == "error"


def test_wrong_labels_cost_three_samples_and_no_more(prepare, tmp_path):
    save_kits(tmp_path / "kits", 5)
    code, out, err = prepare("--dry-run", labels=("--labels", "organ=1"))
    assert code == 1
    assert len(err) == plan.SAMPLES
    assert all("label 2 is not declared" in line for line in err)
    assert out[-1] == "no estimate of bytes and time: the voxels of 3 cases can't be stored"


def test_options_of_another_store(kits, prepare):
    prepare()
    code, _, (line,) = prepare("--dry-run", "--window", "0,1")
    assert code == 2
    assert "this store was made with window" in line


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
@pytest.mark.parametrize("size", [(), ("--size", "32,48")])
def test_bytes_to_expect(prepare, tmp_path, dtype, size):
    """Cases of one kind and several sizes take what was said, give or take a tenth."""
    random, kits = np.random.default_rng(0), tmp_path / "kits"
    for k, slices in enumerate((5, 12, 9, 20)):
        image = random.normal(0, 60, (64, 72, slices)).round().astype(dtype)
        save(kits / f"case_{k}" / "imaging.nii.gz", image)
        save(kits / f"case_{k}" / "segmentation.nii.gz", (image > 80).astype(np.uint8))
    out = prepare("--dry-run", *size)[1]
    (line,) = (line for line in out if line.startswith("to write: about "))
    said = float(re.search(r"× ([\d.]+)\)", line)[1])
    assert f"free at {tmp_path}: " in line
    assert prepare(*size)[0] == 0
    cases = open_store(tmp_path / "s.zarr").cases.values()
    raw = sum(3 * np.prod(case.shape) for case in cases)
    assert f"({raw / 2**20:.1f} MiB of voxels" in line
    shards = (tmp_path / "s.zarr").rglob("c/*/*/*")
    assert sum(file.stat().st_size for file in shards) == pytest.approx(raw * said, rel=0.1)
    assert any(re.fullmatch(r"time: about \d:\d\d:\d\d with 1 worker", line) for line in out)


def test_a_disk_that_is_too_small(kits, prepare, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: plan.shutil._ntuple_diskusage(9, 8, 1))
    code, _, (line,) = prepare("--dry-run")
    assert code == 0
    assert line.startswith("warning: ")
    assert line.endswith(" to write, 0.0 MiB free")
