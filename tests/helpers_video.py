"""Clips made in code, and a small codec that predicts frames."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.copying import copy_codec
from nicprune.data.clip_files import write_clip
from nicprune.data.clips import Clip

HEIGHT, WIDTH = 71, 90


def moving(count: int = 6, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> list[Tensor]:
    """Soft uint8 frames, each the one before moved by two columns."""
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    first = nn.functional.interpolate(small, size=(height, width), mode="bicubic")
    picture = first[0].clamp(0, 1).mul(255).round().byte()
    return [torch.roll(picture, 2 * n, 2) for n in range(count)]


def written(path: Path, frames: list[Tensor], fps: Fraction = Fraction(25)) -> Path:
    """Write frames as `write_clip` does; return the path."""
    write_clip(iter(frames), path, fps)
    return path


class Frames(Clip):
    """A clip in memory."""

    def __init__(self, frames: list[Tensor], fps: Fraction = Fraction(25)):
        self.name, self.fps, self._frames = "frames", fps, frames
        self.height, self.width = frames[0].shape[1:]

    def __len__(self) -> int:
        return len(self._frames)

    def _from(self, start: int) -> Any:
        return iter(self._frames[start:])


class ResidualCoder:
    """Code the latents of a FactorizedPrior less those decoded of the frame before: a loop that
    drifts apart if encoder and decoder see other latents.
    """

    def __init__(self, codec: nn.Module, width: int | None = None, point: Any = None):
        assert width is None and not point
        self.widths, self.width, self.predicts = 1, 0, True
        self.point, self.accelerated, self.plain_arithmetic = (), False, nullcontext
        self.codec: Any = copy_codec(codec).eval()
        self.codec.update()

    def compress(self, x: Tensor, previous: Tensor | None = None) -> Any:
        y = self.codec.g_a(x)
        strings = self.codec.entropy_bottleneck.compress(y - self._before(previous, y))
        return [strings], tuple(y.shape[-2:]), self._read([strings], y.shape[-2:], previous)

    def decompress(self, strings: Any, shape: Any, previous: Tensor | None = None) -> Any:
        y_hat = self._read(strings, shape, previous)
        return self.codec.g_s(y_hat).clamp(0, 1), y_hat

    def _read(self, strings: Any, shape: Any, previous: Tensor | None) -> Tensor:
        residual = self.codec.entropy_bottleneck.decompress(strings[0], shape)
        return residual + self._before(previous, residual)

    def _before(self, previous: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if previous is None else previous
