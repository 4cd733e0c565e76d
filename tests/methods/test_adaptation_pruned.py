"""An adaptation by new channels is pruned in these alone: the target domain is narrowed, and the
source codec stays what it is.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    METHOD_SETTINGS,
    built,
    hook_count,
    image,
    offer_tiny_codecs,
    same_state,
    state_of,
)
from torch import Tensor, nn

from nicprune.codecs.cdf import refresh_tables, update_tables
from nicprune.codecs.copying import double_copy
from nicprune.codecs.layer_kinds.gdn import GrownNormalisation, NewNormalisation
from nicprune.codecs.layer_operations import remove
from nicprune.common.errors import (
    BudgetError,
    CodecError,
    NicpruneError,
    RecipeError,
    SurgeryError,
    TrainingError,
)
from nicprune.data.images import write_png
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.run import run_recipe
from nicprune.methods import Attached, attach
from nicprune.pruning.budget import Budget
from nicprune.pruning.cost import measure
from nicprune.pruning.surgery import prune
from nicprune.report.record_files import read
from nicprune.storage.adaptation import load_adaptation, save_adaptation
from nicprune.storage.checkpoint import load, save
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit

FAMILIES = ["bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018"]
SOME = [
    pytest.param(name, marks=() if name in FAMILIES[1::2] else pytest.mark.slow)
    for name in FAMILIES
]
"""Of the daily tests, those with a hyperprior alone and with a context model."""
GROW: dict[str, Any] = {"form": "grow", "grow": 0.5, "round_to": 4, "domain": "screen"}
DECAY: dict[str, Any] = {"budget": {"macs": 1.5}, "round_to": 1, "latents": True, "decay_steps": 4}
LEFT = {
    name: {"g_a.0": 0, "g_?.2": 5, "g_s.4": 6, "g_a.6": 7}
    | ({"h_a.0": 2, "h_a.4": 3, "h_s.0": 1} if "factorized" not in name else {})
    | ({"context_prediction": 10, "entropy_parameters.2": 9} if name == "mbt2018" else {})
    for name in FAMILIES
}
"""New channels that are left of some groups, and of the latents g_a.6 and h_a.4."""


def ready(name: str = "bmshj2018-hyperprior") -> nn.Module:
    codec = built(name)[0]
    update_tables(codec)
    return codec


def grown(
    codec: nn.Module, method: str = "mask_decay", grow: dict[str, Any] = GROW, **target: Any
) -> Attached:
    """A codec with new channels, and a method that prunes them."""
    torch.manual_seed(0)
    settings = target or (DECAY if method == "mask_decay" else {**DECAY, "decay_steps": 0})
    settings = {k: v for k, v in settings.items() if method == "mask_decay" or k != "decay_steps"}
    return attach(codec, [("adaptation", grow), (method, settings)])


def learn(attached: Attached, steps: int) -> Attached:
    """Steps of a training loop of one's own, whose optimiser is given everything."""
    x = image(attached.codec, 1)
    learning = [p for n, p in attached.named_parameters() if not n.endswith("quantiles")]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    attached.train()
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        out = attached(x)
        rate = sum(-torch.log2(value).mean() for value in out["likelihoods"].values())
        ((out["x_hat"] - x).square().mean() + 0.01 * rate).backward()
        optimizer.step()
        attached.after_step()
    return attached.eval()


@functools.cache
def _decayed(name: str, into_old: bool) -> tuple[Attached, Attached]:
    target = {"widths": LEFT[name], "latents": True, "decay_steps": 3}
    attached = learn(grown(ready(name), grow={**GROW, "into_old": into_old}, **target), 3)
    return attached, attached.harden()


def decayed(
    name: str = "bmshj2018-hyperprior", into_old: bool = False
) -> tuple[Attached, Attached]:
    """A codec whose new channels' masks have decayed, and what `harden` makes of it."""
    return copy.deepcopy(_decayed(name, into_old))


def picture(codec: nn.Module, seed: int = 4) -> Tensor:
    return (image(codec, seed)[0] * 255).byte()


def widths(attached: Attached) -> dict[str, int]:
    adaptation: Any = attached.methods[0]
    return dict(adaptation.config.widths)


def shown(attached: Attached, domain: str, seed: int = 2) -> Tensor:
    with torch.no_grad():
        return attached(image(attached.codec, seed), domain=domain)["x_hat"]


