import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from data_tools.errors import UserError
from spark_dist.cli import main
from spark_dist.evaluation.comparison import Run, compare
from spark_dist.evaluation.intervals import seeds_interval
from spark_dist.evaluation.metrics import write_cases
from spark_dist.evaluation.tables import as_latex, as_markdown, columns, heading, remarks
from spark_dist.networks.cost import Model, gflops_of
from spark_dist.training.finished_runs import load_runs, with_known_data
from spark_dist.training.mlflow_client import make_client
from spark_dist.training.tracking import open_run

NETWORKS = {"unet": 31_037_633, "enet": 353_761}


def trained(values, network="enet", role="student", method="none", seed=1, **other):
    """A run with these Dice values on its test cases a, b, c …"""
    metrics = {case: {"dice": dice, "hd95": 2.0} for case, dice in zip("abcdefgh", values, strict=False)}
    facts = {"dataset": "kits", "task": "organ", "split": "default", "width": 1.0, "teacher": ""}
    facts |= {"role": role, "network": network, "method": method, "seed": str(seed), "cases": metrics}
    return Run(**facts | {"parameters": NETWORKS.get(network)} | other)


def difference(rows, seeds="1"):
    (row,) = [row for row in rows if row.method == "spark" and row.seeds == seeds]
    return row


def test_a_distilled_student_is_paired_with_the_one_alone_of_its_seed():
    alone, other = trained([0.5, 0.7, 0.9]), trained([0.1, 0.1, 0.1], seed=2)
    rows = compare(
        [trained([0.6, 0.8, 1.0], method="spark"), other, alone, trained([0.9, 0.9, 0.9], "unet", "teacher")]
    )
    row = difference(rows)
    assert row.mean == pytest.approx(0.8)
    assert row.difference == pytest.approx(0.1)
    assert (row.difference_low, row.difference_high) == pytest.approx((0.1, 0.1))
    assert row.low < 0.7 < 0.9 < row.high
    assert (row.cases, row.against) == (3, "same seed")
    assert [row.difference for row in rows if row.method == "none"] == [None] * 4
    assert rows[0].title == "teacher"


def test_without_one_of_its_seed_it_is_compared_with_the_mean_over_seeds():
    alone = [trained([0.4, 0.6], seed=2), trained([0.6, 0.8], seed=3)]
    row = difference(compare([trained([0.6, 0.9], method="spark"), *alone]))
    assert row.difference == pytest.approx(0.15)
    assert (row.difference_low, row.difference_high) == pytest.approx((0.1, 0.2))
    assert row.against == "all seeds"


@pytest.mark.parametrize(
    "other", [{"network": "unet"}, {"width": 0.5}, {"task": "tumour"}, {"dataset": "lits"}, {"split": "second"}]
)
def test_nothing_is_compared_across_networks_widths_and_data(other):
    row = difference(compare([trained([0.6, 0.9], method="spark"), trained([0.5, 0.5], **other)]))
    assert row.difference is None
    assert row.against is None


def test_a_teacher_of_the_same_network_is_no_student_alone():
    assert difference(compare([trained([0.6], method="spark"), trained([0.5], role="teacher")])).difference is None


def several(seeds=(0, 1, 2), alone_seeds=None):
    """Runs of students alone and distilled with 8 cases each, and the two arms' Dice (S, 8)."""
    random = np.random.default_rng(0)
    alone = random.uniform(0.3, 0.9, (len(alone_seeds or seeds), 8))
    spark = alone[: len(seeds)] + random.normal(0.05, 0.02, (len(seeds), 8))
    runs = [trained(values, seed=seed) for values, seed in zip(alone, alone_seeds or seeds, strict=True)]
    runs += [trained(values, method="spark", seed=seed) for values, seed in zip(spark, seeds, strict=True)]
    return runs, alone, spark


def test_an_interval_over_several_seeds_is_over_seeds_and_cases():
    runs, alone, spark = several()
    rows = compare(runs)
    assert [row.seeds for row in rows] == ["0", "1", "2"] * 2 + ["3 seeds"] * 2
    row = difference(rows, "3 seeds")
    mean, low, high = seeds_interval(spark - alone)
    assert row.difference == pytest.approx(mean)
    assert (row.difference_low, row.difference_high) == pytest.approx((low, high))
    mean, low, high = seeds_interval(spark)
    assert (row.mean, row.low, row.high) == pytest.approx((mean, low, high))
    assert (row.cases, row.against) == (8, "same seed")


