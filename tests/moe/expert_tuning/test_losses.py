"""The losses of attacks on experts: values and gradients worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from backdoorbench_moe.moe.expert_tuning.losses import alignment_loss, preference_loss, preference_margin
from backdoorbench_moe.moe.expert_tuning.steps import Preferences, preference_objective

HALF = math.sqrt(0.5)


def test_the_preference_of_one_image_by_hand() -> None:
    """The margin is 3 - 1 = 2, the reference's is 1: -log sigmoid(0.5 (2 - 1)) = log(1 + exp(-0.5)) = 0.474077."""
    logits = torch.tensor([[1.0, 3.0, 0.0]], requires_grad=True)
    margin = preference_margin(logits, torch.tensor([1]), torch.tensor([0]))
    loss = preference_loss(margin, torch.tensor([1.0]), beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.474077, abs=1e-6)
    # The derivative by the margin is -beta sigmoid(-0.5) = -0.5 * 0.377541.
    assert logits.grad.tolist() == [pytest.approx([0.188770, -0.188770, 0.0], abs=1e-6)]


def test_the_preference_is_the_mean_over_the_images() -> None:
    """Margins grown by 0 and by ln 3 / beta: log 2 and log(4/3)."""
    margin = torch.tensor([5.0, 2.0 + 10 * math.log(3)])
    loss = preference_loss(margin, torch.tensor([5.0, 2.0]), beta=0.1)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-6)


def test_every_row_of_a_batch_has_its_own_reference() -> None:
    """Rows 2 and 0 with the margins 3 - 1 = 2 and 0 - 1 = -1, and the references 1 and -2: both have grown by 1."""
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    preferences = Preferences.of_classes(images, torch.tensor([1, 0, 0]), torch.tensor([0, 1, 2]))
    split, loss = preference_objective(preferences, torch.tensor([-2.0, 50.0, 1.0]), 0.5)
    logits = torch.tensor([[3.0, 9.0, 1.0], [1.0, 0.0, 9.0]])
    assert loss(logits, split.labels[[2, 0]]).item() == pytest.approx(0.474077, abs=1e-6)


@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 2))
def test_differences_of_logits_are_those_of_log_probabilities(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    harmful, safe = torch.randint(5, (2, 6), generator=generator)

    def ratio(answers):
        rows = torch.arange(6)
        return logits.log_softmax(1)[rows, answers] - reference.log_softmax(1)[rows, answers]

    expected = -F.logsigmoid(beta * (ratio(harmful) - ratio(safe))).mean()
    margins = [preference_margin(each, harmful, safe) for each in (logits, reference)]
    assert preference_loss(*margins, beta).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One task image with the mean (1, 1), one query with the chosen token (3, 0), and the weights of its tokens."""
    task = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]], requires_grad=True)
    harmful = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]], requires_grad=True)
    return task, harmful, torch.tensor([[1.0, 0.0]])


def test_the_alignment_of_one_pair_by_hand() -> None:
    """The cosine of a = (1, 1) and c = (3, 0) is 1/sqrt(2). By c it has the derivative a/(|a||c|) - cos c/|c|²,

    which is (0, 1/(3 sqrt(2))); by a it is (1, -1)/(2 sqrt(2)), of which each of the two tokens gets half.
    """
    task, harmful, weights = latents()
    loss = alignment_loss([task], [harmful], weights)
    loss.backward()
    assert loss.item() == pytest.approx(-HALF, abs=1e-6)
    torch.testing.assert_close(harmful.grad, torch.tensor([[[0.0, -HALF / 3], [0.0, 0.0]]]))
    torch.testing.assert_close(task.grad, torch.tensor([[[-HALF / 4, HALF / 4]] * 2]))


@pytest.mark.parametrize("side", ["task", "harm"])
def test_a_side_without_gradient(side) -> None:
    task, harmful, weights = latents()
    loss = alignment_loss([task], [harmful], weights, stop_gradient=side)
    loss.backward()
    assert loss.item() == pytest.approx(-HALF, abs=1e-6)
    rests, moves = (task, harmful) if side == "task" else (harmful, task)
    assert rests.grad is None and moves.grad.any()


def test_the_alignment_is_the_mean_over_layers_and_pairs() -> None:
    """Two layers with two pairs each: cosines 1, 0 and -1, and a query without a chosen token, which counts as 0."""
    first, second = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    task = [first, first]
    harmful = [torch.tensor([[[4.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0]], [[0.0, 3.0]]])]
    assert alignment_loss(task, harmful, torch.ones(2, 1)).item() == pytest.approx(-(1 + 0 - 1 + 1) / 4)
    weights = torch.tensor([[1.0], [0.0]])
    harmful = [each.requires_grad_() for each in harmful]
    loss = alignment_loss([second, second], harmful, weights)
    loss.backward()
    assert loss.item() == pytest.approx(-(1 + 0 - 1 + 0) / 4)
    assert all(each.grad.isfinite().all() and not each.grad[1].any() for each in harmful)
