"""Augmentation against torchvision and kornia with the same draws, and its dependence on seed, epoch and place."""

from __future__ import annotations

import math

import kornia.augmentation as K
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as TF

from backdoorbench_moe.config.train import AUGMENTATIONS
from backdoorbench_moe.ops import augmentation
from backdoorbench_moe.ops.augmentation import STEPS, Augmentation
from backdoorbench_moe.ops.seeding import uniform_at

CPU = torch.device("cpu")


def make_images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, generator=generator)


def make_draws(count: int, number: int) -> torch.Tensor:
    return uniform_at(5, torch.arange(count), number)


def augment(images: torch.Tensor, steps=AUGMENTATIONS, seed=0, epoch=0, places=None) -> torch.Tensor:
    made = Augmentation(steps, seed, CPU)
    made.begin_epoch(epoch)
    return made(images, torch.arange(len(images)) if places is None else places)


def test_every_step_of_the_config_is_implemented() -> None:
    assert tuple(STEPS) == AUGMENTATIONS


def test_a_crop_is_torchvisions() -> None:
    images, draws = make_images(50, 8, 11), make_draws(50, 2)
    for image, draw, found in zip(images, draws, augmentation.crop(images, draws), strict=True):
        top, left = (math.floor(9 * each.item()) for each in draw)
        assert torch.equal(found, TF.crop(TF.pad(image, [4]), top, left, 8, 11))


def test_a_crop_reaches_every_place_equally_often() -> None:
    images = torch.zeros(8100, 1, 9, 9)
    images[:, :, 4, 4] = 1
    found = augmentation.crop(images, make_draws(8100, 2)).sum((0, 1))
    assert found.sum() == 8100
    # 81 places with 100 expected: chi-square with 80 degrees of freedom, whose 99.99% quantile is 134.
    assert ((found - 100) ** 2 / 100).sum() < 134


def test_half_of_the_images_are_flipped() -> None:
    images, draws = make_images(2000, 4, 6), make_draws(2000, 1)
    found = augmentation.flip(images, draws)
    flipped = (found == TF.hflip(images)).all((1, 2, 3))
    assert torch.equal(flipped, draws[:, 0] < 0.5)
    assert ((found == images).all((1, 2, 3)) == ~flipped).all()
    assert abs(flipped.sum().item() - 1000) < 100


@pytest.mark.parametrize("size", [(9, 9), (8, 14)])
def test_a_rotation_is_kornias(size) -> None:
    images, draws = make_images(20, *size), make_draws(20, 1)
    degrees = -10 + 20 * draws[:, 0]
    other = K.RandomRotation(10.0, p=1.0)
    params = {"degrees": degrees}
    matrix = other.compute_transformation(images, params, other.flags)
    expected = other.apply_transform(images, params, other.flags, matrix)
    torch.testing.assert_close(augmentation.rotate(images, draws), expected, atol=2e-5, rtol=0)


def test_colours_are_those_of_kornia_and_torchvision() -> None:
    images, draws = make_images(20, 6, 7), make_draws(20, 3)
    factors = 0.6 + 0.8 * draws
    names = ("brightness_factor", "contrast_factor", "saturation_factor")
    params = {name: factors[:, index] for index, name in enumerate(names)}
    params |= {"hue_factor": torch.zeros(20), "order": torch.tensor([0, 1, 2, 3])}
    other = K.ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0)
    found = augmentation.colour(images, draws)
    torch.testing.assert_close(found, other.apply_transform(images, params, other.flags), atol=1e-5, rtol=0)
    for image, (brightness, contrast, saturation), mine in zip(images, factors.tolist(), found, strict=True):
        changed = TF.adjust_brightness(image, brightness)
        changed = TF.adjust_saturation(TF.adjust_contrast(changed, contrast), saturation)
        # torchvision's weights have four digits.
        torch.testing.assert_close(mine, changed, atol=1e-3, rtol=0)


