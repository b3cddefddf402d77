"""The domains: each transform by hand and against Pillow or NumPy, the share, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.splitters import create_splitter
from backdoorbench_moe.splitters.domains import TRANSFORMS

ALL = (
    *("plain", "rotated", "inverted", "grey-blurred"),
    *("recoloured", "embossed", "night", "pixelated"),
    *("fog", "red-lit", "edges"),
)
PICTURES = arrays(
    np.uint8, st.tuples(*[st.integers(1, 3), st.just(3), *[st.shared(st.integers(1, 40), key="s")] * 2])
)


def show(domain: str, images: Tensor) -> Tensor:
    """Images in a domain, (N, 3, S, S) uint8."""
    return create_splitter("domains", domains=(domain,)).transform_images(images, 0)


def grey_of(rows: list[list[int]]) -> Tensor:
    """An image with equal channels."""
    return torch.tensor(rows, dtype=torch.uint8).expand(1, 3, -1, -1).clone()


def draw(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=draws, dtype=torch.uint8)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def test_the_order_of_the_domains() -> None:
    """Another order is another task for every expert."""
    assert create_splitter("domains").names(10, 0) == ALL == tuple(TRANSFORMS)


# ---- each transform --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("plain", [[0, 50], [100, 200]]),
        ("rotated", [[50, 200], [0, 100]]),
        ("inverted", [[255, 205], [155, 55]]),
        ("recoloured", [[0, 50], [100, 200]]),
        ("pixelated", [[88, 88], [88, 88]]),  # 350 / 4 = 87.5
        ("grey-blurred", [[88, 88], [88, 88]]),
        ("fog", [[166, 181], [196, 226]]),  # 0.3 * 0 + 0.65 * 255 = 165.75, 180.75, 195.75, 225.75
        ("embossed", [[128, 178], [228, 255]]),  # 128 + 0, 50 - 0, 100 - 0, 200 - 0 with the upper left pixel
    ],
)
def test_an_image_of_four_pixels_by_hand(domain: str, expected: list[list[int]]) -> None:
    found = show(domain, grey_of([[0, 50], [100, 200]])).int()
    tolerance = 1 if domain in ("pixelated", "grey-blurred") else 0  # 87.5 is halfway between two levels.
    assert (found - torch.tensor(expected)).abs().max() <= tolerance


def test_colours_by_hand() -> None:
    image = torch.tensor([200, 100, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    expected = {
        "inverted": [55, 155, 215],
        "recoloured": [100, 40, 200],
        "grey-blurred": [123] * 3,  # 0.299 * 200 + 0.587 * 100 + 0.114 * 40 = 123.06
        # 255 * (200 / 255)**2 * 0.5 = 78.4; 255 * (100 / 255)**2 * 0.6 = 23.5; 255 * (40 / 255)**2 * 0.8 = 5.02
        "night": [78, 24, 5],
        "fog": [226, 196, 178],  # 0.3 * 200 + 165.75 = 225.75; 195.75; 177.75
        "red-lit": [200, 30, 12],
        "edges": [0] * 3,
        "embossed": [128] * 3,
        "pixelated": [200, 100, 40],
        "rotated": [200, 100, 40],
    }
    for domain, values in expected.items():
        found = show(domain, image)
        assert (found == torch.tensor(values).view(1, 3, 1, 1)).all(), domain


@settings(deadline=None, max_examples=40)
@given(PICTURES)
def test_exact_domains_are_what_numpy_does_with_8_bits(pixels: np.ndarray) -> None:
    images = torch.from_numpy(pixels)
    expected = {
        "plain": pixels,
        "rotated": np.rot90(pixels, 1, (2, 3)),
        "inverted": 255 - pixels,
        "recoloured": np.roll(pixels, -1, axis=1),
    }
    for domain, values in expected.items():
        assert np.array_equal(show(domain, images).numpy(), values), domain


@settings(deadline=None, max_examples=40)
@given(PICTURES)
def test_any_image_in_any_domain_is_an_image(pixels: np.ndarray) -> None:
    for domain in ALL:
        found = show(domain, torch.from_numpy(pixels))
        assert found.shape == pixels.shape and found.dtype == torch.uint8, domain


def test_embossing_is_pillows() -> None:
    """Pillow copies the border; inside, both are the same to the last bit.

    Pillow counts the rows of a kernel from below.
    """
    images, kernel = draw(), ImageFilter.Kernel((3, 3), (0, 0, 0, 0, 1, 0, -1, 0, 0), scale=1, offset=128)
    for found, picture in zip(show("embossed", images), pictures(images), strict=True):
        expected = np.asarray(picture.filter(kernel))
        assert np.array_equal(found.permute(1, 2, 0).numpy()[1:-1, 1:-1], expected[1:-1, 1:-1])


def test_grey_and_blurred_is_pillows() -> None:
    """Pillow rounds to 8 bits after each of three steps."""
    images = draw()
    for found, picture in zip(show("grey-blurred", images), pictures(images), strict=True):
        blurred = picture.convert("L").filter(ImageFilter.BoxBlur(1)).filter(ImageFilter.BoxBlur(1))
        difference = found[:, 2:-2, 2:-2].int() - torch.from_numpy(np.array(blurred)).int()[2:-2, 2:-2]
        assert difference.abs().max() <= 2


@pytest.mark.parametrize(("side", "radius"), [(16, 1), (32, 1), (63, 1), (64, 2), (96, 3)])
def test_the_blur_grows_with_the_image(side: int, radius: int) -> None:
    point = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    point[..., side // 2, side // 2] = 255
    found = show("grey-blurred", point)[0, 0, side // 2]
    width = 2 * radius + 1
    # Two boxes give a triangle; the rows together give its sum along the other axis at the peak.
    triangle = [*range(1, width), width, *range(width - 1, 0, -1)]
    levels = torch.tensor(triangle) * width * 255 / width**4
    assert (found[side // 2 - 2 * radius : side // 2 + 2 * radius + 1] - levels).abs().max() <= 0.5
    assert (found > 0).sum() <= 4 * radius + 1


@pytest.mark.parametrize(("side", "block"), [(8, 2), (32, 2), (33, 2), (48, 3), (50, 3), (64, 4)])
def test_blocks_are_means(side: int, block: int) -> None:
    images = draw(2, side)
    found = show("pixelated", images)
    for top in range(0, side, block):
        for left in range(0, side, block):
            part = (..., slice(top, top + block), slice(left, left + block))
            means = images[part].double().mean((2, 3), keepdim=True)
            assert (found[part] - means).abs().max() <= 0.5 + 1e-4


def test_edges_of_a_step_by_hand() -> None:
    """A step of 40 between two columns: a gradient of 40 / 2 in both, three times as bright; none elsewhere."""
    found = show("edges", grey_of([[100] * 4 + [140] * 4] * 6)).int()
    assert (found - torch.tensor([0, 0, 0, 60, 60, 0, 0, 0])).abs().max() == 0
    assert (found == show("edges", grey_of([[140] * 4 + [100] * 4] * 6))).all()
    assert (show("edges", grey_of([[0] * 4 + [255] * 4] * 6))[..., 3:5] == 255).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 255), st.integers(0, 255))
def test_night_is_dark_keeps_the_order_and_is_blue(one: int, other: int) -> None:
    low, high = sorted((one, other))
    found = show("night", grey_of([[low, high]])).int()
    assert (found[..., 0] <= found[..., 1]).all() and (found <= grey_of([[low, high]])).all()
    red, green, blue = found[0, :, 0, 1]
    assert red <= green <= blue


def test_images_of_one_grey_by_domain() -> None:
    """Five domains leave an image of one grey as it is: they move, swap or average equal values.

    The other six change it, and each in its own way.
    """
    still = {"plain", "rotated", "grey-blurred", "recoloured", "pixelated"}
    for value in (254, 100):
        image = torch.full((1, 3, 32, 32), value, dtype=torch.uint8)
        found = {domain: show(domain, image)[0, :, 9, 9].tolist() for domain in ALL}
        assert {domain for domain in ALL if found[domain] == [value] * 3} == still
        changed = [tuple(found[domain]) for domain in ALL if domain not in still]
        assert len(set(changed)) == len(changed) == 6


def test_classes_stay_distinct_on_images_that_differ_by_their_direction() -> None:
    """In no two domains does an arrow to the left look like an arrow to the right."""
    left = torch.full((1, 3, 32, 32), 40, dtype=torch.uint8)
    left[..., 14:18, 6:26] = 220
    left[..., 8:24, 6:10] = 220
    right = left.flip(3)
    for one in ALL:
        for other in ALL:
            assert not torch.equal(show(one, left), show(other, right)), (one, other)


# ---- the share -------------------------------------------------------------------------------------------
def take(count: int, task: int, *, training: bool = True, seed: int = 3, **options: object) -> list[int]:
    labels = torch.arange(count) % 3
    given = {"num_classes": 3, "seed": seed, "training": training}
    return create_splitter("domains", **options).find_members(labels, task, **given).tolist()


def test_a_share_is_drawn_for_each_task_and_only_for_training() -> None:
    drawn = [take(200, task, share=0.25) for task in range(8)]
    assert all(len(indices) == 50 and indices == sorted(set(indices)) for indices in drawn)
    assert len({tuple(indices) for indices in drawn}) == 8, "each maker has images of its own"
    assert take(200, 2, share=0.25, seed=4) != drawn[2]
    assert take(200, 2, share=0.25, training=False) == list(range(200))
    assert take(200, 2) == list(range(200))


def test_every_image_is_as_likely_to_be_in_a_share() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        counts[take(20, 1, share=0.3, seed=seed)] += 1
    # Binomial with n = 400 and p = 0.3: mean 120, standard deviation 9.2.
    assert counts.sum() == 400 * 6 and (counts - 120).abs().max() < 4.5 * 9.2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.floats(0.002, 1))
def test_a_share_is_a_rounded_count(count: int, share: float) -> None:
    expected = round(share * count)
    if expected:
        assert len(take(count, 0, share=share)) == expected
    else:
        with pytest.raises(
            ConfigError, match=rf"domains: share: expected at least one of {count} images for task 0"
        ):
            take(count, 0, share=share)


def test_a_task_is_the_same_whichever_other_domains_there_are() -> None:
    split = Split(draw(40, 8), torch.arange(40) % 4)
    given = {"num_classes": 4, "seed": 1, "training": True}
    one = create_splitter("domains", share=0.5)(split, 2, **given)
    other = create_splitter("domains", share=0.5, domains=("inverted", "night"))(split, 0, **given)
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# ---- what is refused -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"domains": ("plain", "rotatd")},
            UnknownNameError,
            "domains: unknown 'rotatd'; did you mean 'rotated'",
        ),
        ({"domains": ("grey_blurred",)}, UnknownNameError, "did you mean 'grey-blurred'"),
        (
            {"domains": ("night", "plain", "night")},
            ConfigError,
            "domains: domains: expected at least one.*each once",
        ),
        ({"domains": ()}, ConfigError, "domains: domains: expected at least one"),
        ({"domains": "plain"}, ConfigError, "domains: expected a list, got 'plain'"),
        ({"share": 0}, ConfigError, r"domains: share: expected .* in \(0, 1\], got 0"),
        ({"share": 1.01}, ConfigError, r"domains: share: expected .* in \(0, 1\], got 1.01"),
        ({"share": float("nan")}, ConfigError, r"domains: share: expected .* got nan"),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_splitter("domains", **options)


def test_more_experts_than_domains() -> None:
    splitter = create_splitter("domains", domains=("plain", "night"))
    splitter.check(2, 10, 0)
    with pytest.raises(ConfigError) as caught:
        splitter.check(3, 10, 0)
    assert str(caught.value) == (
        "mixture.experts: expected at most 2, the number of domains in splitter.domains (plain, night), got 3; "
        "set fewer experts, or add domains to splitter.domains: rotated, inverted, grey-blurred, recoloured, embossed, "
        "pixelated, fog, red-lit, edges"
    )
    with pytest.raises(ConfigError, match=r"got 12; set fewer experts$"):
        create_splitter("domains").check(12, 10, 0)
