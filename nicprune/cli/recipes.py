"""`nicprune check` and `nicprune run`."""

from __future__ import annotations

from typing import Annotated

import typer

from nicprune.cli.options import MaxPixels, NoImport, Overrides

Recipe = Annotated[str, typer.Argument(help="Recipe file or name (see nicprune list recipes).")]


def check(
    recipe: Recipe,
    set_: Overrides = None,
    no_import: NoImport = False,
    max_pixels: MaxPixels = None,
) -> None:
    """Check a recipe and all that it needs, without training.

    A codec that it names as package.module:factory is imported and built, which runs code.
    """
    from pathlib import Path

    from nicprune.experiments.recipe_files import read_recipe
    from nicprune.experiments.resolve import resolve

    parsed, _ = read_recipe(recipe, set_ or [], imports=not no_import)
    resolve(parsed, Path("runs"))
    runs = f"; it runs the code of {parsed.codec}" if parsed.imports else ""
    typer.echo(
        f"{recipe}: fine ({parsed.task} {parsed.codec}, qualities"
        f" {', '.join(map(str, parsed.qualities))}){runs}"
    )


def run(
    recipe: Recipe,
    set_: Overrides = None,
    reports: Annotated[str, typer.Option(help="Folder for reports.")] = "reports",
    runs: Annotated[str, typer.Option(help="Folder for checkpoints and finished runs.")] = "runs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the planned runs.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
    no_import: NoImport = False,
    max_pixels: MaxPixels = None,
) -> None:
    """Run a recipe and write its report.

    For each quality: attach, train, harden, fine-tune, evaluate. Finished runs are skipped.
    """
    from nicprune.experiments.recipe_files import read_recipe
    from nicprune.experiments.run import plan, run_recipe

    parsed, text = read_recipe(recipe, set_ or [], imports=not no_import)
    if dry_run:
        for line in plan(parsed, reports=reports, runs=runs):
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
