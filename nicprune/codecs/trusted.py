"""Classes that are known to hold no number of channels in their code: CompressAI's, and this
package's.

Forks of CompressAI are packages of the same name, with other classes, or others by the same names.
So a class is not known by where it says it comes from, but by what its file holds.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from pathlib import Path

SOURCES = {
    "compressai.entropy_models.entropy_models": "773fd67f344e261f",
    "compressai.entropy_models.entropy_models_vbr": "12b9f01108414ecf",
    "compressai.latent_codecs.base": "0b4edf54e42a982c",
    "compressai.latent_codecs.channel_groups": "8d0073c8174d03a8",
    "compressai.latent_codecs.checkerboard": "5229090430eec9ea",
    "compressai.latent_codecs.entropy_bottleneck": "57a39ee4ffe9eb51",
    "compressai.latent_codecs.gain.hyper": "423837a72bb14a7c",
    "compressai.latent_codecs.gain.hyperprior": "dea2b4c3dbe7167b",
    "compressai.latent_codecs.gaussian_conditional": "2a01cf19b813937f",
    "compressai.latent_codecs.hyper": "7ba6f36d73a766fd",
    "compressai.latent_codecs.hyperprior": "323d02f40c755662",
    "compressai.latent_codecs.rasterscan": "da53f4106986c3f8",
    "compressai.layers.basic": "20e6b34134fe19c3",
    "compressai.layers.gdn": "58193d7849142f02",
    "compressai.layers.layers": "d09430c20c78e4de",
    "compressai.models.base": "82f437b2f4313530",
    "compressai.models.google": "7a072d8e85f67148",
    "compressai.models.sensetime": "4d499fa25c3b6da7",
    "compressai.models.vbr": "d02992ba0cc94452",
    "compressai.models.waseda": "26c41ee1eb78882a",
    "compressai.ops.bound_ops": "4330d6597e2c7bd1",
    "compressai.ops.parametrizers": "75613930ee15dc84",
}
"""CompressAI's files (1.2.8) whose classes tests prune, each with the beginning of its SHA-256."""

OWN = "nicprune.codecs."


def is_listed(cls: type) -> bool:
    """Return whether a class is one of CompressAI's by name, in whatever version."""
    return cls.__module__ in SOURCES


@functools.cache
def is_trusted(cls: type) -> bool:
    """Return whether a class is one of CompressAI's as they are published, or of this package."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if "<locals>" in cls.__qualname__:  # a class within a function cannot be looked up
        files = {f.__code__.co_filename for f in vars(cls).values() if inspect.isfunction(f)}
        defined = files == {file}
    else:
        found: object = module
        for part in cls.__qualname__.split("."):
            found = getattr(found, part, None)
        defined = found is cls
    if not defined:  # it only says that it is from there
        return False
    if cls.__module__.startswith(OWN):
        return True
    known = SOURCES.get(cls.__module__)
    return known is not None and known == _digest(str(file))


def of_a_library(cls: type) -> bool:
    """Return whether a class is torch's, or trusted: its kind, which tests try, says what it is."""
    return cls.__module__.startswith("torch.") or is_trusted(cls)


@functools.cache
def _digest(file: str) -> str:
    """Beginning of the SHA-256 of a file, ends of lines aside; empty where it cannot be read."""
    try:
        return hashlib.sha256(Path(file).read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]
    except OSError:
        return ""
