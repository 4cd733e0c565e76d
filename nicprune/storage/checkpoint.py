"""Checkpoints: weights, structure, history and CDF tables in one safe file, loaded with one
argument.

The format is safetensors: tensors and a JSON header, no executable content. The architecture is
rebuilt from its class, then every layer is given the shapes found in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nicprune.channels.find_groups import find_groups
from nicprune.channels.known import as_plain, from_plain, recall, remember
from nicprune.codecs.anatomy import (
    CDF_BUFFERS,
    COMPILED,
    check_codec,
    check_finite,
    forward_for_analysis,
    unwrap,
)
from nicprune.codecs.cdf import check_tables, note_tables, refresh_tables, update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import has_hooks, remove_hooks
from nicprune.codecs.layer_kinds.entropy import entropy_models, is_quantile
from nicprune.codecs.layer_operations import resize
from nicprune.codecs.provenance import Provenance, provenance, set_provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.state_dicts import read_state_dict
from nicprune.codecs.structure import differences, structure
from nicprune.codecs.zoo import (
    DEMO,
    build_from_path,
    build_named,
    check_name,
    codec_names,
    embedded_file,
    qualities,
    rebuild,
)
from nicprune.common.config import cut
from nicprune.common.errors import CodecError, FileError, NicpruneError, first_line
from nicprune.common.files import check_path, check_regular, expand, write_atomically
from nicprune.common.machine import versions
from nicprune.methods.composition import Attached, attach
from nicprune.methods.contract import Method
from nicprune.pruning.attributes import noted_attributes, set_attributes
from nicprune.pruning.removal import follow_widths
from nicprune.pruning.totals import Totals
from nicprune.storage.packed_tables import pack_tables, unpack_tables

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
    # loss infinite.
    shrinks = {key for key, _ in codec.named_parameters() if half and not is_quantile(key)}
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
                reason = _difference(expected, found)
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


def _difference(expected: nn.Module, found: nn.Module) -> str:
    """Describe the difference of two models: layers and settings, then latents and outputs."""
    told = differences(structure(unwrap(expected)), structure(unwrap(found)))
    if told:
        return "; ".join(told[:2])
    first = _trace(expected)
    if _same(first, _trace(found)) or not _same(first, _trace(expected)):
        return ""  # what is not the same twice cannot be compared
    return "its layers are the same, but latents or outputs differ"


@torch.no_grad()
def _trace(model: nn.Module) -> list[Tensor]:
    """Return the inputs of a model's entropy models for an image, and its outputs."""
    seen: list[Tensor] = []
    image = example_image(unwrap(model), seed=0)  # runs the codec, before anything is recorded
    if isinstance(model, Attached):
        model.set_width(0 if model.widths is not None else None)
    handles = [
        entropy_model.register_forward_pre_hook(lambda module, args: seen.extend(_tensors(args)))
        for entropy_model in entropy_models(model)
    ]
    torch.manual_seed(0)
    try:
        seen.extend(_tensors(forward_for_analysis(model.eval(), image)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file, which describes its codec, without its weights.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
    """
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = cut(str(error), 200)
        raise FileError(f"{path} is not a safetensors file, or is cut short ({reason})") from None
    try:
        header = json.loads(metadata[FORMAT])
        version = int(header["version"])
    except (KeyError, ValueError, TypeError):
        raise FileError(f"{path} is a safetensors file, but not one that nicprune saved") from None
    if header.get("format") != FORMAT or version > VERSION:
        raise FileError(
            f"{path} has format version {version}; this nicprune reads up to {VERSION}:"
            " pip install --upgrade nicprune"
        )
    return header


def read_contents(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file, without making its codec.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
    """
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            state: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is cut short ({cut(str(error), 200)})") from None
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
    try:
        attached = attach(codec, [(str(m["name"]), dict(m["settings"])) for m in header["methods"]])
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
            f"{where} is damaged: {', '.join(m['name'] for m in header['methods'])} cannot be part"
            " of a saved codec"
        )
    note_tables(attached)
    return attached


def fill(codec: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Resize `codec` to the shapes of `state` and load its values.

    Args:
        hint: what to do where they do not fit, for the message.

    Raises:
        FileError: keys are missing or unknown, a value is not finite, or CDF tables are damaged;
            names the first ones.
    """
    own = codec.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    if missing or extra:
        told = "; ".join(
            f"{what} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unknown", extra))
            if keys
        )
        raise FileError(f"{where} does not fit {type(codec).__name__}: {told}{hint}")
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise FileError(f"{where}: {key} is not a tensor of plain values")
        if value.numel() * value.element_size() > max(1 << 20, value.untyped_storage().nbytes()):
            raise FileError(f"{where}: {key} is larger than what the file holds of it")
        if key.rpartition(".")[2] not in CDF_BUFFERS and value.dim() != own[key].dim():
            raise FileError(
                f"{where} does not fit {type(codec).__name__}: {key} has the shape"
                f" {tuple(value.shape)} instead of {tuple(own[key].shape)}{hint}"
            )
    resize(codec, state)
    # Not CompressionModel.load_state_dict, which wants CDF tables empty: they have their shapes
    # already.
    nn.Module.load_state_dict(codec, dict(state), strict=True)
    try:
        check_finite(codec)
    except CodecError as error:
        raise FileError(f"{where}: {error}") from None
    follow_widths(codec)
    training = codec.training
    try:
        with torch.no_grad():
            forward_for_analysis(codec.eval(), example_image(codec))
    except (RuntimeError, ValueError, IndexError, CodecError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(
            f"{where} does not fit {type(codec).__name__}: its layers' widths do not match"
            f" ({reason}){hint}"
        ) from None
    finally:
        codec.train(training)


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
            (random), or a file: CompressAI's `.pth`/`.pth.tar` or a `.safetensors` of `save`.

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
        return load(name)
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
    loaded = codec
    if str(weights).endswith(".safetensors"):
        loaded = load(weights, factory=lambda: codec)
        stored = provenance(codec)
        record.build, record.original, record.history = (
            stored.build,
            stored.original,
            stored.history,
        )
    else:
        state = read_state_dict(weights, codec)
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
