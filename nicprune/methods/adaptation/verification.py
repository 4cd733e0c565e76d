"""Results of the target domain in float64, by which pruned new channels are checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.copying import double_copy
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import without_hooks
from nicprune.methods.adaptation.form import Form
from nicprune.pruning.verification import trace
from nicprune.pruning.views import override_attributes


class _InTarget(nn.Module):
    """A codec that computes in the target domain alone."""

    def __init__(self, codec: nn.Module, form: Form):
        super().__init__()
        self.codec, self.form = codec, form

    def forward(self, x: Tensor) -> dict[str, Any]:
        with override_attributes(self.form.overrides(self.codec)):
            return forward_for_analysis(self.codec, x)


def trace_target(codec: nn.Module, form: Form) -> list[Tensor]:
    """Return the picture of a small image in the target domain in float64, and all that entropy
    models are given and return there, as `verification.difference` compares them.

    Args:
        codec: the source codec; its hooks do not run.
        form: its adaptation.
    """
    image = example_image(codec, seed=1).cpu().double()
    double = double_copy(_InTarget(codec, form))
    with without_hooks(double):
        found = trace(double, image)
    return [values for values in found if values.numel()]
