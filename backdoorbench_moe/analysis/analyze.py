"""The analysis of a run, as made by `bbmoe analyze`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backdoorbench_moe.analysis import (
    capture,
    carriers,
    comparison,
    examples,
    passes,
    pixels,
    probe_summary,
    routing,
    shift,
)
from backdoorbench_moe.analysis.facts import RunFacts, run_facts
from backdoorbench_moe.analysis.opened_run import OpenedRun, open_beside, open_run
from backdoorbench_moe.engine.consistency import check_same
from backdoorbench_moe.engine.evaluate import measure, share
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.triggered import Triggered, triggered_test
from backdoorbench_moe.errors import BbmoeError, ConfigError
from backdoorbench_moe.moe.structure import WithExperts
from backdoorbench_moe.ops.routing import changed_patches, patch_sums

DEFAULT_CARRIERS_IMAGES = 2000


@dataclass(frozen=True)
class Findings:
    """Routing of one model, layer by layer.

    A part that could not be computed is None; `Analysis.absent` gives the reason.

    Attributes:
        routing: Routing of the clean test images.
        capture: Trigger capture, over the triggered images that count for ASR.
        shift: Routing shift between these images and their clean versions.
    """

    routing: tuple[routing.LayerRouting, ...] | None = None
    capture: tuple[capture.LayerCapture, ...] | None = None
    shift: tuple[shift.LayerShift, ...] | None = None


@dataclass(frozen=True)
class MissingPart:
    """A part of the analysis that could not be computed.

    Attributes:
        part: Name of the part, such as "capture".
        reason: Why it is missing.
    """

    part: str
    reason: str


@dataclass(frozen=True)
class ImageCounts:
    """Numbers of images.

    Attributes:
        test: Number of clean test images.
        triggered: Number of those that count for ASR; 0 without a trigger.
    """

    test: int
    triggered: int


@dataclass(frozen=True)
class AnalysisOptions:
    """Options of an analysis that change its results.

    Attributes:
        images: The example images as given: an index in the test split, or the name of a file without its folder;
            None if they were drawn.
        carriers_images: Largest number of images on which muted and patched experts were measured.
    """

    images: tuple[int | str, ...] | None
    carriers_images: int


@dataclass(frozen=True)
class Analysis:
    """The analysis of a run and of the run that it is compared with.

    Attributes:
        run: The run.
        against: The run that it is compared with; None if there is none.
        options: Options that change the results.
        trigger_from: Name of the run folder whose trigger is used: the run's own or, if the run has no trigger,
            that of the run it is compared with. None without a trigger.
        classes: Class names.
        images: Numbers of images.
        examples: Patch maps of example images.
        findings: Routing of the run's model.
        pixels: Brightness of the patches that each expert takes, layer by layer.
        carriers: BA and ASR with experts muted and patched.
        findings_against: Routing of the other model.
        comparison: Overlap of the two models' selections.
        probe: Routing over training.
        absent: The parts that are missing, with reasons.
        seconds: Seconds that each part took, and "total".
    """

    run: RunFacts
    against: RunFacts | None
    options: AnalysisOptions
    trigger_from: str | None
    classes: tuple[str, ...]
    images: ImageCounts
    examples: examples.Examples
    findings: Findings
    pixels: tuple[pixels.LayerPixels, ...] | None
    carriers: carriers.Carriers | None
    findings_against: Findings | None
    comparison: comparison.RoutingComparison | None
    probe: probe_summary.ProbeSummary | None
    absent: tuple[MissingPart, ...]
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
    """Analyse the model of a finished run. Nothing is written.

    Args:
        run: The run.
        against: Another finished run on the same data to compare with; None for the clean twin, if its folder is
            next to that of the run.
        images: Example images to draw patch maps of, as indices in the test split or paths of image files; None
            to draw images of several classes.
        carriers_images: Largest number of images on which BA, and on which ASR, is measured with experts muted
            and patched; at least 1.
        data_root: Folder of the data, if it has moved since the run was made.
        device: "auto", "cpu", "cuda" or "cuda:N"; None for the run's own.
        observer: Receives progress.

    Raises:
        BbmoeError: The runs, the data or the options are unusable.
    """
    if carriers_images < 1:
        raise ConfigError.expected("carriers_images", "at least 1", carriers_images)
    opened = open_run(run, data_root=data_root, device=device)
    chosen = None if images is None else examples.collect_examples(images, opened.images)
    names = (
        None if images is None else tuple(one if isinstance(one, int) else Path(one).name for one in images)
    )
    options = AnalysisOptions(names, carriers_images)
    return _Analyzer(opened, against, options, observer or Observer()).analyze(chosen)


class _Analyzer:
    """Computes one analysis.

    Args:
        opened: The run to analyse.
        against: The run to compare with; None for the clean twin.
        options: Options that change the results.
        observer: Receives progress.
    """

    def __init__(
        self, opened: OpenedRun, against: Run | None, options: AnalysisOptions, observer: Observer
    ) -> None:
        self.opened, self.options, self.observer = opened, options, observer
        self.absent: list[MissingPart] = []
        self.seconds: dict[str, float] = {}
        self.other = self._open_other(against)
        source = next((r for r in (opened, self.other) if r is not None and r.stamper is not None), None)
        self.source, self.stamper = source, source.stamper if source else None
        self.triggered = self._triggered()

    def analyze(self, chosen: examples.ExampleImages | None) -> Analysis:
        """Compute all parts; chosen: the example images, drawn if None."""
        started = time.perf_counter()
        opened, other = self.opened, self.other
        findings, against, brightness, compared = Findings(), None, None, None
        if opened.routed is None:
            self._check_dense()
            for part in ("routing", "capture", "shift", "pixels", "carriers", "comparison", "probe"):
                self._miss(part, f"the model {opened.run.spec.model.name!r} is dense: it routes nothing")
        else:
            first = self._pass(opened)
            self._check_routed(first)
            findings, brightness = self._findings(opened, first), self._pixels(first.clean)
            if other is not None:
                second = self._pass(other)
                against, compared = self._findings(other, second), _compare(first, second)
            if self.triggered is None:
                for part in ("capture", "shift"):
                    self._miss(
                        part, "there is no trigger: neither this run nor a run it is compared with has one"
                    )
        with self._timed("examples"):
            shown = self._examples(chosen)
        carriers_found = self._carriers() if opened.routed is not None else None
        probe = self._probe() if opened.routed is not None else None
        self.seconds["total"] = time.perf_counter() - started
        return Analysis(
            run=run_facts(opened.run),
            against=None if other is None else run_facts(other.run),
            options=self.options,
            trigger_from=None if self.source is None else self.source.name,
            classes=opened.images.classes,
            images=ImageCounts(len(opened.images.test), len(self.triggered or ())),
            examples=shown,
            findings=findings,
            pixels=brightness,
            carriers=carriers_found,
            findings_against=against,
            comparison=compared,
            probe=probe,
            absent=tuple(self.absent),
            seconds=self.seconds,
        )

    def _check_dense(self) -> None:
        """Measure a dense model again; see `engine.consistency`."""
        opened = self.opened
        found = measure(opened.model, opened.images.test, self._counted(), precision=opened.precision)
        check_same(opened.run, found, precision=opened.precision)

    def _check_routed(self, first: passes.PairedPass) -> None:
        """Compare a routed model's predictions with its record; see `engine.consistency`."""
        opened, counted = self.opened, self._counted()
        found = {"ba": share(first.clean.predicted == opened.images.test.labels.cpu())}
        if counted is not None:
            # Without a trigger the images that count are clean test images.
            stamped = first.triggered if counted is self.triggered else None
            predicted = stamped.predicted if stamped else first.clean.predicted[counted.places.cpu()]
            found["asr"] = share(predicted == counted.wanted.cpu())
        check_same(opened.run, found, precision=opened.precision)

    def _counted(self) -> Triggered | None:
        """Return the images of the run's own ASR; None if it was not attacked."""
        if self.source is self.opened:
            return self.triggered
        if not self.opened.run.spec.attacked:
            return None
        return triggered_test(self.opened.images, self.opened.run.attack(), None)

    def _miss(self, part: str, reason: str) -> None:
        self.absent.append(MissingPart(part, reason))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.observer.on_message(f"analyzing {self.opened.name}: {name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _open_other(self, against: Run | None) -> OpenedRun | None:
        """Open the run to compare with: the given one or, if it can be used, the clean twin."""
        if against is not None:
            other = open_beside(against, self.opened)
            comparison.check_comparable(self.opened, other)
            return other
        if (folder := twin_folder(self.opened.run)) is None:
            self._miss("against", "no other run was named, and there is no clean twin")
            return None
        try:
            other = open_beside(load_run(folder), self.opened)
            comparison.check_comparable(self.opened, other)
        except BbmoeError as error:
            # The report is passed on to others, so it does not say where the run folders are.
            reason = str(error).replace(f"{folder.parent}{os.sep}", "")
            self._miss("against", f"the clean twin cannot be used: {reason}")
            return None
        return other

    def _triggered(self) -> Triggered | None:
        if self.source is None or self.stamper is None:
            return None
        return triggered_test(self.opened.images, self.source.run.attack(), self.stamper)

    def _pass(self, opened: OpenedRun) -> passes.PairedPass:
        assert opened.routed is not None
        with self._timed("routing" if opened is self.opened else "routing against"):
            return passes.run_pass(opened, opened.routed, self.triggered)

    def _findings(self, opened: OpenedRun, found: passes.PairedPass) -> Findings:
        model, images, triggered = opened.routed, opened.images, self.triggered
        assert model is not None
        with self._timed("statistics" if opened is self.opened else "statistics against"):
            labels = images.test.labels.cpu()
            layers = tuple(
                routing.layer_routing(layer, labels, images.num_classes, model.patch_grid)
                for layer in found.clean.layers
            )
            if triggered is None or found.triggered is None or found.divergence is None:
                return Findings(layers)
            before = images.test.images[triggered.places]
            changed = changed_patches(before, triggered.images, model.patch_size).cpu()
            success = found.triggered.predicted == triggered.wanted.cpu()
            captures = tuple(
                capture.layer_capture(layer, changed, success) for layer in found.triggered.layers
            )
            pairs = zip(found.clean.layers, found.triggered.layers, found.divergence, strict=True)
            places = triggered.places.cpu()
            shifts = tuple(shift.layer_shift(a, b, places, divergence) for a, b, divergence in pairs)
        return Findings(layers, captures, shifts)

    def _pixels(self, clean: passes.RoutedPass) -> tuple[pixels.LayerPixels, ...]:
        images, model = self.opened.images, self.opened.routed
        assert model is not None
        with self._timed("pixels"):
            sums = patch_sums(images.test.images, model.patch_size).cpu()
            labels, classes = images.test.labels.cpu(), images.num_classes
            return tuple(
                pixels.layer_pixels(layer, sums, labels, classes, model.patch_size) for layer in clean.layers
            )

    def _examples(self, chosen: examples.ExampleImages | None) -> examples.Examples:
        opened = self.opened
        if chosen is None:
            counted = None if self.triggered is None else self.triggered.places.cpu()
            labels = opened.images.test.labels.cpu()
            drawn = examples.draw_examples(labels, counted, opened.run.spec.seed)
            chosen = examples.collect_examples(drawn, opened.images)
        runs = [opened] if self.other is None else [opened, self.other]
        return examples.make_examples(runs, chosen, self.stamper)

    def _probe(self) -> probe_summary.ProbeSummary | None:
        assert self.opened.routed is not None
        if self.opened.run.spec.defenses:
            self._miss(
                "probe",
                "the run is a defended one; routing over training is kept in the attacked run's folder",
            )
            return None
        summary = probe_summary.summarize_probe(self.opened, self.opened.routed)
        if summary is None:
            self._miss("probe", "the run was made without --probe, so routing over training was not kept")
        return summary

    def _carriers(self) -> carriers.Carriers | None:
        if not isinstance(self.opened.model, WithExperts):
            name = self.opened.run.spec.model.name
            self._miss("carriers", f"the model {name!r} does not list its experts (experts())")
            return None
        with self._timed("carriers"):
            found = carriers.find_carriers(self.opened, self.triggered, self.options.carriers_images)
        if not found.pairs and len(found.singles) > 1:
            self._miss("carriers.pairs", f"there are more than {carriers.MAX_PAIRS} pairs of experts")
        if not found.patched:
            self._miss("carriers.patched", "there is no trigger")
        return found


def twin_folder(run: Run) -> Path | None:
    """Return the folder of a run's clean twin; None if the run has no twin or the folder is not there."""
    name = run.record.clean_twin
    if not name or Path(name).name != name:
        return None
    folder = run.folder.path.parent / name
    return folder if folder.is_dir() else None


def _compare(first: passes.PairedPass, second: passes.PairedPass) -> comparison.RoutingComparison:
    triggered = None
    if first.triggered is not None and second.triggered is not None:
        triggered = comparison.compare_layers(first.triggered.layers, second.triggered.layers)
    clean = comparison.compare_layers(first.clean.layers, second.clean.layers)
    return comparison.RoutingComparison(clean, triggered)
