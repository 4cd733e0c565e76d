"""Slimmable codecs: each width is a codec, computes no more than that, codes, and can be taken out;
the schedule of lambdas.
"""

from __future__ import annotations

import copy
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressai.ops.parametrizers import NonNegativeParametrizer
from helpers import built, image, same_state, state_of
from helpers_cli import call as command
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec, block_codec

import nicprune as nip
from nicprune.codecs.layer_kinds import is_bottleneck
from nicprune.common.errors import (
    BudgetError,
    CodecError,
    FileError,
    NicpruneError,
    RecipeError,
    TrainingError,
)
from nicprune.data.images import write_png
from nicprune.methods import Attached, attach
from nicprune.methods.multi_width.lambda_schedule import LambdaSchedule, ScheduleConfig
from nicprune.methods.multi_width.slimmable import Slimmable
from nicprune.pruning.cost import measure
from nicprune.pruning.views import override_attributes
from nicprune.storage.checkpoint import load, save
from nicprune.training.loop import fit

CODECS = [
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-anchor",
    "cheng2020-attn",
]
KINDS = [("switch", "fixed"), ("slim", "slim"), ("slim+", "slim"), ("slim+", "fixed")]
WIDTHS: dict[str, Any] = {"widths": [1.0, 0.5, 0.25], "round_to": 1}


def slimmable(attached: Attached) -> Slimmable:
    method = attached.methods[0]
    assert isinstance(method, Slimmable)
    return method


