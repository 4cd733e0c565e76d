"""What tests rest on: processes that end badly are seen to, and an analysis is only kept for a
codec that is the same in everything.
"""

from __future__ import annotations

import os
from typing import Any

import elsewhere
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
