"""Values of other libraries in specs: the same spec, the same digest."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from backdoorbench_moe.api import make_spec
from backdoorbench_moe.config import PartSpec, PoisonSpec, TrainSpec, build_spec, load_yaml, parse_setting
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.plain import plain
from backdoorbench_moe.triggers import create_trigger


class Form(enum.StrEnum):
    DIRTY = "dirty"


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), 0.1),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.str_("warp"), "warp"),
        (np.array(3), 3),
        (np.array([1, 2]), [1, 2]),
        (np.array([[0.5, 0.1]], dtype=np.float32), [[0.5, 0.1]]),
        (torch.tensor(3), 3),
        (torch.tensor(0.1), 0.1),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.Size([2, 3]), (2, 3)),
        (Path("a") / "b", "a/b"),
        (Fraction(1, 4), 0.25),
        (Decimal("0.1"), 0.1),
        (Form.DIRTY, "dirty"),
        (range(3), [0, 1, 2]),
        ({"a": (np.int64(1), [Path("b")])}, {"a": (1, ["b"])}),
    ],
)
def test_a_value_becomes_the_plain_one_it_stands_for(value, want) -> None:
    got = plain(value)
    assert got == want and type(got) is type(want)
    json.dumps(got)


@pytest.mark.parametrize("value", [b"x", object(), {1, 2}, 1j])
def test_what_stands_for_no_plain_value_is_left_to_be_refused(value) -> None:
    assert plain(value) is value


def test_plain_loads_neither_numpy_nor_torch() -> None:
    program = (
        "import sys; from backdoorbench_moe.plain import plain; plain({'a': 1});"
        "print([n for n in ('numpy', 'torch') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_a_spec_from_other_libraries_values_is_the_plain_one() -> None:
    want = make_spec(
        poison={"rate": 0.1, "target": 2, "source": [0, 1]},
        train={"lr": 0.05, "epochs": 3, "nesterov": False},
        trigger={"name": "blend", "ratio": 0.2},
        model={"name": "pmoe", "widen_factor": 2},
        dataset={"name": "folder", "root": "data"},
        defenses=[{"name": "fine-tuning", "clean_fraction": 0.2}],
        seed=4,
        device="cpu",
    )
    got = make_spec(
        poison={"rate": np.float64(0.1), "target": torch.tensor(2), "source": np.array([0, 1])},
        train={"lr": np.float32(0.05), "epochs": np.int64(3), "nesterov": np.bool_(False)},
        trigger={"name": np.str_("blend"), "ratio": Fraction(1, 5)},
        model={"name": "pmoe", "widen_factor": np.int32(2)},
        dataset={"name": "folder", "root": Path("data")},
        defenses=({"name": "fine-tuning", "clean_fraction": Decimal("0.2")},),
        seed=np.int64(4),
        device=torch.device("cpu"),
    )
    assert got == want
    assert got.digest == want.digest and got.name == want.name
    assert json.dumps(got.to_dict()) == json.dumps(want.to_dict())


def test_parts_take_them_too() -> None:
    assert PartSpec("square", {"size": np.int64(2)}) == PartSpec("square", {"size": 2})
    assert create_trigger("square", size=np.int64(2)).size == 2


def test_parts_of_a_spec_made_directly_take_them_too() -> None:
    made = PoisonSpec(rate=np.float64(0.25), target=np.int64(2), source=np.array([0, 1]))
    assert made == PoisonSpec(rate=0.25, target=2, source=(0, 1)) and type(made.rate) is float
    assert PoisonSpec(rate="25%") == PoisonSpec(rate=0.25)
    assert type(TrainSpec(lr=np.float32(0.5)).lr) is float
    spec = dataclasses.replace(make_spec(), seed=np.int64(4), device=torch.device("cpu"))
    assert (type(spec.seed), spec.device) == (int, "cpu")
    with pytest.raises(ConfigError, match=r"poison\.rate: expected a number, got 'x'"):
        PoisonSpec(rate="x")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({1, 2}, "a value of type set"),
        (float("nan"), "nan"),
        ([1, {"a": float("-inf")}], "-inf"),
        (b"x", "a value of type bytes"),
        ({(1, 2): 3}, "a value that JSON cannot hold"),
    ],
    ids=str,
)
def test_an_option_that_json_cannot_hold_is_refused(value, got) -> None:
    with pytest.raises(
        ConfigError, match=rf"^square: size: expected strings, finite numbers, lists and mappings, got {got}"
    ):
        PartSpec("square", {"size": value})


def test_a_wrong_value_of_another_library_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: expected an integer, got 2\.5"):
        build_spec({"train": {"epochs": np.float64(2.5)}})


@pytest.mark.parametrize(
    "text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "1.0e-3", "0.1e-2", ".1e-2", "10e-4", "0.001"]
)
def test_a_number_with_an_exponent_is_a_number_in_yaml(tmp_path, text) -> None:
    assert parse_setting(f"train.lr={text}") == {"train": {"lr": 0.001}}
    (tmp_path / "run.yaml").write_text(f"train: {{lr: {text}}}\n")
    assert load_yaml(tmp_path / "run.yaml") == {"train": {"lr": 0.001}}


@pytest.mark.parametrize("text", ["1e", "e3", "1e3x", "v1e3", "'1e3'", "1e-3-s0", "1.2.e3"])
def test_what_only_looks_like_a_number_stays_a_text(text) -> None:
    assert parse_setting(f"dataset.root={text}") == {"dataset": {"root": text.strip("'")}}
