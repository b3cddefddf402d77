"""Gate shares of a mixture: the weight of each expert in each layer, for each task and for marked images.

Source: Figure 4 of MoEvil: the mean gate of the poisoned expert in each layer, for harmful and for benign queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.engine.measuring.mixtures import GatePass, MixturePass
from backdoorbench_moe.engine.measuring.texts import TextPass
from backdoorbench_moe.ops.effects import Mean, means_of


@dataclass(frozen=True)
class LayerShares:
    """The gate shares in one layer: the weights of the outputs of its E experts, in percent.

    Each value is a mean over images and patches. The shares of a layer sum to 100. For texts, it is a mean over texts
    and the positions that emit their answers. Marked images are then harmful queries, and their mean is over the
    positions that emit the first tokens of the harmful answer, see `engine.measuring.texts.FIRST_TOKENS`.

    Attributes:
        layer: Name of the layer.
        tasks: (T, E), for the test images of each of the T tasks.
        marked: (E,), for the marked images; None without marked images.
        unmarked: (E,), for the same images without the mark; None without marked images, and for texts.
    """

    layer: str
    tasks: Tensor
    marked: Tensor | None
    unmarked: Tensor | None


@dataclass(frozen=True)
class ModelShares:
    """The gate shares of one model.

    Attributes:
        layers: The shares in each layer.
        own: The share of each expert for the images of its own task, in percent, mean over the layers.
        marked: The share of each expert for the marked images, in percent, mean over the layers; None without marked
            images.
    """

    layers: tuple[LayerShares, ...]
    own: tuple[Mean, ...]
    marked: tuple[Mean, ...] | None


@dataclass(frozen=True)
class ExpertFindings:
    """The experts of a mixture.

    Attributes:
        tasks: Names of the tasks; expert e was fine-tuned on task e.
        poisoned: Numbers of the poisoned experts; empty for a benign mixture.
        shares: Gate shares of the mixture.
        shares_against: Gate shares of the model that it is compared with, for the same images; None without one.
    """

    tasks: tuple[str, ...]
    poisoned: tuple[int, ...]
    shares: ModelShares
    shares_against: ModelShares | None


def model_shares(found: MixturePass | TextPass) -> ModelShares:
    """Compute the gate shares of a mixture from its pass over the inputs of all tasks and over marked inputs."""
    tasks: Sequence[GatePass] = found.tasks
    marked: GatePass | None = found.marked
    unmarked: GatePass | None = found.unmarked
    return ModelShares(
        layers=tuple(
            LayerShares(
                layer=name,
                tasks=torch.stack([_mean(each, place) for each in tasks]),
                marked=None if marked is None else _mean(marked, place),
                unmarked=None if unmarked is None else _mean(unmarked, place),
            )
            for place, name in enumerate(tasks[0].layers)
        ),
        own=tuple(_over_layers(each)[e] for e, each in enumerate(tasks)),
        marked=None if marked is None else _over_layers(marked),
    )


def _mean(found: GatePass, place: int) -> Tensor:
    return 100 * found.weights[place].double().mean(0)


def _over_layers(found: GatePass) -> tuple[Mean, ...]:
    """Return the share of each expert, mean over the layers and then over the images."""
    return means_of(100 * found.weights.double().mean(0))
