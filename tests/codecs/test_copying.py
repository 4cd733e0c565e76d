"""Codecs that keep activations are copied, saved and coded with; compiled ones are told apart in
one line.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from compressai.models import FactorizedPrior
from helpers import built, image, same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.copying import copy_codec
from nicprune.common.errors import CodecError
from nicprune.data.images import write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.evaluation.transform_times import time_codecs
from nicprune.methods import attach
from nicprune.pruning.cost import measure
from nicprune.pruning.surgery import analyse, prune
from nicprune.storage.checkpoint import check_savable, load, save
from nicprune.storage.container import decode, encode
from nicprune.storage.export import export_compressai


@dataclass
class Kept:
    y: Tensor


class Named(NamedTuple):
    y: Tensor


class Keeping(FactorizedPrior):
    """Keeps what it computed last, in every way that comes to mind."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        self.last_y = y
        self.g_a.seen = [y, (y.mean(), {"deep": [y * 2]})]
        self.g_s.record = Kept(y.sum(1))
        self.g_s.named = Named(y + 1)
        self.entropy_bottleneck.space = SimpleNamespace(inner={"y": y - 1})
        self.itself = [self.g_s.record]
        self.itself.append(self.itself)
        return super().forward(x)


def keeping() -> Any:
    torch.manual_seed(0)
    codec = Keeping(8, 12)
    codec(image(codec)).values()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(codec)
    return codec


def test_a_copy_has_the_values_and_not_the_graph() -> None:
    codec = keeping()
    state = state_of(codec)
    twin: Any = copy_codec(codec)
    assert same_state(state_of(twin), state) and type(twin) is Keeping
    assert torch.equal(twin.last_y, codec.last_y) and twin.last_y.grad_fn is None
    assert twin.g_a.seen[0] is twin.last_y and twin.g_a.seen[1][1]["deep"][0].grad_fn is None
    assert torch.equal(twin.g_s.record.y, codec.g_s.record.y) and twin.g_s.named.y.grad_fn is None
    assert twin.itself[1] is twin.itself and twin.itself[0] is twin.g_s.record
    assert torch.equal(twin.entropy_bottleneck.space.inner["y"], codec.last_y - 1)
    with torch.no_grad():
        twin.g_a[0].weight.zero_()
        twin.last_y.zero_()
    assert same_state(state_of(codec), state) and codec.last_y.abs().sum() > 0
    assert codec.last_y.grad_fn is not None, "the codec given is left as it was"
    codec.last_y.sum().backward()


def test_every_use_takes_a_codec_that_keeps_activations(tmp_path: Path) -> None:
    picture = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    codec = keeping()
    check_savable(codec)
    again = load(save(codec, tmp_path / "a.safetensors"))
    assert same_state(state_of(again), state_of(codec))
    assert torch.equal(decode(codec, encode(codec, picture)), decode(again, encode(again, picture)))
    evaluate(codec, picture)
    time_codecs({"a": codec}, str(picture), limit=0)
    export_compressai(codec, tmp_path / "a.pth.tar")
    codec(image(codec))  # what was kept last has a graph again
    masked = attach(codec, "mask_decay", budget={"macs": 0.9}, round_to=1, decay_steps=2)
    masked(image(codec))["x_hat"].sum().backward()
    masked.plain()
    masked.detach()
    codec(image(codec))
    small = attach(codec, "magnitude", budget={"macs": 0.9}, round_to=1).harden()
    assert small(image(codec))["x_hat"].shape == (1, 3, 64, 64)
    attach(small, "distillation", teacher=codec, output=0.5)


def doubled(x: Tensor) -> Tensor:
    return x * 2


UNCOPYABLE: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "file": lambda: sys.__stderr__,
    "generator": lambda: (i for i in range(3)),
    "module": lambda: sys,
    "threads": threading.local,
    "scripted": lambda: torch.jit.script(doubled),
}


