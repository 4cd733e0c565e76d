"""CDF tables in files, without what fills them up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import built, same_state, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from nicprune.common.errors import FileError
from nicprune.storage.checkpoint import _digest, load, read_header, save
from nicprune.storage.packed_tables import MOST, pack_tables, unpack_tables


def ragged(lengths: list[int]) -> dict[str, Tensor]:
    """A table whose rows have these lengths."""
    table = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, length in enumerate(lengths):
        table[row, :length] = torch.arange(1, length + 1)
    return {
        "part._quantized_cdf": table,
        "part._cdf_length": torch.tensor(lengths, dtype=torch.int32),
    }


@pytest.mark.parametrize("lengths", [[3], [3, 9, 4], [5, 5], [2, 0, 7], [1]])
def test_what_is_unpacked_is_what_was_packed(lengths: list[int]) -> None:
    tensors = ragged(lengths)
    packed = pack_tables(tensors)
    assert packed["part._quantized_cdf"].shape == (sum(lengths),)
    assert same_state(unpack_tables(packed, "it"), tensors)


def test_a_table_that_is_not_zero_behind_its_rows_stays_whole() -> None:
    tensors = ragged([3, 9])
    tensors["part._quantized_cdf"][0, 5] = 1
    assert same_state(pack_tables(tensors), tensors)
    tensors = ragged([3, 9]) | {"part._cdf_length": torch.tensor([3, 8])}
    assert same_state(pack_tables(tensors), tensors)
    alone = {"part._quantized_cdf": torch.ones(2, 3), "weight": torch.ones(4)}
    assert same_state(unpack_tables(pack_tables(alone), "it"), alone)


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([3, 8]),
        torch.tensor([-1, 13]),
        torch.tensor([3.0, 9.0]),
        torch.tensor([[3, 9]]),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([2**31 - 1, 2**31 - 1]),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: Tensor) -> None:
    packed = pack_tables(ragged([3, 9])) | {"part._cdf_length": lengths}
    with pytest.raises(FileError, match=r"entries and lengths of part\._quantized_cdf do not fit"):
        unpack_tables(packed, "it")


def test_a_table_too_large_is_refused_before_it_is_made() -> None:
    rows = MOST // 1000
    lengths = torch.zeros(rows, dtype=torch.int64)
    lengths[0] = 2000
    packed = {
        "part._quantized_cdf": torch.ones(2000, dtype=torch.int32),
        "part._cdf_length": lengths,
    }
    with pytest.raises(FileError, match="do not fit"):
        unpack_tables(packed, "it")


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018"])
def test_files_hold_the_entries_alone_and_load_the_same(name: str, tmp_path: Path) -> None:
    codec = built(name)[0]
    codec.update(force=True)
    file = save(codec, tmp_path / "a.safetensors")
    written = load_file(file)
    packed = [key for key in written if key.endswith("_quantized_cdf") and written[key].dim() == 1]
    assert packed
    assert all(
        written[key].numel() == int(written[key.replace("quantized_cdf", "cdf_length")].sum())
        for key in packed
    )
    assert same_state(state_of(load(file)), state_of(codec))


def test_a_file_whose_lengths_were_exchanged_is_refused_in_one_line(tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    codec.update(force=True)
    file = save(codec, tmp_path / "a.safetensors")
    tensors, header = load_file(file), read_header(file)
    tensors["entropy_bottleneck._cdf_length"] += 1
    header["digest"] = _digest(header, tensors)
    save_file(tensors, file, metadata={"nicprune": json.dumps(header)})
    with pytest.raises(FileError, match="is damaged: the entries and lengths") as told:
        load(file)
    assert "\n" not in str(told.value)
