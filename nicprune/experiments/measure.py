"""One codec of a recipe on the test photographs: its record, and crops of what it decodes."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.provenance import provenance
from nicprune.common.machine import machine_line, versions
from nicprune.data.images import list_images, usable_images, write_png
from nicprune.evaluation.evaluate import Evaluation, ImageScore, evaluate
from nicprune.evaluation.memory import peak_bytes
from nicprune.experiments.plan import Run
from nicprune.experiments.recipe import Recipe, digest
from nicprune.methods import Attached
from nicprune.methods.gating.execution import set_skipping
from nicprune.methods.operating_point import OperatingPoint
from nicprune.pruning.cost import COUNTER, CostModel

CROP = (192, 192)
CROPPED_IMAGES = 3
TIMED_IMAGES = 6


def last_change(codec: nn.Module, job: Run) -> dict[str, Any]:
    """What was done to the codec last, if it was done here."""
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
) -> tuple[dict[str, Any], Evaluation]:
    """Evaluate a codec at one operating point; return its record and the evaluation."""
    crops: list[dict[str, Any]] = []

    def keep(name: str, original: Tensor, decoded: Tensor, score: ImageScore) -> None:
        if recipe.photographs.crops and len(crops) < CROPPED_IMAGES and quality is not None:
            crops.append(
                save_crops(
                    job.folder / str(point), len(crops), name, original, decoded, score, job.folder
                )
            )

    lmbda, history, label = job.lmbda, [], job.arm.label
    quality: int | None = job.quality
    if isinstance(codec, Attached):
        codec.set_point(point)
        lmbda = codec.lmbda_at(point) or lmbda
        if point.width == 0 and codec.roles.multi_width is not None:
            history = codec.roles.multi_width.lambda_history()
        if point.effort is not None:  # each level of an encoder is a curve over the qualities
            label = f"{label}, {codec.choices[0].name(point.effort)}"
    if point.rate is not None:
        quality = next(
            (q for q in recipe.qualities if abs(recipe.lmbda(q) / lmbda - 1) < 1e-5), None
        )
    cost = CostModel(unwrap(codec), Groups([]))
    by_transform = (codec if isinstance(codec, Attached) else cost).by_transform()
    evaluation = evaluate(
        codec,
        recipe.photographs.test,
        progress=progress,
        keep_decoded=keep,
        cost=cost.totals(),
        **point.keywords(),
    )
    dynamic, peaks = evaluation.dynamic(), peak_memory(codec, point)
    skipping = time_skipping(codec, recipe, point) if dynamic and quality is not None else {}
    record = {
        "format": "nicprune-record",
        "version": 1,
        "key": job.key,
        "codec": recipe.codec,
        "quality": quality,
        "metric": recipe.metric,
        "lmbda": lmbda,
        "level": point.rate,
        "width": point.width,
        "schedule": history,
        "method": job.arm.name,
        "label": label,
        "role": job.role,
        "seed": job.seed,
        "steps": steps,
        "settings": dict(job.settings),
        "cost": evaluation.cost.as_dict(),
        "original_cost": evaluation.original_cost.as_dict(),
        "dynamic": dynamic,
        "skipping": skipping,
        "encode_peak_bytes": peaks[0],
        "decode_peak_bytes": peaks[1],
        "by_transform": {
            t: (round(dynamic[t][0]) if t in dynamic else macs, params)
            for t, (macs, params) in by_transform.items()
        },
        "widths": last_change(unwrap(codec), job).get("widths", {}),
        **evaluation.means(),
        "images": [asdict(image) for image in evaluation.images],
        "test": test_name(recipe),
        "crops": crops,
        "file": "codec.safetensors",
        "file_bytes": size,
        "recipe": recipe.name,
        "recipe_sha256": digest(recipe.model_dump(mode="json")),
        "recipe_text": text,
        "counter": COUNTER,
        "threads": evaluation.threads,
        "busy": evaluation.busy,
        "device": evaluation.device,
        "versions": versions(),
        "machine": machine_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return record, evaluation


def peak_memory(codec: Any, point: OperatingPoint) -> tuple[int, int]:
    """Return the peak bytes of tensors alive to encode and to decode a 768x512 image."""
    refresh_tables(codec)
    image, sent = torch.rand(1, 3, 512, 768, generator=torch.Generator().manual_seed(0)), {}
    encoding = peak_bytes(lambda: sent.update(codec.compress(image, **point.keywords())))
    return encoding, peak_bytes(lambda: codec.decompress(sent["strings"], sent["shape"]))


def test_name(recipe: Recipe) -> str:
    """What the test photographs are called: a folder's path, or several names."""
    given = recipe.photographs.test
    return given if isinstance(given, str) else " + ".join(Path(one).name for one in given)


def time_skipping(codec: nn.Module, recipe: Recipe, point: OperatingPoint) -> dict[str, Any]:
    """Seconds for some images with closed channels left out, and with them multiplied by zero:
    [with, without] for both sides.
    """
    paths = [
        str(path)
        for path in usable_images(list_images(recipe.photographs.test, "test"))[:TIMED_IMAGES]
    ]
    found: dict[str, Any] = {"images": len(paths), "encode_s": [], "decode_s": []}
    try:
        for skips in (True, False):
            set_skipping(unwrap(codec), skips)
            means = evaluate(codec, paths, **point.keywords()).means()
            found["encode_s"].append(means["encode_s"])
            found["decode_s"].append(means["decode_s"])
    finally:
        set_skipping(unwrap(codec), True)
    return found


def save_crops(
    folder: Path,
    number: int,
    name: str,
    original: Tensor,
    decoded: Tensor,
    score: ImageScore,
    base: Path,
) -> dict[str, Any]:
    """Write the most detailed window of an image, original and decoded, as PNG; return what a
    record says of them, paths from `base`.
    """
    top, left, height, width = detailed_window(original)
    paths = {}
    for what, image in (("original", original), ("decoded", decoded)):
        path = folder / "crops" / f"{number}-{Path(name).stem}-{what}.png"
        write_png(image[:, top : top + height, left : left + width], path)
        paths[what] = str(path.relative_to(base))
    return {"image": name, **paths, "bpp": score.bpp, "psnr_db": score.psnr_db}


def detailed_window(image: Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window with the most gradient energy, on a grid of half
    windows.
    """
    height, width = min(CROP[0], image.shape[1]), min(CROP[1], image.shape[2])
    grey = image.mean(0)
    energy = torch.zeros_like(grey)
    energy[:-1, :-1] = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (
        grey[:-1, 1:] - grey[:-1, :-1]
    ).abs()
    best = (-1.0, 0, 0)
    for top in range(0, image.shape[1] - height + 1, max(height // 2, 1)):
        for left in range(0, image.shape[2] - width + 1, max(width // 2, 1)):
            best = max(
                best, (float(energy[top : top + height, left : left + width].sum()), -top, -left)
            )
    return -best[1], -best[2], height, width
