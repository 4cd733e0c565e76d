"""Scalable encoders: levels that add up, each small, and a decoder that need not know."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built, image, same_state, state_of
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.common.errors import BudgetError, RecipeError, TrainingError
from nicprune.evaluation.evaluate import evaluate
from nicprune.methods import Attached, attach
from nicprune.pruning.cost import CostModel
from nicprune.storage import container
from nicprune.storage.checkpoint import load, save
from nicprune.storage.named import load_codec
from nicprune.training.loop import fit

ARCHITECTURES = [
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-attn",
    "elic2022-chandelier",
]
DAILY = {"bmshj2018-hyperprior", "mbt2018"}
"""Architectures of the daily run."""
SETTINGS: dict[str, Any] = {"encoders": 3, "share": 0.3, "round_to": 1, "decay_steps": 15}


def ladder(name: str = "bmshj2018-hyperprior", **more: Any) -> Attached:
    return attach(built(name)[0], "scalable_encoder", **{**SETTINGS, **more})


def train(attached: Attached, steps: int | None = None) -> Attached:
    """So many steps, all stages if not said, with larger strides than any user would take."""
    own = {id(p) for p in attached.manually_updated()}
    learning = [
        p
        for n, p in attached.methods.named_parameters()
        if id(p) not in own and not n.endswith("quantiles")
    ]
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    attached.train()
    for number in range(attached.steps_left if steps is None else steps):
        torch.manual_seed(number)
        x = image(attached.codec, number)
        optimizer.zero_grad()
        for level in attached.widths_per_step():
            out = attached(x, level=level)
            rate = sum(-torch.log2(value).mean() for value in out["likelihoods"].values())
            ((out["x_hat"] - x).square().mean() + 0.01 * rate + attached.loss(out, x)).backward()
        optimizer.step()
        attached.after_step()
    return attached.eval()


def method_of(attached: Attached) -> Any:
    return attached.methods[0]


def latents(attached: Attached, x: Tensor, level: Any) -> Tensor:
    """What the codec's g_a gives at a level."""
    attached.set_width(level)
    codec: Any = attached.codec
    with torch.no_grad(), method_of(attached).active(codec):
        return codec.g_a(x)


