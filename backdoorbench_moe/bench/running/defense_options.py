"""Names and options of several defenses, as given on the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from backdoorbench_moe import defenses
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError

ALL = "all"
# Options by name of the defense.
Options = Mapping[str, Mapping[str, Any]]


def split_names(texts: Sequence[str], skip: Sequence[str] = (), *, of_texts: bool = False) -> list[str]:
    """Split lists of defenses at commas, without duplicates; "all" stands for all registered defenses.

    Args:
        texts: The lists.
        skip: Lists of defenses to leave out.
        of_texts: Whether "all" excludes defenses that only support images.

    Raises:
        ConfigError: A list has an empty name, or no defense is left.
        UnknownNameError: A defense does not exist.
    """
    known = [name for name in defenses.registry.names() if not of_texts or _takes_texts(name)]
    given = _split("--defense", texts)
    left_out = {defenses.registry.check_name(name) for name in _split("--skip", skip)}
    names = dict.fromkeys(each for name in given for each in (known if name == ALL else [name]))
    checked = [defenses.registry.check_name(name) for name in names]
    kept = [name for name in checked if name not in left_out]
    if not kept:
        raise ConfigError.expected("--skip", "at least one defense to be left", ",".join(skip))
    return kept


def _split(option: str, texts: Sequence[str]) -> list[str]:
    """Split the values of an option at commas. Raises ConfigError if a name is empty."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if not all(names):
        raise ConfigError.expected(option, "names such as strip or strip,reroute", ",".join(texts))
    return names


def options_by_name(names: Sequence[str], values: Mapping[str, Any]) -> Options:
    """Return the options of every defense.

    Args:
        names: Names of defenses.
        values: Under the name of a defense, its options; under any other key, the value of this option for all defenses
            that have it. Options of a single defense take precedence.

    Raises:
        ConfigError: A key is a defense that is not one of these.
        UnknownNameError: A key is neither a defense nor an option of any of these.
    """
    known = {name: _known_options(name) for name in names}
    shared = {key: value for key, value in values.items() if key not in known}
    for key in shared:
        if not any(key in options for options in known.values()):
            if names_defense(key):
                chosen = f"a defense chosen with --defense ({', '.join(names)})"
                raise ConfigError.expected("--set", f"{chosen} before the first dot", key)
            raise UnknownNameError(
                "--set: defense or option", key, {*known, *(o for each in known.values() for o in each)}
            )
    found = {}
    for name, options in known.items():
        own = values.get(name, {})
        if not isinstance(own, Mapping):
            raise ConfigError.expected("--set", f"{name}.OPTION=VALUE", f"{name}={own}")
        if given := {**{key: value for key, value in shared.items() if key in options}, **own}:
            found[name] = given
    return found


def names_defense(key: str) -> bool:
    """Whether a key of `--set` is the name of a defense, chosen or not."""
    return key in defenses.registry.names()


def _takes_texts(name: str) -> bool:
    """Whether a defense supports texts; True if it cannot be imported, which is reported later."""
    try:
        return defenses.registry.lookup(name).takes_texts
    except PluginError:
        return True


def _known_options(name: str) -> Collection[str]:
    """Return the options of a defense; empty if it cannot be imported, which is reported later."""
    try:
        return defenses.registry.options(name)
    except PluginError:
        return ()
