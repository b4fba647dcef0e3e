"""What keeps the rooms of the project apart."""

import ast
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

    source = inspect.getsource(fit)
    assert len(source.splitlines()) <= 80
    assert depth(ast.parse(source).body[0]) <= 4


def depth(node: ast.AST) -> int:
    """How deep loops, branches and the like are nested below a node."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.Match)
    return max((isinstance(child, blocks) + depth(child) for child in ast.iter_child_nodes(node)), default=0)


def test_depth_is_counted():
    assert depth(ast.parse("for a in b:\n  if a:\n    pass\n  with a:\n    while a:\n      pass")) == 3


def test_what_trains_takes_few_arguments():
    from spark_dist.training import loop, stage

    for function in (loop.fit, stage.train_stage, stage.evaluate_on_test):
        assert len(inspect.signature(function).parameters) <= 6, function


def test_train_and_distill_share_the_loop():
    from spark_dist import distill, train
    from spark_dist.training import loop, stage

    assert stage.fit is loop.fit
    assert distill.train_stage is train.train_stage is stage.train_stage
