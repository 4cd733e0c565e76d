"""Checkpoints: weights, structure, history and CDF tables in one safe file, loaded with one
argument.

The format is safetensors: tensors and a JSON header, no executable content. The architecture is
rebuilt from its class, then every layer is given the shapes found in the file.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nicprune.channels.find_groups import find_groups
from nicprune.channels.known import as_plain, from_plain, recall, remember
from nicprune.codecs.anatomy import COMPILED, check_codec, check_finite, unwrap
from nicprune.codecs.cdf import check_tables, note_tables, refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.hooks import has_hooks, remove_hooks
from nicprune.codecs.layer_kinds.entropy import is_quantile
from nicprune.codecs.provenance import Provenance, provenance, set_provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.structure import differences, structure
from nicprune.codecs.zoo import rebuild
from nicprune.common.config import cut
from nicprune.common.errors import CodecError, FileError, NicpruneError, first_line
from nicprune.common.files import check_path, check_regular, write_atomically
from nicprune.common.machine import versions
from nicprune.methods.attaching import attach
from nicprune.methods.composition import Attached
from nicprune.methods.contract import Method
from nicprune.pruning.attributes import noted_attributes, set_attributes
from nicprune.pruning.totals import Totals
from nicprune.storage.packed_tables import pack_tables, unpack_tables
from nicprune.storage.same_function import difference
from nicprune.storage.state import fill

FORMAT = "nicprune"
VERSION = 4
"""Of the format: 1 was a codec alone, 2 one with gates or a modulator on it; 3 is either, with the
codec's structure and a digest of the whole file; 4 has CDF tables without what fills them up.
"""

ADAPTATION = "adaptation"
"""Key of the header of an adaptation alone; see `storage.adaptation`."""

STATE = "nicprune.methods."
"""Prefix of the keys of methods' state; no codec's keys start with it."""

SUFFIX = ".safetensors"

Factory = Callable[[], nn.Module]

HOW = (
    "pass factory=, a function that makes it, to save and to load (on the command line: name"
    " package.module:factory, and give the file as --weights)"
)


def save(
    codec: Any, path: str | Path, *, half: bool = False, factory: Factory | None = None
) -> Path:
    """Write a codec to a `.safetensors` file, atomically.

    CDF tables are brought up to date first, so that the file decodes bitstreams without `update()`.
    The codec is built again from what is written, in memory, and compared with the one given:
    layers and their settings, then latents and outputs for an image, bit for bit.

    Args:
        codec: a plain `CompressionModel`, pruned or not; or one with gates or a modulator on it, as
            returned by `attach` or `harden`.
        path: the file to write.
        half: store weights as float16 (the loaded codec is then not bit-identical).
        factory: makes the architecture (of any widths), for codecs that their class and its
            arguments do not make again. The file then loads with `factory=` alone.

    Raises:
        CodecError: masks still decay on it (harden it first), a weight is not finite, or what would
            be loaded is another function than the codec.
        FileError: the file cannot be written, or its name does not end in .safetensors.
    """
    check_destination(path)
    attached: Attached | None = codec if isinstance(codec, Attached) else None
    codec = unwrap(codec)
    check_codec(codec)
    check_not_replaced(codec)
    if attached is not None and not attached.stays or attached is None and has_hooks(codec):
        raise CodecError(
            "this codec still has methods attached that only pruning ends; save masked.harden(), or"
            " masked.detach()"
        )
    model: nn.Module = codec if attached is None else attached
    check_finite(model)
    refresh_tables(model)
    header, tensors = _contents(model, half)
    _check_made_again(model, header, tensors, factory)
    return write_file(path, header, tensors)


def write_file(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a header and tensors, with their digest, atomically."""
    header, tensors = json.loads(json.dumps(header)), pack_tables(tensors)
    header["digest"] = _digest(header, tensors)

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={FORMAT: json.dumps(header)})
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error

    return write_atomically(path, write)


def check_savable(codec: nn.Module, factory: Factory | None = None) -> None:
    """Check that `save` will be able to write a codec, before it is trained.

    Args:
        codec: a `CompressionModel`, or what `attach` returned. It is left as it is.
        factory: what `save` and `load` will be given.

    Raises:
        CodecError: what would be loaded is another function; says what to do.
    """
    check_codec(unwrap(codec))
    bare = copy_codec(unwrap(codec))
    remove_hooks(bare, lambda hook: True)
    check_finite(bare)
    header, tensors = _contents(bare, half=False)
    _check_made_again(bare, header, tensors, factory)


def check_destination(path: str | Path) -> None:
    """Raise FileError unless a codec can be saved by this name, one that commands know a codec's
    file by.
    """
    if check_path(path).suffix != SUFFIX:
        raise FileError(f"a codec is saved as a {SUFFIX} file; {path} must end in {SUFFIX}")


