"""The probe: predictions and routing of a fixed set of test images, before training and after every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.temporary import evaluation_mode
from backdoorbench_moe.ops.seeding import generator, seeded
from backdoorbench_moe.records import RunFolder


@dataclass(frozen=True)
class RoutingHistory:
    """Predictions and routing of N images at T points in time: before training, after epoch 1, 2, ...

    Attributes:
        predicted: (T, N) int64, predicted classes.
        selected: One (T, N, E, P) bool tensor per routed layer: whether an expert processes a patch.
    """

    predicted: Tensor
    selected: tuple[Tensor, ...]

    def truncate(self, steps: int) -> RoutingHistory:
        """Return the first `steps` points in time."""
        return RoutingHistory(self.predicted[:steps], tuple(layer[:steps] for layer in self.selected))

    def extend(self, other: RoutingHistory) -> RoutingHistory:
        """Return this history followed by another one of the same images."""
        layers = zip(self.selected, other.selected, strict=True)
        return RoutingHistory(
            torch.cat([self.predicted, other.predicted]), tuple(torch.cat(pair) for pair in layers)
        )


@dataclass(frozen=True)
class ProbeRecord:
    """Contents of a run's probe file.

    Attributes:
        indices: (N,) int64, indices of the probe images in the test split, ascending.
        layers: Names of the routed layers.
        clean: History of the clean images.
        triggered: History of the same images with the trigger; None for a run without a trigger.
    """

    indices: Tensor
    layers: tuple[str, ...]
    clean: RoutingHistory
    triggered: RoutingHistory | None


def check_probe(spec: RunSpec, setup: Setup) -> None:
    """Check that the probe of a spec is possible.

    Raises:
        ConfigError: The spec has a probe, but its model is not routed or there are too few images.
    """
    if not spec.probe:
        return
    if not isinstance(setup.model, RoutedModel):
        raise ConfigError.expected("probe", f"0, as the model {spec.model.name!r} is not routed", spec.probe)
    if spec.probe > (available := len(_candidates(setup))):
        what = "test images that count for ASR" if spec.attacked else "test images"
        raise ConfigError.expected("probe", f"at most the {available} {what}", spec.probe)


def _candidates(setup: Setup) -> Tensor:
    """Return the indices of the test images that may be drawn for the probe."""
    images = setup.images
    if setup.attack is None:
        return torch.arange(len(images.test))
    return setup.attack.counted(images.test.labels, images.data_classes).nonzero().squeeze(1).cpu()


class Probe:
    """Records predictions and routing of a run's probe images, and writes the probe file after every recording.

    The images are drawn with the run's seed from the test images that count for ASR, or from all test images for
    a clean run. Recording changes neither the model nor the state of any random number generator.

    Args:
        setup: The parts of the run.
        precision: "fp32" or "bf16".
        folder: The run folder that the probe file is written to.

    Attributes:
        indices: (N,) int64, indices of the probe images in the test split, ascending.
        record: Everything recorded so far; None before the first recording.
    """

    def __init__(self, setup: Setup, precision: str, folder: RunFolder) -> None:
        candidates, spec, images = _candidates(setup), setup.spec, setup.images
        order = torch.randperm(len(candidates), generator=generator(spec.seed, "probe"))
        self.indices = candidates[order[: spec.probe]].sort().values
        self.clean = images.test.images[self.indices.to(images.test.images.device)]
        self.triggered = None if setup.stamper is None else stamp_images(self.clean, setup.stamper)
        self.precision, self.folder, self.seed = precision, folder, spec.seed
        self.record: ProbeRecord | None = None

    def begin(self, model: nn.Module, epoch: int) -> None:
        """Record the untrained model, or load the recordings up to a checkpoint.

        Args:
            model: The model.
            epoch: Number of finished epochs in the checkpoint; 0 to start from the beginning.

        Raises:
            RecordError: The probe file does not belong to the checkpoint.
        """
        if not epoch:
            self.look(model)
            return
        found = load_probe_record(self.folder)
        if found is None or not found.indices.equal(self.indices) or len(found.clean.predicted) <= epoch:
            raise RecordError(
                f"run folder {self.folder.path}: its probe does not match its checkpoint; delete the checkpoint "
                "to train from the start"
            )
        # The probe file is written before the checkpoint. If the process was killed in between, it is one epoch ahead.
        triggered = None if found.triggered is None else found.triggered.truncate(epoch + 1)
        self.record = ProbeRecord(found.indices, found.layers, found.clean.truncate(epoch + 1), triggered)

    def look(self, model: nn.Module) -> None:
        """Record the current state of the model and write the probe file."""
        assert isinstance(model, RoutedModel)
        # A model from a plug-in may draw noise in evaluation mode, too.
        noise = seeded(self.seed, "probe noise")
        with evaluation_mode(model), reproducible(self.clean.device), noise:
            layers, clean = self._observe(model, self.clean)
            triggered = None if self.triggered is None else self._observe(model, self.triggered)[1]
        if (earlier := self.record) is not None:
            clean = earlier.clean.extend(clean)
            if triggered is not None:
                triggered = None if earlier.triggered is None else earlier.triggered.extend(triggered)
        self.record = ProbeRecord(self.indices, layers, clean, triggered)
        self.folder.save_probe(_to_arrays(self.record))

    @torch.inference_mode()
    def _observe(self, model: RoutedModel, images: Tensor) -> tuple[tuple[str, ...], RoutingHistory]:
        """Return the names of the routed layers and a history with one point in time."""
        output = forward_routed(model, images, precision=self.precision)
        predicted = output.logits.argmax(1).cpu().unsqueeze(0)
        selected = tuple(layer.selected.cpu().unsqueeze(0) for layer in output.routing)
        return tuple(layer.layer for layer in output.routing), RoutingHistory(predicted, selected)


def _to_arrays(record: ProbeRecord) -> dict[str, np.ndarray]:
    arrays = {"indices": record.indices.numpy(), "layers": np.array(record.layers)}
    for kind in ("clean", "triggered"):
        if (history := getattr(record, kind)) is not None:
            arrays[f"{kind}_predicted"] = history.predicted.numpy()
            arrays |= {f"{kind}_{number}": layer.numpy() for number, layer in enumerate(history.selected)}
    return arrays


def load_probe_record(folder: RunFolder) -> ProbeRecord | None:
    """Read the probe file of a run folder.

    Returns:
        The contents; None for a run without a probe.

    Raises:
        RecordError: The file is damaged.
    """
    if (arrays := folder.load_probe()) is None:
        return None
    try:
        layers = tuple(map(str, arrays["layers"]))
        clean = _read_history(arrays, "clean", len(layers))
        triggered = (
            _read_history(arrays, "triggered", len(layers)) if "triggered_predicted" in arrays else None
        )
        record = ProbeRecord(torch.from_numpy(arrays["indices"]), layers, clean, triggered)
        _check_shapes(record)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"probe of run folder {folder.path}: damaged ({error})") from error
    return record


def _read_history(arrays: dict[str, np.ndarray], kind: str, layers: int) -> RoutingHistory:
    predicted = torch.from_numpy(arrays[f"{kind}_predicted"])
    selected = tuple(torch.from_numpy(arrays[f"{kind}_{number}"]) for number in range(layers))
    return RoutingHistory(predicted, selected)


def _check_shapes(record: ProbeRecord) -> None:
    """Raise ValueError unless all arrays have the same images and points in time, and the right type."""
    expected = (len(record.clean.predicted), len(record.indices))
    for history in (record.clean, record.triggered):
        for array in () if history is None else (history.predicted, *history.selected):
            if array.shape[:2] != expected or (array.ndim == 4) != (array.dtype == torch.bool):
                raise ValueError(
                    f"expected {expected[0]} points in time of {expected[1]} images, got {tuple(array.shape)}"
                )
