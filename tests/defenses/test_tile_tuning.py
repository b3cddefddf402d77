"""Tuning with random tiles: what is stamped in each batch, and that it works without the trigger."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import copies, make_task, used_model
from planted_pattern import accuracy, planted
from torch import nn

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.random_stamps import (
    KINDS,
    apply_all,
    draw_stamps,
    stamp_at_random,
    strengthen,
)
from backdoorbench_moe.defenses.stamped_tuning import stamped_objective
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.patches import tile
from backdoorbench_moe.testing.making import batch


class Mean(nn.Module):
    """Logits are the means of the colours; remembers its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images.mean((2, 3))


def test_the_first_part_of_a_batch_is_stamped_and_all_labels_stay() -> None:
    images, labels, model = batch(10, 3, 8, 8), torch.arange(10) % 3, Mean()
    logits, loss = stamped_objective(lambda part: 1 - part, 0.3)(model, images, labels)
    assert torch.equal(model.seen, torch.cat([1 - images[:3], images[3:]]))
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(model.seen.mean((2, 3)), labels).item())
    assert torch.equal(logits, model.seen.mean((2, 3)))


def test_a_share_of_less_than_half_an_image_stamps_none() -> None:
    images, model = batch(2, 3, 8, 8), Mean()
    stamped_objective(lambda part: 1 - part, 0.2)(model, images, torch.tensor([0, 1]))
    assert torch.equal(model.seen, images)


def test_auxiliary_losses_of_routed_layers_are_added() -> None:
    class Routed(RoutedModel):
        def forward_routed(self, images):
            gates = torch.ones(len(images), 1, 1)
            losses = (torch.tensor(0.25), None, torch.tensor(0.5))
            routing = [Routing(f"layer{n}", gates, gates > 0, aux) for n, aux in enumerate(losses)]
            return RoutedOutput(images.mean((2, 3)), routing)

    images, labels = batch(6, 3, 8, 8), torch.arange(6) % 3
    logits, loss = stamped_objective(lambda part: part, 0.5)(Routed(), images, labels)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item() + 0.75)


@pytest.mark.parametrize("name", KINDS)
def test_one_tile_for_all_tiles_of_all_images_and_another_in_the_next_batch(name) -> None:
    """On images of equal tiles, the stamped tiles are equal, too."""
    torch.manual_seed(0)
    images = batch(1, 3, 4, 4).repeat(5, 1, 2, 3)
    first, second = (stamp_at_random(name, 4, images) for _ in range(2))
    for stamped in (first, second):
        tiles = tile(stamped, 4)
        torch.testing.assert_close(tiles, tiles[:1].expand_as(tiles))
    assert not torch.equal(first, second) and not torch.equal(first, images)


def test_opaque_pixels_replace_and_a_blend_covers_the_tile() -> None:
    """Two images with the same stamp, black and white: their distance is the share of the image that is left."""
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    left = {
        name: torch.stack([stamp_at_random(name, 4, images).diff(dim=0)[0, 0] for _ in range(200)])
        for name in ("opaque", "blend")
    }
    assert set(left["opaque"].unique().tolist()) == {0.0, 1.0}
    assert 0.68 < left["opaque"].mean() < 0.82, "the mean of a chance in [0, 0.5) is 0.25"
    torch.testing.assert_close(left["blend"].amax((1, 2)), left["blend"].amin((1, 2)))
    assert left["blend"].min() >= 0.4 - 1e-6 and 0.65 < left["blend"].mean() < 0.75


def test_saturated_stamps_have_colours_of_0_and_1() -> None:
    """On grey images, an opaque stamp shows its colours; the same for all pixels or not is decided for each stamp."""
    torch.manual_seed(0)
    images = torch.full((1, 3, 4, 4), 0.5)

    def are_saturated(chance: float) -> list[bool]:
        stamped = [stamp_at_random("opaque", 4, images, chance) for _ in range(100)]
        shown = [each[each != 0.5] for each in stamped if (each != 0.5).any()]
        return [bool(colours.frac().eq(0).all()) for colours in shown]

    assert all(are_saturated(1.0)) and not any(are_saturated(0.0))
    assert 0.3 < sum(found := are_saturated(0.5)) / len(found) < 0.7


