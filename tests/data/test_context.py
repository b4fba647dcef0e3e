"""2.5D: a slice's neighbours are further input channels, the same ones wherever slices are read."""

import shutil
from collections import Counter
from dataclasses import replace
from io import FileIO

import numpy as np
import pytest
import torch
from conftest import keep_signals

from data_tools.errors import UserError
from data_tools.shards import SliceReader, read_index, read_metadata, slices_per_shard
from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.data.augmentation import Views
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.slices import VoxelReader, slice_table
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.cases import both_protocols
from spark_dist.evaluation.inference import predicted_classes, probabilities
from spark_dist.losses import segmentation
from spark_dist.networks import NETWORKS, build_network
from spark_dist.networks.checkpoint import load_card

SPEC = SliceSpec("organ", Crop((32, 32), (2, -3)), context=1)
JOB = ["--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture
def table(tiny_store):
    return slice_table(open_store(tiny_store), "default", "train", "organ", "all")


def batch_of(table, spec, keys, augment="none"):
    dataset = SliceDataset(table, spec, views=Views(spec.crop, augment, seed=4))
    return to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))


def test_neighbours_are_repeated_where_a_volume_ends():
    spec = replace(SPEC, context=2)
    assert spec.channels == 5
    assert spec.neighbours([0, 1, 4], 5).tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [2, 3, 4, 4, 4]]
    assert spec.neighbours([0], 1).tolist() == [[0] * 5]
    assert replace(SPEC, context=0).neighbours([3], 9).tolist() == [[3]]


@pytest.mark.parametrize("augment", ["none", "flips"])
def test_channels_are_the_slices_around_seen_alike(table, augment):
    views = Views(SPEC.crop, augment, seed=4).count
    plain = replace(SPEC, context=0)
    for row in range(12):
        number = row % views
        seen = batch_of(table, SPEC, [row * views + number], augment)
        case = np.flatnonzero(table.case == table.case[row])
        around = np.clip([row - 1, row, row + 1], case[0], case[-1])
        alone = batch_of(table, plain, around * views + number, augment)
        assert torch.equal(seen.image[0], alone.image[:, 0])
        assert torch.equal(seen.mask[0], alone.mask[np.flatnonzero(around == row)[0]])


def test_transformations_move_all_channels_alike():
    """Channels that are equal stay equal, but for the noise that each has of its own."""
    plane = np.random.default_rng(0).integers(0, 100, (40, 44)).astype(np.int16)
    label, views = (plane > 60).astype(np.uint8), Views(Crop((32, 32)), "full", anywhere=True, number=20)
    alike = 0
    for number in range(20):
        image, seen = views.of(3, number, [plane] * 3, label, (0, 100), label > 0)
        (alone,), seen_alone = views.of(3, number, [plane], label, (0, 100), label > 0)
        assert np.array_equal(seen, seen_alone)
        assert image.shape == (3, 32, 32)
        assert np.abs(image - alone).max() < 0.3
        alike += np.allclose(image, alone, atol=1e-5)
    assert alike > 12


def test_a_batch_fetches_and_decodes_each_slice_once(table, monkeypatch):
    fetched = Counter()
    start = SliceReader.start

    def counted(reader, z):
        fetched[reader._path.parent.name, reader._path.name, z] += 1
        return start(reader, z)

    monkeypatch.setattr(SliceReader, "start", counted)
    keys = list(range(len(table)))
    together = batch_of(table, SPEC, keys)
    images = {(case, z) for case, kind, z in fetched if kind == "image"}
    assert len(images) == len(table)
    assert set(fetched.values()) == {1}
    assert torch.equal(together.image[7:8], batch_of(table, SPEC, keys[7:8]).image)


def test_a_damaged_neighbour_is_named(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "s.zarr")
    table = slice_table(open_store(tmp_path / "s.zarr"), "default", "train", "organ", "all")
    array = tmp_path / "s.zarr" / "cases" / "case_00000" / "image"
    with FileIO(array / "c" / "0" / "0" / "0", "r+") as shard:
        begin = int(read_index(shard, slices_per_shard(read_metadata(array)))[2, 0])
        shard.seek(begin)
        shard.write(b"damaged")
    batch_of(table, SPEC, [0])
    with pytest.raises(UserError, match="case_00000 slice 2"):
        batch_of(table, SPEC, [0, 1])


