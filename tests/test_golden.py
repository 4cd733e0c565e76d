"""What must not change when files move and names change: structure to the letter, figures within
what processors differ by.

`tests/golden.json` is the record. `python tests/test_golden.py` writes it anew, for a change of
behaviour that is meant.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from helpers import ARCHITECTURES, METHOD_SETTINGS, built, image
from safetensors import safe_open
from torch import nn

import nicprune as nip
from nicprune.cli.application import app
from nicprune.data.images import write_png
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.run import run_recipe
from nicprune.methods import METHODS, attach
from nicprune.pruning.cost import CostModel, measure
from nicprune.storage.checkpoint import save
from nicprune.storage.container import encode
from nicprune.training.loop import fit
from nicprune.training.settings import TrainSettings

FILE = Path(__file__).with_name("golden.json")
FIGURES = {"rel": 2e-3, "abs": 1e-6}
"""By how much figures may differ between processors and versions of torch, after a few steps of
training in float32.
"""
CODECS = [
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-anchor",
    "elic2022-official",
]


def exact(*content: Any) -> str:
    """A short hash of what must stay to the letter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def figures(tensor: torch.Tensor) -> list[float]:
    """A tensor in three figures."""
    values = tensor.detach().double().flatten()
    return [float(values.mean()), float(values.abs().mean()), float(values.square().mean().sqrt())]


def outputs(codec: nn.Module) -> dict[str, Any]:
    """What a codec makes of a picture, in float64."""
    codec = codec.double().eval()
    with torch.no_grad():
        out = codec(image(codec))
    bits = sum(float(-v.log2().sum()) for v in out["likelihoods"].values())
    return {"x_hat": figures(out["x_hat"]), "bits": bits}


def of_architecture(name: str) -> dict[str, Any]:
    """Groups, costs, one-shot pruning and a coded picture."""
    codec, groups = built(name)
    cost = CostModel(codec, groups)
    attached = attach(built(name)[0], "magnitude", budget={"macs": 0.5}, round_to=1)
    keep = attached.keep()
    small = attached.harden()
    data = encode(small, (image(small, 3) * 255)[0].byte())
    return {
        "groups": exact([[g.name, g.width, g.latent, g.pinned] for g in groups]),
        "keys": exact(sorted(codec.state_dict())),
        "macs": cost.totals().macs,
        "by_transform": {t: list(both) for t, both in cost.by_transform().items()},
        "keep": exact({name: [int(i) for i in kept] for name, kept in keep.items()}),
        "pruned_macs": measure(small).macs,
        "pruned_weights": figures(torch.cat([p.flatten() for p in small.parameters()])),
        "coded_bytes": float(len(data)),
        "coded_start": data[:5].hex(),
        "original": outputs(codec),
        "pruned": outputs(small),
    }


def of_method(name: str, folder: Path) -> dict[str, Any]:
    """A few steps of training, what is learnt, and what is saved."""
    torch.manual_seed(0)
    settings = METHOD_SETTINGS.get(name, {})
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        [("none", {}), (name, settings)] if name == "distillation" else [(name, settings)],
    )
    attached.prepare([image(attached.codec, 5)])
    result = fit(
        attached,
        folder,
        steps=8,
        batch_size=2,
        patch_size=64,
        lr=1e-3,
        lmbda=None if attached.own_lambdas else 0.01,
        precision="32",
        progress=False,
    )
    attached.calibrate([image(attached.codec, 5)])
    found: dict[str, Any] = {
        "config": exact(METHODS[name].Config.model_json_schema()["properties"].keys()),
        "keys": exact(sorted(attached.state_dict())),
        "metrics": {
            k: v for k, v in result.metrics.items() if isinstance(v, float) and k != "terms"
        },
        "kmac_per_pixel": attached.cost.totals().kmac_per_pixel(),
    }
    small = attached.harden() if name != "distillation" else attached.detach()
    file = save(small, folder / f"{name}.safetensors")
    with safe_open(file, "pt") as content:
        found["file"] = exact(sorted(content.keys()), sorted(content.metadata()))
    out = small(image(small, 1))
    found["x_hat"] = figures(out["x_hat"])
    return found


