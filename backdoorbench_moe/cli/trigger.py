"""`bbmoe trigger`: what triggers that nobody trained do to the model of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.streams import echo
from backdoorbench_moe.cli.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import PartSpec, Values, chain_options
from backdoorbench_moe.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from backdoorbench_moe.engine.tried_trigger import Share, TriedTrigger


@click.command("trigger")
@click.argument("run", type=PATH, metavar="RUN")
@click.option("--trigger", "triggers", required=True, multiple=True, metavar="NAME", help="May be repeated.")
@click.option("--applicator", default="patch", show_default=True, metavar="NAME", help="image or patch.")
@click.option(
    "--target", metavar="CLASS", help="Show this class, by number or name.  [the one that rises most]"
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="An option, such as trigger.size=5 (of every trigger that has it) or applicator.patch_size=8.",
)  # fmt: skip
@click.option("--seed", type=int, metavar="N", help="Seed of the triggers.  [the run's]")
@click.option("--data-root", metavar="DIR", help="Folder of the data set.  [the one of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the rates of all classes.")
def command(
    *,
    run: Path,
    triggers: tuple[str, ...],
    applicator: str,
    target: str | None,
    settings: tuple[str, ...],
    seed: int | None,
    data_root: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Stamp triggers on the test images of the finished run in folder RUN, and count what its model calls them.

    Nobody trained the model with these triggers, except if one is that of the run. For each, the accuracy without and
    with it, and how often images of other classes are called the class whose rate rises most. A model of your own
    becomes a run with `bbmoe import`. Nothing is written.
    """
    usage = CoreUsage.now()
    given = chain_options(settings)
    parts = [_part("trigger", name, given, triggers) for name in triggers]
    where = _part("applicator", applicator, given, (applicator,))
    from backdoorbench_moe.engine.opened_model import open_model
    from backdoorbench_moe.engine.run import load_run
    from backdoorbench_moe.engine.tried_trigger import try_trigger

    opened = load_run(run)
    use_threads(threads, usage, device or opened.spec.device)
    model = open_model(opened, data_root=data_root, device=device)
    place = None if target is None else _class_number(target, model.classes)
    chosen = opened.spec.seed if seed is None else seed
    found = [try_trigger(model, part, where, seed=chosen) for part in parts]
    if as_json:
        shown = {
            "run": model.name,
            "seed": chosen,
            "classes": model.classes,
            "triggers": [t.to_dict() for t in found],
        }
        echo(json.dumps(shown, indent=2))
    else:
        _print(model.name, found, place)


def _part(kind: str, name: str, given: Values, names: Sequence[str]) -> PartSpec:
    """A part with those of the given options that it has; one that no part has is refused."""
    from backdoorbench_moe.engine.names import REGISTRIES

    registry = REGISTRIES[kind]
    for key in given:
        if key not in ("trigger", "applicator") or not isinstance(given[key], Mapping):
            raise ConfigError.expected("--set", "trigger.KEY=VALUE or applicator.KEY=VALUE", key)
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
    console.print("Percent, with the ends of the 95% interval below.", style="dim")


def _value(found: Share) -> str:
    return f"{found['value']:.2f}\n[{found['low']:.1f}, {found['high']:.1f}]"
