"""Time of coding by channel widths: the cost that budgets of time ask, from a table of times.

The time of a layer is bilinear between the widths at which it was measured alone (Yang et al.,
"NetAdapt", ECCV 2018, keep such tables). A part of a codec (g_a, h_s) is faster or slower than the
sum of its layers: activations have times of their own, backends fuse operations, memory formats
change between layers. So the sum is mapped to the seconds of the part by a line through whole
parts, measured inside `encode` and `decode` at some widths. What is outside of parts counts as it
is in the whole codec: entropy coding, and context models that run pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nicprune.channels.groups import Groups
from nicprune.common.errors import RecipeError
from nicprune.pruning.budget import TIMES
from nicprune.pruning.cost import CostModel
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.totals import Totals


@dataclass(frozen=True)
class TimedTotals(Totals):
    """MACs, parameters, and seconds of coding one image."""

    encode_s: float
    decode_s: float


class TimedCost(CostModel):
    """Cost of every keep-list of one codec, times among them.

    Args:
        codec, groups: as for `CostModel`.
        table: the codec's times.

    Raises:
        RecipeError: the table is of another codec.
    """

    def __init__(self, codec: nn.Module, groups: Groups, table: LatencyTable):
        self._times: _Times | None = None
        super().__init__(codec, groups)
        self.use(table)

    def use(self, table: LatencyTable) -> None:
        """Take another table of the same codec."""
        self._check(table)
        rows = [self._row[name] for name in table.layers]
        self.table, self._times = table, _Times(table)
        self._rows = np.array(rows, np.int64)
        now = dict(zip(TIMES, self._times.seconds(*self._at(self._full)), strict=True))
        self.original = TimedTotals(**self.original.as_dict(), **(table.original or now))  # type: ignore[arg-type]

    def _check(self, table: LatencyTable) -> None:
        out, inn = self._layer_widths(self._full)
        for name, times in table.layers.items():
            row = self._row.get(name)
            measured = times.outputs[-1], times.inputs[-1]
            if row is None or measured != (out[row], inn[row]):
                here = "no such layer" if row is None else f"{out[row]} to {inn[row]} channels"
                raise RecipeError(
                    f"these times are of another codec: {name} was measured with {measured[0]} to"
                    f" {measured[1]} channels, and this codec has {here}; measure_latency(codec)"
                )

    def _at(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the widths of the layers that were measured."""
        out, inn = self._layer_widths(widths)
        return out[self._rows].astype(float), inn[self._rows].astype(float)

    def totals(self, keep: Mapping[str, Sequence[int] | int] | np.ndarray | None = None) -> Totals:
        """Return the cost with these keep-lists (or widths), seconds too."""
        found = super().totals(keep)
        if self._times is None:
            return found
        widths = keep if isinstance(keep, np.ndarray) else self.widths(keep)
        seconds = self._times.seconds(*self._at(widths))
        return TimedTotals(**found.as_dict(), encode_s=seconds[0], decode_s=seconds[1])

    def soft(self, widths: np.ndarray, what: str = "macs") -> float:
        if what not in TIMES or self._times is None:
            return super().soft(widths, what)
        return self._times.seconds(*self._at(widths))[TIMES.index(what)]

    def decreases(self, widths: np.ndarray, deltas: np.ndarray, what: str) -> np.ndarray:
        if what not in TIMES or self._times is None:
            return super().decreases(widths, deltas, what)
        return self._times.decreases(
            self._at(widths),
            (self._share_out * deltas)[self._rows],
            (self._share_in * deltas)[self._rows],
            TIMES.index(what),
        )

    def history(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return what the history of a codec pruned to these keep-lists says of its times: how they
        were measured, and seconds of the original and of what is left, as the table has them.
        """
        found: Any = self.totals(keep)
        now = {name: [getattr(self.original, name), getattr(found, name)] for name in TIMES}
        return {"latency": {**self.table.runtime.model_dump(mode="json"), **now}}


class _Times:
    """The table as arrays: layers by number, in the order of the table."""

    def __init__(self, table: LatencyTable):
        layers, parts = list(table.layers.values()), list(table.parts.values())
        number = {name: i for i, name in enumerate(table.layers)}
        most = [max((len(getattr(t, axis)) for t in layers), default=1) for axis in AXES]
        self._axes = [
            np.array([_padded(getattr(t, axis), size) for t in layers]).reshape(len(layers), size)
            for axis, size in zip(AXES, most, strict=True)
        ]
        self._grid = np.zeros((len(layers), *most))
        for i, times in enumerate(layers):
            grid = np.array(times.seconds, float)
            # More channels never take less time: what seems so is noise, or a width that the
            # backend is slow at, which a solver must not be sent to.
            grid = np.maximum.accumulate(np.maximum.accumulate(grid, 0), 1)
            rows, columns = grid.shape
            self._grid[i] = np.pad(grid, ((0, most[0] - rows), (0, most[1] - columns)), mode="edge")
        self._part = np.zeros(len(layers), np.int64)
        self._count = len(parts)
        for i, part in enumerate(parts):
            self._part[[number[name] for name in part.widths[0]]] = i
        self._on = np.array([[side in part.sides for part in parts] for side in TIMES], float)
        self._on = self._on.reshape(len(TIMES), len(parts))
        self._rest = np.array([table.rest[side] for side in TIMES])  # type: ignore[index]
        self._lines = []
        for part in parts:
            own = np.array([number[name] for name in part.widths[0]], np.int64)
            alone = [
                self._alone(
                    own, *(np.array([w[name][k] for name in part.widths[0]], float) for k in (0, 1))
                ).sum()
                for w in part.widths
            ]
            # Below the narrowest that was measured, in proportion.
            line = np.array([(0.0, 0.0), *_rising(alone, part.seconds)])
            self._lines.append((line[:, 0], line[:, 1]))

    def _alone(self, layers: np.ndarray, out: np.ndarray, inn: np.ndarray) -> np.ndarray:
        """Return the seconds of layers alone, bilinear in their widths. Narrower than measured, a
        layer takes as long as at its least width.
        """
        (i, u), (j, v) = (
            _place(axis[layers], value) for axis, value in zip(self._axes, (out, inn), strict=True)
        )
        grid = self._grid
        i1, j1 = np.minimum(i + 1, grid.shape[1] - 1), np.minimum(j + 1, grid.shape[2] - 1)
        found: np.ndarray = (
            (1 - u) * ((1 - v) * grid[layers, i, j] + v * grid[layers, i, j1])
            + u * ((1 - v) * grid[layers, i1, j] + v * grid[layers, i1, j1])
        )  # fmt: skip
        return found

    def _of_parts(self, alone: np.ndarray) -> np.ndarray:
        """Return the seconds of parts, (..., parts), from the sums of their layers alone."""
        found = np.empty_like(alone)
        for i, (x, y) in enumerate(self._lines):
            found[..., i] = np.interp(alone[..., i], x, y)
        return found

    def _sums(self, out: np.ndarray, inn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds of layers, and their sums by part."""
        alone = self._alone(np.arange(len(out)), out, inn)
        return alone, np.bincount(self._part, alone, minlength=self._count).astype(float)

    def seconds(self, out: np.ndarray, inn: np.ndarray) -> tuple[float, float]:
        """Return the seconds of encoding and of decoding with these widths of layers."""
        parts = self._of_parts(self._sums(out, inn)[1])
        encode, decode = self._rest + self._on @ parts
        return float(encode), float(decode)

    def decreases(
        self,
        at: tuple[np.ndarray, np.ndarray],
        d_out: np.ndarray,
        d_in: np.ndarray,
        side: int,
    ) -> np.ndarray:
        """Return how much less one side takes when each group alone narrows: d_out and d_in are
        (layers, groups).
        """
        alone, sums = self._sums(*at)
        layer, group = np.nonzero((d_out != 0) | (d_in != 0))
        less = self._alone(
            layer, at[0][layer] - d_out[layer, group], at[1][layer] - d_in[layer, group]
        )
        saved = np.zeros((d_out.shape[1], self._count))
        np.add.at(saved, (group, self._part[layer]), alone[layer] - less)
        found: np.ndarray = (self._of_parts(sums) - self._of_parts(sums - saved)) @ self._on[side]
        return found


def _rising(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Return the points of a line that rises: the first, of the whole part, and the latest
    measurements. Those that contradict these are noise; where the line did not rise, a solver would
    find nothing to gain.
    """
    first, *later = zip(x, y, strict=True)
    kept = [first]
    for a, b in reversed(later):
        if all((a - c) * (b - d) > 0 for c, d in kept):
            kept.append((a, b))
    return sorted(kept)


AXES = ("outputs", "inputs")


def _padded(widths: Sequence[int], size: int) -> list[float]:
    return [*map(float, widths), *[np.inf] * (size - len(widths))]


def _place(axes: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each layer the entry of its axis at or below a value, and how far the value is on
    the way to the next, 0 to 1.
    """
    below = np.clip((axes <= value[:, None]).sum(1) - 1, 0, axes.shape[1] - 1)
    each = np.arange(len(below))
    low = axes[each, below]
    high = axes[each, np.minimum(below + 1, axes.shape[1] - 1)]
    way = np.where(np.isfinite(high) & (high > low), high - low, 1.0)
    return below, np.clip((value - low) / way, 0, 1) * (np.isfinite(high) & (high > low))
