"""Results of the analysis of a run."""

from __future__ import annotations

from dataclasses import dataclass

from backdoorbench_moe.analysis import (
    answers,
    capture,
    carriers,
    comparison,
    examples,
    gate_shares,
    latents,
    pixels,
    probe_summary,
    routing,
    shift,
)
from backdoorbench_moe.analysis.facts import RunFacts

DEFAULT_CARRIERS_IMAGES = 2000


@dataclass(frozen=True)
class Findings:
    """Routing of one model, layer by layer.

    A part that could not be computed is None; `Analysis.absent` gives the reason.

    Attributes:
        routing: Routing of the clean test images.
        capture: Trigger capture of the triggered images that count for ASR.
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
        reason: The reason.
    """

    part: str
    reason: str


@dataclass(frozen=True)
class ImageCounts:
    """Numbers of images.

    Attributes:
        test: Number of clean test images; for texts, number of test queries of the tasks.
        triggered: Number of triggered images that count for ASR, 0 without a trigger; for texts, number of test queries
            that the policy refuses.
    """

    test: int
    triggered: int


@dataclass(frozen=True)
class AnalysisOptions:
    """Options of an analysis that change its results.

    Attributes:
        images: The example images, each given as an index in the test split or the name of a file without its folder;
            None if they were chosen at random.
        carriers_images: Largest number of images on which muted and patched experts were measured.
    """

    images: tuple[int | str, ...] | None
    carriers_images: int


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The analysis of a run and of the run that it is compared with.

    Attributes:
        run: The run.
        against: The run that it is compared with; None if there is none.
        options: Options that change the results.
        trigger_from: Name of the run folder that the trigger is from: the run itself or, if it has no attack with a
            trigger, the run that it is compared with. None without a trigger.
        classes: Class names; empty for texts.
        images: Numbers of images.
        examples: Patch maps of example images; None for texts.
        findings: Routing of the run's model.
        pixels: Brightness of the patches that each expert takes, in each routed layer.
        carriers: BA and ASR with experts muted and patched.
        findings_against: Routing of the other model.
        comparison: Overlap of the two models' selections.
        experts: The experts of a mixture; None for any other run.
        latents: For each poisoned expert, the similarity of the latents of marked images and of its own task; None if
            the run is neither an attacked mixture nor a poisoned expert.
        probe: Routing over training.
        answers: Example queries with the generated answers, for texts; None for images.
        absent: The missing parts, with reasons.
        seconds: Computing time of each part, and "total", in seconds.
    """

    run: RunFacts
    against: RunFacts | None
    options: AnalysisOptions
    trigger_from: str | None = None
    classes: tuple[str, ...] = ()
    images: ImageCounts
    examples: examples.Examples | None = None
    findings: Findings = Findings()
    pixels: tuple[pixels.LayerPixels, ...] | None = None
    carriers: carriers.Carriers | None = None
    findings_against: Findings | None = None
    comparison: comparison.RoutingComparison | None = None
    experts: gate_shares.ExpertFindings | None = None
    latents: tuple[latents.ExpertLatents, ...] | None = None
    probe: probe_summary.ProbeSummary | None = None
    answers: tuple[answers.AnsweredQuery, ...] | None = None
    absent: tuple[MissingPart, ...]
    seconds: dict[str, float]
