"""CDF tables in files, without what fills them up.

A table has a row for each channel or scale, all as long as the longest; most are short. In a file
their entries stand one after another. What fills the rows up is zero, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nicprune.common.errors import FileError

TABLE, LENGTHS = "_quantized_cdf", "_cdf_length"
"""Names of an entropy model's buffers: (rows, longest row), and the length of each row."""

MOST = 1 << 26
"""Entries of a filled-up table above which a file is refused: the largest of known codecs have
2^18.
"""


def pack_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with each CDF table, (rows, longest row), as one row of its entries."""
    packed = dict(tensors)
    for key, table in tensors.items():
        lengths = tensors.get(_lengths_of(key))
        if lengths is None or table.dim() != 2 or not table.numel():
            continue
        held = _entries(lengths, table.shape[1])
        # A table that this would not give back stays as it is.
        if held.shape == table.shape and not bool(table[~held].any()):
            packed[key] = table[held]
    return packed


def unpack_tables(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors with the CDF tables that `pack_tables` shortened as they were.

    Raises:
        FileError: entries and lengths of rows do not fit together.
    """
    unpacked = dict(tensors)
    for key, entries in tensors.items():
        lengths = tensors.get(_lengths_of(key))
        if lengths is None or entries.dim() != 1 or not entries.numel():
            continue
        whole = lengths.dim() == 1 and lengths.numel() > 0 and not lengths.is_floating_point()
        longest = int(lengths.max()) if whole else 0
        if (
            not whole
            or int(lengths.min()) < 0
            or int(lengths.long().sum()) != entries.numel()
            or lengths.numel() * longest > MOST
        ):
            raise FileError(f"{where} is damaged: the entries and lengths of {key} do not fit")
        table = entries.new_zeros(lengths.numel(), longest)
        table[_entries(lengths, longest)] = entries
        unpacked[key] = table
    return unpacked


def _lengths_of(key: str) -> str:
    """Return the name of the lengths that belong to a table; no tensor's if it is none."""
    return key.removesuffix(TABLE) + LENGTHS if key.endswith(TABLE) else ""


def _entries(lengths: Tensor, longest: int) -> Tensor:
    """Return where a table has entries of its rows, (rows, longest)."""
    return torch.arange(longest) < lengths.reshape(-1, 1)
