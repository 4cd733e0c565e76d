"""Keys of runs depend on the code of a user's codec or method, and on what a factory reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nicprune.common.source_code import source_digests
from nicprune.data import images
from nicprune.data.images import write_png
from nicprune.experiments.plan import plan_runs
from nicprune.experiments.recipe_files import read_recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.resolve import finished, resolve
from nicprune.experiments.run import run_recipe
from nicprune.methods import METHODS
from nicprune.report.record_files import read

FILES = {
    "__init__.py": "",
    "factories.py": """
import json
from pathlib import Path
import torch
from compressai.models import FactorizedPrior
from .layers import Bounded

def make():
    codec = FactorizedPrior(4, 6)
    here = Path(__file__).parent
    codec.g_a.append(Bounded(**json.loads((here / "settings.json").read_text())))
    codec.g_a[0].bias.data = torch.load(here / "bias.pt")
    return codec
""",
    "layers.py": """
from torch import nn
from own_package import operations

class Bounded(nn.Module):
    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, x):
        from .late import again
        return again(operations.bounded(x, self.bound))
""",
    "operations.py": "def bounded(x, bound):\n    return x.clamp(-bound, bound)\n",
    "late.py": "def again(x):\n    return x * 1.0\n",
    "plots.py": "COLOUR = 1\n",
    "settings.json": '{"bound": 9.0}',
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a factory, which reads a bias and a bound from files."""
    folder = tmp_path / "own_package"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    torch.save(torch.zeros(4), folder / "bias.pt")
    write_png(torch.rand(3, 64, 64), tmp_path / "train" / "a.png")
    write_png(torch.rand(3, 64, 64), tmp_path / "test" / "b.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    forget()


def forget() -> None:
    """Let the package be imported anew, as another process does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def recipe_of(package: Path, **changes: Any) -> Any:
    photographs = {name: str(package.parent / name) for name in ("train", "test")}
    content = {
        "version": 1,
        "name": "own",
        "codec": "own_package.factories:make",
        "qualities": [1],
        "photographs": photographs,
        "training": {"batch_size": 1, "patch_size": 64, "precision": "32"},
        "methods": [{"name": "magnitude", "budget": {"macs": 0.5}, "round_to": 1}],
    }
    return parse_recipe(content | changes, "recipe.yaml")


def keys(package: Path, **changes: Any) -> list[str]:
    forget()
    return [job.key for job in plan_runs(recipe_of(package, **changes), package.parent)]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("factories.py", "FactorizedPrior(4, 6)", "FactorizedPrior(4, 8)"),
        ("layers.py", "return again", "return -again"),
        ("operations.py", "clamp(-bound, bound)", "clamp(0, bound)"),
        ("late.py", "x * 1.0", "x * 0.5"),
        ("settings.json", "9.0", "8.0"),
    ],
)
def test_a_change_of_the_codec_is_another_run(file: str, old: str, new: str, package: Path) -> None:
    before = keys(package)
    assert keys(package) == before
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    assert not set(before) & set(keys(package))
    (package / file).write_text(text)
    assert keys(package) == before


def test_weights_that_a_factory_reads_count(package: Path) -> None:
    before = keys(package)
    torch.save(torch.ones(4), package / "bias.pt")
    assert not set(before) & set(keys(package))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("layers.py", "return again(", "return again(  # as before\n            "),
        ("plots.py", "1", "2"),
    ],
)
def test_what_changes_no_codec_changes_no_key(file: str, old: str, new: str, package: Path) -> None:
    before = keys(package)
    (package / file).write_text((package / file).read_text().replace(old, new))
    assert keys(package) == before


def test_keys_depend_neither_on_what_ran_before_nor_on_the_random_state(package: Path) -> None:
    before = keys(package)
    recipe = recipe_of(package)
    resolve(recipe, package.parent / "runs")  # runs the codec, which imports `late`
    state = torch.get_rng_state()
    assert [job.key for job in plan_runs(recipe, package.parent)] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("undrawn")
def test_finished_runs_are_of_the_code_as_it_was(package: Path, tmp_path: Path) -> None:
    run_recipe(
        recipe_of(package),
        reports=tmp_path / "reports",
        runs=tmp_path / "runs",
        say=lambda line: None,
        progress=False,
    )
    assert all(finished(job) for job in plan_runs(recipe_of(package), tmp_path / "runs"))
    forget()
    (package / "operations.py").write_text(FILES["operations.py"].replace("-bound", "0"))
    assert not any(finished(job) for job in plan_runs(recipe_of(package), tmp_path / "runs"))


def test_the_code_of_a_method_of_ones_own_counts(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = dict(METHODS._items)
    monkeypatch.setattr(METHODS, "_items", items)
    file = package.parent / "own_method.py"

    def keys_of(text: str) -> list[str]:
        items.pop("own_order", None)
        file.write_text(text)
        monkeypatch.delitem(sys.modules, "own_method", raising=False)
        __import__("own_method")
        methods = [{"name": "own_order", "budget": {"macs": 0.5}}]
        return keys(package, codec="demo-hyperprior", methods=methods, control=False)

    code = (
        "from nicprune.methods import METHODS\n"
        "from nicprune.methods.pruners.magnitude import Magnitude\n\n"
        "@METHODS.register('own_order')\n"
        "class OwnOrder(Magnitude):\n    name = 'own_order'\n    sign = 1\n"
    )
    original, pruned = keys_of(code)
    assert keys_of(f"# the same\n{code}") == [original, pruned]
    again = keys_of(code.replace("sign = 1", "sign = -1"))
    assert again[0] == original and again[1] != pruned


def test_keys_of_codecs_by_name_are_those_of_the_committed_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skimage = pytest.importorskip("skimage.data")
    folder = Path(skimage.__file__).parent  # whole photographs, not the parts that tests use

    def whole(split: str) -> list[Path]:
        names = images.SAMPLE_TEST if split == "test" else images.SAMPLE_TRAIN
        return [folder / name for name in names]

    monkeypatch.setattr(images, "sample_photographs", whole)
    recipe = read_recipe("quickstart")[0]
    committed = Path(__file__).parents[2] / "reports" / "quickstart" / "records.json"
    planned = {job.key for job in plan_runs(recipe, Path("runs"))}
    assert planned == {record.key for record in read(committed)}


def test_code_that_is_in_no_file_or_a_librarys_is_left_out(package: Path) -> None:
    (package / "broken.py").write_text("def (")
    (package / "odd.py").write_text("from ..... import nothing\nimport os, torch, nicprune\n")
    names = ["own_package.odd", "builtins", "torch.nn", "nowhere", "sys", "own_package.broken"]
    assert list(source_digests(names)) == ["own_package.broken", "own_package.odd"]
    assert {name.partition(".")[0] for name in source_digests(["yaml", "torch"])} == {"yaml"}
