"""`nicprune encode` and `nicprune decode` of videos."""

from __future__ import annotations

from pathlib import Path

import typer

from nicprune.cli.options import load_one

Named = tuple[str, int | None, str, str]
"""A codec as the command line names it: name, quality, metric, weights."""


def encode_clip(
    codec: Named,
    source: str,
    output: Path,
    *,
    width: int | None,
    gop: int | None,
    frames: int | None,
    size: tuple[int, int] | None,
    force: bool,
) -> None:
    """Encode a video file or a folder of frames into a .npv."""
    from nicprune.common.errors import DataError
    from nicprune.common.files import check_output
    from nicprune.data.clips import clips_in
    from nicprune.storage.coded_video import MAGIC
    from nicprune.storage.video_container import GOP, encode_video

    name, quality, metric, weights = codec
    check_output(
        output, [source, name, weights], lambda start: start.startswith(MAGIC), force=force
    )
    clips = clips_in(source, size=size)
    if len(clips) > 1:
        raise DataError(
            f"{source} holds {len(clips)} clips; encode one of them: {clips[0].name},"
            f" {clips[1].name}{', ...' if len(clips) > 2 else ''}"
        )
    done = encode_video(
        load_one(name, quality, metric, weights),
        clips[0],
        output,
        gop=gop or GOP,
        width=width,
        frames=frames,
        progress=True,
    )
    typer.echo(
        f"{output}: {done.frames} frames of {clips[0].width}x{clips[0].height} pixels in"
        f" {done.groups} groups, {done.bytes:,} bytes, {done.bpp:.4f} bpp, {done.kbits:.1f} kbit/s,"
        " headers included"
    )


def decode_clip(codec: Named, file: str, output: Path, *, force: bool) -> None:
    """Decode a .npv into a folder of PNG frames, a .y4m or a .mp4."""
    from nicprune.common.files import check_output
    from nicprune.data.clip_files import check_clip_output, is_folder_of_frames, write_clip
    from nicprune.storage.coded_video import open_video
    from nicprune.storage.video_container import VideoCoder

    name, quality, metric, weights = codec
    check_clip_output(output, force=force)
    if not is_folder_of_frames(output):
        check_output(output, [file, name, weights], _is_video, force=force)
    loaded = load_one(name, quality, metric, weights)
    with open_video(file) as video:
        coder = VideoCoder(loaded)
        header = video.header
        count = write_clip(coder.decode_opened(video, file), output, header.fps)
    typer.echo(f"wrote {output} ({count} frames of {header.width}x{header.height} pixels)")


def _is_video(start: bytes) -> bool:
    return start.startswith(b"YUV4MPEG2") or start[4:8] == b"ftyp"
