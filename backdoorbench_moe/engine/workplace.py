"""Where runs are made: the data in memory, the device, the precision, and the observer of progress."""

from __future__ import annotations

from functools import cached_property

import torch

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.class_names import describe_classes, resolve_classes
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.kinds import PACKAGE
from backdoorbench_moe.records import Record


class Workplace:
    """Shared by all runs on the same data, device and precision; the data are read once.

    Args:
        spec: Spec of any of these runs. Only its data set, device and precision are used.
        observer: Receives progress.

    Attributes:
        device: The device of the computations.
        precision: "fp32" or "bf16".

    Raises:
        UnknownNameError: A part of the spec does not exist.
        ConfigError: The device does not exist.
        DataError: The folder of the data does not exist.
    """

    def __init__(self, spec: RunSpec, observer: Observer | None = None) -> None:
        check_names(spec)
        self.observer = observer or Observer()
        self.dataset = build_dataset(spec)
        self.device: torch.device = resolve_device(spec.device)
        self.precision: str = resolve_precision(spec.precision, self.device)
        self._images: ImageSet | None = None

    @property
    def images(self) -> ImageSet:
        """The data, on the device; read at first use, since a finished run does not need them."""
        if self._images is None:
            self.observer.on_message(f"reading {type(self.dataset).__name__}")
            # The fingerprint is taken first, so that a change while the files are read is noticed the next time.
            _ = self.fingerprint
            self._images = self.dataset.load().to(self.device)
            self.observer.on_message(describe_classes(self._images.classes))
        return self._images

    def resolve(self, spec: RunSpec) -> RunSpec:
        """Return the spec with classes by number and the hashes of its files. Only then is its digest final."""
        return pin_files(resolve_classes(spec, self._class_names))

    def is_unchanged(self, record: Record) -> bool:
        """Whether a run's data are known to be these without reading them: they have the same fingerprint.

        Data sets of this package that read no files are made by its code. Those of other packages are read again,
        as what they read is not known.
        """
        if (known := record.data.get("fingerprint")) is not None:
            return known == self.fingerprint
        kind = type(self.dataset)
        return kind.source is Dataset.source and kind.__module__.partition(".")[0] == PACKAGE

    @cached_property
    def fingerprint(self) -> str | None:
        """The fingerprint of the data's files, see `Dataset.fingerprint`."""
        return self.dataset.fingerprint()

    def _class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names() if self._images is None else self._images.classes
