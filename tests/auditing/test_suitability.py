"""Whether the given images suit the audited model."""

from __future__ import annotations

import pytest
import torch
from subjects import Constant, images, small_pmoe
from torch import nn

from backdoorbench_moe.auditing.audit import run_audit
from backdoorbench_moe.auditing.document import as_document
from backdoorbench_moe.auditing.opening import with_store
from backdoorbench_moe.auditing.report import page
from backdoorbench_moe.auditing.subject import make_subject
from backdoorbench_moe.auditing.suitability import doubt_of, variance_ratio
from backdoorbench_moe.moe.norms import batch_norms
from backdoorbench_moe.ops.images import as_input


class Red(nn.Module):
    """Class 1 for images whose red is above a half, else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        red = self.scale * (images[:, 0].mean((1, 2)) - 0.5)
        return torch.stack([-red, red], 1)


class Normed(nn.Module):
    """A batch norm with a given running variance, and a head."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=0)
        self.norm.running_var.fill_(variance)
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(self.norm(images).mean((2, 3)))


def reds(*shares: int) -> torch.Tensor:
    """Images of a constant red, 0 to 255."""
    flat = torch.tensor(shares, dtype=torch.uint8).view(-1, 1, 1, 1)
    return torch.cat([flat, torch.zeros(len(shares), 2, 1, 1, dtype=torch.uint8)], 1).repeat(1, 1, 8, 8)


def test_images_in_one_predicted_class_are_doubted() -> None:
    most = make_subject(Red(), images=reds(*[250] * 19, 0), classes=("no", "yes"))
    assert doubt_of(most) == (
        "The images may not suit the model: 19 of 20 are predicted as class 1 (yes). If so, the verdict means nothing."
    )
    assert doubt_of(make_subject(Red(), images=reds(*[250] * 18, 0, 0))) == ""


def test_labels_are_used_where_they_are_known() -> None:
    """Three quarters are of class 1 and are predicted so; then all labels are wrong."""
    pictures = reds(*[250] * 30, *[0] * 10)
    labels = torch.tensor([1] * 30 + [0] * 10)
    assert doubt_of(make_subject(Red(), images=pictures, labels=labels)) == ""
    wrong = make_subject(Red(), images=pictures, labels=1 - labels)
    assert "the accuracy on them, 0%, is near chance" in doubt_of(wrong)


@pytest.mark.parametrize("factor", [1.0, 1.2, 4.0, 0.25])
def test_variances_are_compared_with_those_of_training(factor) -> None:
    """Uniform noise: too much variance counts like too little."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=draw)
    variance = (noise.double() / 255).var().item()
    # The predictions of the untrained head are of several classes.
    subject = make_subject(Normed(variance * factor), images=noise, labels=None)
    ratio = variance_ratio(subject)
    assert ratio == pytest.approx(max(factor, 1 / factor), rel=0.03)
    subject.__dict__["predicted"] = torch.arange(40) % 3
    assert ("other variances than in training" in doubt_of(subject)) == (factor > 1.2 or factor < 0.8)


def test_labels_of_one_class_that_are_predicted_are_not_doubted() -> None:
    pictures = reds(*[250] * 30)
    right = make_subject(Red(), images=pictures, labels=torch.ones(30, dtype=torch.int64))
    assert doubt_of(right) == ""


class Flat(nn.Module):
    """A norm of the mean colours, called by keyword; a norm that gets some of them; and one with dead channels."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm, self.expert, self.wide = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm2d(6)
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        colours = images.mean((2, 3))
        self.expert(colours[: self.tokens])
        self.wide(torch.cat([images, 0 * images[:, :2], images[:, :1]], 1))
        return self.head(self.norm(input=colours))


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_norms_with_few_values_and_dead_channels_do_not_count(tokens) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=draw)
    model = Flat(tokens)
    values = (noise.float() / 255).flatten(1).reshape(20, 3, -1).var((0, 2))
    with torch.no_grad():
        # Two channels were pruned after training.
        model.wide.running_var.copy_(torch.cat([values, values[:2], values[:1]]))
    ratio = variance_ratio(make_subject(model, images=noise))
    # A norm that gets a single value has no variance at all.
    assert ratio is None if tokens == 1 else ratio == pytest.approx(1.0, abs=0.05)


def test_nothing_is_doubted_without_images_or_norms() -> None:
    bare = make_subject(Red(), image_size=8)
    assert doubt_of(bare) == "" and variance_ratio(bare) is None
    assert variance_ratio(make_subject(Red(), images=reds(*range(0, 200, 10)))) is None


def test_a_pmoe_on_the_images_of_its_statistics_and_on_others() -> None:
    model, split = small_pmoe(), images(60)
    for norm in batch_norms(model).values():
        norm.momentum = 1.0
    model.train()(as_input(split.images))
    ratio = variance_ratio(make_subject(model, images=split.images))
    assert ratio == pytest.approx(1.0, abs=0.05)
    darker = make_subject(model, images=split.images // 3)
    assert (variance_ratio(darker) or 0.0) > 1.22


def test_the_doubt_is_in_the_document_and_on_the_page() -> None:
    subject, store = with_store(make_subject(Red(), images=reds(*[250] * 20)), None)
    document = as_document(run_audit(subject, name="red", store=store, checks=[Constant("one", 0.5)]))
    assert "20 of 20 are predicted as class 1" in document["subject"]["doubt"]
    assert document["subject"]["doubt"] in page(document)
    suited, store = with_store(make_subject(Red(), images=reds(*[250] * 10, *[0] * 10)), None)
    document = as_document(run_audit(suited, name="red", store=store, checks=[Constant("one", 0.5)]))
    assert document["subject"]["doubt"] == "" and "may not suit" not in page(document)
