"""Weights, latents and scales that are not finite end in one line, wherever a codec is saved,
loaded or codes: CompressAI's coder would never end.

What could hang runs in a process of its own, with a limit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from compressai.models import FactorizedPrior
from helpers import built, image
from safetensors.torch import load_file, save_file
from torch import nn

from nicprune.codecs.anatomy import check_finite
from nicprune.codecs.cdf import WIDEST, check_tables, update_tables
from nicprune.codecs.fast_coding import LARGEST_SYMBOL, fast_indexes
from nicprune.codecs.layer_kinds import entropy_models, is_bottleneck
from nicprune.common.errors import CodecError, FileError, NicpruneError
from nicprune.data.images import write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.methods import attach
from nicprune.storage.checkpoint import load, read_header, save
from nicprune.storage.container import decode, encode
from nicprune.storage.named import load_codec

NAN, INF = float("nan"), float("inf")

HANGS = """
import sys, torch
from helpers import built
from nicprune.common.errors import NicpruneError
from nicprune.data.images import write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.storage.container import encode

torch.set_num_threads(1)
picture = write_png(torch.rand(3, 64, 64), sys.argv[1])
for name in sys.argv[2:]:
    for value in (float("nan"), 3e9):
        for last in (lambda c: c.g_a[-1], lambda c: c.h_a[-1]):
            codec = built(name)[0]
            codec.update(force=True)  # the weights are finite, the latents are not
            last(codec).register_forward_hook(lambda m, a, out, v=value: out * 0 + v)
            for work in (lambda: encode(codec, picture), lambda: evaluate(codec, picture)):
                try:
                    print("coded", name, value, work() is None)
                except NicpruneError as error:
                    print("refused:", str(error).replace(chr(10), "NEWLINE"))
