"""The frozen spec of a run, reading it from plain values, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.poison import PoisonSpec
from backdoorbench_moe.config.shorthand import (
    OPTIONAL_PARTS,
    PART_LISTS,
    PARTS,
    normalise_list,
    normalise_part,
)
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.options import convert_fields
from backdoorbench_moe.plain import check_plain, plain

# These do not influence the numbers of a run, so they are left out of its digest.
NOT_IN_DIGEST = ("recipe", "device")
DATASET_NOT_IN_DIGEST = ("root", "download")
# These keys were added later. They are written only if they are set, so that the digests of older specs still hold.
LEFT_OUT_IF_EMPTY = ("defenses", "files", "probe")
# Also written for clean runs: their digests have contained this name from the beginning.
DEFAULT_ATTACK = "data-poisoning"


@dataclass(frozen=True)
class PartSpec:
    """Name and options of a part. The options are checked when the part is built.

    Args:
        name: Name of the part, such as "warp".
        options: The options that are set, by name; the others take their defaults.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(self.name))
        object.__setattr__(self, "options", plain(self.options))
        for option, value in self.options.items():
            check_plain(value, f"{self.name}: {option}")

    def to_dict(self) -> Values:
        """Return the name and the options in one dict."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class TrainSpec:
    """How the victim trains.

    Args:
        epochs: Passes over the training set, from 1.
        batch_size: Images per step, from 1; the last batch of an epoch may be smaller.
        optimizer: "sgd" or "adamw".
        lr: Peak learning rate, above 0.
        momentum: Momentum of SGD, in [0, 1).
        nesterov: Use Nesterov momentum; `momentum` must then be above 0.
        weight_decay: Weight decay, from 0; not applied to biases and norm parameters.
        schedule: Learning rate over the steps: "constant", or "one-cycle", which rises linearly during the warmup and
            then falls linearly to 0.
        warmup: Share of all steps in which "one-cycle" rises, in [0, 1).

    Raises:
        ConfigError: A value is out of range.
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
        convert_fields(self, "train.", (item.name for item in fields(self)))
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
    """All settings of one run: what decides its numbers, the device, and what its folder records.

    Args:
        dataset: The data set.
        model: The architecture.
        trigger: What is stamped on images; None if the attack stamps nothing, or if there is no attack.
        applicator: Where the trigger is applied; given if and only if there is a trigger.
        attack: Who the attacker is and what he controls; None for a clean run.
        poison: Which training images are poisoned, and which labels they get.
        train: How the victim trains.
        defenses: Applied one after the other to the trained model.
        files: SHA-256 of every file that an option names, by the option's key, such as "trigger.image". Filled in when
            the run is made. The digest covers these hashes instead of the paths.
        probe: Number of test images, from 0, whose routing is recorded after every epoch. Changes no metric.
        seed: Seed of the run, from 0; every other seed is derived from it.
        precision: Precision of training and evaluation; "auto" is bf16 where the hardware has it.
        device: "auto", "cpu", "cuda" or "cuda:N"; not part of the digest.
        recipe: Name of the recipe that the values came from; not part of the digest.

    Raises:
        ConfigError: A value is out of range, or values contradict each other, such as a trigger without an attack.
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
        convert_fields(self, "", ("probe", "seed", "precision", "device", "recipe"))
        for name in ("seed", "probe"):
            if getattr(self, name) < 0:
                raise ConfigError.expected(name, "a number from 0", getattr(self, name))
        # A spec that is derived from another, such as a clean twin, does not have the files of the parts it lacks.
        options = self._options()
        own = {key: known for key, known in self.files.items() if key in options}
        object.__setattr__(self, "files", own)
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
        return ((kind, part) for kind, _, part in self.options_by_key())

    def options_by_key(self) -> Iterator[tuple[str, str, PartSpec]]:
        """Every part as (kind, prefix, part); the keys of its options start with the prefix, such as "trigger."."""
        for kind in KINDS.values():
            value = getattr(self, kind.key)
            for place, part in enumerate(value if kind.repeated else (value,)):
                if part is not None:
                    yield kind.name, f"{kind.key}[{place}]." if kind.repeated else f"{kind.key}.", part

    def with_options(self, changed: Mapping[str, object]) -> RunSpec:
        """Return a copy with other values for some options.

        Args:
            changed: New values by the key of the option, such as "trigger.size" or "defenses[0].ratio".
        """
        parts: dict[str, Any] = {}
        for name, start, part in self.options_by_key():
            own = {key.removeprefix(start): value for key, value in changed.items() if key.startswith(start)}
            new, kind = replace(part, options={**part.options, **own}) if own else part, KINDS[name]
            parts[kind.key] = (*parts.get(kind.key, ()), new) if kind.repeated else new
        return replace(self, **parts)

    def without_paths(self) -> RunSpec:
        """Return a copy in which the options that name a file in `files` are None."""
        return self.with_options(dict.fromkeys(self.files)) if self.files else self

    @property
    def file_paths(self) -> dict[str, str]:
        """The path of every file whose hash is in `files`, by the key of the option that names it."""
        options = self._options()
        return {key: path for key in self.files if isinstance(path := options[key], str)}

    def _options(self) -> Values:
        """All options of all parts, by key, such as "trigger.image"."""
        parts = self.options_by_key()
        return {f"{start}{name}": value for _, start, part in parts for name, value in part.options.items()}

    def without_folders(self) -> RunSpec:
        """Return a copy, with the same digest, that does not say in which folders of this machine files lie.

        The options that say where the data lie are left out, and a file in `files` is given by its name alone.
        """
        kept = {k: v for k, v in self.dataset.options.items() if k not in DATASET_NOT_IN_DIGEST}
        if kept == self.dataset.options and not self.files:
            return self
        spec = replace(self, dataset=replace(self.dataset, options=kept))
        return spec.with_options({key: Path(path).name for key, path in self.file_paths.items()})

    def with_data(self, **options: object) -> RunSpec:
        """Return a copy with other options for the data set, such as a new `root`."""
        return replace(self, dataset=replace(self.dataset, options={**self.dataset.options, **options}))

    @property
    def attacked(self) -> bool:
        """Whether the model is attacked."""
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
        """First ten hex digits of a SHA-256 over everything that decides the numbers.

        Raises:
            ConfigError: A class is given by name and not yet resolved to its number.
        """
        self.poison.check_numbered()
        values = {k: v for k, v in self.without_paths().to_dict().items() if k not in NOT_IN_DIGEST}
        values["dataset"] = {k: v for k, v in values["dataset"].items() if k not in DATASET_NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of the run's folder: readable parts, then the digest."""
        parts = [self.dataset.name, self.model.name, *self._attack_labels()]
        parts += [part.name for part in self.defenses]
        name = "-".join([*parts, f"s{self.seed}", self.digest])
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)

    def _attack_labels(self) -> list[str]:
        if self.attack is None:
            return ["clean"]
        labels = [] if self.attack.name == DEFAULT_ATTACK else [self.attack.name]
        labels += [part.name for part in (self.trigger, self.applicator) if part is not None]
        return [*labels, f"{self.poison.rate:g}"] if self.poison.rate else labels


def _write_attack(attack: PartSpec | None) -> str | Values:
    """Write an attack without options as its bare name, as records did before attacks had options."""
    if attack is None:
        return DEFAULT_ATTACK
    return attack.to_dict() if attack.options else attack.name


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """Read a spec from a nested dict; keys that are missing take their defaults.

    Raises:
        UnknownNameError: A key does not exist.
        ConfigError: A value is of the wrong type or out of range; the message names its key.
    """
    return cast(RunSpec, _read(RunSpec, _fill_in_attack(values), ""))


def _fill_in_attack(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the keys that follow from the attack.

    The default attack with the trigger null means no attack, because clean runs have always been written this way. Any
    other attack has no trigger and no applicator unless they are given.
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
            checked[key] = value  # Converted by the dataclass itself.
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