# -- masked = pruned ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "into_old"), [*((name, False) for name in FAMILIES), (FAMILIES[2], True)]
)
def test_masked_is_pruned_in_both_domains(name: str, into_old: bool) -> None:
    codec = ready(name)
    with torch.no_grad():
        before = codec(image(codec, 2))["x_hat"]
    attached, small = decayed(name, into_old)
    assert same_state(state_of(codec), attached.codec.state_dict())
    assert same_state(state_of(codec), small.codec.state_dict())
    first, second = (shown(one, "screen") for one in (attached, small))
    assert float((first - second).abs().max() / first.abs().max()) <= 1e-5
    double = double_copy(attached)  # weights times masks are not rounded to float32 here
    first, second = (shown(one, "screen") for one in (double, double.harden()))
    assert first.dtype == torch.float64
    assert float((first - second).abs().max() / first.abs().max()) <= 1e-10
    assert torch.equal(shown(attached, "source"), before)
    assert torch.equal(shown(small, "source"), before)
    assert not torch.equal(shown(small, "screen"), before)
    left, all_ = widths(small), widths(attached)
    assert left.keys() == all_.keys() and left["g_a.0"] == 0 and left["g_a.6"] == 7
    assert [left["g_a.2"], left["g_s.2"], left["g_s.4"], left["g_s.0"]] == [5, 5, 6, 8]
    values = torch.cat([v.detach() for v in attached.methods[1].masks.values])  # type: ignore[union-attr]
    assert bool(((values != 0) & (values != 1)).any()), "masks that are folded into the weights"
    grown_in = [name for name in dict(small.methods.named_modules()) if name.endswith("/into")]
    assert len(grown_in) == (3 if into_old else 0)
    assert [method.name for method in small.methods] == ["adaptation"]
    assert small.widths.names == ("source", "screen")  # type: ignore[union-attr]
    hooks = sum(hook_count(layer) for layer in small.methods.modules())
    assert hooks == 0 and attached.detach() is attached.codec and hook_count(attached.codec) == 0
    assert sum(hook_count(layer) for layer in attached.methods.modules()) == 0


@pytest.mark.parametrize("into_old", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_what_is_left_is_an_adaptation_of_these_widths(name: str, into_old: bool) -> None:
    attached, small = decayed(name, into_old)
    settings = {"form": "grow", "widths": widths(small), "domain": "screen", "into_old": into_old}
    direct = attach(ready(name), "adaptation", **settings)
    expected, found = direct.methods.state_dict(), small.methods.state_dict()
    assert {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in found.items()}
    direct.methods.load_state_dict(found)
    assert torch.equal(shown(direct.eval(), "screen"), shown(small, "screen"))
    # Counted by fvcore, as the cost model said, and within the budget.
    direct.set_width(1)
    pruner: Any = attached.methods[1]
    assert small.totals() == direct.totals() == pruner.cost.totals(pruner.select())
    assert attached.keep() == {}, "nothing of the source codec goes"


@pytest.mark.parametrize("name", [*SOME, pytest.param("cheng2020-anchor", marks=pytest.mark.slow)])
def test_the_cost_of_any_numbers_of_new_channels_is_what_runs(name: str) -> None:
    for into_old in (False, True):
        pruner: Any = grown(ready(name), grow={**GROW, "into_old": into_old}).methods[1]
        cost, rng = pruner.cost, np.random.default_rng(0)
        counts = np.array([rng.integers(g.least, g.width + 1) for g in cost.groups])
        counts[rng.integers(1, len(counts) - 1)] = 0
        now = dict(zip(cost.names, map(int, counts), strict=True))
        other = attach(ready(name), "adaptation", form="grow", widths=now, into_old=into_old)
        other.set_width(1)
        assert cost.totals(now) == other.totals()
        for what in ("macs", "encoder", "decoder", "params"):
            exact = getattr(cost.totals(now), what)
            assert cost.soft(counts.astype(float), what) == pytest.approx(exact, rel=1e-12)
            deltas = np.minimum(counts, 2)
            for i, saved in enumerate(cost.decreases(counts, deltas, what)):
                less = cost.totals({**now, cost.names[i]: int(counts[i] - deltas[i])})
                assert saved == exact - getattr(less, what)
    none = cost.totals(dict.fromkeys(cost.names, 0))
    assert none == measure(ready(name)), "without new channels it is the source codec"


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_new_normalisation_with_fewer_channels(simple: bool, inverse: bool) -> None:
    torch.manual_seed(0)
    layer = GrownNormalisation(9, 5, inverse=inverse, simple=simple).double()
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(torch.rand_like(value))
    old, new = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 5, 3, 3).double()
    kept = [0, 2, 3]
    less = copy.deepcopy(layer)
    remove(less, "both", [1, 4])
    masked = torch.zeros_like(new)
    masked[:, kept] = new[:, kept]
    expected = layer(old, masked)
    assert torch.allclose(less(old, new[:, kept]), expected[:, kept], rtol=0, atol=1e-14)
    assert not expected[:, [1, 4]].any()
    norms = NewNormalisation().norms(layer, "both")
    assert norms.shape == (5,) and bool((norms > 0).all())