"""


def test_latents_that_are_not_finite_do_not_hang(tmp_path: Path) -> None:
    names = ["bmshj2018-hyperprior", "mbt2018"]
    done = elsewhere.run(HANGS, str(tmp_path / "a.png"), *names)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == len(names) * 2 * 2 * 2
    for line in told:
        assert line.startswith("refused: ") and "of this codec are not finite, or too large" in line


def every_weight(codec: nn.Module) -> list[str]:
    """One parameter of each kind of layer."""
    found = {
        (type(codec.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2]): name
        for name, _ in codec.named_parameters()
    }
    return sorted(found.values())


Work = Callable[[Any, Path], object]
WORK: dict[str, Work] = {
    "save": lambda codec, folder: save(codec, folder / "b.safetensors"),
    "encode": lambda codec, folder: encode(codec, folder / "a.png"),
    "decode": lambda codec, folder: decode(codec, folder / "a.nic"),
    "evaluate": lambda codec, folder: evaluate(codec, folder / "a.png"),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_named(
    value: float, tmp_path: Path, hyperprior: nn.Module
) -> None:
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    (tmp_path / "a.nic").write_bytes(encode(hyperprior, tmp_path / "a.png"))
    save(hyperprior, tmp_path / "a.safetensors")
    before = sorted(tmp_path.iterdir())
    for key in every_weight(hyperprior):
        codec: Any = built("bmshj2018-hyperprior")[0]
        with torch.no_grad():
            codec.get_parameter(key).view(-1)[-1] = value
        for name, work in WORK.items():
            with pytest.raises(CodecError, match=f"{key} holds values that are not finite") as told:
                work(codec, tmp_path)
            assert "\n" not in str(told.value), name
        assert sorted(tmp_path.iterdir()) == before
    # Those of methods on the codec count too.
    attached = attach(built("bmshj2018-hyperprior")[0], "bottleneck_scaling", qualities=[1, 2])
    with torch.no_grad():
        next(attached.methods.parameters()).view(-1)[0] = value
    for work in WORK.values():
        with pytest.raises(CodecError, match="methods.0.*not finite"):
            work(attached, tmp_path)


def test_buffers_may_be_infinite_and_not_nan(hyperprior: nn.Module) -> None:
    """As masks of attention are."""
    hyperprior.register_buffer("mask", torch.tensor([0.0, -INF]))
    check_finite(hyperprior)
    hyperprior.register_buffer("mask", torch.tensor([0.0, NAN]))
    with pytest.raises(CodecError, match="mask holds values that are not finite"):
        check_finite(hyperprior)


def test_files_of_weights_that_are_not_finite_are_refused(
    tmp_path: Path, hyperprior: nn.Module
) -> None:
    file = save(hyperprior, tmp_path / "a.safetensors")
    state, header = load_file(file), read_header(file)
    state["h_s.0.weight"].view(-1)[3] = NAN
    del header["digest"]
    import json

    header["version"] = 1
    save_file(state, file, metadata={"nicprune": json.dumps(header)})
    with pytest.raises(FileError, match=r"a.safetensors: h_s.0.weight holds .* not finite"):
        load(file)
    state = dict(hyperprior.state_dict()) | {"g_a.0.bias": torch.full((16,), INF)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"a.pth: g_a.0.bias holds .* not finite"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "a.pth")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, hyperprior: Any) -> None:
    with torch.no_grad():
        hyperprior.g_s[0].bias[0] = 1e5
    with pytest.raises(CodecError, match="g_s.0.bias has values too large for float16"):
        save(hyperprior, tmp_path / "a.safetensors", half=True)
    save(hyperprior, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018-mean-vbr-eb"])
@pytest.mark.parametrize("value", [NAN, INF, 1e30, float(2 * LARGEST_SYMBOL), -1e9])
def test_every_entropy_model_refuses_what_it_cannot_write(name: str, value: float) -> None:
    codec, _ = built(name)
    codec.update(force=True)  # type: ignore[operator]
    models: list[Any] = entropy_models(codec)
    assert len(models) > 1
    for model in models:
        own = is_bottleneck(model)
        x = torch.zeros(1, model.channels if own else 3, 2, 2)
        indexes = () if own else (torch.zeros(x.shape, dtype=torch.int32),)
        with fast_indexes():
            assert model.compress(x, *indexes)
            x[0, 1, 1, 0] = value
            with pytest.raises(CodecError, match="latents of this codec are not finite"):
                model.compress(x, *indexes)
            if not own and value != value or abs(value) == INF:
                conditional = next(m for m in models if hasattr(m, "build_indexes"))
                with pytest.raises(CodecError, match="scales of this codec are not finite"):
                    conditional.build_indexes(x)


def test_the_largest_latents_that_are_coded_come_back(hyperprior: Any) -> None:
    hyperprior.update(force=True)
    model: Any = hyperprior.entropy_bottleneck
    with torch.no_grad():
        model.quantiles[:, 0, 1] = 0
    x = torch.zeros(1, 16, 1, 2)
    x[0, :, 0, 0], x[0, :, 0, 1] = LARGEST_SYMBOL - 8, 8 - LARGEST_SYMBOL
    with fast_indexes():
        assert torch.equal(model.decompress(model.compress(x), (1, 2)), x)


@pytest.mark.parametrize("value", [NAN, INF, 1e9, float(WIDEST)])
def test_tables_too_wide_to_be_made_are_refused(
    value: float, hyperprior: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        hyperprior.entropy_bottleneck.quantiles[3, 0, 2] = value
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    for work in (
        lambda: update_tables(hyperprior),
        lambda: save(hyperprior, tmp_path / "a.safetensors"),
        lambda: encode(hyperprior, tmp_path / "a.png"),
        lambda: evaluate(hyperprior, tmp_path / "a.png"),
    ):
        with pytest.raises(NicpruneError, match="entropy_bottleneck.*(not finite|apart)") as told:
            work()
        assert "\n" not in str(told.value)


def test_what_is_decoded_to_nothing_finite_is_refused(hyperprior: Any, tmp_path: Path) -> None:
    data = encode(hyperprior, (image(hyperprior)[0] * 255).byte())
    hyperprior.g_s.register_forward_hook(lambda module, args, out: out * NAN)
    with pytest.raises(FileError, match="decoded values that are not finite"):
        decode(hyperprior, data)
    with pytest.raises(CodecError, match="decodes images to values that are not finite"):
        evaluate(hyperprior, write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_tables_of_a_damaged_bottleneck_are_refused_by_name(value: float) -> None:
    whole = FactorizedPrior(2, 3)
    for key, _ in whole.entropy_bottleneck.named_parameters():
        codec = copy.deepcopy(whole)
        with torch.no_grad():
            codec.entropy_bottleneck.get_parameter(key).fill_(value)
        try:
            update_tables(codec)
        except CodecError as error:
            assert str(error).startswith("CDF tables cannot be made of ")
            assert math.isfinite(value) or f"its {key} is not finite" in str(error)
        else:  # what is large may still make tables
            assert math.isfinite(value)
            check_tables(codec)
