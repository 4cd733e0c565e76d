"""`python -m nicprune`."""

from nicprune.cli.commands import main

main()
