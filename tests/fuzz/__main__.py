"""`python -m tests.fuzz KIND --inputs N --seed S`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .run import KINDS, fault, faults, fuzz, summary
from .trial import FINE, Trial

sys.path.append(str(Path(__file__).parents[1]))  # the helpers of tests, as pytest finds them


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", nargs="+", choices=KINDS)
    parser.add_argument("--inputs", type=int, default=1000, help="how many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--verbose", action="store_true", help="tell of every input")
    given = parser.parse_args()

    def say(trial: Trial) -> None:
        if given.verbose or trial.verdict not in FINE:
            print(fault(trial), flush=True)

    found = []
    for kind in given.kind:
        trials = fuzz(kind, range(given.first, given.first + given.inputs), given.seed, say)
        print(summary(kind, trials).split("\n")[0], flush=True)
        found += faults(trials)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
