"""The parts of a record: cost, results of an image, crop, schedule and times of skipping."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from nicprune.report.column import column


def _number(value: Any) -> Any:
    """Keep a number as it is: 3 and 3.0 are written differently."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, PlainValidator(_number, json_schema_input_type=float)]
Count = Annotated[int, Field(ge=0)]
Pair = Annotated[tuple[Number, Number], Field(strict=False)]
"""A pair of numbers; JSON has lists in place of tuples."""
Triple = Annotated[tuple[Number, Number, Number], Field(strict=False)]


class RecordModel(BaseModel):
    """Base of a record and its parts. Fields of later versions are kept, not refused."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Cost(RecordModel):
    """MACs for 64 x 64 pixels, and parameters."""

    macs: Count = column("MACs", "Multiply-accumulates of all transforms for 64 x 64 pixels")
    encoder: Count = column("encoder MACs", "Multiply-accumulates of encoding 64 x 64 pixels")
    decoder: Count = column("decoder MACs", "Multiply-accumulates of decoding 64 x 64 pixels")
    params: Count = column("params", "Number of parameters")


class ImageResult(RecordModel):
    """One test image. The figures are defined as the means of `Record` are."""

    name: str
    width: int | None = None
    height: int | None = None
    bpp: Number | None = None
    bpp_estimated: Number | None = None
    psnr_db: Number | None = None
    ms_ssim: Number | None = None
    encode_s: Number | None = None
    decode_s: Number | None = None
    macs: dict[str, Number] | None = Field(
        None, description="With gates: MACs for 64 x 64 pixels, of each transform and of all"
    )


class SourceResult(RecordModel):
    """A codec on images of the domain that the original was made for, for adaptations to another.

    The figures are defined as those of `Record` are.
    """

    test: str = Field(description="Folder of the images")
    bpp: Number | None = None
    psnr_db: Number | None = None
    ms_ssim: Number | None = None
    old_files: str = Field(
        description="Files that the original encoded are decoded bit-exact, to another picture, or"
        " refused"
    )
    images: list[ImageResult] = Field(description="Results of each image")


class Crop(RecordModel):
    """A piece of a test image, original and decoded, as picture files beside the record."""

    image: str = Field(description="Name of the image")
    original: str = Field(description="Path of the original piece, relative to the record")
    decoded: str = Field(description="Path of the decoded piece, relative to the record")
    bpp: Number | None = Field(None, description="Rate of the whole image, in bpp")
    psnr_db: Number | None = Field(None, description="PSNR of the whole image, in dB")


class ScheduleStep(RecordModel):
    """One validation of a lambda schedule; lists have an entry for each width."""

    step: Number = Field(description="Training step")
    pair: Number | None = Field(
        None, description="Index of the pair of widths compared; -1 for none"
    )
    lambdas: list[Number] = Field(description="Lambda of each width")
    bpp: list[Number] = Field(description="Estimated rate on validation images, in bpp")
    psnr_db: list[Number] = Field(description="PSNR on validation images, in dB")


class Skipping(RecordModel):
    """Times with closed channels skipped, and with them multiplied by zero."""

    images: int = Field(0, description="Number of images timed")
    encode_s: Pair = Field(description="Encoding: skipped, multiplied by zero, in s per image")
    decode_s: Pair = Field(description="Decoding: skipped, multiplied by zero, in s per image")

    @model_validator(mode="after")
    def _positive(self) -> Skipping:
        if min(*self.encode_s, *self.decode_s) <= 0:
            raise ValueError("expected times above zero")
        return self