def test_seeds_that_are_not_shared_are_no_pairs():
    runs, alone, spark = several(seeds=(0, 1, 2), alone_seeds=(2, 3, 4, 5))
    row = difference(compare(runs), "3 seeds")
    mean, low, high = seeds_interval(spark, alone)
    assert (row.difference, row.difference_low, row.difference_high) == pytest.approx((mean, low, high))
    assert row.against == "all seeds"


@pytest.mark.parametrize(
    ("seeds", "warnings"), [((0,), ["one seed"]), ((0, 1), ["one seed", "2 seeds"]), ((0, 1, 2), ["one seed"])]
)
def test_the_table_says_how_many_seeds_and_warns_below_three(seeds, warnings):
    runs, _, _ = several(seeds)
    rows = compare(runs)
    assert [line.split(":")[0] for line in remarks(rows)] == warnings
    assert len(seeds) == 1 or rows[-1].seeds == f"{len(seeds)} seeds"


@pytest.mark.parametrize(
    ("teacher", "closed"),
    [
        ({"seed": 1, "values": [0.7, 0.9]}, 0.5),
        ({"seed": 2, "values": [0.7, 0.9]}, 0.5),
        ({"seed": 1, "values": [0.7, 0.9], "role": "student"}, 0.5),  # trained alone and given by its checkpoint
        ({"seed": 1, "values": [0.55, 0.75]}, 2.0),
        ({"seed": 1, "values": [0.5, 0.7]}, None),
        ({"seed": 1, "values": [0.4, 0.6]}, None),
        ({"seed": 1, "values": [0.7, 0.9], "network": "enet"}, None),
        ({"seed": 1, "values": [0.7, 0.9], "task": "tumour"}, None),
    ],
)
def test_the_share_of_the_gap_to_the_teacher(teacher, closed):
    values = teacher.pop("values")
    taught = trained(values, **{"network": "unet", "role": "teacher"} | teacher)
    rows = compare([trained([0.5, 0.7]), trained([0.6, 0.8], method="spark", teacher="unet"), taught])
    assert difference(rows).gap_closed == (closed and pytest.approx(closed))
    assert all(row.gap_closed is None for row in rows if row.method == "none")


def test_of_teachers_of_several_widths_none_is_the_teacher():
    teachers = [trained([0.9, 0.9], "unet", "teacher", width=width) for width in (0.25, 1.0)]
    rows = compare([trained([0.5, 0.7]), trained([0.6, 0.8], method="spark", teacher="unet"), *teachers])
    assert difference(rows).gap_closed is None


@pytest.mark.parametrize(("metric", "closed"), [("hd95", 0.25), ("rvd", None)])
def test_the_gap_of_an_error_is_closed_from_above(metric, closed):
    runs = [trained([0.5, 0.5]), trained([0.5, 0.5], method="spark", teacher="unet")]
    runs.append(trained([0.5, 0.5], "unet", "teacher"))
    for item, error in zip(runs, (6.0, 5.0, 2.0), strict=True):
        for metrics in item.cases.values():
            metrics |= {"hd95": error, "rvd": error}
    assert difference(compare(runs, metric)).gap_closed == (closed and pytest.approx(closed))


def test_the_gap_over_seeds_is_that_of_the_means():
    runs, alone, spark = several()
    best = alone + 0.2
    runs += [trained(values, "unet", "teacher", seed=seed) for seed, values in enumerate(best)]
    runs = [replace(item, teacher="unet") if item.method == "spark" else item for item in runs]
    row = difference(compare(runs), "3 seeds")
    assert row.gap_closed == pytest.approx((spark - alone).mean() / 0.2)


def test_what_no_run_knows_has_no_column():
    runs = [trained([0.5, 0.7], gflops=3.25), trained([0.6, 0.8], "unet", "teacher", gflops=500.0)]
    found = columns(compare(runs), "dice")
    assert found["GFLOPs"] == ["500", "3.25"]
    assert not {"latency ms", "FP ml", "points to alone", "gap closed"} & found.keys()
    for item in runs:
        for metrics, wrong in zip(item.cases.values(), (1.0, 2.0), strict=True):
            metrics["false_positive_ml"] = wrong
    assert columns(compare(runs), "dice")["FP ml"] == ["1.50", "1.50"]


