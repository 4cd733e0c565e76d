"""Cost of a codec: MACs and parameters per transform, counted once, then exact arithmetic for
every keep-list.

MACs are fvcore's: a multiply-add of a convolution or a matrix product is one, GDN is counted as the
1x1 convolution that it runs; resampling, pooling and norms are not counted (see `operators`). MACs
of convolutions scale exactly with the area, so one count at 64x64 stands for every size that is a
multiple of 64. Layers behind a mean over all pixels, as in squeeze-and-excitation, run once an
image; products of attention over all pixels grow with the square of the area.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from nicprune.channels.groups import Groups, ProductShares
from nicprune.codecs.anatomy import (
    TRANSFORMS,
    check_codec,
    check_output,
    forward_for_analysis,
    unwrap,
)
from nicprune.codecs.example import example_image, image_shape
from nicprune.codecs.hooks import without_hooks
from nicprune.codecs.layer_kinds.kind import LayerKind, channel_kind, kinds_in
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.provenance import provenance
from nicprune.codecs.replaced_forward import own_forwards
from nicprune.codecs.roles import sides_of_modules, transforms_in
from nicprune.common.config import cut
from nicprune.common.errors import CodecError, first_line
from nicprune.pruning.coding_only import run_by_coding_only
from nicprune.pruning.operators import (
    HANDLES,
    count_functions,
    uncounted,
    without_fused_attention,
)
from nicprune.pruning.totals import AREA, Totals

COUNTER = "fvcore"

NEGLIGIBLE = 0.02
"""Share of a codec's MACs below which it is not said that layers are left out: the variable-rate
codecs of CompressAI correct each latent by a small network when they code.
"""


class _Forward(nn.Module):
    def __init__(self, codec: nn.Module):
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> list[Tensor]:
        out = forward_for_analysis(self.codec, x)
        check_output(self.codec, out)
        return [out["x_hat"], *out["likelihoods"].values()]


def count_modules(codec: nn.Module) -> dict[str, int]:
    """Count the MACs of every module with fvcore, on the image that `example_image` returns (64x64
    pixels for most codecs); "" is the whole codec.

    Warns if an operator runs that may multiply and accumulate and that is not counted, and if
    coding runs layers that the forward pass does not.
    """
    image = example_image(codec)
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    try:
        # Masks are not the codec's work, and fvcore cannot trace them.
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            without_hooks(codec),
            own_forwards(codec),
            without_fused_attention(),
            left_as_it_was(codec),
        ):
            codec.eval()
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)
            analysis = FlopCountAnalysis(_Forward(codec).eval(), image).set_op_handle(**HANDLES)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(
                False
            ).tracer_warnings("none")
            missing = uncounted(count_functions(analysis))
            counts = analysis.by_module()
            uncalled = {name.removeprefix("codec.") for name in analysis.uncalled_modules()}
            unseen = run_by_coding_only(codec, image, uncalled)
    except CodecError:
        raise
    except Exception as error:  # a foreign codec's own code, or torch.jit, may raise anything
        raise CodecError(
            f"MACs of {type(codec).__name__} cannot be counted: fvcore traces the forward pass with"
            f" torch.jit, which fails: {first_line(error)}. Known to fail: torch.utils.checkpoint"
            " with use_reentrant=True (False works)"
        ) from error
    finally:
        logger.setLevel(level)
    if missing:
        warnings.warn(
            f"MACs of {', '.join(missing)} in {type(codec).__name__} are not counted", stacklevel=2
        )
    if sum(unseen.values()) > NEGLIGIBLE * counts[""]:
        warnings.warn(
            f"MACs of {cut(', '.join(unseen), 200)} in {type(codec).__name__} are not counted: the"
            " forward pass, whose MACs are counted, does not run them; coding does",
            stacklevel=2,
        )
    found = {
        name.removeprefix("codec").removeprefix("."): int(n)
        for name, n in counts.items()
        if name.startswith("codec")
    }
    found[""] = int(counts[""])
    return found


def _own_counts(counts: Mapping[str, int], codec: nn.Module) -> dict[str, int]:
    """Return the MACs of each module itself, without its parts."""
    own = dict(counts)
    for name, _ in codec.named_modules():
        if name and name in counts:
            parent = name.rpartition(".")[0]
            while parent and parent not in counts:
                parent = parent.rpartition(".")[0]
            own[parent] -= counts[name]
    return own


def _within_layers(
    codec: nn.Module,
    counts: Mapping[str, int],
    layers: Sequence[tuple[str, nn.Module]],
    kinds: Mapping[str, LayerKind],
    groups: Groups,
) -> tuple[dict[str, int], dict[str, int], dict[str, str], list[ProductShares]]:
    """Divide the MACs of layers that multiply weights of others (see `LayerKind.parts`).

    Returns:
        The MACs of every layer; what no weight accounts for, by layer; for the layers concerned,
        the one that runs them; and products, where some output channels are multiplied more often
        than others: queries of another length than keys.
    """
    own, rests, runs = dict(counts), {}, {}
    uneven: list[ProductShares] = []
    modules = dict(layers)
    holding = {name: kinds[name] for name, module in layers if kinds[name].parts(module)}
    calls = _calls(codec, holding)
    for name, kind in holding.items():
        followed = sum(s.macs for s in groups.products if s.module == name)
        rests[name] = counts.get(name, 0) - followed
        runs[name] = name
        times: dict[str, list[int]] = {}
        for args, kwargs in calls[name]:
            for part, blocks in kind.times(modules[name], args, kwargs).items():
                known = times.setdefault(part, [0] * len(blocks))
                times[part] = [a + b for a, b in zip(known, blocks, strict=True)]
        for part, total in times.items():
            one, count = f"{name}.{part}" if part else name, len(total)
            out, inn = kinds[one].widths(modules[one])
            least, size = min(total), out // count * inn
            runs[one], own[one] = name, least * out * inn
            rests[name] -= sum(total) * size
            if more := sum(total) - least * count:
                shares = _share(groups, one, "out", count), _share(groups, one, "in", 1)
                uneven.append(ProductShares(name, more * size, (out // count, inn), shares))
    return own, rests, runs, uneven


def _share(groups: Groups, layer: str, axis: str, blocks: int) -> dict[str, int]:
    """Return how many channels of one of equal blocks of a layer's axis go with one of a group."""
    return {
        group.name: member.index.shape[1] // blocks
        for group in groups
        for member in group.members
        if member.module == layer and member.axis in (axis, "both")
    }


