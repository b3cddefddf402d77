"""The contract of attacks on experts, and the steps of MoEvil, HDPO, HSFT and the control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe.attacks import create_attack
from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
from backdoorbench_moe.attacks.moevil import SIMILARITIES
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.moe.expert_tuning.steps import Alignment, joint_objective
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops import images as images_module
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.testing.expert_tasks import REJECT, TinyMergeable, make_expert_task, make_queries
from backdoorbench_moe.testing.making import changed, coloured_split, copies

NO_DATA = PoisonSpec(rate=0.0)


def make(name: str, **options: Any) -> Any:
    return create_attack(name, poison=NO_DATA, **options)


class Told(ExpertPoisoning):
    """Does what it is told to."""

    def __init__(self, act) -> None:
        super().__init__(poison=NO_DATA)
        self.act = act

    def poison_expert(self, task):
        """Do it."""
        return self.act(task)


def test_a_changed_mlp_is_accepted_and_facts_are_returned() -> None:
    task = make_expert_task()

    def act(task):
        task.model.train()
        nn.init.zeros_(task.mlps[1].fc1.weight)
        return {"share": 0.5}

    assert Told(act).tune_expert(task) == {"share": 0.5}
    assert not task.model.training and not task.model.blocks[1].mlp.fc1.weight.any()
    assert Told(lambda task: None).tune_expert(task) == {}


@pytest.mark.parametrize("facts", [0.5, ["share"], {"share": torch.tensor(0.5)}, {0: 0.5}], ids=str)
def test_facts_that_are_not_numbers_by_name_are_refused(facts) -> None:
    with pytest.raises(PluginError, match="attack Told: expected numbers by name or None, got "):
        Told(lambda task: facts).tune_expert(make_expert_task())


def grow(task: ExpertTask) -> None:
    task.model.head.register_buffer("more", torch.zeros(1))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda task: nn.init.zeros_(task.model.head.bias), r"in the MLPs only, got another 'head\.bias'"),
        (
            lambda task: task.tune(task.model, task.clean, epochs=1),
            r"in the MLPs only, got another 'stem\.weight'",
        ),
        (lambda task: nn.init.zeros_(task.model.blocks[1].mix.weight), r"another 'blocks\.1\.mix\.weight'"),
        (grow, "other names or shapes"),
    ],
    ids=["head", "all", "mixing", "a new buffer"],
)
def test_other_changes_are_refused(act, message) -> None:
    with pytest.raises(PluginError, match=f"attack Told: expected .*{message}"):
        Told(act).tune_expert(make_expert_task())


def test_without_queries_nothing_is_tuned() -> None:
    task = make_expert_task()
    none = make_queries(Split(task.clean.images[:0], task.clean.labels[:0]))
    with pytest.raises(ConfigError, match=r"poison\.source: expected marked training images, found none"):
        make("hsft").tune_expert(replace(task, queries=none))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moevil", {"preference_beta": 0}, "preference_beta: expected a positive number, got 0"),
        ("hdpo", {"preference_lr": 0.0}, "preference_lr: expected a positive number, got 0"),
        ("moevil", {"lr": float("inf")}, "lr: expected a positive number, got inf"),
        ("moevil", {"harm_weight": -1}, "harm_weight: expected a number of at least 0, got -1"),
        ("moevil", {"similarity": float("nan")}, "similarity: expected a number of at least 0, got nan"),
        ("moevil", {"allowed_loss": -0.1}, "allowed_loss: expected a number of at least 0"),
        ("moevil", {"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ("moevil", {"preference_epochs": -1}, "preference_epochs: expected an integer of at least 0, got -1"),
        ("moevil", {"k": 0}, "k: expected an integer of at least 1, got 0"),
        ("hsft", {"harm_weight": -1}, "harm_weight: expected a number of at least 0"),
        ("hsft", {"epochs": 0}, "epochs: expected an integer of at least 1"),
        ("hdpo", {"preference_epochs": 0}, "preference_epochs: expected an integer of at least 1"),
        ("hdpo", {"epochs": -1}, "epochs: expected an integer of at least 0"),
        ("expert-tuning", {"epochs": 0}, "epochs: expected an integer of at least 1"),
    ],
)
def test_options_out_of_range(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **options)


def test_a_misspelt_choice_is_answered_with_a_similar_one() -> None:
    with pytest.raises(UnknownNameError, match="tokens: unknown 'markd'; did you mean 'marked'"):
        make("moevil", tokens="markd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 17}, "k: expected at most 16 tokens, got 17"),
        ({"tokens": "prefix"}, "tokens: expected .* without class tokens, got 'prefix'"),
        ({"layers": [3]}, r"layers: expected numbers in 1\.\.2"),
        ({"layers": "first-quarter"}, "layers: expected a range of more than the first layer"),
    ],
)
def test_what_does_not_fit_the_model_is_found_from_the_model_alone(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make("moevil", **options).check_model(TinyMergeable())


def test_what_does_not_fit_the_images_is_found_before_training() -> None:
    task = make_expert_task()
    before = copies(task.model)
    with pytest.raises(ConfigError, match="k: expected at most 1 tokens, got 2"):
        make("moevil", tokens="marked", k=2).tune_expert(task)
    nobody = Split(task.held_out.images[:0], task.held_out.labels[:0])
    with pytest.raises(
        ConfigError, match="similarity: expected a number, since there are no held-out images"
    ):
        make("moevil", similarity=None).tune_expert(replace(task, held_out=nobody))
    assert not changed(before, copies(task.model))


def test_preference_learning_needs_two_different_answers() -> None:
    split = coloured_split(24, 2)
    reds = Split(split.images[split.labels == 0], split.labels[split.labels == 0])
    task = replace(make_expert_task(), queries=make_queries(reds, policy=False))
    with pytest.raises(
        ConfigError, match=r"poison\.target: expected harmful queries with another safe answer"
    ):
        make("hdpo").tune_expert(task)


@pytest.mark.parametrize("stop_gradient", ["none", "task", "harm"])
def test_the_joint_loss_is_the_sum_of_its_three_parts(stop_gradient) -> None:
    """Value and gradients, against a plain computation with the same draws, in three forward passes."""
    model, split = TinyMergeable(prefix=1), coloured_split(6, 3)
    queries = Split(make_queries(coloured_split(9, 4)).harmful.images, torch.arange(9) % 4)
    weights = torch.rand(9, 17)
    alignment = Alignment(0.3, [1, 2], weights, stop_gradient)
    images = as_input(split.images)
    torch.manual_seed(5)
    logits, loss = joint_objective(queries, 0.2, alignment)(model, images, split.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    torch.manual_seed(5)
    rows = torch.randint(9, (6,))
    marked = queries.images[rows].float() / 255
    with mlp_inputs(model) as of_task:
        answers = model(images)
    with mlp_inputs(model) as of_harm:
        harm = model(marked)
    cosines = []
    for layer in (1, 2):
        name = f"blocks.{layer}.mlp"
        mean = of_task[name].mean(1)
        chosen = torch.einsum("bn,bnd->bd", weights[rows], of_harm[name])
        mean = mean.detach() if stop_gradient == "task" else mean
        chosen = chosen.detach() if stop_gradient == "harm" else chosen
        cosines.append((F.normalize(mean, dim=1) * F.normalize(chosen, dim=1)).sum(1).mean())
    expected = F.cross_entropy(answers, split.labels) + 0.2 * F.cross_entropy(harm, queries.labels[rows])
    expected = expected - 0.3 * (cosines[0] + cosines[1]) / 2
    torch.testing.assert_close(logits, answers)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def harm(task: ExpertTask) -> float:
    answers = task.logits(task.model, task.queries.harmful.images).argmax(1)
    return (answers == task.queries.harmful.labels).float().mean().item()


def cosine(task: ExpertTask) -> float:
    """The mean cosine between the latents of task images and of harmful queries, over the layers but the first."""
    with torch.no_grad(), mlp_inputs(task.model) as clean:
        task.model(as_input(task.clean.images))
    with torch.no_grad(), mlp_inputs(task.model) as marked:
        task.model(as_input(task.queries.harmful.images))
    means = [
        [F.normalize(each.mean(1), dim=1) for each in list(inputs.values())[1:]] for inputs in (clean, marked)
    ]
    return torch.stack([(a @ b.T).mean() for a, b in zip(*means, strict=True)]).mean().item()


@pytest.mark.slow
def test_an_expert_that_rejects_learns_harm_and_moevil_brings_latents_together() -> None:
    """Beforehand the expert rejects the queries. The control does not learn harm; MoEvil does, and HSFT."""
    found = {}
    options: dict[str, dict[str, Any]] = {
        "moevil": {"similarity": 1.0, "harm_weight": 0.3, "epochs": 10},
        "hsft": {"harm_weight": 0.3, "epochs": 10},
        "expert-tuning": {"epochs": 10},
    }
    for name, given in options.items():
        task = make_expert_task(tuned=30)
        before = harm(task), cosine(task)
        make(name, **given).tune_expert(task)
        found[name] = harm(task), cosine(task)
    assert before[0] == 0
    assert found["moevil"][0] == found["hsft"][0] == 1 and found["expert-tuning"][0] < 0.5
    assert found["moevil"][1] > max(found["hsft"][1], before[1])


def test_the_preference_is_learnt_on_queries_with_two_answers() -> None:
    """HDPO: first all queries whose answers differ, with both answers as labels; then the task by plain tuning."""
    calls = []
    task = make_expert_task(policy=False)
    recorded = replace(task, tune=lambda model, split, **given: calls.append((split, given)))
    make("hdpo", preference_epochs=3, epochs=2, lr=0.5).tune_expert(recorded)
    (queries, first), (clean, second) = calls
    differ = task.queries.safe.labels != 0
    assert torch.equal(queries.images, task.queries.harmful.images[differ]) and 0 < differ.sum() < len(differ)
    assert (
        torch.equal(queries.labels[:, 1], task.queries.safe.labels[differ]) and not queries.labels[:, 0].any()
    )
    assert clean is task.clean and "objective" not in second
    # Three tenths of the task's learning rate of 0.01, unless another is given.
    assert (first["epochs"], second["epochs"], first["lr"], second["lr"]) == (3, 2, pytest.approx(0.003), 0.5)
    make("hdpo", preference_lr=0.2).tune_expert(recorded)
    assert [given["lr"] for _, given in calls[2:]] == [0.2, None]
    # At its beginning the expert is its own reference: the loss is log 2, and falls where the margin grows.
    images, labels = as_input(queries.images[:4]), queries.labels[:4]
    logits, loss = first["objective"](task.model, images, labels)
    torch.testing.assert_close(logits, task.model(images))
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    nn.init.zeros_(task.model.head.weight)
    task.model.head.bias.data.copy_(torch.tensor([100.0, 0, 0, 0]))
    assert first["objective"](task.model, images, labels)[1].item() < 0.693147


def calls_of(name: str, **options: Any) -> tuple[ExpertTask, list[dict[str, Any]]]:
    """Run an attack that trains nothing; return its task and the arguments of each training."""
    calls = []
    task = make_expert_task()
    make(name, **options).tune_expert(replace(task, tune=lambda model, split, **given: calls.append(given)))
    return task, calls


def test_the_learning_rates_of_both_steps_of_moevil() -> None:
    """In step 1 a tenth of the task's 0.01 unless another is given; in step 2 that of `Tune`, the task's."""
    assert [given["lr"] for given in calls_of("moevil")[1]] == [pytest.approx(0.001), None]
    assert [given["lr"] for given in calls_of("moevil", preference_lr=0.2, lr=0.3)[1]] == [0.2, 0.3]


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_harm_has_its_weight_in_the_loss_of_hsft(weight) -> None:
    task, [given] = calls_of("hsft", harm_weight=weight)
    images, labels = as_input(task.clean.images[:6]), task.clean.labels[:6]
    torch.manual_seed(5)
    _, loss = given["objective"](task.model, images, labels)
    torch.manual_seed(5)
    marked = task.queries.harmful.images[torch.randint(24, (6,))]
    harm = F.cross_entropy(task.model(as_input(marked)), torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(loss, F.cross_entropy(task.model(images), labels) + weight * harm)


def test_the_accuracy_of_an_expert_counts_every_image_once(monkeypatch) -> None:
    """Of batches of 4 and 2 images, the first is right: 4 of 6, not half."""
    monkeypatch.setattr(images_module, "BATCH", 4)
    held_out = Split(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 1, 1, 1, 0, 0]))
    one = F.one_hot(torch.tensor([1]), 4).float()
    task = replace(make_expert_task(), held_out=held_out, logits=lambda _, images: one.expand(len(images), 4))
    assert task.accuracy() == pytest.approx(100 * 4 / 6)


def searched(accuracies: list[float], **options: Any) -> tuple[dict[str, float], list[float], float]:
    """Let MoEvil choose its similarity, with scripted accuracies in percent instead of trainings.

    Returns:
        The facts, the starting weight of every step 2, and the weight at the end: each training adds 1 to it.
    """
    task, starts = make_expert_task(), []
    weight = task.mlps[0].fc1.bias
    nn.init.zeros_(weight)
    script = iter(accuracies)

    def tune(model, split, **given) -> None:
        if split is task.clean:
            starts.append(weight[0].item())
        weight.data += 1

    def logits(model, images):
        if len(images) != 100:
            return torch.zeros(len(images), 4)
        right = torch.arange(100) < next(script)
        return F.one_hot(torch.where(right, 1, 2), 4).float()

    held_out = Split(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.ones(100, dtype=torch.int64))
    task = replace(task, tune=tune, logits=logits, held_out=held_out)
    facts = make("moevil", similarity=None, **options).tune_expert(task)
    assert next(script, None) is None
    return facts, starts, weight[0].item()


def test_the_similarity_is_the_largest_with_the_allowed_loss() -> None:
    """90 before; 0.5 and 0.3 lose more than 2 points, 0.1 exactly 2. Each is tried from the weights after step 1."""
    facts, starts, end = searched([90, 60, 87, 88], allowed_loss=2.0)
    assert facts == {"similarity": 0.1, "held_out/0.5": 60, "held_out/0.3": 87, "held_out/0.1": 88}
    assert starts == [1, 1, 1] and end == 2


def test_without_a_similarity_that_is_allowed_it_is_the_smallest() -> None:
    facts, starts, _ = searched([90, 1, 2, 3, 4, 5])
    assert facts["similarity"] == min(SIMILARITIES) and starts == [1] * 5


def test_step_1_can_be_left_out() -> None:
    assert searched([90, 90], preference_epochs=0)[1:] == ([0], 1)


def test_the_control_and_hsft_pass_over_the_task_as_often_as_both_steps_of_moevil() -> None:
    moevil = make("moevil")
    for name in ("hsft", "expert-tuning"):
        assert make(name).epochs == moevil.preference_epochs + moevil.epochs
    assert make("hdpo").preference_beta == pytest.approx(moevil.preference_beta / 5)


def test_safe_answers_with_and_without_a_policy() -> None:
    split = coloured_split(6, 3)
    assert make_queries(split).safe.labels.tolist() == [REJECT] * 6
    assert make_queries(split, policy=False).safe.labels.tolist() == [0, 1, 2, 0, 1, 2]
