"""Numbers in somebody's own modules that follow a width: of heads, of parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_pruning
from helpers import make_telling
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec, C

from nicprune.common.errors import CodecError
from nicprune.pruning.attributes import FOLLOWED, set_attributes
from nicprune.pruning.surgery import analyse, prune
from nicprune.pruning.verification import difference
from nicprune.storage.checkpoint import load, save


class Heads(nn.Module):
    """Attention whose number and size of heads are attributes, in three ways of writing it."""

    def __init__(self, how: str, heads: int, size: int):
        super().__init__()
        self.how, self.num_heads, self.head_dim, self.inner = how, heads, size, heads * size
        self.unused = 4 * heads * size
        self.scale = size**-0.5
        self.qkv, self.proj = nn.Linear(C, 3 * self.inner), nn.Linear(self.inner, C)
        self.table = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        size = self.inner // self.num_heads if self.how == "divided" else self.head_dim
        qkv = self.qkv(x.flatten(2).transpose(1, 2))
        qkv = qkv.reshape(b, h * w, 3, -1 if self.how == "free" else self.num_heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = ((q * self.scale) @ k.transpose(-1, -2) + self.table).softmax(-1)
        y = (weights @ v).transpose(1, 2)
        y = y.reshape(b, h * w, -1 if self.how == "free" else self.inner)
        return x + self.proj(y).transpose(1, 2).reshape(b, c, h, w)


class Parts(nn.Module):
    """Two parts by numbers, which are the same at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = 4, 4
        self.wide, self.last = nn.Conv2d(C, 8, 1), nn.Conv2d(8, C, 1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(self.wide(x), (self.first, self.second), 1)
        return x + self.last(torch.cat((self.one(one).relu(), self.two(two)), 1))


CASES: dict[str, tuple[Any, dict[str, dict[str, int]]]] = {
    "wide heads": (
        lambda: Heads("numbers", 2, 5),
        {"g_a.1.qkv": {"head_dim": 1, "inner": 2}},
    ),
    "many heads": (
        lambda: Heads("numbers", 5, 2),
        {"g_a.1.qkv": {"num_heads": 1, "inner": 2}},
    ),
    "divided": (lambda: Heads("divided", 2, 5), {"g_a.1.qkv": {"inner": 2}}),
    "free": (lambda: Heads("free", 3, 2), {"g_a.1.qkv": {}}),
    "parts": (
        Parts,
        {"g_a.1.wide[0:4]": {"first": 1}, "g_a.1.wide[4:8]": {"second": 1}},
    ),
}
"""Each module, with what has to follow each of its groups, and how much of it goes with a channel;
others may follow too, if nothing reads them.
"""


def codec_of(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_telling(BlockCodec(CASES[name][0]()))


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_code_holds_follow_the_width(name: str, tmp_path: Path) -> None:
    codec = codec_of(name)
    groups = analyse(codec)
    assert not [g.name for g in groups if g.pinned]
    for group, expected in CASES[name][1].items():
        found = {a.name: a.times for a in groups[group].attributes}
        found.pop("unused", None)
        found = {k: v for k, v in found.items() if k in expected} if name == "divided" else found
        assert found == expected
    check_pruning(codec, groups, 1, tmp_path)
    check_pruning(codec, groups, 2, tmp_path)


def test_a_codec_is_pruned_again_by_the_numbers_that_it_has_now(tmp_path: Path) -> None:
    codec = codec_of("many heads")
    small: Any = prune(codec, {"g_a.1.qkv": [0, 2, 3]})
    again: Any = prune(small, {"g_a.1.qkv": [0, 2]})
    assert (small.g_a[1].num_heads, again.g_a[1].num_heads, again.g_a[1].inner) == (3, 2, 4)
    assert codec.g_a[1].num_heads == 5  # type: ignore[index, union-attr]
    path = save(again, tmp_path / "a.safetensors", factory=lambda: codec_of("many heads"))
    loaded: Any = load(path, factory=lambda: codec_of("many heads"))
    assert loaded.g_a[1].num_heads == 2 and difference(again, loaded) == 0
    assert save(loaded, tmp_path / "b.safetensors", factory=lambda: codec_of("many heads"))


def test_what_no_number_explains_is_unprunable() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.conv = C, nn.Conv2d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x.view(1, 8, *x.shape[2:]).contiguous()

    groups = analyse(make_telling(BlockCodec(Literal())))
    assert "depends on this width" in str(groups["g_a.1.conv"].pinned)
    assert not groups["g_a.1.conv"].attributes


@pytest.mark.parametrize(
    "values", [{"g_a.9": {"num_heads": 3}}, {"g_a.1": {"nothing": 3}}, {"g_a.1": {"how": 3}}]
)
def test_a_file_with_numbers_that_fit_nothing_is_refused(
    values: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    codec = codec_of("many heads")
    with pytest.raises((ValueError, AttributeError)):
        set_attributes(copy.deepcopy(codec), values)
    small = prune(codec, {"g_a.1.qkv": [0, 2, 3]})
    small.__dict__[FOLLOWED] = small.__dict__[FOLLOWED] | values
    with pytest.raises(CodecError, match="cannot be saved") as error:
        save(small, tmp_path / "a.safetensors", factory=lambda: copy.deepcopy(codec))
    assert "\n" not in str(error.value)
