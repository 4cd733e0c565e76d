"""`nicprune list`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def list_names(
    what: Annotated[
        str, typer.Argument(help="codecs, methods or recipes; all of them if not given.")
    ] = "all",
) -> None:
    """List codecs, methods and recipes."""
    from nicprune.codecs.zoo import codec_names, qualities, width_arguments
    from nicprune.common.errors import RecipeError, closest
    from nicprune.experiments.recipe_files import recipe_names
    from nicprune.methods.contract import METHODS

    sections: dict[str, list[tuple[str, str]]] = {
        "codecs": [
            (name, _qualities(name, qualities(name), width_arguments(name)))
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
                typer.echo(f"  {name:38} {note}")


def _qualities(name: str, levels: range, widths: Sequence[str]) -> str:
    own = f"; at your own widths: {'-'.join([name, *widths])}" if widths else ""
    return f"quality {levels.start} to {levels.stop - 1}{own}"


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""
