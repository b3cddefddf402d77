"""`bbmoe info`: describe one part and its options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.kind_names import ONE_KIND
from backdoorbench_moe.cli.list import check_kind
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.config import chain_options, load_recipe
from backdoorbench_moe.data.text import TextDataset
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.moe.structure import takes_text
from backdoorbench_moe.options import REQUIRED

if TYPE_CHECKING:
    from rich.table import Table

RECIPE = "quick"
# Length of the text for which the multiply-adds of a language model are counted.
TOKENS = 64
WIDEST = 100
# Default input of an image model.
IMAGE = {"image_size": 32, "num_classes": 10}


HELP = f"""Describe one part: KIND is {ONE_KIND}; NAME as `bbmoe list` shows it.

For a model, also prints its number of parameters and of multiply-adds for one image, or one text of {TOKENS} tokens:
with the model's own defaults, and with the values of the recipe, which `bbmoe attack` uses. For a data set, also lists
its classes by number and name.
"""


@click.command("info", help=HELP)
@click.argument("kind")
@click.argument("name")
@click.option("--recipe", metavar="NAME", help=f"For a model: the recipe to show.  [{RECIPE}]")
@click.option(
    "--image-size",
    type=int,
    metavar="N",
    help=f"For an image model: image height and width.  [{IMAGE['image_size']}]",
)
@click.option(
    "--num-classes",
    type=int,
    metavar="N",
    help=f"For an image model: number of classes.  [{IMAGE['num_classes']}]",
)
@click.option("--data-root", metavar="DIR", help="For a data set: its folder, to list the classes.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the model or data set, with or without KIND. in front.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    kind: str,
    name: str,
    recipe: str | None,
    image_size: int | None,
    num_classes: int | None,
    data_root: str | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Describe one part."""
    kind = check_kind(kind)
    asked = {"image_size": image_size, "num_classes": num_classes}
    sizes = {key: value for key, value in asked.items() if value is not None}
    _check_flags(kind, recipe, data_root, settings)
    REGISTRIES[kind].check_name(name)
    text = kind == "model" and takes_text(REGISTRIES[kind].lookup(name))
    if sizes and (kind != "model" or text):
        key, value = next(iter(sizes.items()))
        raise ConfigError.expected(f"--{key.replace('_', '-')}", "an image model to go with it", value)
    image = {**IMAGE, **sizes}
    info = _describe(kind, name)
    if kind == "model":
        info |= _sizes(name, recipe or RECIPE, image, _options(kind, name, settings))
    if kind == "dataset":
        options = _options(kind, name, settings) | ({} if data_root is None else {"root": data_root})
        info["classes"] = _class_names(name, options)
    if as_json:
        echo(json.dumps(info, indent=2))
    else:
        side = image["image_size"]
        _print(info, f"text of {TOKENS} tokens" if text else f"{side}x{side} image")


def _check_flags(kind: str, recipe: str | None, data_root: str | None, settings: tuple[str, ...]) -> None:
    """Check that each flag is given with a kind that it is for."""
    if settings and kind not in ("model", "dataset"):
        raise ConfigError.expected("--set", "an option of a model or data set, and only for one", settings[0])
    if data_root is not None and kind != "dataset":
        raise ConfigError.expected("--data-root", "a data set to go with it", data_root)
    if recipe is not None and kind != "model":
        raise ConfigError.expected("--recipe", "KIND model with it", recipe)


def _options(kind: str, name: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """Return the options in `--set`. The keys may begin with the kind, as for `bbmoe attack`."""
    options = chain_options(settings)
    if kind in REGISTRIES[kind].options(name) or not isinstance(options.get(kind), dict):
        return options
    return {**options.pop(kind), **options}


def _describe(kind: str, name: str) -> dict[str, Any]:
    """Return what holds for a part of any kind, and the default settings of a run with an attack."""
    registry = REGISTRIES[kind]
    part, candidate = registry.lookup(name), registry.candidate(name.partition(":")[0])
    info: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "from": candidate.origin if candidate else "this process",
        "description": part.__doc__ or "",
        "options": {
            option.name: {
                "type": option.type_name,
                "default": "required" if option.default is REQUIRED else option.default,
            }
            for option in registry.options(name).values()
        },
    }
    if kind == "attack":
        info["implies"] = dict(getattr(part, "implies", {}))
    return info


