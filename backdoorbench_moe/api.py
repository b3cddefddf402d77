"""The toolbox from Python: what the command line does, as functions."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from backdoorbench_moe.config import IMPORTED, PartSpec, RunSpec, build_spec, chain_settings
from backdoorbench_moe.engine import runner
from backdoorbench_moe.engine.defended_module import DefendedModule, defend_module
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.opened_model import Images, open_model
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.paths import expand

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from backdoorbench_moe.analysis.analyze import Analysis
    from backdoorbench_moe.analysis.figures.plate import Plate
    from backdoorbench_moe.analysis.module import ModuleAnalysis
    from backdoorbench_moe.auditing.audit import Audit

__all__ = [
    "analyze",
    "attack",
    "audit",
    "defend",
    "draw_figures",
    "import_weights",
    "load_run",
    "make_spec",
    "normalised",
]

Part = str | Mapping[str, Any]
PathLike = str | os.PathLike[str]


def make_spec(settings: Sequence[str] = (), **values: Any) -> RunSpec:
    """Build a RunSpec from nested values; what is not given comes from the recipe.

    Args:
        settings: Texts of the form "dotted.key=value", as for `--set`; they win over `values`.
        values: Keys of RunSpec. A part is a name, or a dict with its "name" and options; `poison` and `train`
            are dicts. NumPy scalars, paths and `torch.device` may stand for plain values.

    Raises:
        UnknownNameError: A key or name does not exist; near ones are suggested.
        ConfigError: A value is of the wrong type or out of range.
    """
    return build_spec(values, chain_settings(settings))


@default_torch_state()
def attack(
    *,
    attack: Part | None = "data-poisoning",
    model: Part = "pmoe",
    trigger: Part | None = None,
    applicator: Part | None = None,
    dataset: Part = "signs",
    recipe: str = "quick",
    output: PathLike = "runs",
    repeats: int = 1,
    twin: bool = True,
    observer: Observer | None = None,
    settings: Sequence[str] = (),
    **values: Any,
) -> list[Run]:
    """Backdoor a model and measure it, as `bbmoe attack` does.

    Interrupted, the same call continues from the last finished epoch; finished, it trains nothing.

    Args:
        model: Name of the model to attack, or a dict with its "name" and options. `attack`, `trigger`, `applicator`
            and `dataset` take the same.
        trigger: The trigger.
        applicator: Where in the image the trigger is stamped.
        attack: The attack; by default "data-poisoning".
        dataset: The data set.
        recipe: "quick" or "paper"; it has the values that are not given.
        output: Folder of run folders.
        repeats: Number of runs, with seeds `seed`, `seed` + 1, ...
        twin: Whether to train the clean twin of each run as well, for CAD.
        observer: Receives progress.
        settings: See `make_spec`.
        values: Other keys of the spec; see `make_spec`.

    Returns:
        One run for each seed. `value("ba")`, `value("asr")` and, with `twin`, `value("cad")` are in percent;
        `model()` is the trained model, `stamper()` the trigger as it was applied.

    Raises:
        BbmoeError: Anything that the user can correct. If the settings are wrong, nothing was written.
    """
    spec = make_spec(
        settings,
        attack=attack,
        model=model,
        dataset=dataset,
        recipe=recipe,
        **{key: part for key, part in (("trigger", trigger), ("applicator", applicator)) if part is not None},
        **values,
    )
    return runner.run_attack(
        spec, output=_path(output, "output"), repeats=repeats, twin=twin, observer=observer
    )


@default_torch_state()
def import_weights(
    weights: PathLike,
    model: Part,
    *,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    resize: int | None = None,
    dataset: Part = "signs",
    recipe: str = "quick",
    output: PathLike = "runs",
    observer: Observer | None = None,
    settings: Sequence[str] = (),
    **values: Any,
) -> Run:
    """Make a run of a model that was made elsewhere, as `bbmoe import` does: measured on clean test images.

    Args:
        weights: A safetensors file, or a state dict that `torch.save` wrote. Nothing in it is run.
        model: Name of the model, or a dict with its "name" and options. Names and shapes must be those of the weights.
        mean: Normalisation inside the model: the mean of each colour for pixels in [0, 1], or a name such as
            "imagenet", which gives `std` as well.
        std: The standard deviation of each colour.
        resize: Side in pixels to which the model resizes its images.
        dataset: The data set, with the classes that the model distinguishes, in its order.
        recipe: "quick" or "paper": how defenses tune the model.
        output: Folder of run folders.
        observer: Receives progress.
        settings: See `make_spec`.
        values: Other keys of the spec, such as `seed` or `device`.

    Returns:
        The run. `value("ba")` is its accuracy; `defend` and `analyze` take it. Whether it is backdoored is not known.

    Raises:
        BbmoeError: Anything that the user can correct; nothing was then written.
    """
    given = {"mean": mean, "std": std, "resize": resize}
    part = {"name": model} if isinstance(model, str) else dict(model)
    part |= {"weights": str(_path(weights, "weights"))}
    part |= {name: value for name, value in given.items() if value is not None}
    spec = make_spec(settings, attack=IMPORTED, model=part, dataset=dataset, recipe=recipe, **values)
    return runner.run_import(spec, output=_path(output, "output"), observer=observer)


def normalised(
    model: nn.Module,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    *,
    image_size: int,
    resize: int | None = None,
) -> nn.Module:
    """Return a copy of a module that normalises its images, and resizes them if asked to, before anything else.

    Functions of this package give a model pixels in [0, 1].

    Args:
        model: A module that takes normalised images.
        mean: The mean of each colour, or a name such as "imagenet", which gives `std` as well.
        std: The standard deviation of each colour.
        image_size: Side of the images before resizing, in pixels.
        resize: Side of the images that the module takes; None for `image_size`.

    Raises:
        ConfigError: A value is out of range.
    """
    from backdoorbench_moe.models.common import COMMON, CommonOptions
    from backdoorbench_moe.models.inputs import prepare_inputs
    from backdoorbench_moe.options import convert

    given = {"mean": mean, "std": std, "resize": resize}
    options = {name: convert(value, COMMON[name].annotation, name) for name, value in given.items()}
    chosen = CommonOptions(**options)
    return prepare_inputs(
        copy.deepcopy(model), normalisation=chosen.normalisation, resize=chosen.resize, image_size=image_size
    )


@overload
def defend(run: Run | PathLike, defense: str, **options: Any) -> Run: ...


@overload
def defend(run: nn.Module, defense: str, **options: Any) -> DefendedModule: ...


@default_torch_state()
def defend(
    run: Run | PathLike | nn.Module,
    defense: str,
    *,
    images: Images | None = None,
    labels: Any = None,
    recipe: str = "quick",
    seed: int = 0,
    output: PathLike | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Run | DefendedModule:
    """Defend the model of a finished run, as `bbmoe defend` does, or any module.

    A run that was defended before is only read. Of a module nothing is written; see `engine.defended_module`.

    Args:
        run: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits, which is copied.
        defense: Name of the defense.
        images: Of a module: the clean images that the defender holds; see `engine.opened_model.open_model`.
        labels: Of a module: their classes.
        recipe: Of a module: "quick" or "paper", the settings with which defenses tune.
        seed: Of a module: the seed of the defense.
        output: Folder of run folders; by default the one that contains `run`.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.
        observer: Receives progress.
        options: The defense's own, such as `ratio=0.2`.

    Returns:
        Of a module a `DefendedModule`, with the `model`, the `judgements` and the accuracy after each of its `stages`.
        Otherwise the defended run. `record.stages` holds BA, ASR and RA before the defense and after each of its
        stages, `model()` is the defended model. If the defense filters inputs, `value("auroc")`, `value("tpr")` and
        `value("fpr")` are in percent; if it judges training images, `value("sample_auroc")`, `value("sample_tpr")` and
        `value("sample_fpr")`.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    if not isinstance(defense, str):
        raise ConfigError.expected("defense", 'a name such as "fine-pruning"', defense)
    if isinstance(run, nn.Module):
        opened = open_model(run, images=_needed(images), labels=labels, device=device)
        train, part = make_spec(recipe=recipe).train, PartSpec(defense, options)
        return defend_module(opened, part, train, seed=seed, observer=observer)
    if images is not None or labels is not None:
        raise ConfigError("images, labels: expected none, as a run has its own")
    return runner.run_defense(
        _opened(run, "run"),
        PartSpec(defense, options),
        output=None if output is None else _path(output, "output"),
        data_root=None if data_root is None else str(_path(data_root, "data_root")),
        device=None if device is None else str(device),
        observer=observer,
    )


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
            at it with; see `engine.opened_model.open_model`.
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
        return analyze_module(open_model(run, images=_needed(images), labels=labels, device=device))
    opened = _opened(run, "run")
    other = None if against is None else _opened(against, "against")
    folder = None if output is None else _path(output, "output")
    if folder is not None:
        check_output(folder)
    chosen: Any = images
    analysis = analyze_run(
        opened,
        against=other,
        images=None if images is None else [one if isinstance(one, int) else expand(one) for one in chosen],
        carriers_images=carriers_images,
        data_root=None if data_root is None else str(_path(data_root, "data_root")),
        device=None if device is None else str(device),
        observer=observer,
    )
    if folder is not None:
        save_analysis(analysis, folder)
    return analysis


