import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.store import open_store, write_case, write_split
from spark_dist.data.augmentation import Views
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.loader import Prefetcher, blocks_per_worker, training_loader
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.slices import slice_table
from spark_dist.data.views import ORIENTATIONS, Crop, SliceSpec, orient

SPEC = SliceSpec("organ", Crop((32, 32)))


@pytest.fixture
def table(tiny_store):
    return slice_table(open_store(tiny_store), "default", "train", "organ")


def test_the_default_crop_is_the_original_one():
    inside, placed = Crop((384, 384), (-14, -4)).overlap((512, 512))
    assert inside == (slice(50, 434), slice(60, 444))
    assert placed == (slice(0, 384), slice(0, 384))


@given(
    plane=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shift=st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
)
def test_crop_puts_every_pixel_where_it_was(plane, size, shift):
    image = np.arange(1, plane[0] * plane[1] + 1).reshape(plane)
    inside, placed = Crop(size, shift).overlap(plane)
    crop = np.zeros(size, int)
    crop[placed] = image[inside]
    top, left = ((plane[k] - size[k]) // 2 + shift[k] for k in range(2))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = top + row, left + column
            expected = image[y, x] if 0 <= y < plane[0] and 0 <= x < plane[1] else 0
            assert crop[row, column] == expected


def turned(image, orientation):
    """What an orientation is: flipped left to right if it is 4 or more, then quarter turns."""
    return np.rot90(image[:, ::-1] if orientation >= 4 else image, orientation % 4)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_orientations_are_flips_and_quarter_turns(dtype):
    image = np.arange(1, 200, dtype=dtype)[:165].reshape(11, 15)[2:, 1:14]  # a view, as crops are
    for k in range(ORIENTATIONS):
        np.testing.assert_array_equal(orient(image, k), turned(image, k))


def test_the_eight_orientations_differ_and_keep_the_pixels():
    image = np.arange(16, dtype=np.int16).reshape(4, 4)
    views = [orient(image, k) for k in range(ORIENTATIONS)]
    assert len({view.tobytes() for view in views}) == ORIENTATIONS
    assert all(np.array_equal(np.sort(view, axis=None), np.arange(16)) for view in views)
    assert np.array_equal(views[0], image)


def test_batches_hold_windowed_slices_and_their_masks(table):
    crop = Crop((32, 32), (1, -2))
    spec = SliceSpec("tumour", crop)
    keys = [ORIENTATIONS * row + row % ORIENTATIONS for row in range(9)]
    dataset = SliceDataset(table, spec)
    batch = to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))
    for n, key in enumerate(keys):
        case = table.cases[table.case[key // ORIENTATIONS]]
        z = table.slice[key // ORIENTATIONS]
        group = zarr.open_group(table.store.path / "cases" / case, mode="r")
        inside, placed = crop.overlap(group["image"].shape[1:])
        image, label = np.full((32, 32), -200.0), np.zeros((32, 32))
        image[placed], label[placed] = group["image"][z][inside], group["label"][z][inside]
        image = turned(np.clip((image + 200) / 500, 0, 1) * 2 - 1, key % ORIENTATIONS)
        np.testing.assert_allclose(batch.image[n, 0], image, atol=1e-6)
        np.testing.assert_array_equal(batch.mask[n, 1], turned(label == 2, key % ORIENTATIONS))
        np.testing.assert_array_equal(batch.mask[n].sum(dim=0), 1)


@given(
    n=st.integers(6, 200),
    batch_size=st.integers(6, 32),
    world=st.integers(1, 3),
    views=st.sampled_from([8, 4, 1]),
)
@settings(max_examples=60)
def test_an_epoch_is_every_slice_once_whatever_the_number_of_processes(n, batch_size, world, views):
    def batches(rank, world):
        return list(EpochSampler(Order(n, batch_size, 7, views), rank, world))

    whole, parts = batches(0, 1), [batches(rank, world) for rank in range(world)]
    assert [[key for part in parts for key in part[k]] for k in range(len(whole))] == whole
    assert sorted(key // views for batch in whole for key in batch) == list(range(n))
    sizes = [len(batch) for batch in whole]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    samplers = [EpochSampler(Order(n, batch_size, 7, views), rank, world) for rank in range(world)]
    for step, size in enumerate(sizes):
        for rank, sampler in enumerate(samplers):
            assert sampler.weight(step) == pytest.approx(len(parts[rank][step]) * world / size)


@given(
    shown=st.integers(12, 60),
    empty=st.integers(12, 90),
    unlabelled=st.sampled_from([0, 40]),
    batch_size=st.integers(16, 24),
    share=st.sampled_from([0.25, 0.5, 0.7]),
    world=st.integers(1, 2),
)
@settings(max_examples=50, deadline=None)
def test_mixed_batches_have_their_share_of_each_kind(shown, empty, unlabelled, batch_size, share, world):
    """For any number of processes, from any step on; one kind is gone through once, the others as often as it takes."""
    order = Order(shown + empty, batch_size, 7, 2, unlabelled, 0.5, without_target=empty, target_share=share)
    assume(all(stream.each_epoch // order.steps >= world for stream in order.streams))  # fewer are refused
    for epoch in range(2):
        sampler, *ranks = EpochSampler(order), *(EpochSampler(order, rank, world) for rank in range(world))
        for each in (sampler, *ranks):
            each.epoch = epoch
        whole = list(sampler)
        sampler.start = 1
        assert list(sampler) == whole[1:]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            assert sorted(key for part in parts for key in part) == sorted(whole[step])
            weights = [rank.weight(step) for rank in ranks]
            assert weights == pytest.approx([len(part) * world / len(whole[step]) for part in parts])
        rows = np.array([key // 2 for batch in whole for key in batch])
        kinds = [rows[rows < shown], rows[(rows >= shown) & (rows < shown + empty)], rows[rows >= shown + empty]]
        assert any(len(np.unique(k)) == len(k) == n for k, n in zip(kinds, (shown, empty, unlabelled), strict=True))
        known = batch_size - round(batch_size * 0.5) if unlabelled else batch_size
        for batch in whole:
            full = round(known * share)
            fewest = (full * (order.steps - 1) + 1) // order.steps
            assert fewest <= sum(key // 2 < shown for key in batch) <= full


def test_mixed_slices_are_all_with_the_empty_ones_last(tiny_store):
    store = open_store(tiny_store)
    labelled, every, mixed = (slice_table(store, "default", "train", "tumour", s) for s in ("labelled", "all", "mixed"))
    places = [set(zip(t.case.tolist(), t.slice.tolist(), strict=True)) for t in (labelled, every, mixed)]
    assert places[0] < places[1] == places[2]
    assert len(mixed) == len(every) == len(labelled) + mixed.without_target
    shown = len(labelled)
    assert np.array_equal(mixed.case[:shown], labelled.case)
    assert np.array_equal(mixed.slice[:shown], labelled.slice)
    with pytest.raises(UserError, match=r"--target-share 0.01: batches of 8 would have 0 slices"):
        EpochSampler(Order(len(mixed), 8, 0, without_target=mixed.without_target, target_share=0.01))


def test_nothing_to_mix_is_an_error(tiny_store):
    store = open_store(tiny_store)
    full = {name: replace(c, label_counts=np.maximum(c.label_counts, 1)) for name, c in store.cases.items()}
    with pytest.raises(UserError, match=r"every slice of the train part .* use --slices all"):
        slice_table(replace(store, cases=full), "default", "train", "organ", "mixed")


def test_every_orientation_comes_once_in_a_block_of_eight_epochs():
    seen = Counter()
    for epoch in range(8):
        sampler = EpochSampler(Order(21, 8, 3, 8))
        sampler.epoch = epoch
        seen.update(key for batch in sampler for key in batch)
    assert seen == Counter(range(21 * ORIENTATIONS))


def test_an_epoch_can_be_entered_in_the_middle():
    sampler, late = EpochSampler(Order(50, 8, 3, 8)), EpochSampler(Order(50, 8, 3, 8))
    sampler.epoch = late.epoch = 4
    late.start = 3
    assert list(late) == list(sampler)[3:]


def test_too_many_processes_for_a_batch_is_refused():
    with pytest.raises(UserError, match="--batch-size"):
        EpochSampler(Order(5, 2, 0), 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "views"),
    [(n, Views(SPEC.crop, "flips")) for n in (1, 2, 3)] + [(2, Views(SPEC.crop, "full", anywhere=True, seed=3))],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_give_the_same_batches(table, workers, views):
    """Also to one who takes his time, while the workers go on filling their blocks, or who leaves in the middle."""
    dataset = SliceDataset(table, SPEC, views=views)
    dataset.__getitems__([0, 1])  # opened in the parent before the workers start
    sampler = EpochSampler(Order(len(table), 1, 0, views.count))
    plain = [dataset.__getitems__(keys) for keys in sampler]
    loader = training_loader(dataset, sampler, workers)
    assert len(plain) > workers * blocks_per_worker(workers)
    for wait, end in ((0.02, len(plain)), (0, 9), (0, len(plain))):
        for n, (a, b) in enumerate(zip(plain, loader, strict=True)):
            time.sleep(wait)
            for name in ("image", "label", "window", "keys"):
                assert torch.equal(getattr(a, name), getattr(b, name)), (n, name)
                assert getattr(b, name).untyped_storage().data_ptr() == loader.blocks.data_ptr(), (
                    "not handed over in a block"
                )
            if n == end:
                break


@pytest.mark.parametrize(
    ("start", "persistent", "workers"),
    [
        ("fork", False, 1),
        ("fork", True, 2),
        pytest.param("spawn", True, 1, marks=pytest.mark.slow),
        pytest.param("forkserver", False, 2, marks=pytest.mark.slow),
    ],
)
def test_workers_do_not_hang_when_the_parent_has_read_before(tiny_store, start, persistent, workers):
    # In a process of its own, as TensorStore aborts one that was forked after its first use.
    code = f"""
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from data_tools.store import open_store
from spark_dist.data.shared_memory import pack
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.data.batches import SliceDataset
from spark_dist.data.slices import slice_table

if __name__ == "__main__":
    table = slice_table(open_store(Path({str(tiny_store)!r})), "default", "train", "organ")
    dataset = SliceDataset(table, SliceSpec("organ", Crop((32, 32))))
    keys = [[0, 9, 18], [27, 36]]
    read = [dataset.__getitems__(batch).image for batch in keys]
    loader = DataLoader(
        dataset, batch_sampler=keys, collate_fn=pack, timeout=60, num_workers={workers},
        persistent_workers={persistent}, multiprocessing_context={start!r},
    )
    for epoch in range(2):
        for a, b in zip(read, loader, strict=True):
            assert torch.equal(a, b.image)
"""
    script = tiny_store.parent / f"{start}{persistent}{workers}.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_damaged_chunk_names_case_and_slice(tiny_store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(tiny_store, copy)
    table = slice_table(open_store(copy), "default", "train", "organ")
    shard = copy / "cases" / "case_00000" / "image" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    dataset = SliceDataset(table, SPEC)
    rows = np.flatnonzero(table.case == 0)
    with pytest.raises(UserError, match=r"case_00000 slice \d+ is damaged"):
        [dataset.__getitems__([int(row) * ORIENTATIONS]) for row in rows]
    shard.unlink()
    with pytest.raises(UserError, match="case_00000 slice"):
        SliceDataset(table, SPEC).__getitems__([int(rows[0]) * ORIENTATIONS])


@pytest.mark.parametrize(("part", "name"), [("train", "case_00001"), ("val", "case_00006"), ("test", "case_00009")])
def test_a_case_that_lost_its_label_is_named(tiny_store, tmp_path, part, name):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(tiny_store, copy)
    case = open_store(copy).cases[name]
    facts = {"affine": case.affine.tolist(), "spacing": case.spacing, "window": case.window, "source": case.source}
    write_case(copy, name, np.zeros(case.shape, np.int16), None, facts)
    with pytest.raises(UserError, match=f"case '{name}' of the {part} part of split 'default' has lost its label"):
        slice_table(open_store(copy), "default", part, "organ")


def test_a_part_without_the_target_is_refused(tiny_store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(tiny_store, copy)
    organ = np.ones((3, 8, 8), np.uint8)
    facts = {"affine": np.eye(4).tolist(), "spacing": [1, 1, 1], "window": [0, 1], "source": {}}
    write_case(copy, "healthy", organ.astype(np.int16), organ, facts)
    write_split(copy, "other", {"train": ["healthy"], "val": [], "test": ["case_00002"], "seed": 0})
    with pytest.raises(UserError, match="train part of split 'other' has no slice with tumour"):
        slice_table(open_store(copy), "other", "train", "tumour")
    with pytest.raises(UserError, match="val part of split 'other' has no case"):
        slice_table(open_store(copy), "other", "val", "tumour")
    with pytest.raises(UserError, match="did you mean default"):
        slice_table(open_store(copy), "defalt", "train", "organ")


def test_the_dataset_can_be_sent_to_a_worker_after_use(table):
    dataset = SliceDataset(table, SPEC)
    first = dataset.__getitems__([8, 17])
    again = pickle.loads(pickle.dumps(dataset)).__getitems__([8, 17])
    assert torch.equal(first.image, again.image)


def test_batches_read_ahead_come_in_order_and_errors_with_them():
    class Loader(list):
        batch_sampler = dataset = None

        def __iter__(self):
            for item in super().__iter__():
                if isinstance(item, Exception):
                    raise item
                time.sleep(0.02)
                yield item

    ahead = Prefetcher(Loader(range(5)))
    assert list(ahead) == list(ahead) == [0, 1, 2, 3, 4]
    assert 0 < ahead.waited < 10
    before = threading.active_count()
    for item in Prefetcher(Loader(range(100))):
        if item == 3:
            break
    with pytest.raises(UserError, match="this slice"):
        list(Prefetcher(Loader([1, UserError("this slice")])))
    assert threading.active_count() == before
