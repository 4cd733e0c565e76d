"""Codecs by name: CompressAI's zoo, EVC and the embedded codec, their qualities and lambdas,
building them and reading their weights.

CompressAI's architectures are had at other widths too, N or N and M behind the name:
`mbt2018-mean-64-96`, `cheng2020-anchor-96`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from compressai.models import CompressionModel
from compressai.registry import MODELS
from compressai.zoo import image_models
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.evc import EVC
from nicprune.codecs.evc import SIZES as EVC_SIZES
from nicprune.codecs.provenance import provenance
from nicprune.codecs.trusted import SOURCES
from nicprune.common.errors import CodecError, closest, first_line

ZOO = tuple(image_models)
"""The ten names of CompressAI's image zoo."""

UNTRAINED = (
    "cheng2020-anchor-checkerboard",
    "elic2022-official",
    "elic2022-chandelier",
    *EVC_SIZES,
)
"""Architectures without official weights: three of CompressAI's, and EVC in its sizes."""

DEMO = "demo-hyperprior"
"""The embedded codec, whose weights come with this package."""

DEMO_WIDTHS = (64, 96)

LAMBDAS = {
    "mse": (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800),
    "ms-ssim": (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00),
}
"""CompressAI's lambda for qualities 1 to 8 (its documentation, section "Training")."""

LARGEST_WIDTH = 1 << 14
"""More channels than any codec has; a file that asks for more is refused."""

MOST_WEIGHTS, LARGEST_WEIGHT = 1 << 27, 1 << 25
"""More weights, in all and in one tensor, than a codec has that is made from what a file says:
512 MiB of float32.
"""


def codec_names() -> tuple[str, ...]:
    """Return all names that `load_codec` accepts."""
    return (*ZOO, *UNTRAINED, DEMO)


def qualities(name: str) -> range:
    """Return the quality levels of a named codec."""
    if name == DEMO:
        return range(1, 5)
    name, _ = own_widths(name)
    return range(1, 7) if name.startswith("cheng2020") and name in ZOO else range(1, 9)