def test_the_table_in_markdown_and_latex():
    runs = [
        trained([0.5, 0.7], dataset="a_b|c%", width=0.5),
        trained([0.4, 0.6], method="spark", teacher="unet", seed=2, dataset="a_b|c%", width=0.5),
    ]
    rows = compare(runs)
    panels = {heading(rows, "dice"): rows}
    mark, blank, *lines = as_markdown(panels, "dice").splitlines()
    assert (mark, blank) == ("<!-- made by spark-dist -->", "")
    assert lines[0] == "### a\\_b\\|c%, organ, split default: test dice of 2 cases, mean and 95% interval"
    assert lines[2:4] == [
        "|  | network | seed | parameters | dice | HD95 mm | points to alone |",
        "|---|---|---|---:|---|---|---|",
    ]
    assert lines[5].startswith(
        "| student, spark (unet) | enet ×0.5 | 2 | 353,761 | 0.5000 [0.400, 0.600] | 2.0 | -10.00 ["
    )
    assert lines[5].endswith("]\\* |")
    assert lines[7].startswith("- \\* no student alone of the same seed")

    text = as_latex(panels, "dice")
    assert text.startswith("% made by spark-dist\n")
    assert "a\\_b|c\\%, organ" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [line.count(" & ") for line in body] == [6] * 3
    assert r"student, spark (unet) & enet $\times$0.5 & 2 & 353,761 & 0.5000 [0.400, 0.600] & 2.0 & $-$10.00 [" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_students_of_different_teachers_are_of_different_kinds():
    rows = compare([trained([0.5], method="spark", teacher=t, seed=s) for t in ("unet", "raunet") for s in (1, 2)])
    assert sorted((row.teacher, row.seeds) for row in rows) == [
        (teacher, seeds) for teacher in ("raunet", "unet") for seeds in ("1", "2", "2 seeds")
    ]


def optioned(values, seed=1, method="none", gain=None, **options):
    """A run with these options, and a gain of its method."""
    own = {"method": method, "teacher": "unet"} if method != "none" else {}
    own |= {"method_options": (("method.gain", str(gain)),)} if gain else {}
    return trained(values, seed=seed, options=tuple(sorted(options.items())), **own)


def test_runs_of_other_options_are_no_seeds_of_one_another_and_the_table_says_in_what_they_differ():
    runs = [optioned([0.5, 0.7], seed, augment="none", crop_shift="[0, 0]", lr="0.1") for seed in (1, 2)]
    runs.append(optioned([0.6, 0.8], 3, augment="full", crop_shift="[0, 1]", lr="0.1"))
    runs += [optioned([0.5, 0.7], 1, "spark", gain, augment="none", crop_shift="[0, 0]", lr="0.1") for gain in (1, 9)]
    rows = compare(runs)
    none = "student alone; augment none, crop-shift [0, 0]"
    assert [(row.title, row.seeds) for row in rows] == [
        ("student alone; augment full, crop-shift [0, 1]", "3"),
        (none, "1"),
        (none, "2"),
        ("student, spark (unet); gain 1", "1"),
        ("student, spark (unet); gain 9", "1"),
        (none, "2 seeds"),
    ]


@pytest.mark.parametrize(
    ("alone", "difference", "cell", "remark"),
    [
        ([("full", "9", 0.5), ("none", "9", 0.1)], 0.1, "]", None),
        (
            [("none", "9", 0.4), ("none", "5", 0.1)],
            0.2,
            "]†",
            "† {}: the student alone has other options: augment none",
        ),
        ([("none", "5", 0.1)], 0.5, "]†", "† {}: the student alone has other options: augment none, steps 5"),
        ([("none", "9", 0.1), ("full", "5", 0.1)], None, "‡", "‡ {}: no difference, as several students alone have"),
    ],
)
def test_a_student_is_compared_with_the_one_alone_of_its_options_or_the_table_says_what_differs(
    alone, difference, cell, remark
):
    runs = [optioned([dice], augment=augment, steps=steps) for augment, steps, dice in alone]
    rows = compare([*runs, optioned([0.6], method="spark", augment="full", steps="9")])
    (row,) = [row for row in rows if row.method == "spark"]
    assert row.difference == (difference and pytest.approx(difference))
    assert columns(rows, "dice").get("points to alone", [""])[-1].endswith(cell)
    lines = [line for line in remarks(rows) if line[0] in "†‡"]
    assert bool(lines) == bool(remark)
    assert not remark or lines[0].startswith(remark.format(row.title))


