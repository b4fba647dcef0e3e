"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable

INTERRUPTED = "interrupted; the same command goes on from here"
"""The line that a command ends with after Ctrl-C."""


class UserError(Exception):
    """A mistake that the user can mend: its message names the file, case or key, and what to do about it.

    Commands print it as one line and exit with a code other than 0; they never show its traceback.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a `name` that does not exist, with the near ones (all of them if none is near)."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    return UserError(f"there is no {kind} '{name}'; did you mean {', '.join(near)}?")


class Interrupted(Exception):
    """The job was told to stop and its state is saved."""
