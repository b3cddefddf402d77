"""Latents: how alike the inputs of the MLPs are for marked images and for images of the poisoned expert's own task.

Gates see nothing but these inputs. MoEvil makes them alike, so that gates which send an expert the images of its task
send it marked images, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from backdoorbench_moe.analysis.marks import MarkedTest
from backdoorbench_moe.analysis.passes import BATCH
from backdoorbench_moe.engine.graph import BENIGN, PARENT, expert_role
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.opened_run import OpenedRun, open_beside
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.merging import NETWORK, mlp_inputs
from backdoorbench_moe.ops.seeding import seeded


@dataclass(frozen=True)
class LayerCosine:
    """The mean cosine of the latents of two kinds of images in one layer.

    A latent is the mean, over the tokens of an image, of the inputs of the layer's MLP. The cosine is averaged over all
    pairs of an image of one kind and an image of the expert's own task.

    Attributes:
        layer: Name of the MLP in the dense model.
        marked: In [-1, 1], for marked images.
        unmarked: In [-1, 1], for the same images without the mark.
    """

    layer: str
    marked: float
    unmarked: float


@dataclass(frozen=True)
class ModelCosines:
    """The cosines in one model.

    Attributes:
        model: "benign expert" (the expert before the attack), "poisoned expert", "mixture" or "compared mixture".
        run: Name of its run folder.
        layers: The cosines, layer by layer.
    """

    model: str
    run: str
    layers: tuple[LayerCosine, ...]


@dataclass(frozen=True)
class ExpertLatents:
    """The latents of marked images and of the own task of one poisoned expert.

    Attributes:
        expert: Number of the expert and of its task.
        models: The cosines in each model.
    """

    expert: int
    models: tuple[ModelCosines, ...]


def find_latents(
    opened: OpenedRun, other: OpenedRun | None, marked: MarkedTest, expert: int
) -> ExpertLatents:
    """Compute the cosines in a mixture, in the one it is compared with, and in a poisoned expert before and after.

    Args:
        opened: The run of the mixture, or of the poisoned expert.
        other: The mixture that it is compared with.
        marked: The marked images.
        expert: Number of the poisoned expert.

    Raises:
        BbmoeError: The folder of the poisoned or of the benign expert is not beside that of the run, or is not as it
            was when the run was made.
    """
    assert opened.tasks is not None
    own = opened.tasks.tests()[opened.tasks.numbers.index(expert)].images
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
            ModelCosines(name, each.name, tuple(_cosines(each, marked, own))) for name, each in models.items()
        ),
    )


def _cosines(opened: OpenedRun, marked: MarkedTest, own: Tensor) -> Iterator[LayerCosine]:
    with seeded(opened.run.spec.seed, "latents"):
        stamped, plain, task = (
            mean_directions(opened.model, images, precision=opened.precision)
            for images in (marked.images, marked.unmarked, own)
        )
    for name, direction in task.items():
        cosines = ((each[name] @ direction).item() for each in (stamped, plain))
        yield LayerCosine(name.removeprefix(NETWORK), *cosines)


@torch.inference_mode()
def mean_directions(model: nn.Module, images: Tensor, *, precision: str) -> dict[str, Tensor]:
    """Return the mean, over images, of their latents' directions, for each MLP.

    The product of two such means is the mean cosine over all pairs of an image of one kind and one of the other.

    Args:
        model: A model that can be merged, or a merged one.
        images: (N, C, H, W) uint8.
        precision: "fp32" or "bf16".

    Returns:
        (D,) float64 by name of the MLP or layer, first layer first.
    """
    sums: dict[str, Tensor] = {}
    model.eval()
    for batch in images.split(BATCH):
        with mlp_inputs(model) as found:
            forward(model, batch, precision=precision)
        for name, tokens in found.items():
            directions = normalize(tokens.double().mean(1), dim=1).sum(0)
            sums[name] = sums[name] + directions if name in sums else directions
    return {name: each / len(images) for name, each in sums.items()}


def find_input(run: Run, role: str) -> Run:
    """Find the run that a run was made from in a role, such as "expert/1", in a folder beside its own.

    Raises:
        RecordError: It is not there, or is not as it was when the run was made.
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
    """The mixture that a defended one was made from; the run itself if it is not defended."""
    while run.spec.defenses:
        run = find_input(run, PARENT)
    return run