def slim(name: str, **settings: Any) -> Attached:
    """A slimmable codec whose own parameters have moved from where they start."""
    attached = attach(built(name)[0], "slimmable", **{**WIDTHS, **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attached.methods.parameters():
            parameter.add_(0.03 * torch.rand(parameter.shape, generator=generator))
    return attached.eval()


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.abs().max())


def one_line(error: pytest.ExceptionInfo[NicpruneError], *parts: str) -> None:
    told = str(error.value)
    assert "\n" not in told and all(part in told for part in parts), told


FEW = {"cheng2020-attn": KINDS[:1], "elic2022-chandelier": [KINDS[0], KINDS[2]]}
"""Of the slow ones, one kind that works, and for ELIC one that does not, have to do."""

DAILY = [
    ("bmshj2018-hyperprior", *KINDS[1]), ("bmshj2018-hyperprior", *KINDS[2]),
    ("mbt2018-mean", *KINDS[3]), ("bmshj2018-factorized", *KINDS[0]),
]  # fmt: skip
"""Each kind, on codecs that take little time."""


@pytest.mark.parametrize(
    ("name", "gdn", "latents"),
    [
        pytest.param(name, *kind, marks=() if (name, *kind) in DAILY else pytest.mark.slow)
        for name in [*CODECS, "elic2022-chandelier"]
        for kind in FEW.get(name, KINDS)
    ],
)
def test_each_width_is_a_codec_of_its_own(name: str, gdn: str, latents: str) -> None:
    if name == "elic2022-chandelier" and latents == "slim":
        with pytest.raises(CodecError) as error:
            slim(name, gdn=gdn, latents=latents)
        one_line(error, "entropy_bottleneck", "latents: fixed")
        return
    attached = slim(name, gdn=gdn, latents=latents)
    attached.update(force=True)
    state, x = state_of(attached), image(attached.codec, 1)
    outputs = []
    for width in range(3):
        small: Any = attached.extract(width)
        assert type(small) is type(attached.codec) and same_state(state, state_of(attached))
        with torch.no_grad():
            mine, own = attached(x, width=width), small(x)
            assert relative(own["x_hat"], mine["x_hat"]) <= 1e-5
            for key, value in own["likelihoods"].items():
                assert value.shape == mine["likelihoods"][key].shape
                assert float((value - mine["likelihoods"][key]).abs().max()) <= 1e-5
            # Cost is what fvcore counts on the codec taken out.
            assert measure(small) == attached.totals()
            small.update(force=True)
            sent, alone = attached.compress(x, width=width), small.compress(x)
            assert sent["strings"][0] == [bytes([width])]
            received = attached.decompress(sent["strings"], sent["shape"])["x_hat"]
            assert torch.equal(
                received, attached.decompress(sent["strings"], sent["shape"], width=width)["x_hat"]
            )
            if gdn != "slim+":  # its parameters are stored behind a square root
                assert sent["strings"][1:] == alone["strings"]
            assert (
                relative(small.decompress(alone["strings"], alone["shape"])["x_hat"], received)
                <= 1e-3
                or gdn == "slim+"
            )
        outputs.append(mine["x_hat"])
        if latents == "slim" and width:
            assert all(
                m.channels < max(b.channels for b in attached.codec.modules() if is_bottleneck(b))
                for m in small.modules()
                if is_bottleneck(m)
            )  # type: ignore[operator]
    assert relative(outputs[0], outputs[1]) > 1e-2 and relative(outputs[1], outputs[2]) > 1e-2
    assert not any(
        "weight" in m.__dict__ or "gamma" in m.__dict__ for m in attached.codec.modules()
    )


def test_cdf_tables_of_widths_need_not_be_as_long_as_each_other(tmp_path: Path) -> None:
    attached = slim("bmshj2018-hyperprior", gdn="slim", latents="slim")
    with torch.no_grad():  # what training comes to
        attached.codec.entropy_bottleneck.quantiles[:, :, 2] += 40  # type: ignore[union-attr,index]
    attached.update(force=True)
    sizes = [
        b._quantized_cdf.shape[1]
        for b in (attached.codec.entropy_bottleneck, *slimmable(attached).bottlenecks.values())
    ]  # type: ignore[union-attr]
    assert len(set(sizes)) > 1
    again = load(
        save(attached, tmp_path / "c.safetensors"), factory=lambda: built("bmshj2018-hyperprior")[0]
    )
    x = image(attached.codec, 1)
    for other in (again, attached.harden(), copy.deepcopy(attached)):
        for width in range(3):
            assert (
                other.compress(x, width=width)["strings"]
                == attached.compress(x, width=width)["strings"]
            )


def test_layers_compute_with_what_is_active_alone() -> None:
    attached, seen = slim("mbt2018"), {}
    for name, layer in attached.codec.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(
                    name, (args[0].shape[1], out.shape[1])
                )
            )
    for width in range(3):
        with torch.no_grad():
            attached(image(attached.codec), width=width)
        small = attached.extract(width)
        for name, layer in small.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert seen[name] == (layer.in_channels, layer.out_channels), (width, name)


def test_no_parameter_is_copied_where_channels_lead() -> None:
    attached = slim("bmshj2018-hyperprior", gdn="slim")
    codec: Any = attached.codec
    inside: list[Tensor] = []
    codec.g_a[2].register_forward_pre_hook(lambda m, args: inside.append(m.weight))
    with torch.no_grad():
        attached(image(codec), width=1)
    assert inside[0].data_ptr() == codec.g_a[2].weight.data_ptr() and inside[0].shape[:2] == (8, 8)


def test_slim_plus_is_the_published_formula() -> None:
    attached = slim("bmshj2018-hyperprior", gdn="slim+")
    layer: Any = attached.codec.g_a[1]
    own: Any = slimmable(attached).norms["2_g_a/1"]
    positive = NonNegativeParametrizer()
    found: list[Tensor] = []
    layer.register_forward_hook(lambda m, args, out: found.extend([args[0], out]))
    with torch.no_grad():
        attached(image(attached.codec), width=2)
        scales, offsets = positive(own.scales), positive(own.offsets)
        gamma = scales[0] * layer.gamma_reparam(layer.gamma)[:4, :4] + offsets[0]
        beta = scales[1] * layer.beta_reparam(layer.beta)[:4] + offsets[1]
        x, out = found
        expected = x / torch.sqrt(
            beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x.square())
        )
    assert relative(expected, out) <= 1e-5
    fresh: Any = slimmable(
        attach(built("bmshj2018-hyperprior")[0], "slimmable", **WIDTHS, gdn="slim+")
    ).norms["2_g_a/1"]
    assert torch.allclose(positive(fresh.scales), torch.ones(2)) and torch.allclose(
        positive(fresh.offsets), torch.zeros(2), atol=1e-12
    )


