"""What has to hold of every codec that is pruned, however it is done."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from helpers import image, random_keep
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nicprune.channels.groups import Groups
from nicprune.pruning.cost import CostModel, measure
from nicprune.pruning.masks import Masks
from nicprune.pruning.operators import without_fused_attention
from nicprune.pruning.surgery import prune
from nicprune.pruning.verification import difference
from nicprune.pruning.views import Slices, override_attributes
from nicprune.storage.checkpoint import load, save


def run(codec: nn.Module) -> torch.Tensor:
    codec = codec.double().eval()
    with torch.no_grad():
        return codec(image(codec, 2))["x_hat"]


def check_pruning(codec: nn.Module, groups: Groups, seed: int, folder: Path) -> None:
    """All that has to hold of a pruned codec."""
    keep = random_keep(groups, seed, minimal=seed == 2)
    small = prune(codec, keep, groups)  # raises unless pruned = masked
    cost = CostModel(codec, groups)
    predicted, measured = cost.totals(keep), measure(small)
    assert predicted == measured
    assert predicted.params == sum(p.numel() for p in small.parameters())
    mode = FlopCounterMode(display=False)
    with without_fused_attention(), sdpa_kernel(SDPBackend.MATH), mode as counter, torch.no_grad():
        small(image(small))
    assert counter.get_total_flops() == 2 * measured.macs

    masks = Masks([groups[name] for name in keep])
    for name, kept in keep.items():
        masks[name].data.zero_()[kept] = 1.0
    masked = copy.deepcopy(codec)
    masks.double().attach(masked, groups)
    assert difference(masked, small) <= 1e-10
    masks.detach(masked)
    masks.fold(masked, groups)
    assert difference(masked, small) <= 1e-10

    whole = copy.deepcopy(codec).double()
    slices = Slices(whole, groups, {n: k for n, k in keep.items() if groups[n].latent is None})
    narrow = prune(codec, slices.keep, groups, verify=False)
    with override_attributes(slices.overrides(whole)):
        found = run(whole)
    assert torch.allclose(found, run(copy.deepcopy(narrow)), rtol=0, atol=1e-10)

    path = save(small, folder / "small.safetensors", factory=lambda: copy.deepcopy(codec))
    again = load(path, factory=lambda: copy.deepcopy(codec))
    assert difference(small, again) == 0
    assert measure(again) == measured
