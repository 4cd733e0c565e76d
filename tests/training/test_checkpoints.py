"""Checkpoints: damage is found, and the previous generation takes the place of a damaged one."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built, same_state, state_of
from torch import nn

from nicprune.common.errors import FileError, RecipeError
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.training.checkpoints import NEWEST, PREVIOUS, Checkpoints, remove_checkpoints
from nicprune.training.loop import fit

STATE = {"step": 3, "model": {"w": torch.arange(3000.0)}}


def flip_a_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero_a_block(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    block = bytes(len(data[start : start + 512]))
    if data[start : start + 512] == block:
        block = bytes([1]) + block[1:]
    data[start : start + 512] = block


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Two generations, of the steps 2 and 3."""
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 3):
        checkpoints.save({**STATE, "step": step})
    return checkpoints


def damage(path: Path, how: Callable[[bytearray, random.Random], None], seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    how(data, random.Random(seed))
    path.write_bytes(data)


@pytest.mark.parametrize("how", [flip_a_bit, zero_a_block, cut])
def test_damage_anywhere_is_found(
    two: Checkpoints, how: Callable[[bytearray, random.Random], None]
) -> None:
    whole = two.newest.read_bytes()
    for seed in range(60):
        two.newest.write_bytes(whole)
        damage(two.newest, how, seed)
        with pytest.warns(UserWarning, match="resuming from checkpoint.previous.pt") as caught:
            found = Checkpoints(two.newest.parent).load()
        assert found is not None and found[0]["step"] == 2
        assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_damaged_one_does_not_replace_the_previous_one(two: Checkpoints) -> None:
    damage(two.newest, flip_a_bit)
    again = Checkpoints(two.newest.parent)
    with pytest.warns(UserWarning, match="is damaged"):
        again.load()
    again.save({**STATE, "step": 4})
    for path, step in ((two.newest, 4), (two.previous, 2)):
        assert torch.load(path, weights_only=True)["step"] == step
    again.save({**STATE, "step": 5})
    assert torch.load(two.previous, weights_only=True)["step"] == 4


def test_killed_between_the_renames(two: Checkpoints) -> None:
    two.newest.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Checkpoints(two.newest.parent).load()
    assert found is not None and found[0]["step"] == 2


def test_both_damaged_is_one_line_that_names_both(two: Checkpoints) -> None:
    damage(two.newest, flip_a_bit)
    damage(two.previous, cut)
    with pytest.raises(FileError, match="remove .*checkpoint.pt and .*previous.pt") as caught:
        Checkpoints(two.newest.parent).load()
    assert "\n" not in str(caught.value)
    remove_checkpoints(two.newest.parent)
    assert Checkpoints(two.newest.parent).load() is None


def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / NEWEST)
    with pytest.raises(FileError, match="earlier version"):
        Checkpoints(tmp_path).load()


QUICK = {
    "batch_size": 1,
    "patch_size": 64,
    "lmbda": 0.01,
    "precision": "32",
    "progress": False,
    "checkpoint_every": 2,
}


def codec() -> nn.Module:
    return built("bmshj2018-hyperprior")[0]


def test_training_resumes_from_the_previous_one_to_the_same_bits(tmp_path: Path) -> None:
    photo = write_png(torch.rand(3, 96, 96), tmp_path / "a.png")
    whole, parts = codec(), codec()
    fit(whole, photo, steps=6, **QUICK, folder=tmp_path / "whole")
    run = tmp_path / "run"
    fit(parts, photo, steps=6, **QUICK, folder=run)
    assert torch.load(run / PREVIOUS, weights_only=True)["step"] == 4
    damage(run / NEWEST, flip_a_bit)
    parts = codec()
    with pytest.warns(UserWarning, match="resuming from checkpoint.previous.pt, step 4"):
        fit(parts, photo, steps=6, **QUICK, folder=run)
    assert same_state(state_of(whole), state_of(parts))


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    photo = write_png(torch.rand(3, 96, 96), tmp_path / "a.png")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fit(codec(), photo, steps=2, **QUICK, folder=tmp_path / "run")
        torch.set_num_threads(2)
        with pytest.warns(UserWarning, match="resuming with 2 threads what 1 began"):
            fit(codec(), photo, steps=2, **QUICK, folder=tmp_path / "run")
    finally:
        torch.set_num_threads(before)


