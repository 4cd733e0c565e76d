"""The lambda schedule of slimmable codecs."""

from __future__ import annotations

from collections.abc import Sequence

from nicprune.report.aggregate import Line
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.style import (
    DASHES,
    LIGHT,
    MARKERS,
    MAX_PANELS,
    Theme,
    new_figure,
    plain,
    themed,
    to_png,
)


def lambda_schedule(lines: Sequence[Line], theme: Theme = LIGHT) -> bytes | None:
    """How the lambdas of slimmable codecs' widths were lowered over the steps, and the curve
    through the widths at each validation.
    """
    shown = [line for line in lines if line.members[0]["schedule"]][:MAX_PANELS]
    if not shown:
        return None
    with themed(theme):
        figure = new_figure(10.4, 0.6 + 3.6 * len(shown))
        for line, (left, right) in zip(
            shown, figure.subplots(len(shown), 2, squeeze=False), strict=True
        ):
            log = line.members[0]["schedule"]
            count = len(log[0]["lambdas"])
            for width in range(count):
                colour = theme.hues[width % len(theme.hues)]
                lambdas = [row["lambdas"][width] for row in log]
                left.step(
                    [row["step"] for row in log],
                    lambdas,
                    where="post",
                    color=colour,
                    linestyle=DASHES[width % len(DASHES)],
                    label=f"width {width}",
                )
                right.plot(
                    [row["bpp"][width] for row in log],
                    [row["psnr_db"][width] for row in log],
                    color=colour,
                    marker=MARKERS[width % len(MARKERS)],
                    markersize=3,
                    linewidth=0.8,
                    linestyle=":",
                )
            for row, style in ((log[0], "--"), (log[-1], "-")):
                right.plot(
                    row["bpp"],
                    row["psnr_db"],
                    color=theme.ink,
                    linewidth=1.2,
                    linestyle=style,
                    label="first" if row is log[0] else "last",
                    zorder=1,
                )
            left.set(xlabel="step", ylabel="λ", yscale="log")
            right.set(
                xlabel="estimated rate on validation photographs (bpp)", ylabel="PSNR, RGB (dB)"
            )
            for axes in (left, right):
                axes.grid(color=theme.grid, linewidth=0.7)
                axes.set_axisbelow(True)
                axes.legend()
            if len(shown) > 1:
                left.set_title(plain(line.arm))
        return to_png(figure)


PLOTS.register("schedule")(
    Plot(
        file="schedule.png",
        draw=lambda_schedule,
        heading="Schedule of λ",
        alt="Lambdas of a slimmable codec's widths over the steps",
        caption=lambda lines: (
            "Left: λ of each width. Right: what validation found, width by width; solid through the"
            " last validation, dashed through the first."
        ),
        place=3,
    )
)
