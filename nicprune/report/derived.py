"""Figures of a report that are computed from a record and its original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nicprune.report.column import RATIO, column
from nicprune.report.matching import reference_for
from nicprune.report.rate_distortion_cost import change_pct, same_lambda
from nicprune.report.rate_distortion_cost import cost as cost_of
from nicprune.report.record import Record

AREA = 64 * 64
"""Pixels that the MACs of a record are counted for."""


class Derived(BaseModel):
    """Figures of one record; NaN where there is no original to compare with.

    Speed-ups are NaN too where the two were timed on different machines, devices or thread
    counts, or while other programs kept the processor busy.
    """

    model_config = ConfigDict(frozen=True)

    kmac_per_pixel: float = column(
        "MACs",
        "Thousand multiply-accumulates for each pixel of the image, all transforms, counted at"
        " 64 x 64 pixels",
        "kMAC/pixel",
        header="kMAC/pixel",
    )
    kmac_per_pixel_encoder: float = column(
        "encoder MACs",
        "MACs of what runs when encoding; shared transforms count for encoder and decoder",
        "kMAC/pixel",
        header="encoder kMAC/pixel",
    )
    kmac_per_pixel_decoder: float = column(
        "decoder MACs",
        "MACs of what runs when decoding; shared transforms count for encoder and decoder",
        "kMAC/pixel",
        header="decoder kMAC/pixel",
    )
    flop_reduction: float = column(
        "FLOP reduction",
        "MACs of the original divided by MACs of the codec",
        RATIO,
        header="FLOP reduction",
    )
    encoder_reduction: float = column(
        "encoder reduction",
        "Encoder MACs of the original divided by those of the codec",
        RATIO,
        header="encoder reduction",
    )
    decoder_reduction: float = column(
        "decoder reduction",
        "Decoder MACs of the original divided by those of the codec",
        RATIO,
        header="decoder reduction",
    )
    params_reduction: float = column(
        "params reduction",
        "Parameters of the original divided by parameters of the codec",
        RATIO,
        header="params reduction",
    )
    bpp_change_pct: float = column("change of rate", "Change of bpp against the original", "%")
    psnr_drop_db: float = column("PSNR drop", "PSNR of the original minus PSNR of the codec", "dB")
    psnr_drop_pct: float = column("PSNR drop", "PSNR drop divided by the original's PSNR", "%")
    encode_speedup: float = column(
        "encoding speed-up",
        "Encoding time of the original divided by that of the codec, on the same machine with"
        " the same thread count",
        RATIO,
        header="encoding speed-up",
    )
    decode_speedup: float = column(
        "decoding speed-up",
        "Decoding time of the original divided by that of the codec, on the same machine with"
        " the same thread count",
        RATIO,
        header="decoding speed-up",
    )
    images: int = column("images", "Number of test images")
    test: str = column("test images", "Name of the folder of test images")
    cost_change_pct: float = column(
        "change of cost", "Change of λ · 255² · MSE + bpp against the original", "%"
    )
    source_test: str = column("source images", "Name of the folder of images of the source domain")
    source_bpp: float = column("source rate", "Rate on images of the source domain", "bpp")
    source_psnr_db: float = column("source PSNR", "PSNR on images of the source domain", "dB")
    forgetting_pct: float = column(
        "forgetting",
        "Change of λ · 255² · MSE + bpp against the original on images of the source domain",
        "%",
    )
    old_files: str = column(
        "old files", "What becomes of files that the original encoded, decoded with the codec"
    )
    kmac_per_pixel_min: float = column(
        "smallest MACs", "With gates: MACs of the image that costs least", "kMAC/pixel"
    )
    kmac_per_pixel_max: float = column(
        "largest MACs", "With gates: MACs of the image that costs most", "kMAC/pixel"
    )


def derive(record: Record, records: Sequence[Record]) -> Derived:
    """Return the derived figures of a record, against its original among `records`."""
    cost, before = record.cost, record.original_cost
    base = reference_for(record, records, "original")
    psnr = None if base is None else base.psnr_db
    drop = number_or_nan(psnr) - number_or_nan(record.psnr_db)
    clock = base if base is not None and _timed_alike(base, record) else None
    source, known = record.source, None if base is None else base.source
    _, least, most = record.dynamic.get("macs", (math.nan,) * 3)
    return Derived(
        kmac_per_pixel=cost.macs / AREA / 1000,
        kmac_per_pixel_encoder=cost.encoder / AREA / 1000,
        kmac_per_pixel_decoder=cost.decoder / AREA / 1000,
        flop_reduction=_ratio(before.macs, cost.macs),
        encoder_reduction=_ratio(before.encoder, cost.encoder),
        decoder_reduction=_ratio(before.decoder, cost.decoder),
        params_reduction=_ratio(before.params, cost.params),
        bpp_change_pct=100 * (_ratio(record.bpp, None if base is None else base.bpp) - 1),
        psnr_drop_db=drop,
        psnr_drop_pct=100 * _ratio(drop, psnr),
        encode_speedup=_ratio(None if clock is None else clock.encode_s, record.encode_s),
        decode_speedup=_ratio(None if clock is None else clock.decode_s, record.decode_s),
        images=len(record.images),
        test=record.setup().test,
        cost_change_pct=(
            change_pct(cost_of(record), cost_of(base))
            if base is not None and same_lambda(record, base)
            else math.nan
        ),
        source_test=Path(source.test).name if source is not None else "",
        source_bpp=number_or_nan(source.bpp if source is not None else None),
        source_psnr_db=number_or_nan(source.psnr_db if source is not None else None),
        forgetting_pct=change_pct(
            cost_of(record, source) if source is not None else None,
            cost_of(record, known) if known is not None else None,  # by the same lambda
        ),
        old_files=source.old_files if source is not None else "",
        kmac_per_pixel_min=least / AREA / 1000,
        kmac_per_pixel_max=most / AREA / 1000,
    )


def _timed_alike(base: Record, record: Record) -> bool:
    """Return True if the times of two records may be divided."""
    alike = (base.machine, base.device, base.threads) == (
        record.machine,
        record.device,
        record.threads,
    )
    return alike and base.quiet() and record.quiet()


def _ratio(before: float | None, after: float | None) -> float:
    return before / after if before is not None and after else math.nan


def number_or_nan(value: float | None) -> float:
    """Return the value as a float; None as NaN."""
    return math.nan if value is None else float(value)
