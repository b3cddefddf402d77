"""What `training.py` times: the toolbox's training step, two loops of a researcher, convolutions, matrix products."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import SMALL_PMOE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast, reproducible
from backdoorbench_moe.engine.training.step import WARMUP_STEPS
from backdoorbench_moe.engine.training.train import Trainer
from backdoorbench_moe.models import create_model

BATCH_SIZE = 128
IMAGE_SIZE = 32
CLASSES = 10
# Side of the matrices, and products of a round.
MATRIX, PRODUCTS = 2048, 20
LOADER_WORKERS = 2

Loop = Callable[[tuple[Tensor, ...]], object]


@dataclass(frozen=True)
class Measured:
    """A model to train.

    Args:
        model: Its name.
        options: Its options.
        batches: How many are timed in a round, so that a round takes seconds on two cores.
        beside: The loop that the toolbox's is compared with, a key of `LOOPS`.
        least: What is aimed for, by the name of the ratio.
        least_bf16: The same where the toolbox computes in bf16; None if it is the same.
        augment: How the toolbox augments its images.
    """

    model: str
    options: Mapping[str, Any]
    batches: int
    beside: str
    least: Mapping[str, float]
    least_bf16: Mapping[str, float] | None = None
    augment: str = "none"

    def goals(self, precision: str) -> dict[str, float]:
        """Return what is aimed for in a precision, by the name of the ratio."""
        return dict(self.least_bf16 if self.least_bf16 and precision == "bf16" else self.least)


MODELS = {
    "small": Measured("pmoe", SMALL_PMOE, batches=20, beside="plain", least={"speedup": 1.6}),
    "full": Measured("pmoe", {}, batches=3, beside="plain", least={"matrix_share": 0.8}),
    "preact_resnet18": Measured(
        "preact_resnet18",
        {},
        batches=3,
        beside="loader",
        least={"speedup": 1.3},
        least_bf16={"speedup": 3.0},
        augment="crop-flip",
    ),
}


def make_model(name: str, device: torch.device) -> nn.Module:
    """A model of the table above, the same weights at every call."""
    torch.manual_seed(0)
    measured = MODELS[name]
    model = create_model(measured.model, num_classes=CLASSES, image_size=IMAGE_SIZE, **measured.options)
    return model.to(device)


def warm_up(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> None:
    """Let a GPU capture its graph, after its own warm-up; on a CPU one batch sets up every kernel."""
    loop(order[:1] * (WARMUP_STEPS + 1 if device.type == "cuda" else 1))


def make_data(batches: int, batch_size: int, device: torch.device) -> tuple[Split, tuple[Tensor, ...]]:
    """Random images on the device, and the shuffled batches both loops go through."""
    draw = torch.Generator().manual_seed(0)
    count = batches * batch_size
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    order = torch.randperm(count, generator=draw).to(device)
    return Split(images, labels).to(device), order.split(batch_size)


def toolbox_loop(name: str, split: Split, batch_size: int, device: torch.device, precision: str) -> Loop:
    """The steps of `engine.training.train`, without its checkpoints and progress."""
    model, spec = make_model(name, device), TrainSpec(batch_size=batch_size, augment=MODELS[name].augment)
    trainer = Trainer(
        model, split, spec, seed=0, device=device, precision=precision, on_checkpoint=lambda *_: None
    )
    model.train()
    if trainer.augmentation is not None:
        trainer.augmentation.begin_epoch(0)

    def run(order: tuple[Tensor, ...]) -> float:
        with reproducible(device):
            trainer.step.reset()
            for indices in order:
                trainer.step.set_lr(spec.lr)
                trainer.step(indices)
            return float(trainer.step.loss_sum)

    return run


def plain_loop(name: str, split: Split, _batch_size: int, device: torch.device, _precision: str) -> Loop:
    """An ordinary loop in float32, on the device of the images."""
    images, labels = split.images.float() / 255, split.labels
    return researcher_loop(name, device, lambda order: ((images[each], labels[each]) for each in order))


def loader_loop(name: str, split: Split, batch_size: int, device: torch.device, _precision: str) -> Loop:
    """The same with a loader: images are decoded, augmented and normalised one at a time, by workers.

    The workers are as far ahead as they can be when a round begins.

    Source:
        BackdoorBench, `utils/aggregate_block/dataset_and_transform_generate.py` (transforms for CIFAR-10) and
        `utils/trainer_cls.py`.
    """
    changes = transforms.Compose(
        [
            transforms.RandomCrop(IMAGE_SIZE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
        ]
    )
    loader = DataLoader(
        Pictures(split.to(torch.device("cpu")), changes),
        batch_size=batch_size,
        shuffle=True,
        num_workers=LOADER_WORKERS,
        persistent_workers=True,
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def read(order: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in itertools.islice(batches, len(order)):
            yield images.to(device), labels.to(device)

    return researcher_loop(name, device, read)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as `PIL.Image`, each changed when it is read."""

    def __init__(self, split: Split, changes: Callable[[Any], Tensor]) -> None:
        self.images = [to_pil_image(image) for image in split.images]
        self.labels, self.changes = split.labels.tolist(), changes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.changes(self.images[index]), self.labels[index]


def researcher_loop(
    name: str, device: torch.device, read: Callable[..., Iterator[tuple[Tensor, Tensor]]]
) -> Loop:
    """Train in float32, and read loss and hits after every batch."""
    model = make_model(name, device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(order: tuple[Tensor, ...]) -> float:
        total, hits = 0.0, 0
        for x, y in read(order):
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
            hits += (logits.argmax(1) == y).sum().item()
        return total

    return run


def convolution_loop(name: str, split: Split, batch_size: int, device: torch.device, precision: str) -> Loop:
    """The model's convolutions alone, forward and backward, as the toolbox computes them: what nothing else can beat.

    Their inputs are drawn at random. The first one, whose input needs no gradient, has none here, too.
    """
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    model = make_model(name, device).to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, gradient = (torch.randn_like(each, dtype=dtype) for each in (inputs[0], output))
        calls.append((module, x.requires_grad_(bool(calls)), gradient))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(split.images[:batch_size].float().contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()

    def run(order: tuple[Tensor, ...]) -> None:
        for _ in order:
            for module, x, gradient in calls:
                with autocast(device, precision):
                    output = module(x)
                output.backward(gradient)
                x.grad = None
            model.zero_grad()

    return run


def matrix_loop(_name: str, _split: Split, _batch_size: int, device: torch.device, precision: str) -> Loop:
    """Products of square matrices in the precision that the toolbox computes in; nothing is trained."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, two = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))

    def run(_: tuple[Tensor, ...]) -> float:
        return sum(float((one @ two)[0, 0]) for _ in range(PRODUCTS))

    return run


LOOPS: dict[str, Callable[[str, Split, int, torch.device, str], Loop]] = {
    "toolbox": toolbox_loop,
    "plain": plain_loop,
    "loader": loader_loop,
    "convolutions": convolution_loop,
    "matrix": matrix_loop,
}


def seconds_of(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> float:
    """Wall seconds of one round, to the end of its last kernel."""
    start = time.perf_counter()
    loop(order)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
