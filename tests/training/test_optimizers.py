"""Optimisers: the same steps as the library's own, whatever the memory format; state that resumes
to the bit.
"""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn

from nicprune.common.errors import RecipeError
from nicprune.training.optimizers import DEFAULT_LR, OPTIMIZERS, ConvolutionSOAP, make_optimizer

SETTINGS = {
    "lr": 1e-2,
    "betas": (0.9, 0.95),
    "weight_decay": 0.0,
    "precondition_frequency": 3,
    "max_precondition_dim": 64,
}


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients whose axes differ in scale, so that eigenbases are well separated."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        for axis, size in enumerate(shape):
            scale = torch.linspace(0.2, 2, size, dtype=torch.float64)
            gradient = gradient * scale.view([-1 if a == axis else 1 for a in range(len(shape))])
        found.append(gradient)
    return found


def trained(optimizer: type[SOAP], start: Tensor, steps: list[Tensor]) -> Tensor:
    """A parameter after some steps."""
    parameter = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    stepper = optimizer([parameter], **SETTINGS)  # type: ignore[arg-type]
    for gradient in steps:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        stepper.step()
    return parameter.detach()


@pytest.mark.parametrize(
    "shape", [(6, 5, 3, 3), (8, 3, 5, 5), (5, 7, 1, 1), (4, 80, 3, 3), (1, 6, 3, 2)], ids=str
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_soap_takes_the_steps_of_the_library_on_three_axes(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    """As the library does where the weight is given as a tensor of the three axes: channels, kernel
    places, channels.
    """
    steps = gradients(shape, 11)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = trained(
        ConvolutionSOAP,
        start.contiguous(memory_format=torch.channels_last) if channels_last else start,
        steps,
    )
    theirs = trained(SOAP, start.flatten(2), [g.flatten(2) for g in steps])
    assert not torch.allclose(ours, start, atol=1e-2)
    assert torch.allclose(ours.flatten(2), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "shape",
    [(6, 5), (7,), (6, 4, 5), (6, 5, 3, 2, 4), (3, 3, 3, 3, 3), (2, 3, 4, 2, 3, 2)],
    ids=str,
)
def test_soap_leaves_other_parameters_to_the_library(shape: tuple[int, ...]) -> None:
    start = torch.zeros(shape, dtype=torch.float64)
    assert torch.allclose(
        trained(ConvolutionSOAP, start, gradients(shape, 8)),
        trained(SOAP, start, gradients(shape, 8)),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1, 1), (4, 1, 1, 1, 1)], ids=str)
def test_soap_takes_parameters_of_few_elements(shape: tuple[int, ...]) -> None:
    start = torch.ones(shape, dtype=torch.float64)
    found = trained(ConvolutionSOAP, start, [torch.ones(shape, dtype=torch.float64)] * 4)
    assert found.shape == start.shape and bool((found < start).all())


def codec_like() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2, 2),
        nn.LeakyReLU(),
        nn.Conv2d(6, 4, 1),
        nn.ConvTranspose2d(4, 3, 3, 2, 1, 1),
    ).to(memory_format=torch.channels_last)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (model(images) - images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_on_to_the_bit(name: str, tmp_path: object) -> None:
    model = codec_like()
    optimizer = make_optimizer(name, model.parameters(), 1e-3)
    for number in range(13):
        step(model, optimizer, number)
    again = copy.deepcopy(model)
    file = f"{tmp_path}/state.pt"
    torch.save(optimizer.state_dict(), file)
    resumed = make_optimizer(name, again.parameters(), 1e-3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for number in range(13, 30):  # over a change of eigenbases
        step(model, optimizer, number)
        step(again, resumed, number)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    model = codec_like()
    optimizer = make_optimizer(name, model.parameters(), 1e-2)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))

    def loss() -> float:
        with torch.no_grad():
            return float((model(images) - images).square().mean())

    before = loss()
    for number in range(60):
        step(model, optimizer, number)
    assert loss() < 0.7 * before


def test_parameters_without_gradient_stay() -> None:
    model = codec_like()
    optimizer = make_optimizer("soap", model.parameters(), 1e-2)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    for number in range(5):
        step(model, optimizer, number)
    model[0].requires_grad_(True)  # one that joins later, as in a scalable encoder
    assert all(torch.equal(before[k], v) for k, v in model[0].state_dict().items())
    step(model, optimizer, 5)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and not torch.equal(
        before["weight"], model[0].weight
    )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown optimizer 'soup'; did you mean 'soap'"):
        make_optimizer("soup", [nn.Parameter(torch.zeros(1))], 1e-3)
    assert DEFAULT_LR.keys() == OPTIMIZERS.keys()


def test_longer_axes_are_not_preconditioned() -> None:
    """Only the axes of at most the given length have an eigenbasis; the rest is Adam's."""
    layer = nn.Conv2d(6, 24, 1)
    optimizer = make_optimizer("soap", layer.parameters(), 1e-2, max_precondition_dim=8)
    layer(torch.rand(1, 6, 4, 4)).square().sum().backward()
    optimizer.step()
    bases = optimizer.state[layer.weight]["Q"]
    assert [len(basis) for basis in bases] == [0, 6, 1]
