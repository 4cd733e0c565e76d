"""A codec of one's own that keeps another as its attribute `codec` is more than that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import CompressionModel, ScaleHyperprior
from torch import Tensor, nn

import nicprune as nip
from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.example import size_multiple
from nicprune.common.errors import FileError


class Wrapped(CompressionModel):
    """A codec with a filter behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = ScaleHyperprior(8, 12)
        self.post = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = self.codec(x)
        return {**out, "x_hat": self.post(out["x_hat"])}

    def compress(self, x: Tensor) -> dict[str, Any]:
        sent: dict[str, Any] = self.codec.compress(x)
        return sent

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        return {"x_hat": self.post(self.codec.decompress(strings, shape)["x_hat"]).clamp(0, 1)}

    def update(self, scale_table: Any = None, force: bool = False) -> bool:  # type: ignore[override]
        return bool(self.codec.update(scale_table, force=force))


@pytest.fixture
def wrapped() -> Any:
    torch.manual_seed(0)
    codec: Any = Wrapped().eval()
    codec.update(force=True)
    return codec


def test_a_wrapper_is_counted_whole(wrapped: Any) -> None:
    assert unwrap(wrapped) is wrapped
    inner, outer = nip.measure(wrapped.codec), nip.measure(wrapped)
    assert outer.params - inner.params == sum(p.numel() for p in wrapped.post.parameters())
    assert outer.macs - inner.macs == 27 * 3 * 64 * 64


def test_a_wrapper_is_saved_whole_and_its_files_are_its_own(wrapped: Any, tmp_path: Path) -> None:
    again = nip.load(nip.save(wrapped, tmp_path / "w.safetensors"))
    assert type(again) is Wrapped and torch.equal(again.post.weight, wrapped.post.weight)
    picture = torch.rand(3, 64, 64).mul(255).byte()
    data = nip.encode(wrapped, picture)
    assert torch.equal(nip.decode(again, data), nip.decode(wrapped, data))
    with torch.no_grad():
        again.post.bias.add_(0.3)
    for other in (again, wrapped.codec):
        with pytest.raises(FileError, match="coded with another codec"):
            nip.decode(other, data)


@pytest.mark.parametrize("method", ["magnitude", "mask_decay"])
def test_a_wrapper_is_trained_and_pruned_whole(
    method: str, wrapped: Any, few_photos: Path, tmp_path: Path
) -> None:
    settings = {"decay_steps": 2} if method == "mask_decay" else {}
    masked = nip.attach(wrapped, method, budget={"macs": 0.6}, round_to=1, **settings)
    fit = {"lmbda": 0.01, "batch_size": 1, "patch_size": 64, "precision": "32", "progress": False}
    nip.fit(masked, few_photos, steps=3, **fit)
    small = masked.harden()
    again = nip.load(nip.save(small, tmp_path / "s.safetensors"))
    assert type(again) is Wrapped and nip.measure(again).macs <= 0.6 * nip.measure(wrapped).macs
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x)["x_hat"], small.eval()(x)["x_hat"])


def test_images_are_found_anew_where_layers_changed() -> None:
    codec: Any = ScaleHyperprior(8, 12).eval()
    assert size_multiple(codec) == 64
    codec.h_a = nn.Sequential(*codec.h_a, nn.Conv2d(8, 8, 3, stride=2, padding=1))
    codec.h_s = nn.Sequential(
        nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1), *codec.h_s
    )
    assert size_multiple(codec) == 128
