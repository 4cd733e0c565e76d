"""A recipe from start to finish: attach, train, harden, fine-tune, evaluate, report, for each quality. Skips what is done."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nicprune.channels import Groups
from nicprune.checkpoint import embedded_file, load, load_codec, save
from nicprune.codecs import DEMO, provenance, set_provenance, unwrap
from nicprune.cost import COUNTER, CostModel
from nicprune.data import calibration_images, list_images, usable_images, write_png
from nicprune.errors import FileError
from nicprune.evaluation import Evaluation, ImageScore, evaluate
from nicprune.files import check_writable, write_atomically, write_text
from nicprune.memory import peak_bytes
from nicprune.methods import METHODS, Attached, attach
from nicprune.recipe import Arm, Part, Phase, Recipe, check_paths, digest, slug_of
from nicprune.report import collect, text_table, write_report
from nicprune.runtime import machine_line, versions
from nicprune.skipping import set_skipping
from nicprune.training import fit

MADE = "made.json"
"""Says that a job's codec is trained; without the record beside it, it is only measured again."""

CROP = (192, 192)
CROPPED_IMAGES = 3
TIMED_IMAGES = 6


@dataclass(frozen=True)
class Job:
    """One codec to be made and measured."""

    quality: int
    seed: int
    role: str
    arm: Arm
    folder: Path
    key: str

    @property
    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """What to attach; a method that draws lots draws them from the job's seed."""
        seeded = [("seed" in METHODS[part.name].Config.model_fields, part) for part in self.arm.stack]
        return [(part.name, {**({"seed": self.seed} if draws else {}), **part.settings}) for draws, part in seeded]


def _bare(label: str) -> Arm:
    return Arm(label=label, stack=[Part(name="none")])


def jobs(recipe: Recipe, runs: Path) -> list[Job]:
    """List what a recipe does, in order; the folder of each is its own, named by what it depends on."""
    listed = []
    photographs = [[split, path.name, path.stat().st_size] for split in ("train", "test") for path in list_images(getattr(recipe.photographs, split), split)]
    before = ""  # in a chain, a quality depends on the one it starts from
    for quality in recipe.qualities:
        arms = [("original", recipe.seeds[0], _bare("original"))]
        if recipe.task == "prune":
            for seed in recipe.seeds:
                if recipe.control:
                    arms.append(("control", seed, _bare("control")))
                # One codec for all rates starts from that of the highest.
                arms += [("modulated" if arm.modulated else "pruned", seed, arm) for arm in recipe.methods if quality == recipe.top or not arm.modulated]
        for role, seed, arm in arms:
            told = arm.model_dump(exclude=None if arm.lmbda else {"lmbda"})
            key = digest(
                recipe.task, recipe.codec, recipe.metric, recipe.weights_for(quality), quality, recipe.lmbda(quality), role, told, seed,
                photographs, file_digests(recipe, quality), recipe.training, recipe.half, before,
                [] if role == "original" and recipe.task == "prune" else [recipe.sparsify, recipe.finetune, recipe.per_quality.get(quality)],
                [recipe.lambdas, recipe.qualities] if role == "modulated" else [],
            )  # fmt: skip
            before = key if recipe.chain else ""
            slug = slug_of(arm.label)
            folder = runs / recipe.name / f"q{quality}" / f"{slug}{f'-s{seed}' if len(recipe.seeds) > 1 else ''}-{key[:8]}"
            listed.append(Job(quality, seed, role, arm, folder, key))
    return listed


def file_digests(recipe: Recipe, quality: int) -> list[str]:
    """Hashes of the weights that a quality starts from: the same path may hold another file by the next run."""
    named = [recipe.codec] if recipe.codec.endswith(".safetensors") else []
    named += [recipe.weights_for(quality)] if recipe.weights not in ("official", "none") else []
    if recipe.codec == DEMO and recipe.weights == "official":
        named.append(str(embedded_file(quality)))
    return [hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).exists() else "" for name in named]


def run_recipe(
    recipe: Recipe, text: str = "", *, reports: str | Path = "reports", runs: str | Path = "runs", say: Callable[[str], None] = print, progress: bool = True
) -> Path:
    """Run a recipe and write its report.

    Args:
        text: the recipe as written, for the report.
        reports: the report goes to a folder below, named after the recipe.
        runs: checkpoints and results of each part go below; parts that are finished there are not done again.
        say: where lines of progress go.

    Returns: the report's index.html.
    """
    check_paths(recipe)
    runs, reports = Path(runs), Path(reports)
    check_writable(runs / recipe.name, reports / recipe.name)
    listed = jobs(recipe, runs)
    for number, job in enumerate(listed, 1):
        title = f"[{number}/{len(listed)}] {recipe.codec} q{job.quality} {job.arm.label}{f' seed {job.seed}' if len(recipe.seeds) > 1 else ''}"
        if finished(job):
            say(f"{title}: done before")
            continue
        say(f"{title} ...")
        codec, steps = made_before(recipe, job) or make(recipe, job, listed, progress)
        say(f"{title}: {measure_and_record(recipe, text, job, codec, steps, progress)}")
    return report(recipe, listed, reports / recipe.name, say)


