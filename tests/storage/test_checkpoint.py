"""Files: one argument in, the identical codec out; nothing that could run, nothing half read."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import FactorizedPrior, MeanScaleHyperprior, ScaleHyperprior
from helpers import built, image, random_keep, same_state, state_of
from torch import nn
from zoo_of_blocks import BlockCodec

from nicprune.codecs.anatomy import CompressionModel
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import BudgetError, CodecError, FileError, RecipeError, SurgeryError
from nicprune.methods import attach
from nicprune.pruning.surgery import prune
from nicprune.storage.checkpoint import load, read_header, save
from nicprune.storage.named import load_codec


def test_round_trip_is_exact_and_decodes(architecture: str, tmp_path: Path) -> None:
    codec, groups = built(architecture)
    small = prune(codec, random_keep(groups, 3), groups, verify=False)
    path = save(small, tmp_path / "small.safetensors")
    again = load(path)
    assert type(again) is type(codec) and not again.training
    assert same_state(state_of(small), state_of(again))
    x = image(codec)
    with torch.no_grad():
        sent = small.eval().compress(x)
        assert sent["strings"] == again.compress(x)["strings"]
        assert torch.equal(
            small.decompress(sent["strings"], sent["shape"])["x_hat"],
            again.decompress(sent["strings"], sent["shape"])["x_hat"],
        )


def test_provenance_travels_with_the_file(tmp_path: Path, hyperprior: nn.Module) -> None:
    masked = attach(hyperprior, "magnitude", budget={"macs": 0.6}, round_to=1)
    before = masked.cost.totals()
    again = load(save(masked.harden(), tmp_path / "a.safetensors"))
    record = provenance(again)
    assert (
        record.original == before.as_dict()
        and record.history[0]["methods"][0]["name"] == "magnitude"
    )
    assert "masked = pruned to" in record.history[0]["verified"], (
        "surgery says what its verification found"
    )
    # A second pruning is relative to the original: 0.6 is met already, 0.3 means 0.3 of the first
    # codec.
    twice = attach(again, "magnitude", budget={"macs": 0.3}, round_to=1).harden()
    assert 0.25 < attach(twice, "none").cost.totals().macs / before.macs <= 0.3
    assert len(provenance(twice).history) == 2


def test_half_precision_is_close(tmp_path: Path, hyperprior: nn.Module) -> None:
    full, half = (save(hyperprior, tmp_path / f"{h}.safetensors", half=h) for h in (False, True))
    assert half.stat().st_size < full.stat().st_size
    weights = [load(p).state_dict()["g_a.0.weight"] for p in (full, half)]
    assert weights[1].dtype == torch.float32 and 0 < (weights[0] - weights[1]).abs().max() < 1e-2
    for (name, exact), (_, stored) in zip(
        load(full).named_buffers(), load(half).named_buffers(), strict=True
    ):
        assert torch.equal(exact, stored), (
            f"{name}: 1e-9 is 0 in float16, and a likelihood of 0 an infinite loss"
        )


@pytest.mark.parametrize("half", [False, True])
def test_complex_parameters_are_kept_whole(half: bool, tmp_path: Path) -> None:
    def make() -> Any:
        codec = BlockCodec(nn.ReLU())
        codec.spectrum = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        return codec

    codec = make()
    file = save(codec, tmp_path / "a.safetensors", factory=make, half=half)
    assert torch.equal(load(file, factory=make).spectrum, codec.spectrum)


def test_truncated_and_foreign_files_are_one_line(tmp_path: Path, hyperprior: nn.Module) -> None:
    path = save(hyperprior, tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError, match="cut short"):
            load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="not one that nicprune saved"):
        load(path)
    with pytest.raises(FileError, match="no such file"):
        load(tmp_path / "nowhere.safetensors")


def test_a_failed_save_leaves_the_old_file_whole(
    tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(hyperprior, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nicprune.storage.checkpoint.save_file", full)
    with pytest.raises(FileError, match="cannot write .*No space left"):
        save(hyperprior, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_attached_codecs_are_not_saved(tmp_path: Path, hyperprior: nn.Module) -> None:
    with pytest.raises(CodecError, match="harden"):
        save(attach(hyperprior, "none"), tmp_path / "a.safetensors")


class Foreign(CompressionModel):
    """A codec of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        inner = FactorizedPrior(8, 12)
        self.g_a, self.g_s, self.entropy_bottleneck = inner.g_a, inner.g_s, inner.entropy_bottleneck

    forward, compress, decompress = (
        FactorizedPrior.forward,
        FactorizedPrior.compress,
        FactorizedPrior.decompress,
    )


def test_foreign_classes_load_if_imported_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = attach(Foreign(), "magnitude", budget={"macs": 0.5}, round_to=1).harden()
    path = save(small, tmp_path / "a.safetensors")
    assert same_state(state_of(load(path)), state_of(small))
    monkeypatch.delitem(sys.modules, Foreign.__module__)
    with pytest.raises(CodecError, match="not loaded here; import it first or pass factory="):
        load(path)
    assert same_state(state_of(load(path, factory=Foreign)), state_of(small))


