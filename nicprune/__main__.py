"""`python -m nicprune`."""

from nicprune.cli.app import main

main()
