"""Narrow versions of every architecture, with weights that let no mistake hide: dense GDN gammas,
biases and medians that are not zero, latents wide enough that bitstreams carry something.
"""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.layers import GDN
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Cheng2020Attention,
    CompressionModel,
    Elic2022Chandelier,
    Elic2022Official,
    FactorizedPrior,
    FactorizedPriorReLU,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from compressai.models.vbr import (
    JointAutoregressiveHierarchicalPriorsVbr,
    MeanScaleHyperpriorVbr,
    ScaleHyperpriorVbr,
)
from torch import Tensor, nn

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Groups
from nicprune.codecs.layer_kinds import is_bottleneck
from nicprune.methods import METHODS

N, M, ELIC_GROUPS = 16, 24, [8, 12, 28]

ARCHITECTURES: dict[str, Callable[[], CompressionModel]] = {
    "bmshj2018-factorized": lambda: FactorizedPrior(N, M),
    "bmshj2018-factorized-relu": lambda: FactorizedPriorReLU(N, M),
    "bmshj2018-hyperprior": lambda: ScaleHyperprior(N, M),
    "mbt2018-mean": lambda: MeanScaleHyperprior(N, M),
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(N, M),
    "cheng2020-anchor": lambda: Cheng2020Anchor(N),
    "cheng2020-attn": lambda: Cheng2020Attention(N),
    "cheng2020-anchor-checkerboard": lambda: Cheng2020AnchorCheckerboard(N),
    "elic2022-official": lambda: Elic2022Official(N, sum(ELIC_GROUPS), list(ELIC_GROUPS)),
    "elic2022-chandelier": lambda: Elic2022Chandelier(N, sum(ELIC_GROUPS), list(ELIC_GROUPS)),
    "bmshj2018-hyperprior-vbr": lambda: ScaleHyperpriorVbr(N, M),
    "bmshj2018-hyperprior-vbr-eb": lambda: ScaleHyperpriorVbr(N, M, vr_entbttlnck=True),
    "mbt2018-mean-vbr": lambda: MeanScaleHyperpriorVbr(N, M),
    "mbt2018-mean-vbr-eb": lambda: MeanScaleHyperpriorVbr(N, M, vr_entbttlnck=True),
    "mbt2018-vbr": lambda: JointAutoregressiveHierarchicalPriorsVbr(N, M),
}
"""Every image architecture of CompressAI; `-eb`: with the variable-rate entropy bottleneck."""

GROUP_COUNTS = {
    "bmshj2018-factorized": 7,
    "bmshj2018-factorized-relu": 7,
    "bmshj2018-hyperprior": 12,
    "mbt2018-mean": 12,
    "mbt2018": 16,
    "cheng2020-anchor": 33,
    "cheng2020-attn": 81,
    "cheng2020-anchor-checkerboard": 33,
    "elic2022-official": 114,  # 112, with y split into its three channel groups
    "elic2022-chandelier": 114,
    "bmshj2018-hyperprior-vbr": 12,
    "bmshj2018-hyperprior-vbr-eb": 12,
    "mbt2018-mean-vbr": 12,
    "mbt2018-mean-vbr-eb": 12,
    "mbt2018-vbr": 16,
}


