"""Measure one codec of a recipe on the test images: its record."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import image_shape
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import FileError
from nicprune.common.machine import machine_line, versions
from nicprune.common.wording import numbered
from nicprune.data.images import list_images, usable_images
from nicprune.evaluation.evaluate import Evaluation, ImageScore, evaluate
from nicprune.evaluation.memory import peak_bytes
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.crops import save_crop
from nicprune.experiments.plan import Run, digest, training_images
from nicprune.experiments.recipe import Recipe
from nicprune.methods.composition import Attached
from nicprune.methods.gating.execution import set_skipping
from nicprune.methods.operating_point import OperatingPoint
from nicprune.methods.points import operating_points
from nicprune.pruning.cost import COUNTER, CostModel
from nicprune.report.record import FORMAT, VERSION, Record, Role
from nicprune.report.record_parts import Cost, Crop, ImageResult, Skipping, SourceResult
from nicprune.storage.coded_image import CodedImage
from nicprune.storage.container import ImageCoder, decode

CROPPED_IMAGES = 3
"""Test images that crops are made of."""
TIMED_IMAGES = 6
"""Test images on which skipping closed channels is timed."""


def last_change(codec: nn.Module, job: Run) -> dict[str, Any]:
    """Return the last entry of the codec's history, if this run made it; else an empty one."""
    history = provenance(codec).history
    return history[-1] if history and job.role in ("pruned", "modulated") else {}


