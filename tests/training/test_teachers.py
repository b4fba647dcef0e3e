"""Several checkpoints, and flips of a slice, as one teacher."""

import pytest
import torch
from conftest import keep_signals, model_card, undecided

from data_tools.ownership import owned
from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.data.identity import image_fingerprint
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.distillers import build_distiller, prediction_methods
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.teacher.fingerprint import probe_targets
from spark_dist.teacher.saved import SavedNetworks
from spark_dist.training.checkpoint import load_state, newest_state

JOB = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 8, "--steps", 6, "--val-every", 9)
JOB += ("--augment", "none", "--student-width", 0.25, "--lr", 1e-4, "--log-every", 6)


def save(path, seed, network="unet", **facts):
    """A teacher that nobody has trained."""
    torch.manual_seed(seed)
    usual = {"network": network, "width": 0.05, "trained_on": ()}
    built = build_network(network, width=0.05)
    save_network(path, undecided(built) if network == "unet" else built, model_card(**usual | facts))
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return tuple(save(folder / f"{seed}.safetensors", seed) for seed in range(3))


def test_a_teacher_of_several_checkpoints_has_their_mean_probabilities(three):
    image = torch.randn(2, 1, 32, 32)
    network, card = SavedNetworks(three, flips=True).load()
    expected = []
    for path in three:
        one = SavedNetworks((path,)).load()[0].eval()
        for axes in ((), (2,), (3,), (2, 3)):
            expected.append(one(image.flip(axes)).logits.softmax(dim=1).flip(axes))
    found = network.eval()(image).logits.softmax(dim=1)
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0))
    assert card.network == "unet+unet+unet with flips"


@pytest.mark.slow
def test_three_teachers_are_cached_like_one(jobs, tiny_store, tmp_path, three):
    """Cached equals live; an entry has the bytes of one teacher's; other members or flips have another cache."""
    job = (*JOB, "--dataset", tiny_store, "--method", "soft", "--cache-dtype", "float32")
    job += ("--cache-folder", "cache", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    weights = {}
    for name, cache, teachers in (("live", "off", three), ("cached", "on", three), ("two", "on", three[:2])):
        given = ("--teacher-checkpoint", *teachers, "--teacher-tta", "flips", "--cache", cache, "--out", name)
        codes, log = jobs("distill", *job, *given, folder=tmp_path)
        assert codes == [0], log
        weights[name] = load_state(newest_state(tmp_path / name / "student" / "checkpoints"))["model"]
    for name, x in weights["live"].items():
        torch.testing.assert_close(weights["cached"][name], x, rtol=1e-4, atol=1e-5)
    descriptions = [owned(folder, "cache") for folder in (tmp_path / "cache").iterdir()]
    assert {d["teacher"] for d in descriptions} == {f"{'+'.join(['unet'] * n)} with flips" for n in (2, 3)}
    taps = build_network("unet", width=0.05).taps
    of_one = probe_targets(build_distiller("soft", student=taps, teacher=taps), taps, (32, 32))[1]
    assert [d["targets"] for d in descriptions] == [of_one, of_one]


def refused(capsys, store, *options):
    """The line with which a distill job ends before it begins."""
    with keep_signals():
        assert main(["distill", "--dataset", str(store), *map(str, JOB), *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"spec": SliceSpec("tumour", Crop((32, 32)))}, "has task tumour, and"),
        ({"spec": SliceSpec("organ", Crop((64, 64)))}, "has crop 64×64, and"),
        ({"spec": SliceSpec("organ", Crop((32, 32), (1, 0)))}, "has crop shift [1, 0], and"),
        ({"network": "unet2022"}, "--crop 48×48: the sides must be multiples of 32 for unet2022"),
    ],
)
def test_teachers_that_do_not_fit_each_other_are_an_error(
    tiny_store, tmp_path, monkeypatch, capsys, three, facts, message
):
    monkeypatch.chdir(tmp_path)
    other = save(tmp_path / "other.safetensors", 0, **facts)
    error = refused(capsys, tiny_store, "--method", "kd", "--crop", 48, "--teacher-checkpoint", three[0], other)
    assert message in error
    assert [file.name for file in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("method", ["spark", "at"])
def test_methods_that_learn_from_features_take_one_teacher(tiny_store, tmp_path, monkeypatch, capsys, three, method):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, tiny_store, "--method", method, "--teacher-checkpoint", *three)
    assert f"method {method} learns from a teacher's features" in error
    assert f"take one of {', '.join(prediction_methods())}" in error
    assert {"soft", "kd", "dist", "lskd"} < set(prediction_methods())


def test_one_of_several_teachers_that_knows_a_test_case_is_an_error(tiny_store, tmp_path, monkeypatch, capsys, three):
    monkeypatch.chdir(tmp_path)
    store = open_store(tiny_store)
    seen = image_fingerprint(store, store.splits["default"]["test"][0])
    other = save(tmp_path / "other.safetensors", 0, trained_on=(seen,))
    error = refused(capsys, tiny_store, "--method", "kd", "--teacher-checkpoint", three[0], other)
    assert f"{other} was trained on 1 test cases" in error


def test_flips_are_of_a_teacher_that_is_trained_already(tiny_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, tiny_store, "--together", "live", "--teacher-tta", "flips")
    assert "leave out --together live, or --teacher-tta" in error
