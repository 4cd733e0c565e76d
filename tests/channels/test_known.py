"""Channel groups that are known of a codec: when they are, when not, and what files say of them."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.models import FactorizedPrior
from helpers import built, image, make_telling, random_keep
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec

from nicprune import attach, load, save
from nicprune.channels import known
from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Groups, Norms
from nicprune.channels.known import as_plain, from_plain, recall
from nicprune.common.errors import CodecError, FileError
from nicprune.pruning import surgery
from nicprune.pruning.surgery import analyse, prune
from nicprune.storage import checkpoint
from nicprune.storage.checkpoint import FORMAT, _digest


class Numbered(nn.Module):
    """Code that holds the width of its first layer, and not of its second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.slope, self.act = 0.1, F.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x)).view(1, 8, *x.shape[2:])
        return self.last(F.leaky_relu(self.second(y), self.slope))


class Foreign(BlockCodec):
    """A codec of somebody else's that its class makes again."""

    def __init__(self) -> None:
        super().__init__(Numbered())


@pytest.fixture
def codec() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_telling(Foreign())


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each codec that is tried."""
    done, tried = [], surgery._tried

    def noting(codec: nn.Module, groups: Groups) -> Groups:
        done.append(type(codec).__name__)
        return tried(codec, groups)

    monkeypatch.setattr(surgery, "_tried", noting)
    return done


def same(first: Groups, second: Groups) -> bool:
    """Whether groups are the same; reasons may be worded otherwise."""
    shown = [
        [
            (
                g.name,
                g.width,
                g.latent,
                g.pinned is None,
                [(m.module, m.axis, m.index.tolist()) for m in g.members],
            )
            for g in groups
        ]
        for groups in (first, second)
    ]
    return shown[0] == shown[1] and first.products == second.products


def test_a_codec_is_analysed_once(codec: Any, trials: list[str]) -> None:
    groups = analyse(codec)
    assert "depends on this width" in str(groups["g_a.1.first"].pinned)
    with torch.no_grad():
        codec.g_a[1].first.weight.mul_(2)
    attach(codec, "magnitude", budget={"macs": 0.9}, round_to=1).detach()
    assert analyse(codec.train()) is groups
    assert trials == ["Foreign"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.g_a[1], "slope", 0.2),
        lambda c: setattr(c.g_a[1], "act", F.gelu),
        lambda c: setattr(c.g_a[1], "last", nn.Conv2d(8, 8, 3, padding=1)),
        lambda c: setattr(c.g_a[1].last, "forward", lambda x: x[:, :8]),
        lambda c: c.g_a.__setitem__(1, nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1))),
    ],
)
def test_a_codec_that_has_changed_is_analysed_anew(codec: Any, change: Any) -> None:
    groups = analyse(codec)
    change(codec)
    assert recall(codec, find_groups) is None and analyse(codec) is not groups


def test_copies_and_pickles_know_nothing(codec: Any) -> None:
    analyse(codec)
    assert recall(copy.deepcopy(codec), find_groups) is None
    assert b"nicprune.channels" not in pickle.dumps(codec)
    assert recall(pickle.loads(pickle.dumps(codec)), find_groups) is None


def test_what_was_tried_holds_of_the_pruned_codec(codec: Any, trials: list[str]) -> None:
    groups = analyse(codec)
    small = prune(codec, random_keep(groups, 0), groups)
    found = analyse(small)
    assert trials == ["Foreign"] and found["g_a.1.first"].pinned
    assert same(found, analyse(copy.deepcopy(small)))
    again = prune(small, random_keep(found, 1), found)
    assert same(analyse(again), analyse(copy.deepcopy(again))) and trials == ["Foreign"] * 3


class Joined(nn.Module):
    """Three layers that one reads; code holds the width of the one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.last = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        held = self.b(x).view(1, 8, *x.shape[2:])
        return self.last(torch.cat([self.a(x), held, self.c(x)], 1))


def test_what_was_tried_holds_of_the_same_channels() -> None:
    codec = make_telling(BlockCodec(Joined()))
    groups = analyse(codec)
    assert [groups[f"g_a.1.{name}"].pinned is None for name in "abc"] == [True, False, True]
    small = prune(codec, {"g_a.1.a": [1, 4, 5]}, groups)
    found = analyse(small)
    assert [found[f"g_a.1.{name}"].pinned is None for name in "abc"] == [True, False, True]
    assert found["g_a.1.b"].pinned == groups["g_a.1.b"].pinned


