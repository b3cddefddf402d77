"""The analysis of a run; see `bbmoe analyze`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.analysis import (
    capture,
    carriers,
    comparison,
    examples,
    latents,
    passes,
    pixels,
    probe_summary,
    routing,
    shift,
)
from backdoorbench_moe.analysis.analyzer import Analyzer
from backdoorbench_moe.analysis.marks import mark_test
from backdoorbench_moe.analysis.remeasure import check_record, pass_mixture
from backdoorbench_moe.analysis.results import (
    DEFAULT_CARRIERS_IMAGES,
    Analysis,
    AnalysisOptions,
    Findings,
    ImageCounts,
)
from backdoorbench_moe.analysis.text_analyzer import TextAnalyzer
from backdoorbench_moe.engine.measuring.mixtures import MixturePass
from backdoorbench_moe.engine.opening.opened_run import OpenedRun, open_run
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.structure import WithExperts
from backdoorbench_moe.ops.routing import changed_patches, patch_sums
from backdoorbench_moe.ops.seeding import seeded


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
    """Analyze the model of a finished run. No files are written.

    Args:
        run: The run.
        against: Another finished run on the same data to compare with; None for the clean twin, if its folder is
            next to that of the run.
        images: Images to show patch maps of, as indices in the test split or paths of image files; None to choose
            images of several classes at random.
        carriers_images: Largest number of images, or texts, on which BA and ASR are each measured with experts muted
            and patched; at least 1.
        data_root: Folder of the data, if it was moved after the run.
        device: "auto", "cpu", "cuda" or "cuda:N"; None for the device of the run.
        observer: Receives progress.

    Raises:
        BbmoeError: The runs, the data or the options are unusable.
    """
    if carriers_images < 1:
        raise ConfigError.expected("carriers_images", "at least 1", carriers_images)
    if run.record.is_text and images is not None:
        raise ConfigError("images: expected none, as the data are texts")
    opened = open_run(run, data_root=data_root, device=device)
    if run.record.is_text:
        options = AnalysisOptions(None, carriers_images)
        return TextAnalyzer(opened, against, options, observer or Observer()).analyze()
    chosen = None if images is None else examples.collect_examples(images, opened.images)
    names = (
        None if images is None else tuple(one if isinstance(one, int) else Path(one).name for one in images)
    )
    options = AnalysisOptions(names, carriers_images)
    return _ImageAnalyzer(opened, against, options, observer or Observer()).analyze(chosen)


class _ImageAnalyzer(Analyzer):
    """Computes the analysis of one run on images."""

    def __init__(
        self, opened: OpenedRun, against: Run | None, options: AnalysisOptions, observer: Observer
    ) -> None:
        super().__init__(opened, against, options, observer)
        self.marked = mark_test(opened, self.other)
        self.triggered = None if self.marked is None else self.marked.triggered

    def analyze(self, chosen: examples.ExampleImages | None) -> Analysis:
        """Compute all parts.

        Args:
            chosen: The example images; None to choose them at random.
        """
        opened, marked = self.opened, self.marked
        mixture = self._mixture(opened) if opened.is_mixture else None
        routed = None if opened.routed is None else self._pass(opened)
        check_record(opened, marked, routed, mixture)
        found = replace(
            self._new(ImageCounts(len(opened.images.test), len(self.triggered or ()))),
            trigger_from=None if marked is None else marked.source.name,
            classes=opened.images.classes,
        )
        if routed is None:
            self._miss_routing()
        else:
            found = self._with_routing(found, routed)
        with self._timed("examples"):
            found = replace(found, examples=self._examples(chosen))
        if mixture is not None:
            against = None if self.other is None else self._mixture(self.other)
            found = replace(found, experts=self._experts(mixture, against))
        if marked is not None:
            found = replace(found, latents=self._latents(self._find_latents))
        if routed is not None:
            found = replace(found, carriers=self._carriers(), probe=self._probe())
        return self._finished(found)

    def _miss_routing(self) -> None:
        name = self.opened.run.spec.model.name
        for part in ("routing", "capture", "shift", "pixels", "carriers", "comparison", "probe"):
            self._miss(part, f"the model {name!r} has no routing: it is dense, or not a RoutedModel")

    def _with_routing(self, found: Analysis, routed: passes.PairedPass) -> Analysis:
        """Add the routing of the run's model and, if there is one, of the model that it is compared with."""
        found = replace(
            found, findings=self._findings(self.opened, routed), pixels=self._pixels(routed.clean)
        )
        if self.other is not None:
            against = self._pass(self.other)
            found = replace(
                found,
                findings_against=self._findings(self.other, against),
                comparison=comparison.compare_passes(routed, against),
            )
        if self.triggered is None:
            for part in ("capture", "shift"):
                self._miss(part, self._no_attack())
        return found

    def _no_attack(self) -> str:
        if self.marked is not None:
            return "the trigger marks the images to reject; no attack uses it"
        return "there is no trigger: neither this run nor a run it is compared with has one"

    def _pass(self, opened: OpenedRun) -> passes.PairedPass:
        assert opened.routed is not None
        name = "routing" if opened is self.opened else "routing against"
        with self._timed(name), seeded(self.opened.run.spec.seed, "routing"):
            test, precision = opened.images.test.images, opened.precision
            return passes.run_pass(opened.routed, test, self.triggered, precision=precision)

    def _mixture(self, opened: OpenedRun) -> MixturePass:
        with self._timed("tasks" if opened is self.opened else "tasks against"):
            return pass_mixture(self.opened, opened, self.marked)

    def _find_latents(self, expert: int) -> latents.ExpertLatents:
        assert self.marked is not None
        kinds = {
            "marked": latents.Inputs(self.marked.images),
            "unmarked": latents.Inputs(self.marked.unmarked),
        }
        return latents.find_latents(self.opened, self.other, kinds, expert)

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
        if carriers.too_many_pairs(self.opened.model.experts()):
            self._miss("carriers.pairs", f"there are more than {carriers.MAX_PAIRS} pairs of experts")
        if not found.patched:
            self._miss("carriers.patched", self._no_attack())
        return found
