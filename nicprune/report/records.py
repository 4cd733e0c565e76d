"""Records: one evaluated codec each, found on disk, checked, and matched with what they are
compared to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nicprune.common.errors import FileError
from nicprune.common.machine import BUSY

FORMAT = "nicprune-record"
VERSION = 1
ROLES = ("original", "control", "pruned", "modulated")
COSTS = ("macs", "encoder", "decoder", "params")
FIGURES = ("bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s")
OPTIONAL: dict[str, Any] = {
    "quality": None,
    "metric": None,
    "lmbda": None,
    "method": None,
    "seed": None,
    "steps": None,
    "widths": {},
    "by_transform": {},
    "images": [],
    "crops": [],
    "test": None,
    "file": None,
    "recipe": None,
    "recipe_sha256": None,
    "recipe_text": None,
    "counter": None,
    "threads": None,
    "device": None,
    "versions": {},
    "machine": None,
    "date": None,
    "level": None,
    "dynamic": {},
    "skipping": {},
    "file_bytes": None,
    "width": None,
    "schedule": [],
    "encode_peak_bytes": None,
    "decode_peak_bytes": None,
    "busy": None,
}
LATER = (
    "level",
    "dynamic",
    "skipping",
    "file_bytes",
    "width",
    "schedule",
    "encode_peak_bytes",
    "decode_peak_bytes",
    "busy",
)
"""Keys that records had not from the start; left out of a report of records without them."""


class Record(dict[str, Any]):
    """One evaluated codec: the content of its record file, and the folder its crops are relative
    to.

    Args:
        content: the record as a mapping; keys that may be missing are filled in as None or empty.
        folder: the folder of the record file; None if the record never was a file (its crops are
            then left out).
        source: what to call the record in an error; the file's name.

    Raises:
        FileError: not a record, or a figure is missing or of the wrong kind.
    """

    def __init__(
        self, content: Mapping[str, Any], folder: Path | None = None, source: str | Path = "record"
    ) -> None:
        super().__init__(
            {
                key: type(value)() if isinstance(value, dict | list) else value
                for key, value in OPTIONAL.items()
            }
            | dict(content)
        )
        self.folder = folder
        _check(self, source)
        for key in ("codec", "label"):  # a line break would tear a table apart
            self[key] = " ".join(self[key].split())
        if Path(
            self["codec"]
        ).is_absolute():  # a report goes to others, for whom the place of a file here means nothing
            self["codec"] = Path(self["codec"]).name

    def setting(self) -> Setting:
        """What must be equal before two codecs may be compared."""
        names = tuple(sorted(str(image["name"]) for image in self["images"]))
        return Setting(self["codec"], self["metric"] or "", Path(self["test"] or "").name, names)

    def between(self) -> bool:
        """Whether this is one codec for all rates at a rate between those of the qualities: nothing
        to compare it with, but a point of its curve.
        """
        return bool(self["role"] == "modulated" and self["quality"] is None)

    def quiet(self) -> bool:
        """Whether its times were taken while other programs left the processor alone; not where
        nothing is known of them.
        """
        return self["busy"] is not None and self["busy"] <= BUSY

    def rate(self) -> tuple[float | None, float | None, int | None]:
        """What tells the points of a curve apart: the quality, between the qualities the level, and
        of a slimmable codec the width.
        """
        return self["quality"], self["level"] if self.between() else None, self["width"]


class Setting(NamedTuple):
    """A codec, what it was trained for, and the photographs it was tested on."""

    codec: str
    metric: str
    test: str
    images: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.images)
        tested = (
            f"{count} image{'s' * (count != 1)} of {self.test or 'an unnamed folder'}"
            if count
            else self.test or "test images unknown"
        )
        return f"{self.codec}{f' ({self.metric})' if self.metric else ''}, {tested}"


def _check(record: Record, source: str | Path) -> None:
    """Raise FileError in one line unless `record` has the shape of a record."""
    if record.get("format") != FORMAT:
        raise FileError(
            f"{source} is not a record: format is {record.get('format')!r}, expected {FORMAT!r};"
            " give folders that `nicprune run` wrote"
        )
    if record.get("version") != VERSION:
        raise FileError(
            f"{source} is a record of version {record.get('version')!r}, this nicprune reads"
            f" version {VERSION}: run the recipe again"
        )

    def expect(good: bool, what: str) -> None:
        if not good:
            raise FileError(f"{source} is a damaged record: expected {what}; run its recipe again")

    for key in ("codec", "label"):
        expect(isinstance(record.get(key), str), f"{key!r} as text, found {record.get(key)!r}")
    expect(
        record.get("role") in ROLES,
        f"'role' to be one of {', '.join(ROLES)}, found {record.get('role')!r}",
    )
    for key in ("cost", "original_cost"):
        cost = record.get(key)
        good = isinstance(cost, dict) and all(
            isinstance(cost.get(c), int) and cost[c] >= 0 for c in COSTS
        )
        expect(good, f"{key!r} with the whole numbers {', '.join(COSTS)}, found {cost!r}"[:200])
    for key in FIGURES:
        expect(
            key in record and (record[key] is None or isinstance(record[key], int | float)),
            f"{key!r} as a number, found {record.get(key)!r}",
        )
    for key in (
        "quality",
        "seed",
        "steps",
        "lmbda",
        "threads",
        "level",
        "file_bytes",
        "width",
        "encode_peak_bytes",
        "decode_peak_bytes",
        "busy",
    ):
        expect(
            record[key] is None or isinstance(record[key], int | float),
            f"{key!r} as a number, found {record[key]!r}",
        )
    for key, count in (("widths", 2), ("by_transform", 2), ("dynamic", 3)):
        items = record[key].values() if isinstance(record[key], dict) else [None]
        good = all(
            isinstance(item, list | tuple)
            and len(item) == count
            and all(isinstance(n, int | float) for n in item)
            for item in items
        )
        expect(good, f"{key!r} as names with {('two', 'three')[count - 2]} numbers each")
    spread = record["dynamic"].get("macs")
    expect(
        not record["dynamic"] or (spread is not None and 0 < spread[1] <= spread[2]),
        f"'dynamic' with mean, smallest and largest 'macs', found {spread!r}",
    )
    sides = (
        [record["skipping"].get(side) for side in ("encode_s", "decode_s")]
        if isinstance(record["skipping"], dict)
        else [None]
    )
    pairs = all(
        isinstance(side, list | tuple)
        and len(side) == 2
        and all(isinstance(n, int | float) and n > 0 for n in side)
        for side in sides
    )
    expect(
        record["skipping"] == {} or pairs,
        f"'skipping' with two times each for encode_s and decode_s, found {record['skipping']!r}"[
            :200
        ],
    )
    expect(isinstance(record["versions"], dict), "'versions' as names and versions")
    for key, needed in (("images", ("name",)), ("crops", ("image", "original", "decoded"))):
        good = isinstance(record[key], list) and all(
            isinstance(item, dict) and all(isinstance(item.get(n), str) for n in needed)
            for item in record[key]
        )
        expect(good, f"{key!r} as a list whose entries have {', '.join(needed)}")


def read(path: Path) -> list[Record]:
    """Read a record.json (one record) or a records.json (a list of them).

    Raises:
        FileError: unreadable, truncated, or not records.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
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
        records.append(Record(item, path.parent, source))
    return records


