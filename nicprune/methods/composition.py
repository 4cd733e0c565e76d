"""How methods are attached to a codec, and what can be done with the two."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups, removed_inputs
from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.common.config import parse
from nicprune.common.errors import CodecError, RecipeError
from nicprune.methods.bitstream import Coding
from nicprune.methods.contract import METHODS, Distiller, Method, Pruner, Roles
from nicprune.methods.multi_width.lambda_schedule import mean_figures
from nicprune.pruning.cost import CostModel, Totals
from nicprune.pruning.surgery import analyse, prune

if TYPE_CHECKING:
    from nicprune.methods.levels import Levels, Widths


class Attached(Coding):
    """A codec with methods attached: the same forward pass, now prunable. Drops into any training
    loop.

    Where a method stays (gates, modulators), this is also what codes images: `update`, `compress`,
    `decompress`, as with a codec.

    Attributes:
        codec: the codec itself, the very object that was given; its state-dict keys are unchanged.
        methods: what is attached, in order.
        roles: the methods by what they are.
    """

    def __init__(
        self, codec: nn.Module, methods: Sequence[Method], groups: Groups, cost: CostModel
    ):
        super().__init__()
        self.codec = codec
        self.methods = nn.ModuleList(methods)
        self._shared = (groups, cost)
        self.roles = Roles.of(methods)

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

    @property
    def stays(self) -> bool:
        """Whether all that is attached is part of the codec when it codes (gates, modulators);
        false while masks still decay.
        """
        return all(method.stays for method in self._each)

    @property
    def levels(self) -> Levels | None:
        """The rates that the codec was trained for, if a modulator is attached."""
        modulator = self.roles.modulator
        return modulator.levels if modulator is not None else None

    @property
    def widths(self) -> Widths | None:
        """The widths that a slimmable codec has, and which is set."""
        multi_width = self.roles.multi_width
        return multi_width.widths if multi_width is not None else None

    def set_width(self, width: int | None) -> None:
        """Let a slimmable codec be of one of its widths from now on, 0 being the widest, or a
        scalable encoder code at one of its levels; None leaves it as it is.

        Raises:
            RecipeError: it has no such width, or only one.
        """
        if self.widths is not None:
            self.widths.set(width)
        elif width is not None:
            raise RecipeError("width needs a slimmable codec: attach slimmable")

    def _point(self, level: Any, width: int | None) -> tuple[Any, int | None]:
        """A scalable encoder's levels are its widths."""
        return (
            (None, level)
            if level is not None
            and width is None
            and self.widths is not None
            and self.widths.word == "level"
            else (level, width)
        )

    @contextmanager
    def at_width(self, width: int) -> Iterator[Attached]:
        """The same inside a block."""
        before = self.widths.now if self.widths is not None else None
        self.set_width(width)
        try:
            yield self
        finally:
            if self.widths is not None:
                self.widths.now = before

    def forward(
        self,
        x: Tensor,
        *args: Any,
        level: Any = None,
        lmbda: float | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The codec's forward pass.

        Args:
            level, lmbda: with a modulator, which rate to code at, as a position among the trained
                ones (0 to count - 1, in between too) or as a lambda between them. Without either:
                the highest rate; in training, one drawn for each image.
            width: with a slimmable codec, which of its widths is set from now on. With a scalable
                encoder, level is: 0 for the first encoder alone, up to all of them, or "best" for
                the one of the least rate-distortion cost, image by image.
        """
        level, width = self._point(level, width)
        self.set_width(width)
        if self.levels is not None and self.training and level is None and lmbda is None:
            self.levels.draw(x.shape[0], x.device)
        else:
            self._set(level, lmbda)
        return self.codec(x, *args, **kwargs)

    def _set(self, level: float | None, lmbda: float | None) -> None:
        if self.levels is not None:
            self.levels.set(level, lmbda)
        elif level is not None or lmbda is not None:
            raise RecipeError(
                "level and lmbda need a modulator: attach one of "
                + ", ".join(name for name in METHODS if METHODS[name].modulates)
            )

    def aux_loss(self) -> Tensor:
        """The codec's auxiliary loss (its quantiles')."""
        codec: Any = self.codec
        own = [loss for part in self.roles.parts if (loss := part.aux_loss()) is not None]
        return sum(own, start=codec.aux_loss())

    def update(self, *args: Any, **kwargs: Any) -> bool:
        """Update the codec's CDF tables."""
        codec: Any = self.codec
        for part in self.roles.parts:
            part.update(force=bool(args[1] if len(args) > 1 else kwargs.get("force", False)))
        updated: bool = codec.update(*args, **kwargs)
        return updated

    def objective(
        self, out: Mapping[str, Any], x: Tensor, metric: str = "mse"
    ) -> dict[str, Tensor] | None:
        """The rate-distortion loss where a method brings its own (one lambda for each image):
        {"loss", "mse_loss", "bpp_loss"}; else None.
        """
        for method in (self.roles.modulator, self.roles.multi_width):
            if method is not None and (found := method.objective(out, x, metric)) is not None:
                return found
        return None

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

    def metrics(self) -> dict[str, float]:
        """The methods' numbers for logs, each behind the name of its method: `mask_decay/macs`."""
        return {
            f"{method.name}/{name}": value
            for method in self._each
            for name, value in method.metrics().items()
        }

    def manually_updated(self) -> list[nn.Parameter]:
        """Parameters that an optimiser need not (but may) be given."""
        return [p for method in self._each for p in method.manually_updated()]

    def prepare(self, images: Sequence[Tensor]) -> None:
        """Let methods look at photographs before training, (1, 3, H, W) in [0, 1] with sides that
        are multiples of 64.
        """
        images = self._here(images)
        for method in self._each:
            method.prepare(self.codec, images)

    def widths_per_step(self) -> list[int]:
        """The widths that one training step goes through; none for a codec of one width."""
        multi_width = self.roles.multi_width
        return multi_width.widths_per_step() if multi_width is not None else []

    @property
    def wants_validation(self) -> bool:
        """Whether `validate` is due."""
        multi_width = self.roles.multi_width
        return multi_width is not None and multi_width.wants_validation

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor]) -> None:
        """Measure estimated bpp and PSNR of each width on photographs, for what depends on them:
        the schedule of lambdas.
        """
        multi_width = self.roles.multi_width
        if multi_width is None or self.widths is None:
            return
        before, training = self.widths.now, self.training
        self.eval()
        figures = [mean_figures(self, images, width=width) for width in range(len(self.widths))]
        self.train(training)
        self.widths.now = before
        multi_width.on_validation(figures)

    def totals(self) -> Totals:
        """What the codec costs as it is set now, methods' own parameters included where they are at
        work.
        """
        found = next(
            (totals for part in self.roles.parts if (totals := part.totals()) is not None), None
        )
        if found is not None:
            return found
        now = self.cost.totals()
        return replace(now, params=now.params + sum(p.numel() for p in self.methods.parameters()))

    def calibrate(self, images: Sequence[Tensor]) -> None:
        """Settle on whole images, (1, 3, H, W) in [0, 1] with sides that are multiples of 64, what
        was learnt on patches.
        """
        self._set(None, None)
        images = self._here(images)
        for method in self.roles.gating:
            method.calibrate(self.codec, images)

    def _here(self, images: Sequence[Tensor]) -> list[Tensor]:
        """On the codec's device, where `fit` may have left it."""
        device = next(self.codec.parameters()).device
        return [image.to(device) for image in images]

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """What the last image cost where that depends on the image; see `Gating.image_cost`."""
        return next(
            (cost for method in self.roles.gating if (cost := method.image_cost()) is not None),
            None,
        )

    def keep(self) -> dict[str, list[int]]:
        """The keep-lists that `harden` would use now."""
        merged: dict[str, set[int]] = {}
        for method in self.roles.pruners:
            for name, kept in method.select().items():
                # Where methods have nothing in common, one channel stays all the same.
                merged[name] = (
                    (merged[name] & set(kept) or {min(kept)}) if name in merged else set(kept)
                )
        return {name: sorted(kept) for name, kept in merged.items()}

    def plain(self, *, level: float | None = None, lmbda: float | None = None) -> nn.Module:
        """Return a plain copy of the codec at full width, what was learnt folded into its weights
        (a modulator's rate too).
        """
        self._set(level, lmbda)
        return self._folded(self.roles.pruners)[0]

    def _folded(self, which: Sequence[Pruner]) -> tuple[nn.Module, Attached]:
        """A copy of the codec with nothing on it, these methods folded into its weights; and the
        copy's methods, taken off.
        """
        # A modulator's bias first: a mask takes it away from the channels that go.
        chosen = sorted(
            (self._each.index(method) for method in which),
            key=lambda number: not self._each[number].modulates,
        )
        twin = copy.deepcopy(self)
        codec = twin.detach()
        for number in chosen:
            method = cast("Pruner", twin._each[number])
            for (layer, side), factor in method.weight_factors(codec).items():
                for other in twin.roles.parts:
                    if other is not method:
                        other.on_rescale(layer, side, factor)
            method.fold(codec)
        set_provenance(codec, provenance(self.codec).copy())
        return codec, twin

    def extract(self, width: int, *, verify: bool = True) -> nn.Module:
        """One width of a slimmable codec as a plain codec of its own, by surgery; the slimmable
        codec stays as it is.

        Raises:
            RecipeError: it has no such width, or only one.
        """
        method = self.roles.multi_width
        if method is None or not method.slims:
            raise RecipeError("extract needs a slimmable codec: attach slimmable")
        with self.at_width(width):
            method.extracting = width
            try:
                small: nn.Module = self.harden(verify=verify)
                return small
            finally:
                method.extracting = None

    def harden(
        self, *, verify: bool = True, level: float | None = None, lmbda: float | None = None
    ) -> Any:
        """Return a smaller codec: the decision made, masks folded in, channels removed, the result
        verified.

        It is plain, unless gates or a modulator stay on it: then it is attached again, on smaller
        layers. With `level` or `lmbda` a modulator is folded into the weights, at this rate. The
        attached codec itself stays as it is.

        Raises:
            TrainingError: a method has not decided yet.
            SurgeryError: the result is not the same function as the masked codec.
        """
        for method in self.roles.pruners:
            method.check_ready()
        fixed = level is not None or lmbda is not None
        self._set(level, lmbda)
        staying = [
            part
            for part in self.roles.parts
            if part.stays
            and not (fixed and part is self.roles.modulator)
            and getattr(part, "extracting", None) is None
        ]
        keep = self.keep()
        # A gate that stays has a say in what goes, too: GDN must make up for it.
        wide, twin = self._folded(
            [m for m in self.roles.pruners if m not in staying or not m.modulates]
        )
        record = provenance(wide)
        if not record.original:
            record.original = self.cost.original.as_dict()
        small = prune(wide, keep, self.groups, verify=verify)
        totals = self.cost.totals(keep)
        entry = {
            "methods": [{"name": m.name, **m.config.model_dump(mode="json")} for m in self._each],
            "widths": {name: [self.groups[name].width, len(kept)] for name, kept in keep.items()},
            "removed_inputs": removed_inputs(self.groups, keep),
            "macs_before": self.cost.totals().macs,
            "macs_after": totals.macs,
            "params_after": totals.params,
            "verified": provenance(small).verified if verify else "",
        }
        if staying:
            entry["stays"] = [m.name for m in staying]
        sides = {getattr(m.config, "side", None) for m in self._each if not m.teaches}
        if len(sides) == 1 and None not in sides:  # fine-tuning leaves the other side alone, too
            entry["side"] = sides.pop()
        provenance(small).history.append(entry)
        if twin.roles.multi_width is not None:
            twin.roles.multi_width.finalize(small)
        small = small.train(self.codec.training)
        if not staying:
            return small
        again = attach(small, [(m.name, m.config_after_pruning()) for m in staying])
        for part, other in zip(staying, again._each, strict=True):
            twin.roles.parts[self.roles.parts.index(part)].transfer_to(other, keep)
        return again.train(self.codec.training)

    def set_teacher(self, teacher: nn.Module) -> None:
        """Give a codec to learn from to methods that remained on a codec loaded from its file."""
        for method in self.roles.taught:
            method.set_teacher(frozen_copy(teacher))

    def hang(self) -> None:
        """Put every hook on the codec again, behind `detach`."""
        _hang(self._each, self.codec)

    def detach(self) -> nn.Module:
        """Take everything off again and return the original object, as it is now."""
        for method in self._each:
            method.detach(self.codec)
        return self.codec


