"""Looking into models from Python: analyses, audits and triggers that nobody trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from backdoorbench_moe.api.arguments import (
    Part,
    PathLike,
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
    """Look into the model of a finished run, as `bbmoe analyze` does, or at any module, without a trigger.

    Args:
        run: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits.
        labels: Of a module: the classes of the images, if they are known.
        against: A run to compare with, or its folder; by default the clean twin, if it lies beside the run.
        images: Numbers of test images, or image files, to draw patch maps of. Of a module: the clean images to look
            at it with; see `engine.opening.opened_model.open_model`.
        carriers_images: The largest number of images to measure muted and patched experts on.
        output: Folder to write analysis.json, report.html and figures/ to; by default nothing is written.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.
        observer: Receives progress.

    Returns:
        What was found, as dataclasses; of a module a `ModuleAnalysis`.

    Raises:
        BbmoeError: Anything that the user can correct.
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
        carriers_images=carriers_images,
        data_root=text_or_none(data_root, "data_root"),
        device=None if device is None else str(device),
        observer=observer,
    )
    if folder is not None:
        save_analysis(analysis, folder)
    return analysis


def draw_figures(analysis: Analysis) -> dict[str, Plate]:
    """Draw the figures of an analysis' report.

    Args:
        analysis: What `analyze` returned.

    Returns:
        The figures by name, such as "routing", "capture" or "carriers"; which there are depends on the run. Each
        has a `title`, a `sentence` with its numbers, and the drawing as the bytes `svg` and `png`. A notebook
        shows it.
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
    checks: Sequence[str] | None = None,
    image_size: int | None = None,
    output: PathLike | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
    budget: float | None = None,
    observer: Observer | None = None,
) -> Audit:
    """Look for signs of a backdoor, as `bbmoe audit` does.

    Args:
        model: A module that maps images (B, 3, S, S) in [0, 1] to logits (B, classes); or a Run, or its folder. A
            module is copied.
        images: Clean images, 100 are enough; see `engine.opening.given_images.take_images`. Without any, a run's test
            images are used, and a module is judged by its weights alone.
        labels: Their classes; without them, the predicted classes take their place.
        base: The model that the experts were tuned from: a run, its folder, a module or a state dict.
        tasks: Images of each task of a mixture.
        checks: Names of checks to run; all by default. What others found that an earlier call made is reported, too.
        image_size: Side of the images in pixels: what images of a folder are resized to, and for a module without
            images what its channels are measured with.
        output: Folder to write audit.json and report.html to; what each check measured is kept there, too. A folder
            with the audit of another model, or of other images, is refused. By default nothing is written.
        data_root: Folder of the data set of a run; by default the one that it used.
        device: Device to compute on; by default the run's, or for a module that of its weights.
        budget: Seconds, above 0. A check that would take longer than what is left of them is not tested; None for no
            limit.
        observer: Receives progress.

    Returns:
        The audit: `verdict.level` is "signs of a backdoor", "no sign found" or "not tested", `reasons` are the three
        strongest reasons, `findings` all of them; `save(folder)` writes the files.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    from backdoorbench_moe.auditing.checks import find_checks
    from backdoorbench_moe.auditing.place import audit_into
    from backdoorbench_moe.auditing.save import FILES
    from backdoorbench_moe.paths import check_output

    chosen, folder = find_checks(checks), path_or_none(output, "output")
    check_positive(budget=budget)
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
    """Stamp a trigger that nobody trained on images, and count what a model calls them, as `bbmoe trigger` does.

    Args:
        model: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits, which is copied.
        trigger: Name of the trigger, or a dict with its "name" and options.
        applicator: Where in the image it is stamped; the same.
        images: Clean images of a module, see `engine.opening.given_images.take_images`; of a run its test images by
            default.
        labels: Their classes.
        seed: Seed of the trigger; by default the run's, and 0 for a module.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.

    Returns:
        The accuracy with and without the trigger, and `classes`: how often images of other classes are called each
        class. `strongest` is the class whose rate rises most.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    from backdoorbench_moe.engine.opening.tried_trigger import try_trigger as measure

    spec = make_spec(trigger=trigger, applicator=applicator)
    assert spec.trigger is not None and spec.applicator is not None
    if isinstance(model, nn.Module):
        opened = open_model(model, images=needed_images(images), labels=labels, device=device)
        return measure(opened, spec.trigger, spec.applicator, seed=seed or 0)
    run = opened_run(model, "model")
    root = text_or_none(data_root, "data_root")
    opened = open_model(run, images=images, labels=labels, data_root=root, device=device)
    return measure(opened, spec.trigger, spec.applicator, seed=run.spec.seed if seed is None else seed)
