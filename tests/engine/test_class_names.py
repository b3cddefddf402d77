"""Classes by name: resolved to numbers before a digest is taken, refused with near names, never taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_spec

from backdoorbench_moe.config import PoisonSpec, build_spec, spec_from_dict
from backdoorbench_moe.data.base import describe_classes
from backdoorbench_moe.engine.class_names import (
    describe_poison,
    resolve_classes,
    warn_of_numeric_names,
)
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, UnknownNameError

CLASSES = ("cat", "dog", "Dog", "stop sign", "7")


def resolve(classes: Sequence[str] = CLASSES, **poison: object):
    return resolve_classes(build_spec({"poison": poison}), lambda: classes).poison


@pytest.mark.slow
@given(
    classes=st.lists(st.text("abXY ", min_size=1, max_size=4), unique=True, min_size=2, max_size=9),
    data=st.data(),
)
def test_a_run_has_one_digest_however_its_classes_are_written(classes, data) -> None:
    numbers = data.draw(st.permutations(range(len(classes))))
    target, source = numbers[0], numbers[1 : data.draw(st.integers(1, len(numbers)))]
    written = [
        data.draw(st.sampled_from([number, str(number), classes[number]])) for number in (target, *source)
    ]
    by_number = build_spec({"poison": {"target": target, "source": list(source)}})
    given_spec = build_spec({"poison": {"target": written[0], "source": written[1:]}})
    resolved = resolve_classes(given_spec, lambda: classes)
    assert resolved == by_number and resolved.digest == by_number.digest
    assert spec_from_dict(resolved.to_dict()) == by_number


def test_the_names_are_not_asked_for_where_none_is_named() -> None:
    spec = build_spec({"poison": {"target": 3, "source": ["1"]}})
    assert resolve_classes(spec, lambda: pytest.fail("asked")) is spec


def test_a_name_is_taken_as_written_then_without_regard_to_case() -> None:
    assert [resolve(target=name).target for name in ("dog", "Dog", "CAT", "Stop Sign")] == [1, 2, 0, 3]
    with pytest.raises(UnknownNameError, match=r"poison\.target: class: unknown 'DOG'"):
        resolve(target="DOG")  # Two classes differ from it in case only.


def test_digits_are_a_number_even_where_a_class_has_that_name() -> None:
    assert resolve(target="7").target == 7 and resolve(source=["7", "dog"]).source == (7, 1)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ({"target": "stop sing"}, r"poison\.target: class: unknown 'stop sing'; did you mean 'stop sign'"),
        ({"source": ["dog", "cta"]}, r"poison\.source: class: unknown 'cta'; did you mean 'cat'"),
        (
            {"target": "zebra"},
            r"unknown 'zebra'; known: 7, Dog, cat, dog, stop sign; or its number",
        ),
    ],
)
def test_unknown_names_are_refused_with_near_ones(poison, message) -> None:
    with pytest.raises(UnknownNameError, match=message):
        resolve(**poison)


def test_of_many_classes_not_all_are_listed() -> None:
    with pytest.raises(UnknownNameError) as caught:
        resolve([f"class {number}" for number in range(1000)], target="class 1O")
    assert "did you mean 'class 1" in str(caught.value) and "and 950 more" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_class_twice_is_found_once_by_name() -> None:
    with pytest.raises(ConfigError, match=r"poison\.source: expected each class once, got \(1, 1\)"):
        resolve(source=["dog", 1])


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (
            PoisonSpec(target=1),
            "poison.target: 1 is the number of class '2'; the class named '1' has number 0",
        ),
        (
            PoisonSpec(target=0, source=(2,)),
            "poison.source: 2 is the number of class '10'; the class named '2'",
        ),
    ],
)
def test_a_number_that_is_another_classes_name_is_said(poison, message) -> None:
    with pytest.warns(BbmoeWarning) as said:
        warn_of_numeric_names(poison, ("1", "2", "10"))
    assert len(said) == 1 and message in str(said[0].message)


def test_an_attack_says_it_before_it_trains(tmp_path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (32, 32), (50 * int(name), index, 0)).save(
                tmp_path / "data" / name / f"{index}.png"
            )
    spec = tiny_spec(dataset={"name": "folder", "root": str(tmp_path / "data")}, poison={"target": 1})
    with pytest.raises(BbmoeWarning, match="1 is the number of class '2'"):  # An error in the tests.
        run_attack(spec, output=tmp_path / "runs", twin=False)
    assert not (tmp_path / "runs").exists()


def test_numbers_that_are_no_other_classes_name_are_not() -> None:
    """A warning is an error in the tests."""
    warn_of_numeric_names(PoisonSpec(target=1, source=(0, 2)), ("0", "1", "2", "10"))
    warn_of_numeric_names(PoisonSpec(target=0), ("1", "2"))
    warn_of_numeric_names(PoisonSpec(target=1), ("cat", "dog"))


def test_classes_in_one_line() -> None:
    assert describe_classes(("cat", "dog")) == "2 classes: 0 (cat), 1 (dog)"
    many = describe_classes([f"c{number}" for number in range(43)])
    assert many.startswith("43 classes: 0 (c0), 1 (c1), ") and many.endswith("19 (c19), and 23 more")
    spec = PoisonSpec(target=1, source=(0,))
    assert describe_poison(spec, ("cat", "dog")) == "target: 1 (dog); source: 0 (cat)"
    assert "after" in describe_poison(replace(spec, mapping="all-to-all"), ("cat", "dog"))


def test_the_record_and_the_folder_have_the_number(tmp_path) -> None:
    spec = tiny_spec(poison={"target": "blue", "source": ["red"]})
    with pytest.raises(ConfigError, match="expected a class number"):
        _ = spec.digest
    Runner(spec, tmp_path).maker(spec)
    [run] = run_attack(spec, output=tmp_path, twin=False)
    numbered = tiny_spec(poison={"target": 2, "source": [0]})
    assert run.spec == numbered and run.folder.path.name == numbered.name
    assert run.record.poison["target"] == 2 and run.record.spec["poison"]["source"] == [0]


def test_a_target_among_the_sources_is_refused_where_it_changes_nothing(tmp_path) -> None:
    for poison in ({"target": "red", "source": [1, 0]}, {"target": 0, "source": ["red"]}):
        spec = tiny_spec(poison=poison)
        with pytest.raises(ConfigError, match=r"poison\.source: expected classes other than the target 0"):
            run_attack(spec, output=tmp_path)
    assert not list(tmp_path.iterdir())
    # Clean labels are only drawn from the target, and all-to-all changes every label.
    for poison in (
        {"labels": "clean", "source": [0, 1], "rate": 0.1},
        {"mapping": "all-to-all", "source": [0, 1]},
    ):
        spec = tiny_spec(poison=poison)
        Runner(spec, tmp_path).maker(spec)
