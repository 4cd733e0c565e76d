"""Frames of video as RGB, by PyAV (FFmpeg): the optional library, and the matrix of the conversion.

Video holds luma and chroma; codecs here take RGB. The matrix is the one that the file names. Many
name none: then BT.709 for 720 lines and more and BT.601 below, as players take it, since the one
is the matrix of HDTV and the other that of the smaller formats before it. Values are those of the
studio range (16 to 235) unless the file says that they fill 8 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nicprune.common.errors import DataError

HD_LINES = 720
"""Height from which on video without a named matrix is taken to be BT.709."""

BT709, BT601 = (1,), (5, 6)
"""Numbers of the matrices in ITU-T H.273."""

UNSPECIFIED = 2


def pyav() -> Any:
    """Return the module `av`.

    Raises:
        DataError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise DataError(
            "video files are read and written by PyAV: pip install 'nicprune[video]'"
        ) from None
    return av


def is_bt709(height: int, named: int = UNSPECIFIED) -> bool:
    """Return whether video of this height is BT.709 rather than BT.601; `named` is the number of
    the matrix that the file names.
    """
    return named in BT709 if named in (*BT709, *BT601) else height >= HD_LINES


def luma_weights(height: int, named: int = UNSPECIFIED) -> tuple[float, float]:
    """Return the weights of red and blue in luma: of BT.709, or of BT.601."""
    return (0.2126, 0.0722) if is_bt709(height, named) else (0.299, 0.114)


def to_rgb(frame: Any) -> Tensor:
    """Return a decoded frame of PyAV as uint8 RGB, shape (3, H, W)."""
    named = int(frame.colorspace)
    if named in (UNSPECIFIED, *BT709, *BT601):
        matrix = "ITU709" if is_bt709(frame.height, named) else "ITU601"
    else:
        matrix = None  # as the frame says: SMPTE 240M, BT.2020, RGB
    rgb = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation=_exactly())
    return torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1).contiguous()


def from_rgb(image: Tensor, pixel_format: str, named: int = UNSPECIFIED) -> Any:
    """Return a uint8 RGB image (3, H, W) as a frame of PyAV, with its matrix named.

    Args:
        pixel_format: FFmpeg's name, for example "yuv420p" or "rgb24".
        named: number of the matrix, as for `luma_weights`.
    """
    av = pyav()
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    frame = av.VideoFrame.from_ndarray(array, format="rgb24")
    matrix = "ITU709" if is_bt709(frame.height, named) else "ITU601"
    return frame.reformat(
        format=pixel_format,
        dst_colorspace=matrix,
        dst_color_range="MPEG",
        interpolation=_exactly(),
    )


def name_colours(context: Any, height: int, named: int = UNSPECIFIED) -> None:
    """Name the matrix and range of `from_rgb` in the stream that an encoder of PyAV writes."""
    context.colorspace = BT709[0] if is_bt709(height, named) else BT601[1]
    context.color_range = 1


def _exactly() -> Any:
    """Return the flags with which FFmpeg's scaler rounds well, alike on every processor."""
    from av.video.reformatter import Interpolation

    return (
        Interpolation.BICUBIC
        | Interpolation.FULL_CHR_H_INT
        | Interpolation.ACCURATE_RND
        | Interpolation.BITEXACT
    )
