"""Random crops of images: each batch is a pure function of seed, step and rank.

A run that resumes at step n therefore sees the batches of an uninterrupted run, without saved
state.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nicprune.common.errors import DataError
from nicprune.common.files import content_digest
from nicprune.data.images import list_images, read_image, usable_images


class Batches:
    """Batches that are pure functions of (seed, step, rank), each drawn while the one before is
    learnt from.
    """

    def __init__(self) -> None:
        self._ahead: tuple[tuple[int, ...], Future[Tensor]] | None = None
        self._worker: ThreadPoolExecutor | None = None

    def sources(self) -> list[list[str]]:
        """Return the name and a digest of the content of each image or clip."""
        raise NotImplementedError

    def _draw(self, size: int, seed: int, step: int, rank: int) -> Tensor:
        raise NotImplementedError

    def batch(self, size: int, *, seed: int, step: int, rank: int = 0) -> Tensor:
        """Return the batch of `step`: float32 in [0, 1].

        A thread draws the batch of the next step meanwhile; decoding and copying release the GIL.
        """
        key = (size, seed, step, rank)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="patches")
        batch = (
            self._ahead[1].result() if self._ahead and self._ahead[0] == key else self._draw(*key)
        )
        following = (size, seed, step + 1, rank)
        self._ahead = (following, self._worker.submit(self._draw, *following))
        return batch

    def close(self) -> None:
        """Stop the thread that draws ahead."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = self._ahead = None


class Patches(Batches):
    """Random crops of images, batches of shape (size, 3, patch_size, patch_size).

    Args:
        folder: one folder, several, or "samples" (see `list_images`).
        patch_size: side of the square crops in pixels.
        cache_bytes: memory for decoded images (uint8); the least recently used are dropped first.
    """

    def __init__(
        self, folder: str | Path | Sequence[str | Path], patch_size: int, cache_bytes: int = 4 << 30
    ):
        super().__init__()
        self.patch_size = patch_size
        self.paths = usable_images(list_images(folder, "train"), patch_size)
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[Path, Tensor] = OrderedDict()
        self._held = 0
        self._broken: set[Path] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def sources(self) -> list[list[str]]:
        return [[path.name, content_digest(path)] for path in self.paths]

    def image(self, index: int) -> Tensor:
        """Return image `index` as uint8 of shape (3, H, W), from the cache if possible."""
        path = self.paths[index]
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        image = read_image(path)
        with self._lock:
            if path not in self._cache and image.numel() <= self.cache_bytes:
                self._cache[path] = image
                self._held += image.numel()
                while self._held > self.cache_bytes:
                    self._held -= self._cache.popitem(last=False)[1].numel()
        return image

    def _skip(self, path: Path, error: DataError) -> None:
        if path not in self._broken:
            self._broken.add(path)
            warnings.warn(f"skipped: {error}", stacklevel=2)
        if len(self._broken) == len(self.paths):
            raise DataError(f"no usable image: every one of {len(self.paths)} is broken")

    def _draw(self, size: int, seed: int, step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(seed, step, rank))
        side = self.patch_size
        patches: list[Tensor] = []
        while len(patches) < size:
            index, row, column, flip = torch.randint(0, 1 << 31, (4,), generator=generator).tolist()
            try:
                image = self.image(index % len(self.paths))
            except DataError as error:
                # A whole header, damaged inside: draw another. The same files give the same draws.
                self._skip(self.paths[index % len(self.paths)], error)
                continue
            top, left = row % (image.shape[1] - side + 1), column % (image.shape[2] - side + 1)
            patch = image[:, top : top + side, left : left + side]
            patches.append(patch.flip(-1) if flip % 2 else patch)
        return torch.stack(patches).float().div_(255)


def mix(*numbers: int) -> int:
    """Hash integers into one 63-bit seed, so that neighbouring (seed, step, rank) give unrelated
    seeds (splitmix64).
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
