"""Tables of measured times by channel widths: data, which `nicprune.runtime.latency` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from nicprune.common.config import StrictConfig, explain
from nicprune.common.errors import FileError
from nicprune.common.files import write_text
from nicprune.pruning.budget import TIMES

Side = Literal["encode_s", "decode_s"]
Seconds = Annotated[float, Field(ge=0)]
Width = Annotated[int, Field(ge=0)]


class Runtime(StrictConfig):
    """The way in which a codec is run, which its times belong to.

    Attributes:
        backend, precision: as for `accelerate`.
        size: height and width of the image, in pixels.
        threads: number of threads; torch's own if not given.
    """

    backend: str = "torch"
    precision: str = "float32"
    size: tuple[Annotated[int, Field(ge=64, le=8192)], Annotated[int, Field(ge=64, le=8192)]] = (
        512,
        768,
    )
    threads: int | None = Field(default=None, ge=1, le=1024)


class LayerTimes(StrictConfig):
    """Seconds of one layer alone, by widths.

    Attributes:
        outputs, inputs: the widths, increasing.
        seconds: a row for each of `outputs`, a column for each of `inputs`.
    """

    outputs: list[Width] = Field(min_length=1)
    inputs: list[Width] = Field(min_length=1)
    seconds: list[list[Seconds]]

    @model_validator(mode="after")
    def _grid(self) -> LayerTimes:
        rows, columns = len(self.outputs), len(self.inputs)
        if len(self.seconds) != rows or any(len(row) != columns for row in self.seconds):
            raise ValueError(f"{rows} outputs and {columns} inputs need {rows} rows of {columns}")
        if any(sorted(set(axis)) != axis for axis in (self.outputs, self.inputs)):
            raise ValueError("widths increase")
        return self


class PartTimes(StrictConfig):
    """Seconds of a part of a codec, at several widths of its layers.

    Attributes:
        sides: which times the part is in.
        widths: output and input channels of each of its layers, by the layer's name; one entry for
            each measurement.
        seconds: of each measurement.
    """

    sides: list[Side] = Field(min_length=1)
    widths: list[dict[str, tuple[Width, Width]]] = Field(min_length=1)
    seconds: list[Seconds]

    @model_validator(mode="after")
    def _pairs(self) -> PartTimes:
        if len(self.widths) != len(self.seconds):
            raise ValueError("one number of seconds for each entry of widths")
        if any(entry.keys() != self.widths[0].keys() for entry in self.widths):
            raise ValueError("every entry of widths names the same layers")
        return self


class LatencyTable(StrictConfig):
    """Measured times of one codec.

    Attributes:
        runtime: how it was run.
        machine: on what, in words.
        layers: by dotted name.
        parts: by dotted name.
        rest: seconds outside of the parts.
        original: seconds of the original codec, where this one was pruned from it.
    """

    runtime: Runtime
    machine: str
    layers: dict[str, LayerTimes]
    parts: dict[str, PartTimes]
    rest: dict[Side, Seconds]
    original: dict[Side, Seconds] | None = None

    @model_validator(mode="after")
    def _whole(self) -> LatencyTable:
        named = {layer for part in self.parts.values() for layer in part.widths[0]}
        if named != set(self.layers):
            raise ValueError("layers are those of the parts")
        if any(set(found) != set(TIMES) for found in (self.rest, self.original or self.rest)):
            raise ValueError("rest and original are encode_s and decode_s")
        return self

    def __str__(self) -> str:
        run = self.runtime
        threads = f", {run.threads} thread(s)" if run.threads else ""
        return (
            f"{run.backend}, {run.precision}, {run.size[1]}x{run.size[0]} pixels{threads},"
            f" {self.machine}"
        )

    def write(self, path: str | Path) -> Path:
        """Write the table into a file.

        Raises:
            FileError: it cannot be written.
        """
        return write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    def as_bytes(self) -> Tensor:
        """Return the table as a tensor of uint8, for state dictionaries."""
        return torch.frombuffer(bytearray(self.model_dump_json().encode()), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, written: Tensor) -> LatencyTable:
        """Return the table that `as_bytes` wrote."""
        return cls.model_validate_json(bytes(written.tolist()))

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read what `write` wrote.

        Raises:
            FileError: the file is missing, or holds something else.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from None
        except ValidationError as error:
            raise FileError(f"{path} is no table of times: {explain(cls, error)}") from None
