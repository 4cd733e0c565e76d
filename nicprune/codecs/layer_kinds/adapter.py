"""A small residual layer that is put behind another one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A residual branch with a narrow hidden layer, zero at the start."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 3, padding=1)
        self.up = nn.Conv2d(hidden, channels, 1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor) -> Tensor:
        """Return y, (B, C, H, W), with the branch added."""
        adapted: Tensor = y + self.up(torch.relu(self.down(y)))
        return adapted
