"""What is looked at: a finished run, its data as they were, its trained model; all checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.build import Stamper, build_dataset
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.run import Run, check_finished
from backdoorbench_moe.errors import DataError, ShapeError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.seeding import generator


@dataclass(frozen=True)
class Subject:
    """A run with what is needed to look at it; images and model lie on `device`, the model in evaluation mode.

    stamper: the run's trigger as it was applied; None for a clean run.
    """

    run: Run
    model: nn.Module
    images: ImageSet
    stamper: Stamper | None
    device: torch.device
    precision: str

    @property
    def routed(self) -> RoutedModel | None:
        """The model, if it routes."""
        return self.model if isinstance(self.model, RoutedModel) else None

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.run.folder.path.name


def open_subject(run: Run, *, data_root: str | None = None, device: str | None = None) -> Subject:
    """Open a finished run, read its data and check the one against the other.

    data_root, device: other ones than the run was made with. Raises RecordError for a run that is not finished
    or whose files are damaged, DataError for other data, ShapeError for a model whose patches are not tiles.
    """
    check_finished(run)
    stamper = None if run.spec.trigger is None else run.stamper()
    model, where = run.model(), resolve_device(device or run.spec.device)
    images = run_images(run, data_root).to(where)
    return _subject(run, model, images, stamper, where)


def open_beside(run: Run, other: Subject) -> Subject:
    """Open a second finished run on the data and device of a first. Raises as `open_subject`."""
    check_finished(run)
    check_images(run, other.images)
    stamper = None if run.spec.trigger is None else run.stamper()
    return _subject(run, run.model(), other.images, stamper, other.device)


def _subject(
    run: Run, model: nn.Module, images: ImageSet, stamper: Stamper | None, device: torch.device
) -> Subject:
    if isinstance(model, RoutedModel):
        _check_patches(run, model, images.image_size)
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return Subject(run, model, images, stamper, device, resolve_precision(run.spec.precision, device))


def _check_patches(run: Run, model: RoutedModel, image_size: int) -> None:
    rows, columns = model.patch_grid
    if (rows * model.patch_size, columns * model.patch_size) != (image_size, image_size):
        raise ShapeError(
            f"model {run.spec.model.name!r}: expected patches that cover the {image_size}x{image_size} image, "
            f"got {rows}x{columns} of {model.patch_size}x{model.patch_size} pixels"
        )


def run_images(run: Run, data_root: str | None = None) -> ImageSet:
    """Read the images a run was made from, on the CPU.

    data_root: where the data lies now, if not where the run found it. Raises DataError for other data.
    """
    spec = run.spec
    if data_root is not None:
        spec = spec.with_data(root=data_root)
    images = build_dataset(spec).load()
    check_images(run, images)
    return images


def check_images(run: Run, images: ImageSet) -> None:
    """Raise DataError if these are not the images a run was made from, or not its classes."""
    data = run.record.data
    if len(data["classes"]) != images.num_classes:
        raise DataError(
            f"{images.name}: expected the {len(data['classes'])} classes that the model of run "
            f"{run.folder.path.name} tells apart, got {images.num_classes}"
        )
    if images.digest != data["digest"]:
        raise DataError(
            f"{images.name}: expected the data of the run, digest {data['digest'][:16]}, "
            f"got {images.digest[:16]}; say where it lies with --data-root (data_root=)"
        )


def choose_images(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` of N images, one of each class in turn; the same for a seed, whatever the count.

    labels: (N,) int64. Returns (count,) int64 places among the N.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "preview"))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    turns = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[turns.argsort(stable=True)[:count]]
