"""`bbmoe import`: results of other tools as runs; one file a command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup

COMMANDS = {"import_backdoorbench": "Make a run of a result folder of BackdoorBench."}


class ImportGroup(LazyGroup):
    """A group whose commands lie in modules named "import_..."."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names without the modules' prefix."""
        return [name.removeprefix("import_") for name in self.commands_help]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        return super().get_command(ctx, f"import_{cmd_name}")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command with near names."""
        return click.Group.resolve_command(self, ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(n.removeprefix("import_"), line) for n, line in self.commands_help.items()])


@click.group("import", cls=ImportGroup, commands_help=COMMANDS, package=__package__)
def command() -> None:
    """Make a run folder of a model that another tool made. It is measured, and can be defended and analyzed."""
