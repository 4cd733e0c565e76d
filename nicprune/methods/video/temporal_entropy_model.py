"""Video with an image codec: a temporal entropy model, without motion (Sun et al., "Spatiotemporal
Entropy Model is All You Need for Learned Video Compression", arXiv 2104.06083), as narrow as the
codec where the codec is slimmable (Liu et al., "Slimmable Video Codec", CVPRW 2022, arXiv
2205.06754).

An I frame is coded by the image codec as it is. A P frame has the same g_a and g_s; its latents are
coded by Gaussians,

    y_hat[t] = round(y[t] - mean) + mean,    (scale, mean) = EPM(HD(z_hat), TPM(y_hat[t-1])),
    z = HE(y[t], y_hat[t-1]),

see `codecs.temporal`. There is no spatial context model: beside a temporal one it wins nothing.

*Training.* A clip is an I frame and the P frames behind it, at a random distance in time. With the
image codec frozen the loss is the rate of the P frames; g_s is not run. The papers step the
optimiser after each P frame; here a step has the mean over all P frames of the batch, each given
the detached y_hat of the one before: the latents of a frozen codec do not depend on the step.
Trained along, the loss is that of the training loop over all frames.

*Widths.* Beside a slimmable codec, the temporal model has the leading channels at each width, an
entropy bottleneck for each, and reads the latents that the codec has at this width; the frame
before was coded at the same width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Group, Groups, Member, kept_channels
from nicprune.codecs.calling import further_arguments
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_operations import resize
from nicprune.codecs.modes import left_as_it_was, modes_restored
from nicprune.codecs.roles import End, roles_of
from nicprune.codecs.standing_in import Given, can_stand_in, standing_in
from nicprune.codecs.temporal import TemporalEntropyNetwork, in_proportion
from nicprune.common.config import StrictConfig, parse
from nicprune.common.errors import CodecError, RecipeError
from nicprune.data.clip_patches import ClipSampling
from nicprune.methods.contract import METHODS, Method, MultiWidth, Temporal
from nicprune.pruning.budget import KMAC, ROUND_TO
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import prune
from nicprune.pruning.totals import Totals
from nicprune.pruning.views import Slices, narrow_copy, override_attributes


class TemporalEntropyModelConfig(StrictConfig):
    """Settings of a temporal entropy model. Widths that are not given are the papers' for 192
    latent channels, in proportion to the codec's.

    Attributes:
        hyper: channels of the hyperprior and of the temporal prior's first layer; 256 for M = 192.
        temporal: channels of the temporal prior's second layer; 320 for M = 192.
        parameters: channels between the three layers that give scales and means; (768, 576) for
            M = 192.
        image_codec: whether it is "frozen", or "trained" along with the temporal model.
        clips: what the training folders hold: "files", videos and folders of frames; or
            "photographs", each of which becomes a clip of `span` frames of a camera and an object
            that move (`nicprune.data.moving_photographs`).
        strides: distances in time between the frames of a training clip, drawn at random.
        span: largest number of successive frames that a training clip is taken from.
        frames: largest number of frames of a training clip.
        round_to: with a slimmable codec, narrow widths are multiples of this.
        mask_decay: settings of mask decay (budget or widths, decay_steps, ...) that prunes the
            temporal model while it learns; budgets are relative to it alone.
    """

    hyper: int | None = Field(default=None, ge=2)
    temporal: int | None = Field(default=None, ge=2)
    parameters: tuple[int, int] | None = None
    image_codec: Literal["frozen", "trained"] = "frozen"
    clips: Literal["files", "photographs"] = "files"
    strides: tuple[int, ...] = Field(default=(1, 2, 3, 6), min_length=1)
    span: int = Field(default=7, ge=2)
    frames: int = Field(default=7, ge=2)
    round_to: int = Field(default=ROUND_TO, ge=1, le=64)
    mask_decay: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TemporalEntropyModelConfig:
        if min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
            raise ValueError(
                f"strides are different distances of 1 or more frames (got {list(self.strides)})"
            )
        if min(self.strides) >= self.span:
            raise ValueError(
                f"a clip of {self.span} frames has no two that are {min(self.strides)} apart: set"
                " span higher, or strides lower"
            )
        if self.parameters is not None and min(self.parameters) < 2:
            raise ValueError("parameters are two numbers of channels, 2 or more each")
        return self

    @model_serializer(mode="wrap")
    def _without_files(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what older settings did not have: they are part of the identity of runs."""
        content: dict[str, Any] = write(self)
        return {k: v for k, v in content.items() if (k, v) != ("clips", "files")}


