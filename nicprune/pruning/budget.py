"""A budget, and the widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nicprune.channels.groups import Group
from nicprune.common.config import StrictConfig
from nicprune.common.errors import BudgetError
from nicprune.pruning.totals import AREA, Totals

if TYPE_CHECKING:
    from nicprune.pruning.cost import CostModel

ROUND_TO = 16
"""Widths in multiples of 16: CPU convolutions take a step in time at each."""


SIDES = ("encoder", "decoder")

TIMES = ("encode_s", "decode_s")
"""Limits in seconds, see `nicprune.pruning.latency`."""

KMAC = {"kmac": "macs", "encoder_kmac": "encoder", "decoder_kmac": "decoder"}
"""Limits in kMAC per pixel, and the costs that they limit."""


class Budget(StrictConfig):
    """Limits on the cost of the result.

    Attributes:
        macs, encoder, decoder, params: shares of the original codec's MACs, of its encoder's and
            its decoder's, and of its parameters.
        encode_s, decode_s: shares of the time that the original codec takes to encode and to decode
            an image, by a table of measured times (`nip.measure_latency`).
        kmac, encoder_kmac, decoder_kmac: the same limits in thousands of multiply-adds per pixel of
            the image, the unit of JPEG AI's operating points.
        split: with macs, how much of what is saved the encoder has to save, as a share, the decoder
            saving the rest; "auto": whichever leaves the least rate-distortion loss before
            training, measured on photographs. Without it all channels compete, wherever they are.
    """

    macs: float | None = Field(default=None, gt=0, lt=1)
    encoder: float | None = Field(default=None, gt=0, lt=1)
    decoder: float | None = Field(default=None, gt=0, lt=1)
    params: float | None = Field(default=None, gt=0, lt=1)
    encode_s: float | None = Field(default=None, gt=0, lt=1)
    decode_s: float | None = Field(default=None, gt=0, lt=1)
    kmac: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    encoder_kmac: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    decoder_kmac: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    split: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] | None = None

    shares: ClassVar[str] = (
        "macs, encoder, decoder, params, encode_s or decode_s, as shares of the original between 0"
        " and 1"
    )

    @model_validator(mode="after")
    def _something(self) -> Budget:
        if not self.parts():
            raise ValueError(
                f"a budget names {self.shares}, or kmac, encoder_kmac or decoder_kmac, in kMAC per"
                " pixel"
            )
        for name, share in KMAC.items():
            if getattr(self, name) is not None and getattr(self, share) is not None:
                raise ValueError(f"{share} and {name} limit the same cost: give one of them")
        if self.split is not None and (
            (self.macs is None and self.kmac is None)
            or any(name in self.parts() for side in SIDES for name in (side, f"{side}_kmac"))
        ):
            raise ValueError(
                "split divides what macs saves between encoder and decoder: give macs or kmac, and"
                " neither encoder nor decoder"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unset_times(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit times that are not set: what is written is part of the identity of runs."""
        content: dict[str, Any] = write(self)
        return {k: v for k, v in content.items() if k not in TIMES or v is not None}

    @property
    def times(self) -> list[str]:
        """The times that are limited."""
        return [name for name in TIMES if getattr(self, name) is not None]

    def parts(self) -> dict[str, float]:
        """Return the limits that are set, as given."""
        return {
            name: value
            for name, value in self.model_dump(exclude={"split"}).items()
            if value is not None
        }

    def limits(self, original: Totals) -> dict[str, float]:
        """Return the limits as absolute numbers, by attribute of `Totals`; those that a split
        amounts to, too.

        Raises:
            BudgetError: times are limited, and this codec's were not measured.
        """
        if self.times and not hasattr(original, self.times[0]):
            raise BudgetError(
                f"budget {self.times[0]}: the times of this codec are not known: attach(codec, ...,"
                " latency=nip.measure_latency(codec))"
            )
        found = {
            KMAC.get(name, name): value * (1000 * AREA if name in KMAC else getattr(original, name))
            for name, value in self.parts().items()
        }
        if isinstance(self.split, float):
            saved = original.macs - found["macs"]
            found |= {
                "encoder": original.encoder - self.split * saved,
                "decoder": original.decoder - (1 - self.split) * saved,
            }
        return found

    def in_units_given(
        self, total: str, limit: float, reached: float, cost: CostModel
    ) -> tuple[str, str]:
        """Return a limit as it was given, and what is reached in the same unit, for messages.

        Args:
            total: attribute of `Totals` that is limited.
            limit, reached: absolute numbers.
            cost: whose original shares are of.
        """
        given = next((n for n, of in KMAC.items() if of == total and getattr(self, n)), None)
        if given is None:
            whole = getattr(cost.original, total)
            return f"budget {total}: {limit / whole:.3g}", f"{reached / whole:.3g} of {cost.base}"
        pixel = 1000 * AREA
        return f"budget {given}: {limit / pixel:.4g}", f"{reached / pixel:.4g} kMAC/pixel"


