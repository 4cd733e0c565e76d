"""Build a codec or fetch its official weights, and know its anatomy. The one file that knows CompressAI's names.

A codec is a CompressAI `CompressionModel`. What is learnt about it beside its weights (which constructor makes it,
what it cost before any pruning, what was done to it) is kept in `provenance(codec)`, never on the object.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, EntropyModelVbr, GaussianConditional
from compressai.losses import RateDistortionLoss
from compressai.models import CompressionModel
from compressai.models.vbr import JointAutoregressiveHierarchicalPriorsVbr, ScaleHyperpriorVbr
from compressai.registry import MODELS
from compressai.zoo import image_models
from compressai.zoo import load_state_dict as rename_keys
from torch import Tensor, nn

from nicprune.common.errors import CodecError, FileError, closest

ZOO = tuple(image_models)
"""The ten names of CompressAI's image zoo."""

UNTRAINED = ("cheng2020-anchor-checkerboard", "elic2022-official", "elic2022-chandelier")
"""Architectures of CompressAI for which no official weights exist."""

DEMO = "demo-hyperprior"
"""The codec that comes with this package."""

DEMO_WIDTHS = (64, 96)

LAMBDAS = {
    "mse": (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800),
    "ms-ssim": (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00),
}
"""CompressAI's lambda for qualities 1 to 8 (its documentation, section "Training")."""

TRANSFORMS = ("g_a", "h_a", "entropy_bottleneck", "h_s", "context_prediction", "channel_context", "entropy_parameters", "g_s")
"""In the order in which they run."""
ENCODER_ONLY, DECODER_ONLY = ("g_a", "h_a"), ("g_s",)

TABLES = {"_offset", "_quantized_cdf", "_cdf_length", "scale_table"}
"""Buffers of entropy models that `update()` makes; their sizes follow the weights."""

LARGEST_WIDTH = 1 << 14
"""More channels than any codec has: a file that asks for them is not believed."""

FACTOR = 64
"""Images are padded to a multiple of this many pixels: the largest total stride among the codecs."""


@dataclass
class Provenance:
    """Where a codec comes from.

    Attributes:
        name, quality, metric: as given to `load_codec`; the class name where it came as an object.
        build: import path and keyword arguments that construct the architecture at its original widths.
        original: MACs and params before any pruning (see `cost.Totals`), empty if never pruned.
        history: what was done, in order; one entry a step.
        verified: what the last surgery's verification found, in words; empty if there was none.
        tables: hash of the entropy bottlenecks that the CDF tables were made from; empty if not known.
    """

    name: str
    quality: int | None = None
    metric: str = "mse"
    build: dict[str, Any] = field(default_factory=dict)
    original: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    verified: str = ""
    tables: str = ""

    def copy(self) -> Provenance:
        """Return an independent copy."""
        return Provenance(self.name, self.quality, self.metric, dict(self.build), dict(self.original), list(self.history), self.verified, self.tables)


_provenance: weakref.WeakKeyDictionary[nn.Module, Provenance] = weakref.WeakKeyDictionary()
_by_token: dict[str, Provenance] = {}


def provenance(codec: nn.Module) -> Provenance:
    """Return the record kept of `codec`; a copy of a known codec has a copy of its record, any other one of its class."""
    if codec not in _provenance:
        known = _by_token.get(codec.__dict__.get(_TOKEN, ""))
        cls = type(codec)
        name = next((name for name, model in MODELS.items() if model is cls), cls.__name__)
        built = {"class": f"{cls.__module__}:{cls.__qualname__}", "kwargs": _constructor_arguments(codec)}
        set_provenance(codec, known.copy() if known is not None else Provenance(name, build=built))
    return _provenance[codec]


def set_provenance(codec: nn.Module, record: Provenance) -> None:
    """Keep `record` for `codec`. A word on the object finds it again after deepcopy, which a weak reference does not survive."""
    token = uuid.uuid4().hex
    codec.__dict__[_TOKEN] = token
    _by_token[token] = _provenance[codec] = record


_TOKEN = "_provenance_token"


