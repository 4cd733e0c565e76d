"""Ratios on this machine: overhead of attaching, time of surgery, speed-up against FLOP reduction.

The two sides of each ratio are timed alternately in one process, in the same memory format. Samples
during which other programs kept the processor busy are discarded; the median of the others counts.
On a machine that is never quiet the least disturbed samples are used, and every value made from
them says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from nicprune.bench.coding import bench_coding
from nicprune.bench.decoding import bench_decoding
from nicprune.bench.optimizer import bench_optimizer
from nicprune.channels.find_groups import find_groups
from nicprune.codecs.anatomy import forward_for_analysis, rate_distortion_loss
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.zoo import ZOO, qualities
from nicprune.common.errors import RecipeError, closest
from nicprune.common.machine import BUSY, machine_line, tune_allocator
from nicprune.common.wording import counted
from nicprune.evaluation.timer import Measure, QuietTimer, seconds_of
from nicprune.methods.attaching import attach
from nicprune.methods.pruners.magnitude import group_magnitude
from nicprune.pruning.budget import Budget, allocate_widths
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import prune
from nicprune.pruning.verification import verify_same
from nicprune.storage.named import load_codec
from nicprune.training.precision import autocast_dtype, entropy_models_in_float32

SIZE = (512, 768)
SIZE_TEXT = f"{SIZE[1]}x{SIZE[0]}"
BATCH = "batch 8 of 128x128"


def _training_step(
    model: Any, codec: nn.Module, x: Tensor, dtype: torch.dtype | None
) -> Callable[[], None]:
    loss = rate_distortion_loss(0.0067, "mse")
    skipped = (
        {id(p) for p in model.manually_updated()} if hasattr(model, "manually_updated") else set()
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in skipped], lr=1e-5)
    after: Callable[[], None] = getattr(model, "after_step", lambda: None)

    def step() -> None:
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(x)
        optimizer.zero_grad(set_to_none=True)
        loss({**out, "x_hat": out["x_hat"].float()}, x)["loss"].backward()
        optimizer.step()
        after()

    return step


def bench_attach() -> Iterator[Measure]:
    """Measure a training step with mask decay attached, relative to the bare codec's."""
    x = torch.rand(8, 3, 128, 128).to(memory_format=torch.channels_last)
    dtype = autocast_dtype("auto", x.device)
    bare, inner = (_ready("bmshj2018-hyperprior", 3).train() for _ in range(2))
    masked = attach(inner, "mask_decay", budget={"macs": 0.5}, decay_steps=1_000_000)
    timer = QuietTimer(7, limit=30)
    with entropy_models_in_float32(bare), entropy_models_in_float32(inner):
        before, after = timer.medians(
            [_training_step(bare, bare, x, dtype), _training_step(masked, inner, x, dtype)]
        )
    yield timer.measure(
        "training step, hyperprior q3, mask decay attached / bare",
        after / before,
        "x",
        goal=1.05,
        size=BATCH,
        detail=_precision_text(dtype),
    )


def bench_precision() -> Iterator[Measure]:
    """Measure a training step in float32, relative to bfloat16 autocast."""
    x = torch.rand(8, 3, 128, 128).to(memory_format=torch.channels_last)
    codecs = [_ready("bmshj2018-hyperprior", 3).train() for _ in range(2)]
    timer = QuietTimer(5, limit=20)
    with entropy_models_in_float32(codecs[0]), entropy_models_in_float32(codecs[1]):
        steps = [
            _training_step(c, c, x, d) for c, d in zip(codecs, (None, torch.bfloat16), strict=True)
        ]
        full, short = timer.medians(steps)
    gains = (
        ""
        if autocast_dtype("auto", x.device)
        else "; bfloat16 is not native here, training takes float32"
    )
    detail = f"{full * 1e3:.0f} to {short * 1e3:.0f} ms, channels_last{gains}"
    yield timer.measure(
        "training step, hyperprior q3, float32 / bfloat16",
        full / short,
        "x",
        size=BATCH,
        detail=detail,
    )


