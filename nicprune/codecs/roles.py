"""Roles of a codec's modules, where their names do not tell them: analysis and synthesis are what
`compress` and `decompress` run, the latents are what the entropy models see.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.codecs.anatomy import SIDES, forward_for_analysis, role_of, sides_of, transform_of
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import without_hooks
from nicprune.codecs.layer_kinds.entropy import entropy_models, is_bottleneck
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.nested_tensors import tensors_in
from nicprune.codecs.trusted import is_trusted

ANALYSIS, SYNTHESIS = "g_a", "g_s"

ATTRIBUTE = "_nicprune_roles"
"""Name of the attribute on a codec that keeps what was found: plain values, which copies carry."""

Calls = tuple[set[str], set[str]]


@dataclass(frozen=True)
class End:
    """The module at an end of the latents: the last of the analysis, or the first of the synthesis.

    Attributes:
        module: its name.
        dim: the dimension of its output, or input, that holds channels.
        whole: whether it is all of the analysis or synthesis, and is given nothing else.
    """

    module: str
    dim: int
    whole: bool


@dataclass(frozen=True)
class Roles:
    """Roles of a codec's modules.

    Attributes:
        transforms: the transform that a module does the work of ("g_a", "h_a", "g_s"), by name;
            only those whose names do not say it.
        analysis: where y comes from; None where that is not known.
        synthesis: where y goes; None where that is not known.
        reason: why one of them is not known.
    """

    transforms: Mapping[str, str] = field(default_factory=dict)
    analysis: End | None = None
    synthesis: End | None = None
    reason: str = ""


def transform_in(codec: nn.Module, name: str) -> str:
    """Return the transform that a module or parameter of a codec belongs to: the one that its path
    names, else the one whose work it does; "other" if there is none.
    """
    return transforms_in(codec, [name])[name]


def transforms_in(codec: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the transform of each of these modules or parameters; see `transform_in`."""
    found = {name: transform_of(name) for name in names}
    unknown = [name for name in found if name and found[name] == "other"]
    if unknown:
        transforms = roles_of(codec).transforms
        found |= {name: role_of(transforms, name) for name in unknown}
    return found


def on_side(codec: nn.Module, name: str, side: str | None) -> bool:
    """Return whether a layer or parameter of a codec runs on one side alone.

    Args:
        name: path of the layer or parameter in the codec.
        side: "encoder" or "decoder"; None accepts every name.
    """
    return side is None or transform_in(codec, name) in SIDES[side]


def roles_of(codec: nn.Module) -> Roles:
    """Return the roles of a codec's modules. Where g_a and g_s are modules, names say them; else
    the codec is run and watched, once.
    """
    kept = _kept(codec)
    if "roles" not in kept:
        found = _by_name(codec) or _by_watching(codec)
        kept["roles"] = {**asdict(found), "transforms": dict(found.transforms)}
    plain = kept["roles"]
    ends = [End(**plain[end]) if plain[end] else None for end in ("analysis", "synthesis")]
    return Roles(plain["transforms"], ends[0], ends[1], plain["reason"])


def calls_of(codec: nn.Module) -> Calls | None:
    """Return the names of the modules that `compress` calls, and of those that `decompress` calls;
    None if the codec cannot code.
    """
    kept = _kept(codec)
    if "calls" not in kept:
        found = _watch(codec)
        kept["calls"] = None if found is None else [sorted(names) for names in found]
    plain = kept["calls"]
    return None if plain is None else (set(plain[0]), set(plain[1]))


