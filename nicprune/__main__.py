"""`python -m nicprune`."""

from nicprune.cli import main

main()