def _contents(model: nn.Module, half: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a codec's file."""
    codec = unwrap(model)
    record = provenance(codec)
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": record.name,
        "quality": record.quality,
        "metric": record.metric,
        "build": {key: value for key, value in record.build.items() if key != "factory"},
        "original": record.original,
        "history": record.history,
        "structure": structure(codec),
        "versions": versions(),
    }
    if followed := noted_attributes(codec):
        header["attributes"] = followed
    # Buffers stay as they are: the likelihoods' lower bound, 1e-9, would be 0 in float16, and the
    # loss infinite. So do complex parameters, of which float16 would hold the real part alone.
    shrinks = {
        key
        for key, parameter in codec.named_parameters()
        if half and parameter.is_floating_point() and not is_quantile(key)
    }
    tensors = {}
    for key, value in codec.state_dict().items():
        value = value.detach().cpu().contiguous()
        tensors[key] = value.half() if key in shrinks else value.clone()
        if key in shrinks and not bool(torch.isfinite(tensors[key]).all()):
            raise CodecError(f"{key} has values too large for float16: save it without half=True")
    if isinstance(model, Attached):
        header["methods"], own = methods_of(model)
        tensors |= own
    if (groups := recall(codec, find_groups)) is not None:
        header["groups"] = as_plain(codec, groups)
    return json.loads(json.dumps(header)), tensors


