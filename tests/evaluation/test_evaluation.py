"""Evaluation: real strings, any size, the field's definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.utils.eval_model.__main__ import compute_metrics
from helpers import built, hook_count, image, same_state, state_of
from torch import nn

import nicprune.evaluation.evaluate as evaluation
from nicprune.common.errors import CodecError, DataError
from nicprune.data.images import read_image, write_png
from nicprune.evaluation.evaluate import (
    Comparison,
    Evaluation,
    compare,
    evaluate,
    evaluate_image,
    write_results,
)
from nicprune.evaluation.padding import crop, pad
from nicprune.evaluation.quality import psnr, string_bytes
from nicprune.methods import attach
from nicprune.pruning.cost import measure


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sizes that are no multiple of anything."""
    for i, (h, w) in enumerate([(70, 65), (200, 193)]):
        small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        write_png(
            nn.functional.interpolate(small, size=(h, w), mode="bicubic")[0], tmp_path / f"{i}.png"
        )
    return tmp_path


def test_padding_is_undone() -> None:
    x = torch.rand(1, 3, 70, 129)
    padded, padding = pad(x, 64)
    assert padded.shape[-2:] == (128, 192) and torch.equal(crop(padded, padding), x)
    assert pad(torch.rand(1, 3, 64, 128), 64)[1] == (0, 0, 0, 0)


def test_psnr_is_compressais() -> None:
    a, b = torch.rand(1, 3, 200, 200), torch.rand(1, 3, 200, 200)
    assert psnr(a, b) == pytest.approx(compute_metrics(a, b)["psnr-rgb"], abs=1e-4)
    eighths = (a * 255).round() / 255
    assert psnr(eighths, eighths + 0.4 / 255) == float("inf"), (
        "what rounds to the same 8 bits is the same image"
    )


def test_bpp_is_of_the_strings_and_near_the_estimate(photos: Path) -> None:
    codec, _ = built("mbt2018-mean")
    codec.update(force=True)
    picture = read_image(photos / "1.png")
    score, decoded = evaluate_image(codec, picture, "1.png")
    padded, padding = pad(picture.unsqueeze(0).float() / 255, 64)
    sent = codec.compress(padded)
    assert score.bpp == 8 * sum(len(s) for part in sent["strings"] for s in part) / (200 * 193)
    assert score.bpp == pytest.approx(score.bpp_estimated, rel=0.25)
    assert torch.equal(
        decoded,
        crop(codec.decompress(sent["strings"], sent["shape"])["x_hat"], padding)[0].clamp(0, 1),
    )
    assert decoded.shape == picture.shape and score.ms_ssim is not None


