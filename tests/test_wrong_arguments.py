"""Arguments of another type than the public functions take: each is refused in one clear line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import built
from torch import nn

import nicprune as nip
from nicprune.data.images import write_png

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: found
    for name in nip.__all__
    if inspect.isfunction(found := getattr(nip, name)) and inspect.signature(found).parameters
}
CODECS = {"codec", "before", "after", "model", "adapted", "teacher"}
IMAGES = {"image", "images", "train", "validation"}
PATHS = {"path", "data"}
DEVICES = {"device"}
NAMES = {"name"}
PIXELS = torch.zeros(3, 64, 64, dtype=torch.uint8)

WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(CODECS, [None, "demo-hyperprior", 3, nn.Conv2d(3, 3, 1), {"g_a.0.weight": 1}]),
    **dict.fromkeys(IMAGES, [3, PIXELS.numpy(), [PIXELS], [3], [], b"x", {"a": 1}, Ellipsis]),
    **dict.fromkeys(PATHS, [3, None, [], PIXELS.numpy()]),
    **dict.fromkeys(NAMES, [3, None, [], PIXELS.numpy()]),
    **dict.fromkeys(DEVICES, ["tpu", "meta", "cuda:99", [], 99]),
}
ACCEPTED = [("attach", "teacher", None)]
"""What means that nothing is given."""

CASES = [
    (name, parameter, number)
    for name, function in FUNCTIONS.items()
    for parameter in inspect.signature(function).parameters
    for number, wrong in enumerate(WRONG.get(parameter, []))
    if not any((name, parameter) == case[:2] and wrong is case[2] for case in ACCEPTED)
]


def given(name: str, folder: Path) -> dict[str, Any]:
    """Return arguments that a function takes, as far as it must have them."""
    codec = built("bmshj2018-hyperprior")[0]
    right = {
        **dict.fromkeys(CODECS, codec),
        **dict.fromkeys(IMAGES, "samples"),
        "image": PIXELS,
        "path": folder / "x.safetensors",
        "data": b"",
        "name": "demo-hyperprior",
        "method": "magnitude",
        "keep": {},
        "table": None,
        "choose": lambda table: {},
    }
    needed = inspect.signature(FUNCTIONS[name]).parameters
    found = {
        parameter: right[parameter]
        for parameter, about in needed.items()
        if about.default is about.empty and parameter in right
    }
    if name == "fit":
        found |= {"steps": 1, "batch_size": 1, "patch_size": 64, "progress": False}
    return found | ({"budget": {"macs": 0.5}} if name == "attach" else {})


def test_cases_cover_the_functions_that_users_call() -> None:
    assert {name for name, *_ in CASES} >= {
        "accelerate", "analyse", "attach", "compare", "decode", "encode", "evaluate", "fit", "load",
        "load_adaptation", "load_codec", "measure", "prune", "read_recipe", "save",
        "save_adaptation", "video_coder",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameter", "number"), CASES)
def test_it_is_refused_in_one_line(name: str, parameter: str, number: int, tmp_path: Path) -> None:
    wrong = WRONG[parameter][number]
    with pytest.raises(nip.NicpruneError) as caught:
        FUNCTIONS[name](**given(name, tmp_path) | {parameter: wrong})
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    kind = type(wrong).__name__
    if parameter not in DEVICES and not (parameter in IMAGES and isinstance(wrong, list)):
        assert f"got {kind}" in said
    assert not list(tmp_path.iterdir())


def test_files_may_come_from_anything_that_names_them(tmp_path: Path) -> None:
    for name in "ab":
        write_png(torch.rand(3, 64, 64), tmp_path / f"{name}.png")
    codec = built("bmshj2018-factorized")[0]
    every = [tmp_path / "a.png", tmp_path / "b.png"]
    for images in (
        tmp_path,
        str(tmp_path),
        every,
        tuple(every),
        set(every),
        tmp_path.glob("*.png"),
    ):
        both = nip.compare(codec, codec, images)  # type: ignore[arg-type]
        assert len(both.before.images) == len(both.after.images) == 2


def test_an_array_is_not_taken_for_a_list_of_files() -> None:
    with pytest.raises(nip.NicpruneError, match="expected a folder .* got ndarray"):
        nip.calibration_images(np.zeros((2, 3)))  # type: ignore[arg-type]
