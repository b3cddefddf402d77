"""Over training: what a probe kept of the routing after every epoch, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from backdoorbench_moe.analysis.examples import PICTURES
from backdoorbench_moe.analysis.subject import Subject
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.engine.probe import Seen, View, load_seen
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.routing import changed_patches, changed_share, jaccard

# Of one image the choices themselves are given, at so many moments.
SHOWN = 9


@dataclass(frozen=True)
class LayerProbe:
    """One routed layer at T moments, means over the N probe images.

    settled, settled_triggered: (T, E) Jaccard index of an expert's choice with its choice at the last moment.
    changed: (T,) share of the selected patches that the trigger changes, mean over the experts. captured: (T,)
    share of images in which at least one expert receives a patch that the trigger changed. maps, maps_triggered:
    (S, E, rows, columns) bool, choices of the first probe image at the S moments shown. All in [0, 1]; None
    without a trigger.
    """

    layer: str
    settled: Tensor
    settled_triggered: Tensor | None
    changed: Tensor | None
    captured: Tensor | None
    maps: Tensor
    maps_triggered: Tensor | None


@dataclass(frozen=True)
class Probing:
    """The probe images of a run: N places in the test split, their class names, and what was seen of them.

    epochs: T numbers, 0 for before training. shown: S of them, those of the maps. right, fooled: (T,) share in
    [0, 1] of the N that are called what they are, and, triggered, what the attacker wants; None without a trigger.
    clean, triggered: (1, 3, S, S) uint8, the first probe image.
    """

    indices: Tensor
    labels: tuple[str, ...]
    epochs: tuple[int, ...]
    shown: tuple[int, ...]
    right: Tensor
    fooled: Tensor | None
    layers: tuple[LayerProbe, ...]
    clean: Tensor = field(metadata=PICTURES)
    triggered: Tensor | None = field(metadata=PICTURES)


def probe_findings(subject: Subject, model: RoutedModel) -> Probing | None:
    """What the probe of a run saw; None where it has none. Raises RecordError if its file does not fit the run."""
    if (seen := load_seen(subject.run.folder)) is None:
        return None
    _check(seen, subject, model)
    images = subject.images.test
    indices = seen.indices.to(images.images.device)
    clean, true = images.images[indices], images.labels[indices].cpu()
    moments = len(seen.clean.predicted)
    shown = sorted({round(n * (moments - 1) / (SHOWN - 1)) for n in range(SHOWN)})
    triggered, changed, fooled = None, None, None
    if seen.triggered is not None and subject.stamper is not None:
        triggered = stamp_images(clean, subject.stamper)
        changed = changed_patches(clean, triggered, model.patch_size).cpu()
        wanted = subject.run.attack().wanted(true, subject.images.num_classes)
        fooled = (seen.triggered.predicted == wanted).double().mean(1)
    return Probing(
        indices=seen.indices,
        labels=tuple(subject.images.classes[label] for label in true.tolist()),
        epochs=tuple(range(moments)),
        shown=tuple(shown),
        right=(seen.clean.predicted == true).double().mean(1),
        fooled=fooled,
        layers=tuple(
            _layer(seen, place, changed, model.patch_grid, shown) for place in range(len(seen.layers))
        ),
        clean=clean[:1].cpu(),
        triggered=None if triggered is None else triggered[:1].cpu(),
    )


def _layer(
    seen: Seen, place: int, changed: Tensor | None, grid: tuple[int, int], shown: list[int]
) -> LayerProbe:
    before = seen.clean.selected[place]
    after = None if seen.triggered is None or changed is None else seen.triggered.selected[place]
    moved, captured = None, None
    if after is not None and changed is not None:
        moved = torch.stack([changed_share(a, b).mean() for a, b in zip(before, after, strict=True)])
        captured = (after & changed.unsqueeze(1)).any(-1).any(-1).double().mean(1)
    return LayerProbe(
        layer=seen.layers[place],
        settled=_settled(before),
        settled_triggered=None if after is None else _settled(after),
        changed=moved,
        captured=captured,
        maps=before[shown, 0].unflatten(-1, grid),
        maps_triggered=None if after is None else after[shown, 0].unflatten(-1, grid),
    )


def _settled(selected: Tensor) -> Tensor:
    """Mean Jaccard index over N images of each choice (T, N, E, P) with the last one: (T, E)."""
    last = selected[-1]
    return torch.stack([jaccard(one, last).diagonal(dim1=1, dim2=2).mean(0) for one in selected])


def _check(seen: Seen, subject: Subject, model: RoutedModel) -> None:
    """Raise RecordError unless a probe is of this run's images, epochs and patches."""
    spec, count, patches = (
        subject.run.spec,
        len(subject.images.test),
        model.patch_grid[0] * model.patch_grid[1],
    )
    views: list[View] = [seen.clean, *([] if seen.triggered is None else [seen.triggered])]
    good = (
        len(seen.indices) == spec.probe
        and bool(((seen.indices >= 0) & (seen.indices < count)).all())
        and len(seen.clean.predicted) == spec.train.epochs + 1
        and all(one.shape[-1] == patches for view in views for one in view.selected)
        and (seen.triggered is None) == (spec.trigger is None)
    )
    if not good:
        raise RecordError(f"probe of run folder {subject.run.folder.path}: does not fit the run")
