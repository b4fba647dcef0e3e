"""Files that are written whole or not at all."""

import os
import re
from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path

from .errors import UserError
from .workers import is_abandoned, signature

UMASK = os.umask(0)
os.umask(UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), make it durable, and only then give it its name.

    Raises `UserError` if it can't be written, for instance on a full disk; what was there before is left as it was.
    """
    aside = path.with_name(f".{path.name}.{signature(os.getpid())}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~UMASK)  # Some writers make files that only their owner can read.
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path}: can't be written ({reason}); make room, and run the same command again") from None
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small text file, whole or not at all."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def is_unfinished(name: str) -> bool:
    """Whether a file's name is one that `write_atomically` gives until all is written, or gave in earlier versions."""
    return re.fullmatch(r"\..+\.([0-9a-f]{8}-\d+-[^-.]+|\d+)\.tmp", name) is not None


def unfinished(folder: Path, name: str) -> Iterator[Path]:
    """The unfinished files in a folder, whoever writes them, that would become one of a name (a glob pattern)."""
    return (path for path in folder.glob(f".{name}.*.tmp") if is_unfinished(path.name))


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of a file that they were writing, and nothing else."""
    for left in filter(is_abandoned, unfinished(path.parent, escape(path.name))):
        left.unlink(missing_ok=True)
