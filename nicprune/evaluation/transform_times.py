"""Time of coding by transform, for several codecs that are timed alternately.

for times in time_codecs({"original": codec, "pruned": small}, "photo.png"):
    print(times.name, times.encode, times.decode)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.memory_format import fast_format, format_of, in_format
from nicprune.common.errors import RecipeError
from nicprune.data.images import calibration_images, read_image, to_channels
from nicprune.evaluation.padding import pad
from nicprune.evaluation.stage_times import stage_times
from nicprune.evaluation.timer import QuietTimer
from nicprune.evaluation.times import Times
from nicprune.methods.composition import Attached
from nicprune.methods.points import first_point, resolve_point
from nicprune.pruning.cost import CostModel
from nicprune.pruning.totals import Totals


@dataclass(frozen=True)
class Named:
    """A codec as named on the command line.

    Attributes:
        given: True if the label was given.
    """

    label: str
    codec: str
    width: int | None = None
    given: bool = False

    @classmethod
    def read(cls, text: str) -> Named:
        """Parse "[label=]codec[@width]". Without a label, the name of the codec or the stem of the
        file is the label.
        """
        if Path(text).is_file():
            return cls(Path(text).stem, text)
        label, found, rest = text.partition("=")
        codec, at, width = (rest if found else text).rpartition("@")
        if not at or not width.isdigit():
            codec, width = rest if found else text, ""
        shown = Path(codec).stem if Path(codec).is_file() else codec
        return cls(
            label if found else f"{shown}@{width}" if width else shown,
            codec,
            int(width) if width else None,
            bool(found),
        )


def _cost(codec: Any, image: Tensor) -> Totals:
    """Return a codec's cost for this image. The codec is warmed up too."""
    stage_times(codec, image)
    if not isinstance(codec, Attached):
        return CostModel(codec, Groups([])).totals()
    with torch.no_grad():
        codec(image)
    spent = codec.image_cost()  # None unless gates decide per image
    return (
        codec.totals()
        if spent is None
        else replace(
            codec.totals(),
            **{side: round(spent[0][side]) for side in ("macs", "encoder", "decoder")},
        )
    )


def time_codecs(
    codecs: Mapping[str, nn.Module],
    image: str | Path | None = None,
    *,
    layers: bool = False,
    fast: bool = False,
    repeats: int = 7,
    limit: float = 60.0,
) -> list[Times]:
    """Time codecs alternately on one image, as `encode` and `decode` run them: in channels_last,
    with entropy parameters in float64.

    Turns during which other programs were busy do not count.

    Args:
        codecs: by name; each a `CompressionModel`, or one with gates, a modulator or widths on it,
            at the width or level that is set. They are copied.
        image: an image file; None takes one of scikit-image's photographs (extra "demo").
        layers: report each layer of the transforms instead of each transform.
        fast: entropy parameters in float32, as `encode(fast=True)`.
        repeats: number of quiet turns to take.
        limit: seconds after which the least disturbed turns are used.

    Raises:
        RecipeError: no codec is given.
        DataError: the image cannot be read.
    """
    if not codecs:
        raise RecipeError("name at least one codec")
    shown = (
        calibration_images("samples", 1)[0]
        if image is None
        else read_image(image).unsqueeze(0).float() / 255
    )
    ready: dict[str, Any] = {}
    for name, codec in codecs.items():
        ready[name] = copy_codec(codec).float().eval()
        in_format(ready[name], fast_format(ready[name]))
        refresh_tables(ready[name])
    device = next(iter(next(iter(ready.values())).parameters())).device
    multiple = max(size_multiple(unwrap(codec)) for codec in ready.values())
    x = pad(shown, multiple)[0].to(device)
    given = {
        name: to_channels(x, image_shape(unwrap(codec))[0]).contiguous(
            memory_format=format_of(codec)
        )
        for name, codec in ready.items()
    }
    costs = {name: _cost(codec, given[name]) for name, codec in ready.items()}
    # What runs in which precision is found out at the same point as when encoding, and not at the
    # one that is set: at a narrow width, code that cuts weights counts as using all of them.
    points = {name: resolve_point(codec) for name, codec in ready.items()}
    timed = (
        ready
        if fast
        else {
            name: Coder(codec, point=first_point(codec, points[name]).keywords())
            for name, codec in ready.items()
        }
    )
    timer = QuietTimer(repeats, limit)
    turns = timer.quiet(
        lambda: [
            stage_times(codec, given[n], layers=layers, **points[n].keywords())
            for n, codec in timed.items()
        ]
    )
    found = []
    for number, name in enumerate(ready):
        sides, wholes = [], []
        for side in (0, 1):
            spent = [turn[number][side] for turn in turns]
            sides.append(
                {
                    part: statistics.median(one.get(part, 0.0) for one in spent)
                    for part in dict.fromkeys(part for one in spent for part in one)
                }
            )
            wholes.append(sum(sides[-1].values()))
        found.append(
            Times(
                name,
                costs[name],
                sides[0],
                sides[1],
                wholes[0],
                wholes[1],
                timer.kept,
                timer.busy,
                timer.known,
            )
        )
    return found
