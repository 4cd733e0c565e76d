"""What methods look at, and what fails half-way, leaves codecs and other methods as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import METHOD_SETTINGS, QUICK_FIT, built, image, same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds.entropy import learns_density
from nicprune.common.errors import CodecError, FileError, TrainingError
from nicprune.data.images import write_png
from nicprune.methods import METHODS, attach
from nicprune.methods.with_teacher import taught
from nicprune.pruning.cost import measure
from nicprune.storage.adaptation import load_adaptation, save_adaptation
from nicprune.storage.checkpoint import read_contents, save, write_file
from nicprune.training.loop import fit
from nicprune.training.trained_parameters import density_parameters


class Counting(ScaleHyperprior):
    """A codec that counts its passes."""

    calls: Tensor

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


GROW = ("adaptation", {"form": "grow", "grow": 0.5, "round_to": 4})
LOOKING = [
    (name, METHOD_SETTINGS.get(name, {})) for name in sorted(set(METHODS) - {"distillation"})
]


@pytest.mark.parametrize(("method", "settings"), [*LOOKING, GROW], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_attaching_and_preparing_run_a_codec_without_a_trace(
    method: str, settings: dict[str, Any], training: bool
) -> None:
    torch.manual_seed(0)
    codec = Counting(8, 12).train(training)
    attached = attach(codec, method, **settings)
    attached.prepare([image(codec, 1)])
    assert not float(codec.calls)


class Caching(ScaleHyperprior):
    """A codec that keeps a buffer for the size of the last image, and its latents."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.size: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Any:
        height, width = x.shape[-2:]
        if self.size != (height, width):
            self.size = (height, width)
            self.register_buffer("table", torch.linspace(0, 1, width).expand(height, width))
        out = super().forward(x)
        self.last = out["x_hat"]
        return out | {"x_hat": out["x_hat"] + self.table}


SEEN = (1, 3, 128, 64)
WORK = [(work, seen) for work in ("measure", "attach", "prepare") for seen in (None, SEEN)]


# No constructor makes the table that a used codec has in its state: a new one alone is saved.
@pytest.mark.parametrize(("work", "seen"), [*WORK, ("save", None)])
def test_what_a_codec_keeps_of_an_image_is_put_back(
    work: str, seen: tuple[int, ...] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    codec = Caching(8, 12).eval()
    if seen is not None:
        codec(torch.rand(seen))
    last, size, keys = getattr(codec, "last", None), codec.size, list(codec.state_dict())
    table = codec.table.clone() if seen is not None else None
    if work == "measure":
        measure(codec)
    elif work == "save":
        save(codec, tmp_path / "codec.safetensors")
    else:
        attached = attach(codec, "fisher", budget={"macs": 0.8}, round_to=1)
        if work == "prepare":
            attached.prepare([image(codec, 1)])
        attached.detach()
    assert codec.size == size and getattr(codec, "last", None) is last
    assert list(codec.state_dict()) == keys
    assert table is None or torch.equal(codec.table, table)


def test_what_one_method_looks_at_is_no_training_of_another() -> None:
    codec = built("bmshj2018-hyperprior")[0].train()
    gates = ("channel_gating", {"budget": {"macs": 0.7}, "gating_steps": 20})
    attached = attach(codec, [("fisher", {"budget": {"macs": 0.8}, "round_to": 1}), gates])
    before = state_of(attached.methods[1])
    attached.prepare([torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)])
    assert same_state(before, state_of(attached.methods[1]))


