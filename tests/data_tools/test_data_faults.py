"""Damage of every kind: to input files, to a running process, to a store's files."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from nifti_cases import AFFINE, all_but_identity, all_files, read, save, save_kits

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.store import open_store, write_split

SHAPE = (12, 10, 6)


def prepare(kits: Path, store: Path, *more: str) -> int:
    line = ["prepare", str(kits), str(store), "--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1"]
    return main([*line, *more])


def good() -> bytearray:
    """An uncompressed NIfTI file."""
    voxels = np.random.default_rng(1).integers(-1000, 1000, SHAPE, np.int16)
    return bytearray(nibabel.Nifti1Image(voxels, AFFINE).to_bytes())


def header(place: int, value, dtype: str):
    """A file with another number in its header."""
    content, number = good(), np.array(value, dtype).tobytes()
    content[place : place + len(number)] = number
    return content


def raw(content, suffix=".nii.gz", name="imaging"):
    def damage(case: Path):
        (case / f"{name}.nii.gz").unlink()
        (case / f"{name}{suffix}").write_bytes(gzip.compress(bytes(content)) if suffix == ".nii.gz" else content)

    return damage


def voxels(array, name="imaging", affine=AFFINE):
    return lambda case: save(case / f"{name}.nii.gz", np.asarray(array), affine)


def cut(share, name):
    def damage(case: Path):
        file = case / f"{name}.nii.gz"
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])

    return damage


def flipped(place):
    def damage(case: Path):
        content = bytearray(gzip.compress(bytes(good())))
        content[int(place * len(content))] ^= 16
        (case / "imaging.nii.gz").write_bytes(content)

    return damage


def with_value(value, dtype=np.float64):
    array = np.zeros(SHAPE, dtype)
    array[3, 4, 5] = value
    return array


def folder_in_place(case: Path):
    (case / "imaging.nii.gz").unlink()
    (case / "imaging.nii.gz").mkdir()


BAD = {
    **{
        f"image cut at {s}": cut(s, "imaging")
        for s in (0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.98, 0.995)
    },
    **{f"label cut at {s}": cut(s, "segmentation") for s in (0, 0.1, 0.3, 0.5, 0.7, 0.95)},
    **{f"plain image cut at {n}": raw(good()[:n], ".nii") for n in (0, 4, 100, 347, 348, 352, 353, 1000, 1700)},
    **{f"flipped bit at {p}": flipped(p) for p in (0.0, 0.3, 0.6, 0.9, 0.999)},
    "wrong magic": raw(header(344, 0x2B2B2B, "<i4")),
    "magic of two files": raw(header(344, 0x0031696E, "<i4")),
    "text": raw(b"PatientID;Age\n" * 99),
    "not compressed": lambda case: (case / "imaging.nii.gz").write_bytes(good()),
    "compressed twice": raw(gzip.compress(bytes(good()))),
    "compressed under a plain name": raw(gzip.compress(bytes(good())), ".nii"),
    "header size": raw(header(0, 349, "<i4")),
    "huge": raw(header(40, [3, 32767, 32767, 32767], "<i2")),
    "huge, plain": raw(header(40, [3, 32767, 32767, 32767], "<i2"), ".nii"),
    "no axes": raw(header(40, [0, 12, 10, 6], "<i2")),
    "nine axes": raw(header(40, [9, 12, 10, 6], "<i2")),
    "negative length": raw(header(40, [3, -12, 10, 6], "<i2")),
    "no slices": raw(header(40, [3, 12, 10, 0], "<i2")),
    "five axes": voxels(np.zeros((4, 4, 4, 2, 2), np.int16)),
    "two axes": voxels(np.zeros((12, 10), np.int16)),
    "channels": voxels(np.zeros((*SHAPE, 3), np.int16)),
    "unknown type": raw(header(70, 12345, "<i2")),
    "complex": voxels(np.zeros(SHAPE, np.complex64)),
    "offset beyond the end": raw(header(108, 1e9, "<f4")),
    "offset that is no number": raw(header(108, np.nan, "<f4")),
    "infinite slope": raw(header(112, np.inf, "<f4")),
    "affine of NaN": raw(header(280, [np.nan] * 12, "<f4")),
    "affine of zeros": raw(header(280, [0] * 12, "<f4")),
    "negative spacing": raw(
        header(76, [1, 1, -1, 1], "<f4")[:252] + b"\0" * 4 + header(76, [1, 1, -1, 1], "<f4")[256:]
    ),
    "NaN": voxels(with_value(np.nan)),
    "infinity": voxels(with_value(np.inf)),
    "minus infinity": voxels(with_value(-np.inf, np.float32)),
    "beyond float32": voxels(with_value(1e200)),
    "another shape": voxels(np.zeros((12, 10, 7), np.uint8), "segmentation"),
    "another place": voxels(np.zeros(SHAPE, np.uint8), "segmentation", np.diag([1, 1, 1.1, 1]) @ AFFINE),
    "label of fractions": voxels(with_value(0.5), "segmentation"),
    "label of NaN": voxels(with_value(np.nan), "segmentation"),
    "label not declared": voxels(with_value(9, np.uint8), "segmentation"),
    "negative label": voxels(with_value(-1, np.int16), "segmentation"),
    "no image": lambda case: (case / "imaging.nii.gz").unlink(),
    "no label": lambda case: (case / "segmentation.nii.gz").unlink(),
    "two images": lambda case: shutil.copy(case / "imaging.nii.gz", case / "imaging.nii"),
    "a folder": folder_in_place,
    "a link to nothing": lambda case: [(case / "imaging.nii.gz").unlink(), (case / "imaging.nii.gz").symlink_to("x")],
    "a name that is no folder's": lambda case: case.rename(case.with_name("case_*")),
}


def test_there_are_sixty():
    assert len(BAD) >= 60


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    return save_kits(tmp_path_factory.mktemp("kits") / "kits", 2)


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_the_good_case_is_prepared(kits, tmp_path, capsys, damage):
    shutil.copytree(kits, tmp_path / "kits")
    damage(tmp_path / "kits" / "case_00001")
    assert prepare(tmp_path / "kits", tmp_path / "s.zarr") == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: case_")
    assert "case_00001/" in line or "'case_*' can't be the name" in line
    assert "2 cases: 1 prepared, 0 unchanged, 1 failed" in out
    assert list(open_store(tmp_path / "s.zarr").cases) == ["case_00000"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Eight cases, and a store that was made of them without any disturbance."""
    folder = tmp_path_factory.mktemp("cases")
    save_kits(folder / "kits", 8, (48, 40, 16))
    assert prepare(folder / "kits", folder / "s.zarr") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_five_times_at_random_moments(cases, tmp_path, seed):
    store = tmp_path / "s.zarr"
    script = ROOT / "tests" / "scripts" / "kill_prepare.py"
    subprocess.run([sys.executable, script, cases / "kits", store, str(seed), "5"], check=True, cwd=ROOT, timeout=300)
    assert prepare(cases / "kits", store) == 0
    assert main(["verify", str(store), "--source", str(cases / "kits"), "--workers", "1"]) == 0
    assert all_but_identity(store) == all_but_identity(cases / "s.zarr")
    assert [file.name for file in tmp_path.iterdir()] == ["s.zarr"]


