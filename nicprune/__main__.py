"""`python -m nicprune`."""

from nicprune.cli.application import main

main()
