"""Coding in float64 whatever encoder and decoder must compute alike.

Both sides of a learned codec compute the distribution of each symbol, by floating-point arithmetic
that must agree: a scale on the other side of a boundary of the scale table selects another CDF
table, and what follows is noise (Balle et al., "Integer Networks for Data Compression with
Latent-Variable Models", ICLR 2019). Results in float32 differ by about 1e-6 between CPUs, kernels
and numbers of threads, and some of an image's 300,000 scales lie that close to a boundary; results
in float64 differ by about 1e-14.

What both sides compute is found by watching the codec code a small image. A module that `compress`
alone or `decompress` alone calls (g_a, h_a, g_s) is one-sided: its results reach the other side as
whole numbers, or not at all. It stays in float32, and with it nearly all of the work. Everything
else runs in float64: weights that are used outside one-sided modules and what these return are
converted, and new tensors are created in float64. Its 3x3 convolutions run by Winograd's algorithm
where that is faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nicprune.codecs import calling
from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.example import image_shape
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_types import PRODUCTS, as_precise, to_type
from nicprune.codecs.rans import recorded_symbols
from nicprune.codecs.winograd import Winograd

FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
    torch.rand, torch.randn, torch.tensor, torch.zeros,
}  # fmt: skip
"""Functions that create tensors in the default type."""
CONVERTED = {torch.float32, torch.float64, torch.complex64, torch.complex128}


class Coder:
    """A codec's `compress` and `decompress` in a given precision, found out on one tile: the
    smallest image that the codec takes, of 64x64 pixels for most.

    Args:
        model: a codec in float32 and evaluation mode with current CDF tables, or one with methods
            on it. It is converted: give a copy.
        float64: compute in float64 what encoder and decoder must compute alike.
        everything: compute one-sided modules in float64 too. A decoded image then does not depend
            on the machine; otherwise single values may differ by one level of 256.
        point: arguments of `compress` for the tile. Without one, a codec that searches for its
            operating point decodes when encoding too, and nothing that it runs is one-sided.

    Attributes:
        in_float64: whether it does; False for a codec whose own code takes float32 alone.
        has_digest: whether the codec reads the symbols that it writes, by CompressAI's coders.
        failure: what the codec raised when it coded a tile; None if it did not.
        side: height and width of a tile.
        shape: what `compress` returns by this name for a tile.
        symbols: number of symbols that it writes for a tile.
    """

    def __init__(
        self,
        model: Any,
        *,
        float64: bool = True,
        everything: bool = False,
        point: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self._point = dict(point or {})
        self.has_digest = False
        self.failure: Exception | None = None
        self.shape: Any = None
        self.symbols = 0
        self._one_sided, self._winograd = _OneSided(), Winograd()
        channels, self.side = image_shape(unwrap(model))
        tile = torch.rand(
            1, channels, self.side, self.side, generator=torch.Generator().manual_seed(0)
        )
        self._tile = tile.to(next(model.parameters()).device)
        tensors = _float_tensors(model)
        if (
            float64
            and not everything
            and (found := _watch(model, tensors, self._tile, self._point))
        ):
            self.in_float64 = True
            self._use(*found)
            if self._works():
                return
        for self.in_float64 in (True, False) if float64 else (False,):
            self._use(set(tensors) if self.in_float64 else set(), set())
            if self._works():
                return

    def _use(self, in_float64: set[str], one_sided: set[nn.Module]) -> None:
        _convert(self.model, in_float64)
        self._one_sided.put_on(one_sided)

    def compress(self, x: Tensor, **rate: Any) -> dict[str, Any]:
        """Return what the codec's `compress` returns for images (B, C, H, W) in [0, 1]."""
        with self.coding():
            sent: dict[str, Any] = calling.compress(self.model, x, **rate)
        return sent

    def decompress(self, strings: Any, shape: Any, like: Tensor | None = None) -> Tensor:
        """Return images (B, C, H, W) in float32 from what `compress` returned.

        Args:
            like: a tensor of the shape of the images, for codecs that take further arguments; its
                values do not count. By default, one of the shape of a tile.
        """
        like = torch.empty((self._tile if like is None else like).shape, device=self._tile.device)
        with self.coding():
            x_hat: Tensor = calling.decompress(self.model, strings, shape, like)["x_hat"]
        return x_hat.float()

    @contextmanager
    def coding(self) -> Iterator[None]:
        """Compute inside the block as `compress` and `decompress` do."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(fast_indexes())
            if self.in_float64:
                self._one_sided.depth = 0
                stack.enter_context(_Types(self._one_sided, self._winograd))
            yield

    @contextmanager
    def direct_convolutions(self) -> Iterator[None]:
        """Inside the block, compute convolutions product by product, to count them."""
        before, self._winograd.on = self._winograd.on, False
        try:
            yield
        finally:
            self._winograd.on = before

    def _works(self) -> bool:
        """Code a tile as images will be coded; return whether that is possible."""
        try:
            with recorded_symbols() as written:
                sent = self.compress(self._tile, **self._point)
            with recorded_symbols() as read:
                self.decompress(sent["strings"], sent["shape"], self._tile)
        except Exception as error:  # a foreign codec's own code may raise anything
            self.failure = error
            return False
        digests = [symbols.digest(sent["strings"]) for symbols in (written, read)]
        self.failure = None
        self.has_digest = bool(digests[0]) and digests[0] == digests[1]
        self.shape, self.symbols = sent["shape"], written.written
        return self.has_digest or not digests[0]


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in float32 or float64, and complex ones of these, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if t.dtype in CONVERTED}


def _convert(model: nn.Module, in_float64: set[str]) -> None:
    """Convert the parameters and buffers that are named to float64, all others to float32."""
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is None or value.dtype not in CONVERTED:
                    continue
                dtype = torch.float64 if start + key in in_float64 else torch.float32
                dtype = as_precise(dtype, value)
                if value.dtype != dtype:
                    value.data = value.data.to(dtype)


class _OneSided:
    """Hooks that let modules compute in float32 among others that compute in float64.

    Attributes:
        depth: number of calls of these modules inside each other.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._handles: list[Any] = []

    def put_on(self, modules: set[nn.Module]) -> None:
        """Take the hooks off the modules that have them, and put them on others."""
        for handle in self._handles:
            handle.remove()
        # The first pre-hook and the last hook: those of methods see what the module sees.
        self._handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.depth += 1
        return to_type(torch.float32, (args, kwargs)) if self.depth == 1 else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.depth -= 1
        return to_type(torch.float64, output) if self.depth == 0 else None