def _sizes(name: str, recipe: str, image: dict[str, int], given: dict[str, Any]) -> dict[str, Any]:
    """Return the size of a model with its own defaults, and with the values of a recipe."""
    size = _model_size(name, image, given)
    options = load_recipe(recipe, name).get("models", {}).get(name, {})
    with_recipe = _model_size(name, image, {**options, **given}) if options else size
    return {"size": size, "recipe": {"name": recipe, "options": options, "size": with_recipe}}


def _model_size(name: str, image: dict[str, int], options: dict[str, Any]) -> dict[str, int]:
    from backdoorbench_moe.models.profile import profile_model

    model = REGISTRIES["model"].create(name, options, image)
    profile = profile_model(model, TOKENS if takes_text(model) else image["image_size"])
    return {
        "parameters": profile.parameters,
        "buffers": profile.buffers,
        "multiply_adds": profile.multiply_adds,
    }


def _class_names(name: str, options: dict[str, Any]) -> list[str] | None:
    """Return the class names of a data set; None if they depend on the data and no folder was given, or for texts."""
    registry = REGISTRIES["dataset"]
    if issubclass(registry.lookup(name), TextDataset):
        return []
    needed = {key for key, option in registry.options(name).items() if option.default is REQUIRED}
    if not options and needed:
        return None
    try:
        return list(registry.create(name, options).class_names())
    except DataError:
        if options:
            raise
        return None


def _print(info: dict[str, Any], example: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from backdoorbench_moe.cli.terminal.docstring_text import reflow

    console = Console(highlight=False)
    console.print(f"[bold]{info['kind']} {escape(info['name'])}[/bold] ({info['from']})")
    text = reflow(info["description"], min(console.width, WIDEST))
    console.print(text, markup=False, soft_wrap=True)
    recipe = info.get("recipe", {"options": {}})
    if info["options"]:
        console.print()
        console.print(_option_table(info["options"], recipe))
    if implied := info.get("implies"):
        console.print("\nDefault settings of a run with this attack:")
        lines = (f"    {key}={_setting(value)}" for key, value in implied.items())
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    if classes := info.get("classes"):
        console.print("\nclasses, by number and name (--target takes either):")
        console.print("\n".join(f"{number:>4}  {name}" for number, name in enumerate(classes)), markup=False)
    elif info["kind"] == "dataset" and classes is None:
        console.print("\nTo list the classes, give --data-root DIR.")
    if size := info.get("size"):
        console.print(f"\n{_size_line(size, example)}")
        if recipe["options"]:
            console.print(f"with recipe {recipe['name']}: {_size_line(recipe['size'], example)}")


def _option_table(options: dict[str, Any], recipe: dict[str, Any]) -> Table:
    """Return a table of the options, with a column for the values of a recipe if it sets any."""
    from rich.markup import escape
    from rich.table import Table

    columns = ["option", "type", "default"]
    columns += [f"recipe {recipe['name']}"] if recipe["options"] else []
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, option in options.items():
        cells = [name, option["type"], str(option["default"])]
        cells += [str(recipe["options"].get(name, ""))] if recipe["options"] else []
        table.add_row(*map(escape, cells))
    return table


def _setting(value: Any) -> str:
    """Write a value as `--set` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _size_line(size: dict[str, int], example: str) -> str:
    return (
        f"{size['parameters']:,} parameters and {size['buffers']:,} buffer values; "
        f"{size['multiply_adds']:,} multiply-adds for one {example}"
    )
