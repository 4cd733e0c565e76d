"""Codecs whose code takes other paths by size or in training, and codecs with tied parameters: what
is pruned is the masked codec on every path, or left whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from branching_codecs import BRANCHING, TIED, C, Factorized, HeadInTraining, OtherLayer, made

from nicprune.channels.known import as_plain, from_plain
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import CodecError
from nicprune.evaluation.evaluate import evaluate
from nicprune.evaluation.summary import profile_text
from nicprune.methods import attach
from nicprune.pruning.cost import CostModel, measure
from nicprune.pruning.masks import masked_copy
from nicprune.pruning.surgery import analyse, prune
from nicprune.pruning.uncalled import in_words
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit


@pytest.mark.parametrize("name", BRANCHING)
def test_pruned_is_masked_on_every_path(name: str) -> None:
    codec = made(BRANCHING[name])
    attached = attach(codec, "magnitude", budget={"macs": 0.7}, round_to=1)
    small = attached.harden()
    keep = {group: np.array(kept) for group, kept in attached.keep().items()}
    masked = masked_copy(codec, keep, attached.groups)
    for size in (64, 128):
        x = torch.rand(1, 3, size, size)
        with torch.no_grad():
            expected, found = masked(x)["x_hat"], small(x)["x_hat"]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    fit(small, "samples", steps=1, batch_size=1, patch_size=128, progress=False)
    picture = (torch.rand(3, 130, 130) * 255).byte()
    assert decode(small, encode(small, picture)).shape == picture.shape


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("head in training", {"g_a.0"}, "in training"),
        ("other layer on larger maps", {"g_a.1.small", "g_s.1.small"}, "192 x 256 pixels"),
        ("other activation on larger maps", {"g_a.1.conv", "g_s.1.conv"}, "192 x 256 pixels"),
    ],
)
def test_what_another_path_needs_is_left_whole(name: str, held: set[str], said: str) -> None:
    pinned = {
        group.name: group.pinned or ""
        for group in analyse(made(BRANCHING[name]))
        if "depends on this width" in (group.pinned or "")
    }
    assert held <= pinned.keys() and all(said in pinned[one] for one in held), pinned


def test_a_codec_that_does_not_run_on_larger_images_is_tried_on_small_ones_alone() -> None:
    class Small(OtherLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] > 32:
                raise ValueError("at most 32")
            return self.small(x).relu()

    groups = analyse(made(lambda: Factorized(Small(), Small())))
    assert {"g_a.1.small", "g_s.1.small"} <= {group.name for group in groups.prunable()}


@pytest.mark.parametrize("name", TIED)
def test_tied_parameters_stay_tied_and_whole(name: str) -> None:
    codec = made(TIED[name])
    shared = [p for p in codec.parameters() if p.shape == (12, 12, 3, 3)]
    attached = attach(codec, "mask_decay", budget={"params": 0.8}, round_to=1, decay_steps=2)
    for mask in attached.methods.parameters():
        mask.grad = torch.rand_like(mask)
    for _ in range(2):
        attached.after_step()
    small, x = attached.harden(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        masked, pruned = attached.eval()(x)["x_hat"], small(x)["x_hat"]
    assert torch.allclose(masked, pruned, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))
    assert sum(p.numel() for p in small.parameters()) == measure(small).params
    assert attached.cost.totals(attached.keep()).params == measure(small).params
    assert len([p for p in small.parameters() if p.shape == (12, 12, 3, 3)]) == len(shared)
    assert "share a parameter" in " ".join(g.pinned or "" for g in attached.groups)


def test_costs_that_cannot_be_traced_are_told_in_one_line() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(OtherLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.small, x, use_reentrant=True)

    with (
        pytest.raises(CodecError, match=r"cannot be counted.*use_reentrant") as caught,
        pytest.warns(UserWarning, match="requires_grad=True"),  # torch's own, about no gradients
    ):
        measure(made(lambda: Factorized(Checkpointed(), None)))
    assert "\n" not in str(caught.value)


class Tupled(Factorized):
    def forward(self, x: torch.Tensor) -> Any:
        return tuple(super().forward(x).values())


class Listed(Factorized):
    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        return out | {"likelihoods": list(out["likelihoods"].values())}


@pytest.mark.parametrize("cls", [Tupled, Listed])
@pytest.mark.parametrize("use", [measure, analyse])
def test_outputs_that_are_not_compressai_s_are_told(use: Any, cls: type[Factorized]) -> None:
    with pytest.raises(CodecError, match=f"^the forward pass of {cls.__name__} does not return"):
        use(made(cls))


class Volume(torch.nn.Module):
    """A convolution over channels too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, None])[:, 0].relu()


