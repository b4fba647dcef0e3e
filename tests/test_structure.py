"""What keeps the rooms of the project apart."""

import inspect
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("data_tools.cli, data_tools.prepare, data_tools.phantom, data_tools.store", "torch"),
        ("data_tools.cli, data_tools.prepare, data_tools.phantom, data_tools.store", "spark_dist"),
        (
            "spark_dist.train, spark_dist.distill, spark_dist.compare, spark_dist.evaluate, spark_dist.picture",
            "nibabel",
        ),
        ("spark_dist.networks, spark_dist.distillers", "spark_dist.training"),
        ("spark_dist.networks, spark_dist.distillers", "accelerate"),
    ],
)
def test_a_room_does_not_import_what_is_not_its_business(modules, forbidden):
    code = f"import {modules}, sys; sys.exit({forbidden!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_loop_fits_on_a_page():
    from spark_dist.training.loop import fit

    assert len(inspect.getsource(fit).splitlines()) <= 85


def test_train_and_distill_share_the_loop():
    from spark_dist import distill, train
    from spark_dist.training import loop, stage

    assert stage.fit is loop.fit
    assert distill.train_stage is train.train_stage is stage.train_stage
