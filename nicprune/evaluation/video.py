"""Evaluation on clips, on real bitstreams: rate, PSNR, MS-SSIM and times, and what I frames and P
frames cost.

PSNR is the mean over frames, then over clips; so is bpp. *RGB*: over the three channels, rounded
to 8 bits. *YUV 6:1:1*: (6 PSNR_Y + PSNR_U + PSNR_V) / 8 in 4:2:0, as ITU-T's common test
conditions weight the planes; both images are converted from RGB, chroma averaged over 2x2 pixels
and all values rounded to 8 bits. The matrix is that which the clip's file names, of BT.601 and
BT.709; without, or with another, it goes by the size (see `data.video_frames`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.provenance import provenance
from nicprune.codecs.rans import recorded_symbols
from nicprune.common.errors import CodecError, DataError, RecipeError, enough_memory
from nicprune.common.machine import BUSY, others_share, processor_time
from nicprune.common.wording import counted
from nicprune.data.clips import Clip
from nicprune.data.images import to_channels
from nicprune.data.video_frames import UNSPECIFIED, luma_weights
from nicprune.evaluation.evaluate import clock
from nicprune.evaluation.memory import peak_bytes
from nicprune.evaluation.padding import crop, pad
from nicprune.evaluation.quality import psnr, string_bytes, structural_similarity
from nicprune.methods.video.coder import FrameCoder, video_coder

COUNTER = "torch.utils.flop_counter / 2"
"""Counter of the MACs of a frame: of all that coding it runs."""

MOST_DB = 100.0
"""PSNR of equal frames, so that means over frames are finite."""


@dataclass(frozen=True)
class ClipScore:
    """Scores of one clip.

    Attributes:
        name, frames, width, height, fps: of the clip, as far as it was coded.
        bpp: bits of the strings per pixel, mean over frames; bpp_intra, bpp_predicted: of I frames
            and of P frames alone, None where there are none.
        kbits: kbit/s of the strings.
        psnr_db, psnr_yuv_db: RGB, and YUV 6:1:1; psnr_y_db, psnr_u_db, psnr_v_db: by plane.
        ms_ssim: over RGB; None below 176 pixels a side.
        encode_s, decode_s: seconds a frame.
    """

    name: str
    frames: int
    width: int
    height: int
    fps: float
    bpp: float
    bpp_intra: float | None
    bpp_predicted: float | None
    kbits: float
    psnr_db: float
    psnr_yuv_db: float
    psnr_y_db: float
    psnr_u_db: float
    psnr_v_db: float
    ms_ssim: float | None
    encode_s: float
    decode_s: float


@dataclass(frozen=True)
class FrameCost:
    """Cost of one frame.

    Attributes:
        encode_kmac, decode_kmac: kMAC per pixel (of the padded frame) when encoding and decoding.
        encode_peak_bytes, decode_peak_bytes: peak size of the tensors alive meanwhile, weights and
            the latents of the frame before not counted; None of an accelerated codec, whose
            backend's memory is not torch's.
        width, height: size of the frame.
    """

    encode_kmac: float
    decode_kmac: float
    encode_peak_bytes: int | None
    decode_peak_bytes: int | None
    width: int
    height: int

    def memory(self) -> str:
        """Return the larger peak for a line of text; empty if it is not known."""
        if self.encode_peak_bytes is None or self.decode_peak_bytes is None:
            return ""
        return f", {max(self.encode_peak_bytes, self.decode_peak_bytes) / 1e6:.1f} MB"


@dataclass(frozen=True)
class VideoEvaluation:
    """A codec on a set of clips.

    Attributes:
        codec: its name.
        quality: as in the codec's provenance.
        setting: the width, or the setting of a classical codec, for tables; empty without.
        width: width of a slimmable codec.
        gop: frames in a group of pictures.
        clips: scores of each clip.
        intra, predicted: cost of I frames and P frames; None where there are none, and for
            classical codecs.
        device, threads: where it was evaluated.
        busy: fraction of the processor that other programs used meanwhile, None if unknown.
    """

    codec: str
    quality: int | None
    setting: str
    width: int | None
    gop: int
    clips: tuple[ClipScore, ...]
    intra: FrameCost | None
    predicted: FrameCost | None
    device: str
    threads: int
    busy: float | None

    def mean(self, what: str) -> float | None:
        """Return the mean of one score over the clips that have it; None if none has."""
        values = [v for clip in self.clips if (v := getattr(clip, what)) is not None]
        return sum(values) / len(values) if values else None

    def __str__(self) -> str:
        def mean(what: str, form: str) -> str:
            value = self.mean(what)
            return "-" if value is None else format(value, form)

        at = f" {self.setting}" if self.setting else ""
        structural = f"  MS-SSIM {mean('ms_ssim', '.4f')}" if self.mean("ms_ssim") else ""
        costs = "".join(
            f"  {name} {cost.encode_kmac:.2f} + {cost.decode_kmac:.2f} kMAC/pixel{cost.memory()}"
            for name, cost in (("I", self.intra), ("P", self.predicted))
            if cost is not None
        )
        loud = self.busy is not None and self.busy > BUSY
        busy = f", other programs used {self.busy:.0%} of the processor" if loud else ""
        frames = sum(clip.frames for clip in self.clips)
        return (
            f"{self.codec}{at}: {mean('psnr_db', '.3f')} dB RGB, {mean('psnr_yuv_db', '.3f')} dB"
            f" YUV 6:1:1 at {mean('bpp', '.4f')} bpp, {mean('kbits', '.1f')} kbit/s{structural}"
            f"  encode {1000 * (self.mean('encode_s') or 0):.1f} ms  decode"
            f" {1000 * (self.mean('decode_s') or 0):.1f} ms a frame{costs}"
            f"  [{counted(len(self.clips), 'clip')}, {counted(frames, 'frame')}, GOP {self.gop},"
            f" {self.device}, {counted(self.threads, 'thread')}{busy}]"
        )


def evaluate_video(
    codec: nn.Module,
    clips: Sequence[Clip],
    *,
    gop: int = 32,
    width: int | None = None,
    frames: int | None = None,
    progress: bool = False,
) -> VideoEvaluation:
    """Encode and decode every frame of clips with real bitstreams, those that `encode_video`
    writes. The rate is that of the strings, as for images: headers, digests and checksums of the
    file (some 20 bytes a frame) are not counted.

    Args:
        codec: as `encode_video` takes it. With gop=1 every frame is an I frame: the control of a
            codec that predicts frames.
        clips: from `clips_in`.
        gop: frames in a group of pictures: an I frame every so many.
        width: with a slimmable codec, the width; by default the one that is set.
        frames: number of frames of each clip, from the first; by default all.
        progress: show each frame on a terminal.

    Raises:
        CodecError: not a codec, masks still decay on it, or it does not decode what it encodes.
        RecipeError: it has no such width.
        DataError: there is no clip, or a frame cannot be read.
    """
    check_settings(clips, gop, frames)
    coder = video_coder(codec, width)
    bare = unwrap(codec)
    record, channels, multiple = provenance(bare), image_shape(bare)[0], size_multiple(bare)
    device = next(codec.parameters()).device
    before = processor_time()
    first = list(clips[0].frames(0, min(2, gop, len(clips[0]), frames or 2)))
    shown = [_input(frame, channels, device) for frame in first]
    intra, predicted = _costs(coder, shown, multiple)
    scores = []
    for number, clip in enumerate(clips, 1):
        score = _score(coder, clip, gop, channels, multiple, device, frames)
        scores.append(score)
        if progress and sys.stderr.isatty():
            print(f"{number}/{len(clips)} {clip.name}  {score.bpp:.4f} bpp", file=sys.stderr)
    return VideoEvaluation(
        record.name,
        record.quality,
        f"width {coder.width}" if coder.widths > 1 else "",
        coder.width if coder.widths > 1 else None,
        gop,
        tuple(scores),
        intra,
        predicted if gop > 1 else None,
        str(device),
        torch.get_num_threads(),
        others_share(before, processor_time()),
    )


def check_settings(clips: Sequence[Clip], gop: int, frames: int | None) -> None:
    """Raise DataError or RecipeError where there is nothing to code."""
    if not clips:
        raise DataError("no clips to evaluate on")
    if gop < 1 or (frames is not None and frames < 1):
        raise RecipeError(
            f"groups of pictures and clips have one frame or more (got {gop} and {frames})"
        )


@torch.no_grad()
def _score(
    coder: FrameCoder,
    clip: Clip,
    gop: int,
    channels: int,
    multiple: int,
    device: torch.device,
    frames: int | None,
) -> ClipScore:
    scores = FrameScores(clip)
    sent_latents: Tensor | None = None
    read_latents: Tensor | None = None
    encode_s = decode_s = 0.0
    for index, frame in enumerate(clip.frames(0, frames)):
        x = _input(frame, channels, device)
        padded, padding = pad(x, multiple)
        if index % gop == 0 or not coder.predicts:
            sent_latents = read_latents = None
        intra = sent_latents is None
        with enough_memory(f"coding a frame of {clip.width}x{clip.height} pixels"):
            started = clock(device)
            with recorded_symbols() as written:
                strings, shape, sent_latents = coder.compress(padded, sent_latents)
            encoded = clock(device)
            with recorded_symbols() as read:
                x_hat, read_latents = coder.decompress(strings, shape, read_latents)
            decoded = clock(device)
        if written.digest(strings) != read.digest(strings):
            raise CodecError(f"{clip.name}, frame {index}: the codec decodes other symbols")
        if not bool(torch.isfinite(x_hat).all()):
            raise CodecError(f"{clip.name}, frame {index} is decoded to values that are not finite")
        encode_s, decode_s = encode_s + encoded - started, decode_s + decoded - encoded
        picture = _picture(crop(x_hat, padding))
        scores.add(_picture(x), picture, 8 * string_bytes(strings), intra=intra)
    return scores.result(encode_s, decode_s)


def _input(frame: Tensor, channels: int, device: torch.device) -> Tensor:
    """Return a frame as a codec takes it, (1, C, H, W) in [0, 1], not padded."""
    return to_channels(frame, channels).unsqueeze(0).to(device).float().div(255)


def _picture(x: Tensor) -> Tensor:
    """Return (1, 3, H, W) in [0, 1], rounded to 8 bits, on the CPU."""
    return x.cpu().clamp(0, 1).mul(255).round().div(255).expand(-1, 3, -1, -1)


class FrameScores:
    """Scores of the frames of a clip as they come, and their means."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self._each: list[dict[str, Any]] = []

    def add(self, reference: Tensor, decoded: Tensor, bits: int, *, intra: bool) -> None:
        """Add a frame: two images (1, 3, H, W) in [0, 1], and the bits of its strings."""
        y, u, v = (min(MOST_DB, plane) for plane in yuv_psnr(reference, decoded, self._clip.matrix))
        pixels = reference.shape[-2] * reference.shape[-1]
        self._each.append(
            {
                "bpp": bits / pixels,
                "bpp_intra": bits / pixels if intra else None,
                "bpp_predicted": None if intra else bits / pixels,
                "psnr_db": min(MOST_DB, psnr(reference, decoded)),
                "psnr_yuv_db": (6 * y + u + v) / 8,
                "psnr_y_db": y,
                "psnr_u_db": u,
                "psnr_v_db": v,
                "ms_ssim": structural_similarity(reference, decoded),
            }
        )

    def result(self, encode_s: float, decode_s: float) -> ClipScore:
        """Return the means over the frames; `encode_s` and `decode_s` are seconds for all."""
        clip, found = self._clip, dict[str, Any]()
        if not self._each:
            raise DataError(f"{clip.name} holds no frame")
        for name in self._each[0]:
            values = [frame[name] for frame in self._each if frame[name] is not None]
            found[name] = sum(values) / len(values) if values else None
        kbits = found["bpp"] * clip.width * clip.height * float(clip.fps) / 1000
        return ClipScore(
            name=clip.name,
            frames=len(self._each),
            width=clip.width,
            height=clip.height,
            fps=float(clip.fps),
            kbits=kbits,
            encode_s=encode_s / len(self._each),
            decode_s=decode_s / len(self._each),
            **found,
        )


