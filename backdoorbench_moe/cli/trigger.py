"""`bbmoe trigger`: test how a model reacts to triggers it was not trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.model_file import model_file_options, spec_of_file
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import PartSpec, Values, chain_options
from backdoorbench_moe.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from backdoorbench_moe.engine.opening.opened_model import OpenedModel
    from backdoorbench_moe.engine.opening.tried_trigger import Share, TriedTrigger

# Prefixes of the options of triggers and applicators; other options are for the model and the data set.
OWN = ("trigger.", "applicator.")


@click.command("trigger")
@click.argument("source", type=PATH, metavar="RUN|FILE")
@click.option(
    "--trigger", "triggers", required=True, multiple=True, metavar="NAME", help="Trigger; may be repeated."
)
@click.option(
    "--applicator",
    default="patch",
    show_default=True,
    metavar="NAME",
    help="Stamp it on the image, or on every patch.",
)
@click.option(
    "--target", metavar="CLASS", help="Class to report, by number or name.  [the one whose rate rises most]"
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="An option, such as trigger.size=5 (for every trigger that has it), applicator.patch_size=8 or, with FILE, "
    "model.width=8.",
)  # fmt: skip
@model_file_options(required=False)
@click.option("--seed", type=int, metavar="N", help="Seed of the triggers.  [the run's; 0 with FILE]")
@click.option("--data-root", metavar="DIR", help="Folder with the data set.  [that of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the rates of all classes.")
def command(
    *,
    source: Path,
    triggers: tuple[str, ...],
    applicator: str,
    target: str | None,
    settings: tuple[str, ...],
    threads: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Stamp triggers on test images and count how a model classifies them.

    The model is that of the finished run in folder RUN, or of the weights in FILE (with --model, as for `bbmoe
    import`). It need not have been trained with any of these triggers. For each trigger, prints the accuracy without
    and with it, and how often images of other classes are classified as the class whose rate rises most. Nothing is
    written.
    """
    usage = CoreUsage.now()
    own = tuple(each for each in settings if flags["model"] is None or each.startswith(OWN))
    given = chain_options(own)
    parts = [_part("trigger", name, given, triggers) for name in triggers]
    where = _part("applicator", applicator, given, (applicator,))
    model, seed = _open(source, flags, tuple(each for each in settings if each not in own), threads, usage)
    from backdoorbench_moe.engine.opening.tried_trigger import try_trigger

    place = None if target is None else _class_number(target, model.classes)
    found = [try_trigger(model, part, where, seed=seed) for part in parts]
    if as_json:
        shown = {
            "run": model.name,
            "seed": seed,
            "classes": model.classes,
            "triggers": [t.to_dict() for t in found],
        }
        echo(json.dumps(shown, indent=2))
    else:
        _print(model.name, found, place)


def _open(
    source: Path, flags: dict[str, Any], settings: tuple[str, ...], threads: int | None, usage: CoreUsage
) -> tuple[OpenedModel, int]:
    """Open the model of a run or of a file of weights; return it and the seed of the triggers."""
    if flags["model"] is not None:
        spec = spec_of_file(source, flags, settings)
        use_threads(threads, usage, spec.device)
        from backdoorbench_moe.engine.opening.opened_file import open_file

        return open_file(spec), spec.seed
    if source.is_file():
        raise ConfigError.expected("--model", "the model of the weights in the file", None)
    for name in ("weights_key", "mean", "std", "resize", "dataset", "image_size"):
        if flags[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag}: expected none for a run, which has its own; only for a file of weights"
            )
    from backdoorbench_moe.engine.opening.opened_model import open_model
    from backdoorbench_moe.engine.run import load_run

    run, device = load_run(source), flags["device"]
    use_threads(threads, usage, device or run.spec.device)
    opened = open_model(run, data_root=flags["data_root"], device=device)
    return opened, run.spec.seed if flags["seed"] is None else flags["seed"]


def _part(kind: str, name: str, given: Values, names: Sequence[str]) -> PartSpec:
    """Return a part with those of the given options that it has; an option that none of the parts has is an error."""
    from backdoorbench_moe.engine.names import REGISTRIES

    registry = REGISTRIES[kind]
    for key in given:
        if key not in ("trigger", "applicator") or not isinstance(given[key], Mapping):
            hint = "; expected trigger.KEY=VALUE or applicator.KEY=VALUE"
            raise UnknownNameError("--set", key, ("trigger", "applicator"), hint)
    options: Mapping[str, Any] = given.get(kind, {})
    known = {each: registry.options(each) for each in names}
    for key in options:
        if not any(key in known[each] for each in names):
            raise UnknownNameError(f"{kind}: option", key, {key for each in known.values() for key in each})
    part = PartSpec(name, {key: value for key, value in options.items() if key in known[name]})
    registry.check(name, {"seed": 0, **part.options} if kind == "trigger" else part.options)
    return part


def _class_number(text: str, classes: Sequence[str]) -> int:
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise UnknownNameError("--target: class", text, classes, "; or its number")


def _print(name: str, found: Sequence[TriedTrigger], target: int | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("trigger", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("BA %", "with trigger", "changed", "class", "ASR %", "no trigger"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for each in found:
        rate = each.classes[each.strongest if target is None else target]
        label = f"{each.trigger['name']} by {each.applicator['name']}"
        shares = (each.ba, each.ra, each.changed)
        table.add_row(
            label, *map(_value, shares), escape(rate.name), _value(rate.asr), _value(rate.target_rate)
        )
    console = Console(highlight=False)
    console.print(f"{name}: {found[0].ba['n']:,.0f} test images", soft_wrap=True, markup=False)
    console.print(table)
    console.print("In percent, with 95% confidence intervals below.", style="dim")


def _value(found: Share) -> str:
    return f"{found['value']:.2f}\n[{found['low']:.1f}, {found['high']:.1f}]"
