"""Blocks of published designs: what can be free is, and pruned is masked, counted and saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import image, random_keep
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_of_blocks import BLOCKS, BlockCodec, block_codec

from nicprune.channels.groups import Groups
from nicprune.codecs.layer_kinds import layers_of
from nicprune.pruning.cost import CostModel, measure
from nicprune.pruning.masks import Masks
from nicprune.pruning.surgery import analyse, difference, prune
from nicprune.pruning.views import Slices, override_attributes
from nicprune.storage.checkpoint import load, save


def run(codec: nn.Module) -> torch.Tensor:
    codec = codec.double().eval()
    with torch.no_grad():
        return codec(image(codec, 2))["x_hat"]


def check(codec: nn.Module, groups: Groups, seed: int, folder: Path) -> None:
    """All that has to hold of a pruned codec."""
    keep = random_keep(groups, seed, minimal=seed == 2)
    small = prune(codec, keep, groups)  # raises unless pruned = masked
    cost = CostModel(codec, groups)
    predicted, measured = cost.totals(keep), measure(small)
    assert predicted == measured
    assert predicted.params == sum(p.numel() for p in small.parameters())
    # Fused attention is not counted on CPU.
    mode = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), mode as counter, torch.no_grad():
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
    layers = layers_of(whole)
    attributes = [(layers[n], slices.sliced_parameters(n, layers[n])) for n in slices.layers]
    with override_attributes(attributes):
        found = run(whole)
    assert torch.allclose(found, run(copy.deepcopy(narrow)), rtol=0, atol=1e-10)

    path = save(small, folder / "small.safetensors")
    again = load(path, factory=lambda: copy.deepcopy(codec))
    assert difference(small, again) == 0
    assert measure(again) == measured


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_as_free_as_it_can_be(name: str, tmp_path: Path) -> None:
    codec = block_codec(name)
    groups = analyse(codec)
    reason = {m.module: g.pinned for g in groups for m in g.members if m.axis in ("out", "both")}
    _, free, held = BLOCKS[name]
    for layer in free:
        assert reason[f"g_a.1.{layer}" if layer else "g_a.0"] is None, (layer, reason)
    for layer in held:
        assert reason[f"g_a.1.{layer}" if layer else "g_a.0"], layer
    for seed in range(3):
        check(codec, groups, seed, tmp_path)


def test_a_mask_on_another_modules_parameter_cannot_be_put() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner.scale

    groups = analyse(BlockCodec(Outer()).eval())
    found = next(g for g in groups if any(m.module == "g_a.0" for m in g.members))
    assert "another module" in str(found.pinned)
