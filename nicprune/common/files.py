"""Writing files so that a reader never meets half of one."""

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
        "the folder that holds the photographs of nicprune's recipes: kodak/, val/cid22/,"
        " train/...; docs/data.md says where each is had"
    ),
    "NICPRUNE_START": "the weights that training starts from, a .pth.tar or .safetensors",
}
"""Variables that nicprune's own recipes name, and what each stands for."""


def expand(path: str | Path) -> Path:
    """Fill in `~` and variables of the environment, `$NAME` or `${NAME}`.

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
    """Call `write(temporary)` beside `path`, then rename: `path` is always the old file or the new
    one, whole.

    Raises:
        FileError: the folder cannot be made or written to, or the disk is full.
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
        # mkstemp makes files private; what a user asked to be written follows the user's umask
        # instead.
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
        FileError: it cannot be written, or the disk is full.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(*folders: str | Path) -> None:
    """Raise FileError unless files can be written into these folders, which are made if they are
    not there.
    """
    for folder in folders:
        write_text(Path(folder) / ".writable", "").unlink(missing_ok=True)
