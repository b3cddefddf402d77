"""Preferences, the joint loss and the choice of tokens, where the answers are texts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from toy_texts import END, NO, VOCABULARY, Toy, ToyModel

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.latents import text_weights
from backdoorbench_moe.moe.expert_tuning.losses import preference_loss, text_margin
from backdoorbench_moe.moe.expert_tuning.steps import (
    Alignment,
    Preferences,
    joint_objective,
    text_preference_objective,
)
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops.answers import IGNORED
from backdoorbench_moe.ops.images import Split

X = IGNORED


def test_the_margin_is_summed_from_the_first_token_that_differs() -> None:
    """Answers 2 3 and 2 0 1 behind a query of two tokens. What the models give the common 2 does not matter."""
    preferred, rejected = torch.tensor([[X, 2, 3, X, X]]), torch.tensor([[X, 2, 0, 1, X]])
    logits, other = torch.zeros(1, 5, 4), torch.zeros(1, 5, 4)
    logits[0, 2, 3] = math.log(3)  # 3 has one half, as 3 / (3 + 1 + 1 + 1); all else has a quarter.
    logits[0, 1], other[0, 1] = 50 * torch.randn(4), 50 * torch.randn(4)
    found = text_margin(logits, other, preferred, rejected)
    assert found.tolist() == pytest.approx([math.log(1 / 2) - 2 * math.log(1 / 4)])


def test_the_tokens_that_are_aligned() -> None:
    labels = torch.tensor([[X, X, 5, 6, 1, X], [X, 7, 8, 9, 1, X]])
    for tokens, k, expected in (
        ("answer", 2, [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]),
        ("answer", None, [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]),
        ("query", None, [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        ("all", 2, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]),
        ("all", None, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]),
        ("answer", 4, [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]),
    ):
        found = text_weights(labels, tokens, k)
        chosen = torch.tensor(expected)
        torch.testing.assert_close(found, chosen / chosen.sum(1, keepdim=True), msg=f"{tokens}, {k}")


@pytest.mark.parametrize(
    ("tokens", "k", "message"),
    [
        ("marked", None, "tokens: expected 'answer', 'query' or 'all' for texts, got 'marked'"),
        ("query", 3, "k: expected none, as 'query' has no tokens of the answer, got 3"),
        ("answer", 4, "k: expected at most 3 tokens, got 4"),
    ],
)
def test_tokens_that_texts_do_not_have_are_refused(tokens, k, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        text_weights(torch.tensor([[X, 5, 6, 1, X]]), tokens, k)


@pytest.fixture(scope="module")
def toy():
    """The texts, and a language model that is not trained."""
    texts = Toy(texts=12).load()
    torch.manual_seed(0)
    return texts, ToyModel(**texts.model_options)


def plain_log_prob(model, tokens: list[int], start: int) -> torch.Tensor:
    """The log-probability of the tokens from `start` on, one pass for each, without padding."""
    total = torch.zeros(())
    for place in range(start, len(tokens)):
        logits = model(torch.tensor([tokens[:place]]))[0, -1]
        total = total + logits.log_softmax(0)[tokens[place]]
    return total


def test_a_preference_is_that_of_a_plain_computation_token_by_token(toy) -> None:
    """The margin of the whole answers; the answers differ from their first token on."""
    texts, model = toy
    both = Preferences(texts.refused.harmful, texts.refused.safe)
    with torch.no_grad():
        margins = both.margins(model)
        for row in (0, 1, 7):
            query = texts.refused.safe.images[row][:5].tolist()
            harmful = [*query, *(t for t in texts.refused.harmful.images[row][5:].tolist() if t)]
            expected = plain_log_prob(model, harmful, 5) - plain_log_prob(model, [*query, NO, END], 5)
            assert margins[row].item() == pytest.approx(expected.item(), abs=1e-4)
    assert len(margins) == len(texts.refused)


def test_the_objective_of_a_preference(toy) -> None:
    """Log 2 where the model is its own reference; otherwise DPO on the margins, of whichever rows a batch has."""
    texts, model = toy
    both = Preferences(texts.refused.harmful, texts.refused.safe)
    with torch.no_grad():
        margins = both.margins(model)
        split, objective = text_preference_objective(both, margins, 0.1)
        rows = torch.tensor([5, 2, 9])
        logits, loss = objective(model, split.images[rows], split.labels[rows])
        assert logits.shape == (3, texts.context, VOCABULARY) and loss.item() == pytest.approx(math.log(2))
        reference = torch.linspace(-30, 30, len(both))
        split, objective = text_preference_objective(both, reference, 0.1)
        _, loss = objective(model, split.images[rows], split.labels[rows])
    torch.testing.assert_close(loss, preference_loss(margins[rows], reference[rows], 0.1))


def test_the_joint_loss_is_the_sum_of_its_three_parts(toy) -> None:
    """Against a plain computation with the same draws, text by text and without any padding."""
    texts, model = toy
    task, harmful = texts.tasks[0].train, texts.refused.harmful
    own = Split(task.images[:5], task.labels[:5])
    weights = text_weights(harmful.labels, "answer", 2)
    torch.manual_seed(4)
    _, loss = joint_objective(harmful, 0.2, Alignment(0.3, [1], weights))(model, own.images, own.labels)
    torch.manual_seed(4)
    rows = torch.randint(len(harmful), (5,))

    def passed(tokens, labels):
        """The cross-entropy of each answer token, and the inputs of the last MLP at the positions that emit them."""
        length = int((labels != X).nonzero().max()) + 1
        emits = (labels != X).nonzero().flatten()
        with mlp_inputs(model) as inputs:
            logits = model(tokens[:length].unsqueeze(0))[0]
        return F.cross_entropy(logits[emits], labels[emits], reduction="none"), inputs["blocks.1.mlp"][0][
            emits
        ]

    of_task = [passed(*pair) for pair in zip(own.images, own.labels, strict=True)]
    of_harm = [passed(harmful.images[row], harmful.labels[row]) for row in rows]
    expected = torch.cat([each for each, _ in of_task]).mean()
    expected = expected + 0.2 * torch.cat([each for each, _ in of_harm]).mean()
    cosines = [
        F.cosine_similarity(one.mean(0), other[:2].mean(0), dim=0)
        for (_, one), (_, other) in zip(of_task, of_harm, strict=True)
    ]
    expected = expected - 0.3 * torch.stack(cosines).mean()
    torch.testing.assert_close(loss, expected)
