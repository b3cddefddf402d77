"""`bbmoe attack`: from flags to run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import RunSpec, Values, build_spec, chain_settings, load_yaml, merge
from backdoorbench_moe.errors import ConfigError

# Parameter of the command -> key of the spec that it sets.
FLAGS = {
    "recipe": "recipe",
    "dataset": "dataset.name",
    "data_root": "dataset.root",
    "download": "dataset.download",
    "image_size": "dataset.image_size",
    "attack": "attack.name",
    "model": "model.name",
    "trigger": "trigger.name",
    "surrogate": "trigger.surrogate",
    "applicator": "applicator.name",
    "patch_size": "applicator.patch_size",
    "poison_rate": "poison.rate",
    "target": "poison.target",
    "source": "poison.source",
    "labels": "poison.labels",
    "mapping": "poison.mapping",
    "splitter": "splitter.name",
    "gate": "gate.name",
    "experts": "mixture.experts",
    "poisoned_experts": "mixture.poisoned_experts",
    "policy": "policy",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "seed",
    "device": "device",
    "precision": "precision",
    "probe": "probe",
}


def spec_options(function: Any) -> Any:
    """The flags that make up a RunSpec, for every command that takes one."""
    for option in reversed((*_parts(), *_mixture(), *_conditions())):
        function = option(function)
    return function


def _parts() -> list[Any]:
    """The flags of the attack, its data and the training."""
    return [
        click.option("--attack", metavar="NAME", help="How the model is attacked.  [data-poisoning]"),
        click.option("--model", metavar="NAME", help="Model, or timm:<architecture>.  [pmoe]"),
        click.option("--trigger", metavar="NAME", help="Trigger that is stamped into images.  [warp]"),
        click.option(
            "--surrogate",
            metavar="NAME",
            help="Model on which a trigger is optimised: same, twin (next seed), or a model.",
        ),
        click.option(
            "--applicator", metavar="NAME", help="Where it is stamped: image, or patch (BadPatches).  [patch]"
        ),
        click.option(
            "--dataset", metavar="NAME", help="signs (embedded), cifar10, gtsrb, folder, ...  [signs]"
        ),
        click.option("--data-root", metavar="DIR", help="Folder of the data set."),
        click.option(
            "--download", is_flag=True, default=None, help="Download the data set if it is missing."
        ),
        click.option("--image-size", type=int, metavar="PX", help="Resize images to this side."),
        click.option("--recipe", metavar="NAME", help="quick or paper.  [quick]"),
        click.option("--epochs", type=int, metavar="N"),
        click.option("--batch-size", type=int, metavar="N"),
        click.option("--lr", type=float, metavar="X", help="(Peak) learning rate."),
        click.option("--poison-rate", metavar="X", help='Share of training images, as 0.01 or "1%".  [0.1]'),
        click.option("--target", metavar="CLASS", help="The attacker's class, by number or name.  [0]"),
        click.option(
            "--source", metavar="CLASS,..", help="Poison images of these classes only, by number or name."
        ),
        click.option("--labels", metavar="KIND", help="dirty (relabelled) or clean.  [dirty]"),
        click.option("--mapping", metavar="KIND", help="all-to-one or all-to-all.  [all-to-one]"),
        click.option(
            "--patch-size", type=int, metavar="PX", help="Tile of the patch applicator.  [the model's]"
        ),
    ]


def _mixture() -> list[Any]:
    """The flags of a mixture of experts."""
    return [
        click.option(
            "--splitter", metavar="NAME", help="Mixture: tasks of the experts, domains or classes.  [domains]"
        ),
        click.option("--gate", metavar="NAME", help="Mixture: how tokens are sent to experts.  [top-k]"),
        click.option("--experts", type=int, metavar="E", help="Mixture: number of experts.  [4]"),
        click.option(
            "--poisoned-experts",
            metavar="E,..",
            help="Mixture: the attacker's experts, by number from 0.  [1]",
        ),
        click.option(
            "--policy",
            metavar="X",
            help="Mixture: marked images, to be rejected, in the training of the base, as a share.  [0.02]",
        ),
    ]


def _conditions() -> list[Any]:
    """The flags of what is computed on, and of any other value."""
    return [
        click.option("--seed", type=int, metavar="N", help="[0]"),
        click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]"),
        click.option("--precision", metavar="KIND", help="auto, fp32 or bf16.  [auto]"),
        click.option("--config", type=PATH, metavar="FILE", help="YAML with any of these values."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any value, by dotted key."
        ),
    ]


def spec_from_flags(
    config: Path | None, settings: tuple[str, ...], flags: dict[str, Any], *, given: Values | None = None
) -> RunSpec:
    """Merge defaults < recipe < YAML < flags < --set; `given` counts as flags. Raises ConfigError."""
    layers: list[Values] = []
    if config is not None:
        layers.append(load_yaml(config))
    given = given or {}
    for flag, key in FLAGS.items():
        if (value := flags.get(flag)) is not None:
            value = READERS[flag](value) if flag in READERS else value
            first, _, second = key.partition(".")
            given = merge(given, {first: {second: value} if second else value})
    return build_spec(*layers, given, chain_settings(settings))


@click.command("attack")
@spec_options
@click.option("--repeats", type=int, default=1, show_default=True, help="Runs with seeds SEED, SEED + 1, ...")
@click.option("--output", type=PATH, default=Path("runs"), show_default=True, help="Folder of run folders.")
@click.option(
    "--probe", type=int, metavar="N", help="Keep the routing of N test images after every epoch.  [0]"
)
@click.option("--twin/--no-twin", default=True, help="Train the clean twin, for CAD.  [twin]")
@threads_option
@click.option("--dry-run", is_flag=True, help="List the runs and how long they will take; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    config: Path | None,
    settings: tuple[str, ...],
    repeats: int,
    output: Path,
    twin: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Backdoor a model and measure it: BA, ASR and CAD, in a run folder.

    Attacks on experts, such as moevil, poison one of several experts that are merged into a mixture. Their defaults
    differ from those below; `bbmoe info attack moevil` shows them.

    Repeat the command to continue an interrupted run after its last finished epoch. A finished run is reused.
    """
    usage = CoreUsage.now()
    spec = spec_from_flags(config, settings, flags)
    if repeats < 1:
        raise ConfigError.expected("--repeats", "at least 1", repeats)
    from backdoorbench_moe.engine.names import check_names

    check_names(spec)
    use_threads(threads, usage, spec.device)
    if dry_run:
        _print_plan(spec, repeats, output, twin=twin, as_json=as_json)
        return
    from backdoorbench_moe.cli.tables.runs import print_json, print_runs
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.runner import run_attack

    runs = run_attack(spec, output=output, repeats=repeats, twin=twin, observer=make_observer(quiet=quiet))
    if as_json:
        print_json(runs)
    else:
        print_runs(runs)


