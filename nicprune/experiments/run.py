"""Running a recipe: attach, train, harden, fine-tune and evaluate for each quality, then report.
Finished runs are skipped.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.example import size_multiple
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.reinitialise import reinitialise
from nicprune.common.errors import FileError
from nicprune.common.files import check_writable, remove_leftovers, write_atomically, write_text
from nicprune.common.lock import locked
from nicprune.data.images import calibration_images
from nicprune.experiments.base_codec import architecture, load_base_codec
from nicprune.experiments.measure import last_change, measure_at
from nicprune.experiments.plan import Run, fit_settings, phases_of, report_name, training_images
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_paths import check_outside_images
from nicprune.experiments.resolve import finished, load_for_check, resolve
from nicprune.experiments.times import latency_of
from nicprune.methods import METHODS
from nicprune.methods.attaching import attach
from nicprune.methods.composition import Attached
from nicprune.methods.points import operating_points
from nicprune.methods.with_teacher import taught, teaching, untaught
from nicprune.report.folder import write_report
from nicprune.report.record_files import collect, record_json
from nicprune.report.terminal import text_table
from nicprune.storage.checkpoint import load, read_contents, save
from nicprune.training.checkpoints import remove_checkpoints
from nicprune.training.loop import fit

CALIBRATED_WITH = 32
"""Training images that methods are calibrated on. The cost of gates differs by 11 to 27 % between
photographs (standard deviation), so that its mean over 8 misses that over all by 4 % and more.
"""

MADE = "made.json"
"""File that marks a run's codec as trained. Without the record beside it, the codec is only
measured again.
"""


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
        recipe: as `read_recipe` returns it.
        text: the recipe as written, for the report.
        reports: folder for reports; this one goes to a sub-folder with the recipe's name.
        runs: folder for checkpoints and results; runs that are finished there are skipped.
        say: called with each line of progress.
        progress: show progress bars.

    Returns:
        The report's index.html.

    Raises:
        NicpruneError: something is missing, or does not fit together; see `resolve`.
        RecipeError: the report would lie among the recipe's images.
    """
    runs, reports = Path(runs), Path(reports)
    listed = resolve(recipe, runs)
    check_outside_images(recipe, reports / recipe.name, "the report", "--reports")
    check_writable(runs / recipe.name)
    check_writable(reports / recipe.name)
    remove_leftovers(reports / recipe.name)
    for number, job in enumerate(listed, 1):
        title = (
            f"[{number}/{len(listed)}] {recipe.codec} q{job.quality}"
            f" {job.arm.label}{f' seed {job.seed}' if len(recipe.seeds) > 1 else ''}"
        )
        if finished(job):
            say(f"{title}: done before")
            continue
        say(f"{title} ...")
        with locked(job.folder):
            codec, steps = load_trained(recipe, job) or train_run(recipe, job, listed, progress)
            summary = measure_and_record(recipe, text, job, codec, steps, progress)
        say(f"{title}: {summary}")
    return report(recipe, listed, reports / recipe.name, say)


def report(
    recipe: Recipe, listed: list[Run], folder: Path, say: Callable[[str], None] = print
) -> Path:
    """Write the report of finished runs, with their codecs beside it; return its index.html."""
    records = []
    for job in listed:
        found = collect([job.folder / "record.json"])
        made, file = job.folder / "codec.safetensors", None
        if made.exists() and (job.role in ("pruned", "modulated") or recipe.task == "train"):
            name = report_name(recipe, job)
            try:
                read_contents(made)  # what is damaged stays where it is
            except FileError as error:
                warnings.warn(f"{error}; the report is without it. {_anew(job)}", stacklevel=2)
            else:
                write_atomically(folder / "codecs" / name, partial(shutil.copyfile, made))
                file = f"codecs/{name}"
        # The folder may have been copied from another recipe's, which does the same job.
        records += [r.model_copy(update={"file": file, "recipe": recipe.name}) for r in found]
    page = write_report(records, folder, crops=recipe.photographs.crops)
    say("")
    say(text_table(records))
    say(f"\nreport: {page}")
    if any(METHODS[name].codes_frames for job in listed for name, _ in job.settings):
        say(
            "Photographs are I frames: what the temporal model is for, P frames, is measured by"
            f" `nicprune eval-video CLIPS --codec {folder / 'codecs'}/...`"
        )
    return page