@default_torch_state()
def audit(
    model: nn.Module | Run | PathLike,
    *,
    images: Tensor | np.ndarray | PathLike | None = None,
    labels: Sequence[int] | Tensor | np.ndarray | None = None,
    base: Run | PathLike | nn.Module | Mapping[str, Tensor] | None = None,
    tasks: Sequence[Tensor | np.ndarray | PathLike] | None = None,
    checks: Sequence[str] | None = None,
    image_size: int | None = None,
    output: PathLike | None = None,
    data_root: PathLike | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Audit:
    """Look for signs of a backdoor, as `bbmoe audit` does.

    Args:
        model: A module that maps images (B, 3, S, S) in [0, 1] to logits (B, classes); or a Run, or its folder. A
            module is copied.
        images: Clean images, 100 are enough: (N, 3, S, S) uint8, or a folder of image files. Without any, a run's test
            images are used, and a module is judged by its weights alone.
        labels: Their classes; without them, the predicted classes take their place.
        base: The model that the experts were tuned from: a run, its folder, a module or a state dict.
        tasks: Images of each task of a mixture.
        checks: Names of checks; all by default.
        image_size: Side of the images in pixels: what images of a folder are resized to, and for a module without
            images what its channels are measured with.
        output: Folder to write audit.json and report.html to; what each check measured is kept there, too. By default
            nothing is written.
        data_root: Folder of the data set of a run; by default the one that it used.
        device: Device to compute on; by default the run's, or for a module that of its weights.
        observer: Receives progress.

    Returns:
        The audit: `verdict.level` is "signs of a backdoor", "no sign found" or "not tested", `reasons` are the three
        strongest reasons, `findings` all of them; `save(folder)` writes the files.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    from torch import nn

    from backdoorbench_moe.auditing import opening
    from backdoorbench_moe.auditing.audit import run_audit
    from backdoorbench_moe.auditing.checks import find_checks

    chosen = find_checks(checks)
    given: dict[str, Any] = {"images": images, "labels": labels, "base": base}
    if isinstance(model, nn.Module):
        name = type(model).__name__
        subject = opening.open_module_subject(
            model, tasks=tasks or (), image_size=image_size, device=device, **given
        )
    else:
        opened = _opened(model, "model")
        name = opened.folder.path.name
        root = None if data_root is None else str(_path(data_root, "data_root"))
        subject = opening.open_run_subject(opened, tasks=tasks, data_root=root, device=device, **given)
    folder = None if output is None else _path(output, "output")
    subject, store = opening.with_store(subject, folder)
    found = run_audit(subject, name=name, store=store, checks=chosen, observer=observer)
    if folder is not None:
        found.save(folder)
    return found


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


def load_run(path: PathLike) -> Run:
    """Open a run folder.

    Args:
        path: The folder.

    Raises:
        RecordError: There is no record in it, or it is damaged.
        ConfigError: `path` is something else than a path.
    """
    return runner.load_run(_path(path, "path"))


def _needed(images: Any) -> Any:
    if images is None:
        raise ConfigError.expected("images", "clean images, as the model is a module", None)
    return images


def _opened(run: Run | PathLike, parameter: str) -> Run:
    if isinstance(run, Run):
        return run
    if isinstance(run, list | tuple) and run and all(isinstance(one, Run) for one in run):
        raise ConfigError(
            f"{parameter}: expected one Run, got a list of {len(run)}; attack() returns one a seed: [run] = attack(...)"
        )
    return runner.load_run(_path(run, parameter, "a Run (from attack or load_run) or the path of its folder"))


def _path(value: object, parameter: str, expected: str = "a path") -> Path:
    if isinstance(value, str | os.PathLike):
        return expand(value)
    # Of a model or an array the type: its text may have thousands of lines.
    raise ConfigError(f"{parameter}: expected {expected}, got an object of type {type(value).__name__}")
