"""Data sets: where images come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.data.base import Dataset

registry: Registry[Dataset] = Registry("dataset")


def create_dataset(name: str, **options: object) -> Dataset:
    """Build the data set called `name`; its `load()` reads the images.

    Raises UnknownNameError, ConfigError or PluginError.
    """
    return registry.create(name, options)


def list_datasets() -> list[str]:
    """Names of all data sets, built-in and third-party."""
    return registry.names()