def of_recipe(folder: Path) -> dict[str, Any]:
    """The report of a small recipe."""
    content = {
        "version": 1, "name": "tiny", "codec": "golden_codecs:make", "qualities": [1, 2],
        "photographs": {"train": str(folder), "test": str(folder)},
        "training": {"batch_size": 2, "patch_size": 64, "precision": "32", "log_every": 1},
        "sparsify": {"steps": 8, "lr": 1e-4}, "finetune": {"steps": 2},
        "methods": [
            {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1},
            {"name": "slimmable", "widths": [1.0, 0.5], "round_to": 1},
            {"name": "bottleneck_scaling", "between": 1},
        ],
    }  # fmt: skip
    sys.modules["golden_codecs"] = types.SimpleNamespace(
        make=lambda quality: built("bmshj2018-hyperprior")[0]
    )  # type: ignore[assignment]
    beside = folder.with_name(f"{folder.name}-made")  # not among the images
    where = {"reports": beside / "reports", "runs": beside / "runs"}
    page = run_recipe(
        parse_recipe(content, "golden"),
        yaml.safe_dump(content),
        say=lambda line: None,
        progress=False,
        **where,
    )
    with open(page.parent / "table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = json.loads((page.parent / "records.json").read_text())
    return {
        "columns": list(rows[0]),
        "rows": [[row[k] for k in ("quality", "role", "method", "steps", "seed")] for row in rows],
        "figures": [[float(row[k]) for k in ("macs", "params", "bpp", "psnr_db")] for row in rows],
        "files": sorted(
            p.name for p in page.parent.iterdir() if p.is_file() and p.suffix != ".png"
        ),
        "codecs": sorted(p.name for p in (page.parent / "codecs").iterdir()),
        "record": sorted(records[0]),
        "folders": sorted(p.name.rsplit("-", 1)[0] for p in (where["runs"] / "tiny").glob("*/*")),
    }


def of_surface() -> dict[str, Any]:
    """What users write: public names, commands and their options, keys of recipes."""
    command: Any = typer.main.get_command(app)
    return {
        "names": list(nip.__all__),
        "commands": {
            name: sorted(o for p in sub.params for o in p.opts)
            for name, sub in sorted(command.commands.items())
        },
        "recipe": sorted(Recipe.model_fields),
        "training": sorted(TrainSettings.model_fields),
        "methods": sorted(METHODS),
    }


def pictures(folder: Path) -> Path:
    """Two smooth pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        write_png(
            nn.functional.interpolate(small, size=(80, 96), mode="bicubic")[0], folder / f"{i}.png"
        )
    return folder


def compare(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where the two differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        differ = [
            f"{where}.{k}: {'new' if k in found else 'gone'}"
            for k in sorted(expected.keys() ^ found.keys())
        ]
        return differ + [
            line
            for k in sorted(expected.keys() & found.keys())
            for line in compare(found[k], expected[k], f"{where}.{k}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for i, (f, e) in enumerate(zip(found, expected, strict=True))
            for line in compare(f, e, f"{where}.{i}")
        ]
    if isinstance(expected, float) and isinstance(found, float):
        same = math.isclose(found, expected, rel_tol=FIGURES["rel"], abs_tol=FIGURES["abs"])
    else:
        same = found == expected
    return [] if same else [f"{where}: {found!r}, was {expected!r}"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", CODECS)
def test_architectures(name: str, golden: dict[str, Any]) -> None:
    assert compare(of_architecture(name), golden["architectures"][name]) == []


@pytest.mark.parametrize("name", sorted(json.loads(FILE.read_text(encoding="utf-8"))["methods"]))
def test_methods(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    assert compare(of_method(name, pictures(tmp_path)), golden["methods"][name]) == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_recipe(golden: dict[str, Any], tmp_path: Path) -> None:
    assert compare(of_recipe(pictures(tmp_path)), golden["recipe"]) == []


def test_surface(golden: dict[str, Any]) -> None:
    """Names may be added, none may go."""
    assert missing(of_surface(), golden["surface"]) == []


def missing(found: Any, expected: Any, where: str = "") -> list[str]:
    """Names of the record that are no longer there."""
    if isinstance(expected, dict):
        return [
            line
            for key, value in expected.items()
            for line in (
                missing(found[key], value, f"{where}.{key}")
                if key in found
                else [f"{where}.{key} is gone"]
            )
        ]
    return [f"{where}: {name} is gone" for name in expected if name not in found]


def test_a_name_that_goes_is_missed() -> None:
    before = {"names": ["a", "b"], "commands": {"run": ["--quiet"]}}
    assert missing({"names": ["b", "a", "c"], "commands": {"run": ["--quiet"]}}, before) == []
    assert missing({"names": ["a"], "commands": {}}, before) == [
        ".names: b is gone",
        ".commands.run is gone",
    ]


def test_every_method_and_codec_of_the_record_exists(golden: dict[str, Any]) -> None:
    """A new method may have none: `python tests/test_golden.py NAME` adds it."""
    assert golden["methods"].keys() <= set(METHODS)
    assert set(golden["architectures"]) == set(CODECS) <= set(ARCHITECTURES)


def record_methods(names: list[str]) -> dict[str, Any]:
    """The record as it is, with these methods, or the recipe, measured now."""
    before: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name == "recipe":
                before["recipe"] = of_recipe(pictures(Path(scratch) / "recipe"))
            else:
                before["methods"][name] = of_method(name, pictures(Path(scratch) / name))
    return {**before, "surface": of_surface()}


def record() -> dict[str, Any]:
    """Everything, measured now."""
    with tempfile.TemporaryDirectory() as scratch:
        return {
            "surface": of_surface(),
            "architectures": {name: of_architecture(name) for name in CODECS},
            "methods": {
                name: of_method(name, pictures(Path(scratch) / name)) for name in sorted(METHODS)
            },
            "recipe": of_recipe(pictures(Path(scratch) / "recipe")),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    content = record_methods(sys.argv[1:]) if sys.argv[1:] else record()
    FILE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
