"""Training: exact resumption even after kill -9, non-finite steps, processes, and loops of the
user's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import elsewhere
import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import TESTS, built, same_state, state_of
from torch import nn

from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import FileError, RecipeError, TrainingError
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.storage.named import load_codec
from nicprune.training.loop import fit
from nicprune.training.optimizers import OPTIMIZERS
from nicprune.training.run import TrainingRun
from nicprune.training.settings import TrainSettings, learning_rate

QUICK = {
    "batch_size": 2,
    "patch_size": 64,
    "lr": 1e-3,
    "lmbda": 0.01,
    "precision": "32",
    "progress": False,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three smooth pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(i))
        write_png(
            nn.functional.interpolate(small, size=(96, 112), mode="bicubic")[0], folder / f"{i}.png"
        )
    return folder


def codec() -> nn.Module:
    return built("bmshj2018-hyperprior")[0]


@pytest.mark.parametrize("density_lr", [None, 1e-2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_bit_equal(
    photos: Path, tmp_path: Path, optimizer: str, density_lr: float | None
) -> None:
    whole, parts = codec(), codec()
    quick = {**QUICK, "optimizer": optimizer, "density_lr": density_lr}
    fit(whole, photos, steps=8, folder=tmp_path / "whole", **quick)
    with pytest.raises(
        TrainingError, match="interrupted at step 5 of 8; run again to continue from step 4"
    ):
        interrupted = _Interrupting(parts, at=5)
        fit(interrupted, photos, steps=8, folder=tmp_path / "parts", checkpoint_every=2, **quick)
    resumed = codec()
    fit(resumed, photos, steps=8, folder=tmp_path / "parts", checkpoint_every=2, **quick)
    assert same_state(state_of(whole), state_of(resumed))
    logged = [
        [json.loads(line) for line in (tmp_path / p / "metrics.jsonl").read_text().splitlines()]
        for p in ("whole", "parts")
    ]
    assert [r["step"] for r in logged[1]] == list(range(1, 9))
    assert [r["loss"] for r in logged[0]] == [r["loss"] for r in logged[1]]


def test_densities_have_a_learning_rate_of_their_own(photos: Path) -> None:
    """Adam's first step is as long as its learning rate, whatever the gradient."""
    moved = {}
    for density_lr in (None, 1e-4, 1e-2):
        one = codec()
        before = state_of(one)
        settings = {**QUICK, "optimizer": "adam", "schedule": "constant", "lr": 1e-3}
        fit(one, photos, steps=1, density_lr=density_lr, **settings)
        moved[density_lr] = {
            name: float((value.detach() - before[name]).abs().max())
            for name, value in one.named_parameters()
        }
    for name in moved[None]:
        density = name.startswith("entropy_bottleneck.") and not name.endswith("quantiles")
        for density_lr in (1e-4, 1e-2):
            factor = density_lr / 1e-3 if density else 1
            assert moved[density_lr][name] == pytest.approx(
                factor * moved[None][name], rel=0.02, abs=2e-7
            )


@pytest.mark.parametrize(("quality", "metric", "settings", "expected"), [
    (1, "mse", {}, (0.0018, "mse")),
    (4, "ms-ssim", {}, (16.64, "ms-ssim")),
    (4, "ms-ssim", {"metric": "mse"}, (0.013, "mse")),
    (1, "mse", {"lmbda": 0.02}, (0.02, "mse")),
    (None, "mse", {}, (0.0067, "mse")),
    (9, "mse", {}, (0.0067, "mse")),
])  # fmt: skip
def test_a_codec_is_trained_for_its_own_rate(
    monkeypatch: pytest.MonkeyPatch,
    quality: int | None,
    metric: str,
    settings: dict[str, object],
    expected: tuple[float, str],
) -> None:
    asked = []
    monkeypatch.setattr(
        "nicprune.training.run.rate_distortion_loss",
        lambda *wanted: asked.append(wanted) or rate_distortion_loss(*wanted),
    )
    model = codec()
    provenance(model).quality, provenance(model).metric = quality, metric
    quick = {key: value for key, value in QUICK.items() if key != "lmbda"} | {
        "patch_size": 192,
        "batch_size": 1,
    }
    fit(model, "samples", steps=0, **quick, **settings)  # type: ignore[arg-type]
    assert asked == [expected]