def test_what_is_removed_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attached, _ = decayed()
    right = NewNormalisation.remove

    def wrong(self: Any, layer: Any, axis: str, removed: Any) -> None:
        width = layer.beta.numel()
        right(self, layer, axis, [(i + 1) % width for i in removed])

    monkeypatch.setattr(NewNormalisation, "remove", wrong)
    with pytest.raises(SurgeryError, match="not those that were masked"):
        attached.harden()


# -- domains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES[1::2])
def test_masks_multiply_new_channels_in_the_target_domain_alone(name: str) -> None:
    codec = ready(name)
    torch.manual_seed(0)
    alone = attach(codec, "adaptation", **GROW).eval()
    expected = [shown(alone, domain) for domain in ("source", "screen")]
    alone.detach()
    attached = grown(codec).eval()
    for domain, one in zip(("source", "screen"), expected, strict=True):
        assert torch.equal(shown(attached, domain), one), "attaching changes nothing"
    learn(attached, 1)
    source, target = (shown(attached, domain) for domain in ("source", "screen"))
    with torch.no_grad():
        for value in attached.methods[1].masks.values:  # type: ignore[union-attr]
            value.mul_(0.5)
    assert torch.equal(shown(attached, "source"), source)
    assert not torch.equal(shown(attached, "screen"), target)
    pruner: Any = attached.methods[1]
    attached.set_width(1)
    assert attached.totals() == pruner.cost.totals(), "masks are not the codec's work"
    named = [*pruner.masks.names]
    assert named == [group for group, count in widths(attached).items() if count]
    # In training every mask gets a gradient, in the source domain none does.
    x = image(codec, 3)
    for domain, reached in (("screen", True), ("source", False)):
        out = attached.train()(x, domain=domain)
        loss = out["x_hat"].square().mean() + sum(v.mean() for v in out["likelihoods"].values())
        if reached:
            loss.backward()
        missing = [n for n, v in zip(named, pruner.masks.values, strict=True) if v.grad is None]
        assert missing == ([] if reached else named)
        assert loss.requires_grad == reached or domain == "source"
        for value in pruner.masks.values:
            value.grad = None


@pytest.mark.parametrize("name", SOME)
def test_files_are_those_of_an_adaptation(name: str, tmp_path: Path) -> None:
    codec = ready(name)
    x = picture(codec)
    old = encode(codec, x)
    attached, small = decayed(name)
    with pytest.raises(CodecError, match=r"save_adaptation\(adapted.harden\(\)"):
        save_adaptation(attached, tmp_path / "no.safetensors")
    with pytest.raises(CodecError, match=r"save masked.harden\(\)"):
        save(attached, tmp_path / "no.safetensors")
    found = load_adaptation(ready(name), save_adaptation(small, tmp_path / "new.safetensors"))
    assert widths(found) == widths(small)
    new = encode(small, x)
    assert new != old
    assert torch.equal(decode(found, new), decode(small, new))
    assert torch.equal(decode(found, old), decode(codec, old))
    if name == FAMILIES[1]:
        assert encode(small, x, domain="source") == old and encode(found, x) == new
        whole = load(save(small, tmp_path / "both.safetensors"))
        assert same_state(state_of(whole), state_of(found)) and whole.totals() == small.totals()


def test_bitstreams_are_written_while_masks_decay() -> None:
    codec = ready()
    x = image(codec, 2)
    with torch.no_grad():
        own = codec.compress(x)["strings"]
    attached = learn(grown(codec), 2)
    refresh_tables(attached)
    sent = attached.compress(x, domain="screen")
    read = [attached.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2)]
    assert torch.equal(*read) and torch.isfinite(read[0]).all()
    assert (read[0] - shown(attached, "screen").clamp(0, 1)).abs().max() < 1e-4
    assert attached.compress(x, domain="source")["strings"] == own


