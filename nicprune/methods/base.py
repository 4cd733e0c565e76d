"""What a method is, and how methods are attached to a codec.

To add one: a file in this folder with a class decorated by `@METHODS.register("name")`, and a recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nicprune.channels import Groups
from nicprune.codecs import check_codec, provenance, set_provenance
from nicprune.cost import CostModel
from nicprune.errors import RecipeError
from nicprune.masks import has_masks
from nicprune.registry import Registry
from nicprune.settings import Settings, parse
from nicprune.surgery import analyse, prune


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

    @property
    def steps_left(self) -> int:
        """How many more steps it needs until it is done."""
        return 0

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

    @property
    def steps_left(self) -> int:
        """How many more training steps the methods need until all are done."""
        return max(method.steps_left for method in self._each)

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
            record.original = self.cost.original.as_dict()
        small = prune(wide, keep, self.groups, verify=verify)
        totals = self.cost.totals(keep)
        entry = {
            "methods": [{"name": m.name, **m.config.model_dump(mode="json")} for m in self._each],
            "widths": {name: [self.groups[name].width, len(kept)] for name, kept in keep.items()},
            "macs_before": self.cost.totals().macs,
            "macs_after": totals.macs,
            "params_after": totals.params,
            "verified": provenance(small).verified if verify else "",
        }
        provenance(small).history.append(entry)
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
    if has_masks(codec):
        raise RecipeError("the codec has a method attached already; harden() or detach() it first, or attach a list")
    groups = analyse(codec)
    cost = CostModel(codec, groups)
    # Everything is validated before the first hook is set: a failure leaves the codec as it was.
    methods = [cls(codec, groups, cost, settings) for cls, settings in parsed]
    device = next(codec.parameters()).device
    attached = Attached(codec, [m.to(device) for m in methods], groups, cost)
    for one in methods:
        one.attach(codec)
    return attached