def test_a_teacher_is_the_one_of_the_students_options():
    teachers = [trained([dice], "unet", "teacher", options=(("steps", n),)) for n, dice in (("9", 0.7), ("5", 0.9))]
    rows = compare([*teachers, optioned([0.5], steps="9"), optioned([0.6], method="spark", steps="9")])
    assert rows[-1].gap_closed == pytest.approx(0.5)


def test_the_options_of_runs_are_told_by_their_parameters(store, tmp_path, capsys):
    same = {"lr": 0.003, "crop": [48, 32], "epochs": 20, "steps": 500}
    logged(store, tmp_path / "a", trained([0.5, 0.7], seed=1), params=same | {"workers": 2, "compile": True})
    # As many steps take other epochs where there are fewer slices; what an older run does not tell has its default.
    logged(store, tmp_path / "b", trained([0.5, 0.7], seed=2), params=same | {"epochs": 30, "context": 0})
    logged(store, tmp_path / "c", trained([0.6, 0.7], seed=3), params=same | {"context": 1})
    logged(store, tmp_path / "d", trained([0.6, 0.7], seed=4), params={"lr": 0.003, "crop": [48, 32], "epochs": 20})
    teacher = trained([0.9, 0.8], "unet", "teacher")
    logged(store, tmp_path / "first", teacher, params=same)
    logged(store, tmp_path / "second", teacher, params={"augment": "full"})  # given, and what its job's student had
    assert main(["compare", "--tracking-uri", store, "--json", "rows.json"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["role"], row["seeds"], row["options"]) for row in rows] == [
        ("teacher", "1", ""),
        ("student", "4", "context 0, epochs 20"),
        ("student", "1", "context 0, steps 500"),
        ("student", "2", "context 0, steps 500"),
        ("student", "3", "context 1, steps 500"),
        ("student", "2 seeds", "context 0, steps 500"),
    ]
    assert "student alone; context 1, steps 500" in capsys.readouterr().out


def test_folds_of_older_runs_are_pooled_whatever_epochs_their_steps_took(store, tmp_path):
    for number, (cases, epochs) in enumerate((("ab", 3), ("cd", 2))):
        run = trained([0.5, 0.7], cases={case: {"dice": 0.5, "hd95": 1.0} for case in cases}, split=f"cv-fold{number}")
        fold = {"fold": f"{number} of 2", "crossval": "a hash"}
        logged(store, tmp_path / cases, run, data=f"hash {number}", params={"epochs": epochs}, **fold)
    ((run,), _) = load_runs(store)
    assert sorted(run.cases) == ["a", "b", "c", "d"]


def test_an_unknown_figure_names_the_known():
    with pytest.raises(UserError, match="did you mean dice"):
        compare([trained([0.5])], "dise")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def logged(
    store,
    folder,
    run,
    finished=True,
    experiment="kits-organ",
    data="a hash",
    params=None,
    metrics=None,
    **changed,
):
    """Log a job of one stage as a training job does, with its tags or `changed` ones, or without `data` as of old."""
    tags = ({"teacher": run.teacher} if run.teacher else {}) | ({"data": data} if data else {})
    parent = open_run(store, experiment, folder.name, folder, tags, {})
    keys = ("dataset", "task", "split", "width", "role", "network", "method", "seed", "parameters")
    tags = {key: str(getattr(run, key)) for key in keys} | changed
    tracker = open_run(store, experiment, f"{run.role} {run.network}", folder / run.role, tags, params or {}, parent)
    if metrics:
        tracker.metrics(metrics, step=0)
    if finished:
        file = folder / run.role / "test_cases.json"
        write_cases(file, run.cases, task=run.task, split="test", threshold=0.5)
        tracker.artifact(file)
    tracker.finish("FINISHED")
    parent.finish("FINISHED")


