"""Figures of an arm over all its qualities, for overviews.

Each returns a list of values: one for the arm, or one for each quality. It is empty unless the
report has the figure at every quality of the arm, so that no mean is one over fewer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nicprune.report.aggregate import aggregate
from nicprune.report.bd_rate import ENOUGH_POINTS, bd_table
from nicprune.report.file_sizes import file_sizes
from nicprune.report.matching import reference_for
from nicprune.report.overview_reports import Arm
from nicprune.report.rate_distortion_cost import change_pct, cost, same_lambda
from nicprune.report.record import Record
from nicprune.report.scratch_gap import scratch_gaps


class Value(NamedTuple):
    """Mean over seeds, sample standard deviation (None for one seed), and a caution."""

    mean: float
    spread: float | None = None
    note: str = ""

    def text(self, form: str, unit: str) -> str:
        """Return it as text, for example "+0.9 ±0.1 %"."""
        spread = "" if self.spread is None else f" ±{format(self.spread, form.lstrip('+'))}"
        return f"{format(self.mean, form)}{spread}{unit}{self.note}"


Values = list[Value]


def cost_over_control(arm: Arm) -> Values:
    """Return the mean over qualities of cost divided by the control's cost, minus 1, in per cent.

    Each record is compared with the control of its quality and seed: one trained for the same
    number of steps, or the arm's own control, however long that was trained. The spread is that
    over seeds of this mean; there is none where qualities have different seeds.
    """
    controls = [record for record in arm.records if record.role == "control"]
    by_row: list[dict[int | None, float]] = []
    for row in arm.rows:
        changes: dict[int | None, list[float]] = {}
        for record in row.members:
            fair = [one for one in controls if arm.own_control or one.steps == record.steps]
            change = _change_of_cost(record, reference_for(record, fair, "control"))
            changes.setdefault(record.seed, []).append(change)
        by_row.append({seed: statistics.fmean(found) for seed, found in changes.items()})
    if any(math.isnan(change) for row in by_row for change in row.values()):
        return []
    if all(row.keys() == by_row[0].keys() for row in by_row):
        return _over_seeds([statistics.fmean(row[s] for row in by_row) for s in by_row[0]])
    return [Value(statistics.fmean(statistics.fmean(row.values()) for row in by_row))]


def _change_of_cost(record: Record, control: Record | None) -> float:
    """Return the change of cost in per cent; NaN where the two cannot be compared."""
    # Costs at different lambdas cannot be compared: widths of a slimmable codec have others.
    if control is None or not same_lambda(control, record):
        return math.nan
    return change_pct(cost(record), cost(control))


def gap_closed(arm: Arm) -> Values:
    """Return the closed fraction of the gap to the same codec from scratch, in per cent.

    It is the mean over qualities. Of several codecs from scratch, the one trained longest counts;
    of those trained as long, the best.
    """
    gaps = [gap for gap in scratch_gaps(aggregate(arm.records)) if gap.arm == arm.rows[0].arm]
    closed = []
    for row in arm.rows:
        longest = max(
            (gap for gap in gaps if gap.quality == row.quality),
            key=lambda gap: (gap.steps, -gap.from_scratch),
            default=None,
        )
        if longest is None or (fraction := longest.closed()) is None:
            return []
        closed.append(fraction)
    return [Value(statistics.fmean(closed))]


def bd_rate(arm: Arm, against: str) -> Values:
    """Return the BD-rate against the original or the control, in per cent, from four qualities on.
    The control is one trained for as many steps, or the arm's own.

    The overlap of the curves is added where it is small.
    """
    if len({row.quality for row in arm.rows}) < ENOUGH_POINTS:
        return []
    steps = {record.steps for row in arm.rows for record in row.members}
    table = bd_table(
        [
            record
            for record in arm.records
            if against != "control"
            or record.role != "control"
            or arm.own_control
            or record.steps in steps
        ]
    )
    of_arm = (table["label"] == arm.rows[0].arm) & (table["role"] == arm.rows[0].role)
    found = table[of_arm & (table["against"] == against)]
    if found["bd_rate_pct"].isna().any() or (found["points"] < ENOUGH_POINTS).any():
        return []
    little = found["caution"].str.contains("overlap").any()
    overlap = f" (over {found['overlap_pct'].min():.0f} % of the range)" if little else ""
    return _over_seeds(list(found["bd_rate_pct"]), overlap)


def _over_seeds(values: Sequence[float], note: str = "") -> Values:
    """Return one value for an arm, from a value for each seed."""
    if not values:
        return []
    spread = statistics.stdev(values) if len(values) > 1 else None
    return [Value(statistics.fmean(values), spread, note)]


def _each_quality(column: str) -> Callable[[Arm], Values]:
    """Return a function that returns a column of the report, a value for each quality."""

    def values(arm: Arm) -> Values:
        found = [Value(row.mean[column], row.spread.get(column) or None) for row in arm.rows]
        return found if all(math.isfinite(value.mean) for value in found) else []

    return values


def _storage_saved(arm: Arm) -> Values:
    """Return by how much one file for all rates is smaller than the originals' files."""
    return [
        Value(100 * (1 - sizes.size / sizes.originals))
        for sizes in file_sizes(aggregate(arm.records))
        if (sizes.role, sizes.arm) == ("modulated", arm.rows[0].arm) and sizes.originals
    ]


