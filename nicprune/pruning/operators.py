"""Operators of torch that multiply and accumulate, and how much: those that fvcore has no handle
for, those that it counts and that do not, and those that nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import (
    addmm_flop_jit,
    bmm_flop_jit,
    conv_flop_jit,
    linear_flop_jit,
    matmul_flop_jit,
)

from nicprune.channels.ops import BREAKS_ZERO, KEEPS_ZERO

ELEMENTWISE = (
    "aten::batch_norm",
    "aten::group_norm",
    "aten::layer_norm",
    "aten::instance_norm",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::adaptive_avg_pool2d",
    "aten::grid_sampler",
)
"""Operators that fvcore counts by the element. They are not multiply-adds of a convolution or a
matrix product, and `torch.utils.flop_counter` does not count them: neither are they counted here.
"""


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """A convolution whose padding is "same" or "valid"."""
    weight = _shape(inputs[1])
    return _product(_shape(outputs[0])) * _product(weight[1:])


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """`F.scaled_dot_product_attention`: q k^T, and its product with v."""
    query, key, value = (_shape(i) for i in inputs[:3])
    return _product(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _added_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """`baddbmm` and `addmv`: what is added, then the two factors."""
    return _product(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _vector(inputs: list[Any], outputs: list[Any]) -> int:
    return _product(_shape(inputs[0]))


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """A product of two operands: the sizes of all letters. Of more, one after the other."""
    parts, _, result = inputs[0].toIValue().replace(" ", "").partition("->")
    shapes = [_shape(operand) for operand in inputs[1].node().inputs()]
    letters = parts.split(",")
    sizes: dict[str, int] = {}
    for part, shape in zip(letters, shapes, strict=True):
        for letter, size in zip(part, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    total, left = 0, set(letters[0])
    for i, part in enumerate(letters[1:], 1):
        total += _product(sizes[letter] for letter in left | set(part))
        left = (left | set(part)) & set("".join([*letters[i + 1 :], result]))
    return total


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


FUNCTION = "prim::PythonOp."
"""Prefix by which fvcore names a `torch.autograd.Function`."""

HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    **dict.fromkeys(ELEMENTWISE, _nothing),
    "aten::_convolution_mode": _convolution_mode,
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
    "aten::baddbmm": _added_matmul,
    "aten::addmv": _added_matmul,
    "aten::mv": _vector,
    "aten::dot": _vector,
    FUNCTION + "LowerBoundFunction": _nothing,  # in every hyperprior: saves it a second trace
}
"""Handles that are set on fvcore's counter."""

IN_FUNCTIONS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "aten::_convolution": conv_flop_jit,
    "aten::convolution": conv_flop_jit,
    "aten::linear": linear_flop_jit,
    "aten::addmm": addmm_flop_jit,
    "aten::matmul": matmul_flop_jit,
    "aten::bmm": bmm_flop_jit,
    **HANDLES,
}
"""Handles for operators in `torch.autograd.Function`s: also those that the counter has itself."""