class GrownBudget(Budget):
    """Limits on the target domain of a codec that has grown: shares of the source codec's cost,
    all of which stays, or kMAC per pixel.
    """

    shares: ClassVar[str] = (
        "macs, encoder, decoder or params, as shares of the source codec between 1 and 16"
    )

    macs: float | None = Field(default=None, gt=1, le=16)
    encoder: float | None = Field(default=None, ge=1, le=16)
    decoder: float | None = Field(default=None, ge=1, le=16)
    params: float | None = Field(default=None, gt=1, le=16)

    @model_validator(mode="after")
    def _of_more(self) -> GrownBudget:
        if self.times:
            raise ValueError(f"{self.times[0]}: no times of new channels are known: limit MACs")
        if self.split is not None:
            raise ValueError(
                "split divides what is saved of a codec, and nothing of this one goes: limit"
                " encoder and decoder"
            )
        return self


def next_width(width: int, round_to: int, least: int = 1) -> int:
    """The next smaller width: a multiple of `round_to`, and `least` at least; so at least one of
    them, unless `least` is 0.
    """
    least = max(round_to, least) if least else 0
    below = (width - 1) // round_to * round_to
    return below if below >= least else width


def smallest_widths(cost: CostModel, groups: Sequence[Group], round_to: int) -> np.ndarray:
    """Every group at its least width."""
    widths = cost.widths()
    for group in groups:
        step, least = group.step(round_to), group.least
        width, smaller = group.width, next_width(group.width, step, least)
        while smaller < width:
            width, smaller = smaller, next_width(smaller, step, least)
        widths[cost.names.index(group.name)] = width
    return widths


def check_feasible(cost: CostModel, groups: Sequence[Group], budget: Budget, round_to: int) -> None:
    """Raise BudgetError if even the narrowest codec costs more than the budget."""
    now, least = cost.totals(), cost.totals(smallest_widths(cost, groups, round_to))
    for name, limit in budget.limits(cost.original).items():
        reached = getattr(least, name)
        if reached <= limit:
            continue
        asked, left = budget.in_units_given(name, limit, reached, cost)
        if reached == getattr(now, name):
            raise BudgetError(
                f"{asked} cannot be met: no group that may shrink (side, only, latents, round_to"
                f" {round_to}) lowers it, and {left} remains{_pinned(cost)}"
            )
        raise BudgetError(
            f"{asked} cannot be met: with every free group at its least width (round_to {round_to})"
            f" {left} remains; ask for more, a smaller round_to, or latents: true{_pinned(cost)}"
        )


def _pinned(cost: CostModel) -> str:
    """Return which groups can never shrink, and why, for messages; empty if there are none."""
    held = [group for group in cost.groups if group.pinned]
    if not held:
        return ""
    count = "group is" if len(held) == 1 else "groups are"
    more = ", ..." if len(held) > 1 else ""
    return f". {len(held)} {count} left whole: {held[0].name} ({held[0].pinned}){more}"


