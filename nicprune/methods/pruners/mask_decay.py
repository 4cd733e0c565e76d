"""Mask decay with the |m - 1| criterion (Wang et al., "EVC: Towards Real-Time Neural Image
Compression with Mask Decay", ICLR 2023).

Every channel of every prunable group gets a mask m, initially 1, applied after the bias of the
layers that produce it. After each optimiser step

    m <- max(0, m - eta * clip(g / rms(g)) - rho * r * (|m - 1| + floor))

with g the gradient of the rate-distortion loss, rms(g) its running root mean square over all masks.
|m - 1| is EVC's criterion: it grows as a mask falls and is zero at 1, so that masks separate into
those that stay and those that go; L1 pushes all equally, L2 pushes the large ones most. Three parts
are not from the paper, whose settings are not public:

*Start.* m = 1 is a fixed point of |m - 1|, and at a trained codec's optimum the mean of g is zero
too: only noise would move a mask. The floor starts the decay.

*Importance.* The mean of g is zero at the optimum, its square is not (Fisher information, see
`gradual`). The rate r = c / E[g^2], relative to its median, first removes channels that cost many
MACs (c, at the present widths) and matter little: widths follow rate-distortion loss per MAC. A
deficit grows exponentially, so a channel half as important is gone when the other has hardly begun
to fall.

*Pace.* rho is steered: it rises while the codec costs more than planned for the step and falls when
it costs less. The choice is final for the last part of `decay_steps` (see `gradual`): keep-lists
are read off the masks, and the decay of those that stay ends.

Decay is decoupled from the optimiser, as weight decay is in AdamW: Adam's normaliser would make |m
- 1|, L1 and L2 equal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nicprune.methods.contract import METHODS
from nicprune.methods.pruners.gradual import EMA, GradualConfig, GradualPruner
from nicprune.pruning.budget_controller import steer

FLOOR = 0.05
"""Decay at m = 1, as a share of the decay at m = 0."""


class MaskDecayConfig(GradualConfig):
    """Settings of mask decay beside those of every gradual pruner.

    Attributes:
        criterion: the decay's gradient: "decay" is |m - 1|, "l1" is 1, "l2" is m; the floor is
            added to each.
        mask_lr: eta, the step size of masks along the rate-distortion gradient; None takes 1 /
            decay_steps, with which a mask that is always pushed one way moves by at most 1.
        rates: whether masks decay by "importance", the rate r of each channel its MACs over its
            importance, or all alike ("equal", r = 1, as published), so that the criterion and the
            gradient alone tell them apart.
    """

    criterion: Literal["decay", "l1", "l2"] = "decay"
    mask_lr: float | None = Field(default=None, gt=0)
    rates: Literal["importance", "equal"] = "importance"


@METHODS.register("mask_decay")
class MaskDecay(GradualPruner):
    """Learn which channels to remove while the codec is trained."""

    name = "mask_decay"
    summary = "learnt masks decay by |m - 1| (EVC), weighted by MACs, to an exact budget"
    Config = MaskDecayConfig
    config: MaskDecayConfig

    @property
    def eta(self) -> float:
        """Step size of masks along the rate-distortion gradient."""
        return (
            self.config.mask_lr
            if self.config.mask_lr is not None
            else 1.0 / self.config.decay_steps
        )

    def _update(self, gradient: Tensor) -> Tensor:
        values = self.current - self.eta * (gradient / self._rms()).clamp(-1, 1)
        if int(self.step) <= self.commit_step:
            values = values - self._decay(self.current)
        return values.clamp(min=0)

    def _counted(self, standing: Tensor) -> Tensor:
        return (standing - 0.25) * 2  # above 3/4 as a whole channel, below 1/4 as none

    def _rms(self) -> Tensor:
        unbiased = self.fisher / (1 - EMA ** int(self.step))
        return unbiased.mean().sqrt().clamp_min(1e-20)

    def _decay(self, values: Tensor) -> Tensor:
        """Return the decay of each mask in this step, and steer rho."""
        soft = self._soft_widths(values)
        rho = self._steer(soft)
        return rho * self._rates(soft, self.fisher) * (self._criterion(values) + FLOOR)

    def _steer(self, soft: np.ndarray) -> Tensor:
        """Steer rho by the present widths, and return it for each channel."""
        steer(self.rho, self._excess(soft), slowest=1e-4 / self.config.decay_steps)
        return self._per_channel(self.rho)

    def _rates(self, soft: np.ndarray, importance: Tensor) -> Tensor:
        if self.config.rates == "equal":
            return torch.ones_like(importance)
        return super()._rates(soft, importance)

    def _criterion(self, m: Tensor) -> Tensor:
        if self.config.criterion == "decay":
            return (m - 1).abs()
        return (m > 0).to(m) if self.config.criterion == "l1" else m

    def metrics(self) -> dict[str, float]:
        below = float((self.current < 0.5).float().mean())
        return {**super().metrics(), "masks_below_half": below}