def collect(paths: Sequence[str | Path]) -> list[Record]:
    """Find records: files as given, and every record.json below folders (their records.json where
    there is none).

    Raises:
        FileError: a path does not exist, nothing was found, or a file is no record.
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
            identity = {key: value for key, value in record.items() if key not in ("crops", "file")}
            found.setdefault(json.dumps(identity, sort_keys=True), record)
    return list(found.values())


def as_records(records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Check records that may be plain mappings; sorted by setting, quality, role, label and seed,
    rates between qualities last.
    """
    checked = [
        record if isinstance(record, Record) else Record(record, None, f"record {n}")
        for n, record in enumerate(records, 1)
    ]

    def place(r: Record) -> tuple[Any, ...]:
        return (
            r.setting(),
            r.between(),
            number(r["quality"]),
            ROLES.index(r["role"]),
            r["label"],
            number(r["seed"]),
            number(r["level"]),
            number(r["width"]),
        )

    return sorted(checked, key=place)


def number(value: float | None) -> float:
    """Order None before every number."""
    return -1.0 if value is None else float(value)


def arms(records: Sequence[Record]) -> list[str]:
    """Name each record's arm: its label, with the recipe (then a count) behind it where one label
    stands for different results.

    Repeated measurements of the same codec, equal in cost, bpp and PSNR, share an arm.
    """

    def clashes(names: Sequence[str]) -> bool:
        seen: dict[Any, Any] = {}
        for record, name in zip(records, names, strict=True):
            place = (record.setting(), record.rate(), record["role"], name, record["seed"])
            result = (record["cost"]["macs"], record["bpp"], record["psnr_db"])
            if seen.setdefault(place, result) != result:
                clashing.add((record.setting(), record["role"], name))
        return bool(clashing)

    clashing: set[Any] = set()
    names = [record["label"] for record in records]
    if clashes(names):
        names = [
            (
                f"{name} ({record['recipe'] or 'no recipe'})"
                if (record.setting(), record["role"], name) in clashing
                else name
            )
            for record, name in zip(records, names, strict=True)
        ]
        clashing.clear()
        if clashes(names):
            counts: dict[Any, int] = {}
            for index, (record, name) in enumerate(zip(records, names, strict=True)):
                if (record.setting(), record["role"], name) in clashing:
                    place = (record.setting(), record.rate(), record["role"], name, record["seed"])
                    counts[place] = counts.get(place, 0) + 1
                    names[index] = f"{name} #{counts[place]}"
    return names


def reference_for(record: Record, records: Sequence[Record], role: str) -> Record | None:
    """The original or control that `record` is compared to: same setting, quality and original
    codec; else None.

    One codec for all rates is compared at each quality with the codec of that quality, where that
    has the architecture which it started from. Where several fit, the one of the same recipe (by
    name), seed, steps, text of the recipe and machine is taken, in this order.
    """

    def fits(other: Record) -> bool:
        return (
            other["role"] == role
            and other["quality"] == record["quality"]
            and other.setting() == record.setting()
            and record["original_cost"] in (other["cost"], other["original_cost"])
        )

    return (
        None
        if record.between()
        else max(
            (other for other in records if fits(other)),
            key=lambda other: closeness(record, other),
            default=None,
        )
    )


def closeness(record: Record, other: Record) -> tuple[bool, ...]:
    """How much of the circumstances two records share; larger is closer."""
    return tuple(
        record[key] == other[key]
        for key in ("recipe", "seed", "steps", "recipe_sha256", "machine", "threads")
    )
