"""Small codecs whose transforms are called otherwise, or are no modules of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN
from compressai.models import CompressionModel
from helpers import make_telling
from torch import Tensor, nn

N, M = 8, 12


def analysis(colours: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(colours, N, 5, 2, 2), GDN(N), nn.Conv2d(N, N, 5, 4, 2), nn.ReLU(),
        nn.Conv2d(N, M, 5, 2, 2),
    )  # fmt: skip


def synthesis(colours: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(M, N, 4, 4), nn.ReLU(), nn.Conv2d(N, N, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(N, colours, 4, 4),
    )  # fmt: skip


class Hyperprior(CompressionModel):
    """A mean and scale hyperprior; its parts are called by methods."""

    colours = 3
    coded = "as usual"

    def __init__(self) -> None:
        super().__init__()
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)
        self.make()

    def make(self) -> None:
        """Make the layers."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents of an image."""
        raise NotImplementedError

    def decode(self, y: Tensor) -> Tensor:
        """Return the image of latents."""
        raise NotImplementedError

    def make_hyper(self) -> None:
        self.hyper_encoder = nn.Sequential(
            nn.Conv2d(M, N, 3, 1, 1), nn.ReLU(), nn.Conv2d(N, N, 3, 2, 1)
        )
        self.hyper_decoder = nn.Sequential(
            nn.ConvTranspose2d(N, N, 2, 2), nn.ReLU(), nn.Conv2d(N, 2 * M, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.encode(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.hyper_encoder(y))
        scales, means = self.hyper_decoder(z_hat).chunk(2, 1)
        if self.coded == "by keywords":
            y_hat, y_likelihoods = self.gaussian_conditional(inputs=y, scales=scales, means=means)
        elif self.coded == "centred":
            y_hat, y_likelihoods = self.gaussian_conditional(y - means, scales)
            y_hat = y_hat + means
        else:
            y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means)
        return {
            "x_hat": self.decode(y_hat),
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.encode(x)
        z = self.hyper_encoder(y)
        strings = self.entropy_bottleneck.compress(z)
        z_hat = self.entropy_bottleneck.decompress(strings, z.shape[-2:])
        scales, means = self.hyper_decoder(z_hat).chunk(2, 1)
        index = self.gaussian_conditional.build_indexes(scales)
        sent = self.gaussian_conditional.compress(y, index, means=means)
        return {"strings": [sent, strings], "shape": z.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        scales, means = self.hyper_decoder(z_hat).chunk(2, 1)
        index = self.gaussian_conditional.build_indexes(scales)
        y_hat = self.gaussian_conditional.decompress(strings[0], index, means=means)
        return {"x_hat": self.decode(y_hat).clamp_(0, 1)}


class Renamed(Hyperprior):
    """Encoder and decoder, modules by other names."""

    def make(self) -> None:
        self.encoder, self.decoder = analysis(self.colours), synthesis(self.colours)
        self.make_hyper()

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x)
        return out

    def decode(self, y: Tensor) -> Tensor:
        out: Tensor = self.decoder(y)
        return out


class Grey(Renamed):
    """Of images with one channel."""

    colours = 1


class Nested(Hyperprior):
    """Both in a module of their own, which is called on either side with a word."""

    class Transforms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = analysis(), synthesis()

        def forward(self, x: Tensor, what: str) -> Tensor:
            out: Tensor = self.down(x) if what == "down" else self.up(x)
            return out

    def make(self) -> None:
        self.net = self.Transforms()
        self.make_hyper()

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x, "down")
        return out

    def decode(self, y: Tensor) -> Tensor:
        out: Tensor = self.net(y, "up")
        return out


class Flat(Hyperprior):
    """No module is analysis or synthesis: layers of the codec, called one by one; the hyperprior
    begins with a residual of y.
    """

    def make(self) -> None:
        self.down1, self.down2 = nn.Conv2d(3, N, 5, 2, 2), nn.Conv2d(N, N, 5, 4, 2)
        self.down3 = nn.Conv2d(N, M, 5, 2, 2)
        self.up1, self.up2 = nn.ConvTranspose2d(M, N, 4, 4), nn.Conv2d(N, N, 3, padding=1)
        self.up3 = nn.ConvTranspose2d(N, 3, 4, 4)
        self.make_hyper()
        self.residual = nn.Conv2d(M, M, 3, padding=1)
        self.hyper_encoder.register_forward_pre_hook(self._with_residual)

    def _with_residual(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + self.residual(args[0]),)

    def encode(self, x: Tensor) -> Tensor:
        return self.down3(F.relu(self.down2(F.relu(self.down1(x)))))  # type: ignore[no-any-return]

    def decode(self, y: Tensor) -> Tensor:
        return self.up3(F.relu(self.up2(F.relu(self.up1(y)))))  # type: ignore[no-any-return]


class Method(Hyperprior):
    """g_a is a module, g_s a method."""

    def make(self) -> None:
        self.g_a, self.up = analysis(), synthesis()
        self.make_hyper()
        self.M = M

    def g_s(self, y: Tensor) -> Tensor:
        out: Tensor = self.up(y)
        return out

    encode = Renamed.encode
    decode = Renamed.decode

    @property
    def encoder(self) -> nn.Module:
        return self.g_a

    @property
    def decoder(self) -> Callable[[Tensor], Tensor]:
        return self.g_s


class Tokens(Hyperprior):
    """Analysis ends, and synthesis begins, with linear layers on (B, L, C)."""

    def make(self) -> None:
        self.patches, self.last = analysis()[:-1], nn.Linear(N, M)
        self.first, self.rest = nn.Linear(M, N), synthesis()[1:]
        self.make_hyper()

    def encode(self, x: Tensor) -> Tensor:
        y = self.patches(x)[:, :, ::2, ::2]
        tokens = self.last(y.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, y.shape[2:])

    def decode(self, y: Tensor) -> Tensor:
        tokens = self.first(y.flatten(2).transpose(1, 2))
        x = tokens.transpose(1, 2).unflatten(2, y.shape[2:])
        out: Tensor = self.rest(F.interpolate(x, scale_factor=4))
        return out


CODECS: dict[str, type[Hyperprior]] = {
    "renamed": Renamed,
    "nested": Nested,
    "flat": Flat,
    "method": Method,
    "tokens": Tokens,
}

ENDS = {
    "renamed": ("encoder", "decoder"),
    "nested": ("net.down", "net.up"),
    "flat": ("down3", "up1"),
    "method": ("g_a", "up"),
    "tokens": ("last", "first"),
}
"""Where y comes from in each, and where it goes."""


def renamed_codec(name: str) -> Any:
    """A small codec by name, weights that let no mistake hide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_telling((CODECS | {"grey": Grey})[name]())
