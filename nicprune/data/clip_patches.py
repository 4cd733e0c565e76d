"""Random crops of clips: frames at a random distance in time, with one crop and flip through a
clip.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from nicprune.common.errors import DataError
from nicprune.data.patches import Batches, mix


class Frames(Protocol):
    """A clip, as `nicprune.data.clips` and `nicprune.data.moving_photographs` give it."""

    name: str
    height: int
    width: int

    def __len__(self) -> int:
        """Return the number of frames."""

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """Return frames, uint8 of shape (3, H, W)."""

    def digest(self) -> str:
        """Return a hash of the content."""


@dataclass(frozen=True)
class ClipSampling:
    """The frames of a training clip.

    Attributes:
        strides: distances in time between the frames of a clip, one of which is drawn for each
            batch.
        span: largest number of successive frames that a clip is taken from, first and last
            included; 7 for septuplets. Where all clips are shorter, that of the longest.
        frames: largest number of frames of a clip.
        clips: "files" for videos and folders of frames, "photographs" for clips of `span` frames
            that are made of photographs.
    """

    strides: tuple[int, ...]
    span: int
    frames: int
    clips: Literal["files", "photographs"] = "files"

    def count(self, stride: int) -> int:
        """Return how many frames a clip has at a stride; fewer than two where it does not fit."""
        return min(self.frames, (self.span - 1) // stride + 1)


class ClipPatches(Batches):
    """Random crops of clips, batches of shape (size, T, 3, patch_size, patch_size). T depends on
    the stride that is drawn.

    Args:
        clips: what `clips_in` or `moving_photographs` returned.
        patch_size: side of the square crops in pixels.
        sampling: the frames of a clip.
        cache_bytes: memory for decoded frames (uint8); the least recently used are dropped first.

    Raises:
        DataError: no clip is large and long enough.
    """

    def __init__(
        self,
        clips: Sequence[Frames],
        patch_size: int,
        sampling: ClipSampling,
        cache_bytes: int = 4 << 30,
    ):
        super().__init__()
        large = [clip for clip in clips if min(clip.height, clip.width) >= patch_size]
        longest = max((len(clip) for clip in large), default=0)
        sampling = replace(sampling, span=min(sampling.span, longest))
        self.patch_size, self.sampling, self.cache_bytes = patch_size, sampling, cache_bytes
        self._clips = {
            stride: [clip for clip in large if len(clip) > (count - 1) * stride]
            for stride in sampling.strides
            if (count := sampling.count(stride)) >= 2
        }
        self._clips = {stride: usable for stride, usable in self._clips.items() if usable}
        if not self._clips:
            raise DataError(
                f"no usable clip: none of {len(clips)} has frames of {patch_size}x{patch_size}"
                f" pixels, and two of them {min(sampling.strides)} apart"
            )
        used = {id(clip): clip for usable in self._clips.values() for clip in usable}
        self.clips = list(used.values())
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.clips)

    def sources(self) -> list[list[str]]:
        return [[clip.name, clip.digest()] for clip in self.clips]

    def _frames(self, clip: Frames, indices: Sequence[int]) -> list[Tensor]:
        """Return frames from the cache, those that it lacks read at once."""
        keys = [(id(clip), i) for i in indices]
        with self._lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            for key in found:
                self._cache.move_to_end(key)
        lacking = [key for key in keys if key not in found]
        if lacking:
            read = clip.read([i for _, i in lacking])
            found |= dict(zip(lacking, read, strict=True))
            with self._lock:
                for key in lacking:
                    if key not in self._cache:
                        self._cache[key] = found[key]
                        self._held += found[key].numel()
                while self._held > self.cache_bytes:
                    self._held -= self._cache.popitem(last=False)[1].numel()
        return [found[key] for key in keys]

    def _draw(self, size: int, seed: int, step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(seed, step, rank))

        def draw() -> int:
            return int(torch.randint(0, 1 << 31, (1,), generator=generator))

        strides = sorted(self._clips)
        stride = strides[draw() % len(strides)]
        clips, count, side = self._clips[stride], self.sampling.count(stride), self.patch_size
        patches = []
        for _ in range(size):
            clip = clips[draw() % len(clips)]
            start = draw() % (len(clip) - (count - 1) * stride)
            top, left = draw() % (clip.height - side + 1), draw() % (clip.width - side + 1)
            flip = draw() % 2
            frames = self._frames(clip, [start + i * stride for i in range(count)])
            crops = [frame[:, top : top + side, left : left + side] for frame in frames]
            patch = torch.stack(crops)
            patches.append(patch.flip(-1) if flip else patch)
        return torch.stack(patches).float().div_(255)
