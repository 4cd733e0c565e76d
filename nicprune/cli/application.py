"""The application: the table of commands, the options before a command's name, and the entry point
that turns errors into one line.

Command modules import torch and the rest of nicprune inside their functions, so that
`nicprune --help` starts without them.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from nicprune import __version__
from nicprune.cli.bench import bench
from nicprune.cli.coding import decode_file, encode_image
from nicprune.cli.evaluate import evaluate_codec
from nicprune.cli.evaluate_video import evaluate_clips
from nicprune.cli.export import export
from nicprune.cli.listing import list_names
from nicprune.cli.profile import profile
from nicprune.cli.prune import prune_codec
from nicprune.cli.recipes import check, run
from nicprune.cli.reports import overview, report
from nicprune.cli.timing import time_coding
from nicprune.cli.verify import verify_files
from nicprune.common.errors import InterruptedRun, NicpruneError

COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_names,
    "profile": profile,
    "check": check,
    "run": run,
    "prune": prune_codec,
    "eval": evaluate_codec,
    "eval-video": evaluate_clips,
    "encode": encode_image,
    "decode": decode_file,
    "verify": verify_files,
    "report": report,
    "overview": overview,
    "export": export,
    "bench": bench,
    "time": time_coding,
}
"""Every command by name, in the order of `nicprune --help`."""

app = typer.Typer(
    help=(
        "Make learned image codecs smaller and faster: prune any CompressAI model and measure FLOP"
        " reduction and PSNR drop."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nicprune {__version__}")
        raise typer.Exit


@app.callback()
def _set_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Apply the options that stand before a command's name."""
    os.environ["NICPRUNE_DEBUG"] = "1" if debug else os.environ.get("NICPRUNE_DEBUG", "")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _show_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; exit with 1 after an error of nicprune, with 130 after
    Ctrl-C and 143 after SIGTERM, with 2 after any other error.

    Every error is printed as one line on stderr. With `--debug` its traceback is shown too.
    """
    # Both must happen before torch is imported. Spinning OpenMP threads slow down every other
    # process, and glibc would map each large activation anew.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from nicprune.common.machine import tune_allocator

    tune_allocator()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # Pillow's, for images as large as those that reading them refuses in a line of its own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.showwarning = _show_warning
    try:
        app()
    except NicpruneError as error:
        if os.environ.get("NICPRUNE_DEBUG"):
            import traceback

            traceback.print_exc()
        print(f"nicprune: {error}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, InterruptedRun) else 1)
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
            f" {str(error).splitlines()[0] if str(error) else ''} (--debug shows the traceback)",
            file=sys.stderr,
        )
        sys.exit(2)
