"""CPU time of training with SOAP to the loss that Adam ends with, relative to Adam's, in one
process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.zoo import LAMBDAS
from nicprune.common.config import parse
from nicprune.data.images import list_images, read_image
from nicprune.data.patches import Patches
from nicprune.evaluation.timer import Measure
from nicprune.storage.named import load_codec
from nicprune.training.optimizers import make_optimizer
from nicprune.training.precision import autocast_dtype, entropy_models_in_float32
from nicprune.training.settings import TrainSettings, learning_rate
from nicprune.training.trained_parameters import split_parameters

CODECS = {"demo-hyperprior": 64, "bmshj2018-hyperprior": 128}
"""Codecs that are trained from random weights, with their N."""
STEPS = 600
LOOK_EVERY = 25
RATES = {"adam": 1e-3, "soap": 2e-3}
"""Peak learning rates: reached after a warm-up, then decayed to zero."""
QUALITY = 3


@dataclass
class Curve:
    """Validation losses of one training run, with the step and the CPU seconds of training before
    each.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def reached(self, loss: float) -> int | None:
        """Return the index of the first validation with at most this loss; None if there is
        none.
        """
        return next((i for i, found in enumerate(self.losses) if found <= loss), None)


def train(
    name: str, optimizer: str, steps: int, stop_at: float = 0.0, look_every: int = LOOK_EVERY
) -> Curve:
    """Train a codec from random weights on the training samples, until its loss on the test samples
    is at most `stop_at`.
    """
    wanted = {
        "steps": steps,
        "optimizer": optimizer,
        "lr": RATES[optimizer],
        "warmup": min(100, steps // 5),
    }
    settings = parse(TrainSettings, {**wanted, "batch_size": 4, "patch_size": 128}, "bench")
    torch.manual_seed(0)
    codec = load_codec(name, QUALITY, weights="none").to(memory_format=torch.channels_last).train()
    net, aux = split_parameters(codec)
    steppers = (
        make_optimizer(optimizer, net, settings.lr or 0.0),
        torch.optim.Adam(aux, lr=settings.aux_lr),
    )
    loss = rate_distortion_loss(LAMBDAS["mse"][QUALITY - 1], "mse")
    dtype = autocast_dtype("auto", torch.device("cpu"))
    patches = Patches("samples", settings.patch_size)
    validation = [_middle(read_image(path)) for path in list_images("samples", "test")]
    curve, spent = Curve(), 0.0

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = codec(x)
        found: Tensor = loss({**out, "x_hat": out["x_hat"].float()}, x)["loss"]
        return found

    with entropy_models_in_float32(codec):
        for step in range(steps):
            batch = patches.batch(settings.batch_size, seed=0, step=step).contiguous(
                memory_format=torch.channels_last
            )
            started = time.process_time()
            for group in steppers[0].param_groups:
                group["lr"] = learning_rate(settings, step)
            for stepper in steppers:
                stepper.zero_grad(set_to_none=True)
            forward(batch).backward()
            nn.utils.clip_grad_norm_(net, settings.clip)
            codec.aux_loss().backward()  # type: ignore[operator]
            for stepper in steppers:
                stepper.step()
            spent += time.process_time() - started
            if (step + 1) % look_every == 0 or step + 1 == steps:
                codec.eval()
                with torch.no_grad():
                    found = sum(float(forward(x)) for x in validation) / len(validation)
                codec.train()
                curve.steps.append(step + 1)
                curve.seconds.append(spent)
                curve.losses.append(found)
                if found <= stop_at:
                    break
    patches.close()
    return curve


def _middle(image: Tensor, side: int = 256) -> Tensor:
    top, left = ((length - side) // 2 for length in image.shape[1:])
    return image[None, :, top : top + side, left : left + side].float() / 255


def bench_optimizer(steps: int = STEPS) -> Iterator[Measure]:
    """Measure the CPU time in which SOAP reaches the validation loss that Adam ends with, from
    random weights, and the CPU time of a step.
    """
    for name, width in CODECS.items():
        adam = train(name, "adam", steps)
        target = adam.losses[-1]
        soap = train(name, "soap", steps, stop_at=target)
        found = soap.reached(target)
        where = -1 if found is None else found
        there = (
            f"SOAP: {soap.losses[where]:.2f} after {soap.steps[where]}, {soap.seconds[where]:.0f} s"
        )
        detail = f"Adam: loss {target:.2f} after {steps} steps, {adam.seconds[-1]:.0f} s; {there}"
        size = "batch 4 of 128x128, from random weights"
        value = adam.seconds[-1] / soap.seconds[where] if found is not None else 0.0
        more: dict[str, Any] = {"size": size, "threads": torch.get_num_threads(), "kept": 1}
        yield Measure(
            f"CPU time to Adam's last loss, Adam / SOAP, N={width}",
            value,
            "x",
            goal=3.0,
            at_least=True,
            detail=detail,
            **more,
        )
        each = [curve.seconds[-1] / curve.steps[-1] for curve in (soap, adam)]
        detail = f"{each[0] * 1e3:.0f} ms and {each[1] * 1e3:.0f} ms"
        yield Measure(
            f"CPU time of a step, SOAP / Adam, N={width}",
            each[0] / each[1],
            "x",
            detail=detail,
            **more,
        )
