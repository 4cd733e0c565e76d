"""Crops: pieces of test images, copied from runs into a report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nicprune.report.matching import arms
from nicprune.report.record import Record

PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""Media type of a picture, by the bytes it starts with."""


class Crops(NamedTuple):
    """The crops of a report.

    Attributes:
        of_records: for each record its crops, with paths relative to the report.
        files: content of each file, by its path relative to the report.
        named: number of crops that the records name.
        missing: number of these that were not found beside their records.
    """

    of_records: list[list[dict[str, Any]]]
    files: dict[str, bytes]
    named: int = 0
    missing: int = 0


def no_crops(records: Sequence[Record]) -> Crops:
    """Return the crops of a report without pieces of test images."""
    return Crops([[] for _ in records], {})


def read_crops(records: Sequence[Record]) -> Crops:
    """Read the crops of records, each picture once.

    A crop is read only from below its record's folder, and only if it is a PNG or JPEG.
    """
    files: dict[str, bytes] = {}
    by_content: dict[str, str] = {}

    def add(record: Record, path: str, name: str) -> str | None:
        content = _picture_below(record.folder, path)
        if content is None:
            return None
        digest = hashlib.sha256(content).hexdigest()
        if digest not in by_content:
            suffix = ".png" if media_type(content) == "image/png" else ".jpg"
            chosen, n = f"crops/{name}{suffix}", 1
            while chosen in files:
                n += 1
                chosen = f"crops/{name}-{n}{suffix}"
            files[chosen], by_content[digest] = content, chosen
        return by_content[digest]

    of_records = []
    for record, arm in zip(records, arms(records), strict=True):
        found = []
        codec = _slug("-".join((record.codec, f"q{record.quality}", arm, f"s{record.seed}")))
        for crop in record.crops:
            image = Path(crop.image)
            original = add(record, crop.original, f"{_slug(image.stem)}-original")
            decoded = add(record, crop.decoded, f"{_slug(image.stem)}-{codec}")
            if original is not None and decoded is not None:
                found.append(
                    crop.model_dump(exclude_unset=True)
                    | {"image": image.name, "original": original, "decoded": decoded}
                )
        of_records.append(found)
    named = sum(len(record.crops) for record in records)
    return Crops(of_records, files, named, named - sum(map(len, of_records)))


def _picture_below(folder: Path | None, path: str) -> bytes | None:
    """Return a PNG or JPEG below a folder; None where there is none."""
    if folder is None:
        return None
    try:
        root = folder.resolve()
        if not (root / path).resolve().is_relative_to(root):
            return None
        content = (root / path).read_bytes()
    except (OSError, ValueError):
        return None
    return content if media_type(content) is not None else None


def media_type(content: bytes) -> str | None:
    """Return the media type of a picture; None for other content."""
    return next((kind for magic, kind in PICTURES.items() if content.startswith(magic)), None)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "x"