def report(recipe: Recipe, listed: list[Job], folder: Path, say: Callable[[str], None] = print) -> Path:
    """Write the report of finished jobs, codecs beside it."""
    records = []
    for job in listed:
        found = collect([job.folder / "record.json"])
        made, file = job.folder / "codec.safetensors", None
        if made.exists() and (job.role in ("pruned", "modulated") or recipe.task == "train"):
            level = "" if job.role == "modulated" else f"-q{job.quality}"
            name = f"{Path(recipe.codec).stem.replace(':', '-')}{level}-{job.folder.name.rsplit('-', 1)[0]}.safetensors"
            write_atomically(folder / "codecs" / name, partial(shutil.copyfile, made))
            file = f"codecs/{name}"
        for record in found:
            record["file"] = file
        records += found
    page = write_report(records, folder)
    say("")
    say(text_table(records))
    say(f"\nreport: {page}")
    return page


def finished(job: Job) -> bool:
    """Whether a job's result is there, whole, and of the same settings."""
    try:
        content = json.loads((job.folder / "record.json").read_text(encoding="utf-8"))
        return (content[0] if isinstance(content, list) else content).get("key") == job.key
    except (OSError, ValueError, AttributeError, IndexError):
        return False


def made_before(recipe: Recipe, job: Job) -> tuple[nn.Module, int] | None:
    """The codec of a job and its steps, if it was trained and only measuring it is left."""
    try:
        made = json.loads((job.folder / MADE).read_text(encoding="utf-8"))
        if made["key"] != job.key:
            return None
        return load(job.folder / "codec.safetensors", factory=lambda: start(recipe, job)), int(made["steps"])
    except (OSError, ValueError, KeyError, TypeError, FileError):
        return None


def make(recipe: Recipe, job: Job, listed: list[Job], progress: bool) -> tuple[nn.Module, int]:
    """Train and prune the codec of one job; return it and the steps it was trained for."""
    if recipe.task == "train":
        return train(recipe, job, listed, progress)
    if job.role == "original":
        return start(recipe, job), 0
    hardened = job.folder / "hardened.safetensors"
    steps = recipe.sparsify.steps
    if hardened.exists():
        codec = load(hardened, factory=lambda: start(recipe, job))
    else:
        codec = start(recipe, job)
        attached = attach(codec, job.settings)
        prepare(attached, recipe)
        if attached.done:  # decides at once: what is left spends this phase on fine-tuning
            codec = attached.harden()
            _fit(codec, recipe, recipe.sparsify, job, "sparsify", progress)
        else:
            _fit(attached, recipe, recipe.sparsify, job, "sparsify", progress)
            calibrate(attached, recipe)
            codec = attached.harden()
        save(codec, hardened)
        # What comes next starts from the file, whether the run was interrupted here or not.
        codec = load(hardened, factory=lambda: start(recipe, job))
    _fit(codec, recipe, recipe.finetune, job, "finetune", progress)
    calibrate(codec, recipe)
    return codec, steps + recipe.finetune.steps


def prepare(model: Any, recipe: Recipe) -> None:
    """Let methods look at photographs of the training set before they train."""
    if isinstance(model, Attached):
        model.prepare(calibration_images(recipe.photographs.train))


def calibrate(model: Any, recipe: Recipe) -> None:
    """Let what was learnt on patches settle on whole photographs, of the training set."""
    if isinstance(model, Attached):
        images = calibration_images(recipe.photographs.train)
        device = next(model.parameters()).device
        model.calibrate([image.to(device) for image in images])


def start(recipe: Recipe, job: Job) -> nn.Module:
    """The codec that a job starts from, with weights drawn from the job's seed if they are random."""
    torch.manual_seed(job.seed)
    return load_codec(recipe.codec, job.quality, metric=recipe.metric, weights=recipe.weights_for(job.quality))


def train(recipe: Recipe, job: Job, listed: list[Job], progress: bool) -> tuple[nn.Module, int]:
    """Train a codec itself, from its weights or from the quality before."""
    before = listed.index(job) - 1
    codec = start(recipe, job)
    if recipe.chain and before >= 0:
        record = provenance(codec).copy()
        codec = load(listed[before].folder / "full.safetensors", factory=lambda: codec)
        set_provenance(codec, record)
    phase = recipe.per_quality.get(job.quality, recipe.finetune)
    _fit(codec, recipe, phase, job, "train", progress)
    save(codec, job.folder / "full.safetensors")
    return codec, phase.steps