def allocate_widths(
    cost: CostModel,
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    budget: Budget,
    round_to: int = ROUND_TO,
    *,
    per_cost: bool = True,
) -> dict[str, list[int]]:
    """Choose keep-lists that meet `budget`, taking away what matters least.

    Steps of `round_to` channels are taken from whichever group loses the least importance (per MAC
    or parameter saved, if `per_cost`), lowest scores first, until the budget holds; then what still
    fits is put back, most important first.

    Args:
        groups: those that may shrink.
        scores: importance of each channel of each of them, higher stays.

    Raises:
        BudgetError: no widths meet it.
    """
    check_feasible(cost, groups, budget, round_to)
    limits = budget.limits(cost.original)
    column = np.array([cost.names.index(g.name) for g in groups])
    order = [np.argsort(np.asarray(scores[g.name]), kind="stable") for g in groups]
    # Sum of the i lowest scores: what is lost by going down to a width is a difference of two
    # entries.
    lost = [
        np.concatenate([[0.0], np.cumsum(np.asarray(scores[g.name], float)[o])])
        for g, o in zip(groups, order, strict=True)
    ]
    widths = cost.widths()
    full = widths.copy()

    def excess(at: np.ndarray) -> dict[str, float]:
        totals = cost.totals(at)
        return {
            name: getattr(totals, name) - limit
            for name, limit in limits.items()
            if getattr(totals, name) > limit
        }

    while over := excess(widths):
        deltas = np.zeros_like(widths)
        for i, group in zip(column, groups, strict=True):
            step = group.step(round_to)
            deltas[i] = widths[i] - next_width(int(widths[i]), step, group.least)
        saved: Any = sum(
            np.minimum(cost.decreases(widths, deltas, name), amount) / amount
            for name, amount in over.items()
        )
        best, best_price = -1, np.inf
        for j, i in enumerate(column):
            if not deltas[i] or saved[i] <= 0:
                continue
            gone = full[i] - widths[i]
            loss = lost[j][gone + deltas[i]] - lost[j][gone]
            price = loss / saved[i] if per_cost else loss / deltas[i]
            if price < best_price:
                best, best_price = int(i), price
        if best < 0:
            raise BudgetError(f"budget {budget.parts()} cannot be met with round_to {round_to}")
        widths[best] -= deltas[best]

    _put_back(cost, groups, column, lost, widths, full, round_to, excess)
    keep = {}
    for j, (i, group) in enumerate(zip(column, groups, strict=True)):
        keep[group.name] = sorted(order[j][group.width - int(widths[i]) :].tolist())
    return keep


def _put_back(
    cost: CostModel,
    groups: Sequence[Group],
    column: np.ndarray,
    lost: list[np.ndarray],
    widths: np.ndarray,
    full: np.ndarray,
    round_to: int,
    excess: Any,
) -> None:
    """The last step taken may have saved more than was needed: give back what still fits, most
    important first.
    """
    while True:
        options = []
        for j, (i, group) in enumerate(zip(column, groups, strict=True)):
            whole = group.step(round_to)
            step = min(whole - int(widths[i]) % whole, int(full[i] - widths[i]))
            if step > 0:
                gone = full[i] - widths[i]
                options.append((float(lost[j][gone] - lost[j][gone - step]), int(i), step))
        for _, i, step in sorted(options, reverse=True):
            widths[i] += step
            if not excess(widths):
                break
            widths[i] -= step
        else:
            return


ROUNDS, ENOUGH = 16, 0.98
"""Measurements at most to meet a budget; the share of it that is to be used."""


def move_to_budget(
    move: Callable[[float], None],
    measure: Callable[[], float],
    guess: Callable[[float], float],
    most: float,
) -> None:
    """Move thresholds until what they leave costs no more than a budget, and hardly less.

    Args:
        move: sets the distance of the thresholds from where they began; a larger one leaves less.
        measure: runs with the thresholds as they are, and returns the share of the budget that is
            used.
        guess: the change of this distance that would meet the budget, as far as the last
            measurement tells; it need not be right.
        most: a distance that surely is enough, beyond what was tried.
    """
    shift, last, too_low, met, used = 0.0, 0.0, -math.inf, math.inf, math.inf
    for tried in range(ROUNDS):
        before, used = used, measure()
        too_low, met = (shift, met) if used > 1 else (too_low, shift)
        if ENOUGH <= used <= 1 or met - too_low < 1e-4:
            break
        if used <= 1 and used == before and too_low == -math.inf:
            move(last)  # nothing more opens
            break
        # Guesses that fall short again and again are doubled; what is known to be too little or
        # enough bounds them all.
        following = shift + guess(shift) * (1 if tried < 3 else 2)
        if not too_low < following < met:
            following = (
                (too_low + met) / 2
                if math.isfinite(met - too_low)
                else shift + (0.1 if used > 1 else -0.1)
            )
        if used <= 1 and abs(following - shift) < 1e-4:
            break
        last, shift = shift, following
        move(shift)
    else:
        used = measure()
    if used > 1:
        move(met if math.isfinite(met) else shift + most)
        measure()
