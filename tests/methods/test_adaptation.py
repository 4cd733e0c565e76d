"""Adaptation to another domain: the source codec stays what it was, and files say their domain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from helpers import built, hook_count, image, same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.cdf import refresh_tables, update_tables
from nicprune.codecs.layer_kinds.layout import Layout
from nicprune.common.errors import CodecError, FileError, NicpruneError, RecipeError, TrainingError
from nicprune.data.images import write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.methods import Attached, attach
from nicprune.pruning.cost import measure
from nicprune.storage.adaptation import load_adaptation, save_adaptation
from nicprune.storage.checkpoint import load, save
from nicprune.storage.coded_image import CodedImage
from nicprune.storage.container import ImageCoder, decode, encode
from nicprune.training.loop import fit
from nicprune.training.trained_parameters import frozen_parameters

ZOO = [
    "bmshj2018-factorized",
    "bmshj2018-factorized-relu",
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-anchor",
    "cheng2020-attn",
]
GROW: dict[str, Any] = {"form": "grow", "grow": 0.25, "round_to": 4}
STAYING: dict[str, dict[str, Any]] = {
    "grow": GROW,
    "grow, into old": {**GROW, "into_old": True},
    "decoder_adapter": {"form": "decoder_adapter", "hidden": 4},
    "low_rank": {"form": "low_rank", "rank": 2},
}


def disturbed(attached: Attached, seed: int = 0, size: float = 0.02) -> Attached:
    """The codec as if its adaptation had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in attached.methods.named_parameters():
            if "quantiles" not in name and "_matrix" not in name:
                value.add_(size * torch.randn(value.shape, generator=generator))
    attached.methods[0].learnt.fill_(True)
    attached.set_width(1)
    return attached.eval()


def ready(name: str = "bmshj2018-hyperprior") -> nn.Module:
    codec = built(name)[0]
    update_tables(codec)
    return codec


def picture(codec: nn.Module, seed: int = 4) -> Tensor:
    return (image(codec, seed)[0] * 255).byte()


FORMS = [(name, "grow") for name in ZOO]
FORMS += [(name, "grow, into old") for name in (ZOO[2], ZOO[5])]
FORMS += [(ZOO[2], "decoder_adapter"), (ZOO[2], "low_rank"), (ZOO[4], "low_rank")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_old_files_are_read_bit_for_bit_and_new_ones_too(name: str, form: str) -> None:
    codec = ready(name)
    x, state = picture(codec), state_of(codec)
    before = ImageCoder(codec)
    old = before.encode(x)
    coded = CodedImage.parse(old, "it")
    shown = before.decode(coded)
    attached = attach(codec, "adaptation", domain="screen", **STAYING[form])
    with torch.no_grad():
        first = codec(image(codec))["x_hat"]
        assert torch.equal(attached(image(codec), domain="screen")["x_hat"], first)
    disturbed(attached)
    assert same_state(state, codec.state_dict())
    after = ImageCoder(attached)
    assert after.encode(x, domain="source") == old
    assert torch.equal(after.decode(coded), shown)
    new = after.encode(x)
    assert new != old
    assert CodedImage.parse(new, "it").domain == "screen"
    assert not torch.equal(after.decode(CodedImage.parse(new, "it")), shown)
    with torch.no_grad():
        assert torch.equal(attached(image(codec), domain="source")["x_hat"], first)
        assert not torch.equal(attached(image(codec), domain="screen")["x_hat"], first)
    assert attached.detach() is codec and hook_count(codec) == 0
    with pytest.raises(FileError, match="for the domain 'screen' by an adaptation of this codec"):
        decode(codec, new)
    other = ready("bmshj2018-factorized-relu" if name != "bmshj2018-factorized-relu" else ZOO[0])
    with pytest.raises(FileError, match="by an adaptation of another codec"):
        decode(other, new)


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "grow") for name in ZOO), *((name, "grow, into old") for name in ZOO[2::2])],
)
def test_macs_of_new_channels_are_what_runs(name: str, form: str) -> None:
    attached = attach(built(name)[0], "adaptation", **STAYING[form])
    method: Any = attached.methods[0]
    source = attached.totals()
    assert source == measure(attached.codec)
    attached.set_width(1)
    target = measure(attached)
    assert target == attached.totals()
    assert target.macs == method.form._macs(method.form.added) > source.macs
    own = sum(p.numel() for p in method.form.parameters())
    assert target.params == source.params + own
    by_transform = attached.by_transform()
    assert sum(macs for macs, _ in by_transform.values()) == target.macs
    assert sum(params for _, params in by_transform.values()) == target.params


