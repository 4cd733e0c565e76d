"""Names of methods and backends."""

from __future__ import annotations

import pytest

from nicprune.common.errors import RecipeError
from nicprune.methods import METHODS
from nicprune.runtime.backends import BACKENDS


@pytest.mark.parametrize(
    ("names", "name", "said"),
    [
        (METHODS, "mask_decoy", "unknown method 'mask_decoy'; did you mean 'mask_decay'?"),
        (BACKENDS, "openvini", "unknown backend 'openvini'; did you mean 'openvino'?"),
    ],
)
def test_an_unknown_name_is_an_argument_out_of_range(names: object, name: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        names[name]  # type: ignore[index]
    assert str(error.value) == said
