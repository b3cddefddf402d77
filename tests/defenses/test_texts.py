"""Defenses of mixtures of language models: their losses and measures by hand, and what they train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.defensive_expert import unsafe_share
from backdoorbench_moe.defenses.mixtures import alignment_objective
from backdoorbench_moe.defenses.rasa import mean_gates
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.losses import decisive_margin
from backdoorbench_moe.moe.merging import only_expert
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.routing import kl_divergence
from backdoorbench_moe.testing.making import changed, copies
from backdoorbench_moe.testing.texts import PADDING, build_text_mixture, make_text_task, text_split

X = -100


def calls_of(name: str, **options: Any) -> tuple[Any, Any, list[tuple[Split, dict[str, Any]]]]:
    """Let a defense hand over what it would train on, and train nothing."""
    model = build_text_mixture()
    task, _ = make_text_task(model)
    calls: list[tuple[Split, dict[str, Any]]] = []
    object.__setattr__(task, "tune", lambda model, split, **given: calls.append((split, given)))
    create_defense(name, **options)(task)
    return model, task, calls


def test_where_two_answers_part_the_logits_decide() -> None:
    """Answers [4, 5, 1] and [4, 6, 6, 1] behind two tokens part at position 2; [3, 1] and [2, 1] at position 1."""
    preferred = torch.tensor([[X, 4, 5, 1, X, X], [X, 3, 1, X, X, X], [X, 4, 1, X, X, X]])
    rejected = torch.tensor([[X, 4, 6, 6, 1, X], [X, 2, 1, X, X, X], [X, 4, 1, X, X, X]])
    logits = torch.zeros(3, 6, 7)
    logits[0, 2, 5], logits[0, 2, 6] = 1.5, 4.0
    # Where they do not part, logits do not count.
    logits[0, 1, 4], logits[0, 3, 1] = 9.0, 9.0
    logits[1, 1, 3], logits[1, 1, 2] = 0.5, -1.0
    assert decisive_margin(logits, preferred, rejected).tolist() == [-2.5, 1.5, 0.0]


def test_the_divergence_of_texts_by_hand() -> None:
    """One reference (1/2, 1/2); gates of (1/4, 3/4) at the first position, and padding that has no weight."""
    gates = torch.tensor([[[0.25, 0.5, 0.0], [0.75, 0.5, 0.0]]])
    reference = torch.tensor([[0.5], [0.5]])
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(gates, reference, weights).item() == pytest.approx(first / 2, abs=1e-6)


def test_the_reference_is_the_mean_over_the_tokens_of_each_text() -> None:
    """Against a pass of each text without its padding; the token that ends it emits nothing."""
    model = build_text_mixture()
    task, _ = make_text_task(model)
    expected = []
    with torch.no_grad():
        for tokens in task.clean.images:
            routing = model.forward_routed(tokens[tokens != PADDING].unsqueeze(0)).routing
            expected.append([each.gates[0, :, :-1].mean(1) for each in routing])
    for found, known in zip(mean_gates(task), zip(*expected, strict=True), strict=True):
        assert found.shape == (2, 1)
        torch.testing.assert_close(found[:, 0], torch.stack(known).mean(0))


@pytest.mark.parametrize("scope", ["gates", "gates+experts"])
def test_at_the_beginning_a_preference_is_log_2(scope) -> None:
    """The model is its own reference. A shorter answer has a lower loss when it becomes more probable."""
    model, task, [(split, given)] = calls_of("align", scope=scope, clean_weight=0.0)
    assert torch.equal(split.images, task.marked.images)
    assert torch.equal(split.labels[:, :-1], task.marked.labels) and split.labels[:, -1].tolist() == [
        *range(12)
    ]
    rows = torch.tensor([3, 7, 0, 11])
    logits, loss = given["objective"](model, split.images[rows], split.labels[rows])
    assert logits.shape[:2] == task.marked.images[rows].shape
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        safe = task.marked.labels[3][task.marked.labels[3] != X][0]
        model.network.head.bias[safe] += 1
    assert given["objective"](model, split.images[[3]], split.labels[[3]])[1] < math.log(2)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    """Safe and unsafe answers and clean texts, against three passes of their own with the same draws."""
    model = build_text_mixture()
    marked, unsafe, clean = text_split(5, 3, 1), text_split(5, 3, 4, salt=1), text_split(9, 4)
    labels = torch.cat([marked.labels, torch.arange(5).unsqueeze(1)], 1)
    seen = []

    def loss_of(logits, gates, labels):
        seen.append((logits, gates))
        return logits.sum()

    objective = alignment_objective(loss_of, clean, 0.5, unsafe)
    torch.manual_seed(3)
    logits, loss = objective(model, marked.images, labels)
    torch.manual_seed(3)
    rows = torch.randint(9, (5,))
    [(answered, gates)] = seen
    safe, other, own = (model(each) for each in (marked.images, unsafe.images, clean.images[rows]))
    torch.testing.assert_close(answered, torch.cat([safe, other]))
    torch.testing.assert_close(logits, safe)
    assert [each.shape for each in gates] == [(5, 2, 9)] * 2
    tokens = F.cross_entropy(own.transpose(1, 2), clean.labels[rows], reduction="none")
    mean = tokens.sum() / (clean.labels[rows] != X).sum()
    torch.testing.assert_close(loss, answered.sum() + 0.5 * mean)


def test_the_share_that_an_expert_alone_does_not_answer_safely() -> None:
    """The head is made to give the safe answer's first token to 4 of 12 queries, whatever the expert."""
    model = build_text_mixture()
    task, _ = make_text_task(model)
    firsts = [[int(row[row != X][0]) for row in each.labels] for each in (task.marked, task.unsafe)]
    wanted = firsts[0][0]
    with torch.no_grad():
        model.network.head.weight.zero_()
        model.network.head.bias.zero_()[wanted] = 1
    safe = sum(one == wanted and other != wanted for one, other in zip(*firsts, strict=True))
    assert 0 < safe < 12 and unsafe_share(task, model, 1) == pytest.approx(100 * (12 - safe) / 12)