def bench_surgery() -> Iterator[Measure]:
    """Measure finding the groups and removing half of the MACs, without verification.

    The detail gives the time relative to a forward pass, and that of verification.
    """
    for name in ZOO:
        quality = qualities(name)[-1]
        codec = _ready(name, quality).eval()
        groups = find_groups(codec)
        cost = CostModel(codec, groups)
        keep = allocate_widths(
            cost,
            groups.prunable(),
            {g.name: group_magnitude(layers_of(codec), g) for g in groups.prunable()},
            Budget(macs=0.5),
        )
        small = prune(codec, keep, groups, verify=False)

        def surgery(codec: nn.Module = codec, keep: dict[str, list[int]] = keep) -> None:
            prune(codec, keep, find_groups(codec), verify=False)

        image = torch.rand(1, 3, *SIZE).to(memory_format=torch.channels_last)

        def forward(codec: nn.Module = codec, image: Tensor = image) -> None:
            with torch.no_grad():
                forward_for_analysis(codec, image)

        timer = QuietTimer(3, limit=4, least=2)
        seconds, once = timer.medians([surgery, forward])
        checking = seconds_of(partial(verify_same, codec, small, groups.check(keep), groups), 1)
        goal = 3.0 if name == "cheng2020-attn" else 1.0
        detail = (
            f"{seconds / once:.2f}x a forward pass at {SIZE_TEXT} ({once:.2f} s); verification"
            f" {checking:.2f} s more"
        )
        yield timer.measure(
            f"groups + surgery, {name} q{quality}",
            seconds,
            "s",
            goal=goal,
            size="any",
            detail=detail,
        )


def bench_budget() -> Iterator[Measure]:
    """Measure the allocation of widths to a budget."""
    for name, quality in (
        ("bmshj2018-hyperprior", 8),
        ("cheng2020-attn", 6),
        ("elic2022-official", None),
    ):
        codec = load_codec(name, quality, weights="none")
        groups = find_groups(codec)
        cost = CostModel(codec, groups)
        scores = {g.name: group_magnitude(layers_of(codec), g) for g in groups.prunable()}
        for round_to in (16, 1):
            timer = QuietTimer(3, limit=3)
            solving = partial(
                allocate_widths, cost, groups.prunable(), scores, Budget(macs=0.5), round_to
            )
            (seconds,) = timer.medians([solving])
            yield timer.measure(
                f"budget solved, {name}, round_to {round_to}", seconds, "s", goal=1.0, size="any"
            )


def bench_speedup() -> Iterator[Measure]:
    """Measure the wall-clock speed-up of g_a + g_s, relative to their FLOP reduction."""
    for name, quality in (("bmshj2018-hyperprior", 1), ("demo-hyperprior", 3)):
        for share in (0.5, 0.25):
            codec = _ready(name, quality)
            small = (
                attach(codec, "magnitude", budget={"macs": share})
                .harden(verify=False)
                .to(memory_format=torch.channels_last)
                .eval()
            )
            wide, narrow = (_synthesis_and_analysis(c) for c in (codec, small))
            timer = QuietTimer(7, limit=15)
            before, after = timer.medians([wide, narrow])
            macs = [
                sum(CostModel(c, find_groups(c)).by_transform()[t][0] for t in ("g_a", "g_s"))
                for c in (codec, small)
            ]
            fewer = macs[0] / macs[1]
            detail = (
                f"{before * 1e3:.0f} to {after * 1e3:.0f} ms: {before / after:.2f}x for"
                f" {fewer:.2f}x fewer MACs, channels_last"
            )
            label = f"speed-up / FLOP reduction, g_a + g_s, {name} at {share:g}"
            yield timer.measure(
                label,
                before / after / fewer,
                "x",
                goal=0.9,
                at_least=True,
                size=SIZE_TEXT,
                detail=detail,
            )