def _fit(model: nn.Module, recipe: Recipe, phase: Phase, job: Job, name: str, progress: bool) -> None:
    if phase.steps:
        label = f"q{job.quality} {job.arm.label} {name}"
        # The two phases of pruning see different crops; a recipe's seeds stay apart.
        seed = job.seed if recipe.task == "train" else 2 * job.seed + (name == "finetune")
        settings = recipe.train_settings(phase, job.quality, seed)
        if job.arm.lmbda is not None:
            settings["lmbda"] = job.arm.lmbda
        if recipe.photographs.validation is not None and isinstance(model, Attached) and model.widths is not None:
            settings["validation"] = recipe.photographs.validation
        fit(model, recipe.photographs.train, folder=job.folder / name, progress=label if progress else False, **settings)


def measure_and_record(recipe: Recipe, text: str, job: Job, codec: nn.Module, steps: int, progress: bool) -> str:
    """Evaluate a codec on the test photographs, write its file and its record; return a line about it."""
    codec = codec.cpu().eval()
    written = save(codec, job.folder / "codec.safetensors", half=recipe.half)
    size = written.stat().st_size
    if job.role == "original" and recipe.task == "prune":
        written.unlink()
    else:
        write_text(job.folder / MADE, json.dumps({"key": job.key, "steps": steps}) + "\n")
        if recipe.half:
            codec = load(written, factory=lambda: start(recipe, job))  # measure what the file holds
    levels = codec.levels if isinstance(codec, Attached) else None
    rates: list[float | None] = [None] if levels is None else [i / (job.arm.between + 1) for i in range(levels.top * (job.arm.between + 1) + 1)]
    widths = codec.widths if isinstance(codec, Attached) else None
    points = [{"level": level} for level in rates] if widths is None else [{"width": width} for width in range(len(widths))]
    records = [measure_at(recipe, text, job, codec, steps, size, progress, **point) for point in points]
    write_text(job.folder / "record.json", json.dumps([r for r, _ in records] if job.role == "modulated" else records[0][0], indent=1) + "\n")
    for name in ("sparsify", "finetune", "train"):  # optimiser state is of no use any more, and large
        (job.folder / name / "checkpoint.pt").unlink(missing_ok=True)
    (job.folder / "hardened.safetensors").unlink(missing_ok=True)
    verified = _last(unwrap(codec), job).get("verified")
    return "; ".join([*(str(evaluation) for _, evaluation in records), *([verified] if verified else [])])


def _last(codec: nn.Module, job: Job) -> dict[str, Any]:
    """What was done to the codec last, if it was done here."""
    history = provenance(codec).history
    return history[-1] if history and job.role in ("pruned", "modulated") else {}