@pytest.mark.parametrize("whole", [True, False])
def test_evaluation_is_that_of_each_slice_with_its_neighbours(whole):
    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 100, (19, 32, 32)).astype(np.int16)
    spec = SliceSpec("organ", Crop((32, 32)), context=2)
    network = build_network("enet", spec.channels, width=0.25).eval()
    found = probabilities(network, image, (0, 100), spec, whole)
    some = probabilities(network, image, (0, 100), spec, whole, slices=[0, 7, 18])
    for z in range(19):
        channels = [min(max(near, 0), 18) for near in range(z - 2, z + 3)]
        stacked = torch.from_numpy(np.stack([image[near] for near in channels])).float()[None] / 50 - 1
        with torch.no_grad():
            expected = network(stacked).logits.softmax(dim=1)[0, 1].numpy()
        np.testing.assert_allclose(found[0, z], expected, atol=1e-5)
    np.testing.assert_allclose(some[0], found[0, [0, 7, 18]], atol=1e-5)


def test_the_original_protocol_sees_the_neighbours_of_labelled_slices():
    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 100, (6, 48, 48)).astype(np.int16)
    spec = SliceSpec("organ", Crop((32, 32)), context=1)
    network = build_network("enet", 3, width=0.25).eval()
    shown = np.array([False, False, True, False, True, False])
    labelled = both_protocols(network, image, shown, (0, 100), spec)[1]
    cropped = predicted_classes(probabilities(network, image, (0, 100), spec, whole=False), 0.4)
    assert np.array_equal(labelled[shown], cropped[shown])
    assert not labelled[~shown].any()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_takes_a_step_with_neighbours(table, name):
    spec = SliceSpec("organ", Crop((64, 64)), context=1)
    batch = batch_of(table, spec, [1, 2])
    torch.manual_seed(0)
    network = build_network(name, spec.channels, width=0.1)
    if hasattr(network, "set_support"):
        network.set_support(batch.image, batch.mask[:, 1:])
    segmentation(network(batch.image).logits, batch.mask).backward()
    first = next(p for p in network.parameters() if p.ndim >= 4)
    assert first.grad.abs().sum() > 0
    found = probabilities(network, VoxelReader(table.store).case("case_00000", "image"), (-200, 300), spec)
    assert np.isfinite(found).all()


def test_a_teacher_and_its_student_share_the_context(tiny_store, tmp_path, monkeypatch, capsys):
    """Cached and live give the same student, another context another cache, and another teacher is refused."""
    monkeypatch.chdir(tmp_path)
    job = [*JOB, "--dataset", str(tiny_store), "--teacher", "enet", "--teacher-width", "0.25", "--method", "kd"]
    job += ["--student-width", "0.25", "--cache-dtype", "float32", "--augment", "none"]
    with keep_signals():
        assert main(["distill", *job, "--context", "1", "--cache", "on", "--out", "cached"]) == 0
        teacher = ["--teacher-checkpoint", "cached/teacher/best.safetensors"]
        assert main(["distill", *job, *teacher, "--context", "1", "--cache", "off", "--out", "live"]) == 0
        assert main(["distill", *job, *teacher, "--out", "other"]) == 2
        assert "was trained with --context 1" in capsys.readouterr().err
        line = ["picture", "s=live/student/best.safetensors", "--dataset", str(tiny_store), "--rows", "1"]
        assert main(line) == 0
        assert main(["evaluate", "live/student/best.safetensors", "--dataset", str(tiny_store)]) == 0
    cards = [load_card(tmp_path / job / "student" / "best.safetensors") for job in ("cached", "live")]
    assert all((card.in_channels, card.spec.context) == (3, 1) for card in cards)
    assert cards[0].val_dice == pytest.approx(cards[1].val_dice, abs=1e-3)