class Figure(NamedTuple):
    """A figure that a claim can show.

    Attributes:
        title: what it is, in a table.
        form: format of the number.
        unit: unit, with a space in front where there is one.
        values: function of an arm.
        needs: what the report must have for it.
    """

    title: str
    form: str
    unit: str
    values: Callable[[Arm], Values]
    needs: str

    def text(self, arms: Sequence[Arm]) -> str:
        """Return the figure of one arm, or its range over qualities and several arms, as text.

        Empty where an arm does not have it.
        """
        each = [self.values(arm) for arm in arms]
        found = sorted((value for values in each for value in values), key=lambda v: v.mean)
        if not found or not all(each):
            return ""
        if len(found) == 1:
            return found[0].text(self.form, self.unit)
        low, high = (format(value.mean, self.form) for value in (found[0], found[-1]))
        notes = "".join(dict.fromkeys(value.note for value in found))
        return f"{low if low == high else f'{low} to {high}'}{self.unit}{notes}"


_CONTROL = "a control trained for as many steps at the same lambda, or `control` in the row"
_ORIGINAL = "the original on the same images"
_CURVE = f"{ENOUGH_POINTS} qualities, and curves that overlap"

FIGURES = {
    "cost_over_control": Figure("cost over control", "+z.1f", " %", cost_over_control, _CONTROL),
    "bd_rate": Figure(
        "BD-rate against the control",
        "+z.1f",
        " %",
        lambda arm: bd_rate(arm, "control"),
        f"{_CURVE}, and {_CONTROL}",
    ),
    "bd_rate_against_original": Figure(
        "BD-rate against the original", "+z.1f", " %", lambda arm: bd_rate(arm, "original"), _CURVE
    ),
    "gap_closed": Figure(
        "gap closed", "z.0f", " %", gap_closed, "a codec of the same size trained from scratch"
    ),
    "flop_reduction": Figure("FLOP reduction", ".2f", "×", _each_quality("flop_reduction"), "MACs"),
    "psnr_drop": Figure("PSNR drop", "z.2f", " dB", _each_quality("psnr_drop_db"), _ORIGINAL),
    "psnr_drop_pct": Figure("PSNR drop", "z.2f", " %", _each_quality("psnr_drop_pct"), _ORIGINAL),
    "bpp_change": Figure(
        "change of bpp", "+z.1f", " %", _each_quality("bpp_change_pct"), _ORIGINAL
    ),
    "decode_speedup": Figure(
        "decoding speed-up", ".2f", "×", _each_quality("decode_speedup"), "quiet, equal machines"
    ),
    "storage_saved": Figure(
        "storage saved", "z.0f", " %", _storage_saved, "one codec for all rates or widths"
    ),
}
"""Figures that overview.yaml can name, by name."""
