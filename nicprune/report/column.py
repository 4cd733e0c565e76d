"""Declare the columns of a report: title, unit and meaning, in the pydantic model of their values.

A model declares a column with `column(...)`; tables, plots and pages read it with
`Column.of(model, name)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

RATIO = "×"
"""Unit of a ratio, written behind it: 2.41×."""


def column(
    title: str, description: str, unit: str = "", *, header: str | None = None, **options: Any
) -> Any:
    """Return the pydantic field of a column.

    Args:
        title: name of the quantity, as on the axis of a plot.
        description: definition of the quantity, without its unit.
        unit: unit of the values; empty for text and plain numbers.
        header: header in a table; by default title and unit.
        options: arguments of `pydantic.Field`, for example `default`.
    """
    return Field(
        title=title,
        description=f"{description}, in {unit}" if unit not in ("", RATIO) else description,
        json_schema_extra={"unit": unit, "header": header or f"{title} {unit}".strip()},
        **options,
    )


@dataclass(frozen=True)
class Column:
    """A column of a report.

    Attributes:
        name: name in table.csv and records.json.
        title: name of the quantity.
        unit: unit of the values; empty for text and plain numbers.
        header: header in a table for people.
        description: definition of the quantity, with its unit.
    """

    name: str
    title: str
    unit: str
    header: str
    description: str

    @classmethod
    def of(cls, model: type[BaseModel], name: str) -> Column:
        """Return the column that `model` declares as `name`."""
        field = model.model_fields[name]
        extra = field.json_schema_extra
        assert isinstance(extra, dict) and field.title and field.description, name
        return cls(name, field.title, str(extra["unit"]), str(extra["header"]), field.description)

    @property
    def axis(self) -> str:
        """Label of an axis of a plot."""
        return f"{self.title} ({self.unit})" if self.unit else self.title