def _constructor_arguments(codec: nn.Module) -> dict[str, Any]:
    """Recover the constructor's arguments from attributes of the same name, as CompressAI's own classes keep them."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(codec).__init__).parameters.items():
        value = getattr(codec, name, None)
        plain = isinstance(value, (int, float, str, bool)) or (isinstance(value, list) and all(isinstance(v, int) for v in value))
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD and plain:
            arguments[name] = value
    if "groups" in arguments and "M" in inspect.signature(type(codec).__init__).parameters:
        arguments["M"] = sum(arguments["groups"])  # ELIC keeps no M, and refuses groups that do not add up to it
    return arguments


def codec_names() -> tuple[str, ...]:
    """All names that `load_codec` knows."""
    return (*ZOO, *UNTRAINED, DEMO)


def qualities(name: str) -> range:
    """Quality levels of a named codec."""
    if name == DEMO:
        return range(1, 5)
    return range(1, 7) if name.startswith("cheng2020") and name in ZOO else range(1, 9)


def lmbda_for(quality: int, metric: str = "mse") -> float:
    """Return CompressAI's lambda for a quality level (1 to 8).

    Raises:
        CodecError: there is no such quality.
    """
    if not 1 <= quality <= len(LAMBDAS[metric]):
        raise CodecError(f"CompressAI has lambdas for the qualities 1 to {len(LAMBDAS[metric])}, none for {quality}: give one")
    return LAMBDAS[metric][quality - 1]


def lmbda_of(codec: nn.Module, given: float | None = None, metric: str | None = None) -> float:
    """The lambda to train and judge a codec by: the one given, that of its quality, or that of quality 3 where it has none that CompressAI knows."""
    record = provenance(codec)
    lambdas = LAMBDAS[metric or record.metric]
    if given is not None:
        return given
    return lambdas[record.quality - 1] if record.quality and 1 <= record.quality <= len(lambdas) else lambdas[2]


def check_name(name: str, quality: int | None, metric: str) -> None:
    """Raise CodecError unless `name` has `quality` for `metric`."""
    if name not in codec_names():
        raise CodecError(f"unknown codec {name!r}; {closest(name, codec_names())} (or package.module:factory, or a file)")
    if metric not in LAMBDAS:
        raise CodecError(f"unknown metric {metric!r}; {closest(metric, LAMBDAS)}")
    levels = qualities(name)
    if quality is not None and quality not in levels:
        raise CodecError(f"{name} has no quality {quality}; it has {levels.start} to {levels.stop - 1}")


def build_named(name: str, quality: int | None, metric: str = "mse", *, official: bool) -> nn.Module:
    """Build a codec by name, with random weights or the official ones.

    Raises:
        CodecError: name or quality is unknown, or the weights cannot be had.
    """
    check_name(name, quality, metric)
    if name in ZOO and quality is None:
        raise CodecError(f"{name} needs a quality ({qualities(name).start} to {qualities(name).stop - 1})")
    if name == DEMO:
        codec = MODELS["bmshj2018-hyperprior"](*DEMO_WIDTHS)
    elif name in UNTRAINED:
        if official:
            raise CodecError(f"{name} has no official weights; use weights='none' (random) or a file of your own")
        codec = MODELS[name]()
    else:
        try:
            codec = image_models[name](quality=quality, metric=metric, pretrained=official, progress=False)
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise CodecError(
                f"the official weights of {name} quality {quality} ({metric}) could not be downloaded: {reason}; "
                "use weights='none' (random) or weights='file.pth.tar'"
            ) from None
        except RuntimeError as error:
            if "hash" in str(error):
                raise CodecError(f"the download of {name} quality {quality} is damaged ({error}); try again") from None
            raise CodecError(f"no official weights of {name} quality {quality} for {metric}: {error}") from None
    record = provenance(codec)
    record.name, record.quality, record.metric = name, quality, metric
    return codec.eval()


def build_from_path(path: str, quality: int | None = None) -> Any:
    """Call `package.module:factory` (a function or a class) for a codec.

    Raises:
        CodecError: it cannot be imported, called, or does not return a `CompressionModel`.
    """
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CodecError(f"cannot import {path!r}: {error}") from None
    takes_quality = quality is not None and "quality" in inspect.signature(factory).parameters
    try:
        codec = factory(quality=quality) if takes_quality else factory()
    except Exception as error:
        raise CodecError(f"{path} failed: {type(error).__name__}: {error}") from error
    check_codec(codec)
    record = provenance(codec)
    record.name, record.quality = path, quality
    return codec


def check_codec(codec: object) -> None:
    """Raise CodecError unless `codec` is a CompressAI `CompressionModel`."""
    if not isinstance(codec, CompressionModel):
        raise CodecError(f"expected a compressai CompressionModel, got {type(codec).__name__}")


def rebuild(build: Mapping[str, Any], factory: Callable[[], nn.Module] | None = None) -> Any:
    """Construct the architecture that a file names. Only CompressionModel classes are called, nothing is unpickled.

    Raises:
        CodecError: the class is unknown here; says what to pass.
    """
    if factory is not None:
        codec = factory()
        check_codec(codec)
        return codec
    path = str(build.get("class", ""))
    module_name, _, qualified = path.partition(":")
    if not module_name.startswith("compressai.") and module_name not in sys.modules:
        raise CodecError(
            f"the file holds a codec of {path!r}, which is not loaded here; import it first or pass factory= "
            "(on the command line: name package.module:factory and give the file as --weights)"
        )
    target: Any = importlib.import_module(module_name)
    for part in qualified.split("."):
        target = getattr(target, part, None)
    if not (inspect.isclass(target) and issubclass(target, CompressionModel)):
        raise CodecError(f"the file holds a codec of {path!r}, which is not a CompressionModel class here; pass factory=")
    arguments = dict(build.get("kwargs", {}))
    if any(isinstance(v, int) and abs(v) > LARGEST_WIDTH for v in arguments.values()):
        raise CodecError(f"the file asks for a codec of absurd size ({arguments})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return target(**arguments)


def read_compressai_file(path: str | Path) -> dict[str, Tensor]:
    """Read a CompressAI `.pth` or `.pth.tar`: a state dict, bare or below "state_dict", with or without "module.".

    Raises:
        FileError: not such a file, damaged, or a pickle that holds more than tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"no such file: {path}") from None
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise FileError(f"{path} is refused: it holds more than tensors, and unpickling it could run code") from None
        raise FileError(f"{path} is not a PyTorch checkpoint, or is cut short") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is not a PyTorch checkpoint, or is cut short ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileError(f"{path} holds no state dict (found {type(content).__name__})")
    return rename_keys({str(key): value for key, value in state.items()})


