"""`spark-data preview` and `spark-data stats`."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import zarr
from matplotlib.image import imread

from data_tools.cli import main
from data_tools.creation import create_store
from data_tools.preview import COLOURS, chosen_slices
from data_tools.stats import count_intensities, measures
from data_tools.store import Case, open_store, write_case


class Page(HTMLParser):
    """What an HTML page links to, and its figures."""

    def __init__(self, text):
        super().__init__()
        self.links, self.figures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "figure":
            self.figures.append(attributes)


def pixels_near(picture, colour):
    """How many pixels of a picture (H, W, RGBA) have about this colour."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return int((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.12).sum())


def test_preview(tiny_store, tmp_path, capsys):
    out = tmp_path / "look"
    assert main(["preview", str(tiny_store), "--out", str(out), "--only", "case_00001,case_0000[0]"]) == 0
    page = Page((out / "index.html").read_text())
    assert page.links == [f"sheets/case_{k:05}.png" for k in (0, 0, 1, 1)]
    assert all((out / link).exists() for link in page.links)
    case = open_store(tiny_store).cases["case_00000"]
    assert float(page.figures[0]["data-volume1"]) == pytest.approx(case.volume_ml("tumour"), rel=1e-4)
    assert "default train" in page.figures[0]["data-text"].replace(":", "")
    # A later call draws other cases, and the page has all that were drawn.
    assert main(["preview", str(tiny_store), "--out", str(out), "--only", "case_00007"]) == 0
    assert len(Page((out / "index.html").read_text()).figures) == 3
    assert {file.name for file in (out / "sheets").iterdir()} == {f"case_{k:05}.png" for k in (0, 1, 7)}
    capsys.readouterr()
    assert main(["preview", str(tiny_store), "--out", str(out), "--only", "case_1"]) == 2
    assert "there is no case 'case_1'; did you mean case_0" in capsys.readouterr().err


def test_sheets_outline_what_there_is(tmp_path):
    path = tmp_path / "s.zarr"
    create_store(path, {"labels": {"organ": [1], "tumour": [2]}, "window": {"kind": "fixed", "low": 0, "high": 100}})
    facts = {"affine": np.eye(4).tolist(), "spacing": [4, 1, 1], "window": [0, 100], "source": {}}
    image, label = np.full((4, 40, 40), 50, np.int16), np.zeros((4, 40, 40), np.uint8)
    write_case(path, "none", image, label, facts)
    label[1:3, 10:30, 10:30] = 1
    write_case(path, "organ", image, label, facts)
    label[2, 15:20, 15:20] = 2
    write_case(path, "tumour", image, label, facts)
    write_case(path, "unlabelled", image, None, facts)
    assert main(["preview", str(path), "--out", str(tmp_path)]) == 0
    assert main(["stats", str(path), "--out", str(tmp_path / "stats.png")]) == 0
    for name, shown in (("unlabelled", set()), ("none", set()), ("organ", {"organ"}), ("tumour", {"organ", "tumour"})):
        picture = imread(tmp_path / "sheets" / f"{name}.png")
        colours = dict(zip(("organ", "tumour"), COLOURS, strict=False))
        assert {region for region, colour in colours.items() if pixels_near(picture, colour) > 50} == shown


