"""The frozen spec of a run, how it is read from plain values, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast, get_type_hints

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.poison import PoisonSpec
from backdoorbench_moe.config.shorthand import (
    OPTIONAL_PARTS,
    PART_LISTS,
    PARTS,
    normalise_list,
    normalise_part,
    read_rate,
)
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.options import convert
from backdoorbench_moe.plain import plain

# They decide no number: another device or another place of the data keeps the digest.
NOT_IN_DIGEST = ("recipe", "device")
DATASET_NOT_IN_DIGEST = ("root", "download")
# Keys that came later are written only where they are set, so that older digests hold.
LEFT_OUT_IF_EMPTY = ("defenses", "files", "probe")
# Also written where there is no attack: clean runs have had this name in their digest from the beginning.
DEFAULT_ATTACK = "data-poisoning"


@dataclass(frozen=True)
class PartSpec:
    """A part by name, with its options; the part checks the options when it is built."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(self.name))
        object.__setattr__(self, "options", plain(self.options))

    def to_dict(self) -> Values:
        """{"name": ..., option: value, ...}."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class TrainSpec:
    """How the victim trains.

    Args:
        epochs: Passes over the training set, from 1.
        batch_size: Images in a step, from 1; the last batch of an epoch may be smaller.
        optimizer: "sgd" or "adamw".
        lr: Peak learning rate, above 0.
        momentum: Of SGD, in [0, 1).
        nesterov: Use Nesterov momentum.
        weight_decay: From 0; not applied to biases and norm parameters.
        schedule: "constant", or "one-cycle": linear up over the first `warmup` share of all steps, then linear
            down to 0.
        warmup: Share of all steps, in [0, 1).
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
    """Everything that decides the numbers of one run, the device it asks for, and what its folder shall hold.

    Args:
        dataset: The data set.
        model: The architecture.
        trigger: What is stamped on images; None where the attack stamps nothing, or there is no attack.
        applicator: Where the trigger is applied; given if and only if there is a trigger.
        attack: Who the attacker is and what he controls; None for a clean run.
        poison: Which training images are poisoned and what they are labelled.
        train: How the victim trains.
        defenses: Applied one after the other to the trained model.
        files: SHA-256 of every file that an option names, by the option's key, such as "trigger.image". It is filled
            in when the run is made, and stands for the path in the digest.
        probe: Number of test images whose routing is kept after every epoch; it changes no metric.
        seed: Seed of the run; every other seed is derived from it.
        precision: Precision of training and evaluation; "auto" is bf16 where the hardware has it.
        device: "auto", "cpu", "cuda" or "cuda:N"; not part of the digest.
        recipe: Name of the recipe that the values came from; not part of the digest.
    """

    dataset: PartSpec = PartSpec("signs")
    model: PartSpec = PartSpec("pmoe")
    trigger: PartSpec | None = PartSpec("warp")
    applicator: PartSpec | None = PartSpec("patch")
    attack: PartSpec | None = PartSpec(DEFAULT_ATTACK)
    poison: PoisonSpec = field(default_factory=PoisonSpec)
    train: TrainSpec = TrainSpec()
    defenses: tuple[PartSpec, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
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
        if self.attack is None:
            self._check_clean()
        elif self.attack.name == DEFAULT_ATTACK and not self.poison.rate:
            raise ConfigError.expected("poison.rate", "a number in (0, 1]", self.poison.rate)

    def _check_clean(self) -> None:
        if self.trigger is not None:
            raise ConfigError.expected("trigger", "none, as there is no attack", self.trigger.name)
        if self.poison.rate:
            raise ConfigError.expected("poison.rate", "0, as there is no attack", self.poison.rate)

    def parts(self) -> Iterator[tuple[str, PartSpec]]:
        """Every part of the spec with its kind, in the order of `kinds.KINDS`."""
        for kind in KINDS.values():
            value = getattr(self, kind.key)
            for part in value if kind.repeated else (value,):
                if part is not None:
                    yield kind.name, part

    def options_by_key(self) -> Iterator[tuple[str, str, PartSpec]]:
        """Every part with its kind and the beginning of its options' keys, such as "trigger." or "defenses[0]."."""
        for kind in KINDS.values():
            value = getattr(self, kind.key)
            for place, part in enumerate(value if kind.repeated else (value,)):
                if part is not None:
                    yield kind.name, f"{kind.key}[{place}]." if kind.repeated else f"{kind.key}.", part

    def with_options(self, changed: Mapping[str, object]) -> RunSpec:
        """The same run with other values of some options, by their keys."""
        parts: dict[str, Any] = {}
        for name, start, part in self.options_by_key():
            own = {key.removeprefix(start): value for key, value in changed.items() if key.startswith(start)}
            new, kind = replace(part, options={**part.options, **own}) if own else part, KINDS[name]
            parts[kind.key] = (*parts.get(kind.key, ()), new) if kind.repeated else new
        return replace(self, **parts)

    def without_paths(self) -> RunSpec:
        """The same run without the paths of files whose content it holds the hash of."""
        return self.with_options(dict.fromkeys(self.files)) if self.files else self

    def with_data(self, **options: object) -> RunSpec:
        """The same run with other options of its data set, such as the `root` where the data lie now."""
        return replace(self, dataset=replace(self.dataset, options={**self.dataset.options, **options}))

    @property
    def attacked(self) -> bool:
        """Whether an attacker had a hand in the making of this model."""
        return self.attack is not None

    def to_dict(self) -> Values:
        """Write the spec as a plain nested dict; `spec_from_dict` reads it back."""
        values: Values = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "attack":
                value = _write_attack(value)
            elif item.name == "defenses":
                value = [part.to_dict() for part in value]
            elif item.name == "files":
                value = dict(value)
            elif isinstance(value, PartSpec | PoisonSpec):
                value = value.to_dict()
            elif isinstance(value, TrainSpec):
                value = {f.name: getattr(value, f.name) for f in fields(value)}
            if item.name not in LEFT_OUT_IF_EMPTY or value:
                values[item.name] = value
        return cast(Values, json.loads(json.dumps(values)))

    @property
    def digest(self) -> str:
        """Ten hex digits over everything that decides the numbers. Raises ConfigError for a class given by name."""
        self.poison.check_numbered()
        values = {k: v for k, v in self.without_paths().to_dict().items() if k not in NOT_IN_DIGEST}
        values["dataset"] = {k: v for k, v in values["dataset"].items() if k not in DATASET_NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of the run's folder: readable parts, then the digest."""
        parts = [self.dataset.name, self.model.name, *self._attack_labels()]
        parts += [part.name for part in self.defenses]
        safe = "-".join([*parts, f"s{self.seed}", self.digest])
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in safe)

    def _attack_labels(self) -> list[str]:
        if self.attack is None:
            return ["clean"]
        labels = [] if self.attack.name == DEFAULT_ATTACK else [self.attack.name]
        labels += [part.name for part in (self.trigger, self.applicator) if part is not None]
        return [*labels, f"{self.poison.rate:g}"] if self.poison.rate else labels


def _write_attack(attack: PartSpec | None) -> str | Values:
    """An attack as its bare name where it has no options, as in records from before attacks had any."""
    if attack is None:
        return DEFAULT_ATTACK
    return attack.to_dict() if attack.options else attack.name


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """Read a spec from a nested dict, complete or not; what is missing takes its default.

    Raises:
        UnknownNameError: A key does not exist.
        ConfigError: A value is of the wrong type or out of range; the message names its key.
    """
    return cast(RunSpec, _read(RunSpec, _fill_in_attack(values), ""))


def _fill_in_attack(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settle what the attack implies for keys that are left open.

    Without a trigger the default attack is no attack: so clean runs have always been written. An attack other than
    the default one has no trigger unless one is given.
    """
    if not isinstance(values, Mapping):
        return values
    attack = values.get("attack", DEFAULT_ATTACK)
    name = attack.get("name") if isinstance(attack, Mapping) else attack
    if name == DEFAULT_ATTACK and "trigger" in values and values["trigger"] is None:
        return {**values, "attack": None}
    if name != DEFAULT_ATTACK:
        return {"trigger": None, "applicator": None, **values}
    return values


def _read(kind: type, values: object, where: str) -> Any:
    """Build a spec dataclass from a dict; its annotations say which keys and types are allowed."""
    if not isinstance(values, Mapping):
        raise ConfigError.expected(where or "config", "keys and values", values)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    checked: Values = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UnknownNameError(f"{where or 'config'}: key", str(key), known)
        if key in PARTS and kind is RunSpec:
            checked[key] = _read_part(value, path, optional=key in OPTIONAL_PARTS)
        elif key in PART_LISTS:
            parts = normalise_list(path, value)
            checked[key] = tuple(_read_part(item, f"{path}[{i}]") for i, item in enumerate(parts))
        elif key == "files" and kind is RunSpec:
            checked[key] = _read_files(value)
        elif hints[key] in (PoisonSpec, TrainSpec):
            checked[key] = _read(hints[key], value, path)
        else:
            rate = kind is PoisonSpec and hints[key] is float
            checked[key] = convert(read_rate(value) if rate else value, hints[key], path)
    return kind(**checked)


def _read_files(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ConfigError.expected("files", "a SHA-256 by the key of an option", value)
    return dict(value)


def _read_part(value: object, where: str, *, optional: bool = False) -> PartSpec | None:
    if value is None and optional:
        return None
    if where == "attack":
        value = normalise_part(where, value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError.expected(where, "a name, or keys with a name among them", value)
    options = {str(key): item for key, item in value.items() if key != "name"}
    return PartSpec(value["name"], options)
