"""The process and its machine."""

from __future__ import annotations

import subprocess
import sys

from nicprune.runtime import describe_machine, tune_allocator, versions


def test_versions_and_machine_are_said() -> None:
    assert versions()["torch"][0].isdigit() and versions()["python"].startswith(f"{sys.version_info.major}.")
    machine = describe_machine()
    assert machine["cpu"] and machine["cores"] >= 1


def test_allocator_is_tuned_on_linux_alone(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    code = "from nicprune.runtime import tune_allocator; import sys; sys.exit(0 if tune_allocator() == sys.platform.startswith('linux') else 1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tune_allocator() is False