def methods_of(model: Attached) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the names and settings of the methods on a codec, and their tensors, as a file holds
    them.
    """
    methods = cast("list[Method]", list(model.methods))
    told = [{"name": m.name, "settings": m.config.model_dump(mode="json")} for m in methods]
    state = model.methods.state_dict()
    return told, {STATE + key: value.detach().cpu().clone() for key, value in state.items()}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file says."""
    told = {key: value for key, value in header.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_made_again(
    model: nn.Module,
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    factory: Factory | None,
) -> None:
    """Check that a header and tensors make the same function as the model. Where its class and
    arguments do not, but `factory` does, the header says so.

    Raises:
        CodecError: neither does; says why, and what to do.
    """
    codec = unwrap(model)
    for name, module in codec.named_modules():
        if hasattr(module, "_orig_mod"):
            raise CodecError(COMPILED.format(name))
    reasons = []
    # Random weights, which are replaced at once, must not be drawn from the caller's generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = copy_codec(model).cpu().float().eval()
        expected = expected.to(memory_format=torch.contiguous_format)
        for module in expected.modules():  # codec.compile(): the same function, in other rounding
            module._compiled_call_impl = None
        nn.Module.load_state_dict(unwrap(expected), _codec_state(tensors))
        for make in (None, factory) if factory is not None else (None,):
            try:
                found = _assemble(header, tensors, "what would be saved", make)
                reason = difference(expected, found)
            except NicpruneError as error:
                reason = str(error).split(f"; {HOW}")[0]
            if not reason:
                if make is not None:
                    given = f"{make.__module__}:{getattr(make, '__qualname__', '?')}"
                    name = str(header["name"])
                    header["build"]["factory"] = name if ":" in name else given
                return
            reasons.append(reason)
    arguments = ", ".join(f"{k}={v!r}" for k, v in (header["build"].get("kwargs") or {}).items())
    made = f"{type(codec).__name__}({arguments:.120})" if factory is None else "factory="
    raise CodecError(
        f"{type(codec).__name__} cannot be saved: {made} does not make it again"
        f" ({reasons[-1]:.300}); {HOW if factory is None else 'give the one that made this codec'}"
    )


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file, which describes its codec, without its weights.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
    """
    metadata = _metadata(path)
    if FORMAT not in metadata:
        raise FileError(
            f"{path} is a safetensors file, but not one that nicprune saved: it holds weights"
            " alone. Name the codec that they are for, and give the file as its weights"
        )
    try:
        header = json.loads(metadata[FORMAT])
        version = int(header["version"])
    except (KeyError, ValueError, TypeError):
        raise FileError(f"{path} is damaged: its header cannot be read") from None
    if header.get("format") != FORMAT or version > VERSION:
        raise FileError(
            f"{path} has format version {version}; this nicprune reads up to {VERSION}:"
            " pip install --upgrade nicprune"
        )
    return header


def read_plain(path: str | Path) -> dict[str, Tensor] | None:
    """Read the tensors of a safetensors file that another program wrote; None for one of `save`.

    Raises:
        FileError: the file is missing or damaged.
    """
    return None if FORMAT in _metadata(path) else _tensors(path)


def _metadata(path: str | Path) -> dict[str, str]:
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = cut(str(error), 200)
        raise FileError(f"{path} is not a safetensors file, or is cut short ({reason})") from None


def _tensors(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is cut short ({cut(str(error), 200)})") from None


def read_contents(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file, without making its codec.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
    """
    header, state = read_header(path), _tensors(path)
    if ("digest" in header or header["version"] > 2) and header.get("digest") != _digest(
        header, state
    ):
        raise FileError(f"{path} is damaged: its checksum does not fit")
    return header, unpack_tables(state, str(path)) if header["version"] > 3 else state


def load(path: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """Load a codec that `save` wrote, in evaluation mode, identical to the one saved.

    Args:
        path: the file.
        factory: returns the architecture, for codecs of classes outside CompressAI; its layers are
            resized to the file's widths.

    Returns:
        A plain `CompressionModel`; what `attach` returns if gates, a modulator or widths are part
        of the codec.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
        CodecError: the codec's class is not imported, or changed since the codec was saved; pass
            `factory`.
    """
    header, state = read_contents(path)
    return _assemble(header, state, str(path), factory)


def _codec_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codec's own part of a file's tensors, as its layers take it."""
    return {
        key: value.float() if value.dtype == torch.float16 else value
        for key, value in tensors.items()
        if not key.startswith(STATE)
    }


def _assemble(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, factory: Factory | None
) -> nn.Module:
    """Make the model that a header and tensors describe."""
    if ADAPTATION in header:
        raise FileError(
            f"{where} holds an adaptation alone: load its codec, then load_adaptation(codec, file)"
        )
    state = _codec_state(tensors)
    build = header.get("build")
    if not isinstance(build, dict):
        raise FileError(f"{where} is damaged: it does not say what made its codec")
    if factory is None and build.get("factory"):
        raise CodecError(
            f"{where} holds a codec that its class does not make again: pass factory=, a function"
            f" that makes it, as {build['factory']} did (on the command line: name"
            f" package.module:factory, and give the file as --weights)"
        )
    try:
        codec = rebuild(build, factory)
    except NicpruneError:
        raise
    except Exception as error:  # of a foreign class, or of a header that somebody else wrote
        made = "factory=" if factory is not None else f"{str(build.get('class')):.120}"
        hint = "" if factory is not None else f"; {HOW}"
        raise CodecError(
            f"{where} holds a codec that {made} does not make:"
            f" {first_line(error, named=False)}{hint}"
        ) from error
    try:
        set_attributes(codec, header.get("attributes") or {})
        fill(codec, state, where, hint="" if factory is not None else f"; {HOW}")
        _check_tables(codec, where)
        original = {name: int(value) for name, value in (header.get("original") or {}).items()}
        if original:
            Totals(**original)
        record = Provenance(
            header["name"],
            header.get("quality"),
            header.get("metric", "mse"),
            build,
            original,
            header.get("history") or [],
        )
        told = differences(header["structure"], structure(codec)) if "structure" in header else []
    except NicpruneError:
        raise
    except Exception as error:  # a header that somebody else wrote
        raise FileError(
            f"{where} is damaged, or not of this nicprune's making:"
            f" {first_line(error, named=False)}"
        ) from error
    if told:
        made = "factory=" if factory is not None else str(build.get("class"))
        raise CodecError(
            f"{where} holds another codec than {made:.120} makes: {'; '.join(told[:2])}"
            f"{'' if factory is not None else f'; {HOW}'}"
        )
    set_provenance(codec, record)
    note_tables(codec)
    if "groups" in header:
        try:
            groups = from_plain(codec, header["groups"])
        except FileError as error:
            raise FileError(f"{where} is damaged: {error}") from None
        if groups is not None:
            remember(codec, groups)
    return (
        attach_saved(codec, header, tensors, where).eval()
        if header.get("methods")
        else codec.eval()
    )


def _check_tables(model: nn.Module, where: str) -> None:
    try:
        check_tables(model)
    except CodecError as error:
        raise FileError(f"{where}: {error}") from None


def attach_saved(
    codec: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> Attached:
    """Attach the methods of a file to its codec, as they were saved."""
    state = {
        key.removeprefix(STATE): value for key, value in tensors.items() if key.startswith(STATE)
    }
    with ExitStack() as undo:
        try:
            methods = [(str(m["name"]), dict(m["settings"])) for m in header["methods"]]
            attached = attach(codec, methods)
            undo.callback(attached.detach)
            attached.methods.load_state_dict(dict(state))
            check_finite(attached.methods)
            check_tables(attached.methods)
        except NicpruneError as error:
            raise FileError(
                f"{where} holds methods that this nicprune cannot attach: {error}"
            ) from None
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{where} is damaged: the state of its methods does not fit"
                f" ({str(error).splitlines()[0]})"
            ) from None
        if not attached.stays:
            raise FileError(
                f"{where} is damaged: {', '.join(m['name'] for m in header['methods'])} cannot be"
                " part of a saved codec"
            )
        undo.pop_all()
    note_tables(attached)
    return attached
