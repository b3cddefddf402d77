"""Parsing the commands that pages show, without running them."""

from __future__ import annotations

import shlex

import click

from backdoorbench_moe.cli import bbmoe
from backdoorbench_moe.cli.importing import ImportGroup


def parse(line: str) -> None:
    """Let the click command of a line that begins with `bbmoe` parse its arguments."""
    _, *arguments = shlex.split(line)
    command: click.Command | None = bbmoe
    while isinstance(command, click.Group):
        if isinstance(command, ImportGroup):
            arguments = command.with_default(arguments)
        name, *arguments = arguments
        command = command.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None, line
    command.make_context(name, arguments)
