"""Checkpoints: weights, structure, history and CDF tables in one safe file, loaded with one
argument.

The format is safetensors: tensors and a JSON header, no executable content. The architecture is
rebuilt from its class, then every layer is given the shapes found in the file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nicprune.codecs.anatomy import (
    CDF_BUFFERS,
    check_codec,
    forward_for_analysis,
    unwrap,
)
from nicprune.codecs.cdf import note_tables, refresh_tables, update_tables
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds import is_quantile
from nicprune.codecs.layer_kinds.operations import resize
from nicprune.codecs.provenance import Provenance, provenance, set_provenance
from nicprune.codecs.zoo import (
    DEMO,
    build_from_path,
    build_named,
    check_name,
    codec_names,
    qualities,
    read_compressai_file,
    rebuild,
)
from nicprune.common.errors import CodecError, FileError, NicpruneError
from nicprune.common.files import expand, write_atomically
from nicprune.methods import Attached, Method, attach
from nicprune.pruning.cost import Totals
from nicprune.pruning.surgery import follow_widths

FORMAT = "nicprune"
PLAIN, WITH_METHODS = 1, 2
"""Versions of the format: a codec alone, and one with methods on it."""

STATE = "nicprune.methods."
"""Prefix of the keys of methods' state; no codec's keys start with it."""


def save(codec: Any, path: str | Path, *, half: bool = False) -> Path:
    """Write a codec to a `.safetensors` file, atomically.

    CDF tables are brought up to date first, so that the file decodes bitstreams without `update()`.

    Args:
        codec: a plain `CompressionModel`, pruned or not; or one with gates or a modulator on it, as
            returned by `attach` or `harden`.
        path: the file to write.
        half: store weights as float16 (the loaded codec is then not bit-identical).

    Raises:
        CodecError: masks still decay on it (harden it first).
        FileError: the file cannot be written.
    """
    attached: Attached | None = codec if isinstance(codec, Attached) else None
    codec = unwrap(codec)
    if attached is not None and not attached.stays or attached is None and has_hooks(codec):
        raise CodecError(
            "this codec still has methods attached that only pruning ends; save masked.harden(), or"
            " masked.detach()"
        )
    check_codec(codec)
    refresh_tables(codec if attached is None else attached)
    record = provenance(codec)
    header = {
        "format": FORMAT,
        "version": PLAIN if attached is None else WITH_METHODS,
        "name": record.name,
        "quality": record.quality,
        "metric": record.metric,
        "build": record.build,
        "original": record.original,
        "history": record.history,
    }
    # Buffers stay as they are: the likelihoods' lower bound, 1e-9, would be 0 in float16, and the
    # loss infinite.
    shrinks = {key for key, _ in codec.named_parameters() if half and not is_quantile(key)}
    tensors = {}
    for key, value in codec.state_dict().items():
        value = value.detach().cpu().contiguous()
        tensors[key] = value.half() if key in shrinks else value.clone()
    if attached is not None:
        methods = cast("list[Method]", list(attached.methods))
        header["methods"] = [
            {"name": m.name, "settings": m.config.model_dump(mode="json")} for m in methods
        ]
        tensors |= {
            STATE + key: value.detach().cpu().clone()
            for key, value in attached.methods.state_dict().items()
        }

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={FORMAT: json.dumps(header)})
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error

    return write_atomically(path, write)


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file, which describes its codec, without its weights.

    Raises:
        FileError: the file is missing, damaged, or was not written by `save`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise FileError(f"no such file: {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is not a safetensors file, or is cut short ({error})") from None
    try:
        header = json.loads(metadata[FORMAT])
        version = int(header["version"])
    except (KeyError, ValueError, TypeError):
        raise FileError(f"{path} is a safetensors file, but not one that nicprune saved") from None
    if header.get("format") != FORMAT or version > WITH_METHODS:
        raise FileError(
            f"{path} has format version {version}; this nicprune reads up to {WITH_METHODS}: pip"
            " install --upgrade nicprune"
        )
    return header


def load(path: str | Path, *, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
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
        CodecError: the codec's class is not imported; pass `factory`.
    """
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            state: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is cut short ({error})") from None
    state = {
        key: value.float() if value.dtype == torch.float16 else value
        for key, value in state.items()
    }
    methods = {
        key.removeprefix(STATE): state.pop(key) for key in list(state) if key.startswith(STATE)
    }
    try:
        codec = rebuild(header["build"], factory)
        fill(codec, state, str(path))
        original = {name: int(value) for name, value in (header.get("original") or {}).items()}
        if original:
            Totals(**original)
        record = Provenance(
            header["name"],
            header.get("quality"),
            header.get("metric", "mse"),
            header["build"],
            original,
            header.get("history") or [],
        )
    except NicpruneError:
        raise
    except Exception as error:  # a header that somebody else wrote
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f"{path} is damaged, or not of this nicprune's making: {reason}") from error
    set_provenance(codec, record)
    note_tables(codec)
    return (
        _with_methods(codec, header, methods, str(path)).eval()
        if header.get("methods")
        else codec.eval()
    )


