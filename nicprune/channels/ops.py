"""Tables of what torch's operations do to channels, and readers of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# How an operation treats a channel that is zero: it stays zero, or it does not.
KEEPS_ZERO = set(
    "pow abs neg relu relu6 leaky_relu silu gelu tanh sin sqrt square round floor ceil trunc sign"
    " clone contiguous detach to float double half bfloat16 type hardtanh dropout elu celu"
    " selu mish hardswish erf expm1 log1p positive requires_grad data nan_to_num interpolate"
    " upsample avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d pad zero clamp clip"
    " softsign tan sinh asinh arcsinh atan arctan asin arcsin dropout1d dropout2d dropout3d"
    " feature_dropout clamp_min clamp_max cpu cuda softshrink hardshrink tanhshrink fix"
    " deg2rad real imag angle conj resolve_conj resolve_neg view_as_real view_as_complex".split()
)
BREAKS_ZERO = set(
    "sigmoid exp softplus cos rsqrt reciprocal log log2 log10 logsigmoid hardsigmoid erfc uniform"
    " normal fill bernoulli eq ne lt le gt ge logical_not isfinite isnan threshold".split()
)
BOUNDED = {
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "clamp_min": ("min", None),
    "clamp_max": (None, "max"),
    "hardtanh": ("min_val", "max_val"),
}
ADDITIVE = set("add sub rsub maximum minimum max min lerp fmod remainder".split())
MULTIPLICATIVE = set("mul div truediv true_divide floor_divide multiply divide".split())
MOVES = set(
    "chunk split split_with_sizes tensor_split cat concat concatenate stack getitem unbind narrow"
    " select index_select reshape view flatten unflatten permute transpose swapaxes movedim squeeze"
    " unsqueeze expand expand_as repeat repeat_interleave flip roll pixel_shuffle pixel_unshuffle"
    " view_as reshape_as T mT H tile unfold channel_shuffle native_channel_shuffle ravel"
    " hsplit".split()
)
CONCATENATES = set("cat concat concatenate".split())
MIXES = set(
    "layer_norm group_norm rms_norm softmax log_softmax softmin normalize local_response_norm"
    " cosine_similarity".split()
)
"""Operations of a tensor's shape whose values depend on several channels at once."""
CONVERSIONS = set("to type_as".split())
"""Operations that take from a second tensor its type and device, and no value."""
CHOICES = set("where masked_fill".split())
"""Operations each of whose values is one of two, by a third tensor."""
PRODUCTS = set("matmul bmm einsum scaled_dot_product_attention".split())
REDUCES = set("mean sum amax amin var std norm any all prod".split())
LIKE = set("zeros_like empty_like ones_like rand_like randn_like full_like".split())
IGNORED = set(
    "size dim numel stride is_contiguous is_floating_point shape dtype device ndim requires_grad"
    " grad_fn is_complex item get_device is_cuda layout element_size storage_offset data_ptr"
    " ndimension is_sparse is_nested names new_zeros new_ones new_empty new_full new_tensor"
    " register_hook retain_grad backward is_leaf grad output_nr is_inference isclose "
    "__len__ __bool__ __hash__ __format__ __repr__ __contains__ is_same_size is_mkldnn"
    " is_quantized is_meta itemsize nbytes".split()
)


def canonical(func: Any) -> str:
    """Name an operation alike whether it came as function, method, operator, in place or
    property.
    """
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        short = name.strip("_")
        if short in ("getitem", "setitem", "matmul"):
            return short
        for prefix in ("i", "r"):
            if short.startswith(prefix) and short[1:] in (
                "add",
                "sub",
                "mul",
                "truediv",
                "div",
                "pow",
                "floordiv",
            ):
                return (
                    "rsub"
                    if short == "rsub"
                    else "reciprocal"
                    if short in ("rtruediv", "rdiv", "rpow")
                    else short[1:]
                )
        return short if short in ADDITIVE | MULTIPLICATIVE | KEEPS_ZERO | BREAKS_ZERO else name
    return name.rstrip("_")


def breaks_zero(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation on one tensor turns zero into something else, given its bounds,
    exponent or padding value.
    """
    if name in BREAKS_ZERO:
        return True
    if name == "pow":
        exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
        return not (
            isinstance(args[0] if args else None, Tensor)
            and isinstance(exponent, (int, float))
            and exponent > 0
        )
    if name == "pad":
        return bool(kwargs.get("value", args[3] if len(args) > 3 else 0))
    if name in BOUNDED:
        low, high = BOUNDED[name]
        bounds = dict(zip((low, high) if low else (high,), args[1:], strict=False))
        least, most = (kwargs.get(key, bounds.get(key)) if key else None for key in (low, high))
        return (
            any(isinstance(b, Tensor) for b in (least, most)) or (least or 0) > 0 or (most or 0) < 0
        )
    return False


def writes_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation changes a tensor that it was given."""
    name = getattr(func, "__name__", "")
    operator = name.startswith("__i") and name[3:-2] in (
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "pow",
        "floordiv",
        "mod",
        "and",
        "or",
    )
    return (
        operator
        or name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("out") is not None
    )


def reduced_dims(
    args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int, position: int = 1
) -> list[int] | None:
    """Return the dimensions that a reduction goes over, None for all of them."""
    given = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if given is None or isinstance(given, bool):
        return None
    return [d % ndim for d in (given if isinstance(given, (tuple, list)) else [given])]


def flatten(value: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists and dictionaries, in order."""
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flatten(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flatten(item)]
    return [value]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same nesting of tuples, lists and dictionaries with `function` on each leaf."""
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    return function(value)
