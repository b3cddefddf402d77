"""Gates: how a mixture sends tokens to the experts that it was merged from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.gates.base import Gate

registry: Registry[Gate] = Registry("gate")


def create_gate(name: str, **options: object) -> Gate:
    """Build a gate by name.

    Args:
        name: Name of the gate; `list_gates` lists them.
        **options: Options of the gate.

    Raises:
        UnknownNameError: There is no such gate or option.
        ConfigError: An option is of the wrong type or out of range.
        PluginError: The gate belongs to a third-party package and cannot be used.
    """
    return registry.create(name, options)


def list_gates() -> list[str]:
    """List the names of all gates, built-in and third-party."""
    return registry.names()