@pytest.mark.parametrize(
    ("path", "kwargs"), [("os:system", {"command": "true"}), ("subprocess:Popen", {"args": "true"})]
)
def test_a_file_cannot_name_something_to_call(
    tmp_path: Path, hyperprior: nn.Module, path: str, kwargs: dict[str, str]
) -> None:
    from safetensors.torch import save_file

    file, build = tmp_path / "a.safetensors", {"class": path, "kwargs": kwargs}
    header = {"format": "nicprune", "version": 1, "name": "x", "build": build}
    save_file(
        {k: v.clone() for k, v in hyperprior.state_dict().items()},
        file,
        metadata={"nicprune": json.dumps(header)},
    )
    with pytest.raises(CodecError, match="not a CompressionModel class"):
        load(file)
    provenance(hyperprior).build = build
    with pytest.raises(CodecError, match="not a CompressionModel class"):
        save(hyperprior, file)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module."])
def test_compressai_files(tmp_path: Path, wrap: str) -> None:
    codec = ScaleHyperprior(128, 192)
    state = codec.state_dict()
    if wrap == "module.":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save(
        {"state_dict": state, "epoch": 3} if wrap != "bare" else state, tmp_path / "c.pth.tar"
    )
    loaded = load_codec("bmshj2018-hyperprior", 3, weights=tmp_path / "c.pth.tar")
    assert torch.equal(loaded.state_dict()["g_a.0.weight"], codec.state_dict()["g_a.0.weight"])
    assert loaded.compress(image(loaded))["strings"]


def test_compressai_files_of_older_keys(tmp_path: Path) -> None:
    codec = FactorizedPrior(128, 192)
    codec.update()
    old = {}
    for key, value in codec.state_dict().items():
        for now, then in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
            key = key.replace(now, then)
        old[key] = value
    torch.save(old, tmp_path / "old.pth.tar")
    loaded = load_codec("bmshj2018-factorized", 1, weights=tmp_path / "old.pth.tar")
    x = image(codec)
    assert torch.equal(loaded(x)["x_hat"], codec.eval()(x)["x_hat"])


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle ran')",))


def test_copies_keep_the_record_so_that_budgets_do_not_compound(
    hyperprior: nn.Module, tmp_path: Path
) -> None:
    first = attach(hyperprior, "magnitude", budget={"macs": 0.5}, round_to=1).harden()
    copied = copy.deepcopy(first)
    assert provenance(copied).original == provenance(first).original and provenance(
        copied
    ) is not provenance(first)
    with pytest.raises(BudgetError, match="is met already"):
        attach(copied, "magnitude", budget={"macs": 0.5}, round_to=1)
    assert (
        provenance(load(save(copied, tmp_path / "a.safetensors"))).original
        == provenance(first).original
    )


def test_codecs_with_masks_on_are_neither_saved_nor_pruned(
    hyperprior: nn.Module, tmp_path: Path
) -> None:
    attach(hyperprior, "mask_decay", budget={"macs": 0.5}, round_to=1, decay_steps=4)
    with pytest.raises(CodecError, match="methods attached"):
        save(hyperprior, tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError, match="method attached"):
        prune(hyperprior, {})


@pytest.mark.parametrize(
    "header",
    [
        {"format": "nicprune", "version": 1},
        {"format": "nicprune", "version": 1, "name": "x", "build": "text"},
        {"format": "nicprune", "version": 1, "name": "x", "build": {"class": "compressai.foo:Bar"}},
        {
            "format": "nicprune",
            "version": 1,
            "name": "x",
            "build": {"class": "compressai.models.google:ScaleHyperprior", "kwargs": {"Q": 1}},
        },
        {
            "format": "nicprune",
            "version": 1,
            "name": "x",
            "build": {
                "class": "compressai.models.google:ScaleHyperprior",
                "kwargs": {"N": 10**9, "M": 2},
            },
        },
        {"format": "nicprune", "version": 99},
    ],
)
def test_headers_of_others_end_in_one_line(
    header: dict[str, object], tmp_path: Path, hyperprior: nn.Module
) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v.clone() for k, v in hyperprior.state_dict().items()},
        tmp_path / "a.safetensors",
        metadata={"nicprune": json.dumps(header)},
    )
    with pytest.raises((FileError, CodecError)) as caught:
        load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_weights_of_a_neighbour_are_refused(tmp_path: Path) -> None:
    torch.save(MeanScaleHyperprior(16, 24).state_dict(), tmp_path / "mean.pth")
    with pytest.raises(FileError, match="its layers' widths do not match"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "mean.pth")
    torch.save(ScaleHyperprior(16, 24).state_dict(), tmp_path / "narrow.pth")
    with pytest.warns(UserWarning, match="has other widths than bmshj2018-hyperprior quality 1"):
        assert (
            load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "narrow.pth")
            .g_a[0]
            .out_channels
            == 16
        )


