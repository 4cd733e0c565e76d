"""The lambda schedule of slimmable codecs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from nicprune.report.aggregate import Row
from nicprune.report.columns import column_of
from nicprune.report.plots.figure import MAX_PANELS, draw_grid, new_figure, plain, to_png
from nicprune.report.plots.look import DASHES, MARKERS
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.theme import LIGHT, Theme, themed
from nicprune.report.record_parts import ScheduleStep


def lambda_schedule(rows: Sequence[Row], theme: Theme = LIGHT) -> bytes | None:
    """Draw the lambdas of each width over the steps, and rate and PSNR at each validation."""
    shown = [row for row in rows if row.members[0].schedule][:MAX_PANELS]
    if not shown:
        return None
    with themed(theme):
        figure = new_figure(10.4, 0.6 + 3.6 * len(shown))
        panels = figure.subplots(len(shown), 2, squeeze=False)
        for row, (left, right) in zip(shown, panels, strict=True):
            log = row.members[0].schedule
            _draw_lambdas(left, log, theme)
            _draw_validations(right, log, theme)
            for axes in (left, right):
                draw_grid(axes, theme)
                axes.legend()
            if len(shown) > 1:
                left.set_title(plain(row.arm))
        return to_png(figure)


def _draw_lambdas(axes: Axes, log: Sequence[ScheduleStep], theme: Theme) -> None:
    for width in range(len(log[0].lambdas)):
        axes.step(
            [entry.step for entry in log],
            [entry.lambdas[width] for entry in log],
            where="post",
            color=theme.hues[width % len(theme.hues)],
            linestyle=DASHES[width % len(DASHES)],
            label=f"width {width}",
        )
    axes.set(xlabel="step", ylabel="λ", yscale="log")


def _draw_validations(axes: Axes, log: Sequence[ScheduleStep], theme: Theme) -> None:
    for width in range(len(log[0].lambdas)):
        axes.plot(
            [entry.bpp[width] for entry in log],
            [entry.psnr_db[width] for entry in log],
            color=theme.hues[width % len(theme.hues)],
            marker=MARKERS[width % len(MARKERS)],
            markersize=3,
            linewidth=0.8,
            linestyle=":",
        )
    for entry, style, label in ((log[0], "--", "first"), (log[-1], "-", "last")):
        axes.plot(
            entry.bpp,
            entry.psnr_db,
            color=theme.ink,
            linewidth=1.2,
            linestyle=style,
            label=label,
            zorder=1,
        )
    axes.set(xlabel="estimated rate on validation images (bpp)", ylabel=column_of("psnr_db").axis)


PLOTS.register("schedule")(
    Plot(
        file="schedule.png",
        draw=lambda_schedule,
        heading="Schedule of λ",
        alt="Lambdas of a slimmable codec's widths over the steps",
        caption=lambda rows: (
            "Left: λ of each width. Right: rate and PSNR of each width at every validation; the"
            " dashed line joins the first validation, the solid line the last."
        ),
        place=3,
    )
)
