"""A network's weights and its card, in one file."""

import json

import pytest
from conftest import model_card
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_tools.errors import UserError
from spark_dist.cli import main
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import load_card, load_network, save_network


@pytest.fixture
def saved(tmp_path):
    """A saved network, and a function that edits its card, or replaces it by a text."""
    path = tmp_path / "best.safetensors"
    save_network(path, build_network("enet", width=0.25), model_card(epoch=3, val_dice=0.5))

    def edit(text=None, without=(), **changes):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        facts = json.loads(metadata["description"]) | changes
        facts = {key: value for key, value in facts.items() if key not in without}
        save_file(load_file(path), path, metadata | {"description": json.dumps(facts) if text is None else text})

    return path, edit


def test_weights_and_card_come_back(saved):
    path, _ = saved
    network, card = load_network(path)
    assert card == load_card(path) == model_card(epoch=3, val_dice=0.5)
    expected = load_file(path)
    assert all(tensor.equal(expected[name]) for name, tensor in network.state_dict().items())


FLAT = {"task": "tumour", "crop": [64, 32], "crop_shift": [-14, -4], "threshold": 0.4}


def test_a_card_of_before_is_read(saved):
    path, edit = saved
    edit(without=("classes", "in_channels", "store", "cases", "spec", "epoch", "val_dice"), **FLAT)
    assert load_network(path)[1] == model_card(spec=SliceSpec("tumour", Crop((64, 32), (-14, -4)), 0.4))


def test_what_a_later_version_knows_besides_is_no_harm(saved):
    path, edit = saved
    edit(later=[1])
    assert load_card(path) == model_card(epoch=3, val_dice=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "wide"}, "width: .*'wide'"),
        ({"width": -1}, "width: .*-1"),
        ({"without": ("seed",)}, "seed: Field required"),
        ({"without": ("spec",)}, "spec.task: Field required"),
        ({"without": ("spec",), **FLAT, "crop": [32]}, "spec.crop.size"),
        ({"spec": {"task": "organ,", "crop": {"size": [32, 32]}}}, "spec.task: .*'organ,'"),
        ({"spec": {"task": "organ,tumour", "crop": {"size": [32, 32]}}}, "spec.task: .*no names of 1 regions"),
        ({"spec": {"task": "organ", "crop": {"size": [32, -1]}}}, "spec.crop.size.1: .*-1"),
        ({"spec": {"task": "organ", "crop": {"size": [32, 32]}, "threshold": 1.5}}, "spec.threshold: .*1.5"),
        ({"network": "enett"}, "no network 'enett'; did you mean enet"),
        ({"text": '{"network": "en'}, "Unterminated string"),
        ({"text": "[]"}, "Input should be"),
    ],
)
def test_a_damaged_card_is_one_line_that_names_file_and_field(saved, change, message):
    path, edit = saved
    edit(**change)
    with pytest.raises(UserError, match=f"best.safetensors: .*model card.*{message}") as error:
        load_network(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [("evaluate",), ("picture",)])
def test_commands_say_it_in_one_line(saved, tiny_store, command, capsys):
    path, edit = saved
    edit(width="wide")
    assert main([*command, str(path), "--dataset", str(tiny_store)]) == 2
    assert f"error: {path}: the model card is damaged" in capsys.readouterr().err