@pytest.mark.parametrize("gdn", ["switch", "slim", "slim+"])
def test_gdn_variants_start_alike_and_share_what_they_share(gdn: str) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "slimmable", **WIDTHS, gdn=gdn).eval()
    plain = attach(built("bmshj2018-hyperprior")[0], "slimmable", **WIDTHS, gdn="slim").eval()
    codec: Any = attached.codec
    x = image(codec)
    with torch.no_grad():
        for width in range(3):
            assert (
                relative(plain(x, width=width)["x_hat"], attached(x, width=width)["x_hat"]) <= 1e-5
            )
        before = [attached(x, width=width)["x_hat"] for width in range(3)]
        codec.g_a[1].gamma.mul_(1.5)
        changed = [
            relative(b, attached(x, width=width)["x_hat"]) > 1e-4 for width, b in enumerate(before)
        ]
    assert changed == [True, gdn != "switch", gdn != "switch"]


def test_the_order_is_what_matters_first() -> None:
    """A channel that does nothing comes last, wherever it is numbered; nothing else changes."""
    codec: Any = built("bmshj2018-hyperprior")[0]
    with torch.no_grad():
        for layer, channels in ((codec.g_a[2], [0, 1, 5]), (codec.g_s[2], [2, 3])):
            rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            layer.weight.index_fill_(rows, torch.tensor(channels), 0.0)
            layer.bias[channels] = 0.0
    x = image(codec, 3)
    with torch.no_grad():
        whole = codec.eval()(x)["x_hat"]
    attached = attach(codec, "slimmable", widths=[1.0, 0.75, 0.5], round_to=1, order="importance")
    state = state_of(codec)
    attached.prepare([image(codec, seed) for seed in range(3)])
    assert same_state(state, codec.state_dict()) and not any(
        p.grad is not None for p in codec.parameters()
    )
    orders = {
        name: getattr(slimmable(attached), "order_" + name.replace(".", "/")).tolist()
        for name in ("g_a.2", "g_s.2")
    }
    assert set(orders["g_a.2"][-3:]) == {0, 1, 5} and set(orders["g_s.2"][-2:]) == {2, 3}
    with torch.no_grad():
        assert torch.equal(attached.eval()(x)["x_hat"], whole)
    kept = [slimmable(attached)._slices[i].keep for i in (1, 2)]
    assert all(set(kept[1][name]) <= set(kept[0].get(name, range(99))) for name in kept[1]), (
        "widths are nested"
    )
    # The file says in which order.
    twin = attach(
        built("bmshj2018-hyperprior")[0],
        "slimmable",
        widths=[1.0, 0.75, 0.5],
        round_to=1,
        order="importance",
    )
    twin.load_state_dict(copy.deepcopy(attached.state_dict()))
    with torch.no_grad():
        assert torch.equal(attached(x, width=2)["x_hat"], twin.eval()(x, width=2)["x_hat"])


def test_an_order_that_was_not_measured_is_no_order(photographs: Path, tmp_path: Path) -> None:
    attached = slim("bmshj2018-factorized", widths=[1.0, 0.5], order="importance")
    with pytest.raises(TrainingError) as error:
        fit(attached, photographs, steps=1, batch_size=1, patch_size=64, progress=False)
    one_line(error, "prepare(images)")
    attached.prepare([torch.rand(1, 3, 64, 64)])
    fit(attached, photographs, steps=1, batch_size=1, patch_size=64, progress=False)
    again: Any = load(
        save(attached, tmp_path / "a.safetensors"), factory=lambda: built("bmshj2018-factorized")[0]
    )
    fit(again, photographs, steps=1, batch_size=1, patch_size=64, progress=False)


