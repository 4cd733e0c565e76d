"""Time of entropy coding, part by part: by CompressAI's own code, without detours, and compiled.

Latents are drawn, so that their symbols are spread as those of photographs are: most are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.memory_format import to_channels_last
from nicprune.codecs.rans import compiled, uncompiled
from nicprune.evaluation.timer import Measure, QuietTimer
from nicprune.storage.named import load_codec

HYPERPRIORS = ("bmshj2018-hyperprior",)
CONTEXT_MODELS = ("mbt2018", "cheng2020-anchor")
SIZE = (512, 768)
STRIDES = 16, 64
"""Pixels for each position of y, and of z."""


def _quick(work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), fast_indexes():
            return work()

    return run


def _own(work: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(work)


def _without(work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with uncompiled():
            return _quick(work)()

    return run


def drawn(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return scales and latents of Gaussians, float64, shape (1, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, channels, height, width
    scales = torch.exp(1.2 * torch.randn(shape, generator=generator) - 1.5).double()
    return scales, scales * torch.randn(shape, generator=generator).double()


def bench_coding(size: tuple[int, int] = SIZE) -> Iterator[Measure]:
    """Measure what entropy coding takes by CompressAI's code, relative to nicprune's.

    Args:
        size: height and width of the image, multiples of 64.
    """
    for name in HYPERPRIORS:
        yield from _parts(name, size)
    for name in CONTEXT_MODELS:
        yield from _positions(name, size)
    for name in (*HYPERPRIORS, *CONTEXT_MODELS):
        yield _images(name, size)


def _codec(name: str) -> Any:
    codec = load_codec(name, 1, weights="none").eval()
    refresh_tables(codec)
    return codec


def _parts(name: str, size: tuple[int, int]) -> Iterator[Measure]:
    """Measure the parts of coding with a hyperprior."""
    codec = _codec(name)
    conditional, bottleneck = codec.gaussian_conditional.double(), codec.entropy_bottleneck
    scales, y = drawn(codec.M, *(side // STRIDES[0] for side in size))
    indexes = conditional.build_indexes(scales)
    z = torch.randn(
        1, bottleneck.channels, *(s // STRIDES[1] for s in size), generator=torch.Generator()
    ).mul(3)
    strings, z_strings = conditional.compress(y, indexes), bottleneck.compress(z)
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "CDF tables of y": (2, lambda: conditional.build_indexes(scales)),
        "y to a string": (1, lambda: conditional.compress(y, indexes)),
        "y from its string": (1, lambda: conditional.decompress(strings, indexes)),
        "z to a string": (1, lambda: bottleneck.compress(z)),
        "z from its string": (2, lambda: bottleneck.decompress(z_strings, z.shape[-2:])),
    }
    total = [0.0, 0.0, 0.0]
    for what, (count, work) in works.items():
        timer, seconds = _timed([way(work) for way in (_own, _without, _quick)])
        total = [t + count * s for t, s in zip(total, seconds, strict=True)]
        yield _measure(timer, f"{name}, {what}", seconds, size)
    yield _measure(timer, f"{name}, all of entropy coding", total, size)


def _positions(name: str, size: tuple[int, int]) -> Iterator[Measure]:
    """Measure the loop over positions of a context model in float64."""
    codec = _codec(name).double()
    height, width = (side // STRIDES[0] for side in size)
    _, y = drawn(codec.M, height, width)
    params = torch.randn(
        1, 2 * codec.M, height, width, generator=torch.Generator().manual_seed(1)
    ).double()
    padded = F.pad(y, (2, 2, 2, 2))

    def write() -> Any:
        return codec._compress_ar(padded.clone(), params, height, width, 5, 2)

    string = _quick(write)()

    def read() -> None:
        with torch.no_grad():
            found = torch.zeros_like(padded)
            codec._decompress_ar(string, found, params, height, width, 5, 2)

    total = [0.0, 0.0, 0.0]
    for what, work in (("y to a string", write), ("y from its string", read)):
        timer, seconds = _timed([way(work) for way in (_own, _without, _quick)], 3)
        total = [t + s for t, s in zip(total, seconds, strict=True)]
        yield _measure(timer, f"{name}, {what}", seconds, size)
    yield _measure(timer, f"{name}, y to a string and back", total, size)


def _images(name: str, size: tuple[int, int]) -> Measure:
    """Measure an image to a bitstream and back, transforms included, as `encode` and `decode`
    do.
    """
    coder = Coder(to_channels_last(copy_codec(_codec(name))))
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(x, 5, 1, 2).contiguous(memory_format=torch.channels_last)

    def code() -> None:
        sent = coder.compress(x)
        coder.decompress(sent["strings"], sent["shape"], x)

    def without() -> None:
        with uncompiled():
            code()

    timer, (before, after) = _timed([without, code], 3)
    detail = f"{_ms(before)} without numba, {_ms(after)} with it{_missing()}"
    return timer.measure(
        f"{name}, image to bitstream and back, with transforms",
        before / after,
        "x",
        size=_text(size),
        detail=detail,
    )


def _timed(works: Sequence[Callable[[], Any]], repeats: int = 7) -> tuple[QuietTimer, list[float]]:
    timer = QuietTimer(repeats, limit=30)
    return timer, timer.medians(works)


def _measure(
    timer: QuietTimer, name: str, seconds: Sequence[float], size: tuple[int, int]
) -> Measure:
    own, without, quick = seconds
    detail = (
        f"{_ms(own)} by CompressAI, {_ms(without)} without numba, {_ms(quick)} with it{_missing()}"
    )
    return timer.measure(name, own / quick, "x", size=_text(size), detail=detail)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _missing() -> str:
    return "" if compiled() else " (it is not installed here)"
