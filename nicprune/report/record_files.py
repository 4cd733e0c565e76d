"""Read records from files, and write them into a report."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nicprune.common.errors import FileError
from nicprune.report.record import FORMAT, Record


def read(path: Path) -> list[Record]:
    """Read a record.json (one record or a list) or a records.json (a list of records).

    Raises:
        FileError: the file is unreadable or truncated, or its content is not records.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        if path.suffix != ".json":
            raise FileError(
                f"{path} is no record: give the folder that `nicprune run` wrote, or the"
                " records.json of a report"
            ) from error
        raise FileError(
            f"{path} is truncated or not JSON ({str(error)[:100]}); run its recipe again to write"
            " it anew"
        ) from error
    many = isinstance(content, list)
    records = []
    for number, item in enumerate(content if many else [content], 1):
        source = f"{path}, entry {number}," if many else path
        if not isinstance(item, dict):
            raise FileError(
                f"{source} is not a record: found {type(item).__name__}, expected an object of"
                f" format {FORMAT!r}"
            )
        records.append(Record.parse(item, path.parent, source))
    return records


def collect(paths: Sequence[str | Path]) -> list[Record]:
    """Return the records of files and folders, each once.

    Args:
        paths: files, or folders. Below a folder every record.json is read; where there is none,
            every records.json.

    Raises:
        FileError: a path does not exist, no record was found, or a file is not a record.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileError(
                f"{path} does not exist; give folders that `nicprune run` wrote, or record.json"
                " files"
            )
        below = (
            [path]
            if path.is_file()
            else sorted(path.rglob("record.json")) or sorted(path.rglob("records.json"))
        )
        if not below:
            raise FileError(
                f"no record.json or records.json below {path}; `nicprune run RECIPE` writes them"
            )
        files |= {file.resolve(): file for file in below}
    if not files:
        raise FileError(
            "no paths given to look for record.json in; give folders that `nicprune run` wrote"
        )
    found: dict[str, Record] = {}
    for file in files.values():
        # A report holds copies of the records it was made from: the same record counts once.
        for record in read(file):
            identity = {k: v for k, v in record.content().items() if k not in ("crops", "file")}
            found.setdefault(json.dumps(identity, sort_keys=True), record)
    return list(found.values())


def record_json(records: Record | Sequence[Record]) -> str:
    """Return the text of a run's record.json: a record, or a list of a codec's rates or widths."""
    content = (
        records.content() if isinstance(records, Record) else [one.content() for one in records]
    )
    return json.dumps(content, indent=1) + "\n"


def records_json(
    records: Sequence[Record], folder: Path, crops: Sequence[list[dict[str, Any]]]
) -> str:
    """Return the text of a report's records.json.

    Numbers that JSON does not have become null, and absolute paths become file names.

    Args:
        folder: folder of the report.
        crops: the crops of each record, with paths relative to `folder`.
    """
    content = [_portable(r, folder, kept) for r, kept in zip(records, crops, strict=True)]
    return json.dumps(content, indent=1) + "\n"


def _portable(record: Record, folder: Path, crops: list[dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = _finite(record.content())
    content |= {"test": record.setup().test, "crops": crops}
    if source := content.get("source"):
        content["source"] = {**source, "test": Path(source["test"]).name}
    content["images"] = [
        image | {"name": Path(image["name"]).name} for image in content.get("images", [])
    ]
    if record.file:
        file = Path(record.file)
        # A codec inside the report's folder keeps its place there.
        with contextlib.suppress(ValueError, OSError):
            file = ((record.folder or folder) / file).resolve().relative_to(folder.resolve())
        content["file"] = file.name if file.is_absolute() or ".." in file.parts else file.as_posix()
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
