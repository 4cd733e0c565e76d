"""Evaluation on real bitstreams: bpp, PSNR, MS-SSIM and times, per image and on average."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_codec, check_finite, unwrap
from nicprune.codecs.calling import compress, decompress, run
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.memory_format import fast_format, format_of, in_format
from nicprune.codecs.provenance import provenance
from nicprune.common.config import cut
from nicprune.common.errors import CodecError, enough_memory
from nicprune.common.files import write_text
from nicprune.common.machine import BUSY, is_quiet, others_share, processor_time
from nicprune.common.wording import counted
from nicprune.data.images import list_images, readable, to_channels, usable_images
from nicprune.evaluation.padding import crop, pad
from nicprune.evaluation.quality import psnr, string_bytes, structural_similarity
from nicprune.methods.composition import Attached
from nicprune.methods.operating_point import EMPTY, OperatingPoint
from nicprune.methods.points import first_point, resolve_point
from nicprune.pruning.cost import COUNTER, measure
from nicprune.pruning.totals import AREA, Totals


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image.

    Attributes:
        name, width, height: file name and size in pixels.
        bpp, bpp_estimated: bits per pixel of the real strings, and entropy of the likelihoods.
        psnr_db, ms_ssim: see `psnr`; MS-SSIM is None below `MS_SSIM_SIDE` pixels.
        encode_s, decode_s: seconds.
    """

    name: str
    width: int
    height: int
    bpp: float
    bpp_estimated: float
    psnr_db: float
    ms_ssim: float | None
    encode_s: float
    decode_s: float
    macs: dict[str, float] | None = None
    """With gates: MACs of this image at 64x64, by "macs", "encoder", "decoder" and the name of each
    transform.
    """


@dataclass(frozen=True)
class Evaluation:
    """A codec on a set of images.

    Attributes:
        codec, quality: as in the codec's provenance.
        cost: MACs and params; with gates, MACs are the mean over the images.
        original_cost: cost of the codec before any pruning.
        images: scores of each image.
        device, threads: where it was evaluated.
        level, lmbda, width: the operating point, where the codec has several.
        at: the name of the width or level, for tables.
    """

    codec: str
    quality: int | None
    cost: Totals
    original_cost: Totals
    images: tuple[ImageScore, ...]
    device: str
    threads: int
    level: float | None = None
    lmbda: float | None = None
    width: int | None = None
    at: str = ""
    busy: float | None = None
    """Fraction of the processor that other programs used meanwhile, None if unknown. Times are
    unreliable where it is large.
    """

    def dynamic(self) -> dict[str, tuple[float, float, float]]:
        """Return the mean, smallest and largest MACs at 64x64 over the images: in total, per side
        and per transform.

        Empty if all images cost the same.
        """
        costs = [image.macs for image in self.images if image.macs is not None]
        each = {what: [cost[what] for cost in costs] for what in (costs[0] if costs else ())}
        return {
            what: (sum(values) / len(values), min(values), max(values))
            for what, values in each.items()
        }

    def mean(self, what: str) -> float | None:
        """Return the mean of one score over the images that have it."""
        values = [v for v in (getattr(image, what) for image in self.images) if v is not None]
        return sum(values) / len(values) if values else None

    def means(self) -> dict[str, Any]:
        """Return all means by name."""
        return {
            what: self.mean(what)
            for what in ("bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s")
        }

    def __str__(self) -> str:
        m = self.means()
        ms = f"  MS-SSIM {m['ms_ssim']:.4f}" if m["ms_ssim"] is not None else ""
        at = f" q{self.quality}" if self.quality else ""
        at = (
            f" level {self.level:g}" if self.level is not None else f" {self.at}" if self.at else at
        )
        return (
            f"{self.codec}{at}: {m['psnr_db']:.3f} dB at {m['bpp']:.4f} bpp (estimated"
            f" {m['bpp_estimated']:.4f}){ms}  encode {m['encode_s']:.3f} s  decode"
            f" {m['decode_s']:.3f} s  {self.cost.kmac_per_pixel():.2f} kMAC/pixel{self._range()}"
            f" ({COUNTER})  {self.cost.params:,} params"
            f"  [{counted(len(self.images), 'image')}, {self.device},"
            f" {counted(self.threads, 'thread')}{self.disturbed()}]"
        )

    def quiet(self) -> bool:
        """Return True if the times were taken while no other program kept the processor busy; False
        where this is not known.
        """
        return is_quiet(self.busy)

    def disturbed(self) -> str:
        """Return a note on times that were taken while other programs ran; empty if none did."""
        return (
            f", other programs used {self.busy:.0%} of the processor"
            if self.busy is not None and self.busy > BUSY
            else ""
        )

    def _range(self) -> str:
        if not (spread := self.dynamic()):
            return ""
        return (
            f" on average, {spread['macs'][1] / AREA / 1000:.2f} to"
            f" {spread['macs'][2] / AREA / 1000:.2f}"
        )

    def compressai_json(self) -> dict[str, Any]:
        """Return the means in the layout of CompressAI's results files, which
        `compressai.utils.plot` draws.
        """
        m = self.means()
        results = {
            "psnr-rgb": m["psnr_db"],
            "bpp": m["bpp"],
            "encoding_time": m["encode_s"],
            "decoding_time": m["decode_s"],
        }
        if m["ms_ssim"] is not None:
            results["ms-ssim-rgb"] = m["ms_ssim"]
        return {
            "name": self.codec,
            "description": f"{self.codec}, {self.cost.kmac_per_pixel():.2f} kMAC/pixel",
            "results": {name: [value] for name, value in results.items()},
        }


