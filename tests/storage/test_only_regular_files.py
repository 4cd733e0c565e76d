"""Devices and pipes are refused before they are opened: reading them would never end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import built

from nicprune.codecs.state_dicts import read_state_dict
from nicprune.common.errors import NicpruneError
from nicprune.data.images import read_image
from nicprune.storage.checkpoint import load
from nicprune.storage.container import decode

READERS: dict[str, Callable[[Path], Any]] = {
    "image": read_image,
    "codec": load,
    "weights": lambda path: read_state_dict(path, built("bmshj2018-hyperprior")[0]),
    "coded image": lambda path: decode(built("bmshj2018-hyperprior")[0], path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_it_is_one_line(reader: str, kind: str, tmp_path: Path) -> None:
    path = {"a pipe": tmp_path / "pipe", "a device": Path("/dev/zero"), "a folder": tmp_path}[kind]
    if kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(NicpruneError, match=f"it is {kind}, not a regular file") as error:
        READERS[reader](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_not_there_is_named(reader: str, tmp_path: Path) -> None:
    with pytest.raises(NicpruneError, match=r"no such \w+: .*nothing\.here"):
        READERS[reader](tmp_path / "nothing.here")
