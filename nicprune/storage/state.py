"""Fill a codec with a state dict, at its widths."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, check_finite, forward_for_analysis
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_operations import resize
from nicprune.codecs.modes import modes_restored
from nicprune.common.errors import CodecError, FileError
from nicprune.pruning.removal import follow_widths


def fill(codec: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Resize `codec` to the shapes of `state` and load its values.

    Args:
        hint: what to do where they do not fit, for the message.

    Raises:
        FileError: keys are missing or unknown, a value is not finite, or CDF tables are damaged;
            names the first ones.
    """
    own = codec.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    if missing or extra:
        told = "; ".join(
            f"{what} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unknown", extra))
            if keys
        )
        raise FileError(f"{where} does not fit {type(codec).__name__}: {told}{hint}")
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise FileError(f"{where}: {key} is not a tensor of plain values")
        if value.numel() * value.element_size() > max(1 << 20, value.untyped_storage().nbytes()):
            raise FileError(f"{where}: {key} is larger than what the file holds of it")
        if key.rpartition(".")[2] not in CDF_BUFFERS and value.dim() != own[key].dim():
            raise FileError(
                f"{where} does not fit {type(codec).__name__}: {key} has the shape"
                f" {tuple(value.shape)} instead of {tuple(own[key].shape)}{hint}"
            )
    resize(codec, state)
    # Not CompressionModel.load_state_dict, which wants CDF tables empty: they have their shapes
    # already.
    nn.Module.load_state_dict(codec, dict(state), strict=True)
    try:
        check_finite(codec)
    except CodecError as error:
        raise FileError(f"{where}: {error}") from None
    follow_widths(codec)
    try:
        with torch.no_grad(), modes_restored(codec):
            forward_for_analysis(codec.eval(), example_image(codec))
    except (RuntimeError, ValueError, IndexError, CodecError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(
            f"{where} does not fit {type(codec).__name__}: its layers' widths do not match"
            f" ({reason}){hint}"
        ) from None
