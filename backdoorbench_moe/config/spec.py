"""`RunSpec`: all settings of a run, its digest, and its conversion to plain values. `reading` converts them back."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.mixture import MixtureSpec
from backdoorbench_moe.config.poison import RATES, PoisonSpec
from backdoorbench_moe.config.shorthand import (
    SURROGATE,
    read_rate,
)
from backdoorbench_moe.config.train import TrainSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.options import convert_fields
from backdoorbench_moe.plain import check_plain, plain

# Not part of the digest, so that it does not depend on the device or on where the data are stored.
NOT_IN_DIGEST = ("recipe", "device")
DATASET_NOT_IN_DIGEST = ("root", "download")
# Keys that were added later. `to_dict` leaves them out if they are empty, so that the digests of older specs are
# unchanged.
LEFT_OUT_IF_EMPTY = ("defenses", "files", "probe", "policy", "splitter", "gate", "mixture", "surrogate")
# Values of the option `surrogate` of a trigger that stand for a clean twin; others are names of models.
SAME, TWIN = "same", "twin"
# `to_dict` writes this name for clean runs too, since it has always been part of their digests.
DEFAULT_ATTACK = "data-poisoning"
# The largest seed that `numpy.random.seed` accepts, which the parts of third parties may call.
LARGEST_SEED = 2**32 - 1
# Takes the place of the attack for a model that was trained elsewhere: any attack on it is unknown. It is not a part.
IMPORTED = "imported"


@dataclass(frozen=True)
class PartSpec:
    """Name and options of a part. The part checks its options when it is built.

    Args:
        name: Name of the part, such as "warp".
        options: The options that are set, by name. The others have their defaults.

    Raises:
        ConfigError: An option cannot be written as JSON.
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
class RunSpec:
    """All settings of one run.

    Args:
        dataset: The data set.
        model: The architecture.
        trigger: The pattern that is stamped on images; None if the attack stamps nothing or there is no attack.
        applicator: Where on an image the trigger is stamped; None if and only if `trigger` is None.
        attack: The attack; None for a clean run; `IMPORTED`, without options, for a model that was trained elsewhere.
        surrogate: The model on which the trigger is optimised, if the trigger's option `surrogate` is the name of a
            model; otherwise None. Options that are not set have the defaults of the model's class.
        poison: Which training images are poisoned, and which labels they get.
        policy: Number of marked training images divided by the number of all others, in [0, 1); 0 for no policy.
            Marked images contain the trigger as a mark and have an additional label, "reject". A model that follows
            the policy classifies every marked image as "reject". Text data have queries that must be refused instead,
            and no mark.
        splitter: The tasks of the experts of a mixture; None for any other run, and for text data, which define their
            own tasks.
        gate: How tokens are routed to the experts of a mixture; None for any other run, and for a single expert.
        mixture: How experts are fine-tuned and merged; None for a run without experts to merge.
        train: Training settings; for a mixture, those of its base.
        defenses: Defenses that are applied to the trained model, in order; empty for an undefended run.
        files: SHA-256 of every file that an option names, by the option's key, such as "trigger.image". It is filled
            in before the run starts (see `engine.files.pin_files`). The digest covers these hashes, not the paths.
        probe: Number of test images, at least 0, whose routing is recorded before training and after every epoch. It
            is part of the digest, although it does not change the metrics.
        seed: Seed of the run, from 0 to `LARGEST_SEED`. The seeds of training, poisoning, defenses, and the trigger
            (unless its option `seed` is set) are derived from it. The splits of the data do not depend on it.
        precision: Precision of training and evaluation: "fp32", "bf16", or "auto" for bf16 if the hardware has bf16
            instructions and fp32 otherwise.
        device: "auto", "cpu", "cuda" or "cuda:N"; not part of the digest.
        recipe: Name of the recipe that the values came from; not part of the digest.

    Raises:
        ConfigError: A value is out of range, or two values are incompatible, such as a trigger without an attack.
    """

    dataset: PartSpec = PartSpec("signs")
    model: PartSpec = PartSpec("pmoe")
    trigger: PartSpec | None = PartSpec("warp")
    applicator: PartSpec | None = PartSpec("patch")
    attack: PartSpec | None = PartSpec(DEFAULT_ATTACK)
    surrogate: PartSpec | None = None
    poison: PoisonSpec = field(default_factory=PoisonSpec)
    policy: float = 0.0
    splitter: PartSpec | None = None
    gate: PartSpec | None = None
    mixture: MixtureSpec | None = None
    train: TrainSpec = field(default_factory=TrainSpec)
    defenses: tuple[PartSpec, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    probe: int = 0
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    recipe: str = "quick"

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", read_rate("policy", self.policy))
        convert_fields(self, "", ("policy", "probe", "seed", "precision", "device", "recipe"))
        if self.probe < 0:
            raise ConfigError.expected("probe", "a number of at least 0", self.probe)
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError.expected("seed", f"a number from 0 to {LARGEST_SEED}", self.seed)
        self._resolve_surrogate()
        # Drop the files of options that this spec does not have. A clean twin, for example, is derived from the spec
        # of an attacked run, but has no trigger.
        options = self._options()
        own = {key: known for key, known in self.files.items() if key in options}
        object.__setattr__(self, "files", own)
        if self.trigger is not None and self.attack is None and not self.policy:
            raise ConfigError.expected("trigger", "none, as there is no attack", self.trigger.name)
        if (self.trigger is None) != (self.applicator is None):
            raise ConfigError("trigger and applicator: expected both or neither")
        self._check_mixture()
        self._check_epochs()
        if self.imported:
            self._check_imported()
        if self.attack is None or self.imported:
            for name in RATES:
                if rate := getattr(self.poison, name):
                    why = "the model is imported" if self.imported else "there is no attack"
                    raise ConfigError.expected(f"poison.{name}", f"0, as {why}", rate)
        elif self.attack.name == DEFAULT_ATTACK and not self.poison.rate:
            raise ConfigError.expected("poison.rate", "a number in (0, 1]", self.poison.rate)

    def _check_epochs(self) -> None:
        if self.train.epochs or self.imported:
            return
        if self.model.options.get("weights") is None and "model.weights" not in self.files:
            raise ConfigError.expected("train.epochs", "at least 1, as the model has no initial weights", 0)
        if self.attack is not None and self.mixture is None:
            raise ConfigError.expected("train.epochs", "at least 1, as the attack needs training", 0)

    def _check_imported(self) -> None:
        assert self.attack is not None
        if self.attack.options:
            raise ConfigError.expected("attack", f"no options for {IMPORTED!r}", dict(self.attack.options))
        for name in ("trigger", "splitter", "gate", "mixture", "policy"):
            if value := getattr(self, name):
                got = value.name if isinstance(value, PartSpec) else value
                raise ConfigError.expected(name, "none, as the model is imported", got)

    def _resolve_surrogate(self) -> None:
        chosen = None if self.trigger is None else self.trigger.options.get(SURROGATE)
        if self.surrogate is not None and self.surrogate.name != chosen:
            expected = f"the model that trigger.surrogate names ({chosen!r})"
            raise ConfigError.expected("surrogate.name", expected, self.surrogate.name)
        if isinstance(chosen, str) and chosen not in ("", SAME, TWIN) and self.surrogate is None:
            object.__setattr__(self, SURROGATE, PartSpec(chosen))

    def _check_mixture(self) -> None:
        if not 0 <= self.policy < 1:
            raise ConfigError.expected("policy", "a number in [0, 1)", self.policy)
        if self.mixture is None:
            for name in ("splitter", "gate"):
                if (part := getattr(self, name)) is not None:
                    raise ConfigError.expected(name, "none, as no experts are merged", part.name)
            return
        if self.attack is not None and self.attack.name == DEFAULT_ATTACK:
            expected = "an attack on experts, such as moevil, or none, where experts are merged"
            raise ConfigError.expected("attack", expected, self.attack.name)
        if self.mixture.expert_policy and not self.policy:
            raise ConfigError.expected(
                "mixture.expert_policy", "0, as there is no policy", self.mixture.expert_policy
            )
        if self.mixture.task is not None:
            if self.gate is not None:
                expected = "none, as it is set for the experts of a mixture"
                raise ConfigError.expected("mixture.task", expected, self.mixture.task)
        else:
            if self.gate is None:
                raise ConfigError.expected("gate", "the gate of the experts that are merged", None)
            if (self.attack is None) != (not self.mixture.poisoned_experts):
                expected = "none, as there is no attack" if self.attack is None else "at least one expert"
                raise ConfigError.expected(
                    "mixture.poisoned_experts", expected, self.mixture.poisoned_experts
                )

    def parts(self) -> Iterator[tuple[str, PartSpec]]:
        """Yield (kind, part) for every part of the spec, in the order of `kinds.KINDS`; the surrogate is last."""
        return ((kind, part) for kind, _, part in self.options_by_key())

    def options_by_key(self) -> Iterator[tuple[str, str, PartSpec]]:
        """Yield (kind, prefix, part) for every part of the spec. `IMPORTED` does not count as an attack.

        The key of an option is the prefix, such as "trigger." or "defenses[0].", followed by the option's name.
        """
        for kind in KINDS.values():
            value: Any = None if kind.name == "attack" and self.imported else getattr(self, kind.key)
            for place, part in enumerate(value if kind.repeated else (value,)):
                if part is not None:
                    yield kind.name, f"{kind.key}[{place}]." if kind.repeated else f"{kind.key}.", part
        if self.surrogate is not None:
            yield "model", f"{SURROGATE}.", self.surrogate

    def with_options(self, changed: Mapping[str, object]) -> RunSpec:
        """Return a copy with other values for some options.

        Args:
            changed: New values by the key of the option, such as "trigger.size" or "defenses[0].ratio". Keys of parts
                that the spec does not have are ignored.
        """
        parts: dict[str, Any] = {}
        for name, start, part in self.options_by_key():
            own = {key.removeprefix(start): value for key, value in changed.items() if key.startswith(start)}
            new = replace(part, options={**part.options, **own}) if own else part
            key = start.partition("[")[0].removesuffix(".")
            parts[key] = (*parts.get(key, ()), new) if KINDS[name].repeated else new
        if self.mixture is not None:
            parts["mixture"] = self.mixture.with_weights(changed)
        return replace(self, **parts)

    def without_paths(self) -> RunSpec:
        """Return a copy in which every option whose file is in `files` is None."""
        return self.with_options(dict.fromkeys(self.files)) if self.files else self

    @property
    def file_paths(self) -> dict[str, str]:
        """The path of every file whose hash is in `files`, by the key of the option that names it."""
        options = self._options()
        return {key: path for key in self.files if isinstance(path := options[key], str)}

    def _options(self) -> Values:
        """All options of all parts, and the weights of experts, by key, such as "trigger.image"."""
        parts = self.options_by_key()
        found = {f"{start}{name}": value for _, start, part in parts for name, value in part.options.items()}
        return found if self.mixture is None else found | self.mixture.weights_by_key()

    def without_folders(self) -> RunSpec:
        """Return a copy with the same digest, but without paths of this machine.

        The options for the location of the data are removed, and the files in `files` are given by name only.
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
        """Whether the run has an attack; False for an imported model, where this is unknown."""
        return self.attack is not None and not self.imported

    @property
    def imported(self) -> bool:
        """Whether the model was trained elsewhere, so that any attack on it is unknown."""
        return self.attack is not None and self.attack.name == IMPORTED

    def __hash__(self) -> int:
        """Hash of all values, for functions that cache their results by spec; see `engine.graph`."""
        return hash(self._text)

    def to_dict(self) -> Values:
        """Return the spec as a nested dict of plain values; `spec_from_dict` converts it back."""
        return cast(Values, json.loads(self._text))

    @functools.cached_property
    def _text(self) -> str:
        """The values of `to_dict` as JSON; cached, since tables and graphs use them thousands of times."""
        values: Values = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "attack":
                value = self._write_attack()
            elif item.name == SURROGATE:
                value = value.to_dict() if value is not None and value.options else None
            elif item.name == "defenses":
                value = [part.to_dict() for part in value]
            elif item.name == "files":
                value = dict(value)
            elif isinstance(value, PartSpec | PoisonSpec | TrainSpec | MixtureSpec):
                value = value.to_dict()
            if item.name not in LEFT_OUT_IF_EMPTY or value:
                values[item.name] = value
        return json.dumps(values)

    @functools.cached_property
    def digest(self) -> str:
        """First ten hexadecimal digits of the SHA-256 of the settings, which identify the run.

        The digest covers the content of files instead of their paths. It does not cover the device, the name of the
        recipe, or the location of the data.

        Raises:
            ConfigError: `poison` names a class instead of giving its number; see `engine.class_names.resolve_classes`.
        """
        self.poison.check_numbered()
        values = {k: v for k, v in self.without_paths().to_dict().items() if k not in NOT_IN_DIGEST}
        values["dataset"] = {k: v for k, v in values["dataset"].items() if k not in DATASET_NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of the run's folder: data set, model, attack, defenses, seed and digest, joined by hyphens."""
        parts = [self.dataset.name, self.model.name, *self._mixture_labels(), *self._attack_labels()]
        parts += [part.name for part in self.defenses]
        name = "-".join([*parts, f"s{self.seed}", self.digest])
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)

    def _mixture_labels(self) -> list[str]:
        if self.mixture is None:
            return ["policy"] if self.policy else []
        if self.mixture.task is not None:
            return [f"expert{self.mixture.task}"]
        assert self.gate is not None
        return [f"moe{self.mixture.experts}", self.gate.name]

    def _write_attack(self) -> str | Values | None:
        """The value of the key "attack": only the name if there are no options, as in records without attack options.

        "No attack" is None for a run that may have a trigger without an attack. For other runs it is `DEFAULT_ATTACK`,
        as in the first digests; the null trigger then shows that the run is clean.
        """
        if self.attack is None:
            return None if self.policy or self.mixture else DEFAULT_ATTACK
        return self.attack.to_dict() if self.attack.options else self.attack.name

    def _attack_labels(self) -> list[str]:
        if self.attack is None:
            return ["clean"]
        labels = [] if self.attack.name == DEFAULT_ATTACK else [self.attack.name]
        labels += [part.name for part in (self.trigger, self.applicator) if part is not None]
        return [*labels, f"{self.poison.rate:g}"] if self.poison.rate else labels
