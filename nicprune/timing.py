"""Where the time of coding goes: each transform, and what is none (entropy coding, context models), of several codecs in turns.

    for times in time_codecs({"original": codec, "pruned": small}, "photo.png"):
        print(times.name, times.encode, times.decode)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from nicprune.channels import Groups
from nicprune.codecs import entropy_models, refresh_tables, transform_of, unwrap
from nicprune.cost import CostModel, Totals
from nicprune.data import calibration_images, read_image
from nicprune.evaluation import pad
from nicprune.methods import Attached
from nicprune.runtime import BUSY, machine_line
from nicprune.sampling import Sampler

REST = "coding"
"""What is spent outside of every module: entropy coding, and context models that CompressAI runs pixel by pixel on one thread."""


@dataclass(frozen=True)
class Times:
    """Seconds for one image, median over turns.

    Attributes:
        encode, decode: seconds by transform in the order in which they run, `REST` for what is none.
        busy: others kept the processor busy throughout.
    """

    name: str
    cost: Totals
    encode: dict[str, float]
    decode: dict[str, float]
    kept: int
    busy: bool


@contextmanager
def _watched(codec: nn.Module, spent: dict[str, float]) -> Iterator[None]:
    """Add to `spent` the seconds of every module that no other module runs, by transform."""
    depth, started, hooks = 0, 0.0, []

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth, started
        depth += 1
        if depth == 1:
            started = _now()

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                transform = transform_of(name)
                spent[transform] = spent.get(transform, 0.0) + _now() - started

        return hook

    try:
        coders = {id(part) for model in entropy_models(codec) for part in model.modules()}
        for name, module in codec.named_modules():
            if name and id(module) not in coders:  # before all other hooks going in, behind all others coming out: gates count with their transform
                hooks += [module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after(name))]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def stage_times(codec: Any, image: Tensor, **rate: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Code one image (1, 3, H, W), sides multiples of 64, and decode it again; return the seconds of each, by transform, and of the rest."""
    with _timed(codec) as encode:
        sent = codec.compress(image, **rate)
    with _timed(codec) as decode:
        codec.decompress(sent["strings"], sent["shape"])
    return encode, decode


@contextmanager
def _timed(codec: nn.Module) -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    with _watched(unwrap(codec), spent):
        started = _now()
        yield spent
        spent[REST] = _now() - started - sum(spent.values())


def _cost(codec: Any, image: Tensor) -> Totals:
    """What a codec costs for this image, warmed up on the way."""
    stage_times(codec, image)
    if not isinstance(codec, Attached):
        return CostModel(codec, Groups([])).totals()
    with torch.no_grad():
        codec(image)
    spent = codec.image_cost()  # where gates decide by image
    return codec.totals() if spent is None else replace(codec.totals(), **{side: round(spent[0][side]) for side in ("macs", "encoder", "decoder")})


def time_codecs(codecs: Mapping[str, nn.Module], image: str | Path | None = None, *, repeats: int = 7, limit: float = 60.0) -> list[Times]:
    """Time codecs in turns on one photograph, in float32 and channels_last; turns during which others were busy do not count.

    Args:
        codecs: by name; each a `CompressionModel`, or one with gates, a modulator or widths on it. They are copied.
        image: a photograph; None takes one that comes with nicprune (768x512).
        repeats: quiet turns that are wanted.
        limit: seconds after which the least disturbed turns have to do.

    Raises:
        DataError: no photograph there.
    """
    shown = calibration_images("samples", 1)[0] if image is None else read_image(image).unsqueeze(0).float() / 255
    ready: dict[str, Any] = {}
    for name, codec in codecs.items():
        ready[name] = copy.deepcopy(codec).float().eval().to(memory_format=torch.channels_last)
        refresh_tables(ready[name])
    device = next(iter(next(iter(ready.values())).parameters())).device
    x = pad(shown)[0].to(device).contiguous(memory_format=torch.channels_last)
    costs = {name: _cost(codec, x) for name, codec in ready.items()}
    sampler = Sampler(repeats, limit)
    turns = sampler.quiet(lambda: [stage_times(codec, x) for codec in ready.values()])
    found = []
    for number, name in enumerate(ready):
        encode, decode = ({part: statistics.median(turn[number][side][part] for turn in turns) for part in turns[0][number][side]} for side in (0, 1))
        found.append(Times(name, costs[name], encode, decode, sampler.kept, sampler.busy))
    return found


def times_table(times: list[Times], image: str = "a sample photograph", tablefmt: str = "pipe") -> str:
    """Two tables, encoding and decoding: seconds by part, and speed-up beside FLOP reduction against the first codec."""
    blocks = []
    for side, sides in (("encode", [t.encode for t in times]), ("decode", [t.decode for t in times])):
        parts = [part for part in dict.fromkeys(part for spent in sides for part in spent) if part != REST]
        rows = []
        for one, spent in zip(times, sides, strict=True):
            macs, before = (getattr(t.cost, f"{side}r") for t in (one, times[0]))
            total, reduction = sum(spent.values()), before / macs if macs else float("nan")
            speed = sum(sides[0].values()) / total
            ratio = [f"{speed:.2f}×", f"{speed / reduction:.2f}"] if one is not times[0] else ["", ""]
            seconds = [f"{spent[part]:.3f}" if part in spent else "" for part in (*parts, REST)]
            rows.append([one.name, f"{macs / 4096 / 1000:.2f}", f"{reduction:.2f}×", *seconds, f"{total:.3f}", *ratio])
        headers = [f"{side}, s", "kMAC/pixel", "FLOP reduction", *parts, REST, "all", "speed-up", "/ FLOP reduction"]
        blocks.append(tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))))
    busy = " Others never left the processor alone: run again on a quiet machine." if any(t.busy for t in times) else ""
    blocks.append(
        f"Seconds for {image}, medians of {times[0].kept} turns during which others used at most {BUSY:.0%} of the processor; "
        f"{torch.get_num_threads()} thread(s), {machine_line()}, torch {torch.__version__}. {REST}: entropy coding, and context models, "
        f"which CompressAI runs on one thread.{busy}"
    )
    return "\n\n".join(blocks)
