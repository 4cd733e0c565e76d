"""Another process, for what one process writes and another reads, and for what may end a process.

It is forked from a server that has imported torch, CompressAI and nicprune and computed nothing, so
that it starts at once: a new interpreter takes seconds for these imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTED = ["nicprune.experiments.run", "nicprune.storage.container", "nicprune.cli.application"]


@dataclass(frozen=True)
class Done:
    """A process that has ended, as `subprocess.run` tells of it."""

    returncode: int
    stdout: str
    stderr: str


def fork_server() -> Any:
    """Return the context in which processes are forked."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start(script: str, *arguments: str, out: str = os.devnull, err: str = os.devnull) -> Any:
    """Start a process that runs a script with these arguments; return it.

    Args:
        out, err: files that its output and its errors are written to.
    """
    path = [str(Path(__file__).parent), *sys.path]
    process = fork_server().Process(target=_run, args=(script, arguments, path, out, err))
    process.start()
    return process


def run(script: str, *arguments: str) -> Done:
    """Run a script in another process, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        process = start(script, *arguments, out=out, err=err)
        process.join()
        texts = [Path(file).read_text() if os.path.exists(file) else "" for file in (out, err)]
        return Done(process.exitcode, *texts)


def _run(script: str, arguments: tuple[str, ...], path: list[str], out: str, err: str) -> None:
    import torch

    for file, descriptor in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    sys.argv, sys.path = ["script", *arguments], path
    torch.set_num_threads(1)
    try:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
