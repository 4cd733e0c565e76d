"""Files of codecs that somebody wrote who knows the format: header and tensors are what they never
should be, and the digest is right.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.storage import checkpoint
from nicprune.storage.checkpoint import load, read_header, save
from nicprune.storage.container import decode, encode

from .codec_files import codecs
from .trial import Believed
from .values import ODD, change

SIZES = (0, 1, 3, 7, 64, 1 << 14, 16384 * 4, 1 << 31)
CLASSES = (
    "compressai.models.google:FactorizedPrior", "compressai.models.google:ScaleHyperprior",
    "compressai.models.google:JointAutoregressiveHierarchicalPriors",
    "compressai.models.waseda:Cheng2020Attention", "compressai.models.sensetime:Elic2022Official",
    "compressai.models.video.google:ScaleSpaceFlow", "compressai.models.base:CompressionModel",
    "compressai.zoo:models", "os:system", "nicprune.codecs.evc:EVC", "compressai.nowhere:A",
    "compressai.models.google:", ":", "",
)  # fmt: skip
"""What a header may name as its class."""

Contents = tuple[dict[str, Any], dict[str, torch.Tensor]]


class Inputs:
    """Files with a right digest."""

    lines = 1

    def __init__(self) -> None:
        self.whole: dict[str, Contents] = {}
        for name, codec in codecs().items():
            path = save(codec, Path(f"{name}.safetensors"))
            self.whole[name] = read_header(path), load_file(path)
        picture = torch.randint(0, 256, (3, 70, 50), generator=torch.Generator().manual_seed(0))
        self.picture = picture.byte()

    def make(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([*self.whole])
        header, tensors = copy.deepcopy(self.whole[name])
        told = []
        for _ in range(draw.choice((1, 1, 2))):
            way = draw.choice((self._header, self._header, self._build, self._tensor, self._tables))
            told.append(way(header, tensors, draw))
        return f"{name}: {'; '.join(told)}", (header, tensors)

    def use(self, given: Any) -> None:
        header, tensors = json.loads(json.dumps(given[0])), given[1]  # keys are text, as in a file
        header.pop("digest", None)
        header["digest"] = checkpoint._digest(header, tensors)
        path = Path("made.safetensors")
        save_file(tensors, path, metadata={"nicprune": json.dumps(header)})
        codec = load(path)
        sent = encode(codec, self.picture)
        found = decode(codec, sent)
        if found.shape != self.picture.shape or not torch.equal(found, decode(codec, sent)):
            raise Believed("a picture that is another each time")
        save(codec, Path("again.safetensors"))

    def _header(self, header: Any, tensors: Any, draw: random.Random) -> str:
        return change(header, draw)

    def _build(self, header: Any, tensors: Any, draw: random.Random) -> str:
        build = header.get("build")
        if not isinstance(build, dict):
            return change(header, draw)
        if draw.random() < 0.3:
            build["class"] = draw.choice(CLASSES)
            return f"class {build['class']}"
        arguments = build["kwargs"] = dict(build.get("kwargs") or {})
        name = draw.choice(("N", "M", "groups", "depth", *arguments))
        arguments[name] = draw.choice((*SIZES, [draw.choice(SIZES)], draw.choice(ODD)))
        return f"{name}={arguments[name]!r:.60}"

    def _tensor(self, header: Any, tensors: Any, draw: random.Random) -> str:
        if not tensors:
            return "nothing"
        key = draw.choice([*tensors])
        value = tensors.pop(key)
        way = draw.choice(("dropped", "renamed", "type", "shape", "narrow", "value", "value"))
        if way == "renamed":
            tensors[draw.choice((f"a.{key}", f"nicprune.methods.{key}", ""))] = value
        elif way == "type":
            kinds = (torch.float16, torch.float64, torch.int8, torch.int64, torch.bool)
            tensors[key] = value.to(draw.choice(kinds))
        elif way == "shape":
            shapes = (value.reshape(-1), value[None], value.flatten()[:1], value.flatten()[:0])
            tensors[key] = draw.choice(shapes).clone()
        elif way == "narrow" and value.dim() and value.shape[0] > 1:
            tensors[key] = value.repeat(draw.choice(((2,), (50,)))[0], *[1] * (value.dim() - 1))
            if draw.random() < 0.5:
                tensors[key] = value[: draw.randrange(value.shape[0])].clone()
        elif way == "value":
            tensors[key] = value.clone()
            odd = draw.choice((float("nan"), float("inf"), 1e30, -1e30, 0.0, 1e-40, 1e5, -1.0))
            if value.is_floating_point() and value.numel():
                place = slice(None) if draw.random() < 0.3 else draw.randrange(value.numel())
                tensors[key].view(-1)[place] = odd
        return f"{key} {way}"

    def _tables(self, header: Any, tensors: Any, draw: random.Random) -> str:
        keys = [key for key in tensors if key.rpartition(".")[2] in CDF_BUFFERS]
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        value = tensors[key] = tensors[key].clone()
        if not value.numel():
            return "nothing"
        place = draw.randrange(value.numel())
        numbers = (-1, 0, 1, 2, 65535, 65536, 65537, 1 << 20, -(1 << 31), (1 << 31) - 1)
        if value.dtype == torch.int32:
            value.view(-1)[place] = draw.choice(numbers)
        return f"{key}[{place}]"
