"""Locks of folders: one process at a time writes into the folder of a run."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nicprune.common.errors import FileError
from nicprune.common.files import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
"""Name of the lock file, which says who holds the folder: process, host, and since when."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder inside the block, and remove what killed writers left in it.

    The system releases the lock of a process that is gone, so that a lock file left by it does not
    count. Where the system or the file system has no such locks, nothing is held.

    Raises:
        FileError: another process, or another part of this one, holds the folder; or the folder
            cannot be written to.
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        # Removed before it is released: afterwards, it may be the lock of the next.
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise FileError(
                f"{path.parent} is in use by {holder}; wait until it ends, or use another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        # The holder before may have removed the file between opening and locking it.
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        return "process {pid} on {host} since {since}".format(**json.load(file))
    except (ValueError, KeyError, TypeError):  # it has just begun, and has not written yet
        return "another process"