@torch.no_grad()
def evaluate_image(
    codec: Any,
    image: Tensor,
    name: str,
    point: OperatingPoint = EMPTY,
    coder: Coder | None = None,
) -> tuple[ImageScore, Tensor]:
    """Encode and decode one image.

    Args:
        codec: a codec with up-to-date CDF tables, for the estimate of bpp.
        image: uint8, shape (3, H, W); or (1, H, W) for a codec of grey images.
        name: name of the image, for its score.
        point: the operating point to code at.
        coder: codes the image, made of a copy of the codec; if None, the codec itself does.

    Returns:
        The scores, and the decoded image, float in [0, 1] on the CPU.
    """
    device = next(codec.parameters()).device
    height, width = image.shape[-2:]
    pixels = height * width
    with fast_indexes(), enough_memory(f"coding {name}, {width}x{height} pixels,"):
        x = image.unsqueeze(0).float().div(255).to(device)
        padded, padding = pad(x, size_multiple(unwrap(codec)))
        padded = padded.contiguous(memory_format=format_of(codec))
        started = clock(device)
        if coder is not None:
            sent = coder.compress(padded, **point.keywords())
            encoded = clock(device)
            received = coder.decompress(sent["strings"], sent["shape"], padded)
        else:
            sent = compress(codec, padded, **point.keywords())
            encoded = clock(device)
            received = decompress(codec, sent["strings"], sent["shape"], padded)["x_hat"]
        decoded = clock(device)
        likelihoods = run(codec, padded, **point.keywords())["likelihoods"].values()
    if not bool(torch.isfinite(received).all()):
        raise CodecError("this codec decodes images to values that are not finite")
    cost = codec.image_cost() if isinstance(codec, Attached) else None
    estimate = (
        sum(float(-torch.log2(likelihood.cpu().double()).sum()) for likelihood in likelihoods)
        / pixels
    )
    x_hat = crop(received, padding).clamp(0, 1)
    score = ImageScore(
        name,
        x.shape[-1],
        x.shape[-2],
        8 * string_bytes(sent["strings"]) / pixels,
        estimate,
        psnr(x, x_hat),
        structural_similarity(x, x_hat),
        encoded - started,
        decoded - encoded,
        cost[0] | cost[1] if cost is not None else None,
    )
    return score, x_hat[0].cpu()


def clock(device: torch.device) -> float:
    """Return the time in seconds after all work on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device that codecs can run on here.

    Raises:
        CodecError: there is no such device, or this machine or this PyTorch does not have it.
    """
    try:
        place = torch.device(device)
        float(torch.zeros(1, device=place))  # "meta" computes nothing
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = cut(str(error).splitlines()[0].split(". ")[0], 200)
        raise CodecError(f"device {str(device)!r} cannot be used here: {reason}") from None
    return place


