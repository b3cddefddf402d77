"""Suggestions for misspelt names: near ones, and no others."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.wording.spelling import edit_distance, near_names

WORDS = st.text("abc-", max_size=7)


def distance_by_definition(a: str, b: str) -> int:
    """The recursive definition of the optimal string alignment distance."""

    @cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        ways = [d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1])]
        if i > 1 and j > 1 and (a[i - 1], a[i - 2]) == (b[j - 2], b[j - 1]):
            ways.append(d(i - 2, j - 2) + 1)
        return min(ways)

    return d(len(a), len(b))


@given(WORDS, WORDS)
def test_the_distance_is_the_defined_one(a, b) -> None:
    assert edit_distance(a, b) == distance_by_definition(a, b)


@given(WORDS, st.lists(WORDS, max_size=6))
def test_only_near_names_are_suggested_the_nearest_first(name, known) -> None:
    near = near_names(name, known)
    distances = [distance_by_definition(name, other) for other in near]
    assert distances == sorted(distances) and len(near) <= 3
    for other, distance in zip(near, distances, strict=True):
        begins = len(name) >= 3 and other.startswith(name)
        assert begins or distance <= max(1, max(len(name), len(other)) / 3)


@given(st.text("abcdefgh", min_size=4, max_size=9), st.data())
def test_one_slip_is_always_found(word, data) -> None:
    """A letter inserted, left out, replaced, or swapped with the next one."""
    place = data.draw(st.integers(0, len(word) - 2))
    head, tail = word[:place], word[place:]
    slips = [f"{head}z{tail}", head + tail[1:], f"{head}z{tail[1:]}", head + tail[1] + tail[0] + tail[2:]]
    for slip in slips:
        assert near_names(slip, [word, "something-far"]) == [word]


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("resnet50", ["pmoe", "vgg16_bn", "wide_resnet"], []),
        ("imagenet", ["signs", "cifar10", "gtsrb", "folder"], []),
        ("badnets", ["blend", "square", "warp"], []),
        ("adam", ["sgd", "adamw"], ["adamw"]),
        ("Fine_Pruning", ["fine-pruning", "fine-tuning"], ["fine-pruning", "fine-tuning"]),
        ("fine", ["strip", "fine-pruning", "fine-tuning"], ["fine-tuning", "fine-pruning"]),
        ("ba", ["bench", "batch"], []),
    ],
)
def test_far_names_are_not_suggested(name, known, near) -> None:
    assert near_names(name, known) == near
    message = str(UnknownNameError("model", name, known))
    assert ("did you mean" in message) == bool(near) and all(each in message for each in known)