@METHODS.register("temporal_entropy_model")
class TemporalEntropyModel(Temporal):
    """A temporal entropy model beside an image codec, which stays as it is for I frames.

    Attributes:
        network: the temporal entropy model at its full width.
        bottlenecks: entropy bottlenecks of narrow widths.
    """

    name = "temporal_entropy_model"
    summary = "video with any image codec: latents coded given those of the frame before (STEM)"
    Config = TemporalEntropyModelConfig
    config: TemporalEntropyModelConfig
    bottlenecks: nn.ModuleDict

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.latents, self.latent_stride = self._latents()
        # Its weights must not depend on, or change, what the caller draws next.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # and no other device's
            self.network = TemporalEntropyNetwork(self.latents, *self._widths())
        self.bottlenecks = nn.ModuleDict()
        self._found: dict[str, Any] = {}
        self._multi_width: tuple[MultiWidth, ...] = ()
        self._beside: tuple[Method, ...] = ()
        self.decays = nn.ModuleList()
        if self.config.mask_decay is not None:
            settings: Any = parse(
                METHODS["mask_decay"].Config, self.config.mask_decay, f"method {self.name!r}"
            )
            budget = settings.budget
            unfit = budget is not None and ({*KMAC} & budget.parts().keys() or budget.split)
            if unfit:
                raise RecipeError(
                    f"method {self.name!r}: mask_decay: its budget is a share of the network's own"
                    " macs or params: kMAC per pixel of a frame and split are of a codec"
                )
            decay = METHODS["mask_decay"](
                self.network, self.network_groups, self.network_cost, settings
            )
            self.decays.append(decay)
            decay.attach(self.network)

    def validate(self) -> None:
        roles, name = roles_of(self.codec), type(self.codec).__name__
        if roles.analysis is None or roles.synthesis is None:
            raise CodecError(f"a temporal model codes what the synthesis is given; {roles.reason}")
        for end, what in ((roles.analysis, "analysis"), (roles.synthesis, "synthesis")):
            if not can_stand_in(self.codec, end):
                raise CodecError(
                    f"a temporal model needs the {what} of {name} to be one module that is given"
                    f" one tensor; it {'ends in' if what == 'analysis' else 'begins with'}"
                    f" {end.module}"
                )

    def _latents(self) -> tuple[int, int]:
        """Return the latent channels of the codec, and pixels per latent along a side.

        Raises:
            CodecError: what its forward pass gives g_s is not the latents that g_a returns.
        """
        codec = self.codec
        x = example_image(codec)
        with torch.no_grad(), left_as_it_was(codec):
            codec.eval()
            y = self._analysis(codec)(x)
            y_hat = self._intra(codec, x, y)["x_hat"]
        fits = isinstance(y, Tensor) and isinstance(y_hat, Tensor) and y.dim() == 4
        if not fits or y.shape != y_hat.shape:
            raise CodecError(
                f"a temporal model needs one tensor of latents between analysis and synthesis of"
                f" {type(codec).__name__}"
            )
        return y.shape[1], x.shape[-1] // y.shape[-1]

    def _widths(self) -> tuple[int, int, tuple[int, int]]:
        """Return the widths of the network's layers."""
        config, m = self.config, self.latents
        return (
            config.hyper or in_proportion(256, m),
            config.temporal or in_proportion(320, m),
            config.parameters or (in_proportion(768, m), in_proportion(576, m)),
        )

    # -- the image codec's parts ------------------------------------------------------------------

    def _end(self, codec: nn.Module, which: str) -> End:
        end: End = getattr(roles_of(codec), which)
        return end

    def _analysis(self, codec: nn.Module) -> nn.Module:
        return codec.get_submodule(self._end(codec, "analysis").module)

    def _synthesis(self, codec: nn.Module) -> nn.Module:
        return codec.get_submodule(self._end(codec, "synthesis").module)

    def _intra(self, codec: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return what the codec's forward pass makes of images x whose latents are y, with y_hat in
        place of the images decoded.
        """
        stands = [
            standing_in(codec, self._end(codec, "analysis").module, Given(y)),
            standing_in(codec, self._end(codec, "synthesis").module, nn.Identity()),
        ]
        with override_attributes(stands):
            out: dict[str, Any] = codec.forward(x, **further_arguments(codec, x, "forward"))
        return out

    # -- channels and cost ------------------------------------------------------------------------

    @property
    def network_groups(self) -> Groups:
        """The channel groups of the network; its latents are those of the codec and not among
        them.
        """
        if "groups" not in self._found:
            self._found["groups"] = find_groups(self.network)
        return self._found["groups"]  # type: ignore[no-any-return]

    @property
    def network_cost(self) -> CostModel:
        """The network's cost; its "pixels" are latents."""
        if "cost" not in self._found:
            self._found["cost"] = CostModel(self.network, self._groups_and_latents)
        return self._found["cost"]  # type: ignore[no-any-return]

    @property
    def _groups_and_latents(self) -> Groups:
        """The network's groups, and that of the latents y."""
        m = np.arange(self.latents)[:, None]
        both = np.concatenate((m, m + self.latents), 1)
        y = Group(
            "y",
            self.latents,
            (
                Member("h_a.0", "in", both),
                Member("temporal_prior.0", "in", m),
                Member("entropy_parameters.4", "out", both),
            ),
            latent="y",
        )
        return Groups([*self.network_groups, y])

    def predicted_totals(self) -> Totals:
        """Return the cost of a P frame at the width that is set: MACs at 64x64 pixels, parameters
        of g_a, g_s and the temporal model.
        """
        width = self._multi_width[0] if self._multi_width else None
        transforms = width.by_transform() if width is not None else self.cost.by_transform()
        (g_a, g_a_params), (g_s, g_s_params) = transforms["g_a"], transforms["g_s"]
        found = self.network_cost.totals(self._slices.keep)
        macs, encoder, decoder = (
            getattr(found, name) // self.latent_stride**2 for name in ("macs", "encoder", "decoder")
        )
        params = g_a_params + g_s_params + found.params
        return Totals(g_a + g_s + macs, g_a + encoder, g_s + decoder, params)

    # -- widths -----------------------------------------------------------------------------------

    def set_beside(self, methods: Sequence[Method]) -> None:
        self._beside = tuple(method for method in methods if method is not self)
        self._multi_width = tuple(m for m in self._beside if isinstance(m, MultiWidth))
        waiting = [m.name for m in self._beside if m.steps_left]
        if waiting and not self.trains_codec:
            raise RecipeError(
                f"{' and '.join(waiting)} learns while the codec is trained, which {self.name}"
                " freezes: set image_codec: trained, or harden the codec first"
            )
        if not self._multi_width:
            return
        if self.config.mask_decay is not None:
            raise RecipeError(
                f"{self.name} has mask_decay or several widths, not both: take one width out"
                " (extract), then prune it"
            )
        widths = self._multi_width[0].widths
        for width in range(1, len(widths) if widths is not None else 1):
            layer = self.network.entropy_bottleneck
            groups, keep = self._groups_and_latents, self._keep(width)
            self.bottlenecks[str(width)] = narrow_copy(layer, "entropy_bottleneck", groups, keep)

    @property
    def _width(self) -> int:
        widths = self._multi_width[0].widths if self._multi_width else None
        return widths.now or 0 if widths is not None else 0

    def _keep(self, width: int) -> dict[str, list[int]]:
        """Return the keep-lists of the network at a width."""
        if not width:
            return {}
        multi_width = self._multi_width[0]
        share, found = multi_width.share_at(width), {}
        for group in self.network_groups:
            step = group.step(self.config.round_to)
            least = max(min(step, group.width), 2)
            count = max(least, round(share * group.width / step) * step)
            if count < group.width:
                found[group.name] = list(range(count))
        return found | self._latents_kept(multi_width.keep_at(width))

    def _latents_kept(self, keep: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the keep-list of the latents under keep-lists of the codec; empty for all."""
        end = self._end(self.codec, "analysis").module
        for group in self.groups:
            for member in group.members if group.latent == "y" and group.name in keep else ():
                if member.axis == "out" and f"{member.module}.".startswith(f"{end}."):
                    kept = kept_channels(self.groups, keep, member.module, "out", self.latents)
                    return {"y": kept.tolist()}
        return {}

    @property
    def _slices(self) -> Slices:
        """The slices of the network's layers at the width that is set."""
        keep = self._keep(self._width)
        key = f"slices {self._width}"
        if key not in self._found or self._found[key].keep != keep:
            self._found[key] = Slices(self.network, self._groups_and_latents, keep)
        return self._found[key]  # type: ignore[no-any-return]

    @contextmanager
    def active(self, codec: nn.Module) -> Iterator[None]:
        width = self._width
        if not width:
            yield
            return
        attributes = self._slices.overrides(self.network)
        attributes.append((self.network, {"entropy_bottleneck": self.bottlenecks[str(width)]}))
        with override_attributes(attributes):
            yield

    def network_at(self, width: int) -> TemporalEntropyNetwork:
        """Return the network of one width on its own, in evaluation mode.

        Raises:
            CodecError: masks are still on it.
        """
        if self._decay is not None:
            raise CodecError("masks are still on the temporal model: code frames with harden()")
        keep, groups = self._keep(width), self._groups_and_latents
        network: Any = prune(self.network, keep, groups, verify=False)
        if width:
            network.entropy_bottleneck = copy.deepcopy(self.bottlenecks[str(width)])
        found: TemporalEntropyNetwork = network.eval()
        return found

    # -- learning ---------------------------------------------------------------------------------

    @property
    def trains_codec(self) -> bool:
        """True if the codec is trained along; otherwise nothing is but this method."""
        return self.config.image_codec == "trained"

    @property
    def sampling(self) -> ClipSampling:
        config = self.config
        return ClipSampling(config.strides, config.span, config.frames, config.clips)

    def trains(self, name: str) -> bool:
        return self.trains_codec

    def frozen(self) -> list[nn.Parameter]:
        return [] if self.trains_codec else [p for m in self._beside for p in m.parameters()]

    def forward_clips(self, codec: nn.Module, clips: Tensor) -> dict[str, Any]:
        count, learns = clips.shape[:2], self.trains_codec
        with ExitStack() as stack:
            if not learns:
                stack.enter_context(torch.no_grad())
                stack.enter_context(modes_restored(codec))
                codec.eval()
            y = _at_least_float32(self._analysis(codec)(clips.flatten(0, 1))).unflatten(0, count)
            intra = self._intra(codec, clips[:, 0], y[:, 0])
        latents = [_at_least_float32(intra["x_hat"])]
        likelihoods: dict[str, list[Tensor]] = {}
        for t in range(1, count[1]):
            out = self.network(torch.cat((y[:, t], latents[-1].detach()), 1))
            latents.append(_at_least_float32(out["x_hat"]))
            for name, values in out["likelihoods"].items():
                likelihoods.setdefault(name, []).append(values)
        found = {name: torch.cat(values) for name, values in likelihoods.items()}
        if not learns:
            return {"likelihoods": found}
        found |= {f"intra {name}": value for name, value in intra["likelihoods"].items()}
        x_hat = self._synthesis(codec)(torch.stack(latents, 1).flatten(0, 1))
        return {"x_hat": x_hat, "likelihoods": found}

    def objective(self, out: Mapping[str, Any], x: Tensor) -> dict[str, Tensor] | None:
        if self.trains_codec:
            return None
        y = out["likelihoods"]["y"]
        pixels = y.shape[0] * x.shape[-2] * x.shape[-1]
        bits = torch.stack([-v.log2().sum() for v in out["likelihoods"].values()]).sum()
        return {"loss": bits / pixels, "bpp_loss": bits / pixels}

    def aux_loss(self) -> Tensor:
        return torch.stack(
            [self.network.aux_loss(), *(m.loss() for m in self.bottlenecks.values())]  # type: ignore[operator]
        ).sum()

    def update(self, force: bool = False) -> None:
        self.network.update(force=force)
        for bottleneck in self.bottlenecks.values():
            bottleneck.update(force=force)  # type: ignore[operator]

    # -- mask decay of the network ----------------------------------------------------------------

    @property
    def _decay(self) -> Any:
        return self.decays[0] if len(self.decays) else None

    def manually_updated(self) -> list[nn.Parameter]:
        return self._decay.manually_updated() if self._decay is not None else []

    def after_step(self) -> None:
        if self._decay is not None:
            self._decay.after_step()

    @property
    def steps_left(self) -> int:
        return self._decay.steps_left if self._decay is not None else 0

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    def metrics(self) -> dict[str, float]:
        return self._decay.metrics() if self._decay is not None else {}

    def check_ready(self) -> None:
        if self._decay is not None:
            self._decay.check_ready()

    # -- after pruning ----------------------------------------------------------------------------

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return True

    def config_after_pruning(self) -> dict[str, Any]:
        return {**self.config.model_dump(), "mask_decay": None}

    @torch.no_grad()
    def fold(self, codec: nn.Module) -> None:
        if self._decay is not None:
            self._decay.detach(self.network)
            self._decay.fold(self.network)

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, TemporalEntropyModel)
        taken = next((m.extracting for m in self._multi_width), None)
        if taken is not None:
            small: nn.Module = self.network_at(taken)
        else:
            small = self.network
            if self._decay is not None:
                small = prune(small, self._decay.select(), self.network_groups)
            if latents := self._latents_kept(keep):
                small = prune(small, latents, self._groups_and_latents, verify=False)
            _take(other.bottlenecks, self.bottlenecks.state_dict())
        _take(other.network, small.state_dict())
        other._found.clear()

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for name, part in (("network", self.network), ("bottlenecks", self.bottlenecks)):
            start = f"{prefix}{name}."
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            resize(part, own)
        self._found.clear()
        super()._load_from_state_dict(state, prefix, *args)


def _at_least_float32(values: Tensor) -> Tensor:
    """Return what autocast made bfloat16 in float32."""
    return values if values.dtype == torch.float64 else values.float()


def _take(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state, in the shapes that it has."""
    resize(module, state)
    nn.Module.load_state_dict(module, state)
