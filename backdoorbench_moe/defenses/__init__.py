"""Defenses: what is done to a model that may be backdoored, by one who does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.defenses.base import Defense

registry: Registry[Defense] = Registry("defense")


def create_defense(name: str, **options: object) -> Defense:
    """Build the defense called `name`. Raises UnknownNameError, ConfigError or PluginError."""
    return registry.create(name, options)


def list_defenses() -> list[str]:
    """Names of all defenses, built-in and third-party."""
    return registry.names()
