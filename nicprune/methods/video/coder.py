"""Code the frames of a video one by one: I frames by the image codec, P frames given the latents of
the frame before.

Encoder and decoder keep the same y_hat. It is computed in float64 from whole numbers and the y_hat
before it, and means are rounded to a grid (see `codecs.temporal`), so that it is the same to the
bit wherever it is computed. g_a and g_s run in float32: their results never come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_codec, check_finite, unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.memory_format import fast_format, in_format
from nicprune.codecs.replaced_forward import own_forwards, replaced
from nicprune.codecs.roles import roles_of
from nicprune.codecs.temporal import TemporalEntropyNetwork, on_grid
from nicprune.common.errors import CodecError, FileError
from nicprune.methods.composition import Attached
from nicprune.methods.operating_point import Choice, OperatingPoint
from nicprune.methods.points import operating_points, resolve_point


class _Enough(BaseException):
    """The latents are known; not an error, so that nothing takes it for one."""


class FrameCoder:
    """A codec made ready for coding frames at one width; see `video_coder`.

    Attributes:
        widths: number of widths that the codec has.
        width: the one that frames are coded at, 0 the widest.
        point: header of each bitstream but for the width: the rate of a modulator, the target
            domain of an adaptation. The strings of frames do not hold it.
        predicts: whether it codes P frames by a temporal model; otherwise all frames are I frames.
    """

    def __init__(
        self, codec: nn.Module, width: int | None = None, point: Sequence[bytes] | None = None
    ):
        check_codes_frames(codec)
        attached = codec if isinstance(codec, Attached) else None
        temporal: Any = attached.roles.temporal if attached is not None else None
        found = resolve_point(codec, width=width)
        self.widths = max(1, len({p.width for p in operating_points(codec)}))
        self.width = found.width or 0
        model: Any = copy_codec(codec).float().eval().to(memory_format=torch.contiguous_format)
        check_finite(model)
        refresh_tables(model)
        widths = attached.widths if attached is not None else None
        if self.width and widths is not None and widths.field == "width":
            # The same but for rounding in g_a as in the codec of all widths; less memory and time.
            model = model.extract(self.width, verify=False).eval()
            found = resolve_point(model)
        if point is not None:
            found = _point_of_headers(model, found, point)
        self._network: TemporalEntropyNetwork | None = None
        if temporal is not None:
            self._network = model.roles.temporal.network_at(found.width or 0).double().eval()
        in_format(model, fast_format(model))
        headers = {
            choice.field: choice.write(getattr(found, choice.field)) for choice in _written(model)
        }
        self._rate = found.keywords()
        self._coder = Coder(model, point=self._rate)
        if self._coder.failure is not None:
            raise CodecError(
                f"{type(unwrap(codec)).__name__} cannot code an image: {self._coder.failure}"
            )
        self._headers = [[header] for header in headers.values() if header]
        self.point = [head for field, head in headers.items() if head and field != "width"]
        roles = roles_of(unwrap(model))
        if roles.analysis is None or roles.synthesis is None:
            raise CodecError(f"frames cannot be coded: {roles.reason}")
        self._analysis = unwrap(model).get_submodule(roles.analysis.module)
        self._synthesis = unwrap(model).get_submodule(roles.synthesis.module)
        self._latents: Tensor | None = None
        self._latents_alone = False
        # Before the coder's own hook, which converts what it is given.
        self._synthesis.register_forward_pre_hook(self._note, prepend=True)

    @property
    def predicts(self) -> bool:
        """True if P frames are coded by a temporal model; otherwise all frames are I frames."""
        return self._network is not None

    @property
    def accelerated(self) -> bool:
        """True if a backend runs transforms of the codec."""
        return bool(replaced(self._coder.model))

    @contextmanager
    def plain_arithmetic(self) -> Iterator[None]:
        """Inside the block, run every layer as it stands in the codec, by PyTorch and product by
        product, to count what frames cost.
        """
        with own_forwards(self._coder.model), self._coder.direct_convolutions():
            yield

    def _note(self, module: nn.Module, args: Any) -> None:
        self._latents = args[0]
        if self._latents_alone:
            raise _Enough

    @torch.no_grad()
    def compress(
        self, x: Tensor, previous: Tensor | None = None
    ) -> tuple[list[list[bytes]], Any, Tensor | None]:
        """Code one frame.

        Args:
            x: (1, 3, H, W) in [0, 1], sides multiples of the codec's stride.
            previous: y_hat of the frame before, as this or `decompress` returned it; None for an
                I frame.

        Returns:
            Strings, the shape that `decompress` is given, and y_hat, (1, M, h, w) in float64, for
            the next frame; None if all frames are I frames.
        """
        if previous is None or self._network is None:
            sent = self._coder.compress(x, **self._rate)
            strings = sent["strings"][len(self._headers) :]
            y_hat = self._latents_of(strings, sent["shape"], x) if self.predicts else None
            return strings, sent["shape"], y_hat
        with self._coder.coding():
            with self._active():
                y = self._analysis(x).double()
            self._check(previous, y.shape)
            return self._network.encode(y, previous)

    @torch.no_grad()
    def decompress(
        self, strings: Sequence[Any], shape: Any, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode one frame; return x_hat, (1, 3, H, W) in [0, 1], and y_hat.

        Args:
            strings, shape: what `compress` returned.
            previous: y_hat of the frame before; None for an I frame.

        Raises:
            FileError: they are not those of a P frame of this codec.
        """
        if previous is None or self._network is None:
            return self._intra(strings, shape)
        size = tuple(-(-side // 4) for side in previous.shape[-2:])
        whole = isinstance(shape, (list, tuple)) and tuple(shape) == size
        if not whole or len(strings) != 2 or any(len(one) != 1 for one in strings):
            raise FileError("these strings are not those of a P frame behind the frame before")
        with self._coder.coding():
            y_hat = self._network.decode(list(strings), size, previous)
            with self._active():
                x_hat = self._synthesis(y_hat.float())
        return x_hat.float().clamp(0, 1), y_hat

    def _intra(self, strings: Sequence[Any], shape: Any) -> tuple[Tensor, Tensor]:
        """Decode an I frame."""
        x_hat = self._coder.decompress([*self._headers, *strings], shape)
        return x_hat.clamp(0, 1), self._take_latents()

    def _latents_of(self, strings: Sequence[Any], shape: Any, like: Tensor) -> Tensor:
        """Return y_hat of an I frame, as the decoder has it, without its picture."""
        self._latents_alone = True
        try:
            self._coder.decompress([*self._headers, *strings], shape, like)
        except _Enough:
            pass
        finally:
            self._latents_alone = False
        return self._take_latents()

    def _take_latents(self) -> Tensor:
        assert self._latents is not None
        y_hat, self._latents = on_grid(self._latents.double()), None
        return y_hat

    def _active(self) -> Any:
        """Return the context of the width that frames are coded at."""
        model = self._coder.model
        if not isinstance(model, Attached):
            return nullcontext()
        model.set_point(model.point(**self._rate))
        return model.active()

    def _check(self, previous: Tensor, shape: torch.Size) -> None:
        if previous.shape != shape:
            raise CodecError(
                f"the frame before has latents of shape {tuple(previous.shape)}, this one"
                f" {tuple(shape)}: code an I frame where the size or the width changes"
            )


def check_codes_frames(codec: nn.Module) -> None:
    """Raise CodecError where frames cannot be coded: not a codec, or masks still decay on it."""
    check_codec(unwrap(codec))
    attached = codec if isinstance(codec, Attached) else None
    if attached is None and has_hooks(codec) or attached is not None and not attached.stays:
        raise CodecError(
            "this codec still has methods attached that only pruning ends: code frames with"
            " masked.harden()"
        )


def _written(model: Any) -> list[Choice]:
    """Return the dimensions of a codec's operating points that bitstreams say."""
    return [choice for choice in getattr(model, "choices", ()) if choice.in_bitstream]


def _point_of_headers(
    model: Any, found: OperatingPoint, headers: Sequence[bytes]
) -> OperatingPoint:
    """Return the operating point that headers say, at the width that is `found` already.

    Raises:
        FileError: they are not of this codec.
    """
    left: list[Any] = [[header] for header in headers]
    for choice in _written(model):
        # Files of earlier versions do not say the rate: it is the highest.
        if choice.field != "width" and (left or choice.field != "rate"):
            found = replace(found, **{choice.field: choice.take(left)})
    if left:
        raise FileError("it was coded at an operating point that this codec does not have")
    return found


def video_coder(
    codec: nn.Module, width: int | None = None, point: Sequence[bytes] | None = None
) -> FrameCoder:
    """Return what codes the frames of a video, one by one, with a codec at one of its widths.

    Args:
        codec: a codec with a temporal model on it, as `attach`, `harden`, `extract` or `load`
            return it; or any other codec, whose frames are all I frames. It is copied: changes made
            later do not count.
        width: with a slimmable codec, the width, 0 the widest; by default the one that is set.
        point: what `FrameCoder.point` said where the frames were coded; by default the highest rate
            and the domain that is set.

    Raises:
        CodecError: not a codec, it cannot code, or masks still decay on it.
        RecipeError: it has no such width.
        FileError: the codec has no such operating point.
    """
    return FrameCoder(codec, width, point)
