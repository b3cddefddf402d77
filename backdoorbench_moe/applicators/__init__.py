"""Applicators: where on an image a trigger is stamped. `patch` is that of BadPatches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.applicators.base import Applicator

registry: Registry[Applicator] = Registry("applicator")


def create_applicator(name: str, **options: object) -> Applicator:
    """Build an applicator by name.

    Args:
        name: Name of the applicator; `list_applicators` lists them.
        **options: The applicator's own options.

    Raises:
        UnknownNameError: The applicator or an option does not exist.
        ConfigError: An option has the wrong type or is out of range.
        PluginError: The package that provides the applicator is faulty.
    """
    return registry.create(name, options)


def list_applicators() -> list[str]:
    """List the names of all applicators, built-in and third-party."""
    return registry.names()