def bench_gating() -> Iterator[Measure]:
    """Measure the time that gates save by skipping closed channels, relative to the MACs that they
    save. Pooling and gathering are included.
    """
    for name, quality in (("bmshj2018-hyperprior", 1), ("demo-hyperprior", 3)):
        for share in (0.5, 0.25):
            bare = _ready(name, quality).eval()
            gated = attach(_ready(name, quality).eval(), "channel_gating", alpha=1.0)
            method: Any = gated.methods[0]
            generator = torch.Generator().manual_seed(0)
            for gate in method.each().values():
                closed = torch.randperm(gate.channels, generator=generator)[
                    round(share * gate.channels) :
                ]
                gate.threshold.data[closed] = math.inf
            runs = [_synthesis_and_analysis(c) for c in (bare, gated.codec)]
            timer = QuietTimer(7, limit=15)
            before, after = timer.medians(runs)
            with torch.no_grad():  # the rates of a whole pass, hyperprior included
                gated(torch.rand(1, 3, *SIZE))
            macs, fewer = CostModel(bare, find_groups(bare)).by_transform(), method.image_cost()[1]
            whole, left = (
                sum(table[t] for t in ("g_a", "g_s"))
                for table in ({t: m for t, (m, _) in macs.items()}, fewer)
            )
            saved = (1 - after / before) / (1 - left / whole)
            detail = (
                f"{before * 1e3:.0f} to {after * 1e3:.0f} ms: {1 - after / before:.0%} of the time"
                f" for {1 - left / whole:.0%} of the MACs, channels_last"
            )
            label = (
                f"time saved / MACs saved by gates, g_a + g_s, {name}, {share:.0%} of channels open"
            )
            yield timer.measure(
                label, saved, "x", goal=0.8, at_least=True, size=SIZE_TEXT, detail=detail
            )


def bench_slimmable() -> Iterator[Measure]:
    """Measure slimmable codecs: the speed-up of each width relative to its FLOP reduction, a step
    over all widths, and switching the width.
    """
    name, quality, widths = "bmshj2018-hyperprior", 1, (1.0, 0.75, 0.5, 0.25)
    bare = _ready(name, quality).eval()
    codec = attach(_ready(name, quality).eval(), "slimmable", widths=widths)
    image = torch.rand(1, 3, *SIZE).to(memory_format=torch.channels_last)

    def at(width: int) -> Callable[[], None]:
        def run() -> None:
            codec.set_width(width)
            with torch.no_grad(), codec.active():
                codec.codec.g_s(codec.codec.g_a(image).round())  # type: ignore[operator]

        return run

    timer = QuietTimer(5, limit=10)
    whole, *times = timer.medians(
        [_synthesis_and_analysis(bare), *(at(width) for width in range(len(widths)))]
    )
    for width, seconds in enumerate(times):
        codec.set_width(width)
        table: Any = codec.by_transform()
        share = sum(table[t][0] for t in ("g_a", "g_s")) / sum(
            CostModel(bare, find_groups(bare)).by_transform()[t][0] for t in ("g_a", "g_s")
        )
        detail = (
            f"{whole * 1e3:.0f} ms bare, {seconds * 1e3:.0f} ms at this width:"
            f" {whole / seconds:.2f}x for {1 / share:.2f}x fewer MACs, channels_last"
        )
        label = f"speed-up / FLOP reduction, g_a + g_s, {name}, width {widths[width]:g}"
        yield timer.measure(
            label,
            whole / seconds * share,
            "x",
            goal=0.8,
            at_least=True,
            size=SIZE_TEXT,
            detail=detail,
        )

    batch = torch.rand(2, 3, 128, 128).to(memory_format=torch.channels_last)

    def step(model: Any, passes: Sequence[dict[str, int]]) -> Callable[[], None]:
        def run() -> None:
            model.train()
            for at_width in passes:
                model(batch, **at_width)["x_hat"].square().mean().backward()

        return run

    each = [{"width": width} for width in range(len(widths))]
    timer = QuietTimer(5, limit=10)
    once, all_ = timer.medians([step(bare, [{}]), step(codec, each)])
    expected = sum(width**2 for width in widths)
    detail = (
        f"{once * 1e3:.0f} ms for the codec alone, {all_ * 1e3:.0f} ms for {len(widths)} widths;"
        f" sum of (w/W)^2 is {expected:.2f}"
    )
    yield timer.measure(
        f"step over all widths / (one step * sum of (w/W)^2), {name}",
        all_ / once / expected,
        "x",
        goal=1.5,
        size="2x128x128",
        detail=detail,
    )
    timer = QuietTimer(5, limit=5)
    (switched,) = timer.medians([lambda: codec.set_width(1)])
    yield timer.measure("switching the width", switched, "s", goal=1e-4, size="any")


