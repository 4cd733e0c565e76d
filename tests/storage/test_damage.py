"""Files that were damaged, or made on purpose: one line, and nothing that crashes, hangs, takes the
machine's memory or computes something else.

What could end the process runs in one of its own.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from compressai.models import FactorizedPrior, ScaleHyperprior
from helpers import built, image, same_state, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nicprune.codecs.cdf import WIDEST, check_tables
from nicprune.codecs.zoo import rebuild
from nicprune.common.errors import CodecError, FileError, NicpruneError
from nicprune.methods import attach
from nicprune.storage.checkpoint import VERSION, check_savable, load, read_header, save
from nicprune.storage.packed_tables import unpack_tables


def rewritten(
    file: Path,
    *,
    version: int = VERSION,
    header: Callable[[dict[str, Any]], object] = lambda header: None,
    **changes: Tensor,
) -> Path:
    """The file with other tensors, as somebody who knows the format writes it."""
    from nicprune.storage.checkpoint import _digest

    state, content = unpack_tables(load_file(file), file.name) | changes, read_header(file)
    content["version"] = version
    del content["digest"]
    header(content)
    if version > 2:
        content["digest"] = _digest(content, state)
    save_file(state, file, metadata={"nicprune": json.dumps(content)})
    return file


def test_any_byte_that_is_changed_is_noticed(tmp_path: Path) -> None:
    codec = FactorizedPrior(2, 3)
    file = save(codec, tmp_path / "a.safetensors")
    whole, expected = file.read_bytes(), state_of(load(file))
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(12), *rng.sample(range(12, start), 120)]
    places += rng.sample(range(start, len(whole)), 60)
    noticed = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            again = load(file)
        except NicpruneError as error:
            noticed += 1
            assert "\n" not in str(error), place
        else:  # a space between two words of the header
            assert same_state(state_of(again), expected) and whole[place : place + 1].isspace()
    assert noticed > 180


def test_what_a_header_says_is_cut_in_the_message(tmp_path: Path) -> None:
    """safetensors shows the whole of a header that it cannot read."""
    file = save(FactorizedPrior(2, 3), tmp_path / "a.safetensors")
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = json.loads(whole[8 : 8 + length])
    made = json.dumps({"__metadata__": text["__metadata__"]["nicprune"]}).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made)
    with pytest.raises(FileError, match="not a safetensors file, or is cut short") as told:
        load(file)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


def test_two_tensors_exchanged_are_noticed(tmp_path: Path, hyperprior: nn.Module) -> None:
    file = save(hyperprior, tmp_path / "a.safetensors")
    state, header = load_file(file), read_header(file)
    state["g_a.0.bias"], state["g_a.2.bias"] = state["g_a.2.bias"], state["g_a.0.bias"]
    save_file(state, file, metadata={"nicprune": json.dumps(header)})
    with pytest.raises(FileError, match="is damaged: its checksum does not fit"):
        load(file)
    header["history"] = [{"methods": []}]
    save_file(load_file(file), file, metadata={"nicprune": json.dumps(header)})
    with pytest.raises(FileError, match="checksum"):
        load(file)
    del header["digest"]
    save_file(load_file(file), file, metadata={"nicprune": json.dumps(header)})
    with pytest.raises(FileError, match="checksum"):
        load(file)


def test_files_of_earlier_versions_are_read(tmp_path: Path, hyperprior: nn.Module) -> None:
    for version in (1, 3):
        file = rewritten(save(hyperprior, tmp_path / "a.safetensors"), version=version)
        assert same_state(state_of(load(file)), state_of(hyperprior))
    attached = attach(built("bmshj2018-hyperprior")[0], "bottleneck_scaling", qualities=[1, 2])
    file = rewritten(save(attached, tmp_path / "b.safetensors"), version=2)
    again: Any = load(file)
    assert same_state(state_of(again.methods), state_of(attached.methods))


def tables(codec: Any, name: str) -> dict[str, Tensor]:
    """The CDF tables of an entropy model."""
    codec.update(force=True)
    return {
        key: codec.state_dict()[f"{name}.{key}"].clone()
        for key in ("_quantized_cdf", "_cdf_length", "_offset")
    }


def _changed(key: str, place: Any, value: int) -> Any:
    def change(found: dict[str, Tensor]) -> None:
        found[key][place] = value

    return change


DAMAGE: dict[str, tuple[Any, str]] = {
    "a length beyond the table": (_changed("_cdf_length", 0, 10**6), "lengths lie outside"),
    "a negative length": (_changed("_cdf_length", -1, -5), "lengths lie outside"),
    "no length": (_changed("_cdf_length", 1, 1), "lengths lie outside"),
    "not from zero": (_changed("_quantized_cdf", (0, 0), 7), "do not rise"),
    "falling": (_changed("_quantized_cdf", (2, 3), -(10**6)), "do not rise"),
    "too large": (_changed("_quantized_cdf", (2, 3), 10**6), "do not rise"),
    "one short": (lambda t: t["_cdf_length"].sub_(1), "do not rise"),
    "an offset": (_changed("_offset", 0, -WIDEST - 1), "offsets"),
    "the least offset": (_changed("_offset", 0, -(2**31)), "offsets"),
    "fewer rows": (
        lambda t: t.update({key: value[:-3].clone() for key, value in t.items()}),
        "channels or scales",
    ),
    "no rows": (lambda t: t.update(_quantized_cdf=t["_quantized_cdf"][:0].clone()), "shapes"),
    "fewer lengths": (
        lambda t: t.update(_cdf_length=t["_cdf_length"][:-1].clone()),
        "shapes",
    ),
    "floats": (lambda t: t.update(_offset=t["_offset"].float()), ""),
    "one dimension": (
        lambda t: t.update(_quantized_cdf=t["_quantized_cdf"].view(-1).clone()),
        "shapes",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes]:
    """A small codec, and its file."""
    codec = ScaleHyperprior(8, 12)
    file = save(codec, tmp_path_factory.mktemp("saved") / "a.safetensors")
    return codec, file.read_bytes()


@pytest.mark.parametrize("name", ["entropy_bottleneck", "gaussian_conditional"])
@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_tables_that_the_coder_cannot_read_are_refused(
    kind: str, name: str, tmp_path: Path, saved: tuple[nn.Module, bytes]
) -> None:
    change, expected = DAMAGE[kind]
    file, found = tmp_path / "a.safetensors", tables(saved[0], name)
    file.write_bytes(saved[1])
    change(found)
    version = 1 if name == "entropy_bottleneck" else 3
    rewritten(file, version=version, **{f"{name}.{key}": value for key, value in found.items()})
    if kind == "floats":  # whole numbers all the same, and read as such
        load(file)
        return
    with pytest.raises(FileError, match=f"CDF tables of {name} are damaged: .*{expected}") as told:
        load(file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["structure"].update({"g_a.0": ["x" * 5000, {}]}),
        lambda header: header["structure"].update({"g_a.0": ["a\nb", {}], "a\nb": ["c", {}]}),
        lambda header: header["structure"]["g_a.0"][1].update({"a\nb": "x" * 5000}),
        lambda header: header.update(structure="a\nb"),
    ],
)
def test_what_a_file_says_is_cut_in_messages(
    change: Any, tmp_path: Path, saved: tuple[nn.Module, bytes]
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(saved[1])
    with pytest.raises(CodecError, match="holds another codec") as told:
        load(rewritten(file, header=change))
    assert "\n" not in str(told.value) and len(str(told.value)) < 1000


def test_tables_of_every_architecture_are_fine(architecture: str) -> None:
    codec: Any = built(architecture)[0]
    check_tables(codec)
    codec.update(force=True)
    check_tables(codec)


def test_tables_of_methods_are_looked_at_too(tmp_path: Path) -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1, latents="slim"
    )
    file = save(attached, tmp_path / "a.safetensors")
    key = next(key for key in load_file(file) if "methods" in key and key.endswith("_cdf_length"))
    rewritten(file, **{key: load_file(file)[key] + 10**6})
    with pytest.raises(FileError, match="CDF tables .* are damaged"):
        load(file)


ABSURD = """
import resource, sys
from nicprune.codecs.zoo import rebuild
from nicprune.common.errors import CodecError

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), -1))
for name, arguments in (
    ("google:ScaleHyperprior", dict(N=16384, M=16384)),
    ("google:FactorizedPriorReLU", dict(N=4096, M=4096)),
    ("google:MeanScaleHyperprior", dict(N=16384, M=2)),
    ("google:JointAutoregressiveHierarchicalPriors", dict(N=2, M=16384)),
    ("waseda:Cheng2020Attention", dict(N=16000)),
    ("sensetime:Elic2022Official", dict(N=16000, M=16000, groups=[8000, 8000])),
):
    try:
        rebuild({"class": f"compressai.models.{name}", "kwargs": arguments})
    except CodecError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded as Linux does")
