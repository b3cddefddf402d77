"""Build the parts of a run from its spec, and check them against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe import applicators, attacks, data, gates, models, splitters, triggers
from backdoorbench_moe.allocation import refusing_sizes
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.attacks.base import Attack
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import DataSource
from backdoorbench_moe.engine.training.checkpoint import load_weights
from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.moe.merging import MergedModel, check_mergeable
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import DEFAULT_PATCH_SIZE, TEXT_OPTIONS, Merged, MergesItself, takes_text
from backdoorbench_moe.ops.seeding import derive_seed, seeded
from backdoorbench_moe.options import REQUIRED
from backdoorbench_moe.registry import Registry
from backdoorbench_moe.splitters.base import Splitter
from backdoorbench_moe.triggers.base import Trigger


@dataclass(frozen=True)
class Stamper:
    """A trigger and its applicator, which together stamp complete images."""

    trigger: Trigger
    applicator: Applicator

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp (B, C, H, W) float images in [0, 1] with the trigger's test form."""
        return self.applicator(images, self.trigger)

    def training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the trigger's training form. `places`: (B,) int64, their indices in the training set."""
        return self.applicator(
            images, lambda canvases: self.trigger.training(canvases, spread(places, canvases))
        )

    def noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the trigger's noise form. `places`: (B,) int64, their indices in the training set."""
        by = self.trigger.noise_by
        return self.applicator(
            images, lambda canvases: self.trigger.noise(canvases, spread(places, canvases, by=by))
        )


def spread(places: Tensor, canvases: Tensor, *, by: Literal["canvas", "image"] = "canvas") -> Tensor:
    """Return an index for every canvas that an applicator cut out of B images.

    Args:
        places: (B,) int64, indices of the images in the training set.
        canvases: (B * n, C, h, w), n consecutive canvases for each image.
        by: "canvas" for a different index for every canvas, "image" for the index of its image.

    Returns:
        (B * n,) int64: for canvas c of image i, places[i] * n + c by canvas, or places[i] by image.

    Raises:
        PluginError: The number of canvases is not a multiple of the number of images.
    """
    each, rest = divmod(len(canvases), max(1, len(places)))
    if rest:
        raise PluginError(
            f"applicator: expected as many canvases of every image, got {len(canvases)} of {len(places)} images"
        )
    if by == "image":
        return places.repeat_interleave(each)
    offsets = torch.arange(each, device=places.device)
    return (places.unsqueeze(1) * each + offsets).flatten()


def cut(applicator: Applicator, images: Tensor) -> Tensor:
    """Return the canvases that an applicator cuts out of images, (B * n, C, h, w).

    Args:
        applicator: The applicator.
        images: (B, C, H, W) float in [0, 1]; not checked, since a check would synchronise with the device.

    Raises:
        PluginError: The applicator does not call the trigger exactly once for a batch.
    """
    found: list[Tensor] = []

    def note(canvases: Tensor) -> Tensor:
        found.append(canvases)
        return canvases

    applicator.apply(images, note)
    if len(found) != 1:
        raise PluginError(
            f"applicator {type(applicator).__name__}: expected one call of the trigger for a batch, got {len(found)}"
        )
    return found[0]


def build_dataset(spec: RunSpec) -> DataSource:
    """Build the data set of a spec without reading it. Raises ConfigError if it needs a folder and has none."""
    root = data.registry.options(spec.dataset.name).get("root")
    if root is not None and root.default is REQUIRED and "root" not in spec.dataset.options:
        raise ConfigError(
            f"dataset.root: {spec.dataset.name} needs the folder of the images (--data-root DIR)"
        )
    return data.create_dataset(spec.dataset.name, **spec.dataset.options)


def build_model(spec: RunSpec, given: Mapping[str, int]) -> nn.Module:
    """Build the model of a spec, with weights drawn from the run's seed.

    Args:
        spec: The spec.
        given: The model options that the data determine; see `data.base.Material.model_options` and `given_by`.

    Raises:
        ConfigError: The model takes images and the data are texts, or vice versa; an option is out of range; the model
            does not fit into memory; or the model of a mixture cannot be merged.
    """
    wanted, text = takes_text(models.registry.lookup(spec.model.name)), TEXT_OPTIONS[0] in given
    if wanted != text:
        kinds = ["images", "texts"]
        raise ConfigError.expected(
            "model",
            f"one of {kinds[text]}, as the data are",
            f"{spec.model.name}, which takes {kinds[wanted]}",
        )
    with seeded(spec.seed, "init"):
        model = models.registry.create(spec.model.name, spec.model.options, given)
    if spec.mixture is not None:
        check_mergeable(model)
    if spec.gate is None:
        return model
    assert spec.mixture is not None
    copies = (
        f"mixture.experts: {spec.mixture.experts} copies of model {spec.model.name!r} do not fit into memory"
    )
    with seeded(spec.seed, "gates"), refusing_sizes(copies):
        return merge_copies(model, spec.mixture.experts, build_gate(spec))


def given_by(data: Mapping[str, Any]) -> dict[str, int]:
    """The model options that the data of a record determine; see `records.Record.data`."""
    if TEXT_OPTIONS[0] in data:
        return {name: data[name] for name in (*TEXT_OPTIONS, "padding")}
    return {"num_classes": len(data["classes"]), "image_size": data["image_size"]}


