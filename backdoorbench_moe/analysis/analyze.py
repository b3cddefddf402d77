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
    gate_shares,
    latents,
    passes,
    pixels,
    probe_summary,
    routing,
    shift,
)
from backdoorbench_moe.analysis.facts import RunFacts, run_facts
from backdoorbench_moe.analysis.marks import mark_test
from backdoorbench_moe.analysis.remeasure import check_record, pass_mixture
from backdoorbench_moe.engine.mixture_metrics import MixturePass
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.opened_run import OpenedRun, open_beside, open_run
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.errors import BbmoeError, ConfigError
from backdoorbench_moe.moe.structure import WithExperts
from backdoorbench_moe.ops.routing import changed_patches, patch_sums
from backdoorbench_moe.ops.seeding import seeded

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
        trigger_from: Name of the run folder whose trigger is used: the run's own or, if the run is not attacked with
            one, that of the run it is compared with. None without a trigger.
        classes: Class names.
        images: Numbers of images.
        examples: Patch maps of example images.
        findings: Routing of the run's model.
        pixels: Brightness of the patches that each expert takes, layer by layer.
        carriers: BA and ASR with experts muted and patched.
        findings_against: Routing of the other model.
        comparison: Overlap of the two models' selections.
        experts: The experts of a mixture; None for any other run.
        latents: For each poisoned expert, how alike the latents of marked images and of its own task are; None if the
            run is neither an attacked mixture nor a poisoned expert.
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
    experts: gate_shares.ExpertFindings | None
    latents: tuple[latents.ExpertLatents, ...] | None
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
        self.marked = mark_test(opened, self.other)
        self.triggered = None if self.marked is None else self.marked.triggered

    def analyze(self, chosen: examples.ExampleImages | None) -> Analysis:
        """Compute all parts; chosen: the example images, drawn if None."""
        started = time.perf_counter()
        opened, other = self.opened, self.other
        findings, against, brightness, compared = Findings(), None, None, None
        mixture = self._mixture(opened) if opened.is_mixture else None
        first = None if opened.routed is None else self._pass(opened)
        check_record(opened, self.marked, first, mixture)
        if first is None:
            for part in ("routing", "capture", "shift", "pixels", "carriers", "comparison", "probe"):
                self._miss(part, f"the model {opened.run.spec.model.name!r} is dense: it routes nothing")
        else:
            findings, brightness = self._findings(opened, first), self._pixels(first.clean)
            if other is not None:
                second = self._pass(other)
                against, compared = self._findings(other, second), comparison.compare_passes(first, second)
            if self.triggered is None:
                for part in ("capture", "shift"):
                    self._miss(part, self._no_attack())
        with self._timed("examples"):
            shown = self._examples(chosen)
        experts = None if mixture is None else self._experts(mixture)
        cosines = self._latents()
        carriers_found = self._carriers() if opened.routed is not None else None
        probe = self._probe() if opened.routed is not None else None
        self.seconds["total"] = time.perf_counter() - started
        return Analysis(
            run=run_facts(opened.run),
            against=None if other is None else run_facts(other.run),
            options=self.options,
            trigger_from=None if self.marked is None else self.marked.source.name,
            classes=opened.images.classes,
            images=ImageCounts(len(opened.images.test), len(self.triggered or ())),
            examples=shown,
            findings=findings,
            pixels=brightness,
            carriers=carriers_found,
            findings_against=against,
            comparison=compared,
            experts=experts,
            latents=cosines,
            probe=probe,
            absent=tuple(self.absent),
            seconds=self.seconds,
        )

    def _no_attack(self) -> str:
        if self.marked is not None:
            return "the trigger marks the images to reject; no attack uses it"
        return "there is no trigger: neither this run nor a run it is compared with has one"

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
            reason = _without_folder(error, folder.parent)
            self._miss("against", f"the clean twin cannot be used: {reason}")
            return None
        return other

    def _pass(self, opened: OpenedRun) -> passes.PairedPass:
        assert opened.routed is not None
        name = "routing" if opened is self.opened else "routing against"
        with self._timed(name), seeded(self.opened.run.spec.seed, "routing"):
            test, precision = opened.images.test.images, opened.precision
            return passes.run_pass(opened.routed, test, self.triggered, precision=precision)

    def _mixture(self, opened: OpenedRun) -> MixturePass:
        with self._timed("tasks" if opened is self.opened else "tasks against"):
            return pass_mixture(self.opened, opened, self.marked)

    def _experts(self, found: MixturePass) -> gate_shares.ExpertFindings:
        opened, other = self.opened, self.other
        assert opened.tasks is not None and opened.run.spec.mixture is not None
        against = None if other is None else gate_shares.model_shares(self._mixture(other))
        return gate_shares.ExpertFindings(
            tasks=tuple(opened.tasks.names),
            poisoned=opened.run.spec.mixture.poisoned_experts,
            shares=gate_shares.model_shares(found),
            shares_against=against,
        )

    def _latents(self) -> tuple[latents.ExpertLatents, ...] | None:
        spec = self.opened.run.spec
        if self.marked is None or spec.mixture is None or not spec.attacked:
            return None
        task = spec.mixture.task
        experts = spec.mixture.poisoned_experts if task is None else (task,)
        try:
            with self._timed("latents"):
                return tuple(
                    latents.find_latents(self.opened, self.other, self.marked, expert) for expert in experts
                )
        except BbmoeError as error:
            self._miss("latents", _without_folder(error, self.opened.run.folder.path.parent))
            return None

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
        return examples.make_examples(
            runs, chosen, None if self.marked is None else self.marked.source.stamper
        )

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
            safe = None if self.marked is None else self.marked.safe
            limit = self.options.carriers_images
            found = carriers.find_carriers(self.opened, self.triggered, limit, safe=safe)
        if not found.pairs and len(found.singles) > 1:
            self._miss("carriers.pairs", f"there are more than {carriers.MAX_PAIRS} pairs of experts")
        if not found.patched:
            self._miss("carriers.patched", self._no_attack())
        return found


def _without_folder(error: BbmoeError, folder: Path) -> str:
    """The text of an error without the folder of the run folders, since the report is passed on to others."""
    return str(error).replace(f"{folder}{os.sep}", "")


def twin_folder(run: Run) -> Path | None:
    """Return the folder of a run's clean twin; None if the run has no twin or the folder is not there."""
    name = run.record.clean_twin
    if not name or Path(name).name != name:
        return None
    folder = run.folder.path.parent / name
    return folder if folder.is_dir() else None
