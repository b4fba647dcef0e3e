"""The table of compared runs: on screen, in Markdown and in LaTeX."""

import math
import re
from collections.abc import Mapping, Sequence

from rich.box import HORIZONTALS
from rich.table import Table

from data_tools.ownership import MADE_BY

from .comparison import Row

FRACTIONS = ("dice", "voe", "rvd", "surface_dice")
"""Metrics whose names begin so are fractions, and their differences are told in points: hundredths."""

LATEX = {"\\": r"\textbackslash{}", "×": r"$\times$", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def names(row: Row) -> str:
    """How people call a row's data."""
    return f"{row.dataset}, {row.task}, split {row.split}"


def heading(rows: Sequence[Row], metric: str, fingerprint: str = "") -> str:
    """The heading of a table of rows of the same data, which a `fingerprint` may tell from data of the same names."""
    first = rows[0]
    data = names(first) + (f" (data {fingerprint})" if fingerprint else "")
    return f"{data}: test {metric} of {first.cases} cases, mean and 95% interval"


def columns(rows: Sequence[Row], metric: str) -> dict[str, list[str]]:
    """The cells of each column by its name, without columns that nothing is known for. Differences are in points
    (hundredths) where the metric is a fraction."""
    scale = 100 if metric.startswith(FRACTIONS) else 1
    cells = {
        "": [row.title for row in rows],
        "network": [row.named_network for row in rows],
        "seed": [row.seeds for row in rows],
        "parameters": [f"{row.parameters:,}" if row.parameters else "" for row in rows],
        "GFLOPs": [known("{:.3g}", row.gflops) for row in rows],
        "latency ms": [known("{:.1f}", row.latency_ms) for row in rows],
        metric: [known("{:.4f} [{:.3f}, {:.3f}]", row.mean, row.low, row.high) + missed(row.misses) for row in rows],
        "HD95 mm": [known("{:.1f}", row.hd95) + missed(row.hd95_misses) for row in rows],
        "FP ml": [known("{:.2f}", row.false_positive_ml) for row in rows],
        "points to alone" if scale == 100 else "to alone": [difference(row, scale) for row in rows],
        "gap closed": [known("{:z.0%}", row.gap_closed) for row in rows],
    }
    return {name: column for name, column in cells.items() if any(column)}


def known(pattern: str, *values: float | None) -> str:
    """Values in a pattern; a dash where every case is missed, nothing where they are unknown."""
    if values[0] is None:
        return ""
    return "–" if math.isnan(values[0]) else pattern.format(*values)


def missed(misses: int) -> str:
    """Says that a mean is without some cases."""
    return f" ({misses} missed)" if misses else ""


def difference(row: Row, scale: float) -> str:
    """The difference to the student alone, if there is one."""
    if row.difference is None:
        return ""
    parts = [scale * part for part in (row.difference, row.difference_low, row.difference_high)]
    text = known("{:+.2f} [{:+.2f}, {:+.2f}]", *parts) + missed(row.difference_misses)
    return text + ("*" if row.against == "all seeds" else "")


def remarks(rows: Sequence[Row]) -> list[str]:
    """Notes that a table needs on its differences and intervals."""
    lines = []
    if any(row.against == "all seeds" for row in rows):
        lines.append("* no student alone of the same seed: to the mean of those there are")
    several = [row.seeds for row in rows if row.seeds.endswith(" seeds")]
    if len(several) < len(rows):
        lines.append("one seed: the interval is over cases alone and says nothing of another seed")
    if "2 seeds" in several:
        lines.append(
            "2 seeds: the interval misses the true value more often than one time in twenty; take three or more"
        )
    return lines


def begins_section(before: Row | None, row: Row) -> bool:
    """Whether a row is the first of those over several seeds."""
    return before is not None and "seeds" in row.seeds and "seeds" not in before.seeds


def is_number(name: str) -> bool:
    return name in ("parameters", "GFLOPs", "latency ms")


def as_table(rows: Sequence[Row], metric: str, heading: str) -> Table:
    """Rows of the same data for the screen."""
    found = columns(rows, metric)
    table = Table(title=heading, caption="\n".join(remarks(rows)), box=HORIZONTALS)
    for name in found:
        table.add_column(name, justify="right" if is_number(name) else "left", overflow="fold")
    for before, row, cells in zip([None, *rows], rows, zip(*found.values(), strict=True), strict=False):
        if begins_section(before, row):
            table.add_section()
        table.add_row(*cells)
    return table


def as_markdown(panels: Mapping[str, Sequence[Row]], metric: str) -> str:
    """A section in Markdown for the rows of each data, by its heading."""
    return f"<!-- {MADE_BY} -->\n\n" + "\n".join(
        markdown_section(heading, rows, metric) for heading, rows in panels.items()
    )


def markdown_section(heading: str, rows: Sequence[Row], metric: str) -> str:
    """Rows of the same data."""
    found = columns(rows, metric)
    lines = [f"### {markdown(heading)}", "", f"| {' | '.join(map(markdown, found))} |"]
    lines.append("|" + "|".join("---:" if is_number(name) else "---" for name in found) + "|")
    for cells in zip(*found.values(), strict=True):
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join([*lines, "", *(f"- {markdown(line)}" for line in remarks(rows))]) + "\n"


def markdown(text: str) -> str:
    """Text with the characters that Markdown takes for its own written out."""
    return "".join(f"\\{character}" if character in "|*_\\`<" else character for character in text)


def as_latex(panels: Mapping[str, Sequence[Row]], metric: str) -> str:
    """A LaTeX table for the rows of each data, by its heading; it needs the package booktabs."""
    return f"% {MADE_BY}\n" + "\n".join(latex_table(heading, rows, metric) for heading, rows in panels.items())


def latex_table(heading: str, rows: Sequence[Row], metric: str) -> str:
    """Rows of the same data."""
    found = columns(rows, metric)
    caption = ". ".join([heading, *remarks(rows)])
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(caption)}.}}",
        rf"\begin{{tabular}}{{{''.join('r' if is_number(name) else 'l' for name in found)}}}",
        r"\toprule",
        " & ".join(map(latex, found)) + r" \\",
        r"\midrule",
    ]
    for before, row, cells in zip([None, *rows], rows, zip(*found.values(), strict=True), strict=False):
        lines += [r"\midrule"] * begins_section(before, row)
        lines.append(" & ".join(map(latex, cells)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def latex(text: str) -> str:
    """Text with the characters that LaTeX takes for commands written out, and minus signs as such."""
    text = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text)
