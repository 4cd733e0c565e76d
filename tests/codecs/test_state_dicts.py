"""State dicts of other programs: loaded wherever they lie in a file and whatever stands before
their keys, refused with what was found where that is not clear.
"""

from __future__ import annotations

import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import Cheng2020Anchor, CompressionModel, FactorizedPrior, ScaleHyperprior
from helpers import built, same_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.state_dicts import read_state_dict
from nicprune.common.errors import FileError, NicpruneError
from nicprune.storage.named import load_codec

State = dict[str, Tensor]


def before(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def averaged(codec: nn.Module) -> State:
    return AveragedModel(codec).state_dict()


def compiled(codec: nn.Module) -> State:
    return torch.compile(codec).state_dict()


def compiled_inside(codec: Any) -> State:
    codec.g_a = torch.compile(codec.g_a)
    return codec.state_dict()


def lightning(codec: nn.Module) -> State:
    return {**before("net.", codec.state_dict()), "loss.weight": torch.ones(3)}


Made = Callable[[nn.Module], Any]
CLEAR: dict[str, Made] = {
    "bare": lambda c: c.state_dict(),
    "state_dict": lambda c: {"state_dict": c.state_dict(), "epoch": 3},
    "model": lambda c: {"model": c.state_dict(), "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda c: {"model_state_dict": c.state_dict(), "loss": torch.ones(())},
    "params_ema": lambda c: {"params_ema": c.state_dict()},
    "net": lambda c: {"net": c.state_dict(), "iter": 7},
    "another's beside it": lambda c: {
        "generator": c.state_dict(),
        "discriminator": nn.Linear(2, 2).state_dict(),
    },
    "state_dict and an average": lambda c: {
        "state_dict": c.state_dict(),
        "ema": {k: torch.zeros_like(v) for k, v in c.state_dict().items()},
    },
    "module.": lambda c: before("module.", c.state_dict()),
    "net.": lambda c: before("net.", c.state_dict()),
    "module.net.": lambda c: {"state_dict": before("module.net.", c.state_dict())},
    "compiled": compiled,
    "compiled, in parallel": lambda c: before("module.", compiled(c)),
    "compiled inside": compiled_inside,
    "an average": averaged,
    "an average of a compiled one": lambda c: {"model": averaged(torch.compile(c))},
    "Lightning": lambda c: {"state_dict": lightning(c), "pytorch-lightning_version": "2"},
}


def own_codec(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> str:
    monkeypatch.setitem(sys.modules, "own_codecs", types.SimpleNamespace(make=make))
    return "own_codecs:make"


def weights(codec: nn.Module) -> State:
    return {
        key: value
        for key, value in codec.state_dict().items()
        if key.rpartition(".")[2] not in CDF_BUFFERS
    }


@pytest.mark.parametrize("kind", sorted(CLEAR))
def test_what_is_clear_is_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    expected = {key: value.clone() for key, value in weights(codec).items()}
    torch.save(CLEAR[kind](codec), tmp_path / "a.pth")
    name = own_codec(monkeypatch, lambda: ScaleHyperprior(16, 24))
    assert same_state(weights(load_codec(name, weights=tmp_path / "a.pth")), expected)


@pytest.mark.parametrize("kind", [kind for kind in sorted(CLEAR) if kind.endswith(".")])
def test_safetensors_of_other_programs_are_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    state: Any = CLEAR[kind](codec)
    state = {key: value.half() for key, value in state.get("state_dict", state).items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    expected = weights(codec.half().float())
    name = own_codec(monkeypatch, lambda: ScaleHyperprior(16, 24))
    assert same_state(weights(load_codec(name, weights=path)), expected)
    # Of another codec, cut short, without a codec to put them in: one line.
    with pytest.raises(NicpruneError, match="does not fit FactorizedPrior"):
        load_codec(own_codec(monkeypatch, lambda: FactorizedPrior(16, 24)), weights=path)
    with pytest.raises(FileError, match="holds weights alone. Name the codec"):
        load_codec(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="cut short"):
        load_codec(name, weights=path)


UNCLEAR: dict[str, tuple[Made, str]] = {
    "two below keys": (
        lambda c: {"params": c.state_dict(), "params_ema": c.state_dict(), "iter": 7},
        r"several state dicts, 'params', 'params_ema': .*found the keys params, params_ema, iter",
    ),
    "two beside each other": (
        lambda c: {"state_dict": before("a.", c.state_dict()) | before("b.", c.state_dict())},
        r"several codecs, their keys beginning with 'a.' and 'b.'",
    ),
    "none": (
        lambda c: {"epoch": 3, "optimizer": {"state": {}}, "args": "--quality 3"},
        r"holds no state dict \(found the keys epoch, optimizer, args\)",
    ),
    "nothing": (lambda c: {}, r"holds no state dict \(found {}\)"),
    "a list": (lambda c: [1, 2], r"holds no state dict \(found list\)"),
    "many keys": (
        lambda c: {f"key {i}" * 30: i for i in range(100)},
        r"holds no state dict \(found the keys (key 0)+[^,]*, .*, \.\.\.\)",
    ),
    "of another architecture": (
        lambda c: {"model": FactorizedPrior(8, 12).state_dict()},
        "does not fit ScaleHyperprior: missing",
    ),
    "several of other architectures": (
        lambda c: {"a": nn.Linear(2, 2).state_dict(), "b": nn.Linear(2, 2).state_dict()},
        r"several state dicts, 'a', 'b'",
    ),
    "one and a part beside it": (
        lambda c: c.state_dict() | before("ema.", c.state_dict()),
        r"several codecs, their keys beginning with '' and 'ema.'",
    ),
}


@pytest.mark.parametrize("kind", sorted(UNCLEAR))
def test_what_is_not_clear_says_what_was_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = UNCLEAR[kind]
    torch.save(make(built("bmshj2018-hyperprior")[0]), tmp_path / "a.pth")
    name = own_codec(monkeypatch, lambda: ScaleHyperprior(16, 24))
    with pytest.raises(NicpruneError, match=expected) as told:
        load_codec(name, weights=tmp_path / "a.pth")
    assert "\n" not in str(told.value) and len(str(told.value)) < 1000


class Block(nn.Module):
    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Conv2d(12, 12, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x


class Own(CompressionModel):
    """A codec of a user's own, whose blocks use CompressAI's older word for something else."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        inner = FactorizedPrior(8, 12)
        self.g_a = nn.Sequential(*inner.g_a, Block(names))
        self.g_s, self.entropy_bottleneck = inner.g_s, inner.entropy_bottleneck

    forward, compress = FactorizedPrior.forward, FactorizedPrior.compress
    decompress = FactorizedPrior.decompress


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_weights_in_a_compressed_archive_are_to_be_unpacked(ending: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with tarfile.open(tmp_path / "a.tar", f"w:{ending}") as archive:
        archive.add(tmp_path / "a.pth")
    with pytest.raises(FileError, match="is a compressed archive: unpack it") as told:
        load_codec("bmshj2018-hyperprior", quality=1, weights=tmp_path / "a.tar")
    assert "\n" not in str(told.value)


def test_names_of_a_users_own_class_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (("downsample",), ("downsample", "skip"), ("module",), ("skip",)):
        codec = Own(*names)
        torch.save(codec.state_dict(), tmp_path / "a.pth")
        name = own_codec(monkeypatch, lambda n=names: Own(*n))
        assert same_state(weights(load_codec(name, weights=tmp_path / "a.pth")), weights(codec))
    torch.save(Own("downsample").state_dict(), tmp_path / "a.pth")
    name = own_codec(monkeypatch, lambda: Own("skip"))
    with pytest.raises(FileError, match=r"missing g_a.7.skip.weight.*unknown g_a.7.downsample"):
        load_codec(name, weights=tmp_path / "a.pth")


class Derived(Cheng2020Anchor):
    """A user's own class of CompressAI's blocks."""


@pytest.mark.parametrize("kind", [Cheng2020Anchor, Derived])
def test_older_names_of_compressais_blocks_are_brought_up_to_date(
    kind: Any, tmp_path: Path
) -> None:
    codec = kind(8)
    older = {key.replace(".skip.", ".downsample."): v for key, v in codec.state_dict().items()}
    assert older.keys() != codec.state_dict().keys()
    torch.save({"model": before("module.", older)}, tmp_path / "a.pth")
    assert same_state(read_state_dict(tmp_path / "a.pth", codec), codec.state_dict())


@pytest.mark.parametrize("form", ["_{old}{i}", "_{plural}.{i}", "{plural}.{i}"])
@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior-vbr-eb"])
def test_every_name_of_a_bottlenecks_parameters(form: str, name: str, tmp_path: Path) -> None:
    """They are listed in today's bottleneck, and one by one in the variable-rate one."""
    codec, older = built(name)[0], {}
    for key, value in codec.state_dict().items():
        for old, plural in (("matrix", "matrices"), ("bias", "biases"), ("factor", "factors")):
            for i in range(5):
                for now in (f"bottleneck.{plural}.{i}", f"bottleneck._{old}{i}"):
                    if key.endswith(now):
                        key = key.removesuffix(now.split(".", 1)[1])
                        key += form.format(old=old, plural=plural, i=i)
        older[key] = value
    torch.save(older, tmp_path / "a.pth")
    assert same_state(read_state_dict(tmp_path / "a.pth", codec), codec.state_dict())
