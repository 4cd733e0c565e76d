"""Codecs by name, file or factory, with weights: official, embedded, random, or those of a file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.cdf import note_tables, update_tables
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.state_dicts import find_state, read_state_dict
from nicprune.codecs.zoo import (
    DEMO,
    build_from_path,
    build_named,
    check_name,
    codec_names,
    embedded_file,
    qualities,
)
from nicprune.common.errors import CodecError, FileError
from nicprune.common.files import expand
from nicprune.storage.checkpoint import SUFFIX, load, read_plain
from nicprune.storage.state import fill


def load_codec(
    name: str | Path,
    quality: int | None = None,
    *,
    metric: str = "mse",
    weights: str | Path = "official",
) -> nn.Module:
    """Load or build a codec.

    Args:
        name: a name from `nicprune list`; a file (`.safetensors` of `save`); or
            `package.module:factory`.
        quality: quality level, for named codecs.
        metric: "mse" or "ms-ssim": the metric that the official weights were trained for.
        weights: "official" (downloaded by CompressAI; for the embedded codec, its own), "none"
            (random), or a file: a `.pth`, `.pth.tar` or `.safetensors` of any training program, or
            a `.safetensors` of `save`.

    Raises:
        CodecError: the name or quality is unknown, or the weights are unavailable.
        FileError: the file cannot be read or does not fit.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise CodecError(f"expected the name of a codec, or its file, got {type(name).__name__}")
    name = str(name)
    if name.endswith(".safetensors"):
        if str(weights) != "official":
            raise CodecError(f"{name} brings its own weights; leave weights={str(weights)!r} out")
        return load(expand(name))
    if ":" in name:
        codec = build_from_path(name, quality)
        provenance(codec).metric = metric
        return (
            codec.eval()
            if str(weights) in ("official", "none")
            else _load_weights(codec, expand(weights)).eval()
        )
    if name not in codec_names() and Path(name).suffix in (".pth", ".tar", ".pt"):
        raise CodecError(
            f"{name} holds weights only; name its architecture and pass weights={name!r}"
        )
    check_name(name, quality, metric)
    if str(weights) == "official" and name == DEMO:
        if metric != "mse":
            raise CodecError(
                f"the weights of {DEMO} were trained for mse; there are none for {metric}"
            )
        return _embedded(quality)
    if str(weights) in ("official", "none"):
        return build_named(name, quality, metric, official=str(weights) == "official")
    weights = expand(weights)
    if not weights.exists():
        raise FileError(f"no such weights file: {weights} (or use weights='official' or 'none')")
    return _load_weights(build_named(name, quality, metric, official=False), weights).eval()


def _embedded(quality: int | None) -> nn.Module:
    if quality is None:
        raise CodecError(
            f"{DEMO} needs a quality ({qualities(DEMO).start} to {qualities(DEMO).stop - 1})"
        )
    path = embedded_file(quality)
    if not path.exists():
        raise CodecError(
            f"the weights of {DEMO} quality {quality} are missing from this installation; reinstall"
            " nicprune"
        )
    codec = load(path)
    record = provenance(codec)
    record.name, record.quality = DEMO, quality
    return codec


def _load_weights(codec: Any, weights: str | Path) -> nn.Module:
    """Load weights from a file into a codec of the same architecture, at the file's widths; return
    it with the file's methods on it.
    """
    record = provenance(codec).copy()
    loaded: nn.Module = codec
    safe = str(weights).endswith(SUFFIX)
    others = read_plain(weights) if safe else None
    if safe and others is None:
        loaded = load(weights, factory=lambda: codec)
        stored = provenance(codec)
        for what, own, asked in (
            ("quality", stored.quality, record.quality),
            ("metric", stored.metric, record.metric),
        ):
            if own is not None and asked is not None and own != asked:
                warnings.warn(
                    f"{weights} says {what} {own}, and is loaded as {what} {asked}", stacklevel=4
                )
        record.build, record.original, record.history = (
            stored.build,
            stored.original,
            stored.history,
        )
    else:
        state = (
            read_state_dict(weights, codec)
            if others is None
            else find_state(others, weights, codec)
        )
        own = codec.state_dict()
        # Files saved before update() hold no CDF tables, others' tables have their own length: both
        # are fine.
        differing = [
            k
            for k, v in state.items()
            if k in own and k.rsplit(".", 1)[-1] not in CDF_BUFFERS and v.shape != own[k].shape
        ]
        fill(
            codec,
            {
                **{
                    k: v
                    for k, v in own.items()
                    if k.rsplit(".", 1)[-1] in CDF_BUFFERS and k not in state
                },
                **state,
            },
            str(weights),
        )
        update_tables(codec)
        if differing:
            told = (
                f"{differing[0]} is {tuple(state[differing[0]].shape)}, usual is"
                f" {tuple(own[differing[0]].shape)}"
            )
            warnings.warn(
                f"{weights} has other widths than"
                f" {record.name}{f' quality {record.quality}' if record.quality else ''} ({told})",
                stacklevel=4,
            )
    set_provenance(codec, record)
    note_tables(codec)
    return loaded