# -- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_of_one_shot(method: str) -> None:
    attached = learn(grown(ready(), method), 1)
    small = attached.harden()
    assert 1.4 < small.totals().macs / measure(small.codec).macs <= 1.5
    pruner: Any = attached.methods[1]
    kept = pruner.select()
    assert {g: len(kept[g]) for g in kept} == {g: widths(small)[g] for g in kept}
    assert any(len(kept[g]) < widths(attached)[g] for g in kept)
    assert torch.equal(shown(small, "source"), shown(attached, "source"))


BUDGETS: list[dict[str, float]] = [
    {"macs": 1.5},
    {"encoder": 1.5},
    {"decoder": 1.5},
    {"params": 1.6},
    {"kmac": 3},
]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: "".join(budget))
def test_every_budget_is_met(budget: dict[str, float]) -> None:
    codec = ready()
    # As it is written in Python, and as the class that validates it for pruning.
    attached = learn(grown(codec, budget=budget, round_to=1, decay_steps=2, latents=True), 2)
    pruner: Any = attached.methods[1]
    source, now = measure(codec), pruner.cost.totals(pruner.select())
    (name, limit), *_ = budget.items()
    if name == "kmac":
        assert 0.9 * limit < now.kmac_per_pixel() <= limit
    else:
        assert 0.9 * limit < getattr(now, name) / getattr(source, name) <= limit


def test_a_budget_object_is_taken_too() -> None:
    attached = grown(ready(), budget=Budget(kmac=3), round_to=1, decay_steps=2)
    config: Any = attached.methods[1].config
    assert config.budget.kmac == 3
    assert config.model_dump(mode="json")["budget"]["kmac"] == 3


def test_only_names_the_groups_whose_new_channels_may_go() -> None:
    target = {"budget": {"macs": 1.75}, "round_to": 1, "decay_steps": 2, "only": ["g_s.*"]}
    attached = learn(grown(ready(), **target), 2)
    assert attached.methods[1].free_names == ["g_s.0", "g_s.2", "g_s.4"]  # type: ignore[union-attr]
    all_, kept = widths(attached), attached.methods[1].select()  # type: ignore[union-attr]
    assert list(kept) == ["g_s.0", "g_s.2", "g_s.4"]
    assert any(len(kept[group]) < all_[group] for group in kept)
    given = {"widths": {"g_s.0": 0, "h_?.2": 3}, "decay_steps": 2}
    small = learn(grown(ready(), **given), 2).harden()
    assert widths(small) == {**all_, "g_s.0": 0, "h_a.2": 3, "h_s.2": 3}


def test_the_latents_new_channels_stay_unless_asked() -> None:
    for latents in (False, True):
        target = {"budget": {"macs": 1.5}, "round_to": 1, "decay_steps": 2, "latents": latents}
        pruner: Any = grown(ready(), **target).methods[1]
        assert {"g_a.6", "h_a.4"} <= set(pruner.free_names) or not latents
        assert not {"g_a.6", "h_a.4"} & set(pruner.free_names) or latents


def test_channels_that_nothing_reads_go_too() -> None:
    given = {"widths": {"g_a.4": 0, "g_s.2": 0}, "decay_steps": 2}
    attached = learn(grown(ready(), **given), 2)
    small = attached.harden()
    # g_a.0 is read by g_a.2, and that by g_a.4; the latent g_a.6 stays, whether it is read or not.
    gone = ["g_a.0", "g_a.2", "g_a.4", "g_s.0", "g_s.2"]
    assert widths(small) == {**widths(attached), **dict.fromkeys(gone, 0)}
    first, second = (shown(one, "screen") for one in (attached, small))
    assert float((first - second).abs().max() / first.abs().max()) <= 1e-5


# -- training -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    codec = built("bmshj2018-hyperprior")[0]
    write_png(image(codec, 0)[0], tmp_path / "photos" / "0.png")
    return tmp_path / "photos"


QUICK: dict[str, Any] = {
    "batch_size": 1,
    "patch_size": 64,
    "lr": 1e-2,
    "precision": "32",
    "progress": False,
}


