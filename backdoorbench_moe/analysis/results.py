"""What an analysis of a run consists of."""

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
        test: Number of clean test images. Of texts, number of test queries of the tasks.
        triggered: Number of those that count for ASR; 0 without a trigger. Of texts, number of test queries that the
            policy refuses.
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
        classes: Class names; none where the data are texts.
        images: Numbers of images.
        examples: Patch maps of example images; None where the data are texts.
        findings: Routing of the run's model.
        pixels: Brightness of the patches that each expert takes, layer by layer.
        carriers: BA and ASR with experts muted and patched.
        findings_against: Routing of the other model.
        comparison: Overlap of the two models' selections.
        experts: The experts of a mixture; None for any other run.
        latents: For each poisoned expert, how alike the latents of marked images and of its own task are; None if the
            run is neither an attacked mixture nor a poisoned expert.
        probe: Routing over training.
        answers: Example queries with the generated answers, where the data are texts; None for images.
        absent: The parts that are missing, with reasons.
        seconds: Seconds that each part took, and "total".
    """

    run: RunFacts
    against: RunFacts | None
    options: AnalysisOptions
    trigger_from: str | None
    classes: tuple[str, ...]
    images: ImageCounts
    examples: examples.Examples | None
    findings: Findings
    pixels: tuple[pixels.LayerPixels, ...] | None
    carriers: carriers.Carriers | None
    findings_against: Findings | None
    comparison: comparison.RoutingComparison | None
    experts: gate_shares.ExpertFindings | None
    latents: tuple[latents.ExpertLatents, ...] | None
    probe: probe_summary.ProbeSummary | None
    answers: tuple[answers.AnsweredQuery, ...] | None
    absent: tuple[MissingPart, ...]
    seconds: dict[str, float]
