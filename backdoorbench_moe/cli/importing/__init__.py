"""`bbmoe import`: models that were made elsewhere, as runs; one file a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.app import LazyGroup
from backdoorbench_moe.wording.spelling import near_names

DEFAULT = "weights"
COMMANDS = {
    DEFAULT: "A file of weights. `bbmoe import FILE ...` is this command.",
    "backdoorbench": "A result folder of BackdoorBench.",
}


class ImportGroup(LazyGroup):
    """A group whose first command may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front, unless another one, or --help, is asked for."""
        near = near_names(args[0], self.commands_help, most=1) if args else []
        if near and args[0] not in self.commands_help and not Path(args[0]).exists():
            raise click.UsageError(f"No file {args[0]!r}. Did you mean the command {near[0]!r}?", ctx)
        parsed: Any = super().parse_args(ctx, self.with_default(args, ctx.help_option_names))
        return parsed

    def with_default(self, args: list[str], others: Sequence[str] = ()) -> list[str]:
        """Return the arguments with the default command in front, unless they start with a command or one of others."""
        return [DEFAULT, *args] if args and args[0] not in {*self.commands_help, *others} else args


@click.group(
    "import",
    cls=ImportGroup,
    commands_help=COMMANDS,
    package=__package__,
    subcommand_metavar="FILE --model NAME [OPTIONS] | COMMAND [ARGS]...",
)
def command() -> None:
    """Make a run folder of a model that was made elsewhere, to analyse and defend it."""
