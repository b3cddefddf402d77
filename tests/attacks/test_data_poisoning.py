"""Which training images are poisoned and what they are labelled, drawn or read from a file: worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.data_poisoning import DataPoisoning
from backdoorbench_moe.attacks.recorded import Recorded, write_plan
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError, PluginError

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])


def plan(seed: int = 0, **values: object) -> PoisonPlan:
    return DataPoisoning(poison=PoisonSpec(**values))(LABELS, num_classes=3, seed=seed)  # type: ignore[arg-type]


def test_everything_poisoned_is_called_the_target() -> None:
    made = plan(rate=1.0, target=2)
    assert made.indices.tolist() == list(range(10))
    assert made.labels.tolist() == [2] * 10


def test_all_to_all_moves_each_class_to_the_next() -> None:
    assert plan(rate=1.0, mapping="all-to-all").labels.tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 2]


def test_clean_labels_come_from_the_target_class_and_stay() -> None:
    drawn = [plan(seed, rate=0.2, target=0, labels="clean") for seed in range(20)]
    assert all(made.labels.tolist() == [0, 0] for made in drawn)
    assert {index for made in drawn for index in made.indices.tolist()} == {0, 3, 6}


def test_source_specific_takes_that_source_only() -> None:
    made = plan(rate=0.3, target=0, source=(2,))
    assert made.indices.tolist() == [2, 5, 8]
    assert made.labels.tolist() == [0, 0, 0]


def test_too_few_candidates_is_an_error_with_the_counts() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 of 10 images is 5, but only 3 images can be chosen"):
        plan(rate=0.5, source=(2,))


def test_the_draw_follows_the_seed_and_has_no_repeats() -> None:
    labels = torch.arange(1000) % 3
    attack = DataPoisoning(poison=PoisonSpec(rate=0.1))
    draws = [attack(labels, num_classes=3, seed=seed).indices for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert all(len(draw.unique()) == 100 for draw in draws)
    assert (labels[draws[0]] == 0).any()  # The target class is drawn from, too.


@pytest.mark.parametrize("values", [{"target": 3}, {"source": (0, 5)}, {"target": 1, "source": (1,)}])
def test_classes_the_data_do_not_have(values) -> None:
    with pytest.raises(ConfigError, match=r"poison\.(target|source)"):
        DataPoisoning(poison=PoisonSpec(**values)).check(3)


def test_clean_labels_leave_an_image_of_the_target_class_without_the_trigger() -> None:
    message = (
        r"poison\.rate: 0\.4 of 10 images is 4, which are all images of class 1; with poison\.labels=clean, the model "
        r"would see no image of this class without the trigger, so expected less than 0\.4$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(rate=0.4, target=1, labels="clean")
    assert len(plan(rate=0.3, target=1, labels="clean").indices) == 3
    assert plan(rate=1.0, target=1).indices.tolist() == list(range(10))  # Dirty labels may.


def test_clean_labels_need_two_images_of_the_target_class() -> None:
    attack = DataPoisoning(poison=PoisonSpec(rate=0.25, target=1, labels="clean"))
    with pytest.raises(ConfigError, match=r"poison\.target: class 1 has 1 training image; .* at least 2"):
        attack(torch.tensor([0, 1, 0, 2]), num_classes=3, seed=0)


def test_clean_labels_of_sources_without_the_target_have_no_candidates() -> None:
    with pytest.raises(ConfigError, match=r"poison\.rate: .* only 0 images can be chosen \(labels=clean"):
        plan(rate=0.2, target=0, labels="clean", source=(1,))


@given(
    rate=st.floats(0.01, 0.3), cover=st.floats(0, 0.3), noise=st.floats(0, 0.3), seed=st.integers(0, 2**31)
)
def test_groups_are_disjoint_and_rates_count_from_the_whole_set(rate, cover, noise, seed) -> None:
    labels = torch.arange(300) % 3
    spec = PoisonSpec(
        rate=rate, cover=cover if cover * 300 >= 1 else 0, noise=noise if noise * 300 >= 1 else 0
    )
    made = DataPoisoning(poison=spec)(labels, num_classes=3, seed=seed)
    groups = [set(group.tolist()) for group in made.groups.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert list(map(len, groups)) == [spec.count(300, each) for each in ("rate", "cover", "noise")]


def test_cover_and_noise_do_not_change_who_is_poisoned() -> None:
    assert (
        plan(rate=0.3, target=1).indices.tolist()
        == plan(rate=0.3, target=1, cover=0.3, noise=0.3).indices.tolist()
    )


def test_each_group_has_a_draw_of_its_own() -> None:
    """Alone, each could be any three of the ten images: all three agree for one seed in 14,400."""
    for seed in range(3):
        drawn = [plan(seed, **{"rate": 0.0, group: 0.3}).groups[group] for group in ("cover", "noise")]
        drawn.append(plan(seed, rate=0.3).indices)
        assert len({tuple(group.tolist()) for group in drawn}) > 1


def test_the_cover_of_a_source_specific_attack_comes_from_other_classes() -> None:
    made = plan(rate=0.2, target=0, source=(2,), cover=0.7)
    assert set(LABELS[made.indices].tolist()) == {2} and set(LABELS[made.cover].tolist()) == {0, 1}
    with pytest.raises(
        ConfigError, match=r"poison\.cover: 0\.8 of 10 images is 8, but only 7 images can be chosen"
    ):
        plan(rate=0.2, target=0, source=(2,), cover=0.8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target": 0},
            r"poison\.target: expected test images of other classes than the target 0 \(source=all\)",
        ),
        (
            {"mapping": "all-to-all"},
            r"poison\.mapping: expected at least 2 classes, and test images \(source=all\)",
        ),
    ],
)
def test_with_one_class_there_is_no_asr(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        DataPoisoning(poison=PoisonSpec(**values)).counted(torch.zeros(5, dtype=torch.int64), 1)


class Broken(Attack):
    """Returns what it is told to."""

    made: object = None

    def plan(self, labels, num_classes, seed):
        """Return it."""
        return self.made


INDICES = torch.tensor([1, 4])
BAD = {
    "nothing": (None, "expected a PoisonPlan, got None"),
    "twice": (PoisonPlan(torch.tensor([4, 4]), torch.tensor([0, 0])), "int64 indices in ascending order"),
    "two groups": (PoisonPlan(INDICES, torch.tensor([0, 0]), cover=torch.tensor([4])), "in two of them"),
    "outside": (PoisonPlan(torch.tensor([1, 10]), torch.tensor([0, 0])), r"indices in 0\.\.9"),
    "no class": (PoisonPlan(INDICES, torch.tensor([0, 3])), r"a label in 0\.\.2"),
    "a label short": (PoisonPlan(INDICES, torch.tensor([0])), r"a label in 0\.\.2"),
    "labels that are no integers": (
        PoisonPlan(INDICES, torch.tensor([0.5, 1.0])),
        r"a label in 0\.\.2 for each poisoned image, int64",
    ),
    "a list of labels": (PoisonPlan(INDICES, [0, 1]), r"a label in 0\.\.2 for each poisoned image, int64"),
    "a list of indices": (PoisonPlan([1, 4], torch.tensor([0, 0])), "int64 indices in ascending order"),
}


@pytest.mark.parametrize(("made", "message"), BAD.values(), ids=BAD.keys())
def test_a_plan_that_is_not_one_is_refused(made, message) -> None:
    attack = Broken(poison=PoisonSpec())
    attack.made = made
    with pytest.raises(PluginError, match=message):
        attack(LABELS, num_classes=3, seed=0)


@pytest.mark.parametrize("values", [{"target": "dog"}, {"target": 0, "source": ("dog",)}])
def test_a_class_whose_name_was_not_replaced_by_its_number_is_refused(values) -> None:
    attack = DataPoisoning(poison=PoisonSpec(**values))
    for ask in (lambda: attack.check(3), lambda: attack.counted(LABELS, 3)):
        with pytest.raises(ConfigError, match=r"poison\.(target|source): expected a class number .*'dog'"):
            ask()


@pytest.mark.parametrize(("indices", "outside"), [([-1, 5], -1), ([2, 10], 10), ([-3, 12], -3)])
def test_a_recorded_place_outside_of_the_training_set_is_named(indices, outside, tmp_path) -> None:
    write_plan(tmp_path / "plan", PoisonPlan(torch.tensor(indices), torch.zeros(2, dtype=torch.int64)))
    attack = Recorded(poison=PoisonSpec(), file=str(tmp_path / "plan"))
    with pytest.raises(ConfigError, match=rf"attack\.file: expected places in 0\.\.9, got {outside}$"):
        attack(LABELS, num_classes=3, seed=0)


def test_recorded_places_up_to_the_last_are_taken(tmp_path) -> None:
    made = PoisonPlan(torch.tensor([0, 9]), torch.tensor([2, 2]), cover=torch.tensor([4]))
    write_plan(tmp_path / "plan", made)
    found = Recorded(poison=PoisonSpec(), file=str(tmp_path / "plan"))(LABELS, num_classes=3, seed=0)
    assert (found.indices.tolist(), found.cover.tolist()) == ([0, 9], [4])
