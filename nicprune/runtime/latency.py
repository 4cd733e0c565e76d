"""Measure the times of a codec by widths, for budgets of `encode_s` and `decode_s`.

    table = nip.measure_latency(codec, "openvino")
    small = nip.attach(codec, "magnitude", budget={"decode_s": 0.5}, latency=table).harden()

Each layer is timed alone at a grid of widths, in the fastest of its forms. Copies of the codec with
all widths at some fractions are accelerated and timed as a whole: this turns times of layers into
times of g_a, h_s and so on inside `encode` and `decode`, and gives the time of what is outside of
them. Tables are kept in the user's cache folder, so that each is measured once.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.codecs.layer_kinds.kind import LayerKind, channel_kind, kind_of
from nicprune.codecs.memory_format import fast_format, format_of, in_format, to_channels_last
from nicprune.codecs.provenance import provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.zoo import rebuild
from nicprune.common.config import parse
from nicprune.common.errors import CodecError, FileError, NicpruneError
from nicprune.common.machine import machine_line, versions
from nicprune.evaluation.padding import pad
from nicprune.evaluation.stage_times import stage_times
from nicprune.evaluation.timer import QuietTimer
from nicprune.pruning.budget import ROUND_TO, TIMES
from nicprune.pruning.latency_table import LatencyTable, LayerTimes, PartTimes, Runtime, Side
from nicprune.pruning.surgery import analyse, prune
from nicprune.runtime.accelerate import accelerate
from nicprune.runtime.backends import BACKENDS, Backend, Function
from nicprune.runtime.layer_forms import (
    Cache,
    cache_folder,
    fix,
    forms_of,
    key_of,
    seconds_of_forms,
)

FRACTIONS = (1.0, 0.75, 0.5, 0.25)
"""Widths at which layers alone, and the whole codec, are timed."""

TURNS = 5
"""The whole codecs are timed so often, alternately, while no other program is busy."""

LIMIT = 15.0
"""Seconds after which turns count in which others were busy."""

LAYER_TURNS = 3
"""A layer at one width is timed so often: its times give the shape, whole parts the scale."""


def measure_latency(
    codec: nn.Module,
    backend: str = "torch",
    precision: str = "float32",
    *,
    size: tuple[int, int] = (512, 768),
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Return the times of a codec by widths on this machine: from the cache, or measured, which
    takes minutes.

    Counted is what `encode` and `decode` compute, from the padded image to strings and back, with
    entropy parameters in float64.

    Args:
        codec: a plain `CompressionModel`.
        backend, precision: as for `accelerate`.
        size: height and width of the image, in pixels.
        threads: number of threads; torch's own if not given.
        say: called with a line before something is measured.

    Raises:
        CodecError: not a plain codec, it cannot code, or cannot be accelerated.
        RecipeError: there is no such backend or precision.
    """
    check_codec(codec)
    check_not_replaced(codec)
    if has_hooks(codec):
        raise CodecError("a codec with methods on it is not measured: measure it before attach")
    given = {"backend": backend, "precision": precision, "size": size, "threads": threads}
    runtime = parse(Runtime, given, "measure_latency(...)")
    with _threads(threads):
        engine = BACKENDS[backend]()
        engine.check(precision)
        plain: Any = copy_codec(codec).cpu().float().eval()
        key = key_of(engine, precision, versions(), repr(plain), _weights(plain), size, FRACTIONS)
        file = cache_folder() / "latency" / f"{key}.json"
        try:
            return LatencyTable.read(file)
        except FileError:
            say(f"measuring times of {type(codec).__name__} by {backend}, kept in {file}")
        table = _measured(plain, engine, runtime)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            table.write(file)
        except (OSError, FileError):
            pass
        return table


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weights(codec: nn.Module) -> str:
    """Return a digest of a codec's weights: entropy coding takes as long as there are bits."""
    found = hashlib.sha256()
    for name, value in codec.state_dict().items():
        found.update(name.encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest() + repr(provenance(codec).original)


@torch.no_grad()
def _measured(codec: Any, engine: Backend, runtime: Runtime) -> LatencyTable:
    refresh_tables(codec)
    groups = analyse(codec)
    image = _image(image_shape(codec)[0], *runtime.size)
    narrower = _narrower(codec, groups)
    coders = [_coder(one, engine, runtime.precision, image) for one in narrower]
    parts = _parts(coders[0], image)
    original = _original(codec)
    timed = coders + [_coder(one, engine, runtime.precision, image) for one in original]
    spent = _spent(timed, image, list(parts))
    accelerated = {transform.name for transform in coders[0].model.acceleration.transforms}
    layers, cache = _Layers(groups, runtime.precision), Cache()
    tables: dict[str, LayerTimes] = {}
    found: dict[str, PartTimes] = {}
    inputs = _inputs(codec, image, parts)
    for part, sides in parts.items():
        one: Backend = engine
        if part not in accelerated:
            # What both sides compute runs in float64, the rest as it is.
            one = _Eager(coders[0].in_float64 and len(sides) == len(TIMES))
        own = [name for name in inputs if name == part or name.startswith(f"{part}.")]
        if not any(layers.shrinks(name) for name in own):
            continue  # it takes as long whatever shrinks
        tables |= {
            name: layers.times(name, codec.get_submodule(name), inputs[name], one, cache)
            for name in own
        }
        found[part] = PartTimes(
            sides=sides,
            widths=[{n: counted_widths(model.get_submodule(n)) for n in own} for model in narrower],
            seconds=[_seconds(turns, part, sides) for turns in spent[: len(coders)]],
        )
    cache.write()
    rest = {
        side: min(sum(turn[side].values()) - sum(turn[side].get(p, 0.0) for p in found)
                  for turn in spent[0])
        for side in SIDES
    }  # fmt: skip
    return LatencyTable(
        runtime=runtime.model_copy(update={"threads": torch.get_num_threads()}),
        machine=machine_line(),
        layers=tables,
        parts=found,
        rest=rest,
        original={
            side: rest[side]
            + sum(_seconds(spent[-1], n, p.sides) for n, p in found.items() if side in p.sides)
            for side in SIDES
        }
        if original
        else None,
    )


SIDES: tuple[Side, ...] = ("encode_s", "decode_s")

Turn = dict[Side, dict[str, float]]
"""Seconds of one encoding and decoding, by part."""


def _image(channels: int, height: int, width: int) -> Tensor:
    """Return an image that costs about as many bits as a photograph: smooth, with some detail."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(channels, height, width)
    for cell, strength in ((64, 0.6), (16, 0.25), (4, 0.15)):
        noise = torch.rand(1, channels, height // cell + 2, width // cell + 2, generator=generator)
        x += strength * F.interpolate(noise, (height, width), mode="bicubic")[0]
    return x.clamp(0, 1).mul(255).round().byte()


def _floats(codec: nn.Module, image: Tensor) -> Tensor:
    return pad(image.unsqueeze(0).float().div(255), size_multiple(codec))[0]


def _coder(codec: nn.Module, engine: Backend, precision: str, image: Tensor) -> Coder:
    """Return what codes images by a backend, as `encode` and `decode` do."""
    fast = accelerate(codec, engine.name, precision, image=image, calibration=[image])
    return Coder(in_format(copy_codec(fast), fast_format(fast)))


def fewer(width: int, step: int) -> list[int]:
    """Return the widths at which something this wide is measured, increasing: multiples of `step`
    but for the last, which is its own.
    """
    step = step if width > step else 1
    return sorted({min(width, math.ceil(f * width / step) * step) for f in FRACTIONS})


def _narrower(codec: nn.Module, groups: Groups) -> list[nn.Module]:
    """Return the codec and copies with every width that may shrink at some fractions, the widest
    first. The latents stay.
    """
    found, seen = [], set()
    for number in range(1, len(FRACTIONS) + 1):
        widths = {g.name: fewer(g.width, g.step(ROUND_TO))[-number:][0] for g in groups.prunable()}
        if tuple(widths.values()) not in seen:
            seen.add(tuple(widths.values()))
            keep = {name: list(range(width)) for name, width in widths.items()}
            found.append(prune(codec, keep, groups, verify=False) if number > 1 else codec)
    return found


def _original(codec: nn.Module) -> list[nn.Module]:
    """Return the codec that this one was pruned from, with other weights, if it was pruned."""
    record = provenance(codec)
    if not record.original:
        return []
    try:
        return [rebuild(record.build).eval()]
    except NicpruneError as error:
        raise CodecError(
            "this codec has been pruned already, and the one that it was pruned from cannot be"
            f" built to be timed: {error}"
        ) from None


def _has_channels(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.has_channels


def _parts(coder: Coder, image: Tensor) -> dict[str, list[Side]]:
    """Return the outermost modules that run at most once on each side, and their sides."""
    sides: dict[Side, list[str]] = {side: [] for side in SIDES}
    now = sides["encode_s"]
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: now.append(name))
        for name, module in coder.model.named_modules()
    ]
    x = _floats(coder.model, image)
    try:
        sent = coder.compress(x)
        now = sides["decode_s"]
        coder.decompress(sent["strings"], sent["shape"], x)
    finally:
        for handle in handles:
            handle.remove()
    without = {id(part) for one in entropy_models(coder.model) for part in one.modules()}
    found: dict[str, list[Side]] = {}

    def visit(name: str, module: nn.Module) -> None:
        calls = {side: names.count(name) for side, names in sides.items()}
        if id(module) in without:
            return
        if max(calls.values()) == 1 and any(map(_has_channels, module.modules())):
            found[name] = [side for side in SIDES if calls[side]]
            return
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", coder.model)
    return found


def _inputs(codec: nn.Module, image: Tensor, parts: Iterable[str]) -> dict[str, Tensor]:
    """Return the input of each layer with channels, inside a part, that runs at most once on each
    side, on one tensor.
    """
    names = {
        name
        for name, module in codec.named_modules()
        if _has_channels(module) and any(name == p or name.startswith(f"{p}.") for p in parts)
    }
    found: dict[str, list[list[Any]]] = {name: [[], []] for name in names}
    side = 0
    handles = [
        codec.get_submodule(name).register_forward_pre_hook(
            lambda module, args, calls=calls: calls[side].append(args)
        )
        for name, calls in found.items()
    ]
    x = _floats(codec, image)
    try:
        with fast_indexes():
            sent = compress(codec, x)
            side = 1
            decompress(codec, sent["strings"], sent["shape"], x)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: args[0]
        for name, calls in found.items()
        if max(map(len, calls)) == 1
        and len(args := (calls[0] or calls[1])[0]) == 1
        and isinstance(args[0], Tensor)
    }


def _spent(coders: Sequence[Coder], image: Tensor, parts: Sequence[str]) -> list[list[Turn]]:
    """Return the seconds of each coder, by turn; turns in which other programs were busy are left
    out where there are enough others.
    """
    x = _floats(coders[0].model, image)
    given = [x.contiguous(memory_format=format_of(coder.model)) for coder in coders]

    def turn() -> list[Turn]:
        found: list[Turn] = []
        for coder, own in zip(coders, given, strict=True):
            timed = {coder.model.get_submodule(name): name for name in parts}
            encode, decode = stage_times(coder, own, parts=timed)
            found.append({"encode_s": encode, "decode_s": decode})
        return found

    turn()  # warms up
    turns = QuietTimer(TURNS, LIMIT).quiet(turn)
    return [[one[number] for one in turns] for number in range(len(coders))]


@torch.no_grad()
def seconds_of_parts(codecs: Sequence[nn.Module], table: LatencyTable) -> list[dict[str, float]]:
    """Return the seconds of a table's parts in each of some codecs of one architecture, timed
    alternately and run as the table says.
    """
    runtime = table.runtime
    with _threads(runtime.threads):
        engine = BACKENDS[runtime.backend]()
        for codec in codecs:
            refresh_tables(codec)
        image = _image(image_shape(codecs[0])[0], *runtime.size)
        coders = [_coder(one, engine, runtime.precision, image) for one in codecs]
        spent = _spent(coders, image, list(table.parts))
    return [
        {name: _seconds(turns, name, part.sides) for name, part in table.parts.items()}
        for turns in spent
    ]


def _seconds(turns: Sequence[Turn], part: str, sides: Sequence[Side]) -> float:
    """Return the seconds of a part, the mean of both sides; of each the fastest turn."""
    return statistics.fmean(min(turn[side][part] for turn in turns) for side in sides)


class _Layers:
    """Times of single layers at a grid of widths."""

    def __init__(self, groups: Groups, precision: str):
        self._precision = "float32" if precision == "int8" else precision
        self._open = {
            (member.module, axis)
            for group in groups.prunable(latents=True)
            for member in group.members
            for axis in (("out", "in") if member.axis == "both" else (member.axis,))
        }

    def shrinks(self, name: str) -> bool:
        """Return whether a width of a layer can shrink."""
        return any((name, axis) in self._open for axis in ("out", "in"))

    @torch.no_grad()
    def times(
        self, name: str, layer: nn.Module, x: Tensor, engine: Backend, cache: Cache
    ) -> LayerTimes:
        """Return the seconds of a layer that runs on x."""
        kind, (outputs, inputs) = channel_kind(layer), counted_widths(layer)

        def seconds(out: int, inn: int) -> float:
            less, given = _narrowed(layer, kind, x, out, inn)
            return self._alone(less, given, engine, cache)

        if kind.flow == "dense":
            axes = [
                fewer(width, ROUND_TO) if (name, axis) in self._open else [width]
                for axis, width in (("out", outputs), ("in", inputs))
            ]
            grid = [[seconds(out, inn) for inn in axes[1]] for out in axes[0]]
            return LayerTimes(outputs=axes[0], inputs=axes[1], seconds=grid)
        if kind.flow == "coupled" and outputs == inputs == kind.widths(layer)[1]:
            widths = fewer(outputs, ROUND_TO) if (name, "out") in self._open else [outputs]
            each = [[seconds(width, width)] for width in widths]
            return LayerTimes(outputs=widths, inputs=[inputs], seconds=each)
        # Groups and heads: in proportion to multiply-adds.
        whole = self._alone(layer, x, engine, cache)
        return LayerTimes(outputs=[0, outputs], inputs=[0, inputs], seconds=[[0, 0], [0, whole]])

    def _alone(self, layer: nn.Module, x: Tensor, engine: Backend, cache: Cache) -> float:
        if x.dim() != 4 and not isinstance(engine, _Eager):
            engine = _Eager(False)
        layer, x = fix(layer.eval()), x.contiguous()
        if isinstance(engine, _Eager):
            layer, x = layer.to(engine.dtype), x.to(engine.dtype)
        found = seconds_of_forms(
            forms_of(layer, engine), x, engine, self._precision, cache, LAYER_TURNS
        )
        return min(found.values())


def counted_widths(layer: nn.Module) -> tuple[int, int]:
    """Return the widths of a layer as cost models count them."""
    kind = channel_kind(layer)
    outputs, inputs = kind.widths(layer)
    return outputs, inputs // kind.inputs_at_once(layer)


def _narrowed(
    layer: nn.Module, kind: LayerKind, x: Tensor, outputs: int, inputs: int
) -> tuple[nn.Module, Tensor]:
    """Return a copy of a layer with its first channels alone, and the input for it."""
    less, (out, inn) = copy.deepcopy(layer), kind.widths(layer)
    if kind.flow == "coupled":
        kind.remove(less, "both", range(outputs, out))
        return less, x.narrow(kind.channel_dim(layer, x), 0, outputs).contiguous()
    if outputs < out:
        kind.remove(less, "out", range(outputs, out))
    if inputs < inn:
        kind.remove(less, "in", range(inputs, inn))
    return less, x.narrow(kind.channel_dim(layer, x), 0, inputs).contiguous()


class _Eager(Backend):
    """PyTorch as it is: what no backend runs."""

    precisions = ("float32", "bf16", "int8")
    forms = ()

    def __init__(self, float64: bool):
        self.dtype = torch.float64 if float64 else torch.float32
        self.name = f"eager {self.dtype}"

    def compile(
        self, transform: nn.Module, example: Tensor, precision: str, calibration: Sequence[Tensor]
    ) -> Function:
        if example.dim() == 4:
            transform = to_channels_last(transform)
        return cast("Function", transform)