def test_an_exchanged_photograph_is_another_run(tmp_path: Path) -> None:
    from nicprune.common.errors import RecipeError

    photo = tmp_path / "a.bmp"
    from PIL import Image

    Image.new("RGB", (96, 96), (10, 20, 30)).save(photo)
    fit(codec(), photo, steps=2, **QUICK, folder=tmp_path / "run")
    size = photo.stat().st_size
    Image.new("RGB", (96, 96), (10, 20, 31)).save(photo)
    assert photo.stat().st_size == size
    with pytest.raises(RecipeError, match="images differ"):
        fit(codec(), photo, steps=2, **QUICK, folder=tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="asks the system as Linux does")
@pytest.mark.parametrize("limit", [1000, 10_000])
def test_a_disk_that_is_full_is_told_as_such(two: Checkpoints, limit: int) -> None:
    """torch.save speaks of an unexpected position instead. A limit of a file's size stands for the
    end of the disk.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = two.newest.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(FileError, match=r"cannot write .*checkpoint.pt: File too large$"):
            two.save({**STATE, "step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert two.newest.read_bytes() == whole and len(list(two.newest.parent.iterdir())) == 2


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda state: state.pop("step"),
    "a step in words": lambda state: state.update(step="three"),
    "settings": lambda state: state.update(settings="{"),
    "no identity": lambda state: state.pop("identity"),
    "an identity in words": lambda state: state.update(identity="mine"),
    "a number of an identity": lambda state: state.update(identity=3),
    "a deep identity": lambda state: state.update(identity="[" * 99999),
    "skipped": lambda state: state.update(skipped=[1]),
    "a layer less": lambda state: state["model"].pop("g_a.0.weight"),
    "an optimizer in words": lambda state: state.update(optimizer="adam"),
    "a group of parameters": lambda state: state["optimizer"]["param_groups"].insert(0, "a"),
    "the state of a parameter": lambda state: state["optimizer"]["state"].update({0: 0}),
    "a step of a parameter": lambda state: state["optimizer"]["state"][0].update(step={1: 1}),
}


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_what_somebody_else_sealed_is_one_line(kind: str, tmp_path: Path) -> None:
    photo = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    settings = QUICK | {"checkpoint_every": 1}
    fit(codec(), photo, steps=1, **settings, folder=tmp_path / "run")
    state = torch.load(tmp_path / "run" / NEWEST, weights_only=True)
    FOREIGN[kind](state)
    remove_checkpoints(tmp_path / "run")
    Checkpoints(tmp_path / "run").save(state)
    model = codec()
    with torch.no_grad():
        model.g_a[0].weight.add_(1)
    before = state_of(model)
    with pytest.raises(FileError) as told:
        fit(model, photo, steps=1, **settings, folder=tmp_path / "run")
    assert "\n" not in str(told.value) and "emove" in str(told.value)
    assert same_state(before, state_of(model))


def test_settings_of_a_method_may_have_another_order(tmp_path: Path) -> None:
    """As where a class of settings was divided between the run and its resumption."""
    photo = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    settings = QUICK | {"checkpoint_every": 1, "folder": tmp_path / "run"}

    def pruned(steps: int, commit: float = 0.7) -> Any:
        attached = attach(codec(), "mask_decay", budget={"macs": 0.5}, round_to=1, decay_steps=2,
                          commit=commit)  # fmt: skip
        fit(attached, photo, steps=steps, **settings)
        return attached

    whole = pruned(2)
    state = torch.load(tmp_path / "run" / NEWEST, weights_only=True)
    identity = json.loads(state["identity"])
    identity[2][0][1] = dict(reversed(identity[2][0][1].items()))
    assert json.dumps(identity) != state["identity"]
    remove_checkpoints(tmp_path / "run")
    Checkpoints(tmp_path / "run").save(state | {"identity": json.dumps(identity)})
    assert same_state(state_of(whole), state_of(pruned(2)))
    with pytest.raises(RecipeError, match="belongs to another run"):
        pruned(2, commit=0.6)


def test_a_damaged_log_does_not_stop_a_run(tmp_path: Path) -> None:
    photo = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    settings = QUICK | {"log_every": 1}
    fit(codec(), photo, steps=2, **settings, folder=tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    first, second = log.read_bytes().splitlines(keepends=True)
    for bad in (b"\xff\xfe\n", b'{"step": 1, "a": "\xe9"}\n', b'{"step": 1e999}\n', b"[" * 9999):
        log.write_bytes(first + second + bad)
        fit(codec(), photo, steps=2, **settings, folder=tmp_path / "run")
        assert log.read_bytes() == first + second
