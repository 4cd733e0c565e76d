"""Layers that coding runs and the forward pass does not, such as a filter behind the decoder that
is left out in training. Costs are those of the forward pass, so that these are missing from them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.layer_kinds.kind import kinds_in


def run_by_coding_only(codec: nn.Module, image: Tensor, uncalled: Collection[str]) -> list[str]:
    """Return which layers `compress` or `decompress` runs, of those that the forward pass does not.

    Args:
        codec: a codec; it is copied where there is anything to try.
        image: an image that it runs on, shape (1, C, H, W).
        uncalled: names of the modules that its forward pass does not call.

    Returns:
        Their names, sorted; none where the codec writes no bitstream.
    """
    suspects = sorted(set(kinds_in(codec)) & set(uncalled))
    if not suspects:
        return []
    twin, found = copy_codec(codec), set()
    for name in suspects:
        twin.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: found.add(name))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            update_tables(twin)
            written = compress(twin, image)
            decompress(twin, written["strings"], written["shape"], image)
        except Exception:  # one that has no bitstreams, or none yet: what ran until then counts
            pass
    return sorted(found)