def test_old_channels_of_the_synthesis_may_read_new_ones() -> None:
    codec = ready()
    adapted = {
        into: attach(copy.deepcopy(codec), "adaptation", **GROW, into_old=into, domain="screen")
        for into in (False, True)
    }
    more = {
        name: value
        for name, value in adapted[True].methods.named_parameters()
        if name not in dict(adapted[False].methods.named_parameters())
    }
    names = [name.split("new.")[1] for name in more]
    # The image has a new layer of all channels; y has grown too.
    assert names == ["g_s/0/into.weight", "g_s/2/into.weight", "g_s/4/into.weight"]
    assert not any(value.any() for value in more.values())
    assert [tuple(value.shape[:2]) for value in more.values()][1:] == [(4, 16), (4, 16)]
    seen: dict[bool, Tensor] = {}
    for into, attached in adapted.items():
        disturbed(attached)
        layer = attached.codec.g_s[2]
        handle = layer.register_forward_hook(lambda *args, i=into: seen.__setitem__(i, args[2]))
        with torch.no_grad():
            attached(image(codec), domain="screen")
        handle.remove()
    assert seen[False].shape == seen[True].shape == (1, 20, 16, 16)
    own, new = slice(None, 16), slice(16, None)
    assert not torch.allclose(seen[False][:, own], seen[True][:, own], rtol=1e-3)
    assert torch.allclose(seen[False][:, new].std(), seen[True][:, new].std(), rtol=0.2)
    with pytest.raises(RecipeError, match="into_old is a setting of form: grow, not of low_rank"):
        attach(codec, "adaptation", form="low_rank", into_old=True)


def test_a_budget_of_macs_is_used_and_kept() -> None:
    for budget, into in ((1.5, False), (1.5, True), (2.0, False)):
        attached = attach(
            built("bmshj2018-hyperprior")[0],
            "adaptation",
            form="grow",
            macs=budget,
            round_to=1,
            into_old=into,
        )
        attached.set_width(1)
        ratio = attached.totals().macs / attached.cost.totals().macs
        assert budget - 0.25 < ratio <= budget
    with pytest.raises(NicpruneError, match="do not allow 64 new channels in each group"):
        attach(built("bmshj2018-hyperprior")[0], "adaptation", form="grow", macs=1.1, round_to=64)


def test_groups_may_grow_by_name() -> None:
    codec = ready()
    attached = attach(codec, "adaptation", form="grow", grow={"g_s.*": 0.5}, round_to=1)
    added = attached.methods[0].form.added
    assert {name for name, count in added.items() if count} == {"g_s.0", "g_s.2", "g_s.4"}
    disturbed(attached, size=0.2)
    x = image(codec)
    sent = [attached.compress(x, domain=domain)["strings"] for domain in ("source", "target")]
    assert sent[1] == [[b"\x01"], *sent[0]], "the decoder alone has grown"


@pytest.mark.parametrize(
    "runs",
    [
        [(False, 3), (True, 2)],
        [(False, 3), (True, 2), (False, 4), (True, 1)],
        [(True, 1), (False, 5), (True, 2), (False, 1)],
    ],
)
def test_a_layout_takes_apart_what_it_joins(runs: list[tuple[bool, int]]) -> None:
    layout = Layout(runs)
    x = torch.rand(2, layout.width, 3)
    old, new = layout.old(x), layout.new(x)
    assert new.shape[1] == layout.added and old.shape[1] == layout.width - layout.added
    assert torch.equal(layout.join(old, new), x)


def test_own_channels_do_not_see_new_ones() -> None:
    """The source's own latents stay, whatever the new layers hold."""
    codec = ready("mbt2018-mean")
    attached = attach(codec, "adaptation", **GROW)
    seen: list[Tensor] = []
    handle = codec.g_a.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        attached.eval()(image(codec), domain="source")
        disturbed(attached, size=0.5)
        attached(image(codec))
    handle.remove()
    width = seen[0].shape[1]
    assert torch.equal(seen[1][:, :width], seen[0]) and seen[1].shape[1] == width + 8