class Holding(FactorizedPrior):
    """Holds what cannot be copied: itself, in a container, in an object beside a tensor."""

    def __init__(self, what: str = "lock") -> None:
        super().__init__(8, 12)
        held = UNCOPYABLE[what]()
        self.held = held
        other = UNCOPYABLE[what]()
        self.g_a.all = {"first": [other], "second": (other, self.g_a)}
        self.g_s.record = SimpleNamespace(held=held, value=torch.zeros(2), codec=self.g_a)


@pytest.mark.parametrize("what", UNCOPYABLE)
def test_what_cannot_be_copied_is_shared_and_nothing_else(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec: Any = Holding(what)
    twin: Any = copy_codec(codec)
    assert twin.held is codec.held is twin.g_s.record.held
    assert twin.g_a.all["first"][0] is codec.g_a.all["first"][0] is twin.g_a.all["second"][0]
    assert twin.g_a.all["second"][1] is twin.g_a is twin.g_s.record.codec
    ours, theirs = twin.g_s.record.value, codec.g_s.record.value
    assert ours.data_ptr() != theirs.data_ptr()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in codec.parameters()}
    masked = attach(codec, "mask_decay", budget={"macs": 0.9}, round_to=1, decay_steps=2)
    assert same_state(state_of(masked.plain()), state_of(codec))
    masked.detach()
    attach(codec, "magnitude", budget={"macs": 0.9}, round_to=1).harden()
    assert load(save(codec, tmp_path / "a.safetensors"), factory=Holding)
    encode(codec, torch.zeros(3, 64, 64, dtype=torch.uint8))


class RefusingTensor(Tensor):
    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("not this one")


def test_a_tensor_that_cannot_be_copied_is_named_in_one_line() -> None:
    codec: Any = FactorizedPrior(8, 12)
    codec.kept = torch.zeros(2).as_subclass(RefusingTensor)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match=r"FactorizedPrior cannot be copied: .*not this one"):
        copy_codec(codec)


def whole(codec: Any) -> Any:
    return torch.compile(codec)


def in_place(codec: Any) -> Any:
    codec.compile()
    return codec


def a_part(codec: Any) -> Any:
    codec.g_a = torch.compile(codec.g_a)
    return codec


def a_part_in_place(codec: Any) -> Any:
    codec.g_a.compile()
    return codec


@pytest.mark.parametrize("compiled", [whole, in_place, a_part, a_part_in_place])
def test_compiled_codecs_are_told_what_to_do(
    compiled: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    codec = compiled(built("bmshj2018-factorized")[0])
    name = "g_a" if "part" in compiled.__name__ else "the codec"
    refusing: list[Callable[[], object]] = [
        lambda: attach(codec, "magnitude", budget={"macs": 0.5}),
        lambda: attach(codec, "none"),
        lambda: prune(codec, {}),
        lambda: analyse(codec),
        lambda: measure(codec),
    ]
    if compiled in (whole, a_part):  # the keys of their weights are others
        refusing.append(lambda: save(codec, tmp_path / "a.safetensors"))
    for refused in refusing:
        with pytest.raises(CodecError, match=f"^{name} is compiled.*attach first") as told:
            refused()
        assert "\n" not in str(told.value)


def test_what_attach_returned_may_be_compiled() -> None:
    attached = attach(
        built("bmshj2018-factorized")[0], "magnitude", budget={"macs": 0.5}, round_to=1
    )
    attached.compile()
    torch.compile(attached)
    assert measure(attached.harden()).macs < measure(attached.codec).macs


def test_a_codec_compiled_in_place_is_saved_and_codes(tmp_path: Path) -> None:
    codec: Any = built("bmshj2018-factorized")[0]
    expected = state_of(codec)
    again = load(save(in_place(codec), tmp_path / "a.safetensors"))
    again_state = {key: value for key, value in state_of(again).items() if key in expected}
    assert all(torch.equal(again_state[k], expected[k]) for k, _ in again.named_parameters())
