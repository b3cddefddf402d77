"""Defenses: what a defender does to a model that may be backdoored, without knowing whether it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.defenses.base import Defense

registry: Registry[Defense] = Registry("defense")


def create_defense(name: str, **options: object) -> Defense:
    """Build a defense by name.

    Args:
        name: Name of the defense; `list_defenses` lists them.
        **options: The defense's own options.

    Raises:
        UnknownNameError: There is no such defense or option.
        ConfigError: An option is of the wrong type or out of range.
        PluginError: The package that offers the defense is at fault.
    """
    return registry.create(name, options)


def list_defenses() -> list[str]:
    """List the names of all defenses, built-in and third-party."""
    return registry.names()
