"""`nicprune bench`."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def bench(
    what: Annotated[
        list[str] | None, typer.Argument(help="Parts to measure; all of them if not given.")
    ] = None,
) -> None:
    """Measure ratios on this machine.

    Among them: overhead of attaching, time of surgery, speed-up against FLOP reduction.
    """
    from nicprune.bench.suite import format_bench, run_bench

    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    typer.echo(format_bench(run_bench(what or None, threads=threads)))
