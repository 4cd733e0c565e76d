"""The process and its machine."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from nicprune.common import machine as runtime
from nicprune.common.machine import describe_machine, tune_allocator, versions
from nicprune.evaluation.memory import peak_bytes


def test_versions_and_machine_are_said() -> None:
    assert versions()["torch"][0].isdigit() and versions()["python"].startswith(
        f"{sys.version_info.major}."
    )
    machine = describe_machine()
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gb"] > 0
    assert machine["python"] == versions()["python"] and machine["device"]


def test_packages_that_are_not_installed_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PACKAGES", ("torch", "no-such-package-as-this"))
    assert versions()["no-such-package-as-this"] == "unknown" != versions()["torch"]


def test_a_gpu_is_named_and_torch_is_never_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "H200")
    )
    monkeypatch.setitem(sys.modules, "torch", gpu)  # type: ignore[arg-type]
    assert describe_machine()["device"] == "H200"
    code = (
        "from nicprune.common.machine import describe_machine; import sys;"
        " sys.exit(describe_machine()['device'] != 'cpu' or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_allocator_is_tuned_on_linux_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from nicprune.common.machine import tune_allocator; import sys;"
        " sys.exit(0 if tune_allocator() == sys.platform.startswith('linux') else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tune_allocator() is False


def test_peak_memory_is_what_lives_at_once() -> None:
    x, size = torch.rand(100, 100), 40_000

    def two_at_once() -> None:
        a = x + 1
        b = a * 2
        del a
        c = (
            b.view(-1).add_(1).reshape(100, 100) + 1
        )  # views and what happens in place are nothing new
        del b, c
        torch.zeros(50, 100)

    assert peak_bytes(two_at_once) == 2 * size
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    given = torch.ones(1, 3, 64, 64)
    assert peak_bytes(lambda: net(given)) == (8 + 8) * 64 * 64 * 4
    assert peak_bytes(lambda: None) == 0
