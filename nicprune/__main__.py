"""`python -m nicprune`."""

import sys

# `python -m` looks into the current folder first: a yaml.py that lies there would be imported.
if not sys.flags.safe_path:
    del sys.path[0]

from nicprune.cli.application import main  # noqa: E402

main()
