"""Neural Cleanse finds what was planted, judges by the anomaly index, and unlearns what was chosen."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from hypothesis import given
from hypothesis import strategies as st
from planted_models import CLASSES, TARGET, planted_model, planted_task, row_images

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.goals import ClassGoal
from backdoorbench_moe.defenses.inversion import Search, _Target, invert
from backdoorbench_moe.defenses.neural_cleanse import choose
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.outliers import anomaly_indices

SQUARE = torch.zeros(8, 8, dtype=torch.bool)
SQUARE[5:8, 5:8] = True
# The upper left pixel of every tile of 4x4.
DOTS = torch.zeros(8, 8, dtype=torch.bool)
DOTS[::4, ::4] = True
QUICK = {"epochs": 40, "batch_size": 20, "clean_fraction": 1.0}


def search(**given) -> Search:
    values = {
        "epochs": 6,
        "batch_size": 12,
        "success": 0.98,
        "patience": 2,
        "at_once": 3,
        "seed": 5,
    }
    return Search(**{**values, **given})


def class_goal(count: int) -> ClassGoal:
    return ClassGoal(planted_model(SQUARE, 3.0), row_images(count), "fp32", None, CLASSES)


def test_a_planted_square_of_3x3_is_found_in_the_right_class_and_place() -> None:
    task = planted_task(planted_model(SQUARE, 3.0), row_images(60))
    result = create_defense("neural-cleanse", unlearn="none", **QUICK)(task)
    [judgement] = result.judgements
    assert judgement.suspicious == [str(TARGET)] and judgement.scores[str(TARGET)] > 2
    assert judgement.details["success"][TARGET] >= 0.98 and result.stage == "inverted"
    masks = judgement.arrays["masks"]
    assert masks.shape == (CLASSES, 1, 8, 8) and judgement.arrays["patterns"].shape == (CLASSES, 3, 8, 8)
    mask = masks[TARGET, 0]
    assert mask[SQUARE].sum() > 0.9 * mask.sum()
    assert mask.sum().item() == pytest.approx(judgement.details["sizes"][TARGET], rel=1e-5)
    indices = anomaly_indices(judgement.details["sizes"])
    assert [judgement.scores[str(label)] for label in range(CLASSES)] == pytest.approx(list(indices))


def test_by_patch_one_tile_for_all_is_found() -> None:
    task = planted_task(planted_model(DOTS, 6.0), row_images(60))
    result = create_defense("neural-cleanse", applicator="patch", patch_size=4, unlearn="none", **QUICK)(task)
    [judgement] = result.judgements
    assert max(judgement.scores, key=judgement.scores.__getitem__) == str(TARGET)
    assert str(TARGET) in judgement.suspicious
    mask = judgement.arrays["masks"][TARGET, 0]
    assert mask.shape == (4, 4) and mask[0, 0] > 0.9 * mask.sum()


def test_classes_that_share_a_pass_get_what_each_gets_alone() -> None:
    goal = class_goal(36)
    together = invert(goal, range(3), search())
    for label in range(3):
        alone = invert(goal, [label], search(at_once=1))
        torch.testing.assert_close(together.values[label], alone.values[0], atol=1e-4, rtol=0)
        assert together.sizes[label] == pytest.approx(alone.sizes[0], abs=1e-3)
        assert together.epochs[label] == alone.epochs[0]


def test_by_default_as_many_classes_share_a_pass_as_stamp_640_images_of_32x32(monkeypatch) -> None:
    groups: list[list[int]] = []

    def record(goal, group, search):
        groups.append([each.number for each in group])
        return iter(())

    monkeypatch.setattr("backdoorbench_moe.defenses.inversion._search_group", record)
    goal = class_goal(6)
    invert(goal, range(6), search(at_once=None, batch_size=4096))
    invert(goal, range(6), search(at_once=None, batch_size=1 << 20))
    assert groups == [[0, 1], [2, 3], [4, 5]] + [[label] for label in range(6)]


def test_success_is_that_of_images_of_other_classes_stamped_by_hand() -> None:
    goal = class_goal(60)
    model, clean = goal.model, goal.clean
    found = invert(goal, [TARGET], search(epochs=3))
    mask, pattern = found.values[0, :1], found.values[0, 1:]
    others = clean.images[clean.labels != TARGET].float() / 255
    predicted = model((1 - mask) * others + mask * pattern).argmax(1)
    assert found.success == pytest.approx([(predicted == TARGET).double().mean().item()])


def test_images_of_the_class_itself_add_neither_loss_nor_hits() -> None:
    """Without a stamp, no image of another class is called the class; with a random one, all by a loop."""
    goal, rows, labels = class_goal(60), torch.arange(10, 40), [TARGET, 1]
    drawn = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for values in (drawn * torch.tensor([0.0, 1, 1, 1]).view(4, 1, 1), drawn):
        stamped = goal.stamp(rows, values)
        outcome = goal.outcome(stamped, rows, labels)
        for place, label in enumerate(labels):
            others = goal.clean.labels[rows] != label
            logits = goal.model(stamped[place][others])
            wanted = torch.full((len(logits),), label)
            expected = torch.nn.functional.cross_entropy(logits, wanted)
            assert outcome.losses[place].item() == pytest.approx(expected.item(), rel=1e-5)
            assert outcome.hits[place] == (logits.argmax(1) == label).sum() and outcome.counts[place] == len(
                logits
            )


def test_a_class_without_a_stamp_counts_as_if_it_covered_the_canvas() -> None:
    """A class whose logit is always lowest has no trigger at all."""
    model = planted_model(SQUARE, 3.0)
    with torch.no_grad():
        model.layer.bias[4] = -1e4
    task = planted_task(model, row_images(60))
    [judgement] = create_defense("neural-cleanse", unlearn="none", **QUICK)(task).judgements
    assert judgement.details["failed"] == [4] and judgement.details["sizes"][4] == 64
    assert judgement.scores["4"] < 0 and judgement.suspicious == [str(TARGET)]


def test_the_model_is_left_as_it_was_found() -> None:
    model = used_model()
    model.head.weight.requires_grad_(False)
    before = copies(model)
    task, _ = make_task(model)
    create_defense("neural-cleanse", epochs=1, unlearn="none", applicator="patch")(task)
    assert not changed(before, copies(model))
    assert all(each.requires_grad == (each is not model.head.weight) for each in model.parameters())
    assert all(each.grad is None for each in model.parameters())


def test_unlearning_takes_away_a_backdoor_that_tuning_leaves() -> None:
    clean, held = row_images(120), row_images(120, seed=1)
    stamped = (clean.images[clean.labels != TARGET].float() / 255).masked_fill(SQUARE, 1.0)
    rates = {}
    options = {"epochs": 30, "batch_size": 40, "unlearn_epochs": 20}
    for name, chosen in (("neural-cleanse", options), ("fine-tuning", {"epochs": 20})):
        model = planted_model(SQUARE, 1.5)
        assert (model(stamped).argmax(1) == TARGET).all()
        create_defense(name, lr=2.0, clean_fraction=1.0, **chosen)(planted_task(model, clean))
        rates[name] = (model(stamped).argmax(1) == TARGET).double().mean().item()
        assert (model(held.images.float() / 255).argmax(1) == held.labels).double().mean() > 0.97
    assert rates["neural-cleanse"] < 0.1 and rates["fine-tuning"] > 0.9


@pytest.mark.parametrize(
    ("unlearn", "flagged", "chosen"),
    [
        ("flagged", [2], [2]),
        ("flagged", [], []),
        ("smallest", [2], [2]),
        ("smallest", [], [1]),
        ("all", [2], [0, 1, 2, 3]),
        ("none", [2], []),
    ],
)
def test_which_stamps_are_unlearned(unlearn, flagged, chosen) -> None:
    assert choose(unlearn, flagged, list(anomaly_indices([5.0, 3.0, 9.0, 4.0]))) == chosen


def test_nothing_flagged_and_nothing_to_unlearn_leaves_the_model_as_it_is() -> None:
    model = used_model()
    before = copies(model)
    task, _ = make_task(model)
    options = {"epochs": 1, "threshold": 1e9, "unlearn_epochs": 1}
    result = create_defense("neural-cleanse", unlearn="flagged", **options)(task)
    assert result.stage == "unlearned" and result.judgements[0].details["unlearned"] == []
    assert not changed(before, copies(result.model)) and not task.tune.history


def follow(rows: list[tuple[float, float]]) -> _Target:
    """A target after epochs with these sizes and shares of successes, patience 2."""
    each = _Target(0, torch.zeros(1))
    for size, success in rows:
        each.update(torch.zeros(1), size, success, search(epochs=100))
    return each


def test_the_weight_of_the_size_by_hand() -> None:
    assert follow([(9.0, 1.0)]).weight == 1e-3
    assert follow([(9.0, 1.0)] * 2).weight == 2e-3
    assert follow([(9.0, 1.0)] * 4).weight == 4e-3
    assert follow([(9.0, 0.5)] * 2).weight == pytest.approx(1e-3 / 2**1.5)
    assert follow([(9.0, 1.0), (9.0, 0.5), (9.0, 1.0)]).weight == 1e-3


def test_a_search_ends_when_the_weight_went_both_ways_and_the_size_no_longer_falls() -> None:
    rows = [(9.0, 1.0), (8.0, 1.0), (5.0, 0.9), (5.0, 0.9), (8.0, 1.0)]
    assert not follow(rows).done
    assert follow([*rows, (8.0, 1.0)]).done
    assert follow([*rows, (8.0, 1.0)]).size == 8.0
    assert not follow([*rows, (7.0, 1.0)]).done
    slow = [(9.0, 1.0), (8.97, 1.0), (8.97, 0.9), (8.97, 0.9), (8.94, 1.0)]
    assert follow(slow).done and not follow([*slow[:4], (8.9, 1.0)]).done
    assert not follow([(9.0, 1.0)] * 20).done, "the weight has only risen"
    assert not follow([(9.0, 0.1)] * 20).done, "there is no stamp yet"


@given(st.lists(st.tuples(st.floats(0, 64), st.floats(0, 1)), max_size=40))
def test_the_best_stamp_is_the_smallest_that_succeeds(rows) -> None:
    each = follow(rows)
    sizes = [size for size, success in rows if success >= 0.98]
    assert each.size == min(sizes, default=float("inf")) and (each.best is None) == (not sizes)
    assert each.weight > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"unlearn_epochs": 0}, "unlearn_epochs: expected an integer of at least 1"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"success": 1.0}, r"success: expected a number in \(0, 1\)"),
        ({"share": 0.0}, r"share: expected a number in \(0, 1\]"),
        ({"threshold": 0.0}, "threshold: expected a positive number"),
        ({"lr": float("nan")}, "lr: expected a positive number"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("neural-cleanse", **options)


@pytest.mark.parametrize("name", ["neural-cleanse", "tile-tuning", "i-bau"])
def test_tiles_that_do_not_cover_the_image_are_refused(name) -> None:
    for model in (used_model(), used_model("wide_resnet")):
        defense = create_defense(name, applicator="patch", patch_size=5)
        defense.check_images(model, 30)
        with pytest.raises(
            ConfigError, match="patch_size: expected a divisor of the image's 32 pixels, got 5"
        ):
            defense.check_images(model, 32)
        with pytest.raises(
            ConfigError, match="patch_size: expected a divisor of the image's 30 pixels, got 4"
        ):
            create_defense(name, applicator="patch").check_images(model, 30)
    with pytest.raises(ConfigError, match="patch_size: expected none for the applicator image, got 4"):
        create_defense(name, applicator="image", patch_size=4)