def test_widths_by_budget_are_the_largest_that_meet_it() -> None:
    attached = attach(
        built("mbt2018-mean")[0], "slimmable", macs=[1.0, 0.5, 0.25, 0.12], round_to=1
    )
    whole = attached.cost.original.macs
    for width, share in enumerate([1.0, 0.5, 0.25, 0.12]):
        attached.set_width(width)
        assert attached.totals().macs <= share * whole
        method = slimmable(attached)
        if width:
            wider = {
                name: min(attached.groups[name].width, count + 1)
                for name, count in method._table[width].items()
            }
            assert attached.cost.totals(wider).macs > share * whole
    with pytest.raises(BudgetError) as error:
        attach(built("mbt2018-mean")[0], "slimmable", macs=[1.0, 0.0001], round_to=1)
    one_line(error, "cannot be met by uniform widths")


def test_widths_as_channels() -> None:
    by_share = attach(built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1)
    by_count = attach(built("bmshj2018-hyperprior")[0], "slimmable", widths=[16, 8], round_to=1)
    assert slimmable(by_share)._table == slimmable(by_count)._table


def test_a_slimmable_codec_is_saved_and_coded_at_any_width(tmp_path: Path) -> None:
    attached = slim("bmshj2018-hyperprior", latents="slim")
    attached.update(force=True)
    again: Any = load(save(attached, tmp_path / "slim.safetensors"))
    x = image(attached.codec, 2)
    picture = (x[0] * 255).round().byte()
    for width in range(3):
        with torch.no_grad():
            assert torch.equal(attached(x, width=width)["x_hat"], again(x, width=width)["x_hat"])
        data = nip.encode(attached, picture, width=width)
        again.set_width(0)
        assert torch.equal(nip.decode(again, data), nip.decode(attached, data))
        alone = save(again.extract(width), tmp_path / f"{width}.safetensors")
        with pytest.raises(FileError) as error:
            nip.decode(load(alone), data)
        one_line(error, "another codec")
    scores = [
        nip.evaluate(again, [write_png(x[0], tmp_path / "a.png")], width=width)
        for width in range(3)
    ]
    assert [s.cost.macs for s in scores] == sorted((s.cost.macs for s in scores), reverse=True)
    assert [s.cost.params for s in scores] == [
        measure(attached.extract(width)).params for width in range(3)
    ]


def test_a_width_is_measured_where_it_is_set() -> None:
    attached = slim("bmshj2018-hyperprior", widths=[1.0, 0.5])
    for width in range(2):
        attached.set_width(width)
        assert measure(attached).macs == measure(attached.extract(width)).macs


def test_reading_leaves_the_width_that_is_set() -> None:
    attached = slim("bmshj2018-factorized", widths=[1.0, 0.5]).eval()
    attached.update(force=True)
    x = image(attached.codec, 0)
    sent = attached.compress(x, width=1)
    attached.set_width(0)
    attached.decompress(sent["strings"], sent["shape"])
    assert attached.widths is not None and attached.widths.now == 0


def test_a_pruned_codec_becomes_slimmable_and_a_width_is_pruned() -> None:
    codec, _ = built("mbt2018-mean")
    small = attach(codec, "magnitude", budget={"macs": 0.6}, round_to=1).harden()
    attached = attach(small, "slimmable", **WIDTHS)
    one = attached.extract(1)
    smaller = attach(one, "magnitude", widths={"g_a.0": 2}).harden()
    assert measure(smaller).macs < measure(one).macs < measure(small).macs < measure(codec).macs


# -- learning -------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for i in range(3):
        small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        write_png(
            nn.functional.interpolate(small, size=(80, 96), mode="bicubic")[0],
            tmp_path / "photographs" / f"{i}.png",
        )
    return tmp_path / "photographs"


QUICK: dict[str, Any] = {
    "batch_size": 1,
    "patch_size": 64,
    "progress": False,
    "precision": "32",
    "log_every": 1,
}


