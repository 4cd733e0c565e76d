"""Files of an adaptation alone: what is new, and the fingerprint of the codec that it adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nicprune.codecs.anatomy import check_codec, check_finite, unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import CodecError, FileError
from nicprune.methods.composition import Attached
from nicprune.storage.checkpoint import (
    ADAPTATION,
    FORMAT,
    VERSION,
    attach_saved,
    check_destination,
    methods_of,
    read_contents,
    write_file,
)
from nicprune.storage.identity import fingerprint, mark


def save_adaptation(adapted: nn.Module, path: str | Path) -> Path:
    """Write what an adaptation adds to its source codec to a `.safetensors` file, atomically.

    Args:
        adapted: a codec with an adaptation on it that stays beside it, as returned by `attach`,
            `harden` or `load`.
        path: the file to write.

    Raises:
        CodecError: the codec has no such adaptation: save the whole codec.
        TrainingError: the source codec has changed since the adaptation was attached.
        FileError: the file cannot be written, or its name does not end in .safetensors.
    """
    check_destination(path)
    check_codec(unwrap(adapted))
    domains: Any = adapted.widths if isinstance(adapted, Attached) else None
    if not isinstance(adapted, Attached) or domains is None or domains.field != "domain":
        raise CodecError(
            "there is no adaptation beside this codec to be saved alone: save the codec (forms that"
            " fine-tune change it)"
        )
    for method in adapted.roles.pruners:
        method.check_ready()
    if not adapted.stays:
        raise CodecError(
            "the new channels that go are still there: save_adaptation(adapted.harden(), path)"
        )
    check_finite(adapted)
    refresh_tables(adapted)
    codec = unwrap(adapted)
    told, tensors = methods_of(adapted)
    record = provenance(codec)
    header = {
        "format": FORMAT,
        "version": VERSION,
        ADAPTATION: {
            "domain": domains.names[-1],
            "source": _identity(codec),
            "codec": record.name,
            "quality": record.quality,
        },
        "methods": told,
    }
    return write_file(path, header, tensors)


def load_adaptation(codec: nn.Module, path: str | Path) -> Attached:
    """Load an adaptation over its source codec; return the codec with it, in evaluation mode.

    Args:
        codec: the codec that was adapted, plain. It is not copied.
        path: a file that `save_adaptation` wrote.

    Raises:
        CodecError: not a codec, or it has a method attached.
        FileError: the file is missing, damaged, holds no adaptation, or one of another codec.
    """
    check_codec(codec)
    if has_hooks(codec):
        raise CodecError("an adaptation is loaded over a plain codec; this one has a method on it")
    header, state = read_contents(path)
    told = header.get(ADAPTATION)
    if not isinstance(told, dict) or not header.get("methods"):
        raise FileError(f"{path} holds a codec, not an adaptation alone: load it with load")
    own = _identity(codec)
    if told.get("source") not in (own, _identity(codec, by_name=True)):
        quality = told.get("quality")
        raise FileError(
            f"{path} adapts another codec: {told.get('codec')!s:.60}"
            f"{f' quality {quality}' if quality is not None else ''} with the fingerprint"
            f" {told.get('source')!s:.16} (this one has {own})"
        )
    return attach_saved(codec, header, state, str(path)).eval()


def _identity(codec: nn.Module, by_name: bool = False) -> str:
    """Return the fingerprint of a whole codec: an adaptation uses its encoder too."""
    return mark(fingerprint(codec, encoder=True), codec, by_name=by_name).hex()
