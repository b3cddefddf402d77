"""`bbmoe import`: import models that were trained elsewhere; one file per command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.app import LazyGroup
from backdoorbench_moe.wording.spelling import near_names

DEFAULT = "weights"
COMMANDS = {
    DEFAULT: "Import a file of weights; the default, as in `bbmoe import FILE ...`.",
    "backdoorbench": "Import a result folder of BackdoorBench.",
}


class ImportGroup(LazyGroup):
    """A group with a default command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command unless another command or `--help` is given."""
        near = near_names(args[0], self.commands_help, most=1) if args else []
        if near and args[0] not in self.commands_help and not Path(args[0]).exists():
            raise click.UsageError(f"No file {args[0]!r}. Did you mean the command {near[0]!r}?", ctx)
        parsed: Any = super().parse_args(ctx, self.with_default(args, ctx.help_option_names))
        return parsed

    def with_default(self, args: list[str], others: Sequence[str] = ()) -> list[str]:
        """Insert the default command unless the arguments start with a command or one of `others`."""
        return [DEFAULT, *args] if args and args[0] not in {*self.commands_help, *others} else args


@click.group(
    "import",
    cls=ImportGroup,
    commands_help=COMMANDS,
    package=__package__,
    subcommand_metavar="FILE --model NAME [OPTIONS] | COMMAND [ARGS]...",
)
def command() -> None:
    """Import a model that was trained elsewhere as a run folder, to analyse and defend it."""