class _Interrupting(ScaleHyperprior):
    """Ctrl-C in the middle of a step."""

    def __new__(cls, inner: nn.Module, at: int) -> nn.Module:
        calls = iter(range(at))

        def hook(module: nn.Module, args: object) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        inner.g_a.register_forward_pre_hook(hook)
        return inner


def test_tables_of_another_size_do_not_stand_in_the_way(photos: Path, tmp_path: Path) -> None:
    fit(codec(), photos, steps=2, folder=tmp_path, **QUICK)
    updated = codec()
    updated.update(force=True)
    assert fit(updated, photos, steps=2, folder=tmp_path, **QUICK).step == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_of_mask_decay_is_bit_equal(photos: Path, tmp_path: Path, optimizer: str) -> None:
    settings = {"budget": {"macs": 0.5}, "round_to": 1, "decay_steps": 8}
    whole = attach(codec(), "mask_decay", **settings)
    fit(whole, photos, steps=8, optimizer=optimizer, **QUICK)
    first = attach(codec(), "mask_decay", **settings)
    first.codec.g_a.register_forward_pre_hook(_stop_after(6))
    with pytest.raises(TrainingError, match="interrupted"):
        fit(
            first,
            photos,
            steps=8,
            folder=tmp_path,
            checkpoint_every=3,
            optimizer=optimizer,
            **QUICK,
        )
    resumed = attach(codec(), "mask_decay", **settings)
    fit(resumed, photos, steps=8, folder=tmp_path, checkpoint_every=3, optimizer=optimizer, **QUICK)
    assert same_state(state_of(whole), state_of(resumed)) and whole.keep() == resumed.keep()


def _stop_after(calls: int):  # type: ignore[no-untyped-def]
    count = iter(range(calls))

    def hook(module: nn.Module, args: object) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt

    return hook


SCRIPT = """
import torch
from helpers import built
from nicprune.methods import attach
from nicprune.training.loop import fit
codec = built("bmshj2018-hyperprior")[0]
model = attach(codec, "mask_decay", budget={{"macs": 0.5}}, round_to=1, decay_steps=40)
fit(
    model, {photos!r}, steps={steps}, folder={folder!r}, checkpoint_every=5,
    optimizer={optimizer!r}, batch_size=2, patch_size=64, lr=1e-3, precision="32", progress=False,
)
torch.save(model.state_dict(), {out!r})
"""


def _script(out: Path, photos: Path, folder: Path, steps: int, optimizer: str) -> str:
    return SCRIPT.format(
        photos=str(photos), folder=str(folder), steps=steps, out=str(out), optimizer=optimizer
    )


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "soap"])
def test_kill_9_and_resume_equals_the_uninterrupted_run(
    photos: Path, tmp_path: Path, optimizer: str
) -> None:
    steps = 40
    script = _script(tmp_path / "killed.pt", photos, tmp_path / "run", steps, optimizer)
    killed = elsewhere.start(script)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and killed.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < steps, (
        "the run was meant to be killed between its first checkpoint and its end"
    )
    resumed = elsewhere.run(script)
    assert resumed.returncode == 0, resumed.stderr[-800:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(_script(tmp_path / "whole.pt", photos, tmp_path / "other", steps, optimizer), {})
    finally:  # in this process: nothing kills it
        torch.set_num_threads(threads)
    ends = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("killed", "whole")]
    assert same_state(*ends)
    assert not list((tmp_path / "run").glob(".checkpoint*")), "no half-written file is left"


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from helpers import same_state, state_of
from nicprune.common.errors import InterruptedRun
from nicprune.training.loop import fit
from nicprune.training.run import TrainingRun
from test_training import QUICK, codec

photos, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was begun with
whole, parts = codec(), codec()
quick = {**QUICK, "steps": 4}
fit(whole, photos, **quick)
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
advance = TrainingRun.advance

def step(run, batch):
    if run.step == 1:
        os.kill(os.getpid(), number)
    return advance(run, batch)

TrainingRun.advance = step
try:
    fit(parts, photos, folder=folder, **quick)