def frozen_copy(codec: nn.Module) -> nn.Module:
    """A plain copy of a codec that does not learn."""
    check_codec(codec)
    if has_hooks(codec):
        raise CodecError("the teacher has a method attached; give a plain codec")
    twin = copy.deepcopy(codec).eval().requires_grad_(False)
    set_provenance(twin, provenance(codec).copy())
    return twin


def _hang(methods: Sequence[Method], codec: nn.Module) -> None:
    for method in sorted(methods, key=lambda one: one.narrows):
        method.attach(codec)


def attach(
    codec: nn.Module,
    method: str | Sequence[tuple[str, Mapping[str, Any]]],
    *,
    teacher: nn.Module | None = None,
    **config: Any,
) -> Attached:
    """Attach one method, or a list of (name, settings), to a codec. Its forward pass does not
    change.

    Args:
        codec: any `CompressionModel`, own classes included. It is not copied.
        method: a name from `nicprune list`, with its settings as keywords; or a list of (name,
            settings).
        teacher: for distillation: the codec that `codec` was pruned from. A copy of it is kept; of
            `codec` itself, if not given.

    Raises:
        CodecError: the codec cannot be analysed.
        RecipeError: a setting is unknown or out of range.
        BudgetError: the budget cannot be met.
    """
    if isinstance(codec, Attached):
        raise CodecError(
            "methods are attached to a codec already; harden() or detach() it first, or attach a"
            " list"
        )
    check_codec(codec)
    wanted = (
        [(method, config)]
        if isinstance(method, str)
        else [(name, dict(settings)) for name, settings in method]
    )
    if not wanted or (config and not isinstance(method, str)):
        raise RecipeError(
            "attach(codec, name, **settings) or attach(codec, [(name, settings), ...])"
        )
    parsed = [
        (METHODS[name], parse(METHODS[name].Config, settings, f"method {name!r}"))
        for name, settings in wanted
    ]
    modulators = [cls.name for cls, _ in parsed if cls.modulates]
    if len(modulators) > 1:
        raise RecipeError(f"a codec has one modulator; {' and '.join(modulators)} were asked for")
    alone = [cls.name for cls, _ in parsed if cls.alone]
    if modulators and any(cls.teaches for cls, _ in parsed):
        raise RecipeError(
            f"a teacher codes at one rate, {modulators[0]} at many: leave one of them out"
        )
    if alone and len(parsed) > 1:
        raise RecipeError(
            f"{alone[0]} goes alone: harden the others first, or attach them to one of its widths"
            " (extract)"
        )
    if has_hooks(codec):
        raise RecipeError(
            "the codec has a method attached already; harden() or detach() it first, or attach a"
            " list"
        )
    groups = analyse(codec)
    cost = CostModel(codec, groups)
    # Everything is validated before the first hook is set: a failure leaves the codec as it was.
    methods = [cls(codec, groups, cost, settings) for cls, settings in parsed]
    learning = [method for method in methods if isinstance(method, Distiller)]
    if (teacher is None and len(learning) == len(methods) and provenance(codec).history) or (
        teacher is not None and not learning
    ):
        told = (
            "learns from itself: give teacher=, the codec before pruning"
            if learning
            else "has no use for a teacher: attach distillation too"
        )
        raise RecipeError(f"{' + '.join(cls.name for cls, _ in parsed)} {told}")
    for method_ in learning:
        method_.set_teacher(frozen_copy(teacher if teacher is not None else codec))
    place = next(codec.parameters())
    attached = Attached(codec, [m.to(place.device) for m in methods], groups, cost)
    _hang(methods, codec)
    return attached.train(codec.training)