def test_what_a_defensive_expert_is_trained_on() -> None:
    """Its latents are those of the first 4 positions that emit the safe answer, which here has 2 tokens."""
    model, task, [(first, one), (second, two), (third, _)] = calls_of("defensive-expert", expert=1)
    assert torch.equal(first.images, task.marked.images) and second is task.tasks[1]
    assert len(third) == sum(map(len, task.tasks))
    closure = dict(zip(two["objective"].__code__.co_freevars, two["objective"].__closure__, strict=True))
    weights = closure["alignment"].cell_contents.weights
    assert torch.equal(weights > 0, task.marked.labels != X) and torch.equal(weights.sum(1), torch.ones(12))
    with only_expert(model, 1):
        _, loss = one["objective"](model, first.images[:4], first.labels[:4])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5), "the reference is the expert alone"


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("align", {}, {"router"}),
        ("align", {"scope": "gates+experts", "layers": "all", "loss": "tuning"}, {"router", "experts"}),
        ("rasa", {"rounds": 1}, {"router", "experts"}),
        ("defensive-expert", {"expert": 0}, {"router", "experts"}),
    ],
)
def test_only_gates_and_experts_are_changed(name, options, parts) -> None:
    model = build_text_mixture()
    task, _ = make_text_task(model)
    before, texts = copies(model), [task.marked.copy(), task.unsafe.copy()]
    create_defense(name, **options)(task)
    moved = changed(before, copies(model))
    assert {part for part in ("router", "experts") if any(f".{part}." in key for key in moved)} == parts
    assert all(".router." in key or ".experts." in key for key in moved)
    for kept, now in zip(texts, (task.marked, task.unsafe), strict=True):
        assert torch.equal(kept.images, now.images) and torch.equal(kept.labels, now.labels)


def test_unsafe_answers_come_with_the_refused_queries_only() -> None:
    task, _ = make_text_task(build_text_mixture(), needs={"marked"})
    assert task.unsafe is not None and len(task.unsafe) == len(task.marked)
    with pytest.raises(ConfigError, match="model: this defense is for images, and MergedModel takes texts"):
        create_defense("fine-pruning")(task)
