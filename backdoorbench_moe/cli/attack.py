"""`bbmoe attack`: train backdoored models from command-line flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import RunSpec, Values, build_spec, chain_settings, load_yaml, merge
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_repeats

# Parameter of the command -> the spec key that it sets.
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
    """Add the flags of a RunSpec to a command."""
    for option in reversed((*_parts(), *_data(), *_training(), *_poison(), *_mixture(), *_conditions())):
        function = option(function)
    return function


def _parts() -> list[Any]:
    """The flags of the attack and the model."""
    return [
        click.option("--attack", metavar="NAME", help="Attack; see `bbmoe list attacks`.  [data-poisoning]"),
        click.option(
            "--model", metavar="NAME", help="Model (see `bbmoe list models`), or timm:<architecture>.  [pmoe]"
        ),
        click.option("--trigger", metavar="NAME", help="Trigger; see `bbmoe list triggers`.  [warp]"),
        click.option(
            "--surrogate",
            metavar="NAME",
            help="Model on which the trigger is optimised: same (the victim's clean twin), twin (that with the next "
            "seed), or a model name.",
        ),
        click.option(
            "--applicator",
            metavar="NAME",
            help="Stamp the trigger on the image, or on every patch (BadPatches).  [patch]",
        ),
    ]


def _data() -> list[Any]:
    """The flags of the data."""
    return [
        click.option(
            "--dataset",
            metavar="NAME",
            help="Data set: signs (built in), cifar10, gtsrb, folder, ...  [signs]",
        ),
        click.option("--data-root", metavar="DIR", help="Folder with the data set."),
        click.option(
            "--download", is_flag=True, default=None, help="Download the data set if it is missing."
        ),
        click.option("--image-size", type=int, metavar="PX", help="Resize images to this height and width."),
    ]


def _training() -> list[Any]:
    """The flags of the training."""
    return [
        click.option("--recipe", metavar="NAME", help="Set of default values: quick or paper.  [quick]"),
        click.option("--epochs", type=int, metavar="N", help="Training epochs.  [the recipe's]"),
        click.option("--batch-size", type=int, metavar="N", help="Images in a batch.  [the recipe's]"),
        click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [the recipe's]"),
    ]


def _poison() -> list[Any]:
    """The flags of the poisoned images, and of the patches that are stamped."""
    return [
        click.option(
            "--poison-rate", metavar="X", help='Share of training images to poison: 0.01 or "1%".  [0.1]'
        ),
        click.option("--target", metavar="CLASS", help="Target class, by number or name.  [0]"),
        click.option(
            "--source", metavar="CLASS,..", help="Poison only images of these classes, by number or name."
        ),
        click.option(
            "--labels",
            metavar="KIND",
            help="Labels of poisoned images: dirty (changed) or clean (kept).  [dirty]",
        ),
        click.option(
            "--mapping",
            metavar="KIND",
            help="Target class: all-to-one (--target) or all-to-all (y + 1 for class y).  [all-to-one]",
        ),
        click.option(
            "--patch-size", type=int, metavar="PX", help="Patch size for --applicator patch.  [the model's]"
        ),
    ]


def _mixture() -> list[Any]:
    """The flags of a mixture of experts."""
    return [
        click.option(
            "--splitter",
            metavar="NAME",
            help="Mixture: how data are split into tasks: domains or classes.  [domains]",
        ),
        click.option("--gate", metavar="NAME", help="Mixture: gate; see `bbmoe list gates`.  [top-k]"),
        click.option("--experts", type=int, metavar="E", help="Mixture: number of experts.  [4]"),
        click.option(
            "--poisoned-experts",
            metavar="E,..",
            help="Mixture: the poisoned experts, numbered from 0.  [1]",
        ),
        click.option(
            "--policy",
            metavar="X",
            help="Mixture: marked images that the base learns to reject, as a share of its training images.  [0.02]",
        ),
    ]


def _conditions() -> list[Any]:
    """The flags of the seed, the device and the precision, and of any other value."""
    return [
        click.option("--seed", type=int, metavar="N", help="Random seed.  [0]"),
        click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]"),
        click.option("--precision", metavar="KIND", help="auto, fp32 or bf16.  [auto]"),
        click.option("--config", type=PATH, metavar="FILE", help="YAML file with settings."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any setting, such as train.lr=0.01.",
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
@click.option(
    "--repeats", type=int, default=1, show_default=True, help="Number of runs, with seeds SEED, SEED + 1, ..."
)
@click.option(
    "--output", type=PATH, default=Path("runs"), show_default=True, help="Folder for the run folders."
)
@click.option(
    "--probe", type=int, metavar="N", help="Record the routing of N test images after every epoch.  [0]"
)
@click.option("--twin/--no-twin", default=True, help="Also train the clean twin, for CAD.  [twin]")
@threads_option
@click.option("--dry-run", is_flag=True, help="List the runs and the estimated time; train nothing.")
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
    """Train a backdoored model and evaluate it; the model and the results are written to a run folder.

    BA is the accuracy on clean test images, ASR the share of triggered images of other classes that are classified as
    the target, and CAD the drop in BA compared to the clean twin, the same model trained without the attack.

    Attacks on experts, such as moevil, poison experts before they are merged into a mixture. Their defaults differ from
    those below; see `bbmoe info attack moevil`.

    An interrupted run continues after its last finished epoch if the command is repeated. A finished run is reused.
    """
    usage = CoreUsage.now()
    spec = spec_from_flags(config, settings, flags)
    check_repeats("--repeats", repeats)
    from backdoorbench_moe.engine.names import check_names

    check_names(spec)
    use_threads(threads, usage, spec.device)
    if dry_run:
        _print_plan(spec, repeats, output, usage, twin=twin, as_json=as_json)
        return
    from backdoorbench_moe.cli.tables.runs import print_json, print_runs
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.runner import run_attack

    runs = run_attack(spec, output=output, repeats=repeats, twin=twin, observer=make_observer(quiet=quiet))
    if as_json:
        print_json(runs)
    else:
        print_runs(runs)


def _print_plan(
    spec: RunSpec, repeats: int, output: Path, usage: CoreUsage, *, twin: bool, as_json: bool
) -> None:
    from dataclasses import replace

    from backdoorbench_moe.bench.running.plan import read_plan
    from backdoorbench_moe.bench.running.run import estimate
    from backdoorbench_moe.cli.tables.plan import print_plan
    from backdoorbench_moe.cli.terminal.streams import echo
    from backdoorbench_moe.engine.graph import in_order, lineage
    from backdoorbench_moe.engine.runner import Runner
    from backdoorbench_moe.records import RunFolder

    runner = Runner(spec, output)
    spec = runner.workplace.resolve(spec)
    seeds = [replace(spec, seed=spec.seed + number) for number in range(repeats)]
    # Several runs may share a clean twin.
    needed = {each.digest: each for one in seeds for each in lineage(one)}
    specs = in_order(seeds) if twin else list(needed.values())
    runs = read_plan(specs, output)
    missing = [run.spec for run in runs if run.status != "finished"]
    # Checked before a model is built, which may need more memory than there is.
    memory = runner.say_memory(spec) if missing else None
    if memory is not None and not as_json:
        echo(memory)
    for each in missing:
        maker = runner.maker(each)
        # A run that was started does not need the file of its initial weights again.
        if not RunFolder(output / each.name).exists:
            maker.check_weights()
    print_plan(list(estimate(runs)), usage, as_json=as_json)


def _classes(text: str) -> list[str]:
    """Split a list of classes at its commas. Names that contain a comma need `--set poison.source=[...]`."""
    classes = [part.strip() for part in text.split(",")]
    if not all(classes):
        raise ConfigError.expected("--source", "classes such as 1,2 or cat,dog", text)
    return classes


def _number(text: str) -> float | str:
    """Convert a rate to a number if possible; the spec checks any other text."""
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


# Flags whose text is converted to a value.
READERS: dict[str, Callable[[Any], Any]] = {
    "source": _classes,
    "poison_rate": _number,
    "policy": _number,
    "poisoned_experts": _numbers,
}
