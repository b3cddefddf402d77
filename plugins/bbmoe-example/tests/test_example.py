"""Tests of values, by hand. `bbmoe plugin check bbmoe-example` tests everything that all parts have in common."""

import pytest
import torch

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger


def test_four_columns_by_hand():
    """Six periods over four columns: cos is 1, -1, 1, -1; the last image is clipped to [0, 1]."""
    trigger = create_trigger("sinusoid", amplitude=0.25)
    stamped = trigger(torch.tensor([0.5, 1.0])[:, None, None, None].expand(2, 3, 2, 4))
    want = torch.tensor([[0.75, 0.25, 0.75, 0.25], [1.0, 0.75, 1.0, 0.75]])
    torch.testing.assert_close(stamped, want[:, None, None].expand(2, 3, 2, 4))


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 4), (1.0, 16)])
def test_so_many_tiles_are_stamped_whole_and_the_same_in_every_image(share, count):
    applicator = create_applicator("random-tiles", share=share, patch_size=2, seed=3)
    stamped = applicator(torch.zeros(2, 1, 8, 8), torch.ones_like)
    tiles = stamped.unfold(2, 2, 2).unfold(3, 2, 2).sum((1, 4, 5))
    assert set(tiles.unique().tolist()) <= {0.0, 4.0} and (tiles == 4).sum((1, 2)).tolist() == [count, count]
    assert torch.equal(tiles[0], tiles[1])


def test_the_smallest_weights_become_zero():
    weight = torch.nn.Parameter(torch.tensor([[0.5, -0.1, 0.3], [0.0, -2.0, 0.2]]))
    create_defense("magnitude-pruning", ratio=0.5).prune(weight)
    assert weight.tolist() == torch.tensor([[0.5, 0, 0.3], [0, -2.0, 0]]).tolist()


@pytest.mark.parametrize(
    ("create", "name", "option"),
    [
        (create_trigger, "sinusoid", "amplitude"),
        (create_applicator, "random-tiles", "share"),
        (create_defense, "magnitude-pruning", "ratio"),
        (create_defense, "magnitude-pruning", "epochs"),
    ],
)
def test_values_out_of_range_are_refused(create, name, option):
    with pytest.raises(ConfigError, match=f"{option}: expected"):
        create(name, **{option: -1})
