"""`nicprune list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def list_names(
    what: Annotated[
        str, typer.Argument(help="codecs, methods or recipes; all of them if not given.")
    ] = "all",
) -> None:
    """List codecs, methods and recipes."""
    from nicprune.codecs.zoo import codec_names, qualities
    from nicprune.common.errors import RecipeError, closest
    from nicprune.experiments.recipe import recipe_names
    from nicprune.methods.contract import METHODS

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
                typer.echo(f"  {name:38} {note}")


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""
