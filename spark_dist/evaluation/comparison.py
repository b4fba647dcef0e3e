"""The comparison of finished runs: teachers, students alone and students distilled."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean

from data_tools.errors import unknown_name

from .intervals import difference_over_seeds, over_seeds

LOWER_IS_BETTER = ("hd", "assd", "voe", "false_positive")
"""Metrics whose names begin so are errors."""
NOT_IN_ROWS = ("seed", "cases", "fold", "crossval", "options", "method_options")
"""Facts of a single run."""
Choices = tuple[tuple[str, str], ...]
"""Options by name, each with its value."""


UNCLEAR = "unclear"
"""What a row says of the options of students alone, of which none is nearest to its own."""


@dataclass(frozen=True)
class Run:
    """A finished run of a teacher or student."""

    dataset: str
    task: str
    split: str
    role: str
    network: str
    width: float
    method: str
    teacher: str
    """Network of a distilled student's teacher."""
    seed: str
    parameters: int
    """0 of a foreign teacher, of which nothing is known but its predictions."""
    cases: dict[str, dict[str, float]]
    """Metrics of the test cases."""
    data: str = ""
    """A hash of the split's cases; none in runs that were logged before it was."""
    fold: str = ""
    """"0 of 5", where the split is a fold of a cross-validation."""
    crossval: str = ""
    """A hash that the folds of one cross-validation share."""
    gflops: float | None = None
    """Of one slice of the training's crop; a multiply-add counts 2."""
    latency_ms: float | None = None
    """Of one slice, where it was measured and logged."""
    options: Choices = ()
    """Those of training that results depend on, which a student alone has as well as one distilled."""
    method_options: Choices = ()
    """Those that only a distilled student has, such as the method's settings."""

    @property
    def setting(self) -> tuple:
        """Data and task, which runs must share to be compared at all; data are known by their content, or else by the
        names of dataset and split and of the test cases."""
        return self.data or (self.dataset, self.split, frozenset(self.cases)), self.task

    @property
    def subject(self) -> tuple:
        """Network, data and method."""
        return *self.setting, self.role, self.network, self.width, self.method, self.teacher

    @property
    def kind(self) -> tuple:
        """All that runs which differ in their seed only have in common."""
        return *self.subject, self.options, self.method_options

    @property
    def names(self) -> tuple:
        """How people call the data."""
        return self.dataset, self.task, self.split

    @property
    def distilled(self) -> bool:
        return self.role == "student" and self.method != "none"

    @property
    def order(self) -> tuple:
        """Teachers first, then each network alone and distilled."""
        subject = self.network, self.width, self.method, self.teacher
        return self.role != "teacher", self.distilled, *subject, self.options, self.method_options


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table, of one run or of one kind of run over its seeds. Dice and differences are fractions of 1."""

    dataset: str
    task: str
    split: str
    role: str
    network: str
    width: float
    method: str
    teacher: str
    seeds: str
    parameters: int
    gflops: float | None = None
    """Of one slice of the training's crop; a multiply-add counts 2."""
    latency_ms: float | None = None
    """Of one slice, where it was measured and logged."""
    cases: int
    mean: float
    low: float
    high: float
    misses: int
    """Cases without a finite value, which the mean is without."""
    hd95: float
    hd95_misses: int
    false_positive_ml: float | None = None
    """Predicted in slices and cases without the target; the mean over cases."""
    difference: float | None = None
    """To the student alone, with its interval; none for teachers and students alone."""
    difference_low: float | None = None
    difference_high: float | None = None
    difference_misses: int | None = None
    against: str | None = None
    """The student alone of the "same seed", or the mean over "all seeds" where there is none of that seed."""
    options: str = ""
    """Options in which it differs from another row of the same network and method."""
    against_options: str = ""
    """Options in which the student alone differs from it; "unclear" where several do, and there is no difference."""
    data: str = ""
    """A hash of the split's cases."""
    gap_closed: float | None = None
    """The difference over that of the teacher to the student alone; none where the teacher is not the better one."""

    @property
    def title(self) -> str:
        """Name in tables and figures, with the options that tell it from others."""
        if self.role == "teacher":
            name = "teacher"
        elif self.method == "none":
            name = "student alone"
        else:
            name = f"student, {self.method}" + (f" ({self.teacher})" if self.teacher else "")
        return f"{name}; {self.options}" if self.options else name

    @property
    def named_network(self) -> str:
        return self.network if self.width == 1 else f"{self.network} ×{self.width:g}"


def compare(runs: Sequence[Run], metric: str = "dice") -> list[Row]:
    """A row for each run, then one over all seeds for each kind of run that has several.

    The difference of a distilled student is to the student alone: same data, network, width and seed, paired by case;
    to the mean over all seeds where there is none of its seed. Where none has the same options, it is to the one whose
    options differ in the fewest, and the row says in which. An interval over several seeds is over seeds and cases (see
    `intervals`), one of a single run over its cases. Runs of several regions have rows for their means and, after
    these, for each region.
    """
    runs = [part for item in runs for part in (item, *of_regions(item))]
    known = set.intersection(*(set(metrics) for item in runs for metrics in item.cases.values()))
    if metric not in known:
        raise unknown_name("metric", metric, known)
    kinds: dict[tuple, list[Run]] = defaultdict(list)
    for item in sorted(runs, key=lambda item: (*item.names, item.order, int(item.seed))):
        kinds[item.kind].append(item)
    single = [make_row([item], runs, metric) for members in kinds.values() for item in members]
    return single + [make_row(members, runs, metric) for members in kinds.values() if len(members) > 1]


