"""Groups of classes: every class in one, as even as possible, by the seed; and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.splitters import create_splitter
from backdoorbench_moe.splitters.classes import Classes


def test_numbered_groups_by_hand() -> None:
    splitter = create_splitter("classes", groups=4, order="numbered")
    assert splitter.names(10, 0) == ("classes 0, 1, 2", "classes 3, 4, 5", "classes 6, 7", "classes 8, 9")
    labels = torch.tensor([9, 0, 3, 2, 6, 1, 0, 8])
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    found = splitter(Split(images, labels), 0, num_classes=10, seed=0)
    assert found.images[:, 0, 0, 0].tolist() == [1, 3, 5, 6]
    assert found.labels.tolist() == [0, 2, 1, 0]


def test_names_of_few_and_of_many_classes() -> None:
    assert Classes(groups=3, order="numbered").names(3, 0) == ("class 0", "class 1", "class 2")
    names = Classes(groups=2, order="numbered").names(43, 0)
    assert names == ("classes 0, 1, 2, 3 and 18 more", "classes 22, 23, 24, 25 and 17 more")
    assert Classes(groups=2, order="numbered").names(12, 0)[1] == "classes 6, 7, 8, 9, 10, 11"


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_groups_are_an_even_partition(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 120))
    groups, seed = data.draw(st.integers(2, classes)), data.draw(st.integers(0, 2**31))
    order = data.draw(st.sampled_from(["drawn", "numbered"]))
    found = Classes(groups=groups, order=order).split_classes(classes, seed)
    assert len(found) == groups and all(group == sorted(group) for group in found)
    assert sorted(label for group in found for label in group) == list(range(classes))
    sizes = [len(group) for group in found]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    names = Classes(groups=groups, order=order).names(classes, seed)
    assert len(set(names)) == groups


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 20), st.integers(0, 1000))
def test_every_image_is_in_one_task(classes: int, seed: int) -> None:
    labels = torch.randint(0, classes, (200,), generator=torch.Generator().manual_seed(seed))
    labels[:classes] = torch.arange(classes)
    splitter = create_splitter("classes")
    given = {"num_classes": classes, "seed": seed}
    found = [splitter.find_members(labels, task, **given) for task in range(4)]
    assert torch.cat(found).sort().values.tolist() == list(range(200))
    training = [splitter.find_members(labels, task, training=True, **given) for task in range(4)]
    assert all(map(torch.equal, found, training))


def test_the_seed_draws_the_groups() -> None:
    drawn = {Classes().names(10, seed) for seed in range(20)}
    assert len(drawn) > 15
    numbered = {Classes(order="numbered").names(10, seed) for seed in range(20)}
    assert len(numbered) == 1


def test_every_pair_of_classes_is_as_likely_to_be_together() -> None:
    together = sum(
        any({0, 9} <= set(group) for group in Classes(groups=2).split_classes(10, seed))
        for seed in range(900)
    )
    # In groups of five of ten: p = 4 / 9. Standard deviation over 900 draws 14.9.
    assert abs(together - 400) < 4.5 * 14.9


def test_a_label_beyond_the_classes_is_in_no_task() -> None:
    """Such as the extra class of a policy."""
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    given = {"num_classes": 4, "seed": 0}
    found = torch.cat([create_splitter("classes").find_members(labels, task, **given) for task in range(4)])
    assert found.sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": 1}, ConfigError, "classes: groups: expected a number of at least 2, got 1"),
        ({"groups": 2.5}, ConfigError, "groups: expected an integer, got 2.5"),
        ({"order": "drawm"}, UnknownNameError, "order: unknown 'drawm'; did you mean 'drawn'"),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_splitter("classes", **options)


def test_a_wrong_order_without_the_registry() -> None:
    with pytest.raises(ConfigError, match="classes: order: expected 'drawn' or 'numbered', got 'other'"):
        Classes(order="other")  # type: ignore[arg-type]


def test_more_groups_than_classes() -> None:
    splitter = create_splitter("classes", groups=4)
    message = "classes: groups: expected at most 3, the number of classes, got 4"
    for call in (lambda: splitter.names(3, 0), lambda: splitter.check(4, 3, 0)):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("experts", [2, 3, 5, 8])
def test_the_number_of_experts_is_the_number_of_groups(experts: int) -> None:
    splitter = create_splitter("classes", groups=4)
    splitter.check(4, 10, 0)
    message = rf"classes: groups: expected {experts}, the number of experts \(mixture\.experts\), got 4"
    with pytest.raises(ConfigError, match=message):
        splitter.check(experts, 10, 0)


def test_a_group_without_images() -> None:
    splitter = create_splitter("classes", groups=2, order="numbered")
    message = r"classes: groups: expected images of every group, got none of task 1 \(classes 2, 3\) among 5"
    with pytest.raises(ConfigError, match=message):
        splitter.find_members(torch.zeros(5, dtype=torch.int64), 1, num_classes=4, seed=0)
