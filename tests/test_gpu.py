"""What runs on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHOD_SETTINGS, built, image, same_state, state_of

from nicprune.evaluation.evaluate import evaluate
from nicprune.methods import METHODS, attach
from nicprune.storage.checkpoint import load, save
from nicprune.training.loop import fit
from nicprune.training.optimizers import OPTIMIZERS

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

QUICK: dict[str, Any] = {
    "accelerator": DEVICE,
    "batch_size": 2,
    "patch_size": 64,
    "lr": 1e-3,
    "lmbda": 0.01,
    "progress": False,
}


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_lowers_the_loss(optimizer: str, precision: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    quick = {**QUICK, "optimizer": optimizer, "precision": precision, "schedule": "constant"}
    losses = [fit(codec, "samples", steps=20, **quick).metrics["loss"] for _ in range(2)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_from_its_checkpoint(optimizer: str, tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    options = {**QUICK, "optimizer": optimizer, "folder": tmp_path, "checkpoint_every": 4}
    fit(codec, "samples", steps=8, **options)
    again = built("bmshj2018-hyperprior")[0]
    assert fit(again, "samples", steps=8, **options).step == 8  # nothing is left to do
    assert same_state(state_of(codec.cpu()), state_of(again.cpu()))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_is_saved(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attached = attach(built("bmshj2018-hyperprior")[0], method, **METHOD_SETTINGS.get(method, {}))
    attached.prepare([image(attached.codec, 5)])
    own = {"lmbda": None} if attached.own_lambdas else {}
    fit(attached, "samples", steps=8, **(QUICK | own))
    attached.calibrate([image(attached.codec, 5)])
    small = attached.detach() if method == "distillation" else attached.harden()
    loaded = load(save(small, tmp_path / "codec.safetensors"))
    x = image(small, 1)
    small.cpu().eval()
    with torch.no_grad():
        assert torch.allclose(small(x)["x_hat"], loaded(x)["x_hat"], atol=1e-5)


def test_masked_equals_pruned_in_float64() -> None:
    codec = built("mbt2018-mean")[0].double().to(DEVICE)
    attached = attach(codec, "magnitude", budget={"macs": 0.5}, round_to=1)
    small = attached.harden()  # verifies itself on the device on which it is
    assert next(small.parameters()).device.type == torch.device(DEVICE).type


def test_bitstreams_decode_on_the_device_that_wrote_them() -> None:
    found = evaluate(built("bmshj2018-hyperprior")[0], "samples", device=DEVICE)
    assert all(score.psnr_db > 0 and score.bpp > 0 for score in found.images)
