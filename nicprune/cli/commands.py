"""The command line: each command a thin call. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.common.errors import NicpruneError

app = typer.Typer(
    help=(
        "Make learned image codecs smaller and faster: prune any CompressAI model, and see what was"
        " won and lost."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Weights = Annotated[str, typer.Option(help="official, none (random), or a file.")]


def _level(given: str) -> float | str:
    try:
        return given if given == "best" else float(given)
    except ValueError:
        raise typer.BadParameter(f"a level is a number, or best (got {given!r})") from None


LEVEL = (
    "With a modulator: rate, from 0 (lowest) on; in between too. With a scalable encoder: how many"
    " of its encoders work beside the first, or best."
)
Level = Annotated[Any, typer.Option(parser=_level, metavar="LEVEL", help=LEVEL)]
Quality = Annotated[
    int | None, typer.Option("--quality", "-q", help="Quality level, for named codecs.")
]
Metric = Annotated[
    str, typer.Option(help="mse or ms-ssim: what official weights were trained for.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Options of every command, before its name."""
    os.environ["NICPRUNE_DEBUG"] = "1" if debug else os.environ.get("NICPRUNE_DEBUG", "")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="codecs, methods, recipes, or nothing for all.")
    ] = "all",
) -> None:
    """List codecs, methods and recipes."""
    from nicprune.codecs.zoo import codec_names, qualities
    from nicprune.common.errors import RecipeError, closest
    from nicprune.experiments.recipe import recipe_names
    from nicprune.methods import METHODS

    sections: dict[str, list[tuple[str, str]]] = {
        "codecs": [
            (name, f"quality {qualities(name).start} to {qualities(name).stop - 1}")
            for name in codec_names()
        ],
        "methods": [(name, METHODS[name].summary) for name in METHODS],
        "recipes": [(name, _first_comment(path)) for name, path in recipe_names().items()],
    }
    if what not in (*sections, "all"):
        raise RecipeError(f"cannot list {what!r}; {closest(what, [*sections, 'all'])}")
    for title, rows in sections.items():
        if what in (title, "all"):
            typer.echo(title)
            for name, note in rows:
                typer.echo(f"  {name:34} {note}")


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