def sides_of_modules(codec: nn.Module, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """Return for each module whether it runs when encoding, and when decoding.

    Modules of CompressAI's transforms are known by name. For others the codec codes an image and is
    watched; those that it calls on neither side, or all of them if it cannot code, count on both.
    """
    found = {name: sides_of(transform_of(name)) for name in names}
    unknown = [name for name in found if name and transform_of(name) == "other"]
    if unknown and (seen := calls_of(codec)) is not None:
        for name in unknown:
            if name in seen[0] | seen[1]:
                found[name] = name in seen[0], name in seen[1]
    return found


def forget_roles(codec: nn.Module) -> None:
    """Find out anew: parts of the codec may have been replaced."""
    codec.__dict__.pop(ATTRIBUTE, None)


def _kept(codec: nn.Module) -> dict[str, Any]:
    """Return what is kept of a codec as long as it has the same modules."""
    names = zlib.crc32("\n".join(name for name, _ in codec.named_modules()).encode())
    kept: dict[str, Any] = codec.__dict__.setdefault(ATTRIBUTE, {})
    if kept.get("names") != names:
        kept.clear()
        kept["names"] = names
    return kept


def _watch(codec: Any) -> Calls | None:
    if not (hasattr(codec, "compress") and hasattr(codec, "decompress")):
        return None
    calls: Calls = set(), set()
    side = calls[0]

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: side.add(name)

    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_hooks(codec):
        image = example_image(codec).cpu().float()
        double = copy_codec(codec).cpu().float().eval()
    for name, module in double.named_modules():
        if name:
            module.register_forward_pre_hook(note(name))
    try:
        with torch.no_grad():
            update_tables(double)
            sent = compress(double, image)
            side = calls[1]
            decompress(double, sent["strings"], sent["shape"], image)
    except Exception:  # a foreign codec's own code may raise anything; it is tried elsewhere
        return None
    return calls


def _by_name(codec: nn.Module) -> Roles | None:
    """Return the roles that names say; None if no module has the name of a transform, or the codec
    calls the layers of one and not the transform: hooks on it would never run.
    """
    paths: dict[str, str] = {}
    for name, module in codec.named_modules():
        if next(module.parameters(), None) is None:
            continue
        paths.setdefault(name.rpartition(".")[2], name)
    if not {ANALYSIS, SYNTHESIS} <= paths.keys():
        return None
    cls: Any = type(codec)
    ends = paths[ANALYSIS], paths[SYNTHESIS]
    if not is_trusted(cls) and not _called(codec, ends):
        return None
    return Roles({}, End(ends[0], 1, True), End(ends[1], 1, True))


def _called(codec: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a codec's forward pass calls each of these modules; True if it does not run,
    which is told elsewhere.
    """
    seen: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.add(name)

    with _hooks() as handles, without_hooks(codec), torch.no_grad(), left_as_it_was(codec):
        for name in names:
            handles.append(codec.get_submodule(name).register_forward_pre_hook(note(name)))
        try:
            forward_for_analysis(codec.eval(), example_image(codec))
        except Exception:  # a foreign codec's own code may raise anything
            return True
    return seen == set(names)


def _by_watching(codec: nn.Module) -> Roles:
    calls = calls_of(codec)
    if calls is None:
        return Roles(
            reason=f"{type(codec).__name__} has no module g_a or no g_s, and no compress and"
            " decompress that work and show what takes their place"
        )
    encodes, decodes = (_outermost(one - other) for one, other in (calls, calls[::-1]))
    seen = _Flow(codec, encodes, decodes, calls[0] & calls[1])
    try:
        seen.run()
    except Exception as error:  # a foreign codec's own code may raise anything
        return Roles(reason=f"{type(codec).__name__} cannot be followed: {error}".splitlines()[0])
    last = next(iter(seen.latents)) if len(seen.latents) == 1 else None
    before = seen.order[: seen.order.index(last) + 1] if last else encodes
    transforms = {one: ANALYSIS if one in before else "h_a" for one in encodes}
    transforms |= dict.fromkeys(decodes, SYNTHESIS)
    ends, reasons = [], []
    for found, transform, verb, side in (
        (seen.latents, ANALYSIS, "come from", "compress"),
        (seen.entries, SYNTHESIS, "are read by", "decompress"),
    ):
        among = [one for one in transforms if transforms[one] == transform]
        end = seen.end(next(iter(found)), among) if len(found) == 1 else None
        told = ", ".join(sorted(found)) or f"no module that runs in {side} alone"
        if end is None:
            told += ", not one module" if len(found) != 1 else ", where they have no channels"
            reasons.append(f"the latents of {type(codec).__name__} {verb} {told}")
        ends.append(end)
    return Roles(transforms, ends[0], ends[1], "; ".join(reasons))


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the names that are not below another one."""
    known = set(names)
    return sorted(name for name in known if not known.intersection(_above(name)))


def _above(name: str) -> list[str]:
    return [name[:i] for i, letter in enumerate(name) if letter == "."]


def _channel_dim(tensor: Tensor, coded: int) -> int | None:
    """Return the dimension that holds channels: (B, C, H, W), (B, H, W, C) or (B, L, C).

    Args:
        coded: channels that the entropy models were given in all, which are all of y, once or in
            several passes.
    """
    dims = [1, 3] if tensor.dim() == 4 else [2] if tensor.dim() == 3 else []
    return next((dim for dim in dims if coded and coded % tensor.shape[dim] == 0), None)


class _Flow(TorchFunctionMode):
    """Runs a codec's forward pass and notes from which modules, of those that run on one side
    alone, values come without another module between.

    Attributes:
        latents: the modules of the encoder that give what the entropy models of y are given.
        entries: the modules of the decoder that are given nothing of another one.
        ends: of each of these modules, the tensor of y, and how many arguments it was given.
        order: the modules of the encoder in the order in which they run.
        coded: how many channels the entropy models of y are given in all.
    """

    def __init__(
        self, codec: nn.Module, encodes: Iterable[str], decodes: Iterable[str], both: set[str]
    ):
        super().__init__()
        self.codec = codec
        self.encodes, self.decodes, self.both = set(encodes), set(decodes), both
        self.latents: set[str] = set()
        self.entries: set[str] = set()
        self.ends: dict[str, tuple[Tensor, int]] = {}
        self.order: list[str] = []
        self.coded = 0
        self._sources: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def run(self) -> None:
        """Run the codec on a small image; it is left as it was."""
        codec = self.codec
        image = example_image(codec, seed=0)
        models = entropy_models(codec)
        codes = [m for m in models if not is_bottleneck(m)] or models
        own = {id(part) for model in models for part in model.modules()}
        # A module that both sides call may have parts that only one does: those count then.
        apart = {above for one in self.encodes | self.decodes for above in _above(one)}
        shared = self.both - apart
        with _hooks() as handles, without_hooks(codec), torch.no_grad(), left_as_it_was(codec):
            for name, module in codec.named_modules():
                if name in self.encodes or name in self.decodes:
                    handles += [
                        module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                        module.register_forward_hook(self._leave(name), with_kwargs=True),
                    ]
                elif name in shared or id(module) in own:
                    handles.append(module.register_forward_hook(self._leave("")))
            for model in codes:
                handles.append(model.register_forward_pre_hook(self._coded, with_kwargs=True))
            try:
                with self:
                    forward_for_analysis(codec.eval(), image)
            finally:
                self._sources.clear()

    def end(self, name: str, among: list[str]) -> End | None:
        """Return one of these modules as an end of the latents, None if it shows no channels.

        Args:
            among: the modules of its transform.
        """
        tensor, arguments = self.ends.get(name, (torch.empty(0), 0))
        dim = _channel_dim(tensor, self.coded)
        return None if dim is None else End(name, dim, among == [name] and arguments == 1)

    def _of(self, value: Any) -> frozenset[str]:
        found: set[str] = set()
        for tensor in tensors_in(value):
            found |= self._sources.get(id(tensor), (tensor, frozenset()))[1]
        return frozenset(found)

    def _mark(self, value: Any, sources: frozenset[str]) -> None:
        for tensor in tensors_in(value):  # kept alive, so that its id stays its own
            self._sources[id(tensor)] = tensor, sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__iter__":
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        result = func(*args, **(kwargs or {}))
        sources = self._of((args, kwargs))
        self._mark(args[0] if result is None and args else result, sources)
        return result

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = list(tensors_in((args, kwargs)))
            if name in self.encodes:
                self.order.append(name)
            elif given and not self._of(given) & self.decodes:
                self.entries.add(name)
                self.ends[name] = given[0], len(args) + len(kwargs)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, *rest: Any) -> None:
            output = rest[-1]
            self._mark(output, frozenset({name} if name else ()))
            if name in self.encodes and isinstance(output, Tensor):
                self.ends[name] = output, len(args) + len(rest[0])

        return hook

    def _coded(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        y = next(tensors_in((args, kwargs)), None)  # scales and means come after it
        if y is not None and y.dim() > 1 and (found := self._of(y) & self.encodes):
            self.latents |= found
            self.coded += y.shape[1]


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """Give a list of hooks that are removed at the end of the block."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
