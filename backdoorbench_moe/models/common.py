"""Options that all models have in common, and the registry that adds them.

Models need not implement them: `inputs` adds the preparation of images to a model, and `engine.weights.fitting` loads
the weights that training starts from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from backdoorbench_moe.errors import BbmoeError, ConfigError, UnknownNameError
from backdoorbench_moe.options import FilePath, Option, check_options, list_options
from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from torch import nn

Colour = tuple[float, float, float]
# Commonly used mean and standard deviation of red, green and blue, for pixels in [0, 1].
NORMALISATIONS: Mapping[str, tuple[Colour, Colour]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
LARGEST_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of all models. If a model has its own option with the same name, that one is used instead.

    Args:
        weights: File of weights that training starts from: safetensors, or a state dict saved by `torch.save`. None to
            draw the weights from the seed.
        weights_key: The key of the state dict in a checkpoint, such as "state_dict_ema" for averaged weights. None for
            a file that is a state dict, or has one under a common key such as "state_dict" or "model".
        head: The classifier if `weights` are given: "auto" loads that of the file if it has as many classes as the
            data, and otherwise draws a new one; "new" always draws a new one; "keep" requires that the one in the file
            fits.
        mean: Normalisation inside the model: the mean of red, green and blue, for pixels in [0, 1], or a name such as
            "imagenet", which also sets the standard deviation. None for no normalisation.
        std: The standard deviation, above 0, or a name. It must be given if `mean` is given as numbers.
        resize: Side in pixels to which the model resizes its images (bilinear, antialiased); the network is built for
            this size. None to keep the size of the images.

    Raises:
        UnknownNameError: There is no normalisation of this name.
        ConfigError: A value is out of range, only one of `mean` and `std` is given, or `weights_key` without `weights`.
    """

    weights: FilePath | None = None
    weights_key: str | None = None
    head: Literal["auto", "new", "keep"] = "auto"
    mean: str | tuple[float, float, float] | None = None
    std: str | tuple[float, float, float] | None = None
    resize: int | None = None

    def __post_init__(self) -> None:
        _ = self.normalisation
        if self.weights_key is not None and self.weights is None:
            raise ConfigError.expected("model.weights_key", "a file in model.weights", self.weights_key)
        if self.resize is not None and not 1 <= self.resize <= LARGEST_SIDE:
            raise ConfigError.expected("model.resize", f"1 to {LARGEST_SIDE} pixels", self.resize)

    @property
    def normalisation(self) -> tuple[Colour, Colour] | None:
        """Mean and standard deviation as numbers; None for no normalisation."""
        if self.mean is None and self.std is None:
            return None
        mean = self.std if self.mean is None and isinstance(self.std, str) else self.mean
        std = self.mean if self.std is None and isinstance(self.mean, str) else self.std
        first, second = _numbers("mean", mean, 0), _numbers("std", std, 1)
        if not all(0 <= value <= 1 for value in first):
            raise ConfigError.expected("model.mean", "means of pixels in [0, 1]", first)
        if not all(0 < value < math.inf for value in second):
            raise ConfigError.expected("model.std", "numbers above 0", second)
        return first, second


def _numbers(name: str, value: str | Colour | None, place: int) -> Colour:
    if isinstance(value, str):
        if value not in NORMALISATIONS:
            raise UnknownNameError(f"model.{name}", value, NORMALISATIONS)
        return NORMALISATIONS[value][place]
    if value is None:
        raise ConfigError.expected(
            f"model.{name}", "three numbers, as the other of mean and std is given", None
        )
    return value


COMMON = list_options(CommonOptions)


class ModelRegistry(Registry["nn.Module"]):
    """The registry of models. Models of images take `CommonOptions` in addition to their own options."""

    def _unknown(self, name: str) -> BbmoeError:
        """Return the error for a name that cannot be looked up, with a hint if it is an architecture of timm."""
        error = super()._unknown(name)
        if not isinstance(error, UnknownNameError):
            return error
        import timm

        hint = f"; timm's architecture of this name is 'timm:{name}'" if timm.is_model(name) else ""
        return UnknownNameError(self.kind, name, self.names(), hint)

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of a model by name, followed by the common options."""
        own = super().options(name)
        return own | {key: option for key, option in self._common(name).items() if key not in own}

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, Any]:
        """Check the options of a model without building it; see `Registry.check`."""
        for key in options:
            if key not in (known := self.options(name)):
                raise UnknownNameError(f"model {name!r}: option", key, known)
        own, common = self._split(name, options)
        CommonOptions(**common)
        checked = super().check(name, own)
        check = getattr(self.lookup(name), "check_architecture", None)
        if check is not None and "architecture" in checked:
            check(checked["architecture"])  # Before the data are read, which may take long.
        return {**checked, **common}

    def create(
        self, name: str, options: Mapping[str, object], given: Mapping[str, object] | None = None
    ) -> nn.Module:
        """Build a model that prepares its images according to the common options; weights are not loaded."""
        self.check(name, options)
        own, common = self._split(name, options)
        chosen: CommonOptions = CommonOptions(**common)
        values: dict[str, Any] = dict(given or {})
        if chosen.normalisation is None and chosen.resize is None:
            return super().create(name, own, values)
        from backdoorbench_moe.models.inputs import prepare_inputs

        size = values["image_size"]
        model = super().create(name, own, {**values, "image_size": chosen.resize or size})
        return prepare_inputs(
            model, normalisation=chosen.normalisation, resize=chosen.resize, image_size=size
        )

    def common(self, name: str, options: Mapping[str, object]) -> CommonOptions:
        """Return the common options of a model; those that the model replaces have their defaults."""
        return CommonOptions(**self._split(name, options)[1])

    def _misfit(self, part: object) -> str | None:
        """Return why an object is not a model, or None if it is one."""
        from backdoorbench_moe.moe.routed import undeclared_routing

        return super()._misfit(part) or undeclared_routing(cast(type, part))

    def _common(self, name: str) -> Mapping[str, Option]:
        """Return the common options of a model by name; none if its inputs are texts."""
        from backdoorbench_moe.moe.structure import takes_text

        return {} if takes_text(self.lookup(name)) else COMMON

    def _split(self, name: str, options: Mapping[str, object]) -> tuple[dict[str, object], dict[str, Any]]:
        """Return a model's own options, and the common options with converted values."""
        known, common = super().options(name), self._common(name)
        own = {key: value for key, value in options.items() if key in known or key not in common}
        rest = {key: value for key, value in options.items() if key not in own}
        return own, check_options(CommonOptions, rest, where=f"model {name!r}")
