"""`bbmoe import`: models that were made elsewhere, as runs; one file a command."""

from __future__ import annotations

from typing import Any

import click

from backdoorbench_moe.cli.app import LazyGroup

DEFAULT = "weights"
COMMANDS = {
    DEFAULT: "A file of weights. `bbmoe import FILE ...` is this command.",
}


class ImportGroup(LazyGroup):
    """A group whose first command may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front, unless another one, or --help, is asked for."""
        if args and args[0] not in {*self.commands_help, *ctx.help_option_names}:
            args = [DEFAULT, *args]
        parsed: Any = super().parse_args(ctx, args)
        return parsed


@click.group(
    "import",
    cls=ImportGroup,
    commands_help=COMMANDS,
    package=__package__,
    subcommand_metavar="FILE --model NAME [OPTIONS] | COMMAND [ARGS]...",
)
def command() -> None:
    """Make a run folder of a model that was made elsewhere, to analyse and defend it."""
