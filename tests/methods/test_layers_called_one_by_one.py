"""A codec that calls the layers of g_a and g_s, and never g_a and g_s: hooks on these would not
run, so a method works on the layers, or is refused in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branching_codecs import Piecewise
from compressai.losses import RateDistortionLoss
from compressai.models import ScaleHyperprior
from helpers import make_telling

from nicprune.codecs.roles import roles_of
from nicprune.common.errors import CodecError
from nicprune.methods import METHODS, attach
from nicprune.storage.container import encode
from nicprune.storage.export import export_onnx

MODULATORS = [name for name in sorted(METHODS) if METHODS[name].rates_field and name != "slimmable"]


def built(cls: type[ScaleHyperprior]) -> Any:
    torch.manual_seed(0)
    stock = make_telling(ScaleHyperprior(8, 12))
    codec = cls(8, 12)
    codec.load_state_dict(stock.state_dict())
    return codec.eval()


def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_ends_of_the_latents_are_the_layers() -> None:
    found = roles_of(built(Piecewise))
    assert found.analysis is not None and found.synthesis is not None
    assert (found.analysis.module, found.synthesis.module) == ("g_a.6", "g_s.0")
    whole = roles_of(built(ScaleHyperprior))
    assert whole.analysis is not None and whole.analysis.module == "g_a"


@pytest.mark.parametrize("name", MODULATORS)
def test_a_modulator_does_what_it_does_where_transforms_are_called(name: str) -> None:
    given, results = image(), []
    for cls in (ScaleHyperprior, Piecewise):
        torch.manual_seed(0)
        model = attach(built(cls), name, lambdas=[0.0018, 0.02])
        model.train()
        learnt = [p for p in model.methods.parameters() if p.requires_grad]
        loss = RateDistortionLoss(0.01)(model(given), given)["loss"]
        moved = torch.autograd.grad(loss, learnt, allow_unused=True)
        assert any(g is not None and bool((g != 0).any()) for g in moved)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in learnt:
                parameter += 0.1 * torch.randn_like(parameter)
            model.eval()
            results.append([model(given, level=level)["x_hat"] for level in (0, 1)])
    for stock, own in zip(*results, strict=True):
        assert torch.allclose(stock, own, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))
    assert not torch.equal(*results[1])


def test_others_work_or_say_why_not(tmp_path: Path) -> None:
    distilled = attach(
        built(Piecewise),
        [("magnitude", {"budget": {"macs": 0.7}, "round_to": 1}), ("distillation", {"latent": 1})],
    )
    x = image()
    assert float(distilled.loss(distilled.train()(x), x).detach()) >= 0
    for name, settings in (
        ("scalable_encoder", {"encoders": 2, "share": 0.5, "decay_steps": 8, "round_to": 2}),
        ("temporal_entropy_model", {}),
    ):
        with pytest.raises(CodecError, match="g_a.6"):
            attach(built(Piecewise), name, **settings)
    with pytest.raises(CodecError, match="calls its layers one by one"):
        export_onnx(built(Piecewise), tmp_path)


def test_its_levels_are_coded() -> None:
    model = attach(built(Piecewise), "bottleneck_scaling", lambdas=[0.0018, 0.02])
    with torch.no_grad():
        for parameter in model.methods.parameters():
            parameter += torch.linspace(0, 1, parameter.numel()).view_as(parameter)
    picture = (image()[0] * 255).byte()
    assert encode(model, picture, level=0) != encode(model, picture, level=1)
