"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from .errors import UserError

UMASK = os.umask(0)
os.umask(UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), make it durable, and only then give it its name.

    Raises `UserError` if it can't be written, for instance on a full disk; what was there before is left as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