def test_a_step_adds_up_the_gradients_of_all_widths() -> None:
    """What `fit` does width by width is the gradient of the sum."""
    attached = slim("bmshj2018-hyperprior", lambdas=[0.02, 0.01, 0.005])
    x = image(attached.codec)
    attached.train()

    def losses() -> list[Tensor]:
        found = []
        for width in attached.widths_per_step():
            torch.manual_seed(width)
            out = attached(x, width=width)
            objective = attached.objective(out, x)
            assert objective is not None
            expected = (0.02, 0.01, 0.005)[width] * 255**2 * objective["mse_loss"] + objective[
                "bpp_loss"
            ]
            assert torch.allclose(objective["loss"], expected)
            found.append(objective["loss"])
        return found

    torch.stack(losses()).sum().backward()
    together = {
        name: p.grad.clone() for name, p in attached.named_parameters() if p.grad is not None
    }
    attached.zero_grad()
    for loss in losses():
        loss.backward()
    assert together.keys() == {
        name for name, p in attached.named_parameters() if p.grad is not None
    }
    assert all(
        torch.allclose(together[n], p.grad, rtol=1e-4, atol=1e-7)
        for n, p in attached.named_parameters()
        if p.grad is not None
    )
    # What only the widest has learns from the widest alone.
    codec: Any = attached.codec
    attached.zero_grad()
    attached.objective(attached(x, width=2), x)["loss"].backward()  # type: ignore[index]
    assert (
        float(codec.g_a[2].weight.grad[4:].abs().max())
        == 0
        < float(codec.g_a[2].weight.grad[:4, :4].abs().max())
    )


def test_fit_trains_every_width(photographs: Path) -> None:
    attached = slim("bmshj2018-hyperprior", latents="slim", lambdas=[0.02, 0.01, 0.005])
    before = state_of(attached)
    fit(attached, photographs, steps=3, lr=1e-3, **QUICK)
    after = state_of(attached)
    still = [
        key for key in before if torch.equal(before[key], after[key]) and "schedule" not in key
    ]
    assert all(
        any(
            part in key
            for part in (
                "order_",
                "reparam",
                "bound",
                "target",
                "scale_table",
                "_cdf",
                "_offset",
                "scale_bound",
            )
        )
        for key in still
    ), still
    # Their entropy bottlenecks' medians, too, by the auxiliary loss.
    assert any(
        key.startswith("methods.0.bottlenecks") and key.endswith("quantiles")
        for key in before.keys() - set(still)
    )


def test_sandwich_draws_widths_in_between() -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        "slimmable",
        widths=[1.0, 0.8, 0.6, 0.4, 0.2],
        round_to=1,
        sandwich=1,
    )
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        passes = attached.widths_per_step()
        assert passes[0] == 0 and passes[-1] == 4 and len(passes) == 3
        drawn.add(passes[1])
    assert drawn == {1, 2, 3}
    assert attach(built("bmshj2018-hyperprior")[0], "slimmable", **WIDTHS).widths_per_step() == [
        0,
        1,
        2,
    ]


def test_distillation_draws_narrow_widths_to_the_widest() -> None:
    attached = slim("bmshj2018-hyperprior", lambdas=[0.01, 0.01, 0.01], distill=0.5)
    x = image(attached.codec)
    with torch.no_grad():
        wide, narrow = attached(x, width=0), attached(x, width=1)
        attached.set_width(0)
        assert float(attached.loss(wide, x)) == 0
        attached.set_width(1)
        expected = 0.5 * 0.01 * 255**2 * float((wide["x_hat"] - narrow["x_hat"]).square().mean())
        assert float(attached.loss(narrow, x)) == pytest.approx(expected, rel=1e-5)


SCHEDULE = {"first": 2, "every": 1, "most": 2}


