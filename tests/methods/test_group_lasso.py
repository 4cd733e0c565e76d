"""Group lasso: norms of filters fall, and what they leave is removed exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, METHOD_SETTINGS, built, image, same_state, state_of
from torch import Tensor, nn
from zoo_of_blocks import BLOCKS, C, block_codec

from nicprune.common.errors import TrainingError
from nicprune.data.images import write_png
from nicprune.methods import Attached, attach
from nicprune.methods.pruners.group_lasso import RANK_EVERY, GroupLasso
from nicprune.pruning.verification import difference
from nicprune.training.loop import fit

QUICK: dict[str, Any] = {
    "batch_size": 2,
    "patch_size": 64,
    "lmbda": 0.01,
    "precision": "32",
    "progress": False,
    "seed": 0,
}
PENALTIES = ["importance", "incremental", "constant"]


def shrinking(codec: nn.Module | str, **more: Any) -> tuple[Attached, GroupLasso]:
    codec = built(codec)[0] if isinstance(codec, str) else codec
    attached = attach(codec, "group_lasso", **METHOD_SETTINGS["group_lasso"] | more)
    method = attached.methods[0]
    assert isinstance(method, GroupLasso)
    return attached, method


def without_gradient(attached: Attached, steps: int) -> None:
    for _ in range(steps):
        attached.after_step()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_step_is_the_proximal_one(penalty: str) -> None:
    _, method = shrinking("bmshj2018-hyperprior", penalty=penalty, decay_steps=100)
    method.fisher.copy_(torch.linspace(0.1, 2, len(method.fisher)))
    for parameter in method.manually_updated():
        parameter.grad = torch.zeros_like(parameter)
    before = method._norms()
    method.after_step()
    soft, relative = method._soft_widths(torch.ones_like(before)), before / method.unit
    price = {
        "importance": lambda: method._rates(soft, method.fisher),
        "incremental": lambda: method.removable.float(),
        "constant": lambda: torch.ones_like(before),
    }[penalty]()
    expected = (relative - method.rho * price).clamp(min=0) * method.unit
    torch.testing.assert_close(method._norms(), expected, rtol=1e-5, atol=1e-6)
    assert int((expected < before).sum()) > 0
    assert method.masks.values[0].tolist() == [1.0] * len(method.masks.values[0])


def check_what_shrinks(attached: Attached, method: GroupLasso) -> None:
    """Half of the weights is half of the norm, exactly, and nothing else moves."""
    before, norms = state_of(attached.codec), method._norms()
    method._shrink(torch.full_like(method.current, 0.5))
    assert torch.allclose(method._norms(), norms * 0.5, rtol=1e-5)
    producers = {
        member.module
        for name in method.free_names
        for member in attached.groups[name].members
        if member.axis == "out"
    }
    for key, value in attached.codec.state_dict().items():
        layer = key.rpartition(".")[0]
        if not torch.equal(value, before[key]):
            assert layer in producers or key in producers, key


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_norm_is_of_what_shrinks(name: str, latents: bool) -> None:
    attached, method = shrinking(name, latents=latents)
    assert float(method._norms().min()) > 0
    check_what_shrinks(attached, method)


@pytest.mark.filterwarnings("ignore:MACs of")
@pytest.mark.parametrize("name", BLOCKS)
def test_so_it_is_in_blocks_of_every_sort(name: str) -> None:
    attached, method = shrinking(block_codec(name), norms="adapt", budget={"macs": 0.9})
    check_what_shrinks(attached, method)


@pytest.mark.parametrize("frozen", ["g_a", "g_s"])
def test_what_is_not_trained_does_not_shrink(frozen: str, tmp_path: Path) -> None:
    write_png(image(built("bmshj2018-hyperprior")[0], 3, 96)[0], tmp_path / "a.png")
    attached, method = shrinking("bmshj2018-hyperprior", decay_steps=6, penalty="constant")
    attached.codec.get_submodule(frozen).requires_grad_(False)
    before = state_of(attached.codec)
    fit(attached, tmp_path, steps=6, **QUICK)
    moved = {
        key.split(".")[0]
        for key, value in attached.codec.state_dict().items()
        if key.endswith("weight") and not torch.equal(value, before[key])
    }
    assert frozen not in moved and {"g_a", "g_s"} - {frozen} <= moved
    assert attached.done and attached.cost.totals(attached.keep()).macs <= (
        0.5 * attached.cost.original.macs
    )


def test_a_side_that_fit_leaves_alone_does_not_shrink(tmp_path: Path) -> None:
    write_png(image(built("bmshj2018-hyperprior")[0], 3, 96)[0], tmp_path / "a.png")
    attached, _ = shrinking("bmshj2018-hyperprior", decay_steps=6)
    before = state_of(attached.codec)
    fit(attached, tmp_path, steps=6, side="decoder", **QUICK)
    for key, value in attached.codec.state_dict().items():
        if key.startswith(("g_a.", "h_a.", "h_s.")):
            assert torch.equal(value, before[key]), key


def test_a_shared_parameter_does_not_shrink() -> None:
    """Two layers would cut it each its own way: they are left whole, and nothing scales it."""
    codec: Any = built("bmshj2018-hyperprior")[0]
    codec.g_a[4].weight = codec.g_a[2].weight
    _, method = shrinking(codec, budget={"macs": 0.7})
    weight, other = codec.g_a[2].weight.detach().clone(), codec.g_s[2].weight.detach().clone()
    method._shrink(torch.full_like(method.current, 0.5))
    assert torch.equal(codec.g_a[2].weight, weight) and codec.g_a[4].weight is codec.g_a[2].weight
    assert not torch.equal(codec.g_s[2].weight, other)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018", "cheng2020-attn"])
def test_the_cost_follows_a_line(name: str, penalty: str) -> None:
    """Without any gradient, norms go down until the commit, neither at once nor after it."""
    attached, method = shrinking(name, penalty=penalty, decay_steps=200, budget={"macs": 0.6})
    found = []
    for _ in range(method.commit_step - 1):
        attached.after_step()
        found.append(attached.metrics()["group_lasso/macs"])
    line = [1 - 0.4 * (i + 1) / method.commit_step for i in range(len(found))]
    assert max(abs(a - b) for a, b in zip(found, line, strict=True)) < 0.02
    without_gradient(attached, 1)
    weights = state_of(attached.codec)
    without_gradient(attached, 60)
    assert attached.done and same_state(weights, state_of(attached.codec))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_cost_follows_a_line_where_weights_grow(penalty: str) -> None:
    """The optimiser makes all norms larger; none may hide behind that."""
    attached, method = shrinking(
        "bmshj2018-hyperprior", penalty=penalty, decay_steps=60, budget={"macs": 0.6}
    )
    method.fisher.copy_(torch.linspace(0.1, 2, len(method.fisher)))
    for number in range(1, method.commit_step):
        method._shrink(torch.full_like(method.current, 1.03))
        for parameter in method.manually_updated():
            parameter.grad = torch.zeros_like(parameter)
        attached.after_step()
        line = 1 - 0.4 * number / method.commit_step
        assert attached.metrics()["group_lasso/macs"] == pytest.approx(line, abs=0.02)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_what_is_logged_at_the_end_is_the_cost(penalty: str) -> None:
    attached, _ = shrinking("bmshj2018-hyperprior", penalty=penalty, decay_steps=20)
    without_gradient(attached, 20)
    totals = attached.cost.totals(attached.keep())
    logged = attached.metrics()["group_lasso/macs"]
    assert logged == pytest.approx(totals.macs / attached.cost.original.macs, rel=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_each_limit_has_a_line(penalty: str) -> None:
    budget = {"encoder": 0.6, "decoder": 0.8}
    attached, method = shrinking(
        "bmshj2018-hyperprior", penalty=penalty, decay_steps=100, budget=budget
    )
    ahead: list[float] = []
    for number in range(1, method.commit_step):
        attached.after_step()
        soft = method._soft_widths(method._standing())
        for name, share in budget.items():
            line = 1 - (1 - share) * number / method.commit_step
            ahead.append(attached.cost.soft(soft, name) / getattr(attached.cost.original, name))
            ahead[-1] -= line
            assert ahead[-1] < 0.01
        assert max(ahead[-2:]) > -0.02  # that of the limit which is furthest off


@pytest.mark.parametrize("penalty", PENALTIES)
def test_each_width_has_a_line(penalty: str) -> None:
    target = {"budget": None, "widths": {"g_a.0": 4, "g_a.2": 12}}
    attached, method = shrinking("bmshj2018-hyperprior", penalty=penalty, decay_steps=100, **target)
    for number in range(1, method.commit_step):
        attached.after_step()
        soft = method._soft_widths(method._standing())[method._columns]
        done = number / method.commit_step
        assert soft == pytest.approx([16 - 12 * done, 16 - 4 * done], abs=0.2)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(
    "target",
    [
        {"budget": {"macs": 0.5}},
        {"budget": {"encoder": 0.6, "decoder": 0.5}},
        {"budget": None, "widths": {"g_a.*": 8, "h_s.0": 3}},
    ],
)
def test_the_target_is_met_exactly(penalty: str, target: dict[str, Any]) -> None:
    attached, method = shrinking("bmshj2018-hyperprior", penalty=penalty, decay_steps=12, **target)
    without_gradient(attached, 11)
    with pytest.raises(TrainingError, match="group lasso is at step 11 of 12"):
        attached.harden()
    without_gradient(attached, 1)
    keep = attached.keep()
    for name, mask in zip(method.free_names, method.masks.values, strict=True):
        gone = torch.ones(len(mask), dtype=torch.bool)
        gone[keep[name]] = False
        assert torch.equal(mask == 0, gone) and bool((mask[~gone] == 1).all())
    if target["budget"]:
        totals, original = attached.cost.totals(keep), attached.cost.original
        for what, share in target["budget"].items():
            assert 0.9 * share < getattr(totals, what) / getattr(original, what) <= share
    else:
        assert {n: len(k) for n, k in keep.items()} == {
            "g_a.0": 8, "g_a.2": 8, "g_a.4": 8, "h_s.0": 3,
        }  # fmt: skip


def test_an_incremental_penalty_falls_again() -> None:
    """A channel that has become large is not driven out any more."""
    attached, method = shrinking(
        "bmshj2018-hyperprior", penalty="incremental", decay_steps=1000, budget={"macs": 0.7}
    )
    without_gradient(attached, 1)
    first = method.removable.clone()
    method._shrink(torch.where(first, 1.0, 0.01))  # noticed in the next ranking
    without_gradient(attached, RANK_EVERY - 1)
    assert torch.equal(method.removable, first)
    method._shrink(torch.where(first, 1.0, 100.0))
    small = int(method.grown.argmax())
    assert float(method.grown[small]) == RANK_EVERY and bool(method.removable[small])
    assert set(method.grown.tolist()) == {0.0, float(RANK_EVERY)}
    method._shrink(torch.where(torch.arange(len(method.current)) == small, 10.0, 1.0))
    # What is learnt goes along with the weights, though they are not those of the start any more.
    codec = built("bmshj2018-hyperprior")[0]
    codec.load_state_dict(attached.codec.state_dict())
    again, other = shrinking(codec, penalty="incremental", decay_steps=1000, budget={"macs": 0.7})
    without_gradient(attached, RANK_EVERY // 2)
    again.load_state_dict(attached.state_dict())
    without_gradient(again, 1)
    assert not bool(method.removable[small]) and float(other.grown[small]) == 4
    assert float(method.grown[small]) == RANK_EVERY - RANK_EVERY // 2
    without_gradient(attached, 1)
    assert same_state(state_of(attached), state_of(again))
    without_gradient(attached, RANK_EVERY)
    assert float(method.grown[small]) == 0


def test_channels_are_ranked_by_what_the_penalty_says() -> None:
    """A filter that began small and kept its norm is worth more than a large one that lost half,
    where the importance drove channels out; the norm alone says the opposite.
    """
    for penalty, expected in (("importance", [0, 1, 2, 3]), ("constant", [4, 5, 6, 7])):
        codec: Any = built("bmshj2018-factorized")[0]
        with torch.no_grad():
            codec.g_a[0].weight[:4] *= 0.1
            codec.g_a[0].bias[:4] *= 0.1
            codec.g_a[0].weight[8:] *= 0.01
            codec.g_a[0].bias[8:] *= 0.01
        attached, method = shrinking(
            codec, penalty=penalty, budget=None, widths={"g_a.0": 4}, decay_steps=100
        )
        halved = torch.ones(len(method.current))
        halved[4:8], halved[8:] = 0.5, 0.4
        method._shrink(halved)
        assert attached.keep()["g_a.0"] == expected


def test_groups_are_compared_relative_to_their_own_filters() -> None:
    """Weights a hundred times as large, and as much less behind them, are not worth more."""
    kept = []
    for factor in (1.0, 100.0):
        codec: Any = built("bmshj2018-factorized-relu")[0]
        with torch.no_grad():
            codec.g_a[0].weight.mul_(factor)
            codec.g_a[0].bias.mul_(factor)
        attached, _ = shrinking(codec, penalty="constant")
        kept.append(attached.keep())
    assert kept[0] == kept[1]


def test_no_filter_gets_to_zero_before_the_choice() -> None:
    """Weights of zero could stay zero for good: in front of GDN they have no gradient."""
    attached, method = shrinking("bmshj2018-hyperprior", decay_steps=20, budget={"macs": 0.3})
    least = 1.0
    for _ in range(method.commit_step - 1):
        before = method._norms()
        method.fisher.copy_(torch.logspace(-3, 3, len(method.fisher)))  # some go much faster
        attached.after_step()
        least = min(least, float((method._norms() / before).min()))
    assert least == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_other_side_does_not_shrink(side: str) -> None:
    attached, _ = shrinking("mbt2018-mean", side=side, budget={side: 0.5}, decay_steps=20)
    before = state_of(attached.codec)
    without_gradient(attached, 10)
    moved = {k.split(".")[0] for k, v in attached.codec.state_dict().items()
             if not torch.equal(v, before[k])}  # fmt: skip
    assert moved == {"encoder": {"g_a", "h_a"}, "decoder": {"g_s"}}[side]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("at", [3, 5])  # before and after the commit
def test_an_interrupted_run_goes_on_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, penalty: str, at: int
) -> None:
    write_png(image(built("bmshj2018-hyperprior")[0], 3, 96)[0], tmp_path / "a.png")

    def trained(**more: Any) -> Attached:
        attached, _ = shrinking("bmshj2018-hyperprior", penalty=penalty)
        fit(attached, tmp_path, steps=7, **QUICK, **more)
        return attached

    whole = trained()
    steps, after = iter(range(at)), GroupLasso.after_step

    def interrupted(self: GroupLasso) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        after(self)

    run: dict[str, Any] = {"folder": tmp_path / "run", "checkpoint_every": at}
    monkeypatch.setattr(GroupLasso, "after_step", interrupted)
    with pytest.raises(TrainingError, match=f"continue from step {at}"):
        trained(**run)
    monkeypatch.undo()
    again = trained(**run)
    assert same_state(state_of(whole), state_of(again))


@pytest.mark.parametrize("name", ["ConvNeXt with LayerNorm", "NAF with GroupNorm", "Swin"])
def test_channels_of_a_norm_are_removed_exactly(name: str, tmp_path: Path) -> None:
    write_png(image(block_codec(name), 3, 96)[0], tmp_path / "a.png")
    attached, _ = shrinking(
        block_codec(name), budget=None, widths={"g_a.0": 1}, norms="adapt", decay_steps=6
    )
    fit(attached, tmp_path, steps=6, **QUICK)
    small = attached.harden()
    assert small.g_a[0].out_channels < C
    attached.double()
    assert difference(attached.codec, attached.harden(verify=False)) <= 1e-10


def test_what_the_loss_holds_stays() -> None:
    """A channel that the output hangs on keeps its norm against the same penalty."""
    attached, method = shrinking(
        "bmshj2018-factorized", penalty="constant", decay_steps=60, budget=None,
        widths={"g_a.0": 4},
    )  # fmt: skip
    wanted = list(range(4))
    layer = copy.deepcopy(attached.codec.g_a[0])
    optimizer = torch.optim.SGD(attached.codec.g_a[0].parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        loss: Tensor = sum(
            (attached.codec.g_a[0].weight[i] - layer.weight[i]).square().sum() for i in wanted
        )  # type: ignore[assignment]
        loss.backward()
        optimizer.step()
        attached.after_step()
    assert attached.done and attached.keep()["g_a.0"] == wanted
