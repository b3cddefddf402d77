"""Triggers: what is stamped. Where it is stamped is an applicator's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.triggers.base import Trigger

registry: Registry[Trigger] = Registry("trigger")


def create_trigger(name: str, **options: object) -> Trigger:
    """Build the trigger called `name`. Raises UnknownNameError, ConfigError or PluginError."""
    return registry.create(name, options)


def list_triggers() -> list[str]:
    """Names of all triggers, built-in and third-party."""
    return registry.names()
