"""The interface of a type of layer, and the table of all types that are known.

A layer of your own is registered once:

    from nicprune.codecs.layer_kinds import Convolution, register_kind

    register_kind(MyConv2d, Convolution())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nicprune.codecs.copying import copy_codec
from nicprune.codecs.layer_kinds.layout import Layout
from nicprune.codecs.layer_kinds.trials import fault_of_mask_on_weight
from nicprune.codecs.trusted import of_a_library
from nicprune.common.errors import CodecError

Index = slice | Tensor | None
"""Channels along one axis: the first n (a view), any (a copy), or None for all."""

Axis = Literal["out", "in", "both"]


def kept_indices(width: int, removed: Sequence[int]) -> list[int]:
    """Return the channels that stay."""
    gone = set(removed)
    return [i for i in range(width) if i not in gone]


def index_of(kept: np.ndarray, width: int) -> Index:
    """Return the cheapest index for channels that stay, sorted or not."""
    if np.array_equal(kept, np.arange(len(kept))):
        return None if len(kept) == width else slice(0, len(kept))
    return torch.from_numpy(np.ascontiguousarray(kept))


def take(x: Tensor, dim: int, index: Index) -> Tensor:
    """Return these channels of a tensor along one axis."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x.narrow(dim, 0, index.stop)
    return x.index_select(dim, index.to(x.device))


