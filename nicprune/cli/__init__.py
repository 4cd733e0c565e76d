"""The command line: each command a thin call. May use everything."""

from nicprune.cli.app import app, main

__all__ = ["app", "main"]
