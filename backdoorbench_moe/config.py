"""What a run is: frozen specs, merged as defaults < recipe < YAML < flags, and their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import yaml

from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.options import convert
from backdoorbench_moe.package_recipes import model_recipe
from backdoorbench_moe.plain import plain

RECIPES = ("quick", "paper")
PARTS = ("dataset", "model", "trigger", "applicator")
OPTIONAL_PARTS = ("trigger", "applicator")
# Where the numbers do not depend on them: moving the data or taking another output keeps the digest.
NOT_IN_DIGEST = ("recipe", "device")
LEFT_OUT_IF_NONE = ("defenses", "probe")
DATASET_NOT_IN_DIGEST = ("root", "download")

# A date such as 2020-13-45 is a plain ValueError (UnicodeDecodeError is one too); lists in lists go too deep.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)

Values = dict[str, Any]


@dataclass(frozen=True)
class PartSpec:
    """A part by name with its options; the part itself checks the options when it is built."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(self.name))
        object.__setattr__(self, "options", plain(self.options))

    def to_dict(self) -> Values:
        """{"name": ..., option: value, ...}."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class PoisonSpec:
    """Which training images are poisoned, and what they are called.

    rate: share of the training set, in (0, 1]; 0 makes the clean twin. target: the attacker's class.
    labels: "dirty" draws from all images and relabels them; "clean" draws from the images that already
    have the label they are to have, and relabels nothing. mapping: "all-to-one" (target) or
    "all-to-all" (class y becomes y + 1). source: only images of these classes; all where empty.
    """

    rate: float = 0.1
    target: int = 0
    labels: Literal["dirty", "clean"] = "dirty"
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    source: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError.expected("poison.rate", "a number in (0, 1]", self.rate)
        if self.target < 0:
            raise ConfigError.expected("poison.target", "a class number from 0", self.target)
        if any(label < 0 for label in self.source):
            raise ConfigError.expected("poison.source", "class numbers from 0", self.source)
        if len(set(self.source)) != len(self.source):
            raise ConfigError.expected("poison.source", "each class once", self.source)
        if self.mapping == "all-to-all" and self.labels == "clean":
            raise ConfigError("poison.mapping: all-to-all changes labels; it needs poison.labels=dirty")

    def count(self, images: int) -> int:
        """Number of images to poison: floor(rate * images), exactly (0.29 of 100 is 29).

        Raises ConfigError if the rate is positive and the count is 0.
        """
        count = int(Fraction(repr(self.rate)) * images)
        if self.rate > 0 and count == 0:
            raise ConfigError(
                f"poison.rate: {self.rate} of {images} images is no image; expected at least {1 / images:.2g}"
            )
        return count


@dataclass(frozen=True)
class TrainSpec:
    """How the victim trains.

    lr: peak learning rate. schedule: "constant", or "one-cycle" (linear up over the first `warmup` share
    of all steps, then linear down to 0). weight_decay is not applied to biases and norm parameters.
    """

    epochs: int = 25
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: float = 0.25

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < float("inf"), "a positive number"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "a number from 0"),
            "warmup": (0 <= self.warmup < 1, "a number in [0, 1)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError.expected(f"train.{name}", expected, getattr(self, name))
        if self.nesterov and not self.momentum:
            raise ConfigError.expected("train.momentum", "a positive number where train.nesterov is set", 0)


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides the numbers of one run, the device it asks for, and what its folder is to hold.

    defenses: applied one after the other to the trained victim. probe: of so many test images the routing is
    kept after every epoch; it changes no number, but a run without it cannot stand for one with it.
    """

    dataset: PartSpec = PartSpec("signs")
    model: PartSpec = PartSpec("pmoe")
    trigger: PartSpec | None = PartSpec("warp")
    applicator: PartSpec | None = PartSpec("patch")
    attack: Literal["data-poisoning"] = "data-poisoning"
    poison: PoisonSpec = PoisonSpec()
    train: TrainSpec = TrainSpec()
    defenses: tuple[PartSpec, ...] = ()
    probe: int = 0
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    recipe: str = "quick"

    def __post_init__(self) -> None:
        for name in ("seed", "probe"):
            if getattr(self, name) < 0:
                raise ConfigError.expected(name, "a number from 0", getattr(self, name))
        if (self.trigger is None) != (self.applicator is None):
            raise ConfigError("trigger and applicator: expected both or neither")
        if (self.trigger is None) != (self.poison.rate == 0):
            raise ConfigError.expected("poison.rate", "a number in (0, 1]", self.poison.rate)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is poisoned: a clean twin."""
        return self.trigger is None

    def clean_twin(self) -> RunSpec:
        """The same run without poison, defense or probe; all attacks on the same data, model and seed share it."""
        return replace(self, trigger=None, applicator=None, poison=PoisonSpec(rate=0.0), defenses=(), probe=0)

    def parent(self) -> RunSpec:
        """The run that the last defense is applied to."""
        assert self.defenses, "an undefended run has no parent"
        return replace(self, defenses=self.defenses[:-1])

    def to_dict(self) -> Values:
        """Plain nested dict; `spec_from_dict` reads it back. No defenses or probe, no such key: older digests hold."""
        values: Values = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, PartSpec):
                value = value.to_dict()
            elif isinstance(value, (PoisonSpec, TrainSpec)):
                value = {f.name: getattr(value, f.name) for f in fields(value)}
            elif item.name == "defenses":
                value = [part.to_dict() for part in value]
            if item.name not in LEFT_OUT_IF_NONE or value:
                values[item.name] = value
        return cast(Values, json.loads(json.dumps(values)))

    @property
    def digest(self) -> str:
        """Ten hex digits over all that decides the numbers."""
        values = {k: v for k, v in self.to_dict().items() if k not in NOT_IN_DIGEST}
        values["dataset"] = {k: v for k, v in values["dataset"].items() if k not in DATASET_NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Folder name: readable parts, then the digest."""
        parts = [self.dataset.name, self.model.name]
        if self.trigger is None or self.applicator is None:
            parts.append("clean")
        else:
            parts += [self.trigger.name, self.applicator.name, f"{self.poison.rate:g}"]
        parts += [part.name for part in self.defenses]
        safe = "-".join([*parts, f"s{self.seed}", self.digest])
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in safe)


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """Read a complete or partial nested dict. Raises UnknownNameError or ConfigError naming the key."""
    return cast(RunSpec, _read(RunSpec, values, ""))


