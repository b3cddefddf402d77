"""From specs to objects: the parts of a run, built and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe import applicators, data, models, triggers
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import Dataset
from backdoorbench_moe.engine.train import load_weights
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed, seeded
from backdoorbench_moe.registry import Registry
from backdoorbench_moe.triggers.base import Trigger

# The tile of BadPatches where a model has no patches of its own (§4: 4x4 on 32x32 images).
DEFAULT_PATCH_SIZE = 4


@dataclass(frozen=True)
class Stamper:
    """A trigger and where it is applied: one function of images."""

    trigger: Trigger
    applicator: Applicator

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] to the same, triggered."""
        return self.applicator(images, self.trigger)


def build_dataset(spec: RunSpec) -> Dataset:
    """The data set of a spec, not yet read."""
    return data.create_dataset(spec.dataset.name, **spec.dataset.options)


def build_model(spec: RunSpec, *, num_classes: int, image_size: int) -> nn.Module:
    """The model of a spec, its weights drawn from the run's seed."""
    with seeded(spec.seed, "init"):
        given = {"num_classes": num_classes, "image_size": image_size}
        return models.registry.create(spec.model.name, spec.model.options, given)


def build_stamper(spec: RunSpec, *, patch_size: int | None, image_size: int) -> Stamper:
    """Trigger and applicator of a spec; seed and patch size are filled in where the spec leaves them open.

    patch_size: the model's own. Stamps one grey image, so that what does not fit this image size (a
    square larger than a tile, a tile that does not divide the image) is said now. Raises ConfigError,
    UnknownNameError or ShapeError.
    """
    if spec.trigger is None or spec.applicator is None:
        raise ConfigError("trigger: expected a trigger and an applicator, got a clean run")
    trigger = _create(triggers.registry, spec.trigger, {"seed": derive_seed(spec.seed, "trigger")})
    applicator = _create(
        applicators.registry, spec.applicator, {"patch_size": patch_size or DEFAULT_PATCH_SIZE}
    )
    stamper = Stamper(trigger, applicator)
    stamper(torch.full((1, 3, image_size, image_size), 0.5))
    return stamper


def model_patch_size(model: nn.Module) -> int | None:
    """Side in pixels of the model's own patches; None where it has none."""
    size = getattr(model, "patch_size", None)
    return size if isinstance(size, int) else None


def describe(part: object) -> dict[str, Any]:
    """The plain public attributes of a part, for the record: what its options came to be."""
    plain = (int, float, str, bool, type(None))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(part).items()
        if not name.startswith("_")
        and name != "training"
        and (
            isinstance(value, plain)
            or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value))
        )
    }


def load_model(
    spec: RunSpec, made_for: Mapping[str, Any], tensors: dict[str, Tensor], source: str
) -> nn.Module:
    """The model of a spec with weights read from a file, in evaluation mode.

    made_for: a record's data, for its "classes" and "image_size". source: the file, for messages. Raises RecordError
    if the weights do not fit.
    """
    model = build_model(spec, num_classes=len(made_for["classes"]), image_size=made_for["image_size"])
    load_weights(model, tensors, source)
    return model.eval()


def _create(registry: Registry[Any], part: PartSpec, defaults: Mapping[str, object]) -> Any:
    """Build a part; defaults count only where it has such an option and the spec does not set it."""
    known = registry.options(part.name)
    filled = {name: value for name, value in defaults.items() if name in known}
    return registry.create(part.name, {**filled, **part.options})
