"""A recipe from start to finish: attach, train, harden, fine-tune, evaluate, report, for each
quality. Skips what is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.layer_kinds.operations import reinitialise
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.common.errors import FileError
from nicprune.common.files import check_writable, write_atomically, write_text
from nicprune.data.images import calibration_images
from nicprune.experiments.measure import last_change, measure_at
from nicprune.experiments.plan import Run, load_base_codec, plan_runs
from nicprune.experiments.recipe import Phase, Recipe, check_paths
from nicprune.methods import Attached, attach
from nicprune.methods.with_teacher import taught, teaching, untaught
from nicprune.report import collect, text_table, write_report
from nicprune.storage.checkpoint import check_savable, load, save
from nicprune.training.loop import fit

MADE = "made.json"
"""Says that a job's codec is trained; without the record beside it, it is only measured again."""


def run_recipe(
    recipe: Recipe,
    text: str = "",
    *,
    reports: str | Path = "reports",
    runs: str | Path = "runs",
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Run a recipe and write its report.

    Args:
        text: the recipe as written, for the report.
        reports: the report goes to a folder below, named after the recipe.
        runs: checkpoints and results of each part go below; parts that are finished there are not
            done again.
        say: where lines of progress go.

    Returns: the report's index.html.
    """
    check_paths(recipe)
    runs, reports = Path(runs), Path(reports)
    check_writable(runs / recipe.name, reports / recipe.name)
    listed = plan_runs(recipe, runs)
    check_savable_codecs(recipe, listed)
    for number, job in enumerate(listed, 1):
        title = (
            f"[{number}/{len(listed)}] {recipe.codec} q{job.quality}"
            f" {job.arm.label}{f' seed {job.seed}' if len(recipe.seeds) > 1 else ''}"
        )
        if finished(job):
            say(f"{title}: done before")
            continue
        say(f"{title} ...")
        codec, steps = load_trained(recipe, job) or train_run(recipe, job, listed, progress)
        say(f"{title}: {measure_and_record(recipe, text, job, codec, steps, progress)}")
    return report(recipe, listed, reports / recipe.name, say)


def check_savable_codecs(recipe: Recipe, listed: list[Run]) -> None:
    """Check that the codecs of a recipe can be saved and loaded again, before one is trained.

    Raises:
        CodecError: one of them would be loaded as another function.
    """
    for job in {job.quality: job for job in listed if not finished(job)}.values():
        check_savable(architecture(recipe, job), partial(architecture, recipe, job))


def architecture(recipe: Recipe, job: Run) -> nn.Module:
    """The codec that a job starts from, whatever its weights."""
    own = recipe.codec.endswith(".safetensors")  # the file is codec and weights
    return load_base_codec(recipe if own else recipe.model_copy(update={"weights": "none"}), job)


def report(
    recipe: Recipe, listed: list[Run], folder: Path, say: Callable[[str], None] = print
) -> Path:
    """Write the report of finished jobs, codecs beside it."""
    records = []
    for job in listed:
        found = collect([job.folder / "record.json"])
        made, file = job.folder / "codec.safetensors", None
        if made.exists() and (job.role in ("pruned", "modulated") or recipe.task == "train"):
            level = "" if job.role == "modulated" else f"-q{job.quality}"
            codec = Path(recipe.codec).stem.replace(":", "-")
            name = f"{codec}{level}-{job.folder.name.rsplit('-', 1)[0]}.safetensors"
            write_atomically(folder / "codecs" / name, partial(shutil.copyfile, made))
            file = f"codecs/{name}"
        for record in found:
            record["file"] = file
            record["recipe"] = (
                recipe.name
            )  # its folder may have been copied from another recipe's, which does the same job
        records += found
    page = write_report(records, folder, crops=recipe.photographs.crops)
    say("")
    say(text_table(records))
    say(f"\nreport: {page}")
    return page


def finished(job: Run) -> bool:
    """Whether a job's result is there, whole, and of the same settings."""
    try:
        content = json.loads((job.folder / "record.json").read_text(encoding="utf-8"))
        return (content[0] if isinstance(content, list) else content).get("key") == job.key
    except (OSError, ValueError, AttributeError, IndexError):
        return False


def load_trained(recipe: Recipe, job: Run) -> tuple[nn.Module, int] | None:
    """The codec of a job and its steps, if it was trained and only measuring it is left."""
    try:
        made = json.loads((job.folder / MADE).read_text(encoding="utf-8"))
        if made["key"] != job.key:
            return None
        return load(
            job.folder / "codec.safetensors", factory=lambda: load_base_codec(recipe, job)
        ), int(made["steps"])
    except (OSError, ValueError, KeyError, TypeError, FileError):
        return None


def train_run(recipe: Recipe, job: Run, listed: list[Run], progress: bool) -> tuple[nn.Module, int]:
    """Train and prune the codec of one job; return it and the steps it was trained for."""
    if recipe.task == "train":
        return train(recipe, job, listed, progress)
    if job.role == "original":
        return load_base_codec(recipe, job), 0
    if job.arm.scratch is not None:
        return from_scratch(recipe, job, listed, progress)
    hardened = job.folder / "hardened.safetensors"
    steps = recipe.sparsify.steps
    if hardened.exists():
        codec = load(hardened, factory=lambda: load_base_codec(recipe, job))
    else:
        codec = load_base_codec(recipe, job)
        attached = attach(codec, job.settings)
        prepare(attached, recipe)
        if attached.done:  # decides at once: what is left spends this phase on fine-tuning
            codec = taught(attached.harden(), teaching(job.settings), load_base_codec(recipe, job))
            _fit(codec, recipe, recipe.sparsify, job, "sparsify", progress)
            codec = untaught(codec)
        else:
            _fit(attached, recipe, recipe.sparsify, job, "sparsify", progress)
            calibrate(attached, recipe)
            codec = attached.harden()
        save(codec, hardened, factory=partial(architecture, recipe, job))
        # What comes next starts from the file, whether the run was interrupted here or not.
        codec = load(hardened, factory=lambda: load_base_codec(recipe, job))
    phase = job.arm.phase or recipe.finetune
    if phase.steps:
        codec = taught(codec, teaching(job.settings), load_base_codec(recipe, job))
        _fit(codec, recipe, phase, job, "finetune", progress)
        codec = untaught(codec)
    calibrate(codec, recipe)
    return codec, steps + phase.steps


def prepare(model: Any, recipe: Recipe) -> None:
    """Let methods look at photographs of the training set before they train."""
    if isinstance(model, Attached):
        model.prepare(calibration_images(recipe.photographs.train))


def calibrate(model: Any, recipe: Recipe) -> None:
    """Let what was learnt on patches settle on whole photographs, of the training set."""
    if isinstance(model, Attached):
        model.calibrate(calibration_images(recipe.photographs.train))


def from_scratch(
    recipe: Recipe, job: Run, listed: list[Run], progress: bool
) -> tuple[nn.Module, int]:
    """Train the architecture that another job ended with, from random weights."""
    like = next(
        other
        for other in listed
        if (other.arm.label, other.quality, other.seed) == (job.arm.scratch, job.quality, job.seed)
    )
    codec = load(like.folder / "codec.safetensors", factory=lambda: load_base_codec(recipe, job))
    entry = {
        "methods": [{"name": "scratch"}],
        "widths": provenance(codec).history[-1].get("widths", {}),
    }
    torch.manual_seed(job.seed)
    reinitialise(codec)
    provenance(codec).history[:] = [entry]
    phase = job.arm.phase or recipe.finetune.model_copy(
        update={"steps": recipe.sparsify.steps + recipe.finetune.steps}
    )
    _fit(codec, recipe, phase, job, "finetune", progress)
    return codec, phase.steps


def train(recipe: Recipe, job: Run, listed: list[Run], progress: bool) -> tuple[nn.Module, int]:
    """Train a codec itself, from its weights or from the quality before."""
    before = next((other for other in listed if other.quality == recipe.before(job.quality)), None)
    codec = load_base_codec(
        recipe if before is None else recipe.model_copy(update={"weights": "none"}), job
    )
    if before is not None:
        record = provenance(codec).copy()
        codec = load(before.folder / "full.safetensors", factory=lambda: codec)
        set_provenance(codec, record)
    phase = recipe.per_quality.get(job.quality, recipe.finetune)
    _fit(codec, recipe, phase, job, "train", progress)
    save(codec, job.folder / "full.safetensors", factory=partial(architecture, recipe, job))
    return codec, phase.steps


def _fit(
    model: nn.Module, recipe: Recipe, phase: Phase, job: Run, name: str, progress: bool
) -> None:
    if phase.steps:
        label = f"q{job.quality} {job.arm.label} {name}"
        # The two phases of pruning see different crops; a recipe's seeds stay apart.
        seed = job.seed if recipe.task == "train" else 2 * job.seed + (name == "finetune")
        settings = recipe.train_settings(phase, job.quality, seed, job.arm)
        settings["lmbda"] = job.lmbda
        if (
            recipe.photographs.validation is not None
            and isinstance(model, Attached)
            and model.widths is not None
        ):
            settings["validation"] = recipe.photographs.validation
        fit(
            model,
            recipe.photographs.train,
            folder=job.folder / name,
            progress=label if progress else False,
            **settings,
        )


def measure_and_record(
    recipe: Recipe, text: str, job: Run, codec: nn.Module, steps: int, progress: bool
) -> str:
    """Evaluate a codec on the test photographs, write its file and its record; return a line about
    it.
    """
    codec = codec.cpu().eval()
    written = save(
        codec,
        job.folder / "codec.safetensors",
        half=recipe.half,
        factory=partial(architecture, recipe, job),
    )
    size = written.stat().st_size
    if job.role == "original" and recipe.task == "prune":
        written.unlink()
    else:
        write_text(job.folder / MADE, json.dumps({"key": job.key, "steps": steps}) + "\n")
        if recipe.half:
            codec = load(
                written, factory=lambda: load_base_codec(recipe, job)
            )  # measure what the file holds
    levels = codec.levels if isinstance(codec, Attached) else None
    rates: list[float | None] = (
        [None]
        if levels is None
        else [i / (job.arm.between + 1) for i in range(levels.top * (job.arm.between + 1) + 1)]
    )
    widths = codec.widths if isinstance(codec, Attached) else None
    points = (
        [{"level": level} for level in rates]
        if widths is None
        else [{"width": width} for width in range(len(widths))]
    )
    records = [
        measure_at(recipe, text, job, codec, steps, size, progress, **point) for point in points
    ]
    several = job.role == "modulated" or widths is not None
    write_text(
        job.folder / "record.json",
        json.dumps([r for r, _ in records] if several else records[0][0], indent=1) + "\n",
    )
    # Optimiser state is of no use any more, and large.
    for name in (
        "sparsify",
        "finetune",
        "train",
    ):
        (job.folder / name / "checkpoint.pt").unlink(missing_ok=True)
    (job.folder / "hardened.safetensors").unlink(missing_ok=True)
    verified = last_change(unwrap(codec), job).get("verified")
    return "; ".join(
        [*(str(evaluation) for _, evaluation in records), *([verified] if verified else [])]
    )


def plan(recipe: Recipe) -> list[str]:
    """Say what a recipe would do, after checking each method against each codec; nothing is trained
    or written.
    """
    check_paths(recipe)
    check_savable_codecs(recipe, plan_runs(recipe, Path("runs")))
    lines = []
    for job in plan_runs(recipe, Path("runs")):
        phase = recipe.per_quality.get(
            job.quality, recipe.finetune
        )  # task: prune has none per quality
        steps = (
            0
            if job.role == "original" and recipe.task == "prune"
            else recipe.sparsify.steps + phase.steps
        )
        if job.arm.phase is not None:
            steps = job.arm.phase.steps + (recipe.sparsify.steps if job.arm.scratch is None else 0)
        line = (
            f"{recipe.codec} q{job.quality} {job.arm.label} seed {job.seed}: {steps} steps, lambda"
            f" {job.lmbda:g}"
        )
        if job.arm.scratch is not None:
            line += f", the architecture of {job.arm.scratch}, from random weights"
        elif job.role in ("pruned", "modulated"):
            attached = attach(load_base_codec(recipe, job), job.settings)
            line += (
                f", {attached.cost.totals().kmac_per_pixel():.2f} kMAC/pixel now,"
                f" {sum(1 for _ in attached.groups.prunable())} channel groups"
            )
        lines.append(line)
    return lines