@pytest.mark.parametrize("count", [1, 4, 10])
def test_slices_with_most_tumour_are_chosen(count):
    counts = np.zeros((100, 3), int)
    counts[20:80, 1] = 50
    counts[40:50, 2] = np.arange(10) + 1

    def case(counts, depth):
        regions = {"organ": (1, 2), "tumour": (2,)}
        return Case("a", (depth, 8, 8), "int16", np.eye(4), (1, 1, 1), (0, 1), counts, {}, regions)

    chosen = chosen_slices(case(counts, 100), count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    assert 49 in chosen
    assert all(20 <= z < 80 for z in chosen)
    assert min(np.diff(chosen), default=9) >= 5
    counts[:, 1:] = 0
    assert chosen_slices(case(counts, 100), 3) == [0, 50, 99]
    assert chosen_slices(case(counts[:2], 2), 10) == [0, 1]
    assert chosen_slices(case(counts[:0], 9), 3) == [0, 4, 8]


def test_damage_is_one_line_with_the_case(tiny_store, tmp_path, capsys):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(tiny_store, copy)
    (copy / "cases" / "case_00003" / "image" / "c" / "0" / "0" / "0").write_bytes(b"nothing")
    for command in ("preview", "stats"):
        assert main([command, str(copy), "--out", str(tmp_path / command)]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .*case_00003 .*is damaged.*\n", error)


def test_stats(tiny_store, tmp_path, capsys):
    assert main(["stats", str(tiny_store), "--out", str(tmp_path / "new" / "stats.png")]) == 0
    out = capsys.readouterr().out
    store = open_store(tiny_store)
    lines = out.splitlines()
    rows = {line.split("  ")[1].strip(): line.split() for line in lines if line.startswith("  ")}
    slices = sum(store.cases[f"case_{k:05}"].shape[0] for k in range(5))
    (train,) = (k for k, line in enumerate(lines) if "default: train" in line)
    assert lines[train].split()[2:] == ["5", str(slices)]
    found = [line.split() for line in lines[train + 1 : train + 3]]
    assert found == [["organ", "5", str(slices - 5)], ["tumour", "5", str(slices - 10)]]
    assert rows["rows"][1:5] == ["11", "40", "45", "50"]
    picture = imread(tmp_path / "new" / "stats.png")
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05


def test_intensities_are_counted_exactly(tiny_store):
    store = open_store(tiny_store)
    found = count_intensities(store)
    for label in range(3):
        values = np.concatenate(
            [
                group["image"][...][group["label"][...] == label]
                for name in store.cases
                for group in [zarr.open_group(tiny_store / "cases" / name, mode="r")]
            ]
        ).astype(float)
        wanted = (values.mean(), values.std(), *np.percentile(values, (0.5, 50, 99.5), method="inverted_cdf"))
        assert found.row(label) == pytest.approx(wanted, abs=1e-6)


def test_measures(tiny_store):
    case = open_store(tiny_store).cases["case_00002"]
    label = zarr.open_array(tiny_store / "cases" / "case_00002" / "label", mode="r")[...]
    found = measures(case)
    for region, values in {"organ": (1, 2), "tumour": (2,)}.items():
        assert found[f"{region} ml"] == pytest.approx(np.isin(label, values).sum() * 3 * 0.8 * 0.7 / 1000)
    assert (found["slices"], found["rows"], found["slice spacing mm"]) == (7, 42, 3)


def test_a_case_of_one_slice_row_or_column_is_drawn(tmp_path):
    create_store(tmp_path / "s.zarr", {"labels": {"organ": [1]}, "window": {"kind": "fixed", "low": 0, "high": 9}})
    facts = {"affine": np.eye(4).tolist(), "spacing": [4, 1, 1], "window": [0, 9], "source": {}}
    for name, shape in (("slice", (1, 20, 20)), ("row", (9, 1, 20)), ("column", (9, 20, 1)), ("voxel", (1, 1, 1))):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(n // 3, 2 * n // 3 + 1) for n in shape)] = 1
        write_case(tmp_path / "s.zarr", name, np.zeros(shape, np.int16), label, facts)
    assert main(["preview", str(tmp_path / "s.zarr"), "--out", str(tmp_path / "look")]) == 0
    for name in ("slice", "row", "column"):
        assert pixels_near(imread(tmp_path / "look/sheets" / f"{name}.png"), COLOURS[0]) > 20, name


@pytest.mark.parametrize("taken", ["index.html", "sheets/case_00001.png"])
def test_files_that_were_not_made_here_stay(tiny_store, tmp_path, capsys, taken):
    (tmp_path / "sheets").mkdir()
    (tmp_path / taken).write_text("<title>my thesis</title>")
    line = ["preview", str(tiny_store), "--out", str(tmp_path), "--only", "case_0000[01]", "--slices", "1"]
    assert main(line) == 2
    assert f"{tmp_path / taken}: exists and was not made by spark-dist" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [taken.split("/")[-1]]
    (tmp_path / taken).unlink()
    assert main(line) == main(line) == 0


def test_a_figure_does_not_replace_what_was_not_made_here(tiny_store, tmp_path, capsys):
    for file in (tmp_path / "photo.png", tmp_path / "zarr.json"):
        file.write_bytes(b"mine")
        assert main(["stats", str(tiny_store), "--out", str(file)]) == 2
        assert f"{file}: exists and was not made by spark-dist" in capsys.readouterr().err
        assert file.read_bytes() == b"mine"
    figure = ["stats", str(tiny_store), "--out", str(tmp_path / "new.png")]
    assert main(figure) == main(figure) == 0
