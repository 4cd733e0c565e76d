"""Codecs on clips: what is scored is what was coded, and x264 and x265 code with low delay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import built
from helpers_video import HEIGHT, WIDTH, Frames, ResidualCoder, moving
from torch import nn

from nicprune.common.errors import CodecError, DataError, RecipeError
from nicprune.data.clips import clips_in
from nicprune.data.video_frames import from_rgb, luma_weights, name_colours
from nicprune.evaluation import video
from nicprune.evaluation.classical_video import ENCODERS, evaluate_classical_video, rate_bytes
from nicprune.evaluation.memory import peak_bytes
from nicprune.evaluation.quality import psnr, string_bytes
from nicprune.evaluation.video import FrameScores, evaluate_video, yuv_psnr
from nicprune.methods import attach
from nicprune.pruning.cost import measure
from nicprune.report.video import video_record as video_record_of
from nicprune.runtime.accelerate import accelerate
from nicprune.storage.coded_video import open_video
from nicprune.storage.video_container import decode_video, encode_video


def scores_of_a_file(codec: nn.Module, clip: Frames, path: Path, **settings: Any) -> Any:
    """Rates by frame and PSNR by frame, of a file."""
    encode_video(codec, clip, path, **settings)
    with open_video(path) as opened:
        bits = [8 * string_bytes(f.strings) / (HEIGHT * WIDTH) for f in opened.frames()]
    decoded = decode_video(codec, path)
    return bits, [psnr(a / 255, b / 255) for a, b in zip(clip.frames(), decoded, strict=True)]


def test_scores_are_those_of_the_file(tmp_path: Path, hyperprior: Any) -> None:
    clip = Frames(moving(3))
    found = evaluate_video(hyperprior, [clip, clip], gop=2)
    bits, quality = scores_of_a_file(hyperprior, clip, tmp_path / "a.npv")
    for score in found.clips:
        assert (score.frames, score.width, score.height) == (3, WIDTH, HEIGHT)
        assert score.bpp == score.bpp_intra == pytest.approx(np.mean(bits))
        assert score.bpp_predicted is None and score.ms_ssim is None
        assert score.psnr_db == pytest.approx(np.mean(quality), abs=0.01)
        assert score.kbits == pytest.approx(score.bpp * WIDTH * HEIGHT * 25 / 1000)
        assert score.encode_s > 0 and score.decode_s > 0
    assert found.predicted is None and found.gop == 2 and "GOP 2" in str(found)
    assert len(evaluate_video(hyperprior, [clip], frames=2).clips) == 1
    assert evaluate_video(hyperprior, [clip], frames=2).clips[0].frames == 2


def test_macs_are_the_cost_models_and_memory_is_that_of_coding(hyperprior: Any) -> None:
    for codec, width in ((hyperprior, None), (slimmable(), 1)):
        found = evaluate_video(codec, [Frames(moving(1, 64, 64))], width=width)
        if width is not None:
            codec.set_width(width)
        totals = codec.totals() if width is not None else measure(codec)
        assert found.intra is not None and (found.intra.width, found.intra.height) == (64, 64)
        # The cost model counts the likelihoods of z too, which coding looks up in tables.
        assert found.intra.encode_kmac == pytest.approx(totals.kmac_per_pixel("encoder"), rel=0.01)
        assert found.intra.decode_kmac == pytest.approx(totals.kmac_per_pixel("decoder"), rel=0.01)
        assert found.setting == ("" if width is None else "width 1")
        coder, x = video.video_coder(codec, width), torch.rand(1, 3, 64, 64)
        coder.compress(x)
        expected = peak_bytes(lambda: coder.compress(x))  # noqa: B023
        assert found.intra.encode_peak_bytes == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_macs_of_an_accelerated_codec_are_its_own(backend: str, hyperprior: Any) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    clips = [Frames(moving(1, 64, 64))]
    own = evaluate_video(hyperprior, clips).intra
    found = evaluate_video(accelerate(hyperprior, backend), clips)
    fast = found.intra
    assert own is not None and fast is not None
    assert (fast.encode_kmac, fast.decode_kmac) == (own.encode_kmac, own.decode_kmac)
    assert fast.encode_peak_bytes is fast.decode_peak_bytes is None and " MB" not in str(found)
    record = video_record_of(found, "codec", "fast", "")
    assert record.encode_peak_mb is None and record.intra_encode_kmac == fast.encode_kmac


def test_macs_do_not_depend_on_the_size_of_the_clip() -> None:
    codec: Any = attach(ScaleHyperprior(8, 64).eval(), "temporal_entropy_model", round_to=1)
    codec.update(force=True)
    totals = codec.roles.temporal.predicted_totals()
    for side in (64, 256):  # at the larger one, convolutions are computed by fewer products
        found = evaluate_video(codec, [Frames(moving(2, side, side))])
        assert found.predicted is not None
        for what in ("encode", "decode"):
            predicted = totals.kmac_per_pixel(f"{what}r")
            # The likelihoods of z are looked up in tables.
            assert getattr(found.predicted, f"{what}_kmac") == pytest.approx(predicted, rel=2e-3)


@pytest.mark.parametrize("number, weights", [(1, (0.2126, 0.0722)), (6, (0.299, 0.114))])
def test_planes_are_by_the_matrix_that_the_file_names(
    number: int, weights: tuple[float, float], tmp_path: Path
) -> None:
    av: Any = pytest.importorskip("av")
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        name_colours(stream.codec_context, 64, number)
        frame = from_rgb(moving(1, 64, 96)[0], "yuv420p", number)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (clip,) = clips_in(tmp_path / "a.mp4")
    assert clip.matrix == number and luma_weights(clip.height, clip.matrix) == weights
    picture = next(iter(clip.frames())).unsqueeze(0) / 255
    scores, other = FrameScores(clip), torch.rand(picture.shape)
    scores.add(picture, other, 8, intra=True)
    assert scores.result(0, 0).psnr_y_db == yuv_psnr(picture, other, number)[0]
    assert yuv_psnr(picture, other, number)[0] != yuv_psnr(picture, other, 7 - number)[0]


def test_the_rate_of_a_classical_codec_does_not_depend_on_threads() -> None:
    before, clip = torch.get_num_threads(), [Frames(moving(4, 160, 192))]
    for name in sorted(ENCODERS):
        try:
            rates = []
            for threads in (1, 4):
                torch.set_num_threads(threads)
                (found,) = evaluate_classical_video(name, clip, crfs=(24,))
                rates.append((found.mean("bpp"), found.mean("psnr_db")))
        finally:
            torch.set_num_threads(before)
        assert rates[0] == rates[1], name


def slimmable() -> Any:
    return attach(built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1)


def test_predicted_frames_are_scored_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "video_coder", ResidualCoder)
    codec = built("bmshj2018-factorized")[0]
    clip = Frames(moving(5, 64, 64))
    found = evaluate_video(codec, [clip], gop=3)
    score = found.clips[0]
    assert score.bpp_intra is not None and score.bpp_predicted is not None
    assert score.bpp == pytest.approx((2 * score.bpp_intra + 3 * score.bpp_predicted) / 5)
    assert found.intra is not None and found.predicted is not None
    assert found.predicted.encode_kmac == pytest.approx(found.intra.encode_kmac)
    alone = evaluate_video(codec, [clip], gop=1)
    assert alone.predicted is None and alone.clips[0].bpp_predicted is None
    assert alone.clips[0].bpp > score.bpp


def test_a_codec_that_decodes_other_symbols_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(ResidualCoder):
        def decompress(self, strings: Any, shape: Any, previous: Any = None) -> Any:
            if previous is not None:
                strings = [[strings[0][0][::-1]]]
            return super().decompress(strings, shape, previous)

    monkeypatch.setattr(video, "video_coder", Drifting)
    with pytest.raises(CodecError, match="frame 1: the codec decodes other symbols"):
        evaluate_video(built("bmshj2018-factorized")[0], [Frames(moving(1, 64, 64) * 2)])


def test_what_cannot_be_evaluated_is_refused(hyperprior: Any) -> None:
    with pytest.raises(DataError, match="no clips"):
        evaluate_video(hyperprior, [])
    with pytest.raises(RecipeError, match="one frame or more"):
        evaluate_video(hyperprior, [Frames(moving(1))], gop=0)
    with pytest.raises(RecipeError, match="width"):
        evaluate_video(hyperprior, [Frames(moving(1))], width=1)
    with pytest.raises(CodecError, match="'x266'.*'x264'"):
        evaluate_classical_video("x266", [Frames(moving(1))])


@pytest.mark.parametrize("height, weights", [(576, (0.299, 0.114)), (720, (0.2126, 0.0722))])
def test_psnr_of_planes(height: int, weights: tuple[float, float]) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 3, height, 15, generator=draw).mul(255).round() / 255 for _ in range(2))

    def planes(x: torch.Tensor) -> list[np.ndarray]:
        red, green, blue = x[0].numpy().astype(np.float64) * 255
        y = weights[0] * red + (1 - sum(weights)) * green + weights[1] * blue
        u, v = (blue - y) / (2 - 2 * weights[1]) + 128, (red - y) / (2 - 2 * weights[0]) + 128

        def halved(p: np.ndarray) -> np.ndarray:
            cells = [
                [p[r : r + 2, c : c + 2].mean() for c in range(0, p.shape[1], 2)]
                for r in range(0, p.shape[0], 2)
            ]
            return np.clip(np.round(np.array(cells)), 0, 255)

        return [np.round(y), halved(u), halved(v)]

    for found, one, other in zip(yuv_psnr(a, b), planes(a), planes(b), strict=True):
        assert found == pytest.approx(
            10 * math.log10(255**2 / ((one - other) ** 2).mean()), abs=0.01
        )
    assert yuv_psnr(a, a) == (math.inf,) * 3


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_classical_codecs_code_with_low_delay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nicprune.evaluation import classical_video

    packets: list[Any] = []
    own = classical_video._decoded

    def seen(decoder: Any, given: list[Any], *args: Any) -> Any:
        packets[:] = given
        return own(decoder, given, *args)

    monkeypatch.setattr(classical_video, "_decoded", seen)
    clip = Frames(moving(9, 96, 128))
    fine, coarse = evaluate_classical_video(name, [clip], gop=4, crfs=(12, 40))
    assert [bool(p.is_keyframe) for p in packets] == [n % 4 == 0 for n in range(9)]
    assert all(p.pts == p.dts for p in packets), "a frame waits for a later one"
    assert [p.pts for p in packets] == list(range(9))
    one, other = fine.clips[0], coarse.clips[0]
    assert one.bpp > 2 * other.bpp and one.psnr_db > other.psnr_db + 3 and one.psnr_db > 34
    assert other.bpp == pytest.approx(
        sum(8 * rate_bytes(name, bytes(p)) for p in packets) / (9 * 96 * 128)
    )
    if name == "x264":  # its note of its settings does not count
        assert b"x264 - core" in bytes(packets[0])
        assert rate_bytes(name, bytes(packets[0])) < len(bytes(packets[0])) - 400
        assert rate_bytes(name, bytes(packets[1])) == len(bytes(packets[1]))
    assert fine.setting == "crf 12" and fine.intra is None
    assert one.bpp_intra is not None and one.bpp_predicted is not None
    short = evaluate_classical_video(name, [clip], gop=1, crfs=(30,), frames=2)
    assert short[0].clips[0].frames == 2 and short[0].clips[0].bpp_predicted is None


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize("size", [(95, 128), (96, 127), (719, 65)])
def test_odd_sides_are_padded_and_scored_as_they_are(name: str, size: tuple[int, int]) -> None:
    frames = moving(2, *size)
    (odd,) = evaluate_classical_video(name, [Frames(frames)], crfs=(16,))
    even = [torch.cat([f, f[:, -1:]], 1)[:, : size[0] + size[0] % 2] for f in frames]
    even = [torch.cat([f, f[:, :, -1:]], 2)[:, :, : size[1] + size[1] % 2] for f in even]
    clip = Frames(even)
    clip.matrix = 6  # 719 lines are BT.601, and stay so with a row more
    (padded,) = evaluate_classical_video(name, [clip], crfs=(16,))
    one, other = odd.clips[0], padded.clips[0]
    assert (one.height, one.width) == size
    assert one.bpp * math.prod(size) == pytest.approx(other.bpp * math.prod(even[0].shape[1:]))
    assert one.psnr_db == pytest.approx(other.psnr_db, abs=0.2) and one.psnr_db > 33
    assert one.psnr_yuv_db == pytest.approx(other.psnr_yuv_db, abs=0.2)


def test_what_a_classical_codec_refuses_is_a_line() -> None:
    with pytest.raises(CodecError, match="x264 does not code frames"):
        evaluate_classical_video("x264", [Frames(moving(2, 64, 64))], preset="never")