def damage_at_random(random: np.random.Generator, file: Path) -> None:
    """A flipped bit, or a lost end."""
    content = bytearray(file.read_bytes())
    if random.random() < 0.6:
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    else:
        del content[random.integers(len(content)) :]
    file.write_bytes(content)


@pytest.mark.slow
def test_fifty_damages_to_a_store_are_named_not_trained_on_and_healed(cases, tmp_path, capsys):
    """Ten times five files of a store, each in another case."""
    torch = pytest.importorskip("torch")
    from spark_dist.data.batches import SliceDataset
    from spark_dist.data.slices import slice_table
    from spark_dist.data.views import Crop, SliceSpec

    random = np.random.default_rng(0)
    store = tmp_path / "s.zarr"
    shutil.copytree(cases / "s.zarr", store)
    names = list(open_store(store).cases)
    write_split(store, "all", {"train": names, "val": [], "test": [], "seed": 0})
    whole = all_files(store)
    truth = {name: [read(store, name, kind) for kind in ("image", "label")] for name in names}

    def trained_on(name: str) -> str:
        """Read every slice of a case as training does. Returns the error's message."""
        message = ""
        table = slice_table(open_store(store), "all", "train", "organ", "all")
        data = SliceDataset(table, SliceSpec("organ", Crop(truth[name][0].shape[1:])))
        for row in np.flatnonzero(table.case == names.index(name)):
            try:
                batch = data.__getitems__([int(row) * data.views.count])
            except UserError as error:
                message = str(error)
                assert f"{name} slice {table.slice[row]}" in message or f"{name}/" in message
            else:
                for kind, voxels in zip(("image", "label"), truth[name], strict=True):
                    assert torch.equal(getattr(batch, kind)[0].squeeze(), torch.from_numpy(voxels[table.slice[row]]))
        return message

    for _ in range(10):
        damaged, contents = sorted(str(name) for name in random.choice(names, 5, replace=False)), {}
        for name in damaged:
            files = sorted(file for file in (store / "cases" / name).rglob("*") if file.is_file())
            file = files[random.integers(len(files))]
            damage_at_random(random, file)
            if file.name == "zarr.json":
                with pytest.raises(UserError, match=name):
                    open_store(store)
            else:
                assert trained_on(name)
            contents[file] = file.read_bytes()
            file.write_bytes(whole[str(file.relative_to(store))])  # so that the next case can be opened
        for file, content in contents.items():
            file.write_bytes(content)
        capsys.readouterr()
        assert main(["verify", str(store), "--workers", "1"]) == 1
        assert sorted(line.split(": ")[1] for line in capsys.readouterr().err.splitlines()) == damaged
        assert main(["verify", str(store), "--source", str(cases / "kits"), "--repair", "--workers", "1"]) == 0
        assert all_files(store) == whole