def _calls(codec: nn.Module, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return the arguments of every call of these layers on the codec's own image."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    if not found:
        return found
    handles = [
        codec.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
        )
        for name, seen in found.items()
    ]
    try:
        with torch.no_grad(), without_hooks(codec), own_forwards(codec), left_as_it_was(codec):
            forward_for_analysis(codec.eval(), example_image(codec))
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(codec: nn.Module) -> Totals:
    """Count a codec as it is, with fvcore.

    Args:
        codec: a codec, or one with methods attached: it is counted at the width or domain that is
            set, and the methods' parameters in use there, such as masks, count as well.

    Raises:
        CodecError: not a codec.
    """
    check_codec(bare := unwrap(codec))
    if codec is not bare:
        attached: Any = codec
        return attached.totals()  # type: ignore[no-any-return]
    return CostModel(codec, Groups([])).totals()


@dataclass(frozen=True)
class _Terms:
    """A quantity as sum(product * out * in) + sum(linear * out) + constant over layers; all
    integers.
    """

    product: np.ndarray
    linear: np.ndarray
    constant: int

    def total(self, out: np.ndarray, inn: np.ndarray) -> int:
        return int(self.product @ (out * inn) + self.linear @ out) + self.constant

    def decrease(
        self, out: np.ndarray, inn: np.ndarray, d_out: np.ndarray, d_in: np.ndarray
    ) -> np.ndarray:
        """Return how much less it is when each group alone narrows: d_out and d_in are (layers,
        groups).
        """
        return (
            (self.product * inn + self.linear) @ d_out
            + (self.product * out) @ d_in
            - self.product @ (d_out * d_in)
        )