def entropy_models(codec: nn.Module) -> list[nn.Module]:
    """All entropy models of a codec."""
    return [m for m in codec.modules() if isinstance(m, (EntropyModel, EntropyModelVbr))]


def rate_distortion_loss(lmbda: float, metric: str) -> nn.Module:
    """CompressAI's loss: lmbda * 255^2 * MSE + bpp, or lmbda * (1 - MS-SSIM) + bpp."""
    return RateDistortionLoss(lmbda=lmbda, metric=metric)


def unwrap(model: nn.Module) -> Any:
    """Return the codec inside an attached model, or the model itself."""
    inner = getattr(model, "codec", None)
    return inner if isinstance(inner, CompressionModel) else model


def transform_of(module_name: str) -> str:
    """Return the transform that a module belongs to, "other" if none is named in its path."""
    return next((part for part in module_name.split(".") if part in TRANSFORMS), "other")


def sides_of(transform: str) -> tuple[bool, bool]:
    """Whether a transform runs (when encoding, when decoding). What is not known to be one-sided runs on both."""
    return transform not in DECODER_ONLY, transform not in ENCODER_ONLY


def on_side(name: str, side: str | None) -> bool:
    """Whether a layer (or parameter) runs when encoding alone ("encoder") or when decoding alone ("decoder"); always without a side."""
    return side is None or transform_of(name) in (ENCODER_ONLY if side == "encoder" else DECODER_ONLY)


def forward_for_analysis(codec: nn.Module, x: Tensor) -> dict[str, Any]:
    """Run the forward pass whose layers stand for the codec's work.

    The variable-rate models run their first stage: in the second, mbt2018-vbr calls its context model pixel by pixel
    on raw weights. Its `scale_to_context`, which joins the context there, is added by hand.
    """
    if not isinstance(codec, ScaleHyperpriorVbr):
        return codec(x)
    with _scale_to_context(codec):
        return codec(x, stage=1)


@contextmanager
def _scale_to_context(codec: nn.Module) -> Iterator[None]:
    if not isinstance(codec, JointAutoregressiveHierarchicalPriorsVbr):
        yield
        return
    linear = codec.scale_to_context

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + linear(torch.ones(1, 1, dtype=output.dtype, device=output.device)).view(1, -1, 1, 1)

    handle = codec.context_prediction.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def is_bottleneck(module: nn.Module) -> bool:
    """Whether the module is an entropy bottleneck: a learned distribution per channel."""
    return isinstance(module, EntropyBottleneck) or type(module).__name__ == "EntropyBottleneckVbr"


def is_conditional(module: nn.Module) -> bool:
    """Whether the module is a Gaussian conditional: no state per channel."""
    return isinstance(module, GaussianConditional) or type(module).__name__ == "GaussianConditionalVbr"
