"""Methods on codecs of modern blocks: what is masked, gated or sliced there is what is removed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import image
from torch import nn
from zoo_of_blocks import BLOCKS, block_codec

from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.pruning.verification import difference
from nicprune.training.loop import fit

NAMES = ["NAF", "ConvNeXt", "SE", "shuffle", "heads"]


def run(codec: nn.Module) -> torch.Tensor:
    codec = copy.deepcopy(codec).double().eval()
    with torch.no_grad():
        return codec(image(codec, 2))["x_hat"]


@pytest.mark.parametrize("name", NAMES)
def test_masks_that_have_decayed_are_hardened_exactly(name: str, tmp_path: Any) -> None:
    write_png(image(block_codec(name), 3, 96)[0], tmp_path / "a.png")
    attached = attach(
        block_codec(name), "mask_decay", budget={"macs": 0.6}, round_to=1, decay_steps=6
    )
    assert torch.equal(run(attached.codec), run(block_codec(name)))
    fit(attached, tmp_path, steps=6, batch_size=2, patch_size=64, lmbda=0.01, progress=False)
    attached.double()
    assert difference(attached.codec, attached.harden(verify=False)) <= 1e-10


@pytest.mark.filterwarnings("ignore:slimmable. at width")
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_width_of_a_slimmable_codec_is_the_codec_of_that_width(name: str) -> None:
    attached = attach(block_codec(name), "slimmable", widths=[1.0, 0.5], round_to=1)
    small = attached.extract(1, verify=False).double()
    attached = attached.double().eval()
    x = image(attached.codec, 2)
    with torch.no_grad():
        assert torch.allclose(attached(x, width=1)["x_hat"], small(x)["x_hat"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gates_close_what_is_removed(name: str) -> None:
    codec = block_codec(name)
    attached = attach(codec, "channel_gating", alpha=1.0, gating_steps=2, freeze=0.6)
    attached.prepare([image(codec, s) for s in range(2)])
    attached.train()
    for seed in range(2):
        out = attached(image(codec, seed))
        (out["x_hat"].square().mean() + attached.loss(out, image(codec, seed))).backward()
        attached.after_step()
    attached.calibrate([image(codec, 5)])
    attached.harden()  # raises unless what is left is the same function
