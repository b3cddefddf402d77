"""Data sets of images and texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.data.common import DataRegistry

if TYPE_CHECKING:
    from backdoorbench_moe.data.base import DataSource

registry = DataRegistry("dataset")


def create_dataset(name: str, **options: object) -> DataSource:
    """Create a data set by name. Its method `load` reads the data.

    Args:
        name: Name of the data set; `list_datasets` lists them.
        **options: The data set's own options.

    Raises:
        UnknownNameError: There is no such data set or option.
        ConfigError: An option is missing, of the wrong type or out of range.
        PluginError: The package that provides the data set is faulty.
    """
    return registry.create(name, options)


def list_datasets() -> list[str]:
    """List the names of all data sets, built-in and third-party."""
    return registry.names()
