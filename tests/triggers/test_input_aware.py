"""The input-aware trigger: its formula, its losses by hand, and its networks beside the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.testing.making import batch
from backdoorbench_moe.triggers.input_aware import Generator, InputAware, diversity_loss


class Constant(nn.Module):
    """A network that answers with one value for the left half of an image and another for the right half."""

    def __init__(self, channels: int, left: float, right: float) -> None:
        super().__init__()
        self.channels, self.left, self.right = channels, left, right

    def forward(self, images):
        maps = torch.full((len(images), self.channels, *images.shape[-2:]), self.right)
        maps[..., : images.shape[-1] // 2] = self.left
        return maps


def trigger_with(pattern: nn.Module, mask: nn.Module, **options) -> InputAware:
    trigger = InputAware(channels=2, **options)
    trigger.networks["pattern"], trigger.networks["mask"] = pattern, mask
    return trigger


def test_a_masked_pixel_is_the_patterns_and_others_stay() -> None:
    """A raw mask of 1 is tanh(10) / 2 + .5, almost 1; one of .5 is .5; one of 0 almost 0."""
    images = batch(2, 3, 4, 6)
    stamped = trigger_with(Constant(3, 0.2, 0.8), Constant(1, 1.0, 0.0))(images)
    torch.testing.assert_close(stamped[..., :3], torch.full((2, 3, 4, 3), 0.2), atol=1e-6, rtol=0)
    torch.testing.assert_close(stamped[..., 3:], images[..., 3:], atol=1e-6, rtol=0)
    half = trigger_with(Constant(3, 0.2, 0.2), Constant(1, 0.5, 0.5))(images)
    torch.testing.assert_close(half, (images + 0.2) / 2, atol=1e-6, rtol=0)


def test_the_stamp_of_another_image() -> None:
    trigger = InputAware(channels=2, seed=3)
    images, others = batch(2, 3, 8, 8), batch(4, 3, 8, 8)[2:]
    pattern, mask = trigger.networks["pattern"](others), trigger.networks["mask"](others)
    mask = (mask * 20 - 10).tanh() / 2 + 0.5
    expected = images * (1 - mask) + pattern * mask
    torch.testing.assert_close(trigger.stamp_from(images, others), expected, atol=1e-5, rtol=0)


def test_diversity_by_hand() -> None:
    """Images .5 and .1 apart, maps .25 and .2 apart: (2 + .5) / 2."""
    zeros = torch.zeros(2, 3, 4, 4)
    others = torch.cat([torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.1)])
    maps = torch.cat([torch.full((1, 1, 4, 4), 0.25), torch.full((1, 1, 4, 4), 0.2)])
    assert diversity_loss(zeros, others, maps, 0 * maps).item() == pytest.approx(1.25, rel=1e-4)
    same = zeros.requires_grad_()
    diversity_loss(same, same, same, same).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_the_loss_of_the_mask_by_hand() -> None:
    """Half of the mask at almost 1, half at almost 0: the mean of relu(m - .032) is .968 / 2."""
    images = batch(2, 3, 4, 6)
    trigger = trigger_with(Constant(3, 0, 0), Constant(1, 1.0, 0.0), diversity=0.0, norm=100.0)
    assert trigger.pretrain_loss(images, images.flip(0)).item() == pytest.approx(48.4, rel=1e-4)


def test_the_joint_loss_by_hand() -> None:
    """Patterns are half as far apart as the images: a ratio of 2, times 3. The masks are equal, and do not matter."""

    class Half(nn.Module):
        def forward(self, images):
            return images / 2

    images = batch(2, 3, 4, 6)
    trigger = trigger_with(Half(), Constant(1, 1.0, 0.0), diversity=3.0)
    assert trigger.joint_loss(images, images.flip(0)).item() == pytest.approx(6, rel=1e-4)


def test_the_networks_have_the_parameters_of_the_published_ones() -> None:
    """3x3 convolutions with bias and a batch norm each: 32, 32, 64, 64, 128, 128; 128; 128, 64, 64, 32, 32, out."""
    widths = [3, 32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32]
    for out in (3, 1):
        pairs = zip(widths, [*widths[1:], out], strict=True)
        expected = sum(9 * before * after + after + 2 * after for before, after in pairs)
        assert sum(p.numel() for p in Generator(out, 32).parameters()) == expected


def test_a_state_makes_another_object_the_same_trigger() -> None:
    images = batch(2, 3, 16, 16)
    first, other = (InputAware(channels=2, seed=seed) for seed in (0, 1))
    assert not first.learned
    assert not torch.equal(first(images), other(images))
    other.load_state(first.networks.state_dict())
    assert other.learned and torch.equal(first(images), other(images))
    with pytest.raises(ConfigError, match=r"InputAware: weight .pattern.*expected shape"):
        InputAware(channels=4).load_state(first.networks.state_dict())
    with pytest.raises(ConfigError, match="is missing"):
        other.load_state({})


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0},
        {"channels": 0},
        {"channels": 10**6},
        {"mask_epochs": 0},
        {"lr": 0},
        {"diversity": -1},
        {"norm": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=f"input-aware: {next(iter(options))}: expected"):
        InputAware(**options)


def test_images_without_colour_are_refused() -> None:
    with pytest.raises(ShapeError, match="InputAware: expected images of 3 channels, got 1"):
        InputAware(channels=2)(batch(2, 1, 8, 8))
