"""What tests rest on: processes that end badly are seen to, and an analysis is only kept for a
codec that is the same in everything.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import daily
import elsewhere
import pytest
import torch
from analysed_once import contents, once
from helpers import built
from torch import nn


def test_another_process_tells_how_it_ended() -> None:
    done = elsewhere.run("import sys; print(sys.argv[1:], __name__)", "a", "b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['a', 'b'] __main__\n", "")
    done = elsewhere.run("import os; print(os.getpid(), flush=True); raise ValueError('odd')")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: odd\n")
    assert int(done.stdout) != os.getpid()
    assert elsewhere.run("import os; os.abort()").returncode < 0
    assert elsewhere.run("raise SystemExit(3)").returncode == 3


def test_an_analysis_is_kept_for_the_same_codec_alone() -> None:
    seen: list[Any] = []
    find = once(lambda codec, *rest: seen.append(codec) or len(seen))
    codec = built("bmshj2018-hyperprior")[0]
    assert [find(codec), find(built("bmshj2018-hyperprior")[0])] == [1, 1]
    assert find(codec, "adapt") == 2, "another question"
    with torch.no_grad():
        codec.g_a[0].bias[0] += 1e-6  # type: ignore[union-attr]
    assert find(codec) == 3, "a weight"
    codec.g_a[0].stride = (1, 1)  # type: ignore[union-attr]
    assert find(codec) == 4, "a setting"
    codec.train()
    assert find(codec) == 5, "a mode"
    codec.g_a[0].register_forward_hook(lambda *args: None)  # type: ignore[union-attr]
    assert contents(codec) is None and [find(codec), find(codec)] == [6, 7]
    codec = built("bmshj2018-hyperprior")[0]
    codec.g_a[1] = type("Own", (nn.Identity,), {"__module__": __name__})()  # type: ignore[operator]
    assert [find(codec), find(codec)] == [8, 9], "somebody's own code"


class Item:
    """A collected test, as far as `daily.mark` looks at it."""

    def __init__(self, name: str, **cases: object):
        file, _, self.originalname = name.partition("::")
        self.path, self.name, self.marked = Path("tests") / file, self.originalname, False
        if cases:
            self.callspec = SimpleNamespace(params=cases)

    def add_marker(self, marker: object) -> None:
        self.marked = True

    def get_closest_marker(self, name: str) -> object:
        return True if self.marked else None


def marked(items: list[Item], *, whole: bool = False) -> list[bool]:
    daily.mark(items, Path("tests"), whole=whole)  # type: ignore[arg-type]
    return [item.marked for item in items]


def test_sweeps_have_some_of_their_cases_each_day() -> None:
    sweep, seldom = next(name for name, n in daily.EVERY.items() if n == 3), min(daily.SELDOM)
    assert marked([Item(sweep, case=n) for n in range(6)]) == [False, True, True] * 2
    assert marked([Item(seldom)]) == [True]
    assert marked([Item("a.py::test_a", case=n) for n in range(3)]) == [False] * 3
    large, slow = min(daily.LARGEST), Item(sweep, case=0)
    slow.marked = True  # by itself; the first of the others takes its place
    assert marked([slow, Item(sweep, case=1)]) == [True, False]
    assert marked([Item("a.py::test_a", architecture=large)]) == [True]
    assert marked([Item(min(daily.ALL_ARCHITECTURES), architecture=large)]) == [False]


def test_what_is_renamed_is_noticed() -> None:
    file = min(daily.SELDOM).partition("::")[0]
    assert marked([Item(f"{file}::test_a")]) == [False]
    with pytest.raises(pytest.UsageError, match=file):
        marked([Item(f"{file}::test_a")], whole=True)