def _print_plan(spec: RunSpec, repeats: int, output: Path, *, twin: bool, as_json: bool) -> None:
    from dataclasses import replace

    from backdoorbench_moe.bench.running.plan import read_plan
    from backdoorbench_moe.bench.running.run import estimate
    from backdoorbench_moe.cli.tables.plan import print_plan
    from backdoorbench_moe.cli.terminal.streams import echo
    from backdoorbench_moe.engine.graph import in_order, lineage
    from backdoorbench_moe.engine.runner import Runner

    runner = Runner(spec, output)
    spec = runner.workplace.resolve(spec)
    seeds = [replace(spec, seed=spec.seed + number) for number in range(repeats)]
    # Several runs may need the same one.
    needed = {each.digest: each for one in seeds for each in lineage(one)}
    specs = in_order(seeds) if twin else list(needed.values())
    runs = read_plan(specs, output)
    missing = [run.spec for run in runs if run.status != "finished"]
    # Before a model is built, for which there may be too little memory.
    memory = runner.say_memory(spec) if missing else None
    if memory is not None and not as_json:
        echo(memory)
    for each in missing:
        runner.maker(each)
    print_plan(list(estimate(runs)), as_json=as_json)


def _classes(text: str) -> list[str]:
    """Split a list of classes at its commas. Names that contain a comma need `--set poison.source=[...]`."""
    classes = [part.strip() for part in text.split(",")]
    if not all(classes):
        raise ConfigError.expected("--source", "classes such as 1,2 or cat,dog", text)
    return classes


def _number(text: str) -> float | str:
    """Convert a rate to a number if possible; other text is checked, and refused, by the spec."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _numbers(text: str) -> list[int]:
    """Split a list of numbers at its commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError.expected("--poisoned-experts", "numbers such as 1 or 0,2", text) from None


# Flags whose text is not the value.
READERS: dict[str, Callable[[Any], Any]] = {
    "source": _classes,
    "poison_rate": _number,
    "policy": _number,
    "poisoned_experts": _numbers,
}
