"""Types of command-line parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.paths import expand


class ExpandedPath(click.ParamType):
    """Path of a file or folder; a leading "~" is the home directory."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; an unknown user after "~" is a usage error."""
        try:
            return expand(os.fspath(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


PATH = ExpandedPath()