class _Types(TorchFunctionMode):
    """Create tensors in float64 rather than float32 where no type is asked for, and let products of
    the two types be computed; outside one-sided modules, in float64, and by Winograd's algorithm
    where it serves.

    Both meet where a weight was not used by the image that was watched, at another width for
    example.
    """

    def __init__(self, one_sided: _OneSided, winograd: Winograd):
        super().__init__()
        self._one_sided = one_sided
        self._winograd = winograd

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            if func is torch.conv2d and not self._one_sided.depth:
                result = self._winograd.convolve(*args, **kwargs)
                if result is not None:
                    return result
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                dtype = torch.float32 if self._one_sided.depth else torch.float64
                args, kwargs = to_type(dtype, (args, kwargs))
                return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if (
            func in FACTORIES
            and not self._one_sided.depth
            and not kwargs.get("dtype")
            and made.dtype == torch.float32
        ):
            return made.double()
        return made


class _Touched(TorchDispatchMode):
    """Note for each tensor of a model inside which modules' calls it is used."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[nn.Module] = []
        self.stacks: dict[str, set[tuple[nn.Module, ...]]] = defaultdict(set)
        self._names: dict[int, list[str]] = defaultdict(list)
        # Kept, so that no other tensor gets the memory of one that a module replaces.
        self._storages = [tensor.untyped_storage() for tensor in tensors.values()]
        for name, tensor in tensors.items():
            self._names[id(tensor)].append(name)
            if tensor.numel():  # `weight.data` is another tensor in the same memory
                self._names[tensor.untyped_storage().data_ptr()].append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                for key in (id(value), value.untyped_storage().data_ptr()):
                    for name in self._names.get(key, ()):
                        self.stacks[name].add(tuple(self.stack))
        return func(*args, **(kwargs or {}))


def _watch(
    model: Any, tensors: Mapping[str, Tensor], tile: Tensor, point: Mapping[str, Any]
) -> tuple[set[str], set[nn.Module]] | None:
    """Watch a model code an image.

    Returns:
        The names of its tensors that are used outside one-sided modules, and these modules; None
        if it cannot code.
    """
    touched = _Touched(tensors)
    calls: tuple[set[nn.Module], set[nn.Module]] = set(), set()
    side = calls[0]

    def enter(module: nn.Module, args: Any) -> None:
        side.add(module)
        touched.stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        touched.stack.pop()

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
    ]

    try:
        with torch.no_grad(), fast_indexes(), touched:
            sent = calling.compress(model, tile, **point)
            side = calls[1]
            calling.decompress(model, sent["strings"], sent["shape"], tile)
    except Exception:  # a foreign codec's own code may raise anything
        return None
    finally:
        for handle in handles:
            handle.remove()
    one_sided = calls[0] ^ calls[1]
    while True:
        outside = {
            name
            for name, stacks in touched.stacks.items()
            if any(one_sided.isdisjoint(stack) for stack in stacks)
        }
        mixed = {
            module
            for name in outside
            for stack in touched.stacks[name]
            for module in one_sided.intersection(stack)
        }
        if not mixed:
            return _with_unused(tensors, touched.stacks, outside), one_sided
        one_sided -= mixed


def _with_unused(
    tensors: Mapping[str, Tensor], used: Mapping[str, Any], outside: set[str]
) -> set[str]:
    """Return the names of the tensors that are used outside one-sided modules, and of those that
    were not used at all, by an image of this size or at this rate, but stand beside such.
    """
    beside: dict[str, bool] = {}
    for name in used:
        for prefix in _prefixes(name):
            beside[prefix] = beside.get(prefix, False) or name in outside
    found = set(outside)
    for name in tensors:
        if name not in used:
            nearest = next((p for p in _prefixes(name) if p in beside), None)
            if nearest is None or beside[nearest]:
                found.add(name)
    return found


def _prefixes(name: str) -> Iterator[str]:
    """Return the names of the modules around a tensor, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
