"""Checkpoints of training: two generations, each with a digest of its bytes.

A file is what `torch.save` wrote, followed by `SEAL` and the SHA-256 of all that stands before it;
`torch.load` reads it as it is. The digest is compared before anything is parsed: torch.load itself
reads changed weights without a word.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from nicprune.common.config import cut
from nicprune.common.errors import FileError
from nicprune.common.files import check_regular, write_atomically

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
"""Names of the two generations."""

SEAL = b"NICPRUNE-SHA256:"
LENGTH = len(SEAL) + hashlib.sha256().digest_size


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints in the folder of a run.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path):
        self.newest, self.previous = folder / NEWEST, folder / PREVIOUS
        self._newest_is_whole = True

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint beside the newest one, which then becomes the previous one.

        Raises:
            FileError: the folder cannot be written to, or the disk is full.
        """

        def write(path: Path) -> None:
            torch.save(state, path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            with open(path, "ab") as file:
                file.write(SEAL + digest)
            # Only now, with the new one complete. A damaged one must not replace the previous one.
            if self._newest_is_whole and self.newest.exists():
                os.replace(self.newest, self.previous)

        write_atomically(self.newest, write)
        self._newest_is_whole = True

    def load(self) -> tuple[dict[str, Any], Path] | None:
        """Return the newest checkpoint that is not damaged, and its path; None if there is none.

        Warns where it is not the newest of all.

        Raises:
            FileError: every checkpoint is damaged.
        """
        there = [path for path in (self.newest, self.previous) if path.exists()]
        damage: list[str] = []
        for path in there:
            try:
                state = _read(path)
            except Damaged as error:
                damage.append(f"{path} {error}")
                continue
            self._newest_is_whole = path == self.newest
            if damage:
                warnings.warn(
                    f"{damage[0]}; resuming from {path.name}, step {state['step']}", stacklevel=2
                )
            return state, path
        if not there:
            return None
        raise FileError(
            f"cannot read the checkpoint: {'; '.join(damage)}. To start again, remove"
            f" {' and '.join(map(str, there))}"
        )


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in the folder of a run."""
    for name in (NEWEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    check_regular(path, "checkpoint")
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size - LENGTH
            if length <= 0:
                raise Damaged("is cut short")
            file.seek(length)
            seal = file.read()
            if not seal.startswith(SEAL):
                raise Damaged("is cut short, or of an earlier version of nicprune")
            file.seek(0)
            found = hashlib.sha256()
            while length and (block := file.read(min(length, 1 << 20))):
                found.update(block)
                length -= len(block)
            if found.digest() != seal.removeprefix(SEAL):
                raise Damaged("is damaged: its digest is another")
            file.seek(0)
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror or error})") from None
    except Damaged:
        raise
    except Exception as error:  # the digest is right, and the content somebody else's
        reason = cut(str(error) or type(error).__name__, 200)
        raise Damaged(f"is not one of nicprune's ({reason})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise Damaged("is not one of nicprune's: it does not say at which step it was written")
    return state
