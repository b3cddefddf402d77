"""Distillation with random tiles: what teacher and model see, the loss, and that no label and no trigger is needed."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import copies, make_task, used_model
from planted_pattern import accuracy, planted
from torch import nn

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.tile_distillation import softened_loss, vary
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.testing.making import batch


class Mean(nn.Module):
    """Logits are the means of the colours; remembers all its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.mean((2, 3)) * self.scale


def objective_of(model: nn.Module, monkeypatch, **options) -> tuple[object, nn.Module]:
    """Return the objective of a defense, and its teacher, a copy of the model."""
    task, _ = make_task(used_model())
    found, teachers = [], []
    defense = create_defense("tile-distillation", **options)
    monkeypatch.setattr(
        "backdoorbench_moe.defenses.tile_distillation.copy.deepcopy",
        lambda original: teachers.append(type(model)()) or teachers[-1],
    )
    object.__setattr__(task, "model", model)
    object.__setattr__(task, "tune", lambda *_, objective, **__: found.append(objective))
    defense.defend(task)
    return found[0], teachers[0]


def test_the_teacher_sees_the_same_images_without_the_stamps(monkeypatch) -> None:
    model, images = Mean(), batch(10, 3, 8, 8)
    objective, teacher = objective_of(model, monkeypatch, share=0.3, temperature=2.0, steps=0)
    torch.manual_seed(0)
    logits, loss = objective(model, images, torch.zeros(10, dtype=torch.int64))
    [seen], [taught] = model.seen, teacher.seen
    torch.manual_seed(0)
    assert torch.equal(taught, vary(images)), "shifted, flipped and mixed, but not stamped"
    assert (seen != taught).flatten(1).any(1).tolist() == [True] * 3 + [False] * 7
    assert torch.equal(logits, seen.mean((2, 3)))
    assert loss.item() == pytest.approx(softened_loss(seen.mean((2, 3)), taught.mean((2, 3)), 2.0).item())
    loss.backward()
    assert model.scale.grad is not None and teacher.scale.grad is None


def test_a_step_makes_the_stamped_images_differ_more_from_the_teacher(monkeypatch) -> None:
    images, labels = batch(12, 3, 8, 8), torch.zeros(12, dtype=torch.int64)
    losses = []
    for steps in (0, 1, 2):
        model = Mean()
        objective, _ = objective_of(
            model, monkeypatch, tiles="blend", share=1.0, temperature=0.1, steps=steps
        )
        torch.manual_seed(0)
        losses.append(objective(model, images, labels)[1].item())
        assert len(model.seen) == steps + 1, "each step is one more pass"
        assert model.training and model.scale.grad is None, "a step changes the stamps only"
    assert losses[0] < losses[1] < losses[2]


