"""Files of weights that are damaged, or hold what no codec has: one line each."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import FactorizedPrior
from helpers import same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.state_dicts import read_state_dict
from nicprune.common.errors import FileError
from nicprune.storage.state import fill


def read(path: Path) -> nn.Module:
    codec = FactorizedPrior(2, 3)
    fill(codec, read_state_dict(path, codec), str(path))
    return codec


def refused(path: Path) -> str:
    with pytest.raises(FileError) as told:
        read(path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 800
    assert "weights_only" not in str(told.value)
    return str(told.value)


def test_damage_anywhere_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    codec, path = FactorizedPrior(2, 3), tmp_path / "a.pth.tar"
    torch.save({"state_dict": codec.state_dict()}, path)
    whole, draw, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            again = read(path)
        except FileError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:  # a byte between the entries of the archive
            assert same_state(state_of(again), codec.state_dict())
    assert noticed > 20
    middle = whole.index(codec.g_a[0].weight.detach().numpy().tobytes()[:16])
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    assert "is damaged: the checksum of" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_cut_or_mixed_up(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(FactorizedPrior(2, 3).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)
    # Places at which the unpickler of torch raises errors of many kinds.
    for cut in (0, 1, 30, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path)
    for _ in range(40):
        changed = bytearray(whole)
        for _ in range(4):
            changed[draw.randrange(400)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read(path)
        except FileError as error:
            assert "\n" not in str(error)


def test_a_file_does_not_say_how_much_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x02X" + (1 << 30).to_bytes(4, "little") + b"a short text")
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


ODD: dict[str, tuple[Any, str]] = {
    "sparse": (lambda t: t.to_sparse(), "not a tensor of plain values"),
    "without values": (lambda t: t.to("meta"), "not a tensor of plain values"),
    "huge": (lambda t: torch.zeros(1).expand(1 << 20, 1 << 20), "larger than what the file holds"),
    "flat": (lambda t: t.reshape(-1), r"has the shape \(\d+,\) instead of"),
    "empty": (lambda t: torch.zeros(0), r"has the shape \(0,\) instead of"),
}


@pytest.mark.parametrize("key", ["g_a.0.weight", "g_s.1.gamma", "entropy_bottleneck.quantiles"])
@pytest.mark.parametrize("kind", sorted(ODD))
def test_tensors_that_no_codec_has(kind: str, key: str, tmp_path: Path) -> None:
    change, expected = ODD[kind]
    state: dict[str, Tensor] = dict(FactorizedPrior(2, 3).state_dict())
    state[key] = change(state[key])
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": state}, path)
    with pytest.raises(FileError, match=f"{key} .*{expected}|{key} is {expected}"):
        read(path)
    refused(path)
