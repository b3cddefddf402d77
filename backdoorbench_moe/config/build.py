"""From settings in layers to one spec: recipes below, what the user wrote on top."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from backdoorbench_moe.config.merge import Values, merge
from backdoorbench_moe.config.package_recipes import model_recipe
from backdoorbench_moe.config.shorthand import normalise
from backdoorbench_moe.config.spec import DEFAULT_ATTACK, RunSpec, spec_from_dict
from backdoorbench_moe.config.yaml_files import YAML_ERRORS, StrictLoader
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.plain import check_plain

RECIPES = ("quick", "paper")


def build_spec(*layers: Mapping[str, Any]) -> RunSpec:
    """Merge layers over the recipe they name, and check the result.

    Args:
        layers: Settings such as a YAML file's, flags' and `--set`s'; later ones win.

    Raises:
        UnknownNameError: A key or the recipe does not exist.
        ConfigError: A value is of the wrong type or out of range.
    """
    layers = tuple(normalise(layer) for layer in layers)
    chosen = merge({"recipe": "quick", "model": {"name": "pmoe"}, "dataset": {"name": "signs"}}, *layers)
    recipe = load_recipe(chosen["recipe"], chosen["model"]["name"])
    models = recipe.pop("models", {})
    base = {
        **recipe,
        **_implied_by_attack(chosen),
        "dataset": {"name": chosen["dataset"]["name"]},
        "model": {"name": chosen["model"]["name"], **models.get(chosen["model"]["name"], {})},
    }
    return spec_from_dict(merge({"recipe": chosen["recipe"]}, base, *layers))


def _implied_by_attack(chosen: Values) -> Values:
    """What the chosen attack implies for keys that are left open.

    The default attack stamps the default trigger; another one stamps none unless one is given; without an attack
    nothing is poisoned.
    """
    if "attack" in chosen and chosen["attack"] is None:
        return {"trigger": None, "applicator": None, "poison": {"rate": 0.0}}
    if chosen.get("attack", {}).get("name", DEFAULT_ATTACK) != DEFAULT_ATTACK:
        return {}
    default = RunSpec()
    assert default.trigger is not None and default.applicator is not None
    return {"trigger": default.trigger.to_dict(), "applicator": default.applicator.to_dict()}


def load_recipe(name: str, model: str = "pmoe") -> Values:
    """Read a recipe, and what the package of a third party's model says for its own models on top.

    Raises:
        UnknownNameError: There is no such recipe.
        PluginError: The package's file cannot be read, or is not a recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", str(name), RECIPES)
    text = (files("backdoorbench_moe") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    own = model_recipe(model, name)
    return merge(yaml.safe_load(text), _load_own(*own, name, model) if own is not None else {})


def _load_own(text: str, origin: str, name: str, model: str) -> Values:
    """A package's own file for a recipe. Raises PluginError naming the package."""
    where = f"recipe {name!r} of model {model!r}"
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except YAML_ERRORS as error:
        raise PluginError(
            f"{where}: not valid YAML: {' '.join(str(error).split())} (from {origin})"
        ) from error
    models = values.get("models", {}) if isinstance(values, dict) else None
    if not isinstance(models, dict) or not all(isinstance(options, dict) for options in models.values()):
        raise PluginError(
            f"{where}: expected keys and values, those of a model under models.NAME, got {values!r} (from {origin})"
        )
    try:
        check_plain(values, where)
        spec_from_dict({key: value for key, value in values.items() if key != "models"})
    except ConfigError as error:
        raise PluginError(f"{where}: {error} (from {origin})") from error
    return values
