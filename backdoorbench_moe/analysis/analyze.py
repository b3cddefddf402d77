"""Everything `bbmoe analyze` finds of a run, put together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backdoorbench_moe.analysis import (
    capture,
    carriers,
    comparison,
    examples,
    passes,
    pixels,
    probing,
    routing,
    shift,
)
from backdoorbench_moe.analysis.subject import Subject, open_beside, open_subject
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.triggered import Triggered, triggered_test
from backdoorbench_moe.errors import BbmoeError, ConfigError
from backdoorbench_moe.moe.structure import WithExperts
from backdoorbench_moe.ops.routing import changed_patches, patch_sums

DEFAULT_CARRIERS_IMAGES = 2000
# Of a run's record: scores, which may be one an image, are left out.
RECORD_PARTS = (
    *("spec", "data", "parts", "poison", "history", "stages", "timing", "seeds", "environment"),
    *("parent", "clean_twin"),
)


@dataclass(frozen=True)
class RunFacts:
    """Which run was looked at. metrics: as its record holds them, in percent. model: the model's name.

    record: what else a report says of it, as its record holds it: see RECORD_PARTS.
    """

    name: str
    digest: str
    model: str
    data: str
    data_digest: str
    metrics: dict[str, dict[str, float]]
    record: dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What is found of one model's routing, layer by layer; None where `Analysis.absent` says why."""

    routing: tuple[routing.LayerRouting, ...] | None = None
    capture: tuple[capture.LayerCapture, ...] | None = None
    shift: tuple[shift.LayerShift, ...] | None = None


@dataclass(frozen=True)
class Absent:
    """A part of the analysis that is not there, and why."""

    part: str
    reason: str


@dataclass(frozen=True)
class Counts:
    """Numbers of images: clean test images, and those of them that ASR counts (0 without a trigger)."""

    test: int
    triggered: int


@dataclass(frozen=True)
class Analysis:
    """All that is found of a run, and of the one it is compared with.

    trigger_from: folder name of the run whose trigger was stamped: the run's own, or, where the run is clean,
    that of the one it is compared with. seconds: what each part took, and "total".
    """

    run: RunFacts
    against: RunFacts | None
    trigger_from: str | None
    classes: tuple[str, ...]
    images: Counts
    examples: examples.Examples
    findings: Findings
    pixels: tuple[pixels.LayerPixels, ...] | None
    carriers: carriers.Carriers | None
    findings_against: Findings | None
    comparison: comparison.Comparison | None
    probe: probing.Probing | None
    absent: tuple[Absent, ...]
    seconds: dict[str, float]


