"""Moments in optimisers that have faded to nothing.

A filter whose mask is zero has no gradient any more, and the averages that an optimiser keeps of
its gradients shrink by a constant factor in each step. After some hundred steps they are denormal
numbers (below 1.2e-38), which processors compute up to a hundred times as slowly: a matrix product
of 192 x 192 by 192 x 4,800 takes 440 ms in place of 6. Long before, they are too small to change a
weight; they are set to zero then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

EVERY = 10
"""Steps from one look to the next, in which moments without gradients shrink to about a third."""

LEAST = {"exp_avg": 1e-25, "exp_avg_sq": 1e-30}
"""Moments below are nothing: beside the 1e-8 that Adam and SOAP add to the root of the second one
they move a weight by less than 1e-17 of the learning rate.
"""

LEAST_RELATIVE = 1e-20
"""Entries of SOAP's second moments along an axis ("GG") below so many times the largest are nothing
beside it in float32.
"""


@torch.no_grad()
def drop_faded_moments(optimizer: Optimizer) -> None:
    """Set moments to zero that are too small to count, in place."""
    for state in optimizer.state.values():
        for name, least in LEAST.items():
            if isinstance(moments := state.get(name), Tensor):
                _drop(moments, least)
        for moments in state.get("GG") or ():
            if len(moments):
                _drop(moments, LEAST_RELATIVE * moments.abs().max())


def _drop(moments: Tensor, least: float | Tensor) -> None:
    moments.masked_fill_(moments.abs() < least, 0)