def _anew(job: Run) -> str:
    return f"To train it again, remove {job.folder} and run the recipe"


def load_of(other: Run, name: str, factory: Callable[[], nn.Module]) -> nn.Module:
    """Return a codec that another run has left, in the file with this name.

    Raises:
        FileError: it is damaged, or gone; says how to make it again.
    """
    try:
        return load(other.folder / name, factory=factory)
    except FileError as error:
        raise FileError(f"{error}. {_anew(other)}") from None


def load_hardened(recipe: Recipe, job: Run) -> nn.Module | None:
    """Return a run's codec as it was after the first phase; None if it has not come so far, or its
    file is damaged, which is then removed.
    """
    path = job.folder / "hardened.safetensors"
    if not path.exists():
        return None
    try:
        return load(path, factory=lambda: load_base_codec(recipe, job))
    except FileError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=2)
        path.unlink()
        return None


def load_trained(recipe: Recipe, job: Run) -> tuple[nn.Module, int] | None:
    """Return a run's codec and its number of steps if the codec is trained and not yet measured;
    else None.
    """
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
    """Train and prune the codec of one run; return it and the number of its training steps."""
    if recipe.task == "train":
        return train(recipe, job, listed, progress)
    if job.role == "original":
        return load_base_codec(recipe, job), 0
    if job.arm.scratch is not None:
        return from_scratch(recipe, job, listed, progress)
    phases = phases_of(recipe, job)
    codec = load_hardened(recipe, job)
    if codec is None:
        codec = load_base_codec(recipe, job)
        attached = attach(codec, job.settings, latency=latency_of(recipe, job, codec, keep=True))
        prepare(attached, recipe, job)
        if attached.done:  # one-shot methods: the pruned codec is fine-tuned in this phase
            codec = taught(attached.harden(), teaching(job.settings), load_base_codec(recipe, job))
            _fit(codec, recipe, job, "sparsify", progress)
            codec = untaught(codec)
        else:
            _fit(attached, recipe, job, "sparsify", progress)
            calibrate(attached, recipe, job)
            codec = attached.harden()
        hardened = save(
            codec,
            job.folder / "hardened.safetensors",
            factory=partial(architecture, recipe, job),
        )
        # Continue from the file, so that an interrupted run gives the same result.
        codec = load(hardened, factory=lambda: load_base_codec(recipe, job))
    if phases["finetune"].steps:
        codec = taught(codec, teaching(job.settings), load_base_codec(recipe, job))
        _fit(codec, recipe, job, "finetune", progress)
        codec = untaught(codec)
    calibrate(codec, recipe, job)
    return codec, _steps(recipe, job)


def prepare(model: Any, recipe: Recipe, job: Run) -> None:
    """Let methods collect what they need from training images before training."""
    if isinstance(model, Attached):
        model.set_objective(job.lmbda, recipe.metric)
        model.prepare(_whole_images(model, recipe, job))


def calibrate(model: Any, recipe: Recipe, job: Run) -> None:
    """Let methods that were trained on patches calibrate themselves on whole training images."""
    if isinstance(model, Attached):
        model.calibrate(_whole_images(model, recipe, job, CALIBRATED_WITH))


def _whole_images(model: Attached, recipe: Recipe, job: Run, count: int = 8) -> list[Tensor]:
    multiple = size_multiple(model.codec)
    return calibration_images(training_images(recipe, job), count, multiple=multiple)


def from_scratch(
    recipe: Recipe, job: Run, listed: list[Run], progress: bool
) -> tuple[nn.Module, int]:
    """Train the architecture of another run's codec from random weights."""
    like = next(
        other
        for other in listed
        if (other.arm.label, other.quality, other.seed) == (job.arm.scratch, job.quality, job.seed)
    )
    codec = load_of(like, "codec.safetensors", lambda: load_base_codec(recipe, job))
    entry = {
        "methods": [{"name": "scratch"}],
        "widths": provenance(codec).history[-1].get("widths", {}),
    }
    torch.manual_seed(job.seed)
    reinitialise(codec)
    provenance(codec).history[:] = [entry]
    _fit(codec, recipe, job, "finetune", progress)
    return codec, _steps(recipe, job)