COUNTS_NOTHING = set(
    "cartesian_prod combinations tril_indices triu_indices logspace scalar_tensor randint randperm"
    " equal unique_consecutive _unique2 isin count_nonzero nansum nanmean median kthvalue cummax"
    " cummin diff trace numpy_T adaptive_avg_pool3d avg_pool3d max_pool3d upsample_nearest3d"
    " upsample_trilinear3d view reshape permute transpose t expand expand_as repeat"
    " repeat_interleave tile cat stack"
    " split split_with_sizes chunk tensor_split unbind select slice index index_select index_put"
    " index_put_ index_fill_ gather scatter take narrow unfold roll flip rot90 pad constant_pad_nd"
    " reflection_pad2d replication_pad2d flatten unflatten squeeze unsqueeze contiguous clone"
    " copy_ to type_as detach movedim pixel_shuffle pixel_unshuffle channel_shuffle"
    " swapaxes native_channel_shuffle zeros zeros_like ones ones_like empty empty_like full"
    " full_like new_zeros new_ones new_empty new_full arange linspace rand rand_like randn"
    " randn_like uniform_ normal_ bernoulli_ fill_ zero_ eye meshgrid size numel dim item Int"
    " Float Bool ScalarImplicit is_floating sum mean amax amin max min any all prod var std"
    " var_mean norm linalg_vector_norm cumsum cumprod argmax argmin sort topk softmax log_softmax"
    " _softmax logsumexp glu where masked_fill masked_fill_ masked_select nonzero searchsorted"
    " bucketize one_hot embedding dropout dropout_ feature_dropout alpha_dropout avg_pool2d"
    " max_pool2d max_pool2d_with_indices adaptive_max_pool2d avg_pool1d max_pool1d"
    " adaptive_avg_pool1d upsample_bicubic2d upsample_nearest1d upsample_linear1d"
    " _upsample_bilinear2d_aa _upsample_bicubic2d_aa prelu _prelu_kernel rms_norm im2col col2im"
    " tril triu diag diagonal broadcast_tensors broadcast_to result_type requires_grad_ alias real"
    " unsqueeze_ squeeze_ lift_fresh detach_ view_as reshape_as ravel hsplit ceil_divide".split()
)
"""Operators that move values, make them, or reduce or change each of them."""


class OwnFunctions:
    """A handle of `torch.autograd.Function`s, each of which torch.jit takes as one operator: the
    sum of what its forward pass runs. It is called in the order of the graph.

    The graph lists the functions within one once more, behind it. These are counted with it.

    Attributes:
        operators: operators in them that have no handle.
    """

    def __init__(self) -> None:
        self.operators: set[str] = set()
        self._within: list[str] = []

    def __call__(self, inputs: list[Any], outputs: list[Any]) -> int:
        node = outputs[0].node()
        if self._within and self._within[0] == node.pyname():
            self._within.pop(0)
            return 0
        if "Subgraph" not in node.attributeNames():
            self.operators.add(FUNCTION + node.pyname())
            return 0
        inner = list(node.g("Subgraph").nodes())
        names = [one.pyname() for one in inner if one.kind() == "prim::PythonOp"]
        self._within = [name for name in names if FUNCTION + name not in HANDLES]
        return sum(map(self._of_node, inner))

    def _of_node(self, node: Any) -> int:
        if node.kind() not in IN_FUNCTIONS:
            self.operators.add(node.kind())
            return 0
        found: Any = IN_FUNCTIONS[node.kind()](list(node.inputs()), list(node.outputs()))
        return int(sum(found.values())) if isinstance(found, Mapping) else int(found)


def count_functions(analysis: FlopCountAnalysis) -> list[str]:
    """Let the counter go into functions that it knows nothing of; return operators without a
    handle, those of functions too.
    """
    analysis.total()
    missing = set(analysis.unsupported_ops())
    unknown = {name for name in missing if name.startswith(FUNCTION)}
    if not unknown:
        return sorted(missing)
    functions = OwnFunctions()
    analysis.set_op_handle(**dict.fromkeys(unknown, functions))
    analysis.total()
    return sorted(missing - unknown | functions.operators)


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Let `nn.MultiheadAttention` run as linear layers and products inside the block: they have
    handles, the fused operator has none.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def uncounted(operators: Iterable[str]) -> list[str]:
    """Return those of the operators without a handle that may multiply and accumulate: all but
    movements, reductions and what works on each element by itself. Of operators of other libraries,
    nobody knows.
    """
    found = []
    for name in operators:
        space, _, plain = name.partition("::")
        if name in HANDLES or (space == "prim" and not name.startswith(FUNCTION)):
            continue
        if space != "aten":
            found.append(name.removeprefix(FUNCTION))
            continue
        if {plain, plain.rstrip("_")} & (COUNTS_NOTHING | KEEPS_ZERO | BREAKS_ZERO):
            continue
        packet = getattr(torch.ops.aten, plain, None)
        tags = [getattr(packet, o).tags for o in packet.overloads()] if packet is not None else []
        if not any(torch.Tag.pointwise in t for t in tags):
            found.append(plain)
    return sorted(found)
