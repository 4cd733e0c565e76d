"""Encode or decode images in a process of its own, whose environment selects CPU kernels and
threads.

`python -m nicprune.bench.decoding_worker` reads a `Job` as JSON from standard input and writes a
line of JSON for each image and way of coding.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nicprune.bench.decoding_job import EXACT, FLOAT32, FLOAT64, Done, Job
from nicprune.common.errors import FileError
from nicprune.common.machine import tune_allocator
from nicprune.data.images import read_image
from nicprune.runtime.accelerate import accelerate
from nicprune.storage.checkpoint import load
from nicprune.storage.coded_image import read_coded
from nicprune.storage.container import ImageCoder


def run_job(job: Job) -> Iterator[Done]:
    """Do what a job says, image by image."""
    for label, file in job.codecs.items():
        codec = load(file)
        coder = ImageCoder(codec)
        fast = {
            name: ImageCoder(accelerate(codec, name, image=cropped(read_image(image), job.crop)))
            for name in job.backends
            for image in job.images[:1]
        }
        for one, ways in ((coder, job.ways), *((one, (FLOAT64,)) for one in fast.values())):
            _set_up(one, cropped(read_image(job.images[0]), SMALL), ways)
        for number, image in enumerate(job.images):  # several may have one name
            place = Path(job.folder) / f"{label}.{number}"
            for action in job.actions:
                for way in job.ways:
                    if action != "encode":
                        yield _decode(action, label, coder, image, way, place)
                    elif way != EXACT:  # encoded as FLOAT64 is
                        yield _encode(job.crop, label, coder, image, way, place)
                for writer in job.backends if action == "encode" else ():
                    yield _encode(job.crop, label, fast[writer], image, writer, place)
                for writer, reader in pairs(job.backends) if action != "encode" else ():
                    chosen = fast.get(reader, coder)
                    yield _decode(action, label, chosen, image, f"{writer} > {reader}", place)


SMALL = 64
"""Side in pixels of what is coded before times are taken."""


def _set_up(coder: ImageCoder, picture: Tensor, ways: Sequence[str]) -> None:
    """Do what a coder does once, in each way, so that no image's time has it."""
    for way in ways:
        coded = coder.encode(picture, fast=way == FLOAT32)
        coder.decode(*read_coded(coded), exact=way == EXACT)


EAGER = "eager"
"""The codec itself, beside backends."""


def pairs(backends: Sequence[str]) -> list[tuple[str, str]]:
    """Return who decodes what whom encoded, where a backend is one of the two."""
    all_ = (EAGER, *backends)
    return [pair for pair in itertools.product(all_, all_) if pair != (EAGER, EAGER)]


def _encode(
    crop: int | None, label: str, coder: ImageCoder, image: str, way: str, place: Path
) -> Done:
    picture = cropped(read_image(image), crop)
    started = time.process_time()
    data = coder.encode(picture, fast=way == FLOAT32)
    seconds = time.process_time() - started
    _named(place, way).write_bytes(data)
    pixels = picture.shape[1] * picture.shape[2]
    return Done("encode", label, image, way, seconds, len(data), pixels)


def _decode(action: str, label: str, coder: ImageCoder, image: str, way: str, place: Path) -> Done:
    writer = way.partition(" > ")[0]
    own = FLOAT64 if way == EXACT or writer == EAGER else writer
    data = _named(place, own)
    kept = _named(place, f"{way}.npy")
    started = time.process_time()
    try:
        picture = coder.decode(*read_coded(data), exact=way == EXACT)
    except FileError as error:
        return Done(action, label, image, way, time.process_time() - started, refused=str(error))
    seconds = time.process_time() - started
    if action == "reference":
        np.save(kept, picture.numpy())
        return Done(action, label, image, way, seconds)
    apart = (picture.int() - torch.from_numpy(np.load(kept)).int()).abs()
    differing, largest = int((apart > 0).sum()), int(apart.max())
    return Done(action, label, image, way, seconds, differing=differing, largest=largest)


def _named(place: Path, end: str) -> Path:
    return place.parent / f"{place.name}.{end}"


def cropped(image: Tensor, side: int | None) -> Tensor:
    """Return the square at the centre of an image (3, H, W), or all of it."""
    if side is None:
        return image
    top, left = (max(0, (size - side) // 2) for size in image.shape[1:])
    return image[:, top : top + side, left : left + side].contiguous()


def main() -> None:
    """Read a job, do it, and print what was done."""
    given: dict[str, Any] = json.load(sys.stdin)
    tune_allocator()
    job = Job(**given)
    with torch.backends.mkldnn.flags(enabled=job.onednn):
        for done in run_job(job):
            print(json.dumps(asdict(done)), flush=True)


if __name__ == "__main__":
    main()
