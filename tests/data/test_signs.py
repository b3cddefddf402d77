"""The embedded data set: the same for everybody, and neither trivial nor hopeless."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backdoorbench_moe.data import create_dataset, sign_drawing, signs
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.errors import ConfigError

DIGEST = "111bd54402812db14675dca81ec9d514179e8f098ec169a6e8f3e977de332c0e"


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return create_dataset("signs").load()


def test_same_for_everybody(images) -> None:
    """Anything that changes a pixel must raise signs.VERSION, and this digest with it."""
    assert signs.VERSION == 1
    assert images.digest == DIGEST


def test_counts_and_names(images) -> None:
    assert images.train.images.shape == (6000, 3, 32, 32) and images.test.images.shape == (2000, 3, 32, 32)
    assert images.train.labels.bincount().tolist() == [600] * 10
    assert images.test.labels.bincount().tolist() == [200] * 10
    assert len(set(images.classes)) == 10 and images.classes[6] == "stop"


def test_no_picture_comes_twice(images) -> None:
    pictures = torch.cat([images.train.images, images.test.images]).numpy()
    assert len({hashlib.sha256(picture.tobytes()).digest() for picture in pictures}) == 8000


def test_kinds_are_mixed_all_along(images) -> None:
    assert all(part.bincount(minlength=10).min() > 0 for part in images.train.labels.split(200))


def test_picture_does_not_depend_on_its_batch() -> None:
    scene = sign_drawing.draw_scene(sign_drawing.Draws(3), 12, 32)
    sign = signs.SIGNS[2]
    whole = sign_drawing.draw_signs(scene, sign.shape, sign.glyph, sign.paint, 32)
    alone = sign_drawing.draw_signs(scene[np.array([7])], sign.shape, sign.glyph, sign.paint, 32)
    np.testing.assert_array_equal(whole[7], alone[0])


def test_every_colour_and_most_shapes_are_shared() -> None:
    paints = [sign.paint.face if sign.paint is not signs.RED_RIM else signs.RED for sign in signs.SIGNS]
    assert {paint: paints.count(paint) for paint in paints} == {signs.RED: 4, signs.BLUE: 4, signs.AMBER: 2}
    shapes = [sign.shape for sign in signs.SIGNS]
    assert sum(shapes.count(shape) > 1 for shape in shapes) == 8
    assert len({(sign.shape, sign.paint.face, sign.glyph) for sign in signs.SIGNS}) == 10


@pytest.mark.parametrize(
    ("level", "inside", "outside"),
    [
        (sign_drawing.disc, (0.7, 0.7), (0.72, 0.72)),
        (sign_drawing.square, (0.87, -0.87), (0.89, 0.0)),
        (sign_drawing.diamond, (0.0, 1.1), (0.6, 0.6)),
        (sign_drawing.octagon, (0.94, 0.3), (0.8, 0.8)),
        (sign_drawing.triangle, (0.0, -0.9), (0.7, -0.5)),
        (sign_drawing.arrow_left, (-0.55, 0.0), (-0.55, 0.3)),
        (sign_drawing.arrow_right, (0.55, 0.0), (-0.7, 0.0)),
        (sign_drawing.arrow_up, (0.0, -0.55), (0.0, 0.7)),
        (sign_drawing.cross, (0.35, 0.35), (0.5, 0.0)),
        (sign_drawing.plus, (0.5, 0.0), (0.4, 0.4)),
        (sign_drawing.tee, (0.4, -0.34), (0.4, 0.3)),
        (sign_drawing.pause, (0.29, 0.4), (0.0, 0.0)),
        (sign_drawing.exclamation, (0.0, 0.5), (0.0, 0.385)),
    ],
)
def test_figures(level, inside, outside) -> None:
    x, y = np.array([inside, outside], np.float32).T
    assert (level(x, y) < 0).tolist() == [True, False]


def test_draws_are_the_published_pcg64() -> None:
    """24 high bits of each raw draw; the first raw draws of PCG64 with seed 0 as numpy documents them."""
    raw = np.random.PCG64(0).random_raw(3)
    np.testing.assert_array_equal(sign_drawing.Draws(0).uniform(0, 1, 3), ((raw >> 40) / 2**24).astype("f4"))
    noise = sign_drawing.Draws(0).triangular(5, 101)
    assert noise.shape == (5, 101) and -255 <= noise.min() < -100 and 100 < noise.max() <= 255


def test_image_size_and_subset() -> None:
    small = create_dataset("signs", image_size=48, train_images=20, test_images=10).load()
    assert small.train.images.shape == (20, 3, 48, 48) and small.image_size == 48
    with pytest.raises(ConfigError, match="dataset: image_size: expected 1 to 8192 pixels, got -1"):
        create_dataset("signs", image_size=-1)


@pytest.mark.slow
def test_a_linear_model_is_better_than_chance_and_under_70_percent(images) -> None:
    """Multinomial logistic regression on standardised pixels, weight decay as was best on the test set."""
    pixels = torch.cat([images.train.images, images.test.images]).flatten(1).float()
    pixels = (pixels - pixels[:6000].mean(0)) / pixels[:6000].std(0)
    train, test = pixels[:6000], pixels[6000:]
    weight = torch.zeros(3072, 10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=20, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(train @ weight, images.train.labels) + 0.075 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    accuracy = ((test @ weight).argmax(1) == images.test.labels).float().mean()
    assert 0.4 < accuracy < 0.7
