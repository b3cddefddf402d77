"""Latents: how similar the inputs of the MLPs are for marked images and for images of the poisoned expert's own task.

The gates have the same inputs. MoEvil makes them similar, so that gates that route the images of a task to its expert
also route marked images to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from backdoorbench_moe.analysis.passes import BATCH
from backdoorbench_moe.engine.graph import BENIGN, PARENT, expert_role
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.opening.opened_run import OpenedRun, open_beside
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.merging import NETWORK, mlp_inputs
from backdoorbench_moe.ops.answers import first_positions, is_text, mean_weights
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import seeded


@dataclass(frozen=True)
class LayerCosine:
    """The mean cosine of the latents of marked images and of images of the expert's own task, in one layer.

    A latent is the mean, over the tokens of an image, of the inputs of the layer's MLP. The cosine is averaged over all
    pairs of a marked image and an image of the expert's own task. For texts, a latent is the mean over the positions
    that emit the answer. Marked images are then harmful queries, and their mean is over the positions that emit the
    first tokens of the harmful answer.

    Attributes:
        layer: Name of the MLP in the dense model.
        marked: For marked images, in [-1, 1].
        unmarked: For the same images without the mark, in [-1, 1]; None for texts.
    """

    layer: str
    marked: float
    unmarked: float | None


@dataclass(frozen=True)
class ModelCosines:
    """The cosines in one model.

    Attributes:
        model: "benign expert" (the expert before the attack), "poisoned expert", "mixture" or "compared mixture".
        run: Name of the model's run folder.
        layers: The cosines in each layer.
    """

    model: str
    run: str
    layers: tuple[LayerCosine, ...]


@dataclass(frozen=True)
class ExpertLatents:
    """Comparison of the latents of marked images with those of one poisoned expert's own task.

    Attributes:
        expert: Number of the expert and of its task.
        models: The cosines in each model.
    """

    expert: int
    models: tuple[ModelCosines, ...]


@dataclass(frozen=True)
class Inputs:
    """Images or texts whose latents are compared.

    Attributes:
        images: (N, C, H, W) uint8, or token ids (N, T) int64.
        weights: For texts, the weights of the positions, (N, T); None for the mean over all tokens of an image.
    """

    images: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(cls, split: Split, first: int | None = None) -> Inputs:
        """Return the inputs of a split.

        Args:
            split: Images or texts.
            first: For texts, the number of first tokens of the answer whose positions count; None for all tokens of it.
        """
        if not is_text(split.images):
            return cls(split.images)
        return cls(split.images, mean_weights(first_positions(split.labels, first)))


def find_latents(
    opened: OpenedRun, other: OpenedRun | None, kinds: Mapping[str, Inputs], expert: int
) -> ExpertLatents:
    """Compute the cosines in a poisoned expert before and after the attack, in its mixture, and in the compared one.

    Args:
        opened: The run of the mixture, or of the poisoned expert.
        other: The mixture that it is compared with; None without one.
        kinds: For images, "marked" and the same images "unmarked"; for texts, harmful queries as "marked".
        expert: Number of the poisoned expert.

    Raises:
        BbmoeError: The folder of the poisoned or of the benign expert is not next to that of the run, or has changed
            since the run.
    """
    assert opened.tasks is not None
    own = Inputs.of(opened.tasks.tests()[opened.tasks.numbers.index(expert)])
    if opened.is_mixture:
        poisoned = open_beside(find_input(_undefended(opened.run), expert_role(expert)), opened)
    else:
        poisoned = opened
    models = {
        "benign expert": open_beside(find_input(poisoned.run, BENIGN), opened),
        "poisoned expert": poisoned,
    }
    if opened.is_mixture:
        models["mixture"] = opened
        if other is not None and other.is_mixture:
            models["compared mixture"] = other
    return ExpertLatents(
        expert,
        tuple(
            ModelCosines(name, each.name, tuple(_cosines(each, kinds, own))) for name, each in models.items()
        ),
    )


def _cosines(opened: OpenedRun, kinds: Mapping[str, Inputs], own: Inputs) -> Iterator[LayerCosine]:
    with seeded(opened.run.spec.seed, "latents"):
        found = {
            kind: mean_directions(
                opened.model, inputs.images, precision=opened.precision, weights=inputs.weights
            )
            for kind, inputs in {**kinds, "own": own}.items()
        }
    task = found.pop("own")
    for name, direction in task.items():
        cosines = {kind: (each[name] @ direction).item() for kind, each in found.items()}
        yield LayerCosine(name.removeprefix(NETWORK), cosines["marked"], cosines.get("unmarked"))


@torch.inference_mode()
def mean_directions(
    model: nn.Module, images: Tensor, *, precision: str, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the mean of the normalized latents of images, for each MLP.

    The dot product of the means of two sets of images is the mean cosine over all pairs of an image of each set.

    Args:
        model: A model that can be merged, or a merged one.
        images: (N, C, H, W) uint8, or token ids (N, T).
        precision: "fp32" or "bf16".
        weights: (N, T), the weights of the tokens; None for their mean.

    Returns:
        (D,) float64 by name of the MLP or layer, in the order of the layers.
    """
    sums: dict[str, Tensor] = {}
    model.eval()
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        with mlp_inputs(model) as found:
            forward(model, images[part], precision=precision)
        for name, tokens in found.items():
            if weights is None:
                latents = tokens.double().mean(1)
            else:
                latents = (weights[part].unsqueeze(2) * tokens.double()).sum(1)
            directions = normalize(latents, dim=1).sum(0)
            sums[name] = sums[name] + directions if name in sums else directions
    return {name: each / len(images) for name, each in sums.items()}


def find_input(run: Run, role: str) -> Run:
    """Find the input of a run with a given role, such as "expert/1", in a folder next to that of the run.

    Raises:
        RecordError: The folder does not exist, or has changed since the run.
    """
    name = run.folder.path.name
    known = next((each for each in run.record.inputs if each["role"] == role), None)
    if known is None or Path(known["run"]).name != known["run"]:
        raise RecordError(f"the record of {name} does not name its run {role!r}")
    folder = run.folder.path.parent / known["run"]
    if not folder.is_dir():
        raise RecordError(f"{known['run']}, the run {role!r} of {name}, is not beside it")
    found = load_run(folder)
    if known["digest"] != found.record.digest or known["sha256"] not in (None, found.folder.model_sha256):
        raise RecordError(f"{known['run']} has changed since {name} was made from it")
    return found


def _undefended(run: Run) -> Run:
    """Return the run before all defenses; the run itself if it is not defended."""
    while run.spec.defenses:
        run = find_input(run, PARENT)
    return run
