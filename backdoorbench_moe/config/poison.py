"""Which training images are poisoned, and what they are labelled."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.shorthand import read_rate
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import convert_fields
from backdoorbench_moe.shares import share_of, smallest_share

# They came later than the first digests, and are written only where they are set.
OPTIONAL_GROUPS = ("cover", "noise")
RATES = ("rate", *OPTIONAL_GROUPS)


def class_number(parameter: str, label: int | str) -> int:
    """Return the number of a class. Raises ConfigError if it is given by name, since only the data knows the names."""
    if isinstance(label, str):
        raise ConfigError.expected(parameter, "a class number (`bbmoe info dataset` shows them)", label)
    return label


@dataclass(frozen=True)
class PoisonSpec:
    """Which training images are poisoned, and what they are labelled.

    Three disjoint groups: *poison* is stamped and relabelled, *cover* is stamped and keeps its labels, *noise* is
    stamped with the trigger's noise form and keeps its labels.

    A class is given by its number, or by its name until `engine.class_names.resolve_classes` has replaced that by the
    number: only then does the spec have a digest. Digits are always a number, even where a class has such a name.

    Args:
        rate: Share of the whole training set in the poison group, in (0, 1]; 0 for a clean run.
        target: The attacker's class.
        labels: "dirty" draws from all images and relabels them; "clean" draws from images that already have the
            label they are to have, and relabels nothing.
        mapping: "all-to-one" (the target) or "all-to-all" (class y becomes y + 1).
        source: Draw only images of these classes; all classes if empty.
        cover: Share of the whole training set in the cover group, in [0, 1).
        noise: Share of the whole training set in the noise group, in [0, 1).
    """

    rate: float = 0.1
    target: int | str = 0
    labels: Literal["dirty", "clean"] = "dirty"
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    source: tuple[int | str, ...] = ()
    cover: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in RATES:
            object.__setattr__(self, name, read_rate(f"poison.{name}", getattr(self, name)))
        convert_fields(self, "poison.", (item.name for item in fields(self)))
        object.__setattr__(self, "target", _digits(self.target))
        object.__setattr__(self, "source", tuple(map(_digits, self.source)))
        self._check_rates()
        if _is_negative(self.target):
            raise ConfigError.expected("poison.target", "a class number of at least 0", self.target)
        if any(map(_is_negative, self.source)):
            raise ConfigError.expected("poison.source", "class numbers of at least 0", self.source)
        if len(set(self.source)) != len(self.source):
            raise ConfigError.expected("poison.source", "each class once", self.source)
        if self.mapping == "all-to-all" and self.labels == "clean":
            raise ConfigError("poison.mapping: all-to-all changes labels; it needs poison.labels=dirty")

    def _check_rates(self) -> None:
        if not 0 <= self.rate <= 1:
            hint = f"; for {self.rate:g} percent write {self.rate:g}%" if 1 < self.rate <= 100 else ""
            raise ConfigError(f"poison.rate: expected a number in (0, 1], got {self.rate!r}{hint}")
        for name in ("cover", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError.expected(f"poison.{name}", "a number in [0, 1)", getattr(self, name))
        rates = [getattr(self, name) for name in RATES]
        # The sum of floats may exceed 1 by a rounding error.
        if math.fsum(rates) > 1 + 1e-9:
            raise ConfigError(
                "poison.rate, poison.cover and poison.noise: expected disjoint shares of the training set, with a sum "
                f"of at most 1, got {' + '.join(f'{rate:g}' for rate in rates)}"
            )

    def check_numbered(self) -> None:
        """Raise ConfigError if a class is still given by name."""
        class_number("poison.target", self.target)
        for label in self.source:
            class_number("poison.source", label)

    def to_dict(self) -> Values:
        """Write the values as a plain dict; groups that are empty are left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {k: v for k, v in values.items() if v or k not in OPTIONAL_GROUPS}

    def count(self, images: int, group: str = "rate") -> int:
        """Number of images in a group: `share_of` its rate.

        Args:
            images: Size of the whole training set.
            group: "rate" for the poison group, "cover" or "noise".

        Raises:
            ConfigError: The rate is positive and the number is 0.
        """
        rate = getattr(self, group)
        count = share_of(rate, images)
        if rate > 0 and count == 0:
            raise ConfigError(
                f"poison.{group}: {rate} of {images} images rounds down to 0 images; "
                f"expected at least {smallest_share(images)}"
            )
        return count


def _digits(label: int | str) -> int | str:
    """Read a class that is written in digits as its number."""
    digits = label.removeprefix("-") if isinstance(label, str) else ""
    return int(label) if digits.isascii() and digits.isdecimal() else label


def _is_negative(label: int | str) -> bool:
    return not isinstance(label, str) and label < 0