def test_an_interrupted_run_ends_bit_equal(photos: Path, tmp_path: Path) -> None:
    whole = grown(ready())
    fit(whole, photos, steps=4, **QUICK)
    first, calls = grown(ready()), iter(range(3))

    def stop(module: nn.Module, args: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    handle = first.codec.g_a.register_forward_pre_hook(stop)  # type: ignore[union-attr]
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match="interrupted"):
        fit(first, photos, steps=4, folder=folder, checkpoint_every=2, **QUICK)
    handle.remove()
    resumed = grown(ready())
    fit(resumed, photos, steps=4, folder=folder, checkpoint_every=2, **QUICK)
    assert whole.done and same_state(state_of(whole), state_of(resumed))
    assert same_state(state_of(ready()), resumed.codec.state_dict())
    small = whole.harden()
    own = state_of(small.methods)
    fit(small, photos, steps=1, **QUICK)  # what is left learns on
    assert not same_state(own, small.methods.state_dict())
    assert same_state(state_of(ready()), small.codec.state_dict())


def test_harden_waits_for_both() -> None:
    attached = learn(grown(ready(), grow={**GROW, "adapt_steps": 3}), 2)
    with pytest.raises(TrainingError, match="1 steps are left"):
        attached.harden()
    assert attached.steps_left == 2 and not attached.done
    with pytest.raises(TrainingError, match="mask decay is at step 3 of 4"):
        learn(attached, 1).harden()
    assert learn(attached, 1).done


# -- recipes --------------------------------------------------------------------------------------


