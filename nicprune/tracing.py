"""Follow every channel through a codec's forward pass.

Each channel gets a number. A layer that computes new channels gives out new numbers; an addition, a GDN, an entropy
model ties the numbers of what it joins; chunks, concatenations and pixel shuffles carry them along, because the same
operation is run on a tensor of numbers. Whatever is not understood pins the channels it touches: they are never
removed, so what comes behind is safe too. Nothing here knows one architecture from another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.ops import LowerBound
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.codecs import forward_for_analysis, is_bottleneck, is_conditional

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, MaskedConv2d, CheckerboardMaskedConv2d)
NORMALISATIONS = (GDN, GDN1)

# How an operation treats a channel that is zero: it stays zero, or it does not.
KEEPS_ZERO = set(
    "abs neg relu relu6 leaky_relu silu gelu tanh sin sqrt square pow round floor ceil trunc sign clone contiguous detach to "
    "float double half bfloat16 type type_as hardtanh dropout elu celu selu mish hardswish erf expm1 log1p positive requires_grad "
    "data nan_to_num interpolate upsample avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d pad zero clamp clip "
    "clamp_min clamp_max cpu cuda new_tensor softshrink hardshrink tanhshrink fix deg2rad".split()
)
BREAKS_ZERO = set(
    "sigmoid exp softplus cos rsqrt reciprocal log log2 log10 logsigmoid hardsigmoid erfc uniform normal fill bernoulli "
    "eq ne lt le gt ge logical_not isfinite isnan threshold".split()
)
ADDITIVE = set("add sub rsub maximum minimum max min where lerp fmod remainder".split())
MULTIPLICATIVE = set("mul div truediv true_divide floor_divide multiply divide".split())
MOVES = set(
    "chunk split split_with_sizes tensor_split cat concat concatenate stack getitem unbind narrow select index_select reshape view "
    "flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand expand_as repeat repeat_interleave flip roll "
    "pixel_shuffle pixel_unshuffle channel_shuffle view_as T mT H tile unfold".split()
)
REDUCES = set("mean sum amax amin var std norm any all prod".split())
LIKE = set("zeros_like empty_like ones_like rand_like randn_like full_like".split())
IGNORED = set("size dim numel stride is_contiguous is_floating_point shape dtype device ndim requires_grad grad_fn is_complex item "
              "get_device is_cuda layout element_size storage_offset data_ptr ndimension is_sparse is_nested names tolist new_zeros "
              "new_ones new_empty new_full register_hook retain_grad backward is_leaf grad output_nr is_inference isclose "
              "__len__ __iter__ __bool__ __hash__ __format__ __repr__ __contains__ is_same_size is_mkldnn is_quantized is_meta itemsize nbytes".split())  # fmt: skip


@dataclass
class Labels:
    """Channel numbers of one tensor: `ids` along dimension `dim`; `nonzero` names what makes a zero channel not zero."""

    dim: int
    ids: np.ndarray
    nonzero: str | None = None


@dataclass
class Use:
    """One layer's channels: the numbers along its output ("out"), input ("in") or both, where they are the same."""

    module: str
    axis: str
    ids: np.ndarray