def test_a_codec_with_a_3d_convolution_codes_and_trains() -> None:
    codec = made(lambda: Factorized(Volume(), Volume()))
    fit(codec, "samples", steps=1, batch_size=1, patch_size=64, progress=False)
    picture = (torch.rand(3, 64, 64) * 255).byte()
    assert decode(codec, encode(codec, picture)).shape == picture.shape
    assert len(evaluate(codec, "samples").images) == 3


# -- layers that no run calls ---------------------------------------------------------------------


class Chosen(torch.nn.Module):
    """One of several blocks, by number."""

    def __init__(self, *blocks: torch.nn.Module) -> None:
        super().__init__()
        self.blocks, self.number = torch.nn.ModuleList(blocks), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.blocks[self.number](x)


class Spare(torch.nn.Module):
    """A convolution, and another one that may run in its place."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.spare = spare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second if self.spare else self.first)(x).relu()


def expert(width: int = 2 * C) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(C, width, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(width, C, 1)
    )


PLACES: dict[str, Callable[[], torch.nn.Module]] = {
    "experts": lambda: Chosen(*(expert() for _ in range(3))),
    "experts of lists": lambda: Chosen(*(Chosen(expert(), expert()) for _ in range(2))),
    "norms of a level": lambda: Chosen(*(torch.nn.BatchNorm2d(C) for _ in range(3))),
    "convolutions of a level": lambda: Chosen(*(torch.nn.Conv2d(C, C, 1) for _ in range(3))),
}


@pytest.mark.parametrize("name", PLACES)
def test_entries_of_a_list_that_no_run_calls_run_in_a_pruned_codec(name: str) -> None:
    codec = made(lambda: Factorized(PLACES[name](), PLACES[name]()))
    groups = analyse(codec)
    assert not groups.uncalled
    keep = {group.name: np.arange(group.width // 2) for group in groups.prunable()}
    assert not any(member.module == "g_a.0" for group in keep for member in groups[group].members)
    small, masked = prune(codec, keep, groups), masked_copy(codec, keep, groups)
    if "experts" in name:  # what lies within one may go
        assert next(small.g_a[1].parameters()).shape[0] == C
    x = torch.rand(1, 3, 64, 64)
    for number in range(len(codec.g_a[1].blocks)):
        for one in (small, masked):
            one.g_a[1].number = one.g_s[1].number = number
        with torch.no_grad():
            found, expected = small(x)["x_hat"], masked(x)["x_hat"]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "make", [Spare, lambda: Chosen(expert(), torch.nn.Conv2d(C, C, 1))], ids=["spare", "unlike"]
)
def test_layers_that_no_run_calls_are_named(make: Any) -> None:
    codec = made(lambda: Factorized(make(), make()))
    groups = analyse(codec)
    name = "second" if make is Spare else "blocks.1"
    assert groups.uncalled == (f"g_a.1.{name}", f"g_s.1.{name}")
    read = from_plain(codec, as_plain(codec, groups))
    assert read is not None and read.uncalled == groups.uncalled
    told = f"g_a.1.{name}, g_s.1.{name}"
    assert f"no run called {told}" in profile_text(codec, groups, CostModel(codec, groups))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(codec, {}, groups)  # nothing goes
    keep = {"g_a.0": range(4)}
    with pytest.warns(UserWarning, match=f"no run of Factorized called {told}") as caught:
        small = prune(codec, keep, groups)
    assert len(caught) == 1
    assert provenance(small).verified.endswith(f"never called: {told}")
    assert analyse(small).uncalled == groups.uncalled


def test_layers_that_training_or_coding_alone_calls_are_called() -> None:
    class Elsewhere(HeadInTraining):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Conv2d(3, 3, 1)

        def decompress(self, strings: Any, shape: Any) -> Any:
            return {"x_hat": self.last(super().decompress(strings, shape)["x_hat"])}

    assert not analyse(made(Elsewhere)).uncalled


def test_layers_whose_weights_alone_are_used_are_called() -> None:
    class Functional(Spare):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + torch.nn.functional.conv2d(x, self.second.weight, padding=1)

    assert not analyse(made(lambda: Factorized(Functional(), Functional()))).uncalled


def test_many_layers_that_no_run_calls_are_counted() -> None:
    assert in_words(["a", "b", "c", "d"]) == "a, b, c, ... (4 layers)"
