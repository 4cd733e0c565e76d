"""Files: paths as users write them, which files may be read and replaced, and atomic writes: a
reader finds the old file or the new one, never a part of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nicprune.common.errors import FileError

VARIABLES = {
    "NICPRUNE_DATA": (
        "the folder with the images of nicprune's recipes: kodak/, val/cid22/, train/...;"
        " docs/data.md of the repository lists their sources"
    ),
    "NICPRUNE_START": "the weights that training starts from, a .pth.tar or .safetensors",
}
"""Environment variables that nicprune's own recipes use, with their meaning."""


def check_path(path: object, what: str = "file") -> Path:
    """Return `path` as a Path.

    Args:
        what: name of its kind for messages, such as "image".

    Raises:
        FileError: it is not a path, but a number, None, an array, ...
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FileError(f"expected the path of a {what}, got {type(path).__name__}")
    return Path(path)


def expand(path: str | Path) -> Path:
    """Expand `~` and environment variables, `$NAME` or `${NAME}`, in a path.

    Raises:
        FileError: it is not a path, or a variable is not set.
    """
    check_path(path)
    if "\0" in str(path):
        raise FileError(f"{str(path)!r} is not a path: it holds a null character")
    filled = os.path.expandvars(str(path))
    if missing := re.search(r"\$(\w+|\{\w+\})", filled):
        name = missing[1].strip("{}")
        hint = f" ({VARIABLES[name]})" if name in VARIABLES else ""
        raise FileError(
            f"{path}: the variable {name} is not set{hint}; export {name}=... or name another path"
        )
    try:
        return Path(filled).expanduser()
    except RuntimeError as error:
        raise FileError(f"{path}: {error}") from None


KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
"""Tests of a file's mode, with the words for what is not a regular file."""


def _kind(mode: int) -> str:
    return next((words for test, words in KINDS if test(mode)), "not a regular file")


def check_regular(path: str | Path, what: str = "file") -> Path:
    """Return `path` if it is a regular file or a link to one.

    Call it before a file is opened: a pipe would block, and a device such as /dev/zero never ends.

    Args:
        path: file to be read.
        what: name of its kind for messages, such as "image".

    Raises:
        FileError: it is not a path; there is no such file, or it is a folder, a pipe, a socket or a
            device.
    """
    check_path(path, what)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileError(f"no such {what}: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise FileError(
            f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not stat.S_ISREG(mode):
        raise FileError(f"cannot read {path} as {what}: it is {_kind(mode)}, not a regular file")
    return Path(path)


def check_output(
    path: str | Path,
    inputs: Sequence[str | Path],
    own_kind: Callable[[bytes], bool],
    *,
    force: bool = False,
) -> None:
    """Raise unless a command may write its result to `path`, and can: call it before the work.

    A file of the command's own kind is replaced, so that a script can be run again; another file is
    replaced with `force` alone, and an input of the command never.

    Args:
        path: file to be written.
        inputs: files that the command reads; names of codecs that are no files are ignored.
        own_kind: given the first kilobyte of an existing file, whether it is of the command's own
            kind.
        force: replace a file of another kind.

    Raises:
        FileError: the file must not be replaced, or cannot be written.
    """
    path, start = Path(path), b""
    try:
        if path.exists():
            for given in inputs:
                if os.path.exists(given) and os.path.samefile(given, path):
                    raise FileError(f"{path} is an input of this command; name another output")
            _check_replaceable(path)
            with open(path, "rb") as file:
                start = file.read(1024)
        place = path.resolve().parent  # of a link, where its file lies
    except (OSError, RuntimeError) as error:  # RuntimeError: links that point to each other
        raise FileError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if start and not force and not own_kind(start):
        raise FileError(
            f"{path} exists and is not a file that this command writes; name another output, or"
            " replace it with --force"
        )
    check_writable(place)


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise FileError(f"cannot write {path}: it is {_kind(mode)}, not a regular file")


def shortened(name: str, size: int) -> str:
    """Return the start of a file's name that fits into `size` bytes."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def content_digest(path: str | Path) -> str:
    """Return a hash of a file's bytes. A file that has not changed is read once in a process.

    Raises:
        FileError: the file cannot be read, or is not a regular one.
    """
    check_regular(path)
    now = os.stat(path)
    return _digest(str(path), now.st_ino, now.st_size, now.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 20)
def _digest(path: str, *version: int) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


def _host() -> str:
    """Return eight characters that stand for this machine in the names of temporary files."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.\w+\.tmp")
"""Names of the temporary files of `write_atomically`."""


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files that killed processes of this machine left in a folder or below it.

    Call it before this process writes there: its own number may have been another's before.
    """
    for path in Path(folder).rglob(".*.tmp"):
        found = TEMPORARY.fullmatch(path.name)
        if found and found["host"] == _host() and not _alive(int(found["pid"])):
            with contextlib.suppress(OSError):
                path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file atomically: call `write` with a temporary path beside `path`, then rename it.

    Where `path` is a symbolic link, the file that it points to is replaced, and the link stays.

    Raises:
        FileError: the folder cannot be created or written to, the disk is full, or the path is
            taken by something that is not a regular file.
    """
    path = Path(path)
    temporary = None
    try:
        if path.is_symlink():
            path = path.resolve()
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        start = shortened(path.name, 100)  # names have at most 255 bytes
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{start}.{_host()}-{os.getpid()}.", suffix=".tmp"
        )
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files; output files follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except FileError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise FileError(f"cannot write {path}: {_reason(error, temporary)}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def _reason(error: Exception, temporary: Path | None) -> str:
    """Return why a file could not be written. torch.save tells of a full disk in words that nobody
    understands; trying to make the file longer says it.
    """
    allocate = getattr(os, "posix_fallocate", None)
    if isinstance(error, RuntimeError) and temporary is not None and allocate is not None:
        try:
            with open(temporary, "ab") as file:
                allocate(file.fileno(), file.tell(), 1 << 20)
        except OSError as full:
            return full.strerror or str(full)
    return getattr(error, "strerror", None) or str(error).split("\n", 1)[0]


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, atomically; bytes of a file's name that are not UTF-8 as escapes."""
    content = text.encode("utf-8", "backslashreplace")
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log.

    Raises:
        FileError: the log cannot be written, or the disk is full.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(folder: str | Path, names: Iterable[str] = ()) -> None:
    """Raise unless files can be written into a folder: call it before the work.

    Args:
        folder: it need not exist, if it can be created; it is not created here.
        names: of the files. What has such a name already must be a regular file.

    Raises:
        FileError: a file or another thing stands where a folder is needed, or the other way round;
            or the system does not allow it.
    """
    folder = Path(folder)
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if os.path.lexists(there) and not os.path.isdir(there):
        raise FileError(f"cannot write into {folder}: {there} is not a folder")
    try:
        for name in names:
            _check_replaceable(folder / name)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise FileError(f"cannot write into {folder}: {error.strerror or error}") from None
