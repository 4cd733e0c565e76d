"""Folders of reports with an overview.yaml, and what an overview wrote, for tests."""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def reports(folder: Path, content: str, **records: list[dict[str, Any]]) -> Path:
    """A folder of reports with an overview.yaml."""
    for name, found in records.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "records.json").write_text(json.dumps(found))
        (folder / name / "table.md").touch()
    (folder / "overview.yaml").write_text(content)
    return folder


def points_of(picture: bytes) -> str:
    """The points of a plot of methods, as its file says them."""
    return str(Image.open(io.BytesIO(picture)).info["Description"])


def broken_links(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Relative links of pages to what neither stands in the folder nor is among the files."""
    return [
        f"{name}: {target}"
        for name, content in files.items()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#:]+)\)", content.decode())
        if (path := posixpath.normpath(f"{posixpath.dirname(name)}/{target}".lstrip("/")))
        not in files
        and not (folder / path).exists()
    ]
