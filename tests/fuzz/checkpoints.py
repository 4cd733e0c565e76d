"""Checkpoints of training and files of weights: damaged, or made on purpose."""

from __future__ import annotations

import copy
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from compressai.models import FactorizedPrior
from torch import Tensor, nn

from nicprune.codecs.provenance import provenance
from nicprune.codecs.state_dicts import read_state_dict
from nicprune.data.images import write_png
from nicprune.storage.state import fill
from nicprune.training.checkpoints import NEWEST, PREVIOUS, Checkpoints
from nicprune.training.loop import fit

from .damage import damaged
from .trial import Believed
from .values import ODD, at, change, places

SETTINGS: dict[str, Any] = {
    "batch_size": 1, "patch_size": 64, "lmbda": 0.01, "precision": "32", "progress": False,
    "checkpoint_every": 1, "steps": 2,
}  # fmt: skip


def codec() -> nn.Module:
    """The smallest there is."""
    torch.manual_seed(0)
    made: nn.Module = FactorizedPrior(2, 3)
    provenance(made)
    return made


class Inputs:
    """Folders of runs, and weights."""

    lines = 1

    def __init__(self) -> None:
        self.photo = write_png(torch.rand(3, 64, 64), "photo.png")
        self.run, self.damaged = Path("run"), Path("damaged")
        model = codec()
        fit(model, self.photo, folder=self.run, **SETTINGS)
        self.files = {path.name: path.read_bytes() for path in self.run.iterdir()}
        self.states = {
            name: torch.load(self.run / name, weights_only=True) for name in (NEWEST, PREVIOUS)
        }
        self.finished = model.state_dict()
        weights = {
            "zip.pth.tar": {"state_dict": model.state_dict(), "epoch": 3},
            "bare.pth": model.state_dict(),
        }
        self.weights = {}
        for name, content in weights.items():
            torch.save(content, name)
            self.weights[name] = Path(name).read_bytes()
        torch.save(model.state_dict(), "old.pth", _use_new_zipfile_serialization=False)
        self.weights["old.pth"] = Path("old.pth").read_bytes()

    def make(self, draw: random.Random) -> tuple[str, Any]:
        kind = draw.choice(("damaged run", "damaged run", "made run", "damaged weights", "weights"))
        if kind == "damaged run":
            files, told = dict(self.files), []
            for name in draw.sample([*files], draw.choice((1, 1, 2))):
                how, files[name] = damaged(files[name], draw)
                told.append(f"{name}: {how}")
            return "; ".join(told), (kind, files)
        if kind == "damaged weights":
            name = draw.choice([*self.weights])
            how, data = damaged(self.weights[name], draw)
            return f"{name}: {how}", (kind, (name, data))
        content = copy.deepcopy(self.states[NEWEST])
        if kind == "weights":
            content = {"state_dict": content["model"], "epoch": 3}
        how = self._change(content, draw)
        return f"{kind}: {how}", (kind, content)

    def use(self, given: Any) -> None:
        kind, content = given
        if kind.endswith("run"):
            shutil.rmtree(self.damaged, ignore_errors=True)
            shutil.copytree(self.run, self.damaged)
            if kind == "made run":
                Checkpoints(self.damaged).save(content)
            else:
                for name, data in content.items():
                    (self.damaged / name).write_bytes(data)
            self._resume(damaged=kind == "damaged run")
        else:
            self._load(content)

    def _resume(self, *, damaged: bool) -> None:
        model = codec()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(model, self.photo, folder=self.damaged, **SETTINGS)
        assert all("\n" not in str(warning.message) for warning in told)
        if damaged and not equal(model.state_dict(), self.finished):
            raise Believed("other weights than those of the run that was not damaged")

    def _load(self, content: Any) -> None:
        model = codec()
        if isinstance(content, tuple):
            name, data = content
            path = Path(f"weights-{name}")
            path.write_bytes(data)
        else:
            path = Path("weights.pth.tar")
            torch.save(content, path)
        fill(model, read_state_dict(path, model), str(path))
        if isinstance(content, tuple) and zipfile.is_zipfile(path):  # which has checksums
            state = {k: v for k, v in self.finished.items() if k in model.state_dict()}
            if not equal(model.state_dict(), state):
                raise Believed("other weights than those that were saved")

    def _change(self, content: Any, draw: random.Random) -> str:
        tensors = [path for path in places(content) if isinstance(at(content, path), Tensor)]
        if draw.random() < 0.5 or not tensors:
            return change(content, draw)
        path = draw.choice(tensors)
        parent, value = at(content, path[:-1]), at(content, path)
        way = draw.choice(("nan", "shape", "type", "value", "sparse", "meta", "huge"))
        parent[path[-1]] = {
            "nan": value * float("nan"), "shape": value.reshape(-1)[:1],
            "type": value.to(torch.int8),
            "value": draw.choice(ODD), "sparse": value.to_sparse() if value.dim() else value,
            "meta": value.to("meta"), "huge": torch.zeros(1).expand(1 << 20, 1 << 14),
        }[way]  # fmt: skip
        return f"{'.'.join(map(str, path))}: {way}"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
