"""Adaptation of a codec to another domain: what is coded in the source domain stays what it was.

A codec pruned or trained for photographs meets screens, drawings or scans. `form` says how it
learns them; see the file of each form. With forms that stay beside the codec, the adapted codec has
two domains. In the source domain it is the source codec, bit for bit; files say their domain.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.cdf import resize_tables
from nicprune.codecs.hooks import NarrowHook, remove_hooks, without_hooks
from nicprune.common.config import parse
from nicprune.common.errors import RecipeError, SurgeryError, TrainingError
from nicprune.methods.adaptation.config import FORGETS, AdaptationConfig
from nicprune.methods.adaptation.decoder_adapter import DecoderAdapter
from nicprune.methods.adaptation.finetune import FinetuneAll, FinetuneDecoder
from nicprune.methods.adaptation.form import Form
from nicprune.methods.adaptation.grow import Grow
from nicprune.methods.adaptation.low_rank import LowRank
from nicprune.methods.adaptation.new_channels import read_channels, remove_new_channels
from nicprune.methods.adaptation.verification import trace_target
from nicprune.methods.contract import METHODS, Method, MultiWidth, Pruner
from nicprune.methods.domains import SOURCE, TARGET, Domains
from nicprune.pruning.budget import Budget, GrownBudget
from nicprune.pruning.cost import CostModel, count_modules
from nicprune.pruning.masks import mask_channels
from nicprune.pruning.totals import Totals
from nicprune.pruning.verification import TOLERANCE, apart
from nicprune.pruning.views import override_attributes

FORMS: dict[str, type[Form]] = {
    "grow": Grow,
    "decoder_adapter": DecoderAdapter,
    "low_rank": LowRank,
    "finetune_all": FinetuneAll,
    "finetune_decoder": FinetuneDecoder,
}


@METHODS.register("adaptation")
class Adaptation(MultiWidth):
    """One codec, two domains."""

    name = "adaptation"
    summary = (
        "another domain beside the codec's own, whose files are read as before: new channels"
        " (CAwF), adapters, low rank; or fine-tuning"
    )
    Config = AdaptationConfig
    goes_with = frozenset({"mask_decay", "magnitude", "random"})
    exclusive = {
        "Method": "beside an adaptation go only mask_decay, magnitude and random, which prune its"
        " new channels, since its source codec must not change: prune the codec first, then adapt"
        " it"
    }
    config: AdaptationConfig
    steps_field = "adapt_steps"
    widths: Any
    step: Tensor
    learnt: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.form = FORMS[self.config.form](self.codec, self.groups, self.cost, self.config)
        self.config = self.form.config
        self.widths = Domains(self.config.domain) if self.form.stays else None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("learnt", torch.zeros((), dtype=torch.bool))
        self.replay = self.config.replay
        self._source = _digest(self.codec) if self.form.stays else ""
        self._pruners: list[Pruner] = []
        self._counted: list[tuple[Totals, dict[str, tuple[int, int]]]] = []

    # -- domains ----------------------------------------------------------------------------------

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return config.form not in FORGETS

    # -- pruning of new channels ------------------------------------------------------------------

    @classmethod
    def settings_beside(
        cls, own: Mapping[str, Any], other: str, settings: Mapping[str, Any], where: str
    ) -> Mapping[str, Any]:
        if other not in cls.goes_with:
            return settings
        form = own.get("form", "grow")
        if isinstance(form, str) and form in FORMS and form != "grow":
            raise RecipeError(
                f"{where}: form: {form} has no new channels that {other} could remove: take form:"
                f" grow, or leave {other} out"
            )
        if settings.get("side") is not None:
            raise RecipeError(
                f"{where}: side: beside an adaptation, name the groups whose new channels may go"
                " instead, only: ['g_s.*']"
            )
        budget = settings.get("budget")
        budget = budget.model_dump() if isinstance(budget, Budget) else budget
        if not isinstance(budget, Mapping):
            return settings
        here = f"{where}: budget of the target domain, in shares of the source codec"
        return {**settings, "budget": parse(GrownBudget, budget, here)}

    def prunable(self) -> tuple[nn.Module, Groups, CostModel] | None:
        return self.form.prunable()

    def set_beside(self, methods: Sequence[Method]) -> None:
        self._pruners = [m for m in methods if m is not self and isinstance(m, Pruner)]
        if len(self._pruners) > 1:
            names = " and ".join(method.name for method in self._pruners)
            raise RecipeError(f"new channels are pruned by one method: leave out one of {names}")

    def _kept(self) -> dict[str, np.ndarray]:
        """Return the new channels that stay, for each group that loses some: those that a method
        chose, but for what is not read any more.
        """
        assert isinstance(self.form, Grow)
        (pruner,) = self._pruners
        groups = self.form.new_groups
        return read_channels(groups, groups.check(pruner.select()))

    def config_after_pruning(self) -> dict[str, Any]:
        if not self._pruners:
            return super().config_after_pruning()
        assert isinstance(self.form, Grow)
        left = {name: len(kept) for name, kept in self._kept().items()}
        return self.config.with_widths(self.form.added | left).model_dump()

    # -- the target domain ------------------------------------------------------------------------

    @property
    def adapts(self) -> bool:
        """True if the target domain is set."""
        return self.widths is not None and self.widths.now == TARGET

    def bare(self, value: Any) -> bool:
        return bool(value == SOURCE)

    @contextmanager
    def active(self, codec: nn.Module) -> Iterator[None]:
        """Compute in the domain that is set, inside the block."""
        if not self.adapts:
            yield
            return
        own: list[tuple[Any, Mapping[str, Any]]] = []
        if torch.is_grad_enabled():  # the source codec is frozen, in any training loop
            own = [
                (
                    module,
                    {name: p.detach() for name, p in module._parameters.items() if p is not None},
                )
                for module in codec.modules()
            ]
        with override_attributes(own), override_attributes(self.form.overrides(codec)):
            yield

    def attach(self, codec: nn.Module) -> None:
        if self.form.stays:
            hook = NarrowHook(self)
            codec.register_forward_pre_hook(hook.before)
            codec.register_forward_hook(hook, always_call=True)

    def detach(self, codec: nn.Module) -> None:
        remove_hooks(codec, lambda hook: hook.owner is self)

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        resize_tables(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)
        if self.widths is not None and bool(self.learnt):
            self.widths.now = TARGET

    # -- cost -------------------------------------------------------------------------------------

    def totals(self) -> Totals | None:
        return self._count()[0] if self.adapts else self.cost.totals()

    def by_transform(self) -> dict[str, tuple[int, int]]:
        return self._count()[1] if self.adapts else self.cost.by_transform()

    def _count(self) -> tuple[Totals, dict[str, tuple[int, int]]]:
        """Count the target domain, once: what it runs, and the parameters of both domains."""
        if not self._counted:
            twin = copy.deepcopy(self).requires_grad_(False)
            twin.codec.requires_grad_(False)
            twin.widths.now = TARGET
            with without_hooks(twin), twin.active(twin.codec):
                counts = count_modules(twin.codec)
            model = CostModel(twin.codec, Groups([]), counts)
            own = sum(p.numel() for p in self.form.parameters())
            totals = model.totals()
            by_transform = model.by_transform()
            macs, params = by_transform.get("other", (0, 0))
            by_transform["other"] = (macs, params + own)
            self._counted = [(replace(totals, params=totals.params + own), by_transform)]
        return self._counted[0]

    # -- learning ---------------------------------------------------------------------------------

    def trains(self, name: str) -> bool:
        return self.form.trains(name)

    def default_in_training(self) -> dict[str, Any]:
        return {"domain": TARGET} if self.widths is not None else {}

    def widths_per_step(self) -> list[int]:
        return [TARGET] if self.widths is not None else []

    def after_step(self) -> None:
        self.step += 1
        self.learnt.fill_(True)

    @property
    def steps_left(self) -> int:
        return max(0, self.config.adapt_steps - int(self.step))

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    def aux_loss(self) -> Tensor | None:
        return self.form.aux_loss()

    def update(self, force: bool = False) -> None:
        self.form.update(force)

    # -- afterwards -------------------------------------------------------------------------------

    def check_ready(self) -> None:
        if not self.done:
            raise TrainingError(f"the codec still adapts: {self.steps_left} steps are left")
        if self.form.stays and _digest(self.codec) != self._source:
            raise TrainingError(
                "the source codec has changed since the adaptation was attached, and no longer"
                " reads its files: train with fit, or with domain= the target"
            )

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, Adaptation)
        expected: list[Tensor] = []
        if self._pruners:
            assert isinstance(self.form, Grow)
            kept = self._kept()
            mask_channels(self.form.new, kept, self.form.new_groups)
            expected = trace_target(self.codec, self.form)
            remove_new_channels(self.form.new, self.form.new_groups, kept)
        other.load_state_dict(self.state_dict())
        other.widths.now = self.widths.now
        if expected:
            found = apart([expected, trace_target(other.codec, other.form)])
            if not found <= TOLERANCE:
                raise SurgeryError(
                    f"the new channels that are left are not those that were masked: they differ by"
                    f" {found:.1e} (at most {TOLERANCE:.0e} is allowed)"
                )


def _digest(codec: nn.Module) -> str:
    """Return a hash of what a codec holds, but for its CDF tables."""
    digest = hashlib.sha256()
    for name, value in codec.state_dict().items():
        if name.rpartition(".")[2] in CDF_BUFFERS:
            continue
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