def analyze_run(
    run: Run,
    *,
    against: Run | None = None,
    images: Sequence[int | str | Path] | None = None,
    carriers_images: int = DEFAULT_CARRIERS_IMAGES,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Analysis:
    """Look at the model of a finished run; nothing is written.

    against: another finished run on the same data; the clean twin, if it lies beside the run, where None.
    images: numbers of test images, and image files, to draw patch maps of; one of each of several classes where
    None. carriers_images: at most so many images to measure muted and patched experts on, for BA and for ASR.
    Raises BbmoeError for anything the user can mend.
    """
    if carriers_images < 1:
        raise ConfigError.expected("carriers_images", "at least 1", carriers_images)
    subject = open_subject(run, data_root=data_root, device=device)
    picked = None if images is None else examples.pick_images(images, subject.images)
    return _Analyzer(subject, against, carriers_images, observer or Observer()).analyze(picked)


class _Analyzer:
    """One analysis under way."""

    def __init__(self, subject: Subject, against: Run | None, limit: int, observer: Observer) -> None:
        self.subject, self.limit, self.observer = subject, limit, observer
        self.absent: list[Absent] = []
        self.seconds: dict[str, float] = {}
        self.other = self._other(against)
        source = next((s for s in (subject, self.other) if s is not None and s.stamper is not None), None)
        self.source, self.stamper = source, source.stamper if source else None
        self.triggered = self._triggered()

    def analyze(self, picked: examples.Picked | None) -> Analysis:
        started = time.perf_counter()
        subject, other = self.subject, self.other
        findings, against, light, compared = Findings(), None, None, None
        if subject.routed is None:
            for part in ("routing", "capture", "shift", "pixels", "carriers", "comparison", "probe"):
                self._miss(part, f"the model {subject.run.spec.model.name!r} is dense: it routes nothing")
        else:
            first = self._pass(subject)
            findings, light = self._findings(subject, first), self._pixels(first.clean)
            if other is not None:
                second = self._pass(other)
                against, compared = self._findings(other, second), _compare(first, second)
            for part in ("capture", "shift"):
                if self.triggered is None:
                    self._miss(
                        part, "there is no trigger: the run is clean, and so is what it is compared with"
                    )
        with self._timed("examples"):
            shown = self._examples(picked)
        found = self._carriers() if subject.routed is not None else None
        seen = self._probe() if subject.routed is not None else None
        self.seconds["total"] = time.perf_counter() - started
        return Analysis(
            run=_facts(subject.run),
            against=None if other is None else _facts(other.run),
            trigger_from=None if self.source is None else self.source.name,
            classes=subject.images.classes,
            images=Counts(len(subject.images.test), len(self.triggered or ())),
            examples=shown,
            findings=findings,
            pixels=light,
            carriers=found,
            findings_against=against,
            comparison=compared,
            probe=seen,
            absent=tuple(self.absent),
            seconds=self.seconds,
        )

    def _miss(self, part: str, reason: str) -> None:
        self.absent.append(Absent(part, reason))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.observer.on_message(f"analyzing {self.subject.name}: {name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _other(self, against: Run | None) -> Subject | None:
        """What to compare with: what was asked for, or the clean twin, if it can be."""
        if against is not None:
            other = open_beside(against, self.subject)
            comparison.check_comparable(self.subject, other)
            return other
        if (place := twin_folder(self.subject.run)) is None:
            self._miss("against", "no other run was named, and there is no clean twin")
            return None
        try:
            other = open_beside(load_run(place), self.subject)
            comparison.check_comparable(self.subject, other)
        except BbmoeError as error:
            self._miss("against", f"the clean twin cannot be used: {error}")
            return None
        return other

    def _triggered(self) -> Triggered | None:
        if self.source is None or self.stamper is None:
            return None
        return triggered_test(self.subject.images, self.source.run.attack(), self.stamper)

    def _pass(self, subject: Subject) -> passes.PairedPass:
        assert subject.routed is not None
        with self._timed("routing" if subject is self.subject else "routing against"):
            return passes.run_pass(subject, subject.routed, self.triggered)

    def _findings(self, subject: Subject, found: passes.PairedPass) -> Findings:
        model, images, triggered = subject.routed, subject.images, self.triggered
        assert model is not None
        with self._timed("statistics" if subject is self.subject else "statistics against"):
            labels = images.test.labels.cpu()
            spread = tuple(
                routing.layer_routing(layer, labels, images.num_classes, model.patch_grid)
                for layer in found.clean.layers
            )
            if triggered is None or found.triggered is None or found.divergence is None:
                return Findings(spread)
            before = images.test.images[triggered.places]
            changed = changed_patches(before, triggered.images, model.patch_size).cpu()
            success = found.triggered.predicted == triggered.wanted.cpu()
            caught = tuple(capture.layer_capture(layer, changed, success) for layer in found.triggered.layers)
            layers = zip(found.clean.layers, found.triggered.layers, found.divergence, strict=True)
            places = triggered.places.cpu()
            shifts = tuple(shift.layer_shift(a, b, places, divergence) for a, b, divergence in layers)
        return Findings(spread, caught, shifts)

    def _pixels(self, clean: passes.RoutedPass) -> tuple[pixels.LayerPixels, ...]:
        images, model = self.subject.images, self.subject.routed
        assert model is not None
        with self._timed("pixels"):
            sums = patch_sums(images.test.images, model.patch_size).cpu()
            labels, classes = images.test.labels.cpu(), images.num_classes
            return tuple(
                pixels.layer_pixels(layer, sums, labels, classes, model.patch_size) for layer in clean.layers
            )

    def _examples(self, picked: examples.Picked | None) -> examples.Examples:
        subject = self.subject
        if picked is None:
            counted = None if self.triggered is None else self.triggered.places.cpu()
            labels = subject.images.test.labels.cpu()
            chosen = examples.choose_examples(labels, counted, subject.run.spec.seed)
            picked = examples.pick_images(chosen, subject.images)
        subjects = [subject] if self.other is None else [subject, self.other]
        return examples.make_examples(subjects, picked, self.stamper)

    def _probe(self) -> probing.Probing | None:
        assert self.subject.routed is not None
        if self.subject.run.spec.defenses:
            self._miss(
                "probe",
                "the run is a defended one; routing over training is kept in the attacked run's folder",
            )
            return None
        seen = probing.probe_findings(self.subject, self.subject.routed)
        if seen is None:
            self._miss("probe", "the run was made without --probe, so routing over training was not kept")
        return seen

    def _carriers(self) -> carriers.Carriers | None:
        if not isinstance(self.subject.model, WithExperts):
            name = self.subject.run.spec.model.name
            self._miss("carriers", f"the model {name!r} does not say where its experts lie")
            return None
        with self._timed("carriers"):
            found = carriers.find_carriers(self.subject, self.triggered, self.limit)
        if not found.pairs and len(found.singles) > 1:
            self._miss("carriers.pairs", f"there are more than {carriers.MAX_PAIRS} pairs of experts")
        if not found.patched:
            self._miss("carriers.patched", "there is no trigger")
        return found


def twin_folder(run: Run) -> Path | None:
    """Where the clean twin of a run lies beside it; None where it has none, or it is not there."""
    name = run.record.clean_twin
    if not name or Path(name).name != name:
        return None
    place = run.folder.path.parent / name
    return place if place.is_dir() else None


def _compare(first: passes.PairedPass, second: passes.PairedPass) -> comparison.Comparison:
    stamped = None
    if first.triggered is not None and second.triggered is not None:
        stamped = comparison.compare_layers(first.triggered.layers, second.triggered.layers)
    return comparison.Comparison(comparison.compare_layers(first.clean.layers, second.clean.layers), stamped)


def _facts(run: Run) -> RunFacts:
    record, spec = run.record, run.spec
    metrics: dict[str, dict[str, Any]] = record.metrics
    data, known = record.data, {name: getattr(record, name) for name in RECORD_PARTS}
    # A report is handed on: where the data lie is nobody else's business.
    dataset = {key: value for key, value in record.spec["dataset"].items() if key != "root"}
    known["spec"] = {**record.spec, "dataset": dataset}
    return RunFacts(
        run.folder.path.name, record.digest, spec.model.name, data["name"], data["digest"], metrics, known
    )