def own_widths(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the architecture and the widths that a codec's name says; none are those of the
    quality.
    """
    if name in codec_names():
        return name, ()
    found = re.fullmatch(rf"({'|'.join(codec_names())})-([0-9]+(?:-[0-9]+)*)", name)
    if found is None:
        return name, ()
    return found[1], tuple(int(n) for n in found[2].split("-"))


def width_arguments(name: str) -> tuple[str, ...]:
    """Return the widths that the class of a named architecture takes: N, or N and M. The embedded
    codec and EVC take none, which have theirs from their weights and names.
    """
    if name == DEMO or name in EVC_SIZES or name not in MODELS:
        return ()
    return tuple(n for n in inspect.signature(MODELS[name]).parameters if n in ("N", "M"))


def _check_own_widths(full: str, name: str, widths: Sequence[int]) -> None:
    takes = width_arguments(name)
    if not takes:
        raise CodecError(f"{name} takes no widths (got {full!r})")
    if len(widths) != len(takes):
        example = "-".join([name, *("64", "96")[: len(takes)]])
        raise CodecError(f"{name} takes {' and '.join(takes)}, as in {example} (got {full!r})")
    if not all(1 <= width <= LARGEST_WIDTH for width in widths):
        raise CodecError(f"{full}: widths lie between 1 and {LARGEST_WIDTH}")


def lmbda_for(quality: int, metric: str = "mse") -> float:
    """Return CompressAI's lambda for a quality level (1 to 8).

    Raises:
        CodecError: there is no such quality.
    """
    if not 1 <= quality <= len(LAMBDAS[metric]):
        raise CodecError(
            f"CompressAI has lambdas for the qualities 1 to {len(LAMBDAS[metric])}, none for"
            f" {quality}: set lambdas"
        )
    return LAMBDAS[metric][quality - 1]


def lmbda_of(codec: nn.Module, given: float | None = None, metric: str | None = None) -> float:
    """Return the lambda to train and evaluate a codec with: `given`, else that of its quality, else
    CompressAI's for quality 3.
    """
    record = provenance(codec)
    lambdas = LAMBDAS[metric or record.metric]
    if given is not None:
        return given
    return (
        lambdas[record.quality - 1]
        if record.quality and 1 <= record.quality <= len(lambdas)
        else lambdas[2]
    )


def check_name(name: str, quality: int | None, metric: str) -> None:
    """Raise CodecError unless `name` has `quality` for `metric`, and its widths, if it says any."""
    base, widths = own_widths(name)
    if base not in codec_names():
        raise CodecError(
            f"unknown codec {name!r}; {closest(name, codec_names())} (or package.module:factory, or"
            " a file)"
        )
    if widths:
        _check_own_widths(name, base, widths)
    if metric not in LAMBDAS:
        raise CodecError(f"unknown metric {metric!r}; {closest(metric, LAMBDAS)}")
    levels = qualities(name)
    if quality is not None and not (isinstance(quality, int) and quality in levels):
        raise CodecError(
            f"{name} has no quality {quality!r}; it has {levels.start} to {levels.stop - 1}"
        )


def check_official(name: str, quality: int | None, metric: str) -> None:
    """Raise CodecError where a named codec has no official weights, before they are asked for."""
    base, widths = own_widths(name)
    if widths:
        raise CodecError(
            f"there are official weights of {base} at the widths of its qualities alone; use"
            f" weights='none' (random) or a file of your own for {name}"
        )
    if name in UNTRAINED:
        raise CodecError(
            f"{name} has no official weights; use weights='none' (random) or a file of your own"
        )
    if name in ZOO:
        listed = sys.modules[image_models[name].__module__].model_urls.get(name, {}).get(metric, {})
        # A codec for all rates has one address for all qualities.
        if not listed or (isinstance(listed, Mapping) and quality not in listed):
            raise CodecError(
                f"{name} has no official weights for quality {quality} and {metric}; use"
                " weights='none' (random) or a file of your own"
            )


def build_named(
    name: str, quality: int | None, metric: str = "mse", *, official: bool
) -> nn.Module:
    """Build a codec by name, with random weights or the official ones.

    Raises:
        CodecError: the name or quality is unknown, the architecture cannot have these widths, or
            the weights are unavailable.
    """
    check_name(name, quality, metric)
    base, widths = own_widths(name)
    if name in ZOO and quality is None:
        raise CodecError(
            f"{name} needs a quality ({qualities(name).start} to {qualities(name).stop - 1})"
        )
    if official:
        check_official(name, quality, metric)
    if name == DEMO:
        codec = MODELS["bmshj2018-hyperprior"](*DEMO_WIDTHS)
    elif widths:
        absurd = CodecError(f"{name} has more weights than any codec")
        cannot = f"{base} cannot have the widths of {name!r}"
        sliced = CodecError(
            f"{cannot}: its latents are cut into slices of given widths, and M is not above their"
            " sum"
        )
        try:
            with warnings.catch_warnings(), _Bounded(absurd):
                warnings.simplefilter("ignore")  # of a slice without channels
                codec = MODELS[base](**dict(zip(width_arguments(base), widths, strict=True)))
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            if "negative dimension" in str(error):
                raise sliced from None
            raise CodecError(f"{cannot}: {error}") from None
        if not all(parameter.numel() for parameter in codec.parameters()):
            raise sliced
    elif name in UNTRAINED:
        codec = EVC(EVC_SIZES[name]) if name in EVC_SIZES else MODELS[name]()
    else:
        try:
            # The architecture is the same for both metrics, and some are had for "mse" alone.
            codec = image_models[name](
                quality=quality,
                metric=metric if official else "mse",
                pretrained=official,
                progress=False,
            )
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise CodecError(
                f"the official weights of {name} quality {quality} ({metric}) could not be"
                f" downloaded: {reason}; use weights='none' (random) or weights='file.pth.tar'"
            ) from None
        except RuntimeError as error:
            raise CodecError(
                f"the download of {name} quality {quality} is damaged ({error}); try again"
            ) from None
    record = provenance(codec)
    record.name, record.quality, record.metric = name, quality, metric
    ready: nn.Module = codec.eval()
    return ready


def build_from_path(path: str, quality: int | None = None) -> Any:
    """Build a codec by calling `package.module:factory`, a function or a class.

    The module may also lie in the current folder, which is looked at last, and from then on.

    Raises:
        CodecError: the factory cannot be imported, fails, or does not return a `CompressionModel`.
    """
    module_name, _, attribute = path.partition(":")
    with suppress(FileNotFoundError):  # the folder was removed
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CodecError(f"cannot import {path!r}: {error}") from None
    takes_quality = quality is not None and "quality" in inspect.signature(factory).parameters
    try:
        codec = factory(quality=quality) if takes_quality else factory()
    except Exception as error:
        raise CodecError(f"{path} failed: {first_line(error)}") from error
    check_codec(codec)
    record = provenance(codec)
    record.name, record.quality = path, quality
    return codec


def rebuild(build: Mapping[str, Any], factory: Callable[[], nn.Module] | None = None) -> Any:
    """Construct the architecture that a file names.

    Only CompressionModel classes are called; nothing is unpickled.

    Raises:
        CodecError: the class is not imported, or is not a CompressionModel; names what to pass.
    """
    if factory is not None:
        codec = factory()
        check_codec(codec)
        return codec
    path = str(build.get("class", ""))
    module_name, _, qualified = path.partition(":")
    if module_name not in SOURCES and module_name not in sys.modules:
        raise CodecError(
            f"the file holds a codec of {path!r}, which is not loaded here; import it first or pass"
            " factory= (on the command line: name package.module:factory and give the file as"
            " --weights)"
        )
    target: Any = importlib.import_module(module_name)
    for part in qualified.split("."):
        target = getattr(target, part, None)
    if not (inspect.isclass(target) and issubclass(target, CompressionModel)):
        raise CodecError(
            f"the file holds a codec of {path!r}, which is not a CompressionModel class here; pass"
            " factory="
        )
    arguments = dict(build.get("kwargs", {}))
    absurd = CodecError(
        f"the file asks for a codec of absurd size ({str(arguments):.120}); if it is one, pass"
        " factory="
    )
    for value in arguments.values():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > LARGEST_WIDTH:
                raise absurd
    with warnings.catch_warnings(), _Bounded(absurd):
        warnings.simplefilter("ignore")
        return target(**arguments)


class _Bounded(TorchDispatchMode):
    """Raises an error before more values are allocated than any codec has weights."""

    def __init__(self, error: Exception):
        super().__init__()  # type: ignore[no-untyped-call]
        self.error, self.left = error, MOST_WEIGHTS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        if not any(isinstance(arg, Tensor) for arg in given):  # it makes a tensor from sizes
            asked = _elements(func, args, kwargs or {})
            self.left -= asked
            if self.left < 0 or asked > LARGEST_WEIGHT:
                raise self.error
        return func(*args, **(kwargs or {}))


def _elements(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Return how many values a function makes that is given no tensor, without making them."""
    try:
        made = func.overloadpacket(*args, **{**kwargs, "device": torch.device("meta")})
    except (RuntimeError, TypeError, NotImplementedError):
        return math.prod(n for n in tree_leaves(args) if isinstance(n, int))
    return made.numel() if isinstance(made, Tensor) else 0


def embedded_file(quality: int) -> Path:
    """Return the path of the embedded codec's weights."""
    return Path(str(resources.files("nicprune"))) / "weights" / f"{DEMO}-q{quality}.safetensors"
