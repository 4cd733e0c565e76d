"""Decoding elsewhere: images are encoded by one process and decoded by others, with other CPU
kernels and other numbers of threads. Each is bit-equal in its symbols, or refused.

The same images are coded with entropy parameters in float64 and in float32, so that rate and time
of both stand beside each other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from nicprune.bench.decoding_job import EXACT, FLOAT32, FLOAT64, Done, Job
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import example_image
from nicprune.codecs.zoo import DEMO, qualities
from nicprune.common.errors import FileError
from nicprune.common.files import write_text
from nicprune.common.machine import machine_line
from nicprune.data.images import list_images
from nicprune.evaluation.timer import Measure
from nicprune.storage.checkpoint import save
from nicprune.storage.named import load_codec

AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
SSE41 = {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}

CONDITIONS: dict[str, dict[str, str]] = {
    "1 thread": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "3 threads": {"OMP_NUM_THREADS": "3"},
    "AVX2": AVX2,
    "SSE4.1": SSE41,
    "oneDNN off": {},
}
"""Environments in which images are decoded. They are encoded, and first decoded, in the first."""

CODECS = ("demo-hyperprior", "mbt2018-mean", "cheng2020-anchor-checkerboard")
"""Codecs that are measured if none are named."""

FILES = ("decoding.json", "decoding.md")
"""Files that `write_decoding` writes."""

SIDE = 128
"""Side of the crops that are coded if no images are named."""


@dataclass(frozen=True)
class Decodings:
    """The images of one codec that were decoded in one environment and one way."""

    codec: str
    condition: str
    way: str
    done: tuple[Done, ...]

    @property
    def refused(self) -> int:
        """Number of images that were refused."""
        return sum(bool(one.refused) for one in self.done)

    @property
    def same(self) -> int:
        """Number of pictures that are the reference's to the bit."""
        return sum(not one.refused and not one.differing for one in self.done)

    @property
    def largest(self) -> int:
        """Largest difference of a value from the reference's, in levels of 256."""
        return max((one.largest for one in self.done), default=0)


