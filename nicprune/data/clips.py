"""Clips: sequences of frames of one size, as folders of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from nicprune.common.errors import DataError, FileError
from nicprune.common.files import expand
from nicprune.data.images import SUFFIXES, read_image


class Clip:
    """The image files of one folder, in the order of their names.

    Attributes:
        path: the folder.
        height, width: size of the frames in pixels.
        fps: frames per second.
    """

    def __init__(self, path: Path):
        self.path, self.fps = path, 30.0
        self._frames = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        with Image.open(self._frames[0]) as first:
            self.width, self.height = first.size

    def __len__(self) -> int:
        return len(self._frames)

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """Return frames as uint8, shape (3, H, W) each.

        Raises:
            DataError: a frame is damaged, or has another size.
        """
        found = [read_image(self._frames[i]) for i in indices]
        for i, frame in zip(indices, found, strict=True):
            if frame.shape[1:] != (self.height, self.width):
                raise DataError(f"{self._frames[i]} has another size than the clip's first frame")
        return found


def clips_in(folder: str | Path) -> list[Clip]:
    """Return the clips of a folder: the folder itself if it holds images, and each folder in it
    that does, sorted by name.

    Raises:
        DataError: there is none.
    """
    try:
        root = expand(folder)
    except FileError as error:
        raise DataError(str(error)) from None
    if not root.is_dir():
        raise DataError(f"no such folder of clips: {root}")
    inside = sorted(path for path in root.iterdir() if path.is_dir())
    found = [
        Clip(path)
        for path in [root, *inside]
        if any(p.suffix.lower() in SUFFIXES for p in path.iterdir())
    ]
    if not found:
        raise DataError(f"no clips in {root}: looked for folders of images")
    return found
