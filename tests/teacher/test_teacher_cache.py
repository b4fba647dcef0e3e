from contextlib import nullcontext

import numpy as np
import pytest
import torch

from data_tools.ownership import fingerprint
from data_tools.store import open_store
from spark_dist.data.augmentation import Views
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.cache import CacheLayout, TeacherCache
from spark_dist.data.loader import training_loader
from spark_dist.data.number_formats import DTYPES, ROUNDING, as_tensor, decode, encode, entry_bytes, stored_arrays
from spark_dist.data.order import EpochSampler, Order
from spark_dist.data.slices import slice_table
from spark_dist.data.views import ORIENTATIONS, Crop, SliceSpec, orient_batch, upright_batch
from spark_dist.distillers import DISTILLERS, build_distiller
from spark_dist.networks import build_network
from spark_dist.teacher.fingerprint import open_cache, probe_targets, weights_hash
from spark_dist.teacher.targets import TeacherTargets

SPEC = SliceSpec("organ", Crop((32, 32)))
SHAPES = {"a": (4, 5), "b": (2,)}


def filled(folder, keys=(3, 9, 10), dtype="float32", size=64):
    cache = TeacherCache(folder, CacheLayout(size, SHAPES, dtype))
    values = {"a": torch.randn(len(keys), 4, 5), "b": torch.randn(len(keys), 2)}
    cache.add(np.array(keys), values)
    cache.flush()
    return cache, values


def read(cache, keys):
    return cache.read(np.array(keys)).arrays


def test_entries_come_back_in_the_order_asked_for(tmp_path):
    _, values = filled(tmp_path)
    found = read(TeacherCache(tmp_path, CacheLayout(64, SHAPES, "float32")), [10, 3])
    assert torch.equal(found["a"], values["a"][[2, 0]])
    assert torch.equal(found["b"], values["b"][[2, 0]])


def test_a_batch_with_a_missing_entry_is_not_read(tmp_path):
    cache, _ = filled(tmp_path)
    assert read(cache, [3, 4]) is None
    assert cache.entries() == 3


def test_adding_rounds_as_reading_back_does(tmp_path):
    cache = TeacherCache(tmp_path, CacheLayout(8, {"a": (30,)}, "float16"))
    value = torch.randn(2, 30)
    given = cache.add(np.array([0, 1]), {"a": value})["a"]
    cache.flush()
    assert given.dtype == torch.float32
    assert not torch.equal(given, value)
    assert torch.equal(given, read(cache, [0, 1])["a"].float())


def test_two_writers_fill_one_cache(tmp_path):
    first, _ = filled(tmp_path, (1, 2))
    second, values = filled(tmp_path, (2, 5))
    assert first.entries() == second.entries() == 3
    assert torch.equal(read(first, [5])["a"], values["a"][1:])


def test_what_is_there_is_not_written_again(tmp_path):
    cache, _ = filled(tmp_path)
    cache.add(np.array([3, 9]), {"a": torch.zeros(2, 4, 5), "b": torch.zeros(2, 2)})
    cache.flush()
    assert len(list((tmp_path / "segments").iterdir())) == 1


