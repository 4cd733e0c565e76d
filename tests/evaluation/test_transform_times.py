"""Where time goes, by a clock that the codec's own modules advance; never how long anything
takes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built
from torch import nn

import nicprune.evaluation.stage_times as timing
from nicprune import attach, load_codec
from nicprune.codecs.float64_coding import Coder
from nicprune.common.errors import FileError, RecipeError
from nicprune.evaluation.stage_times import stage_times
from nicprune.evaluation.times import REST, Times, taken_under, times_table
from nicprune.evaluation.transform_times import Named, time_codecs
from nicprune.pruning.cost import measure
from nicprune.report.times import read_times, times_lines, write_times


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
def test_each_second_is_counted_once_and_under_its_transform(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, inner: bool
) -> None:
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


def test_by_layer_each_second_is_counted_once_too(clock: list[float]) -> None:
    codec: Any = built("cheng2020-anchor")[0]
    hidden = codec.h_a

    class Whole(nn.Module):
        """A transform without layers in it that anyone could see."""

        def forward(self, x: torch.Tensor) -> Any:
            return hidden(x)

    codec.h_a = Whole()
    advancing(codec.h_a, clock, 4.0)
    advancing(codec.g_a[0].conv1, clock, 1.0)
    advancing(codec.g_a[0], clock, 2.0)
    advancing(codec.h_s[1], clock, 5.0)
    advancing(
        codec.entropy_parameters[2], clock, 9.0
    )  # once for each of the 4 x 4 pixels of the latent
    codec.update()
    encode, decode = stage_times(codec, torch.rand(1, 3, 64, 64), layers=True)
    assert (
        encode["g_a.0"] == 3.0
        and encode["h_a"] == 4.0
        and encode["h_s.1"] == decode["h_s.1"] == 5.0
        and "g_a" not in encode
        and "g_a.0.conv1" not in encode
    )
    assert (
        encode["entropy_parameters.2"] == decode["entropy_parameters.2"] == 16 * 9.0
        and encode[REST] == decode[REST] == 0
    )


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
    assert (
        second.cost.encoder < 0.8 * first.cost.encoder
        and second.cost.decoder < 0.8 * first.cost.decoder
    )
    assert set(first.encode) == {"g_a", "h_a", "h_s", REST} and set(first.decode) == {
        "h_s",
        "g_s",
        REST,
    }


def test_the_table_sets_speed_beside_macs() -> None:
    cost = measure(load_codec("demo-hyperprior", 1))
    half = type(cost)(cost.macs // 2, cost.encoder // 2, cost.decoder // 4, cost.params)
    times = [
        Times("whole", cost, {"g_a": 3.0, REST: 1.0}, {"g_s": 3.5, REST: 0.5}, 4.0, 4.0, 5, False),
        Times("small", half, {"g_a": 1.5, REST: 1.0}, {"g_s": 0.5, REST: 0.5}, 2.5, 1.0, 5, False),
    ]
    encode, decode, note = times_table(times, taken_under(times, "photo.png")).split("\n\n")
    cells = [
        [c.strip() for c in block.splitlines()[-1].strip("|").split("|")]
        for block in (encode, decode)
    ]
    assert cells[0][2:] == ["2.00×", "1.500", "1.000", "2.500", "1.60×", "0.80"]
    assert cells[1][2:] == ["4.00×", "0.500", "0.500", "1.000", "4.00×", "1.00"]
    assert "photo.png, medians of 5 turns" in note and "quiet machine" not in note
    busy = taken_under([Times("whole", cost, {REST: 1.0}, {REST: 1.0}, 1.0, 1.0, 3, True)], "it")
    assert "run again on a quiet machine" in busy and "at most" not in busy
    unknown = taken_under(
        [Times("whole", cost, {REST: 1.0}, {REST: 1.0}, 1.0, 1.0, 3, False, False)], "it"
    )
    assert "not known here" in unknown and "at most" not in unknown


def test_a_report_of_times_is_read_as_it_was_written(tmp_path: Path) -> None:
    cost = measure(load_codec("demo-hyperprior", 1))
    small = type(cost)(cost.macs // 2, cost.encoder // 2, cost.decoder // 4, cost.params)
    times = [
        Times(
            "whole $", cost, {"g_a": 3.0, REST: 1.0}, {"g_s": 3.5, REST: 0.5}, 4.0, 4.0, 5, False
        ),
        Times(
            "small", small, {"g_a": 1.5, "mine": 0.25, REST: 1.0}, {"g_s": 0.5}, 2.75, 0.5, 5, False
        ),
    ]
    folder = write_times(
        times, tmp_path / "times", conditions="On a Tuesday.", command="nicprune time a b"
    )
    assert read_times(folder) == (times, "On a Tuesday.", "nicprune time a b")
    text = (folder / "times.md").read_text()
    assert text.endswith("On a Tuesday.\n\nMade by `nicprune time a b`.\n") and "| small" in text
    first, second = (
        [c.strip() for c in line.strip("|").split("|")]
        for line in times_lines(times).splitlines()[2:]
    )
    assert first == ["whole $", "", "3.00 + 1.00 s", "", "", "3.50 + 0.50 s", ""]
    assert second == ["small", "2.00×", "1.75 + 1.00 s", "1.45×", "4.00×", "0.50 + 0.00 s", "8.00×"]
    assert (folder / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content", [None, "[]", "{", '{"times": [{"name": "a"}]}', '{"times": [], "conditions": ""}']
)
def test_a_report_of_times_that_is_none_gives_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "times.json").write_text(content)
    with pytest.raises(FileError, match=r"^[^\n]*nicprune time --out[^\n]*$"):
        read_times(tmp_path)


def test_codecs_are_named_with_label_and_width(tmp_path: Path) -> None:
    file = tmp_path / "a=b@1.safetensors"
    file.write_text("")
    other = tmp_path / "c.safetensors"
    other.write_text("")
    assert Named.read("demo-hyperprior") == Named("demo-hyperprior", "demo-hyperprior")
    assert Named.read(str(file)) == Named("a=b@1", str(file)), "a file that is there is a file"
    assert Named.read(f"half={other}@2") == Named("half", str(other), 2, given=True)
    assert Named.read(f"{other}@0") == Named("c@0", str(other), 0)
    assert Named.read("x=my.module:factory@home") == Named(
        "x", "my.module:factory@home", given=True
    )


def test_small_encoders_count_under_their_method(clock: list[float]) -> None:
    ladder = attach(
        load_codec("demo-hyperprior", 1).eval(),
        "scalable_encoder",
        encoders=3,
        share=0.3,
        decay_steps=12,
    )
    for encoder in ladder.methods[0].encoders:  # type: ignore[union-attr]
        advancing(encoder, clock, 1.0)
    ladder.set_width(1)
    encode, _ = stage_times(ladder, torch.rand(1, 3, 64, 64))
    assert encode["scalable_encoder"] == 2.0 and encode[REST] == 0


def test_something_must_be_timed() -> None:
    with pytest.raises(RecipeError, match="at least one"):
        time_codecs({})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("slimmable", {"widths": [1.0, 0.5, 0.25], "round_to": 1}),
        ("bit_rate_modulator", {"qualities": [1, 2, 3]}),
        ("adaptation", {"form": "low_rank"}),
        ("channel_gating", {"alpha": 1.0, "gating_steps": 6, "round_to": 1}),
    ],
)
def test_each_point_is_timed_in_the_precision_that_it_is_coded_in(
    method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transforms in float32, at any width; one that was watched at a narrow width had weights
    in float64, and took twice as long as when encoding.
    """
    attached = attach(built("bmshj2018-hyperprior")[0], method, **settings).eval()
    codecs = {}
    for point in attached.operating_points():
        codecs[str(point)] = twin = copy.deepcopy(attached)
        twin.set_point(point)
    seen: dict[tuple[Any, ...], set[torch.dtype]] = {}

    def once(coder: Any, image: torch.Tensor, **rate: Any) -> Any:
        if not isinstance(coder, Coder):  # what a gated codec costs on this image
            return stage_times(coder, image, **rate)
        rate.pop("layers")
        found: set[torch.dtype] = set()
        codec = coder.model.codec
        for layer in (codec.g_a[0], codec.g_a[6], codec.g_s[0], codec.g_s[6]):
            layer.register_forward_hook(lambda m, args, out: found.add(out.dtype))
        sent = coder.compress(image, **rate)
        coder.decompress(sent["strings"], sent["shape"], image)
        seen[tuple(rate.values())] = found
        return {}, {}

    monkeypatch.setattr("nicprune.evaluation.transform_times.stage_times", once)
    time_codecs(codecs, repeats=1, limit=0)
    rates = {tuple(point.keywords().values()) for point in attached.operating_points()}
    if method == "bit_rate_modulator":  # a point that is set alone is the highest rate
        rates = {(2.0,)}
    assert seen.keys() == rates
    assert all(found == {torch.float32} for found in seen.values()), seen