def of_regions(item: Run) -> list[Run]:
    """A run of several regions as one for each, whose task is `posterior of anterior,posterior`; none of one region."""
    keys = next(iter(item.cases.values()))
    return [
        replace(
            item,
            task=f"{region} of {item.task}",
            cases={
                case: {
                    key.partition(".")[0]: value for key, value in metrics.items() if key.partition(".")[2] == region
                }
                for case, metrics in item.cases.items()
            },
        )
        for region in dict.fromkeys(key.partition(".")[2] for key in keys if "." in key)
    ]


def make_row(members: Sequence[Run], runs: Sequence[Run], metric: str) -> Row:
    """A row for runs that differ in their seed only."""
    first = members[0]
    values = [values_of(item, metric) for item in members]
    summary = over_seeds(values)
    hd95 = over_seeds([values_of(item, "hd95") for item in members])
    wrong = [metrics.get("false_positive_ml") for item in members for metrics in item.cases.values()]
    return Row(
        **{field.name: getattr(first, field.name) for field in fields(Run) if field.name not in NOT_IN_ROWS},
        seeds=first.seed if len(members) == 1 else f"{len(members)} seeds",
        **{key: summary[key] for key in ("cases", "mean", "low", "high", "misses")},
        hd95=hd95["mean"],
        hd95_misses=hd95["misses"],
        false_positive_ml=None if None in wrong else fmean(wrong),
        options=options_text(
            set().union(*(unlike(first, other) for other in runs if other.subject == first.subject)),
            first.options + first.method_options,
        ),
        **against_alone(members, values, runs, metric),
    )


def unlike(item: Run, other: Run) -> set[str]:
    """The names of the options in which two runs differ; those of the method, too, where it is the same."""
    of_method = (item.method_options, other.method_options) if item.method == other.method else ((), ())
    return differing(item.options + of_method[0], other.options + of_method[1])


def differing(one: Choices, other: Choices) -> set[str]:
    """The names of options that are not the same in both."""
    return {name for name, _ in set(one) ^ set(other)}


def options_text(names: Collection[str], options: Choices) -> str:
    """Those of some options that have these names, as people type them."""
    shown = {name.removeprefix("method.").replace("_", "-"): value for name, value in options if name in names}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def nearest(item: Run, runs: Sequence[Run]) -> list[Run]:
    """Of some runs, those whose options are a run's own or differ from them in the fewest; none if that is several
    kinds of runs."""
    groups: dict[Choices, list[Run]] = defaultdict(list)
    for other in runs:
        groups[other.options].append(other)
    ranked = sorted(groups.values(), key=lambda members: len(unlike(item, members[0])))
    distances = [len(unlike(item, members[0])) for members in ranked[:2]]
    return [] if not ranked or distances[1:] == distances[:1] else ranked[0]


def against_alone(
    members: Sequence[Run], values: Sequence[dict[str, float]], runs: Sequence[Run], metric: str
) -> dict[str, float | str]:
    """The difference of distilled students of some seeds to the students alone; nothing if there are none."""
    first = members[0]
    candidates = [
        item
        for item in runs
        if (item.role, item.method) == ("student", "none")
        and (item.setting, item.network, item.width) == (first.setting, first.network, first.width)
    ]
    if not first.distilled or not candidates:
        return {}
    chosen = nearest(first, candidates)
    if not chosen:
        return {"against_options": UNCLEAR}
    alone = {item.seed: values_of(item, metric) for item in chosen}
    paired = all(item.seed in alone for item in members)
    base = [alone[item.seed] for item in members] if paired else list(alone.values())
    difference = difference_over_seeds(values, base, paired)
    return {
        "difference": difference["mean"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "difference_misses": difference["misses"],
        "against": "same seed" if paired else "all seeds",
        "against_options": options_text(unlike(first, chosen[0]), chosen[0].options),
        "gap_closed": gap_closed(difference["mean"], teachers_of(members, runs, metric), base, metric),
    }


def teachers_of(members: Sequence[Run], runs: Sequence[Run], metric: str) -> list[dict[str, float]]:
    """The metric's values of the teachers of distilled students, those of their own seeds if there are any; nothing if
    it is not clear which they are."""
    first = members[0]
    same = [r for r in runs if (r.setting, r.network, r.method) == (first.setting, first.teacher, "none")]
    # A teacher that was given by its checkpoint may have been trained alone.
    same = [r for r in same if r.role == "teacher"] or same
    if len({item.width for item in same}) != 1:
        return []
    same = nearest(first, same)
    seeds = {item.seed for item in members}
    return [values_of(item, metric) for item in [r for r in same if r.seed in seeds] or same]


def gap_closed(
    difference: float, teachers: Sequence[dict[str, float]], base: Sequence[dict[str, float]], metric: str
) -> float | None:
    """A difference to the student alone over the teacher's; None where the teacher is no better, or unknown."""
    if not teachers or metric.startswith("rvd"):
        return None
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    gap = sign * difference_over_seeds(teachers, base, paired=False)["mean"]
    return sign * difference / gap if gap > 0 else None


def values_of(item: Run, metric: str) -> dict[str, float]:
    """A run's metric of each case."""
    return {case: metrics[metric] for case, metrics in item.cases.items()}
