"""The command line: one file for each command or pair of commands. May use everything."""

from nicprune.cli.application import app, main

__all__ = ["app", "main"]