def test_arguments_that_would_be_ignored_are_refused(tmp_path: Path, hyperprior: nn.Module) -> None:
    path = save(hyperprior, tmp_path / "a.safetensors")
    with pytest.raises(CodecError, match="brings its own weights"):
        load_codec(str(path), weights="other.pth")
    with pytest.raises(CodecError, match="trained for mse"):
        load_codec("demo-hyperprior", 3, metric="ms-ssim")


def test_pickles_that_would_run_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.pth.tar")
    with pytest.raises(FileError, match="could run code"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "evil.pth.tar")
    (tmp_path / "raw.pth.tar").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(FileError):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "raw.pth.tar")


def test_truncated_and_foreign_checkpoints(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(ScaleHyperprior(8, 12).state_dict(), buffer)
    (tmp_path / "cut.pth.tar").write_bytes(buffer.getvalue()[:5000])
    with pytest.raises(FileError, match="is damaged or cut short"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "cut.pth.tar")
    torch.save([1, 2], tmp_path / "list.pth.tar")
    with pytest.raises(FileError, match="holds no state dict"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "list.pth.tar")
    torch.save(FactorizedPrior(8, 12).state_dict(), tmp_path / "other.pth.tar")
    with pytest.raises(FileError, match="does not fit ScaleHyperprior: missing"):
        load_codec("bmshj2018-hyperprior", 1, weights=tmp_path / "other.pth.tar")


def test_names_qualities_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodecError, match="did you mean 'bmshj2018-hyperprior'"):
        load_codec("bmshj2018-hyperpior", 1)
    with pytest.raises(CodecError, match="has no quality 9; it has 1 to 8"):
        load_codec("mbt2018", 9)
    with pytest.raises(CodecError, match="needs a quality"):
        load_codec("mbt2018", weights="none")
    with pytest.raises(CodecError, match="no official weights; use weights='none'"):
        load_codec("elic2022-official", 1)
    with pytest.raises(CodecError, match="cannot import"):
        load_codec("no_such_package:codec")
    module = types.ModuleType("my_codecs")
    module.small = lambda quality: ScaleHyperprior(8 * quality, 24)  # type: ignore[attr-defined]
    module.wrong = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_codecs", module)
    assert load_codec("my_codecs:small", 2).g_a[0].out_channels == 16
    with pytest.raises(CodecError, match="expected a compressai CompressionModel, got int"):
        load_codec("my_codecs:wrong")


def test_official_weights_come_through_compressais_downloader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loading code, against a file where the network would be."""
    codec = ScaleHyperprior(128, 192)
    codec.update()
    torch.save(codec.state_dict(), tmp_path / "bmshj2018-hyperprior-1-0.pth.tar")
    from compressai.zoo import image as zoo

    monkeypatch.setitem(
        zoo.model_urls["bmshj2018-hyperprior"]["mse"],
        1,
        (tmp_path / "bmshj2018-hyperprior-1-0.pth.tar").as_uri(),
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    loaded = load_codec("bmshj2018-hyperprior", 1)
    x = image(codec)
    assert torch.equal(loaded(x)["x_hat"], codec.eval()(x)["x_hat"])
    assert provenance(loaded).name == "bmshj2018-hyperprior" and provenance(loaded).quality == 1
    monkeypatch.setitem(
        zoo.model_urls["bmshj2018-hyperprior"]["mse"], 2, (tmp_path / "nowhere.pth.tar").as_uri()
    )
    with pytest.raises(
        CodecError,
        match="could not be downloaded: .*use weights='none' .* or weights='file.pth.tar'",
    ):
        load_codec("bmshj2018-hyperprior", 2)


@pytest.mark.parametrize(
    "name",
    [
        "bmshj2018-factorized",
        "bmshj2018-factorized-relu",
        "bmshj2018-hyperprior",
        "mbt2018-mean",
        "mbt2018",
        "cheng2020-anchor",
    ],
)
def test_every_quality_has_its_widths(name: str) -> None:
    from nicprune.codecs.zoo import qualities

    ends = [
        load_codec(name, q, weights="none").g_a[0]
        for q in (qualities(name)[0], qualities(name)[-1])
    ]
    widths = [
        layer.out_channels if hasattr(layer, "out_channels") else layer.conv1.out_channels
        for layer in ends
    ]
    assert widths == ([192, 192] if name == "mbt2018" else [128, 192])


def test_header_is_read_without_weights(tmp_path: Path, hyperprior: nn.Module) -> None:
    assert read_header(save(hyperprior, tmp_path / "a.safetensors"))["build"]["class"].endswith(
        ":ScaleHyperprior"
    )


def test_unknown_settings_name_the_closest(hyperprior: nn.Module) -> None:
    with pytest.raises(RecipeError, match="unknown key 'budgte'; did you mean 'budget'"):
        attach(hyperprior, "magnitude", budgte={"macs": 0.5})


def test_a_file_of_another_quality_is_loaded_with_a_warning(tmp_path: Path) -> None:
    file = save(load_codec("demo-hyperprior", 4), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="says quality 4, and is loaded as quality 1"):
        assert provenance(load_codec("demo-hyperprior", 1, weights=file)).quality == 1
    assert provenance(load_codec("demo-hyperprior", 4, weights=file)).quality == 4