def _precision_text(dtype: torch.dtype | None) -> str:
    return f"{'float32' if dtype is None else 'bfloat16'}, channels_last"


def _ready(name: str, quality: int) -> Any:
    weights = "official" if name.startswith("demo") else "none"
    return load_codec(name, quality, weights=weights).to(memory_format=torch.channels_last)


def _synthesis_and_analysis(codec: Any) -> Callable[[], None]:
    image = torch.rand(1, 3, *SIZE).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.no_grad():
            codec.g_s(codec.g_a(image).round())

    return run


PARTS: dict[str, Callable[[], Iterator[Measure]]] = {
    "attach": bench_attach,
    "surgery": bench_surgery,
    "budget": bench_budget,
    "speedup": bench_speedup,
    "precision": bench_precision,
    "gating": bench_gating,
    "slimmable": bench_slimmable,
    "coding": bench_coding,
    "optimizer": bench_optimizer,
    "decoding": bench_decoding,
}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_bench(
    what: Sequence[str] | None = None, *, threads: int | None = None, progress: bool = True
) -> list[Measure]:
    """Measure the named parts, or all of `PARTS`.

    Raises:
        RecipeError: a part is unknown.
    """
    for name in what or ():
        if name not in PARTS:
            raise RecipeError(f"bench has no part {name!r}; {closest(name, PARTS)}")
    tune_allocator()
    results = []
    with _threads(threads):
        for name in what or PARTS:
            for result in PARTS[name]():
                results.append(result)
                if progress:
                    print(f"{result.name}: {_value(result)}", file=sys.stderr, flush=True)
    return results


def format_bench(results: Sequence[Measure]) -> str:
    """Return the results as a table, with the machine and the sampling below it."""
    rows = []
    for r in results:
        goal = (
            ""
            if r.goal is None
            else (
                f"{'>=' if r.at_least else '<='} {r.goal:g} {r.unit}:"
                f" {'met' if r.met else 'not met'}"
            )
        )
        samples = f"{r.kept} of {r.kept + r.rejected}{', busy' if r.busy else ''}"
        rows.append((r.name, _value(r), goal, r.size, samples, r.detail))
    table = tabulate(
        rows,
        headers=("figure", "value", "goal", "input", "samples", "detail"),
        tablefmt="simple",
        disable_numparse=True,
    )
    on = "; ".join(sorted({f"{r.device}, {counted(r.threads, 'thread')}" for r in results}))
    taken = (
        f"during which other programs used at most {BUSY:.0%} of the processor"
        if all(r.known for r in results)
        else "; the load of other programs is not known here"
    )
    lines = [
        table,
        f"{on}, torch {torch.__version__}, {machine_line()}",
        f"medians of samples {taken}".replace(" ;", ";"),
    ]
    if any(r.busy for r in results):
        lines.append(
            "busy: other programs kept the processor busy throughout; the least disturbed samples"
            " were used; run again on a quiet machine"
        )
    return "\n".join(lines)


def _value(result: Measure) -> str:
    return f"{result.value:{'.2f' if result.unit == 'x' else '.3g'}} {result.unit}"