def yuv_psnr(
    reference: Tensor, decoded: Tensor, matrix: int = UNSPECIFIED
) -> tuple[float, float, float]:
    """Return the PSNR in dB of Y, U and V in 4:2:0 of two RGB images (1, 3, H, W) in [0, 1], by the
    matrix that their clip names.
    """
    planes = zip(_yuv(reference, matrix), _yuv(decoded, matrix), strict=True)
    errors = [float((a - b).square().mean()) for a, b in planes]
    y, u, v = (math.inf if e == 0 else 10 * math.log10(255**2 / e) for e in errors)
    return y, u, v


def _yuv(image: Tensor, matrix: int) -> Iterator[Tensor]:
    """Yield Y, U and V of an RGB image in 8 bits of full range, U and V of half the size."""
    red, blue = luma_weights(image.shape[-2], matrix)
    r, g, b = image.double().mul(255).round().unbind(1)
    y = red * r + (1 - red - blue) * g + blue * b
    yield y.round()
    for colour, weight in ((b, blue), (r, red)):
        difference = (colour - y) / (2 * (1 - weight)) + 128
        halved = F.avg_pool2d(difference.unsqueeze(1), 2, ceil_mode=True)
        yield halved.round().clamp(0, 255)


@torch.no_grad()
def _costs(
    coder: FrameCoder, frames: Sequence[Tensor], multiple: int
) -> tuple[FrameCost, FrameCost | None]:
    """Return the cost of an I frame, and of a P frame where the coder predicts."""
    padded = [pad(x, multiple)[0] for x in frames]
    coder.decompress(*coder.compress(padded[0], None)[:2], None)  # one-time set-up
    intra, latents = _cost(coder, padded[0], None, frames[0])
    if not coder.predicts or len(frames) < 2:
        return intra, None
    return intra, _cost(coder, padded[1], latents, frames[1])[0]


def _cost(
    coder: FrameCoder, x: Tensor, previous: Tensor | None, frame: Tensor
) -> tuple[FrameCost, Tensor | None]:
    results: dict[str, Any] = {}

    def encode() -> None:
        results["sent"] = coder.compress(x, previous)

    def decode() -> None:
        strings, shape, _ = results["sent"]
        results["read"] = coder.decompress(strings, shape, previous)

    macs, peaks = list[float](), list[int | None]()
    for work in (encode, decode):
        # A backend's layers are not seen, and fewer products than the layers' would be.
        with FlopCounterMode(display=False) as counter, coder.plain_arithmetic():
            work()
        macs.append(counter.get_total_flops() / 2 / (x.shape[-2] * x.shape[-1]) / 1000)
        peaks.append(None if coder.accelerated else peak_bytes(work))
    height, width = frame.shape[-2:]
    return FrameCost(macs[0], macs[1], peaks[0], peaks[1], width, height), results["sent"][2]
