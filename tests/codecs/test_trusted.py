"""A class is CompressAI's by what it is, not by what it is called."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.layers import GDN
from compressai.models import FactorizedPrior
from helpers import built, make_telling
from torch import Tensor, nn

from nicprune.codecs import trusted
from nicprune.codecs.evc import EVC
from nicprune.codecs.structure import structure
from nicprune.codecs.trusted import is_trusted
from nicprune.pruning.surgery import analyse, has_foreign_code


def test_every_class_of_the_zoo_is_trusted(architecture: str) -> None:
    codec = built(architecture)[0]
    ours = {type(m) for m in codec.modules() if not type(m).__module__.startswith("torch.")}
    assert all(map(is_trusted, ours))
    assert is_trusted(EVC)


class Twelve(FactorizedPrior):
    """A fork's codec, whose code holds a width."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x).view(1, 12, 4, 4)
        y_hat, likelihoods = self.entropy_bottleneck(y)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("compressai.models.stf", "WACNN"),  # a class that only the fork has
        ("compressai.models.google", "FactorizedPrior"),  # another one by the same name
        ("compressai.models.google", "Twelve"),
    ],
)
def test_a_forks_class_is_tried(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = type(name, (Twelve,), {"__module__": module, "__qualname__": name})
    if module not in sys.modules:
        package = types.ModuleType(module)
        setattr(package, name, fork)
        monkeypatch.setitem(sys.modules, module, package)
    codec = make_telling(fork(8, 12))  # type: ignore[call-arg]
    assert has_foreign_code(codec)
    assert "depends on this width" in str(analyse(codec)["g_a.6"].pinned)


def test_a_fork_in_the_place_of_compressai_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fork is what is installed: the same module, the same name, other code, a known layer."""
    file = Path(str(sys.modules[GDN.__module__].__file__))
    text = file.read_bytes()
    for content, known in ((text.replace(b"\n", b"\r\n"), True), (text + b"\n", False)):
        other = tmp_path / "gdn.py"
        other.write_bytes(content)
        monkeypatch.setattr(sys.modules[GDN.__module__], "__file__", str(other))
        is_trusted.cache_clear()
        trusted._digest.cache_clear()
        try:
            assert is_trusted(GDN) is known
            assert has_foreign_code(FactorizedPrior(8, 12)) is not known
        finally:
            is_trusted.cache_clear()
            trusted._digest.cache_clear()


class Grouped(nn.Sequential):
    """A container that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.view(1, 8, *y.shape[2:])


def test_a_container_with_code_of_its_own_is_tried() -> None:
    codec: Any = FactorizedPrior(8, 12)
    assert not has_foreign_code(codec)
    codec.g_a[2] = Grouped(codec.g_a[2], nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        assert has_foreign_code(codec)
    assert "depends on this width" in str(analyse(make_telling(codec))["g_a.2.1"].pinned)


class Sized(nn.Module):
    """A layer that keeps a width, as layers of a fork do."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.width, self.kernel = width, kernel


def test_numbers_of_a_forks_layers_are_widths() -> None:
    Sized.__module__ = "compressai.layers.stf"
    try:
        assert structure(Sized(5)) == {"": ["Sized", {}]}
    finally:
        Sized.__module__ = __name__