def test_a_scheduled_run_resumes_bit_for_bit(photographs: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lambdas": [0.01] * 3, "schedule": SCHEDULE}
    whole, first, second = (slim("bmshj2018-hyperprior", **settings) for _ in range(3))
    more: dict[str, Any] = {
        **QUICK,
        "schedule": "constant",
        "checkpoint_every": 1,
        "validation": photographs,
    }
    fit(whole, photographs, steps=7, folder=tmp_path / "whole", **more)
    real = first.validate
    calls: list[int] = []

    def stops(images: Any) -> None:
        real(images)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    first.validate = stops  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="interrupted"):
        fit(first, photographs, steps=7, folder=tmp_path / "parts", **more)
    fit(second, photographs, steps=7, folder=tmp_path / "parts", **more)
    assert same_state(state_of(whole), state_of(second))
    history = slimmable(whole).schedule.history()
    assert 3 <= len(history) <= 5 and slimmable(whole).done
    assert history[0]["lambdas"] == [0.01] * 3
    assert (
        history[-1]["lambdas"][0] == 0.01 > history[-1]["lambdas"][1] >= history[-1]["lambdas"][2]
    )  # type: ignore[index]
    assert all(len(row[key]) == 3 for row in history for key in ("lambdas", "bpp", "psnr_db"))  # type: ignore[arg-type]


def test_a_schedule_without_validation_photographs_is_refused(photographs: Path) -> None:
    with pytest.raises(RecipeError) as error:
        fit(
            slim("bmshj2018-hyperprior", lambdas=[0.01] * 3, schedule=SCHEDULE),
            photographs,
            steps=1,
            **QUICK,
        )
    one_line(error, "validation=folder")


def play(curve: Any, count: int, **settings: Any) -> LambdaSchedule:
    """Run a schedule on widths whose (bpp, PSNR) follow from their lambdas at once."""
    schedule = LambdaSchedule(count, [1.0] * count, ScheduleConfig(first=3, every=2, **settings))
    steps = []
    for step in range(1, 400):
        schedule.advance()
        if schedule.wants_validation:
            steps.append(step)
            points = [curve(i, float(lmbda)) for i, lmbda in enumerate(schedule.lambdas)]
            schedule.observe([b for b, _ in points], [p for _, p in points])
            assert not schedule.wants_validation
        if schedule.finished:
            break
    assert (
        steps == list(range(3, 3 + 2 * len(steps), 2))
        and schedule.finished
        and schedule.steps_left == 0
    )
    return schedule


def test_the_schedule_lowers_lambdas_while_the_slope_falls() -> None:
    # bpp = lambda, PSNR linear in it with a loss for each narrower width: the slope to the
    # neighbour falls on, so 7 times each.
    schedule = play(lambda i, lmbda: (lmbda, 30 + lmbda - i), 3)
    assert torch.allclose(
        schedule.lambdas, torch.tensor([1.0, 0.8**7, 0.8**14], dtype=torch.float64)
    )
    assert len(schedule.history()) == 15

    # A curve on which the slope to the neighbour rises at once: one step each, as it has to be
    # tried.
    schedule = play(
        lambda i, lmbda: (
            0.1 * i if lmbda == 1 else 0.5 * lmbda - 0.01 * i,
            30 - 20 * (1 - lmbda) ** 2 - 0.001 * i,
        ),
        3,
    )
    times = [round(math.log(value) / math.log(0.8)) for value in schedule.lambdas.tolist()]
    assert times[0] == 0 < times[1] < times[2] < 14
    for row, after in zip(schedule.history(), schedule.history()[1:], strict=False):
        pair = int(after["pair"])  # type: ignore[arg-type]
        assert after["lambdas"][: pair + 1] == row["lambdas"][: pair + 1]  # type: ignore[index]


