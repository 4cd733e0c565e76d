"""Predicted cost equals what counters find on the pruned codec, to the MAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from compressai.zoo import image_models
from helpers import GROUP_COUNTS, built, image, random_keep
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo_of_blocks import block_codec

from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.pruning.coding_only import run_by_coding_only
from nicprune.pruning.cost import CostModel, count_modules, measure
from nicprune.pruning.surgery import analyse, prune


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_cost_of_keep_lists_is_what_is_counted(architecture: str, seed: int) -> None:
    if seed == 1 and architecture == "elic2022-official":
        pytest.skip("slow, and its sibling is tried with both")
    codec, groups = built(architecture)
    cost, keep = CostModel(codec, groups), random_keep(groups, seed, minimal=seed == 1)
    small = prune(codec, keep, groups, verify=False)
    predicted, measured = cost.totals(keep), measure(small)
    assert predicted == measured
    assert predicted.params == sum(p.numel() for p in small.parameters())
    assert predicted.macs == count_modules(small)[""]
    by_transform = cost.by_transform(keep)
    assert sum(m for m, _ in by_transform.values()) == predicted.macs
    assert sum(p for _, p in by_transform.values()) == predicted.params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_for_analysis(small, image(small))
    assert counter.get_total_flops() == 2 * predicted.macs
    assert cost.soft(cost.widths(keep).astype(float)) == predicted.macs


def test_decreases_are_differences_of_totals(architecture: str) -> None:
    codec, groups = built(architecture)
    cost = CostModel(codec, groups)
    widths = cost.widths(random_keep(groups, 3))
    deltas = (widths > 2).astype(int) * 2
    for what in ("macs", "encoder", "decoder", "params"):
        found = cost.decreases(widths, deltas, what)
        for i in range(0, len(widths), max(len(widths) // 12, 1)):
            narrower = widths.copy()
            narrower[i] -= deltas[i]
            assert found[i] == getattr(cost.totals(widths), what) - getattr(
                cost.totals(narrower), what
            )


def test_sides_add_up() -> None:
    codec, groups = built("mbt2018")
    cost = CostModel(codec, groups)
    total, parts = cost.totals(), {name: macs for name, (macs, _) in cost.by_transform().items()}
    assert total.encoder == total.macs - parts["g_s"]
    assert total.decoder == total.macs - parts["g_a"] - parts["h_a"]


KNOWN = [
    ("bmshj2018-hyperprior", 1, 34.242),
    ("bmshj2018-hyperprior", 8, 76.270),
    ("mbt2018-mean", 1, 35.824),
    ("mbt2018", 1, 79.291),
    ("cheng2020-anchor", 1, 167.76),
    ("cheng2020-attn", 1, 185.30),
]


@pytest.mark.parametrize(("name", "quality", "gmac"), KNOWN)
def test_known_totals_at_768x512(name: str, quality: int, gmac: float) -> None:
    found = measure(image_models[name](quality=quality, pretrained=False)).gmac(512, 768)
    assert abs(found - gmac) <= (0.0005 if gmac < 100 else 0.005)


def test_transforms_of_the_hyperprior() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    del codec
    full = image_models["bmshj2018-hyperprior"](quality=1, pretrained=False)
    parts = CostModel(full, groups.__class__([])).by_transform()
    assert {
        k: round(v[0] * 96 / 1e9, 3) for k, v in parts.items() if k != "entropy_bottleneck"
    } == {"g_a": 16.584, "g_s": 16.584, "h_a": 0.536, "h_s": 0.536}


def test_counting_changes_nothing() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    codec.train()
    codec.g_a[0].eval()
    modes = [m.training for m in codec.modules()]
    CostModel(codec, groups)
    assert [m.training for m in codec.modules()] == modes


@pytest.mark.parametrize("architecture", sorted(GROUP_COUNTS))
def test_group_counts(architecture: str) -> None:
    assert len(built(architecture)[1].prunable(latents=True)) == GROUP_COUNTS[architecture]


def test_queries_and_keys_of_other_lengths_are_told_apart() -> None:
    """Torch's attention multiplies the matrix of queries, and that behind the heads, once for each
    query, and those of keys and values once for each of these.
    """
    codec = block_codec("torch's cross attention")
    groups = analyse(codec)
    cost = CostModel(codec, groups)
    for group in groups.prunable(latents=True):
        keep = {group.name: list(range(max(2, group.width // 2)))}
        small = measure(prune(codec, keep, groups))
        assert cost.totals(keep) == small != cost.totals()
    keep = {"g_a.1.q": [0], "g_a.1.attention.out_proj": [0, 5, 7]}
    assert cost.totals(keep) == measure(prune(codec, keep, groups))


class Filtered(ScaleHyperprior):
    """A codec whose pictures a filter improves when they are read, and in training not."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.post = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.spare = nn.Conv2d(3, 3, 3, padding=1)

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = super().decompress(strings, shape)
        return {"x_hat": self.post(out["x_hat"])}


def test_layers_that_only_coding_runs_are_named() -> None:
    codec = Filtered().eval()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    with pytest.warns(UserWarning, match=r"^MACs of post\.0, post\.2 in Filtered are not counted"):
        found = measure(codec)
    assert found.macs == measure(ScaleHyperprior(8, 12)).macs
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


def test_what_coding_runs_is_counted_to_the_mac() -> None:
    codec = Filtered().eval()
    layers = {"post.0", "post.1", "post.2", "spare"}
    found = run_by_coding_only(codec, torch.rand(1, 3, 64, 128), layers)
    assert found == {"post.0": 64 * 128 * 3 * 8 * 9, "post.2": 64 * 128 * 8 * 3}


def test_layers_that_nothing_runs_are_not_named() -> None:
    codec = ScaleHyperprior(8, 12)
    codec.spare = nn.Conv2d(3, 3, 3)
    measure(codec)  # warnings are errors