def measure_at(
    recipe: Recipe, text: str, job: Job, codec: nn.Module, steps: int, size: int, progress: bool, level: float | None = None, width: int | None = None
) -> tuple[dict[str, Any], Evaluation]:
    """Evaluate a codec at one rate or width; return its record and the evaluation."""
    crops: list[dict[str, Any]] = []

    def keep(name: str, original: Tensor, decoded: Tensor, score: ImageScore) -> None:
        if len(crops) < CROPPED_IMAGES and quality is not None:
            crops.append(save_crops(job.folder / place, len(crops), name, original, decoded, score, job.folder))

    place = f"level-{level:g}" if level is not None else f"width-{width}" if width is not None else ""
    lmbda, slim = job.arm.lmbda or recipe.lmbda(job.quality), None
    quality: int | None = job.quality
    if level is not None and isinstance(codec, Attached) and codec.levels is not None:
        lmbda = float(codec.levels.lmbda(torch.tensor(level)))
        quality = next((q for q in recipe.qualities if abs(recipe.lmbda(q) / lmbda - 1) < 1e-5), None)
    cost = CostModel(unwrap(codec), Groups([]))
    by_transform = cost.by_transform()
    if width is not None and isinstance(codec, Attached):
        codec.set_width(width)
        slim = cast("Any", codec.methods[0])
        by_transform, lmbda = slim.by_transform(), float(slim.schedule.lambdas[width]) or lmbda
    evaluation = evaluate(codec, recipe.photographs.test, progress=progress, keep_decoded=keep, cost=cost.totals(), level=level, width=width)
    dynamic, peaks = evaluation.dynamic(), peak_memory(codec, level, width)
    skipping = time_skipping(codec, recipe, level) if dynamic and quality is not None else {}
    record = {
        "format": "nicprune-record", "version": 1, "key": job.key,
        "codec": recipe.codec, "quality": quality, "metric": recipe.metric, "lmbda": lmbda, "level": level, "width": width,
        "schedule": slim.schedule.history() if slim is not None and width == 0 else [],
        "method": job.arm.name, "label": job.arm.label, "role": job.role, "seed": job.seed, "steps": steps, "settings": dict(job.settings),
        "cost": evaluation.cost.as_dict(), "original_cost": evaluation.original_cost.as_dict(), "dynamic": dynamic, "skipping": skipping,
        "encode_peak_bytes": peaks[0], "decode_peak_bytes": peaks[1],
        "by_transform": {t: (round(dynamic[t][0]) if t in dynamic else macs, params) for t, (macs, params) in by_transform.items()},
        "widths": _last(unwrap(codec), job).get("widths", {}), **evaluation.means(), "images": [asdict(image) for image in evaluation.images],
        "test": test_name(recipe), "crops": crops, "file": "codec.safetensors", "file_bytes": size,
        "recipe": recipe.name, "recipe_sha256": digest(recipe.model_dump(mode="json")), "recipe_text": text,
        "counter": COUNTER, "threads": evaluation.threads, "device": evaluation.device, "versions": versions(),
        "machine": machine_line(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    return record, evaluation


def peak_memory(codec: Any, level: float | None, width: int | None) -> tuple[int, int]:
    """Bytes of tensors alive at once, at the most, to encode and to decode a 768x512 image."""
    point = {name: value for name, value in (("level", level), ("width", width)) if value is not None}
    codec.update(force=True)
    image, sent = torch.rand(1, 3, 512, 768, generator=torch.Generator().manual_seed(0)), {}
    encoding = peak_bytes(lambda: sent.update(codec.compress(image, **point)))
    return encoding, peak_bytes(lambda: codec.decompress(sent["strings"], sent["shape"]))


def test_name(recipe: Recipe) -> str:
    """What the test photographs are called: a folder's path, or several names."""
    given = recipe.photographs.test
    return given if isinstance(given, str) else " + ".join(Path(one).name for one in given)


def time_skipping(codec: nn.Module, recipe: Recipe, level: float | None) -> dict[str, Any]:
    """Seconds for some images with closed channels left out, and with them multiplied by zero: [with, without] for both sides."""
    paths = [str(path) for path in usable_images(list_images(recipe.photographs.test, "test"))[:TIMED_IMAGES]]
    found: dict[str, Any] = {"images": len(paths), "encode_s": [], "decode_s": []}
    try:
        for skips in (True, False):
            set_skipping(unwrap(codec), skips)
            means = evaluate(codec, paths, level=level).means()
            found["encode_s"].append(means["encode_s"])
            found["decode_s"].append(means["decode_s"])
    finally:
        set_skipping(unwrap(codec), True)
    return found


def save_crops(folder: Path, number: int, name: str, original: Tensor, decoded: Tensor, score: ImageScore, base: Path) -> dict[str, Any]:
    """Write the most detailed window of an image, original and decoded, as PNG; return what a record says of them, paths from `base`."""
    top, left, height, width = detailed_window(original)
    paths = {}
    for what, image in (("original", original), ("decoded", decoded)):
        path = folder / "crops" / f"{number}-{Path(name).stem}-{what}.png"
        write_png(image[:, top : top + height, left : left + width], path)
        paths[what] = str(path.relative_to(base))
    return {"image": name, **paths, "bpp": score.bpp, "psnr_db": score.psnr_db}


def detailed_window(image: Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window with the most gradient energy, on a grid of half windows."""
    height, width = min(CROP[0], image.shape[1]), min(CROP[1], image.shape[2])
    grey = image.mean(0)
    energy = torch.zeros_like(grey)
    energy[:-1, :-1] = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (grey[:-1, 1:] - grey[:-1, :-1]).abs()
    best = (-1.0, 0, 0)
    for top in range(0, image.shape[1] - height + 1, max(height // 2, 1)):
        for left in range(0, image.shape[2] - width + 1, max(width // 2, 1)):
            best = max(best, (float(energy[top : top + height, left : left + width].sum()), -top, -left))
    return -best[1], -best[2], height, width


def plan(recipe: Recipe) -> list[str]:
    """Say what a recipe would do, after checking each method against each codec; nothing is trained or written."""
    check_paths(recipe)
    lines = []
    for job in jobs(recipe, Path("runs")):
        phase = recipe.per_quality.get(job.quality, recipe.finetune)  # task: prune has none per quality
        steps = 0 if job.role == "original" and recipe.task == "prune" else recipe.sparsify.steps + phase.steps
        line = f"{recipe.codec} q{job.quality} {job.arm.label} seed {job.seed}: {steps} steps, lambda {job.arm.lmbda or recipe.lmbda(job.quality):g}"
        if job.role in ("pruned", "modulated"):
            attached = attach(start(recipe, job), job.settings)
            line += f", {attached.cost.totals().kmac_per_pixel():.2f} kMAC/pixel now, {sum(1 for _ in attached.groups.prunable())} channel groups"
        lines.append(line)
    return lines

