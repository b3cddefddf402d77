"""The registry of data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from backdoorbench_moe.data.base import DataSource  # noqa: F401

ROOT = "root"


class DataRegistry(Registry["DataSource"]):
    """The registry of data sets. An option `root` that a data set lacks is reported as --data-root."""

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, Any]:
        """Check the options of a data set without building it; see `Registry.check`."""
        if ROOT in options and ROOT not in self.options(name):
            raise ConfigError.expected(
                "--data-root (data_root=)", f"none, as the data set {name!r} is in no folder", options[ROOT]
            )
        return super().check(name, options)