class CostModel:
    """Exact MACs and parameters of every keep-list of one codec.

    Args:
        codec: counted once, as it is now.
        groups: its channel groups.
        counts: MACs of its modules, as `count_modules` returns them, where they are known.

    Attributes:
        original: the cost that budgets are relative to.
        base: whose cost it is, in messages.

    Raises:
        CodecError: a layer's count is not the product of its widths (it would be wrong after
            pruning).
    """

    base: ClassVar[str] = "the original"

    def __init__(self, codec: nn.Module, groups: Groups, counts: Mapping[str, int] | None = None):
        self.groups = groups
        self.names = [g.name for g in groups]
        counts = count_modules(codec) if counts is None else counts
        self._pixels = image_shape(codec)[1] ** 2
        modules = layers_of(codec)
        named = dict.fromkeys(m.module for group in groups for m in group.members)
        kinds = {name: kind for name, kind in kinds_in(codec).items() if kind.has_channels}
        kinds |= {name: channel_kind(modules[name]) for name in named if name not in kinds}
        layers = [(name, modules[name]) for name in kinds]
        self._row = row = {name: i for i, (name, _) in enumerate(layers)}
        own, rests, runs, uneven = _within_layers(codec, counts, layers, kinds, groups)
        products = (*groups.products, *uneven)
        n, k = len(layers) + len(products), len(groups)
        self._share_out, self._share_in = np.zeros((n, k), np.int64), np.zeros((n, k), np.int64)
        for column, group in enumerate(groups):
            for member in group.members:
                if member.axis != "in":
                    self._share_out[row[member.module], column] += member.index.shape[1]
                if member.axis != "out":
                    once = kinds[member.module].inputs_at_once(modules[member.module])
                    self._share_in[row[member.module], column] += member.index.shape[1] // once
        for i, shared in enumerate(products, len(layers)):
            for shares, share in zip(
                (self._share_out, self._share_in), shared.shares, strict=False
            ):
                for name, count in share.items():
                    shares[i, self.names.index(name)] += count
        self._full = np.array([g.width for g in groups], np.int64)
        widths = [
            (out, inn // kinds[name].inputs_at_once(m))
            for name, m in layers
            for out, inn in [kinds[name].widths(m)]
        ]
        widths += [product.widths for product in products]
        out, inn = (np.array([w[side] for w in widths], np.int64).reshape(n) for side in (0, 1))
        self._rest_out, self._rest_in = (
            out - self._share_out @ self._full,
            inn - self._share_in @ self._full,
        )

        product, linear = np.zeros(n, np.int64), np.zeros(n, np.int64)
        product_params, linear_params = np.zeros(n, np.int64), np.zeros(n, np.int64)
        remaining: dict[str, int] = {}
        for i, (name, module) in enumerate(layers):
            target, divisor = (
                (product, out[i] * inn[i]) if kinds[name].is_product(module) else (linear, out[i])
            )
            target[i], remainder = divmod(own.get(name, 0), int(divisor))
            if remainder and not (self._share_out[i].any() or self._share_in[i].any()):
                # No group has it: it stays as it is, with what else is run inside its call.
                target[i] = 0
                remaining[name] = own[name]
            elif remainder:
                raise CodecError(
                    f"the MACs of {name} are not a multiple of its widths; they cannot be predicted"
                )
            product_params[i], linear_params[i] = kinds[name].parameter_terms(module)
        for i, shared in enumerate(products, len(layers)):
            product[i] = shared.macs // (out[i] * inn[i])
        # What no layer of a known kind does is constant: its channels are unprunable.
        constants = {n: m for n, m in _own_counts(counts, codec).items() if n not in row and m}
        constants |= {name: rest for name, rest in rests.items() if rest} | remaining
        for shared in products:
            if shared.module not in runs:
                constants[shared.module] = constants.get(shared.module, 0) - shared.macs
        names = [name for name, _ in layers] + [shared.module for shared in products]
        transforms = transforms_in(codec, [*names, *constants])
        self._transforms = [transforms[name] for name in names]
        owners = [runs.get(name, name) for name in names]
        costly = [name for i, name in enumerate(owners) if product[i] or linear[i]]
        sides = sides_of_modules(codec, [*costly, *constants])
        encodes, decodes = (
            np.array([sides.get(name, (1, 1))[i] for name in owners], np.int64) for i in (0, 1)
        )
        other = [sum(constants.values())]
        other += [sum(macs for name, macs in constants.items() if sides[name][i]) for i in (0, 1)]
        self._constants: dict[str, int] = {}
        for name, macs in constants.items():
            transform = transforms[name]
            self._constants[transform] = self._constants.get(transform, 0) + macs
        other_params = sum(p.numel() for p in codec.parameters()) - int(
            (product_params * out * inn + linear_params * out).sum()
        )
        self._terms = {
            "macs": _Terms(product, linear, other[0]),
            "encoder": _Terms(product * encodes, linear * encodes, other[1]),
            "decoder": _Terms(product * decodes, linear * decodes, other[2]),
            "params": _Terms(product_params, linear_params, other_params),
        }
        self._full_totals = self.totals()
        record = provenance(codec)
        self.original = Totals(**record.original) if record.original else self._full_totals  # type: ignore[arg-type]

    def _layer_widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._rest_out + self._share_out @ widths, self._rest_in + self._share_in @ widths

    def widths(self, keep: Mapping[str, Sequence[int] | int] | None = None) -> np.ndarray:
        """Turn keep-lists, or plain widths by name, into a width for every group."""
        widths = self._full.copy()
        for name, kept in (keep or {}).items():
            self.groups[name]
            widths[self.names.index(name)] = (
                kept if isinstance(kept, (int, np.integer)) else len(kept)
            )  # type: ignore[arg-type]
        return widths

    def totals(self, keep: Mapping[str, Sequence[int] | int] | np.ndarray | None = None) -> Totals:
        """Return the cost with these keep-lists (or widths); groups not named are whole."""
        widths = keep if isinstance(keep, np.ndarray) else self.widths(keep)
        out, inn = self._layer_widths(widths)
        found = {name: terms.total(out, inn) for name, terms in self._terms.items()}
        return Totals(
            **{
                name: value if name == "params" else value * AREA // self._pixels
                for name, value in found.items()
            }
        )

    def history(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return what the history of a codec pruned to these keep-lists says beside MACs."""
        return {}

    def _scale(self, what: str) -> float:
        """Return what counts on the codec's own image are multiplied by to be those of 64x64
        pixels.
        """
        return 1 if what == "params" or self._pixels == AREA else AREA / self._pixels

    def soft(self, widths: np.ndarray, what: str = "macs") -> float:
        """Return the same for widths that are not whole, as while masks decay."""
        out, inn = (
            self._rest_out + self._share_out @ widths,
            self._rest_in + self._share_in @ widths,
        )
        terms = self._terms[what]
        total = float(terms.product @ (out * inn) + terms.linear @ out) + terms.constant
        return total * self._scale(what)

    def grown(
        self,
        added: np.ndarray,
        whole: Iterable[str] = (),
        added_up: Iterable[str] = (),
        into: Iterable[str] = (),
        what: str = "macs",
    ) -> Any:
        """Return what it costs where channel groups have so many further channels, which new layers
        compute from all channels; a layer's own outputs read its own inputs alone.

        Args:
            added: for each group, shape (groups,), or (groups, cases) for several cases at once;
                whole numbers, or not, as while masks decay.
            whole: layers that run as one convolution, zeros included.
            added_up: layers whose own outputs a new layer computes once more, where there are new
                inputs.
            into: layers whose own outputs read new inputs too, through a new layer without a bias.
            what: "macs", "encoder", "decoder" or "params".

        Returns:
            A number for each case, as `totals` counts: a scalar, or shape (cases,).
        """
        out, inn = self._layer_widths(self._full)
        if added.ndim == 2:
            out, inn = out[:, None], inn[:, None]
        more_out, more_in = self._share_out @ added, self._share_in @ added
        again = np.zeros_like(out)
        again[[self._row[name] for name in added_up]] = 1
        more_out = more_out + again * (more_in > 0) * out
        pairs = out * inn + more_out * (inn + more_in)
        for row in (self._row[name] for name in into):
            pairs[row] += out[row] * more_in[row]
        if what != "params":  # the zeros are computed with, and not kept
            for row in (self._row[name] for name in whole):
                pairs[row] += out[row] * more_in[row]
        terms = self._terms[what]
        total = terms.product @ pairs + terms.linear @ (out + more_out) + terms.constant
        if self._scale(what) == 1:
            return total
        return (
            total * AREA // self._pixels if total.dtype.kind == "i" else total * self._scale(what)
        )

    def with_fewer(
        self,
        inputs: Mapping[str, float],
        outputs: Mapping[str, float],
        keep: Mapping[str, Sequence[int] | int] | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return MACs where the layers named compute with so many input channels only, or so many
        outputs (on average, say), others with all they have.

        Returns ("macs", "encoder", "decoder") by name, and the MACs of each transform.
        """
        out, inn = self._layer_widths(self.widths(keep))
        out, inn = out.astype(float), inn.astype(float)
        for widths, given in ((inn, inputs), (out, outputs)):
            for name, channels in given.items():
                widths[self._row[name]] = channels
        found = {}
        for what in ("macs", "encoder", "decoder"):
            terms = self._terms[what]
            total = float(terms.product @ (out * inn) + terms.linear @ out) + terms.constant
            found[what] = total * self._scale(what)
        terms, by_transform = self._terms["macs"], dict.fromkeys(self._transforms, 0.0)
        for i, transform in enumerate(self._transforms):
            by_transform[transform] += self._scale("macs") * float(
                terms.product[i] * out[i] * inn[i] + terms.linear[i] * out[i]
            )
        return found, by_transform

    def per_input(self, name: str) -> int:
        """Return the MACs that one input channel of a layer costs."""
        out, _ = self._layer_widths(self._full)
        return int((self._terms["macs"].product * out)[self._row[name]] * self._scale("macs"))

    def per_output(self, name: str) -> int:
        """Return the MACs that one output channel of a layer costs."""
        _, inn = self._layer_widths(self._full)
        return int((self._terms["macs"].product * inn)[self._row[name]] * self._scale("macs"))

    def decreases(self, widths: np.ndarray, deltas: np.ndarray, what: str) -> np.ndarray:
        """Return how much less `what` is if each group alone lost `deltas` channels."""
        out, inn = self._layer_widths(widths)
        found = self._terms[what].decrease(
            out, inn, self._share_out * deltas, self._share_in * deltas
        )
        return found if self._scale(what) == 1 else found * self._scale(what)

    def per_channel(self, what: str = "macs") -> np.ndarray:
        """Return what one channel of each group costs in the whole codec, the average over removing
        it all.
        """
        share = self.decreases(self._full, np.ones_like(self._full), what).astype(float)
        return np.maximum(share, 1.0)

    def by_transform(
        self, keep: Mapping[str, Sequence[int] | int] | None = None
    ) -> dict[str, tuple[int, int]]:
        """Return (MACs at 64x64, params) of each transform."""
        out, inn = self._layer_widths(self.widths(keep))
        table: dict[str, tuple[int, int]] = {}
        for i, transform in enumerate(self._transforms):
            macs, params = table.get(transform, (0, 0))
            table[transform] = tuple(  # type: ignore[assignment]
                before + int(t.product[i] * out[i] * inn[i] + t.linear[i] * out[i])
                for before, t in ((macs, self._terms["macs"]), (params, self._terms["params"]))
            )
        for transform, constant in self._constants.items():
            macs, params = table.get(transform, (0, 0))
            table[transform] = (macs + constant, params)
        if rest := self._terms["params"].constant:
            macs, params = table.get("other", (0, 0))
            table["other"] = (macs, params + rest)
        if self._pixels != AREA:
            table = {name: (m * AREA // self._pixels, p) for name, (m, p) in table.items()}
        order = [*TRANSFORMS, "other"]
        return {name: table[name] for name in sorted(table, key=order.index) if any(table[name])}
