"""Usage by hand, who is masked, and how."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model
from layered import Layered, Masking

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.reroute import expert_usage
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import mute


class Alternating(Masking):
    """Half of the images (those whose first pixel is bright) are routed with other gates."""

    def forward_routed(self, images):
        """Route each half by its own gates."""
        output = super().forward_routed(images)
        bright = images[:, 0, 0, 0] > 0.5
        for routing in output.routing:
            routing.gates[bright] = torch.tensor([0.2, 0.1, 0.7])[:, None]
            routing.selected[bright] = torch.tensor([False, False, True])[:, None]
        return output


def by_hand(threshold=0.5):
    """Six dark images and two bright ones; two layers.

    Dark, first layer: gates 0.6, 0.3, 0.1, the first is selected for all patches; second: the second, with 0.5.
    Bright: the third with 0.7 in both. Mass per image and patch, mean over images: first layer 0.45, 0, 0.175;
    second 0, 0.375, 0.175. As multiples of the layer's mean: 2.16, 0, 0.84 and 0, 2.0454.., 0.9545...
    """
    clean = held_images(8)
    clean.images[:, 0, 0, 0] = torch.tensor([0] * 6 + [255] * 2)
    model = Alternating([0.6, 0.3, 0.1], [0.25, 0.5, 0.25]).eval()
    task, _ = make_task(model, clean=clean)
    return model, task, create_defense("reroute", threshold=threshold)


def test_usage_by_hand() -> None:
    _, task, _ = by_hand()
    assert expert_usage(task) == pytest.approx(
        {
            **{"layers/0/0": 2.16, "layers/0/1": 0.0, "layers/0/2": 0.84},
            **{"layers/1/0": 0.0, "layers/1/1": 45 / 22, "layers/1/2": 21 / 22},
        }
    )


@pytest.mark.parametrize(
    ("threshold", "masked"),
    [
        (0.5, ["layers/0/1", "layers/1/0"]),
        (0.9, ["layers/0/1", "layers/0/2", "layers/1/0"]),
        (1.0, ["layers/0/1", "layers/0/2", "layers/1/0", "layers/1/2"]),
    ],
)
def test_those_below_the_threshold_are_masked(threshold, masked) -> None:
    model, task, defense = by_hand(threshold=threshold)
    result = defense(task)
    [judged] = result.judgements
    assert judged.about == "expert" and judged.suspicious == masked and result.stage == "rerouted"
    assert result.judgements[0].scores == pytest.approx(expert_usage(by_hand()[1]))
    off = [(model.layers[n].bias == -torch.inf).nonzero().flatten().tolist() for n in (0, 1)]
    assert [f"layers/{n}/{e}" for n in (0, 1) for e in off[n]] == masked


def test_a_model_that_cannot_mask_has_them_muted() -> None:
    bare = Layered([0.6, 0.3, 0.1], [0.25, 0.5, 0.25])
    before = copies(bare)
    result = create_defense("reroute")(make_task(bare)[0])
    assert result.judgements[0].suspicious == ["layers/0/1", "layers/0/2", "layers/1/0", "layers/1/2"]
    assert changed(before, copies(bare)) == {"layers.0.vectors", "layers.1.vectors"}
    assert (bare.layers[0].vectors == 0).all(1).tolist() == [False, True, True]


def test_a_token_whose_expert_is_masked_goes_to_the_next_best() -> None:
    """Under the gates 0.6, 0.3, 0.1 with the first masked, the second takes all."""
    model = Masking([0.6, 0.3, 0.1]).eval()
    model.mask_expert(model.experts()[0])
    [routing] = model.forward_routed(torch.zeros(1, 3, 32, 32)).routing
    assert routing.selected.any(2).tolist() == [[False, True, False]]
    torch.testing.assert_close(routing.gates[0, :, 0], torch.tensor([0.0, 0.75, 0.25]))


def test_of_a_layer_used_alike_nobody_is_masked_and_the_most_used_never() -> None:
    model = used_model()
    with torch.no_grad():
        model.moe.router.weight.zero_()
    before = copies(model)
    result = create_defense("reroute", threshold=1.0)(make_task(model)[0])
    assert result.judgements[0].scores == pytest.approx({f"moe/{e}": 1.0 for e in range(4)})
    assert len(result.judgements[0].suspicious) < 4
    result = create_defense("reroute")(make_task(model)[0])
    assert result.judgements[0].suspicious == [] and not changed(before, copies(model))


def test_a_muted_expert_is_not_the_one_that_stays() -> None:
    """Expert 2 has the sharpest gates, but is mute; of the others, which are used alike, the first stays."""
    model = used_model()
    with torch.no_grad():
        model.moe.router.weight.zero_()
        model.moe.router.weight[2] = 1e4
    mute(model, [model.experts()[2]])
    [judged] = create_defense("reroute", threshold=1.0)(make_task(model)[0]).judgements
    assert max(judged.scores, key=judged.scores.__getitem__) == "moe/2"
    assert judged.suspicious == ["moe/1", "moe/3"]


def test_pmoe_mutes_the_expert_whose_gates_are_flattest() -> None:
    """Gates of zero weights are 1/64 each, so 16 of them hold a quarter; sharp ones hold nearly all."""
    model = used_model()
    with torch.no_grad():
        model.moe.router.weight.mul_(1e4)
        model.moe.router.weight[2] = 0
    result = create_defense("reroute", threshold=0.5)(make_task(model)[0])
    assert result.judgements[0].suspicious == ["moe/2"]
    assert (model.moe.conv.weight == 0).flatten(1).all(1).reshape(4, 5).all(1).tolist() == [
        *(False, False, True, False)
    ]


def test_bad_values_are_refused() -> None:
    for value in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"threshold: expected a number in \(0, 1\]"):
            create_defense("reroute", threshold=value)
    with pytest.raises(ConfigError, match="model: expected a routed model"):
        create_defense("reroute").check(used_model("wide_resnet"))