except InterruptedRun as error:
    assert str(error) == "interrupted at step 2 of 4; run again to continue from step 2"
    assert error.exit_status == 128 + number
else:
    raise AssertionError("it was not interrupted")
TrainingRun.advance = advance
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
parts = codec()
fit(parts, photos, folder=folder, **quick)
assert same_state(state_of(whole), state_of(parts))
print("resumed")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_leaves(
    photos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """In a process of its own, whose handlers nothing else has set."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = elsewhere.run(path + SIGNALLED, str(photos), str(tmp_path), str(int(number)))
    assert (done.returncode, done.stdout) == (0, "resumed\n"), done.stderr[-1500:]


def test_a_second_run_of_a_folder_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TrainingRun.advance
    refused: list[str] = []

    def step(run: TrainingRun, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if not refused:
            with pytest.raises(FileError, match="is in use by process") as caught:
                fit(codec(), photos, steps=2, folder=tmp_path, **QUICK)
            refused.append(str(caught.value))
        return advance(run, batch)

    monkeypatch.setattr(TrainingRun, "advance", step)
    fit(codec(), photos, steps=2, folder=tmp_path, **QUICK)
    assert len(refused) == 1 and "\n" not in refused[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "run.lock").exists()


TWO = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from helpers import built
from nicprune.methods import attach
from nicprune.training.loop import fit
codec = built("bmshj2018-hyperprior")[0]
model = attach(codec, "mask_decay", budget={{"macs": 0.5}}, round_to=1, decay_steps=6)
fit(
    model, {photos!r}, steps=6, devices=2, accelerator="cpu", optimizer={optimizer!r},
    batch_size=2, patch_size=64, lr=1e-3, precision="32", progress=False,
)
import os
torch.save({{**model.state_dict(), "x": torch.zeros(())}}, {out!r} + os.environ["LOCAL_RANK"])
assert model.harden() is not None
"""


@pytest.mark.parametrize("by_torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_stay_in_step(photos: Path, tmp_path: Path, by_torchrun: bool) -> None:
    script = TWO.format(
        tests=str(TESTS), photos=str(photos), out=str(tmp_path / "rank"), optimizer="soap"
    )
    if by_torchrun:
        file = tmp_path / "two.py"
        file.write_text(script)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            + [str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        started = []
        for rank in ("0", "1"):
            told = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            first = f"import os; os.environ.update({told!r})\n"
            started.append(elsewhere.start(first + script, err=str(tmp_path / f"error{rank}")))
        for rank, process in enumerate(started):
            process.join()
            assert process.exitcode == 0, (tmp_path / f"error{rank}").read_text()[-2000:]
    assert same_state(*(torch.load(tmp_path / f"rank{r}", weights_only=True) for r in (0, 1)))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_soap_leaves_the_other_side_as_it_is(photos: Path, side: str) -> None:
    model = codec()
    before = state_of(model)
    fit(model, photos, steps=4, optimizer="soap", side=side, **QUICK)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    own = {"encoder": ("g_a.", "h_a."), "decoder": ("g_s.",)}[side]
    assert moved and all(name.startswith(own) for name in moved)


@pytest.mark.parametrize("anew", [True, False], ids=["another object", "the same object"])
@pytest.mark.parametrize(("method", "settings"), [
    ("slimmable", {"widths": [1.0, 0.5], "round_to": 1}),
    ("mask_decay", {"budget": {"macs": 0.7}, "round_to": 1, "decay_steps": 3}),
    ("channel_gating", {"budget": {"macs": 0.7}, "gating_steps": 6}),
    ("channel_gating", {"budget": {"macs": 0.7}, "gating_steps": 3}),  # done when interrupted
    ("scalable_encoder", {"encoders": 2, "share": 0.3, "round_to": 1, "decay_steps": 8}),
    ("modulated_autoencoder", {"lambdas": [0.005, 0.01]}),
])  # fmt: skip
def test_soap_resumes_bit_equal_with_methods_that_change_what_learns(
    photos: Path, tmp_path: Path, method: str, settings: dict[str, object], anew: bool
) -> None:
    """Several widths in a step, gates, encoders that learn one after the other, parameters beside
    the codec's. In another process, and in the one that was interrupted.
    """

    def attached() -> nn.Module:
        torch.manual_seed(0)
        return attach(codec(), method, **settings)

    ends = []
    for stop in (None, 5):
        model = attached()
        options = {
            **QUICK,
            "lmbda": None if getattr(model, "own_lambdas", False) else 0.01,
            "steps": 8,
            "optimizer": "soap",
            "checkpoint_every": 4,
            "folder": tmp_path / f"{stop}",
        }
        if stop is not None:
            with (
                pytest.MonkeyPatch.context() as patch,
                pytest.raises(TrainingError, match="interrupted"),
            ):
                patch.setattr(TrainingRun, "advance", _interrupted_after(stop))
                fit(model, photos, **options)
            model = attached() if anew else model
        fit(model, photos, **options)
        ends.append(state_of(model))
    assert same_state(*ends)
    assert not same_state(ends[0], state_of(attached()))


def _interrupted_after(steps: int):  # type: ignore[no-untyped-def]
    advance, count = TrainingRun.advance, iter(range(steps))

    def step(run: TrainingRun, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return advance(run, batch)

    return step


def test_training_lowers_the_loss(photos: Path) -> None:
    torch.manual_seed(0)
    fresh = ScaleHyperprior(16, 24)
    losses = []
    for _ in range(2):
        losses.append(fit(fresh, photos, steps=25, **QUICK).metrics["loss"])
    assert losses[1] < losses[0]


def test_bf16_runs_entropy_models_in_float32(photos: Path) -> None:
    model, seen = codec(), []
    for entropy_model in (model.entropy_bottleneck, model.gaussian_conditional):
        entropy_model.register_forward_hook(
            lambda m, args, out: seen.append((args[0].dtype, out[1].dtype))
        )
    inside = []
    model.g_a[0].register_forward_hook(lambda m, args, out: inside.append(out.dtype))
    fit(model, photos, steps=2, **{**QUICK, "precision": "bf16"})
    assert set(seen) == {(torch.float32, torch.float32)} and set(inside) == {torch.bfloat16}
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 0, "no hook of the training stays"


def test_ms_ssim_loss(photos: Path, tmp_path: Path) -> None:
    write_png(torch.rand(3, 200, 200), tmp_path / "a.png")
    result = fit(
        codec(),
        tmp_path,
        steps=1,
        **{**QUICK, "metric": "ms-ssim", "patch_size": 192, "lmbda": 8.73},
    )
    assert 0 <= result.metrics["ms_ssim"] <= 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_that_diverges_is_named_as_such(photos: Path, optimizer: str) -> None:
    model = load_codec("demo-hyperprior", 1)
    with pytest.raises(TrainingError, match="training diverged: .* after step 12.*smaller lr") as e:
        fit(model, photos, steps=12, optimizer=optimizer, **QUICK | {"lr": 1e6})
    assert "\n" not in str(e.value) and "CDF tables" in str(e.value.__cause__)
    assert all(p.is_contiguous() for p in model.parameters()), "as it was given"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_non_finite_gradient_is_skipped_then_ends_the_run(photos: Path, optimizer: str) -> None:
    model = codec()
    poison = [False]

    def hook(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return out * float("nan") if poison[0] else out

    model.g_s[-1].register_forward_hook(hook)
    calls = iter([False, True, False])
    model.g_a.register_forward_pre_hook(lambda m, a: poison.__setitem__(0, next(calls, True)))
    result = fit(model, photos, steps=3, optimizer=optimizer, **QUICK)
    assert result.skipped == 1 and all(torch.isfinite(p).all() for p in model.parameters())
    before = state_of(model)
    with pytest.raises(TrainingError, match="not finite: 21 steps in a row.*try a lower lr"):
        fit(model, photos, steps=30, optimizer=optimizer, **QUICK)
    assert all(
        torch.equal(before[k], v)
        for k, v in model.state_dict().items()
        if "quantiles" not in k and k[0] != "_" and "cdf" not in k
    )


def test_checkpoint_of_another_run_is_refused(photos: Path, tmp_path: Path) -> None:
    fit(codec(), photos, steps=1, folder=tmp_path, **QUICK)
    with pytest.raises(RecipeError, match=r"other settings \(lmbda 0.01 there, 0.02 now\)"):
        fit(codec(), photos, steps=1, folder=tmp_path, **{**QUICK, "lmbda": 0.02})
    with pytest.raises(FileError, match="does not fit this model"):
        fit(ScaleHyperprior(8, 8), photos, steps=1, folder=tmp_path, **QUICK)
    with pytest.raises(RecipeError, match="codec, method or images differ"):
        fit(attach(codec(), "none"), photos, steps=1, folder=tmp_path, **QUICK)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(FileError, match="cannot read the checkpoint"):
        fit(codec(), photos, steps=1, folder=tmp_path, **QUICK)


def test_unwritable_folder_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"):
        fit(codec(), photos, steps=1, folder=tmp_path / "file" / "run", **QUICK)


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = torch.save, []

    def save(*args: object) -> None:
        saves.append(args)
        if len(saves) == 2:
            raise RuntimeError(
                "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file"
                " data/3: file write failed"
            )
        real(*args)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(FileError, match="cannot write .*checkpoint.pt: .*file write failed"):
        fit(codec(), photos, steps=6, folder=tmp_path, checkpoint_every=2, **QUICK)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
    device = Path("/dev/full")
    if device.exists():
        from nicprune.common.files import append_line

        with pytest.raises(FileError, match="cannot write /dev/full: No space left"):
            append_line(device, "x" * 100_000)


def test_tensorboard_gets_the_same_figures(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(codec(), photos, steps=2, folder=tmp_path, tensorboard=True, **QUICK)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[-1].value == pytest.approx(result.metrics["loss"], rel=1e-5)


def test_settings_are_checked(photos: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key 'lamda'; did you mean 'lmbda'"):
        fit(codec(), photos, steps=1, lamda=0.01)
    with pytest.raises(RecipeError, match="patch_size must be a multiple of 64"):
        fit(codec(), photos, steps=1, patch_size=100)
    frozen = codec().requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(frozen, photos, steps=1, **QUICK)


def test_schedules() -> None:
    cosine = TrainSettings(steps=110, lr=1.0, warmup=10)
    rates = [learning_rate(cosine, s) for s in range(110)]
    assert (
        rates[0] == pytest.approx(0.1)
        and max(rates) == 1.0
        and rates[-1] < 1e-3
        and rates[60] == pytest.approx(0.5)
    )
    assert learning_rate(TrainSettings(steps=10, lr=1.0, schedule="linear"), 5) == pytest.approx(
        0.5
    )
    assert learning_rate(TrainSettings(steps=10, lr=1.0, schedule="constant"), 9) == 1.0


def test_the_method_ends_training_early(photos: Path) -> None:
    model = attach(codec(), "mask_decay", budget={"macs": 0.6}, round_to=1, decay_steps=3)
    assert fit(model, photos, steps=50, until_done=True, **QUICK).step == 3


def test_too_few_steps_are_warned_of_and_refused_later(photos: Path) -> None:
    model = attach(codec(), "mask_decay", budget={"macs": 0.6}, round_to=1, decay_steps=30)
    with pytest.warns(UserWarning, match="needs 30 steps until it is done, and this run has 2"):
        fit(model, photos, steps=2, **QUICK)
    with pytest.raises(TrainingError, match="at step 2 of 30.*train on"):
        model.harden()


def test_every_architecture_trains_with_masks_on(architecture: str, photos: Path) -> None:
    model = attach(
        built(architecture)[0], "mask_decay", budget={"macs": 0.6}, round_to=1, decay_steps=2
    )
    before = state_of(model.codec)
    result = fit(model, photos, steps=2, **{**QUICK, "batch_size": 1})
    assert result.skipped == 0 and model.done
    moved = {
        name.split(".")[0]
        for name, value in model.codec.state_dict().items()
        if value.is_floating_point() and not torch.equal(value, before[name])
    }
    assert {"g_a", "g_s"} <= moved


def test_unknown_devices_are_one_line(photos: Path) -> None:
    with pytest.raises(TrainingError, match="cannot train on 1 x 'abacus'"):
        fit(codec(), photos, steps=1, accelerator="abacus", **QUICK)