def train(recipe: Recipe, job: Run, listed: list[Run], progress: bool) -> tuple[nn.Module, int]:
    """Train the codec itself, from its own weights or from those of the quality before it."""
    before = next((other for other in listed if other.quality == recipe.before(job.quality)), None)
    codec = load_base_codec(
        recipe if before is None else recipe.model_copy(update={"weights": "none"}), job
    )
    if before is not None:
        record = provenance(codec).copy()
        codec = load_of(before, "full.safetensors", lambda: codec)
        set_provenance(codec, record)
    _fit(codec, recipe, job, "train", progress)
    save(codec, job.folder / "full.safetensors", factory=partial(architecture, recipe, job))
    return codec, _steps(recipe, job)


def _steps(recipe: Recipe, job: Run) -> int:
    return sum(phase.steps for phase in phases_of(recipe, job).values())


def _fit(model: nn.Module, recipe: Recipe, job: Run, name: str, progress: bool) -> None:
    if phases_of(recipe, job)[name].steps:
        label = f"q{job.quality} {job.arm.label} {name}"
        settings = fit_settings(recipe, job, name)
        if isinstance(model, Attached) and model.own_lambdas:
            del settings["lmbda"]
        if isinstance(model, Attached) and model.scheduled:
            settings["validation"] = recipe.photographs.validation
        if isinstance(model, Attached) and model.replay:
            settings["replay"] = recipe.photographs.replay
        fit(
            model,
            training_images(recipe, job),
            folder=job.folder / name,
            progress=label if progress else False,
            **settings,
        )


def measure_and_record(
    recipe: Recipe, text: str, job: Run, codec: nn.Module, steps: int, progress: bool
) -> str:
    """Evaluate a codec on the test images, write its file and its record; return a summary."""
    codec = codec.cpu().eval()
    written = save(
        codec,
        job.folder / "codec.safetensors",
        half=recipe.half,
        factory=partial(architecture, recipe, job),
    )
    size = written.stat().st_size
    if recipe.half:
        # Measure the weights as the file holds them; the original's too, for the sake of others.
        codec = load(written, factory=lambda: load_base_codec(recipe, job))
    if job.role == "original" and recipe.task == "prune":
        written.unlink()
    else:
        write_text(job.folder / MADE, json.dumps({"key": job.key, "steps": steps}) + "\n")
    # The source domain of an adapted codec is the original: it is measured on the source's images.
    points = [
        point
        for point in operating_points(codec, job.arm.between)
        if not isinstance(codec, Attached) or codec.bare_at(point) is None
    ]
    measured = [
        measure_at(recipe, text, job, codec, steps, size, progress, point) for point in points
    ]
    records = [record for record, _ in measured]
    several = job.role == "modulated" or len(points) > 1
    write_text(
        job.folder / "record.json",
        record_json(records if several else records[0]),
    )
    # The optimiser state is large and no longer needed.
    for name in ("sparsify", "finetune", "train"):
        remove_checkpoints(job.folder / name)
    (job.folder / "hardened.safetensors").unlink(missing_ok=True)
    verified = last_change(unwrap(codec), job).get("verified")
    return "; ".join(
        [*(str(evaluation) for _, evaluation in measured), *([verified] if verified else [])]
    )


def plan(
    recipe: Recipe, *, reports: str | Path = "reports", runs: str | Path = "runs"
) -> list[str]:
    """Return a line for each run of a recipe, after checking every method on every codec, and
    that neither folder lies among the images.

    Nothing is trained or written.
    """
    lines, listed = [], resolve(recipe, Path(runs))
    check_outside_images(recipe, Path(reports) / recipe.name, "the report", "--reports")
    for job in listed:
        line = (
            f"{recipe.codec} q{job.quality} {job.arm.label} seed {job.seed}:"
            f" {_steps(recipe, job)} steps, lambda {job.lmbda:g}"
        )
        if job.arm.scratch is not None:
            line += f", the architecture of {job.arm.scratch}, from random weights"
        elif job.role in ("pruned", "modulated"):
            codec = load_for_check(recipe, job)
            attached = attach(codec, job.settings, latency=latency_of(recipe, job, codec))
            line += (
                f", {attached.cost.totals().kmac_per_pixel():.2f} kMAC/pixel now,"
                f" {sum(1 for _ in attached.groups.prunable())} channel groups"
            )
        lines.append(line)
    return lines
