"""The one exception for mistakes that a user can mend."""

import difflib
import sys
from collections.abc import Iterable

INTERRUPTED = "interrupted; the same command goes on from here"
"""The line that a command ends with after Ctrl-C."""


class UserError(Exception):
    """A mistake that the user can mend: its message names the file, case or key, and what to do about it.

    Commands print it as one line and exit with a code other than 0; they never show its traceback.
    """


class Conflict(UserError):
    """Something sound is in the way that was made of something else; it is replaced only when that is asked for."""


def one_line(text: object) -> str:
    """Text for one line of a terminal: what is not printed, as names of files may hold it, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say_error(text: object, kind: str = "error") -> None:
    """Print an error, a note or a warning as one line."""
    print(f"{kind}: {one_line(text)}", file=sys.stderr)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a `name` that does not exist, with the near ones (all of them if none is near)."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    return UserError(f"there is no {kind} '{name}'; did you mean {', '.join(near)}?")


class Interrupted(Exception):
    """The job was told to stop and its state is saved."""
