"""Views of slices: pure functions of (seed, row, view number), alike for image and label."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_dist.data import transformations
from spark_dist.data.augmentation import UNLIMITED, Views
from spark_dist.data.transformations import GEOMETRIC, INTENSITY, affine, uniforms, warp
from spark_dist.data.views import ORIENTATIONS, Crop, orient, orientation_matrix

WINDOW = (-100, 300)
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(-300, 500, (60, 52)).astype(np.int16)
LABEL = np.zeros((60, 52), np.uint8)
LABEL[5:14, 38:49] = 1
NUMBERS = np.array([0.2, 0.9, 0.35, 0.7])


def view(views, row=3, number=1, image=IMAGE):
    (image,), label = views.of(row, number, [image], LABEL, WINDOW, LABEL > 0)
    return image, label


@pytest.mark.parametrize("shift", [(0, 0), (-3, 5), (20, 0)])
def test_none_is_the_crop_and_flips_are_its_orientations(shift):
    crop = Crop((32, 32), shift)
    cropped = crop.of(IMAGE, -100), crop.of(LABEL, 0)
    assert all(np.array_equal(*pair) for pair in zip(view(Views(crop)), cropped, strict=True))
    flips = Views(crop, "flips")
    assert flips.count == ORIENTATIONS
    for number in range(flips.count):
        expected = [orient(part, number) for part in cropped]
        assert all(np.array_equal(*pair) for pair in zip(view(flips, number=number), expected, strict=True))


@pytest.mark.parametrize(
    ("options", "orientations"),
    [
        ({}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"mirror": False}, (0, 1, 2, 3)),
        ({"quarter_turns": False}, (0, 2, 4, 6)),
        ({"mirror": False, "quarter_turns": False}, (0,)),
        ({"mirror": False, "crop": Crop((32, 16))}, (0, 2)),
        ({"crop": Crop((32, 16))}, (0, 2, 4, 6)),
    ],
)
def test_switches_choose_the_orientations(options, orientations):
    assert Views(**{"crop": Crop((32, 32)), "augment": "flips"} | options).orientations == orientations


def test_the_number_of_views():
    crop = Crop((32, 32))
    assert [Views(crop, kind).count for kind in ("none", "flips", "full")] == [1, 8, 8]
    assert Views(crop, anywhere=True).count == 8
    assert Views(crop, "full", number=3).count == 3
    assert Views(crop, "full", number=-1).count == UNLIMITED


@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_a_warp_that_only_turns_is_the_turned_crop(orientation):
    crop = Crop((32, 32), (-14, -4))
    matrix = crop.centre_of(IMAGE.shape) @ orientation_matrix(orientation) @ crop.centred()
    assert np.array_equal(warp(IMAGE, matrix, crop.size, -100, False), orient(crop.of(IMAGE, -100), orientation))


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_full_views_differ_and_are_in_the_window(dtype):
    views = Views(Crop((32, 32)), "full", seed=5)
    seen = [view(views, row, number, IMAGE.astype(dtype)) for row in (0, 1) for number in range(4)]
    for image, label in seen:
        assert image.dtype == np.float32
        assert image.shape == label.shape == (32, 32)
        assert image.min() >= 0
        assert image.max() <= 1
    assert len({image.tobytes() for image, _ in seen}) == len(seen)
    assert not np.array_equal(view(views)[0], view(Views(Crop((32, 32)), "full", seed=6))[0])


def digest() -> str:
    """A hash of some full views."""
    views = Views(Crop((32, 48)), "full", anywhere=True, seed=11)
    parts = [part.tobytes() for n in range(40) for part in view(views, n % 7, n)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_view_is_the_same_in_another_process_and_order():
    here = __file__.rsplit("/", 1)[0]
    code = f"import sys; sys.path.insert(0, {here!r}); import test_augmentation as t; "
    code += "t.view(t.Views(t.Crop((8, 8)), 'full')); "
    result = subprocess.run(
        [sys.executable, "-c", code + "print(t.digest())"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest() == digest()


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_geometric_transformation_changes_places_a_little(name):
    matrix = GEOMETRIC[name]((64, 64), NUMBERS)
    assert not np.allclose(matrix, np.eye(3))
    assert np.abs(matrix @ [20, -20, 1] - [20, -20, 1]).max() < 15
    assert np.array_equal(matrix, GEOMETRIC[name]((64, 64), NUMBERS))


@pytest.mark.parametrize("name", INTENSITY)
def test_an_intensity_transformation_changes_the_image_and_is_a_function_of_its_numbers(name):
    image = ((IMAGE + 300) / 800).astype(np.float32)[np.newaxis]
    before = image.copy()
    change = INTENSITY[name][1]
    changed = change(image, NUMBERS)
    assert np.array_equal(image, before)
    assert changed.shape == image.shape
    assert changed.dtype == np.float32
    assert not np.allclose(changed, image)
    assert np.array_equal(changed, change(image, NUMBERS))
    assert not np.array_equal(changed, change(image, NUMBERS[::-1].copy()))
    assert np.isfinite(change(np.zeros_like(image), NUMBERS)).all()


@given(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_image_and_label_move_alike(seed, row, number):
    """An image that shows its label and nothing else still shows it in every view."""
    label = np.zeros((80, 80), np.uint8)
    label[25:50, 30:52] = 1
    views = Views(Crop((64, 64)), "full", seed=seed)
    geometric, _, drawn = uniforms(seed, 3, row, number)
    intensity = np.ones((len(INTENSITY), 5))
    change = affine((64, 64), geometric) @ orientation_matrix(views.orientations[int(drawn[0] * 8)])
    matrix = views.crop.centre_of(label.shape) @ change @ views.crop.centred()
    image = transformations.changed(warp(label.astype(np.float32), matrix, (64, 64), 0, False)[np.newaxis], intensity)[
        0
    ]
    seen = views.of(row, number, [label.astype(np.int16)], label, (0, 1), label > 0)[1]
    assert np.array_equal(seen, warp(label, matrix, (64, 64), 0, True))
    assert seen.sum() > 300
    assert ((image > 0.5) != (seen > 0)).sum() <= 0.05 * seen.sum()


def test_a_third_of_the_crops_from_anywhere_lie_around_the_target():
    views = Views(Crop((16, 16)), anywhere=True, number=-1)
    shown = np.array([view(views, number=n)[1].any() for n in range(600)])
    places = {view(views, number=n)[0].tobytes() for n in range(50)}
    assert len(places) > 40
    by_chance = np.mean([LABEL[r : r + 16, c : c + 16].any() for r in range(45) for c in range(37)])
    assert shown.mean() == pytest.approx(1 / 3 + 2 / 3 * by_chance, abs=0.08)
    # Nothing to lie around, and a crop that is larger than the slice.
    empty = np.zeros_like(LABEL)
    assert Views(Crop((16, 16)), anywhere=True).of(0, 0, [IMAGE], empty, WINDOW, empty > 0)[0][0].shape == (16, 16)
    large = Views(Crop((64, 64)), anywhere=True).of(0, 0, [IMAGE], LABEL, WINDOW, LABEL > 0)
    assert np.array_equal(large[0][0], Crop((64, 64)).of(IMAGE, -100))


def test_a_transformation_at_the_end_leaves_the_numbers_of_the_others(monkeypatch):
    before = uniforms(0, 3, 1, 2)
    monkeypatch.setitem(INTENSITY, "nothing", (0.5, lambda image, u: image))
    monkeypatch.setitem(GEOMETRIC, "nothing", lambda size, u: np.eye(3))
    for one, other in zip(before, uniforms(0, 3, 1, 2), strict=True):
        assert np.array_equal(one, other[: len(one)])
