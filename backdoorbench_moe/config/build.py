"""Build a spec from a recipe and the user's settings, which take precedence over the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from backdoorbench_moe.config.merge import Values, merge
from backdoorbench_moe.config.package_recipes import model_recipe
from backdoorbench_moe.config.reading import spec_from_dict
from backdoorbench_moe.config.shorthand import SURROGATE, normalise
from backdoorbench_moe.config.spec import (
    DEFAULT_ATTACK,
    IMPORTED,
    SAME,
    TWIN,
    RunSpec,
)
from backdoorbench_moe.config.yaml_files import YAML_ERRORS, StrictLoader, yaml_fault
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.plain import check_plain
from backdoorbench_moe.plugins import discover
from backdoorbench_moe.registry import registry_of

RECIPES = ("quick", "paper")
# A mixture without an attack takes its defaults from this attack.
MIXTURE_ATTACK = "moevil"


def build_spec(*layers: Mapping[str, Any]) -> RunSpec:
    """Build a spec from layers of settings on top of the recipe that they name.

    Args:
        layers: Nested settings, such as those of a YAML file, of flags and of `--set`. Later layers take precedence
            over earlier ones, and all of them over the recipe. By default the recipe is "quick", the model "pmoe" and
            the data set "signs".

    Raises:
        UnknownNameError: A key or the recipe does not exist.
        ConfigError: A value is of the wrong type or out of range.
        PluginError: The package of a third-party model has a recipe that cannot be read, or is not valid.
    """
    layers = tuple(normalise(layer) for layer in layers)
    own = _implied_by_data(merge(*layers))
    implied = merge(_implied_by_attack(merge(own, *layers)), own)
    chosen = merge(
        {"recipe": "quick", "model": {"name": "pmoe"}, "dataset": {"name": "signs"}}, implied, *layers
    )
    recipe = load_recipe(chosen["recipe"], chosen["model"]["name"])
    models, mixture = recipe.pop("models", {}), recipe.pop("mixture", {})
    attacks = recipe.pop("attacks", {})
    base = {
        **recipe,
        "dataset": {"name": chosen["dataset"]["name"]},
        "model": {"name": chosen["model"]["name"], **models.get(chosen["model"]["name"], {})},
        **_recipe_surrogate(chosen),
    }
    if chosen.get("mixture") is not None:
        base = merge(base, mixture)
    attack = (chosen.get("attack") or {}).get("name")
    if attack in attacks:
        base["attack"] = {"name": attack, **attacks[attack]}
    return spec_from_dict(merge({"recipe": chosen["recipe"]}, base, implied, *layers))


def _implied_by_attack(chosen: Values) -> Values:
    """The settings that the attack implies, which the user's settings override.

    The default attack implies the default trigger and applicator. Any other attack lists its settings in the class
    attribute `implies`. Without an attack, there is no trigger and no applicator, and the poison rate is 0. A mixture
    or a policy without an attack has the settings of `MIXTURE_ATTACK`, but no poisoned expert.
    """
    if "attack" in chosen and chosen["attack"] is None:
        clean = {"trigger": None, "applicator": None, "poison": {"rate": 0.0}}
        if chosen.get("mixture") is None and not chosen.get("policy"):
            return clean
        own = _implied_by(MIXTURE_ATTACK)
        if not chosen.get("policy", own.get("policy")):
            own |= clean
        own = merge(own, {"mixture": {"poisoned_experts": []}})
        return own if chosen.get("mixture") is not None else _without_mixture(own)
    name = chosen.get("attack", {}).get("name", DEFAULT_ATTACK)
    if name == IMPORTED:
        return {"trigger": None, "applicator": None, "poison": {"rate": 0.0}}
    if name != DEFAULT_ATTACK:
        return _implied_by(name)
    default = RunSpec()
    assert default.trigger is not None and default.applicator is not None
    return {"trigger": default.trigger.to_dict(), "applicator": default.applicator.to_dict()}


def _implied_by_data(chosen: Values) -> Values:
    """The settings that a third-party data set implies, which the user's settings override.

    They take precedence over those that the attack implies: a text data set has no trigger. The built-in data sets are
    image data and imply nothing. If the user asks for the default attack on texts, its trigger is kept, so that the
    attack is refused: the default attack without a trigger would mean a clean run.
    """
    name = chosen.get("dataset", {}).get("name")
    if not isinstance(name, str) or name in _built_in_datasets():
        return {}
    registry = registry_of("dataset")
    if name.partition(":")[0] not in registry.names():
        return {}  # Building the data set raises an error for an unknown name.
    implied = normalise(dict(getattr(registry.lookup(name), "implies", {})))
    if (chosen.get("attack") or {}).get("name") == DEFAULT_ATTACK:
        return {key: value for key, value in implied.items() if key not in ("trigger", "applicator")}
    return implied


@functools.cache
def _built_in_datasets() -> frozenset[str]:
    """Names of the built-in data sets; cached, since a suite has hundreds of specs."""
    return frozenset(candidate.name for candidate in discover("dataset") if candidate.builtin)


def _implied_by(attack: str) -> Values:
    """The attribute `implies` of an attack's class."""
    return normalise(dict(getattr(registry_of("attack").lookup(attack), "implies", {})))


