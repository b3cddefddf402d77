"""Defenses against backdoors. A defense does not know whether, or how, the model was attacked."""

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
        UnknownNameError: The defense or an option does not exist.
        ConfigError: An option has the wrong type or is out of range.
        PluginError: The package that provides the defense is faulty.
    """
    return registry.create(name, options)


def list_defenses() -> list[str]:
    """List the names of all defenses, built-in and third-party."""
    return registry.names()
