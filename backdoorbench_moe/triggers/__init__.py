"""Triggers: what is stamped on an image. An applicator decides where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.triggers.base import Trigger

registry: Registry[Trigger] = Registry("trigger")


def create_trigger(name: str, **options: object) -> Trigger:
    """Build a trigger by name.

    Args:
        name: Name of the trigger; `list_triggers` lists them.
        **options: The trigger's own options.

    Raises:
        UnknownNameError: The trigger or an option does not exist.
        ConfigError: An option has the wrong type or is out of range.
        PluginError: The package that provides the trigger is faulty.
    """
    return registry.create(name, options)


def list_triggers() -> list[str]:
    """List the names of all triggers, built-in and third-party."""
    return registry.names()
