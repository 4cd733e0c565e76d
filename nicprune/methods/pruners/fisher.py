"""One-shot pruning by Fisher information: the squared gradient of the loss by a mask on each
channel, summed over images.

The first-order criterion of Molchanov et al., "Importance Estimation for Neural Network Pruning"
(CVPR 2019), over whole channel groups, on the rate-distortion loss. With a budget, channels go by
importance per MAC saved.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.errors import TrainingError
from nicprune.methods.contract import METHODS, Pruner
from nicprune.pruning.masks import importance
from nicprune.pruning.target import Target


@METHODS.register("fisher")
class Fisher(Pruner):
    """Choose channels in `prepare`, by the loss on some images."""

    name = "fisher"
    summary = (
        "one shot: smallest squared mask gradient (Fisher, Taylor) per MAC goes first; looks at"
        " photographs"
    )
    Config = Target
    config: Target

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self._scores: dict[str, Tensor] = {}

    def validate(self) -> None:
        self.config.check(self.groups, self.cost)

    def prepare(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        super().prepare(model, images)
        codec = self.codec
        lmbda = lmbda_of(codec, self.config.lmbda)
        self._scores = importance(
            codec,
            self.groups,
            self.config.free(self.groups),
            images,
            lmbda,
            provenance(codec).metric,
        )

    def check_ready(self) -> None:
        if not self._scores:
            raise TrainingError(
                "fisher has seen no photographs yet: attached.prepare(calibration_images(folder))"
                " first, or --images folder"
            )

    def select(self) -> dict[str, list[int]]:
        if not self._scores:
            return {}
        scores = {name: value.double().cpu().numpy() for name, value in self._scores.items()}
        return self.config.choose(self.groups, self.cost, scores, per_cost=True)
