"""A recipe is told that official weights do not exist, before it asks a network for them."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from compressai.zoo import image_models

from nicprune.codecs.zoo import LAMBDAS, UNTRAINED, ZOO, check_official, qualities
from nicprune.common.errors import CodecError
from nicprune.data.images import write_png
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.resolve import resolve
from nicprune.storage.named import load_codec

NAMES = [*ZOO, *UNTRAINED, "mbt2018-mean-64-96", "cheng2020-anchor-96"]


@pytest.mark.parametrize(("name", "metric"), list(product(NAMES, LAMBDAS)))
def test_the_check_and_the_download_agree(
    name: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    for module in {sys.modules[build.__module__] for build in image_models.values()}:
        monkeypatch.setattr(module, "load_state_dict_from_url", no_network)
    for quality in qualities(name):
        try:
            check_official(name, quality, metric)
            said = None
        except CodecError as error:
            said = str(error)
        with pytest.raises(CodecError, match="official weights") as caught:
            load_codec(name, quality, metric=metric)
        downloads = "could not be downloaded: no network" in str(caught.value)
        assert downloads is (said is None)
        assert downloads or str(caught.value) == said
    if not name.startswith("elic"):  # large, and made alike
        assert load_codec(name, quality, metric=metric, weights="none")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"codec": "evc-s"}, "evc-s has no official weights"),
        ({"codec": "mbt2018-mean-64-96"}, "at the widths of its qualities alone"),
        ({"codec": "bmshj2018-factorized-relu"}, "no official weights for quality 1 and mse"),
        (
            {
                "codec": "bmshj2018-hyperprior-vbr",
                "metric": "ms-ssim",
                "training": {"batch_size": 1, "patch_size": 192},
            },
            "quality 1 and ms-ssim",
        ),
        ({"codec": "evc-s", "weights": "none"}, None),
        ({"codec": "bmshj2018-hyperprior"}, None),
    ],
)
def test_a_recipe_is_told(changed: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    write_png(torch.rand(3, 192, 192), tmp_path / "photos" / "a.png")
    photos = str(tmp_path / "photos")
    recipe = parse_recipe(
        {
            "version": 1,
            "name": "official",
            "task": "train",
            "qualities": [1],
            "photographs": {"train": photos, "test": photos, "overlap": True},
            "training": {"batch_size": 1, "patch_size": 64},
            "finetune": {"steps": 1},
            **changed,
        },
        "recipe.yaml",
    )
    if said is None:
        assert resolve(recipe, tmp_path / "runs")
    else:
        with pytest.raises(CodecError, match=said):
            resolve(recipe, tmp_path / "runs")
