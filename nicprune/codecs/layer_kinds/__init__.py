"""Knowledge of each type of layer, one file a family. Importing a file registers its kinds. May use
what is below `codecs`.
"""

import importlib
import pkgutil

from nicprune.codecs.layer_kinds.channel_norms import GroupNorm, LayerNorm, OwnNorm
from nicprune.codecs.layer_kinds.convolutions import (
    Convolution,
    DepthwiseConvolution,
    GroupedConvolution,
    MaskedConvolution,
    TransposedConvolution,
)
from nicprune.codecs.layer_kinds.entropy import (
    Bottleneck,
    entropy_models,
    is_bottleneck,
    is_quantile,
)
from nicprune.codecs.layer_kinds.gdn import Affine, Normalisation
from nicprune.codecs.layer_kinds.kind import (
    KINDS,
    Index,
    LayerKind,
    channel_kind,
    index_of,
    kind_of,
    register_kind,
    take,
    widths_of,
)
from nicprune.codecs.layer_kinds.linear import Linear
from nicprune.codecs.layer_kinds.norms import ChannelNorm, PerChannel
from nicprune.codecs.layer_kinds.parameters import holder, layers_of

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "KINDS",
    "Affine",
    "Bottleneck",
    "ChannelNorm",
    "Convolution",
    "DepthwiseConvolution",
    "GroupNorm",
    "GroupedConvolution",
    "Index",
    "LayerKind",
    "LayerNorm",
    "Linear",
    "MaskedConvolution",
    "Normalisation",
    "OwnNorm",
    "PerChannel",
    "TransposedConvolution",
    "channel_kind",
    "entropy_models",
    "holder",
    "index_of",
    "is_bottleneck",
    "is_quantile",
    "kind_of",
    "layers_of",
    "register_kind",
    "take",
    "widths_of",
]
