"""Find or make the run of a spec, and first the runs that it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.engine.class_names import describe_poison, warn_of_numeric_names
from backdoorbench_moe.engine.graph import PARENT, needs, reference
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.defend import DefenseMaker
from backdoorbench_moe.engine.makers.train import TrainMaker
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.run import Run, check_data, check_finished, check_model, check_plugins, load_run
from backdoorbench_moe.engine.twin import link_twin
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.records import RunFolder

__all__ = ["Run", "Runner", "load_run", "run_attack", "run_defense"]


def run_attack(
    spec: RunSpec,
    *,
    output: Path | str = "runs",
    repeats: int = 1,
    twin: bool = True,
    observer: Observer | None = None,
) -> list[Run]:
    """Attack a model and measure it, with several seeds.

    A finished run in `output` is reused. An interrupted one continues after its last completed epoch.

    Args:
        spec: The run with the first seed.
        output: Folder of run folders.
        repeats: Number of seeds, `spec.seed`, `spec.seed` + 1, ...
        twin: Whether to make the clean twin too and compare the run with it.
        observer: Receives progress.

    Returns:
        One finished run for each seed.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    runner = Runner(spec, output, observer)
    return [runner.attack(replace(spec, seed=spec.seed + n), twin=twin) for n in range(repeats)]


def run_defense(
    run: Run,
    defense: PartSpec,
    *,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Run:
    """Defend the model of a finished run. The defended run gets its own folder.

    Args:
        run: The run to defend.
        defense: The defense.
        output: Folder of run folders; None for the one that contains `run`.
        data_root: Folder of the data; None for the one that `run` used.
        device: Device to compute on; None for the one that `run` asked for.
        observer: Receives progress.

    Returns:
        The defended run. It is compared with the clean twin if the twin is finished and next to `run`.

    Raises:
        BbmoeError: Anything that the user can correct.
    """
    check_finished(run)
    spec, beside = run.located_spec(), run.folder.path.parent
    if data_root is not None:
        spec = spec.with_data(root=data_root)
    spec = replace(spec, defenses=(*spec.defenses, defense), device=device or spec.device)
    runner = Runner(spec, beside if output is None else output, observer)
    defended = runner.finish(spec, inputs={PARENT: run})
    twin = RunFolder(beside / run.record.clean_twin) if run.record.clean_twin else None
    if twin is None or not twin.exists or (record := twin.read()).status != "finished":
        return defended
    return link_twin(defended, Run(twin, record), runner.workplace)


class Runner:
    """Finds or makes runs on the same data, device and precision.

    Args:
        spec: Spec of any of these runs. Only its data set, device and precision are used.
        output: Folder of run folders.
        observer: Receives progress.

    Raises:
        BbmoeError: A name is unknown, or the device or the data folder does not exist.
    """

    def __init__(self, spec: RunSpec, output: Path | str = "runs", observer: Observer | None = None) -> None:
        self.workplace = Workplace(spec, observer)
        self.output = Path(output)

    def maker(self, spec: RunSpec) -> Maker:
        """Return the maker of a run. All parts are built, and checked against the data and each other.

        Raises:
            BbmoeError: Anything that would stop the run before its first step.
        """
        spec = self.workplace.resolve(spec)
        if spec.defenses:
            return DefenseMaker(spec, self.workplace)
        maker = TrainMaker(spec, self.workplace)
        if spec.attacked:
            classes = self.workplace.images.classes
            warn_of_numeric_names(spec.poison, classes)
            self.workplace.observer.on_message(describe_poison(spec.poison, classes))
        return maker

    def attack(self, spec: RunSpec, *, twin: bool = True) -> Run:
        """Return the finished run of a spec. With `twin`, compare it with its clean twin; see `run_attack`."""
        spec = self.workplace.resolve(spec)
        run, clean = self.finish(spec), reference(spec)
        if clean is None or not twin:
            return run
        return link_twin(run, self.finish(clean, wait=True), self.workplace)

    def compare(self, run: Run) -> Run:
        """Compare a run with its clean twin if the output has a finished one; a missing twin is not trained."""
        clean = reference(run.spec)
        if clean is None or (found := self._find(RunFolder(self.output / clean.name), clean)) is None:
            return run
        return link_twin(run, found, self.workplace)

    def finish(self, spec: RunSpec, *, wait: bool = False, inputs: Mapping[str, Run] | None = None) -> Run:
        """Return the finished run of a spec. It is read from disk, or made if it does not exist.

        Args:
            spec: The run.
            wait: If another process is making the run, wait for it; if False, raise an error.
            inputs: The runs that it is made from, by role; found or made in the same output if None.

        Raises:
            BbmoeError: Anything that the user can correct.
            StopRun: The observer stopped the run; the next call continues it.
        """
        spec = self.workplace.resolve(spec)
        observer, folder = self.workplace.observer, RunFolder(self.output / spec.name)
        if found := self._find(folder, spec):
            observer.on_found(str(folder.path))
            return found
        # Check everything before anything is written or trained, including the runs that this one is made from.
        maker = None if folder.exists else self.maker(spec)
        if inputs is None:
            inputs = {role: self.finish(needed, wait=True) for role, needed in needs(spec).items()}
        if maker is not None:
            maker.prepare(inputs)
        with folder.lock(wait=(lambda: observer.on_wait(str(folder.path))) if wait else None):
            if found := self._find(folder, spec):
                observer.on_found(str(folder.path))
                return found
            return (maker or self.maker(spec)).make(folder, inputs)

    def _find(self, folder: RunFolder, spec: RunSpec) -> Run | None:
        """The finished run in a folder; None if there is none.

        The digest does not cover the location of the data. Therefore check that data, plug-ins and model file are
        still those that the run was made with.

        Raises:
            RecordError: The run was made from other data or with other plug-ins, or its model was replaced.
        """
        if not folder.exists or (record := folder.read()).status != "finished":
            return None
        run = Run(folder, record)
        check_plugins(folder, record)
        check_model(run)
        if not self.workplace.is_unchanged(record):
            check_data(folder, record, self.workplace.images)
        return run