def evaluate(
    codec: nn.Module,
    images: str | Path | Sequence[str | Path],
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    keep_decoded: Callable[[str, Tensor, Tensor, ImageScore], None] | None = None,
    cost: Totals | None = None,
    level: Any = None,
    lmbda: float | None = None,
    width: int | None = None,
    domain: str | int | None = None,
    fast: bool = False,
) -> Evaluation:
    """Encode and decode every image with real bitstreams, those that `encode` writes.

    Args:
        codec: a `CompressionModel` of any width, or one with gates or a modulator on it (as
            returned by `attach` or `harden`). A float32 copy is used; the codec is not changed. A
            bare codec whose masks are still on it is evaluated at full size with the masks applied.
        images: a folder (its `test/` sub-folder if there is one), files, or "samples". Images of
            any size are padded to a multiple of 64, or of the codec's stride, and cropped back; bpp
            counts the pixels of the image without the padding. Broken images are skipped with a
            warning. A codec of one channel gets the luma (BT.601) of colour images.
        device: where to run; by default the codec's own device.
        progress: show each image on a terminal.
        keep_decoded: called with (name, original, decoded, score) of each image; both images in [0,
            1], (3, H, W) or (1, H, W).
        cost: the codec's cost, if it is known already.
        level, lmbda: with a modulator, the rate (by default the highest); with a scalable encoder,
            the level: see `Attached.forward`.
        width: with a slimmable codec, the width (by default the one that is set).
        domain: with an adaptation, the domain, by name (by default the one that is set).
        fast: compute entropy parameters in float32; see `encode`.

    Raises:
        CodecError: `codec` has methods attached that must be hardened first.
        RecipeError: the codec does not have this rate, level or width.
        DataError: no image is usable.
    """
    if isinstance(codec, Attached) and not codec.stays:
        raise CodecError(
            "evaluate a plain codec: masked.harden(), or masked.plain() for the masks as they"
            " are now"
        )
    bare = unwrap(codec)
    check_codec(bare)
    point = resolve_point(codec, level=level, lmbda=lmbda, width=width, domain=domain)
    at = ""
    if isinstance(codec, Attached) and codec.widths is not None and point.domain is not None:
        at = codec.widths.name(point.domain)
        if (source := codec.bare_at(point)) is not None:  # nothing else is run, or can change it
            codec, point, bare = source, EMPTY, source
    paths = usable_images(list_images(images, "test"))
    record = provenance(bare)
    width = point.width if point.effort is None else point.effort
    place = usable_device(device) if device is not None else next(codec.parameters()).device
    ready: Any = copy_codec(codec).to(place).float().eval()
    in_format(ready, fast_format(ready))
    check_finite(ready)
    refresh_tables(ready)
    tried = first_point(ready, point).keywords()
    coder = None if fast else Coder(copy_codec(ready), point=tried)
    if isinstance(ready, Attached):
        ready.set_point(point)
        now = ready.totals()
    else:
        now = cost if cost is not None else measure(bare)
    scores: list[ImageScore] = []
    before, channels, multiple = processor_time(), image_shape(bare)[0], size_multiple(bare)
    for number, (path, image) in enumerate(readable(paths), 1):
        image = to_channels(image, channels)
        if not scores:  # warm-up: the first call does one-time set-up
            tile = image[:, :multiple, :multiple]
            evaluate_image(ready, tile, "warm-up", point, coder)
        score, decoded = evaluate_image(ready, image, path.name, point, coder)
        scores.append(score)
        if keep_decoded is not None:
            keep_decoded(path.name, image.float() / 255, decoded, score)
        if progress and sys.stderr.isatty():
            print(
                f"\r{number}/{len(paths)} {path.name}  {score.bpp:.3f} bpp  {score.psnr_db:.2f}"
                " dB\033[K",
                end="",
                file=sys.stderr,
            )
    if progress and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    original = (
        Totals(**record.original)
        if record.original
        else codec.cost.original
        if isinstance(codec, Attached)
        else now
    )
    found = Evaluation(
        record.name,
        record.quality,
        now,
        original,
        tuple(scores),
        str(place),
        torch.get_num_threads(),
        point.rate,
        codec.lmbda_at(point) if isinstance(codec, Attached) and point.rate is not None else None,
        width,
        codec.widths.name(width)
        if isinstance(codec, Attached) and codec.widths and width is not None
        else at,
        others_share(before, processor_time()),
    )
    if spread := found.dynamic():
        found = replace(
            found,
            cost=replace(
                now, **{what: round(spread[what][0]) for what in ("macs", "encoder", "decoder")}
            ),
        )
    return found