def test_codecs_of_absurd_size_are_not_made() -> None:
    done = elsewhere.run(ABSURD)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == 6 and all("of absurd size" in line for line in told)


MAKING: dict[str, Callable[[], Tensor]] = {
    "stack": lambda: torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")),
    "cat": lambda: torch.cat([torch.zeros(2), torch.ones(1)]),
    "large numbers": lambda: torch.arange(100_000_007, 100_000_011),
    "steps": lambda: torch.linspace(0, 10**9, 7),
    "eye": lambda: torch.eye(3),
    "drawn": lambda: torch.randint(10**9, (4,), generator=torch.Generator()),
    "one value": lambda: torch.tensor(10.0**9),
}


class Making(FactorizedPrior):
    """A codec whose constructor makes a table, as those with relative positions do."""

    making = "stack"

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.register_buffer("table", MAKING[self.making]())


@pytest.mark.parametrize("making", MAKING)
def test_tables_that_a_constructor_makes_are_of_their_own_size(
    making: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Making, "making", making)
    codec = Making()
    check_savable(codec)
    again = load(save(codec, tmp_path / "a.safetensors"))
    assert same_state(state_of(again), state_of(codec))


ABSURD_TABLES: dict[str, Callable[[], Tensor]] = {
    "a range": lambda: torch.arange(10**12),
    "steps": lambda: torch.linspace(0, 1, 10**12),
    "eye": lambda: torch.eye(10**6),
    "a list": lambda: torch.zeros([10**6, 10**6]),
    "one by one": lambda: torch.stack([torch.zeros(1 << 22).sum() for _ in range(1000)]),
}


@pytest.mark.parametrize("making", ABSURD_TABLES)
def test_tables_of_absurd_size_are_not_made(making: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAKING, "absurd", ABSURD_TABLES[making])
    monkeypatch.setattr(Making, "making", "absurd")
    with pytest.raises(CodecError, match="of absurd size"):
        rebuild({"class": f"{Making.__module__}:Making", "kwargs": {}})


def test_codecs_of_usual_size_are_made() -> None:
    for arguments in ({"N": 192, "M": 320}, {"N": 320, "M": 640}):
        made = rebuild({"class": "compressai.models.google:ScaleHyperprior", "kwargs": arguments})
        assert made(image(made))["x_hat"].shape == (1, 3, 64, 64)
    with pytest.raises(CodecError, match="of absurd size"):
        rebuild(
            {
                "class": "compressai.models.sensetime:Elic2022Official",
                "kwargs": {"N": 8, "M": 10**6, "groups": [10**6]},
            }
        )
