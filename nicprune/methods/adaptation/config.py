"""Settings of an adaptation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from nicprune.common.config import StrictConfig
from nicprune.methods.domains import SOURCE_NAME

FormName = Literal["grow", "decoder_adapter", "low_rank", "finetune_all", "finetune_decoder"]

FORGETS = ("finetune_all", "finetune_decoder")
"""Forms that change the source codec."""


class AdaptationConfig(StrictConfig):
    """Settings of an adaptation.

    Attributes:
        form: "grow" (new channels around the frozen codec), "decoder_adapter" (small layers in its
            g_s), "low_rank" (a low-rank change of its convolutions), "finetune_all" or
            "finetune_decoder" (the codec itself changes, and forgets).
        domain: name of the target domain.
        grow: for "grow": new channels of each channel group, as a fraction of its width, for all
            groups, or by name or pattern ({"g_s.*": 0.5}) where others do not grow.
        macs: for "grow", in place of `grow`: the largest uniform fraction with which the target
            domain needs at most so many times the source codec's MACs.
        widths: or the number of new channels itself, by name or pattern ({"g_s.*": 16}).
        latents: for "grow": whether y and z grow too.
        into_old: for "grow": whether the target domain computes the source's channels of g_s from
            new channels too, where CAwF leaves them as they are in the source domain.
        round_to: for "grow": new channels are multiples of this.
        hidden: for "decoder_adapter": width of the hidden layer of each adapter.
        rank: for "low_rank": rank of the change of each convolution.
        layers: for "low_rank": names or patterns of the convolutions that change; all if not given.
        replay: for the forms that forget: fraction of each batch that is of source images.
        adapt_steps: training steps before `harden`.
    """

    form: FormName = "grow"
    domain: str = Field(default="target", min_length=1, max_length=64)
    grow: float | dict[str, float] | None = None
    macs: float | None = Field(default=None, gt=1, le=16)
    widths: dict[str, int] | None = None
    latents: bool = True
    into_old: bool = False
    round_to: int = Field(default=8, ge=1, le=64)
    hidden: int = Field(default=16, ge=1, le=1024)
    rank: int = Field(default=4, ge=1, le=1024)
    layers: list[str] | None = Field(default=None, min_length=1)
    replay: float = Field(default=0.0, ge=0, lt=1)
    adapt_steps: int = Field(default=0, ge=0)

    @field_validator("domain")
    @classmethod
    def _named(cls, domain: str) -> str:
        if not domain.isprintable() or domain != domain.strip() or domain == SOURCE_NAME:
            raise ValueError(f"a domain is a line of text, and not {SOURCE_NAME!r}")
        return domain

    def with_widths(self, added: dict[str, int]) -> AdaptationConfig:
        """Return the settings with the numbers of new channels in place of what led to them."""
        return self.model_copy(update={"grow": None, "macs": None, "widths": dict(added)})

    @model_validator(mode="after")
    def _belongs(self) -> AdaptationConfig:
        own = {
            "grow": "grow",
            "macs": "grow",
            "widths": "grow",
            "latents": "grow",
            "into_old": "grow",
            "round_to": "grow",
            "hidden": "decoder_adapter",
            "rank": "low_rank",
            "layers": "low_rank",
        }
        for name, form in own.items():
            if form != self.form and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of form: {form}, not of {self.form}")
        if self.form not in FORGETS and self.replay:
            raise ValueError(
                f"replay is for {' and '.join(FORGETS)}: {self.form} leaves the source codec as it"
                " is"
            )
        given = sum(value is not None for value in (self.grow, self.macs, self.widths))
        if self.form == "grow" and given != 1:
            raise ValueError("give one of grow: 0.25, macs: 1.3 and widths: {'g_s.*': 16}")
        if not all(0 <= count <= 1 << 14 for count in (self.widths or {}).values()):
            raise ValueError("widths are numbers of new channels, 0 or more")
        fractions = self.grow.values() if isinstance(self.grow, dict) else [self.grow or 1.0]
        if not all(0 < fraction <= 8 for fraction in fractions):
            raise ValueError("grow is a fraction of a width, above 0 and at most 8")
        return self