def test_a_half_written_segment_is_not_seen(tmp_path):
    filled(tmp_path)
    segment = next((tmp_path / "segments").iterdir())
    segment.rename(segment.with_suffix(".tmp"))
    assert TeacherCache(tmp_path, CacheLayout(64, SHAPES, "float32")).entries() == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_never_read(tmp_path, damage, caplog):
    filled(tmp_path)
    shard = next((tmp_path / "segments").glob("*/a/c/0/0/0"))
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[10] ^= 4
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[: len(data) // 2])
    else:
        shard.unlink()
    cache = TeacherCache(tmp_path, CacheLayout(64, SHAPES, "float32"))
    found = cache.read(np.array([3, 9, 10]))
    assert found.arrays is None
    assert found.damaged == ((3,) if damage == "flip" else (3, 9, 10))
    assert "computed again" in caplog.text
    again = {"a": torch.ones(3, 4, 5), "b": torch.ones(3, 2)}
    cache.add(np.array([3, 9, 10]), again)
    cache.flush()
    for reader in (cache, TeacherCache(tmp_path, CacheLayout(64, SHAPES, "float32"))):
        assert torch.equal(read(reader, [3])["a"], again["a"][:1])


def test_damaged_keys_leave_a_segment_out(tmp_path, caplog):
    filled(tmp_path)
    shard = next((tmp_path / "segments").glob("*/keys/c/0"))
    shard.write_bytes(shard.read_bytes()[:-3])
    assert TeacherCache(tmp_path, CacheLayout(64, SHAPES, "float32")).entries() == 0
    assert "left out" in caplog.text


def test_a_full_disk_ends_caching_and_not_training(tmp_path, caplog):
    cache = TeacherCache(tmp_path, CacheLayout(8, {"a": (2,)}, "float32"))
    (tmp_path / "segments").write_text("a file where a folder is wanted")
    cache.add(np.array([0]), {"a": torch.zeros(1, 2)})
    cache.flush()
    assert cache.full
    assert "training goes on" in caplog.text
    assert torch.equal(cache.add(np.array([1]), {"a": torch.ones(1, 2)})["a"], torch.ones(1, 2))


def test_everything_that_matters_is_in_the_name():
    teacher = build_network("unet", width=0.05)
    network = build_network("enet", width=0.1)

    def name(**settings):
        distiller = build_distiller("spark", student=network.taps, teacher=teacher.taps, **settings)
        return probe_targets(distiller, teacher.taps, (32, 32))

    assert name() == name(kl=0.5)
    assert name() != name(gain=3)
    facts = {"teacher_weights": weights_hash(teacher), "method_probe": name()[0]}
    before = fingerprint(facts)
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(facts | {"teacher_weights": weights_hash(teacher)}) != before


@pytest.mark.parametrize(
    ("views", "dtype", "tolerance"),
    [
        (Views(SPEC.crop, "flips"), "float32", 1e-6),
        (Views(SPEC.crop, "flips"), "float16", 1e-3),
        (Views(SPEC.crop, "full", anywhere=True, number=4), "float32", 1e-6),
    ],
    ids=["flips-float32", "flips-float16", "full-float32"],
)
@pytest.mark.parametrize("method", sorted(DISTILLERS))
def test_cached_losses_equal_live_ones_in_all_views(tiny_store, tmp_path, method, views, dtype, tolerance):
    torch.manual_seed(0)
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    student = build_network("enet", width=0.25).eval()
    teacher = build_network("enet" if method == "tfkd" else "unet", width=0.25 if method == "tfkd" else 0.05)
    make_confident(teacher, table)
    distiller = build_distiller(method, student=student.taps, teacher=teacher.taps, samples=len(table)).eval()
    size = len(table) * views.count
    shapes = probe_targets(distiller, teacher.taps, (32, 32))[1]
    keys = [row * views.count + row % views.count for row in range(8)]

    def losses(cache):
        dataset = SliceDataset(table, SPEC, cache, views)
        batch = to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))
        targets = TeacherTargets(teacher, distiller, cache, nullcontext)
        torch.manual_seed(1)
        mask, known = targets(batch)
        terms = distiller(student(batch.image), known, mask, batch.index)
        return {name: term.item() for name, term in terms.items()}, targets

    live, _ = losses(None)
    cache = open_cache(tmp_path, {"method": method}, CacheLayout(size, shapes, dtype))
    filling, targets = losses(cache)
    assert targets.forwards == len(keys)
    targets.flush()
    cached, targets = losses(cache)
    assert (targets.hits, targets.forwards) == (len(keys), 0) or not shapes
    assert cached == filling
    total = sum(live.values())
    for name in live:
        assert cached[name] == pytest.approx(live[name], rel=tolerance, abs=tolerance * total)


def make_confident(teacher, table):
    """A fresh teacher answers the same everywhere, up to rounding; a trained one does not."""
    raw = SliceDataset(table, SPEC).__getitems__(list(range(0, 8 * ORIENTATIONS, ORIENTATIONS)))
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # The running statistics are those of this batch, not a tenth of them.
    with torch.no_grad():
        teacher.train()(to_device(raw, SliceDataset(table, SPEC), torch.device("cpu")).image)
        teacher.head.weight *= 10


