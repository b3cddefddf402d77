"""Data sets: where images come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.data.base import Dataset

registry: Registry[Dataset] = Registry("dataset")


def create_dataset(name: str, **options: object) -> Dataset:
    """Build the data set called `name`; its `load()` reads the images.

    Raises:
        UnknownNameError: No data set, or no option of it, has such a name.
        ConfigError: An option is missing, or has a value it cannot have.
        PluginError: The data set's package cannot be used.
    """
    return registry.create(name, options)


def list_datasets() -> list[str]:
    """Return the names of all data sets, built-in and third-party."""
    return registry.names()