def test_groups_that_were_not_tried_say_nothing_of_the_pruned_codec(
    codec: Any, trials: list[str]
) -> None:
    analyse(codec)
    groups = find_groups(codec)
    keep = {"g_a.1.second": [0, 3, 4]}
    analyse(prune(codec, keep, groups))
    assert trials == ["Foreign"] * 2


def test_what_stays_is_attached_again_without_trials(codec: Any, trials: list[str]) -> None:
    masked = attach(codec, [("magnitude", {"budget": {"macs": 0.8}, "round_to": 1}), *[MODULATOR]])
    masked.harden()
    assert trials == ["Foreign"]


MODULATOR = ("bit_rate_modulator", {"qualities": [1, 2]})


# -- files ----------------------------------------------------------------------------------------


def test_groups_go_to_files_and_back(architecture: str) -> None:
    codec, groups = built(architecture)
    written = json.loads(json.dumps(as_plain(codec, groups)))
    found = from_plain(codec, written)
    assert found is not None and same(groups, found)
    assert [g.pinned for g in found] == [g.pinned for g in groups]


def test_a_file_holds_the_groups(codec: Any, trials: list[str], tmp_path: Path) -> None:
    groups = analyse(codec)
    small = prune(codec, random_keep(groups, 0), groups)
    name, settings = MODULATOR
    for make in (lambda: codec, lambda: small, lambda: attach(small, name, **settings)):
        one = make()
        again = load(save(one, tmp_path / "one.safetensors"))
        assert same(analyse(getattr(again, "codec", again)), analyse(getattr(one, "codec", one)))
    assert trials == ["Foreign"]
    assert torch.equal(again(image(codec))["x_hat"], one(image(codec))["x_hat"])


@pytest.mark.parametrize("left", ["no group", "groups that cannot shrink"])
def test_a_codec_with_nothing_left_to_prune_is_saved(
    left: str, codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = analyse(codec)
    small = prune(codec, random_keep(groups, 0), groups)
    if left == "no group":

        def find(codec: nn.Module, norms: Norms) -> Groups:
            raise CodecError("nothing can be pruned safely")

        monkeypatch.setattr(checkpoint, "find_groups", find)
    else:
        find = find_groups
        monkeypatch.setattr(known, "_as_before", lambda g, before: replace(g, pinned="held"))
    again = load(save(small, tmp_path / "small.safetensors"))
    assert torch.equal(again(image(codec))["x_hat"], small(image(codec))["x_hat"])
    assert recall(small, find) is None


def rewritten(file: Path, change: Any) -> Path:
    """The file with another header, its digest made to fit."""
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()[FORMAT])
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    change(header)
    header["digest"] = _digest(header, tensors)
    save_file(tensors, file, metadata={FORMAT: json.dumps(header)})
    return file


def test_a_file_without_groups_or_with_anothers_is_analysed(
    codec: Any, trials: list[str], tmp_path: Path
) -> None:
    groups = analyse(codec)
    for change in (
        lambda header: header.pop("groups"),
        lambda header: header["groups"].update(fingerprint=1),
    ):
        file = rewritten(save(codec, tmp_path / "one.safetensors"), change)
        assert same(analyse(load(file)), groups)
    assert trials == ["Foreign"] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(groups=3),
        lambda g: g.pop("products"),
        lambda g: g["groups"].append(g["groups"][0]),
        lambda g: g["groups"][0].__setitem__(0, g["groups"][1][0]),
        lambda g: g["groups"][0][3][0].__setitem__(0, "g_a.nothing"),
        lambda g: g["groups"][0][3][0].__setitem__(1, "up"),
        lambda g: g["groups"][0][3][0].__setitem__(2, [[[0, 1, 1 << 40]]]),
        lambda g: g["groups"][0][3][0].__setitem__(2, [[[4, 1, 8]]]),
        lambda g: g["groups"][0][3][0].__setitem__(2, [[[0, 0, 8]]]),
        lambda g: g["groups"][0][3][0].__setitem__(2, [[]]),
        lambda g: g["groups"][0][3][0].__setitem__(2, [[["a", 1, 8]]]),
        lambda g: g.update(products=[["", 5, [4, 4], [{"nobody": 1}]]]),
    ],
)
def test_damaged_groups_are_refused_in_one_line(codec: Any, change: Any, tmp_path: Path) -> None:
    analyse(codec)
    file = save(codec, tmp_path / "one.safetensors")
    rewritten(file, lambda header: change(header["groups"]))
    with pytest.raises(FileError, match="is damaged: its channel groups") as error:
        load(file)
    assert "\n" not in str(error.value)


def test_codecs_of_the_zoo_are_remembered_too() -> None:
    codec = make_telling(FactorizedPrior(8, 12))
    assert analyse(codec) is analyse(codec)
