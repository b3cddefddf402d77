"""A probe: what a model does with some fixed test images before training and after every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.engine.setup import Setup
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.seeding import generator, seeded
from backdoorbench_moe.records import RunFolder


@dataclass(frozen=True)
class View:
    """Of N images at T moments (before training, after epoch 1, 2, ...), layer by layer.

    predicted: (T, N) int64. selected: for each routed layer (T, N, E, P) bool.
    """

    predicted: Tensor
    selected: tuple[Tensor, ...]

    def first(self, moments: int) -> View:
        """The first moments only."""
        return View(self.predicted[:moments], tuple(one[:moments] for one in self.selected))

    def then(self, other: View) -> View:
        """This view, and another after it."""
        pairs = zip(self.selected, other.selected, strict=True)
        return View(torch.cat([self.predicted, other.predicted]), tuple(torch.cat([a, b]) for a, b in pairs))


@dataclass(frozen=True)
class Seen:
    """What a run's folder holds of its probe. indices: (N,) int64, places in the test split, ascending.

    layers: names of the routed layers. triggered: None of a clean run.
    """

    indices: Tensor
    layers: tuple[str, ...]
    clean: View
    triggered: View | None


def check_probe(spec: RunSpec, setup: Setup) -> None:
    """Raise ConfigError unless a spec's probe can be taken: it needs a routed model, and enough images."""
    if not spec.probe:
        return
    if not isinstance(setup.model, RoutedModel):
        raise ConfigError.expected("probe", f"0, as the model {spec.model.name!r} routes nothing", spec.probe)
    if spec.probe > (most := len(_candidates(setup))):
        what = "test images that count for ASR" if spec.attacked else "test images"
        raise ConfigError.expected("probe", f"at most the {most} {what}", spec.probe)


def _candidates(setup: Setup) -> Tensor:
    images = setup.images
    if setup.attack is None:
        return torch.arange(len(images.test))
    return setup.attack.counted(images.test.labels, images.num_classes).nonzero().squeeze(1).cpu()


class Probe:
    """The fixed images of a run, and what was seen of them so far; written after every look.

    The images are drawn by the run's seed from those that count for ASR, of a clean run from all test images.
    Looking changes neither the model nor any generator of random numbers.
    """

    def __init__(self, setup: Setup, precision: str, folder: RunFolder) -> None:
        places, spec, images = _candidates(setup), setup.spec, setup.images
        order = torch.randperm(len(places), generator=generator(spec.seed, "probe"))
        self.indices = places[order[: spec.probe]].sort().values
        self.clean = images.test.images[self.indices.to(images.test.images.device)]
        self.triggered = None if setup.stamper is None else stamp_images(self.clean, setup.stamper)
        self.precision, self.folder, self.seed = precision, folder, spec.seed
        self.seen: Seen | None = None

    def begin(self, model: nn.Module, epoch: int) -> None:
        """Look at an untrained model, or go on where a checkpoint after `epoch` epochs was written.

        Raises RecordError where the file does not reach so far.
        """
        if not epoch:
            self.look(model)
            return
        found = load_seen(self.folder)
        if found is None or not found.indices.equal(self.indices) or len(found.clean.predicted) <= epoch:
            raise RecordError(
                f"run folder {self.folder.path}: its probe does not fit its checkpoint; delete the checkpoint "
                "to train from the start"
            )
        # A process that was killed between the two files had looked once more.
        later = None if found.triggered is None else found.triggered.first(epoch + 1)
        self.seen = Seen(found.indices, found.layers, found.clean.first(epoch + 1), later)

    def look(self, model: nn.Module) -> None:
        """Add what the model does now, and write it all."""
        assert isinstance(model, RoutedModel)
        before = model.training
        model.eval()
        # A model of somebody else may draw noise even now.
        with reproducible(self.clean.device), seeded(self.seed, "probe noise"):
            layers, clean = self._view(model, self.clean)
            triggered = None if self.triggered is None else self._view(model, self.triggered)[1]
        model.train(before)
        if (seen := self.seen) is not None:
            clean = seen.clean.then(clean)
            triggered = (
                None if triggered is None or seen.triggered is None else seen.triggered.then(triggered)
            )
        self.seen = Seen(self.indices, layers, clean, triggered)
        self.folder.save_probe(_arrays(self.seen))

    @torch.inference_mode()
    def _view(self, model: RoutedModel, images: Tensor) -> tuple[tuple[str, ...], View]:
        output = forward_routed(model, images, precision=self.precision)
        predicted = output.logits.argmax(1).cpu().unsqueeze(0)
        selected = tuple(one.selected.cpu().unsqueeze(0) for one in output.routing)
        return tuple(one.layer for one in output.routing), View(predicted, selected)


def _arrays(seen: Seen) -> dict[str, np.ndarray]:
    arrays = {"indices": seen.indices.numpy(), "layers": np.array(seen.layers)}
    for kind in ("clean", "triggered"):
        if (view := getattr(seen, kind)) is not None:
            arrays[f"{kind}_predicted"] = view.predicted.numpy()
            arrays |= {f"{kind}_{place}": one.numpy() for place, one in enumerate(view.selected)}
    return arrays


def load_seen(folder: RunFolder) -> Seen | None:
    """What a run's probe saw; None where it had none. Raises RecordError if the file is damaged."""
    if (arrays := folder.load_probe()) is None:
        return None
    try:
        layers = tuple(map(str, arrays["layers"]))
        clean = _read_view(arrays, "clean", len(layers))
        triggered = _read_view(arrays, "triggered", len(layers)) if "triggered_predicted" in arrays else None
        seen = Seen(torch.from_numpy(arrays["indices"]), layers, clean, triggered)
        _check_shapes(seen)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"probe of run folder {folder.path}: damaged ({error})") from error
    return seen


def _read_view(arrays: dict[str, np.ndarray], kind: str, layers: int) -> View:
    predicted = torch.from_numpy(arrays[f"{kind}_predicted"])
    return View(predicted, tuple(torch.from_numpy(arrays[f"{kind}_{place}"]) for place in range(layers)))


def _check_shapes(seen: Seen) -> None:
    """Raise ValueError unless all arrays are of the same images and moments."""
    wanted = (len(seen.clean.predicted), len(seen.indices))
    for view in (seen.clean, seen.triggered):
        for one in () if view is None else (view.predicted, *view.selected):
            if one.shape[:2] != wanted or (one.ndim == 4) != (one.dtype == torch.bool):
                raise ValueError(
                    f"expected {wanted[0]} moments of {wanted[1]} images, got {tuple(one.shape)}"
                )
