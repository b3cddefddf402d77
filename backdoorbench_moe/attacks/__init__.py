"""Attacks on the training of a model, or on an expert of a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.attacks.base import Attack

registry: Registry[Attack] = Registry("attack")


def create_attack(name: str, *, poison: PoisonSpec | None = None, **options: object) -> Attack:
    """Build an attack by name.

    Args:
        name: Name of the attack; `list_attacks` lists them.
        poison: Which training images are poisoned, and their labels; the default values if None.
        **options: The attack's own options.

    Raises:
        UnknownNameError: The attack or an option does not exist.
        ConfigError: An option has the wrong type or is out of range.
        PluginError: The package that provides the attack is faulty.
    """
    return registry.create(name, options, {"poison": poison or PoisonSpec()})


def list_attacks() -> list[str]:
    """List the names of all attacks, built-in and third-party."""
    return registry.names()
