"""The command line: each command a thin call. May use everything."""

from nicprune.cli.commands import app, main

__all__ = ["app", "main"]
