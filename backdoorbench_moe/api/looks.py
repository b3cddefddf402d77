"""Functions that inspect models: analyses, audits and trials of triggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from backdoorbench_moe.api.arguments import (
    Part,
    PathLike,
    names_of,
    needed_images,
    opened_run,
    path_or_none,
    text_or_none,
)
from backdoorbench_moe.api.runs import make_spec
from backdoorbench_moe.engine.opening.given_images import Images
from backdoorbench_moe.engine.opening.opened_model import open_model
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_positive
from backdoorbench_moe.options import convert
from backdoorbench_moe.paths import expand

if TYPE_CHECKING:
    from torch import Tensor

    from backdoorbench_moe.analysis.figures.plate import Plate
    from backdoorbench_moe.analysis.module import ModuleAnalysis
    from backdoorbench_moe.analysis.results import Analysis
    from backdoorbench_moe.auditing.audit import Audit
    from backdoorbench_moe.auditing.subject import Subject
    from backdoorbench_moe.engine.opening.tried_trigger import TriedTrigger


@default_torch_state()
def analyze(
    run: Run | PathLike | nn.Module,
    *,
    labels: Any = None,
    against: Run | PathLike | None = None,
    images: Sequence[int | PathLike] | Images | None = None,
    carriers_images: int = 2000,
    output: PathLike | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Analysis | ModuleAnalysis:
    """Analyse the model of a finished run, as `bbmoe analyze` does, or any module, without a trigger.

    Args:
        run: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits.
        labels: For a module: the classes of the images, if known.
        against: A run to compare with, or its folder; by default the clean twin, if its folder is next to the run's.
        images: Numbers of test images, or image files, to draw patch maps of. For a module: the clean images to analyse
            it with; see `engine.opening.opened_model.open_model`.
        carriers_images: Number of images, at most, on which muted and patched experts are evaluated.
        output: Folder to write analysis.json, report.html and figures/ to; by default nothing is written.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.
        observer: Receives progress.

    Returns:
        The results as dataclasses; for a module, a `ModuleAnalysis`.

    Raises:
        BbmoeError: Any error that the user can correct.
    """
    from backdoorbench_moe.analysis.analyze import analyze_run
    from backdoorbench_moe.analysis.module import analyze_module
    from backdoorbench_moe.analysis.save import check_output, save_analysis

    if isinstance(run, nn.Module):
        if output is not None or against is not None:
            raise ConfigError("output, against: expected none for a module; import it as a run first")
        return analyze_module(open_model(run, images=needed_images(images), labels=labels, device=device))
    opened = opened_run(run, "run")
    other = None if against is None else opened_run(against, "against")
    folder = path_or_none(output, "output")
    if folder is not None:
        check_output(folder)
    chosen: Any = images
    analysis = analyze_run(
        opened,
        against=other,
        images=None if images is None else [one if isinstance(one, int) else expand(one) for one in chosen],
        carriers_images=convert(carriers_images, int, "carriers_images"),
        data_root=text_or_none(data_root, "data_root"),
        device=None if device is None else str(device),
        observer=observer,
    )
    if folder is not None:
        save_analysis(analysis, folder)
    return analysis


def draw_figures(analysis: Analysis) -> dict[str, Plate]:
    """Draw the figures of the report of an analysis.

    Args:
        analysis: The result of `analyze`.

    Returns:
        The figures by name, such as "routing", "capture" or "carriers"; the run determines which are drawn. Each has a
        `title`, a `sentence` with its numbers, and the drawing as bytes, `svg` and `png`. Notebooks display it.
    """
    from backdoorbench_moe.analysis.document import as_document
    from backdoorbench_moe.analysis.report import draw_sections

    sections = draw_sections(as_document(analysis))
    return {plate.name: plate for section in sections for plate in section.plates}


@default_torch_state()
def audit(
    model: nn.Module | Run | PathLike,
    *,
    images: Images | None = None,
    labels: Any = None,
    base: Run | PathLike | nn.Module | Mapping[str, Tensor] | None = None,
    tasks: Sequence[Images] | None = None,
    checks: Sequence[str] | str | None = None,
    image_size: int | None = None,
    output: PathLike | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
    budget: float | None = None,
    observer: Observer | None = None,
) -> Audit:
    """Check a model for signs of a backdoor, as `bbmoe audit` does.

    Args:
        model: A module that maps images (B, 3, S, S) in [0, 1] to logits (B, classes); or a Run, or its folder. A
            module is copied.
        images: Clean images; 100 are enough; see `engine.opening.given_images.take_images`. By default, a run's test
            images are used, and a module is judged by its weights only.
        labels: Classes of the images; by default the predicted classes.
        base: The base model that the experts were fine-tuned from: a run, its folder, a module or a state dict.
        tasks: Images of each task of a mixture.
        checks: Names of checks to run, or one name; all by default. Results of other checks from earlier calls are
            also reported.
        image_size: Height and width in pixels to which images of a folder are resized; for a module without images,
            the input size with which its channels are measured.
        output: Folder for audit.json, report.html and the results of each check. A folder with the audit of another
            model, or of other images, is rejected. By default, nothing is written.
        data_root: Folder of the data set of a run; by default the one that it used.
        device: Device to compute on; by default that of the run, or of the module's weights.
        budget: Time limit in seconds, above 0; None for no limit. Checks that would exceed it are not tested.
        observer: Receives progress.

    Returns:
        The audit: `verdict.level` is "signs of a backdoor", "no sign found" or "not tested", `reasons` are the three
        strongest reasons, `findings` all of them; `save(folder)` writes the files.

    Raises:
        BbmoeError: Any error that the user can correct.
    """
    from backdoorbench_moe.auditing.checks import find_checks
    from backdoorbench_moe.auditing.place import audit_into
    from backdoorbench_moe.auditing.save import FILES
    from backdoorbench_moe.paths import check_output

    chosen = find_checks(None if checks is None else names_of(checks, "checks"))
    folder, budget = path_or_none(output, "output"), convert(budget, float | None, "budget")
    check_positive(budget=budget)
    image_size = convert(image_size, int | None, "image_size")
    if folder is not None:
        check_output(folder, "output", FILES)
    given = {"images": images, "labels": labels, "base": base, "tasks": tasks, "device": device}
    name, subject = _open_subject(model, image_size, text_or_none(data_root, "data_root"), given)
    settings: dict[str, Any] = {"name": name, "checks": chosen, "budget": budget, "observer": observer}
    return audit_into(subject, output=folder, parameter="output", **settings)[0]


def _open_subject(
    model: nn.Module | Run | PathLike, image_size: int | None, data_root: str | None, given: dict[str, Any]
) -> tuple[str, Subject]:
    """Return the name of a model and the subject of its audit."""
    from backdoorbench_moe.auditing.opening import open_module_subject, open_run_subject

    if isinstance(model, nn.Module):
        return type(model).__name__, open_module_subject(model, image_size=image_size, **given)
    run = opened_run(model, "model")
    return run.folder.path.name, open_run_subject(run, data_root=data_root, **given)


@default_torch_state()
def try_trigger(
    model: Run | PathLike | nn.Module,
    trigger: Part,
    applicator: Part = "patch",
    *,
    images: Images | None = None,
    labels: Any = None,
    seed: int | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
) -> TriedTrigger:
    """Stamp a trigger on images and count how a model classifies them, as `bbmoe trigger` does.

    Args:
        model: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits, which is copied.
        trigger: Name of the trigger, or a dict with its "name" and options.
        applicator: Where the trigger is stamped: name of the applicator, or a dict with its "name" and options.
        images: Clean images; required for a module, by default a run's test images. See
            `engine.opening.given_images.take_images`.
        labels: Classes of the images.
        seed: Seed of the trigger; by default the run's, or 0 for a module.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.

    Returns:
        The accuracy with and without the trigger, and `classes`: for each class, how often images of other classes are
        classified as it. `strongest` is the class whose rate rises most.

    Raises:
        BbmoeError: Any error that the user can correct.
    """
    from backdoorbench_moe.engine.opening.tried_trigger import try_trigger as measure

    spec, seed = make_spec(trigger=trigger, applicator=applicator), convert(seed, int | None, "seed")
    assert spec.trigger is not None and spec.applicator is not None
    if isinstance(model, nn.Module):
        opened = open_model(model, images=needed_images(images), labels=labels, device=device)
        return measure(opened, spec.trigger, spec.applicator, seed=seed or 0)
    run = opened_run(model, "model")
    root = text_or_none(data_root, "data_root")
    opened = open_model(run, images=images, labels=labels, data_root=root, device=device)
    return measure(opened, spec.trigger, spec.applicator, seed=run.spec.seed if seed is None else seed)
