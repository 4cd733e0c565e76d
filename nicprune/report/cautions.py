"""Cautions: limits of a comparison that a reader must know before trusting a table."""

from __future__ import annotations

from collections.abc import Sequence

from nicprune.report.aggregate import Row, why_no_drop
from nicprune.report.columns import column_of
from nicprune.report.crops import Crops
from nicprune.report.matching import reference_for
from nicprune.report.record import Record

SAME_FOR_MACS = ("counter",)
SAME_FOR_TIMES = ("machine", "device", "threads")


def cautions(
    records: Sequence[Record], rows: Sequence[Row], crops: Crops | None = None
) -> list[str]:
    """Return a sentence for each limit.

    These are missing originals and controls, controls trained for other steps, records of several
    machines, devices, thread counts or MAC counters, and missing crops.
    """
    found = [caution for row in rows for caution in _of_row(row, records, rows)]
    for name in (*SAME_FOR_MACS, *SAME_FOR_TIMES):
        values = sorted({str(v) for r in records if (v := getattr(r, name)) is not None})
        if len(values) > 1:
            found.append(
                f"The records come from several {column_of(name).title}s: {', '.join(values)}."
                f" Compare {'MACs' if name in SAME_FOR_MACS else 'times'} within one only."
            )
    if crops is not None and crops.missing:
        found.append(
            f"{crops.missing} of {crops.named} crops were not found beside their records and are"
            " left out."
        )
    return found


def _of_row(row: Row, records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    member = row.members[0]
    name = " ".join(
        filter(None, (member.codec, "" if row.quality is None else f"q{row.quality}", row.arm))
    )
    found = []
    if row.role != "original" and any(
        reference_for(record, records, "original") is None for record in row.members
    ):
        found.append(
            f"{name}: {why_no_drop(row, rows)}, so PSNR drop, change of bpp and speed-up are blank."
        )
    if row.role not in ("pruned", "modulated"):
        return found
    controls = [reference_for(record, records, "control") for record in row.members]
    control = controls[0]
    if control is not None:
        unequal = [
            (member.steps, other.steps)
            for member, other in zip(row.members, controls, strict=True)
            if other is not None and other.steps != member.steps
        ]
        found += [
            f"{name}: trained for {own} steps, its control for {steps}."
            for own, steps in dict.fromkeys(unequal)
        ]
    # A control of another architecture has been mentioned with the original.
    elif row.role == "pruned" or not any(
        other.role == "control" and other.quality == row.quality for other in rows
    ):
        found.append(
            f"{name}: there is no control (the original fine-tuned for the same number of steps),"
            " so the effect of the extra training alone is not known."
        )
    return found
