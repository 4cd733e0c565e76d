"""Random crops of clips: one crop through a clip, the distance in time, the same for the same
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from nicprune.common.errors import DataError
from nicprune.data.clip_patches import ClipPatches, ClipSampling
from nicprune.data.clips import Clip

SEPTUPLET = ClipSampling(strides=(1, 2, 3, 6), span=7, frames=7)


class Counting(Clip):
    """A clip whose pixels say where they are: (time, row, column)."""

    name, fps = "counting", Fraction(25)

    def __init__(self, frames: int, height: int = 70, width: int = 90):
        self.count, self.height, self.width = frames, height, width
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        self.reads += indices
        rows = torch.arange(self.height)[:, None].expand(self.height, self.width)
        columns = torch.arange(self.width)[None].expand(self.height, self.width)
        return [torch.stack((torch.full_like(rows, t), rows, columns)).byte() for t in indices]

    def _from(self, start: int) -> Iterator[Tensor]:
        return iter(self.read(range(start, self.count)))


def patches(*clips: Counting, sampling: ClipSampling = SEPTUPLET, **more: int) -> ClipPatches:
    return ClipPatches(clips, 64, sampling, **more)


def test_a_clip_has_one_crop_one_flip_and_one_distance_in_time() -> None:
    source = patches(Counting(40), Counting(9))
    seen = set()
    for step in range(24):
        batch = (source.batch(3, seed=0, step=step) * 255).round().int()
        assert batch.shape[0] == 3 and batch.shape[2:] == (3, 64, 64)
        for clip in batch:
            times = clip[:, 0, 0, 0]
            (stride,) = set(times.diff().tolist())
            assert len(times) == SEPTUPLET.count(stride)
            assert bool((clip[:, 1:] == clip[:1, 1:]).all()), "rows and columns stay the same"
            flipped = bool(clip[0, 2, 0, 0] > clip[0, 2, 0, 1])
            seen.add((stride, flipped))
    source.close()
    assert seen == {(stride, flip) for stride in (1, 2, 3, 6) for flip in (False, True)}


def test_septuplets_are_taken_whole_at_each_stride() -> None:
    source = patches(Counting(7))
    lengths = {source._draw(1, 0, step, 0).shape[1] for step in range(30)}
    assert lengths == {7, 4, 3, 2}


def test_a_batch_depends_on_seed_step_and_rank_alone() -> None:
    first, second = patches(Counting(20), Counting(30)), patches(Counting(20), Counting(30))
    in_order = [first.batch(2, seed=3, step=step) for step in range(4)]
    for step in (2, 0, 3, 1):
        assert torch.equal(second.batch(2, seed=3, step=step), in_order[step])
    assert not torch.equal(second._draw(2, 4, 0, 0), in_order[0])
    assert not torch.equal(second._draw(2, 3, 0, 1), in_order[0])
    first.close(), second.close()


def test_frames_are_read_once_as_long_as_memory_lasts() -> None:
    clip = Counting(7)
    source = patches(clip)
    drawn = [source._draw(2, 0, step, 0) for step in range(10)]
    assert len(clip.reads) == len(set(clip.reads)) <= 7
    small = Counting(7)
    bounded = patches(small, cache_bytes=2 * 3 * 70 * 90)
    assert all(torch.equal(bounded._draw(2, 0, s, 0), batch) for s, batch in enumerate(drawn))
    assert len(small.reads) > 7 and bounded._held <= 2 * 3 * 70 * 90


def test_clips_that_are_too_small_or_too_short_are_left_out() -> None:
    source = patches(Counting(7), Counting(1), Counting(40, height=60), Counting(9))
    assert [len(clip) for clip in source.clips] == [7, 9]
    source = patches(Counting(3), Counting(2))
    assert {source._draw(1, 0, step, 0).shape[1] for step in range(20)} == {3, 2}
    with pytest.raises(DataError, match="none of 2 has frames of 64x64 pixels, and two of them 1"):
        patches(Counting(1), Counting(40, width=63))


def test_what_a_run_learns_from_is_known_by_its_content() -> None:
    assert patches(Counting(9)).sources() == patches(Counting(9)).sources()
    assert patches(Counting(9)).sources() != patches(Counting(8)).sources()