def step(attached: Attached) -> None:
    """One step of a training loop of one's own."""
    x = image(attached.codec, 1)
    optimizer = torch.optim.Adam(
        [p for n, p in attached.named_parameters() if not n.endswith("quantiles")], lr=1e-2
    )
    for _ in range(3):
        optimizer.zero_grad()
        out = attached.train()(x)
        rate = sum(-torch.log2(value).mean() for value in out["likelihoods"].values())
        ((out["x_hat"] - x).square().mean() + 0.01 * rate).backward()
        optimizer.step()
        attached.after_step()


@pytest.mark.parametrize("form", sorted(STAYING))
def test_the_source_stays_frozen_in_any_loop(form: str) -> None:
    codec = ready()
    attached = attach(codec, "adaptation", **STAYING[form])
    state, own = state_of(codec), state_of(attached.methods)
    step(attached)
    assert same_state(state, codec.state_dict())
    after = state_of(attached.methods)
    assert not same_state(own, after)
    # What starts at zero teaches the others.
    still = [k for k in own if "form." in k and torch.equal(own[k], after[k])]
    assert not [k for k in still if k.endswith(("weight", "rows", "columns", "gamma", "beta"))]
    small = attached.harden()
    assert small.widths.now == 1, "the target is what it learnt"
    with torch.no_grad():
        x = image(codec, 2)
        assert torch.equal(small.eval()(x)["x_hat"], attached.eval()(x)["x_hat"])


def test_a_source_that_changed_is_refused() -> None:
    codec: Any = ready()
    attached = attach(codec, "adaptation", **GROW)
    with torch.no_grad():
        codec.g_s[0].bias.add_(1e-3)
    for action in (attached.harden, lambda: save_adaptation(attached, "x.safetensors")):
        with pytest.raises(TrainingError, match="the source codec has changed"):
            action()


