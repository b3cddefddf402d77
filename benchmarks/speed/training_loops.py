"""Loops timed by `training.py`: the toolbox's step, also compiled; two plain loops; convolutions; matrix products."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
# Size of the matrices, and default number of products per round.
MATRIX, PRODUCTS = 2048, 20
LOADER_WORKERS = 2

Loop = Callable[[tuple[Tensor, ...]], object]


@dataclass(frozen=True)
class Measured:
    """A model to train.

    Args:
        model: Name of the model.
        options: Options of the model.
        batches: Number of batches per round, so that a round takes seconds on two cores.
        beside: The loop with which the toolbox's is compared, a key of `LOOPS`.
        least: Goals, by name of the ratio.
        least_bf16: Goals if the toolbox computes in bf16; None if they are the same.
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
        """Return the goals in a precision, by name of the ratio."""
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
    """Return a model of the table above, with the same weights in every call."""
    torch.manual_seed(0)
    measured = MODELS[name]
    model = create_model(measured.model, num_classes=CLASSES, image_size=IMAGE_SIZE, **measured.options)
    return model.to(device)


def warm_up(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> None:
    """Let a GPU warm up and capture its graph; on a CPU, one batch sets up all kernels."""
    loop(order[:1] * (WARMUP_STEPS + 1 if device.type == "cuda" else 1))


def make_data(batches: int, batch_size: int, device: torch.device) -> tuple[Split, tuple[Tensor, ...]]:
    """Return random images on the device, and the shuffled batches of both loops."""
    draw = torch.Generator().manual_seed(0)
    count = batches * batch_size
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    order = torch.randperm(count, generator=draw).to(device)
    return Split(images, labels).to(device), order.split(batch_size)


def toolbox_loop(
    name: str, split: Split, batch_size: int, device: torch.device, precision: str, *, compile: bool = False
) -> Loop:
    """Return a loop with the steps of `engine.training.train`, without checkpoints and progress."""
    model, spec = make_model(name, device), TrainSpec(batch_size=batch_size, augment=MODELS[name].augment)
    trainer = Trainer(
        model,
        split,
        spec,
        seed=0,
        device=device,
        precision=precision,
        on_checkpoint=lambda *_: None,
        compile=compile,
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
    """Return a plain loop in float32, on the device of the images."""
    images, labels = split.images.float() / 255, split.labels
    return researcher_loop(name, device, lambda order: ((images[each], labels[each]) for each in order))


def loader_loop(name: str, split: Split, batch_size: int, device: torch.device, _precision: str) -> Loop:
    """Return a plain loop with a loader: workers decode, augment and normalise images one at a time.

    When a round begins, the workers have prefetched as many batches as they can.

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
    """Images as `PIL.Image`, each transformed when it is read."""

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
    """Return a loop that trains in float32 and reads loss and hits after every batch."""
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
    """Return a loop of only the model's convolutions, forward and backward, as the toolbox computes them.

    Its time is a lower bound for training. The inputs are random; as in training, that of the first one has no
    gradient.
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


def matrix_loop(
    _name: str,
    _split: Split,
    _batch_size: int,
    device: torch.device,
    precision: str,
    *,
    products: int = PRODUCTS,
) -> Loop:
    """Return a loop of products of square matrices in the toolbox's precision, without training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, two = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))

    def run(_: tuple[Tensor, ...]) -> float:
        return sum(float((one @ two)[0, 0]) for _ in range(products))

    return run


LOOPS: dict[str, Callable[..., Loop]] = {
    "toolbox": toolbox_loop,
    "compiled": partial(toolbox_loop, compile=True),
    "plain": plain_loop,
    "loader": loader_loop,
    "convolutions": convolution_loop,
    "matrix": matrix_loop,
}


def seconds_of(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> float:
    """Return the wall seconds of one round, until the end of its last kernel."""
    start = time.perf_counter()
    loop(order)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