def merge_copies(dense: nn.Module, experts: int, gate: Gate) -> nn.Module:
    """Build a mixture of E copies of a dense model under randomly initialised gates. The result is a `Merged` model.

    Raises:
        ConfigError: The model cannot be merged.
        PluginError: The model's `merge` returns something else.
    """
    routers = partial(gate, layers=len(check_mergeable(dense).mlps()))
    if not isinstance(dense, MergesItself):
        return MergedModel(dense, experts, routers)
    merged = dense.merge(experts, routers)
    if not isinstance(merged, Merged) or not isinstance(merged, RoutedModel):
        raise PluginError(
            f"model {type(dense).__name__}: expected that merge returns a RoutedModel with num_experts, routers and "
            f"load_experts, got {type(merged).__name__}"
        )
    return merged


def build_gate(spec: RunSpec) -> Gate:
    """Build the gate of a mixture. Raises ConfigError if an option is incompatible with the number of experts."""
    assert spec.gate is not None and spec.mixture is not None
    gate = gates.registry.create(spec.gate.name, spec.gate.options)
    gate.check(spec.mixture.experts)
    return gate


def build_splitter(spec: RunSpec) -> Splitter:
    """Build the splitter of a mixture or of one of its experts."""
    assert spec.splitter is not None
    return splitters.registry.create(spec.splitter.name, spec.splitter.options)


def build_attack(spec: RunSpec) -> Attack:
    """Build the attack of a spec. `check_trigger` checks whether it matches the trigger.

    Raises:
        ConfigError: The run is clean or the model is imported, or an option is out of range.
    """
    if spec.attack is None or spec.imported:
        got = "a clean run" if spec.attack is None else "an imported model"
        raise ConfigError(f"attack: expected an attack, got {got}")
    with naming_attack(spec.attack):
        attack = attacks.registry.create(spec.attack.name, spec.attack.options, {"poison": spec.poison})
    return attack


def check_trigger(spec: RunSpec, attack: Attack) -> None:
    """Raise ConfigError if the attack uses a trigger and the spec has none, or vice versa."""
    assert spec.attack is not None
    if attack.uses_trigger != (spec.trigger is not None):
        expected = "a trigger" if attack.uses_trigger else "no trigger"
        name = None if spec.trigger is None else spec.trigger.name
        raise ConfigError.expected("trigger", f"{expected} for attack {spec.attack.name!r}", name)


@contextmanager
def naming_attack(part: PartSpec) -> Iterator[None]:
    """Inside the block, prefix ConfigErrors about options of the attack with their key, as in "attack.k"."""
    try:
        yield
    except ConfigError as error:
        if str(error).partition(":")[0] in attacks.registry.options(part.name):
            raise ConfigError(f"attack.{error}") from error
        raise


def build_stamper(spec: RunSpec, *, patch_size: int | None, image_size: int) -> Stamper:
    """Build trigger and applicator. Seed and patch size are filled in if the spec does not set them.

    One grey image is stamped to find incompatible sizes early, such as a square larger than a tile, or a tile that does
    not divide the image.

    Args:
        spec: The spec of an attacked run.
        patch_size: Side of the model's patches in pixels; None if it has none.
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: The run has no trigger, or an option is out of range.
        UnknownNameError: There is no such trigger, applicator or option.
        ShapeError: The size of the trigger or the tile is incompatible with the images.
    """
    if spec.trigger is None or spec.applicator is None:
        raise ConfigError("trigger: expected a trigger and an applicator, got a run without one")
    trigger = _create(triggers.registry, spec.trigger, {"seed": derive_seed(spec.seed, "trigger")})
    applicator = _create(
        applicators.registry, spec.applicator, {"patch_size": patch_size or DEFAULT_PATCH_SIZE}
    )
    stamper = Stamper(trigger, applicator)
    stamper(torch.full((1, 3, image_size, image_size), 0.5))
    return stamper


def describe(part: object) -> dict[str, Any]:
    """The public attributes of a part that are plain values, for the record: the values of its options."""
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
    """Build the model of a spec with weights from a file, in evaluation mode.

    Args:
        spec: The spec.
        made_for: The `data` of the record; see `given_by`.
        tensors: The weights by name.
        source: The file, for error messages.

    Raises:
        RecordError: The weights do not match the model.
    """
    model = build_model(spec, given_by(made_for))
    load_weights(model, tensors, source)
    return model.eval()


def fresh_model(
    part: PartSpec,
    given: Mapping[str, int],
    seed: int,
    device: torch.device,
    merge: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Build a randomly initialised model, in evaluation mode.

    Args:
        part: The model.
        given: The model options that the data determine.
        seed: Seed of the weights.
        device: The device.
        merge: Converts the dense model to a mixture, with random numbers from the same seed; None for a dense model.
    """
    with seeded(seed, "fresh"):
        model = models.registry.create(part.name, part.options, given)
        if merge is not None:
            model = merge(model)
    return model.to(device).to(memory_format=torch.channels_last).eval()


def _create(registry: Registry[Any], part: PartSpec, defaults: Mapping[str, object]) -> Any:
    """Build a part. A default is used only if the part has the option and the spec does not set it."""
    known = registry.options(part.name)
    filled = {name: value for name, value in defaults.items() if name in known}
    return registry.create(part.name, {**filled, **part.options})
