"""A record: one evaluated codec, with its cost, rate, distortion, times and circumstances.

The content of record.json, and of an entry of records.json. Each field says its meaning and unit;
tables, plots and pages take titles and definitions from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, PrivateAttr, ValidationError, model_validator

from nicprune.common.config import explain
from nicprune.common.errors import FileError
from nicprune.common.machine import is_quiet
from nicprune.report.column import column
from nicprune.report.experimental_setup import Setup
from nicprune.report.record_parts import (
    Cost,
    Crop,
    ImageResult,
    Number,
    Pair,
    RecordModel,
    ScheduleStep,
    Skipping,
    SourceResult,
    Triple,
)

FORMAT: Final = "nicprune-record"
VERSION: Final = 1

Role = Literal["original", "control", "pruned", "modulated"]
ROLES: tuple[str, ...] = get_args(Role)


def _one_line(text: str) -> str:
    """Join lines: a line break would break a table."""
    return " ".join(text.split())


def _without_folder(codec: str) -> str:
    """Reduce an absolute path to its file name: other machines have other folders."""
    return Path(codec).name if Path(codec).is_absolute() else codec


def _range(values: dict[str, tuple[float, float, float]]) -> dict[str, tuple[float, float, float]]:
    spread = values.get("macs")
    if values and (spread is None or not 0 < spread[1] <= spread[2]):
        raise ValueError(f"expected mean, smallest and largest of 'macs', found {spread}")
    return values


OneLine = Annotated[str, AfterValidator(_one_line)]


class Record(RecordModel):
    """One evaluated codec.

    Fields that were not given are left out when the record is written, so that adding a field
    does not change the records of earlier versions. `Record.parse` reads one with errors in one
    line.
    """

    quality: int | None = column(
        "q", "Quality level; empty for a rate between two levels", default=None
    )
    metric: str | None = column("metric", "Training metric: mse or ms-ssim", default=None)
    lmbda: Number | None = column(
        "λ (lmbda)", "Weight of the distortion in the training loss", default=None
    )
    method: str | None = column("method", "Name of the method, as in a recipe", default=None)
    seed: int | None = column("seed", "Seed of the training", default=None)
    steps: int | None = column(
        "steps", "Training steps of the recipe; 0 for the original", default=None
    )
    widths: dict[str, Pair] = column(
        "widths", "Channels of each channel group, before and after", default={}
    )
    by_transform: dict[str, Pair] = column(
        "by transform", "MACs for 64 x 64 pixels and parameters of each transform", default={}
    )
    images: list[ImageResult] = column("images", "Results of each test image", default=[])
    crops: list[Crop] = column("crops", "Pieces of decoded test images", default=[])
    test: str | None = column("test images", "Folder of the test images", default=None)
    file: str | None = column("file", "File of the codec, relative to the report", default=None)
    recipe: str | None = column("recipe", "Name of the recipe", default=None)
    recipe_sha256: str | None = column(
        "recipe SHA-256", "SHA-256 of the recipe's settings", default=None
    )
    recipe_text: str | None = column("recipe text", "Text of the recipe", default=None)
    counter: str | None = column("MAC counter", "Program that counted the MACs", default=None)
    threads: int | None = column("thread count", "CPU threads during evaluation", default=None)
    device: str | None = column("device", "Device that ran the codec", default=None)
    versions: dict[str, str] = column("versions", "Versions of the packages", default={})
    machine: str | None = column(
        "machine", "Processor, cores, memory and operating system", default=None
    )
    date: str | None = column("evaluated", "Time of the evaluation (ISO 8601, UTC)", default=None)
    level: Number | None = column(
        "level", "Rate level of a codec for all rates, 0 for the lowest rate", default=None
    )
    dynamic: Annotated[dict[str, Triple], AfterValidator(_range)] = column(
        "MACs per image",
        "With gates: mean, smallest and largest MACs over the images for 64 x 64 pixels,"
        " of each transform and of all (macs)",
        default={},
    )
    skipping: Skipping | None = column(
        "skipping", "With gates: times with closed channels skipped and not", default=None
    )
    file_bytes: int | None = column("file size", "Size of the codec's file", "bytes", default=None)
    width: int | None = column(
        "width", "Index of a slimmable codec's width, 0 for the widest", default=None
    )
    schedule: list[ScheduleStep] = column(
        "schedule", "Lambdas of a slimmable codec at each validation", default=[]
    )
    encode_peak_bytes: int | None = column(
        "encoding memory",
        "Peak size of the tensors alive while a 768 x 512 image is encoded, weights not counted",
        "bytes",
        default=None,
    )
    decode_peak_bytes: int | None = column(
        "decoding memory",
        "Peak size of the tensors alive while a 768 x 512 image is decoded, weights not counted",
        "bytes",
        default=None,
    )
    busy: Number | None = column(
        "busy",
        "Fraction of the processor (0 to 1) that other programs used during evaluation",
        default=None,
    )
    source: SourceResult | None = column(
        "source domain", "Results on images of the domain of the original", default=None
    )
    train_images: int | None = column(
        "training images", "Number of training images; empty for all of the folder", default=None
    )
    format: Literal["nicprune-record"]
    version: Literal[1]
    key: str | None = column("key", "Hash of the settings that made the codec", default=None)
    codec: Annotated[OneLine, AfterValidator(_without_folder)] = column(
        "architecture", "Codec that the recipe starts from"
    )
    label: OneLine = column("codec", "Name of the codec in tables, given by the recipe")
    role: Role = column(
        "role",
        "original; control: the original fine-tuned for the same number of steps without pruning;"
        " pruned; modulated: one codec for all rates or widths",
    )
    settings: dict[str, Any] = column("settings", "Settings of the methods", default={})
    cost: Cost = column("cost", "MACs and parameters of the codec")
    original_cost: Cost = column("original cost", "MACs and parameters of the original")
    bpp: Number | None = column(
        "rate",
        "Bits of the bitstream divided by the pixels of the image, mean over images",
        "bpp",
        header="bpp",
    )
    bpp_estimated: Number | None = column(
        "estimated rate",
        "Entropy of the latents under the codec's own model, divided by the pixels, mean over"
        " images",
        "bpp",
        header="estimated bpp",
    )
    psnr_db: Number | None = column(
        "PSNR", "PSNR over RGB, both images rounded to 8 bits, mean over images", "dB"
    )
    ms_ssim: Number | None = column("MS-SSIM", "MS-SSIM over RGB, mean over images")
    encode_s: Number | None = column(
        "encode", "Time to encode an image, entropy coding included, mean over images", "s"
    )
    decode_s: Number | None = column(
        "decode", "Time to decode an image, entropy coding included, mean over images", "s"
    )

    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _unset_if_empty(cls, content: Any) -> Any:
        """Treat an empty value as not given, for fields that the first records did not have."""
        if not isinstance(content, Mapping):
            return content
        return {
            name: value
            for name, value in content.items()
            if name not in LATER or value not in (None, {}, [])
        }

    @classmethod
    def parse(
        cls,
        content: Mapping[str, Any],
        folder: Path | None = None,
        source: str | Path = "record",
    ) -> Record:
        """Return the record with this content.

        Args:
            content: field names and values.
            folder: folder of the record's file, which paths of crops are relative to; without
                one, crops are left out of reports.
            source: name of the record in an error.

        Raises:
            FileError: the content is not a record, or a value is missing or of the wrong type.
        """
        if content.get("format") != FORMAT:
            raise FileError(
                f"{source} is not a record: format is {content.get('format')!r}, expected"
                f" {FORMAT!r}; give folders that `nicprune run` wrote"
            )
        if content.get("version") != VERSION:
            raise FileError(
                f"{source} is a record of version {content.get('version')!r}, this nicprune reads"
                f" version {VERSION}: run the recipe again"
            )
        try:
            record = cls.model_validate(content)
        except ValidationError as error:
            raise FileError(
                f"{source} is a damaged record: {explain(cls, error)[:300]}; run its recipe again"
            ) from None
        record._folder = folder
        return record

    @property
    def folder(self) -> Path | None:
        """Folder of the record's file, which paths of crops are relative to."""
        return self._folder

    def content(self) -> dict[str, Any]:
        """Return the fields that are set, by name."""
        return self.model_dump(exclude_unset=True)

    def setup(self) -> Setup:
        """Return the conditions that must be equal before two codecs may be compared."""
        images = tuple(
            sorted((image.name, image.width or 0, image.height or 0) for image in self.images)
        )
        return Setup(self.codec, self.metric or "", Path(self.test or "").name, images)

    def between(self) -> bool:
        """Return True for a rate between the quality levels of one codec for all rates.

        Such a rate is a point of the curve; there is no original to compare it with.
        """
        return self.role == "modulated" and self.quality is None

    def quiet(self) -> bool:
        """Return True if the times were taken while no other program kept the processor busy.

        False where this was not recorded.
        """
        return is_quiet(self.busy)

    def rate_point(self) -> tuple[float | None, float | None, int | None]:
        """Return quality, level (between qualities only) and width: the key of a curve's point."""
        return self.quality, self.level if self.between() else None, self.width


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
    "source",
    "train_images",
)
"""Fields that the first records did not have: not written where empty."""
