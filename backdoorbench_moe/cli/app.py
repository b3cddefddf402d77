"""The `bbmoe` command group; each command is imported when it is called."""

from __future__ import annotations

import signal
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from backdoorbench_moe import __version__
from backdoorbench_moe.cli.kind_names import ALL_KINDS
from backdoorbench_moe.cli.terminal.signals import Terminated, interrupt_on_signals
from backdoorbench_moe.cli.terminal.streams import give_up_stdout, prepare_streams, say
from backdoorbench_moe.errors import BbmoeError, BbmoeWarning
from backdoorbench_moe.plugins import describe_error, raised_in
from backdoorbench_moe.process.allocator import keep_freed_memory
from backdoorbench_moe.wording.spelling import near_names

COMMANDS = {
    "attack": "Train a backdoored model and evaluate it.",
    "import": "Import a model that was trained elsewhere.",
    "defend": "Apply defenses to a run's model and evaluate the result.",
    "analyze": "Analyse how a run's model routes, and which experts carry the backdoor.",
    "audit": "Check a model of unknown origin for signs of a backdoor.",
    "trigger": "Test how a model reacts to triggers it was not trained with.",
    "export": "Write the training set and the weights of a run to plain files.",
    "preview": "Draw images with and without a trigger.",
    "bench": "Run suites of experiments and print their tables, next to the paper's.",
    "report": "Write the results of a suite to one HTML page.",
    "show": "Print the settings and results of runs.",
    "list": f"List {ALL_KINDS}, and broken plug-ins.",
    "info": "Describe one of these parts and its options.",
    "plugin": "Create or check a package that adds new parts.",
}
# Commands whose name is not that of their module, as it is a Python keyword.
MODULES = {"import": "importing"}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, so that `--help` is fast.

    Args:
        commands_help: The one-line help of each command, by name.
        package: The package whose module NAME defines the command NAME as `command`.
    """

    def __init__(self, *args: Any, commands_help: dict[str, str], package: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_help, self.package = commands_help, package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which users need them."""
        return list(self.commands_help)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no command with this name."""
        if cmd_name not in self.commands_help:
            return None
        command: click.Command = import_module(f"{self.package}.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Reject an unknown command and suggest similar names."""
        if args and args[0] not in self.commands_help and not args[0].startswith("-"):
            near = near_names(args[0], self.commands_help, most=1)
            known = ", ".join(self.commands_help)
            advice = f" Did you mean {near[0]!r}?" if near else f" Commands: {known}."
            raise click.UsageError(f"No such command {args[0]!r}.{advice}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands_help.items()))


@click.group(
    cls=LazyGroup,
    commands_help=COMMANDS,
    package=__package__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="bbmoe")
def bbmoe() -> None:
    """Backdoor attacks and defenses on Mixture-of-Experts image models."""


def main() -> None:
    """Run `bbmoe` and exit.

    Errors of the user, the machine or a plug-in exit with code 2 and a one-line message, never a traceback. Signal N
    exits with 128 + N, such as 130 for Ctrl-C and 143 for SIGTERM. Other exit codes are those of the command.
    """
    keep_freed_memory()
    prepare_streams()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    sys.exit(_run())


def _run() -> int | str:
    try:
        with interrupt_on_signals():
            try:
                return bbmoe.main(prog_name="bbmoe", standalone_mode=False) or 0
            finally:
                # Python's flush at exit would show a traceback on a full disk.
                sys.stdout.flush()
    except click.ClickException as error:
        error.show()
    except BbmoeError as error:
        say(f"bbmoe: error: {error}")
    except MemoryError as error:
        say(f"bbmoe: error: not enough memory: {error}")
    except BrokenPipeError:
        give_up_stdout()
        return 1  # The same code as click and rich use.
    except OSError as error:
        give_up_stdout()
        say(f"bbmoe: error: {error.filename or 'standard output'}: {error.strerror or error}")
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        number, name = (
            (cause.number, f" by {cause}") if isinstance(cause, Terminated) else (signal.SIGINT, "")
        )
        say(
            f"bbmoe: interrupted{name}; if a run was being trained, the same command continues it after its last "
            "finished epoch (a defense: from the start; an audit: with the missing checks)"
        )
        return 128 + number
    except Exception as error:
        # An error in the code of a plug-in is the author's to correct; any other is a defect of this package.
        if raised_in(error) is None:
            raise
        say(f"bbmoe: error: {describe_error(error)}")
    return 2


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print this package's own warnings in one line and hide those of other libraries."""
    if issubclass(category, BbmoeWarning):
        say(f"bbmoe: warning: {message}")