@pytest.fixture(
    scope="module",
    params=[
        # One without a context model and one with it.
        pytest.param(name, marks=() if name in DAILY else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def hardened(request: pytest.FixtureRequest) -> tuple[str, Attached, Attached]:
    """A codec's name, the codec with encoders of full size whose masks have decayed, and with small
    ones.
    """
    attached = train(ladder(request.param))
    return request.param, attached, attached.harden()


def test_the_original_decodes_what_any_level_wrote(
    hardened: tuple[str, Attached, Attached],
) -> None:
    name, _, small = hardened
    original: Any = built(name)[0]
    original.update(force=True)
    small.update(force=True)
    x = image(original, 3, 128)
    lengths = set()
    for level in (0, 1, 2, "best"):
        sent = small.compress(x, level=level)
        with torch.no_grad():
            theirs = original.decompress(sent["strings"], sent["shape"])["x_hat"]
        assert torch.equal(small.decompress(sent["strings"], sent["shape"])["x_hat"], theirs)
        lengths.add(str(sent["strings"]))
    assert len(lengths) >= 3, "levels write different streams"
    pictured = (x[0] * 255).byte()
    data = container.encode(small, pictured, level=1)
    assert torch.equal(container.decode(small, data), container.decode(original, data))
    best = container.encode(small, pictured, level="best")
    assert torch.equal(container.decode(small, best), container.decode(original, best))


def test_everything_but_the_encoders_stays(hardened: tuple[str, Attached, Attached]) -> None:
    name, attached, small = hardened
    original = built(name)[0]
    assert same_state(state_of(original), attached.codec.state_dict()), "the large encoder, too"
    before = dict(original.named_parameters())
    for key, value in small.codec.named_parameters():
        assert key.split(".")[0] == "g_a" or torch.equal(value, before[key])


def test_small_encoders_are_the_masked_ones(hardened: tuple[str, Attached, Attached]) -> None:
    name, attached, small = hardened
    first, second = copy.deepcopy(attached).double().eval(), copy.deepcopy(small).double().eval()
    x = image(first.codec, 2)
    for level in range(3):
        wide, narrow = latents(first, x, level), latents(second, x, level)
        assert float((wide - narrow).abs().max() / wide.abs().max()) <= 1e-6, (
            "masks are folded in float32"
        )
    sizes = [sum(p.numel() for p in method_of(small)._encoder(i).parameters()) for i in range(3)]
    assert max(sizes) < sum(p.numel() for p in built(name)[0].g_a.parameters())


def test_costs_add_up_as_fvcore_counts_them(hardened: tuple[str, Attached, Attached]) -> None:
    name, _, small = hardened
    whole = CostModel(built(name)[0], Groups([]))
    large, rest = (
        whole.by_transform()["g_a"][0],
        whole.totals().macs - whole.by_transform()["g_a"][0],
    )
    one = [
        CostModel(method_of(small)._codec_with_encoder(i), Groups([])).totals().macs - rest
        for i in range(3)
    ]
    assert (
        all(0 < macs <= SETTINGS["share"] * large for macs in one)
        and sum(one) > 0.5 * 3 * SETTINGS["share"] * large
    )
    for level in range(3):
        small.set_width(level)
        now = small.totals()
        assert now.macs == rest + sum(one[: level + 1]) and now.decoder == whole.totals().decoder
        assert now.encoder == whole.totals().encoder - large + sum(one[: level + 1])
        assert method_of(small).by_transform()["g_a"][0] == sum(one[: level + 1])
    small.set_width("best")  # type: ignore[arg-type]
    assert small.totals().macs == rest + sum(one) + 3 * rest, "three trials beside what is sent"
    assert small.totals().params == sum(p.numel() for p in small.parameters())


def test_a_file_holds_encoders_of_different_widths(
    hardened: tuple[str, Attached, Attached], tmp_path: Path
) -> None:
    name, _, small = hardened
    again = load(save(small, tmp_path / "c.safetensors"), factory=lambda: built(name)[0])
    assert isinstance(again, Attached) and same_state(small.state_dict(), again.state_dict())
    x = image(small.codec, 4)
    for level in range(3):
        assert torch.equal(latents(small, x, level), latents(again, x, level))
    assert again.harden().state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("form", ["average", "sum"])
def test_levels_add_up_and_gradients_reach_the_last_alone(form: str) -> None:
    attached = ladder(form=form)
    method = method_of(attached)
    for i in range(3):
        for p in method.encoders[i].parameters():
            p.data.mul_(1 + 0.1 * i)
    x = image(attached.codec, 0)
    with torch.no_grad():
        parts = [method.encoders[i](x) for i in range(3)]
    for level in range(3):
        expected = sum(parts[1 : level + 1], start=parts[0]) / (
            level + 1 if form == "average" else 1
        )
        assert torch.allclose(latents(attached, x, level), expected, rtol=1e-5, atol=1e-5)
        attached.zero_grad()
        attached.train()(x, level=level)["x_hat"].sum().backward()
        reached = [
            any(p.grad is not None and bool(p.grad.abs().sum()) for p in e.parameters())
            for e in method.encoders
        ]
        assert reached == [i == level for i in range(3)]


def test_encoders_learn_one_after_the_other() -> None:
    attached = ladder()
    method, large = method_of(attached), state_of(built("bmshj2018-hyperprior")[0].g_a)
    train(attached, 5)
    first = state_of(method.encoders[0])
    assert (
        method.stage == 1
        and not same_state(first, large)
        and all(  # what is to be added starts from zero
            torch.equal(value, 0 * value if name.startswith("6.") else large[name])
            for name, value in method.encoders[1].state_dict().items()
        )
    )
    train(attached, 5)
    assert (
        method.stage == 2
        and same_state(state_of(method.encoders[0]), first)
        and not same_state(state_of(method.encoders[1]), large)
    )
    with pytest.raises(TrainingError, match="encoder 2 of 3 still learns: 5 steps"):
        attached.harden()


def test_a_sum_starts_from_the_level_before() -> None:
    attached = ladder(form="sum")
    train(attached, 5)
    before = state_of(attached)
    assert attached.widths_per_step() == [1]
    assert same_state(before, state_of(attached)), "asking changes nothing"
    x = image(attached.codec, 0)
    assert torch.equal(latents(attached, x, 1), latents(attached, x, 0))
    train(attached, 5)
    assert not torch.equal(latents(attached, x, 1), latents(attached, x, 0))


def test_without_residual_learning_each_encoder_learns_alone() -> None:
    x = image(built("bmshj2018-hyperprior")[0], 0)
    for residual in (True, False):
        attached = ladder(residual=residual, form="average")
        for p in method_of(attached).encoders[0].parameters():
            p.data.mul_(2.0)
        alone = method_of(attached).encoders[1](x)
        attached.train()(x, level=1)
        assert torch.equal(method_of(attached)._y, alone) == (not residual)
        assert not torch.equal(latents(attached.eval(), x, 1), alone), (
            "when coding, they are averaged in either case"
        )


def test_the_best_level_is_the_least_cost_of_each_image() -> None:
    attached = attach(
        load_codec("demo-hyperprior", 1),
        "scalable_encoder",
        encoders=3,
        share=0.3,
        decay_steps=12,
        lmbda=1e-4,
        form="average",
    )
    for i, factor in enumerate((0.6, 1.0, 1.4)):  # of higher rate the higher the level
        method_of(attached).encoders[i][-1].weight.data.mul_(factor)
        method_of(attached).encoders[i][-1].bias.data.mul_(factor)
    noise, flat = (
        torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) for size in (64, 4)
    )
    x = torch.cat(
        [noise, nn.functional.interpolate(flat, size=(64, 64), mode="bilinear"), 0.45 + 0.1 * noise]
    )
    costs = []
    for level in range(3):
        with torch.no_grad():
            out = attached(x, level=level)
        bits = sum(-torch.log2(v).sum((1, 2, 3)) for v in out["likelihoods"].values())
        costs.append(
            1e-4 * 255**2 * (out["x_hat"].clamp(0, 1) - x).square().mean((1, 2, 3)) + bits / 64**2
        )
    chosen = torch.stack(costs).argmin(0)
    found = latents(attached, x, "best")
    for n, level in enumerate(chosen.tolist()):
        assert torch.allclose(found[n], latents(attached, x, level)[n], rtol=1e-4, atol=1e-4)
    assert len(set(chosen.tolist())) == 3, "otherwise any choice would do"


def test_pull_is_the_distance_from_the_teacher() -> None:
    attached = ladder(pull=0.5)
    for p in method_of(attached).encoders[0].parameters():
        p.data.mul_(1.1)
    x = image(attached.codec, 0)
    codec: Any = attached.codec
    with torch.no_grad():
        expected = 0.5 * (method_of(attached).encoders[0](x) - codec.g_a(x)).square().sum() / 64**2
        out = attached.train()(x, level=0)
    assert float(attached.loss(out, x)) == pytest.approx(float(expected), rel=1e-4)


def test_small_encoders_go_on_learning(tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    small = train(ladder()).harden()
    photographs: dict[str, Any] = {"batch_size": 1, "patch_size": 64, "lr": 1e-3, "progress": False}
    before = state_of(small)
    fit(small, "samples", steps=2, **photographs)
    before |= {
        k: v for k, v in small.state_dict().items() if k.rsplit(".", 1)[-1] in CDF_BUFFERS
    }  # made for the first time
    changed = {
        key for key, value in small.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {k.split(".")[1] for k in changed if k.startswith("codec.")} == {"g_a"}, (
        "the first encoder is the codec's"
    )
    assert {k.split(".")[3] for k in changed if k.startswith("methods.")} == {
        "0",
        "1",
    }, "and the others are trained as well"
    again = load(
        save(small, tmp_path / "c.safetensors"), factory=lambda: built("bmshj2018-hyperprior")[0]
    )
    with pytest.raises(TrainingError, match="set_teacher"):
        fit(again, "samples", steps=1, **photographs)
    assert isinstance(again, Attached)
    again.set_teacher(codec)
    fit(again, "samples", steps=1, **photographs)


def test_a_killed_run_goes_on_within_a_stage(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 1,
        "patch_size": 64,
        "lr": 1e-3,
        "progress": False,
        "checkpoint_every": 4,
        "steps": 15,
    }
    whole = ladder(form="sum")
    fit(whole, "samples", **options)
    parts = ladder(form="sum")
    real, count = type(method_of(parts)).after_step, []

    def stops(self: Any) -> None:
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt
        real(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="interrupted"):
        patch.setattr(type(method_of(parts)), "after_step", stops)
        fit(parts, "samples", folder=tmp_path, **options)
    resumed = ladder(form="sum")
    fit(resumed, "samples", folder=tmp_path, **options)
    assert same_state(whole.state_dict(), resumed.state_dict())


def test_evaluation_is_told_the_level() -> None:
    small = train(ladder()).harden()
    found = [evaluate(small, "samples", level=level) for level in (0, 2, "best")]
    assert [str(e).split(":")[0].rsplit(" ", 2)[-2:] for e in found] == [
        ["level", "0"],
        ["level", "2"],
        ["best", "level"],
    ]
    assert found[0].cost.encoder < found[1].cost.encoder < found[2].cost.encoder
    assert found[0].cost.decoder == found[2].cost.decoder
    assert evaluate(small, "samples").at == "level 2", "all encoders, unless told otherwise"


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (RecipeError, "give either share", {"share": None}),
        (RecipeError, "give either share", {"widths": {"g_a.*": 4}}),
        (RecipeError, "at least 12", {"decay_steps": 11}),
        (BudgetError, "cannot be met", {"share": 0.0001}),
        (RecipeError, "no channel group matches 'g_s", {"share": None, "widths": {"g_s.0": 4}}),
    ],
)
def test_bad_settings_are_one_clear_line(
    error: type[Exception], match: str, settings: dict[str, Any]
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before = state_of(codec)
    with pytest.raises(error, match=match) as raised:
        attach(codec, "scalable_encoder", **{**SETTINGS, **settings})
    assert "\n" not in str(raised.value) and same_state(before, codec.state_dict())


def test_bad_use_is_one_clear_line() -> None:
    attached = ladder()
    x = image(attached.codec, 0)
    for level in (4, -1, 0.5, "worst"):
        with pytest.raises(
            RecipeError, match=r"level .* is not among those that the codec has: 0 to 2, or best"
        ):
            attached(x, level=level)
    with pytest.raises(RecipeError, match="slimmable"):
        attached.extract(0)
    with pytest.raises(RecipeError, match="goes alone"):
        attach(built("mbt2018")[0], [("scalable_encoder", SETTINGS), ("none", {})])
