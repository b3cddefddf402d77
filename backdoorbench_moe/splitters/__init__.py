"""Splitters: the tasks that the experts of a merged model are made for."""

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
        **options: The splitter's own options.

    Raises:
        UnknownNameError: There is no such splitter or option.
        ConfigError: An option is of the wrong type or out of range.
        PluginError: The package that offers the splitter is at fault.
    """
    return registry.create(name, options)


def list_splitters() -> list[str]:
    """List the names of all splitters, built-in and third-party."""
    return registry.names()
