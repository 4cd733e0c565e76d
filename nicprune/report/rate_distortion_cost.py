"""The rate-distortion cost that a codec was trained for: λ · 255² · MSE + bpp."""

from __future__ import annotations

import math
import statistics

from nicprune.report.record import Record
from nicprune.report.record_parts import SourceResult


def cost(record: Record, of: Record | SourceResult | None = None) -> float | None:
    """Return λ · 255² · MSE + bpp of a record, mean over images.

    Args:
        record: the record, with the lambda of its codec.
        of: its results, or its results on images of the source domain.

    None where the codec was not trained for squared error, or where a figure is missing.
    """
    result = record if of is None else of
    errors = [10 ** (-image.psnr_db / 10) for image in result.images if image.psnr_db is not None]
    if (
        record.metric not in ("mse", None)
        or record.lmbda is None
        or result.bpp is None
        or not errors
    ):
        return None
    return float(record.lmbda * 255**2 * statistics.fmean(errors) + result.bpp)


def same_lambda(first: Record, second: Record) -> bool:
    """Return whether the costs of two records may be compared: they were trained for one lambda."""
    return math.isclose(first.lmbda or 0, second.lmbda or 0, rel_tol=1e-4)


def change_pct(after: float | None, before: float | None) -> float:
    """Return by how much a cost has changed, in per cent; NaN where one is missing."""
    return math.nan if after is None or not before else 100 * (after / before - 1)
