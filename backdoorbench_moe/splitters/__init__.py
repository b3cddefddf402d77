"""Splitters, which derive the tasks of the experts of a mixture from one data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.splitters.base import Splitter

registry: Registry[Splitter] = Registry("splitter")


def create_splitter(name: str, **options: object) -> Splitter:
    """Build a splitter by name.

    Args:
        name: Name of the splitter; `list_splitters` lists them.
        **options: Options of the splitter.

    Raises:
        UnknownNameError: There is no such splitter or option.
        ConfigError: An option is of the wrong type or out of range.
        PluginError: The splitter belongs to a third-party package and cannot be used.
    """
    return registry.create(name, options)


def list_splitters() -> list[str]:
    """List the names of all splitters, built-in and third-party."""
    return registry.names()
