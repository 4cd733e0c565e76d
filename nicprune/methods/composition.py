"""A codec with the methods that are attached to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.calling import further_arguments
from nicprune.codecs.cdf import resize_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.gradient_free import drop_gradients, keep_gradients
from nicprune.codecs.hooks import ENDED, has_hooks, narrows
from nicprune.codecs.modes import left_as_it_was, modes_restored
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.recomputation import refuse_recomputation
from nicprune.common.errors import CodecError, DataError, RecipeError
from nicprune.common.wording import numbered
from nicprune.data.images import to_channels
from nicprune.methods.bitstream import Coding
from nicprune.methods.compatibility import check_disjoint
from nicprune.methods.contract import (
    METHODS,
    Distiller,
    Method,
    MultiWidth,
    Roles,
)
from nicprune.methods.hardening import Hardening
from nicprune.methods.loop_check import LoopCheck
from nicprune.methods.multi_width.lambda_schedule import mean_figures
from nicprune.methods.operating_point import Choice, OperatingPoint
from nicprune.methods.trained_part import TrainedPart
from nicprune.pruning.cost import CostModel
from nicprune.pruning.totals import Totals

if TYPE_CHECKING:
    from nicprune.data.clip_patches import ClipSampling
    from nicprune.methods.levels import Levels
    from nicprune.methods.widths import Widths


class Attached(Coding, Hardening, TrainedPart):
    """A codec with methods attached: the same forward pass, now prunable. It goes into any training
    loop.

    It also codes images as a codec does: `update`, `compress`, `decompress`.

    Attributes:
        codec: the codec itself, the object that was given; its state-dict keys are unchanged.
        methods: the attached methods, in order.
        roles: the methods by role.
    """

    wraps_codec = True

    def __init__(
        self, codec: nn.Module, methods: Sequence[Method], groups: Groups, cost: CostModel
    ):
        super().__init__()
        self.codec = codec
        self.methods = nn.ModuleList(methods)
        self._shared = (groups, cost)
        self.roles = Roles.of(methods)
        self._loop = LoopCheck()

    @classmethod
    def of(
        cls,
        codec: nn.Module,
        parsed: Sequence[tuple[type[Method], Any]],
        groups: Groups,
        cost: CostModel,
        teacher: nn.Module | None = None,
    ) -> Attached:
        """Attach methods of these classes and settings to a codec that has none.

        Raises:
            RecipeError: they do not fit the codec, each other or the teacher.
            BudgetError: a budget cannot be met.
        """
        # All is validated before the first hook is set, so that a failure leaves the codec as it
        # was.
        methods = _created(parsed, codec, groups, cost)
        for one in methods:
            one.set_beside(methods)
        check_disjoint(Roles.of(methods).pruners)
        learning = [method for method in methods if isinstance(method, Distiller)]
        if (teacher is None and len(learning) == len(methods) and provenance(codec).history) or (
            teacher is not None and not learning
        ):
            problem = (
                "learns from itself: give teacher=, the codec before pruning"
                if learning
                else "has no use for a teacher: attach distillation too"
            )
            raise RecipeError(f"{' + '.join(kind.name for kind, _ in parsed)} {problem}")
        for method in learning:
            method.set_teacher(frozen_copy(teacher if teacher is not None else codec))
        place = next(codec.parameters())
        attached = cls(codec, [m.to(place.device) for m in methods], groups, cost)
        attach_hooks(methods)
        return attached.in_mode(codec.training)

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
        """True if all methods are part of the codec when it codes, as gates and modulators are;
        false while masks still decay.
        """
        return all(method.stays for method in self._each)

    @property
    def levels(self) -> Levels | None:
        """The rates that the codec was trained for, with a modulator; else None."""
        modulator = self.roles.modulator
        return modulator.levels if modulator is not None else None

    @property
    def widths(self) -> Widths | None:
        """The widths of a slimmable codec or the levels of a scalable encoder; else None."""
        multi_width = self.roles.multi_width
        return multi_width.widths if multi_width is not None else None

    # -- operating points -------------------------------------------------------------------------

    @property
    def choices(self) -> list[Choice]:
        """The dimensions of operating points that the methods add, in the order of headers."""
        parts = (self.roles.multi_width, self.roles.modulator)
        return [found for part in parts if part is not None and (found := part.choice())]

    def point(self, **asked: Any) -> OperatingPoint:
        """Return the operating point that level, lmbda and width ask for.

        Without level and lmbda the rate is the highest; without width the width that is set.

        Raises:
            RecipeError: the codec does not have it.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        found = {}
        for choice in self.choices:
            own = {name: asked.pop(name) for name in choice.keywords if name in asked}
            found[choice.field] = choice.resolve(**own)
        refuse_keywords(asked)
        return OperatingPoint(**found)

    def _rate_point(self, level: float | None, lmbda: float | None) -> OperatingPoint:
        """Return the point of a rate, which only a modulator has, at the width that is set."""
        if self.roles.modulator is None:
            refuse_keywords(
                {k: v for k, v in (("level", level), ("lmbda", lmbda)) if v is not None}
            )
        return self.point(level=level, lmbda=lmbda)

    def set_point(self, point: OperatingPoint) -> None:
        """Code at this operating point from now on."""
        for choice in self.choices:
            choice.assign(getattr(point, choice.field))

    def operating_points(self, between: int = 0) -> list[OperatingPoint]:
        """Return all operating points, with so many rates between each two trained ones."""
        choices = self.choices
        values = itertools.product(*[choice.points(between) for choice in choices])
        fields = [choice.field for choice in choices]
        return [OperatingPoint(**dict(zip(fields, each, strict=True))) for each in values]

    def lmbda_at(self, point: OperatingPoint) -> float | None:
        """Return the lambda that an operating point was trained with, where it has its own."""
        for part in (self.roles.modulator, self.roles.multi_width):
            choice = part.choice() if part is not None else None
            value = getattr(point, choice.field) if choice is not None else None
            if part is not None and value is not None:
                return part.lmbda_at(value)
        return None

    def bare_at(self, point: OperatingPoint) -> nn.Module | None:
        """Return a plain copy of the codec where, at an operating point, it computes as it does
        without its methods; else None.
        """
        part = self.roles.multi_width
        if part is None or (choice := part.choice()) is None or len(self._each) > 1:
            return None
        return copy_codec(self).detach() if part.bare(getattr(point, choice.field)) else None

    @property
    def replay(self) -> float:
        """Fraction of each training batch that is of source images."""
        return self.roles.multi_width.replay if self.roles.multi_width is not None else 0.0

    def set_width(self, width: int | None) -> None:
        """Set the width of a slimmable codec, 0 being the widest, or the level of a scalable
        encoder; None leaves it as it is.

        Raises:
            RecipeError: it has no such width, or only one.
        """
        if width is not None:
            self.set_point(self.point(width=width))

    @contextmanager
    def at_width(self, width: int) -> Iterator[Attached]:
        """Set a width inside a block."""
        before = [choice.now for choice in self.choices]
        self.set_width(width)
        try:
            yield self
        finally:
            for choice, value in zip(self.choices, before, strict=True):
                choice.now = value

    def forward(
        self,
        x: Tensor,
        *args: Any,
        level: Any = None,
        lmbda: float | None = None,
        width: int | None = None,
        domain: str | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the codec's forward pass.

        Args:
            x: images, (B, 3, H, W) in [0, 1]; with a temporal model also clips, (B, T, 3, H, W).
            level, lmbda: with a modulator, the rate, as a position among the trained ones (0 to
                count - 1, in between too) or as a lambda between them. Without either: the highest
                rate; in training, one drawn for each image. With a scalable encoder, level is 0 for
                the first encoder alone, up to all of them, or "best" for the one of the least
                rate-distortion cost, image by image.
            width: with a slimmable codec, the width that is set from now on.
            domain: with an adaptation, the domain that is set from now on, by name; in training,
                the target if not given.
        """
        asked = {"level": level, "lmbda": lmbda, "width": width, "domain": domain}
        if (
            self.training
            and self.roles.multi_width is not None
            and width is None
            and domain is None
        ):
            asked |= self.roles.multi_width.default_in_training()
        self.set_point(self.point(**asked))
        if self.training:
            self._loop.ran(self.widths.now if self.widths is not None else None)
            for parameter in self._fixed():  # zero_grad(set_to_none=False) leaves one of zeros
                parameter.grad = None
        if self.training and self._drops_gradients and torch.is_grad_enabled():
            drop_gradients(self._untrained())
        if self.levels is not None and self.training and level is None and lmbda is None:
            self.levels.draw(x.shape[0], x.device)
        if x.dim() == 5:
            return _uncompiled(self._forward_clips, x)
        if not args and not kwargs:
            kwargs = further_arguments(self.codec, x, "forward")
        if narrows(self.codec):
            return _uncompiled(self.codec, x, *args, **kwargs)
        return self.codec(x, *args, **kwargs)

    def _forward_clips(self, clips: Tensor) -> dict[str, Any]:
        temporal = self.roles.temporal
        if temporal is None:
            raise RecipeError("clips, (B, T, 3, H, W), need a temporal model: attach one")
        with self.active():
            output = temporal.forward_clips(self.codec, clips)
        if self.widths is not None:
            refuse_recomputation(self, output, ENDED)
        return output

    def aux_loss(self) -> Tensor:
        """Return the codec's auxiliary loss (that of its quantiles)."""
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

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        resize_tables(self, state, prefix)  # made in one of the two, perhaps not in the other
        super()._load_from_state_dict(state, prefix, *args)

    def objective(
        self, out: Mapping[str, Any], x: Tensor, metric: str = "mse"
    ) -> dict[str, Tensor] | None:
        """Return the rate-distortion loss where a method has its own (one lambda for each image):
        {"loss", "mse_loss", "bpp_loss"}; else None. Of clips, x are the frames, (B * T, 3, H, W).
        """
        if "x_hat" not in out and self.roles.temporal is not None:
            return self.roles.temporal.objective(out, x)
        for method in (self.roles.modulator, self.roles.multi_width):
            if method is not None and (found := method.objective(out, x, metric)) is not None:
                return found
        return None

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """Return the methods' extra loss terms, to be added to the rate-distortion loss."""
        if "x_hat" not in out:  # nothing is decoded where the temporal model alone learns
            return x.new_zeros(())
        return torch.stack([method.loss(out, x) for method in self._each]).sum()

    def after_step(self) -> None:
        """Update what the methods learn; call after `optimizer.step()`.

        Raises:
            TrainingError: a step of a slimmable codec or a scalable encoder did not run each of
                `widths_per_step`; or some steps in a row left no gradient of masks or thresholds,
                which follow theirs.
        """
        self._loop.check_step(self, self._each, self.roles.multi_width)
        for method in self._each:
            method.after_step()

    @property
    def done(self) -> bool:
        """True once every method is done."""
        return all(method.done for method in self._each)

    @property
    def steps_left(self) -> int:
        """Training steps until all methods are done."""
        return max(method.steps_left for method in self._each)

    @property
    def own_lambdas(self) -> bool:
        """True if the codec is trained by lambdas of a method, not by that of `fit`."""
        return any(method.own_lambdas for method in self._each)

    def set_objective(self, lmbda: float, metric: str = "mse") -> None:
        """Tell methods what the training loop weighs the distortion by, and its metric. `fit` does;
        in a loop of one's own both are the codec's, unless this is called.

        Raises:
            RecipeError: a method cannot learn by them.
        """
        for method in self._each:
            method.set_objective(lmbda, metric)

    def metrics(self) -> dict[str, float]:
        """Return the methods' numbers for logs, prefixed by the method: `mask_decay/macs`; the
        second of its name by `mask_decay 2`.
        """
        return {
            f"{key}/{name}": value
            for key, method in zip(numbered([m.name for m in self._each]), self._each, strict=True)
            for name, value in method.metrics().items()
        }

    @property
    def sampling(self) -> ClipSampling | None:
        """The frames of training clips, where methods learn from clips; else None."""
        temporal = self.roles.temporal
        return temporal.sampling if temporal is not None else None

    @property
    def examines_images(self) -> bool:
        """True if a method looks at the images that `prepare` is given."""
        return any(method.examines_images for method in self._each)

    def prepare(self, images: Sequence[Tensor]) -> None:
        """Let methods examine images before training, (1, 3, H, W) in [0, 1] with sides that are
        multiples of 64, or of the codec's stride.

        Raises:
            DataError: there is none, or they are of another shape.
        """
        if not len(images):
            raise DataError("methods examine images before training: give at least one")
        images = self._here(images)
        for method in self._each:
            with ExitStack() as stack:  # the codec is run to look at it: nothing else learns
                for other in self._each:
                    if other is not method:
                        stack.enter_context(left_as_it_was(other))
                method.prepare(self.codec, images)

    def widths_per_step(self) -> list[int]:
        """Return the widths that one training step goes through; none for a codec of one width."""
        multi_width = self.roles.multi_width
        found = multi_width.widths_per_step() if multi_width is not None else []
        self._loop.asked(found)
        return found

    @property
    def scheduled(self) -> bool:
        """True if a schedule of lambdas looks at validation images during training."""
        return self.roles.multi_width is not None and self.roles.multi_width.scheduled

    @property
    def wants_validation(self) -> bool:
        """True if `validate` is due."""
        multi_width = self.roles.multi_width
        return multi_width is not None and multi_width.wants_validation

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor]) -> None:
        """Measure estimated bpp and PSNR of each width on images, for a schedule of lambdas."""
        multi_width = self.roles.multi_width
        if multi_width is None or self.widths is None:
            return
        before, images = self.widths.now, self._here(images)
        try:
            with modes_restored(self):
                self.eval()
                figures = [
                    mean_figures(self, images, width=width) for width in range(len(self.widths))
                ]
        finally:
            self.widths.now = before
        multi_width.on_validation(figures)

    def totals(self) -> Totals:
        """Return the cost at the operating point that is set, with the methods' own parameters
        where they are in use.
        """
        found = next(
            (totals for part in self.roles.parts if (totals := part.totals()) is not None), None
        )
        if found is not None:
            return found
        now = self.cost.totals()
        return replace(now, params=now.params + sum(p.numel() for p in self.methods.parameters()))

    def by_transform(self) -> dict[str, tuple[int, int]]:
        """Return (MACs at 64x64, params) of each transform at the operating point that is set."""
        multi_width = self.roles.multi_width
        return (multi_width or self.cost).by_transform()

    def calibrate(self, images: Sequence[Tensor]) -> None:
        """Adjust to whole images, (1, 3, H, W) in [0, 1], what was learnt on patches. Sides as in
        `prepare`.
        """
        self.set_point(self.point())
        images = self._here(images)
        for method in self.roles.gating:
            method.calibrate(self.codec, images)

    def _here(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return images on the codec's device, where `fit` may have left it, with its channels."""
        device = next(self.codec.parameters()).device
        channels, multiple = image_shape(self.codec)[0], size_multiple(self.codec)
        for image in images:
            if image.dim() != 4:
                raise DataError(
                    f"images are tensors of shape (1, {channels}, H, W), in a list (got one of"
                    f" {tuple(image.shape)})"
                )
            if any(side % multiple for side in image.shape[-2:]):
                height, width = image.shape[-2:]
                raise DataError(
                    f"images must have sides that are multiples of {multiple} pixels (got"
                    f" {height}x{width}): calibration_images(folder, multiple={multiple})"
                )
        return [to_channels(image, channels).to(device) for image in images]

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return the cost of the last image where it depends on it; see `Gating.image_cost`."""
        return next(
            (cost for method in self.roles.gating if (cost := method.image_cost()) is not None),
            None,
        )

    def set_teacher(self, teacher: nn.Module) -> None:
        """Give a teacher to methods that remained on a codec loaded from its file."""
        for method in self.roles.taught:
            method.set_teacher(frozen_copy(teacher))

    def attach_again(self) -> None:
        """Set every hook on the codec again, after `detach`.

        Raises:
            CodecError: these methods, or others, have hooks on it.
        """
        if any(has_hooks(method.codec) for method in self._each):
            raise CodecError("methods are attached already; attach_again() follows detach()")
        attach_hooks(self._each)

    def detach(self) -> nn.Module:
        """Remove every hook and return the original object, as it is now."""
        self._unfreeze_statistics()
        for method in self._each:
            method.detach(method.codec)
        keep_gradients(self.parameters())
        return self.codec


def _called(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)


_uncompiled: Callable[..., Any] = torch.compiler.disable(_called)
"""Calls a codec outside torch.compile, which does not see what a method puts in front of layers'
parameters.
"""


def frozen_copy(codec: nn.Module) -> nn.Module:
    """Return a plain copy of a codec that does not learn."""
    check_codec(codec)
    if has_hooks(codec):
        raise CodecError("the teacher has a method attached; give a plain codec")
    twin = copy_codec(codec).eval().requires_grad_(False)
    set_provenance(twin, provenance(codec).copy())
    return twin


def refuse_keywords(asked: Mapping[str, Any]) -> None:
    """Raise RecipeError if level, lmbda or width are given where the codec has only one."""
    if "width" in asked:
        raise RecipeError("width needs a slimmable codec: attach slimmable")
    if "domain" in asked:
        raise RecipeError(
            f"the codec has no domain {asked['domain']!r}: domains need an adaptation (attach"
            " adaptation, or load_adaptation)"
        )
    if asked:
        names = ", ".join(name for name in METHODS if METHODS[name].rates_field)
        raise RecipeError(f"level and lmbda need a modulator: attach one of {names}")


def attach_hooks(methods: Sequence[Method]) -> None:
    """Set the hooks of methods, on the codec and on each other's layers."""
    for method in sorted(methods, key=lambda one: one.attach_last):
        method.attach(method.codec)


def _created(
    parsed: Sequence[tuple[type[Method], Any]], codec: nn.Module, groups: Groups, cost: CostModel
) -> list[Method]:
    """Return the methods, in their order. Where one has layers that others prune in place of the
    codec, these are created for them.
    """
    subject: tuple[nn.Module, Groups, CostModel] = (codec, groups, cost)
    created: dict[int, Method] = {}
    first = sorted(range(len(parsed)), key=lambda n: not issubclass(parsed[n][0], MultiWidth))
    for number in first:
        cls, settings = parsed[number]
        created[number] = method = cls(*subject, settings)
        if isinstance(method, MultiWidth):
            subject = method.prunable() or subject
    return [created[number] for number in range(len(parsed))]
