"""What every test starts with, and codecs as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import daily
import pytest
import torch
from analysed_once import once
from helpers import ARCHITECTURES, built
from torch import nn

from nicprune.data import images as data
from nicprune.pruning import cost, surgery
from nicprune.report import folder as report_folder
from nicprune.report.plots.plot import plots_in_order

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores


@pytest.fixture(scope="session", autouse=True)
def small_samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The middle of each sample photograph stands for it, so that tests do not spend their time on
    decoding and coding whole ones.
    """
    whole, folder = data.sample_photographs, tmp_path_factory.mktemp("samples")

    def cut(split: str) -> list[Path]:
        found = []
        for path in whole(split):
            found.append(folder / f"{path.stem}.png")
            if not found[-1].exists():
                image = data.read_image(path)
                top, left = (
                    (side - least) // 2
                    for side, least in zip(image.shape[1:], (192, 256), strict=True)
                )
                data.write_png(
                    image[:, top : top + 192, left : left + 256].float() / 255, found[-1]
                )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "sample_photographs", cut)
        yield


@pytest.fixture(scope="session", autouse=True)
def analysed_once() -> Iterator[None]:
    """Copies of a codec are traced and counted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "find_groups", once(surgery.find_groups))
        patch.setattr(cost, "count_modules", once(cost.count_modules))
        yield


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole = not any("::" in argument for argument in config.args)
    daily.mark(items, Path(__file__).parent, whole=whole)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, most of whose time they take."""
    blank = [replace(p, draw=lambda lines, theme=None: None) for p in plots_in_order()]
    monkeypatch.setattr(report_folder, "plots_in_order", lambda: blank)


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture in turn."""
    return request.param


@pytest.fixture
def hyperprior() -> nn.Module:
    """A narrow ScaleHyperprior."""
    return built("bmshj2018-hyperprior")[0]


@pytest.fixture
def few_photos(tmp_path: Path) -> Path:
    """A folder of two noisy pictures, for a few steps of training."""
    for name in ("a.png", "b.png"):
        data.write_png(torch.rand(3, 64, 64), tmp_path / "photos" / name)
    return tmp_path / "photos"
