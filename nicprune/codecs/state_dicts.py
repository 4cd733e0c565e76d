"""State dicts as training programs write them: found in their files, and given a codec's own
keys.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.trusted import is_listed
from nicprune.common.config import cut
from nicprune.common.errors import FileError
from nicprune.common.files import check_regular

State = dict[str, Tensor]

USUAL = "state_dict"
"""Key of the state dict in CompressAI's checkpoints; others beside it are ignored."""

COMPILED = "_orig_mod."
"""Part that torch.compile adds to keys, before a codec's own or within them."""

BOTTLENECK = {"_matrix": "matrices", "_bias": "biases", "_factor": "factors"}
"""Names that CompressAI gave the parameters of an entropy bottleneck: `_matrix0`, for a while
`_matrices.0`, today `matrices.0`.
"""


def read_state_dict(path: str | Path, codec: nn.Module) -> State:
    """Read the weights of `codec` from a `.pth` or `.pth.tar`: what `find_state` finds in it.

    Raises:
        FileError: not such a file, damaged, a pickle that holds more than tensors, or not clear
            which of several state dicts is meant.
    """
    return find_state(_read(path), path, codec)


def find_state(content: Any, path: str | Path, codec: nn.Module) -> State:
    """Find the weights of `codec` in what a training program wrote: a state dict, bare or below any
    key ("state_dict", "model_state_dict", "params_ema"), with or without something before each of
    its keys ("module.", "net."). Its keys are given the names that the codec has for them.

    Args:
        path: where it was written, for messages.

    Raises:
        FileError: there is none, or it is not clear which of several is meant.
    """
    found = {"": content} if _is_state(content) else {}
    if not found and isinstance(content, Mapping):
        found = {str(key): value for key, value in content.items() if _is_state(value)}
    states = {
        key: {str(name).replace(COMPILED, ""): value for name, value in state.items()}
        for key, state in found.items()
    }
    own = [key for key in codec.state_dict() if key.rpartition(".")[2] not in CDF_BUFFERS]
    prefixes = {key: _prefixes(own, state) for key, state in states.items()}
    fitting = [key for key in states if prefixes[key]] or list(states)
    if USUAL in fitting:
        fitting = [USUAL]
    if not fitting:
        raise FileError(f"{path} holds no state dict (found {_listed(content)})")
    if len(fitting) > 1:
        raise FileError(
            f"{path} holds several state dicts, {', '.join(map(repr, fitting))}: write the one that"
            f" is meant to a file of its own (found {_listed(content)})"
        )
    state, before = states[fitting[0]], prefixes[fitting[0]]
    if len(before) > 1:
        raise FileError(
            f"{path} holds several codecs, their keys beginning with"
            f" {' and '.join(map(repr, before))}: write the one that is meant to a file of its own"
        )
    prefix = before[0] if before else ""
    return _renamed(
        codec,
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
    )


def _read(path: str | Path) -> Any:
    check_regular(path)
    try:
        with open(path, "rb") as file:
            if file.read(max(map(len, COMPRESSED))).startswith(COMPRESSED):
                raise FileError(
                    f"{path} is a compressed archive: unpack it, and name what is in it"
                )
        # What is no archive is read from memory: its pickle says how much is to be read, and a
        # file would be asked for as much.
        source = path if _has_right_sums(path) else io.BytesIO(Path(path).read_bytes())
        with warnings.catch_warnings():
            # Warnings about pickle protocols: an unreadable file raises an error below.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except FileError:
        raise
    except Exception as error:  # damaged pickles and storages raise errors of any kind
        told = str(error).lower()
        if isinstance(error, pickle.UnpicklingError):
            if "weights_only" in told or "unsupported" in told:
                raise FileError(
                    f"{path} is refused: it holds more than tensors, and unpickling it could run"
                    " code"
                ) from None
            raise FileError(f"{path} is not a PyTorch checkpoint, or is cut short") from None
        reason = cut(str(error) or type(error).__name__, 200)
        raise FileError(f"{path} is not a PyTorch checkpoint, or is cut short ({reason})") from None


def _has_right_sums(path: str | Path) -> bool:
    """Return whether a file is a ZIP archive, as torch.save writes since version 1.6.

    Raises:
        FileError: it is one and damaged: torch.load does not compare its checksums.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) != ZIP:
                return False
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory raises errors of any kind
        raise FileError(
            f"{path} is damaged or cut short: {cut(str(error) or type(error).__name__, 200)}"
        ) from None
    if damaged is not None:
        raise FileError(f"{path} is damaged: the checksum of {cut(damaged)} does not fit")
    return True


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of what gzip, bzip2, xz and zstd write."""

ZIP = b"PK\3\4"
"""First bytes of an archive, by which torch.load knows it too."""


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _listed(content: object) -> str:
    """Describe the top level of a file."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    keys = [str(key)[:40] for key in content]
    return f"the keys {', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}" if keys else "{}"


def _prefixes(own: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes of a codec's keys in a state dict; several where it holds several codecs,
    nothing where it holds none.

    Half of the keys have to be there: those of older versions of CompressAI have other names.
    """
    own = list(own)
    counts: dict[str, int] = {}
    for key in own:
        for candidate in state:
            if candidate == key or candidate.endswith(f".{key}"):
                prefix = candidate[: len(candidate) - len(key)]
                counts[prefix] = counts.get(prefix, 0) + 1
    return sorted(prefix for prefix, count in counts.items() if 2 * count > len(own))


def _renamed(codec: nn.Module, state: Mapping[str, Tensor]) -> State:
    """The same with the names of older versions of CompressAI brought up to date, where the codec
    has what they are called today.
    """
    own = codec.state_dict()
    return {
        key if key in own else next((new for new in _today(codec, key) if new in own), key): value
        for key, value in state.items()
    }


def _today(codec: nn.Module, key: str) -> Iterable[str]:
    """Return the present name of a parameter of an older version."""
    for old, new in BOTTLENECK.items():
        if named := re.fullmatch(rf"(.*\.)?_?(?:{old[1:]}|{new}\.)(\d+)", key):
            before, number = named[1] or "", named[2]
            yield from (f"{before}{new}.{number}", f"{before}{old}{number}")
    # A module of somebody else's may have both.
    owner, layer, rest = key.rpartition(".downsample.")
    if layer and _of_compressai(codec, owner):
        yield f"{owner}.skip.{rest}"


def _of_compressai(codec: nn.Module, name: str) -> bool:
    module = dict(codec.named_modules()).get(name)
    return module is not None and is_listed(type(module))
