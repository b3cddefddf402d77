"""Read YAML from users: config files, suites and others, and single "key=value" settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from backdoorbench_moe.config.merge import Values, merge
from backdoorbench_moe.config.shorthand import normalise
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.plain import check_plain

# ValueError: a date such as 2020-13-45, or a file that is not UTF-8. RecursionError: lists that are nested too deeply.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class StrictLoader(yaml.SafeLoader):
    """A safe loader that raises an error for duplicate keys in a mapping, of which PyYAML silently drops the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


# PyYAML follows YAML 1.1, which reads 1e-3 as a string and only 1.0e-3 as a number. This is the rule of YAML 1.2.
EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))

# YAML 1.1 also reads on, off, yes and no as booleans, even in keys, such as the option `on` of a defense. This is the
# rule of YAML 1.2.
BOOL, BOOLEAN = "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != BOOL]
    for first, rules in StrictLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(BOOL, BOOLEAN, list("tTfF"))


def load_yaml(path: Path, what: str = "config file") -> Values:
    """Read a YAML file.

    Args:
        path: The file.
        what: What the file is, such as "suite file", for error messages.

    Raises:
        ConfigError: The file cannot be read, is not valid YAML, or is not a mapping of plain values. The message names
            the file, and the line if it is known.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"{what} {path}: not valid YAML: {yaml_fault(error)}") from error
    check_plain(values, f"{what} {path}")
    if not isinstance(values, dict):
        raise ConfigError.expected(f"{what} {path}", "a mapping", values)
    return values


def yaml_fault(error: Exception) -> str:
    """Return what one of `YAML_ERRORS` says, in one line, with the line and column but without the name of the text.

    PyYAML calls every text "<unicode string>", and the messages of the callers name the file. The line itself, which
    PyYAML repeats with a mark below it, cannot be read without its line break.
    """
    text = re.sub(
        r'\s+in "<[^"]*>", (line \d+, column \d+|position \d+)(:\n.*\n *\^)?', r" at \1", str(error)
    )
    return ": ".join(" ".join(line.split()) for line in text.splitlines())


def parse_setting(text: str) -> Values:
    """Convert one "dotted.key=value" setting, whose value is YAML, to a nested dict. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError.expected("--set", "dotted.key=value", text)
    try:
        parsed = yaml.load(value, Loader=StrictLoader)
    except YAML_ERRORS as error:
        raise ConfigError.expected("--set", "a YAML value after '='", text) from error
    for name in reversed(key.split(".")):
        parsed = {name: parsed}
    check_plain(parsed, f"--set {key}")
    return cast(Values, parsed)


def chain_settings(settings: Iterable[str]) -> Values:
    """Merge "dotted.key=value" settings of a run spec; later ones take precedence."""
    return merge(*(normalise(parse_setting(text)) for text in settings))


def chain_options(settings: Iterable[str]) -> Values:
    """Merge "dotted.key=value" settings of a part's options, without expanding short forms as `chain_settings` does.

    An option may be named like a kind of part, such as `applicator`.
    """
    return merge(*map(parse_setting, settings))
