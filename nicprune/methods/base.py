"""What a method is, and how methods are attached to a codec.

To add one: a file in this folder with a class decorated by `@METHODS.register("name")`, and a recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels import Groups, find_groups
from nicprune.codecs import check_codec, provenance, set_provenance
from nicprune.cost import CostModel
from nicprune.errors import RecipeError
from nicprune.registry import Registry
from nicprune.settings import Settings, parse
from nicprune.surgery import prune


class Method(nn.Module):
    """One sparsity technique. Every hook does nothing by default, so methods compose in a list.

    Learnt state is parameters and buffers of this module, so `state_dict`, `.to(device)` and DDP know it.

    Attributes:
        name: what recipes call it (set by registration's name).
        summary: one line for listings.
        Config: its settings; unknown keys are refused.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Config: ClassVar[type[Settings]] = Settings

    def __init__(self, codec: nn.Module, groups: Groups, cost: CostModel, config: Settings):
        super().__init__()
        self.config = config
        # Through a tuple, so that the codec does not become a sub-module of its own method.
        self._shared = (codec, groups, cost)
        self.validate()

    @property
    def groups(self) -> Groups:
        """The codec's channel groups."""
        return self._shared[1]

    @property
    def cost(self) -> CostModel:
        """The codec's cost."""
        return self._shared[2]

    def validate(self) -> None:
        """Refuse a configuration that this codec cannot follow, before anything is changed."""

    def attach(self, codec: nn.Module) -> None:
        """Put hooks on the codec. The forward pass must stay the same, exactly."""

    def detach(self, codec: nn.Module) -> None:
        """Take every hook of this method off the codec again."""

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """Extra terms of the loss, a scalar."""
        return x.new_zeros(())

    def after_step(self) -> None:
        """Called behind every `optimizer.step()`."""

    @property
    def done(self) -> bool:
        """Whether the method has nothing left to learn."""
        return True

    def figures(self) -> dict[str, float]:
        """Numbers for the progress line and metrics.jsonl."""
        return {}

    def self_updated(self) -> list[nn.Parameter]:
        """Parameters that `after_step` moves by itself; the optimiser leaves them alone."""
        return []

    def keep(self) -> dict[str, list[int]]:
        """The keep-lists decided so far, by group; groups not named keep everything."""
        return {}

    def fold(self, codec: nn.Module) -> None:
        """Write what was learnt into the weights of `codec` (a copy without hooks), in place."""

    def check_hardenable(self) -> None:
        """Raise if the decision is not made yet."""


METHODS: Registry[type[Method]] = Registry("method")


class Attached(nn.Module):
    """A codec with methods attached: the same forward pass, now prunable. Drops into any training loop.

    Attributes:
        codec: the codec itself, the very object that was given; its state-dict keys are unchanged.
        methods: what is attached, in order.
    """

    def __init__(self, codec: nn.Module, methods: Sequence[Method], groups: Groups, cost: CostModel):
        super().__init__()
        self.codec = codec
        self.methods = nn.ModuleList(methods)
        self._shared = (groups, cost)

    @property
    def _each(self) -> list[Method]:
        return cast("list[Method]", list(self.methods))

    @property
    def groups(self) -> Groups:
        """The codec's channel groups."""
        return self._shared[0]

    @property
    def cost(self) -> CostModel:
        """The codec's cost."""
        return self._shared[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The codec's forward pass."""
        return self.codec(*args, **kwargs)

    def aux_loss(self) -> Tensor:
        """The codec's auxiliary loss (its quantiles')."""
        codec: Any = self.codec
        return codec.aux_loss()

    def update(self, *args: Any, **kwargs: Any) -> bool:
        """Update the codec's CDF tables."""
        codec: Any = self.codec
        return codec.update(*args, **kwargs)

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """The methods' extra loss terms: add them to the rate-distortion loss."""
        return torch.stack([method.loss(out, x) for method in self._each]).sum()

    def after_step(self) -> None:
        """Call behind `optimizer.step()`."""
        for method in self._each:
            method.after_step()

    @property
    def done(self) -> bool:
        """Whether every method is done."""
        return all(method.done for method in self._each)

    def figures(self) -> dict[str, float]:
        """The methods' numbers for logs."""
        return {name: value for method in self._each for name, value in method.figures().items()}

    def self_updated(self) -> list[nn.Parameter]:
        """Parameters that an optimiser need not (but may) be given."""
        return [p for method in self._each for p in method.self_updated()]

    def keep(self) -> dict[str, list[int]]:
        """The keep-lists that `harden` would use now."""
        merged: dict[str, set[int]] = {}
        for method in self._each:
            for name, kept in method.keep().items():
                merged[name] = merged[name] & set(kept) if name in merged else set(kept)
        return {name: sorted(kept) for name, kept in merged.items()}

    def plain(self) -> nn.Module:
        """Return a plain copy of the codec at full width, what was learnt folded into its weights."""
        plain = copy.deepcopy(self)
        codec = plain.detach()
        for method in plain._each:
            method.fold(codec)
        set_provenance(codec, provenance(self.codec).copy())
        return codec

    def compress(self, *args: Any, **kwargs: Any) -> Any:
        """Write a bitstream with the masks as they are now (slow: a folded copy is made; harden for good)."""
        return self._updated().compress(*args, **kwargs)

    def decompress(self, *args: Any, **kwargs: Any) -> Any:
        """Read a bitstream with the masks as they are now (slow: a folded copy is made; harden for good)."""
        return self._updated().decompress(*args, **kwargs)

    def _updated(self) -> Any:
        codec: Any = self.plain().eval()
        codec.update(force=True)
        return codec

    def harden(self, *, verify: bool = True) -> nn.Module:
        """Return a plain, smaller codec: the decision made, masks folded in, channels removed, the result verified.

        The attached codec stays as it is.

        Raises:
            TrainingError: a method has not decided yet.
            SurgeryError: the result is not the same function as the masked codec.
        """
        for method in self._each:
            method.check_hardenable()
        keep = self.keep()
        wide = self.plain()
        record = provenance(wide)
        if not record.original:
            record.original = self.cost.totals().as_dict()
        small = prune(wide, keep, self.groups, verify=verify)
        totals = self.cost.totals(keep)
        entry = {
            "methods": [{"name": m.name, **m.config.model_dump(mode="json")} for m in self._each],
            "widths": {name: [self.groups[name].width, len(kept)] for name, kept in keep.items()},
            "macs_before": self.cost.totals().macs,
            "macs_after": totals.macs,
            "params_after": totals.params,
        }
        record = provenance(small)
        record.history.append(entry)
        return small.train(self.codec.training)

    def detach(self) -> nn.Module:
        """Take everything off again and return the original object, as it is now."""
        for method in self._each:
            method.detach(self.codec)
        return self.codec


def attach(codec: nn.Module, method: str | Sequence[tuple[str, Mapping[str, Any]]], **config: Any) -> Attached:
    """Attach one method, or a list of (name, settings), to a codec. Its forward pass does not change.

    Args:
        codec: any `CompressionModel`, own classes included. It is not copied.
        method: a name from `nicprune list`, with its settings as keywords; or a list of (name, settings).

    Raises:
        CodecError: the codec cannot be analysed.
        RecipeError: a setting is unknown or out of range.
        BudgetError: the budget cannot be met.
    """
    check_codec(codec)
    wanted = [(method, config)] if isinstance(method, str) else [(name, dict(settings)) for name, settings in method]
    if not wanted or (config and not isinstance(method, str)):
        raise RecipeError("attach(codec, name, **settings) or attach(codec, [(name, settings), ...])")
    parsed = [(METHODS[name], parse(METHODS[name].Config, settings, f"method {name!r}")) for name, settings in wanted]
    if any(hasattr(hook, "nicprune_method") for m in codec.modules() for hook in m._forward_hooks.values()):
        raise RecipeError("the codec has a method attached already; harden() or detach() it first, or attach a list")
    groups = find_groups(codec)
    cost = CostModel(codec, groups)
    # Everything is validated before the first hook is set: a failure leaves the codec as it was.
    methods = [cls(codec, groups, cost, settings) for cls, settings in parsed]
    device = next(codec.parameters()).device
    attached = Attached(codec, [m.to(device) for m in methods], groups, cost)
    for one in methods:
        one.attach(codec)
    return attached


class Masks(nn.Module):
    """One mask value per channel of some groups, behind the bias of every producer, before GDN or activation.

    A convolution's weight and bias are multiplied while it runs, which is the same as multiplying its output and costs
    almost nothing; its parameters stay its own. Masked convolutions and entropy bottlenecks have their output multiplied.
    """

    def __init__(self, groups: Sequence[Any]):
        super().__init__()
        self.names = [g.name for g in groups]
        self.values = nn.ParameterList(nn.Parameter(torch.ones(g.width)) for g in groups)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.values[self.names.index(name)]

    def attach(self, codec: nn.Module, groups: Groups) -> None:
        """Hook every producer of these groups."""
        modules = dict(codec.named_modules())
        sources: dict[str, list[tuple[int, np.ndarray]]] = {}
        for position, name in enumerate(self.names):
            for member in groups[name].members:
                if member.axis == "out" or (member.axis == "both" and hasattr(modules[member.module], "quantiles")):
                    sources.setdefault(member.module, []).append((position, member.index))
        for module_name, parts in sources.items():
            hook = MaskHook(self, parts, modules[module_name])
            modules[module_name].register_forward_pre_hook(hook.before)
            modules[module_name].register_forward_hook(hook, always_call=True)

    def detach(self, codec: nn.Module) -> None:
        """Remove the hooks of these masks."""
        for module in codec.modules():
            for table in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(table.items()):
                    owner = getattr(hook, "__self__", hook)
                    if isinstance(owner, MaskHook) and owner.masks is self:
                        del table[key]
                        module._forward_hooks_always_called.pop(key, None)

    def fold(self, codec: nn.Module, groups: Groups) -> None:
        """Multiply the producers' weights and biases by the masks, in place."""
        modules = dict(codec.named_modules())
        with torch.no_grad():
            for position, name in enumerate(self.names):
                for member in groups[name].producers:
                    layer = modules[member.module]
                    factor = torch.ones(_out_width(layer), device=layer.weight.device)
                    for column in member.index.T:
                        factor[torch.from_numpy(column)] = self.values[position].detach().to(factor)
                    layer.weight.mul_(_along_out(factor, layer))
                    if layer.bias is not None:
                        layer.bias.mul_(factor)


class MaskHook:
    """Multiplies one producer by its masks. A plain object, so that deepcopy gives the copy hooks of its own."""

    nicprune_method = True

    def __init__(self, masks: Masks, parts: Sequence[tuple[int, np.ndarray]], layer: nn.Module):
        self.masks = masks
        self.on_weight = type(layer) in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        width = _out_width(layer)
        self.position = parts[0][0]
        # Entry 0 of the joined masks is the constant 1, for channels that no mask governs.
        gather, offset = np.zeros(width, np.int64), 1
        for position, index in parts:
            count = len(masks.values[position])
            for column in index.T:
                gather[column] = offset + np.arange(count)
            offset += count
        self.parts = [position for position, _ in parts]
        whole = len(parts) == 1 and np.array_equal(gather, np.arange(1, width + 1))
        self.gather = None if whole else torch.from_numpy(gather)

    def factor(self) -> Tensor:
        """The mask of each output channel."""
        if self.gather is None:
            return self.masks.values[self.position]
        values = [self.masks.values[p] for p in self.parts]
        if self.gather.device != values[0].device:
            self.gather = self.gather.to(values[0].device)
        return torch.cat([values[0].new_ones(1), *values])[self.gather]

    def before(self, layer: Any, args: Any) -> None:
        """Put masked parameters in front of the layer's own for the length of the call."""
        if self.on_weight:
            factor = self.factor()
            layer.__dict__["weight"] = layer._parameters["weight"] * _along_out(factor, layer)
            if layer._parameters["bias"] is not None:
                layer.__dict__["bias"] = layer._parameters["bias"] * factor

    def __call__(self, layer: Any, args: Any, output: Any) -> Any:
        if self.on_weight:
            layer.__dict__.pop("weight", None)
            layer.__dict__.pop("bias", None)
            return None
        if output is None:
            return None
        factor = self.factor().view(1, -1, 1, 1)
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def _out_width(layer: Any) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.channels if hasattr(layer, "quantiles") else layer.out_channels


def _along_out(factor: Tensor, layer: nn.Module) -> Tensor:
    """Shape a value per output channel to multiply the layer's weight."""
    if isinstance(layer, nn.Linear):
        return factor.view(-1, 1)
    return factor.view(1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else factor.view(-1, 1, 1, 1)