@app.command()
def profile(
    codec: Annotated[str, typer.Argument(help="Name, file, or package.module:factory.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
) -> None:
    """Show a codec's channel groups and what ties them, MACs and params per transform, encoder and
    decoder.
    """
    from nicprune.codecs.anatomy import unwrap
    from nicprune.evaluation.summary import profile_text
    from nicprune.pruning.cost import CostModel
    from nicprune.pruning.surgery import analyse
    from nicprune.storage.checkpoint import load_codec

    model = unwrap(
        load_codec(codec, quality, metric=metric, weights=weights)
    )  # gates, rates or widths on it: the codec below them
    groups = analyse(model)
    typer.echo(profile_text(model, groups, CostModel(model, groups)))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the recipe's own.")
    ] = None,
) -> None:
    """Check a recipe and the paths it names, without running it."""
    from nicprune.experiments.recipe import check_paths, read_recipe

    parsed, _ = read_recipe(recipe, set_ or [])
    check_paths(parsed)
    typer.echo(
        f"{recipe}: fine ({parsed.task} {parsed.codec}, qualities"
        f" {', '.join(map(str, parsed.qualities))})"
    )


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name (see nicprune list recipes).")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, over the recipe's own, e.g. finetune.steps=100."),
    ] = None,
    reports: Annotated[str, typer.Option(help="Folder for reports.")] = "reports",
    runs: Annotated[str, typer.Option(help="Folder for checkpoints and finished parts.")] = "runs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Run a recipe: attach, train, harden, fine-tune, evaluate, report. Parts that are finished are
    skipped.
    """
    from nicprune.experiments.recipe import read_recipe
    from nicprune.experiments.run import plan, run_recipe

    parsed, text = read_recipe(recipe, set_ or [])
    if dry_run:
        for line in plan(parsed):
            typer.echo(line)
        return
    run_recipe(
        parsed,
        text,
        reports=reports,
        runs=runs,
        say=lambda line: print(line, flush=True),
        progress=not quiet,
    )


@app.command()
def prune(
    codec: Annotated[str, typer.Argument(help="Name, file, or package.module:factory.")],
    output: Annotated[Path, typer.Argument(help=".safetensors file to write.")],
    method: Annotated[
        str, typer.Option(help="One that needs no training: magnitude, random, fisher.")
    ] = "magnitude",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="The method's settings, key=value, e.g. budget.macs=0.5 or side=encoder."
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help='Photographs to look at, for fisher: a folder, or "samples".')
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
) -> None:
    """Prune a codec in one shot, without any training, and save what is left."""
    import torch

    from nicprune.codecs.provenance import provenance
    from nicprune.common.config import apply_override
    from nicprune.common.errors import RecipeError
    from nicprune.data.images import calibration_images
    from nicprune.methods import Attached, attach
    from nicprune.pruning.cost import COUNTER, measure
    from nicprune.storage.checkpoint import check_destination, load_codec, save

    check_destination(output)
    settings: dict[str, Any] = {}
    for override in set_ or []:
        apply_override(settings, override)
    torch.manual_seed(0)  # random weights are the same each time
    original = load_codec(codec, quality, metric=metric, weights=weights)
    before = measure(original)
    attached = attach(original, method, **settings)
    if images is not None:
        attached.prepare(calibration_images(images))
    small = attached.harden()
    if isinstance(small, Attached):
        raise RecipeError(
            f"{method} stays on the codec and has to be trained: that is for recipes, or Python"
        )
    after = measure(small)
    for what in ("macs", "encoder", "decoder"):
        was, now = before.kmac_per_pixel(what), after.kmac_per_pixel(what)
        typer.echo(
            f"{'all' if what == 'macs' else what:8} {was:9.2f} to {now:9.2f} kMAC/pixel,"
            f" {was / now:.2f}x fewer ({COUNTER})"
        )
    typer.echo(f"params   {before.params:,} to {after.params:,}; {provenance(small).verified}")
    typer.echo(f"wrote {save(small, output)}")


@app.command("eval")
def eval_(
    codec: Annotated[str, typer.Argument(help="Name, file, or package.module:factory.")],
    images: Annotated[str, typer.Argument(help='Folder of photographs, a file, or "samples".')],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write CompressAI results JSON here.")
    ] = None,
    level: Level = None,
    lmbda: Annotated[
        float | None, typer.Option(help="With a modulator: rate by its lambda.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="With a slimmable codec: which width, 0 being the widest.")
    ] = None,
    per_image: Annotated[bool, typer.Option("--per-image", help="A line for each image.")] = False,
    at: Annotated[
        list[float] | None,
        typer.Option(
            "--at", help="jpeg and webp: PSNR at this rate in bpp, between their settings."
        ),
    ] = None,
) -> None:
    """Write and read real bitstreams of a folder: bpp, PSNR, MS-SSIM, times. "jpeg",
    "jpeg-optimized" and "webp" are swept.
    """
    from nicprune.evaluation.classical import FORMATS, evaluate_classical, psnr_at

    if codec in FORMATS:
        points = evaluate_classical(codec, images)
        for point in points if at is None else []:
            typer.echo(
                f"{codec} quality {point.quality:3}  {point.bpp:.4f} bpp  {point.psnr_db:.3f} dB"
            )
        for rate in at or []:
            psnr = psnr_at(points, rate)
            reach = f"its settings reach {points[0].bpp:.3f} to {points[-1].bpp:.3f} bpp"
            typer.echo(f"{codec} at {rate:g} bpp: {reach if psnr is None else f'{psnr:.3f} dB'}")
        return
    from nicprune.evaluation.evaluate import evaluate, write_results
    from nicprune.storage.checkpoint import load_codec

    result = evaluate(
        load_codec(codec, quality, metric=metric, weights=weights),
        images,
        progress=True,
        level=level,
        lmbda=lmbda,
        width=width,
    )
    if per_image:
        for image in result.images:
            ms = f"{image.ms_ssim:.4f}" if image.ms_ssim is not None else "-"
            typer.echo(
                f"{image.name:32} {image.width}x{image.height}  {image.bpp:.4f} bpp "
                f" {image.psnr_db:.3f} dB  MS-SSIM {ms}"
            )
    typer.echo(str(result))
    if output is not None:
        write_results(result, output)


@app.command("encode")
def encode_(
    codec: Annotated[str, typer.Argument(help="Name, file, or package.module:factory.")],
    image: Annotated[str, typer.Argument(help="Photograph.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    level: Level = None,
    lmbda: Annotated[
        float | None, typer.Option(help="With a modulator: rate by its lambda.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="With a slimmable codec: which width, 0 being the widest.")
    ] = None,
) -> None:
    """Code a photograph into a file that decode reads with the same codec."""
    from nicprune.common.files import write_atomically
    from nicprune.data.images import read_image
    from nicprune.storage.checkpoint import load_codec
    from nicprune.storage.container import encode

    picture = read_image(image)
    data = encode(
        load_codec(codec, quality, metric=metric, weights=weights),
        picture,
        level=level,
        lmbda=lmbda,
        width=width,
    )
    write_atomically(output, lambda temporary: temporary.write_bytes(data))
    _, height, width = picture.shape
    typer.echo(
        f"{output}: {len(data):,} bytes, {8 * len(data) / (height * width):.4f} bpp, header"
        f" included ({width}x{height} pixels)"
    )


@app.command("decode")
def decode_(
    codec: Annotated[
        str,
        typer.Argument(help="Name, file, or package.module:factory: what the file was coded with."),
    ],
    file: Annotated[str, typer.Argument(help="File that encode wrote.")],
    output: Annotated[Path, typer.Argument(help="PNG to write.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
) -> None:
    """Decode what encode wrote into a PNG."""
    from nicprune.common.errors import RecipeError
    from nicprune.data.images import write_png
    from nicprune.storage.checkpoint import load_codec
    from nicprune.storage.container import decode

    if output.suffix.lower() != ".png":
        raise RecipeError(f"decode writes PNG; {output} must end in .png")
    picture = decode(load_codec(codec, quality, metric=metric, weights=weights), file)
    write_png(picture.float() / 255, output)
    typer.echo(f"wrote {output} ({picture.shape[2]}x{picture.shape[1]} pixels)")


@app.command()
def report(
    paths: Annotated[
        list[str], typer.Argument(help="Folders of runs or reports, or record files.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the report.")
    ] = "reports/report",
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    crops: Annotated[
        bool, typer.Option(help="Pieces of the photographs, where the records have them.")
    ] = True,
) -> None:
    """Join finished runs by quality into one report: tables, plots, page."""
    from nicprune.report import collect, text_table, write_report

    records = collect(paths)
    page = write_report(records, output, title=title, crops=crops)
    typer.echo(text_table(records))
    typer.echo(f"\nreport: {page}")


@app.command()
def overview(
    folder: Annotated[
        str,
        typer.Argument(
            help=(
                "Folder of reports, with an overview.yaml that says which of their figures to show."
            )
        ),
    ] = "reports",
) -> None:
    """Put figures of several reports on one screen, beside published ones: README.md in the
    folder.
    """
    from nicprune.report.overview import write_overview

    typer.echo(f"wrote {write_overview(folder)}")


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="A .safetensors file of nicprune's.")],
    output: Annotated[str, typer.Argument(help="File (compressai) or folder (onnx) to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="compressai (.pth.tar for stock tools) or onnx (one file a transform)."
        ),
    ] = "compressai",
) -> None:
    """Write a codec for other tools."""
    from nicprune.common.errors import RecipeError, closest
    from nicprune.storage.checkpoint import load
    from nicprune.storage.export import export_compressai, export_onnx

    if format_ not in ("compressai", "onnx"):
        raise RecipeError(f"unknown format {format_!r}; {closest(format_, ['compressai', 'onnx'])}")
    codec = load(file)
    written: Any = (
        export_compressai(codec, output)
        if format_ == "compressai"
        else export_onnx(codec, output, say=typer.echo)
    )
    for path in written if isinstance(written, list) else [written]:
        typer.echo(f"wrote {path}")


@app.command()
def bench(
    what: Annotated[
        list[str] | None, typer.Argument(help="Parts to measure; all if none is named.")
    ] = None,
) -> None:
    """Measure this machine's ratios: overhead of attaching, time of surgery, speed-up against FLOP
    reduction.
    """
    from nicprune.bench.suite import format_bench, run_bench

    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    typer.echo(format_bench(run_bench(what or None, threads=threads)))


@app.command("time")
def time_(
    codecs: Annotated[
        list[str],
        typer.Argument(
            help=(
                "Names, files, or package.module:factory, as [label=]codec[@width]; others are"
                " compared with the first."
            )
        ),
    ],
    image: Annotated[
        str | None, typer.Option(help="Photograph; by default one that comes with the demo extra.")
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    width: Annotated[
        int | None,
        typer.Option(
            help=(
                "For slimmable codecs without one of their own: which width; for scalable encoders:"
                " which level."
            )
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help=(
                "After which the least disturbed turns have to do, on a machine that is never"
                " quiet."
            ),
        ),
    ] = 60.0,
    layers: Annotated[bool, typer.Option("--layers", help="By layer of the transforms.")] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder to write times.md, times.json and times.png into.")
    ] = None,
) -> None:
    """Show where the time of coding a photograph goes, and what of the FLOP reduction it
    follows.
    """
    from nicprune.common.errors import RecipeError
    from nicprune.evaluation.transform_times import Named, taken_under, time_codecs, times_table
    from nicprune.report.times import write_times
    from nicprune.storage.checkpoint import load_codec

    ready: dict[str, Any] = {}
    named = [Named.read(text) for text in codecs]
    for number, (one, text) in enumerate(zip(named, codecs, strict=True), 1):
        # The same codec may be named twice: against itself it shows what such a ratio is worth on
        # this machine.
        label = (
            f"{one.label} ({number})"
            if [other.label for other in named].count(one.label) > 1
            else one.label
        )
        ready[label] = load_codec(
            one.codec,
            quality,
            metric=metric,
            weights="official" if one.codec.endswith(".safetensors") else weights,
        )
        if getattr(ready[label], "widths", None) is not None:
            ready[label].set_width(width if one.width is None else one.width)
        elif one.width is not None:
            raise RecipeError(f"{text!r}: {one.codec} has no widths or levels")
    times = time_codecs(ready, image, layers=layers, limit=seconds)
    conditions = taken_under(times, Path(image).name if image else "a sample photograph")
    typer.echo(times_table(times, conditions))
    if out is not None:
        asked = shlex.join(["nicprune", *sys.argv[1:]])
        typer.echo(f"\nwrote {write_times(times, out, conditions=conditions, command=asked)}")


def _show_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: errors end in one line, other programs' warnings are kept from the screen."""
    # Both before torch is imported: spinning threads starve whatever else runs, and glibc maps
    # large activations anew each time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from nicprune.common.machine import tune_allocator

    tune_allocator()
    if os.getcwd() not in sys.path:  # codecs of the user's own, as python -m would find them
        sys.path.insert(0, os.getcwd())
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # Pillow's, of images as large as those that reading them refuses in a line of its own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.showwarning = _show_warning
    try:
        app()
    except NicpruneError as error:
        if os.environ.get("NICPRUNE_DEBUG"):
            traceback.print_exc()
        print(f"nicprune: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("nicprune: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if os.environ.get("NICPRUNE_DEBUG"):
            raise
        print(
            f"nicprune: unexpected {type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''} (run with --debug for more)",
            file=sys.stderr,
        )
        sys.exit(2)
