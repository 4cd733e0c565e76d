"""Locks of folders: held once, released with the process, and the folder is cleaned."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nicprune.common.errors import FileError
from nicprune.common.files import remove_leftovers, write_text
from nicprune.common.lock import LOCK, locked

HOLD = """
import sys
from nicprune.common.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""

WRITE = """
import sys
from nicprune.common.files import write_atomically
def wait(path):
    print(path, flush=True)
    sys.stdin.read()
write_atomically(sys.argv[1], wait)
"""


def start(script: str, argument: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that has come to its first line of output; the line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(argument)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_the_second_gets_one_line_and_takes_over_from_the_dead(tmp_path: Path) -> None:
    other, _ = start(HOLD, tmp_path)
    try:
        with pytest.raises(FileError) as caught, locked(tmp_path):
            pass
        said = str(caught.value)
        assert f"in use by process {other.pid} on {socket.gethostname()}" in said
        assert "\n" not in said
    finally:
        end(other)
    assert (tmp_path / LOCK).exists(), "a killed process leaves its file"
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(FileError, match="in use"), locked(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"), locked(tmp_path / "file" / "run"):
        pass


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path: Path) -> None:
    dead, left = start(WRITE, tmp_path / "deep" / "codec.safetensors")
    end(dead)
    alive, kept = start(WRITE, tmp_path / "codec.safetensors")
    try:
        assert Path(left).exists() and Path(kept).exists()
        others = [".codec.abc.tmp", ".hidden", "a.tmp", f".x.{'0' * 8}-{dead.pid}.abc.tmp"]
        for name in others:
            (tmp_path / name).write_text("not nicprune's, or of another machine")
        with locked(tmp_path):
            assert not Path(left).exists() and Path(kept).exists()
        assert {p.name for p in tmp_path.iterdir()} == {*others, "deep", Path(kept).name}
    finally:
        end(alive)
    remove_leftovers(tmp_path)
    assert not Path(kept).exists()
    write_text(tmp_path / ("ü" * 120), "a name of 240 bytes")
