"""Functions that create runs: attacks, imports and defenses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

from torch import nn

from backdoorbench_moe.api.arguments import (
    Part,
    PathLike,
    names_of,
    needed_images,
    opened_run,
    path_of,
    path_or_none,
    text_or_none,
)
from backdoorbench_moe.config import IMPORTED, PartSpec, RunSpec, build_spec, chain_settings
from backdoorbench_moe.config.shorthand import no_part
from backdoorbench_moe.engine import runner
from backdoorbench_moe.engine.opening.defended_module import DefendedModule, defend_module
from backdoorbench_moe.engine.opening.given_images import Images
from backdoorbench_moe.engine.opening.opened_model import open_model
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_repeats
from backdoorbench_moe.options import convert


def make_spec(settings: Sequence[str] = (), **values: Any) -> RunSpec:
    """Build a RunSpec from nested values; other values come from the recipe.

    Args:
        settings: Strings "dotted.key=value", as for `--set`; they take precedence over `values`.
        values: Fields of RunSpec. A part is a name, or a dict with its "name" and options; `poison` and `train` are
            dicts. NumPy scalars, paths and `torch.device` are converted to plain values.

    Raises:
        UnknownNameError: A key or name does not exist; similar ones are suggested.
        ConfigError: A value has the wrong type or is out of range.
    """
    return build_spec(values, chain_settings(names_of(settings, "settings")))


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
    """Train a backdoored model and evaluate it, as `bbmoe attack` does.

    If the call is repeated, an interrupted run continues after its last finished epoch, and a finished run is reused.

    Args:
        model: Name of the model to attack, or a dict with its "name" and options. `attack`, `trigger`, `applicator` and
            `dataset` are given in the same way.
        trigger: The trigger.
        applicator: Where in the image the trigger is stamped.
        attack: The attack; by default "data-poisoning".
        dataset: The data set.
        recipe: Set of default values: "quick" or "paper".
        output: Folder of run folders.
        repeats: Number of runs, with seeds `seed`, `seed` + 1, ...
        twin: Whether to also train the clean twin of each run, to compute CAD.
        observer: Receives progress.
        settings: See `make_spec`.
        values: Other keys of the spec; see `make_spec`.

    Returns:
        One run for each seed. `value("ba")`, `value("asr")` and, with `twin`, `value("cad")` are in percent;
        `model()` is the trained model, `stamper()` the trigger as it was applied.

    Raises:
        BbmoeError: Any error that the user can correct. Nothing is written if the settings are invalid.
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
    repeats = convert(repeats, int, "repeats")
    check_repeats("repeats", repeats)
    return runner.run_attack(
        spec, output=path_of(output, "output"), repeats=repeats, twin=twin, observer=observer
    )


@default_torch_state()
def import_weights(
    weights: PathLike,
    model: Part,
    *,
    weights_key: str | None = None,
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
    """Import a model that was trained elsewhere as a run, as `bbmoe import` does, and evaluate it on clean test images.

    Args:
        weights: A safetensors file, or a state dict saved with `torch.save`. No code in it is executed.
        model: Name of the model, or a dict with its "name" and options. The names and shapes of its tensors must match
            the weights.
        weights_key: Key of the state dict in a checkpoint, such as "state_dict_ema". None for a file that is a state
            dict, or has one under a common key such as "state_dict" or "model".
        mean: Normalisation inside the model: the mean of each channel for pixels in [0, 1], or a name such as
            "imagenet", which also sets `std`.
        std: The standard deviation of each channel.
        resize: Height and width, in pixels, to which the model resizes its input.
        dataset: The data set; its classes must be those of the model, in the same order.
        recipe: Settings with which defenses tune the model: "quick" or "paper".
        output: Folder of run folders.
        observer: Receives progress.
        settings: See `make_spec`.
        values: Other keys of the spec, such as `seed` or `device`.

    Returns:
        The run, for `defend` and `analyze`. `value("ba")` is its accuracy in percent. Whether it is backdoored is
        unknown.

    Raises:
        BbmoeError: Any error that the user can correct; nothing is written.
    """
    given = {"weights_key": weights_key, "mean": mean, "std": std, "resize": resize}
    if not isinstance(model, str | Mapping):
        raise no_part("model", model)
    part = {"name": model} if isinstance(model, str) else dict(model)
    part |= {"weights": str(path_of(weights, "weights"))}
    part |= {name: value for name, value in given.items() if value is not None}
    spec = make_spec(settings, attack=IMPORTED, model=part, dataset=dataset, recipe=recipe, **values)
    return runner.run_import(spec, output=path_of(output, "output"), observer=observer)


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

    A defended run that is already finished is loaded instead of computed again. For a module, nothing is written; see
    `engine.opening.defended_module`.

    Args:
        run: A Run, or its folder; or a module that maps images (B, 3, S, S) in [0, 1] to logits, which is copied.
        defense: Name of the defense.
        images: For a module: the clean images of the defender; see `engine.opening.opened_model.open_model`.
        labels: For a module: the classes of the images.
        recipe: For a module: the settings with which defenses tune it, "quick" or "paper".
        seed: For a module: the seed of the defense.
        output: Folder of run folders; by default the one that contains `run`.
        data_root: Folder of the data set; by default the one that the run used.
        device: Device to compute on; by default the run's.
        observer: Receives progress.
        options: Options of the defense, such as `ratio=0.2`.

    Returns:
        For a module, a `DefendedModule` with the `model`, the `judgements` and the accuracy after each of its `stages`.
        Otherwise the defended run: `record.stages` holds BA, ASR and RA before the defense and after each of its
        stages, and `model()` is the defended model. If the defense filters inputs, `value("auroc")`, `value("tpr")` and
        `value("fpr")` are in percent; if it judges training images, so are `value("sample_auroc")`,
        `value("sample_tpr")` and `value("sample_fpr")`.

    Raises:
        BbmoeError: Any error that the user can correct.
    """
    if not isinstance(defense, str):
        raise ConfigError.expected("defense", 'a name such as "fine-pruning"', defense)
    if isinstance(run, nn.Module):
        opened = open_model(run, images=needed_images(images), labels=labels, device=device)
        train, part = make_spec(recipe=recipe).train, PartSpec(defense, options)
        return defend_module(opened, part, train, seed=convert(seed, int, "seed"), observer=observer)
    if images is not None or labels is not None:
        raise ConfigError("images, labels: expected none, as a run has its own")
    return runner.run_defense(
        opened_run(run, "run"),
        PartSpec(defense, options),
        output=path_or_none(output, "output"),
        data_root=text_or_none(data_root, "data_root"),
        device=None if device is None else str(device),
        observer=observer,
    )


def load_run(path: PathLike) -> Run:
    """Open a run folder.

    Args:
        path: The folder.

    Raises:
        RecordError: The folder has no record, or the record is damaged.
        ConfigError: `path` is not a path.
    """
    return runner.load_run(path_of(path, "path"))