def test_a_rectangle_by_hand() -> None:
    """On 10x20: area .175 of 200 is 35, ratio 1 (the middle of the logarithms of .3 and 3.3 is .995): 6x6."""
    images = torch.ones(2, 3, 10, 20)
    draws = torch.tensor([[0.49, 0.5, 0.5, 0.999, 0.0], [0.5, 0.5, 0.5, 0.0, 0.0]])
    found = augmentation.erase(images, draws)
    expected = torch.ones(2, 3, 10, 20)
    expected[0, :, 4:10, 0:6] = 0
    assert torch.equal(found, expected)


def test_erased_areas_are_those_of_kornia() -> None:
    """Kornia draws from torch's generator: the same distribution of areas, not the same numbers."""
    images = torch.ones(4000, 3, 32, 32)
    torch.manual_seed(0)
    other = K.RandomErasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), p=0.5)(images)
    mine = augmentation.erase(images, make_draws(4000, 5))
    shares = [(each[:, 0] == 0).double().mean((1, 2)) for each in (mine, other)]
    for share in shares:
        assert abs((share > 0).double().mean() - 0.5) < 0.03
    means = [share[share > 0].mean().item() for share in shares]
    assert means[0] == pytest.approx(means[1], abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.permutations(AUGMENTATIONS), st.integers(4, 12), st.integers(4, 12), st.integers(0, 2**63 - 1))
def test_any_steps_keep_shape_and_range(steps, height, width, seed) -> None:
    images = make_images(5, height, width)
    before = images.clone()
    found = augment(images, steps, seed)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(images, before)


def test_draws_depend_on_seed_epoch_and_place_and_not_on_the_batch() -> None:
    images = make_images(12, 8, 8)
    whole = augment(images, seed=3, epoch=2)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for part in order.split(5):
        torch.testing.assert_close(augment(images[part], seed=3, epoch=2, places=part), whole[part])
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    same = make_images(1, 8, 8).expand(12, -1, -1, -1)
    assert len(augment(same).flatten(1).unique(dim=0)) == 12, "all places have the same draws"
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 1}):
        assert not torch.isclose(augment(images, **other), whole).all((1, 2, 3)).any()


def test_a_step_draws_the_same_beside_other_steps() -> None:
    """So that ablations differ in the step alone."""
    images = make_images(20, 8, 8)
    cropped = augment(images, ("crop",))
    both = augment(images, ("crop", "flip"))
    same = (cropped == both).all((1, 2, 3)) | (cropped.flip(-1) == both).all((1, 2, 3))
    assert same.all()


def test_every_step_has_draws_of_its_own() -> None:
    """Otherwise the images that are flipped would be those that turn clockwise, as both are drawn below 0.5."""
    images = make_images(1, 8, 8).expand(400, -1, -1, -1)
    found = augment(images, ("flip", "rotate"))
    rotated = [augment(each, ("rotate",)) for each in (images, images.flip(-1))]
    flipped = torch.isclose(found, rotated[1]).all((1, 2, 3))
    assert (flipped ^ torch.isclose(found, rotated[0]).all((1, 2, 3))).all()
    clockwise = augmentation.rotate(images, torch.full((400, 1), 0.25))
    counter = augmentation.rotate(images, torch.full((400, 1), 0.75))
    turns = (rotated[0] - clockwise).square().sum((1, 2, 3)) < (rotated[0] - counter).square().sum((1, 2, 3))
    # Independent halves: 100 of each of the four kinds, with a standard deviation of 8.7.
    for one in (flipped, ~flipped):
        for other in (turns, ~turns):
            assert abs((one & other).sum().item() - 100) < 4.5 * 8.7


def test_an_epoch_changes_the_numbers_in_place() -> None:
    """A CUDA graph reads them where they were at its capture."""
    made = Augmentation(("crop", "flip"), 0, CPU)
    place = made._seeds.data_ptr()
    made.begin_epoch(1)
    assert made._seeds.data_ptr() == place


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_augments_as_the_cpu_does_also_in_a_graph() -> None:
    images, places = make_images(16, 32, 32), torch.arange(16)
    made = Augmentation(AUGMENTATIONS, 3, torch.device("cuda"))
    static, out = images.cuda(), places.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made(static, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = made(static, out)
    for epoch in (0, 1):
        made.begin_epoch(epoch)
        graph.replay()
        expected = augment(images, seed=3, epoch=epoch)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)
