"""Options checked against a signature."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import pytest

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.options import FilePath, check_options, convert, list_options


class Part:
    def __init__(
        self,
        *,
        size: int,
        ratio: float = 0.5,
        mode: Literal["a", "b"] = "a",
        color: tuple[int, ...] = (0, 0, 0),
        offset: Literal["left"] | tuple[int, int] = "left",
        file: str | None = None,
        seed: int = 0,
    ) -> None: ...


def check(**options: object) -> dict[str, Any]:
    return check_options(Part, options, where="part", given=("seed",))


def test_good_options_are_converted() -> None:
    assert check(size=3, ratio=1, color=[1, 2], offset=[3, 4], file=None) == {
        "size": 3, "ratio": 1.0, "color": (1, 2), "offset": (3, 4), "file": None,
    }  # fmt: skip
    assert isinstance(check(size=3, ratio=1)["ratio"], float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "part: option 'size' is required"),
        ({"size": 2.0}, "part: size: expected an integer, got 2.0"),
        ({"size": True}, "part: size: expected an integer, got True"),
        ({"size": 1, "ratio": "x"}, "part: ratio: expected a number, got 'x'"),
        ({"size": 1, "ratio": "2.5%"}, "part: ratio: expected a number, such as 0.025, got '2.5%'"),
        (
            {"size": 1, "ratio": 10**400},
            "part: ratio: expected a number below 1.8e308, got an integer of 1329 bits",
        ),
        (
            {"size": 1, "ratio": 10**5000},
            "part: ratio: expected a number below 1.8e308, got an integer of 16610",
        ),
        ({"size": 1, "ratio": Fraction(10**400)}, "part: ratio: expected a number, got Fraction"),
        ({"size": 1, "ratio": "x%"}, "part: ratio: expected a number, such as 0.05, got 'x%'"),
        ({"size": 1, "mode": "c"}, "part: mode: unknown 'c'"),
        ({"size": 1, "mode": 1}, "part: mode: expected 'a' or 'b', got 1"),
        ({"size": 1, "color": 3}, "part: color: expected a list, got 3"),
        ({"size": 1, "color": ["x"]}, "part: color: expected an integer, got 'x'"),
        ({"size": 1, "offset": 3}, "part: offset: expected 'left' or a list"),
        ({"size": 1, "offset": "lift"}, "part: offset: unknown 'lift'; did you mean 'left'"),
        ({"size": 1, "file": 3}, "part: file: expected a string or none, got 3"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**options)


def test_unknown_and_given_options_are_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown 'sise'; did you mean 'size'"):
        check(size=1, sise=2)
    with pytest.raises(UnknownNameError, match="unknown 'seed'"):
        check(size=1, seed=2)


def test_listing() -> None:
    options = list_options(Part)
    assert list(options) == ["size", "ratio", "mode", "color", "offset", "file", "seed"]
    assert options["mode"].type_name == "'a' | 'b'"
    assert options["file"].type_name == "str | None"
    assert options["offset"].type_name == "'left' | tuple[int, int]"
    assert options["size"].type_name == "int"


def test_convert_keeps_any() -> None:
    marker = object()
    assert convert(marker, Any, "x") is marker


def test_none_names_no_file() -> None:
    def function(*, image: FilePath | None = None) -> None: ...

    option = list_options(function)["image"]
    assert option.names_file("a.png") and not option.names_file(None)
