"""Tables of times are measured for every family, fit the codec, and are measured once. Nothing here
looks at how long anything takes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, built
from torch import nn

import nicprune as nip
from nicprune.common.errors import NicpruneError
from nicprune.methods import attach
from nicprune.pruning.latency import TimedCost
from nicprune.pruning.latency_table import LatencyTable
from nicprune.runtime import latency
from nicprune.runtime.backends import BACKENDS

DAILY = ("bmshj2018-hyperprior", "mbt2018-mean-vbr-eb")
SIZE = (64, 64)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path))
    for name in ("TURNS", "LAYER_TURNS", "LIMIT"):
        monkeypatch.setattr(latency, name, 1)
    monkeypatch.setattr(latency, "FRACTIONS", (1.0, 0.5))


FAMILIES = [
    pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured(name: str) -> None:
    codec, groups = built(name)
    table = nip.measure_latency(codec, size=SIZE)
    cost = TimedCost(codec, groups, table)
    assert {"encode_s", "decode_s"} == {s for part in table.parts.values() for s in part.sides}
    assert {"g_a", "g_s"} <= set(table.parts)
    for group in groups.prunable():
        less = cost.totals({group.name: 1})
        for what in ("encode_s", "decode_s"):
            assert getattr(less, what) <= getattr(cost.original, what)
    narrow: Any = cost.totals({g.name: max(1, g.width // 2) for g in groups.prunable()})
    whole: Any = cost.totals()
    for part, times in table.parts.items():
        assert len(times.seconds) == 2, f"{part} at both widths"
        assert times.widths[0] != times.widths[1]
    assert narrow.decode_s > 0 and whole.decode_s > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_every_backend_is_measured(backend: str) -> None:
    for package in BACKENDS[backend].packages:
        pytest.importorskip(package)
    codec, groups = built("bmshj2018-hyperprior")
    table = nip.measure_latency(codec, backend, size=SIZE)
    assert table.runtime.backend == backend
    assert TimedCost(codec, groups, table).original


def test_a_table_is_measured_once_for_each_codec_size_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = copy.deepcopy(built("bmshj2018-hyperprior")[0])
    said: list[str] = []
    first = nip.measure_latency(codec, size=SIZE, threads=1, say=said.append)
    threads = torch.get_num_threads()
    made = iter(range(10))

    def another(*args: Any) -> LatencyTable:
        return first.model_copy(update={"machine": str(next(made))})

    monkeypatch.setattr(latency, "_measured", another)
    again = nip.measure_latency(codec, size=SIZE, threads=1, say=said.append)
    assert again == first and len(said) == 1
    assert nip.measure_latency(codec, size=(64, 128), threads=1).machine == "0"
    assert nip.measure_latency(codec, size=SIZE, threads=threads + 2).machine == "1"
    with torch.no_grad():
        codec.g_a[0].weight.mul_(2)
    assert nip.measure_latency(codec, size=SIZE, threads=1).machine == "2"
    assert nip.measure_latency(codec, size=SIZE, threads=1).machine == "2"
    assert torch.get_num_threads() == threads


def test_a_damaged_table_is_measured_again(tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    said: list[str] = []
    nip.measure_latency(codec, size=SIZE, say=said.append)
    (path,) = (tmp_path / "latency").iterdir()
    path.write_text("{}")
    assert nip.measure_latency(codec, size=SIZE, say=said.append).layers
    assert len(said) == 2 and LatencyTable.read(path).layers


def test_a_pruned_codec_is_measured_beside_its_original() -> None:
    codec = copy.deepcopy(built("bmshj2018-hyperprior")[0])
    small = attach(codec, "magnitude", budget={"macs": 0.7}, round_to=2).harden()
    table = nip.measure_latency(small, size=SIZE)
    assert table.original is not None and min(table.original.values()) > 0
    cost: Any = attach(small, "magnitude", budget={"macs": 0.5}, round_to=2, latency=table).cost
    assert cost.original.decode_s == table.original["decode_s"]


REFUSED = {
    "no backend": (lambda codec: nip.measure_latency(codec, "tensorrt"), "unknown backend"),
    "no precision": (
        lambda codec: nip.measure_latency(codec, "torch", "int8"), "has no precision 'int8'",
    ),
    "too small": (lambda codec: nip.measure_latency(codec, size=(8, 8)), "size"),
    "not plain": (
        lambda codec: nip.measure_latency(attach(codec, "mask_decay", widths={"g_a.0": 4}).codec),
        "measure it before attach",
    ),
    "accelerated": (
        lambda codec: nip.measure_latency(nip.accelerate(codec, image=IMAGE)), "is accelerated",
    ),
}  # fmt: skip
IMAGE = torch.zeros(3, 64, 64, dtype=torch.uint8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_one_line(name: str) -> None:
    call, message = REFUSED[name]
    codec: nn.Module = copy.deepcopy(built("bmshj2018-hyperprior")[0])
    with pytest.raises(NicpruneError, match=message) as error:
        call(codec)
    assert "\n" not in str(error.value)
