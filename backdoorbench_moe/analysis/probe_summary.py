"""Routing over training: statistics of the routing that a run's probe recorded after every epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from backdoorbench_moe.analysis.examples import PICTURES
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.build import build_gate
from backdoorbench_moe.engine.makers.probe import ProbeRecord, RoutingHistory, load_probe_record
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.routing import changed_patches, changed_share, jaccard

# Largest number of points in time at which patch maps are kept.
SHOWN = 9


@dataclass(frozen=True)
class LayerProbeSummary:
    """Routing in one layer at T points in time. All values lie in [0, 1].

    Attributes:
        layer: Name of the layer.
        settled: (T, E) Jaccard index of the patches that an expert takes and those that it takes at the last point in
            time, mean over the probe images.
        settled_triggered: The same for the triggered images; None without a trigger.
        changed: (T,) share of the selected patches that the trigger changes, mean over experts and images; None
            without a trigger.
        captured: (T,) share of images in which at least one expert takes a patch that the trigger changed; None
            without a trigger.
        maps: (S, E, rows, columns) bool, patches of the first probe image that an expert takes, at the S shown points
            in time.
        maps_triggered: The same for its triggered version; None without a trigger.
    """

    layer: str
    settled: Tensor
    settled_triggered: Tensor | None
    changed: Tensor | None
    captured: Tensor | None
    maps: Tensor
    maps_triggered: Tensor | None


@dataclass(frozen=True)
class ProbeSummary:
    """Predictions and routing of a run's N probe images at T points in time.

    Attributes:
        indices: (N,) int64, indices of the probe images in the test split.
        labels: Their class names.
        epochs: The T points in time: 0 is before training, n after epoch n.
        shown: The S points in time at which patch maps are kept.
        right: (T,) in [0, 1], share of the clean images that are classified correctly.
        fooled: (T,) in [0, 1], share of the triggered images that are predicted as the target class; None without an
            attack that uses a trigger.
        layers: The routed layers.
        clean: (1, 3, S, S) uint8, the first probe image.
        triggered: Its triggered version; None without a trigger.
    """

    indices: Tensor
    labels: tuple[str, ...]
    epochs: tuple[int, ...]
    shown: tuple[int, ...]
    right: Tensor
    fooled: Tensor | None
    layers: tuple[LayerProbeSummary, ...]
    clean: Tensor = field(metadata=PICTURES)
    triggered: Tensor | None = field(metadata=PICTURES)


def summarize_probe(opened: OpenedRun, model: RoutedModel) -> ProbeSummary | None:
    """Summarize the probe of a run.

    Args:
        opened: The run.
        model: Its model.

    Returns:
        The summary; None for a run without a probe.

    Raises:
        RecordError: The probe file is damaged or does not belong to the run.
    """
    if (record := load_probe_record(opened.run.folder)) is None:
        return None
    _check(record, opened, model)
    test = opened.images.test
    indices = record.indices.to(test.images.device)
    clean, true = test.images[indices], test.labels[indices].cpu()
    steps = len(record.clean.predicted)
    shown = sorted({round(n * (steps - 1) / (SHOWN - 1)) for n in range(SHOWN)})
    triggered, changed, fooled = None, None, None
    if record.triggered is not None and opened.stamper is not None:
        triggered = stamp_images(clean, opened.stamper)
        changed = changed_patches(clean, triggered, model.patch_size).cpu()
        # In a mixture without an attack, the trigger marks the images that the policy rejects.
        if opened.run.spec.attacked:
            wanted = opened.run.attack().wanted(true, opened.images.data_classes)
            fooled = (record.triggered.predicted == wanted).double().mean(1)
    return ProbeSummary(
        indices=record.indices,
        labels=tuple(opened.images.classes[label] for label in true.tolist()),
        epochs=tuple(range(steps)),
        shown=tuple(shown),
        right=(record.clean.predicted == true).double().mean(1),
        fooled=fooled,
        layers=tuple(
            _summarize_layer(record, number, changed, model.patch_grid, shown)
            for number in range(len(record.layers))
        ),
        clean=clean[:1].cpu(),
        triggered=None if triggered is None else triggered[:1].cpu(),
    )


def _summarize_layer(
    record: ProbeRecord, number: int, changed: Tensor | None, grid: tuple[int, int], shown: list[int]
) -> LayerProbeSummary:
    before = record.clean.selected[number]
    after = None if record.triggered is None or changed is None else record.triggered.selected[number]
    moved, captured = None, None
    if after is not None and changed is not None:
        moved = torch.stack([changed_share(a, b).mean() for a, b in zip(before, after, strict=True)])
        captured = (after & changed.unsqueeze(1)).any(-1).any(-1).double().mean(1)
    return LayerProbeSummary(
        layer=record.layers[number],
        settled=_overlap_with_last(before),
        settled_triggered=None if after is None else _overlap_with_last(after),
        changed=moved,
        captured=captured,
        maps=before[shown, 0].unflatten(-1, grid),
        maps_triggered=None if after is None else after[shown, 0].unflatten(-1, grid),
    )


def _overlap_with_last(selected: Tensor) -> Tensor:
    """Return the Jaccard index (T, E) of each selection in (T, N, E, P) bool and the last one, mean over the images."""
    last = selected[-1]
    return torch.stack([jaccard(one, last).diagonal(dim1=1, dim2=2).mean(0) for one in selected])


def _steps(spec: RunSpec) -> int:
    """Return the number of points in time that a probe records. In a mixture only the gates are trained, or set."""
    if spec.gate is None or spec.mixture is None:
        return spec.train.epochs + 1
    return spec.mixture.gate_train.epochs + 1 if build_gate(spec).trained else 2


def _check(record: ProbeRecord, opened: OpenedRun, model: RoutedModel) -> None:
    """Raise RecordError unless a probe record has the run's images, epochs and patches."""
    spec, count = opened.run.spec, len(opened.images.test)
    patches = model.patch_grid[0] * model.patch_grid[1]
    histories: list[RoutingHistory] = [record.clean]
    if record.triggered is not None:
        histories.append(record.triggered)
    fits = (
        len(record.indices) == spec.probe
        and bool(((record.indices >= 0) & (record.indices < count)).all())
        and len(record.clean.predicted) == _steps(spec)
        and all(layer.shape[-1] == patches for history in histories for layer in history.selected)
        and (record.triggered is None) == (spec.trigger is None)
    )
    if not fits:
        raise RecordError(f"probe of run folder {opened.run.folder.path}: does not fit the run")
