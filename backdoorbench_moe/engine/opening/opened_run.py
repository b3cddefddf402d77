"""Open a finished run: load its model and its data, and check both against the run's record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from backdoorbench_moe.data.base import ImageSet, Material, Split, as_images
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.engine.build import Stamper, build_dataset
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.poisoning.policy import with_reject
from backdoorbench_moe.engine.run import Run, check_finished
from backdoorbench_moe.engine.setups.base import TaskSplits
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.engine.setups.text_tasks import TextTasks
from backdoorbench_moe.errors import DataError, ShapeError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.images import concatenate


@dataclass(frozen=True)
class OpenedRun:
    """A finished run with everything that an analysis needs.

    Attributes:
        run: The run.
        model: The trained model, on `device`, in evaluation mode.
        data: The data of the run, on `device`.
        stamper: Trigger and applicator of the run; None for a run without a trigger.
        device: The device of the computations.
        precision: "fp32" or "bf16".
        tasks: The tasks of a mixture, or that of an expert; None for any other run.
    """

    run: Run
    model: nn.Module
    data: Material
    stamper: Stamper | None
    device: torch.device
    precision: str
    tasks: TaskSplits | None = None

    @property
    def images(self) -> ImageSet:
        """The data, if they are images. Raises ConfigError for texts."""
        return as_images(self.data)

    @property
    def texts(self) -> TextSet:
        """The data, which are texts."""
        assert isinstance(self.data, TextSet)
        return self.data

    @cached_property
    def test(self) -> Split:
        """The clean test images or texts on which BA is measured; for a run with tasks, those of all its tasks."""
        return self.data.test if self.tasks is None else concatenate(self.tasks.tests())

    @property
    def is_mixture(self) -> bool:
        """Whether the model was merged from experts."""
        return self.run.spec.gate is not None

    @property
    def routed(self) -> RoutedModel | None:
        """The model if it is routed; None if it is dense."""
        return self.model if isinstance(self.model, RoutedModel) else None

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.folder.path.name


def open_run(run: Run, *, data_root: str | None = None, device: str | None = None) -> OpenedRun:
    """Open a finished run: load its model and read its data.

    Args:
        run: The run.
        data_root: Folder of the data, if it has moved since the run.
        device: "auto", "cpu", "cuda" or "cuda:N"; None for that of the run.

    Raises:
        RecordError: The run is not finished, or its files are damaged.
        DataError: The data are not those of the run.
        ShapeError: The patches of a routed model do not tile the image.
    """
    check_finished(run)
    stamper = None if run.spec.trigger is None else run.stamper()
    model, chosen = run.model(), resolve_device(device or run.spec.device)
    data = load_run_data(run, data_root).to(chosen)
    return _open(run, model, data, stamper, chosen)


def open_beside(run: Run, other: OpenedRun) -> OpenedRun:
    """Open a second finished run with the data and the device of an opened run.

    Raises:
        BbmoeError: See `open_run`.
    """
    check_finished(run)
    check_run_data(run, other.data)
    stamper = None if run.spec.trigger is None else run.stamper()
    return _open(run, run.model(), other.data, stamper, other.device)


def _open(
    run: Run, model: nn.Module, data: Material, stamper: Stamper | None, device: torch.device
) -> OpenedRun:
    if isinstance(model, RoutedModel) and isinstance(data, ImageSet):
        check_patches(run.spec.model.name, model, data.image_size)
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    precision = resolve_precision(run.spec.precision, device)
    return OpenedRun(run, model, data, stamper, device, precision, _tasks(run, data))


def _tasks(run: Run, data: Material) -> TaskSplits | None:
    """The tasks of a mixture, or that of an expert; None for any other run."""
    if isinstance(data, TextSet):
        return None if run.spec.mixture is None else TextTasks(run.located_spec(), data)
    return None if run.spec.splitter is None else Tasks(run.located_spec(), as_images(data))


def check_patches(name: str, model: RoutedModel, image_size: int) -> None:
    """Raise ShapeError unless the patches of a routed model cover the image."""
    rows, columns = model.patch_grid
    if (rows * model.patch_size, columns * model.patch_size) != (image_size, image_size):
        raise ShapeError(
            f"model {name!r}: expected patches that cover the {image_size}x{image_size} image, "
            f"got {rows}x{columns} of {model.patch_size}x{model.patch_size} pixels"
        )


def load_run_images(run: Run, data_root: str | None = None) -> ImageSet:
    """Read the images of a run; see `load_run_data`. Raises ConfigError if the data are texts."""
    return as_images(load_run_data(run, data_root))


def load_run_data(run: Run, data_root: str | None = None) -> Material:
    """Read the data of a run into CPU memory.

    Args:
        run: The run.
        data_root: Folder of the data, if it has moved since the run.

    Raises:
        DataError: The data are not those of the run.
    """
    spec = run.spec
    if data_root is not None:
        spec = spec.with_data(root=data_root)
    data = build_dataset(spec).load()
    if spec.policy and isinstance(data, ImageSet):
        data = with_reject(data)
    check_run_data(run, data)
    return data


def check_run_data(run: Run, data: Material) -> None:
    """Check that these are the data of a run.

    Raises:
        DataError: The images, their number of classes, or the texts differ.
    """
    facts = run.record.data
    if isinstance(data, ImageSet) and len(facts["classes"]) != data.num_classes:
        raise DataError(
            f"{data.name}: expected the {len(facts['classes'])} classes that the model of run "
            f"{run.folder.path.name} distinguishes, got {data.num_classes}"
        )
    if data.digest != facts["digest"]:
        raise DataError(
            f"{data.name}: expected the data of the run, digest {facts['digest'][:16]}, "
            f"got {data.digest[:16]}; give its folder with --data-root (data_root=)"
        )
