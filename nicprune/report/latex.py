"""The compact table as LaTeX."""

from __future__ import annotations

from tabulate import tabulate

from nicprune.report.aggregate import compact_rows
from nicprune.report.compact_table import ALIGN, cells, footnote, headers, storage_note
from nicprune.report.matching import Records

SIGNS = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "×": r"$\times$",
    "±": r"$\pm$",
}
"""Characters that LaTeX reads as markup, or that its standard fonts lack."""


def latex(records: Records) -> str:
    """Return a tabular for each setup; it needs no package."""
    blocks = []
    for setup, group in compact_rows(records).items():
        body = tabulate(
            [list(map(escape, cells(row))) for row in group],
            list(map(escape, headers())),
            tablefmt="latex_raw",
            disable_numparse=True,
            colalign=ALIGN,
        )
        notes = "".join(
            f"\n\\par\\smallskip\\noindent{{\\footnotesize {escape(note.replace('+-', '±'))}}}\n"
            for note in (footnote(group), *storage_note(group))
        )
        blocks.append(f"% {escape(str(setup))}\n{body}\n{notes}")
    return "\n".join(blocks)


def escape(text: str) -> str:
    """Return the text without markup."""
    return "".join(SIGNS.get(sign, sign) for sign in text)
