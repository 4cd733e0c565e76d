"""Recipes: strict, checked before any work, resumable part by part."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressai.models import ScaleHyperprior
from helpers import built, make_telling, offer_tiny_codecs
from helpers_latency import table_of
from torch import nn

from nicprune.common.errors import CodecError, DataError, FileError, NicpruneError, RecipeError
from nicprune.common.files import VARIABLES
from nicprune.data.images import write_png
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.plan import file_digests, fit_settings, plan_runs
from nicprune.experiments.recipe_files import find_recipe, read_recipe, recipe_names
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.recipe_paths import check_paths
from nicprune.experiments.run import plan, run_recipe
from nicprune.pruning.cost import measure
from nicprune.storage.checkpoint import load, save
from nicprune.storage.named import load_codec


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny recipe that runs in seconds, on a narrow codec."""
    for i in range(2):
        small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        write_png(
            nn.functional.interpolate(small, size=(80, 96), mode="bicubic")[0],
            tmp_path / "photos" / f"{i}.png",
        )
    offer_tiny_codecs(monkeypatch)
    return {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1, 2],
        "photographs": {
            "train": str(tmp_path / "photos"),
            "test": str(tmp_path / "photos"),
            "overlap": True,
        },
        "training": {"batch_size": 2, "patch_size": 64, "precision": "32", "log_every": 1},
        "sparsify": {"steps": 3, "lr": 1e-4},
        "finetune": {"steps": 2},
        "methods": [
            {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1},
            {"name": "magnitude", "label": "one-shot", "budget": {"macs": 0.5}, "round_to": 1},
        ],
    }


def run(content: dict[str, Any], folder: Path, said: list[str] | None = None) -> Path:
    say = (said if said is not None else []).append
    return run_recipe(
        parse_recipe(content, "test"),
        yaml.safe_dump(content),
        reports=folder / "reports",
        runs=folder / "runs",
        say=say,
        progress=False,
    )


def test_run_writes_the_whole_report_and_skips_what_is_done(
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    said: list[str] = []
    page = run(content, tmp_path, said)
    folder = page.parent
    for name in ("index.html", "table.csv", "table.md", "table.tex", "records.json"):
        assert (folder / name).stat().st_size > 0
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4  # original, control, two methods at two qualities
    header = rows[0].split(",")
    for column in (
        "codec",
        "quality",
        "method",
        "role",
        "macs",
        "kmac_per_pixel",
        "flop_reduction",
        "params",
        "bpp",
        "psnr_db",
        "psnr_drop_db",
        "psnr_drop_pct",
        "ms_ssim",
        "encode_s",
        "decode_s",
        "steps",
        "seed",
    ):
        assert column in header
    table = list(csv.DictReader(rows))
    assert all(float(r["flop_reduction"]) >= 2 for r in table if r["role"] == "pruned")
    assert all(float(r["flop_reduction"]) == 1 for r in table if r["role"] != "pruned")
    assert {r["steps"] for r in table if r["role"] != "original"} == {"5"}, (
        "control and methods are trained for the same steps"
    )
    codecs = sorted((folder / "codecs").glob("*.safetensors"))
    assert len(codecs) == 4
    record = json.loads(next((tmp_path / "runs").rglob("mask_decay*/record.json")).read_text())
    assert measure(load(codecs[0])).macs == record["cost"]["macs"]
    assert not list((tmp_path / "runs").rglob("checkpoint.pt")), (
        "optimiser state is not left behind"
    )
    assert "PSNR" in "\n".join(said)

    assert list((folder / "crops").iterdir())

    again: list[str] = []
    request.getfixturevalue("undrawn")
    run(content, tmp_path, again)
    assert sum("done before" in line for line in again) == 8
    (tmp_path / "runs" / "tiny").rename(
        tmp_path / "runs" / "other"
    )  # another recipe that does the same jobs has nothing left to do
    other = run(content | {"name": "other"}, tmp_path).parent
    assert {r["recipe"] for r in json.loads((other / "records.json").read_text())} == {"other"}
    (tmp_path / "runs" / "other").rename(tmp_path / "runs" / "tiny")

    record_file = next((tmp_path / "runs").rglob("mask_decay*/record.json"))
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("codec.safetensors")}
    images = json.loads(record_file.read_text())["images"]
    for trained in (True, False):
        record_file.write_text(record_file.read_text()[:50])  # cut short by kill -9
        if not trained:
            (record_file.parent / "made.json").unlink()
        third: list[str] = []
        with monkeypatch.context() as patch:
            if trained:
                patch.setattr(
                    "nicprune.experiments.run._fit", None
                )  # what is trained is only measured again
            run(content, tmp_path, third)
        assert sum("done before" in line for line in third) == 7
        assert before == {
            p: p.read_bytes() for p in (tmp_path / "runs").rglob("codec.safetensors")
        }, "the same run gives the same codec, bit for bit"
        assert [i["psnr_db"] for i in json.loads(record_file.read_text())["images"]] == [
            i["psnr_db"] for i in images
        ]


