"""What `fit` is given reaches what uses it, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import FactorizedPrior
from helpers import built, same_state, state_of
from torch import Tensor, nn

from nicprune.common.errors import CodecError, RecipeError, TrainingError
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.training.loop import fit

QUICK: dict[str, Any] = {
    "batch_size": 1,
    "patch_size": 64,
    "precision": "32",
    "accelerator": "cpu",
    "progress": False,
}
RATES = [
    ("bit_rate_modulator", {"lambdas": [0.001, 0.01]}),
    ("slimmable", {"widths": [1.0, 0.5], "round_to": 1, "lambdas": [0.01, 0.005]}),
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        write_png(torch.rand(3, 80, 96), tmp_path / "photos" / name)
    return tmp_path / "photos"


def codec() -> Any:
    return built("bmshj2018-hyperprior")[0]


def of_images(codec: nn.Module, photos: Path, **settings: Any) -> dict[str, torch.Tensor]:
    fit(codec, photos, steps=2, **QUICK, **settings)
    return state_of(codec)


@pytest.mark.parametrize("lmbda", [0.0018, 0.0483])
def test_the_teacher_is_weighed_by_the_lambda_of_training(lmbda: float, photos: Path) -> None:
    """With the whole output from the teacher, and the image as the teacher's reconstruction, the
    loss is that of training without one.
    """

    class Perfect(type(codec())):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {**super().forward(x), "x_hat": x}

    alone, taught = codec(), codec()
    expected = of_images(alone, photos, lmbda=lmbda)
    attached = attach(taught, "distillation", output=1.0, teacher=codec())
    attached.roles.taught[0]._teacher[0].__class__ = Perfect
    fit(attached, photos, steps=2, lmbda=lmbda, **QUICK)
    found = state_of(taught)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_distillation_does_not_take_another_lambda_or_metric(photos: Path) -> None:
    attached = attach(codec(), "distillation", output=0.5, lmbda=0.01, teacher=codec())
    with pytest.raises(RecipeError, match=r"lmbda 0.01 is not the training's, 0.02: leave it out"):
        fit(attached, photos, steps=1, lmbda=0.02, **QUICK)
    fit(attached, photos, steps=1, lmbda=0.01, **QUICK)
    with pytest.raises(RecipeError, match="the training's metric is ms-ssim: leave output out"):
        fit(
            attached, photos, steps=1, lmbda=0.01, metric="ms-ssim", **(QUICK | {"patch_size": 192})
        )


def test_narrow_widths_learn_from_wide_ones_by_the_lambda_of_training(photos: Path) -> None:
    attached = attach(codec(), "slimmable", widths=[1.0, 0.5], round_to=1, distill=1.0)
    x, weighed = torch.rand(1, 3, 64, 64), []
    for lmbda in (0.01, 0.02):
        attached.set_objective(lmbda)
        for width in (0, 1):
            with attached.at_width(width), torch.no_grad():
                torch.manual_seed(0)
                found = attached.loss(attached(x), x)
        weighed.append(float(found))
    assert weighed[0] > 0 and weighed[1] == pytest.approx(2 * weighed[0])


@pytest.mark.parametrize(("method", "settings"), RATES, ids=[name for name, _ in RATES])
def test_a_lambda_that_nothing_uses_is_refused(
    method: str, settings: dict[str, Any], photos: Path
) -> None:
    attached = attach(codec(), method, **settings)
    with pytest.raises(
        RecipeError, match="lmbda: the attached method trains by lambdas of its own"
    ):
        fit(attached, photos, steps=1, lmbda=0.01, **QUICK)
    assert fit(attached, photos, steps=1, **QUICK).step == 1


def test_tensorboard_needs_a_folder(photos: Path) -> None:
    with pytest.raises(RecipeError, match="tensorboard writes into the folder of the run: give"):
        fit(codec(), photos, steps=1, tensorboard=True, **QUICK)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_refused(kind: torch.dtype, photos: Path) -> None:
    name = str(kind).removeprefix("torch.")
    with pytest.raises(CodecError, match=rf"weights in float32, \S+ is {name}: codec.float\(\)"):
        fit(codec().to(kind), photos, steps=1, **QUICK)


def test_complex_weights_are_refused_in_a_line_that_says_what_to_do(photos: Path) -> None:
    model = codec()
    model.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(CodecError, match=r"spectrum is complex64: .*torch\.view_as_complex"):
        fit(model, photos, steps=1, **QUICK)


def test_iterators_are_taken_as_lists_are(photos: Path) -> None:
    """Images that are given as an iterator are looked at more than once."""
    settings = {"form": "finetune_all", "domain": "screen", "replay": 0.5, "adapt_steps": 2}
    states = []
    for given in (list, iter):
        attached = attach(codec(), "adaptation", **settings)
        paths = sorted(photos.glob("*.png"))
        fit(attached, given(paths), replay=given(paths), steps=2, lmbda=0.01, **QUICK)
        states.append(state_of(attached))
    assert same_state(*states)


def test_a_run_that_ends_when_methods_are_done_says_its_metrics(photos: Path) -> None:
    attached = attach(codec(), "mask_decay", budget={"macs": 0.9}, round_to=1, decay_steps=3)
    found = fit(attached, photos, steps=9, lmbda=0.01, until_done=True, log_every=50, **QUICK)
    assert found.step == 3 and found.metrics["loss"] > 0


def test_a_run_with_other_validation_images_is_another(photos: Path, tmp_path: Path) -> None:
    settings = RATES[1][1] | {"schedule": {"first": 1, "every": 1}}
    write_png(torch.rand(3, 80, 96), tmp_path / "other" / "d.png")

    def go(validation: Path, steps: int = 8) -> Any:
        attached = attach(codec(), "slimmable", **settings)
        return fit(
            attached, photos, validation=validation, folder=tmp_path / "run", steps=steps, **QUICK
        )

    go(photos)
    assert go(photos).step == 8
    with pytest.raises(RecipeError, match="belongs to another run"):
        go(tmp_path / "other")


class Mixing(FactorizedPrior):
    """Adds latents to values in float32, which torch does not do for others."""

    def forward(self, x: Tensor) -> Any:
        y = self.g_a(x)
        added = torch.zeros(y.shape).index_add(1, torch.arange(y.shape[1]), y)
        return super().forward(x) | {"added": added}


def test_a_codec_that_bfloat16_is_too_little_for_is_told(photos: Path) -> None:
    settings = QUICK | {"precision": "bf16", "lmbda": 0.01}
    with pytest.raises(
        TrainingError, match="Mixing does not run in bfloat16: .*scalar type"
    ) as told:
        fit(Mixing(8, 12), photos, steps=2, **settings)
    assert "\n" not in str(told.value) and str(told.value).endswith('precision="32"')
    fit(Mixing(8, 12), photos, steps=2, **settings | {"precision": "32"})
