"""State shared by runs on the same data and device: the data in memory, the device, the precision, the observer."""

from __future__ import annotations

from functools import cached_property

import torch

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import DataSource, ImageSet, Material, as_images
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.class_names import resolve_classes
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.kinds import PACKAGE
from backdoorbench_moe.paths import expand
from backdoorbench_moe.records import Record


class Workplace:
    """The data, device, precision and observer shared by several runs. The data are read at most once.

    Args:
        spec: Spec of any of these runs. Only its data set, device and precision are used, but the names of all its
            parts must exist.
        observer: Receives progress.

    Attributes:
        observer: Receives progress.
        dataset: The data set, which `data` reads.
        device: The device of the computations.
        precision: "fp32" or "bf16".

    Raises:
        UnknownNameError: A part of the spec does not exist.
        ConfigError: The device does not exist, or an option of the data set is not valid.
        PluginError: The data set cannot be used.
    """

    def __init__(self, spec: RunSpec, observer: Observer | None = None) -> None:
        check_names(spec)
        self.observer = observer or Observer()
        self.dataset = build_dataset(spec)
        self.device: torch.device = resolve_device(spec.device)
        self.precision: str = resolve_precision(spec.precision, self.device)
        self._data: Material | None = None

    @property
    def data(self) -> Material:
        """The data, on the device. They are read at first use, since finished runs can be found without them.

        Raises:
            DataError: Files are missing, damaged or not the expected ones.
            ConfigError: The data set has fewer images than its options require.
        """
        if self._data is None:
            self.observer.on_message(f"reading {type(self.dataset).__name__}")
            # Compute the fingerprint first. If files change while they are read, it then differs from the next one.
            _ = self.fingerprint
            self._data = self.dataset.load().to(self.device)
            self.observer.on_message(self._data.describe())
        return self._data

    @property
    def images(self) -> ImageSet:
        """The data, which must be images.

        Raises:
            DataError: See `data`.
            ConfigError: See `data`; or the data are texts.
        """
        return as_images(self.data)

    def resolve(self, spec: RunSpec) -> RunSpec:
        """Return the spec with class numbers instead of names and with the hashes of its files, as its digest requires.

        Raises:
            UnknownNameError: There is no class with a given name.
            RecordError: A file cannot be read or has changed since it was hashed.
        """
        return pin_files(resolve_classes(_with_absolute_root(spec), self._class_names))

    def is_unchanged(self, record: Record) -> bool:
        """Return whether a run certainly used the same data, without reading the data.

        This is certain if the files have the fingerprint in the record, or if a data set of this package generates its
        images instead of reading files. It is never certain for a third-party data set without a `source`, which may
        read anything.
        """
        if (known := record.data.get("fingerprint")) is not None:
            return known == self.fingerprint
        kind = type(self.dataset)
        return kind.source is DataSource.source and kind.__module__.partition(".")[0] == PACKAGE

    @cached_property
    def fingerprint(self) -> str | None:
        """The fingerprint of the files of the data set, computed once; see `Dataset.fingerprint`."""
        return self.dataset.fingerprint()

    def _class_names(self) -> tuple[str, ...]:
        return self._data.classes if isinstance(self._data, ImageSet) else self.dataset.class_names()


def _with_absolute_root(spec: RunSpec) -> RunSpec:
    """Return the spec with the absolute path of its data, so that it is valid in any working directory."""
    root = spec.dataset.options.get("root")
    if not isinstance(root, str) or not (path := expand(root, "dataset.root")).exists():
        return spec
    return spec.with_data(root=str(path.absolute()))
