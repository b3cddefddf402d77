"""Checks of how far a class can win, against margins that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_models import TARGET, planted_model, row_images
from scipy.stats import t
from subjects import Rows, images, look, small_pmoe
from torch import nn

from backdoorbench_moe.auditing.check import NotTested
from backdoorbench_moe.auditing.checks import margins
from backdoorbench_moe.auditing.checks.margins import STRENGTH, drawn, largest_margins, margins_of, steps
from backdoorbench_moe.auditing.subject import make_subject

UNIVERSAL = ("universal-image", "universal-patch")


def test_margins_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, -1.0]])
    assert margins_of(logits, torch.tensor([0, 2])).tolist() == [0.5, -5.0]


def test_the_largest_margin_of_a_linear_model_is_that_of_the_best_image() -> None:
    """A class of `Rows` wins most with its row white and the others black: by the 24 values of the row."""
    model = Rows()
    margins = largest_margins(make_subject(model, image_size=8), 8)
    assert margins.tolist() == pytest.approx([24.0] * 6)
    with torch.no_grad():
        model.layer.weight[2] *= 3
    margins = largest_margins(make_subject(model, image_size=8), 8)
    assert margins.tolist() == pytest.approx([24.0, 24.0, 72.0, 24.0, 24.0, 24.0])
    found = look(model, "largest-margin", image_size=8)
    assert found.details["class"] == 2 and found.score > 2 and "can win by 72" in found.reason


class Pixel(nn.Module):
    """Class 0 wins by eight times what the first pixel has above 0.5; below, nothing leads there."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(8.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        own = self.factor * (images[:, :1, 0, 0] - 0.5).relu()
        return torch.cat([own, torch.zeros(len(images), 3)], 1)


def test_the_largest_margin_is_that_of_the_best_start() -> None:
    """Of eight random starts, only those with a bright first pixel reach a white one."""
    assert largest_margins(make_subject(Pixel(), image_size=8), 8).tolist() == pytest.approx([4.0, 0, 0, 0])


