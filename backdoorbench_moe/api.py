"""The toolbox from Python: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.config import PartSpec, RunSpec, build_spec, chain_settings
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense

if TYPE_CHECKING:
    from backdoorbench_moe.analysis.analyze import Analysis

__all__ = ["analyze", "attack", "defend", "load_run", "make_spec"]

Part = str | Mapping[str, Any]


def make_spec(settings: Sequence[str] = (), **values: Any) -> RunSpec:
    """Build a RunSpec from nested values over the recipe's.

    values: keys of RunSpec; a part is a name, or {"name": ..., option: value}; `poison` and `train` are
    dicts. settings: "dotted.key=value" texts, which win. Raises UnknownNameError or ConfigError naming
    the key, what was expected and what came.
    """
    return build_spec(values, chain_settings(settings))


def attack(
    *,
    attack: Part | None = "data-poisoning",
    model: Part = "pmoe",
    trigger: Part | None = None,
    applicator: Part | None = None,
    dataset: Part = "signs",
    recipe: str = "quick",
    output: Path | str = "runs",
    repeats: int = 1,
    twin: bool = True,
    observer: Observer | None = None,
    settings: Sequence[str] = (),
    **values: Any,
) -> list[Run]:
    """Backdoor a model and measure it, as `bbmoe attack` does; returns one Run a seed.

    Each run's `value("ba")`, `value("asr")` and (with `twin`) `value("cad")` are percent; `model()` is
    the trained model, `stamper()` the trigger as it was applied. Interrupted, the same call goes on from
    the last finished epoch; finished, it trains nothing. Other keys are those of `make_spec`. Raises
    BbmoeError for anything the user can mend.
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
    return run_attack(spec, output=output, repeats=repeats, twin=twin, observer=observer)


def defend(
    run: Run | Path | str,
    defense: str,
    *,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Run:
    """Defend the model of a finished run, as `bbmoe defend` does; returns the defended run.

    run: a Run or its folder. options: the defense's own, such as ratio=0.2. output: folder of run folders;
    the one `run` lies in where None. `record.stages` of what comes back holds BA, ASR and RA before and after
    every stage, `model()` is the defended model; where the defense is a filter of inputs, `value("auroc")`,
    "tpr" and "fpr" are percent. Finished before, it is only read. Raises BbmoeError for anything the user can
    mend.
    """
    return run_defense(
        _opened(run),
        PartSpec(defense, options),
        output=output,
        data_root=data_root,
        device=device,
        observer=observer,
    )


def analyze(
    run: Run | Path | str,
    *,
    against: Run | Path | str | None = None,
    images: Sequence[int | str | Path] | None = None,
    carriers_images: int = 2000,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Analysis:
    """Look into the model of a finished run, as `bbmoe analyze` does; returns what is found, as dataclasses.

    run, against: a Run or its folder; compared with the clean twin, if it lies beside the run, where `against`
    is None. images: numbers of test images, or image files, for patch maps. carriers_images: at most so many to
    measure muted and patched experts on. output: folder that analysis.json, report.html and figures/ are written
    to; nothing is written where None. Raises BbmoeError for anything the user can mend.
    """
    from backdoorbench_moe.analysis.analyze import analyze_run
    from backdoorbench_moe.analysis.save import check_output, save_analysis

    if output is not None:
        check_output(Path(output))
    analysis = analyze_run(
        _opened(run),
        against=None if against is None else _opened(against),
        images=images,
        carriers_images=carriers_images,
        data_root=data_root,
        device=device,
        observer=observer,
    )
    if output is not None:
        save_analysis(analysis, Path(output))
    return analysis


def _opened(run: Run | Path | str) -> Run:
    return run if isinstance(run, Run) else load_run(run)
