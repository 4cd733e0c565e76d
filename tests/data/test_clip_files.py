"""Clips are written frame by frame, whole or up to what their source could give."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers_video import moving
from torch import Tensor

from nicprune.common.errors import FileError
from nicprune.data.clip_files import check_clip_output, write_clip
from nicprune.data.clips import clips_in


@pytest.mark.parametrize("name, most", [("out", 0), ("out.y4m", 3), ("out.mp4", 40)])
@pytest.mark.parametrize("size", [(70, 90), (71, 91)])
def test_what_is_written_is_read_again(
    name: str, most: int, size: tuple[int, int], tmp_path: Path
) -> None:
    frames, path = moving(4, *size), tmp_path / name
    for count in (4, 3):  # a shorter clip leaves nothing of the longer
        assert write_clip(iter(frames[:count]), path, Fraction(30)) == count
        (clip,) = clips_in(path)
        found = list(clip.frames())
        assert len(found) == count == len(clip)
        differences = [(a.float() - b.float()).abs() for a, b in zip(found, frames, strict=False)]
        assert max(float(d.max() if most < 10 else d.mean() * 10) for d in differences) <= most
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["out", "out.y4m", "out.mp4"])
@pytest.mark.parametrize("good", [0, 3])
def test_what_came_before_an_error_is_kept(name: str, good: int, tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield from moving(good)
        raise FileError("damaged at frame 3")

    with pytest.raises(FileError, match="damaged at frame 3") as caught:
        write_clip(failing(), tmp_path / name, Fraction(25))
    assert ("3 frames before it are in" in str(caught.value)) == bool(good)
    assert (tmp_path / name).exists() == bool(good)
    if good:
        assert len(clips_in(tmp_path / name)[0]) == 3


@pytest.mark.parametrize("name", ["out", "out.y4m", "out.mp4"])
def test_any_other_error_leaves_nothing(name: str, tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield from moving(2)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_clip(failing(), tmp_path / name, Fraction(25))
    assert not list(tmp_path.iterdir())


def test_outputs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    (tmp_path / "file").touch()
    for name, expected in (
        ("a.webm", "another suffix"),
        ("file", "is no folder"),
        ("folder", "holds other files than frames"),
    ):
        with pytest.raises(FileError, match=expected):
            check_clip_output(tmp_path / name)
    check_clip_output(tmp_path / "folder", force=True)
    write_clip(iter(moving(1)), tmp_path / "folder", Fraction(25))
    assert (tmp_path / "folder" / "notes.txt").exists()
    check_clip_output(tmp_path / "new")
    write_clip(iter([torch.zeros(3, 8, 8, dtype=torch.uint8)]), tmp_path / "new", Fraction(25))
    check_clip_output(tmp_path / "new")
