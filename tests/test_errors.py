"""Errors that are raised without the name of the parameter get it."""

from __future__ import annotations

import pytest

from backdoorbench_moe.errors import ConfigError, DataError, UnknownNameError, naming


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("no images"), DataError, "base: no images"),
        (
            ConfigError.expected("size", "a number", "x"),
            ConfigError,
            "base: size: expected a number, got 'x'",
        ),
        (
            UnknownNameError("model", "pmeo", ["pmoe"]),
            ConfigError,
            "base: model: unknown 'pmeo'; did you mean 'pmoe'",
        ),
    ],
)
def test_the_parameter_stands_in_front(error, kind, message) -> None:
    with pytest.raises(kind) as found, naming("base"):
        raise error
    assert str(found.value).startswith(message) and found.value.__cause__ is error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ZeroDivisionError), naming("base"):
        _ = 1 / 0
