"""Applicators: where a trigger is applied. `patch` is BadPatches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.applicators.base import Applicator

registry: Registry[Applicator] = Registry("applicator")


def create_applicator(name: str, **options: object) -> Applicator:
    """Build the applicator called `name`. Raises UnknownNameError, ConfigError or PluginError."""
    return registry.create(name, options)


def list_applicators() -> list[str]:
    """Names of all applicators, built-in and third-party."""
    return registry.names()