class LayerKind:
    """The way in which one type of layer treats channels.

    Channel groups, surgery, cost, masks, views, gates and importance ask this object. No other code
    looks at a layer's class or attributes. The base class describes a layer without channels.

    Attributes:
        flow: how channels go through it, a rule of the tracer: "dense" (each output from all
            inputs), "grouped" (a convolution with groups), "coupled" (each output is its input,
            changed), "attention" (heads, each with as many channels of its input), "through" (the
            same, by a layer without channels of its own: zero stays zero), "conditional" (an
            entropy model whose parameters come from outside), "bounded" (a lower bound: zero does
            not stay zero).
        channel_axis: the dimension of its input and output that holds channels, from the end.
        needs_zero: whether a removed channel has to be zero where the layer reads it, so that what
            is left computes the same.
        absorbs: whether a mask on the layer makes a removed channel zero whatever it read.
        any_axis: whether it may be called on another dimension, whose channels then pass through.
        convolution: whether it is a convolution of any sort.
        mask_on_weight: whether a mask on its outputs may multiply weight and bias instead. True
            only where both act as in `nn.Conv2d`: the output is linear in them, and the bias is
            added last and unscaled (modulators fold a rate into it). A layer of a registered class
            is tried in float64 when it is first met, and refused where this does not hold.
        pools: whether it divides or multiplies by a weighted sum over channels, as GDN does.
        mixes: whether it computes statistics over channels, as a layer norm does. Its channels are
            pinned, unless a method is attached with `norms: adapt`: then a masked layer computes
            with the channels that count alone (`on_some`).
        by_trial: whether it was found by trying the layer, not by its class.
        codes: whether it is an entropy model with parameters for each channel.
        adapts: whether it computes statistics of its input while training, and keeps them.
        inherited: whether subclasses are of this kind whatever they compute. Other kinds cover
            those subclasses that compute as the layer does: see `computes`.
        computes: methods that say what the layer computes. A subclass that overrides one of them
            is not known to be of this kind.
    """

    flow: ClassVar[str] = "coupled"
    channel_axis: ClassVar[int] = -3
    needs_zero: ClassVar[bool] = True
    absorbs: ClassVar[bool] = False
    any_axis: ClassVar[bool] = False
    convolution: ClassVar[bool] = False
    mask_on_weight: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    by_trial: ClassVar[bool] = False
    codes: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    inherited: ClassVar[bool] = False
    computes: ClassVar[tuple[str, ...]] = ("__call__", "forward", "_conv_forward")

    # -- what it has ------------------------------------------------------------------------------

    @property
    def has_channels(self) -> bool:
        """True if it has parameters that belong to channels."""
        return True

    def of(self, layer: Any) -> LayerKind:
        """Return the kind of this very layer, where it depends on more than the type."""
        return self

    def traceable(self, layer: Any) -> bool:
        """Return whether its parameters are its own, not computed from others at every call."""
        return True

    def covers(self, layer: type, known: type) -> bool:
        """Return whether a class that derives from a known one computes as it does."""
        return self.inherited or all(
            getattr(layer, name, None) is getattr(known, name, None) for name in self.computes
        )

    def check(self, layer: Any) -> None:
        """Try in float64 what the kind claims of a layer of a registered class, when it is first
        met.

        Raises:
            CodecError: the layer computes something else; says what to do.
        """
        if self.mask_on_weight:
            twin = copy_codec(layer).cpu().double().eval()
            if fault := fault_of_mask_on_weight(twin, self):
                raise CodecError(fault)

    def channel_dim(self, layer: Any, x: Tensor) -> int:
        """Return the dimension of an input or output that holds channels."""
        return x.dim() + self.channel_axis

    def widths(self, layer: Any) -> tuple[int, int]:
        """Return the number of output and of input channels."""
        raise NotImplementedError

    def exposed(self, layer: Any) -> list[Tensor]:
        """Return tensors with a value for each channel that a codec reads outside the layer's
        call.
        """
        return []

    def masked(self, axis: str) -> bool:
        """Return whether this layer is where a mask on the channels of an axis is applied."""
        return axis == "out"

    # -- other layers with the same function ------------------------------------------------------

    def fixed(self, layer: Any) -> nn.Module:
        """Return a layer with the same function, for weights that do not change any more: what is
        computed from parameters at every call is computed once.
        """
        return layer

    def forms(self, layer: Any) -> dict[str, nn.Module]:
        """Return other layers with the same function, by name, that may be faster."""
        return {}

    # -- what it costs ----------------------------------------------------------------------------

    def is_product(self, layer: Any) -> bool:
        """Return whether its MACs are proportional to output times input channels, not to
        outputs.
        """
        return True

    def by_group(self, layer: Any) -> bool:
        """Return whether whole groups are removed, where `flow` is "grouped"."""
        return False

    def heads(self, layer: Any) -> int:
        """Return the number of heads, where `flow` is "attention"."""
        return 1

    def inputs_at_once(self, layer: Any) -> int:
        """Return how many input channels come and go together: as many as there are groups."""
        return 1

    def parts(self, layer: Any) -> tuple[str, ...]:
        """Return the names of layers inside it whose weights it multiplies without calling them."""
        return ()

    def times(
        self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Return how often weights are multiplied in a call: its own by the name "", and those of
        its `parts`; for each as many numbers as there are equal blocks of output channels that
        differ in this.
        """
        return {}

    def equal_parts(self, layer: Any) -> int:
        """Return the number of equal parts of its channels that stay equally wide, where `flow` is
        "coupled": the groups of a group norm.
        """
        return 1

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        """Return the parameters per (output x input) channel, inputs counted as `inputs_at_once`
        says, and per output channel.
        """
        raise NotImplementedError

    # -- less of it -------------------------------------------------------------------------------

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        """Remove channels of one axis, in place."""
        raise NotImplementedError

    def zero(self, layer: Any, channels: Tensor) -> None:
        """Make output channels zero, in place."""
        raise NotImplementedError

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        """Return the values, by attribute, that replace the layer's own while it computes with
        these channels alone.
        """
        raise NotImplementedError

    def narrowed_weight(self, layer: Any, index: Tensor) -> Tensor:
        """Return the weight of a convolution for some of its input channels."""
        raise NotImplementedError

    def follow_shapes(self, layer: Any) -> None:
        """Set the layer's attributes that repeat the shapes of its parameters."""

    def reads_width(self, layer: Any) -> bool:
        """Return whether a width of the layer shows in its input alone: see `follow_input`."""
        return False

    def follow_input(self, layer: Any, x: Tensor) -> None:
        """Set attributes that repeat the width of the input and that no parameter shows."""

    # -- multiplied -------------------------------------------------------------------------------

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        """Shape a value for each channel of an axis to multiply the layer's weight."""
        raise NotImplementedError

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        """Return the parameters that stand in front of the layer's own while its channels are
        multiplied by `factor`, shape (C,): where it is 0, so is the channel. None: the output is
        multiplied instead.
        """
        return None

    def write(self, layer: Any, values: dict[str, Any]) -> None:
        """Write what `masked_attributes` returned into the parameters, in place."""
        for name, value in values.items():
            getattr(layer, name).copy_(value)

    def on_output(self, factor: Tensor) -> Tensor:
        """Return the factor of the output, where a mask is not applied to parameters."""
        return factor

    def on_some(self, layer: Any, x: Tensor, counted: Tensor) -> Tensor:
        """Return the output, of the shape of x, where the layer computes with the channels that
        count alone, a truth value for each; zero for the others.
        """
        raise NotImplementedError

    # -- sums over channels, where it `pools` -----------------------------------------------------

    def pool_weights(
        self, layer: Any, values: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return gamma (C, C) and beta (C,) as the layer uses them, of the layer itself or of
        parameters that `sliced` returned.
        """
        raise NotImplementedError

    def with_pool_weights(self, gamma: Tensor, beta: Tensor) -> dict[str, Any]:
        """Return the values, by attribute, of a layer that uses this gamma and beta."""
        raise NotImplementedError

    def add_to_pool(self, layer: Any, added: Tensor) -> None:
        """Add a constant (C,) to the sum of each channel, in place."""
        raise NotImplementedError

    def pooled(self, x: Tensor) -> Tensor:
        """Return the terms of the sum over channels, of the shape of x."""
        raise NotImplementedError

    def normalise_some(
        self, layer: Any, x: Tensor, index: Tensor, gather: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return some output channels for the whole input. `gather` takes channels of x."""
        raise NotImplementedError

    # -- how much it matters ----------------------------------------------------------------------

    def norms(self, layer: Any, axis: str) -> Tensor:
        """Return the squared L2 norm of each channel of an axis, shape (channels,).

        L2 is all that methods ask for: `magnitude` and `group_lasso` add up squares over the
        members of a group, which no other norm allows layer by layer (DepGraph, section 4.2);
        `fisher` and mask decay rank by squared gradients of masks, `random` by nothing.
        """
        raise NotImplementedError

    # -- more of it -------------------------------------------------------------------------------

    def grown(self, layer: Any, inputs: int, outputs: int) -> nn.Module | None:
        """Return a new layer like this one, with random weights, that computes `outputs` further
        channels from `inputs` channels, the layer's own and new ones; None where it is not known
        how. Where the layer `pools`, the new channels themselves are the second argument of its
        call; where it `codes`, there are no others.
        """
        return None

    def copy_rows(self, layer: Any, new: Any, rows: Tensor, inputs: Layout) -> None:
        """Let the outputs of a grown layer weigh the layer's own inputs as these outputs of the
        layer do, in place; new inputs keep their weights. Where it is not known how, all do.
        """

    def beside(self, layer: Any, new: Any, layout: Layout) -> Any:
        """Return what computes all channels in place of a layer that `codes`, with a new one beside
        it for the new channels.
        """
        raise NotImplementedError

    def joined(
        self, layer: Any, new: Any, inputs: Layout, outputs: Layout, factor: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the parameters, by attribute, of a convolution that computes all channels, for
        layers that codecs use without calling them. Its own outputs do not read new inputs; new
        outputs are multiplied by `factor`, if given.
        """
        raise NotImplementedError

    # -- anew -------------------------------------------------------------------------------------

    def starts_anew(self, layer: Any) -> bool:
        """Return whether `reinitialise` knows how the layer's class starts."""
        return True

    def reinitialise(self, layer: Any) -> None:
        """Draw the weights as the layer's class does when it is made, in place."""
        layer.reset_parameters()


KINDS: dict[type, LayerKind] = {}
"""The kind of each type of layer, and of its subclasses that compute as it does."""

RECOGNISERS: list[Callable[[nn.Module], LayerKind | None]] = []
"""Functions that try a module whose class is not known, and return its kind if it shows one."""

_recognised: WeakKeyDictionary[nn.Module, LayerKind | None] = WeakKeyDictionary()


def _by_trial(layer: Any) -> LayerKind | None:
    """Return the kind that a module of an unknown class shows when it is tried, once for each."""
    if not isinstance(layer, nn.Module):
        return None
    if layer not in _recognised:
        found = (recognise(layer) for recognise in RECOGNISERS)
        _recognised[layer] = next((kind for kind in found if kind is not None), None)
    return _recognised[layer]


def register_kind(layer: type[nn.Module], kind: LayerKind) -> None:
    """Make a type of layer known, with its subclasses that do not override what it computes.

    Args:
        layer: the class.
        kind: what it is like; see `LayerKind`.
    """
    KINDS[layer] = kind


_checked: WeakKeyDictionary[nn.Module, LayerKind] = WeakKeyDictionary()


def _check_once(layer: nn.Module, kind: LayerKind) -> None:
    if _checked.get(layer) is not kind:
        kind.check(layer)
        _checked[layer] = kind


def kind_of(layer: Any) -> LayerKind | None:
    """Return the kind of a layer. None if its type is not known, or if its parameters are computed
    from others at every call, as by `torch.nn.utils.parametrizations`.

    Raises:
        CodecError: the layer is not what the kind that somebody registered for it says; see
            `LayerKind.check`.
    """
    for base in type(layer).__mro__:
        known = KINDS.get(base)
        if known is None or not (base is type(layer) or known.covers(type(layer), base)):
            continue
        found = known.of(layer)
        if not found.traceable(layer):
            return None
        if not of_a_library(base):
            _check_once(layer, found)
        return found
    return _by_trial(layer)


def nearest_kind(layer: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or of the nearest class that it derives from: for what holds of
    every subclass, as that attributes repeat shapes.
    """
    bases = (KINDS.get(base) for base in type(layer).__mro__)
    known = next((kind for kind in bases if kind is not None), None)
    return known.of(layer) if known is not None else _by_trial(layer)


COMPUTED = "its weights are computed at every call (torch.nn.utils.{} ends that)"
"""Reason that a layer's parameters are not its own, with the function that makes them so."""
HOOKS = {
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
    BasePruningMethod: "prune.remove",
}
"""Hooks of torch that compute a weight, and what takes them off."""


def why_untraceable(layer: nn.Module) -> str | None:
    """Return why the parameters of a layer are not those of its kind, None if nothing is known."""
    if is_parametrized(layer):
        return COMPUTED.format("parametrize.remove_parametrizations")
    for hook in layer._forward_pre_hooks.values():
        for known, ends in HOOKS.items():
            if isinstance(hook, known):
                return COMPUTED.format(ends)
    base = next((base for base in type(layer).__mro__ if base in KINDS), type(layer))
    own = [name for name in layer._parameters if name not in ("weight", "bias")]
    if base is type(layer) or not own:
        return None
    return (
        f"{type(layer).__name__} derives from {base.__name__} and has parameters of its own,"
        f" {', '.join(own)}"
    )


def kinds_in(codec: nn.Module) -> Mapping[str, LayerKind]:
    """Return the kind of every known layer of a codec, by the layer's name."""
    return {
        name: kind
        for name, module in codec.named_modules()
        if (kind := kind_of(module)) is not None
    }


def zero_or_one(factor: Tensor) -> Tensor:
    """Return 0 where a mask is 0, and 1 elsewhere: for what a mask has been put on already."""
    return (factor != 0).to(factor)


def cut(layer: Any, name: str, kept: Sequence[int], dim: int = 0) -> None:
    """Keep some entries of a parameter or buffer along one dimension, in place; a gradient is cut
    alike.
    """
    value = getattr(layer, name)
    if value is None:
        return
    index = torch.as_tensor(list(kept), dtype=torch.long, device=value.device)
    less = value.detach().index_select(dim, index)
    if isinstance(value, nn.Parameter):
        less = nn.Parameter(less, requires_grad=value.requires_grad)
        less.grad = value.grad.index_select(dim, index) if value.grad is not None else None
    setattr(layer, name, less)


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """Return the number of output and of input channels of a layer, or of a subclass of a known
    one.
    """
    kind = nearest_kind(layer)
    if kind is None or not kind.has_channels:
        raise KeyError(f"no layer kind for {type(layer).__name__}")
    return kind.widths(layer)


def channel_kind(layer: Any) -> LayerKind:
    """Return the kind of a layer that is known to have one: a member of a channel group."""
    kind = kind_of(layer)
    if kind is None:
        raise KeyError(f"no layer kind for {type(layer).__name__}")
    return kind
