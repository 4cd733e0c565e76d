"""`nicprune eval-video`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nicprune.cli.options import (
    Force,
    Frames,
    FrameSize,
    Gop,
    MaxPixels,
    Metric,
    Quality,
    Weights,
    of_a_learned_codec,
    refuse,
    refuse_for_files,
)

if TYPE_CHECKING:
    from nicprune.evaluation.transform_times import Named


def evaluate_clips(
    clips: Annotated[
        list[str], typer.Argument(help="Video files, folders of frames, or folders of these.")
    ],
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="[LABEL=]CODEC[@WIDTH]: a name, file, or package.module:factory; of a slimmable"
            " codec every width unless one is given. Codecs of the same label are one curve."
        ),
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    gop: Gop = None,
    frames: Frames = None,
    classical: Annotated[
        list[str] | None, typer.Option(help="x264 or x265, with the same GOP and low delay.")
    ] = None,
    crf: Annotated[
        list[int] | None,
        typer.Option(min=0, max=51, help="x264, x265: constant rate factors; by default five."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="x264, x265: preset; by default medium.")
    ] = None,
    control: Annotated[
        bool,
        typer.Option(help="Also evaluate codecs that predict frames with I frames alone."),
    ] = True,
    size: FrameSize = None,
    report: Annotated[
        str | None, typer.Option(help="Folder to write records, tables, plots and a page into.")
    ] = None,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Evaluate codecs on clips, on real bitstreams.

    bpp, kbit/s, PSNR over RGB and YUV 6:1:1, MS-SSIM, MACs of I and P frames, memory, seconds a
    frame.
    """
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_writable
    from nicprune.data.clips import clips_in
    from nicprune.evaluation.classical_video import (
        CRFS,
        PRESET,
        check_encoder,
        evaluate_classical_video,
    )
    from nicprune.evaluation.transform_times import Named
    from nicprune.report.folder import FILES, check_replaceable
    from nicprune.report.video import video_record, video_table, write_video_report
    from nicprune.storage.video_container import GOP

    if not codec and not classical:
        raise RecipeError("nothing to evaluate: name a --codec or a --classical codec")
    if codec:
        refuse_for_files([Named.read(text).codec for text in codec], quality, metric, weights)
    else:
        given = of_a_learned_codec(quality, metric, weights)
        given["--no-control"] = None if control else True
        refuse("no learned codec is named, and a classical one", given)
    if not classical:
        refuse("no classical codec is named, and a learned one", {"--crf": crf, "--preset": preset})
    found = clips_in(clips, size=size)
    for name in classical or []:
        check_encoder(name, found, preset or PRESET)
    if report is not None:
        check_writable(report, FILES)
        if not force:
            check_replaceable(report)
    command, records = shlex.join(["nicprune", *sys.argv[1:]]), []

    def note(evaluation: Any, role: Any, label: str) -> None:
        typer.echo(str(evaluation) + (" (I frames alone)" if role == "intra" else ""))
        records.append(video_record(evaluation, role, label, command))

    settings: dict[str, Any] = {"gop": gop or GOP, "frames": frames}
    for label, one in _labelled([Named.read(text) for text in codec or []]):
        for model, width in _at_widths(one, quality, metric, weights):
            _evaluate(label, model, width, found, settings, control=control, note=note)
    for name in classical or []:
        points = evaluate_classical_video(
            name, found, crfs=crf or CRFS, preset=preset or PRESET, **settings
        )
        for point in points:
            note(point, "classical", name)
    typer.echo("\n" + video_table(records))
    if report is not None:
        typer.echo(f"report: {write_video_report(records, report)}")


def _labelled(named: list[Named]) -> list[tuple[str, Named]]:
    """Return codecs with their labels, numbered where several codecs that were given without one
    would have the same: only codecs that were given the same are one curve.
    """
    of_label: dict[str, list[str]] = {}
    plain = [named.label if named.given else named.label.partition("@")[0] for named in named]
    for label, one in zip(plain, named, strict=True):
        if one.codec not in of_label.setdefault(label, []):
            of_label[label].append(one.codec)
    return [
        (
            label
            if one.given or len(of_label[label]) < 2
            else f"{label} ({of_label[label].index(one.codec) + 1})",
            one,
        )
        for label, one in zip(plain, named, strict=True)
    ]


def _at_widths(
    named: Named, quality: int | None, metric: str, weights: str
) -> list[tuple[Any, int | None]]:
    """Load a codec; return it with each width that is asked for."""
    from nicprune.methods.video.coder import video_coder
    from nicprune.storage.named import load_codec

    given = Path(named.codec).suffix == ".safetensors"
    model = load_codec(
        named.codec, quality, metric=metric, weights="official" if given else weights
    )
    if named.width is not None:
        return [(model, named.width)]
    count = video_coder(model).widths
    return [(model, width) for width in (range(count) if count > 1 else [None])]


def _evaluate(
    label: str,
    model: Any,
    width: int | None,
    clips: Any,
    settings: dict[str, Any],
    *,
    control: bool,
    note: Any,
) -> None:
    from nicprune.evaluation.video import evaluate_video

    done = evaluate_video(model, clips, width=width, progress=True, **settings)
    note(done, "codec", label)
    if control and done.predicted is not None:
        alone = settings | {"gop": 1}
        note(evaluate_video(model, clips, width=width, progress=True, **alone), "intra", label)
