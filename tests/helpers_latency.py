"""Tables of times that nothing was measured for."""

from __future__ import annotations

from torch import nn

from nicprune.codecs.layer_kinds import layers_of, widths_of
from nicprune.pruning.latency_table import LatencyTable, LayerTimes, PartTimes, Runtime

SIDES = {"g_a": ["encode_s"], "h_a": ["encode_s"], "h_s": ["encode_s", "decode_s"],
         "g_s": ["decode_s"]}  # fmt: skip


def table_of(codec: nn.Module, slow: float = 1.0) -> LatencyTable:
    """Times of a hyperprior that nothing was measured for: not proportional to multiply-adds."""
    layers, parts = {}, {}
    for part, sides in SIDES.items():
        own = [
            name
            for name, module in layers_of(codec).items()
            if name.startswith(f"{part}.") and any(True for _ in module.parameters())
        ]
        for i, name in enumerate(own):
            out, inn = widths_of(layers_of(codec)[name])
            axes = [sorted({min(w, 2), max(1, w // 2), w}) for w in (out, inn)]
            grid = [[slow * (1 + i + 0.1 * o + 0.01 * o * n) for n in axes[1]] for o in axes[0]]
            layers[name] = LayerTimes(outputs=axes[0], inputs=axes[1], seconds=grid)
        full = {name: widths_of(layers_of(codec)[name]) for name in own}
        half = {
            name: tuple(width if width == 3 else max(1, width // 2) for width in widths)
            for name, widths in full.items()
        }
        parts[part] = PartTimes(sides=sides, widths=[full, half], seconds=[30.0 * slow, 9.0 * slow])  # type: ignore[arg-type]
    return LatencyTable(
        runtime=Runtime(), machine="none", layers=layers, parts=parts,
        rest={"encode_s": 4.0, "decode_s": 5.0},
    )  # fmt: skip