@pytest.fixture
def content(photos: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    offer_tiny_codecs(monkeypatch)
    decay = {"name": "mask_decay", "budget": {"macs": 1.6}, "round_to": 1, "only": ["g_s.*", "h_*"]}
    return {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1],
        "control": False,
        "photographs": {
            "train": str(photos),
            "test": str(photos),
            "source": str(photos),
            "overlap": True,
        },
        "training": {"batch_size": 1, "patch_size": 64, "precision": "32", "log_every": 1},
        "sparsify": {"steps": 3, "lr": 1e-3},
        "finetune": {"steps": 1, "lr": 1e-3},
        "methods": [{"label": "pruned", "stack": [{"name": "adaptation", **GROW}, decay]}],
    }


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_adapts_and_prunes(content: dict[str, Any], tmp_path: Path) -> None:
    page = run_recipe(
        parse_recipe(content, "test"),
        reports=tmp_path / "reports",
        runs=tmp_path / "runs",
        say=lambda line: None,
        progress=False,
    )
    original, pruned = read(page.parent / "records.json")
    assert pruned.method == "adaptation + mask_decay"
    assert 1.5 < pruned.cost.macs / original.cost.macs <= 1.6
    assert pruned.source is not None and original.source is not None
    assert pruned.source.old_files == "bit-exact"
    assert pruned.source.psnr_db == original.source.psnr_db
    codec = load(next((tmp_path / "runs").rglob("*/codec.safetensors")), factory=lambda: ready())
    assert isinstance(codec, Attached)
    codec.set_width(1)
    assert codec.totals().macs == pruned.cost.macs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "low_rank", "grow": None}, "form: low_rank has no new channels"),
        ({"budget": {"macs": 0.6}}, "shares of the source codec: macs: input should be greater"),
        ({"budget": {"macs": 1.6, "split": 0.5}}, "split divides what is saved"),
        ({"budget": {"mac": 1.6}}, "unknown key 'mac'; did you mean 'macs'"),
    ],
)
def test_recipes_are_refused_when_they_are_read(
    content: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    for part in content["methods"][0]["stack"]:
        part.update({k: v for k, v in change.items() if k in part or k == "form"})
        if part["name"] == "mask_decay":
            part.pop("form", None)
        elif change.get("form"):
            part.pop("grow"), part.pop("round_to")
    with pytest.raises(RecipeError) as error:
        parse_recipe(content, "test")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "methods.0.stack.1" in str(error.value)


# -- refusals -------------------------------------------------------------------------------------

SMALL = {"form": "grow", "grow": {"g_s.*": 0.5}, "round_to": 4}


@pytest.mark.parametrize(
    ("adaptation", "target", "said"),
    [
        (GROW, {"budget": {"macs": 0.5}}, "of the source codec: macs: input should be greater"),
        (GROW, {"budget": {"encoder": 0.9}}, "encoder: input should be greater than or equal to 1"),
        (GROW, {"budget": {}}, "as shares of the source codec between 1 and 16, or kmac"),
        (GROW, {"budget": {"kmac": 1}}, "budget kmac: 1 cannot be met"),
        (GROW, {"budget": {"macs": 1.01}}, "1.18 of the source codec remains"),
        (GROW, {"budget": {"macs": 1.9}}, "met already: the codec is at 1.83 of the source codec"),
        (GROW, {"budget": {"macs": 1.3, "split": "auto"}}, "split divides what is saved"),
        (GROW, {"budget": {"decode_s": 0.5}}, "decode_s: no times of new channels are known"),
        (GROW, {"budget": {"macs": 1.3}, "side": "decoder"}, "only: ['g_s.*']"),
        (SMALL, {"budget": {"macs": 1.2}, "only": ["g_a.*"]}, "with new channels matches 'g_a.*'"),
        (SMALL, {"budget": {"macs": 1.2}, "only": ["none"]}, "known: g_s.0, g_s.2, g_s.4"),
        (SMALL, {"widths": {"h_a.0": 1}}, "no channel group with new channels matches 'h_a.0'"),
        (GROW, {"widths": {"g_s.0": 9}}, "g_s.0 can have 0 to 8 channels (got 9)"),
        (GROW, {"widths": {"g_s.4": 0}}, "g_s.4 can have 1 to 8 channels (got 0)"),
        (GROW, {"widths": {"g_s.0": 8}}, "there is nothing to prune"),
        ({"form": "low_rank"}, {"budget": {"macs": 1.3}}, "form: low_rank has no new channels"),
        ({"form": "decoder_adapter"}, {"budget": {"macs": 1.3}}, "decoder_adapter has no new"),
        ({"form": "finetune_all"}, {"budget": {"macs": 0.5}}, "finetune_all has no new channels"),
        ({"form": "finetune_decoder"}, {"budget": {"macs": 1.3}}, "finetune_decoder has no new"),
        ({"form": "shrink"}, {"budget": {"macs": 1.3}}, "form: input should be 'grow'"),
    ],
)
def test_mistakes_are_one_clear_line(
    adaptation: dict[str, Any], target: dict[str, Any], said: str
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    state = state_of(codec)
    pruning = {"round_to": 1, "latents": True, **target}
    if "side" in target:
        del pruning["latents"]
    stack = [("adaptation", adaptation), ("mask_decay", pruning)]
    with pytest.raises(NicpruneError) as error:
        attach(codec, stack)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert hook_count(codec) == 0 and same_state(state, codec.state_dict())


@pytest.mark.parametrize(
    "other", ["fisher", "channel_gating", "slimmable", "distillation", "bit_rate_modulator", "none"]
)
def test_other_methods_do_not_go_beside_it(other: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    stack = [("adaptation", GROW), ("mask_decay", DECAY), (other, METHOD_SETTINGS[other])]
    with pytest.raises(RecipeError, match="source codec must not change") as error:
        attach(codec, stack)
    assert "\n" not in str(error.value) and hook_count(codec) == 0
    del stack[1]
    with pytest.raises(RecipeError, match="go only mask_decay, magnitude and random"):
        attach(codec, stack)


def test_one_method_prunes_new_channels() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    one_shot = {"budget": {"macs": 1.4}, "round_to": 1}
    with pytest.raises(RecipeError, match="leave out one of mask_decay and random"):
        attach(codec, [("adaptation", GROW), ("mask_decay", DECAY), ("random", one_shot)])
    assert hook_count(codec) == 0


def test_the_source_part_of_a_grown_codec_is_not_pruned(tmp_path: Path) -> None:
    codec = ready()
    keep = {"g_a.0": [0, 1, 2]}
    _, small = decayed()
    alone = save_adaptation(small, tmp_path / "alone.safetensors")
    for found in (load_adaptation(codec, alone), small):
        assert isinstance(found, Attached)
        for name in ("magnitude", "mask_decay"):
            with pytest.raises(CodecError, match="attached to a codec already"):
                attach(found, name, budget={"macs": 0.5})
            with pytest.raises(RecipeError, match="has a method attached already"):
                attach(found.codec, name, budget={"macs": 0.5})
        for model in (found, found.codec):
            with pytest.raises((SurgeryError, CodecError)) as error:
                prune(model, keep)
            assert "\n" not in str(error.value)
    # Masks that are aimed at channels of the source codec find none.
    with pytest.raises(RecipeError, match="no channel group with new channels matches 'g_a.0'"):
        grown(ready(), grow=SMALL, widths={"g_a.0": 3}, decay_steps=2)
    with pytest.raises(BudgetError, match="met already: the codec is at 1 of the source codec"):
        grown(ready(), grow={"form": "grow", "widths": {"*": 0}}, budget={"macs": 1.2})