def build_spec(*layers: Mapping[str, Any]) -> RunSpec:
    """Merge layers (YAML, flags, ...; later ones win) over the recipe they name, and check the result."""
    layers = tuple(normalise(layer) for layer in layers)
    chosen = merge({"recipe": "quick", "model": {"name": "pmoe"}, "dataset": {"name": "signs"}}, *layers)
    recipe = load_recipe(chosen["recipe"], chosen["model"]["name"])
    models = recipe.pop("models", {})
    base = {
        **recipe,
        "dataset": {"name": chosen["dataset"]["name"]},
        "model": {"name": chosen["model"]["name"], **models.get(chosen["model"]["name"], {})},
    }
    return spec_from_dict(merge({"recipe": chosen["recipe"]}, base, *layers))


def load_recipe(name: str, model: str = "pmoe") -> Values:
    """The values of a named recipe, with what the package of a third party's model says for its own models on top.

    Raises UnknownNameError, or PluginError if the package's file cannot be read.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", str(name), RECIPES)
    text = (files("backdoorbench_moe") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    own = model_recipe(model, name)
    return merge(yaml.safe_load(text), _load_own(*own, name, model) if own is not None else {})


def _load_own(text: str, origin: str, name: str, model: str) -> Values:
    """A package's own file for a recipe. Raises PluginError, naming the package, for no valid YAML or no recipe."""
    where = f"recipe {name!r} of model {model!r}"
    try:
        values = yaml.load(text, Loader=_Loader)
    except YAML_ERRORS as error:
        raise PluginError(
            f"{where}: no valid YAML: {' '.join(str(error).split())} (from {origin})"
        ) from error
    models = values.get("models", {}) if isinstance(values, dict) else None
    if not isinstance(models, dict) or not all(isinstance(options, dict) for options in models.values()):
        raise PluginError(
            f"{where}: expected keys and values, those of a model under models.NAME, got {values!r} (from {origin})"
        )
    try:
        _check_plain(values, where)
        spec_from_dict({key: value for key, value in values.items() if key != "models"})
    except ConfigError as error:
        raise PluginError(f"{where}: {error} (from {origin})") from error
    return values