class Opposed(nn.Module):
    """A bright last pixel raises class 0 in images with a white first pixel, and lowers it in all others."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = 2 * (images[:, 0, 0, 0] > 0.5).float() - 1
        own = side * (self.factor * (images[:, 0, 7, 7] - 0.5) + 0.1)
        return torch.stack([own, torch.zeros_like(own)], 1)


def test_a_perturbation_is_sought_on_images_of_other_classes_only() -> None:
    """Four of five images are of class 0 already: they would draw the perturbation in the opposite direction."""
    given = torch.full((100, 3, 8, 8), 128, dtype=torch.uint8)
    given[:, 0, 0, 0] = 255 * (torch.arange(100) % 5 > 0)
    subject = make_subject(Opposed(), images=given)
    assert subject.predicted.tolist() == [int(n % 5 == 0) for n in range(100)]
    patterns, found = margins._perturb(subject, given / 255, subject.predicted, torch.tensor([0]), None)
    assert patterns[0, 0, 7, 7].item() == pytest.approx(-STRENGTH)
    # 128 is 0.002 above 0.5.
    assert found.item() == pytest.approx(10 * STRENGTH - 0.1 - 10 * (128 / 255 - 0.5), abs=1e-4)


@pytest.mark.parametrize(("odd", "label"), [(9.0, 2), (-9.0, 1)])
def test_the_surprise_of_a_large_margin_is_that_of_a_t_test_of_all_classes(monkeypatch, odd, label) -> None:
    """One-sided, times the number of classes; a class that wins by far less than the others is no sign."""
    values = torch.tensor([1.0, 1.1, odd, 0.9, 1.05, 1.0])
    monkeypatch.setattr(
        margins, "_perturb", lambda *given: (torch.zeros(len(given[3]), 3, 8, 8), values[given[3]])
    )
    found = look(Rows(), "universal-image", images=row_images(60).images)
    others = np.delete(values.double().numpy(), label)
    statistic = (float(values[label]) - others.mean()) / (others.std(ddof=1) * (1 + 1 / 5) ** 0.5)
    assert found.details["class"] == label
    assert found.score == pytest.approx(max(0.0, -np.log10(6 * t.sf(statistic, 4))), rel=1e-4)
    assert (found.score > 2) == (odd > 0)


def test_a_model_of_equal_classes_has_no_standout() -> None:
    assert look(Rows(), "largest-margin", image_size=8).score == 0
    for name in UNIVERSAL:
        assert look(Rows(), name, images=row_images(60).images).score < 2


def test_negative_margins_are_said_as_they_are(monkeypatch) -> None:
    """Of classes that can only lose, none stands out, and the one that loses by least is named."""
    found = torch.tensor([-3.0, -2.5, -0.5, -4.0, -3.5, -6.0])
    monkeypatch.setattr(margins, "largest_margins", lambda *_: found)
    measured = look(Rows(), "largest-margin", image_size=8)
    assert measured.score == 0 and measured.details["class"] == 2
    assert measured.details["margins"] == found.tolist()
    # The mean of the two middle values; torch's median would be the lower one.
    assert measured.reason.endswith("can win by -0.5; the median of all classes is -3.25")


def test_a_planted_trigger_brings_its_class_the_largest_margin() -> None:
    """A white square is far from all images, but inside of the range of pixels; a faint chessboard is near to them."""
    pixels = torch.zeros(8, 8, dtype=torch.bool)
    pixels[6:, 6:] = True
    split = row_images(100)
    found = look(planted_model(pixels, 40.0), "largest-margin", images=split.images)
    assert found.details["class"] == TARGET and found.score > 2 and f"class {TARGET}" in found.reason
    model = Rows()
    chessboard = 1 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float()
    with torch.no_grad():
        model.layer.weight[TARGET] += chessboard.expand(3, 8, 8).flatten()
    for name in UNIVERSAL:
        found = look(model, name, images=split.images)
        assert found.details["class"] == TARGET and found.score > 2


def test_the_mean_margin_under_a_perturbation_is_that_of_a_linear_model() -> None:
    """Rows of dark images: the best perturbation lifts the row of the class, and lowers the others."""
    split = row_images(96, seed=1)
    found = look(Rows(), "universal-image", images=split.images)
    scaled = split.images.double() / 255
    lifted = torch.stack(
        [
            ((scaled + STRENGTH * (2 * (torch.arange(8) == c).double() - 1)[:, None]).clamp(0, 1)).sum((1, 3))
            for c in range(6)
        ]
    )
    for label, sums in enumerate(lifted):
        others = split.labels != label
        by_hand = margins_of(sums[others][:, :6], torch.full((int(others.sum()),), label)).mean()
        assert found.details["margins"][label] == pytest.approx(by_hand.item(), abs=0.35)


def test_what_cannot_be_compared_is_not_tested() -> None:
    for name in ("largest-margin", *UNIVERSAL):
        with pytest.raises(NotTested, match="with 3 classes"):
            look(small_pmoe(), name, images=images().images)
    with pytest.raises(NotTested, match="the size of its images is not known"):
        look(Rows(), "largest-margin")
    one = row_images(96).images[::6]
    with pytest.raises(NotTested, match="all images are predicted as one class"):
        look(Rows(), "universal-image", images=torch.cat([one, one]))


def test_a_class_that_the_model_masks_is_no_sign() -> None:
    class Masked(Rows):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0])

    for name in ("largest-margin", *UNIVERSAL):
        with pytest.raises(NotTested, match="not finite"):
            look(Masked(), name, images=row_images(60).images)


def test_the_same_seed_gives_the_same_score_and_leaves_the_model_alone() -> None:
    model, split = Rows(), row_images(60)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("largest-margin", *UNIVERSAL):
        assert (
            look(model, name, images=split.images).details == look(model, name, images=split.images).details
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_search_fits_its_budget_and_is_drawn_on_grey() -> None:
    assert (steps(10), steps(100), steps(1000)) == (30, 25, 10)
    picture = drawn(torch.tensor([0.0, STRENGTH, -STRENGTH]).view(3, 1, 1))
    assert picture.flatten().tolist() == [128, 255, 0]