def test_times_taken_while_others_ran_say_so(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    codec, _ = built("bmshj2018-factorized")
    readings = iter([(0.0, 0.0, 0.0), (8.0, 10.0, 3.0)] * 2 + [(0.0, 0.0, 0.0), (4.0, 10.0, 3.0)])
    monkeypatch.setattr(evaluation, "processor_time", lambda: next(readings))
    both = compare(codec, codec, photos / "0.png")
    assert (
        both.after.busy == 0.5
        and "other programs used 50% of the processor" in str(both)
        and str(both).count("rough: other programs used the processor") == 2
        and "faster" not in str(both)
        and "slower" not in str(both)
        and "other programs used 50%" in str(both.after)
    )
    assert (
        json.loads(write_results(both.after, tmp_path / "r.json").read_text())["nicprune"]["busy"]
        == 0.5
    )
    assert "others" not in str(evaluate(codec, photos / "0.png"))


def test_a_comparison_says_which_way_a_figure_moved(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "processor_time", lambda: (0.0, 0.0, 0.0))
    wide, narrow = built("bmshj2018-factorized")[0], built("bmshj2018-factorized")[0]
    narrow = attach(narrow, "magnitude", budget={"macs": 0.5}, round_to=1).harden()
    smaller, larger = (
        compare(*both, photos / "0.png") for both in ((wide, narrow), (narrow, wide))
    )
    ratio = f"{measure(wide).macs / measure(narrow).macs:.2f}x"
    assert f"{ratio} fewer" in str(smaller) and f"{ratio} more" in str(larger)
    for before, after, said in ((0.2, 0.1, "2.00x faster"), (0.1, 0.2, "2.00x slower")):
        both = Comparison(_timed(smaller.before, before), _timed(smaller.after, after))
        assert str(both).count(said) == 2
        unknown = replace(both.after, busy=None)
        assert said not in str(Comparison(both.before, unknown)), "nor where it is not known"


def _timed(found: Evaluation, seconds: float) -> Evaluation:
    images = tuple(replace(one, encode_s=seconds, decode_s=seconds) for one in found.images)
    return replace(found, images=images, busy=0.0)


def test_every_architecture_is_evaluated(architecture: str, photos: Path) -> None:
    codec, _ = built(architecture)
    before = state_of(codec)
    result = evaluate(codec, photos / "0.png")
    assert (
        np.isfinite(result.mean("psnr_db"))
        and result.mean("bpp") > 0
        and result.mean("ms_ssim") is None
    )
    assert same_state(before, state_of(codec)), "the codec is left as it was"


def test_means_and_compressai_json(photos: Path, tmp_path: Path, hyperprior: nn.Module) -> None:
    result = evaluate(hyperprior, photos)
    assert result.mean("bpp") == pytest.approx(sum(i.bpp for i in result.images) / 2)
    content = json.loads(write_results(result, tmp_path / "r.json").read_text())
    assert (
        content["results"]["psnr-rgb"] == [pytest.approx(result.mean("psnr_db"))]
        and content["name"] == "bmshj2018-hyperprior"
    )
    from compressai.utils.plot.__main__ import parse_json_file

    drawn = parse_json_file(str(tmp_path / "r.json"), "psnr")
    assert (
        drawn["ys"] == content["results"]["psnr-rgb"] and drawn["xs"] == content["results"]["bpp"]
    )


def test_compare_says_both_sides(photos: Path, hyperprior: nn.Module) -> None:
    small = attach(hyperprior, "magnitude", budget={"macs": 0.5}, round_to=1).harden()
    text = str(compare(hyperprior, small, photos / "0.png"))
    assert "x fewer" in text and "PSNR dB" in text and "counted by fvcore" in text


def test_a_codec_with_masks_on_is_evaluated_as_it_is(photos: Path, hyperprior: nn.Module) -> None:
    masked = attach(
        hyperprior, "mask_decay", budget={"macs": 0.5}, round_to=1, decay_steps=4
    ).eval()
    with torch.no_grad():
        for values in masked.methods[0].masks.values:
            values.uniform_(0.5, 1)
    on, plain = evaluate(hyperprior, photos / "0.png"), evaluate(masked.plain(), photos / "0.png")
    assert (
        on.mean("psnr_db") == pytest.approx(plain.mean("psnr_db"), abs=1e-3)
        and on.cost == plain.cost
    )
    assert masked.detach() is hyperprior and hook_count(hyperprior) == 0


def test_refusals(tmp_path: Path, hyperprior: nn.Module) -> None:
    with pytest.raises(DataError, match="no images in"):
        evaluate(hyperprior, tmp_path)
    with pytest.raises(CodecError, match="plain codec"):
        evaluate(attach(hyperprior, "none"), tmp_path)


def test_bytes_of_nested_strings() -> None:
    assert string_bytes([[b"abc"], [[b"d", b""], [b"ef"]]]) == 6


def test_image_of_the_attached_codec_is_that_of_its_plain_copy(hyperprior: nn.Module) -> None:
    masked = attach(
        hyperprior, "mask_decay", budget={"macs": 0.5}, round_to=1, decay_steps=4
    ).eval()
    with torch.no_grad():
        for values in masked.methods[0].masks.values:
            values.uniform_(0.5, 1)
    x = image(hyperprior)
    sent, plain = masked.compress(x), masked.plain().eval()
    plain.update(force=True)
    assert sent["strings"] == plain.compress(x)["strings"]
    assert torch.equal(
        masked.decompress(sent["strings"], sent["shape"])["x_hat"],
        plain.decompress(sent["strings"], sent["shape"])["x_hat"],
    )


def test_classical_codecs_follow_their_settings(photos: Path) -> None:
    from nicprune.evaluation.classical import evaluate_classical, psnr_at

    for name in ("jpeg", "jpeg-optimized", "webp"):
        points = evaluate_classical(name, photos, [10, 50, 90])
        assert [p.bpp for p in points] == sorted(p.bpp for p in points) and [
            p.psnr_db for p in points
        ] == sorted(p.psnr_db for p in points)
        assert psnr_at(points, points[1].bpp) == pytest.approx(points[1].psnr_db)
        assert (
            points[0].psnr_db
            < psnr_at(points, (points[0].bpp * points[1].bpp) ** 0.5)
            < points[1].psnr_db
        )
        assert psnr_at(points, 100) is None
    with pytest.raises(CodecError, match="did you mean 'jpeg'"):
        evaluate_classical("jpg", photos)


def test_a_codec_that_was_not_hardened_is_beside_its_whole(tmp_path: Path) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    slim = attach(codec, "slimmable", widths=[1.0, 0.5], round_to=1)
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    found = evaluate(slim, tmp_path, width=1)
    assert (
        found.original_cost == measure(built("bmshj2018-hyperprior")[0])
        and found.cost.macs < 0.5 * found.original_cost.macs
    )