@pytest.mark.parametrize("form", ["grow", "low_rank"])
def test_files_hold_both_or_the_adaptation_alone(form: str, tmp_path: Path) -> None:
    codec = ready("mbt2018-mean")
    plain = save(codec, tmp_path / "plain.safetensors")
    x = picture(codec)
    old, expected = encode(codec, x), decode(codec, encode(codec, x))
    attached = disturbed(attach(codec, "adaptation", domain="screen", **STAYING[form]))
    refresh_tables(attached)
    new = encode(attached, x)
    both = save(attached, tmp_path / "both.safetensors")
    alone = save_adaptation(attached, tmp_path / "alone.safetensors")
    assert alone.stat().st_size < both.stat().st_size / 2
    for found in (load(both), load_adaptation(load(plain), alone)):
        assert isinstance(found, Attached)
        assert torch.equal(decode(found, old), expected)
        assert torch.equal(decode(found, new), decode(attached, new))
        assert encode(found, x) == new and encode(found, x, domain="source") == old
    with pytest.raises(FileError, match="holds an adaptation alone: load its codec"):
        load(alone)
    with pytest.raises(FileError, match="holds a codec, not an adaptation alone"):
        load_adaptation(load(plain), plain)
    with pytest.raises(FileError, match=r"adapts another codec: .*\(this one has [0-9a-f]{16}\)"):
        load_adaptation(ready("bmshj2018-hyperprior"), alone)
    with pytest.raises(CodecError, match="over a plain codec"):
        load_adaptation(attached.codec, alone)
    with pytest.raises(CodecError, match="no adaptation beside this codec"):
        save_adaptation(load(plain), tmp_path / "none.safetensors")
    damaged = bytearray(alone.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(FileError, match="damaged"):
        load_adaptation(load(plain), tmp_path / "damaged.safetensors")


OTHER_PROCESS = """
import sys, torch, nicprune
folder = sys.argv[1]
shown = torch.load(f"{folder}/shown.pt")
whole = nicprune.load(f"{folder}/both.safetensors")
plain = nicprune.load(f"{folder}/plain.safetensors")
over = nicprune.load_adaptation(plain, f"{folder}/alone.safetensors")
for codec in (whole, over):
    for name in ("old", "new"):
        assert torch.equal(nicprune.decode(codec, f"{folder}/{name}.nic"), shown[name]), name
try:
    nicprune.decode(nicprune.load(f"{folder}/plain.safetensors"), f"{folder}/new.nic")
except nicprune.NicpruneError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if name in ("mbt2018", ZOO[0]) else pytest.mark.slow)
        for name, form in [*((name, "grow") for name in ZOO), ("mbt2018", "grow, into old")]
    ],
)
def test_another_process_reads_old_and_new_files(name: str, form: str, tmp_path: Path) -> None:
    codec = ready(name)
    save(codec, tmp_path / "plain.safetensors")
    x = picture(codec)
    old = encode(codec, x)
    shown = {"old": decode(codec, old)}
    attached = disturbed(attach(codec, "adaptation", domain="screen", **STAYING[form]))
    new = encode(attached, x)
    shown["new"] = decode(attached, new)
    for name, data in (("old", old), ("new", new)):
        (tmp_path / f"{name}.nic").write_bytes(data)
    torch.save(shown, tmp_path / "shown.pt")
    save(attached, tmp_path / "both.safetensors")
    save_adaptation(attached, tmp_path / "alone.safetensors")
    done = elsewhere.run(OTHER_PROCESS, str(tmp_path))
    assert done.returncode == 0, done.stderr[-800:]
    assert "domain 'screen'" in done.stdout and done.stdout.count("\n") == 1


def test_domains_that_a_codec_does_not_have() -> None:
    codec = ready()
    x = picture(codec)
    with pytest.raises(RecipeError, match="has no domain 'screen': domains need an adaptation"):
        encode(codec, x, domain="screen")
    attached = attach(codec, "adaptation", domain="screen", **GROW).eval()
    with pytest.raises(RecipeError, match="'scan' is not among those .* source and screen"):
        encode(attached, x, domain="scan")
    with pytest.raises(RecipeError, match="domain 2"):
        attached(image(codec), domain=2)
    other = attach(ready(), "adaptation", domain="scan", **STAYING["low_rank"])
    with pytest.raises(FileError, match="for the domain 'screen' .* has the domain 'scan'"):
        decode(other, encode(attached, x, domain="screen"))


def test_the_container_refuses_damaged_domains() -> None:
    codec = ready()
    attached = disturbed(attach(codec, "adaptation", domain="screen", **STAYING["low_rank"]))
    coded = CodedImage.parse(encode(attached, picture(codec)), "it")
    assert bytes(coded)[4] == 4 and bytes(CodedImage.parse(bytes(coded), "it")) == bytes(coded)
    for wrong in (replace(coded, domain="a\nb"), replace(coded, source=b"short")):
        with pytest.raises(FileError, match="do not fit together"):
            CodedImage.parse(bytes(wrong), "it")


def test_evaluation_in_the_source_domain_is_the_source_codecs_to_the_last_digit(
    tmp_path: Path,
) -> None:
    codec = ready("mbt2018-mean")
    write_png(image(codec, 4)[0], tmp_path / "one.png")
    before = evaluate(codec, tmp_path)
    attached = disturbed(attach(codec, "adaptation", domain="screen", **GROW))
    after = evaluate(attached, tmp_path, domain="source")
    times = ("encode_s", "decode_s")
    first, second = (
        {k: v for k, v in found.means().items() if k not in times} for found in (before, after)
    )
    assert first == second and after.cost == before.cost
    there = evaluate(attached, tmp_path)
    assert there.at == "domain screen" and there.cost.macs > before.cost.macs
    assert there.original_cost == before.cost


def test_forms_that_forget_change_the_codec() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    names = {id(p): name for name, p in codec.named_parameters()}
    for form, trained in (("finetune_all", ("",)), ("finetune_decoder", ("g_s.",))):
        attached = attach(codec, "adaptation", form=form)
        still = {names[id(p)] for p in frozen_parameters(attached, None)}
        learning = set(names.values()) - still
        assert learning and all(name.startswith(trained) for name in learning)
        assert attached.choices == [] and attached.widths is None and not attached.stays
        small = attached.harden()
        assert type(small) is type(codec) and hook_count(small) == 0
        attached.detach()


def test_adapt_steps_are_trained_before_harden(tmp_path: Path) -> None:
    for seed in range(2):
        write_png(image(built("bmshj2018-hyperprior")[0], seed)[0], tmp_path / f"{seed}.png")
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(codec, "adaptation", form="finetune_decoder", adapt_steps=2)
    with pytest.raises(TrainingError, match="2 steps are left"):
        attached.harden()
    state = state_of(codec)
    fit(attached, tmp_path, steps=2, batch_size=1, patch_size=64, progress=False)
    changed = [k for k, v in codec.state_dict().items() if not torch.equal(v, state[k])]
    assert attached.done and changed
    learnt = [key for key in changed if key.rpartition(".")[2] not in CDF_BUFFERS]
    assert learnt and all(key.startswith("g_s.") for key in learnt)
    assert attached.harden() is not codec


def test_source_images_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    for name, value in (("target", 0), ("source", 1)):
        (tmp_path / name).mkdir()
        write_png(torch.full((3, 64, 64), float(value)), tmp_path / name / "one.png")
    attached = attach(codec, "adaptation", form="finetune_all", replay=0.375)
    settings = {"steps": 4, "batch_size": 2, "patch_size": 64, "progress": False, "lr": 1e-6}
    with pytest.raises(RecipeError, match="images of the source domain"):
        fit(attached, tmp_path / "target", **settings)
    seen: list[float] = []
    codec.register_forward_pre_hook(lambda m, args: seen.append(float(args[0].mean())))
    fit(attached, tmp_path / "target", replay=tmp_path / "source", **settings)
    assert seen == pytest.approx([0, 0.5, 0.5, 0.5]), "3 of 8 patches"


@pytest.mark.parametrize(
    "model",
    [
        lambda: built("bmshj2018-hyperprior")[0],
        lambda: attach(
            built("bmshj2018-hyperprior")[0], "magnitude", budget={"macs": 0.5}, round_to=1
        ),
        lambda: attach(
            built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1
        ),
        lambda: attach(built("bmshj2018-hyperprior")[0], "adaptation", form="finetune_all"),
    ],
    ids=["codec", "pruned", "slimmable", "adapted"],
)
@pytest.mark.parametrize("images", ["validation", "replay"])
def test_images_that_nothing_would_look_at_are_refused(
    model: Callable[[], nn.Module], images: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{images}: nothing here"):
        fit(model(), "samples", steps=1, patch_size=64, progress=False, **{images: "samples"})


def test_a_pruned_codec_is_adapted() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    small = attach(codec, "magnitude", budget={"macs": 0.5}, round_to=1).harden()
    update_tables(small)
    old = encode(small, picture(small))
    attached = disturbed(attach(small, "adaptation", **GROW))
    assert encode(attached, picture(small), domain="source") == old
    assert torch.equal(decode(attached, old), decode(attached.detach(), old))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "grow"}, "give one of grow: 0.25, macs: 1.3"),
        ({"form": "grow", "grow": 0.25, "macs": 1.3}, "give one of"),
        ({"form": "grow", "grow": 9.0}, "fraction of a width"),
        ({"form": "grow", "grow": {"nothing.*": 0.5}}, "no channel group matches 'nothing"),
        ({"form": "grow", "widths": {"g_s.*": -1}}, "0 or more"),
        ({"form": "low_rank", "grow": 0.25}, "a setting of form: grow, not of low_rank"),
        ({"form": "grow", "grow": 0.25, "rank": 8}, "a setting of form: low_rank"),
        ({"form": "low_rank", "layers": ["nothing"]}, "no convolution matches 'nothing'"),
        ({"form": "low_rank", "replay": 0.25}, "replay is for finetune_all"),
        ({"form": "low_rank", "domain": "source"}, "not 'source'"),
        ({"form": "low_rank", "domain": "a\nb"}, "a line of text"),
        ({"form": "shrink"}, "form"),
    ],
)
def test_mistakes_are_one_clear_line(settings: dict[str, Any], said: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    with pytest.raises(NicpruneError) as error:
        attach(codec, "adaptation", **settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert hook_count(codec) == 0


def test_what_cannot_grow_is_refused_and_adapted_otherwise() -> None:
    codec = built("elic2022-chandelier")[0]
    with pytest.raises(CodecError, match=r"cannot grow: .*; take another form"):
        attach(codec, "adaptation", **GROW)
    with pytest.raises(CodecError, match="scale_to_context .* cannot grow: .* for a Linear"):
        attach(built("mbt2018-vbr")[0], "adaptation", **GROW)
    attach(codec, "adaptation", **STAYING["decoder_adapter"])


def test_the_source_part_of_a_grown_codec_is_not_pruned() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    stack = [("adaptation", GROW), ("magnitude", {"budget": {"macs": 0.5}})]
    with pytest.raises(RecipeError, match="shares of the source codec: macs: .* greater than 1"):
        attach(codec, stack)
    stack[1] = ("fisher", stack[1][1])
    with pytest.raises(RecipeError, match="source codec must not change: prune the codec first"):
        attach(codec, stack)
    attached = attach(codec, "adaptation", **GROW)
    with pytest.raises(CodecError, match="attached to a codec already"):
        attach(attached, "magnitude", budget={"macs": 0.5})
    with pytest.raises(RecipeError, match="extract needs a slimmable codec"):
        attached.extract(1)