@dataclass(frozen=True)
class DecodingReport:
    """Encoding in one environment, decoding in several.

    Attributes:
        encoded, decoded: by codec and way.
        conditions: images and machine, in words.
    """

    encoded: dict[tuple[str, str], tuple[Done, ...]]
    decoded: list[Decodings]
    conditions: str

    def cost(self) -> list[dict[str, Any]]:
        """Return rate and CPU seconds of float64 entropy parameters beside those of float32."""
        first = next(iter(CONDITIONS))
        rows = []
        for codec in dict.fromkeys(codec for codec, _ in self.encoded):
            row: dict[str, Any] = {"codec": codec}
            for way in (FLOAT32, FLOAT64):
                done = self.encoded[codec, way]
                read = next(
                    d.done
                    for d in self.decoded
                    if (d.codec, d.condition, d.way) == (codec, first, way)
                )
                row[f"bpp {way}"] = 8 * sum(d.size for d in done) / sum(d.pixels for d in done)
                row[f"encode s {way}"] = statistics.median(d.seconds for d in done)
                row[f"decode s {way}"] = statistics.median(d.seconds for d in read)
            rows.append(row)
        return rows

    def table(self) -> str:
        """Return two Markdown tables: what float64 costs, and what became of the images."""
        costs = []
        for row in self.cost():
            cells: list[Any] = [row["codec"]]
            for what, digits in (("bpp", 4), ("encode s", 2), ("decode s", 2)):
                before, after = row[f"{what} {FLOAT32}"], row[f"{what} {FLOAT64}"]
                cells += [
                    f"{before:.{digits}f}",
                    f"{after:.{digits}f}",
                    f"{after / before - 1:+.2%}",
                ]
            costs.append(cells)
        heads = ["codec"]
        for what in ("bpp", "encode s", "decode s"):
            heads += [f"{what}, float32", "float64", "change"]
        rows = []
        for one in self.decoded:
            rows.append(
                (
                    one.codec,
                    one.condition,
                    one.way,
                    len(one.done),
                    one.refused,
                    one.same,
                    one.largest,
                )
            )
        names = (
            "codec", "decoded with", "way", "images", "refused", "same to the bit",
            "largest difference, levels",
        )  # fmt: skip
        return "\n\n".join(
            (
                tabulate(costs, heads, tablefmt="pipe", disable_numparse=True),
                tabulate(rows, names, tablefmt="pipe", disable_numparse=True),
                self.conditions,
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can write it."""
        return {
            "conditions": self.conditions,
            "cost": self.cost(),
            "decoded": [
                {
                    "codec": one.codec,
                    "condition": one.condition,
                    "way": one.way,
                    "images": [asdict(done) for done in one.done],
                }
                for one in self.decoded
            ],
        }


def measure_decoding(
    codecs: Mapping[str, nn.Module],
    images: Sequence[str | Path],
    *,
    crop: int | None = None,
    exact: bool = False,
    conditions: Sequence[str] = tuple(CONDITIONS),
    backends: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> DecodingReport:
    """Encode images in one process, and decode them in one for each of `CONDITIONS`.

    Args:
        codecs: by label; each of a kind that `save` writes.
        images: image files.
        crop: side of the squares, at their centre, that are coded; None for whole images.
        exact: decode also with the picture in float64.
        conditions: names of conditions; the first of all is always among them.
        backends: backends of `accelerate` that encode too, and decode what the codec itself and
            each of them encoded.
        say: called with a line for each process.

    Raises:
        FileError: a process failed.
    """
    ways = [FLOAT64, FLOAT32]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            label: str(save(codec, Path(folder) / f"{number}.safetensors"))
            for number, (label, codec) in enumerate(codecs.items())
        }
        places = [str(Path(image).resolve()) for image in images]
        first = next(iter(CONDITIONS))
        encoded: dict[tuple[str, str], tuple[Done, ...]] = {}
        decoded: list[Decodings] = []
        for name in dict.fromkeys((first, *conditions)):
            say(f"encoding, and decoding: {name}" if name == first else f"decoding: {name}")
            job = Job(
                ["encode", "reference"] if name == first else ["decode"],
                files,
                places,
                crop,
                [*ways, *([EXACT] if exact else [])],
                folder,
                onednn=name != "oneDNN off",
                backends=list(backends),
            )
            done = _run(job, CONDITIONS[name])
            encoded |= _grouped([one for one in done if one.action == "encode"])
            found = _grouped([one for one in done if one.action != "encode"])
            decoded += [Decodings(codec, name, way, each) for (codec, way), each in found.items()]
    taken = f"crops of {crop}x{crop} pixels" if crop else "whole images"
    return DecodingReport(
        encoded,
        decoded,
        f"{len(images)} images, {taken}; encoded on one thread with the kernels that torch selects"
        f" on {machine_line()}. Seconds are medians of CPU time on one thread, while other programs"
        " may have run; bpp includes the header.",
    )


def _run(job: Job, environment: Mapping[str, str]) -> list[Done]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nicprune.bench.decoding_worker"],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise FileError(f"decoding failed: {told[-1] if told else done.returncode}")
    return [Done(**json.loads(line)) for line in done.stdout.splitlines()]


def _grouped(done: Sequence[Done]) -> dict[tuple[str, str], tuple[Done, ...]]:
    found: dict[tuple[str, str], list[Done]] = {}
    for one in done:
        found.setdefault((one.codec, one.way), []).append(one)
    return {key: tuple(value) for key, value in found.items()}


@torch.no_grad()
def random_codec(name: str, quality: int | None = None) -> nn.Module:
    """Return an architecture of the zoo with random weights that spread latents and their scales
    over many symbols, as CompressAI's initial weights do not.
    """
    levels = qualities(name)
    codec: Any = load_codec(name, quality or (levels[0] if len(levels) else None), weights="none")
    generator = torch.Generator().manual_seed(0)
    last = []
    for key, weight in codec.named_parameters():
        if weight.dim() == 4:  # of a convolution
            bound = (3 / weight[0].numel()) ** 0.5
            weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
            if key.startswith("g_a."):
                last = [weight]
    seen: list[float] = []
    handle = codec.g_a.register_forward_hook(lambda m, a, out: seen.append(float(out.std())))
    codec.eval()(example_image(codec, seed=0))
    handle.remove()
    for weight in last:
        weight.mul_(LATENTS / max(seen[0], 1e-6))
    refresh_tables(codec)
    made: nn.Module = codec
    return made


LATENTS = 4.0
"""Standard deviation of the latents of `random_codec`."""


def write_decoding(report: DecodingReport, folder: str | Path, command: str) -> Path:
    """Write decoding.md and decoding.json into a folder; return the folder.

    Raises:
        FileError: the folder cannot be written to.
    """
    folder = Path(folder)
    content = {"command": command, **report.as_dict()}
    write_text(folder / "decoding.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "decoding.md", f"{report.table()}\n\nMade by `{command}`.\n")
    return folder


def bench_decoding() -> Iterator[Measure]:
    """Measure how many images of another environment are decoded or refused, and what entropy
    parameters in float64 cost.
    """
    report = measure_decoding(
        {name: named_codec(name) for name in CODECS}, list_images("samples", "test"), crop=SIDE
    )
    size = f"{len(CONDITIONS)} environments"
    for row in report.cost():
        codec = row["codec"]
        found = [d for d in report.decoded if (d.codec, d.way) == (codec, FLOAT64)]
        images, refused = sum(len(d.done) for d in found), sum(d.refused for d in found)
        detail = (
            f"{refused} of {images} refused; the others differ by {max(d.largest for d in found)}"
        )
        yield Measure(
            f"pictures of another environment off by more than a level, {codec}",
            sum(one.largest > 1 for d in found for one in d.done),
            "",
            goal=0,
            size=size,
            detail=f"{detail} levels at most",
            threads=1,
        )
        for what in ("bpp", "encode s", "decode s"):
            before, after = row[f"{what} {FLOAT32}"], row[f"{what} {FLOAT64}"]
            yield Measure(
                f"{what.removesuffix(' s')}, float64 / float32 entropy parameters, {codec}",
                after / before,
                "x",
                size=f"{SIDE}x{SIDE}",
                detail=f"{before:.4g} to {after:.4g}",
                threads=1,
            )


def named_codec(name: str, quality: int | None = None) -> nn.Module:
    """Return a codec by a name of the zoo, with random weights unless it is the embedded one; or of
    a file.
    """
    if name.endswith(".safetensors") or ":" in name:
        return load_codec(name, quality)
    levels = qualities(name)
    if name == DEMO:
        return load_codec(name, quality or levels[len(levels) // 2])
    return random_codec(name, quality)
