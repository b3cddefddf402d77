"""Which training images are poisoned, and how they are labelled."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.shorthand import read_rate
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import convert_fields
from backdoorbench_moe.shares import share_of, smallest_share

# Added after the first digests: left out if empty, so that older digests are unchanged.
OPTIONAL_GROUPS = ("cover", "noise")
RATES = ("rate", *OPTIONAL_GROUPS)


def class_number(parameter: str, label: int | str) -> int:
    """Return the number of a class. Raises ConfigError if it is given by name, which only the data set can resolve."""
    if isinstance(label, str):
        raise ConfigError.expected(parameter, "a class number (`bbmoe info dataset` shows them)", label)
    return label


@dataclass(frozen=True)
class PoisonSpec:
    """Which training images are poisoned, and how they are labelled.

    There are three disjoint groups. *Poison* images are stamped and relabelled. *Cover* images are stamped and keep
    their labels. *Noise* images are stamped with the noise form of the trigger and keep their labels.

    A class is given by its number or its name. The spec has a digest only after `engine.class_names.resolve_classes`
    has replaced names by numbers. Digits are always read as a number, even if a class has such a name.

    Args:
        rate: Size of the poison group as a share of the complete training set, in (0, 1]; 0 for a clean run.
        target: The target class.
        labels: "dirty" draws from all images and relabels them; "clean" draws only images that already have the
            attacker's label, and relabels nothing.
        mapping: "all-to-one" (every label becomes `target`) or "all-to-all" (label y becomes y + 1).
        source: Classes from which images are drawn; all classes if empty.
        cover: Size of the cover group as a share of the complete training set, in [0, 1).
        noise: Size of the noise group as a share of the complete training set, in [0, 1).

    Raises:
        ConfigError: A value is out of range, or two values are incompatible.
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
        """Return the values as a plain dict. Empty cover and noise groups are left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {k: v for k, v in values.items() if v or k not in OPTIONAL_GROUPS}

    def count(self, images: int, group: str = "rate") -> int:
        """Number of images in a group, rounded as in `share_of`.

        Args:
            images: Size of the complete training set.
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
    """Convert a class that is written in digits to its number."""
    digits = label.removeprefix("-") if isinstance(label, str) else ""
    return int(label) if digits.isascii() and digits.isdecimal() else label


def _is_negative(label: int | str) -> bool:
    return not isinstance(label, str) and label < 0