class _Loader(yaml.SafeLoader):
    """Safe, and refuses a key that stands twice in one place: plain YAML would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


# YAML 1.1, which PyYAML reads, takes 1e-3 for a text: it wants 1.0e-3. This is the rule of YAML 1.2.
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_yaml(path: Path) -> Values:
    """Read a config file. Raises ConfigError naming the file (and line) where it cannot be read."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"config file {path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError.expected(f"config file {path}", "keys and values", values)
    _check_plain(values, f"config file {path}")
    return values


def parse_setting(text: str) -> Values:
    """Read one "dotted.key=value" (value as YAML) into a nested dict. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError.expected("--set", "dotted.key=value", text)
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except YAML_ERRORS as error:
        raise ConfigError.expected("--set", "a YAML value behind '='", text) from error
    _check_plain(parsed, f"--set {key}")
    for name in reversed(key.split(".")):
        parsed = {name: parsed}
    return cast(Values, parsed)


def _check_plain(value: object, where: str) -> None:
    """Refuse what YAML knows and JSON, which records and digests are made of, does not: dates, bytes, sets."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: expected texts, numbers, lists, and keys and values ({error})"
        ) from error


def merge(*layers: Mapping[str, Any]) -> Values:
    """Merge nested dicts, later ones winning. A part under another name drops the earlier one's options."""
    merged: Values = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            renamed = (
                isinstance(old, dict)
                and isinstance(value, Mapping)
                and ("name" in value and "name" in old and value["name"] != old["name"])
            )
            if isinstance(old, dict) and isinstance(value, Mapping) and not renamed:
                merged[key] = merge(old, value)
            else:
                merged[key] = deepcopy(value)
    return merged


def normalise(layer: Mapping[str, Any]) -> Values:
    """Let a part be given by its bare name; refuse one that is neither a name nor keys and values."""
    known: dict[str, Callable[[str, Any], Any]] = dict.fromkeys(PARTS, _normalise_part)
    known["defenses"] = _normalise_list
    return {key: known[key](key, value) if key in known else value for key, value in layer.items()}


def _normalise_list(key: str, value: object) -> list[Values | None]:
    if not isinstance(value, list | tuple):
        raise ConfigError.expected(key, "a list of names, or of keys with a name among them", value)
    return [_normalise_part(f"{key}[{place}]", item) for place, item in enumerate(value)]


def _normalise_part(key: str, value: object) -> Values | None:
    if isinstance(value, str):
        return {"name": value}
    if value is None and key in OPTIONAL_PARTS:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError.expected(key, "a name, or keys with a name among them", value)
    if not isinstance(value.get("name", ""), str):
        raise ConfigError.expected(f"{key}.name", "a text", value["name"])
    return dict(value)


def _read(kind: type, values: object, where: str) -> Any:
    """Build a spec dataclass from a dict, checking names and types by its own annotations."""
    if not isinstance(values, Mapping):
        raise ConfigError.expected(where or "config", "keys and values", values)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    checked: Values = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UnknownNameError(f"{where or 'config'}: key", str(key), known)
        if key in PARTS:
            checked[key] = _read_part(value, path, optional=key in OPTIONAL_PARTS)
        elif key == "defenses":
            parts = _normalise_list(path, value)
            checked[key] = tuple(_read_part(item, f"{path}[{i}]") for i, item in enumerate(parts))
        elif hints[key] in (PoisonSpec, TrainSpec):
            checked[key] = _read(hints[key], value, path)
        else:
            checked[key] = convert(_fraction(value) if path == "poison.rate" else value, hints[key], path)
    return kind(**checked)


def _read_part(value: object, where: str, *, optional: bool = False) -> PartSpec | None:
    if value is None and optional:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError.expected(where, "a name, or keys with a name among them", value)
    options = {str(key): item for key, item in value.items() if key != "name"}
    return PartSpec(value["name"], options)


def _fraction(value: object) -> object:
    """Let a rate be written as "1%"."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(Decimal(value.strip()[:-1].strip()).scaleb(-2))
        except ArithmeticError:
            return value
    return value


def chain_settings(settings: Iterable[str]) -> Values:
    """Merge several "dotted.key=value" texts, later ones winning."""
    return merge(*(normalise(parse_setting(text)) for text in settings))