def _with_methods(
    codec: nn.Module, header: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> Attached:
    try:
        attached = attach(codec, [(str(m["name"]), dict(m["settings"])) for m in header["methods"]])
        attached.methods.load_state_dict(dict(state))
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


def fill(codec: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Resize `codec` to the shapes of `state` and load its values.

    Raises:
        FileError: keys are missing or unknown; names the first ones.
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
        raise FileError(f"{where} does not fit {type(codec).__name__}: {told}")
    resize(codec, state)
    # Not CompressionModel.load_state_dict, which wants CDF tables empty: they have their shapes
    # already.
    nn.Module.load_state_dict(codec, dict(state), strict=True)
    follow_widths(codec)
    training = codec.training
    try:
        with torch.no_grad():
            forward_for_analysis(codec.eval(), example_image(codec))
    except (RuntimeError, ValueError, IndexError, CodecError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(
            f"{where} does not fit {type(codec).__name__}: its layers' widths do not match"
            f" ({reason})"
        ) from None
    finally:
        codec.train(training)


def load_codec(
    name: str, quality: int | None = None, *, metric: str = "mse", weights: str | Path = "official"
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
    if str(name).endswith(".safetensors"):
        if str(weights) != "official":
            raise CodecError(f"{name} brings its own weights; leave weights={str(weights)!r} out")
        return load(name)
    if ":" in str(name):
        codec = build_from_path(str(name), quality)
        provenance(codec).metric = metric
        return (
            codec.eval()
            if str(weights) in ("official", "none")
            else _load_weights(codec, expand(weights)).eval()
        )
    if name not in codec_names() and Path(name).suffix in (".pth", ".tar", ".pt"):
        raise CodecError(
            f"{name} holds weights only; name its architecture and pass weights={str(name)!r}"
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


def embedded_file(quality: int) -> Path:
    """Return the path of the embedded codec's weights."""
    return Path(str(resources.files("nicprune"))) / "weights" / f"{DEMO}-q{quality}.safetensors"


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
        state = read_compressai_file(weights)
        own = codec.state_dict()
        state = _modern_keys(codec, state)
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


def _modern_keys(codec: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename entropy bottleneck keys of older CompressAI files (`_matrix0`) to the current ones
    (`matrices.0`).
    """
    lists = {"_matrix": "matrices", "_bias": "biases", "_factor": "factors"}
    own = codec.state_dict()
    renamed = {}
    for key, value in state.items():
        prefix, _, last = key.rpartition(".")
        for old, new in lists.items():
            candidate = f"{prefix}.{new}.{last[len(old) :]}"
            if key not in own and last.startswith(old) and candidate in own:
                key = candidate
        renamed[key] = value
    return renamed
