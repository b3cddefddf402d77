"""A linear model with a planted trigger, and a task for it."""

from __future__ import annotations

import torch
from defense_tasks import CPU
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.tune import Tuner

CLASSES, TARGET, SIDE = 6, 2, 8


class Linear(nn.Module):
    """One linear layer on the pixels of images of 8x8."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def planted_model(pixels: Tensor, strength: float, *, target: int = TARGET, classes: int = CLASSES) -> Linear:
    """A model that sums the pixels of a row (its class) and calls an image `target` if some pixels are white.

    Args:
        pixels: (8, 8) bool, the pixels of the trigger.
        strength: Weight of each.
        target: The attacker's class.
        classes: Number of classes, at most 8.
    """
    model = Linear(classes)
    weights = torch.zeros(classes, 3, SIDE, SIDE)
    for label in range(classes):
        weights[label, :, label] = 1.0
    weights[target, :, pixels] = strength
    with torch.no_grad():
        model.layer.weight.copy_(weights.flatten(1))
        model.layer.bias.zero_()
        model.layer.bias[target] = -strength * 3 * pixels.sum() * 0.2
    return model.eval()


def row_images(count: int, *, seed: int = 0, classes: int = CLASSES) -> Split:
    """Dark images with one bright row, whose number is the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 50, (count, 3, SIDE, SIDE), generator=generator).byte()
    labels = torch.arange(count) % classes
    images[torch.arange(count), :, labels] += 150
    return Split(images, labels)


def planted_task(model: nn.Module, clean: Split, *, classes: int = CLASSES, seed: int = 3) -> DefenseTask:
    """A task with these clean images, as the engine makes it."""
    train = TrainSpec(batch_size=16, lr=0.05)
    return DefenseTask(
        model=model,
        num_classes=classes,
        image_size=SIDE,
        train=train,
        device=CPU,
        precision="fp32",
        seed=seed,
        tune=Tuner(train, seed, CPU, "fp32", Observer(), "tuning"),
        logits=lambda model, images: logits(model, images, precision="fp32"),
        routing=lambda model, images: iter(()),
        fresh=Linear,
        report=lambda name, model: None,
        granted={"clean": clean},
    )