@pytest.mark.parametrize("name", KINDS)
def test_a_strengthened_stamp_moves_along_the_sign_of_the_gradient(name) -> None:
    """The loss is the brightness of the left half minus that of the right one, so colours move to 1 and to 0."""
    images = torch.rand(3, 3, 8, 8)
    sign = torch.cat([torch.ones(2), -torch.ones(2)]).repeat(2)
    for seed in range(20):
        torch.manual_seed(seed)
        [before] = draw_stamps(name, 4, images)
        [after] = strengthen([before], lambda stamped: (stamped * sign).sum())
        assert after.mask is before.mask
        assert before.lowest <= after.values.min() <= after.values.max() <= 1
        moved = after.values - before.values
        if name == "blend":
            step = moved.abs().max()
            expected = (before.values + step * sign[:4]).clamp(0, 1)
            torch.testing.assert_close(after.values, expected)
        assert (moved != 0).any() or name == "opaque", "an opaque stamp may cover no pixel"
        assert ((apply_all([after]) - apply_all([before])) * sign).sum() >= 0 or name == "warp"


@pytest.mark.parametrize("side", [4, None])
def test_all_kinds_share_the_images(side) -> None:
    torch.manual_seed(0)
    images = batch(7, 3, 8, 8)
    stamped = stamp_at_random("mixed", side, images)
    assert stamped.shape == images.shape and 0 <= stamped.min() <= stamped.max() <= 1
    assert ((stamped - images).flatten(1).abs().amax(1) > 0).all()
    assert stamp_at_random("mixed", side, images[:1]).shape == (1, 3, 8, 8)


def test_a_planted_tile_is_unlearned_and_not_by_plain_tuning_or_other_tiles() -> None:
    """A random tile has a share of any tile; independent random pixels of the whole image have less of it."""
    lost = {}
    for name, options in {
        "tiles": {"patch_size": 4},
        "image": {"applicator": "image"},
        "control": {},
    }.items():
        model, pattern, clean = planted("patch")
        images, labels = as_input(clean.images), clean.labels
        task, _ = make_task(model, clean=clean, batch_size=40)
        defense = "fine-tuning" if name == "control" else "tile-tuning"
        create_defense(defense, epochs=60, lr=1.0, **options)(task)
        assert accuracy(model, images, labels) == 1
        lost[name] = 2 - (model.head.weight[0] @ pattern.flatten()).item()
    assert lost["tiles"] > 0.3 and lost["image"] < 0.1 and abs(lost["control"]) < 0.01, "the weight was 2"


def test_the_model_is_tuned_on_the_true_labels_as_the_options_say() -> None:
    task, _ = make_task(used_model())
    seen = []

    def tune(model, split, **given) -> None:
        seen.append((split, given["epochs"], given["lr"]))

    object.__setattr__(task, "tune", tune)
    result = create_defense("tile-tuning", epochs=3, lr=0.2)(task)
    assert result.stage == "tuned" and not result.judgements
    assert seen == [(task.clean, 3, 0.2)]


def test_forms_and_applicators_give_different_models() -> None:
    found = []
    for options in (
        {},
        {"tiles": "opaque"},
        {"tiles": "blend"},
        {"applicator": "image"},
        {"share": 0.1},
        {"saturated": 1.0},
    ):
        model = used_model()
        create_defense("tile-tuning", epochs=1, **options)(make_task(model)[0])
        found.append(copies(model)["head.weight"])
    assert len({each.numpy().tobytes() for each in found}) == len(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"share": 1.5}, r"share: expected a number in \(0, 1\]"),
        ({"saturated": 1.5}, r"saturated: expected a number in \[0, 1\]"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"patch_size": 0}, "patch_size: expected"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("tile-tuning", **options).check_model(used_model())