@pytest.mark.usefixtures("undrawn")
def test_interrupted_between_phases_gives_the_same_codec(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content |= {"qualities": [1], "control": False, "methods": content["methods"][:1]}
    run(content, tmp_path / "whole")
    import nicprune.experiments.run as module

    real, calls = module._fit, []

    def stops_at_the_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(module, "_fit", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(content, tmp_path / "parts")
    assert list((tmp_path / "parts").rglob("hardened.safetensors"))
    run(content, tmp_path / "parts")
    whole, parts = (
        next((tmp_path / p).rglob("*/codec.safetensors")).read_bytes() for p in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.usefixtures("undrawn")
def test_train_recipe_chains_qualities(content: dict[str, Any], tmp_path: Path) -> None:
    content = {k: v for k, v in content.items() if k not in ("methods", "sparsify")}
    content |= {
        "task": "train",
        "codec": "demo-hyperprior",
        "weights": "none",
        "qualities": [3, 2],
        "chain": True,
        "half": True,
    }
    content |= {"finetune": {"steps": 2}, "per_quality": {2: {"steps": 1}}}
    folder = run(content, tmp_path).parent
    files = sorted((folder / "codecs").glob("*.safetensors"))
    assert len(files) == 2 and all(load(f).g_a[0].out_channels == 64 for f in files)
    table = csv.DictReader((folder / "table.csv").read_text().splitlines())
    assert [(r["quality"], r["steps"], r["role"]) for r in table] == [
        ("2", "1", "original"),
        ("3", "2", "original"),
    ]


def test_changed_inputs_are_not_done_before(content: dict[str, Any], tmp_path: Path) -> None:
    keys = {j.key for j in plan_runs(parse_recipe(content, "a"), tmp_path)}
    write_png(
        torch.rand(3, 80, 90), tmp_path / "photos" / "0.png"
    )  # another photograph of the same name
    assert not keys & {j.key for j in plan_runs(parse_recipe(content, "a"), tmp_path)}
    weights = tmp_path / "w.pth"
    content |= {"weights": str(weights)}
    weights.write_bytes(b"one")
    keys = {j.key for j in plan_runs(parse_recipe(content, "a"), tmp_path)}
    weights.write_bytes(b"two")
    assert not keys & {j.key for j in plan_runs(parse_recipe(content, "a"), tmp_path)}


def test_photographs_that_decide_a_schedule_count_too(
    content: dict[str, Any], tmp_path: Path
) -> None:
    write_png(torch.rand(3, 80, 90), tmp_path / "other" / "0.png")
    arms = [
        {
            "name": "slimmable",
            "widths": [1.0, 0.5],
            "round_to": 1,
            "lambdas": [0.0067, 0.0067],
            "schedule": {"first": 1, "every": 1},
        },
        *content["methods"],
    ]
    keys = []
    for folder in ("photos", "other"):
        photographs = content["photographs"] | {"validation": str(tmp_path / folder)}
        keys.append(
            {
                job.arm.label: job.key
                for job in plan_runs(
                    parse_recipe(content | {"methods": arms, "photographs": photographs}, "a"),
                    tmp_path,
                )
            }
        )
    assert [label for label in keys[0] if keys[0][label] != keys[1][label]] == ["slimmable"]


def test_everything_that_is_missing_is_said_at_once(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NICPRUNE_DATA", raising=False)
    photographs = {
        "train": ["${NICPRUNE_DATA}/train", "samples"],
        "test": "$NICPRUNE_DATA/kodak",
        "validation": str(tmp_path / "none"),
    }
    recipe = parse_recipe(
        {**content, "photographs": photographs, "weights": "w{quality}.pth", "qualities": [1, 2]},
        "x",
    )
    with pytest.raises(DataError) as raised:
        check_paths(recipe)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "photographs.train",
        "photographs.test",
        "photographs.validation",
        "weights",
        "weights",
    ]
    assert (
        "${NICPRUNE_DATA}/train: the variable NICPRUNE_DATA is not set (the folder with the"
        " images" in lines[0]
    )
    assert "export NICPRUNE_DATA=... or name another path" in lines[1]
    assert lines[2].endswith(f"no such folder: {tmp_path / 'none'}") and lines[4].endswith(
        "no such file: w2.pth"
    )


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_recipes_of_the_package_name_folders_that_anyone_can_have(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe_names()[name].read_text()
    assert ".." not in yaml.safe_dump(yaml.safe_load(text)).replace("...", "")
    used = set(re.findall(r"\$\{(\w+)\}", text))
    assert used <= VARIABLES.keys()
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if used:
        with pytest.raises(NicpruneError) as raised:
            check_paths(read_recipe(name)[0])
        assert all(
            f"the variable {variable} is not set ({VARIABLES[variable]})" in str(raised.value)
            for variable in used
        )


def test_variables_in_paths_are_filled_in(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = {
        "photographs": {"train": "${NICPRUNE_DATA}/photos", "test": "$NICPRUNE_DATA/photos"},
        "weights": "${NICPRUNE_DATA}/base.safetensors",
    }
    recipe = parse_recipe({**content, **paths}, "x")
    keys = []
    for place in ("here", "there"):
        save(built("bmshj2018-hyperprior")[0], tmp_path / place / "base.safetensors")
        write_png(torch.zeros(3, 64, 64), tmp_path / place / "photos" / "a.png")
        monkeypatch.setenv("NICPRUNE_DATA", str(tmp_path / place))
        check_paths(recipe)
        assert file_digests(recipe, 1) == [
            hashlib.sha256((tmp_path / place / "base.safetensors").read_bytes()).hexdigest()
        ]
        assert load_base_codec(recipe, plan_runs(recipe, tmp_path)[0]) is not None
        keys.append([job.key for job in plan_runs(recipe, tmp_path)])
    assert keys[0] == keys[1]  # the same photographs and weights elsewhere: what is done is done


def test_weights_of_each_quality_are_what_it_starts_from(
    content: dict[str, Any], tmp_path: Path
) -> None:
    files = [str(tmp_path / f"{name}-q{{quality}}.pth") for name in ("one", "other")]
    codecs = [make_telling(built("bmshj2018-hyperprior")[0], seed) for seed in (1, 2)]
    for quality, codec, name in zip((1, 2), codecs, files, strict=True):
        torch.save(codec.state_dict(), name.replace("{quality}", str(quality)))
    content["weights"] = {1: files[0], 2: files[1]}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(content))
    recipe = read_recipe(str(file))[0]
    check_paths(recipe)
    for job in plan_runs(recipe, tmp_path):
        start = load_base_codec(recipe, job).state_dict()
        assert all(
            torch.equal(start[name], value)
            for name, value in codecs[job.quality - 1].named_parameters()
        )
    # The keys are those of a recipe that names the same file for all its qualities.
    alone = content | {"weights": files[1], "qualities": [2]}
    keys = {job.key for job in plan_runs(recipe, tmp_path) if job.quality == 2}
    assert keys == {job.key for job in plan_runs(parse_recipe(alone, "a"), tmp_path)}
    # What `--set qualities` leaves out needs no weights, and what is missing is named.
    Path(files[0].replace("{quality}", "1")).unlink()
    check_paths(read_recipe(str(file), ["qualities=[2]"])[0])
    with pytest.raises(FileError, match="no such file: .*one-q1"):
        check_paths(recipe)
    # In a chain only the first needs them.
    chained = {k: v for k, v in content.items() if k not in ("methods", "sparsify")} | {
        "task": "train",
        "chain": True,
    }
    assert parse_recipe(chained | {"weights": {1: files[0]}}, "a").weights_for(2) == "none"
    with pytest.raises(RecipeError, match="weights: there is no entry for quality 1"):
        parse_recipe(chained | {"weights": {2: files[1]}}, "a")


def test_in_a_chain_only_the_first_needs_weights(content: dict[str, Any], tmp_path: Path) -> None:
    save(built("bmshj2018-hyperprior")[0], tmp_path / "base-q3.safetensors")
    content = {k: v for k, v in content.items() if k not in ("methods", "sparsify")} | {
        "task": "train"
    }
    content["weights"] = str(tmp_path / "base-q{quality}.safetensors")
    recipe = parse_recipe(
        content | {"qualities": [3, 2], "chain": True, "finetune": {"steps": 0}}, "a"
    )
    check_paths(recipe)
    listed = plan_runs(recipe, tmp_path)
    listed[0].folder.mkdir(parents=True)
    save(
        load(tmp_path / "base-q3.safetensors", factory=lambda: built("bmshj2018-hyperprior")[0]),
        listed[0].folder / "full.safetensors",
    )
    from nicprune.experiments.run import train

    codec, _ = train(recipe, listed[1], listed, False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            codec.parameters(), built("bmshj2018-hyperprior")[0].parameters(), strict=True
        )
    )


def test_a_codec_may_start_from_the_transforms_of_another(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nicprune.experiments.run import train

    offered = sys.modules["tiny_codecs"]
    monkeypatch.setattr(offered, "make", lambda quality: built("mbt2018-mean")[0])
    other = built("bmshj2018-hyperprior")[0]
    save(other, tmp_path / "other-q3.safetensors")
    content = {k: v for k, v in content.items() if k not in ("methods", "sparsify")} | {
        "task": "train",
        "transforms": str(tmp_path / "other-q{quality}.safetensors"),
        "qualities": [3, 2],
        "chain": True,
        "finetune": {"steps": 0},
    }
    recipe = parse_recipe(content, "a")
    check_paths(recipe)
    listed = plan_runs(recipe, tmp_path)
    random = load_base_codec(recipe.model_copy(update={"transforms": None}), listed[0])
    for job in listed:  # the second from what the first left
        listed[0].folder.mkdir(parents=True, exist_ok=True)
        codec, _ = train(recipe, job, listed, False)
        for key, value in codec.named_parameters():
            source = other if key.startswith(("g_a.", "g_s.")) else random
            assert torch.equal(value, source.get_parameter(key)), key
    changed = built("bmshj2018-hyperprior")[0]
    with torch.no_grad():
        changed.g_a[0].weight.mul_(2)
    save(changed, tmp_path / "other-q3.safetensors")
    assert plan_runs(recipe, tmp_path)[0].key != listed[0].key  # the file is hashed, not its name

    save(built("cheng2020-anchor")[0], tmp_path / "other-q2.safetensors")
    with pytest.raises(FileError, match="does not fit MeanScaleHyperprior") as caught:
        load_base_codec(parse_recipe(content | {"chain": False}, "a"), listed[1])
    assert "\n" not in str(caught.value)
    (tmp_path / "other-q3.safetensors").unlink()
    with pytest.raises(FileError, match=r"transforms: no such file: .*other-q3"):
        check_paths(recipe)


def test_an_arm_from_scratch_has_the_lambda_of_the_one_it_is_like(
    content: dict[str, Any], tmp_path: Path
) -> None:
    arms = [
        content["methods"][1] | {"lmbda": 0.02},
        {"scratch": "one-shot"},
        {"scratch": "one-shot", "label": "own", "lmbda": 0.03},
    ]
    listed = plan_runs(parse_recipe(content | {"methods": arms, "qualities": [1]}, "a"), tmp_path)
    assert [job.lmbda for job in listed] == [0.0018, 0.0018, 0.02, 0.02, 0.03]


def test_methods_that_look_at_photographs_do_so_by_the_recipes_lambda(
    content: dict[str, Any], tmp_path: Path
) -> None:
    arms = [content["methods"][1] | {"budget": {"macs": 0.5, "split": "auto"}}]
    listed = plan_runs(
        parse_recipe(content | {"methods": arms, "qualities": [1], "lambdas": {1: 0.05}}, "a"),
        tmp_path,
    )
    assert listed[-1].settings[0][1]["lmbda"] == 0.05


def test_what_is_said_of_one_arm_goes_before_what_is_said_of_all(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """And of one phase before both."""
    arm = content["methods"][1]
    arms = [
        arm | {"label": "both", "training": {"lr": 3e-3}},
        arm | {"label": "one", "training": {"lr": 3e-3}, "phase": {"steps": 2, "lr": 1e-5}},
        arm | {"label": "its own", "phase": {"steps": 2, "lr": 1e-5}},
    ]
    recipe = parse_recipe(content | {"methods": arms, "qualities": [1]}, "a")
    rates = {
        job.arm.label: tuple(
            fit_settings(recipe, job, name)["lr"] for name in ("sparsify", "finetune")
        )
        for job in plan_runs(recipe, tmp_path)
        if job.arm.label in ("both", "one", "its own")
    }
    common = recipe.sparsify.lr
    assert rates == {"both": (3e-3, 3e-3), "one": (3e-3, 1e-5), "its own": (common, 1e-5)}


def test_in_a_chain_later_qualities_depend_on_earlier_ones(
    content: dict[str, Any], tmp_path: Path
) -> None:
    base = {k: v for k, v in content.items() if k not in ("methods", "sparsify")} | {
        "task": "train",
        "codec": "demo-hyperprior",
        "weights": "none",
    }
    base |= {"qualities": [3, 2], "chain": True, "per_quality": {3: {"steps": 1}}}
    first, second = (
        [
            j.key
            for j in plan_runs(
                parse_recipe({**base, "per_quality": {3: {"steps": s}}}, "a"), tmp_path
            )
        ]
        for s in (1, 2)
    )
    assert first[0] != second[0] and first[1] != second[1]


@pytest.mark.usefixtures("undrawn")
def test_a_chain_may_branch(content: dict[str, Any], tmp_path: Path) -> None:
    content = {k: v for k, v in content.items() if k not in ("methods", "sparsify")} | {
        "task": "train",
        "codec": "demo-hyperprior",
        "weights": "none",
    }
    content |= {
        "qualities": [1, 2, 3],
        "chain": {3: 2},
        "finetune": {"steps": 0},
        "per_quality": {2: {"steps": 1}, 1: {"steps": 1}},
    }
    first, second = (
        [
            j.key
            for j in plan_runs(
                parse_recipe({**content, "per_quality": {2: {"steps": 1}, 1: {"steps": s}}}, "a"),
                tmp_path,
            )
        ]
        for s in (1, 2)
    )
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True]
    folder = run(content, tmp_path).parent
    states = {
        q: load(next((folder / "codecs").glob(f"*-q{q}-*.safetensors"))).state_dict()
        for q in (1, 2, 3)
    }
    assert all(torch.equal(states[3][key], value) for key, value in states[2].items()), (
        "quality 3 was trained for no steps, from quality 2"
    )
    assert any(not torch.equal(states[1][key], value) for key, value in states[2].items())


def test_changed_settings_do_not_overwrite(content: dict[str, Any], tmp_path: Path) -> None:
    first = {
        j.folder for j in plan_runs(parse_recipe(content, "a"), tmp_path) if j.role != "original"
    }
    second = {
        j.folder
        for j in plan_runs(parse_recipe({**content, "finetune": {"steps": 3}}, "a"), tmp_path)
        if j.role != "original"
    }
    assert not first & second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qualitys": [1]}, "unknown key 'qualitys'; did you mean 'qualities'"),
        ({"version": 2}, "version"),
        ({"finetune": {"stepps": 1}}, "unknown key 'finetune.stepps'; did you mean 'steps'"),
        ({"finetune": {"steps": -1}}, "finetune.steps: input should be greater than or equal to 0"),
        ({"training": {"lmbda": 0.1}}, "training.lmbda is stated at lambdas:"),
        ({"training": {"batchsize": 1}}, "unknown key 'batchsize'; did you mean 'batch_size'"),
        (
            {"methods": [{"name": "mask_decey"}]},
            "unknown method 'mask_decey'; did you mean 'mask_decay'",
        ),
        (
            {"methods": [{"name": "mask_decay", "budget": {"mac": 0.5}}]},
            "unknown key 'budget.mac'; did you mean 'macs'",
        ),
        (
            {"methods": [{"name": "mask_decay", "budget": {"macs": 1.5}}]},
            "budget.macs: input should be less than 1",
        ),
        (
            {"methods": [{"name": "mask_decay", "budget": {"macs": 0}}]},
            "budget.macs: input should be greater than 0",
        ),
        ({"methods": [{"name": "mask_decay"}]}, "give either budget"),
        (
            {"methods": [{"name": "mask_decay", "budget": {"macs": 0.5}, "decay_steps": 50}]},
            "decay_steps 50 does not fit into sparsify.steps 3",
        ),
        ({"methods": []}, "name at least one"),
        ({"codec": "bmshj2018-hyperpior"}, "did you mean 'bmshj2018-hyperprior'"),
        ({"codec": "cheng2020-attn", "qualities": [7]}, "has no quality 7; it has 1 to 6"),
        ({"qualities": [1, 1]}, "qualities must differ"),
        ({"training": {"devices": "2"}}, "a recipe trains on one device"),
        ({"sparsify": {"steps": 0}}, "learns while the codec trains"),
        (
            {"methods": [{"name": "mask_decay", "budget": {"macs": 0.5}, "decay_steps": "abc"}]},
            "decay_steps: input should be a valid integer",
        ),
        ({"methods": [{"name": ["a"]}]}, "unknown method"),
        ({"methods": [{"name": "none", "label": 2}]}, "label: input should be a valid string"),
        (
            {"methods": [{"name": "none", "label": "a+"}, {"name": "none", "label": "a/"}]},
            "labels of methods must differ",
        ),
        ({"lambdas": {1: 0}}, "lambdas.1: input should be greater than 0"),
        ({"lambdas": {7: 0.1}}, "lambdas: [7] are not among the qualities"),
        ({"weights": {1: "a", 2: "b", 7: "c"}}, "weights: [7] are not among the qualities"),
        ({"weights": {1: "a"}}, "weights: there is no entry for quality 2"),
        ({"weights": {1: "a", 2: [3]}}, "weights.2: input should be a valid string"),
        (
            {"weights": 3},
            "weights: input should be a valid string or a valid dictionary (got 3)",
        ),
        ({"weights": {"x": "a"}}, "weights.x.[key]: input should be a valid integer"),
        (
            {"chain": 3},
            "chain: input should be a valid boolean or a valid dictionary (got 3)",
        ),
        ({"chain": {1: "b"}}, "chain.1: input should be a valid integer"),
        (
            {"photographs": {"train": "a", "test": "b", "validation": [3]}},
            "photographs.validation.0: input should be a valid string (got 3)",
        ),
        ({"codec": "a.safetensors", "weights": {1: "none", 2: "none"}}, "brings its own weights"),
        ({"seeds": [0, -1]}, "seeds.1: input should be greater than or equal to 0"),
        ({"chain": True}, "belong to task: train"),
        ({"transforms": "a.safetensors"}, "belong to task: train"),
        ({"chain": {1: 2}}, "chain: 1 cannot start from 2"),
        ({"codec": "a.safetensors"}, "brings its own weights, and is one quality"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**content, **change}, "recipe.yaml")
    text = str(caught.value)
    assert text.startswith("recipe.yaml") and "\n" not in text
    assert message.lower() in text.lower()


def test_overrides(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(content))
    recipe, text = read_recipe(
        str(file), ["finetune.steps=7", "methods.0.budget.macs=0.4", "qualities=[2]"]
    )
    assert (
        recipe.finetune.steps == 7
        and recipe.methods[0].stack[0].settings["budget"] == {"macs": 0.4}
        and recipe.qualities == [2]
    )
    assert "steps: 7" in text
    by_quality, _ = read_recipe(str(file), ["lambdas.1=0.01", "lambdas.2=0.02"])
    assert by_quality.lambdas == {1: 0.01, 2: 0.02}
    file.write_text(
        yaml.safe_dump(
            content | {"lambdas": {1: 0.01, 2: 0.02}, "methods": [{"name": "bit_rate_modulator"}]}
        )
    )
    changed, _ = read_recipe(str(file), ["lambdas.2=0.03"])
    assert changed.lambdas == {1: 0.01, 2: 0.03} and changed.methods[0].stack[0].settings[
        "lambdas"
    ] == [0.01, 0.03]
    file.write_text(yaml.safe_dump(content))
    for bad, message in (
        ("finetune", "wants key=value"),
        ("finetune.stepps=1", "did you mean 'steps'"),
        ("methods.9.name=x", "not an index below 2"),
        ("qualities.0.x=1", "is a value, not a section"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_recipe(str(file), [bad])


def test_not_yaml_and_not_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("version: 1\n  bad: [")
    with pytest.raises(RecipeError, match="line 2: not YAML"):
        read_recipe(str(file))
    file.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        read_recipe(str(file))
    with pytest.raises(RecipeError, match="no recipe 'quickstrat'; did you mean 'quickstart'"):
        find_recipe("quickstrat")


def test_paths_are_checked_before_any_work(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run({**content, "photographs": {"train": "/nowhere", "test": "samples"}}, tmp_path)
    with pytest.raises(FileError, match="no such file"):
        check_paths(parse_recipe({**content, "weights": "w{quality}.pth"}, "x"))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"):
        run(content, tmp_path)


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_that_comes_along_is_valid(name: str) -> None:
    recipe, text = read_recipe(name)
    assert recipe.name == name and text.startswith("# "), (
        "the first line says what the recipe does, for nicprune list"
    )


def test_dry_run_says_what_would_be_done(content: dict[str, Any]) -> None:
    lines = plan(parse_recipe(content, "x"))
    assert (
        len(lines) == 8
        and "kMAC/pixel now, 10 channel groups" in lines[2]
        and "0 steps" in lines[0]
    )
    with pytest.raises(RecipeError, match="the report would be written into"):
        plan(parse_recipe(content, "x"), reports=content["photographs"]["test"])


@pytest.mark.usefixtures("undrawn")
class Hidden(ScaleHyperprior):
    """Its class and arguments do not say how it was made."""

    def __init__(self, slope: float = 0.0):
        super().__init__(16, 24)
        if slope:
            self.h_a[1] = nn.LeakyReLU(slope)


@pytest.mark.usefixtures("undrawn")
def test_codecs_that_only_a_factory_makes_are_saved_and_loaded_by_it(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = types.SimpleNamespace(make=lambda quality: Hidden(0.3))
    monkeypatch.setitem(sys.modules, "tiny_codecs", made)
    content |= {"qualities": [1], "methods": content["methods"][:1]}
    page = run(content, tmp_path)
    file = next((page.parent / "codecs").iterdir())
    with pytest.raises(CodecError, match="as tiny_codecs:make did"):
        load(file)
    again: Any = load_codec("tiny_codecs:make", 1, weights=file)
    assert again.h_a[1].negative_slope == 0.3
    page = run(content | {"task": "train", "name": "chain", "sparsify": {"steps": 0}}
               | {"methods": [], "qualities": [1, 2], "chain": True}, tmp_path)  # fmt: skip
    assert len(list((page.parent / "codecs").iterdir())) == 2


def test_codecs_that_cannot_be_saved_are_told_so_before_anything_is_trained(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory that makes another codec each time."""
    slopes = iter(range(1, 100))
    made = types.SimpleNamespace(make=lambda quality: Hidden(next(slopes) / 100))
    monkeypatch.setitem(sys.modules, "tiny_codecs", made)
    for start in (lambda: run(content, tmp_path), lambda: plan(parse_recipe(content, "test"))):
        with pytest.raises(CodecError, match="cannot be saved: .*negative_slope") as told:
            start()
        assert "\n" not in str(told.value)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    assert not list((tmp_path / "runs").rglob("*.jsonl"))


@pytest.mark.usefixtures("undrawn")
def test_seeds_draw_different_lots_and_crops(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nicprune.experiments.run as module

    real, seeds = module.fit, []
    monkeypatch.setattr(
        module,
        "fit",
        lambda *a, **settings: (seeds.append(settings["seed"]), real(*a, **settings))[1],
    )
    content |= {
        "qualities": [1],
        "seeds": [0, 1],
        "control": False,
        "methods": [{"name": "random", "budget": {"macs": 0.5}, "round_to": 1}],
    }
    page = run(content, tmp_path)
    assert len(list((page.parent / "codecs").glob("*.safetensors"))) == 2, (
        "one seed's codec does not overwrite the other's"
    )
    records = [
        json.loads(p.read_text()) for p in sorted((tmp_path / "runs").rglob("random*/record.json"))
    ]
    assert [r["settings"]["random"]["seed"] for r in records] == [r["seed"] for r in records] == [
        0,
        1,
    ] and records[0]["psnr_db"] != records[1]["psnr_db"]
    assert len(seeds) == len(set(seeds)) == 4, (
        "two phases with each of two seeds: none sees another's crops"
    )


@pytest.mark.usefixtures("undrawn")
def test_an_arm_may_have_a_lambda_of_its_own(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nicprune.experiments.run as module

    real, given = module.fit, []
    monkeypatch.setattr(
        module,
        "fit",
        lambda *a, **settings: (given.append(settings["lmbda"]), real(*a, **settings))[1],
    )
    methods = [
        {"name": "fisher", "widths": {"*": 8}, "lmbda": 0.02},
        {"name": "slimmable", "widths": [1.0, 0.5], "round_to": 1},
    ]
    page = run(content | {"qualities": [1], "control": False, "methods": methods}, tmp_path)
    assert given == [0.02, 0.02, 0.0018, 0.0018]
    rows = list(csv.DictReader((page.parent / "table.csv").read_text().splitlines()))
    assert [(r["label"], r["width"], float(r["lmbda"])) for r in rows[1:]] == [
        ("fisher", "", 0.02),
        ("slimmable", "0", 0.0018),
        ("slimmable", "1", 0.0018),
    ]
    assert float(rows[3]["macs"]) < float(rows[2]["macs"]) == float(rows[0]["macs"])
    assert int(rows[3]["decode_peak_bytes"]) < int(rows[2]["decode_peak_bytes"])


@pytest.mark.usefixtures("undrawn")
def test_a_small_codec_is_trained_from_scratch_too(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nicprune.experiments.run as module

    real, told = module.fit, []
    monkeypatch.setattr(
        module,
        "fit",
        lambda model, *a, **s: (told.append((s["steps"], s.get("lr"))), real(model, *a, **s))[1],
    )
    methods = [
        {"name": "magnitude", "label": "small", "budget": {"macs": 0.5}, "round_to": 1},
        {"scratch": "small"},
        {"scratch": "small", "label": "longer", "seeds": [1], "phase": {"steps": 9, "lr": 0.002}},
    ]
    page = run(
        content | {"qualities": [1], "seeds": [0, 1], "control": False, "methods": methods},
        tmp_path,
    )
    table = list(csv.DictReader((page.parent / "table.csv").read_text().splitlines()))
    shown = [(r["label"], r["method"], r["seed"], r["steps"]) for r in table[1:]]
    assert shown == [
        ("longer", "scratch", "1", "9"),
        ("small", "magnitude", "0", "5"),
        ("small", "magnitude", "1", "5"),
        ("small from scratch", "scratch", "0", "5"),
        ("small from scratch", "scratch", "1", "5"),
    ]
    by = {(r["label"], r["seed"]): r for r in table}
    for seed in "01":
        assert (
            by["small", seed]["macs"] == by["small from scratch", seed]["macs"]
            and by["small", seed]["params"] == by["small from scratch", seed]["params"]
        )
        assert (
            by["small", seed]["flop_reduction"] == by["small from scratch", seed]["flop_reduction"]
        )
    assert by["small from scratch", "0"]["psnr_db"] != by["small from scratch", "1"]["psnr_db"], (
        "seeds draw different weights"
    )
    assert (9, 0.002) in told
    again: list[str] = []
    run(
        content | {"qualities": [1], "seeds": [0, 1], "control": False, "methods": methods},
        tmp_path,
        again,
    )
    assert sum("done before" in line for line in again) == 6
    # What the small codec is has changed: so has what is trained in its image.
    methods[0]["budget"] = {"macs": 0.6}
    plans = [
        job.key
        for job in plan_runs(
            parse_recipe(content | {"methods": methods, "seeds": [0, 1]}, "x"), tmp_path
        )
        if job.arm.scratch
    ]
    methods[0]["budget"] = {"macs": 0.5}
    assert not set(plans) & {
        job.key
        for job in plan_runs(
            parse_recipe(content | {"methods": methods, "seeds": [0, 1]}, "x"), tmp_path
        )
    }


@pytest.mark.parametrize(
    ("match", "arm"),
    [
        ("ends with one small codec", {"scratch": "gated"}),
        ("ends with one small codec", {"scratch": "ladder"}),
        ("an arm before it", {"scratch": "later"}),
        ("an arm before it", {"scratch": "from nowhere", "label": "later"}),
        ("is not run with seed 1", {"scratch": "once"}),
        ("not all among the recipe's", {"name": "none", "label": "x", "seeds": [7]}),
        ("not all among the recipe's", {"name": "none", "label": "x", "qualities": [7]}),
        ("is not run with quality 2", {"scratch": "once", "seeds": [0]}),
        (
            "one codec serves all qualities",
            {"name": "slimmable", "widths": [1.0, 0.5], "label": "x", "qualities": [1]},
        ),
        ("steps", {"label": "x", "stack": [{"name": "none"}], "phase": {"steps": -3}}),
        ("unknown key", {"scratch": "once", "steps": 3}),
        (
            "an arm from scratch has one phase",
            {"scratch": "once", "seeds": [0], "qualities": [1], "sparsify": {"steps": 3}},
        ),
        ("steps", {"name": "none", "label": "x", "sparsify": {"steps": -3}}),
        (
            "methods.1: adaptation and fisher do not go together",
            {
                "label": "x",
                "stack": [
                    {"name": "adaptation", "grow": 0.5},
                    {"name": "fisher", "budget": {"macs": 1.3}},  # above 1, as beside mask_decay
                ],
            },
        ),
    ],
)
def test_arms_that_make_no_sense_are_one_clear_line(
    content: dict[str, Any], match: str, arm: dict[str, Any]
) -> None:
    once = {"name": "magnitude", "label": "once", "budget": {"macs": 0.5}}
    methods = [once | {"seeds": [0], "qualities": [1]}, arm]
    if arm.get("scratch") == "gated":
        methods.insert(0, {"name": "channel_gating", "label": "gated", "budget": {"macs": 0.5}})
    if arm.get("scratch") == "ladder":
        methods.insert(
            0, {"name": "scalable_encoder", "label": "ladder", "encoders": 2, "share": 0.3}
        )
    with pytest.raises(RecipeError, match=match) as error:
        parse_recipe(
            content | {"methods": methods, "seeds": [0, 1], "sparsify": {"steps": 20}}, "x"
        )
    assert "\n" not in str(error.value)


def test_an_arm_runs_at_its_own_qualities(content: dict[str, Any], tmp_path: Path) -> None:
    arms = [{"name": "magnitude", "label": n, "budget": {"macs": 0.5}} for n in ("all", "one")]
    both = content | {"qualities": [1, 2], "control": False, "methods": arms}
    fewer = both | {"methods": [arms[0], arms[1] | {"qualities": [2]}]}
    listed = [plan_runs(parse_recipe(recipe, "x"), tmp_path) for recipe in (both, fewer)]
    where = [{(job.arm.label, job.quality) for job in jobs} for jobs in listed]
    assert where[0] - where[1] == {("one", 1)}
    assert {job.key for job in listed[1]} < {job.key for job in listed[0]}, "the same runs"
    written = tmp_path / "own.yaml"
    written.write_text(yaml.safe_dump(fewer), encoding="utf-8")
    for asked, labels in (("1", {"original", "all"}), ("2", {"original", "all", "one"})):
        first = plan_runs(read_recipe(str(written), [f"qualities=[{asked}]"])[0], tmp_path)
        assert {job.arm.label for job in first} == labels
    written.write_text(yaml.safe_dump(fewer | {"methods": arms[::-1]}), encoding="utf-8")
    content = yaml.safe_load(written.read_text())
    content["methods"][0]["qualities"] = [2]
    written.write_text(yaml.safe_dump(content), encoding="utf-8")
    given = ["qualities=[1]", "methods.1.budget.macs=0.3"]
    for overrides in (given, given[::-1]):  # a position is that of the file
        (arm,) = read_recipe(str(written), overrides)[0].methods
        assert (arm.label, arm.stack[0].settings["budget"]) == ("all", {"macs": 0.3})


@pytest.mark.parametrize(
    ("lambdas", "rates"),
    [
        ("{1: 1e-3, 2: 7e-3}", [0.001, 0.007]),
        ("{1: 3e-3, 2: 1e-2}", [0.003, 0.01]),
        ("{1: 1e-3}", [0.001, 0.0035]),
    ],
)
def test_rates_of_a_modulator_are_numbers(
    content: dict[str, Any], lambdas: str, rates: list[float]
) -> None:
    """YAML reads 1e-3 as text."""
    arm = {"name": "bit_rate_modulator"}
    given = content | {"qualities": [1, 2], "lambdas": yaml.safe_load(lambdas), "methods": [arm]}
    (parsed,) = parse_recipe(given, "x").methods
    assert parsed.stack[0].settings["lambdas"] == rates
    with pytest.raises(RecipeError, match="lambdas: could not convert"):
        parse_recipe(given | {"lambdas": {1: "much"}}, "x")


@pytest.mark.usefixtures("undrawn")
def test_photographs_that_may_not_be_shown_are_not(content: dict[str, Any], tmp_path: Path) -> None:
    content["photographs"]["crops"] = False
    content |= {"qualities": [1], "control": False, "methods": content["methods"][1:]}
    run(content, tmp_path)
    assert not list(tmp_path.rglob("crops"))


@pytest.mark.usefixtures("undrawn")
def test_an_arm_may_be_tuned_longer(content: dict[str, Any], tmp_path: Path) -> None:
    methods = [{"name": "magnitude", "label": "short", "budget": {"macs": 0.5}, "round_to": 1}]
    methods.append({**methods[0], "label": "long", "phase": {"steps": 6, "lr": 0.001}})
    page = run(content | {"qualities": [1], "control": False, "methods": methods}, tmp_path)
    table = {
        r["label"]: r for r in csv.DictReader((page.parent / "table.csv").read_text().splitlines())
    }
    assert (table["short"]["steps"], table["long"]["steps"]) == ("5", "9") and table["short"][
        "psnr_db"
    ] != table["long"]["psnr_db"]
    lines = plan(parse_recipe(content | {"qualities": [1], "methods": methods}, "x"))
    assert [line.split(": ")[1].split(",")[0] for line in lines][2:] == ["5 steps", "9 steps"]


@pytest.mark.usefixtures("undrawn")
def test_what_teaches_goes_on_in_fine_tuning(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nicprune.experiments.run as module

    real, attached = module.fit, []
    monkeypatch.setattr(
        module,
        "fit",
        lambda model, *a, **s: (
            attached.append([m.name for m in getattr(model, "methods", [])]),
            real(model, *a, **s),
        )[1],
    )
    stack = [
        {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1, "side": None},
        {"name": "distillation", "output": 0.1, "features": 1.0},
    ]
    methods = [
        {"label": "taught", "stack": stack},
        {
            "label": "at once",
            "stack": [{"name": "magnitude", "budget": {"macs": 0.5}, "round_to": 1}, stack[1]],
        },
        {
            "name": "mask_decay",
            "label": "encoder",
            "budget": {"encoder": 0.8},
            "side": "encoder",
            "round_to": 1,
        },
    ]
    page = run(content | {"qualities": [1], "control": False, "methods": methods}, tmp_path)
    assert attached == [
        ["mask_decay", "distillation"],
        ["distillation"],
        ["distillation"],
        ["distillation"],
        ["mask_decay"],
        [],
    ]
    codecs = {
        p.name.split("-q1-")[1]: load(p) for p in (page.parent / "codecs").glob("*.safetensors")
    }
    assert all(not hasattr(codec, "methods") for codec in codecs.values())
    original = built("bmshj2018-hyperprior")[0]
    before = {k: v for k, v in original.named_parameters() if k.split(".")[0] not in ("g_a", "h_a")}
    after = dict(codecs["encoder.safetensors"].named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items()), (
        "in fine-tuning the decoder is left alone, too"
    )


@pytest.mark.usefixtures("undrawn")
def test_every_level_of_an_encoder_is_a_curve(content: dict[str, Any], tmp_path: Path) -> None:
    methods = [
        {"name": "scalable_encoder", "label": "ladder", "encoders": 2, "share": 0.3, "round_to": 1}
    ]
    content |= {
        "qualities": [1, 2],
        "control": False,
        "methods": methods,
        "sparsify": {"steps": 8},
        "finetune": {"steps": 1},
    }
    page = run(content, tmp_path)
    rows = [
        r
        for r in csv.DictReader((page.parent / "table.csv").read_text().splitlines())
        if r["role"] == "pruned"
    ]
    assert [(r["quality"], r["label"]) for r in rows] == [
        (q, f"ladder, {level}") for q in "12" for level in ("best level", "level 0", "level 1")
    ]
    cost = {r["label"]: float(r["kmac_per_pixel_encoder"]) for r in rows}
    assert (
        cost["ladder, level 0"] < cost["ladder, level 1"] < cost["ladder, best level"]
        and len({r["kmac_per_pixel_decoder"] for r in rows}) == 1
    )
    again: list[str] = []
    run(content, tmp_path, again)
    assert sum("done before" in line for line in again) == 4


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_keeps_the_times_that_its_budget_was_met_by(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are measured for the check and the run; a run that is interrupted goes on with its own,
    though the machine measures others by then.
    """
    from nicprune.experiments import times
    from nicprune.pruning.latency_table import LatencyTable
    from nicprune.runtime import latency_refinement

    content |= {"qualities": [1], "control": False, "latency": {"size": [64, 64], "threads": 1}}
    for method in content["methods"]:
        method["budget"] = {"decode_s": 0.8}
    recipe = parse_recipe(content, "test")
    asked: list[dict[str, Any]] = []

    def made_up(codec: nn.Module, **runtime: Any) -> LatencyTable:
        """Another table each time that it is asked, as of a machine that others use."""
        asked.append(runtime)
        first = table_of(codec)
        layers = {
            name: t.model_copy(
                update={
                    "seconds": [
                        [len(asked) + o + 0.1 * i + o * i for i in t.inputs] for o in t.outputs
                    ]
                }
            )
            for name, t in first.layers.items()
        }
        parts = {
            name: t.model_copy(update={"seconds": [9.0, *[4.0] * (len(t.seconds) - 1)]})
            for name, t in first.parts.items()
        }
        rest = {"encode_s": 0.1, "decode_s": 0.1}
        return first.model_copy(update={"layers": layers, "parts": parts, "rest": rest})

    monkeypatch.setattr(times, "measure_latency", made_up)
    monkeypatch.setattr(
        latency_refinement,
        "seconds_of_parts",
        lambda codecs, table: [dict.fromkeys(table.parts, s) for s in (2.0, 1.0)],
    )
    whole = run(content, tmp_path / "whole").parent / "records.json"
    assert asked[0] == {
        "backend": "torch", "precision": "float32", "size": (64, 64), "threads": 1
    }  # fmt: skip

    import nicprune.experiments.run as running

    fit, left = running.fit, [2]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(running, "fit", interrupted)
    tables = tmp_path / "whole" / "runs" / "tiny" / "q1"
    copied = tmp_path / "cut" / "runs" / "tiny" / "q1"
    for job in plan_runs(recipe, tmp_path / "whole" / "runs"):
        if job.arm.timed:  # as the first run has measured them
            (copied / job.folder.name).mkdir(parents=True)
            (copied / job.folder.name / times.FILE).write_bytes(
                (tables / job.folder.name / times.FILE).read_bytes()
            )
    with pytest.raises(KeyboardInterrupt):
        run(content, tmp_path / "cut")
    left[0], before = 100, len(asked)
    resumed = run(content, tmp_path / "cut").parent / "records.json"
    assert len(asked) == before, "nothing is measured anew"
    found = [
        [(r["label"], r["widths"], r["bpp"], r["psnr_db"]) for r in json.loads(p.read_text())]
        for p in (whole, resumed)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency": {"backend": "torch"}}, "no budget of a method limits encode_s or decode_s"),
        ({"latency": {"engine": "torch"}}, "engine"),
    ],
)
def test_a_runtime_without_a_budget_of_time_is_refused(
    content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content | change, "test")


def test_times_belong_to_the_keys_of_the_runs_that_they_limit(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """And to no others, so that what is done stays done."""

    def keys(**runtime: Any) -> list[str]:
        content["methods"][0]["budget"] = {"decode_s": 0.8}
        given = content | ({"latency": runtime} if runtime else {})
        return [job.key for job in plan_runs(parse_recipe(given, "test"), tmp_path)]

    usual, other = keys(), keys(backend="openvino")
    assert keys(backend="torch") == usual
    differing = [
        number for number, pair in enumerate(zip(usual, other, strict=True)) if len({*pair}) == 2
    ]
    assert differing == [2, 6], "mask decay at both qualities"


def test_an_arm_may_have_both_phases_of_its_own(content: dict[str, Any], tmp_path: Path) -> None:
    decay = {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1}
    longer = {"sparsify": {"steps": 4, "lr": 1e-4}, "phase": {"steps": 1}}
    arms = [decay | {"label": "as all"}, decay | longer | {"label": "longer"}]
    recipe = content | {"qualities": [1], "methods": arms}
    parsed = parse_recipe(recipe, "x")
    decay_steps = [arm.stack[0].settings["decay_steps"] for arm in parsed.methods]
    assert decay_steps == [3, 4], "a method that learns does so in the phase of its arm"
    page = run(recipe, tmp_path)
    lines = (page.parent / "table.csv").read_text().splitlines()
    table = {row["label"]: row["steps"] for row in csv.DictReader(lines)}
    assert table == {"original": "0", "control": "5", "as all": "5", "longer": "5"}
    # What an arm does not say is no part of its key, and what it says is.
    keys = [
        {job.arm.label: job.key for job in plan_runs(parse_recipe(one, "x"), tmp_path)}
        for one in (recipe, recipe | {"methods": [arms[0], arms[1] | {"sparsify": {"steps": 6}}]})
    ]
    assert [label for label in keys[0] if keys[0][label] != keys[1][label]] == ["longer"]


def test_a_phase_of_an_arm_is_as_long_as_its_method_learns(content: dict[str, Any]) -> None:
    decay = {"name": "mask_decay", "budget": {"macs": 0.5}, "decay_steps": 3}
    arm = decay | {"sparsify": {"steps": 2}}
    with pytest.raises(RecipeError, match="decay_steps 3 does not fit into sparsify.steps 2"):
        parse_recipe(content | {"methods": [arm]}, "x")


@pytest.mark.usefixtures("undrawn")
def test_frames_that_a_recipe_does_not_measure_are_said(
    content: dict[str, Any], tmp_path: Path
) -> None:
    model = {"name": "temporal_entropy_model", "clips": "photographs", "frames": 2, "span": 2}
    content |= {"qualities": [1], "methods": [model | {"strides": [1]}]}
    content["finetune"] = {"steps": 0}
    said: list[str] = []
    run(content, tmp_path, said)
    assert "P frames, is measured by `nicprune eval-video" in said[-1]
    content |= {"name": "other", "methods": [{"name": "none", "label": "none"}]}
    run(content, tmp_path, said)
    assert "P frames" not in said[-1]
