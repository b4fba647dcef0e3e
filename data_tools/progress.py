"""The console: one for all lines, and the progress bar of long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Written to a file, a table is as wide as it needs to be.
console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


class RateColumn(ProgressColumn):
    """Work per `seconds`, as text of the form `pattern`."""

    def __init__(self, pattern: str, seconds: float = 1):
        super().__init__()
        self.pattern, self.seconds = pattern, seconds

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else self.pattern.format(self.seconds * speed))


def progress(total: int, what: str) -> Progress:
    """A bar of `total` cases with rate and time left; advance its task 0."""
    rate = RateColumn("{:.0f} cases/min", 60)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(what, total=total)
    return bar


@contextmanager
def progress_bar(what: str, total: int, done: int = 0, enabled: bool = True) -> Iterator:
    """A bar with rate and remaining time. Yields a function advance(text) for one more step.

    Where the output is no terminal, only the lines that stay are printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn("{:.1f}/s"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    if not (enabled and console.is_terminal):
        yield lambda text="": None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)
