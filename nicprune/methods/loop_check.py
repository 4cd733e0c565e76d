"""Notice training loops that leave out what methods need, as loops of one's own can."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nicprune.common.errors import TrainingError
from nicprune.methods.contract import Method, MultiWidth

MISSED_IN_A_ROW = 3
"""Steps without a gradient that are taken for a fault of the loop, not for a step left out."""


class LoopCheck:
    """The steps of one attached codec's training, as they run."""

    def __init__(self) -> None:
        self._ran = False
        self._asked: list[set[int]] = []
        self._widths: set[int] = set()
        self._missed: dict[int, int] = {}
        """Steps in a row without a gradient, by position of the method."""

    def asked(self, widths: Iterable[int]) -> None:
        """Note the widths that a step was told to train; it may ask again, and get others."""
        self._asked.append(set(widths))

    def ran(self, width: int | None) -> None:
        """Note a forward pass in training, at this width of several."""
        self._ran = True
        if width is not None:
            self._widths.add(width)

    def check_step(
        self, model: nn.Module, methods: Iterable[Method], multi_width: MultiWidth | None
    ) -> None:
        """Check the step at its end, while its gradients are still there.

        Raises:
            TrainingError: it did not run each width; or some steps left no gradient of masks or
                thresholds, which follow theirs.
        """
        ran, asked, widths = self._ran, self._asked, self._widths
        self._ran, self._asked, self._widths = False, [], set()
        if (
            multi_width is not None
            and not multi_width.default_in_training()
            and len(multi_width.widths or ())
            and not any(each <= widths for each in asked)
        ):
            raise TrainingError(
                f"{multi_width.name} trains several widths: in each step, before after_step(), run"
                " the forward and the backward pass for each width in model.widths_per_step(), by"
                " model(batch, width=width)"
            )
        if not ran:  # schedules are also advanced without training
            return
        methods = list(methods)
        followed = [[] if method.done else method.manually_updated() for method in methods]
        taken = not _any_gradient(model.parameters()) if any(followed) else False
        # Zeros alone are no sign: masks have such gradients where what they scale counts for
        # nothing as yet, as in an encoder whose last layer starts at zero.
        self._missed = {
            position: self._missed.get(position, 0) + 1
            for position, own in enumerate(followed)
            if own and (taken or all(p.grad is None for p in own))
        }
        for position, missed in self._missed.items():
            if missed >= MISSED_IN_A_ROW:
                remedy = (
                    "call model.after_step() after backward() and optimizer.step(), but before"
                    " optimizer.zero_grad()"
                    if any(p.requires_grad for p in followed[position])
                    else "its masks or thresholds have requires_grad=False; freeze parameters of"
                    " model.codec alone"
                )
                raise TrainingError(
                    f"{methods[position].name} found no gradient in {missed} steps in a row:"
                    f" {remedy}"
                )


def _any_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether one has a gradient other than zero. What is not finite is one, too: training
    goes on from such steps.
    """
    return any(p.grad is not None and bool(p.grad.any()) for p in parameters)
