"""Layers that coding runs and the forward pass does not, such as a filter behind the decoder that
is left out in training. Costs are those of the forward pass, so that these are missing from them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.layer_kinds.kind import kinds_in


def run_by_coding_only(
    codec: nn.Module, image: Tensor, uncalled: Collection[str]
) -> dict[str, int]:
    """Return the MACs of what `compress` or `decompress` runs and the forward pass does not.

    Args:
        codec: a codec; it is copied where there is anything to try.
        image: an image that it runs on, shape (1, C, H, W).
        uncalled: names of the modules that its forward pass does not call.

    Returns:
        By layer, for this image; none where the codec writes no bitstream.
    """
    suspects = sorted(set(kinds_in(codec)) & set(uncalled))
    if not suspects:
        return {}
    twin, found = copy_codec(codec), dict.fromkeys(suspects, 0)
    counter = FlopCounterMode(display=False)

    def add(name: str, sign: int) -> None:  # before a layer, and after it
        found[name] += sign * counter.get_total_flops() // 2

    for name in suspects:
        layer = twin.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: add(name, -1))
        layer.register_forward_hook(lambda *_, name=name: add(name, 1))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
        try:
            update_tables(twin)
            written = compress(twin, image)
            decompress(twin, written["strings"], written["shape"], image)
        except Exception:  # one that has no bitstreams, or none yet: what ran until then counts
            pass
    return {name: macs for name, macs in found.items() if macs > 0}