def measure_at(
    recipe: Recipe,
    text: str,
    job: Run,
    codec: nn.Module,
    steps: int,
    size: int,
    progress: bool,
    point: OperatingPoint,
) -> tuple[Record, Evaluation]:
    """Evaluate a codec at one operating point; return its record and the evaluation.

    Args:
        recipe: recipe of the run.
        text: the recipe as written.
        job: the run.
        codec: its codec, on the CPU.
        steps: training steps of the codec.
        size: size of its file, in bytes.
        progress: show a progress bar.
        point: operating point to measure at.
    """
    quality: int | None = job.quality
    lmbda, label, history = job.lmbda, job.arm.label, []
    cost = CostModel(unwrap(codec), Groups([]))
    by_transform = cost.by_transform()
    if isinstance(codec, Attached):
        codec.set_point(point)
        lmbda, by_transform = codec.lmbda_at(point) or lmbda, codec.by_transform()
        if point.width == 0 and codec.roles.multi_width is not None:
            history = codec.roles.multi_width.lambda_history()
        if point.effort is not None and codec.widths is not None:
            # Each level of a scalable encoder is a curve of its own.
            label = f"{label}, {codec.widths.name(point.effort)}"
    if point.rate is not None:
        quality = quality_at(recipe, lmbda)

    crops: list[Crop] = []

    def keep(name: str, original: Tensor, decoded: Tensor, score: ImageScore) -> None:
        if recipe.photographs.crops and len(crops) < CROPPED_IMAGES and quality is not None:
            folder = job.folder / str(point)
            crops.append(
                save_crop(
                    folder,
                    len(crops),
                    original,
                    decoded,
                    job.folder,
                    name=score.name,
                    bpp=score.bpp,
                    psnr_db=score.psnr_db,
                )
            )

    evaluation = evaluate(
        codec,
        recipe.photographs.test,
        progress=progress,
        keep_decoded=keep,
        cost=cost.totals(),
        **point.keywords(),
    )
    dynamic = evaluation.dynamic()
    encode_peak, decode_peak = peak_memory(codec, point)
    timed = dynamic and quality is not None
    names, settings = [name for name, _ in job.settings], [own for _, own in job.settings]
    record = Record(
        format=FORMAT,
        version=VERSION,
        key=job.key,
        codec=recipe.codec,
        quality=quality,
        metric=recipe.metric,
        lmbda=lmbda,
        level=point.rate,
        width=point.width,
        schedule=history,
        method=job.arm.name,
        label=label,
        role=cast("Role", job.role),
        seed=job.seed,
        steps=steps,
        settings=dict(zip(numbered(names), settings, strict=True)),
        cost=Cost(**evaluation.cost.as_dict()),
        original_cost=Cost(**evaluation.original_cost.as_dict()),
        dynamic=dynamic,
        skipping=time_skipping(codec, recipe, point) if timed else None,
        encode_peak_bytes=encode_peak,
        decode_peak_bytes=decode_peak,
        by_transform={
            name: (round(dynamic[name][0]) if name in dynamic else macs, params)
            for name, (macs, params) in by_transform.items()
        },
        widths=last_change(unwrap(codec), job).get("widths", {}),
        **evaluation.means(),
        images=[ImageResult(**asdict(image)) for image in evaluation.images],
        test=test_name(recipe),
        source=measure_source(recipe, job, codec, progress),
        train_images=len(training_images(recipe, job)) if job.arm.images is not None else None,
        crops=crops,
        file="codec.safetensors",
        file_bytes=size,
        recipe=recipe.name,
        recipe_sha256=digest(recipe.model_dump(mode="json")),
        recipe_text=text,
        counter=COUNTER,
        threads=evaluation.threads,
        busy=evaluation.busy,
        device=evaluation.device,
        versions=versions(),
        machine=machine_line(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return record, evaluation


OLD_FILES = 2
"""Test images of the source domain that are coded by the original and decoded by a codec."""


def measure_source(
    recipe: Recipe, job: Run, codec: nn.Module, progress: bool
) -> SourceResult | None:
    """Evaluate a codec on images of the domain that the original was made for, in this domain if it
    has several; None if the recipe names no such images.
    """
    folder = recipe.photographs.source
    if folder is None:
        return None
    points = operating_points(codec)
    bare = next(
        (p for p in points if isinstance(codec, Attached) and codec.bare_at(p) is not None), None
    )
    at = bare if bare is not None else points[0]
    evaluation = evaluate(codec, folder, progress=progress, **at.keywords())
    means = evaluation.means()
    return SourceResult(
        test=folder_name(folder),
        bpp=means["bpp"],
        psnr_db=means["psnr_db"],
        ms_ssim=means["ms_ssim"],
        old_files=read_old_files(recipe, job, codec),
        images=[ImageResult(**asdict(image)) for image in evaluation.images],
    )


def read_old_files(recipe: Recipe, job: Run, codec: nn.Module) -> str:
    """Decode what the original encodes; say what becomes of it."""
    assert recipe.photographs.source is not None
    original = ImageCoder(load_base_codec(recipe, job))
    paths = usable_images(list_images(recipe.photographs.source, "test"))[:OLD_FILES]
    same = True
    for path in paths:
        coded = CodedImage.parse(original.encode(path), path.name)
        try:
            same &= torch.equal(decode(codec, bytes(coded)), original.decode(coded))
        except FileError:
            return "refused"
    return "bit-exact" if same else "another picture"


def quality_at(recipe: Recipe, lmbda: float) -> int | None:
    """Return the quality of a recipe that has this lambda; None for a rate between qualities."""
    return next((q for q in recipe.qualities if abs(recipe.lmbda(q) / lmbda - 1) < 1e-5), None)


def peak_memory(codec: Any, point: OperatingPoint) -> tuple[int, int]:
    """Return the peak size of all tensors alive, in bytes, in encoding and decoding 768x512."""
    refresh_tables(codec)
    channels, sent = image_shape(unwrap(codec))[0], {}
    image = torch.rand(1, channels, 512, 768, generator=torch.Generator().manual_seed(0))
    encoding = peak_bytes(lambda: sent.update(compress(codec, image, **point.keywords())))
    return encoding, peak_bytes(lambda: decompress(codec, sent["strings"], sent["shape"], image))


def test_name(recipe: Recipe) -> str:
    """Return the name of the test images: a folder's path, or several names."""
    return folder_name(recipe.photographs.test)


def folder_name(given: str | list[str]) -> str:
    """Return the name of images: a folder's path, or several names."""
    return given if isinstance(given, str) else " + ".join(Path(one).name for one in given)


def time_skipping(codec: nn.Module, recipe: Recipe, point: OperatingPoint) -> Skipping:
    """Time some images with closed channels skipped, and with them multiplied by zero."""
    images = usable_images(list_images(recipe.photographs.test, "test"))[:TIMED_IMAGES]
    seconds: list[tuple[float, float]] = []
    try:
        for skips in (True, False):
            set_skipping(unwrap(codec), skips)
            means = evaluate(codec, [str(path) for path in images], **point.keywords()).means()
            seconds.append((means["encode_s"], means["decode_s"]))
    finally:
        set_skipping(unwrap(codec), True)
    (encode, decode), (encode_zeroed, decode_zeroed) = seconds
    return Skipping(
        images=len(images), encode_s=(encode, encode_zeroed), decode_s=(decode, decode_zeroed)
    )