def _without_mixture(values: Values) -> Values:
    return {key: value for key, value in values.items() if key not in ("mixture", "splitter", "gate")}


def load_recipe(name: str, model: str = "pmoe") -> Values:
    """Read a recipe.

    Args:
        name: Name of the recipe, "quick" or "paper".
        model: Name of the model. If it is a third-party model whose package has a recipe of this name, the values of
            the package take precedence over the built-in ones.

    Returns:
        Settings as in a config file, and three more keys: "models" and "attacks" hold the options of individual models
        and attacks by name, and "mixture" the settings that apply, or differ, only for a mixture of experts.

    Raises:
        UnknownNameError: There is no such recipe.
        PluginError: The package's file cannot be read or is not a valid recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", str(name), RECIPES)
    own = model_recipe(model, name)
    return merge(_built_in(name), _load_own(*own, name, model) if own is not None else {})


def _recipe_model(recipe: str, name: str) -> Values:
    """A model with its options in a recipe."""
    return {"name": name, **load_recipe(recipe, name).get("models", {}).get(name, {})}


def _recipe_surrogate(chosen: Values) -> Values:
    """The surrogate that a trigger is optimised on, with its options in the recipe, if the trigger names a model.

    Raises:
        ConfigError: Options of a surrogate are set, but the trigger does not name a model.
    """
    name = (chosen.get("trigger") or {}).get(SURROGATE)
    if not isinstance(name, str) or name in ("", SAME, TWIN):
        if (given := chosen.get(SURROGATE)) is not None:
            expected = f"none, as trigger.surrogate is {name!r}, which is not the name of a model"
            raise ConfigError.expected(SURROGATE, expected, given)
        return {}
    return {SURROGATE: _recipe_model(chosen["recipe"], name)}


@functools.cache
def _built_in(name: str) -> Values:
    """Read a built-in recipe. It is cached, since a suite has hundreds of specs, and must not be modified."""
    text = (files("backdoorbench_moe") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@functools.cache
def _load_own(text: str, origin: str, name: str, model: str) -> Values:
    """Parse and check the recipe of a third-party package. Cached as the built-in ones; must not be modified.

    Args:
        text: Content of the YAML file.
        origin: Name and version of the package, for error messages.
        name: Name of the recipe.
        model: Name of the model.

    Raises:
        PluginError: The file is not valid YAML or not a valid recipe.
    """
    where = f"recipe {name!r} of model {model!r}"
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except YAML_ERRORS as error:
        raise PluginError(f"{where}: not valid YAML: {yaml_fault(error)} (from {origin})") from error
    for key, part in (("models", "a model"), ("attacks", "an attack")):
        named = values.get(key, {}) if isinstance(values, dict) else None
        if not isinstance(named, dict) or not all(isinstance(options, dict) for options in named.values()):
            raise PluginError(
                f"{where}: expected a mapping, with the options of {part} under {key}.NAME, "
                f"got {values!r} (from {origin})"
            )
    try:
        check_plain(values, where)
        dense = {key: value for key, value in values.items() if key not in ("models", "attacks", "mixture")}
        spec_from_dict(dense)
        if "mixture" in values:
            _check_mixture(dense, values["mixture"])
    except ConfigError as error:
        raise PluginError(f"{where}: {error} (from {origin})") from error
    return values


def _check_mixture(dense: Values, mixture: object) -> None:
    """Check a recipe's settings for mixtures on top of its other settings and the defaults of a mixture.

    Raises:
        ConfigError: `mixture` is not a mapping, or contains an invalid key or value.
    """
    if not isinstance(mixture, dict):
        raise ConfigError.expected("mixture", "a mapping", mixture)
    try:
        spec_from_dict(merge(dense, {"attack": MIXTURE_ATTACK}, _implied_by(MIXTURE_ATTACK), mixture))
    except ConfigError as error:
        raise ConfigError(f"mixture: {error}") from error
