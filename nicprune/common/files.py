"""Atomic writes: a reader finds the old file or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from nicprune.common.errors import FileError

VARIABLES = {
    "NICPRUNE_DATA": (
        "the folder with the images of nicprune's recipes: kodak/, val/cid22/, train/...;"
        " docs/data.md lists their sources"
    ),
    "NICPRUNE_START": "the weights that training starts from, a .pth.tar or .safetensors",
}
"""Environment variables that nicprune's own recipes use, with their meaning."""


def expand(path: str | Path) -> Path:
    """Expand `~` and environment variables, `$NAME` or `${NAME}`, in a path.

    Raises:
        FileError: a variable is not set.
    """
    filled = os.path.expandvars(str(path))
    if missing := re.search(r"\$(\w+|\{\w+\})", filled):
        name = missing[1].strip("{}")
        hint = f" ({VARIABLES[name]})" if name in VARIABLES else ""
        raise FileError(
            f"{path}: the variable {name} is not set{hint}; export {name}=... or name another path"
        )
    return Path(filled).expanduser()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file atomically: call `write` with a temporary path beside `path`, then rename it.

    Raises:
        FileError: the folder cannot be created or written to, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files; output files follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except FileError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise FileError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log.

    Raises:
        FileError: the log cannot be written, or the disk is full.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(*folders: str | Path) -> None:
    """Create these folders if necessary; raise FileError unless files can be written into them."""
    for folder in folders:
        write_text(Path(folder) / ".writable", "").unlink(missing_ok=True)
