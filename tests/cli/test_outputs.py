"""Outputs of commands: an input is never replaced, another kind of file with --force alone."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

import onnx
import pytest
import torch
from helpers import built
from helpers_cli import call, fails

from nicprune.common.errors import FileError
from nicprune.common.files import check_regular, write_text
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.storage.checkpoint import save


@pytest.fixture
def there(tmp_path: Path) -> dict[str, str]:
    """A picture, a codec, the picture encoded, a link to the picture, and notes."""
    files = {name: str(tmp_path / name) for name in ("a.png", "c.safetensors", "a.nic", "l.png")}
    write_png(torch.rand(3, 64, 64), files["a.png"])
    save(built("bmshj2018-hyperprior")[0], files["c.safetensors"])
    call("encode", files["c.safetensors"], files["a.png"], files["a.nic"])
    os.symlink(files["a.png"], files["l.png"])
    files["notes"] = str(tmp_path / "notes.png")
    Path(files["notes"]).write_text("not to be lost")
    return files


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    "command",
    [
        "encode c.safetensors a.png a.png",
        "encode c.safetensors a.png l.png",
        "encode c.safetensors a.png c.safetensors",
        "encode bmshj2018-hyperprior a.png c.safetensors --weights c.safetensors -q 1",
        "eval c.safetensors a.png -o a.png",
        "eval c.safetensors a.png -o c.safetensors",
        "prune c.safetensors c.safetensors --set budget.macs=0.5 --set round_to=1",
        "export c.safetensors c.safetensors",
    ],
)
def test_an_input_is_never_replaced(
    there: dict[str, str],
    command: str,
    force: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {name: Path(path).read_bytes() for name, path in there.items()}
    arguments = [there.get(word, word) for word in command.split()]
    err = fails(monkeypatch, capsys, *arguments, *force)
    assert "is an input of this command" in err and err.count("\n") == 1
    assert before == {name: Path(path).read_bytes() for name, path in there.items()}


COMMANDS = [
    "encode c.safetensors a.png notes",
    "decode c.safetensors a.nic notes",
    "eval c.safetensors a.png -o notes",
    "prune c.safetensors notes --set budget.macs=0.5 --set round_to=1",
    "export c.safetensors notes",
]


FOREIGN = [
    ("eval c.safetensors a.png -o notes", b'{"my": "settings"}'),
    ("export c.safetensors notes", b"PK\x03\x04 a document of somebody's"),
]


@pytest.mark.parametrize(("command", "content"), FOREIGN)
def test_files_that_begin_alike_are_of_another_kind(
    there: dict[str, str],
    command: str,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    notes = Path(there["notes"])
    arguments = [there.get(word, word) for word in command.split()]
    notes.write_bytes(content)
    assert "is not a file that this command writes" in fails(monkeypatch, capsys, *arguments)
    assert notes.read_bytes() == content
    call(*arguments, "--force")
    call(*arguments)  # its own kind


@pytest.mark.parametrize("command", COMMANDS)
def test_another_kind_of_file_is_replaced_by_force_alone(
    there: dict[str, str],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command.startswith("prune"):  # another ending is refused before
        there["notes"] = str(Path(there["notes"]).with_suffix(".safetensors"))
        Path(there["notes"]).write_text("not to be lost")
    arguments = [there.get(word, word) for word in command.split()]
    err = fails(monkeypatch, capsys, *arguments)
    assert "replace it with --force" in err and err.count("\n") == 1
    assert Path(there["notes"]).read_text() == "not to be lost"
    if command.startswith("export"):  # its ending is checked further down
        there["notes"] = str(Path(there["notes"]).with_suffix(".tar"))
        Path(there["notes"]).write_text("not to be lost")
        arguments = [there.get(word, word) for word in command.split()]
    call(*arguments, "--force")
    assert Path(there["notes"]).read_bytes() != b"not to be lost"
    call(*arguments)  # now it is of the command's own kind: a script may run again


def test_only_regular_files_are_replaced_and_links_stay(
    there: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe, device = tmp_path / "pipe", Path("/dev/null")
    os.mkfifo(pipe)
    for output, kind in ((pipe, "a pipe"), (device, "a device"), (tmp_path, "a folder")):
        err = fails(
            monkeypatch, capsys, "encode", there["c.safetensors"], there["a.png"], str(output),
            "--force",
        )  # fmt: skip
        assert f"it is {kind}, not a regular file" in err
        with pytest.raises(FileError, match="not a regular file"):
            write_text(output, "a")
    assert pipe.is_fifo() and device.is_char_device()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "target.txt")
    for text in ("new", "newer"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "target.txt").read_text() == text


NO_PLACE = [
    "encode c.safetensors a.png {}/b.nic",
    "encode c.safetensors clip.yuv {}/b.npv",
    "decode c.safetensors a.nic {}/b.png",
    "decode c.safetensors a.npv {}/frames",
    "decode c.safetensors a.npv {}/b.y4m",
    "eval c.safetensors a.png -o {}/b.json",
    "eval-video clip.yuv --codec c.safetensors --report {}/b",
    "prune c.safetensors {}/b.safetensors --set budget.macs=0.5",
    "export c.safetensors {}/b.pth.tar",
    "export c.safetensors {}/b --format onnx",
    "time c.safetensors --image a.png --out {}/b",
    "time c.safetensors --image a.png --report {}/b",
    "bench decoding --images a.png --codec c.safetensors --out {}/b",
    "report report -o {}/b",
]


@pytest.mark.parametrize("command", NO_PLACE)
def test_an_output_that_cannot_be_written_is_noticed_before_the_work(
    there: dict[str, str],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def works(*args: object, **kwargs: object) -> None:
        raise AssertionError("the command has begun its work")

    (tmp_path / "clip_64x64.yuv").write_bytes(bytes(64 * 64 * 3 // 2))
    named = there | {"clip.yuv": str(tmp_path / "clip_64x64.yuv")}
    monkeypatch.setattr("nicprune.storage.named.load_codec", works)
    monkeypatch.setattr("nicprune.report.video_record.read_video_records", works)
    before = sorted(tmp_path.rglob("*"))

    def told(folder: Path) -> str:
        arguments = [named.get(word, word) for word in command.format(folder).split()]
        err = fails(monkeypatch, capsys, *arguments)
        assert err.startswith("nicprune: cannot write into ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    assert f"{there['notes']} is not a folder" in told(Path(there["notes"]))
    assert "No such file" in told(Path("/proc/nicprune"))  # where nobody may write

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert "Permission denied" in told(tmp_path / "new")


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("eval-video clip.yuv --codec c.safetensors --report out", "records.json"),
        ("export c.safetensors out --format onnx", "h_a.onnx"),
        ("time c.safetensors --image a.png --out out", "times.png"),
        ("time c.safetensors --image a.png --report out", "runtime.csv"),
        ("bench decoding --images a.png --codec c.safetensors --out out", "decoding.md"),
        ("report report -o out", "table.tex"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_noticed_before_the_work(
    there: dict[str, str],
    command: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "clip_64x64.yuv").write_bytes(bytes(64 * 64 * 3 // 2))
    (tmp_path / "out" / file).mkdir(parents=True)
    named = there | {"clip.yuv": str(tmp_path / "clip_64x64.yuv"), "out": str(tmp_path / "out")}
    monkeypatch.setattr("nicprune.storage.named.load_codec", None)  # nothing is loaded
    err = fails(monkeypatch, capsys, *[named.get(word, word) for word in command.split()])
    assert err == (
        f"nicprune: cannot write {tmp_path / 'out' / file}: it is a folder, not a regular file\n"
    )


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "as image: it is a pipe"),
        (Path("/dev/zero"), "it is a device"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none", "no such image"),
        (tmp_path / ("n" * 300), "cannot read"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(FileError, match=message):
            check_regular(path, "image")
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert check_regular(tmp_path / "link") == tmp_path / "link"


OWN = """
from compressai.models import FactorizedPrior

class Own(FactorizedPrior):
    def __init__(self):
        super().__init__(8, 12)

def make():
    return Own()
"""


def test_a_codec_of_ones_own_class_is_exported_by_its_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_to_export.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module("own_to_export").make
    small = attach(make(), "magnitude", budget={"macs": 0.7}, round_to=1).harden()
    file, output = save(small, tmp_path / "small.safetensors", factory=make), tmp_path / "onnx"
    call("export", "own_to_export:make", str(output), "--format", "onnx", "--weights", str(file))
    weights = {w.name: w.dims for w in onnx.load(output / "g_a.onnx").graph.initializer}
    assert tuple(small.g_a[0].weight.shape) in [tuple(dims) for dims in weights.values()]
    assert small.g_a[0].weight.shape[0] < 8
    err = fails(
        monkeypatch, capsys, "export", str(file), str(tmp_path / "b.pth.tar"), "--quality", "3"
    )
    assert "--quality" in err
    err = fails(monkeypatch, capsys, "export", "own_to_export:make", str(file), "--weights",
                str(file), "--force")  # fmt: skip
    assert "input" in err and file.exists()