def test_batches_are_turned_on_the_device_as_slices_are_and_back(tiny_store):
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    dataset, turns = SliceDataset(table, SPEC), np.arange(8)
    upright, oriented = (
        to_device(dataset.__getitems__(3 * ORIENTATIONS + o), dataset, torch.device("cpu")) for o in (turns * 0, turns)
    )
    assert torch.equal(orient_batch(upright.image, turns), oriented.image)
    assert torch.equal(upright_batch(oriented.mask, turns), upright.mask)


def test_canonical_targets_are_those_of_the_upright_slice_turned(tiny_store, tmp_path):
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    network = build_network("enet", width=0.25)
    teacher = build_network("unet", width=0.05).eval()
    distiller = build_distiller("spark", student=network.taps, teacher=teacher.taps)
    shapes = probe_targets(distiller, teacher.taps, (32, 32))[1]
    cache = open_cache(tmp_path, {}, CacheLayout(len(table) * ORIENTATIONS, shapes, "float32", canonical=True))
    targets, live = (TeacherTargets(teacher, distiller, c, nullcontext) for c in (cache, None))

    def batch(turns, cached=None):
        keys = ORIENTATIONS * np.arange(4) + turns
        dataset = SliceDataset(table, SPEC, cached)
        return to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))

    _, upright = live(batch(0))
    _, first = targets(batch(np.array([1, 3, 4, 6])))
    targets.flush()
    assert sorted(np.flatnonzero(~cache.missing(np.arange(cache.layout.size)))) == list(range(4 * ORIENTATIONS))
    assert cache.entries() == 4
    _, second = targets(batch(np.array([1, 3, 4, 6]), cache))
    assert (targets.forwards, targets.hits) == (4, 4)
    for name, x in upright.items():
        expected = orient_batch(x, np.array([1, 3, 4, 6])) if x.ndim > 2 else x
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_worker_hands_over_entries_in_its_blocks(tiny_store, tmp_path, dtype, memory):
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    values = {"a": torch.randn(len(table), 3, 8, 5), "b": torch.randn(len(table), 20), "c": torch.randn(len(table))}
    shapes = {name: x.shape[1:] for name, x in values.items()}
    cache = TeacherCache(tmp_path, CacheLayout(len(table), shapes, dtype, views=1), memory)
    expected = cache.add(np.arange(len(table)), values)
    cache.flush()
    loader = training_loader(
        SliceDataset(table, SPEC, cache, Views(SPEC.crop)), EpochSampler(Order(len(table), 5, 0)), 1
    )
    for batch in loader:
        targets = batch.entries.arrays
        for name, x in decode(targets).items():
            assert torch.equal(x, expected[name][batch.keys])
            assert targets[name].untyped_storage().data_ptr() == loader.blocks.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_formats_round_as_little_as_they_say(dtype):
    targets = {"map": torch.randn(3, 5, 9, 7), "flat": torch.randn(3, 9, 7), "few": torch.randn(3, 4)}
    targets["map"][:, 2] *= 1000
    targets["map"][:, 3] = 0
    arrays = encode(targets, dtype)
    shapes = {name: x.shape[1:] for name, x in targets.items()}
    assert {name: (a.shape[1:], str(a.dtype)) for name, a in arrays.items()} == stored_arrays(shapes, dtype)
    assert sum(a[0].nbytes for a in arrays.values()) == entry_bytes(shapes, dtype)
    back = decode({name: as_tensor(a) for name, a in arrays.items()})
    assert torch.equal(back["few"], targets["few"])
    for name in ("map", "flat"):
        x = targets[name]
        scale = x.abs()
        if dtype == "int8":
            scale = x.abs().amax(dim=(-2, -1), keepdim=True)
        assert ((back[name] - x).abs() <= 1.01 * ROUNDING[dtype] * scale).all()


def test_values_beyond_float16_stay_finite():
    arrays = encode({"map": torch.full((1, 2, 5, 5), 1e6)}, "float16")
    assert np.isfinite(arrays["map"]).all()
