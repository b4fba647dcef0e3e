"""The rooms of the project stay apart, and what is in them stays small."""

import ast
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT


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


MODULES = [path for room in ("spark_dist", "data_tools", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
LINES, PARAMETERS = 350, 6


def too_large(module: ast.Module, lines: int) -> list[str]:
    """A module of more than `LINES` lines, or with functions of more than `PARAMETERS` parameters or blocks nested more
    than four deep, unless its docstring, or theirs, gives the reason: it speaks of its lines, or of its parameters.

    The parameters of a distillation method are its options (see `Distiller`).
    """
    found = []
    if lines > LINES and "lines" not in (ast.get_docstring(module) or ""):
        found.append(f"{lines} lines")
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        reason = "parameters" in (ast.get_docstring(node) or "") or names[:3] == ["self", "student", "teacher"]
        if len(names) - (names[:1] == ["self"]) > PARAMETERS and not reason:
            found.append(f"{node.name} has {len(names)} parameters")
        if depth(node) > 4:
            found.append(f"{node.name} is nested {depth(node)} deep")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_small_or_say_why_not(path):
    text = path.read_text()
    assert not too_large(ast.parse(text), len(text.splitlines()))


def test_what_is_too_large_is_found():
    many = "def f(a, b, c, d, e, f, g):\n    pass"
    assert too_large(ast.parse(many), 1) == ["f has 7 parameters"]
    assert not too_large(ast.parse(many.replace("pass", '"""These parameters are the model\'s."""')), 1)
    assert not too_large(ast.parse(many.replace("a, b, c", "self, student, teacher")), 1)
    assert too_large(ast.parse("pass"), 351) == ["351 lines"]
    assert not too_large(ast.parse('"""Its lines are a table."""'), 351)
    deep = "".join("    " * n + ("def f():" if n == 0 else "while a:") + "\n" for n in range(6)) + "    " * 6 + "pass"
    assert too_large(ast.parse(deep), 1) == ["f is nested 5 deep"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_the_thing(path):
    nodes = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    found = [(getattr(node, "name", path.stem), ast.get_docstring(node) or "") for node in nodes]
    assert not [name for name, text in found if text.startswith("What ")]


REMOVES = {
    "data_tools/ownership.py remove_owned": "bears the mark of a store, cache, job or prediction",
    "data_tools/identity.py remove_folder": "a case by its mark or as its store knows it, with nothing else in it",
    "data_tools/store.py write_splits": "a split without its record, with nothing else in it",
    "data_tools/foreign.py bring_back": "bears a prediction's mark and the signature of a process that is gone",
    "data_tools/foreign.py write_prediction_of": "made by it; what it replaces bears a prediction's mark",
    "data_tools/creation.py create_store": "made by it",
    "data_tools/creation.py remove_left": "empty, and has the signature of a process that is gone",
    "data_tools/files.py write_atomically": "made by it; callers ask whose file it replaces",
    "data_tools/files.py remove_abandoned": "has the signature of a process that is gone",
    "data_tools/location.py remove": "its callers ask",
    "spark_dist/data/cache.py flush": "made by it",
    "spark_dist/teacher/trial.py try_cache": "made by it",
    "spark_dist/networks/onnx.py export_onnx": "made by it",
    "spark_dist/training/checkpoint.py save_state": "a job's folder, names of saved states",
    "spark_dist/training/checkpoint.py newest_state": "a job's folder, names of saved states",
    "spark_dist/training/pictures.py write_picture": "a job's folder, names of a series' pictures",
    "spark_dist/training/lock.py locked": "a job's folder, names of locks",
    "spark_dist/training/lock.py take": "a job's folder, the lock",
    "spark_dist/training/lock.py create": "made by it",
    "spark_dist/training/lock.py clock": "made by it",
    "spark_dist/training/mlflow_client.py create_database": "SQLite's leftovers of a database that is not there",
    "spark_dist/training/mlflow_client.py shared_run": "a run made by it",
}
"""Every function that removes, renames or replaces, with what makes the thing ours. Before one is added here, a test
runs it on somebody's folder or file of the same shape."""


def removes(node: ast.AST) -> bool:
    """Whether a call removes a file, a folder or a run, or gives one a name that another may have."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id == "remove"
    name, values = getattr(node.func, "attr", ""), len(node.args)
    return name in ("unlink", "rmtree", "rmdir", "rename", "rm", "delete_run") or (name, values) == ("replace", 1)


def test_what_removes_knows_whose_it_is():
    found = {
        f"{path.relative_to(ROOT)} {function.name}"
        for path in MODULES
        if path.parts[len(ROOT.parts)] != "benchmarks"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and any(map(removes, ast.walk(function)))
    }
    assert found == REMOVES.keys()
