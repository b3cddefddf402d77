"""Training: the schedule by hand, the step against plain PyTorch, going on where it stopped."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.engine.training import step as step_module
from backdoorbench_moe.engine.training.checkpoint import load_weights
from backdoorbench_moe.engine.training.step import TrainStep, make_optimizer
from backdoorbench_moe.engine.training.train import Trainer, learning_rate
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.augmentation import Augmentation
from backdoorbench_moe.ops.seeding import generator, seeded

CPU = torch.device("cpu")


class Net(nn.Module):
    """A small net with batch norm and dropout, so that buffers and noise are tested too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def make_split(count: int = 50) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3)


def make_trainer(spec: TrainSpec, saved: list, model: nn.Module | None = None) -> Trainer:
    with seeded(7, "init"):
        model = model or Net()

    def keep(tensors, state) -> None:
        # Contiguous, as they come back from disk, whatever the layout they had in memory.
        copies = {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        saved.append((copies, {**state, "history": [*state["history"]]}))

    return Trainer(model, make_split(), spec, seed=7, device=CPU, precision="fp32", on_checkpoint=keep)


def test_constant_schedule() -> None:
    assert [learning_rate(TrainSpec(lr=0.3), step, 10) for step in (0, 5, 9)] == [0.3] * 3


def test_one_cycle_rises_and_falls_in_straight_lines() -> None:
    spec = TrainSpec(lr=1.0, schedule="one-cycle", warmup=0.5)
    rates = [learning_rate(spec, step, 8) for step in range(8)]
    assert rates == pytest.approx([0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125])
    assert learning_rate(TrainSpec(lr=1.0, schedule="one-cycle", warmup=0.0), 0, 2) == pytest.approx(0.75)


def torch_rates(schedule, steps: int) -> list[float]:
    """The learning rates of a schedule of torch's that starts at 0.3."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, rates = schedule(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40), 40)
    spec = TrainSpec(lr=0.3, schedule="cosine")
    assert [learning_rate(spec, step, 40) for step in range(40)] == pytest.approx(expected)
    assert expected[0] == 0.3 and 0 < expected[-1] < 0.001


def test_step_is_torchs_with_milestones_as_shares() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [12, 28], gamma=0.5), 40)
    spec = TrainSpec(lr=0.3, schedule="step", milestones=(0.3, 0.7), gamma=0.5)
    assert [learning_rate(spec, step, 40) for step in range(40)] == pytest.approx(expected)
    default = TrainSpec(lr=1.0, schedule="step")
    rates = [learning_rate(default, step, 8) for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_plain_sgd_on_cross_entropy(momentum) -> None:
    model, split = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double(), make_split(6)
    weight, bias = (p.detach().clone().requires_grad_() for p in model[1].parameters())
    spec = TrainSpec(lr=0.05, momentum=momentum, weight_decay=0.01)
    step = TrainStep(model.float(), make_optimizer(model, spec, CPU), split, CPU, "fp32")
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    losses = []
    for _ in range(3):
        step(torch.arange(6))
        inputs = split.images.flatten(1).double() / 255
        scores = inputs @ weight.T + bias
        loss = (scores.logsumexp(1) - scores[torch.arange(6), split.labels]).mean()
        grads = torch.autograd.grad(loss, (weight, bias))
        losses.append(6 * loss.item())
        with torch.no_grad():
            for index, (p, grad) in enumerate(zip((weight, bias), grads, strict=True)):
                decayed = grad + (0.01 * p if index == 0 else 0)  # Biases do not decay.
                velocity[index] = momentum * velocity[index] + decayed
                p -= 0.05 * velocity[index]
    torch.testing.assert_close(model[1].weight.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].bias.double(), bias, atol=1e-5, rtol=1e-4)
    assert step.loss_sum.item() == pytest.approx(sum(losses), rel=1e-4)


def test_smoothed_labels_and_a_clipped_gradient_by_hand() -> None:
    """One step from zero weights: all probabilities are 1/3, so the gradients are known."""
    model, split = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), make_split(6)
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    spec = TrainSpec(lr=1.0)
    step = TrainStep(
        model, make_optimizer(model, spec, CPU), split, CPU, "fp32", label_smoothing=0.3, clip_grad=0.01
    )
    step(torch.arange(6))
    answers = torch.full((6, 3), 0.1)
    answers[torch.arange(6), split.labels] = 0.8
    wrong = 1 / 3 - answers
    grads = [wrong.T @ (split.images.flatten(1) / 255) / 6, wrong.mean(0)]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    assert norm > 0.01
    for parameter, grad in zip(model[1].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.detach(), -0.01 * grad / norm, atol=1e-7, rtol=1e-3)


def test_a_small_gradient_is_not_clipped() -> None:
    states = []
    for clip in (None, 1e6):
        trainer = make_trainer(TrainSpec(epochs=1, batch_size=16, clip_grad=clip), [])
        trainer.fit("run")
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)


@pytest.mark.parametrize(
    "recipe",
    [
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "schedule": "cosine"},
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "schedule": "step", "milestones": (0.5,)},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.5, "schedule": "one-cycle", "warmup": 0.4},
        {"lr": 0.1, "momentum": 0.8, "label_smoothing": 0.2, "clip_grad": 0.05},
    ],
    ids=["nesterov", "step", "adamw", "smoothed and clipped"],
)
def test_training_is_this_loop_in_plain_pytorch(recipe) -> None:
    """Two epochs of batches of 20, 20 and 10 images: six steps, and weight decay for matrices and kernels alone."""
    spec = TrainSpec(epochs=2, batch_size=20, **recipe)
    with seeded(0, "init"):
        model = Plain()
    other, split = copy.deepcopy(model), make_split()
    trainer = make_trainer(spec, [], model)
    history = trainer.fit("run").history
    groups = [
        {"params": [p for name, p in other.named_parameters() if name.endswith("weight")]},
        {"params": [p for name, p in other.named_parameters() if name.endswith("bias")], "weight_decay": 0},
    ]
    given = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, **given)
    else:
        optimizer = torch.optim.SGD(groups, momentum=spec.momentum, nesterov=spec.nesterov, **given)
    rates = [learning_rate(spec, step, 6) for step in range(6)]
    images = split.images.float() / 255
    for epoch in range(2):
        losses, hits = 0.0, 0
        order = torch.randperm(50, generator=generator(7, "order", epoch))
        for batch, rate in zip(order.split(20), rates[3 * epoch : 3 * epoch + 3], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits, labels = other(images[batch]), split.labels[batch]
            loss = F.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if spec.clip_grad is not None:
                nn.utils.clip_grad_norm_(other.parameters(), spec.clip_grad)
            optimizer.step()
            losses, hits = losses + loss.item() * len(batch), hits + (logits.argmax(1) == labels).sum().item()
        row = history[epoch]
        assert row["loss"] == pytest.approx(losses / 50, rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(100 * hits / 50)
        assert (row["epoch"], row["lr"]) == (epoch + 1, pytest.approx(rates[3 * epoch + 2]))
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_no_pass_has_more_images_than_a_batch_where_batches_are_accumulated() -> None:
    trainer = make_trainer(TrainSpec(epochs=1, batch_size=8, accumulate=3), [], Keeping())
    trainer.fit("run")
    assert [len(images) for images in trainer.model.seen] == [8, 8, 8, 8, 8, 8, 2]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_step_computes_in_the_given_precision_and_keeps_its_weights_in_32_bits(precision, dtype) -> None:
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    optimizer = make_optimizer(model, TrainSpec(), CPU)
    TrainStep(model, optimizer, make_split(6), CPU, precision)(torch.arange(6))
    assert seen == [dtype]
    assert (
        {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    )


class Keeping(nn.Module):
    """A model that keeps the images it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(3 * 64, 3), []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return self.head(images.flatten(1))


def test_every_epoch_augments_the_images_as_the_victim_has_them() -> None:
    spec = TrainSpec(epochs=2, batch_size=20, augment="crop-flip")
    trainer = make_trainer(spec, [], Keeping())
    trainer.fit("run")
    split = make_split()
    for epoch in range(2):
        order = torch.randperm(50, generator=generator(7, "order", epoch))
        expected = Augmentation(("crop", "flip"), 7, CPU)
        expected.begin_epoch(epoch)
        seen = torch.cat(trainer.model.seen[3 * epoch : 3 * epoch + 3])
        assert torch.equal(seen, expected(as_input(split.images[order]), order))
    assert torch.equal(trainer.split.images, split.images), "the split itself was changed"


def test_the_routers_own_loss_is_added() -> None:
    class Balanced(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward_routed(self, images):
            logits = torch.zeros(len(images), 3) + 0 * self.weight
            routings = [
                Routing("a", logits, logits > 0, 2 * self.weight.sum()),
                Routing("b", logits, logits > 0),
            ]
            return RoutedOutput(logits, routings)

    model = Balanced()
    TrainStep(model, make_optimizer(model, TrainSpec(lr=0.5), CPU), make_split(4), CPU, "fp32")(
        torch.arange(4)
    )
    assert model.weight.item() == pytest.approx(-0.5 * 2)


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step_and_is_compiled_once_a_batch_size(monkeypatch) -> None:
    """Two seeds, batches of 16 and of 4: two compilations in all. Without the code generator, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    step_module._compiled_losses.cache_clear()
    before = dynamo_counters["stats"]["unique_graphs"]
    for seed in (0, 1):
        weights = []
        for compiled in (False, True):
            with seeded(seed, "init"):
                model = create_model("pmoe", num_classes=3, widen_factor=1, moe_channels=8, expert_channels=4)
            split = Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 3)
            split.images.random_(generator=torch.Generator().manual_seed(seed))
            optimizer = make_optimizer(model, TrainSpec(), CPU)
            step = TrainStep(model, optimizer, split, CPU, "fp32", compile=compiled)
            for indices in torch.arange(20).split(16):
                step(indices)
            weights.append(model.state_dict())
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, msg=name)
    assert dynamo_counters["stats"]["unique_graphs"] - before == 2
    step_module._compiled_losses.cache_clear()


def test_input_is_scaled_and_channels_last() -> None:
    inputs = as_input(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))
    assert inputs.dtype == torch.float32 and inputs.is_contiguous(memory_format=torch.channels_last)
    assert (inputs == 1).all()


@pytest.mark.parametrize(
    "recipe",
    [
        {"optimizer": "sgd", "schedule": "one-cycle"},
        {"optimizer": "adamw", "schedule": "one-cycle"},
        {"schedule": "cosine", "augment": "crop-flip-rotate-colour-erase", "label_smoothing": 0.1},
        {"schedule": "step", "augment": "crop", "clip_grad": 0.5},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
def test_going_on_from_any_epoch_gives_the_same_bits(recipe) -> None:
    spec = TrainSpec(**{"epochs": 3, "batch_size": 16, "lr": 0.01, "momentum": 0.9, **recipe})
    saved: list = []
    whole = make_trainer(spec, saved)
    whole.fit("whole")
    for tensors, state in saved[:-1]:
        again = make_trainer(spec, [])
        again.restore(tensors, state)
        again.fit("again")
        for name, tensor in whole.tensors().items():
            assert torch.equal(tensor, again.tensors()[name]), name
        losses = [[row["loss"] for row in trainer.progress.history] for trainer in (whole, again)]
        assert losses[0] == losses[1]


def test_training_learns() -> None:
    trainer = make_trainer(TrainSpec(epochs=30, batch_size=16, lr=0.05, momentum=0.9), [])
    history = trainer.fit("learn").history
    assert len(history) == 30
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_divergence_is_said() -> None:
    with pytest.raises(
        RecordError, match=r"training diverged in epoch \d+.*\(train\.lr, or lr of a defense\)"
    ):
        make_trainer(TrainSpec(epochs=5, lr=1e30), []).fit("diverge")


def test_weights_must_fit() -> None:
    model = nn.Linear(2, 3)
    state = dict(model.state_dict())
    with pytest.raises(RecordError, match=r"file: weight 'weight': expected shape \(3, 2\), got \(3, 4\)"):
        load_weights(model, {**state, "weight": torch.zeros(3, 4)}, "file")
    with pytest.raises(RecordError, match="file: weight 'bias' is missing"):
        load_weights(model, {"weight": state["weight"]}, "file")
    with pytest.raises(RecordError, match="file: weight 'extra' is unknown to the model"):
        load_weights(model, {**state, "extra": state["bias"]}, "file")


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    states = []
    for size in (50, 10**6):
        trainer = make_trainer(TrainSpec(epochs=1, batch_size=size), [])
        trainer.fit("run")
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


class Plain(nn.Module):
    """A net without batch statistics and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


class TextNet(nn.Module):
    """A net of texts: logits (B, T, 7) from each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).tanh())


def text_split() -> Split:
    """25 texts whose answers have 1 to 5 tokens."""
    draws = torch.Generator().manual_seed(1)
    tokens, lengths = torch.randint(0, 7, (25, 8), generator=draws), torch.arange(25) % 5 + 1
    places = torch.arange(8)
    emits = (places >= 2) & (places < 2 + lengths.unsqueeze(1))
    return Split(tokens, torch.where(emits, tokens.roll(-1, 1), -100))


def squared(model, images, labels):
    """A loss of one's own, a mean over the images."""
    logits = model(images)
    return logits, logits.square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("objective", [None, squared])
@pytest.mark.parametrize(("net", "split"), [(Plain, make_split()), (TextNet, text_split())])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulated_batches_are_one_large_batch(net, split, optimizer, objective) -> None:
    recipe = {"epochs": 2, "optimizer": optimizer, "lr": 0.01, "schedule": "one-cycle", "clip_grad": 0.1}
    found = []
    for sizes in ({"batch_size": 12}, {"batch_size": 4, "accumulate": 3}, {"batch_size": 4}):
        with seeded(7, "init"):
            model = net()
        trainer = Trainer(
            model,
            split,
            TrainSpec(**recipe, **sizes),
            seed=3,
            device=CPU,
            precision="fp32",
            on_checkpoint=lambda *_: None,
            objective=objective,
        )
        rows = trainer.fit("run").history
        kept = [{name: row[name] for name in ("loss", "train_accuracy", "lr")} for row in rows]
        found.append((kept, model.state_dict()))
    (large, weights), (small, same), (_, other) = found
    for row, own in zip(large, small, strict=True):
        assert own == pytest.approx(row, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(other[name], tensor, rtol=1e-3) for name, tensor in weights.items())