NORMS = (nn.modules.batchnorm._NormBase, nn.PReLU, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_telling(codec: nn.Module, seed: int = 0) -> nn.Module:
    """Fill in weights that show every mistake, in place."""
    generator = torch.Generator().manual_seed(seed)

    def rand(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator)

    with torch.no_grad():
        for module in codec.modules():
            if isinstance(module, GDN):
                width = module.beta.numel()
                module.beta.copy_(module.beta_reparam.init(0.5 + rand((width,))))
                size = 0.001 if module.inverse else 0.1
                module.gamma.copy_(
                    module.gamma_reparam.init(size * torch.eye(width) + size * rand((width, width)))
                )
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                fan = (
                    module.weight[0].numel()
                    if not isinstance(module, nn.ConvTranspose2d)
                    else module.weight[:, 0].numel() / module.stride[0] ** 2
                )
                module.weight.copy_((rand(module.weight.shape) - 0.5) * 3.4 / fan**0.5)
                if module.bias is not None:
                    module.bias.copy_((rand(module.bias.shape) - 0.5) * 0.4)
            elif isinstance(module, NORMS):
                for value in (*module.parameters(), *module.buffers()):
                    if value.is_floating_point():
                        value.copy_(0.5 + rand(value.shape))
            elif is_bottleneck(module):
                module.quantiles[:, 0, 1] = rand((module.channels,)) * 2 - 1
                for name, parameter in module.named_parameters():
                    if "quantiles" not in name:
                        parameter.add_((rand(parameter.shape) - 0.5) * 0.2)
    with torch.no_grad():
        for transform in ("g_a", "h_a"):
            stage = getattr(codec, transform, None)
            if stage is None and hasattr(codec, "latent_codec"):
                stage = next((m for n, m in codec.named_modules() if n.endswith("h_a")), None)
            if stage is None:
                continue
            seen: list[float] = []
            handle = stage.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(float(out.std()))
            )
            with torch.random.fork_rng():
                codec.eval()(image(codec, 1))
            handle.remove()
            last = [m for m in stage.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
            # ELIC ends in an attention block: scale what enters it.
            if transform == "g_a" and hasattr(list(stage.children())[-1], "conv_b"):
                last = list(stage.children())[-2]
            last.weight.mul_(5 / max(seen[0], 1e-6))
            if last.bias is not None:
                last.bias.mul_(5 / max(seen[0], 1e-6))
    return codec.eval()


def image(codec: nn.Module, seed: int = 0, size: int = 64) -> Tensor:
    """A picture of noise in the codec's type."""
    dtype = next(codec.parameters()).dtype
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


_built: dict[str, tuple[nn.Module, Groups]] = {}


def built(name: str) -> tuple[nn.Module, Groups]:
    """A codec of one architecture and its groups; the codec is a copy of the test's own."""
    if name not in _built:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(sorted(ARCHITECTURES).index(name))
            codec = make_telling(ARCHITECTURES[name]())
        _built[name] = codec, find_groups(codec)
    codec, groups = _built[name]
    return copy.deepcopy(codec), groups


def offer_tiny_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes name a small codec, `tiny_codecs:make`."""
    module = types.SimpleNamespace(make=lambda quality: built("bmshj2018-hyperprior")[0])
    monkeypatch.setitem(sys.modules, "tiny_codecs", module)


def random_keep(
    groups: Groups, seed: int, *, latents: bool = True, minimal: bool = False
) -> dict[str, list[int]]:
    """Random keep-lists of random widths; `minimal`: every width as small as it may be."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups.prunable(latents=latents):
        least = 2 if group.latent else 1
        width = least if minimal else int(rng.integers(least, group.width + 1))
        keep[group.name] = sorted(rng.choice(group.width, width, replace=False).tolist())
    return keep


def state_of(codec: nn.Module) -> dict[str, Tensor]:
    """An independent copy of a codec's state dict."""
    return {key: value.detach().clone() for key, value in codec.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(
        first[k].shape == second[k].shape and torch.equal(first[k], second[k]) for k in first
    )


def hook_count(codec: nn.Module) -> int:
    """How many hooks a codec's modules carry."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in codec.modules()
    )


QUICK_FIT: dict[str, Any] = {
    "batch_size": 2,
    "patch_size": 64,
    "lr": 1e-3,
    "lmbda": 0.01,
    "precision": "32",
    "accelerator": "cpu",
    "progress": False,
}
"""Settings of `fit` for a few exact steps on a CPU."""

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "mask_decay": {"budget": {"macs": 0.5}, "round_to": 1, "decay_steps": 6},
    "group_lasso": {"budget": {"macs": 0.5}, "round_to": 1, "decay_steps": 6},
    "magnitude": {"budget": {"macs": 0.5}, "round_to": 1},
    "random": {"budget": {"macs": 0.5}, "round_to": 1},
    "fisher": {"budget": {"macs": 0.5}, "round_to": 1},
    "netadapt": {"budget": {"macs": 0.5}, "round_to": 1, "rounds": 2},
    "none": {},
    "slimmable": {"widths": [1.0, 0.5, 0.25], "round_to": 1, "gdn": "slim+", "latents": "fixed"},
    "adaptation": {"form": "low_rank"},
    "scalable_encoder": {"encoders": 2, "share": 0.3, "round_to": 1, "decay_steps": 8},
    "temporal_entropy_model": {"image_codec": "trained", "round_to": 1},
    "distillation": {
        "output": 0.5,
        "latent": 0.1,
        "features": 1.0,
        "weights": "entropy",
        "stages": "adaptive",
    },
    # As many channels as possible are frozen: what gates themselves do is in test_gating.py.
    "channel_gating": {"alpha": 1.0, "gating_steps": 6, "round_to": 1, "freeze": 0.6},
    **{name: {"qualities": [1, 2, 3]} for name in METHODS if METHODS[name].rates_field},
}
"""Settings that attach each method to a narrow codec; a new method adds its own if it needs any."""

TESTS = Path(__file__).parent
"""This folder, for scripts that run in a process of their own."""