@dataclass(frozen=True)
class Comparison:
    """Two codecs on the same images."""

    before: Evaluation
    after: Evaluation

    def __str__(self) -> str:
        b, a = self.before.means(), self.after.means()
        drop = b["psnr_db"] - a["psnr_db"]
        cost, less = self.before.cost, self.after.cost
        rows = [
            (
                "kMAC/pixel",
                cost.kmac_per_pixel(),
                less.kmac_per_pixel(),
                _ratio(cost.macs, less.macs, "fewer", "more"),
            ),
            (
                "params",
                cost.params,
                less.params,
                _ratio(cost.params, less.params, "fewer", "more"),
            ),
            ("bpp", b["bpp"], a["bpp"], f"{100 * (a['bpp'] / b['bpp'] - 1):+.2f} %"),
            (
                "PSNR dB",
                b["psnr_db"],
                a["psnr_db"],
                f"drop {drop:.3f} dB, {100 * drop / b['psnr_db']:.2f} %",
            ),
            *(
                (
                    f"{what} s",
                    b[f"{what}_s"],
                    a[f"{what}_s"],
                    _ratio(b[f"{what}_s"], a[f"{what}_s"], "faster", "slower")
                    if self.before.quiet() and self.after.quiet()
                    else "rough: other programs used the processor, or may have",
                )
                for what in ("encode", "decode")
            ),
        ]
        lines = [f"{'':12}{'before':>14}{'after':>14}"]
        lines += [
            f"{name:12}{before:>14,.4g}{after:>14,.4g}   {note}"
            for name, before, after, note in rows
        ]
        most = max(self.before, self.after, key=lambda evaluation: evaluation.busy or 0.0)
        lines.append(
            f"{counted(len(self.after.images), 'image')}, {self.after.device},"
            f" {counted(self.after.threads, 'thread')}{most.disturbed()}; MACs counted by {COUNTER}"
        )
        return "\n".join(lines)


def _ratio(before: float, after: float, less: str, more: str) -> str:
    """Return how many times a figure became smaller, or larger, in words."""
    return f"{before / after:.2f}x {less}" if after <= before else f"{after / before:.2f}x {more}"


def compare(
    before: nn.Module, after: nn.Module, images: str | Path | Sequence[str | Path]
) -> Comparison:
    """Evaluate two codecs on the same images; `print` shows the result as a table.

    Raises:
        NicpruneError: as `evaluate`.
    """
    for codec in (before, after):
        check_codec(unwrap(codec))
    device = next(after.parameters()).device  # times on different devices cannot be compared
    paths = list_images(images, "test")
    return Comparison(evaluate(before, paths, device=device), evaluate(after, paths, device=device))


def write_results(evaluation: Evaluation, path: str | Path) -> Path:
    """Write an evaluation as CompressAI results JSON, with the scores of each image under the key
    "nicprune".
    """
    content = evaluation.compressai_json() | {
        "nicprune": {
            "means": evaluation.means(),
            "cost_64x64": evaluation.cost.as_dict(),
            "original_cost_64x64": evaluation.original_cost.as_dict(),
            "counter": COUNTER,
            "device": evaluation.device,
            "threads": evaluation.threads,
            "busy": evaluation.busy,
            "images": [asdict(i) for i in evaluation.images],
        }
    }
    return write_text(path, json.dumps(content, indent=1) + "\n")