def test_a_folder_whose_name_is_no_text_ends_only_itself(kits, tmp_path, capsys):
    shutil.copytree(kits, tmp_path / "kits")
    os.rename(os.fsencode(tmp_path / "kits" / "case_00001"), os.fsencode(tmp_path / "kits") + b"/case_\xff")
    for workers in ("1", "2"):
        assert prepare(tmp_path / "kits", tmp_path / "s.zarr", "--workers", workers) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert line.startswith(r"error: case_\udcff: 'case_\udcff' can't be the name of a case")
        assert ", 1 failed" in out
    assert list(open_store(tmp_path / "s.zarr").cases) == ["case_00000"]


@pytest.mark.parametrize("layout", ["kits", "pairs"])
def test_a_folder_that_can_not_be_read_ends_only_itself(kits, tmp_path, capsys, layout):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else and back")
    shutil.copytree(kits, tmp_path / "kits")
    more = ["--layout", layout]
    if layout == "pairs":
        patterns = ["{case}/imaging.nii.gz", "{case}/segmentation.nii.gz"]
        more += ["--image-pattern", patterns[0], "--label-pattern", patterns[1]]
    (tmp_path / "kits" / "case_00001").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o755)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o777)
    os.seteuid(65534)
    try:
        if not os.access(tmp_path / "kits" / "case_00000", os.R_OK, effective_ids=True):
            pytest.skip("others can't reach the temporary folder")
        code = prepare(tmp_path / "kits", tmp_path / "mine" / "s.zarr", *more)
    finally:
        os.seteuid(0)
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: case_00001: .*case_00001/imaging.nii.gz: Permission denied; mend that .*", line)
    assert list(open_store(tmp_path / "mine" / "s.zarr").cases) == ["case_00000"]