@pytest.mark.parametrize("work", ["attach", "save"])
def test_other_devices_draw_on_as_they_would(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    codec = built("bmshj2018-hyperprior")[0]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    if work == "attach":
        attach(codec, "temporal_entropy_model", **METHOD_SETTINGS["temporal_entropy_model"])
    else:
        save(codec, tmp_path / "codec.safetensors")
    assert not seeded


def test_a_finished_training_returns_its_last_figures(tmp_path: Path) -> None:
    photo = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    results = [
        fit(built("bmshj2018-hyperprior")[0], photo, steps=2, folder=tmp_path / "run", **QUICK_FIT)
        for _ in range(2)
    ]
    assert results[0].metrics and results[1].metrics == results[0].metrics


def test_a_damaged_adaptation_leaves_the_codec_free(tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(codec, "adaptation", form="decoder_adapter", hidden=4)
    good = save_adaptation(attached, tmp_path / "good.safetensors")
    attached.detach()
    header, tensors = read_contents(good)
    header.pop("digest")
    name = next(key for key in tensors if "adapters" in key)
    bad = tmp_path / "bad.safetensors"
    write_file(bad, header, {**tensors, name: torch.full_like(tensors[name], torch.nan)})
    with pytest.raises(FileError, match="not finite"):
        load_adaptation(codec, bad)
    assert not has_hooks(codec)
    assert load_adaptation(codec, good)


def test_training_that_is_refused_leaves_the_memory_format(tmp_path: Path) -> None:
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    codec = built("bmshj2018-hyperprior")[0].requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(codec, tmp_path, steps=1, **QUICK_FIT)
    assert all(parameter.is_contiguous() for parameter in codec.parameters())


def test_a_teacher_that_does_not_fit_in_memory_leaves_the_methods_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(codec, "channel_gating", **METHOD_SETTINGS["channel_gating"])

    def full(*_: Any, **__: Any) -> nn.Module:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("nicprune.methods.with_teacher.attach", full)
    with pytest.raises(torch.OutOfMemoryError):
        taught(attached, [("distillation", {"output": 0.5})], built("bmshj2018-hyperprior")[0])
    assert has_hooks(codec)
    with pytest.raises(CodecError, match="attached already"):
        attached.attach_again()


def test_one_step_that_is_not_finite_does_not_spoil_the_stages_that_follow() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    stack = [
        ("mask_decay", METHOD_SETTINGS["mask_decay"]),
        ("distillation", {"features": 1.0, "stages": "adaptive"}),
    ]
    for broken in (0, 1):
        attached = attach(codec, stack).train()
        for step in range(3):
            x = image(codec, step).clone()
            if step == broken:
                x[0, 0, 0, 0] = torch.inf
            loss = attached.loss(attached(x), x)
            assert bool(loss.isfinite()) == (step != broken)
            loss.backward()
            attached.after_step()
        distances: Any = attached.methods[1].distances
        assert bool(distances.isfinite().all()) and bool(distances.any())
        attached.detach()


DENSITIES = [
    ("slimmable", {"widths": [1.0, 0.5], "round_to": 1, "latents": "slim"}),
    ("temporal_entropy_model", METHOD_SETTINGS["temporal_entropy_model"]),
]


@pytest.mark.parametrize(("method", "settings"), DENSITIES, ids=str)
def test_densities_of_methods_learn_as_the_codecs_do(method: str, settings: Any) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], method, **settings)
    own = [layer for layer in attached.methods.modules() if learns_density(layer)]
    every = {id(parameter) for parameter in density_parameters(attached)}
    assert own and all(id(layer.matrices[0]) in every for layer in own)  # type: ignore[index,union-attr]


def test_two_methods_of_one_name_are_told_apart() -> None:
    sides = [
        ("mask_decay", {"budget": {side: 0.7}, "side": side, "round_to": 1, "decay_steps": 4})
        for side in ("encoder", "decoder")
    ]
    attached = attach(built("bmshj2018-hyperprior")[0], sides)
    assert {"mask_decay/macs", "mask_decay 2/macs"} <= attached.metrics().keys()


@pytest.mark.parametrize("lmbda", [0.0018, 0.05])
def test_importance_of_widths_is_that_of_the_lambda_of_training(
    lmbda: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1,
        order="importance",
    )  # fmt: skip
    weighed: list[float] = []
    import nicprune.methods.multi_width.slimmable as module

    own = module.importance
    monkeypatch.setattr(
        module, "importance", lambda *args: (weighed.append(args[4]), own(*args))[1]
    )
    attached.set_objective(lmbda)
    attached.prepare([image(attached.codec)])
    assert weighed == [lmbda]


def test_gates_are_calibrated_on_codecs_that_take_more_than_an_image() -> None:
    class Scaled(ScaleHyperprior):
        def forward(self, x: Tensor, gain: float) -> Any:  # type: ignore[override]
            return super().forward(x * gain)

    torch.manual_seed(0)
    codec: Any = Scaled(8, 12).eval()
    codec.example_arguments = lambda x: {"gain": 0.5}
    attached = attach(codec, "channel_gating", budget={"macs": 0.7}, gating_steps=2)
    attached.train()
    x = torch.rand(1, 3, 64, 64)
    for _ in range(2):
        out = attached(x)
        (out["x_hat"].mean() + attached.loss(out, x)).backward()
        attached.after_step()
    attached.calibrate([x])
    assert attached.done