def test_widths_that_need_as_many_bits_are_pulled_apart() -> None:
    schedule = LambdaSchedule(2, [1.0, 1.0], ScheduleConfig(first=1, every=1))
    for bpp, psnr in (
        ((1.0, 1.2), (30.0, 29.0)),
        ((1.0, 1.0), (30.0, 28.9)),
        ((1.0, 0.9), (30.0, 28.8)),
        ((1.0, 0.7), (30.0, 28.7)),
    ):
        schedule.advance()
        assert not schedule.finished
        schedule.observe(bpp, psnr)
    assert float(schedule.lambdas[1]) == pytest.approx(0.8**4)  # steep, steeper, 12, 4.3: falling
    schedule.advance()
    schedule.observe((1.0, 0.6), (30.0, 27.0))  # 7.5: risen
    assert schedule.finished and float(schedule.lambdas[1]) == pytest.approx(0.8**4)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give either widths: [1.0, 0.5, 0.25] or macs"),
        ({"widths": [1.0, 0.5], "macs": [1.0, 0.5]}, "give either widths"),
        ({"widths": [0.25, 0.5, 1.0]}, "each narrower than the one before"),
        ({"widths": [1.0, 0.5, 0.5]}, "each narrower than the one before"),
        ({"widths": [1.0]}, "two or more"),
        ({"widths": [1.0, 0.0]}, "each narrower"),
        ({"widths": [0.9, 0.5]}, "the widest is the codec itself"),
        ({"macs": [2.0, 0.5]}, "the widest is the codec itself"),
        ({"widths": [17, 8]}, "the widest group of g_a has 16 channels"),
        ({"widths": [1.0, 0.99], "round_to": 16}, "the same in multiples of 16"),
        ({"widths": [1.0, 0.5], "gdn": "slim++"}, "gdn"),
        ({"widths": [1.0, 0.5], "latents": "thin"}, "latents"),
        ({"widths": [1.0, 0.5], "lambdas": [0.01]}, "one for each of 2 widths"),
        ({"widths": [1.0, 0.5], "lambdas": [0.01, -1.0]}, "positive"),
        (
            {"widths": [1.0, 0.5], "schedule": {"first": 1, "every": 1}},
            "say what lambdas start with",
        ),
        (
            {
                "widths": [1.0, 0.5],
                "lambdas": [0.01, 0.01],
                "schedule": {"first": 1, "every": 1, "factor": 1.2},
            },
            "factor",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    with pytest.raises(RecipeError) as error:
        attach(codec, "slimmable", **settings)
    one_line(error, said)


def test_what_a_codec_does_not_have_is_refused() -> None:
    attached = slim("bmshj2018-hyperprior")
    attached.update(force=True)
    x = image(attached.codec)
    for call in (
        lambda: attached.set_width(3),
        lambda: attached(x, width=-1),
        lambda: attached.compress(x, width=3),
        lambda: attached.extract(7),
    ):
        with pytest.raises(RecipeError) as error:
            call()
        one_line(error, "is not among those that the codec has: 0 (1), 1 (0.5), 2 (0.25)")
    with torch.no_grad():
        sent = attached.compress(x, width=1)
    with pytest.raises(FileError) as wrong:
        attached.decompress(sent["strings"], sent["shape"], width=2)
    one_line(wrong, "was written at width 1", "to be read at width 2")
    with pytest.raises(FileError) as wrong:
        attached.decompress([[b"\x07"], *sent["strings"][1:]], sent["shape"])
    one_line(wrong, "was written at width 7", "0 to 2")
    with pytest.raises(FileError) as wrong:
        attached.decompress(sent["strings"][1:], sent["shape"])
    one_line(wrong, "does not start with a width")
    plain = attach(built("bmshj2018-hyperprior")[0], "bit_rate_modulator", qualities=[1, 2])
    for call in (lambda: plain(x, width=1), lambda: plain.extract(1), lambda: plain.set_width(0)):
        with pytest.raises(RecipeError) as error:
            call()
        one_line(error, "slimmable")
    with pytest.raises(RecipeError, match="goes alone"):
        attach(
            built("bmshj2018-hyperprior")[0],
            [("slimmable", WIDTHS), ("bit_rate_modulator", {"qualities": [1, 2]})],
        )


def test_a_width_is_set_inside_a_block() -> None:
    attached = slim("bmshj2018-hyperprior")
    attached.set_width(1)
    with attached.at_width(2) as same:
        assert same is attached and attached.widths is not None and attached.widths.now == 2
    assert attached.widths.now == 1
    with pytest.raises(ValueError, match="x"), attached.at_width(0):
        raise ValueError("x")
    assert attached.widths.now == 1


def test_what_stands_in_front_goes_again_even_if_something_fails() -> None:
    attached = slim("bmshj2018-hyperprior", latents="slim")
    codec: Any = attached.codec
    own = {name: dict(m.__dict__) for name, m in codec.named_modules()}
    codec.g_s[0].register_forward_hook(lambda *a: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        attached(image(codec), width=1)
    for name, module in codec.named_modules():
        assert module.__dict__.keys() == own[name].keys(), name
    module = nn.Linear(2, 2)
    with override_attributes(
        [(module, {"in_features": 1, "weight": torch.ones(1)}), (module, {"in_features": 0})]
    ):
        assert module.in_features == 0 and module.weight.shape == (1,)
    assert module.in_features == 2 and module.weight.shape == (2, 2)


class Held(nn.Module):
    """Many MACs between numbers in code, few elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x.reshape(1, 8, *x.shape[2:])))
        return self.last(y.reshape(1, 64, *x.shape[2:])).reshape(1, 8, *x.shape[2:])


def held_codec(quality: int = 1) -> nn.Module:
    return BlockCodec(Held()).eval()


def test_widths_that_hardly_change_the_cost_are_warned_of() -> None:
    codec = held_codec()
    with pytest.warns(UserWarning) as caught:
        attached = attach(codec, "slimmable", widths=[1.0, 0.75, 0.5], round_to=1)
    (warning,) = [str(w.message) for w in caught]
    attached.set_width(2)
    left = attached.totals().macs / attached.cost.totals().macs
    assert f"at width 0.5, BlockCodec still needs {left:.0%} of its MACs" in warning
    assert left > 0.9 and "\n" not in warning
    attached.detach()
    attach(block_codec("NAF"), "slimmable", widths=[1.0, 0.5], round_to=1)  # warns of nothing


def test_check_of_a_recipe_warns_of_such_widths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_png(torch.rand(3, 96, 96), tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "held_codecs", types.SimpleNamespace(make=held_codec))
    content = {
        "version": 1,
        "name": "held",
        "codec": "held_codecs:make",
        "qualities": [1],
        "lambdas": {1: 0.01},
        "photographs": {"train": str(tmp_path), "test": str(tmp_path), "overlap": True},
        "training": {"batch_size": 1, "patch_size": 64, "precision": "32"},
        "sparsify": {"steps": 4},
        "methods": [{"name": "slimmable", "widths": [1.0, 0.5], "round_to": 1}],
    }
    recipe = tmp_path / "held.yaml"
    recipe.write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match=r"slimmable: at width 0\.5"):
        assert "fine" in command("check", str(recipe))


@pytest.mark.parametrize(
    ("first", "every", "most", "count"), [(5, 3, 2, 3), (1, 1, 1, 2), (4, 7, 3, 4)]
)
def test_a_schedule_says_how_many_steps_it_needs_at_most(
    first: int, every: int, most: int, count: int
) -> None:
    """With lambdas that are lowered as often as they may be, at every step of the way."""
    config = ScheduleConfig(first=first, every=every, most=most)
    schedule = LambdaSchedule(count, [0.01] * count, config)
    said = [schedule.steps_left]
    for _ in range(1000):
        schedule.advance()
        if schedule.wants_validation:  # the same slope each time: never worse than before
            schedule.observe(
                [1.0 - 0.1 * i for i in range(count)], [30.0 - i for i in range(count)]
            )
        if schedule.finished:
            break
        said.append(schedule.steps_left)
    assert said == list(range(len(said), 0, -1)) and schedule.steps_left == 0
