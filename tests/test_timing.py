"""Where time goes, by a clock that the codec's own modules advance; never how long anything takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nicprune.timing as timing
from nicprune import attach, load_codec
from nicprune.cost import measure
from nicprune.errors import RecipeError
from nicprune.timing import REST, Times, stage_times, time_codecs, times_table


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(timing, "_now", lambda: now[0])
    return now


def advancing(module: nn.Module, clock: list[float], seconds: float) -> None:
    """Make a module take this long by the clock."""

    def hook(*_: Any) -> None:
        clock[0] += seconds

    module.register_forward_hook(hook)


@pytest.mark.parametrize("inner", [False, True])
def test_each_second_is_counted_once_and_under_its_transform(clock: list[float], monkeypatch: pytest.MonkeyPatch, inner: bool) -> None:
    codec: Any = load_codec("demo-hyperprior", 1)
    for transform, seconds in (("g_a", 3.0), ("h_a", 0.5), ("h_s", 0.25), ("g_s", 2.0)):
        module = getattr(codec, transform)
        advancing(module[0] if inner else module, clock, seconds)
    bottleneck = codec.entropy_bottleneck
    compress = bottleneck.compress

    def slow(*args: Any) -> Any:
        clock[0] += 7
        return compress(*args)

    monkeypatch.setattr(bottleneck, "compress", slow)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in codec.modules())
    encode, decode = stage_times(codec, torch.rand(1, 3, 64, 64))
    assert encode == {"g_a": 3.0, "h_a": 0.5, "h_s": 0.25, REST: 7.0}
    assert decode == {"h_s": 0.25, "g_s": 2.0, REST: 0.0}
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in codec.modules()) == hooks


def test_gates_count_with_the_transform_they_are_in(clock: list[float]) -> None:
    gated = attach(load_codec("demo-hyperprior", 1).eval(), "channel_gating", alpha=0.9)
    for _, gate in gated.methods[0].each().items():  # type: ignore[operator]
        advancing(gate, clock, 1.0)
    encode, decode = stage_times(gated, torch.rand(1, 3, 64, 64))
    gates = [name.split(".")[0] for name in gated.methods[0].each()]  # type: ignore[operator]
    assert encode["g_a"] == gates.count("g_a") > 0 and decode["g_s"] == gates.count("g_s") > 0
    assert encode[REST] == decode[REST] == 0


def test_what_hooks_do_before_a_transform_counts_with_it(clock: list[float]) -> None:
    codec: Any = load_codec("demo-hyperprior", 1)

    def before(*_: Any) -> None:
        clock[0] += 4

    codec.g_a.register_forward_pre_hook(before)
    encode, _ = stage_times(codec, torch.rand(1, 3, 64, 64))
    assert encode["g_a"] == 4 and encode[REST] == 0


def test_costs_are_those_of_the_codec_and_with_gates_of_the_image() -> None:
    codec = load_codec("demo-hyperprior", 1)
    gated = attach(load_codec("demo-hyperprior", 1).eval(), "channel_gating", alpha=0.5)
    for gate in gated.methods[0].each().values():  # type: ignore[operator]
        gate.threshold.data[::2] = float("inf")
    first, second = time_codecs({"original": codec, "gated": gated}, repeats=1, limit=0)
    assert first.cost == measure(codec) and first.kept == second.kept == 1
    assert second.cost.encoder < 0.8 * first.cost.encoder and second.cost.decoder < 0.8 * first.cost.decoder
    assert set(first.encode) == {"g_a", "h_a", "h_s", REST} and set(first.decode) == {"h_s", "g_s", REST}


def test_the_table_sets_speed_beside_macs() -> None:
    cost = measure(load_codec("demo-hyperprior", 1))
    half = type(cost)(cost.macs // 2, cost.encoder // 2, cost.decoder // 4, cost.params)
    times = [
        Times("whole", cost, {"g_a": 3.0, REST: 1.0}, {"g_s": 3.5, REST: 0.5}, 4.0, 4.0, 5, False),
        Times("small", half, {"g_a": 1.5, REST: 1.0}, {"g_s": 0.5, REST: 0.5}, 2.5, 1.0, 5, False),
    ]
    encode, decode, note = times_table(times).split("\n\n")
    cells = [[c.strip() for c in block.splitlines()[-1].strip("|").split("|")] for block in (encode, decode)]
    assert cells[0][2:] == ["2.00×", "1.500", "1.000", "2.500", "1.60×", "0.80"]
    assert cells[1][2:] == ["4.00×", "0.500", "0.500", "1.000", "4.00×", "1.00"]
    assert "medians of 5 turns" in note and "quiet machine" not in note
    busy = times_table([Times("whole", cost, {REST: 1.0}, {REST: 1.0}, 1.0, 1.0, 3, True)])
    assert "run again on a quiet machine" in busy and "at most" not in busy
    unknown = times_table([Times("whole", cost, {REST: 1.0}, {REST: 1.0}, 1.0, 1.0, 3, False, False)])
    assert "not known here" in unknown and "at most" not in unknown


def test_small_encoders_count_under_their_method(clock: list[float]) -> None:
    ladder = attach(load_codec("demo-hyperprior", 1).eval(), "scalable_encoder", encoders=3, share=0.3, decay_steps=12)
    for encoder in ladder.methods[0].encoders:  # type: ignore[union-attr]
        advancing(encoder, clock, 1.0)
    ladder.set_width(1)
    encode, _ = stage_times(ladder, torch.rand(1, 3, 64, 64))
    assert encode["scalable_encoder"] == 2.0 and encode[REST] == 0


def test_something_must_be_timed() -> None:
    with pytest.raises(RecipeError, match="at least one"):
        time_codecs({})
