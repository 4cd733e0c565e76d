"""Small residual layers behind the convolutions of g_s; all else stays as it is, and so do the
bitstreams of both domains (Presta et al., "Domain Adaptation for Learned Image Compression with
Supervised Adapters", 2024, arXiv 2404.15591, where a gate mixes adapters of several domains; here
the file says the domain). With y the output of a convolution,

    y + up(relu(down(y))),

`down` a 3x3 convolution to few channels, `up` a 1x1 convolution that starts at zero.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nicprune.codecs.layer_kinds.adapter import Adapter
from nicprune.codecs.layer_kinds.kind import kinds_in
from nicprune.codecs.roles import on_side
from nicprune.common.errors import CodecError
from nicprune.methods.adaptation.form import Form, Overrides


class DecoderAdapter(Form):
    """Adapters behind the convolutions of the synthesis."""

    def build(self) -> None:
        codec = self.codec
        modules, kinds = dict(codec.named_modules()), kinds_in(codec)
        self.names = [
            name
            for name, kind in kinds.items()
            if kind.convolution and on_side(codec, name, "decoder")
        ]
        if not self.names:
            raise CodecError(
                f"{type(codec).__name__} has no convolution that runs when decoding alone"
            )
        self.adapters = nn.ModuleList(
            Adapter(kinds[name].widths(modules[name])[0], self.config.hidden) for name in self.names
        )

    def overrides(self, codec: Any) -> Overrides:
        return [
            (layer := codec.get_submodule(name), {"forward": _Adapted(layer, adapter)})
            for name, adapter in zip(self.names, self.adapters, strict=True)
        ]


class _Adapted:
    """A layer's forward pass with an adapter behind it."""

    def __init__(self, layer: nn.Module, adapter: nn.Module):
        self.layer, self.adapter = layer, adapter

    def __call__(self, *args: Any) -> Any:
        return self.adapter(type(self.layer).forward(self.layer, *args))
