"""Files of codecs, damaged anywhere. They have a digest: what is accepted is what was saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import torch
from compressai.models import FactorizedPrior, ScaleHyperprior
from torch import nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.provenance import provenance
from nicprune.methods import attach
from nicprune.storage.checkpoint import load, save

from .damage import damaged
from .trial import Believed


def codecs() -> dict[str, nn.Module]:
    """Small codecs: two architectures, and one with a method on it."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"qualities": [1, 2]}
    return {
        "factorized": FactorizedPrior(2, 3),
        "hyperprior": ScaleHyperprior(4, 6),
        "scaled": cast(
            "nn.Module", attach(FactorizedPrior(2, 3), "bottleneck_scaling", **settings)
        ),
    }


class Inputs:
    """Damaged files."""

    lines = 1

    def __init__(self) -> None:
        self.whole: dict[str, bytes] = {}
        self.expected: dict[str, Any] = {}
        for name, codec in codecs().items():
            path = save(codec, Path(f"{name}.safetensors"))
            self.whole[name], self.expected[name] = path.read_bytes(), contents(load(path))

    def make(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([*self.whole])
        how, data = damaged(self.whole[name], draw)
        return f"{name}: {how}", (name, data)

    def use(self, given: Any) -> None:
        name, data = given
        path = Path("damaged.safetensors")
        path.write_bytes(data)
        if not same(contents(load(path)), self.expected[name]):
            raise Believed("other weights, or another history")


def contents(codec: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that a file says of a codec."""
    return codec.state_dict(), dict(vars(provenance(unwrap(codec))))


def same(one: Any, other: Any) -> bool:
    """Whether two codecs have the same contents, bit for bit."""
    (state, record), (expected, recorded) = one, other
    return (
        record == recorded
        and state.keys() == expected.keys()
        and all(
            state[k].dtype == expected[k].dtype and torch.equal(state[k], expected[k])
            for k in state
        )
    )
