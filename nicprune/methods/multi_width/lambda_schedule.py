"""The lambda schedule of slimmable codecs: the lambdas of narrow widths are lowered until the slope
of the rate-distortion curve no longer improves.

As in the authors' train_loop (Yang et al., CVPR 2021; SlimCAE.py): training starts with all lambdas
equal. Then, for each pair of neighbouring widths from the widest on, all narrower lambdas are
multiplied by 0.8 repeatedly, with some training in between, as long as the slope (PSNR_i -
PSNR_i+1) / (bpp_i - bpp_i+1) on a validation set falls. When it rises, or after 7 times, the next
pair follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from nicprune.common.config import StrictConfig


class ScheduleConfig(StrictConfig):
    """Settings of the lambda schedule.

    Attributes:
        first: training steps with the given lambdas.
        every: training steps between two decisions.
        factor: factor on the narrower lambdas.
        most: largest number of reductions for each pair of neighbours.
    """

    first: int = Field(ge=1)
    every: int = Field(ge=1)
    factor: float = Field(default=0.8, gt=0, lt=1)
    most: int = Field(default=7, ge=1)


def mean_figures(codec: nn.Module, images: Sequence[Tensor], **at: int) -> tuple[float, float]:
    """Return the mean estimated bpp and PSNR in dB (without rounding to 8 bits) of a codec over
    images, (1, 3, H, W) in [0, 1].
    """
    found = []
    for image in images:
        out = codec(image, **at)
        bits = sum(float(-torch.log2(v.double()).sum()) for v in out["likelihoods"].values())
        mse = float((out["x_hat"].clamp(0, 1) - image).square().mean())
        found.append((bits / image[0, 0].numel(), -10 * math.log10(max(mse, 1e-10))))
    return sum(b for b, _ in found) / len(found), sum(p for _, p in found) / len(found)


class LambdaSchedule(nn.Module):
    """The lambdas and the state of the schedule, all in buffers, so that a run resumes exactly.

    Attributes:
        lambdas: lambda of each width, widest first, float64.
        log: a row for each validation: step, pair in question, then lambdas, bpp and PSNR of each
            width.
    """

    lambdas: Tensor
    log: Tensor
    position: Tensor
    slope: Tensor

    def __init__(self, count: int, lambdas: Sequence[float], config: ScheduleConfig | None):
        super().__init__()
        self.config, self.count = config, count
        rows = 1 + (config.most * (count - 1) if config is not None else 0)
        self.register_buffer("lambdas", torch.tensor(list(lambdas), dtype=torch.float64))
        self.register_buffer("slope", torch.tensor(math.inf, dtype=torch.float64))
        # Steps taken, the step of the last validation, the pair in question (-1: none yet), how
        # often its lambdas were lowered, rows logged.
        self.register_buffer("position", torch.tensor([0, -1, -1, 0, 0]))
        self.register_buffer("log", torch.zeros(rows, 2 + 3 * count, dtype=torch.float64))

    @property
    def finished(self) -> bool:
        """True once every pair is decided."""
        return self.config is None or int(self.position[2]) >= self.count - 1

    @property
    def wants_validation(self) -> bool:
        """True if a decision is due at this step."""
        if self.config is None or self.finished:
            return False
        step, last = int(self.position[0]), int(self.position[1])
        return (
            step != last
            and step >= self.config.first
            and (step - self.config.first) % self.config.every == 0
        )

    @property
    def steps_left(self) -> int:
        """Training steps until every pair is decided, at most."""
        if self.config is None or self.finished:
            return 0
        step, last, pair, times, _ = self.position.tolist()
        first, every, most = self.config.first, self.config.every, self.config.most
        if pair < 0:  # the first validation opens the first pair
            until = first - step if step <= first else (first - step) % every
            return int(until + (self.count - 1) * most * every)
        # The validation that decides a pair, lowered as often as it may be, opens the next.
        validations = (self.count - 1 - pair) * most - times + 1
        return int(last + validations * every - step)

    def advance(self) -> None:
        """Count a training step."""
        self.position[0] += 1

    def observe(self, bpp: Sequence[float], psnr: Sequence[float]) -> None:
        """Take (bpp, PSNR) of each width; lower lambdas if due."""
        assert self.config is not None
        step, _, pair, times, rows = self.position.tolist()
        if rows < len(self.log):
            self.log[rows] = torch.tensor(
                [step, pair, *self.lambdas.tolist(), *bpp, *psnr], dtype=torch.float64
            )
            rows += 1
        slope = _slope(bpp, psnr, pair) if pair >= 0 else math.inf
        if pair < 0 or slope > float(self.slope) or times >= self.config.most:
            pair, times = pair + 1, 0
            slope = _slope(bpp, psnr, pair) if pair < self.count - 1 else math.inf
        if pair < self.count - 1:
            self.lambdas[pair + 1 :] *= self.config.factor
            times += 1
        self.slope.fill_(slope)
        self.position.copy_(torch.tensor([step, step, pair, times, rows]))

    def history(self) -> list[dict[str, list[float] | float]]:
        """Return the log as records, for reports."""
        k = self.count
        return [
            {
                "step": row[0],
                "pair": row[1],
                "lambdas": row[2 : 2 + k],
                "bpp": row[2 + k : 2 + 2 * k],
                "psnr_db": row[2 + 2 * k :],
            }
            for row in self.log[: int(self.position[4])].tolist()
        ]


def _slope(bpp: Sequence[float], psnr: Sequence[float], pair: int) -> float:
    """Return the slope between two neighbours; infinite if the narrower one needs as many bits."""
    rate = bpp[pair] - bpp[pair + 1]
    return (psnr[pair] - psnr[pair + 1]) / rate if rate > 1e-6 else math.inf