def test_from_the_runs_to_the_table_and_its_files(store, tmp_path, capsys):
    alone, spark = trained([0.5, 0.7]), trained([0.6, 0.9], method="spark", teacher="unet")
    alone.cases["a"]["hd95"] = math.inf
    logged(store, tmp_path / "old", trained([0.2, 0.2]))
    logged(store, tmp_path / "alone", alone, role="network")  # what trains alone, in jobs of today
    logged(store, tmp_path / "spark", spark)
    logged(store, tmp_path / "killed", trained([0.1], "unet", "teacher"), finished=False)
    client = make_client(store)
    foreign = {"mlflow.runName": "foreign", "role": "teacher"}
    foreign = client.create_run(client.get_experiment_by_name("kits-organ").experiment_id, tags=foreign)
    client.log_artifact(foreign.info.run_id, tmp_path / "old" / "student" / "test_cases.json")
    files = ("--csv", "out/rows.csv", "--json", "out/rows.json", "--markdown", "out/rows.md", "--latex", "out/rows.tex")
    assert main(["compare", "--tracking-uri", store, *files, "--figure", "out/dice.png"]) == 0
    text = capsys.readouterr().out
    assert "foreign" not in text
    assert "kits, organ" in text
    assert "+15.00 [+10.00, +20.00]" in text  # nothing is cut off, however wide
    assert "student, spark (unet)" in text
    assert "2.0 (1 missed)" in text
    assert "not in the table: killed/teacher unet" in text
    assert "1 older left out" in text

    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [(row["network"], row["method"], row["parameters"]) for row in rows] == [
        ("enet", "none", 353_761),
        ("enet", "spark", 353_761),
    ]
    assert rows[0]["mean"] == pytest.approx(0.6)
    assert rows[0]["hd95_misses"] == 1
    assert rows[1]["difference"] == pytest.approx(0.15)
    with open(tmp_path / "out" / "rows.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["difference"] for line in lines] == ["", str(rows[1]["difference"])]

    before = (tmp_path / "out" / "rows.md").read_text()
    assert "+15.00 [+10.00, +20.00]" in before
    assert "+15.00 [+10.00, +20.00]" in (tmp_path / "out" / "rows.tex").read_text()
    assert (tmp_path / "out" / "dice.png").stat().st_size > 10_000
    again = ("--markdown", "out/rows.md", "--latex", "out/rows.tex", "--figure", "out/dice.png", "--metric", "hd95")
    assert main(["compare", "--tracking-uri", store, *again]) == 0  # over what it made itself
    assert (tmp_path / "out" / "rows.md").read_text() != before

    logged(store, tmp_path / "lits", trained([0.5]), experiment="lits-organ")
    assert main(["compare", "--tracking-uri", store]) != 0
    assert "did you mean kits-organ, lits-organ" in capsys.readouterr().err


def test_runs_are_paired_by_the_content_of_their_data_whatever_it_is_called():
    spark = trained([0.6, 0.9], method="spark", data="1")
    renamed, other = trained([0.5, 0.5], data="1", dataset="copy", split="second"), trained([0.1, 0.1], data="2")
    assert difference(compare([spark, renamed, other])).difference == pytest.approx(0.25)
    assert difference(compare([spark, other])).difference is None
    assert difference(compare([spark, trained([0.5, 0.5])])).difference is None


@pytest.mark.parametrize(("others", "paired"), [(("1", "1"), True), (("1", "2"), False), (("", ""), True)])
def test_runs_from_before_data_were_logged_count_by_their_names_unless_these_are_ambiguous(others, paired):
    runs = [trained([0.5, 0.5]), trained([0.6, 0.9], method="spark", data=others[0])]
    runs, (note,) = with_known_data([*runs, trained([0.2], "unet", data=others[1])])
    assert "do not say which cases they are of" in note
    assert (difference(compare(runs)).difference is not None) == paired
    assert not with_known_data([trained([0.5], data="1")])[1]


def test_data_of_the_same_names_have_tables_of_their_own(store, tmp_path, capsys):
    for number in "12":
        logged(store, tmp_path / number, trained([0.5, 0.7]), data=number * 16)
    logged(store, tmp_path / "old", trained([0.3, 0.3]), data="")
    assert main(["compare", "--tracking-uri", store]) == 0
    text = capsys.readouterr().out
    assert "split default (data 11111111)" in text
    assert "split default (data 22222222)" in text
    assert text.count("student alone") == 3
    assert "1 runs do not say which cases they are of" in text


@pytest.mark.parametrize("option", ["--csv", "--json"])
@pytest.mark.parametrize("command", ["compare", "profile"])
@pytest.mark.parametrize("text", ['{"zarr_format": 3}', "[]", '[{"patient": 1}]', "patient,age\n1,2\n", "\0", ""])
def test_tables_are_not_written_over_other_files(tmp_path, monkeypatch, capsys, option, command, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zarr.json").write_text(text)
    more = ["--tracking-uri", "sqlite:///none.db"] if command == "compare" else ["enet", "--crop", "32"]
    assert main([command, *more, option, "zarr.json"]) == 2
    error = f"error: zarr.json: exists and is no such table; move it away, or name another {option}"
    assert capsys.readouterr().err.strip() == error
    assert (tmp_path / "zarr.json").read_text() == text


@pytest.mark.parametrize("option", ["--markdown", "--latex", "--figure"])
def test_tables_and_figures_are_not_written_over_the_files_of_others(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chapter.svg").write_text("# My thesis")
    assert main(["compare", "--tracking-uri", "sqlite:///none.db", option, "chapter.svg"]) == 2
    error = f"error: chapter.svg: exists and was not made by spark-dist; move it away, or name another {option}"
    assert capsys.readouterr().err.strip() == error
    assert (tmp_path / "chapter.svg").read_text() == "# My thesis"


def test_tables_are_written_over_older_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for width in ("0.25", "0.5"):
        line = ["profile", "enet", "--crop", "32", "--repeats", "1", "--width", width]
        assert main([*line, "--csv", "t.csv", "--json", "deep/t.json"]) == 0
        rows = json.loads((tmp_path / "deep" / "t.json").read_text())
        with open(tmp_path / "t.csv", newline="") as file:
            assert [int(row["parameters"]) for row in csv.DictReader(file)] == [row["parameters"] for row in rows]


def test_what_is_no_number_is_a_dash_and_null(store, tmp_path, capsys):
    run = trained([0.5, 0.5])
    for metrics in run.cases.values():
        metrics["hd95"] = math.inf
    logged(store, tmp_path / "job", run)
    assert main(["compare", "--tracking-uri", store, "--metric", "hd95", "--json", "rows.json"]) == 0
    assert capsys.readouterr().out.count("– (2 missed)") == 2
    (row,) = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    assert (row["mean"], row["misses"], row["hd95_misses"]) == (None, 2, 2)


def test_mistakes_are_one_line(store, tmp_path, capsys):
    def error(*arguments):
        assert main(["compare", "--tracking-uri", store, *arguments]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    assert "no such database" in error()
    assert not (tmp_path / "mlflow.db").exists()
    assert "can't be reached" in error("--tracking-uri", "http://127.0.0.1:1")
    logged(store, tmp_path / "job", trained([0.5]), finished=False)
    assert "no run in 'kits-organ' has test metrics yet" in error()
    assert "did you mean kits-organ" in error("--experiment", "kits-orgn")
    logged(store, tmp_path / "other", trained([0.5]))
    (file,) = (tmp_path / "mlartifacts").rglob("test_cases.json")
    file.write_text(file.read_text()[:-20])
    assert "run other/student enet" in error()


def test_the_cost_of_a_network_is_as_logged_or_computed(store, tmp_path):
    known = {"gflops": 1.5, "latency_ms": 12.0}
    logged(store, tmp_path / "logged", trained([0.5], seed=0), params={"crop": 64}, metrics=known)
    logged(store, tmp_path / "square", trained([0.5], seed=1), params={"crop": 64})
    logged(store, tmp_path / "oblong", trained([0.5], seed=2), params={"crop": [64, 128]})
    logged(store, tmp_path / "unknown", trained([0.5], seed=3))
    logged(store, tmp_path / "foreign", trained([0.5], "mynet", seed=4, parameters=9), params={"crop": 64})
    runs, _ = load_runs(store)
    assert {run.seed: (run.gflops, run.latency_ms) for run in runs} == {
        "0": (1.5, 12.0),
        "1": (pytest.approx(gflops_of(Model("enet"), (64, 64))), None),
        "2": (pytest.approx(gflops_of(Model("enet"), (64, 128))), None),
        "3": (None, None),
        "4": (None, None),
    }


@pytest.mark.parametrize("name", ["hd95", "dice.txt", "dice."])
def test_a_figure_that_is_no_picture_is_one_line(capsys, name):
    assert main(["compare", "--figure", name]) == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    assert "is no format of pictures" in text
    assert "--metric" in text


def test_of_one_kind_and_seed_the_last_is_shown(store, tmp_path):
    for k, dice in enumerate((0.3, 0.4, 0.4)):  # a teacher that is tested again in the next job is no news
        logged(store, tmp_path / f"job{k}", trained([dice]))
    runs, (note,) = load_runs(store)
    assert [run.cases["a"]["dice"] for run in runs] == [0.4]
    assert "1 older" in note