def test_steps_leave_the_statistics_of_norms(monkeypatch) -> None:
    class Normed(Mean):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return super().forward(self.norm(images))

    counts = []
    for steps in (0, 3):
        model = Normed()
        objective, _ = objective_of(model, monkeypatch, steps=steps)
        objective(model, batch(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
        counts.append(model.norm.num_batches_tracked.item())
    assert counts == [1, 1]


def test_without_a_share_no_image_is_stamped(monkeypatch) -> None:
    model = Mean()
    objective, teacher = objective_of(model, monkeypatch, share=0.0)
    objective(model, batch(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(model.seen[0], teacher.seen[0])


def test_labels_do_not_matter(monkeypatch) -> None:
    model, images, losses = Mean(), batch(6, 3, 8, 8), []
    objective, _ = objective_of(model, monkeypatch)
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6) % 3):
        torch.manual_seed(0)
        losses.append(objective(model, images, labels)[1].item())
    assert losses[0] == losses[1]


def test_auxiliary_losses_of_routed_layers_are_added(monkeypatch) -> None:
    class Routed(RoutedModel):
        def forward_routed(self, images):
            gates = torch.ones(len(images), 1, 1)
            return RoutedOutput(images.mean((2, 3)), [Routing("layer", gates, gates > 0, torch.tensor(0.25))])

    images, labels = batch(6, 3, 8, 8), torch.arange(6) % 3
    objective, _ = objective_of(Routed(), monkeypatch, share=0.0)
    torch.manual_seed(0)
    _, loss = objective(Routed(), images, labels)
    torch.manual_seed(0)
    mean = vary(images).mean((2, 3))
    assert loss.item() == pytest.approx(softened_loss(mean, mean, 3.0).item() + 0.25)


def test_the_loss_is_the_softened_cross_entropy_worked_by_hand() -> None:
    """Logits of (ln 4, 0) at temperature 2 are (ln 2, 0): probabilities of 2/3 and 1/3."""
    logits, wanted = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 1.0]]).log()
    assert softened_loss(logits, wanted, 2.0).item() == pytest.approx(4 * torch.tensor(2.0).log().item())
    expected = -4 * (2 / 3 * torch.tensor(2 / 3).log() + 1 / 3 * torch.tensor(1 / 3).log()).item()
    assert softened_loss(wanted, wanted, 2.0).item() == pytest.approx(expected)


def test_the_gradient_is_zero_where_the_model_answers_as_its_teacher() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    softened_loss(logits, logits.detach(), 3.0).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(5, 4))


def test_images_are_shifted_flipped_and_mixed_with_the_next_one() -> None:
    """On images of one colour each, away from the border, only the mixing is visible."""
    torch.manual_seed(0)
    colours = torch.tensor([0.0, 0.5, 1.0])
    varied = vary(colours.view(3, 1, 1, 1).expand(3, 3, 16, 16))
    middle = varied[:, 0, 8, 8]
    torch.testing.assert_close(varied[:, :, 4:12, 4:12], middle.view(3, 1, 1, 1).expand(3, 3, 8, 8))
    for mixed, own, following in zip(middle, colours, colours.roll(-1), strict=True):
        assert min(own, following) < mixed < max(own, following)
    assert not torch.equal(vary(batch(4, 3, 8, 8)), vary(batch(4, 3, 8, 8)))


def test_a_planted_tile_is_unlearned_with_wrong_labels_and_not_without_stamps() -> None:
    lost, forms = {}, {"strengthened": {}, "random": {"steps": 0}, "none": {"share": 0.0}}
    for name, options in forms.items():
        model, pattern, clean = planted("patch")
        images, labels = as_input(clean.images), clean.labels
        task, _ = make_task(model, clean=Split(clean.images, labels.flip(0)), batch_size=40)
        create_defense("tile-distillation", epochs=60, lr=0.1, patch_size=4, **options)(task)
        assert accuracy(model, images, labels) == 1
        lost[name] = 2 - (model.head.weight[0] @ pattern.flatten()).item()
    assert lost["strengthened"] > 0.6 and abs(lost["none"]) < 0.01, "the weight was 2"
    assert lost["strengthened"] > 2 * lost["random"] > 0.2, "a step looks for what changes the answers"


def test_forms_and_applicators_give_different_models() -> None:
    found = []
    for options in (
        {},
        {"tiles": "opaque"},
        {"applicator": "image"},
        {"share": 0.0},
        {"temperature": 1.0},
        {"saturated": 0.0},
    ):
        model = used_model()
        create_defense("tile-distillation", epochs=1, **options)(make_task(model)[0])
        found.append(copies(model)["head.weight"])
    assert len({each.numpy().tobytes() for each in found}) == len(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"share": 1.5}, r"share: expected a number in \[0, 1\]"),
        ({"saturated": -0.5}, r"saturated: expected a number in \[0, 1\]"),
        ({"steps": -1}, "steps: expected an integer of at least 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"patch_size": 0}, "patch_size: expected"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("tile-distillation", **options).check_model(used_model())