class Tracer(TorchFunctionMode):
    """Runs a codec once on a small image and records which channels belong together."""

    def __init__(self, codec: nn.Module):
        super().__init__()
        self.codec = codec
        self.uses: dict[tuple[str, str], Use] = {}
        self.calls: list[str] = []
        self.pins: dict[int, str] = {}
        self.latents: dict[int, str] = {}
        self.conditional = any(is_conditional(m) for m in codec.modules())
        self._parent: list[int] = []
        self._labels: dict[int, tuple[Tensor, Labels]] = {}
        self._depth = 0
        self._stack: list[str] = []

    # -- numbers ---------------------------------------------------------------------------------------------------

    def new(self, count: int) -> np.ndarray:
        """Give out `count` new channel numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        """The representative of all numbers tied to `number`."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Tie two sequences of channels, one to one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Never remove these channels."""
        for number in ids.tolist():
            self.pins.setdefault(number, reason)

    def labels(self, tensor: Any) -> Labels | None:
        """Channel numbers of a tensor, None for a constant."""
        entry = self._labels.get(id(tensor))
        return entry[1] if entry is not None else None

    def label(self, tensor: Tensor, labels: Labels) -> None:
        """Attach channel numbers; the tensor is kept alive so that its id stays its own."""
        self._labels[id(tensor)] = (tensor, labels)

    @property
    def where(self) -> str:
        """The module that runs now."""
        return self._stack[-1] if self._stack else type(self.codec).__name__

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, size: int = 64) -> None:
        """Trace the codec on a `size` x `size` image. The codec is left as it was, mode included."""
        first = next((p for p in self.codec.parameters() if p.is_floating_point()), torch.zeros(()))
        modes = {module: module.training for module in self.codec.modules()}
        with ExitStack() as stack, torch.no_grad():
            for module, training in modes.items():
                stack.callback(setattr, module, "training", training)
            self.codec.eval()
            for name, module in self.codec.named_modules():
                stack.callback(module.register_forward_pre_hook(self._enter(name, module), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave(name, module), with_kwargs=True, always_call=True).remove)
                if is_bottleneck(module):
                    # Medians are read outside the bottleneck's forward by straight-through quantisers.
                    ids = self.new(module.channels)
                    self.uses[name, "both"] = Use(name, "both", ids)
                    self.label(module.quantiles, Labels(0, ids))
            generator = torch.Generator().manual_seed(0)
            image = torch.rand(1, 3, size, size, generator=generator).to(first.device, first.dtype)
            ids = self.new(3)
            self.pin(ids, "image")
            self.label(image, Labels(1, ids))
            with self:
                out = forward_for_analysis(self.codec, image)
            for key, value in out.items() if isinstance(out, dict) else [("output", out)]:
                labels = self.labels(value)
                if labels is not None:
                    self.pin(labels.ids, "image" if key == "x_hat" else f"output {key}")
        self._labels.clear()

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if self._rule(module) is not None:
                self._depth += 1

        return hook

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            rule = self._rule(module)
            if rule is not None:
                self._depth -= 1
                if self._depth == 0 and output is not None:
                    self.calls.append(name)
                    rule(name, module, [*args, *kwargs.values()], output)
            self._stack.pop()

        return hook

    # -- layers ----------------------------------------------------------------------------------------------------

    def _rule(self, module: nn.Module) -> Callable[..., None] | None:
        kind = type(module)
        if kind in CONVOLUTIONS:
            return self._depthwise if module.groups > 1 else self._dense
        if kind is nn.Linear:
            return self._dense
        if kind in NORMALISATIONS or is_bottleneck(module):
            return self._same_width
        if is_conditional(module):
            return self._conditional
        if kind is LowerBound:
            return self._lower_bound
        return None

    def _consume(self, module: str, axis: str, labels: Labels, ids: np.ndarray | None = None) -> None:
        """Record that a layer reads these channels; at a second call the channels of both calls are tied."""
        if labels.nonzero:
            self.pin(labels.ids, f"{labels.nonzero} before {module}: a zero channel is not a removed one")
        if (module, axis) in self.uses:
            known = self.uses[module, axis].ids
            if len(known) != len(labels.ids):
                self.pin(known, f"{module} is called with different widths")
                self.pin(labels.ids, f"{module} is called with different widths")
            else:
                self.tie(known, labels.ids)
        else:
            self.uses[module, axis] = Use(module, axis, labels.ids if ids is None else ids)

    def _produce(self, module: str, width: int) -> np.ndarray:
        if (module, "out") not in self.uses:
            self.uses[module, "out"] = Use(module, "out", self.new(width))
        return self.uses[module, "out"].ids

    def _dense(self, name: str, module: Any, inputs: list[Any], output: Tensor) -> None:
        x, linear = inputs[0], isinstance(module, nn.Linear)
        labels = self.labels(x)
        axis = x.dim() - 1 if linear else x.dim() - 3
        if labels is not None and labels.dim != axis:
            if linear:  # acts on another dimension than the channels': they pass through, changed one by one
                self.label(output, Labels(labels.dim, labels.ids, f"linear layer {name}"))
            else:
                self.pin(labels.ids, f"{name} reads another dimension than the channels'")
            return
        if labels is None:
            labels = Labels(axis, self.new(x.shape[axis]))
            self.pin(labels.ids, f"constant input of {name}")
        self._consume(name, "in", labels)
        width = module.out_features if linear else module.out_channels
        self.label(output, Labels(output.dim() - 1 if linear else output.dim() - 3, self._produce(name, width)))

    def _depthwise(self, name: str, module: Any, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is None:
            return
        if module.groups == module.in_channels == module.out_channels and labels.dim == inputs[0].dim() - 3:
            self._consume(name, "both", labels)
            self.label(output, Labels(labels.dim, self.uses[name, "both"].ids))
        else:
            self.pin(labels.ids, f"grouped convolution {name}")

    def _same_width(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        labels = self.labels(inputs[0])
        if labels is None:
            return
        if labels.dim != 1:
            self.pin(labels.ids, f"{name} reads another dimension than the channels'")
            return
        self._consume(name, "both", labels)
        if is_bottleneck(module):
            self._mark_latent(labels.ids, "z" if self.conditional else "y")
        for tensor in output if isinstance(output, tuple) else (output,):
            self.label(tensor, Labels(1, labels.ids))

    def _conditional(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        known = [(t, self.labels(t)) for t in inputs if isinstance(t, Tensor)]
        self._elementwise([t for t, _ in known], output[0], additive=True)
        self._elementwise([t for t, _ in known], output[1], additive=True)
        latent = known[0][1] if known else None
        means = self.labels(inputs[2]) if len(inputs) > 2 and isinstance(inputs[2], Tensor) else None
        if latent is not None:
            self._mark_latent(latent.ids, "y")
            nonzero = latent.nonzero or (means.nonzero if means is not None else None)
            self.label(output[0], Labels(latent.dim, latent.ids, nonzero))

    def _mark_latent(self, ids: np.ndarray, name: str) -> None:
        for number in ids.tolist():
            self.latents[number] = name

    def _lower_bound(self, name: str, module: nn.Module, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is not None:
            self.label(output, Labels(labels.dim, labels.ids, f"lower bound {name}"))

    # -- functions -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._depth:
            return result
        name = _canonical(func)
        tensors = [t for t in _flatten((args, kwargs)) if isinstance(t, Tensor)]
        if name == "setitem":
            self._setitem(args)
            return result
        if name in IGNORED or not any(self.labels(t) is not None for t in tensors):
            return result
        outputs = [t for t in _flatten(result) if isinstance(t, Tensor)]
        if not outputs:
            return result
        if name in LIKE:
            labels = self.labels(tensors[0])
            if labels is not None:
                self.label(outputs[0], Labels(labels.dim, labels.ids, None if name == "zeros_like" else name))
        elif name in KEEPS_ZERO or name in BREAKS_ZERO:
            labels = self.labels(tensors[0])
            padded_channels = name == "pad" and outputs[0].shape[labels.dim if labels else 0] != tensors[0].shape[labels.dim if labels else 0]
            if labels is None or len(tensors) > 1 and any(self.labels(t) for t in tensors[1:]) or padded_channels:
                self._unknown(name, tensors)
            else:
                broken = name in BREAKS_ZERO or (name in ("clamp", "clip", "clamp_min") and _clamps_above_zero(args, kwargs))
                self.label(outputs[0], Labels(labels.dim, labels.ids, f"{name} in {self.where}" if broken else labels.nonzero))
        elif name in ADDITIVE or name in MULTIPLICATIVE:
            scalars = [s for s in _flatten(args) if isinstance(s, (int, float)) and not isinstance(s, bool)]
            shifted = name in ("add", "sub", "rsub") and any(s != 0 for s in scalars[:1])
            self._elementwise(tensors, outputs[0], additive=name in ADDITIVE, name=name)
            labels = self.labels(outputs[0])
            if labels is not None and shifted:
                self.label(outputs[0], Labels(labels.dim, labels.ids, labels.nonzero or f"{name} in {self.where}"))
            if labels is not None and "div" in name and len(tensors) > 1 and self.labels(tensors[0]) is None:
                self.label(outputs[0], Labels(labels.dim, labels.ids, f"{name} in {self.where}"))
        elif name in MOVES:
            self._move(func, args, kwargs, name, tensors, outputs)
        elif name in REDUCES:
            self._reduce(name, tensors, outputs)
        else:
            self._unknown(name, tensors)
        return result

    def _unknown(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is not None:
                self.pin(labels.ids, f"{name} in {self.where} is not understood")

    def _elementwise(self, tensors: Sequence[Tensor], output: Tensor, *, additive: bool, name: str = "") -> None:
        """Tie the channels of broadcast operands. A constant with a value per channel pins them: it would not shrink."""
        merged: Labels | None = None
        nonzero: list[str | None] = []
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is None:
                continue
            dim = labels.dim + output.dim() - tensor.dim()
            if merged is None:
                merged = Labels(dim, labels.ids)
            elif dim != merged.dim:
                self._unknown(name or "broadcast", tensors)
                return
            elif len(labels.ids) != len(merged.ids):
                if 1 not in (len(labels.ids), len(merged.ids)):
                    self._unknown(name or "broadcast", tensors)
                    return
                wide, narrow = (labels, merged) if len(merged.ids) == 1 else (merged, labels)
                self.pin(narrow.ids, f"{name} in {self.where} spreads one channel over many")
                merged = Labels(dim, wide.ids)
            else:
                self.tie(merged.ids, labels.ids)
            nonzero.append(labels.nonzero)
        if merged is None:
            return
        for tensor in tensors:
            if self.labels(tensor) is None:
                own = merged.dim - (output.dim() - tensor.dim())
                if own >= 0 and tensor.shape[own] not in (0, 1):
                    self.pin(merged.ids, f"a constant with a value per channel in {self.where}")
                if additive:
                    nonzero.append(f"a constant added in {self.where}")
        if additive:
            merged.nonzero = next((n for n in nonzero if n), None)
        else:  # a product is zero as soon as one factor is
            merged.nonzero = nonzero[0] if nonzero and all(nonzero) else None
        self.label(output, merged)

    def _numbers(self, tensor: Any) -> Any:
        """A tensor of channel numbers of the same shape, -1 where there are none."""
        if not isinstance(tensor, Tensor):
            return tensor
        labels = self.labels(tensor)
        if labels is None:
            return tensor if tensor.dtype in (torch.int64, torch.int32, torch.bool) else torch.full(tensor.shape, -1, dtype=torch.int64)
        shape = [1] * tensor.dim()
        shape[labels.dim] = -1
        return torch.from_numpy(labels.ids.copy()).view(shape).expand(tensor.shape)

    def _move(self, func: Any, args: Any, kwargs: Any, name: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run a data movement on the channel numbers; read off where they went."""
        try:
            if name == "getitem":  # the index may hold tensors of its own, which are positions and not channels
                result = func(self._numbers(args[0]), args[1])
            else:
                result = func(*_map(self._numbers, args), **_map(self._numbers, kwargs))
            moved = [t for t in _flatten(result) if isinstance(t, Tensor)]
        except (RuntimeError, TypeError):
            self._unknown(name, tensors)
            return
        nonzero = next((labels.nonzero for labels in map(self.labels, tensors) if labels is not None and labels.nonzero), None)
        for output, numbers in zip(outputs, moved, strict=True):
            self._read_off(output, numbers, nonzero, tensors, name)

    def _read_off(self, output: Tensor, numbers: Tensor, nonzero: str | None, tensors: Sequence[Tensor], name: str) -> None:
        if numbers.numel() == 0 or int(numbers.max()) < 0:
            return
        for dim in [1, *(d for d in range(numbers.dim()) if d != 1)] if numbers.dim() > 1 else [0]:
            rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if bool((rows == rows[:, :1]).all()):
                break
        else:
            # Several channels meet in one (pixel shuffle): they live or die together.
            dim = min(1, numbers.dim() - 1)
            rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if name not in ("pixel_shuffle",):
                constants = bool((rows < 0).any())
                if not constants or name not in ("cat", "stack", "concat"):
                    self._unknown(name, tensors)
                    return
        ids = []
        for row in rows.numpy():
            found = np.unique(row[row >= 0])
            if not len(found):  # channels of a constant, concatenated: they must stay
                found = self.new(1)
                self.pin(found, f"a constant concatenated in {self.where}")
            for other in found[1:]:
                self.tie(found[:1], np.array([other]))
            ids.append(int(found[0]))
        self.label(output, Labels(dim, np.array(ids), nonzero))

    def _reduce(self, name: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        labels = self.labels(tensors[0])
        source, output = tensors[0], outputs[0]
        if labels is None:
            return
        if output.dim() == source.dim() and output.shape[labels.dim] == source.shape[labels.dim]:
            self.label(output, Labels(labels.dim, labels.ids, labels.nonzero))
        elif labels.dim < output.dim() and output.shape == source.shape[: output.dim()]:
            self.label(output, Labels(labels.dim, labels.ids, labels.nonzero))
        elif output.dim():  # a total over everything is a number, not a tensor that layers read
            self._unknown(name, tensors)

    def _setitem(self, args: Sequence[Any]) -> None:
        target, index, value = args[0], args[1], args[2]
        labels, given = self.labels(target), self.labels(value)
        if labels is None and given is None:
            return
        numbers = self._numbers(target).clone()
        try:
            # A number written in place of channels leaves them as they are: zero stays zero, other values do not.
            if given is not None:
                numbers[index] = self._numbers(value)
        except (RuntimeError, IndexError, TypeError):
            self._unknown("setitem", [target, value])
            return
        nonzero = (labels.nonzero if labels else None) or (given.nonzero if given else None)
        if given is None and not (isinstance(value, (int, float)) and value == 0):
            nonzero = nonzero or f"assignment in {self.where}"
        dim = labels.dim if labels is not None else min(1, target.dim() - 1)
        rows = numbers.movedim(dim, 0).reshape(target.shape[dim], -1)
        ids = []
        for row in rows.numpy():
            found = np.unique(row[row >= 0])
            if not len(found):
                self._unknown("setitem", [value] if given is not None else [target])
                return
            for other in found[1:]:
                self.tie(found[:1], np.array([other]))
            ids.append(int(found[0]))
        self.label(target, Labels(dim, np.array(ids), nonzero))

    # -- result ----------------------------------------------------------------------------------------------------

    def classes(self) -> dict[int, list[tuple[str, str, int]]]:
        """For every set of tied channels: (layer, axis, index) of each, in the order the layers ran."""
        members: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        order = {name: position for position, name in reversed(list(enumerate(self.calls)))}
        for use in sorted(self.uses.values(), key=lambda u: (order.get(u.module, len(order)), u.axis == "out")):
            for index, number in enumerate(use.ids.tolist()):
                members[self.root(number)].append((use.module, use.axis, index))
        return members


def _canonical(func: Any) -> str:
    """Name an operation alike whether it came as function, method, operator, in place or property."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        short = name.strip("_")
        if short in ("getitem", "setitem"):
            return short
        for prefix in ("i", "r"):
            if short.startswith(prefix) and short[1:] in ("add", "sub", "mul", "truediv", "div", "pow", "floordiv"):
                return "rsub" if short == "rsub" else "reciprocal" if short in ("rtruediv", "rdiv", "rpow") else short[1:]
        return short if short in ADDITIVE | MULTIPLICATIVE | KEEPS_ZERO | BREAKS_ZERO else name
    return name.rstrip("_")


def _clamps_above_zero(args: Any, kwargs: Any) -> bool:
    bounds = [b for b in (*args[1:2], kwargs.get("min")) if isinstance(b, (int, float))]
    return any(b > 0 for b in bounds)


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flatten(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flatten(item)]
    return [value]


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)
